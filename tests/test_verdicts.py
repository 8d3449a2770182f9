"""Rows of verdicts: what each claim is judged to be, what cannot be tested, and the table kept."""

import numpy as np
import pandas as pd
import pytest

from pruning_utils import evidence, runtime
from pruning_utils.engine import verdict_rows
from pruning_utils.evidence import FAILS, HOLDS, UNTESTABLE, UNTOLD, Interval

COLUMNS = (
    "claim part model measure data depth recipe value low high level kind n runs "
    "tokens_per_parameter unpruned floor verdict notebook cell reason asked"
).split()
ABOVE, BELOW, AROUND = Interval(2, 1, 3), Interval(-2, -3, -1), Interval(0, -1, 1)
UNKNOWN = Interval(2, np.nan, np.nan)


def judged(found, claimed: str = "above 0", **asked) -> dict:
    """A row with what every row needs."""
    names = {
        "claim": "A5",
        "part": "healed",
        "model": "SmolLM2",
        "measure": "loss",
        "data": "XSum",
        "depth": 8,
        "recipe": "LoRA",
        "notebook": "04_simple_against_similarity",
        "cell": "Verdict",
    }
    if isinstance(found, Interval):
        names |= {"kind": "bootstrap", "n": 48, "runs": 1}
    return evidence.judge(found=found, claimed=claimed, **{**names, **asked})


def test_a_row_has_its_columns_in_order():
    row = judged(
        ABOVE,
        levels=[3.0, Interval(4, 3.9, 4.1)],
        unpruned=Interval(2.5, 2.4, 2.6),
        floor=10.8,
        higher_is_better=False,
        tokens_per_parameter=0.004,
        paper_tokens_per_parameter=0.02,
    )
    assert list(row) == COLUMNS
    assert list(row.values()) == [
        *("A5", "healed", "SmolLM2", "loss", "XSum", 8, "LoRA", 2, 1, 3, 0.95, "bootstrap", 48, 1),
        *(0.004, 2.5, 10.8, "holds", "04_simple_against_similarity", "Verdict", "", "beforehand"),
    ]


@pytest.mark.parametrize(
    "found, claimed, word",
    [
        (ABOVE, "above 0", HOLDS),
        (ABOVE, "below 0", FAILS),
        (BELOW, "below 0", HOLDS),
        (AROUND, "above 0", UNTOLD),
        (UNKNOWN, "above 0", UNTOLD),
        (UNKNOWN, "equal", UNTOLD),
        (AROUND, "equal", HOLDS),  # the margin is 1.5
        (ABOVE, "equal", UNTOLD),
        (BELOW._replace(high=-1.6), "equal", FAILS),
        (ABOVE._replace(low=1.6), "equal", FAILS),
        (ABOVE._replace(low=1.6), "above the margin", HOLDS),
        (ABOVE, "above the margin", UNTOLD),
        (AROUND, "above the margin", FAILS),
    ],
)
def test_what_an_interval_says(found, claimed, word):
    margin = 1.5 if claimed in ("equal", "above the margin") else None
    row = judged(found, claimed, margin=margin)
    assert (row["verdict"], row["reason"]) == (word, "")


def family(shifts: dict[str, float]) -> pd.DataFrame:
    """Pairs whose means are these many standard errors of 0.1; the margin is 0.4."""
    values = np.tile([-1.0, 1], 50)
    values = values / values.std(ddof=1)
    pairs = {name: values + 0.1 * shift for name, shift in shifts.items()}
    return evidence.paired_verdicts(pairs, margin=0.4).set_index("pair")


def test_what_a_pair_says_is_corrected_for_its_family():
    shifts = {"far": 9.0, "low": -9.0, "within": 1.0, "small": 2.9, "border": 2.2}
    table = family(shifts)
    assert table["verdict"].to_dict() == {
        "far": "differs",
        "low": "differs",
        "within": "equal",
        "small": "differs",
        "border": UNTOLD,
    }
    assert table.loc["border", "low"] > 0, "alone it would be above 0"
    said = {
        name: [judged(table.loc[name], claimed)["verdict"] for claimed in evidence.CLAIMS]
        for name in shifts
    }
    assert said == {
        "far": [HOLDS, FAILS, FAILS, HOLDS],
        "low": [FAILS, HOLDS, FAILS, FAILS],
        "within": [FAILS, FAILS, HOLDS, FAILS],
        "small": [HOLDS, FAILS, UNTOLD, UNTOLD],  # no more than the margin, for all one knows
        "border": [UNTOLD, UNTOLD, UNTOLD, UNTOLD],
    }


