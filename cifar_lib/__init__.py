"""Train a small ResNet on CIFAR-10 and explain its mistakes."""

__version__ = "0.1.0"
