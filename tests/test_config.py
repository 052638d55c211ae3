"""YAML and `key=value` become a validated config, or a message that says what to write instead."""

from pathlib import Path

import pytest
import yaml

from derta_jax.config import RunConfig, config_keys, dump_config, load_config, objective_class
from derta_jax.errors import UserError

CONFIGS = Path(__file__).parents[1] / "configs"
RUNS = sorted(file for file in CONFIGS.glob("*.yaml") if not file.stem.startswith("bench_"))
MINIMAL = {"model": {"path": "m"}, "data": {"path": "d"}, "train": {"output": "o", "steps": 5}}


@pytest.fixture
def config_file(tmp_path):
    def write(raw: object) -> Path:
        file = tmp_path / "run.yaml"
        file.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw))
        return file

    return write


@pytest.fixture
def load(config_file):
    """The config of the minimal file with overrides."""
    return lambda *overrides: load_config(config_file(MINIMAL), overrides)


@pytest.fixture
def refused(config_file):
    """The lines of the error that a file or overrides give."""

    def told(*overrides: str, raw: object = MINIMAL) -> list[str]:
        with pytest.raises(UserError) as raised:
            load_config(config_file(raw), overrides)
        return str(raised.value).splitlines()

    return told


@pytest.mark.parametrize("file", RUNS, ids=lambda file: file.name)
def test_the_configs_that_come_with_the_project_are_valid(file):
    assert isinstance(load_config(file), RunConfig)


def test_tiny_trains_in_small_on_a_cpu():
    config = load_config(CONFIGS / "tiny.yaml")
    assert (config.train.dtype, config.train.remat, config.data.recipe) == ("float32", "none", "derta")


def test_three_sections_suffice_and_the_rest_has_defaults(load):
    config = load()
    assert (config.model.path, config.train.output, config.train.steps) == ("m", "o", 5)
    assert (config.objective.name, config.objective.rto_weight, config.objective.sorry_keep_rate) == ("derta", 1, 1)


def test_overrides_win_over_the_file(load):
    config = load("train.steps=7", "data.recipe=recaug", "model.path=/models/llama")
    assert (config.train.steps, config.data.recipe, config.model.path) == (7, "recaug", "/models/llama")


def test_the_last_of_several_overrides_wins(load):
    assert load("train.steps=7", "train.steps=8").train.steps == 8


def test_overrides_reach_sections_that_the_file_does_not_have(load):
    assert load("objective.rto_weight=0.5", "mesh.tensor=2").objective.rto_weight == 0.5


def test_overrides_reach_a_section_that_the_file_leaves_empty(config_file):
    file = config_file("model:\ndata: {path: d}\ntrain: {output: o, steps: 5}\n")
    assert load_config(file, ["model.path=m"]).model.path == "m"


@pytest.mark.parametrize("value", ["2e-5", "0.00002", "2.0e-5", "'2e-5'"])
def test_a_learning_rate_may_be_written_in_any_way(load, value):
    """YAML 1.1 reads 2e-5 as a string."""
    assert load(f"train.learning_rate={value}").train.learning_rate == 2e-5


def test_a_learning_rate_may_be_written_in_any_way_in_the_file_too(config_file):
    file = config_file("model: {path: m}\ndata: {path: d}\ntrain: {output: o, steps: 5, learning_rate: 2e-5}\n")
    assert load_config(file).train.learning_rate == 2e-5


def test_null_switches_off(load):
    assert load("train.clip=null").train.clip is None


@pytest.mark.parametrize(("value", "packing"), [("false", "none"), ("true", "rows"), ("none", "none")])
def test_packing_may_be_a_boolean(load, value, packing):
    assert load(f"data.packing={value}").data.packing == packing


def test_spaces_and_equals_signs_in_a_value_stay(load):
    assert load("data.template='Q={prompt} A='").data.template == "Q={prompt} A="
    assert load("objective.refusal_token=' Sorry'").objective.refusal_token == " Sorry"


def test_a_template_that_ends_in_a_space_is_refused(refused):
    assert "must not end in a space" in refused("data.template='Q={prompt} '")[1]


def test_a_config_cannot_be_changed_afterwards(load):
    with pytest.raises(ValueError, match="frozen"):
        load().train.steps = 6


def test_an_unknown_key_in_the_file_is_named_with_its_path_and_nearest_spelling(refused):
    raw = MINIMAL | {"train": {"output": "o", "steps": 5, "learning_rat": 1}}
    assert refused(raw=raw)[1:] == ["  train.learning_rat: unknown key; did you mean 'train.learning_rate'?"]


def test_an_unknown_section_in_the_file_is_named_with_its_nearest_spelling(refused):
    assert refused(raw=MINIMAL | {"objectiv": {}})[1:] == ["  objectiv: unknown key; did you mean 'objective'?"]


def test_an_unknown_key_in_an_override_is_named_with_its_nearest_spelling(refused):
    [message] = refused("train.stpes=5")
    assert message == "unknown key 'train.stpes' in override 'train.stpes=5'; did you mean 'train.steps'?"


