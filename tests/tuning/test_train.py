"""The tuning loop: what moves, what stays, and interrupts."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from torch.nn import functional as F

from keelweight.errors import UserError
from keelweight.inputs.responses import respond
from keelweight.objectives.likelihood import refusal_cases, refusal_likelihood
from keelweight.objectives.teacher_forcing import Turn, answer_logits
from keelweight.scores.esi import esi_scores
from keelweight.selection.choose import choose
from keelweight.tuning.data import (
    Group,
    Prediction,
    kl_from,
    own_answer_examples,
    refusal_examples,
    safety_mixture,
)
from keelweight.tuning.train import Recipe, example_losses, tune
from tests.tiny import HARMFUL, HARMLESS, tiny_chat

RECIPE = Recipe(iterations=12, lr=3e-2, tokens_per_pass=64)


def set_up(chat):
    mask = choose(esi_scores(chat, refusal_likelihood, refusal_cases(chat, HARMFUL)), share=0.05)
    groups = safety_mixture(chat, HARMFUL, HARMLESS, HARMLESS[:1], per_batch=(2, 1, 1), max_new_tokens=5)
    return mask, groups


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tuning_teaches_refusals_and_moves_masked_weights_only(dtype):
    chat = tiny_chat(dtype)
    mask, groups = set_up(chat)
    before = {name: weight.detach().clone() for name, weight in chat.model.named_parameters()}
    cases = refusal_cases(chat, HARMFUL)
    likelihood = refusal_likelihood(chat.model, cases).mean().item()
    steps = tune(chat, groups, train_only=mask, recipe=RECIPE)
    assert [step.step for step in steps] == list(range(1, 13))
    assert refusal_likelihood(chat.model, cases).mean().item() > likelihood + 0.5
    for name, weight in chat.model.named_parameters():
        moved = (weight != before[name]).view(-1).nonzero().view(-1)
        assert set(moved.tolist()) <= set(mask.indices.get(name, torch.empty(0)).tolist()), name
        assert weight.grad is None


def test_splitting_a_batch_into_passes_changes_nothing():
    results = []
    for tokens in (16, 4096):
        chat = tiny_chat(torch.float64)
        mask, groups = set_up(chat)
        steps = tune(chat, groups, train_only=mask, recipe=Recipe(iterations=4, lr=1e-2, tokens_per_pass=tokens))
        results.append([step.loss for step in steps])
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_an_interrupt_saves_and_resumes_to_the_same_weights(tmp_path):
    straight = tiny_chat(torch.bfloat16)
    mask, groups = set_up(straight)
    whole = tune(straight, groups, train_only=mask, recipe=RECIPE)

    broken = tiny_chat(torch.bfloat16)
    checkpoint = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        tune(broken, groups, train_only=mask, recipe=RECIPE, checkpoint=checkpoint, on_step=interrupt_at(5))
    assert checkpoint.exists()

    fresh = tiny_chat(torch.bfloat16)
    resumed = tune(fresh, groups, train_only=mask, recipe=RECIPE, checkpoint=checkpoint)
    assert not checkpoint.exists()
    assert [(s.step, s.loss, s.lr, s.grad_norm) for s in resumed] == [
        (s.step, s.loss, s.lr, s.grad_norm) for s in whole
    ]
    for one, other in zip(straight.model.parameters(), fresh.model.parameters(), strict=True):
        assert torch.equal(one, other)


def interrupt_at(step):
    def on_step(done):
        if done.step == step:
            os.kill(os.getpid(), signal.SIGINT)  # what Ctrl-C sends

    return on_step


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    chat = tiny_chat()
    mask, groups = set_up(chat)
    checkpoint = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        tune(chat, groups, train_only=mask, recipe=RECIPE, checkpoint=checkpoint, on_step=interrupt_at(2))
    with pytest.raises(UserError, match="another recipe"):
        tune(tiny_chat(), groups, train_only=mask, recipe=Recipe(iterations=5), checkpoint=checkpoint)


def test_learning_rates_warm_up_and_fall_to_zero():
    chat = tiny_chat()
    mask, groups = set_up(chat)
    steps = tune(chat, groups, train_only=mask, recipe=Recipe(iterations=20, lr=1e-3, warmup=0.1))
    rates = [step.lr for step in steps]
    assert rates[0] == 0
    assert max(rates) == rates[2] == pytest.approx(1e-3)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] < 2e-5


def test_what_is_kept_has_no_divergence_before_tuning(chat):
    examples = own_answer_examples(chat, respond(chat, HARMLESS, max_new_tokens=6), top=16)
    assert example_losses(chat.model, examples).tolist() == pytest.approx([0, 0], abs=1e-5)


def test_divergence_is_kl_when_every_token_is_kept():
    old, new = tiny_chat(), tiny_chat(seed=1)
    turn = Turn(old.prompt_ids("What?"), old.answer_ids("Paris."))
    vocabulary = len(old.tokenizer)
    p, q = (F.log_softmax(answer_logits(chat.model, [turn]).logits, -1) for chat in (old, new))
    expected = (p.exp() * (p - q)).sum(-1)
    best = p.topk(vocabulary, -1)
    found = kl_from(Prediction(best.indices, best.values), answer_logits(new.model, [turn]).logits)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    fewer = p.topk(20, -1)
    partial = kl_from(Prediction(fewer.indices, fewer.values), answer_logits(new.model, [turn]).logits)
    assert (partial <= expected + 1e-5).all()
    assert (partial > 0).all()


def test_every_epoch_shows_each_example_once_in_another_order(chat):
    group = Group("harmful", refusal_examples(chat, HARMFUL), 2)
    epochs = [
        [example for step in (2 * epoch, 2 * epoch + 1) for example in group.at(step, seed=0)] for epoch in range(6)
    ]
    assert all({id(e) for e in epoch} == {id(e) for e in group.examples} for epoch in epochs)
    assert len({tuple(id(e) for e in epoch) for epoch in epochs}) > 1
    assert group.at(3, seed=0) == group.at(3, seed=0)


def test_a_group_without_examples_is_an_error(chat):
    mask, groups = set_up(chat)
    with pytest.raises(UserError, match="no examples to train on in: empty"):
        tune(chat, [*groups, Group("empty", [], 1)], train_only=mask, recipe=RECIPE)


def test_a_mask_of_other_weights_is_refused(chat):
    mask, groups = set_up(chat)
    with pytest.raises(UserError, match="same shapes but other weights"):
        tune(tiny_chat(seed=1), groups, train_only=mask, recipe=RECIPE)
