import csv
import hashlib
import io
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from cifar_lib.augment import Policy, augment_epoch
from cifar_lib.checkpoint import RunDirectory
from cifar_lib.data import CLASSES, ImageSet, normalize
from cifar_lib.errors import InputError
from cifar_lib.evaluate import accuracy, predict
from cifar_lib.fit import fit, split
from cifar_lib.model import load_model
from cifar_lib.recipes import TrainConfig, learning_rates, recipe
from cifar_lib.train import (
    State,
    Step,
    epoch_batches,
    epoch_plan,
    smooth_cross_entropy,
    train_one_epoch,
)

CPU = torch.device("cpu")
TINY = {"blocks": "1,1", "channels": "16,32", "batch_size": 16, "epochs": 3, "warmup_epochs": 1}
TINY |= {"precision": "fp32", "compile": "false"}
REPRODUCIBLE = (
    "checkpoint.pt",
    "checkpoint.previous.pt",
    "history.csv",
    "metrics.json",
    "model.safetensors",
)


class Killed(Exception):
    pass


def tiny(**changes: object) -> TrainConfig:
    """The report's recipe on a tiny network for three epochs."""
    return recipe("report", **{**TINY, **changes})


def quiet(_: str) -> None:
    pass


def train_quietly(state: State, train: ImageSet, config: TrainConfig) -> tuple[float, float]:
    plan = epoch_plan(config, len(train), state.epoch)
    return train_one_epoch(Step(state, config), train, config, plan, tqdm(disable=True))


def batches(
    train: ImageSet, config: TrainConfig, epoch: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(epoch_batches(train, config, epoch_plan(config, len(train), epoch)))


def fit_killed_after(
    epoch: int, config: TrainConfig, path: Path, train: ImageSet, test: ImageSet
) -> None:
    """Training that dies right after the line of the epoch (1-based)."""

    def log(line: str) -> None:
        if line.startswith(f"epoch {epoch}/"):
            raise Killed

    with pytest.raises(Killed):
        fit(config, path, train, test, log=log)


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir() if file.name != ".lock"}


def reproducible(path: Path) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for name in REPRODUCIBLE}


def history(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((path / "history.csv").read_text())))


# Loss


@pytest.mark.parametrize("smoothing", [0.0, 0.05, 0.3])
def test_loss_is_the_reports_sum(smoothing):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 10, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(0, 10, (7,), generator=generator)
    expected = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        log_total = math.log(sum(math.exp(x) for x in row))
        weights = [1 - smoothing if c == label else smoothing / 9 for c in range(10)]
        expected -= sum(w * (x - log_total) for w, x in zip(weights, row, strict=True)) / 7
    assert smooth_cross_entropy(logits, labels, smoothing).item() == pytest.approx(
        expected, rel=1e-10
    )


# One epoch


def numbered(train: ImageSet) -> ImageSet:
    """The images with their positions as labels."""
    return replace(train, labels=torch.arange(len(train)))


