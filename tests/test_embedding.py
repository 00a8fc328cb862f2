"""embedding: values and gradients against the fp64 oracle, bits, errors."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from ffn_tools import Call
from rule import Cast, Draws, as_is, assert_within, one_thread
from tools import DTYPES, Result
from torch import Tensor

import fastattn
from fastattn.backends import cpu_isas, force_cpu_isa

V, P, T = 37, 29, 3


@dataclass(frozen=True)
class EmbeddingCall(Call):
    """Tensors are the weights; ids, positions and segments are among the kwargs."""

    def upstream_for(self, outputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        if self.upstream is not None:
            return self.upstream
        gen = torch.Generator().manual_seed(7)
        return tuple(torch.randn(o.shape, generator=gen).to(o.dtype) for o in outputs.values())

    def flipped(self) -> "EmbeddingCall":
        """The same tokens in another order; positions must be explicit."""
        outputs = self.run(fastattn.reference, self.leaves())
        kwargs = {
            n: x.flip(0) if isinstance(x, Tensor) and x.shape == self.kwargs["ids"].shape else x
            for n, x in self.kwargs.items()
        }
        upstream = tuple(g.flip(0) for g in self.upstream_for(outputs))
        return replace(self, kwargs=kwargs, upstream=upstream)


def embedding_call(
    *lead: int, n: int = 24, dtype: torch.dtype = torch.float32, tables: str = "wps",
    norm: str | None = "layer", explicit: bool = True, **kwargs: Any,
) -> EmbeddingCall:  # fmt: skip
    """tables: w(ords), p(ositions), s(egments)."""
    tensors = {"weight": torch.randn(V, n).to(dtype)}
    kwargs = {"ids": torch.randint(0, V, lead), "norm": norm, **kwargs}
    if "p" in tables:
        tensors["position_weight"] = torch.randn(P, n).to(dtype)
        if explicit:
            kwargs.setdefault("positions", torch.randint(0, P, lead))
    if "s" in tables:
        tensors["segment_weight"] = torch.randn(T, n).to(dtype)
        if explicit:
            kwargs.setdefault("segments", torch.randint(0, T, lead))
    if norm is not None:
        tensors["norm_weight"] = (1 + 0.3 * torch.randn(n)).to(dtype)
        tensors["norm_bias"] = torch.randn(n).to(dtype)
    return EmbeddingCall("embedding", tensors, kwargs)


def run(call: EmbeddingCall, where: Any, cast: Callable[[Tensor], Tensor], **more: Any) -> Result:
    leaves = call.leaves(cast)
    outputs = call.run(where, leaves, **more)
    return Result(outputs, call.gradients(outputs, leaves, cast))


def judge(call: EmbeddingCall, backend: str = "cpu") -> Result:
    got = run(call, fastattn, as_is, backend=backend)
    with one_thread():
        right = run(call, fastattn.reference, Tensor.double)

    def plain(cast: Cast) -> dict[str, Tensor]:
        return run(call, fastattn.reference, cast).all()

    def in_another_order() -> dict[str, Tensor]:
        other = run(call.flipped(), fastattn.reference, as_is)
        return {n: x.flip(0) if n == "y" else x for n, x in other.all().items()}

    explicit = all(
        f"{n}s" in call.kwargs or f"{n}_weight" not in call.tensors for n in ("position", "segment")
    )
    orders = [in_another_order] if explicit and "seed" not in call.kwargs else []
    draws = Draws(plain, *orders)
    for name, x in right.all().items():
        assert_within(name, got.all()[name], x, draws[name])
    for name, grad in got.grads.items():
        assert grad.dtype == call.tensors[name].dtype, name
    return got


@pytest.mark.parametrize("isa", cpu_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(dtype: torch.dtype, isa: str) -> None:
    with force_cpu_isa(isa):
        for n in (1, 7, 16, 33, 100, 384):
            for norm in ("layer", None):
                judge(embedding_call(5, 9, n=n, dtype=dtype, norm=norm, eps=1e-3))


@pytest.mark.parametrize("tables", ["w", "wp", "ws", "wps"])
@pytest.mark.parametrize("norm", ["layer", "rms", None])
def test_tables_and_norms(tables: str, norm: str | None) -> None:
    judge(embedding_call(4, 11, tables=tables, norm=norm))
    judge(embedding_call(4, 11, tables=tables, norm=norm, explicit=False))


def test_words_alone_are_copied() -> None:
    weight, ids = torch.randn(V, 40), torch.randint(0, V, (3, 5))
    for dtype in DTYPES:
        w = weight.to(dtype)
        assert torch.equal(fastattn.embedding(ids, w, backend="cpu"), w[ids])


@pytest.mark.parametrize("shape", [(11,), (1, 11), (4, 1), (4, 11)])
def test_positions_broadcast(shape: tuple[int, ...]) -> None:
    positions = torch.randint(0, P, shape)
    judge(embedding_call(4, 11, positions=positions, segments=positions % T))


def test_positions_count_from_an_offset() -> None:
    call = embedding_call(3, 7, tables="wp", explicit=False, position_offset=5)
    counted = judge(call).outputs["y"]
    given = call.with_(position_offset=0, positions=torch.arange(5, 12))
    assert torch.equal(judge(given).outputs["y"], counted)


@pytest.mark.parametrize("n", [8, 33])
@pytest.mark.parametrize("given", [False, True])
def test_sinusoidal_positions(given: bool, n: int) -> None:
    """Against the formula, element by element, in fp64."""
    call = embedding_call(2, 9, n=n, tables="w", norm=None, position_weight="sinusoidal")
    call = call.with_(position_offset=3, scale=n**0.5)
    positions = torch.arange(9) + 3
    if given:
        positions = torch.randint(0, 400, (2, 9))
        call = call.with_(positions=positions)
    got = judge(call).outputs["y"].double()
    for i in range(n):
        angle = positions.double() / 10000 ** (2 * (i // 2) / n)
        wave = angle.cos() if i % 2 else angle.sin()
        words = call.tensors["weight"].double()[call.kwargs["ids"], i] * n**0.5
        torch.testing.assert_close(got[..., i], words + wave, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["layer", None])
def test_dropout_is_the_references(dtype: torch.dtype, norm: str | None) -> None:
    for n in (50, 64):
        call = embedding_call(2, 9, n=n, dtype=dtype, norm=norm, dropout_p=0.4, seed=2**40 + 3)
        dropped = judge(call).outputs["y"] == 0
        assert 0.3 < dropped.float().mean() < 0.5


@pytest.mark.parametrize("padding", [4, -2])
def test_padding_gets_no_gradient(padding: int) -> None:
    call = embedding_call(5, 9, padding_idx=padding, position_padding_idx=padding)
    call.kwargs["ids"][:, ::3] = padding % V
    call.kwargs["positions"][:, ::2] = padding % P
    grads = judge(call).grads
    assert not grads["weight"][padding].any()
    assert not grads["position_weight"][padding].any()
    assert grads["weight"].any()


def test_scale_and_frequency() -> None:
    judge(embedding_call(6, 20, tables="w", scale=3.5, scale_grad_by_freq=True))
    call = embedding_call(6, 20, tables="w", norm=None, scale_grad_by_freq=True)
    twice = call.with_(ids=call.kwargs["ids"].repeat(2, 1))
    upstream = torch.randn(6, 20, 24)
    one = judge(replace(call, upstream=(upstream,))).grads["weight"]
    two = judge(replace(twice, upstream=(upstream.repeat(2, 1, 1),))).grads["weight"]
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_that_every_token_takes(dtype: torch.dtype) -> None:
    """Segments: runs as long as the batch. In 16 bits plain PyTorch loses what is added late."""
    call = embedding_call(9, 500, dtype=dtype, norm=None, tables="ws", explicit=False)
    upstream = torch.rand(9, 500, 24).to(dtype)
    got = judge(replace(call, upstream=(upstream,))).grads["segment_weight"][0]
    right = upstream.double().sum((0, 1))
    # One rounding, and the sum's in fp32.
    assert ((got - right).abs() <= (torch.finfo(dtype).eps / 2 + 2**-21) * right).all()


@pytest.mark.parametrize("norm", ["layer", None])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_bitwise_the_same_for_every_thread_count(norm: str | None, p: float) -> None:
    more = {"seed": 3} if p else {}
    call = embedding_call(7, 300, n=96, norm=norm, dropout_p=p, **more)
    found = []
    for threads in (1, 2, 5, 1):
        torch.set_num_threads(threads)
        found.append(run(call, fastattn, lambda x: x, backend="cpu").all())
    for other in found[1:]:
        assert all(torch.equal(found[0][n], other[n]) for n in other)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_index_dtypes_and_strides(dtype: torch.dtype) -> None:
    ids = torch.randint(0, V, (9, 12)).to(dtype).t()[::2]
    call = embedding_call(6, 9, tables="w", ids=ids)
    wide = torch.randn(V, 60)
    call.tensors["weight"] = wide[:, 3:27]
    judge(call)
    call.tensors["weight"] = torch.randn(24, V).t()
    judge(call)


@pytest.mark.parametrize("lead", [(), (0,), (3, 0), (1,)])
def test_empty_and_small_shapes(lead: tuple[int, ...]) -> None:
    got = judge(embedding_call(*lead))
    if 0 in lead:
        assert not any(g.any() for g in got.grads.values())


def test_upstream_of_any_strides() -> None:
    call = embedding_call(4, 6)
    for upstream in (torch.ones(1).expand(4, 6, 24), torch.randn(24, 6, 4).permute(2, 1, 0)):
        judge(replace(call, upstream=(upstream,)))


def test_mixed_dtypes() -> None:
    call = embedding_call(4, 6, dtype=torch.bfloat16)
    call.tensors["position_weight"] = call.tensors["position_weight"].float()
    call.tensors["norm_weight"] = call.tensors["norm_weight"].float()
    got = judge(call)
    assert got.outputs["y"].dtype == torch.bfloat16


def test_only_what_is_wanted_gets_a_gradient() -> None:
    call = embedding_call(4, 6)
    full = run(call, fastattn, lambda x: x).grads
    for frozen in (("weight",), ("position_weight", "norm_bias"), ("segment_weight", "weight")):
        some = run(replace(call, frozen=frozen), fastattn, lambda x: x).grads
        assert set(some) == set(full) - set(frozen)
        assert all(torch.equal(some[n], full[n]) for n in some)


def test_float64_is_the_reference() -> None:
    ids = torch.tensor([[1, 2, 1], [0, 3, 2]])
    tables = [torch.randn(5, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def f(words: Tensor, positions: Tensor) -> Tensor:
        return fastattn.embedding(ids, words, position_weight=positions, norm="layer", scale=2.0)

    assert torch.autograd.gradcheck(f, tables)


# ---------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("bad", [-1, V, 10**9])
@pytest.mark.parametrize("name", ["ids", "positions", "segments"])
def test_an_index_outside_its_table(name: str, bad: int) -> None:
    call = embedding_call(2, 5)
    call.kwargs[name][1, 2] = bad
    rows = {"ids": V, "positions": P, "segments": T}[name]
    words = rf"fastattn::embedding: {name} must be in \[0, {rows}\), got {bad} at token 7"
    with pytest.raises(IndexError, match=words):
        call.run(fastattn, call.leaves(), backend="cpu")


def test_positions_beyond_their_table() -> None:
    call = embedding_call(1, P + 1, tables="wp", explicit=False)
    with pytest.raises(IndexError, match=rf"positions must be in \[0, {P}\), got {P}"):
        call.run(fastattn, call.leaves(), backend="cpu")


W = torch.randn(5, 8)
IDS = torch.tensor([1, 2])
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "float ids": ({"ids": torch.rand(3)}, TypeError, "ids must be int64 or int32"),
    "list of ids": ({"ids": [1]}, TypeError, "ids must be a Tensor, got list"),
    "weight of 1 dimension": ({"weight": W[0]}, ValueError, r"\(rows, columns\), got \(8,\)"),
    "int weight": ({"weight": W.long()}, TypeError, "weight must be float32"),
    "other columns": ({"segment_weight": W[:, :4]}, ValueError, r"segment_weight must have shape"),
    "other width": ({"position_weight": W.double()}, TypeError, "go with weight's torch.float32"),
    "no table": ({"positions": IDS}, ValueError, "positions need position_weight"),
    "no segments": ({"segments": IDS}, ValueError, "segments need segment_weight"),
    "no norm": ({"norm_weight": W[0]}, ValueError, "norm_weight belongs to a norm"),
    "unknown wave": ({"position_weight": "rotary"}, ValueError, "or 'sinusoidal', got 'rotary'"),
    "shape": (
        {"position_weight": W, "positions": torch.arange(3)}, ValueError, "broadcastable to ids"
    ),
    "padding": ({"padding_idx": 5}, ValueError, r"padding_idx must be in \[-5, 5\), got 5"),
    "padding of none": ({"position_padding_idx": 0}, ValueError, "belongs to a table of positions"),
    "p": ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\)"),
    "norm": ({"norm": "batch"}, ValueError, "norm must be one of"),
    "backend": ({"backend": "triton"}, ValueError, "backend='triton' cannot serve"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    given, kind, words = REFUSED[case]
    with pytest.raises(kind, match=f"fastattn::embedding: .*{words}"):
        fastattn.embedding(**{"ids": IDS, "weight": W, **given})
