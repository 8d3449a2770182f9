"""Windows begin as the tokenizer begins a text: by hand, and the same text beside it."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from pruning_utils import data, instructions, models


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
    with pytest.raises(ValueError, match="seq_len must be at least 3 tokens .*got 2 and None"):
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
    assert data.text_prefix(models.load_model()[1]) == []


def test_chats_do_not_begin_twice(tmp_path):
    (tmp_path / "own.jsonl").write_text('{"instruction": "ab", "input": "", "output": "cd"}\n')
    template = (
        "{% for turn in messages %}{{ bos_token if loop.first }}{{ turn.content }}{% endfor %}"
    )
    tokenizer = letters("<s> $A", bos_token="<s>", chat_template=template)
    windows = instructions.instruction_windows(tokenizer, 1, 6, source=str(tmp_path / "own.jsonl"))
    assert windows.tolist() == [[BOS, A, B, C, D, EOS]]
