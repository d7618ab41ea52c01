"""Optional packages, named once: precisions, optimizers and storages come from them. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Library:
    """`distribution` as pip knows it, `module` the first part of its name in Python, `requirement` what pip is told,
    `extra` ours that installs it."""

    distribution: str
    module: str
    requirement: str
    extra: str = "optimizers"


BITSANDBYTES = Library(distribution="bitsandbytes", module="bitsandbytes", requirement="bitsandbytes>=0.50,<0.52")
TORCHAO = Library(distribution="torchao", module="torchao", requirement="torchao>=0.18,<0.20")
OPTIMI = Library(distribution="torch-optimi", module="optimi", requirement="torch-optimi>=0.3.3,<0.4")
PRODIGY = Library(distribution="prodigyopt", module="prodigyopt", requirement="prodigyopt>=1.1.2,<2")
SCHEDULEFREE = Library(distribution="schedulefree", module="schedulefree", requirement="schedulefree>=1.4.1,<2")
PYTORCH_OPTIMIZER = Library(
    distribution="pytorch_optimizer", module="pytorch_optimizer", requirement="pytorch_optimizer>=4.1,<5"
)
QUANTO = Library(
    distribution="optimum-quanto", module="optimum", requirement="optimum-quanto>=0.2.7,<0.3", extra="quanto"
)
S3FS = Library(distribution="s3fs", module="s3fs", requirement="s3fs>=2025.3", extra="s3")
AIOHTTP = Library(distribution="aiohttp", module="aiohttp", requirement="aiohttp>=3.11", extra="urls")
DATASETS = Library(distribution="datasets", module="datasets", requirement="datasets>=4,<6", extra="datasets")
PYARROW = Library(distribution="pyarrow", module="pyarrow", requirement="pyarrow>=18", extra="parquet")

LIBRARIES = (
    BITSANDBYTES,
    TORCHAO,
    OPTIMI,
    PRODIGY,
    SCHEDULEFREE,
    PYTORCH_OPTIMIZER,
    QUANTO,
    S3FS,
    AIOHTTP,
    DATASETS,
    PYARROW,
)
