"""Training, to be read from the top: the loss, the state, a step, an epoch."""

import copy
import json
import math
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from cifar_lib import ranks
from cifar_lib.augment import Draws, augment, draw, random_stream
from cifar_lib.data import CLASSES, ImageSet, apply_scale, scale_and_shift
from cifar_lib.errors import InputError, explained
from cifar_lib.hardware import computing, memory_format
from cifar_lib.model import ResNet
from cifar_lib.recipes import TrainConfig, learning_rate

# Batches augmented at once: enough to group images by operation; on a CPU few enough for its cache.
BLOCK = {"cpu": 32, "cuda": 128, "mps": 128}
Plan = tuple[Tensor, Draws]  # of an epoch: the order of its images, and their augmentation
CHECK_EVERY = 50  # steps between two looks at a GPU's running loss, each of which waits for it


def smooth_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """The report's loss, averaged over images: -sum w log p, with w = 1 - s on the true class and
    s / (C - 1) on each other one; logits (b, C), labels int64 (b,)."""
    classes = logits.shape[1]  # torch spreads its smoothing over all of them, the true one too
    return F.cross_entropy(logits, labels, label_smoothing=smoothing * classes / (classes - 1))


class State:
    """What a checkpoint holds: all that changes while training."""

    def __init__(self, config: TrainConfig, device: torch.device):
        """Before the first step, with random weights by the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = ResNet(config.blocks, config.channels, len(CLASSES))
        self.model = model.to(device, memory_format=memory_format(device))
        parameters = list(self.model.parameters())
        with explained("the optimizer's settings", "nesterov needs a momentum above 0", ValueError):
            self.optimizer = torch.optim.SGD(
                parameters,
                lr=config.learning_rate,
                momentum=config.momentum,
                nesterov=config.nesterov,
                weight_decay=config.weight_decay,
                fused=device.type in ("cuda", "cpu"),
            )
        if config.momentum:  # the fused step leaves them unset where a first fp16 step overflows
            for parameter in parameters:
                self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.epoch = 0  # epochs done, as many as there are rows
        self.history: list[dict] = []

    def _momenta(self) -> list[Tensor]:
        return [state["momentum_buffer"] for state in self.optimizer.state.values()]

    def content(self) -> dict:
        """A copy of everything, on the CPU. No text is in it twice: whether pickle writes it again
        depends on how it came about, and equal states should be equal bytes."""
        model = self.model.state_dict()
        return {
            "model": {name: value.to("cpu", copy=True) for name, value in model.items()},
            "momenta": [buffer.to("cpu", copy=True) for buffer in self._momenta()],
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "history": json.dumps(self.history),
        }

    def load(self, saved: dict) -> None:
        """Go on from a `content`; raises InputError where it is another configuration's."""
        what = "run directory: its checkpoint is not of this run"
        with explained(what, "choose another directory", Exception):  # whatever another's raises
            self.model.load_state_dict(saved["model"])
            for ours, theirs in zip(self._momenta(), saved["momenta"], strict=True):
                ours.copy_(theirs)
            self.scaler.load_state_dict(saved["scaler"])
            self.history = [dict(row) for row in json.loads(saved["history"])]
            self.epoch = len(self.history)


