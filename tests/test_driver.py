"""The driver of the notebooks, on tiny notebooks made here: strict values, scrubbed copies,
compared numbers."""

import ast
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml
from filelock import FileLock

from pruning_utils.engine import benchmarks, definitions

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import comparisons  # noqa: E402
import jobs  # noqa: E402
import modes  # noqa: E402
import notebook_files  # noqa: E402
import notebook_kernels  # noqa: E402
import parameters  # noqa: E402
import run_notebooks  # noqa: E402
import running  # noqa: E402

CHILDREN = ROOT / "tests" / "children"
# Of a table that depends on nothing in the package: always fresh.
STAMP = definitions.INSTALLED.stamp()

PARAMETERS = """profile = "cpu"
model = "embedded"
seed = 0
recompute = False
steps = 10
rate = 1.0
limit = 5"""
# What pages.summary shows, without the seconds that importing the package takes.
SUMMARY = """
from IPython.display import display
rows = [{"name": "steps", "value": steps, "tolerance": 0, "reason": "count"},
        {"name": "loss", "value": 0.25 * steps, "tolerance": 0.1, "reason": "threads"}]
kind = "application/vnd.pruning-utils.summary+json"
display({kind: {"rows": rows}, "text/plain": "summary"}, raw=True)
"""
TABLE = f"""
import csv, os, pathlib
folder = pathlib.Path(os.environ["PRUNING_UTILS_OUTPUT"])
table = folder / "results" / profile / "00_first" / "embedded.csv"
table.parent.mkdir(parents=True, exist_ok=True)
if not table.exists() or recompute:
    table.write_text(f"layer,score\\n0,{{steps / 10}}\\n1,2\\n", newline="")
    table.with_name("run.json").write_text('{json.dumps({"embedded": {"code": STAMP}})}')
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


def write_notebook(
    path: Path, *cells: str, parameters: str = PARAMETERS, summary: str = SUMMARY
) -> None:
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
    for name in ("00_first", "01_second"):
        (folder / "results" / "cpu" / name).mkdir(parents=True)
    (folder / "profiles").mkdir()
    (folder / "profiles" / "cpu.yaml").write_text("all:\n  profile: cpu\n")
    (folder / "profiles" / "smoke.yaml").write_text(
        "all:\n  profile: smoke\n00_first:\n  steps: 2\n"
    )
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
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# --- strict values: refused before anything runs --------------------------------------------------


@pytest.fixture
def no_run(monkeypatch):
    """Executing any notebook is an error."""

    def execute(*given):
        raise AssertionError("a notebook ran")

    monkeypatch.setattr(running, "execute", execute)


@pytest.mark.parametrize(
    ("words", "profile", "message"),
    [
        (["--profile", "tpu"], "", "no profile tpu; there are: cpu, smoke"),
        (["--only", "07"], "", "no notebook 07; there are: 00_first, 01_second"),
        (["--only", ""], "", "no notebook ''; there are: 00_first, 01_second"),
        ([], "02_third:\n  steps: 1\n", "sections 02_third; allowed are: all, 00_first, 01_second"),
        (
            [],
            "01_second:\n  stepz: 1\n",
            "01_second has no parameter stepz; it has: profile, model, seed, recompute",
        ),
        (["--only", "00"], "01_second:\n  stepz: 1\n", "01_second has no parameter stepz"),
        ([], "all:\n  stepz: 1\n", "00_first has no parameter stepz"),
        (
            [],
            "00_first:\n  rate: 1e-4\n",
            "00_first: rate must be a float like its default 1.0, got '1e-4'",
        ),
        (
            [],
            "00_first:\n  steps: true\n",
            "00_first: steps must be a int like its default 10, got True",
        ),
        ([], "00_first:\n  steps: 1.5\n", "00_first: steps must be a int"),
        ([], "00_first:\n- steps\n", "must map sections to parameter values"),
        ([], "- a\n", "must map sections"),
        ([], "a: [", "profile cpu is no YAML"),
        (["--only", "00", "-p", "stepz", "1"], "", "00_first has no parameter stepz"),
        (
            ["-p", "steps", "1"],
            "",
            "-p sets parameters of one notebook, chosen are: 00_first, 01_second",
        ),
        (["--regress"], "", "no summary numbers are recorded in .*cpu.csv; --regress --record"),
    ],
)
def test_what_is_not_there_is_refused(project, no_run, capsys, words, profile, message):
    if profile:
        (project / "profiles" / "cpu.yaml").write_text(profile)
    assert drive(project, *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and pytest.raises(AssertionError, match=message).matches(
        AssertionError(error)
    )


@pytest.mark.parametrize(
    "words",
    [
        ["--record"],
        ["--accept"],
        ["--tolerance", "0.1"],
        ["--tolerance", "0"],
        ["--reproduce", "--tolerance", "nan"],
        ["--reproduce", "--tolerance", "-1"],
        ["--reproduce", "--accept", "-p", "seed=1"],
        ["--regress", "--record", "-p", "seed=1"],
        ["--regress", "--figures"],
        ["--regress", "--output", "x"],
        ["--keep"],
        ["--reproduce", "--keep"],
        ["--figures", "--only", "00", "-p", "seed=1"],
        ["--rehearse"],
        ["--rehearse", "--profile", "gpu"],
        ["--plan", "--jobs", "2"],
        ["--plan", "--recompute"],
        ["--plan", "--output", "x"],
    ],
)
def test_options_that_do_not_go_together_are_refused(project, no_run, words):
    with pytest.raises(SystemExit) as caught:
        drive(project, *words)
    assert caught.value.code == 2


def test_a_tolerance_that_is_none_is_told_what_one_is(project, no_run, capsys):
    with pytest.raises(SystemExit):
        drive(project, "--reproduce", "--tolerance", "x")
    assert "must be a share from 0 on, such as 0.001, got 'x'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("healing.method=foo", "healing.method must be among lora, .*, full, got 'foo'"),
        ("scored_on.tasks={nope: 0}", "scored_on.tasks must name tasks among hellaswag, .* 'nope'"),
        ("healing.method=none", "healing.method must be among lora, .*, full, got 'none'"),
        ("healing.targets=mpl", "healing.targets must be among all, mlp, or a list .* got 'mpl'"),
        ("scored_on.papers={nope: 0}", "scored_on.papers must name tasks among .* got 'nope'"),
    ],
)
def test_names_of_nothing_are_refused_before_anything_runs(
    given, message, no_run, capsys, tmp_path, monkeypatch
):
    theirs = types.SimpleNamespace(all_tasks=["piqa"])
    monkeypatch.setattr(benchmarks, "task_manager", lambda embedded: theirs)
    words = ["--only", "03", "--output", str(tmp_path), "-p", given]
    assert run_notebooks.main(words) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("notebook", "values", "message"),
    [
        ("05_robustness", {"shots": {"tasks": {"piga": 0}}}, "shots.tasks must name .* 'piga'"),
        ("08_stored", {"quantised": {"precisions": ["nf5"]}}, "precisions must be among .* 'nf5'"),
        ("01_layer_similarity", {"precisions": ["nf4", "nf5"]}, "be among bfloat16, .* 'nf5'"),
        ("02_depth", {"sweep": {"healing": {"method": "lor"}}}, "healing.method must be .* 'lor'"),
        ("13_your_own_model", {"goal": {"rule": "worst"}}, "goal.rule must be among .* 'worst'"),
    ],
)
def test_names_of_nothing_are_found_at_any_depth(notebook, values, message, monkeypatch):
    theirs = types.SimpleNamespace(all_tasks=["piqa"])
    monkeypatch.setattr(benchmarks, "task_manager", lambda embedded: theirs)
    job = types.SimpleNamespace(name=notebook, values=values)
    options = types.SimpleNamespace(values=["said"], plan=False)
    with pytest.raises(jobs.Refused, match=message):
        run_notebooks.refuse_names(options, [job])


@pytest.mark.parametrize("profile", ["smoke", "cpu", "gpu", "a100"])
def test_no_name_of_our_own_profiles_means_nothing(profile):
    options = types.SimpleNamespace(values=["said"], plan=False)
    run_notebooks.refuse_names(options, jobs.plan(ROOT, profile, [], {}, recompute=False))


def test_results_that_cannot_lie_where_they_are_to_are_refused_at_once(
    project, no_run, capsys, tmp_path
):
    (tmp_path / "file").write_text("mine")
    assert drive(project, "--only", "00", "--output", str(tmp_path / "file")) == 2
    said = capsys.readouterr().err
    assert f"a folder that can be written, got {tmp_path / 'file'}: Not a directory" in said


def test_figures_of_no_results_are_refused(project, no_run, capsys):
    assert drive(project, "--figures", "--profile", "smoke", "--only", "00") == 2
    assert "there are none of profile smoke; there are those of cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("n = 1 + len('a')", "plain literals.*len"),
        ("n, m = 1, 2", "plain literals"),
        ("import os", "plain literals"),
        ("n = 1\nn += 1", "plain literals"),
    ],
)
def test_parameters_must_be_literals(project, no_run, capsys, source, message):
    write_notebook(project / "notebooks" / "01_second.ipynb", parameters=source)
    assert drive(project) == 2
    assert pytest.raises(AssertionError, match="01_second.*" + message).matches(
        AssertionError(capsys.readouterr().err)
    )


def test_values_come_from_defaults_then_all_then_section_then_command(project):
    (project / "profiles" / "smoke.yaml").write_text(
        "all:\n  profile: smoke\n  steps: 3\n00_first:\n  steps: 2\n  limit: null\n"
    )
    first, second = jobs.plan(project, "smoke", [], {}, False)
    assert first.values == {
        "profile": "smoke",
        "model": "embedded",
        "seed": 0,
        "recompute": False,
        "steps": 2,
        "rate": 1.0,
        "limit": None,
    }
    assert (
        first.changes == {"profile": "smoke", "steps": 2, "limit": None}
        and second.values["steps"] == 3
    )
    (given,) = jobs.plan(project, "smoke", ["00"], {"rate": "3e-4", "steps": "7"}, True)
    assert given.changes == {
        "profile": "smoke",
        "steps": 7,
        "limit": None,
        "rate": 3e-4,
        "recompute": True,
    }
    assert (
        jobs.literal("model", "embedded") == "embedded"
        and jobs.literal("recompute", "true") is True
        and jobs.literal("seeds", "[1, 2]") == [1, 2]
    )


def test_only_the_notebooks_own_values_replace_the_committed_one(project):
    committed = project / "notebooks" / "00_first.ipynb"
    beside = Path("notebooks") / "00_first.ipynb"
    places = {}
    for name, profile, given, recompute in (
        ("cpu", "cpu", {}, False),
        ("again", "cpu", {}, True),
        ("set", "cpu", {"steps": "3"}, False),
        ("smoke", "smoke", {}, False),
    ):
        (job,) = jobs.plan(project, profile, ["00_first"], given, recompute)
        places[name] = job.kept_at(project)
    assert places["cpu"] == places["again"] == committed
    assert places["set"] == project / "results" / "cpu" / beside
    assert places["smoke"] == project / "results" / "smoke" / beside


REFUSED = """
import sys
sys.path.insert(0, "scripts")
import run_notebooks
assert run_notebooks.main(["--only", "none"]) == 2
assert "jsonschema" in sys.modules
print(sorted({"torch", "transformers", "lark"} & {*sys.modules}))
"""


def test_a_refusal_waits_for_nothing_that_takes_seconds_to_import():
    """lark is what jsonschema would build a grammar with."""
    done = subprocess.run(
        [sys.executable, "-c", REFUSED], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n" and "no notebook none" in done.stderr


# --- values inside mappings -----------------------------------------------------------------------

NESTED = f"""{PARAMETERS}
healing = {{"targets": "all", "rank": 8, "rate": 0.01, "source": None, "inner": {{"steps": 1}}}}
scored_on = {{"tasks": {{"piqa": 0, "boolq": 0}}, "n_questions": 24}}"""
OTHERS = {"targets": "all", "rate": 0.01, "source": None, "inner": {"steps": 1}}
WHOLE = "{targets: mlp, rank: 2, rate: 1, source: null, inner: {steps: 3}}"


@pytest.fixture
def nested(project) -> Path:
    """The same checkout, whose first notebook has mappings of settings, one with tasks inside."""
    write_notebook(project / "notebooks" / "00_first.ipynb", parameters=NESTED)
    return project


def planned(project: Path, **given: str) -> jobs.Job:
    """The first notebook's job at profile cpu with values of the command line."""
    dotted = {name.replace("__", "."): text for name, text in given.items()}
    (job,) = jobs.plan(project, "cpu", ["00"], dotted, False)
    return job


