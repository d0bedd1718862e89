"""SafeAdamW against torch's own AdamW, and every other bit against itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from keelweight.errors import UserError
from keelweight.inputs.layouts import Slice
from keelweight.selection.mask import Mask
from keelweight.tuning.safe_adamw import SafeAdamW


def network(dtype=torch.float32) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def mask_of(model: nn.Module, positions: dict[str, list[int]] | None = None) -> Mask:
    """A mask of the given positions, or of everything."""
    weights = dict(model.named_parameters())
    chosen = {
        name: torch.arange(weights[name].numel()) if positions is None else torch.tensor(positions[name])
        for name in (weights if positions is None else positions)
    }
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    return Mask(chosen, shapes, tuple(Slice(name, "up") for name in shapes), {})


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(step)
    dtype = next(model.parameters()).dtype
    inputs, targets = torch.randn(16, 6, generator=rng), torch.randn(16, 3, generator=rng)
    return ((model(inputs.to(dtype)) - targets.to(dtype)) ** 2).mean()


def train(model, optimizer, steps=10, start=0, clip=None):
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        if clip is not None:
            if isinstance(optimizer, SafeAdamW):
                optimizer.clip_grad_norm_(clip)
            else:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


SOME = {"0.weight": [0, 7, 13, 40], "0.bias": [2], "2.weight": [1, 2, 23]}
OPTIONS = [{}, {"weight_decay": 0.1}, {"betas": (0.5, 0.9), "eps": 1e-4}, {"amsgrad": True}, {"fused": True}]


@pytest.mark.parametrize("keep_grads", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_mask_of_everything_is_torchs_adamw(options, keep_grads):
    ours, theirs = network(), network()
    masked = SafeAdamW(ours.named_parameters(), train_only=mask_of(ours), lr=1e-2, keep_grads=keep_grads, **options)
    plain = torch.optim.AdamW(theirs.parameters(), lr=1e-2, **{"weight_decay": 0.0} | options)
    train(ours, masked)
    train(theirs, plain)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)


@pytest.mark.parametrize("keep_grads", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_other_bit_changes_and_every_chosen_weight_moves(dtype, keep_grads):
    model = network(dtype)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    mask = mask_of(model, SOME)
    optimizer = SafeAdamW(model.named_parameters(), train_only=mask, lr=3e-2, weight_decay=0.5, keep_grads=keep_grads)
    train(model, optimizer, clip=0.5)
    for name, weight in model.named_parameters():
        chosen = torch.zeros(weight.numel(), dtype=torch.bool)
        chosen[mask.indices.get(name, [])] = True
        after, old = weight.detach().view(-1), before[name].view(-1)
        assert torch.equal(after[~chosen], old[~chosen]), name
        assert (after[chosen] != old[chosen]).all(), name


def test_some_weights_follow_torch_with_the_rest_held_fixed():
    """The oracle: torch's AdamW on a vector that is put into the model before every forward pass."""
    model = network()
    mask = mask_of(model, SOME)
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    vector = nn.Parameter(torch.cat([weights[name].view(-1)[at] for name, at in mask.indices.items()]))
    plain = torch.optim.AdamW([vector], lr=1e-2, weight_decay=0.1)
    for step in range(10):
        plain.zero_grad()
        placed, start = {}, 0
        for name, weight in weights.items():
            at = mask.indices.get(name)
            flat = weight.view(-1)
            if at is not None:
                flat = flat.index_put((at,), vector[start : start + len(at)])
                start += len(at)
            placed[name] = flat.view(weight.shape)
        rng = torch.Generator().manual_seed(step)
        inputs, targets = torch.randn(16, 6, generator=rng), torch.randn(16, 3, generator=rng)
        ((torch.func.functional_call(model, placed, inputs) - targets) ** 2).mean().backward()
        plain.step()
    optimizer = SafeAdamW(model.named_parameters(), train_only=mask, lr=1e-2, weight_decay=0.1, keep_grads=False)
    train(model, optimizer)
    torch.testing.assert_close(optimizer.masters[0].detach(), vector.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("keep_grads", [True, False])
def test_accumulated_gradients_are_summed(keep_grads):
    one, two = network(), network()
    first = SafeAdamW(one.named_parameters(), train_only=mask_of(one, SOME), lr=1e-2, keep_grads=keep_grads)
    second = SafeAdamW(two.named_parameters(), train_only=mask_of(two, SOME), lr=1e-2, keep_grads=keep_grads)
    for step in range(5):
        first.zero_grad()
        (loss_of(one, step) + loss_of(one, step + 100)).backward()
        first.step()
        second.zero_grad()
        loss_of(two, step).backward()
        loss_of(two, step + 100).backward()
        second.step()
    torch.testing.assert_close(first.masters[0].detach(), second.masters[0].detach(), rtol=0, atol=1e-6)


def test_a_scheduler_sets_the_learning_rate():
    model = network()
    optimizer = SafeAdamW(model.named_parameters(), train_only=mask_of(model, SOME), lr=1e-2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0)
    train(model, optimizer, 1)
    schedule.step()
    before = [weight.detach().clone() for weight in model.parameters()]
    train(model, optimizer, 1)
    assert all(torch.equal(weight, old) for weight, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_dict_round_trip_goes_on_to_the_same_bits(dtype):
    straight, broken = network(dtype), network(dtype)
    whole = SafeAdamW(straight.named_parameters(), train_only=mask_of(straight, SOME), lr=1e-2)
    train(straight, whole, 10)
    first = SafeAdamW(broken.named_parameters(), train_only=mask_of(broken, SOME), lr=1e-2)
    train(broken, first, 4)
    fresh = network(dtype)
    resumed = SafeAdamW(fresh.named_parameters(), train_only=mask_of(fresh, SOME), lr=1e-2)
    resumed.load_state_dict(first.state_dict())
    train(fresh, resumed, 6, start=4)
    assert torch.equal(whole.masters[0], resumed.masters[0])
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), fresh.parameters(), strict=True))


