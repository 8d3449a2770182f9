"""Weights that are not in memory: refused, or scored as if they were where hooks bring them in."""

import accelerate
import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES
from test_healing import heal, windows

from pruning_utils import efficiency, evaluation, importance, similarity
from pruning_utils.engine import passes, prefixes

N_LAYERS = 8


def offloaded(kind: str, folder):
    """The model of the tests with its weights, or those of all layers but the first, elsewhere."""
    model = ARCHITECTURES["llama"]()
    if kind == "main memory":
        return accelerate.cpu_offload(model, execution_device="cpu")
    if kind == "disk":
        return accelerate.disk_offload(model, folder, execution_device="cpu")
    place = dict.fromkeys(
        ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu"
    )
    for layer in range(N_LAYERS):
        place[f"model.layers.{layer}"] = "disk" if layer else "cpu"
    return accelerate.dispatch_model(model, place, main_device="cpu", offload_dir=folder)


def on_meta(model, name: str):
    """A model of which one module was never loaded."""
    model.set_submodule(name, model.get_submodule(name).to("meta"))
    return model


@pytest.mark.parametrize("kind", ["main memory", "disk", "layers on disk"])
def test_offloaded_models_give_the_plain_ones_numbers(kind, tmp_path):
    plain, model, ids = ARCHITECTURES["llama"](), offloaded(kind, tmp_path), windows(3)
    assert sum(weight.is_meta for weight in model.parameters()) > 60
    assert torch.equal(evaluation.token_losses(model, ids), evaluation.token_losses(plain, ids))
    found, expected = (similarity.measure_similarity(each, ids) for each in (model, plain))
    for name, value in vars(expected).items():
        assert np.array_equal(getattr(found, name), value), name
    assert np.array_equal(
        importance.perplexity_without_layer(model, ids),
        importance.perplexity_without_layer(plain, ids),
    )
    requests = [([3, 5, 7], [11, 13]), ([3, 5], [17])]
    assert prefixes.loglikelihoods(model, requests, batch_size=2) == prefixes.loglikelihoods(
        plain, requests, batch_size=2
    )


SCORES = {
    "similarity": lambda model: similarity.measure_similarity(model, windows(2)),
    "losses": lambda model: evaluation.token_losses(model, windows(2)),
    "perplexity": lambda model: evaluation.perplexity(model, windows(2)),
    "questions": lambda model: prefixes.language_model(model, None, 1),
    "without a layer": lambda model: importance.perplexity_without_layer(model, windows(2)),
    "taylor": lambda model: importance.taylor(model, windows(2)),
    "magnitude": importance.magnitude,
    "speed": lambda model: efficiency.generation_speed(
        model, batch_size=1, prompt_tokens=2, new_tokens=2
    ),
    "healing": heal,
}


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("name", ["model.layers.3", "lm_head", "model.embed_tokens"])
def test_what_was_never_loaded_is_refused_by_its_name(score, name):
    model = on_meta(ARCHITECTURES["llama"](), name)
    with pytest.raises(ValueError, match="meta"):
        SCORES[score](model)


@pytest.mark.parametrize("score", ["taylor", "magnitude", "healing"])
def test_scores_of_weights_need_the_weights_themselves(score, tmp_path):
    with pytest.raises(ValueError, match=r"must be in memory, but .*weight is on the device meta"):
        SCORES[score](offloaded("layers on disk", tmp_path))


def test_a_hook_that_brings_in_nothing_does_not_excuse():
    model = on_meta(ARCHITECTURES["llama"](), "model.layers.3.mlp")
    accelerate.hooks.add_hook_to_module(
        model, accelerate.hooks.AlignDevicesHook("cpu", io_same_device=True)
    )
    with pytest.raises(ValueError, match=r"but model\.layers\.3\.mlp\.gate_proj\.weight is on"):
        passes.refuse_missing_weights(model)
