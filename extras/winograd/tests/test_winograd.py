import pytest
import torch
import torch.nn.functional as F
from cifar_lib.hardware import REBUILD, cifar_winograd

if cifar_winograd is None:  # not installed, or compiled against another torch
    pytest.skip(REBUILD, allow_module_level=True)
from cifar_winograd import TRANSFORM, Winograd  # noqa: E402


def gradients(function, x: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
    """The convolution's result and the gradients of its input and weights."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    out = function(x, weight)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape).cos())
    return [out.detach(), x.grad, weight.grad]


@pytest.mark.parametrize(
    ("images", "inputs", "outputs", "height", "width"),
    [
        (3, 64, 64, 32, 32),
        (2, 66, 66, 16, 16),
        (5, 70, 83, 4, 4),
        (1, 67, 74, 8, 12),
        (40, 264, 264, 8, 8),
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_result_and_both_gradients_are_those_of_the_convolution(
    images, inputs, outputs, height, width, layout
):
    torch.manual_seed(0)
    x = torch.randn(images, inputs, height, width).contiguous(memory_format=layout)
    weight = torch.randn(outputs, inputs, 3, 3) / (9 * inputs) ** 0.5
    with Winograd():
        ours = gradients(lambda x, w: F.conv2d(x, w, None, (1, 1), (1, 1), (1, 1), 1), x, weight)
    exact = gradients(lambda x, w: F.conv2d(x, w, padding=1), x.double(), weight.double())
    for got, wanted in zip(ours, exact, strict=True):
        assert (got - wanted).abs().max() < 2e-5 * wanted.abs().max()


def test_it_takes_the_convolutions_that_fit_and_leaves_the_others_alone(monkeypatch):
    taken = []
    monkeypatch.setattr(
        cifar_winograd._Convolution, "apply", lambda x, weight: taken.append(tuple(x.shape))
    )
    plain = torch.nn.Conv2d
    x = torch.randn(1, 64, 8, 8)
    with Winograd():
        plain(64, 64, 3, padding=1, bias=False)(x)
        for other in (
            plain(64, 64, 3, padding=1),
            plain(64, 64, 3, stride=2, padding=1, bias=False),
            plain(64, 64, 1, bias=False),
            plain(64, 64, 3, bias=False),
            plain(64, 64, 3, padding=2, dilation=2, bias=False),
            plain(64, 64, 3, padding=1, groups=64, bias=False),
        ):
            assert other(x) is not None
        assert plain(64, 64, 3, padding=1, bias=False)(x[:, :, :6, :6]) is not None
        assert plain(3, 64, 3, padding=1, bias=False)(x[:, :3]) is not None
        assert plain(64, 32, 3, padding=1, bias=False)(x) is not None  # too narrow to gain
        assert plain(64, 64, 3, padding=1, bias=False).double()(x.double()) is not None
    assert taken == [(1, 64, 8, 8)]
    plain(64, 64, 3, padding=1, bias=False)(x)  # outside
    assert len(taken) == 1


def test_the_transform_multiplies_as_the_points_0_1_2_and_their_negatives_do():
    """Row k of G holds the powers of a point, scaled: three taps as a polynomial, evaluated
    there."""
    for row, point in zip(TRANSFORM[:5], (0, 1, -1, 2, -2), strict=True):
        torch.testing.assert_close(row / row[0], torch.tensor([1.0, point, point**2]))
