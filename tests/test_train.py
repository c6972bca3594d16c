"""The loss, a step, an epoch, and whole runs: what they compute and what they write."""

import csv
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
from cifar_lib.data import ImageSet, normalize
from cifar_lib.errors import InputError
from cifar_lib.evaluate import accuracy, predict
from cifar_lib.fit import fit, resolve, split
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
TINY = {"blocks": "1,1", "channels": "16,16", "batch_size": 16, "epochs": 3, "warmup_epochs": 1}
TINY |= {"precision": "fp32", "compile": "false"}
RICH = {"nesterov": True, "validation_size": 20}
CHECKPOINTS = ("checkpoint.pt", "checkpoint.previous.pt")
REPRODUCIBLE = (*CHECKPOINTS, "history.csv", "metrics.json", "model.safetensors")


def tiny(**changes: object) -> TrainConfig:
    """The report's recipe on a tiny network for three epochs."""
    return recipe("report", **{**TINY, **changes})


def train_quietly(state: State, train: ImageSet, config: TrainConfig) -> tuple[float, float]:
    plan = epoch_plan(config, len(train), state.epoch)
    return train_one_epoch(Step(state, config), train, plan, tqdm(disable=True))


def batches(train: ImageSet, config: TrainConfig, epoch: int, rank: int = 0) -> list[tuple]:
    return list(epoch_batches(train, config, epoch_plan(config, len(train), epoch), rank))


def fit_quietly(config: TrainConfig, path: Path, data: tuple[ImageSet, ImageSet], **more) -> dict:
    return fit(config, path, *data, device="cpu", **{"log": lambda _: None, **more})


def fit_killed_after(epoch: int, config: TrainConfig, path: Path, data: tuple) -> None:
    """Training that dies right after the line of the epoch (1-based)."""

    def log(line: str) -> None:
        if line.startswith(f"epoch {epoch}/"):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit_quietly(config, path, data, log=log)


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir() if file.name != ".lock"}


def reproducible(path: Path) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for name in REPRODUCIBLE}


def history(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((path / "history.csv").read_text(encoding="utf-8").splitlines()))


@pytest.fixture(scope="module")
def whole(stand_in, tmp_path_factory) -> Path:
    """A finished run."""
    path = tmp_path_factory.mktemp("whole")
    fit_quietly(tiny(**RICH), path, stand_in)
    return path


@pytest.fixture(scope="module")
def killed(stand_in, tmp_path_factory) -> Path:
    """The same run, killed after its first epoch."""
    path = tmp_path_factory.mktemp("killed")
    fit_killed_after(1, tiny(**RICH), path, stand_in)
    return path


@pytest.fixture
def started(killed, tmp_path) -> Path:
    return Path(shutil.copytree(killed, tmp_path / "started"))


# Loss, one step, one epoch


@pytest.mark.parametrize("smoothing", [0.0, 0.05])
def test_loss_is_the_reports_sum(smoothing):
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


def numbered(train: ImageSet) -> ImageSet:
    """The images with their positions as labels."""
    return replace(train, labels=torch.arange(len(train)))


