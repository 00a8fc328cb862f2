"""`model.generate` of swapped Hugging Face models: the cache grows in place, the tokens stay."""

import copy
import itertools
import os
import pickle
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import torch._dynamo.testing
import transformers
from swap_tools import Calls, calls, in_parts  # noqa: F401
from torch import Tensor
from transformers_models import LAYERS, SEQ2SEQ, TEXT, V, build, swapped, tokens

from fastattn.swap import _growing, kv_cache, swap, unswap
from fastattn.swap._growing import GrowingLayer

pytestmark = pytest.mark.filterwarnings("ignore::fastattn.backends.PerformanceWarning")

FUSED = ("gpt2", "llama")  # one op appends and attends
GENERATING = ("gpt2", "llama", "mistral", "t5", "bart")
CACHED = "attention_with_kv_cache"


@pytest.fixture(autouse=True)
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short texts outgrow it."""
    monkeypatch.setattr(_growing, "_ROOM", 3)


def inputs_of(name: str, kind: str) -> dict[str, Tensor]:
    """One prompt, of a token or many, or a padded batch."""
    if kind == "padded":
        return tokens("right" if name in SEQ2SEQ else "left")
    return {"input_ids": torch.randint(2, V, (1, int(kind)))}


def both(stock: Any, fused: Any, inputs: dict[str, Tensor], **options: Any) -> tuple[Any, Any]:
    options = {"max_new_tokens": 24, "do_sample": False, "disable_compile": True, **options}
    return tuple(
        m.generate(**inputs, return_dict_in_generate=True, **copy.deepcopy(options))
        for m in (fused, stock)
    )


@pytest.mark.parametrize("kind", ["1", "13", "padded"])
@pytest.mark.parametrize("name", GENERATING)
def test_greedy(name: str, kind: str, calls: Calls) -> None:  # noqa: F811
    greedy(name, kind, calls)


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("kind", ["13", "padded"])
@pytest.mark.parametrize("name", FUSED)
def test_greedy_in_parts(name: str, kind: str, calls: Calls) -> None:  # noqa: F811
    """As where a hook or another part forbids the one op of a layer."""
    greedy(name, kind, calls)


def greedy(name: str, kind: str, calls: Calls) -> None:  # noqa: F811
    stock = build(name)
    fused = swapped(stock)
    got, right = both(stock, fused, inputs_of(name, kind), output_logits=True)
    assert torch.equal(got.sequences, right.sequences)
    for step, right_step in zip(got.logits, right.logits, strict=True):
        torch.testing.assert_close(step, right_step, rtol=1e-3, atol=1e-3)
    ops = calls.ops()
    assert ops.count(CACHED) == (23 * LAYERS if name in FUSED else 0)
    cache = got.past_key_values
    cache = cache.self_attention_cache if name in SEQ2SEQ else cache
    assert type(cache) is transformers.DynamicCache
    kinds = {type(layer) for layer in cache.layers}
    sliding = transformers.cache_utils.DynamicSlidingWindowLayer
    assert kinds == ({sliding} if name == "mistral" else {GrowingLayer})
    for layer, right_layer in zip(right_layers(got), right_layers(right), strict=True):
        assert layer.get_seq_length() == right_layer.get_seq_length()
        torch.testing.assert_close(layer.keys, right_layer.keys, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(layer.values, right_layer.values, rtol=1e-3, atol=1e-3)


def right_layers(output: Any) -> list[Any]:
    cache = output.past_key_values
    return list(getattr(cache, "self_attention_cache", cache).layers)


@pytest.mark.parametrize("name", GENERATING)
def test_beam_search(name: str) -> None:
    stock = build(name)
    got, right = both(stock, swapped(stock), inputs_of(name, "padded"), num_beams=3)
    assert torch.equal(got.sequences, right.sequences)
    torch.testing.assert_close(got.sequences_scores, right.sequences_scores, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", FUSED)
def test_sampling_several_texts(name: str) -> None:
    stock = build(name)
    fused = swapped(stock)
    inputs = inputs_of(name, "5")
    results = []
    for model in (fused, stock):
        torch.manual_seed(3)
        results.append(
            model.generate(**inputs, do_sample=True, num_return_sequences=3, max_new_tokens=12)
        )
    assert torch.equal(*results)


@pytest.mark.parametrize("by", ["assistant", "lookup"])
@pytest.mark.parametrize("name", FUSED)
def test_speculative_decoding(name: str, by: str, calls: Calls) -> None:  # noqa: F811
    """Several rows at once, and tokens that are taken back."""
    stock = build(name)
    fused = swapped(stock)
    inputs = {"input_ids": torch.tensor([[5, 9, 7, 5, 9, 7, 5, 9]])}
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    if by == "assistant":
        options = {"assistant_model": swapped(build(name))}
        options["assistant_model"].generation_config.num_assistant_tokens = 3
    got = fused.generate(**inputs, max_new_tokens=20, do_sample=False, **options)
    right = stock.generate(**inputs, max_new_tokens=20, do_sample=False)
    assert torch.equal(got, right)
    assert any(call["op"] == CACHED and call["q"].shape[2] > 1 for call in calls)


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("kind", ["dynamic", "static", "growing"])
def test_caches_that_a_user_passes(name: str, kind: str, calls: Calls) -> None:  # noqa: F811
    """They are used as they are; a static one is read by the op as far as it is filled."""
    stock = build(name)
    fused = swapped(stock)

    def cache_for(model: Any) -> Any:
        if kind == "static":
            return transformers.StaticCache(config=model.config, max_cache_len=40)
        if kind == "growing":
            return kv_cache(model, max_length=40)
        return transformers.DynamicCache(config=model.config)

    inputs, results = tokens("left"), []
    for model in (fused, stock):
        past = cache_for(model)
        layer = type(past.layers[0])
        results.append(
            model.generate(**inputs, past_key_values=past, max_new_tokens=6, disable_compile=True)
        )
        assert type(past.layers[0]) is layer
    assert torch.equal(*results)
    assert calls.ops().count(CACHED) == (0 if kind == "dynamic" else 5 * LAYERS)


@pytest.mark.parametrize("name", FUSED)
def test_a_chat_goes_on(name: str) -> None:
    """The next turn is read behind the last one's cache: several rows, and what came before."""
    stock = build(name)
    fused = swapped(stock)
    ids = torch.randint(2, V, (2, 9))
    more = torch.randint(2, V, (2, 20))
    results = []
    for model in (fused, stock):
        first = model.generate(ids, max_new_tokens=5, return_dict_in_generate=True)
        results.append(
            model.generate(
                torch.cat([first.sequences, more], 1), max_new_tokens=5,
                past_key_values=first.past_key_values,
            )
        )  # fmt: skip
    assert torch.equal(*results)


