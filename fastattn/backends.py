"""Which backends exist here, why not the rest, and which one an op takes.

The whole policy is the table ``_AUTO`` below: the backends that ``auto`` tries in order. An
explicit backend that cannot serve a call raises; ``auto`` takes the next one that can. What
``fastattn.tune`` measured on a machine (``choices.py``) goes before the table, and may be torch's
own ops (``backend="torch"``, ``ops/stock.py``), which the table never takes.

| device          | order           | why                                                          |
|-----------------|-----------------|--------------------------------------------------------------|
| cpu             | cpu, reference  | the C++ kernels serve fp32, bf16, fp16; fp64 is the oracle's |
| cuda 9.x, 10.x  | triton, cuda,   | 16 bit: these have tensor-core instructions of their own,    |
|                 | reference       | which Triton emits and the CUDA C++ kernels do not           |
| cuda 8.x, 12.x  | cuda, triton,   | 16 bit: one kind of instruction; the CUDA C++ tiles read     |
|                 | reference       | less shared memory a product (bench/model/REPORT.md: model)  |
| 8.0, 9.0, fp32  | cuda, triton,   | CUDA C++ has a third of the tf32 rate (3 x tf32), Triton     |
|                 | reference       | that of the FMA units: peaks of 52 to 19.5 TFLOP/s on an     |
|                 |                 | A100; on an H100 104 to 67 with what mma.sync was measured   |
|                 |                 | to reach there (by others, see bench/model/archs.py)         |
| other cuda,     | triton, cuda,   | there tf32 is no faster than FMA (8.6, 8.9, 12.x), a third   |
| fp32            | reference       | of it slower; of mma.sync on 10.x no rate is documented      |
| ROCm            | triton,         | nothing else is compiled for it                              |
|                 | reference       |                                                              |
| other           | reference       | plain PyTorch runs wherever torch does                       |

``layernorm_ffn`` takes CUDA C++ first, on every NVIDIA GPU, where a call is narrow enough for the
whole block in one kernel to pay (:func:`ffn_block_pays`), and never otherwise.
``lstm``, ``gru`` and ``rnn`` take CUDA C++ before Triton on every NVIDIA GPU: its recurrent weights
stay on chip for the whole call, and steps meet at a barrier (about 1.5 us, others' measurement on
an H100) where Triton launches a kernel a step (about 3 us), or has one SM for a slice of the batch.
``auto`` tries a backend only for the ops that it has kernels of: norms and bias_act have Triton's
alone, whatever the row says. They are bound by memory, and a pass in any language moves the same
bytes.

GPU kernels check themselves at first use (fastattn.first_use); none was timed on hardware yet, so
the order is arithmetic. fp64 and head_dim above 256 go to plain PyTorch, with one warning, as does
everything on GPUs before compute capability 8.0.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

import fastattn.kernels.launch

try:
    import fastattn._C  # registers the CPU kernels under torch.ops.fastattn

    _C_ERROR = ""
except ImportError as error:  # a source tree that was never built: every op says so by name
    _C_ERROR = str(error)

try:
    import fastattn._C_cuda  # registers the CUDA kernels

    _C_CUDA_ERROR = ""
except ImportError as error:  # built without: backend="cuda" says so by name
    _C_CUDA_ERROR = str(error)

BACKENDS = ("auto", "cuda", "triton", "cpu", "reference")
# Torch has no op of these, so they take no backend="torch" and fastattn.tune leaves them alone.
WITHOUT_STOCK = ("attention_with_kv_cache", "linear_cross_entropy", "decoder_layer")

_AUTO: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "cuda": ("cuda", "triton", "reference"),
    "cuda, triton first": ("triton", "cuda", "reference"),
}
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_GPU_MAX_HEAD_DIM = 256  # Triton's and CUDA C++'s kernels
# What the GPU backends have kernels of, up to now; any number of features and hidden features, but
# CUDA C++'s layernorm_ffn.
_ATTENTION = ("attention", "attention_varlen", "attention_with_kv_cache")
_ROW_OPS = ("layer_norm", "rms_norm", "add_layer_norm", "bias_act", "layernorm_ffn")
_RECURRENT = ("lstm", "gru", "rnn")
_GPU_OPS: dict[str, tuple[str, ...]] = {
    "triton": (*_ATTENTION, *_ROW_OPS, *_RECURRENT),
    "cuda": (*_ATTENTION, "layernorm_ffn", *_RECURRENT),
}
_FFN_MAX_WIDTH = 256  # columns of x and y that the CUDA C++ kernel of layernorm_ffn serves

# Where Triton's layernorm_ffn is one kernel: see whole_block.
_BLOCK_ROWS, _BLOCK_ROWS_WIDE = 4096, 1024
_BLOCK_FEATURES, _BLOCK_FEATURES_FP32 = 256, 64

# The oldest driver of each CUDA runtime's generation (CUDA's "minor version compatibility": within
# a major version any runtime works with any driver). The wheel's PTX wants the same one, as long as
# it comes from the first toolkit of a generation, 13.0.
_MINIMUM_DRIVER = {12: "525", 13: "580"}

# True while a test runs the CUDA kernels on CPU tensors: it has loaded the binding that tests/sim
# builds for them.
cuda_stand_in = False

# In the order of csrc/cpu/isa.h.
_ISAS = ("portable", "avx2", "avx512", "amx")


class PerformanceWarning(UserWarning):
    """A call is correct but runs on a slower path than it could."""


@dataclass(frozen=True)
class BackendInfo:
    """One backend: its name, whether it can be used here, why (not), and details."""

    name: str
    usable: bool
    why: str
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CudaBuild:
    """What ``fastattn._C_cuda`` was built with, and what this machine's driver is for it.

    Versions are (major, minor) of CUDA; ``driver`` is the newest that the driver knows, None
    without one. ``cubins`` and ``ptx`` name architectures: "80", "90a".
    """

    runtime: tuple[int, int]
    driver: tuple[int, int] | None
    cubins: tuple[str, ...]
    ptx: tuple[str, ...]

    @property
    def minimum_driver(self) -> str:
        return _MINIMUM_DRIVER.get(self.runtime[0], f"one of CUDA {self.runtime[0]}")

    def why_not(self) -> str | None:
        """None where the driver is new enough, or there is none at all; else the reason."""
        if self.driver is None or self.driver[0] >= self.runtime[0]:
            return None
        return (
            f"fastattn was built with CUDA {_dotted(self.runtime)} and needs driver "
            f"{self.minimum_driver} or later; the one here knows CUDA up to {_dotted(self.driver)}"
        )


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


@functools.cache
def cuda_build() -> CudaBuild | None:
    """Facts about ``fastattn._C_cuda``, None where it is not there; asks the driver its version."""
    if _C_CUDA_ERROR:
        return None
    info = fastattn._C_cuda.build_info()
    runtime, driver = (divmod(info[name], 1000) for name in ("runtime", "driver"))
    return CudaBuild(
        runtime=(runtime[0], runtime[1] // 10),
        driver=(driver[0], driver[1] // 10) if info["driver"] else None,
        cubins=tuple(info["cubins"].split(",")),
        ptx=tuple(filter(None, info["ptx"].split(","))),
    )


def backends() -> list[BackendInfo]:
    """List every backend with whether it is usable on this machine, and why not.

    Returns:
        One :class:`BackendInfo` for each of ``cpu``, ``triton``, ``cuda``, ``reference``.

    >>> import fastattn
    >>> [b.name for b in fastattn.backends()]
    ['cpu', 'triton', 'cuda', 'reference']
    """
    if _C_ERROR:
        cpu = BackendInfo("cpu", False, f"fastattn._C is not built or does not load: {_C_ERROR}")
    else:
        details = {"isa": cpu_isa(), "isas": cpu_isas(), "threads": torch.get_num_threads()}
        cpu = BackendInfo("cpu", True, "C++ kernels for fp32, bf16, fp16", details)
    return [
        cpu,
        _triton_info(),
        _cuda_info(),
        BackendInfo("reference", True, "plain PyTorch on any device, every dtype; the oracle"),
    ]


def _triton_info() -> BackendInfo:
    missing = _triton_missing()
    if missing is not None:
        return BackendInfo("triton", False, missing)
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        return BackendInfo("triton", True, "Triton kernels for fp32, bf16, fp16", {"device": name})
    if _triton_on_cpu():
        return BackendInfo("triton", True, "in Triton's interpreter on the CPU, for tests: slow")
    return BackendInfo("triton", False, "torch sees no GPU (torch.cuda.is_available() is False)")


def _cuda_info() -> BackendInfo:
    if cuda_stand_in:
        return BackendInfo("cuda", True, "in the PTX simulator on the CPU, for tests: slow")
    missing = _cuda_missing()
    if missing is not None:
        return BackendInfo("cuda", False, missing)
    if not torch.cuda.is_available():
        return BackendInfo("cuda", False, "torch sees no GPU (torch.cuda.is_available() is False)")
    name = torch.cuda.get_device_name()
    if not _new_enough():
        return BackendInfo("cuda", False, f"{name} is older than compute capability 8.0")
    why = "CUDA C++ kernels for fp32, bf16, fp16"
    return BackendInfo("cuda", True, why, {"device": name})


def _cuda_missing() -> str | None:
    if torch.version.hip:
        return "its kernels are for NVIDIA GPUs; this torch is built for ROCm"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built for CPUs; the kernels need one built for CUDA"
    if _C_CUDA_ERROR:
        return (
            f"fastattn._C_cuda is not built or does not load ({_C_CUDA_ERROR}); build fastattn "
            "with nvcc and FASTATTN_CUDA=1, or install its CUDA wheel"
        )
    if torch.compiler.is_compiling():  # no tracer follows a call into the extension
        return None
    build = cuda_build()
    return build.why_not() if build is not None else None


def _new_enough() -> bool:
    if torch.version.hip or not torch.cuda.is_available():  # fake tensors need no device
        return True
    return torch.cuda.get_device_capability() >= (8, 0)


def _triton_missing() -> str | None:
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:  # no origin: a folder that happens to have the name
        return "triton is not installed; it comes with torch's CUDA and ROCm wheels for Linux"
    return None


def _triton_on_cpu() -> bool:
    """Whether a launch on CPU tensors goes anywhere: to the interpreter, or to a test's hook."""
    interpret = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
    return interpret or fastattn.kernels.launch.hook is not None


