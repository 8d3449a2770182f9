"""What healing trains and leaves alone, to the last bit; an interrupted run ends like any other."""

import contextlib
import copy
import json
import math
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import every_architecture
import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from pruning_utils import evaluation, healing, models, surgery
from pruning_utils.engine import passes, trainer, wrappers

CHILDREN = Path(__file__).resolve().parent / "children"
L, V, T = 4, 128, 16
METHODS = ("lora", "qlora", "dora", "last_layers", "full")
# Linear weights of a layer of the model below, (in, out), and what they add up to.
LINEAR = {
    "q_proj": (32, 32),
    "k_proj": (32, 16),
    "v_proj": (32, 16),
    "o_proj": (32, 32),
    "gate_proj": (32, 48),
    "up_proj": (32, 48),
    "down_proj": (48, 32),
}


class Tokenizer:
    """Stands for a tokenizer; healing only saves it."""

    @staticmethod
    def save_pretrained(folder):
        (folder / "tokenizer.json").write_text("{}")


def llama(
    tied: bool = False, dtype: torch.dtype = torch.float32, n_layers: int = L
) -> LlamaForCausalLM:
    """A random model; as in a loaded one, rotary frequencies are float32 whatever its dtype."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=n_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
            pad_token_id=0,
        )
    )
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    return model.eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=V,
            n_embd=32,
            n_layer=L,
            n_head=4,
            n_positions=64,
            embd_pdrop=0,
            resid_pdrop=0,
            attn_pdrop=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).eval()


def windows(n: int = 6) -> torch.Tensor:
    """Windows of one pattern: each token is the one before plus 3."""
    return (torch.arange(T)[None] * 3 + torch.arange(n)[:, None] * 5) % V


def heal(model, train_ids=None, **settings) -> healing.HealedModel:
    """A short run: settings of the test over small defaults."""
    small = {
        "method": "lora",
        "steps": 3,
        "batch_size": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "rank": 4,
        "last_k": 2,
    }
    return healing.heal(
        model, Tokenizer, windows() if train_ids is None else train_ids, **{**small, **settings}
    )


def bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all weights and buffers, those that are not saved included."""
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    return {name: tensor.detach().clone() for name, tensor in named}


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(
        tensor.dtype == second[name].dtype and torch.equal(tensor, second[name])
        for name, tensor in first.items()
    )


def changed(model, healed) -> set[str]:
    before, after = bits(model), bits(healed)
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def layer_names(*layers: int) -> set[str]:
    parts = [f"self_attn.{name}" if name[0] in "qkvo" else f"mlp.{name}" for name in LINEAR]
    return {
        f"model.layers.{layer}.{part}.weight"
        for layer in layers
        for part in [*parts, "input_layernorm", "post_attention_layernorm"]
    }


ALL_NAMES = layer_names(0, 1, 2, 3) | {
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
}


# --- what is trained ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_change_and_the_base_does_not(method, dtype):
    model = llama(dtype=dtype)
    healed = heal(model, method=method).model
    base = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor
        for name, tensor in bits(healed).items()
        if ".lora_" not in name
    }
    assert same(base, bits(model))
    adapters = {name: tensor for name, tensor in bits(healed).items() if ".lora_" in name}
    assert len(adapters) == 7 * L * (3 if method == "dora" else 2)
    assert all(tensor.dtype == torch.float32 for tensor in adapters.values())
    assert all(tensor.abs().max() > 0 for name, tensor in adapters.items() if "lora_B" in name), (
        "B begins as zeros"
    )
    assert healed.dtype == dtype and not healed.training
    assert not any(weight.requires_grad for weight in healed.parameters())


@pytest.fixture
def compiled(monkeypatch):
    """Accelerate's own variables, as a user sets them; what torch has counted while compiling.

    Graphs run without the compiler behind the tracer, which would take a minute.
    """
    from torch._dynamo.utils import counters

    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "aot_eager")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    # Beyond its limit of recompiling, torch would go on without a word.
    with torch._dynamo.config.patch(recompile_limit=4, fail_on_recompile_limit_hit=True):
        torch._dynamo.reset()
        counters.clear()
        yield counters
        torch._dynamo.reset()


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_compiled_layers_train_the_same(method, tmp_path, request):
    settings = {"method": method, "dropout": 0.0, "eval_ids": windows(), "steps": 4}
    plain = heal(llama(), **settings)
    counted = request.getfixturevalue("compiled")
    found = heal(llama(), **settings, output_dir=tmp_path / "run")
    assert counted["stats"]["unique_graphs"] and not counted["graph_break"]
    assert found.history["loss"].tolist() == pytest.approx(plain.history["loss"].tolist(), abs=1e-5)
    names = [name for name, _ in found.model.named_parameters()]
    assert names == [name for name, _ in plain.model.named_parameters()]
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    again = heal(llama(), **settings, output_dir=tmp_path / "run")
    assert again.history["loss"].tolist() == pytest.approx(plain.history["loss"].tolist(), abs=1e-5)


def test_qlora_trains_adapters_over_the_unchanged_4_bit_copy():
    model = llama(dtype=torch.bfloat16)
    healed, reference = heal(model, method="qlora").model, models.quantized_copy(model)
    stored = {
        name: module
        for name, module in reference.named_modules()
        if type(module).__name__ == "Linear4bit"
    }
    assert len(stored) == 7 * L
    for name, module in stored.items():
        kept = healed.get_submodule(f"base_model.model.{name}.base_layer")
        assert torch.equal(kept.weight, module.weight)
        assert torch.equal(kept.weight.quant_state.absmax, module.weight.quant_state.absmax)
        assert (
            healed.get_submodule(f"base_model.model.{name}").lora_B["default"].weight.abs().max()
            > 0
        )
    assert torch.equal(healed.get_output_embeddings().weight, model.lm_head.weight)


