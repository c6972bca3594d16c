"""Train a small ResNet on CIFAR-10 and explain its mistakes."""

from cifar_lib import environment

__version__ = "0.1.0"

# Set the variables that PyTorch reads when it is imported or makes its first tensor. This must
# happen before any module here imports PyTorch.
environment.prepare_for_torch()
