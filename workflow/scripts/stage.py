"""One job: the stage named by the rule, `make_<stage>`, for the wildcards of its output."""

from pipeline.run.job import job

job(snakemake.rule.removeprefix("make_"), dict(snakemake.wildcards), snakemake.log[0])  # noqa: F821 (given by Snakemake)
