"""The Z-Image transformer (S3-DiT), on packed sequences.

Same parameters and names as the published checkpoints (diffusers layout), same mathematics as the reference:
"Z-Image: An Efficient Image Generation Foundation Model with Single-Stream Diffusion Transformer" (2025), section 3.
What differs is the work that is not done:

- no sample pays for another's padding: the tokens of a batch lie in one row and attention runs within each sample;
- the context refiner sees only the caption, so `refine_context` is a call of its own whose result can be kept;
- nothing before the main blocks builds a graph unless something there is trained.

This file keeps the checkpoint's own conventions, t = 1 - sigma and output = clean - noise. `velocity` at its end turns
them into ours; nothing outside this folder sees the other sign.

Shape letters: B samples, C latent channels, h w latent sides, D model width, S tokens of one sample, N tokens of a
packed batch, H heads, d head width, G rows: B rows of S tokens when all samples are equally long, else one row of N.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simpletuner.models.z_image.kernels import add_normalised, normalise, rotate, swiglu

TOKEN_MULTIPLE = 32  # image and caption tokens are each padded to a multiple of it, with learned tokens
MODULATION_WIDTH = 256
PATCH = 2  # latents per token side
_MAX_CACHED_LAYOUTS = 64


@dataclass(frozen=True, kw_only=True)
class ZImageTransformerConfig:
    """Sizes of a checkpoint; the defaults are the released 6.15 B parameters."""

    in_channels: int = 16
    dim: int = 3840
    n_layers: int = 30
    n_refiner_layers: int = 2
    n_heads: int = 30
    norm_eps: float = 1e-5
    cap_feat_dim: int = 2560
    rope_theta: float = 256.0
    t_scale: float = 1000.0
    axes_dims: tuple[int, int, int] = (32, 48, 48)

    def __post_init__(self) -> None:
        if self.dim % self.n_heads or self.dim // self.n_heads != sum(self.axes_dims):
            raise ValueError(
                f"dim {self.dim} / n_heads {self.n_heads} must equal the sum of axes_dims {self.axes_dims}"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def ffn_dim(self) -> int:
        return int(self.dim / 3 * 8)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ZImageTransformerConfig:
        """Read a checkpoint's config.json.

        Raises:
            ValueError: the checkpoint has a part that this module does not (other patch sizes, no q/k norm, SigLIP).
        """
        known = {f.name: config[f.name] for f in fields(cls) if config.get(f.name) is not None}
        if "axes_dims" in known:
            known["axes_dims"] = tuple(known["axes_dims"])
        expected = {
            "all_patch_size": [PATCH],
            "all_f_patch_size": [1],
            "qk_norm": True,
            "siglip_feat_dim": None,
            "n_kv_heads": config.get("n_heads"),
        }
        for name, value in expected.items():
            found = config.get(name, value)
            if (list(found) if isinstance(found, tuple) else found) != value:
                raise ValueError(f"{name} = {found!r} is not supported; expected {value!r}")
        return cls(**known)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return normalise(x, self.weight, self.eps)


class TimestepEmbedder(nn.Module):
    """t in [0, 1000] -> [B, width]: sinusoids (Vaswani et al. 2017) through a small MLP."""

    def __init__(self, width: int, hidden: int = 1024, num_frequencies: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(num_frequencies, hidden), nn.SiLU(), nn.Linear(hidden, width))
        self.num_frequencies = num_frequencies

    def forward(self, t_B: Tensor) -> Tensor:
        half = self.num_frequencies // 2
        index = torch.arange(half, dtype=torch.float32, device=t_B.device)
        frequencies = torch.exp(-math.log(10000) * index / half)
        angles = t_B.float()[:, None] * frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        out: Tensor = self.mlp(waves.to(next(self.mlp.parameters()).dtype))
        return out


class Attention(nn.Module):
    """Self-attention with normalised, rotated queries and keys, within each sample of the row."""

    def __init__(self, config: ZImageTransformerConfig) -> None:
        super().__init__()
        self.num_heads = config.n_heads
        self.to_q = nn.Linear(config.dim, config.dim, bias=False)
        self.to_k = nn.Linear(config.dim, config.dim, bias=False)
        self.to_v = nn.Linear(config.dim, config.dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(config.dim, config.dim, bias=False)])
        self.norm_q = RMSNorm(config.head_dim, 1e-5)
        self.norm_k = RMSNorm(config.head_dim, 1e-5)

    def forward(self, x_GSD: Tensor, layout: Layout) -> Tensor:
        heads = (self.num_heads, -1)
        q = rotate(self.norm_q(self.to_q(x_GSD).unflatten(-1, heads)), layout.rotation)
        k = rotate(self.norm_k(self.to_k(x_GSD).unflatten(-1, heads)), layout.rotation)
        v = self.to_v(x_GSD).unflatten(-1, heads)
        if layout.is_uniform:
            mixed = _attend(q, k, v)
        else:
            lengths = layout.lengths
            parts = zip(q.split(lengths, 1), k.split(lengths, 1), v.split(lengths, 1), strict=True)
            mixed = torch.cat([_attend(*part) for part in parts], dim=1)
        out: Tensor = self.to_out[0](mixed.flatten(2))
        return out


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: ZImageTransformerConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)

    def forward(self, x_GSD: Tensor) -> Tensor:
        out: Tensor = self.w2(swiglu(self.w1(x_GSD), self.w3(x_GSD)))
        return out


KEPT_PRODUCTS = ("attention.to_out.0", "feed_forward.w2")
"""In a block: the linear layers that nothing but a norm follows, a third of the block's products."""


