"""Where metrics and messages are reported."""

from __future__ import annotations

from typing import Annotated

from simpletuner.config.fields import Opt, Section

TRACKERS = ("none", "simpletuner", "tensorboard", "wandb", "swanlab", "comet_ml", "custom-tracker", "all")


class TrackingSection(Section):
    report_to: Annotated[str, Opt(choices=TRACKERS, spellings=(("comet", "comet_ml"),))] = "none"
    """Experiment tracker that receives the metrics. The run folder always has them in events.jsonl."""

    tracker_project_name: Annotated[str, Opt()] = "simpletuner"
    """Project at the tracker."""

    tracker_run_name: Annotated[str | None, Opt(shown_default="name of output_dir")] = None
    """Name of the run at the tracker."""

    webhook_config: Annotated[str | None, Opt(holds="json")] = None
    """JSON, or a JSON file, that says where to send messages about the run."""
