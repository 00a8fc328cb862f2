"""linear_cross_entropy: values and gradients against the fp64 oracle, memory, torch's machinery."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rule import EPS32, Draws, assert_within, one_thread, unit
from test_attention_ops import compiled, op_calls_of, same_as_eager
from tools import DTYPES
from torch import Tensor

import fastattn
from fastattn.measure import peak_extra_bytes, settle_heap
from fastattn.ops import linear_cross_entropy as op


def call(
    *lead: int, d: int = 24, v: int = 50, dtype: torch.dtype = torch.float32, bias: bool = True,
    ignored: float = 0.3, **kwargs: Any,
) -> tuple[dict[str, Tensor], dict[str, Any]]:  # fmt: skip
    target = torch.randint(v, lead)
    target[torch.rand(lead) < ignored] = kwargs.get("ignore_index", -100)
    tensors = {"x": torch.randn(*lead, d).to(dtype), "weight": torch.randn(v, d).to(dtype)}
    if bias:
        tensors["bias"] = torch.randn(v).to(dtype)
    return tensors, {"target": target, **kwargs}


def run(where: Any, tensors: dict[str, Tensor], kwargs: Any, cast: Any = lambda x: x) -> Any:
    leaves = {n: cast(x).detach().clone().requires_grad_() for n, x in tensors.items()}
    loss = where.linear_cross_entropy(**leaves, **kwargs)
    grads = torch.autograd.grad(loss, [*leaves.values()], upstream(loss))
    return {"loss": loss, **{f"d{n}": g for n, g in zip(leaves, grads, strict=True)}}


def upstream(loss: Tensor) -> Tensor:
    return torch.randn(loss.shape, generator=torch.Generator().manual_seed(3)).to(loss.dtype)


def floors(tensors: dict[str, Tensor], kwargs: Any, loss: Tensor) -> dict[str, Tensor]:
    """A logit's gradient is softmax - target, which may cancel (of one class, to 0): both terms are
    rounded. It is rounded to x's dtype itself, by us before what comes from above is known: where
    those roundings take it across a tie, to the other neighbour. Sums of rounded terms err by their
    2-norm."""
    t, dtype = {n: x.double() for n, x in tensors.items()}, tensors["x"].dtype
    x, target = t["x"].reshape(-1, t["x"].shape[-1]), kwargs["target"].flatten()
    logits = (x @ t["weight"].T + t.get("bias", 0.0)).to(dtype).double()
    smoothing, classes = kwargs.get("label_smoothing", 0.0), logits.shape[1]
    wanted = torch.arange(classes) == target[:, None]
    softmax, less = logits.softmax(1), (1 - smoothing) * wanted + smoothing / classes
    counted = target != kwargs.get("ignore_index", -100)
    size = upstream(loss).double().abs().flatten() * counted
    if kwargs.get("reduction", "mean") == "mean":
        size = size / counted.sum().clamp(min=1)
    rounding = unit(torch.float32) * (softmax + less)
    squares = (rounding * size[:, None]).square()
    if dtype != torch.float32:
        above = 1.0 if loss.dim() else upstream(loss).double().abs()
        low, high = ((softmax - less + e) * size[:, None] / above for e in (-rounding, rounding))
        squares += ((high.to(dtype).double() - low.to(dtype).double()) * above).square()
    found = {
        "dx": (squares @ t["weight"].square()).view(t["x"].shape),
        "dweight": squares.T @ x.square(),
        "dbias": squares.sum(0),
    }
    return {n: s.sqrt() for n, s in found.items()}


def judge(tensors: dict[str, Tensor], kwargs: Any) -> dict[str, Tensor]:
    got = run(fastattn, tensors, kwargs)
    with one_thread():
        right = run(fastattn.reference, tensors, kwargs, Tensor.double)
    plain = Draws(lambda cast: run(fastattn.reference, tensors, kwargs, cast))
    floor = floors(tensors, kwargs, right["loss"])
    for name, x in right.items():
        assert_within(name, got[name], x, plain[name], floor.get(name, 0.0))
        want = torch.float32 if name == "loss" else tensors[name[1:]].dtype
        assert got[name].dtype == want
    return got


@pytest.fixture(params=[1 << 10, 32 << 20], ids=["many_chunks", "one_chunk"])
def _chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_CHUNK", request.param)


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2, 1.0])
def test_values_and_gradients(reduction: str, smoothing: float, dtype: torch.dtype) -> None:
    for bias in (True, False):
        judge(*call(7, 13, dtype=dtype, bias=bias, reduction=reduction,
                    label_smoothing=smoothing))  # fmt: skip


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_float32_weight_beside_16_bits(dtype: torch.dtype) -> None:
    """Products are x's; the gradient keeps float32's digits where the weight does."""
    tensors, kwargs = call(7, 13, dtype=dtype)
    same = run(fastattn, tensors, kwargs)
    tensors["weight"] = tensors["weight"].float()
    got = judge(tensors, kwargs)
    torch.testing.assert_close(got["dweight"].to(dtype), same["dweight"])
    assert torch.equal(got["dx"], same["dx"])


def test_autocast() -> None:
    tensors, kwargs = call(7, 13)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(fastattn, tensors, kwargs)
    tensors["x"] = tensors["x"].bfloat16()
    want = run(fastattn, tensors, kwargs)
    assert got["dx"].dtype == got["dweight"].dtype == torch.float32
    for name, x in want.items():
        assert torch.equal(got[name], x.float())


def test_rows_of_a_chunk_by_torch() -> None:
    """What other devices run in place of the kernel agrees with it."""
    logits, bias, target = torch.randn(21, 77) * 3, torch.randn(77), torch.randint(77, (21,))
    scale = torch.rand(21)
    for need, smoothing, given in ((0, 0.1, None), (7, 0.1, scale), (7, 0.0, None)):
        ours, theirs = logits.clone(), logits.clone()
        loss, db = op._rows(ours, bias, target, given, 0.5, smoothing, need)
        loss2, db2 = op._rows_by_torch(theirs, bias, target, given, 0.5, smoothing, need)
        for a, b in ((loss, loss2), (db, db2), (ours, theirs)):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_rows_have_no_part(reduction: str) -> None:
    tensors, kwargs = call(60, ignore_index=3, reduction=reduction)
    got = judge(tensors, kwargs)
    dead = kwargs["target"] == 3
    assert dead.any()
    assert not got["dx"][dead].any()
    tensors["x"][dead] = torch.nan  # never read
    again = run(fastattn, tensors, kwargs)
    assert torch.equal(again["dweight"], got["dweight"])
    assert torch.equal(again["loss"], got["loss"])


def test_no_row_counts() -> None:
    tensors, kwargs = call(5, ignored=1.1)
    assert run(fastattn, tensors, kwargs)["loss"].isnan()
    got = run(fastattn, tensors, {**kwargs, "reduction": "sum"})
    assert all(not x.any() for x in got.values())
    empty, kwargs = call(0, reduction="none")
    assert run(fastattn, empty, kwargs)["loss"].shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_an_upstream_gradient_is_not_rounded(dtype: torch.dtype) -> None:
    """A third, as of three accumulated steps: each element is rounded, not the third."""
    tensors, kwargs = call(20, dtype=dtype, reduction="sum")
    leaves = {n: x.requires_grad_() for n, x in tensors.items()}
    loss = fastattn.linear_cross_entropy(**leaves, **kwargs)
    whole = torch.autograd.grad(loss, [*leaves.values()], retain_graph=True)
    third = torch.autograd.grad(loss, [*leaves.values()], torch.tensor(1 / 3))
    for a, b in zip(whole[:2], third[:2], strict=True):
        assert torch.equal(b, (a.double() / 3).to(dtype))


def test_large_logits_and_strides() -> None:
    tensors, kwargs = call(4, 9, d=16)
    tensors["x"] = (torch.randn(9, 4, 32).transpose(0, 1)[..., ::2]) * 200
    judge(tensors, kwargs)


@pytest.mark.parametrize("smoothing", [0.0, 1e-6])
def test_a_loss_far_below_its_logits(smoothing: float) -> None:
    """The target is the top of two: the loss, e^-10, is no difference of numbers of size 1000."""
    x = torch.tensor([[1.0]])
    weight = torch.tensor([[1000.0], [990.0]])
    call = {"target": torch.tensor([0]), "label_smoothing": smoothing}
    got = fastattn.linear_cross_entropy(x, weight, **call)
    right = fastattn.reference.linear_cross_entropy(x.double(), weight.double(), **call)
    assert float((got - right).abs()) <= 2 * EPS32  # of 1 + e^-10, whose logarithm it is


def test_each_gradient_alone() -> None:
    tensors, kwargs = call(20)
    full = run(fastattn, tensors, kwargs)
    torch.Generator().manual_seed(3)
    for name in tensors:
        leaves = {n: x.clone().requires_grad_(n == name) for n, x in tensors.items()}
        loss = fastattn.linear_cross_entropy(**leaves, **kwargs)
        dloss = torch.randn(loss.shape, generator=torch.Generator().manual_seed(3))
        (grad,) = torch.autograd.grad(loss, leaves[name], dloss)
        torch.testing.assert_close(grad, full[f"d{name}"])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_is_repeatable_and_differentiable(reduction: str) -> None:
    tensors, kwargs = call(30, reduction=reduction)
    first, second = (run(fastattn, tensors, kwargs) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)
    found = []
    for where in (fastattn, fastattn.reference):
        x = tensors["x"].clone().requires_grad_()
        loss = where.linear_cross_entropy(**{**tensors, "x": x}, **kwargs)
        (dx,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), x)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(reduction: str) -> None:
    tensors, kwargs = call(6, d=8, v=11, reduction=reduction)
    calls = op_calls_of(lambda: run(fastattn, tensors, kwargs))
    assert len(calls) == (1 if reduction == "mean" else 2)
    for name, (func, args) in calls.items():
        given = tuple(
            a.requires_grad_(name.endswith("fwd"))
            if isinstance(a, Tensor) and a.is_floating_point()
            else a
            for a in args
        )
        assert set(torch.library.opcheck(func, given).values()) == {"SUCCESS"}


def test_compile_and_export() -> None:
    def fn(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return fastattn.linear_cross_entropy(x * 2, w, t, label_smoothing=0.1)

    def make(n: int) -> list[Tensor]:
        return [torch.randn(2, n, 8), torch.randn(30, 8), torch.randint(30, (2, n))]

    fast, counter = compiled(fn, dynamic=True)
    same_as_eager(fn, fast, make, 6)
    graphs = counter.frame_count
    for n in (9, 14):
        same_as_eager(fn, fast, make, n)
    assert counter.frame_count == graphs

    class Module(torch.nn.Module):
        def forward(self, *xs: Tensor) -> Tensor:
            return fn(*xs)

    inputs = make(5)
    program = torch.export.export(Module(), tuple(inputs))
    torch.testing.assert_close(program.module()(*inputs), fn(*inputs))


def test_no_buffer_of_tokens_by_vocabulary() -> None:
    rows, d, v = 4096, 32, 8192
    tensors, kwargs = call(rows, d=d, v=v, bias=False, ignored=0.0)
    settle_heap()
    found = peak_extra_bytes(lambda: run(fastattn, tensors, kwargs))
    stock = peak_extra_bytes(lambda: run(fastattn.reference, tensors, kwargs))
    assert found is not None
    assert stock is not None
    assert stock > rows * v * 4
    assert found < stock / 4


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"weight": torch.ones(9, 7)}, ValueError, ("weight", "(3, 8)", "(9, 7)")),
        ({"weight": torch.ones(9, 8).half()}, TypeError, ("weight", "float32", "float16")),
        ({"target": torch.tensor([0, 9, 1])}, ValueError, ("target", "[0, 9)", "got 9")),
        ({"target": torch.tensor([0, -1, 1])}, ValueError, ("target", "[0, 9)", "got -1")),
        ({"target": torch.ones(3)}, TypeError, ("target", "int64", "float32")),
        ({"target": torch.ones(4).long()}, ValueError, ("target", "(3,)", "(4,)", "(3, 8)")),
        ({"bias": torch.ones(8)}, ValueError, ("bias", "(9,)", "(8,)")),
        ({"label_smoothing": 1.5}, ValueError, ("label_smoothing", "1.5")),
        ({"reduction": "max"}, ValueError, ("reduction", "'max'")),
        ({"x": torch.ones(3, 8).long()}, TypeError, ("x", "int64")),
    ],
)
def test_errors(change: dict[str, Any], error: Any, words: tuple[str, ...]) -> None:
    good: dict[str, Any] = {
        "x": torch.ones(3, 8), "weight": torch.ones(9, 8), "target": torch.zeros(3).long()
    }  # fmt: skip
    fastattn.linear_cross_entropy(**good)
    with pytest.raises(error) as raised:
        fastattn.linear_cross_entropy(**{**good, **change})
    for word in ("fastattn::linear_cross_entropy", *words):
        assert word in str(raised.value)


def test_float64_is_the_reference() -> None:
    tensors, kwargs = call(4, dtype=torch.float64)
    x = tensors.pop("x").requires_grad_()
    fn = lambda x: fastattn.linear_cross_entropy(x, **tensors, **kwargs)  # noqa: E731
    assert torch.autograd.gradcheck(fn, (x,))


def test_one_token() -> None:
    """x (D,), target (): by the oracle too."""
    tensors, kwargs = call(ignored=0.0)
    assert (tensors["x"].dim(), kwargs["target"].dim()) == (1, 0)
    for reduction in ("mean", "none"):
        judge(tensors, {**kwargs, "reduction": reduction})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [5, 300])  # products of the library, and of widened blocks
def test_logits_are_rounded_with_their_bias(n: int, dtype: torch.dtype) -> None:
    """Large products that the bias takes back: rounded without it they lose three bits more."""
    x, w = torch.randn(n, n), torch.randn(n, n) * n**-0.5
    x[:, 0], w[:, 0] = 8.0, 1.0
    x, w, bias = x.to(dtype), w.to(dtype), (torch.randn(n) * 0.1 - 8.0).to(dtype)
    target = torch.randint(n, (n,))
    logits = (x.double() @ w.double().T + bias.double()).to(dtype)
    right = F.cross_entropy(logits.double(), target, reduction="none")
    got = fastattn.linear_cross_entropy(x, w, target, bias, reduction="none", backend="cpu")
    error = (got.double() - right).abs().mean()
    assert error < torch.finfo(dtype).eps / 8
