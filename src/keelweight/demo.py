"""The whole chain on one model: evaluate, score, select, tune, evaluate again, report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from keelweight.errors import UserError
from keelweight.evaluation.evaluate import (
    Evaluation,
    answer_log_probabilities,
    evaluate,
    mean_kl,
)
from keelweight.files import read_json, write_json, write_text
from keelweight.inputs.models import ChatModel, load_model, weights_digest
from keelweight.inputs.prompts import Prompt, load_prompts
from keelweight.measure import Clock, machine, peak_rss_mb
from keelweight.objectives.likelihood import refusal_cases, refusal_likelihood
from keelweight.objectives.teacher_forcing import Turn
from keelweight.report.page import write_report
from keelweight.scores.esi import esi_scores
from keelweight.scores.store import Scores
from keelweight.selection.choose import choose
from keelweight.selection.mask import Mask
from keelweight.tuning.data import KEEP_TOKENS, PER_BATCH, Group, own_turn, safety_mixture
from keelweight.tuning.patch import chosen_values, make_patch
from keelweight.tuning.train import Recipe, Step, tune

SETS = ("harmful", "harmless", "borderline")


@dataclass(frozen=True)
class Settings:
    """What a demo run does; the defaults are those of `make demo`.

    Attributes:
        model: as in `load_model`.
        share: of all parameters, the weights to tune.
        recipe: of the tuning.
        per_batch: harmful, harmless and borderline examples in a batch.
        training_prompts: prompts of each kind to tune on; None takes all.
        keep_tokens: of every answer that tuning is to keep.
        scoring_prompts: harmful prompts that ESI is averaged over.
        eval_prompts: prompts of each kind in the evaluation.
        max_new_tokens: of every answer in the evaluation.
        control: also tune as many random weights, and show the result beside.
        seed: of everything drawn.
        dtype, device: as in `load_model`.
    """

    model: str = "builtin:smollm2"
    share: float = 0.001
    recipe: Recipe = field(default_factory=Recipe)
    per_batch: tuple[int, int, int] = PER_BATCH
    training_prompts: int | None = None
    keep_tokens: int = KEEP_TOKENS
    scoring_prompts: int = 64
    eval_prompts: int = 64
    max_new_tokens: int = 24
    control: bool = False
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"


def run_demo(
    out: Path, settings: Settings, *, force: bool = False, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Run the chain and write `out`: before.json, mask, patch, training.jsonl, after.json, summary.json, report.html.

    An interrupted run leaves what it has; the same call goes on from there. A finished run is refused unless
    `force`, and so is a folder of a run with other settings.

    Returns:
        What summary.json holds.

    Raises:
        UserError: the folder is taken, or an input is wrong.
    """
    record = json.loads(json.dumps(asdict(settings)))
    prepare(out, record, force=force)
    clock = Clock()
    started = time.perf_counter()
    with clock.stage("load"):
        chat = load_model(settings.model, dtype=settings.dtype, device=settings.device)
        base_sha256 = weights_digest(chat.model)
        sets = {
            name: load_prompts(f"builtin:{name}", split="eval", limit=settings.eval_prompts, seed=settings.seed)
            for name in SETS
        }
    with clock.stage("evaluate before"):
        before = evaluate(chat, sets, max_new_tokens=settings.max_new_tokens)
        own = [own_turn(chat, answer.response) for answer in before.answers["harmless"]]
        own_turns = [turn for turn in own if turn is not None]
        predictions = answer_log_probabilities(chat, own_turns)
        write_json(out / "before.json", before.to_json(), force=True)
    say(summary_line("before", before))
    with clock.stage("score"):
        scores = score(chat, settings)
    with clock.stage("select"):
        mask = choose(scores, share=settings.share)
        random_mask = choose(scores, share=settings.share, rule="random", seed=settings.seed)
        total = int(scores.about["parameters"])
        del scores
        mask.save(out / "mask.safetensors", force=True)
    say(f"chose {len(mask):,} of {total:,} weights ({len(mask) / total:.2%})")
    with clock.stage("answers to keep"):
        groups = safety_mixture(
            chat,
            *(
                load_prompts(f"builtin:{name}", split="train", limit=settings.training_prompts, seed=settings.seed)
                for name in SETS
            ),
            per_batch=settings.per_batch,
            max_new_tokens=settings.keep_tokens,
        )
    after, kl = tuned(chat, mask, groups, sets, own_turns, predictions, settings, out, clock, "", base_sha256)
    say(summary_line("after", after))
    summary = {
        "model": settings.model,
        "parameters": total,
        "weights_trained": len(mask),
        "share": settings.share,
        "iterations": settings.recipe.iterations,
        **numbers(before, "before"),
        **numbers(after, "after"),
        "kl_from_original": kl,
        "objective_before": mask.source["objective_mean"],
    }
    if settings.control:
        control, control_kl = tuned(
            chat,
            random_mask,
            groups,
            sets,
            own_turns,
            predictions,
            settings,
            out,
            clock,
            "control ",
            base_sha256,
        )
        say(summary_line("control (random weights)", control))
        summary |= {**numbers(control, "control"), "kl_from_original_control": control_kl}
    summary |= {
        "settings": record,
        "seconds": clock.seconds,
        "seconds_total": round(time.perf_counter() - started, 1),
        "peak_rss_mb": round(peak_rss_mb()),
        "machine": machine(),
    }
    write_json(out / "summary.json", summary, force=True)
    write_report(out, force=True)
    return summary


