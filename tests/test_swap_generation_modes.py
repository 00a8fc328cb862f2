"""Generation of swapped models in what surrounds a model: autocast, a default device, modes that
replace tensors, gradients for a part of the weights."""

import contextlib
import copy
import os
from collections.abc import Iterator
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import transformers
from swap_tools import in_parts  # noqa: F401
from tools import assert_within
from torch import Tensor
from torch._subclasses import FakeTensorMode
from transformers_models import V, build, swapped

from fastattn.swap import _generation, kv_cache
from fastattn.swap._growing import GrowingLayer

pytestmark = pytest.mark.filterwarnings("ignore::fastattn.backends.PerformanceWarning")

MODELS = ("gpt2", "llama")


def text(model: Any, ids: Tensor, **options: Any) -> Any:
    options = {"max_new_tokens": 8, "do_sample": False, "disable_compile": True, **options}
    return model.generate(ids, **options)


def dynamic(model: Any) -> Any:
    return transformers.DynamicCache(config=model.config)


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)  # a device by name stays as a mode, in later tests too


# ---------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_autocast(name: str, dtype: torch.dtype) -> None:
    """Llama's rotation leaves keys in float32 and values in 16 bits."""
    stock = build(name)
    ids = torch.randint(2, V, (2, 9))

    def logits(model: Any, past: Any, enabled: bool) -> Tensor:
        found = []
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=enabled):
            for part in ids.split([6, 1, 2], 1):
                found.append(model(part, past_key_values=past).logits)
        return torch.cat(found, 1)

    fused, exact = swapped(stock), copy.deepcopy(stock).double()
    ours, *theirs = kv_cache(fused), dynamic(stock), dynamic(exact)
    got, plain = logits(fused, ours, True), logits(stock, theirs[0], True)
    assert_within("logits", got, logits(exact, theirs[1], False), [plain])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("name", MODELS)
def test_generate_under_autocast(name: str, options: dict[str, Any]) -> None:
    """What stock models refuse (a static cache, of Llama) these refuse in the same words."""
    stock = build(name)
    ids, results = torch.randint(2, V, (2, 5)), []
    for model in (swapped(stock), stock):
        try:
            with torch.autocast("cpu", torch.bfloat16):
                results.append(text(model, ids, min_new_tokens=8, **options).shape)
        except RuntimeError as refusal:
            results.append(str(refusal))
    assert results[0] == results[1]
    assert isinstance(results[0], str) == (name == "llama" and "cache_implementation" in options)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("inside", ["prompt", "steps"])
def test_autocast_for_a_part(inside: str, name: str) -> None:
    """The cache has the dtypes of what came before; rows of another are promoted, as torch.cat
    does it."""
    stock = build(name)
    fused = swapped(stock)
    ids = torch.randint(2, V, (1, 7))
    results = []
    for model in (fused, stock):
        past = kv_cache(model) if model is fused else dynamic(model)
        with torch.no_grad():
            with torch.autocast("cpu", torch.bfloat16, enabled=inside == "prompt"):
                model(ids[:, :5], past_key_values=past)
            with torch.autocast("cpu", torch.bfloat16, enabled=inside == "steps"):
                for i in (5, 6):
                    found = model(ids[:, i : i + 1], past_key_values=past).logits
        results.append(found)
        dtypes = [(x.keys.dtype, x.values.dtype) for x in past.layers]
        results.append(dtypes)
    assert results[1] == results[3]
    torch.testing.assert_close(results[0], results[2], rtol=0.05, atol=0.05)


def test_values_of_another_dtype_are_not_rounded_into_the_cache() -> None:
    ours, stock = GrowingLayer(), transformers.cache_utils.DynamicLayer()
    k, v = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
    for layer in (ours, stock):
        with torch.no_grad():
            layer.update(k, v.bfloat16())
            layer.update(k, v)
    assert ours.values.dtype == stock.values.dtype == torch.float32
    assert torch.equal(ours.values, stock.values)


# ------------------------------------------------------------------------- devices, fake tensors


def a_step(model: Any, past: Any, **more: Any) -> None:
    """With every tensor named its device, as a model on the CPU wants them."""

    def here(x: Any) -> Tensor:
        return torch.tensor(x, device="cpu")

    model(
        here([[5]]), past_key_values=past, position_ids=here([[3]]),
        attention_mask=here([[1, 1, 1, 1]]), **more,
    )  # fmt: skip


