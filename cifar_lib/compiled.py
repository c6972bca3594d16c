"""The training loss, compiled by torch.compile, or the plain loss if compiling doesn't work.

Training can be understood without this module: the compiled loss computes what the plain one,
`train.Step.plain_loss`, computes, but faster on a GPU.
"""

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

# A function of images uint8 (b, 3, 32, 32), labels int64 (b,) and whether to halve the images'
# size. It returns the mean loss and the number of correctly classified images.
Loss = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]
# PyTorch captures a CUDA graph in the second call and replays it from the third on.
DRY_RUNS = 3


def compile_loss(
    plain: Loss,
    model: nn.Module,
    batch_size: int,
    half_sizes: Iterable[bool],
    log: Callable[[str], None] = print,
) -> Loss:
    """Return a compiled version of `plain`, the loss of `model`.

    It is compiled for batches of `batch_size` images, and for those values of the third argument,
    `half_size`, that are in `half_sizes`. For a batch of another size it calls `plain`. If
    compiling fails, `log` is told why, and `plain` itself is returned. Either way the model's
    weights and statistics are the same as before.
    """
    log("compiling the training step, which takes a minute or two")
    # On a GPU this mode captures CUDA graphs, which start many kernels at once. Starting them one
    # by one would take longer than most of them run.
    on_gpu = next(model.parameters()).device.type == "cuda"
    mode = "reduce-overhead" if on_gpu else "default"
    fast = torch.compile(plain, mode=mode, dynamic=False, fullgraph=True)

    # Compiling happens in the first calls, so make them now. The calls change the statistics of the
    # model's batch norms, so put the old ones back afterwards.
    before = copy.deepcopy(model.state_dict())
    try:
        for half_size in half_sizes:
            _dry_run(fast, model, batch_size, half_size)
    except Exception as error:  # of any kind, also if there is no compiler
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        log(f"compiling doesn't work here ({reason}): continuing without it")
        return plain
    finally:
        model.load_state_dict(before)

    def loss(images: Tensor, labels: Tensor, half_size: bool) -> tuple[Tensor, Tensor]:
        is_whole = len(labels) == batch_size
        return (fast if is_whole else plain)(images, labels, half_size)

    return loss


def _dry_run(fast: Loss, model: nn.Module, batch_size: int, half_size: bool) -> None:
    """Run `fast` forward and backward on black images, as training will, without an update."""
    device = next(model.parameters()).device
    images = torch.zeros(batch_size, 3, 32, 32, dtype=torch.uint8, device=device)
    labels = torch.zeros(batch_size, dtype=torch.int64, device=device)
    for _ in range(DRY_RUNS):
        model.zero_grad()
        fast(images, labels, half_size)[0].backward()
