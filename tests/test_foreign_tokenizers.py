"""Questions with tokenizers that lack special tokens, or belong to another model."""

import functools
import json
import logging
from types import SimpleNamespace

import pandas as pd
import pytest
import sentencepiece
import torch
from architectures import ARCHITECTURES
from lm_eval.api.instance import Instance
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from pruning_utils import evaluation, models
from pruning_utils.engine import benchmarks, prefixes


def tokenizer(size: int = 128, **special: str) -> PreTrainedTokenizerFast:
    """One that reads characters: printable ones from 3 on, then names that no text holds."""
    names = ["<unk>", "<s>", "</s>", *map(chr, range(32, 127)), "\n"]
    names += [f"<{number}>" for number in range(size - len(names))]
    vocab = {name: number for number, name in enumerate(names)}
    own = Tokenizer(BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=own, **special)


def model(**special: int | None):
    found = ARCHITECTURES["llama"]()
    for name in ("bos_token_id", "eos_token_id"):
        setattr(found.config, name, special.get(name))
    found.config.max_position_embeddings = 2048
    return found


@pytest.mark.parametrize(
    ("in_tokenizer", "in_model", "expected"),
    [
        ({"bos_token": "<s>", "eos_token": "</s>"}, {}, 1),
        ({"eos_token": "</s>", "pad_token": "<unk>"}, {"bos_token_id": 7}, 2),
        ({"pad_token": "<unk>"}, {"bos_token_id": 7, "eos_token_id": 8}, 7),
        ({"pad_token": "!"}, {"bos_token_id": 999, "eos_token_id": [8, 9]}, 4),
        ({"unk_token": "<unk>"}, {}, 0),
        ({}, {}, 98),
    ],
)
def test_the_token_before_a_text_without_a_prompt(in_tokenizer, in_model, expected):
    assert prefixes.first_token(tokenizer(**in_tokenizer), model(**in_model)) == expected


def test_questions_score_without_any_special_token_as_with_one():
    network, bare = model(), tokenizer()
    found = evaluation.evaluate_tasks(network, bare, ["openbookqa"], limit=3).questions
    # Prompts are not empty there, so no token stands before them.
    other = evaluation.evaluate_tasks(
        network, tokenizer(eos_token="</s>", pad_token="<unk>"), ["openbookqa"], limit=3
    ).questions
    assert len(found) == 3 and found["nll"].gt(0).all()
    pd.testing.assert_frame_equal(found, other)
    assert (bare.pad_token, bare.eos_token, bare.bos_token) == (None, None, None)


def test_answers_alone_have_as_many_tokens_with_a_beginning_as_without():
    """lm-eval puts one token before them, and the tokenizer none."""
    network = model()
    without, with_one = tokenizer(bos_token="<s>"), tokenizer(bos_token="<s>")
    with_one._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", with_one.bos_token_id)]
    )
    found, same = (
        evaluation.evaluate_tasks(
            network, own, ["openbookqa"], limit=3, answers_only=True
        ).questions
        for own in (without, with_one)
    )
    assert with_one("a")["input_ids"] != without("a")["input_ids"]
    pd.testing.assert_frame_equal(found, same)


@pytest.mark.parametrize(("begins", "ends"), [("<s> ", " </s>"), ("", " </s> </s>")])
def test_tokens_that_end_a_text_are_no_part_of_an_answer(begins, ends):
    def adding(pattern: str):
        own = tokenizer(bos_token="<s>", eos_token="</s>")
        special = [("<s>", 1), ("</s>", 2)]
        own._tokenizer.post_processor = TemplateProcessing(single=pattern, special_tokens=special)
        return own

    def scores(pattern: str) -> pd.DataFrame:
        given = {"limit": 3, "num_fewshot": 1}
        return evaluation.evaluate_tasks(network, adding(pattern), ["piqa"], **given).questions

    network = model()
    assert prefixes._n_appended(adding(f"{begins}$A{ends}")) == ends.count("</s>")
    assert prefixes._n_appended(adding(f"{begins}$A")) == 0
    pd.testing.assert_frame_equal(scores(f"{begins}$A{ends}"), scores(f"{begins}$A"))


@pytest.mark.parametrize(("prompt", "answer"), [([], [5]), ([5], [])])
def test_a_request_without_a_token_is_refused(prompt, answer):
    scorer = prefixes.language_model(model(), tokenizer(bos_token="<s>", eos_token="</s>"), 2)
    with pytest.raises(ValueError, match=r"one token each at least, .* of ' ' and 'x'"):
        scorer._loglikelihood_tokens([((" ", "x"), prompt, answer)])


def test_prompts_of_generated_answers_do_not_end_the_text():
    own = tokenizer(bos_token="<s>", eos_token="</s>")
    special = [("<s>", 1), ("</s>", 2)]
    own._tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    scorer = prefixes.language_model(model(), own, 2)
    ids, seen = scorer.tok_batch_encode(["ab", "cdef"])
    begin, end = own.bos_token_id, own.eos_token_id
    bare = [own.encode(text, add_special_tokens=False) for text in ("ab", "cdef")]
    n_before = len(bare[1]) - len(bare[0])
    assert ids[1].tolist() == [begin, *bare[1]] and ids[0, n_before:].tolist() == [begin, *bare[0]]
    assert seen.tolist() == [[0] * n_before + [1] * (len(bare[0]) + 1), [1] * (len(bare[1]) + 1)]
    cut, seen = scorer.tok_batch_encode(["ab", "cdef"], left_truncate_len=2)
    assert cut[1].tolist() == bare[1][-2:] and end not in cut.flatten().tolist()
    assert cut.shape == seen.shape == (2, 2)


