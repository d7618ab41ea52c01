"""Where the files of a run's model are; what is not there is downloaded."""

from __future__ import annotations

from pathlib import Path

from simpletuner.adapters.files import LORA_FILE_NAME
from simpletuner.catalog.families import FLAVOURS
from simpletuner.config.root import Config
from simpletuner.config.sections.adapter import has_assistant
from simpletuner.events.progress import Reporter
from simpletuner.models.hub import Download, OnDownload
from simpletuner.models.weights import PipelineFiles, resolve_file, resolve_pipeline
from simpletuner.models.z_image.spec import Z_IMAGE


def find_model(config: Config, run: Reporter) -> tuple[PipelineFiles, Path | None]:
    """The files of the model, and of the assistant adapter if one is to be used in training.

    Raises:
        ModelError: something is missing or of another kind.
    """
    with run.phase("download", unit="bytes") as progress:

        def on_download(download: Download) -> None:
            progress.update(download.done_bytes, total=download.size_bytes, detail=download.repo)

        return find_pipeline(config, on_download), _find_assistant(config, on_download)


def find_pipeline(config: Config, on_download: OnDownload) -> PipelineFiles:
    """The files of the model's parts, wherever the options take them from."""
    model = config.model
    return resolve_pipeline(
        model.pretrained_model_name_or_path,
        spec=Z_IMAGE,
        revision=model.revision,
        variant=model.variant,
        transformer=model.pretrained_transformer_model_name_or_path,
        transformer_subfolder=model.pretrained_transformer_subfolder,
        vae=model.pretrained_vae_model_name_or_path,
        text_encoder=model.qwen_text_encoder_model_name_or_path,
        companion=FLAVOURS[model.model_flavour].repository,
        on_download=on_download,
    )


def _find_assistant(config: Config, on_download: OnDownload) -> Path | None:
    adapter = config.adapter
    if adapter.assistant_lora_path is None or not has_assistant(adapter):
        return None
    return resolve_file(
        adapter.assistant_lora_path,
        file_name=adapter.assistant_lora_weight_name or LORA_FILE_NAME,
        part="assistant adapter",
        option="assistant_lora_path",
        on_download=on_download,
    )
