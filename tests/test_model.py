"""The network is the report's; its weights come back from a file, or are refused in one line."""

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

from cifar_lib.data import Normalization, stratified_split
from cifar_lib.errors import InputError
from cifar_lib.evaluate import accuracy, predict, wilson_interval
from cifar_lib.model import (
    SHIPPED,
    ResNet,
    WeightsInfo,
    check_shape,
    count_parameters,
    load_model,
    save_model,
)
from notebooks.course.reference import REFERENCE, SHIFT, SHIPPED_RUN

INFO = WeightsInfo(recipe="report", mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))


def written(path: Path, **entries: dict) -> Path:
    """A file as `save_model` writes it, of a tiny network, but for these entries."""
    shape = {"blocks": [1], "channels": [16], "num_classes": 10} | entries.get("shape", {})
    record = {"model": shape, "info": INFO.as_record() | entries.get("info", {})}
    tensors = ResNet((1,), (16,)).state_dict() | entries.get("tensors", {})
    path.write_bytes(safetensors.torch.save(tensors, {"cifar_lib": json.dumps(record)}))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as error:
        load_model(path)
    message = str(error.value)
    assert message.startswith(f"weights: can't load {path} (")
    assert message.endswith(": give a model.safetensors that `cifar_lib train` wrote")
    assert len(message) < 350 + len(str(path))
    return message


# The network.


def test_the_default_network_is_the_published_one_in_every_row_of_its_table():
    summary = torchinfo.summary(ResNet(), (1, 3, 32, 32), verbose=0)
    assert (summary.total_params, round(summary.total_mult_adds, -4)) == (4_916_284, 769_050_000)
    published, ours = (
        # Type and depth, output shape, parameters of every layer.
        [re.split(r"\s*(\[.*\])\s*", line) for line in text.splitlines() if "[" in line]
        for text in ((REFERENCE / "architecture.txt").read_text(encoding="utf-8"), str(summary))
    )
    assert len(published) == 68 and ours == published


@pytest.mark.parametrize(
    ("blocks", "channels", "num_classes"), [((1,), (8,), 2), ((1, 3, 1, 2), (4, 8, 4, 6), 100)]
)
def test_count_parameters_is_the_real_count(blocks, channels, num_classes):
    model = ResNet(blocks, channels, num_classes)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count_parameters(blocks, channels, num_classes) == count
    assert model.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, num_classes)
    assert len(model.stages) == len(blocks)


def test_a_block_adds_its_input_even_where_its_convolutions_give_nothing():
    block = ResNet((1,), (4,)).eval().stages[0][0]
    torch.nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 4, 8, 8)
    assert torch.equal(block(x), x)


WRONG_SHAPES = [
    ((1, 1), (16,)),
    ((), ()),
    ((0,), (16,)),
    ((1,), (-16,)),
    ((1.5,), (16,)),
    ((1,), (15,)),
]
WRONG_SHAPES += [(("1",), (16,)), ((101,), (16,)), ((1,) * 101, (16,) * 101), ((1,), (10_001,))]


def test_shapes_that_are_no_networks_or_over_the_budget_are_refused():
    for blocks, channels in WRONG_SHAPES:
        with pytest.raises(
            InputError, match="blocks and channels: expected a whole number of each"
        ):
            check_shape(blocks, channels)
    check_shape((100,), (16,))
    with pytest.raises(InputError, match="parameters, over the budget of 5,000,000: use fewer"):
        check_shape((1,), (10_000,))
    count = count_parameters((1, 2), (16, 32))
    check_shape((1, 2), (16, 32), budget=count)
    with pytest.raises(InputError, match=f"{count:,} parameters, .*{count - 1:,}"):
        check_shape((1, 2), (16, 32), budget=count - 1)


# Its weights on disk.


