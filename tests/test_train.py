"""The loss, a state, a step and an epoch: what they compute."""

import copy
import io
import math
from dataclasses import replace

import pytest
import torch
from tqdm import tqdm

from cifar_lib import train as training
from cifar_lib.augment import Policy, augment_epoch, random_stream
from cifar_lib.data import ImageSet
from cifar_lib.recipes import TrainConfig, learning_rate, recipe
from cifar_lib.train import (
    State,
    Step,
    epoch_batches,
    plan_epoch,
    smooth_cross_entropy,
    train_one_epoch,
)

CPU = torch.device("cpu")
TINY = {"blocks": "1,1", "channels": "16,16", "batch_size": 16, "epochs": 3, "warmup_epochs": 1}
TINY |= {"precision": "fp32", "compile": "false"}


def tiny(**changes: object) -> TrainConfig:
    """The report's recipe on a tiny network for three epochs."""
    return recipe("report", **{**TINY, **changes})


def batches(train: ImageSet, config: TrainConfig, epoch: int) -> list[tuple]:
    return list(epoch_batches(train, config, plan_epoch(config, len(train), epoch)))


@pytest.mark.parametrize("smoothing", [0.0, 0.05])
def test_the_loss_is_the_reports_sum(smoothing):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 10, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(0, 10, (7,), generator=generator)
    expected = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        log_total = math.log(sum(math.exp(x) for x in row))
        weights = [1 - smoothing if c == label else smoothing / 9 for c in range(10)]
        expected -= sum(w * (x - log_total) for w, x in zip(weights, row, strict=True)) / 7
    loss = smooth_cross_entropy(logits, labels, smoothing).item()
    assert loss == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("batch_size", [16, 100])
def test_an_epoch_uses_every_image_once_augmented(stand_in, batch_size, monkeypatch):
    monkeypatch.setitem(training.BATCHES_TOGETHER, "cpu", 2)
    train = replace(stand_in[0], labels=torch.arange(60))  # labels that name the images
    config = tiny(batch_size=batch_size)
    epoch = batches(train, config, epoch=3)

    sizes = [len(labels) for _, labels in epoch]
    assert sizes == [batch_size] * (60 // batch_size) + [60 % batch_size]
    order = torch.cat([labels for _, labels in epoch])
    assert order.sort().values.tolist() == list(range(60))
    augmented = augment_epoch(train.images, config.policy, config.seed, epoch=3)
    assert torch.equal(torch.cat([images for images, _ in epoch]), augmented[order])


def test_the_order_differs_by_epoch_and_seed_only():
    first, again, later, other = (
        plan_epoch(tiny(seed=seed), 60, epoch).order.tolist()
        for seed, epoch in ((1, 0), (1, 0), (1, 1), (2, 0))
    )
    assert first == again != list(range(60))
    assert first != later and first != other
    # The same seed gives the same run in every version of the package.
    stream = random_stream(seed=1, epoch=0, purpose=1)
    assert first == torch.randperm(60, generator=stream).tolist()
    assert first[:5] == [19, 25, 50, 40, 52]


def test_the_first_epochs_can_be_on_images_averaged_down_to_half_their_size(stand_in):
    config = tiny(half_size_epochs=3)
    for epoch, halved in ((1, True), (2, False)):  # the last epoch is on whole images
        state, seen = State(config, CPU), []
        state.model.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        train_one_epoch(Step(state), stand_in[0], epoch)
        inputs = config.training_normalization(batches(stand_in[0], config, epoch)[0][0])
        half = inputs.unflatten(3, (16, 2)).unflatten(2, (16, 2)).mean(dim=(3, 5))
        torch.testing.assert_close(seen[0], half if halved else inputs)


def test_loss_and_accuracy_are_means_over_images_with_a_ragged_last_batch(stand_in):
    train, config = stand_in[0][torch.arange(33)], tiny()  # batches of 16, 16 and 1
    model = State(config, CPU).model
    losses, hits = [], 0
    with torch.no_grad():
        for images, labels in batches(train, config, epoch=0):
            logits = model(config.training_normalization(images))
            losses += [smooth_cross_entropy(logits, labels, 0.05).item()] * len(labels)
            hits += (logits.argmax(1) == labels).sum().item()
    assert abs((losses[0] + losses[16] + losses[32]) / 3 - sum(losses) / 33) > 1e-3

    state = State(config, CPU)
    state.model.eval()  # an epoch begins with training mode, however the network comes
    with tqdm(file=io.StringIO()) as bar:
        found = train_one_epoch(Step(state), train, 0, bar=bar)  # at rate 0
    assert found == pytest.approx((sum(losses) / 33, hits / 33), rel=1e-5)
    assert all(map(torch.equal, state.model.parameters(), model.parameters()))
    assert bar.n == 33


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_step_is_sgd_with_momentum_and_weight_decay(stand_in, nesterov):
    changes = {"batch_size": 30, "learning_rate": 0.02, "weight_decay": 0.1, "schedule": "cosine"}
    config = tiny(**changes, nesterov=nesterov)
    state, reference = State(config, CPU), State(config, CPU).model
    velocity = [torch.zeros_like(p) for p in reference.parameters()]
    for epoch in (1, 2):
        train_one_epoch(Step(state), stand_in[0], epoch)
        for i, (images, labels) in enumerate(batches(stand_in[0], config, epoch)):
            logits = reference(config.training_normalization(images))
            loss = smooth_cross_entropy(logits, labels, 0.05)
            gradients = torch.autograd.grad(loss, list(reference.parameters()))
            rate = learning_rate(config, epoch + i / 2)  # two steps per epoch
            with torch.no_grad():
                for p, v, g in zip(reference.parameters(), velocity, gradients, strict=True):
                    g = g + 0.1 * p
                    v.mul_(0.9).add_(g)
                    p.sub_(rate * (g + 0.9 * v if nesterov else v))
    ours, theirs = list(state.model.parameters()), list(reference.parameters())
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_a_checkpoints_content_stays_while_training_continues(stand_in):
    state = State(tiny(ema_decay=0.5), CPU)
    content = state.content()  # another thread writes it to the disk
    before = copy.deepcopy(content)
    train_one_epoch(Step(state), stand_in[0], 0)
    for part in ("model", "average"):
        assert all(torch.equal(content[part][name], before[part][name]) for name in before[part])
    assert all(map(torch.equal, content["momenta"], before["momenta"]))


def test_the_average_is_of_weights_and_statistics_after_each_step(stand_in):
    config = tiny(ema_decay=0.75)
    state, batch = State(config, CPU), stand_in[0][:16]
    step = Step(state)
    expected = {name: value.clone() for name, value in state.model.state_dict().items()}
    for _ in range(3):
        step(batch.images, batch.labels, 0.1, False)
        for name, value in state.model.state_dict().items():
            if value.is_floating_point():
                expected[name] = 0.75 * expected[name] + 0.25 * value
    network = state.network()
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, expected[name])
    assert not torch.equal(network.bn1.running_mean, state.model.bn1.running_mean)
    assert not torch.equal(network.conv1.weight, state.model.conv1.weight)

    # The network is a copy, and one that can be trained.
    before = network.conv1.weight.clone()
    step(batch.images, batch.labels, 0.1, False)
    assert torch.equal(network.conv1.weight, before) and network.conv1.weight.requires_grad


