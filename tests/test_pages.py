"""How a notebook begins: what it was given, and the code that it shows."""

import builtins
import inspect
import textwrap

import numpy as np
import pandas as pd
import pytest

from pruning_utils import evidence, pages, results, selection
from pruning_utils.engine import verdict_rows
from pruning_utils.engine.verdict_rows import COLUMNS
from pruning_utils.studies.study import Study

PARAMETERS = 'profile = "cpu"  # words\nmodel = "embedded"\nrevision = None\nseed = 0\n'
VALUES = {"profile": "cpu", "model": "embedded"}


def test_a_notebook_as_it_was_written_says_nothing():
    assert pages.looked_at(["", PARAMETERS, "import os"], VALUES) is None
    assert pages.looked_at(["", PARAMETERS, "# Parameters\nseed = 1\n"], VALUES) is None
    assert pages.begin(3) is None, "outside a notebook"


def test_an_unknown_parameter_ends_the_run():
    injected = '# Parameters\nmodle = "mine"\nsede = 1\n'
    annotated = PARAMETERS.replace("seed =", "seed: int =")
    for cell in (PARAMETERS, annotated):
        with pytest.raises(
            ValueError, match="no parameter modle, sede; it has: profile, model, revision, seed"
        ):
            pages.looked_at(["", cell, injected], VALUES)
    assert pages.looked_at(["", annotated, "# Parameters\nseed = 1\n"], VALUES) is None


@pytest.mark.parametrize(
    "given, said",
    [
        ({"model": "mine"}, "This run has model `mine`:"),
        ({"profile": "gpu"}, "This run has profile `gpu`:"),
        ({"model": "a/b", "profile": "mine"}, "This run has profile `mine` and model `a/b`:"),
    ],
)
def test_another_model_or_profile_is_said(given, said):
    for cells in (
        ["", PARAMETERS],
        ["", PARAMETERS, "# Parameters\nmodel = 1"],
        ["%load_ext a", PARAMETERS],
    ):
        note = pages.looked_at(cells, VALUES | given)
        assert (
            said in note.markdown
            and "written for profile `cpu` and model `embedded`" in note.markdown
        )


def test_another_name_of_the_model_is_the_same_model():
    assert pages.looked_at(["", PARAMETERS], VALUES | {"model": "smollm2-135m"}) is None


def test_computed_sentences_speak_of_any_model(monkeypatch):
    said = []

    class Shell:
        user_ns = VALUES | {"model": "mine", "In": ["", PARAMETERS]}
        display_pub = type("Display", (), {"publish": staticmethod(said.append)})

    monkeypatch.setattr(builtins, "get_ipython", Shell, raising=False)
    pages.begin(any_model=True)
    assert said == []
    pages.begin()
    assert "This run has model `mine`" in str(said)


def test_findings_are_the_saved_verdicts(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "table_path", lambda *names: tmp_path / f"{names[-1]}.csv")
    assert "No verdicts of the profile cpu" in pages.findings("02_x").markdown
    said = {
        "measure": "accuracy",
        "data": "PIQA",
        "depth": "3 of 30 layers",
        "recipe": "unhealed",
        "notebook": "02_x",
        "cell": "Claims",
        "kind": "t over items",
        "n": 100,
        "runs": 1,
    }
    rows = [
        evidence.judge(
            "A1",
            "flat",
            evidence.Interval(value, value - 0.1, value + 0.1),
            claimed="above 0",
            model=model,
            **said,
        )
        for model, value in (("large", 0.5), ("small", 0.0))
    ]
    rows.append(
        evidence.judge(
            "X1",
            "unhealed",
            evidence.Interval(0.5, 0.4, 0.6),
            claimed="above 0",
            model="small",
            levels=[0.2],
            floor=0.3,
            **said,
        )
    )
    rows += [
        evidence.judge(
            "A2",
            part,
            evidence.Interval(0.5, 0.4, 0.6),
            claimed="above 0",
            model="small",
            tokens_per_parameter=seen,
            paper_tokens_per_parameter=2.0,
            **said,
        )
        for part, seen in (("briefly", 0.003), ("longer", 0.02))
    ]
    evidence.save_verdicts(rows, tmp_path / "verdicts.csv")
    lines = pages.findings("02_x").markdown.split("\n")
    sentences, _, head, _, first, brief, _, second, _, sign, _, *claims = lines
    assert sentences == (
        "large: of 1 part of claims, 1 holds. "
        "small: of 4 parts of claims, 1 cannot be told and 3 are not testable here."
    )
    assert head.endswith("| large | small |")
    assert first == (
        "| A1 | flat | accuracy, PIQA | **holds**<br>50 points (40 to 60), 3 of 30 layers "
        "| **cannot be told**<br>0 points (\u221210 to 10), 3 of 30 layers |"
    )
    assert (
        "| not asked | **not testable here**: a level is not surely above the floor<br>" in second
    )
    assert "**not testable here**: budget<br>50 points (40 to 60), 3 of 30 layers |" in brief
    assert sign == pages.DIFFERENCES
    judged = pd.read_csv(tmp_path / "verdicts.csv")
    assert pages.verdicts(judged).markdown.split("\n") == lines[:8]
    assert claims[0].startswith("* [A1](../reference/claims.csv): *Question answering stays nearly")
    assert len(claims) == 4
    assert claims[-1] == (
        "* *Budget*: healing saw 0.003 to 0.02 tokens per parameter, less than a tenth of the "
        "paper's 2."
    )


