"""Scores as a value, and on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from keelweight.files import read_tensors, write_tensors
from keelweight.inputs.layouts import Slice, layout_from_json, layout_to_json

KIND = "scores"


@dataclass(frozen=True)
class Scores:
    """A number for every candidate weight; higher matters more.

    Attributes:
        values: parameter name -> fp32, at least 0, shape of the weight.
        layout: the scored slices of those parameters. Elements outside every slice are no candidates.
        about: model, digest and size of it, formula, objective, prompts: enough to make the scores again.
    """

    values: Mapping[str, Tensor]
    layout: tuple[Slice, ...]
    about: Mapping[str, Any]

    def save(self, path: Path, *, force: bool = False) -> None:
        """Write one safetensors file."""
        about = {**self.about, "layout": layout_to_json(self.layout)}
        write_tensors(path, self.values, kind=KIND, about=about, force=force)


def load_scores(path: Path) -> Scores:
    """Read scores that `Scores.save` wrote. Raises UserError if the file is missing, damaged or something else."""
    values, about = read_tensors(path, kind=KIND)
    return Scores(values, layout_from_json(about.pop("layout")), about)