COMPILED = [
    ("gpt2", "static"),
    ("llama", "growing"),
    pytest.param("gpt2", "growing", marks=pytest.mark.full),
    pytest.param("llama", "static", marks=pytest.mark.full),
]


@pytest.mark.parametrize(("name", "kind"), COMPILED)
def test_compiled(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward of a step in one graph; a cache that grows costs the second that transformers'
    own costs (its length becomes a symbol), and two more where it has outgrown its memory."""
    monkeypatch.setattr(_growing, "_ROOM", 256)
    torch._dynamo.reset()
    stock = build(name)
    fused = swapped(stock)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(fused.forward, backend=counter, fullgraph=True)
    ids = torch.randint(2, V, (2, 7))
    past = kv_cache(fused, 40)
    if kind == "static":
        past = transformers.StaticCache(config=fused.config, max_cache_len=40)
    with torch.no_grad():
        right = stock.generate(ids, max_new_tokens=5, do_sample=False)
        new = fused(ids, past_key_values=past).logits[:, -1:].argmax(-1)
        text = [ids, new]
        for _ in range(4):
            new = step(new, past_key_values=past).logits[:, -1:].argmax(-1)
            text.append(new)
    assert torch.equal(torch.cat(text, 1), right)
    assert counter.frame_count == (1 if kind == "static" else 2)


# ----------------------------------------------------------------------------- the growing layer


def pair() -> tuple[Any, Any]:
    """Ours and transformers' own, with the same four rows."""
    layers = GrowingLayer(), transformers.cache_utils.DynamicLayer()
    k, v = torch.randn(3, 2, 4, 8), torch.randn(3, 2, 4, 6)
    for layer in layers:
        layer.update(k, v)
    return layers


def alike(ours: Any, stock: Any) -> None:
    """Also after the next two rows."""
    for _ in range(3):
        assert ours.get_seq_length() == stock.get_seq_length()
        if not ours.is_initialized:
            assert not stock.is_initialized
        else:
            assert torch.equal(ours.keys, stock.keys)
            assert torch.equal(ours.values, stock.values)
        batch = stock.keys.shape[0] if stock.is_initialized else 3
        k, v = torch.randn(batch, 2, 1, 8), torch.randn(batch, 2, 1, 6)
        for x, y in zip(ours.update(k, v), stock.update(k, v), strict=True):
            assert torch.equal(x, y)


CHANGES: dict[str, Any] = {
    "nothing": lambda c: None,
    "crop": lambda c: c.crop(-2),
    "crop all": lambda c: c.crop(-4),
    "crop none": lambda c: c.crop(0),
    "reset": lambda c: c.reset(),
    "reorder": lambda c: c.reorder_cache(torch.tensor([2, 2, 0])),
    "more beams": lambda c: c.reorder_cache(torch.tensor([2, 2, 0, 1, 1])),
    "repeat": lambda c: c.batch_repeat_interleave(2),
    "select": lambda c: c.batch_select_indices(torch.tensor([1, 2])),
    "assign": lambda c: (
        setattr(c, "keys", c.keys[:, :, :2].clone()),
        setattr(c, "values", c.values[:, :, :2].clone()),
    ),
    "double": lambda c: (setattr(c, "keys", c.keys * 2), setattr(c, "values", c.values * 2)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("gradients", [False, True])
def test_layer_does_what_transformers_does(change: str, gradients: bool) -> None:
    """In place, and by concatenation."""
    with torch.set_grad_enabled(gradients):
        ours, stock = pair()
        for layer in (ours, stock):
            CHANGES[change](layer)
        alike(ours, stock)


@torch.no_grad()
def test_layer_appends_in_place() -> None:
    """A row moves nothing while there is room; then half as much again is made."""
    ours, _ = pair()
    addresses = []
    for _ in range(40):
        ours.update(torch.randn(3, 2, 1, 8), torch.randn(3, 2, 1, 6))
        addresses.append(ours.keys.data_ptr())
    moved = sum(a != b for a, b in itertools.pairwise(addresses))
    assert moved <= 6


@torch.no_grad()
def test_layer_takes_no_more_than_the_limit() -> None:
    layer = GrowingLayer(limit=6)
    layer.update(torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8))
    assert layer._k.shape[2] == 6
    layer.update(torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8))  # no error: more than was said
    assert layer.get_seq_length() == 8


def test_layer_refuses_what_transformers_refuses() -> None:
    for layer in pair():
        with pytest.raises(RuntimeError):
            layer.update(torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 6))  # batch 3 is there
        with pytest.raises(ValueError, match="not supported"):
            layer.crop(2)


