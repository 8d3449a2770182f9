"""Head and loss on a few tokens at a time give the loss and the gradients of all tokens at once."""

import pytest
import torch
from architectures import ARCHITECTURES
from peft import LoraConfig, get_peft_model
from test_healing import L, T, V, llama, windows
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from pruning_utils import healing
from pruning_utils.engine import head_losses, passes

N, D = 6, 32  # windows, and the width of the model
PREDICTED = N * (T - 1)
AT_ONCE = 40  # tokens in a part: three parts, of which the last one is smaller
# Two sums of the same terms, at most V of them or as many as tokens, added in different orders.
EPSILON = V * torch.finfo(torch.float32).eps

SETTINGS = {
    "lora": {"method": "lora"},
    "qlora": {"method": "qlora"},
    "dora": {"method": "dora"},
    "last layers, tied head of its own": {"method": "last_layers"},
    "last layers, tied head": {"method": "last_layers", "untie": False, "train_norm": True},
    "the head alone": {"method": "last_layers", "last_k": 0},
    "full, tied": {"method": "full"},
    "full, untied": {"method": "full"},
}


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    monkeypatch.setattr(head_losses, "TOKENS_AT_ONCE", AT_ONCE)


def scattered(model):
    """A model whose adapters, zeros at first, are random ones."""
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if ".lora_" in name:
            weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    return model.train()


def trainable(case: str, dtype: torch.dtype = torch.float32):
    """What healing trains, and in which mode, with dropout off so that two passes can agree."""
    model = llama(tied="tied" in case.replace("untied", ""), dtype=dtype)
    settings = healing.check_settings(model, SETTINGS[case] | {"last_k": 2, "dropout": 0.0})
    settings["last_k"] = SETTINGS[case].get("last_k", 2)
    return scattered(healing.trainable_copy(model, settings))


def naive(model, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {
        name: weight.grad.clone()
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }


def assert_equal_to_naive(model, epsilon: float = EPSILON) -> dict[str, torch.Tensor]:
    """Compare loss and gradients, these as parts of the largest one of each weight."""
    ids = windows(N)
    plain = naive(model, ids)
    expected = gradients(model, plain)
    loss = head_losses.mean_loss(model, ids)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(plain.item(), rel=epsilon)
    found = gradients(model, loss)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (found[name] - gradient).abs().max()
        assert error <= epsilon * gradient.abs().max(), name
    return found


@pytest.mark.parametrize("case", SETTINGS)
def test_loss_and_gradients_equal_those_of_all_tokens_at_once(case):
    model = trainable(case)
    found = assert_equal_to_naive(model)
    asked = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert found.keys() == asked
    assert all(gradient.abs().max() > 0 for gradient in found.values())


@pytest.mark.parametrize("case", ["lora", "full, tied"])
def test_products_in_bfloat16_give_the_gradients_of_all_tokens_at_once(case):
    with torch.autocast("cpu", torch.bfloat16):
        # Where the order of a sum decides how a logit is rounded, each layer rounds what follows.
        assert_equal_to_naive(trainable(case, torch.bfloat16), L * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize(
    ("name", "owner", "attribute", "value"),
    [
        ("gemma2", "config", "final_logit_softcapping", 0.5),
        ("granite", "config", "logits_scaling", 3.0),
        ("cohere", "", "logit_scale", 1.0),
    ],
)
def test_scaled_and_capped_logits_are_the_architectures_own(name, owner, attribute, value):
    model, ids = ARCHITECTURES[name]().train(), windows(N)
    before = naive(model, ids).item()
    setattr(getattr(model, owner) if owner else model, attribute, value)
    assert abs(naive(model, ids).item() - before) > 0.1, "it matters"
    assert_equal_to_naive(model)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_on_the_head_get_their_gradients(use_dora):
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], use_dora=use_dora)
    found = assert_equal_to_naive(scattered(get_peft_model(llama(), config)))
    of_head = [name for name in found if "lm_head" in name]
    assert len(of_head) == (3 if use_dora else 2)
    assert all(found[name].abs().max() > 0 for name in of_head)


def test_a_single_trained_number_in_the_head_gets_its_gradient():
    model = llama()
    model.scale = torch.nn.Parameter(torch.tensor(1.5))
    own = model.lm_head.forward
    model.lm_head.forward = lambda states: model.scale * own(states)
    assert assert_equal_to_naive(model)["scale"].abs() > 0


