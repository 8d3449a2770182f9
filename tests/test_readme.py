"""The README says what the results say: each row of its tables of claims is worked out anew and
must stand there.

A number that tests/summaries/cpu.csv records is read from there. Intervals, verdicts and all other
numbers come from the notebooks' own cells, run on the committed tables with computing forbidden.
When a notebook has been recomputed, ``python tests/test_readme.py 00`` prints its rows as the
README must hold them.
"""

import contextlib
import csv
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest

from pruning_utils import evidence, plots, results
from pruning_utils.evidence import Interval

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROSE = " ".join(README.split())  # wherever its lines end
NOTEBOOKS = {path.stem[:2]: path for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))}
WIDTH = 60  # characters of a cell that a reader sees
HARD_SPACE = "\u00a0"
Found = tuple[Interval, str]  # of a measure, and the verdict on its claim


# --- what the notebooks' cells say ----------------------------------------------------------------


def pairs(names: dict, table: str, name: str, measure: str | None) -> list:
    """Rows whose name matches a pattern, of a table of evidence.paired_verdicts; ``measure`` tells
    several apart."""
    rows = names[table][measure] if measure else names[table]
    found = list(rows[rows["pair"].str.fullmatch(name)].itertuples())
    assert found, f"no pair {name} in {table}"
    return found


def difference(table: str, name: str, measure: str | None = None) -> Callable[[dict], Interval]:
    """The difference of one pair."""

    def interval(names: dict) -> Interval:
        (row,) = pairs(names, table, name, measure)
        return Interval(row.difference, row.low, row.high)

    return interval


def lies(
    where: str, interval: Callable[[dict], Interval], bound: float = 0
) -> Callable[[dict], Found]:
    """The claim that a measure lies ``above`` or ``below`` a bound."""

    def found(names: dict) -> Found:
        ends = interval(names)
        moved = Interval(*(end - bound for end in ends))
        return ends, evidence.verdict(moved, claimed=f"{where} 0")

    return found


def decided(
    where: str, table: str, name: str, measure: str | None = None
) -> Callable[[dict], Found]:
    """The claim that one pair's difference lies ``above`` or ``below`` 0, by its p-value after
    Holm among all pairs of its table."""

    def found(names: dict) -> Found:
        (row,) = pairs(names, table, name, measure)
        ends = Interval(row.difference, row.low, row.high)
        if row.p_holm > 0.05:
            return ends, evidence.UNTOLD
        return ends, evidence.verdict(ends, claimed=f"{where} 0")

    return found


def claimed(
    what: str, table: str, name: str, measure: str | None = None
) -> Callable[[dict], Found]:
    """The claim that pairs are ``equal`` within the margin, or that at least one of them
    ``differs``.

    The interval is that of the largest difference, without its sign where several pairs match.
    """

    def found(names: dict) -> Found:
        rows = pairs(names, table, name, measure)
        row = max(rows, key=lambda row: abs(row.difference))
        turned = len(rows) > 1 and row.difference < 0
        ends = (
            (-row.difference, -row.high, -row.low)
            if turned
            else (row.difference, row.low, row.high)
        )
        said = {row.verdict for row in rows}
        if "differs" not in said and evidence.UNTOLD in said:
            return Interval(*ends), "cannot be told"
        return Interval(*ends), "holds" if ("differs" in said) == (
            what == "differs"
        ) else "does not hold"

    return found


def distances(quantity: str) -> Callable[[dict], Interval]:
    """A row of 01's table of claims."""
    return lambda names: Interval(*names["claims"].loc[quantity, ["value", "low", "high"]])


def jump(names: dict) -> Found:
    """Where the accuracy falls, and whether the loss jumps there, as 03 names it beforehand."""
    loss, fall = names["jump"][names["first_text"]], names["place"]
    if loss.high < fall.low or fall.high < loss.low:
        return fall, "does not hold"
    return fall, "holds" if fall.high - fall.low <= 2 * names["width"] else "cannot be told"


