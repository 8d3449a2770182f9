"""Odd kinds of input: each ends right, or with one clear error before any long work."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from test_healing import Tokenizer, llama, windows

from pruning_utils import (
    efficiency,
    evaluation,
    evidence,
    healing,
    importance,
    models,
    release,
    results,
    runtime,
    selection,
    similarity,
    surgery,
)
from pruning_utils.engine import benchmarks, checks, passes, trainer

NAN = float("nan")


def heal(model=None, ids=None, **settings):
    given = {"method": "lora", "steps": 2, "batch_size": 2, "warmup_steps": 0, "rank": 2}
    return healing.heal(
        llama() if model is None else model,
        Tokenizer(),
        windows() if ids is None else ids,
        **given | settings,
    )


# --- paths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [None, 3, 1.5, True, b"x", [], "a\0b", "\ud800"])
def test_what_is_no_path_is_refused_by_its_name(path):
    with pytest.raises(ValueError, match="output_dir must be a path, as a text or a Path, got"):
        checks.file_path("output_dir", path)
    if path is not None:
        with pytest.raises(ValueError, match="output_dir must be a path"):
            heal(output_dir=path)
    with pytest.raises(ValueError, match="path must be a path"):
        results.load_or_compute(path, pytest.fail, parameters={})


def test_texts_and_paths_are_paths(tmp_path):
    assert checks.file_path("p", str(tmp_path)) == checks.file_path("p", tmp_path) == tmp_path


@pytest.mark.parametrize("path", [None, 3, b"x"])
def test_what_writes_files_names_a_wrong_path(path):
    with pytest.raises(ValueError, match="path must be a path, as a text or a Path, got"):
        surgery.save(llama(), None, path)
    with pytest.raises(ValueError, match="folder must be a path, as a text or a Path, got"):
        release.export_gguf(path)
    with pytest.raises(ValueError, match="path must be a path"), runtime.atomic_path(path):
        pytest.fail("nothing can be written")


def test_a_file_that_cannot_be_begun_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "t.csv", tmp_path / ("x" * 300)):
        with pytest.raises(OSError, match=f"could not write {path}: "), runtime.atomic_path(path):
            pytest.fail("nothing can be written")


# --- texts where True or False is meant, and seeds ------------------------------------------------


@pytest.mark.parametrize("value", ["no", "False", 0, 1, None, []])
def test_what_is_neither_true_nor_false_is_refused(value, tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="overwrite must be True or False, got"):
        surgery.save(llama(), None, kept, overwrite=value)
    assert (kept / "notes.txt").read_text() == "mine"
    table = tmp_path / "t.csv"
    with pytest.raises(ValueError, match="recompute must be True or False, got"):
        results.load_or_compute(table, pytest.fail, parameters={}, recompute=value)
    with pytest.raises(ValueError, match="recompute must be True or False, got"):
        results.sweep([{"a": 1}], pytest.fail, path=table, parameters={}, recompute=value)
    assert list(tmp_path.iterdir()) == [kept]
    monkeypatch.setattr(evaluation, "load_tasks", lambda *_, **__: {})
    with pytest.raises(ValueError, match="answers_only must be True or False, got"):
        evaluation.evaluate_tasks(llama(), Tokenizer(), ["piqa"], answers_only=value)


@pytest.mark.parametrize("seed", [None, True, 1.0, "1", -1])
def test_seeds_of_prompts_and_resamples_are_whole_numbers(seed):
    with pytest.raises(ValueError, match="seed must be a whole number of at least 0, got"):
        efficiency.generation_speed(llama(), batch_size=1, prompt_tokens=2, new_tokens=2, seed=seed)
    with pytest.raises(ValueError, match="seed must be a whole number of at least 0, got"):
        evidence.statistic_interval([1.0, 2.0], pytest.fail, seed=seed)


# --- what is no model, or half of one -------------------------------------------------------------


@pytest.mark.parametrize("model", [None, "llama", torch.nn.Linear(2, 2)])
def test_what_is_no_model_is_refused_by_what_reads_one(model, tmp_path):
    for reads in (models.text_config, models.final_norm, models.untie_head):
        with pytest.raises(ValueError, match="model must be a causal language model of transf"):
            reads(model)
    with pytest.raises(ValueError, match="model must be a causal language model of transformers"):
        release.save_release(model, Tokenizer(), tmp_path / "new", card="# A card")
    for score in (importance.magnitude, lambda it: importance.taylor(it, torch.ones(1, 4).long())):
        with pytest.raises(ValueError, match="model must be a causal language model of transf"):
            score(model)


def test_a_backbone_is_scanned_and_predicts_nothing(tmp_path):
    model = llama()
    ids = windows().clamp(min=1)
    found, whole = (similarity.measure_similarity(read, ids) for read in (model.model, model))
    assert found.block_influence.tolist() == whole.block_influence.tolist()
    for predicts in (
        lambda: evaluation.token_losses(model.model, windows()),
        lambda: evaluation.evaluate_tasks(model.model, Tokenizer(), ["piqa"]),
        lambda: importance.taylor(model.model, windows()),
        lambda: importance.perplexity_without_layer(model.model, windows()),
        lambda: models.untie_head(model.model),
        lambda: heal(model.model),
        lambda: release.save_release(model.model, Tokenizer(), tmp_path / "new", card="# A card"),
    ):
        with pytest.raises(ValueError, match="must have a head that predicts tokens, but LlamaMo"):
            predicts()


def test_a_model_of_one_layer_has_none_to_spare():
    one = surgery.drop_layers(llama(), range(1, len(models.decoder_layers(llama()))))
    with pytest.raises(ValueError, match=r"from 1 to 0 \(one of 1 layers must stay\), got 1"):
        importance.perplexity_without_layer(one, windows())


# --- what lies in a healing run's folder ----------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 10**5])
def test_damaged_settings_are_refused_by_their_name(content, tmp_path):
    (tmp_path / trainer.SETTINGS).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / trainer.SETTINGS} is damaged (")):
        heal(output_dir=tmp_path)
    assert (tmp_path / trainer.SETTINGS).read_bytes() == content


def test_what_is_no_checkpoint_is_left_alone_and_a_damaged_seal_is_none(tmp_path):
    whole = tmp_path / "checkpoint-2"
    whole.mkdir()
    (whole / "adapter.bin").write_text("weights")
    trainer.seal(whole)
    cut = tmp_path / "checkpoint-10"
    cut.mkdir()
    (cut / trainer.SEAL).write_bytes(b"\xff\xfe\x00")
    for name in ("checkpoint-abc", "checkpoint-", "checkpoint-²"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-30").write_text("a file")
    (tmp_path / "checkpoint-31").symlink_to("nowhere")
    (tmp_path / trainer.SETTINGS).write_text("{}")
    kept = set(tmp_path.iterdir()) - {cut}
    assert trainer._last_whole_checkpoint(tmp_path, {}) == whole
    assert set(tmp_path.iterdir()) == kept


# --- numbers that overflow ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "settings", "message"),
    [
        # After the last step no loss would tell.
        (torch.float32, {"learning_rate": 1e45, "steps": 1}, "is not finite after the last step"),
        (torch.float32, {"alpha": 1e38}, "the gradients' norm is inf at step 1 of 2"),
        (
            torch.float16,
            {"method": "full", "learning_rate": 1e6, "steps": 1},
            "beyond the range of torch.float16",
        ),
        (
            torch.float16,
            {"merge": True, "alpha": 1e9, "learning_rate": 1.0, "steps": 1},
            "beyond the range of torch.float16",
        ),
    ],
)
def test_weights_that_are_not_finite_are_never_returned(dtype, settings, message):
    with pytest.raises(ValueError, match=message):
        heal(llama().to(dtype), **settings)


def test_what_was_not_finite_before_may_stay_so():
    model, healed = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    healed.weight.data[:] = NAN
    with pytest.raises(ValueError, match="the trained weight holds numbers beyond"):
        trainer.refuse_overflow(healed, model)
    model.weight.data[:] = NAN
    trainer.refuse_overflow(healed, model)


# --- dtypes and modes -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["lora", "last_layers"])
def test_layers_of_another_dtype_are_trained_and_keep_it(method, dtype):
    model = llama()
    model.model.layers[1].to(dtype)
    healed = heal(model, method=method, merge=True, last_k=1)
    dtypes = {name: weight.dtype for name, weight in healed.model.named_parameters()}
    assert dtypes == {name: weight.dtype for name, weight in model.named_parameters()}
    assert np.isfinite(healed.history.loss).all()


def test_float64_is_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="must be a 16- or 32-bit one, but has weights in float64"):
        heal(llama().double(), output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients_around_them_change_nothing(mode):
    model, ids = llama(), windows()
    trained, scores = heal(model, ids).history.loss.tolist(), importance.taylor(model, ids)
    with mode():
        assert heal(model, ids).history.loss.tolist() == trained
        np.testing.assert_array_equal(importance.taylor(model, ids), scores)


def test_autocast_around_a_measure_leaves_its_small_angles(monkeypatch):
    seen = []
    own = similarity._angles
    monkeypatch.setattr(
        similarity,
        "_angles",
        lambda states: seen.append(torch.is_autocast_enabled("cpu")) or own(states),
    )
    with torch.autocast("cpu", torch.bfloat16):
        similarity.measure_similarity(llama(), windows().clamp(min=3))
    assert seen[0] is False


# --- masks, scores, distances ---------------------------------------------------------------------

MASK = torch.tensor([[1, 1, 0], [0, 1, 1]])


@pytest.mark.parametrize(
    "mask",
    [
        list(MASK),
        pd.DataFrame(MASK.numpy()),
        MASK.numpy().astype(object),
        np.ascontiguousarray(MASK.numpy()[::-1])[::-1],
        MASK.numpy().astype(np.longdouble),
        MASK.to_sparse(),
        MASK.bfloat16(),
    ],
)
def test_masks_of_any_kind_are_one_tensor(mask):
    found = passes.as_mask(mask, MASK.shape)
    assert found.dtype == torch.int64 and found.tolist() == MASK.tolist()


@pytest.mark.parametrize(
    "mask", [MASK * 2, MASK * NAN, MASK[0], [[1], [1, 0]], "11", None, {}, MASK.tolist() + [[1]]]
)
def test_other_masks_are_refused(mask):
    with pytest.raises(ValueError, match=r"must hold 0 and 1 in the shape \(2, 3\)"):
        passes.as_mask(mask, MASK.shape)


@pytest.mark.parametrize(
    "scores",
    [
        torch.tensor([3.0, 1.0, 2.0]).bfloat16(),
        torch.tensor([3.0, 1.0, 2.0], requires_grad=True),
        [3, 1, 2],
        np.array([3, 1, 2], dtype=object),
    ],
)
def test_numbers_in_any_kind_of_list_are_numbers(scores):
    found = checks.real_numbers("scores", scores)
    assert found.dtype == np.float64 and found.tolist() == [3.0, 1.0, 2.0]
    assert selection.least_important(scores, 2) == (1, 2)


@pytest.mark.parametrize(
    "values", [{0: 1.0}, {1.0}, (x for x in "a"), [1j, 2], [10**400], ["1", "2"], object()]
)
def test_what_holds_no_real_numbers_is_refused(values):
    with pytest.raises(ValueError, match="scores must be real numbers in a list, .* got"):
        selection.least_important(values, 1)
    with pytest.raises(ValueError, match="distance must be real numbers"):
        selection.best_block(values, 1)


def test_a_masked_score_is_none():
    masked = np.ma.masked_array([3.0, 1.0, 2.0], [0, 1, 0])
    with pytest.raises(ValueError, match="score of layer 1 is NaN"):
        selection.least_important(masked, 1)


def test_no_number_of_layers_is_not_all_of_them():
    with pytest.raises(ValueError, match="n must be a whole number of at least 0, got None"):
        selection.least_important([1, 2, 3], None)


@pytest.mark.parametrize("seed", [None, True, 1.0, "1", NAN, -1, [1]])
def test_seeds_of_a_bootstrap_are_whole_numbers(seed):
    with pytest.raises(ValueError, match="seed must be a whole number of at least 0, got"):
        selection.resampled_starts(np.ones((2, 3, 3)), 1, n_samples=2, seed=seed)


def test_a_bootstrap_draws_the_same_in_parts(monkeypatch):
    samples = np.random.default_rng(0).random((3, 5, 5))
    whole = selection.resampled_starts(samples, 1, n_samples=2, draws=50)
    monkeypatch.setattr(selection, "DRAWS_AT_ONCE", 7)
    parts = selection.resampled_starts(samples, 1, n_samples=2, draws=50)
    assert len(set(whole)) > 1 and parts.tolist() == whole.tolist()
    with pytest.raises(ValueError, match="draws must be a whole number from 1 to 10000000"):
        selection.resampled_starts(samples, 1, n_samples=2, draws=10**9)


def test_numbers_of_numpy_order_shots_and_huge_limits_are_refused(monkeypatch):
    monkeypatch.setattr(benchmarks, "load", lambda name, n_shots, limit, order: order)
    order = evaluation.load_tasks(["piqa"], shot_order=np.int64(3))["piqa"]
    assert order == 3 and type(order) is int
    with pytest.raises(
        ValueError, match=f"limit must be a whole number from 1 to .*, got {10**30}"
    ):
        evaluation.load_tasks(["piqa"], limit=10**30)


@pytest.mark.parametrize("tasks", [[], None, 3, "piqa", [None], [["piqa"]], [b"piqa"], [{}]])
def test_other_than_names_of_tasks_is_refused_at_once(tasks, monkeypatch):
    monkeypatch.setattr(benchmarks, "load", pytest.fail)
    with pytest.raises(ValueError, match="tasks must be a list with one or more of .* got"):
        evaluation.load_tasks(tasks)


# --- tables ---------------------------------------------------------------------------------------


def test_a_name_of_several_lines_is_written_and_read(tmp_path):
    path = tmp_path / "a\nb.csv"
    table = results.load_or_compute(path, lambda: {"x": 1}, parameters={})
    assert results.load_or_compute(path, pytest.fail, parameters={}).equals(table)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a\nb.csv", "run.json"]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("folder.csv", {}, "no folder"),
        ("b" * 245 + ".csv", {}, "name too long"),
        ("t.csv", {"dtype": "bf16"}, "dtype must be one of"),
        ("t.csv", {"dtype": None}, "dtype must be one of"),
        ("t.csv", None, "parameters must be a dict of plain values, got NoneType"),
        ("t.csv", [("a", 1)], "parameters must be a dict of plain values, got list"),
    ],
)
def test_what_could_not_be_kept_is_not_computed(name, parameters, message, recompute, tmp_path):
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises((ValueError, OSError), match=message):
        results.load_or_compute(
            tmp_path / name, pytest.fail, parameters=parameters, recompute=recompute
        )
    with pytest.raises((ValueError, OSError), match=message):
        results.sweep([{"a": 1}], pytest.fail, path=tmp_path / name, parameters=parameters)
    assert not (tmp_path / "run.json").exists()


def test_a_column_of_missing_times_is_refused_as_one_of_times_is(tmp_path):
    for value in (pd.NaT, pd.Timestamp("2020-01-01")):
        table = pd.DataFrame({"when": pd.Series([value], dtype="datetime64[ns]"), "x": [1]})
        with pytest.raises(ValueError, match="column 'when' must hold numbers or texts"):
            results.load_or_compute(tmp_path / "t.csv", lambda table=table: table, parameters={})


def test_settings_that_a_run_wrote_are_json(tmp_path):
    heal(output_dir=tmp_path / "run", learning_rate=np.float32(1e-3))
    assert json.loads((tmp_path / "run" / trainer.SETTINGS).read_text())["rank"] == 2
