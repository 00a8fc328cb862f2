"""``fastattn bench``: each op against what torch offers for it, on this machine.

Both contestants take turns in one process (fastattn/measure.py); what counts is the median of the
pairwise ratios with its quartiles. Losses are rows like any other. The package alone is enough; the
suite with targets, memory and the machine's own GEMM rate beside every row is ``bench/`` of a
checkout.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

import fastattn
from fastattn import measure
from fastattn.backends import cpu_isa
from fastattn.cli._mistakes import Mistake
from fastattn.cli.devices import chosen_device, synchronized
from fastattn.cli.doctor import examine_cpu, make_console

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Thunk = Callable[[], Any]
_sdpa: Any = F.scaled_dot_product_attention


@dataclass(frozen=True)
class Case:
    """make: torch's call and ours on tensors of that device and dtype; train: with gradients."""

    op: str
    what: str
    train: bool
    make: Callable[[Any, bool], tuple[Thunk, Thunk]]


def _pair(
    leaves: list[Tensor],
    stock: Callable[..., Tensor],
    fused: Callable[..., Tensor],
    train: bool,
) -> tuple[Thunk, Thunk]:
    """Forward alone, or forward and the gradients of all leaves."""
    for leaf in leaves:
        leaf.requires_grad_(train)

    def thunk(fn: Callable[..., Tensor]) -> Thunk:
        if not train:
            return torch.no_grad()(lambda: fn(*leaves))
        upstream = torch.randn_like(fn(*leaves))
        return lambda: torch.autograd.grad(fn(*leaves), leaves, upstream)

    return thunk(stock), thunk(fused)


def _attention(S: int, **features: Any) -> Callable[[Any, bool], tuple[Thunk, Thunk]]:
    """B 1, H 12, D 64; torch gets a window as the mask that it takes."""

    def make(randn: Any, train: bool) -> tuple[Thunk, Thunk]:
        qkv = [randn(1, 12, S, 64) for _ in range(3)]
        given: dict[str, Any] = {"is_causal": features.get("causal", False)}
        if "window" in features:
            i = torch.arange(S, device=qkv[0].device)
            near = (i[:, None] - i).abs() <= features["window"][0]
            given = {"attn_mask": near}
        return _pair(
            qkv, lambda *t: _sdpa(*t, **given),
            lambda *t: fastattn.attention(*t, **features), train,
        )  # fmt: skip

    return make


def _padded(randn: Any, train: bool) -> tuple[Thunk, Thunk]:
    """B 8, H 12, S 512, D 64, half of the keys padding."""
    qkv = [randn(8, 12, 512, 64) for _ in range(3)]
    lens = torch.linspace(64, 512, 8).long().to(qkv[0].device)
    mask = torch.arange(512, device=lens.device) < lens[:, None, None, None]
    return _pair(
        qkv, lambda *t: _sdpa(*t, attn_mask=mask),
        lambda *t: fastattn.attention(*t, k_lens=lens), train,
    )  # fmt: skip


def _packed(randn: Any, train: bool) -> tuple[Thunk, Thunk]:
    """Eight sequences of 64 to 512 tokens, H 12, D 64; torch pads, masks and packs."""
    lens = torch.linspace(64, 512, 8).long().tolist()
    parts = [randn(sum(lens), 12, 64) for _ in range(3)]
    cu = torch.tensor([0, *lens]).cumsum(0).int().to(parts[0].device)
    mask = torch.arange(512, device=cu.device) < cu.diff()[:, None]
    places = mask.flatten().nonzero().squeeze(1)

    def stock(*t: Tensor) -> Tensor:
        q, k, v = (
            x.new_zeros(8 * 512, 12, 64).index_copy(0, places, x).view(8, 512, 12, 64)
            for x in t
        )  # fmt: skip
        o: Tensor = _sdpa(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask[:, None, None])
        return o.transpose(1, 2).reshape(8 * 512, 12, 64).index_select(0, places)

    def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o: Tensor = fastattn.attention_varlen(q, k, v, cu, cu, max_seqlen_q=512, max_seqlen_k=512)
        return o

    return _pair(parts, stock, fused, train)


