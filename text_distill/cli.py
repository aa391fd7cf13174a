"""`distill-text`: the command line for causal language models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shared.cli import Modality, build_app, run_app
from text_distill.config import TextRunConfig
from text_distill.stages import TextRecipeConfig

if TYPE_CHECKING:
    from shared.adapter import AdapterKind
    from shared.config import EvaluationConfig
    from shared.run import Evaluate


def _kind() -> AdapterKind:
    from text_distill.adapter import TextAdapterKind

    return TextAdapterKind()


def _evaluate() -> Evaluate:
    from eval.run_stage import evaluate_run

    return evaluate_run


def _check_evaluation(evaluation: EvaluationConfig, starting: bool) -> None:
    from eval.run_tasks import check_tasks

    check_tasks(evaluation, accepts_images=False, starting=starting)


MODALITY = Modality(
    program="distill-text",
    what="a causal language model",
    templates="text",
    config_class=TextRunConfig,
    kind=_kind,
    evaluate=_evaluate,
    check_evaluation=_check_evaluation,
    recipe_class=TextRecipeConfig,
)
app = build_app(MODALITY)


def main() -> None:
    """Entry point of the console script."""
    run_app(app)
