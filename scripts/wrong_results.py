"""Inputs that once gave wrong results without a word: how many are right before and now.

    git worktree add /somewhere/before f1ebbd5
    python -m scripts.wrong_results --before /somewhere/before --write

Each kind is a function that yields cases: a name, and whether the result was right. Right is the
true answer; for an input that has none, a refusal of one line. All images are real ones, from
CIFAR-10's test set. `--write` puts the table into results/reliability.md, below its other tables.
"""

import argparse
import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PARSER = argparse.ArgumentParser(description=__doc__.splitlines()[0])
PARSER.add_argument("--code", type=Path, default=ROOT, help="the checkout that is measured")
PARSER.add_argument("--before", type=Path, help="a checkout to compare with")
PARSER.add_argument("--json", action="store_true", help="print the counts only, for --before")
PARSER.add_argument("--write", action="store_true", help="write the table")
OPTIONS = PARSER.parse_args()
# The package of the measured checkout; what makes the cases is always this one's: `cifar_lib` is
# all that is imported from there.
sys.path.insert(0, str(OPTIONS.code))
import cifar_lib  # noqa: E402, F401

del sys.path[0]

from cifar_lib import model as model_module  # noqa: E402
from cifar_lib.cli import main as command_line  # noqa: E402
from cifar_lib.data import load_cifar10, read_picture  # noqa: E402
from cifar_lib.errors import InputError  # noqa: E402
from cifar_lib.fit import fit  # noqa: E402
from cifar_lib.kaggle import read_test_file, write_submission  # noqa: E402
from cifar_lib.model import load_model  # noqa: E402
from cifar_lib.recipes import recipe  # noqa: E402
from notebooks.course.corruptions import FAMILIES, shifted  # noqa: E402
from tests.test_data import png_of, tiff_of  # noqa: E402

HEADING = "## Wrong without a word"
BEFORE = "f1ebbd5"
TRAIN, TEST = load_cifar10()
Case = tuple[str, bool]
torch.set_num_threads(1)  # on files this small, threads only wait for each other


def refusal(action: Callable[[], object]) -> str:
    """The line that refuses, or nothing where the action went through."""
    try:
        action()
    except InputError as error:
        return str(error)
    return ""


def test_file(data: object, ids: object = None, protocol: int = 4) -> bytes:
    ids = list(range(len(data))) if ids is None else ids
    return pickle.dumps({"data": data, "ids": ids}, protocol)


def reads(content: bytes) -> Callable[[], object]:
    Path("test.pkl").write_bytes(content)
    return lambda: read_test_file("test.pkl")


def shows(content: bytes) -> Callable[[], torch.Tensor]:
    Path("picture").write_bytes(content)
    return lambda: read_picture("picture")


def layouts() -> Iterator[Case]:
    """Both orders of values in three shapes: unshifted and under each shift at its worst."""
    for family in ("clean", *FAMILIES):
        images = TEST.images[:1000]
        images = images if family == "clean" else shifted(images, family, 5)
        for count in (1, 20, 1000):
            part = images[:count].contiguous()
            orders = {"planes": part, "pixels": part.permute(0, 2, 3, 1).contiguous()}
            for order, values in orders.items():
                for shape in ((3072,), (32, 32, 3), (3, 32, 32)):
                    read = reads(test_file(values.reshape(-1, *shape).numpy()))
                    right = not refusal(read) and torch.equal(read().images, part)
                    yield f"{count} {family}, {order} as {shape}", right


def no_images() -> Iterator[Case]:
    """Arrays of the right shape that aren't images, and shapes that are read as none."""
    images = TEST.images[:100].permute(0, 2, 3, 1).numpy()  # (100, 32, 32, 3)
    dice = np.random.default_rng(0)
    wrong = {
        "noise": dice.integers(0, 256, images.shape, dtype=np.uint8),
        "pixels in any order": dice.permuted(images.reshape(100, 1024, 3), axis=1),
        "images last, reshaped": images.transpose(1, 2, 3, 0).reshape(images.shape),
        "compressed": np.frombuffer(lzma.compress(images.tobytes())[: 50 * 3072], np.uint8),
        "images last": images.transpose(1, 2, 3, 0),
        "two images in a row": images.reshape(50, 64, 32, 3),
    }
    wrong["pixels in any order"] = wrong["pixels in any order"].reshape(images.shape)
    wrong["compressed"] = wrong["compressed"].reshape(50, 32, 32, 3)
    for name, data in wrong.items():
        yield name, bool(refusal(reads(test_file(data))))


