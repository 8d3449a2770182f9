"""Memory and arithmetic before the work: against real tensors, real processes and real records."""

import json
import runpy
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from tiny_model import embedded_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from pruning_utils import efficiency, evaluation, healing, models, runtime, surgery
from pruning_utils.planning import machines, rehearsal, stages
from pruning_utils.studies import recipes, study

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import bill  # noqa: E402
import configurations  # noqa: E402
import jobs  # noqa: E402
import question_tokens  # noqa: E402
import run_notebooks  # noqa: E402
import work  # noqa: E402

F32 = torch.float32
METHODS = ("lora", "qlora", "dora", "last_layers", "full")


def small(n_layers: int = 6, **given) -> LlamaConfig:
    """A configuration whose sizes all differ."""
    sizes = {"hidden_size": 64, "intermediate_size": 192, "vocab_size": 384}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    return LlamaConfig(**{**sizes, **heads, "num_hidden_layers": n_layers, **given})


def real(config: LlamaConfig) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


# --- a rehearsal is what happens ------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_those_of_the_model(tied):
    config = small(tie_word_embeddings=tied)
    stored = efficiency.stored_parameters(real(config))
    assert stages.weight_bytes(config, F32) == 4 * stored["total"]
    assert stages.weight_bytes(config, torch.bfloat16) == 2 * stored["total"]
    a_layer = stored["layers"] // 6
    assert stages.weight_bytes(config, F32, n_dropped=4) == 4 * (stored["total"] - 4 * a_layer)


def test_nf4_weights_take_what_bitsandbytes_stores():
    config = small()
    stored = efficiency.weight_bytes(models.quantized_copy(real(config)))
    n_linear = 6 * 7
    # weight_bytes leaves out the two tables of values of each weight, and its offset.
    tables = 4 * (rehearsal.NF4_VALUES + rehearsal.SCALE_VALUES + 1) * n_linear
    found = stages.scan(config, F32, seq_len=8, batch_size=2, quantize="nf4")
    assert found.parts[stages.WEIGHTS] == stored + tables


def test_operations_are_those_that_are_counted_on_the_model():
    config = small()
    counted = efficiency.forward_flops(real(config), batch_size=3, n_tokens=16)
    last_token = 3 * 2 * config.hidden_size * config.vocab_size
    found = stages.losses(config, F32, seq_len=16, batch_size=3)
    assert found.flops == counted - last_token


@pytest.mark.parametrize("method", METHODS)
def test_a_step_without_numbers_takes_what_a_real_step_takes(method):
    """The same code on real tensors, which are counted as they come and go."""
    config = small(n_layers=3)
    settings = {"method": method, "batch_size": 2, "dropout": 0.1, "last_k": 2}
    planned, _, _ = stages.heal(config, F32, seq_len=32, **settings)
    model = real(config)
    trained = healing.trainable_copy(model, healing.check_settings(model, settings))
    tally = rehearsal.Tally(config.vocab_size)
    with tally:
        with tally.making(stages.COPY):
            for tensor in (*trained.parameters(), *trained.buffers()):
                tally._add(tensor)
                for part in vars(getattr(tensor, "quant_state", None) or object).values():
                    if isinstance(part, torch.Tensor):
                        tally._add(part)
        passing, _ = stages._step(trained, tally, 2, 32, in_bfloat16=False)
    made = (stages.ACTIVATIONS, stages.LOGITS, stages.GRADIENTS)
    found = sum(passing.parts.get(part, 0) for part in made)
    expected = sum(planned.parts.get(part, 0) for part in made)
    # Autograd adds a gradient in place where nothing else holds it; here something always does.
    assert found <= expected <= 1.06 * found and passing.flops == planned.flops


