"""Bugs planted in the CPU kernels of layernorm_ffn, one at a time: some case must fail for each.

The machinery is mutation_lab.py, the rule that of tools.py.
"""

from typing import Any

import mutant_ffn
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mutation_lab import Lab, check_names, check_place
from mutations import Mutation, sample
from mutations_ffn import MUTATIONS, TILE_MUTATIONS, WIDE_MUTATIONS
from tools import assert_within, one_thread
from torch import Tensor

from fastattn import reference
from fastattn.backends import cpu_isas
from fastattn.ops.layernorm_op import ACTIVATIONS, NORMS

# name -> sizes and options; rows of 19, 33, ... have tails on every instruction set.
CASES: dict[str, dict[str, Any]] = {
    "layer": {"M": 37, "N": 33, "F": 50, "norm": "layer", "act": "gelu"},
    "rms_gated": {"M": 13, "N": 50, "F": 19, "norm": "rms", "act": "silu", "gated": True},
    "dropout_gated": {"M": 14, "N": 70, "F": 83, "norm": "layer", "act": "gelu_tanh",
                      "gated": True, "dropout_p": 0.3},
    "dropout": {"M": 6, "N": 40, "F": 90, "norm": "layer", "act": "relu2", "dropout_p": 0.4},
    "mean_1000": {"M": 9, "N": 300, "F": 8, "norm": "layer", "act": "relu", "offset": 1000.0},
    "large_eps": {"M": 5, "N": 18, "F": 8, "norm": "layer", "act": "silu", "eps": 2.0},
    "many_rows": {"M": 700, "N": 21, "F": 9, "norm": "layer", "act": "gelu"},
    "overflow": {"M": 3, "N": 33, "F": 4, "norm": "layer", "act": "relu", "scale": 1e25},
}  # fmt: skip
# For the kernels of AVX-512: several blocks, panels, chunks and depths; few tokens in two blocks.
WIDE_CASES = {
    **{name: CASES[name] for name in ("layer", "dropout_gated", "many_rows")},
    "blocks": {"M": 150, "N": 133, "F": 261, "norm": "rms", "act": "silu", "gated": True,
               "dropout_p": 0.2},
    "tokens": {"M": 55, "N": 37, "F": 70, "norm": "layer", "act": "gelu", "gated": True,
               "dropout_p": 0.3},
}  # fmt: skip
# For those of AMX, layernorm_ffn alone in bf16: several row tiles, chunks and parts of a sum, the
# last of them narrow; widths that are no multiple of a tile's.
TILE_CASES = {
    "tiles": {"M": 41, "N": 416, "F": 352, "norm": "layer", "act": "gelu", "half": True},
    "tiles_gated": {"M": 300, "N": 64, "F": 288, "norm": "rms", "act": "silu", "gated": True,
                    "dropout_p": 0.2, "half": True},
    "odd_width": {"M": 35, "N": 40, "F": 64, "norm": "layer", "act": "relu", "half": True},
    "odd_hidden": {"M": 35, "N": 64, "F": 72, "norm": "layer", "act": "relu", "half": True},
}  # fmt: skip


