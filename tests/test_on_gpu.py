"""The plan for a GPU: its order, its budget, how it resumes, and what it chooses by."""

import json
import subprocess
import time
from pathlib import Path

import pytest

from scripts import on_gpu
from scripts.on_gpu import PARTS, Settings, Training


@pytest.fixture
def settings(tmp_path) -> Settings:
    return Settings(tmp_path, "cpu", dry_run=True, side_by_side=2, ends=time.monotonic() + 600)


def real(settings: Settings, minutes: float = 10) -> Settings:
    """The settings of a real run, of which only the plan is looked at."""
    ends = time.monotonic() + 60 * minutes
    return Settings(settings.out, "cuda", dry_run=False, side_by_side=2, ends=ends)


def empty() -> dict:
    return {"programs": {}, "trainings": {}, "failures": {}}


def padding(**ratios: float) -> dict:
    """Progress that knows how fast each padding is."""
    rows = [{"variant": "published", "channel_multiple": 1, "ratio_to_as_it_is": 0.3}]
    rows += [{"variant": "as it is", "channel_multiple": 1, "ratio_to_as_it_is": 1.0}]
    for name, ratio in ratios.items():
        rows.append(
            {
                "variant": name,
                "channel_multiple": int(name.removeprefix("of_")),
                "ratio_to_as_it_is": ratio,
            }
        )
    for row in rows:
        row["images_per_second"] = 10_000 * row["ratio_to_as_it_is"]
    return empty() | {"programs": {"padding": {"result": {"rows": rows}}}}


def validated(name: str, seed: int, accuracy: float) -> dict:
    return {"part": "recipes", "name": name, "seed": seed, "validation_accuracy": accuracy}


# The command line.


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], list(PARTS)),
        (["--only", "setup", "tests", "recipes"], ["tests", "recipes", "setup"]),
        (["--skip", "tests", "padding"], list(PARTS[2:])),
        (["--only", "tests", "seeds", "--skip", "tests"], ["seeds"]),
    ],
)
def test_the_parts_come_in_order_of_worth_however_they_are_named(monkeypatch, words, expected):
    came = []
    assert tuple(on_gpu.RUN) == PARTS
    monkeypatch.setattr(
        on_gpu, "RUN", {part: lambda *_, part=part: came.append(part) for part in PARTS}
    )
    assert on_gpu.main(["--dry-run", "--device", "cpu", *words]) == 0
    assert came == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "cpu"], "error: device: expected a CUDA GPU, got cpu: use --dry-run"),
        (["--minutes", "0"], "--minutes: expected a number above 0, got 0.0"),
        (["--minutes", "nan"], "--minutes: expected a number above 0, got nan"),
        (["--side-by-side", "0"], "--side-by-side: expected at least 1, got 0"),
        (["--only", "nothing"], "invalid choice: 'nothing'"),
    ],
)
def test_a_wrong_command_ends_with_a_line_and_exit_code_2(capsys, words, message):
    try:
        code = on_gpu.main(words)
    except SystemExit as error:
        code = error.code
    assert code == 2 and message in capsys.readouterr().err


def test_what_failed_is_named_and_gives_exit_code_1(settings, monkeypatch, capsys):
    def fail(settings: Settings, progress: dict) -> None:
        progress["failures"]["tests"] = "exit code 1"

    monkeypatch.setattr(on_gpu, "RUN", {part: fail for part in PARTS})
    assert on_gpu.run_parts(settings, ["tests"]) == 1
    assert "tests: exit code 1" in capsys.readouterr().out


# What is chosen.


def test_padding_is_chosen_if_it_is_ten_per_cent_faster_and_then_the_fastest():
    assert on_gpu.channel_multiple(empty()) == 1
    assert on_gpu.channel_multiple(padding(of_8=1.09, of_64=0.8)) == 1
    assert on_gpu.channel_multiple(padding(of_8=1.2, of_16=1.5, of_64=1.4)) == 16


