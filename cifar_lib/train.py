"""Training, to be read from the top: the loss, the state, one step, one epoch."""

import json
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from cifar_lib.augment import SHUFFLING, Draws, augment, draw, random_stream
from cifar_lib.averaging import MovingAverage
from cifar_lib.compiled import compile_loss
from cifar_lib.data import CLASSES, ImageSet, rescale
from cifar_lib.errors import InputError, explained
from cifar_lib.hardware import computing, memory_format
from cifar_lib.model import ResNet
from cifar_lib.padding import Tensors, cut, pad, pad_network, shapes
from cifar_lib.recipes import TrainConfig, learning_rate

# How many batches are augmented in one call. Images with the same augmentation operation are
# changed together: more batches make larger groups, but too many don't fit into a CPU's cache.
BATCHES_TOGETHER = {"cpu": 16, "cuda": 128, "mps": 128}
# Reading the running loss makes the program wait for the GPU. On CUDA, where steps are short, the
# loss is read once in this many steps.
LOOK_EVERY = 50


def smooth_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Return cross-entropy with label smoothing as the student report defines it (see README.md).

    logits (b, C), labels int64 (b,) -> a scalar tensor, the mean over the images. With s the
    smoothing, an image's loss is the sum of -w log p over the classes, where w is 1 - s for the
    true class and s / (C - 1) for each other one.
    """
    # PyTorch's smoothing t gives t / C to every class, the true one too: for s / (C - 1) it takes
    # t = s C / (C - 1), which leaves 1 - s for the true class.
    classes = logits.shape[1]
    return F.cross_entropy(logits, labels, label_smoothing=smoothing * classes / (classes - 1))


class State:
    """All that training changes, and so all that a checkpoint holds."""

    def __init__(self, config: TrainConfig, device: torch.device, channel_multiple: int = 1):
        """Make the state before the first step. The configuration's seed fixes the weights.

        channel_multiple: the network is trained with its channels padded to a multiple of this,
        which some hardware computes faster. What `network` and `content` return has the
        configuration's own channels.
        """
        # Draw the weights. fork_rng gives the caller's random numbers back as they were.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = ResNet(config.blocks, config.channels, len(CLASSES))
            self.config, self.shapes = config, shapes(model)
            model = pad_network(model, channel_multiple)
        self.model = model.to(device, memory_format=memory_format(device))

        # The moving average of the weights, if the run is to end with it.
        decay = config.ema_decay
        self.average = MovingAverage(self.model, decay) if decay else None

        # The optimizer; `fused` updates all parameters in one kernel.
        parameters = list(self.model.parameters())
        self.optimizer = torch.optim.SGD(
            parameters,
            lr=config.learning_rate,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
            fused=device.type in ("cuda", "cpu"),
        )
        # Create the momentum buffers now: a first fp16 step that overflows is skipped, and a
        # checkpoint after it would lack them. Zeros give the same first step, 0 plus the gradient.
        if config.momentum:
            for parameter in parameters:
                self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

        # In fp16 small gradients would become 0, so the loss is multiplied first and the gradients
        # are divided again. In other precisions the scaler does nothing.
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")

        # One row per finished epoch, with the columns of history.csv; `fit` adds them.
        self.history: list[dict] = []

    def network(self) -> ResNet:
        """Return a copy of the trained network, with the channels of the configuration.

        It has the moving average of the weights, if the configuration asks for one. The copy is in
        training mode; `predict` switches it to evaluation.
        """
        trained = self.model if self.average is None else self.average.model
        tensors = cut(trained.state_dict(), self.shapes)
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        with torch.device("meta"):  # a network without weights of its own
            network = ResNet(self.config.blocks, self.config.channels, len(CLASSES))
        network.load_state_dict(copies, assign=True)
        return network

    def content(self) -> dict:
        """Return a copy of everything, on the CPU, for a checkpoint.

        The history is stored as JSON, so that equal states give equal bytes: pickle writes a string
        that occurs twice as a reference only if both are the same object.
        """
        content = {
            "model": self._copied(self.model.state_dict()),
            "momenta": list(self._copied(self._momenta()).values()),
            "scaler": self.scaler.state_dict(),
            "history": json.dumps(self.history),
        }
        if self.average is not None:
            content["average"] = self._copied(self.average.model.state_dict())
        return content

    def load(self, saved: dict) -> None:
        """Restore what `content` returned, whatever padding the network had then.

        Raises InputError if `saved` belongs to another configuration.
        """
        what = "run directory: its checkpoint isn't of this run"
        # A checkpoint of another configuration fails in one of these ways.
        mismatches = (
            LookupError,
            TypeError,
            AttributeError,
            ValueError,
            RuntimeError,
            OverflowError,
        )
        with explained(what, "choose another directory", *mismatches):
            self.model.load_state_dict(self._padded(saved["model"]))
            momenta = self._momenta()
            stored = self._padded(dict(zip(momenta, saved["momenta"], strict=True)))
            for name, buffer in momenta.items():
                if stored[name].shape != buffer.shape:  # copy_ would broadcast
                    raise ValueError(f"the momentum of {name} has another shape")
                buffer.copy_(stored[name])
            if self.average is not None:
                self.average.model.load_state_dict(self._padded(saved["average"]))
            self.scaler.load_state_dict(saved["scaler"])
            self.history = [dict(row) for row in json.loads(saved["history"])]

    def _momenta(self) -> Tensors:
        """Return each parameter's momentum buffer, by the parameter's name."""
        if not self.config.momentum:
            return {}
        buffers = self.optimizer.state
        return {name: buffers[p]["momentum_buffer"] for name, p in self.model.named_parameters()}

    def _copied(self, tensors: Tensors) -> Tensors:
        """Return copies on the CPU, without the padding."""
        own = cut(tensors, self.shapes)
        return {name: tensor.to("cpu", copy=True) for name, tensor in own.items()}

    def _padded(self, tensors: Tensors) -> Tensors:
        """Return the tensors with the padding that this state's network has."""
        return pad(tensors, self.shapes, shapes(self.model))


