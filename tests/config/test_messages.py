"""Every message of a configuration problem: what brings it about, and what it says in both languages."""

import json
from pathlib import Path

import pytest

import simpletuner
from simpletuner.i18n import render_problem

LOCALES = Path(simpletuner.__file__).parent / "locales"

BROKEN_JSON = {
    "E-JSON-EXTRA": '{"a": 1} x',
    "E-JSON-DEPTH": "[" * 99,
    "E-JSON-KEY": "{a: 1}",
    "E-JSON-COLON": '{"seed" 1}',
    "E-JSON-COMMA": '{"seed": 1 "debug": true}',
    "E-JSON-STRING": r'{"seed": "C:\x"}',
    "E-JSON-VALUE": '{"seed": True}',
    "E-JSON-END": '{"seed": 1',
    "E-CONFIG-OBJECT": "[]",
    "W-KEY-REPEATED": '{"seed": 1, "seed": 2, "validation_disable": true}',
}

# code -> (options of config.json, words that both languages' texts must hold)
OPTIONS = {
    "E-KEY-MISSPELT": ({"lora_rnk": 4}, ["lora_rnk", "lora_rank"]),
    "E-KEY-UNKNOWN": ({"zzz": 4}, ["zzz", "--help-all"]),
    "E-NOT-YET": ({"slider_lora_target": True}, ["slider_lora_target = true"]),
    "W-NOT-YET-MEMORY": ({"fsdp_enable": True, "deepspeed_config": "zero2"}, ["fsdp_enable, deepspeed_config"]),
    "W-NOT-YET-SPEED": ({"fuse_qkv_projections": True}, ["fuse_qkv_projections"]),
    "W-NOT-YET-OTHER": ({"print_filenames": "true"}, ["print_filenames"]),
    "E-VALUE-NOT-YET": ({"num_processes": 2}, ["num_processes = 2", "1"]),
    "E-PRECISION-COARSE": ({"base_model_precision": "int2-quanto"}, ["int2-quanto", "nf4-bnb"]),
    "E-PRECISION-FORMAT": ({"base_model_precision": "fp8-native"}, ["fp8-native", "fp8wo-torchao"]),
    "E-PRECISION-GRADIENTS": ({"base_model_precision": "int8dq-torchao"}, ["int8dq-torchao", "int8-torchao"]),
    "E-PRECISION-DEVICE": (
        {"base_model_precision": "nf4", "device": "mps"},
        ["base_model_precision = nf4-bnb", "mps", "int8-torchao"],
    ),
    "W-QUANTISED-DIR-UNUSED": ({"quantized_model_dir": "kept"}, ["quantized_model_dir", "no_change", "nf4-bnb"]),
    "E-PRECISION-SDNQ": (
        {"text_encoder_precision": "int8-sdnq"},
        ["text_encoder_precision = int8-sdnq", "int8-torchao"],
    ),
    "E-VARIABLE-MISSING": ({"output_dir": "{env:NOPE}"}, ["output_dir", "NOPE"]),
    "E-VALUE-FLAG": ({"debug": "maybe"}, ["debug", "maybe", "true"]),
    "E-VALUE-INTEGER": ({"lora_rank": 1.5}, ["lora_rank", "1.5"]),
    "E-VALUE-NUMBER": ({"learning_rate": "4e0e7"}, ["learning_rate", "4e0e7", "1e-4"]),
    "E-VALUE-TEXT": ({"output_dir": True}, ["output_dir", "true"]),
    "E-VALUE-LIST": ({"peft_lora_target_modules": [1]}, ["peft_lora_target_modules", "[1]"]),
    "E-VALUE-CHOICE": ({"optimizer": "adamw_bf6"}, ["adamw_bf6", "optimizer", "lion"]),
    "E-VALUE-RANGE": ({"lora_rank": 0}, ["lora_rank = 0", ">= 1, <= 1024"]),
    "E-VALUE-MULTIPLE": ({"aspect_bucket_alignment": 24}, ["aspect_bucket_alignment = 24", "16"]),
    "E-VALUE-SIZE": ({"validation_resolution": "1000x1000"}, ["1000x1000", "validation_resolution", "1024x1024"]),
    "W-KEY-ALIASED": ({"validation_steps": 1, "validation_step_interval": 2}, ["validation_steps"]),
    "E-PATH-FILE": ({"init_lora": "no.safetensors"}, ["init_lora", "no.safetensors"]),
    "E-DEVICE": ({"device": "gpu"}, ["gpu", "cuda:0"]),
    "E-LENGTH-TWICE": ({"max_train_steps": 5, "num_train_epochs": 6}, ["max_train_steps = 5", "num_train_epochs = 6"]),
    "E-LENGTH-NONE": ({"num_train_epochs": 0}, ["max_train_steps", "num_train_epochs"]),
    "E-SIZE-PAIR": ({"maximum_image_size": 1024}, ["maximum_image_size", "target_downsample_size"]),
    "E-SIZE-MEGAPIXELS": ({"resolution": 1024, "resolution_type": "area"}, ["resolution = 1024", "20", "pixel_area"]),
    "E-SIZE-PIXELS": ({"resolution": 1.0}, ["resolution = 1 ", "pixel_area", "area"]),
    "E-SIZE-MAXIMUM-LOW": ({"maximum_image_size": 256, "target_downsample_size": 256}, ["256", "1024"]),
    "W-FLAVOUR-REPOSITORY": (
        {"model_flavour": "base", "pretrained_model_name_or_path": "Tongyi-MAI/Z-Image-Turbo"},
        ["base", "Tongyi-MAI/Z-Image-Turbo"],
    ),
    "W-FLAVOUR-GUESSED": ({"pretrained_model_name_or_path": "my/model"}, ["my/model", "base", "model_flavour"]),
    "I-MODEL-RENAMED": ({"pretrained_model_name_or_path": "TONGYI-MAI/Z-Image-Base"}, ["Tongyi-MAI/Z-Image;"]),
    "W-ASSISTANT-OFF": ({"disable_assistant_lora": True}, ["turbo-ostris-v2"]),
    "E-ASSISTANT-MISSING": ({"assistant_lora_path": ""}, ["turbo-ostris-v2", "disable_assistant_lora"]),
    "W-ASSISTANT-NEEDLESS": ({"model_flavour": "base", "assistant_lora_path": "a/b"}, ["base", "assistant_lora_path"]),
    "W-SHIFT-TURBO": ({"flow_schedule_shift": 1.5}, ["flow_schedule_shift = 1.5", "(3)"]),
    "W-SHIFT-AUTO": (
        {"flow_schedule_shift": 2, "flow_schedule_auto_shift": True, "model_flavour": "base"},
        ["flow_schedule_auto_shift", "flow_schedule_shift = 2"],
    ),
    "W-GUIDANCE": ({"validation_guidance": 7.5, "validation_disable": False}, ["validation_guidance = 7.5", "0", "1"]),
    "W-STEPS": (
        {"validation_num_inference_steps": 4, "validation_disable": False},
        ["validation_num_inference_steps = 4", "8"],
    ),
    "W-NO-PROMPT": ({"validation_disable": False}, ["validation_prompt", "user_prompt_library"]),
    "W-PLACEHOLDER": (
        {"validation_prompt": "The name of your subject  goes here", "validation_disable": False},
        ["validation_prompt", "the name of your subject goes here"],
    ),
    "W-CHECKPOINTING-OFF": (
        {"gradient_checkpointing": False, "gradient_checkpointing_interval": 2},
        ["gradient_checkpointing_interval"],
    ),
    "W-CHECKPOINTING-BUDGET": (
        {"gradient_checkpointing_budget": 2, "gradient_checkpointing_interval": 3},
        ["gradient_checkpointing_interval = 3"],
    ),
    "W-FORMAT-TARGETS": ({"lora_format": "kohya", "lora_targets": "all"}, ["lora_format = kohya", "diffusers"]),
    "W-TARGETS-TWICE": (
        {"peft_lora_target_modules": "to_q", "lora_targets": "all"},
        ["peft_lora_target_modules", "lora_targets = all"],
    ),
    "I-SCHEDULE-WARMUP": ({"lr_scheduler": "constant", "lr_warmup_steps": 5}, ["constant_with_warmup", "5"]),
}

