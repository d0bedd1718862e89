"""Prompts: the built-in sets, files of the user's, data sets from the hub."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from keelweight.errors import UserError, require

BUILTIN_SETS = ("harmful", "harmless", "borderline")
FIELDS = ("id", "prompt", "response", "category", "split")


@dataclass(frozen=True)
class Prompt:
    """One request.

    Attributes:
        id: unique in its set.
        prompt: the request itself, without chat template.
        response: a fitting answer where the set has one: a refusal in `harmful`, a reference in `harmless`.
        category: topic or kind; empty if the set has none.
    """

    id: str
    prompt: str
    response: str = ""
    category: str = ""


def load_prompts(
    source: str,
    *,
    split: str | None = None,
    fields: Mapping[str, str] | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> list[Prompt]:
    """Read prompts.

    Args:
        source: `builtin:harmful`, `builtin:harmless`, `builtin:borderline`; a .jsonl, .csv or .txt file (one
            prompt a line); or `hub:OWNER/NAME` (extra `hub`).
        split: keep rows of this split only. Built-in sets have `train` and `eval`, which share no template.
        fields: our field -> the source's field, where names differ, such as {"prompt": "question"}.
        limit: keep this many, drawn with `seed` and spread over the categories; None keeps all.
        seed: for `limit`.

    Raises:
        UserError: unknown source, wrong encoding, malformed row (with its line number), no prompts left.
    """
    names = {field: field for field in FIELDS} | dict(fields or {})
    if unknown := set(names) - set(FIELDS):
        raise UserError(f"{source}: no field {sorted(unknown)[0]!r}. Fields are: {', '.join(FIELDS)}.")
    rows = list(read_rows(source, split=split, prompt_field=names["prompt"]))
    prompts = []
    seen: set[str] = set()
    for where, row in rows:
        text = row.get(names["prompt"])
        if not isinstance(text, str) or not text.strip():
            has = ", ".join(map(str, row)) or "nothing"
            raise UserError(
                f"{where}: expected text in the field {names['prompt']!r}, the row has: {has}. "
                f"Name the field that holds the prompt: --field prompt=NAME."
            )
        if split is not None and names["split"] in row and row[names["split"]] != split:
            continue
        identity = str(row.get(names["id"]) or where)
        if identity in seen:
            raise UserError(f"{where}: the id {identity!r} occurs twice. Expected unique ids, or none at all.")
        seen.add(identity)
        response, category = (row.get(names[field]) or "" for field in ("response", "category"))
        prompts.append(Prompt(identity, text.strip(), str(response).strip(), str(category)))
    if not prompts:
        of = f" of split {split!r}" if split else ""
        raise UserError(f"{source}: no prompts{of} in it. Expected at least one.")
    return prompts if limit is None else spread(prompts, limit, seed)


def spread(prompts: list[Prompt], limit: int, seed: int = 0) -> list[Prompt]:
    """`limit` prompts (all, if there are fewer), drawn at random and evenly over the categories, in the old order."""
    if limit < 1:
        raise UserError(f"a limit of {limit} prompts leaves nothing. Expected 1 or more.")
    rng = random.Random(seed)
    by_category: dict[str, list[int]] = {}
    for at in rng.sample(range(len(prompts)), len(prompts)):
        by_category.setdefault(prompts[at].category, []).append(at)
    ranked = [
        (rank, order, at) for order, key in enumerate(sorted(by_category)) for rank, at in enumerate(by_category[key])
    ]
    return [prompts[at] for _, _, at in sorted(sorted(ranked)[:limit], key=lambda item: item[2])]


def read_rows(
    source: str, *, split: str | None = None, prompt_field: str = "prompt"
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The raw rows of a source as in `load_prompts`, each with where it stands, for error messages.

    Args:
        source: as in `load_prompts`.
        split: of a hub data set; other sources give all their rows.
        prompt_field: the field that a line of a .txt file is.
    """
    if source.startswith("builtin:"):
        name = source.removeprefix("builtin:")
        if name not in BUILTIN_SETS:
            known = ", ".join(f"builtin:{known}" for known in BUILTIN_SETS)
            raise UserError(f"{source}: no such built-in set. Expected one of: {known}.")
        text = (files("keelweight.inputs") / "data" / f"{name}.jsonl").read_text(encoding="utf-8")
        yield from _jsonl(source, text)
        return
    if source.startswith("hub:"):
        datasets = require("datasets", extra="hub", purpose=source)
        try:
            rows = datasets.load_dataset(source.removeprefix("hub:"), split=split or "train")
        except Exception as error:
            raise UserError(f"{source}: cannot be loaded ({' '.join(str(error).split())[:200]}).") from error
        yield from ((f"{source} row {at}", dict(row)) for at, row in enumerate(rows, 1))
        return
    path = Path(source).expanduser()
    text = _read(path)
    if path.suffix == ".jsonl":
        yield from _jsonl(source, text)
    elif path.suffix == ".csv":
        yield from _csv(source, text)
    elif path.suffix == ".txt":
        lines = enumerate(text.splitlines(), 1)
        yield from ((f"{source} line {at}", {prompt_field: line}) for at, line in lines if line.strip())
    else:
        raise UserError(f"{source}: unknown kind of file. Expected .jsonl, .csv or .txt.")


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Expected a prompt file.") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} line {line}: not UTF-8 (byte 0x{data[error.start]:02x}). Convert the file to UTF-8."
        ) from error


def _jsonl(source: str, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for at, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{source} line {at}: not JSON ({error.msg}). Expected one object a line.") from error
        if not isinstance(row, dict):
            raise UserError(f"{source} line {at}: expected a JSON object, found {type(row).__name__}.")
        yield f"{source} line {at}", row


def _csv(source: str, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise UserError(
                    f"{source} line {reader.line_num}: expected {len(reader.fieldnames or ())} columns, "
                    "found another number. Check the quoting."
                )
            yield f"{source} line {reader.line_num}", row
    except csv.Error as error:
        raise UserError(f"{source} line {reader.line_num}: malformed CSV ({error}).") from error
