"""Rows of verdicts: their words and columns, what cannot be tested, and the table of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

HOLDS = "holds"
FAILS = "does not hold"
UNTOLD = "cannot be told"
UNTESTABLE = "not testable here"
WORDS = (HOLDS, FAILS, UNTOLD, UNTESTABLE)
ABOVE_MARGIN = "above the margin"  # a claim on a pair
# When a part was named: before tables of the same data had been seen, or after.
BEFOREHAND, AFTERWARDS = "beforehand", "afterwards"
MARK = "\u2021"  # of the latter; a dagger marks trainings that went astray
# Of one part of a claim, and of several.
COUNTED = {
    HOLDS: ("holds", "hold"),
    FAILS: ("does not hold", "do not hold"),
    UNTOLD: ("cannot be told", "cannot be told"),
    UNTESTABLE: ("is not testable here", "are not testable here"),
}

COLUMNS = (
    "claim",
    "part",
    "model",
    "measure",
    "data",
    "depth",
    "recipe",
    "value",
    "low",
    "high",
    "level",
    "kind",
    "n",
    "runs",
    "tokens_per_parameter",
    "unpruned",
    "floor",
    "verdict",
    "notebook",
    "cell",
    "reason",
    "asked",
)
# What tells one row from another.
KEY = ("claim", "part", "model", "measure", "data", "depth", "recipe")
ORDER = ("claim", "part", "model", "data")

# What one of a measure is shown as: a factor and a unit. Others are shown as they are.
UNITS = {
    "accuracy": (100, "points"),
    "pooled accuracy": (100, "points"),
    "loss": (1, "nats"),
    "ratio of times": (1, "of the time"),
    "ratio of memory": (1, "of the memory"),
    "share": (100, "%"),
    "layers that differ": (1, "layers"),
}

# The share of a paper's tokens per parameter below which its claim is not tested.
SMALLEST_BUDGET = 0.1
# How a reason tells of a budget, see untestable_because.
BUDGET = re.compile(r"(\S+) tokens per parameter are less than a tenth of the paper's (\S+)")


def read(path: Path) -> pd.DataFrame:
    """The verdicts of a notebook, as :func:`evidence.save_verdicts` wrote them.

    Empty texts stay texts. An end of an interval may be no number: of the share of a fall where
    nothing falls. Where a file does not say when its parts were named, all were beforehand.
    """
    no_number = dict.fromkeys(("value", "low", "high"), "")
    table = pd.read_csv(path, keep_default_na=False, na_values=no_number)
    return table if "asked" in table else table.assign(asked=BEFOREHAND)


def number(row: object) -> str:
    """Value and interval of a row in the units of its measure, three digits each."""
    factor, unit = UNITS.get(row.measure, (1, ""))  # type: ignore[attr-defined]
    ends = (row.value, row.low, row.high)  # type: ignore[attr-defined]
    value, low, high = (f"{factor * float(end):.3g}".replace("-", "\u2212") for end in ends)
    between = "no interval" if "nan" in (low, high) else f"{low} to {high}"
    return f"{value} {unit}".rstrip() + f" ({between})"


def models_of(verdicts: pd.DataFrame, first: Iterable[str]) -> list[str]:
    """The models of rows: those of ``first`` in its order, then the others as they appear."""
    there = list(dict.fromkeys(verdicts["model"]))
    known = [name for name in first if name in there]
    return known + [name for name in there if name not in known]


def counted(title: str, words: pd.Series) -> str:
    """How many verdicts of a model have which word, as a sentence.

    Args:
        title: What the model is called.
        words: Its verdicts, each one of :data:`WORDS`.
    """
    counts = words.value_counts()
    said = [
        f"{counts[word]} {forms[int(counts[word] > 1)]}"
        for word, forms in COUNTED.items()
        if word in counts
    ]
    parts = "part" if len(words) == 1 else "parts"
    return f"{title}: of {len(words)} {parts} of claims, {listed(said)}."


def listed(words: Sequence[str]) -> str:
    """Words as a list in a sentence: ``one``, ``one and two`` or ``one, two and three``."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def word_for_sign(low: float, high: float, claimed: str) -> str:
    """What an interval says of the claim that a value is ``"above 0"`` or ``"below 0"``."""
    if not (low > 0 or high < 0):
        return UNTOLD
    return HOLDS if (low > 0) == (claimed == "above 0") else FAILS


def word_for_equality(low: float, high: float, margin: float) -> str:
    """What an interval says of the claim that a value is within a margin of 0."""
    if -margin < low and high < margin:
        return HOLDS
    return FAILS if low > margin or high < -margin else UNTOLD


