"""Vocabulary maps and alignments, against brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keelweight.objectives.vocabulary import overlap, token_texts, vocabulary_map
from tests.tiny import SENTENCES, sentencepiece_tokenizer, tiny_tokenizer, wordpiece_tokenizer

TOKENIZERS = {
    "byte-level": tiny_tokenizer,
    "sentencepiece": sentencepiece_tokenizer,
    "wordpiece": wordpiece_tokenizer,
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_token_texts_put_together_are_the_text(name):
    tokenizer = TOKENIZERS[name]()
    texts = token_texts(tokenizer)
    for sentence in SENTENCES:
        ids = tokenizer(sentence, add_special_tokens=False).input_ids
        together = "".join(texts[token] for token in ids)
        if name == "wordpiece":  # lower case; where spaces stood around punctuation is not kept
            assert together.replace(" ", "") == sentence.lower().replace(" ", "")
        else:
            assert together.strip() == sentence


def test_special_tokens_and_parts_of_characters_have_no_text():
    tokenizer = tiny_tokenizer()
    texts = token_texts(tokenizer)
    assert tokenizer.eos_token_id not in texts
    half = tokenizer("é", add_special_tokens=False).input_ids
    assert len(half) == 2
    assert not set(half) & set(texts)


def test_equal_vocabularies_are_mapped_one_to_one():
    mapped = vocabulary_map(tiny_tokenizer(), tiny_tokenizer())
    assert torch.equal(mapped.guard_ids, mapped.model_ids)
    assert mapped.guard_share == mapped.model_share == 1
    table = torch.rand(len(tiny_tokenizer()), 5)
    assert torch.equal(mapped.project(table, len(table)), table)


@pytest.mark.parametrize("guard", ["sentencepiece", "wordpiece"])
def test_every_guard_token_is_shared_out_over_its_pieces(guard):
    judge, model = TOKENIZERS[guard](), tiny_tokenizer()
    mapped = vocabulary_map(judge, model, cache=False)
    total = torch.zeros(len(judge)).index_add(0, mapped.guard_ids, mapped.weights)
    assert torch.allclose(total[mapped.guard_ids.unique()], torch.ones(()))
    texts, pieces = token_texts(judge), token_texts(model)
    for token in mapped.guard_ids.unique().tolist():
        at = (mapped.guard_ids == token).nonzero().view(-1)
        assert "".join(pieces[i] for i in mapped.model_ids[at].tolist()) == texts[token]


def test_read_by_wordpiece_a_model_token_inside_a_word_goes_on_that_word():
    judge, model = wordpiece_tokenizer(), tiny_tokenizer()
    mapped = vocabulary_map(judge, model, direction="reading", cache=False)
    inside = model.convert_tokens_to_ids("h")
    (at,) = (mapped.model_ids == inside).nonzero().view(-1).tolist()
    assert judge.convert_ids_to_tokens(int(mapped.guard_ids[at])) == "##h"
    total = torch.zeros(len(model)).index_add(0, mapped.model_ids, mapped.weights)
    assert torch.allclose(total[mapped.model_ids.unique()], torch.ones(()))


def test_projection_equals_the_dense_map():
    judge, model = sentencepiece_tokenizer(), tiny_tokenizer()
    mapped = vocabulary_map(judge, model, cache=False)
    dense = torch.zeros(len(judge), len(model)).index_put(
        (mapped.guard_ids, mapped.model_ids), mapped.weights, accumulate=True
    )
    embeddings = torch.randn(len(judge), 7)
    assert torch.allclose(mapped.project(embeddings, len(model)), dense.T @ embeddings, atol=1e-6)


def test_the_map_comes_back_from_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("KEELWEIGHT_CACHE", str(tmp_path))
    judge, model = wordpiece_tokenizer(), tiny_tokenizer()
    first = vocabulary_map(judge, model)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    again = vocabulary_map(judge, model)
    assert torch.equal(first.weights, again.weights)
    assert torch.equal(first.model_ids, again.model_ids)
    assert first.guard_share == again.guard_share


@given(st.lists(st.integers(1, 5), max_size=8), st.lists(st.one_of(st.none(), st.integers(0, 5)), max_size=8))
def test_overlap_counts_shared_characters(model_lengths, guard_lengths):
    """Guard tokens of None are the template's; of 0 characters, the parts of a character."""
    model_spans, at = [], 0
    for length in model_lengths:
        model_spans.append((at, at + length))
        at += length
    guard_spans, at = [], 0
    for length in guard_lengths:
        guard_spans.append(None if length is None else (at, at + length))
        at += length or 0
    found = overlap(model_spans, guard_spans)
    for column, span in enumerate(guard_spans):
        shared = [0 if span is None else len(set(range(*span)) & set(range(*model))) for model in model_spans]
        expected = [count / sum(shared) if sum(shared) else 0.0 for count in shared]
        assert found[:, column].tolist() == pytest.approx(expected)


def test_bytes_of_one_character_share_it():
    """Byte-level offsets give every byte of an emoji the whole emoji."""
    assert overlap([(0, 1), (0, 1), (1, 3)], [(0, 1), (1, 2), (2, 3)]).tolist() == [
        [0.5, 0, 0],
        [0.5, 0, 0],
        [0, 1, 1],
    ]
