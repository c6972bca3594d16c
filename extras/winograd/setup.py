"""Compiles winograd.cpp for the processor it is installed on, against the torch at hand:

pip install --no-build-isolation ./extras/winograd
"""

import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

FLAGS = {
    "AVX2": ["-mavx2", "-mfma"],
    "AVX512": ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma"],
}
capability = torch.backends.cpu.get_cpu_capability()

setup(
    ext_modules=[
        CppExtension(
            "_cifar_winograd",
            ["winograd.cpp"],
            extra_compile_args=["-O3", "-fopenmp", *FLAGS.get(capability, [])],
        )
    ],
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=False)},
)
