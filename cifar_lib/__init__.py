"""Train a small ResNet on CIFAR-10 and explain its mistakes."""

import getpass
import os

__version__ = "0.1.0"

# Large tensors in huge pages, where Linux gives them on request: a CPU then looks up fewer
# addresses, and trains about a tenth faster. PyTorch reads this at the process's first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

try:
    getpass.getuser()
except (KeyError, OSError):  # a container's user without a name: importing torch would fail
    os.environ["USER"] = str(os.getuid())