def test_parts_are_what_they_are_called():
    config = small()
    passing, stepping, ending = stages.heal(
        config, F32, seq_len=16, n_dropped=2, method="full", batch_size=1024
    )
    trained = stages.weight_bytes(config, F32, n_dropped=2)
    for need in (passing, stepping):
        assert need.parts[stages.WEIGHTS] >= stages.weight_bytes(config, F32)
        assert need.parts[stages.TRAINED] == trained
        # Two moments, and a count of steps for each tensor.
        assert 0 <= need.parts[stages.OPTIMISER] - 2 * trained <= 4 * 100
    # Of 1,024 windows 512 pass at once, so that gradients stand from the first micro-batch on.
    assert passing.parts[stages.GRADIENTS] == trained
    assert stages.GRADIENTS not in ending.parts
    once, _, _ = stages.heal(config, F32, seq_len=16, n_dropped=2, method="full", batch_size=512)
    assert passing.flops == 2 * once.flops


def test_checkpointing_takes_less_memory_and_more_arithmetic():
    given = {"seq_len": 64, "method": "lora", "batch_size": 4}
    kept, _, _ = stages.heal(small(), F32, checkpointing=False, **given)
    again, _, _ = stages.heal(small(), F32, checkpointing=True, **given)
    assert again.parts[stages.ACTIVATIONS] < kept.parts[stages.ACTIVATIONS] / 2
    assert again.flops > kept.flops


def test_the_cache_holds_keys_and_values_of_all_tokens():
    config = small()
    first, last = stages.generation(config, F32, batch_size=2, prompt_tokens=10, new_tokens=4)
    a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert first.parts[stages.CACHE] == 2 * 10 * a_token
    assert last.parts[stages.CACHE] == 2 * (10 + 4 - 1) * a_token
    shared = stages.questions(config, F32, n_tokens=12, n_shared=20, batch_size=3)
    assert shared.parts[stages.CACHE] >= (20 + 3 * (20 + 11)) * a_token
    alone = stages.questions(config, F32, n_tokens=12, batch_size=3)
    assert shared.peak > alone.peak and stages.CACHE not in alone.parts


@pytest.mark.parametrize(
    ("method", "checkpointing"),
    [("lora", True), ("qlora", False), ("last_layers", True), ("full", False)],
)
def test_all_layers_follow_from_a_few(method, checkpointing):
    config = small(n_layers=7)
    given = {"seq_len": 16, "method": method, "batch_size": 2, "checkpointing": checkpointing}
    few, more, every = (stages.heal(config, F32, n_dropped=7 - kept, **given) for kept in (4, 5, 7))
    for one, two, whole in zip(few, more, every, strict=True):
        found = stages.with_layers(one, two, 3)
        assert found.peak == pytest.approx(whole.peak, rel=0.01) and found.flops == whole.flops


