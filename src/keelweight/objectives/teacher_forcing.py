"""Run a model over given answers and get its logits for the answer tokens, and for nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class Sized(Protocol):
    """Anything with a cost in tokens, by which batches are made."""

    @property
    def tokens(self) -> int:
        """Length of the longest sequence that the model must read for it."""
        ...


S = TypeVar("S", bound=Sized)


@dataclass(frozen=True)
class Turn:
    """A prompt and an answer as token ids. The answer has at least one token."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Prompt and answer together."""
        return len(self.prompt_ids) + len(self.answer_ids)


@dataclass(frozen=True)
class AnswerLogits:
    """What the model predicts for the answer tokens of a batch, all turns one after another.

    Attributes:
        logits: (answer tokens, vocabulary), in the model's dtype.
        targets: (answer tokens,) the token that stands there, int64.
        turn: (answer tokens,) which turn of the batch it belongs to, int64.
    """

    logits: Float[Tensor, "tokens vocabulary"]
    targets: Int[Tensor, " tokens"]
    turn: Int[Tensor, " tokens"]


def answer_logits(model: Any, turns: Sequence[Turn], *, pad_id: int = 0) -> AnswerLogits:
    """Teacher-force `turns` and return the logits that predict their answer tokens.

    The batch is padded on the right. A causal model cannot see what comes later, so padding and the other turns
    change nothing. The output head runs on answer positions only: a hook hands it those rows, which leaves
    everything the model does around its head (scaling, soft-capping) in place.
    """
    head = model.get_output_embeddings()
    device = model.get_input_embeddings().weight.device
    width = max(turn.tokens for turn in turns)
    ids = torch.full((len(turns), width), pad_id)
    attended = torch.zeros(len(turns), width, dtype=torch.long)
    rows: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    for row, turn in enumerate(turns):
        ids[row, : turn.tokens] = torch.tensor(turn.prompt_ids + turn.answer_ids)
        attended[row, : turn.tokens] = 1
        first = len(turn.prompt_ids) - 1  # the last prompt token predicts the first answer token
        rows += [row] * len(turn.answer_ids)
        columns += range(first, first + len(turn.answer_ids))
        targets += turn.answer_ids
    at = (torch.tensor(rows, device=device), torch.tensor(columns, device=device))

    def answer_rows(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0][at].unsqueeze(0), *inputs[1:])

    handle = head.register_forward_pre_hook(answer_rows)
    try:
        output = model(input_ids=ids.to(device), attention_mask=attended.to(device), use_cache=False)
    finally:
        handle.remove()
    return AnswerLogits(output.logits[0], torch.tensor(targets, device=device), at[0])


def mean_by_turn(values: Float[Tensor, " tokens"], turn: Int[Tensor, " tokens"], turns: int) -> Float[Tensor, " turns"]:
    """Mean of `values` over the tokens of each turn."""
    zeros = values.new_zeros(turns)
    return zeros.index_add(0, turn, values) / zeros.index_add(0, turn, torch.ones_like(values))


def batches(items: Iterable[S], *, tokens: int, size: int | None = None) -> list[list[S]]:
    """Cut `items` into batches of like length: the padded batch holds at most `tokens` tokens, `size` items.

    An item longer than `tokens` gets a batch of its own. The result depends on the items alone.
    """
    listed = list(items)
    return [[listed[at] for at in batch] for batch in batch_positions(listed, tokens=tokens, size=size)]


def batch_positions(items: Sequence[Sized], *, tokens: int, size: int | None = None) -> list[list[int]]:
    """As `batches`, with the items' positions: for results that are wanted in the old order."""
    cut: list[list[int]] = []
    for at in sorted(range(len(items)), key=lambda at: -items[at].tokens):
        last = cut[-1] if cut else None
        if last is None or (len(last) + 1) * items[last[0]].tokens > tokens or (size and len(last) >= size):
            cut.append([at])
        else:
            last.append(at)
    return cut
