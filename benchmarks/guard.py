"""The judge-guided score beside the likelihood of refusing: cost of scoring, and SET from both.

    python -m benchmarks.guard cost GUARD --out docs/results/guard-cost.json
    python -m benchmarks.guard set GUARD --out docs/results/guard-set.json --data ../shared/data

`cost` runs each way of scoring in a process of its own, so that its peak memory is its own. `set` writes a row as
soon as it has one, and goes on where it stopped.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from keelweight.evaluation.evaluate import evaluate
from keelweight.evaluation.rates import Rate
from keelweight.files import read_json, write_json
from keelweight.inputs.guards import load_guard
from keelweight.inputs.models import ChatModel, load_model, weights_digest
from keelweight.inputs.prompts import load_prompts
from keelweight.inputs.responses import respond
from keelweight.measure import machine, peak_rss_mb
from keelweight.objectives.guard import GuardObjective, judged_cases
from keelweight.objectives.likelihood import RefusalCase, refusal_cases, refusal_likelihood
from keelweight.objectives.teacher_forcing import Turn
from keelweight.progress import shown
from keelweight.scores.esi import esi_scores
from keelweight.scores.store import Scores
from keelweight.selection.choose import choose
from keelweight.selection.mask import Mask
from keelweight.tuning.data import safety_mixture
from keelweight.tuning.patch import chosen_values, make_patch
from keelweight.tuning.train import Recipe, tune

app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)
MODEL = "builtin:smollm2"


@app.command()
def cost(
    guard: Annotated[str, typer.Argument(help="Guard folder or hub id.")],
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("guard-cost.json"),
    prompts: int = 64,
    tokens: int = 64,
    repeats: int = 3,
) -> None:
    """Time and peak memory of judge-guided scoring, as ratios to the likelihood of the same answers."""
    runs: dict[str, list[dict[str, float]]] = {"likelihood": [], "guard": []}
    for _ in range(repeats):
        for kind, rows in runs.items():
            command = [sys.executable, "-m", "benchmarks.guard", "once", guard, kind, str(prompts), str(tokens)]
            ran = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append(json.loads(ran.stdout.splitlines()[-1]))
    medians = {
        kind: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for kind, rows in runs.items()
    }
    one, other = medians["guard"], medians["likelihood"]
    found = {
        "prompts": prompts,
        "answer_tokens": tokens,
        "repeats": repeats,
        "time_ratio": (one["judging"] + one["scoring"]) / other["scoring"],
        "memory_ratio": one["peak_rss_mb"] / other["peak_rss_mb"],
        "medians": medians,
        "runs": runs,
        "machine": machine(),
    }
    write_json(out, found, force=True)
    print(json.dumps({key: found[key] for key in ("time_ratio", "memory_ratio", "medians")}, indent=2))


@app.command(hidden=True)
def once(guard: str, kind: str, prompts: int, tokens: int) -> None:
    """One measurement in this process."""
    chat = load_model(MODEL)
    rows = load_prompts("builtin:harmful", split="train", limit=prompts)
    started = time.perf_counter()
    answers = [answer for answer in respond(chat, rows, max_new_tokens=tokens) if answer.token_ids]
    generation = time.perf_counter() - started
    started = time.perf_counter()
    if kind == "guard":
        cases, table, _ = judged_cases(chat, load_guard(guard), answers)
        judging, started = time.perf_counter() - started, time.perf_counter()
        esi_scores(chat, GuardObjective(table), cases, tokens_per_batch=512)
    else:
        turns = [Turn(chat.prompt_ids(a.prompt.prompt), a.token_ids) for a in answers]
        judging = 0.0
        esi_scores(chat, refusal_likelihood, [RefusalCase(turn) for turn in turns], tokens_per_batch=512)
    scoring = time.perf_counter() - started
    print(json.dumps({"generation": generation, "judging": judging, "scoring": scoring, "peak_rss_mb": peak_rss_mb()}))


@app.command(name="set")
def set_from_masks(
    guard: Annotated[str, typer.Argument(help="Guard folder or hub id.")],
    out: Annotated[Path, typer.Option(help="Where the rows go.")] = Path("guard-set.json"),
    data: Annotated[Path | None, typer.Option(help="Folder with harmbench.jsonl, for more ASR prompts.")] = None,
    shares: str = "0.001,0.0001",
    seeds: int = 3,
    iterations: int = 100,
    eval_prompts: int = 64,
    answer_tokens: int = 64,
) -> None:
    """SET from masks of the judge-guided score, of the likelihood of refusing, and of random weights."""
    budgets = [float(share) for share in shares.split(",")]
    found = read_json(out, what="rows of an earlier run") if out.exists() else {"rows": [], "overlap": []}
    done = {(row["score"], row["share"], row["seed"]) for row in found["rows"]}
    chat = load_model(MODEL)
    base = weights_digest(chat.model)
    names = ("harmful", "harmless", "borderline")
    sets = {name: load_prompts(f"builtin:{name}", split="eval", limit=eval_prompts) for name in names}
    bench = load_prompts(str(data / "harmbench.jsonl"), limit=eval_prompts) if data else []
    groups = None
    with shown():
        for seed in range(seeds):
            if all((kind, s, seed) in done for kind in ("guard", "refusal", "random") for s in budgets):
                continue
            scores = scores_of(chat, guard, seed, answer_tokens)
            for share in budgets:
                masks = {
                    "guard": choose(scores["guard"], share=share),
                    "refusal": choose(scores["refusal"], share=share),
                    "random": choose(scores["refusal"], share=share, rule="random", seed=seed),
                }
                add_overlap(found["overlap"], masks, share, seed)
                for kind, mask in masks.items():
                    if (kind, share, seed) in done:
                        continue
                    groups = groups or safety_mixture(
                        chat, *(load_prompts(f"builtin:{n}", split="train") for n in names)
                    )
                    old = chosen_values(chat.model, mask)
                    steps = tune(chat, groups, train_only=mask, recipe=Recipe(iterations=iterations, seed=seed))
                    result = evaluate(chat, sets)
                    row: dict[str, Any] = {"score": kind, "share": share, "seed": seed, "weights": len(mask)}
                    row |= {name: rate.to_json() for name, rate in result.rates().items()}
                    if bench:
                        row["harmbench_asr"] = evaluate(chat, {"harmful": bench}).rates()["asr"].to_json()
                    row |= {"harmless_ppl": result.harmless_ppl, "seconds": sum(step.seconds for step in steps)}
                    make_patch(chat.model, mask, old, base_sha256=base, about={"model": {}}).revert(chat.model)
                    found["rows"].append(row)
                    found |= {"iterations": iterations, "guard": guard_record(guard), "machine": machine()}
                    write_json(out, found, force=True)
                    print(kind, share, seed, rate_of(row["asr"]), rate_of(row["borderline_refusal"]), file=sys.stderr)
    print(table(found))


def scores_of(chat: ChatModel, guard: str, seed: int, answer_tokens: int) -> dict[str, Scores]:
    """Both scores over the same 64 prompts, which the seed draws."""
    prompts = load_prompts("builtin:harmful", split="train", limit=64, seed=seed)
    answers = respond(chat, prompts, max_new_tokens=answer_tokens)
    cases, guard_table, _ = judged_cases(chat, load_guard(guard), answers)
    options: dict[str, Any] = {"tokens_per_batch": 512, "source": {"seed": seed}}
    return {
        "guard": esi_scores(chat, GuardObjective(guard_table, seed=seed), cases, **options),
        "refusal": esi_scores(chat, refusal_likelihood, refusal_cases(chat, prompts), **options),
    }


def add_overlap(rows: list[dict[str, Any]], masks: dict[str, Mask], share: float, seed: int) -> None:
    """Jaccard overlap of every pair of masks."""
    if any(row["share"] == share and row["seed"] == seed for row in rows):
        return
    kinds = list(masks)
    pairs = [(a, b) for at, a in enumerate(kinds) for b in kinds[at + 1 :]]
    rows.append({"share": share, "seed": seed} | {f"{a}/{b}": jaccard(masks[a], masks[b]) for a, b in pairs})


def jaccard(one: Mask, other: Mask) -> float:
    """Weights in both masks over weights in either."""
    both = sum(
        int(torch.isin(positions, other.indices[name]).sum())
        for name, positions in one.indices.items()
        if name in other.indices
    )
    return both / (len(one) + len(other) - both)


def guard_record(guard: str) -> Any:
    """The guard's own record, where it is a folder that has one."""
    file = Path(guard) / "guard.json"
    return read_json(file, what="a guard's record") if file.exists() else guard


