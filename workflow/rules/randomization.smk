# How easily networks fit noise: runs on true and on corrupted data, per experiment.


rule make_randomize:
    input:
        parents("randomize"),
    output:
        RESULTS / "randomization/{comparison}/done/randomize.{id}.json",
    log:
        RESULTS / "randomization/{comparison}/logs/randomize.{id}.log",
    benchmark:
        RESULTS / "randomization/{comparison}/logs/randomize.{id}.tsv"
    # Long, and networks may wait for the weights of a run.
    priority: 1
    threads: 1
    message:
        "Runs of {wildcards.comparison}"
    script:
        "../scripts/stage.py"
