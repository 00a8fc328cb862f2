"""TransformerEncoderLayer ... Transformer: torch's modules, on the fused ops."""

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_attention_ops import compiled
from test_nn_layernorm_ffn import twins
from torch import Tensor

from fastattn import nn

NAMES = ("TransformerEncoderLayer", "TransformerDecoderLayer")
D, HEADS, HIDDEN = 32, 4, 64


def inputs(name: str, batch_first: bool = True, rows: int = 9) -> list[Tensor]:
    """src, or tgt and memory."""
    shapes = [(3, rows, D), (3, rows + 4, D)][: 1 if "Encoder" in name else 2]
    xs = [torch.randn(shape) for shape in shapes]
    return xs if batch_first else [x.transpose(0, 1) for x in xs]


def both(
    pair: tuple[torch.nn.Module, torch.nn.Module], call: Callable[[torch.nn.Module, Any], Tensor],
    xs: list[Tensor], rtol: float = 1e-4, atol: float = 2e-5,
) -> None:  # fmt: skip
    """Outputs and all gradients of the two agree."""
    results = []
    for module in pair:
        leaves = [x.detach().clone().requires_grad_() for x in xs]
        y = call(module, leaves)
        wanted = [*leaves, *module.parameters()]
        grads = torch.autograd.grad(y.sin().sum(), wanted)
        results.append([y, *grads])
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(
            got, want, rtol=rtol, atol=atol * max(1, want.abs().max().item())
        )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("norm_first", "batch_first", "bias"), itertools.product((False, True),
                         (False, True), (False, True)))  # fmt: skip
def test_layers_are_torchs(name: str, norm_first: bool, batch_first: bool, bias: bool) -> None:
    pair = twins(name, D, HEADS, HIDDEN, 0.0, "gelu", 1e-4, batch_first, norm_first, bias)
    stock, ours = pair
    assert isinstance(ours, type(stock))
    assert [*ours.state_dict()] == [*stock.state_dict()]
    for a, b in zip(ours.parameters(), stock.parameters(), strict=True):
        assert torch.equal(a, b)  # one seed, one initialisation
    both(pair, lambda m, xs: m(*xs), inputs(name, batch_first))


ACTIVATIONS = {
    "relu": "relu", "gelu": "gelu", "F.relu": F.relu, "F.gelu": F.gelu, "F.silu": F.silu,
    "GELU": torch.nn.GELU(), "GELU_tanh": torch.nn.GELU("tanh"), "SiLU": torch.nn.SiLU(),
    "sin": torch.sin, "LeakyReLU": torch.nn.LeakyReLU(), "lambda": lambda x: x.square(),
}  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_activation_by_name_or_callable(name: str, activation: str) -> None:
    pair = twins(name, D, HEADS, HIDDEN, 0.0, ACTIVATIONS[activation], batch_first=True)
    both(pair, lambda m, xs: m(*xs), inputs(name))


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_masks(norm_first: bool, kind: str) -> None:
    causal = torch.ones(9, 9, dtype=torch.bool).triu(1)
    padding = torch.arange(9) >= torch.tensor([[9], [5], [7]])
    memory_padding = torch.arange(13) >= torch.tensor([[13], [4], [8]])
    if kind == "float":
        causal, padding, memory_padding = (
            torch.zeros(m.shape).masked_fill(m, float("-inf"))
            for m in (causal, padding, memory_padding)
        )
    pair = twins(NAMES[0], D, HEADS, HIDDEN, 0.0, batch_first=True, norm_first=norm_first)
    for hint in (False, True):
        both(pair, lambda m, xs, hint=hint: m(*xs, causal, is_causal=hint), inputs(NAMES[0]))
    both(pair, lambda m, xs: m(*xs, causal, padding), inputs(NAMES[0]))
    pair = twins(NAMES[1], D, HEADS, HIDDEN, 0.0, batch_first=True, norm_first=norm_first)
    both(
        pair,
        lambda m, xs: m(*xs, causal, None, padding, memory_padding, tgt_is_causal=True),
        inputs(NAMES[1]),
    )


def test_causal_without_its_mask_is_refused_as_in_torch() -> None:
    for module in twins(NAMES[0], D, HEADS, HIDDEN, 0.0, batch_first=True):
        with pytest.raises(RuntimeError, match="is_causal"):
            module(torch.randn(2, 5, D), is_causal=True)


