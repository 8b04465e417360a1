# Whether networks know when they are wrong, per data set and network.


rule make_calibrate:
    input:
        parents("calibrate"),
    output:
        RESULTS / "{dataset}/{network}/done/calibrate.{id}.json",
    log:
        RESULTS / "{dataset}/{network}/logs/calibrate.{id}.log",
    benchmark:
        RESULTS / "{dataset}/{network}/logs/calibrate.{id}.tsv"
    threads: 1
    message:
        "Calibrate {wildcards.network} on {wildcards.dataset}"
    script:
        "../scripts/stage.py"
