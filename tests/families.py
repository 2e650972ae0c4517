"""Tiny random models of the families that are described matrix by matrix or have several parts, and what they read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from conftest import VOCABULARY, token_ids
from transformers import PreTrainedModel

from hf_compress import CalibrationConfig

# Names of the same sizes in different configs.
_NAMES = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": VOCABULARY}
_TEXT: dict[str, Any] = {
    **_NAMES,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
_GROUPED = {**_TEXT, "num_key_value_heads": 2}
_GPT = {**_NAMES, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
_IMAGE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
}
_TOWERS = {"text_config": {**_TEXT, "num_hidden_layers": 2}, "vision_config": _IMAGE, "projection_dim": 16}
_SEQ2SEQ = {
    **_NAMES,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_T5 = {
    **_NAMES,
    "is_encoder_decoder": True,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "relative_attention_num_buckets": 8,
}
_EXPERTS = {**_GROUPED, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

DECODERS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: hf.GPT2Config(**_GPT),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**_TEXT),
    "phi3": lambda: hf.Phi3Config(**_GROUPED),
    "phi": lambda: hf.PhiConfig(**_TEXT),
    "gptj": lambda: hf.GPTJConfig(**_GPT, rotary_dim=4),
    "gpt_bigcode": lambda: hf.GPTBigCodeConfig(**_GPT),
    "falcon": lambda: hf.FalconConfig(**_TEXT, alibi=False, new_decoder_architecture=False),
    "bloom": lambda: hf.BloomConfig(**_NAMES, hidden_size=32, n_layer=3, n_head=4),
    "granite": lambda: hf.GraniteConfig(**_GROUPED, residual_multiplier=0.5, attention_multiplier=0.3),
    "starcoder2": lambda: hf.Starcoder2Config(**_GROUPED, sliding_window=8),
    "arcee": lambda: hf.ArceeConfig(**_GROUPED),
    "cohere": lambda: hf.CohereConfig(**_GROUPED),
    "olmo": lambda: hf.OlmoConfig(**_GROUPED),
    "olmo2": lambda: hf.Olmo2Config(**_GROUPED),
    "olmo3": lambda: hf.Olmo3Config(**_GROUPED, sliding_window=8),
    "exaone4": lambda: hf.Exaone4Config(**_GROUPED, sliding_window=8),
    "stablelm": lambda: hf.StableLmConfig(**_GROUPED),
    "helium": lambda: hf.HeliumConfig(**_GROUPED, head_dim=8),
    "glm4": lambda: hf.Glm4Config(**_GROUPED, head_dim=8),
    "mixtral": lambda: hf.MixtralConfig(**_GROUPED, num_local_experts=4),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(**_EXPERTS, num_experts=4, head_dim=8, mlp_only_layers=[1]),
}
ENCODERS: dict[str, Callable[[], Any]] = {
    "modernbert": lambda: hf.ModernBertConfig(**_TEXT, cls_token_id=1, sep_token_id=2, local_attention=16),
    "mpnet": lambda: hf.MPNetConfig(**_TEXT),
    "electra": lambda: hf.ElectraConfig(**_TEXT, embedding_size=16),
    "albert": lambda: hf.AlbertConfig(**_TEXT, embedding_size=16),
    "albert_groups": lambda: hf.AlbertConfig(
        **{**_TEXT, "num_hidden_layers": 4}, embedding_size=16, num_hidden_groups=2
    ),
    "dinov2_giant": lambda: hf.Dinov2Config(**_IMAGE, use_swiglu_ffn=True),
    "dinov3_vit": lambda: hf.DINOv3ViTConfig(**_IMAGE),
    "dinov3_gated": lambda: hf.DINOv3ViTConfig(**_IMAGE, use_gated_mlp=True),
    "clip_vision_model": lambda: hf.CLIPVisionConfig(**_IMAGE),
    "clip_text_model": lambda: hf.CLIPTextConfig(**_TEXT),
    "siglip_vision_model": lambda: hf.SiglipVisionConfig(**_IMAGE),
    "wav2vec2": lambda: hf.Wav2Vec2Config(
        **_TEXT, conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4, num_feat_extract_layers=2, mask_time_prob=0.0, layerdrop=0.0,
    ),
    "clip": lambda: hf.CLIPConfig(**_TOWERS),
    "siglip": lambda: hf.SiglipConfig(text_config=_TOWERS["text_config"], vision_config=_IMAGE),
    "bart": lambda: hf.BartConfig(**_SEQ2SEQ),
    "marian": lambda: hf.MarianConfig(**_SEQ2SEQ),
    "m2m_100": lambda: hf.M2M100Config(**_SEQ2SEQ),
    "whisper": lambda: hf.WhisperConfig(
        **{k: v for k, v in _SEQ2SEQ.items() if k != "max_position_embeddings"}, num_mel_bins=8,
        max_source_positions=12, max_target_positions=64, suppress_tokens=None, begin_suppress_tokens=None,
    ),
    "t5": lambda: hf.T5Config(**_T5),
    "t5_gated": lambda: hf.T5Config(**_T5, feed_forward_proj="gated-gelu"),
}  # fmt: skip
# Of these the language part is compressed.
MULTIMODAL: dict[str, Callable[[], Any]] = {
    "llava": lambda: hf.LlavaConfig(
        text_config=hf.LlamaConfig(**_GROUPED), vision_config=hf.CLIPVisionConfig(**_IMAGE), image_token_index=95,
        image_seq_length=16, vision_feature_layer=-1,
    ),
    "gemma3": lambda: hf.Gemma3Config(
        text_config=hf.Gemma3TextConfig(**_GROUPED, head_dim=8, sliding_window=8),
        vision_config=hf.SiglipVisionConfig(**_IMAGE), image_token_index=95, mm_tokens_per_image=4,
    ),
    "smolvlm": lambda: hf.SmolVLMConfig(
        text_config=hf.LlamaConfig(**_GROUPED), vision_config=_IMAGE, image_token_id=95, scale_factor=2,
        pad_token_id=0,
    ),
}  # fmt: skip
CONFIGS = {**DECODERS, **ENCODERS, **MULTIMODAL}
STACKS = ("clip", "siglip", "bart", "marian", "m2m_100", "whisper", "t5", "t5_gated")
_READS_IMAGES = ("dinov2_giant", "dinov3_vit", "dinov3_gated", "clip_vision_model", "siglip_vision_model")


def auto_class(name: str) -> Any:
    if name in DECODERS:
        return hf.AutoModelForCausalLM
    return hf.AutoModelForImageTextToText if name in MULTIMODAL else hf.AutoModel


def make(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny random model whose biases and norms are random too: zeros would hide mistakes."""
    torch.manual_seed(0)
    model = auto_class(name).from_config(CONFIGS[name](), dtype=dtype)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            # T5's softmax has no scale: larger weights would leave one token only.
            elif (
                "embed" not in parameter_name and "original" not in parameter_name and model.config.model_type != "t5"
            ):
                parameter.mul_(3)
    made: PreTrainedModel = model.eval()
    return made


