"""Images to latents and back with the FLUX autoencoder (diffusers' AutoencoderKL).

Outside this file latents are always "scaled": (z - shift) * scale, close to zero mean and unit variance, float32.

diffusers is imported where it is used: whoever only asks for an id pays nothing.

Shape letters: B images, C channels (3 of an image, 16 of a latent), H W sides.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner.models.files import WeightFiles, fingerprint, read_json, unsupported
from simpletuner.models.lean_imports import lean_imports
from simpletuner.models.streaming import load_weights_
from simpletuner.models.z_image.spec import Z_IMAGE

# Part of every cache key. Raise it when the same files and image would give other latents.
_RECIPE = "posterior mode, (z - shift) * scale in float32; 1"


@dataclass(frozen=True, kw_only=True)
class LatentCodec:
    """Encodes and decodes. Make one with `load_latent_codec`.

    `factor` px make one latent side; image sides must be multiples of `alignment_px`, so that latents make whole
    tokens.
    """

    model: Any
    dtype: torch.dtype
    device: torch.device
    scale: float
    shift: float
    factor: int
    alignment_px: int

    @torch.no_grad()
    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Latents of images, the mode of the posterior: nothing is drawn.

        One image at a time: in a batch the last bits of a latent would depend on its neighbours, so that a cache
        filled in two sittings would differ from one filled at once. Images are large enough to lose nothing by it.

        Args:
            images_BCHW: [B, 3, H, W] in [-1, 1], H and W multiples of `alignment_px`.
        Returns:
            float32 [B, 16, H / factor, W / factor] on the codec's device.
        """
        sides = images_BCHW.shape[-2:]
        assert not any(side % self.alignment_px for side in sides), f"{tuple(sides)} not aligned to {self.alignment_px}"
        posteriors = [
            self.model.encode(image.to(self.device, self.dtype)).latent_dist for image in images_BCHW.split(1)
        ]
        modes_BCHW = torch.cat([posterior.mode().float() for posterior in posteriors])
        return (modes_BCHW - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Images of latents.

        Args:
            latents_BCHW: [B, 16, h, w], scaled.
        Returns:
            float32 [B, 3, h * factor, w * factor] in [-1, 1] on the codec's device.
        """
        z_BCHW = latents_BCHW.to(self.device, torch.float32) / self.scale + self.shift
        images_BCHW: Tensor = self.model.decode(z_BCHW.to(self.dtype), return_dict=False)[0]
        return images_BCHW.float().clamp(-1.0, 1.0)


def load_latent_codec(
    files: WeightFiles,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    tiling: bool = False,
    slicing: bool = False,
) -> LatentCodec:
    """Load the autoencoder.

    Args:
        tiling: work in overlapping tiles of the config's `sample_size` px; bounds the memory of large images and
            moves their latents slightly.
        slicing: decode one image of a batch at a time, too.
    Raises:
        ModelError: the files are damaged or do not fit their config.
    """
    with lean_imports():
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    config = read_json(files.config_path)
    try:
        with torch.device("meta"):
            model = AutoencoderKL.from_config(config)
    except (TypeError, ValueError) as error:
        raise unsupported(files.config_path, error) from error
    place = torch.device(device)
    load_weights_(model, files, keys=lambda name: (name,), dtype=dtype, device=place)
    if tiling:
        model.enable_tiling()
    if slicing:
        model.enable_slicing()
    factor = 2 ** (len(model.config.block_out_channels) - 1)
    return LatentCodec(
        model=model.eval(),
        dtype=dtype,
        device=place,
        scale=float(model.config.scaling_factor),
        shift=float(model.config.shift_factor or 0.0),
        factor=factor,
        alignment_px=factor * Z_IMAGE.patch,
    )


def codec_pieces(codec: LatentCodec) -> list[nn.Module]:
    """The parts of the autoencoder that are called one after the other, with all of its weights."""
    model = codec.model
    children = [child for half in (model.encoder, model.decoder) for child in half.children()]
    pieces = [piece for child in children for piece in (child if isinstance(child, nn.ModuleList) else (child,))]
    return pieces + [conv for conv in (model.quant_conv, model.post_quant_conv) if conv is not None]


def codec_id(files: WeightFiles, *, dtype: torch.dtype, tiling: bool = False) -> str:
    """Identity of the function from images to latents, for cache keys: 64 hex digits. Loads no weights."""
    recipe = "\0".join((_RECIPE, fingerprint(files), str(dtype), f"tiling={tiling}"))
    return hashlib.sha256(recipe.encode()).hexdigest()
