"""The methods that the configuration may name: their options, laws and costs, without torch.

`methods/registry.py` has the function of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from pipeline.config.base import Positive, Strict

BACKWARD = 3.0  # forwards that one forward with its backward takes


class Options(Strict):
    """The options of a method."""

    networks: list[str] | None = Field(None, description="only for these networks; default: those of the experiment")

    @property
    def kind(self) -> str:
        """The name of the method."""
        return self.method  # type: ignore[attr-defined]

    def layer_name(self, network: str = "", original: str = "") -> str | None:
        """Return the layer to use in a network, "" for the default; None for a method without a layer."""
        return None

    def unit_layers(self, network: str = "", original: str = "") -> list[str]:
        """Return the layers of a network whose units' relevance is stored; a control has those of its network."""
        return []

    @property
    def needs(self) -> tuple[str, ...]:
        """What a network must have for these options."""
        return METHODS[self.kind].needs

    @property
    def kept(self) -> float:
        """Values that the pass of the method keeps for each value that a layer of the network gives."""
        return 3.0


class Saliency(Options):
    """Magnitude of the gradient (Simonyan et al. 2014)."""

    method: Literal["saliency"] = Field("saliency", description="this method")


class GradientXInput(Options):
    """Gradient times input (Shrikumar et al. 2016)."""

    method: Literal["gradient_x_input"] = Field("gradient_x_input", description="this method")


class IntegratedGradients(Options):
    """Integrated gradients (Sundararajan et al. 2017)."""

    method: Literal["integrated_gradients"] = Field("integrated_gradients", description="this method")
    steps: PositiveInt = Field(32, description="gradients on the line from the baseline to the image, at first")
    rule: Literal["gauss_legendre", "right"] = Field(
        "gauss_legendre", description="quadrature; `right` is the Riemann sum of the paper"
    )
    tolerance: Positive = Field(
        0.01, description="relative error of completeness beyond which the steps of an image are doubled"
    )
    max_steps: PositiveInt = Field(256, description="never more steps: an image that still misses is marked")

    @model_validator(mode="after")
    def _most(self) -> IntegratedGradients:
        if self.max_steps < self.steps:
            raise ValueError(f"max_steps: {self.max_steps} is below `steps`, {self.steps}")
        return self

    def taken(self, last: int) -> int:
        """Return the gradients of an image that ended with so many steps: each doubling begins anew."""
        total, steps = 0, self.steps
        while steps < last:
            total, steps = total + steps, min(2 * steps, self.max_steps)
        return total + steps


class Noisy(Options):
    noise: Annotated[float, Field(gt=0, le=10)] = Field(
        0.15, description="standard deviation of the noise, as a share of the image's range"
    )
    draws: Annotated[int, Field(ge=2, le=10_000)] = Field(25, description="noisy copies of an image")


class SmoothGrad(Noisy):
    """Mean gradient of noisy copies (Smilkov et al. 2017)."""

    method: Literal["smooth_grad"] = Field("smooth_grad", description="this method")


class VarGrad(Noisy):
    """Variance of the gradients of noisy copies (Adebayo et al. 2018)."""

    method: Literal["var_grad"] = Field("var_grad", description="this method")


class Deconvnet(Options):
    """Deconvolutional network (Zeiler and Fergus 2014)."""

    method: Literal["deconvnet"] = Field("deconvnet", description="this method")


class GuidedBackprop(Options):
    """Guided backpropagation (Springenberg et al. 2015)."""

    method: Literal["guided_backprop"] = Field("guided_backprop", description="this method")


class OfLayer(Options):
    layer: str | dict[str, str] | None = Field(
        None,
        description="the layer, or one by network; default: the last whose positions the scores depend on",
    )

    def layer_name(self, network: str = "", original: str = "") -> str:
        """Return the layer to use in a network, "" for the default; a control has that of its network."""
        if isinstance(self.layer, dict):
            return self.layer.get(network, self.layer.get(original, ""))
        return self.layer or ""


class Cam(OfLayer):
    """Class activation map (Zhou et al. 2016)."""

    method: Literal["cam"] = Field("cam", description="this method")


class Rectifiable(OfLayer):
    relu: bool = Field(False, description="store only the positive part")


class GradCam(Rectifiable):
    """Grad-CAM (Selvaraju et al. 2017)."""

    method: Literal["grad_cam"] = Field("grad_cam", description="this method")


class HiResCam(Rectifiable):
    """HiResCAM (Draelos and Carin 2020)."""

    method: Literal["hires_cam"] = Field("hires_cam", description="this method")


class GradCamPlusPlus(Rectifiable):
    """Grad-CAM++ (Chattopadhay et al. 2018)."""

    method: Literal["grad_cam_pp"] = Field("grad_cam_pp", description="this method")


