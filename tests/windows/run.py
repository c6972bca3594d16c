"""Run the command line, a resumed training and the notebooks with what Windows lacks taken away.

    python tests/windows/run.py [--without-notebooks]

Needs Linux (/proc). The tests are collected too. One line is printed for each step; the first that
fails ends the run with its output and exit code 1.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PAGES = ROOT / "runs" / "html"
COMMAND = str(HERE / "command.py")
TINY = "--set blocks=1,1 --set channels=16,32 --set batch_size=32 --set precision=fp32"
TRAIN = f"train --recipe small --epochs 3 --train-size 120 {TINY} --device cpu --run"
MAKE_INPUTS = """
import sys
from PIL import Image
from notebooks.course.corruptions import generate_test_file
from notebooks.course.stand_in import generate_stand_in
place = sys.argv[1]
Image.new("RGB", (40, 30), "red").save(f"{place}/red.png")
generate_test_file(f"{place}/test.pkl", generate_stand_in(0, 20)[1])
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--without-notebooks", action="store_true")
    options = parser.parse_args()
    folders = [HERE, ROOT]
    # The C locale without Python's own remedies: text that names no encoding is ASCII.
    os.environ |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    os.environ.setdefault("CIFAR_EPOCHS", "1")  # pytest --nbmake trains all of them
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, folders))

    with tempfile.TemporaryDirectory() as place:
        _check_commands(Path(place))
    step("all tests collected", "-m", "pytest", "-q", "--collect-only", "tests", "extras")
    if not options.without_notebooks:
        shutil.rmtree(PAGES, ignore_errors=True)  # else an older page could pass for a new one
        step("five notebooks run", "-m", "scripts.build_pages", "0")
        _check_pages()
    return 0


def step(title: str, *words: str, expected: int = 0, says: str = "") -> None:
    """Run Python with these words and print the title.

    Raises SystemExit with the output if the exit code isn't `expected`, or if the output lacks what
    it `says`.
    """
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True)
    output = (done.stdout + done.stderr).decode("utf-8", "replace")
    if done.returncode != expected or says not in output:
        raise SystemExit(f"windows: FAILED: {title} (exit code {done.returncode})\n{output}")
    print(f"windows: {title}", flush=True)


def _check_commands(place: Path) -> None:
    step("info", "-m", "cifar_lib", "info")
    if "CIFAR10_ROOT" in os.environ:
        step("evaluate on CIFAR-10", "-m", "cifar_lib", "evaluate")
    else:
        step("evaluate on stand-in data", COMMAND, "evaluate")

    # A picture and a competition's file to predict.
    step("inputs made", "-c", MAKE_INPUTS, str(place))
    predict = ["-m", "cifar_lib", "predict", "--grad-cam", str(place), str(place / "red.png")]
    step("predict with Grad-CAM", *predict)
    submit = ["-m", "cifar_lib", "submit", "--test", str(place / "test.pkl"), "--out"]
    step("submit", *submit, str(place / "submission.csv"))

    # One training at a stretch, and one that is killed in its second epoch and resumed.
    step("training", COMMAND, *TRAIN.split(), str(place / "whole"))
    step("training killed", COMMAND, "--die", *TRAIN.split(), str(place / "killed"), expected=9)
    resumed = [COMMAND, *TRAIN.split(), str(place / "killed")]
    step("training resumed", *resumed, says="resuming after epoch")
    for name in ("history.csv", "model.safetensors"):
        if (place / "whole" / name).read_bytes() != (place / "killed" / name).read_bytes():
            raise SystemExit(f"windows: FAILED: {name} differs after the kill")
    print("windows: the resumed training ends with the same bytes", flush=True)


def _check_pages() -> None:
    """Check that every page is text in UTF-8 with pictures in it.

    Raises SystemExit if one has no pictures.
    """
    for notebook in sorted((ROOT / "notebooks").glob("0*.ipynb")):
        page = PAGES / f"{notebook.stem}.html"
        text = page.read_text(encoding="utf-8")
        pictures = text.count("data:image/png;base64,") + text.count("data:image/jpeg;base64,")
        if pictures == 0:
            raise SystemExit(f"windows: FAILED: {page.name} has no pictures")
        print(f"windows: {page.name}: {len(text):,} characters, {pictures} pictures", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
