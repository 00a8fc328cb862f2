"""The semantics rung catches what it claims to, on kernels with one planted fault each."""

import numpy as np
import pytest
import torch

from rungs import toys
from rungs.semantics import FaultError, semantics

STAGES = [("ttir", 90), ("ttgir", 80), ("ttgir", 90)]


def test_a_right_kernel_passes() -> None:
    x, y = torch.randn(200), torch.randn(200)
    with semantics() as session:
        assert torch.equal(toys.add(x, y), x + y)
    assert (session.launches, session.programs) == (1, 4)


@pytest.mark.parametrize("masked", [True, False])
def test_out_of_bounds_is_caught_at_its_line(masked: bool) -> None:
    x, y = torch.randn(200), torch.randn(200)
    with semantics():
        if masked:
            toys.add(x, y)
            return
        with pytest.raises(
            FaultError, match=r"oob_write.*toys\.py.*56 elements past the end of out"
        ):
            toys.add(x, y, masked=False)


def test_out_of_bounds_read_is_caught() -> None:
    x, y = torch.randn(200), torch.randn(199)
    with (
        semantics(),
        pytest.raises(FaultError, match=r"oob_read.*1 elements past the end of y_ptr"),
    ):
        toys.add(x, y)


def test_race_between_programs_is_caught() -> None:
    with semantics(), pytest.raises(FaultError, match=r"race.*toys\.py"):
        toys.add(torch.randn(200), torch.randn(200), shared=True)


def test_unwritten_read_is_caught() -> None:
    with semantics(), pytest.raises(FaultError, match=r"unwritten.*1 of 64 elements"):
        x = torch.randn(200)
        y = torch.empty(200)
        y[:100], y[101:] = 1.0, 1.0
        toys.add(x, y)


def test_what_cannot_be_checked_is_red() -> None:
    """4 M accesses fill the log; matrices of tiles have address ranges that meet."""
    a = torch.randn(512, 512, dtype=torch.bfloat16)
    with pytest.raises(FaultError, match=r"unchecked.*matmul_kernel"), semantics():
        toys.matmul(a, a, 32, 32, 32)


@pytest.mark.parametrize(("stage", "cc"), STAGES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_values_of_a_pipelined_loop(stage: str, cc: int, dtype: torch.dtype) -> None:
    a, b = torch.randn(70, 112).to(dtype), torch.randn(112, 48).to(dtype)
    with semantics(stage, cc) as session:
        got = toys.matmul(a, b, num_stages=3)
    right = a.double() @ b.double()
    assert (got - right).abs().max() < 1e-4
    if stage == "ttgir":
        assert "async_copy_global_to_local" in session.texts["matmul_kernel"]


@pytest.mark.parametrize("wide", [True, False])
def test_offset_that_overflows_32_bits(wide: bool) -> None:
    """Rows 2^30 elements apart: the third begins at 2^31. The pages between are never touched."""
    stride = 1 << 30
    room = torch.from_numpy(np.zeros(3 * stride, np.int8)).view(torch.int8)
    x = torch.as_strided(room, (3, 64), (stride, 1))
    x.copy_(torch.randint(-5, 5, (3, 64)))
    with semantics():
        if wide:
            assert torch.equal(toys.row_sum(x), x.sum(1).float())
        else:
            with pytest.raises(FaultError, match="oob_read"):
                toys.row_sum(x, wide=False)
