"""Every mistake at a click: an HTML page that shows each mistake and what is known about it.

The page needs neither the internet nor a server. Its words are in mistakes.html.jinja, its looks in
mistakes.css, and what happens at a click is in mistakes.js. This module gathers the page's data.
"""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from IPython.display import display
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from matplotlib.colors import to_hex
from PIL import Image, features
from torch import Tensor

from cifar_lib.data import CLASSES, ImageSet
from cifar_lib.evaluate import accuracy, confusion_matrix
from cifar_lib.explain import grad_cam
from notebooks.course.answers import Network

NEAR_TIE = 0.3  # a correct answer whose probability leads by less than this is on the page, too
SHARES_IN_ONE = 100_000  # probabilities are stored as whole numbers, and 1 as this number
HEAT_LEVELS = 16  # a cell of a heat map is stored as one hexadecimal digit
SPRITE_COLUMNS = 64
SPRITE_QUALITY = 80


@dataclass(frozen=True)
class NetworkAnswers:
    """What a network predicts for N test images, and what is known about its m mistakes.

    name: what the page calls the network.
    logits: float32 (N, 10).
    temperature: what logits are divided by before they become probabilities.
    mirrored: the logits of the mirror images, float32 (N, 10).
    mistakes: the positions of the misclassified test images, int64 (m,). The next three fields
    have a row for each of them.
    nearest: the positions of the five nearest training images, int64 (m, 5), the nearest first.
    cosines: the cosines between their features and the mistake's, float32 (m, 5).
    heat: Grad-CAM for the prediction and for the label, float32 (m, 2, 8, 8), in [0, 1].

    All but the first three may be None. The page leaves out what isn't known.
    """

    name: str
    logits: Tensor
    temperature: float
    mirrored: Tensor | None = None
    mistakes: Tensor | None = None
    nearest: Tensor | None = None
    cosines: Tensor | None = None
    heat: Tensor | None = None

    @property
    def probabilities(self) -> Tensor:
        """Return the calibrated probabilities, float32 (N, 10)."""
        return (self.logits / self.temperature).softmax(1)


def answers_of(
    network: Network, test: ImageSet, logits: Tensor, temperature: float
) -> NetworkAnswers:
    """Return what a network predicts for test images, and heat maps of its mistakes.

    logits: what `network.predict` gives for these images, float32 (N, 10).
    temperature: what these are divided by before they become probabilities.

    The mirror images' logits and the nearest training images are included if they are stored
    (notebooks/course/answers.py). The heat maps are computed: those of 500 mistakes take two
    processor cores about twenty seconds. The network is called by its recipe's name.
    """
    guesses = logits.argmax(1)
    mistakes = (guesses != test.labels).nonzero()[:, 0]
    answers = NetworkAnswers(
        name=network.info.recipe,
        logits=logits,
        temperature=temperature,
        mistakes=mistakes,
        heat=_heat(network, test.images[mistakes], guesses[mistakes], test.labels[mistakes]),
    )
    stored = network.stored
    if stored is None or not torch.equal(stored.tensors["mistakes"], mistakes):
        return answers
    return replace(
        answers,
        mirrored=2 * network.predict(test.images, tta="flip") - logits,  # "flip": mean of both
        nearest=stored.tensors["nearest"],
        cosines=stored.tensors["cosines"],
    )


def _heat(network: Network, images: Tensor, guesses: Tensor, labels: Tensor) -> Tensor:
    """Return Grad-CAM for the predictions and for the labels: float32 (m, 2, 8, 8), in [0, 1]."""
    normalization = network.info.test_normalization
    pieces = [torch.zeros(0, 2, 8, 8)]
    for piece in torch.arange(len(images)).split(50):  # Grad-CAM keeps all layers' outputs
        twice = images[piece].repeat(2, 1, 1, 1)  # (2 * piece, 3, 32, 32)
        classes = torch.cat([guesses[piece], labels[piece]])  # (2 * piece,)
        heat = grad_cam(network.model, twice, classes, normalization)  # (2 * piece, 32, 32)

        # The network has 8x8 cells, which Grad-CAM enlarges. Take the middles of the cells.
        cells = F.interpolate(heat[:, None], size=(8, 8), mode="bilinear")  # (2 * piece, 1, 8, 8)
        pieces.append(cells.view(2, -1, 8, 8).transpose(0, 1))  # (piece, 2, 8, 8)
    return torch.cat(pieces)


