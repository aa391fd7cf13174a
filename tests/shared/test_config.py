"""A configuration means what it says; each mistake is named with its place, all of them at once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shared.check import smoke_config
from shared.config_files import dump_config, load_config, parse_config
from shared.errors import ConfigError, UserError
from shared.yaml_text import read_yaml
from text_distill.config import TextRunConfig

CONFIGS = [
    path
    for path in sorted((Path(__file__).resolve().parents[2] / "configs" / "text").glob("*.yaml"))
    if not path.name.startswith("sweep-")  # tests/test_packaging.py reads these
]
MINIMAL = """
name: small
teacher: {model: org/teacher}
student: {model: org/student}
prompts: {train: [{path: train.jsonl}], heldout: [{path: heldout.jsonl}]}
generation: {max_new_tokens: 8}
training: {pairs_per_step: 2, learning_rate: 1e-4}
"""


def parse(*overrides: str, text: str = MINIMAL) -> TextRunConfig:
    return parse_config(text, TextRunConfig, overrides, source="run.yaml")


def complaint(*overrides: str, text: str = MINIMAL) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(*overrides, text=text)
    return str(caught.value)


# --- what stands in the file -------------------------------------------------------------------------------


def test_the_shipped_configurations_and_all_resolved_ones_can_be_read_again():
    assert CONFIGS
    for path in CONFIGS:
        config = load_config(path, TextRunConfig)
        for resolved in (config, smoke_config(config)):
            assert parse(text=dump_config(resolved)) == resolved
    for overrides in (
        ["objective.name=kd"],
        ["objective.alpha.schedule=fixed", "objective.beta.schedule=fixed"],
        ["generation.temperature=0", "training.schedule=constant"],
        ["student.prune.drop_layers=[1]"],
        ["student.prune.keep_every=2"],
        ["training.rounds=1"],
    ):
        config = parse(*overrides)
        assert parse(text=dump_config(config)) == config
        assert parse(text=dump_config(smoke_config(config))) == smoke_config(config)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("-2.5E+3", -2500.0),
        (".5", 0.5),
        ("010", 10),
        ("no", "no"),
        ("on", "on"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("1_000", "1_000"),
        ("True", True),
        ("~", None),
        ("'1e-4'", "1e-4"),
        ("{a: {<<: {b: 1}, c: 2}}", {"a": {"b": 1, "c": 2}}),
    ],
)
def test_plain_values_mean_what_yaml_1_2_says(text, value):
    found = read_yaml(text, "here")
    assert found == value and type(found) is type(value)


def test_no_is_a_word_in_files_and_overrides():
    assert parse("training.mixed_precision=no").training.mixed_precision == "no"
    assert parse(text=MINIMAL + "output: no\n").output == "no"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [1", "run.yaml, line 2: not valid YAML: .*flow sequence"),
        ("a: b: c", "run.yaml, line 1: not valid YAML"),
        ("a:\n\tb: 1", "run.yaml, line 2: not valid YAML"),
        ("a: \x00", "run.yaml: not valid YAML: .*special characters"),
        ("a: 1\nb: 2\na: 3", "run.yaml, line 3: not valid YAML: the key 'a' stands here a second time"),
        ("a: {b: 1, b: 1}", "run.yaml, line 1: .*the key 'b'"),
        ("a: !!python/object/apply:os.getcwd []", "run.yaml, line 1: not valid YAML: .*python/object"),
        ("a: !!int x", "run.yaml: not valid YAML"),
        ("a: 1\n---\nb: 2", "run.yaml, line 2: not valid YAML: .*single document"),
        ("", "run.yaml must hold sections .* holds nothing"),
        ("- a", "run.yaml must hold sections .* holds a list"),
    ],
)
def test_what_is_not_yaml_is_named_with_its_line(text, message):
    with pytest.raises(ConfigError, match=message):
        parse(text=text)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.yaml", None, "no configuration file at .*absent.yaml.*init TEMPLATE"),
        (".", None, "no configuration file at"),
        ("latin.yaml", "name: é".encode("latin-1"), "latin.yaml is not UTF-8 text.*Save it as UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / name, TextRunConfig)


# --- unknown keys, wrong types -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("sede=1", "sede: unknown key; did you mean 'seed'?"),
        ("training.learning_rte=1", "training.learning_rte: unknown key; did you mean 'learning_rate'?"),
        ("prompts.train.0.pth=x", "prompts.train.0.pth: unknown key; did you mean 'path'?"),
        ("student.lora={rr: 4}", "student.lora.rr: unknown key; did you mean 'r'?"),
        (
            "teacher.model={name: x, revison: y}",
            "teacher.model.revison: unknown key; did you mean 'revision'?",
        ),
        ("learning_rate=1", "learning_rate: unknown key; did you mean 'training.learning_rate'?"),
        ("export.zzz=1", "export.zzz: unknown key; known here: checkpoint"),
        ("export.a[b=1", "export.a[b: unknown key; known here: checkpoint"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(override, line):
    assert complaint(override) == f"run.yaml: 1 problem\n  {line}"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("training.rounds=two", "training.rounds: input should be a valid integer, .*got 'two'"),
        ("training.learning_rate=.inf", "training.learning_rate: input should be a finite number; got inf"),
        ("training.learning_rate=-1", "training.learning_rate: input should be greater than 0; got -1"),
        ("training.betas=[0.9, 1.0]", r"training.betas.1: input should be less than 1; got 1.0"),
        ("student.method=loar", "student.method: input should be 'full', 'lora' or 'dora'; got 'loar'"),
        ("training.trackers=wandb", "training.trackers: input should be a list; got 'wandb'"),
        ("training.trackers=[wandbb]", "training.trackers.0: input should be 'tensorboard', .*got 'wandbb'"),
        ("teacher.model=5", "teacher.model: needs keys below it; got 5"),
        ("training=5", "training: needs keys below it; got 5"),
        ("objective=", "objective: needs keys below it; got None"),
        ("prompts.train=[]", "prompts.train: needs at least 1; got 0"),
        ("name=a/b", "name: string should match pattern .*got 'a/b'"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(override, line):
    assert re.fullmatch(rf"run.yaml: 1 problem\n  {line}", complaint(override))


def test_all_problems_are_told_at_once_each_on_a_line_of_its_own():
    text = complaint(
        "sede=1",
        "training.rounds=two",
        "prompts.train.0.pth=x",
        "student.lora={target_modules: 5}",
        "generation.max_new_tokens=0",
        "objective.name=distilm2",
    )
    head, *lines = text.splitlines()
    assert head == "run.yaml: 6 problems"
    assert {line.split(":")[0].strip() for line in lines} == {
        "sede",
        "training.rounds",
        "prompts.train.0.pth",
        "student.lora.target_modules",
        "generation.max_new_tokens",
        "objective",
    }


def test_what_is_missing_is_named():
    assert complaint(text="name: x").splitlines()[1:] == [
        f"  {section}: required, and not given"
        for section in ("student", "prompts", "generation", "training")
    ]


def test_only_sft_with_a_student_of_its_own_does_without_a_teacher():
    def without(*overrides: str) -> str:
        return complaint("teacher=null", *overrides)

    assert "teacher: required, and not given" in without("student.model=qwen")
    assert "this is 'distillm2' with student.model 'qwen'" in without("student.model=qwen")
    assert "this is 'sft' with student.model 'teacher'" in without(
        "objective.name=sft", "student.model=teacher"
    )
    assert parse("teacher=null", "objective.name=sft", "student.model=qwen").teacher is None


# --- overrides ---------------------------------------------------------------------------------------------


def test_overrides_reach_into_sections_lists_and_what_was_left_out():
    config = parse(
        "training.learning_rate=2e-5",
        "prompts.train.0.limit=7",
        "student.lora.r=4",
        "student.method=lora",
        "objective.parameters={detach_mixture: true}",
        "teacher.model={name: pkg://a/b.gguf, chat_template: '{{ x }}'}",
    )
    assert config.training.learning_rate == 2e-5
    assert config.prompts.train[0].limit == 7 and config.prompts.train[0].path == "train.jsonl"
    assert config.student.lora is not None and config.student.lora.r == 4
    assert config.objective.parameters == {"detach_mixture": True}
    assert config.teacher.model.chat_template == "{{ x }}"
    assert parse("student.lora.r=4", "student.method=lora", text=MINIMAL.replace("org/student", "x, lora: "))


def test_a_number_in_scientific_notation_stays_one_among_free_parameters():
    assert parse("objective={name: dpkd, parameters: {lam: 1e-2}}").objective.parameters == {"lam": 0.01}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "override 'seed': expected key.sub=value"),
        ("=1", "expected key.sub=value"),
        ("a..b=1", "expected key.sub=value"),
        ("seed=[1", r"override 'seed=\[1', line 1: not valid YAML"),
        (
            "prompts.train.1.path=x",
            "'prompts.train' is a list of 1, and has no entry '1'; give an index from 0",
        ),
        ("prompts.train.-1.path=x", "has no entry '-1'"),
        ("prompts.train.first.path=x", "has no entry 'first'"),
        ("training.rounds.x=1", "override 'training.rounds.x=1': 'training.rounds' is 3, which has no keys"),
        ("teacher.model.revision=x", "Give it whole, as in teacher.model='{KEY: VALUE, ...}'"),
        ("training.learning_rte=1", "did you mean 'learning_rate'"),
    ],
)
def test_an_override_that_leads_nowhere_is_refused(override, message):
    text = MINIMAL.replace("{pairs_per_step: 2", "{rounds: 3, pairs_per_step: 2")
    with pytest.raises(ConfigError, match=message):
        parse(override, text=text)


# --- settings that cannot take effect ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "idle"),
    [
        (["student.lora={}"], "lora with method: full"),
        (["student={model: {name: teacher, system_prompt: x}}"], "model.system_prompt with model: teacher"),
        (["student.prune={keep_every: 2, calibration_prompts: 4}"], "calibration_prompts with keep_every"),
        (["generation.temperature=0", "generation.top_p=0.5"], "top_p with temperature: 0"),
        (["generation.temperature=0", "generation.top_k=5"], "top_k with temperature: 0"),
        (["objective.alpha={schedule: fixed, minimum: 0.05}"], "minimum with schedule: fixed"),
        (
            ["objective.alpha={schedule: fixed, maximum: 0.3, per: batch}"],
            "maximum, per with schedule: fixed",
        ),
        (["objective.beta={schedule: fixed, maximum: 0.75}"], "maximum with schedule: fixed"),
        (
            ["training.rounds=1", "objective.alpha.maximum=0.3"],
            "objective.alpha.maximum with training.rounds: 1",
        ),
        (["training.schedule=constant", "training.warmup=0.2"], "warmup with schedule: constant"),
        (["objective.name=kd", "objective.alpha.maximum=0.3"], "alpha with objective 'kd'"),
        (["objective.name=gkd", "objective.beta.maximum=0.75"], "beta with objective 'gkd'"),
        (["objective.name=dpkd", "objective.normalization=token"], "normalization with objective 'dpkd'"),
        (["objective.name=sft", "generation.truncated=drop"], "generation.truncated with objective 'sft'"),
        (
            ["objective.name=kd", "training.pair_layout=joint"],
            "training.pair_layout: joint with objective 'kd'",
        ),
        (
            ["objective.name=kd", "training.pair_attention=flex"],
            "training.pair_attention with objective 'kd'",
        ),
        (
            ["training.pair_layout=separate", "training.pair_attention=flex"],
            "pair_attention with pair_layout: separate",
        ),
        (["objective.row_weights={level: segment, tau: 1}"], "tau with level: segment"),
        (["objective={name: dpkd, row_weights: {level: segment}}"], "row_weights with objective 'dpkd'"),
        (
            ["objective={name: seqkd, row_weights: {tasks: {gamma: 1}}}"],
            "row_weights with objective 'seqkd', which asks for no distribution",
        ),
        (
            ["objective.coupling={code: {teacher: {segmenter: lines}}}"],
            "coupling.code.teacher.segmenter with row_weights.level: token",
        ),
    ],
)
def test_a_setting_that_cannot_take_effect_is_refused_and_says_beside_which(overrides, idle):
    text = complaint(*overrides)
    assert text.startswith("run.yaml: 1 problem\n") and f"no effect of {idle}" in text
    assert "; remove " in text


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("{row_weights: {level: response}}", "level: response needs tau, in units of probability"),
        ("{coupling: {code: {teacher: {}}}}", "couples nothing; give divergence, weight, alpha or segmenter"),
        ("{coupling: {cod: {teacher: {weight: 2}}}}", "'instruction', 'code', 'math', 'vqa' or 'caption'"),
        ("{coupling: {code: {teacher: {divergence: kll}}}}", "Did you mean 'kl'"),
        (
            "{coupling: {code: {student: {alpha: 0.2}}}}",
            "needs alpha.minimum <= it <= alpha.maximum, 0.01 to",
        ),
        ("{name: kd, coupling: {code: {student: {weight: 2}}}}", "'kd' does not train on; it has teacher"),
    ],
)
def test_weights_and_coupling_say_what_they_need(objective, message):
    assert message in complaint(f"objective={objective}")


def test_a_coupling_is_read_into_terms_and_cells():
    config = parse("objective.coupling={code: {student: {alpha: 0.05, weight: 2}}}").objective
    assert [entry.alpha for entry in config.cells(["code", "vqa"])] == [None, None, 0.05, None, None, None]
    assert config.build(["code", "vqa"]).terms_C[2].parameter == 0.05
    with pytest.raises(UserError, match="unknown task of the coupling 'code'"):
        config.build(["vqa"])
    alone = parse("objective.row_weights={tasks: {gamma: 1}}").objective
    with pytest.raises(UserError, match=r"row_weights\.tasks: all prompts are of task 'math'"):
        alone.build(["math"])


@pytest.mark.parametrize(
    "overrides",
    [
        ["student.lora={}", "student.method=dora"],
        ["student={model: {name: org/other, system_prompt: x}}"],
        ["student.prune={block_influence: 2, calibration_prompts: 4}"],
        ["generation.top_p=0.5", "generation.top_k=5"],
        ["objective.alpha={maximum: 0.3, per: batch}"],
        ["objective.alpha={schedule: fixed, start: 0.3}"],
        ["objective.beta={schedule: fixed, start: 0.75}"],
        ["training.schedule=constant_with_warmup", "training.warmup=0.2"],
        ["training.schedule=constant", "training.warmup=0"],
        ["objective.name=gkd", "objective.parameters.omega=0.9"],
    ],
)
def test_the_same_settings_are_welcome_where_they_take_effect(overrides):
    parse(*overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.name=distilm2", "unknown objective 'distilm2'. Known: .*Did you mean 'distillm2'"),
        ("objective.parameters.lam=1", "unknown parameter of objective 'distillm2': 'lam'"),
        (
            "objective={name: gkd, parameters: {omegaa: 1}}",
            "'omegaa'. Known: omega, phi. Did you mean 'omega'",
        ),
        ("objective={name: gkd, parameters: {omega: 1}}", "omega is 1; give a number between 0 and 1"),
        ("objective={name: kd, parameters: {phi: 1}}", "objective 'kd' has no parameters"),
        ("student.prune={}", "give exactly one of .*got none"),
        ("student.prune={keep_every: 2, drop_layers: [1]}", "got drop_layers, keep_every"),
        ("student.prune.drop_layers=[]", "drop_layers: needs at least 1"),
        ("student.prune.drop_layers=[-1]", "drop_layers.0: input should be greater than or equal to 0"),
        ("objective.alpha.start=0.5", "needs minimum <= start <= maximum; got 0.01, 0.5, 0.1"),
        ("objective.beta.maximum=0.2", "needs start <= maximum; got 0.5, 0.2"),
    ],
)
def test_values_that_do_not_go_together_are_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        parse(override)
