"""Turn scores into a mask: top, bottom or random, from the same candidates and with the same budget."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

import torch
from torch import Tensor

from keelweight.errors import UserError
from keelweight.inputs.layouts import Slice
from keelweight.scores.store import Scores
from keelweight.selection.mask import Mask

Rule = Literal["top", "bottom", "random"]
CHUNK = 1 << 24
"""Scores looked at together; bounds the memory beside them."""


def choose(
    scores: Scores,
    *,
    share: float | None = None,
    count: int | None = None,
    rule: Rule = "top",
    roles: Collection[str] | None = None,
    layers: Collection[int] | None = None,
    seed: int = 0,
) -> Mask:
    """Choose weights over all scored tensors together.

    Args:
        scores: the candidates.
        share: of ALL the model's parameters, as in the paper (0 < share <= 1); this or `count`.
        count: how many weights.
        rule: highest scores, lowest scores, or at random whatever the score. Equal scores: first parameter in the
            model's order, then lowest position, so the same scores always give the same mask.
        roles: only weights of these roles.
        layers: only weights of these layers.
        seed: for `random`.

    Raises:
        UserError: a budget of no weights or of more than there are candidates; NaN or infinite scores.
    """
    layout = tuple(
        piece
        for piece in scores.layout
        if (roles is None or piece.role in roles) and (layers is None or piece.layer in layers)
    )
    if not layout:
        known = sorted({piece.role for piece in scores.layout})
        raise UserError(
            f"nothing to choose from: no scored weights of roles {sorted(roles or known)} in layers "
            f"{sorted(layers) if layers is not None else 'any'}. Scored roles are: {', '.join(known)}."
        )
    candidates = {
        name: candidate_positions(scores, layout, name) for name in dict.fromkeys(p.parameter for p in layout)
    }
    available = sum(len(of) if isinstance(of, Tensor) else of for of in candidates.values())
    wanted = budget(share, count, total=int(scores.about["parameters"]), available=available)
    if rule == "random":
        indices = random_positions(candidates, wanted, seed)
    else:
        sign = 1 if rule == "top" else -1
        indices = extreme_positions(scores.values, candidates, wanted, sign)
    about = {key: value for key, value in scores.about.items() if key != "seconds"}
    source = {
        **about,
        "rule": rule,
        "weights": wanted,
        "share": wanted / int(scores.about["parameters"]),
        "roles": sorted(roles) if roles is not None else None,
        "layers": sorted(layers) if layers is not None else None,
        "seed": seed if rule == "random" else None,
    }
    shapes = {name: tuple(scores.values[name].shape) for name in candidates}
    return Mask({name: at for name, at in indices.items() if len(at)}, shapes, layout, source)


def top_k(scores: Scores, share: float) -> Mask:
    """The `share` of all the model's parameters with the highest scores."""
    return choose(scores, share=share)


def budget(share: float | None, count: int | None, *, total: int, available: int) -> int:
    """Number of weights for a share of all parameters, or for a count."""
    if (share is None) == (count is None):
        raise UserError("a budget is either a share of all parameters or a count of weights: give one of them.")
    if share is not None and not 0 < share <= 1:
        raise UserError(f"share {share} is outside its range. Expected more than 0 and at most 1 (0.01 is 1%).")
    wanted = int(share * total) if share is not None else int(count or 0)
    if wanted < 1:
        said = f"share {share} of {total:,} parameters" if share is not None else f"a count of {count}"
        raise UserError(f"{said} is less than one weight. Expected at least {1 / total:.1e}, or a count of 1.")
    if wanted > available:
        raise UserError(
            f"{wanted:,} weights wanted, but only {available:,} of the {total:,} are candidates. "
            f"Expected a share of at most {available / total:.4g}."
        )
    return wanted


def candidate_positions(scores: Scores, layout: tuple[Slice, ...], name: str) -> Tensor | int:
    """Flat positions of a parameter's candidates, ascending; or their number where that is all of the parameter."""
    shape = scores.values[name].shape
    pieces = [piece for piece in layout if piece.parameter == name]
    sizes = sum(piece.region.of(torch.empty(shape, device="meta")).numel() for piece in pieces)
    if sizes == shape.numel():
        return sizes
    inside = torch.zeros(shape, dtype=torch.bool)
    for piece in pieces:
        piece.region.of(inside).fill_(True)
    return inside.view(-1).nonzero().view(-1)


