"""Embeddings of Hugging Face models as one call: words + positions + token types, norm, dropout."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastattn.nn._plain import drop_probability
from fastattn.ops.embedding import embedding
from fastattn.swap._block import Block, parts_of


class _Embeddings(Block):
    KIND = "embedding"
    OP = "fastattn.embedding"

    def tables_are_plain(self) -> bool:
        """What the op has no word for (sparse gradients, renormalisation, counts) is torch's."""
        modules = self._modules  # type: ignore[attr-defined]
        tables = [modules[path[0]] for path, what in self.PARTS if what == "embedding"]
        odd = any(t.sparse or t.max_norm is not None or t.scale_grad_by_freq for t in tables)
        dtypes = {t.weight.dtype for t in (*tables, modules["LayerNorm"])}
        return not odd and len(dtypes) == 1

    def fused(
        self, ids: Tensor, positions: Tensor | None, offset: int, segments: Tensor | None
    ) -> Tensor:
        modules = self._modules  # type: ignore[attr-defined]
        words, places = modules["word_embeddings"], modules["position_embeddings"]
        types, norm = modules.get("token_type_embeddings"), modules["LayerNorm"]
        return embedding(
            ids, words.weight, positions=positions, position_weight=places.weight,
            position_offset=offset, segments=segments,
            segment_weight=None if types is None else types.weight, norm="layer",
            norm_weight=norm.weight, norm_bias=norm.bias, eps=norm.eps,
            dropout_p=drop_probability(modules["dropout"]), padding_idx=words.padding_idx,
            position_padding_idx=places.padding_idx, backend=self.backend,
        )  # fmt: skip


class BertEmbeddings(_Embeddings):
    FORWARD = (
        "self", "input_ids", "token_type_ids", "position_ids", "inputs_embeds",
        "past_key_values_length",
    )  # fmt: skip
    PARTS = parts_of(
        word_embeddings="embedding", position_embeddings="embedding",
        token_type_embeddings="embedding", LayerNorm="norm", dropout="dropout",
    )  # fmt: skip

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values_length: int = 0,
    ) -> Tensor:
        given = input_ids is not None and inputs_embeds is None
        if not given or not self.ready() or not self.tables_are_plain():
            return super().forward(  # type: ignore[misc,no-any-return]
                input_ids, token_type_ids, position_ids, inputs_embeds, past_key_values_length
            )
        assert input_ids is not None
        if position_ids is None:
            position_ids = self.default_positions(input_ids, past_key_values_length)
        return self.fused(input_ids, position_ids, past_key_values_length, token_type_ids)

    def default_positions(self, ids: Tensor, past: int) -> Tensor | None:
        """None: they count from ``past``."""
        return None


class RobertaEmbeddings(BertEmbeddings):
    def default_positions(self, ids: Tensor, past: int) -> Tensor | None:
        """They start behind padding_idx, and padding itself stays there."""
        made: Any = self.create_position_ids_from_input_ids(ids, self.padding_idx, past)  # type: ignore[attr-defined]
        return made  # type: ignore[no-any-return]


class DistilBertEmbeddings(_Embeddings):
    FORWARD = ("self", "input_ids", "inputs_embeds", "position_ids")
    PARTS = parts_of(
        word_embeddings="embedding", position_embeddings="embedding", LayerNorm="norm",
        dropout="dropout",
    )  # fmt: skip

    def forward(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        # Its own forward overwrites inputs_embeds where ids are given.
        if input_ids is None or not self.ready() or not self.tables_are_plain():
            return super().forward(input_ids, inputs_embeds, position_ids)  # type: ignore[misc,no-any-return]
        return self.fused(input_ids, position_ids, 0, None)
