"""The command line, `python -m cifar_lib`: info, train, evaluate, predict, submit."""

import argparse
import errno
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torchinfo
from PIL import Image

from cifar_lib import __version__, evaluate, hardware, kaggle, shift
from cifar_lib.data import CLASSES, load_cifar10
from cifar_lib.errors import InputError, explained, printable
from cifar_lib.explain import beside_heat, grad_cam
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
    def error(self, message: str) -> None:
        """Exit with code 2 and one line, instead of the usage that argparse prints."""
        raise SystemExit(_mistake(f"{message}: see {self.prog} --help"))


def _parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line, with all its commands."""
    parser = _Parser("python -m cifar_lib", description="Train a small ResNet on CIFAR-10, use it.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = _command(commands, _info, "the network's size and a recipe's learning rates")
    info.add_argument("--recipe", default="report", metavar="R", help=_one_of(RECIPES))

    train = _command(commands, _train, "train into a run directory, or resume the run there")
    train.set_defaults(on_repeat="resumes after the last finished epoch")
    train.add_argument("--run", required=True, metavar="DIR", help="a new or a begun run's folder")
    train.add_argument("--recipe", required=True, metavar="R", help=_one_of(RECIPES))
    for field in OWN_OPTIONS:
        train.add_argument(f"--{field.replace('_', '-')}", metavar="VALUE")
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

    predict = _command(commands, _predict, "the three likeliest classes of your own pictures")
    predict.add_argument("images", nargs="+", metavar="IMAGE")
    predict.add_argument("--grad-cam", metavar="FOLDER", help="also write where the network looks")
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
        help="what of the file's own statistics is used; default: auto, which is "
        f"{shift.BALANCED} unless the predicted classes are far from equally frequent and the "
        f"network, without it, is more sure of much the same classes: then {shift.UNBALANCED}",
    )
    submit.add_argument(
        "--label-column", default="Labels", metavar="NAME", help="the report's file has Category"
    )
    _add_weights(submit, tta="flip")
    return parser


def _command(
    commands: argparse._SubParsersAction, run: Callable[[argparse.Namespace], None], text: str
) -> argparse.ArgumentParser:
    """Add the command that the function `run` carries out, and return its parser.

    The command has the function's name, without the underscore. The parser's default `on_repeat`
    ends the message after an interrupt, which says what the same command will do.
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
        nargs="?",
        const="flip",
        default=tta,
        choices=evaluate.TTA,
        help="test-time views; default: %(default)s",
    )
    parser.add_argument(
        "--precision", default="fp32", metavar="P", help=_one_of(hardware.PRECISIONS)
    )
    _add_device(parser)


def _one_of(names: Sequence[str]) -> str:
    return f"one of {', '.join(names)}"


def _output(text: str) -> str:
    """Check the name of an output file, so that a wrong one is refused before any work is done."""
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
    """Train a recipe into a run directory, and print its test score."""
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
            raise InputError(f"set: expected FIELD=VALUE, got {text!r}: write the value, too")
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
    score = evaluate.summarize(logits, test.labels)
    if options.json:
        settings = {"weights": options.weights, "tta": options.tta, "precision": precision}
        print(json.dumps({**settings, **score}))
    else:
        _print_score(score, f"test-time views: {options.tta}, precision {precision}")


def _predict(options: argparse.Namespace) -> None:
    """Print the three likeliest classes of each picture; with --grad-cam, write its heat map."""
    paths = [Path(name) for name in options.images]
    images = torch.stack([read_picture(path) for path in paths])  # uint8 (N, 3, 32, 32)
    if options.grad_cam is not None and len({path.stem for path in paths}) < len(paths):
        what = "predict: --grad-cam names its pictures after yours, and two have one name"
        raise InputError(f"{what}: rename one, or give them one by one")

    # Print the likeliest classes of each picture.
    model, info, precision = _load(options)
    logits = evaluate.predict(model, images, info.test_normalization, precision, options.tta)
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
        Image.fromarray(beside_heat(image, its_heat)).save(png, format="PNG")
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
    if not logits.isfinite().all():
        raise InputError("weights: their outputs are not finite: use others, or --precision fp32")

    # Write the submission.
    labels = logits.argmax(1)
    inputs = (options.test, options.weights)
    kaggle.write_submission(options.out, test.ids, labels.tolist(), options.label_column, inputs)

    # Say what was done, on standard error if the submission itself is on standard output.
    stream = sys.stderr if options.out == "-" else sys.stdout
    print(f"images of {test.source}", file=stream)
    if why is not None:
        print(f"adapted by {method}: {why}", file=stream)
    settings = f"adaptation: {method}, test-time views: {options.tta}"
    print(f"{len(labels)} labels in {options.out} ({settings})", file=stream)


def _load(options: argparse.Namespace) -> tuple[ResNet, WeightsInfo, str]:
    """Return the network on the chosen device, its weights' information, and the precision."""
    device = hardware.choose_device(options.device)
    precision = hardware.choose_precision(options.precision, device)
    hardware.prepare(device, precision)
    model, info = load_model(options.weights)
    model = model.to(device, memory_format=hardware.memory_format(device))
    return model, info, precision


def _print_score(score: dict, details: str) -> None:
    """Print the test accuracy that `evaluate.summarize` found, with its interval, in one line."""
    low, high = score["interval"]
    interval = f"95 % interval {low:.2%} to {high:.2%}, n = {score['n']}"
    print(f"test accuracy {score['accuracy']:.2%} ({interval}); {details}")
