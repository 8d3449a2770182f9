"""A tiny model of every causal language model type that the installed transformers has.

The types come from transformers' own mapping, and the sizes from the fields of their configuration
classes by rules, so that a type that a new version brings is built without a word here.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import Any

from architectures import scatter
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
N_LAYERS = 6
VOCABULARY = 128
LAYERS = "num_hidden_layers|n_layers?|num_layers|(num_)?(de|en)coder_layers|num_blocks"
HEADS = ".*attention_heads|n_heads?|num_heads"
# What an integer field is set to, by its whole name; the first pattern that fits counts.
RULES: dict[str, int] = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id|decoder_start_token_id|forced_eos_token_id|sep_token_id": 2,
    ".*_token_(id|index)": 120,  # of pictures and sounds: not among the tokens of the tests
    "type_vocab_size": 2,
    ".*vocab_size.*": VOCABULARY,
    # Where there is an encoder, it is as deep as the decoder, as in most released models.
    LAYERS: N_LAYERS,
    "depth": 2,
    "max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|max_.*_positions": 64,
    ".*sliding_window(_size)?|(attention_)?window_size|attention_chunk_size|local_attention": 4,
    "first_k_dense_replace|num_dense_layers|moe_layer_start_index|max_window_layers": 2,
    # Widths. A head is 8 wide.
    "(.*hidden|(input_|output_)?embedding)_size(_global)?": 32,
    "d_model|n_embd|emb_dim|dim|word_embed_proj_dim|lru_width|.*_embed_dim": 32,
    "adapter_(in_dim|out_dim|input_size)": 32,
    "(dense_)?intermediate_size(_mlp)?|(decoder_|encoder_)?ffn_dim|d_inner|dff|dim_ff|n_inner": 48,
    "ffn_hidden_size|feed_forward_size|prefix_dense_intermediate_size": 48,
    ".*(moe|expert|shared).*_size|moe_latent_size": 16,
    ".*_rank|hc_lowrank": 16,
    HEADS: 4,
    ".*key_value_heads|num_kv_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads|linear_num_heads|(index|indexer)_n_heads": 4,
    "(n_|num_)?mamba_(n_|num_)?heads": 8,
    ".*head_dim|dim_head|d_head|kv_channels|mamba_d_head|attention_head_size|global_head_dim": 8,
    "query_pre_attn_scalar|mamba_d_state|(ssm_)?state_size": 8,
    "n_group|topk_group|.*n_?groups": 1,
    "(mamba_)?chunk_size": 8,  # a shorter text is filled up
    "rotary_dim|index_topk": 4,
    "num_experts_per_tok|moe_k|moe_topk": 2,
    "(num|n|moe_num)_(shared_)experts|moe_num_shared_experts": 1,
    "(num|n|moe_num)_(local_|routed_)?experts": 4,
}
# Of encoders of pictures and sounds, which are not cut.
TOWERS = "Vision|Audio|Encoder|VQ|Patcher"
TOWER_LAYERS = 2
FIXED: dict[str, Any] = {
    "is_decoder": True,
    "use_sliding_window": True,
    "no_rope_layers": [1, 0, 1, 1, 0, 1],
    "moe_layers": [1, 2, 5],
    "attn_layer_indices": [1, 2, 5],
    "mlp_only_layers": [2],
    "cross_attention_layers": [1, 4],
    "num_attention_heads_per_layer": [4, 2, 6, 4, 8, 2],
}
# Which kind of layer each of the six is, by the number of kinds that an architecture has: no cut
# of the tests gives the pattern's own first entries.
PATTERNS = {2: [0, 1, 1, 0, 1, 0], 3: [0, 1, 2, 2, 1, 0], 4: [0, 1, 2, 3, 1, 0]}
KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types")


def _kinds(*names: str) -> list[str]:
    """A kind for each layer."""
    return [names[place] for place in PATTERNS[len(names)]]


# What rules over names cannot know.
OWN: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {
        "layer_types": _kinds("full_attention", "sliding_attention"),
        "rope_parameters": {
            "full_attention": None,
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2},
    "gemma4_text": {"global_head_dim": 16, "hidden_size_per_layer_input": 0},
    "gemma4_unified_text": {"global_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local", "local"], 2]]},
    "granitemoehybrid": {"layer_types": _kinds("attention", "mamba")},
    "lfm2": {"layer_types": _kinds("full_attention", "conv")},
    "lfm2_moe": {"layer_types": _kinds("full_attention", "conv")},
    "longcat_flash": {"qk_head_dim": 16, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "qwen4_exp_text": {"indexer_kv_heads": 1, "indexer_budget": 8, "indexer_compress_ratio": 2},
    "reformer": {
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh", "lsh", "local", "lsh", "local"],
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
}


def sizes(config_class: type[PreTrainedConfig], default: PreTrainedConfig) -> dict[str, Any]:
    """Small values for the fields of a configuration class.

    Args:
        config_class: The class.
        default: A configuration of that class with its own values.
    """
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        value = vars(default).get(field.name)
        if isinstance(value, PreTrainedConfig):
            found[field.name] = sizes(type(value), value) | {"model_type": value.model_type}
        elif field.name in FIXED:
            found[field.name] = copy.deepcopy(FIXED[field.name])
        elif field.name in KINDS and len(set(value or ())) in PATTERNS:
            found[field.name] = _kinds(*sorted(set(value)))
        elif _is_number(field) and (size := _size(field.name)) is not None:
            found[field.name] = size
    if re.search(TOWERS, config_class.__name__):
        layers = [name for name in found if RULES[LAYERS] == found[name]]
        found |= dict.fromkeys(layers, TOWER_LAYERS)
    if "kv_lora_rank" in found:  # keys are made for every head
        found["num_key_value_heads"] = RULES[HEADS]
    return found | copy.deepcopy(OWN.get(config_class.model_type, {}))


def _is_number(field: dataclasses.Field) -> bool:
    """Whether a field holds an integer, or None, or ids of tokens."""
    kinds = str(field.type).replace("int | list[int]", "int")
    return "int" in kinds and "list[" not in kinds and not isinstance(field.default, bool)


def _size(name: str) -> int | None:
    """What the first rule that fits a field's name gives it."""
    return next((size for rule, size in RULES.items() if re.fullmatch(rule, name)), None)


def config_of(model_type: str) -> PreTrainedConfig:
    config_class = CONFIG_MAPPING[model_type]
    return config_class(**sizes(config_class, config_class()))


def build(model_type: str) -> PreTrainedModel:
    """A random model, its layers scaled so that the logits depend on each of them."""
    model = AutoModelForCausalLM.from_config(config_of(model_type)).eval()
    scatter(model)
    return model
