"""A run's promises: it stops when it can't write, its seed decides its parts, it resumes whole."""

import csv
import io
import os
from dataclasses import replace

import pytest
import torch
from tqdm import tqdm

from cifar_lib import files
from cifar_lib import fit as fitting
from cifar_lib.checkpoint import RunDirectory
from cifar_lib.errors import InputError
from cifar_lib.fit import fit, split
from cifar_lib.recipes import TrainConfig, recipe
from cifar_lib.train import State, Step, epoch_plan, train_one_epoch

CPU = torch.device("cpu")


def tiny(**changes: object) -> TrainConfig:
    fields = {"blocks": "1", "channels": "16", "batch_size": 30, "epochs": 6, "warmup_epochs": 1}
    fields |= {"precision": "fp32", "compile": "false"}
    return recipe("report", **{**fields, **changes})


def test_a_full_disk_stops_the_training_at_the_next_checkpoint(stand_in, tmp_path, monkeypatch):
    def save(self, state: dict) -> None:
        raise InputError("can't write checkpoint.pt (No space left on device): free the disk")

    monkeypatch.setattr(RunDirectory, "save", save)
    lines: list[str] = []
    with pytest.raises(InputError, match="No space left"):
        fit(tiny(), tmp_path, *stand_in, device="cpu", log=lines.append)
    assert len(lines) == 1  # of six epochs: the second one ends with the error


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    content, sizes = b"x" * 1000, []  # stays in Python's buffer until it is flushed
    monkeypatch.setattr(os, "fsync", lambda number: sizes.append(os.fstat(number).st_size))
    files.write_atomically(tmp_path / "file", content)
    assert sizes[0] == len(content)


def test_a_resumed_run_goes_on_with_the_scale_of_its_fp16_gradients():
    config = tiny(precision="fp16")
    before, after = State(config, CPU), State(config, CPU)
    before.scaler.load_state_dict(before.scaler.state_dict() | {"scale": 2.0**7})
    after.load(before.content())
    assert after.scaler.state_dict()["scale"] == 2.0**7


def test_compiling_leaves_no_trace_in_the_batch_statistics(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    state = State(tiny(), CPU)
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    Step(state, replace(tiny(batch_size=4), compile=True), log=lambda _: None)
    after = state.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("watched", [True, False])
def test_the_test_set_is_watched_only_where_the_recipe_says_so(
    stand_in, tmp_path, watched, monkeypatch
):
    seen: list[object] = []
    predict = fitting.predict

    def watch(model, images, *how):
        seen.append(images)
        return predict(model, images, *how)

    monkeypatch.setattr(fitting, "predict", watch)
    fit(tiny(epochs=2, watch_test=watched), tmp_path, *stand_in, device="cpu", log=lambda _: None)
    rows = list(csv.DictReader((tmp_path / "history.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["test_accuracy"] != "" for row in rows] == [watched, watched]
    assert len(seen) == (3 if watched else 1)  # at the end it is scored in any case


def test_the_runs_seed_draws_the_training_part_and_the_validation_part(stand_in):
    train = replace(stand_in[0], ids=tuple(range(60)))
    for changes in ({"train_size": 30}, {"validation_size": 20}):
        parts = [split(train, tiny(seed=seed, **changes)) for seed in (0, 1, 1)]
        ids = [[part.ids for part in pair if part is not None] for pair in parts]
        assert ids[0] != ids[1] == ids[2]


@pytest.mark.parametrize("unlabelled", [0, 1])
def test_images_without_labels_are_refused_for_training_and_for_the_score(
    stand_in, tmp_path, unlabelled
):
    data = list(stand_in)
    data[unlabelled] = replace(data[unlabelled], labels=None)
    with pytest.raises(InputError, match="fit: expected labels"):
        fit(tiny(), tmp_path / "run", *data, device="cpu")
    assert not (tmp_path / "run").exists()


def test_the_bar_counts_every_image_of_an_epoch(stand_in):
    state = State(tiny(batch_size=25), CPU)
    with tqdm(file=io.StringIO()) as bar:
        plan = epoch_plan(tiny(), 60, 0)
        train_one_epoch(Step(state, tiny(batch_size=25)), stand_in[0], plan, bar)
    assert bar.n == 60