def extreme_positions(
    values: Mapping[str, Tensor], candidates: Mapping[str, Tensor | int], wanted: int, sign: int
) -> dict[str, Tensor]:
    """The `wanted` highest (sign 1) or lowest (sign -1) candidates, exactly, in one pass and without one big copy.

    A pool keeps the best seen so far. Once it holds `wanted`, its lowest score is the bar: what comes later must
    be strictly above it, so ties go to who came first. The pool is cut back when it has doubled.
    """
    names = list(candidates)
    bar = -torch.inf
    scores = torch.empty(0)
    keys = torch.empty((2, 0), dtype=torch.int64)  # parameter number, flat position
    waiting: list[tuple[Tensor, Tensor]] = []
    waiting_size = 0

    def cut_back() -> None:
        nonlocal scores, keys, bar, waiting, waiting_size
        scores = torch.cat([scores, *(s for s, _ in waiting)])
        keys = torch.cat([keys, *(k for _, k in waiting)], dim=1)
        waiting, waiting_size = [], 0
        if len(scores) >= wanted:
            bar = float(scores.kthvalue(len(scores) - wanted + 1).values)
            above = scores > bar
            ties = (scores == bar).nonzero().view(-1)[: wanted - int(above.sum())]
            above[ties] = True
            scores, keys = scores[above], keys[:, above]

    for number, name in enumerate(names):
        flat, of = values[name].view(-1), candidates[name]
        for start in range(0, len(flat), CHUNK):
            chunk = flat[start : start + CHUNK]
            check_finite(name, chunk)
            at = None
            if isinstance(of, Tensor):
                low, high = torch.searchsorted(of, torch.tensor([start, start + len(chunk)]))
                at = of[low:high] - start
                chunk = chunk[at]
            signed = chunk if sign > 0 else -chunk
            better = (signed > bar).nonzero().view(-1) if bar > -torch.inf else torch.arange(len(signed))
            if not len(better):
                continue
            positions = (better if at is None else at[better]) + start
            waiting.append((signed[better], torch.stack([torch.full_like(positions, number), positions])))
            waiting_size += len(better)
            if waiting_size >= wanted:
                cut_back()
    cut_back()
    return {name: keys[1][keys[0] == number] for number, name in enumerate(names)}


def random_positions(candidates: Mapping[str, Tensor | int], wanted: int, seed: int) -> dict[str, Tensor]:
    """`wanted` candidates, each set of them equally likely."""
    sizes = [len(of) if isinstance(of, Tensor) else of for of in candidates.values()]
    drawn = draw(sum(sizes), wanted, seed)
    indices: dict[str, Tensor] = {}
    start = 0
    for (name, of), size in zip(candidates.items(), sizes, strict=True):
        low, high = torch.searchsorted(drawn, torch.tensor([start, start + size]))
        at = drawn[low:high] - start
        indices[name] = of[at] if isinstance(of, Tensor) else at
        start += size
    return indices


def draw(population: int, wanted: int, seed: int) -> Tensor:
    """`wanted` different numbers below `population`, ascending; memory grows with `wanted`, not `population`."""
    if wanted > population // 2:
        left_out = draw(population, population - wanted, seed) if wanted < population else torch.empty(0).long()
        kept = torch.ones(population, dtype=torch.bool)
        kept[left_out] = False
        return kept.nonzero().view(-1)
    rng = torch.Generator().manual_seed(seed)
    drawn = torch.empty(0, dtype=torch.int64)
    while len(drawn) < wanted:  # new numbers come after the old ones, so cutting the tail is fair
        more = torch.randint(population, (2 * (wanted - len(drawn)) + 16,), generator=rng)
        drawn = in_first_order(torch.cat([drawn, more]))
    return drawn[:wanted].sort().values


def in_first_order(numbers: Tensor) -> Tensor:
    """Each number once, at the place where it first occurred."""
    ordered, at = numbers.sort(stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return numbers[at[first].sort().values]


def check_finite(name: str, scores: Tensor) -> None:
    """Raise a UserError that names the tensor if a score in it is NaN or infinite."""
    low, high = scores.aminmax()  # both are NaN if one score is
    if not torch.isfinite(low) or not torch.isfinite(high):
        wrong = int((~scores.isfinite()).sum())
        raise UserError(
            f"the scores of {name} hold {wrong} NaN or infinite values, which cannot be ranked. "
            "Score again, in float32 if the model was in half precision."
        )
