"""The page of what is refused is made from its tables, and the tests that it names exist."""

import pytest
import refused


def test_the_page_is_what_its_command_makes():
    assert refused.PAGE.read_text(encoding="utf-8") == refused.page(), "run `python tests/support/refused.py`"


def test_every_named_test_exists():
    assert refused.rows()
    assert [row["test"] for row in refused.rows() if not refused.exists(row["test"])] == []


def test_every_cell_is_filled():
    assert all(row[name] and row[name].strip() for row in refused.rows() for name in refused.COLUMNS)


@pytest.mark.parametrize(
    "test",
    [
        "tests/workflow/test_refused_page.py",
        "tests/workflow/test_refused_page.py::test_no_such",
        "tests/workflow/no_such.py::test_every_cell_is_filled",
        "tests/support/refused.py::rows",
    ],
)
def test_a_test_that_is_not_there_is_found_out(test):
    assert not refused.exists(test)


def test_parameters_and_bars_do_no_harm(tmp_path, monkeypatch):
    monkeypatch.setattr(refused, "ROOT", tmp_path)
    (tmp_path / "docs/refused").mkdir(parents=True)
    (tmp_path / "docs/refused/a.csv").write_text('kind,message,what to do,test\n"a | b","two\nlines",c,d\n')
    assert refused.page().endswith("| a \\| b | two lines | c | `d` |\n")
    (tmp_path / "docs/refused/b.csv").write_text("kind,test\n")
    with pytest.raises(ValueError, match=r"b\.csv has the columns"):
        refused.rows()
