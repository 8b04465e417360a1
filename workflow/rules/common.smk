def parents(stage):
    """The manifests that a job of this stage reads. Their existence alone counts, so they are ancient."""
    return lambda wildcards: [ancient(path) for path in RUN.parents(stage, wildcards)]
