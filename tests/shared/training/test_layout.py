from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import MistralConfig, MistralForCausalLM

from builders import tiny_tokenizer
from runs import first_gradients, tiny_config, tiny_run
from shared.errors import UserError
from shared.training.loop import _prepare, heldout_nats

ONE_STEP = ("training.pairs_per_step=10", "training.micro_batch_tokens=300")
JOINT, SEPARATE = "training.pair_layout=joint", "training.pair_layout=separate"


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], bound: float = 1e-5) -> None:
    assert left.keys() == right.keys() and left
    for name in left:
        difference = (left[name] - right[name]).norm() / left[name].norm().clamp_min(1e-12)
        assert difference < bound, (name, float(difference))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def separate(folder) -> dict[str, torch.Tensor]:
    return first_gradients(folder, *ONE_STEP, SEPARATE, f"output={folder}/separate")


def windowed_model(folder: Path, *, window: int) -> str:
    """A Mistral with a sliding window, as the teacher's folder; returns its name."""
    name = f"window-{window}"
    config = MistralConfig(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, sliding_window=window, initializer_range=0.2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    MistralForCausalLM(config).save_pretrained(folder / name)
    tiny_tokenizer().save_pretrained(folder / name)
    return name


@pytest.mark.parametrize("tokens", [1, 300, 100_000])
def test_gradients_do_not_depend_on_the_layout(folder, separate, tokens):
    output = f"output={folder}/joint-{tokens}"
    joint = first_gradients(folder, ONE_STEP[0], JOINT, f"training.micro_batch_tokens={tokens}", output)
    assert_same(separate, joint)


def test_the_joint_layout_is_what_auto_takes_and_computes_the_prompt_once(folder):
    run = tiny_run(folder, *ONE_STEP, f"output={folder}/auto")
    run.execute("generate")
    trainee = run.session.trainee
    assert trainee.layouts[:2] == ("joint", "joint") and not trainee.layouts.notes
    groups = run._sample(1)
    batch = _prepare(trainee, groups)
    for encoded, adapter in (
        (batch.student, trainee.student_adapter),
        (batch.teacher, trainee.teacher_adapter),
    ):
        used = sum(
            adapter.prompt_tokens(g.sample) + sum(len(r.token_ids) for r in g.responses) for g in groups
        )
        pad = tiny_tokenizer().pad_token_id
        assert int((encoded.inputs["input_ids"] != pad).sum()) == used
        assert int((encoded.inputs["segment_ids"] >= 0).sum()) == used


def test_teacher_and_student_need_not_agree(folder, separate, monkeypatch):
    import shared.session

    def mixed(*arguments, **options):
        return shared.training.layout.choose_layouts(*arguments, **options)._replace(teacher="separate")

    monkeypatch.setattr(shared.session, "choose_layouts", mixed)
    assert_same(separate, first_gradients(folder, *ONE_STEP, JOINT, f"output={folder}/mixed"))


def test_gradient_checkpointing_reads_the_mask_again(folder, separate):
    settings = (*ONE_STEP, JOINT, "training.gradient_checkpointing=true", f"output={folder}/checkpointed")
    assert_same(separate, first_gradients(folder, *settings))


@pytest.fixture
def fresh_accelerator():
    """accelerate keeps the first mixed precision of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_bfloat16_gradients_differ_by_its_rounding_only(folder, fresh_accelerator):
    settings = (*ONE_STEP, "training.mixed_precision=bf16")
    joint, apart = (
        first_gradients(folder, *settings, f"training.pair_layout={layout}", f"output={folder}/bf16-{layout}")
        for layout in ("joint", "separate")
    )
    assert_same(apart, joint, bound=0.1)


def test_objectives_on_one_response_have_no_segments_and_no_layout_to_ask_for(folder):
    run = tiny_run(folder, "objective.name=kd", f"output={folder}/kd")
    run.execute("generate")
    trainee = run.session.trainee
    assert _prepare(trainee, run._sample(1)).student.inputs.keys() == {
        "input_ids",
        "attention_mask",
        "position_ids",
    }
    with pytest.raises(UserError, match="pair_layout"):
        tiny_config(folder, "objective.name=kd", JOINT)


def test_held_out_measurements_have_no_segments_and_do_not_depend_on_the_layout(folder):
    values = []
    for layout in (JOINT, SEPARATE):
        run = tiny_run(folder, layout, f"output={folder}/kl-{len(values)}")
        run.execute("generate")
        trainee = run.session.trainee
        assert _prepare(trainee, run.heldout_groups).student.inputs.keys() == {
            "input_ids",
            "attention_mask",
            "position_ids",
        }
        values.append(heldout_nats(trainee, run.heldout_groups))
    assert values[0] == values[1]


def test_beyond_a_window_auto_falls_back_with_a_reason_and_joint_is_refused(folder):
    teacher = f"teacher.model={folder}/{windowed_model(folder, window=16)}"
    run = tiny_run(folder, *ONE_STEP, teacher, f"output={folder}/window-auto")
    run.execute("generate")
    layouts = run.session.trainee.layouts
    assert layouts[:2] == ("separate", "separate")
    assert any("student" in note and "last 16 tokens" in note for note in layouts.notes)
    with pytest.raises(UserError, match=r"pair_layout: joint .* the student \(mistral\).* 16 tokens"):
        tiny_run(folder, teacher, JOINT, f"output={folder}/window-joint").execute("generate")


def test_within_a_window_the_layout_is_joint_and_exact(folder):
    teacher = f"teacher.model={folder}/{windowed_model(folder, window=128)}"
    gradients = [
        first_gradients(folder, *ONE_STEP, teacher, layout, f"output={folder}/inside-{i}")
        for i, layout in enumerate((SEPARATE, JOINT))
    ]
    assert_same(*gradients)


def test_a_model_that_measures_differently_is_not_laid_out_jointly(folder, monkeypatch):
    import shared.training.layout as module

    monkeypatch.setattr(module, "joint_difference", lambda *_: float("nan"))
    run = tiny_run(folder, f"output={folder}/differs")
    run.execute("generate")
    layouts = run.session.trainee.layouts
    assert layouts[:2] == ("separate", "separate") and "differ by nan" in layouts.notes[0]
    with pytest.raises(UserError, match="differ by nan"):
        tiny_run(folder, JOINT, f"output={folder}/differs-joint").execute("generate")


def test_a_window_that_no_configuration_tells_of_is_measured_at_the_longest_prompt(folder, monkeypatch):
    """All but the longest two prompts, of 61 tokens, fit into it with their responses."""
    import shared.models.layout_support as module

    monkeypatch.setattr(module, "_span_keys", lambda config: [])
    teacher = f"teacher.model={folder}/{windowed_model(folder, window=62)}"
    run = tiny_run(folder, *ONE_STEP, teacher, f"output={folder}/hidden-auto")
    run.execute("generate")
    layouts = run.session.trainee.layouts
    assert layouts[:2] == ("separate", "separate")
    assert all("hidden states differ by" in note for note in layouts.notes)
    with pytest.raises(UserError, match="joint is not possible with the student"):
        tiny_run(folder, teacher, JOINT, f"output={folder}/hidden-joint").execute("generate")
    teacher = f"teacher.model={folder}/{windowed_model(folder, window=67)}"
    run = tiny_run(folder, *ONE_STEP, teacher, f"output={folder}/hidden-inside")
    run.execute("generate")
    assert run.session.trainee.layouts[:2] == ("joint", "joint")


def test_an_unknown_family_is_left_separate_unless_joint_is_asked_for(folder, monkeypatch):
    import shared.models.layout_support as module

    monkeypatch.setattr(module, "JOINT_FAMILIES", frozenset())
    chosen = []
    for layout in ("auto", "joint"):
        run = tiny_run(folder, f"training.pair_layout={layout}", f"output={folder}/unknown-{layout}")
        run.execute("generate")
        chosen.append(run.session.trainee.layouts.student)
    assert chosen == ["separate", "joint"]


@pytest.mark.parametrize("layout", [JOINT, SEPARATE])
def test_padding_is_logged_for_the_layout_in_use(folder, layout):
    shares = []
    for tokens in (1, 100_000):
        settings = (f"training.micro_batch_tokens={tokens}", f"output={folder}/padding-{layout}-{tokens}")
        run = tiny_run(folder, layout, *settings)
        run.execute("train")
        shares.append([row["train/padding_share"] for row in run.workspace.metrics() if "train/loss" in row])
    alone, together = shares
    assert layout == SEPARATE or set(alone) == {0.0}  # a joint sequence by itself has no padding
    assert min(together) > max(alone)


def test_auto_keeps_pairs_apart_where_sharing_costs_more(folder, monkeypatch):
    import shared.training.layout as module

    monkeypatch.setattr(module, "joint_saves", lambda *_, **__: False)
    chosen = []
    for layout in ("auto", "joint"):
        run = tiny_run(folder, f"training.pair_layout={layout}", f"output={folder}/costs-{layout}")
        run.execute("generate")
        chosen.append(run.session.trainee.layouts)
    assert [layouts.student for layouts in chosen] == ["separate", "joint"]
    assert "costs" in chosen[0].notes[0] and not chosen[1].notes


def test_flex_attention_is_refused_on_a_cpu_before_anything_is_loaded(folder, monkeypatch):
    import shared.session

    monkeypatch.setattr(shared.session, "open_models", None)
    run = tiny_run(folder, "training.pair_attention=flex", f"output={folder}/on-a-cpu")
    with pytest.raises(UserError, match=r"pair_attention: flex needs a CUDA device.*dense"):
        run.execute("generate")


@pytest.fixture
def flex_on_a_cpu(monkeypatch):
    """Flex attention by its own formulas, which a CPU can differentiate, with heads of any width."""
    from torch.nn.attention import flex_attention

    import shared.models.pair_attention
    import shared.session

    monkeypatch.setattr(shared.session, "require_gpu", lambda _: None)
    monkeypatch.setattr(shared.models.pair_attention, "LEAST_HEAD_WIDTH", 1)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    with torch.compiler.set_stance("force_eager"):
        yield


def test_flex_attention_trains_with_the_same_gradients(folder, separate, flex_on_a_cpu):
    settings = (*ONE_STEP, JOINT, "training.pair_attention=flex")
    assert_same(separate, first_gradients(folder, *settings, f"output={folder}/flex"))


def test_a_model_that_has_no_flex_attention_is_named(folder, flex_on_a_cpu, monkeypatch):
    import shared.models.pair_attention

    monkeypatch.setattr(shared.models.pair_attention, "LEAST_HEAD_WIDTH", 16)
    with pytest.raises(UserError, match=r"flex is not possible with the student \(llama\): .* 8 wide.*dense"):
        tiny_run(folder, "training.pair_attention=flex", f"output={folder}/narrow").execute("generate")
