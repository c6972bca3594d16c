"""python -m cifar_lib: info, train, tune, evaluate, predict, submit."""

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
import torchinfo

from cifar_lib import __version__, ranks
from cifar_lib.data import CLASSES, load_cifar10, read_picture
from cifar_lib.errors import InputError
from cifar_lib.evaluate import TTA, predict, summarize
from cifar_lib.hardware import PRECISIONS, choose_device, choose_precision
from cifar_lib.kaggle import read_test_file, write_submission
from cifar_lib.model import PRETRAINED, ResNet, load_model
from cifar_lib.recipes import RECIPES, learning_rates, recipe
from cifar_lib.shift import ADAPTATIONS, adapt
from cifar_lib.train import fit

# A trial of minutes on two cores: what --set changes. Every trial starts from the same validation
# split. Warm-up is a sixth of the epochs, as in the report.
TUNING = {
    **{
        "schedule": "cosine",
        "epochs": 6,
        "half_size_epochs": 5,
        "train_size": 4000,
        "validation_size": 1000,
    },
    **{"watch_test": False, "policy.ops": "none", "policy.erasing": 0.0, "warmup_epochs": 1},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for a mistake in what was given, 130, 141, 143
    when interrupted."""
    options = _parser().parse_args(arguments)
    # As Ctrl-C; but a rank of several may be waiting for the others, where no handler would run:
    # there it just ends.
    if threading.current_thread() is threading.main_thread() and "WORLD_SIZE" not in os.environ:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        options.command(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        print(
            f"error: {reason}: use --device cpu, or train with a smaller --set batch_size",
            file=sys.stderr,
        )
        return 2
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        sys.stderr.close()
        return 128 + signal.SIGPIPE
    except BaseException as error:
        interrupt = _interrupt_behind(error)
        if interrupt is None:
            raise
        print(f"\ninterrupted: {options.go_on}", file=sys.stderr)
        return 143 if isinstance(interrupt, _Terminated) else 130
    return 0


def _interrupt_behind(error: BaseException | None) -> KeyboardInterrupt | None:
    """The interrupt that `error` is or comes from: one that arrives while C code runs can end as a
    SystemError."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error


class _Terminated(KeyboardInterrupt):
    """SIGTERM, as schedulers and containers send it."""


def _terminate(*_: object) -> None:
    raise _Terminated


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """One line and exit code 2, without the usage."""
        self.exit(2, f"error: {message}: see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m cifar_lib", description="Train a small ResNet on CIFAR-10 and use it."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = _command(commands, "info", _info, "the network's size and a recipe's learning rates")
    info.add_argument(
        "--recipe", default="report", metavar="R", help=f"one of {', '.join(RECIPES)}"
    )
    info.add_argument("--json", action="store_true")

    train = _command(
        commands, "train", _train, "train a recipe into a run directory, or go on with it"
    )
    train.set_defaults(go_on="the same command goes on from the last finished epoch")
    train.add_argument("--recipe", required=True, metavar="R", help=f"one of {', '.join(RECIPES)}")
    train.add_argument(
        "--run", required=True, metavar="DIR", help="run directory; a run in it is gone on with"
    )
    train.add_argument("--seed", metavar="N")
    train.add_argument("--epochs", metavar="N")
    train.add_argument("--train-size", metavar="N", help="train on a stratified part of the images")
    train.add_argument(
        "--start",
        metavar="FILE",
        help=f"weights to begin with, or {PRETRAINED}; default: random ones",
    )
    train.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="any field of TrainConfig"
    )
    _device_options(train)
    _data_option(train)

    tune = _command(
        commands,
        "tune",
        _tune,
        "search for Table 1's hyperparameters, with as many workers as you start",
    )
    tune.set_defaults(
        go_on="the trial waits to be run again; the same command goes on with the study"
    )
    tune.add_argument(
        "--study",
        required=True,
        metavar="FILE_OR_URL",
        help="journal file (one host) or database URL",
    )
    tune.add_argument(
        "--trials", required=True, type=_positive, metavar="N", help="of the whole study"
    )
    tune.add_argument(
        "--recipe", default="report", metavar="R", help="what isn't searched comes from this recipe"
    )
    tune.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="any field of TrainConfig"
    )
    tune.add_argument("--seed", type=_positive, default=1, metavar="N", help="of the proposals")
    _device_options(tune)
    _data_option(tune)

    evaluate = _command(commands, "evaluate", _evaluate, "score weights on CIFAR-10's test images")
    _weights_options(evaluate)
    evaluate.add_argument("--json", action="store_true")
    _data_option(evaluate)

    classify = _command(
        commands, "predict", _predict, "the three likeliest classes of pictures of your own"
    )
    classify.add_argument("images", nargs="+", metavar="IMAGE")
    classify.add_argument(
        "--grad-cam", metavar="FOLDER", help="also write where the network looks, a PNG a picture"
    )
    _weights_options(classify)

    submit = _command(commands, "submit", _submit, "label a competition's .pkl")
    _weights_options(submit, tta="flip")
    submit.add_argument("--test", required=True, metavar="FILE.pkl")
    submit.add_argument("--out", required=True, metavar="FILE.csv")
    submit.add_argument(
        "--adapt",
        choices=ADAPTATIONS,
        default="normalize+batchnorm",  # this and --tta by results/shift/verdict.json
        help="what of the file's own statistics is used; default: %(default)s",
    )
    submit.add_argument("--label-column", default="Labels", help="the report's file has Category")
    return parser


