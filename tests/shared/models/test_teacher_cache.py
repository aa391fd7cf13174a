from __future__ import annotations

import contextlib
import gc
import json
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch

from builders import tiny_llama, tiny_tokenizer
from runs import GradientsTaken, tiny_run
from shared.errors import StoreError, UserError
from shared.models.kept_share import kept_share
from shared.models.teacher_cache import CachedTeacher, build_cache
from shared.models.teachers import LocalTeacher, Sparse
from shared.models.vocabulary import SharedVocabulary
from shared.objectives.signal import sparse_signal
from shared.types import Group, Message, Response, Sample, TextPart
from text_distill.adapter import TextAdapter

VOCABULARY = SharedVocabulary(259, (0,))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def adapter() -> TextAdapter:
    return TextAdapter(tiny_tokenizer())


def group(name: str, *responses: tuple[str, tuple[int, ...]]) -> Group:
    sample = Sample(name, (Message("user", (TextPart(f"question {name}"),)),))
    made = tuple(Response(name, role, 1, 0, ids, "", "length", "") for role, ids in responses)
    return Group(sample, made)


GROUPS = [
    group("a", ("teacher", (40, 41, 42))),
    group("b", ("teacher", (50,))),
    group("c", ("teacher", (60, 61, 62, 63, 64, 2))),
]
PAIRS = [group("p", ("teacher", (40, 41)), ("student", (50, 51, 52)))]


def teacher_of(adapter, seed: int = 0) -> LocalTeacher:
    return LocalTeacher(tiny_llama(seed=seed), adapter, VOCABULARY)


def build(adapter, folder, groups=GROUPS, *, teacher=None, top_k=8, **options):
    teacher = teacher or teacher_of(adapter)
    settings = {"adapter": adapter, "vocabulary": VOCABULARY, "top_k": top_k, "batch_tokens": 60, **options}
    return build_cache(teacher, groups, folder, **settings)


def open_cache(adapter, folder, groups=GROUPS, **options) -> CachedTeacher:
    settings = {"adapter": adapter, "vocabulary": VOCABULARY, "device": CPU, **options}
    return CachedTeacher.open(folder, groups, **settings)


class Counting:
    """A teacher that counts what it is asked, and breaks at a batch if told so."""

    def __init__(self, teacher, break_at: int = -1) -> None:
        self.fingerprint = teacher.fingerprint
        self._teacher = teacher
        self._break_at = break_at
        self.asked = 0
        self.reads_encodings = True

    def signal(self, groups, encoded):
        if self.asked == self._break_at:
            raise KeyboardInterrupt
        self.asked += 1
        return self._teacher.signal(groups, encoded)


def test_the_cached_signal_is_the_teachers_sparse_one_in_any_order(adapter, tmp_path):
    teacher = teacher_of(adapter)
    build(adapter, tmp_path / "cache", teacher=teacher)
    cached = open_cache(adapter, tmp_path / "cache", teacher_fingerprint=teacher.fingerprint)
    assert cached.fingerprint == teacher.fingerprint
    for groups in (GROUPS, GROUPS[::-1], GROUPS[1:2]):
        targets_N = torch.tensor([t for g in groups for r in g.responses for t in r.token_ids])
        expected = sparse_signal(teacher.signal(groups, None), targets_N, top_k=8)
        signal = cached.signal(groups, None)
        assert isinstance(signal, Sparse) and torch.equal(signal.ids_NJ, expected.ids_NJ)
        for ours, theirs in zip(signal[1:], expected[1:], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-4)


def test_the_summary_says_what_it_costs_and_covers(adapter, tmp_path):
    small = build(adapter, tmp_path / "small", top_k=4)
    large = build(adapter, tmp_path / "large", top_k=128)
    assert (small.responses, small.tokens) == (3, 10)
    assert 0 < small.covered_mass["teacher"] < large.covered_mass["teacher"] <= 1
    size = sum(path.stat().st_size for path in (tmp_path / "small").glob("*.parquet"))
    assert small.bytes_per_token == size / 10


def test_training_needs_no_teacher_in_memory(adapter, tmp_path):
    teacher = teacher_of(adapter)
    model = weakref.ref(teacher.model)
    build(adapter, tmp_path / "cache", teacher=teacher)
    del teacher
    cached = open_cache(adapter, tmp_path / "cache")
    gc.collect()
    assert model() is None
    assert cached.signal(GROUPS, None).ids_NJ.shape == (10, 8)


def test_a_killed_build_goes_on_where_it_was(adapter, tmp_path):
    whole = Counting(teacher_of(adapter))
    build(adapter, tmp_path / "whole", teacher=whole)
    assert whole.asked > 1
    with pytest.raises(KeyboardInterrupt):
        build(adapter, tmp_path / "cache", teacher=Counting(teacher_of(adapter), break_at=1))
    with pytest.raises(StoreError, match=f"lacks {whole.asked - 1} of {whole.asked} batches"):
        open_cache(adapter, tmp_path / "cache")
    rest = Counting(teacher_of(adapter))
    build(adapter, tmp_path / "cache", teacher=rest)
    assert rest.asked == whole.asked - 1
    parts = [
        [path.read_bytes() for path in sorted((tmp_path / name).glob("part*"))] for name in ("cache", "whole")
    ]
    assert parts[0] == parts[1]


