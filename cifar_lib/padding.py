"""Channels of zeros that widen a network to channel counts with which a GPU is fast.

Training can be understood without this module: the padded network computes what the network itself
computes, and stays equal to it while both are trained. In half precision, the matrix units of a GPU
work on multiples of 8 channels, or of 16 or more. The report's network has 66, 132 and 264.

An added channel is 0 at every position in every image, because the weights that lead to it and the
scale and bias of its batch norm are 0. ReLU passes no gradient back where it gives 0. So all
gradients that belong to the channel are 0, and momentum and weight decay leave its weights at 0.
Only sums over a convolution's input channels change: they have more terms, which are 0,
so they may be rounded differently.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar_lib.model import ResNet

# A network's tensors by their names, as in its state dict, and their shapes.
Tensors = dict[str, Tensor]
Shapes = Mapping[str, torch.Size]


def pad_network(model: ResNet, multiple: int) -> ResNet:
    """Return a network that computes what `model` does, with channels in multiples of `multiple`.

    If nothing has to be added, `model` itself is returned. Otherwise the new network is on the CPU.
    Building it uses up random numbers, although it then gets the weights of `model`.
    """
    channels = [multiple * math.ceil(width / multiple) for width in model.channels]
    if tuple(channels) == model.channels:
        return model
    wide = ResNet(model.blocks, channels, model.num_classes)
    wide.load_state_dict(pad(model.state_dict(), shapes(model), shapes(wide)))
    return wide


def shapes(model: nn.Module) -> Shapes:
    """Return the shape of each of the model's parameters and buffers."""
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def pad(tensors: Tensors, narrow: Shapes, wide: Shapes) -> Tensors:
    """Return the tensors of a network with zeros appended, as the padded network has them.

    narrow, wide: the shapes without and with the padding. They aren't compared with the tensors: if
    a tensor has another shape, so has its result, and `load_state_dict` will refuse it.
    """
    result = {}
    for name, tensor in tensors.items():
        added = [after - before for before, after in zip(narrow[name], wide[name], strict=True)]
        # F.pad takes two numbers for each dimension, the last dimension first: how many zeros to
        # add at its beginning and at its end.
        result[name] = F.pad(tensor, [n for extra in reversed(added) for n in (0, extra)])
    return result


def cut(tensors: Tensors, narrow: Shapes) -> Tensors:
    """Return the tensors of a padded network without the padding, as views."""
    return {
        name: tensor[tuple(slice(size) for size in narrow[name])]
        for name, tensor in tensors.items()
    }
