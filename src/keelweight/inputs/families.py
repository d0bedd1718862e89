"""The table of facts: what each weight of each model family is.

A family is described by rules. The key of a rule is the end of a parameter's path (`.weight` left out), the
value says what the parameter holds:

    "mlp.up_proj": "up"                          one matrix, one role
    "attn.Wqkv": Rows(q="...", k="...", v="...") roles that share a matrix
    "mlp.experts.*": STACK                       experts stacked in one tensor; the module says how
    "vision_tower.**": "vision"                  everything below

Sizes are numbers or sums such as "num_heads * head_dim" over attributes of the module that holds the matrix, or of
the model's config where the module has no such attribute. They are checked against the tensor, never read off it.
Source of every row: the forward method of that model in transformers, 5.23; the tests prove most of them again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Size = int | str


@dataclass(frozen=True)
class Role:
    """What a role is, and why it is not scored by default ("" if it is)."""

    about: str
    unscored: str = ""


RECURRENT = "state of a recurrence, not a matrix between tokens' vectors"
ROLES: Mapping[str, Role] = {
    "q": Role("queries; of low-rank attention the second factor; of a linear attention or RWKV what plays this part"),
    "k": Role("keys; of latent attention (MLA) the rows of both factors that make keys"),
    "v": Role("values; of latent attention the rows of the second factor that make values"),
    "o": Role("attention output"),
    "q_a": Role("first low-rank factor of the queries"),
    "kv_a": Role("first low-rank factor of keys and values together"),
    "qk": Role("one matrix whose output is query and key at once"),
    "kv": Role("one matrix whose output is key and value at once"),
    "o_a": Role("first low-rank factor of the attention output"),
    "kv_gate": Role("weighs the tokens that are pooled into one key and value"),
    "attn_gate": Role("gate of the attention output"),
    "gate": Role("the MLP's activated factor, where it has two"),
    "up": Role("the MLP's first matrix: the linear factor where there is a gate"),
    "down": Role("the MLP's last matrix"),
    "latent": Role("between the residual stream and experts of another width"),
    "mlp_gate": Role("gate of an MLP's output (RWKV's receptance)"),
    "ssm_in": Role("input matrix of a state-space, recurrent or convolution mixer"),
    "ssm_out": Role("output matrix of a state-space, recurrent or convolution mixer"),
    "head": Role("output head with the dense layer before it; a tied head counts as the embedding"),
    "embedding": Role("token, position and segment embeddings and their projections", "embeddings, as in the paper"),
    "norm": Role("normalization", "norms, as in the paper"),
    "bias": Role("biases", "biases, as in the paper"),
    "router": Role("chooses experts", "routers, as in the paper"),
    "shared_gate": Role("weighs the shared expert", "a router of one expert"),
    "conv": Role("short convolutions", "convolutions, a few weights per channel"),
    "ssm_state": Role("decay, step size and inputs of a state space", RECURRENT),
    "indexer": Role("decides which tokens attention sees", "a router of tokens"),
    "sinks": Role("attention sinks", "one number per head"),
    "position": Role("relative positions in attention", "position embeddings"),
    "scale": Role("learned scalars and vectors that scale, shift or start a stream", "not a matrix"),
    "residual": Role(
        "matrices between residual streams: hyper-connections, AltUp, LAuReL", "neither attention nor MLP"
    ),
    "layer_input": Role("per-layer inputs: matrices that add embeddings in every layer", "part of the embeddings"),
    "adapter": Role("adapters, LoRA's too", "added to the model, not part of it"),
    "cross_q": Role("queries to an encoder or another modality", "not used by text alone"),
    "cross_k": Role("keys from an encoder or another modality", "not used by text alone"),
    "cross_v": Role("values from an encoder or another modality", "not used by text alone"),
    "cross_o": Role("output of attention to an encoder or another modality", "not used by text alone"),
    "vision": Role("vision tower", "not text"),
    "audio": Role("audio tower", "not text"),
    "projector": Role("between another modality and the text model", "not text"),
    "prompt": Role("soft prompts", "not used unless asked for"),
    "patcher": Role("small model that cuts bytes into patches", "no gradient reaches it"),
    "unused": Role("in the checkpoint, but not in the forward pass", "no gradient reaches it"),
}
"""Every role. Scored by default are attention and MLP matrices, the large matrices of mixers that take attention's
place, and an untied head. Source: the paper's scripts leave out biases, norms, embeddings and routers."""


