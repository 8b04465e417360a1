"""Compile the CPU kernels once and cache them beside their source: `python -m kernels.compile`.

Until this has run, every worker compiles the kernels itself during the first run.
"""

import time

import numpy as np

from kernels.dissection.counts import label_columns
from kernels.dissection.iou import count_shard
from kernels.dissection.threshold import count_tail, sample_bracket
from kernels.dissection.upsample import upsample


def main() -> None:
    began = time.monotonic()
    size = (4, 4)
    maps = np.arange(32, dtype=np.float16).reshape(2, 4, 2, 2)
    label_map = np.ones((2, 1, *size), np.uint16)
    upsample(maps, size)
    bracket = sample_bracket(maps, size, "edge", 0.25)
    threshold = count_tail(maps, bracket, size, "edge").result(0.25).threshold
    labels = label_columns(label_map, [1], [0])
    count_shard(maps, np.nan_to_num(threshold), labels, np.zeros(2, np.uint8), "edge")
    print(f"kernels compiled in {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main()
