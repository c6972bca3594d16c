"""The command line: what it prints, and one line and exit code 2 for a user's mistake."""

import importlib
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import cifar_search
import numpy as np
import pytest
import torch
from PIL import Image

import cifar_lib
from cifar_lib import cli, shift
from cifar_lib.checkpoint import RunDirectory
from cifar_lib.data import CIFAR10_MEAN, CIFAR10_STD
from cifar_lib.evaluate import fit_temperature, predict
from cifar_lib.fit import fit, split
from cifar_lib.model import ResNet, load_model, save_model
from cifar_lib.recipes import recipe
from cifar_lib.shift import ADAPTATIONS
from notebooks.course.corruptions import generate_test_file
from notebooks.course.reference import SHIFT, trials_table
from notebooks.course.stand_in import generate_stand_in

TINY = "--set blocks=1,1 --set channels=16,32 --set validation_size=0 --set precision=fp32"
TRAIN = f"train --recipe quick --run run --epochs 1 --train-size 120 {TINY} --device cpu"
SPLIT = {"train_size": 120, "validation_size": 40}
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working directory whose name is no plain one, with tiny weights, a picture, a test file."""
    folder = tmp_path / "ein Ordner für Übungen 演習"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(cli, "load_cifar10", lambda root: generate_stand_in(200, 100))
    torch.manual_seed(0)
    info = {"recipe": "quick", "mean": CIFAR10_MEAN, "std": CIFAR10_STD}
    save_model(Path("tiny.safetensors"), ResNet((1, 1), (8, 16)), info)
    noise = np.random.default_rng(1).integers(0, 256, (50, 80, 4), dtype=np.uint8)
    Image.fromarray(noise).save("bild ä.png")
    generate_test_file("test.pkl", generate_stand_in(0, 20)[1])
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


def test_info_gives_the_reports_table_and_learning_rates(capsys):
    assert run("info") == 0
    said = capsys.readouterr().out
    for number in ("4,916,284", "769.05", "14.33", "19.67", "34.01"):
        assert number in said
    rates = said.splitlines()[-1].partition(": ")[2].split(" ")
    assert len(rates) == 60 and rates[:2] == ["0", "0.01"]
    assert run("info --recipe quick") == 0 and "4,916,284" in capsys.readouterr().out


def test_train_then_evaluate_agree(place, capsys):
    train = f"{TRAIN} --set half_size_epochs=0 --seed 3"
    assert run(train) == 0
    config = json.loads(Path("run/config.json").read_text(encoding="utf-8"))
    assert (config["seed"], config["epochs"], config["train_size"]) == (3, 1, 120)
    assert config["blocks"] == [1, 1] and config["precision"] == "fp32"
    capsys.readouterr()
    assert run(train) == 0  # a finished run is read, not trained again
    assert "epoch" not in capsys.readouterr().out
    assert run("evaluate --weights run/model.safetensors --json --precision fp32") == 0
    score = json.loads(capsys.readouterr().out)
    trained = json.loads(Path("run/metrics.json").read_text(encoding="utf-8"))["test"]
    assert score["n"] == 100 and score["confusion_matrix"] == trained["confusion_matrix"]
    assert score["accuracy"] == trained["accuracy"] == np.trace(score["confusion_matrix"]) / 100
    for other in ("{}", "[1]", '{"epochs": 3}', '{"test": 5}', '{"test": {"n": 3}}'):
        Path("run/metrics.json").write_text(other, encoding="utf-8")
        assert run(train) == 2
        assert re.fullmatch(
            r"error: run/metrics.json [^\n]*: restore[^\n]*\n", capsys.readouterr().err
        )


def test_predict_names_three_classes_and_writes_where_the_network_looks(place, capsys):
    Image.open("bild ä.png").convert("RGB").save("cat.jpg")
    before = Path("cat.jpg").read_bytes()
    predict = "predict --weights tiny.safetensors --grad-cam . cat.jpg"
    assert run(predict, "'bild ä.png'") == 0
    assert capsys.readouterr().out.count("%") == 6
    for name in ("cat.grad-cam.png", "bild ä.grad-cam.png"):
        with Image.open(name) as file:
            assert file.size == (512, 256) and np.asarray(file.convert("L")).std() > 10
    assert Path("cat.jpg").read_bytes() == before
    assert "have one name" in mistake(capsys, predict, "cat.jpg")


def test_probabilities_are_calibrated_by_the_temperature_in_the_weights(place, capsys):
    model, info = load_model("tiny.safetensors")
    save_model(Path("warm"), model, info | {"temperature": 20.0})
    assert run("predict --weights warm", "'bild ä.png'") == 0
    assert capsys.readouterr().out.count(" 10.") == 3


def test_own_weights_bring_their_normalisation_and_a_temperature_if_images_were_held_out(
    place, capsys
):
    predict_picture = "predict --weights run/model.safetensors", "'bild ä.png'"
    # Enough steps that the network tells classes apart, and its temperature is well defined.
    changed = "--set std=0.3,0.3,0.3 --set half_size_epochs=0 --set batch_size=10 --epochs 3"
    assert run(f"{TRAIN} {changed} --set validation_size=40") == 0
    model, info = load_model("run/model.safetensors")
    assert info["train_mean"] == list(CIFAR10_MEAN) and info["train_std"] == [0.3] * 3
    assert (info["mean"], info["std"]) == (list(CIFAR10_MEAN), list(CIFAR10_STD))
    _, held_out = split(generate_stand_in(200, 100)[0], recipe("quick", **SPLIT))
    logits = predict(model, held_out.images, info["mean"], info["std"])
    fitted = fit_temperature(logits, held_out.labels)
    assert info["temperature"] == pytest.approx(fitted, rel=0.02) and not 0.9 < fitted < 1.1
    capsys.readouterr()
    assert run(*predict_picture) == 0 and "uncalibrated" not in capsys.readouterr().out

    shutil.rmtree("run")
    assert run(f"{TRAIN} {changed}") == 0
    assert "temperature" not in load_model("run/model.safetensors")[1]
    capsys.readouterr()
    assert run(*predict_picture) == 0 and "% (uncalibrated)\n" in capsys.readouterr().out


@pytest.mark.parametrize("adapt", ADAPTATIONS)
def test_submit_writes_a_row_an_image(place, adapt):
    submit = f"submit --weights tiny.safetensors --test test.pkl --adapt {adapt} --tta"
    assert run(f"{submit} --label-column Category --out", "'neuer Ordner/ü.csv'") == 0
    header, *rows = Path("neuer Ordner/ü.csv").read_text(encoding="utf-8").splitlines()
    assert header == "ID,Category"
    assert [row.split(",")[0] for row in rows] == [str(i) for i in range(20)]


def test_submit_says_in_which_order_it_read_the_values(place, capsys):
    assert run("submit --weights tiny.safetensors --test test.pkl --out s.csv") == 0
    assert "images of test.pkl, pixel after pixel\n" in capsys.readouterr().out


def test_submit_to_standard_output_keeps_its_summary_out_of_it(place, capsys):
    assert run("submit --weights tiny.safetensors --test test.pkl --out -") == 0
    out, err = capsys.readouterr()
    assert "20 labels in -" in err and "labels in" not in out


def test_outputs_that_are_not_finite_make_no_submission(place, capsys):
    model, info = load_model("tiny.safetensors")
    model.linear.weight.data.fill_(3e38)  # finite, but no sum of it is
    save_model(Path("huge.safetensors"), model, info)
    said = mistake(capsys, "submit --weights huge.safetensors --test test.pkl --out s.csv")
    assert "not finite" in said and not Path("s.csv").exists()


def test_submit_adapts_by_what_the_ablation_chose(place, capsys, monkeypatch):
    """On a file whose classes are balanced; the tiny network's answers are not, on any."""
    monkeypatch.setattr(shift, "MARGIN", 1)
    assert run("submit --weights tiny.safetensors --test test.pkl --out s.csv") == 0
    chosen = json.loads((SHIFT / "verdict.json").read_text(encoding="utf-8"))["default"]
    how = f"(adaptation: {chosen['adapt']}, test-time views: {chosen['tta']})"
    said = capsys.readouterr().out
    assert how in said
    assert f"adapted by {chosen['adapt']}: the predicted classes are balanced\n" in said


