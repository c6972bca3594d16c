"""The command line answers what the library does, and a mistake with one line and exit code 2."""

import copy
import errno
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from cifar_lib import cli, shift
from cifar_lib.checkpoint import RunDirectory
from cifar_lib.data import CIFAR10_MEAN, CIFAR10_STD, CLASSES, ImageSet, Normalization
from cifar_lib.evaluate import fit_temperature, predict, summarize
from cifar_lib.explain import grad_cam, picture_with_heat
from cifar_lib.fit import fit, split
from cifar_lib.kaggle import read_test_file
from cifar_lib.model import ResNet, WeightsInfo, load_model, save_model
from cifar_lib.pictures import read_picture
from cifar_lib.recipes import recipe
from notebooks.course.corruptions import generate_test_file
from notebooks.course.reference import SHIFT
from notebooks.course.stand_in import generate_stand_in
from tests.conftest import contents, untrained_network

SETTINGS = "--set blocks=1,1 --set channels=16,32 --set batch_size=32 --set precision=fp32"
TRAIN = f"train --recipe small --run run --epochs 1 --train-size 120 {SETTINGS} --device cpu"
WEIGHTS = "--weights tiny.safetensors --device cpu"
SUBMIT = f"submit {WEIGHTS} --test test.pkl"
# Far apart in every channel, so that exchanging or replacing them changes the answers.
INFO = WeightsInfo(
    recipe="small",
    mean=(0.55, 0.35, 0.45),
    std=(0.15, 0.3, 0.2),
    train_mean=(0.3, 0.7, 0.5),
    train_std=(0.4, 0.1, 0.3),
)


@pytest.fixture(scope="module")
def images() -> tuple[ImageSet, ImageSet]:
    return generate_stand_in(200, 100)


@pytest.fixture(scope="module")
def network(images) -> ResNet:
    """Its logits are around zero for every class, so that none wins everywhere."""
    model = untrained_network(0.3)
    logits = predict(model, images[1].images, INFO.test_normalization)
    model.linear.weight.data /= logits.std(0)[:, None]
    model.linear.bias.data = (model.linear.bias.data - logits.mean(0)) / logits.std(0)
    return model


@pytest.fixture
def place(tmp_path, monkeypatch, images, network) -> Path:
    """A working directory whose name isn't plain, with weights, a picture, and a test file."""
    folder = tmp_path / "ein Ordner für Übungen 演習"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(cli, "load_cifar10", lambda root: images)
    save_model(Path("tiny.safetensors"), network, INFO)
    huge = copy.deepcopy(network)
    huge.linear.weight.data.fill_(3e38)  # finite, but no sum of it is
    save_model(Path("huge.safetensors"), huge, INFO)
    noise = np.random.default_rng(1).integers(0, 256, (50, 80, 4), dtype=np.uint8)
    Image.fromarray(noise).save("bild ä.png")
    generate_test_file("test.pkl", images[1])
    Path("blocked").write_text("a file", encoding="utf-8")
    return folder