class Case:
    """Arguments, and what is right."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = {"eps": 1e-5, "dropout_p": 0.0, **spec}
        m, n, f = (spec[k] for k in "MNF")
        shapes = {
            "x": (m, n), "residual": (m, n), "bias": (n,), "weight": (n,), "shift": (n,),
            "dy": (m, n), "dsum": (m, n), "u": (m, f), "b1": (f,), "da": (m, f), "w1": (f, n),
            "w2": (n, f), "scale": (m,),
        }  # fmt: skip
        if spec.get("gated"):
            shapes |= {"g": (m, f), "b_gate": (f,), "w_gate": (f, n)}
        self.tensors = {k: torch.randn(s) for k, s in shapes.items()}
        self.tensors["x"] *= spec.get("scale", 1.0)
        self.tensors["x"] += spec.get("offset", 0.0)
        for k in ("w1", "w2", "w_gate"):
            if k in shapes:
                self.tensors[k] *= shapes[k][1] ** -0.5
        self.target = torch.randint(f, (m,))
        self.half = spec.get("half", False)
        if self.half:
            for k in {"x", "w1", "w2", "w_gate"} & set(shapes):
                self.tensors[k] = self.tensors[k].bfloat16().float()
        with one_thread():
            self.right = self.results(torch.float64)
            if self.half:
                self.plain = [self.results(torch.bfloat16)]
                self.right = {k: x for k, x in self.right.items() if k.startswith("ffn_")}
            else:
                self.plain = [self.results(torch.float32), self.results(torch.float32, turned=True)]
            if "scale" in spec:  # plain PyTorch overflows
                self.plain = [{k: x.float() for k, x in self.right.items()}]
        numbers = {
            "M": m, "N": n, "F": f, "norm": NORMS[spec["norm"]], "act": ACTIVATIONS[spec["act"]],
            "seed": 2**40 + 7, "threads": 3, "eps": self.spec["eps"],
            "dropout_p": self.spec["dropout_p"], "smoothing": 0.125, "half": int(self.half),
        }  # fmt: skip
        self.arrays = {k: x.numpy() for k, x in self.tensors.items()}
        self.arrays["target"] = self.target.numpy()
        self.arrays |= {k: np.asarray(x) for k, x in numbers.items()}

    def results(self, dtype: torch.dtype, turned: bool = False) -> dict[str, Tensor]:
        """By the reference; turned: with sums over rows in another order."""
        t = {k: x.to(dtype, copy=True).requires_grad_() for k, x in self.tensors.items()}
        spec = self.spec
        p, seed = spec["dropout_p"], 2**40 + 7
        gate, gate_bias = t.get("g"), t.get("b_gate")

        y, s = reference.add_layer_norm(
            t["x"] + t["bias"], t["residual"], t["weight"], None, norm=spec["norm"],
            eps=spec["eps"], dropout_p=p, seed=seed,
        )  # fmt: skip
        y = y + t["shift"]
        a = reference.bias_act(
            t["u"], t["b1"], activation=spec["act"], gate=gate, gate_bias=gate_bias, dropout_p=p,
            seed=seed,
        )  # fmt: skip
        inner, _ = reference.add_layer_norm(
            t["x"], None, t["weight"], t["shift"] if spec["norm"] == "layer" else None,
            norm=spec["norm"], eps=spec["eps"],
        )  # fmt: skip
        if spec["norm"] == "rms":
            inner = inner + t["shift"]
        gated = inner @ t["w_gate"].T if "w_gate" in t else None
        u = inner @ t["w1"].T
        hidden = reference.bias_act(
            u, t["b1"], activation=spec["act"], gate=gated, gate_bias=gate_bias, dropout_p=p,
            seed=seed,
        )  # fmt: skip
        _, ffn_y = reference.add_layer_norm(
            hidden @ t["w2"].T + t["bias"], t["x"], norm=None, dropout_p=p, seed=seed
        )
        out = {"y": y, "s": s, "a": a, "a_again": a}
        out |= {"ffn_y": ffn_y, "ffn_u": u, "ffn_a": hidden}
        upstream = [self.tensors[k].to(dtype) for k in ("dy", "dsum")]
        names = ("x", "residual", "weight", "shift", "bias")
        grads = torch.autograd.grad((y, s), [t[k] for k in names], upstream, retain_graph=True)
        out |= dict(zip(("dx", "ds", "dweight", "dshift", "dbias"), grads, strict=True))
        names = ("u", "b1", *(("g", "b_gate") if gate is not None else ()))
        grads = torch.autograd.grad(a, [t[k] for k in names], self.tensors["da"].to(dtype))
        out |= dict(zip(("du", "db1", "dg", "db_gate"), grads, strict=False))
        logits = t["u"] + t["b1"]
        loss = F.cross_entropy(logits, self.target, label_smoothing=0.125, reduction="none")
        grads = torch.autograd.grad(loss, (t["u"], t["b1"]), t["scale"].detach())
        out |= {"loss": loss, "dlogits": grads[0], "dclass_bias": grads[1]}
        words = F.embedding(self.target, t["w1"], padding_idx=1) * 1.5
        emb, _ = reference.add_layer_norm(
            words + t["residual"], None, t["weight"], None, norm=spec["norm"], eps=spec["eps"]
        )
        _, emb = reference.add_layer_norm(emb + t["shift"], None, norm=None, dropout_p=p, seed=seed)
        names = ("w1", "residual", "weight", "shift")
        grads = torch.autograd.grad(emb, [t[k] for k in names], upstream[0])
        out |= {"emb_y": emb, "emb_dwords": grads[0], "emb_dpositions": grads[1]}
        out |= {"emb_dweight": grads[2], "emb_dshift": grads[3]}
        if turned:
            for total, of in (
                ("dshift", upstream[0]),
                ("dbias", out["dx"]),
                ("db1", out["du"]),
                ("dclass_bias", out["dlogits"]),
            ):
                out[total] = of.flip(0).cumsum(0)[-1]
        return {k: x.detach() for k, x in out.items()}

    def verdict(self, results: dict[str, np.ndarray]) -> str | None:
        """None where the results are right, else what is wrong with them."""
        try:
            for k, x in self.right.items():
                assert_within(k, torch.from_numpy(results[k]), x, [p[k] for p in self.plain])
        except AssertionError as error:
            return str(error).splitlines()[0]
        return None


KINDS = {
    "portable": (MUTATIONS, CASES),
    "avx512": (WIDE_MUTATIONS, WIDE_CASES),
    "amx": (TILE_MUTATIONS, TILE_CASES),
}
EVERY = [m for mutations, _ in KINDS.values() for m in mutations]


# A machine without AVX-512 or AMX never runs the kernels of the other kinds.
@pytest.fixture(scope="module", params=[isa for isa in KINDS if isa in cpu_isas()])
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    torch.manual_seed(0)
    isa = request.param
    mutations, cases = KINDS[isa]
    source = f"layernorm_ffn_{isa}.cpp"
    recipe = {
        "source": source, "beside": (f"embedding_{isa}.cpp",),
        "flags": (f"-DISA={isa}", f'-DSOURCE="{source}"'),
    }  # fmt: skip
    folder = tmp_path_factory.mktemp(f"ffn_mutants_{isa}")
    headers = () if isa == "portable" else ("immintrin.h",)
    made = {n: Case(spec) for n, spec in cases.items()}
    return Lab(folder, "ffn", mutations, made, recipe, headers)


@pytest.mark.parametrize("mutation", EVERY, ids=lambda m: m.name)
def test_mutation_has_its_place(mutation: Mutation) -> None:
    check_place(mutation)


def test_names_are_unique() -> None:
    check_names(EVERY)


def test_results_have_their_arguments() -> None:
    assert set(mutant_ffn.RESULTS) >= {"y", "dx", "a", "du", "ffn_y", "emb_y"}


def test_the_kernels_themselves_pass(lab: Lab) -> None:
    assert lab.failures(None) == {}


@pytest.mark.slow
def test_a_sample_of_mutations_is_caught(lab: Lab) -> None:
    assert lab.survivors(sample(lab.mutations)) == []


@pytest.mark.full
def test_every_mutation_is_caught(lab: Lab) -> None:
    assert lab.survivors(lab.mutations) == []
