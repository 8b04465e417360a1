"""The report: static pages that show what every stage found, beside the controls; a browser of units for each network.

`build` writes `index.html` and the pages beside it, `figures/`, `tables/` and `units/`. They work offline and from a
file, load nothing from elsewhere, and show names that come from data as text. The same results give the same bytes.
"""

from pipeline.report.experiment import Experiment
from pipeline.report.experiment import Made as Made
from pipeline.report.page import Page


def build(experiment: Experiment) -> list[Page]:
    """Write the report of an experiment; see `pipeline.report.site.build`."""
    # matplotlib and jinja2 cost most of a second: not for those who only make a plan
    from pipeline.report import site

    return site.build(experiment)