def test_inference_has_no_other_way() -> None:
    stock, ours = twins(NAMES[0], D, HEADS, HIDDEN, batch_first=True)
    x = torch.randn(2, 7, D)
    ours.eval(), stock.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), stock(x), rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), stock(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_dropout_in_training(name: str, norm_first: bool) -> None:
    """Every dropout of the layer acts: without one of them the result is another."""
    torch.manual_seed(0)
    layer = getattr(nn, name)(D, HEADS, HIDDEN, 0.3, batch_first=True, norm_first=norm_first)
    xs = inputs(name)

    def run() -> Tensor:
        torch.manual_seed(2)
        return layer(*xs)

    first = run()
    assert torch.equal(run(), first)
    drops = [m for m in layer.modules() if isinstance(m, torch.nn.Dropout)]
    assert len(drops) == (3 if "Encoder" in name else 4)
    for drop in drops:
        drop.p = 0.0
        assert not torch.allclose(run(), first)
        drop.p = 0.3
    layer.eval()
    assert torch.equal(layer(*xs), layer(*xs))


def test_mean_over_masks_is_the_output_without_dropout() -> None:
    layer = nn.TransformerEncoderLayer(D, HEADS, HIDDEN, 0.0, batch_first=True, norm_first=True)
    x = torch.randn(1, 3, D)
    right = layer(x)
    layer.dropout2.p = 0.4  # linear in the output
    mean = torch.stack([layer(x) for _ in range(600)]).mean(0)
    assert (mean - right).abs().max() < 0.15 * (right - x).abs().max() + 0.05


def test_hooks_and_replaced_parts_are_honoured() -> None:
    """The block runs module by module where a module would do more than its class does."""
    stock, ours = twins(NAMES[0], D, HEADS, HIDDEN, 0.0, batch_first=True)
    x = torch.randn(2, 5, D)

    def double(_: Any, __: Any, out: Tensor) -> Tensor:
        return 2 * out

    for part in ("linear1", "linear2", "dropout", "dropout1", "dropout2", "norm1", "norm2"):
        handles = [getattr(m, part).register_forward_hook(double) for m in (stock, ours)]
        torch.testing.assert_close(ours(x), stock(x), rtol=1e-4, atol=1e-4)
        for handle in handles:
            handle.remove()
    before = ours(x)
    for m in (stock, ours):
        m.linear2 = torch.nn.Sequential(m.linear2, torch.nn.Tanh())
    torch.testing.assert_close(ours(x), stock(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours(x), before)


def test_a_subclass_with_a_block_of_its_own() -> None:
    class Layer(nn.TransformerEncoderLayer):
        def _ff_block(self, x: Tensor) -> Tensor:
            return torch.zeros_like(x)

    layer = Layer(D, HEADS, HIDDEN, 0.0, batch_first=True, norm_first=True)
    layer.norm1.weight.data.zero_()
    layer.self_attn.in_proj_bias.data.zero_()
    x = torch.randn(2, 5, D)
    torch.testing.assert_close(layer(x), x + layer.self_attn.out_proj.bias)


def test_copy_pickle_and_both_directions_of_state() -> None:
    stock, ours = twins(NAMES[0], D, HEADS, HIDDEN, 0.0, batch_first=True)
    x = torch.randn(2, 5, D)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(x), ours(x))
    fresh = torch.nn.TransformerEncoderLayer(D, HEADS, HIDDEN, 0.0, batch_first=True)
    fresh.load_state_dict(ours.state_dict())
    torch.testing.assert_close(fresh(x), stock(x))


def test_nested_input() -> None:
    layer = nn.TransformerEncoderLayer(D, HEADS, HIDDEN, 0.0, batch_first=True)
    parts = [torch.randn(n, D) for n in (4, 7)]
    y = layer(torch.nested.nested_tensor(parts, layout=torch.jagged))
    for got, part in zip(y.unbind(), parts, strict=True):
        torch.testing.assert_close(got, layer(part[None])[0], rtol=1e-4, atol=1e-5)


def test_autocast() -> None:
    stock, ours = twins(NAMES[0], D, HEADS, HIDDEN, 0.0, batch_first=True, norm_first=True)
    x = torch.randn(2, 5, D)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = ours(x), stock(x)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=3e-2, atol=3e-2)
    bf16 = copy.deepcopy(ours).bfloat16()(x.bfloat16())
    torch.testing.assert_close(bf16.float(), want, rtol=5e-2, atol=6e-2)


@pytest.mark.parametrize("name", NAMES)
def test_compile(name: str) -> None:
    layer = getattr(nn, name)(D, HEADS, HIDDEN, 0.0, "gelu", batch_first=True)
    fast, counter = compiled(lambda *xs: layer(*xs), dynamic=True)
    graphs = None
    for rows in (9, 11, 14):
        xs = inputs(name, rows=rows)
        torch.testing.assert_close(fast(*xs), layer(*xs), rtol=1e-4, atol=1e-5)
        graphs = counter.frame_count if graphs is None else graphs
    assert counter.frame_count == graphs  # one for every length, eager calls in between or not


def test_encoder_detects_a_causal_mask() -> None:
    stock, ours = twins(NAMES[0], D, HEADS, HIDDEN, 0.0, batch_first=True)
    stacks = (
        torch.nn.TransformerEncoder(stock, 2, torch.nn.LayerNorm(D), enable_nested_tensor=False),
        nn.TransformerEncoder(ours, 2, nn.LayerNorm(D)),
    )
    mask = torch.nn.Transformer.generate_square_subsequent_mask(9)
    padding = torch.arange(9) >= torch.tensor([[9], [5], [7]])
    seen: list[bool] = []
    stacks[1].layers[0].register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["is_causal"]), with_kwargs=True
    )
    for given, hint, causal in (
        (mask, None, True), (mask.isinf(), None, True), (mask, False, False), (None, None, False),
        (mask + 1, None, False),
    ):  # fmt: skip
        both(stacks, lambda m, xs, g=given, h=hint: m(*xs, g, is_causal=h), inputs(NAMES[0]))
        assert seen[-1] is causal
    both(stacks, lambda m, xs: m(*xs, src_key_padding_mask=padding), inputs(NAMES[0]))


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer(norm_first: bool) -> None:
    pair = twins(
        "Transformer", D, HEADS, 2, 2, HIDDEN, 0.0, batch_first=True, norm_first=norm_first
    )
    stock, ours = pair
    assert [*ours.state_dict()] == [*stock.state_dict()]
    for a, b in zip(ours.parameters(), stock.parameters(), strict=True):
        assert torch.equal(a, b)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(9)
    padding = torch.arange(13) >= torch.tensor([[13], [4], [8]])
    tgt, src = inputs(NAMES[1])
    both(
        pair,
        lambda m, xs: m(
            *xs, tgt_mask=mask, src_key_padding_mask=padding, memory_key_padding_mask=padding
        ),
        [src, tgt],
        rtol=1e-3,
        atol=1e-4,
    )
    custom = nn.Transformer(D, HEADS, custom_encoder=ours.encoder, custom_decoder=ours.decoder)
    assert custom.encoder is ours.encoder