@pytest.mark.parametrize(
    ("tied", "settings", "expected"),
    [
        (False, {}, {"lm_head.weight"} | layer_names(2, 3)),
        (False, {"last_k": 1}, {"lm_head.weight"} | layer_names(3)),
        (False, {"last_k": 0}, {"lm_head.weight"}),
        (False, {"last_k": 4}, {"lm_head.weight"} | layer_names(0, 1, 2, 3)),
        (False, {"train_norm": True}, {"lm_head.weight", "model.norm.weight"} | layer_names(2, 3)),
        (True, {}, {"lm_head.weight"} | layer_names(2, 3)),
        (
            True,
            {"untie": False},
            {"lm_head.weight", "model.embed_tokens.weight"} | layer_names(2, 3),
        ),
    ],
)
def test_last_layers_trains_the_head_and_the_last_layers(tied, settings, expected):
    model = llama(tied)
    healed = heal(model, method="last_layers", **settings).model
    assert changed(model, healed) == expected
    stays_tied = tied and not settings.get("untie", True)
    assert (healed.lm_head.weight is healed.model.embed_tokens.weight) == stays_tied
    assert healed.config.tie_word_embeddings == stays_tied
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("tied", [False, True])
def test_full_trains_everything(tied):
    model = llama(tied)
    healed = heal(model, method="full").model
    assert changed(model, healed) == ALL_NAMES
    assert (healed.lm_head.weight is healed.model.embed_tokens.weight) == tied


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # rank * (in + out) a linear weight.
        ({"rank": 4}, 4 * 464 * L),
        ({"rank": 1, "targets": ["q_proj", "down_proj"]}, (32 + 32 + 48 + 32) * L),
        ({"rank": 2, "targets": "mlp"}, 2 * (80 + 80 + 80) * L),
        ({"method": "qlora"}, 4 * 464 * L),
        ({"method": "dora"}, (4 * 464 + 224) * L),  # and a magnitude for each output
        ({"method": "last_layers", "last_k": 1}, V * 32 + 7680 + 2 * 32),
        ({"method": "last_layers", "last_k": 0, "train_norm": True}, V * 32 + 32),
        ({"method": "full"}, 2 * V * 32 + (7680 + 2 * 32) * L + 32),
    ],
)
def test_numbers_of_trained_parameters_by_hand(settings, expected):
    assert sum(a * b for a, b in LINEAR.values()) == 7680
    assert sum(a + b for a, b in LINEAR.values()) == 464
    found = heal(llama(), steps=1, **settings)
    assert found.trainable_parameters == expected
    assert pickle.loads(pickle.dumps(found.history)).attrs == found.history.attrs


def test_a_healed_model_is_a_model_and_a_history():
    trained, history = heal(llama(), steps=1)
    assert isinstance(trained, nn.Module)
    assert list(history) == ["step", "tokens", "split", "loss", "learning_rate"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fails", [False, True])
def test_the_input_model_is_left_as_it_was(method, fails, monkeypatch):
    model = llama(tied=True, dtype=torch.bfloat16).train()
    model.model.layers[1].eval()
    model.model.layers[2].mlp.requires_grad_(False)
    before = bits(model)
    settings = model.config.to_dict()
    modes = [part.training for part in model.modules()]
    flags = [weight.requires_grad for weight in model.parameters()]
    keys = set(vars(model))
    if fails:
        calls = []
        monkeypatch.setattr(
            healing,
            "mean_loss",
            lambda model, ids: (
                calls.append(1) or 1 / (len(calls) < 3) * model(ids).logits.float().square().mean()
            ),
        )
        with pytest.raises(ZeroDivisionError):
            heal(model, method=method)
        assert len(calls) == 3
    else:
        heal(model, method=method, eval_ids=windows(3))
    assert same(bits(model), before) and model.lm_head.weight is model.model.embed_tokens.weight
    assert [part.training for part in model.modules()] == modes
    assert model.config.to_dict() == settings
    assert [weight.requires_grad for weight in model.parameters()] == flags
    assert set(vars(model)) == keys
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_loss_falls_and_the_dtype_stays(method, dtype):
    model = llama(tied=True, dtype=dtype, n_layers=2)
    healed = heal(
        model,
        method=method,
        steps=16,
        learning_rate=3e-2,
        batch_size=4,
        eval_ids=windows(3),
        untie=False,
        last_k=1,
        merge=True,
    )
    losses = healed.history.query("split == 'eval'")["loss"].tolist()
    assert losses[0] == pytest.approx(math.log(V), abs=0.3) and losses[-1] < losses[0] - 0.2
    assert {weight.dtype for weight in healed.model.parameters()} == {dtype}
    own = float(evaluation.token_losses(healed.model, windows(3)).double().mean())
    # The merged weights of qlora are not the 4-bit ones that were trained over.
    assert own == pytest.approx(
        losses[-1], abs=0.1 if method == "qlora" else 1e-5 if dtype == torch.float32 else 5e-3
    )
    named = dict(model.named_buffers())
    assert named and same({name: tensor for name, tensor in healed.model.named_buffers()}, named), (
        "rotary frequencies"
    )


@pytest.mark.parametrize("method", ["lora", "qlora", "last_layers", "full"])
def test_updates_below_the_resolution_of_bfloat16_add_up(method, monkeypatch):
    model, seen = llama(dtype=torch.bfloat16), []
    finished = healing.finished
    monkeypatch.setattr(
        healing,
        "finished",
        lambda trained, *given: (
            seen.append({weight.dtype for weight in trained.parameters() if weight.requires_grad})
            or finished(trained, *given)
        ),
    )
    steps = 16 if method in ("last_layers", "full") else 1  # of adapters the dtype alone is asked
    healed = heal(model, method=method, steps=steps, learning_rate=1e-5, batch_size=6).model
    assert seen == [{torch.float32}], "dtypes of what was trained, at the end of training"
    if method in ("last_layers", "full"):
        before, after = model.lm_head.weight, healed.lm_head.weight
        # There, a step of 1e-5 is less than half of bfloat16's distance of 2**-14.
        coarse = before.abs() > 2**-7
        assert torch.equal(
            before[coarse], (before[coarse] + 1e-5 * torch.ones(())).to(torch.bfloat16)
        )
        assert float((before != after)[coarse].float().mean()) > 0.2


def test_evaluations_on_the_way_do_not_change_what_is_trained():
    # 4-bit weights that were repacked for inference would pass no gradient.
    for method in ("qlora", "lora"):
        model = llama(dtype=torch.bfloat16, n_layers=2)
        settings = {"method": method, "steps": 8, "dropout": 0.2}
        alone, evaluated = heal(model, **settings), heal(model, eval_ids=windows(3), **settings)
        assert same(bits(alone.model), bits(evaluated.model))
        losses = evaluated.history.query("split == 'eval'")["loss"]
        assert losses.iloc[-1] < losses.iloc[0] - 0.02
        train = evaluated.history.query("split == 'train'").reset_index(drop=True)
        pd.testing.assert_frame_equal(train, alone.history)


# --- the model that comes back --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factory", "method"), [(llama, "lora"), (llama, "dora"), (gpt2, "lora"), (gpt2, "dora")]
)
def test_merged_adapters_compute_what_unmerged_ones_do(factory, method):
    model, input_ids = factory(), windows(3)
    unmerged, merged = (
        heal(model, method=method, merge=merge, steps=6).model for merge in (False, True)
    )
    with torch.no_grad():
        before, apart, together = (
            network(input_ids).logits for network in (model, unmerged, merged)
        )
    assert (before - apart).abs().max() > 0.05
    torch.testing.assert_close(together, apart, rtol=0, atol=2e-6)
    assert type(merged) is type(model) and bits(merged).keys() == bits(model).keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_qlora_merges_into_the_16_or_32_bit_weights(dtype):
    model = llama(dtype=dtype)
    settings = {"method": "qlora", "steps": 4, "alpha": 6}
    unmerged, merged = (heal(model, merge=merge, **settings).model for merge in (False, True))
    assert not any("bitsandbytes" in type(module).__module__ for module in merged.modules())
    for layer in range(L):
        for name in LINEAR:
            part = f"model.layers.{layer}." + (
                f"self_attn.{name}" if name[0] in "qkvo" else f"mlp.{name}"
            )
            adapted = unmerged.get_submodule(f"base_model.model.{part}")
            product = adapted.lora_B["default"].weight @ adapted.lora_A["default"].weight
            expected = (model.get_submodule(part).weight.float() + 6 / 4 * product).to(dtype)
            assert (
                torch.equal(merged.get_submodule(part).weight, expected)
                and product.abs().max() > 1e-3
            )
    others = changed(model, merged)
    assert len(others) == 7 * L and all("proj" in name for name in others)


