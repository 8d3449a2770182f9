"""Healing by several processes, each with a share of the weights: as in one process."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from tiny_model import WATCHED, WINDOWS, save_tiny_model

from pruning_utils import data, healing, models, runtime, sharded
from pruning_utils.engine import trainer

CHILDREN = Path(__file__).resolve().parent / "children"
SETTINGS = {
    "method": "lora",
    "rank": 2,
    "steps": 6,
    "batch_size": 4,
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "dropout": 0.0,
}
LAUNCH = (
    "-m accelerate.commands.launch --use_fsdp --fsdp_version 2 --num_machines 1 --num_processes 2 "
    "--mixed_precision no --dynamo_backend no --main_process_port 0"
).split()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def loaded(tiny) -> tuple:
    return models.load_model(tiny, dtype="float32", device="cpu")


@pytest.fixture
def team(tmp_path):
    """A group of this process alone, which does all that several do."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_as_one_does(tiny, loaded, tmp_path):
    asked = [
        SETTINGS,
        SETTINGS | {"method": "full"},
        SETTINGS | {"method": "last_layers", "last_k": 1},
        SETTINGS | {"batch_size": 3},
    ]
    child = [str(CHILDREN / "heal_sharded.py"), tiny, str(tmp_path), json.dumps(asked)]
    command = [sys.executable, *LAUNCH, *child]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    refused = (tmp_path / "3.txt").read_text()
    assert refused == "batch_size must be a multiple of the 2 processes, got 3"
    for number, settings in enumerate(asked[:3]):
        alone = healing.heal(*loaded, WINDOWS, eval_ids=WATCHED, **settings)
        assert alone.history["loss"].nunique() > 6, "the losses move"
        # Means over the processes are rounded otherwise.
        history = pd.read_csv(tmp_path / f"{number}.csv")
        pd.testing.assert_frame_equal(history, alone.history, atol=1e-4, rtol=0)
        weights = torch.load(tmp_path / f"{number}.pt")
        expected = alone.model.state_dict()
        assert weights.keys() == expected.keys()
        for name, weight in expected.items():
            torch.testing.assert_close(weights[name], weight, atol=1e-4, rtol=0)


def test_parts_of_a_batch_add_up(loaded, team, monkeypatch):
    """Where a batch passes a window at a time, gradients are exchanged once, for all of it."""
    alone = healing.heal(*loaded, WINDOWS, eval_ids=WATCHED, **SETTINGS)
    monkeypatch.setattr(trainer, "MICRO_BATCH_TOKENS", WINDOWS.shape[1])
    in_parts = sharded.heal(*loaded, WINDOWS, eval_ids=WATCHED, **SETTINGS)
    pd.testing.assert_frame_equal(in_parts.history, alone.history, atol=1e-4, rtol=0)


def test_a_training_goes_on_where_it_was_saved(loaded, team, tmp_path):
    """With dropout, which draws the same after a stop as it would have without."""
    folder = tmp_path / "run"
    mine = folder / "checkpoint-5-keep"
    settings = SETTINGS | {"dropout": 0.1, "output_dir": folder}

    def trained() -> tuple[pd.DataFrame, dict]:
        healed = sharded.heal(*loaded, WINDOWS, eval_ids=WATCHED, **settings)
        return healed.history, healed.model.state_dict()

    whole, weights = trained()
    saved = sorted(path.name for path in folder.glob("checkpoint-?"))
    assert saved == ["checkpoint-5", "checkpoint-6"], "the last two of four"
    mine.mkdir()
    shutil.rmtree(folder / "checkpoint-6")
    steps = []
    own = sharded.Training.one_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sharded.Training,
            "one_step",
            lambda self, step: steps.append(step) or own(self, step),
        )
        resumed, resumed_weights = trained()
        assert steps == [6] and resumed.equals(whole)
        assert mine.is_dir(), "what the user has put there stays"
        # One that was cut short is none, and the one before it is gone on from.
        (folder / "checkpoint-6" / "history.json").unlink()
        again, _ = trained()
        assert steps == [6, 6] and again.equals(whole)
    assert all(torch.equal(weights[name], resumed_weights[name]) for name in weights)
    # A folder of the plain function's is another training's.
    with pytest.raises(ValueError, match="engine 'fsdp2' there, None asked"):
        healing.heal(*loaded, WINDOWS, eval_ids=WATCHED, **settings)


def test_adapters_of_shared_weights_are_not_merged(loaded, team):
    model, tokenizer = loaded
    first, second = models.decoder_layers(model)[:2]
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    with pytest.raises(ValueError, match="merge must be False .* whose layers share weights"):
        sharded.heal(model, tokenizer, WINDOWS, merge=True, **SETTINGS)


@pytest.mark.parametrize(("method", "waits"), [("lora", True), ("full", False)])
def test_gradients_of_all_weights_do_not_wait_whole_on_each_device(
    method, waits, loaded, team, monkeypatch
):
    monkeypatch.setattr(trainer, "MICRO_BATCH_TOKENS", WINDOWS.shape[1])
    asked = []
    own = sharded.Training.one_step

    def watched(self, step: int) -> float:
        synchronise = self.model.set_requires_gradient_sync
        self.model.set_requires_gradient_sync = lambda is_on: (
            asked.append(is_on) or synchronise(is_on)
        )
        try:
            return own(self, step)
        finally:
            del self.model.set_requires_gradient_sync

    monkeypatch.setattr(sharded.Training, "one_step", watched)
    sharded.heal(*loaded, WINDOWS, **SETTINGS | {"method": method, "steps": 1, "warmup_steps": 0})
    assert asked == [not waits] * (len(asked) - 1) + [True] and len(asked) == 4


