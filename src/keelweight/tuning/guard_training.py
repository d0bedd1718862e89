"""Guards made on the user's machine: a classifier or a causal model that learns to judge answers."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import get_linear_schedule_with_warmup

from keelweight.errors import UserError
from keelweight.evaluation.judges import Judge, refusal_phrase_judge
from keelweight.evaluation.rates import Rate
from keelweight.files import writing
from keelweight.inputs.guard_formats import PAIR_CLASSIFIER, GuardFormat
from keelweight.inputs.guards import DECLARATION, Guard, Reading, Unreadable, assemble
from keelweight.inputs.models import ChatModel, _locate, _quiet, machine_device, machine_dtype
from keelweight.inputs.prompts import Prompt, load_prompts, read_rows
from keelweight.inputs.responses import respond
from keelweight.interrupts import interruptible
from keelweight.objectives.teacher_forcing import batch_positions
from keelweight.progress import track

CAUSAL = GuardFormat(
    "verdict",
    template="Request: {{ prompt }}\nAnswer: {{ response }}\nVerdict:",
    safe=" safe",
    unsafe=" unsafe",
    source="keelweight guard train",
)
"""How a causal guard trained here is asked: plain text, so that the base needs no chat template."""

LABELS = ("unsafe", "safe")


@dataclass(frozen=True)
class LabelledAnswer:
    """An answer and whether it is safe; `kind` groups answers in the figures."""

    prompt: str
    response: str
    safe: bool
    kind: str = ""


@dataclass(frozen=True)
class GuardRecipe:
    """Settings of a guard's training.

    Attributes:
        epochs: passes over the examples.
        lr: peak learning rate of AdamW; a tenth of the run warms up, then it falls to 0.
        batch_size: examples in a step.
        weight_decay: decoupled, as in AdamW.
        seed: of the head and of the order.
        tokens_per_pass: padded tokens in one forward and backward pass.
    """

    epochs: int = 3
    lr: float = 5e-5
    batch_size: int = 16
    weight_decay: float = 0.01
    seed: int = 0
    tokens_per_pass: int = 2048


def own_examples(
    chat: ChatModel,
    *,
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    borderline: Sequence[Prompt] = (),
    judge: Judge = refusal_phrase_judge,
    max_new_tokens: int = 40,
    batch_size: int = 32,
) -> tuple[list[LabelledAnswer], Counter[str]]:
    """Examples from an unaligned model, made here and kept in memory alone.

    Safe: the refusals that come with the harmful prompts, and the model's answers to harmless and borderline ones.
    Unsafe: the model's own answers to harmful prompts that `judge` does not take for refusals.

    Returns:
        The examples, and how many answers were left out, by reason.

    Raises:
        UserError: a harmful prompt without a refusal.
    """
    examples, skipped = [], Counter[str]()
    for prompt in harmful:
        if not prompt.response:
            raise UserError(f"prompt {prompt.id!r} has no refusal. Expected one in the field 'response'.")
        examples.append(LabelledAnswer(prompt.prompt, prompt.response, True, "refusal"))
    for name, prompts in {"harmful": harmful, "harmless": harmless, "borderline": borderline}.items():
        kind = f"{name} answer"
        options: Any = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "what": f"Answering {name}"}
        for answer in respond(chat, prompts, **options) if prompts else ():
            verdict = judge(answer.prompt.prompt, answer.text)
            if verdict.complied:
                examples.append(LabelledAnswer(answer.prompt.prompt, answer.text, name != "harmful", kind))
            else:
                skipped[f"{kind}: {verdict.reason or 'a refusal'}"] += 1
    return examples, skipped


def builtin_examples(
    chat: ChatModel, split: str, *, limit: int | None = None, seed: int = 0, max_new_tokens: int = 40
) -> tuple[list[LabelledAnswer], Counter[str]]:
    """`own_examples` of the built-in prompts of a split ("train", "eval"), `limit` of each kind."""
    harmful, harmless, borderline = (
        load_prompts(f"builtin:{name}", split=split, limit=limit, seed=seed)
        for name in ("harmful", "harmless", "borderline")
    )
    return own_examples(chat, harmful=harmful, harmless=harmless, borderline=borderline, max_new_tokens=max_new_tokens)


def read_examples(
    source: str, *, held_out: float = 0.2, seed: int = 0
) -> tuple[list[LabelledAnswer], list[LabelledAnswer]]:
    """Labelled answers of a user's own policy, to train on and held out.

    Args:
        source: a .jsonl or .csv file with the fields prompt, response and label (safe or unsafe), and maybe kind
            and split ("eval" is held out).
        held_out: share of the requests to hold out, each with all its answers, if the file has no split.
        seed: which.

    Raises:
        UserError: a malformed row (with its line number), or only one label.
    """
    rows: list[tuple[LabelledAnswer, str]] = []
    for where, row in read_rows(source):
        prompt, response = row.get("prompt"), row.get("response")
        if not (isinstance(prompt, str) and prompt.strip() and isinstance(response, str) and response.strip()):
            raise UserError(f"{where}: expected text in the fields 'prompt' and 'response', the row has {list(row)}.")
        if row.get("label") not in LABELS:
            raise UserError(f"{where}: expected safe or unsafe in the field 'label', found {row.get('label')!r}.")
        made = LabelledAnswer(prompt, response, row["label"] == "safe", str(row.get("kind") or row["label"]))
        rows.append((made, str(row.get("split") or "")))
    if not any(split for _, split in rows):
        requests = sorted({example.prompt for example, _ in rows})
        out = set(random.Random(seed).sample(requests, round(held_out * len(requests))))
        rows = [(example, "eval" if example.prompt in out else "train") for example, _ in rows]
    parts = [e for e, split in rows if split != "eval"], [e for e, split in rows if split == "eval"]
    for part, name in zip(parts, ("train", "held-out"), strict=True):
        if {example.safe for example in part} != {True, False}:
            raise UserError(f"{source}: the {name} part needs safe and unsafe answers, {len(part)} rows are in it.")
    return parts


def new_guard(base: str, *, kind: str | None = None, device: str = "auto", seed: int = 0) -> Guard:
    """An untrained guard in float32.

    Args:
        base: folder, hub id, builtin:minilm or builtin:smollm2.
        kind: "causal" or "classifier" (a head on top is drawn with `seed`); None: what the base is.
        device: a torch device, or "auto".

    Raises:
        UserError: the base cannot be loaded, or has no fast tokenizer.
    """
    where = _locate(base)
    try:
        with _quiet():
            config = transformers.AutoConfig.from_pretrained(where)
            tokenizer = transformers.AutoTokenizer.from_pretrained(where)
            causal = any("CausalLM" in name for name in config.architectures or ())
            kind = kind or ("causal" if causal else "classifier")
            options: dict[str, Any] = {"dtype": torch.float32, "use_safetensors": True}
            torch.manual_seed(seed)
            if kind == "causal":
                model = transformers.AutoModelForCausalLM.from_pretrained(where, **options)
            else:
                options |= {"id2label": dict(enumerate(LABELS)), "label2id": {b: a for a, b in enumerate(LABELS)}}
                model = transformers.AutoModelForSequenceClassification.from_pretrained(where, **options)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{base}: cannot be loaded ({' '.join(str(error).split())[:300]}).") from error
    model = model.to(machine_device() if device == "auto" else device)
    format = CAUSAL if kind == "causal" else PAIR_CLASSIFIER
    return assemble(model, tokenizer, format, {"name": base, "dtype": "float32"})


def train_guard(guard: Guard, examples: Sequence[LabelledAnswer], recipe: GuardRecipe = GuardRecipe()) -> list[float]:
    """Train all weights of a guard in place on the log-probability of the right word or label.

    Forward passes run in the machine's dtype, weights and AdamW in float32.

    Returns:
        Mean loss of every step, nats.

    Raises:
        UserError: no readable example of one side, or a loss that is not finite.
    """
    cases = [(reading, example.safe) for reading, example in readings_of(guard, examples) if reading]
    if {safe for _, safe in cases} != {True, False}:
        raise UserError("expected safe and unsafe examples to train a guard on, found one side only.")
    order = random.Random(recipe.seed)
    steps = [batch for _ in range(recipe.epochs) for batch in shuffled(len(cases), recipe.batch_size, order)]
    guard.model.requires_grad_(True)
    optimizer = torch.optim.AdamW(guard.model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    schedule = get_linear_schedule_with_warmup(optimizer, len(steps) // 10, len(steps))
    kind = machine_dtype(str(guard.device))
    losses = []
    try:
        with interruptible() as interrupt:
            for number, batch in enumerate(track(steps, "Training the guard", len(steps)), 1):
                readings = [cases[at][0] for at in batch]
                safe = torch.tensor([cases[at][1] for at in batch])
                total = 0.0
                for part in batch_positions(readings, tokens=recipe.tokens_per_pass):
                    with torch.autocast(guard.device.type, kind, enabled=kind != torch.float32):
                        logits = guard.logits([readings[at] for at in part])
                    right = torch.where(safe[part].to(guard.device), *guard.sides(logits.log_softmax(-1)))
                    loss = -right.sum() / len(batch)
                    loss.backward()
                    total += loss.item()
                if not torch.isfinite(torch.tensor(total)):
                    raise UserError(f"step {number}: the loss is {total}. Lower the learning rate (--lr).")
                torch.nn.utils.clip_grad_norm_(guard.model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                losses.append(total)
                interrupt()
    finally:
        guard.model.requires_grad_(False)
    return losses


@torch.no_grad()
def measure_guard(guard: Guard, examples: Sequence[LabelledAnswer], *, tokens_per_batch: int = 2048) -> dict[str, Any]:
    """How often a guard's verdict, the sign of S, is right.

    Returns:
        `accuracy`; `unsafe_recall`: unsafe answers found; `safe_recall`: safe answers let through; `by_kind`:
        accuracy of each kind. All are `Rate`s, answers that the guard cannot read counted as unscored.
    """
    judge = replace(guard, safe_only=False)
    right: list[bool | None] = [None] * len(examples)
    read = [(at, reading) for at, (reading, _) in enumerate(readings_of(guard, examples)) if reading]
    cut = batch_positions([reading for _, reading in read], tokens=tokens_per_batch)
    for batch in track(cut, "Measuring the guard", len(cut)):
        scores = judge.score([read[at][1] for at in batch]).tolist()
        for at, score in zip(batch, scores, strict=True):
            number = read[at][0]
            right[number] = (score > 0) == examples[number].safe

    def rate(of: Sequence[bool]) -> Rate:
        verdicts = [verdict for verdict, wanted in zip(right, of, strict=True) if wanted]
        return Rate(verdicts.count(True), len(verdicts) - verdicts.count(None), verdicts.count(None))

    kinds = sorted({example.kind for example in examples})
    return {
        "accuracy": rate([True] * len(examples)),
        "unsafe_recall": rate([not example.safe for example in examples]),
        "safe_recall": rate([example.safe for example in examples]),
        "by_kind": {kind: rate([example.kind == kind for example in examples]) for kind in kinds},
    }


def save_guard(guard: Guard, folder: Path, about: Mapping[str, Any], *, force: bool = False) -> None:
    """Write a folder that `load_guard` and plain transformers load; its guard.json says how it is asked.

    Args:
        about: how it was trained and what it reached, kept in guard.json.
    """
    declared = {"format": asdict(guard.format), "training": dict(about)}
    with writing(folder, force=force) as beside, _quiet():
        guard.model.save_pretrained(beside)
        guard.tokenizer.save_pretrained(beside)
        (beside / DECLARATION).write_text(json.dumps(declared, indent=2) + "\n", encoding="utf-8")


def readings_of(guard: Guard, examples: Sequence[LabelledAnswer]) -> list[tuple[Reading | None, LabelledAnswer]]:
    """Each example as the guard reads it; None where it cannot."""
    found: list[tuple[Reading | None, LabelledAnswer]] = []
    for example in examples:
        try:
            found.append((guard.read(example.prompt, example.response), example))
        except Unreadable:
            found.append((None, example))
    return found


def shuffled(count: int, size: int, order: random.Random) -> list[list[int]]:
    """The numbers below `count` in random order, in batches of `size`."""
    numbers = list(range(count))
    order.shuffle(numbers)
    return [numbers[at : at + size] for at in range(0, count, size)]
