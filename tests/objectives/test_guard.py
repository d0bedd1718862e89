"""The judge-guided objective: against finite differences, a brute-force transfer, and one case at a time."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from keelweight.errors import UserError
from keelweight.inputs.guard_formats import PAIR_CLASSIFIER, GuardFormat
from keelweight.inputs.guards import Guard
from keelweight.inputs.prompts import Prompt
from keelweight.inputs.responses import Response, respond
from keelweight.objectives import guard as module
from keelweight.objectives.guard import GuardObjective, by_index, end_to_end_safety, judged_cases, slopes_of
from keelweight.objectives.teacher_forcing import answer_logits
from keelweight.objectives.vocabulary import vocabulary_map
from keelweight.scores.esi import esi_scores
from keelweight.scores.gradients import gradients_to
from tests.tiny import (
    HARMFUL,
    HARMLESS,
    norms_in_float64,
    sentencepiece_tokenizer,
    tiny_chat,
    wordpiece_tokenizer,
)

TEMPLATE = "User: {{ prompt }}\nAnswer:\n{{ response }}\nVerdict:"


def classifier() -> Guard:
    """A random BERT in float64 with a lower-casing WordPiece vocabulary."""
    torch.manual_seed(3)
    tokenizer = wordpiece_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        initializer_range=0.3, id2label={0: "unsafe", 1: "safe"}, label2id={"unsafe": 0, "safe": 1},
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForSequenceClassification(config).double().eval().requires_grad_(False)
    return Guard(model, tokenizer, PAIR_CLASSIFIER)


def causal(tokenizer=None) -> Guard:
    """A random Llama in float64 that answers with a word, with a SentencePiece vocabulary unless given another."""
    torch.manual_seed(4)
    tokenizer = tokenizer or sentencepiece_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.3, max_position_embeddings=512,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    norms_in_float64(model)
    form = GuardFormat(name="own", kind="causal", template=TEMPLATE, safe=" kind", unsafe=" break")
    return Guard(model.requires_grad_(False), tokenizer, form)


GUARDS = {"wordpiece classifier": classifier, "sentencepiece causal": causal}


@pytest.fixture
def double():
    return tiny_chat(torch.float64)


def answers(chat, text: str | None = None) -> list[Response]:
    """Written answers to the tiny prompts: a random model's own would be noise."""
    texts = ["To pick a lock, break it.", "At night, the brave cat.", "Paris is kind.", "I can't."]
    return [
        Response(p, text or t, tuple(chat.tokenizer(text or t).input_ids), True)
        for p, t in zip(HARMFUL, texts, strict=True)
    ]


