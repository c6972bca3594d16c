"""The command line: what it prints, and one line and exit code 2 for a user's mistake."""

import io
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from session import SHIFT

from cifar_lib import cli
from cifar_lib.checkpoint import RunDirectory
from cifar_lib.data import CIFAR10_MEAN, CIFAR10_STD
from cifar_lib.kaggle import generate_test_file
from cifar_lib.model import ResNet, load_model, save_model
from cifar_lib.shift import ADAPTATIONS
from cifar_lib.stand_in import generate_stand_in

TINY = [
    "--set",
    "blocks=1,1",
    "--set",
    "channels=16,32",
    "--set",
    "validation_size=0",
    "--precision",
    "fp32",
]


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "tiny.safetensors"
    save_model(
        path, ResNet((1, 1), (8, 16)), {"recipe": "quick", "mean": CIFAR10_MEAN, "std": CIFAR10_STD}
    )
    return path


@pytest.fixture
def data(monkeypatch):
    """The stand-in where a command reads CIFAR-10, small."""
    sets = generate_stand_in(200, 100)
    monkeypatch.setattr(cli, "load_cifar10", lambda root: sets)
    return sets


def mistake(capsys, *arguments):
    """The one line on stderr of a command that must end with 2."""
    try:
        code = cli.main([str(a) for a in arguments])
    except SystemExit as ended:  # argparse
        code = ended.code
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and err.count("\n") == 1 and "Traceback" not in err, err
    return err


def test_info_json(capsys):
    assert cli.main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["parameters"] == 4_916_284 and info["mult_adds_m"] == 769.05
    assert (info["forward_backward_mb"], info["params_mb"], info["total_mb"]) == (
        14.33,
        19.67,
        34.01,
    )
    assert len(info["learning_rates"]) == 60 and info["learning_rates"][:2] == [0, 0.01]


def test_info_of_another_recipe(capsys):
    assert cli.main(["info", "--recipe", "quick"]) == 0
    assert "4,916,284" in capsys.readouterr().out


def test_train_then_evaluate_agree(tmp_path, capsys, data):
    run = tmp_path / "a run with spaces, ü"
    train = [
        "train",
        "--recipe",
        "quick",
        "--run",
        str(run),
        "--epochs",
        "1",
        "--train-size",
        "120",
        *TINY,
    ]
    train += ["--set", "half_size_epochs=0", "--seed", "3", "--device", "cpu"]
    assert cli.main(train) == 0
    config = json.loads((run / "config.json").read_text())
    assert (config["seed"], config["epochs"], config["train_size"], config["blocks"]) == (
        3,
        1,
        120,
        [1, 1],
    )
    capsys.readouterr()
    assert cli.main(train) == 0  # a finished run is read, not trained again
    assert "epoch" not in capsys.readouterr().out
    assert (
        cli.main(
            [
                "evaluate",
                "--weights",
                str(run / "model.safetensors"),
                "--json",
                "--precision",
                "fp32",
            ]
        )
        == 0
    )
    score = json.loads(capsys.readouterr().out)
    trained = json.loads((run / "metrics.json").read_text())["test"]
    assert score["n"] == 100 and score["confusion_matrix"] == trained["confusion_matrix"]
    assert score["accuracy"] == trained["accuracy"] == np.trace(score["confusion_matrix"]) / 100


def test_predict_names_three_classes(tmp_path, capsys, weights):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 80, 4), dtype=np.uint8)).save(
        tmp_path / "ä b.png"
    )
    assert cli.main(["predict", "--weights", str(weights), str(tmp_path / "ä b.png")]) == 0
    assert capsys.readouterr().out.count("%") == 3


def test_predict_writes_where_the_network_looks(tmp_path, capsys, weights):
    for name in ("one", "two"):
        Image.fromarray(
            np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        ).save(tmp_path / f"{name}.jpg")
    pictures = [str(tmp_path / "one.jpg"), str(tmp_path / "two.jpg")]
    folder = tmp_path / "grad cam"
    assert (
        cli.main(["predict", "--weights", str(weights), "--grad-cam", str(folder), *pictures]) == 0
    )
    assert sorted(path.name for path in folder.iterdir()) == ["one.png", "two.png"]
    with Image.open(folder / "one.png") as file:
        assert np.asarray(file.convert("L")).std() > 10
    capsys.readouterr()
    assert "same name" in mistake(
        capsys, "predict", "--weights", weights, "--grad-cam", folder, *pictures[:1] * 2
    )


def test_probabilities_are_calibrated_by_the_temperature_in_the_weights(tmp_path, capsys, weights):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    model, info = load_model(weights)
    save_model(tmp_path / "warm", model, info | {"temperature": 20.0})
    assert (
        cli.main(["predict", "--weights", str(tmp_path / "warm"), str(tmp_path / "red.png")]) == 0
    )
    assert capsys.readouterr().out.count(" 10.") == 3


