"""Where every weight of a causal language model belongs: its layer, its role, its expert.

A parameter is cut into slices. A slice is a strided view of its parameter, so that reading, scoring and
writing a slice never copies: `region.of(tensor)` reshapes and then indexes.
Facts come from the model's own modules or from the table in `families.py`, never from a shape. A parameter that
nothing there describes is an error (`UnknownLayout`), not a guess; `declare` describes it.
"""

from __future__ import annotations

import ast
import dataclasses
import math
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from keelweight.errors import UserError
from keelweight.inputs.families import (
    FAMILIES,
    ROLES,
    Experts,
    Family,
    Matrix,
    Role,
    Rows,
    Rule,
    Size,
    Stack,
    When,
)

__all__ = [
    "ATTENTION", "MLP", "ROLES", "SCORED_ROLES", "WHOLE", "Coverage", "Experts", "Family", "Matrix", "Region", "Role",
    "Rows", "Slice", "Stack", "UnknownLayout", "When", "coverage", "declare", "declare_from", "layout_from_json",
    "layout_to_json", "skeleton", "slices",
]  # fmt: skip

ATTENTION = ("q", "k", "v", "o", "qk", "kv", "q_a", "kv_a", "o_a", "kv_gate", "attn_gate")
MLP = ("gate", "up", "down", "latent", "mlp_gate")
SCORED_ROLES = (*ATTENTION, *MLP, "ssm_in", "ssm_out", "head")
"""Roles that are scored by default. Source: the paper's scripts leave out biases, norms, embeddings and routers."""

Index = int | slice


class UnknownLayout(UserError):
    """A parameter that no rule describes, or that is not what its rule says."""


@dataclass(frozen=True)
class Region:
    """A strided view: `tensor.view(shape)[index]`. The default is the whole tensor."""

    shape: tuple[int, ...] = ()
    index: tuple[Index, ...] = ()

    def of(self, tensor: Tensor) -> Tensor:
        """The region of `tensor` as a view that shares its memory."""
        return (tensor.view(self.shape) if self.shape else tensor)[self.index]

    def count(self, shape: Collection[int]) -> int:
        """Elements of the region of a tensor of `shape`."""
        sizes = tuple(self.shape or shape)
        picked = [
            len(range(size)[i]) if isinstance(i, slice) else 1 for size, i in zip(sizes, self.index, strict=False)
        ]
        return math.prod(picked) * math.prod(sizes[len(picked) :])

    def to_json(self) -> list[Any]:
        """Plain JSON values."""
        index = [[i.start, i.stop, i.step] if isinstance(i, slice) else i for i in self.index]
        return [list(self.shape), index]

    @staticmethod
    def from_json(data: list[Any]) -> Region:
        """What `to_json` wrote."""
        shape, index = data
        return Region(tuple(shape), tuple(slice(*i) if isinstance(i, list) else i for i in index))


WHOLE = Region()


@dataclass(frozen=True)
class Slice:
    """One role's part of one parameter.

    Attributes:
        parameter: name in `named_parameters()`.
        role: one of `ROLES`.
        layer: counted from 0 through all stacks of layers; None outside of layers and in towers that are not text.
            Of a module that several layers share, the first of them.
        expert: number of a routed expert; None for weights that every token sees.
        region: the elements.
        output_axis: of a matrix, in `region.of(tensor)`. 0: the last axis is the input and those before are outputs;
            1: the first axis is the input and those after are outputs (Conv1D, transposed experts).
    """

    parameter: str
    role: str
    layer: int | None = None
    expert: int | None = None
    region: Region = WHOLE
    output_axis: int = 0

    def matrix(self, tensor: Tensor) -> Tensor:
        """The slice of its parameter as (outputs, inputs). A view where the memory allows it, else a copy."""
        part = self.region.of(tensor)
        return part.flatten(0, -2) if self.output_axis == 0 else part.flatten(1).T


# ------------------------------------------------------------------------------------------- declaring a layout

