"""Precedence, origins, the search for files, aliases, and what follows from other values."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simpletuner.catalog.families import FLAVOURS
from simpletuner.config import Config, OriginKind
from simpletuner.config.effective import effective_json
from simpletuner.config.paths import PACKAGE_DIR
from simpletuner.config.root import option_aliases, options, sections
from simpletuner.config.search import example_names
from simpletuner.problems import ConfigError, Severity

SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)


# Precedence


SOURCES = ("default", "flavour", "file", "environment", "flag")


@pytest.mark.parametrize("given_by", [s for n in range(4) for s in itertools.combinations(SOURCES[2:], n)])
def test_the_strongest_source_wins_and_is_the_origin(project, given_by):
    """validation_guidance has a default, a flavour's default, and may be set by all three other sources."""
    values = {"file": 0.25, "environment": 0.5, "flag": 0.75}
    file = {"validation_disable": True, "model_flavour": "base"}
    if "file" in given_by:
        file["validation_guidance"] = values["file"]
    project.write("config/config.json", file)
    environ = {"VALIDATION_GUIDANCE": str(values["environment"])} if "environment" in given_by else {}
    argv = ("--validation_guidance", str(values["flag"])) if "flag" in given_by else ()
    loaded = project.load(*argv, environ=environ)
    strongest = given_by[-1] if given_by else "flavour"
    assert loaded.origins["validation_guidance"].kind.value == strongest
    expected = values.get(strongest, FLAVOURS["base"].validation_guidance)
    assert loaded.config.validation.validation_guidance == expected


def test_extra_arguments_win_over_the_other_variables_and_lose_to_flags(project):
    environ = {"LORA_RANK": "4", "TRAINER_EXTRA_ARGS": "--lora_rank=8 --flow_sigmoid_scale 2"}
    loaded = project.load(environ=environ)
    assert loaded.config.adapter.lora_rank == 8
    assert loaded.config.flow.flow_sigmoid_scale == 2
    assert str(loaded.origins["lora_rank"]) == "TRAINER_EXTRA_ARGS"
    assert project.load("--lora_rank=16", environ=environ).config.adapter.lora_rank == 16


def test_the_last_of_two_equal_flags_wins(project):
    assert project.load("--lora_rank=4", "lora_rank=8").config.adapter.lora_rank == 8


@pytest.mark.parametrize("flag", [(), ("--num_train_epochs=3",)])
def test_of_two_lengths_the_one_from_the_stronger_source_counts(with_config, flag):
    run = with_config(num_train_epochs=2).load(*flag, environ={"MAX_NUM_STEPS": "10"}).config.run
    assert (run.max_train_steps, run.num_train_epochs) == ((0, 3) if flag else (10, 0))


def test_a_value_that_is_overridden_need_not_be_valid(with_config):
    assert with_config(lora_rank="many").load("--lora_rank=8").config.adapter.lora_rank == 8


# Origins


def test_every_option_has_an_origin_that_is_true(with_config):
    project = with_config(lora_rank=4, model_flavour="turbo")
    loaded = project.load("--seed=1", environ={"LEARNING_RATE": "1e-3"})
    assert loaded.origins.keys() == options().keys()
    assert str(loaded.origins["lora_rank"]) == "config/config.json:3"
    assert str(loaded.origins["seed"]) == "--seed"
    assert str(loaded.origins["learning_rate"]) == "LEARNING_RATE"
    assert loaded.origins["validation_guidance"].kind is OriginKind.FLAVOUR
    for name, origin in loaded.origins.items():
        derived = {"num_train_epochs", "lora_alpha", "output_dir", "cache_dir", "data_backend_config"}
        if origin.kind is OriginKind.DEFAULT and name not in derived:
            assert loaded.config.option(name) == options()[name].default


@SHARED
@given(st.lists(st.sampled_from(sorted(options())), unique=True, min_size=1, max_size=9), st.data())
def test_the_line_of_an_origin_is_the_keys_line(project, names, data):
    """Blank lines and order do not confuse it; values are the defaults, so that all are valid."""
    gaps = [data.draw(st.integers(0, 3)) for _ in names]
    rows = ["{"]
    lines = {}
    unfit = ("data_backend_config", "cache_dir", "validation_disable", "num_train_epochs")
    names = [name for name in names if name not in unfit]
    for name, gap in zip(names, gaps, strict=False):
        rows += [""] * gap
        rows.append(f' "--{name}": {json.dumps(options()[name].default)},')
        lines[name] = len(rows)
    rows += [' "validation_disable": true', "}"]
    project.write("config/config.json", "\n".join(rows))
    loaded = project.load()
    for name, line in lines.items():
        if options()[name].default not in (None, "") and loaded.origins[name].kind is OriginKind.FILE:
            assert str(loaded.origins[name]) == f"config/config.json:{line}"


