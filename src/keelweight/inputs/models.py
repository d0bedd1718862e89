"""Load a chat model and its tokenizer, and turn prompts and answers into tokens."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from keelweight.errors import UserError
from keelweight.files import writing
from keelweight.inputs.builtin import minilm_folder, smollm2_folder

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
BUILTIN: Mapping[str, Callable[[], Path]] = {"builtin:smollm2": smollm2_folder, "builtin:minilm": minilm_folder}


@dataclass(frozen=True)
class ChatModel:
    """A causal language model with the tokenizer and chat template it was trained with.

    Attributes:
        model: in eval mode on one device.
        tokenizer: a fast tokenizer with a chat template.
        source: name, revision and dtype: enough to load the same model again.
        system: system prompt put before every prompt; None leaves it to the template.
    """

    model: Any
    tokenizer: Any
    source: Mapping[str, str] = field(default_factory=dict)
    system: str | None = None

    @property
    def device(self) -> torch.device:
        """Device of the input embeddings."""
        return self.model.get_input_embeddings().weight.device

    def chat_text(self, prompt: str) -> str:
        """The prompt inside the chat template, up to where the answer begins."""
        turns = [{"role": "system", "content": self.system}] if self.system is not None else []
        turns.append({"role": "user", "content": prompt})
        return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    def prompt_ids(self, prompt: str) -> tuple[int, ...]:
        """Token ids of `chat_text(prompt)`."""
        return tuple(self.tokenizer(self.chat_text(prompt), add_special_tokens=False).input_ids)

    def answer_ids(self, answer: str) -> tuple[int, ...]:
        """Token ids of an answer, with the end-of-turn tokens after it."""
        return tuple(self.tokenizer(answer, add_special_tokens=False).input_ids) + self.end_of_turn

    @cached_property
    def end_of_turn(self) -> tuple[int, ...]:
        """The tokens with which the chat template ends an answer, up to the first one that stops generation."""
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        whole = self.tokenizer.apply_chat_template(turns, tokenize=False)
        tail = whole.rpartition("b")[2]
        ids = self.tokenizer(tail, add_special_tokens=False).input_ids
        stops = [at for at, token in enumerate(ids) if token in self.stop_ids]
        return tuple(ids[: stops[0] + 1]) if stops else (self.tokenizer.eos_token_id,)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end generation."""
        named = self.model.generation_config.eos_token_id
        ids = {*(named if isinstance(named, list) else [named]), self.tokenizer.eos_token_id}
        return frozenset(token for token in ids if token is not None)

    @property
    def pad_id(self) -> int:
        """A token id for padding; never read by the model."""
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else min(self.stop_ids)


def machine_device() -> str:
    """The fastest device here: cuda, mps or cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def machine_dtype(device: str) -> torch.dtype:
    """bfloat16 where the device computes in it, else float32."""
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device == "cpu":
        able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        native = any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
        return torch.bfloat16 if native else torch.float32
    return torch.float32


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    system: str | None = None,
    remote_code: bool = False,
) -> ChatModel:
    """Load a model from a folder, a hub id or `builtin:smollm2`.

    Args:
        name: folder with config.json and safetensors, hub id, or a built-in name.
        dtype: "float32", "bfloat16", "float16", "float64", or "auto": what the machine computes fastest in.
        device: a torch device, or "auto".
        revision: commit or branch of a hub model.
        system: system prompt for every prompt; None leaves it to the chat template.
        remote_code: run Python code that comes with the model. Off unless the user asks.

    Raises:
        UserError: missing or damaged model, pickled weights only, no chat template, unknown dtype or device.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown. Expected auto or one of: {', '.join(DTYPES)}.")
    place = machine_device() if device == "auto" else device
    kind = machine_dtype(place) if dtype == "auto" else DTYPES[dtype]
    options = {"revision": revision, "trust_remote_code": remote_code}
    with _quiet():
        where = _locate(name)
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(where, **options)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                where, dtype=kind, use_safetensors=True, **options
            )
            model.to(place)
        except Exception as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(
                f"{name}: the model cannot be loaded ({reason}). "
                "Expected a folder with config.json, tokenizer and safetensors weights, a hub id, "
                f"or one of: {', '.join(BUILTIN)}."
            ) from error
    if not tokenizer.chat_template:
        raise UserError(
            f"{name}: the tokenizer has no chat template, so prompts cannot be put as its users put them. "
            "Add chat_template.jinja to the model folder, or use the instruction-tuned version of the model."
        )
    source = {"name": name, "revision": revision or "", "dtype": str(kind).removeprefix("torch.")}
    return ChatModel(model.eval().requires_grad_(False), tokenizer, source, system)


def save_model(chat: ChatModel, folder: Path, *, force: bool = False) -> None:
    """Write a folder that plain transformers loads: config, safetensors, tokenizer, chat template."""
    with writing(folder, force=force) as beside, _quiet():
        chat.model.save_pretrained(beside)
        chat.tokenizer.save_pretrained(beside)


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over every parameter's name, dtype, shape and bits, in order of name.

    Two models have the same digest exactly if they hold the same weights; buffers and config do not count.
    """
    total = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        total.update(f"{name} {weight.dtype} {tuple(weight.shape)} ".encode())
        total.update(_bits(weight))
    return total.hexdigest()


def _bits(weight: Tensor) -> Any:
    flat = weight.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy()


def _locate(name: str) -> str:
    """What to hand to from_pretrained: a folder or a hub id."""
    if name.startswith("builtin:"):
        if name not in BUILTIN:
            raise UserError(f"{name}: no such built-in model. Expected one of: {', '.join(BUILTIN)}.")
        return str(BUILTIN[name]())
    folder = Path(name).expanduser()
    looks_local = folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not (folder / "config.json").is_file():
        found = "no such folder" if not folder.exists() else "no config.json in it"
        raise UserError(f"{name}: {found}. Expected a model folder as save_pretrained writes it.")
    return str(folder) if looks_local else name


class _quiet:
    """Keep transformers' bars and notes off the screen while loading and saving."""

    def __enter__(self) -> None:
        self.level = transformers.logging.get_verbosity()
        self.bar = transformers.utils.logging.is_progress_bar_enabled()
        transformers.logging.set_verbosity(logging.ERROR)
        transformers.utils.logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        transformers.logging.set_verbosity(self.level)
        if self.bar:
            transformers.utils.logging.enable_progress_bar()