def _command(commands, name: str, function, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(command=function, go_on="the same command starts again")
    return parser


def _device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="auto", metavar="D", help="auto, cpu, cuda, cuda:N or mps"
    )
    parser.add_argument(
        "--precision", default="auto", metavar="P", help=f"one of {', '.join(PRECISIONS)}"
    )


def _weights_options(parser: argparse.ArgumentParser, tta: str = "none") -> None:
    parser.add_argument(
        "--weights",
        default=PRETRAINED,
        metavar="FILE",
        help="a model.safetensors; default: those of the package",
    )
    parser.add_argument(
        "--tta",
        nargs="?",
        const="flip-shift",
        default=tta,
        choices=TTA,
        help="test-time views; default: %(default)s",
    )
    _device_options(parser)


def _data_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="ROOT", help="the folder that holds cifar-10-batches-py")


def _info(options: argparse.Namespace) -> None:
    config = recipe(options.recipe)
    summary = torchinfo.summary(ResNet(config.blocks, config.channels), (1, 3, 32, 32), verbose=0)
    sizes = {
        "parameters": summary.total_params,
        "mult_adds_m": round(summary.total_mult_adds / 1e6, 2),
        "params_mb": round(summary.total_param_bytes / 1e6, 2),
        "forward_backward_mb": round(summary.total_output_bytes / 1e6, 2),
        "total_mb": round(
            (summary.total_input + summary.total_output_bytes + summary.total_param_bytes) / 1e6, 2
        ),
    }
    if options.json:
        print(
            json.dumps(
                {"recipe": options.recipe, **sizes, "learning_rates": learning_rates(config)}
            )
        )
        return
    print(summary)
    rates = " ".join(f"{rate:.4g}" for rate in learning_rates(config))
    print(f"learning rates of {options.recipe}, epoch by epoch: {rates}")


