"""One training step, and how it runs: as it is written, compiled, replayed as a CUDA graph, or by
Winograd's way."""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from cifar_lib.data import CLASSES, apply_scale, scale_and_shift
from cifar_lib.errors import InputError
from cifar_lib.hardware import autocast
from cifar_lib.model import ResNet
from cifar_lib.recipes import TrainConfig
from cifar_lib.winograd import Winograd, build

T = TypeVar("T")
MANY_STEPS = 2000  # from here on a minute of compiling pays for itself
SOME_STEPS = 100  # and from here on 20 seconds
WARM_UP = 3  # steps before a CUDA graph is captured: libraries choose their kernels in them
ALIGNMENT = 8  # half-precision kernels read eight channels at once


def smooth_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """The report's loss, averaged over images: -sum w log p, w = 1 - s on the true class and s / (C
    - 1) on the others.

    torch spreads its smoothing over all C classes, the true one too, so the same loss has s C / (C
    - 1) there.
    """
    classes = logits.shape[1]
    return F.cross_entropy(logits, labels, label_smoothing=smoothing * classes / (classes - 1))


def choose_step(config: TrainConfig, device: torch.device, images: int) -> str:
    """`config.step` with `auto` resolved for a run over `images` images an epoch.

    plain: as written. graph: the whole step replayed as one CUDA graph, as launching its kernels
    one by one takes longer than running them. compiled: forward and backward through torch.compile,
    then as a graph where that can be. winograd: on a CPU in fp32, as written but for 3x3
    convolutions with fewer multiplications, compiled in 20 seconds. `auto`: on CUDA compiled for
    runs of 2,000 steps or more, else a graph; on a CPU in fp32 winograd for runs of 100 steps or
    more; elsewhere plain. On a CPU `compiled` takes over a minute, for a gain within the noise of
    results/benchmarks. In fp16 there is no graph, as the loss scale is decided outside; several
    ranks run plain. Raises InputError for a way that this device or number of ranks doesn't have.
    """
    if config.ranks > 1:
        if config.step in ("graph", "compiled", "winograd"):
            raise InputError(f"step: expected auto or plain on several ranks, got {config.step}")
        return "plain"
    if config.step == "graph" and device.type != "cuda":
        raise InputError(
            f"step: a CUDA graph needs a CUDA device, got {device.type}: use --set step=auto"
        )
    if config.step == "graph" and config.precision == "fp16":
        raise InputError("step: a CUDA graph needs bf16 or fp32, got fp16: use --set step=auto")
    on_cpu = device.type == "cpu" and config.precision == "fp32"
    if config.step == "winograd" and not on_cpu:
        raise InputError(
            f"step: winograd needs a CPU and fp32, got {device.type} and {config.precision}: use --set step=auto"
        )
    if config.step != "auto":
        return config.step
    steps = config.epochs * math.ceil(images / config.batch_size)
    if device.type == "cuda":
        return (
            "compiled"
            if steps >= MANY_STEPS
            else "plain"
            if config.precision == "fp16"
            else "graph"
        )
    return "winograd" if on_cpu and steps >= SOME_STEPS else "plain"


@dataclass
class State:
    """What a checkpoint holds: all that changes while training."""

    model: ResNet
    optimizer: torch.optim.SGD
    scaler: torch.amp.GradScaler
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
        groups = [
            {"params": decayed},
            *([{"params": exempt, "weight_decay": 0.0}] if exempt else []),
        ]
        optimizer = torch.optim.SGD(
            groups,
            lr=config.learning_rate,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
            fused=device.type in ("cuda", "cpu"),
        )
        if (
            config.momentum
        ):  # the fused step makes them without filling them where a first fp16 gradient overflows
            for parameter in model.parameters():
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        ema = copy.deepcopy(model).requires_grad_(False) if config.ema_decay else None
        scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        return cls(model, optimizer, scaler, ema)

    def content(self) -> dict:
        """A copy of everything, on the CPU, that later steps leave alone."""
        parts = {name: getattr(self, name) for name in ("model", "optimizer", "scaler", "ema")}
        states = {
            name: _copied(part.state_dict()) for name, part in parts.items() if part is not None
        }
        for group in states["optimizer"]["param_groups"]:
            group["lr"] = float(group["lr"])
        return {**states, "epoch": self.epoch, "steps": self.steps, "history": list(self.history)}

    def load(self, saved: dict) -> None:
        for name in ("model", "optimizer", "scaler", "ema"):
            if name in saved:
                getattr(self, name).load_state_dict(saved[name])
        self.epoch, self.steps, self.history = saved["epoch"], saved["steps"], saved["history"]

    @property
    def final_model(self) -> ResNet:
        """The weights that are evaluated and kept: the averaged ones where there are some."""
        return self.ema if self.ema is not None else self.model


