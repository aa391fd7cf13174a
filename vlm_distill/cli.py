"""`distill-vlm`: the command line for models with images and text in, text out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shared.cli import Modality, build_app, run_app
from vlm_distill.config import VlmRunConfig
from vlm_distill.stages import STAGE_KINDS, VlmRecipeConfig

if TYPE_CHECKING:
    from shared.adapter import AdapterKind
    from shared.config import EvaluationConfig
    from shared.run import Evaluate


def _kind() -> AdapterKind:
    from vlm_distill.adapter import VlmAdapterKind

    return VlmAdapterKind()


def _evaluate() -> Evaluate:
    from eval.run_stage import evaluate_run

    return evaluate_run


def _check_evaluation(evaluation: EvaluationConfig, starting: bool) -> None:
    from eval.run_tasks import check_tasks

    check_tasks(evaluation, accepts_images=True, starting=starting)


MODALITY = Modality(
    program="distill-vlm",
    what="a vision-language model",
    templates="vlm",
    config_class=VlmRunConfig,
    kind=_kind,
    evaluate=_evaluate,
    check_evaluation=_check_evaluation,
    recipe_class=VlmRecipeConfig,
    stage_kinds=STAGE_KINDS,
)
app = build_app(MODALITY)


def main() -> None:
    """Entry point of the console script."""
    run_app(app)