@pytest.mark.parametrize("where", [lambda: torch.device("meta"), lambda: default_device("meta")])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_under_another_default_device_leaves_nothing_behind(name: str, where: Any) -> None:
    stock = build(name)
    fused = swapped(stock)
    ids = torch.tensor([[3, 1, 4]])
    right = text(stock, ids)
    assert torch.equal(text(fused, ids), right)
    caches = kv_cache(fused), dynamic(stock)
    with torch.no_grad():
        for model, past in zip((fused, stock), caches, strict=True):
            model(ids, past_key_values=past)
            _generation._last_lengths = None
            with where():
                a_step(model, past)
    for ours, theirs in zip(*(c.layers for c in caches), strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-3, atol=1e-3)
    assert torch.equal(text(fused, ids), right)


@pytest.mark.parametrize("parts", [False, True])
def test_fake_tensors_are_not_kept(parts: bool, request: pytest.FixtureRequest) -> None:
    if parts:
        request.getfixturevalue("in_parts")
    fused = swapped(build("gpt2"))
    ids = torch.tensor([[3, 1, 4]])
    right = text(fused, ids)
    _generation._last_lengths = None
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        fake = copy.deepcopy(fused)
        past = kv_cache(fake)
        fake(mode.from_tensor(ids), past_key_values=past)
        fake(mode.from_tensor(ids[:, :1]), past_key_values=past)
    assert torch.equal(text(fused, ids), right)


def test_lengths_are_made_once_a_step() -> None:
    """Unless a mode or a transform of torch's looks on, whose tensors are its own."""
    cpu = torch.device("cpu")
    first = _generation.lengths(2, 7, cpu)
    assert first.tolist() == [7, 7]
    assert _generation.lengths(2, 7, cpu) is first
    with FakeTensorMode():
        assert _generation.lengths(2, 7, cpu) is not first
        _generation.lengths(2, 9, cpu)
    torch.func.vmap(lambda x: x + _generation.lengths(2, 9, cpu))(torch.zeros(3, 2))
    assert _generation.lengths(2, 7, cpu) is first
    assert _generation.lengths(2, 7, torch.device("meta")).is_meta


# --------------------------------------------------------------------------------------- gradients


PARTS = {"gpt2": ("c_attn", "ln_f", "wte"), "llama": ("q_proj", "v_proj", "o_proj", "norm")}


@pytest.mark.parametrize(
    ("name", "part"), [(name, part) for name in MODELS for part in PARTS[name]]
)
def test_gradients_for_a_part_of_the_weights(name: str, part: str) -> None:
    """Of q's projection alone: k and v want no gradient, but the backward keeps the keys."""
    stock = build(name)
    fused = swapped(stock)
    ids = torch.randint(2, V, (2, 4))
    gradients = []
    for model in (fused, stock):
        for n, p in model.named_parameters():
            p.requires_grad_(part in n)
        past = kv_cache(model) if model is fused else dynamic(model)
        outputs = [model(ids[:, i : i + 1], past_key_values=past).logits for i in range(4)]
        sum(y.square().mean() for y in outputs).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert gradients[0]
    for got, right in zip(*gradients, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-2, atol=1e-3 * float(right.abs().max()))


def test_what_a_backward_kept_is_not_written_without_gradients_either() -> None:
    """A branch tried under no_grad, and taken back."""
    layer = GrowingLayer()
    k, v = torch.randn(2, 1, 2, 3, 8)
    q = torch.randn(1, 2, 3, 8, requires_grad=True)
    keys, _ = layer.update(k, v)
    loss = (q @ keys.mT).square().sum()
    with torch.no_grad():
        layer.crop(-2)
        layer.update(k[:, :, :1], v[:, :, :1])
    loss.backward()
    torch.testing.assert_close(q.grad, 2 * (q @ k.mT @ k).detach())


def test_tensors_that_a_user_put_there_are_not_written() -> None:
    layer = GrowingLayer()
    k, v = torch.randn(2, 1, 2, 3, 8)
    before = k.clone(), v.clone()
    with torch.no_grad():
        layer.update(k[:, :, :1], v[:, :, :1])
        layer.keys, layer.values = k, v
        layer.crop(-2)
        layer.update(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8))
    assert torch.equal(k, before[0])
    assert torch.equal(v, before[1])
    assert layer.get_seq_length() == 2
    assert layer.keys[:, :, 1].eq(0).all()