def _copied(value: object) -> object:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


class ZeroPadded(nn.Module):
    """`model`'s function, computed with channel counts rounded up to multiples of 8 as fast kernels
    need them.

    The channels that are added hold zeros throughout: in the weights, after batch normalisation
    (its scale and shift are zero there too) and after ReLU. So the logits, and the gradients of the
    model's own parameters, are the same but for the order of sums. The parameters stay the model's;
    its batch statistics become views of the wide ones.
    """

    def __init__(self, model: ResNet):
        super().__init__()
        self.model = model
        channels = tuple(math.ceil(width / ALIGNMENT) * ALIGNMENT for width in model.channels)
        weight = model.conv1.weight
        wide = (
            ResNet(model.blocks, channels, model.num_classes, budget=None).to(weight.device).train()
        )
        for (name, narrow), buffer in zip(model.named_buffers(), wide.buffers(), strict=True):
            view = buffer[: len(narrow)] if narrow.ndim else buffer
            view.copy_(narrow)
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, view)
        self.shapes = {name: parameter.shape for name, parameter in wide.named_parameters()}
        self.hidden = (wide,)  # in a tuple: not a submodule, as its parameters are stand-ins

    def forward(self, x: Tensor) -> Tensor:
        padded = {
            name: _pad(parameter, self.shapes[name])
            for name, parameter in self.model.named_parameters()
        }
        return functional_call(self.hidden[0], padded, x)


