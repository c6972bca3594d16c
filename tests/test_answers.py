"""Stored answers: taken for the very question that they answer, else computed."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from cifar_lib import evaluate, shift
from cifar_lib.data import STAND_IN, Normalization
from cifar_lib.evaluate import accuracy
from cifar_lib.model import SHIPPED, ResNet, WeightsInfo, save_model
from notebooks.course import answers
from notebooks.course.answers import AUTO, RECORD, TENSORS, Network, digest, question

RESULTS = Path(__file__).parent.parent / "results"
CPU = torch.device("cpu")
HALF, QUARTER = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


@pytest.fixture
def weights(tmp_path) -> Path:
    info = WeightsInfo(recipe="report", epochs=1, data=STAND_IN, mean=HALF, std=QUARTER)
    save_model(tmp_path / "tiny.safetensors", ResNet((1,), (16,)), info)
    return tmp_path / "tiny.safetensors"


@pytest.fixture
def stored(weights, tmp_path, monkeypatch, stand_in) -> torch.Tensor:
    """Store made-up logits for the weights and twenty images; return them."""
    images = stand_in[1].images[:20]
    logits = torch.randn(20, 10).half()
    asked = question(images, Normalization(HALF, QUARTER), "none", "none")
    adapted = question(images, Normalization(HALF, QUARTER), AUTO, "none")
    record = {
        "weights": {"sha256": digest(weights.read_bytes())},
        "logits": {
            "test": {"question": asked, "method": "none", "why": "it was asked for"},
            "adapted": {"question": adapted, "method": "batchnorm", "why": "made up"},
        },
    }
    folder = tmp_path / "report-seed42"
    folder.mkdir()
    (folder / RECORD).write_text(json.dumps(record), encoding="utf-8")
    tensors = {"test": logits, "adapted": -logits}
    (folder / TENSORS).write_bytes(safetensors.torch.save(tensors))
    monkeypatch.setattr(answers, "RESULTS", tmp_path)
    return logits.float()


def test_a_stored_answer_is_taken_for_the_same_question_only(weights, stored, stand_in):
    network, images = Network(weights, CPU, "fp32"), stand_in[1].images[:20]
    normalization = network.info.test_normalization
    computed = evaluate.predict(network.model, images, normalization)
    assert torch.equal(network.predict(images), stored)
    assert torch.equal(network.compute(images), computed)

    # Each part of the question matters: the images, the normalization, the views, the weights.
    changed = images.clone()
    changed[0, 0, 0, 0] ^= 1
    assert not torch.equal(network.predict(changed)[1:], stored[1:])
    other = Normalization(HALF, (0.25, 0.25, 0.26))
    by_other = evaluate.predict(network.model, images, other)
    assert torch.equal(network.predict(images, other), by_other)
    flipped = evaluate.predict(network.model, images, normalization, tta="flip")
    assert torch.equal(network.predict(images, tta="flip"), flipped)
    save_model(weights, ResNet((1,), (16,)), network.info)
    again = Network(weights, CPU, "fp32")
    assert again.stored is None and not torch.equal(again.predict(images), stored)


def test_stored_adapted_answers_are_taken_too(weights, stored, stand_in):
    network, images = Network(weights, CPU, "fp32"), stand_in[1].images[:20]
    adapted = network.predict_adapted(images)
    assert torch.equal(adapted.logits, -stored)
    assert (adapted.method, adapted.why) == ("batchnorm", "made up")
    computed = shift.predict_adapted(network.model, images[:10], network.info.test_normalization)
    assert torch.equal(network.predict_adapted(images[:10]).logits, computed.logits)


def test_many_images_are_computed_in_parts_and_give_the_same(weights, stand_in, monkeypatch):
    network, images = Network(weights, CPU, "fp32"), stand_in[1].images
    whole = network.compute(images)
    monkeypatch.setattr(answers, "AT_A_TIME", 7)
    torch.testing.assert_close(network.compute(images), whole)


@pytest.mark.parametrize("name", ["report", "best"])
def test_what_is_stored_belongs_to_the_packages_weights_and_their_records(name, cifar10):
    train, test = cifar10
    network = Network(SHIPPED.with_name(f"{name}.safetensors"), CPU, "fp32")
    assert network.stored is not None, "run scripts.store_answers after weights have changed"
    logits, tensors = network.predict(test.images), network.stored.tensors

    # The accuracies are the recorded ones, and the mistakes those of the logits.
    metrics = json.loads((RESULTS / f"{name}-seed42/metrics.json").read_text(encoding="utf-8"))
    recorded = metrics["half_precision"]
    assert accuracy(logits, test.labels) == pytest.approx(recorded["tta_none"]["accuracy"])
    flipped = network.predict(test.images, tta="flip")
    assert accuracy(flipped, test.labels) == pytest.approx(
        recorded["tta_flip"]["accuracy"], abs=2e-4
    )
    wrong = (logits.argmax(1) != test.labels).nonzero()[:, 0]
    assert torch.equal(tensors["mistakes"], wrong)

    # A few images, computed anew, give the same: logits and neighbours.
    some = wrong[:4]
    torch.testing.assert_close(network.compute(test.images[some]), logits[some], atol=0.05, rtol=0)
    ours, theirs = (
        torch.nn.functional.normalize(network.features(images), dim=1)
        for images in (test.images[some], train.images[tensors["nearest"][:4, 0]])
    )
    cosines = (ours * theirs).sum(1)
    np.testing.assert_allclose(cosines, tensors["cosines"][:4, 0], atol=0.01)
    assert (tensors["cosines"].diff(dim=1) <= 0).all()