def test_a_dotted_name_replaces_one_value_of_the_whole_mapping(nested):
    job = planned(nested, healing__rank="4", healing__inner__steps="7", scored_on__tasks__boolq="5")
    healing = {"targets": "all", "rank": 4, "rate": 0.01, "source": None, "inner": {"steps": 7}}
    scored_on = {"tasks": {"piqa": 0, "boolq": 5}, "n_questions": 24}
    assert job.changes == {"healing": healing, "scored_on": scored_on}
    assert job.values["healing"] == healing and job.values["steps"] == 10
    assert list(job.values["healing"]) == list(healing), "the order of keys stays"
    assert planned(nested, healing__rank="8").changes == {}, "the notebook's own value"
    assert planned(nested, healing__rate="1").values["healing"]["rate"] == 1
    assert planned(nested, healing__source="c4").values["healing"]["source"] == "c4"
    assert planned(nested, healing__targets="null").values["healing"]["targets"] is None


def test_dotted_names_of_profile_and_command_are_merged_in_turn(nested):
    profile = nested / "profiles" / "cpu.yaml"
    profile.write_text("00_first:\n  healing.rank: 16\n  healing.targets: mlp\n")
    assert planned(nested).changes == {"healing": {**OTHERS, "targets": "mlp", "rank": 16}}
    job = planned(nested, healing__rank="4")
    assert job.changes == {"healing": {**OTHERS, "targets": "mlp", "rank": 4}}
    profile.write_text(f"00_first:\n  healing.rank: 16\n  healing: {WHOLE}\n")
    whole = {"targets": "mlp", "rank": 16, "rate": 1, "source": None, "inner": {"steps": 3}}
    assert planned(nested).values["healing"] == whole, "the whole comes first"
    assert planned(nested, healing__rate="0.2").values["healing"] == {**whole, "rate": 0.2}
    job = planned(nested, healing__rate="0.2", healing=WHOLE)
    assert job.values["healing"] == {**whole, "rank": 2, "rate": 0.2}, "it replaces the profile's"


def test_the_command_line_sets_several_values_at_once(nested, monkeypatch):
    seen = []
    monkeypatch.setattr(running, "execute", lambda job, *_: seen.append(job) or executed(job))
    words = ["-p", "healing.rank=4", "healing.source=a=b", "-p", "steps=3", "-p", "model", "x=y"]
    assert drive(nested, "--only", "00", "--output", str(nested / "mine"), *words) == 0
    (job,) = seen
    assert job.changes == {
        "healing": {**OTHERS, "rank": 4, "source": "a=b"},
        "steps": 3,
        "model": "x=y",
    }


def test_a_notebook_gets_the_whole_mapping(nested, capfd):
    write_notebook(
        nested / "notebooks" / "00_first.ipynb", "print(sorted(healing))", parameters=NESTED
    )
    output = nested / "mine"
    words = ["--only", "00", "-p", "healing.rank=4"]
    assert drive(nested, *words, "--output", str(output)) == 0
    path = output / "notebooks" / "00_first.ipynb"
    cells = nbformat.read(path, as_version=4).cells
    assert cells[3].outputs[0].text == "['inner', 'rank', 'rate', 'source', 'targets']\n"


@pytest.mark.parametrize(
    ("words", "profile", "message"),
    [
        (
            ["-p", "healing.ranks=4"],
            "",
            "00_first: healing has no ranks; it has: targets, rank, rate, source, inner\n",
        ),
        (["-p", "healing.inner.rank=4"], "", "00_first: healing.inner has no rank; it has: steps"),
        (
            ["-p", "scored_on.tasks.siqa=4"],
            "",
            "00_first: scored_on.tasks has no siqa; it has: piqa, boolq",
        ),
        (["-p", "steps.rank=4"], "", "00_first: steps is no mapping but 10, so it has no rank"),
        (
            ["-p", "healing.rank.a=4"],
            "",
            "00_first: healing.rank is no mapping but 8, so it has no",
        ),
        (["-p", "heeling.rank=4"], "", "00_first has no parameter heeling; it has: profile, "),
        (
            ["-p", "healing.rank=1.5"],
            "",
            "00_first: healing.rank must be a int like its default 8, got 1.5",
        ),
        (
            ["-p", "healing.rank=true"],
            "",
            "healing.rank must be a int like its default 8, got True",
        ),
        (["-p", "healing.inner=3"], "", "healing.inner must be a dict like its default"),
        (
            ["-p", "healing.inner.steps=abc"],
            "",
            "00_first: healing.inner.steps must be a int like its default 1, got 'abc'\n",
        ),
        (
            ["-p", f"healing={WHOLE.replace('rank: 2', 'rank: abc')}"],
            "",
            "00_first: healing.rank must be a int like its default 8, got 'abc'\n",
        ),
        (
            ["-p", f"healing={WHOLE.replace('steps: 3', 'steps: abc')}"],
            "",
            "00_first: healing.inner.steps must be a int like its default 1, got 'abc'\n",
        ),
        (["-p", "healing.inner={step: 3}"], "", "00_first: healing.inner has no step; it has: ste"),
        (
            ["-p", "healing={rank: 4}"],
            "",
            "00_first: healing lacks targets, rate, source, inner; a whole mapping must have every "
            "key; healing.KEY=VALUE sets one alone\n",
        ),
        (
            ["-p", "scored_on.tasks={siqa: no shots}"],
            "",
            "00_first: scored_on.tasks.siqa must be a int like its default 0, got 'no shots'\n",
        ),
        (
            ["-p", "scored_on={tasks: {siqa: 1.5}, n_questions: 3}"],
            "",
            "00_first: scored_on.tasks.siqa must be a int like its default 0, got 1.5\n",
        ),
        (
            ["-p", "healing={rank: 4, ranks: 4, 1: 2}"],
            "",
            "00_first: healing has no ranks, 1; it has: targets, rank, rate, source, inner\n",
        ),
        (["-p", "healing={alpha: 4}"], "", "00_first: healing has no alpha; it has: targets"),
        ([], "00_first:\n  healing.ranks: 4\n", "00_first: healing has no ranks; it has: targets"),
        ([], "00_first:\n  healing.rate: 1e-4\n", "healing.rate must be a float like .* '1e-4'"),
        ([], "00_first:\n  healing: {ranks: 4}\n", "00_first: healing has no ranks"),
        ([], "00_first:\n  healing: {rank: 4}\n", "00_first: healing lacks targets, rate, source"),
        (
            ["-p", "healing.rank=x", "-p", "healing.ranks=4"],
            "",
            "healing.rank must be a int .* got 'x'\n00_first: healing has no ranks",
        ),
        (["-p", "healing={rank: "], "", "'{rank: ' is neither a Python literal nor YAML"),
    ],
)
def test_values_inside_mappings_are_refused_before_anything_runs(
    nested, no_run, capsys, words, profile, message
):
    if profile:
        (nested / "profiles" / "cpu.yaml").write_text(profile)
    assert drive(nested, "--only", "00", *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and re.search(message.replace("{", "\\{"), error), error


@pytest.mark.parametrize(
    ("own", "given", "message"),
    [
        ([0, 1], ["a"], r"x\[0\] must be a int like its default 0, got 'a'"),
        ([1e-3], [1e-3, "1e-4"], r"x\[1\] must be a float like its default 0.001, got '1e-4'"),
        (
            [["xsum", 10, 0]],
            [["quac", 5, 1], ["boolq", "x", 0]],
            r"x\[1\]\[1\] must be a int .*'x'",
        ),
        (["piqa"], [3], r"x\[0\] must be a str like its default 'piqa', got 3"),
        ([1e-3], [1, 3e-4], ""),
        ([0, 1], [5], ""),
        ([[14, 28]], [[7, 3], [2, 1]], ""),
        ([], ["a", 1], ""),
    ],
)
def test_lists_are_looked_into(own, given, message):
    fault = parameters.type_fault("03_b", "x", given, own)
    assert re.search(message, fault) if message else fault == ""


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("revision", "1.0", "1.0"),
        ("revision", "2024-01-01", "2024-01-01"),
        ("revision", "12e4567", "12e4567"),
        ("revision", "None", None),
        ("rate", "3e-4", 3e-4),
        ("text.healing_source", "null", None),
        ("goal", "{keep: 0.5}", {"keep": 0.5}),
    ],
)
def test_words_of_the_command_line_are_what_they_look_like(name, text, value):
    assert parameters.literal(name, text) == value


@pytest.mark.parametrize("text", ["010", "1:30", "2024-01-01", ".inf"])
def test_numbers_that_are_others_to_yaml_are_refused(text):
    with pytest.raises(parameters.Refused, match=f"steps: write a number as Python .*{text}"):
        parameters.literal("steps", text)


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ("00_first:\n  steps: 2\n", "00_first: its results would be those of 'cpu'; the profile"),
        ("all: {profile: mine}\n00_first: {steps: 1}\n00_first: {rate: 2.0}\n", "twice: 00_first"),
        ("all: {profile: mine}\n00_first: {steps: 1, steps: 2}\n", "says twice: steps"),
        ("all: {profile: mine}  # \xfc\n", "profile mine is no YAML: 'utf-8' codec"),
    ],
)
def test_profiles_that_would_mislead_are_refused(project, no_run, capsys, profile, message):
    (project / "profiles" / "mine.yaml").write_text(profile, encoding="latin-1")
    assert drive(project, "--profile", "mine", "--only", "00") == 2
    assert message in capsys.readouterr().err


def test_the_folder_that_papermill_obeys_is_obeyed(project, tmp_path, monkeypatch):
    before = files(project)
    monkeypatch.setenv("PRUNING_UTILS_OUTPUT", str(tmp_path / "mine"))
    assert drive(project, "--only", "00", "-p", "steps=3") == 0
    assert (tmp_path / "mine" / "results" / "cpu" / "00_first" / "embedded.csv").exists()
    assert files(project) == before


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"depths": [3, 8]}, "depths"),
        ({"depths": [3], "quantised": {"depths": [0, 9]}}, "quantised.depths"),
        ({"depths": [3], "healing": {"equal_steps": [[3, 40], [8, 1]]}}, "healing.equal_steps"),
        ({"depths": [7], "healing": {"equal_steps": [[3, 40]], "rates": [9.0]}}, ""),
        ({"depths": [0.25], "quantised": {"depths": [0, 7]}}, ""),
    ],
)
def test_more_layers_than_a_model_has_are_named(values, name):
    job = jobs.Job(Path("00_b.ipynb"), "cpu", {"model": "mine", **values}, {})
    fault = jobs.depths_fault(job, 8)
    assert (
        fault.startswith(f"00_b: {name} must be below the 8 layers of mine") if name else not fault
    )