def token_time(shape: str, prompt: int) -> Callable[[dict], Interval]:
    """Time of a token for one text without a fifth of the layers, or their size, as a share of the
    unpruned model's."""

    def interval(names: dict) -> Interval:
        rows = names["claims"].set_index(["prompt", "batch", "removed", "shape"])
        row = rows.loc[(prompt, 1, 6, shape)]
        return Interval(row.ratio, row.low, row.high)

    return interval


def step_time(names: dict) -> Interval:
    """Seconds of a step of the head and three layers over LoRA's, medians, with the range of the
    runs."""
    way, lora = names["methods"]["head + 3"], names["methods"]["LoRA"]
    seconds, ratios = names["cost"]["step_seconds"], names["ratios"].loc[way]
    return Interval(seconds[way] / seconds[lora], ratios.min(), ratios.max())


def rounds(names: dict) -> Found:
    """Counts, not an interval: comparisons in which rounds gain nothing, in which they gain, and
    all."""
    rows = names["verdicts"][names["first"]]
    differs = rows["verdict"] == "differs"
    nothing = int(
        ((differs & (rows["difference"] > 0)) | rows["verdict"].str.contains("equal|within")).sum()
    )
    gain = int((differs & (rows["difference"] < 0)).sum())
    verdict = "mixed" if nothing and gain else "does not hold" if gain else "cannot be told"
    return Interval(nothing, gain, len(rows)), "holds" if nothing == len(rows) else verdict


def swap(metric: str) -> Callable[[dict], Found]:
    """What the best swap takes away, and whether that is more than half of what removal added."""

    def found(names: dict) -> Found:
        gain, over_half = (
            difference("swap_verdicts", f"{metric}, .*: minus {name}")
            for name in ("the set", "half-way to the unpruned")
        )
        return gain(names), lies("below", over_half)(names)[1]

    return found


