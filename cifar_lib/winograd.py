"""3x3 convolutions on a CPU with a quarter of the multiplications (Winograd's F(4x4, 3x3), as in
Lavin and Gray 2015, arXiv:1509.09308): forward and both gradients. PyTorch's CPU kernels compute
them directly."""

import contextlib
import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

TRANSFORM = torch.tensor(
    [[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6]]
    + [[1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]]
)  # G of the paper: the weights of 3 taps at 6 points
TORCH = Path(torch.__file__).parent
FLAGS = {
    "AVX2": ["-mavx2", "-mfma"],
    "AVX512": ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma"],
}


@functools.cache
def build() -> bool:
    """Load what winograd.cpp compiles to, once a process. Raises RuntimeError where that fails.

    Compiling takes about 20 seconds; the result is kept in the user's cache folder for later
    processes.
    """
    compiler = [os.environ.get("CXX", "c++"), "-std=c++20", "-O3", "-fPIC", "-fopenmp"]
    compiler += FLAGS.get(torch.backends.cpu.get_cpu_capability(), [])
    compiler += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    source = Path(__file__).with_suffix(".cpp")
    made_from = _digest(
        source.read_bytes() + repr((compiler, str(TORCH), torch.__version__)).encode()
    )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cifar_lib"
    for kept in cache.glob(f"winograd-{made_from}-*.so"):
        with contextlib.suppress(OSError):  # one that can't be read is made anew
            if kept.stem.endswith(
                _digest(kept.read_bytes())
            ):  # loading a damaged one would end the process
                torch.ops.load_library(kept)
                return True
    with contextlib.suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache if os.access(cache, os.W_OK) else None) as folder:
        compiled, library = f"{folder}/winograd.o", f"{folder}/winograd.so"
        _run([*compiler, f"-isystem{TORCH / 'include'}", "-c", str(source), "-o", compiled])
        # Linked without OpenMP's library: the one that torch brought is in the process, and a
        # second one would keep threads of its own waiting on the same cores.
        _run(
            [
                compiler[0],
                "-shared",
                compiled,
                "-o",
                library,
                f"-L{TORCH / 'lib'}",
                "-lc10",
                "-ltorch_cpu",
            ]
        )
        try:
            torch.ops.load_library(library)
        except OSError as error:
            raise RuntimeError(str(error)) from error
        with contextlib.suppress(
            OSError
        ):  # on another file system, where the folder can't be written to
            os.replace(
                library, cache / f"winograd-{made_from}-{_digest(Path(library).read_bytes())}.so"
            )
    return True


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f"no C++ compiler: {error}") from error
    except subprocess.CalledProcessError as error:
        raise RuntimeError(
            next((line for line in error.stderr.splitlines() if "error" in line), "failed")
        ) from error


class Winograd(TorchFunctionMode):
    """Within it, float32 convolutions that fit (3x3, stride 1, padding 1, image sides multiples of
    4) run this way.

    The results differ from PyTorch's by rounding, about 1e-5 of the largest. Needs `build` first.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.conv2d and not kwargs and _fits(*args):
            return _Convolution.apply(*args[:2])
        return function(*args, **kwargs or {})


def where_it_helps(device: torch.device) -> contextlib.AbstractContextManager:
    """`Winograd`, built, on a CPU; nothing on other devices and without a compiler."""
    return Winograd() if device.type == "cpu" and _builds() else contextlib.nullcontext()


@functools.cache
def _builds() -> bool:
    """Tried once: a compiler that fails takes its time too."""
    try:
        return build()
    except (RuntimeError, OSError):
        return False


def _fits(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride=1, padding=0, dilation=1, groups=1
) -> bool:
    return (
        x.dtype == weight.dtype == torch.float32
        and weight.shape[1] >= 16  # the three colours are too few for matrix products
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
        # The input's gradient is a convolution with the turned weights.
        to_x = (
            _convolve(gradient, weight.transpose(0, 1).flip(2, 3))
            if ctx.needs_input_grad[0]
            else None
        )
        product = torch.ops.cifar_lib.winograd_weight_gradient(
            _channels_last(x), _channels_last(gradient)
        )
        outputs, inputs = weight.shape[:2]
        return to_x, torch.einsum(
            "ia,jb,ijck->kcab", TRANSFORM, TRANSFORM, product.view(6, 6, inputs, outputs)
        )


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    outputs, inputs = weight.shape[:2]
    transformed = torch.einsum("ia,jb,kcab->ijck", TRANSFORM, TRANSFORM, weight).reshape(
        36, inputs, outputs
    )
    return torch.ops.cifar_lib.winograd_convolve(_channels_last(x), transformed).permute(0, 3, 1, 2)


def _channels_last(x: Tensor) -> Tensor:
    """(N, H, W, C) in that order in memory."""
    return x.permute(0, 2, 3, 1).contiguous()
