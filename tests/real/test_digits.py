"""The strided network of config/explain-digits.yaml: trained by the workflow, and erased stroke by stroke."""

import yaml
from workflow_run import ROOT, snakemake

from tests.bench.log_odds_table import measure, split


def test_reveal_cancel_finds_the_strokes_that_make_a_digit(beside_data, monkeypatch):
    monkeypatch.chdir(beside_data)
    split(beside_data / "data/mnist/test10000.npz", beside_data / "digits.npz")
    config = yaml.safe_load((ROOT / "config/explain-digits.yaml").read_text())
    config["datasets"]["digits"]["file"] = "digits.npz"
    config["networks"]["strided"]["train"]["recipe"]["steps"] = 700  # less than half of it: 97 % are reached
    (beside_data / "digits.yaml").write_text(yaml.safe_dump(config))
    snakemake(beside_data, beside_data / "digits.yaml", "network")
    accuracy, changes = measure(beside_data / "digits.yaml", 100)
    assert accuracy >= 0.97
    means = {name: found.mean() for name, found in changes.items()}
    assert max(means, key=means.get) == "DeepLIFT, RevealCancel"
    assert min(means, key=means.get) == "guided backpropagation x input"
