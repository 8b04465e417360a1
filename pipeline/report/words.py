"""Numbers in the words of the report."""

import math
from typing import Any

SURE = 2
"""Standard errors by which two numbers differ before a page says which is larger."""


def number(value: Any) -> str:
    """Format an integer with thin spaces between thousands; return anything else as its text."""
    return f"{value:,}".replace(",", "\u202f") if isinstance(value, int) and not isinstance(value, bool) else str(value)


def decimal(value: float, digits: int = 3) -> str:
    """Format a number with a fixed number of digits; a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def percent(value: float, digits: int = 0) -> str:
    """Format a share as a percentage; a dash for NaN. Other values never round to 0 or 100; the text does not break."""
    if math.isnan(value):
        return "–"
    step = 0.01 / 10**digits
    if 0 < value < step / 2:
        return f"<\u00a0{step * 100:.{digits}f}\u00a0%"
    if 1 - step / 2 < value < 1:
        return f">\u00a0{100 - step * 100:.{digits}f}\u00a0%"
    return f"{value * 100:.{digits}f}\u00a0%"


def with_error(value: float, error: float | None) -> str:
    """Format a number with its standard error, if it has one."""
    return f"{value:.3f}" + ("" if error is None or math.isnan(error) else f" ± {error:.3f}")


def plural(count: Any, noun: str) -> str:
    """Return `1 unit`, `2 units`."""
    return f"{number(count)} {noun}{'' if count == 1 else 's'}"


def seconds(value: float | None) -> str:
    """Format a time in seconds, minutes or hours; a dash if unknown."""
    if value is None:
        return "–"
    if value < 90:
        return f"{value:.1f} s"
    return f"{value / 60:.1f} min" if value < 5400 else f"{value / 3600:.1f} h"
