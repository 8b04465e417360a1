"""Checkpoints: what is read, what is refused and how, and that nothing in a file is executed."""

import argparse
import collections
import gzip
import os
import pickle
import re
import tarfile
import zipfile

import pytest
import safetensors.torch
import torch
from torch import nn

from pipeline.errors import MicrotomeError
from pipeline.networks import checkpoint


def load_file(network, path):
    checkpoint.load_state(network, checkpoint.read(path), path)


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


@pytest.fixture
def state():
    torch.manual_seed(3)
    made = network()
    made[1].running_mean.normal_()
    return made.state_dict()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def write(path, content):
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(content, path)
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize(
    "name",
    ["w.pt", "w.pth", "w.safetensors", "w.th", "w.ckpt", "w.pth.tar", "w", "a b'$(touch x).pt", "naïve<script>.pt"],
)
def test_reads_all_formats(tmp_path, state, name):
    path = write(tmp_path / name, state)
    assert same(checkpoint.read(path), state)
    loaded = network()
    load_file(loaded, path)
    assert same(loaded.state_dict(), state)


def test_reads_files_of_before_the_zip_format(tmp_path, state):
    path = tmp_path / "old.pt"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert same(checkpoint.read(path), state)
    assert checkpoint.shapes(path)["0.weight"].shape == (4, 3, 3, 3)


@pytest.mark.parametrize("name", ["w.pt", "w.ckpt", "w", "w.safetensors"])
def test_the_content_says_what_a_file_is(tmp_path, state, name):
    path = tmp_path / name
    for save in (safetensors.torch.save_file, torch.save):
        save(state, path)
        assert same(checkpoint.read(path), state)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (gzip.compress(b"x" * 99, mtime=0), "a gzip archive: unpack it"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "a pointer of Git LFS: run `git lfs pull`"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file"),
        (b"\n<!DOCTYPE html><html>not found</html>", "a web page, or other text with tags: download"),
        (b'{"error": "not found"}', "text: name the file"),
    ],
)
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors", "w.tar"])
def test_what_is_no_checkpoint_is_named_by_its_content(tmp_path, content, said, name):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(MicrotomeError, match=re.escape(f"cannot be read: it is {said}")):
        checkpoint.read(path)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch.jit
def test_archives_and_programs_are_named(tmp_path, state):
    inner = write(tmp_path / "w.pt", state)
    with tarfile.open(tmp_path / "w.tar", "w") as archive:
        archive.add(inner, "w.pt")
    with pytest.raises(MicrotomeError, match=r"w\.tar .*it is a tar archive: unpack it"):
        checkpoint.read(tmp_path / "w.tar")
    torch.jit.trace(network().eval(), torch.zeros(1, 3, 5, 5)).save(tmp_path / "program.pt")
    with pytest.raises(MicrotomeError, match=r"program\.pt is refused: it is a TorchScript program"):
        checkpoint.read(tmp_path / "program.pt")


def test_options_of_a_script_beside_the_weights_are_no_obstacle(tmp_path, state):
    path = write(tmp_path / "w.pt", {"model": state, "args": argparse.Namespace(lr=0.1, arch="net"), "epoch": 3})
    assert same(checkpoint.read(path), state)


def doubled(state, by=2.0):
    return {key: value * by if value.is_floating_point() else value for key, value in state.items()}


@pytest.mark.parametrize("entry", ["net", "network", "weights", "ema"])
def test_the_only_entry_with_weights_is_read_whatever_its_name(tmp_path, state, entry):
    path = write(tmp_path / "w.pt", {entry: state, "metrics": {"accuracy": torch.tensor(0.9)}, "epoch": 3})
    assert same(checkpoint.read(path), state)
    assert same(checkpoint.read(path, within=entry), state)
    assert not [*checkpoint.notices(path)]


