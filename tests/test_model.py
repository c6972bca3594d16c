import hashlib
import json
import math
import os
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchinfo

from cifar_lib.data import stratified_split
from cifar_lib.errors import InputError
from cifar_lib.evaluate import accuracy, predict, wilson_interval
from cifar_lib.model import (
    SHIPPED,
    ResNet,
    count_parameters,
    load_model,
    save_model,
    training_normalization,
)
from notebooks.course.reference import REFERENCE, SHIFT, SHIPPED_RUN

PUBLISHED_TABLE = REFERENCE / "architecture.txt"
INFO = {"recipe": "report", "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]}


@pytest.fixture
def weights(tmp_path) -> Path:
    torch.manual_seed(0)
    return saved(tmp_path / "model.safetensors", ResNet((1, 1), (4, 8)))


def saved(path: Path, model: ResNet | None = None, **changes: object) -> Path:
    save_model(path, model or ResNet((1,), (4,)), INFO | changes)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as error:
        load_model(path)
    message = str(error.value)
    assert message.startswith(f"weights: {path} is no file of this package's weights (")
    assert len(message) < 350 + len(str(path))
    return message


def table_rows(text: str) -> list[list[str]]:
    """[type and depth, output shape, parameters] of every layer."""
    return [re.split(r"\s*(\[.*\])\s*", line) for line in text.splitlines() if "[" in line]


def test_the_default_network_is_the_published_one_in_every_row_of_its_table():
    summary = torchinfo.summary(ResNet(), (1, 3, 32, 32), verbose=0)
    mb = (summary.total_output_bytes, summary.total_param_bytes)
    assert summary.total_params == 4_916_284
    assert round(summary.total_mult_adds / 1e6, 2) == 769.05
    assert [round(size / 1e6, 2) for size in mb] == [14.33, 19.67]
    assert round((summary.total_input + sum(mb)) / 1e6, 2) == 34.01
    published = table_rows(PUBLISHED_TABLE.read_text(encoding="utf-8"))
    assert len(published) == 68
    assert table_rows(str(summary)) == published


@pytest.mark.parametrize(
    ("blocks", "channels", "num_classes"), [((1,), (8,), 2), ((1, 3, 1, 2), (4, 8, 4, 6), 100)]
)
def test_count_parameters_is_the_real_count_and_the_budget_its_limit(blocks, channels, num_classes):
    model = ResNet(blocks, channels, num_classes)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count_parameters(blocks, channels, num_classes) == count
    ResNet(blocks, channels, num_classes, budget=count)
    with pytest.raises(InputError, match=f"{count:,} parameters, .*{count - 1:,}"):
        ResNet(blocks, channels, num_classes, budget=count - 1)
    assert model.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, num_classes)
    assert len(model.stages) == len(blocks)


def test_a_block_adds_its_input_even_where_its_convolutions_give_nothing():
    block = ResNet((1,), (4,)).eval().stages[0][0]
    torch.nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 4, 8, 8)
    assert torch.equal(block(x), x)


WRONG_SHAPES = [((1, 1), (4,)), ((), ()), ((0,), (4,)), ((1,), (-4,)), ((1.5,), (4,))]
WRONG_SHAPES += [(("1",), (4,)), ((20_000,), (4,)), ((1,) * 101, (4,) * 101), ((1,), (20_000,))]


@pytest.mark.parametrize(("blocks", "channels"), WRONG_SHAPES)
def test_malformed_and_absurd_shapes_are_refused_before_anything_is_built(blocks, channels):
    with pytest.raises(InputError, match="a network takes as many blocks as channels"):
        count_parameters(blocks, channels)


@pytest.mark.parametrize("half", [False, True])
def test_weights_come_back_with_shape_info_and_statistics(tmp_path, half):
    torch.manual_seed(1)
    model = ResNet((1, 2), (16, 32)).to(memory_format=torch.channels_last)
    model(torch.rand(16, 3, 32, 32))  # moves the running statistics away from their start
    if half:
        model.conv1.half()  # as the package's weights are
    paths = [tmp_path / f"{i}" for i in range(9)]
    for path in paths:
        save_model(path, model, INFO)
    assert len({path.read_bytes() for path in paths}) == 1  # equal weights are equal bytes
    loaded, info = load_model(paths[0])
    assert info == INFO
    assert (loaded.blocks, loaded.channels, loaded.training) == ((1, 2), (16, 32), False)
    for name, ours in model.state_dict().items():
        got = loaded.state_dict()[name]
        assert got.dtype != torch.half and torch.equal(got, ours.to(got.dtype)), name


@pytest.mark.parametrize("blocks", [(2, 1), 3, None, {"a": 1}, ["1"], "11", [20_000], [[1], [1]]])
def test_weights_of_another_shape_than_their_file_says_are_refused(tmp_path, blocks):
    model = ResNet((1, 1), (4, 8))
    model.blocks = blocks
    refusal(saved(tmp_path / "m", model))
    seven = ResNet((1,), (4,), num_classes=7)
    assert "size mismatch for linear.weight" in refusal(saved(tmp_path / "m", seven))


INSANE = [
    ("mean", value) for value in (0.5, None, [0.5, 0.4, "0.3"], [0, 0, math.nan], [0, 0, -1001])
]
INSANE += [("std", value) for value in ([0.2] * 4, [1, 1, 1e-300], [1, 1, 1001], [1, 1, 10**400])]
INSANE += [("train_mean", [0.5] * 3), ("train_std", [0.2] * 3), ("train_std", [0, 0, 0])]
INSANE += [("temperature", value) for value in ("warm", None, 1e-300, 20.1, math.nan)]


