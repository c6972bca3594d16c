"""Copy a finished run into the repository, or check the recorded scores of the package's weights.

    python -m scripts.archive_run RUN
    python -m scripts.archive_run --check

The first command writes results/<recipe>-seed<k>/, and prints the recipe's mean accuracy over its
archived seeds. If that folder holds a run of another configuration, it is kept under the name
<recipe>-seed<k>-<n>-epochs. For seed 42, which was chosen before any seed was run, the command also
writes the package's weights, cifar_lib/weights/<recipe>.safetensors, with convolutions in half
precision, and their line in SHA256SUMS. Whatever the seed, it writes the weights' card anew
(scripts/weights_card.py).

The second command measures the package's weights again and compares the scores with the recorded
ones. It changes nothing. It is the last step of `make run`.
"""

import argparse
import hashlib
import itertools
import json
import os
import shutil
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from cifar_lib.data import REAL, ImageSet, Normalization, load_cifar10
from cifar_lib.errors import InputError
from cifar_lib.evaluate import (
    accuracy,
    calibration_error,
    fit_temperature,
    mcnemar,
    predict,
    predict_views,
    summarize,
    wilson_interval,
)
from cifar_lib.files import write_atomically
from cifar_lib.hardware import choose_device, memory_format, prepare
from cifar_lib.model import PRETRAINED, SHIPPED, ResNet, WeightsInfo, load_model, save_model
from cifar_lib.shift import adapt
from notebooks.course.corruptions import shifted
from notebooks.course.reference import SHIFT, SHIPPED_RUN
from notebooks.course.session import GIVE_UP_AFTER
from scripts.weights_card import (
    RESULTS,
    ROOT,
    SHIPPED_SEED,
    WEIGHTS,
    config_of,
    metrics_of,
    write_card,
)

RECORDS = ("config.json", "environment.json", "history.csv", "timing.csv")
TOLERANCE = 0.002  # in accuracy; other hardware rounds differently, and a few close calls change


def archive(run: Path) -> dict:
    """Copy the finished run into results/, and return the metrics that are written there.

    They are the run's own metrics, and under `half_precision` the scores of its weights with
    convolutions in half precision.

    Raises InputError if the run isn't finished, or wasn't trained on the real CIFAR-10.
    """
    # Refuse what isn't a finished run on real data.
    if not os.path.isfile(run / "metrics.json"):
        what = f"archive: expected a finished run, found no metrics.json in {run}"
        raise InputError(f"{what}: train it to its end")
    metrics = metrics_of(run)
    if metrics["data"] != REAL:
        raise InputError(f"archive: expected a run on {REAL}, got one on {metrics['data']}")

    # Fit the temperature to the weights in full precision.
    _, test = load_cifar10()
    device = choose_device()
    model, info = load_model(run / "model.safetensors")
    whole = predict(model.to(device), test.images, info.test_normalization)
    temperature = round(fit_temperature(whole, test.labels), 4)
    info = info.model_copy(update={"temperature": temperature})

    # Save the weights with convolutions in half precision, which makes the file half as large, and
    # score what is read back.
    weights = run / "half.safetensors"
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.half()
    save_model(weights, model, info)
    halved, _ = load_model(weights)
    scores, plain = score(halved.to(device), info, test, config_of(run))
    changed = int((whole.argmax(1) != plain.argmax(1)).sum())
    sizes = {"bytes": weights.stat().st_size, "predictions_changed_by_half_precision": changed}
    metrics["half_precision"] = sizes | scores

    # Write the run's folder. If another configuration has that name, rename its folder first.
    folder = RESULTS / f"{metrics['recipe']}-seed{metrics['seed']}"
    if folder.is_dir() and config_of(folder) != config_of(run):
        epochs = metrics_of(folder)["epochs"]
        folder.rename(_unused(folder.with_name(f"{folder.name}-{epochs}-epochs")))
    folder.mkdir(exist_ok=True)
    for name in RECORDS:
        shutil.copyfile(run / name, folder / name)
    write_atomically(folder / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())

    # Write the package's weights, and the digests of all of the package's weights.
    if metrics["seed"] == SHIPPED_SEED:
        write_atomically(WEIGHTS / f"{metrics['recipe']}.safetensors", weights.read_bytes())
        files = sorted(WEIGHTS.glob("*.safetensors"))
        digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
        sums = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
        write_atomically(WEIGHTS / "SHA256SUMS", sums.encode())

    # Write the card of the package's weights, which lists other seeds, too.
    if list(WEIGHTS.glob("*.safetensors")):
        write_card(RESULTS, WEIGHTS)
    return metrics


