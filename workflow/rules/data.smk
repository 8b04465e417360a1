# Images and label maps, once per data set. The work is done by the run's pool of workers: a job itself is one thread.


rule make_ingest:
    input:
        parents("ingest"),
    output:
        RESULTS / "{dataset}/done/ingest.{id}.json",
    log:
        RESULTS / "{dataset}/logs/ingest.{id}.log",
    benchmark:
        RESULTS / "{dataset}/logs/ingest.{id}.tsv"
    # Training waits for it.
    priority: 2
    threads: 1
    message:
        "Decode {wildcards.dataset}"
    script:
        "../scripts/stage.py"


rule make_concepts:
    input:
        parents("concepts"),
    output:
        RESULTS / "{dataset}/done/concepts.{id}.json",
    log:
        RESULTS / "{dataset}/logs/concepts.{id}.log",
    benchmark:
        RESULTS / "{dataset}/logs/concepts.{id}.tsv"
    threads: 1
    message:
        "Label maps of {wildcards.dataset}"
    script:
        "../scripts/stage.py"
