"""`fastattn.swap` on models made of torch's own modules."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from swap_tools import Calls, calls, judge_model  # noqa: F401
from torch import Tensor, nn

from fastattn.nn import MultiheadAttention
from fastattn.nn import multihead_attention as mha_module
from fastattn.swap import swap, unswap

N, S, T, E, H = 3, 9, 6, 32, 4

pytestmark = pytest.mark.filterwarnings(
    "ignore:enable_nested_tensor is True", "ignore:The PyTorch API of nested tensors"
)


def padding(keys: int = S) -> Tensor:
    return torch.arange(keys) >= torch.tensor([[keys], [keys - 2], [keys - 4]])


def causal(n: int = S) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).triu(1)


def encoder(layers: int = 2, **kwargs: Any) -> nn.TransformerEncoder:
    kwargs = {"batch_first": True, "dropout": 0.0, "dim_feedforward": 48, **kwargs}
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, **kwargs), layers)
    with torch.no_grad():  # copies of one layer otherwise, with biases of 0
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def transformer(**kwargs: Any) -> nn.Transformer:
    return nn.Transformer(E, H, 1, 2, 48, **{"batch_first": True, "dropout": 0.0, **kwargs})


def swapped(model: nn.Module, **kwargs: Any) -> nn.Module:
    fused = copy.deepcopy(model)
    assert swap(fused, **kwargs)
    return fused


# ------------------------------------------------------------------- the attention really runs

ENCODER_MASKS: dict[str, Callable[[], dict[str, Any]]] = {
    "none": dict,
    "padding": lambda: {"src_key_padding_mask": padding()},
    "mask": lambda: {"mask": causal()},
    "both": lambda: {"mask": causal(), "src_key_padding_mask": padding()},
    "hint": lambda: {"mask": causal(), "is_causal": True},
}


@pytest.mark.parametrize("masks", ENCODER_MASKS)
@pytest.mark.parametrize("kwargs", [{}, {"norm_first": True}, {"batch_first": False}], ids=str)
def test_inference(
    masks: str,
    kwargs: dict[str, Any],
    calls: Calls,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In eval mode, without gradients: where torch's layer would bypass its attention."""
    stock = encoder(**kwargs).eval()
    fused = swapped(stock)
    x = torch.randn(N, S, E) if kwargs.get("batch_first", True) else torch.randn(S, N, E)
    arguments = ENCODER_MASKS[masks]()
    with torch.inference_mode():
        right = stock(x, **arguments)

        def native(*args: Any) -> None:
            raise AssertionError("torch's own kernel ran")

        monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", native)
        monkeypatch.setattr(torch, "_native_multi_head_attention", native)
        if not kwargs:  # the shortcut that the swap has to close
            with pytest.raises(AssertionError, match="own kernel"):
                stock(x, **arguments)
        got = fused(x, **arguments)
    # With padding alone torch's encoder makes a nested tensor, which is packed.
    packed = masks == "padding" and not kwargs
    assert calls.ops() == ["attention_varlen" if packed else "attention"] * 2
    if "padding" in masks and packed:
        assert torch.equal(got[padding()], torch.zeros(6, E))
    torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masks", ENCODER_MASKS)
@pytest.mark.parametrize("batch_first", [True, False])
def test_encoder_gradients(masks: str, batch_first: bool) -> None:
    stock = encoder(batch_first=batch_first)
    x = torch.randn(N, S, E) if batch_first else torch.randn(S, N, E)
    arguments = ENCODER_MASKS[masks]()

    def call(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"o": model(x.to(dtype), **arguments)}

    judge_model(stock, swapped(stock), call)


