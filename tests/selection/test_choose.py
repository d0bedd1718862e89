"""Exact selection against a naive sort over everything."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keelweight.errors import UserError
from keelweight.inputs.layouts import Region, Slice
from keelweight.scores.store import Scores
from keelweight.selection import choose as module
from keelweight.selection.choose import choose, draw, top_k


def scores_of(*tensors: torch.Tensor, total: int | None = None) -> Scores:
    values = {f"layers.{i}.w": tensor for i, tensor in enumerate(tensors)}
    layout = tuple(Slice(name, "q" if i % 2 == 0 else "v", i) for i, name in enumerate(values))
    return Scores(values, layout, {"parameters": total or sum(t.numel() for t in tensors)})


def naive(scores: Scores, count: int, *, highest: bool = True) -> dict[str, list[int]]:
    """Sort all scores in Python; ties in order of parameter and position."""
    everything = [
        (score, number, at)
        for number, values in enumerate(scores.values.values())
        for at, score in enumerate(values.view(-1).tolist())
    ]
    everything.sort(key=lambda item: (-item[0] if highest else item[0], item[1], item[2]))
    names = list(scores.values)
    chosen: dict[str, list[int]] = {}
    for _, number, at in everything[:count]:
        chosen.setdefault(names[number], []).append(at)
    return {name: sorted(at) for name, at in chosen.items()}


def as_lists(mask) -> dict[str, list[int]]:
    return {name: positions.tolist() for name, positions in mask.indices.items()}


few_values = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=30)


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    rows=st.lists(few_values, min_size=1, max_size=4),
    chunk=st.sampled_from([1, 3, 7, 1 << 20]),
)
def test_top_and_bottom_equal_a_full_sort_with_many_ties(data, rows, chunk):
    scores = scores_of(*map(torch.tensor, rows))
    count = data.draw(st.integers(1, sum(map(len, rows))))
    before, module.CHUNK = module.CHUNK, chunk
    try:
        assert as_lists(choose(scores, count=count)) == naive(scores, count)
        assert as_lists(choose(scores, count=count, rule="bottom")) == naive(scores, count, highest=False)
    finally:
        module.CHUNK = before


def test_the_share_is_of_all_parameters():
    scores = scores_of(torch.rand(10, 10), torch.rand(20, 5), total=1000)
    assert len(top_k(scores, 0.05)) == 50
    assert top_k(scores, 0.05).source["share"] == 0.05


def test_random_has_the_same_budget_and_every_candidate_the_same_chance():
    scores = scores_of(torch.rand(6), torch.rand(2, 3))
    counts = torch.zeros(12)
    for seed in range(3000):
        mask = choose(scores, count=4, rule="random", seed=seed)
        assert len(mask) == 4
        for number, name in enumerate(scores.values):
            counts[number * 6 + mask.indices.get(name, torch.empty(0).long())] += 1
    # 3,000 draws of 4 from 12: each is expected 1,000 times, standard deviation 26.
    assert (counts - 1000).abs().max() < 130


@pytest.mark.parametrize(("population", "wanted"), [(1000, 10), (1000, 900), (7, 7), (1, 1), (10**12, 50)])
def test_draw_gives_different_numbers_in_range(population, wanted):
    drawn = draw(population, wanted, seed=3)
    assert len(drawn) == wanted == len(drawn.unique())
    assert drawn.min() >= 0
    assert drawn.max() < population
    assert torch.equal(drawn, draw(population, wanted, seed=3))


def test_roles_and_layers_narrow_the_candidates():
    scores = scores_of(torch.rand(4, 4), torch.rand(4, 4), torch.rand(4, 4), torch.rand(4, 4))
    assert set(choose(scores, count=20, roles=["v"]).indices) <= {"layers.1.w", "layers.3.w"}
    assert set(choose(scores, count=10, roles=["q"], layers=[2]).indices) == {"layers.2.w"}
    with pytest.raises(UserError, match="Scored roles are: q, v"):
        choose(scores, count=1, roles=["gate"])


def test_a_slice_of_a_fused_tensor_is_chosen_from_alone():
    values = torch.arange(12.0).view(6, 2)
    layout = (
        Slice("qkv", "q", 0, None, Region((), (slice(0, 2),))),
        Slice("qkv", "v", 0, None, Region((), (slice(4, 6),))),
    )
    scores = Scores({"qkv": values}, layout, {"parameters": 12})
    assert choose(scores, count=3, roles=["q"]).indices["qkv"].tolist() == [1, 2, 3]
    # Rows 2 and 3 are in no scored slice, so they are no candidates.
    assert choose(scores, count=6).indices["qkv"].tolist() == [2, 3, 8, 9, 10, 11]
    assert choose(scores, count=8).indices["qkv"].tolist() == [0, 1, 2, 3, 8, 9, 10, 11]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_scores_that_cannot_be_ranked_name_their_tensor(wrong):
    bad = torch.rand(5)
    bad[3] = wrong
    with pytest.raises(UserError, match=r"scores of layers\.1\.w hold 1 NaN or infinite"):
        choose(scores_of(torch.rand(5), bad), count=2)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"share": 0}, "share 0 is outside"),
        ({"share": 1.5}, "share 1.5 is outside"),
        ({"share": 0.001}, "less than one weight"),
        ({"count": 0}, "less than one weight"),
        ({"count": 11}, "only 10 of the 10 are candidates"),
        ({"share": 0.1, "count": 1}, "one of them"),
        ({}, "one of them"),
    ],
)
def test_impossible_budgets_are_errors(budget, message):
    with pytest.raises(UserError, match=message):
        choose(scores_of(torch.rand(10)), **budget)
