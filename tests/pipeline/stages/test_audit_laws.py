"""The laws of explanations on small functions with exact answers, and networks that compute the same."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.errors import MicrotomeError
from pipeline.stages.attribute.explaining import explain_function
from pipeline.stages.attribute.options import METHODS, OPTIONS
from pipeline.stages.audit.axioms import AXIOMS, Axioms
from pipeline.stages.audit.rows import laws_on_functions
from pipeline.stages.audit.trials.equivalent import VARIANTS, equivalent
from pipeline.stages.audit.trials.functions import FUNCTIONS, Case, on_functions

SHARED = Path(os.environ.get("MICROTOME_SHARED", Path(__file__).parents[4] / "shared"))
GOLDEN = SHARED / "golden" / "attribution.json"
METHODS_OF = {
    "saliency": {},
    "gradient_x_input": {},
    "integrated_gradients": {"steps": 8, "max_steps": 8},
    "guided_backprop": {},
    "deconvnet": {},
    "deeplift": {},
    "deep_shap": {},
    "kernel_shap": {"samples": "exact"},
    "lrp": {"alpha": 2},
}


def options(kind, **given):
    return OPTIONS[kind](**(given or METHODS_OF[kind]))


@pytest.fixture(scope="module")
def measured():
    """Residual and refusals (function, axiom) of each method, measured once."""
    return {kind: on_functions(options(kind)) for kind in METHODS_OF}


def at(measured, kind, function, axiom, what="residual"):
    return measured[kind][what][list(FUNCTIONS).index(function), list(AXIOMS).index(axiom)]


def breaking(measured, function, axiom):
    return {kind for kind in METHODS_OF if at(measured, kind, function, axiom) > 1e-3}


def test_the_pair_shows_who_depends_on_the_implementation(measured):
    """Deep SHAP is DeepLIFT with other references."""
    assert breaking(measured, "outer", "implementation") == {"deeplift", "deep_shap", "lrp"}
    assert at(measured, "deeplift", "outer", "implementation") == pytest.approx(np.sqrt(0.5) / np.sqrt(2.5))


def test_the_pair_shows_who_misses_a_feature_that_matters(measured):
    """b alone changes the score of the pair from 2 to 1, and nothing negative passes a rule of deconvnet."""
    assert breaking(measured, "outer", "sensitivity_a") == {"guided_backprop", "deconvnet"}


def test_saturation_hides_a_feature_from_gradients_alone(measured):
    of_gradients = {"saliency", "gradient_x_input", "guided_backprop", "deconvnet", "lrp"}
    assert breaking(measured, "saturation", "sensitivity_a") == of_gradients


def test_additive_methods_are_perfect_on_a_linear_function(measured):
    for kind in ("integrated_gradients", "deeplift", "kernel_shap", "deep_shap"):
        for axiom in ("completeness", "summation_to_delta", "local_accuracy", "sensitivity_a", "missingness", "batch"):
            assert at(measured, kind, "linear", axiom) == pytest.approx(0, abs=1e-12), (kind, axiom)
    assert on_functions(options("linear_shap", method="linear_shap"))["residual"][0, 1] == pytest.approx(0, abs=1e-12)


def test_who_reads_what_the_function_does_not_read(measured):
    residual = {kind: measured[kind]["residual"][:, list(AXIOMS).index("sensitivity_b")] for kind in METHODS_OF}
    assert max(np.nanmax(each) for each in residual.values()) == 0
    lime = on_functions(options("lime", method="lime"))["residual"][:, list(AXIOMS).index("sensitivity_b")]
    assert np.nanmax(lime) > 0.1  # a ridge regression gives a feature without effect a weight


def test_conservation_counts_biases(measured):
    column = list(AXIOMS).index("conservation")
    assert np.nanmax(measured["lrp"]["residual"][:, column]) < 1e-12
    assert np.nanmax(measured["deeplift"]["residual"][:, column]) > 0.1


def test_a_method_that_refuses_a_function_is_not_said_to_fail(measured):
    assert at(measured, "guided_backprop", "product", "completeness", "refused") == 1
    assert np.isnan(at(measured, "guided_backprop", "product", "completeness"))
    assert np.isnan(on_functions(options("grad_cam", method="grad_cam"))["residual"]).all()  # has no layer here


def test_the_row_of_a_law_says_where_it_fails(measured):
    found = measured["deeplift"] | {"function": np.array(list(FUNCTIONS))}
    rows = {one.measure: one for one in laws_on_functions(found, options("deeplift"), Axioms())}
    assert rows["implementation"].state == "fails" and rows["implementation"].note == "fails on outer"
    assert rows["completeness"].state == "holds" and rows["own_law"].state == "not defined"
    found = measured["guided_backprop"] | {"function": np.array(list(FUNCTIONS))}
    rows = {one.measure: one for one in laws_on_functions(found, options("guided_backprop"), Axioms())}
    assert rows["linearity"].state == "refused" and "refused on product" in rows["linearity"].note


@pytest.mark.skipif(not GOLDEN.exists(), reason="the golden values are not on this machine")
def test_functions_are_those_of_the_golden_values():
    golden = json.loads(GOLDEN.read_text())
    for name, case, values in (
        ("linear", "linear", {"deeplift": "deeplift", "kernel_shap": "shapley", "saliency": None}),
        ("product", "shapley_product", {"kernel_shap": "phi"}),
        ("maximum", "shapley_max", {"kernel_shap": "phi"}),
        ("minimum", "deeplift_min", {"deeplift": "rescale", "kernel_shap": "shapley", "gradient_x_input": None}),
        ("saturation", "ig_sensitivity_a", {"deeplift": "deeplift_rescale", "guided_backprop": "guided_backprop"}),
        (
            "small network",
            "relu_net",
            {"deeplift": "deeplift_rescale", "guided_backprop": "guided_backprop", "deconvnet": "deconvnet"},
        ),
        ("outer", "implementation_invariance", {"deeplift": "rescale_f"}),
        ("inner", "implementation_invariance", {"deeplift": "rescale_g"}),
    ):
        function, known = FUNCTIONS[name], golden[case]
        assert function.x == pytest.approx(np.ravel(known["x"])) and len(function.x) == len(function.baseline)
        assert function.baseline == pytest.approx(np.ravel(known["baseline"]))
        for kind, key in values.items():
            found = Case(function, options(kind)).values()[0].numpy()
            key = key or {"saliency": "saliency", "gradient_x_input": "grad_x_input"}[kind]
            expected = np.abs(known[key]) if not METHODS[kind].signed else np.ravel(known[key])
            np.testing.assert_allclose(found, expected, atol=1e-9, err_msg=f"{name}, {kind}")


def test_twins_compute_the_same():
    for function in FUNCTIONS.values():
        points = torch.randn(50, len(function.x), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        for twin in function.twins.values():
            torch.testing.assert_close(twin(points), function.network(points), atol=1e-12, rtol=0)
    assert {law for function in FUNCTIONS.values() for law in function.twins} == {*VARIANTS, "implementation"}


class Net(nn.Module):
    """A convolution with BatchNorm called apart, a block in a Sequential, and a ReLU used twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.block = nn.Sequential(nn.Conv2d(4, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(2))
        self.grouped = nn.Conv2d(5, 5, 1, groups=5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        x = self.grouped(self.block(self.relu(self.norm(self.conv(x)))))
        return self.head(self.relu(x).mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    made = Net()
    with torch.no_grad():
        for _ in range(3):
            made(torch.randn(8, 3, 10, 10) * 2 + 1)
    return made.eval().double()


@pytest.mark.parametrize("variant", VARIANTS)
def test_equivalent_networks(net, variant):
    x = torch.randn(5, 3, 10, 10, dtype=torch.float64)
    other = equivalent(net, VARIANTS[variant], x, "")
    assert other is not None
    torch.testing.assert_close(other(x), net(x), atol=1e-12, rtol=0)
    kinds = [type(each).__name__ for each in other.modules()]
    gone = {"folded": "BatchNorm2d", "halves": None, "spelled": "ReLU"}[variant]
    assert gone not in kinds and (variant != "halves" or kinds.count("Halves") == 2)
    assert isinstance(net.norm, nn.BatchNorm2d)  # the network itself stays as it is


def test_a_layer_that_a_method_looks_at_keeps_its_output(net):
    x = torch.randn(2, 3, 10, 10, dtype=torch.float64)
    other = equivalent(net, VARIANTS["folded"], x, "norm")
    assert isinstance(other.norm, nn.BatchNorm2d) and isinstance(other.block[1], nn.Identity)
    assert equivalent(nn.Sequential(nn.Flatten(), nn.Linear(300, 2)).double(), VARIANTS["spelled"], x, "") is None


def test_a_score_that_is_not_linear_refuses_linear_shap():
    function = FUNCTIONS["saturation"]
    with pytest.raises(MicrotomeError, match="not linear"):
        explain_function(function.network, function.inputs, function.reference, OPTIONS["linear_shap"]())