def over_seeds(recipe: str) -> str:
    """Return the mean and standard deviation of the test accuracy over a recipe's archived runs.

    The text has one line per configuration. Runs in one line differ only in their seeds.
    """
    # Group the accuracies by configuration: {configuration without its seed: {seed: accuracy}}.
    groups: dict[str, dict[int, float]] = {}
    for folder in RESULTS.glob(f"{recipe}-seed*"):
        config = config_of(folder)
        seed = config.pop("seed")
        scores = groups.setdefault(json.dumps(config, sort_keys=True), {})
        scores[seed] = metrics_of(folder)["test"]["accuracy"]

    # Describe each group in a line.
    lines = []
    for config, scores in groups.items():
        spread = f" ± {statistics.stdev(scores.values()):.2%}" if len(scores) > 1 else ""
        seeds = ", ".join(map(str, sorted(scores)))
        mean, epochs = statistics.mean(scores.values()), json.loads(config)["epochs"]
        lines.append(f"{recipe}, {epochs} epochs, seed {seeds}: {mean:.2%}{spread}")
    return "\n".join(lines)


def _unused(path: Path) -> Path:
    """Return `path` if nothing is there; otherwise `path` with the first free number at its end."""
    numbered = (path.with_name(f"{path.name}-{n}") for n in itertools.count(2))
    return next(name for name in itertools.chain([path], numbered) if not name.exists())


def score(model: ResNet, info: WeightsInfo, test: ImageSet, config: dict) -> tuple[dict, Tensor]:
    """Return the scores of weights that were trained by `config`, and their logits.

    The scores are those that the weights' card and the README quote. The logits, float32 (N, 10),
    are those of the images without their mirror images.
    """
    # Score the images alone, and averaged with their mirror images.
    views = predict_views(model, test.images, info.test_normalization)  # (2, N, 10)
    plain = views[0]
    scores = {}
    for tta, logits in {"none": plain, "flip": views.mean(0)}.items():
        summary = summarize(logits, test.labels)
        scores[f"tta_{tta}"] = {
            name: summary[name] for name in ("accuracy", "interval", "n", "calibration_error")
        }
    scores["temperature"] = info.temperature
    scores["calibration_error_after_temperature"] = cross_fitted_error(plain, test.labels)

    # Score the images normalised as in training, which the published run didn't do.
    trained = predict(model, test.images, Normalization(config["mean"], config["std"]))
    gained, lost, p = mcnemar(trained.argmax(1) == test.labels, plain.argmax(1) == test.labels)
    scores["training_normalisation"] = {
        "accuracy": accuracy(trained, test.labels),
        **{"gained": gained, "lost": lost, "mcnemar_p": p},
    }
    return scores, plain


def cross_fitted_error(logits: Tensor, labels: Tensor) -> float:
    """Return the calibration error after temperature scaling.

    logits: float32 (N, 10). labels: int64 (N,).

    The images are split into two random halves, and each half is scaled by the temperature that was
    fitted to the other one. So no image is scaled by a temperature that was fitted to it.
    """
    halves = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).chunk(2)
    scaled = logits.clone()
    for fitted, measured in (halves, halves[::-1]):
        scaled[measured] /= fit_temperature(logits[fitted], labels[fitted])
    return calibration_error(scaled, labels)