def test_a_pair_that_differs_within_the_margin_is_both():
    values = np.tile([-1.0, 1], 5000) + 0.1
    row = evidence.paired_verdicts({"a": values}, margin=0.4).iloc[0]
    assert row["verdict"] == "differs, within the margin"
    assert [judged(row, claimed)["verdict"] for claimed in evidence.CLAIMS] == [
        *(HOLDS, FAILS, HOLDS, FAILS)
    ]


def test_a_row_says_what_its_interval_is_made_of():
    values = np.random.default_rng(0).normal(size=(30, 3))
    pair = evidence.paired_verdicts({"a": values}, margin=0.1).iloc[0]
    whole = evidence.two_factor_interval(values)
    for found in (pair, dict(pair), whole):
        row = judged(found)
        assert (row["kind"], row["n"], row["runs"]) == ("t over items and runs", 30, 3)
        assert (row["value"], row["low"], row["high"]) == whole[:3]
        assert np.isnan([row["tokens_per_parameter"], row["unpruned"], row["floor"]]).all()
    one = judged(evidence.two_factor_interval(values[:, 0]))
    assert (one["kind"], one["runs"]) == ("t over items", 1)


@pytest.mark.parametrize(
    "levels, unpruned, higher, reason",
    [
        ([0.4, 0.5], 0.5, True, ""),
        ([Interval(0.4, 0.31, 0.5)], 0.5, True, ""),
        ([0.5, Interval(0.4, 0.3, 0.5)], 0.5, True, "a level is not surely above the floor"),
        ([0.3], 0.5, True, "a level is not surely above the floor"),
        ([np.nan], 0.5, True, "a level is not surely above the floor"),
        ([0.5], Interval(0.35, 0.29, 0.41), True, "the unpruned model is not surely above the"),
        ([0.2, 0.25], 0.1, False, ""),
        ([0.2, 0.3], 0.1, False, "a loss is not surely below ln V"),
        ([Interval(0.25, 0.2, 0.31)], 0.1, False, "a loss is not surely below ln V"),
        ([0.2], 0.4, False, "the unpruned model is not surely below ln V"),
    ],
)
def test_what_stands_at_its_floor_is_not_tested(levels, unpruned, higher, reason):
    row = judged(ABOVE, levels=levels, unpruned=unpruned, floor=0.3, higher_is_better=higher)
    assert row["verdict"] == (UNTESTABLE if reason else HOLDS)
    assert row["reason"].startswith(reason) and bool(row["reason"]) == bool(reason)


@pytest.mark.parametrize(
    "ours, papers, word",
    [(0.0003, 0.004, UNTESTABLE), (0.0004, 0.004, HOLDS), (0.0003, None, HOLDS), (None, 1, HOLDS)],
)
def test_a_small_budget_tests_nothing(ours, papers, word):
    row = judged(ABOVE, tokens_per_parameter=ours, paper_tokens_per_parameter=papers)
    assert row["verdict"] == word
    if word == UNTESTABLE:
        assert row["reason"] == (
            "0.0003 tokens per parameter are less than a tenth of the paper's 0.004"
        )


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"claimed": "flat"}, "claimed must be one of .*, got 'flat'"),
        ({"claimed": "equal"}, "margin must be above 0 for a claim of equality, got None"),
        ({"claimed": "equal", "margin": 0}, "equality, got 0"),
        ({"levels": [0.5]}, "floor must be given, got None"),
        ({"kind": None}, "kind, n and runs must be given, got None, 48 and 1"),
        ({"runs": None}, "got 'bootstrap', 48 and None"),
    ],
)
def test_what_cannot_be_judged_is_refused(asked, message):
    with pytest.raises(ValueError, match=message):
        judged(ABOVE, **asked)


# --- the table ------------------------------------------------------------------------------------


