"""Layer ids: what must change them, and what must not. Networks are small, weights are random."""

import copy
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from pipeline.errors import MicrotomeError
from pipeline.networks.layer import LayerInfo
from pipeline.networks.layer_id import layer_ids
from pipeline.networks.layers import candidates

SHAPE = (3, 8, 8)


def ids_of(network, names=None, preprocessing=None, numerics=None, shape=SHAPE):
    network.eval()
    layers = [layer for layer in candidates(network, shape) if names is None or layer.name in names]
    return layer_ids(network, layers, preprocessing or {"mean": [0.5]}, numerics or {"micro_batch": 4}, shape)


class Block(nn.Module):
    """conv, BatchNorm and a function that no hook sees."""

    def __init__(self, units_in=4, units=4, function=functional.relu):
        super().__init__()
        self.conv = nn.Conv2d(units_in, units, 3, padding=1)
        self.bn = nn.BatchNorm2d(units)
        self.function = function

    def forward(self, x):
        return self.function(self.bn(self.conv(x)))


class Net(nn.Module):
    def __init__(self, blocks=4, classes=5, seed=0, functions=None):
        super().__init__()
        torch.manual_seed(seed)
        functions = functions or [functional.relu] * blocks
        self.blocks = nn.Sequential(*(Block(3 if i == 0 else 4, 4, functions[i]) for i in range(blocks)))
        self.head = nn.Linear(4, classes)

    def forward(self, x):
        return self.head(self.blocks(x).mean((2, 3)))


BLOCKS = [f"blocks.{i}" for i in range(4)]


def changed(before, after):
    """The names of the blocks whose ids differ."""
    assert before.keys() == after.keys()
    return [name for name in before if before[name] != after[name]]


def test_ids_are_hex_and_all_layers_differ():
    ids = ids_of(Net(), BLOCKS)
    assert list(ids) == BLOCKS
    assert len(set(ids.values())) == 4
    assert all(len(id) == 20 and int(id, 16) >= 0 for id in ids.values())


@pytest.mark.parametrize("block", range(4))
@pytest.mark.parametrize("key", ["conv.weight", "conv.bias", "bn.weight", "bn.running_mean", "bn.running_var"])
def test_fine_tuned_from_a_block_on(block, key):
    network = Net()
    before = ids_of(network, BLOCKS)
    with torch.no_grad():
        network.state_dict()[f"blocks.{block}.{key}"].view(-1)[-1] += 1e-6
    assert changed(before, ids_of(network, BLOCKS)) == BLOCKS[block:]


def test_new_head_and_batch_counters_change_nothing():
    network = Net()
    before = ids_of(network, BLOCKS)
    network.head = nn.Linear(4, 99)
    for key, value in network.state_dict().items():
        if key.endswith("num_batches_tracked"):
            value += 7
    assert ids_of(network, BLOCKS) == before


def test_later_blocks_are_no_part_of_a_layer():
    shorter = Net(blocks=2)
    longer = Net(blocks=4, seed=9)
    longer.blocks[:2].load_state_dict(shorter.blocks.state_dict())
    assert ids_of(shorter, BLOCKS[:2]) == ids_of(longer, BLOCKS[:2])


