"""Distances between layers against plain float64 arithmetic and the metrics' own formulas."""

import dataclasses
import math
import weakref

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES
from transformers import LlamaConfig, LlamaForCausalLM

from pruning_utils import data, models, selection, similarity

L, D, V = 5, 48, 96
MATRICES = ("angular_distance", "angular_distance_all_tokens", "last_token_samples")
RESULTS = (*MATRICES, "block_influence", "block_influence_flattened")


def tiny_llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A random llama whose final norm turns states: before it the last one is another."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V,
            hidden_size=D,
            intermediate_size=64,
            num_hidden_layers=L,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            pad_token_id=0,
        )
    ).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8 if weight.ndim > 1 else 1)
        model.model.norm.weight.copy_(torch.linspace(-1, 3, D))
    return model.to(dtype)


def windows(n: int = 5, length: int = 12, vocabulary: int = V) -> torch.Tensor:
    return torch.randint(3, vocabulary, (n, length), generator=torch.Generator().manual_seed(1))


def kept_states(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Inputs and the last raw output, float64 (L+1, samples, tokens, hidden), by plain hooks."""
    layers, states, outputs = models.decoder_layers(model), {}, []

    def keep(index):
        def hook(layer, inputs, named):
            states[index] = (inputs[0] if inputs else named["hidden_states"]).detach().clone()

        return hook

    def keep_output(layer, inputs, output):
        outputs.append((output[0] if isinstance(output, tuple) else output).detach().clone())

    hooks = [
        layer.register_forward_pre_hook(keep(index), with_kwargs=True)
        for index, layer in enumerate(layers)
    ]
    hooks.append(layers[-1].register_forward_hook(keep_output))
    with torch.no_grad():
        model(input_ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack([*(states[index] for index in range(len(layers))), outputs[0]]).double()


def reference(states: torch.Tensor) -> dict[str, np.ndarray]:
    """All results from float64 states without padding, by the formulas as they are written down."""
    values, n_states = states.numpy(), len(states)
    unit = values / np.linalg.norm(values, axis=-1, keepdims=True)
    cosine = np.einsum("istd,jstd->ijst", unit, unit)
    angle = np.arccos(np.clip(cosine, -1, 1)) / math.pi
    for index in range(n_states):
        angle[index, index] = 0
    pairs = range(n_states - 1)
    flat = values.reshape(n_states, -1)
    return {
        "angular_distance": angle[..., -1].mean(-1),
        "angular_distance_all_tokens": angle.mean((-2, -1)),
        "last_token_samples": angle[..., -1].transpose(2, 0, 1),
        "block_influence": np.array([(1 - cosine[i, i + 1]).mean() for i in pairs]),
        "block_influence_flattened": np.array(
            [
                1 - flat[i] @ flat[i + 1] / np.sqrt(flat[i] @ flat[i] * (flat[i + 1] @ flat[i + 1]))
                for i in pairs
            ]
        ),
    }


def assert_equal(
    found: similarity.Similarity, expected: dict[str, np.ndarray], tolerance: float = 1e-6
) -> None:
    for name, value in expected.items():
        np.testing.assert_allclose(
            getattr(found, name), value, rtol=0, atol=tolerance, err_msg=name
        )


def as_results(found: similarity.Similarity) -> dict[str, np.ndarray]:
    return {name: getattr(found, name) for name in RESULTS}


# --- the results ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_equal_float64_arithmetic_on_all_states(dtype):
    model, input_ids = tiny_llama(dtype), windows()
    expected = reference(kept_states(model, input_ids))
    found = similarity.measure_similarity(model, input_ids)
    assert_equal(found, expected)
    assert (found.n_samples, found.n_tokens) == (5, 60)
    assert found.angular_distance.shape == found.angular_distance_all_tokens.shape == (L + 1, L + 1)
    assert (
        found.last_token_samples.shape == (5, L + 1, L + 1)
        and found.last_token_samples.dtype == np.float32
    )
    assert all(
        getattr(found, name).dtype == np.float64 for name in RESULTS if name != "last_token_samples"
    )
    # The test can tell its subjects apart.
    assert (
        np.abs(expected["angular_distance"] - expected["angular_distance_all_tokens"]).max() > 0.005
    )
    assert np.abs(expected["block_influence"] - expected["block_influence_flattened"]).max() > 0.001


@pytest.mark.parametrize(
    ("change", "shape"),
    [
        (lambda states: torch.cat([states, states], dim=1), r"\(2, 12, 48\)"),
        (lambda states: states[:, 1:], r"\(2, 5, 48\)"),
        (lambda states: states[:, :, None], r"\(2, 6, 1, 48\)"),
        (lambda states: {"states": states}, r"\(\)"),
    ],
    ids=["prompt in front", "one is gone", "streams", "no tensor"],
)
def test_states_that_are_not_one_for_each_token_are_refused(change, shape):
    model = tiny_llama()
    models.decoder_layers(model)[-1].register_forward_hook(
        lambda layer, given, output: change(output)
    )
    model.model.norm.forward = lambda states: states
    with pytest.raises(
        ValueError, match=rf"one state for each token, .* = \(2, 6\), but theirs .* {shape}"
    ):
        similarity.measure_similarity(model, windows(2, 6))


def test_layers_that_return_lists_are_scanned():
    model, ids = tiny_llama(), windows(2, 6)
    expected = as_results(similarity.measure_similarity(model, ids))
    layer = models.decoder_layers(model)[-1]
    layer.register_forward_hook(lambda layer, given, output: [output, None])
    model.model.norm.register_forward_pre_hook(lambda norm, given: (given[0][0],))
    assert_equal(similarity.measure_similarity(model, ids), expected, 0)


def test_the_last_state_is_the_raw_output_before_the_final_norm():
    model, input_ids = tiny_llama(), windows()
    found = similarity.measure_similarity(model, input_ids)
    with torch.no_grad():
        entries = torch.stack(model(input_ids, output_hidden_states=True).hidden_states).double()
    normed = reference(entries)  # transformers' last entry has passed the final norm
    raw = reference(kept_states(model, input_ids))
    for name in ("angular_distance", "angular_distance_all_tokens"):
        np.testing.assert_allclose(
            getattr(found, name)[:L, :L], normed[name][:L, :L], rtol=0, atol=1e-6
        )
        np.testing.assert_allclose(getattr(found, name)[:, L], raw[name][:, L], rtol=0, atol=1e-6)
        assert np.abs(getattr(found, name)[1:L, L] - normed[name][1:L, L]).min() > 0.05
    assert abs(found.block_influence[-1] - normed["block_influence"][-1]) > 0.01


def test_published_formulas_on_the_same_inputs():
    model, input_ids = tiny_llama(), windows()
    found = similarity.measure_similarity(model, input_ids)
    with torch.no_grad():
        states = model(input_ids, output_hidden_states=True).hidden_states

    # arXiv:2403.17887: angular distance of last tokens, states as transformers returns them.
    for i in range(L):
        for j in range(L):
            cosine = torch.nn.functional.cosine_similarity(
                states[i][:, -1], states[j][:, -1], dim=-1
            )
            distance = (cosine.clamp(-1, 1).arccos() / math.pi).mean()
            assert i == j or found.angular_distance[i, j] == pytest.approx(
                float(distance), abs=1e-4
            )
    for i in range(L - 1):
        before, after = states[i].flatten(0, 1), states[i + 1].flatten(0, 1)
        inner = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
        # ArXiv:2403.03853.
        assert found.block_influence[i] == pytest.approx(1 - float(inner.mean()), abs=1e-4)
        flat = torch.nn.functional.cosine_similarity(before.flatten(), after.flatten(), dim=0)
        assert found.block_influence_flattened[i] == pytest.approx(1 - float(flat), abs=1e-4)


def test_matrices_are_symmetric_with_an_exact_zero_diagonal():
    found = similarity.measure_similarity(tiny_llama(), windows(7, 29))
    for name in MATRICES[:2]:
        matrix = getattr(found, name)
        assert (
            (matrix == matrix.T).all()
            and (np.diag(matrix) == 0).all()
            and (matrix >= 0).all()
            and matrix.max() < 1
        )
    assert all((np.diag(sample) == 0).all() for sample in found.last_token_samples)
    np.testing.assert_allclose(
        found.last_token_samples.mean(0, dtype=np.float64), found.angular_distance, atol=1e-7
    )


def test_the_default_dtype_changes_nothing():
    model, input_ids = tiny_llama(), windows()
    expected = as_results(similarity.measure_similarity(model, input_ids))
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert_equal(similarity.measure_similarity(model, input_ids), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_embedded_model_has_its_closest_block_in_the_middle():
    model, tokenizer = models.load_model()
    found = similarity.measure_similarity(model, data.calibration_windows(tokenizer, 4, 128))
    assert found.n_tokens == 512 and found.angular_distance.shape == (31, 31)
    best = selection.best_block(found.angular_distance, 8)
    assert 9 <= best.start <= 13 and 0.05 < best.distance < 0.3
    assert found.block_influence.argmax() in (0, 29), (
        "the first and the last layer change states most"
    )


# --- padding, batches, order ----------------------------------------------------------------------


def padded(rows: torch.Tensor, lengths: list[int], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows cut to lengths and padded on a side with arbitrary ids, and the mask."""
    ids = torch.randint(0, V, rows.shape, generator=torch.Generator().manual_seed(9))
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(rows.shape[1] - length, None)
        if side == "middle":
            place = slice(1, 1 + length)
        ids[row, place], mask[row, place] = rows[row, :length], 1
    return ids, mask


def test_padding_batch_size_and_order_change_nothing():
    model, rows, lengths = tiny_llama(), windows(5, 12), [11, 3, 7, 1, 8]
    states = [
        kept_states(model, rows[row : row + 1, :length]) for row, length in enumerate(lengths)
    ]
    singles = [reference(state) for state in states]
    share = np.array(lengths) / sum(lengths)
    tokens = reference(torch.cat(states, dim=2))  # as if all were one sample: the means over tokens
    expected = {
        "angular_distance": np.mean([single["angular_distance"] for single in singles], axis=0),
        "angular_distance_all_tokens": sum(
            part * single["angular_distance_all_tokens"]
            for part, single in zip(share, singles, strict=True)
        ),
        "block_influence": sum(
            part * single["block_influence"] for part, single in zip(share, singles, strict=True)
        ),
        "block_influence_flattened": tokens["block_influence_flattened"],
    }
    for side in ("right", "left", "middle"):
        for batch_size in (1, 2, 8):
            for order in (range(5), (3, 0, 4, 2, 1)):
                ids, mask = padded(rows[list(order)], [lengths[row] for row in order], side)
                found = similarity.measure_similarity(model, ids, mask, batch_size=batch_size)
                assert_equal(found, expected)
                assert (found.n_samples, found.n_tokens) == (5, 30)
                for place, row in enumerate(order):
                    np.testing.assert_allclose(
                        found.last_token_samples[place], singles[row]["angular_distance"], atol=1e-6
                    )


def test_a_mask_of_any_dtype_or_of_ones_counts_the_same():
    model, rows = tiny_llama(), windows()
    expected = as_results(similarity.measure_similarity(model, rows))
    for dtype in (torch.bool, torch.float32, torch.int32):
        assert_equal(
            similarity.measure_similarity(model, rows, torch.ones_like(rows, dtype=dtype)),
            expected,
            0,
        )


def test_a_mask_may_be_an_array_or_a_list_of_rows():
    model, rows = tiny_llama(), windows(3, 6)
    ids, mask = padded(rows, [6, 2, 4], "left")
    expected = as_results(similarity.measure_similarity(model, ids, mask))
    for other in (mask.numpy(), mask.bool().numpy(), mask.double().numpy(), mask.tolist()):
        assert_equal(similarity.measure_similarity(model, ids, other), expected, 0)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 5), r"shape \(2, 6\) of input_ids, got shape \(2, 5\)"),
        (torch.ones(6), r"got shape \(6,\)"),
        ([[1, 1], [1]], r"hold 0 and 1 in the shape \(2, 6\) of input_ids, got list"),
        (np.full((2, 6), "1"), "hold 0 and 1 .* got ndarray"),
        ("111111", "hold 0 and 1 .* got str"),
        (np.full((2, 6), np.nan), r"hold 0 and 1 .* values \[nan"),
        (torch.full((2, 6), 2), r"hold 0 and 1 .* values \[2\]"),
        (torch.full((2, 6), 0.5), r"hold 0 and 1 .* values \[0\.5\]"),
        (
            torch.tensor([[0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]]),
            "row 1 must have one unbroken run",
        ),
        (
            torch.tensor([[0, 1, 1, 1, 1, 0], [1, 1, 0, 0, 1, 1]]),
            "row 1 must have one unbroken run",
        ),
        (
            torch.tensor([[1, 0, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]]),
            "row 0 must have one unbroken run",
        ),
    ],
)
def test_wrong_masks_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        similarity.measure_similarity(tiny_llama(), windows(2, 6), mask)