# --- the rows -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A row of the README's tables of claims.

    Attributes:
        notebook: Its two digits.
        claim: As it stands in the README.
        found: From the names that the notebook's cells define to the measure's interval and the
            verdict.
        form: Of the number, for ``str.format`` with value, low and high.
        scale: What these are multiplied by; below 0 where the words around the number turn its
            sign.
        recorded: Pattern of the value's name in tests/summaries/cpu.csv, where it is recorded
            there.
    """

    notebook: str
    claim: str
    found: Callable[[dict], Found]
    form: str
    scale: float = 1
    recorded: str | None = None

    def cells(self, names: dict, kept: dict[str, float]) -> tuple[str, str, str]:
        """Claim, verdict and number as the results give them."""
        (value, *ends), verdict = self.found(names)
        if self.recorded:
            (value,) = [
                number for name, number in kept.items() if re.fullmatch(self.recorded, name)
            ]
        shown = [value * self.scale, *sorted(end * self.scale for end in ends)]
        # Shares of answers lie on a half of the last place, and sums differ in the sixteenth digit:
        # rounded before.
        return self.claim, verdict, self.form.format(*(round(number, 9) for number in shown))


SHORT = "{:.2f} ({:.2f} to {:.2f})"
LESS_1, LESS_2 = "{:.1f} nats less ({:.1f} to {:.1f})", "{:.2f} nats less ({:.2f} to {:.2f})"
MORE_1, MORE_2 = "{:.1f} nats more ({:.1f} to {:.1f})", "{:.2f} nats more ({:.2f} to {:.2f})"
FEWER, MORE = "{:.1f} points fewer ({:.1f} to {:.1f})", "{:.1f} points more ({:.1f} to {:.1f})"
TIME = "{:.2f} of the time ({:.2f} to {:.2f})"
LARGEST = "largest: {:.1f} points ({:.1f} to {:.1f})"
ROWS = [
    Row(
        "00",
        "Healing takes back more than half of the added loss",
        lies("above", lambda names: names["share"], 0.5),
        "{:.0f} % ({:.0f} to {:.0f})",
        100,
        "share taken back",
    ),
    Row(
        "01",
        "Deeper blocks are more alike (correlation below 0)",
        lies("below", distances("depth correlation")),
        SHORT,
        1,
        "depth correlation",
    ),
    Row(
        "01",
        "Blocks with the last layer are less alike than the median",
        lies("above", distances("last block minus median")),
        "{:.2f} farther apart ({:.2f} to {:.2f})",
        1,
        "last block minus median",
    ),
    Row(
        "02",
        "Answers stay within 2 points without 3 of 30 layers",
        claimed("equal", "checks", "3 layers: pruned - unpruned"),
        FEWER,
        -100,
    ),
    Row(
        "02",
        "Then they fall sharply (half within a tenth of the depth)",
        lies("above", lambda names: Interval(*names["pooled_fall"][["share", "low", "high"]]), 0.5),
        "{:.0f} % of the fall ({:.0f} to {:.0f})",
        100,
    ),
    Row(
        "03",
        "The unhealed loss jumps where the answers fall",
        jump,
        "answers fall at {:.0f} layers ({:.0f} to {:.0f})",
    ),
    Row(
        "03",
        "The healed loss has no jump (steepness below 2)",
        lies("below", lambda names: names["steep"][names["first_text"], "healed"], 2),
        SHORT,
        1,
        "steepness healed",
    ),
    Row(
        "04",
        "Removing the deepest layers is poor, unhealed",
        decided("below", "verdicts", "accuracy: 8 layers, pruned"),
        FEWER,
        -100,
        "accuracy, simple minus similarity, pruned",
    ),
    Row(
        "04",
        "Once healed, it answers about equally well",
        claimed("equal", "verdicts", "accuracy: 8 layers, healed"),
        FEWER,
        -100,
        "accuracy, simple minus similarity, healed",
    ),
    Row(
        "04",
        "Once healed, its loss is about equal",
        claimed("equal", "verdicts", "loss, xsum: 8 layers, healed"),
        MORE_2,
        1,
        "loss, simple minus similarity, healed",
    ),
    Row(
        "05",
        "The order of shots does not matter",
        claimed("equal", "few", ".*order.*"),
        LARGEST,
        100,
        "largest effect of the order",
    ),
    Row(
        "05",
        "A lower rank has the higher loss, each at its own rate",
        decided("above", "compared", "loss, xsum: rank 2 - 32 at its rate"),
        "{:.3f} nats more ({:.3f} to {:.3f})",
    ),
    Row(
        "05",
        "A lower rank answers better, each at its own rate",
        decided("above", "compared", "accuracy: rank 2 - 32 at its rate"),
        MORE,
        100,
    ),
    Row(
        "06",
        "Perplexity keeps the loss lower than Taylor+, healed",
        decided("above", "verdicts", "B1 loss on XSum, healed"),
        LESS_2,
    ),
    Row(
        "06",
        "Taylor+ answers better than perplexity, healed",
        decided("above", "verdicts", "B1 accuracy, healed"),
        MORE,
        100,
    ),
    Row(
        "06",
        "Magnitude needs its ends protected, unhealed",
        decided("below", "verdicts", r"B5 magnitude at \d+, loss on XSum, pruned"),
        LESS_1,
        -1,
    ),
    Row(
        "07",
        "Fewer layers generate faster (prompt of 12 tokens)",
        lies("below", token_time("depth", 12), 0.95),
        TIME,
    ),
    Row(
        "07",
        "Narrower layers do not (prompt of 12 tokens)",
        lies("above", token_time("width", 12), 0.95),
        TIME,
    ),
    Row(
        "07",
        "Narrower layers do not (prompt of 512 tokens)",
        lies("above", token_time("width", 512), 0.95),
        TIME,
    ),
    Row(
        "08",
        "All weights beat LoRA at 80 % removed, on familiar text",
        decided("below", "verdicts", "QuAC, 24 layers: all weights - LoRA"),
        LESS_2,
        -1,
        "QuAC, 24 layers: all weights - LoRA",
    ),
    Row(
        "08",
        "All weights beat LoRA at 80 % removed, on other text",
        decided("below", "verdicts", "XSum, 24 layers: all weights - LoRA"),
        MORE_2,
        1,
        "XSum, 24 layers: all weights - LoRA",
    ),
    Row(
        "09",
        "Removing the last layers answers best, healed",
        decided("below", "verdicts", "taylor, 8 layers, healed", "accuracy"),
        "{:.1f} points behind Taylor ({:.1f} to {:.1f})",
        100,
    ),
    Row(
        "09",
        "Removing the last layers has the lowest loss, healed",
        decided("above", "verdicts", "taylor, 8 layers, healed", "loss"),
        "{:.1f} nats behind Taylor ({:.1f} to {:.1f})",
        -1,
    ),
    Row(
        "10",
        "Head and last 3 layers beat LoRA (last layers gone)",
        decided("below", "verdicts", r"reverse order: head \+ 3 - LoRA", "xsum"),
        LESS_2,
        -1,
        r"reverse order: head \+ 3 - LoRA",
    ),
    Row(
        "10",
        "They beat LoRA where the last layer stays (Taylor's set)",
        decided("below", "verdicts", r"taylor: head \+ 3 - LoRA", "xsum"),
        MORE_2,
        1,
        r"taylor: head \+ 3 - LoRA",
    ),
    Row(
        "10",
        "They answer better than LoRA (last layers gone)",
        decided(
            "above", "verdicts", r"reverse order: head \+ 3 - LoRA", "accuracy, more questions"
        ),
        MORE,
        100,
    ),
    Row("10", "They train faster than LoRA", lies("below", step_time, 1), "{:.2f} of the time"),
    Row(
        "10",
        "The last layer must stay, healed with LoRA",
        decided("below", "last", "XSum, LoRA: last stays - last goes"),
        LESS_1,
        -1,
    ),
    Row(
        "11",
        "Rounds of removal and healing gain nothing in loss",
        rounds,
        "holds in {0:.0f} of {2:.0f} cases, fails in {1:.0f}",
    ),
    Row(
        "11",
        "The number of samples matters (loss, Taylor, 1 or 50)",
        claimed("differs", "losses", "taylor, 1 windows"),
        LESS_1,
        -1,
    ),
    Row(
        "11",
        "The text to heal on matters for answers",
        claimed("differs", "text_verdicts", "(?!.*plain text).*", "accuracy"),
        LARGEST,
        100,
    ),
    Row(
        "11",
        "One swap undoes over half of the harm (reverse order)",
        swap("reverse order"),
        LESS_1,
        -1,
        r"reverse order, \d+ instead of \d+: minus the set",
    ),
    Row(
        "11",
        "One swap undoes over half of the harm (Taylor's set)",
        swap("taylor"),
        LESS_2,
        -1,
        r"taylor, \d+ instead of \d+: minus the set",
    ),
    Row(
        "12",
        "The recommended recipe beats our best one",
        decided("below", "verdicts", "XSum: the paper's - ours"),
        MORE_1,
        1,
        "XSum: the paper's - ours",
    ),
]


def recorded(notebook: str) -> dict[str, float]:
    """The numbers of a notebook in tests/summaries/cpu.csv."""
    with open(ROOT / "tests" / "summaries" / "cpu.csv", encoding="utf-8", newline="") as file:
        kept = {
            row["name"]: float(row["value"])
            for row in csv.DictReader(file)
            if row["notebook"] == notebook
        }
    if "loss healed" in kept:
        added, left = (
            kept[f"loss {stage}"] - kept["loss unpruned"] for stage in ("pruned", "healed")
        )
        kept["share taken back"] = 1 - left / added
    return kept


def run_cells(path: Path) -> dict:
    """The names that a notebook's code cells define, up to its summary; what they show is
    dropped."""
    names = {"__name__": path.stem, "display": print}
    with contextlib.redirect_stdout(io.StringIO()):
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code" and "summary" not in cell.metadata.get("tags", []):
                exec(compile(cell.source, path.name, "exec"), names)
    return names


def print_rows(asked: list[str]) -> None:
    """Print the rows of the notebooks asked for, by their digits, as the README must hold them."""
    os.environ[results.NO_COMPUTE] = "1"
    os.environ.pop("PRUNING_UTILS_OUTPUT", None)
    plots.save_figure = lambda figure, name, **_: str(ROOT / "figures" / f"{name}.png")
    for digits in asked or NOTEBOOKS:
        path = NOTEBOOKS[digits]
        names = run_cells(path)
        for row in (row for row in ROWS if row.notebook == digits):
            claim, *others = row.cells(names, recorded(path.stem))
            print(
                f"| [{digits}](notebooks/{path.name}) | {claim} | "
                + " | ".join(map(unbroken, others))
                + " |"
            )


def unbroken(cell: str) -> str:
    """A cell that a narrow page breaks before its bracket or nowhere: its other spaces do not
    break."""
    return cell.replace(" ", HARD_SPACE).replace(f"{HARD_SPACE}(", " (")


# --- the tests ------------------------------------------------------------------------------------


def rows_of(text: str) -> list[list[str]]:
    """Cells of all rows of tables whose first cell is a notebook; spaces that do not break count as
    spaces."""
    lines = text.replace(HARD_SPACE, " ").splitlines()
    rows = [line.strip().strip("|").split("|") for line in lines if line.startswith("| [")]
    return [[cell.strip() for cell in row] for row in rows]


def seen(cell: str) -> str:
    """What a reader sees of a cell: of a link its text."""
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", cell)


@pytest.fixture(scope="module")
def worked_out() -> list[list[str]]:
    """All rows as the results give them, from a process of its own: notebooks set states that other
    tests rely on."""
    done = subprocess.run(
        [sys.executable, __file__], cwd=ROOT, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return rows_of(done.stdout)


def test_the_tables_say_what_the_results_say(worked_out):
    shown = rows_of(README)
    wrong, lacking = (
        [row for row in some if row not in others]
        for some, others in ((shown, worked_out), (worked_out, shown))
    )
    assert wrong == lacking == [], (
        f"{wrong} must be {lacking}: `python tests/test_readme.py` prints the rows"
    )
    assert shown == worked_out, "the rows stand in another order"


def test_every_notebook_has_a_row_and_every_verdict_is_a_word_of_ours():
    rows = rows_of(README)
    assert {seen(row[0]) for row in rows} == set(NOTEBOOKS) and len(NOTEBOOKS) == 13
    assert {row[2] for row in rows} <= {evidence.HOLDS, evidence.FAILS, evidence.UNTOLD, "mixed"}
    assert all(len(row) == 4 and re.search(r"\d", row[3]) for row in rows)


def test_cells_are_short():
    cells = [
        seen(cell)
        for line in README.splitlines()
        if line.startswith("|")
        for cell in line.split("|")
    ]
    assert [cell for cell in cells if len(cell.strip()) > WIDTH] == []


def test_the_first_screen_comes_in_order():
    """The finding, on which model and how far it reaches; a picture; two commands; then the first
    table."""
    marks = [
        "SmolLM2-135M-Instruct",
        "nothing has run at the papers' size yet",
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
    assert any(row[3].startswith(f"{shown} behind") for row in rows_of(README)), (
        "the finding's number is in no table"
    )


def test_what_is_yet_to_come_is_said():
    recorded_profiles = {path.stem for path in (ROOT / "tests" / "summaries").glob("*.csv")}
    assert recorded_profiles == {"cpu", "smoke"}, (
        "the README says that no run of the gpu or a100 profile exists"
    )
    listed = ROOT / "results" / "awaiting.csv"
    awaiting = listed.exists() and len(listed.read_text(encoding="utf-8").splitlines()) > 1
    assert ("await recomputation in float32" in PROSE) == awaiting


if __name__ == "__main__":
    print_rows(sys.argv[1:])