@pytest.mark.parametrize("method", METHODS)
def test_the_returned_model_is_a_plain_one(method):
    model = llama()
    healed = heal(model, method=method, merge=True).model
    assert type(healed) is LlamaForCausalLM and not hasattr(healed, "peft_config")
    assert "forward" not in vars(healed) and not getattr(healed, "is_quantized", False)
    expected = model.config.to_dict() | (
        {"tie_word_embeddings": False} if method == "last_layers" else {}
    )
    assert (
        healed.config.to_dict() == expected and healed.generation_config == model.generation_config
    )
    assert not healed.training and not any(module.training for module in healed.modules())
    assert same(bits(copy.deepcopy(healed)), bits(healed))
    again = heal(healed, method="last_layers", untie=False)
    assert changed(healed, again.model) == {"lm_head.weight"} | layer_names(2, 3)


def test_the_same_seed_gives_the_same_bits_and_another_one_does_not():
    model = llama()
    first, second, other = (heal(model, seed=seed, dropout=0.1) for seed in (5, 5, 6))
    assert same(bits(first.model), bits(second.model)) and first.history.equals(second.history)
    assert not same(bits(first.model), bits(other.model))


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox", "mixtral", "falcon", "gemma3_text"])
def test_other_architectures(name):
    model, input_ids = ARCHITECTURES[name](), windows(3)
    healed = heal(model, steps=2, eval_ids=input_ids, merge=True)
    losses = healed.history.query("split == 'eval'")["loss"].tolist()
    for loss, network in ((losses[0], model), (losses[-1], healed.model)):
        assert loss == pytest.approx(
            float(evaluation.token_losses(network, input_ids).double().mean()), abs=1e-4
        )
    assert losses[0] != losses[-1]


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_moe", "mamba", "jamba"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_adapters_stand_at_the_named_modules_alone_and_learn(name, method):
    model = ARCHITECTURES[name]()
    trained = healing.trainable_copy(model, healing.check_settings(model, {"method": method}))
    healing.mean_loss(trained, windows(3)).backward()
    learned = {
        name.removeprefix("base_model.model.").rpartition(".lora_B")[0]
        for name, weight in trained.named_parameters()
        if ".lora_" in name and weight.grad.abs().sum() > 0
    }
    assert learned == set(healing.adapter_targets(model, "all"))


@pytest.mark.parametrize("name", ["deepseek_v3", "laguna"])
def test_adapters_beside_experts_go_on_where_they_were_stopped(name, tmp_path):
    """PEFT would translate names of Laguna's that are right already, and pass its adapters over."""
    model = ARCHITECTURES[name]()
    whole = heal(model, steps=4, output_dir=tmp_path / "run", merge=True)
    first, *later = sorted((tmp_path / "run").glob("checkpoint-*"), key=trainer.step_of)
    for checkpoint in later:
        shutil.rmtree(checkpoint)
    again = heal(model, steps=4, output_dir=tmp_path / "run", merge=True)
    assert trainer.is_whole(first) and same(bits(whole.model), bits(again.model))