@pytest.fixture
def interruptible():
    """SIGINT as in the foreground: a shell's background job ignores it, and so do its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def run(*words: str) -> int:
    """The exit code; a word with blanks stands for several, one in quotes for itself."""
    split = [w.strip("'") if w.startswith("'") else w.split(" ") for w in words]
    flat = [part for w in split for part in ([w] if isinstance(w, str) else w)]
    try:
        return cli.main(flat)
    except SystemExit as ended:  # argparse
        return ended.code


def mistake(capsys, *words: str) -> str:
    """The one line on stderr of a command that must end with 2."""
    code = run(*words)
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and err.count("\n") == 1 and "Traceback" not in err, err
    return err


# Answers.


def test_info_gives_the_reports_table_and_learning_rates(capsys):
    assert run("info") == 0
    said = capsys.readouterr().out
    for number in ("4,916,284", "769.05", "14.33", "19.67", "34.01"):
        assert number in said
    rates = said.splitlines()[-1].partition(": ")[2].split(" ")
    assert len(rates) == 60 and rates[:2] == ["0", "0.01"]
    assert run("info --recipe small") == 0 and "rates of small" in capsys.readouterr().out


def test_a_finished_training_is_read_not_trained_again(place, capsys):
    train = f"{TRAIN} --set half_size_epochs=0 --seed 3"
    assert run(train) == 0
    config = json.loads(Path("run/config.json").read_text(encoding="utf-8"))
    assert (config["seed"], config["epochs"], config["train_size"]) == (3, 1, 120)
    assert config["blocks"] == [1, 1] and config["precision"] == "fp32"
    capsys.readouterr()
    assert run(train) == 0
    said = capsys.readouterr().out
    score = json.loads(Path("run/metrics.json").read_text(encoding="utf-8"))["test"]
    assert "epoch" not in said and f"test accuracy {score['accuracy']:.2%} (95% interval" in said
    assert said.endswith("n = 100); weights in " + str(Path("run", "model.safetensors")) + "\n")
    for other in ("[1]", '{"epochs": 3}', '{"test": {"n": 3}}'):
        Path("run/metrics.json").write_text(other, encoding="utf-8")
        assert run(train) == 2
        said = capsys.readouterr().err
        assert re.fullmatch(r"error: run/metrics.json .*: restore.*\n", said)


def test_evaluate_scores_what_the_library_predicts(place, network, images, capsys):
    assert run(f"evaluate {WEIGHTS} --json") == 0
    score = json.loads(capsys.readouterr().out)
    logits = predict(network, images[1].images, INFO.test_normalization)
    wanted = summarize(logits, images[1].labels)
    assert score["confusion_matrix"] == wanted["confusion_matrix"]
    assert score["cross_entropy"] == pytest.approx(wanted["cross_entropy"], rel=1e-4)
    assert np.count_nonzero(np.sum(wanted["confusion_matrix"], axis=0)) > 3
    assert (score["weights"], score["tta"]) == ("tiny.safetensors", "none")
    assert run(f"evaluate {WEIGHTS}") == 0
    accuracy = f"test accuracy {wanted['accuracy']:.2%} (95% interval "
    assert capsys.readouterr().out.startswith(accuracy)


@pytest.mark.parametrize("temperature", [None, 5.0])
def test_predict_prints_calibrated_probabilities_and_draws_where_the_network_looks(
    place, network, images, capsys, temperature
):
    save_model(Path("own"), network, INFO.model_copy(update={"temperature": temperature}))
    names = ["0.png", "1.png", "bild ä.png"]
    for name, image in zip(names[:2], images[1].images, strict=False):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(name)
    before = Path("0.png").read_bytes()
    command = "predict --weights own --device cpu --grad-cam ."
    assert run(command, *(f"'{name}'" for name in names)) == 0
    lines = capsys.readouterr().out.splitlines()
    pictures = torch.stack([read_picture(name) for name in names])
    assert torch.equal(pictures[:2], images[1].images[:2])
    logits = predict(network, pictures, INFO.test_normalization)
    probabilities = (logits / (temperature or 1)).softmax(1)
    for name, line, row in zip(names, lines, probabilities, strict=True):
        found = re.findall(r"(\w+) ([\d.]+)%", line)
        order = row.argsort(descending=True)[:3].tolist()
        assert line.startswith(f"{name}: ") and line.endswith("%" if temperature else "alibrated)")
        assert [guess for guess, _ in found] == [CLASSES[i] for i in order]
        printed = [float(percent) / 100 for _, percent in found]
        assert printed == pytest.approx(row[order].tolist(), abs=6e-4)

    heat = grad_cam(network, pictures, logits.argmax(1), INFO.test_normalization)
    assert heat.flatten(1).std(1).min() > 0.05
    for name, picture, its_heat in zip(names, pictures, heat, strict=True):
        drawn = np.asarray(Image.open(f"{Path(name).stem}.grad-cam.png"))
        difference = drawn.astype(int) - picture_with_heat(picture, its_heat)
        assert drawn.shape == (256, 512, 3) and np.abs(difference).mean() < 0.5
    assert Path("0.png").read_bytes() == before
    assert "two have the same name" in mistake(capsys, f"{command} 0.png 0.png")


def test_own_weights_bring_their_normalisation_and_a_temperature_if_images_were_held_out(
    place, images
):
    # Enough steps that the network tells classes apart, and its temperature is well defined.
    changed = "--set std=0.3,0.3,0.3 --set half_size_epochs=0 --set batch_size=10 --epochs 3"
    assert run(f"{TRAIN} {changed} --set validation_size=40") == 0
    model, info = load_model("run/model.safetensors")
    assert info.training_normalization == Normalization(CIFAR10_MEAN, (0.3, 0.3, 0.3))
    assert info.test_normalization == Normalization(CIFAR10_MEAN, CIFAR10_STD)
    _, held_out = split(images[0], recipe("small", train_size=120, validation_size=40))
    logits = predict(model, held_out.images, info.test_normalization)
    fitted = fit_temperature(logits, held_out.labels)
    assert info.temperature == pytest.approx(fitted, rel=0.02) and not 0.9 < fitted < 1.1
    shutil.rmtree("run")
    assert run(f"{TRAIN} {changed}") == 0
    assert load_model("run/model.safetensors")[1].temperature is None


@pytest.mark.parametrize("adapt", shift.ADAPTATIONS)
def test_submit_writes_the_labels_that_the_library_predicts(place, network, adapt):
    unlabelled = read_test_file("test.pkl").images
    model, normalization = shift.adapt(adapt, network, unlabelled, INFO.test_normalization)

    def labels(model: ResNet, normalization: Normalization, tta: str = "flip") -> list[int]:
        return predict(model, unlabelled, normalization, tta=tta).argmax(1).tolist()

    wanted = labels(model, normalization)
    options = f"--adapt {adapt} --tta flip --label-column Category --out"
    assert run(f"{SUBMIT} {options}", "'neuer Ordner/ü.csv'") == 0
    header, *rows = Path("neuer Ordner/ü.csv").read_text(encoding="utf-8").splitlines()
    assert header == "ID,Category"
    assert rows == [f"{i},{label}" for i, label in enumerate(wanted)]
    # Without the views, the own statistics or the adapted network it would answer otherwise.
    assert adapt != "none" or labels(model, normalization, "none") != wanted
    assert (
        normalization == INFO.test_normalization or labels(model, INFO.test_normalization) != wanted
    )
    assert model is network or labels(network, normalization) != wanted


def test_submit_says_by_what_it_adapts_and_where_the_labels_are(place, capsys, monkeypatch):
    """On a file whose classes are balanced, and on one whose aren't; this network's are never."""
    chosen = json.loads((SHIFT / "verdict.json").read_text(encoding="utf-8"))["default"]
    adapt, tta = chosen["adapt"], chosen["tta"]
    monkeypatch.setattr(shift, "SHIFT_MARGIN", 1)
    assert run(f"{SUBMIT} --out s.csv") == 0
    assert capsys.readouterr().out.splitlines() == [
        "images read from test.pkl, pixel after pixel",
        f"adaptation chosen: {adapt} (the predicted classes are balanced)",
        f"100 labels written to s.csv (adaptation: {adapt}, test-time augmentation: {tta})",
    ]
    # What is said stays out of the submission where both would go to standard output.
    for limit in ("SHIFT_MARGIN", "MAX_CONFIDENCE_LOSS", "MIN_AGREEMENT"):
        monkeypatch.setattr(shift, limit, -1)
    assert run(f"{SUBMIT} --tta none --out -") == 0
    out, err = capsys.readouterr()
    _, why, settings = err.splitlines()
    assert why.startswith("adaptation chosen: none (the predicted classes are unbalanced")
    assert (
        settings
        == "100 labels written to standard output (adaptation: none, test-time augmentation: none)"
    )
    assert run(f"{SUBMIT} --tta none --adapt none --out none.csv") == 0
    assert out == Path("none.csv").read_text(encoding="utf-8")


# Mistakes.


WRONG = [
    ("tune", "invalid choice: 'tune'"),
    ("evaluate a\nb", "unrecognized arguments: a\\nb"),
    ("evaluate --weights a\nb\u2028c", "weights: can't load a\\nb\\u2028c"),
    ("info --recipe nope", "recipe: expected one of report, best, short, small; got 'nope'"),
    (f"{TRAIN} --set nope=1", "nope: no such setting"),
    (f"{TRAIN} --set epochs", "set: expected FIELD=VALUE, got 'epochs'"),
    (f"{TRAIN} --epochs many", "epochs: expected a valid integer"),
    (f"{TRAIN} --set blocks=1,1,1", "blocks and channels: expected a whole number of each"),
    (f"{TRAIN} --train-size 300", "train_size: expected at most 200 images, got 300"),
    *((f"{TRAIN} --device {name}", "device: expected auto, or") for name in ("toaster", "meta")),
    (f"{TRAIN} --device cuda:99", "device: expected auto, or a device that works"),
    (f"{TRAIN} --run blocked/run", "run directory: blocked/run can't be written"),
    ("evaluate --weights blocked", "weights: can't load blocked"),
    (f"evaluate {WEIGHTS} --precision fp8", "fp8"),
    (f"predict {WEIGHTS} blocked", "picture: blocked can't be read"),
    (f"{SUBMIT} --test blocked --out o", "test file: blocked can't be read ("),
    (f"{SUBMIT} --weights huge.safetensors --out o", "not finite"),
    (f"{SUBMIT} --out blocked/o", "can't write blocked/o"),
    (f"{SUBMIT} --out results/", "can't write results/: it names a folder: name a file in it"),
    (f"{SUBMIT} --out {300 * 'x'}", "(File name too long)"),
    (f"{SUBMIT} --out test.pkl", "it is an input of this command"),
    (f"{SUBMIT} --out tiny.safetensors", "it is an input of this command"),
]


@pytest.mark.parametrize(("words", "message"), WRONG)
def test_a_mistake_is_one_line_and_changes_nothing(place, capsys, words, message):
    before = contents(place)
    assert message in mistake(capsys, words)
    assert contents(place) == before


@pytest.mark.parametrize("words", ["evaluate", "predict", "submit --test test.pkl --adapt none"])
def test_outputs_that_are_not_finite_are_refused(place, capsys, monkeypatch, words):
    """Half precision can overflow, and `argmax` calls NaN an airplane."""
    monkeypatch.setattr(cli.evaluate, "predict", lambda *_: torch.full((100, 10), math.nan))
    last = {"evaluate": "--json", "predict": "'bild ä.png'"}.get(words, "--out=o")
    before = contents(place)
    assert "weights: their outputs are not finite" in mistake(capsys, f"{words} {WEIGHTS}", last)
    assert contents(place) == before


def test_a_missing_word_and_missing_data_are_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CIFAR10_ROOT", str(tmp_path))
    assert "device: expected" in mistake(capsys, "train --recipe small --run r --device toaster")
    assert "CIFAR10_ROOT" in mistake(capsys, "evaluate")
    assert "the following arguments are required: COMMAND" in mistake(capsys)
    assert "the given path: expected" in mistake(capsys, f"evaluate --data {300 * 'x'}")


# What ends a process from outside.


def test_errors_of_the_machine_are_one_line_and_those_of_the_program_are_not(
    place, capsys, monkeypatch
):
    def ended_by(error: BaseException) -> tuple[int, str]:
        monkeypatch.setattr(cli, "fit", Mock(side_effect=error))
        return run(TRAIN), capsys.readouterr().err

    # `head` had enough.
    assert ended_by(BrokenPipeError()) == (141 if os.name == "posix" else 1, "")
    code, said = ended_by(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."))
    assert code == 2 and said.startswith("error: CUDA out of memory: use --device cpu, or")
    with pytest.raises(SystemError):
        ended_by(SystemError("another one"))
    inside_c = SystemError("a function returned a result with an exception set")
    inside_c.__cause__ = KeyboardInterrupt()
    said = "\ninterrupted: the same command resumes after the last finished epoch\n"
    assert ended_by(inside_c) == (130, said)


def test_on_windows_a_closed_pipe_is_an_invalid_argument_without_a_file(monkeypatch):
    invalid, full = OSError(errno.EINVAL, "wrong"), OSError(errno.ENOSPC, "full")
    misnamed = OSError(errno.EINVAL, "wrong", "a file")
    found = {}
    for system in ("nt", "posix"):
        with monkeypatch.context() as patched:  # no longer than that: paths ask for it, too
            patched.setattr(cli.os, "name", system)
            found[system] = [cli._is_closed_pipe(error) for error in (invalid, misnamed, full)]
    assert found == {"nt": [True, False, False], "posix": [False, False, False]}


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_training_keeps_its_epochs(place, monkeypatch, interruptible, sent):
    def interrupted(*arguments, **options):
        return fit(*arguments, **options, log=lambda line: signal.raise_signal(sent))

    monkeypatch.setattr(cli, "fit", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert run(TRAIN.replace("--epochs 1", "--epochs 3")) == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(json.loads(RunDirectory("run").load()["history"])) == 1
    assert not list(Path("run").glob(".*.tmp"))


def whole_process(monkeypatch, *words: str) -> int:
    """The exit code of `python -m cifar_lib`, run in this process."""
    monkeypatch.setattr(sys, "argv", ["cifar_lib", *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("cifar_lib", run_name="__main__")
    return ended.value.code


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_standard_output_on_a_full_disk_is_one_line(monkeypatch, capsys):
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert whole_process(monkeypatch, "info") == 2
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device\n"


def test_a_name_that_is_not_utf_8_can_be_printed(monkeypatch, capsys):
    monkeypatch.setattr(cli, "main", lambda: print("\udcff.png"))
    whole_process(monkeypatch)
    assert capsys.readouterr().out == "\\udcff.png\n"


def test_an_interrupt_during_the_import_is_one_line(tmp_path, interruptible):
    interrupts = "import signal\nsignal.raise_signal(signal.SIGINT)\n"
    (tmp_path / "torch.py").write_text(interrupts, encoding="utf-8")
    ended = subprocess.run(
        [sys.executable, "-m", "cifar_lib", "info"],
        capture_output=True,
        encoding="utf-8",
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    said = "\ninterrupted before anything was done: run the command again\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", said)
