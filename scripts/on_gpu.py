"""What only a GPU can show, in order of worth, within a budget of minutes.

    python -m scripts.on_gpu --out runs/on_gpu --minutes 30
    python -m scripts.on_gpu --dry-run

The parts, of which `--only` and `--skip` name some:

tests      the tests that need a GPU
padding    images per second: the published loop, ours, and ours with channels padded by zeros
profile    the kernels of ten training steps, as it is and padded
variants   images per second of other changes to the step, on top of the best padding
recipes    `best` and variations of it at sixty epochs, trained on 45,000 images and judged on the
           other 5,000 of the training set, two seeds each
seeds      the winner and `best`, three seeds each, trained on 50,000 images, scored on the test set
ablation   `report` with one thing changed, two seeds each, scored on the test set
setup      `short` and `report` as the package trains them, each alone, for docs/setup.md

Everything is written below `--out`, after each program and each training. The same command
continues after what is there; a training that was cut off resumes after its last epoch. What
wouldn't be finished before the budget ends isn't begun. `--dry-run` does all of it in miniature, on
a CPU too.

Two things are left out: 300 epochs, because one run would take half of the budget at the 16,000
images/s that were measured before, and ASAM, which needs an optimizer that the package hasn't.

progress.json    all results
<name>.txt       what a program printed
runs/<part>/     the run directories of trainings. Finished ones lose their checkpoints, and their
                 weights too, but for the part `seeds`, whose runs `scripts/archive_run.py` archives
"""

import argparse
import contextlib
import csv
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from cifar_lib.data import CIFAR10_MEAN, CIFAR10_STD, ImageSet, load_cifar10
from cifar_lib.errors import InputError
from cifar_lib.files import write_atomically
from cifar_lib.fit import fit
from cifar_lib.hardware import choose_device, describe
from cifar_lib.recipes import TrainConfig, recipe
from notebooks.course.stand_in import generate_stand_in

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("tests", "padding", "profile", "variants", "recipes", "seeds", "ablation", "setup")
TRAINING_IMAGES, VALIDATION_IMAGES = 50_000, 5_000
SEEDS = (42, 0, 1)
WORTH_IT = 1.1  # padding has to be as many times as fast as no padding

# `best` and what might improve it, as changes of its fields.
FLIP = {"policy.alternating_flip": True}
TRIVIAL = {"policy.ops": "trivialaugment", "policy.ops_probability": 0.5}
CANDIDATES: dict[str, dict] = {
    "best": {},
    "alternating flip": FLIP,
    "TrivialAugment on half": TRIVIAL,
    "both": FLIP | TRIVIAL,
    "EMA": {"ema_decay": 0.999},
}
# `report`, and `report` with one thing changed. `report` itself is trained again, because its runs
# in results/ are in fp32, and these aren't.
CROP_AND_FLIP = {"policy.ops": "none", "policy.erasing": 0}
NO_AUGMENTATION = CROP_AND_FLIP | {"policy.crop_padding": 0, "policy.flip": 0}
TRUE_STATISTICS = {"std": CIFAR10_STD, "test_mean": CIFAR10_MEAN, "test_std": CIFAR10_STD}
ABLATION: dict[str, dict] = {
    "report": {},
    "without RandAugment": {"policy.ops": "none"},
    "without erasing": {"policy.erasing": 0},
    "crop and flip only": CROP_AND_FLIP,
    "no augmentation": NO_AUGMENTATION,
    "without smoothing": {"label_smoothing": 0},
    "true statistics": TRUE_STATISTICS,
    "schedule repaired": {"schedule": "cosine"},
}
# A dry run's trainings, for CPUs: a network with something to pad, few images and two epochs.
MINIATURE = {"blocks": "1", "channels": "18", "epochs": 2, "warmup_epochs": 1, "batch_size": 32}
MINIATURE |= {"train_size": 128, "half_size_epochs": 0}
MINIATURE_IMAGES, MINIATURE_VALIDATION_IMAGES = (600, 100), 40

# How long things take on an H200, in seconds, where nothing has been measured yet.
PROGRAM_SECONDS = {"tests": 120, "padding": 400, "profile": 80, "rest": 240, "unsearched": 80}
STARTING = 50  # for a process to load its data and to compile
RATE = 15_000  # images per second, of all trainings that share the GPU together