DECLARED: dict[str, Family] = {}
"""What `declare` added, in this process."""


def declare(model_type: str, rules: Mapping[str, Any] | None = None, *, like: str | None = None, **how: Any) -> Family:
    """Describe a model type that the table does not know, or describe it otherwise, for this process.

        declare("my_llama", like="llama")
        declare("my_model", {"attn.wqkv": Rows(q="num_heads * head_dim", k="head_dim", v="head_dim")}, like="llama")

    Args:
        model_type: as in the model's config.
        rules: end of a parameter's path (`.weight` left out) -> what it holds, see `families.py`.
        like: model type whose rules hold as well, those of `rules` first.
        how: `layers` and `stacks` of `Family`.

    Raises:
        UserError: an unknown role, or `like` names an unknown model type.
    """
    known = {**FAMILIES, **DECLARED}
    if like is not None and like not in known:
        raise UserError(
            f"declare {model_type!r}: like={like!r} is no known model type. Known: {', '.join(sorted(known))}."
        )
    base = known[like] if like is not None else Family({})
    added = {key: as_rule(value, where=f"declare {model_type!r}: {key!r}") for key, value in (rules or {}).items()}
    family = dataclasses.replace(base, rules={**base.rules, **added}, **{k: tuple(v) for k, v in how.items()})
    DECLARED[model_type] = family
    return family


