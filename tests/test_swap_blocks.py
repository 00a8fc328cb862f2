"""`fastattn.swap` beside attention: feed-forward blocks, residuals, norms and embeddings."""

import copy
import os
import pickle
from collections.abc import Callable
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import transformers
from swap_tools import judge_model
from tools import assert_within
from torch import Tensor, nn
from transformers_models import (
    DECODER,
    LAYERS,
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
)

import fastattn
from fastattn.nn import transformer as layers_module
from fastattn.swap import _blocks, _embeddings, _known, swap, unswap

pytestmark = pytest.mark.filterwarnings("ignore::fastattn.backends.PerformanceWarning")

# Family -> calls of layernorm_ffn, add_layer_norm, embedding, rms_norm in one forward.
CALLS = {
    "bert": (2, 2, 1, 0),
    "roberta": (2, 2, 1, 0),
    "distilbert": (2, 2, 1, 0),
    "gpt2": (2, 0, 0, 0),
    "llama": (2, 0, 0, 3),
    "t5": (4, 0, 0, 8),
    "t5_gated": (4, 0, 0, 8),
}
NAMES = ("layernorm_ffn", "add_layer_norm", "embedding", "rms_norm")


def t5_gated() -> Any:
    config = transformers.T5Config(
        vocab_size=V, d_model=E, d_kv=D, d_ff=48, num_layers=LAYERS, num_heads=H,
        feed_forward_proj="gated-gelu", pad_token_id=0, decoder_start_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).eval()


def model_of(name: str) -> Any:
    return t5_gated() if name == "t5_gated" else build(name)


def call_of(name: str, inputs: dict[str, Tensor] | None = None) -> Callable[..., Any]:
    return forward("t5" if name == "t5_gated" else name, inputs or tokens())


class Spy(dict[str, list[dict[str, Any]]]):
    """The arguments of every call of the four ops."""

    def counts(self) -> tuple[int, ...]:
        return tuple(len(self[name]) for name in NAMES)


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> Spy:
    record = Spy({name: [] for name in NAMES})

    def spy(module: Any, name: str) -> None:
        original = getattr(module, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            record[name].append({"args": args, **kwargs})
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, wrapper)

    for name in ("layernorm_ffn", "add_layer_norm", "rms_norm"):
        spy(_blocks, name)
    spy(_embeddings, "embedding")
    for name in ("layernorm_ffn", "add_layer_norm"):
        spy(layers_module, name)
    return record


@pytest.mark.parametrize("name", CALLS)
def test_blocks_run_fused_and_agree(name: str, ops: Spy) -> None:
    stock = model_of(name)
    fused = swapped(stock)
    call = call_of(name)
    call(fused, torch.float32)
    assert ops.counts() == CALLS[name]
    judge_model(stock, fused, call)


@pytest.mark.parametrize("name", CALLS)
def test_weights_are_shared_not_copied(name: str, ops: Spy) -> None:
    model = model_of(name)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    swap(model)
    call_of(name)(model, torch.float32)
    for call in ops["layernorm_ffn"]:
        _, w1, b1, w2, b2 = call["args"]
        weights = [w1, b1, w2, b2, call.get("w_gate"), call["norm_weight"]]
        assert all(w is None or w.untyped_storage().data_ptr() in own for w in weights)


