"""The collection as a reader finds it: notebooks run, results are fresh, figures show them, the
README's code works."""

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import comparisons
import nbformat
import notebook_files
import pandas as pd
import parameters
import pytest
import rehearsal
import run_notebooks
import small_hub
from huggingface_hub import constants
from PIL import Image
from smoke_groups import SHARED_TABLES, folder_name, scope

from pruning_utils import data, engine, pages, results, runtime

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pruning_utils"
# Verdicts are no table that is computed, but what a notebook says of its tables.
TABLES = sorted(
    path
    for path in (ROOT / "results").glob("*/*/*.csv")
    if ".measured" not in path.name and path.name != "verdicts.csv"
)
# Executed copies at other profiles than cpu.
COPIES = sorted((ROOT / "results").glob("*/notebooks/*.ipynb"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
# That of all verdicts is drawn by scripts/claims.py, see test_readme.
FIGURES = sorted({*(ROOT / "figures").rglob("*.png")} - {ROOT / "figures" / "verdicts.png"})
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


BOOKS = {path.stem[:2]: notebook_files.read_notebook(path) for path in NOTEBOOKS}
PARAMETERS = {digits: notebook_files.parameters_of(book, digits) for digits, book in BOOKS.items()}
MOST_PARAMETERS = 12
# 00 has no verdicts, and 13 says what it finds of any model in a computed cell.
UNSAID = ("00_quickstart", "13_your_own_model")
# Run with the embedded model's own weights at the smoke profile; the others with a stand-in.
REAL = ("00_quickstart", "01_layer_similarity")


def run(*command, cwd=ROOT, **variables):
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PRUNING_UTILS_OUTPUT")
    }
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=environment | variables,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_notebooks_that_share_tables_run_on_one_worker():
    """The scopes that conftest's scheduler hands out whole."""
    test = "tests/test_notebooks.py::test_smoke_notebook_gives_the_recorded_numbers[{}]"
    scopes = {path.stem[:2]: scope(test.format(path.stem)) for path in NOTEBOOKS}
    for group in SHARED_TABLES:
        assert len({scopes[digits] for digits in group}) == 1
    assert len(set(scopes.values())) == len(SHARED_TABLES) + 4, "00, 01, 02 and 13 stand alone"
    assert scope("tests/test_data.py::test_a[02_x]") == "tests/test_data.py::test_a[02_x]"


# --- parameters -----------------------------------------------------------------------------------


def vocabulary() -> dict[str, list[str]]:
    """The rows of the table of parameters in notebooks/README.md: by name the other cells."""
    _, _, section = (ROOT / "notebooks" / "README.md").read_text().partition("## Parameters\n")
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    names = [row[0].strip("`") for row in rows]
    assert len(names) == len(set(names)), "a row for each name"
    return dict(zip(names, [row[1:] for row in rows], strict=True))


def numbers_of(cell: str) -> set[str]:
    """The notebooks that a cell such as ``all but 02, 03``, ``04 to 12`` or ``05`` names."""
    said = re.findall(r"\d\d", cell)
    if cell.startswith("all"):
        return set(BOOKS) - set(said)
    return {digits for digits in BOOKS if said[0] <= digits <= said[-1]}


def test_a_notebook_has_few_parameters_and_each_is_explained():
    counts = {digits: len(values) for digits, values in PARAMETERS.items()}
    assert max(counts.values()) <= MOST_PARAMETERS, counts
    bare = []
    for digits, book in BOOKS.items():
        (cell,) = (cell for cell in book.cells if notebook_files.has_tag(cell, "parameters"))
        lines = cell.source.splitlines()
        for statement in ast.parse(cell.source).body:
            own = lines[statement.lineno - 1 : statement.end_lineno]
            if not any(re.search(r"  # \S", line) for line in own):
                bare.append((digits, own[0]))
    assert bare == [], "each has its meaning and unit beside it"


def test_parameters_are_those_of_the_table():
    found = vocabulary()
    named = {name for values in PARAMETERS.values() for name in values}
    assert set(found) == named
    for name, (meaning, keys, where) in found.items():
        having = {digits for digits, values in PARAMETERS.items() if name in values}
        assert numbers_of(where) == having and meaning, name
        own = [PARAMETERS[digits][name] for digits in having]
        settings = [value for value in own if isinstance(value, dict)]
        if name in parameters.CHOSEN_KEYS:
            settings = []
        assert set(re.findall(r"\w+", keys)) == set().union(*settings), name


def test_a_name_of_a_parameter_means_nothing_else_in_any_notebook():
    named = {name for values in PARAMETERS.values() for name in values}
    reused = []
    for digits, book in BOOKS.items():
        for cell in book.cells:
            if cell.cell_type != "code" or notebook_files.has_tag(cell, "parameters"):
                continue
            for node in ast.walk(ast.parse(cell.source)):
                is_set = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
                if is_set and node.id in named:
                    reused.append((digits, cell.id, node.id))
    assert reused == []


def test_a_check_that_fails_says_what_it_asks_for():
    """It may fail after hours, for a model that was not made for it."""
    bare = [
        (digits, cell.id, ast.unparse(node))
        for digits, book in BOOKS.items()
        for cell in book.cells
        if cell.cell_type == "code"
        for node in ast.walk(ast.parse(cell.source))
        if isinstance(node, ast.Assert) and not isinstance(node.msg, (ast.Constant, ast.JoinedStr))
    ]
    assert bare == []


def test_the_idea_that_a_notebook_shows_is_something_that_a_reader_can_call():
    shown = [
        (digits, name)
        for digits, book in BOOKS.items()
        for cell in book.cells
        for name in re.findall(r'pages\.source\("(.+?)"\)', cell.source)
    ]
    assert {digits for digits, _ in shown} == set(BOOKS)
    private = [(digits, name) for digits, name in shown if "._" in name]
    # Removal in rounds is a step of the study, which none calls alone.
    assert private == [("11", "studies.study.Study._in_rounds")]


# --- runs -----------------------------------------------------------------------------------------

# What takes seconds to import, and only computes.
COMPUTING = ("torch", "transformers", "peft", "datasets", "bitsandbytes", "accelerate", "lm_eval")
# Modules that are imported when something is computed, or planned, with them.
IMPORTED_LATER = {f"pruning_utils.engine.{name}" for name in (*engine.LATER, "trainer")}
IMPORTED_LATER |= {f"pruning_utils.planning.{name}" for name in ("machines", "rehearsal", "stages")}


def without_imports(folder: Path) -> str:
    """A PYTHONPATH on which importing what computes fails, in a way that no library takes for a
    package that is not installed."""
    folder.mkdir()
    for name in COMPUTING:
        (folder / f"{name}.py").write_text(f"raise AssertionError('{name} is imported')\n")
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


def test_what_computes_is_imported_only_to_compute(tmp_path):
    """Every module of the package, and all that a notebook imports, before anything runs."""
    modules = {
        "pruning_utils." + path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py" and "tasks" not in path.parts
    }
    assert modules > IMPORTED_LATER
    imports = [f"import {module}" for module in sorted(modules - IMPORTED_LATER)]
    for book in BOOKS.values():
        cells = [cell.source for cell in book.cells if cell.cell_type == "code"]
        imports += [
            ast.unparse(node)
            for node in ast.walk(ast.parse("\n".join(cells)))
            if isinstance(node, (ast.Import, ast.ImportFrom))
        ]
    path = without_imports(tmp_path / "refusing")
    run("-c", "\n".join(imports), PYTHONPATH=path)
    # What fails to be imported is tried anew by the next that imports it.
    tried = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except AssertionError as error:
        assert "is imported" in str(error), error
    else:
        sys.exit(f"{name} computes nothing, name it no longer")
"""
    run("-c", tried, *sorted(IMPORTED_LATER), PYTHONPATH=path)


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory) -> dict[str, str]:
    """What a notebook needs in its environment to find the stand-in of the embedded model."""
    home = tmp_path_factory.mktemp("hub")
    config = rehearsal.configuration(rehearsal.SMOLLM2, ROOT / "reference", short=True)
    documents = data.documents("xsum", "calibration")
    small_hub.place_model(home / "hub", rehearsal.SMOLLM2, config, documents)
    return small_hub.environment(home)


@pytest.fixture
def drive(monkeypatch):
    """The driver, in this process: to start one for each notebook takes as long as some runs."""

    def call(*words, **variables):
        for name in [name for name in os.environ if name.startswith("PRUNING_UTILS_OUTPUT")]:
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        # What this process has read of them already.
        for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE"):
            if name in variables:
                value = variables[name] == "1" if name.endswith("OFFLINE") else variables[name]
                monkeypatch.setattr(constants, name, value)
        assert run_notebooks.main([*map(str, words)]) == 0

    return call


def smoke(name: str, folder: Path) -> tuple:
    """Words for the driver, to run a notebook at the smoke profile."""
    return "--profile", "smoke", "--only", name, "--output", folder


def assert_recorded(name: str, folder: Path, recorded: str) -> None:
    """That an executed notebook shows the summary numbers of a file in tests/summaries."""
    executed = nbformat.read(folder / "notebooks" / f"{name}.ipynb", as_version=4)
    new = comparisons.summary_table({name: notebook_files.summary_rows(executed)})
    old = comparisons.read_summaries(ROOT / "tests" / "summaries" / f"{recorded}.csv")
    compared = comparisons.compare_summaries(old[old["notebook"] == name], new)
    assert compared and [row for row in compared if row.fault] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_smoke_notebook_gives_the_recorded_numbers(name, drive, tmp_path_factory):
    """With the real weights; ``make regress`` runs the others with them too."""
    folder = tmp_path_factory.getbasetemp() / folder_name(name)
    drive(*smoke(name, folder))
    assert_recorded(name, folder, "smoke")


@pytest.mark.slow
@pytest.mark.parametrize("name", [path.stem for path in NOTEBOOKS if path.stem not in REAL])
def test_smoke_notebook_on_a_stand_in_gives_the_recorded_numbers(
    name, stand_in, drive, tmp_path_factory
):
    """A narrow model of fewer layers: the code of the cells is asked, not the weights."""
    folder = tmp_path_factory.getbasetemp() / f"narrow {folder_name(name)}"
    words = ["-p", f"model={rehearsal.SMOLLM2}"]
    for key, value in rehearsal.OF_SHORT.get(name, {}).items():
        words += ["-p", f"{key}={json.dumps(value)}"]
    drive(*smoke(name, folder), *words, **stand_in)
    assert_recorded(name, folder, "rehearsal-smoke")


@pytest.mark.slow
@pytest.mark.parametrize("name", [path.stem for path in NOTEBOOKS])
def test_figures_redraw_from_committed_results_without_a_model(name, drive, tmp_path):
    """With an empty cache and no embedded weights to be had, nothing but the tables can be the
    source. The kernel imports nothing that computes, nor does the driver, asked once."""
    drawn = [path for path in FIGURES if path.name.startswith(name)]
    before = {path: path.read_bytes() for path in drawn}
    before |= {path.with_suffix(".pdf"): path.with_suffix(".pdf").read_bytes() for path in drawn}
    assert before
    cache = tmp_path / "cache"
    cache.mkdir()
    words = ["--figures", "--only", name]
    variables = {
        "PRUNING_UTILS_CACHE": str(cache),
        "PYTHONPATH": without_imports(tmp_path / "refusing"),
    }
    # In a process of its own, where what computes cannot be imported.
    if name.startswith("04"):
        run("scripts/run_notebooks.py", *words, **variables)
        drive(*words, "--profile", "gpu", **variables)  # it has figures of this profile too
    else:
        drive(*words, **variables)
    assert not any(cache.iterdir()), "no model was unpacked"
    assert {path.name for path in before if path.read_bytes() != before[path]} == set(), (
        "redrawn to the byte"
    )


@pytest.mark.parametrize(
    "path", TABLES, ids=lambda path: f"{path.parts[-3]}-{path.parts[-2]}-{path.stem}"
)
def test_results_are_fresh(path):
    assert results.stale(path) == [], (
        "computed by other code than this: run the notebook with --recompute"
    )
    assert results.read_record(path)["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


# A number with the ends of its interval, such as "0.467 nats (−0.872 to 1.81)"; a word or a unit
# may stand between them. On a page "lower by 0.4" is the −0.4 of a table, so signs are left out.
INTERVAL = re.compile(r"([\d.]+)[^\d()]*\(\D?([\d.]+) to \D?([\d.]+)\)")


def intervals(text: str) -> set[tuple[str, ...]]:
    """Each value with the ends of its interval, the smaller first, without signs."""
    return {(value, *sorted(ends, key=float)) for value, *ends in INTERVAL.findall(text)}


@pytest.mark.parametrize("name", [path.stem for path in NOTEBOOKS])
def test_the_first_cell_says_a_finding_of_the_saved_verdicts(name):
    if name in UNSAID:
        return
    first = BOOKS[name[:2]].cells[0].source
    (said,) = re.findall(r"^\*\*(.*?)\*\*$", first, re.DOTALL | re.MULTILINE)
    assert intervals(said)
    assert intervals(said) <= intervals(pages.findings(name).markdown)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_long_code_is_folded(path):
    notebook = nbformat.read(path, as_version=4)
    notebook_files.fold_long_code(notebook)
    assert notebook == nbformat.read(path, as_version=4), "run the notebook: that folds it"


def test_one_training_has_the_same_rows_in_each_table_that_holds_it():
    """Notebooks 09, 10 and 12 compare some of the same models, healed for longer."""
    tables = sorted((ROOT / "results" / "cpu").glob("*/smollm2-135m-longer.csv"))
    held = [pd.read_csv(path) for path in tables]
    rows = pd.concat([table for table in held if "layers" in table])
    of_item = rows.groupby(["layers", "recipe", "seed", "dataset", "item", "start"], dropna=False)
    assert (of_item["nll"].nunique() == 1).all()
    assert (of_item.size() > 1).sum() == 8 * 116, "eight trainings are in two tables"


def test_an_interval_in_words_is_that_of_a_table():
    said = intervals("it loses 0.467 points (−0.872 to 1.81), or 5.87 of them (4.07 to 7.66)")
    assert said == {("0.467", "0.872", "1.81"), ("5.87", "4.07", "7.66")}
    assert said == intervals("−0.467 points (−1.81 to 0.872)<br>−5.87 points (−7.66 to −4.07)")
    assert intervals("5.86 nats (5.71 to 6)") != intervals("5.86 nats (5.71 to 6.1)")


@pytest.mark.parametrize("path", COPIES, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_copies_of_other_profiles_are_of_todays_notebooks(path):
    copy, notebook = (
        notebook_files.read_notebook(each) for each in (path, ROOT / "notebooks" / path.name)
    )
    assert notebook_files.source_digest(copy) == notebook_files.source_digest(notebook), (
        "run the notebook at that profile; its tables are there"
    )


def test_there_are_results_and_figures():
    assert {path.parts[-2] for path in TABLES} >= {
        "00_quickstart",
        "01_layer_similarity",
        "02_depth_and_question_answering",
        "04_simple_against_similarity",
        "05_robustness",
        "06_block_importance",
        "07_depth_against_width",
        "08_lora_against_continued_pretraining",
        "09_seven_metrics",
        "10_how_to_heal",
        "11_one_shot_or_iterative",
        "12_the_recommended_model",
        "13_your_own_model",
    }
    assert {path.stem.split("_")[0] for path in FIGURES} >= {f"{number:02}" for number in range(14)}


def test_recorded_numbers_are_those_of_the_committed_notebooks():
    shown = {
        path.stem: notebook_files.summary_rows(nbformat.read(path, as_version=4))
        for path in (ROOT / "notebooks").glob("*.ipynb")
    }
    recorded = comparisons.read_summaries(ROOT / "tests" / "summaries" / "cpu.csv")
    compared = comparisons.compare_summaries(recorded, comparisons.summary_table(shown))
    assert len(compared) > 400 and [found for found in compared if found.fault] == []


@pytest.fixture(scope="module")
def current() -> set[tuple[str, str]]:
    """Names of the committed tables, and what their bytes come to."""
    return {(table.name, results.read_record(table)["sha256"]) for table in TABLES}


@pytest.mark.parametrize("path", FIGURES, ids=lambda path: path.stem)
def test_figures_show_the_committed_results(path, current):
    named = re.findall(r"(\S+\.csv) sha256 ([0-9a-f]{64})", Image.open(path).info["Source"])
    assert named and set(named) <= current
    assert path.with_suffix(".pdf").is_file()


def test_readme_code_runs_as_it_stands(tmp_path):
    (tmp_path / "results").symlink_to(ROOT / "results")
    assert "n_samples=16" in BLOCKS[0]  # two windows do here
    for block in BLOCKS:
        run("-c", block.replace("n_samples=16", "n_samples=2"), cwd=tmp_path)
    assert (tmp_path / "mine.pdf").stat().st_size > 1000
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoints" / "pruned")
    assert model.config.num_hidden_layers == len(model.model.layers) == 22


def test_readme_names_what_is_there():
    readme = (ROOT / "README.md").read_text()
    links = [link for link in re.findall(r"\]\(([^)]+)\)", readme) if not link.startswith("http")]
    assert [link for link in links if not (ROOT / link).exists()] == []
    missing = [
        path.stem
        for path in (ROOT / "notebooks").glob("*.ipynb")
        if f"notebooks/{path.name}" not in readme
    ]
    missing += [path.name for path in FIGURES if f"figures/{path.name}" not in readme]
    assert missing == [], "README maps every notebook and figure"


def test_project_root_is_this_checkout():
    assert runtime.project_root() == ROOT
