"""Build the demo text encoder: a tokenizer that knows the words of the scenes, and a small frozen Qwen3.

The encoder is not trained. Its embeddings have deviation 1 and everything else is small, so that what it hands to the
transformer is mostly "which word", with a little of the context: the transformer learns the rest, and a word it has
never seen still has features of its own, which is all that a LoRA needs to teach it.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from scripts.demo_base import scenes

HIDDEN = 192
MAX_PROMPT_TOKENS = 512
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}"
    "{%- endif %}"
)
_TEMPLATE_WORDS = "user assistant system"
_SCENE_WORDS = "a an on and of the in with photo picture drawing background small big"
_OTHER_WORDS = """
    animal apple baby ball balloon beach bear bee bird boat book bottle bowl box boy bridge butterfly cake camera candle
    car castle cat chair child city clock cloud coat creature cup dark desert dog door dragon dress drop duck eagle
    elephant eye face fire fish flag flower forest fox frog garden ghost girl glass gold grass guitar hair hand happy
    hat hill horse house ice island jellyfish key lamp leaf light lion logo man monster moon mountain mouse night
    ocean octopus old owl painting paper park penguin person pig plane planet plant portrait rabbit rain ring river
    road robot rock rocket room rose sand sea shape shadow shark sheep shell ship shoe silver sitting sky snail snake
    snow spider standing stripes striped spots spotted dots dotted street style sun table tail teapot tiger toy train
    tree turtle umbrella vase wall watch water whale wheel wind window wing wolf woman wood young
    beige brown gray grey turquoise violet
"""


def build_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE in which every word of the scenes, and some others, is one token."""
    words = sorted({*scenes.COLOURS, *scenes.SHAPES, *_SCENE_WORDS.split(), *_OTHER_WORDS.split()})
    # Both spellings: a word begins the prompt, or follows a space.
    corpus = [text for word in words for text in (word, f" {word}")] + _TEMPLATE_WORDS.split()
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=100_000, min_frequency=1, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(corpus, trainer)
    vocab = trained.get_vocab()
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=_merges(trained),
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_PROMPT_TOKENS * 2,
        eos_token="<|im_end|>",
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    return tokenizer


def build_text_encoder(num_tokens: int, *, seed: int = 0) -> Qwen3Model:
    """A frozen random Qwen3 that passes the identity of each token through."""
    config = Qwen3Config(
        vocab_size=num_tokens,
        hidden_size=HIDDEN,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        rope_theta=1_000_000.0,
    )
    encoder = Qwen3Model(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in encoder.named_parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=1.0 if "embed_tokens" in name else 0.02, generator=generator)
    return encoder.requires_grad_(False).eval()


@torch.no_grad()
def encode_prompts(tokenizer: Qwen2Tokenizer, encoder: Qwen3Model, prompts: Sequence[str]) -> list[Tensor]:
    """One tensor [tokens, HIDDEN] per prompt, as ZImagePipeline.encode_prompt gives it."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        for prompt in prompts
    ]
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=MAX_PROMPT_TOKENS, return_tensors="pt")
    mask_BS = tokens["attention_mask"].bool()
    states = encoder(input_ids=tokens["input_ids"], attention_mask=mask_BS, output_hidden_states=True).hidden_states[-2]
    return [state[mask] for state, mask in zip(states, mask_BS, strict=True)]


def export(folder: Path) -> None:
    """Save `tokenizer` and `text_encoder` folders of a pipeline."""
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    # A multiple of 64 rows, as real vocabularies are padded.
    num_rows = -(-len(tokenizer) // 64) * 64
    build_text_encoder(num_rows).to(torch.bfloat16).save_pretrained(folder / "text_encoder")


def _merges(trained: Tokenizer) -> list[tuple[str, str]]:
    """The merges of a trained BPE, in order."""
    pairs: list[list[str]] = json.loads(trained.to_str())["model"]["merges"]
    return [(left, right) for left, right in pairs]
