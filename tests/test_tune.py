"""``fastattn.tune`` and its cache."""

import json
import math
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastattn
from fastattn import choices
from fastattn.cli import bench
from fastattn.tune import GAIN, TUNED, decide

randn = torch.randn
Args = dict[str, Any]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of the test's own, empty."""
    monkeypatch.setenv("FASTATTN_TUNE_CACHE", str(tmp_path / "cache"))
    choices.forget()
    yield tmp_path / "cache"
    choices.forget()


# --- what auto takes ---------------------------------------------------------------------------


def _attend(**more: Any) -> Tensor:
    torch.manual_seed(3)
    return fastattn.attention(*(randn(1, 2, 33, 8) for _ in range(3)), **more)


def _attend_twice() -> None:
    _attend()
    _attend(causal=True)


CLASS = "attention cpu float32 inference 1x64x64 2 2 8 8 0 ------ -1,-1,-,-,0,+"
STOCK: dict[str, Any] = {"backend": "torch", "usual": "cpu", "seconds": {}}
OURS = {**STOCK, "backend": "cpu"}


@pytest.fixture
def stock_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry a call of torch's attention."""
    from fastattn.ops import stock

    calls: list[int] = []
    plain = stock._sdpa

    def counted(*args: Any) -> Tensor:
        calls.append(1)
        return plain(*args)

    monkeypatch.setattr(stock, "_sdpa", counted)
    return calls


def test_without_a_file_nothing_changes(stock_calls: list[int], cache: Path) -> None:
    assert torch.equal(_attend(), _attend(backend="cpu"))
    assert not stock_calls
    assert not cache.exists()


def test_a_choice_is_taken_and_an_explicit_backend_wins(stock_calls: list[int]) -> None:
    choices.store({CLASS: STOCK})
    _attend()
    assert len(stock_calls) == 1
    ours = _attend(backend="cpu")
    assert len(stock_calls) == 1
    # Read anew, as another process would, and the other way round.
    choices.store({CLASS: OURS})
    choices.forget()
    assert torch.equal(_attend(), ours)
    assert len(stock_calls) == 1


def test_a_choice_is_for_its_class_alone(stock_calls: list[int]) -> None:
    choices.store({CLASS: STOCK})
    _attend(causal=True)
    _attend(return_lse=True)
    fastattn.attention(*(randn(1, 2, 65, 8) for _ in range(3)))
    fastattn.attention(*(randn(1, 2, 33, 8, dtype=torch.bfloat16) for _ in range(3)))
    fastattn.attention(*(randn(1, 2, 33, 8, requires_grad=True) for _ in range(3)))
    assert not stock_calls
    fastattn.attention(*(randn(1, 2, 64, 8) for _ in range(3)))  # rounded up: the same class
    assert stock_calls


def test_what_the_table_says_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    choices.store({CLASS: OURS})
    monkeypatch.setattr(choices, "pick", None)
    assert torch.equal(_attend(), _attend(backend="cpu"))


def test_a_choice_that_cannot_serve_is_passed_over() -> None:
    choices.store({CLASS: {**STOCK, "backend": "cuda"}})
    assert torch.equal(_attend(), _attend(backend="cpu"))
    lse = CLASS.replace("-1,-1,-,-,0,+", "-1,-1,-,+,0,+")
    choices.store({lse: STOCK})  # by hand: torch returns no lse
    assert len(_attend(return_lse=True)) == 2


def test_compiled_graphs_take_the_table(stock_calls: list[int]) -> None:
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    compiled = torch.compile(lambda q: fastattn.attention(q, q, q), backend=counter, fullgraph=True)
    q = randn(1, 2, 33, 8)
    before = compiled(q)
    choices.store({CLASS: STOCK})
    fastattn.attention(q, q, q)
    assert len(stock_calls) == 1
    assert torch.equal(compiled(q), before)
    assert (counter.frame_count, len(stock_calls)) == (1, 1)


# --- the file ----------------------------------------------------------------------------------


def _broken(cache: Path, change: Callable[[Any], Any]) -> None:
    path = choices.store({CLASS: STOCK})
    path.write_text(change(json.loads(path.read_text())))
    choices.forget()


def _with(**more: Any) -> Callable[[Any], str]:
    return lambda stored: json.dumps({**stored, **more})