def test_names_and_wrappers_do_not_matter():
    class Wrapped(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.classifier = copy.deepcopy(network.head)
            self.trunk = nn.Sequential(OrderedDict(stages=copy.deepcopy(network.blocks)))

        def forward(self, x):
            return self.classifier(self.trunk(x).mean((2, 3)))

    network = Net()
    renamed = ids_of(Wrapped(network), [f"trunk.stages.{i}" for i in range(4)])
    assert list(renamed.values()) == list(ids_of(network, BLOCKS).values())


def test_a_normalisation_in_front_changes_all():
    class Normalised(Net):
        def forward(self, x):
            return super().forward(x - 0.5)

    assert changed(ids_of(Net(), BLOCKS), ids_of(Normalised(), BLOCKS)) == BLOCKS


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (functional.relu, functional.gelu),
        (lambda x: functional.leaky_relu(x, 0.1), lambda x: functional.leaky_relu(x, 0.2)),
        (lambda x: functional.gelu(x), lambda x: functional.gelu(x, approximate="tanh")),
        (lambda x: x * 2, lambda x: x * 2.0000001),
        (lambda x: functional.layer_norm(x, x.shape[1:]), lambda x: functional.layer_norm(x, x.shape[1:], eps=1e-6)),
        (lambda x: x + x.mean((2, 3), keepdim=True), lambda x: x + x.mean((1, 2), keepdim=True)),
        (lambda x: x[:, [0, 1, 2, 3]], lambda x: x[:, [1, 0, 2, 3]]),
        (lambda x: x - functional.relu(x), lambda x: functional.relu(x) - x),
    ],
)
def test_functions_and_their_constants_count(one, other):
    relu = functional.relu
    before = ids_of(Net(functions=[relu, relu, one, relu]), BLOCKS)
    assert changed(before, ids_of(Net(functions=[relu, relu, other, relu]), BLOCKS)) == BLOCKS[2:]


def test_dropout_in_eval_does_not_count():
    relu = functional.relu
    nets = [Net(functions=[lambda x, p=p: functional.dropout(x, p, False), relu, relu, relu]) for p in (0.1, 0.7)]
    assert ids_of(nets[0], BLOCKS) == ids_of(nets[1], BLOCKS)


def test_constants_of_modules_count():
    first, second = Net(), Net()
    second.blocks[1].bn.eps = 1e-4
    assert changed(ids_of(first, BLOCKS), ids_of(second, BLOCKS)) == BLOCKS[1:]


def test_preprocessing_numerics_image_size_and_reading_count():
    network = Net()
    before = ids_of(network, BLOCKS)
    assert changed(before, ids_of(network, BLOCKS, preprocessing={"mean": [0.4]})) == BLOCKS
    assert changed(before, ids_of(network, BLOCKS, numerics={"micro_batch": 8})) == BLOCKS
    assert changed(before, ids_of(network, BLOCKS, shape=(3, 8, 12))) == BLOCKS
    maps = LayerInfo("blocks.0", (4, 8, 8), "map", 0, "float32", "Block")
    read_otherwise = LayerInfo("blocks.0", (8, 4, 8), "channels_last", 0, "float32", "Block")
    first = layer_ids(network, [maps], {"mean": [0.5]}, {"micro_batch": 4}, SHAPE)
    assert first["blocks.0"] == before["blocks.0"]
    assert layer_ids(network, [read_otherwise], {"mean": [0.5]}, {"micro_batch": 4}, SHAPE) != first


def test_gradients_and_modes_of_the_caller_do_not_count():
    network = Net()
    before = ids_of(network, BLOCKS)
    for parameter in list(network.parameters())[::2]:
        parameter.requires_grad_(False)
    wanted = [parameter.requires_grad for parameter in network.parameters()]
    with torch.no_grad():
        assert ids_of(network, BLOCKS) == before
    with torch.inference_mode():
        assert ids_of(network, BLOCKS) == before
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ids_of(network, BLOCKS) == before
    assert [parameter.requires_grad for parameter in network.parameters()] == wanted


def test_one_layer_has_the_same_id_alone_and_among_others():
    network = Net()
    together = ids_of(network)
    for name, id in together.items():
        assert ids_of(network, [name]) == {name: id}


