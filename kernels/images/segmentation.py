"""Turn the output of a segmentation network into one class per pixel: the s_c(x, p) of Bau et al. (PNAS 2020).

The same code runs on a CPU and on a GPU; scores and labels stay on their device.
"""

import torch


def best_class(scores: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return the channel with the highest score at every pixel, int64 (H, W).

    Scores (channel, h, w), floating point, are first upsampled to `size` = (H, W): bilinear, half-pixel centres, edge
    values beyond the edge, without antialiasing where the map shrinks. Of equal scores the first channel wins. The
    scores must be finite: an argmax takes a NaN for the highest.
    """
    return torch.nn.functional.interpolate(scores[None], size=size, mode="bilinear", align_corners=False)[0].argmax(0)


def merged_masks(classes: torch.Tensor, masks: torch.Tensor, size: tuple[int, int] | None) -> torch.Tensor:
    """Compute scores (class, h, w) of a network that returns masks and the class of each mask.

    score(c, p) = sum over queries q of softmax(classes)(q, c) * sigmoid(masks)(q, p), the semantic inference of Cheng
    et al., "Per-pixel classification is not all you need" (NeurIPS 2021).

    Parameters
    ----------
    classes : (query, class + 1), logits; the last column, no object, is dropped after the softmax.
    masks : (query, h, w), logits.
    size : upsample the masks to this size before the sigmoid, as Mask2Former does; None leaves them.
    """
    if size is not None:
        masks = torch.nn.functional.interpolate(masks[None], size=size, mode="bilinear", align_corners=False)[0]
    return torch.einsum("qc,qhw->chw", classes.softmax(-1)[:, :-1], masks.sigmoid())