def _positive(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 10**9:
        raise argparse.ArgumentTypeError(
            f"expected a whole number of at least 1, got {text[:20]!r}"
        )
    return int(text)


def _changes(options: argparse.Namespace) -> dict[str, object]:
    """What --set says."""
    changes: dict[str, object] = {}
    for text in options.set:
        field, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--set: expected FIELD=VALUE, got {text!r}")
        changes[field] = value
    return changes


def _tune(options: argparse.Namespace) -> None:
    # Here, as importing Optuna takes a second that the other commands need not wait.
    from cifar_lib.tune import objective, open_study, work

    base = recipe(options.recipe, **{**TUNING, "precision": options.precision, **_changes(options)})
    score = objective(load_cifar10(options.data)[0], base, options.device)
    study = open_study(options.study, base, options.seed)
    work(study, options.study, options.trials, score)
    states = [trial.state.name for trial in study.trials]
    best = "none, as all were pruned"
    if "COMPLETE" in states:
        best = f"{study.best_value:.2%} with {study.best_params}"
    ended = states.count("COMPLETE") + states.count("PRUNED")
    print(f"best on the validation split, of {ended} trials: {best}")


def _train(options: argparse.Namespace) -> None:
    changes = _changes(options)
    flags = ("seed", "epochs", "train_size", "precision")
    changes |= {
        flag: getattr(options, flag) for flag in flags if getattr(options, flag) is not None
    }
    config = recipe(options.recipe, **changes)
    device = ranks.join(options.device)
    choose_device(device)  # before the data are read
    try:
        ranks.from_first(
            lambda: load_cifar10(options.data) and None
        )  # so that one rank downloads, if any must
        metrics = fit(
            config, options.run, *load_cifar10(options.data), device=device, start=options.start
        )
        if ranks.rank() == 0:
            _print_score(metrics["test"], f"weights in {Path(options.run) / 'model.safetensors'}")
    except RuntimeError as error:
        if ranks.count() == 1 or isinstance(error, torch.OutOfMemoryError):
            raise
        reason = str(error).splitlines()[0]
        raise InputError(
            f"ranks: another process went away ({reason}): start the same command again"
        ) from error
    finally:
        ranks.leave()


def _print_score(score: dict, where: str) -> None:
    low, high = score["interval"]
    print(
        f"test accuracy {score['accuracy']:.2%} (95 % interval {low:.2%} to {high:.2%}, n = {score['n']}); {where}"
    )


def _load(options: argparse.Namespace) -> tuple[ResNet, dict, str]:
    """The weights on the device asked for, their `info`, and the precision."""
    device = choose_device(options.device)
    precision = choose_precision(options.precision, device)
    model, info = load_model(options.weights)
    return model.to(device, memory_format=torch.channels_last), info, precision


def _evaluate(options: argparse.Namespace) -> None:
    model, info, precision = _load(options)
    _, test = load_cifar10(options.data)
    logits = predict(model, test.images, info["mean"], info["std"], precision, options.tta)
    score = summarize(logits, test.labels)
    if options.json:
        print(
            json.dumps(
                {
                    "weights": str(options.weights),
                    "tta": options.tta,
                    "precision": precision,
                    **score,
                }
            )
        )
    else:
        _print_score(score, f"test-time views: {options.tta}, precision {precision}")


def _predict(options: argparse.Namespace) -> None:
    paths = [Path(name) for name in options.images]
    images = torch.stack([read_picture(path) for path in paths])
    if options.grad_cam is not None and len({path.stem for path in paths}) < len(paths):
        raise InputError(
            "predict: --grad-cam names its pictures after yours, and two of these have the same name"
        )
    model, info, precision = _load(options)
    logits = predict(model, images, info["mean"], info["std"], precision, options.tta)
    probabilities = (logits / info.get("temperature", 1.0)).softmax(1)
    lines = []
    for row in probabilities:
        best = row.topk(3)
        guesses = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        lines.append(", ".join(f"{CLASSES[i]} {p:.1%}" for p, i in guesses))
    for path, line in zip(options.images, lines, strict=True):
        print(f"{path}: {line}")
    if options.grad_cam is None:
        return
    from cifar_lib.explain import grad_cam  # here, as captum and matplotlib take a second to import
    from cifar_lib.plots import gallery, save_figure

    heat = grad_cam(model, images, logits.argmax(1), info["mean"], info["std"])
    for path, image, line, map_ in zip(paths, images, lines, heat, strict=True):
        twice = image.permute(1, 2, 0).expand(2, -1, -1, -1).numpy()
        overlays = torch.stack(
            [torch.full_like(map_, torch.nan), map_]
        ).numpy()  # nan: no heat over the first
        captions = ("as the network sees it", f"what speaks for {line.split()[0]}")
        figure = gallery(twice, captions, line.replace(", ", "\n"), columns=2, overlays=overlays)
        save_figure(figure, Path(options.grad_cam) / f"{path.stem}.png")


def _submit(options: argparse.Namespace) -> None:
    test = read_test_file(options.test)
    model, info, precision = _load(options)
    model, mean, std = adapt(
        options.adapt, model, test.images, info["mean"], info["std"], precision
    )
    labels = predict(model, test.images, mean, std, precision, options.tta).argmax(1)
    write_submission(options.out, test.ids, labels.tolist(), options.label_column)
    print(
        f"{len(labels)} labels in {options.out} (adaptation: {options.adapt}, test-time views: {options.tta})"
    )
