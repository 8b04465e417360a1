# Weights: read, drawn or trained.


rule make_network:
    input:
        parents("network"),
    output:
        RESULTS / "networks/{network}/done/network.{id}.json",
    log:
        RESULTS / "networks/{network}/logs/network.{id}.log",
    benchmark:
        RESULTS / "networks/{network}/logs/network.{id}.tsv"
    # Training is the longest chain: first.
    priority: 1
    threads: 1
    message:
        "Weights of {wildcards.network}"
    script:
        "../scripts/stage.py"