def depths() -> Iterator[Case]:
    """Grey pictures of every depth: scaled as their file says, refused where it says nothing."""
    for image in TEST.images[:10]:
        grey = image.double().mean(0).round().numpy()  # (32, 32), 0 to 255

        def values(white: int, grey: np.ndarray = grey, kind: type = np.uint16) -> np.ndarray:
            return (grey / 255 * white).round().astype(kind)

        colours = np.repeat(values(65535)[..., None], 3, axis=2)
        readable = {
            "TIFF, 8 bits": tiff_of(values(255, kind=np.uint8), 8),
            "TIFF, 12 bits packed": tiff_of(values(4095), 12),
            "TIFF, 8 in 16, stated": tiff_of(values(255), 16, maximum=255),
            "TIFF, 12 in 16, stated": tiff_of(values(4095), 16, maximum=4095),
            "TIFF, 16 bits": tiff_of(values(65535), 16),
            "TIFF, 16 bits, white is zero": tiff_of(65535 - values(65535), 16, photometric=0),
            "TIFF, 32 bits, stated": tiff_of(values(10**6, kind=np.uint32), 32, maximum=10**6),
            "PNG, 12 in 16, stated": png_of(values(4095), 12),
            "PNG, 16 bits": png_of(values(65535)),
            "PNG, 16 bits, colours": png_of(colours),
        }
        for name, content in readable.items():
            read = shows(content)
            right = not refusal(read) and np.abs(read().double().numpy() - grey).max() <= 1
            yield name, bool(right)
        unknown = {
            "TIFF, 8 in 16": tiff_of(values(255), 16),
            "TIFF, 12 in 16": tiff_of(values(4095), 16),
            "TIFF, 32 bits": tiff_of(values(10**6, kind=np.uint32), 32),
            "TIFF, signed": tiff_of(values(9999), 16, sample_format=2),
            "PNG, 8 in 16": png_of(values(255)),
            "PNG, 12 in 16": png_of(values(4095)),
            "PNG, 12 in 16, colours": png_of(colours >> 4),
            "PNG, 12 in 16, colours, stated": png_of(colours >> 4, 12),
        }
        for name, content in unknown.items():
            yield name, bool(refusal(shows(content)))


def formats() -> Iterator[Case]:
    """Colour pictures of 8 bits in every format and mode."""
    # Format, mode, and how far a value may be off: by palettes and lossy compression.
    kinds = [("PNG", "RGB", 0), ("PNG", "RGBA", 0), ("BMP", "RGB", 0), ("TIFF", "RGB", 0)]
    kinds += [("PNG", "L", 0), ("PNG", "LA", 0), ("TIFF", "L", 0), ("TIFF", "CMYK", 1)]
    kinds += [("PNG", "P", 40), ("GIF", "P", 40), ("JPEG", "RGB", 16), ("JPEG", "L", 8)]
    kinds += [("JPEG", "CMYK", 16), ("WEBP", "RGB", 24), ("PNG", "1", 0), ("TIFF", "1", 0)]
    for image in TEST.images[:10]:
        original = Image.fromarray(image.permute(1, 2, 0).numpy())
        for kind, mode, tolerance in kinds:
            converted = original.convert(mode)
            expected = np.asarray(converted.convert("RGB"), float).transpose(2, 0, 1)
            file = io.BytesIO()
            converted.resize((256, 256), Image.Resampling.NEAREST).save(file, kind)
            read = shows(file.getvalue())
            right = not refusal(read) and np.abs(read().numpy() - expected).max() <= tolerance
            yield f"{kind}, {mode}", bool(right)