def _pad(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Zeros at the end of each dimension, up to `shape`."""
    if tensor.shape == shape:
        return tensor
    amounts = [
        n
        for old, new in zip(reversed(tensor.shape), reversed(shape), strict=True)
        for n in (0, new - old)
    ]
    return F.pad(tensor, amounts)


class Step:
    """Updates `state` by one batch after another; `totals` sums what an epoch reports.

    On a CUDA device nothing waits for a result: once a loss is not finite, updates change no weight
    any more, and `check`, called now and then, says where that was.
    """

    def __init__(self, state: State, config: TrainConfig, log: Callable[[str], None] = print):
        """`config` with its precision and step resolved. `log` hears of a faster way that doesn't
        work here."""
        self.state, self.config, self.log = state, config, log
        self.device = state.model.conv1.weight.device
        on_cuda = self.device.type == "cuda"
        self.totals = torch.zeros(
            3, device=self.device
        )  # sums over images: loss, right; steps whose loss was finite
        self.scale, self.shift = scale_and_shift(config.mean, config.std, self.device)
        network: nn.Module = state.model if config.precision == "fp32" else ZeroPadded(state.model)
        self.network = (
            DistributedDataParallel(network, broadcast_buffers=False)
            if config.ranks > 1
            else network
        )
        self.forward: Callable = self._forward
        if config.step == "compiled":
            self.forward = (
                self._attempt("compiled", lambda: torch.compile(self._forward, dynamic=False))
                or self._forward
            )
        self.convolutions: contextlib.AbstractContextManager = contextlib.nullcontext()
        if config.step == "winograd" and self._attempt("winograd", build) is not None:
            self.convolutions = Winograd()
        self.tried: dict[bool, int] = {False: 0, True: 0}  # full updates so far, by half_size
        self.graphs: dict[bool, Callable[[Tensor, Tensor], None]] = {}
        self.capture = (
            on_cuda and config.step != "plain" and config.precision != "fp16"
        )  # the scaler is no part of one
        self.rate = torch.zeros((), device=self.device)
        if on_cuda:
            for group in state.optimizer.param_groups:
                group["lr"] = self.rate  # on the device, where a graph reads it anew
            if config.precision != "fp16":
                state.optimizer.found_inf = torch.zeros(
                    (), device=self.device
                )  # where 1, a fused step does nothing

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
        where the ranks hold different numbers of a batch's images. Raises InputError before an
        update by a loss that isn't finite, where looking at it costs nothing (not on CUDA).
        """
        if self.device.type == "cuda":
            self.rate.fill_(rate)
        else:
            for group in self.state.optimizer.param_groups:
                group["lr"] = rate
        if self.config.step in ("plain", "winograd") or len(labels) != self.config.batch_size:
            self._update(self._forward, images, labels, half_size, share)
        elif half_size in self.graphs:
            self.graphs[half_size](images, labels)
        elif self.tried[half_size] < WARM_UP:
            self._first_updates(images, labels, half_size)
        else:
            self._update(self.forward, images, labels, half_size)
        self.state.steps += 1

    def check(self) -> tuple[float, float]:
        """The sums of loss and right images so far, once the device has got there.

        Raises InputError where a loss was not finite.
        """
        loss, right, steps = self.totals.tolist()
        if not math.isfinite(loss):
            raise InputError(
                f"training diverged: the loss is not finite at epoch {self.state.epoch}, step {int(steps)}; the last "
                "checkpoint stays: lower the learning rate (--set learning_rate=...) in a new run directory"
            )
        return loss, right

    def _forward(self, images: Tensor, labels: Tensor, half_size: bool) -> tuple[Tensor, Tensor]:
        """Mean loss and number of right images."""
        inputs = apply_scale(images, self.scale, self.shift)
        inputs = F.avg_pool2d(inputs, 2) if half_size else inputs
        with autocast(self.device, self.config.precision), self.convolutions:
            logits = self.network(inputs)
            loss = smooth_cross_entropy(logits, labels, self.config.label_smoothing)
        return loss, (logits.detach().argmax(1) == labels).sum()

    def _update(
        self, forward: Callable, images: Tensor, labels: Tensor, half_size: bool, share: float = 1.0
    ) -> None:
        state, optimizer = self.state, self.state.optimizer
        optimizer.zero_grad()
        loss, right = forward(images, labels, half_size)
        self.totals[:2] += torch.stack([loss.detach() * len(labels), right])
        finite = self.totals[0].isfinite()
        self.totals[2] += finite
        if self.device.type != "cuda":
            self.check()
        elif hasattr(optimizer, "found_inf"):
            optimizer.found_inf.copy_(~finite)
        state.scaler.scale(loss * share).backward()
        state.scaler.step(optimizer)
        state.scaler.update()
        if state.ema is not None:
            _average(state.ema, state.model, self.config.ema_decay if state.steps else 0.0)

    def _first_updates(self, images: Tensor, labels: Tensor, half_size: bool) -> None:
        """The first updates: compiling happens in them, and may fail, and after them a graph is
        captured."""
        changed = (*self.state.model.buffers(), self.totals)
        before = [tensor.clone() for tensor in changed]

        def update() -> bool:
            with _side_stream(
                self.device
            ):  # one of its own before a capture, as torch's documentation asks
                self._update(self.forward, images, labels, half_size)
            return True

        if self.forward == self._forward:
            update()
        elif not self._attempt("compiled", update):
            self.forward = self._forward
            for tensor, content in zip(changed, before, strict=True):
                tensor.copy_(content)
            update()
        self.tried[half_size] += 1
        if self.capture and self.tried[half_size] == WARM_UP:
            replay = self._attempt("captured", lambda: self._capture(images, labels, half_size))
            self.capture = replay is not None
            if replay is not None:
                self.graphs[half_size] = replay

    def _capture(
        self, images: Tensor, labels: Tensor, half_size: bool
    ) -> Callable[[Tensor, Tensor], None]:
        """Record an update, which runs nothing; returns what repeats it for other batches of this
        shape."""
        images, labels = images.clone(), labels.clone()
        self.state.optimizer.zero_grad()  # the gradients must come to lie in the graph's memory
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._update(self.forward, images, labels, half_size)

        def replay(new_images: Tensor, new_labels: Tensor) -> None:
            images.copy_(new_images)
            labels.copy_(new_labels)
            graph.replay()

        return replay

    def _attempt(self, way: str, action: Callable[[], T]) -> T | None:
        """What `action` returns; None where it fails, and `log` hears why."""
        try:
            return action()
        except InputError:
            raise
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            self.log(f"a {way} step doesn't work here ({reason}); going on without")
            return None


@torch.no_grad()
def _average(averaged: nn.Module, model: nn.Module, decay: float) -> None:
    """averaged = decay averaged + (1 - decay) model, for weights and batch statistics."""
    olds, news = (
        [tensor for tensor in (*m.parameters(), *m.buffers()) if tensor.is_floating_point()]
        for m in (averaged, model)
    )
    torch._foreach_lerp_(olds, news, 1 - decay)


@contextlib.contextmanager
def _side_stream(device: torch.device) -> Iterator[None]:
    """On CUDA, a stream beside the current one, in order with what comes before and after."""
    if device.type != "cuda":
        yield
        return
    current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        yield
    current.wait_stream(side)