def test_gradients_are_added_scaled_and_used_once():
    """Micro-batches add up to the batch; what Trainer divides the loss by reaches all gradients."""
    model, ids = trainable("full, tied"), windows(N)
    expected = gradients(model, naive(model, ids))
    model.zero_grad()
    for part in ids.split(N // 2):
        loss = head_losses.mean_loss(model, part) / 2
        loss.backward(retain_graph=True)
    for name, weight in model.named_parameters():
        error = (weight.grad - expected[name]).abs().max()
        assert error <= EPSILON * expected[name].abs().max(), name
    with pytest.raises(RuntimeError, match="the gradients of this loss have been used"):
        loss.backward()


@pytest.mark.parametrize(
    ("tokens", "logits", "expected"),
    [(128, 2**25, [90]), (45, 2**25, [45, 45]), (128, 50 * V, [50, 40]), (40, 1, [1] * 90)],
)
def test_parts_of_any_size_give_the_same(tokens, logits, expected, monkeypatch):
    """A part has no more tokens, and no more logits, than are allowed; but at least one token."""
    monkeypatch.setattr(head_losses, "TOKENS_AT_ONCE", tokens)
    monkeypatch.setattr(passes, "LOGITS_AT_ONCE", logits)
    model, rows = trainable("full, untied"), []
    assert_equal_to_naive(model)
    own = model.lm_head.forward
    model.lm_head.forward = lambda states: rows.append(states.shape[:-1].numel()) or own(states)
    head_losses.mean_loss(model, windows(N))
    assert rows == expected


def test_without_gradients_nothing_is_kept():
    model, ids = trainable("lora"), windows(N)
    with torch.no_grad():
        loss = head_losses.mean_loss(model, ids)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(naive(model, ids).item(), rel=EPSILON)
    # Nor of a model in which the loss depends on nothing that is trained.
    idle = llama().requires_grad_(False)
    idle.extra = torch.nn.Linear(1, 1)
    assert not head_losses.mean_loss(idle, ids).requires_grad


def test_a_model_whose_layers_cannot_run_apart_is_trained_all_the_same(monkeypatch):
    monkeypatch.setattr(passes, "run_backbone", lambda *_: (None, None))
    assert_equal_to_naive(trainable("full, tied"))


@pytest.mark.parametrize("copied", [1, V, 5 * V, 2**22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_of_logits_in_parts_equals_the_loss_at_once(copied, dtype, monkeypatch):
    monkeypatch.setattr(head_losses, "COPIED_LOGITS", copied)
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(3, T, V, generator=generator)).to(dtype).requires_grad_()
    plain = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().mT, windows(3)[:, 1:], reduction="sum"
    )
    (expected,) = torch.autograd.grad(plain, logits)
    loss = head_losses.loss_of_logits(logits, windows(3))
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        gradient, expected, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-7
    )
    assert (gradient[:, -1] == 0).all()


# --- what a step holds and computes ---------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Rows of the largest tensor that any operation returns whose last dimension is V."""

    rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.ndim and tensor.shape[-1] == V:
                self.rows = max(self.rows, tensor.numel() // V)
        return result


@pytest.mark.parametrize("case", ["lora", "last layers, tied head", "full, untied"])
def test_no_step_or_evaluation_holds_more_logits_than_those_of_a_part(case):
    model, ids = trainable(case), windows(N)
    with Largest() as plain:
        naive(model, ids).backward()
    with Largest() as trained:
        head_losses.mean_loss(model, ids).backward()
    with Largest() as evaluated, torch.no_grad():
        head_losses.mean_loss(model, ids)
    # A weight of the head, turned, has D < 40 rows.
    assert (plain.rows, trained.rows, evaluated.rows) == (N * T, AT_ONCE, AT_ONCE)


@pytest.mark.parametrize(
    ("case", "products"), [("lora", 2), ("last layers, tied head", 3), ("the head alone", 2)]
)
def test_the_head_multiplies_each_predicted_token_once(case, products):
    """Forwards, for the states' gradients, and for its own where it is trained."""
    model, ids, rows = trainable(case), windows(N), []
    head = model.get_output_embeddings()
    own = head.forward
    head.forward = lambda states: rows.append(states.shape[:-1].numel()) or own(states)
    with FlopCounterMode(display=False) as plain:
        naive(model, ids).backward()
    assert rows == [N * T]
    rows.clear()
    with FlopCounterMode(display=False) as parts:
        head_losses.mean_loss(model, ids).backward()
    assert rows == [40, 40, 10] and sum(rows) == PREDICTED
    # All that is saved is what followed the last token of each window.
    saved = plain.get_total_flops() - parts.get_total_flops()
    assert saved == products * 2 * N * D * V
