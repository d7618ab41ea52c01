"""Numbers for people."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpletuner.events import formats


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.44, "0.4 s"),
        (41, "41 s"),
        (59.7, "1 m 00 s"),
        (125, "2 m 05 s"),
        (3599.6, "1 h 00 m"),
        (4320, "1 h 12 m"),
        (86400, "1 d 0 h"),
        (273600, "3 d 4 h"),
    ],
)
def test_durations(seconds, text):
    assert formats.duration(seconds) == text


def test_a_rounded_duration_has_no_empty_unit():
    assert formats.rounded_duration(5) == "5 s"
    assert formats.rounded_duration(180) == "3 m"
    assert formats.rounded_duration(7200) == "2 h"
    assert formats.rounded_duration(4200) == "1 h 10 m"
    assert formats.compact_duration(4200) == "1h10m"


def test_spanish_has_a_decimal_comma():
    assert (formats.decimal(3.414, 2, "en"), formats.decimal(3.414, 2, "es")) == ("3.41", "3,41")
    assert formats.significant(0.3214, "es") == "0,321"
    assert formats.scientific(9.55e-5, "es") == "9,55e-5"
    assert formats.size(1.25e9, "es") == "1,2 GB"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0.00"), (0.321, "0.321"), (12.34, "12.3"), (123.4, "123"), (1.2e-5, "1.2e-5"), (float("nan"), "nan")],
)
def test_three_significant_digits(value, text):
    assert formats.significant(value, "en") == text


@pytest.mark.parametrize(("value", "text"), [(1e-4, "1e-4"), (0.0, "0"), (2.5e-5, "2.5e-5"), (1.0, "1e0")])
def test_learning_rates(value, text):
    assert formats.scientific(value) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (860, "860"), (1_234_567, "1.23 M"), (6_154_908_736, "6.15 B"), (999_600, "1.00 M")]
)
def test_parameter_counts(count, text):
    assert formats.parameters(count, "en") == text


@given(st.integers(0, 10**14))
def test_sizes_are_short_and_right_to_five_percent(num_bytes):
    number, unit = formats.size(num_bytes, "en").split()
    value = float(number) * 1000 ** ("B", "kB", "MB", "GB", "TB").index(unit)
    assert abs(value - num_bytes) <= 0.05 * num_bytes
    assert len(number) <= 3
