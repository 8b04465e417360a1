"""Real images, and networks that others trained: ../shared/data, or data/ in the folder that MICROTOME_SHARED names."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("MICROTOME_SHARED", ROOT.parent / "shared")) / "data"


@pytest.fixture
def beside_data(tmp_path: Path) -> Path:
    """A folder to run the ready-made configurations in: `data` and `config` are links."""
    if not DATA.is_dir():
        pytest.skip(f"no real data: {DATA} is not there (set MICROTOME_SHARED to the folder that holds data/)")
    (tmp_path / "data").symlink_to(DATA.resolve())
    (tmp_path / "config").symlink_to(ROOT / "config")
    return tmp_path