def cpu_isas() -> list[str]:
    """The CPU instruction sets that this machine can run, slowest first."""
    mask = torch.ops.fastattn.cpu_isas_available(0)
    return [name for i, name in enumerate(_ISAS) if mask >> i & 1]


def cpu_isa() -> str:
    """The CPU instruction set that the kernels use now."""
    return _ISAS[torch.ops.fastattn.cpu_isa_force(-2)]


@contextlib.contextmanager
def force_cpu_isa(name: str) -> Iterator[None]:
    """Run the CPU kernels on one instruction set inside a ``with`` block (for tests and benches).

    Args:
        name: one of :func:`cpu_isas`; process-wide while the block runs.

    Raises:
        ValueError: this machine cannot run it.
    """
    if name not in cpu_isas():
        raise ValueError(f"instruction set {name!r} is not usable here; usable: {cpu_isas()}")
    former = cpu_isa()
    torch.ops.fastattn.cpu_isa_force(_ISAS.index(name))
    try:
        yield
    finally:
        torch.ops.fastattn.cpu_isa_force(_ISAS.index(former))


def _why_not(
    op: str, backend: str, device: str, dtype: torch.dtype, head_dim: int = 0
) -> str | None:
    """None where ``backend`` can serve the call, else the reason why it cannot."""
    if backend == "reference":
        return None
    if backend == "cpu":
        if _C_ERROR:
            return f"fastattn._C is not built or does not load ({_C_ERROR}); reinstall fastattn"
        if device != "cpu":
            return f"it takes CPU tensors, got device {device!r}"
        if dtype not in _KERNEL_DTYPES:
            return f"it supports float32, bfloat16 and float16, got q.dtype {dtype}"
        return None
    if op not in _GPU_OPS[backend]:
        return f"it has no kernel of {op}"
    if backend == "triton":
        missing = _triton_missing()
        if missing is not None:
            return missing
        if device == "cpu" and not _triton_on_cpu():
            return (
                "it takes CUDA tensors, got device 'cpu' (tests run it there in Triton's "
                "interpreter, TRITON_INTERPRET=1)"
            )
        if device not in ("cuda", "cpu"):
            return f"it takes CUDA tensors, got device {device!r}"
        if device == "cuda" and not _new_enough():
            return "Triton needs a GPU of compute capability 8.0 or later"
        return _why_not_the_values(dtype, head_dim if op in _ATTENTION else 0)
    if device == "cpu" and not cuda_stand_in:
        return "it takes CUDA tensors, got device 'cpu'"
    if device not in ("cuda", "cpu"):
        return f"it takes CUDA tensors, got device {device!r}"
    if device == "cuda":
        missing = _cuda_missing()
        if missing is not None:
            return missing
        if not _new_enough():
            return "the CUDA kernels need a GPU of compute capability 8.0 or later"
    if op == "layernorm_ffn":
        return _why_not_the_ffn(dtype, head_dim)
    return _why_not_the_values(dtype, head_dim)


