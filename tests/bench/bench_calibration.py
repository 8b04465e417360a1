"""CPU time and memory of fitting and judging each calibration method, in one process, one thread.

    python -m tests.bench.bench_calibration [--images 50000] [--classes 1000] [--methods temperature vector ...]
    python -m tests.bench.bench_calibration --table      a split with all methods, as the stage fits and judges it

The logits are random, overconfident, and as many as those of ImageNet's validation images by default. Of each method:
CPU seconds to fit it on all images, to judge it on all, and how far the process grew beyond the logits themselves.
Of a table: CPU seconds, and how far it grew beside what the stage asks a worker for.
"""

import argparse
import resource
import time

import numpy as np

from kernels.calibration.methods import NAMES, facts, fit, judge
from pipeline.stages.calibrate.tasks import chosen, evaluate, in_two, keys, memory_need


def logits_of(images: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, images)
    logits = 2.5 * generator.standard_normal((images, classes), dtype=np.float32)
    logits[np.arange(images), labels] += generator.normal(8, 3, images).astype(np.float32)
    logits *= 1.7
    return logits, labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=["uncalibrated", "temperature", "vector"])
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    small, few = logits_of(200, 3, 1)
    for name in NAMES:  # imports are not what is measured
        fit(name, small, few)
    logits, labels = logits_of(asked.images, asked.classes, 0)
    before = grown()
    print(f"{asked.images:,} x {asked.classes:,} logits, {logits.nbytes / 1e6:.0f} MB")
    if asked.table:
        table(logits, labels, before)
        return
    for name in asked.methods:
        began = time.process_time()
        method = fit(name, logits, labels)
        fitted = time.process_time()
        found, _, _ = judge(method, logits, labels)
        judged = time.process_time()
        print(
            f"{name:20s} fit {fitted - began:7.2f} s, judge {judged - fitted:6.2f} s, "
            f"grown {grown() - before:5.0f} MB, ECE {found.ece:.4f}, "
            f"NLL {found.nll / found.images:.4f} {facts(method) or ''}",
            flush=True,
        )


def table(logits: np.ndarray, labels: np.ndarray, before: float) -> None:
    methods = ["uncalibrated", *chosen(None, logits.shape[1])]
    to_fit, to_judge = in_two(keys([str(row) for row in range(len(labels))]), len(labels) // 2, 0)
    began = time.process_time()
    parts = logits[to_fit], labels[to_fit], logits[to_judge], labels[to_judge]
    evaluate(*parts, methods, bins=15, penalty=None, seed=0)
    need = memory_need(len(labels), logits.shape[1], methods) / 1e6
    print(
        f"{len(methods)} methods: {time.process_time() - began:.0f} s, grown {grown() - before:.0f} MB beyond the "
        f"logits' {logits.nbytes / 1e6:.0f}; the stage asks for {need:.0f} MB"
    )


def grown() -> float:
    """The largest resident size of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


if __name__ == "__main__":
    main()
