"""The JSON Schema of the configuration file, made from the declarations."""

from __future__ import annotations

from typing import Any

from simpletuner.config.root import option_aliases, sections


def json_schema() -> dict[str, Any]:
    """Draft 2020-12, one flat object. `x-group`, `x-level`, `x-unit`, `x-aliases` and `x-holds` serve forms."""
    properties: dict[str, Any] = {}
    for section, model in sections().items():
        found = model.model_json_schema()
        assert "$defs" not in found, f"{section} has nested models"
        for name, schema in found["properties"].items():
            properties[name] = {**schema, "x-group": section}
    for alias, name in option_aliases().items():
        properties[alias] = {**properties[name], "deprecated": True, "description": f"Another name of {name}."}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "SimpleTuner configuration",
        "type": "object",
        "properties": properties,
    }
