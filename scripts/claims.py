"""The README's picture and tables of verdicts, from the verdicts.csv of every notebook.

Run ``.venv/bin/python scripts/claims.py`` when a notebook has new verdicts: it draws
``figures/verdicts`` and writes what stands between the two marks in the README.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import pandas as pd

from pruning_utils import embedded, plots, runtime, verdict_plots
from pruning_utils.engine import verdict_rows
from pruning_utils.plots import NAMES

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
FIRST, LAST = "<!-- verdicts: written by scripts/claims.py -->", "<!-- end of verdicts -->"
PAPERS = {
    "gromov": "Gromov et al., *The Unreasonable Ineffectiveness of the Deeper Layers* "
    "([arXiv:2403.17887](https://arxiv.org/abs/2403.17887))",
    "shortened": "Kim et al., *Shortened LLaMA* "
    "([arXiv:2402.02834](https://arxiv.org/abs/2402.02834))",
    "reassessing": "Lu et al., *Reassessing Layer Pruning in LLMs* "
    "([arXiv:2411.15558](https://arxiv.org/abs/2411.15558))",
    "all three": "All three papers",
}
# Of the same papers in the picture: whose they are.
HEADINGS = {paper: title.partition(", ")[0] for paper, title in PAPERS.items()}
# What the reasons for "not testable here" say, and what the README says of them.
REASONS = {
    "tokens per parameter": "healing was too short",
    "above the floor": "a level is not surely above its floor",
    "below ln V": "a loss is not surely below ln V",
    "same layers": "both rules remove the same layers",
}
FIGURE = ROOT / "figures" / "verdicts"
HARD_SPACE = "\u00a0"


def verdict_files(folder: Path) -> list[Path]:
    """The verdicts of all notebooks in a profile's folder of results."""
    return sorted(folder.glob("*/verdicts.csv"))


def read_verdicts(folder: Path) -> pd.DataFrame:
    """All rows of all notebooks of a profile's folder of results, by notebook."""
    tables = [verdict_rows.read(path) for path in verdict_files(folder)]
    return pd.concat(tables, ignore_index=True)


def section(verdicts: pd.DataFrame, claims: pd.DataFrame) -> str:
    """A sentence that counts the verdicts of each model, then a table a paper.

    Args:
        verdicts: Rows of :data:`verdict_rows.COLUMNS`.
        claims: ``reference/claims.csv``: columns ``id``, ``paper`` and ``claim``.
    """
    parts = ["\n".join([*_counts(verdicts), *_reasons(verdicts), *_later(verdicts)])]
    paper_of = claims.set_index("id")["paper"]
    for paper, title in PAPERS.items():
        rows = verdicts[verdicts["claim"].map(paper_of) == paper]
        if len(rows):
            parts += [f"### {title}", _table(rows, claims)]
    return "\n\n".join(parts) + "\n"


def longer(verdicts: pd.DataFrame, claims: pd.DataFrame) -> str:
    """The same of parts that were asked again at the ``gpu`` profile; arguments as there."""
    said = "These parts were asked again after longer healing, at the `gpu` profile."
    counted = " ".join([said, *_counts(verdicts)])
    return "\n\n".join(["### Healed for longer", counted, _table(verdicts, claims)]) + "\n"


def _counts(verdicts: pd.DataFrame) -> list[str]:
    """A sentence a model, of how many parts have which verdict."""
    words = verdicts.set_index("model")["verdict"]
    return [
        verdict_rows.counted(NAMES.get(model, model), words.loc[[model]])
        for model in verdict_rows.models_of(verdicts, embedded.MODELS)
    ]


def _reasons(verdicts: pd.DataFrame) -> list[str]:
    """A sentence a model, of why so many of its parts cannot be tested."""
    untestable = verdicts[verdicts["verdict"] == verdict_rows.UNTESTABLE]
    told = []
    for model in verdict_rows.models_of(untestable, embedded.MODELS):
        reasons = untestable.loc[untestable["model"] == model, "reason"]
        counts = {said: int(reasons.str.contains(key).sum()) for key, said in REASONS.items()}
        if sum(counts.values()) != len(reasons):
            raise ValueError(f"a reason is none of {list(REASONS)}: {sorted(set(reasons))}")
        parts = "1 part is" if len(reasons) == 1 else f"{len(reasons)} parts are"
        of_model = f"On {NAMES.get(model, model)} {parts} not testable."
        listed = [f"In {number} {said}." for said, number in counts.items() if number]
        told.append(" ".join([of_model, *listed]))
    return told