BROKEN: dict[str, tuple[Callable[[Any], str], str]] = {
    "cut off": (lambda stored: json.dumps(stored)[:40], "not JSON"),
    "empty": (lambda stored: "", "not JSON"),
    "a list": (lambda stored: "[1]", "not of format"),
    "a later format": (_with(format=99), "not of format"),
    "another machine": (_with(machine={"cpu": "abacus"}), "another machine"),
    "no choices": (_with(choices=None), "no choices"),
    "unknown backend": (_with(choices={CLASS: {"backend": "x", "time": 1}}), "a choice that is"),
    "not even a dict": (_with(choices={CLASS: 7}), "a choice that is"),
    "nested without an end": (lambda stored: "[" * 200_000, "not JSON"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_bad_file_is_ignored_with_one_warning(
    name: str, cache: Path, stock_calls: list[int]
) -> None:
    change, why = BROKEN[name]
    _broken(cache, change)
    with pytest.warns(UserWarning, match=why) as caught:
        _attend_twice()
    assert len(caught) == 1
    assert not stock_calls
    # What is stored next does not need the bad file, and the good entries are taken.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        choices.store({CLASS: STOCK})
    _attend()
    assert stock_calls


@pytest.mark.parametrize("kind", ["a link to nothing", "a link to itself", "a folder", "a pipe"])
def test_what_is_no_file_is_ignored_with_one_warning(
    kind: str, stock_calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = choices.store({CLASS: STOCK})
    bad = good.with_name(good.name.replace("tmp", "bad"))
    if kind.startswith("a link"):
        bad.symlink_to("absent" if kind == "a link to nothing" else bad.name)
    elif kind == "a folder":
        bad.mkdir()
    else:
        os.mkfifo(bad)
    choices.forget()
    with pytest.warns(UserWarning, match=re.escape(str(bad))) as caught:
        _attend_twice()
    assert len(caught) == 1
    assert len(stock_calls) == 1  # the other file counts
    with pytest.warns(UserWarning, match=re.escape(str(bad))):
        choices.store({"x": OURS})
    with pytest.warns(UserWarning, match=re.escape(str(bad))):
        assert set(choices.load().entries) == {CLASS, "x"}


def test_a_file_that_another_writer_replaces_is_read_where_it_went(
    stock_calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = choices.store({CLASS: STOCK})
    choices.forget()
    plain = choices._text_of

    def late(file: Path) -> str:
        if file == first and first.exists():
            monkeypatch.setattr(choices, "_text_of", plain)
            first.rename(first.with_name(first.name.replace("tmp", "new")))
        return plain(file)

    monkeypatch.setattr(choices, "_text_of", late)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _attend()
    assert stock_calls


def test_choices_follow_the_thread_count(stock_calls: list[int]) -> None:
    threads = torch.get_num_threads()
    choices.store({CLASS: STOCK})
    _attend()
    assert len(stock_calls) == 1
    torch.set_num_threads(threads + 1)
    with pytest.warns(UserWarning, match="thread count") as caught:
        _attend_twice()
    assert (len(caught), len(stock_calls)) == (1, 1)
    torch.set_num_threads(threads)
    _attend()
    assert len(stock_calls) == 2
    torch.set_num_threads(threads + 1)
    with warnings.catch_warnings():  # read once a count
        warnings.simplefilter("error")
        _attend_twice()
    assert len(stock_calls) == 2
    choices.store({CLASS: STOCK})
    _attend()
    assert len(stock_calls) == 3
    torch.set_num_threads(threads)
    choices.store({CLASS: OURS})
    _attend()
    torch.set_num_threads(threads + 1)
    _attend()
    assert len(stock_calls) == 4


def test_only_foreign_files(cache: Path, stock_calls: list[int]) -> None:
    """Of another thread count, such as a shared home or a new torch leave them."""
    choices.store({CLASS: STOCK})
    choices.forget()
    torch.set_num_threads(torch.get_num_threads() + 1)
    with pytest.warns(UserWarning, match="another machine, thread count or version") as caught:
        _attend_twice()
    assert len(caught) == 1
    assert not stock_calls
    # With choices of its own a machine has nothing to say about others'.
    choices.store({CLASS: STOCK})
    choices.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _attend()
    assert stock_calls


def test_a_folder_that_is_none(cache: Path) -> None:
    cache.write_text("a file")
    assert torch.equal(_attend(), _attend(backend="cpu"))
    with pytest.raises(OSError, match="cache"):
        choices.store({CLASS: STOCK})


WRITER = """
import sys, time
from fastattn import choices
mine, other = sys.argv[1], sys.argv[2]
folder = choices.folder()
folder.mkdir(parents=True, exist_ok=True)
(folder / f"ready-{mine}").touch()
while not (folder / f"ready-{other}").exists():
    time.sleep(0.001)
for i in range(40):
    choices.store({f"{mine} {i}": {"backend": "cpu", "usual": "cpu", "seconds": {}}})
"""


def test_two_writers_lose_nothing(cache: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, *names], env=environment)
        for names in (("a", "b"), ("b", "a"))
    ]
    assert [w.wait(300) for w in writers] == [0, 0]
    assert set(choices.load().entries) == {f"{who} {i}" for who in "ab" for i in range(40)}
    assert not list(cache.glob("*.part"))
    assert len(list(cache.glob("tune-*.json"))) <= 2


def test_the_newest_choice_counts(cache: Path, stock_calls: list[int]) -> None:
    """Two files that know the same class, as two writers may leave them."""
    first = choices.store({CLASS: OURS})
    older = first.read_text()
    choices.store({CLASS: STOCK})
    first.with_name(first.name.replace("tmp", "zzz")).write_text(older)
    choices.forget()
    _attend()
    assert stock_calls


# --- the command ---------------------------------------------------------------------------------

MODEL = """
import torch
def make():
    return torch.nn.LSTM(8, 8), torch.zeros(3, 2, 8)
def alone():
    return torch.nn.LayerNorm(8)
inputs = torch.zeros(3, 8)
def nothing():
    return 7
three = 3
narrow = torch.zeros(3, 7)
class Broken(torch.nn.Module):
    def forward(self, x):
        return {}["x"]
def broken():
    return Broken()
"""


def _command(*args: str) -> Any:
    from typer.testing import CliRunner

    from fastattn.cli.app import app

    return CliRunner().invoke(app, ["tune", "--seconds", "0.01", *args])


def test_the_command_tunes_a_model(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(MODEL)
    done = _command(f"{path}:make", "--training", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert [row["class"].split()[0] for row in result["rows"]] == ["lstm"]
    assert set(result["rows"][0]["seconds"]) == {"cpu", "torch"}
    assert Path(result["path"]).parent == cache
    done = _command(f"{path}:alone", "--inputs", f"{path}:inputs", "--dry-run")
    assert done.exit_code == 0, done.output
    assert "layer_norm" in done.stdout
    assert "nothing stored" in done.stdout
    assert len(list(cache.iterdir())) == 1


def test_the_command_tunes_a_file(tmp_path: Path) -> None:
    path = tmp_path / "calls.json"
    calls: list[dict[str, Any]] = [
        {"op": "attention", "H": 2, "S": 9, "D": 8, "causal": True, "dtype": "bf16"},
        {"op": "layer_norm", "rows": 3, "D": 8}, {"op": "rms_norm", "rows": 3, "D": 8},
        {"op": "add_layer_norm", "rows": 3, "D": 8}, {"op": "layernorm_ffn", "rows": 3, "D": 8},
        {"op": "lstm", "T": 3, "I": 4, "H": 8, "layers": 2, "bidirectional": True},
        {"op": "gru", "T": 3, "B": 2, "I": 4, "H": 8},
    ]  # fmt: skip
    path.write_text(json.dumps(calls))
    done = _command(str(path), "--json")
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["rows"]
    assert [row["class"].split()[0] for row in rows] == [call["op"] for call in calls]


MISTAKES: dict[str, tuple[str, str]] = {
    "no file": ("absent.json", "No such file"),
    "no module": ("absent_module:make", "no module named absent_module"),
    "no name": ("mine.py:absent", "has no absent"),
    "no form": ("mine", "is not of the form"),
    "no model": ("mine.py:nothing", "is no torch.nn.Module"),
    "no inputs": ("mine.py:alone", "--inputs MODULE:NAME is needed"),
    "not JSON": ("text.json", "is not JSON"),
    "not a list": ("dict.json", "must hold a list of calls"),
    "unknown op": ("op.json", "call 0: op must be one of"),
    "missing size": ("size.json", r"missing: ['S', 'D']"),
    "bad size": ("bad.json", "H must be an int of at least 1, got -3"),
    "nested without an end": ("deep.json", "is not JSON"),
    "op that is none": ("op_list.json", "call 0: op must be one of"),
    "dtype that is none": ("dtype_list.json", "dtype must be one of"),
    "flag that is none": ("flag.json", "causal must be true or false, got 1"),
    "device that is none": ("device_int.json", "device must be a string"),
    "no such device": ("device.json", "call 0: Expected one of cpu, cuda"),
    "too large": ("large.json", "can't allocate memory"),
    "larger than a tensor can be": ("larger.json", "call 0: Storage size calculation overflowed"),
    "larger than 64 bits": ("largest.json", "Overflow when unpacking"),
    "inputs that are none": ("mine.py:alone --inputs mine.py:three", "is no tensor, tuple or dict"),
    "inputs of another model": ("mine.py:alone --inputs mine.py:narrow", "x must end in"),
    "a model that raises": (
        "mine.py:broken --inputs mine.py:inputs",
        "raised KeyError: 'x'",
    ),
}
_ROWS = '[{"op": "layer_norm", "rows": %s, "D": 8}]'
FILES = {
    "mine.py": MODEL,
    "text.json": "[",
    "deep.json": "[" * 200_000,
    "dict.json": "{}",
    "op.json": '[{"op": "convolution"}]',
    "op_list.json": '[{"op": ["attention"]}]',
    "size.json": '[{"op": "attention", "H": 2}]',
    "bad.json": '[{"op": "attention", "H": -3, "S": 1, "D": 1}]',
    "dtype_list.json": '[{"op": "layer_norm", "rows": 1, "D": 8, "dtype": ["fp32"]}]',
    "flag.json": '[{"op": "attention", "H": 1, "S": 1, "D": 8, "causal": 1}]',
    "device_int.json": '[{"op": "layer_norm", "rows": 1, "D": 8, "device": 3}]',
    "device.json": '[{"op": "layer_norm", "rows": 1, "D": 8, "device": "abacus"}]',
    "large.json": _ROWS % 10**13,
    "larger.json": _ROWS % 2**62,
    "largest.json": _ROWS % 10**30,
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    for file, text in FILES.items():
        (tmp_path / file).write_text(text)
    monkeypatch.chdir(tmp_path)
    what, why = MISTAKES[name]
    done = _command(*what.split())
    assert done.exit_code == 2, done.output
    assert why in done.stderr
    assert done.stderr.startswith("fastattn tune: ")
    assert len(done.stderr.splitlines()) == 1
    assert not cache.exists()


@pytest.mark.parametrize("where", ["a file", "below a file"])
def test_a_folder_that_cannot_be_is_known_before_anything_is_measured(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    (tmp_path / "mine.py").write_text(MODEL)
    named = file if where == "a file" else file / "cache"
    monkeypatch.setenv("FASTATTN_TUNE_CACHE", str(named))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules["fastattn.tune"], "_measure", None)
    done = _command(*["mine.py:alone", "--inputs", "mine.py:inputs"])
    assert done.exit_code == 2, done.output
    assert str(named) in done.stderr
    assert re.search("exists|directory", done.stderr)
    assert len(done.stderr.splitlines()) == 1


def test_the_folder_may_be_of_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FASTATTN_TUNE_CACHE", "~/choices")
    assert choices.folder() == tmp_path / "choices"


# --- tune --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0, -1.0, math.nan, math.inf, "1", None, True])
def test_seconds_are_some(seconds: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="fastattn.tune: seconds must be"):
        fastattn.tune(fastattn.nn.LayerNorm(8), randn(2, 8), seconds=seconds)


def test_what_cannot_be_called() -> None:
    with pytest.raises(TypeError, match="model must be callable, got NoneType"):
        fastattn.tune(None, randn(2, 8))  # type: ignore[arg-type]


def test_the_usual_backend_stays_within_noise() -> None:
    assert decide("cpu", {"cpu": [1.0] * 9, "torch": [1.0 / (GAIN - 0.01)] * 9})[0] == "cpu"
    assert decide("cpu", {"cpu": [1.0] * 9, "torch": [0.5] * 9}) == ("torch", 2.0)
    assert decide("cpu", {"cpu": [1.0] * 9, "torch": [0.5] * 6 + [2.0] * 3})[0] == "cpu"
    few = {"cpu": [6e-6] * 9, "torch": [4e-6] * 9}  # looking it up would cost as much
    assert decide("cpu", few)[0] == "cpu"
    three = {"cuda": [1.0] * 9, "triton": [0.8] * 9, "torch": [0.7] * 9}
    assert decide("cuda", three)[0] == "torch"


def _model() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 3), fastattn.nn.LSTM(32, 16))


class _First(nn.Module):
    """The output of an LSTM without its states."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = _model()
        fastattn.swap(self.inner)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]  # type: ignore[no-any-return]


def test_a_model_is_tuned_and_auto_takes_what_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn.measure import interleave

    module = sys.modules["fastattn.tune"]

    def torch_wins(fns: dict[str, Callable[[], object]], **_: Any) -> dict[str, list[float]]:
        interleave(fns, rounds=1, warmup=1, min_seconds=0.0)  # every contestant does run
        return {name: [0.5 if name == "torch" else 1.0] * 5 for name in fns}

    monkeypatch.setattr(module.measure, "interleave", torch_wins)
    model, x = _First(), randn(2, 9, 32)
    before = model.train()(x)
    seen: list[tuple[int, int]] = []
    report = fastattn.tune(model, x, progress=lambda done, of, _: seen.append((done, of)))
    ops = [row.name.split()[0] for row in report.rows]
    assert ops == ["attention", "add_layer_norm", "layernorm_ffn", "lstm"]  # one of equal layers
    assert seen == [(i, 4) for i in range(4)]
    assert all(
        row.chosen == "torch" and set(row.seconds) == {"cpu", "torch"} for row in report.rows
    )
    assert report.path is not None
    assert "torch" in str(report)
    assert all("training" in row.name for row in report.rows)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    assert sys.getprofile() is None
    assert choices.observer is None

    report = fastattn.tune(model.eval(), [x, randn(2, 30, 32)])
    kinds = [row.name.split()[0] for row in report.rows]
    assert kinds == ["encoder_layer", "lstm"] * 2  # two lengths
    with torch.no_grad():
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    assert len(choices.load().entries) == 8


def test_examples_come_in_three_forms() -> None:
    def call(x: Tensor, weight: Tensor | None = None) -> object:
        return fastattn.layer_norm(x, 8, weight)

    x = randn(3, 8)
    for example in (x, (x, torch.ones(8)), {"x": x, "weight": torch.ones(8)}):
        report = fastattn.tune(call, example, seconds=0.01, store=False)
        assert [row.usual for row in report.rows] == ["cpu"]
        assert report.path is None


def test_every_op_is_tuned_or_has_no_op_of_torchs() -> None:
    from fastattn.backends import WITHOUT_STOCK

    tuned = {op.__name__ for op in TUNED}
    ops = {n for n in fastattn.__all__ if n in bench.OPS}
    assert tuned - ops == {"encoder_layer"}
    assert ops - tuned == set(WITHOUT_STOCK) - {"decoder_layer"}
    assert all(name in (fastattn.tune.__doc__ or "") for name in WITHOUT_STOCK[:2])


def test_what_has_one_backend_is_reported_too(cache: Path) -> None:
    def call(q: Tensor) -> object:
        return fastattn.attention(q, q, q, window=(2, 0))

    (row,) = fastattn.tune(call, randn(1, 2, 9, 8), seconds=0.01).rows
    assert (row.chosen, set(row.seconds)) == ("cpu", {"cpu"})


def test_nothing_to_tune(cache: Path) -> None:
    with pytest.raises(ValueError, match=r"fastattn\.swap\(model\) first"):
        fastattn.tune(nn.Linear(3, 3), randn(2, 3))
    cache_of = torch.zeros(1, 2, 8, 4)
    with pytest.raises(ValueError, match="none of the ops that are tuned .* they are attention, "):
        fastattn.tune(
            lambda q: fastattn.attention_with_kv_cache(
                q, cache_of, cache_of.clone(), cache_lens=torch.tensor([3])
            ),
            randn(1, 2, 1, 4),
        )
    with pytest.raises(ZeroDivisionError):
        fastattn.tune(lambda: 1 // 0, ())
    assert sys.getprofile() is None
    assert choices.observer is None
    assert not cache.exists()