BASIC = {"id": "a", "instance_data_dir": "x"}
EMBEDS = {"id": "t", "dataset_type": "text_embeds"}

# code -> (entries of multidatabackend.json, words)
DATASETS = {
    "E-DATASETS-LIST": ({}, ["config/multidatabackend.json"]),
    "E-DATASETS-NONE": ([EMBEDS], ["config/multidatabackend.json", "instance_data_dir"]),
    "E-DATASET-OBJECT": ([1], ["1"]),
    "E-DATASET-ID-TWICE": ([BASIC, BASIC], ["a", "config/multidatabackend.json:3"]),
    "E-DATASET-KEY-MISSING": ([{"id": "a"}], ["a", "instance_data_dir"]),
    "E-DATASET-STORAGE": ([{**BASIC, "type": "webshart"}], ["a", "webshart", "local, aws, csv, huggingface"]),
    "E-DATASET-KIND": ([{**BASIC, "dataset_type": "video"}], ["a", "video"]),
    "E-DATASET-NOT-YET": ([{**BASIC, "slider_strength": 0.5}], ["a", "slider_strength"]),
    "W-DATASET-NOT-YET": ([{**BASIC, "delete_nsfw_images": True}], ["a", "delete_nsfw_images"]),
    "E-DATASET-KEY": ([{**BASIC, "repeat": 2}], ["a", "repeat", "repeats"]),
    "E-DATASET-KEY-UNKNOWN": ([{**BASIC, "zzz": 2}], ["a", "zzz"]),
    "E-DATASETS-DEFAULT-TWICE": (
        [BASIC, {**EMBEDS, "default": True}, {**EMBEDS, "id": "u", "default": True}],
        ["t, u"],
    ),
    "E-DATASETS-NO-DEFAULT": ([BASIC, EMBEDS, {**EMBEDS, "id": "u"}], ["t, u", '"default": true']),
    "W-DATASETS-EMBEDS-UNUSED": ([BASIC, {**EMBEDS, "default": True}, {**EMBEDS, "id": "u"}], ["u", "t"]),
    "E-DATASET-REFERENCE": ([{**BASIC, "text_embeds": "zzz"}], ["a", "zzz", "text_embeds"]),
    "E-DATASET-PROMPT": ([{**BASIC, "caption_strategy": "instanceprompt"}], ["a", "caption_strategy"]),
    "E-DATASET-ASPECTS": ([{**BASIC, "crop": True, "crop_aspect": "closest"}], ["a", "closest"]),
    "E-DATASET-ASPECT-RANGE": (
        [{**BASIC, "minimum_aspect_ratio": 2, "maximum_aspect_ratio": 1}],
        ["minimum_aspect_ratio 2", "maximum_aspect_ratio 1"],
    ),
    "E-VALUE-ASPECTS": ([{**BASIC, "crop_aspect_buckets": ["wide"]}], ["a.crop_aspect_buckets", "wide"]),
}

