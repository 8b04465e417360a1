"""Tables: no cell of text is a formula, numbers stay numbers, and what is read is what was written."""

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.storage.tables import csv_bytes, number, plain, quarantine_csv, read_rows, safe

FORMULAS = ["=1+1", "+cmd", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "'=1", "''=1", "=", "-", "--", "-1e", "+1 2"]
NUMBERS = ["-1.5", "+2", "-1e-05", "-inf", "1e5", "-.5", "0"]


def rows(data: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(data.decode(), newline="")))


@pytest.mark.parametrize("text", FORMULAS)
def test_text_from_data_is_no_formula_and_comes_back(text):
    data = csv_bytes(("concept", "iou"), [[text, number(-0.25)]])
    ((cell, iou),) = (row.values() for row in rows(data))
    assert cell == f"'{text}" and iou == "-0.25"
    assert list(read_rows(io.StringIO(data.decode(), newline=""))) == [{"concept": text, "iou": "-0.25"}]


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers_stay_numbers(text):
    assert safe(text) == text


def test_file_names_in_the_list_of_refused_images_are_no_formulas():
    (row,) = rows(quarantine_csv({"=cmd|calc.png": "-not an image"}, Path("@root")))
    assert list(row.values()) == ["'=cmd|calc.png", "'@root/=cmd|calc.png", "'-not an image"]


@settings(deadline=None)
@given(st.text(max_size=20))
def test_an_apostrophe_is_all_that_is_added_and_is_taken_away(text):
    assert safe(text) in (text, f"'{text}")
    assert safe(text)[:1] not in tuple("=@\t\r\n") and (safe(text)[:1] not in tuple("+-") or float(text) is not None)
    assert plain(safe(text)) == text
