"""Microtome: images → activations → labelled units. The stages are in pipeline/stages, their rules in workflow/rules."""


include: "workflow/Snakefile"