def mistakes_page(
    train: ImageSet,
    test: ImageSet,
    networks: Sequence[NetworkAnswers],
    votes: pd.DataFrame | None = None,
    note: str | None = None,
) -> str:
    """Return the page as the text of an HTML file.

    train: the training images with their labels. The positions in `nearest` refer to them.
    test: the N test images with their labels. If they have ids, the page numbers them by these.
    networks: the networks whose mistakes are shown. If there are several, the page compares them.
    votes: what people said about labels, one row per image they saw, as in results/label-errors.
    note: what the page says about the data, if it isn't CIFAR-10.
    """
    album = _Album(test, train)
    shown = _shown(test.labels, networks)  # (s,)
    answers = [_answers(network, shown, album) for network in networks]
    look_alikes = _look_alikes(shown, album)

    images = []
    for i, position in enumerate(shown.tolist()):
        index = album.index("test", position)
        image = {
            "index": index,
            "label": int(test.labels[position]),
            "picture": album.number("test", position),
            "answers": [of_network[i] for of_network in answers],
            "lookAlike": look_alikes[i],
            "votes": _votes_on(index, votes),
        }
        images.append(image)

    data = {
        "classes": CLASSES,
        "networks": [_summary(network, test.labels) for network in networks],
        "images": images,
        "pictures": album.captions(),
        "columns": SPRITE_COLUMNS,
        "sharesInOne": SHARES_IN_ONE,
        "heatColours": _heat_colours(),
    }
    return _template("mistakes.html.jinja").render(
        data=data,
        networks=data["networks"],
        sprite=album.sprite(),
        near_tie=round(100 * NEAR_TIE),
        voted=any(image["votes"] for image in images),
        size=len(test),
        note=note,
    )


def in_frame(page: str, height: int = 900) -> str:
    """Return HTML that shows a page, `height` pixels high, inside another page or a notebook.

    In a frame of its own, the page's styles and ids can't collide with those around it. Nor can
    they collide if the page is shown twice. Scripts run in the frame, but can't reach outside it.
    """
    style = f"width: 100%; height: {height}px; border: 1px solid #8888"
    title = "Every mistake at a click"
    frame = f'<iframe sandbox="allow-scripts" style="{style}" title="{title}"'
    return f'<div>{frame} srcdoc="{html.escape(page)}"></iframe></div>'


def show_page(page: str) -> None:
    """Show a page in the output of a notebook's cell.

    The output is marked, so that scripts/build_pages.py leaves it out of the stored notebook.
    """
    words = "the page of all mistakes: run this cell, or open docs/mistakes.html in a browser"
    bundle = {"text/html": in_frame(page), "text/plain": words}
    display(bundle, raw=True, metadata={"text/html": {"stored": False}})


# What the page shows.


