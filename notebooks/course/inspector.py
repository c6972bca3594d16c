"""One test image under the magnifying glass."""

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from cifar_lib import evaluate, explain
from cifar_lib.data import CLASSES, Normalization, stratified_split
from cifar_lib.errors import InputError
from cifar_lib.model import ResNet
from notebooks.course.session import Session
from notebooks.course.sheets import inspection


class Inspector:
    """One test image at a time: what the network answers, where it looks, what it resembles.

    `temperature` divides the logits before they become probabilities. Neighbours are looked for
    among `compared` training images, as many of each class, whose features are computed once.
    """

    def __init__(
        self,
        session: Session,
        model: ResNet,
        normalization: Normalization,
        temperature: float,
        compared: int,
    ):
        self.test, self.model, self.temperature = session.test, model, temperature
        self.normalization, self.precision = normalization, session.precision
        _, part = stratified_split(session.train.labels, compared, seed=0)
        self.known = session.train[part]
        self.known_features = self.features(self.known.images)

    def features(self, images: Tensor) -> Tensor:
        """Return what the last layer sees of each image: float32 (N, channels)."""
        return evaluate.features(self.model, images, self.normalization, self.precision)

    def nearest(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the five nearest training images of each image: cosines and positions in `known`.

        uint8 (N, 3, 32, 32) -> float32 (N, 5) and int64 (N, 5), the nearest first.
        """
        ours = F.normalize(self.features(images), dim=1)  # (N, channels)
        known = F.normalize(self.known_features, dim=1)  # (compared, channels)
        nearest = (ours @ known.T).topk(5, dim=1)
        return nearest.values, nearest.indices

    def figure(self, index: int) -> Figure:
        """Draw test image `index`, what the network makes of it, and its nearest training images.

        Grad-CAM is drawn for the answer, and for the true class; where that is the answer, for the
        runner-up.

        Raises InputError if there is no such test image.
        """
        if index not in range(len(self.test)):
            raise InputError(
                f"test image: expected 0 to {len(self.test) - 1}, got {index!r}: choose another"
            )
        image, label = self.test.images[index : index + 1], int(self.test.labels[index])

        # What the network answers.
        logits = evaluate.predict(self.model, image, self.normalization, self.precision)
        probabilities, classes = (logits / self.temperature).softmax(1)[0].sort(descending=True)
        answer, runner_up = classes[:2].tolist()

        # Where it looks for that answer, and for the other class.
        asked = [answer, runner_up if answer == label else label]
        twice = image.repeat(2, 1, 1, 1)  # (2, 3, 32, 32)
        heat = explain.grad_cam(self.model, twice, torch.tensor(asked), self.normalization)

        # What the image resembles.
        cosines, positions = self.nearest(image)
        near = self.known[positions[0]]
        neighbours = zip(near.labels.tolist(), cosines[0].tolist(), strict=True)

        first_five = zip(classes[:5].tolist(), probabilities[:5].tolist(), strict=True)
        return inspection(
            image[0].permute(1, 2, 0).numpy(),  # (32, 32, 3)
            probabilities={CLASSES[c]: probability for c, probability in first_five},
            maps={f"speaks for {CLASSES[asked[i]]}": heat[i].numpy() for i in (0, 1)},
            neighbours=near.images.permute(0, 2, 3, 1).numpy(),  # (5, 32, 32, 3)
            captions=[f"{CLASSES[c]}, {cosine:.2f}" for c, cosine in neighbours],
            title=f"Test image {index}: labelled {CLASSES[label]}, taken for {CLASSES[answer]}",
        )
