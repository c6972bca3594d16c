"""The command line, `python -m cifar_lib`: info, train, evaluate, predict, submit."""

import argparse
import errno
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

import torch
import torchinfo
from PIL import Image

from cifar_lib import __version__, evaluate, hardware, kaggle, shift
from cifar_lib.data import CLASSES, load_cifar10
from cifar_lib.errors import InputError, explained, printable
from cifar_lib.explain import grad_cam, picture_with_heat
from cifar_lib.files import output_file, write_atomically
from cifar_lib.fit import fit
from cifar_lib.model import PRETRAINED, ResNet, WeightsInfo, load_model
from cifar_lib.pictures import read_picture
from cifar_lib.recipes import RECIPES, TrainConfig, learning_rates, recipe

# The exit code that a shell reports for a process killed by SIGPIPE. Windows has no such signal.
CLOSED_PIPE = 128 + signal.SIGPIPE if hasattr(signal, "SIGPIPE") else 1

# The fields of TrainConfig that have an option of their own: `--train-size 100` means the same as
# `--set train_size=100`.
OWN_OPTIONS = ("epochs", "train_size", "seed", "precision")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    The code is 0 for success, 2 for a mistake that the user can correct, 130 for an interrupt, and
    CLOSED_PIPE if nobody reads the output any more.

    Raises SystemExit for wrong options, --help and --version.
    """
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # schedulers send it; same as Ctrl-C
    try:
        options.command(options)
        print(end="", flush=True)  # notice a closed pipe here, not at exit
    except (InputError, OSError) as error:
        if _is_closed_pipe(error):  # whoever read our output has gone away, as `head` does
            return CLOSED_PIPE
        return _mistake(str(error))
    except torch.OutOfMemoryError as error:
        remedy = "use --device cpu, or train with a smaller --set batch_size"
        return _mistake(f"{str(error).split('. ')[0]}: {remedy}")
    except (KeyboardInterrupt, SystemError) as error:
        # An interrupt inside C code can arrive as the cause or the context of a SystemError.
        if KeyboardInterrupt not in map(type, (error, error.__cause__, error.__context__)):
            raise
        print(f"\ninterrupted: the same command {options.on_repeat}", file=sys.stderr)
        return 130
    return 0


def _is_closed_pipe(error: Exception) -> bool:
    """Return whether the error means that nobody reads our output any more.

    Windows reports a closed pipe as an invalid argument. It reports a wrong file name in the same
    way, but that error contains the name.
    """
    invalid = os.name == "nt" and getattr(error, "errno", None) == errno.EINVAL
    return isinstance(error, BrokenPipeError) or (invalid and error.filename is None)


def _mistake(message: str) -> int:
    """Print one line on standard error, and return the exit code for a mistake."""
    print(f"error: {printable(message)}", file=sys.stderr)
    return 2


# The parser: the commands and their options.


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Exit with code 2 and one line, instead of the usage that argparse prints."""
        raise SystemExit(_mistake(f"{message}: see {self.prog} --help"))