class _Album:
    """The pictures on the page, each of them once, numbered as they come."""

    def __init__(self, test: ImageSet, train: ImageSet):
        self.sets = {"test": test, "training": train}
        self.numbers: dict[tuple[str, int], int] = {}  # {(set's name, position): number}

    def number(self, name: str, position: int) -> int:
        """Return the number of a picture, which is added if it isn't there yet."""
        return self.numbers.setdefault((name, position), len(self.numbers))

    def index(self, name: str, position: int) -> int | str:
        """Return what the page calls an image of a set: its id, or its position."""
        ids = self.sets[name].ids
        return position if ids is None else ids[position]

    def captions(self) -> list[tuple[str, int | str, int]]:
        """Return each picture's set, index and label."""
        return [
            (name, self.index(name, position), int(self.sets[name].labels[position]))
            for name, position in self.numbers
        ]

    def sprite(self) -> str:
        """Return all pictures as one, row by row, as a data: address.

        It is a WebP, or a JPEG if Pillow can't write WebP.
        """
        rows = -(-len(self.numbers) // SPRITE_COLUMNS) or 1
        tiles = torch.zeros(rows * SPRITE_COLUMNS, 3, 32, 32, dtype=torch.uint8)
        for (name, position), number in self.numbers.items():
            tiles[number] = self.sets[name].images[position]
        # (rows * columns, 3, 32, 32) -> (rows, 32, columns, 32, 3) -> (32 * rows, 32 * columns, 3)
        tiles = tiles.view(rows, SPRITE_COLUMNS, 3, 32, 32).permute(0, 3, 1, 4, 2)
        whole = Image.fromarray(tiles.reshape(32 * rows, 32 * SPRITE_COLUMNS, 3).numpy())

        kind, options = ("webp", {"method": 6}) if features.check("webp") else ("jpeg", {})
        content = io.BytesIO()
        whole.save(content, kind, quality=SPRITE_QUALITY, **options)
        return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def _shown(labels: Tensor, networks: Sequence[NetworkAnswers]) -> Tensor:
    """Return the positions of the images that at least one network misclassifies, or nearly."""
    is_shown = torch.zeros(len(labels), dtype=torch.bool)
    for network in networks:
        first, second = network.probabilities.topk(2).values.T  # (N,) each
        is_shown |= (network.logits.argmax(1) != labels) | (first - second < NEAR_TIE)
    return is_shown.nonzero()[:, 0]


def _answers(network: NetworkAnswers, shown: Tensor, album: _Album) -> list[dict]:
    """Return a network's answer to each image that is shown, ready for JSON."""
    logits = network.logits[shown]  # (s, 10)
    guesses = logits.argmax(1, keepdim=True)  # (s, 1)
    runners_up = logits.scatter(1, guesses, -torch.inf).argmax(1)  # (s,)
    parts = (guesses[:, 0].tolist(), runners_up.tolist(), _as_shares(network.probabilities[shown]))
    answers = [
        {"guess": guess, "runnerUp": runner_up, "shares": shares}
        for guess, runner_up, shares in zip(*parts, strict=True)
    ]
    if network.mirrored is not None:
        mirrored = replace(network, logits=network.mirrored[shown])
        for answer, shares in zip(answers, _as_shares(mirrored.probabilities), strict=True):
            answer["mirroredShares"] = shares

    # What is known about its mistakes.
    if network.mistakes is not None:
        answer_at = dict(zip(shown.tolist(), answers, strict=True))
        for i, position in enumerate(network.mistakes.tolist()):
            answer = answer_at[position]
            if network.nearest is not None:
                numbers = [album.number("training", k) for k in network.nearest[i].tolist()]
                cosines = [round(cosine, 2) for cosine in network.cosines[i].tolist()]
                answer["nearest"] = list(zip(numbers, cosines, strict=True))
            if network.heat is not None:
                answer["heat"] = [_as_digits(heat) for heat in network.heat[i]]
    return answers


def _as_shares(probabilities: Tensor) -> list[list[int]]:
    """Return probabilities, float32 (s, 10), as whole numbers; 1 becomes SHARES_IN_ONE."""
    return (probabilities.double() * SHARES_IN_ONE).round().long().tolist()


def _as_digits(heat: Tensor) -> str:
    """Return a heat map (8, 8) in [0, 1] as 64 hexadecimal digits, row by row."""
    levels = (heat * (HEAT_LEVELS - 1)).round().long()  # (8, 8)
    return "".join(f"{level:x}" for level in levels.flatten().tolist())


def _heat_colours() -> list[str]:
    """Return the colour of each heat level, as #rrggbb."""
    colours = matplotlib.colormaps["inferno"](np.linspace(0, 1, HEAT_LEVELS))
    return [to_hex(colour) for colour in colours]


def _look_alikes(shown: Tensor, album: _Album) -> list[tuple[int, float]]:
    """Return the number and the likeness of the image that is most like each shown image.

    All other test and training images are searched, without any network. The likeness of two images
    is the cosine between their details, at most 1.
    """
    test, train = album.sets.values()
    known = torch.cat([_details(test.images), _details(train.images)])  # (N + M, 768)
    found = []
    for piece in shown.split(100):
        likeness = known[piece] @ known.T  # (piece, N + M)
        likeness.scatter_(1, piece[:, None], -1)  # not itself
        best = likeness.max(1)
        for position, value in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            is_test = position < len(test)
            name = "test" if is_test else "training"
            number = album.number(name, position if is_test else position - len(test))
            found.append((number, round(value, 3)))
    return found


def _details(images: Tensor) -> Tensor:
    """Return the images as 16x16 pixels without their coarse colours, scaled to length 1.

    uint8 (n, 3, 32, 32) -> float32 (n, 768). The coarse colours are those of the image's four
    quarters. They are left out because they make all ships at sea alike.
    """
    pieces = [torch.zeros(0, 768)]
    for piece in images.split(1000):
        small = F.avg_pool2d(piece.float(), 2)  # (1000, 3, 16, 16)
        coarse = F.interpolate(F.avg_pool2d(small, 8), size=(16, 16), mode="bilinear")
        pieces.append(F.normalize((small - coarse).flatten(1)))
    return torch.cat(pieces)


def _votes_on(index: int | str, votes: pd.DataFrame | None) -> dict | None:
    """Return what people said about an image's label, ready for JSON; None if nobody was asked."""
    if votes is None or index not in votes.index:
        return None
    row = votes.loc[index]
    counts = [int(row[f"votes_{said}"]) for said in ("label", "guess", "both", "neither")]
    return {"label": str(row.label), "guess": str(row.guess), "counts": counts}


def _summary(network: NetworkAnswers, labels: Tensor) -> dict:
    """Return what the page says about a network as a whole, ready for JSON."""
    matrix = confusion_matrix(network.logits, labels)
    return {
        "name": network.name,
        "accuracy": f"{100 * accuracy(network.logits, labels):.2f} %",
        "mistakes": int(matrix.sum() - matrix.trace()),
        "matrix": matrix.tolist(),
    }


def _template(name: str) -> Template:
    """Return the template `name` from this file's folder. It escapes all values it is given."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment.get_template(name)
