"""Calibrate plain files: `python -P -m pipeline.calibrate`. The program is `pipeline.stages.calibrate.plain_files`."""

import os
import runpy

from pipeline.workers.pool import ARITHMETIC

if __name__ == "__main__":
    os.environ |= ARITHMETIC  # as workers have it: the same bits, and set before numpy is there
    runpy.run_module("pipeline.stages.calibrate.plain_files", run_name="__main__")
