"""Guards made here: they learn what their examples say, and load again as guards."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F

from keelweight.errors import UserError
from keelweight.evaluation.guard_judge import GuardJudge
from keelweight.inputs.guards import load_guard
from keelweight.tuning import guard_training as training
from keelweight.tuning.guard_training import GuardRecipe, LabelledAnswer
from tests.tiny import HARMFUL, HARMLESS
from tests.tiny_guards import TEXT, causal_guard, classifier_guard

EXAMPLES = [
    LabelledAnswer(f"say {word}", answer, safe, "refusal" if safe else "harmful answer")
    for word in ("one", "two", "three", "the cat")
    for answer, safe in (("no, never", True), ("yes of course", False))
]


@pytest.mark.parametrize("make", [causal_guard, classifier_guard])
def test_a_guard_learns_its_examples_and_loads_again(make, tmp_path):
    guard = make()
    losses = training.train_guard(guard, EXAMPLES, GuardRecipe(epochs=25, lr=3e-3, batch_size=4))
    assert len(losses) == 50
    assert losses[-1] < 0.1 < losses[0]
    assert not any(weight.requires_grad for weight in guard.model.parameters())
    found = training.measure_guard(guard, EXAMPLES)
    assert found["accuracy"].rate == found["unsafe_recall"].rate == found["safe_recall"].rate == 1
    assert found["by_kind"]["refusal"].judged == 4
    training.save_guard(guard, tmp_path / "guard", {"seed": 0})
    again = load_guard(str(tmp_path / "guard"), dtype="float32", device="cpu")
    assert again.format.texts == guard.format.texts
    assert again.outputs == guard.outputs
    for example in EXAMPLES:
        reading = guard.read(example.prompt, example.response)
        assert torch.equal(again.score([reading]), guard.score([reading]))
    assert json.loads((tmp_path / "guard" / "guard.json").read_text())["training"] == {"seed": 0}


def test_the_loss_is_the_cross_entropy_of_the_right_word():
    guard = causal_guard()
    safe, unsafe = (guard.tokenizer(word).input_ids[0] for word in (TEXT.safe, TEXT.unsafe))
    wanted = []
    for example in EXAMPLES:
        ids = guard.tokenizer(
            f"Request: {example.prompt}\nAnswer: {example.response}\nVerdict:", return_tensors="pt"
        ).input_ids
        target = torch.tensor([safe if example.safe else unsafe])
        wanted.append(F.cross_entropy(guard.model(ids).logits[:, -1].float(), target).item())
    recipe = GuardRecipe(epochs=1, lr=0.0, batch_size=len(EXAMPLES), tokens_per_pass=64)
    (loss,) = training.train_guard(guard, EXAMPLES, recipe)
    tolerance = 0.02 if training.machine_dtype("cpu") == torch.bfloat16 else 1e-4
    assert loss == pytest.approx(sum(wanted) / len(wanted), rel=tolerance)


def test_examples_of_a_model_are_labelled_by_where_they_come_from(chat):
    examples, skipped = training.own_examples(chat, harmful=HARMFUL, harmless=HARMLESS, max_new_tokens=6)
    refusals = [example for example in examples if example.kind == "refusal"]
    assert [example.response for example in refusals] == [prompt.response for prompt in HARMFUL]
    assert all(example.safe == (example.kind != "harmful answer") for example in examples)
    assert len(examples) + sum(skipped.values()) == 2 * len(HARMFUL) + len(HARMLESS)


def test_a_file_of_examples_is_split_by_request(tmp_path):
    path = tmp_path / "examples.jsonl"
    rows = [
        {"prompt": f"request {at // 2}", "response": "text", "label": ("safe", "unsafe")[at % 2]} for at in range(20)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    train, held_out = training.read_examples(str(path))
    assert (len(train), len(held_out)) == (16, 4)
    assert not {example.prompt for example in train} & {example.prompt for example in held_out}
    assert training.read_examples(str(path)) == (train, held_out)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "response": "b", "label": "good"}, "line 1: expected safe or unsafe in the field 'label'"),
        ({"prompt": "a", "label": "safe"}, "line 1: expected text in the fields 'prompt' and 'response'"),
        ({"prompt": "a", "response": "b", "label": "safe"}, "needs safe and unsafe answers"),
    ],
)
def test_bad_examples_are_refused(tmp_path, row, message):
    path = tmp_path / "examples.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(UserError, match=message):
        training.read_examples(str(path))


def test_a_guard_judges_and_says_why_it_does_not():
    guard = classifier_guard()
    training.train_guard(guard, EXAMPLES, GuardRecipe(epochs=25, lr=3e-3, batch_size=4))
    judge = GuardJudge(guard)
    assert judge("say one", "yes of course").complied is True
    assert judge("say one", "no, never").complied is False
    assert judge("say one", "yes of course").reason in ("unsafe 0.99", "unsafe 1.00")
    assert judge("say one", "").reason == "empty"
    long = judge("say one", " ".join(f"word{at}" for at in range(400)))
    assert long.complied is None
    assert "too long for the guard" in long.reason


def test_a_guard_that_would_say_something_else_gives_no_verdict():
    verdict = GuardJudge(causal_guard())("say one", "yes of course")
    assert verdict.complied is None
    assert "gives its words a probability of 0.0" in verdict.reason


def test_a_base_without_weights_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such built-in model"):
        training.new_guard("builtin:nothing")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded"):
        training.new_guard(str(tmp_path))
