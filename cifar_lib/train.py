"""Training, to be read from the top: the loss, the state, a step, an epoch."""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from cifar_lib import ranks
from cifar_lib.augment import Draws, augment, draw, random_stream
from cifar_lib.data import CLASSES, ImageSet, apply_scale, scale_and_shift
from cifar_lib.errors import InputError
from cifar_lib.hardware import computing
from cifar_lib.model import ResNet
from cifar_lib.recipes import TrainConfig, learning_rate

# Batches augmented at once: enough to group images by operation; on a CPU few enough for its cache.
BLOCK = {"cpu": 32, "cuda": 128, "mps": 128}
CHECK_EVERY = 50  # steps between two looks at a GPU's running loss, each of which waits for it
# Steps an epoch that fp16 may skip: GradScaler starts at 2^16 and halves it with each overflow.
OVERFLOWS = 20


def smooth_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """The report's loss, averaged over images: -sum w log p, with w = 1 - s on the true class and
    s / (C - 1) on each other one; logits (b, C), labels int64 (b,).

    torch spreads its smoothing over all C classes, the true one too: the same loss has s C / (C -
    1) there.
    """
    classes = logits.shape[1]
    return F.cross_entropy(logits, labels, label_smoothing=smoothing * classes / (classes - 1))


@dataclass
class State:
    """What a checkpoint holds: all that changes while training."""

    model: ResNet
    optimizer: torch.optim.SGD
    scaler: torch.amp.GradScaler  # does nothing but in fp16
    ema: ResNet | None  # the average of the weights over steps
    epoch: int = 0  # epochs done
    steps: int = 0  # updates done
    history: list[dict] = field(default_factory=list)

    @classmethod
    def new(
        cls, config: TrainConfig, device: torch.device, start: dict[str, Tensor] | None = None
    ) -> "State":
        """Before the first step: random weights by the seed, or those of `start`, a state_dict."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = ResNet(config.blocks, config.channels, len(CLASSES))
        if start is not None:
            model.load_state_dict(start)
        model = model.to(device, memory_format=torch.channels_last)
        decayed = [p for p in model.parameters() if config.decay_all or p.ndim > 1]
        exempt = [p for p in model.parameters() if not config.decay_all and p.ndim <= 1]
        groups = [{"params": decayed}]
        if exempt:
            groups.append({"params": exempt, "weight_decay": 0.0})
        optimizer = torch.optim.SGD(
            groups,
            lr=config.learning_rate,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
            fused=device.type in ("cuda", "cpu"),
        )
        if config.momentum:  # the fused step leaves them unset where a first fp16 step overflows
            for parameter in model.parameters():
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        ema = copy.deepcopy(model).requires_grad_(False) if config.ema_decay else None
        scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        return cls(model, optimizer, scaler, ema)

    def content(self) -> dict:
        """A copy of everything, on the CPU, that later steps leave alone."""
        parts = {name: getattr(self, name) for name in ("model", "optimizer", "scaler", "ema")}
        saved = {name: part.state_dict() for name, part in parts.items() if part is not None}
        return {
            **copy_to_cpu(saved),
            "epoch": self.epoch,
            "steps": self.steps,
            "history": list(self.history),
        }

    def load(self, saved: dict) -> None:
        for name in ("model", "optimizer", "scaler", "ema"):
            if name in saved:
                getattr(self, name).load_state_dict(saved[name])
        self.epoch, self.steps, self.history = saved["epoch"], saved["steps"], saved["history"]

    @property
    def final_model(self) -> ResNet:
        """The weights that are evaluated and kept: the averaged ones where there are some."""
        return self.ema if self.ema is not None else self.model


def copy_to_cpu(value: object) -> object:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copy_to_cpu(item) for key, item in value.items()}
    return [copy_to_cpu(item) for item in value] if isinstance(value, list) else value


class Step:
    """Updates `state` by one batch after another; `check` says how the epoch goes.

    On a GPU nothing in it waits for a result.
    """

    def __init__(self, state: State, config: TrainConfig, log: Callable[[str], None] = print):
        """`config` with its precision and `compile` resolved, as `fit` does."""
        self.state, self.config, self.log = state, config, log
        self.device = state.model.conv1.weight.device
        self.scale, self.shift = scale_and_shift(config.mean, config.std, self.device)
        # Sums over the epoch: loss and right answers of images, images, steps; of finite losses.
        self.totals = torch.zeros(4, device=self.device)
        self.network: nn.Module = state.model
        if config.ranks > 1:
            self.network = DistributedDataParallel(state.model)
        self.fast: Callable | None = None
        self.rehearsed: set[bool] = set()  # image sizes that are compiled, by half_size
        if config.compile:
            # On a GPU this mode captures CUDA graphs: launching each kernel takes longer than most
            # of them run.
            mode = "reduce-overhead" if self.device.type == "cuda" else "default"
            self.fast = torch.compile(self.loss, mode=mode, dynamic=False, fullgraph=True)

    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        rate: float,
        half_size: bool = False,
        share: float = 1.0,
    ) -> None:
        """One update from uint8 images (b, 3, 32, 32) and labels int64 (b,), both on the device.

        `half_size`: the images averaged down to 16x16. `share`: the factor of this rank's gradient,
        where the ranks hold different numbers of a batch's images.
        """
        state, optimizer = self.state, self.state.optimizer
        whole = len(labels) == self.config.batch_size
        if self.fast is not None and whole and half_size not in self.rehearsed:
            self._rehearse(images, labels, half_size)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss_of = self.fast if self.fast is not None and whole else self.loss
        loss, right = loss_of(images, labels, half_size)
        state.scaler.scale(loss * share).backward()
        state.scaler.step(optimizer)
        state.scaler.update()
        if state.ema is not None:
            average(state.ema, state.model, self.config.ema_decay if state.steps else 0.0)
        state.steps += 1
        loss, n = loss.detach(), torch.full_like(loss, len(labels))
        sums = torch.stack([loss * n, right.to(loss.dtype), n, torch.ones_like(loss)])
        self.totals += torch.where(loss.isfinite(), sums, 0.0)

    def loss(self, images: Tensor, labels: Tensor, half_size: bool) -> tuple[Tensor, Tensor]:
        """Mean loss and number of right images."""
        inputs = apply_scale(images, self.scale, self.shift)  # float32 (b, 3, 32, 32)
        if half_size:
            inputs = F.avg_pool2d(inputs, 2)
        with computing(self.device, self.config.precision):
            logits = self.network(inputs)  # (b, 10)
            loss = smooth_cross_entropy(logits, labels, self.config.label_smoothing)
        return loss, (logits.detach().argmax(1) == labels).sum()

    def check(self, steps: int) -> tuple[float, float]:
        """Mean loss and accuracy over the epoch's images so far, after this many steps.

        Waits for the device. Raises InputError where losses were not finite.
        """
        loss, right, images, finite = self.totals.tolist()
        if finite < steps - (OVERFLOWS if self.state.scaler.is_enabled() else 0):
            raise InputError(
                f"training diverged: the loss is not finite at epoch {self.state.epoch}, step "
                f"{int(finite)}; the last checkpoint stays: lower the learning rate "
                "(--set learning_rate=...) in a new run directory"
            )
        return loss / max(images, 1), right / max(images, 1)

    def _rehearse(self, images: Tensor, labels: Tensor, half_size: bool) -> None:
        """Compile for images of this size by passes that change nothing: what goes wrong here costs
        a message, and training goes on as written."""
        self.log("compiling the training step, which takes a minute or two")
        buffers = [(buffer, buffer.clone()) for buffer in self.state.model.buffers()]
        try:
            for _ in range(3):  # a CUDA graph is captured in the second and replayed in the third
                self.state.optimizer.zero_grad()
                loss, _ = self.fast(images, labels, half_size)
                loss.backward()
            self.rehearsed.add(half_size)
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            self.log(f"compiling doesn't work here ({reason}): going on without")
            self.fast = None
        for buffer, before in buffers:
            buffer.copy_(before)


@torch.no_grad()
def average(averaged: nn.Module, model: nn.Module, decay: float) -> None:
    """averaged = decay averaged + (1 - decay) model, for weights and batch statistics."""
    olds, news = ([*m.parameters(), *m.buffers()] for m in (averaged, model))
    floating = [i for i, tensor in enumerate(olds) if tensor.is_floating_point()]
    torch._foreach_lerp_([olds[i] for i in floating], [news[i] for i in floating], 1 - decay)


def epoch_plan(config: TrainConfig, n: int, epoch: int) -> tuple[Tensor, Draws]:
    """The order of the n images in an epoch, int64 (n,), and the draws of their augmentation."""
    order = torch.randperm(n, generator=random_stream(config.seed, epoch, purpose=1))
    return order, draw(n, config.policy, config.seed, epoch)


def epoch_batches(
    train: ImageSet, config: TrainConfig, plan: tuple[Tensor, Draws], rank: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented uint8 images (b, 3, 32, 32) and labels (b,), batch by batch: those of each batch
    that `rank` takes."""
    order, draws = plan
    for block in order.split(BLOCK[train.images.device.type] * config.batch_size):
        shares = [batch[rank :: config.ranks] for batch in block.split(config.batch_size)]
        chosen = torch.cat(shares)
        part = train[chosen]
        images = augment(part.images, config.policy, draws[chosen])
        sizes = [len(share) for share in shares]
        yield from zip(images.split(sizes), part.labels.split(sizes), strict=True)


def train_one_epoch(
    step: Step, train: ImageSet, config: TrainConfig, plan: tuple[Tensor, Draws], bar: tqdm
) -> tuple[float, float]:
    """One pass over `train`; returns the mean loss and the accuracy over its augmented images.

    Raises InputError when the loss is not finite, on a GPU up to 50 steps later.
    """
    state = step.state
    steps = math.ceil(len(train) / config.batch_size)
    half_size = state.epoch < min(config.half_size_epochs, config.epochs - 1)
    step.totals.zero_()
    state.model.train()
    for i, (images, labels) in enumerate(epoch_batches(train, config, plan, ranks.rank())):
        whole = min(config.batch_size, len(train) - i * config.batch_size)
        rate = learning_rate(config, state.epoch + i / steps)
        step(images, labels, rate, half_size, share=len(labels) * config.ranks / whole)
        if step.device.type != "cuda" or i % CHECK_EVERY == 0:
            loss, right = step.check(i + 1)
            bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{right:.1%}", refresh=False)
        bar.update(whole)
    if config.ranks > 1:
        dist.all_reduce(step.totals)
    return step.check(steps * config.ranks)
