"""Questions and answers as text to heal on."""

import json

import pytest
from tiny_model import embedded_tokenizer

from pruning_utils import data, instructions
from pruning_utils.engine import benchmarks


@pytest.fixture(scope="module")
def tokenizer():
    return embedded_tokenizer()


def write(folder, rows) -> str:
    path = folder / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("source, at_least", [("fiqa", 600), ("nq-open", 3000), ("medmcqa", 3500)])
def test_embedded_pairs_are_chats_without_evaluation_text(source, at_least, tokenizer):
    texts = instructions.instruction_texts(tokenizer, source)
    assert len(texts) >= at_least and len(set(texts)) == len(texts)
    assert all(
        text.count("<|im_start|>user\n") == text.count("<|im_start|>assistant\n") == 1
        for text in texts
    )
    assert not any(text.endswith("assistant\n<|im_end|>\n") for text in texts), "an empty answer"
    known = data.evaluation_texts()
    assert not data.overlaps(texts, known).any()


def test_options_stand_in_the_question_and_the_answer_repeats_one(tokenizer):
    for text in instructions.instruction_texts(tokenizer, "medmcqa")[::100]:
        question, answer = text.split("<|im_start|>assistant\n")
        assert answer.removesuffix("<|im_end|>\n") in question and "\nA. " in question


def test_a_file_of_ones_own(tokenizer, tmp_path):
    greeting = {"instruction": "Greet.", "input": "", "output": "Hi"}
    rows = [{"instruction": "Add.", "input": "1 and 2", "output": "3"}, greeting, greeting]
    found = instructions.instruction_texts(tokenizer, write(tmp_path, rows))
    assert [text.split("<|im_start|>user\n")[1] for text in found] == [
        "Add.\n1 and 2<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n",
        "Greet.<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n",
    ]


def test_empty_fields_are_no_words(tokenizer, tmp_path):
    rows = [
        {"instruction": "Greet.", "input": None, "output": "Hi"},
        {"instruction": "Greet.", "input": "", "output": None},
    ]
    (text,) = instructions.instruction_texts(tokenizer, write(tmp_path, rows))
    assert "None" not in text and "Greet.<|im_end|>" in text
    assert instructions._pair({"question": "Q", "answer": []}, ("question",), "answer", "x") == (
        "Q",
        "",
    )


def test_a_file_with_a_mark_of_its_byte_order_and_half_a_character(tokenizer, tmp_path):
    """As editors and truncated scrapes leave them."""
    row = '{"instruction": "Greet.", "input": "", "output": "Hi \\ud83d"}'
    (tmp_path / "own.jsonl").write_text("\ufeff" + row, encoding="utf-8")
    (text,) = instructions.instruction_texts(tokenizer, str(tmp_path / "own.jsonl"))
    assert "assistant\nHi ?<|im_end|>" in text


def test_contaminated_rows_are_left_out(tokenizer, tmp_path):
    asked, _, _ = benchmarks._rows("lighteval/siqa", None)
    question = max(asked, key=lambda row: len(row["context"].split()))
    assert len(question["context"].split()) >= 13
    rows = [
        {"instruction": question["context"], "input": question["question"], "output": "x"},
        {"instruction": "Greet.", "input": "", "output": "Hi"},
    ]
    (kept,) = instructions.instruction_texts(tokenizer, write(tmp_path, rows))
    assert "Greet." in kept


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"question": "Q", "choices": ["x", "y"], "answer": 1}, ("Q\nA. x\nB. y", "B. y")),
        ({"question": "Q", "choices": ["x", "y"], "answer": 0}, ("Q\nA. x\nB. y", "A. x")),
    ],
)
def test_rows_of_mmlu(row, expected):
    *_, prompt, answer = instructions.HUB["mmlu-train"]
    assert instructions._pair(row, prompt, answer, "mmlu-train") == expected