@pytest.mark.parametrize(
    ("name", "router"),
    [
        ("afmoe", "mlp.router.gate"),
        ("dbrx", "ffn.router.layer"),
        ("hunyuan_v1_moe", "mlp.gate.wg"),
        ("jetmoe", "router.layer"),
    ],
)
def test_a_linear_layer_within_a_router_gets_no_adapter(name, router):
    model = every_architecture.build(name)
    assert any(found.endswith(router) for found, _ in model.named_modules())
    targets = healing.adapter_targets(model, "all")
    assert targets and not any(found.endswith(router) for found in targets)


def test_feed_forward_layers_are_told_from_mixers_of_the_same_name():
    """Nemotron-H calls each of its layers' single part a mixer, RecurrentGemma a temporal block."""
    model = every_architecture.build("nemotron_h")
    kinds = {
        type(model.get_submodule(name.rpartition("mixer")[0] + "mixer")).__name__
        for name in healing.adapter_targets(model, "mlp")
    }
    assert kinds <= {"NemotronHMLP", "NemotronHMoE"} and "NemotronHMLP" in kinds
    model = ARCHITECTURES["recurrent_gemma"]()
    targets = healing.adapter_targets(model, "mlp")
    assert targets and all(".mlp_block." in name for name in targets)
    assert any(".temporal_block." in name for name in healing.adapter_targets(model, "all"))


@pytest.mark.parametrize("count", [1, 2])
def test_one_of_several_processes_is_told_to_use_the_sharded_function(count, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(count))
    if count == 1:
        trainer.refuse_many_processes()
        return
    with pytest.raises(ValueError, match=r"one of several .* sharded\.heal trains one model"):
        heal(llama())


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.6, "top_p": 0.9},
        {"do_sample": False, "temperature": 1e-6},
        {"do_sample": False, "top_k": 1},
    ],
)
def test_odd_settings_of_generation_do_not_stop_a_training_that_is_saved(settings, tmp_path):
    """transformers saves such settings as long as none of them was changed since they were read."""
    model = llama()
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    model.generation_config.pad_token_id = 0
    healed = heal(model, steps=4, method="full", output_dir=tmp_path / "run").model
    surgery.save(healed, None, tmp_path / "saved")
    kept = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert kept["pad_token_id"] == 0 and kept.items() >= settings.items()


def test_targets_that_a_model_has_not_are_told():
    model = ARCHITECTURES["mamba"]()
    with pytest.raises(ValueError, match="has no linear modules outside its attention .*'mlp'"):
        healing.adapter_targets(model, "mlp")


def test_adapters_of_shared_weights_are_not_merged():
    model = llama()
    first, second = model.model.layers[:2]
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    with pytest.raises(ValueError, match="merge must be False .* whose layers share weights"):
        heal(model, merge=True)
    assert heal(model, merge=False).history["loss"].notna().all()


def test_a_checkpoint_that_another_run_removed_is_not_sealed(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(RuntimeError, match="two runs must not share an output_dir"):
        trainer.seal(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / trainer.SEAL).write_text("{}")
    assert not trainer.is_whole(tmp_path / "checkpoint-2")


def test_nothing_around_the_run_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    environment, verbosity = dict(os.environ), transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(37)
    try:
        heal(llama(), eval_ids=windows(2))
        assert transformers.logging.get_verbosity() == 37
    finally:
        transformers.logging.set_verbosity(verbosity)
    assert dict(os.environ) == environment and not list(tmp_path.iterdir())


# --- history --------------------------------------------------------------------------------------


def test_the_history_by_hand():
    model = llama()
    healed = heal(
        model,
        steps=6,
        batch_size=4,
        learning_rate=1e-3,
        warmup_steps=2,
        eval_ids=windows(5),
        dropout=0.0,
    )
    history = healed.history
    assert history.columns.tolist() == ["step", "tokens", "split", "loss", "learning_rate"]
    assert history["step"].tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    assert history["split"].tolist() == ["eval"] + ["train", "eval"] * 6
    assert (history["tokens"] == history["step"] * 4 * T).all()
    assert history["loss"].dtype == history["learning_rate"].dtype == np.float64
    train, held_out = (history[history["split"] == split] for split in ("train", "eval"))
    # Linear from 0 over two steps, then half a cosine over the other four.
    cosine = [(1 + math.cos(math.pi * part / 4)) / 2 for part in range(4)]
    assert train["learning_rate"].tolist() == pytest.approx(
        [0, 5e-4, *(1e-3 * value for value in cosine)], rel=1e-12
    )
    assert held_out["learning_rate"].isna().all()
    own = [
        float(evaluation.token_losses(network, windows(5)).double().mean())
        for network in (model, healed.model)
    ]
    assert held_out["loss"].iloc[[0, -1]].tolist() == pytest.approx(own, abs=1e-5)
    assert held_out["loss"].iloc[1] == held_out["loss"].iloc[0], "the first step has rate 0"
    first = windows()[torch.randperm(6, generator=torch.Generator().manual_seed(0))[:4]]
    assert train["loss"].iloc[0] == pytest.approx(
        float(evaluation.token_losses(model, first).mean()), abs=1e-5
    )
    assert (
        len({round(loss, 4) for loss in train["loss"]}) == 6
        and not (train["loss"].round(4) == train["loss"]).any()
    )


def test_evaluations_come_eight_times_and_saves_four_times(tmp_path, monkeypatch):
    saves, digests = [], trainer.file_digests
    monkeypatch.setattr(
        trainer, "file_digests", lambda folder: saves.append(folder.name) or digests(folder)
    )
    history = heal(
        llama(),
        method="last_layers",
        last_k=0,
        steps=21,
        eval_ids=windows(2),
        output_dir=tmp_path / "run",
    ).history
    evaluated = history.query("split == 'eval'")["step"].tolist()
    assert evaluated == [0, 3, 6, 8, 11, 14, 16, 19, 21]  # ceil(21 / 8 * k)
    assert saves == [f"checkpoint-{step}" for step in (6, 11, 16, 21)]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoint-16",
        "checkpoint-21",
        "settings.json",
        "tokenizer.json",
    ]
    without = heal(llama(), method="last_layers", last_k=0, steps=21).history
    assert without["split"].tolist() == ["train"] * 21 and without["step"].tolist() == list(
        range(1, 22)
    )


