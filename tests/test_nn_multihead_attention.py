"""`fastattn.nn.MultiheadAttention` against `torch.nn.MultiheadAttention`."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from swap_tools import Calls, calls, copies, judge_model, outputs_and_grads  # noqa: F401
from tools import assert_within, fake_grads
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastattn.nn import MultiheadAttention
from fastattn.nn import multihead_attention as mha_module

N, L, S, E, H = 3, 7, 5, 32, 4
LOW = torch.finfo(torch.float32).min

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_bias": {"bias": False},
    "widths": {"kdim": 24, "vdim": 20},
    "one_width": {"vdim": 20, "bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "both": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 24, "vdim": 20},
}


def causal(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).triu(1)


def padding(keys: int = S) -> Tensor:
    """Right padding of 0, 2 and 3 keys, torch's way round: True = ignored."""
    return torch.arange(keys) >= torch.tensor([[keys], [keys - 2], [keys - 3]])


def as_float(mask: Tensor, low: float = float("-inf")) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(mask, low)


def pairs(*shape: int) -> Tensor:
    mask = torch.rand(*shape) < 0.4
    mask[..., 0] = False
    return mask


MASKS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "none": dict,
    "padding": lambda: {"key_padding_mask": padding()},
    "padding_float": lambda: {"key_padding_mask": as_float(padding())},
    "padding_finite": lambda: {"key_padding_mask": as_float(padding(), LOW)},
    "padding_values": lambda: {"key_padding_mask": torch.randn(N, S)},
    "bool_2d": lambda: {"attn_mask": pairs(L, S)},
    "float_2d": lambda: {"attn_mask": torch.randn(L, S)},
    "inf_2d": lambda: {"attn_mask": as_float(pairs(L, S))},
    "bool_3d": lambda: {"attn_mask": pairs(N * H, L, S)},
    "float_3d": lambda: {"attn_mask": torch.randn(N * H, L, S)},
    "finite_3d": lambda: {"attn_mask": as_float(pairs(N * H, L, S), LOW)},
    "both_bool": lambda: {"attn_mask": pairs(L, S), "key_padding_mask": padding()},
    "both_float": lambda: {
        "attn_mask": as_float(pairs(L, S)),
        "key_padding_mask": as_float(padding()),
    },
    "both_3d": lambda: {"attn_mask": pairs(N * H, L, S), "key_padding_mask": padding()},
    "mixed": lambda: {"attn_mask": torch.randn(L, S), "key_padding_mask": padding()},
    "mixed_3d": lambda: {"attn_mask": pairs(N * H, L, S), "key_padding_mask": torch.randn(N, S)},
}

RESULTS = {
    "output": {"need_weights": False},
    "mean": {},
    "heads": {"average_attn_weights": False},
}


def modules(**config: Any) -> tuple[nn.MultiheadAttention, MultiheadAttention]:
    """Torch's module with random biases too, and ours with the same weights."""
    stock = nn.MultiheadAttention(E, H, **config)
    with torch.no_grad():
        for p in stock.parameters():
            if p.dim() == 1:
                p.normal_()
    fused = MultiheadAttention(E, H, **config)
    fused.load_state_dict(stock.state_dict())
    return stock, fused


class Inputs(nn.Module):
    """A module and its inputs as parameters, so that `judge_model` compares their gradients."""

    def __init__(self, mha: nn.MultiheadAttention, **inputs: Tensor) -> None:
        super().__init__()
        self.mha = mha
        self.inputs = nn.ParameterDict(inputs)