class Renamed:
    """The adapter with another template."""

    def __init__(self, adapter) -> None:
        self._adapter = adapter
        self.fingerprint = "another template"

    def __getattr__(self, name: str):
        return getattr(self._adapter, name)


def test_stale_and_foreign_caches_are_refused(adapter, tmp_path):
    folder = tmp_path / "cache"
    build(adapter, folder)
    resampled = [*GROUPS[:2], group("c", ("teacher", (60, 61, 62, 63, 64, 65)))]
    asked_otherwise = [*GROUPS[:2], replace_message(GROUPS[2])]
    for wanted, call in {
        "responses.digest": lambda: open_cache(adapter, folder, resampled),
        r"responses\.digest": lambda: open_cache(adapter, folder, asked_otherwise),
        "responses.count": lambda: open_cache(adapter, folder, GROUPS[:2]),
        "teacher: stored": lambda: open_cache(adapter, folder, teacher_fingerprint="another"),
        "adapter: stored": lambda: open_cache(Renamed(adapter), folder),
        "vocabulary.width": lambda: open_cache(adapter, folder, vocabulary=SharedVocabulary(250, (0,))),
        "vocabulary.excluded": lambda: open_cache(adapter, folder, vocabulary=SharedVocabulary(259, ())),
        "top_k: stored 8, now 9": lambda: build(adapter, folder, top_k=9),
        "teacher: stored ": lambda: build(adapter, folder, teacher=teacher_of(adapter, seed=1)),
        "holds no teacher cache": lambda: open_cache(adapter, tmp_path / "elsewhere"),
    }.items():
        with pytest.raises(StoreError, match=wanted):
            call()
    assert not (tmp_path / "elsewhere").exists()
    cached = open_cache(adapter, folder)
    with pytest.raises(StoreError, match="'c', teacher's response: it is another one"):
        cached.signal(resampled[2:], None)


def replace_message(old: Group) -> Group:
    message = Message("user", (TextPart("another question"),))
    return Group(replace(old.sample, messages=(message,)), old.responses)


def test_a_damaged_cache_is_refused_and_mended(adapter, tmp_path):
    folder = tmp_path / "cache"
    build(adapter, folder)
    part = sorted(folder.glob("part*"))[0]
    intact = part.read_bytes()
    part.write_bytes(intact[: len(intact) // 2])
    with pytest.raises(StoreError, match="cannot be read"):
        open_cache(adapter, folder)
    build(adapter, folder)
    assert part.read_bytes() == intact
    description = folder / "store.json"
    description.write_text(json.dumps({"identity": 3}))
    with pytest.raises(StoreError, match="Delete the cache"):
        open_cache(adapter, folder)


def test_a_students_responses_are_refused_unless_asked_for(adapter, tmp_path):
    summary = build(adapter, tmp_path, PAIRS)
    assert summary.covered_mass.keys() == {"teacher", "student"}
    with pytest.raises(UserError, match=r"sample 'p': a student's response.*Load the teacher"):
        open_cache(adapter, tmp_path, PAIRS).signal(PAIRS, None)
    cached = open_cache(adapter, tmp_path, PAIRS, student_responses=True)
    assert len(cached.signal(PAIRS, None).log_tail_N) == 5


def test_the_bias_is_that_of_a_lower_bound(adapter):
    models = [partial(teacher_of(adapter, seed=seed).signal, encoded=None) for seed in (0, 1)]
    shares = [kept_share(*models, PAIRS, top_k=k) for k in (2, 16, 259)]
    for role in ("teacher", "student"):
        few, more, all_ = (share[role].share for share in shares)
        assert 0 < few < more < 1 and all_ == pytest.approx(1, abs=1e-5)
        assert len({share[role].dense for share in shares}) == 1


def first_gradients(run, groups) -> dict[str, torch.Tensor]:
    gradients = {}
    trainee = run.session.trainee

    def take(*_: object, **__: object) -> None:
        for name, parameter in trainee.student.named_parameters():
            gradients[name] = parameter.grad.clone()
        raise GradientsTaken

    trainee.optimizer.step = take
    with contextlib.suppress(GradientsTaken):
        run._train(1, groups)
    return gradients


@pytest.mark.parametrize(("objective", "student_responses"), [("kd", False), ("distillm2", True)])
def test_a_run_trains_from_a_cache_as_it_does_from_the_teacher(tmp_path, objective, student_responses):
    run = tiny_run(tmp_path, f"objective.name={objective}", "training.max_grad_norm=1e9")
    run.execute("generate")
    groups = run._sample(1)
    trainee, models = run.session.trainee, run.session.models
    about = {"adapter": models.teacher_adapter, "vocabulary": models.vocabulary}
    dense = first_gradients(run, groups)
    folder = tmp_path / "cache"
    build_cache(trainee.teacher, groups, folder, top_k=259, batch_tokens=200, **about)
    trainee.optimizer.zero_grad()
    trainee.teacher = CachedTeacher.open(
        folder, groups, device=CPU, student_responses=student_responses, **about
    )
    cached = first_gradients(run, groups)
    assert cached.keys() == dense.keys() and len(dense) > 5
    for name in dense:  # probabilities are kept to 1/4096
        assert (cached[name] - dense[name]).norm() < 2e-3 * dense[name].norm(), name