def test_each_pass_takes_every_window_once_in_a_new_order_and_batches_are_full(monkeypatch):
    def batches(**settings) -> list[list[int]]:
        seen, mean_loss = [], healing.mean_loss
        with monkeypatch.context() as patch:
            patch.setattr(
                healing,
                "mean_loss",
                lambda model, ids: seen.append(ids.clone()) or mean_loss(model, ids),
            )
            heal(llama(), method="last_layers", last_k=0, **settings)
        known = windows().tolist()
        return [[known.index(row) for row in batch.tolist()] for batch in seen]

    found = batches(steps=5, batch_size=4)
    assert [len(batch) for batch in found] == [4] * 5
    rows = sum(found, [])
    passes = [rows[:6], rows[6:12], rows[12:18]]
    assert all(sorted(order) == list(range(6)) for order in passes)
    assert passes[0] != passes[1] != passes[2]
    assert batches(steps=5, batch_size=4) == found != batches(steps=5, batch_size=4, seed=1)
    assert len(batches(steps=1, batch_size=8)[0]) == 8, "more than there are windows"


@pytest.mark.parametrize(
    "batch_size, seq_len, expected",
    [(4, 16, 4), (6, 4096, 2), (6, 2048, 3), (5, 4096, 1), (8, 9000, 1)],
)
def test_micro_batches_by_hand(batch_size, seq_len, expected):
    """The largest divisor of the batch size that makes no more than 8,192 tokens."""
    assert trainer.micro_batch_size(batch_size, seq_len) == expected