@pytest.mark.parametrize("name", GUARDS)
def test_the_transfer_equals_the_brute_force_matrix(double, name):
    """dS/d(one-hot) over the whole guard vocabulary, mapped and aligned with dense matrices."""
    guard = GUARDS[name]()
    cases, table, _ = judged_cases(double, guard, answers(double), cache=False)
    mapped = vocabulary_map(guard.tokenizer, double.tokenizer, cache=False)
    dense = torch.zeros(len(guard.tokenizer), len(double.tokenizer), dtype=torch.float64)
    dense.index_put_((mapped.guard_ids, mapped.model_ids), mapped.weights.double(), accumulate=True)
    embeddings = guard.embedding().weight.double()
    for case in cases:
        padded = guard.pad([case.reading])
        one_hot = F.one_hot(padded.ids, len(guard.tokenizer)).double().requires_grad_(True)
        guard.safety(one_hot @ embeddings, padded.attention_mask, padded.types).backward()
        expected = case.weights.double() @ one_hot.grad[0] @ dense
        found = case.slopes.double() @ table.double().T
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", GUARDS)
def test_slopes_are_the_derivative_of_the_verdict(double, name):
    guard = GUARDS[name]()
    reading = guard.read("How?", "To pick a lock, break it.")
    ((safety, slopes),) = slopes_of(guard, [reading], 1000)
    padded = guard.pad([reading])
    embeds = guard.embedding()(padded.ids)
    direction = torch.randn(embeds.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    above, below = (
        guard.safety(embeds + sign * 1e-6 * direction, padded.attention_mask, padded.types).item() for sign in (1, -1)
    )
    assert (slopes * direction[0]).sum().item() == pytest.approx((above - below) / 2e-6, rel=1e-6)
    assert guard.safety(embeds, padded.attention_mask, padded.types).item() == pytest.approx(safety)


@pytest.mark.parametrize("relaxation", ["gumbel", "softmax", "straight-through"])
@pytest.mark.parametrize("name", GUARDS)
def test_the_chain_matches_finite_differences(double, name, relaxation):
    guard = GUARDS[name]()
    cases, table, _ = judged_cases(double, guard, answers(double), cache=False)
    objective = GuardObjective(table.double(), relaxation=relaxation)
    weight = "model.layers.0.mlp.up_proj.weight"
    assert slope_error(double, weight, lambda: objective.linear(double.model, cases).sum()) < 1e-5


@pytest.mark.parametrize("relaxation", ["gumbel", "softmax"])
@pytest.mark.parametrize("name", GUARDS)
def test_the_end_to_end_graph_matches_finite_differences(double, name, relaxation):
    guard = GUARDS[name]()
    cases, table, _ = judged_cases(double, guard, answers(double), direction="reading", cache=False)
    weight = "model.layers.1.self_attn.v_proj.weight"

    def safety():
        options = {"relaxation": relaxation, "tau": 0.7}
        return sum(end_to_end_safety(double.model, guard, case, table.double(), **options) for case in cases)

    assert slope_error(double, weight, safety) < 1e-5


def slope_error(chat, name, function) -> float:
    """Relative error of the gradient along a random direction, against a central difference."""
    weight = dict(chat.model.named_parameters())[name]
    taken = {}
    with gradients_to({name: weight}, lambda n, gradient: taken.update({n: gradient.clone()})):
        function().backward()
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        weight += 1e-5 * direction
        above = function()
        weight -= 2e-5 * direction
        below = function()
    expected = ((above - below) / 2e-5).item()
    return abs((taken[name] * direction).sum().item() - expected) / abs(expected)


def test_with_one_vocabulary_the_stored_answer_end_to_end_is_the_guards_verdict(double):
    guard = causal(double.tokenizer)
    cases, table, transfer = judged_cases(double, guard, answers(double), cache=False)
    assert transfer.guard_vocabulary == transfer.model_vocabulary == 1
    assert transfer.aligned_characters == transfer.characters
    for case in cases:
        found = end_to_end_safety(double.model, guard, case, table.double(), relaxation="straight-through")
        assert found.item() == pytest.approx(case.safety, abs=1e-9)


def test_the_linear_form_is_the_end_to_end_gradient_where_the_model_is_sure(double):
    """With one vocabulary and a straight-through answer both take the derivative at the same point."""
    guard = causal(double.tokenizer)
    (case, *_), table, _ = judged_cases(double, guard, answers(double), cache=False)
    table = table.double()
    linear, direct = {}, {}
    weights = {n: p for n, p in double.model.named_parameters() if "down_proj" in n}
    options = {"relaxation": "straight-through", "tau": 0.5}
    with gradients_to(weights, lambda n, g: linear.update({n: g.clone()})):
        GuardObjective(table, **options)(double.model, [case]).sum().backward()
    with gradients_to(weights, lambda n, g: direct.update({n: g.clone()})):
        end_to_end_safety(double.model, guard, case, table, **options).backward()
    for name in weights:
        torch.testing.assert_close(linear[name], direct[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("relaxation", ["gumbel", "softmax"])
def test_a_case_does_not_depend_on_its_batch_or_on_the_chunk(double, relaxation, monkeypatch):
    cases, table, _ = judged_cases(double, classifier(), answers(double), cache=False)
    objective = GuardObjective(table.double(), relaxation=relaxation, seed=5)
    together = objective.linear(double.model, cases)
    alone = torch.cat([objective.linear(double.model, [case]) for case in reversed(cases)]).flip(0)
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)
    monkeypatch.setattr(module, "CHUNK", 3 * len(double.tokenizer))
    torch.testing.assert_close(objective.linear(double.model, cases), together, rtol=1e-9, atol=1e-9)
    if relaxation == "gumbel":
        other = GuardObjective(table.double(), seed=6).linear(double.model, cases)
        assert not torch.allclose(other, together)


def test_the_value_is_the_guards_verdict(double):
    cases, table, transfer = judged_cases(double, classifier(), answers(double), cache=False)
    found = GuardObjective(table.double())(double.model, cases)
    assert found.tolist() == pytest.approx([case.safety for case in cases])
    assert transfer.safety_mean == pytest.approx(found.mean().item())


def test_gumbel_noise_is_gumbel():
    """Mean of the Euler constant, variance pi^2 / 6: read off softmax's arguments through a two-word vocabulary."""
    logits = torch.zeros(20000, 2, dtype=torch.float64)
    table = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    turn = torch.zeros(20000, dtype=torch.long)
    p = module._RelaxedInnerProduct.apply(logits, torch.ones(20000, 1, dtype=torch.float64), table, 1.0, [1], turn, 0)
    difference = (p / (1 - p)).log()  # of two Gumbel variables: logistic, mean 0, variance pi^2 / 3
    assert difference.mean().item() == pytest.approx(0, abs=0.05)
    assert difference.var().item() == pytest.approx(torch.pi**2 / 3, rel=0.05)


def test_esi_scores_take_it(double):
    cases, table, _ = judged_cases(double, classifier(), answers(double), cache=False)
    scores = esi_scores(double, GuardObjective(table.double()), cases)
    assert scores.about["objective_mean"] == pytest.approx(sum(c.safety for c in cases) / 4)
    assert all(values.isfinite().all() and values.any() for values in scores.values.values())


HARD = {
    "non-Latin": "Привет, мир. 你好世界",
    "emoji": "ok \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 ok",
    "lines": "one\n\ntwo\t three   four ",
    "braces": "{response} {{ prompt }} %s [SEP] <|end|>",
}


@pytest.mark.parametrize("name", GUARDS)
@pytest.mark.parametrize("kind", HARD)
def test_odd_answers_are_scored_or_counted(double, name, kind):
    guard = GUARDS[name]()
    odd = Response(Prompt("odd", "How?"), HARD[kind], (5,), True)
    cases, table, transfer = judged_cases(double, guard, [*answers(double), odd], cache=False)
    assert len(cases) + sum(transfer.skipped.values()) == 5
    assert GuardObjective(table.double())(double.model, cases).isfinite().all()


def test_answers_that_cannot_be_judged_are_counted_with_their_reason(double):
    empty = Response(Prompt("e", "How?"), "", (), True)
    long = Response(Prompt("l", "How?"), "a kind dog " * 300, (5,), True)
    cases, _, transfer = judged_cases(double, causal(), [*answers(double), empty, long], cache=False)
    assert len(cases) == transfer.counted == 4
    assert transfer.skipped == {"empty answer": 1, "too long for the guard": 1}
    with pytest.raises(UserError, match="none of the 1 answers: 1 x empty answer"):
        judged_cases(double, causal(), [empty], cache=False)


def test_the_papers_alignment_pairs_positions(double):
    assert by_index(3, [None, (0, 1), (1, 2), None]).tolist() == [[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    guard = classifier()
    ours, _, _ = judged_cases(double, guard, answers(double), cache=False)
    papers, _, _ = judged_cases(double, guard, answers(double), alignment="index", cache=False)
    assert any(not torch.equal(one.slopes, other.slopes) for one, other in zip(ours, papers, strict=True))


def test_the_models_own_answers_go_through(double):
    cases, table, _ = judged_cases(
        double, classifier(), respond(double, [*HARMFUL, *HARMLESS], max_new_tokens=8), cache=False
    )
    assert answer_logits(double.model, [case.turn for case in cases]).logits.shape[1] == len(table)