@pytest.mark.parametrize(("name", "value"), INSANE)
def test_weights_without_a_sane_normalisation_or_temperature_are_refused(tmp_path, name, value):
    refusal(saved(tmp_path / "m", **{name: value}))


def test_the_normalisation_of_the_training_is_the_weights_own_not_the_recipes(tmp_path):
    changed = {"train_mean": [0.1, 0.2, 0.3], "train_std": [0.3] * 3}
    _, info = load_model(saved(tmp_path / "m", **changed))
    assert training_normalization(info) == ([0.1, 0.2, 0.3], [0.3] * 3)
    _, info = load_model(saved(tmp_path / "older"))  # its recipe's name proves nothing
    with pytest.raises(InputError, match="expected the mean and std of the training.*found none"):
        training_normalization(info)


NOT_FINITE = [("linear.bias", math.nan), ("bn1.running_mean", math.inf)]  # ReLU hides the second
# Only the logits show these, and the second only those of an image that isn't black.
NOT_FINITE += [("bn1.running_var", -1.0), ("conv1.weight", 1e38), ("linear.weight", 1e38)]


@pytest.mark.parametrize(("name", "value"), NOT_FINITE)
def test_weights_that_give_no_finite_logits_are_refused(tmp_path, name, value):
    model = ResNet((1,), (4,))
    model.bn1.bias.data.fill_(100)
    model.state_dict()[name].fill_(value)
    assert "are not finite" in refusal(saved(tmp_path / "m", model))


NESTED = "[" * 100_000 + "]" * 100_000
OTHERS = [{"cifar_lib": text} for text in ("no JSON", "[1]", "{}", NESTED, "9" * 400, "\ud7ff")]


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, *OTHERS])
def test_someone_elses_safetensors_is_refused(tmp_path, metadata):
    path = tmp_path / "theirs.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(3)}, path, metadata)
    refusal(path)


def test_damaged_and_hostile_files_are_refused(weights):
    content = weights.read_bytes()
    header = int.from_bytes(content[:8], "little")
    unknown = b'{"a":{"dtype":"F4","shape":[8],"data_offsets":[0,4]}}'
    files = [content[:size] for size in (0, 7, 100, len(content) - 1)]
    files += [size.to_bytes(8, "little") + content[8:] for size in (2**60, header - 1, header + 1)]
    files += [len(unknown).to_bytes(8, "little") + unknown + bytes(4)]
    for file in files:
        weights.write_bytes(file)
        refusal(weights)


def test_only_a_regular_file_of_a_sane_size_is_opened(tmp_path):
    with pytest.raises(InputError, match="No such file or directory.*give a model"):
        load_model(tmp_path / "none")
    refusal(tmp_path)
    if hasattr(os, "mkfifo"):  # not on Windows
        os.mkfifo(tmp_path / "fifo")
        refusal(tmp_path / "fifo")
        refusal(Path("/dev/zero"))
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 100_000_001)  # no more on disk than an empty one
    assert "100,000,001 bytes, more than 100,000,000" in refusal(tmp_path / "large")


def test_the_packages_weights_are_the_reports_network_and_hold_what_their_run_says():
    model, info = load_model("pretrained")
    assert sum(p.numel() for p in model.parameters()) == 4_916_284
    assert next(model.parameters()).dtype == torch.float32 and not model.training
    metrics = json.loads((SHIPPED_RUN / "metrics.json").read_text(encoding="utf-8"))
    for name in ("recipe", "seed", "data", "epochs", "mean", "std"):
        assert metrics[name] == info[name]
    assert SHIPPED.stat().st_size == metrics["half_precision"]["bytes"] <= 10e6
    # The verdict was measured with these weights.
    verdict = json.loads((SHIFT / "verdict.json").read_text(encoding="utf-8"))
    assert verdict["weights"]["sha256"] == hashlib.sha256(SHIPPED.read_bytes()).hexdigest()


@pytest.mark.parametrize("recipe", ["report", "best"])
def test_the_packages_weights_say_how_their_run_normalised(recipe):
    weights = SHIPPED.with_name(f"{recipe}.safetensors")
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    listed = SHIPPED.with_name("SHA256SUMS").read_text(encoding="utf-8").splitlines()
    assert f"{digest}  {weights.name}" in listed
    run = SHIPPED_RUN.with_name(f"{recipe}-seed42")
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    _, info = load_model(weights)
    assert training_normalization(info) == (config["mean"], config["std"])
    assert (info["mean"], info["std"]) == (config["test_mean"], config["test_std"])
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert weights.stat().st_size == metrics["half_precision"]["bytes"]


def test_the_packages_weights_score_what_is_recorded(cifar10):
    model, info = load_model("pretrained")
    metrics = json.loads((SHIPPED_RUN / "metrics.json").read_text(encoding="utf-8"))
    recorded = metrics["half_precision"]["tta_none"]["accuracy"]
    _, part = stratified_split(cifar10[1].labels, 100, seed=1)
    test = cifar10[1][part]
    right = accuracy(predict(model, test.images, info["mean"], info["std"]), test.labels)
    low, high = wilson_interval(round(100 * right), 100, confidence=0.9999)
    assert low < recorded < high


def test_damaged_weights_of_the_package_are_refused(monkeypatch, weights):
    monkeypatch.setattr("cifar_lib.model.SHIPPED", weights)
    refused = pytest.raises(InputError, match=": get cifar_lib/weights of the repo")
    with refused:  # no list
        load_model("pretrained")
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    weights.with_name("SHA256SUMS").write_text(f"{digest}  {weights.name}\n", encoding="utf-8")
    assert load_model("pretrained")[1] == INFO
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with refused:
        load_model("pretrained")
