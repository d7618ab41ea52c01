"""The frozen transformer from its files: quantised, kept for the next start and streamed, as the options say."""

from __future__ import annotations

from pathlib import Path

from simpletuner.catalog.precisions import PRECISIONS
from simpletuner.config.root import Config
from simpletuner.events.progress import Reporter
from simpletuner.models.files import WeightFiles
from simpletuner.models.streaming import Addition
from simpletuner.models.z_image.load import load_transformer
from simpletuner.models.z_image.transformer import ZImageTransformer
from simpletuner.quant.build import quantiser
from simpletuner.train.device import Compute
from simpletuner.train.kept import keep_transformer, kept_path, load_kept_transformer
from simpletuner.train.offload import stream_conversion, transformer_stream


def load_trained_model(
    config: Config, *, files: WeightFiles, compute: Compute, run: Reporter, addition: Addition | None = None
) -> ZImageTransformer:
    """From the model's files, or from the quantised form that an earlier start has kept.

    Args:
        addition: what is added to the weights, before they are quantised.
    """
    key = addition.key if addition is not None else ""
    memory, precision = config.memory, config.memory.base_model_precision
    folder, keeps = memory.quantized_model_dir, PRECISIONS[precision].keeps_plain_parts
    kept = kept_path(Path(folder), precision) if folder and keeps else None
    on_device = memory.quantize_via != "cpu"
    stream = transformer_stream(memory, files, compute, addition_key=key)
    builder = None if stream is None else stream.builder()
    with run.phase("transformer", unit="bytes") as progress:

        def on_progress(done_bytes: int, total_bytes: int) -> None:
            progress.update(done_bytes, total=total_bytes)

        is_kept = kept is not None and kept.exists()
        if kept is not None and is_kept:
            transformer = load_kept_transformer(
                kept,
                files,
                precision=precision,
                dtype=compute.weights,
                device=compute.device,
                addition_key=key,
                builder=builder,
                on_progress=on_progress,
            )
        else:
            conversion = None
            if stream is not None and builder is not None:
                conversion = stream_conversion(stream, builder, quantise_on_device=on_device)
            transformer = load_transformer(
                files,
                dtype=compute.weights,
                device=compute.device,
                quantise=quantiser(precision, compute.weights),
                quantise_on_device=on_device,
                conversion=conversion,
                addition=addition,
                on_progress=on_progress,
            )
        if builder is not None:
            builder.attach(transformer)
    if kept is not None and not is_kept:
        elsewhere = {} if builder is None else builder.stored()
        with run.phase("quantised"):
            keep_transformer(
                kept,
                transformer,
                files,
                precision=precision,
                dtype=compute.weights,
                addition_key=key,
                elsewhere=elsewhere,
            )
    return transformer