@pytest.mark.parametrize(
    ("name", "values", "fault"),
    [
        ("06_block_importance", {"depths": [6, 20]}, "depths must be at most 18, for mine has 24"),
        (
            "08_lora_against_continued_pretraining",
            {"depths": [4, 8], "healing": {"chained_depths": [14]}},
            r"healing.chained_depths must be among depths, \[4, 8\], got \[14\]",
        ),
        (
            "08_lora_against_continued_pretraining",
            {"depths": [4, 19], "healing": {"equal_steps": [[14, 28]]}},
            r"depths must be at most 18.*\n08_lora\w+: healing.equal_steps must be among depths",
        ),
        (
            "08_lora_against_continued_pretraining",
            {"depths": [4, 8], "quantised": {"depths": [4, 8]}},
            "quantised.depths must hold 0 too",
        ),
        (
            "09_seven_metrics",
            {"depths": [4], "healing": {"rated": [[8, "taylor"]]}},
            "healing.rated must be among depths",
        ),
        (
            "11_one_shot_or_iterative",
            {"depths": [4], "healing": {"per_round": [[8, 1]]}},
            r"healing.per_round must begin with the first of depths, \[4\], got 8",
        ),
        (
            "11_one_shot_or_iterative",
            {"depths": [4], "healing": {"per_round": [[4, 1]], "longer": {"per_round": [8, 1]}}},
            r"healing.longer.per_round must begin as a list of healing.per_round does, got",
        ),
    ],
)
def test_counts_that_belong_together_are_refused_together(name, values, fault):
    """Each of these ended in a KeyError after hours."""
    job = jobs.Job(Path(f"{name}.ipynb"), "cpu", {"model": "mine", **values}, {})
    assert re.match(f"{name}: {fault}", jobs.depths_fault(job, 24))


@pytest.mark.parametrize(
    ("values", "faults"),
    [
        ({"shares": [0.1, 0.25], "sweep": {"to": 0.8, "step": 2}}, []),
        ({"shares": [0.1, 2.0]}, ["shares: a share must lie in (0, 1) and leave one of 8 layers"]),
        ({"share_removed": 0}, ["share_removed: a share must lie in (0, 1)"]),
        (
            {"sweep": {"to": 0.99, "healed": [0.5, -0.5], "curves_of": "cpu", "compared": None}},
            ["sweep.to: a share must lie in (0, 1)", "sweep.healed: a share must lie in (0, 1)"],
        ),
    ],
)
def test_shares_that_leave_no_layer_are_refused(values, faults):
    job = jobs.Job(Path("03_b.ipynb"), "cpu", {"model": "mine", **values}, {})
    found = jobs.depths_fault(job, 8).splitlines()
    assert len(found) == len(faults)
    for line, fault in zip(found, faults, strict=True):
        assert line.startswith(f"03_b: {fault}")


def test_every_share_of_a_notebook_is_looked_at():
    """Each name is of a value in some notebook; a new key of a sweep is a share, or named here."""
    defaults = [jobs.own_defaults(path) for path in jobs.notebook_paths(ROOT).values()]
    dotted = {f"sweep.{key}" for values in defaults for key in values.get("sweep", {})}
    assert set(jobs.SHARES) <= dotted | {name for values in defaults for name in values}
    assert dotted - set(jobs.SHARES) == {
        "sweep.curves_of",
        "sweep.dtype",
        "sweep.healing",
        "sweep.step",
    }


def test_models_with_too_few_layers_and_depths_of_0_are_refused():
    few = jobs.Job(Path("09_seven_metrics.ipynb"), "cpu", {"model": "mine", "depths": [1]}, {})
    assert jobs.depths_fault(few, 6) == (
        "09_seven_metrics: the model must have at least 7 layers, for some rules keep 6, and mine "
        "has 6"
    )
    assert jobs.depths_fault(few, 7) == ""
    none = jobs.Job(Path("12_b.ipynb"), "cpu", {"model": "mine", "depths": [0]}, {})
    assert jobs.depths_fault(none, 24).startswith("12_b: depths must be at least 1, got [0]; -p")


@pytest.mark.parametrize(
    ("name", "values", "most"),
    [
        ("06_block_importance", {"depths": [8, 24]}, "depths must be at most 20, for gemma-3-270m"),
        (
            "08_lora_against_continued_pretraining",
            {"depths": [24], "quantised": {"depths": [0, 24]}},
            "quantised.depths must be at most 20, for gemma-3-270m",
        ),
        ("09_seven_metrics", {"depths": [24]}, "depths must be at most 20, for gemma-3-270m"),
        ("09_seven_metrics", {"depths": [20, 24]}, ""),
        ("10_how_to_heal", {"depths": [24]}, ""),
        ("11_one_shot_or_iterative", {"depths": [24]}, ""),
    ],
)
def test_a_second_model_must_be_able_to_lose_the_same_share(name, values, most, monkeypatch):
    """It failed in the middle of the notebook, on machines alone where that model is installed."""
    job = jobs.Job(Path(f"{name}.ipynb"), "cpu", {"model": "embedded", **values}, {})
    for is_there in (True, False):
        monkeypatch.setattr(jobs.embedded, "is_installed", lambda model, found=is_there: found)
        fault = jobs.depths_fault(job, 30)
        assert bool(fault) == bool(most and is_there) and (most in fault or not is_there)


@pytest.mark.parametrize("profile", ["smoke", "cpu", "gpu", "a100"])
def test_counts_of_the_profiles_belong_together(profile, monkeypatch):
    monkeypatch.setattr(jobs.embedded, "is_installed", lambda model: True)
    n_layers = 32 if profile == "a100" else 30
    faults = [jobs.depths_fault(job, n_layers) for job in jobs.plan(ROOT, profile, [], {}, False)]
    assert set(faults) == {""}


def test_counts_that_an_own_model_does_not_have_are_refused_before_it_is_loaded(
    tiny, no_run, capsys, tmp_path
):
    words = ["--only", "06", "-p", f"model={tiny}"]
    for mode in (["--output", str(tmp_path)], ["--plan"]):
        assert run_notebooks.main([*words, *mode]) == 2
        said = capsys.readouterr().err
        assert "06_block_importance: the model must have at least 7 layers" in said
        assert said.rstrip().endswith("has 5")


@pytest.mark.parametrize(
    ("notebook", "given", "fault"),
    [
        ("06", "depths=[40]", "depths must be below the 30 layers of embedded, got [40]"),
        ("09", "depths=[4]", "healing.rated must be among depths"),
    ],
)
def test_counts_that_the_embedded_model_does_not_have_are_refused_too(
    notebook, given, fault, no_run, capsys, tmp_path
):
    words = ["--only", notebook, "-p", given, "--output", str(tmp_path)]
    assert run_notebooks.main(words) == 2
    assert fault in capsys.readouterr().err


def test_an_environment_of_another_checkout_is_refused(tmp_path, capsys, monkeypatch):
    """As a worktree has it, or a folder that was copied with its own."""
    monkeypatch.setattr(run_notebooks, "__file__", str(tmp_path / "scripts" / "run_notebooks.py"))
    assert run_notebooks.main(["--figures", "--only", "03"]) == 2
    said = capsys.readouterr().err
    assert f"the scripts of {tmp_path}, but the installed package is that of {ROOT}" in said


def test_a_full_disk_is_one_line(project, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "copy.ipynb")

    monkeypatch.setattr(running, "write_text", full)
    assert drive(project, "--only", "00") == 1
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "No space left on device: 'copy.ipynb'; finished tables and points are kept" in said


def test_a_plan_of_values_that_cannot_be_is_refused(capsys):
    words = ["--profile", "smoke", "--plan", "--only", "03", "-p"]
    assert run_notebooks.main([*words, "dtype=float8"]) == 2
    said = capsys.readouterr().err
    assert "03_depth_and_next_token_loss: no plan for " in said and "dtype='float8'" in said


@pytest.mark.parametrize("given", ["depths=[]", "text={n_samples: 0, seq_len: 0}"])
def test_a_plan_of_nothing_is_refused(given, capsys):
    assert run_notebooks.main(["--profile", "smoke", "--plan", "--only", "00", "-p", given]) == 2
    assert "00_quickstart: no plan for " in capsys.readouterr().err


def test_keys_that_the_user_chooses_may_be_new_in_a_whole_mapping(nested):
    job = planned(nested, scored_on__tasks="{siqa: 3}")
    assert job.changes == {"scored_on": {"tasks": {"siqa": 3}, "n_questions": 24}}
    job = planned(nested, scored_on="{tasks: {}, n_questions: null}")
    assert job.changes == {"scored_on": {"tasks": {}, "n_questions": None}}


def test_values_by_names_that_the_user_chooses_are_like_those_that_are_there():
    """All the way down: sets of layers, ways to train each, and rates of each way."""
    own = {"rates": {"taylor": {"LoRA": [0.01]}}, "targets": "all"}
    known = parameters.setting_keys([{"healing": own}])
    assert known == {"healing": ["rates", "targets"]}, "not of what the user names"

    def fault(rates: object, targets: object = "mlp") -> str:
        given = {"rates": rates, "targets": targets}
        return parameters.value_fault("00", "healing", given, own=own, known=known)

    assert fault({"perplexity": {"DoRA": [1], "full": None}, "taylor": {}}) == ""
    assert fault({}, targets=["q_proj"]) == "", "names in place of a word for them"
    assert fault({"perplexity": [0.1]}) == (
        "00: healing.rates.perplexity must be a dict like its default {'LoRA': [0.01]}, got [0.1]"
    )
    assert fault({"perplexity": {"DoRA": 0.1}}) == (
        "00: healing.rates.perplexity.DoRA must be a list like its default [0.01], got 0.1"
    )
    assert fault({}, targets=3) == "00: healing.targets must be a str like its default 'all', got 3"


def test_sections_of_a_profile_may_share_a_mapping_of_settings(nested):
    write_notebook(
        nested / "notebooks" / "01_second.ipynb",
        parameters=f'{PARAMETERS}\nhealing = {{"rank": 8, "alpha": 16}}',
    )
    profile = nested / "profiles" / "cpu.yaml"
    given = WHOLE.replace("}}", "}, alpha: 4}")
    profile.write_text(f"all:\n  healing: {given}\n")
    first, second = jobs.plan(nested, "cpu", [], {}, False)
    assert first.values["healing"] == second.values["healing"]
    assert first.values["healing"]["alpha"] == 4
    with pytest.raises(jobs.Refused, match="00_first: healing has no alpha; it has: targets, rank"):
        planned(nested, healing=given)


@pytest.mark.parametrize("words", [["steps"], ["steps", "3", "4"], ["=3"], ["steps=3", "rate"]])
def test_words_that_set_nothing_are_refused(project, no_run, capsys, words):
    with pytest.raises(SystemExit) as caught:
        drive(project, "--only", "00", "-p", *words)
    assert caught.value.code == 2
    assert f"-p takes NAME=VALUE, or NAME VALUE, got {' '.join(words)}" in capsys.readouterr().err


def test_help_says_what_may_be_set(capsys):
    with pytest.raises(SystemExit) as caught:
        run_notebooks.main(["--help"])
    said = capsys.readouterr().out
    assert caught.value.code == 0 and "-p healing.steps=64" in said
    assert all(name in said for name in parameters.CHOSEN_KEYS)


def test_the_notebooks_mappings_are_settings_or_have_keys_that_the_user_chooses():
    """A new mapping is one of settings, unless it is added to CHOSEN_KEYS."""
    defaults = [jobs.own_defaults(path) for path in jobs.notebook_paths(ROOT).values()]
    mappings = {name for values in defaults for name, _ in parameters.mappings_in(values)}
    assert set(parameters.CHOSEN_KEYS) <= mappings
    assert {name for name in mappings if not parameters.has_chosen_keys(name)} == {
        "control",
        "fit",
        "goal",
        "healing",
        "healing.longer",
        "healing.timed",
        "quantised",
        "scored_on",
        "scored_on.floors",
        "scored_on.speed",
        "scored_on.timed",
        "shots",
        "swapped",
        "sweep",
        "sweep.healing",
        "text",
        "text.samples",
    }


# --- executed copies ------------------------------------------------------------------------------


