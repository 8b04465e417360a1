"""Calibration of plain files, and the report's page of it, from the same numbers."""

import csv

import drawn_text
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
from pipeline.stages.calibrate.tasks import MEASURES, Judged, in_two, keys
from pipeline.stages.report import site
from pipeline.storage.store import write
from pipeline.workers import devices


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
    (whole,) = rows_of(tmp_path / "out/logits/calibration-all.csv")
    assert (whole["images"], whole["classes"]) == ("240", "4")
    assert f"ECE {float(whole['ece']):.2%} [{float(whole['ece_low']):.2%}, {float(whole['ece_high']):.2%}]" in printed


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("label,a,b\n0,0.5,0.4\n1,0.5,0.5\n", r"row 0: the probabilities sum to 0\.9"),
        ("label,a,b\n0,1,2\n2,2,1\n", "row 1: label 2"),
        ("label,a,b\n0,nan,2\n", "row 0: a logit is not finite"),
        ("label,a\n0,1\n0,0\n", "rows 0 to 1 all have the label 0"),
        ("label,a,b\n0,60,40\n1,10,90\n", "row 0: the rows sum to 100, as percentages do"),
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


def test_arrays_that_do_not_fit_are_refused_before_one_is_unpacked(tmp_path, monkeypatch):
    logits, labels = made()
    np.savez_compressed(tmp_path / "bomb.npz", logits=np.zeros((2000, 500)), labels=np.zeros(2000, int))
    assert (tmp_path / "bomb.npz").stat().st_size < 20_000
    monkeypatch.setattr(devices, "memory", lambda: 30_000_000)
    with monkeypatch.context() as patch:
        patch.setattr(np, "load", None)
        with pytest.raises(MicrotomeError, match=r"bomb\.npz unpacks to 0\.00802 GB, .* this machine has 0\.03 GB"):
            read(tmp_path / "bomb.npz")
    np.savez(tmp_path / "good.npz", logits=logits, labels=labels, other=np.zeros(10_000_000))
    assert len(read(tmp_path / "good.npz").labels) == len(labels)


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
    with pytest.raises(MicrotomeError, match=r"one of logits, probabilities, or `predicted` and `confidence`$"):
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
    assert (
        expected.labels.dtype == np.int64 and (read(tmp_path / "PLAIN.NPZ").said.logits == expected.said.logits).all()
    )
    numbers = expected.said.logits.astype(float)
    text = write_csv(tmp_path / "plain.csv", numbers, labels).read_text()
    text = text.replace("label,class 0,class 1", '"Label","=cmd()|1, ""a""","-b"').replace("\n", "\r\n")
    (tmp_path / "odd.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    for name in ("plain.csv", "odd.csv"):
        found = read(tmp_path / name)
        assert (found.said.logits == numbers).all() and (found.labels == labels).all()
    np.savez(tmp_path / "certain.npz", probabilities=np.eye(4, dtype=bool)[labels], labels=labels)
    main([str(tmp_path / "certain.npz"), "--splits", "1"])


# What a file may mean ------------------------------------------------------------------------------------------------


def votes(voters=10, images=200, classes=4, seed=0):
    """Shares of votes, and labels: confidences lie on edges of bins. With the ECE in `voters` bins, from integers."""
    generator = np.random.default_rng(seed)
    count = generator.multinomial(voters, [0.7, 0.1, 0.1, 0.1][:classes], images)
    labels = generator.integers(0, classes, images)
    top, right = count.max(1), count.argmax(1) == labels
    gaps = [abs(voters * int(right[top == k].sum()) - k * int((top == k).sum())) for k in range(voters + 1)]
    return count / voters, labels, sum(gaps) / voters / images


@pytest.mark.parametrize("voters", [3, 7, 10])
@pytest.mark.parametrize("kind", ["float64", "float32", "widened", "text", "logits"])
def test_confidences_on_edges_are_in_the_bin_below(tmp_path, voters, kind):
    shares, labels, ece = votes(voters)
    given = shares if kind in ("float64", "logits") else shares.astype(np.float32)
    name = "logits" if kind == "logits" else "probabilities"
    np.savez(tmp_path / "f.npz", **{name: given.astype(float) if kind == "widened" else given}, labels=labels)
    if kind == "text":
        write_csv(tmp_path / "f.csv", given.astype(str).astype(float), labels)
    scored = read(tmp_path / ("f.csv" if kind == "text" else "f.npz"))
    whole, found, _ = calibrate(scored, Calibrate(splits=1, bins=voters, methods=["histogram_top"]))
    assert whole.measures["ece"] == pytest.approx(ece, abs=1e-6)
    assert whole.measures["ece_low"] <= ece <= whole.measures["ece_high"]
    # Histogram binning puts each share of votes into a bin of its own, too.
    after = found["score"][0, 1, MEASURES.index("mean_confidence")]
    assert after == pytest.approx(histogram_by_hand(scored, shares, labels, voters), abs=1e-6)


def histogram_by_hand(scored, shares, labels, voters):
    fitted, judged = in_two(keys([str(row) for row in range(len(labels))]), 100, 0)
    top, right = np.rint(shares.max(1) * voters).astype(int), shares.argmax(1) == labels
    of = {k: right[fitted][top[fitted] == k] for k in range(1, voters + 1)}
    values = {k: own.mean() if len(own) else (k - 0.5) / voters for k, own in of.items()}
    return np.mean([values[k] for k in top[judged]])


def test_zeros_alone_are_floored_at_the_smallest_probability_and_said(tmp_path, capsys):
    logits, labels = made()
    given = softmax(12 * logits.astype(np.float64))
    assert (given < 1e-12).mean() > 0.3 and given.min() > 0
    np.savez(tmp_path / "whole.npz", probabilities=given, labels=labels)
    np.testing.assert_allclose(read(tmp_path / "whole.npz").said.logits, np.log(given))
    given[given < 1e-30] = 0
    least = given[given > 0].min()
    np.savez(tmp_path / "zeros.npz", probabilities=given, labels=labels)
    scored = read(tmp_path / "zeros.npz")
    assert scored.said.logits.min() == np.log(least)
    main([str(tmp_path / "zeros.npz"), "--splits", "1", "--methods", "temperature"])
    printed = capsys.readouterr().out
    assert f"{(given == 0).sum()} probabilities are 0: each counts as {least:.3g} in a logarithm" in printed
    assert "has a probability below 1e-12, which counts as 1e-12 in the NLL" in printed
    np.savez(tmp_path / "certain.npz", probabilities=np.eye(4)[labels], labels=labels)
    assert read(tmp_path / "certain.npz").said.logits.min() == np.log(1e-12)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_logits_that_are_probabilities_in_every_row_are_read_as_such(tmp_path, dtype):
    logits, labels = made()
    given = softmax(logits).astype(dtype)
    np.savez(tmp_path / "f.npz", logits=given, labels=labels)
    scored = read(tmp_path / "f.npz")
    assert scored.said.given is not None and "rows are probabilities" in scored.remarks[0]
    given[7] *= dtype(1.25)  # in all rows but one
    np.savez(tmp_path / "f.npz", logits=given, labels=labels)
    assert read(tmp_path / "f.npz").said.given is None


def test_probabilities_that_were_bfloat16_are_read_as_such(tmp_path):
    logits, labels = made()
    given = softmax(logits).astype(np.float32)
    given = ((given.view(np.uint32) + np.uint32(0x8000)) & np.uint32(0xFFFF0000)).view(np.float32)
    assert np.abs(given.sum(1) - 1).max() > 1e-4
    np.savez(tmp_path / "f.npz", logits=given, labels=labels)
    assert read(tmp_path / "f.npz").said.given is not None


def test_sigmoids_are_taken_as_logits_and_said(tmp_path):
    logits, labels = made()
    np.savez(tmp_path / "f.npz", logits=1 / (1 + np.exp(-logits)), labels=labels)
    scored = read(tmp_path / "f.npz")
    assert scored.said.given is None and "as those of sigmoids" in scored.remarks[0]


def table_of(path, header, *columns):
    lines = [",".join(header), *(",".join(map(repr, map(float, row))) for row in zip(*columns, strict=True))]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    "name",
    ["index", "Image_ID", "image", "pred", "conf", "score", "y_true", "Unnamed: 0", "predicted class", "file-name"],
)
def test_a_column_that_is_no_class_is_refused_by_its_name(tmp_path, name):
    logits, labels = made(images=6)
    path = table_of(tmp_path / "f.csv", ["label", name, "a", "b", "c", "d"], labels, np.full(6, 0.5), *logits.T)
    with pytest.raises(MicrotomeError, match=r"f\.csv: column .* holds no scores of a class: leave it out"):
        read(path)