@pytest.mark.parametrize("adapt", ADAPTATIONS)
def test_submit_writes_a_row_an_image(tmp_path, weights, data, adapt):
    images = data[1].images[:20].permute(0, 2, 3, 1).numpy()
    (tmp_path / "t.pkl").write_bytes(pickle.dumps({"data": images, "ids": list(range(100, 120))}))
    out = tmp_path / "new folder" / "s.csv"
    command = [
        "submit",
        "--weights",
        weights,
        "--test",
        tmp_path / "t.pkl",
        "--out",
        out,
        "--adapt",
        adapt,
        "--tta",
    ]
    assert cli.main([str(c) for c in command] + ["--label-column", "Category"]) == 0
    header, *rows = out.read_text().splitlines()
    assert header == "ID,Category" and [row.split(",")[0] for row in rows] == [
        str(i) for i in range(100, 120)
    ]


def test_submit_adapts_by_what_the_ablation_chose(tmp_path, capsys, weights):
    generate_test_file(tmp_path / "t.pkl", generate_stand_in(0, 20)[1])
    command = [
        "submit",
        "--weights",
        weights,
        "--test",
        tmp_path / "t.pkl",
        "--out",
        tmp_path / "s.csv",
    ]
    assert cli.main([str(c) for c in command]) == 0
    chosen = json.loads((SHIFT / "verdict.json").read_text())["default"]
    assert (
        f"(adaptation: {chosen['adapt']}, test-time views: {chosen['tta']})"
        in capsys.readouterr().out
    )


def test_batchnorm_on_a_single_image_says_why_it_cant(tmp_path, capsys, weights):
    generate_test_file(tmp_path / "one.pkl", generate_stand_in(0, 20)[1][:1])
    submit = [
        "submit",
        "--weights",
        weights,
        "--test",
        tmp_path / "one.pkl",
        "--out",
        tmp_path / "s.csv",
    ]
    found = mistake(capsys, *submit, "--adapt", "normalize+batchnorm")
    assert (
        "batchnorm takes its statistics from the images themselves" in found
        and "--adapt none" in found
    )
    assert not (tmp_path / "s.csv").exists()


def test_the_first_trial_of_a_search_is_the_recipe_itself(tmp_path, capsys, data, monkeypatch):
    from cifar_lib import tune

    monkeypatch.setitem(tune.SHAPES, "3,4,3 of 66,132,264", ((1,), (16,)))
    sizes = ["--set", "train_size=200", "--set", "validation_size=50", "--set", "epochs=2"]
    sizes += ["--set", "blocks=1", "--set", "channels=16"]
    assert cli.main(["tune", "--study", str(tmp_path / "s.log"), "--trials", "2", *sizes]) == 0
    assert "best on the validation split, of 2 trials" in capsys.readouterr().out
    trials, _ = tune.trials_table(tmp_path / "s.log")
    assert trials.loc[0, ["learning_rate", "momentum", "weight_decay", "batch_size"]].tolist() == [
        0.1,
        0.9,
        2e-4,
        128,
    ]


def test_mistakes_are_one_line(tmp_path, capsys, weights, data):
    train = ["train", "--recipe", "quick", "--run", tmp_path / "run"]
    assert "report, best, quick" in mistake(capsys, "info", "--recipe", "nope")
    assert "--run" in mistake(capsys, "train", "--recipe", "quick")
    assert "expected one of recipe" in mistake(capsys, *train, "--set", "nope=1")
    assert "FIELD=VALUE" in mistake(capsys, *train, "--set", "epochs")
    assert "policy.magnitude" in mistake(capsys, *train, "--set", "policy.magnitude=99")
    assert "epochs" in mistake(capsys, *train, "--epochs", "many")
    assert "epochs" in mistake(capsys, *train, "--epochs", "0")
    assert "seed" in mistake(capsys, *train, "--seed", "-1")
    assert "at most 200" in mistake(capsys, *train, "--train-size", "300")
    assert "precision" in mistake(capsys, *train, "--precision", "fp8")
    assert "device" in mistake(capsys, *train, "--device", "toaster")
    assert "5,000,000" in mistake(
        capsys,
        *train,
        "--set",
        "channels=66,132,512",
        "--set",
        "validation_size=0",
        "--set",
        "train_size=none",
    )
    assert "invalid choice" in mistake(
        capsys, "submit", "--weights", weights, "--test", "t", "--out", "o", "--adapt", "x"
    )
    assert "found none" in mistake(capsys, "evaluate", "--weights", tmp_path / "none", "--json")
    assert "found none" in mistake(
        capsys, "submit", "--weights", weights, "--test", tmp_path / "none", "--out", "o"
    )
    assert "no file" in mistake(capsys, "predict", "--weights", weights, tmp_path / "none.png")
    (tmp_path / "not.png").write_text("no picture")
    assert "picture" in mistake(capsys, "predict", "--weights", weights, tmp_path / "not.png")
    (tmp_path / "file").write_text("")
    blocked = [
        "train",
        "--recipe",
        "quick",
        "--run",
        tmp_path / "file" / "run",
        "--train-size",
        "100",
    ]
    assert "can't write" in mistake(capsys, *blocked, "--set", "validation_size=0")
    assert not (tmp_path / "o").exists()


