"""The function of each test. A new test is a file beside this one, a line here, and its options."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from pipeline.stages.audit.trials.counterfactual import counterfactual
from pipeline.stages.audit.trials.laws import axioms
from pipeline.stages.audit.trials.noisy import linear_view, stability
from pipeline.stages.audit.trials.place import localisation, mass, pointing
from pipeline.stages.audit.trials.randomised import label_randomisation, layer_randomisation
from pipeline.stages.audit.trials.removal import deletion, insertion, log_odds, road
from pipeline.stages.audit.trials.subsets import infidelity, sensitivity_n
from pipeline.stages.audit.trials.units import ablation

FUNCTIONS: Mapping[str, Callable[..., dict[str, np.ndarray]]] = {
    "axioms": axioms,
    "ablation": ablation,
    "deletion": deletion,
    "insertion": insertion,
    "road": road,
    "sensitivity_n": sensitivity_n,
    "infidelity": infidelity,
    "log_odds": log_odds,
    "stability": stability,
    "linear_view": linear_view,
    "layer_randomisation": layer_randomisation,
    "label_randomisation": label_randomisation,
    "localisation": localisation,
    "pointing": pointing,
    "mass": mass,
    "counterfactual": counterfactual,
}
"""Of each test: (batch, options) to the arrays of its measures, (image, ...)."""
