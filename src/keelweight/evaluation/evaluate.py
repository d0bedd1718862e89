"""Safety and utility of a model in one pass: attack success, over-refusal, perplexity, drift."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from keelweight.errors import UserError
from keelweight.evaluation.judges import Judge, Verdict, refusal_phrase_judge
from keelweight.evaluation.rates import Rate, attack_success_rate, refusal_rate
from keelweight.inputs.models import ChatModel
from keelweight.inputs.prompts import Prompt
from keelweight.inputs.responses import Response, respond
from keelweight.objectives.teacher_forcing import Turn, answer_logits, batches
from keelweight.progress import track


@dataclass(frozen=True)
class Judged:
    """An answer and the verdict on it."""

    response: Response
    verdict: Verdict


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        answers: set name -> judged answers, in the order of the prompts.
        harmless_ppl: perplexity of reference answers to harmless prompts, per token; None without references.
        about: model, judge and generation settings.
    """

    answers: Mapping[str, Sequence[Judged]]
    harmless_ppl: float | None
    about: Mapping[str, Any] = field(default_factory=dict)

    def rates(self) -> dict[str, Rate]:
        """`asr` of the harmful set, `over_refusal` of the harmless and `borderline_refusal` of the borderline one."""
        by_set = {name: [answer.verdict for answer in answers] for name, answers in self.answers.items()}
        counts = {"harmful": attack_success_rate, "harmless": refusal_rate, "borderline": refusal_rate}
        names = {"harmful": "asr", "harmless": "over_refusal", "borderline": "borderline_refusal"}
        return {names[name]: counts[name](verdicts) for name, verdicts in by_set.items()}

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values: rates, perplexity, settings, and every answer with its verdict."""
        return {
            "about": dict(self.about),
            "rates": {name: rate.to_json() for name, rate in self.rates().items()},
            "harmless_ppl": self.harmless_ppl,
            "answers": {
                name: [
                    {
                        "id": answer.response.prompt.id,
                        "category": answer.response.prompt.category,
                        "prompt": answer.response.prompt.prompt,
                        "response": answer.response.text,
                        "complied": answer.verdict.complied,
                        "reason": answer.verdict.reason,
                    }
                    for answer in answers
                ]
                for name, answers in self.answers.items()
            },
        }


def evaluate(
    chat: ChatModel,
    sets: Mapping[str, Sequence[Prompt]],
    *,
    judge: Judge = refusal_phrase_judge,
    max_new_tokens: int = 48,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
) -> Evaluation:
    """Let the model answer every set, judge the answers, and measure harmless perplexity.

    Args:
        chat: the model; unchanged.
        sets: any of `harmful`, `harmless`, `borderline` -> prompts. Perplexity is measured on harmless prompts
            that come with a reference answer in `response`.
        judge: says whether an answer to a harmful prompt complied. Refusals of the other prompts are told by their
            phrases: a guard finds them safe, as it does the answers.
        max_new_tokens, temperature, top_p, seed, batch_size: as in `respond`.

    Raises:
        UserError: an unknown set, or an empty one.
    """
    known = ("harmful", "harmless", "borderline")
    for name, prompts in sets.items():
        if name not in known or not prompts:
            raise UserError(f"evaluation set {name!r} of {len(prompts)} prompts: expected prompts in any of {known}.")
    answers = {}
    for name, prompts in sets.items():
        responses = respond(
            chat,
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            batch_size=batch_size,
            what=f"Answering {name}",
        )
        verdict = judge if name == "harmful" else refusal_phrase_judge
        answers[name] = [Judged(given, verdict(given.prompt.prompt, given.text)) for given in responses]
    references = [prompt for prompt in sets.get("harmless", ()) if prompt.response]
    turns = [Turn(chat.prompt_ids(p.prompt), chat.answer_ids(p.response)) for p in references]
    about = {
        "model": dict(chat.source),
        "judge": getattr(judge, "__name__", "") or str(judge),
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
    }
    return Evaluation(answers, perplexity(chat, turns) if turns else None, about)


@torch.inference_mode()
def perplexity(chat: ChatModel, turns: Sequence[Turn], *, tokens_per_batch: int = 512) -> float:
    """exp(mean negative log-probability) over all answer tokens of `turns`."""
    total, tokens = 0.0, 0
    cut = batches(turns, tokens=tokens_per_batch)
    for batch in track(cut, "Perplexity", len(cut)):
        answers = answer_logits(chat.model, batch)
        total += float(F.cross_entropy(answers.logits.float(), answers.targets, reduction="sum"))
        tokens += len(answers.targets)
    return math.exp(total / tokens)


@torch.inference_mode()
def answer_log_probabilities(chat: ChatModel, turns: Sequence[Turn]) -> list[Tensor]:
    """The model's full prediction at every answer token: one (answer tokens, vocabulary) bf16 tensor a turn."""
    found = []
    for turn in track(turns, "Recording predictions", len(turns)):
        logits = answer_logits(chat.model, [turn]).logits
        found.append(F.log_softmax(logits.float(), dim=-1).bfloat16().cpu())
    return found


@torch.inference_mode()
def mean_kl(chat: ChatModel, turns: Sequence[Turn], reference: Sequence[Tensor]) -> float:
    """Mean over answer tokens of KL(reference || model), in nats; `reference` from `answer_log_probabilities`."""
    total, tokens = 0.0, 0
    for turn, old in track(list(zip(turns, reference, strict=True)), "Divergence", len(turns)):
        logits = answer_logits(chat.model, [turn]).logits
        new = F.log_softmax(logits.float(), dim=-1)
        total += float(F.kl_div(new, old.to(new), log_target=True, reduction="sum"))
        tokens += len(turn.answer_ids)
    return total / tokens
