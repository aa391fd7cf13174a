"""Whole text runs against what is known to go wrong in other distillation code (METHOD.md, section 7)."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
)

from builders import tiny_llama, tiny_tokenizer
from runs import tiny_run
from shared.errors import AlignmentError, UserError
from shared.run import Run
from shared.training import distiller
from text_distill.adapter import TextAdapter

WIDTH, PAD = 259, 0  # of the tokenizer; "<|endoftext|>" pads and ends nothing
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.5,
}


def softcapped() -> PreTrainedModel:
    config = Gemma2Config(**SHAPE, vocab_size=WIDTH, head_dim=8, final_logit_softcapping=1.5)
    return seeded(Gemma2ForCausalLM, config)


def scaled() -> PreTrainedModel:
    return seeded(GraniteForCausalLM, GraniteConfig(**SHAPE, vocab_size=WIDTH, logits_scaling=4.0))


def seeded(model_class, config) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return model_class(config).eval()


def save(folder: Path, model: PreTrainedModel, tokenizer=None) -> Path:
    model.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder


def run_of(folder: Path, teacher: PreTrainedModel, student: PreTrainedModel, *overrides: str) -> Run:
    save(folder / "teacher", teacher)
    save(folder / "student", student)
    return tiny_run(folder, f"student={{model: {folder}/student}}", *overrides)


def metrics(run: Run, key: str) -> list[float]:
    return [row[key] for row in run.workspace.metrics() if key in row]


def stored(run: Run, role: str, number: int = 1) -> list[dict]:
    folder = run.workspace.round_folder(number) / "responses" / role
    return [row for part in sorted(folder.glob("*.parquet")) for row in pq.read_table(part).to_pylist()]


@torch.no_grad()
def plain_kl(run: Run, teacher: PreTrainedModel, student: PreTrainedModel) -> float:
    """KL(teacher ‖ student) a held-out token, by the models' own logits, one unpadded sequence at a time."""
    adapter = run.session.models.teacher_adapter
    nats = []
    for sample, (response,) in run.heldout_groups:
        prompt = adapter.prompt_ids(sample)
        rows = slice(len(prompt) - 1, -1)
        ids = torch.tensor([[*prompt, *response.token_ids]])
        p, q = (model(ids).logits[0, rows, :WIDTH].double() for model in (teacher, student))
        p[:, PAD] = q[:, PAD] = -1e9
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        nats.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return float(torch.cat(nats).mean())


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        (lambda: tiny_llama(vocabulary_size=320, seed=1), tiny_llama),
        (tiny_llama, lambda: tiny_llama(vocabulary_size=320, seed=1)),
        (softcapped, scaled),
        (scaled, softcapped),
    ],
    ids=["wide teacher", "wide student", "soft-capped teacher", "soft-capped student"],
)
def test_widths_soft_capping_and_scaling_are_those_of_the_models(tmp_path, teacher, student):
    run = run_of(tmp_path, teacher(), student(), "training.rounds=1")
    run.execute("export")
    start, *_, end = metrics(run, "heldout/kl")
    trained = AutoModelForCausalLM.from_pretrained(run.config.folder / "student")
    assert start == pytest.approx(plain_kl(run, teacher(), student()), rel=1e-4)
    assert end == pytest.approx(plain_kl(run, teacher(), trained), rel=1e-4)
    assert end != pytest.approx(start, rel=1e-3)
    sampled = {
        token for role in ("teacher", "student") for row in stored(run, role) for token in row["token_ids"]
    }
    assert max(sampled) < WIDTH and PAD not in sampled


def test_equal_vocabulary_sizes_with_different_tokens_are_refused(tmp_path):
    run = run_of(tmp_path, tiny_llama(), tiny_llama())
    file = tmp_path / "student" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(tokenizer))
    first = min(vocabulary["a"], vocabulary["b"])
    with pytest.raises(
        UserError, match=rf"different tokens at 2 ids, the first: {first}: '[ab]' in the teacher"
    ):
        run.execute()
    assert not (run.config.folder / "round-01").exists()


