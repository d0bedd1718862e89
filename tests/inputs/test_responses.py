"""Answers: batching, order, sampling."""

from __future__ import annotations

import pytest
import torch

from keelweight.errors import UserError
from keelweight.inputs.responses import respond
from tests.tiny import HARMFUL, HARMLESS, tiny_chat

PROMPTS = [*HARMFUL, *HARMLESS]


def greedy_by_hand(chat, prompt: str, tokens: int) -> list[int]:
    """One token at a time, without cache, padding or generate."""
    ids = list(chat.prompt_ids(prompt))
    answer = []
    for _ in range(tokens):
        token = int(chat.model(input_ids=torch.tensor([ids + answer])).logits[0, -1].argmax())
        if token in chat.stop_ids:
            break
        answer.append(token)
    return answer


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_batched_greedy_answers_are_those_of_one_prompt_at_a_time(batch_size):
    chat = tiny_chat(torch.float64)
    answers = respond(chat, PROMPTS, max_new_tokens=8, batch_size=batch_size)
    assert [answer.prompt for answer in answers] == PROMPTS
    assert [list(a.token_ids) for a in answers] == [greedy_by_hand(chat, p.prompt, 8) for p in PROMPTS]
    assert [a.finished for a in answers] == [len(a.token_ids) < 8 for a in answers]


def test_sampling_is_seeded_and_leaves_the_callers_random_state(chat):
    state = torch.random.get_rng_state()
    one, two, other = (
        [a.token_ids for a in respond(chat, PROMPTS, max_new_tokens=8, temperature=0.9, top_p=0.95, seed=seed)]
        for seed in (1, 1, 2)
    )
    assert one == two != other
    assert torch.equal(torch.random.get_rng_state(), state)


def test_impossible_settings_are_errors(chat):
    with pytest.raises(UserError, match="temperature -1"):
        respond(chat, PROMPTS, temperature=-1)
    with pytest.raises(UserError, match="0 new tokens"):
        respond(chat, PROMPTS, max_new_tokens=0)
