"""Scores of layers against plain reference code, layer calls counted, and published orders."""

import copy
import functools
import logging

import pandas as pd
import pytest
import torch
import transformers
from architectures import ARCHITECTURES, tiny
from every_architecture import build
from peft import LoraConfig, get_peft_model

from pruning_utils import evaluation, importance, models, runtime, selection, surgery

N_LAYERS = 8
DENSE = (
    "llama",
    "gpt2",
    "bloom",
    "gptj",
    "opt",
    "gemma2",
    "olmo2",
    "qwen3_moe",
    "mamba",
    "falcon",
    "phi",
    "mpt",
)


def windows(n_samples: int = 4, seq_len: int = 8) -> torch.Tensor:
    return torch.randint(3, 128, (n_samples, seq_len), generator=torch.Generator().manual_seed(0))


def without(model, layers) -> torch.nn.Module:
    return surgery.drop_layers(copy.deepcopy(model), layers)


@pytest.fixture(params=DENSE)
def model(request):
    return ARCHITECTURES[request.param]()


# --- magnitude ------------------------------------------------------------------------------------


def test_magnitude_by_hand():
    model = ARCHITECTURES["llama"]()
    for layer in models.decoder_layers(model):
        for weight in layer.parameters():
            torch.nn.init.constant_(weight, -2.0)
    count = sum(weight.numel() for weight in models.decoder_layers(model)[0].parameters())
    assert importance.magnitude(model).tolist() == [2 * count] * N_LAYERS
    assert importance.magnitude(model, norm=2).tolist() == [4 * count] * N_LAYERS


def test_magnitude_counts_every_tensor_of_a_layer(model):
    expected = [
        sum(weight.double().abs().sum().item() for weight in layer.parameters())
        for layer in models.decoder_layers(model)
    ]
    assert importance.magnitude(model) == pytest.approx(expected, rel=1e-5)
    assert importance.magnitude(model.bfloat16()) == pytest.approx(expected, rel=1e-2)


# --- Taylor ---------------------------------------------------------------------------------------


def taylor_reference(model, ids) -> list[float]:
    """Gradients of transformers' own loss, all kept, then the products."""
    model = copy.deepcopy(model).eval().requires_grad_()
    model(ids, labels=ids).loss.backward()
    return [
        sum(
            (weight.grad * weight).abs().sum().item()
            for weight in layer.parameters()
            if weight.grad is not None
        )
        for layer in models.decoder_layers(model)
    ]


def test_taylor_equals_the_plain_way_whatever_the_batch(model):
    ids = windows()
    expected = taylor_reference(model, ids)
    assert len(set(expected)) == N_LAYERS
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    grads = [weight.requires_grad for weight in model.parameters()]
    for batch_size in (None, 1, 3):  # of four windows
        assert importance.taylor(model, ids, batch_size=batch_size) == pytest.approx(
            expected, rel=1e-3
        ), batch_size
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert [weight.requires_grad for weight in model.parameters()] == grads and not model.training
    assert all(weight.grad is None for weight in model.parameters())