def test_transposed_weights_of_gpt2_are_not_copied_by_the_op() -> None:
    """No op of torch sees a tensor as large as a weight but the GEMMs."""
    stock = build("gpt2")
    mlp = stock.transformer.h[0].mlp
    model = swapped(stock)
    with torch.no_grad(), torch.profiler.profile(record_shapes=True) as profile:
        call_of("gpt2")(model, torch.float32)
    shapes = {tuple(mlp.c_fc.weight.shape), tuple(mlp.c_fc.weight.t().shape)}
    copying = [
        e.name
        for e in profile.events()
        if e.name in ("aten::copy_", "aten::clone", "aten::contiguous")
        and shapes & {tuple(s) for s in e.input_shapes if s}
    ]
    assert not copying


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "llama", "t5_gated"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(name: str, dtype: torch.dtype, ops: Spy) -> None:
    stock = model_of(name)
    call = call_of(name)
    got = call(swapped(stock).to(dtype), dtype)["logits"]
    assert ops.counts() == CALLS[name]
    right = call(copy.deepcopy(stock).double(), torch.float64)["logits"]
    plain = call(copy.deepcopy(stock).to(dtype), dtype)["logits"]
    assert got.dtype == dtype
    assert_within("logits", got, right, [plain])


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_autocast_over_float32_weights(name: str, ops: Spy) -> None:
    stock = model_of(name)
    fused = swapped(stock)
    inner = call_of(name)

    def run(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        enabled = dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return {n: x.float() if enabled else x for n, x in inner(model, dtype).items()}

    got, plain = run(fused, torch.float32), run(stock, torch.float32)
    assert ops.counts()[0] == CALLS[name][0]
    right = inner(copy.deepcopy(stock).double(), torch.float64)
    assert_within("logits", got["logits"], right["logits"], [plain["logits"]])
    got["logits"].sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in fused.parameters()
               if p.requires_grad and p.numel() > V * E)  # fmt: skip


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_embeddings_with_everything_given(name: str, ops: Spy) -> None:
    stock = build(name)
    fused = swapped(stock)
    inputs = tokens()
    inputs["position_ids"] = torch.randint(2, 60, (3, S))
    if name != "distilbert":
        stock.base_model.embeddings.token_type_embeddings.weight.data.normal_()
        fused.base_model.embeddings.token_type_embeddings.weight.data.copy_(
            stock.base_model.embeddings.token_type_embeddings.weight
        )
        last = stock.config.type_vocab_size
        inputs["token_type_ids"] = torch.randint(0, last, (3, S))
    judge_model(stock, fused, forward(name, inputs))
    assert len(ops["embedding"]) == 1
    call = ops["embedding"][0]
    assert call["positions"] is inputs["position_ids"]
    # Vectors instead of ids are transformers' own business.
    x = torch.randn(3, S, E)
    del inputs["input_ids"]
    right = stock(inputs_embeds=x, **inputs).logits
    torch.testing.assert_close(fused(inputs_embeds=x, **inputs).logits, right)
    assert len(ops["embedding"]) == 1


# What a user may do to a part of a block; each makes the block run as transformers wrote it.
def _hook(linear: nn.Module, seen: list[str]) -> None:
    linear.register_forward_hook(lambda *_: seen.append("forward"))


def _backward_hook(linear: nn.Module, seen: list[str]) -> None:
    linear.register_full_backward_hook(lambda *_: seen.append("backward"))


def _own_forward(linear: nn.Module, seen: list[str]) -> None:
    former = linear.forward
    linear.forward = lambda x: (seen.append("own"), former(x))[1]  # type: ignore[method-assign]


PARTS = {
    "bert": "bert.encoder.layer.1.intermediate.dense",
    "distilbert": "distilbert.transformer.layer.1.ffn.lin2",
    "gpt2": "transformer.h.1.mlp.c_fc",
    "llama": "model.layers.1.mlp.up_proj",
    "t5": "decoder.block.1.layer.2.DenseReluDense.wo",
}


@pytest.mark.parametrize("what", [_hook, _backward_hook, _own_forward])
@pytest.mark.parametrize("name", PARTS)
def test_a_part_with_hooks_runs(name: str, what: Callable[..., None], ops: Spy) -> None:
    model = model_of(name)
    call = call_of(name)
    right = call(model, torch.float32)["logits"]
    swap(model)
    seen: list[str] = []
    what(model.get_submodule(PARTS[name]), seen)
    got = call(model, torch.float32)["logits"]
    got.sum().backward()
    assert len(seen) == 1
    assert ops.counts()[0] == CALLS[name][0] - 1
    torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-4)


