"""Tiny models of every causal-LM architecture of the installed transformers, built without any download."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY, HIDDEN, INTERMEDIATE, EXPERT = 96, 32, 48, 24
HEADS, KV_HEADS, HEAD, LAYERS, EXPERTS = 4, 2, 8, 4, 6

SMALL: tuple[tuple[int, str], ...] = (
    (VOCABULARY, "vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size"),
    (
        HIDDEN,
        "hidden_size d_model n_embd emb_dim embedding_dim embedding_size input_embedding_size "
        "output_embedding_size word_embed_proj_dim lru_width backbone_hidden_size text_hidden_size "
        "output_dim out_hidden_size output_proj_dims adapter_out_dim embed_dim ple_embed_dim hidden_size_global",
    ),
    (
        INTERMEDIATE,
        "intermediate_size ffn_dim d_inner decoder_ffn_dim encoder_ffn_dim dff dim_ff ffn_hidden_size "
        "feed_forward_size dense_intermediate_size intermediate_size_mlp shared_intermediate_size "
        "shared_expert_intermediate_size n_inner mlp_dim",
    ),
    (
        EXPERT,
        "moe_intermediate_size expert_ffn_hidden_size moe_shared_expert_intermediate_size "
        "shared_experts_intermediate_size",
    ),
    (
        HEADS,
        "num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads num_heads "
        "attention_heads num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads "
        "linear_num_heads linear_num_value_heads index_n_heads mamba_n_heads mamba_num_heads indexer_n_heads",
    ),
    (
        KV_HEADS,
        "num_key_value_heads num_kv_heads swa_num_key_value_heads num_query_groups linear_num_key_heads "
        "num_experts_per_tok moe_topk moe_k top_k_experts num_experts_per_token index_topk hc_mult o_groups",
    ),
    (
        HEAD,
        "head_dim d_head dim_head attention_head_dim kv_channels linear_head_dim linear_key_head_dim swa_head_dim "
        "linear_value_head_dim attention_head_size mamba_d_head mamba_head_dim mamba_headdim index_head_dim d_rel "
        "mamba_d_state ssm_state_size state_size mamba_dt_rank time_step_rank laurel_rank hidden_size_per_layer_input "
        "router_hidden_size adapter_rank prompt_mid_dim chunk_size mamba_chunk_size qk_nope_head_dim indexer_head_dim "
        "hc_lowrank gated_norm_rank num_centroids",
    ),
    (6, "v_head_dim num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num"),
    (
        LAYERS,
        "num_hidden_layers n_layer n_layers num_layers num_blocks decoder_layers encoder_layers "
        "num_decoder_layers num_encoder_layers qk_rope_head_dim rotary_dim depth",
    ),
    (16, "q_lora_rank o_lora_rank rel_extent"),
    (12, "kv_lora_rank"),
    (
        64,
        "max_position_embeddings n_positions max_source_positions max_target_positions max_seq_len n_ctx "
        "context_length num_position_embeddings position_embedding_size",
    ),
    (1, "n_group topk_group first_k_dense_replace bos_token_id decoder_start_token_id indexer_kv_heads"),
    (2, "eos_token_id num_layers_per_stack"),
    (0, "pad_token_id"),
)
"""Size -> the names that configs use for a number of this size."""
SIZES = {name: size for size, names in SMALL for name in names.split()}

HYBRID = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
VISION = {"vision_config.image_size": 16, "vision_config.patch_size": 8}
OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "bailing_hybrid": {"n_group": 1, "topk_group": 1, "layer_group_size": 2},
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1, 3]},
    "big_bird": {"attention_type": "original_full"},
    "blt": {"encoder_hash_byte_group_vocab": 20},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": KV_HEADS, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"hidden_size": HIDDEN, "ffn_hidden_size": EXPERT, "moe_num_experts": 5, "moe_top_k": 2},
    },
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}},
    "dots1": {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": HEADS,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 12,
        "swa_qk_nope_head_dim": 8,
        "swa_qk_rope_head_dim": 4,
        "swa_v_head_dim": 6,
        "swa_head_dim": 12,
    },
    "dots3_note": {
        "vision_config.pyramid_num_routed": [-1, -1, 4, 4],
        "vision_config.adapter_in_dim": HIDDEN,
        "audio_config.adapter_input_size": HIDDEN,
    },
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_ssm": 64},
    "gemma3n_text": {"intermediate_size": INTERMEDIATE, "num_kv_shared_layers": 0, "num_hidden_layers": 5},
    "gemma4_assistant": {
        "text_config.model_type": "gemma4_text",
        "text_config.num_kv_shared_layers": LAYERS,
        "text_config.hidden_size_per_layer_input": 0,
        "text_config.vocab_size_per_layer_input": 0,
    },
    "gemma4_unified_assistant": {
        "text_config.num_kv_shared_layers": 2,
        "text_config.layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "got_ocr2": {**VISION, "vision_config.output_channels": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["mamba", "attention"] * 2},
    "hrm_text": {"num_hidden_layers": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": HYBRID},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"moe_topk": 4},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "nemotron": {"num_key_value_heads": KV_HEADS},
    "nemotron_h": {"n_groups": 2, "layers_block_type": ["mamba", "moe", "attention", "mlp"]},
    "phi4_multimodal": {
        "audio_config.ext_pw_out_channel": HIDDEN,
        "audio_config.depthwise_separable_out_channel": HIDDEN,
        "audio_config.nemo_conv_channels": 16,
        "audio_config.input_size": 16,
        "vision_config.crop_size": 28,
        "vision_config.image_size": 28,
        "vision_config.patch_size": 14,
    },
    "qwen4_exp_text": {
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "ple_layer_ids": [1],
        "ngram_vocab_size_base": 50,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 8,
    },
    "reformer": {
        "is_decoder": True,
        "hidden_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
        "lsh_attention_probs_dropout_prob": 0.0,
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [8, 8],
    },
    "roc_bert": {
        "shape_vocab_size": 20,
        "pronunciation_vocab_size": 20,
        "shape_embed_dim": 8,
        "pronunciation_embed_dim": 8,
    },
    "rwkv": {"attention_hidden_size": HIDDEN},
    "xlstm": {"embedding_dim": HIDDEN, "num_heads": HEADS, "chunk_size": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 6, "attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_mem_blocks": 1,
        "attention_head_dim": 16,
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""What a family needs besides small sizes. The key is a config's own model_type, a part's too."""

