"""A complete pipeline in miniature with random weights, saved by diffusers, for every test of this folder."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
SENTENCES = [
    "a photo of a red circle on a blue background",
    "the quick brown fox jumps over the lazy dog",
    "0123456789",
]


@pytest.fixture(scope="session")
def pipeline() -> Any:
    """diffusers' ZImagePipeline: what ours is compared with."""
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

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(SENTENCES, vocab_size=320, show_progress=False)
    tokenizer = Qwen2Tokenizer(
        vocab=trained.get_vocab(),
        merges=_merges(trained),
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHAT_TEMPLATE,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text_encoder = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=32,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=16,
                intermediate_size=64,
                tie_word_embeddings=False,
            )
        )
        transformer = ZImageTransformer2DModel(
            dim=96, n_heads=3, n_kv_heads=3, n_layers=2, n_refiner_layers=1, axes_dims=(8, 12, 12), cap_feat_dim=32
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 16, 16),
            norm_num_groups=4,
            latent_channels=16,
            sample_size=32,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        for module in (text_encoder, transformer, vae):
            for parameter in module.parameters():
                # Away from zeros and ones, so that a parameter that is skipped or swapped shows.
                parameter.data += 0.05 * torch.randn_like(parameter)
    pipe = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def pipeline_dir(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline on disk, in diffusers' layout. Do not change it: copy it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-z-image"
    pipeline.save_pretrained(folder)
    return folder


def _merges(tokenizer: Any) -> list[tuple[str, str]]:
    import json

    return [tuple(merge) for merge in json.loads(tokenizer._tokenizer.to_str())["model"]["merges"]]
