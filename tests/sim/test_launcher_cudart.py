"""The stand-in for the CUDA runtime: what nvcc's host code hands over arrives, what CUDA refuses is
refused, and a library linked with it shares nothing with the libcudart of torch."""

import ctypes
import subprocess
from collections.abc import Callable

import numpy as np
import pytest

from sim import build, ptx
from sim.cudart import (
    FILLED_RESULT,
    INVALID_CONFIGURATION,
    INVALID_VALUE,
    LAUNCH_FAILURE,
    NO_KERNEL_IMAGE,
    READ,
    RESULT,
    SUCCESS,
    Device,
    fatbin,
)

INVALID_DEVICE_FUNCTION, COOPERATIVE_TOO_LARGE, NOT_SUPPORTED = 98, 720, 801
KIB = 1 << 10
_loaded: list[tuple[Device, ctypes.CDLL]] = []


@pytest.fixture
def toys() -> tuple[Device, ctypes.CDLL]:
    if not _loaded:
        path = build.toys()
        _loaded.append((Device(path), ctypes.CDLL(str(path))))
    device, library = _loaded[0]
    device.play("sm_80")
    device.forget()
    device.launches.clear()
    device.faults.clear()
    library.toy_error_text.restype = ctypes.c_char_p
    return device, library


def give(device: Device, x: np.ndarray, access: int, name: str) -> ctypes.c_void_p:
    device.add(x.ctypes.data, x.nbytes, access, name)
    return ctypes.c_void_p(x.ctypes.data)


def dims(*n: int) -> ctypes.Array:
    return (ctypes.c_uint32 * 3)(*n)


# --------------------------------------------------------------------------- what arrives


@pytest.mark.parametrize("times", [2, 3])
def test_arguments_of_every_kind(toys: tuple[Device, ctypes.CDLL], times: int) -> None:
    """A struct with padding, a float, a char and a pointer, into the right instance of a template,
    whose __device__ table has its values."""
    device, library = toys
    x = np.arange(50, dtype=np.float32)
    out = np.full(50, np.nan, np.float32)
    error = library.toy_mixed(
        give(device, out, RESULT, "out"), give(device, x, READ, "x"), 50, times
    )
    assert error == SUCCESS, device.faults
    table = np.array([1, 2, 4, 8], np.float32)[np.arange(50) % 4]
    np.testing.assert_array_equal(out, times * x + 0.5 + 0.25 - 7 + 3 + table)
    (launch,) = device.launches
    assert f"mixedILi{times}E" in launch.kernel
    assert (launch.grid, launch.block) == ((2, 1, 1), (32, 1, 1))


def test_grid_block_and_stream(toys: tuple[Device, ctypes.CDLL]) -> None:
    device, library = toys
    out = np.full((4, 6, 12), -1, np.int32)
    at = give(device, out, RESULT, "out")
    error = library.toy_where(at, dims(3, 2, 1), dims(4, 3, 4), ctypes.c_void_p(0x5EED))
    assert error == SUCCESS, device.faults
    z, y, x = np.indices(out.shape)
    np.testing.assert_array_equal(out, 10000 * z + 100 * y + x)
    (launch,) = device.launches
    assert (launch.grid, launch.block, launch.stream) == ((3, 2, 1), (4, 3, 4), 0x5EED)


def test_launches_without_brackets(toys: tuple[Device, ctypes.CDLL]) -> None:
    device, library = toys
    for call in (library.toy_by_pointer, library.toy_cooperative):
        out = np.full(96, -1, np.int32)
        assert call(give(device, out, RESULT, "out"), 3) == SUCCESS, device.faults
        np.testing.assert_array_equal(out, np.arange(96))
    assert [x.cooperative for x in device.launches] == [False, True]


