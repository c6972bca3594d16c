"""python -m cifar_lib: info, train, tune, evaluate, predict, submit."""

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

from cifar_lib import __version__, evaluate, hardware, kaggle, ranks, shift
from cifar_lib.data import CLASSES, load_cifar10, read_picture
from cifar_lib.errors import InputError, explained, printable
from cifar_lib.files import output_file, write_atomically
from cifar_lib.fit import fit
from cifar_lib.model import PRETRAINED, ResNet, load_model
from cifar_lib.recipes import RECIPES, TrainConfig, learning_rates, recipe

# A process that SIGPIPE ends has this exit code; Windows has no such signal.
CLOSED_PIPE = 128 + signal.SIGPIPE if hasattr(signal, "SIGPIPE") else 1

# Options of several commands.
DEVICE = {"default": "auto", "metavar": "D", "help": "auto, cpu, cuda, cuda:N or mps"}
DATA = {"metavar": "ROOT", "help": "the folder that holds cifar-10-batches-py"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for a wrong input, 130 when interrupted."""
    options = _parser().parse_args(arguments)
    # SIGTERM, which schedulers send, is as Ctrl-C; but a rank of several may be waiting for the
    # others, where no handler would run: there it just ends.
    if "WORLD_SIZE" not in os.environ:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        options.command(options)
        print(end="", flush=True)
    except (InputError, OSError) as error:
        if _is_closed_pipe(error):  # the reader of our output went away, as `head` does
            return CLOSED_PIPE
        return _mistake(str(error))
    except torch.OutOfMemoryError as error:
        remedy = "use --device cpu, or train with a smaller --set batch_size"
        return _mistake(f"{str(error).split('. ')[0]}: {remedy}")
    except (KeyboardInterrupt, SystemError) as error:  # inside C code one can end as the other
        if KeyboardInterrupt not in map(type, (error, error.__cause__, error.__context__)):
            raise
        print(f"\ninterrupted: {options.go_on}", file=sys.stderr)
        return 130
    return 0


def _is_closed_pipe(error: Exception) -> bool:
    """On Windows a closed pipe is an invalid argument, as a wrong file name is, but names none."""
    invalid = os.name == "nt" and getattr(error, "errno", None) == errno.EINVAL
    return isinstance(error, BrokenPipeError) or (invalid and error.filename is None)


def _mistake(message: str) -> int:
    print(f"error: {printable(message)}", file=sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """One line and exit code 2, without the usage."""
        raise SystemExit(_mistake(f"{message}: see {self.prog} --help"))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("python -m cifar_lib", description="Train a small ResNet on CIFAR-10, use it.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(function: Callable, text: str, go_on: str) -> Callable:
        name = function.__name__.removeprefix("_")
        added = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        added.set_defaults(command=function, go_on=f"the same command {go_on}")
        return added.add_argument

    add = command(_info, "the network's size and a recipe's learning rates", "starts again")
    add("--recipe", default="report", metavar="R")

    text = "train a recipe into a run directory, or go on with it"
    add = command(_train, text, "goes on from the last finished epoch")
    add("--run", required=True, metavar="DIR", help="a new or a begun run's folder")
    _add_recipe(add, "epochs", "train_size", "seed", required=True)

    text = "search for Table 1's values, by any number of workers"
    add = command(_tune, text, "goes on; the trial waits to be run again")
    study = {"metavar": "FILE_OR_URL", "help": "SQLite's file, or a database"}
    add("--study", required=True, type=_output, **study)
    add("--trials", required=True, type=int, metavar="N", help="of the study")
    add("--seed", type=int, metavar="N", help="of the sampler; another one each worker")
    _add_recipe(add, default="report")

    add = command(_evaluate, "score weights on CIFAR-10's test images", "starts again")
    add("--json", action="store_true")
    _add_weights(add, tta="none")
    add("--data", **DATA)

    add = command(_predict, "the three likeliest classes of your own pictures", "starts again")
    add("images", nargs="+", metavar="IMAGE")
    add("--grad-cam", metavar="FOLDER", help="also write where the network looks")
    _add_weights(add, tta="none")

    add = command(_submit, "label a competition's .pkl", "starts again")
    add("--test", required=True, metavar="FILE.pkl")
    add("--out", required=True, type=_output, metavar="FILE.csv", help="- is standard output")
    use = (
        "what of the file's own statistics is used; default: auto, which is "
        f"{shift.BALANCED} unless the predicted classes are far from equally frequent and the "
        f"network, without it, is more sure of much the same classes: then {shift.UNBALANCED}"
    )
    add("--adapt", choices=("auto", *shift.ADAPTATIONS), default="auto", help=use)
    add("--label-column", default="Labels", help="the report's file has Category")
    _add_weights(add, tta="flip")
    return parser


def _output(text: str) -> str:
    """What an option names as its output, refused before any work is done for it."""
    try:
        if "://" not in text:
            output_file(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _add_recipe(add: Callable, *fields: str, **given: object) -> None:
    """A recipe and its fields: --train-size 100 is short for --set train_size=100."""
    add("--recipe", metavar="R", help=f"one of {', '.join(RECIPES)}", **given)
    change = {"dest": "set", "action": "append", "metavar": "VALUE"}
    for field in (*fields, "precision"):
        add(f"--{field.replace('_', '-')}", type=f"{field}={{}}".format, default=[], **change)
    add("--set", **change | {"metavar": "FIELD=VALUE", "help": "any field of TrainConfig"})
    add("--device", **DEVICE)
    add("--data", **DATA)


def _add_weights(add: Callable, tta: str) -> None:
    add("--weights", default=PRETRAINED, metavar="FILE", help="default: those of the package")
    views = {"nargs": "?", "const": "flip", "default": tta, "choices": evaluate.TTA}
    add("--tta", **views, help="test-time views; default: %(default)s")
    add("--precision", default="fp32", metavar="P", help=f"one of {', '.join(hardware.PRECISIONS)}")
    add("--device", **DEVICE)


def _info(options: argparse.Namespace) -> None:
    config = recipe(options.recipe)
    print(torchinfo.summary(ResNet(config.blocks, config.channels), (1, 3, 32, 32), verbose=0))
    rates = " ".join(f"{rate:.4g}" for rate in learning_rates(config))
    print(f"learning rates of {config.recipe}, epoch by epoch: {rates}")


def _config(options: argparse.Namespace, **changes: object) -> TrainConfig:
    """The recipe with `changes`, then with what --set and the other options say."""
    for text in options.set:
        field, _, value = text.partition("=")
        changes[field] = value
    return recipe(options.recipe, **changes)


def _train(options: argparse.Namespace) -> None:
    config, run = _config(options), Path(options.run)
    with ranks.joined(options.device) as device:
        hardware.choose_device(device)  # before the data are read
        metrics = fit(config, run, *load_cifar10(options.data), device=device)
        if ranks.rank() == 0:
            what, remedy = f"{run / 'metrics.json'} has no test score", "restore or delete it"
            with explained(what, remedy, KeyError, TypeError, ValueError):
                _print_score(metrics["test"], f"weights in {run / 'model.safetensors'}")


def _tune(options: argparse.Namespace) -> None:
    with explained("tune: the search can't be used", "pip install ./extras/search", ImportError):
        import cifar_search  # extras/search: optional
    config = _config(options, **cifar_search.SHORT)
    score = cifar_search.objective(load_cifar10(options.data)[0], config, options.device)
    study = cifar_search.open_search(options.study, config, options.seed)
    cifar_search.work(study, options.study, options.trials, score)
    for best in study.best_trials[:1]:  # none, if all were pruned
        print(f"best on the validation split: {best.value:.2%} with {best.params}")


def _print_score(score: dict, where: str) -> None:
    low, high = score["interval"]
    interval = f"95 % interval {low:.2%} to {high:.2%}, n = {score['n']}"
    print(f"test accuracy {score['accuracy']:.2%} ({interval}); {where}")


def _load(options: argparse.Namespace) -> tuple[ResNet, dict, str]:
    """The weights on the device asked for, their `info`, and the precision."""
    device = hardware.choose_device(options.device)
    precision = hardware.choose_precision(options.precision, device)
    hardware.prepare(device, precision)
    model, info = load_model(options.weights)
    model = model.to(device, memory_format=hardware.memory_format(device))
    return model, info, precision


def _evaluate(options: argparse.Namespace) -> None:
    model, info, precision = _load(options)
    _, test = load_cifar10(options.data)
    logits = evaluate.predict(model, test.images, info["mean"], info["std"], precision, options.tta)
    score = evaluate.summarize(logits, test.labels)
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
    logits = evaluate.predict(model, images, info["mean"], info["std"], precision, options.tta)
    probabilities = (logits / info.get("temperature", 1.0)).softmax(1)
    # Weights that were trained without a validation part have no temperature.
    note = "" if "temperature" in info else " (uncalibrated)"
    for path, row in zip(options.images, probabilities, strict=True):
        best = row.topk(3)
        guesses = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        print(f"{path}: {', '.join(f'{CLASSES[i]} {p:.1%}' for p, i in guesses)}{note}")
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
    test = kaggle.read_test_file(options.test)
    model, info, precision = _load(options)
    how = info["mean"], info["std"], precision
    method, why = options.adapt, ""
    if method == "auto":
        logits, method, why = shift.predict_adapted(model, test.images, *how, options.tta)
    else:
        model, mean, std = shift.adapt(method, model, test.images, *how)
        logits = evaluate.predict(model, test.images, mean, std, precision, options.tta)
    if not logits.isfinite().all():
        raise InputError("weights: their outputs are not finite: use others, or --precision fp32")
    labels = logits.argmax(1)
    inputs = (options.test, options.weights)
    kaggle.write_submission(options.out, test.ids, labels.tolist(), options.label_column, inputs)
    how = f"adaptation: {method}, test-time views: {options.tta}"
    aside = sys.stderr if options.out == "-" else sys.stdout
    print(f"images of {test.source}", file=aside)
    if why:
        print(f"adapted by {method}: {why}", file=aside)
    print(f"{len(labels)} labels in {options.out} ({how})", file=aside)
