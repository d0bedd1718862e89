"""Every causal LM of the installed transformers: each slice is what it says it is, by the model's own arithmetic.

Per architecture, on a tiny random model:
- partition: every element of every parameter is in exactly one slice;
- attention: layer-0 attention probabilities depend on every row of q and k, and on no row of v, o or a gate;
- order: the MLP's inner activation is affine in the weights of `up`, and is not in those of `gate`;
- neuron: with row j of the first factors zero, column j of `down` has no gradient: axes and neurons correspond;
- routing: exactly the experts that the router chose have a gradient.
"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from keelweight.inputs import families as facts
from keelweight.inputs.families import FAMILIES, Experts, Family, Rows, Stack
from keelweight.inputs.layouts import Slice, UnknownLayout, slices
from tests.inputs.tiny_configs import MODEL_TYPES, UNBUILDABLE, VARIANTS, run, tiny_model

NAMES = [*MODEL_TYPES, *VARIANTS]
Families = Mapping[str, Family]

LOOKS = {"q", "k", "qk", "kv", "q_a", "kv_a", "kv_gate"}
"""Roles that attention probabilities depend on."""
BLIND = {"v", "o", "o_a", "attn_gate", "gate", "up", "down"}
"""Roles that the attention probabilities of the same layer do not depend on."""

NO_FORWARD = {"gemma4_unified_assistant": "takes hidden states and keys of the model it assists"}
NO_ATTENTION = {
    **NO_FORWARD,
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm"), "has none"),
    "reformer": "returns probabilities without a gradient",
}
"""Architectures whose attention probabilities cannot be had, and why."""
LATER_ATTENTION = {"longcat_flash": ".self_attn.1."}
"""The second attention in each layer, of architectures with two."""
NO_V = {"deepseek_v4": "keys are values"}
LOOKS_AT_V = dict.fromkeys(("doge", "doge with experts"), "makes its mask of values; has a v_proj of its own")
TWO_MLPS = {"doge with experts": "its one-neuron experts share the module of the dense MLP: see the test below"}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# ------------------------------------------------------------------------------------------------ the mapping


def test_every_architecture_of_transformers_has_a_row_or_a_reason() -> None:
    built = {name: type_of(name) for name in MODEL_TYPES}
    without = {name: model_type for name, model_type in built.items() if model_type not in FAMILIES}
    assert not without, f"new in transformers: give them a row in families.py: {without}"
    assert set(UNBUILDABLE) <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert len(MODEL_TYPES) >= 150
    assert len(set(MODEL_TYPES) - set(NO_ATTENTION)) >= 150


def test_a_model_type_without_a_row_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(facts.FAMILIES, "qwen3_moe")  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="give them a row"):
        test_every_architecture_of_transformers_has_a_row_or_a_reason()


def type_of(name: str) -> str:
    with torch.device("meta"):
        return tiny_model(name).config.model_type


# -------------------------------------------------------------------------------------------------- partition


def check_partition(model: nn.Module, families: Families | None = None) -> None:
    seen = {name: torch.zeros(p.shape, dtype=torch.int8) for name, p in model.named_parameters()}
    for piece in slices(model, families):
        piece.region.of(seen[piece.parameter]).add_(1)
    for name, counts in seen.items():
        assert counts.min() == counts.max() == 1, name


@pytest.mark.parametrize("name", NAMES)
def test_every_element_is_in_exactly_one_slice(name: str) -> None:
    check_partition(tiny_model(name))


# -------------------------------------------------------------------------------------------------- attention


def check_attention(model: Any, families: Families | None = None) -> set[str] | None:
    """The roles that were proved in the first layer with attention; None if its probabilities cannot be had."""
    given = getattr(run(model, output_attentions=True), "attentions", None) or ()
    exposed = [a for a in given if isinstance(a, Tensor) and a.ndim == 4 and a.grad_fn is not None]
    if not exposed:
        return None
    mixed_sum(exposed[0]).backward()
    rows: dict[int, list[tuple[Slice, Tensor]]] = defaultdict(list)
    for piece, gradient in gradients(model, families, LOOKS | BLIND):
        if piece.layer is not None and LATER_ATTENTION.get(model.config.model_type, " ") not in piece.parameter:
            rows[piece.layer].append((piece, piece.matrix(gradient).abs().sum(1) > 0))
    layer = max(at for at, found in rows.items() if any(p.role in LOOKS and r.any() for p, r in found))
    for piece, moves in rows[layer]:
        what = f"{piece.parameter} {piece.role} {piece.expert}"
        if piece.role == "v" and model.config.model_type in LOOKS_AT_V:
            assert moves.all(), f"{what}: {LOOKS_AT_V[model.config.model_type]}?"
        elif piece.role in BLIND:
            assert not moves.any(), f"{what}: {int(moves.sum())} rows change the attention probabilities"
        elif piece.expert is None:
            assert moves.all(), f"{what}: {int((~moves).sum())} rows do not change the attention probabilities"
    return {piece.role for piece, _ in rows[layer]}


@pytest.mark.parametrize("name", NAMES)
def test_attention_probabilities_depend_on_q_and_k_and_not_on_v(name: str) -> None:
    if name in NO_FORWARD:
        return
    proved = check_attention(tiny_model(name))
    if name in NO_ATTENTION:
        assert proved is None, "attention is exposed now: take it off the list"
    else:
        assert proved is not None
        assert "v" in proved or name in NO_V
        assert proved & LOOKS


LINEAR = {
    "qwen3_next": "torch_chunk_gated_delta_rule",
    "qwen3_5_text": "torch_chunk_gated_delta_rule",
    "qwen3_5_moe_text": "torch_chunk_gated_delta_rule",
    "qwen4_exp_text": "torch_chunk_gated_delta_rule",
    "olmo_hybrid": "torch_chunk_gated_delta_rule",
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_attention_gets_query_key_and_value_from_the_rows_that_say_so(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(name)
    module = __import__(type(model).__module__, fromlist=["x"])
    rule, calls = getattr(module, LINEAR[name]), []

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append((*args, *(kwargs[n] for n in ("query", "key", "value")[len(args) :])))
        return rule(*args, **kwargs)

    monkeypatch.setattr(module, LINEAR[name], spy)
    run(model)
    check_inputs(model, dict(zip(("q", "k", "v"), calls[0], strict=False)), "linear_attn")


def test_lightning_attention_splits_head_by_head(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("minimax")
    split, parts = torch.split, []

    def spy(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = split(tensor, *args, **kwargs)
        if len(found) == 3 and tensor.ndim == 4:  # query, key and value of every head, in this order
            parts.append(found)
        return found

    monkeypatch.setattr(torch, "split", spy)
    run(model)
    check_inputs(model, dict(zip(("q", "k", "v"), parts[0], strict=True)), "qkv_proj")


def check_inputs(model: nn.Module, inputs: Mapping[str, Tensor], where: str) -> None:
    """In the first layer, each input depends on all rows of its role and on no row of another."""
    for role, tensor in inputs.items():
        model.zero_grad()
        mixed_sum(tensor).backward(retain_graph=True)
        for piece, gradient in gradients(model, None, {"q", "k", "v", "attn_gate"}):
            if piece.layer == 0 and where in piece.parameter:
                moves = piece.matrix(gradient).abs().sum(1) > 0
                assert moves.all() if piece.role == role else not moves.any(), (role, piece.role, piece.parameter)


# -------------------------------------------------------------------------------------------------------- MLPs


def mlps(model: nn.Module, families: Families | None) -> list[tuple[Slice | None, Slice, Slice]]:
    """Gate, up and down of every MLP and of every expert: those of a layer whose names have most in common."""
    groups: dict[Any, dict[str, list[Slice]]] = defaultdict(lambda: defaultdict(list))
    for piece in slices(model, families):
        if piece.role in ("gate", "up", "down") and piece.layer is not None:
            groups[piece.layer, piece.expert][piece.role].append(piece)

    def partner(down: Slice, others: list[Slice]) -> Slice | None:
        def closeness(other: Slice) -> tuple[int, bool]:
            return shared_words(other.parameter, down.parameter), other.region == down.region

        return max(others, key=closeness, default=None)

    return [
        (partner(down, found["gate"]), up, down)
        for found in groups.values()
        for down in found["down"]
        if (up := partner(down, found["up"])) is not None
    ]


def shared_words(one: str, other: str) -> int:
    words = [a == b for a, b in zip(one.split("."), other.split("."), strict=False)]
    return next((n for n, same in enumerate(words) if not same), len(words))


def check_order(model: Any, families: Families | None = None) -> int:
    """Proves gate and up of the first layer that has them. Returns the number of MLPs and stacks, 0 without a gate.

    f(w) + f(-w) - 2 f(0) is zero for what is affine in w.
    """
    gated = [mlp for mlp in mlps(model, families) if mlp[0] is not None]
    first = [mlp for mlp in gated if mlp[2].layer == min(down.layer or 0 for _, _, down in gated)]
    weights = dict(model.named_parameters())
    for name in dict.fromkeys(down.parameter for _, _, down in first):
        bends = {}
        for at, role in enumerate(("gate", "up")):
            pieces = [mlp[at] for mlp in first if mlp[2].parameter == name]
            parts = [p.region.of(weights[p.parameter].data) for p in pieces if p is not None]
            before = [part.clone() for part in parts]
            values = []
            for sign in (1, -1, 0):
                for part, old in zip(parts, before, strict=True):
                    part.copy_(old * sign)
                values.append(inner(model, name, families))
            for part, old in zip(parts, before, strict=True):
                part.copy_(old)
            plus, minus, zero = values
            bends[role] = float((plus + minus - 2 * zero).abs().max() / (plus - zero).abs().max())
        assert bends["up"] < 1e-4, f"{name}: not affine in up: {bends}"
        assert bends["gate"] > 1e-2, f"{name}: affine in gate: {bends}"
    return len({down.parameter for _, _, down in first})


def inner(model: Any, down: str, families: Families | None) -> Tensor:
    """What goes into the matrix `down`; of a stack of experts, what comes out of the module."""
    caught: list[Tensor] = []
    owner = down.rpartition(".")[0] if not down.endswith("mlp.w2") else down.rsplit(".", 2)[0]  # dbrx
    roles = {p.role for p in slices(model, families) if p.parameter.startswith(f"{owner}.")}
    module = model.get_submodule(owner)
    if roles <= {"down", "bias"}:
        hook = module.register_forward_pre_hook(lambda _, args: caught.append(args[0].clone()))
    else:
        hook = module.register_forward_hook(lambda _, args, out: caught.append(out.clone()))
    try:
        with torch.no_grad():
            run(model)
    finally:
        hook.remove()
    return caught[0]


@pytest.mark.parametrize("name", NAMES)
def test_gate_and_up_are_told_apart_by_the_activation(name: str) -> None:
    if name in NO_FORWARD | TWO_MLPS:
        return
    proved = check_order(tiny_model(name))
    assert proved or "gate" not in {piece.role for piece in slices(tiny_model(name))}


def check_neurons(model: Any, families: Families | None = None, neuron: int = 1) -> tuple[int, int]:
    """Proves axes of all MLPs. Returns how many MLPs and experts had a gradient, and how many there are."""
    weights = dict(model.named_parameters())
    for piece in slices(model, families):
        if piece.role in ("bias", "adapter"):
            piece.region.of(weights[piece.parameter].data).zero_()
    found = mlps(model, families)
    for gate, up, _ in found:
        first = gate or up
        part = first.region.of(weights[first.parameter].data)
        part.select(0 if first.output_axis == 0 else 1, neuron).zero_()
    mixed_sum(run(model).logits).backward()
    live = 0
    for _, _, down in found:
        gradient = weights[down.parameter].grad
        columns = down.matrix(gradient).abs().sum(0) if gradient is not None else torch.zeros(1)
        if columns.max() > 0:
            live += 1
            what = f"{down.parameter} {down.expert}"
            assert columns[neuron] < 1e-4 * columns.max(), f"{what}: column {neuron} still has a gradient"
            assert (columns > 0).sum() > len(columns) / 2, f"{what}: other columns have none"
    return live, len(found)


DEAD_MLPS = {"mllama": "layers of cross attention do not run on text"}


@pytest.mark.parametrize("name", NAMES)
def test_a_zero_neuron_leaves_its_column_of_down_without_gradient(name: str) -> None:
    if name in NO_FORWARD | TWO_MLPS:
        return
    model = tiny_model(name)
    live, found = check_neurons(model)
    without_mlp = {"mamba", "mamba2", "falcon_mamba"}
    assert live >= 1 or name in without_mlp
    if not any(piece.expert is not None for piece in slices(model)):
        assert live == found or name in DEAD_MLPS


def test_one_neuron_experts_of_doge() -> None:
    model = tiny_model("doge with experts")
    rows = {p.parameter: p for p in slices(model) if p.parameter.startswith("model.layers.0.mlp.")}
    up, down = rows["model.layers.0.mlp.down_embed.weight"], rows["model.layers.0.mlp.up_embed.weight"]
    weights = dict(model.named_parameters())
    mixed_sum(run(model).logits).backward()
    assert (up.role, down.role) == ("up", "down")
    reached = down.matrix(weights[down.parameter].grad).abs().sum(0) > 0
    assert torch.equal(reached, up.matrix(weights[up.parameter].grad).abs().sum(1) > 0)
    neuron = int(reached.nonzero()[0])
    model.zero_grad()
    weights[up.parameter].data[neuron] = 0
    mixed_sum(run(model).logits).backward()
    reached[neuron] = False
    assert torch.equal(reached, down.matrix(weights[down.parameter].grad).abs().sum(0) > 0)


# -------------------------------------------------------------------------------------------------------- routing


def check_routing(model: Any, families: Families | None = None) -> int:
    """Proves the expert slices of all layers. Returns the number of stacks, 0 without experts.

    Two tokens reach some experts and not all. Where the module of experts is handed the choice, it is compared.
    """
    chosen: dict[str, set[int]] = {}

    def catch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            index = next((a for a in args if isinstance(a, Tensor) and a.dtype == torch.int64), None)
            if index is not None and index.ndim == 2:
                chosen[name] = set(index.flatten().tolist())

        return hook

    stacked = {p.parameter for p in slices(model, families) if p.expert is not None and p.role != "bias"}
    for name in dict.fromkeys(parameter.rpartition(".")[0] for parameter in stacked):
        model.get_submodule(name).register_forward_pre_hook(catch(name))
    mixed_sum(run(model, tokens=2).logits).backward()
    touched: dict[tuple[str, str], set[int]] = defaultdict(set)
    sizes: dict[tuple[str, str], int] = defaultdict(int)
    for piece, gradient in gradients(model, families, {"gate", "up", "down", "o"}):
        if piece.expert is not None:
            sizes[piece.parameter, piece.role] += 1
            touched[piece.parameter, piece.role] |= {piece.expert} if piece.region.of(gradient).any() else set()
    for (parameter, role), experts in touched.items():
        owner, count = parameter.rpartition(".")[0], sizes[parameter, role]
        assert 0 < len(experts) < count, f"{parameter} {role}: {len(experts)} of {count} experts have a gradient"
        if owner in chosen:
            real = min(sizes[key] for key in sizes if key[0].startswith(f"{owner}."))  # longcat: some are no matrix
            assert experts == {e for e in chosen[owner] if e < real}, f"{parameter} {role}: not those chosen"
    by_block: dict[str, set[frozenset[int]]] = defaultdict(set)
    for (parameter, _), experts in touched.items():
        block = re.sub(r"\.(?:experts|input_linear|output_linear)\b.*", "", parameter)
        by_block[block].add(frozenset(experts))
    for block, sets in by_block.items():
        assert len(sets) == 1, f"{block}: roles differ in their experts: {sets}"
    return len({parameter for parameter, _ in touched})


ROUTED = [n for n in NAMES if n not in NO_FORWARD]


@pytest.mark.parametrize("name", ROUTED)
def test_the_routed_experts_are_those_with_a_gradient(name: str) -> None:
    model = tiny_model(name)
    has_experts = any(p.expert is not None and p.role != "bias" for p in slices(model))
    assert bool(check_routing(model)) == has_experts


def test_how_many_architectures_have_experts() -> None:
    with torch.device("meta"):
        routed = [n for n in MODEL_TYPES if any(p.expert is not None for p in slices(tiny_model(n)))]
    assert len(routed) >= 50


# ------------------------------------------------------------------------------------------- these checks can fail


def swapped(model_type: str, rules: Mapping[str, Any]) -> Families:
    family = FAMILIES[model_type]
    return {**FAMILIES, model_type: Family({**family.rules, **rules}, family.layers, family.stacks)}


WRONG = {
    "phi3 q|v|k": ("phi3", {"self_attn.qkv_proj": Rows(q=2, v=1, k=1)}, check_attention),
    "codegen q|k|v": ("codegen", {"attn.qkv_proj": Rows(4, q=1, k=1, v=1)}, check_attention),
    "codegen without blocks": ("codegen", {"attn.qkv_proj": Rows(q=1, v=1, k=1)}, check_attention),
    "bloom without heads": ("bloom", {"self_attention.query_key_value": Rows(q=1, k=1, v=1)}, check_attention),
    "gpt2 v first": ("gpt2", {"attn.c_attn": Rows(v=1, q=1, k=1)}, check_attention),
    "llama v is k": ("llama", {"self_attn.v_proj": "k", "self_attn.k_proj": "v"}, check_attention),
    "deepseek_v3 v first": (
        "deepseek_v3", {"self_attn.kv_b_proj": Rows("num_heads", v="v_head_dim", k="qk_nope_head_dim")},
        check_attention,
    ),
    "deepseek_v3 without heads": ("deepseek_v3", {"self_attn.kv_b_proj": Rows(k=4, v=3)}, check_attention),
    "qwen3_next gate halves": ("qwen3_next", {"self_attn.q_proj": Rows(q=1, attn_gate=1)}, check_attention),
    "phi3 up first": ("phi3", {"mlp.gate_up_proj": Rows(up=1, gate=1)}, check_order),
    "llama up is gate": ("llama", {"mlp.gate_proj": "up", "mlp.up_proj": "gate"}, check_order),
    "lfm2 w1 is up": ("lfm2", {"feed_forward.w1": "up", "feed_forward.w3": "gate"}, check_order),
    "qwen3_moe interleaved": ("qwen3_moe", {"mlp.experts.*": Stack(concatenated=False)}, check_order),
    "gpt_oss concatenated": ("gpt_oss", {"mlp.experts.*": Stack(concatenated=True)}, check_neurons),
    "gpt_oss not transposed": ("gpt_oss", {"mlp.experts.*": Stack(transposed=False)}, check_neurons),
    "llama4 not transposed": ("llama4_text", {"feed_forward.experts.*": Stack(False, True)}, check_neurons),
    "dbrx w2 transposed": (
        "dbrx", {"experts.mlp.w2": Experts({"down": 1}, count="moe_num_experts", output_axis=0)}, check_neurons,
    ),
    "gpt2 mlp as Linear": ("gpt2", {"mlp.c_proj": facts.Matrix("down", output_axis=0)}, check_neurons),
    "jetmoe up first": ("jetmoe", {"mlp.input_linear": Experts({"up": 1, "gate": 1})}, check_order),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_row_is_found(what: str) -> None:
    model_type, rules, check = WRONG[what]
    name = {"llama4_text": "llama4"}.get(model_type, model_type)
    with pytest.raises(AssertionError):
        check(tiny_model(name), swapped(model_type, rules))
    check(tiny_model(name))


def test_slices_that_overlap_or_miss_elements_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("phi3")
    rows = Rows(q="32", k="16", v="15")
    with pytest.raises(UnknownLayout, match="63 outputs, it has 64"):
        list(slices(model, swapped("phi3", {"self_attn.qkv_proj": rows})))
    good = list(slices(model))
    monkeypatch.setitem(globals(), "slices", lambda *_: [*good, good[0]])
    with pytest.raises(AssertionError):
        check_partition(model)
    monkeypatch.setitem(globals(), "slices", lambda *_: good[1:])
    with pytest.raises(AssertionError):
        check_partition(model)


def test_experts_under_wrong_numbers_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3_moe")
    shifted = [
        piece if piece.expert is None else Slice(piece.parameter, piece.role, piece.layer, (piece.expert + 1) % 6,
                                                 piece.region, piece.output_axis)
        for piece in slices(model)
    ]  # fmt: skip
    monkeypatch.setitem(globals(), "slices", lambda *_: shifted)
    with pytest.raises(AssertionError, match="not those chosen"):
        check_routing(model)


# ----------------------------------------------------------------------------------------------------- helpers


def gradients(model: nn.Module, families: Families | None, roles: set[str]) -> Iterator[tuple[Slice, Tensor]]:
    """Slices of `roles` with the gradient of their parameter; zeros where it has none."""
    weights = dict(model.named_parameters())
    for piece in slices(model, families):
        if piece.role in roles:
            weight = weights[piece.parameter]
            yield piece, weight.grad if weight.grad is not None else torch.zeros_like(weight)


def mixed_sum(tensor: Tensor) -> Tensor:
    """A sum with random weights, so that no symmetry makes a gradient vanish."""
    return (tensor * torch.rand(tensor.shape, generator=torch.Generator().manual_seed(1)).to(tensor)).sum()