class LayerCam(Rectifiable):
    """LayerCAM (Jiang et al. 2021)."""

    method: Literal["layer_cam"] = Field("layer_cam", description="this method")


class GuidedGradCam(OfLayer):
    """Guided backpropagation times Grad-CAM (Selvaraju et al. 2017)."""

    method: Literal["guided_grad_cam"] = Field("guided_grad_cam", description="this method")


class Rollout(Options):
    """Attention rollout, which is of no class (Abnar and Zuidema 2020)."""

    method: Literal["rollout"] = Field("rollout", description="this method")


class AttentionRelevance(Options):
    """Attention weighed by its gradient (Chefer et al. 2021)."""

    method: Literal["attention_relevance"] = Field("attention_relevance", description="this method")


class Occlusion(Options):
    """Drop of the score when a window is covered (Zeiler and Fergus 2014)."""

    method: Literal["occlusion"] = Field("occlusion", description="this method")
    window: PositiveInt = Field(8, description="height and width in pixels of what the baseline covers")
    stride: PositiveInt = Field(4, description="pixels from one window to the next")

    @model_validator(mode="after")
    def _no_gaps(self) -> Occlusion:
        if self.stride > self.window:
            raise ValueError(f"stride: {self.stride} is above the window of {self.window}: pixels would be left out")
        return self


class OfMaxima(Options):
    max: Literal["cross", "shapley"] = Field(
        "cross", description="rule of max pooling: the cross-maximum, or the Shapley value of each window"
    )

    @property
    def needs(self) -> tuple[str, ...]:
        return (*METHODS[self.kind].needs, *(["max_shapley"] if self.max == "shapley" else []))

    @property
    def kept(self) -> float:
        return 5.0


class DeepLift(OfMaxima):
    """DeepLIFT (Shrikumar et al. 2017)."""

    method: Literal["deeplift"] = Field("deeplift", description="this method")
    rule: Literal["rescale", "reveal_cancel"] = Field(
        "rescale", description="rule of nonlinearities; `reveal_cancel` keeps positive and negative parts apart"
    )

    @model_validator(mode="after")
    def _one_rule(self) -> DeepLift:
        if self.rule == "reveal_cancel" and self.max == "shapley":
            raise ValueError("max: `reveal_cancel` has no rule for max pooling, so `shapley` cannot be asked for")
        return self

    @property
    def needs(self) -> tuple[str, ...]:
        return ("gradient", "reveal_cancel") if self.rule == "reveal_cancel" else super().needs

    @property
    def kept(self) -> float:
        return 8.0 if self.rule == "reveal_cancel" else super().kept


class OfSplit(Options):
    split: str = Field("train", description="split of the images that explained ones are compared with")


class DeepShap(OfMaxima, OfSplit):
    """Deep SHAP (Lundberg and Lee 2017)."""

    method: Literal["deep_shap"] = Field("deep_shap", description="this method")
    references: PositiveInt = Field(10, description="images of the split that each image is compared with")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="of their choice, the same for all images")


class LinearShap(OfSplit):
    """Linear SHAP (Lundberg and Lee 2017)."""

    method: Literal["linear_shap"] = Field("linear_shap", description="this method")


RuleName = Literal["alpha_beta", "epsilon", "gamma", "z_plus"]
InputRule = Literal["z_b", "w_squared"]


class RuleOptions(Strict):
    """A rule of LRP: which, and its numbers."""

    alpha: Annotated[float, Field(ge=1, le=100)] = Field(
        1.0, description="`alpha_beta`: weight of positive contributions; above 1, the network needs ReLU"
    )
    beta: Annotated[float, Field(ge=0, le=99)] | None = Field(
        None, description="`alpha_beta`: weight of negative contributions; it is alpha - 1"
    )
    epsilon: Annotated[float, Field(ge=0, le=1000)] = Field(
        1e-6, description="`epsilon`: is added to the magnitude of what is divided by; 0 gives gradient x input"
    )
    gamma: Annotated[float, Field(ge=0, le=1000)] = Field(
        0.25, description="`gamma`: how much more contributions of the unit's own sign count"
    )

    @model_validator(mode="after")
    def _difference(self) -> RuleOptions:
        if self.beta is not None and abs(self.alpha - self.beta - 1) > 1e-9:
            raise ValueError(
                f"beta: alpha - beta is {self.alpha - self.beta:g}, expected 1: with alpha {self.alpha:g}, beta is "
                f"{self.alpha - 1:g}"
            )
        rule = self.rule  # type: ignore[attr-defined]
        wanted = {"alpha_beta": {"alpha", "beta"}, "epsilon": {"epsilon"}, "gamma": {"gamma"}}.get(rule, set())
        for key in ("alpha", "beta", "epsilon", "gamma"):
            if key not in wanted and getattr(self, key) not in (None, type(self).model_fields[key].default):
                raise ValueError(f"{key}: the rule `{rule}` has none")
        return self


