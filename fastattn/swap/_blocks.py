"""Feed-forward, residual and norm of Hugging Face models: BERT, RoBERTa, DistilBERT, GPT-2, Llama,
T5.  The forwards below take what those of transformers take (see ``FORWARD``).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastattn.nn._plain import activation_name, drop_probability
from fastattn.ops.layernorm import add_layer_norm, norm_backend, rms_norm
from fastattn.ops.layernorm_ffn import ffn_backend, layernorm_ffn
from fastattn.swap._block import Block, parts_of
from fastattn.swap._decoding import gpt2_layer, llama_layer
from fastattn.swap._inference import bert_layer_in_inference, distilbert_layer_in_inference

# ------------------------------------------------------------------------- BERT, RoBERTa: post-norm


class PostNormOutput(Block):
    """``LayerNorm(input + dropout(dense(x)))``: dense, then one pass."""

    KIND = "residual + norm"
    OP = "fastattn.add_layer_norm"
    FORWARD = ("self", "hidden_states", "input_tensor")
    PARTS = parts_of(dropout="dropout", LayerNorm="norm")

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        if not self.ready(input_tensor):
            return super().forward(hidden_states, input_tensor)  # type: ignore[misc,no-any-return]
        modules = self._modules  # type: ignore[attr-defined]
        norm = modules["LayerNorm"]
        return add_layer_norm(
            modules["dense"](hidden_states), input_tensor, norm.weight, norm.bias, eps=norm.eps,
            dropout_p=drop_probability(modules["dropout"]), backend=norm_backend(self.backend),
        )[0]  # fmt: skip


class PostNormLayer(Block):
    """The feed-forward half of a BERT layer as one op; in inference on the CPU the whole layer."""

    FORWARD = (
        "self", "hidden_states", "attention_mask", "encoder_hidden_states",
        "encoder_attention_mask", "past_key_values", "kwargs",
    )  # fmt: skip

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        if encoder_hidden_states is None and past_key_values is None:
            y = bert_layer_in_inference(self, hidden_states, attention_mask, kwargs)
            if y is not None:
                return y
        return super().forward(  # type: ignore[misc,no-any-return]
            hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask,
            past_key_values, **kwargs,
        )  # fmt: skip

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        modules = self._modules  # type: ignore[attr-defined]
        if not self.ready(attention_output):
            return super().feed_forward_chunk(attention_output)  # type: ignore[misc,no-any-return]
        one, two = modules["intermediate"]._modules, modules["output"]._modules
        linear1, linear2, norm = one["dense"], two["dense"], two["LayerNorm"]
        name = activation_name(one["intermediate_act_fn"])
        assert name is not None
        return layernorm_ffn(
            attention_output, linear1.weight, linear1.bias, linear2.weight, linear2.bias,
            norm_weight=norm.weight, norm_bias=norm.bias, eps=norm.eps, activation=name,
            pre_norm=False, dropout_p=drop_probability(two["dropout"]),
            backend=ffn_backend(self.backend, attention_output.shape[-1]),
        )  # fmt: skip


def _bert_parts(family: str) -> tuple[tuple[tuple[str, ...], str], ...]:
    return parts_of(
        intermediate=f"{family}Intermediate", output=f"{family}Output",
        intermediate__dense="linear", intermediate__intermediate_act_fn="activation",
        output__dense="linear", output__dropout="dropout", output__LayerNorm="norm",
    )  # fmt: skip


class BertLayer(PostNormLayer):
    PARTS = _bert_parts("Bert")


class RobertaLayer(PostNormLayer):
    PARTS = _bert_parts("Roberta")


# --------------------------------------------------------------------------- DistilBERT: post-norm


class DistilBertBlock(Block):
    """Both halves of a DistilBERT layer."""

    FORWARD = ("self", "hidden_states", "attention_mask", "kwargs")
    PARTS = parts_of(
        sa_layer_norm="norm", ffn="FFN", ffn__lin1="linear", ffn__lin2="linear",
        ffn__activation="activation", ffn__dropout="dropout", output_layer_norm="norm",
    )  # fmt: skip

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        modules = self._modules  # type: ignore[attr-defined]
        y = distilbert_layer_in_inference(self, hidden_states, attention_mask, kwargs)
        if y is not None:
            return y
        ffn = modules["ffn"]
        if not self.ready(hidden_states) or ffn.chunk_size_feed_forward:
            return super().forward(hidden_states, attention_mask, **kwargs)  # type: ignore[misc,no-any-return]
        linear1, linear2 = ffn.lin1, ffn.lin2
        o, _ = modules["attention"](hidden_states, attention_mask=attention_mask, **kwargs)
        norm, last = modules["sa_layer_norm"], modules["output_layer_norm"]
        x, _ = add_layer_norm(
            o,
            hidden_states,
            norm.weight,
            norm.bias,
            eps=norm.eps,
            backend=norm_backend(self.backend),
        )
        name = activation_name(ffn.activation)
        assert name is not None
        return layernorm_ffn(
            x, linear1.weight, linear1.bias, linear2.weight, linear2.bias,
            norm_weight=last.weight, norm_bias=last.bias, eps=last.eps, activation=name,
            pre_norm=False, dropout_p=drop_probability(ffn.dropout),
            backend=ffn_backend(self.backend, x.shape[-1]),
        )  # fmt: skip


# ----------------------------------------------------------------------------- GPT-2: pre-norm


class Gpt2Block(Block):
    """The feed-forward half of a GPT-2 layer as one op; in generation on the CPU the whole layer.

    Its Conv1D stores a weight as (in, out); the op gets the transposed view, of the same memory.
    """

    FORWARD = (
        "self", "hidden_states", "past_key_values", "attention_mask", "encoder_hidden_states",
        "encoder_attention_mask", "use_cache", "kwargs",
    )  # fmt: skip
    PARTS = parts_of(
        ln_2="norm", mlp="GPT2MLP", mlp__c_fc="conv1d", mlp__act="activation",
        mlp__c_proj="conv1d", mlp__dropout="dropout",
    )  # fmt: skip

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        use_cache: bool | None = False,
        **kwargs: Any,
    ) -> Tensor:
        if encoder_hidden_states is None:
            y = gpt2_layer(self, hidden_states, past_key_values, attention_mask, kwargs)
            if y is not None:
                return y
        modules = self._modules  # type: ignore[attr-defined]
        if encoder_hidden_states is not None or not self.ready(hidden_states):
            return super().forward(  # type: ignore[misc,no-any-return]
                hidden_states, past_key_values, attention_mask, encoder_hidden_states,
                encoder_attention_mask, use_cache, **kwargs,
            )  # fmt: skip
        o, _ = modules["attn"](
            modules["ln_1"](hidden_states), past_key_values=past_key_values,
            attention_mask=attention_mask, use_cache=use_cache, **kwargs,
        )  # fmt: skip
        mlp, norm = modules["mlp"], modules["ln_2"]
        first, second, name = mlp.c_fc, mlp.c_proj, activation_name(mlp.act)
        assert name is not None
        return layernorm_ffn(
            o + hidden_states, first.weight.t(), first.bias, second.weight.t(), second.bias,
            norm_weight=norm.weight, norm_bias=norm.bias, eps=norm.eps, activation=name,
            dropout_p=drop_probability(mlp.dropout),
            backend=ffn_backend(self.backend, hidden_states.shape[-1]),
        )  # fmt: skip


# ---------------------------------------------------------------------- Llama: pre-norm, gated


class LlamaLayer(Block):
    """The feed-forward half of a Llama layer (RMSNorm, SwiGLU) as one op; in generation on the CPU
    the whole layer."""

    FORWARD = (
        "self", "hidden_states", "attention_mask", "position_ids", "past_key_values", "use_cache",
        "position_embeddings", "kwargs",
    )  # fmt: skip
    PARTS = parts_of(
        post_attention_layernorm="LlamaRMSNorm", mlp="LlamaMLP", mlp__gate_proj="linear",
        mlp__up_proj="linear", mlp__down_proj="linear", mlp__act_fn="activation",
    )  # fmt: skip

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        y = llama_layer(
            self, hidden_states, past_key_values, attention_mask, position_embeddings, kwargs
        )
        if y is not None:
            return y
        modules = self._modules  # type: ignore[attr-defined]
        if not self.ready(hidden_states):
            return super().forward(  # type: ignore[misc,no-any-return]
                hidden_states, attention_mask, position_ids, past_key_values, use_cache,
                position_embeddings, **kwargs,
            )  # fmt: skip
        o, _ = modules["self_attn"](
            hidden_states=modules["input_layernorm"](hidden_states), attention_mask=attention_mask,
            position_ids=position_ids, past_key_values=past_key_values, use_cache=use_cache,
            position_embeddings=position_embeddings, **kwargs,
        )  # fmt: skip
        mlp, norm = modules["mlp"], modules["post_attention_layernorm"]
        gate, up, down, name = (
            mlp.gate_proj,
            mlp.up_proj,
            mlp.down_proj,
            activation_name(mlp.act_fn),
        )
        assert name is not None
        return layernorm_ffn(
            hidden_states + o, up.weight, up.bias, down.weight, down.bias, norm="rms",
            norm_weight=norm.weight, eps=norm.variance_epsilon, activation=name,
            w_gate=gate.weight, b_gate=gate.bias,
            backend=ffn_backend(self.backend, hidden_states.shape[-1]),
        )  # fmt: skip


# ------------------------------------------------------------- T5: pre-norm, plain or gated


class T5FeedForward(Block):
    """A T5 feed-forward layer (RMSNorm, ReLU) as one op."""

    FORWARD = ("self", "hidden_states")
    PARTS = parts_of(
        layer_norm="T5LayerNorm", DenseReluDense="T5DenseActDense", DenseReluDense__wi="linear",
        DenseReluDense__act="activation", DenseReluDense__dropout="dropout",
        DenseReluDense__wo="linear", dropout="dropout",
    )  # fmt: skip

    def projections(self, dense: Any) -> tuple[Any, Any]:
        """The gate's and the other one."""
        return None, dense.wi

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not self.ready(hidden_states):
            return super().forward(hidden_states)  # type: ignore[misc,no-any-return]
        modules = self._modules  # type: ignore[attr-defined]
        dense, norm = modules["DenseReluDense"], modules["layer_norm"]
        gate, up = self.projections(dense)
        down, name = dense.wo, activation_name(dense.act)
        assert name is not None
        return layernorm_ffn(
            hidden_states, up.weight, up.bias, down.weight, down.bias, norm="rms",
            norm_weight=norm.weight, eps=norm.variance_epsilon, activation=name,
            w_gate=None if gate is None else gate.weight,
            b_gate=None if gate is None else gate.bias,
            dropout_p=drop_probability(modules["dropout"]),
            hidden_dropout_p=drop_probability(dense.dropout),
            backend=ffn_backend(self.backend, hidden_states.shape[-1]),
        )  # fmt: skip


class T5GatedFeedForward(T5FeedForward):
    """The same with two projections, of T5 1.1 and FLAN-T5 (gated GELU)."""

    PARTS = parts_of(
        layer_norm="T5LayerNorm", DenseReluDense="T5DenseGatedActDense",
        DenseReluDense__wi_0="linear", DenseReluDense__wi_1="linear",
        DenseReluDense__act="activation", DenseReluDense__dropout="dropout",
        DenseReluDense__wo="linear", dropout="dropout",
    )  # fmt: skip

    def projections(self, dense: Any) -> tuple[Any, Any]:
        return dense.wi_0, dense.wi_1


class RmsNorm(Block):
    """The RMSNorm of Llama and T5. With another weight dtype than x's it is transformers' own: the
    two differ in what they return then."""

    KIND = "norm"
    OP = "fastattn.rms_norm"
    FORWARD = ("self", "hidden_states")

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight: Tensor = self.weight  # type: ignore[attr-defined]
        if hidden_states.dtype != weight.dtype:
            return super().forward(hidden_states)  # type: ignore[misc,no-any-return]
        eps: float = self.variance_epsilon  # type: ignore[attr-defined]
        return rms_norm(hidden_states, weight.shape[0], weight, eps, backend=self.backend)
