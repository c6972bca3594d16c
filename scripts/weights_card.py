"""Write the card of the package's weights, cifar_lib/weights/README.md, from the records.

    python -m scripts.weights_card

scripts/archive_run.py does so, too, whenever it archives a run. The card's words are in
weights_card.md.jinja, its numbers in results/.
"""

import argparse
import json
import statistics
from dataclasses import fields
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cifar_lib.files import write_atomically
from cifar_lib.fit import REBASED_ON
from cifar_lib.model import SHIPPED, count_parameters
from cifar_lib.recipes import TrainConfig, with_defaults
from notebooks.course.corruptions import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
WEIGHTS = SHIPPED.parent
SHIPPED_SEED = 42


def config_of(folder: Path) -> dict:
    """Return a run's config.json as this version would have written it.

    Settings that this version no longer has are left out. Those that the run's version didn't have
    yet get their default, which is what that version did.
    """
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    known = {field.name for field in fields(TrainConfig)} | {"data", "images"}
    return with_defaults({name: value for name, value in stored.items() if name in known})


def metrics_of(folder: Path) -> dict:
    """Return a run's metrics.json."""
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def seeds_of(folder: Path) -> dict[int, Path]:
    """Return the folders of all archived runs that differ from a run only in the seed, by seed.

    The run itself is the first of them.
    """
    runs = {}
    config = config_of(folder)
    for other in [folder, *sorted(folder.parent.glob(f"{config['recipe']}-seed*"))]:
        theirs = config_of(other)
        if theirs | {"seed": None} == config | {"seed": None}:
            runs.setdefault(theirs["seed"], other)
    return runs


def card(results: Path = RESULTS, weights: Path = WEIGHTS) -> str:
    """Return the card, a text in Markdown, of the weights in a folder by the records in another."""
    # The report's weights, which are the default, come first.
    names = sorted((file.stem for file in weights.glob("*.safetensors")), reverse=True)
    runs = {name: results / f"{name}-seed{SHIPPED_SEED}" for name in names}
    columns = [_column(run) for run in runs.values()]
    folder = Path(__file__).parent
    template = Environment(
        loader=FileSystemLoader(folder, encoding="utf-8"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    ).get_template("weights_card.md.jinja")
    return template.render(
        names=names,
        rows=[(label, [column[label] for column in columns]) for label in columns[0]],
        uses=[_use_of_test_images(run) for run in runs.values()],
        rebased_on=f"{REBASED_ON:,}",
        seed=SHIPPED_SEED,
        folders=[each.name for run in runs.values() for each in seeds_of(run).values()],
        noise=_noise(results / "shift"),
    )


def write_card(results: Path = RESULTS, weights: Path = WEIGHTS) -> Path:
    """Write the card beside the weights, and return its path."""
    path = weights / "README.md"
    write_atomically(path, card(results, weights).encode())
    return path


def _column(run: Path) -> dict[str, str]:
    """Return what the card's table says about the weights of a run, {label of the row: cell}."""
    config, metrics = config_of(run), metrics_of(run)
    machine = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    minutes = pd.read_csv(run / "timing.csv").seconds.sum() / 60
    halved = metrics["half_precision"]
    recipe, epochs = metrics["recipe"], metrics["epochs"]
    trained = halved["training_normalisation"]
    changed = f"{trained['gained']} images gained, {trained['lost']} lost"
    parameters = count_parameters(config["blocks"], config["channels"])
    scores = {
        seed: metrics_of(folder)["half_precision"]["tta_none"]["accuracy"]
        for seed, folder in seeds_of(run).items()
    }
    seeds = [f"{_percent(score)} (seed {seed})" for seed, score in scores.items()]
    return {
        "size": f"{halved['bytes'] / 1e6:.1f} MB, {parameters:,} parameters",
        "trained on": f"{metrics['train_images']:,} training images of {metrics['data']}, "
        "nothing else",
        "recipe": f"`{recipe}`, {epochs} epochs, seed {metrics['seed']}, {config['precision']}",
        "command": f"`python -m cifar_lib train --recipe {recipe} --run runs/{recipe}`",
        "machine": f"{machine['gpu'] or machine['cpu']}, "
        f"torch {machine['torch'].partition('+')[0]}",
        "time of the epochs": f"{minutes:.1f} minutes",
        "input": "RGB, 32x32, values in [0, 1]",
        "`mean` for prediction": _triple(metrics["mean"]),
        "`std` for prediction": _triple(metrics["std"]),
        "`mean` in training": _triple(config["mean"]),
        "`std` in training": _triple(config["std"]),
        "**test accuracy**": f"**{_percent(halved['tta_none']['accuracy'])}** "
        f"({_interval(halved['tta_none'])})",
        "with flip TTA": f"{_percent(halved['tta_flip']['accuracy'])} "
        f"({_interval(halved['tta_flip'])})",
        "normalised as in training instead": "the same"
        if config["mean"] == metrics["mean"] and config["std"] == metrics["std"]
        else f"{_percent(trained['accuracy'])} ({changed}; "
        f"McNemar's p = {trained['mcnemar_p']:.3f})",
        "at the end of the training, in its precision": _percent(metrics["test"]["accuracy"]),
        "predictions changed by storing in half precision": str(
            halved["predictions_changed_by_half_precision"]
        ),
        "all seeds that were run": ", ".join(seeds),
        "their mean": _mean(list(scores.values())),
        "calibration error": _percent(halved["tta_none"]["calibration_error"]),
        "calibration error after scaling": _percent(halved["calibration_error_after_temperature"]),
        "temperature": str(halved["temperature"]),
    }


def _use_of_test_images(run: Path) -> str:
    """Return a sentence that says when a run's training evaluated the test images."""
    name = config_of(run)["recipe"]
    if not config_of(run)["watch_test"]:
        return f"The training of `{name}` evaluated them once, at the end."
    history = pd.read_csv(run / "history.csv").test_accuracy
    highest = f"highest after epoch {history.idxmax() + 1}: {_percent(history.max())}"
    return f"The training of `{name}` evaluated them after every epoch ({highest})."


def _noise(shift: Path) -> dict | None:
    """Return what the card says about noisy images; None if no shifts were measured."""
    if not (shift / "verdict.json").exists():
        return None
    rows = pd.read_csv(shift / "accuracy.csv").set_index(["family", "severity", "adapt", "tta"])
    row = rows.loc["noise", 1, "none", "none"]
    sigma = FAMILIES["noise"][1][0]  # at severity 1, of values in [0, 1]
    verdict = json.loads((shift / "verdict.json").read_text(encoding="utf-8"))
    return {
        "recipe": verdict["weights"]["recipe"],
        "percent": f"{100 * sigma:.0f}",
        "accuracy": f"{100 * row.accuracy:.0f}",
        "n": f"{row.n:,.0f}",
    }


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"


def _interval(score: dict) -> str:
    low, high = score["interval"]
    return f"{100 * low:.2f} to {100 * high:.2f}"


def _mean(scores: list[float]) -> str:
    """Return the mean, and with three seeds or more the sample standard deviation."""
    if len(scores) < 3:
        return f"{_percent(statistics.mean(scores))}, n = {len(scores)}"
    deviation = f"{100 * statistics.stdev(scores):.2f}"
    return f"{100 * statistics.mean(scores):.2f} ± {deviation} %, n = {len(scores)}"


def _triple(values: list[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    print(write_card().relative_to(ROOT))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