def test_a_column_that_is_no_class_is_refused_by_its_values(tmp_path):
    logits, labels = made()
    cases = {
        "counts the rows": np.arange(240) + 1,
        "repeats the labels": labels,
        "number of the largest": logits.argmax(1),
        "is the largest": logits.max(1),
    }
    for said, column in cases.items():
        for at in (1, 5):
            header, columns = ["label", "a", "b", "c", "d"], [labels, *logits.T]
            header.insert(at, "e"), columns.insert(at, column)
            with pytest.raises(MicrotomeError, match=f"column 'e' .*{said}.*leave it out"):
                read(table_of(tmp_path / "f.csv", header, *columns))
    np.savez(tmp_path / "two.npz", logits=np.stack([np.zeros(240), logits[:, 0]], 1), labels=labels % 2)
    read(tmp_path / "two.npz")  # a class without any score but 0 is one


@pytest.mark.parametrize("form", ["{}", "class {}", "logit_{}", "p{}", "{}.0"])
@pytest.mark.parametrize("first", [0, 1])
def test_numbered_columns_go_by_their_number(tmp_path, form, first):
    logits, labels = made(classes=12)
    order = np.random.default_rng(3).permutation(12)
    header = ["label", *(form.format(c + first) for c in order)]
    scored = read(table_of(tmp_path / "f.csv", header, labels + first, *logits.T[order]))
    assert (scored.said.logits == logits).all() and (scored.labels == labels).all()


