"""Keelweight: find the few weights that keep a language model safe, strengthen just those, hold them still.

The library reads as one chain: load a model and prompts, score every weight, select a mask, tune only those
weights, evaluate. Names are imported when first used, so that `import keelweight` is quick.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "keelweight.errors": ("UserError",),
    "keelweight.inputs.models": ("ChatModel", "load_model", "save_model", "weights_digest"),
    "keelweight.inputs.prompts": ("Prompt", "load_prompts"),
    "keelweight.inputs.responses": ("Response", "respond"),
    "keelweight.inputs.layouts": ("Slice", "slices"),
    "keelweight.objectives.likelihood": ("refusal_cases", "refusal_likelihood"),
    "keelweight.scores.esi": ("esi", "esi_scores"),
    "keelweight.scores.store": ("Scores", "load_scores"),
    "keelweight.selection.choose": ("choose", "top_k"),
    "keelweight.selection.mask": ("Mask", "load_mask"),
    "keelweight.selection.profile": ("profile",),
    "keelweight.evaluation.evaluate": ("Evaluation", "evaluate"),
    "keelweight.evaluation.judges": ("Judge", "Verdict", "refusal_phrase_judge"),
    "keelweight.evaluation.rates": ("Rate", "attack_success_rate", "refusal_rate"),
    "keelweight.tuning.data": ("Group", "own_answer_examples", "refusal_examples", "safety_mixture"),
    "keelweight.tuning.patch": ("Patch", "load_patch", "make_patch"),
    "keelweight.tuning.safe_adamw": ("SafeAdamW",),
    "keelweight.tuning.train": ("Recipe", "tune"),
    "keelweight.report.page": ("write_report",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__version__ = "0.1.0"
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'keelweight' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
