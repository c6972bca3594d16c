"""Train a small ResNet on CIFAR-10 and explain its mistakes."""

from cifar_lib import environment

__version__ = "0.1.0"

# What PyTorch reads when it is imported, or at the first tensor: before any module here imports it.
environment.prepare_for_torch()
