"""What the texts say is what the records say: numbers, counts, and whatever is "only" so many.

Each row of `CLAIMS` has a document, a sentence of it with {} where numbers are, in digits or as
words up to twelve, and a function that computes these numbers from the records. A changed record or
a changed text fails with one line. A line break in a document counts as a space.
"""

import html
import json
import re
import sqlite3
import statistics
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
import torchinfo
from safetensors.torch import load_file
from scipy import stats

from cifar_lib import shift
from cifar_lib.data import CLASSES
from cifar_lib.evaluate import wilson_interval
from cifar_lib.model import ResNet, count_parameters
from cifar_lib.recipes import RECIPES, TrainConfig
from scripts import archive_run, class_balance
from scripts.weights_card import seeds_of

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
CAT, DOG = CLASSES.index("cat"), CLASSES.index("dog")
BOTH = shift.BALANCED  # normalize+batchnorm


# A number of which neither the beginning nor the end is cut off, or the word for one up to twelve.
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
WORDS += ["eleven", "twelve"]
DIGITS = r"(?<![\d.,])-?\d(?:[\d.,]*\d)?(?:e[+-]?\d+)?(?![\d.,]*\d)"
NUMBER = rf"({DIGITS}|\b(?i:{'|'.join(WORDS)})\b)"


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


def accuracy(run: str) -> float:
    """On the test images, after the last epoch."""
    return metrics(run)["test"]["accuracy"]


def published_minus_seed_42() -> float:
    """In points."""
    return history("reference").test_accuracy.iloc[-1] - 100 * accuracy("report-seed42")


def deviation_of_seeds() -> float:
    """The sample standard deviation of the three runs' test accuracies."""
    return statistics.stdev(accuracy(f"report-seed{seed}") for seed in (42, 0, 1))


def share_of_pairs() -> float:
    """The share of all pairs of runs that differ as much as the published run and seed 42."""
    t = published_minus_seed_42() / 100 / (2**0.5 * deviation_of_seeds())
    return 2 * stats.t.sf(t, df=2)


def room_for_another_run() -> list[float]:
    """Where a further run ends with a probability of 95 %."""
    reach = stats.t.ppf(0.975, df=2) * deviation_of_seeds() * (4 / 3) ** 0.5
    mean = statistics.mean(accuracy(f"report-seed{seed}") for seed in (42, 0, 1))
    return [mean - reach, mean + reach]


def plain_training() -> dict:
    """How the package's weights do on the training images as they are."""
    return read_json("report-seed42/answers.json")["training_images"]


def published(column: str, epoch: int) -> str:
    return f"{history('reference')[column].iloc[epoch]:.2f}"


def ours(column: str, epoch: int) -> str:
    return percent(history("report-seed42")[column].iloc[epoch])


def best_epoch(run: str) -> int:
    """The epoch of the highest test accuracy, counted from 0 as in the records."""
    return int(history(run).test_accuracy.idxmax())


def runs(recipe: str) -> list[str]:
    """The archived runs of a recipe that differ only in their seeds, the package's seed first."""
    return [folder.name for folder in seeds_of(RESULTS / f"{recipe}-seed42").values()]


def seeds(recipe: str) -> list[int]:
    return list(seeds_of(RESULTS / f"{recipe}-seed42"))


def normalisation(run: str, digits: int = 3) -> list:
    """Accuracy by the published test normalisation and by that of training; images that the first
    loses against the second, and that it gains; McNemar's p."""
    trained = shipped(run)["training_normalisation"]
    return [
        percent(shipped(run)["tta_none"]["accuracy"]),
        percent(trained["accuracy"]),
        trained["gained"],
        trained["lost"],
        f"{trained['mcnemar_p']:.{digits}f}",
    ]


def fp32_ratio() -> float:
    """How many times the published loop's rate the fastest epoch in fp32 made on the H200."""
    fastest = timing("report-seed42").images_per_second.max()
    return fastest / loop(H200, "published")["images_per_second"]


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


def points_lost(family: str, severity: int) -> str:
    """Points of accuracy that a shift costs without adaptation."""
    lost = shifted("clean").accuracy - shifted(family, severity=severity).accuracy
    return f"{100 * lost:.1f}"


def points_by_normalizing(family: str, severity: int) -> str:
    """Points of accuracy that test-time normalisation gains."""
    plain, normalized = (shifted(family, way, severity=severity) for way in ("none", "normalize"))
    return f"{100 * (normalized.accuracy - plain.accuracy):.1f}"


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
    """Round by round."""
    rates = benchmark(AUGMENT_AVX512)["rates"]
    return [a / b for a, b in zip(rates["ours"], rates["published"], strict=True)]


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


def confidence_of_mistakes() -> torch.Tensor:
    """The uncalibrated confidence of each mistake of the seed-42 run, by its stored logits."""
    stored = load_file(RESULTS / "report-seed42" / "answers.safetensors")
    return stored["test"][stored["mistakes"].long()].float().softmax(1).amax(1)


def published_curve(column: str) -> pd.Series:
    """A column of the published history; accuracies as fractions."""
    values = history("reference")[column]
    return values / 100 if "accuracy" in column else values


def band(column: str) -> pd.DataFrame:
    """A column of the histories of the three runs of `report`, one column per run."""
    return pd.DataFrame({seed: history(f"report-seed{seed}")[column] for seed in (42, 0, 1)})