class Block(nn.Module):
    """Attention and feed-forward, each between two norms; scale and tanh-gate from the timestep if modulated."""

    def __init__(self, config: ZImageTransformerConfig, *, modulated: bool) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm1 = RMSNorm(config.dim, config.norm_eps)
        self.attention_norm2 = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm1 = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm2 = RMSNorm(config.dim, config.norm_eps)
        self.modulated = modulated
        if modulated:
            width = min(config.dim, MODULATION_WIDTH)
            self.adaLN_modulation = nn.Sequential(nn.Linear(width, 4 * config.dim))

    def forward(self, x_GSD: Tensor, layout: Layout, time_BD: Tensor | None = None) -> Tensor:
        if not self.modulated:
            x_GSD = x_GSD + self.attention_norm2(self.attention(self.attention_norm1(x_GSD), layout))
            out: Tensor = x_GSD + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x_GSD)))
            return out
        scale_attn, gate_attn, scale_ffn, gate_ffn = self.adaLN_modulation(time_BD).chunk(4, dim=-1)
        norm = self.attention_norm1
        h = normalise(x_GSD, layout.spread(norm.weight * (1 + scale_attn)), norm.eps)
        norm = self.attention_norm2
        x_GSD = add_normalised(
            x_GSD, self.attention(h, layout), layout.spread(norm.weight * gate_attn.tanh()), norm.eps
        )
        norm = self.ffn_norm1
        h = normalise(x_GSD, layout.spread(norm.weight * (1 + scale_ffn)), norm.eps)
        norm = self.ffn_norm2
        return add_normalised(x_GSD, self.feed_forward(h), layout.spread(norm.weight * gate_ffn.tanh()), norm.eps)


