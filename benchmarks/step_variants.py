"""Changes that might make a training step faster on a GPU, each by itself, in images per second.

    python -m benchmarks.step_variants --compare padding [--device cuda] [--json]
    python -m benchmarks.step_variants --compare rest --channel-multiple 8
    python -m benchmarks.step_variants --compare unsearched --channel-multiple 8

`padding` compares the published loop, our training in fp32 and in the precision that is fast on the
device, and the latter with its channels padded to multiples of 8 to 64. `rest` takes our training,
padded to the given multiple, and adds one change at a time: more input channels, one CUDA graph for
the whole step. `unsearched` measures the same training with the kernels that cuDNN chooses without
trying them; the package lets it try them all. No change is in the package until it proves to be
worth it. A change that fails is recorded with the reason, and the others are measured without it.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baseline_loop import PublishedLoop
from benchmarks.bench import hardware, parse, ratio, record, synchronize, training_images
from cifar_lib.data import ImageSet
from cifar_lib.fit import resolve
from cifar_lib.hardware import choose_precision, memory_format, prepare
from cifar_lib.model import ResNet
from cifar_lib.recipes import TrainConfig, recipe
from cifar_lib.train import State, Step, plan_epoch, train_one_epoch

COMPARISONS = ("padding", "rest", "unsearched")
MULTIPLES = (8, 16, 32, 64)
PUBLISHED, AS_IT_IS = "published", "as it is"
# A network for dry runs, in which there is something to pad.
TINY = {"blocks": "1,1", "channels": "18,20", "batch_size": 64}


@dataclass(frozen=True)
class Variant:
    """A way to do a training step. The defaults are those of `fit`, on every device up to now."""

    precision: str = "auto"
    channel_multiple: int = 1
    input_channels: int = 3
    # Whether cuDNN tries its kernels and takes the fastest. Its choice for a shape is final, so all
    # loops of a process have to agree.
    cudnn_benchmark: bool = True
    one_graph: bool = False  # a CUDA graph of the whole step, instead of one each way of the loss


def variants(compare: str, channel_multiple: int) -> dict[str, Variant]:
    """Return what is compared, by its name. The first one is our training as it is."""
    if compare == "padding":
        padded = {f"channels of {m}": Variant(channel_multiple=m) for m in MULTIPLES}
        return {AS_IT_IS: Variant(), "fp32": Variant(precision="fp32"), **padded}
    base = Variant(channel_multiple=channel_multiple)
    if compare == "unsearched":
        return {AS_IT_IS: replace(base, cudnn_benchmark=False)}
    return {
        AS_IT_IS: base,
        "4 input channels": replace(base, input_channels=4),
        "8 input channels": replace(base, input_channels=8),
        "one graph": replace(base, one_graph=True),
    }


class Loop:
    """Our training in one variant; each call trains for an epoch and returns images per second.

    The epoch's random numbers are drawn before the clock starts: in `fit` a thread does that during
    the epoch before.
    """

    def __init__(
        self, train: ImageSet, config: TrainConfig, device: torch.device, variant: Variant
    ):
        self.train, self.device, self.epoch = train, device, 0
        self.config = resolve(replace(config, precision=variant.precision), device, 50_000)
        prepare(device, self.config.precision)
        torch.backends.cudnn.benchmark = variant.cudnn_benchmark
        state = State(self.config, device, variant.channel_multiple)
        if variant.input_channels > 3:
            widen_input(state, variant.input_channels)
        kind = OneGraph if variant.one_graph else Step
        self.step = kind(state, log=lambda line: print(line, file=sys.stderr))

    def __call__(self) -> float:
        plan = plan_epoch(self.config, len(self.train), self.epoch)
        synchronize(self.device)
        start = time.perf_counter()
        train_one_epoch(self.step, self.train, self.epoch, plan)
        synchronize(self.device)
        self.epoch += 1
        return len(self.train) / (time.perf_counter() - start)


def widen_input(state: State, channels: int) -> None:
    """Let the first convolution read more channels, of zeros, which changes nothing it computes."""
    conv = state.model.conv1
    added = (0, 0, 0, 0, 0, channels - conv.in_channels)  # behind dimension 1
    layout = memory_format(conv.weight.device)
    conv.weight.data = F.pad(conv.weight.data, added).contiguous(memory_format=layout)
    conv.in_channels = channels
    state.optimizer.state[conv.weight]["momentum_buffer"] = torch.zeros_like(conv.weight)
    conv.register_forward_pre_hook(lambda _, inputs: F.pad(inputs[0], added))


class OneGraph(Step):
    """A step of which forward, backward and update are one CUDA graph, started at once.

    It is for whole batches of full-size images, and for precisions whose gradients aren't scaled.
    Without a CUDA GPU the same is done without a graph, which shows whether it is right.
    """

    def __init__(self, state: State, log: Callable[[str], None] = print):
        # The state's configuration stays as it was; only this step isn't compiled as others are.
        config = state.config
        state.config = replace(config, compile=False)
        super().__init__(state, log)
        state.config = config
        # What a graph reads and writes stays at its place in memory.
        shape = (self.config.batch_size, 3, 32, 32)
        self.images = torch.zeros(shape, dtype=torch.uint8, device=self.device)
        self.labels = torch.zeros(self.config.batch_size, dtype=torch.int64, device=self.device)
        self.rate = torch.zeros((), device=self.device)
        for group in state.optimizer.param_groups:
            group["lr"] = self.rate
        if config.compile:
            # Compiled without graphs of its own, which the default mode hasn't.
            self.loss = torch.compile(self.plain_loss, dynamic=False, fullgraph=True)
        self.replay = self._capture() if self.device.type == "cuda" else self._update

    def __call__(
        self, images: Tensor, labels: Tensor, rate: float, half_size: bool
    ) -> tuple[Tensor, Tensor]:
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.rate.fill_(rate)
        return self.replay()

    def _update(self) -> tuple[Tensor, Tensor]:
        self.state.optimizer.zero_grad()
        loss, correct = self.loss(self.images, self.labels, False)
        loss.backward()
        self.state.optimizer.step()
        return loss.detach(), correct

    def _capture(self) -> Callable[[], tuple[Tensor, Tensor]]:
        """Return a function that does what `_update` does, by a graph."""
        # The first calls compile and choose kernels; the state afterwards is the one before.
        before = self.state.content()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._update()
        torch.cuda.current_stream().wait_stream(stream)

        self.state.optimizer.zero_grad()  # new gradients get memory that belongs to the graph
        graph = torch.cuda.CUDAGraph()
        # If capturing fails, `graph` stays on its own stream, but the outer context leaves it.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
            result = self._update()
        self.state.load(before)

        def replay() -> tuple[Tensor, Tensor]:
            graph.replay()
            return result

        return replay


def main() -> None:
    """Measure all variants in turns, and record medians and ratios."""
    arguments, device = parse(
        __doc__,
        rounds=3,
        compare={"choices": COMPARISONS, "default": "padding", "help": "what is compared"},
        channel_multiple={"type": int, "default": 1, "help": "of `rest` and `unsearched`"},
    )
    # Each variant compiles the same function anew, and torch would give up after eight versions.
    torch._dynamo.config.recompile_limit = 64
    # An fp32 loop changes a switch of torch that all compiled code depends on. Change it before
    # anything is compiled.
    prepare(device, "fp32")

    # How many images an epoch has: whole batches.
    n_published, n = (256, 128) if arguments.dry_run else (12_800, 49_920)
    train = training_images(max(n_published, n))
    config = recipe("report", **(TINY if arguments.dry_run else {}))

    # Build the loops.
    builders: dict[str, Callable[[], Callable[[], float]]] = {}
    if arguments.compare == "padding":
        network = ResNet(config.blocks, config.channels)
        builders[PUBLISHED] = lambda: PublishedLoop(train[slice(n_published)], device, network)
    own = train[slice(n)].to(device)
    chosen = variants(arguments.compare, arguments.channel_multiple)
    for name, variant in chosen.items():
        builders[name] = lambda variant=variant: Loop(own, config, device, variant)
    failures: dict[str, str] = {}
    loops = {name: attempt(name, build, failures) for name, build in builders.items()}

    measured = measure(loops, arguments.rounds, failures)

    # Record them.
    result = {"hardware": hardware(device), "rounds": arguments.rounds}
    result |= {"images": {"published": n_published, "ours": n}}
    rows = [describe(name, measured, chosen.get(name), device) for name in measured]
    result |= {"rows": rows, "rates": measured, "failures": failures}
    record(f"step_{arguments.compare}", result, arguments)
    for name, reason in failures.items():
        print(f"{name} failed: {reason}", file=sys.stderr)


def measure(
    loops: dict[str, Callable[[], float]], rounds: int, failures: dict[str, str]
) -> dict[str, list[float]]:
    """Return each loop's images per second in each round; those that fail go to `failures`.

    All loops take turns, so that whatever else the machine does slows all of them down. There is
    one round more, the first, which warms up and doesn't count.
    """
    rates: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds + 1):
        for name, loop in loops.items():
            if name not in failures:
                rates[name].append(attempt(name, loop, failures))
    return {name: rates[name][1:] for name in loops if name not in failures}


def describe(
    name: str, measured: dict[str, list[float]], variant: Variant | None, device: torch.device
) -> dict:
    """Return a loop's row: its median rate, and the ratio to the loops that it is compared with.

    variant: None for the published loop, which computes in fp32.
    """
    precision = choose_precision(variant.precision, device) if variant else "fp32"
    row = {"variant": name, "precision": precision}
    row["channel_multiple"] = variant.channel_multiple if variant else 1
    row["images_per_second"] = statistics.median(measured[name])
    for other in (PUBLISHED, AS_IT_IS):
        if other in measured:
            row[f"ratio_to_{other.replace(' ', '_')}"] = ratio(measured[other], measured[name])
    return row


def attempt(name: str, action: Callable[[], Any], failures: dict[str, str]) -> Any:
    """Return what `action` returns. If it fails, note the reason under `name` and return None."""
    try:
        return action()
    except Exception as error:  # CUDA, cuDNN and the compiler raise whatever they like
        failures[name] = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return None


if __name__ == "__main__":
    main()
