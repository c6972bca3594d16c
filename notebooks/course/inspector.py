"""One test image under the magnifying glass."""

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from cifar_lib import evaluate, explain
from cifar_lib.data import CLASSES, stratified_split
from cifar_lib.errors import InputError
from cifar_lib.model import ResNet
from notebooks.course.plots import inspection
from notebooks.course.session import Session


class Inspector:
    """One test image at a time: what the network answers, where it looks, what it resembles.

    `temperature` divides the logits before probabilities are made of them. Neighbours are looked
    for among `compared` training images, as many of each class, whose features are computed once.
    """

    def __init__(
        self, session: Session, model: ResNet, info: dict, temperature: float, compared: int
    ):
        self.test, self.model, self.temperature = session.test, model, temperature
        self.mean_std, self.precision = (info["mean"], info["std"]), session.precision
        _, part = stratified_split(session.train.labels, compared, seed=0)
        self.known = session.train[part]
        self.known_features = self.features(self.known.images)

    def features(self, images: Tensor) -> Tensor:
        return evaluate.features(self.model, images, *self.mean_std, self.precision)

    def nearest(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest training images of each image: cosine, position in `known`, (N, 5) each."""
        ours, known = (F.normalize(f, dim=1) for f in (self.features(images), self.known_features))
        found = (ours @ known.T).topk(5, dim=1)
        return found.values, found.indices

    def figure(self, index: int) -> Figure:
        """Test image `index`: calibrated probabilities, Grad-CAM for the answer and for the true
        class (the runner-up where the answer is right), and the nearest training images."""
        if index not in range(len(self.test)):
            raise InputError(
                f"test image: expected 0 to {len(self.test) - 1}, got {index!r}: choose another"
            )
        image, label = self.test.images[index : index + 1], int(self.test.labels[index])
        logits = evaluate.predict(self.model, image, *self.mean_std, self.precision)
        probabilities, classes = (logits / self.temperature).softmax(1)[0].sort(descending=True)
        answer, runner_up = classes[:2].tolist()
        asked = [answer, runner_up if answer == label else label]
        heat = explain.grad_cam(
            self.model, image.repeat(2, 1, 1, 1), torch.tensor(asked), *self.mean_std
        )
        cosine, position = self.nearest(image)
        near = self.known[position[0]]
        captions = zip(near.labels.tolist(), cosine[0], strict=True)
        return inspection(
            image[0].permute(1, 2, 0).numpy(),
            {CLASSES[c]: float(p) for c, p in zip(classes[:5], probabilities, strict=False)},
            {f"speaks for {CLASSES[c]}": each.numpy() for c, each in zip(asked, heat, strict=True)},
            near.images.permute(0, 2, 3, 1).numpy(),
            [f"{CLASSES[c]}, {similarity:.2f}" for c, similarity in captions],
            f"Test image {index}: labelled {CLASSES[label]}, taken for {CLASSES[answer]}",
        )
