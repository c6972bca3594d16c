"""Where the network looks."""

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
    """Return what in each image speaks for its class, by the network's last stage.

    images uint8 (N, 3, 32, 32), classes int64 (N,) -> heat float32 (N, 32, 32) in [0, 1] on the
    CPU. Each image's heat is divided by its own maximum; it is 0 everywhere if nothing speaks for
    the class.

    Source: Grad-CAM, Selvaraju et al. 2016, arXiv:1610.02391.
    """
    device = next(model.parameters()).device
    inputs, classes = normalization(images.to(device)), classes.to(device)

    # Forward, keeping the last stage's activations.
    kept: list[Tensor] = []
    hook = model.stages[-1].register_forward_hook(lambda stage, args, output: kept.append(output))
    with torch.enable_grad():
        logits = model(inputs)  # (N, 10)
        of_class = logits.gather(1, classes[:, None]).sum()
    hook.remove()

    # How fast the class's logit grows with each channel, averaged over its places, is its weight.
    activations = kept[0]  # (N, 264, 8, 8)
    gradients = torch.autograd.grad(of_class, activations)[0]
    weights = gradients.mean((2, 3), keepdim=True)  # (N, 264, 1, 1)

    # The weighted sum of the channels; what speaks against the class counts as nothing.
    heat = (weights * activations).sum(1, keepdim=True).relu().detach().cpu()  # (N, 1, 8, 8)
    heat = F.interpolate(heat, size=images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    return heat / heat.amax((1, 2), keepdim=True).clamp(min=torch.finfo(heat.dtype).tiny)


def beside_heat(image: Tensor, heat: Tensor, scale: int = 8) -> np.ndarray:
    """Put a picture beside itself under its heat, enlarged.

    image uint8 (3, H, W), heat float32 (H, W) -> uint8 (scale * H, scale * 2 W, 3).
    """
    plain = image.permute(1, 2, 0).numpy()  # (H, W, 3)
    colours = 255 * matplotlib.colormaps["inferno"](heat.numpy())[..., :3]  # (H, W, 3)
    heated = (0.45 * plain + 0.55 * colours).round().astype(np.uint8)
    return np.hstack([plain, heated]).repeat(scale, axis=0).repeat(scale, axis=1)
