"""LRP on stock networks: zennit where it is right, and the ledger of every kind of network in float64 and float32."""

import pytest
import torch
from torch import nn

from kernels.attribution.relevance import Rule
from pipeline.networks.gradients import Logit
from pipeline.networks.graph.propagated import Plan
from pipeline.networks.relevance import relevance

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
RULES = {
    "alpha_beta": Rule(),
    "alpha 2": Rule(alpha=2.0),
    "epsilon": Rule("epsilon"),
    "gamma": Rule("gamma"),
}
CNNS = ("vgg16_bn", "resnet18", "resnet50", "densenet121", "googlenet", "mobilenet_v3_small", "efficientnet_b0")


class Logits(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x).logits


def of_transformers(kind, attention):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 64, "patch_size": 16}
    more = {"intermediate_size": 96} if kind == "ViT" else {"mlp_ratio": 2}
    config = getattr(transformers, f"{kind}Config")(**sizes, **more)
    config._attn_implementation, config.num_labels = attention, 10
    return Logits(getattr(transformers, f"{kind}ForImageClassification")(config))


def made(name):
    """A network with random weights, biases and statistics, small inputs of 64 x 64, and ten logits."""
    torch.manual_seed(0)
    family, _, attention = name.partition(" ")
    if family in ("ViT", "Dinov2"):
        network = of_transformers(family, attention)
    elif family == "deit":
        timm = pytest.importorskip("timm", reason="timm is not installed")
        network = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=10, img_size=64, depth=4)
    else:
        import torchvision

        how = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
        if name == "vit_b_16":
            how = {"image_size": 64}
        network = torchvision.models.get_model(name, num_classes=10, **how)
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values, low, high in (
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 1.5),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.2, 0.2),
            ):
                values.copy_(low + (high - low) * torch.rand(values.shape, generator=generator))
        elif isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
            module.bias.data.copy_(0.05 * torch.randn(module.bias.shape, generator=generator))
    for key, values in network.named_parameters():
        if any(part in key for part in ("layer_scale", "gamma", "lambda1", "norm")) and values.ndim < 4:
            values.data.add_(0.1 * torch.randn(values.shape, generator=generator))
        elif key.split(".")[-2:] in (["head", "weight"], ["classifier", "weight"]) and not values.any():
            values.data.normal_(std=0.2)
    return network.eval()


def images(dtype, count=2):
    return torch.randn((count, 3, 64, 64), generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def residual(found):
    values = found.values.double().flatten(1)
    lacking = found.score.double() - values.sum(1) - found.bias - found.leak
    return float((lacking.abs() / torch.maximum(found.score.double().abs(), values.abs().sum(1))).max())


EVERY = (
    *CNNS, "convnext_tiny", "swin_t", "vit_b_16", "deit", "ViT sdpa", "ViT eager", "Dinov2 sdpa", "Dinov2 eager",
)  # fmt: skip


@pytest.mark.parametrize("name", EVERY)
def test_the_ledger_of_every_network(name):
    network, exact = made(name), made(name).double()
    target = Logit(network(images(torch.float32)).argmax(1))
    for preset in ("cp_lrp",) if name in CNNS else ("cp_lrp", "attn_lrp"):
        for rule in ("alpha_beta", "epsilon", "gamma"):
            plan = Plan(RULES[rule], preset=preset)
            found = relevance(exact, images(torch.float64), target, plan)
            assert residual(found) <= 1e-12, (preset, rule)
            assert residual(relevance(network, images(torch.float32), target, plan)) <= 1e-5, (preset, rule)


@pytest.mark.parametrize("name", ["vgg16_bn", "resnet18", "googlenet"])
def test_micro_batches_agree(name):
    network, exact = made(name), made(name).double()
    x = images(torch.float64, 8)
    target = Logit(torch.arange(8))
    for given, dtype, allowed in ((exact, torch.float64, 1e-12), (network, torch.float32, 1e-5)):
        among = relevance(given, x.to(dtype), target, Plan()).values
        for at in (0, 5):
            alone = relevance(given, x[at : at + 1].to(dtype), Logit(torch.tensor([at])), Plan()).values
            assert (alone[0] - among[at]).abs().max() <= allowed * among.abs().max()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["vgg16_bn", "resnet18", "resnet50"])
def test_zennit_agrees_on_convolutional_networks(name, rule):
    pytest.importorskip("zennit", reason="zennit is not installed")
    from zennit import canonizers, core, rules, torchvision, types

    network = made(name).double()
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
