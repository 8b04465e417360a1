"""What a run leaves behind for others names no home folder, no user and no secret."""

import os
import re
import stat

import experiments
import numpy as np
from workflow_run import ROOT, snakemake

MARKS = ("markedhome", "markeduser", "markedsecret")


def test_outputs_name_no_home_no_user_and_no_secret(tmp_path, monkeypatch):
    """Paths in the configuration are absolute and below the home folder; an image is refused, by its path."""
    home = tmp_path / "markedhome"
    work = home / "work"
    work.mkdir(parents=True)
    for name, value in {
        "HOME": str(home),
        "USER": "markeduser",
        "LOGNAME": "markeduser",
        "AWS_SECRET_ACCESS_KEY": "markedsecret",
        "DASK_DISTRIBUTED__COMM__TLS__CLIENT__KEY": str(home / "markedsecret.pem"),
    }.items():
        monkeypatch.setenv(name, value)
    data = home / "data"
    experiments.labelled_images(data, [f"{k:02}" for k in range(12)])
    experiments.write_label_map(data, "bad", np.zeros((16, 16), np.uint8))
    (data / "images" / "bad.png").write_bytes(b"not an image")
    config = experiments.segmentation(data)
    config |= {
        "results": "results",
        "networks": {"tiny": experiments.tiny(data)},
        "cluster": {"workers": 1},
        "report": {"cards": 1},
    }
    snakemake(work, config)

    assert "~/data/images/bad.png" in (work / "results" / "photos" / "quarantine.csv").read_text()
    assert "~/data/network.py:tiny" in (work / "results" / "networks" / "tiny" / "model.json").read_text()
    found = {}
    for path in work.rglob("*"):
        if path.is_file():
            marks = [mark for mark in MARKS if mark.encode() in path.read_bytes()]
            if marks:
                found[path.relative_to(work).as_posix()] = marks
    # The configuration itself, and what this run alone reads: as it was configured, and for nobody else.
    assert found.pop("mini.yaml") == ["markedhome"]
    plans = [name for name in found if re.fullmatch(r"results/\.microtome/plans/mini\.[0-9a-f]+\.json", name)]
    for name in plans:
        assert found.pop(name) == ["markedhome"]
        assert stat.S_IMODE((work / name).stat().st_mode) == 0o600
    assert found == {}
    (log,) = (work / ".snakemake" / "log").glob("*.log")
    assert "Working directory: ~/work" in log.read_text()
    assert str(ROOT) not in os.environ["HOME"]
