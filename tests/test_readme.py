"""The README says what the verdicts say: its tables are written by scripts/claims.py from the
verdicts.csv of every notebook, which test_notebooks redraws.

``.venv/bin/python scripts/claims.py`` writes them anew.
"""

import re
import sys
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from pruning_utils.engine import verdict_rows

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import claims  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")
PROSE = " ".join(README.split())  # wherever its lines end
NOTEBOOKS = {path.stem for path in (ROOT / "notebooks").glob("[0-9]*.ipynb")}
CLAIMS = pd.read_csv(ROOT / "reference" / "claims.csv")
VERDICTS = claims.read_verdicts(ROOT / "results" / "cpu")
WIDTH = 60  # characters of a line of a cell that a reader sees


# --- the tables -----------------------------------------------------------------------------------


def test_the_tables_say_what_the_verdicts_say():
    assert claims.written(README, ROOT / "results") == README, (
        "`.venv/bin/python scripts/claims.py` writes the tables"
    )


def test_the_picture_shows_the_committed_verdicts():
    drawn = ROOT / "figures" / "verdicts.png"
    assert Image.open(drawn).info["Source"] == claims.origin(ROOT / "results" / "cpu"), (
        "`.venv/bin/python scripts/claims.py` draws it"
    )
    assert drawn.with_suffix(".pdf").is_file()
    assert f"](figures/{drawn.name})" in README.partition(claims.FIRST)[0]


def test_the_picture_is_drawn_again_to_the_byte(tmp_path):
    claims.draw(ROOT / "results" / "cpu", tmp_path / "verdicts")
    for suffix in ("png", "pdf"):
        drawn, committed = (
            folder / f"verdicts.{suffix}" for folder in (tmp_path, ROOT / "figures")
        )
        assert drawn.read_bytes() == committed.read_bytes()


def test_every_notebook_about_a_paper_and_every_claim_has_a_verdict():
    ask_nothing = {"00_quickstart", "13_your_own_model"}
    assert NOTEBOOKS - set(VERDICTS["notebook"]) == ask_nothing and len(NOTEBOOKS) == 14
    assert set(VERDICTS["claim"]) == set(CLAIMS["id"])


def test_parts_are_told_apart_and_fit_into_a_cell():
    shown = VERDICTS[["claim", "notebook", "part", "measure", "data", "recipe", "model"]]
    assert not shown.duplicated().any(), "the README has one cell for them"
    assert VERDICTS["part"].str.len().max() <= WIDTH


def verdict(model: str, claim: str, part: str, word: str, value: float, **more) -> dict:
    """A row of verdicts.csv."""
    row = dict.fromkeys(verdict_rows.COLUMNS, "")
    row |= {"model": model, "claim": claim, "part": part, "verdict": word, "value": value}
    row |= {"low": value - 1, "high": value + 1, "measure": "loss", "depth": "8 of 30 layers"}
    row["data"] = "XSum"
    if word == "not testable here":
        row["reason"] = "0.1 tokens per parameter are less than a tenth of the paper's 2"
    return row | {"notebook": "04_simple"} | more


def test_a_section_counts_and_lists_the_verdicts_of_each_model():
    rows = [
        verdict("gemma-3-270m", "A5", "equal", "not testable here", -2.0, depth="5 of 18 layers"),
        verdict("smollm2-135m", "A5", "equal", "does not hold", 2.5),
        verdict("smollm2-135m", "A5", "poor", "holds", 0.25, measure="accuracy"),
        verdict("smollm2-135m", "C1", "best", "holds", 3.0, notebook="09_seven"),
    ]
    lines = claims.section(pd.DataFrame(rows), CLAIMS).replace("\u00a0", " ").split("\n")
    assert lines[:3] == [
        "SmolLM2-135M-Instruct: of 3 parts of claims, 2 hold and 1 does not hold.",
        "Gemma 3 270M: of 1 part of claims, 1 is not testable here.",
        "On Gemma 3 270M 1 part is not testable. In 1 healing was too short.",
    ]
    assert lines[4].startswith("### Gromov et al.") and lines[13].startswith("### Lu et al.")
    assert lines[6:10] == [
        "| claim | part | SmolLM2-135M-Instruct | Gemma 3 270M |",
        "| --- | --- | --- | --- |",
        "| A5, [04](notebooks/04_simple.ipynb) | equal<br>*loss, XSum* "
        "| **does not hold**<br>2.5 nats<br>(1.5 to 3.5)<br>8 of 30 layers "
        "| **not testable here**<br>\u22122 nats<br>(\u22123 to \u22121)<br>5 of 18 layers |",
        "| A5, [04](notebooks/04_simple.ipynb) | poor<br>*accuracy, XSum* "
        "| **holds**<br>25 points<br>(\u221275 to 125)<br>8 of 30 layers | not asked |",
    ]
    assert lines[10] == "" and lines[11].startswith("- A5: ")
    assert lines[15] == "| claim | part | SmolLM2-135M-Instruct |"


