"""What is no model, or hides one, is refused with a word on what to pass."""

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from architectures import ARCHITECTURES, tiny
from every_architecture import build
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn

from pruning_utils import (
    efficiency,
    evaluation,
    healing,
    importance,
    models,
    similarity,
    surgery,
    width,
)
from pruning_utils.engine import passes, wrappers
from pruning_utils.studies.study import without_layers

IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(3))
WRAPPED = {
    "compiled": (
        lambda: torch.compile(tiny("LlamaConfig")),
        "inside torch.compile: pass .*_orig_mod",
    ),
    "spread": (
        lambda: nn.DataParallel(tiny("LlamaConfig")),
        r"inside DataParallel: pass the model in it \(model.module\)",
    ),
    "nothing": (lambda: None, "of transformers, as load_model returns it, got NoneType"),
    "a module": (lambda: nn.Linear(2, 2), "of transformers, .*got Linear"),
    "a class": (lambda: nn.Linear, "of transformers, .*got the class Linear"),
    "a name": (lambda: "embedded", "of transformers, .*got str"),
}
TAKES = {
    "drop_layers": lambda model, folder: surgery.drop_layers(model, [1]),
    "drop nothing": lambda model, folder: surgery.drop_layers(model, []),
    "save": lambda model, folder: surgery.save(model, None, folder / "model"),
    "decoder_layers": lambda model, folder: models.decoder_layers(model),
    "similarity": lambda model, folder: similarity.measure_similarity(model, IDS),
    "magnitude": lambda model, folder: importance.magnitude(model),
    "taylor": lambda model, folder: importance.taylor(model, IDS),
    "perplexity": lambda model, folder: importance.perplexity_without_layer(model, IDS),
    "tasks": lambda model, folder: evaluation.evaluate_tasks(model, None, ["piqa"], limit=2),
    "width": lambda model, folder: width.prune_width(model, intermediate_size=2),
    "parameters": lambda model, folder: efficiency.stored_parameters(model),
    "flops": lambda model, folder: efficiency.forward_flops(model, batch_size=1, n_tokens=2),
}


