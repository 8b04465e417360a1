# How a network looks at images, per data set and network.


rule make_sight:
    input:
        parents("sight"),
    output:
        RESULTS / "{dataset}/{network}/done/sight.{id}.json",
    log:
        RESULTS / "{dataset}/{network}/logs/sight.{id}.log",
    benchmark:
        RESULTS / "{dataset}/{network}/logs/sight.{id}.tsv"
    threads: 1
    message:
        "How {wildcards.network} looks at {wildcards.dataset}"
    script:
        "../scripts/stage.py"
