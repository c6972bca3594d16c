"""A close look at one test image."""

import functools

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from cifar_lib import explain
from cifar_lib.data import CLASSES, REAL, stratified_split
from cifar_lib.errors import InputError
from notebooks.course.answers import Network
from notebooks.course.session import Session
from notebooks.course.sheets import inspection

SAMPLE = 2000  # how many training images are searched for the nearest ones


class Inspector:
    """Draws a test image, the network's answer, where the network looks, and similar images.

    probabilities: of all test images, float32 (N, 10).

    For the test images that the package's weights misclassify, the nearest training images are
    stored (notebooks/course/answers.py). For other images they are looked for among SAMPLE training
    images, whose features are computed at the first such search.
    """

    def __init__(self, session: Session, network: Network, probabilities: Tensor):
        self.train, self.test, self.network = session.train, session.test, network
        self.probabilities = probabilities

    @functools.cached_property
    def sample(self) -> Tensor:
        """Return the positions of the training images to search, equally many per class: int64."""
        if len(self.train) <= SAMPLE:
            return torch.arange(len(self.train))
        return stratified_split(self.train.labels, SAMPLE, seed=0)[1]

    @functools.cached_property
    def sample_features(self) -> Tensor:
        """Return the features of the sample, each of length 1: float32 (sample, channels)."""
        return F.normalize(self.network.features(self.train.images[self.sample]), dim=1)

    def nearest(self, index: int) -> tuple[Tensor, Tensor, int]:
        """Return the five nearest training images of test image `index`, the nearest first.

        Returns their positions in the training set, int64 (5,), their cosines, float32 (5,), and
        the number of training images that were searched.
        """
        # What is stored is about CIFAR-10's images.
        if self.network.stored and self.train.source == self.test.source == REAL:
            neighbours = self.network.stored.neighbours(index)
            if neighbours:
                return *neighbours, len(self.train)

        # Search the sample.
        image = self.test.images[index : index + 1]
        ours = F.normalize(self.network.features(image), dim=1)  # (1, channels)
        nearest = (ours @ self.sample_features.T)[0].topk(5)
        return self.sample[nearest.indices], nearest.values, len(self.sample)

    def figure(self, index: int) -> Figure:
        """Draw test image `index`, what the network makes of it, and its nearest training images.

        Grad-CAM is drawn for the answer and for the true class. If the answer is the true class, it
        is drawn for the answer and the runner-up.

        Raises InputError if there is no such test image.
        """
        if index not in range(len(self.test)):
            raise InputError(
                f"test image: expected 0 to {len(self.test) - 1}, got {index!r}: choose another"
            )
        image, label = self.test.images[index : index + 1], int(self.test.labels[index])

        # What the network answers.
        probabilities, classes = self.probabilities[index].sort(descending=True)
        answer, runner_up = classes[:2].tolist()

        # Where it looks for that answer, and for the other class.
        asked = [answer, runner_up if answer == label else label]
        twice = image.repeat(2, 1, 1, 1)  # (2, 3, 32, 32)
        normalization = self.network.info.test_normalization
        heat = explain.grad_cam(self.network.model, twice, torch.tensor(asked), normalization)

        # What the image resembles.
        positions, cosines, among = self.nearest(index)
        near = self.train[positions]
        neighbours = zip(near.labels.tolist(), cosines.tolist(), strict=True)

        first_five = zip(classes[:5].tolist(), probabilities[:5].tolist(), strict=True)
        return inspection(
            image[0].permute(1, 2, 0).numpy(),  # (32, 32, 3)
            probabilities={CLASSES[c]: probability for c, probability in first_five},
            maps={f"Evidence for {CLASSES[asked[i]]}": heat[i].numpy() for i in (0, 1)},
            neighbours=near.images.permute(0, 2, 3, 1).numpy(),  # (5, 32, 32, 3)
            captions=[f"{CLASSES[c]}, {cosine:.3f}" for c, cosine in neighbours],
            among=among,
            title=f"Test image {index}, labelled {CLASSES[label]}, predicted {CLASSES[answer]}",
        )