@dataclass(frozen=True)
class Matrix:
    """One role. `output_axis`: None if the module's class says it (nn.Linear 0, Conv1D 1)."""

    role: str
    output_axis: int | None = None


@dataclass(frozen=True, init=False)
class Rows:
    """Roles that share a matrix along its output axis, in this order, `groups` times over.

    Sizes count outputs, and must add up to all of them. Numbers alone are shares: Rows(gate=1, up=1) is two halves.
    `groups` is the number of heads where roles alternate head by head; "rows" where they alternate one by one.
    """

    parts: Mapping[str, Size]
    groups: Size

    def __init__(self, groups: Size = 1, /, **parts: Size) -> None:
        object.__setattr__(self, "parts", parts)
        object.__setattr__(self, "groups", groups)


@dataclass(frozen=True)
class Experts:
    """A stack of matrices: axis 0 counts experts, or experts times rows where `count` says how many experts.

    Attributes:
        parts: roles inside one expert, along its output axis; sizes as in `Rows`.
        output_axis: of one expert's matrix.
        count: number of experts of a stack that is kept as one matrix.
        interleaved: the parts alternate one by one instead of following each other.
        numbered: False for shared experts, which see every token.
    """

    parts: Mapping[str, Size]
    output_axis: int = 0
    count: Size | None = None
    interleaved: bool = False
    numbered: bool = True


@dataclass(frozen=True)
class Stack:
    """All parameters of a module of stacked experts: gate_up_proj, gate_proj, up_proj, down_proj, biases.

    None: the module says it, with its attributes is_transposed (outputs are the last axis) and is_concatenated
    (gate and up are halves, else they alternate).
    """

    transposed: bool | None = None
    concatenated: bool | None = None
    numbered: bool = True


@dataclass(frozen=True)
class When:
    """One rule if the module or the config has `flag` set, else another."""

    flag: str
    then: Rule
    otherwise: Rule


Rule = str | Matrix | Rows | Experts | Stack | When
Rules = dict[str, Rule]


@dataclass(frozen=True)
class Family:
    """The rules of a model type, and how its layers are counted.

    Attributes:
        rules: end of a parameter's path -> what it holds. `*` stands for one part of the path, `.**` for the module
            and everything below. `.**` comes first, then the longest end.
        layers: names of the lists whose numbers are layers.
        stacks: lists that run one after the other; the layers of later ones are counted on.
    """

    rules: Rules
    layers: tuple[str, ...] = ("layers", "layer", "h", "blocks")
    stacks: tuple[str, ...] = ()


# ---------------------------------------------------------------------------------------------- building blocks

STACK = Stack()
GATE_UP = Rows(gate=1, up=1)
PER_HEAD = Rows("num_heads", q="head_dim", k="head_dim", v="head_dim")


def named(prefix: str, names: str) -> dict[str, Rule]:
    """Rules from "name=role name=role", each name below `prefix`."""
    return {f"{prefix}.{name}": role for name, _, role in (pair.partition("=") for pair in names.split())}


def attention(prefix: str, out: str = "o_proj") -> dict[str, Rule]:
    """Plain attention: one matrix for each role."""
    return named(prefix, f"q_proj=q k_proj=k v_proj=v {out}=o")


def gated(prefix: str) -> dict[str, Rule]:
    """Plain gated MLP."""
    return named(prefix, "gate_proj=gate up_proj=up down_proj=down")


def moe(prefix: str, router: str = "gate", experts: Rule = STACK) -> dict[str, Rule]:
    """Stacked experts, their router, and shared experts if there are some."""
    shared = gated(f"{prefix}.shared_experts") | gated(f"{prefix}.shared_expert")
    return {f"{prefix}.experts.*": experts, f"{prefix}.{router}": "router"} | shared


def towers(**names: str) -> dict[str, Rule]:
    """Modules that do not work on text: role -> their names."""
    return {f"{name}.**": role for role, listed in names.items() for name in listed.split()}


