"""Class activation maps, with the weights of a linear head or those of gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from kernels.attribution import cam as kernels
from pipeline.errors import MicrotomeError
from pipeline.networks.explainable import without_positions
from pipeline.networks.gradients import Logit, relative
from pipeline.networks.graph.trace import forward_with
from pipeline.stages.attribute.options import Cam, Rectifiable
from pipeline.stages.attribute.subject import Attribution, Known, Subject

Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def cam(subject: Subject, options: Cam, known: Known) -> Attribution:
    """Weigh the layer's units by the class's weights in the linear map at the end.

    The law: the map's mean (under mean pooling, its sum under sum pooling) and the bias are the logit. Zhou et al.,
    "Learning deep features for discriminative localization" (CVPR 2016).
    """
    assert known.layer is not None and known.head is not None
    target = subject.chosen
    if not isinstance(target, Logit) or target.link != "logit":
        raise MicrotomeError("CAM explains logits, or the difference of two: leave `score` out")
    module = subject.network.get_submodule(known.head.module)
    assert isinstance(module, (nn.Linear, nn.Conv2d))
    rows, bias = module.weight.detach().flatten(1), module.bias
    activation, _ = subject.layer(known.layer)
    shift = torch.zeros(len(rows), dtype=rows.dtype, device=rows.device) if bias is None else bias.detach()
    classes = target.classes.to(rows.device)
    weight, b = rows[classes], shift[classes]
    if target.against is not None:
        against = target.against.to(rows.device)
        weight, b = weight - rows[against], b - shift[against]
    found = kernels.cam(activation, weight)
    sums = found.double().flatten(1)
    pooled = sums.mean(1) if known.head.pooling == "mean" else sums.sum(1)
    return Attribution(None, found, relative(pooled + b.double() - subject.score.double(), subject.score))


def grad_cam(subject: Subject, options: Rectifiable, known: Known) -> Attribution:
    """Return Grad-CAM (Selvaraju et al., ICCV 2017), raw and signed unless `relu`."""
    return _weighed(subject, options, known, kernels.grad_cam)


def grad_cam_pp(subject: Subject, options: Rectifiable, known: Known) -> Attribution:
    """Return Grad-CAM++ (Chattopadhay et al., WACV 2018), raw and signed unless `relu`."""
    return _weighed(subject, options, known, kernels.grad_cam_pp)


def layer_cam(subject: Subject, options: Rectifiable, known: Known) -> Attribution:
    """Return LayerCAM (Jiang et al., TIP 2021), raw and signed unless `relu`."""
    return _weighed(subject, options, known, kernels.layer_cam)


def hires_cam(subject: Subject, options: Rectifiable, known: Known) -> Attribution:
    """Return HiResCAM (Draelos and Carin 2020), raw and signed unless `relu`.

    The law, where the logits are linear in the layer's output and `relu` is not set: the map adds up to the score less
    the score with zeros at the layer's positions.
    """
    found = _weighed(subject, options, known, kernels.hires_cam)
    if not known.linear or options.relu or not isinstance(subject.chosen, Logit) or subject.chosen.link != "logit":
        return found
    assert found.map is not None and known.layer is not None
    with torch.no_grad():
        without = partial(without_positions, info=known.layer)
        bias = subject.chosen(forward_with(subject.network, known.layer.name, subject.inputs.clone(), without)).double()
    lacking = found.map.double().flatten(1).sum(1) + bias - subject.score.double()
    return Attribution(None, found.map, relative(lacking, subject.score))


def _weighed(subject: Subject, options: Rectifiable, known: Known, kernel: Kernel) -> Attribution:
    assert known.layer is not None
    found = kernel(*subject.layer(known.layer))
    return Attribution(None, found.relu() if options.relu else found, subject.no_residual)