def test_the_table_is_sorted_and_has_its_columns():
    rows = [
        judged(ABOVE, claim="X1", model="b"),
        judged(ABOVE, claim="A5", part="z"),
        judged(ABOVE, claim="A5", part="a", data="XSum"),
        judged(ABOVE, claim="A5", part="a", data="QuAC"),
        judged(ABOVE, claim="X1", model="a"),
    ]
    table = evidence.verdict_table(iter(rows))
    assert list(table.columns) == COLUMNS and list(table.index) == [0, 1, 2, 3, 4]
    found = table[["claim", "part", "model", "data"]].to_numpy().tolist()
    assert found == [
        ["A5", "a", "SmolLM2", "QuAC"],
        ["A5", "a", "SmolLM2", "XSum"],
        ["A5", "z", "SmolLM2", "XSum"],
        ["X1", "healed", "a", "XSum"],
        ["X1", "healed", "b", "XSum"],
    ]
    assert list(evidence.verdict_table([]).columns) == COLUMNS


def test_every_claim_of_the_papers_may_be_judged():
    claims = pd.read_csv(runtime.project_root() / "reference" / "claims.csv")["id"]
    table = evidence.verdict_table([judged(ABOVE, claim=claim) for claim in claims])
    assert sorted(table["claim"]) == sorted(claims) and len(claims) == 22


@pytest.mark.parametrize(
    "rows, message",
    [
        ([judged(ABOVE, claim="A9")], r"claim must be one of .*'A1'.*, got \['A9'\]"),
        ([{**judged(ABOVE), "verdict": "true"}], r"verdict must be one of .*, got \['true'\]"),
        ([judged(ABOVE, asked="later")], r"asked must be one of .*'afterwards'.*, got \['later'\]"),
        ([{**judged(ABOVE), "p": 0.1}], r"columns \['p'\] differ"),
        ([judged(ABOVE), judged(BELOW)], "two verdicts have one key, .*'part': 'healed'"),
    ],
)
def test_rows_that_make_no_table_are_refused(rows, message, tmp_path):
    path = tmp_path / "verdicts.csv"
    path.write_text("before")
    for make in (evidence.verdict_table, lambda rows: evidence.save_verdicts(rows, path)):
        with pytest.raises(ValueError, match=message):
            make(rows)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_a_saved_table_is_read_back(tmp_path):
    path = tmp_path / "04" / "verdicts.csv"
    rows = [judged(Interval(1 / 3, 0.1234567, 2), floor=0.3, unpruned=1.0), judged(BELOW, part="z")]
    evidence.save_verdicts(rows, path)
    lines = path.read_text().splitlines()
    assert lines[0] == ",".join(COLUMNS) and len(lines) == 3
    assert lines[1] == (
        "A5,healed,SmolLM2,loss,XSum,8,LoRA,0.333333,0.123457,2,0.95,bootstrap,48,1,,1,0.3,"
        "holds,04_simple_against_similarity,Verdict,,beforehand"
    )
    assert lines[2].startswith("A5,z,") and list(path.parent.iterdir()) == [path]
    assert verdict_rows.read(path)["asked"].tolist() == ["beforehand", "beforehand"]
    path.write_text("".join(line.rpartition(",")[0] + "\n" for line in lines))
    assert verdict_rows.read(path)["asked"].tolist() == ["beforehand", "beforehand"]


def test_budgets_of_several_papers_are_told_as_shares():
    """The ends of two ranges would not belong together: 5.5 is more than a tenth of 47."""

    def reasons(*budgets: tuple[float, float]) -> list[str]:
        """The reasons of rows with tokens per parameter: ours, and the paper's."""
        return [
            judged(ABOVE, tokens_per_parameter=own, paper_tokens_per_parameter=of_paper)["reason"]
            for own, of_paper in budgets
        ]

    told = verdict_rows.budgets_told
    assert told(["a level is not surely above the floor", ""]) == ""
    assert told(reasons((0.003, 2.0))) == (
        "healing saw 0.003 tokens per parameter, less than a tenth of the paper's 2"
    )
    assert told(reasons((5.5, 230.0), (2.75, 47.0))) == (
        "healing saw 2.75 to 5.5 tokens per parameter, 2.4 to 5.9 % of the paper's, where a tenth "
        "is asked"
    )
