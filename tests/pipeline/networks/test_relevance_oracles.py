"""LRP on stock networks: zennit where it is right, and the ledger of every kind of network in float64 and float32."""

import pytest
import torch
from stock_networks import NETWORKS, stock
from torch import nn

from pipeline.networks.gradients import Logit
from pipeline.networks.graph.propagated import Plan
from pipeline.networks.relevance import relevance
from tests.bench.residuals_table import RULES, images, of_lrp, plans

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_ledger_of_every_network(name):
    network, exact = stock(name, torch.float32), stock(name, torch.float64)
    target = Logit(network(images(torch.float32)).argmax(1))
    for plan in plans(name):
        assert of_lrp(relevance(exact, images(torch.float64), target, plan)) <= 1e-12, plan
        assert of_lrp(relevance(network, images(torch.float32), target, plan)) <= 1e-5, plan


@pytest.mark.parametrize("name", ["resnet18", "googlenet"])
def test_micro_batches_agree(name):
    network, exact = stock(name, torch.float32), stock(name, torch.float64)
    x = images(torch.float64, 8)
    target = Logit(torch.arange(8))
    for given, dtype, allowed in ((exact, torch.float64, 1e-12), (network, torch.float32, 1e-5)):
        among = relevance(given, x.to(dtype), target, Plan()).values
        for at in (0, 5):
            alone = relevance(given, x[at : at + 1].to(dtype), Logit(torch.tensor([at])), Plan()).values
            assert (alone[0] - among[at]).abs().max() <= allowed * among.abs().max()


COMPARED = [(name, rule) for name in ("vgg11_bn", "resnet18") for rule in RULES] + [("resnet50", "alpha_beta")]


@pytest.mark.parametrize(("name", "rule"), COMPARED)
def test_zennit_agrees_on_convolutional_networks(name, rule):
    pytest.importorskip("zennit", reason="zennit is not installed")
    from zennit import canonizers, core, rules, torchvision, types

    network = stock(name, torch.float64)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0
        if isinstance(module, nn.ReLU):
            module.inplace = False
    x, target = images(torch.float64), torch.tensor([3, 5])
    own = RULES[rule]
    found = relevance(network, x, Logit(target), Plan(own))
    least = 1e-15
    theirs = {
        "alpha_beta": lambda: rules.AlphaBeta(own.alpha, own.beta, stabilizer=least),
        "alpha 2": lambda: rules.AlphaBeta(own.alpha, own.beta, stabilizer=least),
        "epsilon": lambda: rules.Epsilon(own.epsilon),
        "gamma": lambda: rules.Gamma(own.gamma, stabilizer=least),
    }[rule]

    def chosen(context, name, module):
        if isinstance(module, types.Activation):
            return rules.Pass()
        if type(module).__name__ == "Sum" or isinstance(module, types.AvgPool):
            return rules.Norm(stabilizer=least)
        return theirs() if isinstance(module, types.Linear) else None

    canonizer = torchvision.ResNetCanonizer() if "resnet" in name else canonizers.SequentialMergeBatchNorm()
    with core.Composite(module_map=chosen, canonizers=[canonizer]).context(network) as modified:
        given = x.clone().requires_grad_()
        output = modified(given)
        seed = torch.zeros_like(output).scatter(1, target[:, None], output.detach().gather(1, target[:, None]))
        (wanted,) = torch.autograd.grad(output, given, seed)
    assert (found.values - wanted).abs().max() <= 1e-9 * wanted.abs().max()