def _why_not_the_values(dtype: torch.dtype, head_dim: int) -> str | None:
    if dtype not in _KERNEL_DTYPES:
        return f"it supports float32, bfloat16 and float16, got q.dtype {dtype}"
    if head_dim > _GPU_MAX_HEAD_DIM:
        return f"it supports head_dim up to {_GPU_MAX_HEAD_DIM}, got {head_dim}"
    return None


def _why_not_the_ffn(dtype: torch.dtype, width: int) -> str | None:
    if dtype not in _KERNEL_DTYPES:
        return f"it supports float32, bfloat16 and float16, got x.dtype {dtype}"
    if width > _FFN_MAX_WIDTH:
        return (
            f"its kernel holds whole rows on chip, up to {_FFN_MAX_WIDTH} columns of x and of y, "
            f"got {width}"
        )
    return None


def whole_block(rows: int, features: int, features_out: int, dtype: torch.dtype) -> bool:
    """Whether layernorm_ffn on a GPU is one kernel (kernels/layernorm_ffn_block.py) or GEMMs with
    passes around: one, where launches decide.

    The composition launches five kernels, about 3 us each where the GPU waits for the CPU, so the
    block gains 12 us. The composition moves 8 F bytes a row of hidden layer, in 16 bit and at an
    H100's 3.35 TB/s with F = 4 D 1.2 ns a row at D = 128 and 2.4 at D = 256. The block reads all
    weights, 4 D F bytes, a tile of rows, from L2 at about 5.5 TB/s: 1.5 ns a row at D = 128 (32
    rows), 12 at D = 256 (16). So it wins up to 40000 and 1200 rows; 4096 and 1024 leave room for
    the estimate (from peaks; not timed). Beyond 256 features, 64 in fp32, registers cannot hold a
    tile. dtype: the weights'.
    """
    widest = max(features, features_out)
    most = _BLOCK_FEATURES_FP32 if dtype == torch.float32 else _BLOCK_FEATURES
    return widest <= most and rows <= (_BLOCK_ROWS if widest <= 128 else _BLOCK_ROWS_WIDE)


