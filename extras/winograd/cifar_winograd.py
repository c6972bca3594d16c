"""3x3 convolutions on a CPU with a quarter of the multiplications (Winograd's F(4x4, 3x3), as in
Lavin and Gray 2015, arXiv:1509.09308): forward and both gradients. PyTorch's CPU kernels compute
them directly."""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# G of the paper: the weights of 3 taps at 6 points
TRANSFORM = torch.tensor(
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ]
)
_compiled = importlib.util.find_spec("_cifar_winograd")
if _compiled is None:  # another Python's compiled part goes by another file name
    raise ImportError("_cifar_winograd, its compiled part, isn't there for this Python")
torch.ops.load_library(_compiled.origin)


class Winograd(TorchFunctionMode):
    """Within it, float32 convolutions that fit (3x3, stride 1, padding 1, image sides multiples of
    4, at least 64 channels on both sides) run this way.

    The results differ from PyTorch's by rounding, about 1e-5 of the largest.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.conv2d and not kwargs and _fits(*args):
            return _Convolution.apply(*args[:2])
        return function(*args, **kwargs or {})


def _fits(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
) -> bool:
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and min(weight.shape[:2]) >= 64  # with fewer channels it is the slower way
        and weight.shape[2:] == (3, 3)
        and not (x.shape[2] % 4 or x.shape[3] % 4)
        and (bias, stride, padding, dilation, groups) == (None, (1, 1), (1, 1), (1, 1), 1)
    )


class _Convolution(torch.autograd.Function):
    """x (N, C, H, W), weight (K, C, 3, 3) -> (N, K, H, W), channels last."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _convolve(x, weight)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor]:
        x, weight = ctx.saved_tensors
        to_x = None
        if ctx.needs_input_grad[0]:  # it is a convolution with the turned weights
            to_x = _convolve(gradient, weight.transpose(0, 1).flip(2, 3))
        product = torch.ops.cifar_lib.winograd_weight_gradient(
            _channels_last(x), _channels_last(gradient)
        )
        outputs, inputs = weight.shape[:2]
        product = product.view(6, 6, inputs, outputs)
        return to_x, torch.einsum("ia,jb,ijck->kcab", TRANSFORM, TRANSFORM, product)


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    outputs, inputs = weight.shape[:2]
    transformed = torch.einsum("ia,jb,kcab->ijck", TRANSFORM, TRANSFORM, weight)
    transformed = transformed.reshape(36, inputs, outputs)
    result = torch.ops.cifar_lib.winograd_convolve(_channels_last(x), transformed)
    return result.permute(0, 3, 1, 2)


def _channels_last(x: Tensor) -> Tensor:
    """(N, H, W, C) in that order in memory."""
    return x.permute(0, 2, 3, 1).contiguous()
