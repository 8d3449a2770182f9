"""The rehearsal: small models and texts stand in for those of a hub, and find what is wrong."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pandas as pd
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import comparisons  # noqa: E402
import jobs  # noqa: E402
import notebook_files  # noqa: E402
import rehearsal  # noqa: E402
import small_hub  # noqa: E402

from pruning_utils import data, evaluation, instructions, models  # noqa: E402

REFERENCE = ROOT / "reference"
RECORDED = ROOT / "tests" / "summaries" / "rehearsal.csv"
LLAMA, LLAMA_3 = "meta-llama/Llama-2-7b-hf", "meta-llama/Llama-3.1-8B-Instruct"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A hub's cache with every model that is known."""
    folder = tmp_path_factory.mktemp("hub")
    configured = {name: rehearsal.configuration(name, REFERENCE) for name in small_hub.FORMS}
    small_hub.place(folder, configured)
    return folder


@pytest.fixture
def hub(home, monkeypatch) -> None:
    """The cache, as the libraries of this process see it."""
    from huggingface_hub import constants

    for module, name, value in (
        (constants, "HF_HUB_CACHE", str(home / "hub")),
        (constants, "HF_HUB_OFFLINE", True),
        (datasets.config, "HF_DATASETS_CACHE", home / "datasets"),
        (datasets.config, "HF_HUB_OFFLINE", True),
    ):
        monkeypatch.setattr(module, name, value)
    data._hub_documents.cache_clear()
    instructions._clean_pairs.cache_clear()
    yield
    data._hub_documents.cache_clear()
    instructions._clean_pairs.cache_clear()


@pytest.mark.parametrize("name", small_hub.FORMS)
def test_a_small_model_is_the_real_one_but_for_its_width(name, hub):
    model, tokenizer = models.load_model(name, dtype="float32")
    real, config = rehearsal.configuration(name, REFERENCE), model.config
    for field in (
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "tie_word_embeddings",
        "model_type",
    ):
        assert getattr(config, field) == getattr(real, field), field
    assert len(models.decoder_layers(model)) == real.num_hidden_layers
    assert sum(weight.numel() for weight in model.parameters()) < 5e7
    ids = tokenizer("Layers fell, one after the other.", return_tensors="pt")["input_ids"]
    assert model(ids).logits.isfinite().all()
    assert model.get_input_embeddings().weight.any(dim=1).all(), "no token is all zeros"
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == "Layers fell, one after the other."


@pytest.mark.parametrize("name", small_hub.FORMS)
def test_a_small_model_in_nf4_is_the_same_on_all_processors(name, hub):
    """Weights in NF4 as bitsandbytes reads them here, against its definition."""
    from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise
    from bitsandbytes.nn import Linear4bit

    model, _ = models.load_model(name, dtype="float32", quantize="nf4")
    layers = models.decoder_layers(model)[:1].modules()
    linear = {part.in_features: part for part in layers if isinstance(part, Linear4bit)}
    assert linear and all(map(small_hub.is_read_alike, linear))
    for part in linear.values():
        state = part.weight.quant_state
        scales = dequantize_blockwise(state.absmax, state.state2) + state.offset
        high_low = torch.stack([part.weight.data >> 4, part.weight.data & 15], dim=-1).flatten()
        n = part.in_features * part.out_features
        exact = state.code[high_low[:n].long()] * scales.repeat_interleave(64)[:n]
        found = dequantize_4bit(part.weight.data, state).flatten()
        assert torch.allclose(found, exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("name", "begins", "ends", "chats"),
    [
        (LLAMA, "<s>", "</s>", False),
        ("mistralai/Mistral-7B-v0.1", "<s>", "</s>", False),
        (LLAMA_3, "<|begin_of_text|>", "<|eot_id|>", True),
        ("google/gemma-2-2b", "<bos>", "<eos>", False),
        ("Qwen/Qwen1.5-7B", None, "<|endoftext|>", True),
        ("microsoft/phi-2", None, "<|endoftext|>", False),
    ],
)
def test_a_small_tokenizer_treats_texts_as_the_real_one(name, begins, ends, chats, hub):
    tokenizer = AutoTokenizer.from_pretrained(name)
    prefix = data.text_prefix(tokenizer)
    assert tokenizer.convert_ids_to_tokens(prefix) == ([begins] if begins else [])
    assert tokenizer.eos_token == ends and bool(tokenizer.chat_template) == chats
    for text in ("naïve — 42\n\tß 漢", " two  blanks "):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids).strip() == text.strip()