def outside_the_band() -> dict[str, int]:
    """In how many epochs the published run is above or below all three runs, by column."""
    columns = ("train_accuracy", "test_accuracy", "train_loss", "test_loss")
    return {
        name: int(
            (
                (published_curve(name) > band(name).max(axis=1))
                | (published_curve(name) < band(name).min(axis=1))
            ).sum()
        )
        for name in columns
    }


def compared_with_resnet18() -> list[list[int]]:
    """Parameters and multiply-adds of the report's network, and of ResNet-18."""
    shapes = (((3, 4, 3), (66, 132, 264)), ((2, 2, 2, 2), (64, 128, 256, 512)))
    networks = [torchinfo.summary(ResNet(*shape), (1, 3, 32, 32), verbose=0) for shape in shapes]
    return [[network.total_params, network.total_mult_adds] for network in networks]


def own_statistics_against_training() -> list[str]:
    """What notebook 5 prints of the file's own statistics against the normalisation of training."""
    path = ROOT / "notebooks" / "05_kaggle_submission.ipynb"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    printed = "".join("".join(output.get("text", "")) for output in outputs)
    line = r"own statistics against as in training: (\d+) images gained, (\d+) lost, p = (\S+)"
    gained, lost, p = re.search(line, printed).groups()
    return [gained, lost, f"{float(p):.0e}".replace("e-0", "e-")]


