"""The numbers in the texts are those of the records.

Each row of `CLAIMS` has a document, a sentence of it with {} where numbers stand, and a function
that computes these numbers from the records. A changed record or a changed text fails with one
line. A line break in a document counts as a space.
"""

import json
import re
import sqlite3
import statistics
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest

from cifar_lib import shift
from cifar_lib.data import CLASSES
from cifar_lib.evaluate import wilson_interval
from cifar_lib.model import count_parameters
from scripts import class_balance

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
CAT, DOG = CLASSES.index("cat"), CLASSES.index("dog")
BOTH = shift.BALANCED  # normalize+batchnorm


# A whole number: neither its beginning nor its end is cut off.
NUMBER = r"(?<![\d.,])(-?\d(?:[\d.,]*\d)?(?:e[+-]?\d+)?)(?![\d.,]*\d)"


class Claim(NamedTuple):
    document: str
    sentence: str
    expected: Callable[[], list]


# What the records say.


def read_json(name: str) -> dict:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def metrics(run: str) -> dict:
    return read_json(f"{run}/metrics.json")


def shipped(run: str) -> dict:
    """The scores of the run's weights as the package has them: convolutions in half precision."""
    return metrics(run)["half_precision"]


@cache
def history(run: str) -> pd.DataFrame:
    return pd.read_csv(RESULTS / run / "history.csv")


@cache
def timing(run: str) -> pd.DataFrame:
    return pd.read_csv(RESULTS / run / "timing.csv")


def minutes(run: str) -> str:
    return f"{timing(run).seconds.sum() / 60:.1f}"


def rate(run: str) -> str:
    """Images per second of the run's median epoch."""
    return rounded(timing(run).images_per_second.median())


def rounded(value: float, step: int = 100) -> str:
    """To the nearest `step`, with commas between thousands."""
    return f"{round(value / step) * step:,}"


def percent(fraction: float, digits: int = 2) -> str:
    return f"{100 * fraction:.{digits}f}"


def with_interval(score: dict) -> list[str]:
    """Accuracy, and its interval's ends, in %."""
    return [percent(score["accuracy"]), *map(percent, score["interval"])]


def spread(recipe: str, seeds: list[int]) -> list[str]:
    """Mean and standard deviation of the test accuracy over the seeds, and each one's."""
    scores = [metrics(f"{recipe}-seed{seed}")["test"]["accuracy"] for seed in seeds]
    values = [statistics.mean(scores), statistics.stdev(scores), *scores]
    return [percent(value) for value in values]


def plain_training() -> dict:
    """How the package's weights do on the training images as they are."""
    return read_json("report-seed42/answers.json")["training_images"]


def published(column: str, epoch: int) -> str:
    return f"{history('reference')[column].iloc[epoch]:.2f}"


def ours(column: str, epoch: int) -> str:
    return percent(history("report-seed42")[column].iloc[epoch])


def best_epoch(run: str) -> int:
    return int(history(run).test_accuracy.idxmax())


@cache
def shifts() -> pd.DataFrame:
    return pd.read_csv(RESULTS / "shift" / "accuracy.csv")


def shifted(family: str, adapt: str = "none", tta: str = "none", severity: int = 0) -> pd.Series:
    rows = shifts()
    found = rows[
        (rows.family == family)
        & (rows.severity == severity)
        & (rows.adapt == adapt)
        & (rows.tta == tta)
    ]
    assert len(found) == 1, (family, adapt, tta, severity)
    return found.iloc[0]


def verdict(part: str, way: str) -> dict:
    found = read_json("shift/verdict.json")[part]
    return found.get("ways", found)[way]


def gain(part: str, way: str) -> list[str]:
    """Points gained over no adaptation, and the interval's ends."""
    found = verdict(part, way)
    return [f"{found['gain']:.1f}", *(f"{end:.1f}" for end in found["interval"])]


def custom(adapt: str, tta: str = "none") -> pd.Series:
    return shifted("custom", adapt, tta)


def custom_with_interval(adapt: str, tta: str = "none") -> list[str]:
    row = custom(adapt, tta)
    return [percent(row.accuracy), percent(row.low), percent(row.high)]


def benchmark(name: str) -> dict:
    return read_json(f"benchmarks/{name}.json")


def loop(name: str, which: str) -> dict:
    """One loop's row of a benchmark."""
    return next(row for row in benchmark(name)["rows"] if row["loop"] == which)