# code -> (words of the command line, words of the message)
WORDS = {
    "E-FLAG-SHORT": (["-x"], ["-x", "--lora_rank 16"]),
    "E-FLAG-NO-VALUE": (["--seed"], ["--seed"]),
    "E-ARGUMENT-EXTRA": (["config", "more"], ["more"]),
    "E-SET-SYNTAX": (["--set", "seed"], ["seed", "--set lora_rank=16"]),
    "E-CONFIG-NAMED": (["nowhere"], ["nowhere", "config/nowhere/config.json"]),
    "E-CONFIG-BACKEND": (["--config_backend=yaml"], ["yaml", "json, toml, env, cmd"]),
    "E-EXAMPLE-UNKNOWN": (["--example=dmo"], ["dmo", "demo"]),
    "E-DATASETS-MISSING": (["--data_backend_config=no.json"], ["no.json", "multidatabackend.json.example"]),
    "E-CONFIG-NONE": (["--config_backend=toml"], ["config/config.toml", "config/config.json.example"]),
}


def texts(problem, language):
    title, hint = render_problem(problem, language)
    whole = f"{title}\n{hint or ''}"
    assert title != f"problem.{problem.code}.title", "no text"
    assert "{" not in whole.replace("{ ... }", "").replace('{"aspect', ""), whole
    return whole


