import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpletuner.config.sizes import check_resolutions, nearest_size, parse_resolutions

EDGES = st.integers(1, 256).map(lambda n: n * 16)


@given(st.lists(st.tuples(EDGES, EDGES), min_size=1, max_size=4), st.sampled_from(["x", "X", " x "]))
def test_sizes_come_back_as_written(sizes, sign):
    text = ", ".join(f"{w}{sign}{h}" for w, h in sizes)
    assert parse_resolutions(text) == tuple(sizes)
    assert check_resolutions(text) == text


def test_the_specifications_examples():
    assert parse_resolutions("1024x1024,1280x768,2048x2048") == ((1024, 1024), (1280, 768), (2048, 2048))
    assert parse_resolutions("1024") == ((1024, 1024),)
    assert parse_resolutions("1") == parse_resolutions("1.0") == ((1024, 1024),)
    assert parse_resolutions("0.25") == ((512, 512),)


@given(st.text())
def test_any_text_is_sizes_or_a_value_error(text):
    try:
        sizes = parse_resolutions(text)
    except ValueError:
        return
    assert sizes
    assert all(w > 0 and h > 0 for w, h in sizes)


@pytest.mark.parametrize("text", ["", ",", "0x16", "1024x", "x", "1023x1024", "-1", "1024.5", "nan", "1e3"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError):
        check_resolutions(text)


@given(st.integers(64, 4096), st.integers(64, 4096))
def test_the_suggested_size_is_valid_and_near(width, height):
    ((w, h),) = parse_resolutions(check_resolutions(nearest_size(f"{width}x{height}")))
    assert abs(w - width) <= 8
    assert abs(h - height) <= 8
