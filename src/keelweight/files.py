"""Artifacts on disk: written beside and renamed, so that a file is whole or absent."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from keelweight.errors import UserError


def check_free(path: Path, *, force: bool = False) -> None:
    """Refuse an output path that exists (unless `force`) or that cannot be written.

    Called before long work starts, so that an hour of scoring never ends at a path that was wrong all along.
    """
    if path.exists() and not force:
        raise UserError(f"{path} exists. Give another path, or --force to replace it.")
    parent = path.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        probe = parent / f".keelweight-{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{parent}: cannot be written ({error.strerror}). Give a folder you can write to.") from error


@contextmanager
def writing(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a path beside `path`; rename it to `path` when the block ends, remove it when the block fails.

    The block may make a file or a folder there.

    Raises:
        UserError: `path` exists and `force` is not set, or the disk refuses (full, read-only).
    """
    check_free(path, force=force)
    beside = path.absolute().with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield beside
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        beside.replace(path)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"{path}: not written ({reason}). Nothing was left behind.") from error
    finally:
        if beside.is_dir():
            shutil.rmtree(beside, ignore_errors=True)
        else:
            beside.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, force: bool = False) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with writing(path, force=force) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any, *, force: bool = False) -> None:
    """Write `data` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n", force=force)


def read_json(path: Path, *, what: str) -> Any:
    """The JSON value in `path`; `what` says in errors which artifact was expected."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; expected {what}.") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not readable as {what} ({error}).") from error


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], *, kind: str, about: Mapping[str, Any], force: bool = False
) -> None:
    """Write a safetensors file whose metadata says which `kind` of artifact it is and carries `about` as JSON.

    One metadata key holds both: safetensors writes several in any order, and equal artifacts are to be equal files.
    """
    metadata = {"keelweight": json.dumps({"kind": kind, "about": about})}
    with writing(path, force=force) as beside:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, beside, metadata)


@contextmanager
def open_tensors(path: Path, *, kind: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield the open safetensors file (tensors are read when asked for) and its `about`.

    Raises:
        UserError: missing, truncated, not safetensors, or another kind of artifact.
    """
    article = "an" if kind[0] in "aeiou" else "a"
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected {article} {kind} file written by keelweight.")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("keelweight", "{}"))
            found = header.get("kind")
            if found != kind:
                raise UserError(
                    f"{path}: expected {article} {kind} file, found "
                    + (f"a {found} file." if found else "a safetensors file that keelweight did not write.")
                )
            yield file, header["about"]
    except (SafetensorError, json.JSONDecodeError, KeyError) as error:
        raise UserError(f"{path}: damaged or not a safetensors file ({error}). Make it again.") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}).") from error


def read_tensors(path: Path, *, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors and the `about` of a file that `write_tensors` made."""
    with open_tensors(path, kind=kind) as (file, about):
        return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118
