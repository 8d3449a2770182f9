"""What is shared changes nothing: against whole sequences, and against whole passes."""

import contextlib
import copy
import math

import pandas as pd
import pytest
import torch
from architectures import ARCHITECTURES, tiny
from every_architecture import build, config_of
from lm_eval.models.huggingface import HFLM

from pruning_utils import evaluation, models, surgery
from pruning_utils.engine import benchmarks, model_files, passes, prefixes

# Architectures whose layers take a mask of our making for each kind of them. In all of these a
# window is 4 tokens.
BY_KIND = {
    *("afmoe", "cohere2", "dots1", "exaone4", "exaone_moe", "gemma2", "gemma3_text"),
    *("gemma4_text", "gpt_oss", "granite_swa", "laguna", "ministral", "modernbert_decoder"),
    *("olmo3", "qwen2", "qwen2_moe", "qwen3", "smollm3", "vaultgemma"),
}
# Those that go to the stock backend: one mask for all layers, none of our making, or states that
# pass on what was read.
STOCK = {
    *("bamba", "bloom", "falcon_mamba", "gpt_neo", "jamba", "lfm2", "lfm2_moe", "llama4_text"),
    *("mamba", "minimax", "mistral", "mixtral", "mpt", "phi3", "qwen3_next", "recurrent_gemma"),
    "starcoder2",
}
SHARE = ARCHITECTURES.keys() - STOCK


@pytest.fixture(scope="module")
def embedded():
    """The embedded model in float32, where batches change nothing but the last digits."""
    return models.load_model(dtype="float32")


def token_requests(shape: str) -> list[tuple[list[int], list[int]]]:
    """Prompts and answers of one of the shapes that benchmarks have."""
    generator = torch.Generator().manual_seed(3)

    def some(n: int) -> list[int]:
        return torch.randint(3, 128, (n,), generator=generator).tolist()

    # Answers that begin alike, one of a single token, one the beginning of another.
    if shape == "choices":
        prompts, same = [some(n) for n in (5, 9, 2, 7, 6, 1)], some(2)
        return [
            (prompt, answer)
            for prompt in prompts
            for answer in (same + some(2), same + some(1), same, some(1))
        ]
    if shape == "passages":
        passages = [some(12), some(9)]
        return [
            (passage + some(3), answer)
            for passage in passages
            for _ in range(2)
            for answer in (some(1), some(2))
        ]
    # More prompts than rows in a batch, one of them the shots alone.
    shots = some(20)
    tails = [*(some(n) for n in (4, 6, 3, 5, 4)), []]
    return [(shots + tail, answer) for tail in tails for answer in (some(2), some(1))]


def stock(model, requests) -> list[tuple[float, bool]]:
    """Log-likelihoods from the model's own forward, of whole sequences of one length at a time."""
    of_length: dict[int, list[int]] = {}
    for place, (prompt, answer) in enumerate(requests):
        of_length.setdefault(len(prompt) + len(answer), []).append(place)
    found = {}
    for places in of_length.values():
        with torch.no_grad():
            logits = model(torch.tensor([sum(requests[place], []) for place in places])).logits
        for place, row in zip(places, logits, strict=True):
            prompt, answer = requests[place]
            values = row[len(prompt) - 1 : -1].float().log_softmax(-1)
            is_greedy = values.argmax(-1).tolist() == answer
            found[place] = (float(values[range(len(answer)), answer].sum()), is_greedy)
    return [found[place] for place in range(len(requests))]


