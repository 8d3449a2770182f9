"""Models larger than the memory at hand: layers stay in their files until a pass comes to them."""

import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from every_architecture import build
from test_healing import heal
from test_models import edit_config, save_tokenizer, tokens, wide

from pruning_utils import evaluation, importance, models, offload, similarity

CHILDREN = Path(__file__).resolve().parent / "children"


def saved(folder: Path, width: int, n_layers: int, shard: str) -> Path:
    model = wide(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=n_layers)
    model.save_pretrained(folder, max_shard_size=shard)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("models") / "small", 64, 8, "300KB")


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def offloaded(folder: Path, dtype: str = "float32"):
    return offload.load_model(folder, size_of(folder) // 4, dtype=dtype, device="cpu")[0]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux begins the mark of memory anew")
def test_a_scan_holds_no_more_than_a_quarter_of_the_model(tmp_path):
    """The model has 252 MB. Loaded whole, a scan holds all of it."""
    large = saved(tmp_path / "large", 512, 16, "20MB")
    little = saved(tmp_path / "little", 512, 3, "20MB")
    found = {}
    for memory in ("all", size_of(large) // 4):
        command = [sys.executable, CHILDREN / "scan_offloaded.py", large, little, str(memory)]
        ended = subprocess.run(command, capture_output=True, text=True)
        assert ended.returncode == 0 and ended.stdout, ended.stderr[-3000:]
        found[memory] = json.loads(ended.stdout)
    whole, quarter = found.values()
    assert whole.pop("held") > 0.9 * size_of(large)
    assert quarter.pop("held") < 0.3 * size_of(large)
    assert whole == quarter


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_offloaded_model_gives_the_numbers_of_the_loaded_one(small, dtype):
    plain, tokenizer = models.load_model(small, dtype=dtype, device="cpu")
    model, same = offload.load_model(small, size_of(small) // 4, dtype=dtype, device="cpu")
    assert sum(weight.is_meta for weight in model.parameters()) > 40 and not model.training
    assert model.dtype == plain.dtype and vars(same).keys() == vars(tokenizer).keys()
    assert (same.pad_token_id, same.model_max_length) == (2, 64)
    ids = tokens(3)
    assert torch.equal(evaluation.token_losses(model, ids), evaluation.token_losses(plain, ids))
    found, expected = (similarity.measure_similarity(each, ids) for each in (model, plain))
    assert np.array_equal(found.angular_distance, expected.angular_distance)
    assert np.array_equal(
        importance.perplexity_without_layer(model, ids),
        importance.perplexity_without_layer(plain, ids),
    )


def test_what_fits_is_not_offloaded(small):
    model, _ = offload.load_model(small, 4 * size_of(small), dtype="float32", device="cpu")
    assert not any(weight.is_meta for weight in model.parameters())


def test_a_model_of_which_nothing_may_stay_runs_too(small):
    model, _ = offload.load_model(small, 1, dtype="float32", device="cpu")
    assert all(weight.is_meta for weight in model.parameters())
    plain, _ = models.load_model(small, dtype="float32", device="cpu")
    ids = tokens()
    assert torch.equal(evaluation.token_losses(model, ids), evaluation.token_losses(plain, ids))


def test_healing_needs_the_weights_themselves(small):
    with pytest.raises(ValueError, match="must be in memory, but .* is on the device meta"):
        heal(offloaded(small))


@pytest.mark.parametrize("memory", [0, -1, 1.5, True, "1GB", None])
def test_other_amounts_of_memory_are_refused_before_anything_is_read(memory, tmp_path):
    with pytest.raises(ValueError, match="memory must be a whole number"):
        offload.load_model(tmp_path / "nothing", memory)


def test_experts_that_are_merged_as_they_load_are_written_and_read(tmp_path, monkeypatch):
    """transformers stacks Mixtral's experts, which are apart in its files."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    folder = tmp_path / "mixtral"
    build("mixtral").save_pretrained(folder)
    save_tokenizer(folder)
    plain, _ = models.load_model(folder, dtype="float32", device="cpu")
    model, _ = offload.load_model(folder, 1, dtype="float32", device="cpu")
    assert list((tmp_path / "temporary").rglob("*experts*.safetensors"))
    ids = tokens()
    assert torch.equal(evaluation.token_losses(model, ids), evaluation.token_losses(plain, ids))


def test_no_folder_is_left_behind(small, tmp_path, monkeypatch):
    broken = saved(tmp_path / "broken", 64, 2, "1GB")
    edit_config(broken, model_type="no such type")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    model = offloaded(small)
    assert len(list((tmp_path / "temporary").iterdir())) == 1
    del model
    gc.collect()
    assert list((tmp_path / "temporary").iterdir()) == []
    with pytest.raises(ValueError, match="no such type"):
        offload.load_model(broken, 10**9)
    assert list((tmp_path / "temporary").iterdir()) == []
