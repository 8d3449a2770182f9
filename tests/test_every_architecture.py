"""Cuts and distances of every causal language model type of the installed transformers.

The types come from transformers' own mapping, so a type that a new version brings is tested too: if
it cannot be built, or a cut of it is refused, its test fails until it is listed here with a reason.

transformers 5.23.0 has 189 types, and 184 can be built. Three cuts of each, and four of two, are
554: 462 equal a pass that skips these layers, 92 are refused for the reasons in ``REFUSED``, and
none is wrong. By type 147 are right in all cuts, 11 in some, and 26 are refused in all. Distances
equal those of states that hooks keep in 173 types; 11 have no state for each token at every layer
and are refused. In four types transformers' own model, uncut, fails at what is asked of a cut one:
``CACHE_OF_THEIR_OWN``, ``NOT_LOADED_PLAINLY`` and ``NOT_READ_BACK``.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from every_architecture import KINDS, N_LAYERS, TYPES, build
from test_similarity import reference
from transformers import AutoModelForCausalLM, PreTrainedModel

from pruning_utils import similarity, surgery
from pruning_utils.models import decoder_layers

# Types of which no model can be made here, and what is raised.
UNBUILT: dict[str, str] = {
    "gemma3n": "requires the timm library",
    "gemma4_assistant": "hidden_size_per_layer_input must be 0",
    "gemma4_unified_assistant": "set of layer types",
    "musicgen": "'MusicgenConfig' object has no attribute",
    "musicgen_melody": "'MusicgenMelodyConfig' object has no attribute",
}
BUILT = [name for name in TYPES if name not in UNBUILT]
Cuts = tuple[tuple[int, ...], ...]
CUT, LAST, BLOCK, SECOND = (1, 3), (N_LAYERS - 1,), (2, 3), (0, 2, 4)
NO_LAYERS = "no single list of decoder layers"
# Why a cut is refused, and the cuts that are made nevertheless.
REFUSED: dict[str, tuple[str, Cuts]] = {
    **{
        name: ("encoder_layers does not count .*'decoder_layers'", ())
        for name in (
            "bart",
            "bigbird_pegasus",
            "blenderbot",
            "blenderbot-small",
            "marian",
            "mbart",
            "mvp",
            "pegasus",
            "plbart",
            "whisper",
        )
    },
    "beam": ("residual_add_idx is", (LAST,)),
    "blt": (NO_LAYERS, ()),
    "diffllama": ("lambda_init is", (LAST,)),
    "gemma3n_text": ("embed_tokens_per_layer|num_kv_shared_layers = 2", ()),
    "gemma4": ("layer_types would have to be", (CUT, BLOCK, SECOND)),
    "gemma4_text": ("layer_types would have to be", (CUT, BLOCK, SECOND)),
    "gemma4_unified": ("layer_types would have to be", (CUT, BLOCK, SECOND)),
    "gemma4_unified_text": ("layer_types would have to be", (CUT, BLOCK, SECOND)),
    "glm_moe_dsa": ("indexer_types = ", ()),
    "gpt_neox_japanese": ("layers.4.attention.dense_bias", (CUT, BLOCK, SECOND)),
    "hrm_text": (NO_LAYERS, ()),  # two stacks, each of which runs several times
    "hy_v4": ("indexer_types = ", ()),
    "inkling2_text": ("n_layers_per_attn_res_block = ", ()),
    "jamba": ("layer_types would have to be|no attention layer", (LAST,)),
    "longcat_flash": (
        NO_LAYERS,
        (),
    ),  # two attentions in a layer, and num_hidden_layers counts both
    "minicpm3": ("residual_scale is", ()),
    "minimax": ("first layer must be one of full attention", (CUT, LAST, BLOCK)),
    "mllama": ("cross_attention_layers = ", ()),
    "modernbert-decoder": ("layers.0.attn_norm.class", (CUT, LAST, BLOCK)),
    "prophetnet": ("num_encoder_layers` and `num_decoder_layers", ()),
    "reformer": ("attn_layers = ", ()),
    "rwkv": ("rescale_every = ", ()),
    "xlm": (NO_LAYERS, ()),  # attentions, ffns and norms are lists beside each other
    "xlstm": ("num_hidden_layers does not count .*'num_blocks'", ()),
    "zamba": ("layers 0 and 3 share", ()),
    "zamba2": ("layers 0 and 3 share", ()),
    "zaya": ("mlp.gate.use_eda", (CUT, LAST, BLOCK)),  # the first router has no router before it
}
# Where the layers do not hand on one state for each token.
WITHOUT_DISTANCES: dict[str, str] = {
    **dict.fromkeys(("blt", "hrm_text", "longcat_flash", "xlm"), NO_LAYERS),
    **dict.fromkeys(
        ("cpmant", "deepseek_v4", "gemma3n_text", "hy_v4", "prophetnet", "xlnet"),
        "one state for each token",
    ),
    "mllama": "ran 4 of its 6 layers once",  # the other two need pictures
}
# Faults of transformers: what its own model, uncut, does wrong too.
CACHE_OF_THEIR_OWN = {
    "cpmant": "places the prompt that it learnt before every step, also with a cache",
    "moshi": "generates by a method of its own, which takes no cache",
}
# The configuration that it saves is not in the mapping of causal language models.
NOT_LOADED_PLAINLY = "emu3"
# It draws its embedding anew when it is loaded, and a save that is not read back is refused.
NOT_READ_BACK = "youtu"
CACHED = 0.02  # of the largest logit; recurrences add up in another order with a cache
TOKENS = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(1))


@functools.lru_cache(maxsize=1)
def _original(name: str) -> PreTrainedModel:
    return build(name)


@functools.lru_cache(maxsize=1)
def _original_logits(name: str) -> torch.Tensor:
    return _logits(_original(name))


def _logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def _logits_skipping(model: PreTrainedModel, layers: Iterable[int]) -> torch.Tensor:
    """Logits of an untouched model whose ``layers`` hand on what they are given.

    Of several results of a layer, those after the first are what the last layer that counts gave.
    """
    given_on: list = []

    def keep(layer, args, output):
        given_on[:] = output[1:] if isinstance(output, (tuple, list)) else ()

    def hand_through(*args, run, **kwargs):
        states = args[0] if args else kwargs["hidden_states"]
        output = run(*args, **kwargs)
        if not isinstance(output, (tuple, list)):
            return states
        return type(output)((states, *(given_on or output[1:])))

    with contextlib.ExitStack() as undo:
        for number, layer in enumerate(decoder_layers(model)):
            if number in layers:
                undo.callback(vars(layer).pop, "forward")
                layer.forward = functools.partial(hand_through, run=layer.forward)
            else:
                undo.callback(layer.register_forward_hook(keep).remove)
        return _logits(model)


def _kept_states(model: PreTrainedModel) -> torch.Tensor:
    """Inputs of all layers and the last one's output, float64 (L+1, samples, tokens, hidden)."""
    states = []

    def keep_input(layer, args, kwargs):
        states.append(args[0] if args else kwargs["hidden_states"])

    def keep_output(layer, args, output):
        states.append(output[0] if isinstance(output, (tuple, list)) else output)

    layers = decoder_layers(model)
    hooks = [layer.register_forward_pre_hook(keep_input, with_kwargs=True) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(keep_output))
    _logits(model)
    for hook in hooks:
        hook.remove()
    return torch.stack(states).double()


