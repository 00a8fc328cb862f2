"""`fastattn.swap` on Hugging Face models: parts of a model, `unswap`, what is left alone."""

import copy
import os
import pathlib

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import transformers
from swap_tools import Calls, calls, judge_model  # noqa: F401
from transformers_models import LAYERS, TEXT, E, H, S, V, build, forward, tokens

from fastattn.swap import _transformers as hf
from fastattn.swap import swap, unswap

pytestmark = pytest.mark.filterwarnings("ignore::fastattn.backends.PerformanceWarning")


@pytest.mark.parametrize("former", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["bert", "llama", "mistral", "t5"])
def test_part_of_a_model(name: str, former: str, calls: Calls) -> None:  # noqa: F811
    stock = build(name)
    stock.set_attn_implementation(former)
    fused = copy.deepcopy(stock)
    skip = "encoder.*" if name == "t5" else "*.layers.0" if name != "bert" else "*.layer.0"
    report = swap(fused, skip=skip)
    expected = 4 if name == "t5" else 1
    assert report.count("attention") == expected
    left = [s.why for s in report.skipped if s.kind == "attention"]
    assert left == ["excluded by skip"] * (TEXT[name][1] - expected)
    call = forward(name, tokens())
    got = call(fused, torch.float32)["logits"]
    assert len(calls) == expected
    right = call(stock, torch.float32)["logits"]
    seen = slice(None) if name == "t5" else tokens()["attention_mask"].bool()
    torch.testing.assert_close(got[seen], right[seen], rtol=1e-3, atol=1e-4)
    # The rest later, then all of it back.
    assert swap(fused).count("attention") == TEXT[name][1] - expected
    calls.clear()
    call(fused, torch.float32)
    assert len(calls) == TEXT[name][1]
    assert unswap(fused)
    assert torch.equal(call(fused, torch.float32)["logits"], right)


@pytest.mark.filterwarnings("ignore:Model config")
def test_one_tower_of_a_composite_model(calls: Calls) -> None:  # noqa: F811
    sizes = {
        "hidden_size": E,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": H,
    }
    config = transformers.CLIPConfig(
        text_config={**sizes, "vocab_size": V, "bos_token_id": 1, "eos_token_id": 2},
        vision_config={**sizes, "image_size": 16, "patch_size": 4},
        projection_dim=16,
    )
    stock = transformers.CLIPModel(config).eval()
    inputs = {**tokens(), "pixel_values": torch.randn(2, 3, 16, 16)}
    right = stock(**inputs).logits_per_image
    for only, count in (("vision_model", 1), ("text_model.*", 1), (None, 2)):
        fused = copy.deepcopy(stock)
        calls.clear()
        assert swap(fused, only=only).count("attention") == count
        torch.testing.assert_close(fused(**inputs).logits_per_image, right, rtol=1e-4, atol=1e-5)
        assert len(calls) == count
        assert unswap(fused)
        assert torch.equal(fused(**inputs).logits_per_image, right)


def test_config_that_asks_for_weights_is_noted(tmp_path: pathlib.Path) -> None:
    model = build("bert")
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    assert any("unswap before save_pretrained" in note for note in swap(model).notes)
    assert len(model(**tokens()).attentions) == LAYERS
    unswap(model)
    model.save_pretrained(tmp_path)


def test_part_of_a_model_on_something_else_is_refused() -> None:
    model = build("bert")
    model.config._attn_implementation_internal = "flex_attention"
    with pytest.warns(UserWarning, match="replaced no attention in BertForMaskedLM"):
        report = swap(model, skip="*.layer.0")
    assert "'flex_attention', whose masks differ" in str(report)
    assert model.config._attn_implementation == "flex_attention"
    assert swap(model).count("attention") == 2


@pytest.mark.parametrize("name", TEXT)
def test_unswap_is_exact(name: str) -> None:
    model = build(name)
    call = forward(name, tokens())
    right = call(model, torch.float32)["logits"]
    before = {n: dict(m.__dict__) for n, m in model.named_modules()}
    implementations = {
        n: m.config._attn_implementation for n, m in model.named_modules() if hasattr(m, "config")
    }
    config = model.config.to_dict()
    assert swap(model, backend="reference").count("attention") == TEXT[name][1]
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == "fastattn_reference"
    assert unswap(model)
    assert {n: dict(m.__dict__) for n, m in model.named_modules()} == before
    for n, m in model.named_modules():
        assert not hasattr(m, "config") or m.config._attn_implementation == implementations[n]
    assert torch.equal(call(model, torch.float32)["logits"], right)


def test_swapping_twice_and_other_backends() -> None:
    model = build("bert")
    before = len(swap(model))
    report = swap(model)
    assert (len(report), report.fused_before) == (0, before)
    assert swap(model, backend="cuda").count("attention") == 2
    with pytest.raises(ValueError, match="backend='cuda' cannot serve this call"):
        model(**tokens())
    assert swap(model).count("attention") == 2
    model(**tokens())
    unswap(model)
    assert model.config._attn_implementation == "sdpa"


def test_layers_taken_out_of_their_model(calls: Calls) -> None:  # noqa: F811
    stock = build("bert").bert.encoder
    fused = copy.deepcopy(stock)
    assert swap(fused).count("attention") == 2
    x = torch.randn(2, S, E)
    torch.testing.assert_close(fused(x).last_hidden_state, stock(x).last_hidden_state)
    assert len(calls) == 2
    assert unswap(fused)
    assert torch.equal(fused(x).last_hidden_state, stock(x).last_hidden_state)


def test_model_without_the_interface_is_left_alone() -> None:
    config = transformers.FalconConfig(
        vocab_size=V, hidden_size=E, num_hidden_layers=LAYERS, num_attention_heads=H
    )
    model = transformers.FalconForCausalLM(config)
    with pytest.warns(UserWarning, match="replaced no attention in FalconForCausalLM"):
        report = swap(model)
    left = [s for s in report.skipped if s.kind == "attention"]
    assert [s.cls for s in left] == ["FalconAttention"] * LAYERS
    assert all("does not use transformers' AttentionInterface" in s.why for s in left)
    assert model.config._attn_implementation != "fastattn"


def test_model_that_knows_sdpa_by_name_is_left_alone() -> None:
    """DeepSeek V3.2 puts its sparse pattern into the mask only for eager and sdpa."""
    model = transformers.DeepseekV32Model.__new__(transformers.DeepseekV32Model)
    assert "tells 'sdpa' from other implementations by name" in str(hf._why_not(model))
