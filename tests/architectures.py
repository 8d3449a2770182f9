"""Tiny random models of many architectures, for every test that must hold whatever the model is
made of.

Each factory in ``ARCHITECTURES`` takes no arguments and returns a fresh model in float32 and
evaluation mode: 8 decoder layers, vocabulary 128, contexts up to 64 tokens, the same weights at
every call. Windows are 4 tokens wide, and layers differ in kind wherever the architecture allows
(sliding or full attention, rotary or no position embedding, dense or mixture of experts, attention,
convolution or recurrence), in patterns that no prefix of themselves repeats.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

N_LAYERS = 8
SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Of what takes pictures beside a decoder.
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
}
MAMBA = {
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
FULL, SLIDING, CONV, RECURRENT = "full_attention", "sliding_attention", "conv", "linear_attention"
WINDOWS = {
    "sliding_window": 4,
    "layer_types": [FULL, SLIDING, SLIDING, FULL, SLIDING, FULL, FULL, SLIDING],
}
HYBRID = [RECURRENT, FULL, RECURRENT, RECURRENT, FULL, FULL, RECURRENT, FULL]
SPARSE = ["dense", "sparse", "sparse", "dense", "sparse", "dense", "sparse", "sparse"]


def scatter(model: PreTrainedModel) -> None:
    """Draw, in place, weights so large that the logits depend on each layer."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(0.3 * noise)
            elif "A_log" not in name and "dt" not in name:  # recurrences keep their decay rates
                parameter.add_(0.1 * noise)