def test_wrong_numbers_are_refused():
    with pytest.raises(ValueError, match="n_dropped must be a whole number from 0 to 5, got 6"):
        stages.losses(small(), F32, seq_len=8, n_dropped=6)
    with pytest.raises(ValueError, match="method must be one of"):
        stages.heal(small(), F32, seq_len=8, method="best", batch_size=1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc")
def test_a_process_holds_what_was_planned(tmp_path, monkeypatch):
    """On a small model here; benchmarks/planning.py compares six methods and four shapes."""
    measuring = runpy.run_path(str(ROOT / "benchmarks" / "planning.py"))
    monkeypatch.setenv(measuring["THRESHOLD"], str(2**16))
    config = small(4, hidden_size=512, intermediate_size=1536, vocab_size=1024)
    tokenizer = embedded_tokenizer()
    surgery.save(real(config), tokenizer, tmp_path / "model")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import planning

    for method in ("taylor", "lora"):
        plan = planning.predicted(config, method, (16, 128, 1))
        held = planning.measured(str(tmp_path / "model"), method, (16, 128, 1))
        assert plan == pytest.approx(held, rel=0.1), method


# --- what notebooks do ----------------------------------------------------------------------------

JOBS = {job.name: job for job in jobs.plan(ROOT, "cpu", [], {}, False)}
LAYERS = {"smollm2-135m": 30, "gemma-3-270m": 18, "embedded": 30}


def recorded(notebook: str) -> list[tuple[work.Table, dict]]:
    """The tables that a notebook asks for and that are committed: what is said of them here, and
    their record."""
    folder = ROOT / "results" / "cpu" / notebook
    listed = json.loads((folder / "run.json").read_text())
    is_by_model = "models_at_hand" in JOBS[notebook].path.read_text(encoding="utf-8")
    found = []
    for model in [name for name in LAYERS if (name != "embedded") == is_by_model]:
        values, is_second = JOBS[notebook].values, model == "gemma-3-270m"
        for table in work.tables_of(notebook, values, LAYERS[model], is_second=is_second):
            name = "-".join(filter(None, (model, table.name)))
            if name in listed:
                found.append((table, listed[name]))
    return found


@pytest.mark.parametrize("notebook", JOBS)
def test_tables_have_the_points_that_were_recorded(notebook):
    tables = recorded(notebook)
    assert tables
    for table, record in tables:
        n_points = len(record.get("points", table.points))
        if table.is_most:
            assert 0 < n_points <= len(table.points), table.name
        else:
            assert n_points == len(table.points), table.name


@pytest.mark.parametrize("notebook", JOBS)
def test_tables_are_measured_as_was_recorded(notebook):
    for table, record in recorded(notebook):
        asked = record["parameters"]
        if table.kind != "study" or "seq_len" not in asked:
            continue
        for key in {"texts", "tasks", "limit", "seq_len", "dtype"} & asked.keys():
            assert getattr(table, key) == asked[key], (table.name, key)
        trained = asked.get("healing_settings")
        if trained and any(point.recipe for point in table.points):
            kept = {key: value for key, value in trained.items() if key != "learning_rate"}
            assert {key: table.healing[key] for key in kept} == kept, table.name


def test_tokens_of_questions_are_those_of_the_tasks():
    listed = pd.read_csv(ROOT / "reference" / question_tokens.FILE).set_index("task")
    assert list(listed.index) == list(evaluation.TASKS)
    tokenizer = embedded_tokenizer()
    with evaluation.quiet_libraries():
        found = question_tokens.counted("openbookqa", tokenizer)
    assert found == {"task": "openbookqa", **listed.loc["openbookqa"].to_dict()}


@pytest.mark.parametrize("profile", ["smoke", "cpu", "gpu", "a100"])
def test_05_asks_for_the_answers_that_04_computes(profile):
    """It would compute them anew, or refuse them, were anything else asked for."""
    values = {job.name[:2]: job.values for job in jobs.plan(ROOT, profile, [], {}, False)}
    simple, robust = values["04"], values["05"]
    for name in ("model", "revision", "dtype", "seed", "seeds", "text"):
        assert simple[name] == robust[name], name
    for name in ("texts", "tasks", "papers"):
        assert simple["scored_on"][name] == robust["scored_on"][name], name
    assert simple["scored_on"]["more_questions"] == robust["scored_on"]["n_questions"]
    assert simple["sweep"]["compared"] == robust["share_removed"]
    # Each tries rates for models of its own.
    for name in simple["healing"].keys() & robust["healing"].keys() - {"rates"}:
        assert simple["healing"][name] == robust["healing"][name], name


# --- the bill -------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """What is rehearsed, by name, in the place of rehearsals: a byte and 1e12 operations each."""
    asked = []

    def instead(stage: str):
        def found(config, dtype, **given):
            asked.append((stage, given))
            need = stages.Need({stages.WEIGHTS: 10**9, stages.OPTIMISER: 10**6}, 10**12)
            return (need, need, need) if stage == "heal" else need

        return found

    for stage in ("scan", "taylor", "perplexity_without_layer", "losses", "questions", "heal"):
        monkeypatch.setattr(stages, stage, instead(stage))
    monkeypatch.setattr(
        stages, "generation", lambda *_, **given: 2 * (stages.Need({stages.CACHE: 10**11}, 1),)
    )
    return asked


def bill_of(profile: str, *only: str) -> list[bill.Line]:
    made = bill.Bill(ROOT / "reference", machines.A100)
    found = []
    for job in jobs.plan(ROOT, profile, list(only), {}, False):
        found += made.lines(job)
    return found


@pytest.mark.parametrize("profile", ["smoke", "cpu", "gpu", "a100"])
def test_every_notebook_of_every_profile_has_a_line(profile, counted):
    lines = bill_of(profile)
    assert {line.notebook for line in lines} == set(JOBS)
    assert all(line.seconds > 0 for line in lines)
    said = bill.text_of(lines, kind="cuda", price=3.0)
    total = sum(line.seconds for line in lines) / 3600
    assert said.splitlines()[-1].split()[-1] == f"{3 * total:.2f}"
    without = bill.text_of(lines, kind="cuda", price=None)
    assert "dollars" not in without
    head, *rows = without.splitlines()
    start = head.index("most memory")
    assert all(row[start - 1] == " " and row[start] != " " for row in rows[:-1]), "words align"


def test_a_model_that_was_trained_is_not_trained_again(counted):
    both = bill_of("cpu", "06")
    made = bill.Bill(ROOT / "reference", machines.A100)
    job = next(iter(jobs.plan(ROOT, "cpu", ["06"], {}, False)))
    first, again = made.lines(job)[0], made.lines(job)[0]
    assert both[0].seconds == first.seconds > again.seconds > 0
    assert both[0].disk == first.disk > again.disk == 0


@pytest.mark.parametrize("method", [*METHODS, "last_layers untie=false"])
def test_room_on_the_disk_is_what_saves_take(method, tiny, tmp_path):
    name, _, more = method.partition(" ")
    (stage,) = recipes.Recipe.parse(f"{name} 0.001 3 {more}".strip()).stages
    settings = {"rank": 32, "batch_size": 2, "warmup_steps": 0, **stage.settings}
    # Of four layers all are outlined; that more follow from a few is a test above.
    config, (_, tokenizer) = small(n_layers=4), models.load_model(tiny)
    ids = torch.randint(0, 384, (6, 16))
    model = real(config)
    healed = healing.heal(model, tokenizer, ids, output_dir=tmp_path, **settings).model
    files = [*tmp_path.glob("checkpoint-*/*.safetensors"), *tmp_path.glob("checkpoint-*/optim*")]
    costs = bill.Costs(config, machines.A100, pd.DataFrame())
    table = work.Table("", "study", (), seq_len=16, healing=settings, dtype="float32")
    cost = costs.steps(table, settings, 0, 3)
    measured = sum(path.stat().st_size for path in files)
    assert len(files) == 4, "two saves of two files"
    assert measured == pytest.approx(cost.saved * 2 / 3, rel=0.1)
    if method not in healing.ADAPTERS:
        measured = sum(weight.nbytes for weight in study.changed_weights(healed, model).values())
    assert measured == pytest.approx(cost.kept, rel=0.1)


STAGE = recipes.Recipe.parse("lora 0.01 8").stages[0].settings


def test_seconds_are_those_of_the_operations_of_all_batches(counted):
    """Each batch has 1e12 of them here."""
    costs, _ = bill.Bill(ROOT / "reference", machines.A100).of_model("smollm2-135m")
    n_tokens = 3 * bill.BATCH * 128
    found = costs.forward(n_tokens, 128, torch.float32, costs.n_layers)
    assert found == pytest.approx(machines.A100.seconds(3e12, torch.float32))


def test_rounds_take_room_until_the_last_one(counted):
    made = bill.Bill(ROOT / "reference", machines.A100)
    costs, _ = made.of_model("smollm2-135m")
    table = work.Table("", "study", (), seq_len=16, healing={"batch_size": 2}, dtype="float32")
    trained = [
        [cost for cost, _ in costs.training(table, work.Point("", 8, "lora 0.01 8", 0, None, n))]
        for n in (8, 2)
    ]
    (once,), rounds = trained
    # Steps are shared out; a study watches the last round alone.
    at_four = costs.steps(table, {**table.healing, **STAGE}, 4, 2, is_watched=False)
    assert rounds[1].seconds == pytest.approx(at_four.seconds)
    watched = costs.steps(table, {**table.healing, **STAGE}, 8, 2)
    assert (
        rounds[-1].seconds == pytest.approx(watched.seconds) and watched.seconds > at_four.seconds
    )
    # From the second round on what is trained is no part of the loaded model.
    held = [stages.WHOLE in cost.need.parts for cost in (once, *rounds)]
    assert held == [False, False, True, True, True]
    assert once.kept > 0 and once.saved == 1.5 * once.kept
    assert [cost.kept for cost in rounds] == [0] * 4
    assert [cost.saved - once.saved for cost in rounds] == [turn * once.kept for turn in range(4)]


def test_what_does_not_fit_is_refused_with_the_setting(counted, capsys):
    assert run_notebooks.main(["--profile", "cpu", "--only", "07", "--plan"]) == 2
    printed = capsys.readouterr()
    assert "07_depth_against_width" in printed.out and "GPU hours" in printed.out
    assert "on smollm2-135m needs 100.0 GB of 80" in printed.err
    assert "disk GB" in printed.out and "GB on the disk" in printed.err
    assert "change scored_on.batch_sizes or scored_on.prompts" in printed.err
    asked = ["--profile", "cpu", "--only", "07", "--plan", "--memory", "101", "--price", "2.5"]
    assert run_notebooks.main(asked) == 0
    assert "dollars" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("size", "told"), [(1.2345e12, "1234.5"), (1e11, "100.0"), (4.56e7, "0.046"), (0, "0")]
)
def test_small_memory_is_told_too(size, told):
    assert bill.in_gb(size) == told


