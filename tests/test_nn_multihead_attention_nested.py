"""`fastattn.nn.MultiheadAttention` on nested tensors."""

import pytest
import torch
import torch.nn.functional as F
from swap_tools import Calls, calls  # noqa: F401
from test_nn_multihead_attention import RESULTS, E, H, N, S, modules, padding
from torch import Tensor

LAYOUTS = [torch.strided, torch.jagged]


def nested(parts: list[Tensor], layout: torch.layout) -> Tensor:
    return torch.nested.as_nested_tensor(parts, layout=layout)


def sequences(lengths: tuple[int, ...] = (3, 6, 1), width: int = E) -> list[Tensor]:
    return [torch.randn(n, width, requires_grad=True) for n in lengths]


@pytest.mark.parametrize("results", RESULTS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested(
    training: bool,
    layout: torch.layout,
    results: str,
    calls: Calls,  # noqa: F811
) -> None:
    """Each sequence alone through torch's module is the measure, gradients included."""
    stock, fused = modules(batch_first=True)
    stock.train(training), fused.train(training)
    parts = sequences()
    x = nested(parts, layout)
    o, weights = fused(x, x, x, **RESULTS[results])
    assert calls.ops() == ["attention_varlen"]
    assert o.is_nested
    assert o.layout == layout
    got = torch.cat(list(o.unbind()))
    rights = [stock(p, p, p, **RESULTS[results]) for p in parts]
    torch.testing.assert_close(got, torch.cat([r[0] for r in rights]))
    if results == "output":
        assert weights is None
    else:
        assert weights.shape == ((N, 6, 6) if results == "mean" else (N, H, 6, 6))
        for w, (_, right) in zip(weights, rights, strict=True):
            n = right.shape[-1]
            torch.testing.assert_close(w, F.pad(right, (0, 6 - n, 0, 6 - n)))
    upstream = torch.randn(10, E)
    inputs = [*parts, fused.in_proj_weight]
    grads = torch.autograd.grad(got, inputs, upstream)
    stock_inputs = [*parts, stock.in_proj_weight]
    right_grads = torch.autograd.grad(torch.cat([r[0] for r in rights]), stock_inputs, upstream)
    for grad, right in zip(grads, right_grads, strict=True):
        torch.testing.assert_close(grad, right, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_strided_agrees_with_torchs_fast_path() -> None:
    stock, fused = modules(batch_first=True)
    stock.eval(), fused.eval()
    with torch.inference_mode():
        x = nested([p.detach() for p in sequences()], torch.strided)
        for kwargs in RESULTS.values():
            (got, got_weights), (right, weights) = (
                fused(x, x, x, **kwargs),
                stock(x, x, x, **kwargs),
            )
            torch.testing.assert_close(got.to_padded_tensor(0.0), right.to_padded_tensor(0.0))
            torch.testing.assert_close(got_weights, weights)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_cross_attention(layout: torch.layout) -> None:
    stock, fused = modules(batch_first=True, kdim=24, vdim=20)
    q, k, v = sequences(), sequences((2, 1, 4), 24), sequences((2, 1, 4), 20)
    o, weights = fused(nested(q, layout), nested(k, layout), nested(v, layout))
    assert weights.shape == (N, 6, 4)
    for got, parts in zip(o.unbind(), zip(q, k, v, strict=True), strict=True):
        torch.testing.assert_close(got, stock(*parts)[0])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_bad_input(layout: torch.layout) -> None:
    _, fused = modules(batch_first=True)
    x = nested(sequences(), layout)
    with pytest.raises(ValueError, match="takes no key_padding_mask"):
        fused(x, x, x, key_padding_mask=padding())
    with pytest.raises(ValueError, match="must all be nested, or none"):
        fused(x, torch.randn(N, S, E), torch.randn(N, S, E))
    short = nested(sequences((2, 2)), layout)
    with pytest.raises(ValueError, match="query's batch size 3, got 2"):
        fused(x, short, short)
    with pytest.raises(ValueError, match="set batch_first=True"):
        modules()[1](x, x, x)
    with pytest.raises(ValueError, match="cannot take add_bias_kv"):
        modules(batch_first=True, add_bias_kv=True)[1](x, x, x)
