"""Numbers of two runs side by side: summary numbers by their tolerances, tables by columns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from pruning_utils import embedded

COLUMNS = ["notebook", "name", "value", "tolerance", "reason"]


@dataclass(frozen=True)
class Comparison:
    """One number or table in the committed and the new run.

    Attributes:
        item: What is compared.
        committed: What the committed run has there.
        new: What the new run has there.
        difference: How far they are apart.
        fault: What is wrong; "" when nothing is.
    """

    item: str
    committed: str
    new: str
    difference: str = ""
    fault: str = ""


def report(comparisons: list[Comparison]) -> str:
    """The comparisons as an aligned table of text."""
    lines = [("", "committed", "new", "difference", "")]
    for row in comparisons:
        lines.append((row.item, row.committed, row.new, row.difference, row.fault or "ok"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = []
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        aligned.append("  ".join(cells).rstrip())
    return "\n".join(aligned)


def summary_table(rows: dict[str, list[dict]]) -> pd.DataFrame:
    """Summary rows by notebook as one table of texts, floats to six digits."""
    named = [{"notebook": name, **row} for name in sorted(rows) for row in rows[name]]
    return pd.DataFrame(named, columns=COLUMNS).map(_as_text)


def _as_text(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def read_summaries(path: Path) -> pd.DataFrame:
    """A recorded summary table; an empty one where there is no file."""
    if not path.exists():
        return pd.DataFrame(columns=COLUMNS)
    return read_texts(path)


def read_texts(path: Path) -> pd.DataFrame:
    """A table's file with all its cells as texts."""
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def summaries_text(tables: list[pd.DataFrame]) -> str:
    """Summary tables of different notebooks as one file's text, by notebook."""
    table = pd.concat(tables).sort_values("notebook", kind="stable")
    return table.to_csv(index=False, lineterminator="\n")


def compare_summaries(committed: pd.DataFrame, new: pd.DataFrame) -> list[Comparison]:
    """Every summary number of either run, by name.

    A fault is a number that moved beyond its committed tolerance, one with another tolerance, or
    one that stands alone. One of an embedded model that is not installed may be missing.
    """
    there = _by_item(committed)
    here = _by_item(new)
    items = sorted({**there, **here})
    return [_compare_number(item, there.get(item), here.get(item)) for item in items]


def _by_item(table: pd.DataFrame) -> dict[str, dict]:
    """Summary rows by their notebook and name."""
    return {f"{row['notebook']}: {row['name']}": row for row in table.to_dict("records")}


def _compare_number(item: str, committed: dict | None, new: dict | None) -> Comparison:
    if committed is None:
        return Comparison(item, "-", new["value"] if new else "-", fault="new")
    if new is None:
        of_absent = any(f" {model}," in item for model in _absent_models())
        return Comparison(item, committed["value"], "-", fault="" if of_absent else "missing")
    before = committed["value"]
    after = new["value"]
    if committed["tolerance"] != new["tolerance"]:
        fault = f"tolerance {committed['tolerance']} became {new['tolerance']}"
        return Comparison(item, before, after, fault=fault)
    try:
        difference = float(after) - float(before)
    except ValueError:
        return Comparison(item, before, after, fault="" if before == after else "changed")
    allowed = float(committed["tolerance"])
    # Six digits are compared: a difference of exactly the tolerance must not fail by its last bit.
    moved = abs(difference) > allowed + 1e-9 * max(abs(float(before)), allowed)
    fault = f"beyond {allowed:.3g}" if moved else ""
    return Comparison(item, before, after, f"{difference:.3g}", fault)


def compare_tables(
    committed: Path, new: Path, notebooks: list[str], tolerance: float
) -> list[Comparison]:
    """Tables in either folder of results, by name; measured ones are left out.

    A table must have the same columns and rows. Texts must be equal; the numbers of a column may
    differ by ``tolerance`` times the column's largest absolute value.

    Args:
        committed: The folder of one profile's committed results.
        new: The folder of the new ones.
        notebooks: Those whose committed tables are compared; of the new tables all are. Those of
            an embedded model that is not installed may be missing, and its rows in others.
        tolerance: A share, at least 0.
    """
    names = {name for name in _tables_in(committed) if name.partition("/")[0] in notebooks}
    names |= _tables_in(new)
    compared = []
    for name in sorted(names):
        if not (new / name).exists():
            fault = "" if _is_of_absent_model(name) else "missing"
            compared.append(Comparison(name, "table", "-", fault=fault))
        elif not (committed / name).exists():
            compared.append(Comparison(name, "-", "table", fault="new"))
        else:
            found = read_texts(new / name)
            asked = _without_absent_models(read_texts(committed / name), found)
            compared.append(_compare_table(name, asked, found, tolerance=tolerance))
    return compared


def _absent_models() -> list[str]:
    """Embedded models whose packages are not installed here."""
    return [model for model in embedded.MODELS if not embedded.is_installed(model)]


def _is_of_absent_model(name: str) -> bool:
    """Whether a table is that of an embedded model that is not installed."""
    return any(f"{Path(name).stem}-".startswith(f"{model}-") for model in _absent_models())


def _without_absent_models(committed: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
    """The rows of a table of several models, but for those of a model that could not be computed.

    A table of several models names them in a column ``model``.
    """
    if "model" not in committed or "model" not in new:
        return committed
    lacking = [model for model in _absent_models() if not new["model"].eq(model).any()]
    return committed[~committed["model"].isin(lacking)].reset_index(drop=True)


def _tables_in(folder: Path) -> set[str]:
    """Tables of a profile's results as ``<notebook>/<file>``."""
    found = [path for path in folder.glob("*/*.csv") if not path.stem.endswith(".measured")]
    return {path.relative_to(folder).as_posix() for path in found}


def _compare_table(
    name: str, committed: pd.DataFrame, new: pd.DataFrame, *, tolerance: float
) -> Comparison:
    before = f"{len(committed)} rows"
    after = f"{len(new)} rows"
    if list(committed.columns) != list(new.columns):
        other = sorted(set(committed.columns) ^ set(new.columns))
        fault = f"columns differ: {', '.join(other) or 'their order'}"
        return Comparison(name, before, after, fault=fault)
    if len(committed) != len(new):
        return Comparison(name, before, after, fault="rows differ")
    shares = {column: _share(committed[column], new[column]) for column in committed.columns}
    beyond = [f"{column} by {share:.2g}" for column, share in shares.items() if share > tolerance]
    difference = f"{max(shares.values()):.2g} of the largest"
    fault = f"beyond {tolerance:g}: {', '.join(beyond)}" if beyond else ""
    return Comparison(name, before, after, difference, fault)


def _share(committed: pd.Series, new: pd.Series) -> float:
    """Largest difference in a column as a share of its largest absolute value.

    It is infinite where texts or gaps differ.
    """
    changed = committed != new
    if not changed.any():
        return 0.0
    before = pd.to_numeric(committed, errors="coerce")
    after = pd.to_numeric(new, errors="coerce")
    difference = (after - before)[changed].abs()
    largest = before[before.abs() != float("inf")].abs().max()
    if difference.notna().all() and largest > 0:
        return float(difference.max() / largest)
    return float("inf")