class FinalLayer(nn.Module):
    """Layer norm without parameters, scale from the timestep, projection to one patch of latents."""

    def __init__(self, config: ZImageTransformerConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.dim, PATCH * PATCH * config.in_channels)
        width = min(config.dim, MODULATION_WIDTH)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, config.dim))

    def forward(self, x_GSD: Tensor, time_BD: Tensor, layout: Layout) -> Tensor:
        scale = layout.spread(1 + self.adaLN_modulation(time_BD))
        out: Tensor = self.linear(F.layer_norm(x_GSD, x_GSD.shape[-1:], eps=1e-6) * scale)
        return out


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the tokens of each sample lie in a row, and how they are rotated.

    lengths: tokens per sample, padding to TOKEN_MULTIPLE included.
    rotation: complex64 [S, 1, d/2] if all lengths are equal and every row is rotated alike, else [G, S, 1, d/2].
    """

    lengths: tuple[int, ...]
    rotation: Tensor
    sample_of_token: Tensor | None  # [N] int64; None when rows are samples

    @property
    def is_uniform(self) -> bool:
        return self.sample_of_token is None

    def spread(self, values_BD: Tensor) -> Tensor:
        """One value per sample -> something that broadcasts over the row: [B, 1, D] or [1, N, D]."""
        if self.sample_of_token is None:
            return values_BD[:, None]
        return values_BD.index_select(0, self.sample_of_token)[None]

    def pack(self, sequences: Sequence[Tensor]) -> Tensor:
        """B tensors [S_i, D] -> [G, S, D]."""
        return torch.stack(tuple(sequences)) if self.is_uniform else torch.cat(tuple(sequences))[None]

    def unpack(self, x_GSD: Tensor) -> tuple[Tensor, ...]:
        """[G, S, D] -> B tensors [S_i, D]."""
        return x_GSD.unbind() if self.is_uniform else x_GSD[0].split(self.lengths)


class ZImageTransformer(nn.Module):
    """Predicts clean - noise from noisy latents, t = 1 - sigma and refined captions."""

    def __init__(self, config: ZImageTransformerConfig) -> None:
        super().__init__()
        self.config = config
        patch_key = f"{PATCH}-1"
        token_width = PATCH * PATCH * config.in_channels
        self.all_x_embedder = nn.ModuleDict({patch_key: nn.Linear(token_width, config.dim)})
        self.all_final_layer = nn.ModuleDict({patch_key: FinalLayer(config)})
        refiners = range(config.n_refiner_layers)
        self.noise_refiner = nn.ModuleList([Block(config, modulated=True) for _ in refiners])
        self.context_refiner = nn.ModuleList([Block(config, modulated=False) for _ in refiners])
        self.t_embedder = TimestepEmbedder(min(config.dim, MODULATION_WIDTH))
        self.cap_embedder = nn.Sequential(
            RMSNorm(config.cap_feat_dim, config.norm_eps), nn.Linear(config.cap_feat_dim, config.dim)
        )
        self.x_pad_token = nn.Parameter(torch.zeros(1, config.dim))
        self.cap_pad_token = nn.Parameter(torch.zeros(1, config.dim))
        self.layers = nn.ModuleList([Block(config, modulated=True) for _ in range(config.n_layers)])
        self.num_params = sum(parameter.numel() for parameter in self.parameters())  # whatever becomes of them
        self._layouts: OrderedDict[tuple[object, ...], Layout] = OrderedDict()

    @property
    def x_embedder(self) -> nn.Linear:
        return cast("nn.Linear", self.all_x_embedder[f"{PATCH}-1"])  # or an adapter around it

    def refine_context(self, prompts_SD: Sequence[Tensor]) -> list[Tensor]:
        """Embed and refine captions; depends on nothing but the caption.

        Args:
            prompts_SD: B prompt embeddings [S_i, cap_feat_dim], 1 <= S_i, unpadded.
        Returns:
            B tensors [S_i rounded up to a multiple of 32, dim].
        """
        dtype = self.x_embedder.weight.dtype
        counts = [len(prompt) for prompt in prompts_SD]
        assert min(counts) > 0, "a prompt has at least one token"
        embedded = self.cap_embedder(torch.cat(tuple(prompts_SD)).to(dtype))
        padded = [_pad(tokens, self.cap_pad_token) for tokens in embedded.split(counts)]
        layout = self._layout(("context",), [_caption_positions(len(tokens)) for tokens in padded], embedded.device)
        x_GSD = layout.pack(padded)
        for block in self.context_refiner:
            x_GSD = block(x_GSD, layout)
        return list(layout.unpack(x_GSD))

    def forward(self, latents_ChW: Sequence[Tensor], t_B: Tensor, context_SD: Sequence[Tensor]) -> list[Tensor]:
        """Predict clean - noise.

        Args:
            latents_ChW: B noisy latents [C, h_i, w_i], h_i and w_i even; sizes may differ.
            t_B: float32 [B], 1 - sigma: 0 is pure noise, 1 is clean.
            context_SD: B results of `refine_context`.
        Returns:
            B tensors [C, h_i, w_i] in the model's dtype.
        """
        sizes = [(latents.shape[-2] // PATCH, latents.shape[-1] // PATCH) for latents in latents_ChW]
        device = latents_ChW[0].device
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._is_prefix_trained()):
            time_BD, image = self._embed_images(latents_ChW, t_B, sizes, context_SD)
        layout = self._layout(
            ("joint",),
            [_joint_positions(size, len(context)) for size, context in zip(sizes, context_SD, strict=True)],
            device,
        )
        x_GSD = layout.pack([torch.cat(pair) for pair in zip(image, context_SD, strict=True)])
        for block in self.layers:
            x_GSD = block(x_GSD, layout, time_BD)
        image_out = [tokens[: h * w] for tokens, (h, w) in zip(layout.unpack(x_GSD), sizes, strict=True)]
        final_layout = self._layout(("final",), [_grid_positions(size, 0) for size in sizes], device)
        patches = self.all_final_layer[f"{PATCH}-1"](final_layout.pack(image_out), time_BD, final_layout)
        return [_unpatchify(rows, size) for rows, size in zip(final_layout.unpack(patches), sizes, strict=True)]

    def _embed_images(
        self,
        latents_ChW: Sequence[Tensor],
        t_B: Tensor,
        sizes: Sequence[tuple[int, int]],
        context_SD: Sequence[Tensor],
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Timestep embedding [B, width] and refined image tokens, B tensors [S_i, D]."""
        dtype = self.x_embedder.weight.dtype
        time_BD = self.t_embedder(t_B * self.config.t_scale).to(dtype)
        patches = [_patchify(latents.to(dtype)) for latents in latents_ChW]
        embedded = self.x_embedder(torch.cat(patches)).split([len(rows) for rows in patches])
        padded = [_pad(tokens, self.x_pad_token) for tokens in embedded]
        positions = [_image_positions(size, len(c)) for size, c in zip(sizes, context_SD, strict=True)]
        layout = self._layout(("image",), positions, t_B.device)
        x_GSD = layout.pack(padded)
        for block in self.noise_refiner:
            x_GSD = block(x_GSD, layout, time_BD)
        return time_BD, layout.unpack(x_GSD)

    def is_context_trained(self) -> bool:
        """Whether `refine_context` has trained parameters, so that its results may not be kept between updates."""
        return self.cap_pad_token.requires_grad or _is_trained(self.cap_embedder, self.context_refiner)

    def _is_prefix_trained(self) -> bool:
        return self.x_pad_token.requires_grad or _is_trained(self.all_x_embedder, self.t_embedder, self.noise_refiner)

    def _layout(self, kind: tuple[str], positions: Sequence[Positions], device: torch.device) -> Layout:
        """The layout of samples at these positions, from the last ones used if it is there."""
        key = (kind, tuple(positions), device)
        layout = self._layouts.get(key)
        if layout is None:
            layout = self._layouts[key] = self._new_layout(positions, device)
            while len(self._layouts) > _MAX_CACHED_LAYOUTS:
                self._layouts.popitem(last=False)
        else:
            self._layouts.move_to_end(key)
        return layout

    def _new_layout(self, positions: Sequence[Positions], device: torch.device) -> Layout:
        with torch.inference_mode(False), torch.no_grad():
            rotations = [_rotation(p.coordinates(), self.config) for p in positions]
            lengths = tuple(len(rotation) for rotation in rotations)
            if len(set(lengths)) > 1:
                samples = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
                return Layout(lengths=lengths, rotation=torch.cat(rotations)[None].to(device), sample_of_token=samples)
            alike = all(p == positions[0] for p in positions)
            rotation = rotations[0] if alike else torch.stack(rotations)
            return Layout(lengths=lengths, rotation=rotation.to(device), sample_of_token=None)


