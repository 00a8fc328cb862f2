"""What stands between the ops of attention over a KV cache and their GPU kernels: the first-use
verdict (_guard.py), the small fixed call that it comes from, and plain PyTorch where it says no.
The same for every backend that checks itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn import reference
from fastattn.kernels.contract import empty_as
from fastattn.ops import _guard
from fastattn.ops.attention_kv_cache_checks import OP, Call

# The small calls: one whose keys are split over programs, one too short for that; the last of their
# sequences fills its cache.
_B, _CAPACITIES, _MANY_ROWS = 3, (420, 30), 20
_Kernel = Callable[..., tuple[Tensor, Tensor]]


def may_run(backend: str, kernel: _Kernel, args: tuple[Any, ...]) -> bool:
    """Whether ``kernel``, on the op's arguments, may serve this call; False = take
    :func:`by_reference`.

    Raises:
        ValueError: the verdict is no, and the caller named this backend.
    """
    call, numbers = Call(*args[:14]), args[14:]

    def named() -> tuple[str, Callable[[], str | None]]:
        return variant(call, numbers), lambda: check(kernel, call, numbers)

    return _guard.may_run(OP, backend, call.q.device, _key(call, numbers), named)


def _page_kind(call: Call) -> int:
    """Pages that hold whole tiles of keys are read in another way: the largest power of two, up to
    256, that divides a page; 0 where there are none."""
    size = call.k_cache.shape[2]
    return min(size & -size, 256) if call.block_table is not None else 0


def _packed_rows(call: Call) -> int:
    """Rows of q for a key head, in steps of what decides the tile."""
    rows = call.q.shape[1] // max(call.k_cache.shape[1], 1) * call.q.shape[2]
    return 16 if rows <= 16 else 64


def _key(call: Call, numbers: tuple[Any, ...]) -> tuple[Any, ...]:
    """At least as fine as the variant's name."""
    _, softcap, causal, left, right, interleaved = numbers
    q = call.q
    return (
        q.dtype, q.shape[3], call.v_cache.shape[3], q.shape[1] == call.k_cache.shape[1],
        _packed_rows(call), _page_kind(call), tuple([x is None for x in call[4:]]),
        None if call.cos is None else call.cos.shape[1], softcap > 0, causal, left >= 0, right >= 0,
        interleaved,
    )  # fmt: skip


def variant(call: Call, numbers: tuple[Any, ...]) -> str:
    """What tells one set of compiled kernels from another, in words."""
    _, softcap, causal, left, right, interleaved = numbers
    D, Dv = call.q.shape[3], call.v_cache.shape[3]
    rotary = ""
    if call.cos is not None:
        rotary = f"rotary{2 * call.cos.shape[1]}{' interleaved' if interleaved else ''}"
    given = {
        f"paged by {_page_kind(call)}": call.block_table is not None,
        "indexed": call.cache_index is not None,
        "append": call.k is not None,
        "ragged": call.new_lens is not None,
        rotary: call.cos is not None,
        "mask": call.mask is not None,
        "alibi": call.alibi_slopes is not None,
        "sinks": call.sinks is not None,
        "gqa": call.q.shape[1] != call.k_cache.shape[1],
        "window left": left >= 0,
        "window right": right >= 0,
        "softcap": softcap > 0,
        "causal": causal,
    }
    words = [name for name, there in given.items() if there]
    head_dim = f"D{D}" if Dv == D else f"D{D}/{Dv}"
    rows = "few rows" if _packed_rows(call) == 16 else "many rows"
    return " ".join([str(call.q.dtype)[6:], head_dim, rows, *words])


# ---- the small call ------------------------------------------------------------------------------


