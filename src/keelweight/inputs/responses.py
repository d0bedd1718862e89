"""The model's own answers: batched, sorted by length, greedy or seeded sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig

from keelweight.errors import UserError
from keelweight.inputs.models import ChatModel
from keelweight.inputs.prompts import Prompt
from keelweight.progress import track


@dataclass(frozen=True)
class Response:
    """What a model answered.

    Attributes:
        prompt: what it was asked.
        text: the answer, without special tokens.
        token_ids: its tokens, without padding and end-of-turn.
        finished: the model ended its turn; False if it ran into the limit.
    """

    prompt: Prompt
    text: str
    token_ids: tuple[int, ...]
    finished: bool


@torch.inference_mode()
def respond(
    chat: ChatModel,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 48,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    what: str = "Answering",
) -> list[Response]:
    """Answers to `prompts`, in their order.

    Args:
        chat: the model that answers.
        prompts: what it is asked.
        max_new_tokens: the most tokens an answer may have.
        temperature: 0 is greedy; above 0 samples (the paper evaluates at 0.9 with top_p 0.95).
        top_p: nucleus for sampling.
        seed: for sampling. The same prompts, batch size and seed give the same answers; the random state of the
            caller is left as it was.
        batch_size: prompts answered together. Prompts of like length share a batch, padded on the left.
        what: name of the progress bar.

    Raises:
        UserError: a temperature below 0, or no room for an answer.
    """
    if temperature < 0 or max_new_tokens < 1:
        raise UserError(
            f"temperature {temperature} with {max_new_tokens} new tokens: expected 0 or more, and 1 or more."
        )
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        pad_token_id=chat.pad_id,
        eos_token_id=sorted(chat.stop_ids),
        **sampling,
    )
    encoded = [chat.prompt_ids(prompt.prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda at: (-len(encoded[at]), at))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    answers: dict[int, Response] = {}
    cuda = [chat.device.index or 0] if chat.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        for batch in track(batches, what, len(batches)):
            width = max(len(encoded[at]) for at in batch)
            ids = torch.full((len(batch), width), chat.pad_id)
            attended = torch.zeros_like(ids)
            for row, at in enumerate(batch):
                ids[row, width - len(encoded[at]) :] = torch.tensor(encoded[at])
                attended[row, width - len(encoded[at]) :] = 1
            output = chat.model.generate(
                input_ids=ids.to(chat.device),
                attention_mask=attended.to(chat.device),
                generation_config=config,
            )
            for at, tokens in zip(batch, output[:, width:].tolist(), strict=True):
                stop = next((i for i, token in enumerate(tokens) if token in chat.stop_ids), len(tokens))
                text = chat.tokenizer.decode(tokens[:stop], skip_special_tokens=True).strip()
                answers[at] = Response(prompts[at], text, tuple(tokens[:stop]), stop < len(tokens))
    return [answers[at] for at in range(len(prompts))]