def test_gradients_that_were_there_neither_count_nor_go():
    model, ids = ARCHITECTURES["llama"](), windows()
    expected = importance.taylor(model, ids)
    model(ids, labels=ids).loss.backward()
    before = [weight.grad.clone() for weight in model.parameters()]
    assert importance.taylor(model, ids) == pytest.approx(expected)
    assert all(
        torch.equal(weight.grad, there)
        for weight, there in zip(model.parameters(), before, strict=True)
    )


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_taylor_keeps_the_gradients_of_one_layer(batch_size):
    """A layer's gradients are gone before the layer two below it begins its backward pass."""
    model, events, alive = ARCHITECTURES["llama"](), [], []

    def seen(number: int, weight: torch.Tensor) -> None:
        events.append(("gradient", number))
        alive.append(sum(other.grad is not None for other in model.parameters()))

    for number, layer in enumerate(models.decoder_layers(model)):
        layer.self_attn.register_forward_pre_hook(
            lambda *_, number=number: events.append(("run", number))
        )
        # This hook sees the gradient before that of the scores does.
        for weight in layer.parameters():
            weight.register_post_accumulate_grad_hook(functools.partial(seen, number))
    importance.taylor(model, windows(), batch_size=batch_size)
    assert set(alive) == {1}, "each gradient is gone before the next one comes"
    backward = events[events.index(("run", N_LAYERS - 1)) + 4 // batch_size :]
    for number in range(2, N_LAYERS):
        last = max(place for place, event in enumerate(backward) if event == ("gradient", number))
        assert last < backward.index(("run", number - 2))
    n_weights = sum(1 for layer in models.decoder_layers(model) for _ in layer.parameters())
    assert len(alive) == n_weights, "micro-batches are added before they are looked at"


@pytest.fixture
def handing_on():
    """A model whose layers hand on the states of their routers beside their own."""
    return build("zaya")


def test_taylor_of_layers_that_hand_on_more_does_not_depend_on_the_batch(handing_on):
    whole = importance.taylor(handing_on, windows())
    for batch_size in (1, 3):
        found = importance.taylor(handing_on, windows(), batch_size=batch_size)
        assert found == pytest.approx(whole, rel=1e-4)


# --- perplexity without a layer -------------------------------------------------------------------


def test_layers_that_hand_on_more_are_not_left_out_within_a_pass(handing_on):
    with pytest.raises(ValueError, match="layers of ZayaForCausalLM hand on more than their"):
        importance.perplexity_without_layer(handing_on, windows())


@pytest.fixture(scope="module")
def sharing_keys():
    """A model whose last layers take keys and values of earlier ones, as Gemma 4 E2B's do."""
    shared = {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 4}
    sizes = {"head_dim": 8, "global_head_dim": 16, "hidden_size_per_layer_input": 8}
    sizes["vocab_size_per_layer_input"] = 128
    return tiny("Gemma4TextConfig", **shared, **sizes)


def test_taylor_of_layers_that_share_keys_takes_all_samples_at_once(sharing_keys):
    ids = windows()
    plain = taylor_reference(sharing_keys, ids)
    assert importance.taylor(sharing_keys, ids).tolist() == pytest.approx(plain, rel=1e-4)
    message = "all samples must run at once: batch_size must be at least 4, got 2"
    with pytest.raises(ValueError, match=message):
        importance.taylor(sharing_keys, ids, batch_size=2)


def test_layers_that_share_keys_are_not_left_out_within_a_pass(sharing_keys):
    with pytest.raises(ValueError, match="layers of Gemma4ForCausalLM hand on more than their"):
        importance.perplexity_without_layer(sharing_keys, windows())


@pytest.mark.parametrize("score", [importance.taylor, importance.perplexity_without_layer])
def test_layers_whose_states_have_names_are_not_run_apart(score):
    sizes = {"hidden_size": 16, "attention_head_size": 8, "num_attention_heads": 2}
    places = {"axial_pos_embds_dim": [8, 8], "axial_pos_shape": [4, 4], "is_decoder": True}
    kinds = {"attn_layers": ["local"] * 4, "local_attn_chunk_length": 8, "vocab_size": 128}
    config = transformers.ReformerConfig(**sizes, **places, **kinds, max_position_embeddings=16)
    model = transformers.ReformerModelWithLMHead(config)
    with pytest.raises(ValueError, match="ReformerModelWithLMHead must hand each layer one tensor"):
        score(model, windows(seq_len=16))


def test_one_sweep_equals_removal_layer_by_layer(model):
    ids = windows()
    expected = [evaluation.perplexity(without(model, [layer]), ids) for layer in range(N_LAYERS)]
    for batch_size in (None, 1, 2):
        found = importance.perplexity_without_layer(model, ids, batch_size=batch_size)
        assert found == pytest.approx(expected, rel=1e-4), batch_size


@pytest.mark.parametrize("block_size", [3, N_LAYERS - 1])
def test_blocks_are_skipped_in_one_sweep(block_size):
    for name in ("llama", "bloom"):
        model, ids = ARCHITECTURES[name](), windows()
        expected = [
            evaluation.perplexity(without(model, range(start, start + block_size)), ids)
            for start in range(N_LAYERS - block_size + 1)
        ]
        found = importance.perplexity_without_block(model, ids, block_size=block_size)
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("block_size", [1, 3])
def test_each_layer_runs_once_for_each_batch_on_as_few_rows_as_there_are_streams(block_size):
    model, calls = ARCHITECTURES["llama"](), []
    for layer in models.decoder_layers(model):
        layer.self_attn.register_forward_pre_hook(
            lambda module, given, named: calls.append(named["hidden_states"].shape[0]),
            with_kwargs=True,
        )
    importance.perplexity_without_block(model, windows(6), block_size=block_size, batch_size=3)
    left = N_LAYERS - block_size
    assert len(calls) == 2 * N_LAYERS
    assert sum(calls) == 6 * (left * (left + 1) // 2 + N_LAYERS)
    assert block_size > 1 or sum(calls) == 6 * N_LAYERS * (N_LAYERS + 1) // 2


def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_lost(monkeypatch, caplog):
    model, ids = ARCHITECTURES["llama"](), windows(6)
    expected = importance.perplexity_without_layer(model, ids)
    own = evaluation.batch_losses
    sizes = []

    def scarce(model, rows):
        sizes.append(len(rows) // (N_LAYERS + 1))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("no room")
        return own(model, rows)

    monkeypatch.setattr(evaluation, "batch_losses", scarce)
    with caplog.at_level(logging.WARNING):
        assert importance.perplexity_without_layer(model, ids, batch_size=5) == pytest.approx(
            expected, rel=1e-6
        )
    assert sizes == [5, 2, 2, 2] and "5 samples does not fit" in caplog.text
    monkeypatch.setattr(
        evaluation, "batch_losses", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("a fault"))
    )
    with pytest.raises(RuntimeError, match="a fault"):
        importance.perplexity_without_layer(model, ids)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda model: importance.magnitude(model, norm=3),
            "norm must be a whole number from 1 to 2, got 3",
        ),
        (lambda model: importance.taylor(model, windows()[:, :1]), "at least 2 tokens, got 1"),
        (
            lambda model: importance.taylor(model, windows(), batch_size=0),
            "batch_size must be a whole number .* got 0",
        ),
        (
            lambda model: importance.taylor(model, [[1, 2], [3]]),
            "input_ids must be an integer tensor .* got list",
        ),
        (
            lambda model: importance.perplexity_without_layer(model, windows() + 900),
            "must lie in the vocabulary",
        ),
        (
            lambda model: importance.perplexity_without_block(
                model, windows(), block_size=N_LAYERS
            ),
            "from 1 to 7 .*, got 8",
        ),
        (
            lambda model: importance.perplexity_without_layer(model, windows(), batch_size=True),
            "batch_size .* got True",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(ARCHITECTURES["llama"]())


def test_float16_does_not_round_gradients_of_many_tokens_to_zero():
    model = ARCHITECTURES["llama"]()
    with torch.no_grad():  # states as large as those of real models, whose gradients are small
        model.get_input_embeddings().weight *= 3000
    ids = windows(256, 32)
    expected = importance.taylor(model, ids)
    assert importance.taylor(model.half(), ids) == pytest.approx(expected, rel=0.005)


def test_a_four_bit_model_is_scanned_and_can_be_trained_afterwards():
    model = models.quantized_copy(ARCHITECTURES["llama"]().bfloat16())
    ids = windows()
    found = importance.perplexity_without_layer(model, ids)
    expected = [evaluation.perplexity(without(model, [layer]), ids) for layer in (0, 5)]
    assert found[[0, 5]] == pytest.approx(expected, rel=1e-2)
    model.train()
    model(ids, labels=ids).loss.backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


def test_quantised_weights_have_no_scores_and_the_error_says_what_to_load():
    model = models.quantized_copy(ARCHITECTURES["llama"]())
    for call in (importance.magnitude, lambda model: importance.taylor(model, windows())):
        with pytest.raises(
            ValueError, match=r"quantised: load it with quantize=None \(bfloat16 or float32\)"
        ):
            call(model)


def test_weights_that_are_not_finite_are_named():
    model = ARCHITECTURES["llama"]()
    with torch.no_grad():
        models.decoder_layers(model)[3].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="score of layer 3 is nan"):
        importance.magnitude(model)


# --- published scores -----------------------------------------------------------------------------

REFERENCE = runtime.project_root() / "reference"


def test_published_scores_give_the_published_orders_and_removed_sets():
    """Twenty rankings of eight models; by the "+" rule the first four and last two layers stay."""
    scores, published = (
        pd.read_csv(REFERENCE / f"shortened_block_{kind}.csv") for kind in ("scores", "orders")
    )
    by_model = {
        names: group.sort_values("block")["score"]
        for names, group in scores.groupby(["model", "method"])
    }
    assert len(by_model) == 20 and published["kind"].value_counts().to_dict() == {
        "removed": 100,
        "order": 40,
    }
    for row in published.itertuples():
        kept = {"keep_first": 4, "keep_last": 2} if row.protected else {}
        own = by_model[row.model, row.method]
        assert len(own) == row.n_layers
        found = (
            selection.least_important(own, row.n_removed, **kept)
            if row.kind == "removed"
            else selection.removal_order(own, **kept)
        )
        assert " ".join(map(str, found)) == row.blocks, row


@pytest.mark.parametrize("score", [importance.magnitude, importance.taylor])
def test_weights_that_are_not_what_is_computed_with_are_refused(score):
    given = () if score is importance.magnitude else (windows(),)
    adapted = get_peft_model(ARCHITECTURES["llama"](), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="carries adapters: merge them first"):
        score(adapted, *given)


def test_weights_of_inference_mode_have_magnitudes_and_no_gradients():
    with torch.inference_mode():
        model = ARCHITECTURES["llama"]()
    assert (
        importance.magnitude(model).tolist()
        == importance.magnitude(ARCHITECTURES["llama"]()).tolist()
    )
    with pytest.raises(ValueError, match="were made inside torch.inference_mode"):
        importance.taylor(model, windows())


def test_a_state_that_layers_keep_of_a_text_is_let_go():
    model = build("recurrent_gemma")
    kept = {name: part for name, part in model.named_modules() if hasattr(part, "recurrent_states")}
    assert kept
    importance.taylor(model, windows())
    assert all(part.recurrent_states is None for part in kept.values())
    copy.deepcopy(model)


def test_a_model_that_is_told_to_return_tuples_is_scored_all_the_same():
    model = ARCHITECTURES["llama"]()
    expected = importance.taylor(model, windows())
    model.config.return_dict = False
    assert importance.taylor(model, windows()).tolist() == expected.tolist()
    assert evaluation.perplexity(model, windows()) > 1
    assert model.config.return_dict is False
