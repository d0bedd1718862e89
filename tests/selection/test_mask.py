"""Masks on disk, and the models they refuse."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from keelweight.errors import UserError
from keelweight.files import read_tensors, write_tensors
from keelweight.objectives.likelihood import refusal_cases, refusal_likelihood
from keelweight.scores.esi import esi_scores
from keelweight.selection.choose import choose
from keelweight.selection.mask import Mask, load_mask
from keelweight.selection.profile import profile
from tests.tiny import HARMFUL, tiny_chat


@pytest.fixture
def mask(chat) -> Mask:
    return choose(esi_scores(chat, refusal_likelihood, refusal_cases(chat, HARMFUL)), share=0.01)


def test_a_mask_comes_back_from_disk_as_it_was(mask, tmp_path):
    mask.save(tmp_path / "m.safetensors")
    loaded = load_mask(tmp_path / "m.safetensors")
    assert len(loaded) == len(mask) > 0
    assert loaded.source == mask.source
    assert loaded.layout == mask.layout
    assert all(torch.equal(loaded.indices[name], positions) for name, positions in mask.indices.items())
    assert loaded.source["rule"] == "top"
    assert loaded.source["weights_sha256"]


def test_it_fits_its_model_and_refuses_others(mask):
    mask.check(tiny_chat().model)
    with pytest.raises(UserError, match="same shapes but other weights"):
        mask.check(tiny_chat(seed=1).model)
    mask.check(tiny_chat(seed=1).model, transfer=True)
    other = tiny_chat()
    other.model.model.layers[0].mlp.up_proj = torch.nn.Linear(32, 50, bias=False)
    with pytest.raises(UserError, match=r"has shape \(48, 32\), this model's has \(50, 32\)"):
        mask.check(other.model, transfer=True)
    with pytest.raises(UserError, match="which this model does not have"):
        mask.check(torch.nn.Linear(2, 2), transfer=True)


def test_a_truncated_file_is_an_error(mask, tmp_path):
    path = tmp_path / "m.safetensors"
    mask.save(path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(UserError, match="damaged or not a safetensors file"):
        load_mask(path)


@pytest.mark.parametrize("positions", [[0, 5000], [-1, 2], [3, 3], [4, 2], []])
def test_positions_that_cannot_be_a_masks_are_an_error(mask, tmp_path, positions):
    path = tmp_path / "m.safetensors"
    mask.save(path)
    tensors, about = read_tensors(path, kind="mask")
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.tensor(positions, dtype=torch.int32)
    write_tensors(path, tensors, kind="mask", about=about, force=True)
    with pytest.raises(UserError, match="not ascending numbers from 0 to 1023"):
        load_mask(path)


def test_other_files_are_not_masks(mask, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="keelweight did not write"):
        load_mask(tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="no such file"):
        load_mask(tmp_path / "absent.safetensors")


def test_an_existing_file_is_not_replaced_unasked(mask, tmp_path):
    mask.save(tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="exists"):
        mask.save(tmp_path / "m.safetensors")
    mask.save(tmp_path / "m.safetensors", force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_the_profile_counts_every_chosen_weight_once(mask, chat):
    places = profile(mask)
    assert sum(place.chosen for place in places) == len(mask)
    weights = dict(chat.model.named_parameters())
    assert sum(place.size for place in places) == sum(weights[name].numel() for name in mask.shapes)
    expected = {
        (layer, role): len(mask.indices.get(f"model.layers.{layer}.self_attn.{role}_proj.weight", torch.empty(0)))
        for layer in (0, 1)
        for role in "qkvo"
    }
    assert {(p.layer, p.role): p.chosen for p in places if p.role in "qkvo"} == expected
