"""Domain shift: adapting to it without labels."""

import copy

import torch
from torch import Tensor, nn

from cifar_lib.data import Channels, channel_statistics
from cifar_lib.errors import InputError
from cifar_lib.evaluate import batches
from cifar_lib.hardware import computing

ADAPTATIONS = ("none", "normalize", "batchnorm", "normalize+batchnorm")
PRIOR = 16  # images that the training statistics count for: Schneider et al. found 8 to 32 best
STATISTICS_BATCH = 250  # images; the variance between batches is not in the statistics


@torch.no_grad()
def adapt(
    method: str,
    model: nn.Module,
    images: Tensor,
    mean: Channels,
    std: Channels,
    precision: str = "fp32",
) -> tuple[nn.Module, Channels, Channels]:
    """The network, mean and std to predict unlabelled uint8 `images` (N, 3, 32, 32) with.

    none: as they come. normalize: the images' own channel statistics, as the report does.
    batchnorm: a copy of the network with batch-norm statistics of these images, mixed with the
    training ones (Schneider et al. 2020, arXiv:2006.16971; Li et al. 2016, arXiv:1603.04779).
    All but `none` look at the whole set at once. InputError for another, or a constant channel.
    """
    if method not in ADAPTATIONS:
        raise InputError(f"adapt: expected one of {', '.join(ADAPTATIONS)}; got {method!r}")
    if "normalize" in method:
        own_mean, own_std = channel_statistics(images)
        if min(own_std) == 0:
            raise InputError("adapt: a channel of these images is constant: use --adapt none")
        mean, std = tuple(own_mean.tolist()), tuple(own_std.tolist())
    if "batchnorm" in method:
        trained, model = _batch_norms(model), copy.deepcopy(model).eval()
        for layer in _batch_norms(model):
            layer.reset_running_stats()
            layer.momentum = None  # the plain mean over batches
            layer.train()
        _forward(model, images, mean, std, precision)
        for layer, old in zip(_batch_norms(model), trained, strict=True):
            share = PRIOR / (PRIOR + len(images))
            layer.running_mean.lerp_(old.running_mean, share)
            layer.running_var.lerp_(old.running_var, share)
            layer.eval()
    return model, mean, std


@torch.no_grad()
def rebase_batch_norm(
    model: nn.Module, images: Tensor, mean: Channels, std: Channels, precision: str = "fp32"
) -> nn.Module:
    """A copy that computes the same, its batch norms written around these uint8 images' statistics.

    Training leaves those of augmented images, from which others deviate as the weights expect.
    `adapt` would take that away with the shift; rebased on plain ones, only the shift is left.
    """
    model = copy.deepcopy(model).eval()
    moments: dict[nn.Module, list[Tensor]] = {layer: [] for layer in _batch_norms(model)}

    def measure(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        moments[layer].append(torch.stack(torch.var_mean(inputs[0].float(), (0, 2, 3))))

    hooks = [layer.register_forward_pre_hook(measure) for layer in moments]
    _forward(model, images, mean, std, precision)
    for layer, hook in zip(moments, hooks, strict=True):
        hook.remove()
        variance, centre = torch.stack(moments[layer]).mean(0)
        scale = layer.weight / (layer.running_var + layer.eps).sqrt()
        layer.bias += scale * (centre - layer.running_mean)
        layer.weight.copy_(scale * (variance + layer.eps).sqrt())
        layer.running_mean.copy_(centre)
        layer.running_var.copy_(variance)
    return model


def _batch_norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def _forward(
    model: nn.Module, images: Tensor, mean: Channels, std: Channels, precision: str
) -> None:
    for inputs in batches(model, images, mean, std, STATISTICS_BATCH):
        with computing(inputs.device, precision):
            model(inputs)
