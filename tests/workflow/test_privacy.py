"""What a run leaves behind for others names no home folder, no user and no secret."""

import re
import shutil
import stat

import numpy as np
from PIL import Image
from workflow_run import TINY, snakemake

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
    (data / "images").mkdir(parents=True)
    (data / "maps").mkdir()
    (data / "classes.txt").write_text("1 left side\n2 blob\n")
    shutil.copy(TINY, data / "tiny.py")
    for k in range(12):
        random = np.random.default_rng(k)
        Image.fromarray(random.integers(0, 200, (16, 16, 3), np.uint8)).save(data / "images" / f"{k:02}.png")
        Image.fromarray(random.integers(1, 3, (2, 2), np.uint8)).resize((16, 16), 0).save(data / "maps" / f"{k:02}.png")
    (data / "images" / "bad.png").write_bytes(b"not an image")
    Image.new("L", (16, 16)).save(data / "maps" / "bad.png")
    maps = {"folder": str(data / "maps"), "classes": str(data / "classes.txt")}
    config = {
        "name": "mini",
        "results": "results",
        "datasets": {
            "photos": {
                "kind": "segmentation",
                "root": str(data / "images"),
                "label_maps": {"thing": maps},
                "shard_images": 8,
                "max_bad_fraction": 0.5,
            }
        },
        "networks": {"tiny": {"module": f"{data / 'tiny.py'}:tiny", "weights": "random", "layers": ["0.1"]}},
        "cluster": {"workers": 1},
        "report": {"cards": 1},
    }
    snakemake(work, config)

    assert "~/data/images/bad.png" in (work / "results" / "photos" / "quarantine.csv").read_text()
    assert "~/data/tiny.py:tiny" in (work / "results" / "networks" / "tiny" / "model.json").read_text()
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
