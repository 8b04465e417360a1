"""A layer gives one row for each image, or it is refused: no row of a store holds memory that was not written."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.errors import MicrotomeError
from pipeline.networks.forward import host_buffer
from pipeline.networks.layer import LayerInfo
from pipeline.networks.layers import Recorder
from pipeline.stages.extract.layers import LayerStore
from pipeline.stages.extract.tasks import Kept


class Routed(nn.Module):
    """Images reach `expert` by their brightness: `rows` says how."""

    def __init__(self, rows):
        super().__init__()
        self.expert = nn.Conv2d(3, 4, 1)
        self.rows = rows

    def forward(self, x):
        bright = x.mean((1, 2, 3)) > 0
        if self.rows == "some":
            self.expert(x[bright])
        elif self.rows == "none" and bright.all():
            self.expert(x)
        elif self.rows == "padded":
            self.expert(torch.cat([x[bright], x[bright]]))
        elif self.rows == "patches":
            self.expert(x.unflatten(2, (2, -1)).transpose(1, 2).flatten(0, 1))
        return x.mean((2, 3))


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ("some", "gives 1 rows for 3 images"),
        ("none", "was not called"),
        ("padded", "gives 2 rows for 3 images"),
        ("patches", "gives 6 rows for 3 images"),
    ],
)
def test_a_layer_that_does_not_see_each_image_once_is_refused(rows, found):
    images = torch.tensor([1.0, -1.0, -1.0]).view(3, 1, 1, 1).expand(3, 3, 4, 4)
    with (
        Recorder(Routed(rows).eval(), ["expert"]) as record,
        pytest.raises(MicrotomeError, match=f"'expert' {found}.*take the module around it"),
    ):
        record(images)


def test_what_no_output_has_filled_is_refused():
    assert host_buffer((2, 3), torch.float16).isnan().all()
    info = LayerInfo("conv", (2, 1, 1), "map", 0, "float32", "Conv2d")
    kept = Kept.empty(LayerStore("id", Path(), info, 1.0, pooled=False), 5)
    kept.take(0, torch.ones(3, 2, 1, 1))
    with pytest.raises(MicrotomeError, match="layer 'conv' gave no output for image 13"):
        kept.require_all(10)
    kept.take(3, torch.ones(2, 2, 1, 1))
    kept.require_all(10)
    assert np.isfinite(kept.values(10)["activation"][1]).all()
