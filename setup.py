"""Extensions and package map only; metadata is in pyproject.toml. Nothing here probes hardware:
instruction sets are compiled in and chosen at run time.

``fastattn._C`` (the CPU's kernels) is always built. ``fastattn._C_cuda`` is built where torch is a
CUDA build and nvcc with its headers is found (csrc/cuda/toolkit.py). FASTATTN_CUDA=1 makes its
absence an error, FASTATTN_CUDA=0 leaves it out. TORCH_CUDA_ARCH_LIST names the architectures.
FASTATTN_LOCAL_VERSION, for wheels, is what follows the version in their name: cu130.
FASTATTN_SANITIZE, for `make fuzz-asan` and `fuzz-ubsan`, is what GCC's -fsanitize gets for the
CPU's kernels; such a build goes to a folder of its own (`build --build-lib`).
"""

import os
import platform
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).resolve().parent
BINDINGS = ROOT / "csrc" / "bindings"
sys.path.insert(0, str(ROOT / "csrc" / "cuda"))
import toolkit  # noqa: E402

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
    # __FILE__, in torch's headers too, names no folder of the machine that built it.
    f"-ffile-prefix-map={ROOT}/=",
    f"-ffile-prefix-map={Path(torch.__file__).parents[1]}/=",
]


def sanitizer() -> tuple[list[str], list[str]]:
    """What FASTATTN_SANITIZE adds to the compiler's and to the linker's arguments."""
    wish = os.environ.get("FASTATTN_SANITIZE", "")
    if not wish:
        return [], []
    if not set(wish.split(",")) <= {"address", "undefined"}:
        raise SystemExit(f"FASTATTN_SANITIZE must be address, undefined or both, got {wish!r}")
    if {"--inplace", "-i", "develop"} & set(sys.argv):
        raise SystemExit("FASTATTN_SANITIZE: in place it would be everybody's build")
    on = [f"-fsanitize={wish}", "-fno-sanitize-recover=all"]
    # -O1: -O3 takes three times as long here and moves accesses away from their lines.
    return [*on, "-O1", "-g1", "-fno-omit-frame-pointer"], on


SANITIZE, SANITIZE_LINK = sanitizer()
X86 = ["avx2", "avx512", "amx"] if platform.machine() in ("x86_64", "AMD64") else []


def architectures() -> "toolkit.Architectures":
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or toolkit.ARCHS
    try:
        return toolkit.Architectures.parse(archs)
    except toolkit.ToolkitError as why:
        raise SystemExit(f"TORCH_CUDA_ARCH_LIST: {why}") from None


