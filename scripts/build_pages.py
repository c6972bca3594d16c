"""Run the notebooks top to bottom: as HTML pages (`make run`), or in place (`make notebooks`).

    python -m scripts.build_pages [--in-place] [NAME...]

docs/setup.md lists the environment variables that say what they train and look at.
"""

import argparse
import html
import os
import shutil
import sys
from pathlib import Path

import nbformat
import pandas as pd
from jupyter_client.manager import KernelManager
from nbclient.exceptions import CellExecutionError
from nbconvert import HTMLExporter
from nbconvert.preprocessors import ExecutePreprocessor
from traitlets.config import Config

from cifar_lib import environment
from cifar_lib.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
WIDGET = "application/vnd.jupyter.widget-view+json"
NO_ALT = "No description has been provided for this image"  # in a page of nbconvert's
PAGES = ROOT / "runs" / "html"
MISTAKES = ROOT / "docs" / "mistakes.html"  # by scripts/mistakes_page.py, of the package's weights


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    in_place = "write the outputs into the notebooks"
    parser.add_argument("--in-place", action="store_true", help=in_place)
    names = "how their names begin; default: all"
    parser.add_argument("names", nargs="*", metavar="NAME", help=names)
    options = parser.parse_args()

    # Kernels start in notebooks/, but a relative path means relative to where this was typed.
    try:
        environment.make_absolute(Path.cwd())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sys.stdout.reconfigure(errors="backslashreplace")  # a console may lack characters of tables

    # Kernels are this environment's and no other's, and print no progress bars.
    os.environ["JUPYTER_PATH"] = str(Path(sys.prefix) / "share" / "jupyter")
    os.environ["TQDM_DISABLE"] = "1"
    beginnings = tuple(options.names or [""])
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        if not path.name.startswith(beginnings):
            continue
        print(f"running {path.name}", flush=True)
        notebook = nbformat.read(path, as_version=4)
        try:
            _run(notebook)
        except CellExecutionError as error:
            print(f"error: {path.name} stopped: {error.ename}: {error.evalue}", file=sys.stderr)
            return 1
        if options.in_place:
            _leave_out_large(notebook)
            nbformat.write(notebook, path)
        else:
            _write_page(path.stem, notebook)

    if not options.in_place:
        _write_index()
        print(f"\npages: {PAGES.relative_to(ROOT)}/index.html\n")
        _print_comparison()
    return 0


def _run(notebook: nbformat.NotebookNode) -> None:
    """Run a notebook from top to bottom, in notebooks/, and keep its outputs.

    Raises CellExecutionError if a cell fails.
    """
    executor = ExecutePreprocessor(timeout=None, config=_encrypted())
    executor.preprocess(notebook, {"metadata": {"path": str(NOTEBOOKS)}})
    _tidy(notebook)


def _encrypted() -> Config:
    """Return settings that encrypt the connection to kernels.

    Without encryption, newer kernels begin with a warning. Older versions of jupyter_client don't
    know these settings.
    """
    known = "transport_encryption" in KernelManager.class_trait_names()
    return Config(KernelManager={"transport_encryption": "auto"} if known else {})


def _tidy(notebook: nbformat.NotebookNode) -> None:
    """Remove times and progress bars, because tqdm's notebook version ignores TQDM_DISABLE."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if WIDGET not in out.get("data", {})]


def _leave_out_large(notebook: nbformat.NotebookNode) -> None:
    """Remove HTML that is marked as too large to store (course/mistakes.py), but keep its text."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            mark = output.get("metadata", {}).get("text/html", {})
            if mark.get("stored") is False:
                del output.data["text/html"]


def _write_page(name: str, notebook: nbformat.NotebookNode) -> None:
    """Write a notebook with its outputs as <name>.html."""
    page, _ = HTMLExporter().from_notebook_node(notebook, {"metadata": {"name": name}})

    # nbconvert leaves out a notebook's alternative texts, and puts NO_ALT in their place.
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            for kind in ("image/png", "image/jpeg"):
                alt = output.get("metadata", {}).get(kind, {}).get("alt")
                if alt:
                    page = page.replace(NO_ALT, html.escape(alt), 1)

    # The pages link to each other as the notebooks do, but are one folder deeper.
    for linked in NOTEBOOKS.glob("*.ipynb"):
        page = page.replace(f'href="{linked.name}"', f'href="{linked.stem}.html"')
    page = page.replace('href="../README.md#notebooks"', 'href="index.html"')
    page = page.replace('href="../', 'href="../../')
    PAGES.mkdir(parents=True, exist_ok=True)
    (PAGES / f"{name}.html").write_text(page, encoding="utf-8")


def _write_index() -> None:
    """Write index.html, with links to all existing pages, also those of earlier calls."""
    items = []
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        if (PAGES / f"{path.stem}.html").exists():
            items.append(f'<li><a href="{path.stem}.html">{html.escape(_title(path))}</a></li>')
    shutil.copy(MISTAKES, PAGES)
    items.append(f'<li><a href="{MISTAKES.name}">Every mistake at a click</a></li>')
    links = "\n".join(items)
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><title>CIFAR-10 notebooks</title>'
    style = "<style>body{font:18px/1.6 sans-serif;max-width:40em;margin:3em auto}</style>"
    page = f"{head}{style}<h1>CIFAR-10 notebooks</h1><ul>{links}</ul></html>\n"
    (PAGES / "index.html").write_text(page, encoding="utf-8")


def _title(path: Path) -> str:
    """Return the heading of a notebook."""
    return nbformat.read(path, as_version=4).cells[0].source.splitlines()[0].lstrip("# ")


def _print_comparison() -> None:
    """Print the newest table of notebook 3, if any, which compares this run with the published one.

    The table also says why the two differ.
    """
    written = list((ROOT / "runs").glob("*/comparison.csv"))
    if not written:
        return
    newest = max(written, key=lambda path: path.stat().st_mtime)
    table = pd.read_csv(newest, dtype=str, keep_default_na=False)
    print(table.to_string(index=False, justify="left"))


if __name__ == "__main__":
    raise SystemExit(main())