@pytest.mark.parametrize("batch_size", [1, 16, 60, 100])
def test_an_epoch_uses_every_image_once_augmented(stand_in, batch_size):
    train, config = numbered(stand_in[0]), tiny(batch_size=batch_size)
    epoch = batches(train, config, epoch=3)
    sizes = [len(labels) for _, labels in epoch]
    assert sizes == [batch_size] * (60 // batch_size) + [60 % batch_size] * (60 % batch_size > 0)
    order = torch.cat([labels for _, labels in epoch])
    assert order.sort().values.tolist() == list(range(60))
    augmented = augment_epoch(train.images, config.policy, config.seed, epoch=3)
    assert torch.equal(torch.cat([images for images, _ in epoch]), augmented[order])


def test_the_ranks_of_a_run_share_every_batch_of_one_process(stand_in):
    train, config = numbered(stand_in[0]), tiny()
    alone = batches(train, config, epoch=1)
    shares = [
        list(epoch_batches(train, replace(config, ranks=3), epoch_plan(config, 60, 1), rank))
        for rank in range(3)
    ]
    for (images, labels), *parts in zip(alone, *shares, strict=True):
        for rank, (share, names) in enumerate(parts):
            assert torch.equal(names, labels[rank::3]) and torch.equal(share, images[rank::3])


def test_the_first_epochs_can_be_on_images_averaged_down_to_half_their_size(stand_in):
    config = tiny(half_size_epochs=2)
    images, labels = batches(stand_in[0], config, epoch=1)[0]
    whole = normalize(images, config.mean, config.std)
    half = whole.unflatten(3, (16, 2)).unflatten(2, (16, 2)).mean(dim=(3, 5))
    for epoch, inputs in ((1, half), (2, whole)):  # the last epoch is on whole images
        state, seen = State.new(config, CPU), []
        state.model.register_forward_pre_hook(
            lambda _, arguments, seen=seen: seen.append(arguments[0])
        )
        state.epoch = epoch
        train_quietly(state, stand_in[0], config)
        if epoch == 2:
            images, _ = batches(stand_in[0], config, epoch=2)[0]
            inputs = normalize(images, config.mean, config.std)
        torch.testing.assert_close(seen[0], inputs)


def test_the_order_differs_by_epoch_and_seed_only(stand_in):
    def order(seed: int, epoch: int) -> list[int]:
        return torch.cat(
            [b for _, b in batches(numbered(stand_in[0]), tiny(seed=seed), epoch)]
        ).tolist()

    assert order(1, 0) == order(1, 0) != list(range(60))
    assert order(1, 0) != order(1, 1) and order(1, 0) != order(2, 0)


def test_loss_and_accuracy_are_means_over_images_with_a_ragged_last_batch(stand_in):
    train, config = (
        stand_in[0][torch.arange(33)],
        tiny(),
    )  # batches of 16, 16 and 1; epoch 0 trains at rate 0
    model = State.new(config, CPU).model
    losses, hits = [], 0
    with torch.no_grad():
        for images, labels in batches(train, config, epoch=0):
            logits = model(normalize(images, config.mean, config.std))
            losses += [smooth_cross_entropy(logits, labels, 0.05).item()] * len(labels)
            hits += (logits.argmax(1) == labels).sum().item()
    assert len(losses) == 33
    mean_of_batch_means = (losses[0] + losses[16] + losses[32]) / 3
    assert abs(mean_of_batch_means - sum(losses) / 33) > 1e-3
    state = State.new(config, CPU)
    assert train_quietly(state, train, config) == pytest.approx(
        (sum(losses) / 33, hits / 33), rel=1e-5
    )


def test_an_epoch_at_rate_zero_leaves_the_weights_and_another_does_not(stand_in):
    config = tiny()
    state, start = State.new(config, CPU), State.new(config, CPU)
    for epoch, same in ((0, True), (1, False)):
        state.epoch = epoch
        train_quietly(state, stand_in[0], config)
        pairs = zip(state.model.parameters(), start.model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs) == same


def test_a_step_is_sgd_with_the_published_momentum_and_decay(stand_in):
    train, config = stand_in[0], tiny(batch_size=60, weight_decay=0.1)
    state = State.new(config, CPU)
    reference = State.new(config, CPU).model
    velocity = [torch.zeros_like(p) for p in reference.parameters()]
    for epoch in (1, 2):  # one step each
        state.epoch = epoch
        train_quietly(state, train, config)
        images, labels = batches(train, config, epoch)[0]
        logits = reference(normalize(images, config.mean, config.std))
        gradients = torch.autograd.grad(
            smooth_cross_entropy(logits, labels, 0.05), list(reference.parameters())
        )
        with torch.no_grad():
            for p, v, g in zip(reference.parameters(), velocity, gradients, strict=True):
                v.mul_(0.9).add_(g + 0.1 * p)
                p.sub_(learning_rates(config)[epoch] * v)
    torch.testing.assert_close(
        list(state.model.parameters()), list(reference.parameters()), atol=1e-5, rtol=1e-4
    )


def test_decay_can_leave_out_norms_and_biases(stand_in):
    everything, exempting = (
        State.new(tiny(decay_all=d, weight_decay=0.1), CPU) for d in (True, False)
    )
    assert [group["weight_decay"] for group in everything.optimizer.param_groups] == [0.1]
    decayed, exempt = exempting.optimizer.param_groups
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.1, 0)
    modules = [
        m
        for m in exempting.model.modules()
        if isinstance(m, (torch.nn.BatchNorm2d, torch.nn.Linear))
    ]
    expected = {id(m.bias) for m in modules} | {
        id(m.weight) for m in modules if isinstance(m, torch.nn.BatchNorm2d)
    }
    assert {id(p) for p in exempt["params"]} == expected
    assert len(decayed["params"]) + len(exempt["params"]) == len(list(exempting.model.parameters()))