def test_averaged_weights_beside_raw_ones_are_said_and_can_be_taken(tmp_path, state):
    ema = doubled(state)
    path = write(tmp_path / "w.pt", {"model": state, "model_ema": ema, "scaler": {"scale": torch.ones(1)}})
    assert same(checkpoint.read(path), state)
    assert same(checkpoint.read(path, within="model_ema"), ema)
    (said,) = checkpoint.notices(path)
    assert "also holds weights of the same network under `model_ema`; `model` is taken" in said
    assert "set `within: model_ema`" in said
    (said,) = checkpoint.notices(path, within="model_ema")
    assert "under `model`; `model_ema` is taken" in said
    averaged = {"module." + key: value for key, value in ema.items()} | {"n_averaged": torch.tensor(3)}
    path = write(tmp_path / "swa.pt", {"state_dict": state, "swa": {"state_dict": averaged, "start": 3}})
    (said,) = checkpoint.notices(path)
    assert "set `within: swa/state_dict`" in said
    assert same(checkpoint.read(path, within="swa/state_dict", prefix="module."), ema)
    assert same(checkpoint.read(path, within="swa", prefix="module."), ema)
    assert len([*checkpoint.notices(path, within="swa", prefix="module.")]) == 2


def test_a_teacher_and_a_student_are_asked_for(tmp_path, state):
    def whole(by):
        return {f"backbone.{key}": value for key, value in doubled(state, by).items()} | {"head.w": torch.ones(2)}

    path = write(tmp_path / "w.pt", {"teacher": whole(2.0), "student": whole(3.0), "optimizer": {"state": {}}})
    with pytest.raises(MicrotomeError, match=r"several networks \(teacher, student\).*`within: teacher`"):
        checkpoint.read(path)
    for name, by in (("teacher", 2.0), ("student", 3.0)):
        assert same(checkpoint.read(path, within=name, prefix="backbone."), doubled(state, by))
    with pytest.raises(MicrotomeError, match=r"no entry 'teacer' .*nearest: teacher"):
        checkpoint.read(path, within="teacer")
    with pytest.raises(MicrotomeError, match=r"no entry 'x' under 'teacher'"):
        checkpoint.read(path, within="teacher/x")
    with pytest.raises(MicrotomeError, match=r"holds a mapping .* under 'optimizer'"):
        checkpoint.read(path, within="optimizer")


def test_a_lightning_module_with_a_criterion(tmp_path, state):
    module = {f"model.{key}": value for key, value in state.items()} | {"criterion.weight": torch.ones(4)}
    path = write(tmp_path / "last.ckpt", {"state_dict": module, "pytorch-lightning_version": "2.5", "epoch": 1})
    with pytest.raises(MicrotomeError, match=r"does not fit .* set `prefix: 'model\.'`"):
        load_file(network(), path)
    assert same(checkpoint.read(path, prefix="model."), state)
    (said,) = checkpoint.notices(path, prefix="model.")
    assert "1 of 8 keys lack the prefix 'model.' and are left out (criterion.weight)" in said
    flat = {f"{name}.{key}": value for name in ("student", "teacher") for key, value in state.items()}
    with pytest.raises(MicrotomeError, match=r"set `prefix: 'student\.' or 'teacher\.'`"):
        load_file(network(), write(tmp_path / "flat.ckpt", {"state_dict": flat}))
    one_short = {key: value for key, value in module.items() if key != "model.1.bias"}
    with pytest.raises(MicrotomeError, match=r"1 keys missing \(1\.bias\)"):
        checkpoint.load_state(network(), checkpoint.read(write(path, {"state_dict": one_short}), "model."), path)


@pytest.mark.parametrize("entry", ["state_dict", "model_state_dict", "model"])
def test_reads_the_entry_of_a_training_checkpoint(tmp_path, state, entry):
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]}
    path = write(tmp_path / "w.pt", {entry: state, "optimizer": optimizer, "epoch": 3})
    assert same(checkpoint.read(path), state)


