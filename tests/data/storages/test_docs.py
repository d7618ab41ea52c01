"""What docs/STORAGES says is what the code does, in both languages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from simpletuner.config.dataset_storages import storage_options
from simpletuner.data.storages import urls
from simpletuner.data.storages.patience import Patience
from simpletuner.i18n import catalog

DOCS = Path(__file__).parents[3] / "docs"
WORDS = {"en": ("sixteen", "four times", "a thousand"), "es": ("dieciséis", "cuatro veces", "mil objetos")}


@pytest.mark.parametrize(("language", "name"), [("en", "STORAGES.md"), ("es", "STORAGES.es.md")])
def test_messages_and_numbers_are_the_programs(language, name):
    page = (DOCS / name).read_text(encoding="utf-8")
    titles = [text for key, text in catalog(language).items() if key.endswith(".title")]
    quoted = re.findall(r"^\| \*([^*]+)\* \|", page, re.MULTILINE)
    assert len(quoted) == 7
    for words in quoted:
        pattern = ".*".join(re.escape(part.strip()) for part in words.split("…"))
        assert any(re.search(pattern, title) for title in titles), words
    assert all(word in page for word in WORDS[language])
    assert (urls._NUM_FETCHERS, Patience().num_attempts) == (16, 4)


def test_every_key_of_a_place_is_in_an_example_or_explained():
    page = (DOCS / "STORAGES.md").read_text(encoding="utf-8")
    known = {"aws_max_pool_connections", "num_proc", "cache_dir", "path", "streaming"}
    assert {key.rpartition(".")[2] for key in storage_options()} - known <= set(re.findall(r"[a-z_]{3,}", page))