def test_accumulated_batches_train_the_same(monkeypatch):
    model = llama()
    settings = {
        "method": "full",
        "steps": 4,
        "batch_size": 6,
        "learning_rate": 1e-3,
        "eval_ids": windows(5),
    }
    whole = heal(model, **settings)
    for tokens, parts in ((2 * T, 3), (T, 6), (T - 1, 6), (5 * T, 2)):
        calls, mean_loss = [], healing.mean_loss
        with monkeypatch.context() as patch:
            patch.setattr(trainer, "MICRO_BATCH_TOKENS", tokens)
            patch.setattr(
                healing,
                "mean_loss",
                lambda model, ids, mean_loss=mean_loss, calls=calls: (
                    calls.append(torch.is_grad_enabled()) or mean_loss(model, ids)
                ),
            )
            accumulated = heal(model, **settings)
        assert sum(calls) == 4 * parts
        # AdamW divides by the gradient's own size, so that of a weight with hardly any gradient the
        # rounding of float32 decides: weights are compared as one vector, by how far apart training
        # has led them as a share of its way.
        before, once, often = (
            torch.cat([weight.flatten() for weight in part.parameters()])
            for part in (model, whole.model, accumulated.model)
        )
        assert (often - once).norm() < 1e-2 * (once - before).norm()
        assert np.allclose(whole.history["loss"], accumulated.history["loss"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_activations_computed_again_train_the_same(method, monkeypatch):
    model = llama()
    kept = heal(model, method=method, dropout=0.1)
    parts = []
    part = transformers.models.llama.modeling_llama.LlamaMLP
    monkeypatch.setattr(trainer, "LARGE", 0)
    forward = part.forward
    monkeypatch.setattr(part, "forward", lambda *given: parts.append(1) or forward(*given))
    again = heal(model, method=method, dropout=0.1)
    assert len(parts) == 3 * 2 * L, "each layer runs a second time on the way back"
    assert same(bits(again.model), bits(kept.model))
    assert not again.model.is_activation_checkpointing


@pytest.mark.parametrize("with_evaluation", [False, True])
def test_a_loss_that_is_not_finite_ends_the_run(with_evaluation, tmp_path):
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) at step \d of 8"):
        heal(
            llama(),
            method="full",
            steps=8,
            learning_rate=1e30,
            eval_ids=windows(2) if with_evaluation else None,
            output_dir=tmp_path / "run",
        )
    assert not list(tmp_path.glob("run/checkpoint-8"))


# --- interrupted runs -----------------------------------------------------------------------------


@pytest.mark.slow
def test_runs_killed_at_any_moment_end_with_the_same_bits(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    driver = subprocess.run(
        [sys.executable, CHILDREN / "kill_healing.py", str(tmp_path), "lora", "last_layers"],
        text=True,
        capture_output=True,
        env=environment,
        timeout=300,
    )
    assert driver.returncode == 0, driver.stderr
    for method in ("lora", "last_layers"):
        (alone, history), (resumed, resumed_history) = (
            pd.read_pickle(tmp_path / method / name) for name in ("alone", "resumed")
        )
        assert history["step"].max() == 12 and len(history) == 12 + 9
        assert same(alone, resumed)
        pd.testing.assert_frame_equal(history, resumed_history, check_exact=True)
    # Nothing was printed, by the way, but the progress bar.
    assert driver.stdout == ""
    assert [
        line
        for line in re.split(r"[\r\n]+", driver.stderr)
        if line.strip() and "healing: " not in line
    ] == []


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory):
    """Settings and result of a finished run of eight steps that no test changes."""
    settings = {
        "steps": 8,
        "eval_ids": windows(3),
        "dropout": 0.1,
        "output_dir": tmp_path_factory.mktemp("run"),
    }
    return settings, heal(llama(), **settings)


@pytest.fixture
def finished(finished_once, tmp_path):
    """The same run in a folder of its own."""
    settings, expected = finished_once
    return settings | {
        "output_dir": shutil.copytree(settings["output_dir"], tmp_path / "run")
    }, expected


def steps_again(monkeypatch, settings, **others) -> tuple[int, healing.HealedModel]:
    """How many steps a call trains, and what it returns."""
    calls, mean_loss = [], healing.mean_loss
    with monkeypatch.context() as patch:
        patch.setattr(
            healing,
            "mean_loss",
            lambda model, ids: calls.append(torch.is_grad_enabled()) or mean_loss(model, ids),
        )
        healed = heal(llama(), **{**settings, **others})
    return sum(calls), healed


def test_a_finished_run_is_loaded_without_any_pass(finished, monkeypatch):
    settings, expected = finished
    forward = LlamaForCausalLM.forward
    monkeypatch.setattr(
        LlamaForCausalLM, "forward", lambda *given, **named: pytest.fail("a forward pass")
    )
    again = heal(llama(), **settings)
    # How the result is handed over is no setting of the training.
    merged = heal(llama(), merge=True, **settings)
    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    assert same(bits(again.model), bits(expected.model)) and again.history.equals(expected.history)
    assert again.trainable_parameters == expected.trainable_parameters and not again.model.training
    with torch.no_grad():
        torch.testing.assert_close(
            merged.model(windows()).logits, expected.model(windows()).logits, rtol=0, atol=1e-6
        )


def test_saving_asks_no_hub_about_the_models_name(tmp_path, monkeypatch):
    import peft.utils.save_and_load

    monkeypatch.setattr(
        peft.utils.save_and_load,
        "check_file_exists_on_hf_hub",
        lambda *_: pytest.fail("asked a hub"),
    )
    model = llama()
    model.name_or_path = model.config._name_or_path = "owner/name"
    heal(model, output_dir=tmp_path / "run")
    saved = json.loads((tmp_path / "run/checkpoint-3/adapter_config.json").read_text())
    assert not saved["base_model_name_or_path"], (
        "no checkpoint of that name holds the pruned weights"
    )
    assert model.name_or_path == "owner/name"


@pytest.mark.parametrize(
    "damage", ["truncated", "emptied", "other bytes", "file missing", "no seal", "half a seal"]
)
def test_a_damaged_checkpoint_is_left_for_the_one_before(finished, damage, monkeypatch):
    settings, expected = finished
    last = settings["output_dir"] / "checkpoint-8"
    weights = last / "adapter_model.safetensors"
    if damage in ("truncated", "emptied"):
        os.truncate(weights, 0 if damage == "emptied" else weights.stat().st_size - 7)
    elif damage == "other bytes":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    elif damage == "file missing":
        (last / "rng_state.pth").unlink()
    elif damage == "no seal":
        (last / "complete.json").unlink()
    else:
        (last / "complete.json").write_text((last / "complete.json").read_text()[:40])
    assert not trainer.is_whole(last)
    if damage not in ("other bytes", "no seal"):
        return  # what is not whole is all alike from here on
    steps, again = steps_again(monkeypatch, settings)
    assert steps == 2, "from checkpoint-6 on"
    assert same(bits(again.model), bits(expected.model)) and again.history.equals(expected.history)
    assert steps_again(monkeypatch, settings)[0] == 0, "and whole again"


def test_without_any_whole_checkpoint_the_run_begins_anew(finished, monkeypatch):
    settings, expected = finished
    for seal in settings["output_dir"].glob("*/complete.json"):
        seal.unlink()
    steps, again = steps_again(monkeypatch, settings)
    assert steps == 8
    assert same(bits(again.model), bits(expected.model))
    assert again.history.equals(expected.history)


@pytest.mark.parametrize(
    ("key", "value", "there", "asked"),
    [
        ("learning_rate", 2e-2, "0.01", "0.02"),
        ("steps", 9, "8", "9"),
        ("rank", 2, "4", "2"),
        ("seed", 1, "0", "1"),
        ("alpha", 8.0, "4", r"8\.0"),
        ("method", "dora", "'lora'", "'dora'"),
        ("batch_size", 3, "2", "3"),
        ("targets", ["q_proj"], "'all'", r"\['q_proj'\]"),
        ("dropout", 0.2, r"0\.1", r"0\.2"),
        ("eval_ids", None, "'[0-9a-f]{64}'", "None"),
        ("eval_ids", windows(2), "'[0-9a-f]{64}'", "'[0-9a-f]{64}'"),
        ("train_ids", windows(5), "'[0-9a-f]{64}'", "'[0-9a-f]{64}'"),
        ("train_ids", windows().flip(0), "'[0-9a-f]{64}'", "'[0-9a-f]{64}'"),
    ],
)
def test_a_changed_setting_is_refused_with_both_values(finished_once, key, value, there, asked):
    settings, _ = finished_once
    before = {path: path.stat().st_mtime_ns for path in settings["output_dir"].rglob("*")}
    with pytest.raises(
        ValueError, match=rf"other settings: (.*; )?{key} {there} there, {asked} asked.*; choose "
    ):
        heal(llama(), **{**settings, key: value})
    assert {path: path.stat().st_mtime_ns for path in settings["output_dir"].rglob("*")} == before


def test_other_weights_are_refused_and_the_same_ones_in_another_object_are_not(
    finished, monkeypatch
):
    settings, _ = finished
    other = llama()
    other.model.layers[1].mlp.up_proj.weight.data[5, 7] += 1e-6  # one number among 39,200
    for model in (other, llama(dtype=torch.bfloat16), llama(tied=True)):
        with pytest.raises(
            ValueError, match="other settings: .*model '[0-9a-f]{64}' there, '[0-9a-f]{64}' asked; "
        ):
            heal(model, **settings)
    assert (
        steps_again(monkeypatch, settings, output_dir=str(settings["output_dir"]), targets="all")[0]
        == 0
    )


def test_settings_in_lists_and_tuples_are_the_same(tmp_path):
    settings = {"steps": 1, "output_dir": tmp_path / "run"}
    heal(llama(), targets=("q_proj", "up_proj"), **settings)
    heal(llama(), targets=["q_proj", "up_proj"], **settings)
    assert json.loads((tmp_path / "run/settings.json").read_text())["targets"] == [
        "q_proj",
        "up_proj",
    ]


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(
        ValueError, match=f"output_dir {tmp_path} is not empty, and holds no healing run"
    ):
        heal(llama(), output_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "thesis.tex").unlink()
    # Left by a run killed while it wrote its settings.
    (tmp_path / ".settings.json.k3j2.json").write_text("")
    assert len(heal(llama(), steps=1, output_dir=tmp_path).history) == 1


# --- what is refused ------------------------------------------------------------------------------

REFUSED = [
    (
        {"method": "prefix"},
        "method must be one of lora, qlora, dora, last_layers, full, got 'prefix'",
    ),
    ({"steps": 0}, "steps must be a whole number from 1 to .*, got 0"),
    ({"steps": 2.0}, "steps must be .* got 2.0"),
    ({"steps": True}, "steps must be .* got True"),
    ({"batch_size": 0}, "batch_size must be a whole number from 1"),
    ({"rank": 0}, "rank must be a whole number from 1"),
    ({"rank": -3}, "rank must be .* got -3"),
    ({"warmup_steps": 4}, "warmup_steps must be a whole number from 0 to 3, got 4"),
    ({"warmup_steps": -1}, "warmup_steps must be"),
    ({"seed": -1}, "seed must be a whole number from 0 to 4294967295"),
    ({"method": "last_layers", "last_k": 5}, "last_k must be a whole number from 0 to 4, got 5"),
    ({"last_k": -1}, "last_k must be"),
    ({"last_k": 1.5}, "last_k must be"),
    ({"dropout": 1}, r"dropout must be in \[0, 1\), got 1"),
    ({"dropout": 1.0}, r"dropout .* got 1.0"),
    ({"dropout": -0.1}, "dropout must be in"),
    ({"dropout": math.nan}, "dropout .* got nan"),
    ({"learning_rate": 0}, "learning_rate must be above 0, got 0"),
    ({"learning_rate": -1e-4}, "learning_rate must be"),
    ({"learning_rate": math.nan}, "learning_rate must be above 0, got nan"),
    ({"learning_rate": math.inf}, "learning_rate must be above 0, got inf"),
    ({"learning_rate": "3e-4"}, "learning_rate must be above 0, got '3e-4'"),
    ({"alpha": 0}, "alpha must be above 0, got 0"),
    ({"alpha": math.nan}, "alpha must be above 0"),
    (
        {"targets": "attention"},
        "targets must be 'all', 'mlp' or a list of names among .*'down_proj'.*, got 'attent",
    ),
    ({"targets": ["q_proj", "query"]}, r"targets must be .*'q_proj'.*, got \['q_proj', 'query'\]"),
    ({"targets": ["lm_head"]}, "targets must be"),
    ({"targets": []}, r"targets must be .* got \[\]"),
    ({"targets": None}, "targets must be .* got None"),
    ({"targets": ""}, "targets must be"),
    (
        {"train_ids": torch.tensor([[1, V]])},
        rf"train_ids must lie in the vocabulary \[0, {V}\), got {V}",
    ),
    ({"train_ids": torch.tensor([[-1, 3]])}, "train_ids must lie in the vocabulary .* got -1"),
    ({"train_ids": torch.ones(2, 4)}, "integer tensor"),
    ({"train_ids": torch.tensor([1, 2])}, r"got int64 of shape \(2,\)"),
    ({"train_ids": torch.zeros(0, 4, dtype=torch.long)}, r"got int64 of shape \(0, 4\)"),
    (
        {"train_ids": torch.ones(2, 65, dtype=torch.long)},
        "train_ids must be at most as long as the model's context of 64",
    ),
    ({"train_ids": torch.tensor([[1], [2]])}, "train_ids must hold at least 2 tokens, got 1"),
    ({"eval_ids": torch.tensor([[1], [2]])}, "eval_ids must hold at least 2 tokens, got 1"),
    ({"eval_ids": torch.tensor([[1, 500]])}, "eval_ids must lie in the vocabulary"),
]


@pytest.mark.parametrize(
    ("settings", "message"), REFUSED, ids=[str(settings)[:40] for settings, _ in REFUSED]
)
def test_wrong_arguments_are_refused_before_any_work(settings, message, tmp_path, monkeypatch):
    monkeypatch.setattr(healing, "trainable_copy", lambda *_: pytest.fail("work began"))
    with pytest.raises(ValueError, match=message):
        heal(llama(), output_dir=tmp_path / "run", **settings)
    assert not list(tmp_path.iterdir())


def test_quantised_and_adapted_models_are_refused(tmp_path):
    adapted, merged = (heal(llama(), steps=1, merge=merge).model for merge in (False, True))
    for model in (models.quantized_copy(llama()), adapted):
        with pytest.raises(ValueError, match="must be a 16- or 32-bit one without adapters"):
            heal(model, output_dir=tmp_path / "run")
    heal(merged, steps=1)


def test_what_a_copy_cannot_do_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match="hold no nn.Linear that NF4 could store"):
        heal(gpt2(), method="qlora", output_dir=tmp_path / "run")
    model = llama()
    model.model.second_norm = torch.nn.LayerNorm(32)
    with pytest.raises(ValueError, match="has 2 norms beside its decoder layers"):
        heal(model, method="last_layers", train_norm=True, output_dir=tmp_path / "run")
    assert not list(tmp_path.iterdir())


