"""Compute what the notebooks say about the package's weights, and store it beside their records.

    python -m scripts.store_answers [report] [best]

It writes answers.json and answers.safetensors into results/<recipe>-seed42: the logits of all test
images, of the same averaged with their mirror images, and of the synthetic copy of the custom test
set; the nearest training images of every mistake; and the accuracy on the plain training images.
notebooks/course/answers.py reads them. Run it again when weights have changed. Until then the
notebooks compute everything anew.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import safetensors.torch
import torch.nn.functional as F
from torch import Tensor

from cifar_lib import evaluate, shift
from cifar_lib.data import ImageSet, Normalization, load_cifar10
from cifar_lib.errors import InputError
from cifar_lib.files import write_atomically
from cifar_lib.hardware import choose_device, describe, prepare
from cifar_lib.model import SHIPPED
from notebooks.course.answers import AUTO, RECORD, TENSORS, Network, digest, question
from notebooks.course.corruptions import generate_test_file
from notebooks.course.reference import RESULTS

NAMES = ("report", "best")  # the package's files of weights
PRECISION = "fp32"  # that of the README's numbers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="report, best; default: both")
    names = parser.parse_args().names or NAMES
    try:
        unknown = sorted(set(names) - set(NAMES))
        if unknown:
            raise InputError(f"weights: expected {' or '.join(NAMES)}, got {', '.join(unknown)}")
        train, test = load_cifar10(home=RESULTS.parent / "data")
        prepare(choose_device(), PRECISION)
        for name in names:
            store(name, train, test)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def store(name: str, train: ImageSet, test: ImageSet) -> None:
    """Compute and write the answers of the package's weights `name`."""
    weights = SHIPPED.with_name(f"{name}.safetensors")
    device = choose_device()
    network = Network(weights, device, PRECISION)

    # Logits, by name, and the questions that they answer.
    print(f"{name}: logits", flush=True)
    asked = test_logits(network, test.images)
    if name == "report":  # notebook 5 looks at these weights
        asked |= custom_logits(network, test)
    tensors = {key: logits.half() for key, (logits, _) in asked.items()}
    logits = {key: answered for key, (_, answered) in asked.items()}

    # The training images: how many are classified correctly, and which ones mistakes resemble. The
    # mistakes are those of the stored logits, so that the file agrees with itself.
    print(f"{name}: training images", flush=True)
    answers = tensors["test"].float().argmax(1)
    mistakes = (answers != test.labels).nonzero()[:, 0]  # (m,)
    known = network.features(train.images)  # (50000, channels)
    train_logits = F.linear(known, *(p.cpu() for p in network.model.linear.parameters()))
    correct = int((train_logits.argmax(1) == train.labels).sum())
    ours = F.normalize(network.features(test.images[mistakes]), dim=1)  # (m, channels)
    nearest = (ours @ F.normalize(known, dim=1).T).topk(5, dim=1)
    tensors |= {"mistakes": mistakes, "nearest": nearest.indices, "cosines": nearest.values}

    # Write them.
    record = {
        "weights": {"file": weights.name, "sha256": digest(weights.read_bytes())},
        "precision": PRECISION,
        "logits": logits,
        "training_images": {"n": len(train), "correct": correct},
        "environment": describe(device),
    }
    folder = RESULTS / f"{name}-seed42"
    write_atomically(folder / TENSORS, safetensors.torch.save(tensors))
    write_atomically(folder / RECORD, (json.dumps(record, indent=2) + "\n").encode())
    right = f"{correct:,} of {len(train):,} training images correct"
    print(f"{name}: {len(mistakes)} mistakes, {right}", flush=True)


def test_logits(network: Network, images: Tensor) -> dict[str, tuple[Tensor, dict]]:
    """Return the logits of the test images, and of these averaged with their mirror images."""
    normalization = network.info.test_normalization
    views = evaluate.predict_views(network.model, images, normalization, PRECISION)  # (2, N, 10)
    asked = {"test": (views[0], "none"), "test, flip": (views.mean(0), "flip")}
    return {
        name: (logits, _answered(question(images, normalization, "none", tta)))
        for name, (logits, tta) in asked.items()
    }


def custom_logits(network: Network, test: ImageSet) -> dict[str, tuple[Tensor, dict]]:
    """Return the logits of the synthetic copy of the custom test set, in notebook 5's ways."""
    with tempfile.TemporaryDirectory() as folder:
        images = generate_test_file(Path(folder) / "custom_test.pkl", test).images

    # Three ways to normalise.
    info = network.info
    ways = {
        "custom, as in training": info.training_normalization,
        "custom, as in testing": info.test_normalization,
        "custom, own statistics": Normalization.of(images),
    }
    asked = {}
    for name, normalization in ways.items():
        logits = network.compute(images, normalization)
        asked[name] = logits, _answered(question(images, normalization, "none", "none"))

    # The default of `submit`.
    verdict = json.loads((RESULTS / "shift" / "verdict.json").read_text(encoding="utf-8"))
    tta = verdict["default"]["tta"]
    adapted = shift.predict_adapted(network.model, images, info.test_normalization, PRECISION, tta)
    what = question(images, info.test_normalization, AUTO, tta)
    asked["custom, adapted"] = adapted.logits, _answered(what, adapted.method, adapted.why)
    return asked


def _answered(asked: dict, method: str = "none", why: str = "it was asked for") -> dict:
    return {"question": asked, "method": method, "why": why}


if __name__ == "__main__":
    raise SystemExit(main())
