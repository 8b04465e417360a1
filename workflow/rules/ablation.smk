# What each class loses when units are removed, per data set and network.


rule make_ablate:
    input:
        parents("ablate"),
    output:
        RESULTS / "{dataset}/{network}/done/ablate.{id}.json",
    log:
        RESULTS / "{dataset}/{network}/logs/ablate.{id}.log",
    benchmark:
        RESULTS / "{dataset}/{network}/logs/ablate.{id}.tsv"
    threads: 1
    message:
        "Ablate {wildcards.network} on {wildcards.dataset}"
    script:
        "../scripts/stage.py"