# --- names of linear modules ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "path", "attention", "mlp"),
    [
        (
            "llama",
            "model.layers",
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"],
            ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
        ),
        ("gpt2", "transformer.h", ["attn.c_attn", "attn.c_proj"], ["mlp.c_fc", "mlp.c_proj"]),
        (
            "opt",
            "model.decoder.layers",
            ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj"],
            ["fc1", "fc2"],
        ),
        (
            "gpt_neox",
            "gpt_neox.layers",
            ["attention.query_key_value", "attention.dense"],
            ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
        ),
    ],
)
def test_adapter_targets_by_hand(name, path, attention, mlp):
    model = ARCHITECTURES[name]()
    n_layers = len(models.decoder_layers(model))

    def in_all_layers(parts):
        return sorted(f"{path}.{layer}.{part}" for layer in range(n_layers) for part in parts)

    assert sorted(healing.adapter_targets(model, "all")) == in_all_layers(attention + mlp)
    assert sorted(healing.adapter_targets(model, "mlp")) == in_all_layers(mlp)
    last = mlp[-1].rpartition(".")[2]  # of GPT-2 the name of a module in the attention, too
    expected = [part for part in attention + mlp if part.rpartition(".")[2] == last]
    assert sorted(healing.adapter_targets(model, [last])) == in_all_layers(expected)
    for wrong in (["lm_head"], ["embed_out"], [last, "head"], "mlps", [], (), None, [""]):
        with pytest.raises(ValueError, match=f"list of names among .*'{last}'"):
            healing.adapter_targets(model, wrong)


