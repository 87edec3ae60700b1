"""A CLIP with random weights, written as transformers writes it."""

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from tests.models.tiny_pipelines import LENGTH, clip_tokenizer


def write_clip(folder: Path, seed: int = 0) -> str:
    tokenizer = clip_tokenizer()
    size = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = size | ends | {"vocab_size": len(tokenizer), "max_position_embeddings": LENGTH, "pad_token_id": 0}
    config = CLIPConfig(text_config=text, vision_config=size | {"image_size": 16, "patch_size": 4}, projection_dim=24)
    torch.manual_seed(seed)
    model = CLIPModel(config).eval()
    for weights in model.parameters():  # as made, all images look alike
        if weights.ndim > 1:
            torch.nn.init.normal_(weights, std=0.3)
    model.logit_scale.data.fill_(3.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(folder)
    return str(folder)
