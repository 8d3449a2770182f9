"""Scores by criterion, the sets they lead to, and models without such sets against the steps one by
one."""

import multiprocessing
import signal
import time

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from tiny_model import HEALING, N_LAYERS
from tiny_model import make_study as study

from pruning_utils import (
    data,
    embedded,
    evaluation,
    healing,
    importance,
    models,
    runtime,
    selection,
    surgery,
)
from pruning_utils.studies import scores, sets
from pruning_utils.studies.study import FreshProcesses, can_recompute


def test_a_second_model_that_is_not_installed_is_not_computed_anew(monkeypatch, caplog):
    for is_installed in (True, False):
        monkeypatch.setattr(embedded, "is_installed", lambda _, found=is_installed: found)
        assert can_recompute("gemma-3-270m", True) == is_installed
        assert not can_recompute("gemma-3-270m", False)
    assert "gemma-3-270m is not installed: its tables are read" in caplog.text


def point(layers: str, recipe: str = "", **more) -> dict:
    return {"layers": layers, "recipe": recipe, "seed": 0, **more}


def test_scores_are_those_of_each_criterion(tiny):
    found = pd.DataFrame(
        scores.score_layers(
            {"source": "xsum", "n_samples": 3, "seed": 1},
            model=tiny,
            revision=None,
            dtype="float32",
            seq_len=16,
        )
    )
    model, tokenizer = models.load_model(tiny, dtype="float32")
    windows = data.calibration_windows(tokenizer, 3, 16, seed=1)
    expected = {
        "magnitude": importance.magnitude(model),
        "magnitude L2": importance.magnitude(model, norm=2),
        "taylor": importance.taylor(model, windows),
        "perplexity": importance.perplexity_without_layer(model, windows),
    }
    assert list(found["criterion"].unique()) == list(expected) == list(scores.CRITERIA)
    for criterion, group in found.groupby("criterion"):
        assert group["layer"].tolist() == list(range(N_LAYERS))
        assert group["score"].to_numpy() == pytest.approx(expected[criterion])


def test_sets_with_and_without_protection():
    table = pd.DataFrame(
        {"criterion": "taylor", "layer": np.arange(10), "score": [0, 9, 8, 1, 7, 3, 2, 6, 0, 5]}
    )
    found = sets.removed_sets(table.sample(frac=1, random_state=0), [2, 4])
    found = found.set_index(["rule", "n_dropped"])["layers"].to_dict()
    assert found == {
        ("taylor", 2): "0 8",
        ("taylor", 4): "0 3 6 8",
        ("taylor+", 2): "5 6",
        ("taylor+", 4): "4 5 6 7",
    }
    assert selection.least_important(table["score"], 4, keep_first=4, keep_last=2) == (4, 5, 6, 7)


def step_by_step(tiny, layers: str, *stages: dict, dtype: str = runtime.AUTO):
    """The model of a point and its validation losses, by the functions of each step."""
    model, tokenizer = models.load_model(tiny, dtype=dtype)
    if layers:
        surgery.drop_layers(model, [int(layer) for layer in layers.split()])
    windows, losses = data.healing_windows(tokenizer, 8, 16), []
    for stage in stages:
        settings = HEALING | stage
        count = settings["steps"] * settings["batch_size"]
        found = healing.heal(
            model,
            tokenizer,
            windows[:count],
            merge=True,
            eval_ids=data.evaluation_windows(tokenizer, 16, 16, split="validation"),
            **settings,
        )
        model, windows = found.model, windows[count:]
        losses += found.history.query("split == 'eval'")["loss"].tolist()
    return model, tokenizer, losses