def test_no_adapter_lands_outside_the_decoder_layers():
    model = ARCHITECTURES["llama"]()
    model.q_proj = torch.nn.Linear(4, 4)  # a module of the same name elsewhere
    model.model.more = torch.nn.ModuleDict({"down_proj": torch.nn.Linear(4, 4)})
    healed = heal(model, steps=1).model
    names = [name for name, _ in healed.named_parameters() if ".lora_" in name]
    assert len(names) == 2 * 7 * 8 and all(
        name.startswith("base_model.model.model.layers.") for name in names
    )


def test_a_run_of_another_configuration_is_not_taken(tmp_path):
    model, other = llama(), llama()
    other.config.rms_norm_eps = 0.5
    heal(model, output_dir=tmp_path / "run")
    with pytest.raises(ValueError, match="a healing run with other settings: configuration"):
        heal(other, output_dir=tmp_path / "run")


def test_what_a_model_returns_does_not_make_its_run_another(tmp_path):
    heal(llama(), output_dir=tmp_path / "run")
    model = llama()
    model.config.use_cache = False
    model.config.pad_token_id = 3
    heal(model, output_dir=tmp_path / "run")
    model.save_pretrained(tmp_path / "saved")
    back = LlamaForCausalLM.from_pretrained(tmp_path / "saved").eval()
    heal(back, output_dir=tmp_path / "run")


def test_what_is_drawn_afterwards_does_not_depend_on_healing():
    model, drawn = llama(), []
    for is_healed in (False, True):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        if is_healed:
            heal(model, seed=5)
        drawn.append((random.random(), np.random.rand(), float(torch.rand(1))))
    assert drawn[0] == drawn[1]


def test_a_float16_model_is_copied_once(monkeypatch):
    copies = []
    copied = wrappers.copied
    monkeypatch.setattr(
        wrappers, "copied", lambda model, *given: copies.append(model) or copied(model, *given)
    )
    model = llama(dtype=torch.float16)
    before = bits(model)
    trained = healing.trainable_copy(model, healing.check_settings(model, {"method": "full"}))
    assert len(copies) == 1
    assert all(weight.dtype == torch.float32 for weight in trained.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in bits(model).items())


def test_folders_of_the_user_beside_the_checkpoints_stay(tmp_path):
    out = tmp_path / "run"
    heal(llama(), steps=4, output_dir=out)
    kept = trainer.checkpoints(out)
    assert len(kept) == 2
    for name in (f"{kept[0].name}-keep", "checkpoint-007", "checkpoint-1-mine"):
        shutil.copytree(kept[0], out / name)
    shutil.rmtree(kept[0])  # as if it had been stopped before
    heal(llama(), steps=4, output_dir=out)
    names = {path.name for path in out.iterdir() if path.is_dir()}
    assert names >= {f"{kept[0].name}-keep", "checkpoint-007", "checkpoint-1-mine"}


def test_a_run_shorter_than_the_default_warm_up_warms_up_to_its_end():
    model = llama()
    assert healing.check_settings(model, {"steps": 2})["warmup_steps"] == 2
    assert healing.check_settings(model, {"steps": 9})["warmup_steps"] == 4
    for warmup_steps in (3, 4):
        with pytest.raises(ValueError, match="warmup_steps must be a whole number from 0 to 2"):
            healing.check_settings(model, {"steps": 2, "warmup_steps": warmup_steps})


def test_a_single_step_does_not_warm_up_and_so_trains():
    model, ids = llama(), windows(4)
    assert healing.check_settings(model, {"steps": 1})["warmup_steps"] == 0
    assert healing.check_settings(model, {"steps": 1, "warmup_steps": 1})["warmup_steps"] == 1
    healed, _ = healing.heal(model, Tokenizer(), ids, method="full", steps=1, batch_size=4)
    assert any(
        not torch.equal(weight, before)
        for weight, before in zip(healed.parameters(), model.parameters(), strict=True)
    )


def test_a_model_on_another_gpu_than_the_first_is_not_trained(monkeypatch):
    model = llama()
    for device, is_refused in (("cuda:1", True), ("cuda:0", False), ("cuda", False)):
        place = torch.device(device)
        monkeypatch.setattr(passes, "input_device", lambda _, place=place: place)
        with (
            pytest.raises(ValueError, match="on the first GPU that torch sees .*, got cuda:1")
            if is_refused
            else contextlib.nullcontext()
        ):
            heal(model, steps=1, method="full")


def test_an_output_dir_that_is_a_file_is_refused(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for path in (file, file / "below"):
        with pytest.raises(ValueError, match=f"output_dir must be a folder, but {file} is a file"):
            heal(llama(), output_dir=path)