def test_a_part_that_was_asked_at_two_depths_has_a_row_for_each(tmp_path):
    said = {"measure": "loss", "data": "XSum", "recipe": "unhealed", "notebook": "02_x"}
    said |= {"cell": "Claims", "kind": "t over items", "n": 100, "runs": 1, "model": "large"}
    rows = [
        evidence.judge(
            "A1",
            "flat",
            evidence.Interval(value, value - 0.1, value + 0.1),
            claimed="above 0",
            depth=f"{gone} of 30 layers",
            **said,
        )
        for gone, value in ((3, 0.5), (8, -0.5))
    ]
    judged = evidence.save_verdicts(rows, tmp_path / "verdicts.csv")
    lines = pages.verdicts(judged).markdown.split("\n")
    assert lines[0] == "large: of 2 parts of claims, 1 holds and 1 does not hold."
    (first, second) = (line for line in lines if line.startswith("| A1"))
    assert "**holds**" in first and "3 of 30 layers" in first
    assert "**does not hold**" in second and "8 of 30 layers" in second


def test_a_verdict_without_an_interval_is_shown(tmp_path, monkeypatch):
    """A resample without any fall has no share of it, and the file has an empty cell."""
    monkeypatch.setattr(results, "table_path", lambda *_: tmp_path / "verdicts.csv")
    row = evidence.judge(
        "A1",
        "sharp fall",
        evidence.Interval(0.25, float("nan"), float("nan")),
        claimed="above 0",
        model="small",
        measure="share",
        data="PIQA",
        depth="0 to 4 of 5 layers",
        recipe="unhealed",
        notebook="02_x",
        cell="Claims",
        kind="bootstrap over questions",
        n=100,
        runs=1,
    )
    evidence.save_verdicts([row], tmp_path / "verdicts.csv")
    shown = pages.findings("02_x").markdown
    assert "25 % (no interval), 0 to 4 of 5 layers" in shown
    assert verdict_rows.MARK not in shown
    later = row | {"part": "added", "asked": "afterwards"}
    evidence.save_verdicts([row, later], tmp_path / "verdicts.csv")
    first, second, *_, told = pages.findings("02_x").markdown.split("\n")[4:]
    assert "| added |" in first and "**cannot be told** \u2021<br>25 %" in first
    assert "| sharp fall |" in second and verdict_rows.MARK not in second
    assert told == f"* {pages.LATER}"


def test_a_readable_table_has_the_names_and_units_of_the_figures():
    table = pd.DataFrame(
        {
            "pair": ["deepest but last - similarity, seed 0", "loss, xsum: taylor+ - deepest"],
            "difference": [-0.0125, 0.25],
            "low": [-0.02, 0.125],
            "n": [480, 64],
            "p_holm": [0.5, 0.0625],
        },
        index=pd.MultiIndex.from_tuples(
            [("smollm2-135m", 3), ("m", 8)], names=["model", "n_dropped"]
        ),
    )
    kept = table.copy()
    shown = pages.readable(table, points=[True, False])
    pd.testing.assert_frame_equal(table, kept)
    assert table.index.names == ["model", "n_dropped"]
    assert shown["pair"].tolist() == [
        "deepest but last minus closest block, seed 0",
        "loss, XSum: Taylor+ minus deepest but last",
    ]
    assert shown["difference"].tolist() == [-1.25, 0.25] and shown["low"].tolist() == [-2, 0.125]
    assert shown["unit"].tolist() == ["points", "nats"] and shown["n"].tolist() == [480, 64]
    assert list(shown.index) == [("SmolLM2-135M-Instruct", 3), ("m", 8)]
    assert shown.index.names == ["model", "layers removed"] and "p after Holm" in shown
    plain = pages.readable(table, digits=1)
    assert "unit" not in plain and plain["difference"].tolist() == [-0.0, 0.2]
    # A user's folder may bear any name.
    folder = "/models/taylor - mine/pruned"
    (name,) = pages.readable(pd.DataFrame({"model": [folder], "n": [1]}))["model"]
    assert name == folder


