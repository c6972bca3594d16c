"""What makes of finished runs the records and weights of the repository."""

import hashlib
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from cifar_lib.data import channel_statistics
from cifar_lib.errors import InputError
from cifar_lib.evaluate import accuracy, predict
from cifar_lib.fit import fit
from cifar_lib.model import SHIPPED, load_model
from cifar_lib.recipes import recipe
from cifar_lib.shift import shifted

SMALL = {
    "blocks": "1",
    "channels": "16",
    "train_size": "60",
    "epochs": "1",
    "half_size_epochs": "0",
}


@pytest.fixture
def script(tmp_path, monkeypatch, cifar10):
    """results/publish.py with folders of its own, and 100 test images."""
    path = Path(__file__).parent.parent / "results" / "publish.py"
    spec = importlib.util.spec_from_file_location("publish", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("RESULTS", "WEIGHTS"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(module, name, tmp_path / name)
    train, test = cifar10
    monkeypatch.setattr(module, "load_cifar10", lambda: (train, test[:100]))
    return module


def trained(folder: Path, cifar10, seed: int, **changes: str) -> Path:
    train, test = cifar10
    config = recipe("quick", **{**SMALL, "validation_size": "10", "seed": str(seed), **changes})
    fit(config, folder / f"{seed}", train, test[:100], "cpu", log=lambda _: None)
    return folder / f"{seed}"


def test_the_seed_chosen_beforehand_becomes_the_packages_weights(script, tmp_path, cifar10):
    run = trained(tmp_path, cifar10, 42)
    metrics = script.publish(run)
    weights = script.WEIGHTS / "quick.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert (script.WEIGHTS / "SHA256SUMS").read_text() == f"{digest}  quick.safetensors\n"
    model, info = load_model(weights)
    whole, _ = load_model(run / "model.safetensors")
    torch.testing.assert_close(
        model.conv1.weight, whole.conv1.weight.half().float(), rtol=0, atol=0
    )
    assert info["temperature"] == metrics["half_precision"]["temperature"] > 0
    folder = script.RESULTS / "quick-seed42"
    assert {file.name for file in folder.iterdir()} == {*script.RECORDS, "metrics.json"}
    assert json.loads((folder / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    assert metrics["test"] == json.loads((run / "metrics.json").read_text())["test"]


def test_other_seeds_count_for_the_mean_and_ship_nothing(script, tmp_path, cifar10):
    scores = []
    for seed in (0, 1):
        metrics = script.publish(trained(tmp_path, cifar10, seed))
        scores.append(100 * metrics["test"]["accuracy"])
    assert not list(script.WEIGHTS.iterdir())
    spread = abs(scores[0] - scores[1]) / 2**0.5
    assert (
        script.over_seeds("quick")
        == f"quick, 1 epochs, seed 0, 1: {sum(scores) / 2:.2f}% ± {spread:.2f}%"
    )
    older = script.RESULTS / "quick-seed0" / "config.json"  # from before there was a `start`
    older.write_text(
        json.dumps({k: v for k, v in json.loads(older.read_text()).items() if k != "start"})
    )
    assert len(script.over_seeds("quick").splitlines()) == 1
    script.publish(trained(tmp_path, cifar10, 5, learning_rate="0.01"))
    assert len(script.over_seeds("quick").splitlines()) == 2, (
        "another configuration is no other seed"
    )


def test_the_records_of_another_run_are_kept(script, tmp_path, cifar10):
    runs = [trained(tmp_path / f"{i}", cifar10, 0, learning_rate=f"0.0{i}") for i in (1, 2, 3)]
    for run in (*runs, runs[-1]):  # the last one twice
        script.publish(run)
    names = ("quick-seed0-1-epochs", "quick-seed0-1-epochs-2", "quick-seed0")
    assert sorted(folder.name for folder in script.RESULTS.iterdir()) == sorted(names)
    for run, name in zip(runs, names, strict=True):
        assert (script.RESULTS / name / "config.json").read_bytes() == (
            run / "config.json"
        ).read_bytes()


def test_only_a_finished_run_on_real_data_is_published(script, tmp_path, cifar10, stand_in):
    with pytest.raises(InputError, match="publish: expected a finished run, found no metrics.json"):
        script.publish(tmp_path)
    run = trained(tmp_path, stand_in, 42, train_size="20")
    with pytest.raises(InputError, match="publish: expected a run on"):
        script.publish(run)
    assert not list(script.WEIGHTS.iterdir()) and not list(script.RESULTS.iterdir())


def test_the_check_compares_with_what_is_recorded(script, tmp_path, monkeypatch, capsys, cifar10):
    test = cifar10[1][:30]
    monkeypatch.setattr(script, "load_cifar10", lambda **_: (None, test))
    monkeypatch.setattr(script, "SHIPPED_RUNS", (tmp_path,))
    monkeypatch.setattr(script, "SHIFT", tmp_path)
    model, info = load_model("pretrained")
    scores, _ = script.score(model, info, test)
    (tmp_path / "metrics.json").write_text(json.dumps({"half_precision": scores}))
    moved = shifted(test.images, "statistics", 1)
    own = tuple(tuple(values.tolist()) for values in channel_statistics(moved))
    plain, normalized = (
        accuracy(predict(model, moved, *mean_std), test.labels)
        for mean_std in ((info["mean"], info["std"]), own)
    )
    shipped = hashlib.sha256(SHIPPED.read_bytes()).hexdigest()
    for recorded in (normalized, normalized - 0.1):
        ways = {"none + none": {"accuracy": plain}, "normalize + none": {"accuracy": recorded}}
        verdict = {
            "default": {"adapt": "normalize", "tta": "none"},
            "custom": ways,
            "weights": {"sha256": shipped},
        }
        (tmp_path / "verdict.json").write_text(json.dumps(verdict))
        assert script.check() == (recorded == normalized)
    assert (
        f"custom set, normalize, views none              {normalized:.2%}"
        in capsys.readouterr().out
    )
    (tmp_path / "verdict.json").write_text(json.dumps(verdict | {"weights": {"sha256": "another"}}))
    assert script.check(), (
        "the shifts were measured with other weights: no comparison, no complaint"
    )
    assert "measured with other weights" in capsys.readouterr().out
