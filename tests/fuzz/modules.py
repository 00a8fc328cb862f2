"""The drop-in modules, against torch's own in fp64: values, gradients, constructors' arguments."""

import copy
from typing import Any

import torch
from hypothesis import strategies as st
from rule import Cast, Draws, as_is, assert_within, one_thread, unit
from torch import Tensor, nn

import fastattn
from fuzz import spoil
from fuzz.case import Valid

_SIZES = st.sampled_from([1, 3, 8, 24, 64])
_WHERE = {"backend": spoil.constants("tpu", 3, ["cpu"])}


class _Called:
    """A module's class and its inputs as one function: construct, call."""

    def __init__(self, cls: Any, inputs: tuple[Any, ...]) -> None:
        self.cls, self.inputs = cls, inputs
        self.__name__ = cls.__name__

    def __call__(self, **kwargs: Any) -> Any:
        return self.cls(**kwargs).eval()(*self.inputs)


def _first(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


def _results(module: Any, inputs: tuple[Any, ...], cast: Cast = as_is) -> dict[str, Tensor]:
    def floats(x: Tensor) -> Tensor:
        return cast(x) if x.is_floating_point() else x

    module = copy.deepcopy(module)._apply(floats)
    made = tuple(floats(x.detach().clone()).requires_grad_(x.is_floating_point()) for x in inputs)
    leaves = {f"input{i}": x for i, x in enumerate(made) if x.requires_grad}
    leaves |= dict(module.named_parameters())
    y = _first(module(*made))
    grads = torch.autograd.grad(
        y, [*leaves.values()], _upstream(y), allow_unused=True, materialize_grads=True
    )
    return {"y": y.detach(), **{f"d{n}": g for n, g in zip(leaves, grads, strict=True)}}


def _upstream(y: Tensor) -> Tensor:
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype)


def _reaches(stock: Any, inputs: tuple[Any, ...], y: Tensor) -> float:
    """What a norm multiplies before it takes the difference: upstream, weight, 1 / deviation."""
    if not isinstance(stock, torch.nn.LayerNorm | torch.nn.RMSNorm) or not y.numel():
        return 0.0
    x = inputs[0].detach().double()
    x = x - x.mean(-1, keepdim=True) if isinstance(stock, torch.nn.LayerNorm) else x
    rstd = (x.square().mean(-1, keepdim=True) + (stock.eps or 0.0)).rsqrt()
    weight = 1.0 if stock.weight is None else stock.weight.detach().double()
    return float((_upstream(y).double() * weight * rstd).abs().max())


def _judge(fused: Any, stock: Any, inputs: tuple[Any, ...]) -> None:
    got = _results(fused, inputs)
    with one_thread():
        right = _results(stock, inputs, Tensor.double)
    assert got.keys() == right.keys()
    plain = Draws(lambda cast: _results(stock, inputs, cast))
    # What a softmax or a norm passes back is a difference of terms as large as what reaches it, and
    # may be 0 (one key, one feature), in one of the two ways to form it exactly.
    gradients = [x for n, x in right.items() if n != "y" and x.numel()]
    largest = max(float(x.abs().max()) for x in gradients) if gradients else 0.0
    largest = max(largest, _reaches(stock, inputs, right["y"]))
    for n, x in right.items():
        assert_within(n, got[n], x, plain[n], 0.0 if n == "y" else unit(torch.float32) * largest)


def _attention(draw: Any) -> tuple[str, dict[str, Any], tuple[Any, ...], dict[str, spoil.Ways]]:
    heads = draw(st.sampled_from([1, 2, 4]))
    e = heads * draw(st.sampled_from([1, 8, 16]))
    kwargs = {"embed_dim": e, "num_heads": heads, "bias": draw(st.booleans()),
              "batch_first": draw(st.booleans())}  # fmt: skip
    x = torch.randn(draw(st.integers(1, 3)), draw(st.integers(1, 30)), e)
    # What does not divide or is no number, torch's constructor refuses in its own ways.
    roles = {"num_heads": spoil.constants(0), "embed_dim": spoil.constants(0, -8)}
    return "MultiheadAttention", kwargs, (x, x.clone(), x.clone()), {**roles, **_WHERE}


def _layer(draw: Any) -> tuple[str, dict[str, Any], tuple[Any, ...], dict[str, spoil.Ways]]:
    heads = draw(st.sampled_from([1, 2, 4]))
    e = heads * draw(st.sampled_from([2, 8, 16]))
    kwargs = {
        "d_model": e, "nhead": heads, "dim_feedforward": draw(_SIZES), "dropout": 0.0,
        "activation": draw(st.sampled_from(["relu", "gelu"])), "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()), "norm_first": draw(st.booleans()),
    }  # fmt: skip
    x = torch.randn(draw(st.integers(1, 3)), draw(st.integers(1, 30)), e)
    return (
        "TransformerEncoderLayer",
        kwargs,
        (x,),
        dict(_WHERE),
    )


