"""What tuning trains on: refusals to learn, and the model's own answers to keep."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from keelweight.errors import UserError
from keelweight.inputs.models import ChatModel
from keelweight.inputs.prompts import Prompt
from keelweight.inputs.responses import Response, respond
from keelweight.objectives.teacher_forcing import Turn, answer_logits, batch_positions
from keelweight.progress import track

PER_BATCH = (2, 4, 4)
"""Harmful, harmless and borderline examples in a batch."""
KEEP_TOKENS = 16
"""Length of the model's own answers that tuning is to keep."""


@dataclass(frozen=True)
class Prediction:
    """What the untuned model predicts at every token of an answer: its most likely tokens.

    Attributes:
        token_ids: (answer tokens, top), int64.
        log_probabilities: (answer tokens, top), fp32; what is missing to 1 is the rest of the vocabulary.
    """

    token_ids: Int[Tensor, "tokens top"]
    log_probabilities: Float[Tensor, "tokens top"]


@dataclass(frozen=True)
class Example:
    """An answer to train on: to learn it, or, with a prediction, to keep what the model already says there."""

    turn: Turn
    keep: Prediction | None = None

    @property
    def tokens(self) -> int:
        """Prompt and answer together."""
        return self.turn.tokens


@dataclass(frozen=True)
class Group:
    """Examples of one kind, and how many of them are in every batch."""

    name: str
    examples: Sequence[Example]
    per_batch: int

    def at(self, step: int, seed: int) -> list[Example]:
        """The examples of batch `step` (from 0): every epoch in another order, a function of seed and step alone."""
        chosen = []
        for number in range(step * self.per_batch, (step + 1) * self.per_batch):
            epoch, place = divmod(number, len(self.examples))
            order = list(range(len(self.examples)))
            random.Random(f"{seed}/{self.name}/{epoch}").shuffle(order)
            chosen.append(self.examples[order[place]])
        return chosen


def refusal_examples(chat: ChatModel, prompts: Sequence[Prompt]) -> list[Example]:
    """Harmful prompts with the refusals that go with them.

    Raises:
        UserError: a prompt has no refusal.
    """
    for prompt in prompts:
        if not prompt.response:
            raise UserError(f"prompt {prompt.id!r} has no refusal to learn. Expected one in the field 'response'.")
    return [Example(Turn(chat.prompt_ids(p.prompt), chat.answer_ids(p.response))) for p in prompts]


@torch.no_grad()
def own_answer_examples(
    chat: ChatModel, answers: Sequence[Response], *, top: int = 64, tokens_per_batch: int = 1024
) -> list[Example]:
    """The model's own answers with what it predicts at each of their tokens. Made before tuning starts.

    Args:
        chat: the untuned model that gave the answers.
        answers: its answers; empty ones are left out, since there is nothing to keep.
        top: how many tokens of the prediction to keep.
        tokens_per_batch: padded tokens in a batch.
    """
    turns = [turn for turn in map(lambda answer: own_turn(chat, answer), answers) if turn is not None]
    kept: dict[int, Prediction] = {}
    cut = batch_positions(turns, tokens=tokens_per_batch)
    for batch in track(cut, "Recording own predictions", len(cut)):
        result = answer_logits(chat.model, [turns[at] for at in batch])
        best = F.log_softmax(result.logits.float(), dim=-1).topk(top, dim=-1)
        for row, at in enumerate(batch):
            of = result.turn == row
            kept[at] = Prediction(best.indices[of].cpu(), best.values[of].cpu())
    return [Example(turn, kept[number]) for number, turn in enumerate(turns)]


def own_turn(chat: ChatModel, answer: Response) -> Turn | None:
    """A model's answer as a turn, with its end where it ended; None if it is empty."""
    if not answer.token_ids:
        return None
    end = chat.end_of_turn if answer.finished else ()
    return Turn(chat.prompt_ids(answer.prompt.prompt), answer.token_ids + end)


def kl_from(prediction: Prediction, logits: Float[Tensor, "tokens vocabulary"]) -> Float[Tensor, " tokens"]:
    """KL(prediction || model) at every token, in nats, the vocabulary beyond the kept tokens taken as one event.

    A lower bound of the full divergence, zero where the two agree on every kept token.
    """
    device = logits.device
    old = prediction.log_probabilities.to(device)
    new = F.log_softmax(logits.float(), dim=-1).gather(-1, prediction.token_ids.to(device))
    kept = (old.exp() * (old - new)).sum(-1)
    old_rest = (1 - old.exp().sum(-1)).clamp_min(1e-6)
    new_rest = (1 - new.exp().sum(-1)).clamp_min(1e-6)
    return kept + old_rest * (old_rest.log() - new_rest.log())


def safety_mixture(
    chat: ChatModel,
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    borderline: Sequence[Prompt],
    *,
    per_batch: tuple[int, int, int] = PER_BATCH,
    max_new_tokens: int = KEEP_TOKENS,
    batch_size: int = 32,
) -> list[Group]:
    """The groups of Safety Enhancement Tuning: refusals to learn, and the model's own behaviour to keep.

    Refusals alone teach a model to refuse everything (docs/method.md), so every batch also holds harmless and
    borderline prompts with the answers the model gives them now, before tuning.

    Args:
        chat: the untuned model; it answers the harmless and borderline prompts.
        harmful: prompts with refusals.
        harmless, borderline: prompts it should go on answering; either may be empty if its share of a batch is 0.
        per_batch: how many of each kind a batch holds.
        max_new_tokens: length of the answers to keep.
        batch_size: prompts answered together.
    """
    groups = [Group("harmful", refusal_examples(chat, harmful), per_batch[0])]
    for name, prompts, count in zip(("harmless", "borderline"), (harmless, borderline), per_batch[1:], strict=True):
        answers: list[Response] = []
        if count:
            what = f"Answering {name} (to keep)"
            answers = respond(chat, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, what=what)
        groups.append(Group(name, own_answer_examples(chat, answers), count))
    return groups
