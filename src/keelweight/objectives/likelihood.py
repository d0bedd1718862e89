"""How likely the model is to refuse: an objective that needs no guard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from keelweight.errors import UserError
from keelweight.inputs.models import ChatModel
from keelweight.inputs.prompts import Prompt
from keelweight.inputs.responses import Response
from keelweight.objectives.teacher_forcing import Turn, answer_logits, mean_by_turn


@dataclass(frozen=True)
class RefusalCase:
    """A harmful prompt with a refusal, and the model's own compliant answer where the objective is contrastive."""

    refusal: Turn
    compliance: Turn | None = None

    @property
    def tokens(self) -> int:
        """Length of its longest sequence."""
        return max(self.refusal.tokens, self.compliance.tokens if self.compliance else 0)


def refusal_cases(
    chat: ChatModel, prompts: Sequence[Prompt], own_answers: Sequence[Response] | None = None
) -> list[RefusalCase]:
    """Cases for `refusal_likelihood`, one for each prompt.

    Args:
        chat: gives tokenizer and chat template.
        prompts: harmful prompts whose `response` is a refusal.
        own_answers: the model's own answers to the same prompts, to make the objective contrastive.

    Raises:
        UserError: a prompt has no refusal, or an own answer is empty or belongs to another prompt.
    """
    if own_answers is not None and [answer.prompt.id for answer in own_answers] != [p.id for p in prompts]:
        raise UserError("the model's own answers are not those to the given prompts, in the same order.")
    cases = []
    for at, prompt in enumerate(prompts):
        if not prompt.response:
            raise UserError(
                f"prompt {prompt.id!r} has no refusal to measure. Expected one in the field 'response' "
                "of every harmful prompt."
            )
        ids = chat.prompt_ids(prompt.prompt)
        own = None
        if own_answers is not None:
            if not own_answers[at].token_ids:
                raise UserError(f"prompt {prompt.id!r}: the model's own answer is empty, so there is no contrast.")
            own = Turn(ids, own_answers[at].token_ids)
        cases.append(RefusalCase(Turn(ids, chat.answer_ids(prompt.response)), own))
    return cases


def refusal_likelihood(model: Any, cases: Sequence[RefusalCase]) -> Float[Tensor, " cases"]:
    """S of each case: mean log-probability of the refusal's tokens given the prompt, in nats per token, fp32.

    Where a case has a compliant answer, that answer's mean log-probability is subtracted. Higher is safer.
    Source: docs/method.md, "Objective". S of a case does not depend on the cases beside it.
    """
    contrasts = [case for case in cases if case.compliance is not None]
    turns = [case.refusal for case in cases] + [case.compliance for case in contrasts if case.compliance]
    likelihood = mean_log_likelihood(model, turns)
    score = likelihood[: len(cases)]
    if contrasts:
        at = [i for i, case in enumerate(cases) if case.compliance is not None]
        score = score.index_add(0, score.new_tensor(at).long(), -likelihood[len(cases) :])
    return score


def mean_log_likelihood(model: Any, turns: Sequence[Turn]) -> Float[Tensor, " turns"]:
    """Mean log-probability of each turn's answer tokens given its prompt, in nats per token, fp32."""
    answers = answer_logits(model, turns)
    log_probability = -F.cross_entropy(answers.logits.float(), answers.targets, reduction="none")
    return mean_by_turn(log_probability, answers.turn, len(turns))
