"""Published weights by name: found, checked, explained; with files laid out as the libraries' caches hold them."""

import hashlib
import json
import re
import sys
from pathlib import Path

import experiments
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from pipeline.config.networks import Network, NetworkSpec
from pipeline.errors import MicrotomeError
from pipeline.networks import published
from pipeline.networks.build import build, load
from pipeline.networks.published import Published
from pipeline.run import experiment, planner
from pipeline.stages.network import stage as network
from pipeline.storage.identity import FileDigests

WEIGHTS = "SqueezeNet1_1_Weights.IMAGENET1K_V1"
HALVES = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
HF_TINY = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
TINY = {"depth": 1, "embed_dim": 16, "num_heads": 2, "img_size": 32, "patch_size": 8, "num_classes": 1000}


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """Empty caches of torch and of the hub, and no connection."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "torch/hub/checkpoints").mkdir(parents=True)


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """Libraries are asked in this process, which has imported them; the requests are noted."""
    requests = []

    def ask(wanted):
        requests.extend(request.action for request in wanted.values())
        answers = published.answer([request.model_dump() for request in wanted.values()])
        return dict(zip(wanted, answers, strict=True))

    monkeypatch.setattr(published, "_ask", ask)
    return requests


def look_up(tmp_path, **spec):
    """The network made explicit and what is stated of it, or the error."""
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    found, errors = published.look_up({"net": NetworkSpec(**spec)}, scratch, FileDigests(scratch / "files.json"))
    return found["net"] if found else errors["net"]


def squeezenet():
    return build(NetworkSpec(torchvision="squeezenet1_1", seed=5)).state_dict()


def publish(monkeypatch, path, state):
    """Let torchvision publish `state` as its SqueezeNet 1.1, with the digest of the file in its name."""
    from torchvision.models import SqueezeNet1_1_Weights

    torch.save(state, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    name = f"squeezenet1_1-{digest[:8]}.pth"
    entry = SqueezeNet1_1_Weights.IMAGENET1K_V1
    monkeypatch.setattr(
        entry, "_value_", type(entry.value)(f"{path.parent.as_uri()}/{name}", entry.transforms, entry.meta)
    )
    return path.with_name(name)


# torchvision


@pytest.mark.parametrize("name", ["DEFAULT", "IMAGENET1K_V1", WEIGHTS])
def test_torchvision_names_are_files_of_its_cache(tmp_path, monkeypatch, name):
    state = squeezenet()
    named = publish(monkeypatch, tmp_path / "any.pth", state)
    kept = published.torch_cache() / named.name
    (tmp_path / "any.pth").rename(kept)
    spec, stated = look_up(tmp_path, torchvision="squeezenet1_1", weights=name)
    assert (spec.weights, spec.local, spec.arguments) == (WEIGHTS, str(kept), {"num_classes": 1000})
    assert (stated.mean, stated.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (stated.size, stated.resize) == ((224, 224), 256)
    loaded = load(spec).state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


def test_the_file_has_to_be_the_published_one(tmp_path, monkeypatch):
    named = publish(monkeypatch, tmp_path / "any.pth", squeezenet())
    kept = published.torch_cache() / named.name
    wanted = {"torchvision": "squeezenet1_1", "weights": "DEFAULT"}
    said = look_up(tmp_path, **wanted)
    for part in (WEIGHTS, str(kept), "does not exist", "give its path as `local`", "set `download: true`"):
        assert part in said
    torch.save({key: tensor + 1 for key, tensor in squeezenet().items()}, kept)
    assert f"{kept} is not the file published as {WEIGHTS}: its sha256 is" in look_up(tmp_path, **wanted)
    spec, _ = look_up(tmp_path, **wanted, local=str(tmp_path / "any.pth"))
    assert spec.local == str(tmp_path / "any.pth")
    assert "does not exist" in look_up(tmp_path, **wanted, local=str(tmp_path / "none.pth"))


def test_download_is_torchvisions_own_and_checks_the_digest(tmp_path, monkeypatch):
    named = publish(monkeypatch, tmp_path / "any.pth", squeezenet())
    wanted = {"torchvision": "squeezenet1_1", "weights": "DEFAULT", "download": True}
    said = look_up(tmp_path, **wanted)
    assert "cannot be fetched (" in said and "give a copy as `local`" in said
    (tmp_path / "any.pth").rename(named)
    spec, _ = look_up(tmp_path, **wanted)
    assert spec.local == str(published.torch_cache() / named.name)
    Path(spec.local).unlink()
    named.write_bytes(named.read_bytes()[:-1] + b"!")
    assert "invalid hash value" in look_up(tmp_path, **wanted)
    assert not list(published.torch_cache().iterdir())


def test_nothing_pickled_in_a_published_file_is_run(tmp_path, monkeypatch):
    class Payload:
        def __reduce__(self):
            return open, (str(tmp_path / "executed"), "w")

    publish(monkeypatch, tmp_path / "any.pth", {"features.0.weight": Payload()})
    spec, _ = look_up(tmp_path, torchvision="squeezenet1_1", weights="DEFAULT", local=str(tmp_path / "any.pth"))
    with pytest.raises(MicrotomeError, match="is refused: it holds pickled objects"):
        load(spec)
    assert not (tmp_path / "executed").exists()


def test_keys_that_only_torchvision_translates(tmp_path):
    """Its DenseNets were published with a dot in the names of layers."""
    path = tmp_path / "densenet.pth"
    state = build(NetworkSpec(torchvision="densenet121", seed=4)).state_dict()
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", key): tensor
        for key, tensor in state.items()
        if not key.endswith("num_batches_tracked")
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, path)
    loaded = load(NetworkSpec(torchvision="densenet121", weights="DEFAULT", local=str(path))).state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_b_16", {"num_classes": 1000, "image_size": 384}),
        ("googlenet", {"num_classes": 1000, "transform_input": True, "aux_logits": True, "init_weights": False}),
        ("fcn_resnet50", {"num_classes": 21, "aux_loss": True}),
        ("maxvit_t", {"num_classes": 1000, "input_size": [224, 224]}),
    ],
)
def test_weights_imply_arguments_so_that_the_control_is_built_alike(name, arguments):
    weights = "IMAGENET1K_SWAG_E2E_V1" if name == "vit_b_16" else "DEFAULT"
    from pipeline.networks.libraries import of_torchvision

    spec = NetworkSpec(torchvision=name, weights=weights)
    stated = of_torchvision.describe(spec)
    assert stated.arguments == arguments
    # torchvision's own builder, given these weights, makes a network of the same state and settings.
    plain = build(NetworkSpec(torchvision=name, arguments=stated.arguments), "meta")
    shapes = {key: tensor.to("meta") for key, tensor in plain.state_dict().items()}
    with torch.device("meta"), of_torchvision._reading(lambda: shapes), pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        own = of_torchvision._function(spec)(weights=of_torchvision._weights(spec))
    transform = getattr(own, "transform_input", None)
    assert transform == getattr(plain, "transform_input", None)
    assert {k for k in own.state_dict() if "aux" not in k} == {k for k in shapes if "aux" not in k}


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"torchvision": "resnet50", "weights": "IMAGENET1K_V3"}, r"nearest: IMAGENET1K_V\d.*ResNet50_Weights"),
        ({"torchvision": "resnet50", "weights": "ResNet18_Weights.DEFAULT"}, "has no published weights 'ResNet18_Wei"),
        ({"torchvision": "mnasnet9_9", "weights": "DEFAULT"}, "is not in torchvision .*; nearest: mnasnet"),
        ({"timm": "vit_smal_patch16_224", "weights": "random"}, "is not in timm .*; nearest: vit_small_patch16_224"),
        ({"timm": "resnet50.a1_in1l", "weights": "pretrained"}, "has no tag 'a1_in1l'; nearest: resnet50.a1_in1k"),
        ({"timm": "resnet50", "weights": "random", "arguments": {"pretrained": True}}, "would read weights"),
        ({"timm": "vit_tiny_patch16_224", "weights": "pretrained"}, "model.safetensors or pytorch_model.bin of timm/"),
        ({"timm": "vit_tiny_patch16_224", "weights": "pretrained", "download": True}, "cannot be fetched"),
        ({"transformers": "nobody/nothing", "weights": "random"}, "neither a folder nor, as a whole, in the cache"),
        ({"transformers": "no where", "weights": "pretrained"}, "neither a folder"),
        ({"transformers": "nobody/nothing", "weights": "pretrained", "download": True}, "cannot be fetched"),
    ],
)
def test_what_cannot_be_found_is_told(tmp_path, spec, said):
    told = look_up(tmp_path, **spec)
    assert isinstance(told, str) and re.search(said, told), told


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"torchvision": "resnet18", "weights": "pretrained"}, "give `weights: DEFAULT`"),
        ({"module": "a.py:f", "weights": "pretrained"}, "a module has no published weights"),
        ({"timm": "resnet18", "weights": "pretrained", "prefix": "module."}, "`prefix` is for a checkpoint"),
        ({"timm": "resnet18", "weights": "w.pt", "local": "w.pt"}, "`local` goes with published weights"),
        ({"timm": "resnet18", "transformers": "folder"}, "exactly one of"),
    ],
)
def test_descriptions_that_contradict_themselves(spec, said):
    with pytest.raises(ValidationError, match=said):
        NetworkSpec(**spec)


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_a_library_that_is_not_installed(tmp_path, monkeypatch, library):
    def version(name):
        raise published.PackageNotFoundError(name)

    monkeypatch.setattr(published, "version", version)
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"pipeline.networks.libraries.of_{library}", raising=False)
    spec = {library: "some/thing", "weights": "random"}
    assert f"pip install '.[{library}]'" in look_up(tmp_path, **spec)
    with pytest.raises(MicrotomeError, match=f"{library} is not installed"):
        build(NetworkSpec(**spec))


# timm


def hub(tmp_path, repository, **files):
    """A snapshot as the hub's cache lays it out; the values write the files."""
    base = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
    snapshot = base / "snapshots" / ("ab" * 20)
    snapshot.mkdir(parents=True)
    (base / "refs").mkdir()
    (base / "refs/main").write_text("ab" * 20)
    for name, write in files.items():
        write(snapshot / name.replace("__", "."))
    return snapshot