# Files


def test_json_toml_and_env_say_the_same(project):
    said = {"lora_rank": 4, "learning_rate": 0.001, "validation_prompt": "a b", "gradient_checkpointing": False}
    project.write("json/config.json", said)
    project.write(
        "toml/config.toml",
        "lora_rank = 4\nlearning_rate = 1e-3\ngradient_checkpointing = false\n"
        '[validation]\nvalidation_prompt = "a b"\n',
    )
    project.write(
        "env/config.env",
        "export LORA_RANK=4\nLEARNING_RATE=1e-3\nexport USE_GRADIENT_CHECKPOINTING=false\n"
        "TRAINER_EXTRA_ARGS=\"--validation_prompt='a b'\"\n",
    )
    found = []
    for kind in ("json", "toml", "env"):
        loaded = project.load(kind, "--data_backend_config=config/multidatabackend.json")
        assert loaded.config_path == project.folder / kind / f"config.{kind}"
        assert str(loaded.origins["lora_rank"]).startswith(f"{kind}/config.{kind}:")
        found.append(loaded.config)
    assert found[0] == found[1] == found[2]
    assert found[0].adapter.lora_rank == 4
    assert found[0].memory.gradient_checkpointing is False


def test_a_dash_prefix_and_trailing_comma_as_in_the_specification(project):
    project.write("config/user_prompt_library.json", {"nickname": "the prompt goes here"})
    text = '{\n  "lora_rank": 4,\n  "--user_prompt_library": "config/user_prompt_library.json",\n}'
    project.write("config/config.json", text)
    loaded = project.load()
    assert loaded.config.validation.user_prompt_library == str(project.folder / "config/user_prompt_library.json")


def test_trainer_extra_args_may_stand_in_the_file(with_config):
    loaded = with_config(TRAINER_EXTRA_ARGS="--lora_rank 4 --vae_enable_tiling=true").load()
    assert loaded.config.adapter.lora_rank == 4
    assert loaded.config.memory.vae_enable_tiling is True
    assert str(loaded.origins["lora_rank"]) == "config/config.json:3"


def test_null_and_empty_values_set_nothing(with_config):
    loaded = with_config(lora_rank=None, output_dir="", lora_alpha="none", resume_from_checkpoint="").load()
    assert loaded.origins["lora_rank"].kind is OriginKind.DEFAULT
    assert loaded.origins["output_dir"].kind is OriginKind.DEFAULT
    assert loaded.config.run.resume_from_checkpoint == ""


def test_leftovers_of_forms_are_ignored_in_silence(with_config):
    options = {"ez_model_type": "x", "__active_tab__": "model", "aspect_ratio_bucket_0": 1}
    assert not [code for code in with_config(options).codes() if code != "W-NO-PROMPT"]


SEARCH = ("config.json", "config.toml", "config.env", "config/config.json", "config/config.toml", "config/config.env")


@pytest.mark.parametrize("first", range(len(SEARCH)))
def test_files_are_searched_in_order(tmp_path, project, first):
    (project.folder / "config/config.json").unlink()
    content = {"json": "{}", "toml": "", "env": ""}
    for place in SEARCH[first:]:
        project.write(place, content[place.rpartition(".")[2]])
    loaded = project.load("--data_backend_config=config/multidatabackend.json")
    assert loaded.config_path == project.folder / SEARCH[first]
    assert loaded.searched == tuple(project.folder / place for place in SEARCH[: first + 1])


@pytest.mark.parametrize("variable", ["SIMPLETUNER_ENVIRONMENT", "SIMPLETUNER_ENV", "ENV", None])
def test_an_environment_is_a_folder_in_config(project, variable):
    project.write("config/night/config.json", {"lora_rank": 4})
    project.write("config/night/multidatabackend.json", [{"id": "night", "instance_data_dir": "x"}])
    argv, environ = ((), {variable: "night"}) if variable else (("--env", "night"), {"ENV": "day"})
    loaded = project.load(*argv, environ=environ)
    assert loaded.config_path == project.folder / "config/night/config.json"
    assert loaded.datasets.images[0].id == "night"


def test_the_environment_named_default_is_none(project):
    assert project.load(environ={"ENV": "default"}).config_path == project.folder / "config/config.json"