def rate_of(rate: dict[str, Any]) -> str:
    """A rate in words."""
    return str(Rate(rate["hits"], rate["judged"], rate["unscored"]))


def table(found: dict[str, Any]) -> str:
    """The rows as a Markdown table, the seeds of a cell together."""
    kinds, shares = ("guard", "refusal", "random"), sorted({row["share"] for row in found["rows"]}, reverse=True)
    columns = {"asr": "ASR", "harmbench_asr": "ASR, HarmBench", "over_refusal": "harmless refused"}
    columns |= {"borderline_refusal": "borderline refused"}
    lines = [
        "| weights | score | " + " | ".join(columns.values()) + " | perplexity |",
        "|---" * (len(columns) + 3) + "|",
    ]
    for share in shares:
        for kind in kinds:
            rows = [row for row in found["rows"] if row["share"] == share and row["score"] == kind]
            if not rows:
                continue
            cells = []
            for name in columns:
                rates = [row[name] for row in rows if name in row]
                pooled = Rate(sum(r["hits"] for r in rates), sum(r["judged"] for r in rates))
                each = ", ".join(f"{r['rate']:.0%}" for r in rates)
                low, high = pooled.interval
                cells.append(f"{pooled.rate:.0%} [{low:.0%}, {high:.0%}] ({each})" if rates else "-")
            perplexity = statistics.mean(row["harmless_ppl"] for row in rows)
            lines.append(f"| {share:.2%} | {kind} | " + " | ".join(cells) + f" | {perplexity:.2f} |")
    for row in found["overlap"]:
        pairs = ", ".join(f"{key} {value:.3f}" for key, value in row.items() if "/" in key)
        lines.append(f"\nJaccard at {row['share']:.2%}, seed {row['seed']}: {pairs}")
    return "\n".join(lines)


if __name__ == "__main__":
    app()