def augmentation_ratios() -> list[float]:
    """Of all rounds on both kinds of processor."""
    return [
        ours / theirs
        for kind in ("avx2", "avx512")
        for rates in [benchmark(f"augment-amd-epyc-2-cores-{kind}")["rates"]]
        for theirs, ours in zip(rates["published"], rates["ours"], strict=True)
    ]


def ratio_range(name: str, which: str) -> list[str]:
    """Percent that one loop is slower or faster than the plain one, round by round."""
    rates = benchmark(name)["rates"]
    changes = [100 * (a / b - 1) for a, b in zip(rates[which], rates["plain"], strict=True)]
    return [f"{-min(changes):.0f}", f"{max(changes):.0f}"]


def matrix(run: str) -> np.ndarray:
    """The confusion matrix, counts (10, 10), true class by predicted class."""
    if run == "reference":
        return pd.read_csv(RESULTS / run / "confusion_matrix.csv", index_col=0).to_numpy()
    return np.array(metrics(run)["test"]["confusion_matrix"])


def mistakes(run: str) -> int:
    counts = matrix(run)
    return int(counts.sum() - counts.trace())


def unconfirmed_labels() -> list[int]:
    """How many test labels fewer than three of five people chose alone; of these, how many had a
    majority for the other class, for the label or both, for neither, and for none of these."""
    votes = pd.read_csv(RESULTS / "label-errors" / "cifar10.csv")
    few = votes[votes.votes_label < 3]
    sums = (few.votes_guess, few.votes_label + few.votes_both, few.votes_neither)
    majorities = [int((votes >= 3).sum()) for votes in sums]
    return [len(few), *majorities, len(few) - sum(majorities)]


def striped_cats() -> list:
    """Of the cats whose coat can be judged: striped ones, all, percent; those classified correctly
    first, then those misclassified as dogs."""
    cats = pd.read_csv(RESULTS / "cats-by-eye" / "stripes.csv")
    numbers = []
    for _, group in cats[cats.striped != "unclear"].groupby("group"):
        striped = (group.striped == "yes").sum()
        numbers += [striped, len(group), percent(striped / len(group), 0)]
    return numbers


def trials() -> list:
    """How many trials of the stored search ended, the first one's accuracy, the best one's, and how
    many times smaller the best one's learning rate was."""
    path = (RESULTS / "tuning" / "study.db").resolve()
    with sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True) as base:
        states = dict(base.execute("select state, count(*) from trials group by state"))
        values = base.execute(
            "select number, value from trials join trial_values using (trial_id) "
            "where state = 'COMPLETE'"
        ).fetchall()
        rates = dict(
            base.execute(
                "select number, param_value from trials join trial_params using (trial_id) "
                "where param_name = 'learning_rate'"
            )
        )
    base.close()
    best, highest = max(values, key=lambda row: row[1])
    ended = [states["COMPLETE"] + states["PRUNED"], states["COMPLETE"], states["PRUNED"]]
    return [
        *ended,
        percent(dict(values)[0], 1),
        percent(highest, 1),
        f"{rates[0] / rates[best]:.0f}",
    ]


@cache
def balance_files() -> pd.DataFrame:
    return class_balance.files()


def balance_row(part: str, name: str, share: float) -> list[str]:
    """Accuracy and interval of none, the old default and the new one, and the images."""
    rows = balance_files()
    rows = rows[
        (rows.part == part) & (rows["shift"] == name) & (rows.share == share) & (rows.n == 300)
    ]
    n = int(rows.n.sum())
    cells = []
    for column in ("none", BOTH, "default"):
        correct = int(rows[column].sum())
        low, high = wilson_interval(correct, n)
        cells += [percent(value, 1) for value in (correct / n, low, high)]
    return [*cells, n]


def never_worse() -> list[int]:
    """On how many files of 300 the default is at least as good as none, and how many there are."""
    rows = balance_files()
    rows = rows[rows.n == 300]
    return [int((rows.default >= rows.none).sum()), len(rows)]


def one_file(mix: str, n: int, share: float, name: str) -> pd.Series:
    rows = balance_files()
    found = rows[
        (rows.mix == mix) & (rows.n == n) & (rows.share == share) & (rows["shift"] == name)
    ]
    assert len(found) == 1, (mix, n, share, name)
    return found.iloc[0]