UNBUILDABLE: Mapping[str, str] = {
    "gemma3n": "its vision tower needs the package timm, which is not a dependency",
    "gemma4_assistant": "transformers 5.23: the config asks for all layers to share keys, the model refuses that",
}
"""Architectures that no config builds here, and why. The text part of gemma3n is built as gemma3n_text."""

VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "deepseek_v3 without q_lora": ("deepseek_v3", {"q_lora_rank": None}),
    "doge with experts": ("doge", {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 2}),
    "falcon 7b": ("falcon", {"multi_query": True, "new_decoder_architecture": False, "parallel_attn": True}),
    "falcon rw": ("falcon", {"multi_query": False, "new_decoder_architecture": False, "num_kv_heads": HEADS}),
    "falcon 40b": ("falcon", {"new_decoder_architecture": True}),
    "gemma4 with experts": (
        "gemma4_text",
        {"enable_moe_block": True, "num_experts": EXPERTS, "top_k_experts": 2, "moe_intermediate_size": EXPERT},
    ),
    "gemma4 with keys as values": ("gemma4_text", {"attention_k_eq_v": True, "num_global_key_value_heads": 2}),
    "gpt_bigcode multi-head": ("gpt_bigcode", {"multi_query": False}),
    "granitemoehybrid dense": ("granitemoehybrid", {"num_local_experts": 0}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "mvp with prompts": ("mvp", {"use_prompt": True}),
    "nemotron_h with latent experts": ("nemotron_h", {"moe_latent_size": 16}),
    "opt 350m": ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "zamba2 with adapters": ("zamba2", {"use_shared_attention_adapter": True, "num_key_value_heads": HEADS}),
}
"""Configs that lead an architecture through another layout than its default does."""

MODEL_TYPES = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in UNBUILDABLE]
"""Architectures in transformers' mapping of causal language models that are built here."""


def tiny_config(name: str) -> PreTrainedConfig:
    """A config of a model type or of one of `VARIANTS`, with every known size made small."""
    model_type, chosen = VARIANTS.get(name, (name, {}))
    return shrink(CONFIG_MAPPING[model_type], {**OVERRIDES.get(model_type, {}), **chosen})


def shrink(kind: type[PreTrainedConfig], chosen: Mapping[str, Any]) -> PreTrainedConfig:
    """A `kind` of config with the sizes of `SIZES`, and with `chosen` values over them (dotted for a part's)."""
    chosen = {**OVERRIDES.get(kind.model_type, {}), **chosen}
    try:
        default = kind().to_dict()
    except Exception:  # some configs have no valid default
        default = {name: getattr(kind, name, None) for name in SIZES if hasattr(kind, name)}
    values = {k: v for k, v in SIZES.items() if k in default and not isinstance(default[k], list | dict)}
    if "kv_lora_rank" in default:  # multi-head latent attention: the head size is that of its rotary part
        values |= {"head_dim": SIZES["qk_rope_head_dim"], "num_key_value_heads": HEADS}
    dotted = {k.partition(".")[0] for k in chosen if "." in k}
    parts = {k: v for k, v in kind.sub_configs.items() if isinstance(default.get(k), dict) or k in dotted}
    for name, part in parts.items():
        inside = {k.removeprefix(f"{name}."): v for k, v in chosen.items() if k.startswith(f"{name}.")}
        if part is transformers.AutoConfig:
            part = CONFIG_MAPPING[inside.pop("model_type", None) or default[name]["model_type"]]
        values[name] = shrink(part, inside)
    return kind(**values | {k: v for k, v in chosen.items() if "." not in k})


def tiny_model(name: str, *, seed: int = 0) -> Any:
    """A tiny model with eager attention, in eval mode. No weight is zero, so that nothing hides behind a zero.

    Args:
        name: a model type or one of `VARIANTS`.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    config = tiny_config(name)
    if name in ("musicgen", "musicgen_melody"):  # AutoModelForCausalLM would hand the whole config to the decoder
        kind = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name])
        model = kind._from_config(config.decoder, attn_implementation="eager")
    else:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.device.type != "meta":
                parameter.add_(torch.randn(parameter.shape) * 0.05)
    return model.train(model.config.model_type == "reformer")  # which has gradients in training mode only


def run(model: Any, tokens: int = 12, **options: Any) -> Any:
    """The model's output for one sequence of random tokens."""
    tokens = 64 if model.config.model_type == "reformer" else tokens  # its position embeddings are a grid
    ids = torch.randint(3, 90, (1, tokens), generator=torch.Generator().manual_seed(0))
    if model.config.model_type.startswith("musicgen"):
        ids = ids.expand(model.config.num_codebooks, tokens)
    return model(input_ids=ids, use_cache=False, **options)
