"""`fastattn.nn.LSTM`, `GRU`, `RNN` and their cells against torch's."""

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from swap_tools import copies, judge_model
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves

import fastattn
from fastattn.backends import PerformanceWarning

I_, H = 5, 7
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_bias": {"bias": False},
    "batch_first": {"batch_first": True},
    "layers": {"num_layers": 3, "bidirectional": True},
    "all": {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False},
    "relu": {"nonlinearity": "relu"},
    "projection": {"proj_size": 3},
    "projection_all": {"proj_size": 3, "num_layers": 2, "bidirectional": True, "bias": False},
}
MODULES = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")
OF = {"relu": ("RNN",), "projection": ("LSTM",), "projection_all": ("LSTM",)}
LAYERS = [(n, o) for o in OPTIONS for n in OF.get(o, ("LSTM", "GRU", "RNN"))]
CELLS = [("LSTMCell", {}), ("GRUCell", {}), ("RNNCell", {}), ("GRUCell", {"bias": False}),
         ("RNNCell", {"nonlinearity": "relu"}), ("LSTMCell", {"bias": False})]  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")


def pair(name: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Torch's module and ours, from one seed."""
    made = []
    for where in (nn, fastattn.nn):
        torch.manual_seed(3)
        made.append(getattr(where, name)(*(args or (I_, H)), **kwargs))
    return made[0], made[1]


def state_of(m: Any, *batch: int, dtype: torch.dtype = torch.float32) -> Any:
    count = m.num_layers * (2 if m.bidirectional else 1)
    h = torch.randn(count, *batch, m.proj_size or m.hidden_size, dtype=dtype)
    if isinstance(m, nn.LSTM):
        return h, torch.randn(count, *batch, m.hidden_size, dtype=dtype)
    return h


def flat(result: Any) -> dict[str, Tensor]:
    """Output and states of a module by name."""
    y, last = result
    y = y.data if isinstance(y, PackedSequence) else y
    states = last if isinstance(last, tuple) else (last,)
    return {"y": y, **dict(zip(("h_n", "c_n"), states, strict=False))}


def cast(state: Any, dtype: torch.dtype) -> Any:
    return tuple(s.to(dtype) for s in state) if isinstance(state, tuple) else state.to(dtype)


@pytest.mark.parametrize(("name", "option"), LAYERS)
def test_is_torchs(name: str, option: str) -> None:
    """Parameters, repr, outputs, states and gradients; padded, packed in any order, one sequence;
    states given or not; in eval mode too."""
    stock, fused = pair(name, **OPTIONS[option])
    assert isinstance(fused, type(stock))
    assert repr(fused) == repr(stock)
    for key, value in stock.state_dict().items():
        assert torch.equal(fused.state_dict()[key], value)
    x = torch.randn(6, 4, I_)
    B = 6 if stock.batch_first else 4
    lengths = torch.tensor([2, 4, 1, 4, 3, 2] if stock.batch_first else [2, 6, 1, 5])
    hx, hx_one = state_of(stock, B), state_of(stock)
    calls = {
        "padded": lambda m, t: m(x.to(t)),
        "state": lambda m, t: m(x.to(t), cast(hx, t)),
        "one": lambda m, t: m(x[0].to(t), cast(hx_one, t)),
        "packed": lambda m, t: m(pack(x.to(t)), cast(hx, t)),
        "packed_alone": lambda m, t: m(pack(x.to(t))),
    }

    def pack(t: Tensor) -> PackedSequence:
        return pack_padded_sequence(t, lengths, stock.batch_first, enforce_sorted=False)

    for what, call in calls.items():
        training = what != "state"
        for m in (stock, fused):
            m.train(training)
        judge_model(stock, fused, lambda m, t, call=call: flat(call(m, t)))
        if "packed" in what:
            got, right = fused(pack(x))[0], stock(pack(x))[0]
            assert isinstance(got, PackedSequence)
            for a, b in zip(got[1:], right[1:], strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize(("name", "kwargs"), CELLS, ids=str)
def test_cells_are_torchs(name: str, kwargs: dict[str, Any]) -> None:
    stock, fused = pair(name, **kwargs)
    assert isinstance(fused, type(stock))
    assert repr(fused) == repr(stock)
    for key, value in stock.state_dict().items():
        assert torch.equal(fused.state_dict()[key], value)
    for shape in ((4,), ()):
        x, h, c = torch.randn(*shape, I_), torch.randn(*shape, H), torch.randn(*shape, H)
        hx: Any = (h, c) if name == "LSTMCell" else h
        for state in (None, hx):

            def call(m: nn.Module, t: torch.dtype, x: Tensor = x, state: Any = state) -> Any:
                out = m(x.to(t)) if state is None else m(x.to(t), cast(state, t))
                return dict(zip("hc", out if isinstance(out, tuple) else (out,), strict=False))

            judge_model(stock, fused, call)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_16_bits(name: str, dtype: torch.dtype) -> None:
    stock, fused = pair(name, num_layers=2, bidirectional=True, dtype=dtype)
    x = torch.randn(6, 4, I_).to(dtype)
    judge_model(stock, fused, lambda m, t: flat(m(x.to(t))))


# oneDNN trains no LSTM in fp16.
AUTOCAST = [(n, t) for n in MODULES for t in (torch.bfloat16, torch.float16)
            if (n, t) != ("LSTM", torch.float16)]  # fmt: skip


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_state", [True, False], ids=["state", "no_state"])
@pytest.mark.parametrize(("name", "low"), AUTOCAST, ids=str)
def test_autocast_is_torchs(
    name: str, with_state: bool, given: torch.dtype, low: torch.dtype
) -> None:
    """dtypes of results and gradients; values within twice the error of torch's."""
    stock, fused = pair(name, 16, 32)
    cell = name.endswith("Cell")
    x = torch.randn(*(() if cell else (5,)), 3, 16)
    hx = tuple(torch.randn(*(() if cell else (1,)), 3, 32) for _ in range(2))
    state: Any = None if not with_state else hx if name.startswith("LSTM") else hx[0]

    def call(m: nn.Module, t: torch.dtype) -> Any:
        on = t != torch.float64
        with torch.autocast("cpu", low, enabled=on):
            out = m(x.to(given if on else t), state if on or state is None else cast(state, t))
        if not cell:
            return flat(out)
        return dict(zip("hc", out if isinstance(out, tuple) else (out,), strict=False))

    right, got = (call(m, torch.float32) for m in (stock, fused))
    assert {n: y.dtype for n, y in got.items()} == {n: y.dtype for n, y in right.items()}
    judge_model(stock, fused, call)


@pytest.mark.parametrize("name", MODULES)
def test_autocast_compiles(name: str) -> None:
    _, fused = pair(name)
    x = torch.randn(*(() if name.endswith("Cell") else (6,)), 4, I_)
    compiled = torch.compile(fused, fullgraph=True, backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        right, got = fused(x), compiled(x)
    torch.testing.assert_close(got, right)


@pytest.mark.parametrize("batch", [3, 40])  # one op, torch's GEMMs
@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell"])
def test_the_h_of_a_cell_may_be_changed_in_place(name: str, batch: int) -> None:
    stock, fused = pair(name, 16, 32)
    x, hx = torch.randn(batch, 16), tuple(torch.randn(batch, 32) for _ in range(2))

    def call(m: nn.Module, t: torch.dtype) -> dict[str, Tensor]:
        state = cast(hx if name == "LSTMCell" else hx[0], t)
        out = m(x.to(t), state)
        return {"h": (out[0] if isinstance(out, tuple) else out).relu_()}

    judge_model(stock, fused, call)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "RNNCell"])
def test_an_output_that_was_changed_in_place_is_an_error(name: str) -> None:
    """Never a wrong gradient."""
    _, fused = pair(name, 16, 32)
    out = fused(torch.randn(*(() if name == "RNNCell" else (5,)), 3, 16))
    changed = (out[0] if isinstance(out, tuple) else out).relu_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        changed.sum().backward()


@pytest.mark.parametrize("name", MODULES)
def test_meta(name: str) -> None:
    """Shapes without values."""
    stock, fused = pair(name, I_, H, device="meta")
    x = torch.empty(*(() if name.endswith("Cell") else (6,)), 4, I_, device="meta")
    with warnings.catch_warnings():  # that no kernel runs
        warnings.simplefilter("ignore", PerformanceWarning)
        right, got = stock(x), fused(x)
    for a, b in zip(tree_leaves(got), tree_leaves(right), strict=True):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_dropout_between_layers_has_torchs_masks(name: str) -> None:
    stock, fused = pair(name, num_layers=3, dropout=0.4)
    x = torch.randn(6, 4, I_)
    packed = pack_padded_sequence(x, torch.tensor([2, 6, 3, 6]), enforce_sorted=False)
    for argument in (x, packed):
        results = []
        for m in (stock, fused):
            torch.manual_seed(9)
            results.append(flat(m(argument)))
        for key, right in results[0].items():
            torch.testing.assert_close(results[1][key], right)
    for m in (stock.eval(), fused.eval()):
        results.append(m(x)[0])
    torch.testing.assert_close(results[3], results[2])
    with pytest.warns(UserWarning, match="num_layers greater than 1"):
        getattr(fastattn.nn, name)(2, 3, dropout=0.5)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_lengths(name: str, batch_first: bool) -> None:
    """Against torch on a packed batch, NaN in the padding; an empty sequence keeps its state."""
    stock, fused = pair(name, num_layers=2, bidirectional=True, batch_first=batch_first)
    lengths = torch.tensor([3, 6, 1, 5])
    x = torch.randn(4, 6, I_) if batch_first else torch.randn(6, 4, I_)
    hx = state_of(stock, 4)
    packed, right = stock(pack_padded_sequence(x, lengths, batch_first, False), hx)
    beyond = torch.arange(6)[:, None] >= lengths
    got, last = fused(x.masked_fill((beyond.t() if batch_first else beyond)[..., None], torch.nan),
                      hx, lengths)  # fmt: skip
    torch.testing.assert_close(got, pad_packed_sequence(packed, batch_first, 0.0, 6)[0])
    torch.testing.assert_close(last, right)
    _, last = fused(x, hx, lengths=[0, 6, 0, 5])
    first = last[0] if name == "LSTM" else last
    assert torch.equal(first[:, 0], (hx[0] if name == "LSTM" else hx)[:, 0])


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_recurrent_dropout(name: str) -> None:
    fused = getattr(fastattn.nn, name)(I_, H, recurrent_dropout=0.5)
    assert "recurrent_dropout=0.5" in repr(fused)
    x = torch.randn(6, 4, I_)
    assert not torch.equal(fused(x)[0], fused(x)[0])
    fused.eval()
    assert torch.equal(fused(x)[0], fused(x)[0])
    for wrong in (1.0, -0.1, True, "0.1"):
        with pytest.raises(ValueError, match=r"recurrent_dropout should be .* \[0, 1\)"):
            getattr(fastattn.nn, name)(I_, H, recurrent_dropout=wrong)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
def test_state_dicts_and_copies(name: str) -> None:
    stock, fused = pair(name)
    with torch.no_grad():
        for p in stock.parameters():
            p.add_(1)
    assert fused.load_state_dict(stock.state_dict()) == ([], [])
    assert stock.load_state_dict(fused.state_dict()) == ([], [])
    x = torch.randn(4, I_)
    right = fused(x)
    for model in copies(fused):
        assert type(model) is type(fused)
        torch.testing.assert_close(model(x), right, rtol=0, atol=0)
    double = copy.deepcopy(fused).double()
    assert next(double.parameters()).dtype == torch.float64
    torch.testing.assert_close(
        double(x.double()), stock.double()(x.double()), rtol=1e-12, atol=1e-12
    )


def test_parameters_may_be_replaced() -> None:
    """By assignment, by functional_call, by a parametrisation, by weight norm's hook."""
    stock, fused = pair("GRU", num_layers=2)
    fused.flatten_parameters()
    x = torch.randn(6, 4, I_)
    doubled = stock.weight_hh_l0.detach() * 2
    for m in (stock, fused):
        m.weight_hh_l0 = nn.Parameter(doubled.clone())
    torch.testing.assert_close(fused(x), stock(x))
    other = {n: p * 0.5 for n, p in stock.named_parameters()}
    torch.testing.assert_close(
        torch.func.functional_call(fused, other, (x,)),
        torch.func.functional_call(stock, other, (x,)),
    )
    nn.utils.parametrizations.weight_norm(fused, "weight_hh_l1")
    torch.testing.assert_close(fused(x), stock(x))
    fused(x)[0].sum().backward()
    assert fused.parametrizations.weight_hh_l1.original0.grad is not None


def test_empty_sequences() -> None:
    """T = 0, which torch refuses."""
    fused = fastattn.nn.LSTM(I_, H)
    hx = state_of(fused, 4)
    y, last = fused(torch.randn(0, 4, I_), hx)
    assert y.shape == (0, 4, H)
    assert all(torch.equal(a, b) for a, b in zip(last, hx, strict=True))


def test_wrong_input() -> None:
    fused = fastattn.nn.LSTM(I_, H)
    x = torch.randn(6, 4, I_)
    for arguments, kind, message in (
        ((x.double(),), TypeError, "x must have the weights' dtype torch.float32, got"),
        ((torch.randn(6, 4, I_ + 1),), ValueError, "x must have 5 features, got 6"),
        ((x, (torch.zeros(1, 5, H),) * 2), ValueError, r"state\[0\] must have shape \(1, 4, 7\)"),
        ((x, torch.zeros(1, 4, H)), TypeError, "state must be a pair"),
        ((x, None, [1, 2, 3]), ValueError, "one a sequence"),
        ((x, None, [1, 2, 3, 9]), ValueError, r"\[0, 6\], got 9"),
    ):
        with pytest.raises(kind, match=f"fastattn::lstm: .*{message}"):
            fused(*arguments)


class Tagger(nn.Module):
    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(2 * H, 3)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        return self.head(self.rnn(x, None, lengths)[0] if lengths is not None else self.rnn(x)[0])


def test_compile_as_a_part_of_a_model() -> None:
    """fullgraph, though Dynamo refuses torch.nn.LSTM, GRU, RNN; and goes on refusing them."""
    torch._dynamo.reset()
    stock, fused = (Tagger(m) for m in pair("GRU", bidirectional=True))
    x, lengths = torch.randn(3, 4, I_), torch.tensor([3, 0, 2, 1])
    fast = torch.compile(fused, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(fast(x, lengths), fused(x, lengths))
    fast(x, lengths).sum().backward()
    assert fused.rnn.weight_hh_l0.grad is not None
    with pytest.raises(torch._dynamo.exc.Unsupported, match="RNN, GRU, or LSTM"):
        torch.compile(stock, fullgraph=True, backend="eager")(x)
    assert not torch._dynamo.config.allow_rnn


def test_export() -> None:
    _, fused = pair("LSTM", bidirectional=True)
    model = Tagger(fused).eval()
    x, lengths = torch.randn(3, 4, I_), torch.tensor([3, 0, 2, 1])
    exported = torch.export.export(model, (x, lengths))
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(x, lengths), model(x, lengths))


def test_data_parallel_replicas() -> None:
    """A replica's weights are attributes, no parameters."""
    _, fused = pair("LSTM")
    replica = pickle.loads(pickle.dumps(fused))
    for name in list(replica._parameters):
        value = replica._parameters.pop(name)
        object.__setattr__(replica, name, value.detach().clone())
    x = torch.randn(6, 4, I_)
    torch.testing.assert_close(replica(x), fused(x))