def call_with(same: bool = False, **kwargs: Any) -> Callable[..., dict[str, Tensor]]:
    """`judge_model`'s call: the module on its inputs, float arguments in the model's dtype."""

    def call(model: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
        x = model.inputs
        cast = {
            n: a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a
            for n, a in kwargs.items()
        }
        learned = {n: x[n] for n in ("attn_mask", "key_padding_mask") if n in x}
        if same:
            o, weights = model.mha(x["query"], x["query"], x["query"], **cast, **learned)
        else:
            o, weights = model.mha(x["query"], x["key"], x["value"], **cast, **learned)
        return {"o": o} if weights is None else {"o": o, "weights": weights}

    return call


def cross_inputs(batch_first: bool = True, kdim: int = E, vdim: int = E) -> dict[str, Tensor]:
    inputs = {
        "query": torch.randn(N, L, E),
        "key": torch.randn(N, S, kdim),
        "value": torch.randn(N, S, vdim),
    }
    return {n: x if batch_first else x.transpose(0, 1).contiguous() for n, x in inputs.items()}


def judge(stock: nn.Module, fused: nn.Module, inputs: dict[str, Tensor], **kwargs: Any) -> None:
    judge_model(Inputs(stock, **inputs), Inputs(fused, **inputs), call_with(**kwargs))


# -------------------------------------------------------------------------------------- drop-in


def test_signature_is_torchs() -> None:
    """Names, order, kinds and defaults; the additions are keyword-only."""

    def parameters(fn: Any) -> list[tuple[str, Any, Any]]:
        return [(p.name, p.kind, p.default) for p in inspect.signature(fn).parameters.values()]

    *same, cache = parameters(MultiheadAttention.forward)
    assert same == parameters(nn.MultiheadAttention.forward)
    assert cache == ("kv_cache", inspect.Parameter.KEYWORD_ONLY, None)
    *same, backend = parameters(MultiheadAttention.__init__)
    assert same == parameters(nn.MultiheadAttention.__init__)
    assert backend == ("backend", inspect.Parameter.KEYWORD_ONLY, "auto")


@pytest.mark.parametrize("config", CONFIGS)
def test_initialisation_and_state_dict(config: str) -> None:
    torch.manual_seed(3)
    stock = nn.MultiheadAttention(E, H, **CONFIGS[config])
    torch.manual_seed(3)
    fused = MultiheadAttention(E, H, **CONFIGS[config])
    assert isinstance(fused, nn.MultiheadAttention)
    ours, theirs = fused.state_dict(), stock.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    stock.load_state_dict(MultiheadAttention(E, H, **CONFIGS[config]).state_dict())
    fused.load_state_dict(stock.state_dict())


def test_constructor_arguments_arrive() -> None:
    fused = MultiheadAttention(
        E, H, 0.25, False, True, True, 24, 20, True, "cpu", torch.float64, backend="reference"
    )
    assert (fused.dropout, fused.kdim, fused.vdim, fused.batch_first) == (0.25, 24, 20, True)
    assert fused.in_proj_bias is None
    assert fused.bias_k is not None
    assert fused.add_zero_attn
    assert fused.q_proj_weight.dtype == torch.float64
    assert fused.backend == "reference"


# --------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("results", RESULTS)
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask: str, results: str) -> None:
    stock, fused = modules(batch_first=True)
    judge(stock, fused, cross_inputs(), **MASKS[mask](), **RESULTS[results])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("results", RESULTS)
@pytest.mark.parametrize("config", CONFIGS)
def test_configurations(config: str, results: str, batch_first: bool) -> None:
    kwargs = CONFIGS[config]
    stock, fused = modules(batch_first=batch_first, **kwargs)
    inputs = cross_inputs(batch_first, kwargs.get("kdim", E), kwargs.get("vdim", E))
    judge(stock, fused, inputs, **MASKS["both_3d"](), **RESULTS[results])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("config", ["plain", "no_bias", "bias_kv"])
def test_self_attention(config: str, batch_first: bool) -> None:
    stock, fused = modules(batch_first=batch_first, **CONFIGS[config])
    x = torch.randn(N, S, E) if batch_first else torch.randn(S, N, E)
    judge(stock, fused, {"query": x}, same=True, key_padding_mask=padding(), need_weights=False)


def test_key_is_value() -> None:
    stock, fused = modules()
    query, memory = torch.randn(L, N, E), torch.randn(S, N, E)
    right = stock(query, memory, memory)[0]
    torch.testing.assert_close(fused(query, memory, memory)[0], right)


