"""`fastattn swap`, `bench` and `verify`, in this process: results, exit codes, and what a user gets
wrong. tests/test_cli.py runs the program itself."""

import inspect
import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers_models import ENCODER
from typer.testing import CliRunner

import fastattn
from fastattn.backends import cpu_isas
from fastattn.cli import bench as bench_command
from fastattn.cli.app import app
from fastattn.cli.verify import DTYPES, OPS
from fastattn.cli.verify_cases import CASES

MODELS = """
    import torch
    print("noise")

    def build():
        return torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)

    def example():
        return torch.randn(2, 9, 32)

    def plain():
        return torch.nn.Linear(3, 3)

    def boom():
        raise ValueError("no luck")

    class Loud(torch.nn.LayerNorm):
        def forward(self, x):
            print("noise")
            return super().forward(x)

    def loud():
        return torch.nn.Sequential(Loud(32), torch.nn.LayerNorm(32))

    def leaves():
        raise SystemExit(7)

    lstm = torch.nn.LSTM(8, 8)
    number = 3
    by_name = dict(src=torch.randn(2, 9, 32))
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the user's file, which is the current one."""
    (tmp_path / "zoo.py").write_text(textwrap.dedent(MODELS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*args: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, list(args))
    assert result.exit_code == code, (result.output, result.exception)
    return result


def as_json(*args: str, code: int = 0) -> dict[str, Any]:
    return json.loads(run(*args, "--json", code=code).stdout)


@pytest.mark.parametrize("spec", ["zoo:build", "zoo.py:build"])
def test_swap_reports_a_users_model(models: Path, spec: str) -> None:
    result = as_json("swap", spec)
    assert result["ok"]
    assert result["time"] is None
    assert [r["name"] for r in result["replaced"]] == ["", "self_attn", "norm1", "norm2"]
    assert "fastattn.nn.TransformerEncoderLayer" in run("swap", spec).stdout


@pytest.mark.parametrize("inputs", ["zoo.py:example", "zoo.py:by_name"])
def test_swap_compares_and_times(models: Path, inputs: str) -> None:
    time = as_json("swap", "zoo.py:build", "--time", "--inputs", inputs)["time"]
    assert time["agrees"]
    assert 0 < time["relative_error"] < 1e-5  # two computations, not one of them twice
    assert time["inputs"] == ["float32 (2, 9, 32)"]
    for key in ("stock_s", "fused_s", "speedup"):
        assert 0 < time[key]["q1"] <= time[key]["median"] <= time[key]["q3"]


def test_what_a_model_prints_is_not_on_stdout(models: Path) -> None:
    assert as_json("swap", "zoo.py:loud", "--time", "--inputs", "zoo.py:example")["ok"]


@pytest.mark.parametrize("command", ["swap x --time", "bench", "demo", "tune x"])
def test_more_threads_than_there_can_be(command: str) -> None:
    result = run(*command.split(), "--threads", "99999999999", code=2)
    assert "--threads" in result.stderr


def test_swap_sees_a_model_that_is_off(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = fastattn.nn.TransformerEncoderLayer.forward
    monkeypatch.setattr(
        fastattn.nn.TransformerEncoderLayer, "forward",
        lambda self, *args, **kwargs: forward(self, *args, **kwargs) * 1.01,
    )  # fmt: skip
    args = ("swap", "zoo.py:build", "--time", "--inputs", "zoo.py:example")
    result = as_json(*args, code=1)
    assert not result["ok"]
    assert 1e-3 < result["time"]["relative_error"] < 1e-1
    assert "OFF" in run(*args, code=1).stdout


def test_swap_says_what_it_leaves(models: Path) -> None:
    result = as_json("swap", "zoo.py:build", "--skip", "norm*", "--only", "nosuch", "--only", "*")
    assert [r["name"] for r in result["replaced"]] == ["self_attn"]
    assert any("nosuch" in note for note in result["notes"])


def test_swap_that_replaces_nothing_fails(models: Path) -> None:
    assert not as_json("swap", "zoo.py:plain", code=1)["ok"]
    assert "NOTHING WAS REPLACED" in run("swap", "zoo.py:plain", code=1).stdout


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**ENCODER))
    model.save_pretrained(folder)
    return folder


def test_swap_of_a_hugging_face_folder(bert: Path) -> None:
    result = as_json("swap", str(bert), "--time", "--batch", "2", "--tokens", "12")
    assert result["model"] == "BertForSequenceClassification"  # the class it was saved as
    assert result["time"]["agrees"]
    assert result["time"]["inputs"][0] == "int64 (2, 12)"