def shares(mix: str, n: int, share: float, name: str, *columns: str) -> list[str]:
    row = one_file(mix, n, share, name)
    return [percent(row[column] / n, 1) for column in columns]


# The tables.

SHIFT_ROWS = {"unshifted": "clean", "synthetic copy of the custom set, n = 10,000": "custom"} | {
    f"{name}, mean of five": family
    for name, family in {
        "channel statistics": "statistics",
        "darkness": "brightness",
        "contrast": "contrast",
        "saturation": "saturation",
        "noise": "noise",
        "blur": "blur",
        "JPEG": "jpeg",
        "pixelation": "pixelate",
    }.items()
}
BALANCE_ROWS = {
    "not shifted": "none 0",
    "noise 3": "noise 3",
    "pixelation 3": "pixelate 3",
    "channel statistics 3": "statistics 3",
    "JPEG 5": "jpeg 5",
    "contrast 4": "contrast 4",
}


def shift_row(family: str) -> list[str]:
    rows = shifts()[shifts().family == family]
    ways = [*((name, "none") for name in shift.ADAPTATIONS), (BOTH, "flip")]
    means = rows.groupby(["adapt", "tta"]).accuracy.mean()
    return [percent(means[way], 1) for way in ways]


def shift_claim(name: str, family: str) -> Claim:
    return Claim("docs/shift.md", f"| {name} |" + " {} |" * 5, lambda: shift_row(family))


def balance_claim(part: str, name: str, share: int) -> Claim:
    sentence = f"| {part}: {name}, {share} % |" + " {} ({} to {}) |" * 3 + " {} |"
    return Claim(
        "docs/shift.md", sentence, lambda: balance_row(part, BALANCE_ROWS[name], share / 100)
    )


SHIFT_TABLE = [shift_claim(*row) for row in SHIFT_ROWS.items()]
BALANCE_TABLE = [
    balance_claim(part, name, share)
    for part, names in {
        "choose": ("not shifted", "noise 3", "pixelation 3", "channel statistics 3"),
        "confirm": ("not shifted", "JPEG 5", "contrast 4"),
    }.items()
    for name in names
    for share in (10, 30, 50, 100)
]

README, CARD, LOG = "README.md", "cifar_lib/weights/README.md", "results/LOG.md"
PERFORMANCE, SHIFT = "docs/performance.md", "docs/shift.md"
SMALL = [f"small-seed{seed}" for seed in (42, 0, 1)]
SETUP = "docs/setup.md"
TRAINING_BOOK = "notebooks/03_training.ipynb"
MISTAKES_BOOK = "notebooks/04_error_analysis.ipynb"
SUBMISSION_BOOK = "notebooks/05_kaggle_submission.ipynb"
H200 = "train_step-nvidia-h200"
AVX2, AVX512 = "train_step-amd-epyc-2-cores-avx2", "train_step-amd-epyc-2-cores-avx512"