def _norm(draw: Any) -> tuple[str, dict[str, Any], tuple[Any, ...], dict[str, spoil.Ways]]:
    n = draw(_SIZES)
    name = draw(st.sampled_from(["LayerNorm", "RMSNorm"]))
    kwargs = {"normalized_shape": n, "eps": 1e-5, "elementwise_affine": draw(st.booleans())}
    x = torch.randn(draw(st.integers(0, 3)), draw(st.integers(1, 9)), n)
    return name, kwargs, (x,), {"eps": spoil.constants("nonsense", -1.0), **_WHERE}


def _embedding(draw: Any) -> tuple[str, dict[str, Any], tuple[Any, ...], dict[str, spoil.Ways]]:
    rows = draw(st.integers(1, 40))
    kwargs: dict[str, Any] = {"num_embeddings": rows, "embedding_dim": draw(_SIZES)}
    if draw(st.booleans()):
        kwargs["padding_idx"] = draw(st.integers(-rows, rows - 1))
    ids = torch.randint(rows, (draw(st.integers(1, 3)), draw(st.integers(0, 9))))
    return "Embedding", kwargs, (ids,), dict(_WHERE)


def _recurrent(draw: Any) -> tuple[str, dict[str, Any], tuple[Any, ...], dict[str, spoil.Ways]]:
    name = draw(st.sampled_from(["LSTM", "GRU", "RNN"]))
    kwargs = {
        "input_size": draw(_SIZES), "hidden_size": draw(_SIZES),
        "num_layers": draw(st.sampled_from([1, 2])), "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()), "bidirectional": draw(st.booleans()),
    }  # fmt: skip
    x = torch.randn(draw(st.integers(1, 7)), draw(st.integers(1, 7)), kwargs["input_size"])
    return name, kwargs, (x,), {"hidden_size": spoil.constants("nonsense", 0), **_WHERE}


@st.composite
def modules(draw: Any) -> Valid:
    seed = draw(st.integers(0, 2**20))
    torch.manual_seed(seed)
    make = draw(st.sampled_from([_attention, _layer, _norm, _embedding, _recurrent]))
    name, kwargs, inputs, roles = make(draw)

    def judge() -> None:
        torch.manual_seed(seed)
        stock = getattr(nn, name)(**kwargs).eval()
        fused = getattr(fastattn.nn, name)(**kwargs).eval()
        fused.load_state_dict(stock.state_dict())
        _judge(fused, stock, inputs)

    return Valid(_Called(getattr(fastattn.nn, name), inputs), kwargs, judge, roles)


_FFN_ROLES: dict[str, spoil.Ways] = {
    "activation": spoil.CHOICE,
    "norm": spoil.CHOICE,
    "recompute": spoil.CHOICE,
    "dropout": spoil.PROBABILITY,
    "hidden_dropout": spoil.PROBABILITY,
    **_WHERE,
}


@st.composite
def layernorm_ffn(draw: Any) -> Valid:
    """fastattn.nn.LayerNormFFN, which torch has not: its parts by torch are the oracle."""
    seed = draw(st.integers(0, 2**20))
    torch.manual_seed(seed)
    # Of one feature a norm's gradient cancels to nothing: the norms' own family knows the floor.
    d = max(2, draw(_SIZES))
    kwargs = {
        "d_model": d, "dim_feedforward": draw(_SIZES), "gated": draw(st.booleans()),
        "activation": draw(st.sampled_from(["gelu", "gelu_tanh", "relu", "relu2", "silu"])),
        "norm": draw(st.sampled_from(["layer", "rms", None])), "pre_norm": draw(st.booleans()),
        "bias": draw(st.booleans()), "recompute": draw(st.sampled_from(["none", "all"])),
    }  # fmt: skip
    x = torch.randn(draw(st.integers(1, 3)), draw(st.integers(1, 20)), d)

    def judge() -> None:
        torch.manual_seed(seed)
        module = fastattn.nn.LayerNormFFN(**kwargs)
        slow = copy.deepcopy(module)
        slow.backend = "reference"
        _judge(module, slow, (x,))

    return Valid(_Called(fastattn.nn.LayerNormFFN, (x,)), kwargs, judge, _FFN_ROLES)
