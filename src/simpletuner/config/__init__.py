"""The configuration of a run: declared once, parsed once, frozen. Nothing here imports torch."""

from simpletuner.config.datasets import AspectBucket, DatasetsConfig, ImageDataset, TextEmbeds
from simpletuner.config.load import LoadedConfig, load_run_config
from simpletuner.config.root import Config
from simpletuner.config.settings import Origin, OriginKind

__all__ = [
    "AspectBucket",
    "Config",
    "DatasetsConfig",
    "ImageDataset",
    "LoadedConfig",
    "Origin",
    "OriginKind",
    "TextEmbeds",
    "load_run_config",
]