CLAIMS = [
    # README.md
    Claim(
        README,
        "headline, {} % after 60 epochs, is **reproduced: {} ± {} %** (seeds 42, 0, 1: {}, {}, {})",
        lambda: [published("test_accuracy", -1), *spread("report", [42, 0, 1])],
    ),
    Claim(
        README,
        "A plainer recipe reaches {} and {} % (seeds 42, 0)",
        lambda: [percent(shipped(f"best-seed{s}")["tta_none"]["accuracy"]) for s in (42, 0)],
    ),
    Claim(
        README,
        "| **{} %** (95 % interval {} to {}, n = 10,000, seed 42) |",
        lambda: with_interval(shipped("report-seed42")["tta_none"]),
    ),
    Claim(
        README,
        "trained in {} minutes on an H200, fp32",
        lambda: [f"{timing('report-seed42').seconds.sum() / 60:.0f}"],
    ),
    Claim(
        README,
        "mirror image averaged in | – | {} % ({} to {}) |",
        lambda: with_interval(shipped("report-seed42")["tta_flip"]),
    ),
    Claim(
        README,
        "dogs for cats | {}, {} of 1,000 | {}, {} |",
        lambda: [
            matrix(run)[pair]
            for run in ("reference", "report-seed42")
            for pair in ((CAT, DOG), (DOG, CAT))
        ],
    ),
    Claim(
        README,
        "recipe `best`, 60 epochs | – | {} % ({} to {}, n = 10,000, seed 42), {} % (seed 0)",
        lambda: [
            *with_interval(shipped("best-seed42")["tta_none"]),
            percent(shipped("best-seed0")["tta_none"]["accuracy"]),
        ],
    ),
    Claim(
        README,
        "| a network of {} parameters, {} epochs: what notebook 3 trains on a CPU | – | "
        "{}, {}, {} % (n = 10,000, seeds 42, 0, 1) in {} to {} seconds |",
        lambda: [
            f"{count_parameters((1, 1, 1), (16, 32, 64)):,}",
            metrics("small-seed42")["epochs"],
            *[percent(metrics(run)["test"]["accuracy"]) for run in SMALL],
            f"{min(timing(run).seconds.sum() for run in SMALL):.0f}",
            f"{max(timing(run).seconds.sum() for run in SMALL):.0f}",
        ],
    ),
    Claim(
        README,
        "Training is {} times as fast as the published loop on an H200, {} to {} times on two "
        "processor cores; there augmentation is {} to {} times as fast, {} to {} times in single",
        lambda: [
            f"{benchmark(H200)['ratio']:.1f}",
            f"{benchmark(AVX512)['ratio']:.1f}",
            f"{benchmark(AVX2)['ratio']:.1f}",
            f"{benchmark('augment-amd-epyc-2-cores-avx512')['ratio']:.0f}",
            f"{benchmark('augment-amd-epyc-2-cores-avx2')['ratio']:.0f}",
            f"{min(augmentation_ratios()):.0f}",
            f"{max(augmentation_ratios()):.0f}",
        ],
    ),
    Claim(
        README,
        "{} % instead of {} %: {} images lost, {} gained (McNemar's p = {})",
        lambda: [
            percent(shipped("report-seed42")["tta_none"]["accuracy"]),
            percent(shipped("report-seed42")["training_normalisation"]["accuracy"]),
            shipped("report-seed42")["training_normalisation"]["gained"],
            shipped("report-seed42")["training_normalisation"]["lost"],
            f"{shipped('report-seed42')['training_normalisation']['mcnemar_p']:.3f}",
        ],
    ),
    Claim(
        README,
        "published: {} % (epoch {}) instead of the {} % reported (the last); "
        "ours: {} % (epoch {}) instead of {} %",
        lambda: [
            published("test_accuracy", best_epoch("reference")),
            best_epoch("reference"),
            published("test_accuracy", -1),
            ours("test_accuracy", best_epoch("report-seed42")),
            best_epoch("report-seed42"),
            ours("test_accuracy", -1),
        ],
    ),
    Claim(
        README,
        "one of 60 epochs; {} % accuracy after it, ours {} %",
        lambda: [published("test_accuracy", 0), ours("test_accuracy", 0)],
    ),
    # Setting up
    Claim(
        SETUP,
        "{} to {} seconds (measured) | {} hours (estimated from {} images/s on an AMD EPYC) |",
        lambda: [
            f"{min(timing(run).seconds.sum() for run in SMALL):.0f}",
            f"{max(timing(run).seconds.sum() for run in SMALL):.0f}",
            f"{60 * 50_000 / loop(AVX512, 'plain')['images_per_second'] / 3600:.0f}",
            f"{loop(AVX512, 'plain')['images_per_second']:.0f}",
        ],
    ),
    Claim(
        SETUP,
        "(measured once) | {} hours (estimated from {} images/s on an AMD EPYC, with Winograd's",
        lambda: [
            f"{60 * 50_000 / loop(AVX2, 'winograd')['images_per_second'] / 3600:.0f}",
            f"{loop(AVX2, 'winograd')['images_per_second']:.0f}",
        ],
    ),
    # The weights' card
    Claim(
        CARD,
        "{} minutes, sharing the GPU with another run",
        lambda: [minutes("report-seed42")],
    ),
    Claim(
        CARD,
        "**{} %** (95 % interval {} to {}, n = 10,000); published: {} %",
        lambda: [
            *with_interval(shipped("report-seed42")["tta_none"]),
            published("test_accuracy", -1),
        ],
    ),
    Claim(
        CARD,
        "with the mirror image averaged in | {} % ({} to {}) |",
        lambda: with_interval(shipped("report-seed42")["tta_flip"]),
    ),
    Claim(
        CARD,
        "half precision | changes {} of the 10,000 predictions",
        lambda: [shipped("report-seed42")["predictions_changed_by_half_precision"]],
    ),
    Claim(
        CARD,
        "calibration error | {} %; {} % after temperature scaling",
        lambda: [
            percent(shipped("report-seed42")["tta_none"]["calibration_error"]),
            percent(shipped("report-seed42")["calibration_error_after_temperature"]),
        ],
    ),
    Claim(CARD, "temperature | {}, fitted", lambda: [shipped("report-seed42")["temperature"]]),
    Claim(
        CARD,
        "`report.safetensors` ({} MB,",
        lambda: [f"{shipped('report-seed42')['bytes'] / 1e6:.1f}"],
    ),
    Claim(
        CARD,
        "(in the {}th, {} %)",
        lambda: [
            best_epoch("report-seed42") + 1,
            ours("test_accuracy", best_epoch("report-seed42")),
        ],
    ),
    Claim(
        CARD,
        "Seeds 0 and 1 of this recipe ended at {} and {} %",
        lambda: spread("report", [0, 1])[2:],
    ),
    Claim(
        CARD,
        "**{} %** ({} to {}, evaluated in fp32; {} % in bf16), {} % with the mirror image",
        lambda: [
            *with_interval(shipped("best-seed42")["tta_none"]),
            percent(metrics("best-seed42")["test"]["accuracy"]),
            percent(shipped("best-seed42")["tta_flip"]["accuracy"]),
        ],
    ),
    Claim(
        CARD,
        "Seed 0 of the same values ended at {} %",
        lambda: [percent(metrics("best-seed0")["test"]["accuracy"])],
    ),
    Claim(
        CARD,
        "the first gets {} % right (n = 2,000;",
        lambda: [f"{100 * shifted('noise', severity=1).accuracy:.0f}"],
    ),
    # docs/performance.md
    Claim(
        PERFORMANCE,
        "as PyTorch has them) | {} | 1 | {} GB |",
        lambda: [
            rounded(loop(H200, "published")["images_per_second"], 10),
            f"{loop(H200, 'published')['peak_memory_gb']:.1f}",
        ],
    ),
    *(
        Claim(
            PERFORMANCE,
            f"| ours, bf16, {text} |" + " {} | {} | {} GB |",
            lambda which=which: [
                rounded(loop(H200, which)["images_per_second"]),
                f"{loop(H200, which)['ratio']:.2f}",
                f"{loop(H200, which)['peak_memory_gb']:.1f}",
            ],
        )
        for text, which in {"as written": "plain", "`torch.compile`": "compiled"}.items()
    ),
    Claim(
        PERFORMANCE,
        "the fastest epoch of `results/report-seed42` made {} images/s. At that rate 60 epochs "
        "take {} minutes. In bf16 `results/best-seed0`, alone on the GPU, took {} minutes",
        lambda: [
            rounded(timing("report-seed42").images_per_second.max()),
            f"{60 * 50_000 / timing('report-seed42').images_per_second.max() / 60:.1f}",
            minutes("best-seed0"),
        ],
    ),
    Claim(
        PERFORMANCE,
        "shared the GPU and took {} and {} minutes",
        lambda: [minutes("report-seed42"), minutes("best-seed42")],
    ),
    Claim(
        PERFORMANCE,
        "training uses {} % of the GPU",
        lambda: [f"{100 * loop(H200, 'compiled')['share_of_matrix_rate']:.0f}"],
    ),
    *(
        Claim(
            PERFORMANCE,
            f"| {text} |" + " {} images/s | {} images/s | {} |",
            lambda name=name: [
                rounded(loop(name, "published")["images_per_second"], 10),
                rounded(loop(name, "ours")["images_per_second"]),
                f"{benchmark(name)['ratio']:.1f}",
            ],
        )
        for text, name in {
            "augmentation and normalisation, one thread, AVX2": "augment-amd-epyc-2-cores-avx2",
            "the same, AVX-512, since every operation is exact to the pixel": (
                "augment-amd-epyc-2-cores-avx512"
            ),
        }.items()
    ),
    *(
        Claim(
            PERFORMANCE,
            f"{text} |" + " {} images/s | {} images/s | {} |",
            lambda name=name: [
                f"{loop(name, 'published')['images_per_second']:.1f}",
                f"{loop(name, benchmark(name)['ours'])['images_per_second']:.1f}",
                f"{benchmark(name)['ratio']:.2f}",
            ],
        )
        for text, name in {
            "AVX2, fp32 with `extras/winograd`": AVX2,
            "AVX-512, the published loop in fp32, ours in bf16": AVX512,
        }.items()
    ),
    Claim(
        PERFORMANCE,
        "{}: {} times the published loop, {} % of the rate of a large matrix product",
        lambda: [
            f"{loop(AVX2, 'plain')['images_per_second']:.1f}",
            f"{loop(AVX2, 'plain')['ratio']:.2f}",
            f"{100 * loop(AVX2, 'plain')['share_of_matrix_rate']:.0f}",
        ],
    ),
    Claim(
        PERFORMANCE,
        "| {}; round by round from {} % less to {} % more |",
        lambda: [
            f"{loop(AVX2, 'compiled')['images_per_second']:.1f}",
            *ratio_range(AVX2, "compiled"),
        ],
    ),
    Claim(
        PERFORMANCE,
        "AVX-512, bf16 through `torch.compile` | {} |",
        lambda: [f"{loop(AVX512, 'compiled')['images_per_second']:.1f}"],
    ),
    Claim(
        PERFORMANCE,
        "held {} GB at its peak. Time grows with the images to the power {}, the epochs {}, "
        "the width {}.",
        lambda: [
            f"{loop(AVX2, 'published')['peak_memory_gb']:.1f}",
            *(
                f"{row['exponent']:.2f}"
                for row in benchmark("scaling-amd-epyc-2-cores-avx2")["rows"]
            ),
        ],
    ),
    Claim(
        PERFORMANCE,
        "20-epoch run made {} to {} images/s so",
        lambda: [
            f"{speed:.0f}"
            for rates in [timing("best-seed42-20-epochs").images_per_second[12:]]
            for speed in (rates.min(), rates.max())
        ],
    ),
    # docs/shift.md
    *SHIFT_TABLE,
    *BALANCE_TABLE,
    Claim(
        SHIFT,
        "it gains {} points (95 % interval {} to {}), `normalize` {} ({} to {})",
        lambda: [
            *gain("confirmed_on", f"{BOTH} + flip"),
            *gain("confirmed_on", "normalize + none"),
        ],
    ),
    Claim(
        SHIFT,
        "without `normalize` it gains the same {} points there",
        lambda: gain("confirmed_on", "batchnorm + flip")[:1],
    ),
    Claim(
        SHIFT,
        "The default gets {} % ({} to {}), `none` {} % ({} to {})",
        lambda: [*custom_with_interval(BOTH, "flip"), *custom_with_interval("none")],
    ),
    Claim(
        SHIFT,
        "{} are gained and {} lost (McNemar's p = {})",
        lambda: [
            custom(BOTH, "flip").gained,
            custom(BOTH, "flip").lost,
            f"{custom(BOTH, 'flip').mcnemar_p:.1e}",
        ],
    ),
    Claim(
        SHIFT,
        "alone gains {} points. Both adaptations without it gain {}: {} images against {} (p = {})",
        lambda: [
            f"{verdict('custom', 'none + flip')['gain']:.2f}",
            f"{verdict('custom', f'{BOTH} + none')['gain']:.2f}",
            custom(BOTH).gained,
            custom(BOTH).lost,
            f"{custom(BOTH).mcnemar_p:.2f}",
        ],
    ),
    Claim(
        SHIFT,
        "at five times the custom set's distance it wins {} points",
        lambda: [
            f"{100 * (normalized.accuracy - plain.accuracy):.1f}"
            for normalized in [shifted("statistics", "normalize", severity=5)]
            for plain in [shifted("statistics", severity=5)]
        ],
    ),
    Claim(
        SHIFT,
        "{} % on the originals, {} % on the copy, and {} % with the copy's own statistics "
        "({} images gained, {} lost, p = {})",
        lambda: [
            percent(shipped("report-seed42")["tta_none"]["accuracy"]),
            percent(custom("none").accuracy),
            percent(custom("normalize").accuracy),
            custom("normalize").gained,
            custom("normalize").lost,
            f"{custom('normalize').mcnemar_p:.2f}",
        ],
    ),
    Claim(
        SHIFT,
        "On {} of the {} measured files of 300 the new default is right at least as often",
        never_worse,
    ),
    Claim(
        SHIFT,
        "that adapting wins ({} instead of {} %; `none`: {} %",
        lambda: shares("cat", 300, 0.5, "pixelate 3", "default", BOTH, "none"),
    ),
    Claim(
        SHIFT,
        "the adapted predictions are taken, {} right instead of {}",
        lambda: [
            one_file("cat", 50, 1.0, "pixelate 3")["default"],
            one_file("cat", 50, 1.0, "pixelate 3")["none"],
        ],
    ),
    Claim(
        SHIFT,
        "A file of 50 cats gets {} % instead of {} %",
        lambda: shares("cat", 50, 1.0, "none 0", "default", BOTH),
    ),
    Claim(
        SHIFT,
        "it gets {} % for half cats at severity 3, `none` {} %",
        lambda: shares("cat", 300, 0.5, "statistics 3", "normalize", "none"),
    ),
    Claim(
        SHIFT,
        "{} for 50, {} for 300, {} for 10,000",
        lambda: [f"{shift.allowed_imbalance(n):.2f}" for n in (50, 300, 10_000)],
    ),
    # docs/searches.md
    Claim(
        "docs/searches.md",
        "holds {} trials that ended ({} whole, {} pruned)",
        lambda: trials()[:3],
    ),
    Claim(
        "docs/searches.md",
        "Table 1's own values reached {} % there, the best trial {} %",
        lambda: trials()[3:5],
    ),
    Claim(LOG, "28 trials ({} finished, {} pruned)", lambda: trials()[1:3]),
    # results/LOG.md
    Claim(
        LOG,
        "test {} % after the last epoch; training accuracy {} % | the same, {} hours",
        lambda: [
            percent(metrics("best-seed42-20-epochs")["test"]["accuracy"]),
            percent(history("best-seed42-20-epochs").train_accuracy.iloc[-1]),
            f"{timing('best-seed42-20-epochs').seconds.sum() / 3600:.1f}",
        ],
    ),
    Claim(
        LOG,
        "**test {} %** after the last epoch ({} to {}), training accuracy {} % (published: {} and "
        "{}); highest test accuracy {} % in epoch {} | one NVIDIA H200, shared with the next: "
        "{} minutes, {} images/s",
        lambda: [
            *with_interval(metrics("report-seed42")["test"]),
            ours("train_accuracy", -1),
            published("test_accuracy", -1),
            published("train_accuracy", -1),
            ours("test_accuracy", best_epoch("report-seed42")),
            best_epoch("report-seed42"),
            minutes("report-seed42"),
            rate("report-seed42"),
        ],
    ),
    Claim(
        LOG,
        "**test {} %** in bf16, {} % in fp32 ({} to {}); training accuracy {} % | the same GPU at "
        "the same time: {} minutes, {} images/s",
        lambda: [
            percent(metrics("best-seed42")["test"]["accuracy"]),
            *with_interval(shipped("best-seed42")["tta_none"]),
            percent(history("best-seed42").train_accuracy.iloc[-1]),
            minutes("best-seed42"),
            rate("best-seed42"),
        ],
    ),
    Claim(
        LOG,
        "**test {} and {} %**, training accuracy {} and {} %; over the three seeds {} ± {} % | "
        "another NVIDIA H200, both at once: {} minutes, {} images/s each",
        lambda: [
            *spread("report", [0, 1])[2:],
            percent(history("report-seed0").train_accuracy.iloc[-1]),
            percent(history("report-seed1").train_accuracy.iloc[-1]),
            *spread("report", [42, 0, 1])[:2],
            minutes("report-seed0"),
            rate("report-seed0"),
        ],
    ),
    Claim(
        LOG,
        "**test {} %**, in fp32 too; training accuracy {} % | the same GPU, alone: {} minutes",
        lambda: [
            percent(metrics("best-seed0")["test"]["accuracy"]),
            percent(history("best-seed0").train_accuracy.iloc[-1]),
            minutes("best-seed0"),
        ],
    ),
    Claim(
        LOG,
        "custom set (n = 10,000): none {} %, both with the mirror image {} % | the same GPU",
        lambda: [percent(custom("none").accuracy), percent(custom(BOTH, "flip").accuracy)],
    ),
    Claim(
        LOG,
        "{} images/s, the published loop {} | the same GPU",
        lambda: [
            rounded(loop(H200, "compiled")["images_per_second"]),
            rounded(loop(H200, "published")["images_per_second"], 10),
        ],
    ),
    # The notebooks
    Claim(
        TRAINING_BOOK,
        "they end at {} (ours) and {} %",
        lambda: [ours("train_accuracy", -1), published("train_accuracy", -1)],
    ),
    Claim(
        TRAINING_BOOK,
        "In our run the peak is {} % in epoch {}, and the last epoch has {} %",
        lambda: [
            ours("test_accuracy", best_epoch("report-seed42")),
            best_epoch("report-seed42"),
            ours("test_accuracy", -1),
        ],
    ),
    Claim(
        TRAINING_BOOK,
        "Seeds 0 and 1 of the same recipe ended at {} and {} %",
        lambda: spread("report", [0, 1])[2:],
    ),
    Claim(
        TRAINING_BOOK,
        "with seed 42 that is {} ± {} %",
        lambda: spread("report", [42, 0, 1])[:2],
    ),
    Claim(
        TRAINING_BOOK,
        "50,000 plain training images {} are classified correctly, **{} %**",
        lambda: [f"{plain_training()['correct']:,}", percent(plain_training()["correct"] / 50_000)],
    ),
    Claim(
        TRAINING_BOOK,
        "lowers the training loss, from {} to {}",
        lambda: [f"{history('small-seed42').train_loss.iloc[i]:.3f}" for i in (0, -1)],
    ),
    Claim(
        MISTAKES_BOOK,
        "Of this network's {} mistakes only 57 cross over, of the published run's {} only",
        lambda: [mistakes("report-seed42"), mistakes("reference")],
    ),
    Claim(
        MISTAKES_BOOK,
        "in both directions: {} cats and {} dogs of a thousand here, {} and {} in the published",
        lambda: [
            matrix(run)[pair]
            for run in ("report-seed42", "reference")
            for pair in ((CAT, DOG), (DOG, CAT))
        ],
    ),
    Claim(
        MISTAKES_BOOK,
        "gives {} and {} (seed 0) and {} and {} (seed 1); the recipe `best` gives {} and {}, "
        "{} and {}",
        lambda: [
            matrix(run)[pair]
            for run in ("report-seed0", "report-seed1", "best-seed42", "best-seed0")
            for pair in ((CAT, DOG), (DOG, CAT))
        ],
    ),
    Claim(
        MISTAKES_BOOK,
        "{} labels were **not confirmed by a majority**: fewer than three people chose the label "
        "alone. That doesn't make 54 labels wrong. Only for {} of them did a majority choose the "
        "other class. For {} a majority saw the labelled class, if those who chose both are "
        "counted; for {} a majority saw neither; for {} there was no majority at all.",
        unconfirmed_labels,
    ),
    Claim(
        MISTAKES_BOOK,
        "{} of {} correctly classified cats are striped ({} %), and {} of {} cats misclassified "
        "as dogs ({} %).",
        striped_cats,
    ),
    Claim(
        SUBMISSION_BOOK,
        "they gain {} points ({} to {}), and on unshifted images they cost nothing",
        lambda: gain("confirmed_on", f"{BOTH} + flip"),
    ),
]


