"""Run the notebooks as Google Colab does (`make colab`), from an empty folder.

    .venv/bin/python tests/colab/run.py [--name REPOSITORY] [NOTEBOOK...]

With Colab's old IPython (pins.txt), a stub of google.colab, and git, which answers for the code
host with a clone of this checkout's last commit. --name: what a user called the repository. torch
is lent by the environment that runs this. Each notebook must run to its end and show pictures.
"""

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / ".venv-colab"
PINS = Path(__file__).with_name("pins.txt")
LENT = "cuda filelock fsspec functorch mpmath networkx nvidia sympy torch torchgen torchvision"
LENT_FILES = (*LENT.split(), "torchvision.libs", "triton", "typing_extensions.py")
STUB = """
import sys, types
google, colab = types.ModuleType("google"), types.ModuleType("google.colab")
google.colab = colab
sys.modules |= {"google": google, "google.colab": colab}
"""


def make_environment() -> None:
    """HOME, from nothing unless it was made with these pins."""
    made_with = HOME / "pins.txt"
    if not made_with.exists() or made_with.read_text(encoding="utf-8") != PINS.read_text(
        encoding="utf-8"
    ):
        shutil.rmtree(HOME, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", HOME], check=True)
        pip = [HOME / "bin" / "python", "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "-r", PINS], check=True, stderr=subprocess.DEVNULL)
        kernel = [HOME / "bin" / "python", "-m", "ipykernel", "install", "--sys-prefix"]
        subprocess.run(kernel, check=True, capture_output=True)
        startup = HOME / "ipython" / "profile_default" / "startup"
        startup.mkdir(parents=True)
        (startup / "colab.py").write_text(STUB, encoding="utf-8")
        shutil.copy(PINS, made_with)
    lent = HOME / "lent"
    shutil.rmtree(lent, ignore_errors=True)
    lent.mkdir()
    site = Path(sysconfig.get_path("purelib"))
    for name in LENT_FILES:
        package = name.removesuffix(".py")
        for source in (site / name, *site.glob(f"{package}-*.dist-info")):
            if source.exists():
                (lent / source.name).symlink_to(source)
    (packages,) = (HOME / "lib").glob("python3*/site-packages")
    (packages / "lent.pth").write_text(f"{lent}\n", encoding="utf-8")


def clone(place: Path, name: str | None) -> str:
    """What the code host would hold; returns the address it stands for."""
    subprocess.run(["git", "clone", "--quiet", ROOT, place], check=True)
    if name is not None:
        git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org"]
        change = [sys.executable, place / "scripts" / "set_address.py", f"someone/{name}"]
        subprocess.run(change, check=True, capture_output=True)
        subprocess.run([*git, "commit", "--quiet", "-am", "address"], cwd=place, check=True)
    lines = (place / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    return next(line.split('"')[1] for line in lines if line.startswith("Repository"))


def run(path: Path) -> str | None:
    """None, or why the notebook failed."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=1200, kernel_name="python3")
    try:
        client.execute(cwd=path.parent)
    except CellExecutionError as error:
        return str(error)[-1500:]
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    kinds = [kind for output in outputs for kind in output.get("data", {})]
    pictures = sum(kind.startswith("image/") for kind in kinds)
    asked = sum(cell.source.count("session.show(") for cell in notebook.cells)
    lines = "".join(output.get("text", "") for output in outputs).splitlines()
    print(
        "\n".join(
            f"  {line}" for line in lines if line.startswith("CIFAR-10:") or "stand-in" in line
        )
    )
    return None if pictures >= asked > 0 else f"{pictures} pictures of {asked} came out"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", help="of the repository; default: as it is")
    parser.add_argument("notebooks", nargs="*", help="how their names begin; default: all")
    options = parser.parse_args()
    make_environment()
    os.environ.setdefault("CIFAR_EPOCHS", "1")  # pytest --nbmake trains all of them
    failed = 0
    with tempfile.TemporaryDirectory(prefix="colab ") as folder:
        origin, content = Path(folder) / "origin", Path(folder) / "content"
        address = clone(origin, options.name)
        content.mkdir()
        git = {f"url.file://{origin}.insteadOf": address, "safe.directory": "*"}
        os.environ["GIT_CONFIG_COUNT"] = str(len(git))
        for i, (key, value) in enumerate(git.items()):
            os.environ |= {f"GIT_CONFIG_KEY_{i}": key, f"GIT_CONFIG_VALUE_{i}": value}
        os.environ["PATH"] = f"{HOME / 'bin'}:{os.environ['PATH']}"
        os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # a warning of the debugger's
        os.environ["IPYTHONDIR"] = str(HOME / "ipython")
        os.environ["JUPYTER_PATH"] = str(HOME / "share" / "jupyter")
        for path in sorted((origin / "notebooks").glob("*.ipynb")):
            if not path.name.startswith(tuple(options.notebooks or [""])):
                continue
            print(path.name, flush=True)
            start = time.monotonic()
            reason = run(Path(shutil.copy(path, content)))
            failed += reason is not None
            print(f"  {reason or 'ok'}, {time.monotonic() - start:.0f} s", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