def test_a_plan_for_this_machine_says_its_hours_and_rates(counted, capsys):
    asked = ["--profile", "cpu", "--only", "13", "--plan", "--machine", "here", "--memory", "101"]
    assert run_notebooks.main(asked) == 0
    head, *_, rates = capsys.readouterr().out.strip().splitlines()
    here = machines.here()
    assert (" GPU hours" in head) == (here.kind == "cuda") and " hours" in head
    assert rates.startswith(f"{here.name}: {here.share:.0%} of ") and "in float32" in rates
    assert set(here.flops) == {torch.float32, torch.bfloat16, torch.float16}
    assert here.auto() == runtime.resolve_dtype()
    assert machines.memory_of(torch.device("cpu")) > 1e9


def test_options_of_the_plan_need_it(capsys):
    for words in (["--price", "2"], ["--plan", "--price", "0"], ["--plan", "--regress"]):
        with pytest.raises(SystemExit):
            run_notebooks.main(words)
    assert "--price goes with --plan" in capsys.readouterr().err


def test_a_folder_without_a_configuration_is_refused(tmp_path, capsys):
    asked = ["--profile", "cpu", "--only", "01", "--plan", "-p", "model", str(tmp_path)]
    assert run_notebooks.main(asked) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ") and str(tmp_path) in said