def test_a_report_needs_no_weights(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((bert / "config.json").read_text())
    structure = as_json("swap", str(tmp_path))
    assert structure["replaced"] == as_json("swap", str(bert), "--time")["replaced"]
    run("swap", str(tmp_path), "--time", code=2)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("zoo.py:boom",), "zoo.py:boom raised ValueError: no luck"),
        (("zoo.py:leaves",), "zoo.py:leaves ended with sys.exit(7)"),
        (("zoo.py:number",), "is no torch.nn.Module but of type builtins.int"),
        (("zoo.py:nosuch",), "zoo.py has no nosuch"),
        (("nosuch.py:x",), "no such file: nosuch.py"),
        (("no_such_module:x",), "no module named no_such_module"),
        ((":x",), "MODULE:NAME"),
        (("zoo",), "neither a folder nor MODULE:NAME"),
        (("bert-base-uncased",), "hf download bert-base-uncased"),
        ((".",), "no config.json"),
        (("zoo.py:build", "--time"), "--inputs MODULE:NAME is needed"),
        (("zoo.py:build", "--inputs", "zoo.py:example"), "--inputs goes with --time"),
        (("zoo.py:build", "--device", "nosuch"), "--device goes with --time"),
        (("zoo.py:build", "--dtype", "bf16"), "--dtype goes with --time"),
        (("zoo.py:build", "--threads", "1"), "--threads goes with --time"),
        (("zoo.py:build", "--batch", "1"), "--batch goes with --time"),
        (("zoo.py:build", "--tokens", "9"), "--tokens goes with --time"),
        (
            ("zoo.py:build", "--time", "--inputs", "zoo.py:example", "--batch", "2"),
            "without --inputs",
        ),
        (("zoo.py:build", "--time", "--inputs", "zoo.py:number"), "no tensor, tuple or dict"),
        (("zoo.py:lstm", "--time", "--inputs", "zoo.py:example"), "the model raised"),
        (("zoo.py:build", "--time", "--device", "nosuch"), "--device nosuch"),
    ],
)
def test_swap_answers_mistakes(models: Path, args: tuple[str, ...], says: str) -> None:
    result = run("swap", *args, code=2)
    assert result.stdout == ""
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("fastattn swap: ")
    assert says in last
    assert "Traceback" not in result.output


@pytest.mark.parametrize("command", ["bench", "verify"])
def test_an_op_that_there_is_not(command: str) -> None:
    assert "there are attention" in run(command, "--only", "attenton", code=2).stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_here(models: Path) -> None:
    args = ("swap", "zoo.py:build", "--time", "--inputs", "zoo.py:example", "--device", "cuda")
    assert "--device cuda cannot be used here" in run(*args, code=2).stderr


def test_a_broken_config_is_a_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    result = run("swap", str(tmp_path), code=2)
    assert "Traceback" not in result.output
    assert "no-such-model" in result.stderr


def test_verify_checks_every_public_op() -> None:
    """The ops of the package, but those that compute nothing."""
    others = {"SwapReport", "TuneReport", "backends", "debug_checks", "nn", "reference", "swap"}
    others |= {"tune", "unswap"}
    assert set(OPS) == set(fastattn.__all__) - others


FEW = ("bias_act", "rms_norm", "linear_cross_entropy")


def test_verify_runs_every_instruction_set_and_dtype() -> None:
    result = as_json("verify", "--backend", "cpu", *(a for op in FEW for a in ("--only", op)))
    assert result["ok"]
    rows = result["rows"]
    assert len(rows) == len(FEW) * len(cpu_isas()) * len(DTYPES)
    assert all(0 < row["error"] < 0.02 and row["verdict"] == "right" for row in rows)


@pytest.mark.parametrize("op", ["bias_act", "gru_cell"])
def test_verify_sees_a_wrong_op(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(fastattn, op)
    monkeypatch.setattr(fastattn, op, lambda *args, **kwargs: right(*args, **kwargs) * 1.05)
    result = as_json("verify", "--only", op, code=1)
    assert {row["verdict"] for row in result["rows"]} == {"wrong"}
    shown = run("verify", "--only", op, code=1).stdout
    assert "WRONG" in shown
    assert "off by" in shown


def test_verify_sees_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right outputs do not hide it."""

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, dx: torch.Tensor) -> torch.Tensor:
            return 2 * dx

    right = fastattn.rms_norm
    monkeypatch.setattr(fastattn, "rms_norm", lambda x, *a, **k: right(Doubled.apply(x), *a, **k))
    rows = as_json("verify", "--only", "rms_norm", code=1)["rows"]
    assert all("dx is off" in row["detail"] and "y is off" not in row["detail"] for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_verify_says_what_did_not_run() -> None:
    result = as_json("verify", "--only", "bias_act")
    assert {left["backend"] for left in result["not_run"]} == {"triton", "cuda"}
    assert "--backend triton cannot run here" in run("verify", "--backend", "triton", code=2).stderr


@pytest.mark.full
def test_verify_of_everything() -> None:
    result = as_json("verify")
    assert result["ok"]
    assert {row["case"] for row in result["rows"]} == {case.what for case in CASES}


def test_bench_times_both(capsys: pytest.CaptureFixture[str]) -> None:
    result = as_json("bench", "--only", "add_layer_norm", "--dtype", "fp32", "--seconds", "0.05")
    (row,) = result["rows"]
    assert (row["op"], row["dtype"]) == ("add_layer_norm", "fp32")
    assert row["torch_s"]["median"] > 0
    assert row["speedup"]["count"] >= 3
    assert result["environment"]["device"]
    bench_command.render(result)
    shown = capsys.readouterr().out
    assert f"{row['speedup']['median']:.2f} [" in shown
    assert "[quartiles]" in shown


def test_bench_knows_every_op() -> None:
    functions = {n: getattr(fastattn, n) for n in fastattn.__all__ if n != "swap"}
    ops = {
        name
        for name, f in functions.items()
        if inspect.isfunction(f) and "backend" in inspect.signature(f).parameters
    }
    assert ops == set(bench_command.OPS)


@pytest.mark.parametrize("case", bench_command.CASES, ids=lambda c: f"{c.op}: {c.what}")
def test_the_contestants_of_bench_compute_the_same(case: bench_command.Case) -> None:
    gen = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=gen) * (shape[-1] ** -0.5 if len(shape) == 2 else 1.0)

    stock, fused = (thunk() for thunk in case.make(randn, False))
    torch.testing.assert_close(fused, stock, atol=2e-4, rtol=2e-4)
