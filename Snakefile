"""Microtome: images → activations → labelled units. The stages are in pipeline/stages, their rules in workflow/rules."""


include: "workflow/Snakefile"


workflow.default_target = "report"  # a rule of an included file is not taken for it
