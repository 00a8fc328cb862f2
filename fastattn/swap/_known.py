"""Which classes of transformers are known, and swapping them.

A class is known by its module, its name, the parameters of its forward and its parts.  Everything
else is left alone: subclasses, other families, other versions of transformers.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch

from fastattn.ops.parts import of_part
from fastattn.swap._block import Block
from fastattn.swap._blocks import (
    BertLayer,
    DistilBertBlock,
    Gpt2Block,
    LlamaLayer,
    PostNormOutput,
    RmsNorm,
    RobertaLayer,
    T5FeedForward,
    T5GatedFeedForward,
)
from fastattn.swap._classes import change_class, why_not_changed
from fastattn.swap._embeddings import BertEmbeddings, DistilBertEmbeddings, RobertaEmbeddings
from fastattn.swap._generation import Gpt2Attention, LlamaAttention
from fastattn.swap._report import ALREADY, Replaced, Skipped, SwapReport
from fastattn.swap._select import Selection

_HOME = "transformers.models"
# Class of transformers -> the classes for it, of which the first whose parts are there is taken.
KNOWN: dict[tuple[str, str], tuple[type[Block], ...]] = {
    (f"{_HOME}.bert.modeling_bert", "BertLayer"): (BertLayer,),
    (f"{_HOME}.bert.modeling_bert", "BertSelfOutput"): (PostNormOutput,),
    (f"{_HOME}.bert.modeling_bert", "BertEmbeddings"): (BertEmbeddings,),
    (f"{_HOME}.roberta.modeling_roberta", "RobertaEmbeddings"): (RobertaEmbeddings,),
    (f"{_HOME}.distilbert.modeling_distilbert", "Embeddings"): (DistilBertEmbeddings,),
    (f"{_HOME}.roberta.modeling_roberta", "RobertaLayer"): (RobertaLayer,),
    (f"{_HOME}.roberta.modeling_roberta", "RobertaSelfOutput"): (PostNormOutput,),
    (f"{_HOME}.distilbert.modeling_distilbert", "TransformerBlock"): (DistilBertBlock,),
    (f"{_HOME}.gpt2.modeling_gpt2", "GPT2Block"): (Gpt2Block,),
    (f"{_HOME}.gpt2.modeling_gpt2", "GPT2Attention"): (Gpt2Attention,),
    (f"{_HOME}.llama.modeling_llama", "LlamaAttention"): (LlamaAttention,),
    (f"{_HOME}.llama.modeling_llama", "LlamaDecoderLayer"): (LlamaLayer,),
    (f"{_HOME}.llama.modeling_llama", "LlamaRMSNorm"): (RmsNorm,),
    (f"{_HOME}.t5.modeling_t5", "T5LayerFF"): (T5FeedForward, T5GatedFeedForward),
    (f"{_HOME}.t5.modeling_t5", "T5LayerNorm"): (RmsNorm,),
}


@dataclass(frozen=True)
class Found:
    """What a swap would do with a module: the class to mix in, or why none."""

    fused: type[Block] | None
    why: str = ""


def find(module: torch.nn.Module) -> Found | None:
    """None for a module that is no block, else what can be done."""
    cls: Any = type(module)
    candidates = KNOWN.get((cls.__module__, cls.__name__))
    if candidates is None:
        return None
    if isinstance(module, Block):
        return Found(next(c for c in candidates if isinstance(module, c)))
    first: Any = candidates[0]
    why = _unknown_forward(cls, first)
    if why is not None:
        return Found(None, why)
    odd = ""
    for fused in candidates:
        found = fused.odd_part(module)
        if found is None:
            return Found(fused)
        odd = max(odd, found, key=lambda path: path.count("."))  # of the kind that fits best
    return Found(None, f"its {odd} is missing, hooked, or not of the class that this block has")


@functools.cache
def _unknown_forward(cls: Any, fused: Any) -> str | None:
    """The reason where a class's forward does not take what our code for it takes."""
    takes = tuple(inspect.signature(inspect.unwrap(cls.forward)).parameters)
    if takes == fused.FORWARD:
        return None
    return f"its forward takes {takes[1:]} in this version of transformers, not {fused.FORWARD[1:]}"


def swap_blocks(
    model: torch.nn.Module, selection: Selection, backend: str, report: SwapReport
) -> set[str]:
    """Swap the blocks that are known; returns the names of all that is such or a part of it."""
    seen: set[str] = set()
    owned: set[str] = set()  # fused by the block around them
    for name, module in model.named_modules():
        found = None if name in owned else find(module)
        if found is None:
            continue
        seen.add(name)
        fused = found.fused or Block
        kind = fused.KIND
        parts = [".".join((name, *path) if name else path) for path, _ in fused.PARTS]
        why = next((w for w in map(selection.why_not, (name, *parts)) if w is not None), None)
        cls = type(module).__name__
        mine = of_part(fused.OP.removeprefix("fastattn."), backend)
        if why is None and isinstance(module, Block):
            if module.backend == mine:
                why = ALREADY
            else:
                module.backend = mine
        elif why is None:
            why = found.why or why_not_changed(module)
            if why is None:
                change_class(module, found.fused, mine)
        if why is None or why == ALREADY:
            owned.update(parts)
        if why is None:
            report.replaced.append(Replaced(name, cls, fused.OP, kind))
        else:
            report.skipped.append(Skipped(name, cls, why, kind))
    return seen | owned
