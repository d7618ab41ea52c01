"""Prompts to embeddings with Qwen3, as Z-Image was trained on them.

A prompt is one user message in the tokenizer's chat template, with the generation prompt added and thinking enabled
(which in Qwen3's template means that no empty think block follows). The embedding is what enters the last decoder
layer, so that layer, the final norm and the head are neither stored nor run.

transformers is imported where it is used: whoever only asks for an id, or finds every prompt in a cache, pays nothing.

Shape letters: B prompts, S tokens, D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner.models.files import WeightFiles, digest_files, fingerprint, read_json, unsupported
from simpletuner.models.lean_imports import lean_imports
from simpletuner.models.streaming import Conversion, load_weights_, quantising
from simpletuner.models.z_image.layouts import text_encoder_keys
from simpletuner.problems import ModelError, Problem

MAX_TOKENS = 512
# Part of every cache key. Raise it when the same files and text would give another embedding.
_RECIPE = "user message, generation prompt, thinking on, input of the last layer; 1"


@dataclass(frozen=True, kw_only=True)
class PromptEncoder:
    """Turns prompts into embeddings. Make one with `load_prompt_encoder`."""

    model: nn.Module
    tokenizer: Any
    max_tokens: int
    device: torch.device

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """Embed each prompt in a pass of its own, without padding.

        A batch would be little faster (such passes wait for weights, not for arithmetic) and would let the last bits
        of an embedding depend on its neighbours, so that a cache filled in two sittings would differ from one filled
        at once.

        Args:
            prompts: B texts; "" is a text too. What exceeds `max_tokens` is cut off.
        Returns:
            B tensors [S_i, D] in the encoder's dtype on its device, S_i the prompt's own token count.
        """
        return [self._encode_one(prompt) for prompt in prompts]

    def _encode_one(self, prompt: str) -> Tensor:
        tokens_S = self.tokenizer(self._message(prompt), max_length=self.max_tokens, truncation=True)["input_ids"]
        tokens_BS = torch.tensor([tokens_S], device=self.device)
        embeddings_BSD: Tensor = self.model(input_ids=tokens_BS, use_cache=False).last_hidden_state
        return embeddings_BSD[0]

    def _message(self, prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        text: str = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        return text


def load_prompt_encoder(
    files: WeightFiles,
    tokenizer_dir: Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    max_tokens: int = MAX_TOKENS,
    quantise: Callable[[Tensor], nn.Module] | None = None,
    quantise_on_device: bool = True,
    convert: Callable[[nn.Module], Conversion | None] | None = None,
) -> PromptEncoder:
    """Load the text encoder without its last layer.

    Args:
        quantise: weight [out, in] -> the layer that takes the place of a linear layer of the decoder.
        quantise_on_device: call it on `device` rather than in main memory.
        convert: the model on the meta device -> what becomes of its layers; None: what `quantise` says.
    Raises:
        ModelError: the files are damaged or do not fit their config; E-MODEL-TOKENIZER, E-MODEL-NO-TEMPLATE.
    """
    with lean_imports():
        from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
        from transformers.models.qwen3.modeling_qwen3 import Qwen3Model, Qwen3RotaryEmbedding

    stored = read_json(files.config_path)
    try:
        num_layers = int(stored["num_hidden_layers"])
        config = Qwen3Config.from_dict(
            {
                **stored,
                "num_hidden_layers": num_layers - 1,
                "layer_types": (stored.get("layer_types") or ["full_attention"] * num_layers)[: num_layers - 1],
                "attn_implementation": "sdpa",
            }
        )
        with torch.device("meta"):
            model = Qwen3Model(config)
    except (KeyError, TypeError, ValueError) as error:
        raise unsupported(files.config_path, error) from error
    model.norm = nn.Identity()
    model.rotary_emb = Qwen3RotaryEmbedding(config=config).to(device)  # computed, not stored: made anew off meta
    place = torch.device(device)
    conversion = None if convert is None else convert(model)
    if conversion is None and quantise is not None:
        conversion = quantising(linear_layers(model), quantise, on_device=quantise_on_device)
    load_weights_(model, files, keys=text_encoder_keys(num_layers), dtype=dtype, device=place, conversion=conversion)
    tokenizer = _load_tokenizer(tokenizer_dir)
    return PromptEncoder(model=model.eval(), tokenizer=tokenizer, max_tokens=max_tokens, device=place)


def linear_layers(model: nn.Module) -> frozenset[str]:
    """Names of the layers that may take another form: all linear ones, none of which has a bias."""
    return frozenset(name for name, module in model.named_modules() if isinstance(module, nn.Linear))


def encoder_id(
    files: WeightFiles,
    tokenizer_dir: Path,
    *,
    dtype: torch.dtype,
    max_tokens: int = MAX_TOKENS,
    precision: str = "no_change",
) -> str:
    """Identity of the function from prompts to embeddings, for cache keys: 64 hex digits. Loads no weights."""
    tokenizer = digest_files(path for path in tokenizer_dir.iterdir() if path.is_file())
    quantised = () if precision == "no_change" else (precision,)
    recipe = "\0".join((_RECIPE, fingerprint(files), tokenizer, str(dtype), str(max_tokens), *quantised))
    return hashlib.sha256(recipe.encode()).hexdigest()


def _load_tokenizer(folder: Path) -> Any:
    with lean_imports():
        from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ModelError(Problem(code="E-MODEL-TOKENIZER", params={"path": folder, "reason": str(error)})) from error
    if not tokenizer.chat_template:
        raise ModelError(Problem(code="E-MODEL-NO-TEMPLATE", params={"path": folder}))
    return tokenizer