def check(problem, words):
    assert problem.origin or problem.code in ("E-CONFIG-NONE", "W-CONFIG-UNREAD", *WORDS)
    english, spanish = texts(problem, "en"), texts(problem, "es")
    assert english != spanish
    for word in words:
        assert word in english, (word, english)
        assert word in spanish, (word, spanish)


@pytest.mark.parametrize("code", BROKEN_JSON)
def test_broken_files(with_config, code):
    problem = with_config(BROKEN_JSON[code]).problem(code)
    check(problem, ["config/config.json"] if code.startswith("E-") else ["seed"])
    assert problem.origin.startswith("config/config.json")


@pytest.mark.parametrize("code", OPTIONS)
def test_problems_of_options(with_config, code):
    options, words = OPTIONS[code]
    problem = with_config(options).problem(code)
    check(problem, words)
    assert (problem.origin or "").startswith("config/config.json:"), problem


@pytest.mark.parametrize("code", DATASETS)
def test_problems_of_datasets(with_datasets, code):
    entries, words = DATASETS[code]
    problem = with_datasets(json.dumps(entries, indent=1)).problem(code)
    check(problem, words)
    assert problem.origin.startswith("config/multidatabackend.json")


@pytest.mark.parametrize("code", WORDS)
def test_problems_of_the_command_line(project, code):
    if code == "E-CONFIG-NONE":
        (project.folder / "config/config.json").unlink()
    words, expected = WORDS[code]
    check(project.problem(code, *words), expected)


def test_a_file_that_cannot_be_read(project):
    project.folder.joinpath("config/config.json").write_bytes(b'{"a": "\xff"}')
    check(project.problem("E-FILE-ENCODING"), ["config/config.json", "7"])


def test_a_datasets_file_that_is_no_file_is_missing(project):
    check(project.problem("E-DATASETS-MISSING", "--data_backend_config=config"), ["config"])


def test_a_file_without_permission(project, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    check(project.problem("E-FILE-READ"), ["config/config.json", "Permission denied"])


def test_broken_toml(project):
    project.write("bad.toml", "a = 1\nb = what")
    problem = project.problem("E-TOML-SYNTAX", "bad.toml")
    check(problem, ["bad.toml"])
    assert problem.origin.startswith("bad.toml:2:")


def test_broken_env(project):
    project.write("bad.env", "A=1\nsource more.sh")
    check(project.problem("E-ENV-SYNTAX", "bad.env"), ["bad.env", "2", "source more.sh"])


def test_a_misspelt_variable(project):
    project.write("x.env", "LEARNIN_RATE=1e-3\nMY_OWN=1\nDATALOADER_CONFIG=config/multidatabackend.json")
    check(project.problem("W-VARIABLE-UNKNOWN", "x.env"), ["LEARNIN_RATE", "LEARNING_RATE"])


def test_a_second_file_that_is_not_read(project):
    project.write("config/config.env", "LORA_RANK=4")
    check(project.problem("W-CONFIG-UNREAD"), ["config/config.env", "config/config.json"])


def test_a_length_that_a_flag_overrides(with_config):
    problem = with_config(max_train_steps=10).problem("I-LENGTH-OVERRIDDEN", "--num_train_epochs=2")
    check(problem, ["num_train_epochs", "max_train_steps = 10"])


def test_every_text_is_asserted_above():
    catalog = json.loads((LOCALES / "en/config.json").read_text(encoding="utf-8"))
    known = {key.split(".")[1] for key in catalog if key.startswith("problem.")}
    apart = {
        "E-FILE-ENCODING",
        "E-FILE-READ",
        "E-TOML-SYNTAX",
        "E-ENV-SYNTAX",
        "W-VARIABLE-UNKNOWN",
        "W-CONFIG-UNREAD",
        "I-LENGTH-OVERRIDDEN",
        "E-LIBRARY-MISSING",
        "E-PRECISION-CAPABILITY",
    }
    assert known == apart | BROKEN_JSON.keys() | OPTIONS.keys() | DATASETS.keys() | WORDS.keys()
