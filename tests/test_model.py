import hashlib
import json
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchinfo
from session import SHIFT, SHIPPED_RUNS

from cifar_lib.data import stratified_split
from cifar_lib.errors import InputError
from cifar_lib.evaluate import accuracy, predict, wilson_interval
from cifar_lib.model import SHIPPED, ResNet, count_parameters, load_model, save_model

PUBLISHED_TABLE = Path(__file__).parents[1] / "results" / "published" / "architecture.txt"
INFO = {"recipe": "report", "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]}


@pytest.fixture(scope="module")
def summary() -> torchinfo.ModelStatistics:
    return torchinfo.summary(ResNet(), (1, 3, 32, 32), verbose=0)


@pytest.fixture
def weights(tmp_path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "model.safetensors"
    save_model(path, ResNet((1, 1), (4, 8)), INFO)
    return path


def refusal(path) -> str:
    with pytest.raises(InputError) as error:
        load_model(path)
    message = str(error.value)
    assert "\n" not in message and str(path) in message and "model.safetensors that" in message
    return message


def table_rows(text: str) -> list[list[str]]:
    """[type and depth, output shape, parameters] of every layer."""
    lines = [
        line for line in text.splitlines() if line.endswith(tuple("-0123456789")) and "[" in line
    ]
    assert all(line.count("[") == 1 for line in lines)
    rows = [line.replace("[", "|[").replace("]", "]|").split("|") for line in lines]
    return [[cell.strip() for cell in "|".join(row).rsplit("|", 2)] for row in rows]


def test_default_network_has_the_published_size(summary):
    mb = (summary.total_output_bytes, summary.total_param_bytes)
    assert summary.total_params == 4_916_284
    assert round(summary.total_mult_adds / 1e6, 2) == 769.05
    assert [round(size / 1e6, 2) for size in mb] == [14.33, 19.67]
    assert round((summary.total_input + sum(mb)) / 1e6, 2) == 34.01


def test_every_row_of_the_published_layer_table_comes_out_the_same(summary):
    published = table_rows(PUBLISHED_TABLE.read_text())
    assert len(published) == 68
    assert table_rows(str(summary)) == published


@pytest.mark.parametrize(
    ("blocks", "channels", "num_classes"),
    [
        ((3, 4, 3), (66, 132, 264), 10),
        ((1,), (8,), 2),
        ((2, 1), (8, 8), 10),
        ((1, 3, 1, 2), (4, 8, 4, 6), 100),
    ],
)
def test_count_parameters_is_the_real_count(blocks, channels, num_classes):
    model = ResNet(blocks, channels, num_classes)
    assert count_parameters(blocks, channels, num_classes) == sum(
        p.numel() for p in model.parameters()
    )
    assert model.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, num_classes)
    assert len(model.stages) == len(blocks)


def test_a_block_adds_its_input_even_where_its_convolutions_give_nothing():
    model = ResNet((1,), (4,)).eval()
    block = model.stages[0][0]
    torch.nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 4, 8, 8)
    assert torch.equal(block(x), x)


def test_budget_error_names_both_numbers():
    with pytest.raises(
        InputError, match=r"(?s)^(?!.*\n).*5,\d{3},\d{3} parameters.*budget of 5,000,000"
    ):
        ResNet((3, 4, 3), (67, 134, 268))
    with pytest.raises(InputError, match=r"4,916,284.*4,916,283"):
        ResNet(budget=4_916_283)
    assert ResNet((1,), (4,), budget=count_parameters((1,), (4,))) is not None
    assert ResNet((1,), (600,), budget=None) is not None


@pytest.mark.parametrize(
    ("blocks", "channels"),
    [((1, 1), (4,)), ((), ()), ((0,), (4,)), ((1,), (-4,)), ((1.5,), (4,)), (("1",), (4,))],
)
def test_malformed_shapes_are_refused(blocks, channels):
    with pytest.raises(InputError, match="as many blocks as channels"):
        ResNet(blocks, channels)


def test_weights_come_back_with_their_shape_info_and_batch_statistics(tmp_path):
    torch.manual_seed(1)
    model = ResNet((1, 2), (4, 8))
    model(torch.rand(16, 3, 32, 32))  # moves the running statistics away from their start
    save_model(tmp_path / "some.safetensors", model, INFO)
    loaded, info = load_model(tmp_path / "some.safetensors")
    assert info == INFO
    assert (loaded.blocks, loaded.channels) == ((1, 2), (4, 8))
    assert not loaded.training
    x = torch.rand(3, 3, 32, 32)
    assert torch.equal(loaded(x), model.eval()(x))


def test_equal_weights_are_equal_bytes(tmp_path):
    model = ResNet((1,), (4,))
    written = set()
    for _ in range(12):
        save_model(tmp_path / "m.safetensors", model, INFO)
        written.add((tmp_path / "m.safetensors").read_bytes())
    assert len(written) == 1


def test_weights_of_a_channels_last_network_come_back(tmp_path):
    torch.manual_seed(1)
    model = ResNet((1,), (4,)).to(memory_format=torch.channels_last)
    save_model(tmp_path / "m.safetensors", model, INFO)
    loaded, _ = load_model(tmp_path / "m.safetensors")
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True)
    )


@pytest.mark.parametrize(("blocks", "channels"), [((1, 1), (4, 6)), ((2, 1), (4, 8)), ((1,), (4,))])
def test_weights_of_another_architecture_are_refused_naming_a_tensor(tmp_path, blocks, channels):
    model = ResNet((1, 1), (4, 8))
    model.blocks, model.channels = blocks, channels  # what the file will say, not what it holds
    save_model(tmp_path / "m.safetensors", model, INFO)
    assert "another architecture: layer" in refusal(tmp_path / "m.safetensors")


