"""Bugs planted in the CPU kernels of attention over a cache, one at a time: some case must fail
for each. The machinery is mutation_lab.py, the rule that of rule.py."""

from typing import Any

import numpy as np
import pytest
import torch
from kv_cache_tools import CACHES, assert_same_bits, featured, lengths
from mutation_lab import Lab, check_names, check_place
from mutations import Mutation, sample
from mutations_kv_cache import MUTATIONS
from rule import as_is, assert_within, one_thread

# feature of kv_cache_tools.py, and sizes.
CASES: dict[str, dict[str, Any]] = {
    "decoding": {"feature": "plain", "d": 19, "dv": 23},
    "pages": {"feature": "rotary_pairs", "page_size": 7, "h": 8},
    "ragged": {"feature": "everything", "page_size": 5, "d": 18},
    "short": {"feature": "not_causal_short"},
    "entries": {"feature": "cache_index"},
    "ragged_rotary": {"feature": "rotary_ragged", "page_size": 16},
    "rows": {"feature": "gqa_8", "sq": 2, "dv": 30},
    "parts": {"feature": "plain", "lens": (1100, 0), "capacity": 1300, "d": 8, "h": 2, "hk": 1},
    "chunks": {
        "feature": "plain", "lens": (1100, 9), "capacity": 1300, "d": 8, "h": 2, "hk": 1, "sq": 30,
    },
    "paged_chunks": {
        "feature": "plain", "lens": (1100, 9), "capacity": 1300, "d": 8, "h": 2, "hk": 1, "sq": 30,
        "page_size": 300,
    },
    "one_row": {"feature": "plain", "lens": (300, 5), "capacity": 310, "d": 11, "h": 2, "hk": 2,
                "sq": 1},
    "pairs": {"feature": "plain", "d": 19, "dv": 23, "dtype": torch.bfloat16},
    "one_row_of_pairs": {"feature": "plain", "lens": (300, 5), "capacity": 310, "d": 11, "dv": 13,
                         "h": 2, "hk": 2, "sq": 1, "dtype": torch.bfloat16},
    "one_item": {
        "feature": "plain", "lens": (1100,), "capacity": 30000, "d": 8, "h": 2, "hk": 1, "sq": 30,
    },
}  # fmt: skip


def as_array(x: torch.Tensor) -> np.ndarray:
    """bf16, which numpy does not have, as int16."""
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()


class Case:
    """A call, and what is right."""

    def __init__(self, feature: str, **sizes: Any) -> None:
        self.call = call = featured(feature, index_dtype=torch.int64, **sizes)
        with one_thread():
            self.right, self.plain = call.by_formula(torch.Tensor.double), call.by_formula(as_is)
            self.caches = call.run("reference")
        t, options = call.tensors, call.options
        B, H, Sq, D = t["q"].shape
        _, Hk, slots, Dv = t["v_cache"].shape
        columns = t["block_table"].shape[1] if "block_table" in t else 1
        cos, sin = options.get("rotary", (None, None))
        left, right = (-1 if w is None else w for w in options.get("window", (None, None)))
        _, new_lens, _ = lengths(t)
        numbers = {
            "B": B, "H": H, "Hk": Hk, "Sq": Sq, "Sn": t["k"].shape[2] if "k" in t else 0, "D": D,
            "Dv": Dv, "slots": slots, "columns": columns, "ragged": "new_lens" in t,
            "half": 0 if cos is None else cos.shape[1],
            "interleaved": options.get("rotary_interleaved", False),
            "causal": options.get("causal", True), "left": left, "right": right, "alibi_b": 0,
            "threads": 2, "bf16": call.dtype == torch.bfloat16,
            "scale": options.get("scale", D**-0.5),
            "softcap": options.get("softcap", 0.0),
        }  # fmt: skip
        given = {**t, "new_lens": new_lens, "cos": cos, "sin": sin}
        given |= {"alibi": options.get("alibi_slopes"), "sinks": options.get("sinks")}
        if "mask" in options:
            given["mask"] = options["mask"].expand(B, H, Sq, slots * columns).contiguous()
        self.arrays = {n: as_array(x) for n, x in given.items() if x is not None}
        self.arrays |= {n: np.asarray(x, np.float64 if isinstance(x, float) else np.int64)
                        for n, x in numbers.items()}  # fmt: skip

    def verdict(self, results: dict[str, np.ndarray]) -> str | None:
        """None where the results are right, else what is wrong with them."""
        found = {n: torch.from_numpy(x) for n, x in results.items()}
        found = {
            n: x.view(torch.bfloat16) if x.dtype == torch.int16 else x for n, x in found.items()
        }
        try:
            for name in CACHES:
                assert_same_bits(name, found[name], self.caches[name])
            for name, x in self.right.items():
                floor = 0.0 if name == "o" else 1e-6 * (1.0 + self.call.largest_logit())
                assert_within(name, found[name], x, [self.plain[name]], floor)
        except AssertionError as error:
            return str(error).splitlines()[0]
        return None


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("kv_cache_mutants")
    cases = {n: Case(**spec) for n, spec in CASES.items()}
    recipe = {"source": "attention_kv_cache_portable.cpp"}
    return Lab(folder, "kv_cache", MUTATIONS, cases, recipe)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_mutation_has_its_place(mutation: Mutation) -> None:
    check_place(mutation)


def test_names_are_unique() -> None:
    check_names(MUTATIONS)


def test_the_kernels_themselves_pass(lab: Lab) -> None:
    assert lab.failures(None) == {}


@pytest.mark.slow
def test_a_sample_of_mutations_is_caught(lab: Lab) -> None:
    assert lab.survivors(sample(lab.mutations)) == []


@pytest.mark.full
def test_every_mutation_is_caught(lab: Lab) -> None:
    assert lab.survivors(lab.mutations) == []
