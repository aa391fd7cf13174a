"""Which tasks are there? One line each; a module is imported when its task is asked for."""

from __future__ import annotations

# name on the command line: the module with its `TASK`
TASKS: dict[str, str] = {
    "alpaca_eval": "eval.tasks.alpaca_eval",
    "evol_instruct": "eval.tasks.evol_instruct",
    "ultrafeedback": "eval.tasks.ultrafeedback",
    "mt_bench": "eval.tasks.mt_bench",
    "vicuna": "eval.tasks.vicuna",
    "self_instruct": "eval.tasks.self_instruct",
    "humaneval": "eval.tasks.humaneval",
    "mbpp": "eval.tasks.mbpp",
    "mbpp_full": "eval.tasks.mbpp_full",
    "gsm8k": "eval.tasks.gsm8k",
    "math": "eval.tasks.math",
    "vqav2": "eval.tasks.vqav2",
    "okvqa": "eval.tasks.okvqa",
    "textvqa": "eval.tasks.textvqa",
    "chartqa": "eval.tasks.chartqa",
    "docvqa": "eval.tasks.docvqa",
    "pope": "eval.tasks.pope",
    "easy_vqa": "eval.tasks.easy_vqa",
    "daquar": "eval.tasks.daquar",
    "caption": "eval.tasks.caption",
    "agreement": "eval.tasks.agreement",
}
