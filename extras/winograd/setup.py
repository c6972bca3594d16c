"""Compiles winograd.cpp for the processor it is installed on, against the torch at hand:

pip install --no-build-isolation ./extras/winograd
"""

from pathlib import Path

import torch
from setuptools import setup
from setuptools.command.build_py import build_py
from torch.utils.cpp_extension import BuildExtension, CppExtension

FLAGS = {
    "AVX2": ["-mavx2", "-mfma"],
    "AVX512": ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma"],
}
RECORD = Path("cifar_winograd_build.py")
capability = torch.backends.cpu.get_cpu_capability()


class RecordTorch(build_py):
    """Also installs which torch this is compiled against: cifar_lib reads that before it loads what
    was compiled, which would crash in another torch."""

    def run(self) -> None:
        text = f'"""Written by setup.py."""\n\nTORCH = "{torch.__version__}"\n'
        RECORD.write_text(text, encoding="utf-8")
        super().run()


setup(
    ext_modules=[
        CppExtension(
            "_cifar_winograd",
            ["winograd.cpp"],
            extra_compile_args=["-O3", "-fopenmp", *FLAGS.get(capability, [])],
            # Compiled anew whenever the record is written: build/ may hold another torch's.
            depends=[str(RECORD)],
        )
    ],
    cmdclass={
        "build_py": RecordTorch,
        "build_ext": BuildExtension.with_options(use_ninja=False),
    },
)
