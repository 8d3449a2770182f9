"""Dropping layers: the same numbers as a pass that skips them, whatever the model is made of; and
files that load."""

from __future__ import annotations

import copy
import errno
import functools
import json
import resource
import stat
from collections.abc import Iterable

import numpy as np
import pytest
import torch
import transformers
import yaml
from architectures import ARCHITECTURES, FULL, N_LAYERS, SIZES, SLIDING, VISION, tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from pruning_utils import surgery
from pruning_utils.models import decoder_layers

# Not contiguous; the first layer, the last layer; and one layer, so that every other one moves or
# stays.
# Nothing in their configurations is of a layer: test_every_architecture cuts and saves them too,
# and llama, gpt2 and mamba stand for them here.
PLAIN = {
    *("arcee", "bloom", "codegen", "cohere", "falcon", "falcon_mamba", "gemma", "glm4"),
    *("gpt_bigcode", "gpt_neox", "gptj", "granite", "mistral", "mpt", "nemotron", "olmo2"),
    *("olmoe", "opt", "persimmon", "phi", "phi3", "phimoe", "stablelm", "starcoder2", "xglm"),
}
DROPS = {name: [(0, 3, 4), (2, 5, 7)] for name in ARCHITECTURES} | {
    "gemma4_text": [(0, 3, 4), (2, 5)],  # its last layer is of full attention by rule
    "jamba": [(0, 1, 2, 3), (6, 7)],  # its kinds of layers come in periods
    "modernbert_decoder": [(1, 3, 4), (2, 5, 7)],  # its first layer is unlike the others
    "recurrent_gemma": [(0, 3, 4), (2, 7)],  # one layer of attention must stay
}
TOKENS = torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True, scope="module")
def _one_quiet_thread():
    """One thread is faster for small models; a progress bar would be a file on the full disk."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()
    torch.set_num_threads(n_threads)


@functools.cache
def _original(name: str):
    return ARCHITECTURES[name]()


def _logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def _logits_skipping(model, layers: Iterable[int]) -> torch.Tensor:
    """Logits of an untouched model whose ``layers`` hand their input through."""
    skipped = [decoder_layers(model)[layer] for layer in layers]
    try:
        for layer in skipped:

            def hand_through(*args, run=layer.forward, **kwargs):
                states = args[0] if args else kwargs["hidden_states"]
                output = run(*args, **kwargs)
                return (states, *output[1:]) if isinstance(output, tuple) else states

            layer.forward = hand_through
        return _logits(model)
    finally:
        for layer in skipped:
            vars(layer).pop("forward", None)


def _dropped(name: str, layers: Iterable[int]):
    return surgery.drop_layers(copy.deepcopy(_original(name)), layers)


def _state(model) -> tuple:
    """What a refused cut must leave alone: configuration, layers, plain attributes, weights."""
    attributes = [
        (path, name, value)
        for path, part in model.named_modules()
        for name, value in vars(part).items()
        if isinstance(value, (bool, int, float, str, list, tuple, type(None)))
    ]
    weights = {name: (id(tensor), tensor.sum().item()) for name, tensor in model.named_parameters()}
    return copy.deepcopy(
        (
            model.config.to_dict(),
            [id(layer) for layer in decoder_layers(model)],
            attributes,
            weights,
        )
    )


def _per_layer(config) -> dict[str, list]:
    """The fields of a configuration with one entry a layer, also those that its class derives."""
    found = {name: getattr(config, name, None) for name in sorted(surgery.ENTRY_PER_LAYER)}
    return {name: list(value) for name, value in found.items() if isinstance(value, (list, tuple))}


def _n_parameters(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", sorted(ARCHITECTURES.keys() - PLAIN))
def test_a_cut_model_computes_what_skipping_computes(name):
    original = _original(name)
    untouched = _logits(original)
    for layers in DROPS[name]:
        wanted = _logits_skipping(original, layers)
        model = _dropped(name, layers)
        torch.testing.assert_close(_logits(model), wanted, rtol=1e-5, atol=1e-6)
        assert (wanted - untouched).abs().max() > 0.05 * untouched.std(), "these layers do nothing"
        kept = [layer for layer in range(N_LAYERS) if layer not in layers]
        assert len(decoder_layers(model)) == model.config.num_hidden_layers == len(kept)
        assert _n_parameters(model) == _n_parameters(original) - sum(
            _n_parameters(decoder_layers(original)[layer]) for layer in layers
        )
        for field, values in _per_layer(original.config).items():
            if len(values) == N_LAYERS:
                assert _per_layer(model.config)[field] == [values[layer] for layer in kept], field
        for number, layer in enumerate(decoder_layers(model)):
            indices = {
                path: part.layer_idx
                for path, part in layer.named_modules()
                if hasattr(part, "layer_idx")
            }
            assert set(indices.values()) <= {number}, indices


@pytest.mark.parametrize("name", sorted(ARCHITECTURES.keys() - PLAIN))
def test_a_saved_cut_loads_plainly_and_is_the_same(name, tmp_path):
    model = _dropped(name, DROPS[name][1])
    path = surgery.save(model, None, tmp_path / "model")
    loaded, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(_logits(loaded.eval()), _logits(model), rtol=0, atol=0)
    assert type(loaded) is type(model)
    assert _per_layer(loaded.config) == _per_layer(model.config)
    assert loaded.dtype == torch.float32
    assert (
        len(
            {
                one.get_input_embeddings().weight is one.get_output_embeddings().weight
                for one in (_original(name), model, loaded)
            }
        )
        == 1
    )
    assert _n_parameters(loaded) == _n_parameters(model)


@pytest.mark.parametrize(
    "name",
    [
        "gemma2",
        "gemma3_text",
        "cohere2",
        "olmo3",
        "qwen2",
        "gpt_oss",
        "llama4_text",
        "smollm3",
        "exaone4",
        "vaultgemma",
    ],
)
def test_fields_cut_to_their_first_entries_would_be_seen(name):
    """A configuration cut short would give other logits, with these patterns and windows."""
    model, original = _dropped(name, DROPS[name][0]), _original(name)
    config = copy.deepcopy(model.config)
    for field, values in _per_layer(original.config).items():
        setattr(config, field, values[: config.num_hidden_layers])
    if name == "llama4_text":
        # Experts have other weights; attention is the question here.
        config.moe_layers = model.config.moe_layers
    wrong = type(model)(config).eval()
    wrong.load_state_dict(model.state_dict())
    assert (_logits(wrong) - _logits(model)).abs().max() > 1e-3


def test_fields_that_speak_of_layers_are_sliced_by_hand_worked_values():
    # Full, sliding, sliding, full, sliding, full, full, sliding.
    model = _dropped("gemma3_text", (0, 3, 4))
    assert model.config.layer_types == [SLIDING, SLIDING, FULL, FULL, SLIDING]
    model = _dropped("qwen2", (1, 6))  # full attention in layers 0 to 4, a window from 5
    assert (model.config.layer_types, model.config.max_window_layers) == (
        [FULL] * 4 + [SLIDING] * 2,
        4,
    )
    assert _dropped("deepseek_v3", (1, 6)).config.first_k_dense_replace == 2
    assert _dropped("deepseek_v3", (0, 1, 2)).config.first_k_dense_replace == 0
    model = _dropped("ernie4_5_moe", (1, 3, 7))  # experts in layers 2 to 5
    assert (model.config.moe_layer_start_index, model.config.moe_layer_end_index) == (1, 3)
    assert _dropped("bamba", (0, 1, 4)).config.attn_layer_indices == [0, 2]  # of 1, 2, 5
    assert _dropped("qwen2_moe", (0, 2)).config.mlp_only_layers == [3]  # of 2, 5
    # Experts in 1, 3 and 7: every second layer but 5; 3 and 7 are now 1 and 4.
    model = _dropped("qwen3_moe", (0, 1, 6))
    assert (model.config.decoder_sparse_step, model.config.mlp_only_layers) == (1, [0, 2, 3])
    model = _dropped("llama4_text", (2, 7))  # experts in 1, 2, 5; no rotary embedding in 1, 4, 6
    assert (model.config.moe_layers, model.config.no_rope_layers) == ([1, 4], [1, 0, 1, 0, 1, 0])
    model = _dropped("gpt_neo", (0, 1, 2))
    assert model.config.attention_layers == ["global", "local", "global", "local", "global"]
    assert model.config.attention_types == [[["global", "local", "global", "local", "global"], 1]]
    assert _dropped("recurrent_gemma", (0, 4)).config.block_types == [  # attention in 2 and 5
        "recurrent",
        "attention",
        "recurrent",
        "attention",
        "recurrent",
        "recurrent",
    ]
    # Full: 0, 3, 5, 7.
    overrides = _dropped("gemma4_text", (0, 3)).config.to_dict()["per_layer_config"]
    assert overrides == {"3": {"head_dim": 16}, "5": {"head_dim": 16}}


def test_no_layer_to_drop_changes_nothing():
    model = _original("gemma3_text")
    before = _state(model)
    assert surgery.drop_layers(model, []) is model
    assert surgery.drop_layers(model, np.array([], dtype=int)) is model
    assert _state(model) == before


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "gemma3_text",
        "qwen3_moe",
        "llama4_text",
        "gpt_neo",
        "recurrent_gemma",
        "gemma4_text",
    ],
)
def test_two_cuts_equal_one(name):
    once = _dropped(name, (0, 3, 4))
    model = _dropped(name, [3])  # layer 4 is now number 3
    assert surgery.drop_layers(model, [3, 0]) is model
    assert model.config.to_dict() == once.config.to_dict()
    torch.testing.assert_close(_logits(model), _logits(once), rtol=0, atol=0)


def test_any_iterable_of_integers_names_layers():
    wanted = _dropped("llama", (1, 6)).state_dict()
    for layers in (
        [6, 1],
        {1, 6},
        np.array([1, 6]),
        (np.int32(6), 1),
        torch.tensor([1, 6]),
        iter([1, 6]),
    ):
        state = _dropped("llama", layers).state_dict()
        assert all(torch.equal(state[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(
    ("layers", "named"),
    [
        ([8], "8"),
        ([-1], "-1"),
        ([1, 1], "1 twice"),
        ([2, np.int64(2)], "twice"),
        ([True], "True"),
        ([1.0], "1.0"),
        (np.array([1.0]), "1.0"),
        (np.array([True]), "True"),
        (["1"], "'1'"),
        ("12", "'12'"),
        (3, "3"),
        ([None], "None"),
        (range(8), "at least one layer must stay"),
        (None, "None"),
    ],
)
def test_bad_layer_numbers_are_refused_by_name_and_range(layers, named):
    model = _original("llama")
    before = _state(model)
    with pytest.raises(ValueError, match=named) as caught:
        surgery.drop_layers(model, layers)
    assert "[0, 8)" in str(caught.value) or "all 8" in str(caught.value)
    assert _state(model) == before
    with pytest.raises(ValueError, match=named):
        surgery.mergekit_plan("model", 8, layers)


REFUSED = {
    "diffllama": (("DiffLlamaConfig", {}), [1], "lambda_init"),
    "gemma3n_text": (
        (
            "Gemma3nTextConfig",
            {
                "vocab_size_per_layer_input": 128,
                "hidden_size_per_layer_input": 8,
                "head_dim": 8,
                "num_kv_shared_layers": 2,
                "laurel_rank": 4,
            },
        ),
        [6],
        "embed_tokens_per_layer",
    ),
    "gpt2, scaled by depth": (
        (
            "GPT2Config",
            {
                "n_embd": 32,
                "n_head": 4,
                "vocab_size": 128,
                "n_layer": 8,
                "scale_attn_by_inverse_layer_idx": True,
            },
        ),
        [3],
        "scaling",
    ),
    "minicpm3": (
        (
            "MiniCPM3Config",
            {
                "num_key_value_heads": 4,
                "q_lora_rank": 16,
                "kv_lora_rank": 16,
                "qk_rope_head_dim": 8,
                "qk_nope_head_dim": 8,
                "v_head_dim": 8,
            },
        ),
        [3],
        "residual_scale",
    ),
    "rwkv": (
        ("RwkvConfig", {"attention_hidden_size": 32, "context_length": 64}),
        [3],
        "rescale_every",
    ),
    "zamba2": (
        (
            "Zamba2Config",
            {
                "mamba_d_state": 8,
                "n_mamba_heads": 8,
                "layers_block_type": ["linear_attention", "hybrid"] * 4,
            },
        ),
        [3],
        "share",
    ),
    "unknown list": (("LlamaConfig", {"gate_strengths": list(range(8))}), [3], "gate_strengths"),
    "unknown numbers": (("LlamaConfig", {"special_layers": [2, 5]}), [3], "special_layers"),
    "jamba between periods": (
        (
            "JambaConfig",
            {"attn_layer_period": 4, "attn_layer_offset": 2, "num_experts": 2, "mamba_d_state": 8},
        ),
        [3],
        "would have to be",
    ),
    "jamba without attention": (
        (
            "JambaConfig",
            {"attn_layer_period": 4, "attn_layer_offset": 2, "num_experts": 2, "mamba_d_state": 8},
        ),
        [2, 6],
        "no attention layer",
    ),
    "gemma4, last layer": (
        (
            "Gemma4TextConfig",
            {
                "hidden_size_per_layer_input": 0,
                "layer_types": [SLIDING, FULL] * 4,
                "global_head_dim": 16,
                "head_dim": 8,
            },
        ),
        [7],
        "layer_types",
    ),
    "modernbert, first layer": (("ModernBertDecoderConfig", {}), [0], "attn_norm"),
    "minimax, first layer": (
        ("MiniMaxConfig", {"num_local_experts": 2, "layer_types": [FULL, "linear_attention"] * 4}),
        [0],
        "first layer",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_configuration_expresses_is_refused_and_nothing_changes(case):
    (config_class, fields), layers, named = REFUSED[case]
    model = tiny(config_class, **fields)
    before = _state(model)
    with pytest.raises(ValueError, match=named):
        surgery.drop_layers(model, layers)
    assert _state(model) == before


class ScaledFromTheSeventh(transformers.LlamaForCausalLM):
    """An architecture with a rule by depth in its code, and nothing of it in its configuration."""

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers[6:]:
            layer.gain = 0.5


@pytest.mark.parametrize("layers", [[1, 2], [1]])  # the rule would reach no layer, or another one
def test_a_rule_in_code_alone_is_refused(layers):
    model = ScaledFromTheSeventh(copy.deepcopy(_original("llama").config))
    with pytest.raises(ValueError, match="gain is 0.5, and would be absent"):
        surgery.drop_layers(model, layers)
    assert len(decoder_layers(surgery.drop_layers(model, [7]))) == 7


def test_every_copy_of_the_configuration_is_cut():
    model = ARCHITECTURES["gemma3_text"]()
    model.model.config = copy.deepcopy(model.config)
    wanted = _logits_skipping(model, [0, 3])
    torch.testing.assert_close(_logits(surgery.drop_layers(model, [0, 3])), wanted)
    assert model.config.layer_types == [SLIDING, SLIDING, SLIDING, FULL, FULL, SLIDING]
    assert model.model.config.layer_types == model.config.layer_types


def test_weights_that_do_not_fit_the_configuration_are_refused():
    model = ARCHITECTURES["llama"]()
    model.lm_head = torch.nn.Linear(32, 130, bias=False)
    with pytest.raises(ValueError, match="weights"):
        surgery.drop_layers(model, [1])
    assert len(decoder_layers(model)) == 8


def test_layers_with_shared_weights_are_refused():
    model = ARCHITECTURES["llama"]()
    decoder_layers(model)[5].mlp.up_proj.weight = decoder_layers(model)[2].mlp.up_proj.weight
    with pytest.raises(ValueError, match="layers 2 and 5 share mlp.up_proj.weight"):
        surgery.drop_layers(model, [7])


def test_adapters_are_refused_until_they_are_merged(tmp_path):
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    injected = ARCHITECTURES["llama"]()
    injected.add_adapter(lora)
    wrapped = get_peft_model(ARCHITECTURES["llama"](), lora)
    for model in (injected, wrapped):
        with pytest.raises(ValueError, match="merge"):
            surgery.drop_layers(model, [1])
        with pytest.raises(ValueError, match="merge"):
            surgery.save(model, None, tmp_path / "model")
        with pytest.raises(ValueError, match="tokenizer must be .* got 'a name'"):
            surgery.save(model, "a name", tmp_path / "model")
        assert model.config.num_hidden_layers == 8
    assert not (tmp_path / "model").exists()
    merged = wrapped.merge_and_unload()
    wanted = _logits_skipping(merged, [1, 6])
    torch.testing.assert_close(_logits(surgery.drop_layers(merged, [1, 6])), wanted)


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}


@pytest.mark.parametrize(
    "options", [NF4, NF4 | {"bnb_4bit_use_double_quant": True}, {"load_in_8bit": True}]
)
def test_quantised_weights_are_kept_as_they_are(options, tmp_path):
    tiny("LlamaConfig", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    quantised = {"quantization_config": BitsAndBytesConfig(**options), "device_map": {"": "cpu"}}
    wanted = _logits_skipping(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base", **quantised).eval(), [0, 3, 7]
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **quantised).eval()
    kept = [id(decoder_layers(model)[layer].mlp.up_proj.weight) for layer in (1, 2, 4, 5, 6)]
    surgery.drop_layers(model, [0, 3, 7])
    assert [id(layer.mlp.up_proj.weight) for layer in decoder_layers(model)] == kept
    loaded, info = AutoModelForCausalLM.from_pretrained(
        surgery.save(model, None, tmp_path / "cut"),
        device_map={"": "cpu"},
        output_loading_info=True,
    )
    assert not any(info.values()), info
    for one in (model, loaded.eval()):
        torch.testing.assert_close(_logits(one), wanted, rtol=0, atol=0)
    generations = [
        model.generate(
            TOKENS[:1], use_cache=use_cache, max_new_tokens=4, min_new_tokens=4, do_sample=False
        )
        for use_cache in (True, False)
    ]
    assert generations[0].tolist() == generations[1].tolist()
    state = getattr(decoder_layers(model)[0].mlp.up_proj.weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        with pytest.raises(ValueError, match="before its first forward pass"):
            surgery.save(model, None, tmp_path / "later")
        assert not (tmp_path / "later").exists()
        torch.testing.assert_close(_logits(model), wanted, rtol=0, atol=0)


def test_all_layers_of_a_kind_may_go(tmp_path):
    kinds = [FULL] * 6 + [SLIDING] * 2
    model = tiny("Qwen2Config", use_sliding_window=True, sliding_window=4, layer_types=kinds)
    assert model.model.has_sliding_layers
    surgery.drop_layers(model, [6, 7])
    assert not model.model.has_sliding_layers
    saved = surgery.save(model, None, tmp_path / "cut")
    back = transformers.AutoModelForCausalLM.from_pretrained(saved).eval()
    assert torch.equal(_logits(back), _logits(model))


def test_an_embedded_text_model_of_a_multimodal_one_is_cut_in_its_own_configuration():
    text = {
        **SIZES,
        "head_dim": 8,
        "sliding_window": 4,
        "layer_types": [FULL, SLIDING, SLIDING, FULL] * 2,
    }
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_id=127,
        boi_token_id=125,
        eoi_token_id=126,
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    tokens = TOKENS % 120 + 3
    with torch.no_grad():
        layer = decoder_layers(model)[0]
        layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
        wanted = model(tokens, use_cache=False).logits
        vars(layer).pop("forward")
        surgery.drop_layers(model, [0])
        torch.testing.assert_close(model(tokens, use_cache=False).logits, wanted)
    assert (
        model.config.text_config.num_hidden_layers,
        model.config.vision_config.num_hidden_layers,
    ) == (7, 2)
    assert model.config.text_config.layer_types == text["layer_types"][1:]


@pytest.fixture
def tokenizer():
    words = Tokenizer(
        models.WordLevel({f"w{number}": number for number in range(128)}, unk_token="w3")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="w3", pad_token="w0", bos_token="w1"
    )


def test_save_keeps_dtype_and_tying_and_writes_the_tokenizer(tmp_path, tokenizer):
    tiny("LlamaConfig", tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    surgery.drop_layers(model, [0, 5])
    path = surgery.save(model, tokenizer, tmp_path / "deep" / "model")
    assert path == tmp_path / "deep" / "model"
    assert [file.name for file in path.parent.iterdir()] == ["model"]
    assert not list(path.glob("*.bin"))
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o644}
    loaded, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.dtype == torch.bfloat16
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    torch.testing.assert_close(_logits(loaded.eval()), _logits(model), rtol=0, atol=0)
    assert (
        AutoTokenizer.from_pretrained(path)("w5 w9").input_ids
        == tokenizer("w5 w9").input_ids
        == [5, 9]
    )
    assert json.loads((path / "config.json").read_text())["num_hidden_layers"] == 6


def test_save_replaces_its_own_directory_and_no_other(tmp_path):
    model, smaller = ARCHITECTURES["llama"](), _dropped("llama", [2])
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter.txt").write_text("years of work")
    with pytest.raises(ValueError, match="thesis"):
        surgery.save(model, None, foreign)
    with pytest.raises(ValueError, match="chapter.txt"):
        surgery.save(model, None, foreign / "chapter.txt", overwrite=True)
    assert [file.read_text() for file in foreign.iterdir()] == ["years of work"]
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "new", tmp_path / "empty"):
        surgery.save(model, None, path)
        (path / "left over").touch()
        with pytest.raises(ValueError, match="holds what surgery.save did not write, left over"):
            surgery.save(smaller, None, path)
        surgery.save(smaller, None, path, overwrite=True)
        assert not (path / "left over").exists()
        assert AutoModelForCausalLM.from_pretrained(path).config.num_hidden_layers == 7
    surgery.save(model, None, foreign, overwrite=True)
    assert not (foreign / "chapter.txt").exists()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["empty", "new", "thesis"]


@pytest.mark.parametrize(
    "limit", [100, 50_000]
)  # bytes: the configuration, or only the weights, do not fit
def test_a_full_disk_names_the_target_and_leaves_what_was_there(tmp_path, limit):
    model = ARCHITECTURES["llama"]()
    path = surgery.save(_dropped("llama", [2]), None, tmp_path / "model")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for target in (path, tmp_path / "other"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(OSError, match=f"could not write {target}") as caught:
                surgery.save(model, None, target)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert caught.value.errno == errno.EFBIG
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    assert AutoModelForCausalLM.from_pretrained(path).config.num_hidden_layers == 7


def test_a_rename_that_fails_puts_the_old_directory_back(tmp_path, monkeypatch):
    path = surgery.save(_dropped("llama", [2]), None, tmp_path / "model")
    rename = surgery.os.replace

    def refuse(source, target):
        if source.name == "new":
            raise OSError(errno.EXDEV, "no way")
        rename(source, target)

    monkeypatch.setattr(surgery.os, "replace", refuse)
    with pytest.raises(OSError, match=f"could not write {path}: no way") as caught:
        surgery.save(ARCHITECTURES["llama"](), None, path)
    assert caught.value.errno == errno.EXDEV
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    assert AutoModelForCausalLM.from_pretrained(path).config.num_hidden_layers == 7


def test_a_quantisation_that_cannot_be_saved_is_one_clear_error(tmp_path):
    model = ARCHITECTURES["llama"]()

    class Packed:
        def is_serializable(self):
            return False

    model.hf_quantizer = Packed()
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="Packed cannot save.*16 or 32 bits"):
        surgery.save(model, None, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_mergekit_plan_lists_the_runs_of_kept_layers():
    assert (
        surgery.mergekit_plan("org/model", 30, [11, 12, 13, 20, 29])
        == """\
