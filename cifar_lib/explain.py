"""Grad-CAM shows which positions in an image are evidence for a class."""

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cifar_lib.data import Normalization
from cifar_lib.model import ResNet


def grad_cam(
    model: ResNet, images: Tensor, classes: Tensor, normalization: Normalization
) -> Tensor:
    """Return how strongly each position in an image supports the image's class in `classes`.

    model: a network in evaluation mode.
    images: uint8 (N, 3, 32, 32).
    classes: int64 (N,), one class number per image, such as its prediction.

    Returns the heat, float32 (N, 32, 32) on the CPU, in [0, 1], enlarged from the positions of the
    network's last stage (8x8 with three stages). Each image's heat is divided by its own maximum.
    The heat is 0 everywhere if there is no evidence for the class.

    Source: Grad-CAM, Selvaraju et al. 2016, arXiv:1610.02391.
    """
    device = next(model.parameters()).device
    inputs, classes = normalization(images.to(device)), classes.to(device)

    # Run forward, and keep the last stage's activations. In evaluation mode an image's logits
    # depend on that image alone. Therefore the gradient of the sum contains each image's own.
    kept: list[Tensor] = []
    hook = model.stages[-1].register_forward_hook(lambda stage, args, output: kept.append(output))
    with torch.enable_grad():
        logits = model(inputs)  # (N, 10)
        logit_sum = logits.gather(1, classes[:, None]).sum()
    hook.remove()

    # A channel's weight is the gradient of the class's logit, averaged over all positions. These
    # are the shapes for the report's network.
    activations = kept[0]  # (N, 264, 8, 8)
    gradients = torch.autograd.grad(logit_sum, activations)[0]  # (N, 264, 8, 8)
    weights = gradients.mean((2, 3), keepdim=True)  # (N, 264, 1, 1)

    # The heat is the weighted sum of the channels. A negative sum is evidence against the class,
    # and becomes 0. Then the heat is enlarged to the image's size, (N, 32, 32).
    heat = (weights * activations).sum(1, keepdim=True).relu().detach().cpu()  # (N, 1, 8, 8)
    heat = F.interpolate(heat, size=images.shape[2:], mode="bilinear", align_corners=False)[:, 0]

    # Where the maximum is 0, divide by the smallest normal number instead: the heat stays 0.
    return heat / heat.amax((1, 2), keepdim=True).clamp(min=torch.finfo(heat.dtype).tiny)


def picture_with_heat(image: Tensor, heat: Tensor, scale: int = 8) -> np.ndarray:
    """Return one picture: the image, and to its right the same image overlaid with its heat.

    image: uint8 (3, H, W), on the CPU.
    heat: float32 (H, W), in [0, 1], on the CPU.

    Returns uint8 (scale * H, scale * 2 * W, 3): each pixel is enlarged to a square.
    """
    plain = image.permute(1, 2, 0).numpy()  # (H, W, 3)
    colours = 255 * matplotlib.colormaps["inferno"](heat.numpy())[..., :3]  # (H, W, 3)
    heated = (0.45 * plain + 0.55 * colours).round().astype(np.uint8)
    both = np.hstack([plain, heated])  # (H, 2 * W, 3)
    return both.repeat(scale, axis=0).repeat(scale, axis=1)
