"""What a released model carries, what it costs, and that others can load it."""

import json
import logging
import re
import stat
import sys

import architectures
import every_architecture
import pandas as pd
import pytest
import torch
import yaml
from tiny_model import N_LAYERS

from pruning_utils import models, release, surgery
from pruning_utils.studies import study

SCORES = pd.DataFrame({"pruned": [4.5, 0.25]}, index=["loss on XSum", "accuracy"])
CARD = {
    "base": "some/model",
    "layers": [1, 3],
    "n_layers": 6,
    "parameters": 1234567,
    "scores": SCORES,
    "recipe": "the head and the last three layers, rate 0.003",
    "text": "32 thousand tokens of passages",
    "record": {"seed": 0, "versions": {"torch": "2"}},
}
TOKENS = torch.arange(8)[None]


@pytest.fixture
def pruned(tiny):
    model, tokenizer = models.load_model(tiny)
    return surgery.drop_layers(model, [1, 3]), tokenizer


def test_the_card_says_what_was_done_and_measured():
    _, header, body = release.model_card(**CARD).split("---\n", 2)
    assert yaml.safe_load(header) == {
        "base_model": "some/model",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["layer-pruning", "depth-pruning"],
    }
    assert "# some/model without 2 of its 6 layers" in body
    assert "Removed: layers 1, 3, counted from 0; 4 are left, 1,234,567 parameters in all." in body
    for said in (CARD["recipe"], CARD["text"], "| loss on XSum |", "4.5"):
        assert said in body
    assert json.loads(body.split("```json\n")[1].split("```")[0]) == CARD["record"]


HOSTILE = (
    "<script>alert(1)</script>",
    "a\n\n```\nb",
    "a\n`````json\nb\n`````",
    "a\n~~~~\nb",
    "a\n---\nbase_model: other",
    "a\r\n# heading\u2028# another\x0b\x85\x00",
    "a ![b](http://c/d) [e](javascript:f) \\[g](h)",
    "a | b\n|---|\n\\|",
    "<!-- & &lt; -->",
    "key: [1, {a: b}] # 'x\" %TAG !!python/object:os.system",
)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"card": None}, "card must be a text, of model_card, got None"),
        ({"folder": "full"}, "path must be a new or empty directory"),
    ],
)
def test_a_release_that_could_not_be_written_is_refused_at_once(
    given, message, pruned, tmp_path, monkeypatch
):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    monkeypatch.setattr(surgery, "save", lambda *_, **__: pytest.fail("the model was saved"))
    folder = tmp_path / given.pop("folder", "new")
    with pytest.raises(ValueError, match=message):
        release.save_release(*pruned, folder, **{"card": "# A card", **given})


def test_a_small_model_in_training_is_released(tmp_path, pruned):
    small = architectures.tiny("GPT2Config", sizes={**architectures.GPT2_NAMES, "n_positions": 16})
    assert small.config.resid_pdrop > 0
    _, tokenizer = pruned
    small.resize_token_embeddings(len(tokenizer))
    small.train()
    release.save_release(small, tokenizer, tmp_path / "small", card="# A card")
    assert small.training


def test_a_model_that_adds_in_another_order_is_released(tmp_path, pruned):
    """Plain transformers would load it with another implementation of attention."""
    small = architectures.tiny("LlamaConfig", attn_implementation="eager")
    _, tokenizer = pruned
    small.resize_token_embeddings(len(tokenizer))
    release.save_release(small, tokenizer, tmp_path / "small", card="# A card")