def test_timm_finds_its_file_in_the_cache_of_the_hub(tmp_path):
    state = build(NetworkSpec(timm="vit_tiny_patch16_224", arguments=TINY, seed=3)).state_dict()
    snapshot = hub(
        tmp_path,
        "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k",
        model__safetensors=lambda path: save_file(state, path),
    )
    wanted = {"timm": "vit_tiny_patch16_224", "weights": "pretrained", "arguments": TINY}
    spec, stated = look_up(tmp_path, **wanted)
    assert spec.local == str(snapshot / "model.safetensors")
    assert (stated.mean, stated.std, stated.size) == ((0.5,) * 3, (0.5,) * 3, (224, 224))
    loaded = load(spec).state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in state)
    headless = load(spec.model_copy(update={"arguments": TINY | {"num_classes": 0}}))
    assert torch.equal(headless.blocks[0].mlp.fc1.weight, state["blocks.0.mlp.fc1.weight"])
    assert "head.weight" not in headless.state_dict()
    with pytest.raises(MicrotomeError, match="num_classes is 7, its published weights have 1000 classes"):
        load(spec.model_copy(update={"arguments": TINY | {"num_classes": 7}}))
    with pytest.raises(MicrotomeError, match=r"Missing key\(s\)|size mismatch"):
        load(spec.model_copy(update={"arguments": TINY | {"depth": 2}}))