def test_a_model_on_a_device_is_refused(loaded, team, monkeypatch):
    model, tokenizer = loaded
    monkeypatch.setattr(type(model), "device", torch.device("cuda:1"))
    with pytest.raises(ValueError, match="must be on the CPU, .* got cuda:1: load it with device"):
        sharded.heal(model, tokenizer, WINDOWS, **SETTINGS)


def test_one_process_is_told_to_use_the_plain_function(loaded):
    with pytest.raises(ValueError, match=r"accelerate launch starts; in one process healing\.heal"):
        sharded.heal(*loaded, WINDOWS, **SETTINGS)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"method": "qlora"}, "method must be one of lora, dora, last_layers, full, got 'qlora'"),
        ({"method": "lora2"}, "method must be one of"),
        ({"steps": 0}, "steps must be a whole number"),
        ({"merge": "no"}, "merge must be True or False, got 'no'"),
        ({"learning_rate": 1e30}, "the (loss|gradients' norm) is (nan|inf) at step [23] of 6"),
    ],
)
def test_what_cannot_be_trained_is_refused(loaded, team, changed, message):
    with pytest.raises(ValueError, match=message):
        sharded.heal(*loaded, WINDOWS, **(SETTINGS | changed))


def test_a_loss_of_watched_text_that_is_not_finite_is_refused(loaded, team, monkeypatch):
    own = sharded.Training.summed_loss

    def broken(self, ids):
        return own(self, ids) * (1 if torch.is_grad_enabled() else float("nan"))

    monkeypatch.setattr(sharded.Training, "summed_loss", broken)
    with pytest.raises(ValueError, match="the loss of eval_ids is nan; learning_rate too high"):
        sharded.heal(*loaded, WINDOWS, **SETTINGS | {"eval_ids": WINDOWS[:2]})


def test_a_bfloat16_model_is_trained_in_its_precision(tiny, team):
    model, tokenizer = models.load_model(tiny, dtype="bfloat16", device="cpu")
    alone = healing.heal(model, tokenizer, WINDOWS, **SETTINGS)
    healed = sharded.heal(model, tokenizer, WINDOWS, **SETTINGS)
    # A part of the head at a time, or all of it at once: the products are rounded to 8 bits.
    pd.testing.assert_frame_equal(healed.history, alone.history, atol=0.05, rtol=0)
    assert {weight.dtype for weight in healed.model.parameters()} == {
        weight.dtype for weight in alone.model.parameters()
    }


def test_the_command_saves_a_model_that_loads(tiny, team, tmp_path, capsys, monkeypatch):
    out = tmp_path / "healed"
    words = [tiny, "--out", str(out), *"--steps 2 --batch-size 2 --seq-len 16 --rank 2".split()]
    assert sharded.main([*words, "--dtype", "float64"]) == 1
    assert "sharded: dtype must be" in capsys.readouterr().err and not out.exists()
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert sharded.main([*words, "--dtype", "float32"]) == 1
    assert "--out must be a new or empty folder" in capsys.readouterr().err
    assert not out.with_name("healed.training").exists(), "seen before the training"
    (out / "notes.txt").unlink()
    with monkeypatch.context() as patch:
        # "auto" is what the devices that train multiply natively, not what the processor does.
        gpu = torch.device("cuda", 0)
        asked = []
        patch.setattr(sharded, "_team", lambda: SimpleNamespace(device=gpu))
        patch.setattr(runtime, "resolve_dtype", lambda *given: asked.append(given) or torch.float16)
        patch.setattr(models, "load_model", lambda *_, **given: pytest.fail(str(given["dtype"])))
        with pytest.raises(pytest.fail.Exception, match="torch.float16"):
            sharded.main(words)
        assert asked == [("auto", gpu)]
    with monkeypatch.context() as patch:
        patch.setattr(data, "healing_windows", lambda *_, **__: pytest.fail("the text was read"))
        for wrong, message in (("--rank 0", "rank must be"), ("--steps 0", "steps must be")):
            assert sharded.main([*words, *wrong.split(), "--dtype", "float32"]) == 1
            assert f"sharded: {message}" in capsys.readouterr().err
    assert sharded.main([*words, "--dtype", "float32"]) == 0
    assert not out.with_name("healed.training").exists(), "optimiser states are not left behind"
    assert f"saved in {out}; its last loss is" in capsys.readouterr().out
    before, after = (models.load_model(path)[0].state_dict() for path in (tiny, out))
    assert sharded.main([*words, "--dtype", "float32"]) == 1
    assert "--out must be a new or empty folder" in capsys.readouterr().err, "not replaced"
    changed = [name for name in after if not torch.equal(after[name], before[name])]
    assert changed and all("proj" in name for name in changed)