def test_runs_in_place_leave_the_same_bytes(project, capfd):
    assert drive(project) == 0
    captured = capfd.readouterr()
    assert "[1/2] 00_first ... " in captured.out and "[2/2] 01_second ... " in captured.out
    assert captured.err.count("progress") == 1, "a notebook's stderr reaches the terminal"
    first = files(project)
    notebook = nbformat.reads(first["notebooks/00_first.ipynb"].decode(), as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [1, 2, 3, 4] and [
        cell.id for cell in code
    ] == ["cell-1", "cell-2", "cell-3", "cell-4"], "no cell of parameters is put in"
    assert [cell.metadata for cell in code] == [
        {"tags": ["parameters"]},
        {},
        {},
        {"tags": ["summary"]},
    ]
    streams = [
        (output.name, output.text) for output in code[2].outputs if output.output_type == "stream"
    ]
    assert streams == [("stdout", "first\nsecond\nthird\n")], "no stderr; the rest in one piece"
    assert (
        code[2].outputs[-1].data["text/plain"] == "11" and code[2].outputs[-1].execution_count == 3
    )
    assert (
        first["notebooks/00_first.ipynb"].endswith(b"}\n")
        and b"papermill" not in first["notebooks/00_first.ipynb"]
    )
    assert first["results/cpu/00_first/embedded.csv"] == b"layer,score\n0,1.0\n1,2\n"
    assert drive(project, "--recompute", "--only", "00") == 0
    assert files(project) == first


def test_other_values_leave_the_committed_notebooks(project, tmp_path, capfd):
    before = files(project)
    assert (
        drive(
            project,
            "--profile",
            "smoke",
            "--only",
            "00",
            "--recompute",
            "--output",
            str(tmp_path / "out"),
        )
        == 0
    )
    assert files(project) == before
    assert sorted(files(tmp_path / "out")) == [
        "figures/00_first.png",
        "notebooks/00_first.ipynb",
        "results/smoke/00_first/embedded.csv",
        "results/smoke/00_first/run.json",
    ]
    cell = nbformat.read(tmp_path / "out" / "notebooks" / "00_first.ipynb", as_version=4).cells[2]
    assert cell.id == "injected-parameters" and cell.execution_count == 2
    assert cell.source == '# Parameters\nprofile = "smoke"\nsteps = 2', (
        "says what was run, not how it was come by"
    )


@pytest.mark.parametrize(("n_taken", "status"), [(1, 0), (notebook_kernels.STARTS, 1)])
def test_a_kernel_whose_port_was_taken_is_started_again(
    n_taken, status, project, tmp_path, monkeypatch, capfd
):
    taken = socket.create_server(("127.0.0.1", 0))
    starts = []

    class Client(notebook_kernels.PapermillNotebookClient):
        def __init__(self, *given, extra_arguments, **named):
            starts.append(extra_arguments)
            if len(starts) <= n_taken:
                extra_arguments = [*extra_arguments, f"--stdin={taken.getsockname()[1]}"]
            super().__init__(*given, extra_arguments=extra_arguments, **named)

    monkeypatch.setattr(notebook_kernels, "PapermillNotebookClient", Client)
    options = ("--profile", "smoke", "--only", "00", "--output", str(tmp_path / "out"))
    with taken:
        assert drive(project, *options) == status
    assert len(starts) == min(n_taken + 1, notebook_kernels.STARTS)
    assert ("Kernel died before" in capfd.readouterr().err) == bool(status)


def test_smoke_goes_to_a_temporary_folder(project, tmp_path, monkeypatch, capfd):
    seen = []
    monkeypatch.setattr(
        running, "execute", lambda job, project, output, _: seen.append(output) or executed(job)
    )
    before = files(project)
    assert drive(project, "--profile", "smoke") == 0
    assert (
        len(set(seen)) == 1
        and seen[0].parent == tmp_path / "temporary"
        and files(project) == before
    )
    assert sorted(files(seen[0])) == ["notebooks/00_first.ipynb", "notebooks/01_second.ipynb"]


def test_failure_is_named_and_stops_the_run(project, capfd):
    write_notebook(project / "notebooks" / "00_first.ipynb", "1 + 1", "values = [1, 2]\nvalues[7]")
    before = files(project)
    assert drive(project, "--profile", "smoke") == 1
    captured = capfd.readouterr()
    assert (
        "00_first failed in cell 4 of 5" in captured.err
        and "IndexError: list index out of range" in captured.err
    )
    assert "\x1b" not in captured.err and "01_second" not in captured.out
    partial = Path(captured.err.rpartition("so far: ")[2].strip())
    assert "IndexError" in partial.read_text() and files(project) == before


def test_kernel_that_dies_is_named(project, capfd):
    write_notebook(project / "notebooks" / "00_first.ipynb", "import os\nos.kill(os.getpid(), 9)")
    before = files(project)
    assert drive(project, "--only", "00") == 1
    error = capfd.readouterr().err
    assert (
        "00_first failed in cell 3 of 4" in error and "died" in error and files(project) == before
    )


def test_outputs_that_name_the_machine_are_refused(project, capfd):
    write_notebook(
        project / "notebooks" / "00_first.ipynb", "import os\nprint('at', os.getcwd())\nobject()"
    )
    before = files(project)
    assert drive(project, "--only", "00") == 1
    error = capfd.readouterr().err
    assert (
        "outputs name folders" in error
        and f"cell 3: 'at {project}" in error
        and "object at 0x" in error
    )
    assert files(project) == before


def output_cell(*texts: str) -> nbformat.NotebookNode:
    """A notebook of one executed cell that shows these texts."""
    cell = nbformat.v4.new_code_cell(
        "a",
        execution_count=1,
        outputs=[
            nbformat.v4.new_output(
                "display_data", {"text/plain": text, "image/png": "/srv/people/x/"}
            )
            for text in texts
        ],
    )
    return nbformat.v4.new_notebook(cells=[cell])


def test_machine_traces_are_whole_folders(monkeypatch):
    monkeypatch.setenv("HOME", "/srv/people/x")
    roots = [Path("/srv/checkout")]
    for text in ("/srv/checkout/a.csv", "'/srv/checkout'", "see /srv/people/x/.cache"):
        assert len(notebook_files.machine_traces(output_cell(text), roots)) == 1, text
    clean = output_cell(
        "/srv/checkouts", "a/srv/checkout2", "~/x", "pages/srv/people/xy", "0x7f3344556677"
    )
    assert notebook_files.machine_traces(clean, roots) == []


def test_scrub_drops_widgets_and_volatile_metadata():
    notebook = output_cell("kept")
    notebook.metadata = nbformat.from_dict({"widgets": {"a": 1}, "papermill": {"duration": 1}})
    cell = notebook.cells[0]
    cell.execution_count = 9
    cell.metadata = nbformat.from_dict(
        {"papermill": {}, "execution": {"a": "time"}, "tags": [], "slideshow": {"a": 1}}
    )
    cell.outputs.append(
        nbformat.v4.new_output(
            "display_data", {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "Bar"}
        )
    )
    notebook_files.scrub(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"} and cell.metadata == {
        "slideshow": {"a": 1}
    }
    assert cell.execution_count == 1 and [output.data["text/plain"] for output in cell.outputs] == [
        "kept"
    ]
    cell.execution_count = None
    with pytest.raises(ValueError, match="cell 1 was not executed"):
        notebook_files.scrub(notebook)


def test_long_code_is_folded_and_parameters_are_not():
    most = notebook_files.MOST_LINES_OPEN
    lines = ["a = 1"] * most
    short, long, given = ["\n".join(part) for part in (lines, [*lines, "b = 2"], lines * 2)]
    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell(short, metadata={"tags": ["hide-input", "summary"]}),
            nbformat.v4.new_code_cell(long),
            nbformat.v4.new_code_cell(given, metadata={"tags": ["parameters"]}),
            nbformat.v4.new_markdown_cell(long),
        ]
    )
    for _ in range(2):
        notebook_files.fold_long_code(notebook)
        assert [dict(cell.metadata) for cell in notebook.cells] == [
            {"tags": ["summary"]},
            {"jupyter": {"source_hidden": True}, "tags": ["hide-input"]},
            {"tags": ["parameters"]},
            {},
        ]


# --- numbers compared -----------------------------------------------------------------------------


def executed(job: jobs.Job) -> nbformat.NotebookNode:
    """Stands for a run: a copy that shows the summary which the notebook's cells would."""
    notebook = notebook_files.read_notebook(job.path)
    rows = [
        {"name": "steps", "value": job.values["steps"], "tolerance": 0, "reason": "count"},
        {
            "name": "loss",
            "value": 0.25 * job.values["steps"],
            "tolerance": 0.1,
            "reason": "threads",
        },
    ]
    notebook.cells[-1].outputs = [
        nbformat.v4.new_output("display_data", {notebook_files.SUMMARY_MIME: {"rows": rows}})
    ]
    return notebook


@pytest.fixture
def quick(monkeypatch) -> list[str]:
    """Runs are replaced by their outcome; the names of those that ran are noted."""
    ran = []
    monkeypatch.setattr(
        running, "execute", lambda job, *given: ran.append(job.name) or executed(job)
    )
    return ran


def test_regress_records_and_compares(project, quick, capfd):
    assert drive(project, "--regress", "--record", "--profile", "smoke") == 0
    baseline = project / "tests" / "summaries" / "smoke.csv"
    assert baseline.read_text() == (
        "notebook,name,value,tolerance,reason\n00_first,steps,2,0,count\n"
        "00_first,loss,0.5,0.1,threads\n01_second,steps,10,0,count\n"
        "01_second,loss,2.5,0.1,threads\n"
    )
    before = files(project)
    assert drive(project, "--regress", "--profile", "smoke") == 0
    assert "4 of 4 agree" in capfd.readouterr().out and files(project) == before
    (project / "profiles" / "smoke.yaml").write_text(
        "all:\n  profile: smoke\n00_first:\n  steps: 3\n"
    )
    assert drive(project, "--regress", "--profile", "smoke") == 1
    moved = [line.split() for line in capfd.readouterr().out.splitlines() if "beyond" in line]
    assert moved == [
        ["00_first:", "loss", "0.5", "0.75", "0.25", "beyond", "0.1"],
        ["00_first:", "steps", "2", "3", "1", "beyond", "0"],
    ]
    assert drive(project, "--regress", "--profile", "smoke", "--only", "01") == 0
    (project / "notebooks" / "01_second.ipynb").rename(project / "second")
    assert drive(project, "--regress", "--profile", "smoke", "--only", "00") == 1
    (project / "second").rename(project / "notebooks" / "01_second.ipynb")
    assert capfd.readouterr().out.count("missing") == 2, "numbers of a notebook that is gone"
    assert drive(project, "--regress", "--record", "--profile", "smoke", "--only", "00") == 0
    assert (
        baseline.read_text().count("01_second") == 2
        and "00_first,loss,0.75" in baseline.read_text()
    )
    capfd.readouterr()
    baseline.write_text(baseline.read_text().replace("00_first,steps", "00_first,stairs"))
    assert drive(project, "--regress", "--profile", "smoke") == 1
    faults = [
        (line.split()[1], line.split()[-1])
        for line in capfd.readouterr().out.splitlines()
        if ": st" in line
    ]
    assert faults == [("stairs", "missing"), ("steps", "new")]


def test_what_was_finished_before_keeps_no_other_notebook_waiting(project, monkeypatch, capfd):
    """The third notebook begins while the second one runs: the second waits for it."""
    write_notebook(project / "notebooks" / "02_third.ipynb", "import os")
    begun = threading.Event()

    def execute(job, *given):
        if job.name == "01_second":
            assert begun.wait(60), "the third notebook has not begun"
        if job.name == "02_third":
            begun.set()
        return executed(job)

    monkeypatch.setattr(running, "execute", execute)
    words = ("--regress", "--record", "--keep", "--profile", "smoke", "-j", "2")
    (project / "notebooks" / "02_third.ipynb").rename(project / "third")
    (project / "notebooks" / "01_second.ipynb").rename(project / "second")
    assert drive(project, *words) == 0
    (project / "third").rename(project / "notebooks" / "02_third.ipynb")
    (project / "second").rename(project / "notebooks" / "01_second.ipynb")
    assert drive(project, *words) == 0
    assert "00_first ... finished before" in capfd.readouterr().out


