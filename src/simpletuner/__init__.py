"""Trainer for LoRA adapters of Z-Image. Importing this package imports nothing heavy."""

__version__ = "0.1.0"
