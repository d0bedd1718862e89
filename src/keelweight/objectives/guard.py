"""The judge-guided objective: what a guard thinks of the model's own answers, as a function of the model's weights.

The guard reads the answer once. The derivative of its verdict S with respect to the token at each place of the
answer is carried over to the model's tokens by the characters they share, and meets there the model's own
predictions. docs/method.md has the equations.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from keelweight.errors import UserError
from keelweight.inputs.guards import Guard, Reading, Unreadable
from keelweight.inputs.models import ChatModel
from keelweight.inputs.responses import Response
from keelweight.objectives.teacher_forcing import Turn, answer_logits, batch_positions
from keelweight.objectives.vocabulary import Direction, Span, VocabularyMap, overlap, vocabulary_map
from keelweight.progress import track

Relaxation = Literal["gumbel", "softmax", "straight-through"]
Alignment = Literal["characters", "index"]
CHUNK = 1 << 24
"""Elements of a [tokens x vocabulary] matrix that are worked on at a time, in fp32."""


@dataclass(frozen=True)
class JudgedCase:
    """One answer, and how the guard's verdict on it would change with every token.

    Attributes:
        turn: prompt and answer in the model's tokens.
        slopes: (answer tokens, guard width), fp32: dS / d(guard's input embedding), gathered at each answer token.
        safety: S, the guard's verdict on the answer as it stands.
        key: number that seeds this case's noise, from the prompt's id.
        reading: the answer as the guard reads it.
        weights: (answer tokens, guard tokens): how the two tokenisations overlap.
    """

    turn: Turn
    slopes: Float[Tensor, "answer_tokens width"]
    safety: float
    key: int
    reading: Reading
    weights: Float[Tensor, "answer_tokens guard_tokens"]

    @property
    def tokens(self) -> int:
        """Prompt and answer together, in the model's tokens."""
        return self.turn.tokens


@dataclass(frozen=True)
class Transfer:
    """How much of the answers and of the vocabularies could be carried over, and what was left out.

    Attributes:
        counted: answers that are scored with.
        skipped: reason -> answers left out.
        characters, aligned_characters: of the counted answers, and those that tokens of both sides cover.
        guard_vocabulary, model_vocabulary: share of either vocabulary that is mapped.
        safety_mean, safety_spread: mean and standard deviation of S over the counted answers.
    """

    counted: int
    skipped: Mapping[str, int]
    characters: int
    aligned_characters: int
    guard_vocabulary: float
    model_vocabulary: float
    safety_mean: float
    safety_spread: float


class GuardObjective:
    """S of a guard over the model's own answers; an `Objective` for `esi_scores`.

    Its value is the guard's S; its gradient is that of the sum over answer tokens t of <p_t, r_t>, where p_t is the
    model's relaxed prediction and r_t the derivative of S with respect to the token at t, over the model's vocabulary.

    Args:
        table: (model vocabulary, guard width): the guard's embeddings for the model's tokens.
        relaxation: "gumbel": softmax((logits + Gumbel noise) / tau), the paper's; "softmax": softmax(logits / tau);
            "straight-through": the stored answer's token in the forward pass and softmax(logits / tau) in the
            backward pass. <p, r> is linear in p, so here it has softmax's gradient; it differs end to end.
        tau: temperature; the paper's is 0.3.
        seed: of the noise. The noise of a case depends on this and on the case alone, never on its batch.
    """

    def __init__(
        self,
        table: Float[Tensor, "vocabulary width"],
        *,
        relaxation: Relaxation = "gumbel",
        tau: float = 0.3,
        seed: int = 0,
    ) -> None:
        if tau <= 0:
            raise UserError(f"temperature tau is {tau}. Expected more than 0; the paper's is 0.3.")
        self.table = table
        self.relaxation = relaxation
        self.tau = tau
        self.seed = seed

    def __call__(self, model: Any, cases: Sequence[JudgedCase]) -> Float[Tensor, " cases"]:
        """S of each case, (cases,), fp32: the guard's verdict, with the gradient of `linear`."""
        linear = self.linear(model, cases)
        return linear - linear.detach() + linear.new_tensor([case.safety for case in cases])

    def linear(self, model: Any, cases: Sequence[JudgedCase]) -> Float[Tensor, " cases"]:
        """The sum over answer tokens of <p_t, r_t> for each case, (cases,)."""
        answers = answer_logits(model, [case.turn for case in cases])
        slopes = torch.cat([case.slopes for case in cases]).to(answers.logits.device)
        keys = [case.key for case in cases] if self.relaxation == "gumbel" else None
        rows = _RelaxedInnerProduct.apply(answers.logits, slopes, self.table, self.tau, keys, answers.turn, self.seed)
        return rows.new_zeros(len(cases)).index_add(0, answers.turn, rows)


class _RelaxedInnerProduct(torch.autograd.Function):
    """Row t: <softmax((logits_t + noise_t) / tau), table @ slope_t>, in chunks of positions.

    The gradient with respect to the logits is p * (r - <p, r>) / tau. It is made in the forward pass, chunk by
    chunk, and kept in the logits' dtype: at no time is there more than one fp32 chunk of [tokens x vocabulary].
    """

    @staticmethod
    def forward(
        context: Any,
        logits: Tensor,
        slopes: Tensor,
        table: Tensor,
        tau: float,
        keys: list[int] | None,
        turn: Tensor,
        seed: int,
    ) -> Tensor:
        tokens, vocabulary = logits.shape
        values = torch.empty(tokens, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)
        values = values.to(logits.device)
        gradient = torch.empty_like(logits)
        start = 0
        # A case's noise comes from one generator, so chunks never cross cases.
        counts = torch.bincount(turn).tolist()
        for number, count in enumerate(counts):
            noise = _generator(seed, keys[number]) if keys is not None else None
            for first in range(0, count, max(1, CHUNK // vocabulary)):
                part = slice(start + first, start + min(first + max(1, CHUNK // vocabulary), count))
                z = logits[part].to(values.dtype)
                if noise is not None:
                    z = z - torch.empty(z.shape).exponential_(generator=noise).log_().to(z)  # + Gumbel(0, 1)
                p = z.div_(tau).softmax(-1)
                r = F.pad(slopes[part].to(table) @ table.T, (0, vocabulary - len(table))).to(p)
                value = (p * r).sum(-1)
                values[part] = value
                gradient[part] = p.mul_(r.sub_(value[:, None])).div_(tau).to(gradient.dtype)
            start += count
        context.save_for_backward(gradient)
        return values

    @staticmethod
    def backward(context: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = context.saved_tensors
        return gradient * outer[:, None].to(gradient.dtype), None, None, None, None, None, None


def _generator(seed: int, key: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + key) % (1 << 63))


def judged_cases(
    chat: ChatModel,
    guard: Guard,
    responses: Sequence[Response],
    *,
    direction: Direction = "pieces",
    alignment: Alignment = "characters",
    tokens_per_batch: int = 2048,
    cache: bool = True,
) -> tuple[list[JudgedCase], Float[Tensor, "vocabulary width"], Transfer]:
    """Let the guard read the answers: cases for a `GuardObjective`, its table, and what could be carried over.

    Args:
        chat: the model that gave the answers.
        guard: judges them.
        responses: the model's own answers.
        direction: of the vocabulary map, see `vocabulary_map`.
        alignment: "characters": guard and model tokens meet where they cover the same characters. "index": guard
            position i is paired with model position i, as in the paper's scripts, although the two drift apart.
        tokens_per_batch: padded guard tokens in a batch.
        cache: keep the vocabulary map on disk.

    Answers that are empty, too long for the guard, or share no character with what it reads are skipped and counted.

    Raises:
        UserError: not one answer is left.
    """
    read: list[tuple[Response, Turn, Reading, Tensor]] = []
    skipped: Counter[str] = Counter()
    characters = aligned = 0
    for response in responses:
        if not response.text:
            skipped["empty answer"] += 1
            continue
        encoded = chat.tokenizer(response.text, add_special_tokens=False, return_offsets_mapping=True)
        spans = [(start, end) for start, end in encoded.offset_mapping]
        try:
            reading = guard.read(response.prompt.prompt, response.text)
        except Unreadable as error:
            skipped[re.sub(r"\d+", "N", str(error)).split(":")[0]] += 1
            continue
        weights = overlap(spans, reading.spans) if alignment == "characters" else by_index(len(spans), reading.spans)
        if not len(spans) or not weights.any():
            skipped["no character of the answer could be aligned"] += 1
            continue
        characters += len(response.text)
        aligned += len(covered(spans) & covered([span for span in reading.spans if span is not None]))
        turn = Turn(chat.prompt_ids(response.prompt.prompt), tuple(encoded.input_ids))
        read.append((response, turn, reading, weights))
    if not read:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in skipped.items()) or "there are no answers"
        raise UserError(f"the guard could judge none of the {len(responses)} answers: {reasons}.")
    verdicts = slopes_of(guard, [reading for _, _, reading, _ in read], tokens_per_batch)
    cases = [
        JudgedCase(turn, weights.to(slopes) @ slopes, safety, case_key(response), reading, weights)
        for (response, turn, reading, weights), (safety, slopes) in zip(read, verdicts, strict=True)
    ]
    mapped = vocabulary_map(guard.tokenizer, chat.tokenizer, direction=direction, cache=cache)
    safety = torch.tensor([case.safety for case in cases])
    transfer = Transfer(
        len(cases),
        dict(skipped),
        characters,
        aligned,
        mapped.guard_share,
        mapped.model_share,
        float(safety.mean()),
        float(safety.std()) if len(cases) > 1 else 0.0,
    )
    return cases, table_for(chat, guard, mapped), transfer


def table_for(chat: ChatModel, guard: Guard, mapped: VocabularyMap) -> Float[Tensor, "vocabulary width"]:
    """The guard's embeddings for the model's tokens, fp32, on the model's device."""
    size = chat.model.get_output_embeddings().weight.shape[0]
    # The module's output, not its table: some models scale what they look up.
    with torch.no_grad():
        embeddings = guard.embedding()(torch.arange(guard.embedding().num_embeddings, device=guard.device))
    return mapped.project(embeddings, size).to(chat.device)


def slopes_of(guard: Guard, readings: Sequence[Reading], tokens_per_batch: int) -> list[tuple[float, Tensor]]:
    """For each reading: S, and dS / d(input embedding) at every guard token, (guard tokens, width), fp32."""
    found: dict[int, tuple[float, Tensor]] = {}
    cut = batch_positions(readings, tokens=tokens_per_batch)
    for batch in track(cut, "Judging", len(cut)):
        padded = guard.pad([readings[at] for at in batch])
        embeds = guard.embedding()(padded.ids).detach().requires_grad_(True)
        with torch.enable_grad():
            safety = guard.safety(embeds, padded.attention_mask, padded.types)
            (slopes,) = torch.autograd.grad(safety.sum(), embeds)
        wide = torch.promote_types(slopes.dtype, torch.float32)
        for row, at in enumerate(batch):
            found[at] = (safety[row].item(), slopes[row, : readings[at].tokens].to(wide).cpu())
    return [found[at] for at in range(len(readings))]


def end_to_end_safety(
    model: Any,
    guard: Guard,
    case: JudgedCase,
    table: Float[Tensor, "vocabulary width"],
    *,
    relaxation: Relaxation = "softmax",
    tau: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """S with the model's relaxed tokens fed straight to the guard as mixed embeddings: one graph, a scalar.

    Guard token g reads the mean of the mixed embeddings of the model tokens that wrote it, by shared characters.
    Exact where model and guard share a vocabulary; otherwise as good as the table (direction "reading"). It holds
    both models' activations at once, so it is for models and answers that fit.
    """
    answers = answer_logits(model, [case.turn])
    z = answers.logits.to(torch.promote_types(answers.logits.dtype, torch.float32))
    if relaxation == "gumbel":
        z = z - torch.empty(z.shape).exponential_(generator=_generator(seed, case.key)).log_().to(z)
    p = (z / tau).softmax(-1)
    if relaxation == "straight-through":
        p = F.one_hot(answers.targets, p.shape[-1]).to(p) + p - p.detach()
    mixed = p[:, : len(table)] @ table.to(p)
    padded = guard.pad([case.reading])
    own = guard.embedding()(padded.ids).detach()
    weights = case.weights.to(mixed)
    written = weights.sum(0) > 0
    embeds = torch.where(written[:, None], (weights.T @ mixed).to(own), own[0])[None]
    return guard.safety(embeds, padded.attention_mask, padded.types)[0]


def end_to_end(guard: Guard, table: Tensor, **options: Any) -> Any:
    """`end_to_end_safety` as an objective for `esi_scores`."""

    def objective(model: Any, cases: Sequence[JudgedCase]) -> Tensor:
        return torch.stack([end_to_end_safety(model, guard, case, table, **options) for case in cases])

    return objective


def by_index(model_tokens: int, guard_spans: Sequence[Span | None]) -> Tensor:
    """The paper's pairing: the i-th guard token of the answer with the i-th model token, the rest dropped."""
    weights = torch.zeros(model_tokens, len(guard_spans))
    answer = [column for column, span in enumerate(guard_spans) if span is not None]
    for row, column in zip(range(model_tokens), answer, strict=False):
        weights[row, column] = 1
    return weights


def covered(spans: Sequence[Span]) -> set[int]:
    """The characters inside the spans."""
    return {at for start, end in spans for at in range(start, end)}


def case_key(response: Response) -> int:
    """A number for the prompt, the same in every run."""
    return int.from_bytes(hashlib.sha256(response.prompt.id.encode()).digest()[:7], "big")