def test_regress_needs_a_summary_in_every_notebook(project, monkeypatch, capfd):
    monkeypatch.setattr(
        running, "execute", lambda job, *given: notebook_files.read_notebook(job.path)
    )
    assert drive(project, "--regress", "--record") == 1
    assert "no summary numbers in 00_first, 01_second" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("before", "after", "tolerances", "fault"),
    [
        ("0.3", "0.4", ("0.1", "0.1"), ""),
        ("0.3", "0.40001", ("0.1", "0.1"), "beyond 0.1"),
        ("8", "8", ("0", "0"), ""),
        ("8", "9", ("0", "0"), "beyond 0"),
        ("11 12", "11 12", ("0", "0"), ""),
        ("11 12", "11 13", ("0", "0"), "changed"),
        ("1", "1", ("0.1", "5"), "tolerance 0.1 became 5"),
    ],
)
def test_summary_numbers_have_their_committed_tolerance(before, after, tolerances, fault):
    tables = [
        pd.DataFrame([["00_a", "n", value, tolerance, "why"]], columns=comparisons.COLUMNS)
        for value, tolerance in zip((before, after), tolerances, strict=True)
    ]
    (compared,) = comparisons.compare_summaries(*tables)
    assert compared.fault == fault


@pytest.mark.parametrize(
    ("new", "fault"),
    [
        ("layer,name,score\n0,a,1000\n1,b,1\n2,c,\n", ""),
        ("layer,name,score\n0,a,1000\n1,b,1.9\n2,c,\n", ""),
        ("layer,name,score\n0,a,1000\n1,b,2.1\n2,c,\n", "beyond 0.001: score by 0.0011"),
        ("layer,name,score\n0,a,1000\n1,b,1\n2,c,1\n", "beyond 0.001: score by inf"),
        ("layer,name,score\n0,a,1000\n1,d,1\n2,c,\n", "beyond 0.001: name by inf"),
        ("layer,name,score\n0,a,1000\n3,b,1\n2,c,\n", "beyond 0.001: layer by 1"),
        ("layer,name,score\n0,a,1000\n1,b,1\n", "rows differ"),
        ("layer,name,loss\n0,a,1000\n1,b,1\n2,c,\n", "columns differ: loss, score"),
        ("name,layer,score\na,0,1000\nb,1,1\nc,2,\n", "columns differ: their order"),
        (None, "missing"),
    ],
)
def test_tables_are_compared_column_by_column(tmp_path, new, fault):
    for name, text in (("old", "layer,name,score\n0,a,1000\n1,b,1\n2,c,\n"), ("new", new)):
        (tmp_path / name / "00_a").mkdir(parents=True)
        (tmp_path / name / "01_b").mkdir()
        if text:
            (tmp_path / name / "00_a" / "t.csv").write_text(text)
            (tmp_path / name / "00_a" / "t.measured.csv").write_text(
                f"layer,seconds\n0,{np.random.rand()}\n"
            )
    (tmp_path / "old" / "01_b" / "other.csv").write_text("a\n1\n")
    compared = comparisons.compare_tables(tmp_path / "old", tmp_path / "new", ["00_a"], 1e-3)
    assert [(row.item, row.fault) for row in compared] == [("00_a/t.csv", fault)]


@pytest.mark.parametrize("table", ["gemma-3-270m-beginnings.csv", "gemma-3-270m.csv"])
@pytest.mark.parametrize(("is_installed", "fault"), [(True, "missing"), (False, "")])
def test_a_table_may_be_missing_where_its_model_is_not_installed(
    tmp_path, monkeypatch, is_installed, fault, table
):
    monkeypatch.setattr(comparisons.embedded, "is_installed", lambda name: is_installed)
    for folder in ("old", "new"):
        (tmp_path / folder / "03_b").mkdir(parents=True)
    (tmp_path / "old" / "03_b" / table).write_text("nll\n1\n")
    (row,) = comparisons.compare_tables(tmp_path / "old", tmp_path / "new", ["03_b"], 1e-3)
    assert (row.item, row.fault) == (f"03_b/{table}", fault)


@pytest.mark.parametrize(
    ("new", "absent", "fault"),
    [
        ("model,value\nsmollm2-135m,1\n", ["gemma-3-270m"], ""),
        ("model,value\nsmollm2-135m,9\n", ["gemma-3-270m"], "beyond 0.001: value by 8"),
        ("model,value\nsmollm2-135m,1\n", [], "rows differ"),
        ("model,value\nsmollm2-135m,1\ngemma-3-270m,3\n", ["gemma-3-270m"], "beyond 0.001"),
    ],
)
def test_rows_may_be_missing_where_their_model_is_not_installed(
    tmp_path, monkeypatch, new, absent, fault
):
    monkeypatch.setattr(comparisons.embedded, "is_installed", lambda name: name not in absent)
    both = "model,value\nsmollm2-135m,1\ngemma-3-270m,2\n"
    for folder, text in (("old", both), ("new", new)):
        (tmp_path / folder / "01_b").mkdir(parents=True)
        (tmp_path / folder / "01_b" / "verdicts.csv").write_text(text)
    (row,) = comparisons.compare_tables(tmp_path / "old", tmp_path / "new", ["01_b"], 1e-3)
    assert row.fault.startswith(fault) and bool(row.fault) == bool(fault)


@pytest.mark.parametrize(("absent", "fault"), [(["gemma-3-270m"], ""), ([], "missing")])
def test_a_summary_number_may_be_missing_where_its_model_is_not_installed(
    monkeypatch, absent, fault
):
    monkeypatch.setattr(comparisons.embedded, "is_installed", lambda name: name not in absent)
    by_name = ("gemma-3-270m", "smollm2-135m")
    rows = [["01_b", f"A4, deeper blocks, {model}, XSum", "1", "0", ""] for model in by_name]
    both = pd.DataFrame(rows, columns=comparisons.COLUMNS)
    found = comparisons.compare_summaries(both, both.tail(1))
    assert [row.fault for row in found] == [fault, ""]
    found = comparisons.compare_summaries(both, both.head(1))
    assert [row.fault for row in found] == ["", "missing"], "that of the default model"


@pytest.mark.parametrize("damaged", ["new", "committed"])
def test_nothing_is_replaced_where_a_record_is_damaged(tmp_path, damaged):
    for name in ("new", "committed"):
        folder = tmp_path / name / "results" / "cpu" / "00_first"
        folder.mkdir(parents=True)
        (folder / "embedded.csv").write_text(f"a\n{name}\n")
        (folder / "run.json").write_text("[]" if name == damaged else '{"embedded": {}}')
    before = files(tmp_path)
    with pytest.raises(modes.Refused, match=f"{damaged}/results.*run.json is damaged"):
        job = jobs.Job(tmp_path / "00_first.ipynb", "cpu", {}, {})
        modes.replace_committed([job], tmp_path / "committed", tmp_path / "new")
    assert files(tmp_path) == before


def test_only_what_was_run_is_replaced(tmp_path):
    """A stopped reproduction of others has left tables and figures there too."""
    new, committed = tmp_path / "new", tmp_path / "committed"
    for name in ("00_first", "01_second"):
        for root in (new, committed):
            folder = root / "results" / "cpu" / name
            folder.mkdir(parents=True)
            (folder / "embedded.csv").write_text(root.name)
            (folder / "run.json").write_text(json.dumps({"embedded": {"commit": root.name}}))
            (root / "figures").mkdir(exist_ok=True)
            (root / "figures" / f"{name}_curves.png").write_text(root.name)
            (root / "notebooks").mkdir(exist_ok=True)
            (root / "notebooks" / f"{name}.ipynb").write_text(root.name)
    job = jobs.Job(committed / "notebooks" / "00_first.ipynb", "cpu", {}, {})
    modes.replace_committed([job], committed, new)
    for path, content in files(committed).items():
        is_new = "00_first" in path
        assert (b"new" in content) == is_new and (b"committed" in content) != is_new, path


def test_reproduce_goes_on_compares_and_accepts(project, capfd, monkeypatch):
    assert drive(project) == 0
    committed = project / "results" / "cpu" / "00_first" / "embedded.csv"
    committed.write_text("layer,score\n0,1.5\n1,2\n")
    old = {"other": {"code": STAMP}, "embedded": {"code": {**STAMP, "digest": "old"}}}
    committed.with_name("run.json").write_text(json.dumps(old))
    before = files(project)
    capfd.readouterr()
    assert drive(project, "--reproduce") == 1
    said = capfd.readouterr().out
    assert (
        "00_first/embedded.csv  2 rows     2 rows  0.25 of the largest  beyond 0.001: score by 0.25"
        in said
    )
    assert "01_second: loss" in said and "4 of 5 agree" in said
    after = files(project)
    assert {name: after[name] for name in before} == before, "nothing committed has changed"
    assert after["reproduced/cpu/notebooks/00_first.ipynb"] == before["notebooks/00_first.ipynb"]

    ran = []
    monkeypatch.setattr(
        running, "execute", lambda job, *given: ran.append(job.name) or executed(job)
    )
    assert drive(project, "--reproduce", "--tolerance", "0.3") == 0
    assert ran == [], "finished notebooks do not run again"
    notebook = project / "notebooks" / "01_second.ipynb"
    notebook.write_text(notebook.read_text().replace("import os", "import sys"))
    assert drive(project, "--reproduce", "--accept") == 0
    assert ran == ["01_second"], "a notebook that was edited does"
    assert committed.read_text() == "layer,score\n0,1.0\n1,2\n"
    records = json.loads(committed.with_name("run.json").read_text())
    assert records == {"other": {"code": STAMP}, "embedded": {"code": STAMP}}
    assert "import sys" in notebook.read_text() and drive(project, "--reproduce") == 0

    ran.clear()
    assert drive(project, "--reproduce", "--recompute", "--only", "01") == 0
    assert ran == ["01_second"] and "reproduced/cpu/results/cpu/00_first/embedded.csv" in files(
        project
    )

    made = project / "reproduced" / "cpu" / "results" / "cpu" / "00_first"
    modes.drop_stale_tables(project / "reproduced" / "cpu")
    assert (made / "embedded.csv").exists()
    (made / "run.json").write_text(
        json.dumps({"embedded": {"code": {**STAMP, "digest": "of other code"}}})
    )
    (made / "verdicts.csv").touch()
    modes.drop_stale_tables(project / "reproduced" / "cpu")
    assert not (made / "embedded.csv").exists(), "a table that other code made is not gone on with"
    assert (made / "verdicts.csv").exists(), "verdicts have no record"


def test_figures_are_redrawn_from_committed_results_alone(project, capfd):
    compute = """
import os, pathlib
import pandas as pd
from pruning_utils import pages, results
path = results.table_path(profile, "00_first", "embedded")
compute = lambda: pd.DataFrame({"steps": [steps]})
table = results.load_or_compute(path, compute, parameters={"steps": steps})
figure = pathlib.Path(os.environ["PRUNING_UTILS_OUTPUT"], "figures", "00_first.txt")
figure.parent.mkdir(exist_ok=True)
figure.write_text(str(table["steps"][0]))
"""
    write_notebook(
        project / "notebooks" / "00_first.ipynb",
        compute,
        summary='pages.summary({"steps": (steps, 0, "count")})',
    )
    assert drive(project, "--figures", "--only", "00") == 1
    assert "00_first failed in cell 3 of 4" in capfd.readouterr().err
    assert drive(project, "--only", "00") == 0
    shown = nbformat.read(project / "notebooks" / "00_first.ipynb", as_version=4)
    assert notebook_files.summary_rows(shown) == [
        {"name": "steps", "value": 10, "tolerance": 0, "reason": "count"}
    ]
    (project / "figures" / "00_first.txt").unlink()
    before = files(project)
    assert drive(project, "--figures", "--only", "00") == 0
    assert files(project) == before | {"figures/00_first.txt": b"10"}


