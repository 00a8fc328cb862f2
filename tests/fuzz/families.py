"""Every family of ops by name, and the cases of one.

A new family: a strategy of `Valid` in a module of its own, and its name here.
"""

from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

from fastattn.backends import cpu_isas, force_cpu_isa
from fuzz import attention, kv_cache, modules, recurrent, rows, spoil, tables
from fuzz.case import Case, Valid, refused, served
from fuzz.raw import raw_cases

FAMILIES: Mapping[str, st.SearchStrategy[Valid]] = {
    "attention": attention.attention,
    "attention_varlen": attention.attention_varlen,
    "attention_with_kv_cache": kv_cache.attention_with_kv_cache(),
    "norms": rows.norms(),
    "bias_act": rows.bias_act(),
    "layernorm_ffn": rows.layernorm_ffn(),
    "embedding": tables.embedding(),
    "linear_cross_entropy": tables.linear_cross_entropy(),
    "recurrent": recurrent.recurrent(),
    "recurrent_cells": recurrent.cells(),
    "nn": modules.modules(),
    "nn.LayerNormFFN": modules.layernorm_ffn(),
}
_KINDS = ("valid", "valid", "invalid", "raw")


@st.composite
def cases(draw: Any, family: str) -> Case:
    """A case on one of this machine's instruction sets, the best one every other time."""
    best, *others = reversed(cpu_isas())
    case = draw(_of_kind(family))
    isa = draw(st.sampled_from([*[best] * max(len(others), 1), *others]))

    def run() -> str:
        with force_cpu_isa(isa):
            return case.run()

    return Case(case.kind, lambda: f"{case.about()} on {isa}", run)


@st.composite
def _of_kind(draw: Any, family: str) -> Case:
    valid = draw(FAMILIES[family])
    kind = draw(st.sampled_from(_KINDS))
    if kind == "valid":
        return served(valid)
    if kind == "raw":
        return draw(raw_cases(valid))
    name = draw(st.sampled_from(sorted(valid.roles)))
    right = valid.args.get(name)
    ways = spoil.applicable(valid.roles[name], right)
    how = draw(st.sampled_from(sorted(ways)))
    return refused(valid, name, how, ways[how](right))