def test_weights_start_by_the_seed_whatever_was_drawn_before():
    torch.manual_seed(5)
    first = State(tiny(seed=1), CPU).model.conv1.weight
    before = torch.random.get_rng_state()
    assert torch.equal(State(tiny(seed=1), CPU).model.conv1.weight, first)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(State(tiny(seed=2), CPU).model.conv1.weight, first)


def test_a_small_network_overfits_one_batch(stand_in):
    nothing = Policy(crop_padding=0, flip=0.0, ops="none", erasing=0.0)
    config = tiny(epochs=30, learning_rate=0.1, policy=nothing, label_smoothing=0.0)
    step, batch = Step(State(config, CPU)), stand_in[0][torch.arange(8)]
    for epoch in range(30):
        loss, accuracy = train_one_epoch(step, batch, epoch)
    assert loss < 0.4 and accuracy == 1.0


def test_a_resumed_run_continues_with_the_scale_of_its_fp16_gradients():
    config = tiny(precision="fp16")
    before, after = State(config, CPU), State(config, CPU)
    before.scaler.load_state_dict(before.scaler.state_dict() | {"scale": 2.0**7})
    after.load(before.content())
    assert after.scaler.state_dict()["scale"] == 2.0**7


def test_a_first_gradient_that_overflows_in_fp16_leaves_no_trace(stand_in):
    config = tiny(precision="fp16", weight_decay=0.0)
    images, labels = stand_in[0].images[:4], torch.arange(4)

    def one_step(state: State, scale: float) -> None:
        fixed = {"scale": scale, "growth_interval": 10**6}
        state.scaler.load_state_dict(state.scaler.state_dict() | fixed)
        loss, _ = Step(state)(images, labels, 0.1, False)
        assert loss.isfinite()

    overflowed, smooth = State(config, CPU), State(config, CPU)
    statistics = {name: value.clone() for name, value in overflowed.model.named_buffers()}
    one_step(overflowed, 2.0**120)  # more than float32 can hold, too
    overflowed.model.load_state_dict(statistics, strict=False)
    momenta = [entry["momentum_buffer"] for entry in overflowed.optimizer.state.values()]
    assert len(momenta) > 10 and not any(buffer.any() for buffer in momenta)

    one_step(overflowed, 2.0**10)
    one_step(smooth, 2.0**10)
    ours, theirs = list(overflowed.model.parameters()), list(smooth.model.parameters())
    torch.testing.assert_close(ours, theirs)
