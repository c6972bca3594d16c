"""A moving average of the weights, which a run can end with in place of the last weights."""

import copy

from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class MovingAverage:
    """The exponential moving average of a network's weights and batch-norm statistics.

    model: a network with the averages. They begin with the values of the network that is averaged.

    `torch.optim.swa_utils.AveragedModel` does the same, but sends the number of its updates to the
    device in each step and waits until it is there. This class never waits for a GPU.
    """

    def __init__(self, model: nn.Module, decay: float):
        """Average `model`, whose values must be changed in place, as optimizers change them."""
        self.model = copy.deepcopy(model)
        self._averages, self._current = _floats(self.model), _floats(model)
        self._move = get_ema_multi_avg_fn(decay)

    def update(self) -> None:
        """Set each average to decay * average + (1 - decay) * current value."""
        self._move(self._averages, self._current, None)  # None: the number of updates isn't used


def _floats(model: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers, without the batch norms' counts of batches."""
    return [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