def test_a_summary_holds_every_verdict_but_those_of_smoke():
    columns = dict.fromkeys(COLUMNS, "x") | {"claim": "A1", "verdict": "holds"}
    rows = [
        columns | {"part": "flat", "value": 0.5, "low": 0.25, "high": 0.75},
        columns | {"part": "sharp", "value": -2.0, "low": np.nan, "high": np.nan},
        columns | {"part": "unknown", "value": np.nan, "low": np.nan, "high": np.nan},
    ]
    shown = pages.summary({"n": (8, 0, "count")}, verdicts=pd.DataFrame(rows))
    found = {row["name"]: (row["value"], row["tolerance"]) for row in shown.rows}
    assert found == {
        "n": (8, 0),
        "A1, flat, x, x, x, x, x": (0.5, 0.125),
        "A1, flat, x, x, x, x, x: verdict": ("holds", 0),
        "A1, sharp, x, x, x, x, x": (-2.0, 0.2),
        "A1, sharp, x, x, x, x, x: verdict": ("holds", 0),
        "A1, unknown, x, x, x, x, x: verdict": ("holds", 0),
    }
    smoke = pages.summary({"n": (8, 0, "count")}, verdicts=pd.DataFrame(rows), profile="smoke")
    assert [row["name"] for row in smoke.rows] == ["n"]


def test_sources_are_those_of_the_definitions():
    assert pages.source("selection.best_block").text + "\n" == inspect.getsource(
        selection.best_block
    )
    method = textwrap.dedent(inspect.getsource(Study.__call__))
    shown = pages.source("studies.study.Study.__call__")
    assert shown.text + "\n" == method
    bundle = shown._repr_mimebundle_()
    assert bundle == {"text/markdown": f"```python\n{shown.text}\n```", "text/plain": shown.text}
    assert pages.source("studies.study.Study._prepared").text.startswith(
        "@functools.cached_property\n"
    )


@pytest.mark.parametrize(
    "name", ["selection", "selection.none", "none.best_block", "studies.study.Study.none", ""]
)
def test_unknown_sources_are_refused(name):
    with pytest.raises(ValueError, match="name must be module.function"):
        pages.source(name)


def test_summary_shows_and_carries_the_numbers():
    shown = pages.summary(
        {
            "perplexity": (np.float64(28.612345678), 0.5, "bf16 & threads"),
            "n": (8, 0, "count"),
            "layers": ((11, 12), 0, "exact"),
            "<best>": ("LoRA", 0, "exact"),
        }
    )._repr_mimebundle_()
    assert shown["application/vnd.pruning-utils.summary+json"] == {
        "rows": [
            {"name": "perplexity", "value": 28.6123, "tolerance": 0.5, "reason": "bf16 & threads"},
            {"name": "n", "value": 8, "tolerance": 0, "reason": "count"},
            {"name": "layers", "value": "11 12", "tolerance": 0, "reason": "exact"},
            {"name": "<best>", "value": "LoRA", "tolerance": 0, "reason": "exact"},
        ]
    }
    assert "28.6123" in shown["text/plain"] and "bf16 &amp; threads" in shown["text/html"]
    assert "&lt;best&gt;" in shown["text/html"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({}, "needs a dict"),
        ({"a": 1}, "'a': 1"),
        ({"": (1, 0, "x")}, "''"),
        ({"a": (float("nan"), 0, "x")}, "a: the value must be finite"),
        ({"a": (1, -1, "x")}, "a: the tolerance .*got -1"),
        ({"a": (1, float("inf"), "x")}, "a: the tolerance"),
        ({"a": ("text", 0.1, "x")}, "a: the tolerance .*'text' is no number"),
        ({"a": (True, 1, "x")}, "a: the tolerance"),
        ({"a": (1, 0, " ")}, "a: the reason"),
    ],
)
def test_unfit_summaries_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        pages.summary(rows)
