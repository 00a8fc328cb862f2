"""The programs in examples/ do what they say, on a text of the test's own."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fastattn

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(autouse=True)
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program finds what lies beside it; these are loaded from elsewhere."""
    monkeypatch.syspath_prepend(EXAMPLES)


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def text_for_the_test() -> str:
    lines = [f"The square of {i} is {i * i}, and its cube is {i**3}.\n" for i in range(300)]
    return "".join(lines)


@pytest.mark.parametrize("more", [[], ["--layers", "2", "--dropout", "0.3"]], ids=["plain", "deep"])
def test_lstm_language_model(
    more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained by both, which agree to rounding at every step, dropout included."""
    example = load("lstm_language_model")
    text, picture = tmp_path / "text", tmp_path / "curve.png"
    text.write_text(text_for_the_test())
    trainers: list[Any] = []
    original = example.Trainer

    def remember(*args: Any) -> Any:
        trainers.append(original(*args))
        return trainers[-1]

    example.Trainer = remember
    arguments = ["--steps", "30", "--hidden", "24", "--length", "20", "--batch", "8"]
    figures = example.main([*arguments, "--text", str(text), "--plot", str(picture), *more])
    stock, fused = trainers
    assert type(stock.model.lstm) is torch.nn.LSTM
    assert type(fused.model.lstm).__module__ == "fastattn.nn.lstm"
    assert len(stock.losses) == len(fused.losses) == 30
    assert stock.losses[-1] < 0.8 * stock.losses[0]
    assert figures["apart"] == max(
        abs(a - b) for a, b in zip(stock.losses, fused.losses, strict=True)
    )
    assert figures["apart"] < 1e-3
    assert picture.stat().st_size > 1000
    out = capsys.readouterr().out
    assert "greatest difference of the losses" in out
    assert json.dumps(str(picture)).strip('"') in out


def test_text_of_gensim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The articles' text is found and cleaned; without gensim the program says what to install."""
    import bz2
    import types

    example = load("wikipedia_text")
    path = tmp_path / example.WIKIPEDIA
    path.parent.mkdir(parents=True)
    page = "<page><text xml:space='preserve'>'''Anarchism''' is a {{x|{{y}}}}[[a|word]]"
    page += "&lt;ref&gt;gone&lt;/ref&gt; &amp;amp; more.</text></page>"
    path.write_bytes(bz2.compress(page.encode()))
    found = types.SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    assert example.wikipedia() == "Anarchism is a word & more."
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"fastattn\[examples\]"):
        example.wikipedia()


def test_gpt_language_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both learn alike, and three ways to write give one text, character for character."""
    example = load("gpt_language_model")
    text, picture = tmp_path / "text", tmp_path / "curve.png"
    text.write_text(text_for_the_test())
    trainers: list[Any] = []
    original = example.Trainer

    def remember(*args: Any) -> Any:
        trainers.append(original(*args))
        return trainers[-1]

    example.Trainer = remember
    sizes = {
        "steps": 40, "width": 32, "layers": 2, "heads": 2, "length": 40, "batch": 8, "lr": 0.01,
        "prompts": 3, "prompt": 12, "rounds": 1, "text": text, "plot": picture,
    }  # fmt: skip
    figures = example.main([x for name, value in sizes.items() for x in (f"--{name}", str(value))])
    stock, fused = trainers
    homes = [type(m).__module__ for m in (stock.model.character, fused.model.character)]
    assert homes == ["torch.nn.modules.sparse", "fastattn.nn.embedding"]
    assert isinstance(fused.model.attentions[0], fastattn.nn.MultiheadAttention)
    assert not isinstance(stock.model.attentions[0], fastattn.nn.MultiheadAttention)
    assert stock.losses[-1] < 0.8 * stock.losses[0]
    assert figures["apart"] < 1e-3
    assert figures["same"] == 1.0
    assert set(figures) >= {"all again", "torch.cat", "KVCache"}
    assert picture.stat().st_size > 1000
    out = capsys.readouterr().out
    assert "same characters: 100.0%" in out
    # 3 sequences, 40 places, 2 layers, keys and values of 32 numbers.
    assert f"keys and values: {3 * 40 * 2 * 2 * 32 * 4 / 1e6:.1f} MB" in out
