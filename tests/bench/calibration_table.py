"""The tables of docs/calibration.md, from a results folder that `snakemake calibrate` has filled.

python -m tests.bench.calibration_table results
"""

import csv
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

PAPER = ("uncalibrated", "histogram", "isotonic", "bbq", "temperature", "vector", "matrix")
OTHERS = ("histogram_mass", "histogram_top", "histogram_mass_top", "isotonic_top", "bbq_top", "matrix_odir")
Table = Mapping[str, Mapping[str, str]]


def tables(results: Path) -> dict[tuple[str, str], Table]:
    found = {}
    for path in sorted(results.glob("*/*/calibration.csv")):
        with path.open(newline="") as file:
            found[path.parent.parent.name, path.parent.name] = {row["method"]: row for row in csv.DictReader(file)}
    return found


def lines(found: Mapping[tuple[str, str], Table]) -> Iterator[str]:
    def ranged(measure: str, methods: tuple[str, ...], scale: float, digits: int) -> Iterator[str]:
        yield "| data set | network | " + " | ".join(methods) + " |"
        yield "|" + "---|" * (2 + len(methods))
        for (dataset, network), table in found.items():
            cells = []
            for name in methods:
                mean, low, high = (scale * float(table[name][f"{measure}{end}"]) for end in ("", "_2.5", "_97.5"))
                cells.append(f"{mean:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})")
            yield f"| {dataset} | {network} | " + " | ".join(cells) + " |"

    splits = {row["splits"] for table in found.values() for row in table.values()}
    yield f"ECE in %, mean over {', '.join(sorted(splits))} splits (range of 95 % of them):"
    yield ""
    yield from ranged("ece", PAPER, 100, 2)
    yield ""
    yield from ranged("ece", OTHERS, 100, 2)
    yield ""
    yield "NLL:"
    yield ""
    yield from ranged("nll", PAPER, 1, 3)
    yield ""
    yield "Share of the splits in which the ECE is below that of the temperature; change of accuracy in points:"
    yield ""
    methods = tuple(name for name in PAPER + OTHERS if name != "temperature")
    yield "| network | " + " | ".join(methods) + " |"
    yield "|" + "---|" * (1 + len(methods))
    for (_, network), table in found.items():
        shares = (100 * float(table[name]["ece_below_temperature"]) for name in methods)
        changes = (100 * float(table[name]["accuracy_change"]) for name in methods)
        cells = (f"{share:.0f} %; {change:+.2f}" for share, change in zip(shares, changes, strict=True))
        yield f"| {network} | " + " | ".join(cells) + " |"
    yield ""
    yield "| network | accuracy | mean confidence | ECE | its interval | null: mean, 95 % | T | penalty |"
    yield "|---|---|---|---|---|---|---|---|"
    for (_, network), table in found.items():
        row = {name: float(cell) for name, cell in table["uncalibrated"].items() if cell and name != "method"}
        shown = [f"{100 * row[name]:.2f} %" for name in ("accuracy", "mean_confidence", "ece")]
        shown.append(f"{100 * row['ece_low']:.2f} to {100 * row['ece_high']:.2f} %")
        shown.append(f"{100 * row['ece_null']:.2f}, {100 * row['ece_null_high']:.2f} %")
        shown.append(f"{float(table['temperature']['temperature']):.3f}")
        yield f"| {network} | " + " | ".join([*shown, f"{float(table['matrix_odir']['penalty']):.0f}"]) + " |"


if __name__ == "__main__":
    print("\n".join(lines(tables(Path(sys.argv[1])))))
