"""What makes the records and weights of the repository from finished runs."""

import hashlib
import json
import statistics
from pathlib import Path

import pytest
import torch

from cifar_lib.data import Normalization
from cifar_lib.errors import InputError
from cifar_lib.evaluate import accuracy, predict
from cifar_lib.fit import fit
from cifar_lib.model import SHIPPED, ResNet, WeightsInfo, load_model
from cifar_lib.recipes import recipe
from notebooks.course.corruptions import shifted
from scripts import archive_run, weights_card

SMALL = {"blocks": "1", "channels": "16", "epochs": "1", "half_size_epochs": "0"}
SMALL |= {"train_size": "40", "validation_size": "10"}


@pytest.fixture
def script(tmp_path, monkeypatch, cifar10):
    """The program with folders of its own, and 100 test images."""
    for name in ("RESULTS", "WEIGHTS"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(archive_run, name, tmp_path / name)
    train, test = cifar10
    monkeypatch.setattr(archive_run, "load_cifar10", lambda **_: (train, test[:100]))
    return archive_run


def trained(folder: Path, images, seed: int, **changes: str) -> Path:
    train, test = images
    config = recipe("small", **{**SMALL, "seed": str(seed), **changes})
    fit(config, folder / f"{seed}", train, test[:100], "cpu", log=lambda _: None)
    return folder / f"{seed}"


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_seed_chosen_beforehand_becomes_the_packages_weights(script, tmp_path, cifar10):
    run = trained(tmp_path, cifar10, 42)
    metrics = script.archive(run)
    weights = script.WEIGHTS / "small.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    listed = (script.WEIGHTS / "SHA256SUMS").read_text(encoding="utf-8")
    assert listed == f"{digest}  small.safetensors\n"
    model, info = load_model(weights)
    whole, _ = load_model(run / "model.safetensors")
    assert torch.equal(model.conv1.weight, whole.conv1.weight.half().float())
    assert info.temperature == metrics["half_precision"]["temperature"] > 0
    folder = script.RESULTS / "small-seed42"
    assert {file.name for file in folder.iterdir()} == {*script.RECORDS, "metrics.json"}
    assert read(folder / "metrics.json") == json.loads(json.dumps(metrics))
    assert metrics["test"] == read(run / "metrics.json")["test"]


def test_the_card_that_is_here_is_written_from_the_records():
    path = weights_card.WEIGHTS / "README.md"
    written = path.read_text(encoding="utf-8")
    assert written == weights_card.card(), "it is stale: python -m scripts.weights_card"


def test_archiving_a_seed_writes_it_into_the_card(script, tmp_path, cifar10):
    card = script.WEIGHTS / "README.md"
    scores = {}
    for seed in (0, 42, 1):
        metrics = script.archive(trained(tmp_path, cifar10, seed))
        scores[seed] = f"{100 * metrics['half_precision']['tta_none']['accuracy']:.2f}"
        assert card.exists() == (seed != 0), "without weights there is nothing to describe"
    text = card.read_text(encoding="utf-8")
    first = f"| all seeds that were run | {scores[42]} % (seed 42), "
    assert f"{first}{scores[0]} % (seed 0), {scores[1]} % (seed 1) |" in text
    mean, deviation = (f(map(float, scores.values())) for f in (statistics.mean, statistics.stdev))
    assert f"| their mean | {mean:.2f} ± {deviation:.2f} %, n = 3 |" in text
    assert "`results/small-seed42`, `results/small-seed0` and `results/small-seed1`." in text

    # A run of another configuration is no other seed.
    script.archive(trained(tmp_path / "other", cifar10, 2, learning_rate="0.01"))
    assert card.read_text(encoding="utf-8") == text


def test_a_setting_that_came_later_has_its_default_in_an_older_run(tmp_path):
    newest = weights_card.config_of(weights_card.RESULTS / "report-seed42")
    policy = {name: value for name, value in newest["policy"].items() if name != "cutout"}
    older = {name: value for name, value in newest.items() if name != "nesterov"}
    older |= {"policy": policy, "a setting that is gone": 1}
    (tmp_path / "config.json").write_text(json.dumps(older), encoding="utf-8")
    assert weights_card.config_of(tmp_path) == newest


def test_other_seeds_count_for_the_mean_and_ship_nothing(script, tmp_path, cifar10):
    runs = [trained(tmp_path, cifar10, seed) for seed in (0, 1)]
    scores = [100 * script.archive(run)["test"]["accuracy"] for run in runs]
    assert not list(script.WEIGHTS.iterdir())
    mean, deviation = sum(scores) / 2, abs(scores[0] - scores[1]) / 2**0.5
    expected = f"small, 1 epochs, seed 0, 1: {mean:.2f}% ± {deviation:.2f}%"
    assert script.over_seeds("small") == expected

    # Another configuration is no other seed, and takes the name of what was there.
    others = [trained(tmp_path / f"{i}", cifar10, 0, learning_rate=f"0.0{i}") for i in (1, 2)]
    for run in (*others, others[-1]):  # the last one twice
        script.archive(run)
    assert len(script.over_seeds("small").splitlines()) == 3
    names = ("small-seed0-1-epochs", "small-seed1", "small-seed0-1-epochs-2", "small-seed0")
    assert {folder.name for folder in script.RESULTS.iterdir()} == set(names)
    for run, name in zip((*runs, *others), names, strict=True):
        assert read(script.RESULTS / name / "config.json") == read(run / "config.json")


def test_only_a_finished_run_on_real_data_is_archived(script, tmp_path, stand_in):
    with pytest.raises(InputError, match="archive: expected a finished run, found no metrics.json"):
        script.archive(tmp_path)
    run = trained(tmp_path, stand_in, 42, train_size="20")
    with pytest.raises(InputError, match="archive: expected a run on"):
        script.archive(run)
    assert not list(script.WEIGHTS.iterdir()) and not list(script.RESULTS.iterdir())


def test_the_check_compares_with_what_is_recorded(script, tmp_path, monkeypatch, capsys, cifar10):
    test = cifar10[1][:100]
    torch.manual_seed(0)
    model = ResNet((1,), (16,)).eval()
    info = WeightsInfo(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), temperature=1.0)
    monkeypatch.setattr(script, "load_model", lambda _: (model, info))
    for name in ("SHIPPED_RUN", "SHIFT"):
        monkeypatch.setattr(script, name, tmp_path)
    config = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.2]}  # that of training
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    scores, _ = script.score(model, info, test, config)

    def measured(images: torch.Tensor, normalization: Normalization, tta: str = "none") -> float:
        return accuracy(predict(model, images, normalization, tta=tta), test.labels)

    trained_with = Normalization(config["mean"], config["std"])
    assert scores["tta_flip"]["accuracy"] == measured(test.images, info.test_normalization, "flip")
    assert scores["training_normalisation"]["accuracy"] == measured(test.images, trained_with)
    (tmp_path / "metrics.json").write_text(json.dumps({"half_precision": scores}), encoding="utf-8")
    moved = shifted(test.images, "statistics", 1)
    plain, normalized = (
        measured(moved, n) for n in (info.test_normalization, Normalization.of(moved))
    )

    def check(recorded: float, sha256: str) -> tuple[bool, str]:
        ways = {"none + none": {"accuracy": plain}, "normalize + none": {"accuracy": recorded}}
        default = {"adapt": "normalize", "tta": "none"}
        verdict = {"default": default, "custom": ways, "weights": {"sha256": sha256}}
        (tmp_path / "verdict.json").write_text(json.dumps(verdict), encoding="utf-8")
        return script.check(), capsys.readouterr().out

    shipped = hashlib.sha256(SHIPPED.read_bytes()).hexdigest()
    same, said = check(normalized, shipped)
    assert same and f"custom set, normalize, TTA none                {normalized:.2%}" in said
    assert not check(normalized - 0.1, shipped)[0]
    same, said = check(normalized - 0.1, "another")
    assert same and "measured with other weights" in said, "no comparison, no complaint"