def test_weights_start_by_the_seed_whatever_was_drawn_before():
    torch.manual_seed(5)
    first = State.new(tiny(seed=1), CPU).model.conv1.weight
    before = torch.random.get_rng_state()
    assert torch.equal(State.new(tiny(seed=1), CPU).model.conv1.weight, first)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(State.new(tiny(seed=2), CPU).model.conv1.weight, first)


def test_a_small_network_overfits_one_batch(stand_in):
    batch = stand_in[0][torch.arange(16)]
    nothing = Policy(crop_padding=0, flip=0.0, ops="none", erasing=0.0)
    config = tiny(
        channels="16,32",
        epochs=80,
        schedule="cosine",
        learning_rate=0.3,
        policy=nothing,
        label_smoothing=0.0,
    )
    state = State.new(config, CPU)
    first, _ = train_quietly(state, batch, config)
    for state.epoch in range(1, 80):
        last, correct = train_quietly(state, batch, config)
    assert first > 1.5 and last < 0.05 and correct == 1.0


def test_averaged_weights_follow_the_formula(stand_in):
    config = tiny(batch_size=60, ema_decay=0.75)
    state = State.new(config, CPU)
    steps = []
    for state.epoch in (1, 2):  # one step each
        train_quietly(state, stand_in[0], config)
        steps.append([p.detach().clone() for p in state.model.parameters()])
    expected = [0.75 * a + 0.25 * b for a, b in zip(*steps, strict=True)]
    torch.testing.assert_close([p.detach() for p in state.final_model.parameters()], expected)
    assert state.final_model is not state.model


# Splits


def test_training_and_validation_parts_are_disjoint_and_balanced(stand_in):
    train = replace(stand_in[0], ids=tuple(range(60)))
    kept, held_out = split(train, tiny(train_size=40, validation_size=10))
    assert len(kept) == 30 and len(held_out) == 10
    assert not set(kept.ids) & set(held_out.ids) and len(set(kept.ids + held_out.ids)) == 40
    assert (
        kept.labels.bincount().tolist() == [3] * 10
        and held_out.labels.bincount().tolist() == [1] * 10
    )
    for part in (kept, held_out):
        assert torch.equal(part.images, train.images[list(part.ids)])


def test_all_images_are_trained_on_unless_told_otherwise(stand_in):
    for size in (None, 60):
        kept, held_out = split(stand_in[0], tiny(train_size=size))
        assert kept is stand_in[0] and held_out is None
    with pytest.raises(InputError, match="train_size: expected at most 60 images, got 61"):
        split(stand_in[0], tiny(train_size=61))


# Whole runs