def test_numbers_of_columns_that_could_mean_two_classes_are_refused(tmp_path):
    logits, labels = made(classes=3)
    for header, of, said in (
        (["1", "2", "3"], np.clip(labels, 1, 2), "may be column '1' or, if classes count from 0, column '2'"),
        (["0", "2", "5"], labels, "numbered 0, 2, 5; expected every number from 0 to 2"),
        (["0", "1", "other"], labels, "'other' is none: leave it out"),
    ):
        with pytest.raises(MicrotomeError, match=said):
            read(table_of(tmp_path / "f.csv", ["label", *header], of, *logits.T))
    for header in (
        ["1", "2", "3"],
        ["background", "1", "2"],
        ["class 1", "class 2", "class 3"],
        ["cat", "dog", "fox2"],
    ):
        scored = read(table_of(tmp_path / "f.csv", ["label", *header], labels, *logits.T))
        assert (scored.said.logits == logits).all() and (scored.labels == labels).all()


def test_one_column_is_a_problem_of_two_classes(tmp_path):
    logits, labels = made(classes=2)
    score = (logits[:, 1] - logits[:, 0]).astype(np.float64)
    chance = 1 / (1 + np.exp(-score))
    files = {
        "logit.csv": table_of(tmp_path / "logit.csv", ["label", "score"], labels, score),
        "chance.csv": table_of(tmp_path / "chance.csv", ["score", "label"], chance, labels),
        "row.npz": tmp_path / "row.npz",
        "column.npz": tmp_path / "column.npz",
    }
    np.savez(files["row.npz"], probabilities=chance, labels=labels)
    np.savez(files["column.npz"], logits=score[:, None], labels=labels)
    for name, file in files.items():
        scored = read(file)
        np.testing.assert_allclose(scored.said.probabilities[:, 1], chance, atol=1e-12)
        assert "one column" in scored.remarks[0] and (scored.said.given is None) == (
            name in ("logit.csv", "column.npz")
        )
    with pytest.raises(MicrotomeError, match="column 'conf' holds no scores"):
        read(table_of(tmp_path / "f.csv", ["label", "conf"], labels, chance))
    np.savez(tmp_path / "three.npz", probabilities=chance, labels=labels + 1)
    with pytest.raises(MicrotomeError, match="label 2 is not one of the classes 0 to 1"):
        read(tmp_path / "three.npz")


def test_an_ece_outside_its_interval_is_explained(tmp_path, capsys):
    generator = np.random.default_rng(0)
    confidence = generator.uniform(0.5, 1, 400)
    right = generator.random(400) < confidence
    labels = generator.integers(0, 2, 400)
    chance = np.where(right == (labels == 1), confidence, 1 - confidence)
    np.savez(tmp_path / "f.npz", probabilities=chance, labels=labels)
    scored = read(tmp_path / "f.npz")
    whole, _, _ = calibrate(scored, Calibrate(splits=1, methods=["temperature"]))
    assert whole.measures["ece"] > whole.measures["ece_high"]  # else this shows nothing
    main([str(tmp_path / "f.npz"), "--splits", "1", "--methods", "temperature"])
    said = [line for line in capsys.readouterr().out.splitlines() if "the ECE lies above its interval" in line]
    assert len(said) == 1 and said[0].startswith("as it is")


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


