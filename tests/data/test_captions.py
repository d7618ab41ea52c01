"""Captions of every strategy, and what is wrong with those that are missing."""

from __future__ import annotations

import os
import sys

import pytest

from simpletuner.data.captions import BadCaption, CaptionFault, lacks_instance_prompt, read_captions
from simpletuner.data.spec import CaptionSpec, ShuffleSpec
from simpletuner.data.tables import TableRow

TEXTFILE = CaptionSpec(caption_strategy="textfile")


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("a_photo_of_sks_dog.jpg", "a photo of sks dog"),
        ("sub/ñandú 猫.png", "ñandú 猫"),
        ("version.2_final.webp", "version.2 final"),
        ("_dog_.png", "dog"),
        ("example.org/1f/black_cat", "black cat"),
    ],
)
def test_a_file_name_is_a_caption(name: str, caption: str) -> None:
    assert read_captions(name, CaptionSpec(), {}) == (caption,)


@pytest.mark.parametrize("strategy", ["parquet", "csv", "huggingface"])
def test_captions_of_a_table(strategy) -> None:
    spec = CaptionSpec(caption_strategy=strategy, prepend_instance_prompt=True, instance_prompts=("sks",))
    rows = {"a.jpg": TableRow(captions=("one", "two")), "b.jpg": TableRow(captions=())}
    assert read_captions("a.jpg", spec, {}, rows) == ("sks one", "sks two")
    assert read_captions("b.jpg", spec, {}, rows) == BadCaption(key="b.jpg", fault=CaptionFault.EMPTY)
    assert read_captions("c.jpg", spec, {}, rows) == BadCaption(key="c.jpg", fault=CaptionFault.NO_ROW)


def test_a_file_name_without_words_is_empty() -> None:
    assert read_captions("___.png", CaptionSpec(), {}) == BadCaption(key="___.png", fault=CaptionFault.EMPTY)


@pytest.mark.skipif(sys.platform == "win32", reason="names are always text on Windows")
def test_a_file_name_that_is_not_text_is_named() -> None:
    image = os.fsdecode(b"caf\xe9.png")
    assert read_captions(image, CaptionSpec(), {}) == BadCaption(key=image, fault=CaptionFault.ENCODING)


@pytest.mark.parametrize(
    ("data", "captions"),
    [
        (b"one", ("one",)),
        (b"one\ntwo\r\n\r\n  three  \r", ("one", "two", "three")),
        (b"\xef\xbb\xbfwith a mark\n", ("with a mark",)),
        ("Windows, año".encode("utf-16"), ("Windows, año",)),
        ("a line separator\u2028is no new line".encode(), ("a line separator\u2028is no new line",)),
    ],
)
def test_each_line_of_a_text_file_is_a_caption(data: bytes, captions: tuple[str, ...]) -> None:
    assert read_captions("a/v1.0 image.jpg", TEXTFILE, {"a/v1.0 image.txt": data}) == captions


def test_the_ending_of_a_text_file_may_be_in_capitals() -> None:
    texts = {"DSC1.TXT": b"loud", "both.txt": b"quiet", "both.TXT": b"loud"}
    assert read_captions("DSC1.JPG", TEXTFILE, texts) == ("loud",)
    assert read_captions("both.jpg", TEXTFILE, texts) == ("quiet",)


def test_lines_stay_together_on_request() -> None:
    spec = CaptionSpec(caption_strategy="textfile", disable_multiline_split=True)
    assert read_captions("a.png", spec, {"a.txt": b"one\r\ntwo\r\n"}) == ("one\ntwo",)


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (None, CaptionFault.MISSING),
        (b"", CaptionFault.EMPTY),
        (b" \n\t\r\n", CaptionFault.EMPTY),
        (b"caf\xe9", CaptionFault.ENCODING),
    ],
)
def test_a_bad_text_file_is_named(data: bytes | None, fault: CaptionFault) -> None:
    texts = {} if data is None else {"a.txt": data}
    assert read_captions("a.png", TEXTFILE, texts) == BadCaption(key="a.txt", fault=fault)


def test_instance_prompts() -> None:
    image = "a_dog.png"
    several = CaptionSpec(caption_strategy="instanceprompt", instance_prompts=("sks dog ", "photo of sks"))
    assert read_captions(image, several, {}) == ("sks dog", "photo of sks")
    only = CaptionSpec(caption_strategy="textfile", only_instance_prompt=True, instance_prompts=("sks",))
    assert read_captions(image, only, {}) == ("sks",)
    prepended = CaptionSpec(prepend_instance_prompt=True, instance_prompts=("sks", "the"))
    assert read_captions(image, prepended, {}) == ("sks a dog", "the a dog")


def test_captions_are_filtered_then_shuffled_and_the_instance_prompt_stays_in_front() -> None:
    image = "masterpiece, one, two.png"
    spec = CaptionSpec(
        filters=("masterpiece",),
        shuffle=ShuffleSpec(),
        prepend_instance_prompt=True,
        instance_prompts=("masterpiece by sks,",),
    )
    assert read_captions(image, spec, {}) == ("masterpiece by sks, one, two", "masterpiece by sks, two, one")
    only = CaptionSpec(caption_strategy="instanceprompt", instance_prompts=("sks, cat",), shuffle=ShuffleSpec())
    assert read_captions(image, only, {}) == ("sks, cat", "cat, sks")
    nothing = CaptionSpec(filters=("masterpiece, one, two",))
    assert read_captions(image, nothing, {}) == BadCaption(key=image, fault=CaptionFault.FILTERED)


def test_a_dataset_that_needs_an_instance_prompt_must_have_one() -> None:
    assert not lacks_instance_prompt(CaptionSpec())
    for used in [
        CaptionSpec(caption_strategy="instanceprompt"),
        CaptionSpec(prepend_instance_prompt=True, instance_prompts=("  ",)),
        CaptionSpec(only_instance_prompt=True),
    ]:
        assert lacks_instance_prompt(used)