def _decode(randn: Any, train: bool) -> tuple[Thunk, Thunk]:
    """A token of each of 8 sequences with 1023 before it, H 12, D 64: written and attended."""
    q, k, v = (randn(8, 12, 1, 64) for _ in range(3))
    k_cache, v_cache = (randn(8, 12, 1024, 64) for _ in range(2))
    lens = torch.full((8,), 1023, device=q.device)

    def stock(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k_cache[:, :, 1023:] = k
        v_cache[:, :, 1023:] = v
        o: Tensor = _sdpa(q, k_cache, v_cache)
        return o

    def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o: Tensor = fastattn.attention_with_kv_cache(q, k_cache, v_cache, cache_lens=lens, k=k, v=v)
        return o

    return _pair([q, k, v], stock, fused, train)


def _embedding(randn: Any, train: bool) -> tuple[Thunk, Thunk]:
    """Tokens and positions of 8 sequences of 256, summed and normed; 30000 rows of 768."""
    leaves = [randn(30000, 768), randn(512, 768), randn(768), randn(768)]
    ids = torch.arange(8 * 256, device=leaves[0].device).view(8, 256) * 7919 % 30000
    return _pair(
        leaves,
        lambda w, p, g, b: F.layer_norm(F.embedding(ids, w) + p[:256], (768,), g, b),
        lambda w, p, g, b: fastattn.embedding(
            ids, w, position_weight=p, norm="layer", norm_weight=g, norm_bias=b
        ), train,
    )  # fmt: skip


def _norm(name: str) -> Callable[[Any, bool], tuple[Thunk, Thunk]]:
    """2048 rows of 768."""

    def make(randn: Any, train: bool) -> tuple[Thunk, Thunk]:
        leaves = [randn(2048, 768), randn(768), randn(768)][: 3 if name == "layer_norm" else 2]
        stock, fused = getattr(F, name), getattr(fastattn, name)
        return _pair(
            leaves, lambda x, *t: stock(x, (768,), *t), lambda x, *t: fused(x, (768,), *t), train
        )

    return make


def _bias_act(randn: Any, train: bool) -> tuple[Thunk, Thunk]:
    leaves = [randn(512, 3072), randn(3072)]
    return _pair(leaves, lambda x, b: F.gelu(x + b), lambda x, b: fastattn.bias_act(x, b), train)


def _ffn(randn: Any, train: bool) -> tuple[Thunk, Thunk]:
    """Norm, 768 -> 3072 -> 768, residual; 512 rows."""
    x, w1, w2 = randn(512, 768), randn(3072, 768), randn(768, 3072)
    b1, b2, weight, bias = randn(3072), randn(768), randn(768), randn(768)
    leaves = [x, w1, b1, w2, b2, weight, bias]

    def stock(*t: Tensor) -> Tensor:
        x, w1, b1, w2, b2, weight, bias = t
        h = F.gelu(F.linear(F.layer_norm(x, (768,), weight, bias), w1, b1))
        return x + F.linear(h, w2, b2)

    def fused(*t: Tensor) -> Tensor:
        return fastattn.layernorm_ffn(*t[:5], norm_weight=t[5], norm_bias=t[6])

    return _pair(leaves, stock, fused, train)


def _add_norm(randn: Any, train: bool) -> tuple[Thunk, Thunk]:
    leaves = [randn(2048, 768), randn(2048, 768), randn(768), randn(768)]
    return _pair(
        leaves, lambda x, r, w, b: F.layer_norm(x + r, (768,), w, b),
        lambda x, r, w, b: fastattn.add_layer_norm(x, r, w, b)[0], train,
    )  # fmt: skip


def _cross_entropy(randn: Any, train: bool) -> tuple[Thunk, Thunk]:
    x, w = randn(256, 512), randn(8192, 512)
    target = torch.arange(256, device=x.device) * 31 % 8192
    return _pair(
        [x, w], lambda x, w: F.cross_entropy(F.linear(x, w).float(), target),
        lambda x, w: fastattn.linear_cross_entropy(x, w, target), train,
    )  # fmt: skip


def _recurrent(name: str) -> Callable[[Any, bool], tuple[Thunk, Thunk]]:
    """T 64, B 8, input and hidden features 256."""

    def make(randn: Any, train: bool) -> tuple[Thunk, Thunk]:
        x = randn(64, 8, 256)
        stock: Any = getattr(nn, name)(256, 256).to(x)
        fused: Any = getattr(fastattn.nn, name)(256, 256).to(x)
        for key in list(fused._parameters):  # the very same weights
            setattr(fused, key, stock._parameters[key])
        leaves = [x, *stock.parameters()]
        return _pair(leaves, lambda x, *_: stock(x)[0], lambda x, *_: fused(x)[0], train)

    return make


def _cell(name: str) -> Callable[[Any, bool], tuple[Thunk, Thunk]]:
    """One step of B 8, input and hidden features 256, from a state of zeros."""

    def make(randn: Any, train: bool) -> tuple[Thunk, Thunk]:
        x = randn(8, 256)
        stock: Any = getattr(nn, name)(256, 256).to(x)
        fused: Any = getattr(fastattn.nn, name)(256, 256).to(x)
        for key in list(fused._parameters):
            setattr(fused, key, stock._parameters[key])

        def first(out: Any) -> Tensor:
            h: Tensor = out[0] if isinstance(out, tuple) else out
            return h

        leaves = [x, *stock.parameters()]
        return _pair(leaves, lambda x, *_: first(stock(x)), lambda x, *_: first(fused(x)), train)

    return make


CASES = (
    Case("attention", "S 512, forward", False, _attention(512)),
    Case("attention", "S 512, training", True, _attention(512)),
    Case("attention", "S 1024, causal, training", True, _attention(1024, causal=True)),
    Case("attention", "S 1024, window 128, forward", False, _attention(1024, window=(128, 128))),
    Case("attention", "B 8, S 512, half padding, forward", False, _padded),
    Case("attention_varlen", "8 of 64 to 512 tokens, training; torch pads", True, _packed),
    Case("attention_with_kv_cache", "B 8, 1024 keys, a token", False, _decode),
    Case("embedding", "B 8, S 256, positions, norm, training", True, _embedding),
    Case("layer_norm", "2048 rows of 768, training", True, _norm("layer_norm")),
    Case("rms_norm", "2048 rows of 768, training", True, _norm("rms_norm")),
    Case("bias_act", "512 rows of 3072, gelu, training", True, _bias_act),
    Case("layernorm_ffn", "512 rows of 768, forward", False, _ffn),
    Case("layernorm_ffn", "512 rows of 768, training", True, _ffn),
    Case("add_layer_norm", "2048 rows of 768, training", True, _add_norm),
    Case("linear_cross_entropy", "256 rows, 8192 classes, training", True, _cross_entropy),
    Case("lstm", "T 64, B 8, H 256, training", True, _recurrent("LSTM")),
    Case("gru", "T 64, B 8, H 256, training", True, _recurrent("GRU")),
    Case("rnn", "T 64, B 8, H 256, training", True, _recurrent("RNN")),
    Case("lstm_cell", "B 8, H 256, training", True, _cell("LSTMCell")),
    Case("gru_cell", "B 8, H 256, training", True, _cell("GRUCell")),
    Case("rnn_cell", "B 8, H 256, training", True, _cell("RNNCell")),
)
OPS = tuple(dict.fromkeys(case.op for case in CASES))


def run(
    *,
    only: list[str] | None,
    dtypes: list[str] | None,
    device: str | None,
    threads: int | None,
    seconds: float,
) -> dict[str, Any]:
    """Every row asked for, each for at most `seconds` once it has three samples."""
    unknown = sorted(set(only or ()) - set(OPS))
    if unknown:
        raise Mistake(f"--only {unknown[0]}: no such op; there are {', '.join(OPS)}")
    where = chosen_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    rows = [
        _time(case, dtype, where, seconds)
        for case in CASES
        for dtype in dtypes or ("fp32", "bf16")
        if not only or case.op in only
    ]
    return {
        "environment": {
            "fastattn": fastattn.__version__,
            "torch": torch.__version__,
            "device": str(where),
            "gpu": torch.cuda.get_device_name(where) if where.type == "cuda" else None,
            "cpu": examine_cpu()["model"],
            "isa": cpu_isa(),
            "threads": torch.get_num_threads(),
            "date": time.strftime("%Y-%m-%d"),
        },
        "rows": rows,
    }


def _time(case: Case, dtype: str, device: torch.device, seconds: float) -> dict[str, Any]:
    gen = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=gen) * (shape[-1] ** -0.5 if len(shape) == 2 else 1.0)
        return x.to(device, DTYPES[dtype])

    stock, fused = case.make(randn, case.train)
    samples = measure.interleave(
        {"stock": synchronized(stock, device), "fused": synchronized(fused, device)},
        rounds=25, max_seconds=seconds,
    )  # fmt: skip
    return {
        "op": case.op,
        "case": case.what,
        "dtype": dtype,
        "torch_s": asdict(measure.spread(samples["stock"])),
        "load": measure.load_average(),
        "fastattn_s": asdict(measure.spread(samples["fused"])),
        "speedup": asdict(measure.ratios(samples["stock"], samples["fused"])),
    }


