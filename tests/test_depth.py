"""The study of depth against the same steps one by one, bad points, and kills at any moment."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_model import DENSE, HEALING, INFORMED, N_LAYERS, SETTINGS, SIMPLE, make_study

from pruning_utils import (
    data,
    embedded,
    evaluation,
    evidence,
    healing,
    models,
    results,
    selection,
    similarity,
    surgery,
)
from pruning_utils.studies import depth
from pruning_utils.studies import study as study_module
from pruning_utils.studies.study import joined, loaded, models_at_hand

CHILDREN = Path(__file__).resolve().parent / "children"


def study(tiny, folder, points, **settings):
    return make_study(tiny, folder, points, **{"tasks": SETTINGS["tasks"], **settings})


def test_tasks_count_alike_however_many_questions_each_has():
    tasks = pd.Index(["mmlu"] * 6 + ["piqa"] * 2)
    right = np.array([1, 1, 1, 0, 0, 0, 1, 1])
    weighted = right * depth.task_weights(tasks)
    assert weighted.mean() == pytest.approx((0.5 + 1.0) / 2) and right.mean() == 0.625
    assert (depth.task_weights(pd.Index(["a", "b"] * 5)) == 1).all()


def test_points_cover_both_rules_once():
    points = depth.depth_points(range(3), [0, 2], 7)
    assert [(point["rule"], point["n_dropped"]) for point in points if not point["healed"]] == [
        ("none", 0),
        ("similarity", 1),
        ("deepest", 1),
        ("similarity", 2),
        ("deepest", 2),
    ]
    assert [(point["rule"], point["n_dropped"]) for point in points if point["healed"]] == [
        ("none", 0),
        ("similarity", 2),
        ("deepest", 2),
    ]
    assert {point["seed"] for point in points} == {7}
    one_rule = depth.depth_points([0, 3], [3], 7, rules=["deepest"], healing_seeds=[1, 2])
    assert [tuple(point.values()) for point in one_rule] == [
        ("none", 0, False, 7),
        ("deepest", 3, False, 7),
        ("deepest", 3, True, 1),
        ("deepest", 3, True, 2),
    ]


def test_every_point_equals_the_steps_one_by_one(tiny, tmp_path):
    """Shared weights and layers change nothing: each model is loaded anew here, and measured
    alone."""
    points = [DENSE, INFORMED, SIMPLE, {**SIMPLE, "healed": True}]
    asked = study(tiny, tmp_path, points)
    found = [pd.DataFrame(asked(point)) for point in points]
    for point, rows in zip(points, found, strict=True):
        model, tokenizer = models.load_model(tiny)
        distances = similarity.measure_similarity(
            model, data.calibration_windows(tokenizer, 3, 16)
        ).angular_distance
        block = {
            "none": (),
            "similarity": selection.best_block(distances, 2).layers,
            "deepest": (2, 3),
        }[point["rule"]]
        if block:
            surgery.drop_layers(model, block)
        assert (rows["start"] == (block[0] if block else N_LAYERS)).all()
        if point["healed"]:
            healed = healing.heal(
                model,
                tokenizer,
                data.healing_windows(tokenizer, 8, 16),
                merge=True,
                eval_ids=data.evaluation_windows(tokenizer, 16, 16, split="validation"),
                **HEALING,
            )
            model = healed.model
            losses = rows[rows["dataset"] == "healing eval"]
            expected = healed.history[healed.history["split"] == "eval"]
            assert losses["nll"].tolist() == expected["loss"].tolist()
            assert losses["item"].tolist() == expected["tokens"].tolist()
        else:
            assert not rows["dataset"].str.startswith("healing").any()
        losses = evaluation.token_losses(model, data.document_windows(tokenizer, 3, 16)).mean(1)
        assert rows[rows["dataset"] == "xsum"]["nll"].tolist() == losses.tolist()
        for task, shots in SETTINGS["tasks"].items():
            expected = evaluation.evaluate_tasks(
                model, tokenizer, [task], limit=3, num_fewshot=shots
            ).questions
            own = rows[rows["dataset"] == task].rename(
                columns={"dataset": "task", "item": "question_id"}
            )
            pd.testing.assert_frame_equal(
                own[list(expected)].reset_index(drop=True), expected, check_dtype=False
            )
    assert len({rows[rows["dataset"] == "xsum"]["nll"].mean() for rows in found}) == 4, (
        "four different models"
    )


def test_reverse_order_takes_the_last_layer_too(tiny, tmp_path):
    asked = {**SIMPLE, "rule": "reverse order", "n_dropped": N_LAYERS - 1}
    rows = pd.DataFrame(study(tiny, tmp_path, [asked], tasks={})(asked))
    model, tokenizer = models.load_model(tiny)
    surgery.drop_layers(model, range(1, N_LAYERS))
    losses = evaluation.token_losses(model, data.document_windows(tokenizer, 3, 16)).mean(1)
    assert rows[rows["dataset"] == "xsum"]["nll"].tolist() == losses.tolist()
    assert (rows["start"] == 1).all()


def test_other_weights_in_the_same_folder_are_loaded_anew(tiny, tmp_path):
    folder = tmp_path / "own"
    shutil.copytree(tiny, folder)
    model, _ = loaded(str(folder), None, "float32")
    before = model.get_input_embeddings().weight.clone()
    again, tokenizer = models.load_model(str(folder), dtype="float32")
    with torch.no_grad():
        again.get_input_embeddings().weight *= 2
    surgery.save(again, tokenizer, folder, overwrite=True)
    weight = loaded(str(folder), None, "float32")[0].get_input_embeddings().weight
    assert torch.equal(weight, 2 * before)


def test_a_model_is_loaded_once_and_adapters_are_trained_once(tiny, tmp_path, monkeypatch):
    loads, trainings, own = [], [], (models.load_model, healing.mean_loss)
    monkeypatch.setattr(
        models, "load_model", lambda *given, **named: loads.append(1) or own[0](*given, **named)
    )
    monkeypatch.setattr(healing, "mean_loss", lambda *given: trainings.append(1) or own[1](*given))
    study_module._loaded.cache_clear()
    points = [DENSE, INFORMED, {**INFORMED, "healed": True}]
    asked = study(tiny, tmp_path, points, tasks={})
    first = [asked(point) for point in points]
    assert len(loads) == 1
    n_trainings = len(trainings)
    again = study(tiny, tmp_path, points[2:], tasks={"piqa": 0})(points[2])
    assert len(trainings) == n_trainings, "the adapters that are there were used"
    losses = [row["nll"] for row in first[2] if row["dataset"] == "xsum"]
    assert losses == [row["nll"] for row in again if row["dataset"] == "xsum"]
    study(tiny, tmp_path, points[2:], tasks={})({**points[2], "rank": 1})
    assert len(trainings) > n_trainings, "another rank is another model"
    assert len(loads) == 1, "studies of one model share it"
    assert len(list(tmp_path.glob("set-*"))) == 2


@pytest.mark.parametrize(
    "point, settings, message",
    [
        (
            {"rule": "shallowest"},
            {},
            "rule must be one of none, similarity, deepest, reverse order, .*shallowest",
        ),
        ({"rule": "none"}, {}, "'none' at n_dropped 0 only"),
        ({"n_dropped": 0}, {}, "'none' at n_dropped 0 only"),
        ({"n_dropped": N_LAYERS}, {}, f"from 0 to {N_LAYERS - 1}.*got {N_LAYERS}"),
        ({"n_dropped": -1}, {}, "got -1"),
        ({"healed": True, "rank": 0}, {}, "rank must be a whole number from 1 .*got 0"),
        ({"healed": True}, {"healing_settings": {**HEALING, "targets": ["k"]}}, "targets must be"),
        (
            {"healed": True},
            {"healing_settings": {**HEALING, "rate": 1}},
            r"no settings \['rate'\]; it has method",
        ),
        (
            {"healed": True},
            {"healing_source": "quac", "healing_settings": {**HEALING, "steps": 10**6}},
            "2000000 is beyond the text quac/healing",
        ),
        ({}, {"tasks": {"piqa": 17}}, r"num_fewshot must be in \[0, 16\], got 17"),
        ({"num_fewshot": -1}, {}, "num_fewshot must be a whole number of at least 0, got -1"),
        ({}, {"limit": 0}, "limit must be a whole number .*, got 0"),
        ({}, {"texts": {"xsum": 10**7}}, "n_samples 10000000 is beyond the text xsum/evaluation"),
        ({}, {"texts": {"xkcd": 2}}, "no text 'xkcd'"),
    ],
)
def test_bad_points_are_refused_before_any_work(
    tiny, tmp_path, monkeypatch, point, settings, message
):
    work = (
        (similarity, "measure_similarity"),
        (evaluation, "token_losses"),
        (healing, "trainable_copy"),
    )
    for module, name in work:
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("work began"))
    points = [DENSE, {**INFORMED, **point}]
    asked = study(tiny, tmp_path, points, **settings)
    with pytest.raises(ValueError, match=message):
        asked(points[0])  # a good point: the bad one is found all the same
    assert not list(tmp_path.iterdir())


def test_tasks_without_labels_are_refused(tiny, tmp_path, monkeypatch):
    class Generation:
        OUTPUT_TYPE = "generate_until"

    monkeypatch.setattr(
        evaluation, "load_tasks", lambda names, **_: {names[0]: {"tasks": {"asdiv": Generation()}}}
    )
    with pytest.raises(
        ValueError,
        match="which one is right, or one answer, but asdiv is of the kind generate_until",
    ):
        study(tiny, tmp_path, [DENSE], tasks={"asdiv": 0})(DENSE)


# --- interrupted sweeps ---------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_killed_at_any_moment_ends_with_the_same_bytes(tiny, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    driver = subprocess.run(
        [sys.executable, CHILDREN / "kill_study.py", str(tmp_path), tiny],
        text=True,
        capture_output=True,
        env=environment,
        timeout=600,
    )
    assert driver.returncode == 0, driver.stderr[-3000:]
    assert re.fullmatch(r"\d+ \d+\n", driver.stdout), driver.stdout + driver.stderr[-3000:]
    kills, n_states = map(int, driver.stdout.split())
    assert kills >= 3 and n_states >= 3, "the kills hit the work at different places"
    assert (tmp_path / "killed/depth.csv").read_bytes() == (
        tmp_path / "whole/depth.csv"
    ).read_bytes()
    assert not list((tmp_path / "killed").glob("*.points"))
    table = pd.read_csv(tmp_path / "whole/depth.csv")
    assert (
        table.groupby(["rule", "n_dropped", "healed"]).ngroups == 3
        and np.isfinite(table["nll"]).all()
    )
    record = json.loads((tmp_path / "whole/run.json").read_text())["depth"]
    assert not re.search(r"seconds|bytes", " ".join(table.columns)) and record["seconds"] > 0


def test_a_sweep_with_another_setting_is_refused(tiny, tmp_path):
    from pruning_utils import results

    path = tmp_path / "depth.csv"
    results.sweep(
        [DENSE], study(tiny, tmp_path / "c", [DENSE], tasks={}), path=path, parameters=SETTINGS
    )
    changed = {**SETTINGS, "seq_len": 8, "limit": 5}
    with pytest.raises(
        ValueError,
        match="limit: 3 there, 5 asked.*seq_len: 16 there, 8 asked|"
        "seq_len: 16 there, 8 asked.*limit: 3 there, 5 asked",
    ):
        results.sweep(
            [DENSE],
            study(tiny, tmp_path / "c", [DENSE], **{**changed, "tasks": {}}),
            path=path,
            parameters=changed,
        )


# --- several models -------------------------------------------------------------------------------


def test_a_share_is_the_nearest_number_of_layers():
    assert [depth.layers_in(share, 30) for share in (0.1, 0.25, 0.5, 0.8, 0.01)] == [
        3,
        8,
        15,
        24,
        1,
    ]
    assert [depth.layers_in(share, 18) for share in (0.1, 0.25, 0.5, 0.8, 0.01)] == [2, 5, 9, 14, 1]
    for share in (0, 1, -0.1, 0.99, float("nan")):
        with pytest.raises(ValueError, match=f"leave one of 30 layers, got {share}"):
            depth.layers_in(share, 30)


def test_only_models_with_committed_results_must_know_something():
    assert depth.must_know("smollm2-135m", "cpu") and depth.must_know("gemma-3-270m", "gpu")
    assert not depth.must_know("smollm2-135m", "smoke") and not depth.must_know("mine", "cpu")


def test_a_curve_ends_at_its_last_number_of_layers():
    assert depth.every(2, 6) == [0, 2, 4, 6] and depth.every(3, 2) == [0, 2]
    assert depth.every(4, 6) == [0, 4, 6]


def test_shares_that_are_one_number_of_a_small_model_count_once():
    assert depth.numbers_in([0.1, 0.25, 0.5, 0.8], 30) == [3, 8, 15, 24]
    assert depth.numbers_in([0.25, 0.1, 0.5, 0.8], 5) == [1, 3, 4]
    assert depth.numbers_in([], 5) == []


def test_sizes_are_those_of_the_models(tiny):
    def in_each_layer(model):
        layers = models.decoder_layers(model)
        return sum(weight.numel() for weight in layers.parameters()) / len(layers)

    network, tokenizer = models.load_model()
    expected = (
        len(models.decoder_layers(network)),
        sum(weight.numel() for weight in network.parameters()),
        len(tokenizer),
        network.config.num_key_value_heads,
        in_each_layer(network),
    )
    for name in ("embedded", "smollm2-135m"):
        assert depth.size_of(name, None, "float32") == expected
    small, _ = models.load_model(tiny)
    n_parameters = sum(weight.numel() for weight in small.parameters())
    found = depth.size_of(str(tiny), None, "float32")
    heads, vocabulary = small.config.num_key_value_heads, small.config.vocab_size
    assert found == (N_LAYERS, n_parameters, vocabulary, heads, in_each_layer(small))


def test_models_at_hand_are_kept_or_can_be_computed(tmp_path, monkeypatch):
    monkeypatch.delenv(results.NO_COMPUTE, raising=False)
    monkeypatch.setattr(embedded, "MODELS", dict.fromkeys(("one", "two", "kept")))
    monkeypatch.setattr(embedded, "is_installed", lambda name: name == "one")
    monkeypatch.setattr(results, "table_path", lambda *names: tmp_path / names[-1])
    (tmp_path / "kept-losses").touch()
    asked = {"profile": "cpu", "notebook": "03", "table": "losses"}
    assert models_at_hand("embedded", **asked) == (["one", "kept"], ["two"])
    assert models_at_hand("two", **asked) == (["two"], []), "whatever is asked for by name"
    monkeypatch.setenv(results.NO_COMPUTE, "1")
    assert models_at_hand("embedded", **asked) == (["kept"], ["one", "two"])


def test_tables_of_models_are_joined_in_order():
    tables = {
        name: (pd.DataFrame({"item": [0, 1], "nll": [value, value]}), Path(name))
        for name, value in (("second", 2.0), ("first", 1.0))
    }
    table, paths = joined(tables)
    assert list(table.columns) == ["model", "item", "nll"]
    assert table["nll"].tolist() == [2, 2, 1, 1] and list(table.index) == [0, 1, 2, 3]
    assert table["model"].tolist() == ["second"] * 2 + ["first"] * 2
    assert paths == [Path("second"), Path("first")]


def rule_scores():
    """A loss of three documents and one seed, unhealed, and two seeds, healed, of two rules."""
    rows = [("none", 0, False, 0, 4, (1.0, 2.0, 3.0))]
    rows += [("similarity", 1, False, 0, 2, (2.0, 3.0, 4.0))]
    rows += [("deepest", 1, False, 0, 2, (2.0, 3.0, 4.0))]
    rows += [("similarity", 2, False, 0, 1, (3.0, 4.0, 5.0))]
    rows += [("deepest", 2, False, 0, 2, (5.0, 6.0, 8.0))]
    rows += [("similarity", 2, True, seed, 1, (2.0, 3.0, 4.0)) for seed in (0, 1)]
    rows += [("deepest", 2, True, seed, 2, (2.0 + seed, 3.0, 4.0)) for seed in (0, 1)]
    names = ["rule", "n_dropped", "healed", "seed", "start", "value"]
    table = pd.DataFrame(rows, columns=names).explode("value", ignore_index=True)
    table["item"] = table.groupby(names[:4]).cumcount()
    return table.assign(measure="loss", dataset="xsum", value=table["value"].astype(float))


def test_two_rules_are_compared_item_by_item_at_every_depth_and_stage():
    levels = depth.rule_levels(rule_scores())
    assert levels["loss", "deepest", 2, False].value == pytest.approx(19 / 3)
    assert levels["loss", "deepest", 2, True].value == pytest.approx(3 + 1 / 6)
    assert levels["loss", "deepest", 2, True].runs == 2
    found = depth.rule_checks(rule_scores()).set_index(["n_dropped", "healed"])
    assert list(found.index) == [(1, False), (2, False), (2, True)]
    assert found["difference"].tolist() == pytest.approx([0, 7 / 3, 1 / 6])
    assert found["first"].tolist() == pytest.approx([3, 19 / 3, 19 / 6])
    assert found["second"].tolist() == [3, 4, 3] and set(found["unpruned"]) == {2}
    # A quarter of what the closest block costs unhealed: 1 and 2 nats.
    assert found["margin"].tolist() == [0.25, 0.5, 0.5]
    assert found["alike"].tolist() == [True, False, False]
    assert found["runs"].tolist() == [1, 1, 2] and found["n"].tolist() == [3, 3, 3]
    assert found["pair"].tolist()[1:] == ["loss: 2 layers, unhealed", "loss: 2 layers, healed"]


def test_healed_models_are_compared_with_the_whole_with_themselves_and_with_each_other():
    scores = rule_scores()
    scores = scores[scores["n_dropped"].isin([0, 2])]
    found = depth.healed_checks(scores, effect=-8.0).set_index("pair")
    assert found["difference"].to_dict() == pytest.approx(
        {
            "closest block, healed - unpruned": 1.0,
            "closest block, healed - unhealed": -1.0,
            "deepest but last, healed - unpruned": 7 / 6,
            "deepest but last, healed - unhealed": -19 / 6,
            "deepest but last - closest block, healed": 1 / 6,
        }
    )
    assert found["first"].tolist() == pytest.approx([3, 3, 19 / 6, 19 / 6, 19 / 6])
    assert found["second"].tolist() == pytest.approx([2, 4, 2, 19 / 3, 3])
    assert set(found["runs"]) == {2} and set(found["n"]) == {3} and set(found["margin"]) == {2.0}
    # A task of two items and one of three, half each.
    copies = [scores[scores["item"] == 2].assign(item=item) for item in (3, 4)]
    uneven = pd.concat([scores, *copies], ignore_index=True)
    uneven["dataset"] = np.where(uneven["item"] < 2, "a", "b")
    halves = depth.healed_checks(uneven, effect=-8.0)
    assert halves["second"].tolist() == pytest.approx([2.25, 4.25, 2.25, 6.75, 3.25])
    assert (halves["first"] - halves["second"]).tolist() == pytest.approx(
        halves["difference"].tolist()
    )
    none = depth.healed_checks(scores.assign(value=0.0), effect=0.0)
    assert set(none["margin"]) == {depth.SMALLEST_EFFECT / 4}


def test_answers_along_the_depth_stand_above_their_floors():
    asked = pd.DataFrame(
        [
            ("m", rule, n_dropped, "piqa", item, item < n_right)
            for rule, n_dropped, n_right in (
                (depth.NO_RULE, 0, 6),
                ("similarity", 2, 5),
                ("deepest", 2, 3),
                ("reverse order", 2, 1),
            )
            for item in range(8)
        ],
        columns=["model", "rule", "n_dropped", "dataset", "item", "right"],
    )
    level = evidence.Interval(0.25, 0.125, 0.375)
    levels = {
        "m": {
            ("pooled accuracy", depth.NO_RULE, 0, False): level,
            ("pooled accuracy", "deepest", 2, True): level,
            ("pooled accuracy", "deepest", 2, False): None,
            ("loss", "deepest", 2, True): None,
        }
    }
    found = depth.answer_curves(asked, pd.DataFrame({"m": {"piqa": 0.5}}), levels)
    of = {name: rows.set_index("n_dropped") for name, rows in found.groupby("series")}
    assert of["closest block"]["value"].to_dict() == {0: 0.25, 2: 0.125}
    assert of["deepest but last"]["value"].to_dict() == {0: 0.25, 2: -0.125}
    assert of["deepest but last, healed"]["low"].to_dict() == {0: 0.125, 2: 0.125}
    assert of["closest block, healed"]["high"].to_dict() == {0: 0.375}
    assert set(found["model"]) == {"m"} and len(of) == 4


def test_deepest_but_last_is_compared_with_another_rule_too():
    scores = rule_scores()
    scores = scores[~scores["healed"]]
    last = scores[scores["rule"] == "deepest"]
    last = last.assign(rule="reverse order", start=last["start"] + 1, value=last["value"] - 1)
    found = depth.rule_checks(pd.concat([scores, last]), against="reverse order")
    assert found["difference"].tolist() == [1, 1] and not found["alike"].any()
    assert found["second"].tolist() == pytest.approx([2, 16 / 3])
    assert found["margin"].tolist() == [0.25, 0.5], "still that of the closest block"


def test_each_dataset_of_a_measure_has_one_weight():
    once = rule_scores().query("rule == 'none'")
    other = pd.concat([once, once.assign(item=once["item"] + 3)]).assign(dataset="b", value=8.0)
    levels = depth.rule_levels(pd.concat([once, other]))
    assert levels["loss", "none", 0, False].value == (2 + 8) / 2


def test_a_model_compared_with_itself_is_not_judged():
    row = {"claim": "A5", "verdict": "holds", "reason": ""}
    assert depth.unless_alike(row, alike=False) == row
    told = depth.unless_alike(row, alike=True)
    assert told["verdict"] == "not testable here" and told["claim"] == "A5"
    assert told["reason"] == "both rules remove the same layers" and row["reason"] == ""


def test_a_share_that_binary_numbers_miss_is_rounded_like_a_fraction():
    assert depth.layers_in(0.29, 50) == selection.count_for_fraction(50, 0.29) == 15
    assert [depth.layers_in(share, n) for share, n in ((0.58, 25), (0.35, 90))] == [15, 32]
    with pytest.raises(ValueError, match="leave one of 1 layers"):
        depth.layers_in(0.3, 1)


def test_a_task_without_a_known_guess_has_no_floor():
    alone = pd.DataFrame({"dataset": ["boolq"], "correct": [1], "correct_norm": [1]})
    assert depth.task_floors(alone, ["boolq"]) == {"boolq": 1.0}
    with pytest.raises(ValueError, match="known guess, .* got 'basic_skills'"):
        depth.task_floors(alone, ["boolq", "basic_skills"])