@dataclass(frozen=True)
class Positions:
    """Rotary coordinates of one sample, kept symbolic so that they can key a cache.

    A caption of `caption_len` tokens sits at (1..caption_len, 0, 0), an image grid behind it at
    (caption_len + 1, y, x), image tokens that pad to TOKEN_MULTIPLE at the origin.
    """

    caption_len: int
    grid: tuple[int, int] | None = None
    image_padding: int = 0
    with_caption: bool = True

    def coordinates(self) -> Tensor:
        """int64 [S, 3]: image tokens, their padding, then caption tokens."""
        parts = []
        if self.grid is not None:
            h, w = self.grid
            y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
            frame = torch.full((h, w), self.caption_len + 1)
            parts.append(torch.stack([frame, y, x], dim=-1).flatten(0, 1))
            parts.append(torch.zeros(self.image_padding, 3, dtype=torch.int64))
        if self.with_caption:
            index = torch.arange(1, self.caption_len + 1)
            parts.append(torch.stack([index, torch.zeros_like(index), torch.zeros_like(index)], dim=-1))
        return torch.cat(parts)


def velocity(
    transformer: ZImageTransformer, latents_ChW: Sequence[Tensor], sigma_B: Tensor, context_SD: Sequence[Tensor]
) -> list[Tensor]:
    """Velocity noise - clean at sigma in [0, 1] (0 clean, 1 noise); shapes as in `ZImageTransformer.forward`."""
    return [-out for out in transformer(latents_ChW, 1.0 - sigma_B, context_SD)]