def test_submit_says_in_one_line_that_it_left_batch_norm_alone(place, capsys, monkeypatch):
    monkeypatch.setattr(shift, "MARGIN", -1)
    monkeypatch.setattr(shift, "DOUBT", -1)
    monkeypatch.setattr(shift, "AGREEMENT", -1)
    assert run("submit --weights tiny.safetensors --test test.pkl --out auto.csv --tta none") == 0
    said = capsys.readouterr().out.splitlines()
    assert sum("classes are unbalanced" in line for line in said) == 1
    assert "(adaptation: none, test-time views: none)" in said[-1]
    unadapted = "submit --weights tiny.safetensors --test test.pkl --tta none --adapt none --out"
    assert run(f"{unadapted} none.csv") == 0
    assert Path("auto.csv").read_bytes() == Path("none.csv").read_bytes()
    assert run("submit --weights tiny.safetensors --test test.pkl --out -") == 0
    out, err = capsys.readouterr()
    assert "classes are unbalanced" in err and "unbalanced" not in out.partition("ID,")[2]


def test_a_search_prints_its_best_and_begins_with_the_recipe_itself(place, capsys, monkeypatch):
    monkeypatch.setattr(cifar_search, "SHAPES", ("1 of 16",))
    sizes = "--set train_size=200 --set validation_size=50 --set epochs=1"
    network = "--set blocks=1 --set channels=16"
    assert run(f"tune --study s.db --trials 2 {sizes} {network}") == 0
    assert "best on the validation split: " in capsys.readouterr().out
    trials, _ = trials_table("s.db")
    own = trials.loc[0, ["learning_rate", "momentum", "weight_decay", "batch_size"]]
    assert own.tolist() == [0.1, 0.9, 2e-4, 128]


