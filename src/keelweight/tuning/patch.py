"""A patch: the few weights that tuning changed, bound to the exact model they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from keelweight.errors import UserError
from keelweight.files import read_tensors, write_tensors
from keelweight.inputs.models import weights_digest
from keelweight.selection.mask import Mask, describe, smallest

KIND = "patch"


@dataclass(frozen=True)
class Patch:
    """Positions with old and new values, in the model's own dtype.

    Attributes:
        indices: parameter name -> ascending flat positions, (n,), int64.
        old, new: parameter name -> values before and after, (n,), dtype of the parameter.
        about: digests of the model before and after, and how the patch was made.
    """

    indices: Mapping[str, Tensor]
    old: Mapping[str, Tensor]
    new: Mapping[str, Tensor]
    about: Mapping[str, Any]

    def __len__(self) -> int:
        """How many weights it holds."""
        return sum(len(positions) for positions in self.indices.values())

    def save(self, path: Path, *, force: bool = False) -> None:
        """Write one safetensors file."""
        tensors: dict[str, Tensor] = {}
        for name, positions in self.indices.items():
            tensors |= {
                f"{name}/positions": smallest(positions),
                f"{name}/old": self.old[name],
                f"{name}/new": self.new[name],
            }
        write_tensors(path, tensors, kind=KIND, about=dict(self.about), force=force)

    def apply(self, model: nn.Module) -> None:
        """Put the new values into the model the patch was made from, in place.

        Raises:
            UserError: the model is another one, or the patch is already on it.
        """
        self._swap(model, self.new, expected="base_sha256", other="patched_sha256", verb="applied")

    def revert(self, model: nn.Module) -> None:
        """Take the patch off again: the model has the bits of the base model.

        Raises:
            UserError: the patch is not on this model.
        """
        self._swap(model, self.old, expected="patched_sha256", other="base_sha256", verb="reverted")

    def _swap(self, model: nn.Module, values: Mapping[str, Tensor], *, expected: str, other: str, verb: str) -> None:
        digest = weights_digest(model)
        if digest == self.about[other]:
            state = "already on this model" if verb == "applied" else "not on this model"
            raise UserError(f"the patch cannot be {verb}: it is {state}.")
        if digest != self.about[expected]:
            raise UserError(
                f"the patch cannot be {verb}: it belongs to {describe(self.about)} with weights "
                f"{self.about[expected][:12]}…, this model has {digest[:12]}…. A patch fits one exact model: load "
                "that one, in the dtype the patch was made in."
            )
        weights = dict(model.named_parameters())
        with torch.no_grad():
            for name, positions in self.indices.items():
                flat = weights[name].view(-1)
                flat.index_copy_(0, positions.to(flat.device), values[name].to(flat.device))


def chosen_values(model: nn.Module, mask: Mask) -> dict[str, Tensor]:
    """Copies of the masked weights, (n,) each, in the model's dtype, on the CPU."""
    weights = dict(model.named_parameters())
    return {
        name: weights[name].detach().view(-1)[positions.to(weights[name].device)].cpu()
        for name, positions in mask.indices.items()
    }


def make_patch(
    model: nn.Module, mask: Mask, old: Mapping[str, Tensor], *, base_sha256: str, about: Mapping[str, Any]
) -> Patch:
    """The patch that turns the base model into this tuned one.

    Args:
        model: after tuning.
        mask: the weights that were trained.
        old: `chosen_values` of the base model.
        base_sha256: `weights_digest` of the base model.
        about: model, recipe and whatever else belongs into the record.
    """
    record = {**about, "base_sha256": base_sha256, "patched_sha256": weights_digest(model)}
    return Patch(dict(mask.indices), dict(old), chosen_values(model, mask), record)


def load_patch(path: Path) -> Patch:
    """Read a patch that `Patch.save` wrote.

    Raises:
        UserError: missing, damaged, or another kind of file.
    """
    tensors, about = read_tensors(path, kind=KIND)
    parts: dict[str, dict[str, Tensor]] = {"positions": {}, "old": {}, "new": {}}
    for key, tensor in tensors.items():
        name, _, part = key.rpartition("/")
        parts[part][name] = tensor
    indices = {name: positions.long() for name, positions in parts["positions"].items()}
    for name, positions in indices.items():
        fits = parts["old"].get(name, ()), parts["new"].get(name, ())
        if any(len(values) != len(positions) for values in fits) or bool((positions[1:] <= positions[:-1]).any()):
            raise UserError(f"{path}: positions and values for {name} do not belong together. Make the patch again.")
    return Patch(indices, parts["old"], parts["new"], about)
