"""Settings of healing: what each method judges, what is stored, and sizes that no machine holds."""

import json
import re

import numpy as np
import pytest
import torch
from test_healing import L, T, Tokenizer, heal, llama, windows

from pruning_utils import healing
from pruning_utils.engine import trainer


@pytest.fixture
def model():
    return llama()


# --- what a method does not use -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "unused"),
    [
        ("lora", {"last_k": L + 1}),
        ("qlora", {"last_k": 10**6}),
        ("full", {"last_k": L + 1, "rank": 10**6, "targets": "nothing of this name"}),
        ("last_layers", {"rank": 10**6, "targets": None}),
    ],
)
def test_what_a_method_does_not_use_is_kept_and_not_judged(method, unused, model):
    settings = healing.check_settings(model, {"method": method, "last_k": 2, **unused})
    assert {name: settings[name] for name in unused} == unused
    assert json.loads(json.dumps(settings)) == settings


def test_defaults_fit_a_model_of_two_layers_but_for_the_method_that_counts_layers():
    model = llama()
    del model.model.layers[2:]
    model.config.num_hidden_layers = 2
    for method in ("lora", "qlora", "dora", "full"):
        assert healing.check_settings(model, {"method": method, "rank": 2})["last_k"] == 3
    with pytest.raises(ValueError, match="last_k must be a whole number from 0 to 2, got 3"):
        healing.check_settings(model, {"method": "last_layers"})


@pytest.mark.parametrize("targets", [{"q_proj"}, object(), {"q_proj": torch.ones(1)}, ("a", ["b"])])
def test_what_is_not_used_is_a_plain_value_all_the_same(targets, model):
    with pytest.raises(ValueError, match="targets must be a plain value .* got"):
        healing.check_settings(model, {"method": "full", "targets": {"set": targets}})


# --- kinds of values ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_norm": "no"}, "train_norm must be True or False, got 'no'"),
        ({"untie": "false"}, "untie must be True or False, got 'false'"),
        ({"untie": None}, "untie must be True or False, got None"),
        ({"merge": "no"}, "merge must be True or False, got 'no'"),
        ({"merge": 1}, "merge must be True or False, got 1"),
        ({"learning_rate": True}, "learning_rate must be above 0, got True"),
        ({"learning_rate": 10**400}, "learning_rate must be above 0, got 1000"),
        ({"alpha": True}, "alpha must be above 0, got True"),
        ({"dropout": False}, r"dropout must be in \[0, 1\), got False"),
        ({"targets": [["q_proj"]]}, "targets must be 'all', 'mlp' or a list of names"),
        ({"targets": np.array(["q_proj"])}, "targets must be"),
        ({"rank": 49}, r"rank must be .* from 1 to 32 \(no adapted weight has a higher"),
        ({"rank": 17, "targets": ["k_proj", "v_proj"]}, "rank must be .* from 1 to 16 .* got 17"),
        ({"batch_size": 10**9}, f"batch_size must be a whole number from 1 to {2**26 // T} .*"),
        ({"steps": 2**32}, "steps must be a whole number from 1 to 4294967295, got 4294967296"),
    ],
)
def test_wrong_kinds_and_absurd_sizes_are_refused_at_once(
    settings, message, model, tmp_path, monkeypatch
):
    monkeypatch.setattr(healing, "trainable_copy", lambda *_: pytest.fail("work began"))
    with pytest.raises(ValueError, match=message):
        heal(model, output_dir=tmp_path / "run", **settings)
    assert not list(tmp_path.iterdir())


