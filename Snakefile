"""Microtome: images → activations → labelled units. The rules are in workflow/rules, the stages in pipeline/."""

import sys

from snakemake.exceptions import WorkflowError

sys.path.insert(0, workflow.basedir)

from pipeline.errors import MicrotomeError
from pipeline.run.workflow import Run

if not workflow.overwrite_configfiles:

    configfile: f"{workflow.basedir}/config/config.yaml"


try:
    RUN = Run(
        config,
        main=workflow.is_main_process,
        dry=workflow.output_settings.dryrun,
        files=workflow.configfiles,
        overrides=workflow.config_settings.config,
    )
except MicrotomeError as error:
    raise WorkflowError(str(error)) from None
RESULTS = RUN.plan.results


wildcard_constraints:
    dataset=r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}",
    network=r"[A-Za-z0-9][A-Za-z0-9._-]{0,80}",
    comparison=r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}",
    id=r"[0-9a-f]{20}",


localrules:
    report,
    dissect,
    ablate,
    calibrate,
    probes,
    similarity,
    sight,
    randomize,


include: "workflow/rules/common.smk"


rule report:
    default_target: True
    input:
        RUN.targets("report"),
        # What `snakemake --report` shows; none before there is a report.
        figures(),


rule dissect:
    input:
        RUN.targets("dissect"),


rule ablate:
    input:
        RUN.targets("ablate"),


rule calibrate:
    input:
        RUN.targets("calibrate"),


rule probes:
    input:
        RUN.targets("probes"),


rule similarity:
    input:
        RUN.targets("similarity"),


rule sight:
    input:
        RUN.targets("sight"),


rule randomize:
    input:
        RUN.targets("randomize"),


include: "workflow/rules/data.smk"
include: "workflow/rules/networks.smk"
include: "workflow/rules/dissection.smk"
include: "workflow/rules/ablation.smk"
include: "workflow/rules/calibration.smk"
include: "workflow/rules/probes.smk"
include: "workflow/rules/similarity.smk"
include: "workflow/rules/sight.smk"
include: "workflow/rules/randomization.smk"
include: "workflow/rules/report.smk"


onstart:
    RUN.start(elsewhere=workflow.non_local_exec)


onsuccess:
    RUN.stop()
    print(RUN.account(), file=sys.stderr)


onerror:
    RUN.stop(failed=True)
