"""Whole models, swapped by one line, against the stock model and its peers.

* MiniLM (a real BERT: 6 layers, 384 wide) in inference, against ONNX Runtime too where ``onnx`` and
  ``onnxruntime`` are installed (fp32, as exported);
* a GPT-2 and a Llama of transformers (6 layers of 256, random) that generate 16 tokens behind
  prompts of 8, 128 and 1024: ``model.generate``, greedy;
* an encoder-decoder (torch.nn.Transformer, 3 + 3 layers of 256), a GPT (GPT-2 of transformers, 6
  layers of 384) and an LSTM language model (embedding, 2 x 512, projection), in inference and one
  training step: forward and the gradients of all parameters, no optimizer.

Weights but MiniLM's are random: speed does not depend on them.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn
from bench import peers
from bench.harness import DTYPES, Case, Contest, Setting, Thunk, compiled

VOCABULARY = 8192  # of the random models


class Hidden(nn.Module):
    """A BERT that takes and returns tensors, as an exporter wants it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        out = self.model(input_ids=input_ids, attention_mask=attention_mask)
        return out.last_hidden_state  # type: ignore[no-any-return]


class EncoderDecoder(nn.Module):
    """Token ids of both sides to logits."""

    def __init__(self, D: int = 256) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, D)
        self.body = nn.Transformer(D, 8, 3, 3, 4 * D, dropout=0.0, batch_first=True)
        self.out = nn.Linear(D, VOCABULARY, bias=False)

    def forward(self, ids: Tensor, target: Tensor) -> Tensor:
        S = target.shape[1]
        causal = nn.Transformer.generate_square_subsequent_mask(S).to(self.out.weight.dtype)
        y = self.body(self.words(ids), self.words(target), tgt_mask=causal, tgt_is_causal=True)
        return self.out(y)  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """The language model of many a tutorial."""

    def __init__(self, H: int = 512) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, H)
        self.lstm = nn.LSTM(H, H, 2, batch_first=True)
        self.out = nn.Linear(H, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.lstm(self.words(ids))[0])  # type: ignore[no-any-return]


class GPT(nn.Module):
    """GPT-2 of transformers, from ids to logits."""

    def __init__(self, D: int = 384) -> None:
        super().__init__()
        import transformers

        transformers.logging.set_verbosity_error()
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=D, n_layer=6, n_head=6, n_positions=512, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        )  # fmt: skip
        self.model = transformers.GPT2LMHeadModel(config)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids).logits  # type: ignore[no-any-return]


def minilm(setting: Setting, dtype: str, B: int, S: int) -> Contest:
    from fastattn.cli.demo_model import Text, load

    stock, tokenizer = load()
    batch = Text(tokenizer).full(B, S).inputs()
    return _contest(setting, Hidden(stock).to(DTYPES[dtype]), batch, False)


def random_model(
    setting: Setting, kind: Callable[[], nn.Module], dtype: str, B: int, S: int, train: bool
) -> Contest:
    names = ("ids", "target") if kind is EncoderDecoder else ("ids",)
    inputs = {name: torch.randint(VOCABULARY, (B, S)) for name in names}
    return _contest(setting, kind().to(DTYPES[dtype]), inputs, train)


def generation(setting: Setting, name: str, dtype: str, S: int) -> Contest:
    """`model.generate` behind a prompt of S tokens, the prompt's own pass included."""
    import transformers

    transformers.logging.set_verbosity_error()
    shared = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    config: Any
    if name == "GPT-2":
        config = transformers.GPT2Config(
            n_embd=256, n_layer=6, n_head=4, n_positions=2048, **shared
        )
    else:
        config = transformers.LlamaConfig(
            hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=2048, **shared,
        )  # fmt: skip
    stock = transformers.AutoModelForCausalLM.from_config(config).to(DTYPES[dtype]).eval()
    fused = copy.deepcopy(stock)
    fastattn.swap(fused, backend=setting.backend)
    ids = torch.randint(1, VOCABULARY, (1, S))
    ones = torch.ones_like(ids)

    def run(model: Any) -> Thunk:
        return lambda: model.generate(ids, attention_mask=ones, max_new_tokens=16, do_sample=False)

    return Contest(run(stock), run(fused))


def _contest(setting: Setting, stock: nn.Module, inputs: dict[str, Tensor], train: bool) -> Contest:
    stock.train(train)
    fused = copy.deepcopy(stock)
    fastattn.swap(fused, backend=setting.backend)
    others: dict[str, Thunk] = {}
    if setting.peers:
        # The training graph of a whole model compiles for a minute: inference alone.
        if not train:
            others["torch.compile"] = _run(compiled(copy.deepcopy(stock)), None, inputs)
        exportable = not train and isinstance(stock, Hidden)
        if exportable and next(stock.parameters()).dtype == torch.float32:
            session = peers.onnx(copy.deepcopy(stock), inputs)
            others |= {} if session is None else {"onnxruntime": session}
    leaves = [m if train else None for m in (stock, fused)]
    return Contest(_run(stock, leaves[0], inputs), _run(fused, leaves[1], inputs), others)


def _run(model: Any, train: nn.Module | None, inputs: dict[str, Tensor]) -> Thunk:
    """A call, or a loss and its gradients for the parameters of `train`."""
    if train is None:

        def inference() -> object:
            with torch.no_grad():
                return model(**inputs)

        return inference
    parameters = [p for p in train.parameters() if p.requires_grad]
    labels = next(reversed(inputs.values()))[:, 1:].reshape(-1)

    def training() -> object:
        logits = model(**inputs)[:, :-1]
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels)
        return torch.autograd.grad(loss, parameters)

    return training


def _cases() -> list[Case]:
    cases = [
        Case(f"minilm_{dtype}_b{B}_s{S}", f"MiniLM B={B} S={S} {dtype} fwd", dtype,
             partial(minilm, dtype=dtype, B=B, S=S), ratio)
        for dtype, B, S, ratio in (
            ("fp32", 8, 128, 1.08), ("bf16", 8, 128, 1.3), ("fp32", 1, 16, 2.5),
            ("fp32", 1, 128, 1.2),
        )
    ]  # fmt: skip
    kinds = (
        ("translator", EncoderDecoder, "encoder-decoder", 8, 64),
        ("gpt", GPT, "GPT", 4, 256),
        ("lstm_lm", Recurrent, "LSTM language model", 16, 64),
    )
    for short, kind, what, B, S in kinds:
        for dtype, train in (("fp32", False), ("fp32", True), ("bf16", True)):
            word, mode = ("training step", "train") if train else ("fwd", "fwd")
            make = partial(random_model, kind=kind, dtype=dtype, B=B, S=S, train=train)
            name, text = f"{short}_{dtype}_{mode}", f"{what} B={B} S={S} {dtype} {word}"
            cases.append(Case(name, text, dtype, make, 1.0))
    cases += [
        Case(f"{name.lower().replace('-', '')}_{dtype}_generate_s{S}",
             f"{name} generate, prompt {S}, {dtype}", dtype,
             partial(generation, name=name, dtype=dtype, S=S), 1.0)
        for name in ("GPT-2", "Llama") for dtype in ("fp32", "bf16") for S in (8, 128, 1024)
    ]  # fmt: skip
    return cases


CASES: dict[str, Case] = {case.name: case for case in _cases()}
