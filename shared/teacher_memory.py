"""When is a cached teacher in memory? To answer and be cached, and to be compared with; not in training."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from shared.adapter import AdapterKind
from shared.config_models import CacheConfig
from shared.data.images import ContentKeys
from shared.errors import StoreError
from shared.models.kept_share import kept_share
from shared.models.teacher_cache import CachedTeacher, build_cache
from shared.models.teachers import Dense, LocalTeacher, dense_signal, fingerprint_of_model
from shared.session import Session
from shared.training.memory import return_freed_memory
from shared.training.setup import load_teacher
from shared.types import Group
from shared.workspace import Workspace

FACTS = "teacher-cache.json"
COMPARED_GROUPS = 16  # on which it is measured how much of the divergence a cache shows


def cache_teacher(
    session: Session, cache: CacheConfig, groups: Sequence[Group], heldout_groups: Sequence[Group]
) -> None:
    """Write the teacher's signals for these groups as far as they are missing, and let its weights go.

    What the cache costs and shows is measured before the first step and kept in the run's folder.

    Raises:
        StoreError: the cache is of another teacher or of other responses, or being built by another run.
    """
    trainee, models, accelerator = session.trainee, session.models, session.accelerator
    teacher = trainee.teacher
    assert isinstance(teacher, LocalTeacher) and not trainee.step
    folder = Path(cache.folder) if cache.folder else session.workspace.folder / "teacher-cache"
    all_groups, prompt_key = [*groups, *heldout_groups], ContentKeys()
    with session.speaker.bar("teacher's signals") as bar:
        summary = build_cache(
            teacher,
            all_groups,
            folder,
            adapter=models.teacher_adapter,
            vocabulary=models.vocabulary,
            top_k=cache.top_k,
            batch_tokens=session.config.generation.batch_tokens,
            prompt_key=prompt_key,
            progress=bar,
            beside=() if cache.folder else session.workspace.beside(folder),
            process=accelerator.process_index,
            processes=accelerator.num_processes,
            barrier=accelerator.wait_for_everyone,
        )
    if session.workspace.read_json(FACTS) is None:

        def start(one: Sequence[Group]) -> Dense:
            encoded = models.student_adapter.encode(one, layout="separate")
            return dense_signal(trainee.student, encoded, models.vocabulary)

        dense = partial(teacher.signal, encoded=None)
        shares = kept_share(dense, start, groups[:COMPARED_GROUPS], top_k=cache.top_k)
        del dense
        facts = {
            "bytes_per_token": summary.bytes_per_token,
            "tokens": summary.tokens,
            "covered_mass": dict(summary.covered_mass),
            "kept_share": {role: share.share for role, share in shares.items()},
            "kept_share_groups": min(len(groups), COMPARED_GROUPS),
        }
        session.workspace.write_json(FACTS, facts)
    trainee.teacher = CachedTeacher.open(
        folder,
        all_groups,
        adapter=models.teacher_adapter,
        vocabulary=models.vocabulary,
        device=accelerator.device,
        teacher_fingerprint=teacher.fingerprint,
        student_responses=cache.student_responses,
        prompt_key=prompt_key,
    )
    for text in cache_facts(session.workspace).values():
        session.speaker.say(f"  teacher cached in {folder}, not in memory from here on: {text}")
    models.teacher = None
    del teacher
    return_freed_memory()


def bring_teacher_back(session: Session, kind: AdapterKind) -> None:
    """Load the teacher again, for what needs the model itself.

    Raises:
        StoreError: its files are not those of the run's start any more.
    """
    models = session.models
    models.teacher = load_teacher(session.config, kind, session.accelerator.device)
    if fingerprint_of_model(models.teacher) != models.teacher_fingerprint:
        assert session.config.teacher is not None
        raise StoreError(
            f"the teacher {session.config.teacher.model.name!r} has changed since the run started: the "
            "student was trained on another. Put its files back and start again: only evaluation is left."
        )


def cache_facts(workspace: Workspace) -> dict[str, str]:
    """What the run's cache costs and shows, for a person to read; empty without one."""
    facts = workspace.read_json(FACTS)
    if facts is None:
        return {}
    covered = ", ".join(f"{100 * mass:.1f} % on {role}" for role, mass in facts["covered_mass"].items())
    kept = ", ".join(f"{100 * share:.0f} % on {role}" for role, share in facts["kept_share"].items())
    return {
        "teacher cache": f"{facts['bytes_per_token']:.0f} bytes a token; probability kept: {covered} "
        f"responses; divergence of the student's start kept: {kept} responses "
        f"(measured on {facts['kept_share_groups']} prompts)"
    }