def test_a_key_without_its_section_is_told_where_it_belongs(refused):
    [message] = refused("learning_rate=1e-3")
    assert message.endswith("did you mean 'train.learning_rate'?")


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        ("train.steps=many", "train.steps: Input should be a valid integer, .* \\(got 'many'\\)"),
        ("train.steps=-3", "train.steps: Input should be greater than or equal to 1 \\(got -3\\)"),
        ("train.learning_rate=fast", "train.learning_rate: .* \\(got 'fast'\\)"),
        ("data.recipe=dera", "data.recipe: .*'vanilla', 'recaug', 'rto' or 'derta' \\(got 'dera'\\)"),
        ("objective.sorry_keep_rate=0", "objective.sorry_keep_rate: .* greater than 0 \\(got 0\\)"),
        ("objective.sorry_keep_rate=1.5", "objective.sorry_keep_rate: .* \\(got 1.5\\)"),
        ("mesh.fsdp=0", "mesh.fsdp: must be a positive number of devices, or -1 for the rest \\(got 0\\)"),
        ("data.template=hello", "data.template: must be `chat` or contain {prompt} once \\(got 'hello'\\)"),
        ("model.path=null", "model.path: .* \\(got None\\)"),
    ],
)
def test_a_wrong_value_is_shown_with_its_key(load, override, shown):
    with pytest.raises(UserError, match=shown):
        load(override)


def test_the_file_is_named_beside_what_is_wrong_in_it(refused, tmp_path):
    assert refused(raw=MINIMAL | {"typo": 1})[0] == f"{tmp_path}/run.yaml:"


def test_everything_wrong_is_told_at_once(refused):
    raw = {"model": {"paht": "m"}, "data": {"path": 3}, "train": {"output": "o", "steps": 0}}
    told = refused(raw=raw)[1:]
    assert [line.split(":")[0].strip() for line in told] == ["model.path", "model.paht", "data.path", "train.steps"]


def test_a_missing_key_is_named(refused):
    assert refused(raw=MINIMAL | {"model": {}})[1:] == ["  model.path: missing"]


def test_an_override_without_equals_sign_is_shown(refused):
    assert refused("train.steps") == ["override 'train.steps' is not key=value"]


def test_an_override_that_is_broken_yaml_is_shown(refused):
    assert refused("data.template=[") == ["override 'data.template=[': the value is not valid YAML"]


def test_a_missing_file_is_named_with_a_near_sibling(config_file):
    there = config_file(MINIMAL)
    with pytest.raises(UserError) as raised:
        load_config(there.with_name("rum.yaml"))
    assert str(raised.value) == f"no config file {there.parent}/rum.yaml; did you mean '{there}'?"


def test_a_missing_file_in_a_missing_directory_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no config file .*/nowhere/run\.yaml$"):
        load_config(tmp_path / "nowhere" / "run.yaml")


def test_broken_yaml_is_shown_with_its_place(refused):
    told = "\n".join(refused(raw="model:\n  path: [m\ndata: {}\n"))
    assert "run.yaml is not valid YAML" in told
    assert "line 3" in told


@pytest.mark.parametrize("raw", ["- a\n- b\n", "just words\n"])
def test_a_file_without_keys_is_no_config(refused, raw):
    assert "must hold keys and values" in refused(raw=raw)[0]


def test_a_file_that_is_not_utf_8_is_no_config(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_bytes(b"model: \xff")
    with pytest.raises(UserError, match="is not valid YAML"):
        load_config(file)


@pytest.mark.parametrize("overrides", [["train.epochs=1"], ["train.steps=null"]])
def test_the_length_is_given_in_steps_or_in_epochs(refused, overrides):
    assert refused(*overrides)[1:] == ["  train: set one of train.steps and train.epochs, and leave the other null"]


def test_a_file_in_steps_can_be_overridden_in_epochs(load):
    assert load("train.steps=null", "train.epochs=0.5").train.epochs == 0.5


def test_the_papers_objective_needs_one_row_a_sequence(refused, load):
    assert "objective.paper drops RTO labels by padded row: it needs data.packing=none" in refused(
        "objective.paper=true"
    )[1]  # fmt: skip
    assert load("objective.paper=true", "data.packing=none").objective.paper


def test_the_best_checkpoints_need_something_to_rank_them_by(refused, load):
    assert "held-out loss: set held_out.path" in refused("checkpoint.keep_best=1")[1]
    assert load("checkpoint.keep_best=1", "held_out.path=held_out.jsonl").checkpoint.keep_best == 1


def test_a_config_written_down_reads_back_the_same(load, tmp_path):
    config = load(
        "train.learning_rate=2e-5", "objective.refusal_token=' Sorry'", "train.clip=null", "lora.targets=[q_proj, w1]"
    )
    (tmp_path / "dumped.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "dumped.yaml") == config


def test_a_config_written_down_says_everything(load):
    raw = yaml.safe_load(dump_config(load("lora.rank=4", "held_out.path=held_out.jsonl")))
    of_derta = {f"objective.{key}" for key in objective_class("derta").model_fields}
    assert {f"{section}.{key}" for section, keys in raw.items() for key in keys} == {
        key for key in config_keys() if "." in key and (key.partition(".")[0] != "objective" or key in of_derta)
    }


def test_the_keys_that_others_rely_on_are_spelt_so():
    promised = """
        model.path data.path data.recipe data.packing train.output train.steps train.epochs train.batch_size
        train.accumulation train.sequence_length train.learning_rate train.seed train.dtype train.remat
        checkpoint.every_steps checkpoint.every_minutes checkpoint.keep mesh.data mesh.fsdp mesh.tensor
        mesh.expert lora.rank lora.alpha lora.dropout
        objective.name objective.rto_weight objective.sorry_keep_rate objective.paper
    """
    assert set(promised.split()) <= set(config_keys())