@dataclass(frozen=True)
class Settings:
    """What the command line says."""

    out: Path
    device: str
    dry_run: bool
    side_by_side: int  # so many trainings share the GPU
    ends: float  # when the budget ends, by time.monotonic()

    @property
    def left(self) -> float:
        """The seconds that are left."""
        return self.ends - time.monotonic()

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the part `seeds`; other parts take the first two."""
        return SEEDS[:1] if self.dry_run else SEEDS


class Training(NamedTuple):
    """One run: of which part, under which name, and what is trained."""

    part: str
    name: str
    config: TrainConfig

    @property
    def key(self) -> str:
        """Where it is below runs/, and how progress.json names it."""
        return f"{self.part}/{self.name.replace(' ', '-')}-seed{self.config.seed}"

    @property
    def images(self) -> int:
        """How many images it trains on, counted anew in each epoch."""
        size = (self.config.train_size or TRAINING_IMAGES) - self.config.validation_size
        return size * self.config.epochs


# What is known so far: the content of progress.json.


def load_progress(out: Path) -> dict:
    """Return the progress of earlier calls, or an empty one."""
    path = out / "progress.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    return {"programs": {}, "trainings": {}, "failures": {}}


def save_progress(out: Path, progress: dict) -> None:
    """Write the progress, and what follows from it up to now."""
    progress["channel_multiple"] = channel_multiple(progress)
    write_atomically(out / "progress.json", (json.dumps(progress, indent=2) + "\n").encode())


def channel_multiple(progress: dict) -> int:
    """Return the padding that was fastest, if it is worth it; otherwise 1, for none."""
    rows = progress["programs"].get("padding", {}).get("result", {}).get("rows", [])
    ratios = {row["channel_multiple"]: row.get("ratio_to_as_it_is", 0) for row in rows}
    worth_it = {
        multiple for multiple, ratio in ratios.items() if multiple > 1 and ratio >= WORTH_IT
    }
    return max(worth_it, key=ratios.get, default=1)


def images_per_second(progress: dict) -> float:
    """Return how many images per second all trainings on the GPU together make, as far as known."""
    if "images_per_second" in progress:  # of the last trainings
        return progress["images_per_second"]
    rows = progress["programs"].get("padding", {}).get("result", {}).get("rows", [])
    own = [row for row in rows if row["variant"] not in ("published", "fp32")]
    chosen = [row for row in own if row["channel_multiple"] == channel_multiple(progress)]
    return chosen[0]["images_per_second"] if chosen else RATE


def expected_seconds(trainings: Sequence[Training], progress: dict) -> float:
    """Return about how long these trainings take, if they run at the same time."""
    images = sum(training.images for training in trainings)
    return STARTING + images / images_per_second(progress)


def winner(progress: dict, seeds: Sequence[int]) -> str | None:
    """Return the candidate with the highest mean accuracy on the validation images.

    Of equal ones it is the first. It is None until all candidates were trained with all seeds.
    """
    rows = progress["trainings"].values()
    scores = {
        name: [
            row["validation_accuracy"]
            for row in rows
            if (row["part"], row["name"]) == ("recipes", name) and row["seed"] in seeds
        ]
        for name in CANDIDATES
    }
    if any(len(found) < len(seeds) for found in scores.values()):
        return None
    return max(scores, key=lambda name: statistics.mean(scores[name]))


# What is trained.


def training(
    settings: Settings, part: str, name: str, base: str, seed: int, **changes: object
) -> Training:
    """Return the training of a recipe, named `base`, with some changes; in a dry run a tiny one."""
    changes["seed"] = seed
    if settings.dry_run:
        changes |= MINIATURE
        if changes.get("validation_size"):
            changes["validation_size"] = MINIATURE_VALIDATION_IMAGES
    return Training(part, name, recipe(base, **changes))


def candidates(settings: Settings) -> list[Training]:
    """Return the trainings among which the validation images choose."""
    validation = {"validation_size": VALIDATION_IMAGES}
    return [
        training(settings, "recipes", name, "best", seed, **changes, **validation)
        for seed in settings.seeds[:2]
        for name, changes in CANDIDATES.items()
    ]


def finals(settings: Settings, chosen: str) -> list[Training]:
    """Return the trainings of the chosen candidate and of `best`, on all training images."""
    return [
        training(settings, "seeds", name, "best", seed, **CANDIDATES[name])
        for seed in settings.seeds
        for name in dict.fromkeys((chosen, "best"))  # one, if they are the same
    ]


def ablations(settings: Settings) -> list[Training]:
    """Return the trainings that show what each part of the report's recipe does."""
    how = {"precision": "auto", "watch_test": False}
    names = list(ABLATION)[:2] if settings.dry_run else ABLATION
    return [
        training(settings, "ablation", name, "report", seed, **ABLATION[name], **how)
        for seed in settings.seeds[:2]
        for name in names
    ]