def stored_table(notebook: str, caption: str) -> dict[str, list[str]]:
    """The cells of a table that a notebook stores, by the names of its rows; without percent signs.

    Of the captions of its tables, one begins with `caption`.
    """
    path = ROOT / "notebooks" / f"{notebook}.ipynb"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    pages = ["".join(output.get("data", {}).get("text/html", "")) for output in outputs]
    (page,) = [page for page in pages if f"<caption>{caption}" in page]
    rows = {}
    for row in re.findall(r"<tr>(.*?)</tr>", page, re.S):
        name, *values = (html.unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t", row))
        rows[name] = [value.removesuffix("%") for value in values]
    return rows


def crossings(run: str) -> int:
    """Mistakes between animals and vehicles."""
    is_vehicle = np.array([name in ("airplane", "automobile", "ship", "truck") for name in CLASSES])
    return int(matrix(run)[is_vehicle[:, None] != is_vehicle].sum())


def votes() -> pd.DataFrame:
    return pd.read_csv(RESULTS / "label-errors" / "cifar10.csv")


def label_counts() -> list:
    """Labels that no majority chose alone, and what majorities saw instead."""
    labels, other, label_or_both, *rest = unconfirmed_labels()
    return [labels, percent(labels / 10_000), other, label_or_both, sum(rest)]


def unconfirmed_labels() -> list[int]:
    """How many test labels fewer than three of five people chose alone; of these, how many had a
    majority for the other class, for the label or both, for neither, and for none of these."""
    few = votes()[votes().votes_label < 3]
    sums = (few.votes_guess, few.votes_label + few.votes_both, few.votes_neither)
    majorities = [int((count >= 3).sum()) for count in sums]
    return [len(few), *majorities, len(few) - sum(majorities)]


def framed_pets() -> list[int]:
    """Unconfirmed labels among the mistakes between cat and dog: all, and outvoted ones."""
    framed = votes().set_index("index").loc[[1227, 5468, 4614, 8296]]
    assert (framed.votes_label < 3).all()
    return [len(framed), int((framed.votes_guess >= 3).sum())]


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


def points_forgone(row: pd.Series) -> str:
    """Points of accuracy that always adapting would add to the default on a file."""
    return f"{100 * (row[BOTH] - row.default) / row.n:.1f}"


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
LABELS = "results/label-errors/README.md"
REPORT_PAGE = "docs/report.md"
SETUP, TRAINING = "docs/setup.md", "docs/training.md"
SHIPPED_RUNS = ("report-seed42", "best-seed42")
SMALL = [f"small-seed{seed}" for seed in (42, 0, 1)]
DATA_BOOK = "notebooks/01_data_statistics.ipynb"
AUGMENTATION_BOOK = "notebooks/02_augmentation_preview.ipynb"
SMALLEST = ((1, 1, 1), (16, 32, 64))  # the blocks and channels of the recipe `small`
TRAINING_BOOK = "notebooks/03_training.ipynb"
MISTAKES_BOOK = "notebooks/04_error_analysis.ipynb"
SUBMISSION_BOOK = "notebooks/05_kaggle_submission.ipynb"
H200 = "train_step-nvidia-h200"
# Sentences whose "only" is followed by a number that isn't in the records.
COUNTED_BY_HAND = ("most confident mistakes only two are cats",)
AUGMENT_AVX512 = "augment-amd-epyc-2-cores-avx512"
AVX2, AVX512 = "train_step-amd-epyc-2-cores-avx2", "train_step-amd-epyc-2-cores-avx512"

CLAIMS = [
    # README.md
    Claim(
        README,
        "claims {} % test accuracy on CIFAR-10 after 60 epochs. This accuracy is **reproducible: "
        "we get {} ± {} %** (mean and sample standard deviation over seeds {}, {}, {}: {}, {}, {})",
        lambda: [
            published("test_accuracy", -1),
            *spread("report", seeds("report"))[:2],
            *seeds("report"),
            *spread("report", seeds("report"))[2:],
        ],
    ),
    Claim(
        README,
        "Our {} and {} % are therefore probably a little too high.",
        lambda: [percent(shipped(run)["tta_none"]["accuracy"]) for run in runs("best")],
    ),
    Claim(
        README,
        "| **{} %** (95 % interval {} to {}, n = 10,000, seed 42) |",
        lambda: with_interval(shipped("report-seed42")["tta_none"]),
    ),
    Claim(
        README,
        "trained in {} minutes on an H200 in fp32",
        lambda: [f"{timing('report-seed42').seconds.sum() / 60:.0f}"],
    ),
    Claim(
        README,
        "for an image and its mirror image) | – | {} % ({} to {}) |",
        lambda: with_interval(shipped("report-seed42")["tta_flip"]),
    ),
    Claim(
        README,
        "dogs as cats | {}, {} of 1,000 each (in the authors' notebook, not in the report) | "
        "{}, {} |",
        lambda: [
            matrix(run)[pair]
            for run in ("reference", "report-seed42")
            for pair in ((CAT, DOG), (DOG, CAT))
        ],
    ),
    Claim(
        README,
        "recipe `best`, {} epochs (the same network; settings chosen by test accuracy, "
        "see below) | – | "
        "{} % ({} to {}, n = 10,000, seed {}), {} % (seed {})",
        lambda: [
            metrics("best-seed42")["epochs"],
            *with_interval(shipped("best-seed42")["tta_none"]),
            42,
            *sum(
                (
                    [percent(shipped(f"best-seed{seed}")["tta_none"]["accuracy"]), seed]
                    for seed in seeds("best")[1:]
                ),
                [],
            ),
        ],
    ),
    Claim(
        README,
        "recipe `small`, which notebook 3 trains on a CPU ({} parameters, {} epochs) | – | "
        "{}, {}, {} % (n = 10,000, seeds {}, {}, {}) in {} to {} seconds |",
        lambda: [
            f"{count_parameters((1, 1, 1), (16, 32, 64)):,}",
            metrics("small-seed42")["epochs"],
            *[percent(metrics(run)["test"]["accuracy"]) for run in SMALL],
            *seeds("small"),
            f"{min(timing(run).seconds.sum() for run in SMALL):.0f}",
            f"{max(timing(run).seconds.sum() for run in SMALL):.0f}",
        ],
    ),
    Claim(
        README,
        "our training is {} times as fast in bf16, and {} times as fast in fp32 (in the fastest "
        "epoch of the seed-42 run). On two cores of an AMD EPYC with AVX2 instructions, it is {} "
        "times as fast in fp32, with the optional package `extras/winograd`. On two cores with "
        "AVX-512, it is {} times as fast in bf16. On one thread with AVX-512, our "
        "augmentation with normalisation is {} times as fast",
        lambda: [
            f"{benchmark(H200)['ratio']:.1f}",
            f"{fp32_ratio():.1f}",
            f"{benchmark(AVX2)['ratio']:.1f}",
            f"{benchmark(AVX512)['ratio']:.1f}",
            f"{benchmark(AUGMENT_AVX512)['ratio']:.0f}",
        ],
    ),
    Claim(
        README,
        '"minimal overfitting" | {} %, against {} % on the test images',
        lambda: [percent(plain_training()["correct"] / 50_000), ours("test_accuracy", -1)],
    ),
    Claim(
        README,
        "{} % instead of {} % (seed 42: {} images lost, {} gained, McNemar's p = {}), "
        "{} instead of {} % (seed 0: p = {}), {} instead of {} % (seed 1: p = {})",
        lambda: [
            *normalisation("report-seed42"),
            *(normalisation(f"report-seed{seed}", 2)[i] for seed in (0, 1) for i in (0, 1, 4)),
        ],
    ),
    Claim(
        README,
        "published: {} % (epoch {}) instead of the {} % reported (last epoch); "
        "ours: {} % (epoch {}) instead of {} %",
        lambda: [
            published("test_accuracy", best_epoch("reference")),
            best_epoch("reference") + 1,
            published("test_accuracy", -1),
            ours("test_accuracy", best_epoch("report-seed42")),
            best_epoch("report-seed42") + 1,
            ours("test_accuracy", -1),
        ],
    ),
    Claim(
        README,
        "the weights don't change in one of 60 epochs; test accuracy after it: published {} %, "
        "ours {} %",
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
        "| **test accuracy** | **{} %** ({} to {}) | **{} %** ({} to {}) |",
        lambda: [x for run in SHIPPED_RUNS for x in with_interval(shipped(run)["tta_none"])],
    ),
    Claim(
        CARD,
        "| with flip TTA | {} % ({} to {}) | {} % ({} to {}) |",
        lambda: [x for run in SHIPPED_RUNS for x in with_interval(shipped(run)["tta_flip"])],
    ),
    Claim(
        CARD,
        "| normalised as in training instead | {} % ({} images gained, {} lost; McNemar's p = {})",
        lambda: normalisation("report-seed42")[1:],
    ),
    Claim(
        CARD,
        "| at the end of the training, in its precision | {} % | {} % |",
        lambda: [percent(metrics(run)["test"]["accuracy"]) for run in SHIPPED_RUNS],
    ),
    Claim(
        CARD,
        "| all seeds that were run | {} % (seed 42), {} % (seed 0), {} % (seed 1) | "
        "{} % (seed 42), {} % (seed 0) |",
        lambda: [
            percent(shipped(run)["tta_none"]["accuracy"])
            for recipe in ("report", "best")
            for run in runs(recipe)
        ],
    ),
    Claim(
        CARD,
        "| their mean | {} ± {} %, n = {} |",
        lambda: [*spread("report", seeds("report"))[:2], len(seeds("report"))],
    ),
    Claim(
        CARD,
        "| calibration error | {} % | {} % | | calibration error after scaling | {} % | {} % | | "
        "temperature | {} | {} |",
        lambda: [
            *(percent(shipped(run)["tta_none"]["calibration_error"]) for run in SHIPPED_RUNS),
            *(percent(shipped(run)["calibration_error_after_temperature"]) for run in SHIPPED_RUNS),
            *(shipped(run)["temperature"] for run in SHIPPED_RUNS),
        ],
    ),
    Claim(
        CARD,
        "(highest after epoch {}: {} %)",
        lambda: [
            best_epoch("report-seed42") + 1,
            ours("test_accuracy", best_epoch("report-seed42")),
        ],
    ),
    Claim(
        CARD,
        "`report` classifies {} % of the images correctly (n = 2,000;",
        lambda: [f"{100 * shifted('noise', severity=1).accuracy:.0f}"],
    ),
    # docs/training.md
    Claim(
        TRAINING,
        "| `small` | one block per stage, {}, {} and {} channels, {} epochs ({} at 16x16)",
        lambda: [
            *RECIPES["small"].channels,
            RECIPES["small"].epochs,
            RECIPES["small"].half_size_epochs,
        ],
    ),
    Claim(
        TRAINING,
        "| `report` | the published run, quirks included: {} epochs |",
        lambda: [RECIPES["report"].epochs],
    ),
    Claim(
        TRAINING,
        "weight decay {}, label smoothing {}, and crop, flip and Cutout of {} pixels as "
        "augmentation; {} epochs.",
        lambda: [
            f"{RECIPES['best'].weight_decay:.0e}".replace("e-0", "e-"),
            RECIPES["best"].label_smoothing,
            RECIPES["best"].policy.cutout,
            RECIPES["best"].epochs,
        ],
    ),
    Claim(TRAINING, "`best` in {} epochs", lambda: [RECIPES["short"].epochs]),
    Claim(
        TRAINING,
        "on GPUs too slow for `report`; {} % of the test images correct (one run, seed 42)",
        lambda: [percent(metrics("short-seed42")["test"]["accuracy"])],
    ),
    Claim(
        TRAINING,
        "with flip TTA, the weights of `report` score 95.91 % on an Intel Xeon and {} % on an H200",
        lambda: [percent(shipped("report-seed42")["tta_flip"]["accuracy"])],
    ),
    Claim(
        TRAINING,
        "accepts differences of up to {} percentage points",
        lambda: [f"{100 * archive_run.TOLERANCE:.1f}"],
    ),
    # docs/performance.md
    Claim(
        PERFORMANCE,
        "PyTorch's default) | {} | 1 | {} GB |",
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
        "Its fastest epoch trained on {} images/s, {} times the published loop's rate. Sixty such "
        "epochs would take {} minutes. The whole run took {} minutes",
        lambda: [
            rounded(timing("report-seed42").images_per_second.max()),
            f"{fp32_ratio():.1f}",
            f"{60 * 50_000 / timing('report-seed42').images_per_second.max() / 60:.1f}",
            minutes("report-seed42"),
        ],
    ),
    Claim(
        PERFORMANCE,
        "in bf16, alone on the GPU, took {} minutes (`results/best-seed0`)",
        lambda: [minutes("best-seed0")],
    ),
    Claim(
        PERFORMANCE,
        "Compiled training does {} % of the operations per second that the GPU does in a large "
        "bf16 matrix product",
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
            "augmentation and normalisation, one thread, AVX-512": AUGMENT_AVX512,
            "augmentation and normalisation, one thread, the same machine limited to AVX2": (
                "augment-amd-epyc-2-cores-avx2"
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
            "AVX2, both in fp32, ours with `extras/winograd`": AVX2,
            "AVX-512, the published loop in fp32, ours in bf16": AVX512,
        }.items()
    ),
    Claim(
        PERFORMANCE,
        "In single rounds, the ratio of the first row is between {} and {}.",
        lambda: [f"{end(augmentation_ratios()):.0f}" for end in (min, max)],
    ),
    Claim(
        PERFORMANCE,
        "{}: {} times the published loop, {} % of the operations per second of a large matrix "
        "product",
        lambda: [
            f"{loop(AVX2, 'plain')['images_per_second']:.1f}",
            f"{loop(AVX2, 'plain')['ratio']:.2f}",
            f"{100 * loop(AVX2, 'plain')['share_of_matrix_rate']:.0f}",
        ],
    ),
    Claim(
        PERFORMANCE,
        "| {}; in single rounds from {} % less to {} % more than without `torch.compile` |",
        lambda: [
            f"{loop(AVX2, 'compiled')['images_per_second']:.1f}",
            *ratio_range(AVX2, "compiled"),
        ],
    ),
    Claim(
        PERFORMANCE,
        "AVX-512, bf16 with `torch.compile` | {} |",
        lambda: [f"{loop(AVX512, 'compiled')['images_per_second']:.1f}"],
    ),
    Claim(
        PERFORMANCE,
        "used {} GB of memory at its peak. With AVX2, `benchmarks/scaling.py` also measured how "
        "our training time grows: with the number of images to the power {}, with the number of "
        "epochs to the power {}, and with the number of channels to the power {}.",
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
        "20-epoch run with the package trained on {} to {} images/s",
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
        "it gains {} points over `none` (95 % interval {} to {}). `normalize` alone gains {} "
        "({} to {})",
        lambda: [
            *gain("confirmed_on", f"{BOTH} + flip"),
            *gain("confirmed_on", "normalize + none"),
        ],
    ),
    Claim(
        SHIFT,
        "without `normalize`, `batchnorm` gains the same {} points.",
        lambda: gain("confirmed_on", "batchnorm + flip")[:1],
    ),
    Claim(
        SHIFT,
        "original images and {} % ({} to {}) on the copy",
        lambda: custom_with_interval("none"),
    ),
    Claim(
        SHIFT,
        "With the default, the accuracy on the copy is {} % ({} to {})",
        lambda: custom_with_interval(BOTH, "flip"),
    ),
    Claim(
        SHIFT,
        "The default gains {} images (only the default is right) and loses {} (only `none` is "
        "right). Chance can hardly explain this difference (McNemar's p = {})",
        lambda: [
            custom(BOTH, "flip").gained,
            custom(BOTH, "flip").lost,
            f"{custom(BOTH, 'flip').mcnemar_p:.1e}",
        ],
    ),
    Claim(
        SHIFT,
        "alone gains {} points. `normalize+batchnorm` without flip TTA gains {} points: {} images "
        "gained, {} lost (p = {})",
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
        "on images five times as far from CIFAR-10's statistics as the custom set, this "
        "normalisation gains {} points",
        lambda: [points_by_normalizing("statistics", 5)],
    ),
    Claim(
        SHIFT,
        "It gets {} % on the original test images and {} % on the copy. With the copy's own "
        "statistics, the network gets {} % on the copy ({} images gained, {} lost, p = {})",
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
        "On {} of the {} measured files of 300, `auto` classifies at least as many images",
        never_worse,
    ),
    Claim(
        SHIFT,
        "doesn't adapt and forgoes {} points: it gets {} instead of {} %. (`none` gets {} %, too.)",
        lambda: [
            points_forgone(one_file("cat", 300, 0.5, "pixelate 3")),
            *shares("cat", 300, 0.5, "pixelate 3", "default", BOTH, "none"),
        ],
    ),
    Claim(
        SHIFT,
        "On fifty pixelated cats, `auto` adapts, and {} images are correct instead of {}",
        lambda: [
            one_file("cat", 50, 1.0, "pixelate 3")["default"],
            one_file("cat", 50, 1.0, "pixelate 3")["none"],
        ],
    ),
    Claim(
        SHIFT,
        "on 50 unshifted cats it gets {} % instead of {} %",
        lambda: shares("cat", 50, 1.0, "none 0", "default", BOTH),
    ),
    Claim(
        SHIFT,
        "on a file with half cats at severity 3, `normalize` gets {} %, and `none`, which `auto` "
        "chooses, {} %",
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
        "holds {} trials that ended ({} finished, {} pruned)",
        lambda: trials()[:3],
    ),
    Claim(
        "docs/searches.md",
        "reached an accuracy of {} %, the best trial {} %",
        lambda: trials()[3:5],
    ),
    Claim(LOG, "28 trials ({} finished, {} pruned)", lambda: trials()[1:3]),
    # results/label-errors/README.md
    Claim(
        LABELS,
        "the {} test images whose labels an algorithm suspected, each shown to five people",
        lambda: [len(votes())],
    ),
    Claim(
        LABELS,
        "{} labels got fewer than three of the five votes ({} % of the test set). For {} of these, "
        "three or more people chose the other class alone; for {}, three or more chose the label, "
        "alone or together with the other class; for {}, neither is the case.",
        label_counts,
    ),
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
            best_epoch("report-seed42") + 1,
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
        "**test {} and {} %**, training accuracy {} and {} %; over the {} seeds {} ± {} % | "
        "another NVIDIA H200, both at once: {} minutes, {} images/s each",
        lambda: [
            *spread("report", [0, 1])[2:],
            percent(history("report-seed0").train_accuracy.iloc[-1]),
            percent(history("report-seed1").train_accuracy.iloc[-1]),
            len(seeds("report")),
            *spread("report", seeds("report"))[:2],
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
    # docs/report.md
    Claim(
        REPORT_PAGE,
        "reproduced: {} ± {} % over three seeds",
        lambda: spread("report", [42, 0, 1])[:2],
    ),
    Claim(
        REPORT_PAGE,
        "| training accuracy {} % | 3.1, 3.7 | reproduced: {} to {} % over three seeds |",
        lambda: [
            published("train_accuracy", -1),
            *map(percent, sorted(band("train_accuracy").iloc[-1])[::2]),
        ],
    ),
    Claim(
        REPORT_PAGE,
        "refuted: our seed-42 run's accuracy is {} % on training images without augmentation, "
        "against {} % on test images",
        lambda: [percent(plain_training()["correct"] / 50_000), ours("test_accuracy", -1)],
    ),
    Claim(
        REPORT_PAGE,
        "| {} parameters, all trainable",
        lambda: [f"{count_parameters((3, 4, 3), (66, 132, 264)):,}"],
    ),
    # The notebooks
    Claim(
        DATA_BOOK,
        "trained a custom ResNet of {} parameters on CIFAR-10 and report an accuracy of {} %",
        lambda: [
            f"{count_parameters((3, 4, 3), (66, 132, 264)):,}",
            published("test_accuracy", -1),
        ],
    ),
    Claim(
        AUGMENTATION_BOOK,
        "classifies {} % of the 10,000 test images correctly with the report's augmentation, "
        "against {} % with the flip alone",
        lambda: [
            stored_table("solutions", "Four epochs of 10,000 images, by augmentation")[row][1]
            for row in ("the report's", "small's")
        ],
    ),
    Claim(
        TRAINING_BOOK,
        "classifies **{} ± {} %** of the 10,000 test images",
        lambda: spread("report", [42, 0, 1])[:2],
    ),
    Claim(
        TRAINING_BOOK,
        "add {} points of test accuracy to the published run, and {}, {} and {} to ours",
        lambda: [
            f"{history('reference').test_accuracy.diff(10).iloc[-1]:.2f}",
            *(
                percent(history(f"report-seed{seed}").test_accuracy.diff(10).iloc[-1])
                for seed in (42, 0, 1)
            ),
        ],
    ),
    Claim(
        TRAINING_BOOK,
        "ends at {} %, which is {} points below the published run",
        lambda: [ours("test_accuracy", -1), f"{published_minus_seed_42():.2f}"],
    ),
    Claim(
        TRAINING_BOOK,
        "would differ by {} points or more in {} % of all pairs",
        lambda: [f"{published_minus_seed_42():.2f}", percent(share_of_pairs(), 0)],
    ),
    Claim(
        TRAINING_BOOK,
        "95 % of further runs would end between {} and {} %. This range",
        lambda: [percent(end, 1) for end in room_for_another_run()],
    ),
    Claim(
        TRAINING_BOOK,
        "In our seed-42 run the peak is {} % in epoch {}, and the last epoch has {} %",
        lambda: [
            ours("test_accuracy", best_epoch("report-seed42")),
            best_epoch("report-seed42") + 1,
            ours("test_accuracy", -1),
        ],
    ),
    Claim(
        TRAINING_BOOK,
        "{} of the 50,000 plain training images correctly, **{} %**, against {} % of the test "
        "images. It errs {} times as often",
        lambda: [
            f"{plain_training()['correct']:,}",
            percent(plain_training()["correct"] / 50_000),
            ours("test_accuracy", -1),
            f"{mistakes('report-seed42') / (50_000 - plain_training()['correct']) * 5:.0f}",
        ],
    ),
    Claim(
        TRAINING_BOOK,
        "seeds 42, 0 and 1 get {}, {} and {} % with the second normalisation, and {}, {} "
        "and {} % with the normalisation",
        lambda: [
            percent(shipped(f"report-seed{seed}")[which]["accuracy"])
            for which in ("tta_none", "training_normalisation")
            for seed in (42, 0, 1)
        ],
    ),
    Claim(
        TRAINING_BOOK,
        "is more than chance ({} images gained, {} lost, McNemar's p = {})",
        own_statistics_against_training,
    ),
    Claim(
        TRAINING_BOOK,
        "in half of the epochs, {} of 60. Each of its four curves lies outside in {} to {} epochs",
        lambda: [30, min(outside_the_band().values()), max(outside_the_band().values())],
    ),
    Claim(
        TRAINING_BOOK,
        "it lies above, by up to {} points",
        lambda: [
            percent((published_curve("train_accuracy") - band("train_accuracy").max(axis=1)).max())
        ],
    ),
    Claim(
        TRAINING_BOOK,
        "the test loss, which rises in {} of the {} steps from one epoch to the next",
        lambda: [int((published_curve("test_loss").diff() > 0).sum()), 59],
    ),
    Claim(
        TRAINING_BOOK,
        "It has {} % of the parameters of ResNet-18, but {} % of its multiply-adds",
        lambda: [
            percent(ours / theirs, 0)
            for ours, theirs in zip(*compared_with_resnet18(), strict=True)
        ],
    ),
    Claim(
        TRAINING_BOOK,
        "After this epoch, the published test accuracy is {} %",
        lambda: [published("test_accuracy", 0)],
    ),
    Claim(
        TRAINING_BOOK,
        "People checked {} suspicious labels among its 10,000 test labels, and {} of them weren't "
        "confirmed",
        lambda: [
            len(votes := pd.read_csv(RESULTS / "label-errors" / "cifar10.csv").votes_label),
            (votes < 3).sum(),
        ],
    ),
    Claim(
        TRAINING_BOOK,
        "a temperature of {} (notebook 4)",
        lambda: [f"{shipped('report-seed42')['temperature']:.2f}"],
    ),
    Claim(
        TRAINING_BOOK,
        "lowers the training loss, from {} to {}",
        lambda: [f"{history('small-seed42').train_loss.iloc[i]:.3f}" for i in (0, -1)],
    ),
    Claim(
        TRAINING_BOOK,
        "gains another {} points, with {} times the parameters and {} times the epochs of "
        "`small`. Two CPU cores would need about {} hours",
        lambda: [
            f"{100 * (accuracy('report-seed42') - accuracy('small-seed42')):.2f}",
            f"{count_parameters((3, 4, 3), (66, 132, 264)) / count_parameters(*SMALLEST):.0f}",
            f"{60 / metrics('small-seed42')['epochs']:.0f}",
            f"{60 * 50_000 / loop(AVX512, 'plain')['images_per_second'] / 3600:.0f}",
        ],
    ),
    Claim(
        TRAINING_BOOK,
        "has seen each image only {} times and has a {}rd of the parameters",
        lambda: [
            RECIPES["small"].epochs,
            f"{count_parameters((3, 4, 3), (66, 132, 264)) / count_parameters(*SMALLEST):.0f}",
        ],
    ),
    Claim(
        TRAINING_BOOK,
        "reproduced: {} ± {} % over three seeds, {} % published",
        lambda: [*spread("report", [42, 0, 1])[:2], published("test_accuracy", -1)],
    ),
    Claim(
        TRAINING_BOOK,
        "The network classifies {} % of the plain training images correctly and {} % of the test",
        lambda: [percent(plain_training()["correct"] / 50_000), ours("test_accuracy", -1)],
    ),
    Claim(
        TRAINING_BOOK,
        "normalisation of CIFAR-10's test images costs {}, {} and {} points (seeds 42, 0, 1)",
        lambda: [
            percent(run["training_normalisation"]["accuracy"] - run["tta_none"]["accuracy"])
            for run in (shipped(f"report-seed{seed}") for seed in (42, 0, 1))
        ],
    ),
    Claim(
        MISTAKES_BOOK,
        "the {} mistakes have a mean confidence of {} %, and {} of them are above 90 %",
        lambda: [
            len(confidence_of_mistakes()),
            f"{100 * confidence_of_mistakes().mean():.0f}",
            int((confidence_of_mistakes() > 0.9).sum()),
        ],
    ),
    Claim(
        MISTAKES_BOOK,
        "{} pictures are framed. A majority chose the other class for only {} of them",
        framed_pets,
    ),
    Claim(
        MISTAKES_BOOK,
        "Only {} of this network's {} mistakes cross over, and only {} of the published run's {}.",
        lambda: [
            count(run) for run in ("report-seed42", "reference") for count in (crossings, mistakes)
        ],
    ),
    Claim(
        MISTAKES_BOOK,
        "although only {} of the thousand trucks are misclassified as ships",
        lambda: [matrix("report-seed42")[CLASSES.index("truck"), CLASSES.index("ship")]],
    ),
    Claim(
        MISTAKES_BOOK,
        "misclassifies {} of a thousand cats as dogs and {} of a thousand dogs as cats; the "
        "published run misclassifies {} and {}.",
        lambda: [
            matrix(run)[pair]
            for run in ("report-seed42", "reference")
            for pair in ((CAT, DOG), (DOG, CAT))
        ],
    ),
    Claim(
        MISTAKES_BOOK,
        "seed 0 misclassifies {} cats as dogs and {} dogs as cats, and seed 1 misclassifies {} "
        "cats and {} dogs. With the recipe `best`, seed 42 misclassifies {} cats and {} dogs, and "
        "seed 0 misclassifies {} cats and {} dogs.",
        lambda: [
            matrix(run)[pair]
            for run in ("report-seed0", "report-seed1", "best-seed42", "best-seed0")
            for pair in ((CAT, DOG), (DOG, CAT))
        ],
    ),
    Claim(
        MISTAKES_BOOK,
        "{} labels were **not confirmed by a majority**: fewer than three people chose the label "
        "alone. That doesn't make 54 labels wrong. A majority chose the other class for {} of "
        "them, the label (alone or with the other class) for {}, and neither for {}. For the "
        "other {} there was no majority at all.",
        unconfirmed_labels,
    ),
    Claim(
        MISTAKES_BOOK,
        "{} of {} correctly classified cats are striped ({} %), but only {} of {} cats "
        "misclassified as dogs ({} %).",
        striped_cats,
    ),
    Claim(
        SUBMISSION_BOOK,
        "they gain {} points ({} to {}), and on unshifted images they cost nothing",
        lambda: gain("confirmed_on", f"{BOTH} + flip"),
    ),
    Claim(
        SUBMISSION_BOOK,
        "noise 1 costs most: {} points. Removing three quarters of the light costs {} points, "
        "removing all colour {}. Scaling to 24×24 pixels and back (pixelation 1) costs {} points.",
        lambda: [
            points_lost(*shift)
            for shift in (("noise", 1), ("brightness", 5), ("saturation", 5), ("pixelate", 1))
        ],
    ),
    Claim(
        SUBMISSION_BOOK,
        "the accuracy is {} % under blur and {} % under JPEG",
        lambda: [
            percent(shifted(family, severity=severity).accuracy, 1)
            for family, severity in (("blur", 3), ("jpeg", 5))
        ],
    ),
    Claim(
        SUBMISSION_BOOK,
        "of 300 unshifted ships and nothing else, the network recognises {} ships without "
        "adapting, but only {} with `normalize+batchnorm`",
        lambda: [one_file("ship", 300, 1.0, "none 0")[way] for way in ("none", BOTH)],
    ),
    Claim(
        SUBMISSION_BOOK,
        "At five times the copy's shift it gains {} points",
        lambda: [points_by_normalizing("statistics", 5)],
    ),
    Claim(
        SUBMISSION_BOOK,
        "to a test accuracy of {} and {} % (seeds 42 and 0; n = 10,000) in sixty epochs",
        lambda: [percent(shipped(f"best-seed{s}")["tta_none"]["accuracy"]) for s in (42, 0)],
    ),
    Claim(
        SUBMISSION_BOOK,
        "The report's recipe has a standard deviation of {} points over three seeds",
        lambda: spread("report", [42, 0, 1])[1:2],
    ),
    Claim(
        SUBMISSION_BOOK,
        "`small` reaches {}, {} and {} % (seeds 42, 0 and 1)",
        lambda: [percent(metrics(run)["test"]["accuracy"]) for run in SMALL],
    ),
]


@cache
def text_of(document: str) -> str:
    """The document, with one space for all white space. Of a notebook, its markdown."""
    text = (ROOT / document).read_text(encoding="utf-8")
    if document.endswith(".ipynb"):
        cells = json.loads(text)["cells"]
        text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return " ".join(text.replace("\n> ", "\n").split())


def matches(claim: Claim) -> list[re.Match]:
    """Where the document has the claim's sentence, whatever its numbers are."""
    literal = (re.escape(part) for part in claim.sentence.split("{}"))
    return list(re.finditer(NUMBER.join(literal), text_of(claim.document)))


def in_digits(number: str) -> str:
    return str(WORDS.index(number.lower())) if number.lower() in WORDS else number


def difference(claim: Claim) -> str:
    """One line that says how the document differs from the records, or nothing."""
    found = [list(map(in_digits, match.groups())) for match in matches(claim)]
    expected = [str(value) for value in claim.expected()]
    if len(found) == 1 and found[0] == expected:
        return ""
    return f"{claim.document}: {claim.sentence!r}: expected {expected}, found {found}"


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: f"{claim.document}: {claim.sentence}")
def test_a_text_says_what_the_records_say(claim):
    wrong = difference(claim)
    assert not wrong, wrong


# Every text is searched for counts and for "only", whether or not a row is about them.

BOOKS = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))
TEXTS = [
    *(README, CARD, LOG, LABELS, "Makefile"),
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
    *(f"notebooks/{name}" for name in BOOKS),
]
COURSE = [name for name in BOOKS if name[0].isdigit()]
# How many of these there are. Of seeds, each recipe has its own number.
COUNTS = {
    "notebooks": {len(COURSE)},
    "seeds": {len(seeds(recipe)) for recipe in ("report", "best", "small")},
}