# --- the pass -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch_size", "passes"), [(1, 5), (2, 3), (5, 1), (100, 1)])
def test_each_layer_runs_once_per_micro_batch_and_the_head_never(batch_size, passes):
    model, runs = tiny_llama(), [0] * L
    model.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("the head was called"))
    for index, layer in enumerate(models.decoder_layers(model)):
        layer.register_forward_hook(
            lambda *_, index=index: runs.__setitem__(index, runs[index] + 1)
        )
    similarity.measure_similarity(model, windows(), batch_size=batch_size)
    assert runs == [passes] * L


@pytest.mark.parametrize("mask", [None, torch.ones(6, 12).index_fill(1, torch.tensor([0]), 0)])
def test_only_one_micro_batchs_states_are_alive(mask):
    model, states, alive = tiny_llama(), [], []
    layers = models.decoder_layers(model)
    # Counted before the hooks of the pass see the new states; transformers' own output holds none
    # of them.
    layers[0].register_forward_pre_hook(
        lambda layer, inputs, named: alive.append(sum(state() is not None for state in states)),
        with_kwargs=True,
    )
    for layer in layers:
        layer.register_forward_hook(
            lambda layer, inputs, output: states.append(weakref.ref(output))
        )
    similarity.measure_similarity(model, windows(6), mask, batch_size=2)
    assert len(states) == 3 * L and alive == [0, 0, 0]
    assert not any(state() is not None for state in states)