@pytest.mark.parametrize("batch_size", [16, 100])
def test_an_epoch_uses_every_image_once_augmented(stand_in, batch_size):
    train, config = numbered(stand_in[0]), tiny(batch_size=batch_size)
    epoch = batches(train, config, epoch=3)
    sizes = [len(labels) for _, labels in epoch]
    assert sizes == [batch_size] * (60 // batch_size) + [60 % batch_size]
    order = torch.cat([labels for _, labels in epoch])
    assert order.sort().values.tolist() == list(range(60))
    augmented = augment_epoch(train.images, config.policy, config.seed, epoch=3)
    assert torch.equal(torch.cat([images for images, _ in epoch]), augmented[order])


def test_the_ranks_of_a_run_share_every_batch_of_one_process(stand_in):
    train, config = numbered(stand_in[0]), tiny()
    shares = [batches(train, replace(config, ranks=3), 1, rank) for rank in range(3)]
    for (images, labels), *parts in zip(batches(train, config, 1), *shares, strict=True):
        for rank, (share, names) in enumerate(parts):
            assert torch.equal(names, labels[rank::3]) and torch.equal(share, images[rank::3])


def test_the_order_differs_by_epoch_and_seed_only():
    first, again, later, other = (
        epoch_plan(tiny(seed=seed), 60, epoch)[0].tolist()
        for seed, epoch in ((1, 0), (1, 0), (1, 1), (2, 0))
    )
    assert first == again != list(range(60))
    assert first != later and first != other


def test_the_first_epochs_can_be_on_images_averaged_down_to_half_their_size(stand_in):
    config = tiny(half_size_epochs=3)
    for epoch, halved in ((1, True), (2, False)):  # the last epoch is on whole images
        state, seen = State(config, CPU), []
        state.model.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        state.epoch = epoch
        train_quietly(state, stand_in[0], config)
        inputs = normalize(batches(stand_in[0], config, epoch)[0][0], config.mean, config.std)
        half = inputs.unflatten(3, (16, 2)).unflatten(2, (16, 2)).mean(dim=(3, 5))
        torch.testing.assert_close(seen[0], half if halved else inputs)


def test_loss_and_accuracy_are_means_over_images_with_a_ragged_last_batch(stand_in):
    train, config = stand_in[0][torch.arange(33)], tiny()  # batches of 16, 16 and 1
    model = State(config, CPU).model
    losses, hits = [], 0
    with torch.no_grad():
        for images, labels in batches(train, config, epoch=0):
            logits = model(normalize(images, config.mean, config.std))
            losses += [smooth_cross_entropy(logits, labels, 0.05).item()] * len(labels)
            hits += (logits.argmax(1) == labels).sum().item()
    assert abs((losses[0] + losses[16] + losses[32]) / 3 - sum(losses) / 33) > 1e-3
    state = State(config, CPU)
    found = train_quietly(state, train, config)  # at rate 0
    assert found == pytest.approx((sum(losses) / 33, hits / 33), rel=1e-5)
    assert all(map(torch.equal, state.model.parameters(), model.parameters()))


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_step_is_sgd_with_momentum_and_weight_decay(stand_in, nesterov):
    config = tiny(batch_size=60, weight_decay=0.1, nesterov=nesterov)
    state, reference = State(config, CPU), State(config, CPU).model
    velocity = [torch.zeros_like(p) for p in reference.parameters()]
    for epoch in (1, 2):  # one step each
        state.epoch = epoch
        train_quietly(state, stand_in[0], config)
        images, labels = batches(stand_in[0], config, epoch)[0]
        logits = reference(normalize(images, config.mean, config.std))
        loss = smooth_cross_entropy(logits, labels, 0.05)
        gradients = torch.autograd.grad(loss, list(reference.parameters()))
        with torch.no_grad():
            for p, v, g in zip(reference.parameters(), velocity, gradients, strict=True):
                g = g + 0.1 * p
                v.mul_(0.9).add_(g)
                p.sub_(learning_rates(config)[epoch] * (g + 0.9 * v if nesterov else v))
    ours, theirs = list(state.model.parameters()), list(reference.parameters())
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


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
    state, batch = State(config, CPU), stand_in[0][torch.arange(8)]
    for state.epoch in range(30):
        loss, right = train_quietly(state, batch, config)
    assert loss < 0.4 and right == 1.0


def test_training_and_validation_parts_are_disjoint_and_balanced(stand_in):
    train = replace(stand_in[0], ids=tuple(range(60)))
    kept, held_out = split(train, tiny(train_size=40, validation_size=10))
    assert len(set(kept.ids + held_out.ids)) == 40
    assert kept.labels.bincount().tolist() == [3] * 10
    assert held_out.labels.bincount().tolist() == [1] * 10
    for part in (kept, held_out):
        assert torch.equal(part.images, train.images[list(part.ids)])
    for size in (None, 60):
        assert split(train, tiny(train_size=size)) == (train, None)
    with pytest.raises(InputError, match="train_size: expected at most 60 images, got 61"):
        split(train, tiny(train_size=61))


# Whole runs


def test_a_run_writes_all_its_files(stand_in, tmp_path):
    lines: list[str] = []
    metrics = fit_quietly(tiny(), tmp_path, stand_in, log=lines.append)
    more = ("config.json", "environment.json", "timing.csv")
    assert sorted(content(tmp_path)) == sorted([*REPRODUCIBLE, *more])
    rows = history(tmp_path)
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert [float(row["learning_rate"]) for row in rows] == learning_rates(tiny())
    assert all(row["validation_loss"] == "" and float(row["test_loss"]) > 0 for row in rows)
    assert [line.partition("  ")[0] for line in lines] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    assert json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8")) == metrics
    assert metrics["test"]["n"] == 30 and metrics["data"] == stand_in[1].source
    assert float(rows[-1]["test_accuracy"]) == metrics["test"]["accuracy"]
    assert len((tmp_path / "timing.csv").read_text(encoding="utf-8").splitlines()) == 4


def test_the_last_weights_are_the_ones_evaluated_and_kept_with_rebased_statistics(stand_in, whole):
    saved, metrics = RunDirectory(whole).load(), RunDirectory(whole).read_json("metrics.json")
    model, info = load_model(whole / "model.safetensors")
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 4:
            assert torch.equal(tensor, saved["model"][name])
    logits = predict(model, stand_in[1].images, info["mean"], info["std"])
    assert accuracy(logits, stand_in[1].labels) == pytest.approx(metrics["test"]["accuracy"])
    kept, held_out = split(stand_in[0], tiny(**RICH))
    logits = predict(model, held_out.images, info["mean"], info["std"])
    loss = smooth_cross_entropy(logits, held_out.labels, 0.05).item()
    assert float(history(whole)[-1]["validation_loss"]) == pytest.approx(loss, rel=1e-5)
    inputs = model.conv1(normalize(kept.images, info["mean"], info["std"])).detach()
    torch.testing.assert_close(model.bn1.running_mean, inputs.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)


def test_a_run_killed_again_and_again_ends_with_the_bytes_of_one_that_was_not(
    stand_in, whole, tmp_path
):
    config = tiny(**RICH)
    fit_killed_after(1, config, tmp_path, stand_in)
    fit_killed_after(2, config, tmp_path, stand_in)
    lines = (tmp_path / "history.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "history.csv").write_text(
        "".join(lines[:-1]), encoding="utf-8"
    )  # as before the epoch's row
    (tmp_path / "checkpoint.pt").write_bytes(b"half")  # costs an epoch
    with pytest.warns(UserWarning, match="going on from checkpoint.previous.pt"):
        fit_killed_after(3, config, tmp_path, stand_in)
    (tmp_path / "history.csv").write_text("".join(lines), encoding="utf-8")
    said: list[str] = []
    fit_quietly(config, tmp_path, stand_in, log=said.append)
    assert [line.partition(" in")[0] for line in said] == ["going on from epoch 3 of 3"]
    assert reproducible(tmp_path) == reproducible(whole)
    timing = (tmp_path / "timing.csv").read_text(encoding="utf-8").splitlines()
    assert [row.partition(",")[0] for row in timing] == ["epoch", "0", "1", "1", "2"]
    before = content(tmp_path)
    metrics = fit_quietly(config, tmp_path, stand_in)  # finished: not trained again
    assert metrics == json.loads(before["metrics.json"]) and content(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": 0.2, "epochs": 5}, "epochs (3, now 5), learning_rate (0.1, now 0.2)"),
        ({"channels": "16,24"}, "channels ([16, 16], now [16, 24])"),
        ({"precision": "bf16"}, "precision ('fp32', now 'bf16')"),
    ],
)
def test_another_configuration_is_refused_naming_what_differs(stand_in, killed, changes, named):
    before = content(killed)
    with pytest.raises(InputError) as error:
        fit_quietly(tiny(**{**RICH, **changes}), killed, stand_in)
    assert f"these differ: {named}: choose" in str(error.value)
    assert content(killed) == before