def test_figures_that_change_anything_else_fail(project, monkeypatch, capfd):
    def spoil(job, project, output, kernels):
        assert kernels.environment["PRUNING_UTILS_NO_COMPUTE"] == "1"
        assert kernels.environment["PRUNING_UTILS_OUTPUT"] == str(project)
        assert kernels.environment["OMP_NUM_THREADS"] == "2", (
            "figures depend on the number of threads"
        )
        (project / "results").mkdir(exist_ok=True)
        (project / "results" / "new.csv").write_text("a")
        return executed(job)

    monkeypatch.setattr(running, "execute", spoil)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert drive(project, "--figures", "--jobs", "2") == 1
    assert "redrawing has changed: results/new.csv" in capfd.readouterr().out
    assert "PRUNING_UTILS_NO_COMPUTE" not in os.environ


def test_committed_profiles_say_what_they_are_for():
    for path in sorted((ROOT / "profiles").glob("*.yaml")):
        assert path.read_text().startswith("# "), path.name
        names = [notebook.stem for notebook in (ROOT / "notebooks").glob("[0-9]*.ipynb")]
        assert jobs.read_profile(path.parent, path.stem, names)["all"]["profile"] == path.stem


# --- a comparison of summary numbers goes on where it was stopped ---------------------------------


@pytest.fixture
def recorded(project, quick) -> Path:
    """The same checkout with summary numbers recorded at profile smoke; no run is noted."""
    assert drive(project, "--regress", "--record", "--profile", "smoke") == 0
    quick.clear()
    return project


def fail_at(monkeypatch, name: str, quick: list[str]) -> None:
    """From now on one notebook fails; the others run as before."""

    def execute(job, *given):
        if job.name == name:
            raise jobs.Failed(f"{name} failed")
        quick.append(job.name)
        return executed(job)

    monkeypatch.setattr(running, "execute", execute)


def test_regress_goes_on_where_it_was_stopped(recorded, quick, monkeypatch, capfd):
    folder = recorded / "regressed" / "smoke"
    fail_at(monkeypatch, "01_second", quick)
    assert drive(recorded, "--regress", "--profile", "smoke") == 1
    assert quick == ["00_first"] and (folder / "notebooks" / "00_first.ipynb").exists()
    tables = {}
    for name, stamp in (("fresh", STAMP), ("stale", {**STAMP, "digest": "of other code"})):
        tables[name] = folder / "results" / "smoke" / f"0_{name}" / "embedded.csv"
        tables[name].parent.mkdir(parents=True)
        tables[name].write_text("a\n1\n")
        tables[name].with_name("run.json").write_text(json.dumps({"embedded": {"code": stamp}}))
    there = []

    def execute(job, *given):
        there.append([job.name, *(name for name, path in tables.items() if path.exists())])
        return executed(job)

    monkeypatch.setattr(running, "execute", execute)
    capfd.readouterr()
    assert drive(recorded, "--regress", "--profile", "smoke", "--keep") == 0
    assert there == [["01_second", "fresh"]], (
        "one notebook is not repeated, one table is not gone on with"
    )
    said = capfd.readouterr().out
    assert "[1/2] 00_first ... finished before" in said and f"kept: {folder}" in said
    assert drive(recorded, "--regress", "--profile", "smoke") == 0 and len(there) == 1
    assert not (recorded / "regressed").exists(), "all is compared"
    assert drive(recorded, "--regress", "--profile", "smoke") == 0
    assert [name for name, *_ in there] == ["01_second", "00_first", "01_second"], "computed anew"


def test_regress_of_some_notebooks_leaves_what_waits(recorded, quick, monkeypatch):
    fail_at(monkeypatch, "01_second", quick)
    assert drive(recorded, "--regress", "--profile", "smoke") == 1
    waiting = files(recorded / "regressed")
    assert drive(recorded, "--regress", "--profile", "smoke", "--only", "00") == 0
    assert files(recorded / "regressed") == waiting and quick == ["00_first", "00_first"]


def test_what_other_values_made_is_not_gone_on_with(recorded, quick, monkeypatch, capfd):
    """Its tables would be refused by the notebook, which asks for others."""
    words = ["--regress", "--profile", "smoke", "--only", "00", "--keep"]
    folder = recorded / "regressed" / "smoke-00" / "results" / "smoke" / "00_first"
    there = []

    def execute(job, *given):
        there.append(folder.exists())
        folder.mkdir(parents=True, exist_ok=True)
        return executed(job)

    monkeypatch.setattr(running, "execute", execute)
    for value in (2, 3, 3):
        drive(recorded, *words, "-p", f"steps={value}")
    assert there == [False, False], "dropped for other values, and not run again for the same"
    assert "00_first was begun there with other values" in capfd.readouterr().out
    models = folder.parents[2] / "checkpoints"
    models.mkdir()
    drive(recorded, *words, "-p", "steps=3", "--recompute")
    assert there == [False, False, False] and not models.exists()


def test_results_of_a_rehearsal_lie_under_the_profile_of_their_values(tmp_path, monkeypatch):
    """It has a name of its own for what it records."""
    monkeypatch.setattr(modes, "Run", lambda *_, **__: types.SimpleNamespace(all=dict))
    for value in (2, 3):
        job = jobs.Job(Path("00_first"), "rehearsal-x", {"profile": "smoke", "steps": value}, {})
        table = tmp_path / "results" / "smoke" / "00_first" / "points.jsonl"
        table.parent.mkdir(parents=True, exist_ok=True)
        table.touch()
        finished = running.Finished(tmp_path)
        finished.versions = modes.runtime.versions()
        finished.write()
        modes.compute_apart([job], tmp_path, tmp_path, recompute=False, at_once=1, estimated=False)
        assert table.exists() is (value == 2)


def test_what_other_versions_computed_is_not_gone_on_with(recorded, quick, monkeypatch, capfd):
    fail_at(monkeypatch, "01_second", quick)
    assert drive(recorded, "--regress", "--profile", "smoke") == 1
    state = recorded / "regressed" / "smoke" / "finished.json"
    (state.parent / "results").mkdir()
    versions = {**json.loads(state.read_text())["versions"], "torch": "1.0"}
    state.write_text(json.dumps({**json.loads(state.read_text()), "versions": versions}))
    assert drive(recorded, "--regress", "--profile", "smoke") == 1
    assert quick == ["00_first", "00_first"] and not (state.parent / "results").exists()
    assert "was computed with torch 1.0 (now " in capfd.readouterr().out
    state.write_text("{")
    assert drive(recorded, "--regress", "--profile", "smoke") == 1
    assert len(quick) == 3 and "unknown versions of packages" in capfd.readouterr().out


def test_a_folder_that_another_process_computes_in_is_refused(recorded, quick, capfd):
    folder = recorded / "regressed" / "smoke"
    folder.mkdir(parents=True)
    with FileLock(folder.with_name("smoke.lock")):
        assert drive(recorded, "--regress", "--profile", "smoke") == 2
        assert f"error: another process computes in {folder}" in capfd.readouterr().err
        assert quick == []
    assert drive(recorded, "--regress", "--profile", "smoke") == 0
    assert not (recorded / "regressed").exists(), "neither the folder nor its lock is left"


# --- stopped by a signal --------------------------------------------------------------------------

WAITS = """
import os, pathlib, subprocess, time
if "PIDS" in os.environ:
    helper = subprocess.Popen(["sleep", "600"])
    pathlib.Path(os.environ["PIDS"]).write_text(f"{os.getpid()} {helper.pid} ")
    time.sleep(600)
"""


def runs(pid: int) -> bool:
    """Whether a process is there; one that has ended may wait to be asked for its exit code."""
    try:
        os.kill(pid, 0)
        if not Path("/proc/self/stat").exists():
            return True
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def wait_for(condition, seconds: float = 120) -> None:
    """Wait until something holds, and fail if it does not in time."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.1)


def stop_when(condition, number: signal.Signals, *command) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a program that gets a signal when something holds of what it
    has written to stdout."""
    with tempfile.TemporaryFile("w+") as out:

        def said() -> str:
            return os.pread(out.fileno(), 10_000, 0).decode()  # the program's place stays

        program = subprocess.Popen(
            [sys.executable, CHILDREN / "with_default_signals.py", *map(str, command)],
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        try:
            wait_for(lambda: program.poll() is not None or condition(said()))
            program.send_signal(number)
            _, error = program.communicate(timeout=60)
        finally:
            program.kill()
        return program.returncode, said(), error


@pytest.mark.parametrize(
    ("words", "number", "says"),
    [
        (
            "--regress --record --profile smoke",
            signal.SIGINT,
            "the same command goes on where it was",
        ),
        (
            "--reproduce --recompute -j 2",
            signal.SIGTERM,
            "the same command without --recompute goes on where it was",
        ),
        ("--figures", signal.SIGINT, "figures drawn so far stay, the same command redraws all"),
    ],
)
def test_a_signal_stops_the_kernels_and_says_how_to_go_on(
    project, tmp_path, monkeypatch, capfd, words, number, says
):
    write_notebook(project / "notebooks" / "01_second.ipynb", WAITS)
    pids, words = tmp_path / "pids", words.split()
    monkeypatch.setenv("PIDS", str(pids))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))

    def started(said):
        return "00_first ... " in said and pids.exists() and len(pids.read_text().split()) == 2

    code, said, error = stop_when(
        started, number, ROOT / "scripts" / "run_notebooks.py", "--project", project, *words
    )
    assert (code, error.replace("progress\n", "")) == (
        130,
        f"\nstopped in 01_second; {says}\n",
    )
    assert "Traceback" not in said
    for pid in pids.read_text().split():
        wait_for(lambda pid=pid: not runs(int(pid)), 10)
    assert not list((tmp_path / "temporary").iterdir()), "no copy is left of what was stopped"
    if "--regress" in words:
        monkeypatch.delenv("PIDS")
        assert drive(project, *words) == 0
        assert "[1/2] 00_first ... finished before\n[2/2] 01_second ... " in capfd.readouterr().out
        assert not (project / "regressed").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--plan", "a plan keeps nothing, the same command begins anew"),
        (
            "--profile smoke",
            "finished tables and points are kept under kept/results, the same command begins anew",
        ),
        (
            "--profile smoke --output kept",
            "finished tables and points are kept under kept/results, "
            "the same command goes on where it was",
        ),
        (
            "--profile cpu --recompute",
            "finished tables and points are kept under kept/results, the same command without "
            "--recompute goes on where it was; tables that were not begun keep their old numbers",
        ),
    ],
)
def test_a_stop_says_what_is_left(words, says):
    options = run_notebooks.parsed(words.split())
    assert run_notebooks.after_stop(options, Path("kept")) == says


def test_a_signal_while_the_driver_is_imported_ends_it_at_once():
    for number in (signal.SIGINT, signal.SIGTERM):
        code, said, error = stop_when(
            lambda said: said == "importing\n",
            number,
            CHILDREN / "slow_to_import.py",
            ROOT / "scripts",
        )
        assert (code, said) == (130, "importing\n")
        assert error == "stopped before the first notebook\n"


# --- several at once ------------------------------------------------------------------------------

MEETS = """
import os, pathlib, time
folder = pathlib.Path(os.environ["PRUNING_UTILS_OUTPUT"])
folder.mkdir(exist_ok=True)
folder.joinpath("NAME").touch()
started = time.monotonic()
while not folder.joinpath("OTHER").exists() and time.monotonic() < started + 60:
    time.sleep(0.1)
in_place = os.getcwd().endswith("/notebooks")
print(folder.joinpath("OTHER").exists(), os.environ.get("OMP_NUM_THREADS"), in_place)
"""


def test_notebooks_run_at_once_with_their_share_of_the_cores(project, tmp_path, monkeypatch, capfd):
    for name, other in (("00_first", "01_second"), ("01_second", "00_first")):
        source = MEETS.replace("NAME", name).replace("OTHER", other)
        write_notebook(project / "notebooks" / f"{name}.ipynb", source)
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(running, "cores", lambda: 6)
    assert drive(project, "--profile", "smoke", "--output", str(tmp_path / "out"), "-j", "2") == 0
    for path in (tmp_path / "out" / "notebooks").iterdir():
        shown = nbformat.read(path, as_version=4)
        assert [
            output.text
            for cell in shown.cells
            for output in cell.get("outputs", [])
            if "text" in output
        ] == ["True 3 True\n"]
    captured = capfd.readouterr()
    lines = captured.out.splitlines()
    assert lines[0] == "2 notebooks at once, 3 threads each" and captured.err == ""
    assert [re.sub(r"0\d_\w+ \.\.\. \d+ s", "NAME", line) for line in lines[1:3]] == [
        "[1/2] NAME",
        "[2/2] NAME",
    ]
    assert "OMP_NUM_THREADS" not in os.environ


