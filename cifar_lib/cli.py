"""python -m cifar_lib: info, train, tune, evaluate, predict, submit."""

import argparse
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torchinfo
from PIL import Image

from cifar_lib import __version__, ranks
from cifar_lib.data import CLASSES, load_cifar10, read_picture
from cifar_lib.errors import InputError
from cifar_lib.evaluate import TTA, predict, summarize
from cifar_lib.files import write_atomically
from cifar_lib.fit import fit
from cifar_lib.hardware import PRECISIONS, choose_device, choose_precision, prepare
from cifar_lib.kaggle import read_test_file, write_submission
from cifar_lib.model import PRETRAINED, ResNet, load_model
from cifar_lib.recipes import RECIPES, TrainConfig, learning_rates, recipe
from cifar_lib.shift import ADAPTATIONS, adapt


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for a mistake in what was given, 130, 141 or 143
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
        remedy = "use --device cpu, or train with a smaller --set batch_size"
        print(f"error: {reason}: {remedy}", file=sys.stderr)
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
    parser = _Parser("python -m cifar_lib", description="Train a small ResNet on CIFAR-10, use it.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = _command(commands, _info, "the network's size and a recipe's learning rates")
    info.add_argument("--recipe", default="report", metavar="R")
    info.add_argument("--json", action="store_true")

    train = _command(commands, _train, "train a recipe into a run directory, or go on with it")
    train.set_defaults(go_on="the same command goes on from the last finished epoch")
    train.add_argument("--run", required=True, metavar="DIR", help="a new or a begun run's folder")
    train.add_argument("--epochs", metavar="N")
    train.add_argument("--train-size", metavar="N", help="a stratified part of the images")
    train.add_argument("--seed", metavar="N")
    train.add_argument("--start", metavar="FILE", help=f"weights to begin with, or {PRETRAINED}")
    _recipe_options(train, default=None)

    tune = _command(commands, _tune, "search for Table 1's values, by any number of workers")
    tune.set_defaults(go_on="the trial waits to be run again; the same command goes on")
    tune.add_argument("--study", required=True, metavar="FILE_OR_URL", help="journal, or database")
    tune.add_argument("--trials", required=True, type=_positive, metavar="N", help="of the study")
    tune.add_argument("--seed", type=_positive, default=1, metavar="N", help="of the sampler")
    _recipe_options(tune, default="report")

    evaluate = _command(commands, _evaluate, "score weights on CIFAR-10's test images")
    _weights_options(evaluate, tta="none")
    evaluate.add_argument("--json", action="store_true")
    _data_option(evaluate)

    predict = _command(commands, _predict, "the three likeliest classes of pictures of your own")
    predict.add_argument("images", nargs="+", metavar="IMAGE")
    predict.add_argument("--grad-cam", metavar="FOLDER", help="also write where the network looks")
    _weights_options(predict, tta="none")

    submit = _command(commands, _submit, "label a competition's .pkl")
    submit.add_argument("--test", required=True, metavar="FILE.pkl")
    submit.add_argument("--out", required=True, metavar="FILE.csv")
    chosen = "normalize+batchnorm"  # this and the views by results/shift/verdict.json
    use = "what of the file's own statistics is used; default: %(default)s"
    submit.add_argument("--adapt", choices=ADAPTATIONS, default=chosen, help=use)
    submit.add_argument("--label-column", default="Labels", help="the report's file has Category")
    _weights_options(submit, tta="flip")
    return parser


def _command(commands, function: Callable, text: str) -> argparse.ArgumentParser:
    name = function.__name__.removeprefix("_")
    parser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.set_defaults(command=function, go_on="the same command starts again")
    return parser


def _recipe_options(parser: argparse.ArgumentParser, default: str | None) -> None:
    names = f"one of {', '.join(RECIPES)}"
    parser.add_argument("--recipe", required=not default, default=default, metavar="R", help=names)
    field = "any field of TrainConfig"
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help=field)
    _device_options(parser)
    _data_option(parser)


def _weights_options(parser: argparse.ArgumentParser, tta: str) -> None:
    parser.add_argument(
        "--weights", default=PRETRAINED, metavar="FILE", help="default: those of the package"
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


def _device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", metavar="D", help="cpu, cuda, cuda:N or mps")
    parser.add_argument("--precision", metavar="P", help=f"one of {', '.join(PRECISIONS)}")


def _data_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="ROOT", help="the folder that holds cifar-10-batches-py")


def _positive(text: str) -> int:
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text[:20]!r}")
    return int(text)