def test_timm_translates_what_others_published(tmp_path):
    """Its own filter renames the keys of Facebook's ConvNeXt files; a plain checkpoint is taken as it is."""
    arguments = {"depths": [1, 1, 1, 1], "dims": [4, 4, 4, 4]}
    network = build(NetworkSpec(timm="convnext_tiny", arguments=arguments, seed=3)).state_dict()
    renamed = {}
    for key, tensor in network.items():
        old = key.replace("stem.0", "downsample_layers.0.0").replace("stem.1", "downsample_layers.0.1")
        for stage in range(4):
            old = old.replace(f"stages.{stage}.downsample", f"downsample_layers.{stage}")
            old = old.replace(f"stages.{stage}.blocks", f"stages.{stage}")
        old = old.replace("conv_dw", "dwconv").replace("mlp.fc1", "pwconv1").replace("mlp.fc2", "pwconv2")
        renamed[old.replace("head.fc", "head").replace("head.norm", "norm")] = tensor
    torch.save({"model": renamed}, tmp_path / "facebook.pth")
    spec = NetworkSpec(
        timm="convnext_tiny.fb_in1k", arguments=arguments, weights="pretrained", local=str(tmp_path / "facebook.pth")
    )
    loaded = load(spec).state_dict()
    assert all(torch.equal(loaded[key], network[key]) for key in network)
    with pytest.raises(MicrotomeError, match=r"does not fit the network: .* keys missing"):
        load(NetworkSpec(timm="convnext_tiny", arguments=arguments, weights=str(tmp_path / "facebook.pth")))


