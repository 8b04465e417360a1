"""Networks as experts: a density and a denoiser against the closed-form Gaussian, their ids, and what is refused."""

import re

import numpy as np
import pytest
import torch
from experiments import run, tiny
from visualizations import experiment

from kernels.visualization.priors import Spectrum
from pipeline.config.networks import Expert, Network
from pipeline.errors import MicrotomeError
from pipeline.networks import experts
from pipeline.networks.build import load
from pipeline.networks.checkpoint import sha256
from pipeline.networks.experts import Likelihood
from pipeline.networks.layers import resolve
from pipeline.run import experiment as run_experiment
from pipeline.run import planner
from pipeline.stages.visualize.climbing import RIDGE, Climb
from pipeline.stages.visualize.settings import Maximise
from pipeline.stages.visualize.subject import Strongest
from pipeline.storage.identity import FileDigests

SIZE = (3, 16, 16)
NETWORKS = """
import torch
from torch import nn


class Gaussian(nn.Module):
    '''log p of the Gaussian with a mean and a precision of each frequency, written as a sum over frequencies.'''

    def __init__(self, columns=9):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3, 16, 16))
        self.register_buffer("precision", torch.zeros(16, columns, 3, 3, 2))

    def forward(self, x):
        made = torch.fft.rfft2((x + 1) / 2 - self.mean, norm="ortho").permute(0, 2, 3, 1)
        energy = (made.conj() * (torch.view_as_complex(self.precision) @ made[..., None])[..., 0]).sum(3).real
        twice = torch.full((9,), 2.0)
        twice[[0, -1]] = 1
        return -0.5 * (energy * twice).sum((1, 2))


class Shrink(nn.Module):
    '''The best guess of what images of one colour with noise of deviation 1 were before noise of deviation 0.5.'''

    def __init__(self):
        super().__init__()
        self.colour = nn.Parameter(torch.zeros(3, 1, 1))

    def forward(self, x):
        return x + 0.25 / 1.25 * (self.colour - x)


class Distance(Shrink):
    def forward(self, x):
        return -0.5 / 1.25 * (x - self.colour).square().sum((1, 2, 3))


class Pixels(Shrink):
    def forward(self, x):
        return x.sum(1)


class Together(Shrink):
    def forward(self, x):
        return (x - x.mean(0)).square().sum((1, 2, 3))


class Rounded(Shrink):
    def forward(self, x):
        return (x - self.colour).round().detach().sum((1, 2, 3))
"""


def likelihood(folder, function, state, **told):
    (folder / "experts.py").write_text(NETWORKS)
    torch.save(state, folder / f"{function}.pt")
    expert = Expert(module=f"{folder / 'experts.py'}:{function}", weights=str(folder / f"{function}.pt"), **told)
    return Likelihood.of("nature", expert, sha256(folder / f"{function}.pt"))


@pytest.fixture
def climb(tmp_path):
    """Climb with a small network for two units, by a configuration of the ascent."""
    spec = Network(**tiny(tmp_path))
    network = load(spec)
    (info,) = resolve(network, ["b"], SIZE)
    seeds = [(0, unit, 0) for unit in (1, 3)]

    def climbed(judges=(), spectrum=None, **options):
        asked = Maximise.model_validate({"steps": 12, "restarts": 1, **options})
        target, scale = Strongest(info, torch.tensor([1, 3])), torch.tensor([0.5, 0.5])
        return Climb(network, spec, target, scale, seeds, SIZE, asked, spectrum, None, judges).run("pixels")

    return climbed


def test_a_density_network_is_the_closed_form(tmp_path, climb):
    """A network that computes the Gaussian's log p gives the pictures of the expert `gaussian`."""
    spectrum = Spectrum.of(np.random.default_rng(0).normal(0.5, 0.1, (30, *SIZE)).cumsum(3) / 4)
    precision = np.linalg.inv(spectrum.covariance(RIDGE))
    state = {
        "mean": torch.from_numpy(spectrum.mean).float(),
        "precision": torch.view_as_real(torch.from_numpy(precision).to(torch.complex64)),
    }
    nature = likelihood(tmp_path, "Gaussian", state, kind="density", input=(-1, 1))
    assert experts.why_not(nature, SIZE[1:], 3) == ""
    closed = climb(expert=["gaussian"], spectrum=spectrum)
    found = climb([nature], expert=["nature"])
    assert found.trajectory.shape == closed.trajectory.shape == (2, 2, 12)
    assert closed.trajectory[:, 1].min() < -10, "the prior says something"
    np.testing.assert_allclose(found.trajectory, closed.trajectory, rtol=2e-3, atol=1e-3)
    np.testing.assert_allclose(found.pixels, closed.pixels, rtol=0, atol=1e-3)
    assert np.abs(climb(expert=[]).pixels - closed.pixels).max() > 0.05


def test_a_denoiser_is_the_density_of_noisy_images(tmp_path, climb):
    """The best denoiser of a Gaussian gives the gradient of the Gaussian of images with the noise (Tweedie)."""
    state = {"colour": torch.tensor([0.2, 0.6, 0.4]).view(3, 1, 1)}
    denoiser = likelihood(tmp_path, "Shrink", state, kind="denoiser", noise=0.5, weight=3)
    density = likelihood(tmp_path, "Distance", state, kind="density", weight=3)
    pixels = torch.rand(2, *SIZE)
    (value, pull), (_, expected) = denoiser(pixels), density(pixels)
    torch.testing.assert_close(pull, expected)
    torch.testing.assert_close(pull, (state["colour"] - pixels) / 1.25)
    torch.testing.assert_close(value, -0.125 * (pull**2).sum((1, 2, 3)))
    by_denoiser, by_density = (climb([each], expert=["nature"]) for each in (denoiser, density))
    np.testing.assert_allclose(by_denoiser.pixels, by_density.pixels, rtol=0, atol=2e-3)
    with pytest.raises(MicrotomeError, match=r"Shrink.pt changed since the run began"):
        Likelihood("nature", denoiser.json, "0" * 64)(pixels)