@pytest.mark.parametrize("given", HOSTILE)
def test_what_a_card_is_given_is_shown_as_text(given):
    """The card has the lines, cells, fences and fields of one that is given plain words."""
    scores = pd.DataFrame(
        {given: ["x", 2.5], "other": [given, 0.25]}, index=pd.Index([given, "y"], name=given)
    )
    words = {"base": given, "recipe": given, "text": given, "scores": scores}
    record = {"seed": [given], given: given}
    card = release.model_card(**{**CARD, **words, "record": record})
    plain_scores = scores.set_axis(["a", "b"], axis=1).set_axis(["a", "b"]).map(lambda _: "a")
    plain = release.model_card(
        **{**CARD, **dict.fromkeys(words, "a"), "scores": plain_scores, "record": record}
    )
    assert len(card.splitlines()) == len(plain.splitlines())
    header, body = card.split("---\n", 2)[1:]
    assert {**yaml.safe_load(header), "base_model": ""} == {
        **yaml.safe_load(plain.split("---\n", 2)[1]),
        "base_model": "",
    }
    assert yaml.safe_load(header)["base_model"] == release._one_line(given)
    assert json.loads(body.split("```json\n")[1].split("```")[0]) == record
    assert not re.search(r"[<>]|&(?!(amp|lt|gt);)", body)
    above = body.split("## How")[0]
    assert body.count("``") == 2 and "~~" not in above
    assert not re.search(r"(?<!\\)(\\\\)*[\[\]]", above), "a link"
    rows = [line for line in body.splitlines() if line.startswith("|")]
    assert [len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) for row in rows] == [4] * 4


def test_numbers_and_plain_words_of_a_card_are_as_they_were_given():
    scores = SCORES.rename_axis("a measure")
    card = release.model_card(**{**CARD, "scores": scores, "recipe": "rate 0.003, as `lora k=3`"})
    assert scores.astype(str).to_markdown(disable_numparse=True) in card
    assert scores.index.name == "a measure"
    assert "* Trained: rate 0.003, as `lora k=3`.\n" in card


def test_large_numbers_and_texts_that_look_like_numbers_are_left_alone():
    scores = pd.DataFrame({"whole": [134515008.0, "0.10", "1e5"]}, index=["a", "b", "c"])
    card = release.model_card(**{**CARD, "scores": scores})
    cells = [line.split("|")[2].strip() for line in card.splitlines() if line.startswith("|")]
    assert cells[2:] == ["134515008.0", "0.10", "1e5"]


def test_a_card_names_a_directory_without_its_path(tmp_path):
    (tmp_path / "my-model").mkdir()
    card = release.model_card(**{**CARD, "base": str(tmp_path / "my-model")})
    assert "base_model: my-model\n" in card and "# my-model without 2" in card
    assert str(tmp_path) not in card


def test_a_card_without_scores_is_refused():
    with pytest.raises(ValueError, match="scores must be a table with a row at least"):
        release.model_card(**{**CARD, "scores": pd.DataFrame()})


@pytest.mark.parametrize("untied", [False, True])
def test_what_is_saved_is_the_model_with_its_card(untied, pruned, tmp_path):
    model, tokenizer = pruned
    if untied:
        models.untie_head(model)
        with torch.no_grad():
            model.get_output_embeddings().weight += 1
    folder = release.save_release(model, tokenizer, tmp_path / "small", card="# A card\n")
    assert (folder / release.CARD).read_text() == "# A card\n"
    assert release.logit_difference(model, folder, TOKENS) == 0
    with torch.no_grad():
        model.get_output_embeddings().weight[0] += 1
    assert release.logit_difference(model, folder, TOKENS) > 0.01


