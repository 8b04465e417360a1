# Activations, then thresholds, IoU and labels of units, per data set and network.


rule make_extract:
    input:
        parents("extract"),
    output:
        RESULTS / "{dataset}/{network}/done/extract.{id}.json",
    log:
        RESULTS / "{dataset}/{network}/logs/extract.{id}.log",
    benchmark:
        RESULTS / "{dataset}/{network}/logs/extract.{id}.tsv"
    threads: 1
    message:
        "Activations of {wildcards.network} on {wildcards.dataset}"
    script:
        "../scripts/stage.py"


rule make_dissect:
    input:
        parents("dissect"),
    output:
        RESULTS / "{dataset}/{network}/done/dissect.{id}.json",
    log:
        RESULTS / "{dataset}/{network}/logs/dissect.{id}.log",
    benchmark:
        RESULTS / "{dataset}/{network}/logs/dissect.{id}.tsv"
    threads: 1
    message:
        "Dissect {wildcards.network} on {wildcards.dataset}"
    script:
        "../scripts/stage.py"