@pytest.mark.parametrize("document", TEXTS)
def test_as_many_notebooks_and_seeds_are_counted_as_there_are(document):
    text = text_of(document)
    for match in re.finditer(rf"{NUMBER} ({'|'.join(COUNTS)})\b", text):
        number, things = in_digits(match[1]), match[2]
        there_are = " or ".join(map(str, sorted(COUNTS[things])))
        message = f"{document}: {match[0]!r}: there are {there_are} {things}"
        assert int(number.replace(",", "")) in COUNTS[things], message


@pytest.mark.parametrize("document", TEXTS)
def test_whatever_is_only_so_many_is_computed_from_the_records(document):
    text, computed = text_of(document), set()
    for claim in CLAIMS:
        if claim.document == document:
            computed |= {
                match.span(i + 1) for match in matches(claim) for i in range(match.re.groups)
            }
    for match in re.finditer(rf"\bonly {NUMBER}", text, re.I):
        told = text[max(match.start() - 40, 0) : match.end() + 40]
        is_known = match.span(1) in computed or any(known in told for known in COUNTED_BY_HAND)
        if in_digits(match[1]) != "1":  # "only one of them" says which, not how many
            assert is_known, f"{document}: ...{told}...: give CLAIMS a row that computes the number"


def test_the_log_names_the_settings_of_the_records_that_the_code_no_longer_has():
    paths = list(RESULTS.glob("*/config.json"))
    assert paths
    stored = {name for path in paths for name in json.loads(path.read_text(encoding="utf-8"))}
    gone = stored - {field.name for field in fields(TrainConfig)} - {"data", "images"}
    (named,) = re.findall(r"and today's code doesn't: (.*?)\.", text_of(LOG))
    assert set(re.findall(r"`(\w+)`", named)) == gone


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


def test_the_page_about_the_report_names_sections_that_exist():
    page = (ROOT / REPORT_PAGE).read_text(encoding="utf-8")
    places = re.findall(r"^\|[^|]*\| ([^|]*\d) \|", page, re.M)
    assert len(places) > 30
    for notebook, section in re.findall(r"(\d)\.(\d+)", " ".join(places)):
        (path,) = (ROOT / "notebooks").glob(f"0{notebook}_*.ipynb")
        assert f'"## {section}. ' in path.read_text(encoding="utf-8"), (notebook, section)