def test_windows_are_drawn_by_seed(tokenizer):
    first, same, other = (
        instructions.instruction_windows(tokenizer, 4, 32, source="fiqa", seed=seed)
        for seed in (0, 0, 1)
    )
    assert first.shape == (4, 32) and first.equal(same) and not first.equal(other)


def test_pairs_are_filtered_once_for_all_processes(tokenizer, tmp_path, monkeypatch):
    greeting = {"instruction": "Greet.", "input": "", "output": "Hi"}
    rows = [{"instruction": "one two", "input": "", "output": "three"}, greeting]
    monkeypatch.setenv("PRUNING_UTILS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "evaluation_texts", lambda: ["nothing that is shared"])
    source = write(tmp_path, rows)
    found = instructions.instruction_texts(tokenizer, source)
    assert len(found) == 2
    instructions._clean_pairs.cache_clear()
    monkeypatch.setattr(data, "evaluation_texts", lambda: pytest.fail("looked again"))
    assert instructions.instruction_texts(tokenizer, source) == found
    with pytest.raises(pytest.fail.Exception, match="looked again"):
        instructions.instruction_texts(tokenizer, write(tmp_path, rows[1:]))


def test_pairs_are_filtered_once_in_a_process(tokenizer):
    instructions._clean_pairs.cache_clear()
    for seed in (0, 1):
        instructions.instruction_windows(tokenizer, 1, 32, source="fiqa", seed=seed)
    assert instructions._clean_pairs.cache_info().misses == 1
    instructions.instruction_texts(tokenizer, "fiqa").clear()
    assert instructions.instruction_texts(tokenizer, "fiqa")


def test_a_file_that_has_changed_is_read_again(tokenizer, tmp_path):
    for answer in ("Hi", "Hello"):
        path = write(tmp_path, [{"instruction": "Greet.", "input": "", "output": answer}])
        (text,) = instructions.instruction_texts(tokenizer, path)
        assert text.endswith(f"\n{answer}<|im_end|>\n")


def test_hub_sets_are_read_from_where_they_are_said_to_be(tokenizer, monkeypatch, request):
    import datasets

    instructions._clean_pairs.cache_clear()
    request.addfinalizer(instructions._clean_pairs.cache_clear)
    asked = []

    def load(*where, split):
        asked.append((*where, split))
        return [{"instruction": "Name one.", "context": "", "response": "One.", "category": "x"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    (text,) = instructions.instruction_texts(tokenizer, "dolly")
    assert asked == [("databricks/databricks-dolly-15k", None, "train")] and text.endswith(
        "One.<|im_end|>\n"
    )


@pytest.mark.parametrize(
    "rows, message",
    [
        (
            [{"instruction": "x", "output": "y"}],
            "own.jsonl must have the fields instruction, input, output; input is",
        ),
        ([{"text": "x"}], "instruction, input, output is missing in one that has text"),
    ],
)
def test_a_file_without_the_fields_is_refused(rows, message, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=message):
        instructions.instruction_texts(tokenizer, write(tmp_path, rows))


def test_what_cannot_be_read_is_refused(tokenizer, tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match="source must be one of fiqa, .* or a .jsonl file, got 'alpaca'"
    ):
        instructions.instruction_texts(tokenizer, "alpaca")
    with pytest.raises(ValueError, match=r"source must be one of .* got \['fiqa'\]"):
        instructions.instruction_texts(tokenizer, ["fiqa"])
    with pytest.raises(ValueError, match="missing.jsonl could not be read"):
        instructions.instruction_texts(tokenizer, str(tmp_path / "missing.jsonl"))
    for content in ("{", "3", "null", "[" + "1, " * 999 + "1]"):
        (tmp_path / "bad.jsonl").write_text(content)
        with pytest.raises(ValueError, match="bad.jsonl must hold a JSON object a line.{,99}$"):
            instructions.instruction_texts(tokenizer, str(tmp_path / "bad.jsonl"))
    plain = type("", (), {"chat_template": None})()
    with pytest.raises(ValueError, match="no chat template"):
        instructions.instruction_texts(plain, "fiqa")