LONG = 300 * "x"  # no file system takes such a name
WRONG = [
    ("evaluate", "--weights", LONG, "weights: expected a file, found none at"),
    ("submit", "--test", LONG, "test file: expected a file, found none at"),
    ("submit", "--out", LONG, "(File name too long)"),
    ("train", "--start", "nowhere", "weights: expected a file, found none at nowhere"),
    (
        "tune",
        "--set",
        "batch_size=32",
        "tune: the recipe itself, the first trial, is outside the search space",
    ),
    ("info", "--recipe", "", "recipe: expected one of report, best, quick; got ''"),
    ("train", "--recipe", "Report", "recipe: expected one of report, best, quick; got 'Report'"),
    ("train", "--run", "blocked/run", "run directory: can't write into"),
    ("train", "--seed", "1.5", "seed: expected a value of type int; got '1.5'"),
    ("train", "--epochs", "-3", "epochs: -3 is out of range"),
    ("train", "--train-size", "all", "train_size: expected a value of type int"),
    ("train", "--set", "policy=strong", "policy: expected a value of type Policy; got 'strong'"),
    ("train", "--set", "step=graph", "step: a CUDA graph needs a CUDA device"),
    ("train", "--set", "=", "unknown field"),
    ("train", "--device", "cuda:x", "device: expected auto, cpu, cuda, cuda:N or mps"),
    ("train", "--precision", "", "precision: expected one of auto, fp32, bf16, fp16; got ''"),
    ("evaluate", "--weights", "blocked", "weights: blocked is no file of this package's weights"),
    ("evaluate", "--tta", "twice", "argument --tta: invalid choice: 'twice'"),
    ("evaluate", "--device", "gpu", "device: expected auto, cpu, cuda, cuda:N or mps"),
    (
        "evaluate",
        "--precision",
        "half",
        "precision: expected one of auto, fp32, bf16, fp16; got 'half'",
    ),
    ("predict", "--weights", "nowhere", "weights: expected a file, found none at nowhere"),
    ("submit", "--test", "blocked", "test file: blocked: it can't be read as a pickle"),
    ("submit", "--out", "blocked/out.csv", "can't write blocked/out.csv"),
    ("submit", "--out", ".", "can't write"),
    ("submit", "--adapt", "all", "argument --adapt: invalid choice: 'all'"),
    ("submit", "--label-column", "", "submission: expected a column's name, got ''"),
    ("submit", "--label-column", "a\nb", "submission: expected a column's name"),
    ("submit", "--tta", "no", "argument --tta: invalid choice: 'no'"),
    ("tune", "--study", "blocked", "got blocked (it is no journal)"),
    ("tune", "--study", "blocked/study.log", "got blocked/study.log (["),
    (
        "tune",
        "--study",
        "postgresql+psycopg://me:secret@127.0.0.1:1/x",
        "got postgresql+psycopg://me:***@127.0.0.1:1/x (",
    ),
    ("tune", "--trials", "0", "argument --trials: expected a whole number of at least 1, got '0'"),
    ("tune", "--recipe", "Table 1", "recipe: expected one of report, best, quick; got 'Table 1'"),
    (
        "tune",
        "--set",
        "validation_size=0",
        "tune: expected a validation split to choose by, got none",
    ),
    ("tune", "--set", "train_size=201", "train_size: expected at most 200 images, got 201"),
]