def test_prompts_that_generation_cuts_are_told(caplog):
    scorer = prefixes.language_model(model(), tokenizer(bos_token="<s>", eos_token="</s>"), 2)
    scorer._max_length = 12

    def asked(name: str, text: str) -> Instance:
        given = (text, {"max_gen_toks": 4, "until": ["</s>"]})
        return Instance("generate_until", {}, given, 0, metadata=(name, 0, 1))

    texts = ["a" * length for length in (3, 20, 30)]
    with caplog.at_level(logging.WARNING, logger="pruning_utils"):
        answers = scorer.generate_until(
            [*(asked("own", text) for text in texts), asked("short", "ab")], disable_tqdm=True
        )
    assert len(answers) == 4
    (record,) = [record for record in caplog.records if record.name == prefixes.__name__]
    assert record.message == (
        "prompts of own are cut in front, 2 of them: the context is 12 tokens, answers included"
    )


def test_a_tokenizer_in_the_file_of_sentencepiece_alone_is_read(tmp_path):
    """Vicuna and many others of its time have no tokenizer.json."""
    words = ["the quick brown fox", "jumps over the lazy dog", "and runs away"]
    (tmp_path / "words.txt").write_text("\n".join(words))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "words.txt"),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=60,
        minloglevel=2,
    )
    network = ARCHITECTURES["llama"]()
    network.save_pretrained(tmp_path / "model")
    (tmp_path / "tokenizer.model").rename(tmp_path / "model" / "tokenizer.model")
    named = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(named))
    _, known = models.load_model(tmp_path / "model", dtype="float32")
    plain = sentencepiece.SentencePieceProcessor(
        model_file=str(tmp_path / "model" / "tokenizer.model")
    )
    assert known(words[0], add_special_tokens=False)["input_ids"] == plain.encode(words[0])


def test_no_token_at_all_is_one_clear_error():
    lonely = tokenizer()
    lonely.encode = lambda *_, **__: []
    with pytest.raises(ValueError, match="must have a token that begins or ends a text"):
        prefixes.first_token(lonely, model())


@pytest.mark.parametrize("wrong", [None, "gpt2", torch.nn.Linear(2, 2)])
def test_what_is_no_tokenizer_is_refused(wrong):
    with pytest.raises(ValueError, match="tokenizer must be that of the model, got"):
        evaluation.evaluate_tasks(model(), wrong, ["openbookqa"], limit=1)


def test_ids_outside_the_vocabulary_are_refused_before_any_pass():
    network = model()
    network.resize_token_embeddings(90)  # "w" is number 90
    network.register_forward_pre_hook(lambda *_: pytest.fail("scoring began"))
    with pytest.raises(
        ValueError,
        match=r"tokenizer must be that of the model, but its token id \d+ is outside "
        r"the vocabulary \[0, 90\)",
    ):
        evaluation.evaluate_tasks(network, tokenizer(bos_token="<s>"), ["openbookqa"], limit=2)


def test_answers_longer_than_the_context_are_refused():
    network = model()
    network.config.max_position_embeddings = 16
    with pytest.raises(ValueError, match=r"context of 16 tokens, but one has \d\d"):
        evaluation.evaluate_tasks(network, tokenizer(bos_token="<s>"), ["openbookqa"], limit=2)


def test_tokens_that_no_question_holds_do_no_harm():
    network, known = model(), tokenizer(bos_token="<s>", eos_token="</s>")
    longer = tokenizer(4000, bos_token="<s>", eos_token="</s>")
    score = functools.partial(evaluation.evaluate_tasks, network, tasks=["openbookqa"], limit=2)
    pd.testing.assert_frame_equal(score(longer).questions, score(known).questions)


def test_generated_answers_need_a_token_that_ends_them():
    scorer = prefixes.language_model(model(), tokenizer(bos_token="<s>"), 2)
    config = SimpleNamespace(
        num_fewshot=0,
        generation_kwargs=None,
        unsafe_code=False,
        doc_to_image=None,
        doc_to_audio=None,
    )
    free = SimpleNamespace(OUTPUT_TYPE="generate_until", config=config)
    with pytest.raises(ValueError, match="end-of-text token, but eos_token is None"):
        benchmarks.refuse_unaskable(scorer, {"own": {"tasks": {"own": free}}})


def test_the_stock_backend_goes_on_with_smaller_batches(caplog, monkeypatch):
    # Prompts beyond the context go there.
    network, known = model(), tokenizer(bos_token="<s>", eos_token="</s>")
    network.config.max_position_embeddings = 40
    score = functools.partial(
        evaluation.evaluate_tasks, network, known, ["openbookqa"], limit=2, batch_size=4
    )
    expected, calls = score().questions, []

    def refuse(module, given, named):
        states = given[0] if given else named["hidden_states"]
        calls.append(len(states))
        if len(states) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    models.decoder_layers(network)[-1].register_forward_pre_hook(refuse, with_kwargs=True)
    with caplog.at_level(logging.WARNING, logger="pruning_utils"):
        pd.testing.assert_frame_equal(score().questions, expected, rtol=1e-5)
    assert calls[:2] == [4, 2] and max(calls[1:]) == 2
    assert "a batch of 4 questions does not fit into memory; going on with 2" in caplog.text
