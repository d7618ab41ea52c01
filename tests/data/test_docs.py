"""What docs/DATALOADER says is what the code does, in both languages."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from simpletuner.config.datasets import dataset_options
from simpletuner.data.geometry import bucket_size, rounded_aspect
from simpletuner.data.spec import ResizeSpec
from simpletuner.data.storage import EXTENSIONS
from simpletuner.i18n import catalog

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {"en": "DATALOADER.md", "es": "DATALOADER.es.md"}


@pytest.fixture(params=PAGES)
def language(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def page(language: str) -> str:
    return (DOCS / PAGES[language]).read_text(encoding="utf-8")


def test_examples_use_options_that_exist(page: str) -> None:
    blocks = re.findall(r"```json\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        for entry in json.loads(block):
            kind = entry.get("dataset_type", "image")
            assert entry.keys() <= dataset_options(kind).keys()


def test_the_table_of_buckets_is_the_formulas(page: str) -> None:
    rows = re.findall(r"^\| (\d+):(\d+) \| (\d+)x(\d+) \| (\d+)x(\d+) \|$", page, flags=re.MULTILINE)
    assert len(rows) == 5
    for row in rows:
        width, height, *sizes = map(int, row)
        aspect = rounded_aspect((width, height), 2)
        assert bucket_size(aspect, ResizeSpec(resolution=1024)) == tuple(sizes[:2])
        assert bucket_size(aspect, ResizeSpec(resolution=512)) == tuple(sizes[2:])


def test_every_ending_is_named(page: str) -> None:
    for extension in EXTENSIONS:
        assert f"`{extension}`" in page


def test_captions_have_their_anchor(page: str) -> None:
    assert "\n### `caption_strategy`\n" in page  # the anchor #caption_strategy


def test_messages_are_quoted_as_they_are(page: str, language: str) -> None:
    titles = " ".join(text for key, text in catalog(language).items() if key.endswith(".title"))
    plain = re.sub(r'"?\{\w+\}"?', "…", titles)
    quoted = re.findall(r"^\| \*(.+?)\*", page, flags=re.MULTILINE)
    assert len(quoted) == 7
    for quote in quoted:
        for piece in quote.split("…"):
            assert piece.strip() in plain, piece
