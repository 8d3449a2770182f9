"""A saved folder says what is in memory, is read back before it is shown, and by older programs."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from architectures import LATENT, ROUTED, SIZES, tiny
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast

from pruning_utils import models, surgery
from pruning_utils.engine import held_configurations, saved_models

TOKENS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(3))
WINDOWS = {"head_dim": 8, "sliding_window": 4}


def logits(model):
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits.float()


def reads(folder, name="config.json"):
    return json.loads((folder / name).read_text())


def rewrites(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def saved(model, folder, tokenizer=None):
    return surgery.save(model, tokenizer, folder / "saved")


# --- what the configuration says ------------------------------------------------------------------


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("is_said", [True, False])
def test_whether_the_head_is_shared_is_seen_from_the_weights(is_tied, is_said, tmp_path):
    model = tiny("LlamaConfig", tie_word_embeddings=is_tied)
    model.config.tie_word_embeddings = is_said
    folder = saved(model, tmp_path)
    assert reads(folder)["tie_word_embeddings"] is is_tied
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) is not is_tied
    assert model.config.tie_word_embeddings is is_said, "the model is left as it was"


def test_a_head_of_its_own_in_a_file_that_says_it_is_shared(tmp_path):
    tiny("LlamaConfig", tie_word_embeddings=False).save_pretrained(tmp_path / "in")
    rewrites(tmp_path / "in" / "config.json", tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "in")
    folder = saved(surgery.drop_layers(model, [1]), tmp_path)
    assert reads(folder)["tie_word_embeddings"] is False
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(model))


def test_no_code_is_named_that_is_not_there(tmp_path):
    model = tiny("LlamaConfig")
    model.config.auto_map = {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    model.config.custom_pipelines = {"text-generation": {"impl": "x.X"}}
    folder = saved(model, tmp_path)
    assert not {"auto_map", "custom_pipelines"} & reads(folder).keys()
    assert model.config.auto_map, "the model is left as it was"


def test_layers_for_further_tokens_are_not_promised(tmp_path):
    model = tiny("DeepseekV3Config", **LATENT, **ROUTED)
    assert model.config.num_nextn_predict_layers == 1, "as in the files of DeepSeek"
    assert reads(saved(model, tmp_path))["num_nextn_predict_layers"] == 0


@pytest.mark.parametrize(
    ("dropped", "period"), [([], 2), ([0], None), ([0, 1], 2), ([6, 7], 2), ([7], 2), ([6], None)]
)
def test_a_period_of_layers_is_said_only_where_it_holds(dropped, period, tmp_path):
    kinds = ["sliding_attention", "full_attention"] * 4
    model = tiny("Gemma3TextConfig", **WINDOWS, layer_types=kinds, query_pre_attn_scalar=8)
    model.config._sliding_window_pattern = 2
    surgery.drop_layers(model, dropped)
    folder = saved(model, tmp_path)
    assert reads(folder).get("_sliding_window_pattern") == period
    back = AutoModelForCausalLM.from_pretrained(folder)
    assert back.config.layer_types == [kinds[at] for at in range(8) if at not in dropped]


@pytest.mark.parametrize(
    ("content", "left"),
    [
        ({"layer_types": ["a", "full_attention"], "full_attention_interval": 2}, True),
        ({"layer_types": ["full_attention", "a"], "full_attention_interval": 2}, False),
        ({"layer_types": ["a", "a"], "full_attention_interval": 4}, True),
        ({"layer_types": ["a", "full_attention"], "sliding_window_pattern": "LG"}, False),
        ({"no_rope_layers": [1, 0, 1, 0], "no_rope_layer_interval": 2}, True),
        ({"no_rope_layers": [0, 1, 0], "no_rope_layer_interval": 2}, False),
        (
            {"moe_layers": [1, 3], "interleave_moe_layer_step": 2, "num_hidden_layers": 4},
            True,
        ),
        ({"moe_layers": [0, 2], "interleave_moe_layer_step": 2, "num_hidden_layers": 3}, False),
    ],
)
def test_periods_by_hand(content, left):
    (period,) = content.keys() - {
        "layer_types",
        "no_rope_layers",
        "moe_layers",
        "num_hidden_layers",
    }
    changed = copy.deepcopy(content)
    saved_models._complete_configuration(changed)
    assert (period in changed) is left


# --- what transformers 4 reads --------------------------------------------------------------------

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "factor": 8.0}
HALF = {"rope_type": "default", "partial_rotary_factor": 0.5}


@pytest.mark.parametrize(
    ("config_class", "rope", "fields"),
    [
        ("LlamaConfig", {"rope_type": "default"}, {"rope_scaling": None}),
        ("LlamaConfig", LLAMA3, {"rope_scaling": LLAMA3}),
        ("PhiConfig", HALF, {"rope_scaling": None, "partial_rotary_factor": 0.5}),
        ("GPTNeoXConfig", HALF, {"rotary_pct": 0.5, "rotary_emb_base": 5e5}),
    ],
)
def test_rotation_under_its_former_names(config_class, rope, fields, tmp_path):
    """Each of these folders was loaded with transformers 4.57.3 and gave the same logits."""
    model = tiny(config_class, rope_parameters=rope | {"rope_theta": 5e5})
    folder = saved(model, tmp_path)
    written = reads(folder)
    wanted = fields | {"rope_theta": 5e5, "torch_dtype": "float32"}
    assert {name: written[name] for name in wanted} == wanted
    back = AutoModelForCausalLM.from_pretrained(folder)
    assert back.config.rope_parameters == model.config.rope_parameters
    assert torch.equal(logits(back), logits(model))


def test_rotation_by_kind_under_its_former_names(tmp_path):
    rope = {
        "full_attention": LINEAR | {"rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    model = tiny("Gemma3TextConfig", **WINDOWS, query_pre_attn_scalar=8, rope_parameters=rope)
    folder = saved(model, tmp_path)
    wanted = {"rope_theta": 1e6, "rope_local_base_freq": 2e4, "rope_scaling": LINEAR}
    assert {name: reads(folder)[name] for name in wanted} == wanted
    back = AutoModelForCausalLM.from_pretrained(folder)
    assert back.config.rope_parameters == model.config.rope_parameters


def test_longrope_under_the_three_names_that_phi3_looks_for(tmp_path):
    """transformers 4.57.6 loads the folder, and gives the same logits."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32}
    model = tiny("Phi3Config", rope_parameters=rope | factors, pad_token_id=0)
    folder = saved(model, tmp_path)
    assert reads(folder)["rope_scaling"] == {"type": "longrope"} | factors
    back = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(back), logits(model))
    model.config.rope_parameters["attention_factor"] = 1.7
    assert saved_models._of_transformers_4(model.config.to_dict())["rope_scaling"] == {
        name: value
        for name, value in model.config.rope_parameters.items()
        if name not in ("rope_theta", "partial_rotary_factor")
    }, "what is more than these stays, as transformers 5 reads it there"