@pytest.mark.parametrize("factor", [2, float("nan")])
def test_a_folder_that_loads_as_another_model_does_not_stay(factor, pruned, tmp_path):
    model, tokenizer = pruned
    folder = release.save_release(model, tokenizer, tmp_path / "small", card="# The first\n")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    # Which no file holds.
    model.lm_head.register_forward_hook(lambda module, given, logits: factor * logits)
    for target in (folder, tmp_path / "other"):
        with pytest.raises(ValueError, match="what transformers loads differs from the model by"):
            release.save_release(model, tokenizer, target, card="")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_trained_model_is_that_of_its_point(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNING_UTILS_OUTPUT", str(tmp_path))
    healing = {
        "targets": "all",
        "rank": 2,
        "alpha": 4,
        "dropout": 0.0,
        "warmup_steps": 0,
        "steps": 1,
        "batch_size": 1,
    }
    given = dict(
        profile="smoke",
        model=tiny,
        revision=None,
        seq_len=16,
        calibration_source="xsum",
        healing_source=None,
        texts={},
        tasks={},
        limit=None,
        seed=0,
        healing_settings=healing,
    )
    plain, _ = study.trained_model({"layers": "1 3", "recipe": "", "seed": 0}, **given)
    healed, _ = study.trained_model(
        {"layers": "1 3", "recipe": "last_layers 0.01 1 last_k=1", "seed": 0}, **given
    )
    assert len(models.decoder_layers(plain)) == len(models.decoder_layers(healed)) == N_LAYERS - 2
    same = [
        torch.equal(a, b)
        for a, b in zip(
            models.decoder_layers(plain)[0].parameters(),
            models.decoder_layers(healed)[0].parameters(),
            strict=True,
        )
    ]
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_, **__: pytest.fail("trained again"))
    again, _ = study.trained_model(
        {"layers": "1 3", "recipe": "last_layers 0.01 1 last_k=1", "seed": 0}, **given
    )
    assert torch.equal(again.get_output_embeddings().weight, healed.get_output_embeddings().weight)
    assert all(same) and not torch.equal(
        plain.get_output_embeddings().weight, healed.get_output_embeddings().weight
    )


def converter(folder, body) -> None:
    (folder / "real").mkdir()
    path = folder / "real" / release.CONVERTER
    path.write_text(f"import sys, pathlib\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    (folder / release.CONVERTER).symlink_to(path)


def test_the_converter_on_the_path_is_asked(pruned, tmp_path, monkeypatch):
    folder = surgery.save(*pruned, tmp_path / "small")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert release.export_gguf(folder) is None, "there is none yet"
    converter(
        tmp_path,
        "pathlib.Path(sys.argv[sys.argv.index('--outfile') + 1]).write_text(' '.join(sys.argv))",
    )
    target = release.export_gguf(folder, kind="q8_0")
    assert target == folder / "small.q8_0.gguf"
    script, given, *_, kind = target.read_text().split()
    assert (script, given, kind) == (
        str(tmp_path / "real" / release.CONVERTER),
        str(folder),
        "q8_0",
    )


@pytest.mark.parametrize(
    "body, said",
    [
        ("sys.exit('no such architecture')", "no such architecture"),
        ("pathlib.Path(sys.argv[3]).unlink()", ""),
        ("print('nothing')", ""),
    ],
)
def test_a_converter_that_fails_leaves_nothing(body, said, pruned, tmp_path, monkeypatch):
    folder = surgery.save(*pruned, tmp_path / "small")
    monkeypatch.setenv("PATH", str(tmp_path))
    converter(tmp_path, body)
    before = sorted(folder.iterdir())
    with pytest.raises(ValueError, match=f"convert_hf_to_gguf.py failed on small: {said}"):
        release.export_gguf(folder)
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("name", "settings", "cut", "untied", "message"),
    [
        ("gemma3_text", {}, [], False, None),
        ("gemma3_text", {}, [0], False, "GGUF cannot tell the layer_types of this gemma3_text"),
        ("gemma3_text", {}, [], True, "GGUF cannot hold the head of this gemma3_text"),
        ("gemma2", {"query_pre_attn_scalar": 5}, [], False, "query_pre_attn_scalar = 5 of this"),
        ("llama", {}, [0], True, None),
    ],
)
def test_what_gguf_cannot_tell_is_refused(
    name, settings, cut, untied, message, tmp_path, monkeypatch
):
    """llama.cpp concludes from the number of layers what a cut model need not be."""
    model = every_architecture.build(name)
    if name != "llama":
        usual = {"layer_types": None, "query_pre_attn_scalar": model.config.head_dim}
        config = type(model.config)(**{**model.config.to_dict(), **usual, **settings})
        model = type(model)(config)
    if untied:
        models.untie_head(model)
    folder = surgery.save(surgery.drop_layers(model, cut), None, tmp_path / "small")
    monkeypatch.setenv("PATH", str(tmp_path))
    converter(
        tmp_path, "pathlib.Path(sys.argv[sys.argv.index('--outfile') + 1]).write_text('GGUF')"
    )
    if message is None:
        assert release.export_gguf(folder).is_file()
        return
    with pytest.raises(ValueError, match=message):
        release.export_gguf(folder)
    assert not list(folder.glob("*.gguf"))


