"""What the benchmarks of the training step measure is the step itself, in all its variants."""

import pytest
import torch

from benchmarks import profile_step
from benchmarks.step_variants import (
    AS_IT_IS,
    MULTIPLES,
    OneGraph,
    Variant,
    describe,
    measure,
    variants,
    widen_input,
)
from cifar_lib import hardware
from cifar_lib.train import State, Step
from tests.test_train import tiny

CPU = torch.device("cpu")


def losses(step: Step, train) -> list[float]:
    batches = [train[torch.arange(i, i + 16)] for i in range(4)]
    return [step(batch.images, batch.labels, 0.05, False)[0].item() for batch in batches]


@pytest.fixture(params=["plain", "compiled"])
def compiled(request, monkeypatch) -> bool:
    """Whether the step is compiled, by a backend that needs no C++ compiler."""
    real = torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(hardware, "cifar_winograd", None)
    monkeypatch.setattr(
        torch, "compile", lambda f, mode=None, **more: real(f, backend="aot_eager", **more)
    )
    return request.param == "compiled"


@pytest.mark.parametrize("channels", [3, 8])
@pytest.mark.parametrize("kind", [Step, OneGraph])
def test_more_input_channels_and_one_graph_train_as_the_step_does(
    stand_in, compiled, kind, channels
):
    config = tiny(nesterov=True, compile=compiled)
    expected = losses(Step(State(config, CPU)), stand_in[0])
    state = State(config, CPU)
    widen_input(state, channels)
    step = kind(state, log=lambda _: None)
    assert losses(step, stand_in[0]) == pytest.approx(expected, rel=1e-5)
    assert state.model.conv1.weight.shape == (16, channels, 3, 3)
    assert not state.model.conv1.weight[:, 3:].any()


def test_each_variant_changes_one_thing():
    for compare, multiple in (("padding", 1), ("rest", 8)):
        chosen = variants(compare, multiple)
        base = vars(chosen.pop(AS_IT_IS))
        changed = [
            {k for k, v in vars(variant).items() if v != base[k]} for variant in chosen.values()
        ]
        assert all(len(names) == 1 for names in changed)
    (unsearched,) = variants("unsearched", 8).values()
    assert (unsearched.channel_multiple, unsearched.cudnn_benchmark) == (8, False)
    padded = [variant.channel_multiple for variant in variants("padding", 1).values()]
    assert padded == [1, 1, *MULTIPLES]


def test_loops_take_turns_after_a_round_to_warm_up_and_one_that_fails_drops_out():
    turns, failures = [], {"not built": "no compiler"}

    def loop(name: str, *rates: float):
        waiting = list(rates)
        return lambda: turns.append(name) or waiting.pop(0)

    loops = {AS_IT_IS: loop(AS_IT_IS, 1, 10, 20), "twice": loop("twice", 9, 20, 44)}
    loops |= {"breaks": loop("breaks", 3), "not built": None}
    measured = measure(loops, 2, failures)
    assert turns == [AS_IT_IS, "twice", "breaks", AS_IT_IS, "twice", "breaks", AS_IT_IS, "twice"]
    assert measured == {AS_IT_IS: [10, 20], "twice": [20, 44]}
    assert failures == {"not built": "no compiler", "breaks": "pop from empty list"}

    row = describe("twice", measured, Variant(precision="fp32", channel_multiple=8), CPU)
    assert row == {"variant": "twice", "precision": "fp32", "channel_multiple": 8} | {
        **{"images_per_second": 32, "ratio_to_as_it_is": pytest.approx(2.1)}
    }


def test_a_profile_counts_gaps_and_conversions(monkeypatch):
    monkeypatch.setattr(profile_step, "STEPS", 2)
    kernels = [("sm90_xmma_fprop_nhwc", 0.0, 60.0), ("nchwToNhwcKernel", 100.0, 120.0)]
    lines = profile_step.describe_kernels(kernels)
    assert lines[0] == "1 kernels per step; the GPU is busy for 66.7% of 60 microseconds per step"
    assert lines[1:3] == [
        "channels-last by their names: 0.5 kernels per step, 75.0% of their time",
        "contiguous by their names: 0 kernels per step, 0.0% of their time",
    ]
    assert lines[3] == "conversions of the layout: 0.5 kernels per step, 25.0% of their time"
    assert lines[4] == "  nchwToNhwcKernel"
    assert profile_step.describe_kernels([]) == ["no kernels of a GPU were seen"]