def test_parts_that_no_model_can_test_are_counted():
    rows = [
        verdict("smollm2-135m", "A5", part, word, 1.0)
        for part, word in (
            ("healed", "not testable here"),
            ("healed longer", "not testable here"),
            ("unhealed", "holds"),
        )
    ]
    rows.append(verdict("smollm2-135m", "A6", "ranks", "not testable here", 1.0))
    text = claims.section(pd.DataFrame(rows), CLAIMS)
    assert text.count(",\u00a0[04]") == 1 and "| unhealed<br>" in text
    assert "\n\nNot testable here: 2 of A5 and 1 of A6. The notebooks say" in text
    rows[0]["reason"] = "a level is not surely above the floor"
    text = claims.section(pd.DataFrame(rows), CLAIMS)
    told = "In 2 healing was too short. In 1 a level is not surely above its floor."
    assert f"\nOn SmolLM2-135M-Instruct 3 parts are not testable. {told}\n" in text
    rows[0]["reason"] = "of no kind"
    with pytest.raises(ValueError, match="a reason is none of"):
        claims.section(pd.DataFrame(rows), CLAIMS)


def test_parts_that_were_not_named_beforehand_are_marked_and_counted():
    rows = [verdict("smollm2-135m", "A5", part, "holds", 1.0) for part in ("equal", "poor")]
    assert "\u2021" not in claims.section(pd.DataFrame(rows), CLAIMS)
    rows[1]["asked"] = "afterwards"
    text = claims.section(pd.DataFrame(rows), CLAIMS).replace("\u00a0", " ")
    assert "\n\u2021 marks parts that were not named beforehand, 1 of 2: they were" in text
    assert text.count("\u2021") == 2 and "**holds** \u2021<br>1 nats" in text.split("| poor")[1]


def test_parts_that_were_asked_again_after_longer_healing_have_a_section():
    rows = [
        verdict("smollm2-135m", "A5", "equal", "does not hold", 2.5),
        verdict("smollm2-135m", "A5", "poor", "not testable here", 0.25),
    ]
    lines = claims.longer(pd.DataFrame(rows), CLAIMS).split("\n")
    assert lines[0] == "### Healed for longer"
    assert lines[2].endswith("of 2 parts of claims, 1 does not hold and 1 is not testable here.")
    assert lines[4].startswith("| claim") and "| equal<br>*loss, XSum* |" in lines[6]


# --- the page -------------------------------------------------------------------------------------


def seen(cell: str) -> list[str]:
    """The lines of a cell as a reader sees them: of a link its text."""
    return re.sub(r"\[([^\]]*)\]\([^)]*\)|\*\*", r"\1", cell).split("<br>")


def test_cells_are_short():
    lines = [
        line.strip()
        for row in README.splitlines()
        if row.startswith("|")
        for cell in row.split("|")
        for line in seen(cell)
    ]
    assert [line for line in lines if len(line) > WIDTH] == []


def test_the_first_screen_comes_in_order():
    """The finding, on which model and how far it reaches; a picture; two commands; then the first
    table."""
    marks = [
        "SmolLM2-135M-Instruct",
        "Nothing has run at the papers' size yet",
        "`gpu`",
        "`a100`",
        "](figures/00_quickstart.png)",
        "```sh make quickstart",
        " make test ",
        "| --- |",
    ]
    places = [PROSE.find(mark) for mark in marks]
    assert -1 not in places and places == sorted(places)
    finding = README.split("\n\n")[1]
    shown = re.search(r"[\d.]+ nats", finding).group()
    assert shown in README.replace("\u00a0", " ").partition(claims.FIRST)[2], (
        "the finding's number is in no table"
    )


def test_what_is_yet_to_come_is_said():
    recorded_profiles = {path.stem for path in (ROOT / "tests" / "summaries").glob("*.csv")}
    # Numbers of a rehearsal are those of small stand-ins.
    run = {name for name in recorded_profiles if not name.startswith("rehearsal")}
    assert run == {"cpu", "smoke"}, (
        "the README says what was computed at the gpu profile, and that nothing was at a100"
    )