class Step:
    """Updates `state` by one batch after another. On a GPU nothing in it waits for a result."""

    def __init__(self, state: State, config: TrainConfig, log: Callable[[str], None] = print):
        """`config` with its precision and `compile` resolved, as `fit` does."""
        self.state, self.config, self.log = state, config, log
        self.device = state.model.conv1.weight.device
        self.scale, self.shift = scale_and_shift(config.mean, config.std, self.device)
        self.totals = torch.zeros(3, device=self.device)  # loss, right answers, images of the epoch
        self.network = DistributedDataParallel(state.model) if config.ranks > 1 else state.model
        self.fast = self._compiled() if config.compile else self.loss

    def __call__(self, images: Tensor, labels: Tensor, rate: float, half_size: bool) -> None:
        """One update from uint8 images (b, 3, 32, 32), averaged down to 16x16 if `half_size`, and
        labels int64 (b,), both on the device."""
        optimizer, scaler = self.state.optimizer, self.state.scaler
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss_of = self.fast if len(labels) == self.config.batch_size else self.loss
        loss, right = loss_of(images, labels, half_size)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        loss, n = loss.detach(), torch.full_like(loss, len(labels))
        self.totals += torch.stack([loss * n, right.to(loss.dtype), n])

    def loss(self, images: Tensor, labels: Tensor, half_size: bool) -> tuple[Tensor, Tensor]:
        """Mean loss and number of right images."""
        inputs = apply_scale(images, self.scale, self.shift)  # float32 (b, 3, 32, 32)
        if half_size:
            inputs = F.avg_pool2d(inputs, 2)
        with computing(self.device, self.config.precision):
            logits = self.network(inputs)  # (b, 10)
            loss = smooth_cross_entropy(logits, labels, self.config.label_smoothing)
        return loss, (logits.detach().argmax(1) == labels).sum()

    def _compiled(self) -> Callable:
        """`loss` compiled for whole batches; as written, with a message, where that fails."""
        self.log("compiling the training step, which takes a minute or two")
        # On a GPU this mode captures CUDA graphs: launching a kernel takes longer than most run.
        mode = "reduce-overhead" if self.device.type == "cuda" else "default"
        fast = torch.compile(self.loss, mode=mode, dynamic=False, fullgraph=True)
        n = self.config.batch_size
        images = torch.zeros(n, 3, 32, 32, dtype=torch.uint8, device=self.device)
        labels = torch.zeros(n, dtype=torch.int64, device=self.device)
        state_dict = copy.deepcopy(self.state.model.state_dict())
        try:
            for half_size in {self.state.epoch < self.config.half_size_epochs, False}:
                for _ in range(3):  # a CUDA graph is captured in the second, replayed in the third
                    self.state.optimizer.zero_grad()
                    fast(images, labels, half_size)[0].backward()
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            self.log(f"compiling doesn't work here ({reason}): going on without")
            fast = self.loss
        self.state.model.load_state_dict(state_dict)  # its batch statistics
        return fast

    def check(self, i: int) -> tuple[float, float]:
        """Mean loss and accuracy of the epoch up to step i; InputError where it isn't finite."""
        loss, right, images = self.totals.tolist()
        if not math.isfinite(loss):
            when = f"at epoch {self.state.epoch}, step {i}; the last checkpoint stays"
            remedy = "lower the learning rate (--set learning_rate=...) in a new run directory"
            raise InputError(f"training diverged: the loss is not finite {when}: {remedy}")
        return loss / images, right / images


def epoch_plan(config: TrainConfig, n: int, epoch: int) -> Plan:
    """The order of the n images in an epoch, int64 (n,), and the draws of their augmentation."""
    order = torch.randperm(n, generator=random_stream(config.seed, epoch, purpose=1))
    return order, draw(n, config.policy, config.seed, epoch)


def epoch_batches(
    train: ImageSet, config: TrainConfig, plan: Plan, rank: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented uint8 images (b, 3, 32, 32) and labels (b,): what `rank` takes of each batch."""
    order, draws = plan
    for block in order.split(BLOCK[train.images.device.type] * config.batch_size):
        shares = [batch[rank :: config.ranks] for batch in block.split(config.batch_size)]
        chosen = torch.cat(shares)
        part = train[chosen]
        images = augment(part.images, config.policy, draws[chosen])
        sizes = [len(share) for share in shares]
        yield from zip(images.split(sizes), part.labels.split(sizes), strict=True)


def train_one_epoch(step: Step, train: ImageSet, plan: Plan, bar: tqdm) -> tuple[float, float]:
    """One pass over `train`: the mean loss and the accuracy over its augmented images; InputError
    when the loss is not finite, on a GPU up to CHECK_EVERY steps later."""
    state, config = step.state, step.config
    steps = math.ceil(len(train) / config.batch_size)
    half_size = state.epoch < min(config.half_size_epochs, config.epochs - 1)
    step.totals.zero_()
    state.model.train()
    for i, (images, labels) in enumerate(epoch_batches(train, config, plan, ranks.rank())):
        step(images, labels, learning_rate(config, state.epoch + i / steps), half_size)
        if step.device.type != "cuda" or i % CHECK_EVERY == 0:
            loss, right = step.check(i)
            bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{right:.1%}", refresh=False)
        bar.update(len(labels) * config.ranks)
    if config.ranks > 1:
        dist.all_reduce(step.totals)
    return step.check(steps - 1)