def _info(options: argparse.Namespace) -> None:
    config = recipe(options.recipe)
    summary = torchinfo.summary(ResNet(config.blocks, config.channels), (1, 3, 32, 32), verbose=0)
    total_bytes = summary.total_input + summary.total_output_bytes + summary.total_param_bytes
    sizes = {
        "parameters": summary.total_params,
        "mult_adds_m": round(summary.total_mult_adds / 1e6, 2),
        "params_mb": round(summary.total_param_bytes / 1e6, 2),
        "forward_backward_mb": round(summary.total_output_bytes / 1e6, 2),
        "total_mb": round(total_bytes / 1e6, 2),
    }
    rates = learning_rates(config)
    if options.json:
        print(json.dumps({"recipe": options.recipe, **sizes, "learning_rates": rates}))
        return
    print(summary)
    text = " ".join(f"{rate:.4g}" for rate in rates)
    print(f"learning rates of {options.recipe}, epoch by epoch: {text}")


def _config(
    options: argparse.Namespace, defaults: dict[str, object], flags: Sequence[str]
) -> TrainConfig:
    """The recipe with `defaults`, then with what --set says, then the options of these names."""
    changes = dict(defaults)
    for text in options.set:
        field, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--set: expected FIELD=VALUE, got {text!r}")
        changes[field] = value
    given = {flag: getattr(options, flag) for flag in flags}
    changes |= {flag: value for flag, value in given.items() if value is not None}
    return recipe(options.recipe, **changes)


def _train(options: argparse.Namespace) -> None:
    config = _config(options, {}, ("epochs", "train_size", "seed", "precision"))
    device = ranks.join(options.device)
    try:
        choose_device(device)  # before the data are read
        data = load_cifar10(options.data)
        metrics = fit(config, options.run, *data, device=device, start=options.start)
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


def _tune(options: argparse.Namespace) -> None:
    from cifar_lib import tune  # here, as importing Optuna takes a second
    from cifar_lib.study import best, work

    config = _config(options, tune.SHORT, ("precision",))
    score = tune.objective(load_cifar10(options.data)[0], config, options.device)
    study = tune.open_search(options.study, config, options.seed)
    work(study, options.study, options.trials, score)
    print(f"best on the validation split: {best(study)}")


def _print_score(score: dict, where: str) -> None:
    low, high = score["interval"]
    interval = f"95 % interval {low:.2%} to {high:.2%}, n = {score['n']}"
    print(f"test accuracy {score['accuracy']:.2%} ({interval}); {where}")


def _load(options: argparse.Namespace) -> tuple[ResNet, dict, str]:
    """The weights on the device asked for, their `info`, and the precision."""
    device = choose_device(options.device)
    precision = choose_precision(options.precision or "auto", device)
    prepare(device, precision)
    model, info = load_model(options.weights)
    return model.to(device, memory_format=torch.channels_last), info, precision


def _evaluate(options: argparse.Namespace) -> None:
    model, info, precision = _load(options)
    _, test = load_cifar10(options.data)
    logits = predict(model, test.images, info["mean"], info["std"], precision, options.tta)
    score = summarize(logits, test.labels)
    how = {"weights": str(options.weights), "tta": options.tta, "precision": precision}
    if options.json:
        print(json.dumps({**how, **score}))
    else:
        _print_score(score, f"test-time views: {options.tta}, precision {precision}")


def _predict(options: argparse.Namespace) -> None:
    paths = [Path(name) for name in options.images]
    images = torch.stack([read_picture(path) for path in paths])
    if options.grad_cam is not None and len({path.stem for path in paths}) < len(paths):
        raise InputError("predict: --grad-cam names its pictures after yours, two have one name")
    model, info, precision = _load(options)
    logits = predict(model, images, info["mean"], info["std"], precision, options.tta)
    probabilities = (logits / info.get("temperature", 1.0)).softmax(1)
    for path, row in zip(options.images, probabilities, strict=True):
        best = row.topk(3)
        guesses = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        print(f"{path}: {', '.join(f'{CLASSES[i]} {p:.1%}' for p, i in guesses)}")
    if options.grad_cam is None:
        return
    from cifar_lib.explain import beside_heat, grad_cam  # here: captum takes a second to import

    heat = grad_cam(model, images, logits.argmax(1), info["mean"], info["std"])
    for path, image, its_heat in zip(paths, images, heat, strict=True):
        png = io.BytesIO()
        Image.fromarray(beside_heat(image, its_heat)).save(png, format="PNG")
        target = Path(options.grad_cam) / f"{path.stem}.grad-cam.png"
        write_atomically(target, png.getvalue(), inputs=paths)


def _submit(options: argparse.Namespace) -> None:
    test = read_test_file(options.test)
    model, info, precision = _load(options)
    normalisation = info["mean"], info["std"]
    model, mean, std = adapt(options.adapt, model, test.images, *normalisation, precision)
    labels = predict(model, test.images, mean, std, precision, options.tta).argmax(1)
    inputs = (options.test, options.weights)
    write_submission(options.out, test.ids, labels.tolist(), options.label_column, inputs)
    how = f"adaptation: {options.adapt}, test-time views: {options.tta}"
    print(f"{len(labels)} labels in {options.out} ({how})")
