"""Other libraries' ops, as contestants beside torch's.

flex_attention and ONNX Runtime run on the CPU. flash-attn, xformers and liger-kernel are for GPUs
and take part where they can be imported; none of those was run here, where there is no GPU.
"""

import importlib.util
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness import compiled

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def importable(*names: str) -> bool:
    return all(importlib.util.find_spec(name) is not None for name in names)


def flex(S: int, *, keep: Any = None, score: Any = None) -> Attention:
    """Compiled flex_attention; keep: a mask_mod, score: a score_mod."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device = torch.get_default_device().type
    blocks = None if keep is None else create_block_mask(keep, None, None, S, S, device=device)
    attend = compiled(flex_attention)
    return lambda q, k, v: attend(q, k, v, score_mod=score, block_mask=blocks)


def attention(causal: bool) -> dict[str, Attention]:
    """The GPU libraries' attention on (B, H, S, D)."""
    found: dict[str, Attention] = {}
    if torch.get_default_device().type != "cuda":
        return found
    if importable("flash_attn"):
        from flash_attn import flash_attn_func

        def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            o: Tensor = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=causal)
            return o.transpose(1, 2)

        found["flash-attn"] = flash
    if importable("xformers"):
        from xformers.ops import LowerTriangularMask, memory_efficient_attention

        def efficient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            bias = LowerTriangularMask() if causal else None
            o: Tensor = memory_efficient_attention(
                *(x.transpose(1, 2) for x in (q, k, v)), attn_bias=bias
            )
            return o.transpose(1, 2)

        found["xformers"] = efficient
    return found


def norm(kind: str) -> Callable[..., Tensor] | None:
    """liger-kernel's layer or RMS norm: (x, weight, bias, eps) -> y."""
    if torch.get_default_device().type != "cuda" or not importable("liger_kernel"):
        return None
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    if kind == "layer":
        return LigerLayerNormFunction.apply  # type: ignore[no-any-return]
    return lambda x, weight, _, eps: LigerRMSNormFunction.apply(x, weight, eps)


def loss() -> Callable[..., Tensor] | None:
    """liger-kernel's linear + cross entropy: (x, weight, target) -> loss."""
    if torch.get_default_device().type != "cuda" or not importable("liger_kernel"):
        return None
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    module = LigerFusedLinearCrossEntropyLoss()
    return lambda x, weight, target: module(weight, x, target)


def onnx(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Callable[[], object] | None:
    """The model in ONNX Runtime, by the graph that torch's exporter writes (fp32, as exported);
    None where onnx or onnxruntime is not installed.

    Args:
        model: takes `inputs` by position, returns a tensor.
    """
    if torch.get_default_device().type != "cpu" or not importable("onnx", "onnxruntime"):
        return None
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = str(Path(folder) / "model.onnx")
        torch.onnx.export(
            model, tuple(inputs.values()), path, input_names=list(inputs), output_names=["y"],
            dynamo=False,
        )  # fmt: skip
        session = onnxruntime.InferenceSession(path, options)
    feed = {name: x.numpy() for name, x in inputs.items()}
    return lambda: session.run(["y"], feed)
