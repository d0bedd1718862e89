"""The mask: which weights were chosen. Everything downstream takes one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from keelweight.errors import UserError
from keelweight.files import read_tensors, write_tensors
from keelweight.inputs.layouts import Slice, layout_from_json, layout_to_json
from keelweight.inputs.models import weights_digest

KIND = "mask"


@dataclass(frozen=True)
class Mask:
    """The chosen weights.

    Attributes:
        indices: parameter name -> ascending flat positions, shape (n,), int64, n at least 1.
        shapes: parameter name -> shape of the parameter, for every candidate parameter.
        layout: the slices the weights were chosen from.
        source: model, its digest and size, score, rule, share, seed: enough to make the mask again.
    """

    indices: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    layout: tuple[Slice, ...]
    source: Mapping[str, Any]

    def __len__(self) -> int:
        """How many weights are chosen."""
        return sum(len(positions) for positions in self.indices.values())

    def save(self, path: Path, *, force: bool = False) -> None:
        """Write one safetensors file: positions as int32 where that is enough, and the provenance."""
        about = {
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "layout": layout_to_json(self.layout),
            "source": dict(self.source),
        }
        small = {name: smallest(positions) for name, positions in self.indices.items()}
        write_tensors(path, small, kind=KIND, about=about, force=force)

    def check(self, model: nn.Module, *, transfer: bool = False) -> None:
        """Refuse a model the mask was not made for.

        Args:
            model: names and shapes of its parameters must be the mask's.
            transfer: allow other weights of the same shapes, such as a fine-tune of the model that was scored.

        Raises:
            UserError: names the first thing that does not fit, and the way out.
        """
        here = dict(model.named_parameters())
        made_from = describe(self.source)
        for name in self.indices:
            if name not in here:
                raise UserError(
                    f"the mask chooses weights of {name}, which this model does not have. It was made from "
                    f"{made_from}: load that model, or score this one."
                )
            if tuple(here[name].shape) != self.shapes[name]:
                raise UserError(
                    f"the mask for {name} has shape {self.shapes[name]}, this model's has "
                    f"{tuple(here[name].shape)}. It was made from {made_from}: load that model, or score this one."
                )
        digest = self.source.get("weights_sha256")
        if not transfer and digest and digest != weights_digest(model):
            raise UserError(
                f"the mask was made from {made_from}, and this model has the same shapes but other weights "
                "(or another dtype). Load that model, score this one, or allow the transfer (--transfer)."
            )


def load_mask(path: Path) -> Mask:
    """Read a mask that `Mask.save` wrote.

    Raises:
        UserError: missing, damaged, another kind of file, or positions that cannot be a mask's.
    """
    tensors, about = read_tensors(path, kind=KIND)
    shapes = {name: tuple(shape) for name, shape in about["shapes"].items()}
    indices = {name: positions.long() for name, positions in tensors.items()}
    for name, positions in indices.items():
        if name not in shapes:
            raise UserError(f"{path}: positions for {name}, but no shape of it. The file is damaged: make it again.")
        size = torch.Size(shapes[name]).numel()
        ascending = bool((positions[1:] > positions[:-1]).all())
        if not len(positions) or not ascending or positions[0] < 0 or positions[-1] >= size:
            raise UserError(
                f"{path}: the positions for {name} are not ascending numbers from 0 to {size - 1}. "
                "The file is damaged: make it again with keelweight select."
            )
    return Mask(indices, shapes, layout_from_json(about["layout"]), about["source"])


def smallest(positions: Tensor) -> Tensor:
    """Positions as int32 where they fit, for a file of half the size."""
    fits = not len(positions) or int(positions.max()) < 2**31
    return positions.to(torch.int32 if fits else torch.int64)


def describe(source: Mapping[str, Any]) -> str:
    """The model in a provenance record, in words."""
    model = source.get("model") or {}
    parts = [model.get("name") or "an unnamed model", model.get("revision"), model.get("dtype")]
    return " ".join(part for part in parts if part)