def of_part(op: str, backend: str, width: int = 0) -> str:
    """The backend of one op inside a model or module of several: the module's, or "auto" where that
    one has no kernel of the op (norms in CUDA C++, nor layernorm_ffn of so many columns)."""
    if not isinstance(backend, str):  # for select to refuse
        return backend
    wide = op == "layernorm_ffn" and backend == "cuda" and width > _FFN_MAX_WIDTH
    return "auto" if wide or op not in _GPU_OPS.get(backend, (op,)) else backend


def can_serve(op: str, backend: str, device: str, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether ``backend`` could run the op on such tensors here; its first-use check aside."""
    return _why_not(op, backend, device, dtype, head_dim) is None


def select(op: str, backend: str, device: str, dtype: torch.dtype, head_dim: int = 0) -> str:
    """The backend that ``op`` takes: the explicit one, or the first of the table that can.

    Raises:
        ValueError: an unknown backend, or an explicit one that cannot serve the call.
    """
    if not isinstance(backend, str):
        raise TypeError(f"fastattn::{op}: backend must be one of {_names(op)}, got {backend!r}")
    # A compiled graph must not depend on what eager calls leave here: it would be compiled again.
    compiling = torch.compiler.is_compiling()
    chosen = None if compiling else _chosen.get((op, backend, device, dtype))
    if chosen is None:
        chosen = _select(op, backend, device, dtype)
        # A GPU's kernels on the CPU are there while a test has made them so.
        lasting = not (backend in ("triton", "cuda") and device == "cpu")
        if lasting and not compiling:
            _chosen[op, backend, device, dtype] = chosen
    if chosen in ("triton", "cuda") and head_dim > _GPU_MAX_HEAD_DIM:
        return _select(op, backend, device, dtype, head_dim)
    return chosen


def select_layernorm_ffn(
    backend: str, device: str, dtype: torch.dtype, rows: int, width: int, training: bool
) -> str:
    """The backend of a call of layernorm_ffn with that many rows, and columns of x or y; ``auto``
    takes the CUDA C++ kernel, the whole block in one, where :func:`ffn_block_pays`."""
    if backend != "auto" or device != "cuda":
        return select("layernorm_ffn", backend, device, dtype, width)
    pays = ffn_block_pays(rows, width, training)
    name = f"layernorm_ffn, block {pays}"
    compiling = torch.compiler.is_compiling()
    chosen = None if compiling else _chosen.get((name, backend, device, dtype))
    if chosen is None:
        others = tuple(b for b in _order(device, dtype) if b != "cuda")
        order = ("cuda", *others) if pays else others
        chosen = _select("layernorm_ffn", backend, device, dtype, width, order)
        if not compiling:
            _chosen[name, backend, device, dtype] = chosen
    return chosen


def ffn_block_pays(rows: int, width: int, training: bool) -> bool:
    """Whether layernorm_ffn in one kernel beats GEMMs with passes between, by arithmetic alone (no
    GPU has timed it yet).

    A hidden unit of a row is 4 D FLOPs either way; GEMMs move 4 elements of it through memory, u
    and a written and read. At 16 bit on an A100 (312 TFLOP/s, 1.56 TB/s; the kernel at half of
    the peak, as a B fragment serves 16 rows alone, GEMMs of depth 256 at two thirds) and D = 256
    that is 6.6 ps against 4.9 + 5.1 ps; on an H100 (989, 3.35; mma.sync reaches 0.6 of wgmma) 3.5
    against 1.6 + 2.4 ps. Its backward, which makes u again in each of its passes, has 8 products
    where GEMMs have 4, to save 8 elements: 26 ps against 10 + 10 at D = 256, 13 against 5 + 10 at
    128. Few rows are a matter of launches and of reading the weights: one or two instead of five.
    """
    if width > _FFN_MAX_WIDTH:
        return False
    return not training or width <= _FFN_MAX_WIDTH // 2 or rows <= 128


_chosen: dict[tuple[str, str, str, torch.dtype], str] = {}


def _order(device: str, dtype: torch.dtype) -> tuple[str, ...]:
    """The row of the table."""
    if device == "cuda" and not torch.version.hip and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if dtype == torch.float32:
            triton_first = capability not in ((8, 0), (9, 0))
        else:
            triton_first = capability[0] in (9, 10)
        if triton_first:
            return _AUTO["cuda, triton first"]
    return _AUTO.get(device, ("reference",))


def _names(op: str) -> tuple[str, ...]:
    """What an op takes as ``backend``: most ops know torch's own too (``choices.py``)."""
    return BACKENDS if op in WITHOUT_STOCK else (*BACKENDS, "torch")


def _select(
    op: str,
    backend: str,
    device: str,
    dtype: torch.dtype,
    head_dim: int = 0,
    order: tuple[str, ...] | None = None,
) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"fastattn::{op}: backend must be one of {_names(op)}, got {backend!r}")
    if backend != "auto":
        why = _why_not(op, backend, device, dtype, head_dim)
        if why is not None:
            raise ValueError(f"fastattn::{op}: backend={backend!r} cannot serve this call: {why}")
        return backend
    if order is None:
        by_barrier = device == "cuda" and op in _RECURRENT
        order = _AUTO["cuda"] if by_barrier else _order(device, dtype)
    for candidate in order:
        why = _why_not(op, candidate, device, dtype, head_dim)
        if why is None:
            break
    slow = candidate == "reference" and not (device == "cpu" and dtype == torch.float64)
    slow = slow and device != "meta"  # where nothing is computed
    if slow and not torch.compiler.is_compiling():
        memory = "memory Sq x Sk, " if op in _ATTENTION else ""
        warnings.warn(
            f"fastattn::{op} runs the plain PyTorch reference for {dtype} on {device!r} "
            f"({memory}no fused kernel); see fastattn.backends()",
            PerformanceWarning,
            stacklevel=5,
        )
    return candidate