def test_a_release_stays_where_there_is_no_memory_to_compare_it(
    pruned, tmp_path, monkeypatch, caplog
):
    def scarce(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(release, "logit_difference", scarce)
    with caplog.at_level(logging.WARNING, logger="pruning_utils"):
        folder = release.save_release(*pruned, tmp_path / "small", card="# A card\n")
    assert (folder / "README.md").is_file()
    assert "no memory for a second model, so no logits were compared" in caplog.text


@pytest.mark.parametrize(
    "kind, message",
    [("q4", "kind must be one of auto, f32, .* got 'q4'"), ("f16", "holds no saved")],
)
def test_what_cannot_be_exported_is_refused(kind, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        release.export_gguf(tmp_path, kind=kind)


def test_vllm_is_asked_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(release.importlib.util, "find_spec", lambda name: None)
    assert release.vllm_text(tmp_path, "Hello") is None
    asked = []

    class Engine:
        def __init__(self, folder):
            asked.append(folder)

        def generate(self, prompts, params):
            asked.append((prompts, params))
            return [type("Found", (), {"outputs": [type("Text", (), {"text": " world"})]})]

    monkeypatch.setattr(release.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setitem(
        sys.modules,
        "vllm",
        type("vllm", (), {"LLM": Engine, "SamplingParams": lambda **given: given}),
    )
    assert release.vllm_text(tmp_path, "Hello", new_tokens=4) == " world"
    assert asked == [str(tmp_path), (["Hello"], {"temperature": 0, "max_tokens": 4})]


def test_a_release_may_be_written_again_with_its_card(pruned, tmp_path):
    for card in ("first", "second"):
        release.save_release(*pruned, tmp_path / "released", card=card)
    assert (tmp_path / "released" / release.CARD).read_text() == "second"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scores": [1.0]}, "scores must be a table"),
        ({"layers": [1, 6]}, "each of layers must be a whole number from 0 to 5, got 6"),
        ({"record": {"seed": {1}}}, "record must hold plain values"),
    ],
)
def test_what_no_card_can_say_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        release.model_card(**CARD | given)


def test_a_table_without_a_name_has_no_heading():
    assert "| None" not in release.model_card(**CARD)


def test_a_release_has_the_configuration_of_the_model(tmp_path):
    model = architectures.ARCHITECTURES["qwen3_moe"]()
    model.config.output_router_logits = True
    folder = surgery.save(model, None, tmp_path / "saved")
    released = release.save_release(model, None, tmp_path / "released", card="# A card")
    texts = [(one / "config.json").read_text() for one in (folder, released)]
    assert texts[0] == texts[1] and json.loads(texts[0])["output_router_logits"]


@pytest.mark.parametrize("mark", [None, '{"pruning_utils": "0.1"}'])
def test_a_model_beside_its_gguf_file_may_be_saved_again(mark, pruned, tmp_path, monkeypatch):
    folder = surgery.save(*pruned, tmp_path / "model")
    if mark:
        (folder / "pruning_utils.json").write_text(mark)
    converter(tmp_path, "open(sys.argv[sys.argv.index('--outfile') + 1], 'w').write('GGUF')")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert release.export_gguf(folder).is_file()
    surgery.save(*pruned, folder)
    assert not list(folder.glob("*.gguf"))
