"""Occlusion: cover a window, and see how far the score drops."""

from __future__ import annotations

import torch

from pipeline.networks.gradients import in_chunks
from pipeline.stages.attribute.options import Occlusion, starts
from pipeline.stages.attribute.subject import Attribution, Known, Subject


def occlusion(subject: Subject, options: Occlusion, known: Known) -> Attribution:
    """Return of each pixel the mean drop of the score over the windows that cover it, shown as the baseline has it.

    The last window of a row or column ends with the image, so that every pixel is covered. Zeiler and Fergus,
    "Visualizing and understanding convolutional networks" (ECCV 2014), section 4.2.
    """
    inputs, reference = subject.inputs, subject.reference
    height, width = inputs.shape[2:]
    side = options.window
    places = [(y, x) for y in starts(height, side, options.stride) for x in starts(width, side, options.stride)]
    drop = torch.zeros((len(inputs), height, width), dtype=torch.float64, device=inputs.device)
    covered = torch.zeros((height, width), dtype=torch.float64, device=inputs.device)
    for y, x in places:
        covered[y : y + side, x : x + side] += 1
    of_image = subject.counted.repeat_interleave(len(places))
    of_place = torch.arange(len(places)).repeat(len(subject.counted)).tolist()
    for start, stop in in_chunks(len(of_image), subject.batch):
        rows = of_image[start:stop]
        points = inputs[rows].clone()
        own = [places[at] for at in of_place[start:stop]]
        for point, row, (y, x) in zip(points, rows, own, strict=True):
            point[:, y : y + side, x : x + side] = reference[row, :, y : y + side, x : x + side]
        lost = subject.score[rows].double() - subject.scores_at(points, rows).double()
        for row, value, (y, x) in zip(rows, lost, own, strict=True):
            drop[row, y : y + side, x : x + side] += value
    return Attribution(None, (drop / covered).to(inputs.dtype), subject.no_residual)
