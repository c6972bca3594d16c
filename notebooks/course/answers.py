"""A network's answers to whole sets of images, which are stored under results/ or computed here.

Ten thousand images take a GPU a second and a CPU minutes. `python -m scripts.store_answers` has
therefore computed the answers of the package's weights once, and `Network` reads them. A stored
answer is used only for exactly the same question, which consists of a file of weights, images,
normalization, adaptation and test-time augmentation. All of these are compared. Everything else is
computed.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor
from tqdm.auto import tqdm

from cifar_lib import evaluate, shift
from cifar_lib.data import Normalization
from cifar_lib.hardware import memory_format
from cifar_lib.model import PRETRAINED, SHIPPED, load_model
from cifar_lib.shift import Adapted
from notebooks.course.reference import RESULTS

RECORD, TENSORS = "answers.json", "answers.safetensors"  # in the folder of the weights' run
AUTO = "auto"  # the adaptation that `shift.predict_adapted` decides on
AT_A_TIME = 1000  # images between two moves of the progress bar


class Network:
    """The network that a notebook examines: its weights, and its answers.

    model: on the device, in evaluation mode.
    info: what the file says about the weights.
    stored: their stored answers, or None.
    """

    def __init__(self, weights: str | Path, device: torch.device, precision: str):
        """Load a file of weights, or the package's own for `pretrained`.

        Raises InputError if the file doesn't hold weights of this package.
        """
        model, self.info = load_model(weights)
        self.model = model.to(device, memory_format=memory_format(device))
        self.precision = precision
        file = SHIPPED if str(weights) == PRETRAINED else Path(weights)
        self.stored = stored_answers(digest(file.read_bytes()))

    def predict(
        self, images: Tensor, normalization: Normalization | None = None, tta: str = "none"
    ) -> Tensor:
        """Return the logits of images, uint8 (N, 3, 32, 32): float32 (N, 10), on the CPU.

        normalization: the weights' own for testing, unless another one is given.
        tta: the test-time augmentation, as in `evaluate.predict`.
        """
        normalization = normalization or self.info.test_normalization
        if self.stored is not None:
            found = self.stored.find(question(images, normalization, "none", tta))
            if found is not None:
                return found.logits
        return self.compute(images, normalization, tta)

    def compute(
        self, images: Tensor, normalization: Normalization | None = None, tta: str = "none"
    ) -> Tensor:
        """Return the same as `predict`, but compute it even if it is stored."""
        normalization = normalization or self.info.test_normalization
        parts = images.split(AT_A_TIME)
        bar = tqdm(parts, desc="images", unit_scale=AT_A_TIME, disable=len(parts) == 1, leave=False)
        logits = [
            evaluate.predict(self.model, part, normalization, self.precision, tta) for part in bar
        ]
        return torch.cat(logits)

    def predict_adapted(self, images: Tensor, tta: str = "none") -> Adapted:
        """Return the result of `shift.predict_adapted` for images, uint8 (N, 3, 32, 32)."""
        if self.stored is not None:
            found = self.stored.find(question(images, self.info.test_normalization, AUTO, tta))
            if found is not None:
                return found
        return shift.predict_adapted(
            self.model, images, self.info.test_normalization, self.precision, tta
        )

    def features(self, images: Tensor) -> Tensor:
        """Return the last layer's inputs for each image: float32 (N, channels), on the CPU."""
        return evaluate.features(self.model, images, self.info.test_normalization, self.precision)


@dataclass(frozen=True)
class StoredAnswers:
    """The stored answers of one file of weights, from the folder of its run under results/.

    record: answers.json. It says which question each tensor of logits answers, how many of the
    unaugmented training images are classified correctly, and on which machine all this was
    computed.

    tensors: answers.safetensors.
    - Logits, float16 (N, 10), under the names that are in the record.
    - `mistakes`, int64 (m,): the misclassified test images, in ascending order.
    - `nearest`, int64 (m, 5): for each mistake the five training images, of all 50,000, with the
      most similar features, the most similar first.
    - `cosines`, float32 (m, 5): the cosines between their features and the mistake's.
    """

    record: dict
    tensors: dict[str, Tensor]

    def find(self, asked: dict) -> Adapted | None:
        """Return the stored answer to this question, with logits float32 (N, 10), or None."""
        for name, answered in self.record["logits"].items():
            if answered["question"] == asked:
                logits = self.tensors[name].float()
                return Adapted(logits, answered["method"], answered["why"])
        return None

    def neighbours(self, index: int) -> tuple[Tensor, Tensor] | None:
        """Return the positions and cosines, (5,) each, of a mistake's nearest training images.

        Returns None if test image `index` isn't a mistake. The positions and indices are those of
        CIFAR-10.
        """
        at = (self.tensors["mistakes"] == index).nonzero()  # (0, 1) or (1, 1)
        if len(at) == 0:
            return None
        return self.tensors["nearest"][at[0, 0]], self.tensors["cosines"][at[0, 0]]


def stored_answers(weights_digest: str) -> StoredAnswers | None:
    """Return what is stored for the file of weights with this digest, or None."""
    for path in sorted(RESULTS.glob(f"*/{RECORD}")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["weights"]["sha256"] == weights_digest:
            return StoredAnswers(record, safetensors.torch.load_file(path.with_name(TENSORS)))
    return None


def question(images: Tensor, normalization: Normalization, adapt: str, tta: str) -> dict:
    """Return what is asked of the weights, in the record's form.

    Device and precision aren't part of it, because they change logits only by rounding.

    images: uint8 (N, 3, 32, 32).
    adapt: `none`, or AUTO.
    """
    return {
        "images": digest(images.cpu().contiguous().numpy().tobytes()),
        "mean": [round(float(value), 6) for value in normalization.mean],
        "std": [round(float(value), 6) for value in normalization.std],
        "adapt": adapt,
        "tta": tta,
    }


def digest(content: bytes) -> str:
    """Return the SHA-256 of the content, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()
