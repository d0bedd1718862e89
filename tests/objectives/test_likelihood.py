"""The likelihood of refusing, against the model's own full logits."""

from __future__ import annotations

import pytest
import torch

from keelweight.errors import UserError
from keelweight.inputs.responses import respond
from keelweight.objectives.likelihood import RefusalCase, refusal_cases, refusal_likelihood
from keelweight.objectives.teacher_forcing import Turn, answer_logits, batches
from tests.tiny import HARMFUL, tiny_chat


def by_hand(model, turn: Turn) -> float:
    """Mean log-probability of the answer, from a plain forward pass over one sequence."""
    ids = torch.tensor([turn.prompt_ids + turn.answer_ids])
    logits = model(input_ids=ids).logits[0].log_softmax(-1)
    start = len(turn.prompt_ids)
    return sum(logits[start - 1 + i, token] for i, token in enumerate(turn.answer_ids)).item() / len(turn.answer_ids)


def test_it_is_the_mean_log_probability_of_the_refusal(chat):
    cases = refusal_cases(chat, HARMFUL)
    expected = [by_hand(chat.model, case.refusal) for case in cases]
    assert refusal_likelihood(chat.model, cases).tolist() == pytest.approx(expected, abs=1e-5)


def test_the_contrast_subtracts_the_models_own_answer(chat):
    answers = respond(chat, HARMFUL, max_new_tokens=6)
    cases = refusal_cases(chat, HARMFUL, answers)
    mixed = [cases[0], RefusalCase(cases[1].refusal), *cases[2:]]
    expected = [
        by_hand(chat.model, case.refusal) - (by_hand(chat.model, case.compliance) if case.compliance else 0)
        for case in mixed
    ]
    assert refusal_likelihood(chat.model, mixed).tolist() == pytest.approx(expected, abs=1e-5)


def test_a_case_does_not_depend_on_the_cases_beside_it():
    chat = tiny_chat(torch.float64)
    cases = refusal_cases(chat, HARMFUL)
    together = refusal_likelihood(chat.model, cases)
    alone = torch.cat([refusal_likelihood(chat.model, [case]) for case in cases])
    # Log-probabilities are taken in float32, so that is the agreement to expect.
    assert torch.allclose(together, alone, rtol=0, atol=1e-6)


def test_the_head_runs_on_answer_positions_only(chat):
    cases = refusal_cases(chat, HARMFUL)
    seen = []
    handle = chat.model.lm_head.register_forward_hook(lambda _, inputs, output: seen.append(output.shape))
    answers = answer_logits(chat.model, [case.refusal for case in cases])
    handle.remove()
    tokens = sum(len(case.refusal.answer_ids) for case in cases)
    assert [tuple(shape[:-1]) for shape in seen] == [(1, tokens)]
    assert answers.logits.shape[0] == tokens


def test_answers_end_as_the_chat_template_ends_them(chat):
    end = chat.tokenizer.convert_tokens_to_ids("<|end|>")
    assert all(case.refusal.answer_ids[-1] == end for case in refusal_cases(chat, HARMFUL))


def test_a_prompt_without_a_refusal_is_an_error(chat):
    from keelweight.inputs.prompts import Prompt

    with pytest.raises(UserError, match="'q1' has no refusal"):
        refusal_cases(chat, [Prompt("q1", "How?")])


def test_batches_hold_everything_once_within_the_token_limit():
    turns = [Turn((1,) * length, (2,)) for length in (3, 50, 7, 8, 20, 9, 9)]
    cut = batches(turns, tokens=40)
    assert sorted(t.tokens for batch in cut for t in batch) == sorted(t.tokens for t in turns)
    assert all(len(batch) * max(t.tokens for t in batch) <= 40 for batch in cut if len(batch) > 1)
    assert batches(turns, tokens=40, size=1) == [[t] for t in sorted(turns, key=lambda t: -t.tokens)]
