"""The collection as a reader finds it: notebooks run, results are fresh, figures show them, the README's code works."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from pruning_utils import records, results, runtime

ROOT = Path(__file__).resolve().parents[1]
TABLES = sorted(path for path in (ROOT / "results").glob("*/*/*.csv") if ".measured" not in path.name)
FIGURES = sorted((ROOT / "figures").rglob("*.png"))
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def run(*command, cwd=ROOT, **variables):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PRUNING_UTILS_OUTPUT")}
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env=environment | variables, text=True,
                          capture_output=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_smoke_notebooks_give_the_recorded_numbers():
    run("scripts/run_notebooks.py", "--regress", "--profile", "smoke")


def test_every_figure_redraws_from_committed_results_without_a_model(tmp_path):
    """With an empty cache and no embedded weights to be had, nothing but the tables can be the source."""
    before = {path: path.read_bytes() for path in FIGURES}
    run("scripts/run_notebooks.py", "--figures", PRUNING_UTILS_CACHE=str(tmp_path))
    assert not any(tmp_path.iterdir()), "no model was unpacked"
    assert {path.name for path in FIGURES if path.read_bytes() != before[path]} == set(), "redrawn to the byte"


@pytest.mark.parametrize("path", TABLES, ids=lambda path: f"{path.parts[-3]}-{path.parts[-2]}-{path.stem}")
def test_results_are_fresh(path):
    if records.awaiting(path) is None:
        assert results.stale(path) == [], "computed by other code than this: run the notebook with --recompute"
    assert results.read_record(path)["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_there_are_results_and_figures():
    assert {path.parts[-2] for path in TABLES} >= {
        "00_quickstart", "01_layer_similarity", "02_depth_and_question_answering", "04_simple_against_similarity",
        "05_robustness", "06_block_importance", "07_depth_against_width", "08_lora_against_continued_pretraining",
        "09_seven_metrics", "10_how_to_heal", "11_one_shot_or_iterative", "12_the_recommended_model"}
    assert {path.stem.split("_")[0] for path in FIGURES} >= {f"{number:02}" for number in range(13)}


@pytest.mark.parametrize("path", FIGURES, ids=lambda path: path.stem)
def test_figures_show_the_committed_results(path):
    named = re.findall(r"(\S+\.csv) sha256 ([0-9a-f]{64})", Image.open(path).info["Source"])
    current = {(table.name, results.read_record(table)["sha256"]) for table in TABLES}
    assert named and set(named) <= current
    assert path.with_suffix(".pdf").is_file()


def test_readme_code_runs_as_it_stands(tmp_path):
    (tmp_path / "results").symlink_to(ROOT / "results")
    for block in BLOCKS:
        run("-c", block, cwd=tmp_path)
    assert (tmp_path / "mine.pdf").stat().st_size > 1000
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoints" / "pruned")
    assert model.config.num_hidden_layers == len(model.model.layers) == 22


def test_readme_names_what_is_there():
    readme = (ROOT / "README.md").read_text()
    links = [link for link in re.findall(r"\]\(([^)]+)\)", readme) if not link.startswith("http")]
    assert [link for link in links if not (ROOT / link).exists()] == []
    missing = [path.stem for path in (ROOT / "notebooks").glob("*.ipynb") if f"notebooks/{path.name}" not in readme]
    missing += [path.name for path in FIGURES if f"figures/{path.name}" not in readme]
    assert missing == [], "README maps every notebook and figure"


def test_project_root_is_this_checkout():
    assert runtime.project_root() == ROOT
