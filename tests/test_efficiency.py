"""Parameters and arithmetic by hand; generation that uses its cache and is as long as asked."""

import pytest
import torch
from architectures import ARCHITECTURES
from every_architecture import build

from pruning_utils import efficiency, models, surgery


@pytest.fixture
def llama():
    return ARCHITECTURES["llama"]()


def test_parameters_by_hand(llama):
    config, n_layers = llama.config, 8
    width = config.hidden_size
    inner = config.intermediate_size
    head = config.hidden_size // config.num_attention_heads
    layer = (
        2 * width * width
        + 2 * width * config.num_key_value_heads * head
        + 3 * width * inner
        + 2 * width
    )
    other = config.vocab_size * width * (1 if config.tie_word_embeddings else 2) + width
    found = efficiency.stored_parameters(llama)
    buffers = sum(buffer.nbytes for buffer in llama.buffers())
    assert found == {
        "layers": n_layers * layer,
        "other": other,
        "total": n_layers * layer + other,
        "bytes": 4 * (n_layers * layer + other) + buffers,
    }
    assert (
        efficiency.stored_parameters(surgery.drop_layers(llama, [1, 2]))["total"]
        == 6 * layer + other
    )


def test_a_tied_head_counts_once_and_an_untied_one_twice():
    model = ARCHITECTURES["gemma2"]()
    embedding = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is embedding
    before = efficiency.stored_parameters(model)["total"]
    models.untie_head(model)
    assert efficiency.stored_parameters(model)["total"] == before + embedding.numel()


def test_quantised_weights_are_counted_in_bytes_alone(llama):
    quantised = models.quantized_copy(llama.bfloat16())
    with pytest.raises(ValueError, match="quantised: load it with quantize=None"):
        efficiency.forward_flops(quantised, batch_size=1, n_tokens=4)
    with pytest.raises(ValueError, match="count before quantising"):
        efficiency.stored_parameters(quantised)
    linear = sum(
        module.weight.numel()
        for layer in models.decoder_layers(llama)
        for module in layer.modules()
        if isinstance(module, torch.nn.Linear)
    )
    left = efficiency.weight_bytes(llama) - 2 * linear  # all but the linear weights
    assert left + linear / 2 < efficiency.weight_bytes(quantised) < left + linear


def test_flops_by_hand(llama):
    """Two operations a weight and token; attention: two products of T x T x D a layer."""
    batch, length, width = 3, 7, llama.config.hidden_size
    weights = sum(
        module.weight.numel() for module in llama.modules() if isinstance(module, torch.nn.Linear)
    )
    products = 2 * batch * length * weights
    attention = 8 * 2 * 2 * batch * length * length * width
    found = efficiency.forward_flops(llama, batch_size=batch, n_tokens=length)
    assert found == products + attention
    assert efficiency.forward_flops(llama, batch_size=2 * batch, n_tokens=length) == 2 * found


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"n_tokens": 65}, "n_tokens must be a whole number from 1 to 64, got 65"),
    ],
)
def test_passes_that_cannot_be_are_not_counted(change, message, llama):
    with pytest.raises(ValueError, match=message):
        efficiency.forward_flops(llama, **{"batch_size": 1, "n_tokens": 2, **change})


def test_weights_that_are_not_there_have_no_bytes(llama):
    llama.model.layers[2].to("meta")
    with pytest.raises(ValueError, match=r"but model.layers.2.\S+ is on the device meta"):
        efficiency.weight_bytes(llama)
    with pytest.raises(ValueError, match="must be a module of PyTorch, got None"):
        efficiency.weight_bytes(None)


def test_generation_uses_the_cache_and_has_the_length_asked(llama):
    lengths = []
    models.backbone(llama).register_forward_pre_hook(
        lambda _, given, named: lengths.append(
            tuple((given[0] if given else named["input_ids"]).shape)
        ),
        with_kwargs=True,
    )
    found = efficiency.generation_speed(
        llama, batch_size=2, prompt_tokens=5, new_tokens=4, warmups=1, repeats=2
    )
    assert lengths == 3 * [(2, 5), (2, 1), (2, 1), (2, 1)]
    assert len(found) == 2 and (found > 0).all().all()
    whole = found["first_token_seconds"] + 3 * found["per_token_seconds"]
    assert (2 * 4 / whole).tolist() == pytest.approx(found["tokens_per_second"].tolist())


