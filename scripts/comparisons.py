"""Numbers of two runs side by side: summary numbers by their own tolerances, tables column by
column."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

COLUMNS = ["notebook", "name", "value", "tolerance", "reason"]


@dataclass(frozen=True)
class Comparison:
    """One number or table in the committed and the new run; ``fault`` says what is wrong, "" when
    nothing is."""

    item: str
    committed: str
    new: str
    difference: str = ""
    fault: str = ""


def report(comparisons: list[Comparison]) -> str:
    """The comparisons as an aligned table of text."""
    lines = [
        ("", "committed", "new", "difference", ""),
        *(
            (row.item, row.committed, row.new, row.difference, row.fault or "ok")
            for row in comparisons
        ),
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def summary_table(rows: dict[str, list[dict]]) -> pd.DataFrame:
    """Summary rows by notebook as one table of texts, floats to six digits."""
    found = pd.DataFrame(
        [{"notebook": name, **row} for name in sorted(rows) for row in rows[name]], columns=COLUMNS
    )
    return found.map(lambda value: f"{value:.6g}" if isinstance(value, float) else str(value))


def read_summaries(path: Path) -> pd.DataFrame:
    """A recorded summary table; an empty one where there is no file."""
    return (
        pd.read_csv(path, dtype=str, keep_default_na=False)
        if path.exists()
        else pd.DataFrame(columns=COLUMNS)
    )


def summaries_text(tables: list[pd.DataFrame]) -> str:
    """Summary tables of different notebooks as one file's text, by notebook."""
    return (
        pd.concat(tables)
        .sort_values("notebook", kind="stable")
        .to_csv(index=False, lineterminator="\n")
    )


def compare_summaries(committed: pd.DataFrame, new: pd.DataFrame) -> list[Comparison]:
    """Every summary number of either run, by name.

    A fault is a number that moved beyond its committed tolerance, one with another tolerance, or
    one that stands alone.
    """
    there, here = (
        {f"{row['notebook']}: {row['name']}": row for row in table.to_dict("records")}
        for table in (committed, new)
    )
    return [
        _compare_number(item, there.get(item), here.get(item)) for item in sorted({**there, **here})
    ]


def _compare_number(item: str, committed: dict | None, new: dict | None) -> Comparison:
    if committed is None or new is None:
        return Comparison(
            item,
            committed["value"] if committed else "-",
            new["value"] if new else "-",
            fault="missing" if committed else "new",
        )
    before, after = committed["value"], new["value"]
    if committed["tolerance"] != new["tolerance"]:
        return Comparison(
            item,
            before,
            after,
            fault=f"tolerance {committed['tolerance']} became {new['tolerance']}",
        )
    try:
        difference = float(after) - float(before)
    except ValueError:
        return Comparison(item, before, after, fault="" if before == after else "changed")
    allowed = float(committed["tolerance"])
    # Six digits are compared, so a difference of exactly the tolerance must not fail by its last
    # bit.
    moved = abs(difference) > allowed + 1e-9 * max(abs(float(before)), allowed)
    return Comparison(
        item, before, after, f"{difference:.3g}", f"beyond {allowed:.3g}" if moved else ""
    )


def compare_tables(
    committed: Path, new: Path, notebooks: list[str], tolerance: float
) -> list[Comparison]:
    """Every table of these notebooks in either folder of results, and any other new one; measured
    ones left out.

    A table must have the same columns and rows. Texts must be equal; the numbers of a column may
    differ by ``tolerance`` times the column's largest absolute value.
    """
    names = {
        path.relative_to(folder).as_posix()
        for folder in (committed, new)
        for path in folder.glob("*/*.csv")
        if not path.stem.endswith(".measured") and (path.parent.name in notebooks or folder == new)
    }
    compared = []
    for name in sorted(names):
        if missing := [folder for folder in (committed, new) if not (folder / name).exists()]:
            gone = new in missing
            compared.append(
                Comparison(
                    name,
                    "table" if gone else "-",
                    "-" if gone else "table",
                    fault="missing" if gone else "new",
                )
            )
        else:
            compared.append(
                _compare_table(
                    name,
                    *(
                        pd.read_csv(folder / name, dtype=str, keep_default_na=False)
                        for folder in (committed, new)
                    ),
                    tolerance,
                )
            )
    return compared


def _compare_table(
    name: str, committed: pd.DataFrame, new: pd.DataFrame, tolerance: float
) -> Comparison:
    sizes = [f"{len(table)} rows" for table in (committed, new)]
    if list(committed.columns) != list(new.columns):
        other = sorted(set(committed.columns) ^ set(new.columns))
        return Comparison(
            name, *sizes, fault=f"columns differ: {', '.join(other) or 'their order'}"
        )
    if len(committed) != len(new):
        return Comparison(name, *sizes, fault="rows differ")
    shares = {column: _share(committed[column], new[column]) for column in committed.columns}
    beyond = [f"{column} by {share:.2g}" for column, share in shares.items() if share > tolerance]
    return Comparison(
        name,
        *sizes,
        f"{max(shares.values()):.2g} of the largest",
        f"beyond {tolerance:g}: {', '.join(beyond)}" if beyond else "",
    )


def _share(committed: pd.Series, new: pd.Series) -> float:
    """Largest difference in a column over its largest absolute value; infinite where texts or gaps
    differ."""
    changed = committed != new
    if not changed.any():
        return 0.0
    before, after = (pd.to_numeric(column, errors="coerce") for column in (committed, new))
    difference = (after - before)[changed].abs()
    largest = before[before.abs() != float("inf")].abs().max()
    return (
        float(difference.max() / largest)
        if difference.notna().all() and largest > 0
        else float("inf")
    )
