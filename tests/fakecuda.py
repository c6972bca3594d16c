"""A CUDA device without a GPU, for tests of what runs where.

Tensors on "cuda" are torch's FakeTensors, which have shapes but no content; those on the CPU stay
real. An operation on both, and a value that is read back (`.item()`, `.tolist()`), raise. Autograd
doesn't run backwards on such tensors. Seen to work with torch 2.11 and 2.12.
"""

import torch
import torch.cuda
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.to.dtype_layout, aten.to.device, aten.copy_.default)
READS = (aten._local_scalar_dense.default, aten.item.default)
FUSED_SGD = (aten._fused_sgd_.default, aten._fused_sgd_.tensor_lr)


class FakeCuda(TorchDispatchMode):
    """Within it, "cuda" is there. `waits`: what was copied back, or there without non_blocking."""

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.waits: list[tuple[int, ...]] = []
        self.counts_are_read = False  # batch normalisation without a momentum reads its own count

    def __enter__(self):
        self.lazy_init, torch.cuda._lazy_init = torch.cuda._lazy_init, lambda: None
        torch._C._ensureCUDADeviceGuardSet()
        return super().__enter__()

    def __exit__(self, *error):
        torch.cuda._lazy_init = self.lazy_init
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        fakes = [x for x in tensors if isinstance(x, FakeTensor)]
        target = kwargs.get("device")
        target = None if target is None else torch.device(target).type
        if not fakes and target != "cuda":
            return function(*args, **kwargs)
        if function in READS:
            if self.counts_are_read:
                return 1
            raise RuntimeError("a value on the device is read, which waits for it")
        if function in FUSED_SGD:
            return _check_layout(*args[:3])
        if function is aten.bincount.default:  # it reads the largest value
            raise RuntimeError("bincount waits for the device")
        real = [x for x in tensors if not isinstance(x, FakeTensor) and x.dim() > 0]
        if real and function not in (*COPIES, aten.index.Tensor):
            shapes = [tuple(x.shape) for x in real]
            raise RuntimeError(f"{function}: tensors {shapes} of the CPU meet some of the device")
        with self.fake:
            args, kwargs = tree_map_only(torch.Tensor, self._faked, (args, kwargs))
            result = function(*args, **kwargs)
        if function in COPIES and not fakes and not kwargs.get("non_blocking"):
            self.waits.append(tuple(result.shape))
        if function in COPIES and target == "cpu":
            self.waits.append(tuple(result.shape))
            return torch.zeros(result.shape, dtype=result.dtype)
        return result

    def _faked(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor)


class FakeAppleGpu(FakeCuda):
    """Refuses what an Apple GPU lacks, float64, and what it does wrong: copies without a wait.

    `cifar_lib.hardware.APPLE_GPU` must name this device, "cuda".
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        there = torch.device(kwargs.get("device") or "cpu").type == "cuda"
        if there and function in COPIES and kwargs.get("non_blocking"):
            raise RuntimeError(f"{function}: a copy that isn't waited for")
        result = super().__torch_dispatch__(function, types, args, kwargs)
        for x in tree_leaves((args, kwargs, result)):
            if isinstance(x, FakeTensor) and x.device.type == "cuda" and x.dtype == torch.float64:
                raise TypeError(f"{function}: an Apple GPU has no float64")
        return result


def _check_layout(parameters, gradients, momenta) -> None:
    """What the fused optimizer needs: one type, device and layout for what belongs together."""
    for parameter, *others in zip(parameters, gradients, momenta, strict=True):
        for other in others:
            assert other.dtype == parameter.dtype and other.device == parameter.device
            sizes = zip(parameter.shape, parameter.stride(), other.stride(), strict=True)
            assert all(ours == theirs for n, ours, theirs in sizes if n > 1)
