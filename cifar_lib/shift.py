"""Domain shift: images with other channel statistics."""

import numpy as np
import torch
from torch import Tensor

from cifar_lib.data import channel_statistics


def match_statistics(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...], rounds: int = 20) -> Tensor:
    """A gain and an offset per channel that give the whole set this mean and std, in [0, 1]; uint8 -> uint8.

    Values are cut off at 0 and 255, which moves the statistics again, so gain and offset are corrected a few times.
    """
    target_mean, target_std = np.asarray(mean), np.asarray(std)
    start_mean, start_std = channel_statistics(images)
    gain = target_std / start_std
    offset = target_mean - gain * start_mean
    for _ in range(rounds):
        shifted = _gain_offset(images, gain, offset)
        now_mean, now_std = channel_statistics(shifted)
        if max(np.abs(now_mean - target_mean).max(), np.abs(now_std - target_std).max()) < 5e-5:
            break
        gain *= target_std / now_std
        offset += target_mean - now_mean - (target_std / now_std - 1) * start_mean * gain
    return shifted


def _gain_offset(images: Tensor, gain: np.ndarray, offset: np.ndarray) -> Tensor:
    """round(255 (gain x / 255 + offset)), cut off at 0 and 255, by a table of the 256 values of each channel."""
    values = np.arange(256)[None] * gain[:, None] + 255 * offset[:, None]
    table = torch.from_numpy(values.round().clip(0, 255).astype(np.uint8))
    return torch.stack([table[c][images[:, c].long()] for c in range(3)], dim=1)
