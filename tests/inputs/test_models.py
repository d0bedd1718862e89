"""Loading models: what works, and what is refused with one line."""

from __future__ import annotations

import json

import pytest
import torch

from keelweight.errors import UserError
from keelweight.inputs.builtin import check_sha256
from keelweight.inputs.models import load_model, save_model, weights_digest
from tests.tiny import tiny_chat


@pytest.fixture
def folder(tmp_path):
    save_model(tiny_chat(), tmp_path / "model")
    return tmp_path / "model"


def test_a_saved_folder_loads_again_bit_for_bit(folder):
    loaded = load_model(str(folder), dtype="float32", device="cpu")
    assert weights_digest(loaded.model) == weights_digest(tiny_chat().model)
    assert loaded.prompt_ids("Why?") == tiny_chat().prompt_ids("Why?")


def test_dtype_and_device_can_be_chosen(folder):
    assert load_model(str(folder), dtype="bfloat16", device="cpu").model.dtype == torch.bfloat16
    with pytest.raises(UserError, match="dtype 'int3' is unknown"):
        load_model(str(folder), dtype="int3")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(str(folder), device="quantum")


def test_a_model_without_chat_template_is_refused(folder):
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        load_model(str(folder))


def test_missing_and_damaged_folders_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_model(str(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        load_model(str(tmp_path / "empty"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(str(folder))


def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").unlink()
    torch.save(tiny_chat().model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(str(folder))


def test_remote_code_is_not_run(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('remote code ran')\n")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(str(folder))


def test_unknown_built_in_models_are_named():
    with pytest.raises(UserError, match="Expected one of: builtin:smollm2"):
        load_model("builtin:gpt9")


def test_a_wrong_checksum_is_refused(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(b"x")
    with pytest.raises(UserError, match="expected 000000000000"):
        check_sha256(file, "0" * 64)


@pytest.mark.model
def test_the_built_in_model_is_smollm2(smollm2):
    assert sum(p.numel() for p in smollm2.model.parameters()) == 134_515_008
    assert smollm2.chat_text("Hi").endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert smollm2.end_of_turn == (2,)