def test_rows_without_tokens_are_those_of_models_that_have_them(hub):
    for name, form in small_hub.FORMS.items():
        model = AutoModelForCausalLM.from_pretrained(name)
        spare = model.config.vocab_size - len(AutoTokenizer.from_pretrained(name))
        assert (spare > 0) == form.spare, name


@pytest.mark.parametrize("source", data.HUB_CORPORA)
def test_texts_of_a_hub_are_read_by_the_same_code(source, hub):
    known = AutoTokenizer.from_pretrained(LLAMA)
    windows = data.calibration_windows(known, 4, 32, source=source)
    assert windows.shape == (4, 32)
    assert len(set(data.documents(source, "calibration"))) > 20


@pytest.mark.parametrize("source", instructions.HUB)
def test_instructions_of_a_hub_are_read_by_the_same_code(source, hub):
    known = AutoTokenizer.from_pretrained(LLAMA_3)
    (first, *others) = instructions.instruction_texts(known, source)
    assert "<|start_header_id|>assistant" in first and len(others) > 20


def test_a_model_of_a_hub_answers(hub):
    model, tokenizer = models.load_model("Qwen/Qwen1.5-7B", dtype="float32")
    found = evaluation.evaluate_tasks(model, tokenizer, ["piqa"], limit=3).questions
    assert len(found) == 3 and found["nll"].gt(0).all()


def test_a_model_of_unknown_tokenizer_is_refused(tmp_path):
    config = rehearsal.configuration(LLAMA, REFERENCE)
    with pytest.raises(ValueError, match="no small tokenizer is known for a/b; there are: Hug"):
        small_hub.place(tmp_path, {"a/b": config})
    assert not list(tmp_path.iterdir())


# --- values ---------------------------------------------------------------------------------------


def test_of_the_smoke_profile_the_model_and_its_depth_alone_are_others():
    for job in jobs.plan(ROOT, "smoke", [], {}, False):
        found = rehearsal.rehearsed(job)
        of_depth = {name.split(".")[0] for name in rehearsal.OF_SHORT.get(job.name, {})}
        for name, value in found.values.items():
            if name == "model":
                assert value == found.changes[name] == rehearsal.SMOLLM2
            elif name in of_depth:
                assert value == found.changes.get(name, value) != job.values[name]
            else:
                assert value == job.values[name]
        assert found.profile == "rehearsal-smoke"
        assert job.values["model"] == "embedded", "the job itself stays"


def test_the_stand_in_of_the_smoke_profile_has_fewer_layers_and_the_known_one_stays():
    known = rehearsal.configuration(rehearsal.SMOLLM2, REFERENCE)
    n_layers = known.num_hidden_layers
    shorter = rehearsal.configuration(rehearsal.SMOLLM2, REFERENCE, short=True)
    assert shorter.num_hidden_layers == rehearsal.N_SHORT_LAYERS < n_layers
    assert known.num_hidden_layers == n_layers
    assert rehearsal.configuration(rehearsal.SMOLLM2, REFERENCE).num_hidden_layers == n_layers


