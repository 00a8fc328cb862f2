"""The decoder layer over a cache as one op: what it computes, and when it may run."""

import copy
import os
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from swap_tools import Calls, calls  # noqa: F401
from tools import DTYPES, assert_within, one_thread
from torch import Tensor, nn
from transformers_models import LAYERS, V, build, swapped

from fastattn.backends import cpu_isas, force_cpu_isa
from fastattn.ops.decoder_layer import DecoderWeights, decoder_layer
from fastattn.swap import _decoding, kv_cache, swap

MODELS = ("gpt2", "llama")


def logits(model: Any, ids: Tensor, steps: list[int], padding: Tensor | None = None) -> Tensor:
    """Of all steps behind the first, which is the prompt."""
    past, found, start = kv_cache(model), [], 0
    with torch.no_grad():
        for n in steps:
            mask = None if padding is None else padding[:, : start + n]
            out = model(ids[:, start : start + n], past_key_values=past, attention_mask=mask)
            found.append(out.logits)
            start += n
    return torch.cat(found[1:], 1)


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every call of the one op."""
    record: list[Any] = []

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        record.append(kwargs)
        return decoder_layer(*args, **kwargs)

    monkeypatch.setattr(_decoding, "decoder_layer", spy)
    return record


@pytest.mark.parametrize("isa", cpu_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_against_fp64(name: str, dtype: torch.dtype, isa: str, ops: list[Any]) -> None:
    """Rows behind a prompt, one and several at once, with and without padding in front."""
    stock = build(name)
    ids, steps = torch.randint(2, V, (3, 15)), [7, 1, 1, 5, 1]
    padding = (torch.arange(15) >= torch.tensor([[0], [3], [6]])).long()
    fused = swapped(stock).to(dtype)
    plain, right = copy.deepcopy(stock).to(dtype), copy.deepcopy(stock).double()
    with one_thread(), force_cpu_isa(isa):
        for mask in (None, padding):
            args = (ids, steps, mask)
            assert_within(
                "logits", logits(fused, *args), logits(right, *args), [logits(plain, *args)]
            )
    assert len(ops) == 2 * LAYERS * (len(steps) - 1)
    assert {call["mask"] is None for call in ops} == {True, False}


@pytest.mark.parametrize("name", MODELS)
def test_repeatable_for_every_number_of_threads(name: str) -> None:
    fused = swapped(build(name))
    ids = torch.randint(2, V, (2, 9))
    first = logits(fused, ids, [7, 1, 1])
    with one_thread():
        assert torch.equal(logits(fused, ids, [7, 1, 1]), first)


def hook_everything(model: Any) -> None:
    nn.modules.module.register_module_forward_hook(lambda *_: None)


def hook(path: str) -> Any:
    return lambda model: model.get_submodule(path).register_forward_hook(lambda *_: None)


def own_forward(path: str) -> Any:
    def change(model: Any) -> None:
        module = model.get_submodule(path)
        module.forward = type(module).forward.__get__(module)

    return change


def other_class(path: str) -> Any:
    def change(model: Any) -> None:
        module = model.get_submodule(path)
        module.__class__ = type("Adapted", (type(module),), {})

    return change


def other_rotation(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.models.llama.modeling_llama as home

    original = home.apply_rotary_pos_emb

    def apply_rotary_pos_emb(*args: Any) -> Any:  # the name says nothing
        return original(*args)

    monkeypatch.setattr(home, "apply_rotary_pos_emb", apply_rotary_pos_emb)


A, B = "transformer.h.0.", "model.layers.0."
FORBIDDEN: dict[str, tuple[str, Any]] = {
    "gpt2 hook on a projection": ("gpt2", hook(A + "attn.c_attn")),
    "gpt2 hook on a norm": ("gpt2", hook(A + "ln_1")),
    "gpt2 hook on the attention": ("gpt2", hook(A + "attn")),
    "gpt2 forward of its own": ("gpt2", own_forward(A + "mlp.c_proj")),
    "gpt2 adapter": ("gpt2", other_class(A + "attn.c_proj")),
    "gpt2 another norm": ("gpt2", lambda m: setattr(
        m.transformer.h[0], "ln_2", nn.Sequential(m.transformer.h[0].ln_2))),
    "gpt2 dropout": ("gpt2", lambda m: m.transformer.h[0].mlp.dropout.train()),
    "llama hook on a projection": ("llama", hook(B + "self_attn.v_proj")),
    "llama hook on the feed-forward": ("llama", hook(B + "mlp")),
    "llama adapter": ("llama", other_class(B + "mlp.gate_proj")),
    "llama forward of its own": ("llama", own_forward(B + "self_attn")),
    "llama activation": ("llama", lambda m: setattr(
        m.model.layers[0].mlp, "act_fn", nn.Sequential(nn.SiLU()))),
}  # fmt: skip


@pytest.mark.parametrize("why", FORBIDDEN)
def test_in_parts_where_something_was_changed(why: str, ops: list[Any]) -> None:
    """That layer alone; the result stays."""
    name, change = FORBIDDEN[why]
    fused = swapped(build(name))
    ids, steps = torch.randint(2, V, (2, 9)), [7, 1, 1]
    right = logits(fused, ids, steps)
    assert len(ops) == 2 * LAYERS
    ops.clear()
    change(fused)
    got = logits(fused, ids, steps)
    assert len(ops) == 2 * (LAYERS - 1)
    if why != "gpt2 dropout":
        torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-3)


def test_in_parts_under_hooks_of_all_modules(ops: list[Any]) -> None:
    fused = swapped(build("gpt2"))
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        logits(fused, torch.randint(2, V, (2, 9)), [7, 1, 1])
    finally:
        handle.remove()
    assert not ops


def test_in_parts_with_another_rotation(ops: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    fused = swapped(build("llama"))
    ids, steps = torch.randint(2, V, (2, 9)), [7, 1, 1]
    right = logits(fused, ids, steps)
    ops.clear()
    other_rotation(fused, monkeypatch)
    torch.testing.assert_close(logits(fused, ids, steps), right, rtol=1e-3, atol=1e-3)
    assert not ops


@pytest.mark.parametrize("name", MODELS)
def test_in_parts_with_gradients_or_attentions(name: str, ops: list[Any]) -> None:
    fused = swapped(build(name))
    ids, past = torch.randint(2, V, (2, 9)), kv_cache(fused)
    fused(ids[:, :7], past_key_values=past)
    fused(ids[:, 7:8], past_key_values=past).logits.sum().backward()
    with torch.no_grad():
        fused(ids[:, :8], past_key_values=kv_cache(fused))  # a prompt
        past = kv_cache(fused)
        fused(ids[:, :7], past_key_values=past)
        out = fused(ids[:, 7:8], past_key_values=past, output_attentions=True)
    assert len(out.attentions) == LAYERS
    assert not ops


def test_only_the_attention_swapped(ops: list[Any]) -> None:
    model = build("gpt2")
    swap(model, only="*.attn")
    logits(model, torch.randint(2, V, (2, 9)), [7, 1, 1])
    assert not ops


# ------------------------------------------------------------------------------- the op by itself

E, H, HK, D, F, ROOM = 12, 4, 2, 3, 20, 9


def arguments() -> dict[str, Any]:
    """A packed layer of LayerNorms over a cache of 5 and 2 keys, two new rows."""
    shapes = {
        "wq": (H * D, E), "bq": (H * D,), "wk": (HK * D, E), "bk": (HK * D,), "wv": (HK * D, E),
        "bv": (HK * D,), "wo": (E, H * D), "bo": (E,), "norm1_weight": (E,), "norm1_bias": (E,),
        "w1": (F, E), "b1": (F,), "w2": (E, F), "b2": (E,), "w_gate": (F, E), "b_gate": (F,),
        "norm2_weight": (E,), "norm2_bias": (E,),
    }  # fmt: skip
    return {
        "x": torch.randn(2, 2, E),
        "k_cache": torch.randn(2, HK, ROOM, D),
        "v_cache": torch.randn(2, HK, ROOM, D),
        "cache_lens": torch.tensor([5, 2]),
        "weights": DecoderWeights(**{n: torch.randn(s) * 0.3 for n, s in shapes.items()}),
        "heads": H, "scale": 0.5, "activation": "silu", "eps": (1e-5, 0.1),
    }  # fmt: skip


def rotated(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first R dims of (heads, rows, D), as transformers writes it."""
    n = cos.shape[1]
    x, rest = rows[..., :n], rows[..., n:]
    halves = torch.cat([-x[..., n // 2 :], x[..., : n // 2]], -1)
    return torch.cat([x * cos + halves * sin, rest], -1)


def formula(given: dict[str, Any]) -> Tensor:
    """In fp64, sequence by sequence."""
    w = DecoderWeights(*(x.double() for x in given["weights"]))
    results = []
    for b, start in enumerate(given["cache_lens"].tolist()):
        x = given["x"][b].double()
        n = nn.functional.layer_norm(x, (E,), w.norm1_weight, w.norm1_bias, given["eps"][0])
        q, k, v = (
            nn.functional.linear(n, m, bias).view(2, -1, D).transpose(0, 1)
            for m, bias in ((w.wq, w.bq), (w.wk, w.bk), (w.wv, w.bv))
        )
        if "rotary" in given:
            cos, sin = (t[b % len(t)].double() for t in given["rotary"])
            q, k = (rotated(rows, cos, sin) for rows in (q, k))
        caches = (given["k_cache"][b], given["v_cache"][b])
        k, v = (
            torch.cat([c[:, :start].double(), new], 1).repeat_interleave(H // HK, 0)
            for c, new in zip(caches, (k, v), strict=True)
        )
        o = nn.functional.scaled_dot_product_attention(
            q, k, v, torch.ones(2, start + 2, dtype=torch.bool).tril(start), scale=given["scale"]
        )
        h = x + nn.functional.linear(o.transpose(0, 1).reshape(2, H * D), w.wo, w.bo)
        n = nn.functional.layer_norm(h, (E,), w.norm2_weight, w.norm2_bias, given["eps"][1])
        gate = nn.functional.silu(nn.functional.linear(n, w.w_gate, w.b_gate))
        up = nn.functional.linear(n, w.w1, w.b1)
        results.append(h + nn.functional.linear(gate * up, w.w2, w.b2))
    return torch.stack(results)


@pytest.mark.parametrize("tables", [0, 1, 2])
@pytest.mark.parametrize("by_columns", [False, True])
def test_of_different_lengths(by_columns: bool, tables: int) -> None:
    """tables: of the rotation, none, one for all sequences, or one each."""
    given = arguments()
    if tables:
        angles = torch.rand(tables, 2, 1).expand(-1, -1, 2)
        given["rotary"] = (angles.cos(), angles.sin())
    right, before = formula(given), given["k_cache"].clone()
    version = given["k_cache"]._version
    if by_columns:
        given["weights"] = DecoderWeights(
            *(x.t().contiguous() if x.dim() == 2 else x for x in given["weights"])
        )
    y = decoder_layer(**given, by_columns=by_columns)
    torch.testing.assert_close(y.double(), right, rtol=1e-4, atol=1e-5)
    assert given["k_cache"]._version > version
    changed = (given["k_cache"] != before).any(-1).any(1)
    rows = torch.arange(ROOM) - given["cache_lens"][:, None]
    assert torch.equal(changed, (rows >= 0) & (rows < 2))


def replaced(given: dict[str, Any], name: str, change: Any) -> dict[str, Any]:
    weights = given["weights"]
    return {"weights": weights._replace(**{name: change(getattr(weights, name))})}


WRONG: dict[str, Any] = {
    "x of two dimensions": lambda g: {"x": g["x"][0]},
    "a full cache": lambda g: {"cache_lens": torch.tensor([8, 0])},
    "a negative length": lambda g: {"cache_lens": torch.tensor([-1, 0])},
    "lengths of another batch": lambda g: {"cache_lens": torch.tensor([1, 2, 3])},
    "a cache of another batch": lambda g: {
        "k_cache": g["k_cache"][:1], "v_cache": g["v_cache"][:1]},
    "a cache of other heads": lambda g: {
        "k_cache": g["k_cache"][:, :1], "v_cache": g["v_cache"][:, :1]},
    "a value cache of other columns": lambda g: {"v_cache": torch.randn(2, HK, ROOM, D + 1)},
    "a cache that overlaps": lambda g: {"k_cache": g["k_cache"][:, :, :1].expand(2, HK, ROOM, D)},
    "a cache of another dtype": lambda g: {"k_cache": g["k_cache"].bfloat16()},
    "no heads": lambda g: {"heads": 0},
    "other heads": lambda g: {"heads": 8},
    "half a rotation": lambda g: {"rotary": (torch.ones(2, 2, 2), None)},
    "a rotation of other rows": lambda g: {"rotary": (torch.ones(2, 3, 2),) * 2},
    "an odd rotation": lambda g: {"rotary": (torch.ones(2, 2, 3),) * 2},
    "a rotation of too many dims": lambda g: {"rotary": (torch.ones(2, 2, 4),) * 2},
    "a mask of numbers": lambda g: {"mask": torch.ones(2, ROOM)},
    "a short mask": lambda g: {"mask": torch.ones(2, ROOM - 1, dtype=torch.bool)},
    **{
        f"{name} with a row more": lambda g, name=name: replaced(
            g, name, lambda w: torch.cat([w, w[:1]]))
        for name in DecoderWeights._fields
    },
    **{
        f"{name} in another dtype": lambda g, name=name: replaced(g, name, Tensor.double)
        for name in ("wq", "wk", "wv", "wo", "w1", "w2", "w_gate")
    },
    "lengths without memory": lambda g: {"cache_lens": g["cache_lens"].to("meta")},
    "a weight without memory": lambda g: replaced(g, "w2", lambda w: w.to("meta")),
    "k without v": lambda g: {"weights": g["weights"]._replace(wv=None)},
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_call_writes_nothing(what: str) -> None:
    given = arguments()
    given |= WRONG[what](given)
    before = [given[name].clone() for name in ("k_cache", "v_cache")]
    with pytest.raises(RuntimeError):
        decoder_layer(**given)
    for name, cache in zip(("k_cache", "v_cache"), before, strict=True):
        assert torch.equal(given[name], cache)


def test_nothing_to_do() -> None:
    given = arguments()
    given["x"] = given["x"][:, :0]
    assert decoder_layer(**given).shape == (2, 0, E)


def test_torch_checks_the_op() -> None:
    """Schema, fake tensors: what torch.library.opcheck looks at."""
    given = arguments()
    options = (None, None, None, *given["weights"], H, 0.5, 1, 1e-5, 1e-6, 4, False)
    tensors = (given["x"], given["k_cache"], given["v_cache"], given["cache_lens"])
    with torch.no_grad():
        torch.library.opcheck(
            torch.ops.fastattn.decoder_layer.default, (*tensors, *options),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip
