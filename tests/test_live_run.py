"""Which recipe notebook 3 trains on which machine, and what it says before it starts."""

import pytest
import torch

from cifar_lib.recipes import RECIPES, recipe
from notebooks.course import live_run
from notebooks.course.live_run import choose

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
APPLE_GPU = torch.device("mps")

# Each device: its name and a CUDA GPU's compute capability, images per second with the report's
# network and with the small one, and the recipe that notebook 3 should train there.
DEVICES = [
    ("CPU", None, 70, 2_000, "small"),
    ("Tesla T4", (7, 5), 1_500, 20_000, "short"),
    ("Tesla V100-SXM2-16GB", (7, 0), 4_800, 30_000, "short"),  # older than the A100
    ("NVIDIA L4", (8, 9), 3_000, 30_000, "short (report would take about 17 minutes)"),
    ("NVIDIA A100-SXM4-40GB", (8, 0), 7_000, 40_000, "report"),
    ("NVIDIA H200", (9, 0), 16_000, 60_000, "report"),
    ("Quadro P1000", (6, 1), 300, 9_000, "small"),
    ("Apple GPU", None, 1_100, 9_000, "short"),
    ("Apple GPU", None, 500, 5_000, "small"),
]


def seconds_at(rate, rate_of_small):
    """Return an estimate of seconds by these rates, in images per second."""

    def estimate(config, device, train):
        fast = config.channels == recipe("small").channels
        return config.epochs * 50_000 / (rate_of_small if fast else rate)

    return estimate


@pytest.mark.parametrize(("name", "capability", "rate", "rate_of_small", "chosen"), DEVICES)
def test_a_device_trains_what_it_can_within_twelve_minutes_and_says_so(
    monkeypatch, name, capability, rate, rate_of_small, chosen
):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = {"CPU": CPU, "Apple GPU": APPLE_GPU}.get(name, CUDA)
    choice = choose(device, None, seconds_needed=seconds_at(rate, rate_of_small))
    assert choice.config == recipe(chosen.split()[0])
    assert chosen == "small" or choice.seconds <= live_run.LONGEST

    # It names the device, the recipe, the network, the work and the time, then the way out.
    summary = choice.summary(device, 50_000)
    assert summary.startswith(f"{name}: recipe {chosen}") and summary.count("\n") == 1
    parameters = "78,042" if chosen == "small" else "4,916,284"
    assert f"{parameters} parameters, {choice.config.epochs} epochs of 50,000 images" in summary
    assert f"about {live_run.duration(choice.seconds)}.\nSet CIFAR_RECIPE to train" in summary


@pytest.mark.parametrize("name", live_run.CANDIDATES)
def test_what_is_asked_for_is_trained_however_long_it_takes(name):
    choice = choose(CPU, None, name, seconds_needed=seconds_at(70, 2_000))
    assert choice.config == RECIPES[name] and choice.why == "asked for"


def test_a_run_that_was_begun_is_resumed():
    def is_begun(config):
        return config.recipe == "short"

    slow = seconds_at(500, 5_000)
    assert choose(APPLE_GPU, None, is_begun=is_begun, seconds_needed=slow).config.recipe == "short"
    assert choose(CPU, None, is_begun=is_begun, seconds_needed=slow).config.recipe == "small"


def test_the_time_is_estimated_from_the_rates_of_both_sizes(monkeypatch, stand_in):
    train, _ = stand_in
    measured = []

    def rate(config, device, images, half_size):
        measured.append(half_size)
        return 400.0 if half_size else 100.0

    monkeypatch.setattr(live_run, "images_per_second", rate)
    config = recipe("small", epochs=5, half_size_epochs=3, watch_test=False, train_size=50)
    seconds = live_run.estimate_seconds(config, CPU, train)
    assert seconds == pytest.approx(3 * 50 / 400 + 2 * 50 / 100 + 10_000 / 300)
    assert sorted(measured) == [False, True]


@pytest.mark.parametrize("half_size", [False, True])
def test_rates_are_measured_by_training_at_the_size_in_question(monkeypatch, stand_in, half_size):
    train, _ = stand_in
    seen = []
    original = live_run.train_one_epoch

    def watched(step, images, epoch):
        plain = step.loss
        step.loss = lambda *batch: seen.append(batch[2]) or plain(*batch)
        return original(step, images, epoch)

    monkeypatch.setattr(live_run, "train_one_epoch", watched)
    config = recipe("small", blocks="1", channels="16", batch_size=20)
    assert live_run.images_per_second(config, CPU, train, half_size) > 0
    assert set(seen) == {half_size}


def test_durations_are_round():
    rounded = {2: "5 seconds", 71: "70 seconds", 100: "2 minutes", 12_000: "3.3 hours"}
    assert {seconds: live_run.duration(seconds) for seconds in rounded} == rounded
