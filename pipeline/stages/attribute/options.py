"""The methods that the configuration may name: their options, laws and costs, without torch.

`methods/registry.py` has the function of each.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveInt, field_serializer, model_validator

from pipeline.config.base import Positive, Strict
from pipeline.networks.fitness import Link

EXACT = 12  # players whose coalitions are all played, at most
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

    @property
    def needs(self) -> tuple[str, ...]:
        """What a network must have for these options."""
        return METHODS[self.kind].needs

    @property
    def kept(self) -> float:
        """Values that the pass of the method keeps for each value that a layer of the network gives."""
        return 3.0

    def unit_layers(self, network: str = "", original: str = "") -> list[str]:
        """Return the layers of a network whose units' relevance is stored; a control has those of its network."""
        return []


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
    """Return rules in which a bare name stands for a rule with its defaults; pairs are what `Lrp` writes."""
    if isinstance(rules, (list, tuple)) and all(isinstance(each, (list, tuple)) and len(each) == 2 for each in rules):
        rules = dict(rules)
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

    @field_serializer("rules")
    def _in_order(self, rules: dict[str, OwnRule]) -> list[list[Any]]:
        """Write pairs: the first rule that matches decides, and ids do not know the order of keys."""
        return [[pattern, rule.model_dump()] for pattern, rule in rules.items()]

    @property
    def bounded(self) -> bool:
        """Whether a rule needs the bounds of inputs."""
        return any(rule.rule == "z_b" for rule in self.rules.values())

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


class Segments(Strict):
    """What an image is parted into."""

    features: ClassVar[str] = "the place of the segment"
    """What says of a segment what it is, alike in all images."""

    @property
    def key(self) -> str:
        """The setting as text: equal settings have the same segments of an image."""
        return json.dumps(self.model_dump(), sort_keys=True)

    def most(self, patches: tuple[int, int] | None = None) -> int | None:
        """Return how many segments an image has at most; None if only the network tells, which has these `patches`."""
        return self.count  # type: ignore[attr-defined]


class Slic(Segments):
    """Superpixels (Achanta et al. 2012)."""

    features: ClassVar[str] = "the bin of the mean colour: 4 levels of each channel, the last one fastest"
    kind: Literal["slic"] = Field("slic", description="superpixels: alike in colour, near in place")
    count: Annotated[int, Field(ge=2, le=2000)] = Field(50, description="superpixels of an image, at most")
    compactness: Positive = Field(10.0, description="how much place weighs against colour")
    sigma: NonNegativeFloat = Field(1.0, description="standard deviation of the smoothing before, in pixels")


class Grid(Segments):
    """Cells of a grid."""

    kind: Literal["grid"] = Field("grid", description="cells of a grid")
    cells: tuple[PositiveInt, PositiveInt] = Field((7, 7), description="rows and columns")

    @model_validator(mode="after")
    def _several(self) -> Grid:
        if self.cells == (1, 1):
            raise ValueError("cells: a grid of one cell is one segment, and its value is the whole score")
        if self.most() > 2000:
            raise ValueError(f"cells: {self.most()} cells, expected 2000 at most")
        return self

    def most(self, patches: tuple[int, int] | None = None) -> int:
        return self.cells[0] * self.cells[1]


class Patches(Segments):
    """Patches of a transformer."""

    kind: Literal["patches"] = Field("patches", description="the patches of a transformer's attention")

    def most(self, patches: tuple[int, int] | None = None) -> int | None:
        return None if patches is None else patches[0] * patches[1]


class Labels(Segments):
    """Concepts of the data set's label maps."""

    features: ClassVar[str] = "the number of the concept, 0 for the rest"
    kind: Literal["labels"] = Field("labels", description="the concepts of the data set's label maps")
    category: str = Field(description="a category of its `concepts`, for example `truth/object`")
    count: Annotated[int, Field(ge=2, le=2000)] = Field(
        12, description="segments of an image, at most: the largest concepts, and the rest as one"
    )


def _of_kind(segments: Any) -> Any:
    return {"kind": segments} if isinstance(segments, str) else segments


_Parted = Annotated[Slic | Grid | Patches | Labels, Field(discriminator="kind")]
AnySegments = Annotated[
    _Parted, BeforeValidator(_of_kind, json_schema_input_type=Literal["slic", "grid", "patches"] | _Parted)
]


class Segmented(Options):
    """A black box: the scores of copies of an image, in which only some segments are shown."""

    samples: Annotated[int, Field(ge=4, le=100_000)] | Literal["exact"] = Field(
        512,
        description="copies of an image with some segments shown, the others as the baseline has them; all 2^M of M "
        f"segments where these are no more, M up to {EXACT}; `exact`: always",
    )
    segments: AnySegments = Field(
        Slic(kind="slic"),
        description="what an image is parted into: `slic`, `grid`, `patches`, or a mapping with `kind` and its options",
    )

    def why_not(self, most: int) -> str:
        """Return why an image of so many segments cannot be explained; empty if it can."""
        if self.samples == "exact":
            return (
                f"samples: `exact` plays all of at most 2^{EXACT} copies, and there are up to {most} segments: give a "
                f"number of samples, or fewer segments"
                if most > EXACT
                else ""
            )
        if self.samples < (least := min(self.least(most), 2**most)):
            return f"samples: {self.samples} of up to {most} segments, expected at least {least}"
        return ""

    def least(self, players: int) -> int:
        """Return the fewest samples of so many segments from which there is an estimate."""
        return 2 * players

    def plays_all(self, players: int) -> bool:
        """Return whether all coalitions of so many segments are played: there are no more of them than samples."""
        return self.samples == "exact" or (players <= EXACT and 2**players <= max(self.samples, 2))

    def played(self, most: int | None) -> float:
        """Return the forwards of an image with so many segments, at first."""
        copies = float(2 ** min(most or EXACT, EXACT)) if self.samples == "exact" else float(self.samples)
        return copies if most is None or most > EXACT else min(copies, 2.0**most)


class OfProbability(Segmented):
    softmax: bool = Field(
        True,
        description="explain the probability of the class where the experiment's `score` is its logit; a `note` says "
        "so; false: explain the `score`",
    )


class Lime(OfProbability):
    """Local surrogate model of segments (Ribeiro et al. 2016)."""

    method: Literal["lime"] = Field("lime", description="this method")
    kernel: Literal["masks_cosine", "masks_l2", "pixels_cosine", "pixels_l2"] = Field(
        "masks_cosine", description="distance D of a copy from the image, in the weight exp(-D^2 / width^2)"
    )
    width: Positive | None = Field(
        None, description="width of the kernel; default: 0.25 for cosine, 0.75 for L2, where 1 is all covered"
    )
    model: Literal["linear", "tree"] = Field("linear", description="weighted ridge regression, or a regression tree")
    ridge: NonNegativeFloat = Field(1.0, description="penalty of squared weights; 0: least squares")
    features: PositiveInt | None = Field(None, description="at most so many weights that are not 0; default: all")
    selection: Literal["forward", "lasso"] = Field(
        "forward", description="how these features are chosen: one by one, or on the path of the lasso"
    )
    depth: Annotated[int, Field(ge=1, le=10)] = Field(3, description="splits from the tree's root to a leaf, at most")

    @model_validator(mode="after")
    def _of_model(self) -> Lime:
        if self.model == "tree" and self.features is not None:
            raise ValueError("features: a tree has no such bound: give its `depth`")
        fields = type(self).model_fields
        lost = ("ridge", "selection") if self.model == "tree" else ("depth",)
        for key in lost:
            if getattr(self, key) != fields[key].default:
                raise ValueError(f"{key}: a {self.model} model has none")
        if self.features is None and self.selection != fields["selection"].default:
            raise ValueError("selection: give `features`, how many are chosen")
        return self

    @property
    def nodes(self) -> int:
        """The nodes that a tree has at most; 0: a linear model has none."""
        return 2 ** (self.depth + 1) - 1 if self.model == "tree" else 0

    @property
    def sigma(self) -> float:
        """The width of the kernel."""
        return self.width if self.width is not None else 0.25 if self.kernel.endswith("cosine") else 0.75