def test_the_winner_has_the_highest_mean_on_the_validation_images():
    rows = {}
    accuracies = [(0.95, 0.96), (0.97, 0.93), (0.94, 0.98), (0.9, 0.9), (0.96, 0.95)]
    for name, scores in zip(on_gpu.CANDIDATES, accuracies, strict=True):
        for seed, score in zip((42, 0), scores, strict=True):
            rows[f"{name} {seed}"] = validated(name, seed, score)
    rows["another part"] = validated("both", 42, 1.0) | {"part": "ablation"}
    rows["another seed"] = validated("both", 1, 1.0)
    progress = empty() | {"trainings": rows}
    assert on_gpu.winner(progress, (42, 0)) == "TrivialAugment on half"
    rows["TrivialAugment on half 0"]["validation_accuracy"] = 0.97  # as good as `best`
    assert on_gpu.winner(progress, (42, 0)) == "best"
    del rows["EMA 0"]
    assert on_gpu.winner(progress, (42, 0)) is None


def test_the_trainings_are_those_that_the_parts_promise(settings):
    settings = real(settings)
    candidates = on_gpu.candidates(settings)
    assert len(candidates) == 10 and {each.images for each in candidates} == {45_000 * 60}
    assert all(each.config.validation_size == 5_000 for each in candidates)
    changed = {each.name: each.config.policy for each in candidates}
    assert changed["both"].alternating_flip and changed["both"].ops_probability == 0.5

    finals = on_gpu.finals(settings, "both")
    assert [(each.name, each.config.seed) for each in finals[:3]] == [
        *(("both", 42), ("best", 42), ("both", 0))
    ]
    assert len(finals) == 6 and {each.images for each in finals} == {50_000 * 60}
    assert [each.config.seed for each in on_gpu.finals(settings, "best")] == [42, 0, 1]
    assert all(not each.config.watch_test for each in (*candidates, *finals))

    ablations = on_gpu.ablations(settings)
    assert len(ablations) == 16 and {each.config.recipe for each in ablations} == {"report"}
    assert {each.config.precision for each in ablations} == {"auto"}
    keys = [each.key for each in (*candidates, *finals, *ablations)]
    assert len(set(keys)) == len(keys) and " " not in "".join(keys)


# The budget, and resuming.


def test_a_program_runs_once_and_only_if_it_fits(settings, monkeypatch):
    calls = []

    def run(command: list[str], timeout: float, **_) -> subprocess.CompletedProcess:
        calls.append(command[2])
        code = 1 if command[2] == "broken" else 0
        return subprocess.CompletedProcess(command, code, b'compiling\n{"rows": []}\n', b"seen")

    monkeypatch.setattr(subprocess, "run", run)
    progress = empty()
    on_gpu.run_program(settings, progress, "long", 601, "long")
    for _ in range(2):
        on_gpu.run_program(settings, progress, "short", 500, "short")
        on_gpu.run_program(settings, progress, "broken", 5, "broken")
    assert calls == ["short", "broken", "broken"]  # what failed is tried again
    stored = on_gpu.load_progress(settings.out)
    assert stored["programs"]["short"]["result"] == {"rows": []}
    assert stored["failures"] == {"broken": "exit code 1"}
    assert (settings.out / "short.txt").read_bytes().endswith(b"seen")


def test_a_program_that_outlasts_the_budget_is_cut_off(settings):
    short = Settings(settings.out, "cpu", True, 2, ends=time.monotonic() + 0.2)
    progress = empty()
    on_gpu.run_program(short, progress, "server", 0, "http.server", "0", "--bind", "127.0.0.1")
    assert progress["failures"] == {"server": "cut off"} and not progress["programs"]


def test_how_long_trainings_take_is_judged_by_what_was_measured(settings):
    two = on_gpu.candidates(real(settings))[:2]
    images = 2 * 45_000 * 60

    def seconds(progress: dict) -> float:
        return on_gpu.expected_seconds(two, progress) - on_gpu.STARTING

    assert seconds(empty()) == pytest.approx(images / on_gpu.RATE)
    assert seconds(padding(of_8=1.05)) == pytest.approx(images / 10_000)
    assert seconds(padding(of_8=2.0)) == pytest.approx(images / 20_000)
    assert seconds(padding(of_8=2.0) | {"images_per_second": 27_000}) == pytest.approx(200)


