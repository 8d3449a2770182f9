"""The figure of all verdicts: each part of a claim is one mark, in its row and of its word."""

import pandas as pd
import pytest

from pruning_utils import verdict_plots
from pruning_utils.engine.verdict_rows import FAILS, HOLDS, UNTESTABLE, UNTOLD, WORDS

CLAIMS = pd.DataFrame(
    {
        "id": ["A1", "A2", "B1", "B2"],
        "paper": ["First", "First", "Second", "Second"],
        "claim": ["It stays", "It falls", "It is better", "It was never asked"],
    }
)


def rows(**words):
    """Verdicts of one model, by claim."""
    return [{"claim": claim, "verdict": word} for claim, said in words.items() for word in said]


def marks(axis):
    """Row from above, place from the left and word of each mark of a panel."""
    word_of = {look[0]: word for word, look in verdict_plots.MARKS.items()}
    return sorted(
        (float(line.get_ydata()[0]), float(line.get_xdata()[0]), word_of[line.get_marker()])
        for line in axis.lines
        if line.get_marker() in word_of
    )


def test_each_part_is_a_mark_in_the_row_of_its_claim():
    table = pd.concat(
        [
            pd.DataFrame(rows(A1=[UNTOLD, HOLDS], B1=[FAILS])).assign(model="smollm2-135m"),
            pd.DataFrame(rows(A2=[UNTESTABLE])).assign(model="mine"),
        ]
    )
    figure = verdict_plots.verdict_marks(table, CLAIMS)
    words, first, second = figure.axes
    assert (first.get_title(), second.get_title()) == ("SmolLM2-135M-Instruct", "mine")
    # A heading stands above the claims of each paper: A1 is in row 1, A2 in 2 and B1 in 4.
    assert marks(first) == [(1, 0, HOLDS), (1, 1, UNTOLD), (4, 0, FAILS)]
    assert marks(second) == [(2, 0, UNTESTABLE)]
    said = {text.get_text(): text.get_position()[1] for text in words.texts}
    assert said == {"First": 0, "A1": 1, "It stays": 1, "A2": 2, "It falls": 2} | {
        "Second": 3,
        "B1": 4,
        "It is better": 4,
    }, "what was never asked has no row"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [*WORDS]


@pytest.mark.parametrize(("n_parts", "lines"), [(9, [9]), (10, [9, 1]), (23, [12, 11])])
def test_many_parts_stand_in_two_lines_within_their_row(n_parts, lines):
    table = pd.DataFrame(rows(A1=[HOLDS] * n_parts)).assign(model="mine")
    found = marks(verdict_plots.verdict_marks(table, CLAIMS).axes[1])
    heights = sorted({height for height, *_ in found})
    assert [sum(height == line for height, *_ in found) for line in heights] == lines
    assert all(abs(height - 1) < 0.5 for height in heights)
    assert len({place for place in found}) == n_parts, "no mark hides another"


def test_marks_differ_in_shape():
    assert set(verdict_plots.MARKS) == set(WORDS)
    assert len({look[0] for look in verdict_plots.MARKS.values()}) == len(WORDS)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"verdict": "maybe"}, "verdict must be one of holds, .*got 'maybe'"),
        ({"claim": "Z9"}, "claim must be one of A1, A2, B1, B2, got 'Z9'"),
    ],
)
def test_unknown_verdicts_and_claims_are_refused(change, fault):
    table = pd.DataFrame(rows(A1=[HOLDS])).assign(model="mine")
    with pytest.raises(ValueError, match=fault):
        verdict_plots.verdict_marks(table.assign(**change), CLAIMS)
    with pytest.raises(ValueError, match="the table needs rows"):
        verdict_plots.verdict_marks(table.iloc[:0], CLAIMS)