NOT_ONE = [
    ("Pixels", {"kind": "density"}, r"as a density it gives \(2, 16, 16\) for 2 images, expected one number each"),
    ("Distance", {"kind": "denoiser", "noise": 0.1}, r"as a denoiser it gives \(2,\) for images of shape"),
    ("Together", {"kind": "density"}, r"what it says of an image depends on the others of its batch, or on chance"),
    ("Rounded", {"kind": "density"}, r"its log p\(x\) has no gradient with respect to the image"),
]


@pytest.mark.parametrize(("function", "told", "why"), NOT_ONE, ids=lambda each: str(each)[:20])
def test_what_is_no_expert_is_told(tmp_path, function, told, why):
    found = experts.why_not(likelihood(tmp_path, function, {"colour": torch.zeros(3, 1, 1)}, **told), SIZE[1:], 3)
    assert re.match(why, found)


def test_ids_hold_the_digest_and_the_use(tmp_path):
    state, digests = {"colour": torch.zeros(3, 1, 1)}, FileDigests(tmp_path / "digests.json")
    one = likelihood(tmp_path, "Distance", state, kind="density")
    first = experts.settings_of(one.expert, digests)
    assert first["weights"] == one.weights and str(tmp_path) not in str(first)
    assert experts.settings_of(one.expert.model_copy(update={"weight": 1.0}), digests) != first
    other = likelihood(tmp_path, "Distance", {"colour": torch.ones(3, 1, 1)}, kind="density")
    assert experts.settings_of(other.expert, digests)["weights"] == other.weights != one.weights


def told(folder, **changes):
    raw = experiment(folder, maximise={"steps": 3, "expert": ["l2", "nature"], "restarts": 1})
    raw["visualize"]["wishes"] |= {"units": {"b": [0, 4]}, "classes": [], "projections": None, "first_layers": False}
    raw["datasets"]["scenes"]["concepts"] = []
    expert = {"module": f"{folder / 'experts.py'}:Distance", "weights": str(folder / "Distance.pt"), "kind": "density"}
    return raw | {"experts": {"nature": expert | changes}}


REFUSED = [
    ({"kind": "denoiser"}, r"experts.nature.*noise: give the deviation of the noise"),
    ({"noise": 0.1}, r"experts.nature.*noise: is of a denoiser"),
    ({"weights": "random"}, r"experts.nature.*weights: 'random': an expert needs trained weights"),
    ({"weight": -1}, r"experts.nature.weight"),
    ({"input": [1, 0]}, r"experts.nature.*input: black, 1, has to lie below white, 0"),
]


@pytest.mark.parametrize(("change", "why"), REFUSED, ids=lambda each: str(each)[:30])
def test_refused_by_key(tmp_path, change, why):
    likelihood(tmp_path, "Distance", {"colour": torch.zeros(3, 1, 1)}, kind="density")
    with pytest.raises(MicrotomeError, match=f"(?s){why}"):
        planner.make(run_experiment.parse(told(tmp_path, **change)))


def test_names_of_experts(tmp_path):
    likelihood(tmp_path, "Distance", {"colour": torch.zeros(3, 1, 1)}, kind="density")
    raw = told(tmp_path)
    raw["experts"]["natures"] = raw["experts"].pop("nature")
    with pytest.raises(MicrotomeError, match=r"visualize.wishes.maximise.expert: no expert 'nature'.*natures"):
        planner.make(run_experiment.parse(raw))
    raw["experts"] = {"tv": raw["experts"]["natures"]}
    with pytest.raises(MicrotomeError, match=r"experts.tv: 'tv' is the name of another term"):
        planner.make(run_experiment.parse(raw))


@pytest.mark.slow
@pytest.mark.usefixtures("workers")
def test_the_stage_stores_the_term(tmp_path):
    import xarray as xr

    likelihood(tmp_path, "Distance", {"colour": torch.full((3, 1, 1), 0.5)}, kind="density")
    likelihood(tmp_path, "Pixels", {"colour": torch.full((3, 1, 1), 0.5)}, kind="density")
    stages = "ingest", "network", "extract", "visualize"
    made = run(told(tmp_path), *stages)
    folder = made.results / "scenes/cnn/visualizations/wishes"
    store = xr.open_zarr(folder / "maximised-pixels.zarr", group="b", consolidated=False)
    assert store.term.values.tolist() == ["score", "l2", "nature"]
    assert (store.trajectory.values[:, :, 2] < 0).all()
    with pytest.raises(MicrotomeError, match=r"visualize.wishes.maximise.expert: 'nature': as a density it gives"):
        run(told(tmp_path, module=f"{tmp_path / 'experts.py'}:Pixels", weights=str(tmp_path / "Pixels.pt")), *stages)


def test_experts_of_pixels_alone_leave_maco_as_it_is():
    assert Maximise(expert=["nature", "maco"]).ways == ["pixels", "maco"]
    assert Maximise(expert=["maco"]).ways == ["maco"]
