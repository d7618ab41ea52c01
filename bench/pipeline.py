"""A Z-Image pipeline with random weights at the benchmarks' "tiny" size, and a folder of images, for whole runs."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
from common import SIZES, random_weights_
from PIL import Image, ImageDraw

CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
COLOURS = ("red", "green", "blue", "orange", "purple", "teal")
WORDS = ("a photo of a small ball", "on the table", "in the garden", "near an old house", "with long soft shadows")


def save_pipeline(folder: Path, size_name: str = "tiny") -> None:
    """Write the pipeline in diffusers' layout: a transformer of a size of SIZES, a 4-layer Qwen3, a small VAE."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import (
            AutoencoderKL,
            FlowMatchEulerDiscreteScheduler,
            ZImagePipeline,
            ZImageTransformer2DModel,
        )
        from tokenizers import ByteLevelBPETokenizer
        from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

    size = SIZES[size_name]
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([*WORDS, *COLOURS], vocab_size=400, show_progress=False)
    merges = json.loads(trained._tokenizer.to_str())["model"]["merges"]
    tokenizer = Qwen2Tokenizer(
        vocab=trained.get_vocab(),
        merges=[tuple(merge) for merge in merges],
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHAT_TEMPLATE,
    )
    torch.manual_seed(0)
    text_encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=size["cap_feat_dim"],
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            intermediate_size=768,
        )
    )
    transformer = ZImageTransformer2DModel(**size, n_kv_heads=size["n_heads"])
    random_weights_(transformer)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(24, 32, 64, 96),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=16,
        sample_size=256,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    ).save_pretrained(folder)


def save_images(folder: Path, count: int, side_px: int = 256) -> None:
    """Write `count` square images with captions in text files."""
    folder.mkdir(parents=True)
    for index in range(count):
        image = Image.new("RGB", (side_px, side_px), COLOURS[index % len(COLOURS)])
        draw = ImageDraw.Draw(image)
        for ring in range(min(8, side_px // 32)):
            inset = 4 + 12 * ring + index
            draw.ellipse((inset, inset, side_px - inset, side_px - inset), fill=COLOURS[(index + ring) % len(COLOURS)])
        image.save(folder / f"image_{index:02}.png")
        words = [WORDS[0], COLOURS[index % len(COLOURS)], *WORDS[1 : 2 + index % 4]]
        (folder / f"image_{index:02}.txt").write_text(" ".join(words) + f" number {index}\n", encoding="utf-8")
