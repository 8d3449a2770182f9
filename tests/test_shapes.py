"""Models of equal size and two shapes, and what they cost, against the steps one by one."""

import pandas as pd
import pytest
import torch
from tiny_model import HEALING, N_LAYERS, make_study

from pruning_utils import (
    data,
    efficiency,
    evaluation,
    healing,
    importance,
    models,
    surgery,
)
from pruning_utils.studies import costs, shapes
from pruning_utils.studies.study import PRECISIONS, FreshProcesses, narrowed

RUN = {"revision": None}


def point(layers: str = "", width: str = "", recipe: str = "") -> dict:
    return {"layers": layers, "width": width, "recipe": recipe, "seed": 0}


@pytest.mark.parametrize("recipe", ["", "lora 0.01 4"])
def test_a_narrowed_model_equals_the_steps_one_by_one(recipe, tiny, tmp_path):
    asked = point(width="15 1", recipe=recipe)
    several = make_study(tiny, tmp_path, [point("1 3"), asked])
    several(point("1 3"))  # what unhealed models share must not reach the narrowed one
    rows = pd.DataFrame(several(asked))
    model, tokenizer = models.load_model(tiny)
    narrowed(model, (15, 1), data.calibration_windows(tokenizer, 10, 128))
    assert model.config.intermediate_size == 15
    if recipe:
        model = healing.heal(
            model, tokenizer, data.healing_windows(tokenizer, 8, 16), merge=True, **HEALING
        ).model
    losses = (
        evaluation.token_losses(model, data.document_windows(tokenizer, 3, 16)).mean(1).tolist()
    )
    assert rows[rows["dataset"] == "xsum"]["nll"].tolist() == losses


def test_a_width_is_scored_once_for_points_in_a_row(tiny, tmp_path, monkeypatch):
    calls, own = [], importance.taylor
    few = {"n_samples": 2, "seq_len": 16}  # of eight scorings
    monkeypatch.setattr("pruning_utils.studies.study.CALIBRATION", few)
    monkeypatch.setattr(
        importance, "taylor", lambda *given, **named: calls.append(1) or own(*given, **named)
    )
    points = [
        point(width="15 1"),
        point(width="15 1", recipe="lora 0.01 4"),
        point(width="15 1", recipe="full 0.01 4"),
        point("1 3"),
        point(width="15 1"),
        point(width="9 1"),
    ]
    several = make_study(tiny, tmp_path, points)
    found = [several(asked) for asked in points]
    assert len(calls) == 3, "the first width twice, as another cut came between"
    assert found[0] == found[4], "training left the narrowed model as it was"
    for asked, rows in zip(points, found, strict=True):
        alone = make_study(tiny, tmp_path / "alone", [asked])
        pd.testing.assert_frame_equal(pd.DataFrame(rows), pd.DataFrame(alone(asked)))


def test_a_shortened_model_is_that_of_the_other_study_and_trained_once(tiny, tmp_path, monkeypatch):
    asked = point("1 3", recipe="lora 0.01 4")
    unnarrowed = {name: value for name, value in asked.items() if name != "width"}
    there = make_study(tiny, tmp_path, [unnarrowed])(unnarrowed)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_, **__: pytest.fail("trained again"))
    here = make_study(tiny, tmp_path, [asked])(asked)
    pd.testing.assert_frame_equal(pd.DataFrame(there), pd.DataFrame(here))


@pytest.mark.parametrize(
    "layers, width", [("1", "15 1"), ("", "15"), ("", "15 x"), ("", "-15 1"), ("", "15 1 1")]
)
def test_bad_shapes_are_refused_before_any_work(layers, width, tiny, tmp_path):
    asked = make_study(tiny, tmp_path, [point("1"), point(layers, width)])
    with pytest.raises(
        ValueError, match=f"width must be channels and key-value heads .* got '{width}' with layers"
    ):
        asked(point("1"))


@pytest.mark.parametrize("heads", [0, 1])
def test_shapes_are_of_equal_size(heads, tiny):
    found = shapes.equal_shape(
        {"layers": "1 3", "n_kv_heads": heads},
        model=tiny,
        revision=None,
        dtype="float32",
        n_tokens=9,
    )
    model, _ = models.load_model(tiny)
    layer = sum(weight.numel() for weight in models.decoder_layers(model)[0].parameters())
    channel = N_LAYERS * 3 * model.config.hidden_size  # the step in which a width can be chosen
    shorter = surgery.drop_layers(model, [1, 3])
    total = efficiency.stored_parameters(shorter)["total"]
    assert abs(found["parameters"] - total) <= (channel / 2 if heads else 0) < 2 * layer
    assert found["weights"] >= 4 * found["parameters"]
    if not heads:
        assert (
            found["flops"]
            == efficiency.forward_flops(shorter, batch_size=1, n_tokens=9)
            > found["flops_token"]
        )


def test_speed_is_measured_of_the_shape_asked(tiny):
    rows = costs.measure_speed(
        {"layers": "1 3", "width": "", "batch_size": 2, "prompt_tokens": 5},
        model=tiny,
        revision=None,
        dtype="float32",
        new_tokens=3,
        warmups=0,
        repeats=2,
    )
    assert [row["run"] for row in rows] == [0, 1] and all(
        row["tokens_per_second"] > 0 for row in rows
    )


@pytest.mark.parametrize("method", ["lora", "full"])
def test_training_is_measured(method, tiny):
    found = costs.measure_training(
        {"layers": "1 3", "method": method},
        model=tiny,
        revision=None,
        dtype="float32",
        seq_len=16,
        steps=2,
        healing_settings=HEALING,
    )
    model = surgery.drop_layers(models.load_model(tiny)[0], [1, 3])
    total = sum(weight.numel() for weight in model.parameters())
    assert (found["trainable"] == total) == (method == "full") and found["trainable"] <= total
    assert found["tokens_per_second"] == pytest.approx(2 * 16 / found["step_seconds"])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_storage_counts_what_is_written(precision, tiny, tmp_path):
    found = costs.measure_storage(
        {"layers": "1 3", "precision": precision}, model=tiny, revision=None
    )
    model, tokenizer = models.load_model(tiny)
    surgery.save(surgery.drop_layers(model, [1, 3]).bfloat16(), tokenizer, tmp_path / "plain")
    if precision != "bfloat16":
        model, _ = models.load_model(str(tmp_path / "plain"), quantize=precision, dtype="bfloat16")
    model.save_pretrained(tmp_path / "again")
    assert found["disk"] == sum(
        path.stat().st_size for path in (tmp_path / "again").glob("*.safetensors")
    )
    total = sum(
        weight.numel()
        for weight in surgery.drop_layers(models.load_model(tiny)[0], [1, 3]).parameters()
    )
    assert found["memory"] == efficiency.weight_bytes(model)
    assert (found["memory"] >= 2 * total) == (precision == "bfloat16")


def test_each_point_has_a_process_of_its_own():
    import os

    with FreshProcesses() as executor:
        numbers = {os.getpid(), *(executor.submit(os.getpid).result() for _ in range(2))}
    assert len(numbers) == 3
