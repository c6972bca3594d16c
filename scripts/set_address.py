"""Write where your copy of this repository is into its badges and notebooks.

    python scripts/set_address.py you/your-repository

It needs nothing but Python. An address pasted from the browser works as well. Anything else is an
error, with exit code 2, and changes nothing.
"""

import os
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOST = "https://github.com/"
NAME = r"[A-Za-z0-9._-]+"  # as in owner/name

# These places get the address whatever they had before, so that a wrong one is repaired. They are
# pyproject.toml's entry, the notebooks' first cell (whose quotes JSON escapes), and the badges that
# open a notebook.
WRITTEN = (
    (rb'(Repository = "https://github\.com/)[^"\r\n]*(")', rb"\g<1>%s\g<2>"),
    (rb'(ADDRESS = \\"https://github\.com/)[^"\\\r\n]*(\\")', rb"\g<1>%s\g<2>"),
    (
        rb"(https://colab\.research\.google\.com/github/)[^\s()]*?(/blob/main/notebooks/)",
        rb"\g<1>%s\g<2>",
    ),
)


def main(arguments: list[str]) -> int:
    """Change the address to the given one, and return the exit code."""
    address = parse_address(" ".join(arguments))
    if address is None:
        got = " ".join(arguments) or "nothing"
        example = "python scripts/set_address.py you/your-repository"
        print(f"error: address: expected owner/name, got {got}: {example}", file=sys.stderr)
        return 2
    try:
        changed = set_address(ROOT, address)
    except (OSError, ValueError) as error:
        print(f"error: nothing was changed: {error}", file=sys.stderr)
        return 2
    print(f"{address}: {len(changed)} files changed")
    return 0


def parse_address(text: str) -> str | None:
    """Return the `owner/name` in a repository's name, web address or git address, or else None."""
    text = re.sub(r"^(https?://(www\.)?github\.com/|git@github\.com:|github\.com/)", "", text)
    text = text.rstrip("/").removesuffix(".git")
    # An owner has no dots, and a repository isn't called "." or "..".
    return text if re.fullmatch(rf"[A-Za-z0-9][A-Za-z0-9_-]*/(?!\.+$){NAME}", text) else None


def set_address(root: Path, address: str) -> list[Path]:
    """Put `address` into all files of the repository at `root`, or into none.

    Returns the paths of the changed files. Files are read and written as bytes, which keeps their
    line ends.

    Raises OSError if one can't be read or written, ValueError if pyproject.toml names no address.
    """
    files = [root / "pyproject.toml", root / "README.md"]
    files += sorted((root / "notebooks").glob("*.ipynb")) + sorted((root / "docs").glob("*.md"))
    before = {path: path.read_bytes() for path in files}
    found = re.search(rb'^Repository = "https://github\.com/(.*)"', before[files[0]], re.M)
    if not found:
        raise ValueError(f'expected a line Repository = "{HOST}..." in pyproject.toml, found none')
    after = {path: _replaced(text, found[1], address) for path, text in before.items()}
    changed = {path: text for path, text in after.items() if text != before[path]}
    _write_all(changed, before)
    return list(changed)


def _replaced(text: bytes, old: bytes, address: str) -> bytes:
    new = address.encode()
    for pattern, replacement in WRITTEN:
        text = re.sub(pattern, replacement % new, text)
    # Elsewhere, replace the old address as a whole. Another repository's may begin like it.
    if parse_address(old.decode()) == old.decode():
        whole = rb"(https://github\.com/|git@github\.com:)" + re.escape(old)
        text = re.sub(whole + rb"(?=\.git\b|\.?(?![A-Za-z0-9._-]))", rb"\g<1>" + new, text)
    return text


def _write_all(changed: dict[Path, bytes], before: dict[Path, bytes]) -> None:
    """Write all files or none, first beside the old ones and then in their place."""
    scratch = {path: path.with_name(f".{path.name}.new") for path in changed}
    replaced = []
    try:
        for path, text in changed.items():
            if not os.access(path, os.W_OK):
                raise PermissionError(f"{path} is read-only")
            scratch[path].write_bytes(text)
            shutil.copymode(path, scratch[path])
        for path in changed:
            os.replace(scratch[path], path)
            replaced.append(path)
    except OSError:
        for path in replaced:
            path.write_bytes(before[path])
        raise
    finally:
        for path in scratch.values():
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