class Step:
    """Each call trains a `State` on one batch."""

    def __init__(self, state: State, log: Callable[[str], None] = print):
        """Prepare to train `state`, and compile the loss if the configuration says so."""
        self.state, self.config = state, state.config
        config = self.config
        self.device = state.model.conv1.weight.device
        # (x / 255 - mean) / std is written as x * scale - offset, float32 (1, 3, 1, 1) each.
        self.scale, self.offset = config.training_normalization.scale_and_offset(self.device)
        self.loss = self.plain_loss
        if config.compile:
            # The values of `half_size` that are still to come: False, because the last epoch has
            # images of full size, and perhaps True.
            half_sizes = {False, has_half_size(config, len(state.history))}
            batch_size = config.batch_size
            self.loss = compile_loss(self.plain_loss, state.model, batch_size, half_sizes, log)

    def __call__(
        self, images: Tensor, labels: Tensor, rate: float, half_size: bool
    ) -> tuple[Tensor, Tensor]:
        """Update the weights with one batch, at the learning rate `rate`.

        images: uint8 (b, 3, 32, 32), augmented; labels: int64 (b,); both on the network's device.
        half_size: whether the images are averaged down to 16x16.

        Returns the batch's mean loss and its number of correctly classified images before the
        update, two scalar tensors. They stay on the device, so that nothing waits for a GPU.
        """
        optimizer, scaler = self.state.optimizer, self.state.scaler
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()

        # Forward: `plain_loss`, or its compiled version.
        loss, correct = self.loss(images, labels, half_size)

        # Backward, and update the weights.
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if self.state.average is not None:
            self.state.average.update()
        return loss.detach(), correct

    def plain_loss(self, images: Tensor, labels: Tensor, half_size: bool) -> tuple[Tensor, Tensor]:
        """Return the mean loss of a batch, and its number of correctly classified images."""
        inputs = rescale(images, self.scale, self.offset)  # float32 (b, 3, 32, 32)
        if half_size:
            inputs = F.avg_pool2d(inputs, 2)  # (b, 3, 16, 16)
        with computing(self.device, self.config.precision):  # autocast, in bf16 and fp16
            logits = self.state.model(inputs)  # (b, 10)
            loss = smooth_cross_entropy(logits, labels, self.config.label_smoothing)
        return loss, (logits.detach().argmax(1) == labels).sum()


# An epoch's batches.


class EpochPlan(NamedTuple):
    """The random numbers of one epoch over n images.

    The draws belong to positions in the set: how an image is changed doesn't depend on the order.
    """

    order: Tensor  # int64 (n,): the positions of the images, shuffled
    draws: Draws  # how the image at each position is augmented


