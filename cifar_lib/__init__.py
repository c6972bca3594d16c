"""Train a small ResNet on CIFAR-10 and explain its mistakes."""

import getpass
import os

__version__ = "0.1.0"

# Large tensors in huge pages, where Linux gives them on request: a CPU then looks up fewer
# addresses, and trains about a tenth faster. PyTorch reads this at the process's first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

try:
    getpass.getuser()
except (KeyError, OSError, ImportError):  # a user without a name: importing torch would fail
    # A container's user has a number at least; Windows has neither the number nor the module pwd.
    os.environ["USER"] = str(os.getuid()) if hasattr(os, "getuid") else "user"