# transformers


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory):
    return transformers_folder(tmp_path_factory.mktemp("vit"))


def transformers_folder(folder, kind="ViTForImageClassification", **settings):
    """A model of five classes with random weights, as `save_pretrained` lays it out, in half precision."""
    import transformers

    model = getattr(transformers, kind)
    settings = model.config_class(**(settings or HF_TINY), num_labels=5)
    torch.manual_seed(0)
    state = model(settings).half().state_dict()
    said = settings.to_dict() | {"architectures": [kind]}
    (folder / "config.json").write_text(json.dumps(said))
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / "model.safetensors")
    processor = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def copy_of(folder, tmp_path, **changes):
    """The folder again, with entries of config.json changed."""
    other = tmp_path / "copy"
    other.mkdir()
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    said = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(said | changes))
    return other


def test_a_folder_of_transformers(tmp_path, vit_folder):
    from safetensors.torch import load_file

    spec, stated = look_up(tmp_path, transformers=str(vit_folder), weights="pretrained")
    assert (stated.mean, stated.std, stated.size) == ((0.5,) * 3, (0.25,) * 3, (32, 32))
    network, saved = load(spec), load_file(vit_folder / "model.safetensors")
    state = network.state_dict()
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert all(torch.equal(state[key], saved[key].float()) for key in saved)
    fresh = spec.model_copy(update={"weights": "random"})
    assert not torch.equal(build(fresh).state_dict()["classifier.weight"], state["classifier.weight"])
    assert look_up(tmp_path, transformers=str(vit_folder), weights="random")[0].local == str(vit_folder)


def test_a_snapshot_of_the_hub(tmp_path, vit_folder):
    def copy(name):
        return lambda path: path.write_bytes((vit_folder / name).read_bytes())

    snapshot = hub(tmp_path, "someone/vit", config__json=copy("config.json"))
    assert look_up(tmp_path, transformers="someone/vit", weights="random")[0].local == str(snapshot)
    assert "as a whole" in look_up(tmp_path, transformers="someone/vit", weights="pretrained")
    copy("model.safetensors")(snapshot / "model.safetensors")
    assert look_up(tmp_path, transformers="someone/vit", weights="pretrained")[0].local == str(snapshot)