def test_what_is_long_is_divided_and_what_could_fail_stays():
    for job in jobs.plan(ROOT, "a100", [], {}, False):
        found = rehearsal.rehearsed(job)
        assert found.profile == "rehearsal" and found.values["profile"] == "smoke"
        assert found.values["model"] == job.values["model"]
        for name in ("depths", "shares", "shapes", "precisions"):
            assert found.values.get(name) == job.values.get(name)
        healing, before = found.values.get("healing", {}), job.values.get("healing", {})
        assert healing.get("method") == before.get("method")
        assert healing.get("steps", 0) <= 8
        if isinstance(before.get("rates"), dict):
            assert healing["rates"].keys() == before["rates"].keys()
        tasks = [values.get("scored_on", {}).get("tasks") for values in (job.values, found.values)]
        assert tasks[0] == tasks[1]


@pytest.mark.parametrize("profile", ["gpu", "a100"])
def test_no_notebook_counts_with_a_number_that_a_profile_leaves_open(profile):
    """A rehearsal gives it one; on the hardware all questions are asked, which None says."""
    for job in jobs.plan(ROOT, profile, [], {}, False):
        cells = notebook_files.read_notebook(job.path).cells
        source = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
        for mapping in ("scored_on", "control", "shots"):
            for key, value in job.values.get(mapping, {}).items():
                used = rf"""{mapping}\[["']{key}["']\]"""
                if value is None:
                    counted = re.search(rf"{used} ?[*/+-]|[*/+-] ?{used}|\{{{used}", source)
                    assert not counted, f"{job.name}: {counted[0]}"


def test_a_profile_that_asks_for_more_text_than_there_is_is_refused():
    """As the a100 profile did: XSum has seven documents of 2,048 tokens."""
    values = {"scored_on": {"texts": {"c4": 2000, "xsum": 100}}}
    (job,) = jobs.plan(ROOT, "a100", ["03"], {}, False)
    job.values["scored_on"] = {**job.values["scored_on"], **values["scored_on"]}
    (fault,) = rehearsal.short_texts([job], REFERENCE)
    assert fault.startswith("03_depth_and_next_token_loss: 100 documents of xsum with 2048 tokens")
    with pytest.raises(jobs.Refused, match="of which there are 7"):
        rehearsal.rehearse(
            [job], ROOT, others=False, record=False, keep=False, recompute=False, at_once=1
        )


def test_a_rehearsal_that_is_refused_leaves_nothing(tmp_path):
    shutil.copytree(ROOT / "reference", tmp_path / "reference")
    (job,) = jobs.plan(ROOT, "a100", ["01"], {"model": "a/b"}, False)
    with pytest.raises(jobs.Refused, match="a/b"):
        rehearsal.rehearse(
            [job], tmp_path, others=False, record=False, keep=False, recompute=False, at_once=1
        )
    assert [path.name for path in tmp_path.iterdir()] == ["reference"]


@pytest.mark.parametrize("recompute", [False, True])
def test_stand_ins_are_made_anew_where_all_is(recompute, tmp_path, monkeypatch):
    """A kept rehearsal leaves them, and no digest tells those of another form."""
    home = tmp_path / "regressed" / f"{rehearsal.NAME}-hub"
    home.mkdir(parents=True)
    (home / "older").write_text("stand-in")
    shutil.copytree(ROOT / "reference", tmp_path / "reference")
    found = []
    monkeypatch.setattr(
        rehearsal.small_hub, "place", lambda home, models: found.append((home / "older").exists())
    )
    monkeypatch.setattr(rehearsal.modes, "regress", lambda jobs, **given: True)
    monkeypatch.setattr(rehearsal.os, "environ", {})
    chosen = jobs.plan(ROOT, "a100", ["01"], {}, False)
    assert rehearsal.rehearse(
        chosen, tmp_path, others=False, record=False, keep=True, recompute=recompute, at_once=1
    )
    assert found == [not recompute]