def tiny(config_class: str, *, sizes: dict | None = None, **fields) -> PreTrainedModel:
    """A random model of one configuration class, its layers scaled so that the logits depend on
    each of them.

    Args:
        config_class: Name of the class in transformers.
        sizes: Fields in place of ``SIZES``, for classes with other names.
        **fields: Further fields of the configuration.
    """
    config = getattr(transformers, config_class)(
        **copy.deepcopy((SIZES if sizes is None else sizes) | fields)
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    scatter(model)
    model.generation_config.pad_token_id = 0
    return model


GPT2_NAMES = {
    "vocab_size": 128,
    "n_embd": 32,
    "n_layer": N_LAYERS,
    "n_head": 4,
    "n_positions": 64,
    "n_inner": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BLOOM_NAMES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "n_layer": N_LAYERS,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

CONFIGURATIONS: dict[str, tuple[str, dict]] = {
    "afmoe": ("AfmoeConfig", dict(WINDOWS, **EXPERTS, num_dense_layers=2, head_dim=8)),
    "arcee": ("ArceeConfig", {}),
    "bamba": ("BambaConfig", dict(MAMBA, attn_layer_indices=[1, 2, 5])),
    "bloom": ("BloomConfig", {"sizes": BLOOM_NAMES}),
    "codegen": ("CodeGenConfig", {"sizes": GPT2_NAMES, "n_ctx": 64, "rotary_dim": 4}),
    "cohere": ("CohereConfig", {}),
    "cohere2": ("Cohere2Config", WINDOWS),
    "deepseek_v2": ("DeepseekV2Config", dict(LATENT, **ROUTED, first_k_dense_replace=3)),
    "deepseek_v3": ("DeepseekV3Config", dict(LATENT, **ROUTED, first_k_dense_replace=3)),
    "dots1": (
        "Dots1Config",
        dict(WINDOWS, **ROUTED, n_group=1, topk_group=1, first_k_dense_replace=2),
    ),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 16,
            "moe_layer_start_index": 2,
            "moe_layer_end_index": 5,
        },
    ),
    "exaone4": ("Exaone4Config", WINDOWS),
    "exaone_moe": (
        "ExaoneMoeConfig",
        dict(WINDOWS, **EXPERTS, mlp_layer_types=SPARSE, num_shared_experts=1),
    ),
    "falcon": ("FalconConfig", {}),
    "falcon_mamba": ("FalconMambaConfig", {"state_size": 8, "time_step_rank": 4}),
    "gemma": ("GemmaConfig", {"head_dim": 8}),
    "gemma2": ("Gemma2Config", dict(WINDOWS, head_dim=8, query_pre_attn_scalar=8)),
    "gemma3_text": ("Gemma3TextConfig", dict(WINDOWS, head_dim=8, query_pre_attn_scalar=8)),
    "gemma4_text": (
        "Gemma4TextConfig",
        dict(
            WINDOWS,
            head_dim=8,
            global_head_dim=16,
            hidden_size_per_layer_input=0,
            layer_types=[*WINDOWS["layer_types"][:6], SLIDING, FULL],
        ),
    ),
    "glm4": ("Glm4Config", {"head_dim": 8}),
    "glm4_moe": (
        "Glm4MoeConfig",
        dict(ROUTED, head_dim=8, n_group=1, topk_group=1, first_k_dense_replace=2),
    ),
    "gpt2": ("GPT2Config", {"sizes": GPT2_NAMES}),
    "gpt_bigcode": ("GPTBigCodeConfig", {"sizes": GPT2_NAMES}),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            "hidden_size": 32,
            "num_layers": N_LAYERS,
            "num_heads": 4,
            "window_size": 4,
            "attention_types": [
                [["global", "local", "local", "global"], 1],
                [["local", "global"], 2],
            ],
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "gpt_oss": (
        "GptOssConfig",
        dict(WINDOWS, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
    ),
    "gptj": ("GPTJConfig", {"sizes": GPT2_NAMES, "rotary_dim": 4}),
    "granite": ("GraniteConfig", {}),
    "granite_swa": (
        "GraniteSWAConfig",
        dict(WINDOWS, layer_rope_theta=[1e4, 1e2, 10, 1e3, 50, 1e5, 0, 20]),
    ),
    "jamba": (
        "JambaConfig",
        {
            "num_experts": 4,
            "attn_layer_period": 4,
            "attn_layer_offset": 2,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "laguna": (
        "LagunaConfig",
        dict(
            WINDOWS,
            **EXPERTS,
            head_dim=8,
            mlp_layer_types=SPARSE,
            shared_expert_intermediate_size=16,
            num_attention_heads_per_layer=[4, 2, 6, 4, 8, 2, 4, 6],
        ),
    ),
    "lfm2": ("Lfm2Config", {"layer_types": [CONV, FULL, CONV, CONV, FULL, FULL, CONV, FULL]}),
    "lfm2_moe": (
        "Lfm2MoeConfig",
        dict(
            EXPERTS,
            num_dense_layers=3,
            layer_types=[CONV, FULL, CONV, CONV, FULL, FULL, CONV, FULL],
        ),
    ),
    "llama": ("LlamaConfig", {}),
    "llama4_text": (
        "Llama4TextConfig",
        {
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "moe_layers": [1, 2, 5],
            "attention_chunk_size": 4,
            "no_rope_layers": [1, 0, 1, 1, 0, 1, 0, 1],
        },
    ),
    "mamba": ("MambaConfig", {"state_size": 8, "time_step_rank": 4}),
    "minimax": (
        "MiniMaxConfig",
        {
            "head_dim": 8,
            "num_local_experts": 2,
            "layer_types": [FULL, FULL, RECURRENT, RECURRENT, FULL, RECURRENT, FULL, RECURRENT],
        },
    ),
    "ministral": ("MinistralConfig", dict(WINDOWS, head_dim=8)),
    "mistral": ("MistralConfig", {"sliding_window": 4}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "sliding_window": 4}),
    "modernbert_decoder": (
        "ModernBertDecoderConfig",
        {"local_attention": 8, "layer_types": WINDOWS["layer_types"]},
    ),
    "mpt": (
        "MptConfig",
        {
            "sizes": {
                "vocab_size": 128,
                "d_model": 32,
                "n_layers": N_LAYERS,
                "n_heads": 4,
                "max_seq_len": 64,
            }
        },
    ),
    "nemotron": ("NemotronConfig", {}),
    "olmo2": ("Olmo2Config", {}),
    "olmo3": ("Olmo3Config", WINDOWS),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    "opt": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "persimmon": ("PersimmonConfig", {}),
    "phi": ("PhiConfig", {}),
    "phi3": ("Phi3Config", {"sliding_window": 4}),
    "phimoe": ("PhimoeConfig", {"num_local_experts": 4, "sliding_window": None}),
    "qwen2": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 5},
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        dict(EXPERTS, shared_expert_intermediate_size=16, mlp_only_layers=[2, 5]),
    ),
    "qwen3": (
        "Qwen3Config",
        {"head_dim": 8, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        dict(EXPERTS, head_dim=8, decoder_sparse_step=2, mlp_only_layers=[5]),
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        dict(
            EXPERTS,
            **LINEAR,
            head_dim=8,
            layer_types=HYBRID,
            shared_expert_intermediate_size=16,
            mlp_only_layers=[3],
        ),
    ),
    "recurrent_gemma": ("RecurrentGemmaConfig", {"lru_width": 32, "attention_window_size": 4}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0, 1, 1, 0, 1, 0, 1]}),
    "stablelm": ("StableLmConfig", {}),
    "starcoder2": ("Starcoder2Config", {"sliding_window": 4}),
    "vaultgemma": ("VaultGemmaConfig", dict(WINDOWS, head_dim=8, query_pre_attn_scalar=8)),
    "xglm": (
        "XGLMConfig",
        {"d_model": 32, "ffn_dim": 48, "num_layers": N_LAYERS, "attention_heads": 4},
    ),
}


@cache
def _made(name: str) -> PreTrainedModel:
    """The model of a configuration, which is never handed out itself."""
    config_class, fields = CONFIGURATIONS[name]
    with torch.inference_mode(False):
        return tiny(config_class, **fields)


def _copied(name: str) -> PreTrainedModel:
    return copy.deepcopy(_made(name))


ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {
    name: partial(_copied, name) for name in CONFIGURATIONS
}
