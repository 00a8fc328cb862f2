"""The encoder layer as one op: what it computes, and when it may run."""

import copy
import os
from collections.abc import Callable
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from tools import DTYPES, assert_within, one_thread
from torch import Tensor, nn
from transformers_models import E, H, S, build, forward, swapped, tokens

import fastattn
from fastattn.backends import cpu_isas, force_cpu_isa
from fastattn.nn import transformer as layers_module
from fastattn.ops import encoder_layer as op_module
from fastattn.swap import _inference, swap


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every call of the one op."""
    record: list[Any] = []
    original = op_module.encoder_layer

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        record.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(_inference, "encoder_layer", spy)
    monkeypatch.setattr(layers_module, "encoder_layer", spy)
    return record


def layer_and_x(**kwargs: Any) -> tuple[nn.TransformerEncoderLayer, Tensor]:
    layer = nn.TransformerEncoderLayer(E, H, 48, batch_first=True, **kwargs).eval()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return layer, torch.randn(3, S, E)


@pytest.mark.parametrize("isa", cpu_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_first", [False, True])
def test_torch_layer(norm_first: bool, dtype: torch.dtype, isa: str, calls: list[Any]) -> None:
    layer, x = layer_and_x(norm_first=norm_first, activation="gelu")
    padding = torch.arange(S) >= torch.tensor([[S], [5], [9]])
    fused = swapped(layer).to(dtype)
    real = ~padding
    with torch.no_grad(), one_thread(), force_cpu_isa(isa):
        for mask in (None, padding):
            got = fused(x.to(dtype), src_key_padding_mask=mask)
            plain = copy.deepcopy(layer).to(dtype)(x.to(dtype), src_key_padding_mask=mask)
            right = copy.deepcopy(layer).double()(x.to(dtype).double(), src_key_padding_mask=mask)
            assert_within("y", got[real], right[real], [plain[real]])
    assert len(calls) == 2


@pytest.mark.parametrize("options", [{"bias": False}, {"activation": nn.SiLU()}, {"dropout": 0.0}])
def test_other_layers(options: dict[str, Any], calls: list[Any]) -> None:
    layer, x = layer_and_x(**options)
    fused = fastattn.nn.TransformerEncoderLayer(E, H, 48, batch_first=True, **options).eval()
    fused.load_state_dict(layer.state_dict())
    if "dropout" in options:  # in training mode too, where nothing drops
        fused.train()
    with torch.no_grad():
        torch.testing.assert_close(fused(x), layer(x), rtol=1e-4, atol=1e-5)
    assert len(calls) == 1


def test_torch_layer_in_training_mode_drops(calls: list[Any]) -> None:
    layer, x = layer_and_x()
    fused = swapped(layer).train()
    with torch.no_grad():
        assert not torch.equal(fused(x), fused(x))
        assert not calls
        fused(x, is_causal=False)
        fused.eval()
        mask = nn.Transformer.generate_square_subsequent_mask(S)
        right = layer(x, src_mask=mask, is_causal=True)
        torch.testing.assert_close(fused(x, src_mask=mask, is_causal=True), right)
    assert not calls


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 16), (1, 17), (3, 16), (5, 27), (1, 144), (4, 130), (0, 5), (2, 0)]
)
def test_shapes_and_strides(shape: tuple[int, int], calls: list[Any]) -> None:
    layer, _ = layer_and_x()
    fused = swapped(layer)
    x = torch.randn(shape[1], shape[0], E).transpose(0, 1)
    with torch.no_grad():
        got = fused(x)
        assert got.shape == x.shape
        if x.numel():
            torch.testing.assert_close(got, layer(x), rtol=1e-4, atol=1e-5)
    assert len(calls) == 1


@pytest.mark.parametrize("tokens_of", [16, 100, 300])
def test_bitwise_the_same_for_every_thread_count(tokens_of: int, calls: list[Any]) -> None:
    layer, _ = layer_and_x()
    fused = swapped(layer)
    x = torch.randn(1, tokens_of, E)
    found = []
    with torch.no_grad():
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(fused(x))
    assert len(calls) == 3
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padded", [True, False])
def test_transformers_models(name: str, dtype: torch.dtype, padded: bool, calls: list[Any]) -> None:
    stock = build(name)
    inputs = tokens()
    if not padded:
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    call = forward(name, inputs)
    with torch.no_grad():
        got = call(swapped(stock).to(dtype), dtype)["logits"]
        plain = call(copy.deepcopy(stock).to(dtype), dtype)["logits"]
        right = call(copy.deepcopy(stock).double(), torch.float64)["logits"]
    assert len(calls) == 2
    assert_within("logits", got, right, [plain])


# What makes a layer run in parts; each takes the model, and returns what runs it.
def _with_grad(model: Any, run: Callable[[], Tensor]) -> Tensor:
    with torch.enable_grad():
        return run()


def _hook_on_attention(model: Any, run: Callable[[], Tensor]) -> Tensor:
    seen: list[int] = []
    for module in model.modules():
        if type(module).__name__ in ("BertSelfAttention", "DistilBertSelfAttention"):
            module.register_forward_hook(lambda *_: seen.append(1))
    result = run()
    assert len(seen) == 2
    return result


def _hook_on_query(model: Any, run: Callable[[], Tensor]) -> Tensor:
    seen: list[int] = []
    for name, module in model.named_modules():
        if name.endswith(("query", "q_lin")):
            module.register_forward_pre_hook(lambda *_: seen.append(1))
    result = run()
    assert len(seen) == 2
    return result


def _other_attention(model: Any, run: Callable[[], Tensor]) -> Tensor:
    model.set_attn_implementation("sdpa")
    return run()


def _dropout(model: Any, run: Callable[[], Tensor]) -> Tensor:
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and ("attention" in name or "ffn" in name):
            module.train()
    return run()


def _autocast(model: Any, run: Callable[[], Tensor]) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return run()


def _adapter(model: Any, run: Callable[[], Tensor]) -> Tensor:
    class Adapted(nn.Linear):
        pass

    for name, module in model.named_modules():
        if name.endswith(("value", "v_lin")):
            module.__class__ = Adapted
    return run()


def _hook_of_all(model: Any, run: Callable[[], Tensor]) -> Tensor:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        return run()
    finally:
        handle.remove()


PREVENTED = (
    _with_grad, _hook_on_attention, _hook_on_query, _other_attention, _dropout, _autocast, _adapter,
    _hook_of_all,
)  # fmt: skip


@pytest.mark.parametrize("what", PREVENTED)
@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_what_wants_the_parts_gets_them(
    name: str, what: Callable[..., Tensor], calls: list[Any]
) -> None:
    stock = build(name)
    model = swapped(stock)
    inputs = tokens()
    with torch.no_grad():
        got = what(model, lambda: model(**inputs).logits)
        right = stock(**inputs).logits
    assert not calls
    if what not in (_dropout, _autocast):
        torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_weights_and_hidden_states_can_be_asked_for(name: str, calls: list[Any]) -> None:
    stock = build(name)
    stock.set_attn_implementation("eager")
    model = swapped(stock)
    with torch.no_grad():
        model(**tokens())
        assert len(calls) == 2
        inputs = tokens()
        got = model(**inputs, output_attentions=True, output_hidden_states=True)
        right = stock(**inputs, output_attentions=True, output_hidden_states=True)
    real = inputs["attention_mask"].bool()
    assert len(got.hidden_states) == len(right.hidden_states) == 3
    for a, b in zip(got.hidden_states, right.hidden_states, strict=True):
        torch.testing.assert_close(a[real], b[real], rtol=1e-3, atol=1e-4)
    assert [a.shape for a in got.attentions] == [a.shape for a in right.attentions]
    assert len(calls) == 2
    with torch.no_grad():  # the hooks that this has left in the model are idle again
        model(**tokens())
    assert len(calls) == 4


def test_parts_left_out_of_a_swap(calls: list[Any]) -> None:
    for skip in ("*.attention.self", "*.attention.output", "*.0.intermediate"):
        calls.clear()
        stock = build("bert")
        model = copy.deepcopy(stock)
        swap(model, skip=skip)
        inputs = tokens()
        with torch.no_grad():
            got, right = model(**inputs).logits, stock(**inputs).logits
        torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-4)
        assert len(calls) == (1 if "0" in skip else 0)


def test_a_decoder_keeps_its_causal_mask_and_cache(calls: list[Any]) -> None:
    import transformers
    from transformers_models import ENCODER

    config = transformers.BertConfig(**ENCODER, is_decoder=True, bos_token_id=1, eos_token_id=None)
    stock = transformers.BertLMHeadModel(config).eval()
    model = swapped(stock)
    ids = torch.randint(2, 61, (2, 5))
    got = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(got, stock.generate(ids, max_new_tokens=5, do_sample=False))
    assert not calls


@pytest.mark.parametrize("shape", [(3, S + 1), (1, S), (3, 1), (S,), (S, 3)])
def test_padding_of_another_shape_is_refused(shape: tuple[int, ...], calls: list[Any]) -> None:
    layer, x = layer_and_x()
    swap(layer)
    with torch.no_grad(), pytest.raises(ValueError, match="key_padding_mask must be"):
        layer(x, src_key_padding_mask=torch.zeros(shape, dtype=torch.bool))
    assert not calls


def test_a_compiled_layer_runs_in_parts(calls: list[Any]) -> None:
    fused = swapped(layer_and_x()[0])
    x = torch.randn(3, S, E)
    with torch.no_grad():
        compiled = torch.compile(fused, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), fused(x), rtol=1e-4, atol=1e-5)
    assert len(calls) == 1