def test_every_kernel_of_a_library_is_known(toys: tuple[Device, ctypes.CDLL]) -> None:
    names = toys[0].registered()
    wanted = ("mixedILi2E", "mixedILi3E", "where", "reversed", "bounded")
    assert len(names) == len(wanted)
    for name in wanted:
        assert sum(name in x for x in names) == 1


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("grid", "block", "error"),
    [
        ((1, 1, 1), (32, 1, 1), SUCCESS),
        ((0, 1, 1), (32, 1, 1), INVALID_CONFIGURATION),
        ((1, 1, 1), (32, 0, 1), INVALID_CONFIGURATION),
        ((1, 65536, 1), (1, 1, 1), INVALID_CONFIGURATION),
        ((1, 1, 65536), (1, 1, 1), INVALID_CONFIGURATION),
        ((1 << 31, 1, 1), (1, 1, 1), INVALID_CONFIGURATION),
        ((1, 1, 1), (1025, 1, 1), INVALID_CONFIGURATION),
        ((1, 1, 1), (1, 1, 65), INVALID_CONFIGURATION),
        ((1, 1, 1), (64, 32, 1), INVALID_CONFIGURATION),
    ],
)
def test_configurations(
    toys: tuple[Device, ctypes.CDLL],
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    error: int,
) -> None:
    device, library = toys
    out = np.zeros(32, np.int32)
    at = give(device, out, RESULT, "out")
    assert library.toy_where(at, dims(*grid), dims(*block), None) == error
    assert library.toy_last_error() == SUCCESS  # reading the error cleared it
    assert len(device.launches) == (error == SUCCESS)


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_120"])
def test_dynamic_shared_memory(toys: tuple[Device, ctypes.CDLL], arch: str) -> None:
    """48 KB without asking; up to the architecture's limit with cudaFuncSetAttribute."""
    device, library = toys
    limit = {"sm_80": 163, "sm_86": 99, "sm_90": 227, "sm_120": 99}[arch] * KIB
    x = np.arange(32, dtype=np.float32)
    at = give(device, x, FILLED_RESULT, "x")
    with device.playing(arch):
        assert library.toy_reversed(at, 32, 48 * KIB, 0) == SUCCESS, device.faults
        assert library.toy_reversed(at, 32, 48 * KIB + 4, 0) == INVALID_VALUE
        assert library.toy_reversed(at, 32, limit + 1, 1) == INVALID_VALUE
        # As in CUDA, an error that nobody reads is the next launch's as well.
        assert library.toy_reversed(at, 32, 128, 1) == INVALID_VALUE
        library.toy_reversed(at, 32, 128, 1)
        # The simulator's machine is an sm_80: more than its 163 KB cannot be run, only asked for.
        ran = library.toy_reversed(at, 32, min(limit, 163 * KIB), 1)
        assert ran == SUCCESS, device.faults
    np.testing.assert_array_equal(x, np.arange(32))  # twice reversed


def test_launch_bounds(toys: tuple[Device, ctypes.CDLL]) -> None:
    device, library = toys
    x = np.zeros(64, np.float32)
    at = give(device, x, RESULT, "x")
    assert library.toy_bounded(at, 64) == SUCCESS, device.faults
    assert library.toy_bounded(at, 65) == INVALID_VALUE


def test_too_many_blocks_for_a_cooperative_launch(toys: tuple[Device, ctypes.CDLL]) -> None:
    device, library = toys
    out = np.zeros(32, np.int32)
    # 32 blocks of one warp fit a multiprocessor of an sm_80, which has 108.
    at = give(device, out, RESULT, "out")
    assert library.toy_cooperative(at, 108 * 32 + 1) == COOPERATIVE_TOO_LARGE
    assert not device.launches


def test_code_for_a_newer_architecture(toys: tuple[Device, ctypes.CDLL]) -> None:
    device, library = toys
    out = np.zeros(32, np.int32)
    with device.playing("sm_75"):
        at = give(device, out, RESULT, "out")
        assert library.toy_by_pointer(at, 1) == NO_KERNEL_IMAGE


def test_a_function_that_is_no_kernel(toys: tuple[Device, ctypes.CDLL]) -> None:
    assert toys[1].toy_unknown() == INVALID_DEVICE_FUNCTION


def test_injected_failures(toys: tuple[Device, ctypes.CDLL]) -> None:
    device, library = toys
    x = np.zeros(32, np.float32)
    at = give(device, x, FILLED_RESULT, "x")
    with device.failing("cudaLaunchKernel", 701):
        assert library.toy_reversed(at, 32, 128, 0) == 701
    with device.failing("cudaFuncSetAttribute", 1):
        assert library.toy_reversed(at, 32, 128, 1) == 1
    assert library.toy_last_error() == 1  # cudaFuncSetAttribute's, which the toy did not read
    assert library.toy_reversed(at, 32, 128, 1) == SUCCESS, device.faults
    with pytest.raises(AssertionError, match="was not called"):
        with device.failing("cudaLaunchKernel", 701):
            pass


def test_attributes(toys: tuple[Device, ctypes.CDLL]) -> None:
    device, library = toys
    value = ctypes.c_int()
    with device.playing("sm_90"):
        for attribute, wanted in ((75, 9), (76, 0), (16, 132), (97, 227 * KIB)):
            assert library.toy_attribute(attribute, ctypes.byref(value)) == SUCCESS
            assert value.value == wanted
        assert library.toy_occupancy(128, 100 * KIB) == 2
    assert library.toy_attribute(1, ctypes.byref(value)) == NOT_SUPPORTED
    assert library.toy_occupancy(128, 100 * KIB) == 1
    assert library.toy_occupancy(1024, 0) == 2


# --------------------------------------------------------------------------- what is found out


def test_a_fault_of_the_simulator_is_the_error_of_the_launch(
    toys: tuple[Device, ctypes.CDLL],
) -> None:
    device, library = toys
    out = np.zeros(31, np.int32)
    assert library.toy_by_pointer(give(device, out, RESULT, "out"), 1) == LAUNCH_FAILURE
    text = library.toy_error_text(LAUNCH_FAILURE).decode()
    assert "OutOfBounds" in text
    assert "beyond the end of out" in text
    assert "toys.cu" in text
    assert isinstance(device.faults[0], ptx.OutOfBounds)


def test_what_is_only_read_may_not_be_written(toys: tuple[Device, ctypes.CDLL]) -> None:
    device, library = toys
    x = np.zeros(32, np.float32)
    assert library.toy_reversed(give(device, x, READ, "x"), 32, 128, 0) == LAUNCH_FAILURE
    assert isinstance(device.faults[0], ptx.OutOfBounds)


def test_what_nobody_wrote_may_not_be_read(toys: tuple[Device, ctypes.CDLL]) -> None:
    device, library = toys
    x = np.zeros(32, np.float32)
    assert library.toy_reversed(give(device, x, RESULT, "x"), 32, 128, 0) == LAUNCH_FAILURE
    assert isinstance(device.faults[0], ptx.UnwrittenRead)


def test_forgotten_memory_is_out_of_bounds(toys: tuple[Device, ctypes.CDLL]) -> None:
    device, library = toys
    out = np.zeros(32, np.int32)
    at = give(device, out, RESULT, "out")
    device.forget()
    assert library.toy_by_pointer(at, 1) == LAUNCH_FAILURE


@pytest.mark.parametrize(
    ("embedding", "message"),
    [
        (("-gencode=arch=compute_80,code=compute_80",), "compressed"),
        (("-gencode=arch=compute_80,code=sm_80",), "machine code only"),
    ],
)
def test_objects_without_readable_ptx_name_themselves(
    embedding: tuple[str, ...], message: str
) -> None:
    path = build.toys((*embedding, "-DOTHER_OBJECT"))
    device, library = Device(path), ctypes.CDLL(str(path))
    out = np.zeros(32, np.int32)
    assert library.toy_by_pointer(give(device, out, RESULT, "out"), 1) == LAUNCH_FAILURE
    assert isinstance(device.faults[0], fatbin.FatbinError)
    assert message in str(device.faults[0])


def test_one_kernel_of_a_text() -> None:
    text = (
        ".version 9.0\n.global .b8 t[4];\n.visible .entry a(\n)\n{\n{\n}\nret;\n}\n"
        ".entry b()\n{\n}\n"
        '.file 1 "x"\n'
    )
    one = fatbin.with_one_kernel(text, "b")
    assert "entry a" not in one
    assert one.count("\n") == text.count("\n")
    for kept in (".version", ".global", ".entry b()\n{\n}\n", ".file"):
        assert kept in one
    with pytest.raises(fatbin.FatbinError, match="no kernel c"):
        fatbin.with_one_kernel(text, "c")


@pytest.mark.parametrize("library", [build.toys, build.operators, build.kernels])
def test_nothing_is_shared_with_the_runtime_of_torch(library: Callable) -> None:
    """Neither exported nor looked for: every CUDA name is bound inside."""
    done = subprocess.run(["nm", "-D", str(library())], capture_output=True, text=True, check=True)
    assert "stand_in_listen" in done.stdout
    assert not [line for line in done.stdout.splitlines() if " cuda" in line or "__cuda" in line]