def test_a_run_writes_all_its_files(stand_in, tmp_path):
    lines: list[str] = []
    metrics = fit(tiny(), tmp_path, *stand_in, device="cpu", log=lines.append)
    assert sorted(content(tmp_path)) == sorted(
        [*REPRODUCIBLE, "config.json", "environment.json", "timing.csv"],
    )
    rows = history(tmp_path)
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert [float(row["learning_rate"]) for row in rows] == learning_rates(tiny())
    assert all(row["validation_loss"] == "" and float(row["test_loss"]) > 0 for row in rows)
    assert [line.partition("  ")[0] for line in lines] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    assert json.loads((tmp_path / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    assert (
        metrics["test"]["n"] == 30
        and metrics["train_images"] == 60
        and metrics["data"] == stand_in[1].source
    )
    assert float(rows[-1]["test_accuracy"]) == metrics["test"]["accuracy"]
    assert json.loads((tmp_path / "config.json").read_text())["policy"]["magnitude"] == 9


def test_the_kept_weights_score_what_the_metrics_say(stand_in, tmp_path):
    metrics = fit(tiny(), tmp_path, *stand_in, device="cpu", log=quiet)
    model, info = load_model(tmp_path / "model.safetensors")
    logits = predict(model, stand_in[1].images, info["mean"], info["std"])
    assert accuracy(logits, stand_in[1].labels) == pytest.approx(metrics["test"]["accuracy"])
    assert torch.nn.functional.cross_entropy(logits, stand_in[1].labels).item() == pytest.approx(
        metrics["test"]["cross_entropy"], rel=1e-6
    )
    assert info["mean"] == list(tiny().test_mean) and info["recipe"] == "report"


def test_the_kept_statistics_are_those_of_images_without_augmentation(stand_in, tmp_path):
    fit(tiny(), tmp_path, *stand_in, device="cpu", log=quiet)
    model, info = load_model(tmp_path / "model.safetensors")
    inputs = model.conv1(normalize(stand_in[0].images, info["mean"], info["std"])).detach()
    torch.testing.assert_close(model.bn1.running_mean, inputs.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)


def test_a_run_starts_with_given_weights_and_is_no_run_without_them(stand_in, tmp_path):
    fit(tiny(), tmp_path / "first", *stand_in, device="cpu", log=quiet)
    weights = tmp_path / "first" / "model.safetensors"
    config = tiny(epochs=1, learning_rate=1e-6, warmup_epochs=0, ema_decay=0.5)
    fit(config, tmp_path / "second", *stand_in, device="cpu", log=quiet, start=weights)
    first, second = (
        load_model(tmp_path / run / "model.safetensors")[0] for run in ("first", "second")
    )
    torch.testing.assert_close(second.conv1.weight, first.conv1.weight, atol=1e-4, rtol=1e-4)
    stored = json.loads((tmp_path / "second" / "config.json").read_text())["start"]
    assert stored == hashlib.sha256(weights.read_bytes()).hexdigest()
    with pytest.raises(InputError, match="holds another run; these differ: start"):
        fit(config, tmp_path / "second", *stand_in, device="cpu", log=quiet)
    with pytest.raises(
        InputError, match=r"start: expected .* \(\(1, 1\), \(16, 32\)\), got \(\(3, 4, 3\)"
    ):
        fit(config, tmp_path / "third", *stand_in, device="cpu", log=quiet, start="pretrained")
    assert not (tmp_path / "third").exists()


def test_averaged_weights_are_the_ones_evaluated_and_kept(stand_in, tmp_path):
    config = tiny(ema_decay=0.5, validation_size=20, watch_test=False)
    fit(config, tmp_path, *stand_in, device="cpu", log=quiet)
    saved = RunDirectory(tmp_path).load()
    kept = load_model(tmp_path / "model.safetensors")[0]
    averaged = {
        name.removeprefix("module."): t for name, t in saved["ema"].items() if name != "n_averaged"
    }
    convolutions = {name: tensor for name, tensor in kept.state_dict().items() if tensor.ndim == 4}
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in convolutions.items())
    assert not torch.equal(kept.conv1.weight, saved["model"]["conv1.weight"])
    row = history(tmp_path)[-1]
    held_out = split(stand_in[0], config)[1]
    logits = predict(kept, held_out.images, config.test_mean, config.test_std)
    loss = smooth_cross_entropy(logits, held_out.labels, 0.05).item()
    assert float(row["validation_loss"]) == pytest.approx(loss, rel=1e-6)
    assert float(row["validation_accuracy"]) == accuracy(logits, held_out.labels)
    assert row["test_loss"] == row["test_accuracy"] == ""


def test_a_finished_run_is_not_trained_again(stand_in, tmp_path):
    metrics = fit(tiny(epochs=1), tmp_path, *stand_in, device="cpu", log=quiet)
    before = content(tmp_path)
    assert fit(tiny(epochs=1), tmp_path, *stand_in, device="cpu") == metrics  # lists as lists
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "ema_decay": 0.9,
            "decay_all": False,
            "nesterov": True,
            "schedule": "cosine",
            "validation_size": 20,
        },
        {"precision": "bf16", "policy.ops": "trivialaugment", "policy.cutout": 8, "train_size": 50},
    ],
    ids=["fp32", "ema", "bf16"],
)
def test_an_interrupted_run_ends_with_the_bytes_of_an_uninterrupted_one(
    stand_in, tmp_path, changes
):
    config = tiny(**changes)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    fit(config, whole, *stand_in, device="cpu", log=quiet)
    for epoch in (1, 2, 3):
        fit_killed_after(epoch, config, broken, *stand_in)
        assert len(history(broken)) == epoch
    lines: list[str] = []
    fit(config, broken, *stand_in, device="cpu", log=lines.append)
    assert [line.partition(" of")[0] for line in lines] == ["going on from epoch 3"]
    assert reproducible(broken) == reproducible(whole)
    assert len((broken / "timing.csv").read_text().splitlines()) == 4