@pytest.mark.parametrize(("command", "flag", "value", "message"), WRONG)
def test_every_flag_with_a_wrong_value_is_a_mistake_of_one_line(
    tmp_path, monkeypatch, capsys, weights, data, command, flag, value, message
):
    monkeypatch.chdir(tmp_path)
    Path("blocked").write_text("a file")
    Image.new("RGB", (40, 30)).save("picture.png")
    generate_test_file("test.pkl", generate_stand_in(0, 20)[1])
    monkeypatch.setattr(cli, "TUNING", cli.TUNING | {"train_size": 100, "validation_size": 20})
    right = {
        "info": {},
        "train": {
            "--recipe": "quick",
            "--run": "run",
            "--train-size": "100",
            "--set": "validation_size=0",
        },
        "evaluate": {"--weights": weights},
        "predict": {"--weights": weights},
        "submit": {"--weights": weights, "--test": "test.pkl", "--out": "out.csv"},
        "tune": {"--study": "study.log", "--trials": "1"},
    }[command]
    before = sorted(tmp_path.rglob("*"))
    words = [word for pair in right.items() for word in pair]
    found = mistake(
        capsys, command, *(["picture.png"] if command == "predict" else []), *words, flag, value
    )
    assert message in found
    assert sorted(tmp_path.rglob("*")) == before and Path("blocked").read_text() == "a file"


def test_paths_with_spaces_and_letters_that_are_no_ascii(tmp_path, monkeypatch, capsys, data):
    folder = tmp_path / "ein Ordner für Übungen 演習"
    folder.mkdir()
    monkeypatch.chdir(folder)
    generate_test_file("täst file.pkl", generate_stand_in(0, 20)[1])
    short = ["--epochs", "1", "--train-size", "100", *TINY]
    assert cli.main(["train", "--recipe", "quick", "--run", "Läufe/erster lauf", *short]) == 0
    weights = "Läufe/erster lauf/model.safetensors"
    assert cli.main(["evaluate", "--weights", weights, "--json"]) == 0
    assert (
        cli.main(
            ["submit", "--weights", weights, "--test", "täst file.pkl", "--out", "abgabe ü.csv"]
        )
        == 0
    )
    assert len(Path("abgabe ü.csv").read_text().splitlines()) == 21


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA GPU is here")
def test_cuda_asked_for_and_absent(tmp_path, capsys, data):
    assert "cuda" in mistake(
        capsys, "train", "--recipe", "quick", "--run", tmp_path / "r", "--device", "cuda"
    )


def test_missing_data_is_one_line(tmp_path, capsys, monkeypatch, weights):
    monkeypatch.setenv("CIFAR10_ROOT", str(tmp_path))
    assert "CIFAR10_ROOT" in mistake(capsys, "evaluate", "--weights", weights)
    assert str(tmp_path / "x") in mistake(
        capsys, "evaluate", "--weights", weights, "--data", tmp_path / "x"
    )


def test_a_name_that_is_too_long_holds_no_data(capsys, monkeypatch, weights):
    monkeypatch.delenv("CIFAR10_ROOT", raising=False)
    assert "expected cifar-10-batches-py/" in mistake(
        capsys, "evaluate", "--weights", weights, "--data", LONG
    )


@pytest.fixture
def failing(tmp_path, monkeypatch, data):
    """`failing(error)`: the words of a training that ends with it."""

    def words(error: Exception) -> list[str]:
        monkeypatch.setattr(cli, "fit", Mock(side_effect=error))
        return ["train", "--recipe", "quick", "--run", str(tmp_path), "--device", "cpu"]

    return words


def test_a_training_whose_reader_goes_away_is_no_success(monkeypatch, failing):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert cli.main(failing(BrokenPipeError())) == 128 + signal.SIGPIPE


def test_an_interrupt_inside_c_code_is_one_too(capsys, failing):
    error = SystemError("a function returned a result with an exception set")
    error.__cause__ = KeyboardInterrupt()
    assert cli.main(failing(error)) == 130
    assert (
        capsys.readouterr().err
        == "\ninterrupted: the same command goes on from the last finished epoch\n"
    )
    with pytest.raises(SystemError):
        cli.main(failing(SystemError("another one")))


def test_a_full_gpu_is_one_line(capsys, failing):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has")
    assert "error: CUDA out of memory: use --device cpu, or" in mistake(capsys, *failing(error))


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_training_says_how_to_go_on_and_keeps_its_epochs(tmp_path, sent, code):
    script = (
        "import sys; from cifar_lib import cli; from cifar_lib.stand_in import generate_stand_in; "
        "cli.load_cifar10 = lambda root: generate_stand_in(200, 100); sys.exit(cli.main(sys.argv[1:]))"
    )
    command = [
        sys.executable,
        "-c",
        script,
        "train",
        "--recipe",
        "quick",
        "--run",
        str(tmp_path / "run"),
        *TINY,
    ]
    command += ["--epochs", "10000", "--train-size", "100", "--set", "compile=false"]
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=tmp_path,
        # what a background job of a shell starts would ignore SIGINT
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout.readline().startswith("epoch 1/")
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and "goes on" in err and "Traceback" not in err, err
    assert RunDirectory(tmp_path / "run").load()["epoch"] >= 1
    assert not list((tmp_path / "run").glob(".*.tmp"))
