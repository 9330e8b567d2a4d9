"""Writes Stable Diffusion models with random weights, small enough for any machine: they make noise, by the real code.

    <InvokeAI's python> tests/slow/tiny_diffusers.py FOLDER

makes `FOLDER/tiny-sd1` (25 MB) and `FOLDER/tiny-sdxl` (91 MB). Needs what InvokeAI needs: torch, diffusers, transformers.
"""

import json
import sys
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

MARKS = ["<|startoftext|>", "<|endoftext|>"]


def byte_letters() -> list[str]:
    """The letters that CLIP's tokenizer writes bytes as."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [chr(256 + n) for n in range(256 - len(plain))]
    return [chr(code) for code in plain] + others


def tokenizer(folder: Path) -> CLIPTokenizer:
    """One token per byte: no merges."""
    letters = byte_letters()
    words = [*letters, *(letter + "</w>" for letter in letters), *MARKS]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def text_encoder(kind: type, width: int, words: int):
    return kind(
        CLIPTextConfig(
            vocab_size=words,
            hidden_size=width,
            projection_dim=width,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=words - 2,
            eos_token_id=words - 1,
            pad_token_id=words - 1,
        )
    )


def vae() -> AutoencoderKL:
    """An eighth of the sides, as every SD model's is."""
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        sample_size=64,
    )


def unet(attention: int, **more) -> UNet2DConditionModel:
    """InvokeAI tells the architecture from `attention`: 768 is SD 1.x, 2048 SDXL."""
    return UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=attention,
        attention_head_dim=8,
        norm_num_groups=8,
        **more,
    )


def main(folder: Path) -> None:
    torch.manual_seed(0)
    words = tokenizer(folder / "tokenizer")
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text_encoder(CLIPTextModel, 768, len(words)),
        tokenizer=words,
        unet=unet(768),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "tiny-sd1")
    StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=text_encoder(CLIPTextModel, 768, len(words)),
        text_encoder_2=text_encoder(CLIPTextModelWithProjection, 1280, len(words)),
        tokenizer=words,
        tokenizer_2=words,
        unet=unet(
            2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            use_linear_projection=True,
        ),
        scheduler=scheduler,
    ).save_pretrained(folder / "tiny-sdxl")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