@pytest.mark.parametrize("epoch", [2, 3])
def test_a_kill_between_checkpoint_and_history_is_made_good(stand_in, tmp_path, epoch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    fit(tiny(), whole, *stand_in, device="cpu", log=quiet)
    fit_killed_after(epoch, tiny(), broken, *stand_in)
    for name in ("history.csv", "timing.csv"):  # as they were before the epoch's row
        lines = (broken / name).read_text().splitlines(keepends=True)
        (broken / name).write_text("".join(lines[:-1]))
    fit(tiny(), broken, *stand_in, device="cpu", log=quiet)
    assert reproducible(broken) == reproducible(whole)


def test_a_damaged_checkpoint_costs_an_epoch_and_changes_nothing(stand_in, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    fit(tiny(), whole, *stand_in, device="cpu", log=quiet)
    fit_killed_after(2, tiny(), broken, *stand_in)
    (broken / "checkpoint.pt").write_bytes(b"half")
    with pytest.warns(UserWarning, match="going on from checkpoint.previous.pt"):
        fit(tiny(), broken, *stand_in, device="cpu", log=quiet)
    assert reproducible(broken) == reproducible(whole)


@pytest.fixture(scope="module")
def started(stand_in, tmp_path_factory) -> Path:
    """A run killed after its first epoch."""
    path = tmp_path_factory.mktemp("started")
    fit_killed_after(1, tiny(), path, *stand_in)
    return path


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"learning_rate": 0.2, "epochs": 5},
            ["learning_rate (0.1, now 0.2)", "epochs (3, now 5)"],
        ),
        ({"channels": "16,24"}, ["channels ((16, 32), now (16, 24))"]),
        ({"policy.magnitude": 8}, ["policy"]),
        ({"precision": "bf16"}, ["precision ('fp32', now 'bf16')"]),
    ],
)
def test_another_configuration_is_refused_naming_what_differs(stand_in, started, changes, named):
    before = content(started)
    with pytest.raises(InputError, match="these differ: ") as error:
        fit(tiny(**changes), started, *stand_in, device="cpu")
    message = str(error.value)
    assert all(text in message for text in named) and "\n" not in message
    assert not any(
        f"{name} (" in message for name in ("momentum", "batch_size", "seed", "data", "images")
    )
    assert content(started) == before


