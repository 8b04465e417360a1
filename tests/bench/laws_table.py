"""Print how methods of attribution keep their laws on the networks of a results folder, for docs/attribution.md.

    python -m tests.bench.laws_table results/samples

Of each network and method: median and worst residual, and how many of the images are beyond the tolerance; for LIME,
the median fit and stability; and the cost in forwards.
"""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path


def rows(dataset: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the network and the row of each method."""
    for file in sorted(dataset.glob("*/attributions/*/attributions.csv")):
        with file.open() as text:
            for row in csv.DictReader(text):
                yield file.parts[-4], row


def found(row: dict[str, str]) -> str:
    """Return what a method is found to keep: the residual of its law, or how well its model fits."""
    if row["residual_median"]:
        return f"{float(row['residual_median']):.0e} · {float(row['residual_worst']):.0e}"
    if row["r2_median"]:
        return f"r2 {float(row['r2_median']):.2f}, stability {float(row['stability_median']):.2f}"
    return "no law"


def main(dataset: str) -> None:
    print("| network | method | median · worst residual | beyond the tolerance | forwards |\n|---|---|---|---|---|")
    for network, row in rows(Path(dataset)):
        images = int(row["images"])
        beyond = f"{round(float(row['beyond_tolerance']) * images)} of {images}" if row["residual_median"] else ""
        print(f"| {network} | {row['name']} | {found(row)} | {beyond} | {float(row['forwards']):.0f} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
