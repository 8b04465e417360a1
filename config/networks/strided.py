"""A convolutional network for digits, with strides in place of pooling."""

from collections import OrderedDict

from torch import nn


def digits(classes: int = 10) -> nn.Module:
    """A convolutional network with strides in place of pooling: (batch, 1, 28, 28) -> (batch, classes).

    Two convolutions and two linear maps with ReLU, as in Shrikumar et al. (ICML 2017), section 4.1.
    """
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 32, 4, stride=2),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(32, 64, 4, stride=2),
            relu2=nn.ReLU(),
            flatten=nn.Flatten(),
            fc1=nn.Linear(1600, 128),
            relu3=nn.ReLU(),
            fc2=nn.Linear(128, classes),
        )
    )
