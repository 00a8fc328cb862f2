"""fastattn.ops.products: torch.mm's results, whichever dtype multiplies."""

import platform
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rule import assert_within
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastattn.backends import cpu_isa, cpu_isas, force_cpu_isa
from fastattn.ops.products import addmm_, linear, mm, mm_bias

LAYOUTS = ("rows", "columns", "strided rows", "strided columns")
# (M, K, N); large enough to be widened. Beyond a block of k, of columns, of rows.
SHAPES = [(259, 385, 273), (300, 4500, 260), (270, 300, 5300), (2100, 290, 310)]


def matrix(M: int, N: int, layout: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Everything that lies around it in memory is NaN."""
    turned, strided = "columns" in layout, "strided" in layout
    rows, width = (N, M) if turned else (M, N)
    memory = torch.full((rows + 2, width + (37 if strided else 0)), torch.nan, dtype=dtype)
    inner = memory[1 : rows + 1, 5 : width + 5] if strided else memory[1 : rows + 1]
    inner.copy_(torch.randn(rows, width))
    return inner.t() if turned else inner


def check(got: Tensor, a: Tensor, b: Tensor, start: Tensor | None = None) -> None:
    """Of plain PyTorch the error in bf16 is one rounding of the sums, as here."""
    right, plain = a.double() @ b.double(), a @ b
    if start is not None:
        right, plain = right + start.double(), torch.addmm(start, a, b)
    assert_within("product", got, right, [plain])


@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("left", LAYOUTS)
def test_layouts(left: str, right: str) -> None:
    torch.manual_seed(0)
    a, b = matrix(260, 400, left), matrix(400, 270, right)
    check(mm(a, b), a, b)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_blocks(shape: tuple[int, int, int], layout: str) -> None:
    """The next block begins where the last one ended, and sums over k are not begun anew."""
    torch.manual_seed(0)
    M, K, N = shape
    a, b = matrix(M, K, layout), matrix(K, N, layout)
    check(mm(a, b), a, b)


@pytest.mark.parametrize("isa", cpu_isas())
def test_every_instruction_set(isa: str) -> None:
    torch.manual_seed(0)
    a, b = matrix(261, 401, "strided rows"), matrix(401, 273, "columns")
    with force_cpu_isa(isa):
        check(mm(a, b), a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("accumulate", [False, True])
def test_out_alone_is_written(layout: str, accumulate: bool) -> None:
    torch.manual_seed(0)
    a, b = matrix(260, 400, "rows"), matrix(400, 270, "columns")
    out = matrix(260, 270, layout)
    base = out._base
    assert base is not None
    memory = base._base if base._base is not None else base
    around = memory.isnan()
    start = out.clone()
    got = addmm_(out, a, b) if accumulate else mm(a, b, out)
    assert got is out
    check(out, a, b, start if accumulate else None)
    assert torch.equal(memory.isnan(), around)


def test_accumulates_over_blocks_of_k() -> None:
    torch.manual_seed(0)
    a, b, out = (matrix(M, N, "rows") for M, N in ((200, 4200), (4200, 230), (200, 230)))
    start = out.clone()
    check(addmm_(out, a, b), a, b, start)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bias_takes_the_product_back(shape: tuple[int, int, int], layout: str) -> None:
    """It is added before the sums are rounded: what is left has all its digits."""
    torch.manual_seed(0)
    M, K, N = shape
    a, b, out = matrix(M, K, "rows"), matrix(K, N, "columns"), matrix(M, N, layout)
    a[:] = a[:1] + a / 64
    bias = -(a[0] @ b)
    right = a.double() @ b.double() + bias.double()
    assert mm_bias(a, b, bias, out) is out
    assert_within("product", out, right, [torch.addmm(bias, a, b)])


@pytest.mark.parametrize("bias", [(269,), (1,), (1, 270), ()], ids=str)
def test_bias_that_does_not_fit(bias: tuple[int, ...]) -> None:
    a, b, out = (torch.zeros(s).bfloat16() for s in ((260, 400), (400, 270), (260, 270)))
    with pytest.raises(RuntimeError, match=r"product: bias must be \(N,\), got"):
        torch.ops.fastattn.product_cpu_bias(a, b, torch.zeros(bias).bfloat16(), out)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(260, 400, 270), (140, 600, 2701)], ids=str)
def test_linear(shape: tuple[int, int, int], with_bias: bool) -> None:
    """The bias is added before the sums are rounded."""
    torch.manual_seed(0)
    M, K, N = shape
    x, w = matrix(M, K, "rows").view(2, -1, K), matrix(N, K, "rows")
    bias = torch.randn(N).bfloat16() if with_bias else None
    right = F.linear(x.double(), w.double(), None if bias is None else bias.double())
    assert_within("linear", linear(x, w, bias), right, [F.linear(x, w, bias)])


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, True),
                                   (False, False, True), (True, True, None)], ids=str)  # fmt: skip
def test_linear_gradients(needs: tuple[bool | None, ...]) -> None:
    torch.manual_seed(0)
    shapes = (2, 140, 400), (270, 400), (270,)
    given = [torch.randn(s).bfloat16() for s, n in zip(shapes, needs, strict=True) if n is not None]
    dy = torch.randn(2, 140, 270).bfloat16()

    def run(fn: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_(bool(n)) for x, n in zip(given, needs, strict=False)]
        y = fn(*leaves, *(None,) * (3 - len(leaves)))
        return [y, *torch.autograd.grad(y, [x for x in leaves if x.requires_grad], dy.to(dtype))]

    right, plain = run(F.linear, torch.float64), run(F.linear, torch.bfloat16)
    for i, got in enumerate(run(linear, torch.bfloat16)):
        assert got.dtype == torch.bfloat16
        assert_within(f"result {i}", got, right[i], [plain[i]])


def test_linear_under_autocast() -> None:
    """A weight of another dtype is autocast's to convert."""
    x = torch.randn(280, 400).bfloat16()
    w = torch.randn(270, 400).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, want = linear(x, w, None), F.linear(x, w)
    assert torch.equal(y, want)
    dy = torch.ones_like(y)
    assert torch.equal(*(torch.autograd.grad(t, w, dy)[0] for t in (y, want)))


def test_linear_twice_differentiated() -> None:
    torch.manual_seed(0)
    x, w = (torch.randn(s).bfloat16().requires_grad_() for s in ((280, 400), (270, 400)))

    def second(fn: Any, x: Tensor, w: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(fn(x, w, None).square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), w)[0]

    leaves = [t.detach().double().requires_grad_() for t in (x, w)]
    assert_within("dw", second(linear, x, w), second(F.linear, *leaves), [second(F.linear, x, w)])


ODD = [
    ((3, 4), (5, 6)),
    ((4,), (5, 4)),
    ((0, 4), (5, 4)),
    ((2, 3, 0), (5, 0)),
    ((300, 400), (400,)),
]


@pytest.mark.parametrize("shapes", ODD, ids=str)
def test_linear_of_odd_shapes_is_torchs(shapes: tuple[tuple[int, ...], ...]) -> None:
    x, w = (torch.randn(s).bfloat16() for s in shapes)

    def outcome(fn: Any) -> Any:
        try:
            return fn(x.requires_grad_(), w, None)
        except RuntimeError:
            return "refused"

    got, want = outcome(linear), outcome(F.linear)
    assert got == want if isinstance(want, str) else torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_other_dtypes_are_torchs(dtype: torch.dtype) -> None:
    a, b = matrix(130, 300, "rows", dtype), matrix(300, 170, "columns", dtype)
    assert torch.equal(mm(a, b), torch.mm(a, b))
    start = torch.randn(130, 170).to(dtype)
    assert torch.equal(addmm_(start.clone(), a, b), torch.addmm(start, a, b))


@pytest.mark.parametrize("shape", [(1, 300, 300), (300, 16, 300), (300, 300, 7), (0, 3, 4),
                                   (3, 0, 4), (3, 4, 0)], ids=str)  # fmt: skip
def test_small_products_are_torchs(shape: tuple[int, int, int]) -> None:
    """Bit for bit, in every dtype: widening would cost more than it brings."""
    torch.manual_seed(0)
    M, K, N = shape
    a, b = torch.randn(M, K).bfloat16(), torch.randn(K, N).bfloat16()
    assert torch.equal(mm(a, b), torch.mm(a, b))
    out = torch.randn(M, N).bfloat16()
    assert torch.equal(addmm_(out.clone(), a, b), torch.addmm(out, a, b))


@pytest.mark.parametrize(("shape", "worth"), [((8000, 100, 90), False), ((8000, 300, 200), True)])
def test_who_multiplies(shape: tuple[int, int, int], worth: bool) -> None:
    """One product of the library's, or blocks of it."""
    M, K, N = shape
    a, b = torch.randn(M, K).bfloat16(), torch.randn(K, N).bfloat16()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        mm(a, b)
    calls = sum(event.name == "aten::mm" for event in profiler.events())
    assert (calls > 1) == (worth and _fp32_is_faster())


def _fp32_is_faster() -> bool:
    """As csrc/cpu/isa.h has it."""
    if platform.machine() != "x86_64" or cpu_isa() == "amx":
        return False
    cpu = Path("/proc/cpuinfo").read_text()
    return not ("AuthenticAMD" in cpu and "avx512_bf16" in cpu)


def test_strides_that_no_block_has_are_torchs() -> None:
    torch.manual_seed(0)
    a = torch.randn(260, 800).bfloat16()[:, ::2]
    b = torch.randn(1, 270).bfloat16().expand(400, 270)
    check(mm(a, b), a, b)


def test_nan_and_infinity_stay_in_their_rows() -> None:
    a, b = torch.ones(260, 256).bfloat16(), torch.ones(256, 2700).bfloat16()
    a[3, 7], a[9, 2] = torch.nan, torch.inf
    got = mm(a, b)
    assert got[3].isnan().all()
    assert got[9].isinf().all()
    got[3] = got[9] = 256.0
    assert got.eq(256).all()


def test_twice_the_same_bits() -> None:
    torch.manual_seed(0)
    a, b = matrix(300, 500, "rows"), matrix(500, 200, "columns")
    assert torch.equal(mm(a, b), mm(a, b))


@pytest.mark.parametrize(
    ("a", "b", "out"),
    [((3, 4), (5, 6), (3, 6)), ((3, 4), (4, 6), (6, 3)), ((3,), (3, 4), (3, 4)),
     ((2, 3, 4), (4, 5), (2, 5))],
)  # fmt: skip
def test_direct_calls_with_wrong_shapes(
    a: tuple[int, ...], b: tuple[int, ...], out: tuple[int, ...]
) -> None:
    x, y, z = (torch.zeros(s, dtype=torch.bfloat16) for s in (a, b, out))
    with pytest.raises(RuntimeError, match=r"product: (a and b|out) must be"):
        torch.ops.fastattn.product_cpu_out(x, y, z)


def test_direct_calls_with_other_dtypes() -> None:
    x, y = torch.zeros(200, 200, dtype=torch.bfloat16), torch.zeros(200, 200)
    for arguments in ((x, y, x), (y, x, x), (x, x, y)):
        with pytest.raises(RuntimeError, match="one dtype"):
            torch.ops.fastattn.product_cpu_out(*arguments)