def plan_epoch(config: TrainConfig, n: int, epoch: int) -> EpochPlan:
    """Draw the random numbers of an epoch over n images from the configuration's seed."""
    order = torch.randperm(n, generator=random_stream(config.seed, epoch, SHUFFLING))
    return EpochPlan(order, draw(n, config.policy, config.seed, epoch))


def epoch_batches(
    train: ImageSet, config: TrainConfig, plan: EpochPlan
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield augmented uint8 images (b, 3, 32, 32) and labels int64 (b,), on the images' device."""
    images_together = BATCHES_TOGETHER[train.images.device.type] * config.batch_size
    for positions in plan.order.split(images_together):
        block = train[positions]
        images = augment(block.images, config.policy, plan.draws[positions])
        batches_of_images = images.split(config.batch_size)
        yield from zip(batches_of_images, block.labels.split(config.batch_size), strict=True)


# An epoch.


def train_one_epoch(
    step: Step,
    train: ImageSet,
    epoch: int,
    plan: EpochPlan | None = None,
    bar: tqdm | None = None,
) -> tuple[float, float]:
    """Train on each image of `train` once; `epoch` counts from 0.

    `plan` holds the epoch's random numbers if they are drawn already; else they are drawn here.
    `bar` shows progress.

    Returns the mean loss and the accuracy on the augmented images. Each batch is measured before
    its own update, so the weights differ from batch to batch.

    Raises InputError once the mean loss isn't finite. On a CUDA GPU this is noticed up to
    LOOK_EVERY steps later.
    """
    config = step.config
    plan = plan_epoch(config, len(train), epoch) if plan is None else plan
    bar = tqdm(disable=True) if bar is None else bar
    steps = math.ceil(len(train) / config.batch_size)
    half_size = has_half_size(config, epoch)
    totals = Totals(step.device)
    step.state.model.train()

    for i, (images, labels) in enumerate(epoch_batches(train, config, plan)):
        rate = learning_rate(config, epoch + i / steps)
        loss, correct = step(images, labels, rate, half_size)
        totals.add(loss, correct, len(labels))

        # Read the running means; on CUDA only now and then (LOOK_EVERY).
        if step.device.type != "cuda" or i % LOOK_EVERY == 0:
            mean_loss, accuracy = totals.means()
            _raise_if_diverged(mean_loss, epoch, i)
            bar.set_postfix(loss=f"{mean_loss:.3f}", accuracy=f"{accuracy:.1%}", refresh=False)
        bar.update(len(labels))

    mean_loss, accuracy = totals.means()
    _raise_if_diverged(mean_loss, epoch, steps - 1)
    return mean_loss, accuracy


def has_half_size(config: TrainConfig, epoch: int) -> bool:
    """Return whether the epoch, counted from 0, sees images at half size.

    The last epoch is always at full size, because prediction is.
    """
    return epoch < min(config.half_size_epochs, config.epochs - 1)


def at_size(model: nn.Module, half_size: bool) -> nn.Module:
    """Return the model itself, or one that first averages its images down to half size.

    It is for evaluating; in training, `Step.plain_loss` averages.
    """
    return nn.Sequential(nn.AvgPool2d(2), model) if half_size else model


class Totals:
    """Loss and correctly classified images, summed over an epoch on the device itself."""

    def __init__(self, device: torch.device):
        # The sums of the loss, of correctly classified images, and of images.
        self.sums = torch.zeros(3, device=device)

    def add(self, loss: Tensor, correct: Tensor, n: int) -> None:
        """Add a batch of n images: its mean loss, and how many are classified correctly."""
        count = torch.full_like(loss, n)
        self.sums += torch.stack([loss * count, correct.to(loss.dtype), count])

    def means(self) -> tuple[float, float]:
        """Return the mean loss and the accuracy over all images so far."""
        loss, correct, count = self.sums.tolist()
        return loss / count, correct / count


def _raise_if_diverged(mean_loss: float, epoch: int, i: int) -> None:
    """Raise InputError if the mean loss is infinite or NaN after step i of the epoch.

    Both are counted from 0 here, and from 1 in the message, as in progress lines.
    """
    if not math.isfinite(mean_loss):
        where = f"epoch {epoch + 1}, step {i + 1}"
        what = f"the loss is not finite at {where} (the last checkpoint is kept)"
        remedy = "lower the learning rate (--set learning_rate=...) in a new run directory"
        raise InputError(f"training diverged: {what}: {remedy}")
