"""Run the notebooks top to bottom: as HTML pages (`make run`), or in place (`make notebooks`).

    python -m scripts.build_pages [--in-place] [NAME...]

Which profile they run in is CIFAR_PROFILE's to say (quick, the default, or full).
"""

import argparse
import html
import os
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
PAGES = ROOT / "runs" / "html"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--in-place", action="store_true", help="write the outputs into the notebooks"
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="how their names begin; default: all"
    )
    options = parser.parse_args()
    # Kernels start in notebooks/, but a relative path means relative to where this was typed.
    try:
        environment.make_absolute(Path.cwd())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sys.stdout.reconfigure(errors="backslashreplace")  # a console may lack characters of tables
    in_place = options.in_place
    paths = [
        path
        for path in sorted(NOTEBOOKS.glob("*.ipynb"))
        if path.name.startswith(tuple(options.names or [""]))
    ]
    os.environ["JUPYTER_PATH"] = str(
        Path(sys.prefix) / "share" / "jupyter"
    )  # this environment's kernel, no other
    os.environ["TQDM_DISABLE"] = "1"
    for path in paths:
        print(f"running {path.name}", flush=True)
        notebook = nbformat.read(path, as_version=4)
        executor = ExecutePreprocessor(timeout=None, config=_encrypted())
        try:
            executor.preprocess(notebook, {"metadata": {"path": str(NOTEBOOKS)}})
        except CellExecutionError as error:
            print(f"error: {path.name} stopped: {error.ename}: {error.evalue}", file=sys.stderr)
            return 1
        _tidy(notebook)
        if in_place:
            nbformat.write(notebook, path)
        else:
            _write_page(path.stem, notebook)
    if not in_place:
        _write_index()
        print(f"\npages: {PAGES.relative_to(ROOT)}/index.html\n")
        _print_comparison()
    return 0


def _encrypted() -> Config:
    """Talk to kernels encrypted, where that is known: else the newer ones begin with a warning."""
    known = "transport_encryption" in KernelManager.class_trait_names()
    return Config(KernelManager={"transport_encryption": "auto"} if known else {})


def _tidy(notebook: nbformat.NotebookNode) -> None:
    """Without times and progress bars: tqdm's notebook version ignores TQDM_DISABLE."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if WIDGET not in out.get("data", {})]


def _write_page(name: str, notebook: nbformat.NotebookNode) -> None:
    PAGES.mkdir(parents=True, exist_ok=True)
    page, _ = HTMLExporter().from_notebook_node(notebook, {"metadata": {"name": name}})
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        alt = output.get("metadata", {}).get("image/png", {}).get("alt")
        if alt:  # nbconvert leaves a notebook's alternative texts out, and puts this in their place
            page = page.replace(
                "No description has been provided for this image", html.escape(alt), 1
            )
    for target in NOTEBOOKS.glob("*.ipynb"):  # the pages point at each other as the notebooks do
        page = page.replace(f'href="{target.name}"', f'href="{target.stem}.html"')
    page = page.replace('href="../README.md#notebooks"', 'href="index.html"')
    page = page.replace('href="../', 'href="../../')  # a page lies a folder deeper than a notebook
    (PAGES / f"{name}.html").write_text(page, encoding="utf-8")


def _write_index() -> None:
    """Links to every page there is, also those of earlier calls."""
    items = "\n".join(
        f'<li><a href="{path.stem}.html">{html.escape(_title(path))}</a></li>'
        for path in sorted(NOTEBOOKS.glob("*.ipynb"))
        if (PAGES / f"{path.stem}.html").exists()
    )
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><title>CIFAR-10 notebooks</title>'
    style = "<style>body{font:18px/1.6 sans-serif;max-width:40em;margin:3em auto}</style>"
    (PAGES / "index.html").write_text(
        f"{head}{style}<h1>CIFAR-10 notebooks</h1><ul>{items}</ul></html>\n",
        encoding="utf-8",
    )


def _title(path: Path) -> str:
    return nbformat.read(path, as_version=4).cells[0].source.splitlines()[0].lstrip("# ")


def _print_comparison() -> None:
    """The table that notebook 3 wrote last, if any: published, this run, why they differ."""
    written = sorted(
        (ROOT / "runs").glob("*/comparison.csv"), key=lambda path: path.stat().st_mtime
    )
    if not written:
        return
    with pd.option_context(
        "display.width", 200, "display.max_colwidth", None, "display.max_columns", None
    ):
        print(
            pd.read_csv(written[-1], dtype=str, keep_default_na=False).to_string(
                index=False, justify="left"
            )
        )


if __name__ == "__main__":
    raise SystemExit(main())