def prepare(out: Path, record: dict[str, Any], *, force: bool) -> None:
    """Make the run folder, or find it left by an interrupted run of the same settings."""
    settings = out / "settings.json"
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file. Give a folder for the run.")
    if (out / "summary.json").exists() and not force:
        raise UserError(f"{out} holds a finished run. Give another folder, or --force to replace it.")
    if out.is_dir() and any(out.iterdir()) and not settings.exists():
        raise UserError(f"{out} holds files that are no run of keelweight's. Give another folder.")
    if settings.exists() and (force or read_json(settings, what="settings of a run") != record):
        if not force:
            raise UserError(f"{out} holds an interrupted run with other settings. Use those, or --force to replace it.")
        for file in out.iterdir():
            if file.is_file():
                file.unlink()
    write_json(settings, record, force=True)


def score(chat: ChatModel, settings: Settings) -> Scores:
    """ESI by the likelihood of refusing, over harmful training prompts."""
    prompts = load_prompts("builtin:harmful", split="train", limit=settings.scoring_prompts, seed=settings.seed)
    about = {"objective": "refusal", "prompt_source": "builtin:harmful/train", "seed": settings.seed}
    return esi_scores(chat, refusal_likelihood, refusal_cases(chat, prompts), tokens_per_batch=512, source=about)


def tuned(
    chat: ChatModel,
    mask: Mask,
    groups: list[Group],
    sets: dict[str, list[Prompt]],
    own_turns: list[Turn],
    predictions: list[Any],
    settings: Settings,
    out: Path,
    clock: Clock,
    label: str,
    base_sha256: str,
) -> tuple[Evaluation, float]:
    """Tune the masked weights, evaluate, write patch and training log, and give the base model's bits back."""
    prefix = "control-" if label else ""
    old = chosen_values(chat.model, mask)
    with clock.stage(f"{label}tune"):
        checkpoint = out / f"{prefix}checkpoint.safetensors"
        recipe = replace(settings.recipe, seed=settings.seed)
        steps = tune(chat, groups, train_only=mask, recipe=recipe, checkpoint=checkpoint)
        write_text(out / f"{prefix}training.jsonl", training_log(steps), force=True)
    about = {"model": dict(chat.source), "recipe": asdict(recipe), "mask": dict(mask.source)}
    patch = make_patch(chat.model, mask, old, base_sha256=base_sha256, about=about)
    patch.save(out / f"{prefix}patch.safetensors", force=True)
    with clock.stage(f"{label}evaluate after"):
        found = evaluate(chat, sets, max_new_tokens=settings.max_new_tokens)
        kl = mean_kl(chat, own_turns, predictions)
        write_json(out / f"{'control' if label else 'after'}.json", found.to_json(), force=True)
    patch.revert(chat.model)
    return found, kl


def training_log(steps: list[Step]) -> str:
    """One JSON object a line, one line an iteration."""
    return "".join(json.dumps(asdict(step)) + "\n" for step in steps)


def numbers(found: Evaluation, when: str) -> dict[str, Any]:
    """The figures of an evaluation under the names of summary.json."""
    return {f"{name}_{when}": rate.to_json() for name, rate in found.rates().items()} | {
        f"harmless_ppl_{when}": found.harmless_ppl
    }


def summary_line(when: str, found: Evaluation) -> str:
    """An evaluation in one line."""
    rates = found.rates()
    return (
        f"{when}: attack success {rates['asr']}, over-refusal {rates['over_refusal']}, "
        f"borderline refused {rates['borderline_refusal']}"
    )
