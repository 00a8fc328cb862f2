"""`fastattn.swap` on models with recurrent layers."""

import copy
import pickle

import pytest
import torch
from swap_tools import copies, judge_model
from torch import Tensor, nn
from torch.nn.utils import prune

import fastattn
from fastattn.nn import lstm as lstm_module
from fastattn.swap import swap, unswap


class Kept(nn.LSTM):
    """A subclass that keeps the forward."""

    def twice(self, x: Tensor) -> Tensor:
        return self(self(x)[0])[0]


class OwnForward(nn.GRU):
    def forward(self, x: Tensor, hx: Tensor | None = None) -> Tensor:
        return super().forward(x, hx)[0]


class OwnHelper(nn.GRU):
    def permute_hidden(self, hx: Tensor, permutation: Tensor | None) -> Tensor:
        return -super().permute_hidden(hx, permutation)


class HandMadeLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(4, 4)


class Model(nn.Module):
    """Every recurrent module once."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.lstm = nn.LSTM(6, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(16, 8, batch_first=True)
        self.rnn = nn.RNN(8, 8, batch_first=True, nonlinearity="relu")
        self.cells = nn.ModuleList([nn.LSTMCell(8, 8), nn.GRUCell(8, 8), nn.RNNCell(8, 8)])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.rnn(self.gru(self.lstm(self.embed(ids))[0])[0])[0][:, -1]
        h, _ = self.cells[0](x)
        return self.cells[2](self.cells[1](h))


def test_every_module() -> None:
    stock = Model()
    fused = copy.deepcopy(stock)
    report = swap(fused)
    assert report.count("recurrent") == 6
    assert not report.skipped
    assert type(fused.lstm) is fastattn.nn.LSTM
    assert type(fused.cells[1]) is fastattn.nn.GRUCell
    ids = torch.randint(11, (3, 5))
    judge_model(stock, fused, lambda m, t: {"y": m(ids)})
    weight = fused.lstm.weight_hh_l0
    assert [*fused.state_dict()] == [*stock.state_dict()]
    assert swap(fused).fused_before == 6
    assert unswap(fused)
    assert type(fused.lstm) is nn.LSTM
    assert fused.lstm.weight_hh_l0 is weight
    assert torch.equal(fused(ids), stock(ids))


def test_our_op_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, backends = Model(), []
    original = lstm_module.lstm
    monkeypatch.setattr(
        lstm_module, "lstm", lambda *a, **k: backends.append(k["backend"]) or original(*a, **k)
    )
    swap(model, backend="reference")
    model(torch.randint(11, (3, 5)))
    swap(model, only=nn.LSTM)
    model(torch.randint(11, (3, 5)))
    assert backends == ["reference", "auto"]


def test_a_subclass_with_torchs_forward() -> None:
    stock = Kept(4, 4)
    fused = copy.deepcopy(stock)
    assert swap(fused).replaced[0].by == "fastattn.nn.LSTM"
    assert isinstance(fused, (Kept, fastattn.nn.LSTM))
    x = torch.randn(5, 2, 4)
    torch.testing.assert_close(fused.twice(x), stock.twice(x))
    for model in copies(fused):
        assert type(model).__name__ == "Kept"
        assert torch.equal(model.twice(x), fused.twice(x))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`", "ignore:torch.ao.quantization")
def test_left_alone() -> None:
    model = nn.ModuleDict({
        "fine": nn.LSTM(4, 4),
        "old_weight_norm": nn.utils.weight_norm(nn.LSTM(4, 4), "weight_hh_l0"),
        "weight_norm": nn.utils.parametrizations.weight_norm(nn.GRU(4, 4), "weight_hh_l0"),
        "pruned": prune.l1_unstructured(nn.GRUCell(4, 4), "weight_hh", 3),
        "own_forward": OwnForward(4, 4),
        "helper": OwnHelper(4, 4),
        "hand_made": HandMadeLSTM(),
        "quantised": torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.LSTM(4, 4)))[0],
    })  # fmt: skip
    before = {n: type(m) for n, m in model.items()}
    x, outputs = torch.randn(5, 2, 4), {}
    for name in ("old_weight_norm", "weight_norm", "helper"):
        outputs[name] = model[name](x, torch.zeros(1, 2, 4) if name == "helper" else None)[0]
    report = swap(model)
    assert [r.name for r in report.replaced] == ["fine"]
    whys = {s.name: s.why for s in report.skipped}
    assert whys == {
        "old_weight_norm": "its weights are computed ones (weight norm, a parametrisation, "
        "pruning)",
        "weight_norm": whys["old_weight_norm"],
        "pruned": whys["old_weight_norm"],
        "own_forward": "a subclass of torch.nn.GRU with a forward of its own",
        "helper": "a subclass of torch.nn.GRU with a permute_hidden of its own",
        "hand_made": "a class that the swap does not know",
        "quantised": "it is quantised",
    }
    assert {s.kind for s in report.skipped} == {"recurrent"}
    assert {n: type(m) for n, m in model.items() if n != "fine"} == {
        n: c for n, c in before.items() if n != "fine"
    }
    for name, right in outputs.items():
        got = model[name](x, torch.zeros(1, 2, 4) if name == "helper" else None)[0]
        assert torch.equal(got, right)


def test_nothing_swapped_says_why() -> None:
    with pytest.warns(UserWarning, match=r"replaced nothing in OwnForward .*forward of its own"):
        assert not swap(OwnForward(4, 4))


def test_pickled_with_the_model() -> None:
    model = Model()
    swap(model, backend="reference")
    again = pickle.loads(pickle.dumps(model))
    ids = torch.randint(11, (3, 5))
    assert torch.equal(again(ids), model(ids))
    assert again.lstm.backend == "reference"
    assert unswap(again)
    assert type(again.lstm) is nn.LSTM