def test_the_page_shows_the_numbers(experiment, monkeypatch):
    cut_off = drawn_text.collect(monkeypatch)
    (page,) = page_of.pages(experiment)
    assert cut_off == []
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


# Confidences alone ----------------------------------------------------------------------------------------------------


def write_stated(path, names, rows):
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(names)
        table.writerows(rows)
    return path


def stated_of(logits, labels):
    confidence, predicted = softmax(logits).max(1), logits.argmax(1)
    return labels, predicted, confidence


def test_confidences_alone_give_what_the_scores_give(tmp_path, capsys):
    logits, labels = made()
    methods = ["histogram_top", "histogram_mass_top", "isotonic_top", "bbq_top"]
    np.savez(tmp_path / "scores.npz", logits=logits, labels=labels)
    true, predicted, confidence = stated_of(logits, labels)
    np.savez(tmp_path / "arrays.npz", labels=true, predicted=predicted, confidence=confidence)
    names = np.array(["fox", "=cmd()", "Änderung", "owl"])
    rows = zip(range(240), names[true], names[predicted], map(repr, confidence.tolist()), strict=True)
    write_stated(tmp_path / "named.csv", ["image_id", "true", "Predicted", "conf"], rows)
    files = [str(tmp_path / name) for name in ("scores.npz", "arrays.npz", "named.csv")]
    main([*files, "--splits", "3", "--methods", *methods, "--out", str(tmp_path / "out")])
    main([*files[1:], "--splits", "1"])
    printed = capsys.readouterr().out
    assert printed.count("240 images, confidences alone; accuracy") == 4 and printed.count("bbq_top") == 7
    assert "named: columns that are not used: image_id" in printed
    scores, *others = (rows_of(tmp_path / "out" / name / "calibration.csv") for name in ("scores", "arrays", "named"))
    lacking = {"classwise", "nll", "brier", "floored", "converged", "accuracy_change"}
    for other in others:
        for one, two in zip(scores, other, strict=True):
            for name, value in one.items():
                if any(name.startswith(each) for each in lacking):
                    assert two[name] in ("", "0"), name
                else:
                    assert value == two[name], name
    bins = [(tmp_path / "out" / name / "calibration-bins.csv").read_text() for name in ("scores", "arrays", "named")]
    assert bins[0] == bins[1] == bins[2]
    whole = [rows_of(tmp_path / "out" / name / "calibration-all.csv")[0] for name in ("scores", "arrays")]
    assert whole[1]["classes"] == whole[1]["nll"] == ""
    assert all(whole[0][name] == whole[1][name] for name in whole[0].keys() - {"classes", "nll"})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("label,predicted,confidence\n0,1,0.5\n1,1,1.5\n", r"row 1: confidence 1\.5 is not between 0 and 1: are they"),
        ("label,predicted,confidence\n0,1,0.5\n1,1,-1\n", r"row 1: confidence -1 is not between 0 and 1$"),
        ("label,predicted,confidence\n0,1,nan\n1,1,1\n", "row 0: confidence nan"),
        ("label,predicted,confidence\n0,1,x\n1,1,1\n", "line 2 of .*: 'x' in column 'confidence'"),
        ("label,predicted,confidence\nfox,1,1\nowl,0,1\n", r"no predicted class \(1.0, ...\) is a true one \(fox"),
        ("label,predicted,confidence\n1,10,1\n2,20,1\n", "both must name classes alike"),
        ("label,predicted,confidence\n1,1,1\n", "1 images: some to fit on"),
        ("label,predicted,confidence,p0,p1\n0,1,.5,.5,.5\n1,1,.5,.5,.5\n", "column 'predicted' holds no scores"),
        ("label,confidence\n0,.5\n1,.5\n", "column 'confidence' holds no scores"),
    ],
)
def test_bad_confidences_are_refused_with_their_row(tmp_path, content, said):
    (tmp_path / "bad.csv").write_text(content)
    with pytest.raises(MicrotomeError, match=said):
        read(tmp_path / "bad.csv")


def test_a_method_that_needs_all_scores_is_refused_for_confidences(tmp_path):
    logits, labels = made(images=20)
    rows = zip(*(each.tolist() for each in stated_of(logits, labels)), strict=True)
    file = write_stated(tmp_path / "some.csv", ["label", "predicted", "confidence"], rows)
    with pytest.raises(SystemExit, match="some: temperature needs the scores of all classes; of confidences: histo"):
        main([str(file), "--methods", "temperature"])