def declare_from(path: Path) -> None:
    """Declare every model type that a TOML file describes: `declare`'s arguments, one table for each type.

        [my_model]
        like = "llama"
        [my_model.rules]
        "attn.wqkv" = { rows = { q = 1, k = 1, v = 1 }, groups = "num_heads" }

    A rule is a role, or a table: `rows` and `groups`; `experts` with the other attributes of `Experts`; `stack` with
    those of `Stack`; `matrix` and `output_axis`.

    Raises:
        UserError: missing file, no TOML, an unknown role or word.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise UserError(
            f"{path}: cannot be read as a layout ({error}). Expected TOML as docs/layouts.md shows."
        ) from error
    for model_type, about in data.items():
        unknown = set(about) - {"like", "rules", "layers", "stacks"} if isinstance(about, dict) else {model_type}
        if unknown:
            raise UserError(f"{path}: {sorted(unknown)} unknown. Expected tables with like, rules, layers, stacks.")
        declare(model_type, about.pop("rules", {}), **about)


def as_rule(value: Any, *, where: str) -> Rule:
    """A rule from itself, from a role, or from the words of `declare_from`. Raises UserError."""
    words = dict(value) if isinstance(value, Mapping) else {}
    rule: Any = value
    try:
        if "rows" in words:
            rule = Rows(words.pop("groups", 1), **words.pop("rows"))
        elif "experts" in words:
            rule = Experts(words.pop("experts"), **words)
            words = {}
        elif "stack" in words:
            rule = Stack(**words.pop("stack"))
        elif "matrix" in words:
            rule = Matrix(words.pop("matrix"), words.pop("output_axis", None))
    except TypeError as error:
        raise UserError(f"{where}: {error}.") from error
    if words or not isinstance(rule, str | Matrix | Rows | Experts | Stack | When):
        raise UserError(f"{where}: {value!r} is no rule. Expected a role, Matrix, Rows, Experts or Stack.")
    for role in roles_of(rule):
        if role not in ROLES:
            raise UserError(f"{where}: unknown role {role!r}. Expected one of: {', '.join(ROLES)}.")
    return rule


def roles_of(rule: Rule) -> set[str]:
    """The roles that a rule gives."""
    if isinstance(rule, str):
        return {rule}
    if isinstance(rule, Matrix):
        return {rule.role}
    if isinstance(rule, When):
        return roles_of(rule.then) | roles_of(rule.otherwise)
    return set() if isinstance(rule, Stack) else set(rule.parts)


# ------------------------------------------------------------------------------------------------ reading a model


def slices(model: nn.Module, families: Mapping[str, Family] | None = None) -> Iterator[Slice]:
    """Every parameter of `model`, cut by role: each element of each parameter is in exactly one slice.

    Reads names, modules and config, no weights: a model on the meta device will do. Wrappers (DDP, torch.compile,
    PEFT) may be around the model.

    Args:
        model: a transformers model, or a module around one.
        families: model type -> facts, instead of the table and what was declared.

    Raises:
        UnknownLayout: names the parameters whose role is not known, and says how to declare them.
    """
    reader = _Reader(model, {**FAMILIES, **DECLARED} if families is None else families)
    unknown: list[str] = []
    for name, parameter in model.named_parameters():
        try:
            pieces = list(reader.cut(name, parameter))
        except UnknownLayout as error:
            unknown.append(str(error))
            continue
        if not unknown:
            yield from pieces
    if unknown:
        distinct = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", line) for line in unknown))
        listed = "; ".join(distinct[:6]) + (f"; and {len(distinct) - 6} more" if len(distinct) > 6 else "")
        raise UnknownLayout(
            f"{type(model).__name__}: {len(unknown)} parameters are not described, and guessing would score the wrong "
            f"weights: {listed}. {reader.way_out()}"
        )


@dataclass(frozen=True)
class _Place:
    """A parameter, with what its rule may ask."""

    name: str
    path: str
    parameter: Tensor
    owner: nn.Module
    holder: nn.Module
    config: Any

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.parameter.shape)

    def wrong(self, reason: str) -> UnknownLayout:
        return UnknownLayout(f"{self.name} {list(self.shape)}: {reason}")

    def look_up(self, name: str) -> Any:
        """An attribute of the module that holds the matrix, else of its config, else of the model's."""
        for place in (self.holder, getattr(self.holder, "config", None), self.config):
            if getattr(place, name, None) is not None:
                return getattr(place, name)
        raise self.wrong(f"its rule needs {name!r}, which neither {type(self.holder).__name__} nor the config has")

    def size(self, size: Size) -> int:
        """A number, or a sum of products over attributes."""

        def value(node: ast.expr) -> int:
            match node:
                case ast.Constant(value=int(number)):
                    return number
                case ast.Name(id=name):
                    return int(self.look_up(name))
                case ast.BinOp(left=left, op=ast.Add(), right=right):
                    return value(left) + value(right)
                case ast.BinOp(left=left, op=ast.Mult(), right=right):
                    return value(left) * value(right)
                case ast.BinOp(left=left, op=ast.FloorDiv(), right=right):
                    return value(left) // value(right)
            raise self.wrong(f"{size!r} is no sum of products over attributes")

        return size if isinstance(size, int) else value(ast.parse(size, mode="eval").body)

    def bounds(self, parts: Mapping[str, Size], outputs: int, groups: int = 1) -> Iterator[tuple[str, slice, int]]:
        """Role, outputs of it in one group, outputs of all roles in one group.

        Sizes that are all numbers are shares of what is there; else they must add up to it.
        """
        sizes = {role: self.size(size) for role, size in parts.items()}
        total = sum(sizes.values()) * groups
        if all(isinstance(size, int) for size in parts.values()) and outputs % total == 0:
            sizes = {role: size * (outputs // total) for role, size in sizes.items()}
        elif total != outputs:
            said = " + ".join(f"{role} {size}" for role, size in sizes.items())
            raise self.wrong(f"its rule says {groups} x ({said}) = {total} outputs, it has {outputs}")
        start, group = 0, sum(sizes.values())
        for role, size in sizes.items():
            yield role, slice(start, start + size), group
            start += size


class _Reader:
    """A model's modules and embeddings, and the facts that hold for them."""

    def __init__(self, model: nn.Module, families: Mapping[str, Family]) -> None:
        self.families = families
        self.modules = dict(model.named_modules())
        self.models = {name: module for name, module in self.modules.items() if isinstance(module, PreTrainedModel)}
        root = next(iter(self.models.values()), None)
        self.types = list(dict.fromkeys(module.config.model_type for module in self.models.values()))
        self.embedding = _weight(root, "get_input_embeddings")
        self.head = _weight(root, "get_output_embeddings")
        self.rules: dict[str, list[tuple[re.Pattern[str], Rule]]] = {}

    def way_out(self) -> str:
        """What to do about parameters that nothing describes."""
        missing = [t for t in self.types if t not in self.families]
        what = f"No facts are known about {', '.join(missing)}" if missing else f"Model type {', '.join(self.types)}"
        example = (missing or self.types or ["my_model"])[0]
        return (
            f"{what}: describe them with keelweight.inputs.layouts.declare, for instance "
            f'declare("{example}", {{"attn.wq": "q"}}, like="llama"), or in a file; see docs/layouts.md.'
        )

    def cut(self, name: str, parameter: Tensor) -> Iterator[Slice]:
        """The slices of one parameter. Raises UnknownLayout if no rule describes it, or not as it is."""
        owner_name, _, kind = name.rpartition(".")
        parts = [part for part in name.split(".") if part not in ("_orig_mod", "base_layer")]
        path = ".".join(parts[:-1] if kind == "weight" else parts)
        holder_name = owner_name.removesuffix(".base_layer").rpartition(".")[0] if kind == "weight" else owner_name
        place = _Place(name, path, parameter, self.modules[owner_name], self.modules[holder_name], None)
        if not parameter.dtype.is_floating_point:
            raise place.wrong(f"holds {parameter.dtype}, not weights: load the model unquantized")
        known = [(m, f) for m in self.enclosing(name) if (f := self.families.get(m.config.model_type)) is not None]
        if not known:
            raise place.wrong("no facts about its model type")
        for module, family in known:
            rule = self.find(module.config.model_type, family, path)
            if rule is not None:
                break
        else:
            module, family = known[-1]
            rule = self.default(place, kind)
        if parameter is self.embedding:
            rule = "embedding"
        elif parameter is self.head:
            rule = "head"
        if rule is None:
            raise place.wrong(f"no rule of {', '.join(dict.fromkeys(m.config.model_type for m, _ in known))} fits it")
        layer = self.layer(family, path)
        total = 0
        for piece in _pieces(rule, dataclasses.replace(place, config=module.config)):
            elsewhere = piece.role in ("vision", "audio", "projector")
            total += piece.region.count(parameter.shape)
            yield piece if elsewhere or layer is None else dataclasses.replace(piece, layer=layer)
        if total != parameter.numel():
            raise place.wrong(f"its rule covers {total} of {parameter.numel()} elements")

    def enclosing(self, name: str) -> list[PreTrainedModel]:
        """The models that hold a parameter, the outermost first."""
        return [module for at, module in self.models.items() if not at or name.startswith(f"{at}.")]

    def find(self, model_type: str, family: Family, path: str) -> Rule | None:
        """The rule whose key fits the end of `path`: `.**` first, then the longest, then the one without `*`."""
        if model_type not in self.rules:
            ordered = sorted(family.rules, key=lambda key: (not key.endswith(".**"), -key.count("."), key.count("*")))
            self.rules[model_type] = [(_pattern(key), family.rules[key]) for key in ordered]
        return next((rule for pattern, rule in self.rules[model_type] if pattern.search(path)), None)

    def default(self, place: _Place, kind: str) -> Rule | None:
        """What a module's class says by itself: norms, biases, embeddings and LoRA."""
        if ".lora_" in place.name:
            return "adapter"
        if "norm" in type(place.owner).__name__.lower():
            return "norm"
        if kind == "bias" and isinstance(getattr(place.owner, "weight", None), Tensor):
            return "bias"
        return "embedding" if isinstance(place.owner, nn.Embedding) else None

    def layer(self, family: Family, path: str) -> int | None:
        """The layer that a path leads to."""
        if family.stacks:
            before = 0
            for stack in family.stacks:
                found = re.search(rf"(?:^|\.){re.escape(stack)}\.(\d+)(?:\.|$)", path)
                if found:
                    return before + int(found.group(1))
                before += next((len(m) for n, m in self.modules.items() if n.endswith(stack)), 0)
            return None
        names = "|".join(re.escape(name) for name in family.layers)
        found = re.search(rf"(?:^|\.)(?:{names})\.(\d+)(?:\.|$)", path)
        return int(found.group(1)) if found else None


def _weight(model: PreTrainedModel | None, getter: str) -> Tensor | None:
    """Weight of the module that `getter` of the model returns, if there is one."""
    try:
        return getattr(getattr(model, getter)(), "weight", None)
    except (AttributeError, NotImplementedError):
        return None


def _pattern(key: str) -> re.Pattern[str]:
    """A rule's key as a pattern for paths."""
    below = key.endswith(".**")
    words = [r"[^.]+" if word == "*" else re.escape(word) for word in key.removesuffix(".**").split(".")]
    return re.compile(r"(?:^|\.)" + r"\.".join(words) + (r"(?:\.|$)" if below else "$"))


def _pieces(rule: Rule, place: _Place) -> Iterator[Slice]:
    """What a rule makes of a parameter."""
    match rule:
        case When(flag, then, otherwise):
            yield from _pieces(then if place.look_up(flag) else otherwise, place)
        case str(role):
            yield from _pieces(Matrix(role), place)
        case Matrix(role, axis):
            region = WHOLE
            if ROLES[role].unscored == "":
                axis = _output_axis(place) if axis is None else axis
                if len(place.shape) > 2:
                    region = Region((place.shape[0], math.prod(place.shape[1:])))
            yield Slice(place.name, role, region=region, output_axis=axis or 0)
        case Rows(parts, groups):
            axis, count = _output_axis(place), place.size(groups)
            for role, rows, group in place.bounds(parts, place.shape[axis], count):
                yield Slice(place.name, role, region=_rows(place.shape, axis, count, rows, group), output_axis=axis)
        case Stack():
            yield from _pieces(_read_stack(rule, place), place)
        case Experts():
            yield from _experts(rule, place)


def _rows(shape: tuple[int, ...], axis: int, groups: int, rows: slice, group: int) -> Region:
    """The region of `rows` in every group of `group` outputs along `axis` of a matrix."""
    everything = slice(None)
    if groups == 1:
        return Region((), (everything,) * axis + (rows,))
    if axis == 0:
        return Region((groups, group, shape[1]), (everything, rows))
    return Region((shape[0], groups, group), (everything, everything, rows))


def _output_axis(place: _Place) -> int:
    """The output axis that a module's class says."""
    if len(place.shape) == 2 and place.path != place.name:
        if isinstance(place.owner, nn.Linear):
            return 0
        if isinstance(place.owner, Conv1D):
            return 1
    raise place.wrong(f"a {type(place.owner).__name__} does not say which axis is the output: give output_axis")


def _read_stack(rule: Stack, place: _Place) -> Experts:
    """One parameter of a module of stacked experts, as the module or the rule describes it."""

    def flag(said: bool | None, name: str) -> bool:
        read = said if said is not None else getattr(place.owner, name, None)
        if not isinstance(read, bool):
            raise place.wrong(f"{type(place.owner).__name__} has no {name}, and its rule does not say it")
        return read

    kind = place.path.rpartition(".")[2]
    axis = int(flag(rule.transposed, "is_transposed"))
    match kind:
        case "gate_up_proj":
            halves = flag(rule.concatenated, "is_concatenated")
            return Experts({"gate": 1, "up": 1}, axis, interleaved=not halves, numbered=rule.numbered)
        case "gate_proj" | "up_proj" | "down_proj":
            return Experts({kind.removesuffix("_proj"): 1}, axis, numbered=rule.numbered)
        case "gate_up_proj_bias" | "gate_proj_bias" | "up_proj_bias" | "down_proj_bias":
            return Experts({"bias": 1}, numbered=rule.numbered)
    raise place.wrong("its name is not one of a stack of experts")


def _experts(rule: Experts, place: _Place) -> Iterator[Slice]:
    """The slices of every expert of a stack."""
    bias = "bias" in rule.parts
    count = place.size(rule.count) if rule.count is not None else place.shape[0]
    shape = place.shape if rule.count is None else (count, place.shape[0] // count, *place.shape[1:])
    if len(shape) != (2 if bias else 3) or math.prod(shape) != place.parameter.numel():
        raise place.wrong(f"is no stack of {count} experts")
    outputs = shape[1 + rule.output_axis]
    inside: list[tuple[str, tuple[Index, ...]]] = []
    for number, (role, rows, _) in enumerate(place.bounds(rule.parts, outputs)):
        kept = slice(number, None, len(rule.parts)) if rule.interleaved else rows
        inside.append((role, (slice(None),) * rule.output_axis + (kept,) if len(rule.parts) > 1 else ()))
    view = shape if rule.count is not None else ()
    for expert in range(count):
        for role, index in inside:
            number_of = expert if rule.numbered else None
            yield Slice(place.name, role, None, number_of, Region(view, (expert, *index)), rule.output_axis)


# ---------------------------------------------------------------------------------------------------- coverage


@dataclass(frozen=True)
class Coverage:
    """One role: how many parameters it has, their share of all, and why it is not scored ("" if it is)."""

    role: str
    parameters: int
    share: float
    scored: bool
    reason: str


def coverage(
    model: nn.Module, scored: Collection[str] = SCORED_ROLES, families: Mapping[str, Family] | None = None
) -> list[Coverage]:
    """What of a model is scored, role by role: scored roles first, the largest first. Shares add up to 1.

    Reads no weights: `skeleton(config)` will do. A head that is the embedding is listed with no parameters.

    Raises:
        UnknownLayout: see `slices`.
    """
    counts: dict[str, int] = {}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for piece in slices(model, families):
        counts[piece.role] = counts.get(piece.role, 0) + piece.region.count(shapes[piece.parameter])
    total = sum(counts.values())
    rows = [
        Coverage(role, count, count / total, role in scored, "" if role in scored else _reason(role))
        for role, count in counts.items()
    ]
    reader = _Reader(model, {})
    if reader.head is not None and reader.head is reader.embedding:
        rows.append(Coverage("head", 0, 0.0, False, "shares its weights with the embedding"))
    return sorted(rows, key=lambda row: (not row.scored, -row.parameters))


def _reason(role: str) -> str:
    return ROLES[role].unscored or "left out by choice"


def skeleton(config: Any) -> nn.Module:
    """The model that a config describes, on the meta device: names and shapes, no weights, no memory.

    The causal LM of the config, else the model of text and images.

    Raises:
        UserError: transformers cannot build either from this config.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    # transformers keeps the classes of a mapping by config class; the causal LM of a wrapper is its text part
    kinds = [
        auto for auto in (AutoModelForCausalLM, AutoModelForImageTextToText) if type(config) in auto._model_mapping
    ]
    try:
        with torch.device("meta"):
            return (kinds or [AutoModelForCausalLM])[0].from_config(config)
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"model type {getattr(config, 'model_type', '?')!r}: no language model can be built from this config "
            f"({reason})."
        ) from error


# -------------------------------------------------------------------------------------------------------- JSON


def layout_to_json(layout: tuple[Slice, ...]) -> list[list[Any]]:
    """Slices as plain JSON values, to be kept beside scores and masks."""
    return [[s.parameter, s.role, s.layer, s.expert, s.region.to_json(), s.output_axis] for s in layout]


def layout_from_json(data: list[list[Any]]) -> tuple[Slice, ...]:
    """What `layout_to_json` wrote."""
    return tuple(
        Slice(name, role, layer, expert, Region.from_json(region), *axis)
        for name, role, layer, expert, region, *axis in data
    )
