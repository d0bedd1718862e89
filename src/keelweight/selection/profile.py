"""Where the chosen weights sit: by layer, role and expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from keelweight.selection.mask import Mask


@dataclass(frozen=True)
class Place:
    """One role of one layer: how many of its weights are candidates, how many were chosen."""

    layer: int | None
    role: str
    chosen: int
    size: int


def profile(mask: Mask) -> list[Place]:
    """Chosen weights of every role in every layer, experts together, in the order of the model."""
    chosen: dict[tuple[int | None, str], int] = {}
    sizes: dict[tuple[int | None, str], int] = {}
    inside: dict[str, torch.Tensor] = {}
    for piece in mask.layout:
        if piece.parameter not in inside:
            inside = {piece.parameter: torch.zeros(mask.shapes[piece.parameter], dtype=torch.bool)}
            if piece.parameter in mask.indices:
                inside[piece.parameter].view(-1)[mask.indices[piece.parameter]] = True
        part = piece.region.of(inside[piece.parameter])
        key = (piece.layer, piece.role)
        chosen[key] = chosen.get(key, 0) + int(part.sum())
        sizes[key] = sizes.get(key, 0) + part.numel()
    return [Place(layer, role, chosen[layer, role], size) for (layer, role), size in sizes.items()]
