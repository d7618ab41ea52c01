"""Uploading the result."""

from __future__ import annotations

from typing import Annotated

from simpletuner.config.fields import Opt, Section


class PublishSection(Section):
    push_to_hub: Annotated[bool, Opt()] = False
    """Upload the result to the Hugging Face Hub. Needs a login."""

    hub_model_id: Annotated[str | None, Opt(shown_default="name of output_dir")] = None
    """Repository on the hub that receives the result."""
