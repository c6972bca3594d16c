"""A training loss through torch.compile: tried out before it is used, and done without if need be.

Not needed to understand training: it computes what `train.Step.plain_loss` says, faster on a GPU.
"""

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

# From images uint8 (b, 3, 32, 32), labels int64 (b,) and whether to halve the images' size, to the
# mean loss and the number of correctly labelled images.
Loss = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]
DRY_RUNS = 3  # a CUDA graph is captured in the second and replayed in the third


def compile_loss(
    plain: Loss,
    model: nn.Module,
    batch_size: int,
    half_sizes: Iterable[bool],
    log: Callable[[str], None] = print,
) -> Loss:
    """Return the loss `plain` of `model` compiled for whole batches; a smaller one goes by `plain`.

    It is compiled for each of `half_sizes`. Where that fails, `log` says so, and `plain` itself is
    returned. The model's weights and statistics are those of before, whatever was tried.
    """
    log("compiling the training step, which takes a minute or two")
    # On a GPU this mode captures CUDA graphs: launching a kernel takes longer than most run.
    on_gpu = next(model.parameters()).device.type == "cuda"
    mode = "reduce-overhead" if on_gpu else "default"
    fast = torch.compile(plain, mode=mode, dynamic=False, fullgraph=True)

    before = copy.deepcopy(model.state_dict())
    try:
        for half_size in half_sizes:
            _dry_run(fast, model, batch_size, half_size)
    except Exception as error:  # whatever a compiler raises, or its absence
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        log(f"compiling doesn't work here ({reason}): going on without")
        return plain
    finally:
        model.load_state_dict(before)

    def loss(images: Tensor, labels: Tensor, half_size: bool) -> tuple[Tensor, Tensor]:
        is_whole = len(labels) == batch_size
        return (fast if is_whole else plain)(images, labels, half_size)

    return loss


def _dry_run(fast: Loss, model: nn.Module, batch_size: int, half_size: bool) -> None:
    """Go forward and backward with black images, as training will, without an update."""
    device = next(model.parameters()).device
    images = torch.zeros(batch_size, 3, 32, 32, dtype=torch.uint8, device=device)
    labels = torch.zeros(batch_size, dtype=torch.int64, device=device)
    for _ in range(DRY_RUNS):
        model.zero_grad()
        fast(images, labels, half_size)[0].backward()