def test_numbers_of_numpy_are_stored_as_pythons_own(model):
    given = {
        "method": "dora",
        "steps": np.int64(7),
        "batch_size": np.uint8(3),
        "warmup_steps": np.int32(2),
        "rank": np.int16(4),
        "last_k": np.int64(2),
        "seed": np.uint32(5),
        "learning_rate": np.float32(0.25),
        "dropout": np.float64(0.5),
        "train_norm": np.True_,
    }
    found = healing.check_settings(model, given)
    assert {name: found[name] for name in given} == {
        **{"method": "dora", "steps": 7, "batch_size": 3, "warmup_steps": 2, "rank": 4},
        **{"last_k": 2, "seed": 5, "learning_rate": 0.25, "dropout": 0.5, "train_norm": True},
    }
    assert found["alpha"] == 4
    assert {type(value) for value in found.values()} == {str, int, float, bool}


def test_a_run_written_with_pythons_numbers_goes_on_with_those_of_numpy(model, tmp_path):
    first = heal(model, steps=2, alpha=None, output_dir=tmp_path / "run")
    written = (tmp_path / "run/settings.json").read_text()
    again = heal(
        model,
        steps=np.int64(2),
        rank=np.int8(4),
        learning_rate=np.float64(1e-2),
        output_dir=tmp_path / "run",
    )
    assert (tmp_path / "run/settings.json").read_text() == written
    assert again.history.equals(first.history)


# --- many windows ---------------------------------------------------------------------------------


def test_windows_are_drawn_when_they_are_asked_for():
    rows = windows(5)
    generator = torch.Generator().manual_seed(3)
    order = torch.cat([torch.randperm(5, generator=generator) for _ in range(3)]).tolist()
    found = trainer.WindowsInOrder(rows, 10**12, 3)
    assert len(found) == 10**12
    # Forwards, far ahead, and back again.
    for place in (0, 4, 5, 14, 7, 1):
        assert torch.equal(found[place], rows[order[place]]), place


@pytest.mark.parametrize(("batch_size", "expected"), [(10**9, 512), (10**9 + 7, 1), (2**40, 512)])
def test_the_windows_in_a_pass_are_found_at_once(batch_size, expected):
    assert trainer.micro_batch_size(batch_size, T) == expected


# --- the tokenizer --------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [None, "a name", 3, torch.nn.Linear(2, 2)])
def test_a_tokenizer_that_cannot_be_saved_is_refused_where_it_would_be(tokenizer, model, tmp_path):
    with pytest.raises(ValueError, match="tokenizer must be one that can be saved"):
        healing.heal(
            model, tokenizer, windows(), method="lora", output_dir=tmp_path / "run", last_k=0
        )
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_fails_to_save_leaves_nothing(model, tmp_path):
    class Unbound(Tokenizer):
        def save_pretrained(self, folder):
            raise AssertionError("never called with a tokenizer")

    # The class in place of a tokenizer.
    with pytest.raises(ValueError, match="tokenizer must be one that can be saved, got <class"):
        healing.heal(
            model, Unbound, windows(), method="lora", warmup_steps=0, output_dir=tmp_path / "run"
        )
    assert not list(tmp_path.iterdir())


def test_without_a_folder_no_tokenizer_is_needed(model):
    settings = {"method": "lora", "steps": 1, "warmup_steps": 0, "batch_size": 1, "rank": 2}
    healed = healing.heal(model, None, windows(), **settings)
    assert healed.history.equals(healing.heal(model, Tokenizer, windows(), **settings).history)


# --- what is trained is kept ----------------------------------------------------------------------


def test_what_was_trained_is_kept_where_the_end_fails(model, tmp_path, monkeypatch):
    settings = {"steps": 4, "output_dir": tmp_path / "run"}
    with monkeypatch.context() as patch:
        patch.setattr(healing, "finished", lambda *_: (_ for _ in ()).throw(OSError("no merge")))
        with pytest.raises(OSError, match=re.escape("no merge")):
            heal(model, merge=True, **settings)
    assert trainer.is_whole(tmp_path / "run/checkpoint-4")
    monkeypatch.setattr(healing, "mean_loss", lambda *_: pytest.fail("trained again"))
    assert len(heal(model, merge=True, **settings).history) == 4
