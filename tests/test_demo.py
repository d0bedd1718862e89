"""The whole chain on the real built-in model, at reduced size."""

from __future__ import annotations

import json

import pytest
import torch

from keelweight.demo import Settings, run_demo
from keelweight.errors import UserError
from keelweight.inputs.models import weights_digest
from keelweight.selection.mask import load_mask
from keelweight.tuning.patch import load_patch
from keelweight.tuning.train import Recipe

SMALL = Settings(
    recipe=Recipe(iterations=12, lr=2e-3),
    per_batch=(2, 1, 1),
    scoring_prompts=8,
    training_prompts=24,
    keep_tokens=4,
    eval_prompts=6,
    max_new_tokens=12,
    control=True,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder and summary of one small run with its control."""
    out = tmp_path_factory.mktemp("runs") / "demo"
    return out, run_demo(out, SMALL)


def test_the_summary_has_what_a_reader_needs(run):
    out, summary = run
    assert summary == json.loads((out / "summary.json").read_text())
    assert (summary["model"], summary["parameters"], summary["iterations"]) == ("builtin:smollm2", 134_515_008, 12)
    assert summary["weights_trained"] == round(0.001 * 134_515_008)
    for name in ("asr", "over_refusal", "borderline_refusal"):
        for when in ("before", "after", "control"):
            rate = summary[f"{name}_{when}"]
            assert rate["judged"] + rate["unscored"] == 6
            assert 0 <= rate["low"] <= rate["rate"] <= rate["high"] <= 1
    assert summary["asr_before"]["rate"] > 0.8
    assert summary["seconds"]["tune"] > 0
    assert summary["peak_rss_mb"] > 500


def test_chosen_weights_learn_to_refuse_and_random_ones_hardly_do(run):
    out, _ = run
    losses = {
        name: [json.loads(line)["refusal_loss"] for line in (out / f"{name}training.jsonl").read_text().splitlines()]
        for name in ("", "control-")
    }
    assert losses[""][0] == pytest.approx(losses["control-"][0])
    ahead = [random - chosen for chosen, random in zip(losses[""], losses["control-"], strict=True)][1:]
    assert min(ahead) > 0  # from the first update on, at every step on the same batch
    assert sum(ahead) / len(ahead) > 0.3  # nats a token, of 0.65 measured


def test_the_patch_is_the_masks_weights_and_comes_off_again(run, smollm2):
    out, _ = run
    mask, patch = load_mask(out / "mask.safetensors"), load_patch(out / "patch.safetensors")
    before = weights_digest(smollm2.model)
    copies = {name: weight.detach().clone() for name, weight in smollm2.model.named_parameters()}
    patch.apply(smollm2.model)
    for name, weight in smollm2.model.named_parameters():
        moved = (weight != copies[name]).view(-1)
        if name in mask.indices:
            moved[mask.indices[name]] = False
        assert not torch.any(moved), name
    assert weights_digest(smollm2.model) != before
    patch.revert(smollm2.model)
    assert weights_digest(smollm2.model) == before


def test_the_page_stands_alone(run):
    out, _ = run
    page = (out / "report.html").read_text()
    assert "builtin:smollm2" in page
    assert 'src="http' not in page
    assert 'href="http' not in page.replace('href="https://arxiv.org', "")


def test_a_finished_run_is_not_overwritten(run):
    with pytest.raises(UserError, match="holds a finished run"):
        run_demo(run[0], SMALL)
