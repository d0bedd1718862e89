"""The gradient of an objective, summed over prompts, one parameter at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from keelweight.errors import UserError
from keelweight.files import read_tensors, write_tensors
from keelweight.interrupts import interruptible
from keelweight.objectives.teacher_forcing import Sized, batches
from keelweight.progress import track

PARTIAL = "partial scores"
Case = TypeVar("Case", bound=Sized)
Contra = TypeVar("Contra", bound=Sized, contravariant=True)


class Objective(Protocol[Contra]):
    """S of each case as a differentiable function of the model's weights. Higher is safer."""

    def __call__(self, model: Any, cases: Sequence[Contra]) -> Tensor:
        """S, shape (len(cases),)."""
        ...


@contextmanager
def gradients_to(weights: Mapping[str, nn.Parameter], take: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside the block, every gradient goes to `take(name, gradient)` as soon as it exists, and is freed.

    Only `weights` require a gradient meanwhile; the rest of `model` must not. At no time do two gradients of the
    size of a weight live longer than the backward pass needs them.
    """

    def hook(name: str) -> Callable[[Tensor], None]:
        def taken(weight: Tensor) -> None:
            assert weight.grad is not None
            take(name, weight.grad)
            weight.grad = None

        return taken

    handles = []
    before = {name: weight.requires_grad for name, weight in weights.items()}
    try:
        for name, weight in weights.items():
            weight.requires_grad_(True)
            handles.append(weight.register_post_accumulate_grad_hook(hook(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, weight in weights.items():
            weight.requires_grad_(before[name])
            weight.grad = None


class GradientMeter:
    """Running sums over prompts: fp32 whatever the model's dtype, so the batch size cannot matter.

    Attributes:
        sums: per parameter, the sum over prompts of the gradient (or of its absolute value), shape of the weight.
        values: S of each case so far, in the order they were met.
        batches_done: how many batches are in the sums.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        self.sums = {name: torch.zeros_like(w, dtype=torch.float32) for name, w in weights.items()}
        self.values: list[float] = []
        self.batches_done = 0


def measure_gradients(
    model: nn.Module,
    objective: Objective[Case],
    cases: Iterable[Case],
    weights: Mapping[str, nn.Parameter],
    *,
    absolute: bool = False,
    tokens_per_batch: int = 1024,
    meter: GradientMeter | None = None,
    on_interrupt: Callable[[GradientMeter], None] = lambda meter: None,
) -> GradientMeter:
    """Sum over `cases` of dS/dw for every weight w.

    Args:
        model: in eval mode; the weights' `requires_grad` is given back at the end.
        objective: S of each case.
        cases: what S is measured on.
        weights: name -> parameter to take the gradient of.
        absolute: sum |gradient| of each case alone instead of the signed gradient; one case a batch.
        tokens_per_batch: padded size of a batch.
        meter: sums of an interrupted run over the same cases: batches already in it are skipped.
        on_interrupt: called with the sums of whole batches when Ctrl-C ends the work, to save them.

    Raises:
        UserError: there is nothing to score.
        KeyboardInterrupt: after a whole batch.
    """
    if not weights:
        raise UserError("no weights to score: the model has none of a scored role, or the filter leaves none.")
    cut = batches(cases, tokens=tokens_per_batch, size=1 if absolute else None)
    if not cut:
        raise UserError("no prompts to score with. Expected at least one.")
    meter = meter or GradientMeter(weights)

    def take(name: str, gradient: Tensor) -> None:
        meter.sums[name].add_(gradient.abs() if absolute else gradient)

    remaining = cut[meter.batches_done :]
    frozen = [p for p in model.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        with gradients_to(weights, take), interruptible() as interrupt:
            for batch in track(remaining, "Scoring", len(remaining)):
                values = objective(model, batch)
                values.sum().backward()
                meter.values += values.tolist()
                meter.batches_done += 1
                interrupt()
    except KeyboardInterrupt:
        on_interrupt(meter)
        raise
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    return meter


def save_meter(path: Path, meter: GradientMeter, run: Mapping[str, Any]) -> None:
    """Keep the sums of interrupted work; `run` says what it was."""
    about = {"run": dict(run), "values": meter.values, "batches_done": meter.batches_done}
    write_tensors(path, meter.sums, kind=PARTIAL, about=about, force=True)


def load_meter(path: Path, run: Mapping[str, Any]) -> GradientMeter | None:
    """The sums that `save_meter` left for the same run; None if there are none, or of another run."""
    if not path.exists():
        return None
    sums, about = read_tensors(path, kind=PARTIAL)
    if about["run"] != json.loads(json.dumps(dict(run))):
        return None
    meter = GradientMeter({})
    meter.sums, meter.values, meter.batches_done = sums, about["values"], about["batches_done"]
    return meter