def _later(verdicts: pd.DataFrame) -> list[str]:
    """A sentence on the parts that were not named beforehand; none where all were."""
    number = int(verdicts["asked"].eq(verdict_rows.AFTERWARDS).sum())
    said = (
        f"{verdict_rows.MARK} marks parts that were not named beforehand, {number} of "
        f"{len(verdicts)}: they were added later, or their models were healed anew."
    )
    return [said] if number else []


def _table(rows: pd.DataFrame, claims: pd.DataFrame) -> str:
    """A part of a claim a row, with the verdict and number of each model; the claims below.

    Parts that can be tested on no model are counted, not listed.
    """
    models = verdict_rows.models_of(rows, embedded.MODELS)
    lines = [
        "| claim | part | " + " | ".join(NAMES.get(name, name) for name in models) + " |",
        "| --- | --- |" + " --- |" * len(models),
    ]
    untestable: dict[str, int] = {}
    keys = ["claim", "notebook", "part", "measure", "data", "recipe"]
    turn = rows.groupby([*keys, "model"]).cumcount()  # a part may be asked at two depths
    for (claim, notebook, part, measure, data, *_), found in rows.groupby(
        [*keys, turn], sort=False
    ):
        if (found["verdict"] == verdict_rows.UNTESTABLE).all():
            untestable[claim] = untestable.get(claim, 0) + 1
            continue
        said = {row.model: _said(row) for row in found.itertuples()}
        cells = " | ".join(said.get(name, "not asked") for name in models)
        where = f"{claim}, [{notebook[:2]}](notebooks/{notebook}.ipynb)".replace(" ", HARD_SPACE)
        lines.append(f"| {where} | {part}<br>*{measure}, {data}* | {cells} |")
    words = claims.set_index("id")["claim"]
    legend = [f"- {claim}: {words[claim]}." for claim in dict.fromkeys(rows["claim"])]
    if untestable:
        counts = verdict_rows.listed(
            [f"{number} of {claim}" for claim, number in untestable.items()]
        )
        legend.insert(0, f"Not testable here: {counts}. The notebooks say why.\n")
    table = lines if len(lines) > 2 else []
    return "\n".join([*table, "", *legend]).strip("\n")


def _said(row: object) -> str:
    """Verdict, number, interval and depth, each on a line that a narrow page does not break."""
    number = verdict_rows.number(row).replace(" (", "<br>(").replace(" ", HARD_SPACE)
    depth = str(row.depth).replace(" ", HARD_SPACE)  # type: ignore[attr-defined]
    mark = verdict_rows.mark_of(row)
    return f"**{row.verdict}**{mark}<br>{number}<br>{depth}"  # type: ignore[attr-defined]


def written(readme: str, folder: Path) -> str:
    """The README with the section that the results of the profiles give, in ``results/``."""
    before, _, rest = readme.partition(f"{FIRST}\n")
    after = rest.partition(f"{LAST}\n")[2]
    claims = pd.read_csv(ROOT / "reference" / "claims.csv")
    found = section(read_verdicts(folder / "cpu"), claims)
    if (folder / "gpu").is_dir():
        found = f"{found.rstrip()}\n\n{longer(read_verdicts(folder / 'gpu'), claims)}"
    return f"{before}{FIRST}\n{found}{LAST}\n{after}"


def draw(folder: Path, path: Path) -> None:
    """Draw all verdicts of a profile's folder of results, as PDF and PNG of this name.

    The files hold the digest of each table of verdicts.
    """
    verdicts = read_verdicts(folder)
    models = verdict_rows.models_of(verdicts, embedded.MODELS)
    claims = pd.read_csv(ROOT / "reference" / "claims.csv")
    figure = verdict_plots.verdict_marks(
        verdicts.sort_values("model", key=lambda names: names.map(models.index), kind="stable"),
        claims.assign(paper=claims["paper"].map(HEADINGS)),
    )
    plots.write_figure(figure, path, origin=origin(folder))


def origin(folder: Path) -> str:
    """Each table of verdicts of a profile's folder, with the digest of its bytes."""
    return "; ".join(
        f"{path.parent.name}/{path.name} sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}"
        for path in verdict_files(folder)
    )


def main(words: list[str] | None = None) -> None:
    """Draw the picture, and write the section into the README."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(words)
    draw(ROOT / "results" / "cpu", FIGURE)
    readme = README.read_text(encoding="utf-8")
    with runtime.atomic_path(README) as temporary:
        temporary.write_text(written(readme, ROOT / "results"), encoding="utf-8")


if __name__ == "__main__":
    main()