@pytest.mark.parametrize("training", [True, False])
def test_transformer(training: bool, calls: Calls) -> None:  # noqa: F811
    stock = transformer().train(training)
    fused = swapped(stock)
    src, tgt = torch.randn(N, S, E), torch.randn(N, T, E)

    def call(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        o = model(
            src.to(dtype),
            tgt.to(dtype),
            tgt_mask=causal(T),
            src_key_padding_mask=padding(),
            tgt_key_padding_mask=padding(T),
            memory_key_padding_mask=padding(),
        )
        return {"o": o}

    call(fused, torch.float32)
    assert calls.ops() == ["attention"] * 5
    assert [call["causal"] for call in calls] == [False, True, False, True, False]
    judge_model(stock, fused, call)


def test_fused_module_alone_in_a_layer() -> None:
    """A swapped layer may be wrapped into an encoder afterwards."""
    layer = nn.TransformerEncoderLayer(E, H, batch_first=True)
    swap(layer)
    with pytest.warns(UserWarning, match="activation_relu_or_gelu was not True"):
        model = nn.TransformerEncoder(layer, 2)
    assert all(type(inner.self_attn) is MultiheadAttention for inner in model.layers)
    assert all(not inner.activation_relu_or_gelu for inner in model.layers)
    assert unswap(model)
    assert all(type(inner.self_attn) is nn.MultiheadAttention for inner in model.layers)
    assert all(inner.activation_relu_or_gelu for inner in model.layers)


def test_layer_with_a_hand_made_fused_module(calls: Calls) -> None:  # noqa: F811
    """The shortcut is closed too where the user put `fastattn.nn` into torch's layer."""
    layer = nn.TransformerEncoderLayer(E, H, batch_first=True).eval()
    layer.self_attn = MultiheadAttention(E, H, batch_first=True).eval()
    x = torch.randn(N, S, E)
    with torch.inference_mode():
        layer(x)
        assert not calls
        assert swap(layer).count("attention") == 0
        layer(x)
    assert calls.ops() == ["attention"]


def test_a_dropped_padding_mask_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = mha_module.attention

    def without_mask(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Any:
        return original(q, k, v, **{**kwargs, "mask": None, "bias": None})

    monkeypatch.setattr(mha_module, "attention", without_mask)
    with pytest.raises(AssertionError, match="of the error"):
        test_encoder_gradients("padding", True)


# ------------------------------------------------------------------------- what a swap leaves alone


def test_everything_but_the_class_stays() -> None:
    model = transformer(dropout=0.3)
    attention = model.decoder.layers[1].multihead_attn
    attention.in_proj_weight.requires_grad_(False)
    attention.eval()
    seen = []
    attention.register_forward_hook(lambda *_: seen.append("after"))
    attention.register_forward_pre_hook(lambda *_: seen.append("before"))
    parameters = dict(model.named_parameters())
    before = list(model.state_dict())
    modules = dict(model.named_modules())

    assert swap(model).count("attention") == 5
    assert dict(model.named_modules()) == modules
    assert list(model.state_dict()) == before
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert not attention.training
    assert attention.dropout == 0.3
    assert not attention.in_proj_weight.requires_grad
    assert repr(attention).startswith("MultiheadAttention(")
    model(torch.randn(N, S, E), torch.randn(N, T, E)).sum().backward()
    assert seen == ["before", "after"]
    assert attention.in_proj_weight.grad is None
    assert attention.out_proj.weight.grad is not None


def test_shared_module_is_swapped_once() -> None:
    model = nn.ModuleDict({"a": nn.MultiheadAttention(E, H)})
    model["b"] = model["a"]
    assert swap(model).count("attention") == 1
    assert model["a"] is model["b"]
    assert type(model["b"]) is MultiheadAttention


def test_optimizer_made_before_keeps_training() -> None:
    model = encoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    swap(model)
    weight = model.layers[0].self_attn.in_proj_weight
    before = weight.detach().clone()
    model(torch.randn(N, S, E)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(weight, before)


@pytest.mark.parametrize("training", [True, False])
def test_unswap_is_exact(training: bool) -> None:
    model = encoder(dropout=0.1).train(training)
    x = torch.randn(N, S, E)
    torch.manual_seed(5)
    right = model(x, src_key_padding_mask=padding())
    state = {name: dict(m.__dict__) for name, m in model.named_modules()}
    classes = {name: type(m) for name, m in model.named_modules()}
    swap(model, backend="reference")
    assert unswap(model)
    assert {name: type(m) for name, m in model.named_modules()} == classes
    for name, m in model.named_modules():
        assert m.__dict__ == state[name], name
    torch.manual_seed(5)
    assert torch.equal(model(x, src_key_padding_mask=padding()), right)
    assert not unswap(model)


def test_unswap_of_a_part_and_of_a_copy() -> None:
    model = encoder()
    swap(model)
    assert unswap(model.layers[0])
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention
    other = copy.deepcopy(model)
    assert unswap(other)
    assert type(other.layers[1].self_attn) is nn.MultiheadAttention
    assert type(model.layers[1].self_attn) is MultiheadAttention


def test_unswap_leaves_what_was_built_fused() -> None:
    model = nn.ModuleList([MultiheadAttention(E, H), nn.MultiheadAttention(E, H)])
    swap(model)
    unswap(model)
    assert [type(m) for m in model] == [MultiheadAttention, nn.MultiheadAttention]


# ---------------------------------------------------------------------------------- only and skip

ALL = ["layers.0.self_attn", "layers.1.self_attn", "layers.2.self_attn"]


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, ALL),
        ({"only": "layers.1"}, ALL[1:2]),
        ({"only": "layers.[12].*"}, ALL[1:]),
        ({"only": ["layers.0.self_attn", "*.2"]}, [ALL[0], ALL[2]]),
        ({"skip": "layers.0*"}, ALL[1:]),
        ({"only": nn.TransformerEncoderLayer, "skip": "*.1"}, [ALL[0], ALL[2]]),
        ({"only": nn.MultiheadAttention}, ALL),
        ({"only": []}, []),
        ({"skip": (nn.TransformerEncoder,)}, []),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:fastattn.swap replaced nothing")
def test_only_and_skip(kwargs: dict[str, Any], expected: list[str]) -> None:
    model = encoder(3)
    report = swap(model, **kwargs)
    assert [r.name for r in report.replaced if r.kind == "attention"] == expected
    left = [s.name for s in report.skipped if s.kind == "attention"]
    assert left == [name for name in ALL if name not in expected]
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            assert (type(module) is MultiheadAttention) == (name in expected)
        if isinstance(module, nn.TransformerEncoderLayer):  # its shortcut stays where not needed
            fused = f"{name}.self_attn" in expected
            assert bool(module.activation_relu_or_gelu) == (not fused)


def test_pattern_that_matches_nothing_is_reported() -> None:
    report = swap(encoder(), skip="layer.0.*")
    assert report.count("attention") == 2
    assert "no module matches 'layer.0.*'" in report.notes


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"only takes module-name globs and module classes, got 3"):
        swap(encoder(), only=[3])
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        swap({"model": encoder()})

    class Pipeline:
        model = encoder()

    with pytest.raises(TypeError, match=r"pass its \.model"):
        swap(Pipeline())
    with pytest.raises(ValueError, match=r"backend must be one of .* got 'gpu'"):
        swap(encoder(), backend="gpu")


# ---------------------------------------------------------------------------------- the report


class OwnForward(nn.MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class Renamed(nn.MultiheadAttention):
    """Keeps torch's forward and adds to the module."""

    def width(self) -> int:
        return self.embed_dim


class HomeMadeAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(E, 3 * E)
        self.inner_attention = nn.Identity()


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stock = nn.MultiheadAttention(E, H)
        self.own = OwnForward(E, H)
        self.patched = nn.MultiheadAttention(E, H)
        self.patched.forward = lambda q, k, v: (q, None)  # type: ignore[method-assign]
        self.home = HomeMadeAttention()
        self.linear = nn.Linear(E, E)


def test_report_names_everything() -> None:
    report = swap(Mixed())
    assert [(r.name, r.cls, r.by) for r in report.replaced] == [
        ("stock", "MultiheadAttention", "fastattn.nn.MultiheadAttention")
    ]
    assert {(s.name, s.cls): s.why for s in report.skipped} == {
        (
            "own",
            "OwnForward",
        ): "a subclass of torch.nn.MultiheadAttention with a forward of its own",
        ("patched", "MultiheadAttention"): "its forward was replaced on the instance",
        ("home", "HomeMadeAttention"): (
            "neither torch.nn.MultiheadAttention nor attention of a transformers model"
        ),
    }
    assert (len(report), bool(report)) == (1, True)
    text = str(report)
    assert text.startswith("fastattn.swap(Mixed): 1 replaced, 3 left alone\n")
    for name in ("stock", "own", "patched", "home", "left alone: a subclass of"):
        assert name in text


def test_nothing_replaced_is_said_loudly() -> None:
    for model, why in (
        (nn.Linear(3, 3), "no attention found"),
        (OwnForward(E, H), "the model: a subclass of"),
    ):
        with pytest.warns(UserWarning, match=f"replaced nothing in {type(model).__name__} .{why}"):
            report = swap(model)
        assert not report
        assert "NOTHING WAS REPLACED" in str(report)


def test_root_module_itself() -> None:
    model = nn.MultiheadAttention(E, H)
    report = swap(model)
    assert [r.name for r in report.replaced] == [""]
    assert "(model)" in str(report)
    assert type(model) is MultiheadAttention


def test_swapping_twice_changes_nothing(recwarn: pytest.WarningsRecorder) -> None:
    model = encoder()
    swap(model)
    state = {name: dict(m.__dict__) for name, m in model.named_modules()}
    recwarn.clear()
    report = swap(model)
    assert not report
    assert report.fused_before == 2 + 2 + 4  # attention, layers, norms
    assert not recwarn.list
    assert {name: dict(m.__dict__) for name, m in model.named_modules()} == state
    assert unswap(model)
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention


def test_swapping_again_with_another_backend() -> None:
    model = encoder()
    swap(model)
    assert swap(model, backend="cuda").count("attention") == 2
    with pytest.raises(ValueError, match="backend='cuda' cannot serve this call"):
        model(torch.randn(N, S, E))
    assert swap(model).count("attention") == 2
    model(torch.randn(N, S, E))
    unswap(model)
    assert "backend" not in model.layers[0].self_attn.__dict__


def test_subclass_with_torchs_forward() -> None:
    model = nn.ModuleDict({"a": Renamed(E, H, batch_first=True)})
    x = torch.randn(N, S, E)
    right = model["a"](x, x, x)[0]
    assert swap(model).count("attention") == 1
    cls = type(model["a"])
    assert issubclass(cls, MultiheadAttention)
    assert issubclass(cls, Renamed)
    assert model["a"].width() == E
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (
        model,
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert type(other["a"]) is cls
        torch.testing.assert_close(other["a"](x, x, x)[0], right)
        assert unswap(other)
        assert type(other["a"]) is Renamed


def test_parametrized_module() -> None:
    """`torch.nn.utils.parametrize` makes a subclass at run time; it is served like any other."""
    model = nn.MultiheadAttention(E, H)
    nn.utils.parametrizations.weight_norm(model, "in_proj_weight")
    x = torch.randn(S, N, E)
    right = model(x, x, x)[0]
    assert swap(model).count("attention") == 1
    torch.testing.assert_close(model(x, x, x)[0], right)
    unswap(model)
    assert torch.equal(model(x, x, x)[0], right)
