"""Patches: on, off, bit for bit, and never on another model."""

from __future__ import annotations

import pytest
import torch

from keelweight.errors import UserError
from keelweight.inputs.models import weights_digest
from keelweight.objectives.likelihood import refusal_cases, refusal_likelihood
from keelweight.scores.esi import esi_scores
from keelweight.selection.choose import choose
from keelweight.tuning.data import Group, refusal_examples
from keelweight.tuning.patch import Patch, chosen_values, load_patch, make_patch
from keelweight.tuning.train import Recipe, tune
from tests.tiny import HARMFUL, tiny_chat


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def made(request, tmp_path) -> tuple[Patch, torch.dtype, str]:
    """A patch from real tuning, read back from disk; the dtype and the digest of the tuned model."""
    chat = tiny_chat(request.param)
    mask = choose(esi_scores(chat, refusal_likelihood, refusal_cases(chat, HARMFUL)), share=0.02)
    base, old = weights_digest(chat.model), chosen_values(chat.model, mask)
    groups = [Group("harmful", refusal_examples(chat, HARMFUL), 2)]
    tune(chat, groups, train_only=mask, recipe=Recipe(iterations=5, lr=1e-2))
    about = {"model": dict(chat.source)}
    make_patch(chat.model, mask, old, base_sha256=base, about=about).save(tmp_path / "p.safetensors")
    return load_patch(tmp_path / "p.safetensors"), request.param, weights_digest(chat.model)


def test_apply_makes_the_tuned_model_and_revert_the_base_bit_for_bit(made):
    patch, dtype, tuned = made
    chat = tiny_chat(dtype)
    base = weights_digest(chat.model)
    patch.apply(chat.model)
    assert weights_digest(chat.model) == tuned != base
    patch.revert(chat.model)
    assert weights_digest(chat.model) == base
    assert all(
        torch.equal(a, b) for a, b in zip(chat.model.parameters(), tiny_chat(dtype).model.parameters(), strict=True)
    )


def test_other_models_are_refused_and_left_alone(made):
    patch, dtype, _ = made
    other = tiny_chat(dtype, seed=1)
    before = weights_digest(other.model)
    with pytest.raises(UserError, match="A patch fits one exact model"):
        patch.apply(other.model)
    with pytest.raises(UserError, match="A patch fits one exact model"):
        patch.apply(tiny_chat(torch.float64).model)
    assert weights_digest(other.model) == before


def test_it_goes_on_once_and_comes_off_once(made):
    patch, dtype, _ = made
    chat = tiny_chat(dtype)
    with pytest.raises(UserError, match="not on this model"):
        patch.revert(chat.model)
    patch.apply(chat.model)
    with pytest.raises(UserError, match="already on this model"):
        patch.apply(chat.model)


def test_a_truncated_or_foreign_patch_is_an_error(made, tmp_path):
    path = tmp_path / "p.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match="damaged"):
        load_patch(path)


def test_the_digest_sees_every_bit():
    chat = tiny_chat()
    before = weights_digest(chat.model)
    weight = chat.model.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        weight.view(torch.int32)[3, 5] ^= 1
    assert weights_digest(chat.model) != before
