"""Small real things for the tests: a random Llama with a trained tokenizer, and the built-in model."""

from __future__ import annotations

import pytest
import torch

from keelweight.inputs.models import ChatModel, load_model
from tests.tiny import tiny_chat


@pytest.fixture(autouse=True)
def _two_threads():
    torch.manual_seed(0)


@pytest.fixture
def chat() -> ChatModel:
    """A fresh random Llama in float32."""
    return tiny_chat()


@pytest.fixture(scope="session")
def smollm2() -> ChatModel:
    """The built-in model, bfloat16 where the machine has it. Tests that change it must change it back."""
    return load_model("builtin:smollm2", device="cpu")
