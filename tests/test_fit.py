"""Whole runs: what they write, how they resume, and what they refuse."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cifar_lib.checkpoint import RunDirectory
from cifar_lib.data import ImageSet
from cifar_lib.errors import InputError
from cifar_lib.evaluate import accuracy, predict
from cifar_lib.fit import fit, resolve, split
from cifar_lib.model import load_model
from cifar_lib.recipes import learning_rates
from cifar_lib.train import State, Step, smooth_cross_entropy, train_one_epoch
from tests.test_train import tiny

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
RICH = {"nesterov": True, "validation_size": 20, "watch_test": False}
REPRODUCIBLE = ("checkpoint.pt", "checkpoint.previous.pt", "history.csv", "metrics.json")
REPRODUCIBLE += ("model.safetensors",)


def fit_quietly(
    config, path: Path, data: tuple[ImageSet, ImageSet], log=lambda _: None, **how
) -> dict:
    return fit(config, path, *data, device="cpu", log=log, **how)


def fit_killed_after(
    epoch: int, config, path: Path, data: tuple[ImageSet, ImageSet], **how
) -> None:
    """Training that dies right after the line of the epoch (1-based)."""

    def log(line: str) -> None:
        if line.startswith(f"epoch {epoch}/"):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit_quietly(config, path, data, log, **how)


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir() if file.name != ".lock"}


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def history(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(lines(path / "history.csv")))


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


# What a run writes.


def test_a_run_writes_all_its_files(stand_in, tmp_path):
    said: list[str] = []
    metrics = fit_quietly(tiny(), tmp_path, stand_in, said.append)
    more = ("config.json", "environment.json", "timing.csv")
    assert sorted(content(tmp_path)) == sorted([*REPRODUCIBLE, *more])

    rows = history(tmp_path)
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert [float(row["learning_rate"]) for row in rows] == learning_rates(tiny())
    assert all(row["validation_loss"] == "" and float(row["test_loss"]) > 0 for row in rows)
    assert [line.partition("  ")[0] for line in said] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]

    assert RunDirectory(tmp_path).read_json("metrics.json") == metrics
    assert metrics["test"]["n"] == 30 and metrics["train_images"] == 60
    assert metrics["data"] == stand_in[1].source
    assert float(rows[-1]["test_accuracy"]) == metrics["test"]["accuracy"]
    for line in lines(tmp_path / "timing.csv")[1:]:  # evaluating takes part of the seconds
        _, seconds, images_per_second = map(float, line.split(","))
        assert images_per_second > 60 / seconds


def test_each_epoch_is_evaluated_and_shown_at_the_size_that_it_trained_at(stand_in, tmp_path):
    shown = []

    def look(network: torch.nn.Module, rows: list[dict]) -> None:
        logits = predict(network, stand_in[1].images, config.test_normalization)
        shown.append((len(rows), accuracy(logits, stand_in[1].labels), type(network).__name__))

    config = tiny(half_size_epochs=2)
    fit(config, tmp_path, *stand_in, device="cpu", log=lambda _: None, after_epoch=look)
    assert [count for count, _, _ in shown] == [1, 2, 3]
    assert [name for _, _, name in shown] == ["Sequential", "Sequential", "ResNet"]
    watched = [float(row["test_accuracy"]) for row in history(tmp_path)]
    assert [share for _, share, _ in shown] == pytest.approx(watched)


def test_looking_at_a_run_changes_none_of_its_bytes(stand_in, tmp_path):
    def look(network: torch.nn.Module, rows: list[dict]) -> None:
        predict(network, stand_in[1].images, tiny().test_normalization)

    for name, after_epoch in {"looked at": look, "alone": None}.items():
        config, path = tiny(half_size_epochs=2), tmp_path / name
        fit(config, path, *stand_in, "cpu", log=lambda _: None, after_epoch=after_epoch)
    left, right = (content(tmp_path / name) for name in ("looked at", "alone"))
    assert all(left[name] == right[name] for name in REPRODUCIBLE)


def test_the_last_weights_are_the_ones_evaluated_and_kept_with_rebased_statistics(stand_in, whole):
    saved, metrics = RunDirectory(whole).load(), RunDirectory(whole).read_json("metrics.json")
    model, info = load_model(whole / "model.safetensors")
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 4:
            assert torch.equal(tensor, saved["model"][name])

    # The test set is scored at the end, and watched only where the recipe says so.
    logits = predict(model, stand_in[1].images, info.test_normalization)
    assert accuracy(logits, stand_in[1].labels) == pytest.approx(metrics["test"]["accuracy"])
    assert {row["test_loss"] for row in history(whole)} == {""}

    kept, held_out = split(stand_in[0], tiny(**RICH))
    logits = predict(model, held_out.images, info.test_normalization)
    loss = smooth_cross_entropy(logits, held_out.labels, 0.05).item()
    assert float(history(whole)[-1]["validation_loss"]) == pytest.approx(loss, rel=1e-5)
    inputs = model.conv1(info.test_normalization(kept.images)).detach()
    torch.testing.assert_close(model.bn1.running_mean, inputs.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)


def test_the_parts_are_disjoint_balanced_and_drawn_by_the_runs_seed(stand_in):
    train = replace(stand_in[0], ids=tuple(range(60)))
    kept, held_out = split(train, tiny(train_size=40, validation_size=10))
    assert len(set(kept.ids + held_out.ids)) == 40
    assert kept.labels.bincount().tolist() == [3] * 10
    assert held_out.labels.bincount().tolist() == [1] * 10
    for part in (kept, held_out):
        assert torch.equal(part.images, train.images[list(part.ids)])
    for size in (None, 60):
        assert split(train, tiny(train_size=size)) == (train, None)
    for changes in ({"train_size": 30}, {"validation_size": 20}):
        first, second, again = (split(train, tiny(seed=s, **changes))[0].ids for s in (0, 1, 1))
        assert first != second == again


# How a run resumes.


def test_a_run_killed_again_and_again_ends_with_the_bytes_of_one_that_was_not(
    stand_in, whole, tmp_path
):
    config = tiny(**RICH)
    fit_killed_after(1, config, tmp_path, stand_in)
    fit_killed_after(2, config, tmp_path, stand_in)
    table = (tmp_path / "history.csv").read_bytes()
    (tmp_path / "history.csv").write_bytes(table[: table.rindex(b"\n1,") + 1])  # a row is lost
    (tmp_path / "checkpoint.pt").write_bytes(b"half")  # costs an epoch
    with pytest.warns(UserWarning, match="resuming from checkpoint.previous.pt"):
        fit_killed_after(3, config, tmp_path, stand_in)
    (tmp_path / "history.csv").write_bytes(table)

    said: list[str] = []
    fit_quietly(config, tmp_path, stand_in, said.append)
    assert [line.partition(" in")[0] for line in said] == ["resuming after epoch 3 of 3"]
    before = content(tmp_path)
    for name in REPRODUCIBLE:
        assert before[name] == (whole / name).read_bytes(), name
    timing = [row.partition(",")[0] for row in lines(tmp_path / "timing.csv")]
    assert timing == ["epoch", "0", "1", "1", "2"]

    metrics = fit_quietly(config, tmp_path, stand_in)  # finished: not trained again
    assert metrics == json.loads(before["metrics.json"]) and content(tmp_path) == before


def test_a_run_that_resumes_with_other_threads_says_so_and_trains(stand_in, started):
    run = RunDirectory(started)
    before = run.read_json("environment.json")
    run.write_json("environment.json", before | {"threads": 64, "winograd": not before["winograd"]})
    said: list[str] = []
    fit_quietly(tiny(**RICH), started, stand_in, said.append)
    assert "threads 1 (before: 64), winograd" in said[1] and len(history(started)) == 3
    assert run.read_json("environment.json") == before


def test_a_run_begun_by_an_earlier_version_is_resumed(stand_in, started):
    run = RunDirectory(started)
    config = run.read_json("config.json")
    for fields, name in ((config, "ema_decay"), (config["policy"], "alternating_flip")):
        del fields[name]  # before this field existed: it counts as the default
    run.write_json("config.json", config | {"ranks": 1})  # a field that went since
    fit_killed_after(2, tiny(**RICH), started, stand_in)
    for gone, named in (({"ranks": 2}, r"ranks \(2, now None\)"), ({"new": 1}, r"new \(1, now N")):
        run.write_json("config.json", config | gone)
        with pytest.raises(InputError, match=f"these differ: {named}"):
            fit_quietly(tiny(**RICH), started, stand_in)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": 0.2, "epochs": 5}, "epochs (3, now 5), learning_rate (0.1, now 0.2)"),
        ({"channels": "16,24"}, "channels ([16, 16], now [16, 24])"),
        ({"source": "CIFAR-10"}, "data ('stand-in data', now 'CIFAR-10')"),
        ({"images": 50}, "images (60, now 50)"),
    ],
)
def test_another_run_is_refused_naming_what_differs(stand_in, killed, changes, named):
    changes, (train, test) = dict(changes), stand_in
    train = replace(train, source=changes.pop("source", train.source))
    train = train[: changes.pop("images", 60)]
    before = content(killed)
    with pytest.raises(InputError) as error:
        fit_quietly(tiny(**RICH | changes), killed, (train, test))
    assert f"these differ: {named}: choose" in str(error.value)
    assert content(killed) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("momenta"),
        lambda state: state["model"].pop("conv1.weight"),
        lambda state: state["momenta"].pop(0),
        lambda state: state["momenta"].insert(0, torch.zeros(5)),
        lambda state: state["momenta"].append(torch.zeros(5)),
        lambda state: state["momenta"].__setitem__(0, torch.zeros(1, 1, 1, 1)),
        lambda state: state.update(history="[5]"),
        lambda state: state.update(history=[{"epoch": 0}]),
    ],
)
def test_a_whole_checkpoint_of_something_else_is_refused(stand_in, started, change):
    run = RunDirectory(started)
    state = run.load()
    change(state)
    run.save(state)
    before = content(started)
    message = r"^run directory: its checkpoint isn't of this run [^\n]*$"
    with pytest.raises(InputError, match=message):
        fit_quietly(tiny(**RICH), started, stand_in)
    assert content(started) == before


@pytest.mark.parametrize("momentum", ["0.9", "0"])
def test_a_run_with_an_average_resumes_to_the_same_bytes_and_ends_with_the_average(
    stand_in, tmp_path, momentum
):
    changes = {"ema_decay": 0.8, "validation_size": 20, "momentum": momentum}
    config = tiny(**changes, **{"policy.alternating_flip": True, "policy.ops_probability": 0.5})
    fit_quietly(config, tmp_path / "whole", stand_in)
    fit_killed_after(1, config, tmp_path / "killed", stand_in)
    fit_quietly(config, tmp_path / "killed", stand_in)
    whole, killed = (content(tmp_path / name) for name in ("whole", "killed"))
    assert all(whole[name] == killed[name] for name in REPRODUCIBLE)

    # What is saved, and evaluated after each epoch, is the average and not the weights.
    saved = RunDirectory(tmp_path / "whole").load()
    model, info = load_model(tmp_path / "whole" / "model.safetensors")
    weight = model.layer1[0].conv1.weight
    assert torch.equal(weight, saved["average"]["layer1.0.conv1.weight"])
    assert not torch.equal(weight, saved["model"]["layer1.0.conv1.weight"])
    _, held_out = split(stand_in[0], config)
    logits = predict(model, held_out.images, info.test_normalization)
    loss = smooth_cross_entropy(logits, held_out.labels, 0.05).item()
    assert float(history(tmp_path / "whole")[-1]["validation_loss"]) == pytest.approx(
        loss, rel=1e-5
    )

    # The average takes no part in the training.
    fit_quietly(replace(config, ema_decay=0), tmp_path / "plain", stand_in)
    plain = RunDirectory(tmp_path / "plain").load()
    assert all(torch.equal(plain["model"][name], saved["model"][name]) for name in plain["model"])
    assert "average" not in plain


# What stops a run.


def test_a_diverged_run_names_epoch_and_step_and_keeps_its_checkpoint(stand_in, tmp_path):
    config = tiny(learning_rate=1e30)  # the first epoch trains at rate 0
    with pytest.raises(InputError, match=r"not finite at epoch 2, step [23] [^\n]*rate[^\n]*$"):
        fit_quietly(config, tmp_path, stand_in)
    saved = RunDirectory(tmp_path).load()
    assert len(json.loads(saved["history"])) == len(history(tmp_path)) == 1
    assert all(value.isfinite().all() for value in saved["model"].values())
    assert not (tmp_path / "metrics.json").exists()


def test_a_full_disk_stops_the_training_at_the_next_checkpoint(stand_in, tmp_path, monkeypatch):
    def save(self, state: dict) -> None:
        raise InputError("can't write checkpoint.pt (No space left on device): free the disk")

    monkeypatch.setattr(RunDirectory, "save", save)
    said: list[str] = []
    with pytest.raises(InputError, match="No space left"):
        fit_quietly(tiny(), tmp_path, stand_in, said.append)
    assert len(said) == 1  # of three epochs: the second one ends with the error


@pytest.mark.parametrize(
    ("changes", "unlabelled", "message"),
    [
        ({"train_size": 61}, None, "train_size: expected at most 60 images, got 61"),
        ({"validation_size": 59}, None, "can't split 60 images into 1 and 59"),
        ({}, 0, "fit: expected labelled images"),
        ({}, 1, "fit: expected labelled images"),
    ],
)
def test_a_mistake_found_before_training_leaves_no_directory(
    stand_in, tmp_path, changes, unlabelled, message
):
    data = list(stand_in)
    if unlabelled is not None:
        data[unlabelled] = replace(data[unlabelled], labels=None)
    with pytest.raises(InputError, match=message):
        fit_quietly(tiny(**changes), tmp_path / "run", data)
    assert not (tmp_path / "run").exists()


def test_a_last_batch_of_one_image_trains_where_batch_normalisation_can(stand_in):
    train = stand_in[0][torch.arange(17)]  # batches of 16 and 1
    five = {"blocks": "1,1,1,1,1", "channels": "16,16,16,16,16"}  # halves an image four times
    six = {"blocks": "1,1,1,1,1,1", "channels": "16,16,16,16,16,16"}
    for changes in ({}, {"half_size_epochs": 2}, five):
        config = resolve(tiny(**changes), CPU, 17)
        train_one_epoch(Step(State(config, CPU)), train, 0)
    resolve(tiny(**six), CPU, 18)  # the last batch is of 2
    for changes in (six, {**five, "half_size_epochs": 2}):
        config = tiny(**changes)
        with pytest.raises(InputError, match="batches of 16 out of 17 images end with 1, which"):
            resolve(config, CPU, 17)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            train_one_epoch(Step(State(config, CPU)), train, 0)


def test_only_long_runs_on_a_cuda_gpu_are_compiled_unless_asked_for():
    def is_compiled(device: torch.device, **changes: object) -> bool:
        return resolve(tiny(batch_size=24, **changes), device, 2390).compile  # 100 steps per epoch

    assert is_compiled(CUDA, compile=None, epochs=20)
    assert not is_compiled(CUDA, compile=None, epochs=19)
    assert not is_compiled(CPU, compile=None, epochs=60)
    assert is_compiled(CPU, compile=True)
    assert not is_compiled(CUDA, compile=False, epochs=60)