def test_trainings_resume_where_they_stopped_and_stop_where_the_budget_ends(settings, monkeypatch):
    waves: list[list[str]] = []
    broken = {"recipes/EMA-seed42"}

    def side_by_side(_, wave: list[Training], multiple: int) -> list[Training]:
        waves.append([each.key for each in wave])
        assert multiple == 8
        return [each for each in wave if each.key not in broken]

    monkeypatch.setattr(on_gpu, "train_side_by_side", side_by_side)
    monkeypatch.setattr(on_gpu, "outcome", lambda training, *_: {"part": training.part})
    monkeypatch.setattr(on_gpu, "drop_large_files", lambda *_, **__: None)
    five = on_gpu.candidates(settings)
    keys = [each.key for each in five]
    progress = empty()
    on_gpu.train(settings, progress, five, 2, 8)
    assert waves == [keys[:2], keys[2:4], keys[4:]]
    assert list(progress["failures"]) == [keys[4]]

    # Another call trains what failed, and nothing else.
    broken.clear()
    waves.clear()
    progress = on_gpu.load_progress(settings.out)
    on_gpu.train(settings, progress, five, 2, 8)
    assert waves == [keys[4:]] and not progress["failures"]

    # Two trainings at 60 epochs take six minutes at the assumed rate.
    waves.clear()
    on_gpu.train(real(settings, minutes=5), empty(), on_gpu.candidates(real(settings)), 2, 8)
    assert waves == []


def test_the_seeds_wait_for_all_candidates(settings, monkeypatch, capsys):
    monkeypatch.setattr(on_gpu, "train", lambda *_: pytest.fail("trained"))
    on_gpu.run_seeds(settings, empty())
    assert "the part `recipes` isn't finished" in capsys.readouterr().out


def test_a_miniature_training_leaves_its_scores_and_no_large_files(settings, stand_in, monkeypatch):
    monkeypatch.setattr(on_gpu, "images", lambda _: stand_in)
    monkeypatch.setattr(on_gpu, "MINIATURE", on_gpu.MINIATURE | {"train_size": 60})
    monkeypatch.setattr(on_gpu, "MINIATURE_VALIDATION_IMAGES", 20)
    for each in (on_gpu.candidates(settings)[4], on_gpu.finals(settings, "best")[0]):
        run = settings.out / "runs" / each.key
        on_gpu.train_one(each, run, settings, 8, 1)
        row = on_gpu.outcome(each, run, side_by_side=1, multiple=8)
        on_gpu.drop_large_files(run, keep_weights=each.part == "seeds")
        assert "epoch 2/2" in Path(f"{run}.log").read_text(encoding="utf-8")
        assert row["channel_multiple"] == 8 and row["seed"] == 42
        if each.part == "recipes":  # nothing is chosen by the test set
            assert row["train_images"] == 40 and 0 <= row["validation_accuracy"] <= 1
            assert "test_accuracy" not in row
        else:
            assert row["train_images"] == 60 and row["test_images"] == 30
        left = {file.suffix for file in run.iterdir() if file.suffix in (".pt", ".safetensors")}
        assert left == ({".safetensors"} if each.part == "seeds" else set())
        progress = empty() | {"trainings": {each.key: row}}
        assert each.name in on_gpu.summary(progress)[0]
        json.dumps(progress)


def test_a_training_that_fails_says_why_in_its_log(settings, monkeypatch):
    monkeypatch.setattr(on_gpu, "images", lambda _: 1 / 0)
    each = on_gpu.candidates(settings)[0]
    run = settings.out / "runs" / each.key
    with pytest.raises(SystemExit):
        on_gpu.train_one(each, run, settings, 1, 1)
    assert "ZeroDivisionError" in Path(f"{run}.log").read_text(encoding="utf-8")