@pytest.mark.parametrize(
    "layers, recipe, stages",
    [
        ("", "", []),
        ("1 3", "", []),
        ("1 3", "lora 0.01 4", [{}]),
        ("1 3", "full 0.001 2", [{"method": "full", "learning_rate": 1e-3, "steps": 2}]),
        (
            "0",
            "last_layers 0.001 1 + lora 0.02 3",
            [
                {"method": "last_layers", "learning_rate": 1e-3, "steps": 1},
                {"learning_rate": 0.02, "steps": 3},
            ],
        ),
    ],
)
def test_a_point_equals_the_steps_one_by_one(layers, recipe, stages, tiny, tmp_path):
    model, tokenizer, validation = step_by_step(tiny, layers, *stages)
    losses = (
        evaluation.token_losses(model, data.document_windows(tokenizer, 3, 16)).mean(1).tolist()
    )
    questions = evaluation.evaluate_tasks(model, tokenizer, ["piqa"], limit=3).questions
    asked = point(layers, recipe)
    first, again = (
        pd.DataFrame(
            study(tiny, tmp_path, [asked], tasks={"piqa": 0}, texts={"xsum": 3, "quac:8": 2})(asked)
        )
        for _ in range(2)
    )
    short = (
        evaluation.token_losses(model, data.document_windows(tokenizer, 2, 8, source="quac"))
        .mean(1)
        .tolist()
    )
    assert first[first["dataset"] == "quac:8"]["nll"].tolist() == short
    assert first[first["dataset"] == "xsum"]["nll"].tolist() == losses
    assert first[first["dataset"] == "piqa"]["p_right"].tolist() == questions["p_right"].tolist()
    assert first[first["dataset"] == "healing eval"]["nll"].tolist() == validation
    pd.testing.assert_frame_equal(first, again)
    tokens = first[first["dataset"] == "healing eval"]["item"]
    assert not stages or (
        tokens.is_monotonic_increasing
        and tokens.max() == 2 * 16 * sum(stage.get("steps", 4) for stage in stages)
    )


def test_equal_models_are_trained_once_and_only_what_is_needed_is_kept(tiny, tmp_path, monkeypatch):
    asked = point("1 3", "full 0.001 2 + lora 0.01 1")
    rows = pd.DataFrame(study(tiny, tmp_path, [asked])(asked))
    assert sorted(path.name for path in tmp_path.glob("*/*")) == ["kept", "training"]
    (kept,) = tmp_path.glob("*/kept")
    assert sum(path.stat().st_size for path in kept.iterdir()) < 1.1 * sum(
        weight.nbytes for weight in models.load_model(tiny)[0].parameters()
    ), "the weights alone"
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_, **__: pytest.fail("trained again"))
    again = study(tiny, tmp_path, [asked])({**asked})
    pd.testing.assert_frame_equal(rows, pd.DataFrame(again))


@pytest.mark.parametrize("untie", ["true", "false"])
def test_of_last_layers_only_what_was_trained_is_kept(untie, tiny, tmp_path, monkeypatch):
    asked = point("1 3", f"last_layers 0.01 2 last_k=1 untie={untie}")
    rows = pd.DataFrame(study(tiny, tmp_path, [asked])(asked))
    (kept,) = tmp_path.glob("*/kept/model.safetensors")
    names = set(safetensors.torch.load_file(kept))
    last = f"model.layers.{N_LAYERS - 3}."
    head = "lm_head.weight" if untie == "true" else "model.embed_tokens.weight"
    assert head in names and {name for name in names if not name.startswith(last)} == {head}
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_, **__: pytest.fail("trained again"))
    pd.testing.assert_frame_equal(rows, pd.DataFrame(study(tiny, tmp_path, [asked])({**asked})))


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_weights_are_quantised_after_training(precision, tiny, tmp_path):
    asked = point("1 3", "lora 0.01 4", precision=precision)
    rows = pd.DataFrame(study(tiny, tmp_path / "study", [asked])(asked))
    model, tokenizer, _ = step_by_step(tiny, "1 3", {})
    plain = evaluation.token_losses(model, data.document_windows(tokenizer, 3, 16)).mean(1).tolist()
    surgery.save(model, tokenizer, tmp_path / "model")
    model, _ = models.load_model(str(tmp_path / "model"), quantize=precision, dtype=model.dtype)
    losses = (
        evaluation.token_losses(model, data.document_windows(tokenizer, 3, 16)).mean(1).tolist()
    )
    assert rows[rows["dataset"] == "xsum"]["nll"].tolist() == losses != plain


def test_weights_are_stored_in_bfloat16_and_computed_with_in_the_precision_of_the_study(
    tiny, tmp_path
):
    asked = point("1 3", "lora 0.01 4", precision="bfloat16")
    rows = pd.DataFrame(study(tiny, tmp_path / "study", [asked], dtype="float32")(asked))
    model, tokenizer, _ = step_by_step(tiny, "1 3", {}, dtype="float32")
    assert model.dtype == torch.float32
    for weight in model.parameters():
        weight.data = weight.data.bfloat16().float()
    losses = (
        evaluation.token_losses(model, data.document_windows(tokenizer, 3, 16)).mean(1).tolist()
    )
    assert rows[rows["dataset"] == "xsum"]["nll"].tolist() == losses


