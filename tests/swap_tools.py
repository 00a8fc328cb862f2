"""What the tests of `fastattn.nn` and `fastattn.swap` share: counting calls, judging, copying."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tools import assert_within
from torch import Tensor, nn

from fastattn.nn import multihead_attention as mha_module
from fastattn.nn import transformer as layers_module
from fastattn.swap import _decoding as decoding_module
from fastattn.swap import _generation as generation_module
from fastattn.swap import _inference as inference_module
from fastattn.swap import _transformers as hf_module

Call = Callable[[nn.Module, torch.dtype], dict[str, Tensor]]


class Calls(list[dict[str, Any]]):
    """The keyword arguments of every call of the ops, with q, k, v and the op's name."""

    def ops(self) -> list[str]:
        return [call["op"] for call in self]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Records every call that the modules and the swap make to the public ops."""
    record = Calls()

    def spy(module: Any, op: str) -> None:
        original = getattr(module, op)

        def wrapper(q: Tensor, k: Tensor, v: Tensor, /, *args: Any, **kwargs: Any) -> Any:
            record.append({**kwargs, "op": op, "q": q, "k": k, "v": v})
            return original(q, k, v, *args, **kwargs)

        monkeypatch.setattr(module, op, wrapper)

    def spy_layers(module: Any) -> None:
        original = module.encoder_layer

        def wrapper(x: Tensor, mask: Tensor | None, *args: Any, **kwargs: Any) -> Any:
            # Attention is inside; a mask that is the same for every row is read by key alone.
            if mask is not None and mask.stride(2) == 0:
                mask = mask[:, :, :1]
            record.append(
                {"op": "attention", "q": x, "k": x, "v": x, "mask": mask, "causal": False}
            )
            return original(x, mask, *args, **kwargs)

        monkeypatch.setattr(module, "encoder_layer", wrapper)

    def spy_decoding() -> None:
        original = decoding_module.decoder_layer

        def wrapper(x: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
            record.append(
                {"op": "attention_with_kv_cache", "q": x[:, None], "k": None, "v": None, **kwargs}
            )
            return original(x, k, v, *args, **kwargs)

        monkeypatch.setattr(decoding_module, "decoder_layer", wrapper)

    spy_decoding()
    spy_layers(layers_module)
    spy_layers(inference_module)
    spy(mha_module, "attention")
    spy(mha_module, "attention_varlen")
    spy(hf_module, "attention")
    spy(generation_module, "attention_with_kv_cache")
    return record


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """No layer of a decoder is one op."""
    monkeypatch.setattr(decoding_module, "serves", lambda *_: False)


def outputs_and_grads(model: nn.Module, call: Call, dtype: torch.dtype) -> dict[str, Tensor]:
    """The outputs of `call` and the gradients of all parameters under a fixed upstream gradient."""
    model.zero_grad()
    outputs = call(model, dtype)
    differentiable = [x for x in outputs.values() if x.requires_grad]
    generator = torch.Generator().manual_seed(7)
    upstream = [
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
        for x in differentiable
    ]
    results = {name: x.detach() for name, x in outputs.items()}
    if differentiable:
        torch.autograd.backward(differentiable, upstream)
        results |= {
            f"d {name}": p.grad.detach().clone()
            for name, p in model.named_parameters()
            if p.grad is not None
        }
    model.zero_grad()
    return results


def judge_model(stock: nn.Module, fused: nn.Module, call: Call) -> None:
    """Outputs and gradients of `fused`: error at most twice that of `stock`, both against fp64."""
    dtype = next(stock.parameters()).dtype
    got = outputs_and_grads(fused, call, dtype)
    plain = outputs_and_grads(stock, call, dtype)
    right = outputs_and_grads(copy.deepcopy(stock).double(), call, torch.float64)
    assert got.keys() == plain.keys() == right.keys()
    # A key bias moves all logits of a row alike: its gradient is 0 and what is computed is the
    # rounding of a sum, so gradients get a floor on the scale of all of them.
    largest = max((float(x.abs().max()) for n, x in right.items() if n.startswith("d ")), default=0)
    floor = 4 * torch.finfo(dtype).eps * largest
    for name, x in right.items():
        assert_within(name, got[name], x, [plain[name]], floor if name.startswith("d ") else 0.0)


def copies(model: nn.Module) -> Iterator[nn.Module]:
    """The model copied in the ways that users copy one."""
    yield copy.deepcopy(model)
    yield pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    yield torch.load(file, weights_only=False)
