"""The driver of the notebooks, on tiny notebooks made here: strict values, scrubbed copies, compared numbers."""

import json
import os
import sys
import tempfile
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import comparisons  # noqa: E402
import jobs  # noqa: E402
import notebook_files  # noqa: E402
import run_notebooks  # noqa: E402

PARAMETERS = 'profile = "cpu"\nmodel = "embedded"\nseed = 0\nrecompute = False\nsteps = 10\nrate = 1.0\nlimit = 5'
# What results.summary shows, without the seconds that importing the package takes.
SUMMARY = """
from IPython.display import display
rows = [{"name": "steps", "value": steps, "tolerance": 0, "reason": "count"},
        {"name": "loss", "value": 0.25 * steps, "tolerance": 0.1, "reason": "threads"}]
display({"application/vnd.pruning-utils.summary+json": {"rows": rows}, "text/plain": "summary"}, raw=True)
"""
TABLE = """
import csv, os, pathlib
folder = pathlib.Path(os.environ["PRUNING_UTILS_OUTPUT"])
table = folder / "results" / profile / "00_first" / "embedded.csv"
table.parent.mkdir(parents=True, exist_ok=True)
if not table.exists() or recompute:
    table.write_text(f"layer,score\\n0,{steps / 10}\\n1,2\\n", newline="")
    table.with_name("run.json").write_text('{"embedded": {"modules": {}}}')
(folder / "figures").mkdir(exist_ok=True)
(folder / "figures" / "00_first.png").write_bytes(b"figure")
"""
NOISE = """
import sys, time
print("first")
print("progress", file=sys.stderr, flush=True)
time.sleep(0.05)
print("second", flush=True)
time.sleep(0.05)
print("third")
steps + 1
"""


