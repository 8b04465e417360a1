"""Pages and figures of the docs that commands write."""

import re
import runpy

import pytest
from workflow_run import ROOT


def test_the_page_of_public_functions_is_that_of_the_docstrings():
    script = runpy.run_path(str(ROOT / "workflow" / "api_page.py"))
    assert (ROOT / "docs" / "api.md").read_text() == script["page"](), "run python workflow/api_page.py"


@pytest.mark.slow  # it starts Snakemake
def test_the_rule_graph_shows_every_rule():
    script = runpy.run_path(str(ROOT / "workflow" / "rulegraph.py"))
    drawn = (ROOT / "docs" / "figures" / "rulegraph.svg").read_text()
    assert set(re.findall(r"make_\w+", drawn)) == set(script["rules"]()) != set()
