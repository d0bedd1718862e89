"""The training loop of Safety Enhancement Tuning."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import get_cosine_schedule_with_warmup

from keelweight.errors import UserError
from keelweight.files import read_tensors, write_tensors
from keelweight.inputs.models import ChatModel
from keelweight.interrupts import interruptible
from keelweight.objectives.teacher_forcing import answer_logits, batches, mean_by_turn
from keelweight.progress import track
from keelweight.selection.mask import Mask
from keelweight.tuning.data import Example, Group, kl_from
from keelweight.tuning.safe_adamw import SafeAdamW

CHECKPOINT = "tuning checkpoint"


@dataclass(frozen=True)
class Step:
    """What one iteration did: losses are means over its examples, lr and gradient norm those of its update."""

    step: int
    loss: float
    refusal_loss: float
    keep_loss: float
    lr: float
    grad_norm: float
    seconds: float


@dataclass(frozen=True)
class Recipe:
    """Settings of a tuning run.

    Attributes:
        iterations: optimizer steps.
        lr: peak learning rate; cosine decay to 0 after the warm-up.
        warmup: share of the iterations with rising learning rate.
        weight_decay: decoupled, as in AdamW.
        clip: largest norm of the gradient of the chosen weights.
        keep_weight: weight of the divergence from the untuned model's predictions, beside 1 for a refusal.
        seed: order of the examples.
        tokens_per_pass: padded tokens in one forward and backward pass; a batch takes as many as it needs.
    """

    iterations: int = 100
    lr: float = 2e-3
    warmup: float = 0.03
    weight_decay: float = 0.0
    clip: float = 1.0
    keep_weight: float = 4.0
    seed: int = 0
    tokens_per_pass: int = 512


def tune(
    chat: ChatModel,
    groups: Sequence[Group],
    *,
    train_only: Mask,
    recipe: Recipe = Recipe(),
    transfer: bool = False,
    checkpoint: Path | None = None,
    on_step: Callable[[Step], None] = lambda step: None,
) -> list[Step]:
    """Safety Enhancement Tuning: train the weights of `train_only` in place, and no other bit.

    Args:
        chat: the model; its weights change.
        groups: what every batch is made of.
        train_only: the weights to train.
        recipe: settings.
        transfer: allow a mask that was made from other weights of the same shapes.
        checkpoint: where an interrupt (Ctrl-C) leaves the state. If a checkpoint of the same run lies there, the
            run goes on from it and ends in the same weights as without the interrupt.
        on_step: called after every iteration.

    Returns:
        One record for each iteration, those before an interrupt included.

    Raises:
        UserError: the mask does not fit, no examples, a loss that is not finite, a checkpoint of another run.
        KeyboardInterrupt: passed on when the state is saved.
    """
    empty = [group.name for group in groups if group.per_batch and not group.examples]
    if empty or not any(group.per_batch for group in groups):
        raise UserError(f"no examples to train on in: {', '.join(empty) or 'any group'}.")
    train_only.check(chat.model, transfer=transfer)
    run = {"recipe": asdict(recipe), "mask": dict(train_only.source), "groups": describe_groups(groups)}
    weights = dict(chat.model.named_parameters())
    history: list[Step] = []
    for name, weight in weights.items():
        weight.requires_grad_(name in train_only.indices)
    with SafeAdamW(
        weights.items(),
        train_only=train_only,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        keep_grads=False,
    ) as optimizer:
        schedule = get_cosine_schedule_with_warmup(
            optimizer, round(recipe.warmup * recipe.iterations), recipe.iterations
        )
        if checkpoint is not None and checkpoint.exists():
            history = load_checkpoint(checkpoint, run, optimizer, schedule)
        try:
            with interruptible() as interrupt:
                left = range(len(history), recipe.iterations)
                for number in track(left, "Tuning", len(left)):
                    done = one_step(chat.model, groups, number, recipe, optimizer)
                    schedule.step()
                    history.append(done)
                    on_step(done)
                    interrupt()
        except KeyboardInterrupt:
            if checkpoint is not None:
                save_checkpoint(checkpoint, run, optimizer, schedule, history)
            raise
        finally:
            chat.model.requires_grad_(False)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return history


def one_step(model: Any, groups: Sequence[Group], number: int, recipe: Recipe, optimizer: SafeAdamW) -> Step:
    """Iteration `number`: gradients of the whole batch, clipped, then one optimizer step."""
    started = time.perf_counter()
    examples = [example for group in groups for example in group.at(number, recipe.seed)]
    refusals = [example for example in examples if example.keep is None]
    kept = [example for example in examples if example.keep is not None]
    optimizer.zero_grad()
    sums = {"refusal": 0.0, "keep": 0.0}
    # The whole batch is the mean over its refusals plus the weighted mean over what is kept.
    for part in batches(examples, tokens=recipe.tokens_per_pass):
        losses = example_losses(model, part)
        learn = [loss for example, loss in zip(part, losses, strict=True) if example.keep is None]
        keep = [loss for example, loss in zip(part, losses, strict=True) if example.keep is not None]
        refusal = torch.stack(learn).sum() / len(refusals) if learn else losses.new_zeros(())
        drift = torch.stack(keep).sum() / len(kept) if keep else losses.new_zeros(())
        (refusal + recipe.keep_weight * drift).backward()
        sums["refusal"] += refusal.item()
        sums["keep"] += drift.item()
    loss = sums["refusal"] + recipe.keep_weight * sums["keep"]
    norm = float(optimizer.clip_grad_norm_(recipe.clip))
    if not (torch.isfinite(torch.tensor([loss, norm])).all()):
        raise UserError(
            f"iteration {number + 1}: the loss is {loss} and its gradient norm {norm}. "
            "Lower the learning rate (--lr), or use --dtype float32."
        )
    lr = float(optimizer.param_groups[0]["lr"])
    optimizer.step()
    return Step(number + 1, loss, sums["refusal"], sums["keep"], lr, norm, time.perf_counter() - started)


def example_losses(model: Any, examples: Sequence[Example]) -> Tensor:
    """Loss of each example, (n,), nats per answer token: cross-entropy of a refusal, KL of what is to be kept."""
    answers = answer_logits(model, [example.turn for example in examples])
    by_token = []
    for row, example in enumerate(examples):
        of = answers.turn == row
        logits = answers.logits[of]
        if example.keep is None:
            by_token.append(F.cross_entropy(logits.float(), answers.targets[of], reduction="none"))
        else:
            by_token.append(kl_from(example.keep, logits))
    return mean_by_turn(torch.cat(by_token), answers.turn, len(examples))


def describe_groups(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """What a checkpoint must agree on to go on with these groups."""
    return [
        {
            "name": g.name,
            "per_batch": g.per_batch,
            "examples": len(g.examples),
            "tokens": sum(e.tokens for e in g.examples),
        }
        for g in groups
    ]


def save_checkpoint(
    path: Path, run: dict[str, Any], optimizer: SafeAdamW, schedule: Any, history: Sequence[Step]
) -> None:
    """Write optimizer state, masters, schedule and history as one safetensors file."""
    state = optimizer.state_dict()
    tensors = {f"master.{at}": master for at, master in enumerate(state["masters"])}
    for at, moments in state["state"].items():
        tensors |= {f"state.{at}.{key}": value for key, value in moments.items()}
    about = {
        "run": run,
        "history": [asdict(step) for step in history],
        "groups": state["param_groups"],
        "schedule": {key: value for key, value in schedule.state_dict().items() if key != "lr_lambdas"},
    }
    write_tensors(path, tensors, kind=CHECKPOINT, about=about, force=True)


def load_checkpoint(path: Path, run: dict[str, Any], optimizer: SafeAdamW, schedule: Any) -> list[Step]:
    """Put the state in `path` into optimizer, model and schedule; returns the iterations that are done.

    Raises:
        UserError: the checkpoint is of a run with other settings.
    """
    tensors, about = read_tensors(path, kind=CHECKPOINT)
    here = json.loads(json.dumps(run))
    different = [key for key in here if here[key] != about["run"].get(key)]
    if different:
        raise UserError(
            f"{path}: left by a run with another {' and '.join(different)}. "
            "Run that command again to finish it, or delete the file to start anew."
        )
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("state."):
            _, at, key = name.split(".")
            state.setdefault(int(at), {})[key] = tensor
    masters = [tensors[f"master.{at}"] for at in range(len(optimizer.masters))]
    optimizer.load_state_dict({"state": state, "param_groups": about["groups"], "masters": masters})
    schedule.load_state_dict(about["schedule"] | {"lr_lambdas": [None]})
    return [Step(**step) for step in about["history"]]