def word_of_pair(pair: Mapping, claimed: str) -> str:
    """What a row of ``evidence.paired_verdicts`` says of a claim, by its p-values after Holm.

    A sign that is claimed fails where the pair is equal within its margin, too; equality fails only
    where the difference is larger than the margin.
    """
    is_equal = pair["p_equal_holm"] <= 0.05
    is_beyond = pair["p_beyond_holm"] <= 0.05
    if claimed == "equal":
        if is_equal:
            return HOLDS
        return FAILS if is_beyond else UNTOLD
    if is_beyond if claimed == ABOVE_MARGIN else pair["p_holm"] <= 0.05:
        return HOLDS if (pair["difference"] > 0) == (claimed != "below 0") else FAILS
    return FAILS if is_equal else UNTOLD


def short_reason(reason: str) -> str:
    """A reason in a word or two, where :func:`budgets_told` says the rest."""
    return "budget" if BUDGET.fullmatch(reason) else reason


def budgets_told(reasons: Iterable[str]) -> str:
    """The budgets among reasons in one sentence, as ranges; "" where there is none.

    Where parts are compared with several budgets of the papers, the sentence tells shares of them:
    the ends of two ranges would not belong together.
    """
    found = [told.groups() for told in map(BUDGET.fullmatch, reasons) if told]
    if not found:
        return ""
    seen, papers = (sorted(set(values), key=float) for values in zip(*found, strict=True))
    told = f"healing saw {as_range(seen[0], seen[-1])} tokens per parameter"
    if len(papers) == 1:
        return f"{told}, less than a tenth of the paper's {papers[0]}"
    shares = [100 * float(own) / float(of_paper) for own, of_paper in found]
    ends = as_range(f"{min(shares):.2g}", f"{max(shares):.2g}")
    return f"{told}, {ends} % of the paper's, where a tenth is asked"


def as_range(low: str, high: str) -> str:
    """Two ends as a range; one alone where they are the same."""
    return " to ".join(dict.fromkeys([low, high]))


def untestable_because(
    levels: Sequence,
    unpruned: object,
    floor: float | None,
    *,
    higher_is_better: bool,
    tokens_per_parameter: float | None,
    paper_tokens_per_parameter: float | None,
) -> str:
    """Why nothing can be said of a claim; "" where something can.

    Raises:
        ValueError: For levels that are one level and no list of them.
    """
    if isinstance(levels, (int, float)) or hasattr(levels, "low"):
        raise ValueError(f"levels must be a list, one level for each side, got {levels!r}")
    if floor is not None:
        if unpruned is not None and not clears(unpruned, floor, higher_is_better):
            side = "above the floor" if higher_is_better else "below ln V"
            return (
                f"the unpruned model is not surely {side}: the measure fails its positive control"
            )
        if not all(clears(level, floor, higher_is_better) for level in levels):
            return (
                "a level is not surely above the floor"
                if higher_is_better
                else "a loss is not surely below ln V"
            )
    if tokens_per_parameter is not None and paper_tokens_per_parameter is not None:
        if tokens_per_parameter < SMALLEST_BUDGET * paper_tokens_per_parameter:
            return (
                f"{tokens_per_parameter:.3g} tokens per parameter are less than a tenth of the "
                f"paper's {paper_tokens_per_parameter:.3g}"
            )
    return ""


def mark_of(row: object) -> str:
    """The mark of a row that was asked afterwards, behind a space; "" for another one."""
    return f" {MARK}" if row.asked == AFTERWARDS else ""  # type: ignore[attr-defined]


def value_of(level: object) -> float:
    """A level as a number: itself, or the value of an interval."""
    return float(getattr(level, "value", level))  # type: ignore[arg-type]


def clears(level: object, floor: float, higher_is_better: bool) -> bool:
    """Whether a level, with its whole interval where it has one, lies on the good side of a floor.

    NaN does not.
    """
    if higher_is_better:
        return float(getattr(level, "low", level)) > floor  # type: ignore[arg-type]
    return float(getattr(level, "high", level)) < floor  # type: ignore[arg-type]


def checked_table(rows: Iterable[Mapping], codes: Iterable[str]) -> pd.DataFrame:
    """Rows as a table with :data:`COLUMNS`, sorted.

    Args:
        rows: From ``evidence.judge``.
        codes: Codes of the claims that there are.

    Raises:
        ValueError: For a row with other columns, an unknown claim, verdict or word of when it was
            asked, or rows with one key.
    """
    rows = list(rows)
    for row in rows:
        if set(row) != set(COLUMNS):
            wrong = sorted(set(row) ^ set(COLUMNS))
            raise ValueError(f"a row of verdicts comes from evidence.judge; columns {wrong} differ")
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    allowed_in = {"claim": codes, "verdict": WORDS, "asked": (BEFOREHAND, AFTERWARDS)}
    for column, allowed in allowed_in.items():
        unknown = sorted(set(table[column]) - set(allowed))
        if unknown:
            raise ValueError(f"{column} must be one of {sorted(allowed)}, got {unknown}")
    repeated = table[table.duplicated(list(KEY))]
    if len(repeated):
        key = repeated.iloc[0][list(KEY)].to_dict()
        raise ValueError(f"two verdicts have one key, {key}: name the part that tells them apart")
    return table.sort_values(list(ORDER), kind="stable", ignore_index=True)