@pytest.mark.parametrize("results", RESULTS)
@pytest.mark.parametrize("mask", ["none", "padding", "bool_2d", "heads"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_unbatched(batch_first: bool, mask: str, results: str) -> None:
    stock, fused = modules(batch_first=batch_first)
    inputs = {"query": torch.randn(L, E), "key": torch.randn(S, E), "value": torch.randn(S, E)}
    masks = {
        "none": {},
        "padding": {"key_padding_mask": padding()[2]},
        "bool_2d": {"attn_mask": pairs(L, S)},
        "heads": {"attn_mask": pairs(H, L, S)},
    }
    judge(stock, fused, inputs, **masks[mask], **RESULTS[results])
    x = torch.randn(L, E)
    torch.testing.assert_close(fused(x, x, x), stock(x, x, x))


@pytest.mark.parametrize("shape", [(L, S), (N * H, L, S)], ids=str)
def test_gradient_of_a_learned_mask(shape: tuple[int, ...]) -> None:
    stock, fused = modules(batch_first=True)
    inputs = {**cross_inputs(), "attn_mask": torch.randn(shape)}
    judge(stock, fused, inputs, need_weights=False)
    learned = {**cross_inputs(), "key_padding_mask": torch.randn(N, S)}
    judge(stock, fused, learned, need_weights=False)


@pytest.mark.parametrize("config", ["plain", "bias_kv", "zero_attn"])
@pytest.mark.parametrize("results", RESULTS)
@pytest.mark.parametrize("with_padding", [True, False])
def test_causal_hint(with_padding: bool, results: str, config: str) -> None:
    """Also where torch's own answer depends on the path: see `MultiheadAttention._masks`."""
    stock, fused = modules(batch_first=True, **CONFIGS[config])
    x = torch.randn(N, S, E)
    kwargs = {"key_padding_mask": padding()} if with_padding else {}
    for mask in (causal(S), as_float(causal(S))):
        if with_padding and mask.is_floating_point():
            kwargs = {"key_padding_mask": as_float(padding())}
        judge(
            stock,
            fused,
            {"query": x},
            same=True,
            attn_mask=mask,
            is_causal=True,
            **kwargs,
            **RESULTS[results],
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("results", ["output", "mean"])
def test_half_precision(dtype: torch.dtype, results: str) -> None:
    stock, fused = modules(batch_first=True)
    inputs = {name: x.to(dtype) for name, x in cross_inputs().items()}
    kwargs = {**MASKS["both_bool"](), **RESULTS[results]}
    judge(stock.to(dtype), fused.to(dtype), inputs, **kwargs)


def test_float64() -> None:
    stock, fused = modules(batch_first=True)
    inputs = {name: x.double() for name, x in cross_inputs().items()}
    got, right = (
        outputs_and_grads(Inputs(m.double(), **inputs), call_with(), torch.float64)
        for m in (fused, stock)
    )
    for name, x in right.items():
        torch.testing.assert_close(got[name], x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    stock, fused = modules(batch_first=True)
    x = torch.randn(N, S, E)
    with torch.autocast("cpu", dtype):
        o, weights = fused(x, x, x, key_padding_mask=padding())
        stock_o, _ = stock(x, x, x, key_padding_mask=padding())
    o.float().sum().backward()
    assert o.dtype == weights.dtype == stock_o.dtype == dtype
    right = copy.deepcopy(stock).double()(x.double(), x.double(), x.double(), padding())[0]
    assert_within("o", o, right, [stock_o])
    assert fused.in_proj_weight.grad.dtype == torch.float32


# ----------------------------------------------------------------------------------- edge cases


@pytest.mark.parametrize("results", RESULTS)
def test_rows_without_keys_are_zero(results: str) -> None:
    """Torch gives NaN here; ours is 0 before the out-projection, with finite gradients."""
    _, fused = modules(batch_first=True)
    x = torch.randn(N, S, E, requires_grad=True)
    mask = padding()
    mask[1] = True
    for form in (mask, as_float(mask)):
        o, weights = fused(x, x, x, key_padding_mask=form, **RESULTS[results])
        torch.testing.assert_close(o[1], fused.out_proj.bias.expand(S, E))
        if weights is not None:
            assert torch.equal(weights[1], torch.zeros_like(weights[1]))
        o.square().sum().backward()
        assert all(p.grad.isfinite().all() for p in fused.parameters())
    assert x.grad.isfinite().all()


def test_lowest_finite_mask_everywhere_is_uniform() -> None:
    """As torch: logits drown in finfo.min, so all keys weigh the same."""
    stock, fused = modules(batch_first=True)
    x = torch.randn(N, S, E)
    mask = torch.full((N, S), LOW)
    for kwargs in RESULTS.values():
        got, right = fused(x, x, x, mask, **kwargs), stock(x, x, x, mask, **kwargs)
        torch.testing.assert_close(got, right)


@pytest.mark.parametrize("shape", [(0, S, E), (N, 0, E)], ids=str)
def test_empty(shape: tuple[int, int, int]) -> None:
    _, fused = modules(batch_first=True)
    x = torch.randn(shape, requires_grad=True)
    o, weights = fused(x, x, x)
    assert o.shape == shape
    assert weights.shape == (shape[0], shape[1], shape[1])
    o.sum().backward()
    assert x.grad.shape == shape


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "dims": ({"query": torch.randn(L)}, ValueError, r"query must be .*got shape \(7,\)"),
    "key_dims": ({"key": torch.randn(S, E)}, ValueError, "key and value must be 3-D"),
    "width": ({"key": torch.randn(N, S, E + 1)}, ValueError, r"features, got \(32, 33, 32\)"),
    "value_len": ({"value": torch.randn(N, S + 1, E)}, ValueError, "the same sequences"),
    "batch": (
        {"key": torch.randn(N + 1, S, E), "value": torch.randn(N + 1, S, E)},
        ValueError,
        "batch size 3, got 4",
    ),
    "padding_shape": (
        {"key_padding_mask": torch.zeros(N, S + 1, dtype=torch.bool)},
        ValueError,
        r"key_padding_mask must be \(3, 5\), got \(3, 6\)",
    ),
    "padding_dtype": (
        {"key_padding_mask": torch.zeros(N, S, dtype=torch.int64)},
        ValueError,
        "key_padding_mask must be bool or float, got torch.int64",
    ),
    "mask_shape": (
        {"attn_mask": torch.zeros(N, L, S)},
        ValueError,
        r"attn_mask must be \(7, 5\) or \(12, 7, 5\), got \(3, 7, 5\)",
    ),
    "hint": ({"is_causal": True}, RuntimeError, "is_causal=True describes attn_mask"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    changes, error, message = BAD[case]
    _, fused = modules(batch_first=True)
    with pytest.raises(error, match=message):
        fused(**{**cross_inputs(), **changes})


# -------------------------------------------------------------------------- how the op is called


def test_op_gets_views_of_one_projection(calls: Calls) -> None:  # noqa: F811
    """One GEMM, no copies: q, k, v are strided views of its output, for either layout."""
    for batch_first in (True, False):
        _, fused = modules(batch_first=batch_first)
        x = torch.randn(N, S, E)
        fused(x, x, x, need_weights=False)
        call = calls.pop()
        storages = {call[n].untyped_storage().data_ptr() for n in "qkv"}
        assert len(storages) == 1
        assert call["q"].untyped_storage().nbytes() == 3 * x.numel() * 4
        assert not call["return_weights"]


def test_masks_are_not_expanded(calls: Calls) -> None:  # noqa: F811
    _, fused = modules(batch_first=True)
    x = torch.randn(N, S, E)
    fused(x, x, x, padding(), need_weights=False)
    assert calls[-1]["mask"].shape == (N, 1, 1, S)
    assert calls[-1]["bias"] is None
    fused(x, x, x, padding(), False, causal(S), is_causal=True)
    assert calls[-1]["mask"].shape == (N, 1, 1, S)
    assert calls[-1]["causal"] is True
    fused(x, x, x, None, False, causal(S), is_causal=True)
    assert calls[-1]["mask"] is None
    assert calls[-1]["causal"] is True
    fused(x, x, x, None, True, causal(S), is_causal=True)
    assert calls[-1]["mask"].shape == (1, 1, S, S)
    assert calls[-1]["causal"] is False
    assert calls[-1]["return_weights"] == "mean"
    # What torch's encoder makes of a bool mask: the op is told of its -inf.
    fused(x, x, x, as_float(padding()), need_weights=False)
    assert torch.equal(calls[-1]["mask"], ~padding()[:, None, None])


def test_no_second_path_for_inference(
    calls: Calls,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def native(*args: Any) -> None:
        raise AssertionError("torch's own kernel ran")

    monkeypatch.setattr(torch, "_native_multi_head_attention", native)
    stock, fused = modules(batch_first=True)
    x = torch.randn(N, S, E)
    with torch.inference_mode():
        with pytest.raises(AssertionError, match="own kernel"):
            stock.eval()(x, x, x)
        fused.eval()(x, x, x)
    assert calls.ops() == ["attention"]


@pytest.mark.parametrize("mask", ["padding", "bool_2d", "float_3d"])
def test_a_dropped_mask_is_noticed(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parity tests see what they are for: an op that ignores masks fails them."""
    original = mha_module.attention

    def without_masks(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Any:
        return original(q, k, v, **{**kwargs, "mask": None, "bias": None})

    monkeypatch.setattr(mha_module, "attention", without_masks)
    stock, fused = modules(batch_first=True)
    with pytest.raises(AssertionError, match="of the error"):
        judge(stock, fused, cross_inputs(), **MASKS[mask]())


# -------------------------------------------------------------------------------------- dropout


def test_dropout_only_in_training() -> None:
    _, fused = modules(batch_first=True, dropout=0.5)
    x = torch.randn(N, S, E)
    assert not torch.equal(fused(x, x, x)[0], fused(x, x, x)[0])
    fused.eval()
    assert torch.equal(fused(x, x, x)[0], fused(x, x, x)[0])


def test_dropout_drops_what_it_says() -> None:
    """The weights come after dropout, and the output is made of them."""
    stock, fused = modules(batch_first=True, dropout=0.25)
    x = torch.randn(4, 40, E)
    o, weights = fused(x, x, x, average_attn_weights=False)
    kept = (weights > 0).double().mean().item()
    assert abs(kept - 0.75) < 4 * (0.75 * 0.25 / weights.numel()) ** 0.5
    clean = stock.eval()(x, x, x, average_attn_weights=False)[1]
    torch.testing.assert_close(weights, torch.where(weights > 0, clean / 0.75, 0.0))
    v = F.linear(x, fused.in_proj_weight[2 * E :], fused.in_proj_bias[2 * E :])
    heads = weights @ v.view(4, 40, H, E // H).transpose(1, 2)
    right = fused.out_proj(heads.transpose(1, 2).reshape(4, 40, E))
    torch.testing.assert_close(o, right)


# ---------------------------------------------------------------------- what torch does to modules


def test_copies_and_pickles() -> None:
    fused = MultiheadAttention(E, H, batch_first=True, backend="reference")
    x = torch.randn(N, S, E)
    right = fused(x, x, x)[0]
    for other in copies(fused):
        assert type(other) is MultiheadAttention
        assert other.backend == "reference"
        assert torch.equal(other(x, x, x)[0], right)


def test_backend_reaches_the_op() -> None:
    fused = MultiheadAttention(E, H, backend="cuda")
    x = torch.randn(S, N, E)
    with pytest.raises(ValueError, match="backend='cuda' cannot serve this call"):
        fused(x, x, x)


@pytest.mark.parametrize("need_weights", [True, False])
def test_compile(need_weights: bool) -> None:
    _, fused = modules(batch_first=True)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (S, L):
        x = torch.randn(N, length, E, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        got = compiled(x, x, x, padding(length), need_weights)[0]
        right = fused(y, y, y, padding(length), need_weights)[0]
        torch.testing.assert_close(got, right)
        got.sum().backward(), right.sum().backward()
        torch.testing.assert_close(x.grad, y.grad)


def test_export() -> None:
    _, fused = modules(batch_first=True)
    x = torch.randn(N, S, E)
    kwargs = {"key_padding_mask": padding(), "need_weights": False}
    program = torch.export.export(fused.eval(), (x, x, x), kwargs)
    torch.testing.assert_close(program.module()(x, x, x, **kwargs), fused(x, x, x, **kwargs))


@pytest.mark.parametrize("config", ["plain", "bias_kv", "widths"])
@pytest.mark.parametrize("mask", ["none", "padding_float", "both_bool", "float_3d"])
@pytest.mark.filterwarnings("ignore::fastattn.backends.PerformanceWarning")
def test_fake_cuda(mask: str, config: str) -> None:
    """Forward and backward touch no value and mix no devices."""
    kwargs = CONFIGS[config]
    masks = MASKS[mask]()
    with FakeTensorMode(), torch.device("cuda"):
        fused = MultiheadAttention(E, H, batch_first=True, dropout=0.1, device="cuda", **kwargs)
        x = torch.randn(N, L, E, requires_grad=True)
        y = torch.randn(N, S, kwargs.get("kdim", E))
        z = torch.randn(N, S, kwargs.get("vdim", E))
        fake = {n: torch.zeros(m.shape, dtype=m.dtype) for n, m in masks.items()}
        o, weights = fused(x, y, z, **fake)
        assert (o.shape, o.device.type) == ((N, L, E), "cuda")
        grads = fake_grads([o, weights], [x, *fused.parameters()])
        assert all(g is not None and g.device.type == "cuda" for g in grads)
        assert [g.shape for g in grads[1:]] == [p.shape for p in fused.parameters()]
