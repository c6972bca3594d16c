"""Training, to be read from the top: the loss, what training changes, one step, one epoch."""

import json
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from cifar_lib.augment import Draws, augment, draw, random_stream
from cifar_lib.compiled import compile_loss
from cifar_lib.data import CLASSES, ImageSet, rescale
from cifar_lib.errors import InputError, explained
from cifar_lib.hardware import computing, memory_format
from cifar_lib.model import ResNet
from cifar_lib.recipes import TrainConfig, learning_rate

# Batches that are augmented together: enough to group their images by operation, and on a CPU few
# enough for its cache.
BATCHES_TOGETHER = {"cpu": 32, "cuda": 128, "mps": 128}
LOOK_EVERY = 50  # steps between two looks at a GPU's running loss, each of which waits for it


def smooth_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Return the report's loss: cross-entropy with label smoothing, averaged over the images.

    logits (b, C), labels int64 (b,) -> a tensor of no dimensions. For each image it is
    -sum over classes of w log p, with w = 1 - s for the true class and s / (C - 1) for each other.
    """
    # PyTorch spreads its smoothing over all C classes, the true one too.
    classes = logits.shape[1]
    return F.cross_entropy(logits, labels, label_smoothing=smoothing * classes / (classes - 1))


class State:
    """All that training changes, and so all that a checkpoint holds."""

    def __init__(self, config: TrainConfig, device: torch.device):
        """Start before the first step, with random weights by the configuration's seed."""
        # The network.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = ResNet(config.blocks, config.channels, len(CLASSES))
        self.model = model.to(device, memory_format=memory_format(device))

        # The optimizer.
        parameters = list(self.model.parameters())
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

        # In fp16 small gradients would become 0: the loss is scaled up for them. Elsewhere the
        # scaler does nothing.
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")

        # One row per epoch that is done.
        self.history: list[dict] = []

    def content(self) -> dict:
        """Return a copy of everything, on the CPU.

        The history is stored as JSON: pickle writes a text that occurs twice in one of two ways,
        and equal states should be equal bytes.
        """
        model = self.model.state_dict()
        return {
            "model": {name: value.to("cpu", copy=True) for name, value in model.items()},
            "momenta": [buffer.to("cpu", copy=True) for buffer in self._momenta()],
            "scaler": self.scaler.state_dict(),
            "history": json.dumps(self.history),
        }

    def load(self, saved: dict) -> None:
        """Go on from what `content` returned.

        Raises InputError if it is another configuration's.
        """
        what = "run directory: its checkpoint isn't of this run"
        another_run = (KeyError, TypeError, AttributeError, ValueError, RuntimeError)
        with explained(what, "choose another directory", *another_run):
            self.model.load_state_dict(saved["model"])
            for buffer, stored in zip(self._momenta(), saved["momenta"], strict=True):
                buffer.copy_(stored)
            self.scaler.load_state_dict(saved["scaler"])
            self.history = [dict(row) for row in json.loads(saved["history"])]

    def _momenta(self) -> list[Tensor]:
        return [state["momentum_buffer"] for state in self.optimizer.state.values()]


class Step:
    """Updates the weights of a `State` by one batch after another."""

    def __init__(self, state: State, config: TrainConfig, log: Callable[[str], None] = print):
        """`config` has its precision and `compile` resolved, as `fit.resolve` does."""
        self.state, self.config = state, config
        self.device = state.model.conv1.weight.device
        self.scale, self.offset = config.normalization.scale_and_offset(self.device)
        self.loss = self.plain_loss
        if config.compile:  # for the image sizes that are still to come
            half_sizes = {len(state.history) < config.half_size_epochs, False}
            batch_size = config.batch_size
            self.loss = compile_loss(self.plain_loss, state.model, batch_size, half_sizes, log)

    def __call__(
        self, images: Tensor, labels: Tensor, rate: float, half_size: bool
    ) -> tuple[Tensor, Tensor]:
        """Update the weights by one batch, at the learning rate `rate`.

        images: uint8 (b, 3, 32, 32), augmented; labels: int64 (b,); both on the network's device.
        half_size: whether they are averaged down to 16x16.

        Returns the batch's mean loss and its number of correctly labelled images, before the
        update. They stay on the device: a GPU goes on without waiting for them to be read.
        """
        optimizer, scaler = self.state.optimizer, self.state.scaler
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()

        # Forward.
        loss, correct = self.loss(images, labels, half_size)

        # Backward, and update the weights.
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach(), correct

    def plain_loss(self, images: Tensor, labels: Tensor, half_size: bool) -> tuple[Tensor, Tensor]:
        """Return the mean loss of a batch, and its number of correctly labelled images."""
        inputs = rescale(images, self.scale, self.offset)  # float32 (b, 3, 32, 32)
        if half_size:
            inputs = F.avg_pool2d(inputs, 2)  # (b, 3, 16, 16)
        with computing(self.device, self.config.precision):
            logits = self.state.model(inputs)  # (b, 10)
            loss = smooth_cross_entropy(logits, labels, self.config.label_smoothing)
        return loss, (logits.detach().argmax(1) == labels).sum()


