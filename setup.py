"""Extensions and package map only; metadata is in pyproject.toml. Nothing here probes hardware:
instruction sets are compiled in and chosen at run time."""

import platform

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

# torch 2.10 is the oldest torch whose stable ABI has all that the bindings use; Python 3.10's
# limited API is the oldest Python. One binary serves everything newer.
DEFINES = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]  # Py_LIMITED_API: BuildExtension
FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-ffp-contract=fast",  # a * b + c becomes an FMA: csrc/cpu/simd.h relies on it
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    "-Wno-maybe-uninitialized",  # GCC's own AVX-512 headers
    "-Wno-uninitialized",
    "-Wno-psabi",  # vectors of two registers are passed by inlined functions alone
]
X86 = ["avx2", "avx512", "amx"] if platform.machine() in ("x86_64", "AMD64") else []

setup(
    packages=[
        "fastattn",
        "fastattn.cli",
        "fastattn.kernels",
        "fastattn.nn",
        "fastattn.ops",
        "fastattn.swap",
    ],
    package_dir={"fastattn.kernels": "kernels"},
    ext_modules=[
        CppExtension(
            "fastattn._C",
            [
                "csrc/bindings/module.cpp",
                "csrc/bindings/attention.cpp",
                "csrc/cpu/isa.cpp",
                "csrc/cpu/scratch.cpp",
                "csrc/cpu/attention.cpp",
                *(f"csrc/cpu/attention_{isa}.cpp" for isa in ["portable", *X86]),
            ],
            extra_compile_args=DEFINES + FLAGS,
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