def _attend(q_GSHd: Tensor, k_GSHd: Tensor, v_GSHd: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(q_GSHd.transpose(1, 2), k_GSHd.transpose(1, 2), v_GSHd.transpose(1, 2))
    return out.transpose(1, 2)


def _rotation(coordinates_S3: Tensor, config: ZImageTransformerConfig) -> Tensor:
    """Rotary factors (Su et al. 2021), one group of channels per axis: complex64 [S, 1, d/2], angles in float64."""
    angles = []
    for axis, width in enumerate(config.axes_dims):
        frequencies = 1.0 / config.rope_theta ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles.append(torch.outer(coordinates_S3[:, axis].double(), frequencies))
    angle = torch.cat(angles, dim=-1).float()
    return torch.polar(torch.ones_like(angle), angle)[:, None]


def _is_trained(*parts: nn.Module) -> bool:
    return any(parameter.requires_grad for part in parts for parameter in part.parameters())


def _padding(count: int) -> int:
    return -count % TOKEN_MULTIPLE


def _pad(tokens_SD: Tensor, pad_token_1D: Tensor) -> Tensor:
    missing = _padding(len(tokens_SD))
    return torch.cat([tokens_SD, pad_token_1D.to(tokens_SD.dtype).expand(missing, -1)]) if missing else tokens_SD


def _caption_positions(caption_len: int) -> Positions:
    return Positions(caption_len)


def _grid_positions(grid: tuple[int, int], caption_len: int) -> Positions:
    return Positions(caption_len, grid, 0, False)


def _image_positions(grid: tuple[int, int], caption_len: int) -> Positions:
    return Positions(caption_len, grid, _padding(grid[0] * grid[1]), False)


def _joint_positions(grid: tuple[int, int], caption_len: int) -> Positions:
    return Positions(caption_len, grid, _padding(grid[0] * grid[1]), True)


def _patchify(latents_ChW: Tensor) -> Tensor:
    """[C, h, w] -> [(h/2)(w/2), 4C], channels last within a token."""
    channels, h, w = latents_ChW.shape
    grid = latents_ChW.reshape(channels, h // PATCH, PATCH, w // PATCH, PATCH)
    return grid.permute(1, 3, 2, 4, 0).reshape(-1, PATCH * PATCH * channels)


def _unpatchify(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """[(h/2)(w/2), 4C] -> [C, h, w], the inverse of `_patchify`."""
    h, w = grid
    patches = tokens.view(h, w, PATCH, PATCH, -1)
    return patches.permute(4, 0, 2, 1, 3).reshape(-1, h * PATCH, w * PATCH)