def test_other_data_are_refused(stand_in, started):
    train, test = stand_in
    with pytest.raises(
        InputError, match=r"these differ: data \('stand-in data', now 'CIFAR-10'\):"
    ):
        fit(tiny(), started, replace(train, source="CIFAR-10"), test, device="cpu")
    with pytest.raises(InputError, match=r"these differ: images \(60, now 50\):"):
        fit(tiny(), started, train[slice(50)], test, device="cpu")


@pytest.mark.parametrize("text", ["[1]", "3", '"best"'])
def test_a_configuration_that_is_none_is_refused(stand_in, started, tmp_path, text):
    path = shutil.copytree(started, tmp_path / "damaged")
    (path / "config.json").write_text(text)
    with pytest.raises(InputError, match="config.json can't be read"):
        fit(tiny(), path, *stand_in, device="cpu", log=quiet)


def test_a_checkpoint_of_another_network_and_metrics_of_nothing_are_refused(
    stand_in, started, tmp_path
):
    path = shutil.copytree(started, tmp_path / "mixed")
    run = RunDirectory(path)
    saved = run.load()
    del saved["model"]["conv1.weight"]
    run.save(saved)
    with pytest.raises(InputError, match="checkpoint in .* is not of this run"):
        fit(tiny(), path, *stand_in, device="cpu", log=quiet)
    (path / "metrics.json").write_text('{"epochs": 3}')
    with pytest.raises(InputError, match="metrics.json has no test"):
        fit(tiny(), path, *stand_in, device="cpu", log=quiet)


def test_a_run_from_before_a_field_existed_counts_it_as_the_default(stand_in, started, tmp_path):
    path = shutil.copytree(started, tmp_path / "older")
    config = json.loads((path / "config.json").read_text())
    del config["ema_decay"], config["policy"]["cutout"]
    (path / "config.json").write_text(json.dumps(config))
    fit(tiny(), path, *stand_in, device="cpu", log=quiet)
    assert len(history(path)) == 3


def test_a_diverged_run_names_epoch_and_step_and_keeps_its_checkpoint(stand_in, tmp_path):
    config = tiny(learning_rate=1e30)  # the first epoch trains at rate 0
    lines: list[str] = []
    with pytest.raises(
        InputError, match=r"not finite at epoch 1, step [1-3]; .*learning_rate"
    ) as error:
        fit(config, tmp_path, *stand_in, device="cpu", log=lines.append)
    assert "\n" not in str(error.value) and len(lines) == 1
    saved = RunDirectory(tmp_path).load()
    assert saved["epoch"] == 1 and all(t.isfinite().all() for t in saved["model"].values())
    assert len(history(tmp_path)) == 1
    assert (
        not (tmp_path / "metrics.json").exists() and not (tmp_path / "model.safetensors").exists()
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"channels": "400,800"}, "budget"),
        ({"blocks": "1"}, "as many blocks as channels"),
        ({"train_size": 1000}, "train_size"),
        ({"validation_size": 59}, "can't split 60 images into 1 and 59"),
    ],
)
def test_a_mistake_found_before_training_leaves_the_directory_free(
    stand_in, tmp_path, wrong, message
):
    with pytest.raises(InputError, match=message):
        fit(tiny(epochs=1, **wrong), tmp_path, *stand_in, device="cpu", log=quiet)
    assert content(tmp_path) == {}
    assert fit(tiny(epochs=1), tmp_path, *stand_in, device="cpu", log=quiet)["test"]["n"] == 30


@pytest.mark.parametrize(("device", "precision"), [("toaster", "fp32"), ("cpu", "fp8")])
def test_an_unknown_device_or_precision_is_refused_before_anything_is_written(
    stand_in, tmp_path, device, precision
):
    with pytest.raises(InputError, match="toaster|fp8"):
        fit(tiny(precision=precision), tmp_path / "run", *stand_in, device=device)
    assert not (tmp_path / "run").exists()


def test_the_classes_of_the_network_are_cifars(stand_in):
    assert State.new(tiny(), CPU).model.num_classes == len(CLASSES) == 10