class Tokens(nn.Module):
    """A small transformer of torch's own encoder layers, with a class token."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.class_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.blocks = nn.Sequential(
            *(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True) for _ in range(3))
        )

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.blocks(torch.cat([self.class_token.expand(len(x), -1, -1), x], 1))[:, 0]


def test_weights_passed_to_functions_count_from_their_block_on():
    network = Tokens()
    names = ["patch", *BLOCKS[:3]]
    before = ids_of(network, names)
    with torch.no_grad():
        network.blocks[1].self_attn.out_proj.weight[0, 0] += 1e-6
    assert changed(before, ids_of(network, names)) == BLOCKS[1:3]
    before = ids_of(network, names)
    with torch.no_grad():
        network.blocks[2].self_attn.in_proj_bias[0] += 1e-6
    assert changed(before, ids_of(network, names)) == BLOCKS[2:3]
    with torch.no_grad():
        network.class_token[0, 0, 0] += 1e-6
    # A direct parameter of the network itself: it was there when the patches were computed, used or not.
    assert changed(before, ids_of(network, names)) == names


def test_fused_attention_does_not_change_ids():
    network = Tokens()
    before = ids_of(network)
    network.requires_grad_(False)
    with torch.inference_mode():
        assert ids_of(network) == before
    assert torch.backends.mha.get_fastpath_enabled()


def test_tensors_that_are_no_state_count_by_value():
    class Plain(Net):
        def __init__(self, gain):
            super().__init__()
            self.gain = torch.tensor(gain)
            hidden = torch.full((1, 4, 1, 1), gain)
            self.blocks[2].function = lambda x: x * hidden

        def forward(self, x):
            return super().forward(x * self.gain)

    assert changed(ids_of(Plain(1.0), BLOCKS), ids_of(Plain(1.5), BLOCKS)) == BLOCKS
    first, second = Plain(1.0), Plain(1.5)
    second.gain = first.gain
    assert changed(ids_of(first, BLOCKS), ids_of(second, BLOCKS)) == BLOCKS[2:]


def test_which_result_an_output_is_counts():
    class Taps(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.relu = nn.ReLU()
            self.after = nn.Identity()
            self.before = nn.Identity()

        def forward(self, x):
            y = self.conv(x)
            z = self.relu(y)
            return self.after(z) + self.before(y)

    ids = ids_of(Taps())
    assert ids["after"] == ids["relu"]
    assert len({ids["conv"], ids["relu"], ids["before"]}) == 3


def test_random_forwards_are_refused():
    relu = functional.relu
    noisy = Net(functions=[relu, functional.dropout, relu, relu])
    with pytest.raises(MicrotomeError, match=r"random numbers .*bernoulli"):
        ids_of(noisy, BLOCKS)
    generator = np.random.default_rng(0)
    noise = Net(functions=[relu, relu, lambda x: x * float(generator.random()), relu])
    with pytest.raises(MicrotomeError, match=r"'blocks.2' is computed differently"):
        ids_of(noise, BLOCKS)


def test_caches_filled_by_the_first_forward_settle():
    class Cached(Net):
        table = None

        def forward(self, x):
            if self.table is None:
                self.table = torch.arange(8.0) / 8
            return super().forward(x + self.table)

    used = Cached()
    with torch.no_grad():
        used.eval()(torch.zeros(2, *SHAPE))
    assert ids_of(used, BLOCKS) == ids_of(Cached(), BLOCKS)


def _untaken(x):
    return x * 3 if x.sum() > 1e9 else x


def _untaken_otherwise(x):
    return x * 4 if x.sum() > 1e9 else x


class Branching(Block):
    def forward(self, x):
        return _untaken(super().forward(x))


class BranchingOtherwise(Block):
    def forward(self, x):
        return _untaken_otherwise(super().forward(x))


def test_sources_count_where_a_forward_decides_by_values():
    networks = []
    for kind in (Branching, BranchingOtherwise):
        network = Net()
        block = kind()
        block.load_state_dict(network.blocks[1].state_dict())
        network.blocks[1] = block
        networks.append(network)
    # What runs on a blank image is the same in both, down to the operation; only the source tells them apart.
    assert changed(ids_of(networks[0], BLOCKS), ids_of(networks[1], BLOCKS)) == BLOCKS[1:]


class ByNumpy(Block):
    def forward(self, x):
        return torch.from_numpy(np.maximum(super().forward(x).numpy(), 0))


class ByNumpyOtherwise(Block):
    def forward(self, x):
        return torch.from_numpy(np.abs(super().forward(x).numpy()))


def test_sources_count_where_values_leave_torch():
    networks = [Net(), Net()]
    for network, kind in zip(networks, (ByNumpy, ByNumpyOtherwise), strict=True):
        block = kind()
        block.load_state_dict(network.blocks[1].state_dict())
        network.blocks[1] = block
    before = ids_of(networks[0], BLOCKS)
    assert ids_of(networks[0], BLOCKS) == before
    assert changed(before, ids_of(networks[1], BLOCKS)) == BLOCKS[1:]


class Untraceable(Block):
    """A forward that refuses to run while operations are noted."""

    gain = 2.0

    def __init__(self, gain):
        super().__init__()
        self.gain = gain

    def forward(self, x):
        if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
            raise RuntimeError("compiled code")
        return super().forward(x) * self.gain


def test_untraceable_forwards_are_identified_by_their_sources():
    def network(gain):
        made = Net()
        block = Untraceable(gain)
        block.load_state_dict(made.blocks[1].state_dict())
        made.blocks[1] = block
        return made

    before = ids_of(network(2.0), BLOCKS)
    assert ids_of(network(2.0), BLOCKS) == before
    assert changed(before, ids_of(network(3.0), BLOCKS)) == BLOCKS[1:]
    tuned = network(2.0)
    with torch.no_grad():
        tuned.blocks[2].conv.bias[0] += 1
    assert changed(before, ids_of(tuned, BLOCKS)) == BLOCKS[2:]


def test_a_failing_forward_is_an_error():
    network = Net()
    layers = candidates(network.eval(), SHAPE)
    with pytest.raises(MicrotomeError, match=r"forward of Net fails on an image of shape \(5, 8, 8\)"):
        layer_ids(network, layers, {}, {}, (5, 8, 8))


def test_sparse_weights_count():
    class Sparse(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.register_buffer("mix", (torch.eye(192) * value).to_sparse())
            self.relu = nn.ReLU()

        def forward(self, x):
            return self.relu(torch.sparse.mm(self.mix, x.flatten(1).T).T.reshape(x.shape))

    assert ids_of(Sparse(1.0)) == ids_of(Sparse(1.0))
    assert ids_of(Sparse(1.0)) != ids_of(Sparse(2.0))


@settings(deadline=None, max_examples=15)
@given(st.lists(st.sampled_from(["conv", "bn", "relu", "gelu"]), min_size=2, max_size=6), st.data())
def test_a_change_moves_exactly_the_layers_from_it_on(kinds, data):
    def made(seed):
        torch.manual_seed(seed)
        kind = {"conv": lambda: nn.Conv2d(3, 3, 1), "bn": lambda: nn.BatchNorm2d(3), "relu": nn.ReLU, "gelu": nn.GELU}
        return nn.Sequential(*(kind[each]() for each in kinds))

    network = made(0)
    before = ids_of(network)
    position = data.draw(st.integers(0, len(kinds) - 1))
    tuned = made(0)
    replacement = {"relu": nn.GELU(), "gelu": nn.ReLU()}.get(kinds[position])
    if replacement is not None:
        tuned[position] = replacement
    else:
        with torch.no_grad():
            tuned[position].bias[0] += 0.5
    assert changed(before, ids_of(tuned)) == [str(i) for i in range(position, len(kinds))]


def test_ids_are_the_same_in_another_process():
    here = ids_of(Net(), BLOCKS)
    code = "from tests.pipeline.networks.test_layer_id import *; print(*ids_of(Net(), BLOCKS).values())"
    root = Path(__file__).parents[3]
    environment = os.environ | {"PYTHONHASHSEED": "12345", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    assert said.stdout.split() == list(here.values())