@pytest.mark.parametrize("name", ["lfm2", "qwen3_next", "mamba", "gemma2", "jamba", "minimax"])
def test_generation_keeps_what_each_architecture_keeps(name, monkeypatch):
    """Also what is no cache of keys and values: the tokens are those of ``generate``."""
    model = ARCHITECTURES[name]()
    shown = []
    forward = model.forward

    def heard(ids, **given):
        shown.append(ids)
        return forward(ids, **given)

    monkeypatch.setattr(model, "forward", heard)
    efficiency.generation_speed(
        model, batch_size=1, prompt_tokens=9, new_tokens=5, warmups=0, repeats=1
    )
    monkeypatch.undo()
    prompt, *later = shown
    assert [ids.shape for ids in later] == 4 * [(1, 1)]
    own = model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert torch.cat(later, 1).tolist() == own[:, 9:].tolist()


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_flops_of_experts_are_those_of_their_products(name):
    """However they are computed: in one product of groups, or expert by expert."""
    model = ARCHITECTURES[name]()
    found = efficiency.forward_flops(model, batch_size=2, n_tokens=16)
    model.set_experts_implementation("eager")
    assert found == efficiency.forward_flops(model, batch_size=2, n_tokens=16)


def test_flops_do_not_depend_on_which_weights_are_trained():
    """DBRX hands views of its weights to modules, which PyTorch's counter follows if they train."""
    model = build("dbrx")
    flags = [weight.requires_grad for weight in model.parameters()]
    found = efficiency.forward_flops(model, batch_size=1, n_tokens=8)
    assert [weight.requires_grad for weight in model.parameters()] == flags and all(flags)
    assert found == efficiency.forward_flops(model.requires_grad_(False), batch_size=1, n_tokens=8)


def test_weights_that_layers_share_count_once(llama):
    first, second = models.decoder_layers(llama)[:2]
    before = efficiency.stored_parameters(llama)
    second.mlp = first.mlp
    after = efficiency.stored_parameters(llama)
    shared = sum(weight.numel() for weight in first.mlp.parameters())
    assert after["layers"] == before["layers"] - shared and after["other"] == before["other"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"new_tokens": 1}, "new_tokens must be a whole number of at least 2, got 1"),
        ({"repeats": True}, "repeats must be .* got True"),
        ({"prompt_tokens": 60, "new_tokens": 5}, "at most the model's context of 64, got 65"),
    ],
)
def test_bad_numbers_are_refused_before_any_work(change, message, llama):
    llama.forward = lambda *_, **__: pytest.fail("work began")
    with pytest.raises(ValueError, match=message):
        efficiency.generation_speed(
            llama, **{"batch_size": 1, "prompt_tokens": 3, "new_tokens": 2, **change}
        )


def test_limits_of_the_machine_are_rates():
    found = efficiency.machine_limits(dtype="float32", size=64, repeats=1)
    assert (
        set(found) == {"dtype", "flops_per_second", "bytes_per_second"}
        and found.pop("dtype") == "float32"
    )
    assert min(found.values()) > 1e6
    with pytest.raises(ValueError, match="size must be a whole number of at least 1, got 0"):
        efficiency.machine_limits(size=0)
    with pytest.raises(ValueError, match="repeats must be a whole number of at least 1, got 0"):
        efficiency.machine_limits(repeats=0)


def test_a_backbone_alone_is_refused_where_tokens_are_predicted(llama):
    backbone = llama.model
    with pytest.raises(ValueError, match="head"):
        efficiency.forward_flops(backbone, batch_size=1, n_tokens=4)
    with pytest.raises(ValueError, match="head"):
        efficiency.generation_speed(backbone, batch_size=1, prompt_tokens=2, new_tokens=2)


def test_generation_of_a_model_that_is_told_to_return_tuples(llama):
    llama.config.return_dict = False
    asked = {"batch_size": 1, "prompt_tokens": 2, "new_tokens": 2, "repeats": 1}
    assert len(efficiency.generation_speed(llama, **asked)) == 1