class OwnRule(RuleOptions):
    """The rule of some layers."""

    rule: RuleName | InputRule = Field(description="which rule; `z_b` and `w_squared` are for the layer of the input")


def _spelled_out(rules: Any) -> Any:
    """Return rules in which a bare name stands for a rule with its defaults."""
    if not isinstance(rules, Mapping):
        return rules
    return {pattern: {"rule": each} if isinstance(each, str) else each for pattern, each in rules.items()}


class Lrp(RuleOptions, Options):
    """Layer-wise relevance propagation (Bach et al. 2015)."""

    method: Literal["lrp"] = Field("lrp", description="this method")
    rule: RuleName = Field(
        "alpha_beta", description="how a unit shares its relevance; `z_plus` is alpha_beta with alpha 1"
    )
    rules: Annotated[dict[str, OwnRule], BeforeValidator(_spelled_out)] = Field(
        {},
        description="other rules, by a pattern of module names (`features.*`) or `depth A-B`, counted from the input; "
        "the first that matches decides",
    )
    preset: Literal["cp_lrp", "attn_lrp"] = Field(
        "cp_lrp",
        description="transformers: `cp_lrp` holds attention weights and deviations constant, `attn_lrp` expands them",
    )
    layers: list[str] | dict[str, list[str]] = Field(
        [], description="layers whose units' relevance is stored as well, or by network"
    )
    keep: list[Literal["signs"]] = Field(
        [], description="`signs`: what positive and what negative contributions bring to each pixel, apart"
    )

    def unit_layers(self, network: str = "", original: str = "") -> list[str]:
        """Return the layers of a network whose units' relevance is stored; a control has those of its network."""
        if isinstance(self.layers, dict):
            return self.layers.get(network, self.layers.get(original, []))
        return self.layers

    @property
    def every_rule(self) -> list[RuleOptions]:
        return [self, *self.rules.values()]

    @property
    def kept(self) -> float:
        return 6.0

    @property
    def passes(self) -> float:
        """Forwards that take as long, measured on convolutional networks."""
        rules = {each.rule for each in self.every_rule}  # type: ignore[attr-defined]
        if rules == {"epsilon"}:
            return 4.0
        return 9.0 if any(each.alpha > 1 for each in self.every_rule) or "gamma" in rules else 6.0


AnyMethod = Annotated[
    Saliency
    | GradientXInput
    | IntegratedGradients
    | SmoothGrad
    | VarGrad
    | Deconvnet
    | GuidedBackprop
    | Cam
    | GradCam
    | HiResCam
    | GradCamPlusPlus
    | LayerCam
    | GuidedGradCam
    | Rollout
    | AttentionRelevance
    | Occlusion
    | DeepLift
    | DeepShap
    | LinearShap
    | Lrp,
    Field(discriminator="method"),
]


OPTIONS: dict[str, type[Options]] = {
    each.model_fields["method"].default: each for each in get_args(get_args(AnyMethod)[0])
}
"""The options of each method."""


@dataclass(frozen=True)
class Method:
    """What is known of a method besides its function.

    Attributes
    ----------
    title : its name for readers. units : of its values.
    law : what its numbers promise, as the residual measures it; empty: nothing.
    maps : what its map lies on: the image's pixels, a layer's positions, or the patches of attention.
    needs : what a network must have; `pipeline.networks.explainable` says of each why it is missing.
    shares : what it takes of the pass that all methods share: the gradient of the `inputs`, or that of its `layer`.
    forwards : further passes of an image, in forwards, given (options, (height, width)).
    baseline : whether it compares with the baseline. signed : whether its values have signs.
    channels : whether it has a map of each channel. facts : names of further numbers of each image.
    """

    title: str
    units: str
    law: str = ""
    maps: Literal["image", "layer", "attention"] = "image"
    needs: tuple[str, ...] = ("gradient",)
    shares: Literal["inputs", "layer", ""] = ""
    forwards: Callable[[Any, tuple[int, int]], float] = lambda options, size: 0.0
    baseline: bool = False
    signed: bool = True
    channels: bool = True
    facts: tuple[str, ...] = ()


def _windows(options: Occlusion, size: tuple[int, int]) -> float:
    along = [len(starts(side, options.window, options.stride)) for side in size]
    return float(along[0] * along[1])


def starts(side: int, window: int, stride: int) -> list[int]:
    """Return where windows start along a side; the last one ends with the image."""
    last = max(side - window, 0)
    return sorted({*range(0, last + 1, stride), last})


