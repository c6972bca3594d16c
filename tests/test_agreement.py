"""The command line answers what the library does, on a network that doesn't answer one class."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cifar_lib import cli, shift
from cifar_lib.data import CLASSES, ImageSet, read_picture
from cifar_lib.evaluate import predict, summarize
from cifar_lib.explain import beside_heat, grad_cam
from cifar_lib.kaggle import read_test_file
from cifar_lib.model import ResNet, load_model, save_model
from notebooks.course.corruptions import generate_test_file
from notebooks.course.stand_in import generate_stand_in

# Far apart in every channel, so that exchanging or replacing them changes the answers.
MEAN, STD = (0.55, 0.35, 0.45), (0.15, 0.3, 0.2)


@pytest.fixture(scope="module")
def test_set() -> ImageSet:
    return generate_stand_in(0, 100, seed=3)[1]


@pytest.fixture
def place(test_set, tmp_path, monkeypatch) -> Path:
    """A working directory with weights whose answers vary, and a test file of 100 images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "load_cifar10", lambda root: (test_set, test_set))
    torch.manual_seed(0)
    model = ResNet((1, 1), (16, 32)).eval()
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.uniform_(-0.3, 0.3)
            layer.running_var.uniform_(0.5, 2)
            layer.num_batches_tracked.fill_(23_460)  # as after 60 epochs of `report`
    # Logits spread around zero for every class: then no class wins everywhere.
    logits = predict(model, test_set.images, MEAN, STD)
    spread = logits.std(0)
    model.linear.weight.data /= spread[:, None]
    model.linear.bias.data = (model.linear.bias.data - logits.mean(0)) / spread
    save_model(Path("weights"), model, {"recipe": "report", "mean": MEAN, "std": STD})
    generate_test_file("test.pkl", test_set)
    return tmp_path


def answers(images: torch.Tensor, mean=MEAN, std=STD, model=None, tta="none") -> torch.Tensor:
    return predict(model or load_model("weights")[0], images, mean, std, tta=tta)


@pytest.mark.parametrize("adapt", ["none", "normalize", "batchnorm", "normalize+batchnorm"])
def test_submit_writes_the_labels_that_the_library_predicts(place, adapt):
    images = read_test_file("test.pkl").images
    model, mean, std = shift.adapt(adapt, load_model("weights")[0], images, MEAN, STD)
    wanted = answers(images, mean, std, model, "flip").argmax(1).tolist()
    command = f"submit --weights weights --test test.pkl --device cpu --adapt {adapt} --tta flip"
    assert cli.main([*command.split(), "--out", "out.csv"]) == 0
    written = Path("out.csv").read_text(encoding="utf-8")
    rows = [line.split(",") for line in written.splitlines()[1:]]
    assert [int(label) for _, label in rows] == wanted
    assert len(set(wanted)) > 1
    if "normalize" in adapt:  # the statistics that aren't adapted would answer otherwise
        assert answers(images, MEAN, STD, model, "flip").argmax(1).tolist() != wanted
    if "batchnorm" in adapt:  # and so would the network
        assert answers(images, mean, std, None, "flip").argmax(1).tolist() != wanted


def test_evaluate_scores_what_the_library_predicts(place, test_set, capsys):
    command = "evaluate --weights weights --device cpu --tta none --json"
    assert cli.main(command.split()) == 0
    score = json.loads(capsys.readouterr().out)
    wanted = summarize(answers(test_set.images), test_set.labels)
    assert score["confusion_matrix"] == wanted["confusion_matrix"]
    assert score["cross_entropy"] == pytest.approx(wanted["cross_entropy"], rel=1e-4)
    assert np.count_nonzero(np.sum(wanted["confusion_matrix"], axis=0)) > 3


def test_predict_prints_the_librarys_probabilities_and_draws_its_heat(place, test_set, capsys):
    names = [f"{i}.png" for i in range(4)]
    for name, image in zip(names, test_set.images, strict=False):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(name)
    command = "predict --weights weights --device cpu --tta none --grad-cam heat"
    assert cli.main([*command.split(), *names]) == 0
    images = torch.stack([read_picture(name) for name in names])
    assert torch.equal(images, test_set.images[:4])
    logits = answers(images)
    lines = capsys.readouterr().out.splitlines()
    for line, probabilities in zip(lines, logits.softmax(1), strict=True):
        found = re.findall(r"(\w+) ([\d.]+)%", line)
        order = probabilities.argsort(descending=True)[:3].tolist()
        assert [name for name, _ in found] == [CLASSES[i] for i in order]
        printed = [float(percent) / 100 for _, percent in found]
        assert printed == pytest.approx(probabilities[order].tolist(), abs=6e-4)
    heat = grad_cam(load_model("weights")[0], images, logits.argmax(1), MEAN, STD)
    assert heat.flatten(1).std(1).min() > 0.05
    for name, image, its_heat in zip(names, images, heat, strict=True):
        drawn = np.asarray(Image.open(Path("heat", f"{Path(name).stem}.grad-cam.png")))
        difference = drawn.astype(int) - beside_heat(image, its_heat)
        assert np.abs(difference).mean() < 0.5