def hook_counts(model: torch.nn.Module) -> list[tuple[int, int]]:
    return [
        (len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model = tiny_llama()
    model.train()
    model.model.layers[2].eval()  # one part frozen in evaluation mode, say
    model.model.layers[1].mlp.requires_grad_(False)
    if fails:
        model.model.layers[3].mlp.down_proj.weight.data[0, 0] = math.nan
    modes = [module.training for module in model.modules()]
    flags = [weight.requires_grad for weight in model.parameters()]
    weights = [weight.detach().clone() for weight in model.parameters()]
    graded, hooks = [], hook_counts(model)
    seen = model.model.layers[0].register_forward_hook(
        lambda layer, inputs, output: graded.append(output.requires_grad or layer.training)
    )
    if fails:
        with pytest.raises(ValueError, match="not finite"):
            similarity.measure_similarity(model, windows())
    else:
        similarity.measure_similarity(model, windows())
    seen.remove()
    assert graded == [False], "no gradient, and in evaluation mode"
    assert [module.training for module in model.modules()] == modes and hook_counts(model) == hooks
    assert [weight.requires_grad for weight in model.parameters()] == flags
    assert all(weight.grad is None for weight in model.parameters()) and torch.is_grad_enabled()
    assert all(
        torch.equal(before, after) or fails
        for before, after in zip(weights, model.parameters(), strict=True)
    )


def test_dropout_is_off_during_the_pass():
    model, input_ids = ARCHITECTURES["gpt2"](), windows(3, 9)
    expected = as_results(similarity.measure_similarity(model, input_ids))
    assert_equal(similarity.measure_similarity(model.train(), input_ids), expected, 0)


def gradient_of_embedded(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    embedded = model.get_input_embeddings()(input_ids).detach().requires_grad_()
    model(inputs_embeds=embedded, use_cache=False).logits.float().square().mean().backward()
    return embedded.grad


def test_a_4_bit_model_passes_gradients_after_the_pass():
    model, input_ids = models.quantized_copy(tiny_llama(torch.bfloat16)), windows()
    expected = gradient_of_embedded(model.train(), input_ids)
    similarity.measure_similarity(model, input_ids)
    found = gradient_of_embedded(model, input_ids)
    assert expected.norm() > 0 and torch.equal(found, expected)


# --- angles of hand-made states -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1.0, 1e38, 1e-30, 1e-18, 3e18])
def test_equal_orthogonal_and_opposite_states(dtype, size):
    u = torch.tensor([3.0, 4.0, 0.0, 0.0], dtype=dtype) / 5
    v = torch.tensor([-4.0, 3.0, 0.0, 0.0], dtype=dtype) / 5
    states = (torch.stack([u, 2 * u, v, -u, u + v]) * size)[None]
    angle, cosine, norm = similarity._angles(states.clone())
    expected = torch.tensor(
        [
            [0, 0, 0.5, 1, 0.25],
            [0, 0, 0.5, 1, 0.25],
            [0.5, 0.5, 0, 0.5, 0.25],
            [1, 1, 0.5, 0, 0.75],
            [0.25, 0.25, 0.25, 0.75, 0],
        ],
        dtype=dtype,
    )
    tolerance = 2e-7 if dtype == torch.float32 else 1e-15
    torch.testing.assert_close(angle[0], expected, rtol=0, atol=tolerance)
    off_diagonal = ~torch.eye(5, dtype=torch.bool)
    torch.testing.assert_close(
        cosine[0][off_diagonal],
        (expected * math.pi).cos()[off_diagonal],
        rtol=0,
        atol=2 * tolerance,
    )
    lengths = torch.tensor([1, 2, 1, 1, math.sqrt(2)], dtype=torch.float64) * size
    torch.testing.assert_close(norm[0], lengths, rtol=1e-6, atol=0)
    assert (angle.diagonal(dim1=1, dim2=2) == 0).all()


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("theta", [1e-4, 1e-3, 0.02, 0.04, 0.05])
def test_tiny_angles_keep_their_digits(theta, dtype, precision):
    generator = torch.Generator().manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(576, 2, generator=generator, dtype=torch.float64))[0].T
    states = torch.stack([7 * u, 3 * (math.cos(theta) * u + math.sin(theta) * v), -5 * u])[None]
    angle, cosine, _ = similarity._angles(states.to(dtype))
    assert float(angle[0, 0, 1]) * math.pi == pytest.approx(theta, rel=precision)
    assert (1 - float(angle[0, 1, 2])) * math.pi == pytest.approx(theta, rel=precision, abs=2e-7)
    assert float(angle[0, 0, 2]) == pytest.approx(1, abs=2e-7)
    assert float(cosine[0, 0, 1]) == pytest.approx(math.cos(theta), abs=1e-7)


def test_one_huge_token_decides_the_flattened_influence_only():
    # Two states, two tokens: the first turns by 90 degrees, the second stays but is a thousand
    # times longer.
    first = torch.tensor([[[1.0, 0.0], [1000.0, 0.0]]])
    second = torch.tensor([[[0.0, 1.0], [1000.0, 0.0]]])
    sums = similarity.RunningSums(1)
    sums.add([first, second], torch.tensor([2]), first_sample=0)
    found = sums.result()
    assert found.block_influence == pytest.approx([0.5], abs=1e-7)
    assert found.block_influence_flattened == pytest.approx([1e-6], abs=1e-9)
    assert found.angular_distance_all_tokens[0, 1] == pytest.approx(0.25, abs=1e-7)
    assert found.angular_distance[0, 1] == 0, "the last token stays"


@pytest.mark.parametrize("size", [1e38, 1e-30])
def test_states_near_the_ends_of_the_float_range_stay_finite(size):
    model, input_ids = tiny_llama(), windows()
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    layer = model.model.layers[0]
    # So that the states have this size exactly.
    layer.forward = lambda hidden_states, **_: hidden_states.flip(-1)
    model.model.embed_tokens.weight.data.mul_(size / model.model.embed_tokens.weight.abs().max())
    model.model.norm = torch.nn.Identity()
    found = similarity.measure_similarity(model, input_ids)
    assert_equal(found, reference(kept_states(model, input_ids)))
    assert all(np.isfinite(value).all() for value in as_results(found).values())


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
@pytest.mark.parametrize(("side", "place"), [("left", 2), ("right", 0), ("right", 5)])
def test_a_zero_or_non_finite_state_names_layer_and_sample(value, side, place):
    model, rows = tiny_llama(), windows()
    rows[rows == 77] = 5
    rows[3, place] = 77
    model.model.embed_tokens.weight.data[77] = value
    ids, mask = padded(rows, [12, 9, 4, 6, 12], side)
    ids[(ids == 77) & (mask == 0)] = 5
    for batch_size in (1, 2, 8):
        with pytest.raises(
            ValueError,
            match=r"input of layer 0 \(where 5 is the output of the last\).* of sample 3$",
        ):
            similarity.measure_similarity(model, ids, mask, batch_size=batch_size)


def test_nan_in_one_weight_is_refused_at_the_next_layer():
    model = tiny_llama()
    model.model.layers[2].mlp.down_proj.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="input of layer 3 .*sample 0$"):
        similarity.measure_similarity(model, windows())
    model = tiny_llama()
    model.model.layers[-1].mlp.down_proj.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=f"input of layer {L} .*sample 0$"):
        similarity.measure_similarity(model, windows())