@pytest.mark.parametrize("shape", ["choices", "passages", "shots"])
@pytest.mark.parametrize("name", sorted(SHARE))
def test_loglikelihoods_equal_those_of_whole_sequences(name, shape):
    model, requests = ARCHITECTURES[name](), token_requests(shape)
    expected = stock(model, requests)
    for batch_size in (1, 4):
        found = prefixes.loglikelihoods(model, requests, batch_size=batch_size)
        assert [value for value, _ in found] == pytest.approx(
            [value for value, _ in expected], abs=1e-4
        )
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_the_embedded_model_gets_the_loglikelihoods_of_the_stock_backend(embedded, monkeypatch):
    """Through thirty layers in float32 rounding adds up if anywhere.

    The questions are the shortest of a subject. The shots are cached: more prompts share them
    than fit a batch.
    """
    model, tokenizer = embedded
    whole = benchmarks._rows

    def shortest(path, name):
        rows, split, shots = whole(path, name)
        return sorted(rows, key=lambda row: len(str(row)))[:3], split, shots

    monkeypatch.setattr(benchmarks, "_rows", shortest)
    of_mmlu = evaluation.load_tasks(["mmlu"], num_fewshot=2)["mmlu"]["tasks"]
    questions = of_mmlu["mmlu_abstract_algebra"]
    questions.build_all_requests()
    both = (
        HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=8),
        prefixes.language_model(model, tokenizer, 2),
    )
    expected, found = (
        backend.loglikelihood(questions.instances, disable_tqdm=True) for backend in both
    )
    assert len(expected) >= 6
    assert [value for value, _ in found] == pytest.approx(
        [value for value, _ in expected], abs=1e-4
    )
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@pytest.mark.parametrize("fails_at", [None, 2])
def test_many_answers_of_one_prompt_stand_in_rows_of_their_own(fails_at, monkeypatch):
    """Rows are short, answers of other prompts still stand together, and each counts once although
    memory does not suffice for the second batch."""
    monkeypatch.setattr(prefixes, "ANSWER_TOKENS", 6)
    model, sizes, add = ARCHITECTURES["llama"](), [], prefixes.add_batch
    generator = torch.Generator().manual_seed(5)
    answers = [torch.randint(3, 128, (n,), generator=generator).tolist() for n in (3, 2, 1) * 4]
    requests = [([7], answer) for answer in answers] + [([9, 9], answers[0]), ([9, 8], answers[1])]

    def recorded(model, rows, *given):
        sizes.append([len(row.tokens) for row in rows])
        if len(sizes) == fails_at:
            raise MemoryError
        add(model, rows, *given)

    monkeypatch.setattr(prefixes, "add_batch", recorded)
    found = prefixes.loglikelihoods(model, requests, batch_size=2)
    expected = stock(model, requests)
    assert [value for value, _ in found] == pytest.approx([v for v, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    # 24 tokens of answers in rows of fewer than 6, and up to 3 more; all but the last are inputs.
    assert max(map(max, sizes)) <= 9 and sum(map(len, sizes)) > 4


def test_a_beginning_is_run_once(monkeypatch):
    """Only the distinct beginnings of the sequences pass through the model."""
    model, seen = ARCHITECTURES["llama"](), []
    models.backbone(model).register_forward_pre_hook(
        lambda _, given, named: seen.append(given[0] if given else named["input_ids"]),
        with_kwargs=True,
    )
    monkeypatch.setattr(
        passes,
        "head_logits",
        lambda model, backbone, output, states: [torch.zeros(len(states), 128)],
    )
    for shape in ("choices", "passages", "shots"):
        seen.clear()
        # A prompt that is no more than the beginning of others is run up to its last token, which
        # each of them then begins with.
        requests = [request for request in token_requests(shape) if len(request[0]) != 20]
        prefixes.loglikelihoods(model, requests, batch_size=1)
        sequences = [tuple(prompt + answer) for prompt, answer in requests]
        distinct = {sequence[:stop] for sequence in sequences for stop in range(1, len(sequence))}
        assert sum(ids.numel() for ids in seen) == len(distinct)


@pytest.mark.parametrize(
    "name, window, most",
    [
        ("mistral", 4, 4),
        ("qwen2", 4, 64),
        ("gemma2", 4, 64),
        ("mamba", 0, 0),
        ("llama", math.inf, 64),
    ],
)
def test_what_cannot_be_shared_goes_to_the_stock_backend(name, window, most, embedded, monkeypatch):
    """Through lm-eval's own interface; only requests that fit are shared, and the order stays."""
    model, calls = ARCHITECTURES[name](), []
    own = prefixes.loglikelihoods
    monkeypatch.setattr(
        prefixes,
        "loglikelihoods",
        lambda model, requests, **named: (
            calls.append(len(requests)) or own(model, requests, **named)
        ),
    )
    scorer = prefixes.language_model(model, embedded[1], 2)
    requests = [
        (("", ""), [5, 6, 7, 8, 9], [10, 11]),
        (("", ""), list(range(3, 67)), [12]),
        (("", ""), [3], [4]),
        (("", ""), list(range(2, 65)), [9, 8, 7]),
        (("", ""), [5, 6, 7, 8, 9], [10]),
    ]
    found = scorer._loglikelihood_tokens(requests, disable_tqdm=True)
    expected = HFLM._loglikelihood_tokens(scorer, requests, disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx(
        [value for value, _ in expected], abs=1e-4
    )
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert prefixes.longest_shared(model) == window
    assert sum(calls) == sum(len(a) + len(b) - 1 <= most for _, a, b in requests)


def test_layers_that_look_at_pictures_take_no_mask_of_ours():
    assert prefixes.longest_shared(build("mllama")) == 0


@pytest.mark.parametrize(
    ("config_class", "fields", "n_shared"),
    [
        ("FalconConfig", {"alibi": True, "multi_query": False, "parallel_attn": False}, 0),
        ("FalconConfig", {}, math.inf),
    ],
)
def test_a_bias_of_another_shape_takes_no_mask_of_ours(config_class, fields, n_shared):
    assert prefixes.longest_shared(tiny(config_class, **fields)) == n_shared


def test_texts_are_shared_only_where_all_are_rotated_alike(embedded):
    """Frequencies of longrope follow the longest text of a batch."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    own = {"original_max_position_embeddings": 16, "sliding_window": None, "pad_token_id": 0}
    model = tiny("Phi3Config", rope_parameters=rope, **own)
    _, tokenizer = embedded
    scorer = prefixes.language_model(model, tokenizer, 8)
    assert prefixes.longest_alike(model) == 16
    short, long = (("", ""), [5, 6, 7], [8, 9]), (("", ""), list(range(3, 40)), [7])
    alone = scorer._loglikelihood_tokens([short], disable_tqdm=True)[0][0]
    beside = scorer._loglikelihood_tokens([short, long], disable_tqdm=True)[0][0]
    assert beside == pytest.approx(alone, abs=1e-4)


def test_architectures_take_the_way_that_is_told_of_them():
    """Also where a token lies beyond a window; longer ones than 4 tokens are shared then."""
    by_kind, shares = set(), set()
    for name, make in ARCHITECTURES.items():
        model = make()
        if prefixes.takes_masks_by_kind(model):
            by_kind.add(name)
        if name in by_kind or prefixes.longest_shared(model) > 4:
            shares.add(name)
    assert by_kind == BY_KIND
    assert shares == SHARE


def test_the_stock_backend_holds_few_logits_at_once(embedded, monkeypatch):
    model, rows = ARCHITECTURES["mistral"](), []
    scorer = prefixes.language_model(model, embedded[1], 4)
    own = scorer._model_call
    monkeypatch.setattr(
        scorer, "_model_call", lambda ids, *given, **named: rows.append(ids) or own(ids)
    )
    requests = [(("", ""), [*range(3, 13 + number)], [4, 5]) for number in range(6)]
    found = scorer._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [len(ids) for ids in rows] == [4, 2]
    rows.clear()
    longest = max(len(prompt) + len(answer) for _, prompt, answer in requests)
    monkeypatch.setattr(prefixes, "STOCK_LOGITS", 2 * longest * model.config.vocab_size + 1)
    again = scorer._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [len(ids) for ids in rows] == [2, 2, 2] and scorer.batch_size == 4
    assert [value for value, _ in again] == pytest.approx([value for value, _ in found], abs=1e-5)


def variants(model) -> dict[tuple[int, ...], torch.nn.Module]:
    """The whole model and two with a block less, which share its weights."""
    weights = {id(weight): weight for weight in (*model.parameters(), *model.buffers())}
    blocks = (range(5, 8), range(3, 5))
    return {(): model} | {
        tuple(block): surgery.drop_layers(copy.deepcopy(model, dict(weights)), block)
        for block in blocks
    }


def layer_calls(model) -> list[int]:
    """A list that grows by one whenever a layer's own work begins."""
    calls: list[int] = []
    for layer in models.decoder_layers(model):
        next(layer.children()).register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gptj", "bloom", "olmo2", "qwen3_moe", "gemma2", "mamba"]
)
def test_models_share_their_first_layers(name):
    model = ARCHITECTURES[name]()
    ids = torch.randint(3, 128, (4, 7), generator=torch.Generator().manual_seed(0))
    models_by_block = variants(model)
    expected = {
        block: evaluation.token_losses(each, ids, batch_size=2)
        for block, each in models_by_block.items()
    }
    counts = {block: layer_calls(variant) for block, variant in models_by_block.items()}
    shared = passes.SharedLayers([block[0] for block in models_by_block if block])
    for block, variant in models_by_block.items():
        n_shared = block[0] if block else len(models.decoder_layers(model))
        with shared.used_by(variant, n_shared):
            assert torch.equal(evaluation.token_losses(variant, ids, batch_size=2), expected[block])
        assert len(counts[block]) == 2 * (
            len(models.decoder_layers(variant)) - (n_shared if block else 0)
        )
        assert torch.equal(evaluation.token_losses(variant, ids, batch_size=2), expected[block]), (
            "not as before"
        )


def test_shared_layers_keep_what_fits_and_tell_batches_apart():
    model = ARCHITECTURES["llama"]()
    first, second = (
        torch.randint(3, 128, (2, 7), generator=torch.Generator().manual_seed(seed))
        for seed in (0, 1)
    )
    shared, calls = passes.SharedLayers([4, 6], most_bytes=2 * 7 * 32 * 4), layer_calls(model)
    with shared.used_by(model, 8):
        # There is room for one output.
        for ids, n_calls in ((first, 8), (first, 4), (second, 8), (second, 8), (first, 4)):
            calls.clear()
            found = evaluation.token_losses(model, ids)
            assert len(calls) == n_calls
            assert torch.equal(found, evaluation.token_losses(ARCHITECTURES["llama"](), ids))
    prompt = first[:1]
    with shared.used_by(model, 8):
        cached = model.generate(prompt, max_new_tokens=4, do_sample=False)
    assert torch.equal(cached, model.generate(prompt, max_new_tokens=4, do_sample=False))


def test_questions_score_alike_with_shared_layers(embedded):
    model, tokenizer = embedded
    found = {}
    shared = passes.SharedLayers([3])
    for name in ("bare", "first", "again"):
        with shared.used_by(model, 3) if name != "bare" else contextlib.nullcontext():
            found[name] = evaluation.evaluate_tasks(model, tokenizer, ["piqa"], limit=2).questions
    pd.testing.assert_frame_equal(found["bare"], found["first"], check_exact=True)
    pd.testing.assert_frame_equal(found["bare"], found["again"], check_exact=True)


def test_positions_behind_a_number_for_padding_go_to_the_stock_backend():
    config = config_of("kosmos-2.5")
    kosmos = model_files.auto_class(config).from_config(config).eval()
    for model in (kosmos, build("roberta")):
        assert prefixes.longest_shared(model) == 0, type(model).__name__
    for model in (build("opt"), build("xglm")):
        assert prefixes.longest_shared(model) > 0, type(model).__name__