@pytest.fixture(autouse=True)
def compiling(monkeypatch):
    """Models are compiled, which the other tests do without."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")


@pytest.mark.parametrize("kind", WRAPPED)
@pytest.mark.parametrize("function", TAKES)
def test_what_is_no_model_itself_is_refused(kind, function, tmp_path):
    make, message = WRAPPED[kind]
    with pytest.raises(ValueError, match=message):
        TAKES[function](make(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_compiled_in_place_is_itself():
    model = tiny("LlamaConfig")
    model.compile(backend="eager")
    assert len(surgery.drop_layers(model, [1]).model.layers) == 7


@pytest.mark.parametrize(
    "change",
    [lambda model: surgery.drop_layers(model, [1]), lambda model: surgery.save(model, None, "x")],
)
def test_a_part_that_is_compiled_is_named(change):
    model = tiny("LlamaConfig")
    model.model.layers[2] = torch.compile(model.model.layers[2])
    with pytest.raises(ValueError, match="model.layers.2 is inside torch.compile"):
        change(model)


HEALS = {"method": "lora", "steps": 1, "batch_size": 1, "warmup_steps": 0, "rank": 2}


@pytest.mark.parametrize("path", ["", "model.layers.2"])
@pytest.mark.parametrize(
    "copies",
    [
        lambda model: healing.heal(model, None, IDS, **HEALS),
        lambda model: without_layers(model, [1]),
        lambda model: models.quantized_copy(model),
    ],
    ids=["heal", "without_layers", "quantized_copy"],
)
def test_a_compiled_forward_is_not_copied(copies, path):
    """It would run the model that was copied, whose weights no training changes."""
    model = tiny("LlamaConfig")
    part = model.get_submodule(path)
    part.forward = torch.compile(part.forward, backend="eager")
    with pytest.raises(ValueError, match=f"the forward of {path or 'model'} is inside torch.comp"):
        copies(model)
    del part.forward
    copies(model)


def test_a_hook_around_a_forward_that_is_decorated_is_no_compiled_one():
    """It bears the marks of what it calls."""
    model = tiny("LlamaConfig")
    layer = model.model.layers[0]
    kind = type(
        "Decorated", (type(layer),), {"forward": torch.compiler.disable(type(layer).forward)}
    )
    layer.__class__ = kind
    add_hook_to_module(layer, ModelHook())
    assert len(without_layers(model, [1]).model.layers) == 7


def test_a_copy_generates_by_itself_after_generation_with_a_static_cache():
    model = tiny("LlamaConfig")
    model._compiled_call = model.__call__
    copied = wrappers.copied(model)
    assert "_compiled_call" not in vars(copied) and "_compiled_call" in vars(model)
    assert torch.equal(copied(IDS).logits, model(IDS).logits)


def test_routers_give_no_logits_while_questions_and_losses_are_measured():
    """Layers that are not run, and rows of several texts, have none of the asked shape."""
    model = tiny("MixtralConfig", num_local_experts=4)
    expected = evaluation.token_losses(model, IDS)
    model.config.output_router_logits = True
    assert torch.equal(evaluation.token_losses(model, IDS), expected)
    with passes.evaluation_mode(model):
        assert model(IDS).aux_loss is None
    assert model.config.output_router_logits


def test_layers_removed_by_hand_without_new_numbers_are_refused():
    model = tiny("LlamaConfig")
    del model.model.layers[2]
    model.config.num_hidden_layers -= 1
    for runs in (
        lambda: efficiency.generation_speed(model, batch_size=1, prompt_tokens=2, new_tokens=2),
        lambda: evaluation.evaluate_tasks(model, None, ["piqa"], limit=1),
    ):
        with pytest.raises(ValueError, match="layer 6 of 7 bears the number 7: layers were remov"):
            runs()


def test_a_cut_to_as_many_layers_as_a_tower_has_blocks_leaves_the_layers_known():
    model = build("phi4_multimodal")
    surgery.drop_layers(model, [0, 1, 3, 4])
    assert len(models.decoder_layers(model)) == 2
    assert len(similarity.measure_similarity(model, IDS).block_influence) == 2
    surgery.drop_layers(model, [0])
    assert len(models.decoder_layers(model)) == 1


def test_weights_that_layers_share_count_in_each_of_them():
    """As in the magnitude of a layer: Zamba has one attention in several of its layers."""
    model = build("zamba")
    logits = model(IDS, use_cache=False).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    by_hand = [
        sum(
            float((w.detach() * w.grad).abs().sum())
            for w in layer.parameters()
            if w.grad is not None
        )
        for layer in models.decoder_layers(model)
    ]
    model.zero_grad()
    assert importance.taylor(model, IDS).tolist() == pytest.approx(by_hand, rel=1e-3)


# --- models of PEFT -------------------------------------------------------------------------------

MEASURES = {name: TAKES[name] for name in ("similarity", "taylor", "perplexity")}
EMBEDDING = "embed_tokens"


@pytest.mark.parametrize(
    "around",
    [
        {"target_modules": [EMBEDDING, "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": [EMBEDDING]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [5]},
    ],
    ids=["adapter", "copy", "some tokens"],
)
def test_an_embedding_inside_something_of_peft_is_one(around):
    model = tiny("LlamaConfig")
    expected = evaluation.token_losses(model, IDS)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **around))
    assert wrappers.vocabulary_size(adapted) == 128
    assert torch.allclose(evaluation.token_losses(adapted, IDS), expected, atol=1e-5)
    assert similarity.measure_similarity(adapted, IDS).n_tokens == IDS.numel()


@pytest.mark.parametrize("function", MEASURES)
@pytest.mark.parametrize("config_class", [PromptTuningConfig, PrefixTuningConfig])
def test_trained_tokens_before_each_text_are_refused(function, config_class, tmp_path):
    config = config_class(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(tiny("LlamaConfig"), config)
    with pytest.raises(ValueError, match=r"_TUNING puts trained ones before .*get_base_model\(\)"):
        MEASURES[function](model, tmp_path)


@pytest.mark.parametrize("name", ["falcon_mamba", "mamba"])
def test_modules_that_mixers_read_past_get_no_adapters(name):
    """Their fused kernels read the others, which the plain way calls."""
    targets = healing.adapter_targets(ARCHITECTURES[name](), "all")
    assert {target.rpartition(".")[2] for target in targets} == {"in_proj"}