def text_of(document: str) -> str:
    """The document, with one space for all white space. Of a notebook, its markdown."""
    text = (ROOT / document).read_text(encoding="utf-8")
    if document.endswith(".ipynb"):
        cells = json.loads(text)["cells"]
        text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
        text = text.replace("\n> ", "\n")
    return " ".join(text.split())


def difference(claim: Claim) -> str:
    """One line that says how the document differs from the records, or nothing."""
    literal = (re.escape(part) for part in claim.sentence.split("{}"))
    found = re.findall(NUMBER.join(literal), text_of(claim.document))
    found = [list(row) if isinstance(row, tuple) else [row] for row in found]
    expected = [str(value) for value in claim.expected()]
    if len(found) == 1 and found[0] == expected:
        return ""
    return f"{claim.document}: {claim.sentence!r}: expected {expected}, found {found}"


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: f"{claim.document}: {claim.sentence}")
def test_a_text_says_what_the_records_say(claim):
    wrong = difference(claim)
    assert not wrong, wrong


def headings(text: str) -> set[str]:
    """The anchors that the code host gives the headings of a Markdown text."""
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize(
    "document",
    [README, CARD, LOG, *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))],
)
def test_a_link_leads_to_a_file_and_a_heading(document):
    path = ROOT / document
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        name, _, heading = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), f"{document}: {link}: no such file"
        if heading:
            assert heading in headings(target.read_text(encoding="utf-8")), f"{document}: {link}"