def test_weights_in_parts_and_as_torch_saves_them(tmp_path, vit_folder):
    from safetensors.torch import load_file

    folder = copy_of(vit_folder, tmp_path)
    saved = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(saved, folder / "pytorch_model.bin")
    spec = NetworkSpec(transformers=str(folder), local=str(folder), weights="pretrained")
    whole = load(spec).state_dict()
    (folder / "pytorch_model.bin").unlink()
    half = dict(list(saved.items())[:5])
    save_file(half, folder / "a.safetensors")
    save_file({key: saved[key] for key in saved if key not in half}, folder / "b.safetensors")
    parts = {key: "a.safetensors" if key in half else "b.safetensors" for key in saved}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": parts}))
    assert all(torch.equal(whole[key], tensor) for key, tensor in load(spec).state_dict().items())
    index.write_text(json.dumps({"weight_map": {"x": "../outside.safetensors"}}))
    with pytest.raises(MicrotomeError, match=r"names '\.\./outside\.safetensors' as a file of weights"):
        load(spec)


@pytest.mark.parametrize(
    ("changes", "arguments", "said"),
    [
        ({"id2label": {str(i): str(i) for i in range(7)}}, {}, r"of another shape \(classifier"),
        ({"num_hidden_layers": 2}, {}, r"16 keys missing \(vit\.layers\.1"),
        ({"architectures": ["ViTModel"]}, {}, "keys missing .*set `arguments: {add_pooling_layer: false}`"),
        ({}, {"architectures": ["ViTModel"], "add_pooling_layer": False}, None),
        ({}, {"hidden_sizes": 3}, "'hidden_sizes' is no entry .*; nearest: hidden_size"),
        ({"architectures": ["MyOwnViT"]}, {}, "'MyOwnViT' is no model of transformers"),
        ({"architectures": ["AutoModel"]}, {}, "is no model of transformers"),
        ({"architectures": None}, {}, "names no single model"),
        ({"architectures": ["CLIPModel"]}, {}, "takes input_ids, expected a model of images"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "evil.MyConfig"}}, {}, "is not a configuration that"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, {}, "quantised weights are not supported"),
        ({"_attn_implementation": "someone/kernel", "attn_implementation": "someone/kernel"}, {}, None),
    ],
)
def test_folders_that_do_not_fit(tmp_path, vit_folder, changes, arguments, said):
    """A configuration is data: code beside it is not imported, and kernels that it names are not fetched."""
    folder = copy_of(vit_folder, tmp_path, **changes)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    spec = NetworkSpec(transformers=str(folder), local=str(folder), weights="pretrained", arguments=arguments)
    if said is None:
        assert load(spec).config._attn_implementation == "sdpa"
    else:
        with pytest.raises(MicrotomeError, match=said):
            load(spec)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("said", "mean", "std", "size"),
    [
        ({"do_normalize": False}, (0, 0, 0), (1, 1, 1), None),
        (HALVES | {"rescale_factor": 1 / 127.5}, (0.25,) * 3, (0.25,) * 3, None),
        (HALVES | {"do_rescale": False}, (0.5 / 255,) * 3, (0.5 / 255,) * 3, None),
        ({"image_processor": {"image_mean": [0.1] * 3, "size": 48}}, (0.1,) * 3, None, (48, 48)),
        ({"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 24}}, None, None, (32, 24)),
    ],
)  # fmt: skip
def test_what_a_folder_says_of_images(tmp_path, said, mean, std, size):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    stated = published._of_folder(tmp_path)
    assert stated.mean == (mean and pytest.approx(mean))
    assert stated.std == (std and pytest.approx(std))
    assert stated.size == size


def test_blue_green_red_is_refused(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text('{"do_flip_channel_order": true}')
    with pytest.raises(MicrotomeError, match="expects blue, green, red"):
        published._of_folder(tmp_path)


# in a configuration


def resolved(tmp_path, **spec):
    raw = experiments.scenes(tmp_path, networks={"net": spec})
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    made = published.resolve(experiment.parse(raw), scratch, FileDigests(scratch / "files.json"))
    return made.networks["net"]


def test_means_that_are_not_given_are_those_published(tmp_path, vit_folder, capsys):
    wanted = {"transformers": str(vit_folder), "weights": "pretrained"}
    found = resolved(tmp_path, **wanted).preprocessing
    assert (found.mean, found.std) == ((0.5,) * 3, (0.25,) * 3)
    assert not capsys.readouterr().err
    found = resolved(tmp_path, **wanted, preprocessing={"mean": [0.5, 0.5, 0.4]}).preprocessing
    assert (found.mean, found.std) == ((0.5, 0.5, 0.4), (0.25,) * 3)
    assert (
        "'net': preprocessing.mean is [0.5, 0.5, 0.4], transformers states [0.5, 0.5, 0.5]" in capsys.readouterr().err
    )


def test_a_resolved_configuration_resolves_to_itself(tmp_path, vit_folder, capsys, asked):
    wanted = {"timm": "vit_tiny_patch16_224", "weights": "random", "arguments": TINY}
    once = resolved(tmp_path, **wanted)
    assert once.preprocessing.mean == (0.5, 0.5, 0.5)
    assert resolved(tmp_path, **once.model_dump()) == once
    assert asked == ["describe"]  # the second time from memory
    assert not capsys.readouterr().err


def test_grey_networks_of_a_library_need_their_statistics(tmp_path):
    wanted = {"timm": "resnet18", "weights": "random", "arguments": {"in_chans": 1}}
    with pytest.raises(MicrotomeError, match="network 'net': takes grey images: give one number each"):
        resolved(tmp_path, **wanted)
    assert resolved(tmp_path, **wanted, preprocessing={"mean": [0.5], "std": [0.2]}).preprocessing.channels == 1


def test_ids_follow_the_bytes_and_the_configuration(tmp_path, vit_folder):
    digests = FileDigests(tmp_path / "files.json")
    folder = copy_of(vit_folder, tmp_path)

    def settings():
        spec = Network(transformers=str(folder), local=str(folder), weights="pretrained")
        return json.dumps(network.settings_of(spec, digests).written())

    first = settings()
    assert str(tmp_path) not in first
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | {"layer_norm_eps": 1e-5}))
    second = settings()
    assert second != first
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes() + b" ")
    assert settings() not in (first, second)