PLAIN = attention("self_attn") | gated("mlp")
MOE = PLAIN | moe("mlp")
CROSS = named("encoder_attn", "q_proj=cross_q k_proj=cross_k v_proj=cross_v out_proj=cross_o")
TWO_LAYER = attention("self_attn", "out_proj") | {"fc1": "up", "fc2": "down"}
BART = TWO_LAYER | CROSS
MLA: Rules = {
    "self_attn.q_proj": "q",
    "self_attn.q_a_proj": "q_a",
    "self_attn.q_b_proj": "q",
    "self_attn.kv_a_proj_with_mqa": Rows(kv_a="kv_lora_rank", k="qk_rope_head_dim"),
    "self_attn.kv_b_proj": Rows("num_heads", k="qk_nope_head_dim", v="v_head_dim"),
    "self_attn.o_proj": "o",
}
"""Multi-head latent attention: there is no V matrix, its rows are in kv_b_proj, head by head after the key's."""
INDEXER: Rules = {"self_attn.indexer.**": "indexer"}
SINKS: Rules = {"self_attn.sinks": "sinks"}
MAMBA = named("mamba", "in_proj=ssm_in out_proj=ssm_out x_proj=ssm_state dt_proj=ssm_state") | named(
    "mamba", "A_log=ssm_state D=ssm_state dt_bias=ssm_state conv1d=conv"
)
MAMBA_MIXER: Rules = {key.replace("mamba.", "mixer."): rule for key, rule in MAMBA.items()}
DELTA_STATE = named("linear_attn", "A_log=ssm_state dt_bias=ssm_state conv1d=conv out_proj=o o_proj=o")
DELTA_NET: Rules = {
    **DELTA_STATE,
    "linear_attn.in_proj_qkv": Rows(q="key_dim", k="key_dim", v="value_dim"),
    **named("linear_attn", "in_proj_z=attn_gate in_proj_a=ssm_state in_proj_b=ssm_state"),
}
GATED_Q: Rules = {"self_attn.q_proj": Rows("num_attention_heads", q="head_dim", attn_gate="head_dim")}
SHARED_GATE: Rules = {"mlp.shared_expert_gate": "shared_gate"}
HYPER = named("attn_hc", "fn=residual base=scale scale=scale") | named("ffn_hc", "fn=residual base=scale scale=scale")
HYPER_HEAD = named("hc_head", "hc_fn=residual hc_base=scale hc_scale=scale")
KIMI_DELTA: Rules = {
    "self_attn.conv1d": "conv",
    "self_attn.forget_gate.**": "ssm_state",
    "self_attn.b_proj": "ssm_state",
    **named("self_attn", "g_proj=attn_gate g_a_proj=attn_gate g_b_proj=attn_gate"),
}
BERT: Rules = {
    **named("attention.self", "query=q key=k value=v"),
    **named("crossattention.self", "query=cross_q key=cross_k value=cross_v"),
    "attention.output.dense": "o",
    "crossattention.output.dense": "cross_o",
    "intermediate.dense": "up",
    "output.dense": "down",
    "predictions.transform.dense": "head",
    "predictions.dense": "head",
    "predictions.decoder": "head",
    "predictions.bias": "bias",
    "generator_predictions.dense": "head",
    "lm_head.dense": "head",
    "lm_head.decoder": "head",
    "lm_head.bias": "bias",
    "pooler.dense": "unused",
    "bert.pooler": "unused",
    "embeddings_project": "embedding",
    "encoder.embedding_hidden_mapping_in": "embedding",
}
GPT2: Rules = {
    "attn.c_attn": Rows(q=1, k=1, v=1),
    "attn.c_proj": "o",
    "mlp.c_fc": "up",
    "mlp.c_proj": "down",
    "crossattention.c_attn": Rows(cross_k=1, cross_v=1),
    "crossattention.q_attn": "cross_q",
    "crossattention.c_proj": "cross_o",
}
NEOX_MLP = named("mlp", "dense_h_to_4h=up dense_4h_to_h=down")
PHI3: Rules = {
    "self_attn.qkv_proj": Rows(
        q="num_attention_heads * head_dim", k="num_key_value_heads * head_dim", v="num_key_value_heads * head_dim"
    ),
    "self_attn.o_proj": "o",
    "mlp.gate_up_proj": GATE_UP,
    "mlp.down_proj": "down",
}
LFM = (
    attention("self_attn", "out_proj")
    | named("feed_forward", "w1=gate w3=up w2=down")
    | named("conv", "conv=conv in_proj=ssm_in out_proj=ssm_out")
)
GRANITE_MOE: Rules = {
    **PLAIN,
    **moe("block_sparse_moe", "router"),
    "shared_mlp.input_linear": GATE_UP,
    "shared_mlp.output_linear": "down",
}
LAYER_INPUT: Rules = dict.fromkeys(
    ("per_layer_input_gate", "per_layer_projection", "per_layer_model_projection"), "layer_input"
)
GEMMA3N_STREAMS: Rules = {
    **named("laurel", "linear_left=residual linear_right=residual"),
    **named("altup", "correction_coefs=residual prediction_coefs=residual modality_router=residual"),
    "altup.correct_output_scale": "scale",
    **dict.fromkeys(("altup_projections.*", "altup_unembed_projections.*"), "residual"),
}
INKLING: Rules = {
    **named("self_attn", "r_proj=position rel_logits_proj.proj=position"),
    **{f"{name}.**": "conv" for name in ("k_sconv", "v_sconv", "attn_sconv", "mlp_sconv")},
    **{f"{name}.**": "conv" for name in ("post_attention_convolution", "post_mlp_convolution")},
}
WRAPPER = towers(
    vision="vision_tower vision_model vision_encoder visual image_tower video_tower vision_embed_tokens",
    audio="audio_tower",
    projector="multi_modal_projector mm_projector projector connector aligner merger vision_projection embed_vision "
    "embed_audio image_newline visual_embeddings_table",
)
FALCON_MQA = Rows(q="num_heads * head_dim", k="head_dim", v="head_dim")
FALCON_GROUPED = Rows("num_kv_heads", q="num_heads // num_kv_heads * head_dim", k="head_dim", v="head_dim")

