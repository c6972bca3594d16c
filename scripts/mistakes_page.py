"""Write the page of every mistake that the package's weights make on CIFAR-10's test images.

    python -m scripts.mistakes_page [--out docs/mistakes.html]

The answers are read from results/ (scripts/store_answers.py). Only the heat maps are computed, in
about a minute. After weights or the page's texts (notebooks/course/mistakes.*) have changed, run it
again.
"""

import argparse
import sys

import pandas as pd
import torch

from cifar_lib.data import load_cifar10
from cifar_lib.errors import InputError
from cifar_lib.files import output_file, write_atomically
from cifar_lib.hardware import prepare
from cifar_lib.model import PRETRAINED, SHIPPED
from notebooks.course.answers import Network
from notebooks.course.mistakes import answers_of, mistakes_page
from notebooks.course.reference import LABEL_CHECKS
from scripts.build_pages import MISTAKES

WEIGHTS = (PRETRAINED, SHIPPED.with_name("best.safetensors"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=MISTAKES, metavar="FILE", help="default: %(default)s")
    options = parser.parse_args()
    try:
        path = output_file(options.out)
        page = package_page()
        write_atomically(path, page.encode())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{path}: {len(page.encode()) / 1e6:.2f} MB")
    return 0


def package_page() -> str:
    """Return the page of the package's two files of weights.

    Raises InputError if CIFAR-10 is neither found nor downloaded.
    """
    train, test = load_cifar10()
    cpu = torch.device("cpu")
    prepare(cpu, "fp32")
    answers = []
    for weights in WEIGHTS:
        network = Network(weights, cpu, "fp32")
        print(f"heat maps of {network.info.recipe}", flush=True)
        logits = network.predict(test.images)
        answers.append(answers_of(network, test, logits, network.info.temperature))
    votes = pd.read_csv(LABEL_CHECKS, index_col="index")
    return mistakes_page(train, test, answers, votes)


if __name__ == "__main__":
    raise SystemExit(main())