def test_the_control_of_a_published_network(tmp_path, vit_folder):
    raw = experiments.scenes(
        tmp_path, networks={"net": {"transformers": str(vit_folder), "weights": "pretrained", "datasets": ["scenes"]}}
    )
    made = planner.make(experiment.parse(raw))
    control = made.networks["net-untrained"]
    assert (control.weights, control.local, control.preprocessing.mean) == ("random", str(vit_folder), (0.5,) * 3)
    again = planner.read(planner.save(made))
    assert again.steps == made.steps


def test_advice_where_images_have_another_size(tmp_path, vit_folder):
    found = resolved(tmp_path, transformers=str(vit_folder), weights="pretrained")
    assert published.advice(found, (32, 32), tmp_path / "scratch") is None
    assert "images are 16x16, the weights pretrained of" in published.advice(found, (16, 16), tmp_path / "scratch")


def test_the_command(tmp_path, monkeypatch):
    """In a process of its own, as the main process asks."""
    monkeypatch.undo()
    request = published.Request(action="describe", network=NetworkSpec(torchvision="alexnet", weights="DEFAULT"))
    told = published._ask({"net": request})["net"]["result"]
    assert Published.model_validate(told).file == "alexnet-owt-7be5be79.pth"


def test_everything_wrong_is_told_at_once(tmp_path):
    wrong = {
        "a": {"timm": "vit_smal_patch16_224", "weights": "random"},
        "b": {"torchvision": "alexnet", "weights": "DEFAULT"},
        "c": {"transformers": "no/where", "weights": "pretrained"},
    }
    with pytest.raises(MicrotomeError) as told:
        planner.make(experiment.parse(experiments.scenes(tmp_path, networks=wrong)))
    for part in (
        "network 'a': network 'vit_smal",
        "network 'b': weights AlexNet_Weights.",
        "network 'c': 'no/where' is",
    ):
        assert part in str(told.value)