def test_copies_are_independent() -> None:
    """A prompt's cache, kept for several continuations."""
    with torch.no_grad():
        ours, stock = pair()
        for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            alike(again, copy.deepcopy(stock))
        alike(ours, stock)


def test_memory_of_inference_mode_is_replaced_outside_of_it() -> None:
    with torch.inference_mode():
        ours, stock = pair()
    with torch.no_grad():
        alike(ours, stock)


@pytest.mark.parametrize("name", FUSED)
def test_gradients_through_a_cache(name: str) -> None:
    """With gradients rows are concatenated, as transformers does it."""
    stock = build(name)
    fused = swapped(stock)
    ids = tokens()["input_ids"]
    for model in (stock, fused):
        past = kv_cache(model) if model is fused else transformers.DynamicCache(config=model.config)
        model(ids[:, :7], past_key_values=past)
        model(ids[:, 7:], past_key_values=past).logits.square().mean().backward()
    for p, q in zip(stock.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-2, atol=1e-3 * float(p.grad.abs().max()))


# -------------------------------------------------------------------------------------- the swap


@pytest.mark.parametrize("name", GENERATING)
def test_report_and_unswap(name: str) -> None:
    model = build(name)
    cls = type(model)
    report = swap(model)
    assert report.count("cache") == 1 + (LAYERS if name in FUSED else 0)
    assert report.count("attention") == TEXT[name][1]
    assert "a cache that grows in place" in str(report)
    assert isinstance(model, cls)
    assert type(model).__name__ == cls.__name__
    assert not swap(model)
    assert unswap(model)
    assert type(model) is cls


def test_left_out() -> None:
    """What `skip` names keeps transformers' own cache and attention."""
    model = build("llama")
    report = swap(model, skip=["*.self_attn", transformers.LlamaForCausalLM])
    assert report.count("cache") == report.count("attention") == 0


def test_other_attention_after_the_swap(calls: Calls) -> None:  # noqa: F811
    """A user who sets transformers' own attention gets it, in the steps too."""
    stock = build("llama")
    fused = swapped(stock)
    fused.set_attn_implementation("eager")
    stock.set_attn_implementation("eager")
    got, right = both(stock, fused, tokens("left"))
    assert torch.equal(got.sequences, right.sequences)
    assert not calls


@pytest.mark.parametrize("name", FUSED)
def test_attentions_of_a_step(name: str) -> None:
    stock = build(name)
    stock.set_attn_implementation("eager")
    fused = swapped(stock)
    got, right = both(stock, fused, tokens("left"), output_attentions=True, max_new_tokens=4)
    assert torch.equal(got.sequences, right.sequences)
    for step, right_step in zip(got.attentions[1:], right.attentions[1:], strict=True):
        for weights, right_weights in zip(step, right_step, strict=True):
            torch.testing.assert_close(weights, right_weights, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", FUSED)
def test_hooks_and_adapters_on_the_projections_count(name: str) -> None:
    fused = swapped(build(name))
    before = fused.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=10, do_sample=False)
    seen = []
    last = "c_proj" if name == "gpt2" else "o_proj"
    for module_name, module in fused.named_modules():
        if module_name.endswith(f"attn.{last}"):
            module.register_forward_hook(lambda m, x, y: (seen.append(1), -y)[1])
    after = fused.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=10, do_sample=False)
    assert len(seen) == 10 * LAYERS
    assert not torch.equal(before, after)
