"""What torch's functions add and multiply, whichever of its spellings a network uses."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from pipeline.errors import MicrotomeError

ADDITIONS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})
SUBTRACTIONS = frozenset({"sub", "sub_", "subtract", "subtract_", "__sub__", "__isub__"})
SUBTRACTIONS_FROM = frozenset({"rsub", "__rsub__"})
FUSED = frozenset({"addcmul", "addcmul_", "addcdiv", "addcdiv_", "lerp", "lerp_"})
ADDED_PRODUCTS = frozenset({"baddbmm", "baddbmm_", "addmm", "addmm_"})
JOINS = frozenset({"cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "row_stack", "column_stack"})
SUMS = frozenset({"sum", "mean", "nansum", "nanmean", "einsum"})
MATMULS = frozenset({"matmul", "__matmul__", "linalg_matmul", "bmm"})
PRODUCTS = MATMULS | {"__rmatmul__", "baddbmm", "baddbmm_", "einsum"}
"""Products of matrices whose axes can be told; `factors` tells them."""
OTHER_PRODUCTS = frozenset(
    {"mm", "mv", "addmm", "addmm_", "addmv", "addbmm", "tensordot", "inner", "linalg_vecdot", "linalg_multi_dot"}
    | {"chain_matmul", "kron", "cdist"}
)
MULTIPLICATIONS = frozenset({"mul", "mul_", "multiply", "multiply_", "__mul__", "__rmul__", "__imul__"})
DIVISIONS = frozenset(
    {"div", "div_", "divide", "true_divide", "__truediv__", "__itruediv__", "__rtruediv__", "__rdiv__"}
)
SHAPES = frozenset(
    {"view", "reshape", "unsqueeze", "squeeze", "transpose", "permute", "contiguous", "flatten", "unflatten", "movedim"}
    | {"moveaxis", "swapaxes", "swapdims", "view_as", "reshape_as", "clone", "t", "__get__"}
)


@dataclass(frozen=True)
class Term:
    """One of two tensors that are added: what it is made `of`, and the function that makes it ("": it is that)."""

    of: tuple[torch.Tensor, ...]
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]
    by: str = ""


def terms(name: str, args: Any, kwargs: Mapping[str, Any]) -> tuple[Term, Term] | None:
    """Return the two terms of a function that adds two tensors, in the order of its arguments; None for any other."""
    if name in ADDITIONS | SUBTRACTIONS | SUBTRACTIONS_FROM:
        names = ("input", "alpha", "other") if len(args) == 3 else ("input", "other")  # the former as of old
        given = _bound(name, args, kwargs, *names)
        a, b = given.get("input"), given.get("other")
        factor = given.get("alpha", 1)
        signs = (1, factor) if name in ADDITIONS else (1, -factor) if name in SUBTRACTIONS else (-factor, 1)
        found = _scaled(a, signs[0]), _scaled(b, signs[1])
    elif name in FUSED and name.startswith("lerp"):
        given = _bound(name, args, kwargs, "input", "end", "weight")
        found = _scaled(given["input"], 1 - given["weight"]), _scaled(given["end"], given["weight"])
    elif name in FUSED:
        before = ("input", "value") if len(args) == 4 else ("input",)  # the former as of old
        given = _bound(name, args, kwargs, *before, "tensor1", "tensor2")
        found = _scaled(given["input"], 1), _multiplied(name, given)
    elif name in ADDED_PRODUCTS:
        given = _added_product(name, args, kwargs)
        found = _scaled(given["input"], given.get("beta", 1)), _matmul(given)
    else:
        return None
    left, right = found
    if left is None or right is None or min(len(left.shape), len(right.shape)) < 2:
        return None
    return left, right


def part(tensor: torch.Tensor, shape: tuple[int, ...], factor: float) -> Term:
    """Return what a sum over joined tensors has of one of them."""
    return Term(
        (tensor,), shape, lambda: tensor.reshape(shape) * factor if factor != 1 else tensor.reshape(shape), "view"
    )


def _bound(function: str, args: Any, kwargs: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Return the arguments by name; more of them than there are names would be left out in silence."""
    if len(args) > len(names):
        raise MicrotomeError(
            f"torch's `{function}` is called with {len(args)} arguments in a row, expected at most {len(names)} "
            f"({', '.join(names)}): name the others"
        )
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def _added_product(name: str, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `addmm` or `baddbmm`; as of old, numbers may stand before what they multiply."""
    before = {5: ("beta", "input", "alpha"), 4: ("beta", "input")}.get(len(args), ("input",))
    return _bound(name, args, kwargs, *before, *(("mat1", "mat2") if "addmm" in name else ("batch1", "batch2")))


def _scaled(tensor: Any, factor: Any) -> Term | None:
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        return None
    shape = tuple(tensor.shape)
    if not isinstance(factor, torch.Tensor) and factor == 1:
        return Term((tensor,), shape, lambda: tensor)
    return Term((tensor,), shape, lambda: tensor * factor, "mul")


def _multiplied(name: str, given: Mapping[str, Any]) -> Term | None:
    a, b, value = given["tensor1"], given["tensor2"], given.get("value", 1)
    if not isinstance(b, torch.Tensor) or not a.is_floating_point():
        return None
    divides = "div" in name
    shape = tuple(torch.broadcast_shapes(a.shape, b.shape))
    return Term((a, b), shape, lambda: value * (a / b if divides else a * b), "div" if divides else "mul")


def _matmul(given: Mapping[str, Any]) -> Term | None:
    a, b = (given[key] for key in (("mat1", "mat2") if "mat1" in given else ("batch1", "batch2")))
    alpha = given.get("alpha", 1)
    return (
        Term((a, b), (*a.shape[:-1], b.shape[-1]), lambda: alpha * (a @ b), "matmul") if a.is_floating_point() else None
    )


def factors(name: str, args: Any, kwargs: Mapping[str, Any]) -> tuple[tuple[torch.Tensor, torch.Tensor], str] | None:
    """Return the two tensors that a product of matrices multiplies, and their axes, as `ab,bc->ac`; None: not known."""
    if name == "einsum":
        return _einsum(args, kwargs)
    if name.startswith("baddbmm"):
        given = _added_product(name, args, kwargs)
        a, b = given["batch1"], given["batch2"]
    else:
        given = _bound(name, args, {}, "input", "other") | {"mat2": None} | dict(kwargs)
        a, b = given.get("input"), given.get("other", given["mat2"])
        if name == "__rmatmul__":
            a, b = b, a
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor) or min(a.ndim, b.ndim) < 2:
        return None
    batch = string.ascii_lowercase[: max(a.ndim, b.ndim) - 2]
    of_a, of_b = (batch[len(batch) - each.ndim + 2 :] for each in (a, b))
    return (a, b), f"{of_a}yz,{of_b}zx->{batch}yx"


def _einsum(args: Any, kwargs: Mapping[str, Any]) -> tuple[tuple[torch.Tensor, torch.Tensor], str] | None:
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    if (
        not isinstance(equation, str)
        or len(operands) != 2
        or not all(isinstance(each, torch.Tensor) for each in operands)
    ):
        return None
    equation = equation.replace(" ", "")
    given, arrow, result = equation.partition("->")
    inputs = given.split(",")
    if not arrow:
        result = "".join(sorted(each for each in set(given) - {",", "."} if given.count(each) == 1))
        result = ("..." if "..." in given else "") + result
    spare = [each for each in string.ascii_letters if each not in equation]
    most = max(each.ndim - len(axes.replace("...", "")) for each, axes in zip(operands, inputs, strict=True))
    rest = "".join(spare[:most])
    for at, each in enumerate(operands):
        own = each.ndim - len(inputs[at].replace("...", ""))
        inputs[at] = inputs[at].replace("...", rest[len(rest) - own :])
    if any(len(set(axes)) < len(axes) for axes in inputs):
        return None
    return (operands[0], operands[1]), f"{','.join(inputs)}->{result.replace('...', rest)}"


@dataclass(frozen=True)
class Reading:
    """Where attention weights have their axes, those of images and heads (`batch`), of queries and of keys.

    `images` is the place among `batch` of the axis of images, and whether it is all of that axis, or the heads are
    folded into it: `outer` where the heads of an image are neighbours, `inner` where the images of a head are.
    """

    batch: tuple[int, ...]
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    images: tuple[int, Literal["all", "outer", "inner"]] = (0, "all")

    def weights(self, tensor: torch.Tensor, images: int) -> torch.Tensor:
        """Return the weights as (image, head, query, key)."""
        tensor = tensor.permute(*self.batch, *self.queries, *self.keys)
        tensor = tensor.flatten(len(self.batch) + len(self.queries)).flatten(len(self.batch), -2)
        at, how = self.images
        if how == "outer":
            return tensor.unflatten(0, (images, -1))
        if how == "inner":
            return tensor.unflatten(0, (-1, images)).transpose(0, 1)
        tensor = tensor.movedim(at, 0)
        return tensor.flatten(1, -3) if len(self.batch) > 1 else tensor.unsqueeze(1)

    def of_images(self, shape: tuple[int, ...], images: int) -> Iterator[Reading]:
        """Yield the readings of weights of this shape that have this many images."""
        for at, axis in enumerate(self.batch):
            if shape[axis] == images:
                yield Reading(self.batch, self.queries, self.keys, (at, "all"))
        if len(self.batch) == 1 and shape[self.batch[0]] % images == 0 and shape[self.batch[0]] > images:
            yield Reading(self.batch, self.queries, self.keys, (0, "outer"))
            yield Reading(self.batch, self.queries, self.keys, (0, "inner"))


def reading(equation: str, which: int) -> Reading | None:
    """Return how a factor of a product is read if it holds attention weights and the other the values; None: it cannot.

    Keys are the axes that the product sums over. Axes that the values lack are the queries'.
    """
    inputs, _, result = equation.partition("->")
    own, other = inputs.split(",")[which], inputs.split(",")[1 - which]
    axes: dict[str, list[int]] = {"batch": [], "queries": [], "keys": []}
    for at, axis in enumerate(own):
        if axis not in result and axis not in other:
            return None
        kind = "keys" if axis not in result else "batch" if axis in other else "queries"
        axes[kind].append(at)
    if not axes["keys"] or not axes["queries"]:
        return None
    return Reading(tuple(axes["batch"]), tuple(axes["queries"]), tuple(axes["keys"]))


def sums_to_one(weights: torch.Tensor, axes: tuple[int, ...]) -> bool:
    """Return whether no value is negative and all sum to 1 along the axes, up to rounding."""
    if not weights.is_floating_point() or weights.numel() == 0 or not bool((weights >= 0).all()):
        return False
    close = max(1e-5, 8 * torch.finfo(weights.dtype).eps)
    return bool(((weights.sum(axes, dtype=torch.float64) - 1).abs() <= close).all())
