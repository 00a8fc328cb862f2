"""What happens to models after `fastattn.swap`: copies, files, checkpoints, wrappers, training."""

import copy
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import torch.distributed as dist
from swap_tools import Calls, calls, copies  # noqa: F401
from tools import fake_grads
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fastattn.swap import swap, unswap

N, S, E, H = 3, 8, 32, 4

pytestmark = [
    pytest.mark.filterwarnings("ignore::fastattn.backends.PerformanceWarning"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
]

MASK = torch.arange(S) < torch.tensor([[S], [5], [3]])


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(E, H, 48, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def bert() -> nn.Module:
    import transformers

    config = transformers.BertConfig(
        vocab_size=61, hidden_size=E, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=H, max_position_embeddings=32,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertModel(config)


def run_encoder(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    x = torch.randn(N, S, E, generator=generator).to(dtype)
    return model(x, src_key_padding_mask=~MASK)


def run_bert(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 61, (N, S), generator=generator)
    return model(input_ids=ids, attention_mask=MASK.long()).last_hidden_state


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor]]] = {
    "encoder": (encoder, run_encoder),
    "bert": (bert, run_bert),
}


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A stock model in training mode, without dropout, and how to run it."""
    make, run = MODELS[request.param]
    return make().train(), run


Case = tuple[nn.Module, Callable[[nn.Module], Tensor]]


def gradients(model: nn.Module, run: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    o = run(model)
    generator = torch.Generator().manual_seed(2)
    o.backward(torch.randn(o.shape, generator=generator).to(o.dtype))
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(got: Any, right: Any) -> None:
    torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------- copies and files


def test_deepcopy_and_pickle(case: Case, calls: Calls) -> None:  # noqa: F811
    model, run = case
    stock = run(model)
    swap(model)
    right = run(model)
    for other in copies(model):
        calls.clear()
        assert torch.equal(run(other), right)
        assert len(calls) == 2
        assert swap(other).count("attention") == 0
        assert unswap(other)
        calls.clear()
        assert torch.equal(run(other), stock)
        assert not calls
    assert torch.equal(run(model), right)  # the original stays swapped


def test_files_in_a_fresh_process(tmp_path: Path) -> None:
    """`save_pretrained` leaves nothing of us in its files: where fastattn was never imported they
    make a stock model.  A pickle of the swapped model brings fastattn along by itself.
    """
    stock = bert().eval()
    torch.save(run_bert(stock).detach(), tmp_path / "stock.pt")
    model = copy.deepcopy(stock)
    swap(model, backend="reference")
    model.save_pretrained(tmp_path / "model")
    for file in (tmp_path / "model").iterdir():
        assert b"fastattn" not in file.read_bytes()
    torch.save(model, tmp_path / "pickle.pt")
    torch.save(run_bert(model).detach(), tmp_path / "fused.pt")
    layers = encoder()
    swap(layers, backend="reference")
    torch.save(layers, tmp_path / "encoder.pt")

    code = """
import sys
from pathlib import Path
import torch
from transformers import AutoModel
here = Path(sys.argv[1])
ids = torch.randint(1, 61, (3, 8), generator=torch.Generator().manual_seed(1))
mask = (torch.arange(8) < torch.tensor([[8], [5], [3]])).long()

model = AutoModel.from_pretrained(here / "model", local_files_only=True).eval()
got = model(input_ids=ids, attention_mask=mask).last_hidden_state
assert torch.equal(got, torch.load(here / "stock.pt"))
assert "fastattn" not in sys.modules

model = torch.load(here / "pickle.pt", weights_only=False)
assert "fastattn" in sys.modules
got = model(input_ids=ids, attention_mask=mask).last_hidden_state
assert torch.equal(got, torch.load(here / "fused.pt"))
layers = torch.load(here / "encoder.pt", weights_only=False)
assert type(layers.layers[0].self_attn).__module__.startswith("fastattn.nn")
layers(torch.randn(3, 8, 32))
print(model.config._attn_implementation)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    paths = [str(Path(__file__).parent.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == "fastattn_reference"
    # In this process, too, a reload is stock.
    reloaded = type(model).from_pretrained(tmp_path / "model")
    assert reloaded.config._attn_implementation == "sdpa"


def test_state_dicts_both_ways(case: Case) -> None:
    model, run = case
    fused = copy.deepcopy(model)
    with torch.no_grad():
        for p in fused.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    swap(fused)
    right = run(fused)
    assert model.load_state_dict(fused.state_dict()) == ([], [])
    assert_close(run(model), right)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    swap(other)
    assert other.load_state_dict(model.state_dict()) == ([], [])
    assert torch.equal(run(other), right)


# --------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(case: Case, use_reentrant: bool, calls: Calls) -> None:  # noqa: F811
    """`torch.utils.checkpoint` around the model, with dropout: the recomputation drops the same."""
    model, run = case
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.3
        elif isinstance(module, nn.Dropout):
            module.p = 0.3
    swap(model)
    torch.manual_seed(4)
    right = gradients(model, run)
    assert len(calls) == 2
    calls.clear()

    def checkpointed(m: nn.Module) -> Tensor:
        start = torch.zeros((), requires_grad=True)  # the reentrant kind asks for such an input
        return checkpoint(lambda s: run(m) + s, start, use_reentrant=use_reentrant)

    torch.manual_seed(4)
    got = gradients(model, checkpointed)
    assert len(calls) == 4
    assert got.keys() == right.keys()
    for name in right:
        assert_close(got[name], right[name])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_of_transformers(
    use_reentrant: bool,
    calls: Calls,  # noqa: F811
) -> None:
    model = bert().train()
    right = gradients(model, run_bert)
    swap(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    got = gradients(model, run_bert)
    assert len(calls) == 4
    for name in right:
        assert_close(got[name], right[name])


def test_dropout_in_training(case: Case) -> None:
    """The mean over many draws is the output without dropout; eval mode draws nothing."""
    model, _ = case
    is_bert = not isinstance(model, nn.TransformerEncoder)
    attention = model.encoder.layer[0].attention.self if is_bert else model.layers[0].self_attn
    swap(model)
    x = torch.randn(1, S, E)

    def run() -> Tensor:
        with torch.no_grad():
            return (attention(x) if is_bert else attention(x, x, x, need_weights=False))[0]

    right = run()
    if is_bert:
        attention.dropout.p = 0.4
    else:
        attention.dropout = 0.4
    draws = torch.stack([run() for _ in range(400)])
    assert not torch.equal(draws[0], draws[1])
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - right).abs() < 5 * error + 1e-6).all()
    attention.eval()
    assert torch.equal(run(), right)


def test_frozen_layers(case: Case) -> None:
    """Only the second layer and what follows get gradients, the same as stock."""
    model, run = case
    layers = model.layers if isinstance(model, nn.TransformerEncoder) else model.encoder.layer
    for p in model.parameters():
        p.requires_grad_(False)
    for p in layers[1].parameters():
        p.requires_grad_(True)
    right = gradients(model, run)
    swap(model)
    got = gradients(model, run)
    assert got.keys() == right.keys()
    assert all("1." in name for name in got)
    for name in right:
        assert_close(got[name], right[name])


def test_training_steps_follow_stock(case: Case) -> None:
    model, run = case
    fused = copy.deepcopy(model)
    swap(fused)
    losses: list[list[float]] = []
    for m in (model, fused):
        # Not Adam: it makes whole steps of gradients that are rounding alone.
        optimizer = torch.optim.SGD(m.parameters(), lr=0.2, momentum=0.9)
        curve = []
        for _ in range(6):
            loss = (run(m) - 0.5).square()[MASK].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        losses.append(curve)
    assert losses[0][-1] < 0.9 * losses[0][0]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conversion_after_the_swap(case: Case, dtype: torch.dtype) -> None:
    model, run = case
    right = run(copy.deepcopy(model).double().eval()).float()
    swap(model)
    got = run(model.to(dtype).eval())
    assert got.dtype == dtype
    assert (got.float() - right)[MASK].abs().max() < 0.1


# --------------------------------------------------------------------------------------- wrappers


@pytest.fixture
def process_group() -> Iterator[None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, world_size=1, rank=0)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("order", ["swap_first", "wrap_first"])
def test_ddp(case: Case, order: str, process_group: None, calls: Calls) -> None:  # noqa: F811
    model, run = case
    right = gradients(model, run)
    if order == "swap_first":
        swap(model)
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    if order == "wrap_first":
        assert swap(wrapped).count("attention") == 2
    got = gradients(wrapped, run)
    assert len(calls) == 2
    for name in right:
        assert_close(got[f"module.{name}"], right[name])


@pytest.mark.parametrize("order", ["swap_first", "compile_first"])
def test_compile(case: Case, order: str) -> None:
    """One graph with our op in it, right gradients, and recompiled when the model is swapped."""
    model, run = case
    right = gradients(model, run)
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(" ".join(str(node.target) for node in graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    if order == "swap_first":
        swap(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    if order == "compile_first":
        run(compiled)
        assert "fastattn" not in graphs.pop()
        swap(model)
    got = gradients(compiled, run)
    assert len(graphs) == 1
    assert graphs[0].count("fastattn.attention_fwd") == 2
    for name in right:
        assert_close(got[f"_orig_mod.{name}"], right[name])
    unswap(model)
    assert_close(run(compiled), run(model))
    if order == "swap_first":  # else the first graph is valid again
        assert "fastattn" not in graphs[1]


def test_fake_cuda() -> None:
    """A swapped BERT, forward and backward, with a padding mask: no value is read back."""
    with FakeTensorMode(), torch.device("cuda"):
        model = bert().train()
        assert swap(model).count("attention") == 2
        ids = torch.zeros(N, S, dtype=torch.int64)
        mask = torch.ones(N, S, dtype=torch.int64)
        o = model(input_ids=ids, attention_mask=mask).last_hidden_state
        assert (tuple(o.shape), o.device.type) == ((N, S, E), "cuda")
        parameters = {n: p for n, p in model.named_parameters() if not n.startswith("pooler")}
        for grad, p in zip(
            fake_grads([o], list(parameters.values())), parameters.values(), strict=True
        ):
            assert grad is not None
            assert grad.shape == p.shape
            assert grad.device.type == "cuda"


def test_fake_cuda_decoder() -> None:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=E, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=H, num_key_value_heads=2,
    )  # fmt: skip
    with FakeTensorMode(), torch.device("cuda"):
        model = transformers.LlamaModel(config)
        swap(model)
        ids = torch.zeros(N, S, dtype=torch.int64)
        for mask in (None, torch.ones(N, S, dtype=torch.int64)):
            o = model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            assert (tuple(o.shape), o.device.type) == ((N, S, E), "cuda")
