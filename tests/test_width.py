"""Narrower layers: a plain selection's units, a hand-sliced copy's numbers, and files that load."""

import copy

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, SIZES, tiny
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from pruning_utils import healing, models, surgery, width

# Biases of the queries, keys and values; norms of queries and keys.
LLAMAS = ("llama", "mistral", "qwen2", "qwen3")
# Fused weights, further norms, another feed-forward network.
OTHERS = ("phi3", "gemma2", "starcoder2", "cohere")
N_CHANNELS, N_KV_HEADS = SIZES["intermediate_size"], SIZES["num_key_value_heads"]
TOKENS = torch.randint(3, 128, (3, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=LLAMAS)
def model(request):
    return ARCHITECTURES[request.param]()


def pruned(model, intermediate_size=20, **options):
    return width.prune_width(copy.deepcopy(model), intermediate_size=intermediate_size, **options)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def assert_same_logits(one, other):
    """Compare in float64: sums of other lengths round otherwise on each processor.

    There a logit of some hundred terms is right to a hundred times 1e-16.
    """
    one, other = (copy.deepcopy(part).double() for part in (one, other))
    torch.testing.assert_close(logits(one), logits(other), rtol=1e-12, atol=1e-12)


def n_parameters(model) -> int:
    return sum(weight.numel() for weight in model.parameters())


def state(model) -> tuple:
    """Everything that a refused call must leave alone."""
    weights = {
        name: (id(weight), weight.sum().item(), weight.requires_grad, weight.grad is None)
        for name, weight in model.named_parameters()
    }
    plain = {
        (path, name): value
        for path, part in model.named_modules()
        for name, value in vars(part).items()
        if isinstance(value, int | float | str)
    }
    return copy.deepcopy((model.config.to_dict(), plain, weights))


# --- a plain reference ----------------------------------------------------------------------------


def reference_scores(model, ids=None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each layer the scores of channels and of key-value heads, from gradients all kept."""
    model = copy.deepcopy(model).double().requires_grad_()
    if ids is not None:
        model(ids, labels=ids).loss.backward()
    scores = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        channels = (
            by_row(mlp.gate_proj, ids) + by_row(mlp.up_proj, ids) + by_column(mlp.down_proj, ids)
        )
        rows = [
            by_row(module, ids) for module in (attention.q_proj, attention.k_proj, attention.v_proj)
        ]
        n_kv_heads = len(rows[1]) // attention.head_dim
        heads = sum(
            row.view(n_kv_heads, -1).sum(1) for row in (*rows, by_column(attention.o_proj, ids))
        )
        scores.append((channels.sqrt(), heads.sqrt()) if ids is None else (channels, heads))
    return scores


def value(weight, ids) -> torch.Tensor:
    return (weight.detach() ** 2) if ids is None else (weight * weight.grad).detach().abs()


def by_row(module, ids) -> torch.Tensor:
    total = value(module.weight, ids).sum(1)
    return total if module.bias is None else total + value(module.bias, ids)


def by_column(module, ids) -> torch.Tensor:
    return value(module.weight, ids).sum(0)


def best(scores, n_kept) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda unit: -scores[unit])[:n_kept])


def sliced(model, intermediate_size, n_kv_heads, ids=None):
    """A copy with the best units of each layer, sliced by hand."""
    scores, model = reference_scores(model, ids), copy.deepcopy(model)
    for layer, (of_channels, of_heads) in zip(model.model.layers, scores, strict=True):
        attention, mlp, channels = layer.self_attn, layer.mlp, best(of_channels, intermediate_size)
        size, heads = attention.head_dim, best(of_heads, n_kv_heads)
        queries = size * attention.num_key_value_groups
        of_keys = [head * size + place for head in heads for place in range(size)]
        of_queries = [head * queries + place for head in heads for place in range(queries)]
        for module, rows in (
            (mlp.gate_proj, channels),
            (mlp.up_proj, channels),
            (attention.q_proj, of_queries),
            (attention.k_proj, of_keys),
            (attention.v_proj, of_keys),
        ):
            module.weight = nn.Parameter(module.weight.detach()[rows])
            if module.bias is not None:
                module.bias = nn.Parameter(module.bias.detach()[rows])
        for module, columns in ((mlp.down_proj, channels), (attention.o_proj, of_queries)):
            module.weight = nn.Parameter(module.weight.detach()[:, columns])
    return model


# --- what stays -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n_kv_heads", [None, 1])
@pytest.mark.parametrize("criterion", width.CRITERIA)
def test_the_best_units_stay_in_their_order_and_compute_what_a_hand_sliced_copy_computes(
    model, criterion, n_kv_heads
):
    ids = TOKENS if criterion == "taylor" else None
    expected = sliced(model, 20, n_kv_heads or N_KV_HEADS, ids)
    found = pruned(model, 20, n_kv_heads=n_kv_heads, criterion=criterion, input_ids=ids)
    weights = dict(expected.named_parameters())
    for name, weight in found.named_parameters():
        assert torch.equal(weight, weights[name]), name
    assert_same_logits(found, expected)
    assert (logits(found) - logits(model)).abs().max() > 0.1 * logits(model).std(), (
        "these units do nothing"
    )


@pytest.mark.parametrize(
    "heads", [(4, 4, 1), (4, 4, 2), (4, 2, 1), (6, 3, 2), (6, 2, 1), (8, 2, 1), (9, 3, 1)]
)
@pytest.mark.parametrize("config_class", ["LlamaConfig", "Qwen3Config"])
def test_a_head_goes_with_its_query_heads_whatever_their_number(config_class, heads):
    """Also where two query heads share one: there the dependency graph would go in circles."""
    n_heads, n_kv_heads, n_kept = heads
    model = tiny(
        config_class,
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads,
        head_dim=4,
        hidden_size=n_heads * 4,
        intermediate_size=n_heads * 4,
        num_hidden_layers=2,
    )
    found = pruned(model, 7, n_kv_heads=n_kept)
    assert_same_logits(found, sliced(model, 7, n_kept))
    assert found.config.num_attention_heads == n_heads // n_kv_heads * n_kept


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_compute_what_zeroed_columns_compute(name):
    model = ARCHITECTURES[name]()
    cuts = width._plan(model, 20, 1).cuts
    found, zeroed = pruned(model, 20, n_kv_heads=1), copy.deepcopy(model)
    for (rows, n_kept), scores in zip(cuts, width._scores(model, cuts, None, None), strict=True):
        ((path, _),) = [key for key in rows if key[1] == 1]
        for layer, of_layer in zip(models.decoder_layers(zeroed), scores, strict=True):
            weight = layer.get_submodule(path).weight.detach()
            left = best(of_layer, n_kept)
            weight.view(len(weight), len(of_layer), -1)[
                :, [unit not in left for unit in range(len(of_layer))]
            ] = 0
    assert_same_logits(found, zeroed)
    assert n_parameters(found) < n_parameters(model)


def test_taylor_scores_equal_the_plain_way_and_leave_no_gradient(model):
    before, expected = state(model), reference_scores(model, TOKENS)
    cuts = width._plan(model, 1, 1).cuts
    for batch_size in (None, 1, 2):
        channels, heads = width._scores(model, cuts, TOKENS, batch_size)
        for layer, (of_channels, of_heads) in enumerate(expected):
            assert channels[layer] == pytest.approx(of_channels.numpy(), rel=1e-3)
            assert heads[layer] == pytest.approx(of_heads.numpy(), rel=1e-3)
    assert state(model) == before


def test_magnitudes_are_exact_in_16_bits():
    model = ARCHITECTURES["qwen2"]().bfloat16()
    cuts = width._plan(model, 1, 1).cuts
    channels, heads = width._scores(model, cuts, None, None)
    for layer, (of_channels, of_heads) in enumerate(reference_scores(model)):
        assert channels[layer] == pytest.approx(of_channels.numpy(), rel=1e-6)
        assert heads[layer] == pytest.approx(of_heads.numpy(), rel=1e-6)


def test_zero_units_go_first(model):
    for number, layer in enumerate(model.model.layers):
        channels, head = [(7 * number + 5 * step) % N_CHANNELS for step in range(6)], number % 2
        attention, mlp = layer.self_attn, layer.mlp
        for module in (mlp.gate_proj, mlp.up_proj):
            module.weight.detach()[channels] = 0
        for weight in (
            weight for name in "qkv" for weight in getattr(attention, f"{name}_proj").parameters()
        ):
            weight.detach().view(2, -1)[head] = 0
        mlp.down_proj.weight.detach()[:, channels] = 0
        attention.o_proj.weight.detach().view(32, 2, -1)[:, head] = 0
    found = pruned(model, N_CHANNELS - 6, n_kv_heads=1)
    assert_same_logits(found, model)
    assert all(
        (part.weight != 0).any(1).all()
        for layer in found.model.layers
        for part in (layer.mlp.gate_proj, layer.self_attn.k_proj)
    ), "a zero row has stayed"


def test_of_equal_channels_the_first_stay(model):
    # A column tells its number.
    signs = 1.0 - 2 * (torch.arange(N_CHANNELS) >> torch.arange(32)[:, None] & 1)
    for layer in model.model.layers:
        nn.init.ones_(layer.mlp.gate_proj.weight), nn.init.ones_(layer.mlp.up_proj.weight)
        layer.mlp.down_proj.weight.detach().copy_(signs)
    for layer in pruned(model, 21).model.layers:
        assert torch.equal(layer.mlp.down_proj.weight, signs[:, :21])


# --- a whole model --------------------------------------------------------------------------------


def test_configuration_and_modules_say_what_is_left(model):
    found = pruned(model, 20, n_kv_heads=1)
    config = found.config
    assert (config.intermediate_size, config.num_attention_heads, config.num_key_value_heads) == (
        20,
        2,
        1,
    )
    assert (config.hidden_size, config.head_dim, config.num_hidden_layers) == (32, 8, 8)
    for layer in found.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        assert (attention.num_key_value_groups, attention.head_dim, attention.scaling) == (
            2,
            8,
            8**-0.5,
        )
        assert getattr(mlp, "intermediate_size", 20) == 20
        shapes = {
            "q_proj": (16, 32),
            "k_proj": (8, 32),
            "v_proj": (8, 32),
            "o_proj": (32, 16),
            "gate_proj": (20, 32),
            "up_proj": (20, 32),
            "down_proj": (32, 20),
        }
        for name, shape in shapes.items():
            module = getattr(attention if name[0] in "qkvo" else mlp, name)
            assert (module.out_features, module.in_features) == module.weight.shape == shape
    assert n_parameters(model) - n_parameters(found) == 8 * (
        28 * 3 * 32 + 48 * 32 + (32 if model.config.model_type == "qwen2" else 0)
    )


def test_files_load_as_they_are(model, tmp_path):
    found = pruned(model, 20, n_kv_heads=1)
    loaded, report = AutoModelForCausalLM.from_pretrained(
        surgery.save(found, None, tmp_path / "narrow"), output_loading_info=True
    )
    assert not any(report.values())
    assert torch.equal(logits(loaded), logits(found))
    assert surgery.facts(loaded.model) == surgery.facts(found.model)
    again = pruned(loaded, 8)
    assert_same_logits(again, sliced(found, 8, 1))


def test_generation_with_a_cache_equals_generation_without(model):
    found = pruned(model, 20, n_kv_heads=1)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    cached, plain = (
        found.generate(TOKENS[:1], use_cache=use_cache, **options) for use_cache in (True, False)
    )
    assert torch.equal(cached, plain) and cached.shape[1] == TOKENS.shape[1] + 12


def test_the_result_can_be_healed(model):
    found = pruned(model, 20, n_kv_heads=1)
    healed = healing.heal(
        found,
        None,
        TOKENS,
        method="lora",
        steps=2,
        batch_size=3,
        learning_rate=0.05,
        warmup_steps=0,
        eval_ids=TOKENS,
        merge=True,
    )
    losses = healed.history.query("split == 'eval'")["loss"]
    assert losses.iloc[-1] < losses.iloc[0]
    assert surgery.shapes(healed.model) == surgery.shapes(found)


def test_nothing_changes_where_everything_stays(model):
    before = state(model)
    assert width.prune_width(model, intermediate_size=N_CHANNELS, n_kv_heads=N_KV_HEADS) is model
    assert (
        width.prune_width(model, intermediate_size=N_CHANNELS, criterion="taylor", input_ids=TOKENS)
        is model
    )
    assert state(model) == before


def test_only_the_cut_is_seen():
    """Dtype, tied embeddings, modes, what requires gradients and the fields of heads stay."""
    model = tiny("LlamaConfig", tie_word_embeddings=True).bfloat16()
    frozen = [
        name
        for name, _ in model.named_parameters()
        if "gate" in name or "embed" in name or "layers.3." in name
    ]
    for name, weight in model.named_parameters():
        weight.requires_grad_(name not in frozen)
    model.model.layers[2].train()
    modes = {path: module.training for path, module in model.named_modules()}
    others = {name: id(weight) for name, weight in model.named_parameters() if "mlp" not in name}
    config = model.config.to_dict()
    width.prune_width(model, intermediate_size=20, criterion="taylor", input_ids=TOKENS)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert [name for name, weight in model.named_parameters() if not weight.requires_grad] == frozen
    assert {path: module.training for path, module in model.named_modules()} == modes
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert all(weight.grad is None for weight in model.parameters())
    assert {
        name: id(weight) for name, weight in model.named_parameters() if "mlp" not in name
    } == others
    assert model.config.to_dict() == config | {"intermediate_size": 20}


# --- equal size -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied, n_kv_heads", [(True, None), (False, 1)])
def test_the_size_of_a_model_with_fewer_layers(tied, n_kv_heads):
    model = tiny("Qwen2Config", tie_word_embeddings=tied, num_hidden_layers=4, intermediate_size=64)
    before = state(model)
    one, some, most = (
        n_parameters(pruned(model, size, n_kv_heads=n_kv_heads)) for size in (1, 20, 64)
    )
    sizes = [one + (size - 1) * (most - one) // 63 for size in range(1, 65)]
    assert sizes[19] == some
    for target in (
        sizes[0],
        sizes[-1],
        sizes[20] + 100,
        sizes[20] - 100,
        sizes[30] + (sizes[1] - sizes[0]) * 2 // 3,
    ):
        found = width.width_of_equal_size(model, target, n_kv_heads=n_kv_heads)
        assert abs(sizes[found - 1] - target) == min(abs(size - target) for size in sizes)
    shorter = n_parameters(surgery.drop_layers(copy.deepcopy(model), [2]))
    found = pruned(
        model,
        width.width_of_equal_size(model, shorter, n_kv_heads=n_kv_heads),
        n_kv_heads=n_kv_heads,
    )
    assert abs(n_parameters(found) - shorter) <= (sizes[1] - sizes[0]) / 2
    for target in (sizes[0] - 1, sizes[-1] + 1, True, float(sizes[3])):
        with pytest.raises(ValueError, match=f"from {sizes[0]} to {sizes[-1]}, got {target}"):
            width.width_of_equal_size(model, target, n_kv_heads=n_kv_heads)
    assert state(model) == before


# --- bad input ------------------------------------------------------------------------------------


def quantized(model):
    return models.quantized_copy(model)


def with_adapters(model):
    return get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", target_modules=["gate_proj"])
    ).get_base_model()


def with_a_shared_weight(model):
    model.model.layers[5].mlp.gate_proj.weight = model.model.layers[2].mlp.gate_proj.weight
    return model


def not_a_number(model):
    model.model.layers[3].mlp.up_proj.weight.detach()[4, 5] = float("inf")
    return model


def with_another_shape(model):
    model.model.layers[3].mlp.up_proj.weight = nn.Parameter(torch.ones(47, 32))
    return model


def test_sizes_may_be_numbers_of_numpy():
    made = ARCHITECTURES["llama"]()
    expected = width.prune_width(copy.deepcopy(made), intermediate_size=20, n_kv_heads=1)
    found = width.prune_width(made, intermediate_size=np.int64(20), n_kv_heads=np.int32(1))
    weights = expected.state_dict()
    for name, weight in found.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    assert type(found.config.intermediate_size) is int


@pytest.mark.parametrize(
    "options, message",
    [
        ({"intermediate_size": 0}, "intermediate_size must be a whole number from 1 to 48, got 0"),
        ({"intermediate_size": 49}, "intermediate_size .* from 1 to 48, got 49"),
        ({"intermediate_size": True}, "intermediate_size .* from 1 to 48, got True"),
        ({"intermediate_size": 20.0}, "intermediate_size .* from 1 to 48, got 20.0"),
        ({"n_kv_heads": 0}, "n_kv_heads must be a whole number from 1 to 2, got 0"),
        ({"n_kv_heads": 3}, "n_kv_heads .* from 1 to 2, got 3"),
        ({"n_kv_heads": True}, "n_kv_heads .* from 1 to 2, got True"),
        ({"criterion": "random"}, "criterion must be one of magnitude, taylor, got 'random'"),
        ({"criterion": "taylor"}, "'taylor' needs input_ids"),
        ({"input_ids": TOKENS}, "'magnitude' takes no input_ids"),
        (
            {"criterion": "taylor", "input_ids": TOKENS + 100},
            r"must lie in the vocabulary \[0, 128\)",
        ),
        ({"criterion": "taylor", "input_ids": TOKENS[:, :1]}, "at least 2 tokens, got 1"),
        (
            {"criterion": "taylor", "input_ids": TOKENS, "batch_size": 0},
            "batch_size must be .* got 0",
        ),
        ({"batch_size": -5}, "batch_size must be .* got -5"),
        ({"change": quantized}, "quantised: load it with quantize=None"),
        ({"change": with_adapters}, "carries adapters: merge them first"),
        ({"change": with_a_shared_weight}, "layers 2 and 5 share mlp.gate_proj.weight"),
        ({"change": with_another_shape}, "not those that its configuration describes"),
        ({"change": not_a_number}, "a score is not finite"),
    ],
)
def test_bad_input_is_refused_before_the_first_change(options, message):
    asked = {"intermediate_size": 20, "n_kv_heads": 1, **options}
    change = asked.pop("change", copy.deepcopy)
    model = change(ARCHITECTURES["llama"]())
    before = state(model)
    with pytest.raises(ValueError, match=message):
        width.prune_width(model, **asked)
    assert repr(state(model)) == repr(before)  # as NaN differs from itself


@pytest.mark.parametrize(
    "name, n_kv_heads, message",
    [
        ("gpt2", None, "intermediate_size is None"),
        ("mixtral", None, "0 linear modules of a layer"),
        ("qwen3_moe", None, "its layers are not alike"),
        ("lfm2", None, "its layers are not alike"),
        ("mamba", None, "2 linear modules"),
        ("olmo2", 1, r"q_norm.weight.shape would be \(16,\), but \(32,\) is left"),
        ("gpt_neox", None, None),
        ("gpt_neox", 1, "cannot be cut"),
        ("stablelm", 1, "0 linear modules of a layer"),
    ],
)
def test_other_architectures_are_cut_or_refused_untouched(name, n_kv_heads, message):
    model = ARCHITECTURES[name]()
    if message is None:
        assert n_parameters(pruned(model, 20)) < n_parameters(model)
        return
    before = state(model)
    with pytest.raises(ValueError, match=message):
        width.prune_width(model, intermediate_size=20, n_kv_heads=n_kv_heads)
    assert state(model) == before


def test_a_number_of_heads_that_cannot_be_loaded_is_refused():
    model = tiny("LlamaConfig", num_key_value_heads=4)
    before = state(model)
    with pytest.raises(
        ValueError, match=r"size \(32\) is not a multiple of the number of attention heads \(3\)"
    ):
        width.prune_width(model, intermediate_size=20, n_kv_heads=3)
    assert state(model) == before


def test_one_of_two_models_of_a_configuration_becomes_narrow():
    one = ARCHITECTURES["llama"]()
    other = type(one)(one.config)
    width.prune_width(one, intermediate_size=24)
    assert (one.config.intermediate_size, other.config.intermediate_size) == (24, 48)
