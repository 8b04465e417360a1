"""From the output of a segmentation network to one class a pixel: the s_c(x, p) of Bau et al. (PNAS 2020).

The same code on a CPU and on a GPU; scores and labels are on the device that they came on.
"""

import torch


def best_class(scores: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The channel with the highest score at every pixel, int64 (H, W).

    Scores (channel, h, w), floating point, are upsampled to `size` = (H, W) first: bilinear, half-pixel centres, edge
    values beyond the edge, without antialiasing where it shrinks. Of equal scores the first channel wins. The scores
    have to be finite: an argmax takes a NaN for the best.
    """
    return torch.nn.functional.interpolate(scores[None], size=size, mode="bilinear", align_corners=False)[0].argmax(0)


def merged_masks(classes: torch.Tensor, masks: torch.Tensor, size: tuple[int, int] | None) -> torch.Tensor:
    """Scores (class, h, w) of a network that gives masks and the class of each.

    score(c, p) = sum over queries q of softmax(classes)(q, c) * sigmoid(masks)(q, p), the semantic inference of Cheng
    et al., "Per-pixel classification is not all you need" (NeurIPS 2021).

    `classes` (query, class + 1) are logits whose last column, no object, is left out after the softmax; `masks`
    (query, h, w) are logits, upsampled to `size` before the sigmoid where one is given, as Mask2Former has it.
    """
    if size is not None:
        masks = torch.nn.functional.interpolate(masks[None], size=size, mode="bilinear", align_corners=False)[0]
    return torch.einsum("qc,qhw->chw", classes.softmax(-1)[:, :-1], masks.sigmoid())