@pytest.mark.parametrize("written", ["other", "other/config.json", "other/config", "{cwd}/other"])
def test_config_path_is_a_folder_a_file_or_one_without_suffix(project, written):
    path = project.write("other/config.json", {})
    written = written.replace("{cwd}", str(project.folder))
    more = "--data_backend_config=config/multidatabackend.json"
    assert project.load(more, environ={"CONFIG_PATH": written}).config_path == path
    assert project.load(written, more).config_path == path


def test_a_backend_restricts_the_kind_of_file(project):
    project.write("config/config.toml", "lora_rank = 4")
    assert project.load(environ={"CONFIG_BACKEND": "toml"}).config.adapter.lora_rank == 4
    assert project.load("--config_backend=cmd").config_path is None


def test_without_a_file_flags_that_name_the_datasets_are_enough(project):
    (project.folder / "config/config.json").unlink()
    assert "E-CONFIG-NONE" in project.codes()
    loaded = project.load("--data_backend_config=config/multidatabackend.json", "--lora_rank=4")
    assert loaded.config_path is None
    assert loaded.config.adapter.lora_rank == 4


@pytest.mark.parametrize("name", example_names())
def test_every_packaged_example_is_valid(tmp_path, name):
    """What this version or this machine cannot do may only be a warning about values, never a mistake."""
    from simpletuner.config import load_run_config

    loaded = load_run_config(["--example", name], environ={}, cwd=tmp_path, must_run=False, check_folders=False)
    expected = ("E-VALUE-NOT-YET", "W-NOT-YET", "W-PLACEHOLDER", "E-OPTIMIZER-DEVICE", "E-LIBRARY-MISSING")
    assert not [p for p in loaded.warnings if not p.code.startswith(expected)]
    refused = [p.code for p in loaded.warnings if p.code.startswith("E-")]
    if refused:
        with pytest.raises(ConfigError, match=refused[0]):
            load_run_config(["--example", name], environ={}, cwd=tmp_path)


def test_the_demo_reads_the_packages_own_images(tmp_path):
    from simpletuner.config import load_run_config

    loaded = load_run_config(["--example", "demo"], environ={}, cwd=tmp_path)
    assert loaded.config.model.pretrained_model_name_or_path == f"{PACKAGE_DIR.as_posix()}/assets/demo_base"
    for image in loaded.datasets.images:
        assert list(Path(image.instance_data_dir).glob("*.png"))
    assert Path(loaded.config.run.output_dir) == tmp_path / "output/demo"


# The specification, as written


def test_the_specifications_options_are_accepted(with_config):
    project = with_config(
        {
            "model_type": "lora",
            "model_family": "z-image",
            "model_flavour": "turbo",
            "pretrained_model_name_or_path": "TONGYI-MAI/Z-Image-Turbo",
            "assistant_lora_path": "ostris/zimage_turbo_training_adapter",
            "assistant_lora_weight_name": "zimage_turbo_training_adapter_v1.safetensors",
            "train_batch_size": 1,
            "validation_resolution": "1024x1024,1280x768,2048x2048",
            "validation_guidance": 0,
            "validation_num_inference_steps": 8,
            "gradient_accumulation_steps": 1,
            "optimizer": "adamw_bf16",
            "mixed_precision": "bf16",
            "gradient_checkpointing": True,
            "gradient_checkpointing_interval": 2,
            "validation_preview": True,
            "validation_preview_steps": 1,
            "base_model_precision": "int8-torchao",
            "lora_rank": 16,
            "max_grad_norm": 1.0,
            "base_model_default_dtype": "bf16",
        }
    )
    argv = [
        "--lora_rank=4",
        "--quantize_via=cpu",
        "--gradient_checkpointing",
        "--text_encoder_precision=int8-torchao",
        "--vae_enable_tiling=true",
        "--offload_during_startup=true",
        "--lora_type=standard",
        "--push_to_hub",
        "--report_to=wandb",
        "--enable_group_offload",
        "--group_offload_type",
        "block_level",
        "--group_offload_blocks_per_group",
        "1",
        "--group_offload_use_stream",
        "--disable_assistant_lora",
    ]
    loaded = project.load(*argv, must_run=False)
    assert loaded.config.model.pretrained_model_name_or_path == "Tongyi-MAI/Z-Image-Turbo"
    assert loaded.config.adapter.lora_rank == 4
    assert loaded.config.memory.base_model_precision == "int8-torchao"
    assert {p.severity for p in loaded.warnings} <= {Severity.WARNING, Severity.INFO}
    named = " ".join(str(p.params) for p in loaded.warnings)
    assert loaded.config.memory.enable_group_offload and loaded.config.memory.group_offload_use_stream
    for missing in ("validation_preview", "wandb"):
        assert missing in named, f"{missing} is left out in silence"