# -------------------------------------------------------------------------------------------------- the families

ROWS: tuple[tuple[str, Any], ...] = (
    # ---- one matrix for each role
    (
        "arcee bitnet cohere cohere2 cohere_compass_text cwm emu3_text_model ernie4_5 exaone4 gemma gemma2 gemma3_text "
        "gemma4_unified_text granite helium hunyuan_v1_dense hyperclovax internlm3 iquestcoder jais2 llama "
        "ministral ministral3 mistral nemotron olmo olmo2 olmo3 qwen2 qwen3 seed_oss smollm3 stablelm vaultgemma",
        PLAIN,
    ),
    ("granite_swa", PLAIN | SINKS),
    ("apertus", PLAIN | named("act_fn", "alpha_p=scale alpha_n=scale")),
    ("diffllama", PLAIN | dict.fromkeys((f"self_attn.lambda_{n}" for n in ("q1", "k1", "q2", "k2")), "scale")),
    (
        "hrm_text",
        Family(
            PLAIN | {"self_attn.gate_proj": "attn_gate", "z_L_init": "scale"},
            stacks=("L_module.layers", "H_module.layers"),
        ),
    ),
    (
        "doge",
        {
            **PLAIN,
            **named("self_attn", "A=indexer dt_proj=indexer"),
            **dict.fromkeys(("input_residual", "post_attention_residual"), "scale"),
            "mlp.router_gate": "router",
            "mlp.down_embed": Matrix("up", output_axis=0),  # one row is one expert of one neuron
            "mlp.up_embed": Matrix("down", output_axis=1),
        },
    ),
    ("phi", attention("self_attn", "dense") | named("mlp", "fc1=up fc2=down")),
    ("nanochat", attention("self_attn") | named("mlp", "fc1=up fc2=down")),
    ("starcoder2", attention("self_attn") | named("mlp", "c_fc=up c_proj=down")),
    ("gptj", attention("attn", "out_proj") | named("mlp", "fc_in=up fc_out=down")),
    ("gpt_neo", attention("attn.attention", "out_proj") | named("mlp", "c_fc=up c_proj=down")),  # nn.Linear
    ("lfm2 lfm3", LFM | attention("self_attn") | {"self_attn.g_proj": "attn_gate"}),
    ("ctrl", named("multi_head_attention", "Wq=q Wk=k Wv=v dense=o") | {"ffn.0": "up", "ffn.2": "down"}),
    (
        "cpmant",
        named("self_attention", "project_q=q project_k=k project_v=v attention_out=o")
        | named("ffn", "w_in.w_0=gate w_in.w_1=up w_out=down")
        | {"position_bias.relative_attention_bias": "position"},
    ),
    (
        "moshi",
        {f"self_attn.{name}_proj.linear": name for name in "qkvo"} | {"mlp.fc1": GATE_UP, "mlp.fc2": "down"},
    ),
    (
        "modernbert-decoder",
        named("attn", "q_proj=q k_proj=k v_proj=v Wo=o")
        | {"mlp.Wi": GATE_UP, "mlp.Wo": "down", "lm_head.dense": "head"},
    ),
    ("opt", TWO_LAYER | dict.fromkeys(("decoder.project_in", "decoder.project_out"), "embedding")),
    ("biogpt xglm", TWO_LAYER | CROSS),
    ("bart bigbird_pegasus blenderbot blenderbot-small marian mbart pegasus plbart trocr whisper", BART),
    ("mvp", BART | {"self_attn_prompt.**": "prompt", "cross_attn_prompt.**": "prompt"}),
    ("musicgen_decoder musicgen_melody_decoder", BART | {"lm_heads.*": "head"}),
    (
        "prophetnet",
        named("self_attn", "query_proj=q key_proj=k value_proj=v out_proj=o relative_pos_embeddings=position")
        | named("cross_attn", "query_proj=cross_q key_proj=cross_k value_proj=cross_v out_proj=cross_o")
        | named("feed_forward", "intermediate=up output=down"),
    ),
    (
        "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta "
        "roberta-prelayernorm roformer xlm-roberta xlm-roberta-xl",
        BERT,
    ),
    ("roc_bert", BERT | {"embeddings.map_inputs_layer": "embedding"}),
    ("xmod", BERT | {"adapter_modules.**": "adapter"}),
    (
        "reformer",
        named("attention.self_attention", "query=q key=k value=v query_key=qk")
        | named("feed_forward", "dense.dense=up output.dense=down")
        | {
            "attention.output.dense": "o",
            "position_embeddings.weights.*": "embedding",
            "lm_head.decoder": "head",
            "lm_head.bias": "bias",
        },
    ),
    (
        "xlm",
        Family(
            named("attentions.*", "q_lin=q k_lin=k v_lin=v out_lin=o")
            | named("encoder_attn.*", "q_lin=cross_q k_lin=cross_k v_lin=cross_v out_lin=cross_o")
            | named("ffns.*", "lin1=up lin2=down"),
            layers=("attentions", "encoder_attn", "ffns", "layer_norm1", "layer_norm15", "layer_norm2"),
        ),
    ),
    (
        "xlnet",
        {
            **{f"rel_attn.{role}": Matrix(role, output_axis=1) for role in "qkv"},  # [in, head, size]
            "rel_attn.o": Matrix("o", output_axis=0),
            **named("rel_attn", "r=position seg_embed=embedding r_r_bias=bias r_s_bias=bias r_w_bias=bias"),
            **named("ff", "layer_1=up layer_2=down"),
            "mask_emb": "embedding",
        },
    ),
    # ---- several roles in one matrix
    ("gpt2 openai-gpt", GPT2),
    (
        "gpt_bigcode",
        GPT2
        | {
            "attn.c_attn": When(
                "multi_query",
                Rows(q="embed_dim", k="kv_dim", v="kv_dim"),
                PER_HEAD,
            )
        },
    ),
    (
        "gpt_neox gpt_neox_japanese",
        {
            "attention.query_key_value": Rows("num_attention_heads", q="head_size", k="head_size", v="head_size"),
            "attention.dense": "o",
            "attention.dense_bias": "bias",
            **NEOX_MLP,
        },
    ),
    ("bloom", {"self_attention.query_key_value": PER_HEAD, "self_attention.dense": "o", **NEOX_MLP}),
    ("persimmon", {"self_attn.query_key_value": PER_HEAD, "self_attn.dense": "o", **NEOX_MLP}),
    (
        "falcon",
        {
            "self_attention.query_key_value": When(
                "new_decoder_architecture", FALCON_GROUPED, When("multi_query", FALCON_MQA, PER_HEAD)
            ),
            "self_attention.dense": "o",
            **NEOX_MLP,
        },
    ),
    ("mpt", {"attn.Wqkv": Rows(q=1, k=1, v=1), "attn.out_proj": "o", **named("ffn", "up_proj=up down_proj=down")}),
    (
        "codegen",
        {"attn.qkv_proj": Rows(4, q=1, v=1, k=1), "attn.out_proj": "o", **named("mlp", "fc_in=up fc_out=down")},
    ),
    ("phi3", PHI3),
    (
        "phi4_multimodal",
        PHI3 | towers(vision="embed_tokens_extend.image_embed", audio="embed_tokens_extend.audio_embed"),
    ),
    ("glm glm4", PLAIN | {"mlp.gate_up_proj": GATE_UP}),
    (
        "dbrx",
        {
            "attn.Wqkv": Rows(q="hidden_size", k="num_key_value_heads * head_dim", v="num_key_value_heads * head_dim"),
            "attn.out_proj": "o",
            "experts.mlp.w1": Experts({"gate": 1}, count="moe_num_experts"),
            "experts.mlp.v1": Experts({"up": 1}, count="moe_num_experts"),
            "experts.mlp.w2": Experts({"down": 1}, count="moe_num_experts", output_axis=1),  # used as [in, out]
            "router.layer": "router",
        },
    ),
    # ---- latent attention
    ("minicpm3 youtu", PLAIN | MLA),
    ("deepseek_v2 deepseek_v3 glm4_moe_lite axk1", MOE | MLA),
    ("deepseek_v32 glm_moe_dsa", MOE | MLA | INDEXER),
    ("dots3_note_text", MOE | MLA | INDEXER | {"self_attn.g_proj": "attn_gate"}),
    (
        "axk2",
        MOE
        | MLA
        | INDEXER
        | {
            "self_attn.q_gate_proj": Rows("num_heads", q="qk_head_dim", attn_gate="v_head_dim"),
            "input_layernorm.mlp.**": "norm",
            "post_attention_layernorm.mlp.**": "norm",
        },
    ),
    ("hy_v4", MOE | MLA | INDEXER | SINKS | HYPER | HYPER_HEAD | {"self_attn.gate_proj": "attn_gate"}),
    (
        "longcat_flash",
        {
            **{key.replace("self_attn.", "self_attn.*."): rule for key, rule in MLA.items()},
            **gated("mlps.*"),
            **moe("mlp", "router.classifier", Stack(transposed=False, concatenated=True)),
        },
    ),
    (
        "deepseek_v4",
        {
            **MOE,
            **SINKS,
            **HYPER,
            **HYPER_HEAD,
            **named("self_attn", "q_a_proj=q_a q_b_proj=q kv_proj=kv o_a_proj=o_a o_b_proj=o"),
            **named("compressor", "kv_proj=kv gate_proj=kv_gate position_bias=position indexer.**=indexer"),
        },
    ),
    # ---- mixtures of experts
    (
        "cohere2_moe dots1 exaone_moe flex_olmo glm4_moe hy_v3 kolibri1 mellum minimax_m2 mixtral olmoe qwen3_moe "
        "solar_open",
        MOE,
    ),
    ("qwen2_moe", MOE | SHARED_GATE),
    ("flint mimo_v2_flash", MOE | SINKS),
    ("aria_text phimoe", PLAIN | moe("mlp", "router")),
    ("gpt_oss", PLAIN | SINKS | moe("mlp", "router")),
    ("ernie4_5_moe", MOE | {"moe_statics.e_score_correction_bias": "router"}),
    ("laguna", MOE | {"self_attn.g_proj": "attn_gate", "mlp.gate.e_score_correction_bias": "router"}),
    ("beam", MOE | {"self_attn.gate_proj": "attn_gate", "self_attn.gate_bias": "bias"}),
    ("hunyuan_v1_moe", PLAIN | moe("mlp", "gate.wg") | gated("mlp.shared_mlp")),
    (
        "afmoe",
        PLAIN | moe("mlp", "router.gate") | {"mlp.expert_bias": "router", "self_attn.gate_proj": "attn_gate"},
    ),
    (
        "llama4_text",
        PLAIN | gated("feed_forward") | moe("feed_forward", "router", Stack(transposed=True, concatenated=True)),
    ),
    ("minimax_m3_vl_text", MOE | INDEXER | {"mlp.shared_experts.gate_up_proj": GATE_UP}),
    (
        "minimax",
        {
            **MOE,
            "self_attn.qkv_proj": Rows("num_attention_heads", q="head_dim", k="head_dim", v="head_dim"),
            **named("self_attn", "out_proj=o output_gate=attn_gate"),
        },
    ),
    ("granitemoe granitemoeshared", GRANITE_MOE),
    ("granitemoe_swa", GRANITE_MOE | SINKS),
    (
        "jetmoe",
        {
            "mlp.input_linear": Experts({"gate": 1, "up": 1}),
            "mlp.output_linear": Experts({"down": 1}),
            "self_attention.experts.input_linear": Experts({"q": 1}),
            "self_attention.experts.output_linear": Experts({"o": 1}),
            "self_attention.kv_proj": Rows(k=1, v=1),
            "router.layer": "router",
            **dict.fromkeys(("mlp.bias", "self_attention.experts.bias"), "bias"),
        },
    ),
    (
        "inkling_text",
        {
            **MOE,
            **INKLING,
            **{f"mlp.shared_experts.{n}_proj": Stack(False, numbered=False) for n in ("gate", "up", "down")},
            "mlp.gate.global_scale": "scale",
        },
    ),
    (
        "inkling2_text",
        {
            **MOE,
            **INKLING,
            **named("self_attn", "gate_proj=attn_gate sink_proj=sinks q_l2_clip.scale=scale rel_l2_clip.scale=scale"),
            **dict.fromkeys(("attention_input.query", "mlp_input.query", "final_input.query"), "scale"),
        },
    ),
    # ---- state spaces, linear attention and their hybrids
    ("mamba mamba2 falcon_mamba", MAMBA_MIXER),
    (
        "rwkv",
        {
            **named("attention", "receptance=q key=k value=v output=o"),
            **named("feed_forward", "key=up value=down receptance=mlp_gate"),
            **dict.fromkeys((f"attention.time_{n}" for n in ("decay", "first")), "ssm_state"),
            **dict.fromkeys((f"*.time_mix_{n}" for n in ("key", "value", "receptance")), "ssm_state"),
        },
    ),
    (
        "xlstm",
        {
            **named("mlstm_layer", "q=q k=k v=v out_proj=o ogate_preact=attn_gate"),
            **named("mlstm_layer", "igate_preact=ssm_state fgate_preact=ssm_state"),
            **named("ffn", "proj_up_gate=gate proj_up=up proj_down=down"),
            # weight_mode "fused": transformers 5.23 cannot initialize it, so this is read from the source only
            "mlstm_layer.qkv_opreact": Rows(q="qk_dim", k="qk_dim", v="v_dim", attn_gate="v_dim"),
            "mlstm_layer.ifgate_preact": "ssm_state",
            "ffn.proj_up_gate_z": GATE_UP,
        },
    ),
    (
        "recurrent_gemma",
        {
            **attention("temporal_block"),
            **gated("mlp_block"),
            **named("temporal_block", "linear_x=ssm_in linear_y=ssm_in linear_out=ssm_out conv_1d=conv"),
            "rg_lru.**": "ssm_state",
        },
    ),
    ("bamba falcon_h1", PLAIN | gated("feed_forward") | MAMBA),
    ("jamba", PLAIN | gated("feed_forward") | moe("feed_forward", "router") | MAMBA),
    ("granitemoehybrid", GRANITE_MOE | MAMBA),
    (
        "nemotron_h",
        {
            **MAMBA_MIXER,
            **attention("mixer"),
            **named("mixer", "up_proj=up down_proj=down"),
            **moe("mixer"),
            **named("mixer", "fc1_latent_proj=latent fc2_latent_proj=latent"),
        },
    ),
    (
        "zamba",
        {
            **PLAIN,
            **MAMBA,
            **gated("feed_forward"),
            **dict.fromkeys((f"mamba.{n}" for n in ("x_proj_weight", "dt_proj_weight", "dt_proj_bias")), "ssm_state"),
            "layers.*.linear": "residual",
        },
    ),
    (
        "zamba2",
        {
            **PLAIN,
            **MAMBA,
            "feed_forward.gate_up_proj": GATE_UP,
            "feed_forward.down_proj": "down",
            "layers.*.linear": "residual",
            "gate_up_proj_adapter_list.**": "adapter",
            **{f"linear_{role}_adapter_list.**": "adapter" for role in "qkv"},
        },
    ),
    ("lfm2_moe", LFM | moe("feed_forward")),
    (
        "qwen3_next",
        {
            **MOE,
            **SHARED_GATE,
            **GATED_Q,
            **DELTA_STATE,
            "linear_attn.in_proj_qkvz": Rows(
                "num_k_heads",
                q="head_k_dim",
                k="head_k_dim",
                v="num_v_heads // num_k_heads * head_v_dim",
                attn_gate="num_v_heads // num_k_heads * head_v_dim",
            ),
            "linear_attn.in_proj_ba": "ssm_state",
        },
    ),
    ("qwen3_5_text qwen3_5_moe_text", MOE | SHARED_GATE | GATED_Q | DELTA_NET),
    (
        "qwen4_exp_text",
        {
            **MOE,
            **SHARED_GATE,
            **GATED_Q,
            **DELTA_NET,
            **INDEXER,
            **named("ple", "key_proj=layer_input value_proj=layer_input conv1d=conv"),
            **{
                f"{n}.**": "residual"
                for n in ("attn_hyper_connection", "mlp_hyper_connection", "hyper_connection_mixer")
            },
        },
    ),
    (
        "olmo_hybrid",
        PLAIN
        | DELTA_STATE
        | named("linear_attn", "q_proj=q k_proj=k v_proj=v g_proj=attn_gate a_proj=ssm_state b_proj=ssm_state"),
    ),
    ("kimi_linear bailing_hybrid", MOE | MLA | KIMI_DELTA),
    (
        "zaya",
        {
            **PLAIN,
            **moe("mlp"),
            **named("qkv_proj", "q_proj=q k_proj=k v_proj_current=v v_proj_delayed=v"),
            **named("qkv_proj", "conv_qk_depthwise=conv conv_qk_grouped=conv"),
            "mlp.gate.**": "router",
            "post_attention_residual_scale.**": "scale",
            "post_mlp_residual_scale.**": "scale",
            **dict.fromkeys(("input_hidden_states_scale", "input_hidden_states_bias"), "scale"),
        },
    ),
    # ---- text models with more inputs, and wrappers around a text model of its own type
    ("gemma3n_text", PLAIN | LAYER_INPUT | GEMMA3N_STREAMS),
    (
        "gemma4_text",
        PLAIN | LAYER_INPUT | moe("*", "router.proj") | {"router.scale": "scale", "router.per_expert_scale": "scale"},
    ),
    (
        "blt",
        Family(
            {
                **PLAIN,
                **attention("cross_attn_layers.*"),
                "patcher.**": "patcher",
                **dict.fromkeys(("patch_embedding_projection", "token_embedding_projection"), "embedding"),
            },
            stacks=(
                "local_encoder.layers",
                "local_encoder.cross_attn_layers",
                "global_transformer.layers",
                "local_decoder.cross_attn_layers",
                "local_decoder.layers",
            ),
        ),
    ),
    (
        "mllama_text_model",
        {
            **PLAIN,
            **named("cross_attn", "q_proj=cross_q k_proj=cross_k v_proj=cross_v o_proj=cross_o"),
            **dict.fromkeys(("cross_attn_attn_gate", "cross_attn_mlp_gate"), "scale"),
        },
    ),
    (
        "git",
        BERT
        | towers(vision="git.image_encoder", projector="git.visual_projection")
        | {"img_temperal_embedding.*": "embedding"},
    ),
    (
        "aria aya_vision cohere2_vision deepseek_vl dots3_note emu3 exaone4_5 fuyu gemma3 gemma3n gemma4 "
        "gemma4_unified "
        "glm4v glm4v_moe got_ocr2 hyperclovax_vision_v2 idefics2 idefics3 inkling2 inkling_mm_model internvl kimi_k25 "
        "lfm2_vl lfm3_vl lighton_ocr llama4 llava llava_next llava_next_video llava_onevision minicpm_ocr minicpmv4_6 "
        "minicpmv4_7 minimax_m3_vl mistral3 mllama moss_transcribe_diarize ovis2 paligemma "
        "pp_chart2table qianfan_ocr qwen2_5_vl qwen2_vl qwen3_5 qwen3_5_moe qwen3_vl qwen3_vl_moe shieldgemma2 smolvlm "
        "video_llama_3 video_llava vipllava",
        WRAPPER,
    ),
    ("qwen2_vl_text qwen2_5_vl_text qwen3_vl_text", PLAIN),
    ("qwen3_vl_moe_text glm4v_moe_text", MOE),
    ("glm4v_text", PLAIN | {"mlp.gate_up_proj": GATE_UP}),
    (
        "gemma4_assistant gemma4_unified_assistant",
        {"pre_projection": "residual", "post_projection": "residual", "masked_embedding.centroids": "router"},
    ),
)
"""Model types, and what describes them."""

FAMILIES: Mapping[str, Family] = {
    model_type: family if isinstance(family, Family) else Family(family)
    for model_types, family in ROWS
    for model_type in model_types.split()
}
"""Model type, as its config says it -> its facts."""
