"""Where the network looks."""

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cifar_lib import environment
from cifar_lib.data import Channels, normalize
from cifar_lib.model import ResNet


def grad_cam(
    model: ResNet, images: Tensor, targets: Tensor, mean: Channels, std: Channels
) -> Tensor:
    """Grad-CAM (arXiv:1610.02391) of the last stage: what speaks for `targets`, enlarged from 8x8.

    images uint8 (N, 3, 32, 32), targets int64 (N,) -> heat float32 (N, 32, 32) in [0, 1] on the
    CPU, each scaled by its own maximum (all 0 where nothing speaks for the class).

    Raises InputError if the package captum isn't installed.
    """
    environment.require("captum", "Grad-CAM")
    from captum.attr import LayerGradCam  # here: not everybody who imports this module needs it

    device = next(model.parameters()).device
    layer = LayerGradCam(model, model.stages[-1])
    inputs, targets = normalize(images.to(device), mean, std), targets.to(device)
    heat = layer.attribute(inputs, targets, relu_attributions=True).detach().cpu()
    heat = F.interpolate(heat, size=images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    return heat / heat.amax((1, 2), keepdim=True).clamp(min=torch.finfo(heat.dtype).tiny)


def beside_heat(image: Tensor, heat: Tensor, scale: int = 8) -> np.ndarray:
    """A picture uint8 (3, H, W) beside itself under its heat (H, W), enlarged: uint8 (., ., 3)."""
    plain = image.permute(1, 2, 0).numpy()
    colours = 255 * matplotlib.colormaps["inferno"](heat.numpy())[..., :3]  # (H, W, 3)
    heated = (0.45 * plain + 0.55 * colours).round().astype(np.uint8)
    return np.hstack([plain, heated]).repeat(scale, axis=0).repeat(scale, axis=1)