@pytest.mark.parametrize("profile", ["a100", "gpu", "cpu", "smoke"])
def test_no_profile_asks_for_more_text_than_there_is(profile):
    chosen = jobs.plan(ROOT, profile, [], {}, False)
    assert rehearsal.short_texts(chosen, REFERENCE) == []
    # Words of WikiText-2 to calibrate on (Merity et al., Table 1); a tokenizer makes no fewer
    # tokens. The rule of 13 words takes some of its paragraphs, of which a tenth is put aside.
    most = 0.9 * 2_088_628
    for job in chosen:
        text = job.values["text"]
        if "wikitext2" in [text.get("source"), *text.get("sources", [])]:
            assert text["n_samples"] * text["seq_len"] <= most
        for source, count, _ in text.get("draws", []):
            assert source != "wikitext2" or count * text["seq_len"] <= most


# --- a run ----------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path) -> Path:
    """What the driver needs of a checkout, with one notebook and no recorded numbers."""
    folder = tmp_path / "checkout"
    for name in ("profiles", "reference"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "notebooks").mkdir()
    for path in (ROOT / "notebooks").glob("01_*.ipynb"):
        shutil.copy(path, folder / "notebooks")
    profile = folder / "profiles" / "a100.yaml"
    sections = yaml.safe_load(profile.read_text())
    of_it = {name: sections[name] for name in ("all", "01_layer_similarity")}
    profile.write_text(yaml.safe_dump(of_it))
    return folder


def command(checkout: Path, *words: str) -> list[str]:
    program = [sys.executable, str(ROOT / "scripts" / "run_notebooks.py"), "--profile", "a100"]
    return [*program, "--rehearse", "--only", "01", "--project", str(checkout), *words]


def saved_points(checkout: Path) -> list[Path]:
    """Points that are written whole; a file that begins with a dot has not got its name yet."""
    found = checkout.glob("regressed/*/results/smoke/01*/*.points/[!.]*.json")
    return [path for path in found if path.stem != "parameters"]


def children_of(number: int) -> list[int]:
    """Processes that a process has started."""
    if Path("/proc/self/stat").exists():  # small images have no ps
        pairs = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                # The name, in brackets, may hold blanks; state and parent follow.
                parent = path.read_text().rpartition(")")[2].split()[1]
                pairs.append((path.parent.name, parent))
    else:
        asked = ["ps", "-A", "-o", "pid=,ppid="]
        listed = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
        pairs = [tuple(line.split()) for line in listed.splitlines()]
    return [int(own) for own, parent in pairs if int(parent) == number]


@pytest.mark.slow
def test_a_run_of_a100_goes_on_after_its_machine_was_lost_and_is_recorded(checkout):
    """As in the workflow: the first run records, however many machines it takes; others compare."""
    with (checkout / "first.log").open("w") as log:
        first = subprocess.Popen(command(checkout, "--record"), stdout=log, stderr=log)
        kernels: list[int] = []
        while not saved_points(checkout):
            assert first.poll() is None, (checkout / "first.log").read_text()[-2000:]
            # Asked before they are needed: other points are saved while ps is at work.
            if list(checkout.glob("regressed/*/results/smoke/01*")):
                kernels = children_of(first.pid)
            time.sleep(0.02)
        for number in (*kernels, first.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        first.wait()
    n_saved = len(saved_points(checkout))
    recorded = checkout / "tests" / "summaries" / "rehearsal.csv"
    assert n_saved in (1, 2) and not recorded.exists()
    again = subprocess.run(
        command(checkout, "--record", "--keep"), capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr[-3000:]
    assert f" {n_saved}/3 [00:00<" in again.stderr, "it begins with the points that were saved"
    numbers, committed = pd.read_csv(recorded), pd.read_csv(RECORDED)
    of_whole_run = committed[committed["notebook"] == "01_layer_similarity"]
    compared = comparisons.compare_summaries(of_whole_run, numbers)
    assert len(compared) > 2 and not [found for found in compared if found.fault]
    other = subprocess.run(command(checkout), capture_output=True, text=True, check=False)
    assert other.returncode == 0 and re.search(r"(\d+) of \1 agree", other.stdout), other.stdout
    assert not list((checkout / "regressed").glob("*")), "nothing is left behind"
