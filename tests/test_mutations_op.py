"""Bugs planted in ops that are one binding, and in the kernels behind it: the op's own tests must
fail.

A mutant is the binding and its kernels as a library, which takes the place of the built one, or a
Python file; see mutant_op.py. Of a library only what includes the changed file is compiled anew.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from mutation_lab import (
    CPU,
    FLAGS,
    HERE,
    JOBS,
    check_names,
    check_place,
    compiler,
    mutate,
    with_headers,
)  # fmt: skip
from mutations import Mutation, sample
from mutations_op import (
    DECODER_MUTATIONS,
    INPUTS_MUTATIONS,
    LAYER_MUTATIONS,
    PRODUCT_MUTATIONS,
    STEP_MUTATIONS,
)

from fastattn.backends import cpu_isas

ROOT = HERE.parent
_TORCH = Path(torch.__file__).parent
_WITH_TORCH = ("-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{_TORCH / 'include'}")  # setup.py
_LIBRARIES = (f"-L{_TORCH / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10")
_HEADERS = (
    *("algorithm", "array", "cmath", "optional", "string", "tuple", "vector"),
    *("torch/csrc/inductor/aoti_torch/c/shim.h", "torch/csrc/stable/library.h"),
    *("torch/csrc/stable/ops.h", "torch/csrc/stable/tensor.h"),
    *("torch/headeronly/core/ScalarType.h", "torch/headeronly/util/Exception.h"),
)
# The products of few tokens want vectors: the portable kernels leave them to the library.
_WIDEST = [isa for isa in cpu_isas() if isa != "amx"][-1]
# name -> what is compiled, its definitions, the op's tests, planted bugs.
OPS: dict[str, tuple[tuple[str, ...], tuple[str, ...], str, tuple[Mutation, ...]]] = {
    "step": (
        ("../bindings/recurrent_step.cpp",),
        ("-DSTEP", "-DISA=portable"), "test_recurrent_step.py", STEP_MUTATIONS,
    ),
    "layer": (
        ("../bindings/encoder_layer.cpp", "../bindings/products.cpp",
         f"attention_{_WIDEST}.cpp", f"layernorm_ffn_{_WIDEST}.cpp"),
        (f"-DISA={_WIDEST}",), "test_encoder_layer_op.py", LAYER_MUTATIONS,
    ),
    "decoder": (
        ("../bindings/decoder_layer.cpp", "../bindings/products.cpp",
         f"attention_kv_cache_{_WIDEST}.cpp", f"layernorm_ffn_{_WIDEST}.cpp"),
        (f"-DISA={_WIDEST}", "-DCACHE"), "test_decoder_layer.py", DECODER_MUTATIONS,
    ),
    "products": (
        ("../bindings/products.cpp", f"layernorm_ffn_{_WIDEST}.cpp"),
        (f"-DISA={_WIDEST}", "-DPRODUCTS"), "test_products.py", PRODUCT_MUTATIONS,
    ),
    "inputs": (
        ("../bindings/recurrent.cpp", "../bindings/products.cpp",
         f"recurrent_{_WIDEST}.cpp", f"layernorm_ffn_{_WIDEST}.cpp"),
        (f"-DISA={_WIDEST}", "-DINPUTS", "-O2"), "test_recurrent_inputs.py", INPUTS_MUTATIONS,
    ),
}  # fmt: skip
EVERY = [m for *_, mutations in OPS.values() for m in mutations]


class OpLab:
    """The objects of an op as they are, and a folder to build its mutants in."""

    def __init__(self, folder: Path, op: str) -> None:
        self.folder = folder
        self.sources, definitions, tests, self.mutations = OPS[op]
        # A test that fails says enough.
        self.tests = [str(HERE / tests), "-x", "-q", "-p", "no:xdist", "-o", f"cache_dir={folder}"]
        flags = ("-fPIC", *definitions)
        self.flags = {
            False: flags,
            True: with_headers(folder, (*flags, *_WITH_TORCH), _HEADERS, ()),
        }
        home = self._copy("none")
        with ThreadPoolExecutor(JOBS) as pool:
            sources = [str(HERE / "mutant_op_shim.cpp"), *self.sources]
            self.objects = dict(zip(sources, pool.map(lambda s: self._object(home, s), sources),
                                    strict=True))  # fmt: skip

    def _copy(self, name: str) -> Path:
        """csrc/cpu, with all around it that it includes."""
        home = self.folder / name / "cpu"
        shutil.rmtree(home.parent, ignore_errors=True)  # of the sample, before all
        shutil.copytree(CPU, home)
        shutil.copytree(CPU.parent / "bindings", home.parent / "bindings")
        shutil.copy(CPU.parent / "operands.h", home.parent)
        return home

    def _object(self, home: Path, source: str) -> Path:
        out = home.parent / Path(source).with_suffix(".o").name
        flags = self.flags[source.startswith("../bindings")]
        command = [*compiler(), *FLAGS, *flags, "-MMD", f"-I{home}", "-c", str(home / source)]
        done = subprocess.run([*command, "-o", out], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{home.parent.name} does not compile:\n{done.stderr}"
        return out

    def mutant(self, mutation: Mutation | None) -> str:
        """As mutant_op.py takes it."""
        if mutation is not None and mutation.file.endswith(".py"):
            source = (CPU / mutation.file).resolve()
            file = self.folder / f"{mutation.name}.py"
            file.write_text(mutate(source.read_text(), mutation))
            return f"{'.'.join(source.relative_to(ROOT).with_suffix('').parts)}={file}"
        objects, home = [*self.objects.values()], self.folder / "none" / "cpu"
        if mutation is not None:
            home = self._copy(mutation.name)
            file = home / mutation.file
            file.write_text(mutate(file.read_text(), mutation))
            changed = f"/{file.name}"
            objects = [
                self._object(home, source) if changed in f"{base.with_suffix('.d').read_text()}"
                else base for source, base in self.objects.items()
            ]  # fmt: skip
        library = home.parent / "mutant.so"
        subprocess.run([*compiler(), "-shared", *objects, *_LIBRARIES, "-o", library], check=True)
        return str(library)

    def failures(self, mutations: Sequence[Mutation | None]) -> list[list[str]]:
        """The tests that failed, by mutation; a death is found by all."""
        with ThreadPoolExecutor(JOBS) as pool:
            mutants = [*pool.map(self.mutant, mutations)]
        out = self.folder / "out.json"
        path = os.pathsep.join([str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, HERE / "mutant_op.py", out, *mutants, "--", *self.tests]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path}, cwd=ROOT)
        found = json.loads(out.read_text())
        for mutant in mutants:  # 0: all passed, 1: some failed
            assert found[mutant]["code"] in (0, 1) or found[mutant]["code"] < 0, found[mutant]
        return [["(all)"] if found[m]["code"] < 0 else found[m]["failed"] for m in mutants]

    def survivors(self, mutations: Sequence[Mutation]) -> list[str]:
        """Of these; the op as it is must pass, or it is no wonder that they fail."""
        right, *found = self.failures([None, *mutations])
        assert right == []
        for mutation, failed in zip(mutations, found, strict=True):
            print(f"{mutation.name:30} {' '.join(failed) or 'SURVIVES'}")
        return [m.name for m, failed in zip(mutations, found, strict=True) if not failed]


@pytest.fixture(scope="module")
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> OpLab:
    return OpLab(tmp_path_factory.mktemp(f"{request.param}_mutants"), request.param)


@pytest.mark.parametrize("mutation", EVERY, ids=lambda m: m.name)
def test_mutation_has_its_place(mutation: Mutation) -> None:
    check_place(mutation)


def test_names_are_unique() -> None:
    check_names(EVERY)


# The tests of "inputs" take half a minute a mutant: all of them or none.
@pytest.mark.slow
@pytest.mark.parametrize("lab", [op for op in OPS if op != "inputs"], indirect=True)
def test_a_sample_of_mutations_is_caught(lab: OpLab) -> None:
    """Every eighth: each runs the tests in a process of its own."""
    assert lab.survivors(sample(lab.mutations, every=8)) == []


@pytest.mark.full
@pytest.mark.parametrize("lab", OPS, indirect=True)
def test_every_mutation_is_caught(lab: OpLab) -> None:
    assert lab.survivors(lab.mutations) == []