def test_the_specifications_custom_model_is_accepted(with_config):
    loaded = with_config(
        {
            "model_family": "z-image",
            "pretrained_model_name_or_path": "TONGYI-MAI/Z-Image-Base",
            "pretrained_transformer_model_name_or_path": "your-custom-transformer",
            "pretrained_vae_model_name_or_path": "TONGYI-MAI/Z-Image-Base",
            "pretrained_transformer_subfolder": "none",
        }
    ).load()
    model = loaded.config.model
    assert model.pretrained_model_name_or_path == model.pretrained_vae_model_name_or_path == "Tongyi-MAI/Z-Image"
    assert model.model_flavour == "base"
    assert model.pretrained_transformer_subfolder == "none"
    assert {p.code for p in loaded.warnings} == {"I-MODEL-RENAMED"}


@pytest.mark.parametrize(("written", "meant"), [("int8", "int8-torchao"), ("nf4", "nf4-bnb")])
def test_short_names_of_precisions(project, written, meant):
    loaded = project.load("--base_model_precision", written, must_run=False)
    assert loaded.config.memory.base_model_precision == meant


@pytest.mark.parametrize("alias", sorted(option_aliases()))
def test_aliases_mean_their_option(with_config, alias):
    name = option_aliases()[alias]
    option = options()[name]
    word = "off" if "off" in option.choices else "none"
    value = {"integer": 7, "text": word, "number": 0.5}[option.kind]
    loaded = with_config({alias: value, "optimizer_beta1": 0.5, "optimizer_beta2": 0.5}).load()
    assert loaded.config.option(name) == dict(options()[name].opt.spellings).get(value, value)


# The flavour and what follows


@pytest.mark.parametrize("name", FLAVOURS)
def test_a_flavour_gives_its_defaults(project, name):
    loaded = project.load(f"--model_flavour={name}")
    flavour, c = FLAVOURS[name], loaded.config
    assert c.model.pretrained_model_name_or_path == flavour.repository.replace("{package}", PACKAGE_DIR.as_posix())
    assert c.flow.flow_schedule_shift == flavour.flow_schedule_shift
    assert c.validation.validation_sampling_shift == flavour.validation_sampling_shift
    assert c.adapter.assistant_lora_path == flavour.assistant_lora_path
    assert c.data.resolution == flavour.resolution
    assert c.model.model_flavour == name


@pytest.mark.parametrize(
    ("location", "flavour"),
    [
        ("Tongyi-MAI/Z-Image", "base"),
        ("tongyi-mai/z-image-turbo", "turbo-ostris-v2"),
        ("models/my-Z-Image-Turbo-tune", "turbo-ostris-v2"),
        ("models/my-tune", "base"),
        (None, "turbo-ostris-v2"),
    ],
)
def test_the_flavour_is_told_from_the_model(project, location, flavour):
    argv = (f"--pretrained_model_name_or_path={location}",) if location else ()
    loaded = project.load(*argv)
    assert loaded.config.model.model_flavour == flavour
    is_guess = location is not None and location.startswith("models/")
    assert ("W-FLAVOUR-GUESSED" in {p.code for p in loaded.warnings}) == is_guess


def test_a_folder_with_a_hub_name_stays_a_folder(project, monkeypatch):
    (project.folder / "tongyi-mai/z-image").mkdir(parents=True)
    monkeypatch.chdir(project.folder)
    loaded = project.load("--pretrained_model_name_or_path=tongyi-mai/z-image", "--model_flavour=base")
    assert loaded.config.model.pretrained_model_name_or_path == "tongyi-mai/z-image"


def test_an_assistant_is_filled_in_unless_disabled_or_named(project):
    adapter = project.load("--model_flavour=turbo").config.adapter
    assert adapter.assistant_lora_weight_name == "zimage_turbo_training_adapter_v1.safetensors"
    assert project.load("--disable_assistant_lora").config.adapter.assistant_lora_path is None
    own = project.load("--assistant_lora_path=my/adapter").config.adapter
    assert (own.assistant_lora_path, own.assistant_lora_weight_name) == ("my/adapter", None)