def test_only_response_rows_reach_a_head_and_no_models_own(tmp_path, monkeypatch):
    run = tiny_run(tmp_path, "training.rounds=1")
    run.execute("generate")
    groups = run._sample(1)
    seen = []
    original = distiller.objective_loss

    def spied(objective, student_hidden_ND, student_head, signal, *args, **kwargs):
        assert student_hidden_ND.ndim == signal.hidden_NE.ndim == 2
        assert len(student_hidden_ND) == len(signal.hidden_NE)
        seen.append(len(student_hidden_ND))
        return original(objective, student_hidden_ND, student_head, signal, *args, **kwargs)

    monkeypatch.setattr(distiller, "objective_loss", spied)
    monkeypatch.setattr(Run, "_show_answers", lambda *_, **__: None)  # generation is the head's own business
    monkeypatch.setattr(Run, "_measure", lambda *_, **__: None)
    for model in (run.session.models.teacher, run.session.trainee.student):
        model.lm_head.register_forward_hook(lambda *_: pytest.fail("a model computed its full logits"))
    run._train(1, groups)
    assert sum(seen) == sum(len(r.token_ids) for group in groups for r in group.responses)


def test_rows_that_do_not_correspond_stop_the_run_instead_of_a_loss(tmp_path, monkeypatch):
    run = tiny_run(tmp_path)
    run.execute("generate")
    original = TextAdapter.encode

    def tail_slice(self, groups, *, layout):
        encoded = original(self, groups, layout=layout)
        return encoded._replace(rows_N=encoded.rows_N - 1)

    monkeypatch.setattr(TextAdapter, "encode", tail_slice)
    again = tiny_run(tmp_path)
    with pytest.raises(AlignmentError, match=r"sample '\S+', \w+'s response: in the \w+'s batch, its rows"):
        again.execute("train")
    assert not metrics(again, "train/loss")


def test_a_teacher_that_sees_another_prompt_length_still_predicts_the_same_tokens(tmp_path):
    teacher = f"{{name: {tmp_path}/teacher, system_prompt: answer in the fewest words}}"
    student = f"student={{model: {tmp_path}/student}}"
    save(tmp_path / "student", tiny_llama(seed=2))
    tiny_run(tmp_path, student)
    run = tiny_run(tmp_path, student, f"teacher.model={teacher}", "training.rounds=1")
    run.execute("train")
    sample = run.session.train_samples[0]
    models = run.session.models
    assert models.teacher_adapter.prompt_tokens(sample) > models.student_adapter.prompt_tokens(sample)
    assert len(metrics(run, "train/loss")) == 3


def test_duplicate_prompts_keep_responses_and_steps_of_their_own(tmp_path):
    tiny_run(tmp_path)
    line = json.dumps({"prompt": "the same"}) + "\n"
    (tmp_path / "train.jsonl").write_text(line * 8)
    run = tiny_run(tmp_path, "training.rounds=1")
    run.execute("train")
    for role in ("teacher", "student"):
        rows = stored(run, role)
        assert len({row["sample_id"] for row in rows}) == len(rows) == 8
        assert len({tuple(row["token_ids"]) for row in rows}) > 4  # noise of their own
    assert len(metrics(run, "train/loss")) == 2  # four pairs a step


def test_the_end_is_taught_only_where_a_model_wrote_it(tmp_path):
    teacher = tiny_llama()
    with torch.no_grad():  # ends about every fourth token
        teacher.model.embed_tokens.weight[2] *= 6
    run = run_of(tmp_path, teacher, tiny_llama(seed=2), "training.rounds=1")
    run.execute("generate")
    rows = stored(run, "teacher")
    ended = [row["finish_reason"] == "stop" for row in rows]
    assert any(ended) and not all(ended)
    for row, end in zip(rows, ended, strict=True):
        assert row["token_ids"].count(2) == int(end) and (row["token_ids"][-1] == 2) is end
    groups = run._sample(1)
    targets = run.session.models.student_adapter.encode(groups, layout="separate").target_ids_N
    assert int((targets == 2).sum()) == sum(r.token_ids[-1] == 2 for g in groups for r in g.responses)
