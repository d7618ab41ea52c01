import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpletuner.config.root import options
from simpletuner.config.values import BadValueError, convert, fill_variables, is_unset

ANYTHING = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers()) | st.just({"a": 1})
)


@given(st.sampled_from(sorted(options())), ANYTHING)
def test_a_value_has_the_options_type_or_is_refused(name, value):
    option = options()[name]
    try:
        found = convert(value, option)
    except BadValueError:
        return
    types = {"flag": bool, "integer": int, "number": (int, float), "text": str, "list": tuple}
    assert isinstance(found, types[option.kind])
    assert not (option.kind in ("integer", "number") and isinstance(found, bool))
    assert option.kind != "number" or math.isfinite(found)
    assert not option.choices or found in option.choices


@given(st.integers(-(2**40), 2**40))
def test_whole_numbers_in_every_spelling(number):
    option = options()["max_train_steps"]
    for written in (number, float(number), str(number), f" {number} ", f"{number}.0"):
        assert convert(written, option) == number


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_as_texts(number):
    assert convert(repr(number), options()["learning_rate"]) == number


@pytest.mark.parametrize("word", ["true", "True", "yes", "ON", "1", 1, True])
def test_words_for_true(word):
    assert convert(word, options()["debug"]) is True


@pytest.mark.parametrize("word", ["false", "FALSE", "no", "off", "0", 0, False])
def test_words_for_false(word):
    """The text "false" must not be dropped, nor count as true for being a text that is not empty."""
    assert convert(word, options()["debug"]) is False


@pytest.mark.parametrize(
    ("name", "written", "meant"),
    [
        ("model_family", "z-image", "z_image"),
        ("model_family", "Z_IMAGE", "z_image"),
        ("model_flavour", "turbo_ostris_v2", "turbo-ostris-v2"),
        ("base_model_precision", "int8", "int8-torchao"),
        ("base_model_precision", "nf4", "nf4-bnb"),
        ("lr_scheduler", "cosine_with_warmup", "cosine"),
        ("caption_strategy", "instance_prompt", "instanceprompt"),
        ("mixed_precision", "BF16", "bf16"),
        ("mixed_precision", "fp32", "no"),
        ("validation_image_format", "JPG", "jpeg"),
    ],
)
def test_accepted_spellings(name, written, meant):
    assert convert(written, options()[name]) == meant


def test_every_choice_means_itself():
    for option in options().values():
        for choice in option.choices:
            assert convert(choice, option) == choice
        for _, choice in option.opt.spellings:
            assert choice in option.choices or option.kind == "integer"
            assert convert(choice, option) == (int(choice) if option.kind == "integer" else choice)


def test_lists_are_written_in_three_ways():
    option = options()["peft_lora_target_modules"]
    assert convert(["to_q", "to_k"], option) == ("to_q", "to_k")
    assert convert('["to_q", "to_k"]', option) == ("to_q", "to_k")
    assert convert("to_q, to_k", option) == ("to_q", "to_k")


def test_what_counts_as_not_set():
    assert is_unset(None, options()["lora_rank"])
    assert is_unset("", options()["output_dir"])
    assert is_unset("None", options()["lora_alpha"])
    assert not is_unset("", options()["resume_from_checkpoint"])
    assert not is_unset("none", options()["pretrained_transformer_subfolder"])
    assert not is_unset(0, options()["max_grad_norm"])


def test_variables_are_filled_in_at_any_depth():
    environ = {"HOME_DIR": "/h"}
    assert fill_variables({"a": ["{env:HOME_DIR}/x", 1]}, "k", environ) == {"a": ["/h/x", 1]}
    with pytest.raises(BadValueError) as caught:
        fill_variables("{env:NOPE}", "output_dir", environ)
    assert caught.value.problem.params == {"key": "output_dir", "variable": "NOPE"}