COMPLETENESS = "the map adds up to the score less the baseline's"
SLOPE, SHARE_OF_SCORE = "score per unit of input", "score"
OF_BASELINE = ("baseline_score", "baseline_probability")
METHODS: dict[str, Method] = {
    "saliency": Method("Saliency", SLOPE, shares="inputs", signed=False, facts=("intercept",)),
    "gradient_x_input": Method(
        "Gradient × input",
        SHARE_OF_SCORE,
        law="the map adds up to the score, of piecewise linear networks without biases",
        shares="inputs",
    ),
    "integrated_gradients": Method(
        "Integrated gradients",
        SHARE_OF_SCORE,
        law=COMPLETENESS,
        forwards=lambda options, size: BACKWARD * options.steps + 2,
        baseline=True,
        facts=("steps", *OF_BASELINE),
    ),
    "smooth_grad": Method("SmoothGrad", SLOPE, forwards=lambda options, size: BACKWARD * options.draws, signed=False),
    "var_grad": Method(
        "VarGrad",
        "squared score per unit of input",
        forwards=lambda options, size: BACKWARD * options.draws,
        signed=False,
    ),
    "deconvnet": Method(
        "Deconvnet", "relative", needs=("gradient", "deconvnet"), forwards=lambda options, size: BACKWARD
    ),
    "guided_backprop": Method(
        "Guided backpropagation",
        "relative",
        needs=("gradient", "guided_backprop"),
        forwards=lambda options, size: BACKWARD,
    ),
    "cam": Method(
        "CAM",
        SHARE_OF_SCORE,
        law="the map adds up to the score less the bias (its mean, under mean pooling)",
        maps="layer",
        needs=("gradient", "layer", "cam"),
        shares="layer",
    ),
    "grad_cam": Method("Grad-CAM", SHARE_OF_SCORE, maps="layer", needs=("gradient", "layer"), shares="layer"),
    "hires_cam": Method(
        "HiResCAM",
        SHARE_OF_SCORE,
        law="the map adds up to the score less the bias, of networks that end linearly after the layer",
        maps="layer",
        needs=("gradient", "layer"),
        shares="layer",
        forwards=lambda options, size: 1.0,
    ),
    "grad_cam_pp": Method("Grad-CAM++", "relative", maps="layer", needs=("gradient", "layer"), shares="layer"),
    "layer_cam": Method("LayerCAM", SHARE_OF_SCORE, maps="layer", needs=("gradient", "layer"), shares="layer"),
    "guided_grad_cam": Method(
        "Guided Grad-CAM",
        "relative",
        needs=("gradient", "layer", "guided_backprop"),
        shares="layer",
        forwards=lambda options, size: BACKWARD,
    ),
    "rollout": Method(
        "Attention rollout",
        "share of attention",
        law="the attention of every token adds up to 1",
        maps="attention",
        needs=("attention",),
        forwards=lambda options, size: 1.0,
        signed=False,
    ),
    "attention_relevance": Method(
        "Attention relevance",
        "relative",
        maps="attention",
        needs=("gradient", "attention"),
        forwards=lambda options, size: BACKWARD,
        signed=False,
    ),
    "occlusion": Method(
        "Occlusion",
        SHARE_OF_SCORE,
        needs=(),
        forwards=_windows,
        baseline=True,
        channels=False,
        facts=OF_BASELINE,
    ),
    "deeplift": Method(
        "DeepLIFT",
        SHARE_OF_SCORE,
        law=COMPLETENESS,
        needs=("gradient", "deeplift"),
        forwards=lambda options, size: 2 + BACKWARD * (2.5 if options.rule == "reveal_cancel" else 1),
        baseline=True,
        facts=OF_BASELINE,
    ),
    "deep_shap": Method(
        "Deep SHAP",
        SHARE_OF_SCORE,
        law="the map adds up to the score less the mean score of the references",
        needs=("gradient", "deeplift"),
        forwards=lambda options, size: (BACKWARD + 1) * options.references,
        facts=("phi0",),
    ),
    "linear_shap": Method(
        "Linear SHAP",
        SHARE_OF_SCORE,
        law="the map adds up to the score less w E[x] + b, of networks that are linear in the input",
        needs=("gradient", "linear"),
        shares="inputs",
        forwards=lambda options, size: 1.0,
        facts=("phi0",),
    ),
    "lrp": Method(
        "LRP",
        SHARE_OF_SCORE,
        law="the map, biases and what is lost add up to the score",
        needs=("gradient", "lrp"),
        forwards=lambda options, size: options.passes,
        facts=("bias", "leak", "magnitude"),
    ),
}