def inputs(name: str, count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch: texts of several lengths, images, sounds, or pairs."""
    generator = torch.Generator().manual_seed(seed)
    images = {"pixel_values": torch.randn(count, 3, 16, 16, generator=generator)}
    if name in _READS_IMAGES:
        return images
    ids = token_ids(count, 16, seed=seed) % 90 + 3
    if name == "whisper":
        return {"input_features": torch.randn(count, 8, 24, generator=generator), "labels": ids[:, :10]}
    if name == "wav2vec2":
        return {"input_values": torch.randn(count, 400, generator=generator)}
    if name == "siglip":
        return {"input_ids": ids, **images}
    if name in ("llava", "gemma3", "smolvlm"):
        places = {"llava": 16, "gemma3": 4, "smolvlm": 4}[name]
        ids = torch.cat((torch.full((count, places), 95), ids), dim=1)
        mask = torch.ones_like(ids)
        batch = {"input_ids": ids, "attention_mask": mask, **images}
        return {**batch, "pixel_values": images["pixel_values"][:, None]} if name == "smolvlm" else batch
    mask = torch.ones_like(ids)
    ids[::2, -5:], mask[::2, -5:] = 0, 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if name in ("bart", "marian", "m2m_100", "t5", "t5_gated"):
        labels = token_ids(count, 12, seed=seed + 1)
        labels[1::2, -4:] = -100
        batch["labels"] = labels
    return {**batch, **images} if name == "clip" else batch


def calibration(name: str, count: int = 16) -> CalibrationConfig:
    data = inputs(name, count, seed=1)

    def collate(rows: list[int]) -> dict[str, torch.Tensor]:
        return {key: tensor[torch.tensor(rows)] for key, tensor in data.items()}

    return CalibrationConfig(
        list(range(count)), data_collator=collate, num_samples=count, num_held_out=0, batch_size=8
    )


def outputs(model: PreTrainedModel, name: str) -> list[torch.Tensor]:
    """All floating-point tensors that come out of a forward pass."""
    from hf_compress.engine.blocks import model_inputs

    with torch.no_grad():
        found = model(**model_inputs(model, inputs(name, 4, seed=7)))
    return [value for value in found.values() if isinstance(value, torch.Tensor) and value.is_floating_point()]