class Adapted(nn.Linear):
    """As LoRA adds to a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_a_replaced_part_runs(name: str, ops: Spy) -> None:
    stock = model_of(name)
    fused = swapped(stock)
    for model in (stock, fused):
        model.get_submodule(PARTS[name]).__class__ = Adapted
    call = call_of(name)
    right = call(stock, torch.float32)["logits"]
    torch.testing.assert_close(call(fused, torch.float32)["logits"], right, rtol=1e-3, atol=1e-4)
    assert ops.counts()[0] == CALLS[name][0] - 1
    # What is odd at the time of the swap is left alone, with the reason.
    report = swap(copy.deepcopy(stock))
    part = PARTS[name].split(".")[-1]
    reasons = [s.why for s in report.skipped if s.kind == "feed-forward"]
    assert len(reasons) == 1
    assert part in reasons[0]


def test_a_hook_of_all_modules(ops: Spy) -> None:
    model = swapped(build("bert"))
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.append(type(module).__name__)
    )
    try:
        call_of("bert")(model, torch.float32)
    finally:
        handle.remove()
    assert seen.count("BertIntermediate") == LAYERS
    assert ops.counts() == (0, 0, 0, 0)
    call_of("bert")(model, torch.float32)
    assert ops.counts() == CALLS["bert"]


def test_an_activation_without_a_name_is_left_alone(ops: Spy) -> None:
    config = transformers.BertConfig(vocab_size=V, hidden_size=E, num_hidden_layers=1,
                                     num_attention_heads=H, intermediate_size=48,
                                     hidden_act="quick_gelu")  # fmt: skip
    model = transformers.BertModel(config).eval()
    report = swap(model)
    assert report.count("feed-forward") == 0
    assert report.count("residual + norm") == 1
    assert any("intermediate_act_fn" in s.why for s in report.skipped)
    model(**tokens())
    assert ops.counts() == (0, 1, 1, 0)


def test_chunked_feed_forward(ops: Spy) -> None:
    stock = build("bert")
    for layer in stock.bert.encoder.layer:
        layer.chunk_size_feed_forward = 4
    fused = swapped(stock)
    judge_model(stock, fused, call_of("bert"))
    assert len(ops["layernorm_ffn"]) == LAYERS * S // 4


def test_dropout_of_a_block_is_drawn_in_training_only(ops: Spy) -> None:
    model = build("bert").train()
    swap(model)
    call = call_of("bert")
    call(model, torch.float32)
    for name in ("layernorm_ffn", "add_layer_norm", "embedding"):
        assert {call["dropout_p"] for call in ops[name]} == {0.1}
    model.eval()
    assert torch.equal(call(model, torch.float32)["logits"], call(model, torch.float32)["logits"])


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_compile(name: str) -> None:
    """BERT with its backward, the others as far as tracing goes."""
    torch._dynamo.reset()
    model = swapped(model_of(name))
    inputs = tokens()
    if name == "t5":
        inputs["decoder_input_ids"] = torch.randint(2, V, (3, 7))

    def run(m: Any) -> tuple[Tensor, list[Tensor]]:
        logits = m(**inputs, use_cache=False).logits
        if name != "bert":
            return logits, []
        return logits, list(torch.autograd.grad(logits.square().sum(), list(model.parameters())))

    right, right_grads = run(model)
    backend = "aot_eager" if name == "bert" else "eager"
    got, grads = run(torch.compile(model, backend=backend))
    torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)
    for a, b in zip(grads, right_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()) + 1e-6)


# ------------------------------------------------------------------------- what a swap may touch


ALL_BUT_FFN = {"attention": 2, "residual + norm": 2, "embedding": 1, "norm": 1}


@pytest.mark.parametrize(
    ("kwargs", "counts"),
    [
        ({"only": "*.attention.output"}, {"residual + norm": 2}),
        ({"only": "*.layer.1"}, {"attention": 1, "feed-forward": 1, "residual + norm": 1}),
        ({"only": "bert.embeddings"}, {"embedding": 1}),
        ({"skip": nn.LayerNorm}, {"attention": 2}),
        ({"skip": "*.intermediate"}, ALL_BUT_FFN),
        ({"skip": "*.1.output.dense"}, {**ALL_BUT_FFN, "feed-forward": 1}),
    ],
    ids=str,
)
def test_only_and_skip(kwargs: dict[str, Any], counts: dict[str, int]) -> None:
    """A block is swapped only where all that it fuses is selected."""
    model = build("bert")
    call = call_of("bert")
    right = call(model, torch.float32)["logits"]
    report = swap(model, **kwargs)
    kinds = ("attention", "feed-forward", "residual + norm", "embedding", "norm")
    found = {kind: report.count(kind) for kind in kinds if report.count(kind)}
    norms = counts.get("norm")
    if norms is not None:  # those of blocks left alone are norms like others
        counts = {**counts, "norm": found["norm"]}
        assert found["norm"] >= norms
    assert found == counts
    torch.testing.assert_close(call(model, torch.float32)["logits"], right, rtol=1e-3, atol=1e-4)


def test_unknown_classes_are_left_alone_and_reported() -> None:
    class OwnLayer(transformers.models.bert.modeling_bert.BertLayer):
        def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
            return attention_output

    model = build("bert")
    model.bert.encoder.layer[1].__class__ = OwnLayer
    report = swap(model)
    assert report.count("feed-forward") == 1
    assert type(model.bert.encoder.layer[1]) is OwnLayer
    report = swap(build("mistral"))
    left = {s.cls for s in report.skipped if s.kind == "?"}
    assert left == {"MistralMLP", "MistralRMSNorm"}
    assert "model.layers.*.mlp (2)" in str(report)


def test_another_version_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward that takes something else is not the one our code stands for."""
    layer_class = transformers.models.llama.modeling_llama.LlamaDecoderLayer

    def other(self: Any, hidden_states: Tensor, scale: float, **kwargs: Any) -> Tensor:
        raise AssertionError

    monkeypatch.setattr(layer_class, "forward", other)
    _known._unknown_forward.cache_clear()
    report = swap(build("llama"))
    _known._unknown_forward.cache_clear()
    assert report.count("feed-forward") == 0
    assert "its forward takes ('hidden_states', 'scale', 'kwargs') in this version" in str(report)


