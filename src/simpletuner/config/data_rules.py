"""Rules between options and the datasets of a run."""

from __future__ import annotations

from collections.abc import Iterator

from simpletuner.config.datasets import DatasetsConfig
from simpletuner.config.root import Config
from simpletuner.config.rule import Origins, was_changed, was_set
from simpletuner.problems import Problem, Severity

_EVALUATION = ("eval_steps_interval", "eval_epoch_interval", "eval_dataset_id")


def broken_data_rules(config: Config, datasets: DatasetsConfig | None, origins: Origins) -> Iterator[Problem]:
    """What is wrong with options and datasets together; None for datasets that cannot be read."""
    if datasets is None:
        return
    validation = config.validation
    ids = [dataset.id for dataset in datasets.evals]
    set_ones = [name for name in _EVALUATION if was_changed(config, name, origins)]
    if set_ones and not ids:
        params = {"key": set_ones[0]}
        yield Problem(code="W-EVAL-NONE", severity=Severity.WARNING, params=params, path=f"/{set_ones[0]}")
    elif validation.eval_dataset_id is not None and validation.eval_dataset_id not in ids:
        params = {"value": validation.eval_dataset_id, "known": ", ".join(ids)}
        yield Problem(code="E-EVAL-DATASET", params=params, path="/eval_dataset_id")
    if was_set("eval_steps_interval", origins) and validation.eval_epoch_interval is not None:
        both = {"steps": validation.eval_steps_interval, "epochs": f"{validation.eval_epoch_interval:g}"}
        yield Problem(code="W-EVAL-TWICE", severity=Severity.WARNING, params=both, path="/eval_epoch_interval")
    if any(entry.text_cache_ondemand for entry in (datasets.text_embeds, *datasets.other_text_embeds)):
        yield Problem(code="I-TEXT-ONDEMAND", severity=Severity.INFO, path="/text_cache_ondemand")
