"""Channels of zeros: the padded network is the network itself, in training and on disk."""

from pathlib import Path

import pytest
import torch

from cifar_lib import hardware
from cifar_lib import train as training
from cifar_lib.data import ImageSet
from cifar_lib.errors import InputError
from cifar_lib.fit import fit
from cifar_lib.model import ResNet, load_model
from cifar_lib.padding import cut, pad_network, shapes
from cifar_lib.recipes import TrainConfig
from cifar_lib.train import State, Step
from tests.test_fit import fit_killed_after, history
from tests.test_train import tiny

CPU = torch.device("cpu")
# Several blocks, strides and widths, of which none is a multiple of 16.
ODD = {"blocks": "1,2,1", "channels": "18,34,66", "nesterov": True, "weight_decay": 5e-4}
RUN = {"blocks": "1,1", "channels": "18,20", "validation_size": 20, "watch_test": False}


@pytest.fixture
def double(monkeypatch):
    """Everything in float64, in which equal sums differ by less than 1e-12."""
    monkeypatch.setattr(hardware, "cifar_winograd", None)  # its convolutions are for float32
    rescale = training.rescale
    monkeypatch.setattr(training, "rescale", lambda *args: rescale(*args).double())
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def differences(left: dict, right: dict) -> list[float]:
    assert left.keys() == right.keys()
    return [(left[name] - right[name]).abs().max().item() for name in left]


def padding_of(state: State) -> list[torch.Tensor]:
    """Copies of the state's tensors in which the network's own part is set to 0."""
    result = []
    for tensors in (state.model.state_dict(), state._momenta()):
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        for own in cut(copies, state.shapes).values():
            own.zero_()
        result += copies.values()
    return result


def test_twenty_steps_of_a_padded_network_are_those_of_the_network_itself(stand_in, double):
    config = tiny(**ODD)
    narrow, wide = State(config, CPU), State(config, CPU, channel_multiple=16)
    assert wide.model.channels == (32, 48, 80) and narrow.model.channels == (18, 34, 66)
    steps = Step(narrow), Step(wide)
    for i in range(20):
        batch = stand_in[0][torch.arange(i, i + 16)]
        losses = [step(batch.images, batch.labels, 0.1, False)[0].item() for step in steps]
        assert losses[0] == pytest.approx(losses[1], abs=1e-12)

    saved = narrow.content(), wide.content()
    assert max(differences(*(content["model"] for content in saved))) < 1e-12
    momenta = [dict(enumerate(content["momenta"])) for content in saved]
    assert max(differences(*momenta)) < 1e-12
    assert all(buffer.any() for buffer in momenta[0].values())
    assert not any(tensor.any() for tensor in padding_of(wide))


def test_a_padded_network_predicts_what_the_network_does(double):
    torch.manual_seed(0)
    model = ResNet((1, 2), (18, 34)).eval()
    images = torch.randn(8, 3, 16, 16)
    model.train()(images)  # the batch norms get statistics
    wide = pad_network(model.eval(), 16).eval()
    assert wide.channels == (32, 48)
    torch.testing.assert_close(wide(images), model(images), rtol=0, atol=1e-12)
    back = cut(wide.state_dict(), shapes(model))
    assert all(torch.equal(back[name], value) for name, value in model.state_dict().items())
    assert pad_network(model, 2) is model


def test_the_seed_gives_the_same_weights_however_wide_the_network_is_trained():
    config = tiny(**ODD, ema_decay=0.9)
    before = torch.random.get_rng_state()
    states = [State(config, CPU, multiple).content() for multiple in (1, 8, 16, 64)]
    for content in states[1:]:
        for part in ("model", "average"):
            assert max(differences(content[part], states[0][part])) == 0
    assert torch.equal(torch.random.get_rng_state(), before)


def run(config: TrainConfig, path: Path, data: tuple[ImageSet, ImageSet], multiple: int) -> None:
    fit(config, path, *data, "cpu", log=lambda _: None, channel_multiple=multiple)


@pytest.mark.parametrize("ema_decay", [0, 0.9])
def test_a_run_can_resume_padded_and_not_padded(stand_in, tmp_path, ema_decay):
    config = tiny(**RUN, ema_decay=ema_decay)

    def outcome(path: Path) -> tuple[dict, list[float]]:
        model, _ = load_model(path / "model.safetensors")
        assert model.channels == (18, 20)
        return model.state_dict(), [float(row["validation_loss"]) for row in history(path)]

    run(config, tmp_path / "whole", stand_in, multiple=1)
    weights, losses = outcome(tmp_path / "whole")
    for first, second in ((1, 8), (8, 1), (16, 16)):
        path = tmp_path / f"{first} then {second}"
        fit_killed_after(1, config, path, stand_in, channel_multiple=first)
        run(config, path, stand_in, second)
        own_weights, own_losses = outcome(path)
        assert own_losses == pytest.approx(losses, rel=1e-3)
        for name, tensor in own_weights.items():
            torch.testing.assert_close(tensor, weights[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("multiple", [1, 16])
def test_a_checkpoint_of_another_width_is_refused(multiple):
    saved = State(tiny(channels="20,20"), CPU).content()
    for state in (State(tiny(channels="18,18"), CPU, multiple), State(tiny(), CPU, multiple)):
        with pytest.raises(InputError, match="its checkpoint isn't of this run"):
            state.load(saved)