def test_truncated_weights_are_refused(weights):
    content = weights.read_bytes()
    for size in (0, 7, 100, len(content) - 1):
        weights.write_bytes(content[:size])
        refusal(weights)


def test_a_file_that_is_no_safetensors_is_refused(weights):
    weights.write_bytes(b"ID,Labels\n0,3\n" * 50)
    assert "no file of this package's weights" in refusal(weights)


@pytest.mark.parametrize(
    "info",
    [
        *(
            None,
            [],
            {},
            {"mean": [0.5], "std": [0.2]},
            {"mean": 0.5, "std": 0.2},
            {"mean": "abc", "std": [1, 1, 1]},
        ),
        *(INFO | {"mean": values} for values in (["0.5", "0.4", "0.3"], [0.5, 0.4, math.nan])),
        *(
            INFO | {"std": values}
            for values in ([0.2, 0.2, 0], [0.2, 0.2, -0.2], [0.2, 0.2, math.inf])
        ),
        *(INFO | {"temperature": value} for value in ("warm", None, 0, -1, math.nan)),
    ],
)
def test_weights_without_a_usable_normalisation_or_temperature_are_refused(tmp_path, info):
    save_model(tmp_path / "m.safetensors", ResNet((1,), (4,)), info)
    refusal(tmp_path / "m.safetensors")


def test_weights_for_other_classes_are_refused(tmp_path):
    save_model(tmp_path / "m.safetensors", ResNet((1,), (4,), num_classes=7), INFO)
    assert "it has 7 classes, not 10" in refusal(tmp_path / "m.safetensors")


@pytest.mark.parametrize("blocks", [3, None, {"a": 1}, [[1]], ["1"], []])
def test_weights_with_a_malformed_shape_are_refused(tmp_path, blocks):
    model = ResNet((1,), (4,))
    model.blocks = blocks
    save_model(tmp_path / "m.safetensors", model, INFO)
    with pytest.raises(InputError, match="^[^\n]*$"):
        load_model(tmp_path / "m.safetensors")


def test_someone_elses_safetensors_is_refused(tmp_path):
    path = tmp_path / "theirs.safetensors"
    for metadata in (None, {"format": "pt"}, {"model": "not json", "info": "[1, 2]"}):
        safetensors.torch.save_file({"weight": torch.zeros(3)}, path, metadata)
        assert "no file of this package's weights" in refusal(path)


def test_missing_weights_are_refused(tmp_path):
    refusal(tmp_path / "none.safetensors")
    refusal(tmp_path)


def test_half_precision_is_for_convolutions_only_and_halves_the_file(tmp_path):
    torch.manual_seed(0)
    model = ResNet((1, 1), (16, 32)).eval()
    for name, half in (("whole", False), ("half", True)):
        save_model(tmp_path / name, model, INFO, half)
    sizes = [(tmp_path / name).stat().st_size for name in ("whole", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    loaded, _ = load_model(tmp_path / "half")
    for (name, theirs), ours in zip(
        loaded.state_dict().items(), model.state_dict().values(), strict=True
    ):
        wanted = ours.half().float() if ours.ndim == 4 else ours
        assert theirs.dtype == ours.dtype and torch.equal(theirs, wanted), name


def test_the_packages_weights_are_the_reports_network_and_hold_what_their_run_says():
    model, info = load_model("pretrained")
    assert sum(p.numel() for p in model.parameters()) == 4_916_284
    assert next(model.parameters()).dtype == torch.float32 and not model.training
    metrics = json.loads((SHIPPED_RUNS[-1] / "metrics.json").read_text())
    assert all(
        metrics[name] == info[name] for name in ("recipe", "seed", "data", "epochs", "mean", "std")
    )
    assert SHIPPED.stat().st_size == metrics["half_precision"]["bytes"] <= 10e6


def test_the_packages_weights_score_what_their_card_and_the_readme_say(cifar10):
    model, info = load_model("pretrained")
    test = cifar10[1]
    shipped = json.loads((SHIPPED_RUNS[-1] / "metrics.json").read_text())["half_precision"][
        "tta_none"
    ]
    said = f"{shipped['accuracy']:.2%}".replace("%", " %")
    for text in (Path(__file__).parents[1] / "README.md", SHIPPED.parent / "README.md"):
        assert said in text.read_text(), text
    _, part = stratified_split(test.labels, 400, seed=1)
    right = accuracy(
        predict(model, test.images[part], info["mean"], info["std"]), test.labels[part]
    )
    low, high = wilson_interval(round(400 * right), 400, confidence=0.9999)
    assert low < shipped["accuracy"] < high


def test_the_shifts_were_measured_with_these_weights():
    digest = hashlib.sha256(SHIPPED.read_bytes()).hexdigest()
    assert json.loads((SHIFT / "verdict.json").read_text())["weights"]["sha256"] == digest


@pytest.mark.parametrize(
    "damage", ["another byte", "no file", "no list", "not listed", "an odd list"]
)
def test_damaged_weights_of_the_package_are_refused(tmp_path, monkeypatch, weights, damage):
    monkeypatch.setattr("cifar_lib.model.SHIPPED", weights)
    sums = tmp_path / "SHA256SUMS"
    sums.write_text(f"{hashlib.sha256(weights.read_bytes()).hexdigest()}  {weights.name}\n")
    assert load_model("pretrained")[1] == INFO
    if damage == "another byte":
        weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    elif damage == "no file":
        weights.unlink()
    elif damage == "no list":
        sums.unlink()
    else:
        sums.write_text("0  other.safetensors\n" if damage == "not listed" else "one two three\n")
    with pytest.raises(
        InputError, match=r"^weights: [^\n]*: get cifar_lib/weights of the repository again$"
    ):
        load_model("pretrained")
