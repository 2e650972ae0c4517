"""Tiny random encoders of text and of images, and what they are shown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from conftest import token_ids
from transformers import (
    AutoModel,
    BertConfig,
    DeiTConfig,
    Dinov2Config,
    DistilBertConfig,
    PreTrainedModel,
    RobertaConfig,
    ViTConfig,
)

from hf_compress import CalibrationConfig

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}
_TEXT: dict[str, Any] = {**_SIZES, "vocab_size": 96, "max_position_embeddings": 64, "pad_token_id": 0}
_IMAGES: dict[str, Any] = {**_SIZES, "image_size": 16, "patch_size": 4}
ENCODERS: dict[str, Callable[[], Any]] = {
    "bert": lambda: BertConfig(**_TEXT),
    "roberta": lambda: RobertaConfig(**_TEXT),
    "distilbert": lambda: DistilBertConfig(
        vocab_size=96, dim=64, n_layers=3, n_heads=4, hidden_dim=96, max_position_embeddings=64, pad_token_id=0
    ),
    "vit": lambda: ViTConfig(**_IMAGES),
    "deit": lambda: DeiTConfig(**_IMAGES),
    "dinov2": lambda: Dinov2Config(**_IMAGES),
}
IMAGES = ("vit", "deit", "dinov2")


def make_encoder(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModel.from_config(ENCODERS[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model.eval()


def inputs(name: str, count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    if name in IMAGES:
        return {"pixel_values": torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))}
    ids = token_ids(count, 24, seed=seed)
    mask = torch.ones_like(ids)
    ids[::2, -6:], mask[::2, -6:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def calibration(name: str) -> CalibrationConfig:
    data = inputs(name, 48, seed=1)

    def collate(rows: list[int]) -> dict[str, torch.Tensor]:
        return {key: tensor[torch.tensor(rows)] for key, tensor in data.items()}

    return CalibrationConfig(list(range(48)), data_collator=collate, num_samples=48, num_held_out=0, batch_size=16)


def features(model: PreTrainedModel, name: str) -> torch.Tensor:
    batch = inputs(name, 6, seed=7)
    with torch.no_grad():
        states: torch.Tensor = model(**batch).last_hidden_state
    mask = batch.get("attention_mask")
    return states.flatten(end_dim=1) if mask is None else states[mask.bool()]