def test_phi3_without_longrope_has_no_factors():
    rope = {"rope_theta": 1e4, "rope_type": "default"}
    found = saved_models._of_transformers_4({"model_type": "phi3", "rope_parameters": rope})
    assert found["rope_scaling"] is None


def test_a_tokenizer_that_cannot_read_our_text_is_saved_as_it_is(tmp_path):
    own = Tokenizer(WordLevel({"C": 0, "N": 1}))
    own.enable_truncation(8)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, pad_token="N", eos_token="C")
    folder = saved(tiny("LlamaConfig"), tmp_path, tokenizer)
    assert reads(folder, "tokenizer.json")["truncation"]["max_length"] == 8


@pytest.mark.parametrize(
    ("content", "scaling"),
    [
        ({"rope_type": "default", "mrope_section": [2, 1, 1]}, True),
        ({"rope_type": "default"}, False),
    ],
)
def test_sections_of_pictures_stay_in_the_rotation(content, scaling):
    written = saved_models._of_transformers_4({"rope_parameters": {"rope_theta": 1e4, **content}})
    assert written["rope_scaling"] == (content if scaling else None)


def test_rotation_of_olmo3_under_its_former_name():
    full = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5}
    rope = {"full_attention": full, "sliding_attention": {"rope_theta": 5e5}}
    found = saved_models._of_transformers_4({"model_type": "olmo3", "rope_parameters": rope})
    assert found["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize("adds", [True, False])
def test_tokens_that_a_tokenizer_adds_are_said_where_others_would_be_added(adds, tmp_path):
    own = Tokenizer(BPE({"<unk>": 0, "<s>": 1, "a": 2}, [], unk_token="<unk>"))
    if adds:
        own.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    for name in ("LlamaTokenizerFast", "PreTrainedTokenizerFast"):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>")
        content = {"tokenizer_class": name}
        saved_models._say_ends(content, tokenizer)
        said = {"add_bos_token": adds, "add_eos_token": False} if name[0] == "L" else {}
        assert content == {"tokenizer_class": name} | said


def test_experts_under_their_former_name(tmp_path):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    written = reads(saved(tiny("Qwen3MoeConfig", **experts), tmp_path))
    assert written["num_experts"] == written["num_local_experts"] == 4


def test_a_tokenizer_that_both_know(tmp_path):
    own = Tokenizer(BPE({"<unk>": 0, "<s>": 1, "<x>": 2, "a": 3}, [], unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=own, unk_token="<unk>", bos_token="<s>", extra_special_tokens=["<x>"]
    )
    tokenizer.init_kwargs["auto_map"] = {"AutoTokenizer": ["tokenization_x.X", None]}
    folder = saved(tiny("LlamaConfig"), tmp_path, tokenizer)
    written = reads(folder, "tokenizer_config.json")
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == ["<x>"]
    assert not {"auto_map", "extra_special_tokens"} & written.keys()
    back = transformers.AutoTokenizer.from_pretrained(folder)
    assert back("a<x>a")["input_ids"] == tokenizer("a<x>a")["input_ids"] == [3, 2, 3]
    assert back.extra_special_tokens == ["<x>"]


# --- read back ------------------------------------------------------------------------------------


def test_weights_that_are_read_back_otherwise_are_refused(tmp_path, monkeypatch):
    model = tiny("LlamaConfig")
    write = type(model).save_pretrained

    def damages(self, folder, **options):
        """One value of one weight is another one on disk."""
        write(self, folder, **options)
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.3.mlp.up_proj.weight"][0, 0] += 1
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(type(model), "save_pretrained", damages)
    with pytest.raises(
        ValueError, match="model.layers.3.mlp.up_proj.weight would have other value"
    ):
        saved(model, tmp_path)
    assert not list(tmp_path.iterdir()), "nothing is left"


def test_weights_that_are_not_read_back_are_refused(tmp_path, monkeypatch):
    model = tiny("LlamaConfig")
    write = type(model).save_pretrained

    def forgets(self, folder, **options):
        """A weight does not come to the disk."""
        write(self, folder, **options)
        weights = load_file(folder / "model.safetensors")
        del weights["model.norm.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(type(model), "save_pretrained", forgets)
    with pytest.raises(ValueError, match="1 weights would not be loaded again, model.norm.weight"):
        saved(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_a_library_raises_names_the_model(tmp_path, monkeypatch):
    model = tiny("LlamaConfig")

    def fails(*given, **named):
        raise NotImplementedError

    monkeypatch.setattr(type(model), "save_pretrained", fails)
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot be saved: NotImplementedError"):
        saved(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_weights_without_values_are_refused(tmp_path):
    model = tiny("LlamaConfig")
    model.model.layers[2].to("meta")
    with pytest.raises(ValueError, match="model.layers.2.* is on the device meta"):
        saved(model, tmp_path)
    assert not list(tmp_path.iterdir())


# --- quantised weights ----------------------------------------------------------------------------

BNB = [
    {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    {"load_in_8bit": True},
]


@pytest.mark.parametrize("options", BNB, ids=["4 bits", "8 bits"])
def test_a_checkpoint_in_few_bits_is_cut_and_saved_again(options, tmp_path):
    """Its settings name layers: they are numbered anew, and what was left out stays left out."""
    tiny("LlamaConfig", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "plain")
    settings = BitsAndBytesConfig(
        **options, llm_int8_skip_modules=["lm_head", "model.layers.1.mlp", "model.layers.5.mlp"]
    )
    AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=settings
    ).save_pretrained(tmp_path / "stored")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "stored")
    surgery.drop_layers(model, [0, 1, 3])
    held = type(model.model.layers[1].mlp.up_proj), type(model.model.layers[2].mlp.up_proj)
    assert held[0] is not torch.nn.Linear and held[1] is torch.nn.Linear
    folder = saved(model, tmp_path)
    left = ["lm_head", "model.layers.2.mlp"]
    assert reads(folder)["quantization_config"]["llm_int8_skip_modules"] == left
    back = AutoModelForCausalLM.from_pretrained(folder)
    assert type(back.model.layers[2].mlp.up_proj) is torch.nn.Linear
    torch.testing.assert_close(logits(back), logits(model), rtol=0, atol=0)


def test_weights_that_are_held_in_more_bits_than_they_came_in_are_saved_as_held(tmp_path):
    """The configuration still speaks of the bits of the file, and none of its weights has them."""
    model = tiny("LlamaConfig").to(torch.bfloat16)
    model.config.quantization_config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    model.hf_quantizer = SimpleNamespace(is_serializable=lambda: True)
    folder = saved(model, tmp_path)
    assert "quantization_config" not in reads(folder)
    assert reads(folder)["dtype"] == "bfloat16"
    back = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(back[name], held) for name, held in model.state_dict().items())
    assert model.config.quantization_config and model.hf_quantizer, "the model is left as it was"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("model.layers.3.mlp", "model.layers.1.mlp"),
        ("model.layers.2.mlp", None),
        ("model.layers.3", "model.layers.1"),
        (r"re:.*layers\.4\..*gate", r"re:.*layers\.2\..*gate"),
        ("model.layers.*.self_attn", "model.layers.*.self_attn"),
        (r"model\.layers\.\d+\.mlp", r"model\.layers\.\d+\.mlp"),
        ("model.layers.3.mlp.experts.2", "model.layers.1.mlp.experts.2"),
        ("vision_tower.layers.3.mlp", "vision_tower.layers.3.mlp"),
        ("lm_head", "lm_head"),
        (["lm_head", "model.layers.0.mlp", "layers.4"], ["lm_head", "layers.2"]),
        ({"layers.3": 8, "layers.2": 4, "bits": 4}, {"layers.1": 8, "bits": 4}),
        ({"bits": 4, "sym": None, "group_size": 128}, {"bits": 4, "sym": None, "group_size": 128}),
    ],
)
def test_paths_in_settings_are_numbered_anew(before, after):
    assert held_configurations._renumbered(before, "layers", [1, 3, 4]) == after


@pytest.mark.parametrize("path", [r"layers\.(1|2)\.mlp", "layers.[0-3].mlp", r"+:.*\.18\..*"])
def test_paths_in_other_forms_are_refused_before_anything_changes(path):
    model = tiny("LlamaConfig")
    model.config.quantization_config = {"quant_method": "gptq", "dynamic": {path: {"bits": 8}}}
    with pytest.raises(ValueError, match="cannot be cut .*names layers in a form.*not known"):
        surgery.drop_layers(model, [1])
    assert len(model.model.layers) == model.config.num_hidden_layers == 8


# --- configurations of its own --------------------------------------------------------------------


def test_a_cut_leaves_another_model_of_the_same_configuration_alone():
    config = tiny("LlamaConfig").config
    teacher, student = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    wanted = logits(teacher)
    surgery.drop_layers(student, [1, 2])
    assert (
        config.num_hidden_layers == teacher.config.num_hidden_layers == SIZES["num_hidden_layers"]
    )
    assert len(models.decoder_layers(teacher)) == 8 and len(models.decoder_layers(student)) == 6
    assert torch.equal(logits(teacher), wanted)


def test_modules_that_shared_a_configuration_share_its_copy():
    model = tiny("LlamaConfig")
    surgery.drop_layers(model, [1])
    held = [module.config for module in model.modules() if hasattr(module, "config")]
    assert len(held) > 3 and all(config is model.config for config in held)


# --- what people do before they save --------------------------------------------------------------


def test_a_head_in_the_memory_of_the_embedding_is_shared(tmp_path):
    model = tiny("LlamaConfig")
    model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.data)
    folder = saved(model, tmp_path)
    assert reads(folder)["tie_word_embeddings"] is True
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(model))