slices:
- sources:
  - model: org/model
    layer_range: [0, 11]
- sources:
  - model: org/model
    layer_range: [14, 20]
- sources:
  - model: org/model
    layer_range: [21, 29]
merge_method: passthrough
dtype: bfloat16
"""
    )
    plan = yaml.safe_load(surgery.mergekit_plan("a: #b", 3, np.array([0, 2]), dtype="float16"))
    assert plan == {
        "slices": [{"sources": [{"model": "a: #b", "layer_range": [1, 2]}]}],
        "merge_method": "passthrough",
        "dtype": "float16",
    }
    plan = yaml.safe_load(surgery.mergekit_plan("model", np.int64(4), []))
    assert plan["slices"] == [{"sources": [{"model": "model", "layer_range": [0, 4]}]}]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("model", 0, []), "n_layers"),
        (("model", True, []), "n_layers"),
        (("model", 8.0, []), "n_layers"),
        (("", 8, []), "model_name"),
        ((None, 8, []), "model_name"),
    ],
)
def test_a_mergekit_plan_refuses_bad_arguments(arguments, named):
    with pytest.raises(ValueError, match=named):
        surgery.mergekit_plan(*arguments)
    # What "auto" stands for is another type on another machine.
    for dtype in ("int3", "auto"):
        with pytest.raises(ValueError, match=f"dtype must be one of bfloat16, .*, got '{dtype}'"):
            surgery.mergekit_plan("model", 8, [], dtype=dtype)


def test_layers_that_were_removed_by_hand_are_refused():
    """Their cache would have no place for the last one."""
    model = ARCHITECTURES["llama"]()
    del model.model.layers[3]
    model.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match="layer 6 of 7 bears the number 7"):
        surgery.drop_layers(model, [1])
    assert len(model.model.layers) == 7


@pytest.mark.parametrize("layers", [torch.tensor(1), torch.ones(2, 2, dtype=torch.long)])
def test_tensors_are_lists_of_layers(layers):
    with pytest.raises(ValueError, match="layers must be different integers"):
        surgery.drop_layers(ARCHITECTURES["llama"](), layers)


def test_kinds_of_layers_may_come_back_in_another_order():
    """transformers makes some lists of sets, whose order differs from process to process."""
    kinds = ["sliding", "full"]
    for back in (["full", "sliding"], ["full"]):
        assert back in surgery._renumbered(kinds, back, [0, 1], 3)
    for wrong in (["full", "full"], ["full", "linear"], "full"):
        assert wrong not in surgery._renumbered(kinds, wrong, [0, 1], 3)