def large_pictures() -> Iterator[Case]:
    """JPEGs of today's phones, and what is too large for any."""
    image = TEST.images[0]
    original = Image.fromarray(image.permute(1, 2, 0).numpy())
    for width, height in ((8160, 6144), (12000, 9000)):
        wide = original.resize((height, height), Image.Resampling.NEAREST)
        phone, file = Image.new("RGB", (width, height)), io.BytesIO()
        phone.paste(wide, ((width - height) // 2, 0))
        phone.save(file, "JPEG", quality=90)
        read = shows(file.getvalue())
        right = not refusal(read) and (read().int() - image.int()).abs().max() <= 8
        yield f"{width} x {height}", bool(right)
    for side in (13_300, 13_400):
        file = io.BytesIO()
        Image.new("1", (side, side)).save(file, "PNG")
        yield f"{side} x {side}", refusal(shows(file.getvalue())).endswith("scale it down")


def ids() -> Iterator[Case]:
    """Whole numbers and names of any type, and what counts no images."""
    images = TEST.images[:100].permute(0, 2, 3, 1).numpy()
    numbers, names = list(range(100)), [f"image {i}" for i in range(100)]
    kinds = ("u1", "i1", "u2", "i2", "u4", ">i4", "i8", "f2", "f4", "f8")
    honest = {kind: np.arange(100, dtype=kind) for kind in kinds}
    honest |= {"list": numbers, "tuple": tuple(numbers), "range": range(100)}
    honest |= {"NumPy's numbers": list(np.arange(100)), "column": np.arange(100)[:, None]}
    honest |= {"objects": np.array(numbers, dtype=object)}
    named = {"names": names, "array of names": np.array(names), "bytes": np.array(names, "S")}
    named |= {"names, objects": np.array(names, dtype=object)}
    for name, given in (honest | named).items():
        expected = tuple(numbers if name in honest else names)
        for protocol in (0, 2, 4, 5):
            read = reads(test_file(images, given, protocol))
            yield f"{name}, protocol {protocol}", not refusal(read) and read().ids == expected
    wrong = {
        "one twice": [*numbers[:-1], 0],
        "too few": numbers[:-1],
        "halves": np.arange(100) / 2,
        "nan": [*numbers[:-1], float("nan")],
        "none": [*numbers[:-1], None],
        "truth values": [True, *numbers[2:], 100],
    }
    for name, given in wrong.items():
        yield name, bool(refusal(reads(test_file(images, given))))


def strangers() -> Iterator[Case]:
    """Files that aren't pickles: the line must say what they are."""
    images = TEST.images[:10].permute(0, 2, 3, 1).numpy()
    content, archive, array = test_file(images), io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("test.pkl", content)
    np.save(array, images)
    weights = model_module.SHIPPED.read_bytes()
    files = {
        "zip": archive.getvalue(),
        "gzip": gzip.compress(content),
        "bzip2": bz2.compress(content),
        "xz": lzma.compress(content),
        "LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "web page": b"<!DOCTYPE html>\n<html><body>Sign in</body></html>",
        "safetensors": weights,
        ".npy": array.getvalue(),
        "CSV": b"ID,Labels\n" + b"".join(b"%d,0\n" % i for i in range(100)),
        "JSON": json.dumps({"ids": [1]}).encode(),
    }
    for name, file in files.items():
        yield name, name in refusal(reads(file)).partition("(")[2]


def own_weights() -> Iterator[Case]:
    """Trained with changed constants: their normalisation, and that probabilities are calibrated
    or said not to be."""
    small = {"blocks": "1", "channels": "16", "epochs": 1, "train_size": 200, "precision": "fp32"}
    Image.fromarray(TEST.images[0].permute(1, 2, 0).numpy()).save("cat.png")
    for name in ("report", "best", "quick"):
        for std in ((0.3, 0.3, 0.3), (0.2, 0.25, 0.3)):
            for held_out in (0, 50):
                config = recipe(name, **small, std=std, validation_size=held_out, watch_test=False)
                run = Path(f"{name} {std[0]} {held_out}")
                fit(config, run, TRAIN, TEST[:100], "cpu", log=lambda _: None)
                _, info = load_model(run / "model.safetensors")
                found = recipe(info["recipe"]).mean, recipe(info["recipe"]).std
                if hasattr(model_module, "training_normalization"):
                    found = model_module.training_normalization(info)
                right = tuple(map(tuple, found)) == (config.mean, std)
                yield f"{run}, normalisation", right
                said = output(["predict", "cat.png", "--weights", str(run / "model.safetensors")])
                yield f"{run}, calibration", "temperature" in info or "uncalibrated" in said


def output(words: list[str]) -> str:
    """What a command prints."""
    stdout, sys.stdout = sys.stdout, io.StringIO()
    try:
        command_line([*words, "--device", "cpu"])
        return sys.stdout.getvalue()
    finally:
        sys.stdout = stdout


def folders() -> Iterator[Case]:
    """Outputs that name a folder, which is there or isn't."""
    Path("there").mkdir()
    for name in ("new/", "there", "there/", "there/new/"):
        before = sorted(Path().rglob("*"))
        said = refusal(lambda name=name: write_submission(name, [1], [2]))
        yield name, bool(said) and sorted(Path().rglob("*")) == before


KINDS: dict[str, Callable[[], Iterator[Case]]] = {
    "order of the values: 9 kinds of images, 2 orders, 3 shapes, 1, 20 and 1,000 images": layouts,
    "no images, or not in any order": no_images,
    "grey pictures of 8 to 32 bits, PNG and TIFF": depths,
    "colour pictures of 8 bits: six formats, seven modes": formats,
    "pictures of 50 to 180 megapixels": large_pictures,
    "ids: numbers and names of any type, four protocols; and wrong ones": ids,
    "files of another kind, called .pkl": strangers,
    "own weights with changed constants: normalisation, calibration": own_weights,
    "outputs that name a folder": folders,
}


def measured() -> dict[str, list[int]]:
    """{kind: [right, tried]}; what was wrong is named on standard error."""
    counts = {}
    for kind, cases in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            results = list(cases())
            os.chdir(ROOT)
        wrong = [name for name, right in results if not right]
        print(f"{kind}: {len(wrong)} wrong: {'; '.join(wrong)[:1000]}", file=sys.stderr)
        counts[kind] = [len(results) - len(wrong), len(results)]
    return counts


def section(before: dict[str, list[int]], now: dict[str, list[int]]) -> str:
    """Rows of other measurements can be added by hand below: only these lines are replaced."""
    lines = [
        HEADING,
        "",
        "Inputs whose results were wrong and looked right, or refused without saying why.",
        "Right is the true answer, or a refusal of one line where there is none. Made by",
        "`scripts/wrong_results.py` from images of CIFAR-10's test set.",
        "",
        f"| kind | tried | right before, at {BEFORE} | right now |",
        "| --- | --- | --- | --- |",
    ]
    for kind, (right, tried) in now.items():
        lines.append(f"| {kind} | {tried} | {before[kind][0]} | {right} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    if OPTIONS.json:
        print(json.dumps(measured()))
        return
    words = ["-m", "scripts.wrong_results", "--json", "--code", str(OPTIONS.before)]
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, encoding="utf-8", check=True
    )
    print(done.stderr, file=sys.stderr)
    text = section(json.loads(done.stdout), measured())
    print(text)
    if OPTIONS.write:
        path = ROOT / "results" / "reliability.md"
        above, _, old = path.read_text(encoding="utf-8").partition(HEADING)
        # What somebody has put behind the rows of the table stays.
        own = {line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")}
        added = [r for r in old.splitlines(keepends=True) if r.startswith("|")]
        added = [row for row in added if row.split("|")[1].strip() not in own]
        path.write_text(above.rstrip() + "\n\n" + text + "".join(added), encoding="utf-8")


if __name__ == "__main__":
    main()