@pytest.mark.parametrize("field", saved_models.FURTHER_TOKENS)
def test_no_name_promises_layers_for_further_tokens(field, tmp_path):
    model = tiny("LlamaConfig")
    setattr(model.config, field, 2)
    assert reads(saved(model, tmp_path))[field] == 0
    assert getattr(model.config, field) == 2, "the model is left as it was"


def test_sides_that_were_set_later_are_saved(tmp_path):
    own = Tokenizer(BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, unk_token="<unk>")
    tokenizer.padding_side = "left"
    back = transformers.AutoTokenizer.from_pretrained(
        saved(tiny("LlamaConfig"), tmp_path, tokenizer)
    )
    assert (back.padding_side, back.truncation_side) == ("left", "right")


def test_a_link_stays_a_link(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path / "there")
    assert surgery.save(tiny("LlamaConfig"), None, tmp_path / "link") == tmp_path / "link"
    assert (tmp_path / "link").is_symlink() and reads(tmp_path / "there")["num_hidden_layers"] == 8
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    surgery.save(tiny("LlamaConfig"), None, ".")
    assert reads(tmp_path / "here")["num_hidden_layers"] == 8


def test_weights_in_two_precisions_are_not_rounded_in_silence(tmp_path):
    model = tiny("LlamaConfig").bfloat16()
    model.model.layers.float()
    for weight in model.model.layers.parameters():
        weight.data += 1e-5
    with pytest.raises(ValueError, match="would have other values when it is loaded again"):
        surgery.save(model, None, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["preprocessor_config.json", "runs/log.txt"])