SUBMIT = "submit --weights tiny.safetensors"
WRONG = [
    ("info --recipe nope", "recipe: expected one of report, best, quick; got 'nope'"),
    ("train --recipe quick", "the following arguments are required: --run"),
    (f"{TRAIN} --set nope=1", "nope: no such setting"),
    (f"{TRAIN} --set epochs", "epochs: expected a valid integer"),
    (f"{TRAIN} --set name=x", "name: no such setting"),
    (f"{TRAIN} --set policy.magnitude=99", "policy.magnitude: expected less than"),
    (f"{TRAIN} --epochs many", "epochs: expected a valid integer"),
    (f"{TRAIN} --set momentum=0", "the optimizer's settings (Nesterov momentum requires"),
    (f"{TRAIN} --train-size 300", "train_size: expected at most 200 images, got 300"),
    (f"{TRAIN} --precision fp8", "precision: expected 'auto', 'fp32', 'bf16' or 'fp16'"),
    (f"{TRAIN} --set ranks=2", "ranks: set by torchrun (1), got 2"),
    ("tune --study s.db --trials 1 --set ranks=2", "ranks: set by torchrun (1), got 2"),
    (f"{TRAIN} --device toaster", "device: expected auto, cpu, cuda, cuda:N or mps"),
    (f"{TRAIN} --run blocked/run", "run directory: blocked/run can't be written"),
    ("evaluate --weights a\nb\u2028c", "weights: a\\nb\\u2028c"),
    ("evaluate a\nb", "unrecognized arguments: a\\nb"),
    ("evaluate --weights blocked", "weights: blocked is no file of this package's weights"),
    ("evaluate --tta twice", "argument --tta: invalid choice: 'twice'"),
    ("predict --weights tiny.safetensors blocked", "picture: blocked can't be read"),
    (f"{SUBMIT} --test blocked --out o", "test file: blocked can't be read (no pickle of arrays"),
    (f"{SUBMIT} --test test.pkl --out blocked/o", "can't write blocked/o"),
    (f"{SUBMIT} --test test.pkl --out results/", "can't write results/: it is a folder: name a"),
    (f"{SUBMIT} --test test.pkl --out .", "can't write .: it is a folder: name a file in it"),
    ("tune --trials 1 --study studies/", "can't write studies/: it is a folder: name a file in it"),
    (f"{SUBMIT} --test test.pkl --out {300 * 'x'}", "(File name too long)"),
    (f"{SUBMIT} --test test.pkl --out test.pkl", "it is an input of this command"),
    (f"{SUBMIT} --test test.pkl --out tiny.safetensors", "it is an input of this command"),
    ("tune --study blocked --trials 1", "got blocked (file is not a database)"),
]


