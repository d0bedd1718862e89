"""Slices, coverage and declarations: by hand, on models small enough to see."""

from __future__ import annotations

import json
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AutoModelForImageTextToText,
    DeepseekV3Config,
    LlamaConfig,
    LlamaForCausalLM,
)

from keelweight.errors import UserError
from keelweight.inputs import layouts
from keelweight.inputs.families import FAMILIES, ROLES, Experts, Family, Matrix, Rows, Stack
from keelweight.inputs.layouts import (
    SCORED_ROLES,
    WHOLE,
    Region,
    Slice,
    UnknownLayout,
    coverage,
    declare,
    declare_from,
    layout_from_json,
    layout_to_json,
    skeleton,
    slices,
)
from tests.inputs.test_layouts_architectures import check_attention, check_partition
from tests.inputs.tiny_configs import tiny_config, tiny_model

SECONDS_FOR_671B = 10


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    monkeypatch.setattr(layouts, "DECLARED", {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def by_parameter(model: nn.Module) -> dict[str, list[Slice]]:
    found: dict[str, list[Slice]] = {}
    for piece in slices(model):
        found.setdefault(piece.parameter, []).append(piece)
    return found


# ------------------------------------------------------------------------------------------------- by hand


def test_a_llama_has_one_slice_per_parameter() -> None:
    model = tiny_model("llama")
    found = by_parameter(model)
    assert list(found) == [name for name, _ in model.named_parameters()]
    assert found["model.layers.2.self_attn.v_proj.weight"] == [
        Slice("model.layers.2.self_attn.v_proj.weight", "v", layer=2)
    ]
    assert found["model.embed_tokens.weight"] == [Slice("model.embed_tokens.weight", "embedding")]
    assert found["lm_head.weight"] == [Slice("lm_head.weight", "head")]
    assert found["model.layers.0.input_layernorm.weight"][0].role == "norm"


def test_rows_of_neox_alternate_head_by_head() -> None:
    (q, k, v), size = (
        by_parameter(tiny_model("gpt_neox"))["gpt_neox.layers.0.attention.query_key_value.weight"],
        (96, 32),
    )
    rows = torch.arange(96).repeat_interleave(32).view(size)
    assert [p.role for p in (q, k, v)] == ["q", "k", "v"]
    heads = [list(range(24 * head + 16, 24 * head + 24)) for head in range(4)]  # 8 of q, 8 of k, then 8 of v
    assert v.region.of(rows)[..., 0].tolist() == heads
    assert v.matrix(rows)[:, 0].tolist() == [row for head in heads for row in head]


def test_conv1d_keeps_outputs_on_axis_1() -> None:
    q, _, v = by_parameter(tiny_model("gpt2"))["transformer.h.1.attn.c_attn.weight"]
    columns = torch.arange(96).repeat(32, 1)
    assert (q.output_axis, q.layer) == (1, 1)
    assert v.region.of(columns)[0].tolist() == list(range(64, 96))
    assert v.matrix(columns).shape == (32, 32)
    assert v.matrix(columns)[:, 0].tolist() == list(range(64, 96))


def test_experts_of_gpt_oss_are_transposed_and_interleaved() -> None:
    found = by_parameter(tiny_model("gpt_oss"))
    stack = found["model.layers.0.mlp.experts.gate_up_proj"]
    assert [(p.expert, p.role) for p in stack[:4]] == [(0, "gate"), (0, "up"), (1, "gate"), (1, "up")]
    assert len(stack) == 2 * 6
    last = torch.arange(96).expand(6, 32, 96)
    assert stack[3].region.of(last)[0].tolist() == list(range(1, 96, 2))
    assert stack[3].output_axis == 1
    assert stack[3].matrix(last).shape == (48, 32)
    bias = found["model.layers.0.mlp.experts.gate_up_proj_bias"]
    assert [(p.expert, p.role) for p in bias] == [(e, "bias") for e in range(6)]


def test_latent_attention_has_its_values_in_kv_b_proj() -> None:
    found = by_parameter(tiny_model("deepseek_v3"))
    k, v = found["model.layers.0.self_attn.kv_b_proj.weight"]
    rows = torch.arange(4 * 14)[:, None].expand(56, 12)
    assert (k.role, v.role) == ("k", "v")
    assert v.matrix(rows)[:, 0].tolist() == [14 * head + 8 + row for head in range(4) for row in range(6)]
    latent, rope = found["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"]
    assert (latent.role, rope.role) == ("kv_a", "k")


def test_half_of_a_gated_q_proj_is_not_q() -> None:
    name = "model.layers.3.self_attn.q_proj.weight"
    q, gate = by_parameter(tiny_model("qwen3_next"))[name]
    assert (q.role, gate.role) == ("q", "attn_gate")
    rows = torch.arange(64)[:, None].expand(64, 32)
    assert q.matrix(rows)[:16, 0].tolist() == [*range(8), *range(16, 24)]


@pytest.mark.parametrize(
    ("name", "parameter", "role"),
    [
        ("afmoe", "model.layers.0.self_attn.gate_proj.weight", "attn_gate"),
        ("deepseek_v4", "model.layers.0.self_attn.compressor.gate_proj.weight", "kv_gate"),
        ("zaya", "model.layers.0.mlp.gate.down_proj.weight", "router"),
        ("bamba", "model.layers.0.mamba.in_proj.weight", "ssm_in"),
        ("qwen2_moe", "model.layers.0.mlp.shared_expert_gate.weight", "shared_gate"),
        ("bart", "model.decoder.layers.0.encoder_attn.v_proj.weight", "cross_v"),
        ("axk2", "model.layers.0.input_layernorm.mlp.fc1.weight", "norm"),
        ("gpt_oss", "model.layers.0.self_attn.sinks", "sinks"),
        ("jetmoe", "model.layers.0.self_attention.experts.input_linear.weight", "q"),
        ("gpt_bigcode", "transformer.h.0.attn.c_proj.weight", "o"),
    ],
)
def test_suffixes_that_mislead(name: str, parameter: str, role: str) -> None:
    assert {piece.role for piece in by_parameter(tiny_model(name))[parameter]} == {role}


def test_shared_experts_have_no_number_and_routed_ones_do() -> None:
    found = by_parameter(tiny_model("inkling_text"))
    shared = found["model.layers.0.mlp.shared_experts.up_proj"]
    assert [(p.role, p.expert) for p in shared] == [("up", None)] * 2
    assert {p.expert for p in found["model.layers.0.mlp.experts.down_proj"]} == set(range(6))


def test_layers_of_several_stacks_are_counted_on() -> None:
    model = tiny_model("hrm_text")
    layers = {p.layer for p in slices(model) if "L_module" in p.parameter}
    assert layers == set(range(len(model.model.L_module.layers)))
    assert min(p.layer for p in slices(model) if "H_module.layers" in p.parameter) == len(layers)  # type: ignore[type-var]


def test_shared_layers_are_given_once() -> None:
    model = tiny_model("zamba")
    names = [p.parameter for p in slices(model) if "shared_transf" in p.parameter]
    assert len(names) == len(set(names))
    assert {p.layer for p in slices(model) if "shared_transf" in p.parameter} == {2}
    check_partition(model)


def test_layers_may_differ_in_size() -> None:
    model = skeleton(tiny_config("dots3_note_text"))
    layers = {p.layer: p for p in slices(model) if p.role == "v"}
    assert len(layers) == 4
    check_partition(tiny_model("gemma3n_text"))


# --------------------------------------------------------------------------------------- region, slice, JSON


def test_region_counts_what_it_holds() -> None:
    for region in (
        WHOLE,
        Region((4, 3, 8, 32), (slice(None), 2)),
        Region((), (slice(3, 10),)),
        Region((), (slice(None), slice(1, None, 2))),
        Region((96, 4, 8), (5, slice(None), slice(0, 3))),
    ):
        tensor = torch.empty(96, 32)
        assert region.count(tensor.shape) == region.of(tensor).numel()


def test_a_slice_is_a_view() -> None:
    for model in (tiny_model("gpt_oss"), tiny_model("codegen"), tiny_model("dbrx"), tiny_model("falcon 40b")):
        weights = dict(model.named_parameters())
        for piece in slices(model):
            part = piece.region.of(weights[piece.parameter].data)
            assert part.untyped_storage().data_ptr() == weights[piece.parameter].untyped_storage().data_ptr()


@pytest.mark.parametrize("name", ["gpt2", "gpt_oss", "bloom", "deepseek_v3"])
def test_json_keeps_everything(name: str) -> None:
    layout = tuple(slices(tiny_model(name)))
    assert layout_from_json(json.loads(json.dumps(layout_to_json(layout)))) == layout


def test_json_without_output_axes_is_read() -> None:
    assert layout_from_json([["w", "q", 0, None, [[], []]]]) == (Slice("w", "q", 0),)


# ------------------------------------------------------------------------------------------------- coverage


def test_coverage_counts_every_parameter() -> None:
    model = tiny_model("qwen3_moe")
    rows = coverage(model)
    assert sum(row.parameters for row in rows) == sum(p.numel() for p in model.parameters())
    assert sum(row.share for row in rows) == pytest.approx(1)
    assert all((row.role in SCORED_ROLES) == row.scored for row in rows)
    assert all(bool(row.reason) != row.scored for row in rows)
    assert next(row for row in rows if row.role == "router").reason == ROLES["router"].unscored
    assert [row.scored for row in rows] == sorted((row.scored for row in rows), reverse=True)


def test_coverage_of_other_roles() -> None:
    rows = {row.role: row for row in coverage(tiny_model("mixtral"), scored=("v", "router"))}
    assert rows["router"].scored
    assert rows["q"].reason == "left out by choice"


def test_a_tied_head_is_the_embedding() -> None:
    rows = {row.role: row for row in coverage(tiny_model("llama tied"))}
    assert (rows["head"].parameters, rows["head"].scored) == (0, False)
    assert rows["head"].reason == "shares its weights with the embedding"
    assert rows["embedding"].parameters == 96 * 32
    untied = {row.role: row for row in coverage(tiny_model("llama"))}
    assert untied["head"].scored


def test_coverage_of_671b_is_quick_and_reads_no_weights() -> None:
    start = time.perf_counter()
    model = skeleton(DeepseekV3Config())
    rows = {row.role: row for row in coverage(model)}
    seconds = time.perf_counter() - start
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert sum(row.parameters for row in rows.values()) == 671_026_404_352
    assert rows["gate"].parameters == rows["up"].parameters == (58 * 257 * 2048 + 3 * 18432) * 7168
    assert rows["v"].parameters == 61 * 128 * 128 * 512
    assert seconds < SECONDS_FOR_671B


def test_a_config_that_builds_nothing_is_a_user_error() -> None:
    with pytest.raises(UserError, match="no language model can be built"):
        skeleton(transformers.ViTConfig())


@pytest.mark.parametrize("kind", ["Llava", "Qwen3VLMoe", "Mistral3", "Gemma3", "Llama4"])
def test_of_a_multimodal_model_the_text_part_is_scored(kind: str) -> None:
    config = getattr(transformers, f"{kind}Config")()
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    rows = {row.role: row for row in coverage(model)}
    assert not rows["vision"].scored
    assert rows["vision"].reason == "not text"
    assert rows["v"].scored
    assert all(p.layer is None for p in slices(model) if p.role in ("vision", "projector"))
    text = {p.parameter for p in slices(model) if p.role in SCORED_ROLES}
    assert all("language_model" in name or "lm_head" in name for name in text)


def test_roles_are_scored_or_have_a_reason() -> None:
    assert set(SCORED_ROLES) == {role for role, about in ROLES.items() if not about.unscored}
    given = set().union(*(layouts.roles_of(rule) for family in FAMILIES.values() for rule in family.rules.values()))
    assert given <= set(ROLES)


# ------------------------------------------------------------------------------------------------ refusing


def test_an_unknown_model_type_is_refused_with_the_way_out() -> None:
    model = renamed("my_llama")
    with pytest.raises(UnknownLayout) as caught:
        list(slices(model))
    message = str(caught.value)
    assert "model.layers.*.self_attn.q_proj.weight [32, 32]" in message
    assert 'declare("my_llama"' in message
    assert "docs/layouts.md" in message
    assert "\n" not in message


def test_an_unknown_parameter_of_a_known_model_type_is_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.extra = nn.Linear(32, 32, bias=False)
    with pytest.raises(UnknownLayout, match=r"model\.layers\.\*\.mlp\.extra\.weight \[32, 32\].*no rule of llama fits"):
        list(slices(model))


def test_nothing_is_given_before_a_refusal_is_known_to_be_needless() -> None:
    model = tiny_model("llama")
    model.model.embed_tokens = nn.Module()
    model.model.embed_tokens.weight = nn.Parameter(torch.zeros(96, 32))
    model.get_input_embeddings = lambda: nn.Module()
    with pytest.raises(UnknownLayout):
        next(slices(model))


def test_a_matrix_in_an_unknown_class_is_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(32, 32))

    model = tiny_model("llama")
    model.model.layers[0].self_attn.v_proj = Odd()
    with pytest.raises(UnknownLayout, match="a Odd does not say which axis is the output"):
        list(slices(model))


def test_experts_that_do_not_say_their_axis_are_refused() -> None:
    model = tiny_model("qwen3_moe")
    experts = model.model.layers[0].mlp.experts
    vars(experts).pop("is_transposed", None)
    experts.__class__ = type("Silent", (nn.Module,), {"forward": type(experts).forward})
    with pytest.raises(UnknownLayout, match="Silent has no is_transposed"):
        list(slices(model))


def test_quantized_weights_are_refused() -> None:
    model = tiny_model("llama")
    model.lm_head.weight = nn.Parameter(torch.zeros(96, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnknownLayout, match="load the model unquantized"):
        list(slices(model))


def test_sizes_that_do_not_fit_are_refused() -> None:
    rules = {**FAMILIES["phi3"].rules, "self_attn.qkv_proj": Rows(q="num_key_value_heads", k=1, v=1)}
    with pytest.raises(UnknownLayout, match=r"q 2 \+ k 1 \+ v 1\) = 4 outputs, it has 64"):
        list(slices(tiny_model("phi3"), {"phi3": Family(rules)}))
    rules = {**FAMILIES["phi3"].rules, "self_attn.qkv_proj": Rows(q="heads", k=1, v=1)}
    with pytest.raises(UnknownLayout, match="needs 'heads', which neither Phi3Attention nor the config has"):
        list(slices(tiny_model("phi3"), {"phi3": Family(rules)}))


# ------------------------------------------------------------------------------------------------ declaring


def renamed(model_type: str, **modules: nn.Module) -> Any:
    """A Llama that says it is of another type, with some modules of layer attention replaced."""
    model = tiny_model("llama")
    for module in model.modules():
        if hasattr(module, "config"):
            module.config.model_type = model_type
    for layer in model.model.layers:
        for name, module in modules.items():
            setattr(layer.self_attn, name, module)
    return model


def test_one_line_declares_a_model_that_is_like_another() -> None:
    declare("my_llama", like="llama")
    model = renamed("my_llama")
    assert [p.role for p in slices(model)] == [p.role for p in slices(tiny_model("llama"))]


def test_a_fused_matrix_is_declared_in_a_line() -> None:
    model = renamed("internlm2")
    for layer in model.model.layers:
        attention = layer.self_attn
        del attention.q_proj, attention.k_proj, attention.v_proj
        attention.wqkv = nn.Linear(32, 64, bias=False)
    wqkv = Rows("num_key_value_heads", q="num_key_value_groups * head_dim", k="head_dim", v="head_dim")
    declare("internlm2", {"self_attn.wqkv": wqkv}, like="llama")
    check_partition(model)
    q, _, v = (p for p in slices(model) if p.parameter == "model.layers.0.self_attn.wqkv.weight")
    rows = torch.arange(64)[:, None].expand(64, 32)
    assert q.matrix(rows)[:, 0].tolist() == [*range(16), *range(32, 48)]
    assert v.matrix(rows)[:, 0].tolist() == [*range(24, 32), *range(56, 64)]


def test_shared_layers_as_in_albert_can_be_declared() -> None:
    declare(
        "albert",
        {
            "attention.query": "q", "attention.key": "k", "attention.value": "v", "attention.dense": "o",
            "ffn": "up", "ffn_output": "down", "embedding_hidden_mapping_in": "embedding",
            "predictions.dense": "head", "predictions.decoder": "head", "predictions.bias": "bias",
        },
        layers=("albert_layers",),
    )  # fmt: skip
    config = AlbertConfig(
        vocab_size=96,
        embedding_size=16,
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=48,
        num_hidden_layers=6,
    )
    config._attn_implementation = "eager"
    model = AlbertForMaskedLM(config)
    check_partition(model)
    values = [p for p in slices(model) if p.role == "v"]
    assert [(p.layer, p.region) for p in values] == [(0, WHOLE)]  # six layers, one set of weights


def test_a_declaration_replaces_rules_of_the_table() -> None:
    declare("llama", {"mlp.up_proj": "adapter"}, like="llama")
    assert "up" not in {p.role for p in slices(tiny_model("llama"))}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"attn.wq": "query"}, "unknown role 'query'"),
        ({"attn.wqkv": Rows(q=1, kay=1)}, "unknown role 'kay'"),
        ({"attn.wq": 7}, "7 is no rule"),
        ({"attn.wq": {"rows": {"q": 1}, "group": 2}}, "is no rule"),
        ({"attn.wq": {"experts": {"q": 1}, "axis": 2}}, "unexpected keyword"),
    ],
)
def test_a_wrong_declaration_is_refused(rules: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        declare("mine", rules)
    with pytest.raises(UserError, match="like='lama' is no known model type"):
        declare("mine", like="lama")


def test_declarations_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "layout.toml"
    path.write_text(
        """
        [mine]
        like = "llama"
        layers = ["blocks"]
        [mine.rules]
        "attn.wqkv" = { rows = { q = "num_heads * head_dim", k = 1, v = 1 }, groups = "num_groups" }
        "moe.w1" = { experts = { gate = 1, up = 1 }, output_axis = 1, interleaved = true }
        "moe.experts.*" = { stack = { transposed = true, concatenated = true } }
        "attn.wo" = { matrix = "o", output_axis = 1 }
        "attn.wr" = "router"
        """,
        encoding="utf-8",
    )
    declare_from(path)
    family = layouts.DECLARED["mine"]
    assert family.layers == ("blocks",)
    assert family.rules["attn.wqkv"] == Rows("num_groups", q="num_heads * head_dim", k=1, v=1)
    assert family.rules["moe.w1"] == Experts({"gate": 1, "up": 1}, 1, interleaved=True)
    assert family.rules["moe.experts.*"] == Stack(True, True)
    assert family.rules["attn.wo"] == Matrix("o", 1)
    assert family.rules["self_attn.q_proj"] == "q"


@pytest.mark.parametrize(
    ("text", "message"),
    [("[mine", "cannot be read as a layout"), ("mine = 3", "unknown"), ("[mine]\nrule = 1", "'rule'")],
)
def test_a_damaged_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "layout.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        declare_from(path)
    with pytest.raises(UserError, match="cannot be read"):
        declare_from(tmp_path / "missing.toml")


# ------------------------------------------------------------------------------------------------ wrappers


class Wrapped(nn.Module):
    """As DistributedDataParallel: the model is `module`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class LoraLinear(nn.Module):
    """As PEFT's: the matrix is `base_layer`, beside two small ones."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base_layer.out_features, bias=False)})


@pytest.mark.parametrize("name", ["phi3", "mixtral", "deepseek_v3"])
def test_wrappers_change_names_and_nothing_else(name: str) -> None:
    model = tiny_model(name)
    plain = [(p.role, p.layer, p.expert, p.region) for p in slices(model)]
    for wrapped in (Wrapped(model), torch.compile(model)):
        found = list(slices(wrapped))  # type: ignore[arg-type]
        assert [(p.role, p.layer, p.expert, p.region) for p in found] == plain
        assert all(p.parameter.startswith(("module.", "_orig_mod.")) for p in found)


def test_lora_is_an_adapter_around_the_matrix() -> None:
    model = tiny_model("phi3")
    plain = Counter(p.role for p in slices(model))
    for layer in model.model.layers:
        layer.self_attn.qkv_proj = LoraLinear(layer.self_attn.qkv_proj)
    found = list(slices(Wrapped(model)))
    assert Counter(p.role for p in found) == plain + Counter(adapter=8)
    values = [p for p in found if p.role == "v" and p.layer == 0]
    assert [p.parameter for p in values] == ["module.model.layers.0.self_attn.qkv_proj.base_layer.weight"]


def test_the_fused_model_holds_the_same_values_as_its_twin() -> None:
    """phi3 with the weights of a Llama: the slices of one are the matrices of the other."""
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    llama = LlamaForCausalLM(config).eval()
    phi3 = tiny_model("phi3")
    for one, two in zip(llama.model.layers, phi3.model.layers, strict=False):
        attention = one.self_attn
        two.self_attn.qkv_proj.weight.data = torch.cat(
            [attention.q_proj.weight.data, attention.k_proj.weight.data, attention.v_proj.weight.data]
        )
        two.mlp.gate_up_proj.weight.data = torch.cat([one.mlp.gate_proj.weight.data, one.mlp.up_proj.weight.data])
        two.self_attn.o_proj.weight.data = attention.o_proj.weight.data
        two.mlp.down_proj.weight.data = one.mlp.down_proj.weight.data
    for layer in range(2):
        for role in ("q", "k", "v", "o", "gate", "up", "down"):
            (a,) = (p.matrix(dict(llama.named_parameters())[p.parameter]) for p in of(llama, layer, role))
            (b,) = (p.matrix(dict(phi3.named_parameters())[p.parameter]) for p in of(phi3, layer, role))
            assert torch.equal(a, b), (layer, role)
    assert check_attention(phi3) is not None


def of(model: nn.Module, layer: int, role: str) -> list[Slice]:
    return [piece for piece in slices(model) if (piece.layer, piece.role) == (layer, role)]