# Programs.


def run_program(
    settings: Settings, progress: dict, name: str, seconds: float, *arguments: str
) -> None:
    """Run `python -m ...` and keep what it prints, unless it has been done or doesn't fit any more.

    If the last line that it prints is JSON, progress.json has that too.
    """
    if name in progress["programs"]:
        return
    if seconds > settings.left:
        say(settings, f"{name}: not begun, it takes about {seconds:.0f} seconds")
        return
    say(settings, name)
    began, output, errors = time.monotonic(), b"", b""
    try:
        done = subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=ROOT,
            capture_output=True,
            timeout=max(settings.left, 1),
        )
        output, errors, failure = done.stdout, done.stderr, f"exit code {done.returncode}"
        succeeded = done.returncode == 0
    except subprocess.TimeoutExpired as error:
        output, errors, failure = error.stdout or b"", error.stderr or b"", "cut off"
        succeeded = False

    # Keep the output, and the result.
    write_atomically(settings.out / f"{name}.txt", output + errors)
    if succeeded:
        row: dict = {"seconds": round(time.monotonic() - began, 1)}
        last_line = output.strip().rpartition(b"\n")[2]
        if last_line.startswith(b"{"):
            row["result"] = json.loads(last_line)
        progress["programs"][name] = row
        progress["failures"].pop(name, None)
    else:
        progress["failures"][name] = failure
        say(settings, f"{name}: {failure}, see {name}.txt")
    save_progress(settings.out, progress)


def run_tests(settings: Settings, progress: dict) -> None:
    """Run the tests that need a GPU."""
    arguments = ("pytest", "-q", "-k", "on_cuda", "tests/test_step.py")
    run_program(settings, progress, "tests", PROGRAM_SECONDS["tests"], *arguments)


def run_padding(settings: Settings, progress: dict) -> None:
    """Compare paddings with the published loop and with no padding."""
    arguments = ("benchmarks.step_variants", "--compare", "padding", *_how(settings), "--json")
    run_program(settings, progress, "padding", PROGRAM_SECONDS["padding"], *arguments)


def run_profile(settings: Settings, progress: dict) -> None:
    """Profile the step without padding, and with the best one; if none is worth it, with 8."""
    best = channel_multiple(progress)
    for multiple in (1, best if best > 1 else 8):
        arguments = ("benchmarks.profile_step", "--channel-multiple", f"{multiple}")
        name, seconds = f"profile-{multiple}", PROGRAM_SECONDS["profile"]
        run_program(settings, progress, name, seconds, *arguments, *_how(settings))


def run_variants(settings: Settings, progress: dict) -> None:
    """Compare other changes of the step, with the best padding."""
    multiple = ("--channel-multiple", f"{channel_multiple(progress)}")
    for name in ("rest", "unsearched"):
        arguments = ("benchmarks.step_variants", "--compare", name, *multiple, *_how(settings))
        run_program(settings, progress, name, PROGRAM_SECONDS[name], *arguments, "--json")


def _how(settings: Settings) -> tuple[str, ...]:
    return ("--device", settings.device, *(("--dry-run",) if settings.dry_run else ()))


# Trainings.


def run_recipes(settings: Settings, progress: dict) -> None:
    """Train the candidates."""
    train(settings, progress, candidates(settings), *_sharing(settings, progress))


def run_seeds(settings: Settings, progress: dict) -> None:
    """Train the winner and `best` on all images, once it is clear what has won."""
    chosen = winner(progress, settings.seeds[:2])
    if chosen is None:
        say(settings, "seeds: not begun, the part `recipes` isn't finished")
        return
    progress["winner"] = chosen
    train(settings, progress, finals(settings, chosen), *_sharing(settings, progress))


def run_ablation(settings: Settings, progress: dict) -> None:
    """Train the variations of `report`."""
    train(settings, progress, ablations(settings), *_sharing(settings, progress))