@pytest.mark.parametrize(("words", "message"), WRONG)
def test_a_mistake_is_one_line_and_changes_nothing(place, monkeypatch, capsys, words, message):
    short = {"train_size": 100, "validation_size": 20}
    monkeypatch.setattr(cifar_search, "SHORT", cifar_search.SHORT | short)
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    assert message in mistake(capsys, words)
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA GPU is here")
def test_cuda_asked_for_and_absent(place, capsys):
    assert "device: expected auto, cpu" in mistake(capsys, TRAIN, "--device cuda")


def test_missing_data_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CIFAR10_ROOT", str(tmp_path))
    assert "CIFAR10_ROOT" in mistake(capsys, "evaluate")
    assert "the given path: expected" in mistake(capsys, f"evaluate --data {300 * 'x'}")


@pytest.fixture
def failing(place, monkeypatch):
    """`failing(error)` ends a training with it; returns the exit code."""

    def end_with(error: BaseException) -> int:
        monkeypatch.setattr(cli, "fit", Mock(side_effect=error))
        return run(TRAIN)

    return end_with


def test_errors_of_the_machine_are_one_line_and_those_of_the_program_are_not(capsys, failing):
    assert failing(BrokenPipeError()) == cli.CLOSED_PIPE
    assert capsys.readouterr().err == ""  # `head` had enough
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has")
    assert failing(full) == 2
    assert "error: CUDA out of memory: use --device cpu, or" in capsys.readouterr().err
    with pytest.raises(SystemError):
        failing(SystemError("another one"))


def test_an_interrupt_inside_c_code_is_one_too(capsys, failing):
    error = SystemError("a function returned a result with an exception set")
    error.__cause__ = KeyboardInterrupt()
    assert failing(error) == 130
    said = "\ninterrupted: the same command goes on from the last finished epoch\n"
    assert capsys.readouterr().err == said


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
    assert RunDirectory("run").load()["epoch"] == 1
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
    (tmp_path / "torch.py").write_text(
        "import signal\nsignal.raise_signal(signal.SIGINT)\n", encoding="utf-8"
    )
    ended = subprocess.run(
        [sys.executable, "-m", "cifar_lib", "info"],
        capture_output=True,
        encoding="utf-8",
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    said = "\ninterrupted: the same command starts again\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", said)


def test_a_user_without_a_name_gets_one(monkeypatch):
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    unknown = [KeyError("no such uid")]
    unknown.append(ModuleNotFoundError("No module named 'pwd'"))  # what Windows says
    for error in unknown:
        monkeypatch.setattr("getpass.getuser", Mock(side_effect=error))
        importlib.reload(cifar_lib)
        assert os.environ.pop("USER") == (str(os.getuid()) if hasattr(os, "getuid") else "user")
