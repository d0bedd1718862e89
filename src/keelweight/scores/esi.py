"""Expected Safety Impact of every weight."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from statistics import stdev
from typing import Any, Literal

from torch import Tensor

from keelweight.inputs.layouts import SCORED_ROLES, slices
from keelweight.inputs.models import ChatModel, weights_digest
from keelweight.objectives.teacher_forcing import Sized
from keelweight.scores.gradients import GradientMeter, Objective, measure_gradients
from keelweight.scores.store import Scores

Sigma = Literal["slice", "tensor"]
Reduction = Literal["signed", "absolute"]


def esi(mean_gradient: Tensor, among: Tensor) -> Tensor:
    """|mean gradient| * std(among): fp32, shape of `mean_gradient`, in units of the objective.

    `among` are the weights whose spread says how far tuning moves one of them.
    Source: arXiv 2604.08297, `ESI_i = sigma(W) * |dS/d theta_i|`; docs/method.md, "ESI". The standard deviation
    is the unbiased one, in fp32. One weight alone has no spread: its ESI is 0.
    """
    spread = among.float().std() if among.numel() > 1 else 0.0
    return mean_gradient.float().abs() * spread


def esi_scores(
    chat: ChatModel,
    objective: Objective[Any],
    cases: Sequence[Sized],
    *,
    sigma: Sigma = "slice",
    reduction: Reduction = "signed",
    roles: Collection[str] = SCORED_ROLES,
    tokens_per_batch: int = 1024,
    meter: GradientMeter | None = None,
    on_interrupt: Callable[[GradientMeter], None] = lambda meter: None,
    source: dict[str, Any] | None = None,
) -> Scores:
    """ESI of every weight of a scored role.

    Args:
        chat: the model to score; unchanged afterwards.
        objective: S, such as `refusal_likelihood`.
        cases: the prompts S is averaged over, in the form the objective takes.
        sigma: spread over the weights of one role in one layer ("slice": the V rows of a fused QKV, one expert),
            or over the whole tensor as in the paper ("tensor"). The same thing where a role has its own matrix.
        reduction: |mean over prompts of the gradient| ("signed", the paper's), or the mean of |gradient|.
        roles: which roles are candidates.
        tokens_per_batch: padded tokens in a batch: changes time and memory, not the scores.
        meter: sums of an interrupted run.
        on_interrupt: see `measure_gradients`.
        source: what else to record of where the scores come from.

    Raises:
        UnknownLayout: a parameter's role is not known.
        UserError: nothing to score, no cases.
    """
    layout = tuple(piece for piece in slices(chat.model) if piece.role in roles)
    weights = {name: weight for name, weight in chat.model.named_parameters() if name in {p.parameter for p in layout}}
    meter = measure_gradients(
        chat.model,
        objective,
        cases,
        weights,
        absolute=reduction == "absolute",
        tokens_per_batch=tokens_per_batch,
        meter=meter,
        on_interrupt=on_interrupt,
    )
    prompts = len(meter.values)
    values = {name: total.div_(prompts) for name, total in meter.sums.items()}
    for piece in layout:
        weight = weights[piece.parameter].detach()
        part = piece.region.of(values[piece.parameter])
        part.copy_(esi(part, weight if sigma == "tensor" else piece.region.of(weight)))
    about = {
        "model": dict(chat.source),
        "weights_sha256": weights_digest(chat.model),
        "parameters": sum(p.numel() for p in chat.model.parameters()),
        "score": "esi",
        "sigma": sigma,
        "reduction": reduction,
        "prompts": prompts,
        "objective_mean": sum(meter.values) / prompts,
        "objective_spread": stdev(meter.values) if prompts > 1 else 0.0,
        **(source or {}),
    }
    return Scores(values, layout, about)