def test_other_data_are_refused(stand_in, killed):
    train, test = stand_in
    data = r"these differ: data \('stand-in data', now 'CIFAR-10'\):"
    with pytest.raises(InputError, match=data):
        fit_quietly(tiny(**RICH), killed, (replace(train, source="CIFAR-10"), test))
    with pytest.raises(InputError, match=r"these differ: images \(60, now 50\):"):
        fit_quietly(tiny(**RICH), killed, (train[slice(50)], test))


def test_a_run_from_before_a_field_existed_counts_it_as_the_default(stand_in, started):
    config = json.loads((started / "config.json").read_text(encoding="utf-8"))
    del config["label_smoothing"]
    (started / "config.json").write_text(json.dumps(config), encoding="utf-8")
    fit_killed_after(2, tiny(**RICH), started, stand_in)
    (started / "config.json").write_text(json.dumps(config | {"gone": 1}), encoding="utf-8")
    with pytest.raises(InputError, match=r"these differ: gone \(1, now None\):"):
        fit_quietly(tiny(**RICH), started, stand_in)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("momenta"),
        lambda state: state["model"].pop("conv1.weight"),
        lambda state: state["model"].update({"conv1.weight": torch.zeros(24, 3, 3, 3)}),
        lambda state: state["momenta"].pop(0),
        lambda state: state["momenta"].insert(0, torch.zeros(5)),
        lambda state: state.update(history="[5]"),
        lambda state: state.update(history=[{"epoch": 0}]),
    ],
)
def test_a_whole_checkpoint_of_something_else_is_refused(stand_in, started, change):
    run = RunDirectory(started)
    state = run.load()
    change(state)
    run.save(state)
    before = (started / "checkpoint.pt").read_bytes()
    with pytest.raises(
        InputError, match=r"^run directory: its checkpoint is not of this run[^\n]*$"
    ):
        fit_quietly(tiny(**RICH), started, stand_in)
    assert (started / "checkpoint.pt").read_bytes() == before


