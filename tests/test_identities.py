"""Which model a name stands for: every file that it loads as counts, and is read once."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pruning_utils import models
from pruning_utils.engine import identities

SIZES = {
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    """Nothing is remembered from other tests."""
    monkeypatch.setattr(identities, "KNOWN", {})
    monkeypatch.setenv("PRUNING_UTILS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A model of a few weights with a tokenizer of a few words."""
    folder = tmp_path_factory.mktemp("identities") / "copy"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    words = {"type": "WordLevel", "vocab": {"<unk>": 0, "a": 1, "b": 2}, "unk_token": "<unk>"}
    tokenizer = Tokenizer.from_str(json.dumps({"version": "1.0", "model": words}))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def flip_a_byte(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_identity_of_the_embedded_model_and_of_hub_ids():
    assert models.identity() == "SmolLM2-135M-Instruct.Q4_1.gguf sha256:b179c9523d0e6a0f"
    assert models.identity("owner/name", "v2") == "owner/name@v2"
    assert models.identity("owner/name") == "owner/name@main"


def test_an_adapter_has_no_configuration(tmp_path):
    """Whoever loads it is told what it is; its files tell it from another one until then."""
    found = set()
    for text in ("{}", '{"r": 2}'):
        (tmp_path / "adapter_config.json").write_text(text)
        found.add(models.identity(tmp_path))
    assert len(found) == 2


def test_identity_of_a_directory_is_that_of_its_files(saved, folder, monkeypatch):
    name = models.identity(folder)
    assert name.startswith("copy sha256:") and len(name) == len("copy sha256:") + 16
    assert name == models.identity(saved)
    monkeypatch.chdir(folder)
    assert models.identity(".") == models.identity("../copy/") == name
    renamed = folder.rename(folder.with_name("other"))
    assert models.identity(renamed) == name.replace("copy", "other")


@pytest.mark.parametrize("seed", range(3))
def test_any_byte_of_any_file_counts(folder, seed):
    name = models.identity(folder)
    (weights,) = folder.glob("*.safetensors")
    size = weights.stat().st_size
    for place in (0, 9, size // 2, size - 1, 1000 + 37 * seed):
        flip_a_byte(weights, place)
        assert models.identity(folder) != name, place
        flip_a_byte(weights, place)
    assert models.identity(folder) == name


@pytest.mark.parametrize(
    "changed",
    [
        *("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
        *("added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model"),
        *("spiece.model", "source.spm", "qwen.tiktoken", "tekken.json", "chat_template.jinja"),
        *("chat_template.json", "additional_chat_templates/tools.jinja", "adapter_config.json"),
        *("adapter_model.safetensors", "sentencepiece.bpe.model", "bpe.codes", "emoji.json"),
    ],
)
def test_files_of_weights_and_tokenizer_count(folder, changed):
    path, absent = folder / changed, models.identity(folder)
    path.parent.mkdir(exist_ok=True)
    there = path.exists()
    path.write_text(path.read_text() + " " if there else "{}")
    first = models.identity(folder)
    path.write_text(path.read_text() + "\n")
    assert len({absent, first, models.identity(folder)}) == 3
    if not there:
        path.unlink()
        assert models.identity(folder) == absent


def test_files_that_nothing_is_loaded_from_do_not_count(folder):
    name = models.identity(folder)
    names = ("generation_config.json", "README.md", "model.gguf", ".gitattributes", "LICENSE")
    for other in (*names, "pruning_utils.json", "report.html"):
        (folder / other).write_text("other")
    (folder / "checkpoint-40").mkdir()
    (folder / "checkpoint-40" / "model.safetensors").write_text("other")
    assert models.identity(folder) == name


def test_moving_bytes_from_one_file_to_another_counts(folder):
    (folder / "vocab.txt").write_text("ab")
    (folder / "vocab2.txt").write_text("c")
    name = models.identity(folder)
    (folder / "vocab.txt").write_text("a")
    (folder / "vocab2.txt").write_text("bc")
    assert models.identity(folder) != name


def test_a_header_of_impossible_length_is_read_as_bytes(folder):
    (weights,) = folder.glob("*.safetensors")
    name = models.identity(folder)
    weights.write_bytes((2**62).to_bytes(8, "little") + weights.read_bytes()[8:])
    assert models.identity(folder) != name


# --- shards ---------------------------------------------------------------------------------------


def split(folder: Path, second: str) -> Path:
    """Put half of the weights into another file, and give the index."""
    (weights,) = folder.glob("*.safetensors")
    tensors = load_file(weights)
    weights.unlink()
    names = sorted(tensors)
    places = {name: "one.safetensors" if n % 2 else second for n, name in enumerate(names)}
    for place in set(places.values()):
        part = {name: tensors[name] for name in names if places[name] == place}
        (folder / place).parent.mkdir(exist_ok=True)
        save_file(part, folder / place, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


@pytest.mark.parametrize("second", ["two.safetensors", "below/two.safetensors"])
def test_every_shard_counts(folder, second):
    whole = LlamaForCausalLM.from_pretrained(folder)
    split(folder, second)
    again = LlamaForCausalLM.from_pretrained(folder)
    assert torch.equal(whole.lm_head.weight, again.lm_head.weight), "the shards are really read"
    name = models.identity(folder)
    for shard in ("one.safetensors", second):
        flip_a_byte(folder / shard, -1)
        assert models.identity(folder) != name, shard
        flip_a_byte(folder / shard, -1)
    assert models.identity(folder) == name


@pytest.mark.parametrize(
    "shard",
    [
        *("../two.safetensors", "below/../../two.safetensors", "..\\two.safetensors"),
        *("/two.safetensors", "C:\\two.safetensors", "\\\\host\\two.safetensors", "", 3, None),
    ],
)
def test_weights_outside_of_the_directory_are_refused(folder, shard):
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": shard}}))
    said = "index.json names .* as weights, and they must lie below the model's directory"
    with pytest.raises(ValueError, match=said):
        models.identity(folder)
    index.unlink()
    if shard is not None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": shard}))
        with pytest.raises(ValueError, match="config.json names .* as weights"):
            models.identity(folder)


@pytest.mark.parametrize(
    ("file", "written"),
    [
        *(("config.json", text) for text in ("", "[1]", "[" * 10**5)),
        *(("model.safetensors.index.json", text) for text in ("", "{}", '{"weight_map": 1}')),
    ],
)
def test_damaged_files_of_a_directory_are_named(folder, file, written):
    (folder / file).write_text(written)
    with pytest.raises(ValueError, match=f"{file} is damaged.*save the model again"):
        models.identity(folder)


def test_weights_that_the_configuration_chooses_count(folder):
    (folder / "below").mkdir()
    (weights,) = folder.glob("*.safetensors")
    weights.rename(folder / "below" / "chosen.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["transformers_weights"] = "below/chosen.safetensors"
    (folder / "config.json").write_text(json.dumps(config))
    LlamaForCausalLM.from_pretrained(folder)
    name = models.identity(folder)
    flip_a_byte(folder / "below" / "chosen.safetensors", -1)
    assert models.identity(folder) != name


# --- what is remembered ---------------------------------------------------------------------------


@pytest.fixture
def read(folder, monkeypatch) -> list[str]:
    """The large files that are read, of which the weights are one here."""
    (weights,) = folder.glob("*.safetensors")
    monkeypatch.setattr(identities, "REMEMBERED_FROM_BYTES", weights.stat().st_size)
    others = [path for path in folder.iterdir() if path != weights]
    assert all(path.stat().st_size < weights.stat().st_size for path in others)
    found, digest = [], identities._sha256

    def noting(path) -> str:
        if Path(path).suffix == ".safetensors":
            found.append(Path(path).name)
        return digest(path)

    monkeypatch.setattr(identities, "_sha256", noting)
    return found


def test_large_files_are_read_once(folder, read, own_cache, monkeypatch):
    name = models.identity(folder)
    assert models.identity(folder) == name and read == ["model.safetensors"]
    # Another process knows nothing but what the cache says.
    monkeypatch.setattr(identities, "KNOWN", {})
    assert models.identity(folder) == name and read == ["model.safetensors"]
    shutil.rmtree(own_cache)
    monkeypatch.setattr(identities, "KNOWN", {})
    assert models.identity(folder) == name and read == ["model.safetensors"] * 2


@pytest.mark.parametrize("replaced", [False, True], ids=["in place", "renamed over it"])
def test_a_change_that_keeps_size_and_time_is_noticed(folder, read, replaced):
    (weights,) = folder.glob("*.safetensors")
    name, before = models.identity(folder), weights.stat()
    changed = weights.with_suffix(".new") if replaced else weights
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    changed.write_bytes(content)
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))
    changed.replace(weights)
    assert weights.stat().st_mtime_ns == before.st_mtime_ns
    assert models.identity(folder) != name and len(read) == 2


def test_changes_right_after_each_other_are_noticed(folder, read):
    """Faster than the clock of a file system ticks."""
    (weights,) = folder.glob("*.safetensors")
    found = set()
    for _ in range(5):
        flip_a_byte(weights, 2000)
        found.add(models.identity(folder))
    assert len(found) == 2 and len(read) == 5


@pytest.mark.parametrize(
    "kept", ["", "[1]", '{"a": 1}', "[" * 10**5, '{"%s": [1, 2, 3, 4]}', '{"%s": {}}', "folder"]
)
def test_a_damaged_cache_costs_time_alone(folder, read, own_cache, monkeypatch, kept):
    name = models.identity(folder)
    file = own_cache / identities.REMEMBERED
    (place,) = json.loads(file.read_text())
    assert place == str(folder / "model.safetensors")
    file.unlink()
    if kept == "folder":
        file.mkdir()
    else:
        file.write_text(kept % place if "%s" in kept else kept)
    monkeypatch.setattr(identities, "KNOWN", {})
    assert models.identity(folder) == name and len(read) == 2
    assert models.identity(folder) == name and len(read) == 2, "this process knows it all the same"


def test_a_cache_that_cannot_be_written_costs_time_alone(folder, read, own_cache):
    own_cache.write_text("a file")
    name = models.identity(folder)
    assert models.identity(folder) == name and read == ["model.safetensors"]
    assert own_cache.read_text() == "a file"


def test_files_that_have_gone_are_forgotten(folder, read, own_cache, tmp_path):
    models.identity(folder)
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    shutil.rmtree(folder)
    models.identity(moved)
    kept = json.loads((own_cache / identities.REMEMBERED).read_text())
    assert list(kept) == [str(moved / "model.safetensors")]