@pytest.mark.parametrize(
    "layers", ["3 1", "1 1", f"{N_LAYERS}", " ".join(map(str, range(N_LAYERS)))]
)
def test_bad_sets_are_refused_before_any_work(layers, tiny, tmp_path):
    asked = study(tiny, tmp_path, [point("1"), point(layers)])
    with pytest.raises(
        ValueError,
        match=f"layers must be ascending numbers from 0 to {N_LAYERS - 1}.*got '{layers}'",
    ):
        asked(point("1"))


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"recipe": "lora 0.01"},
            "a stage must be such as 'lora 0.003 72 rank=4', got 'lora 0.01'",
        ),
        ({"recipe": "lora x 3"}, "a stage must be such as .* got 'lora x 3'"),
        ({"presicion": "nf4"}, "a point has no presicion; it has layers, width"),
        ({"layers": "1 x"}, "layers must be numbers such as '4 7 11', got '1 x'"),
        ({"layers": "-1"}, "layers must be numbers such as '4 7 11', got '-1'"),
        ({"recipe": "lora 0.01 3 + lora 0.01 2"}, "has 5 steps, but there is text for 4"),
        ({"recipe": "sgd 0.01 3"}, "method must be one of lora.*got 'sgd'"),
        ({"recipe": "lora -1 3"}, "learning_rate must be above 0, got -1"),
        ({"precision": "int4"}, "precision must be one of bfloat16, int8, nf4, got 'int4'"),
        ({"layers": "", "width": "9999 1"}, "intermediate_size must be a whole number from 1 to"),
        ({"layers": "", "width": "8 9"}, "n_kv_heads must be a whole number from 1 to"),
    ],
)
def test_bad_points_are_refused_before_any_work(change, message, tiny, tmp_path):
    asked = study(tiny, tmp_path, [point("1"), {**point("1"), **change}])
    with pytest.raises(ValueError, match=message):
        asked(point("1"))


def test_a_training_that_names_no_method_is_refused_before_it_takes_place(tiny, tmp_path):
    healed = {"layers": "1", "healed": True, "seed": 0}
    settings = {name: value for name, value in HEALING.items() if name != "method"}
    with pytest.raises(ValueError, match="a training must name its method, got {"):
        study(tiny, tmp_path, [healed], healing_settings=settings)(healed)


def test_a_process_of_its_own_ends_with_the_one_that_waits_for_it():
    with FreshProcesses() as alone:
        asked = [alone.submit(signal.getsignal, signal.SIGINT) for _ in range(2)]
        assert [one.result() for one in asked] == [signal.SIG_IGN] * 2
    with pytest.raises(KeyboardInterrupt):
        with FreshProcesses() as alone:
            running = alone.submit(time.sleep, 600)
            (child,) = multiprocessing.active_children()
            other = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
            other.start()
            raise KeyboardInterrupt
    assert not child.is_alive() and running.done()
    assert other.is_alive(), "the processes of others go on"
    other.kill()


def test_a_point_that_there_is_no_text_for_is_refused_though_it_was_not_listed(tiny, tmp_path):
    asked = study(tiny, tmp_path, [point("1", "lora 0.01 4")])
    with pytest.raises(ValueError, match="has 12 steps, but there is text for 4"):
        asked(point("1", "last_layers 0.01 12 last_k=1"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["weights", "history"])
def test_kept_weights_that_are_damaged_are_trained_again(damage, tiny, tmp_path, caplog):
    asked = point("1", "last_layers 0.01 4 last_k=1")
    first = pd.DataFrame(study(tiny, tmp_path, [asked])(asked))
    (weights,) = tmp_path.glob("*/kept/model.safetensors")
    if damage == "weights":
        content = bytearray(weights.read_bytes())
        content[-400:] = bytes(400)
        weights.write_bytes(content)
    else:
        weights.with_name("history.csv").unlink()
    again = pd.DataFrame(study(tiny, tmp_path, [asked])(asked))
    pd.testing.assert_frame_equal(first, again)
    assert f"the trained weights in {weights.parent} are damaged" in caplog.text