def render(result: dict[str, Any]) -> None:
    """One table."""
    console = make_console()
    env = result["environment"]
    where = env["gpu"] or f"{env['cpu']} ({env['isa']})"
    title = f"{where}, {env['threads']} threads, torch {env['torch']}, {env['date']}"
    table = Table(title=title, title_justify="left")
    for name in ("op", "case", "dtype"):
        table.add_column(name)
    for name in ("torch ms", "fastattn ms", "speedup \\[quartiles]"):
        table.add_column(name, justify="right", no_wrap=True)
    last = ""
    for row in result["rows"]:
        if last not in ("", row["op"]):
            table.add_section()
        s = row["speedup"]
        table.add_row(
            "" if row["op"] == last else row["op"], row["case"], row["dtype"],
            *(f"{row[k]['median'] * 1e3:.2f}" for k in ("torch_s", "fastattn_s")),
            f"{s['median']:.2f} \\[{s['q1']:.2f}, {s['q3']:.2f}]",
        )  # fmt: skip
        last = row["op"]
    console.print(table)
    console.print(
        "Medians of interleaved runs; speedup = torch / fastattn in neighbouring runs. The whole "
        "suite: make bench in a checkout."
        + measure.not_idle([row["load"] for row in result["rows"]], env["threads"]),
        style="dim",
    )