def train_one_epoch(
    step: Step,
    train: ImageSet,
    epoch: int,
    plan: "EpochPlan | None" = None,
    bar: tqdm | None = None,
) -> tuple[float, float]:
    """Train on each image of `train` once; `epoch` counts from 0.

    `plan` is the epoch's random numbers, where they have been drawn before; `bar` shows progress.

    Returns the mean loss and the accuracy over the augmented images.

    Raises InputError when the loss isn't finite; on a GPU up to LOOK_EVERY steps later.
    """
    config = step.config
    plan = plan or plan_epoch(config, len(train), epoch)
    steps = math.ceil(len(train) / config.batch_size)
    half_size = epoch < min(config.half_size_epochs, config.epochs - 1)
    totals = Totals(step.device)
    step.state.model.train()

    for i, (images, labels) in enumerate(epoch_batches(train, config, plan)):
        rate = learning_rate(config, epoch + i / steps)
        loss, correct = step(images, labels, rate, half_size)
        totals.add(loss, correct, len(labels))

        # Look at the running means now and then: reading them waits for a GPU.
        if step.device.type != "cuda" or i % LOOK_EVERY == 0:
            loss, accuracy = totals.means()
            _refuse_divergence(loss, epoch, i)
            if bar is not None:
                bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.1%}", refresh=False)
        if bar is not None:
            bar.update(len(labels))

    loss, accuracy = totals.means()
    _refuse_divergence(loss, epoch, steps - 1)
    return loss, accuracy


class Totals:
    """Loss and correctly labelled images, summed over an epoch on the device itself."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(3, device=device)  # of the loss, of correct images, of images

    def add(self, loss: Tensor, correct: Tensor, n: int) -> None:
        """Add a batch of n images, its mean loss and how many of them are correct."""
        images = torch.full_like(loss, n)
        self.sums += torch.stack([loss * images, correct.to(loss.dtype), images])

    def means(self) -> tuple[float, float]:
        """Return the mean loss and the accuracy of all images up to now."""
        loss, correct, images = self.sums.tolist()
        return loss / images, correct / images


def _refuse_divergence(loss: float, epoch: int, step: int) -> None:
    if not math.isfinite(loss):
        when = f"at epoch {epoch}, step {step}; the last checkpoint stays"
        remedy = "lower the learning rate (--set learning_rate=...) in a new run directory"
        raise InputError(f"training diverged: the loss is not finite {when}: {remedy}")


# An epoch's batches.


class EpochPlan(NamedTuple):
    """The random numbers of one epoch over n images."""

    order: Tensor  # int64 (n,): the positions of the images, shuffled
    draws: Draws  # how each image, by its position, is augmented


def plan_epoch(config: TrainConfig, n: int, epoch: int) -> EpochPlan:
    """Draw the random numbers of an epoch over n images, by the configuration's seed."""
    order = torch.randperm(n, generator=random_stream(config.seed, epoch, purpose=1))
    return EpochPlan(order, draw(n, config.policy, config.seed, epoch))


def epoch_batches(
    train: ImageSet, config: TrainConfig, plan: EpochPlan
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield augmented uint8 images (b, 3, 32, 32) and labels int64 (b,), on the images' device."""
    together = BATCHES_TOGETHER[train.images.device.type] * config.batch_size
    for positions in plan.order.split(together):
        part = train[positions]
        images = augment(part.images, config.policy, plan.draws[positions])
        yield from zip(
            images.split(config.batch_size), part.labels.split(config.batch_size), strict=True
        )