def small_call(
    like: Call, numbers: tuple[Any, ...], most: int
) -> tuple[Call, tuple[Any, ...]]:  # fmt: skip
    """A fixed call with the features of ``like``, on its device, of sequences of up to ``most``
    keys: the same for every run. NaN lies in every slot of the cache that nobody may read."""
    gen = torch.Generator().manual_seed(1)
    device, dtype = like.q.device, like.q.dtype
    D, Dv = like.q.shape[3], like.v_cache.shape[3]
    Hk, group = 2, 2 if like.q.shape[1] != like.k_cache.shape[1] else 1
    Sq = 3 if _packed_rows(like) == 16 else _MANY_ROWS
    Sn = Sq if like.new_lens is not None else Sq + 1

    def randn(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=gen).to(device, of)

    def ints(like: Tensor, values: Any) -> Tensor:
        return torch.as_tensor(values).to(device, like.dtype)

    fresh = Sn if like.k is not None else 0
    lens = [0, most // 2, most - fresh]
    new_lens = None if like.new_lens is None else ints(like.new_lens, [fresh, 1, fresh - 1])
    table = index = None
    entries, size = _B, most
    if like.block_table is not None:
        size = like.k_cache.shape[2] if like.k_cache.shape[2] <= 256 else _page_kind(like)
        columns = -(-most // size)
        entries = _B * columns + 1
        table = ints(like.block_table, torch.randperm(entries, generator=gen)[: _B * columns])
        table = table.view(_B, columns)
    elif like.cache_index is not None:
        entries = _B + 2
        index = ints(like.cache_index, [4, 0, 3])
    capacity = size * (1 if table is None else table.shape[1])
    caches = randn(entries, Hk, size, D), randn(entries, Hk, size, Dv)
    call = Call(
        q=randn(_B, Hk * group, Sq, D), k_cache=caches[0], v_cache=caches[1],
        cache_lens=ints(like.cache_lens, lens),
        k=randn(_B, Hk, Sn, D) if fresh else None, v=randn(_B, Hk, Sn, Dv) if fresh else None,
        new_lens=new_lens, block_table=table, cache_index=index,
        cos=None, sin=None,
        mask=None if like.mask is None
        else (torch.rand(_B, 1, 1, capacity, generator=gen) > 0.3).to(device),
        alibi_slopes=None if like.alibi_slopes is None
        else torch.rand(Hk * group, generator=gen).to(like.alibi_slopes),
        sinks=None if like.sinks is None else randn(Hk * group, of=like.sinks.dtype),
    )  # fmt: skip
    if like.cos is not None:
        angles = torch.randn(capacity, like.cos.shape[1], generator=gen).to(device)
        call = call._replace(cos=angles.cos(), sin=angles.sin())
    _poison(call, lens)
    _, softcap, causal, left, right, interleaved = numbers
    return call, (
        D**-0.5, 5.0 if softcap else 0.0, causal, most // 3 if left >= 0 else -1,
        most // 4 if right >= 0 else -1, interleaved,
    )  # fmt: skip


def _poison(call: Call, lens: list[int]) -> None:
    """NaN in every slot that holds no key of a sequence."""
    size = call.k_cache.shape[2]
    for cache in (call.k_cache, call.v_cache):
        kept = cache.clone()
        cache.fill_(float("nan"))
        for b, n in enumerate(lens):
            if call.block_table is None:
                e = b if call.cache_index is None else int(call.cache_index[b])
                cache[e, :, :n] = kept[e, :, :n]
                continue
            for p in range(-(-n // size)):
                e, here = int(call.block_table[b, p]), min(size, n - p * size)
                cache[e, :, :here] = kept[e, :, :here]


def check(kernel: _Kernel, like: Call, numbers: tuple[Any, ...]) -> str | None:
    """Run ``kernel`` on small calls; what is wrong with its results or the caches, or None."""
    complaints = [_check_one(kernel, *small_call(like, numbers, most)) for most in _CAPACITIES]
    return "; ".join(filter(None, complaints)) or None


def _check_one(kernel: _Kernel, call: Call, numbers: tuple[Any, ...]) -> str:
    def by_plain_pytorch(dtype: torch.dtype) -> dict[str, Tensor]:
        def host(x: Tensor | None) -> Any:
            if x is None:
                return None
            x = x.cpu().clone()
            return x.to(dtype) if x.is_floating_point() else x

        return _results(by_reference, Call(*map(host, call)), numbers)

    right, plain = by_plain_pytorch(torch.float64), by_plain_pytorch(call.q.dtype)
    return _guard.differences(_results(kernel, call, numbers), right, plain)


def _results(kernel: _Kernel, call: Call, numbers: tuple[Any, ...]) -> dict[str, Tensor]:
    o, lse = kernel(*call, *numbers)
    return {"o": o, "lse": lse, "k_cache": call.k_cache, "v_cache": call.v_cache}


# ---- plain PyTorch -------------------------------------------------------------------------------


def by_reference(*args: Any) -> tuple[Tensor, Tensor]:
    """o and lse of the op's arguments, by plain PyTorch; the caches are written in place."""
    call = Call(*args[:14])
    scale, softcap, causal, left, right, interleaved = args[14:]
    o, lse = reference.attention_with_kv_cache(
        call.q, call.k_cache, call.v_cache, cache_lens=call.cache_lens, k=call.k, v=call.v,
        new_lens=call.new_lens, block_table=call.block_table, cache_index=call.cache_index,
        rotary=None if call.cos is None or call.sin is None else (call.cos, call.sin),
        rotary_interleaved=interleaved, causal=causal,
        window=(left if left >= 0 else None, right if right >= 0 else None), mask=call.mask,
        alibi_slopes=call.alibi_slopes, softcap=softcap or None, sinks=call.sinks, scale=scale,
        return_lse=True,
    )  # fmt: skip
    return empty_as(call.q, tuple(o.shape)).copy_(o), lse.float().contiguous()
