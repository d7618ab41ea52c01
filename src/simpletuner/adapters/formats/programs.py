"""Which programs load an adapter file, told by its keys, and why not. Loads no torch.

ComfyUI's rules are written from the description of its formats, diffusers' are those of its loader for Z-Image (a test
compares them with the installed one).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from simpletuner.adapters.formats.names import (
    DIFFUSERS_KEY,
    Key,
    Part,
    group_keys,
    is_fused,
    is_known,
    json_object,
    missing_parts,
    parse_key,
)
from simpletuner.catalog.modules import to_native

PROGRAMS = ("ComfyUI", "diffusers", "musubi-tuner")

_PEFT_SUFFIXES = frozenset({".lora_A.weight", ".lora_B.weight"})
_KOHYA_SUFFIXES = frozenset({".lora_down.weight", ".lora_up.weight"})
_PLAIN_SUFFIXES = _PEFT_SUFFIXES | _KOHYA_SUFFIXES
_LORA_PARTS = (Part.DOWN, Part.UP, Part.ALPHA)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a program loads the file. `reasons` are names of texts: why not or, if it does, what it does otherwise.

    `example` is the first key that the program does not use.
    """

    program: str
    loads: bool
    reasons: tuple[str, ...]
    example: str = ""


@dataclass(kw_only=True)
class _Findings:
    """Reasons as they are found, each once, and the first key of any of them."""

    reasons: dict[str, None] = field(default_factory=dict)
    example: str = ""

    def add(self, reason: str, key: str = "") -> None:
        self.reasons[reason] = None
        self.example = self.example or key

    def verdict(self, program: str) -> Verdict:
        loads = not self.reasons
        return Verdict(program=program, loads=loads, reasons=tuple(self.reasons), example=self.example)


def who_loads(texts: Collection[str], metadata: Mapping[str, str]) -> tuple[Verdict, ...]:
    """A verdict for each of PROGRAMS about a file with these keys."""
    keys = [parse_key(text) for text in texts]
    unread = [text for text, key in zip(texts, keys, strict=True) if key is None]
    found = [key for key in keys if key is not None]
    return (
        comfyui(found, unread, metadata),
        diffusers(found, unread),
        musubi(found, unread),
    )


def comfyui(keys: Collection[Key], unread: Collection[str], metadata: Mapping[str, str]) -> Verdict:
    """Its Z-Image model has the native modules; names of diffusers are mapped to slices of the fused matrix."""
    findings = _begin(keys, unread)
    for key in keys:
        if not is_known(key.module):
            findings.add("unknown_module", key.text)
        elif key.prefix in ("", "transformer.", "diffusion_model."):
            if is_fused(key.module) and key.prefix != "diffusion_model.":
                findings.add("native_prefix", key.text)
            elif _spelled(key) not in (key.module, to_native(key.module)):
                findings.add("unknown_module", key.text)
        elif key.prefix == "lycoris_":
            if _spelled(key) != key.module.replace(".", "_"):
                findings.add("unknown_module", key.text)
        elif key.prefix == "lora_unet_":
            if _spelled(key) != to_native(key.module).replace(".", "_") or ".to_" in to_native(key.module):
                findings.add("flat_split", key.text)
        else:
            findings.add("prefix", key.text)
        if key.part in (Part.DOWN, Part.UP) and key.suffix not in _PLAIN_SUFFIXES:
            findings.add("suffix", key.text)
        if key.part is Part.MAGNITUDE and key.suffix != ".dora_scale":
            findings.add("peft_magnitude", key.text)
    verdict = findings.verdict("ComfyUI")
    config = json_object(metadata.get(DIFFUSERS_KEY))
    alpha, rank = config.get("transformer.lora_alpha"), config.get("transformer.r")
    if verdict.loads and alpha is not None and alpha != rank and not any(key.part is Part.ALPHA for key in keys):
        return Verdict(program="ComfyUI", loads=True, reasons=("alpha_in_metadata",))
    return verdict


def diffusers(keys: Collection[Key], unread: Collection[str]) -> Verdict:
    """`ZImagePipeline.load_lora_weights`: split names only, but for the fused ones of flat files."""
    findings = _begin(keys, unread)
    parts = {key.part for key in keys}
    prefixes = {key.prefix for key in keys}
    has_alpha = Part.ALPHA in parts
    is_lokr = any(part.value.startswith("lokr_") for part in parts)
    if len(prefixes) > 1:
        findings.add("mixed_prefixes", next(key.text for key in keys if key.prefix != min(prefixes)))
    for key in keys:
        if key.suffix == ".dora_scale":
            findings.add("dora_dropped", key.text)
        elif key.part.value.startswith("hada_"):
            findings.add("loha", key.text)
        elif is_lokr and (key.part in (Part.DOWN, Part.UP) or key.prefix not in ("diffusion_model.", "transformer.")):
            findings.add("lokr_names", key.text)
        elif is_fused(key.module) and (key.prefix != "lora_unet_" or is_lokr):
            findings.add("fused", key.text)
        else:
            _check_diffusers_lora(key, findings, has_alpha=has_alpha, is_lokr=is_lokr)
    return findings.verdict("diffusers")


def musubi(keys: Collection[Key], unread: Collection[str]) -> Verdict:
    """Flat split names with down, up and alpha; its converter takes the others."""
    findings = _begin(keys, unread)
    for key in keys:
        if key.prefix != "lora_unet_":
            findings.add("not_flat", key.text)
        elif _spelled(key) != key.module.replace(".", "_") or is_fused(key.module):
            findings.add("flat_native", key.text)
        elif key.part not in _LORA_PARTS or key.suffix not in (*_KOHYA_SUFFIXES, ".alpha"):
            findings.add("kohya_parts", key.text)
    return findings.verdict("musubi-tuner")


def _begin(keys: Collection[Key], unread: Collection[str]) -> _Findings:
    findings = _Findings()
    for text in unread:
        findings.add("unread", text)
    if not keys:
        findings.add("nothing")
    modules, twice = group_keys(key.text for key in keys)
    for parts in modules.values():
        if missing_parts(parts):
            findings.add("incomplete", next(iter(parts.values())).text)
    for text in twice:
        findings.add("twice", text)
    return findings


def _check_diffusers_lora(key: Key, findings: _Findings, *, has_alpha: bool, is_lokr: bool) -> None:
    spelled, flat = _spelled(key), key.is_flat
    own = key.module.replace(".", "_") if flat else key.module
    native_out = key.module.endswith(".to_out.0") and (flat or key.suffix in (*_KOHYA_SUFFIXES, ".alpha"))
    if key.prefix not in ("", "transformer.", "diffusion_model.", "lora_unet_"):
        findings.add("prefix", key.text)
    elif spelled != own and not is_fused(key.module) and not (native_out and spelled.endswith("out")):
        findings.add("native_names", key.text)
    elif key.prefix == "transformer." and (has_alpha or ".default" in key.suffix) and not is_lokr:
        findings.add("alpha_key", key.text)
    elif key.prefix == "" and not has_alpha and ".default" not in key.suffix:
        findings.add("bare", key.text)
    elif key.prefix == "lora_unet_" and key.suffix in _PEFT_SUFFIXES:
        findings.add("suffix", key.text)


def _spelled(key: Key) -> str:
    return key.stem.removeprefix(key.prefix)
