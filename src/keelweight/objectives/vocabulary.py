"""Two tokenizers, one text: which tokens of one stand for a token of the other, and where their tokens overlap."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from keelweight.files import read_tensors, write_tensors
from keelweight.inputs.builtin import cache_folder

KIND = "vocabulary map"
ANCHOR = "\n"
"""Text put before a token's text when it is tokenised again, so that no tokenizer adds a space of its own."""

Direction = Literal["pieces", "reading"]
Span = tuple[int, int]


@dataclass(frozen=True)
class VocabularyMap:
    """Pairs of a guard token and a model token, with a weight.

    Attributes:
        guard_ids, model_ids: (pairs,), int64.
        weights: (pairs,), fp32.
        guard_share, model_share: share of either vocabulary that is in a pair.
    """

    guard_ids: Int[Tensor, " pairs"]
    model_ids: Int[Tensor, " pairs"]
    weights: Float[Tensor, " pairs"]
    guard_share: float
    model_share: float

    def project(
        self, embeddings: Float[Tensor, "guard_vocab width"], model_vocab: int
    ) -> Float[Tensor, "model_vocab width"]:
        """The guard's embedding table for the model's tokens: row v is the weighted sum over the pairs of v, fp32.

        With this table no step needs a matrix of [tokens x guard vocabulary].
        """
        table = torch.zeros(model_vocab, embeddings.shape[1], dtype=torch.float32, device=embeddings.device)
        for at in torch.arange(len(self.weights)).split(1 << 16):
            rows = embeddings[self.guard_ids[at].to(embeddings.device)].float()
            rows *= self.weights[at, None].to(embeddings.device)
            table.index_add_(0, self.model_ids[at].to(embeddings.device), rows)
        return table


def vocabulary_map(guard: Any, model: Any, *, direction: Direction = "pieces", cache: bool = True) -> VocabularyMap:
    """Which model tokens stand for which guard tokens.

    Args:
        guard, model: fast tokenizers.
        direction: "pieces", the paper's: every guard token is tokenised again by the model's tokenizer, each of its
            n pieces with weight 1/n. "reading": every model token is tokenised again by the guard's tokenizer, so
            that a model token stands for the mean of what the guard would read there. Equal vocabularies are
            mapped one to one either way.
        cache: keep the map on disk under the digest of the two tokenizers.

    Special tokens, and tokens that are a part of a character, have no text and are in no pair.
    """
    if guard.get_vocab() == model.get_vocab():
        same = torch.tensor(sorted(guard.get_vocab().values()))
        return VocabularyMap(same, same, torch.ones(len(same)), 1.0, 1.0)
    path = cache_folder() / "vocabulary" / f"{direction}-{pair_digest(guard, model)}.safetensors"
    if cache and path.exists():
        tensors, about = read_tensors(path, kind=KIND)
        return VocabularyMap(
            tensors["guard_ids"],
            tensors["model_ids"],
            tensors["weights"],
            about["guard_share"],
            about["model_share"],
        )
    if direction == "pieces":
        guard_ids, model_ids, weights = pieces_of(guard, model)
    else:
        model_ids, guard_ids, weights = pieces_of(model, guard)
    guard_share = len(guard_ids.unique()) / len(guard.get_vocab())
    model_share = len(model_ids.unique()) / len(model.get_vocab())
    found = VocabularyMap(guard_ids, model_ids, weights, guard_share, model_share)
    if cache:
        tensors = {"guard_ids": guard_ids, "model_ids": model_ids, "weights": weights}
        write_tensors(
            path,
            tensors,
            kind=KIND,
            about={"guard_share": guard_share, "model_share": model_share},
            force=True,
        )
    return found


def pieces_of(source: Any, target: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Every token of `source` in pieces of `target`: source ids, target ids, weights 1/n; (pairs,) each."""
    texts = token_texts(source)
    ids = list(texts)
    anchored = target.backend_tokenizer.encode_batch([ANCHOR + texts[i] for i in ids], add_special_tokens=False)
    prefix = getattr(target.backend_tokenizer.model, "continuing_subword_prefix", None)
    vocabulary = target.get_vocab()
    unknown = target.unk_token_id
    pairs: list[tuple[int, int, float]] = []
    for token, encoding in zip(ids, anchored, strict=True):
        text = texts[token]
        pieces = [
            piece
            for piece, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
            if start >= len(ANCHOR) and end > start
        ]
        crosses = any(start < len(ANCHOR) < end for start, end in encoding.offsets)
        if crosses:  # the text begins like the anchor, so the two merged
            pieces = target.backend_tokenizer.encode(text, add_special_tokens=False).ids
        if pieces and prefix and not text[:1].isspace():  # WordPiece: a token without a space goes on a word
            first = target.convert_ids_to_tokens(pieces[0])
            pieces[0] = vocabulary.get(prefix + first, pieces[0])
        pieces = [piece for piece in pieces if piece != unknown]
        pairs += [(token, piece, 1 / len(pieces)) for piece in pieces]
    source_ids, target_ids, weights = zip(*pairs, strict=True) if pairs else ((), (), ())
    return (
        torch.tensor(source_ids).long(),
        torch.tensor(target_ids).long(),
        torch.tensor(weights, dtype=torch.float32),
    )


def token_texts(tokenizer: Any) -> dict[int, str]:
    """Token id -> the text it stands for inside a longer text (with its space, where it begins a word).

    The decoder says what that is, whatever its scheme (byte-level, SentencePiece, WordPiece): the text that a token
    adds behind a letter. Special tokens and parts of characters are left out.
    """
    vocabulary = tokenizer.get_vocab()
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    letter = next(vocabulary[c] for c in ("a", "▁a", "Ġa", "e", "▁e", "Ġe") if c in vocabulary)
    ids = sorted(set(vocabulary.values()) - special)
    backend = tokenizer.backend_tokenizer
    before = backend.decode([letter], skip_special_tokens=False)
    decoded = backend.decode_batch([[letter, token] for token in ids], skip_special_tokens=False)
    return {
        token: text.removeprefix(before)
        for token, text in zip(ids, decoded, strict=True)
        if text.startswith(before) and len(text) > len(before) and "\ufffd" not in text
    }


def pair_digest(guard: Any, model: Any) -> str:
    """SHA-256 over both tokenizers, shortened to 24 digits."""
    both = guard.backend_tokenizer.to_str() + "\0" + model.backend_tokenizer.to_str()
    return hashlib.sha256(both.encode()).hexdigest()[:24]


def overlap(
    model_spans: Sequence[Span], guard_spans: Sequence[Span | None]
) -> Float[Tensor, "model_tokens guard_tokens"]:
    """How much of each guard token lies under each model token, in characters of the same text.

    A column sums to 1 if any model token touches that guard token, so what the guard feels at one token is shared
    out over the model tokens that wrote it; it is 0 for tokens of the template (None) and for tokens nobody wrote.
    """
    weights = torch.zeros(len(model_spans), len(guard_spans))
    first = 0
    for column, span in enumerate(guard_spans):
        if span is None or span[0] == span[1]:
            continue
        while first < len(model_spans) and model_spans[first][1] <= span[0]:
            first += 1
        row = first
        while row < len(model_spans) and model_spans[row][0] < span[1]:
            weights[row, column] = max(0, min(span[1], model_spans[row][1]) - max(span[0], model_spans[row][0]))
            row += 1
    return weights / weights.sum(0, keepdim=True).clamp_min(1e-9)