def run_setup(settings: Settings, progress: dict) -> None:
    """Train `short` and `report` as the package would, one after the other."""
    both = [training(settings, "setup", name, name, SEEDS[0]) for name in ("short", "report")]
    train(settings, progress, both, at_once=1, multiple=None)


def _sharing(settings: Settings, progress: dict) -> tuple[int, int]:
    """Return how many trainings share the GPU, and the multiple of their channels."""
    return settings.side_by_side, channel_multiple(progress)


def train(
    settings: Settings,
    progress: dict,
    trainings: Sequence[Training],
    at_once: int,
    multiple: int | None,
) -> None:
    """Run the trainings that aren't finished, so many `at_once`, until the budget ends.

    multiple: their channels are padded to a multiple of it; None: as the package does.
    """
    left = [each for each in trainings if each.key not in progress["trainings"]]
    for first in range(0, len(left), at_once):
        wave = left[first : first + at_once]
        seconds = expected_seconds(wave, progress)
        if seconds > settings.left:
            say(settings, f"{wave[0].key}: not begun, it takes about {seconds:.0f} seconds")
            return
        say(settings, " and ".join(each.key for each in wave))
        began = time.monotonic()
        finished = train_side_by_side(settings, wave, multiple)

        # Note what came of it.
        for each in wave:
            if each in finished:
                folder = settings.out / "runs" / each.key
                progress["trainings"][each.key] = outcome(each, folder, len(wave), multiple)
                progress["failures"].pop(each.key, None)
                drop_large_files(folder, keep_weights=each.part == "seeds")
            else:
                progress["failures"][each.key] = f"not finished, see runs/{each.key}.log"
                say(settings, f"{each.key}: {progress['failures'][each.key]}")
        if len(finished) == len(wave):
            images = sum(each.images for each in wave)
            progress["images_per_second"] = images / (time.monotonic() - began)
        save_progress(settings.out, progress)