def test_what_others_added_to_a_saved_model_is_not_replaced(name, tmp_path):
    model, folder = tiny("LlamaConfig"), tmp_path / "saved"
    surgery.save(model, None, folder)
    surgery.save(model, None, folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("mine")
    with pytest.raises(ValueError, match=f"holds what surgery.save did not write, {name} for"):
        surgery.save(model, None, folder)
    assert (folder / name).read_text() == "mine"
    surgery.save(model, None, folder, overwrite=True)
    assert not (folder / name).exists()


def test_a_model_that_an_older_version_saved_is_replaced(tmp_path):
    folder = surgery.save(tiny("LlamaConfig"), None, tmp_path / "saved")
    (folder / saved_models.MARKER).write_text('{"pruning_utils": "0.1"}')
    assert surgery.save(tiny("LlamaConfig"), None, folder) == folder


@pytest.mark.parametrize("content", ["", "[]", '{"files": 3}'])
def test_a_folder_whose_mark_is_damaged_is_not_replaced(content, tmp_path):
    folder = surgery.save(tiny("LlamaConfig"), None, tmp_path / "saved")
    (folder / saved_models.MARKER).write_text(content)
    with pytest.raises(ValueError, match="pruning_utils.json is damaged"):
        surgery.save(tiny("LlamaConfig"), None, folder)


def test_where_the_last_step_fails_nothing_is_replaced(tmp_path):
    def fails(new):
        assert (new / "config.json").is_file()
        raise OSError(28, "No space left on device")

    folder = surgery.save(tiny("LlamaConfig"), None, tmp_path / "saved")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(OSError, match="No space left on device"):
        surgery.save(tiny("GPT2Config"), None, folder, finish=fails)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]
