"""The networks of `allcnn.py` with a fraction of their units, for a processor.

To be named as `module: config/networks/allcnn_narrow.py:narrow`, with `arguments: {variant: all_cnn}` and
`files: [config/networks/allcnn.py, kernels/visualization/pooling.py]`.
"""

import allcnn
from torch import nn


def narrow(
    variant: str = "all_cnn", model: str = "c", num_classes: int = 10, share: int = 8, dropout: float = 0.0
) -> nn.Module:
    """Return a variant of a model with one unit of every `share`; the classes and the image's channels stay.

    Few units learn little behind the paper's dropout, so `dropout` is one probability for all places.
    """
    if variant not in ("plain", "strided", "conv_pool", "all_cnn"):
        raise ValueError(f"variant {variant!r}: expected plain, strided, conv_pool or all_cnn")
    if 96 % share:
        raise ValueError(f"share {share}: expected a divisor of 96, the units of the first layers")
    network = getattr(allcnn, variant)(model, num_classes)
    layers = network.features
    last = list(layers._modules)[-1]
    for name, layer in layers.named_children():
        if isinstance(layer, nn.Dropout):
            layer.p = dropout
        elif isinstance(layer, nn.Sequential):
            (conv,) = (each for each in layer if isinstance(each, nn.Conv2d))
            given = conv.in_channels if conv.in_channels == 3 else conv.in_channels // share
            units = num_classes if name == last else conv.out_channels // share
            layers.set_submodule(name, allcnn._conv(given, units, conv.kernel_size[0], conv.stride[0], conv.padding[0]))
    return network