def train_side_by_side(
    settings: Settings, trainings: Sequence[Training], multiple: int | None
) -> list[Training]:
    """Run trainings at the same time, a process each, and return those that finished.

    When the budget ends they are stopped. They resume after their last epoch in a later call.
    """
    context = multiprocessing.get_context("spawn")  # CUDA can't be used in forks
    threads = 1 if settings.dry_run else max(1, torch.get_num_threads() // len(trainings))
    processes: list[multiprocessing.process.BaseProcess] = []
    try:
        for each in trainings:
            arguments = (each, settings.out / "runs" / each.key, settings, multiple, threads)
            process = context.Process(target=train_one, args=arguments)
            process.start()
            processes.append(process)
        for process in processes:
            process.join(max(settings.left, 0))
    finally:  # also after Ctrl-C
        for process in processes:
            process.terminate()  # of a process that has ended it does nothing
            process.join()
    return [
        each for each, process in zip(trainings, processes, strict=True) if process.exitcode == 0
    ]


def train_one(
    training: Training, run: Path, settings: Settings, multiple: int | None, threads: int
) -> None:
    """Train in a process of its own; what it says is in <run>.log."""
    torch.set_num_threads(threads)
    run.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(f"{run}.log", "a", encoding="utf-8", buffering=1) as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        try:
            train_set, test_set = images(settings)
            fit(
                training.config,
                run,
                train_set,
                test_set,
                device=settings.device,
                channel_multiple=multiple,
            )
        except BaseException:
            traceback.print_exc()
            raise SystemExit(1) from None


def images(settings: Settings) -> tuple[ImageSet, ImageSet]:
    """Return the training and the test set; for a dry run a few images, which are generated."""
    return generate_stand_in(*MINIATURE_IMAGES) if settings.dry_run else load_cifar10()


def outcome(training: Training, run: Path, side_by_side: int, multiple: int | None) -> dict:
    """Return what progress.json says about a finished run.

    Of a run that has validation images the score on the test set is left out: nothing is chosen by
    it.
    """
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    with open(run / "history.csv", encoding="utf-8", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    with open(run / "timing.csv", encoding="utf-8", newline="") as file:
        seconds = sum(float(row["seconds"]) for row in csv.DictReader(file))
    row = {"part": training.part, "name": training.name, "seed": config["seed"]}
    row |= {"epochs": config["epochs"], "precision": config["precision"]}
    row |= {"channel_multiple": multiple, "side_by_side": side_by_side}
    row |= {"train_images": metrics["train_images"], "data": metrics["data"]}
    row |= {"seconds_of_epochs": round(seconds, 1), "train_accuracy": float(last["train_accuracy"])}
    if training.config.validation_size:
        row["validation_accuracy"] = float(last["validation_accuracy"])
        row["validation_images"] = training.config.validation_size
    else:
        row |= {"test_accuracy": metrics["test"]["accuracy"], "test_images": metrics["test"]["n"]}
    return row


def drop_large_files(run: Path, keep_weights: bool) -> None:
    """Remove a finished run's checkpoints, and its weights if they aren't needed any more."""
    for path in (*run.glob("checkpoint*.pt"), *run.glob("*.safetensors")):
        if path.suffix == ".pt" or not keep_weights:
            path.unlink()


# The command.


RUN = {
    "tests": run_tests,
    "padding": run_padding,
    "profile": run_profile,
    "variants": run_variants,
    "recipes": run_recipes,
    "seeds": run_seeds,
    "ablation": run_ablation,
    "setup": run_setup,
}


def say(settings: Settings, line: str) -> None:
    """Print a line that begins with the minutes that are left."""
    print(f"[{settings.left / 60:5.1f} min left] {line}", flush=True)


def summary(progress: dict) -> list[str]:
    """Return a line for each name in each part of trainings, with means over its seeds."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in progress["trainings"].values():
        groups.setdefault((row["part"], row["name"]), []).append(row)
    lines = []
    for (part, name), rows in groups.items():
        kind = "validation" if "validation_accuracy" in rows[0] else "test"
        scores = [row[f"{kind}_accuracy"] for row in rows]
        spread = f" ± {statistics.stdev(scores):.2%}" if len(scores) > 1 else ""
        seeds = ", ".join(f"{row['seed']}" for row in rows)
        mean = f"{statistics.mean(scores):.2%}{spread}"
        lines.append(f"{part:9} {name:24} {kind} {mean} (seeds {seeds})")
    return lines


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; a wrong one ends the program with exit code 2."""
    parser = argparse.ArgumentParser("python -m scripts.on_gpu", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/on_gpu"), help="the folder for all results")
    add("--minutes", type=float, default=30, help="when they are over, everything stops")
    add("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help="only these parts")
    add("--skip", nargs="+", choices=PARTS, default=(), metavar="PART", help="not these parts")
    add("--side-by-side", type=int, default=2, metavar="N", help="so many trainings share the GPU")
    add("--device", default="auto", help="auto, cuda, cuda:N; in a dry run cpu too")
    add("--dry-run", action="store_true", help="everything in miniature, in a temporary folder")
    options = parser.parse_args(arguments)
    if not (math.isfinite(options.minutes) and options.minutes > 0):
        parser.error(f"--minutes: expected a number above 0, got {options.minutes}")
    if options.side_by_side < 1:
        parser.error(f"--side-by-side: expected at least 1, got {options.side_by_side}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts and return the exit code: 0, 1 if something failed, 2 for a wrong input."""
    options = read_options(arguments)
    os.environ["TQDM_DISABLE"] = "1"  # no progress bars in logs
    if options.dry_run:
        os.environ["OMP_NUM_THREADS"] = "1"  # on few images threads only wait for each other
    try:
        device = choose_device(options.device)
        if device.type != "cuda" and not options.dry_run:
            what = f"device: expected a CUDA GPU, got {device}"
            raise InputError(f"{what}: use --dry-run to try everything in miniature")
        with tempfile.TemporaryDirectory() as folder:
            settings = Settings(
                out=Path(folder) if options.dry_run else options.out.resolve(),
                device=str(device),
                dry_run=options.dry_run,
                side_by_side=options.side_by_side,
                ends=time.monotonic() + 60 * options.minutes,
            )
            return run_parts(settings, [p for p in options.only if p not in options.skip])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run_parts(settings: Settings, parts: Sequence[str]) -> int:
    """Run these parts in order of worth; return 1 if something of them failed, else 0."""
    progress = load_progress(settings.out)
    progress["machine"] = describe(torch.device(settings.device))
    save_progress(settings.out, progress)
    for part in PARTS:
        if part in parts:
            RUN[part](settings, progress)
    print("\n".join(summary(progress)))
    if not progress["failures"]:
        say(settings, "done")
    for name, reason in progress["failures"].items():
        say(settings, f"{name}: {reason}")
    return 1 if progress["failures"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
