"""Calibration of plain files, and the report's page of it, from the same numbers."""

import csv

import numpy as np
import pytest

from kernels.calibration.methods import NAMES, judge, uncalibrated
from kernels.calibration.reliability import softmax
from pipeline.errors import MicrotomeError
from pipeline.report.experiment import Experiment, Made
from pipeline.stages.calibrate import page as page_of
from pipeline.stages.calibrate.plain_files import calibrate, main, read
from pipeline.stages.calibrate.results import Calibrated, NetworkFacts, Whole, tables, write_whole_network
from pipeline.stages.calibrate.settings import Calibrate, Fitting
from pipeline.stages.calibrate.tasks import Judged
from pipeline.stages.report import site
from pipeline.storage.store import write


def made(seed=0, images=240, classes=4):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, images)
    logits = generator.standard_normal((images, classes)) * 2
    logits[np.arange(images), labels] += 2
    return (logits * 2).astype(np.float32), labels


def write_csv(path, numbers, labels):
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["label", *(f"class {c}" for c in range(numbers.shape[1]))])
        table.writerows([label, *map(repr, row)] for label, row in zip(labels.tolist(), numbers.tolist(), strict=True))
    return path


def rows_of(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_logits_and_probabilities_of_both_kinds_of_file_are_one(tmp_path, capsys):
    logits, labels = made()
    np.savez(tmp_path / "logits.npz", logits=logits, labels=labels)
    np.savez(tmp_path / "probabilities.npz", probabilities=softmax(logits), labels=labels)
    write_csv(tmp_path / "as_logits.csv", logits.astype(np.float64), labels)
    write_csv(tmp_path / "as_probabilities.csv", softmax(logits), labels)
    files = [tmp_path / name for name in ("logits.npz", "probabilities.npz", "as_logits.csv", "as_probabilities.csv")]
    main([*map(str, files), "--splits", "2", "--methods", "temperature", "histogram", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert printed.count("means over 2 random splits") == 4 and "240 images, 4 classes; accuracy" in printed
    rows = [rows_of(tmp_path / "out" / file.stem / "calibration.csv") for file in files]
    assert [row["method"] for row in rows[0]] == ["uncalibrated", "histogram", "temperature"]
    for other in rows[1:]:
        for one, two in zip(rows[0], other, strict=True):
            for name in one.keys() - {"method"}:
                assert one[name] == two[name] or float(one[name]) == pytest.approx(float(two[name]), abs=1e-6), name
    assert len((tmp_path / "out/logits/calibration-bins.csv").read_text().splitlines()) == 1 + 15 * 4


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("label,a,b\n0,0.5,0.4\n1,0.5,0.5\n", r"row 0: the probabilities sum to 0\.9"),
        ("label,a,b\n0,1,2\n2,2,1\n", "row 1: label 2"),
        ("label,a,b\n0,nan,2\n", "row 0: a logit is not finite"),
        ("label,a\n0,1\n", "at least two"),
        ("label,a,b\n", "no images"),
        ("label,a,b\n0,x,2\n", "line 2 of .*: 'x' in column 'a' is not a number"),
        ("name,a,b\n0,1,2\n", "expected one of label"),
        ("label,a,b\n=1+1,1,2\n", "line 2 of .*: '=1\\+1' in column 'label' is not a number"),
        ("label,a,b\n0,1_0,2\n", "'1_0' in column 'a' is not a number"),
        ("label,a,b\n0,-inf,2\n1,0,1\n", "row 0: a logit is not finite"),
        (",label,a,b\n0,0,1,2\n1,1,2,1\n", "a column without a name: name it, or leave it out"),
        ("label,a,a\n0,1,2\n", "two columns 'a'"),
        ("label,a,b\n0,3,2\n0,1,2\n", "rows 0 to 1 all have the label 0"),
        ("label\n0\n1\n", "there is 0 class"),
        ("label,a,b\n0,1\n", "line 2 of .* has 2 fields, its header 3"),
        ('label,a,b\n0,"1,2\n', "not a CSV in UTF-8"),
        ("", r"has the columns \(none\)"),
    ],
)
def test_bad_files_are_refused_with_their_row(tmp_path, content, said):
    (tmp_path / "bad.csv").write_text(content)
    with pytest.raises(MicrotomeError, match=said):
        read(tmp_path / "bad.csv")


def test_bad_arrays_are_refused(tmp_path):
    logits, labels = made()
    np.savez(tmp_path / "one.npz", logits=logits, label=labels)
    with pytest.raises(MicrotomeError, match=r"has the arrays logits, label; expected `labels`"):
        read(tmp_path / "one.npz")
    np.savez(tmp_path / "two.npz", logits=logits, labels=np.array([object()] * len(labels), dtype=object))
    with pytest.raises(MicrotomeError, match=r"two\.npz: .*allow_pickle=False"):
        read(tmp_path / "two.npz")
    np.savez(tmp_path / "good.npz", logits=logits, labels=labels)
    good = (tmp_path / "good.npz").read_bytes()
    damaged = bytes(byte ^ 255 if at == 700 else byte for at, byte in enumerate(good))
    for content in (b"no zip", b"", good[:300], damaged):
        (tmp_path / "three.npz").write_bytes(content)
        with pytest.raises(MicrotomeError, match=r"three\.npz is not an npz, or a damaged one"):
            read(tmp_path / "three.npz")
    np.save(tmp_path / "array.npy", logits)
    with pytest.raises(MicrotomeError, match=r"array\.npy is neither \.npz nor \.csv"):
        read(tmp_path / "array.npy")
    with pytest.raises(MicrotomeError, match=r"cannot read .*absent\.npz: No such file"):
        read(tmp_path / "absent.npz")
    np.savez(tmp_path / "both.npz", logits=logits, probabilities=softmax(logits), labels=labels)
    with pytest.raises(MicrotomeError, match=r"one of logits, probabilities$"):
        read(tmp_path / "both.npz")
    write_csv(tmp_path / "good.csv", logits.astype(float), labels)
    with pytest.raises(SystemExit, match="several files 'good'"):
        main([str(tmp_path / "good.npz"), str(tmp_path / "good.csv"), "--out", str(tmp_path / "out")])
    np.savez(tmp_path / "four.npz", logits=logits[:5], labels=labels[:5])
    with pytest.raises(SystemExit, match="four: 2 images to calibrate on, and 4 classes"):
        main([str(tmp_path / "four.npz")])
    four = str(tmp_path / "four.npz")
    with pytest.raises(SystemExit, match=r"^--splits: Input should be greater than or equal to 1 \(found 0\)$"):
        main([four, "--splits", "0"])
    with pytest.raises(SystemExit, match=r"^--methods: 'bbq' is named twice$"):
        main([four, "--methods", "bbq", "bbq"])
    with pytest.raises(SystemExit, match="Not a directory"):
        main([str(tmp_path / "good.npz"), "--splits", "1", "--methods", "temperature", "--out", four])


def test_what_spreadsheets_and_other_programs_write_is_read(tmp_path):
    logits, labels = made()
    np.savez(tmp_path / "plain.npz", logits=logits.astype(np.float16), labels=labels.astype(">i2"))
    (tmp_path / "PLAIN.NPZ").write_bytes((tmp_path / "plain.npz").read_bytes())
    expected = read(tmp_path / "plain.npz")
    assert expected.labels.dtype == np.int64 and (read(tmp_path / "PLAIN.NPZ").logits == expected.logits).all()
    numbers = expected.logits.astype(float)
    text = write_csv(tmp_path / "plain.csv", numbers, labels).read_text()
    text = text.replace("label,class 0,class 1", '"Label","=cmd()|1, ""a""","-b"').replace("\n", "\r\n")
    (tmp_path / "odd.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    for name in ("plain.csv", "odd.csv"):
        found = read(tmp_path / name)
        assert (found.logits == numbers).all() and (found.labels == labels).all()
    np.savez(tmp_path / "certain.npz", probabilities=np.eye(4, dtype=bool)[labels], labels=labels)
    main([str(tmp_path / "certain.npz"), "--splits", "1"])


@pytest.fixture
def experiment(tmp_path):
    """Two networks with calibrations, one of them with a hostile data set name beside; nothing else."""
    section = Calibrate(splits=3)
    for name, batch_norm, depth in (("cnn", True, 7), ("vit", False, 18)):
        logits, labels = made(depth)
        np.savez(tmp_path / f"{name}.npz", logits=logits, labels=labels)
        whole, found, methods = calibrate(read(tmp_path / f"{name}.npz"), section)
        folder = tmp_path / "results/scenes" / name
        folder.mkdir(parents=True)
        network = NetworkFacts(
            depth=depth, width=8.0, parameters=100, batch_norm=batch_norm, weight_decay=None, steps=None
        )
        facts = Calibrated(images=240, fit=120, test=120, all=whole.measures, network=network)
        fitting = Fitting(methods=methods[1:], splits=3, share=section.share, bins=section.bins, penalty=None)
        write_whole_network(folder / "calibration.zarr", methods, whole, fitting, facts)
        for split in range(3):
            write(folder / "calibration.zarr", {key: ((split, 0, 0), v[split : split + 1]) for key, v in found.items()})
        for file, data in tables(found, methods, whole).items():
            (folder / file).write_bytes(data)
    steps = [Made(stage, "scenes", name) for stage in ("dissect", "calibrate") for name in ("cnn", "vit")]
    (tmp_path / "out/figures").mkdir(parents=True)
    (tmp_path / "out/tables").mkdir()
    return Experiment(tmp_path / "results", tmp_path / "out", "A title", tuple(steps))


def test_the_page_shows_the_numbers(experiment):
    (page,) = page_of.pages(experiment)
    assert len(page.findings) == 2 and "cnn is right on" in page.findings[0]
    assert [figure.kind for figure in page.figures] == ["reliability", "calibration-methods"] * 2 + [
        "calibration-networks"
    ]
    assert all((experiment.out / file).stat().st_size for figure in page.figures for file in figure.written)
    html = site.render(experiment, page, [page])
    logits, labels = made(7)
    sums, _, _ = judge(uncalibrated, logits, labels)
    assert f"accuracy {100 * sums.accuracy:.1f}" in html and f"{100 * sums.ece:.2f}" in html
    rows = rows_of(experiment.out / page.files[0])
    assert [row["network"] for row in rows] == ["cnn", "vit"]
    table = {row["method"]: row for row in rows_of(experiment.results / "scenes/cnn/calibration.csv")}
    assert set(table) == set(NAMES)
    for name in page_of.PAPER:
        assert float(rows[0][name]) == float(table[name]["ece"])
    networks = rows_of(experiment.out / "tables/calibration-networks.csv")
    assert [row["depth"] for row in networks] == ["7", "18"] and networks[0]["weight_decay"] == ""


def test_a_report_without_calibration_has_no_page(tmp_path):
    assert page_of.pages(Experiment(tmp_path, tmp_path, "t", (Made("dissect", "scenes", "cnn"),))) == []


def test_parts_of_a_whole_are_merged_in_order():
    logits, labels = made()
    rows = [slice(at, at + 100) for at in range(0, 240, 100)]
    parts = [Judged.of(uncalibrated, logits[at], labels[at], 15, 200, seed) for seed, at in enumerate(rows)]
    whole = Whole.of([Judged.of(uncalibrated, logits, labels, 15, 200, seed=0)])
    merged = Whole.of(parts)
    drawn = {name for name in whole.measures if name.startswith("classwise_ece_")}  # of each part by its own numbers
    for name, value in whole.measures.items():
        assert merged.measures[name] == pytest.approx(value, **({"rel": 0.1} if name in drawn else {"rel": 1e-12}))
    assert len(drawn) == 4
