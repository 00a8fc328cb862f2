"""`fastattn.nn.KVCache`: what is generated with it is what attention over all tokens gives."""

import random
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from tools import assert_within
from torch import Tensor, nn

import fastattn
from fastattn import reference
from fastattn.nn import KVCache

LAYERS, HEADS, KV_HEADS, D, DV = 2, 4, 2, 8, 6

PAGED = [None, 1, 3, 16]


def make(batch: int, capacity: int = 24, **kwargs: Any) -> KVCache:
    return KVCache(LAYERS, batch, KV_HEADS, D, capacity, value_dim=DV, **kwargs)


class Tokens:
    """Every token's q, k and v in every layer, and the sequences as lists of them."""

    def __init__(self, batch: int, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.sequences: list[list[tuple[Tensor, ...]]] = [[] for _ in range(batch)]

    def step(
        self,
        cache: KVCache,
        rows: int,
        new_lens: list[int] | None = None,
        sequences: list[int] | None = None,
        **options: Any,
    ) -> None:
        """One step of the cache, judged against attention over each sequence alone."""
        chosen = list(range(cache.batch)) if sequences is None else sequences
        counts = [rows] * len(chosen) if new_lens is None else new_lens
        made = cache.extend(rows, new_lens=new_lens, sequences=sequences)
        first = torch.tensor([len(self.sequences[b]) for b in chosen])
        assert torch.equal(made.positions, first[:, None] + torch.arange(rows))
        shape = (LAYERS, len(chosen), -1, rows)
        q, k, v = (
            torch.randn(LAYERS, len(chosen), h, rows, d, dtype=torch.float64).to(self.dtype)
            for h, d in ((HEADS, D), (KV_HEADS, D), (KV_HEADS, DV))
        )
        for i, b in enumerate(chosen):
            for t in range(counts[i]):
                self.sequences[b].append((q[:, i, :, t], k[:, i, :, t], v[:, i, :, t]))
        assert cache.lengths == tuple(map(len, self.sequences))
        assert cache.lens.tolist() == list(cache.lengths)
        for layer in range(LAYERS):
            o = made[layer].attend(q[layer], k[layer], v[layer], **options)
            assert o.shape == (len(chosen), HEADS, rows, DV), shape
            for i, b in enumerate(chosen):
                self.judge(o[i], layer, b, counts[i])

    def all_of(self, layer: int, b: int) -> list[Tensor]:
        """q, k, v of a whole sequence, (1, heads, length, features)."""
        heads = ((HEADS, D), (KV_HEADS, D), (KV_HEADS, DV))
        return [
            torch.stack([token[i][layer] for token in self.sequences[b]], 1)[None]
            if self.sequences[b]
            else torch.zeros(1, h, 0, d, dtype=self.dtype)
            for i, (h, d) in enumerate(heads)
        ]

    def judge(self, o: Tensor, layer: int, b: int, count: int) -> None:
        """The step's rows, of which the first `count` are the sequence's last."""
        assert not o[:, count:].any()
        if not count:
            return
        q, k, v = self.all_of(layer, b)
        right = reference.attention(q.double(), k.double(), v.double(), causal=True)
        plain = reference.attention(q, k, v, causal=True)
        assert_within("o", o[:, :count], right[0, :, -count:], [plain[0, :, -count:]])
        return

    def held(self, cache: KVCache) -> None:
        """The cache holds these tokens and no others, bit for bit."""
        for layer in range(LAYERS):
            for b in range(cache.batch):
                _, k, v = self.all_of(layer, b)
                kept_k, kept_v = cache.read(layer, b)
                assert torch.equal(kept_k, k[0])
                assert torch.equal(kept_v, v[0])


@pytest.mark.parametrize("page_size", PAGED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prompts_and_tokens(page_size: int | None, dtype: torch.dtype) -> None:
    """Prompts of different lengths, tokens, a few at once, and rows that are padding."""
    cache, tokens = make(3, page_size=page_size, dtype=dtype), Tokens(3, dtype)
    tokens.step(cache, 7, [7, 2, 5])
    for _ in range(3):
        tokens.step(cache, 1)
    tokens.step(cache, 4, [0, 4, 1])
    tokens.step(cache, 3)
    tokens.held(cache)


@pytest.mark.parametrize("page_size", PAGED)
def test_new_requests_while_others_go_on(page_size: int | None) -> None:
    cache, tokens = make(3, page_size=page_size), Tokens(3)
    tokens.step(cache, 5)
    cache.reset([1])
    tokens.sequences[1] = []
    tokens.step(cache, 6, sequences=[1])
    tokens.step(cache, 1)
    tokens.step(cache, 2, [2, 1], sequences=[2, 0])
    tokens.held(cache)
    cache.reset()
    assert cache.lengths == (0, 0, 0)
    assert cache.free_pages == (None if page_size is None else 3 * -(-24 // page_size))


@pytest.mark.parametrize("page_size", PAGED)
def test_speculative_decoding(page_size: int | None) -> None:
    """Four tokens are proposed; how many stay differs by sequence."""
    cache, tokens = make(2, page_size=page_size), Tokens(2)
    tokens.step(cache, 6)
    for accepted in ([7, 10], [9, 10], [9, 11]):
        tokens.step(cache, 4)
        cache.crop(accepted)
        for b, n in enumerate(accepted):
            del tokens.sequences[b][n:]
        tokens.held(cache)
    cache.crop(8)
    for sequence in tokens.sequences:
        del sequence[8:]
    tokens.step(cache, 2)
    tokens.held(cache)


@pytest.mark.parametrize("page_size", PAGED)
@pytest.mark.parametrize("index", [[0, 0, 0], [2, 0, 1], [1, 1, 2], [0, 1, 2]], ids=str)
def test_beams(page_size: int | None, index: list[int]) -> None:
    """Beams that begin alike share their pages and do not write into each other's."""
    cache, tokens = make(3, page_size=page_size), Tokens(3)
    tokens.step(cache, 8, [8, 5, 3])
    cache.reorder(torch.tensor(index))
    tokens.sequences = [list(tokens.sequences[i]) for i in index]
    tokens.held(cache)
    for _ in range(4):
        tokens.step(cache, 1)
    tokens.held(cache)
    cache.reset()
    if page_size is not None:
        assert cache.free_pages == 3 * -(-24 // page_size)


@pytest.mark.parametrize("page_size", [1, 4])
def test_a_prompt_for_several_samples_is_stored_once(page_size: int) -> None:
    cache = make(4, capacity=20, page_size=page_size)
    tokens = Tokens(4)
    pages = cache.free_pages
    assert pages is not None
    tokens.step(cache, 10, sequences=[0])
    used = pages - cache.free_pages
    assert used == -(-10 // page_size)
    cache.reorder([0, 0, 0, 0])
    tokens.sequences = [list(tokens.sequences[0]) for _ in range(4)]
    assert pages - cache.free_pages == used
    tokens.step(cache, 1)
    # Pages of one token: one more each. Of four: the page begun is copied for three of the four.
    assert pages - cache.free_pages == used + (4 if page_size == 1 else 3)
    tokens.held(cache)


@pytest.mark.parametrize("page_size", PAGED)
def test_full_says_how_to_make_it_larger(page_size: int | None) -> None:
    cache, tokens = make(2, capacity=6, page_size=page_size), Tokens(2)
    tokens.step(cache, 4, [4, 2])
    before = cache.lengths, cache.lens.clone(), cache.free_pages
    message = r"full: sequence 0 has 4 of 6 tokens and 3 more come; make it with capacity=7"
    with pytest.raises(RuntimeError, match=message):
        cache.extend(3)
    assert (cache.lengths, cache.free_pages) == (before[0], before[2])
    assert torch.equal(cache.lens, before[1])
    cache.grow(9)
    tokens.held(cache)
    tokens.step(cache, 5, [5, 4])
    tokens.held(cache)
    assert cache.capacity == 9


def test_no_free_page() -> None:
    """A pool smaller than all sequences at their longest; nothing changes where it is too small."""
    cache, tokens = make(3, capacity=20, page_size=4, pages=6), Tokens(3)
    tokens.step(cache, 7, [7, 7, 3])
    assert cache.free_pages == 1
    tokens.step(cache, 1)
    tables = cache.block_table.clone()
    with pytest.raises(RuntimeError, match=r"needs 3 pages of 4 tokens and 1 of 6 .*pages=8"):
        cache.extend(1)
    assert cache.lengths == (8, 8, 4)
    assert torch.equal(cache.block_table, tables)
    cache.reset([1])
    tokens.sequences[1] = []
    tokens.step(cache, 1)
    cache.grow(20, pages=9)
    tokens.step(cache, 4)
    tokens.held(cache)


def test_random_histories() -> None:
    """Whatever the order of calls, every sequence is what a list of its tokens is."""
    for seed in range(6):
        rng = random.Random(seed)
        page_size = rng.choice([None, 1, 2, 5])
        pages = None if page_size is None else 3 * -(-16 // page_size) + 3
        cache, tokens = make(3, 16, page_size=page_size, pages=pages), Tokens(3)
        for _ in range(25):
            what = rng.choice(["extend"] * 4 + ["crop", "reorder", "reset"])
            if what == "extend":
                chosen = rng.sample(range(3), rng.randint(1, 3))
                rows = rng.randint(1, 4)
                counts = [min(rng.randint(0, rows), 16 - cache.lengths[b]) for b in chosen]
                tokens.step(cache, rows, counts, chosen)
            elif what == "crop":
                keep = [rng.randint(0, 16) for _ in range(3)]
                cache.crop(keep)
                for sequence, n in zip(tokens.sequences, keep, strict=True):
                    del sequence[n:]
            elif what == "reorder":
                index = [rng.randrange(3) for _ in range(3)]
                cache.reorder(index)
                tokens.sequences = [list(tokens.sequences[i]) for i in index]
            else:
                b = rng.randrange(3)
                cache.reset([b])
                tokens.sequences[b] = []
            tokens.held(cache)


def test_options_reach_the_op() -> None:
    """Rotary by position in each sequence, window, softcap, scale: as the op with the same."""
    cache = make(2, page_size=4)
    same = make(2)
    angles = torch.arange(24)[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001])
    options: dict[str, Any] = {
        "rotary": (angles.cos(), angles.sin()),
        "window": (3, 0),
        "softcap": 5.0,
        "scale": 0.3,
        "sinks": torch.randn(HEADS),
        "return_lse": True,
    }
    for rows, counts in ((5, [5, 3]), (1, None)):
        lens = same.lens.clone()
        q, k, v = (
            torch.randn(2, h, rows, d) for h, d in ((HEADS, D), (KV_HEADS, D), (KV_HEADS, DV))
        )
        got = cache.extend(rows, new_lens=counts)[1].attend(q, k, v, **options)
        same.extend(rows, new_lens=counts)
        right = reference.attention_with_kv_cache(
            q, same.k[1], same.v[1], cache_lens=lens, k=k, v=v,
            new_lens=None if counts is None else torch.tensor(counts), **options,
        )  # fmt: skip
        for x, y in zip(got, right, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_memory_is_what_it_says() -> None:
    cache = make(2, capacity=10, dtype=torch.float16)
    assert cache.nbytes == LAYERS * 2 * KV_HEADS * 10 * (D + DV) * 2
    paged = make(2, capacity=10, page_size=4, pages=5)
    assert paged.nbytes == LAYERS * 5 * KV_HEADS * 4 * (D + DV) * 4
    assert "pages=5 (5 free)" in repr(paged)
    assert paged.block_table.shape == (2, 3)


def test_bad_arguments() -> None:
    for arguments, message in (
        ({"layers": 0}, "layers must be at least 1"),
        ({"capacity": -1}, "must not be negative"),
        ({"pages": 4}, "made with a page_size"),
        ({"page_size": 0}, "page_size must be at least 1"),
    ):
        given: dict[str, Any] = {"layers": 1, "batch": 1, "heads": 1, "head_dim": 4, "capacity": 4}
        with pytest.raises(ValueError, match=message):
            KVCache(**{**given, **arguments})
    cache = make(3)
    for call, message in (
        (lambda: cache.extend(2, new_lens=[1, 3, 0]), r"0 to rows=2, got \[1, 3, 0\]"),
        (lambda: cache.extend(2, new_lens=[1]), "must be 3 numbers"),
        (lambda: cache.extend(1, sequences=[0, 0]), r"distinct, of 0 to 2, got \[0, 0\]"),
        (lambda: cache.reset([3]), r"distinct, of 0 to 2, got \[3\]"),
        (lambda: cache.reorder([0, 1, 3]), "3 sequences of 0 to 2"),
        (lambda: cache.crop(-1), "at least 0"),
        (lambda: cache.grow(3), "capacity is 24 already"),
        (lambda: cache.reset(torch.tensor([True])), r"bool mask of sequences must have shape \(3,"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    step = cache.extend(2)
    q, k, v = (torch.randn(3, h, 1, D) for h in (HEADS, KV_HEADS, KV_HEADS))
    with pytest.raises(ValueError, match=r"made by extend\(2\), got 1 keys"):
        step[0].attend(q, k, v)
    with pytest.raises(TypeError, match=r"appends the 2 rows of its step, so k .* got NoneType"):
        step[0].attend(q, None, None)
    with pytest.raises(TypeError, match="so v must be a Tensor, got list"):
        step[0].attend(q, k, [v])
    assert cache.lengths == (2, 2, 2)


NO_INTS: dict[str, Any] = {
    "rows": lambda c: c.extend(1.5),
    "rows, true": lambda c: c.extend(True),
    "rows, a tensor of floats": lambda c: c.extend(torch.tensor(2.0)),
    "rows, several": lambda c: c.extend(torch.tensor([2, 2])),
    "new_lens": lambda c: c.extend(2, new_lens=[1.9, 0.2, 1]),
    "new_lens, a tensor": lambda c: c.extend(2, new_lens=torch.tensor([1.0, 0.0, 1.0])),
    "new_lens, a mask": lambda c: c.extend(2, new_lens=torch.tensor([True, False, True])),
    "sequences": lambda c: c.extend(2, sequences=1),
    "sequences, floats": lambda c: c.reset([0.0, 1.0]),
    "sequences, a tensor of floats": lambda c: c.reset(torch.tensor([0.5])),
    "sequences, mixed": lambda c: c.crop(1, sequences=[True, 0, 2]),
    "sequences, a matrix": lambda c: c.reset(torch.tensor([[True, False, True]])),
    "length": lambda c: c.crop(0.5),
    "length, a list": lambda c: c.crop([0, 1.0, 2]),
    "length, a mask": lambda c: c.crop(torch.tensor([True, True, False])),
    "index": lambda c: c.reorder([0.9, 1.9, 0]),
    "index, a mask": lambda c: c.reorder(torch.tensor([True, False, False])),
    "capacity": lambda c: c.grow(30.5),
}


@pytest.mark.parametrize("page_size", [None, 4])
@pytest.mark.parametrize("what", NO_INTS)
def test_what_is_no_int_is_refused(what: str, page_size: int | None) -> None:
    """And changes nothing."""
    cache = make(3, page_size=page_size)
    cache.extend(2)
    name = what.split(",")[0]
    with pytest.raises(TypeError, match=rf"KVCache: {name} must be (an int|a sequence of ints)"):
        NO_INTS[what](cache)
    assert cache.lengths == (2, 2, 2)
    assert cache.lens.tolist() == [2, 2, 2]
    cache.extend(1)
    assert cache.lengths == (3, 3, 3)


def test_ints_of_others() -> None:
    cache = make(3)
    cache.extend(torch.tensor(5))
    cache.extend(np.int64(2), new_lens=np.array([1, 2, 0]))
    assert cache.lengths == (6, 7, 5)
    assert all(type(n) is int for n in cache.lengths)
    cache.crop(np.int64(6))
    assert cache.lengths == (6, 6, 5)
    cache.crop(torch.tensor(4), sequences=np.array([0]))
    cache.crop(torch.tensor([3, 2, 1], dtype=torch.int32))
    assert cache.lengths == (3, 2, 1)
    cache.reorder(np.array([1, 1, 2]))
    cache.reset(np.array([False, True, False]))
    assert cache.lengths == (2, 0, 1)
    assert all(type(n) is int for n in cache.lengths)


@pytest.mark.parametrize("mask", [torch.tensor([True, False, True]), [True, False, True]])
def test_a_bool_mask_selects_sequences(mask: Any) -> None:
    """``reset(finished)``, as one has it at hand."""
    cache, tokens = make(3, page_size=4), Tokens(3)
    tokens.step(cache, 5)
    cache.crop(4, sequences=mask)
    assert cache.lengths == (4, 5, 4)
    cache.reset(mask)
    assert cache.lengths == (0, 5, 0)
    assert cache.extend(2, sequences=mask).lens.tolist() == [0, 0]
    assert cache.lengths == (2, 5, 2)
    cache.reset(torch.zeros(3, dtype=torch.bool))
    assert cache.lengths == (2, 5, 2)
    none = make(0)
    none.reset(torch.zeros(0, dtype=torch.bool))
    assert none.lengths == ()


def test_a_step_is_a_sequence_of_layers() -> None:
    step = make(1).extend(1)
    assert len(step) == len(list(step)) == LAYERS
    assert [part.layer for part in step] == [0, 1]
    assert step[-1] == step[LAYERS - 1]
    for layer in (LAYERS, -LAYERS - 1):
        with pytest.raises(IndexError, match=rf"layer {layer} of a cache of {LAYERS} layers"):
            step[layer]


class Model(nn.Module):
    """Two layers of attention over a step."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            fastattn.nn.MultiheadAttention(32, 4, batch_first=True) for _ in range(2)
        )

    def forward(self, x: Tensor, step: Any = None) -> Tensor:
        for i, layer in enumerate(self.layers):
            rows = x.shape[1]
            mask = None if step is not None else torch.ones(rows, rows).triu(1).bool()
            cached = {} if step is None else {"kv_cache": step[i]}
            x = x + layer(x, x, x, need_weights=False, attn_mask=mask, **cached)[0]
        return x


@pytest.mark.parametrize("page_size", [None, 4])
@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention(page_size: int | None, batch_first: bool) -> None:
    """Token by token as all at once."""
    model = Model()
    for layer in model.layers:
        layer.batch_first = batch_first
    cache = KVCache(2, 3, 4, 8, 12, page_size=page_size)
    x = torch.randn(3, 9, 32)
    swapped = (lambda y: y) if batch_first else (lambda y: y.transpose(0, 1))

    def run(y: Tensor, step: Any = None) -> Tensor:
        for i, layer in enumerate(model.layers):
            rows = y.shape[1]
            mask = None if step is not None else torch.ones(rows, rows).triu(1).bool()
            cached = {} if step is None else {"kv_cache": step[i]}
            z = swapped(y)
            y = y + swapped(layer(z, z, z, need_weights=False, attn_mask=mask, **cached)[0])
        return y

    with torch.no_grad():
        right = run(x)
        got = torch.cat(
            [run(part, cache.extend(part.shape[1])) for part in x.split([5, 1, 3], 1)], 1
        )
    torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


def test_multihead_attention_refuses_what_a_cache_cannot_give() -> None:
    mha = fastattn.nn.MultiheadAttention(32, 4, 0.1, batch_first=True)
    x = torch.randn(1, 1, 32)
    cache = KVCache(1, 1, 4, 8, 12)
    no_grad = torch.no_grad()
    with no_grad:
        step = cache.extend(1)[0]
        for arguments, message in (
            ((x, x, x), "need_weights=False"),
            ((x, x.clone(), x), "self attention"),
        ):
            with pytest.raises(ValueError, match=message):
                mha.eval()(*arguments, kv_cache=step, need_weights="weights" in message)
        with pytest.raises(ValueError, match="attn_mask"):
            mha(x, x, x, need_weights=False, attn_mask=torch.zeros(1, 1), kv_cache=step)
        with pytest.raises(ValueError, match="dropout"):
            mha.train()(x, x, x, need_weights=False, kv_cache=step)


@pytest.mark.parametrize("page_size", [None, 4])
def test_compiled_once_for_all_steps(page_size: int | None) -> None:
    """One graph for the prompt's step, one for all that decode."""
    torch._dynamo.reset()
    model = Model().eval()
    cache = KVCache(2, 2, 4, 8, 16, page_size=page_size)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    x = torch.randn(2, 10, 32)
    with torch.no_grad():
        right = model(x)
        parts = x.split([5, 1, 1, 1, 1, 1], 1)
        got = torch.cat([compiled(part, cache.extend(part.shape[1])) for part in parts], 1)
    torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 2


def test_fake_cuda() -> None:
    """No value is read back on a GPU: not for a step, nor for the attention of one."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        for page_size in (None, 4):
            cache = make(2, page_size=page_size, device="cuda", dtype=torch.float16)
            for rows, counts in ((6, [6, 2]), (1, None)):
                step = cache.extend(rows, new_lens=counts)
                assert step.positions.device.type == "cuda"
            cache.crop(4)
            cache.reorder([1, 0])
            cache.reset([1])
            assert cache.lengths == (3, 0)