@pytest.mark.parametrize("name", CALLS)
def test_lifecycle(name: str) -> None:
    """Names, repr, state, pickles, and back to stock, bit for bit."""
    model = model_of(name)
    call = call_of(name)
    right = call(model, torch.float32)["logits"]
    text, state = repr(model), list(model.state_dict())
    classes = [type(m) for m in model.modules()]
    swap(model)
    assert repr(model) == text
    assert list(model.state_dict()) == state
    assert all(isinstance(m, c) for m, c in zip(model.modules(), classes, strict=True))
    fused = call(model, torch.float32)["logits"]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(call(other, torch.float32)["logits"], fused)
        assert unswap(other)
        assert [type(m) for m in other.modules()] == classes
        assert torch.equal(call(other, torch.float32)["logits"], right)


def test_frozen_layers_of_a_bert(ops: Spy) -> None:
    """Fine-tuning of the last layer: the same gradients, none for what is frozen."""
    stock = build("bert")
    for n, p in stock.named_parameters():
        p.requires_grad_("layer.1." in n or n.startswith("cls"))
    judge_model(stock, swapped(stock), call_of("bert"))
    assert len(ops["layernorm_ffn"]) == LAYERS


# --------------------------------------------------------------------------------- torch's layers


@pytest.mark.parametrize("norm_first", [False, True])
def test_torch_layers(norm_first: bool, ops: Spy) -> None:
    stock = nn.Transformer(E, H, 2, 1, 48, batch_first=True, norm_first=norm_first).eval()
    fused = swapped(stock)
    report = swap(copy.deepcopy(stock))
    assert [report.count(k) for k in ("layer", "attention", "norm")] == [3, 4, 9]
    src, tgt = torch.randn(2, S, E), torch.randn(2, 7, E)

    def call(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        mask = nn.Transformer.generate_square_subsequent_mask(7, dtype=dtype)
        x, y = src.to(dtype), tgt.to(dtype)
        return {"o": model(x, y, tgt_mask=mask, tgt_is_causal=True)}

    call(fused, torch.float32)
    assert ops.counts()[0] == 3
    judge_model(stock, fused, call)
    assert unswap(fused)
    assert [type(m) for m in fused.modules()] == [type(m) for m in stock.modules()]
    with torch.inference_mode():
        assert torch.equal(call(fused, torch.float32)["o"], call(stock, torch.float32)["o"])


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
def test_padding_in_inference_is_packed_and_fused(ops: Spy) -> None:
    """Torch's encoder hands the layers a nested tensor then; zeros come back at padding."""
    layer = nn.TransformerEncoderLayer(E, H, 48, batch_first=True)
    stock = nn.TransformerEncoder(layer, 2).eval()
    fused = swapped(stock)
    x = torch.randn(3, S, E)
    padding = torch.arange(S) >= torch.tensor([[S], [5], [9]])
    with torch.inference_mode():
        right = stock(x, src_key_padding_mask=padding)
        got = fused(x, src_key_padding_mask=padding)
    assert ops.counts()[:2] == (2, 2)
    assert ops["layernorm_ffn"][0]["args"][0].shape == (S + 5 + 9, E)
    torch.testing.assert_close(got, right)
    assert not got[padding].any()


def test_a_layer_with_its_own_attention_block(ops: Spy) -> None:
    class Own(nn.TransformerEncoderLayer):
        def _sa_block(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return super()._sa_block(x, *args, **kwargs) * 2

    stock = Own(E, H, 48, batch_first=True)
    fused = swapped(stock)
    assert isinstance(fused, Own)
    x = torch.randn(2, S, E)
    stock.eval(), fused.eval()
    torch.testing.assert_close(fused(x), stock(x))
    torch.testing.assert_close(pickle.loads(pickle.dumps(swapped(nn.LayerNorm(E))))(x),
                               nn.LayerNorm(E)(x))  # fmt: skip


def test_norms_alone() -> None:
    model = nn.Sequential(nn.LayerNorm(E), nn.RMSNorm(E), nn.LayerNorm((3, E), bias=False))
    report = swap(model)
    assert (len(report), report.count("norm")) == (3, 3)
    assert [type(m) for m in model] == [
        fastattn.nn.LayerNorm, fastattn.nn.RMSNorm, fastattn.nn.LayerNorm,
    ]  # fmt: skip
    assert unswap(model)
    assert [type(m) for m in model] == [nn.LayerNorm, nn.RMSNorm, nn.LayerNorm]


assert set(CALLS) - {"t5_gated"} <= set(TEXT)
assert DECODER["hidden_size"] == E
