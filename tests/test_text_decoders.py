"""Text decoders inside larger configurations, and models that are saved under other names."""

import copy

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, SIZES, VISION
from test_healing import Tokenizer, bits, same
from tokenizers import Tokenizer as Tokenizers
from tokenizers.models import BPE

from pruning_utils import (
    evaluation,
    healing,
    importance,
    models,
    offload,
    release,
    similarity,
    surgery,
)
from pruning_utils.engine import model_files

TEXT = SIZES | {"num_hidden_layers": 3, "head_dim": 8}
CONFIGURATIONS = {
    "gemma3": lambda: transformers.Gemma3Config(
        text_config=TEXT | {"sliding_window": 8, "query_pre_attn_scalar": 8},
        vision_config=VISION,
        mm_tokens_per_image=4,
    ),
    "llama4": lambda: transformers.Llama4Config(
        text_config=TEXT | {"intermediate_size_mlp": 48, "num_local_experts": 2},
        vision_config=VISION
        | {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
    ),
    # These are known as models of pictures and text only.
    "qwen2_5_vl": lambda: transformers.Qwen2_5_VLConfig(
        text_config=TEXT
        | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        vision_config={"hidden_size": 16, "intermediate_size": 16, "depth": 2, "num_heads": 2}
        | {"out_hidden_size": 32},
    ),
    "llava": lambda: transformers.LlavaConfig(
        text_config=TEXT | {"model_type": "llama"},
        vision_config=VISION | {"model_type": "clip_vision_model"},
    ),
}
IDS = torch.randint(3, 128, (3, 12), generator=torch.Generator().manual_seed(3))
SETTINGS = {"steps": 2, "warmup_steps": 0, "batch_size": 2, "rank": 2, "last_k": 1}


def decoder(name: str):
    torch.manual_seed(0)
    config = CONFIGURATIONS[name]()
    model = model_files.auto_class(config).from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.15)
    return model


def usual_tokenizer() -> transformers.PreTrainedTokenizerFast:
    own = Tokenizers(BPE({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}, [], unk_token="<unk>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=own, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def own_loss(model) -> float:
    with torch.no_grad():
        logits = model(IDS, use_cache=False).logits[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten()))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_text_decoder_is_scanned_and_scored(name):
    model = decoder(name)
    assert similarity.measure_similarity(model, IDS).block_influence.shape == (3,)
    loss = float(evaluation.token_losses(model, IDS).double().mean())
    assert loss == pytest.approx(own_loss(model), abs=1e-5)
    without = importance.perplexity_without_layer(model, IDS)
    for layer in (0, 2):
        cut = surgery.drop_layers(copy.deepcopy(model), [layer])
        assert without[layer] == pytest.approx(evaluation.perplexity(cut, IDS), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("gemma3", "qlora"),
        ("gemma3", "dora"),
        ("gemma3", "full"),
        ("gemma3", "lora"),
        ("gemma3", "last_layers"),
        ("llama4", "lora"),
        ("qwen2_5_vl", "qlora"),
        ("llava", "last_layers"),
    ],
)
def test_a_text_decoder_is_cut_healed_saved_and_loaded(name, method, tmp_path, monkeypatch):
    decoder(name).save_pretrained(tmp_path / "whole")
    usual_tokenizer().save_pretrained(tmp_path / "whole")
    model, _ = models.load_model(tmp_path / "whole", dtype="float32")
    surgery.drop_layers(model, [1])
    settings = SETTINGS | {"method": method, "merge": True, "output_dir": tmp_path / "run"}
    healed = healing.heal(model, Tokenizer, IDS, **settings).model
    assert type(healed) is type(model)
    # Set for the time of the training, also where a configuration has none.
    assert ("use_cache" in vars(healed.config)) == ("use_cache" in vars(model.config))
    assert healed.config.text_config.use_cache == model.config.text_config.use_cache
    assert own_loss(healed) < own_loss(model)
    surgery.save(healed, Tokenizer, tmp_path / "saved")
    back = type(model).from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert own_loss(back.eval()) == pytest.approx(own_loss(healed), abs=1e-6)
    if name == "gemma3":  # as most people load it
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert own_loss(plain.float().eval()) == pytest.approx(own_loss(healed), abs=1e-6)
    monkeypatch.setattr(healing, "mean_loss", lambda *_: pytest.fail("trained again"))
    assert same(bits(healing.heal(model, Tokenizer, IDS, **settings).model), bits(healed))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_text_decoder_is_released_and_scanned_from_the_disk(name, tmp_path):
    """Also where the first of its weights do not fit into memory."""
    model = decoder(name)
    folder = release.save_release(model, Tokenizer, tmp_path / "whole", card="# A card\n")
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    usual_tokenizer().save_pretrained(folder)
    held, _ = offload.load_model(folder, size // 5, dtype="float32", device="cpu")
    assert held.get_input_embeddings().weight.is_meta
    assert torch.equal(
        evaluation.token_losses(held, IDS), evaluation.token_losses(model.float(), IDS)
    )


def test_a_run_goes_on_where_weights_are_saved_under_other_names(tmp_path, monkeypatch):
    """Experts lie in one tensor in memory, and are saved one by one."""
    model = ARCHITECTURES["mixtral"]()
    settings = SETTINGS | {"method": "last_layers", "output_dir": tmp_path / "run"}
    healed = healing.heal(model, Tokenizer, IDS, **settings).model
    changed = {name for name, tensor in bits(healed).items() if (tensor != bits(model)[name]).any()}
    assert any("experts" in name for name in changed)
    monkeypatch.setattr(healing, "mean_loss", lambda *_: pytest.fail("trained again"))
    assert same(bits(healing.heal(model, Tokenizer, IDS, **settings).model), bits(healed))


def test_a_checkpoint_of_other_names_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    from pruning_utils.engine import trainer

    model = ARCHITECTURES["llama"]()
    settings = SETTINGS | {"method": "last_layers", "output_dir": tmp_path / "run"}
    healing.heal(model, Tokenizer, IDS, **settings)
    last = tmp_path / "run/checkpoint-2"
    weights = load_file(last / "model.safetensors")
    renamed = {name.replace("mlp", "feed_forward"): value for name, value in weights.items()}
    save_file(renamed, last / "model.safetensors", metadata={"format": "pt"})
    trainer.seal(last)
    with pytest.raises(ValueError, match="holds weights of other names, such as .*feed_forward"):
        healing.heal(model, Tokenizer, IDS, **settings)


def test_what_chooses_experts_gets_no_adapter():
    model = decoder("llama4")
    routers = [name for name, module in model.named_modules() if "Router" in type(module).__name__]
    targets = healing.adapter_targets(model, "all")
    assert routers and not set(routers) & set(targets)
    assert any(name.endswith("down_proj") for name in targets)
    with pytest.raises(ValueError, match="targets must be"):
        healing.adapter_targets(model, ["router"])


def test_a_model_that_needs_pictures_is_refused_as_it_is_loaded(tmp_path):
    config = transformers.BlipConfig(
        text_config=SIZES | {"num_hidden_layers": 3, "encoder_hidden_size": 16},
        vision_config=VISION,
    )
    transformers.BlipForConditionalGeneration(config).save_pretrained(tmp_path)
    usual_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot be loaded: blip .* of text alone"):
        models.load_model(tmp_path)