@pytest.mark.parametrize(
    ("input_ids", "message"),
    [
        (torch.tensor([[1, V]]), rf"must lie in the vocabulary \[0, {V}\), got {V}"),
        (torch.tensor([[1, -1]]), "must lie in the vocabulary .* got -1"),
        (torch.ones(2, 3), "must be an integer tensor"),
        (
            torch.ones(3, dtype=torch.long),
            r"shape \(n_samples, seq_len\), got int64 of shape \(3,\)",
        ),
        (torch.ones(0, 3, dtype=torch.long), r"got int64 of shape \(0, 3\)"),
        (torch.ones(3, 0, dtype=torch.long), r"got int64 of shape \(3, 0\)"),
        (
            torch.ones(1, 33, dtype=torch.long),
            "at most as long as the model's context of 32 tokens, got 33",
        ),
        ([[1, 2]], "got list"),
    ],
)
def test_wrong_token_ids_are_refused_before_any_pass(input_ids, message):
    model = tiny_llama()
    model.model.layers[0].register_forward_pre_hook(lambda *_: pytest.fail("a layer ran"))
    with pytest.raises(ValueError, match=message):
        similarity.measure_similarity(model, input_ids)


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, True, "8", math.nan])
def test_wrong_batch_sizes_are_refused(batch_size):
    with pytest.raises(ValueError, match="batch_size must be a whole number of at least 1, got"):
        similarity.measure_similarity(tiny_llama(), windows(), batch_size=batch_size)


def test_results_are_frozen():
    found = similarity.measure_similarity(tiny_llama(), windows())
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.n_tokens = 0
