# Gram matrices of minibatches per data set and network, and how alike the layers of networks are, per comparison.


rule make_grams:
    input:
        parents("grams"),
    output:
        RESULTS / "{dataset}/{network}/done/grams.{id}.json",
    log:
        RESULTS / "{dataset}/{network}/logs/grams.{id}.log",
    benchmark:
        RESULTS / "{dataset}/{network}/logs/grams.{id}.tsv"
    threads: 1
    message:
        "Gram matrices of {wildcards.network} on {wildcards.dataset}"
    script:
        "../scripts/stage.py"


rule make_similarity:
    input:
        parents("similarity"),
    output:
        RESULTS / "similarity/{comparison}/done/similarity.{id}.json",
    log:
        RESULTS / "similarity/{comparison}/logs/similarity.{id}.log",
    benchmark:
        RESULTS / "similarity/{comparison}/logs/similarity.{id}.tsv"
    threads: 1
    message:
        "Similarity of the layers of {wildcards.comparison}"
    script:
        "../scripts/stage.py"