def _parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line, with all its commands."""
    parser = _Parser(
        "python -m cifar_lib", description="Train a small ResNet on CIFAR-10, and use it."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = _command(commands, _info, "the network's size and a recipe's learning rates")
    info.add_argument("--recipe", default="report", metavar="R", help=_one_of(RECIPES))

    train = _command(commands, _train, "train in a run directory, or resume the run that is there")
    train.set_defaults(on_repeat="resumes after the last finished epoch")
    train.add_argument(
        "--run", required=True, metavar="DIR", help="a new folder, or that of a begun run"
    )
    train.add_argument("--recipe", required=True, metavar="R", help=_one_of(RECIPES))
    for field in OWN_OPTIONS:
        option = f"--{field.replace('_', '-')}"
        train.add_argument(option, metavar="VALUE", help=f"the same as --set {field}=VALUE")
    train.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="any field of TrainConfig; may be repeated",
    )
    _add_device(train)
    _add_data(train)

    score = _command(commands, _evaluate, "score weights on CIFAR-10's test images")
    score.add_argument("--json", action="store_true", help="print one JSON object")
    _add_weights(score, tta="none")
    _add_data(score)

    predict = _command(
        commands, _predict, "print the three likeliest classes of each of your pictures"
    )
    predict.add_argument("images", nargs="+", metavar="IMAGE")
    predict.add_argument(
        "--grad-cam", metavar="FOLDER", help="write heat maps of where the network looks"
    )
    _add_weights(predict, tta="none")

    submit = _command(commands, _submit, "label a competition's .pkl")
    submit.add_argument("--test", required=True, metavar="FILE.pkl")
    submit.add_argument(
        "--out", required=True, type=_output, metavar="FILE.csv", help="- is standard output"
    )
    submit.add_argument(
        "--adapt",
        choices=("auto", *shift.ADAPTATIONS),
        default="auto",
        help="which of the file's own statistics to use; default: auto, which is "
        f"{shift.BALANCED}, or {shift.UNBALANCED} if the predicted classes are far from equally "
        "frequent and the network predicts a similar mix with more confidence when it isn't "
        "adapted",
    )
    submit.add_argument(
        "--label-column",
        default="Labels",
        metavar="NAME",
        help="the name of the column of labels; default: %(default)s",
    )
    _add_weights(submit, tta="flip")
    return parser


def _command(
    commands: argparse._SubParsersAction, run: Callable[[argparse.Namespace], None], text: str
) -> argparse.ArgumentParser:
    """Add the command that the function `run` carries out, and return its parser.

    The command has the function's name, without the underscore. The parser's default `on_repeat`
    completes what is printed after an interrupt: "the same command ...".
    """
    name = run.__name__.removeprefix("_")
    parser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.set_defaults(command=run, on_repeat="starts again")
    return parser


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="auto", metavar="D", help="auto, cpu, cuda, cuda:N or mps"
    )


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="ROOT", help="the folder that holds cifar-10-batches-py")


def _add_weights(parser: argparse.ArgumentParser, tta: str) -> None:
    """Add the options that say which weights predict, and how; `tta` is the default of --tta."""
    parser.add_argument(
        "--weights", default=PRETRAINED, metavar="FILE", help="default: those of the package"
    )
    parser.add_argument(
        "--tta",
        default=tta,
        choices=evaluate.TTA,
        help="test-time augmentation: none, or flip, which also sees the mirror image; default: "
        "%(default)s",
    )
    parser.add_argument(
        "--precision", default="fp32", metavar="P", help=_one_of(hardware.PRECISIONS)
    )
    _add_device(parser)


def _one_of(names: Iterable[str]) -> str:
    return f"one of {', '.join(names)}"


def _output(text: str) -> str:
    """Refuse the name of an output file before any work is done, if it names a folder."""
    try:
        output_file(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


# The functions that carry out the commands.


def _info(options: argparse.Namespace) -> None:
    """Print a recipe's network, layer by layer, and its learning rate in each epoch."""
    config = recipe(options.recipe)
    print(torchinfo.summary(ResNet(config.blocks, config.channels), (1, 3, 32, 32), verbose=0))
    rates = " ".join(f"{rate:.4g}" for rate in learning_rates(config))
    print(f"learning rates of {config.recipe}, epoch by epoch: {rates}")


def _train(options: argparse.Namespace) -> None:
    """Train a recipe in a run directory, and print its test score."""
    config, run = _config(options), Path(options.run)
    hardware.choose_device(options.device)  # refuse a wrong device before the data are read
    train, test = load_cifar10(options.data)
    metrics = fit(config, run, train, test, device=options.device)
    what, remedy = f"{run / 'metrics.json'} has no test score", "restore or delete it"
    with explained(what, remedy, KeyError, TypeError, ValueError):
        _print_score(metrics["test"], f"weights in {run / 'model.safetensors'}")


def _config(options: argparse.Namespace) -> TrainConfig:
    """Return the recipe, changed first by --set and then by the options of OWN_OPTIONS."""
    changes: dict[str, str] = {}
    for text in options.set:
        field, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"set: expected FIELD=VALUE, got {text!r}: join the two by =")
        changes[field] = value
    for field in OWN_OPTIONS:
        value = getattr(options, field)
        if value is not None:
            changes[field] = value
    return recipe(options.recipe, **changes)