def test_threads_are_at_least_one_and_those_that_were_set(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(running, "cores", lambda: 2)
    assert [running.threads_each(at_once) for at_once in (1, 2, 3)] == [
        {},
        {"OMP_NUM_THREADS": "1"},
        {"OMP_NUM_THREADS": "1"},
    ]
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert running.threads_each(2) == {}


@pytest.mark.parametrize("given", ["0", "-1", "x", "1.5", "", "²"])
def test_a_number_of_jobs_that_is_none_is_refused(project, no_run, capsys, given):
    with pytest.raises(SystemExit) as caught:
        drive(project, "-j", given)
    assert caught.value.code == 2
    assert f"must be a whole number of at least 1, got {given!r}" in capsys.readouterr().err


def noting(notes: list[tuple[str, str]], meeting: threading.Barrier | None = None):
    """Stands for runs: notes when each begins and ends; with a barrier all begin first."""

    def execute(job, *given):
        notes.append(("begin", job.name))
        if meeting:
            meeting.wait(60)
            # The one that fails is seen to have failed before another ends.
            while job.name != "00_first" and ("end", "00_first") not in notes:
                time.sleep(0.01)
        time.sleep(0.05 if job.name == "00_first" or not meeting else 0.5)
        notes.append(("end", job.name))
        if job.name == "00_first" and meeting:
            raise jobs.Failed("00_first failed in cell 7")
        return executed(job)

    return execute


def test_what_builds_on_another_waits_for_it(project, monkeypatch):
    write_notebook(project / "notebooks" / "02_third.ipynb", "import os")
    monkeypatch.setattr(jobs, "AFTER", {"01_second": {"00_first": "why"}})
    notes = []
    monkeypatch.setattr(running, "execute", noting(notes))
    assert drive(project, "-j", "3") == 0
    assert set(notes[:2]) == {("begin", "00_first"), ("begin", "02_third")}, "two begin at once"
    assert notes.index(("begin", "01_second")) > notes.index(("end", "00_first"))
    notes.clear()
    assert drive(project, "-j", "3", "--only", "01", "02") == 0
    assert {kind for kind, _ in notes[:2]} == {"begin"}, "what is not asked for is not waited for"


def test_those_begin_first_that_most_others_wait_for(project):
    names = [path.stem for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))]
    every = [jobs.Job(Path(name), "cpu", {}, {}) for name in names]
    first = [job.name[:2] for job in jobs.ready(every, [])]
    assert first == ["02", "00", "01", "13"]
    # 12 waits for 11, which waits for 10: without 11, for 10.
    apart = [job for job in every if job.name[:2] in ("10", "12")]
    assert [job.name[:2] for job in jobs.ready(apart, [])] == ["10"]
    assert jobs.chain_behind("02_depth_and_question_answering") == [
        "09_seven_metrics",
        "10_how_to_heal",
        "11_one_shot_or_iterative",
        "12_the_recommended_model",
    ]


def test_a_failure_among_several_lets_the_others_end_and_begins_none(project, monkeypatch, capfd):
    write_notebook(project / "notebooks" / "02_third.ipynb", "import os")
    notes = []
    monkeypatch.setattr(running, "execute", noting(notes, threading.Barrier(2)))
    before = files(project)
    assert drive(project, "--profile", "smoke", "--output", str(project / "out"), "-j", "2") == 1
    captured = capfd.readouterr()
    assert sorted(name for kind, name in notes if kind == "end") == ["00_first", "01_second"]
    assert ("begin", "02_third") not in notes and captured.err == "00_first failed in cell 7\n"
    assert "00_first ... failed after 0 s" in captured.out
    assert set(files(project)) - set(before) == {"out/notebooks/01_second.ipynb"}


# --- the order of the real notebooks, against what they read ----------------------------------


def code_of(path: Path) -> ast.Module:
    """The code cells of a notebook as one program."""
    cells = nbformat.read(path, as_version=4).cells
    return ast.parse("\n".join(cell.source for cell in cells if cell.cell_type == "code"))


def texts_in(tree: ast.AST) -> set[str]:
    """All text constants."""
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def called_in(tree: ast.AST) -> set[str]:
    """The last names of all functions that are called."""
    called = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {getattr(function, "attr", getattr(function, "id", None)) for function in called}


def must_wait_for(name: str) -> set[str]:
    """All notebooks that a notebook waits for, and those that these wait for."""
    first = set(jobs.AFTER.get(name, ()))
    return first.union(*(must_wait_for(one) for one in first))


def test_notebooks_wait_for_those_whose_tables_they_read():
    programs = {
        path.stem: code_of(path) for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    }
    # Owners of tables that a function of the package reads for whoever calls it.
    owners = {}
    for path in (ROOT / "pruning_utils").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                owners[node.name] = texts_in(node) & set(programs)
    assert owners["score_table"] == {"06_block_importance"}, (
        "this test looks where such functions are"
    )
    reads = {}
    for name, program in programs.items():
        found = texts_in(program) & set(programs)
        for function in called_in(program):
            found |= owners.get(function, set())
        reads[name] = found - {name}
    for name, first in reads.items():
        assert first <= must_wait_for(name), f"{name} reads tables of {first}: add it to jobs.AFTER"
    for name, first in jobs.AFTER.items():
        assert max(first) < name, "in the order of numbers, so that one by one is an order too"
        for one, reason in first.items():
            assert reason != jobs.READS or one in reads[name], f"{name} reads nothing of {one}"


def test_notebooks_that_train_the_same_models_run_one_after_the_other():
    # They keep trained models where the others look for them. Those with the same models choose
    # the layers by the same function.
    chosen_by = {"depth_points": 3, "metric_table": 4}
    programs = {
        path.stem: code_of(path) for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    }
    for function, count in chosen_by.items():
        names = [name for name, program in programs.items() if function in called_in(program)]
        # It trains nothing.
        names = [name for name in names if name != "02_depth_and_question_answering"]
        assert len(names) == count
        for place, name in enumerate(names):
            assert set(names[:place]) <= must_wait_for(name), (
                f"{name} trains beside {names[:place]}"
            )


# --- how long it will take --------------------------------------------------------------------


@pytest.fixture
def timed(project) -> Path:
    """The same checkout with committed tables that took 50 minutes and two hours to compute."""
    for name, seconds in (("00_first", (2000, 1000.4)), ("01_second", (7200,))):
        folder = project / "results" / "cpu" / name
        folder.mkdir(parents=True, exist_ok=True)
        record = {f"table-{place}": {"seconds": took} for place, took in enumerate(seconds)}
        (folder / "run.json").write_text(json.dumps(record))
    return project


def test_long_runs_say_how_long_they_took(timed, quick, monkeypatch, capfd):
    all_of_them = (
        "2 notebooks; where they were last computed at cpu they took 2.8 h in all\n"
        "  00 50 min, 01 2.0 h\n"
    )
    for words in (["--recompute"], ["--reproduce"]):
        drive(timed, *words)
        assert capfd.readouterr().out.startswith(all_of_them), words
    drive(timed, "--recompute", "--only", "00")
    assert capfd.readouterr().out.startswith(
        "1 notebook; where it was last computed at cpu it took 50 min\n[1/1]"
    )
    notebook = timed / "notebooks" / "01_second.ipynb"
    notebook.write_text(notebook.read_text().replace("import os", "import sys"))
    drive(timed, "--reproduce")
    assert capfd.readouterr().out.startswith(
        "2 notebooks, 1 of them finished; "
        "where the rest was last computed at cpu it took 2.0 h\n[1/2]"
    )
    for words in (
        [],
        ["--profile", "smoke", "--recompute"],
        ["--profile", "smoke", "--reproduce"],
        ["--figures"],
    ):
        drive(timed, *words)
        assert "computed at" not in capfd.readouterr().out, words
    (timed / "results" / "cpu" / "00_first" / "run.json").unlink()
    drive(timed, "--recompute", "--only", "00")
    assert capfd.readouterr().out.startswith("1 notebook\n[1/1]"), "nothing is known"
    (timed / "results" / "cpu" / "00_first" / "run.json").write_text("{")
    quick.clear()
    assert (
        drive(timed, "--recompute") == 2
        and "run.json is damaged" in capfd.readouterr().err
        and quick == []
    )


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0 s"),
        (89, "89 s"),
        (90, "2 min"),
        (3600, "60 min"),
        (5399, "90 min"),
        (5400, "1.5 h"),
        (50058, "13.9 h"),
    ],
)
def test_seconds_in_words(seconds, words):
    assert modes.in_words(seconds) == words


# --- kernels --------------------------------------------------------------------------------------


class Saving:
    """What papermill saves a copy with."""

    def __init__(self) -> None:
        self.n_saved = 0

    def save(self) -> None:
        self.n_saved += 1


def test_a_copy_is_saved_every_few_seconds_and_as_before_at_the_end(monkeypatch):
    now, manager = [100.0], Saving()
    monkeypatch.setattr(notebook_kernels.time, "monotonic", lambda: now[0])
    with pytest.raises(OSError, match="lost"), notebook_kernels.seldom_saved(manager):
        manager.save()
        manager.save()
        assert manager.n_saved == 1
        now[0] += notebook_kernels.SAVED_EVERY
        manager.save()
        assert manager.n_saved == 2
        raise OSError("the kernel is lost")
    manager.save()
    manager.save()
    assert manager.n_saved == 4


