# Linear probes of the layers, per data set and network.


rule make_probes:
    input:
        parents("probes"),
    output:
        RESULTS / "{dataset}/{network}/done/probes.{id}.json",
    log:
        RESULTS / "{dataset}/{network}/logs/probes.{id}.log",
    benchmark:
        RESULTS / "{dataset}/{network}/logs/probes.{id}.tsv"
    threads: 1
    message:
        "Probe the layers of {wildcards.network} on {wildcards.dataset}"
    script:
        "../scripts/stage.py"
