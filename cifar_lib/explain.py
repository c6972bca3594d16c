"""Where the network looks."""

import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam
from torch import Tensor

from cifar_lib.data import normalize
from cifar_lib.model import ResNet


def grad_cam(
    model: ResNet, images: Tensor, targets: Tensor, mean: tuple[float, ...], std: tuple[float, ...]
) -> Tensor:
    """Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391) of the last stage's output: what speaks
    for `targets`.

    images uint8 (N, 3, 32, 32), targets int64 (N,) -> heat float32 (N, 32, 32) in [0, 1] on the
    CPU, each picture scaled by its own maximum (all 0 where nothing speaks for the class). The map
    itself is 8x8: that is how fine it is.
    """
    device = next(model.parameters()).device
    inputs = normalize(images.to(device), mean, std)
    heat = LayerGradCam(model, model.stages[-1]).attribute(
        inputs, targets.to(device), relu_attributions=True
    )
    heat = F.interpolate(
        heat.detach(), size=images.shape[2:], mode="bilinear", align_corners=False
    )[:, 0]
    return (
        heat / heat.amax(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(heat.dtype).tiny)
    ).cpu()