def check() -> bool:
    """Measure the package's weights on all test images; return whether the recorded numbers hold.

    If CIFAR-10 can't be had, nothing is measured, a line says so, and the result is True.
    """
    try:
        _, test = load_cifar10(give_up_after=GIVE_UP_AFTER, home=ROOT / "data")
    except InputError as error:
        print(f"The package's weights were not measured: {error}")
        return True

    # Measure.
    device = choose_device()
    prepare(device, "fp32")
    model, info = load_model(PRETRAINED)
    model = model.to(device, memory_format=memory_format(device))
    scores, _ = score(model, info, test, config_of(SHIPPED_RUN))

    # Print each accuracy beside the recorded one.
    recorded = metrics_of(SHIPPED_RUN)["half_precision"]
    place = f"results/{SHIPPED_RUN.name}"
    print(f"The package's weights on CIFAR-10's {len(test):,} test images (recorded in {place})")
    pairs = {
        label: (scores[name]["accuracy"], recorded[name]["accuracy"])
        for name, label in (
            ("tta_none", "accuracy"),
            ("tta_flip", "accuracy, mirror image averaged in"),
            ("training_normalisation", "accuracy, normalised as in training"),
        )
    } | on_custom_set(model, info, test)
    for label, (now, then) in pairs.items():
        low, high = wilson_interval(round(now * len(test)), len(test))
        print(f"  {label:46} {now:.2%} ({low:.2%} to {high:.2%}), recorded {then:.2%}")

    # Print what else the texts quote.
    trained = scores["training_normalisation"]
    p = f"McNemar's p = {trained['mcnemar_p']:.1e}"
    changed = f"{trained['lost']} lost, {trained['gained']} gained ({p})"
    print(f"  {'images, normalised as in training':46} {changed}")
    now, then = (each["tta_none"]["calibration_error"] for each in (scores, recorded))
    print(f"  {'calibration error':46} {now:.2%}, recorded {then:.2%}")
    now, then = (each["calibration_error_after_temperature"] for each in (scores, recorded))
    print(f"  {'  after temperature scaling':46} {now:.2%}, recorded {then:.2%}")
    return all(abs(now - then) <= TOLERANCE for now, then in pairs.values())


def on_custom_set(
    model: ResNet, info: WeightsInfo, test: ImageSet
) -> dict[str, tuple[float, float]]:
    """Return pairs of accuracies, measured now and recorded, on a copy of the custom test set.

    The copy is CIFAR-10's test images with the channel statistics of the competition's custom set.
    One pair is without adaptation, the other with the default of `submit`. The recorded ones are in
    results/shift/.
    """
    verdict = json.loads((SHIFT / "verdict.json").read_text(encoding="utf-8"))
    if verdict["weights"]["sha256"] != hashlib.sha256(SHIPPED.read_bytes()).hexdigest():
        print("  results/shift was measured with other weights: see scripts/ablation.py")
        return {}
    images = shifted(test.images, "statistics", 1)
    default = verdict["default"]["adapt"], verdict["default"]["tta"]
    pairs = {}
    for adaptation, tta in (("none", "none"), default):
        network, normalization = adapt(adaptation, model, images, info.test_normalization)
        now = accuracy(predict(network, images, normalization, tta=tta), test.labels)
        then = verdict["custom"][f"{adaptation} + {tta}"]["accuracy"]
        pairs[f"custom set, {adaptation}, TTA {tta}"] = now, then
    return pairs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("run", nargs="?", type=Path, metavar="RUN", help="a finished run's folder")
    what.add_argument("--check", action="store_true", help="measure the package's weights again")
    options = parser.parse_args()
    try:
        if options.check:
            if check():
                return 0
            print(f"error: these differ by more than {TOLERANCE:.1%}", file=sys.stderr)
            return 1
        metrics = archive(options.run)
        print(json.dumps(metrics["half_precision"], indent=2))
        print(over_seeds(metrics["recipe"]))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