class Build(BuildExtension):
    """Compiles an extension's .cu files with nvcc first. They know nothing of torch, so torch's own
    CUDAExtension, which wants a complete toolkit of torch's very version, is not needed."""

    def build_extension(self, ext: Extension) -> None:
        shared = self.build_temp
        # module.cpp is in every extension, compiled for each.
        self.build_temp = str(Path(shared) / ext.name)
        kernels = [s for s in ext.sources if s.endswith(".cu")]
        if kernels:
            ext.sources = [s for s in ext.sources if s not in kernels]
            jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
            threads = -(-jobs // len(kernels))  # of one nvcc: the architectures of a file
            with ThreadPoolExecutor(jobs) as pool:
                objects = pool.map(lambda kernel: self._nvcc(kernel, threads), kernels)
                ext.extra_objects = [*objects, *ext.extra_objects]
        super().build_extension(ext)
        self.build_temp = shared

    def _nvcc(self, source: str, threads: int) -> str:
        out = Path(self.build_temp) / Path(source).with_suffix(".o")
        made_by = out.with_suffix(".command")
        flags = [*toolkit.FLAGS, *architectures().flags(), *CUDA.flags()]
        command = [str(CUDA.nvcc), *flags, "-c", source, "-o", str(out)]
        text = f"{CUDA.version} {' '.join(command)}"
        csrc = ROOT / "csrc"
        newest = max(p.stat().st_mtime for p in (*csrc.glob("*.h"), *csrc.glob("cuda/*.[ch]*")))
        # Minutes for a file; ninja, which knows what to leave alone, has the others.
        same = out.exists() and made_by.exists() and made_by.read_text() == text
        if same and out.stat().st_mtime > newest:
            return str(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        made_by.unlink(missing_ok=True)
        print(" ".join(command), flush=True)
        subprocess.run([*command, f"--threads={threads}"], check=True)
        made_by.write_text(text)
        return str(out)


def cuda_toolkit() -> "toolkit.Toolkit | None":
    """What _C_cuda is built with; None = it is not built, and the log says why."""
    wish = os.environ.get("FASTATTN_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"FASTATTN_CUDA must be 0, 1 or unset, got {wish!r}")
    if wish == "0":
        return None
    try:
        if torch.version.cuda is None:
            raise toolkit.ToolkitError(f"torch {torch.__version__} is not built for CUDA")
        found = toolkit.find()
        if found.version[0] != int(torch.version.cuda.split(".")[0]):
            # Its runtime is linked in, and would want another driver than torch does.
            raise toolkit.ToolkitError(
                f"nvcc is of CUDA {found.version[0]}, torch of CUDA {torch.version.cuda}"
            )
        found.static_runtime()
    except toolkit.ToolkitError as why:
        if wish == "1":
            raise SystemExit(f"FASTATTN_CUDA=1, but {why}") from None
        print(f"fastattn is built without its CUDA kernels: {why}")
        return None
    return found


def local_version(found: "toolkit.Toolkit | None") -> str:
    label = os.environ.get("FASTATTN_LOCAL_VERSION", "")
    built = "cu{}{}".format(*found.version) if found else "without CUDA"
    if re.fullmatch(r"cu\d+", label) and label != built:
        raise SystemExit(f"FASTATTN_LOCAL_VERSION={label}, but this build is {built}")
    return f"+{label}" if label else ""


def cuda_extension(found: "toolkit.Toolkit") -> Extension:
    archs = architectures()
    return CppExtension(
        "fastattn._C_cuda",
        [
            "csrc/bindings/module.cpp",
            *sorted(str(p.relative_to(ROOT)) for p in BINDINGS.glob("*_cuda.cpp")),
            *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "cuda").glob("*.cu")),
        ],
        include_dirs=[str(p) for p in found.headers],
        libraries=["torch_cuda", "dl", "rt", "pthread"],
        extra_objects=[str(found.static_runtime())],
        extra_compile_args=[
            *(*DEFINES, *FLAGS, "-DUSE_CUDA"),
            f"-DFASTATTN_CUBINS={','.join(archs.cubins)}",  # what `doctor` shows
            f"-DFASTATTN_PTX={','.join(archs.ptx)}",
        ],
        extra_link_args=["-Wl,--exclude-libs,ALL"],  # the runtime's symbols are nobody else's
        py_limited_api=True,
    )


CUDA = cuda_toolkit()

setup(
    packages=[
        "fastattn",
        "fastattn.cli",
        "fastattn.kernels",
        "fastattn.nn",
        "fastattn.ops",
        "fastattn.reference",
        "fastattn.swap",
    ],
    package_dir={"fastattn.kernels": "kernels"},
    ext_modules=[
        CppExtension(
            "fastattn._C",
            [
                "csrc/bindings/module.cpp",
                "csrc/bindings/attention.cpp",
                "csrc/bindings/attention_kv_cache.cpp",
                "csrc/bindings/embedding.cpp",
                "csrc/bindings/decoder_layer.cpp",
                "csrc/bindings/encoder_layer.cpp",
                "csrc/bindings/layernorm.cpp",
                "csrc/bindings/layernorm_ffn.cpp",
                "csrc/bindings/linear_cross_entropy.cpp",
                "csrc/bindings/products.cpp",
                "csrc/bindings/recurrent.cpp",
                "csrc/bindings/recurrent_step.cpp",
                "csrc/cpu/isa.cpp",
                "csrc/cpu/huge_pages.cpp",
                "csrc/cpu/scratch.cpp",
                "csrc/cpu/attention.cpp",
                "csrc/cpu/attention_kv_cache.cpp",
                "csrc/cpu/embedding.cpp",
                "csrc/cpu/layernorm_ffn.cpp",
                "csrc/cpu/recurrent.cpp",
                *(
                    f"csrc/cpu/{op}_{isa}.cpp"
                    for op in [
                        "attention",
                        "attention_kv_cache",
                        "embedding",
                        "layernorm_ffn",
                        "recurrent",
                    ]
                    for isa in ["portable", *X86]
                ),
            ],
            extra_compile_args=DEFINES + FLAGS + SANITIZE,
            extra_link_args=SANITIZE_LINK,
            py_limited_api=True,
        ),
        *([cuda_extension(CUDA)] if CUDA else []),
    ],
    cmdclass={"build_ext": Build},
    options={
        "bdist_wheel": {"py_limited_api": "cp310"},
        "egg_info": {"tag_build": local_version(CUDA)},
    },
)