def test_several_networks_in_one_file_are_refused(tmp_path, state):
    path = write(tmp_path / "w.pt", {"model": state, "state_dict": state})
    with pytest.raises(MicrotomeError, match=r"w\.pt holds several networks \(state_dict, model\)"):
        checkpoint.read(path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_shapes_reads_no_values(tmp_path, state, suffix):
    state = {**state, "half": torch.zeros(2, dtype=torch.bfloat16)}
    shapes = checkpoint.shapes(write(tmp_path / f"w{suffix}", state))
    assert all(tensor.is_meta for tensor in shapes.values())
    described = {key: (tensor.shape, tensor.dtype) for key, tensor in shapes.items()}
    assert described == {key: (tensor.shape, tensor.dtype) for key, tensor in state.items()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_types_are_cast(tmp_path, state, dtype):
    cast = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    loaded = network()
    load_file(loaded, write(tmp_path / "w.pt", cast))
    assert loaded[0].weight.dtype == torch.float32
    assert torch.equal(loaded[0].weight, cast["0.weight"].float())


def test_batch_counters_may_be_missing(tmp_path, state):
    del state["1.num_batches_tracked"]
    load_file(network(), write(tmp_path / "w.pt", dict(state)))


def test_prefix(tmp_path, state):
    path = write(tmp_path / "w.pt", {f"module.{key}": value for key, value in state.items()})
    assert same(checkpoint.read(path, prefix="module."), state)
    assert list(checkpoint.shapes(path, prefix="module.")) == list(state)
    with pytest.raises(MicrotomeError, match=r"7 of 7 keys do not start with the prefix 'model\.'"):
        checkpoint.read(path, prefix="model.")
    with pytest.raises(MicrotomeError, match=r"does not fit .* set `prefix: 'module\.'`"):
        load_file(network(), path)
    mixed = {**{f"module.{key}": value for key, value in state.items()}, "step": torch.tensor(1)}
    path = write(tmp_path / "mixed.pt", mixed)
    assert same(checkpoint.read(path, prefix="module."), state)
    assert [*checkpoint.notices(path, prefix="module.")] == [
        f"checkpoint {path}: 1 of 8 keys lack the prefix 'module.' and are left out (step)"
    ]


def test_misfits_are_listed_and_nothing_is_loaded(tmp_path, state):
    state["0.wieght"] = state.pop("0.weight")
    state["1.bias"] = torch.zeros(5)
    path = write(tmp_path / "w.pt", dict(state))
    with pytest.raises(MicrotomeError) as error:
        load_file(network(), path)
    said = str(error.value)
    assert str(path) in said
    assert "1 keys missing (0.weight)" in said
    assert "1 keys too many (0.wieght); nearest: 0.weight" in said
    assert "1 of another shape (1.bias (5,), expected (4,))" in said


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.zeros(4, 3, 3, 3, dtype=torch.complex64), r"'0\.weight' is (torch\.complex64|C64)"),
        (torch.zeros(4, 3, 3, 3, dtype=torch.int8), r"'0\.weight' is torch\.int8, the network expects torch\.float32"),
        (torch.zeros(4, 3, 3, 3, dtype=torch.float8_e4m3fn), r"'0\.weight' is (torch\.float8_e4m3fn|F8_E4M3)"),
        (torch.full((4, 3, 3, 3), torch.inf), r"108 of 108 values of '0\.weight' are NaN or infinite"),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_values_that_are_refused(tmp_path, state, value, said, suffix):
    state["0.weight"] = value
    path = write(tmp_path / f"w{suffix}", dict(state))
    with pytest.raises(MicrotomeError, match=rf"{path.name}: {said}"):
        load_file(network(), path)


def test_one_nan_is_found(tmp_path, state):
    state["1.running_var"][2] = torch.nan
    with pytest.raises(MicrotomeError, match=r"1 of 4 values of '1\.running_var'"):
        checkpoint.read(write(tmp_path / "w.pt", state))


class Harmful:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_pickled_code_is_refused_and_not_executed(tmp_path, state):
    target = tmp_path / "executed"
    zipped, old, plain = tmp_path / "zip.pt", tmp_path / "old.pth", tmp_path / "plain.pt"
    torch.save({**state, "x": Harmful(target)}, zipped)
    torch.save({**state, "x": Harmful(target)}, old, _use_new_zipfile_serialization=False)
    plain.write_bytes(pickle.dumps(Harmful(target)))
    for path in (zipped, old, plain):
        for read in (checkpoint.read, checkpoint.shapes):
            with pytest.raises(MicrotomeError, match=rf"{path.name}\b"):
                read(path)
    for path in (zipped, old):
        with pytest.raises(MicrotomeError, match=r"refused: it holds pickled objects .*mkdir.* nothing was executed"):
            checkpoint.read(path)
    assert not target.exists()
    renamed = tmp_path / "w.safetensors"
    renamed.write_bytes(zipped.read_bytes())
    with pytest.raises(MicrotomeError, match=r"w\.safetensors is refused: it holds pickled objects"):
        checkpoint.read(renamed)


def test_whole_networks_are_refused(tmp_path):
    path = tmp_path / "network.pt"
    torch.save(network(), path)
    with pytest.raises(MicrotomeError, match=r"network\.pt is refused: it holds pickled objects .*Sequential"):
        checkpoint.read(path)


@pytest.mark.parametrize(
    ("content", "held"),
    [
        ([1, 2], "a list"),
        ({}, "an empty mapping"),
        ({"epoch": 3, "weights": {"a": 1}}, "a mapping with the entries 'epoch', 'weights'"),
        (torch.zeros(3), "a Tensor"),
        (collections.OrderedDict({1: torch.zeros(1)}), "a mapping with the entries '1'"),
    ],
)
def test_other_content_is_refused(tmp_path, content, held):
    with pytest.raises(MicrotomeError, match=rf"w\.pt holds {held}; expected tensors by name"):
        checkpoint.read(write(tmp_path / "w.pt", content))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_truncated_files_are_refused(tmp_path, state, suffix, share):
    path = write(tmp_path / f"w{suffix}", dict(state))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    for read in (checkpoint.read, checkpoint.shapes):
        with pytest.raises(MicrotomeError, match=rf"w{suffix} .*cannot be read: truncated"):
            read(path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_that_are_no_checkpoints(tmp_path, state, suffix):
    path = tmp_path / f"w{suffix}"
    with pytest.raises(MicrotomeError, match=rf"w{suffix} does not exist"):
        checkpoint.read(path)
    path.touch()
    with pytest.raises(MicrotomeError, match=r"is empty \(0 bytes\)"):
        checkpoint.read(path)
    path.write_text("<!DOCTYPE html><html>not found</html>")
    with pytest.raises(MicrotomeError, match=r"cannot be read"):
        checkpoint.read(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "hello")
    with pytest.raises(MicrotomeError, match=r"cannot be read"):
        checkpoint.read(path)
    with pytest.raises(MicrotomeError, match=r"is not a file"):
        checkpoint.read(tmp_path)
    write(tmp_path / "resnet20.pt", state)
    with pytest.raises(MicrotomeError, match=r"does not exist; nearest: resnet20\.pt"):
        checkpoint.sha256(tmp_path / "resnet2.pt")


def test_written_files_are_whole_and_reproducible(tmp_path, state):
    state["0.weight"] = state["0.weight"].to(memory_format=torch.channels_last)
    state["tied"] = state["0.weight"]
    facts = {str(i): i for i in range(20)}
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    checkpoint.write_safetensors(one, state, facts)
    checkpoint.write_safetensors(other, dict(reversed(state.items())), dict(reversed(facts.items())))
    assert one.read_bytes() == other.read_bytes()
    assert checkpoint.sha256(one) == checkpoint.sha256(other)
    assert same(dict(sorted(checkpoint.read(one).items())), dict(sorted(state.items())))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.safetensors", "other.safetensors"]


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path, state):
    path = tmp_path / "w.safetensors"
    checkpoint.write_safetensors(path, state)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        checkpoint.write_safetensors(path, state, {"accuracy": float("nan")})
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize("length", [128, 384, 640])
def test_a_header_whose_length_begins_like_a_pickle_is_that_of_safetensors(tmp_path, length):
    from safetensors.torch import load_file, save_file

    path, name = tmp_path / "w.safetensors", "w"
    for pad in range(2000):
        save_file({name: torch.ones(2)}, path, {"pad": "x" * pad})
        if int.from_bytes(path.read_bytes()[:8], "little") == length:
            break
    assert path.read_bytes()[:1] == b"\x80"
    assert torch.equal(checkpoint.read(path)[name], load_file(path)[name])
    assert torch.equal(checkpoint.read(path.rename(tmp_path / "w.pt"))[name], torch.ones(2))