class KernelShap(Segmented):
    """Shapley values of segments (Lundberg and Lee 2017)."""

    method: Literal["kernel_shap"] = Field("kernel_shap", description="this method")
    estimator: Literal["regression", "permutation"] = Field(
        "regression", description="weighted least squares over coalitions, or the mean over orders of the segments"
    )
    tolerance: Positive | None = Field(
        None,
        description="mean standard error, as a share of the largest value, beyond which as many samples are added; "
        "default: none are added",
    )
    max_samples: PositiveInt = Field(
        8192,
        description="never more samples, besides the image and the baseline: an image that still misses is left so",
    )

    def least(self, players: int) -> int:
        """Return the fewest samples: of orders, two and their reverse, each of M - 1 coalitions."""
        return 4 * (players - 1) if self.estimator == "permutation" else super().least(players)

    @model_validator(mode="after")
    def _most(self) -> KernelShap:
        if self.tolerance is not None and self.samples == "exact":
            raise ValueError("tolerance: `samples: exact` leaves no error")
        if self.tolerance is not None and self.max_samples < int(self.samples):
            raise ValueError(f"max_samples: {self.max_samples} is below `samples`, {self.samples}")
        return self


class Rise(OfProbability):
    """Mean score where a segment is shown (Petsiuk et al. 2018)."""

    method: Literal["rise"] = Field("rise", description="this method")


def tolerance_of(options: Options) -> float | None:
    """Return the tolerance of the law of a method that has its own; None: that of rounding."""
    return options.tolerance if METHODS[options.kind].own_tolerance else None  # type: ignore[attr-defined]


def link_of(options: Options, score: Link) -> Link:
    """Return what a method explains of a class, given the experiment's `score`."""
    return "probability" if isinstance(options, OfProbability) and options.softmax and score == "logit" else score


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
    | Lime
    | KernelShap
    | Rise
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
    by_segment : names of numbers of each segment, of methods that part images into segments.
    own_tolerance : whether its option `tolerance` is that of its law.
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
    by_segment: tuple[str, ...] = ()
    own_tolerance: bool = False


def _windows(options: Occlusion, size: tuple[int, int]) -> float:
    along = [len(starts(side, options.window, options.stride)) for side in size]
    return float(along[0] * along[1])


def _copies(options: Segmented, size: tuple[int, int]) -> float:
    return options.played(options.segments.most()) + 2


def forwards_alone(options: Options, size: tuple[int, int]) -> float:
    """Return the passes of an image (y, x) that a method takes alone, in forwards."""
    kind = METHODS[options.kind]
    return kind.forwards(options, size) + (BACKWARD if kind.shares else 1.0)


def starts(side: int, window: int, stride: int) -> list[int]:
    """Return where windows start along a side; the last one ends with the image."""
    last = max(side - window, 0)
    return sorted({*range(0, last + 1, stride), last})


COMPLETENESS = "the map adds up to the score less the baseline's"
SLOPE, SHARE_OF_SCORE = "score per unit of input", "score"
OF_BASELINE = ("baseline_score", "baseline_probability")
OF_COPIES = ("players", "samples")
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
        own_tolerance=True,
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
    "lrp": Method(
        "LRP",
        SHARE_OF_SCORE,
        law="the map, biases and what is lost add up to the score",
        needs=("gradient", "lrp"),
        forwards=lambda options, size: options.passes,
        facts=("bias", "leak", "magnitude"),
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
    "lime": Method(
        "LIME",
        SHARE_OF_SCORE,
        needs=(),
        forwards=_copies,
        baseline=True,
        channels=False,
        facts=("intercept", "r2", "stability", *OF_COPIES, *OF_BASELINE),
        by_segment=("value",),
    ),
    "kernel_shap": Method(
        "Kernel SHAP",
        SHARE_OF_SCORE,
        law="the values of the segments add up to the score less the baseline's",
        needs=(),
        forwards=_copies,
        baseline=True,
        channels=False,
        facts=(*OF_COPIES, *OF_BASELINE),
        by_segment=("value", "standard_error"),
    ),
    "rise": Method(
        "RISE",
        SHARE_OF_SCORE,
        needs=(),
        forwards=_copies,
        baseline=True,
        channels=False,
        facts=("intercept", *OF_COPIES, *OF_BASELINE),
        by_segment=("value",),
    ),
}
