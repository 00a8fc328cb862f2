"""Small random Hugging Face models of every family that `fastattn.swap` serves."""

import copy
import os
from collections.abc import Callable
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from torch import Tensor, nn

from fastattn.swap import swap


def swapped(model: nn.Module, **kwargs: Any) -> Any:
    fused = copy.deepcopy(model)
    assert swap(fused, **kwargs)
    return fused


V, E, H, HK, D, LAYERS, S = 61, 32, 4, 2, 8, 2, 12

DECODER = {
    "vocab_size": V,
    "hidden_size": E,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": H,
    "num_key_value_heads": HK,
    "head_dim": D,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
ENCODER = {
    "vocab_size": V,
    "hidden_size": E,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": H,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def bert() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**ENCODER))


def roberta() -> Any:
    return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**ENCODER))


def distilbert() -> Any:
    config = transformers.DistilBertConfig(
        vocab_size=V, dim=E, hidden_dim=48, n_layers=LAYERS, n_heads=H, max_position_embeddings=64
    )
    return transformers.DistilBertForMaskedLM(config)


def modernbert() -> Any:
    """Bidirectional sliding windows in all layers but every third."""
    config = transformers.ModernBertConfig(**ENCODER, local_attention=8)
    return transformers.ModernBertForMaskedLM(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=V, n_embd=E, n_layer=LAYERS, n_head=H, n_positions=64, bos_token_id=1,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER))


def mistral() -> Any:
    config = transformers.MistralConfig(**DECODER, sliding_window=5)
    return transformers.MistralForCausalLM(config)


def gemma2() -> Any:
    config = transformers.Gemma2Config(
        **DECODER, sliding_window=5, attn_logit_softcapping=1.5, query_pre_attn_scalar=24
    )
    return transformers.Gemma2ForCausalLM(config)


def gpt_oss() -> Any:
    config = transformers.GptOssConfig(
        **DECODER, sliding_window=5, num_local_experts=2, num_experts_per_tok=1
    )
    model = transformers.GptOssForCausalLM(config)
    model.set_experts_implementation("eager")  # the other one has no float64
    return model


def t5() -> Any:
    config = transformers.T5Config(
        vocab_size=V, d_model=E, d_kv=D, d_ff=48, num_layers=LAYERS, num_heads=H,
        relative_attention_num_buckets=8, relative_attention_max_distance=10,
        pad_token_id=0, decoder_start_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def bart() -> Any:
    config = transformers.BartConfig(
        vocab_size=V, d_model=E, encoder_layers=1, decoder_layers=LAYERS, encoder_ffn_dim=48,
        decoder_ffn_dim=48, encoder_attention_heads=H, decoder_attention_heads=H,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        decoder_start_token_id=1, forced_eos_token_id=None,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


def vit() -> Any:
    config = transformers.ViTConfig(
        hidden_size=E, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=H,
        image_size=16, patch_size=4,
    )  # fmt: skip
    return transformers.ViTModel(config)


# Model -> attention modules in it.
ENCODERS: dict[str, tuple[Callable[[], Any], int]] = {
    "bert": (bert, 2),
    "roberta": (roberta, 2),
    "distilbert": (distilbert, 2),
    "modernbert": (modernbert, 2),
}
DECODERS: dict[str, tuple[Callable[[], Any], int]] = {
    "gpt2": (gpt2, 2),
    "llama": (llama, 2),
    "mistral": (mistral, 2),
    "gemma2": (gemma2, 2),
    "gpt_oss": (gpt_oss, 2),
}
SEQ2SEQ: dict[str, tuple[Callable[[], Any], int]] = {"t5": (t5, 6), "bart": (bart, 5)}
TEXT = {**ENCODERS, **DECODERS, **SEQ2SEQ}


def build(name: str) -> Any:
    """The model in eval mode, with weights large enough that attention is not uniform."""
    model = TEXT[name][0]().eval()
    # T5 does not scale its logits: more would make its gradients chaotic in stock float32 too.
    factor = 2 if name == "t5" else 8
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            if "sinks" in parameter_name or "relative_attention_bias" in parameter_name:
                p.normal_()
            elif p.dim() == 2 and "embed" not in parameter_name:
                p.mul_(factor)
    return model


def tokens(side: str = "right", shortest: int = 4) -> dict[str, Tensor]:
    """Three sequences, of 12 and 9 tokens and a short one."""
    ids = torch.randint(2, V, (3, S))
    lengths = torch.tensor([[S], [9], [shortest]])
    position = torch.arange(S)
    mask = position < lengths if side == "right" else position >= S - lengths
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def forward(name: str, inputs: dict[str, Tensor]) -> Callable[..., dict[str, Tensor]]:
    if name in SEQ2SEQ:
        inputs = {**inputs, "decoder_input_ids": torch.randint(2, V, (3, 7))}
        inputs["decoder_attention_mask"] = (torch.arange(7) < torch.tensor([[7], [5], [6]])).long()

    def call(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"logits": model(**inputs, use_cache=False).logits}

    return call
