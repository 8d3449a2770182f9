"""`make bench`: its page, and the README's table, say what was measured."""

import re
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from tiny_model import save_tiny_model

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import report  # noqa: E402

from pruning_utils import models  # noqa: E402

COMMITTED = ROOT / "benchmarks"


def test_the_page_is_that_of_the_tables():
    rows, growth = (pd.read_csv(COMMITTED / f"{name}.csv") for name in ("results", "growth"))
    assert rows["stage"].tolist() == list(report.STAGES)
    text = (COMMITTED / "RESULTS.md").read_text(encoding="utf-8")
    (machine,) = re.findall(r"wrote this page on (.*), with SmolLM2-135M-Instruct", text)
    assert text == report.page(rows, growth, machine)


def test_the_readme_has_the_table_of_the_page():
    rows = pd.read_csv(COMMITTED / "results.csv")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert report.short_table(rows) in text


def test_slopes_are_those_of_powers():
    sizes = [1, 2, 4, 8]
    assert report.slope(sizes, [3 * size**2 for size in sizes]) == pytest.approx(2)
    assert report.slope(sizes, [5.0] * 4) == pytest.approx(0)


def test_beginnings_that_prompts_share_are_counted_once():
    class Letters:
        def __call__(self, text: str, add_special_tokens: bool) -> dict:
            return {"input_ids": list(text)}

    asked = [("shots one", " a"), ("shots one", " b"), ("shots two", " a")]
    own = len("shots one a") + len("b") + len("two a")
    assert report.tokens_at_least(Letters(), asked) == own


def test_ways_that_are_compared_do_the_same(tmp_path):
    model, _ = models.load_model(save_tiny_model(tmp_path / "tiny"), dtype="float32")
    prompt = torch.arange(5)[None]
    seen: list[int] = []
    model.register_forward_hook(lambda *given: seen.append(int(given[2].logits[:, -1].argmax(-1))))
    with torch.no_grad():
        for way in report.generation_ways(model, prompt, 4).values():
            way()
    assert len(seen) == 8 and seen[:4] == seen[4:]


def test_activations_are_computed_again_in_one_of_two_ways_to_train(tmp_path):
    model, _ = models.load_model(save_tiny_model(tmp_path / "tiny"), dtype="float32")
    passed: list[int] = []
    for layer in models.decoder_layers(model):
        # The second time a layer ends before its last product, of which nothing is needed.
        layer.self_attn.register_forward_hook(lambda *given: passed.append(1))
    counts = []
    for way in report.kept_ways(model, torch.arange(12)[None]).values():
        passed.clear()
        way()
        counts.append(len(passed))
    n_layers = len(models.decoder_layers(model))
    assert counts == [n_layers, 2 * n_layers]


@pytest.mark.slow
def test_a_run_writes_its_tables_and_its_page(tmp_path):
    tiny = save_tiny_model(tmp_path / "tiny")
    with pytest.raises(SystemExit):
        report.main(["--quick", "--model", tiny])
    assert report.main(["--quick", "--model", tiny, "--out", str(tmp_path / "out")]) == 0
    rows = pd.read_csv(tmp_path / "out" / "results.csv")
    assert rows["stage"].tolist() == list(report.STAGES)
    assert rows.select_dtypes("number").gt(0).all(axis=None)
    assert (rows["least"] <= rows["times_as_fast"]).all()
    assert (rows["times_as_fast"] <= rows["most"]).all()
    growth = pd.read_csv(tmp_path / "out" / "growth.csv")
    assert set(growth["stage"]) < set(report.STAGES) and growth["ours_slope"].notna().all()
    assert "## How time grows" in (tmp_path / "out" / "RESULTS.md").read_text()
