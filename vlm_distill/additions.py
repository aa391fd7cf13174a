"""What does a vision-language run do beside what all runs do? As its section `vision` asks."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from shared.additions import Additions
from shared.data.pairs import Grouping
from shared.errors import UserError
from shared.models.heads import causal_lm_of
from vlm_distill.config import VlmRunConfig
from vlm_distill.parts import part_of

if TYPE_CHECKING:
    from torch import nn

    from shared.models.teachers import LocalTeacher
    from shared.session import Session
    from vlm_distill.config_vision import AdvantageConfig, PositionKLConfig
    from vlm_distill.position_kl import PositionKL
    from vlm_distill.tower_cache import TowerCache
    from vlm_distill.visual_advantage import VisualAdvantage


def vision_additions(session: Session) -> Additions:
    """The additions of a run whose models are loaded.

    Raises:
        UserError: a tower that cannot be found or is trained, a CLIP model that cannot be loaded.
    """
    config = session.config
    assert isinstance(config, VlmRunConfig), type(config)
    caches = _tower_caches(session, config)

    def settle() -> None:
        for cache in caches:
            cache.commit()

    additions: dict[str, Any] = {"settle": settle}
    if config.vision.clip_filter is not None:
        additions["screen"] = _clip_filter(session, config)
    if config.vision.advantage is not None:
        additions["row_weights"] = _advantage(session, config.vision.advantage)
    if config.vision.position_kl is not None:
        additions["auxiliary"] = _position_kl(session, config.vision.position_kl)
    return Additions(**additions)


def tower_of(model: nn.Module) -> nn.Module:
    """The vision tower inside a model.

    Raises:
        UserError: none by a name that is known here.
    """
    causal_lm = causal_lm_of(model)
    found = next((module for name, module in causal_lm.named_modules() if part_of(name) == "tower"), None)
    if found is None:
        raise UserError(
            f"{type(causal_lm).__name__} has no vision tower by a name that is known here, so what it sees "
            "cannot be kept. Remove vision.tower_cache."
        )
    tower: nn.Module = found
    return tower


def _tower_caches(session: Session, config: VlmRunConfig) -> list[TowerCache]:
    from vlm_distill.tower_cache import cache_tower

    # processes that train together have a store each
    folder = session.workspace.folder / "tower-cache" / f"process-{session.accelerator.process_index}"
    models = {"teacher": session.models.teacher, "student": session.trainee.student}
    return [
        cache_tower(tower_of(model), folder / role)
        for role, model in models.items()
        if role in config.vision.tower_cache and model is not None
    ]


def _clip_filter(session: Session, config: VlmRunConfig) -> partial[Grouping]:
    from PIL import Image

    from eval.metrics.clip_score import scores
    from shared.data.images import UNLIMITED
    from vlm_distill.clip_filter import without_misfits

    wanted = config.vision.clip_filter
    assert wanted is not None
    device = str(session.accelerator.device)
    scores([""], [Image.new("RGB", (8, 8))], wanted.model, device)  # fails now, not after hours of sampling
    return partial(without_misfits, config=wanted, limits=UNLIMITED, device=device)


def _advantage(session: Session, config: AdvantageConfig) -> VisualAdvantage:
    from vlm_distill.visual_advantage import VisualAdvantage

    adapter: Any = session.models.teacher_adapter
    return VisualAdvantage(_own_teacher(session, "advantage"), adapter.blank, kappa=config.kappa)


def _position_kl(session: Session, config: PositionKLConfig) -> PositionKL:
    from vlm_distill.position_kl import PositionKL

    _own_teacher(session, "position_kl")
    adapters: Any = session.models.student_adapter, session.models.teacher_adapter
    return PositionKL(*adapters, weight=config.weight, matching=config.matching)


def _own_teacher(session: Session, key: str) -> LocalTeacher:
    from shared.models.teachers import LocalTeacher

    teacher = session.trainee.teacher
    if not isinstance(teacher, LocalTeacher):
        raise UserError(
            f"vision.{key} needs the teacher itself in memory, and this run trains without it; remove one."
        )
    return teacher