def test_masters_keep_what_half_precision_rounds_away():
    """At lr 1e-5 a bfloat16 weight near 1 would never move; its master does, and in the end so does the weight."""
    model = nn.Linear(2, 1, bias=False).to(torch.bfloat16)
    nn.init.ones_(model.weight)
    optimizer = SafeAdamW(model.named_parameters(), train_only=mask_of(model), lr=1e-4)
    for _ in range(100):
        optimizer.zero_grad()
        model(torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
    assert optimizer.masters[0].tolist() == pytest.approx([0.99, 0.99], abs=1e-4)
    assert (model.weight < 1).all()


def test_state_exists_for_the_chosen_weights_only():
    model = network()
    optimizer = SafeAdamW(model.named_parameters(), train_only=mask_of(model, SOME), lr=1e-2)
    train(model, optimizer, 1)
    state = optimizer.state_dict()["state"]
    held = sum(t.numel() for moments in state.values() for t in moments.values() if t.ndim)
    assert held == 2 * sum(map(len, SOME.values()))


def test_packing_at_once_frees_every_full_gradient():
    model = network()
    with SafeAdamW(model.named_parameters(), train_only=mask_of(model, SOME), keep_grads=False) as optimizer:
        loss_of(model, 0).backward()
        assert model[0].weight.grad is None
        assert optimizer.masters[0].grad.abs().sum() > 0
    loss_of(model, 0).backward()
    assert model[0].weight.grad is not None  # closed: the model is its own again


def test_what_would_silently_not_train_is_refused():
    model = network()
    mask = mask_of(model, SOME)
    prefixed = [(f"base_model.{name}", weight) for name, weight in model.named_parameters()]
    with pytest.raises(UserError, match=r"0\.weight, which is not among the 4 parameters given"):
        SafeAdamW(prefixed, train_only=mask)
    model[0].weight.requires_grad_(False)
    with pytest.raises(UserError, match="does not require a gradient"):
        SafeAdamW(model.named_parameters(), train_only=mask)
    with pytest.raises(UserError, match="has shape"):
        SafeAdamW([("0.weight", nn.Parameter(torch.zeros(2, 2)))], train_only=mask)


def test_the_state_of_another_mask_is_refused():
    model = network()
    one = SafeAdamW(model.named_parameters(), train_only=mask_of(model, SOME))
    other = SafeAdamW(model.named_parameters(), train_only=mask_of(model))
    with pytest.raises(UserError, match="the optimizer state is for 83 weights, the mask has 8"):
        one.load_state_dict(other.state_dict())