def test_a_run_that_goes_on_with_other_threads_says_so_and_trains(stand_in, started):
    run = RunDirectory(started)
    before = run.read_json("environment.json")
    run.write_json("environment.json", before | {"threads": 64, "winograd": not before["winograd"]})
    said: list[str] = []
    fit_quietly(tiny(**RICH), started, stand_in, log=said.append)
    assert "threads 1 (before: 64), winograd" in said[1] and len(history(started)) == 3
    assert run.read_json("environment.json") == before


def test_a_diverged_run_names_epoch_and_step_and_keeps_its_checkpoint(stand_in, tmp_path):
    config = tiny(learning_rate=1e30)  # the first epoch trains at rate 0
    with pytest.raises(InputError, match=r"not finite at epoch 1, step [1-3]; [^\n]*rate[^\n]*$"):
        fit_quietly(config, tmp_path, stand_in)
    saved = RunDirectory(tmp_path).load()
    assert len(json.loads(saved["history"])) == 1 and all(
        t.isfinite().all() for t in saved["model"].values()
    )
    assert len(history(tmp_path)) == 1
    assert not (tmp_path / "metrics.json").exists()


def test_a_last_batch_of_one_image_trains_where_batch_normalisation_can(stand_in):
    train = stand_in[0][torch.arange(17)]
    deep = {"blocks": "1,1,1,1,1,1", "channels": "16,16,16,16,16,16"}
    for changes in (
        {},
        {"half_size_epochs": 2},
        {"blocks": "1,1,1,1,1", "channels": "16,16,16,16,16"},
    ):
        config = resolve(tiny(**changes), CPU, 17)
        train_quietly(State(config, CPU), train, config)
    for changes in (
        deep,
        {**deep, "blocks": "1,1,1,1,1", "channels": "16,16,16,16,16", "half_size_epochs": 2},
    ):
        with pytest.raises(InputError, match="batches of 16 out of 17 images end with 1, which"):
            resolve(tiny(**changes), CPU, 17)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            train_quietly(State(tiny(**changes), CPU), train, tiny(**changes))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"channels": "400,800"}, "budget"),
        ({"blocks": "1"}, "as many blocks as channels"),
        ({"train_size": 1000}, "train_size"),
        ({"validation_size": 59}, "can't split 60 images into 1 and 59"),
        ({"precision": "fp8"}, "fp8"),
    ],
)
def test_a_mistake_found_before_training_leaves_no_directory(stand_in, tmp_path, wrong, message):
    with pytest.raises(InputError, match=message):
        fit_quietly(tiny(epochs=1, **wrong), tmp_path / "run", stand_in)
    assert not (tmp_path / "run").exists()