def test_a_kernel_is_that_of_this_python(project, tmp_path, monkeypatch):
    """Whatever another place calls by its name."""
    spec = {"argv": ["false"], "display_name": "another", "language": "python"}
    (tmp_path / "kernels" / "python3").mkdir(parents=True)
    (tmp_path / "kernels" / "python3" / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    write_notebook(project / "notebooks" / "00_first.ipynb", "import sys; print(len(sys.prefix))")
    assert drive(project, "--only", "00") == 0
    cells = nbformat.read(project / "notebooks" / "00_first.ipynb", as_version=4).cells
    assert cells[2].outputs[0].text == f"{len(sys.prefix)}\n"


VERDICTS = """
from pathlib import Path
import os
kept = Path(os.environ["PRUNING_UTILS_OUTPUT"]) / "results" / profile / "00_first" / "verdicts.csv"
print(kept.read_text() if kept.exists() else "none")
"""


@pytest.mark.parametrize("profile", ["cpu", "smoke"])
def test_the_head_of_a_kept_notebook_shows_the_verdicts_of_its_run(project, profile, tmp_path):
    """Of smoke nobody reads them, and a second run would take as long as the first."""
    ends = "kept.parent.mkdir(parents=True, exist_ok=True); kept.write_text('new')"
    write_notebook(project / "notebooks" / "00_first.ipynb", VERDICTS, ends)
    words = ["--only", "00", "--profile", profile]
    assert drive(project, *words, "--output", str(tmp_path / "mine")) == 0
    kept = tmp_path / "mine" / "notebooks" / "00_first.ipynb"
    cells = nbformat.read(kept, as_version=4).cells
    shown = next(cell for cell in cells if "kept.read_text" in cell.source).outputs[0].text
    assert shown == ("new\n" if profile == "cpu" else "none\n")


def test_a_model_that_is_given_by_its_folder_may_be_named(project, tmp_path, capsys):
    """As pages do; other folders of this machine may not."""
    folder = project / "models" / "mine"
    source = "print('This run has model', model)"
    write_notebook(project / "notebooks" / "00_first.ipynb", source)
    words = ["--only", "00", "--output", str(tmp_path / "out"), "-p", f"model={folder}"]
    assert drive(project, *words) == 0, capsys.readouterr().err
    write_notebook(project / "notebooks" / "00_first.ipynb", source, f"print({str(project)!r})")
    assert drive(project, *words) == 1
    assert "name folders or addresses of this machine" in capsys.readouterr().err


def test_a_text_to_heal_on_is_found_from_where_the_command_is_given(tmp_path, monkeypatch):
    """Notebooks run in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jsonl").touch()
    (job,) = jobs.plan(ROOT, "smoke", ["09"], {"text.healing_source": "mine.jsonl"}, False)
    assert job.values["text"]["healing_source"] == str(tmp_path / "mine.jsonl")
    sources = "{'mine': 'mine.jsonl', 'other': 'other.jsonl'}"
    (job,) = jobs.plan(ROOT, "smoke", ["11"], {"healing.sources": sources}, False)
    assert job.values["healing"]["sources"] == {
        "mine": str(tmp_path / "mine.jsonl"),
        "other": "other.jsonl",
    }


def test_other_values_do_not_replace_the_committed_results(project, tmp_path, capsys):
    before = files(project)
    assert drive(project, "--only", "00", "-p", "steps=3") == 2
    said = capsys.readouterr().err
    assert "-p steps makes other results" in said and "give --output DIR" in said
    assert drive(project, "--only", "00", "--output", str(project)) == 2
    assert "--output must be another folder than the checkout" in capsys.readouterr().err
    assert files(project) == before


def test_what_is_said_of_another_model_is_not_replaced(project, tmp_path, no_run, capsys):
    out = tmp_path / "out"
    verdicts = out / "results" / "cpu" / "00_first" / "verdicts.csv"
    verdicts.parent.mkdir(parents=True)
    verdicts.write_text("claim,model\nA1,org--mine\nA2,org--mine\n")
    write_notebook(project / "notebooks" / "00_first.ipynb", "model", "evidence.save_verdicts")
    # Tables of several models lie beside each other, and a run that was stopped has no verdicts.
    (verdicts.parent / "run.json").write_text('{"org--peer-costs": {}}')
    words = ["--only", "00", "--output", str(out)]
    for more, asked in (([], "embedded"), (["-p", "model=org/other"], "org/other")):
        assert drive(project, *words, *more) == 2
        said = capsys.readouterr().err
        assert f"{out} holds what 00_first says of org--mine, which a run on {asked} " in said
    for held, model in (("org--mine", "org/mine"), ("gemma-3-270m", "embedded")):
        verdicts.write_text(f"claim,model\nA1,{held}\n")
        with pytest.raises(AssertionError, match="a notebook ran"):
            drive(project, *words, "-p", f"model={model}")
    verdicts.unlink()
    with pytest.raises(AssertionError, match="a notebook ran"):
        drive(project, *words, "-p", "model=org/mine")


def test_what_a_notebook_without_verdicts_says_of_another_model_is_not_replaced(
    project, tmp_path, no_run, capsys
):
    out = tmp_path / "out"
    record = out / "results" / "cpu" / "00_first" / "run.json"
    record.parent.mkdir(parents=True)
    write_notebook(project / "notebooks" / "00_first.ipynb", "model")
    words = ["--only", "00", "--output", str(out)]
    record.write_text('{"org--mine-plan": {}, "org--mine-times": {}}')
    assert drive(project, *words, "-p", "model=org/other") == 2
    assert "says of org--mine, which a run on org/other would" in capsys.readouterr().err
    for tables, model in (
        ('{"org--mine-plan": {}}', "org/mine"),
        ('{"embedded": {}, "smollm2-135m-plan": {}}', "embedded"),
        ("damaged", "org/mine"),
    ):
        record.write_text(tables)
        with pytest.raises(AssertionError, match="a notebook ran"):
            drive(project, *words, "-p", f"model={model}")
    for held, model in (("org--mine-it", "org/mine"), ("org--mine", "org/mine-it")):
        record.write_text(f'{{"{held}-plan": {{}}}}')
        assert drive(project, *words, "-p", f"model={model}") == 2
        assert f"says of {held}, which a run on {model} would" in capsys.readouterr().err


def test_a_kernel_leaves_libraries_alone_when_it_collects_garbage():
    """Those that are imported within a cell too; what a cell makes afterwards is collected."""
    said = """
import gc, types, weakref
class Shell:
    events = types.SimpleNamespace(register=lambda name, hook: hooks.update({name: hook}))
class Node: pass
def get_ipython(): return Shell
hooks = {}
"""
    said += notebook_kernels.FEW_TO_COLLECT
    said += """
import sys
gc.collect()
first = gc.get_freeze_count()
for number in range(200):
    sys.modules[f"library_{number}"] = types.ModuleType(f"library_{number}")
library = [[] for _ in range(10_000)]
gc.collect()
assert gc.get_freeze_count() >= first + 10_000
frozen, node = gc.get_freeze_count(), Node()
node.itself, seen = node, weakref.ref(node)
del node
gc.collect()
assert seen() is None and gc.get_freeze_count() <= frozen
kept = [[] for _ in range(10_000)]
hooks["post_run_cell"](None)
assert gc.get_freeze_count() > frozen + 9_000
"""
    subprocess.run([sys.executable, "-c", said], check=True)


# --- make and the workflow --------------------------------------------------------------------

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
# What a make that runs these tests exports would change what the make that they run prints:
# MAKEFLAGS and MAKELEVEL make it name its folder, and PROFILE, JOBS and ARGS are its own options.
OUTSIDE_MAKE = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith("MAKE") and name not in ("MFLAGS", "PROFILE", "JOBS", "ARGS", "CORES")
}


def recipe(*words: str) -> list[str]:
    """The lines that make would run; none is run."""
    return subprocess.run(
        ["make", "--dry-run", *words],
        cwd=ROOT,
        env=OUTSIDE_MAKE,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()


@needs_make
@pytest.mark.parametrize(
    "case",
    [
        (["regress"], ["--regress", "--profile", "'smoke'"]),
        (
            ["regress", "PROFILE=a100", "RECORD=1", "KEEP=1"],
            ["--regress", "--profile", "'a100'", "--record", "--keep"],
        ),
        (["regress", "JOBS=3"], ["--jobs", "'3'", "--regress", "--profile", "'smoke'"]),
        (["reproduce", "JOBS=2"], ["--jobs", "'2'", "--reproduce"]),
        (
            ["figures", "JOBS=1"],
            ["--jobs", "'1'", "--figures"],
            ["--profile", "gpu", "--only", "04", "--figures"],
        ),
    ],
)
def test_make_passes_options(case):
    words, *options = case
    lines = [line for line in recipe(*words) if "scripts/run_notebooks.py" in line]
    assert [line.split()[2:] for line in lines] == options


@needs_make
def test_the_picture_of_all_verdicts_is_drawn_after_the_notebooks_gave_theirs():
    assert recipe("figures")[-1].split()[1:] == ["scripts/claims.py"]


@needs_make
def test_make_names_the_time_and_figures_use_all_cores():
    shown = subprocess.run(
        ["make"], cwd=ROOT, env=OUTSIDE_MAKE, capture_output=True, text=True, check=True
    ).stdout
    lines = {line.split()[0]: line for line in shown.splitlines() if line}
    assert "minutes at smoke, hours at PROFILE=cpu" in lines["regress"]
    assert "hours" in lines["reproduce"] and "a few minutes" in lines["figures"]
    (line,) = (line for line in recipe("figures") if "--jobs" in line)
    number = line.split()[3].strip("'")
    assert int(number) == os.cpu_count()


@needs_make
def test_make_lab_passes_options_and_turns_autosave_off(tmp_path):
    """A real server, asked as its own page asks it: reading a notebook must not save it."""
    shutil.copyfile(ROOT / "Makefile", tmp_path / "Makefile")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    (tmp_path / "notebooks").mkdir()
    python.write_text(
        f'#!/bin/sh\nJUPYTER_CONFIG_PATH=.venv/etc/jupyter exec "{sys.executable}" "$@"\n'
    )
    python.chmod(0o755)
    for name in ("pyproject.toml", "requirements-embedded.txt", ".venv/.installed"):
        (tmp_path / name).touch()  # the last is the newest: nothing is installed
    environment = {
        **OUTSIDE_MAKE,
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"),
        "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
        "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "lab"),
    }
    with open(tmp_path / "said", "w") as said:
        server = subprocess.Popen(
            ["make", "lab", "ARGS=--no-browser --allow-root --port=0"],
            cwd=tmp_path,
            stdout=said,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        wait_for(
            lambda: server.poll() is not None or "/lab?token=" in (tmp_path / "said").read_text(),
            60,
        )
        address, token = re.findall(
            r"(http://\S+?)/lab\?token=(\w+)", (tmp_path / "said").read_text()
        )[-1]
        asked = f"{address}/lab/api/settings/@jupyterlab/docmanager-extension:plugin?token={token}"
        properties = {}

        def answers():
            """A server says where it is a moment before it listens there."""
            try:
                with urllib.request.urlopen(asked, timeout=30) as answer:
                    properties.update(json.load(answer)["schema"]["properties"])
            except urllib.error.URLError as error:
                assert isinstance(error.reason, ConnectionRefusedError), error
            return bool(properties)

        wait_for(answers, 30)
        assert properties["autosave"]["default"] is False
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def test_the_workflow_tests_once_goes_on_records_and_keeps_what_was_made():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "notebooks.yml").read_text())
    events = workflow[True]  # YAML reads the word on so
    assert events["schedule"] and workflow["concurrency"]["cancel-in-progress"] == (
        "${{ github.event_name == 'pull_request' }}"
    )
    steps = {name: job["steps"] for name, job in workflow["jobs"].items()}
    commands = {
        name: [step["run"] for step in found if "run" in step] for name, found in steps.items()
    }
    site = "make book && make test ARGS=tests/test_book.py"
    assert commands["smoke"] == ["make test", site], "the smoke notebooks are part of the first"
    uploads = {
        name: [step for step in found if "upload-artifact" in step.get("uses", "")]
        for name, found in steps.items()
    }
    assert [step["if"] for step in uploads["smoke"]] == ["failure()"]
    assert [step["if"] for step in uploads["papers"]] == ["always()"]
    kept = uploads["papers"][0]["with"]["path"].split()
    assert kept == ["tests/summaries/a100.csv", "regressed/a100", "!regressed/a100/checkpoints"]
    assert steps["papers"][0]["with"]["clean"] is False, (
        "what was computed lies there for the next start"
    )


@pytest.mark.parametrize(
    ("committed", "asked"), [(True, "PROFILE=a100 KEEP=1"), (False, "PROFILE=a100 KEEP=1 RECORD=1")]
)
def test_the_workflow_records_where_nothing_is_committed(tmp_path, committed, asked):
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "notebooks.yml").read_text())
    (command,) = (
        step["run"]
        for step in workflow["jobs"]["papers"]["steps"]
        if "make regress" in step.get("run", "")
    )
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    summaries = tmp_path / "tests" / "summaries" / "a100.csv"
    summaries.parent.mkdir(parents=True)
    summaries.write_text("left by an earlier start\n")
    subprocess.run([*git, "init", "-q"], check=True)
    if committed:
        subprocess.run([*git, "add", "."], check=True)
    (tmp_path / "make").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "make").chmod(0o755)
    done = subprocess.run(
        ["bash", "-e", "-c", command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    assert done.stdout == f"regress {asked}\n"


def test_a_model_is_looked_for_where_the_command_is_given(project, tmp_path, monkeypatch):
    (tmp_path / "my models" / "small").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    write_notebook(project / "notebooks" / "00_first.ipynb", "model")
    given = {"model": "my models/small"}
    (job,) = jobs.plan(project, "cpu", ["00"], given, recompute=False)
    assert job.values["model"] == str(tmp_path / "my models" / "small")
    (job,) = jobs.plan(project, "cpu", ["00"], {"model": "org/mine"}, recompute=False)
    assert job.values["model"] == "org/mine"