def test_a_model_of_unknown_sizes_is_refused():
    with pytest.raises(jobs.Refused, match=r"no configuration of some/model: download .*Llama-2"):
        configurations.configuration("some/model", ROOT / "reference")


@pytest.mark.parametrize("profile", ["a100"])
def test_sizes_of_the_papers_models_are_those_that_they_publish(profile):
    """Parameters in billions as their authors and reference/ state them."""
    published = {
        "meta-llama/Llama-2-7b-hf": 6_738_415_616,
        "lmsys/vicuna-7b-v1.3": 6_738_415_616,
        "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
        "Qwen/Qwen1.5-7B": 7_721_324_544,
    }
    for name, count in published.items():
        config, _ = configurations.configuration(name, ROOT / "reference")
        assert stages.n_parameters(config) == count, name
    named = {job.values["model"] for job in jobs.plan(ROOT, profile, [], {}, False)}
    assert named <= set(pd.read_csv(ROOT / "reference" / configurations.CONFIGURATIONS)["model"])


def test_time_is_bound_by_arithmetic_or_by_reading():
    assert machines.A100.seconds(0.4 * 312e12, torch.bfloat16) == pytest.approx(1)
    assert machines.A100.seconds(1.0, torch.bfloat16, n_read=4.0e12) == pytest.approx(2)
