"""Keys of adapter files, whichever program wrote them, in terms of the model's own module names. Loads no torch.

| written by                          | a key looks like                                         |
|-------------------------------------|----------------------------------------------------------|
| this program, ai-toolkit            | `diffusion_model.layers.0.attention.to_q.lora_A.weight`  |
| diffusers                           | `transformer.layers.0.attention.to_q.lora_A.weight`      |
| peft                                | `base_model.model.layers.0.attention.to_q.lora_A.weight` |
| musubi-tuner, OneTrainer            | `lora_unet_layers_0_attention_to_q.lora_down.weight`     |
| sd-scripts                          | `lora_unet_layers_0_attention_qkv.lora_down.weight`      |
| trainers on ComfyUI's module names  | `diffusion_model.layers.0.attention.qkv.lora_A.weight`   |
| LyCORIS                             | `lycoris_layers_0_attention_to_q.lokr_w1`                |
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from simpletuner.catalog.modules import FUSED_QKV, LORA_TARGETS, SPLIT_QKV, from_native, is_target, to_native
from simpletuner.problems import Problem


class Part(Enum):
    """What one tensor of an adapted module is."""

    DOWN = "lora_A.weight"
    UP = "lora_B.weight"
    ALPHA = "alpha"
    MAGNITUDE = "dora_scale"
    LOKR_W1 = "lokr_w1"
    LOKR_W1_A = "lokr_w1_a"
    LOKR_W1_B = "lokr_w1_b"
    LOKR_W2 = "lokr_w2"
    LOKR_W2_A = "lokr_w2_a"
    LOKR_W2_B = "lokr_w2_b"
    HADA_W1_A = "hada_w1_a"
    HADA_W1_B = "hada_w1_b"
    HADA_W2_A = "hada_w2_a"
    HADA_W2_B = "hada_w2_b"


LORA_PARTS = (Part.DOWN, Part.UP)
LOKR_W1, LOKR_W1_PAIR = (Part.LOKR_W1,), (Part.LOKR_W1_A, Part.LOKR_W1_B)
LOKR_W2, LOKR_W2_PAIR = (Part.LOKR_W2,), (Part.LOKR_W2_A, Part.LOKR_W2_B)
LOHA_PARTS = (Part.HADA_W1_A, Part.HADA_W1_B, Part.HADA_W2_A, Part.HADA_W2_B)

HASH_KEY = "modelspec.hash_sha256"
"""Metadata: the hash of all bytes after the header."""

DIFFUSERS_KEY = "lora_adapter_metadata"
"""Metadata: peft's configuration, where diffusers keeps the alpha."""

_SUFFIXES = (
    *((f".{part.value}", part) for part in Part),
    (".lora_A.default.weight", Part.DOWN),
    (".lora_down.weight", Part.DOWN),
    (".lora.down.weight", Part.DOWN),
    (".lora_B.default.weight", Part.UP),
    (".lora_up.weight", Part.UP),
    (".lora.up.weight", Part.UP),
    (".lora_magnitude_vector", Part.MAGNITUDE),
    (".lora_magnitude_vector.weight", Part.MAGNITUDE),
    (".lora_magnitude_vector.default.weight", Part.MAGNITUDE),
)
DOTTED_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.")
FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")