@pytest.mark.parametrize("half", [False, True])
def test_weights_come_back_with_shape_info_and_statistics(tmp_path, half):
    torch.manual_seed(1)
    model = ResNet((1, 2), (16, 32)).to(memory_format=torch.channels_last)
    model(torch.rand(16, 3, 32, 32))  # moves the running statistics away from their start
    if half:
        model.conv1.half()  # as the package's weights are
    info = INFO.model_copy(update={"seed": 3, "data": "some", "epochs": 2, "temperature": 1.5})
    paths = [tmp_path / f"{i}" for i in range(9)]
    for path in paths:
        save_model(path, model, info)
    assert len({path.read_bytes() for path in paths}) == 1  # equal weights are equal bytes
    loaded, found = load_model(paths[0])
    assert found == info
    assert (loaded.blocks, loaded.channels, loaded.training) == ((1, 2), (16, 32), False)
    for name, ours in model.state_dict().items():
        got = loaded.state_dict()[name]
        assert got.dtype != torch.half and torch.equal(got, ours.to(got.dtype)), name


def test_weights_know_their_normalisations_and_what_their_logits_are_worth(tmp_path):
    assert INFO.test_normalization == Normalization((0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
    # How the training normalised is the file's to say; its recipe's name proves nothing.
    with pytest.raises(InputError, match="the file doesn.t say how training images were"):
        assert INFO.training_normalization is None
    changes = {"train_mean": [0.1, 0.2, 0.3], "train_std": [0.3] * 3, "temperature": 2.0}
    _, info = load_model(written(tmp_path / "m", info=changes))
    assert info.training_normalization == Normalization((0.1, 0.2, 0.3), (0.3, 0.3, 0.3))
    logits = torch.tensor([[0.0, math.log(9)]])
    torch.testing.assert_close(info.probabilities(logits), torch.tensor([[0.25, 0.75]]))
    torch.testing.assert_close(INFO.probabilities(logits), torch.tensor([[0.1, 0.9]]))
    assert "temperature" not in INFO.as_record() and "train_mean" not in INFO.as_record()


ROW, NAN = torch.ones(16), math.nan
WRONG_ENTRIES = [
    *(("shape", "blocks", value, "") for value in (3, None, {"a": 1}, ["1"], "11")),
    ("shape", "blocks", [[1]], "blocks and channels: expected"),
    ("shape", "blocks", [1, 1], "blocks and channels: expected"),
    ("shape", "blocks", [101], "1 to 100 blocks in all"),
    ("shape", "blocks", [2], "Missing key"),
    *(("info", "mean", value, "mean") for value in (0.5, None, [0.5, 0.4, "0.3"], [0, 0, NAN])),
    *(("info", "mean", value, "mean") for value in ([0, 0, -1001], [0, 0, 1001], [0.2] * 4)),
    *(
        ("info", "std", value, "std")
        for value in ([0.2] * 4, [0.2] * 2, [1, 1, 1e-4], [1, 1, 1001])
    ),
    ("info", "std", [1, 1, 10**400], "100 digits"),
    ("info", "train_mean", [0.5] * 3, "train_std is missing"),
    ("info", "train_std", [0.2] * 3, "train_std is missing"),
    *(("info", "temperature", value, "temperature") for value in ("warm", 0.049, 20.1, NAN)),
    ("tensors", "linear.weight", torch.ones(7, 16), "size mismatch for linear.weight"),
    ("tensors", "linear.bias", torch.full((10,), NAN), "are not finite"),
    ("tensors", "bn1.running_mean", ROW * math.inf, "are not finite"),  # ReLU hides it
    # Only the logits show these, and the second only those of an image that isn't black.
    ("tensors", "bn1.running_var", -ROW, "are not finite"),
    ("tensors", "conv1.weight", torch.full((16, 3, 3, 3), 1e38), "are not finite"),
    ("tensors", "linear.weight", torch.full((10, 16), 1e38), "are not finite"),
]


@pytest.mark.parametrize(("where", "name", "value", "message"), WRONG_ENTRIES)
def test_weights_that_can_not_be_used_are_refused(tmp_path, where, name, value, message):
    entries = {"tensors": {"bn1.bias": ROW * 100}}  # so that features are positive
    entries[where] = entries.get(where, {}) | {name: value}
    assert message in refusal(written(tmp_path / "m", **entries))


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = written(tmp_path / "m")
    content = path.read_bytes()
    header = int.from_bytes(content[:8], "little")
    unknown = b'{"a":{"dtype":"F4","shape":[8],"data_offsets":[0,4]}}'
    files = [content[:size] for size in (0, 7, 100, len(content) - 1)]
    files += [size.to_bytes(8, "little") + content[8:] for size in (2**60, header - 1, header + 1)]
    files += [len(unknown).to_bytes(8, "little") + unknown + bytes(4)]
    texts = ("no JSON", "[1]", "{}", "[" * 100_000 + "]" * 100_000, "9" * 400, "\ud7ff")
    for metadata in (None, {"format": "pt"}, *({"cifar_lib": text} for text in texts)):
        files.append(safetensors.torch.save({"weight": torch.zeros(3)}, metadata))
    for file in files:
        path.write_bytes(file)
        refusal(path)


def test_only_a_regular_file_of_a_sane_size_is_opened(tmp_path):
    assert "No such file or directory" in refusal(tmp_path / "none")
    refusal(tmp_path)
    if hasattr(os, "mkfifo"):  # not on Windows
        os.mkfifo(tmp_path / "fifo")
        refusal(tmp_path / "fifo")
        refusal(Path("/dev/zero"))
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 100_000_001)  # no more on disk than an empty one
    assert "100,000,001 bytes, more than 100,000,000" in refusal(tmp_path / "large")


# The weights that come with the package.


@pytest.mark.parametrize("recipe", ["report", "best"])
def test_the_packages_weights_are_listed_and_hold_what_their_run_says(recipe):
    weights = SHIPPED.with_name(f"{recipe}.safetensors")
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    listed = SHIPPED.with_name("SHA256SUMS").read_text(encoding="utf-8").splitlines()
    assert f"{digest}  {weights.name}" in listed
    run = SHIPPED_RUN.with_name(f"{recipe}-seed42")
    config, metrics = (
        json.loads((run / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("config", "metrics")
    )
    assert weights.stat().st_size == metrics["half_precision"]["bytes"] <= 10e6
    model, info = load_model("pretrained" if recipe == "report" else weights)
    assert sum(p.numel() for p in model.parameters()) == 4_916_284
    assert next(model.parameters()).dtype == torch.float32 and not model.training
    assert info.training_normalization == Normalization(
        *map(tuple, (config["mean"], config["std"]))
    )
    record = json.loads(json.dumps(info.as_record()))
    assert (record["mean"], record["std"]) == (config["test_mean"], config["test_std"])
    for name in ("recipe", "seed", "data", "epochs", "mean", "std"):
        assert metrics[name] == record[name]
    if recipe == "report":  # the verdict was measured with these weights
        verdict = json.loads((SHIFT / "verdict.json").read_text(encoding="utf-8"))
        assert verdict["weights"]["sha256"] == digest


def test_the_packages_weights_score_what_is_recorded(cifar10):
    model, info = load_model("pretrained")
    metrics = json.loads((SHIPPED_RUN / "metrics.json").read_text(encoding="utf-8"))
    recorded = metrics["half_precision"]["tta_none"]["accuracy"]
    _, part = stratified_split(cifar10[1].labels, 100, seed=1)
    test = cifar10[1][part]
    found = accuracy(predict(model, test.images, info.test_normalization), test.labels)
    low, high = wilson_interval(round(100 * found), 100, confidence=0.9999)
    assert low < recorded < high


def test_damaged_weights_of_the_package_are_refused(monkeypatch, tmp_path):
    weights = written(tmp_path / "model.safetensors")
    monkeypatch.setattr("cifar_lib.model.SHIPPED", weights)
    refused = pytest.raises(InputError, match=": get cifar_lib/weights from the repo")
    with refused:  # no list
        load_model("pretrained")
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    weights.with_name("SHA256SUMS").write_text(f"{digest}  {weights.name}\n", encoding="utf-8")
    assert load_model("pretrained")[1] == INFO
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with refused:
        load_model("pretrained")
