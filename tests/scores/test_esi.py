"""ESI against a closed form, finite differences and one prompt at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from keelweight.errors import UserError
from keelweight.objectives.likelihood import refusal_cases, refusal_likelihood
from keelweight.scores.esi import esi, esi_scores
from keelweight.scores.gradients import measure_gradients
from keelweight.scores.store import load_scores
from tests.tiny import HARMFUL, tiny_chat


class Number:
    """A case that is one input vector."""

    tokens = 1

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x


def linear(model: nn.Module, cases: list[Number]) -> torch.Tensor:
    return torch.stack([(model.weight @ case.x).sum() for case in cases])


def test_esi_of_a_linear_objective_is_known_by_hand():
    """The gradient of sum(W @ x) is x in every row: the mean over cases is the mean input."""
    model = nn.Linear(3, 2, bias=False)
    cases = [Number(torch.tensor(x)) for x in ([1.0, -2.0, 0.5], [3.0, 0.0, -0.5], [2.0, -1.0, 0.0])]
    meter = measure_gradients(model, linear, cases, {"weight": model.weight})
    mean = meter.sums["weight"] / 3
    assert torch.allclose(mean, torch.tensor([[2.0, -1.0, 0.0]] * 2))
    weight = model.weight.detach()
    sigma = ((weight - weight.mean()) ** 2).sum().div(weight.numel() - 1).sqrt()
    assert torch.allclose(esi(mean, weight), torch.tensor([[2.0, 1.0, 0.0]] * 2) * sigma)


def test_the_absolute_reduction_is_the_mean_of_absolute_gradients():
    model = nn.Linear(3, 1, bias=False)
    cases = [Number(torch.tensor(x)) for x in ([1.0, -2.0, 0.5], [3.0, 0.0, -0.5])]
    meter = measure_gradients(model, linear, cases, {"weight": model.weight}, absolute=True, tokens_per_batch=100)
    assert torch.allclose(meter.sums["weight"] / 2, torch.tensor([[2.0, 1.0, 0.5]]))


def test_one_weight_alone_has_no_spread():
    assert esi(torch.tensor([[5.0]]), torch.tensor([[2.0]])).tolist() == [[0.0]]


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.v_proj.weight", "model.layers.1.mlp.down_proj.weight"])
def test_gradients_match_finite_differences(name):
    chat = tiny_chat(torch.float64)
    cases = refusal_cases(chat, HARMFUL)
    weights = {name: dict(chat.model.named_parameters())[name]}
    found = measure_gradients(chat.model, objective_in_float64, cases, weights).sums[name]
    rng = torch.Generator().manual_seed(1)
    direction = torch.randn(found.shape, generator=rng, dtype=torch.float64)
    step = 1e-5
    with torch.no_grad():
        weights[name] += step * direction
        above = objective_in_float64(chat.model, cases).sum()
        weights[name] -= 2 * step * direction
        below = objective_in_float64(chat.model, cases).sum()
    slope = (above - below) / (2 * step)
    assert (found.double() * direction).sum().item() == pytest.approx(slope.item(), rel=1e-6)


def objective_in_float64(model, cases):
    """`refusal_likelihood` takes log-probabilities in float32; finite differences need more digits."""
    from keelweight.objectives.teacher_forcing import answer_logits, mean_by_turn

    answers = answer_logits(model, [case.refusal for case in cases])
    log_probability = answers.logits.log_softmax(-1).gather(-1, answers.targets[:, None]).squeeze(-1)
    return mean_by_turn(log_probability, answers.turn, len(cases))


def test_scores_do_not_depend_on_the_batch_size(chat):
    cases = refusal_cases(chat, HARMFUL)
    small = esi_scores(chat, refusal_likelihood, cases, tokens_per_batch=1)
    large = esi_scores(chat, refusal_likelihood, cases, tokens_per_batch=4096)
    assert small.about["objective_mean"] == pytest.approx(large.about["objective_mean"], abs=1e-6)
    for name, values in small.values.items():
        assert torch.allclose(values, large.values[name], rtol=1e-3, atol=1e-7), name


def test_sums_are_float32_and_gradients_are_freed_whatever_the_dtype():
    chat = tiny_chat(torch.bfloat16)
    cases = refusal_cases(chat, HARMFUL)
    alive = []

    def watched(model, batch):
        alive.append(sum(p.grad is not None for p in model.parameters()))
        return refusal_likelihood(model, batch)

    scores = esi_scores(chat, watched, cases, tokens_per_batch=1)
    assert {values.dtype for values in scores.values.values()} == {torch.float32}
    assert alive == [0] * len(HARMFUL)
    assert all(p.grad is None and not p.requires_grad for p in chat.model.parameters())


def test_at_most_one_gradient_is_alive_in_a_backward_pass(chat):
    """Every gradient is taken and dropped before the next one is made."""
    cases = refusal_cases(chat, HARMFUL)
    weights = {n: p for n, p in chat.model.named_parameters() if "proj" in n}
    most = 0

    from keelweight.scores.gradients import gradients_to

    def take(name, gradient):
        nonlocal most
        most = max(most, sum(p.grad is not None for p in weights.values()))

    with gradients_to(weights, take):
        refusal_likelihood(chat.model, cases).sum().backward()
    assert most == 1


def test_only_the_papers_roles_are_scored(chat):
    scores = esi_scores(chat, refusal_likelihood, refusal_cases(chat, HARMFUL))
    assert {piece.role for piece in scores.layout} == {"q", "k", "v", "o", "gate", "up", "down", "head"}
    assert not any("norm" in name or "embed" in name for name in scores.values)


def test_a_tied_head_is_not_scored():
    chat = tiny_chat(tied=True)
    scores = esi_scores(chat, refusal_likelihood, refusal_cases(chat, HARMFUL))
    assert "head" not in {piece.role for piece in scores.layout}


def test_scores_come_back_from_disk(chat, tmp_path):
    scores = esi_scores(chat, refusal_likelihood, refusal_cases(chat, HARMFUL), source={"objective": "refusal"})
    scores.save(tmp_path / "s.safetensors")
    loaded = load_scores(tmp_path / "s.safetensors")
    assert loaded.layout == scores.layout
    assert loaded.about == scores.about
    assert all(torch.equal(loaded.values[name], values) for name, values in scores.values.items())


def test_nothing_to_score_is_an_error(chat):
    with pytest.raises(UserError, match="no weights to score"):
        esi_scores(chat, refusal_likelihood, refusal_cases(chat, HARMFUL), roles=["router"])
    with pytest.raises(UserError, match="no prompts"):
        esi_scores(chat, refusal_likelihood, [])