# Kinds of adapters that are not read, by what their keys contain.
_OTHER_KINDS = (
    ("boft_", "BOFT"),
    ("oft_", "OFT"),
    ("ia3", "IA3"),
    ("lokr_t2", "LoKr, Tucker"),
    ("hada_t1", "LoHa, Tucker"),
    ("hada_t2", "LoHa, Tucker"),
    ("lora_mid", "LoCon"),
    (".b1.", "GLoRA"),
    (".diff", "full weights"),
)
_MODEL_KEY = re.compile(r"(norm\w*|to_q|qkv)\.weight$")
_NUM_NEAR = 4
_NUM_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key of a file: `stem` is what stands before the suffix, `prefix` its beginning ("" if it has none).

    `module` is the model's own name of the module; `<block>.attention.qkv` for the three fused projections.
    """

    text: str
    stem: str
    prefix: str
    suffix: str
    module: str
    part: Part

    @property
    def is_flat(self) -> bool:
        """Whether underscores stand for the dots of the name."""
        return self.prefix in FLAT_PREFIXES


def parse_key(text: str) -> Key | None:
    """None if it is no tensor of an adapter of a kind that is read."""
    for suffix, part in _SUFFIXES:
        if text.endswith(suffix):
            stem = text.removesuffix(suffix)
            prefix, name = _without_prefix(stem)
            module = _dotted(name) if prefix in FLAT_PREFIXES else from_native(name)
            return Key(text=text, stem=stem, prefix=prefix, suffix=suffix, module=module, part=part)
    return None


def group_keys(texts: Iterable[str]) -> tuple[dict[str, dict[Part, Key]], list[str]]:
    """Return (module -> its keys, the other keys): those that are not read, and those that say a thing twice.

    A thing is said twice under several names of one module, or if q, k or v has an adapter beside the fused one.
    """
    modules: dict[str, dict[Part, Key]] = {}
    rest = []
    for text in texts:
        key = parse_key(text)
        if key is None or key.part in modules.get(key.module, {}):
            rest.append(text)
        else:
            modules.setdefault(key.module, {})[key.part] = key
    for fused in [module for module in modules if is_fused(module)]:
        for module in split_of(fused):
            rest.extend(key.text for key in modules.pop(module, {}).values())
    return modules, rest


def missing_parts(parts: Iterable[Part]) -> tuple[Part, ...]:
    """What a module lacks to be one of the kinds that are read; of several ways to complete it, the first."""
    present = set(parts) - {Part.ALPHA, Part.MAGNITUDE}
    if present & set(LOHA_PARTS):
        return tuple(part for part in LOHA_PARTS if part not in present)
    if present & {*LOKR_W1, *LOKR_W1_PAIR, *LOKR_W2, *LOKR_W2_PAIR}:
        lacking = [
            [part for part in (pair if present & set(pair) else whole) if part not in present]
            for whole, pair in ((LOKR_W1, LOKR_W1_PAIR), (LOKR_W2, LOKR_W2_PAIR))
        ]
        return tuple(part for parts in lacking for part in parts)
    return tuple(part for part in LORA_PARTS if part not in present)


def other_kind(keys: Iterable[str]) -> str:
    """The name of the kind of adapter that keys which are not read belong to; "?" if they tell nothing."""
    texts = tuple(keys)
    return next((kind for mark, kind in _OTHER_KINDS if any(mark in text for text in texts)), "?")


def unread_problem(rest: Sequence[str], path: str) -> Problem:
    """The problem with keys that `group_keys` left over."""
    twice = [text for text in rest if parse_key(text) is not None]
    if twice:
        return Problem(code="E-LORA-TWICE", params={"path": path, "keys": ", ".join(twice[:_NUM_NAMED])})
    params = {"path": path, "kind": other_kind(rest), "keys": ", ".join(rest[:_NUM_NAMED]) or "-"}
    return Problem(code="E-LORA-KIND", params=params)


def looks_like_model(keys: Iterable[str]) -> bool:
    """Whether keys, none of which is read, are those of a transformer's own weights."""
    return any(_MODEL_KEY.search(key) for key in keys)


def is_fused(module: str) -> bool:
    return module.endswith(FUSED_QKV)


def fused_of(module: str) -> str | None:
    """The fused module that this projection is a third of, if it is one."""
    return next((module.removesuffix(name) + FUSED_QKV for name in SPLIT_QKV if module.endswith(name)), None)


def split_of(fused: str) -> tuple[str, str, str]:
    """The three projections of a fused module."""
    block = fused.removesuffix(FUSED_QKV)
    q, k, v = (block + name for name in SPLIT_QKV)
    return q, k, v


def is_known(module: str) -> bool:
    """Whether Z-Image has a linear layer of that name, fused ones included."""
    name = split_of(module)[0] if is_fused(module) else module
    return any(is_target(name, pattern) for pattern in LORA_TARGETS["all"])


def near_names(module: str, known: Sequence[str] = ()) -> list[str]:
    """Names of the model that look like `module`, block numbers left as they are; of `known`, where that is given."""
    names = known or [pattern.replace("*", "0") for pattern in LORA_TARGETS["all"]]
    return difflib.get_close_matches(module, names, n=_NUM_NEAR, cutoff=0.4)


def json_object(text: str | None) -> dict[str, Any]:
    """The object that a metadata entry holds; empty if it holds none."""
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _without_prefix(stem: str) -> tuple[str, str]:
    for prefix in FLAT_PREFIXES:
        if stem.startswith(prefix):
            return prefix, stem.removeprefix(prefix)
    name = stem
    for prefix in DOTTED_PREFIXES:
        name = name.removeprefix(prefix)
    return stem.removesuffix(name) if name else "", name


def _flat_patterns() -> Iterator[tuple[re.Pattern[str], str]]:
    """(flat name with numbers, our dotted name with {} for them), ours and ComfyUI's names."""
    for pattern in LORA_TARGETS["all"]:
        native = to_native(pattern)
        fused = fused_of(pattern)
        for spelling, name in {pattern: pattern, native: pattern, fused or native: fused or pattern}.items():
            flat = re.escape(spelling.replace(".", "_")).replace(r"\*", r"(\d+)")
            yield re.compile(flat), name.replace("*", "{}")


_FLAT: Mapping[re.Pattern[str], str] = dict(_flat_patterns())


def _dotted(flat: str) -> str:
    """ "layers_0_attention_to_q" -> "layers.0.attention.to_q"; a name that the model lacks stays as it is."""
    for pattern, name in _FLAT.items():
        match = pattern.fullmatch(flat)
        if match:
            return name.format(*match.groups())
    return flat
