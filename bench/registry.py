"""The sections of the bench that are lists of cases, each a module with CASES."""

import importlib

from bench.harness import Case

SECTIONS = {
    "attention": "Attention",
    "layernorm_ffn": "LayerNorm + FFN, its parts, linear + cross entropy",
    "embedding": "Embedding",
    "recurrent": "LSTM, GRU, RNN and their cells",
    "kv_cache": "Attention with a KV cache",
    "models": "Whole models",
}


def cases(section: str) -> dict[str, Case]:
    found: dict[str, Case] = importlib.import_module(f"bench.{section}").CASES
    return found


def find(name: str) -> Case | None:
    """A case by its name, or by section/name where sections share one."""
    section, _, rest = name.rpartition("/")
    for each in [section] if section else SECTIONS:
        if rest in cases(each):
            return cases(each)[rest]
    return None
