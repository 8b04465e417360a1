def parents(stage):
    """The manifests that a job of this stage reads. Their existence alone counts, so they are ancient."""
    return lambda wildcards: [ancient(path) for path in RUN.parents(stage, wildcards)]


def memory(stage):
    """Megabytes of a job with so many workers, by the stage's own estimate."""
    return lambda wildcards, threads: RUN.memory(stage, wildcards, threads)


def figures():
    """The finished report's figures, flagged for Snakemake's own, each with the caption of its kind."""
    flagged = []
    for path, kind, labels in RUN.figures():
        caption = ROOT / "workflow/report" / f"{kind}.rst"
        if not caption.exists():
            caption = ROOT / "workflow/report/figure.rst"
        shown = {"category": labels.get("network", kind), "labels": {"figure": kind}}
        shown["labels"] |= labels
        # In one line: at the start of one, `report` is a directive.
        flagged.append(report(path, caption=str(caption), **shown))
    return flagged