def write_notebook(path: Path, *cells: str, parameters: str = PARAMETERS, summary: str = SUMMARY) -> None:
    """A notebook of these code cells between the parameters and the summary."""
    made = [nbformat.v4.new_code_cell(source.strip()) for source in (parameters, *cells, summary)]
    made[0].metadata["tags"], made[-1].metadata["tags"] = ["parameters"], ["summary"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Is it?"), *made])
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A checkout with two notebooks and the profiles cpu and smoke."""
    folder = tmp_path / "checkout"
    write_notebook(folder / "notebooks" / "00_first.ipynb", TABLE, NOISE)
    write_notebook(folder / "notebooks" / "01_second.ipynb", "import os")
    (folder / "profiles").mkdir()
    (folder / "profiles" / "cpu.yaml").write_text("all:\n  profile: cpu\n")
    (folder / "profiles" / "smoke.yaml").write_text("all:\n  profile: smoke\n00_first:\n  steps: 2\n")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("PRUNING_UTILS_OUTPUT", raising=False)
    return folder


def drive(project: Path, *words: str) -> int:
    """The driver's exit code for a command line."""
    return run_notebooks.main(["--project", str(project), *words])


def files(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- strict values: refused before anything runs ------------------------------------------------------------------


@pytest.fixture
def no_run(monkeypatch):
    """Executing any notebook is an error."""
    def execute(*given):
        raise AssertionError("a notebook ran")

    monkeypatch.setattr(run_notebooks, "execute", execute)


@pytest.mark.parametrize(("words", "profile", "message"), [
    (["--profile", "tpu"], "", "no profile tpu; there are: cpu, smoke"),
    (["--only", "07"], "", "no notebook 07; there are: 00_first, 01_second"),
    ([], "02_third:\n  steps: 1\n", "sections 02_third; allowed are: all, 00_first, 01_second"),
    ([], "01_second:\n  stepz: 1\n", "01_second has no parameter stepz; it has: profile, model, seed, recompute"),
    (["--only", "00"], "01_second:\n  stepz: 1\n", "01_second has no parameter stepz"),
    ([], "all:\n  stepz: 1\n", "00_first has no parameter stepz"),
    ([], "00_first:\n  rate: 1e-4\n", "00_first: rate must be a float like its default 1.0, got '1e-4'"),
    ([], "00_first:\n  steps: true\n", "00_first: steps must be a int like its default 10, got True"),
    ([], "00_first:\n  steps: 1.5\n", "00_first: steps must be a int"),
    ([], "00_first:\n- steps\n", "must map sections to parameter values"),
    ([], "- a\n", "must map sections"), ([], "a: [", "profile cpu is no YAML"),
    (["--only", "00", "-p", "stepz", "1"], "", "00_first has no parameter stepz"),
    (["-p", "steps", "1"], "", "-p sets parameters of one notebook, chosen are: 00_first, 01_second"),
    (["--regress"], "", "no summary numbers are recorded in .*cpu.csv; --regress --record"),
])
def test_what_is_not_there_is_refused(project, no_run, capsys, words, profile, message):
    if profile:
        (project / "profiles" / "cpu.yaml").write_text(profile)
    assert drive(project, *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and pytest.raises(AssertionError, match=message).matches(AssertionError(error))


@pytest.mark.parametrize("words", [["--record"], ["--accept"], ["--tolerance", "0.1"], ["--regress", "--figures"],
                                   ["--regress", "--output", "x"]])
def test_options_that_do_not_go_together_are_refused(project, no_run, words):
    with pytest.raises(SystemExit) as caught:
        drive(project, *words)
    assert caught.value.code == 2


@pytest.mark.parametrize(("source", "message"), [
    ("n = 1 + len('a')", "plain literals.*len"), ("n, m = 1, 2", "plain literals"), ("import os", "plain literals"),
    ("n = 1\nn += 1", "plain literals")])
def test_parameters_must_be_literals(project, no_run, capsys, source, message):
    write_notebook(project / "notebooks" / "01_second.ipynb", parameters=source)
    assert drive(project) == 2
    assert pytest.raises(AssertionError, match="01_second.*" + message).matches(AssertionError(capsys.readouterr().err))


def test_values_come_from_defaults_then_all_then_section_then_command(project):
    (project / "profiles" / "smoke.yaml").write_text(
        "all:\n  profile: smoke\n  steps: 3\n00_first:\n  steps: 2\n  limit: null\n")
    first, second = jobs.plan(project, "smoke", [], {}, False)
    assert first.values == {"profile": "smoke", "model": "embedded", "seed": 0, "recompute": False, "steps": 2,
                            "rate": 1.0, "limit": None}
    assert first.changes == {"profile": "smoke", "steps": 2, "limit": None} and second.values["steps"] == 3
    (given,) = jobs.plan(project, "smoke", ["00"], {"rate": "3e-4", "steps": "7"}, True)
    assert given.changes == {"profile": "smoke", "steps": 7, "limit": None, "rate": 3e-4, "recompute": True}
    assert jobs.literal("embedded") == "embedded" and jobs.literal("true") is True and jobs.literal("[1, 2]") == [1, 2]


def test_only_the_notebooks_own_values_replace_the_committed_one(project):
    committed, beside = project / "notebooks" / "00_first.ipynb", Path("notebooks") / "00_first.ipynb"
    places = {}
    for name, profile, given, recompute in (("cpu", "cpu", {}, False), ("again", "cpu", {}, True),
                                            ("set", "cpu", {"steps": "3"}, False), ("smoke", "smoke", {}, False)):
        (job,) = jobs.plan(project, profile, ["00_first"], given, recompute)
        places[name] = job.kept_at(project)
    assert places["cpu"] == places["again"] == committed
    assert places["set"] == project / "results" / "cpu" / beside
    assert places["smoke"] == project / "results" / "smoke" / beside


# --- executed copies ----------------------------------------------------------------------------------------------


def test_runs_in_place_leave_the_same_bytes(project, capfd):
    assert drive(project) == 0
    captured = capfd.readouterr()
    assert "[1/2] 00_first ... " in captured.out and "[2/2] 01_second ... " in captured.out
    assert captured.err.count("progress") == 1, "a notebook's stderr reaches the terminal"
    first = files(project)
    notebook = nbformat.reads(first["notebooks/00_first.ipynb"].decode(), as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata == {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                                 "language_info": {"name": "python"}}
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [1, 2, 3, 4] and [cell.id for cell in code] == [
        "cell-1", "cell-2", "cell-3", "cell-4"], "no cell of parameters is put in"
    assert [cell.metadata for cell in code] == [{"tags": ["parameters"]}, {}, {}, {"tags": ["summary"]}]
    streams = [(output.name, output.text) for output in code[2].outputs if output.output_type == "stream"]
    assert streams == [("stdout", "first\nsecond\nthird\n")], "no stderr; the rest in one piece"
    assert code[2].outputs[-1].data["text/plain"] == "11" and code[2].outputs[-1].execution_count == 3
    assert first["notebooks/00_first.ipynb"].endswith(b"}\n") and b"papermill" not in first["notebooks/00_first.ipynb"]
    assert first["results/cpu/00_first/embedded.csv"] == b"layer,score\n0,1.0\n1,2\n"
    assert drive(project, "--recompute", "--only", "00") == 0
    assert files(project) == first


def test_other_values_leave_the_committed_notebooks(project, tmp_path, capfd):
    before = files(project)
    assert drive(project, "--profile", "smoke", "--only", "00", "--recompute", "--output", str(tmp_path / "out")) == 0
    assert files(project) == before
    assert sorted(files(tmp_path / "out")) == ["figures/00_first.png", "notebooks/00_first.ipynb",
                                               "results/smoke/00_first/embedded.csv", "results/smoke/00_first/run.json"]
    cell = nbformat.read(tmp_path / "out" / "notebooks" / "00_first.ipynb", as_version=4).cells[2]
    assert cell.id == "injected-parameters" and cell.execution_count == 2
    assert cell.source == '# Parameters\nprofile = "smoke"\nsteps = 2', "says what was run, not how it was come by"


def test_smoke_goes_to_a_temporary_folder(project, tmp_path, monkeypatch, capfd):
    seen = []
    monkeypatch.setattr(run_notebooks, "execute", lambda job, project, output: seen.append(output) or executed(job))
    before = files(project)
    assert drive(project, "--profile", "smoke") == 0
    assert len(set(seen)) == 1 and seen[0].parent == tmp_path / "temporary" and files(project) == before
    assert sorted(files(seen[0])) == ["notebooks/00_first.ipynb", "notebooks/01_second.ipynb"]


def test_failure_is_named_and_stops_the_run(project, capfd):
    write_notebook(project / "notebooks" / "00_first.ipynb", "1 + 1", "values = [1, 2]\nvalues[7]")
    before = files(project)
    assert drive(project, "--profile", "smoke") == 1
    captured = capfd.readouterr()
    assert "00_first failed in cell 4 of 5" in captured.err and "IndexError: list index out of range" in captured.err
    assert "\x1b" not in captured.err and "01_second" not in captured.out
    partial = Path(captured.err.rpartition("so far: ")[2].strip())
    assert "IndexError" in partial.read_text() and files(project) == before


def test_kernel_that_dies_is_named(project, capfd):
    write_notebook(project / "notebooks" / "00_first.ipynb", "import os\nos.kill(os.getpid(), 9)")
    before = files(project)
    assert drive(project, "--only", "00") == 1
    error = capfd.readouterr().err
    assert "00_first failed in cell 3 of 4" in error and "died" in error and files(project) == before


def test_outputs_that_name_the_machine_are_refused(project, capfd):
    write_notebook(project / "notebooks" / "00_first.ipynb", "import os\nprint('at', os.getcwd())\nobject()")
    before = files(project)
    assert drive(project, "--only", "00") == 1
    error = capfd.readouterr().err
    assert "outputs name folders" in error and f"cell 3: 'at {project}" in error and "object at 0x" in error
    assert files(project) == before


def output_cell(*texts: str) -> nbformat.NotebookNode:
    """A notebook of one executed cell that shows these texts."""
    cell = nbformat.v4.new_code_cell("a", execution_count=1, outputs=[
        nbformat.v4.new_output("display_data", {"text/plain": text, "image/png": "/srv/people/x/"}) for text in texts])
    return nbformat.v4.new_notebook(cells=[cell])


def test_machine_traces_are_whole_folders(monkeypatch):
    monkeypatch.setenv("HOME", "/srv/people/x")
    roots = [Path("/srv/checkout")]
    for text in ("/srv/checkout/a.csv", "'/srv/checkout'", "see /srv/people/x/.cache"):
        assert len(notebook_files.machine_traces(output_cell(text), roots)) == 1, text
    clean = output_cell("/srv/checkouts", "a/srv/checkout2", "~/x", "pages/srv/people/xy", "0x7f3344556677")
    assert notebook_files.machine_traces(clean, roots) == []


def test_scrub_drops_widgets_and_volatile_metadata():
    notebook = output_cell("kept")
    notebook.metadata = nbformat.from_dict({"widgets": {"a": 1}, "papermill": {"duration": 1}})
    cell = notebook.cells[0]
    cell.execution_count = 9
    cell.metadata = nbformat.from_dict({"papermill": {}, "execution": {"a": "time"}, "tags": [], "slideshow": {"a": 1}})
    cell.outputs.append(nbformat.v4.new_output("display_data", {"application/vnd.jupyter.widget-view+json": {},
                                                                "text/plain": "Bar"}))
    notebook_files.scrub(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"} and cell.metadata == {"slideshow": {"a": 1}}
    assert cell.execution_count == 1 and [output.data["text/plain"] for output in cell.outputs] == ["kept"]
    cell.execution_count = None
    with pytest.raises(ValueError, match="cell 1 was not executed"):
        notebook_files.scrub(notebook)


# --- numbers compared ---------------------------------------------------------------------------------------------


def executed(job: jobs.Job) -> nbformat.NotebookNode:
    """Stands for a run: a copy that shows the summary which the notebook's cells would."""
    notebook = notebook_files.read_notebook(job.path)
    rows = [{"name": "steps", "value": job.values["steps"], "tolerance": 0, "reason": "count"},
            {"name": "loss", "value": 0.25 * job.values["steps"], "tolerance": 0.1, "reason": "threads"}]
    notebook.cells[-1].outputs = [nbformat.v4.new_output("display_data", {notebook_files.SUMMARY_MIME: {"rows": rows}})]
    return notebook


@pytest.fixture
def quick(monkeypatch) -> list[str]:
    """Runs are replaced by their outcome; the names of those that ran are noted."""
    ran = []
    monkeypatch.setattr(run_notebooks, "execute", lambda job, project, output: ran.append(job.name) or executed(job))
    return ran


def test_regress_records_and_compares(project, quick, capfd):
    assert drive(project, "--regress", "--record", "--profile", "smoke") == 0
    baseline = project / "tests" / "summaries" / "smoke.csv"
    assert baseline.read_text() == ("notebook,name,value,tolerance,reason\n00_first,steps,2,0,count\n"
                                    "00_first,loss,0.5,0.1,threads\n01_second,steps,10,0,count\n"
                                    "01_second,loss,2.5,0.1,threads\n")
    before = files(project)
    assert drive(project, "--regress", "--profile", "smoke") == 0
    assert "4 of 4 agree" in capfd.readouterr().out and files(project) == before
    (project / "profiles" / "smoke.yaml").write_text("all:\n  profile: smoke\n00_first:\n  steps: 3\n")
    assert drive(project, "--regress", "--profile", "smoke") == 1
    moved = [line.split() for line in capfd.readouterr().out.splitlines() if "beyond" in line]
    assert moved == [["00_first:", "loss", "0.5", "0.75", "0.25", "beyond", "0.1"],
                     ["00_first:", "steps", "2", "3", "1", "beyond", "0"]]
    assert drive(project, "--regress", "--profile", "smoke", "--only", "01") == 0
    (project / "notebooks" / "01_second.ipynb").rename(project / "second")
    assert drive(project, "--regress", "--profile", "smoke", "--only", "00") == 1
    (project / "second").rename(project / "notebooks" / "01_second.ipynb")
    assert capfd.readouterr().out.count("missing") == 2, "numbers of a notebook that is gone"
    assert drive(project, "--regress", "--record", "--profile", "smoke", "--only", "00") == 0
    assert baseline.read_text().count("01_second") == 2 and "00_first,loss,0.75" in baseline.read_text()
    capfd.readouterr()
    baseline.write_text(baseline.read_text().replace("00_first,steps", "00_first,stairs"))
    assert drive(project, "--regress", "--profile", "smoke") == 1
    faults = [(line.split()[1], line.split()[-1]) for line in capfd.readouterr().out.splitlines() if ": st" in line]
    assert faults == [("stairs", "missing"), ("steps", "new")]


def test_regress_needs_a_summary_in_every_notebook(project, monkeypatch, capfd):
    monkeypatch.setattr(run_notebooks, "execute", lambda job, *given: notebook_files.read_notebook(job.path))
    assert drive(project, "--regress", "--record") == 1
    assert "no summary numbers in 00_first, 01_second" in capfd.readouterr().err


@pytest.mark.parametrize(("before", "after", "tolerances", "fault"), [
    ("0.3", "0.4", ("0.1", "0.1"), ""), ("0.3", "0.40001", ("0.1", "0.1"), "beyond 0.1"), ("8", "8", ("0", "0"), ""),
    ("8", "9", ("0", "0"), "beyond 0"), ("11 12", "11 12", ("0", "0"), ""), ("11 12", "11 13", ("0", "0"), "changed"),
    ("1", "1", ("0.1", "5"), "tolerance 0.1 became 5")])
def test_summary_numbers_have_their_committed_tolerance(before, after, tolerances, fault):
    tables = [pd.DataFrame([["00_a", "n", value, tolerance, "why"]], columns=comparisons.COLUMNS)
              for value, tolerance in zip((before, after), tolerances, strict=True)]
    (compared,) = comparisons.compare_summaries(*tables)
    assert compared.fault == fault


@pytest.mark.parametrize(("new", "fault"), [
    ("layer,name,score\n0,a,1000\n1,b,1\n2,c,\n", ""),
    ("layer,name,score\n0,a,1000\n1,b,1.9\n2,c,\n", ""),
    ("layer,name,score\n0,a,1000\n1,b,2.1\n2,c,\n", "beyond 0.001: score by 0.0011"),
    ("layer,name,score\n0,a,1000\n1,b,1\n2,c,1\n", "beyond 0.001: score by inf"),
    ("layer,name,score\n0,a,1000\n1,d,1\n2,c,\n", "beyond 0.001: name by inf"),
    ("layer,name,score\n0,a,1000\n3,b,1\n2,c,\n", "beyond 0.001: layer by 1"),
    ("layer,name,score\n0,a,1000\n1,b,1\n", "rows differ"),
    ("layer,name,loss\n0,a,1000\n1,b,1\n2,c,\n", "columns differ: loss, score"),
    ("name,layer,score\na,0,1000\nb,1,1\nc,2,\n", "columns differ: their order"),
    (None, "missing")])
def test_tables_are_compared_column_by_column(tmp_path, new, fault):
    for name, text in (("old", "layer,name,score\n0,a,1000\n1,b,1\n2,c,\n"), ("new", new)):
        (tmp_path / name / "00_a").mkdir(parents=True)
        (tmp_path / name / "01_b").mkdir()
        if text:
            (tmp_path / name / "00_a" / "t.csv").write_text(text)
            (tmp_path / name / "00_a" / "t.measured.csv").write_text(f"layer,seconds\n0,{np.random.rand()}\n")
    (tmp_path / "old" / "01_b" / "other.csv").write_text("a\n1\n")
    compared = comparisons.compare_tables(tmp_path / "old", tmp_path / "new", ["00_a"], 1e-3)
    assert [(row.item, row.fault) for row in compared] == [("00_a/t.csv", fault)]


def test_reproduce_goes_on_compares_and_accepts(project, capfd, monkeypatch):
    assert drive(project) == 0
    committed = project / "results" / "cpu" / "00_first" / "embedded.csv"
    committed.write_text("layer,score\n0,1.5\n1,2\n")
    committed.with_name("run.json").write_text('{"other": {"modules": {}}, "embedded": {"modules": {"a": "old"}}}')
    before = files(project)
    capfd.readouterr()
    assert drive(project, "--reproduce") == 1
    said = capfd.readouterr().out
    assert "00_first/embedded.csv  2 rows     2 rows  0.25 of the largest  beyond 0.001: score by 0.25" in said
    assert "01_second: loss" in said and "4 of 5 agree" in said
    after = files(project)
    assert {name: after[name] for name in before} == before, "nothing committed has changed"
    assert after["reproduced/cpu/notebooks/00_first.ipynb"] == before["notebooks/00_first.ipynb"]

    ran = []
    monkeypatch.setattr(run_notebooks, "execute", lambda job, project, output: ran.append(job.name) or executed(job))
    assert drive(project, "--reproduce", "--tolerance", "0.3") == 0
    assert ran == [], "finished notebooks do not run again"
    notebook = project / "notebooks" / "01_second.ipynb"
    notebook.write_text(notebook.read_text().replace("import os", "import sys"))
    assert drive(project, "--reproduce", "--accept") == 0
    assert ran == ["01_second"], "a notebook that was edited does"
    assert committed.read_text() == "layer,score\n0,1.0\n1,2\n"
    assert json.loads(committed.with_name("run.json").read_text()) == {"other": {"modules": {}},
                                                                       "embedded": {"modules": {}}}
    assert "import sys" in notebook.read_text() and drive(project, "--reproduce") == 0

    ran.clear()
    assert drive(project, "--reproduce", "--recompute", "--only", "01") == 0
    assert ran == ["01_second"] and "reproduced/cpu/results/cpu/00_first/embedded.csv" in files(project)

    made = project / "reproduced" / "cpu" / "results" / "cpu" / "00_first"
    (made / "run.json").write_text('{"embedded": {"modules": {"healing": "of other code"}}}')
    run_notebooks.drop_stale_tables(project / "reproduced" / "cpu")
    assert not (made / "embedded.csv").exists(), "a table that other code made is not gone on with"


def test_figures_are_redrawn_from_committed_results_alone(project, capfd):
    compute = """
import os, pathlib
import pandas as pd
from pruning_utils import results
path = results.table_path(profile, "00_first", "embedded")
table = results.load_or_compute(path, lambda: pd.DataFrame({"steps": [steps]}), parameters={"steps": steps})
figure = pathlib.Path(os.environ["PRUNING_UTILS_OUTPUT"], "figures", "00_first.txt")
figure.parent.mkdir(exist_ok=True)
figure.write_text(str(table["steps"][0]))
"""
    write_notebook(project / "notebooks" / "00_first.ipynb", compute,
                   summary='results.summary({"steps": (steps, 0, "count")})')
    assert drive(project, "--figures", "--only", "00") == 1
    assert "00_first failed in cell 3 of 4" in capfd.readouterr().err
    assert drive(project, "--only", "00") == 0
    shown = nbformat.read(project / "notebooks" / "00_first.ipynb", as_version=4)
    assert notebook_files.summary_rows(shown) == [{"name": "steps", "value": 10, "tolerance": 0, "reason": "count"}]
    (project / "figures" / "00_first.txt").unlink()
    before = files(project)
    assert drive(project, "--figures", "--only", "00") == 0
    assert files(project) == before | {"figures/00_first.txt": b"10"}


def test_figures_that_change_anything_else_fail(project, monkeypatch, capfd):
    def spoil(job, project, output):
        assert os.environ["PRUNING_UTILS_NO_COMPUTE"] == "1" and os.environ["PRUNING_UTILS_OUTPUT"] == str(project)
        (project / "results").mkdir(exist_ok=True)
        (project / "results" / "new.csv").write_text("a")
        return executed(job)

    monkeypatch.setattr(run_notebooks, "execute", spoil)
    assert drive(project, "--figures", "--only", "00") == 1
    assert "redrawing has changed: results/new.csv" in capfd.readouterr().out
    assert "PRUNING_UTILS_NO_COMPUTE" not in os.environ


def test_committed_profiles_say_what_they_are_for():
    for path in sorted((ROOT / "profiles").glob("*.yaml")):
        assert path.read_text().startswith("# "), path.name
        names = [notebook.stem for notebook in (ROOT / "notebooks").glob("[0-9]*.ipynb")]
        assert jobs.read_profile(path.parent, path.stem, names)["all"]["profile"] == path.stem