@pytest.mark.parametrize(
    ("file", "flag", "steps", "epochs"),
    [
        ({}, (), 0, 1),
        ({"max_train_steps": 10}, (), 10, 0),
        ({"num_train_epochs": 3}, (), 0, 3),
        ({"max_train_steps": 0}, (), 0, 1),
        ({"max_train_steps": 0, "num_train_epochs": 2}, (), 0, 2),
        ({"max_train_steps": 10, "num_train_epochs": 0}, (), 10, 0),
        ({"max_train_steps": 10}, ("--num_train_epochs=2",), 0, 2),
        ({"num_train_epochs": 2}, ("--max_train_steps=10",), 10, 0),
    ],
)
def test_the_length_of_the_run(with_config, file, flag, steps, epochs):
    run = with_config(file).load(*flag).config.run
    assert (run.max_train_steps, run.num_train_epochs) == (steps, epochs)


def test_paths_are_absolute_and_the_cache_is_in_the_run(project):
    loaded = project.load("--output_dir=out/x")
    assert Path(loaded.config.run.output_dir) == project.folder / "out/x"
    assert Path(loaded.config.data.cache_dir) == project.folder / "out/x/cache"
    assert Path(project.load("--cache_dir=/c").config.data.cache_dir) == Path("/c").absolute()


def test_alpha_follows_the_rank(project):
    assert project.load("--lora_rank=4").config.adapter.lora_alpha == 4
    assert project.load("--lora_rank=4", "--lora_alpha=1").config.adapter.lora_alpha == 1


def test_variables_in_values(with_config):
    project = with_config(output_dir="{env:BASE}/run")
    loaded = project.load(environ={"BASE": str(project.folder / "base")})
    assert Path(loaded.config.run.output_dir) == project.folder / "base/run"


# The whole


def test_all_problems_come_at_once(project):
    project.write("config/config.json", {"lora_rnk": 1, "learning_rate": "fast", "train_batch_size": 0})
    project.write("config/multidatabackend.json", [{"id": "a", "instance_data_dir": "x", "repeat": 1}])
    codes = project.codes("--seed=x", "--max_train_steps=1", "--num_train_epochs=1")
    assert {"E-KEY-MISSPELT", "E-VALUE-NUMBER", "E-VALUE-RANGE", "E-VALUE-INTEGER", "E-LENGTH-TWICE"} <= set(codes)
    assert "E-DATASET-KEY" in codes


def test_a_wrong_value_is_told_once_and_not_through_rules_about_its_default(project):
    assert project.codes("--max_train_steps=ten", "--num_train_epochs=0", "--validation_disable") == ["E-VALUE-INTEGER"]


def test_the_effective_configuration_loads_as_itself(with_config):
    project = with_config(lora_rank=4, model_flavour="base", validation_prompt="p", instance_prompt="x, y")
    first = project.load("--report_to=wandb", "--peft_lora_target_modules=a,b", "--debug")
    project.write("effective.json", effective_json(first))
    again = project.load("effective.json")
    assert again.config == first.config
    assert again.datasets == first.datasets
    saved = json.loads(effective_json(first))
    assert saved["__origins__"]["lora_rank"] == "config/config.json:3"
    assert saved.keys() == options().keys() | {"__origins__", "__datasets__"}


def test_a_configuration_cannot_be_changed(project):
    config = project.load().config
    with pytest.raises(ValueError, match="frozen"):
        config.run.seed = 1
    assert {type(getattr(config, name)) for name in sections()} == set(sections().values())
    assert Config() == Config()


RAW = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.lists(st.text())


@SHARED
@given(st.dictionaries(st.sampled_from(sorted(options())) | st.text(), RAW, max_size=8))
def test_any_options_are_loaded_or_refused_with_their_place(project, chosen):
    chosen = {key: value for key, value in chosen.items() if key != "data_backend_config"}
    project.write("config/config.json", chosen)
    for problem in project.problems():
        assert problem.origin is not None or problem.code == "W-NO-PROMPT", problem
        assert problem.path is not None or problem.code.startswith(("E-JSON", "W-KEY", "E-ARGUMENT", "E-FLAG")), problem


@SHARED
@given(st.recursive(RAW, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)))
def test_any_json_document_is_loaded_or_refused(project, document):
    project.write("config/config.json", json.dumps(document))
    project.problems()


def test_loading_imports_nothing_heavy(tmp_path):
    code = (
        "import sys, pathlib; from simpletuner.config import load_run_config\n"
        "load_run_config(['--example', 'demo'], environ={}, cwd=pathlib.Path.cwd())\n"
        "print(sorted({'torch', 'numpy', 'PIL', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
