"""Filters and shuffled tags."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpletuner.catalog.caption_filters import BadFilterError, filtered, parse_filter
from simpletuner.data.caption_variants import filter_captions, shuffle_captions, variants
from simpletuner.data.hashing import draw_many
from simpletuner.data.spec import ShuffleSpec

TAGS = st.lists(st.text("abcdef", min_size=1, max_size=4), min_size=1, max_size=7, unique=True)
SPECS = st.builds(
    ShuffleSpec,
    count=st.integers(1, 6),
    seed=st.integers(0, 9),
    position_start=st.integers(0, 3),
    include_original=st.booleans(),
)


@given(TAGS, SPECS)
def test_variants_are_the_same_tags_in_other_orders(tags: list[str], spec: ShuffleSpec) -> None:
    caption = ", ".join(tags)
    found = variants(caption, spec)
    assert found == variants(caption, spec)
    assert len(set(found)) == len(found)
    for text in found:
        assert Counter(text.split(", ")) == Counter(tags)
        assert text.split(", ")[: spec.position_start] == tags[: spec.position_start]
    shuffled = [text for text in found if text != caption]
    assert (caption in found) == (spec.include_original or len(tags) < spec.position_start + 2)
    assert len(shuffled) <= spec.count
    if len(tags) >= spec.position_start + 2:
        assert shuffled, "two tags or more have another order"
    if len(tags) >= spec.position_start + 4:  # 23 others, of which at most 6 are asked for
        assert len(shuffled) == spec.count


@pytest.mark.parametrize(
    ("split_on", "caption", "other"),
    [
        ("comma", "one,two", "two, one"),
        ("space", "one  two", "two one"),
        ("period", "One thing. Another thing.", "Another thing. One thing."),
        ("period", "One thing. Another thing", "Another thing. One thing"),
    ],
)
def test_tags_may_be_set_apart_in_several_ways(split_on: str, caption: str, other: str) -> None:
    spec = ShuffleSpec(split_on=split_on)  # type: ignore[arg-type]
    assert variants(caption, spec) == (caption, other)


def test_seeds_give_other_orders_and_equal_captions_the_same() -> None:
    caption = "a, b, c, d, e, f"
    orders = {variants(caption, ShuffleSpec(seed=seed, include_original=False)) for seed in range(20)}
    assert len(orders) > 15
    spec = ShuffleSpec(count=2)
    assert shuffle_captions([caption, "x, y", caption], spec) == (*variants(caption, spec), *variants("x, y", spec))


@pytest.mark.parametrize(
    ("entry", "caption", "left"),
    [
        ("masterpiece", "masterpiece, a cat", "a cat"),
        ("masterpiece", "a cat, masterpiece, best", "a cat, best"),
        ("masterpiece", "Masterpiece, a cat", "Masterpiece, a cat"),
        ("v1.0", "v1.0 v1x0", "v1x0"),
        ("best quality", "a  cat,best", "a  cat,best"),
        ("s/cat/dog/", "a cat on a cat", "a dog on a dog"),
        ("s/cat/dog", "a cat", "a dog"),
        (r"s/w\/ (\w+)/with \1/", "a cat w/ hat", "a cat with hat"),
        ("s/CAT/dog/gi", "a Cat", "a dog"),
        ("s/remove//", "a remove cat", "a cat"),
        (r"\bred\b|\bblue\b", "red reddish, blue, cat", "reddish, cat"),
        (r"^a photo of ", "a photo of a cat", "a cat"),
        ("s/", "an s/ here", "an here"),
        (r"\(.*?\)", "a cat (2020)", "a cat"),
        ("(?i)MASTERPIECE", "masterpiece, cat", "cat"),
    ],
)
def test_what_a_filter_does(entry: str, caption: str, left: str) -> None:
    assert filtered(caption, [parse_filter(entry)]) == left


@pytest.mark.parametrize("entry", ["(", "*cat", "s/(/x/", "s/a/b/q", r"s/a/\1/", r"s/a/\q/", "[a"])
def test_what_is_no_filter(entry: str) -> None:
    with pytest.raises(BadFilterError):
        parse_filter(entry)


@given(st.text("abc ,\n", max_size=20))
def test_a_caption_that_no_filter_concerns_stays_as_it_is(caption: str) -> None:
    assert filtered(caption, [parse_filter("zzz"), parse_filter("s/yyy/x/")]) == caption


def test_a_caption_of_which_nothing_is_left_is_none() -> None:
    assert filter_captions(["a cat", "masterpiece", "a dog"], ["masterpiece", "s/dog/cow/"]) == ("a cat", "a cow")


def test_orders_are_the_same_on_every_platform_and_version() -> None:
    assert variants("a, b, c, d, e", ShuffleSpec(count=2, seed=42)) == (
        "a, b, c, d, e",
        "b, a, e, d, c",
        "a, c, d, b, e",
    )


def test_many_draws_are_independent_and_their_beginning_does_not_depend_on_how_many() -> None:
    assert draw_many(3, "a", 1) == draw_many(5, "a", 1)[:3]
    assert draw_many(0, "a") == ()
    found = [number for place in range(200) for number in draw_many(5, "a", place)]
    assert len(set(found)) == 1000
    assert abs(sum(found) / len(found) / 2**64 - 0.5) < 0.05