def _evaluate(options: argparse.Namespace) -> None:
    """Print how the weights score on CIFAR-10's test images."""
    model, info, precision = _load(options)
    _, test = load_cifar10(options.data)
    logits = evaluate.predict(model, test.images, info.test_normalization, precision, options.tta)
    _check_finite(logits)
    score = evaluate.summarize(logits, test.labels)
    if options.json:
        settings = {"weights": options.weights, "tta": options.tta, "precision": precision}
        print(json.dumps({**settings, **score}))
    else:
        _print_score(score, f"test-time augmentation: {options.tta}, precision {precision}")


def _predict(options: argparse.Namespace) -> None:
    """Print the three likeliest classes of each picture; with --grad-cam, write its heat map."""
    paths = [Path(name) for name in options.images]
    images = torch.stack([read_picture(path) for path in paths])  # uint8 (N, 3, 32, 32)
    if options.grad_cam is not None and len({path.stem for path in paths}) < len(paths):
        what = "predict: --grad-cam names its files after your pictures, and two have the same name"
        raise InputError(f"{what} (without folder and ending): rename one of them")

    # Print the likeliest classes of each picture.
    model, info, precision = _load(options)
    logits = evaluate.predict(model, images, info.test_normalization, precision, options.tta)
    _check_finite(logits)
    note = " (uncalibrated)" if info.temperature is None else ""
    for path, row in zip(options.images, info.probabilities(logits), strict=True):
        best = row.topk(3)
        guesses = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        print(f"{path}: {', '.join(f'{CLASSES[i]} {p:.1%}' for p, i in guesses)}{note}")

    # With --grad-cam, show where the network looks: write one file for each picture, with the heat
    # map beside it.
    if options.grad_cam is None:
        return
    heat = grad_cam(model, images, logits.argmax(1), info.test_normalization)
    for path, image, its_heat in zip(paths, images, heat, strict=True):
        png = io.BytesIO()
        Image.fromarray(picture_with_heat(image, its_heat)).save(png, format="PNG")
        target = Path(options.grad_cam) / f"{path.stem}.grad-cam.png"
        write_atomically(target, png.getvalue(), inputs=paths)


def _submit(options: argparse.Namespace) -> None:
    """Label the images of a competition's test file, and write the submission."""
    # Predict. By default, the predictions themselves decide whether to adapt to the file.
    test = kaggle.read_test_file(options.test)
    model, info, precision = _load(options)
    method, why = options.adapt, None
    if method == "auto":
        logits, method, why = shift.predict_adapted(
            model, test.images, info.test_normalization, precision, options.tta
        )
    else:
        model, normalization = shift.adapt(
            method, model, test.images, info.test_normalization, precision
        )
        logits = evaluate.predict(model, test.images, normalization, precision, options.tta)
    _check_finite(logits)

    # Write the submission.
    labels = logits.argmax(1)
    inputs = (options.test, options.weights)
    kaggle.write_submission(options.out, test.ids, labels.tolist(), options.label_column, inputs)

    # Say what was done, on standard error if the submission itself is on standard output.
    stream = sys.stderr if options.out == "-" else sys.stdout
    print(f"images read from {test.source}", file=stream)
    if why is not None:
        print(f"adaptation chosen: {method} ({why})", file=stream)
    settings = f"adaptation: {method}, test-time augmentation: {options.tta}"
    place = "to standard output" if options.out == "-" else f"to {options.out}"
    print(f"{len(labels)} labels written {place} ({settings})", file=stream)


def _load(options: argparse.Namespace) -> tuple[ResNet, WeightsInfo, str]:
    """Return the network on the chosen device, its weights' information, and the precision."""
    device = hardware.choose_device(options.device)
    precision = hardware.choose_precision(options.precision, device)
    hardware.prepare(device, precision)
    model, info = load_model(options.weights)
    model = model.to(device, memory_format=hardware.memory_format(device))
    return model, info, precision


def _check_finite(logits: torch.Tensor) -> None:
    """Raise InputError if logits aren't finite: `argmax` would call all images airplanes."""
    if not logits.isfinite().all():
        raise InputError("weights: their outputs are not finite: use others, or --precision fp32")


def _print_score(score: dict, details: str) -> None:
    """Print the test accuracy that `evaluate.summarize` found, with its interval, in one line."""
    low, high = score["interval"]
    interval = f"95% interval {low:.2%} to {high:.2%}, n = {score['n']}"
    print(f"test accuracy {score['accuracy']:.2%} ({interval}); {details}")
