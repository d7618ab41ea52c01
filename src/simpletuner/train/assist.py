"""The assistant adapter of a run: how it takes part in training steps and in validation images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from simpletuner.adapters.assistant import OPTION, factors
from simpletuner.adapters.files import LoraFile
from simpletuner.adapters.frozen import load_fitting
from simpletuner.catalog.precisions import PRECISIONS
from simpletuner.config.root import Config
from simpletuner.config.sections.adapter import merges_assistant
from simpletuner.models.files import WeightFiles, digest_files
from simpletuner.models.streaming import Addition
from simpletuner.models.z_image.load import empty_transformer


@dataclass(frozen=True, kw_only=True)
class Assistant:
    """An assistant that fits the model.

    `training` and `sampling`: how much its adapter counts beside the weights as they are then. `addition`: what is
    added to them while they are read, if it is merged.
    """

    lora: LoraFile
    training: float
    sampling: float
    addition: Addition | None = None

    @property
    def is_merged(self) -> bool:
        return self.addition is not None

    @property
    def key(self) -> str:
        """Stands for what is added to the weights; empty for nothing."""
        return self.addition.key if self.addition is not None else ""


def read_assistant(config: Config, file: Path | None, transformer: WeightFiles) -> Assistant | None:
    """The assistant as the options want it; None without a file.

    Raises:
        ModelError: it is damaged, no LoRA, or for another model.
    """
    if file is None:
        return None
    options = config.adapter
    lora = load_fitting(empty_transformer(transformer), file, option=OPTION)
    training, sampling = options.assistant_lora_strength, options.assistant_lora_inference_strength
    is_quantised = PRECISIONS[config.memory.base_model_precision].is_quantised
    if not merges_assistant(options, is_quantised=is_quantised):
        return Assistant(lora=lora, training=training, sampling=sampling)
    memory = config.memory
    is_kept = memory.quantized_model_dir or memory.group_offload_to_disk_path
    key = f"{digest_files([file])}@{training:g}" if is_kept else "assistant"
    addition = Addition(pairs=factors(lora, strength=training), key=key)
    return Assistant(lora=lora, training=0.0, sampling=sampling - training, addition=addition)
