"""Windows begin as the tokenizer begins a text: by hand, and the same text beside it."""

import pandas as pd
import pytest
import torch
from architectures import tiny
from tiny_model import embedded_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from pruning_utils import data, evaluation, instructions, models
from pruning_utils.studies import beginnings


def letters(single: str | None = None, **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of letters, some special tokens, and a template of what it puts around a text."""
    names = ["<unk>", "<s>", "</s>", "<go>", *"abcdefgh"]
    own = Tokenizer(BPE({name: place for place, name in enumerate(names)}, [], unk_token="<unk>"))
    if single:
        known = [(name, names.index(name)) for name in ("<s>", "</s>", "<go>")]
        own.post_processor = TemplateProcessing(single=single, special_tokens=known)
    return PreTrainedTokenizerFast(
        tokenizer_object=own, unk_token="<unk>", eos_token="</s>", **special
    )


A, B, C, D = 4, 5, 6, 7
BOS, EOS, GO = 1, 2, 3


@pytest.mark.parametrize(
    ("single", "prefix"),
    [
        (None, []),
        ("$A", []),
        ("<s> $A", [BOS]),
        ("<s> $A </s>", [BOS]),
        ("$A </s>", []),
        ("<go> <s> $A", [GO, BOS]),
    ],
)
def test_a_window_begins_as_the_tokenizer_begins_a_text(single, prefix):
    tokenizer = letters(single, bos_token="<s>", extra_special_tokens=["<go>"])
    assert data.text_prefix(tokenizer) == prefix
    windows = data.pack(tokenizer, ["abc", "d", "ab"], 3 + len(prefix))
    text = [[A, B, C], [EOS, D, EOS], [A, B, EOS]]
    assert windows.tolist() == [prefix + part for part in text], "documents keep their separator"
    assert windows.is_contiguous()


def test_a_window_holds_two_tokens_beside_its_beginning():
    tokenizer = letters("<s> $A", bos_token="<s>")
    assert data.pack(tokenizer, ["ab"], 3).tolist() == [[BOS, A, B]]
    with pytest.raises(ValueError, match="seq_len must be a whole number of at least 3 .*got 2"):
        data.pack(tokenizer, ["ab"], 2)


def test_what_stands_before_a_text_counts_only_as_special_tokens():
    assert data.text_prefix(letters("<s> $A")) == [], "here <s> is a token like others"


@pytest.mark.parametrize("draw", [data.calibration_windows, data.evaluation_windows])
def test_all_windows_begin_so(draw):
    plain, beginning = letters(bos_token="<s>"), letters("<s> $A", bos_token="<s>")
    windows = draw(beginning, 4, 17)
    assert windows[:, 0].tolist() == [BOS] * 4
    assert torch.equal(windows[:, 1:], draw(plain, 4, 16)), "the text beside it is the same"
    assert not (windows[:, 1:] == BOS).any(), "and it is never predicted"


def test_windows_of_the_embedded_model_begin_with_text():
    assert data.text_prefix(embedded_tokenizer()) == []


def test_chats_do_not_begin_twice(tmp_path):
    (tmp_path / "own.jsonl").write_text('{"instruction": "ab", "input": "", "output": "cd"}\n')
    template = (
        "{% for turn in messages %}{{ bos_token if loop.first }}{{ turn.content }}{% endfor %}"
    )
    tokenizer = letters("<s> $A", bos_token="<s>", chat_template=template)
    windows = instructions.instruction_windows(tokenizer, 1, 6, source=str(tmp_path / "own.jsonl"))
    assert windows.tolist() == [[BOS, A, B, C, D, EOS]]


@pytest.mark.parametrize("unknown", [{}, {"unk_token": "<unk>"}])
def test_a_vocabulary_without_the_letter_a_has_a_beginning_too(unknown):
    names = ["<unk>", "<s>", "</s>", "x", "y"]
    own = Tokenizer(BPE({name: place for place, name in enumerate(names)}, [], **unknown))
    own.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=own, bos_token="<s>", eos_token="</s>", **unknown
    )
    assert data.text_prefix(tokenizer) == [BOS]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("<go><s>{{ messages[0].content }}{{ messages[1].content }}", "abcd"),
        ("\n\n<go><s>{{ messages[0].content }}{{ messages[1].content }}{{ eos_token }}", "abcd"),
        ("<s>{{ messages[0].content }}{{ eos_token }}{{ messages[1].content }}", "<s>ab</s>cd"),
        ("{{ strftime_now('%d %b %Y') }}{{ messages[0].content }}", "26 Jul 2024ab"),
    ],
)
def test_a_chat_has_nothing_twice_and_no_day_of_its_own(template, text, tmp_path):
    """Beginnings of two tokens are joined with a blank by the decoders of some tokenizers."""
    (tmp_path / "own.jsonl").write_text('{"instruction": "ab", "input": "", "output": "cd"}\n')
    tokenizer = letters(
        "<go> <s> $A", bos_token="<s>", extra_special_tokens=["<go>"], chat_template=template
    )
    assert tokenizer.decode([GO, BOS]) == "<go> <s>"
    assert instructions.instruction_texts(tokenizer, str(tmp_path / "own.jsonl")) == [text]


@pytest.mark.parametrize("template", ["{{ raise_exception('one system turn') }}", "{% for %}"])
def test_a_template_that_fails_is_named(template, tmp_path):
    (tmp_path / "own.jsonl").write_text('{"instruction": "ab", "input": "", "output": "cd"}\n')
    tokenizer = letters(chat_template=template)
    with pytest.raises(ValueError, match="chat template fails on a question and its answer: "):
        instructions.instruction_texts(tokenizer, str(tmp_path / "own.jsonl"))


@pytest.mark.parametrize(
    ("texts", "seq_len", "limit", "message"),
    [
        ("abc", 4, None, "texts must be documents, each a text, got 'abc'"),
        (["ab", None], 4, None, "each a text, got None among them"),
        (["ab"], 4.0, None, "seq_len must be a whole number .*got 4.0"),
        (["ab"], None, None, "seq_len must be a whole number .*got None"),
        (["ab"], 4, 1.5, "limit must be a whole number .*got 1.5"),
    ],
)
def test_what_is_no_documents_or_no_number_is_refused(texts, seq_len, limit, message):
    with pytest.raises(ValueError, match=message):
        data.pack(letters(), texts, seq_len, limit=limit)


def test_what_is_no_tokenizer_is_refused():
    with pytest.raises(ValueError, match="tokenizer must be one of transformers, .*got 'gpt2'"):
        data.pack("gpt2", ["ab"], 4)


# --- what it is worth -----------------------------------------------------------------------------


@pytest.mark.parametrize("single", ["<s> $A", None])
def test_the_same_tokens_are_scored_both_ways(single, tmp_path):
    tiny("LlamaConfig").save_pretrained(tmp_path)
    letters(single, bos_token="<s>").save_pretrained(tmp_path)
    rows = pd.DataFrame(
        beginnings.beginning_losses(
            {"text": "xsum"},
            model=str(tmp_path),
            revision=None,
            dtype="float32",
            n_windows=2,
            seq_len=16,
        )
    )
    model, tokenizer = models.load_model(tmp_path, dtype="float32")
    windows = data.evaluation_windows(tokenizer, 2, 16)
    wanted = {"as a text": evaluation.token_losses(model, windows)}
    if single:
        wanted["as a text"] = wanted["as a text"][:, 1:]
        wanted["in its middle"] = evaluation.token_losses(model, windows[:, 1:])
    found = {name: group["nll"].tolist() for name, group in rows.groupby("begins")}
    assert found == {name: losses.double().mean(1).tolist() for name, losses in wanted.items()}


def test_the_table_says_of_which_model_a_row_is(tmp_path, monkeypatch):
    def measured(function, points, *, model, **others):
        """Stands for a table of the models that are there."""
        return pd.DataFrame([{"begins": "as a text", "item": 0, "nll": 1.0}]), tmp_path

    monkeypatch.setattr(beginnings, "point_table", measured)
    monkeypatch.setattr(beginnings, "models_at_hand", lambda *_, **__: (["one", "two"], ["three"]))
    table, missing = beginnings.beginning_table(
        "embedded", profile="cpu", notebook="03", revision=None, text="xsum"
    )
    assert list(table.columns) == ["model", "begins", "item", "nll"]
    assert table["model"].tolist() == ["one", "two"] and missing == ["three"]