def _generated(model: PreTrainedModel, use_cache: bool) -> torch.Tensor:
    """Logits of each of four tokens that the model appends to eight."""
    found = model.generate(
        TOKENS[:1, :8],
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        use_cache=use_cache,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    return torch.stack(found.logits)


def _difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference, as a part of the largest value."""
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max() / wanted.abs().max())


def _cut(name: str, layers: tuple[int, ...]) -> PreTrainedModel | None:
    """The model without these layers, or None where that is refused for the reason in REFUSED."""
    reason, right = REFUSED.get(name, (None, ()))
    model = copy.deepcopy(_original(name))
    if reason is None or layers in right:
        return surgery.drop_layers(model, layers)
    with pytest.raises(ValueError, match=reason):
        surgery.drop_layers(model, layers)
    return None


def _assert_computes_what_skipping_computes(
    name: str, model: PreTrainedModel, layers: tuple[int, ...]
) -> None:
    wanted = _logits_skipping(_original(name), layers)
    assert _difference(_logits(model), wanted) < 1e-4
    assert _difference(_original_logits(name), wanted) > 1e-3, "these layers do nothing"


@pytest.mark.parametrize("name", BUILT, scope="module")
def test_a_cut_computes_generates_and_comes_back_from_disk(name, tmp_path):
    model = _cut(name, CUT)
    if model is None:
        return
    # Saved before the first forward pass: some architectures exchange modules in it.
    if name == NOT_READ_BACK:
        with pytest.raises(ValueError, match="other values when it is loaded again"):
            surgery.save(model, None, tmp_path / "model")
    else:
        surgery.save(model, None, tmp_path / "model")
    _assert_computes_what_skipping_computes(name, model, CUT)
    _assert_generates_alike(model if name not in CACHE_OF_THEIR_OWN else _original(name), name)
    if name == NOT_LOADED_PLAINLY:
        with pytest.raises(ValueError, match="Unrecognized configuration class"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    elif name != NOT_READ_BACK:
        _assert_comes_back(model, tmp_path / "model")


def _assert_generates_alike(model: PreTrainedModel, name: str) -> None:
    """With a cache as without, save where transformers' own model does not either."""
    difference = _difference(_generated(model, True), _generated(model, False))
    assert (difference < CACHED) == (name not in CACHE_OF_THEIR_OWN)


def _assert_comes_back(model: PreTrainedModel, saved: Path) -> None:
    """Saved and loaded plainly, it is the same."""
    loaded, info = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not any(info.values()), info
    assert type(loaded) is type(model)
    assert _is_tied(loaded) == _is_tied(model)
    assert _difference(_logits(loaded.eval()), _logits(model)) < 1e-6


def _is_tied(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT, scope="module")
def test_other_cuts_compute_what_skipping_computes(name):
    """Of the last layer, of every second with the first, and of a block, which takes a kind of
    layers whole where there are three kinds."""
    config = _original(name).config
    n_kinds = max(len({*(getattr(config, field, None) or ())}) for field in KINDS)
    for layers in (LAST, SECOND, BLOCK)[: 3 if n_kinds > 2 else 2]:
        model = _cut(name, layers)
        if model is not None:
            _assert_computes_what_skipping_computes(name, model, layers)


@pytest.mark.parametrize("name", BUILT, scope="module")
def test_distances_equal_those_of_states_that_hooks_keep(name):
    model = _original(name)
    if name in WITHOUT_DISTANCES:
        with pytest.raises(ValueError, match=WITHOUT_DISTANCES[name]):
            similarity.measure_similarity(model, TOKENS)
        return
    found = similarity.measure_similarity(model, TOKENS)
    for field, wanted in reference(_kept_states(model)).items():
        np.testing.assert_allclose(getattr(found, field), wanted, atol=1e-5, err_msg=field)


@pytest.mark.parametrize("name", UNBUILT)
def test_the_others_cannot_be_built(name):
    with pytest.raises(Exception, match=UNBUILT[name]):
        build(name)


@pytest.mark.parametrize("name", ["apertus", "llama"])
def test_a_cut_model_that_was_saved_can_be_cut_again(name, tmp_path):
    """Saving leaves the dtype in the configuration as text, of which activations make tensors."""
    once = surgery.drop_layers(copy.deepcopy(_original(name)), [1, 3, 4])
    twice = surgery.drop_layers(copy.deepcopy(_original(name)), [1, 3])
    surgery.save(twice, None, tmp_path / "model")
    surgery.drop_layers(twice, [2])  # layer 4 before the first cut
    torch.testing.assert_close(_logits(twice), _logits(once), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["gemma3_text", "qwen3", "smollm3", "cohere2"])
def test_a_cut_that_was_loaded_again_can_be_cut_and_saved_once_more(name, tmp_path):
    """Periods of layers come back as an architecture's own, which those of a cut are not."""
    once = surgery.drop_layers(copy.deepcopy(_original(name)), [1, 3, 4])
    surgery.save(surgery.drop_layers(copy.deepcopy(_original(name)), [1, 3]), None, tmp_path / "a")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a").eval()
    surgery.drop_layers(loaded, [2])  # layer 4 before the first cut
    surgery.save(loaded, None, tmp_path / "a")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a").eval()
    assert getattr(again.config, "layer_types", None) == getattr(once.config, "layer_types", None)
    torch.testing.assert_close(_logits(again), _logits(once), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3"])
def test_a_cut_generates_alike_with_a_static_cache(name):
    """Also where the cache was there before the cut."""
    model = copy.deepcopy(_original(name))
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    model.generate(TOKENS, cache_implementation="static", disable_compile=True, **options)
    surgery.drop_layers(model, CUT)
    expected = model.generate(TOKENS, use_cache=False, **options)
    static = model.generate(TOKENS, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static, expected)


@pytest.mark.parametrize("n_tokens", [3, 8])
def test_a_cut_after_a_forward_pass_generates_too(n_tokens):
    """BigBird exchanges its attention at the first short text, for one that bears its number."""
    model = copy.deepcopy(_original("big_bird"))
    model(TOKENS[:, :n_tokens])
    surgery.drop_layers(model, CUT)
    _assert_generates_alike(model, "big_bird")
