"""A search for the training image whose pixels are most similar to a test image's."""

import torch
import torch.nn.functional as F
from torch import Tensor

CELLS = 8  # images are compared as CELLS x CELLS means of each channel
AT_A_TIME = 500  # test images; each is compared with all training images at once


def nearest_by_pixels(images: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Return the most similar of the known images for each image, and how similar it is.

    images, known: uint8 (N, 3, 32, 32) and (M, 3, 32, 32).

    Returns positions in `known`, int64 (N,), and correlations, float32 (N,). An image and its
    mirror image are compared with every known image, and the larger correlation counts. It is 1
    for two images that differ in brightness and contrast only.
    """
    known_cells = _describe(known)  # (M, 192)
    positions, similarities = [], []
    for piece in images.split(AT_A_TIME):
        views = torch.stack([_describe(piece), _describe(piece.flip(3))])  # (2, n, 192)
        best = (views @ known_cells.T).amax(0).max(1)  # max over views (n, M), over known (n,)
        positions.append(best.indices)
        similarities.append(best.values)
    return torch.cat(positions), torch.cat(similarities)


def _describe(images: Tensor) -> Tensor:
    """Return the images as means of cells, float32 (n, 192), with mean 0 and length 1 each."""
    cells = [
        F.avg_pool2d(piece.float(), 32 // CELLS).flatten(1) for piece in images.split(5000)
    ]  # (at most 5000, 192) each
    described = torch.cat(cells)
    return F.normalize(described - described.mean(1, keepdim=True), dim=1)
