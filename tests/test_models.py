"""Loading models, the cache of the embedded one, and the parts that later steps take hold of."""

import copy
import hashlib
import http.server
import json
import logging
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, tiny
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from pruning_utils import embedded, models, runtime

ROOT = Path(__file__).resolve().parents[1]
# Wide enough for 4-bit blocks of 64 weights.
WIDE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def wide(config_class: str = "LlamaConfig", **fields) -> nn.Module:
    return tiny(config_class, sizes=WIDE, **fields)


def save_tokenizer(folder: Path, **special) -> None:
    vocabulary = {"<unk>": 0, "a": 1, "</s>": 2, "b": 3, "<pad>": 4}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}
    folder.joinpath("tokenizer.json").write_text(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [],
                "pre_tokenizer": {"type": "WhitespaceSplit"},
                "model": model,
            }
        )
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        **{"unk_token": "<unk>", "eos_token": "</s>", **special},
    )
    tokenizer.save_pretrained(folder)


def save(model: nn.Module, folder: Path, **special) -> Path:
    model.save_pretrained(folder)
    save_tokenizer(folder, **special)
    return folder


def edit_config(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def tokens(n: int = 2, length: int = 12, vocabulary: int = 96) -> torch.Tensor:
    return torch.randint(3, vocabulary, (n, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: nn.Module, input_ids: torch.Tensor | None = None) -> torch.Tensor:
    return model(tokens() if input_ids is None else input_ids).logits.float()


def linear_classes(model: nn.Module) -> set[str]:
    layers = models.decoder_layers(model)
    return {type(module).__name__ for module in layers.modules() if isinstance(module, nn.Linear)}


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.Popen:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=variables,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """Directory of a small llama with random float32 weights. Tests that change it take a copy."""
    return save(wide(), tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def llama_copy(llama, tmp_path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "copy"))


# --- a local directory ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_directory_loads_ready_for_evaluation(llama, dtype):
    model, tokenizer = models.load_model(llama, dtype=dtype, device="cpu")
    expected = LlamaForCausalLM.from_pretrained(llama, dtype=getattr(torch, dtype))
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert not any(module.training for module in model.modules())
    assert torch.equal(logits(model), logits(expected))
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"
    assert tokenizer.model_max_length == 64
    assert tokenizer("a b other")["input_ids"] == [1, 3, 0]


@pytest.mark.parametrize("native, expected", [(True, torch.bfloat16), (False, torch.float32)])
def test_the_default_is_what_the_chosen_device_multiplies(llama, monkeypatch, native, expected):
    asked = []
    choose = runtime.choose_device
    monkeypatch.setattr(
        runtime, "choose_device", lambda device=None: asked.append(device) or choose("cpu")
    )
    monkeypatch.setattr(runtime, "multiplies_natively", lambda dtype, device: native)
    model, _ = models.load_model(str(llama))
    assert model.dtype == expected and asked[0] is None


def test_own_padding_and_shorter_limit_of_a_tokenizer_stay(tmp_path):
    _, tokenizer = models.load_model(save(wide(), tmp_path, pad_token="<pad>", model_max_length=48))
    assert tokenizer.pad_token == "<pad>" and tokenizer.model_max_length == 48


def test_context_without_a_limit(tmp_path):
    config = AutoConfig.for_model(
        "mamba", vocab_size=96, hidden_size=64, num_hidden_layers=2, state_size=4
    )
    assert models.context_length(config) > 10**9
    assert models.context_length(AutoConfig.for_model("gpt2", n_positions=77)) == 77
    assert models.context_length(AutoConfig.for_model("mpt", max_seq_len=78)) == 78
    vision = AutoConfig.for_model("gemma3", text_config={"max_position_embeddings": 79})
    assert models.context_length(vision) == 79


def test_relative_directory_is_no_hub_id(llama, monkeypatch):
    monkeypatch.chdir(llama.parent)
    assert models.load_model("llama")[0].config.hidden_size == 64


# --- quantised ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantize", "kind", "closeness"), [("nf4", "Linear4bit", 0.8), ("int8", "Linear8bitLt", 0.99)]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_layers_are_quantised_and_the_head_is_not(llama, quantize, kind, closeness, dtype):
    plain, _ = models.load_model(llama, dtype=dtype, device="cpu")
    model, _ = models.load_model(llama, dtype=dtype, quantize=quantize, device="cpu")
    assert linear_classes(model) == {kind}
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight.dtype == plain.dtype
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)
    assert torch.equal(model.model.embed_tokens.weight, plain.model.embed_tokens.weight)
    stored = model.model.layers[0].mlp.up_proj.weight
    if quantize == "nf4":
        assert stored.quant_state.nested and stored.quant_state.quant_type == "nf4"
        assert stored.dtype == torch.uint8 and stored.numel() == 64 * 128 // 2
        assert model.config.quantization_config.bnb_4bit_compute_dtype == plain.dtype
    else:
        assert stored.dtype == torch.int8 and stored.numel() == 64 * 128
    near, exact = logits(model).flatten(), logits(plain).flatten()
    assert closeness < torch.corrcoef(torch.stack([near, exact]))[0, 1] < 1 - 1e-7


def test_nf4_stores_the_nearest_of_sixteen_values(llama):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    values = torch.tensor(
        [
            -1.0,
            -0.6961928,
            -0.52507305,
            -0.3949175,
            -0.28444138,
            -0.18477343,
            -0.09105004,
            0.0,
            0.0795803,
            0.1609302,
            0.2461123,
            0.33791524,
            0.44070983,
            0.562617,
            0.72295684,
            1.0,
        ]
    )
    exact = (
        models.load_model(llama, dtype="float32", device="cpu")[0]
        .model.layers[1]
        .mlp.down_proj.weight
    )
    stored = (
        models.load_model(llama, dtype="float32", quantize="nf4")[0]
        .model.layers[1]
        .mlp.down_proj.weight
    )
    found = bitsandbytes.functional.dequantize_4bit(stored.data, stored.quant_state).cpu()
    blocks = exact.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = values[(blocks / scale).unsqueeze(-1).sub(values).abs().argmin(-1)]
    # The scales themselves are kept in 8 bits, within 2 % of what they were.
    assert (
        (found.reshape(-1, 64) - nearest * scale).abs() <= 0.02 * nearest.abs() * scale + 1e-6
    ).all()


def test_quantised_files_keep_their_own_storage(llama, tmp_path):
    model, _ = models.load_model(llama, quantize="nf4", device="cpu")
    save(model, tmp_path)
    again, _ = models.load_model(tmp_path, device="cpu")
    assert linear_classes(again) == {"Linear4bit"}
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ValueError, match="quantised already, so quantize must be None, got 'int8'"):
        models.load_model(tmp_path, quantize="int8", device="cpu")


def test_nothing_to_quantise_is_an_error(tmp_path):
    save(ARCHITECTURES["falcon"](), tmp_path)  # its linear layers are of a class of their own
    with pytest.raises(ValueError, match="its decoder layers hold no weights that nf4 could store"):
        models.load_model(tmp_path, quantize="nf4", device="cpu")


# --- the embedded model ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded_model():
    return models.load_model()


def test_embedded_model_is_what_it_says(embedded_model):
    model, tokenizer = embedded_model
    assert len(models.decoder_layers(model)) == 30
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert (
        model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings
    )
    assert model.dtype == runtime.resolve_dtype("auto") and not model.training
    assert tuple(model.lm_head.weight.shape) == (49_152, 576) and len(tokenizer) == 49_152
    assert tokenizer.model_max_length == 8192 and tokenizer.pad_token is not None
    assert not getattr(model, "is_quantized", False) and not hasattr(
        model.config, "quantization_config"
    )
    prompt = tokenizer(
        "Water boils at 100 degrees Celsius, and the capital of France is", return_tensors="pt"
    )
    assert (
        tokenizer.decode(logits(model, prompt["input_ids"].to(model.device))[0, -1].argmax())
        == " Paris"
    )


def test_embedded_weights_are_those_of_the_file(embedded_model):
    gguf = pytest.importorskip("gguf")
    tensors = {
        tensor.name: tensor
        for tensor in gguf.GGUFReader(embedded.embedded_file(*embedded.DEFAULT.parts[0])).tensors
    }
    model = embedded_model[0].model
    for name, weight in (
        ("token_embd.weight", model.embed_tokens.weight),
        ("blk.7.ffn_down.weight", model.layers[7].mlp.down_proj.weight),
        ("blk.29.attn_v.weight", model.layers[29].self_attn.v_proj.weight),
        ("output_norm.weight", model.norm.weight),
    ):
        values = gguf.dequantize(tensors[name].data, tensors[name].tensor_type)
        assert torch.equal(weight.cpu(), torch.from_numpy(values.copy()).bfloat16()), name


def test_second_load_unpacks_nothing(embedded_model, monkeypatch):
    def refuse(*paths):
        raise AssertionError("unpacked again")

    monkeypatch.setattr(embedded, "_unpack", refuse)
    model, tokenizer = models.load_model("embedded", dtype="float32")
    assert model.dtype == torch.float32 and tokenizer.get_vocab() == embedded_model[1].get_vocab()
    assert torch.equal(model.model.norm.weight, embedded_model[0].model.norm.weight.float())


# --- bad input ------------------------------------------------------------------------------------


@pytest.fixture
def nothing_written(tmp_path, monkeypatch):
    """An empty working directory, and empty caches, that must still be empty afterwards."""
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setenv("PRUNING_UTILS_CACHE", str(place / "cache"))
    yield
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dtype": "float64"},
            "dtype must be one of auto, bfloat16, float16, float32, got 'float64'",
        ),
        (
            {"dtype": torch.float64},
            "dtype must be one of auto, bfloat16, float16, float32, got torch.float64",
        ),
        ({"dtype": None}, "dtype must be one of auto, bfloat16, float16, float32, got None"),
        ({"quantize": "int4"}, "quantize must be one of None, 'nf4', 'int8', got 'int4'"),
        ({"quantize": True}, "quantize must be one of None, 'nf4', 'int8', got True"),
        (
            {"device": "gpu"},
            r"device must be a torch device of this machine, .* \d+ CUDA GPUs here, got 'gpu'",
        ),
        (
            {"device": "cuda:99"},
            r"device must be a torch device of this machine, .* CUDA GPUs here, got 'cuda:99'",
        ),
        ({"device": "meta"}, "device must be one that can compute, got 'meta'"),
        (
            {"revision": "main"},
            "revision applies to hub ids only, got revision 'main' for 'embedded'",
        ),
    ],
)
def test_bad_options_are_refused_before_any_work(nothing_written, options, message):
    with pytest.raises(ValueError, match=message):
        models.load_model(**options)


def test_revision_of_a_directory_is_refused(nothing_written, llama):
    for named in (models.load_model, models.identity):
        with pytest.raises(
            ValueError, match=f"revision applies to hub ids only, got revision 'v1' for '{llama}'"
        ):
            named(llama, revision="v1")
    with pytest.raises(ValueError, match="hub ids only, got revision 'v1' for 'embedded'"):
        models.identity("embedded", "v1")


@pytest.mark.parametrize(
    "name",
    [
        "/no/such/model",
        "./model",
        "../model",
        "~/model",
        "a/b/c",
        "owner/",
        "",
        " ",
        "two words",
        "x" * 300 + "/",
        __file__,
    ],
)
def test_names_that_stand_for_nothing_are_refused(nothing_written, name):
    with pytest.raises(ValueError) as error:
        models.load_model(name)
    assert (
        f"{name!r} is no model: none of embedded, smollm2-135m, gemma-3-270m, no directory, and no "
        "hub id such as 'owner/name'" == str(error.value)
    )
    with pytest.raises(ValueError, match="is no model"):
        models.identity(name)


def test_directory_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=f"'{tmp_path}' is no model: the directory has no config.json"
    ):
        models.load_model(tmp_path)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (
            "bert",
            {},
            "bert is an encoder-only model; layer pruning needs a decoder-only language model",
        ),
        (
            "modernbert",
            {
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "cls_token_id": 1,
                "sep_token_id": 2,
            },
            "modernbert is an encoder-only model",
        ),
        (
            "t5",
            {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
            "t5 is an encoder-decoder model",
        ),
        (
            "bart",
            {
                "d_model": 32,
                "encoder_layers": 1,
                "decoder_layers": 1,
                "encoder_ffn_dim": 8,
                "decoder_ffn_dim": 8,
            },
            "bart is an encoder-decoder model",
        ),
        ("vit", {}, "vit is not a causal language model"),
    ],
)
def test_other_kinds_of_models_are_refused(tmp_path, kind, fields, message):
    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "decoder_start_token_id": 0,
    }
    model = AutoModel.from_config(AutoConfig.for_model(kind, **{**sizes, **fields}))
    save(model, tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        models.load_model(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("content", ['{"model_type": "nonesuch"}', "{}", "no json"])
def test_configurations_that_nothing_knows_are_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=f"'{tmp_path}' cannot be loaded: "):
        models.load_model(tmp_path)


def test_directory_without_a_tokenizer_is_refused(tmp_path):
    wide().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"'{tmp_path}' cannot be loaded: .*tokenizer"):
        models.load_model(tmp_path)


def test_no_weight_is_ever_left_at_random(llama_copy, tmp_path):
    weights = load_file(llama_copy / "model.safetensors")
    lost = "model.layers.1.mlp.up_proj.weight"
    save_file(
        {name: weight for name, weight in weights.items() if name != lost},
        llama_copy / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(
        ValueError, match=f"1 weights are missing or of another shape, {lost} for one"
    ):
        models.load_model(llama_copy)
    save_file(
        weights | {lost: weights[lost][:5].clone()},
        llama_copy / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(
        ValueError, match=f"1 weights are missing or of another shape, {lost} for one"
    ):
        models.load_model(llama_copy)
    headless = AutoModel.from_pretrained(llama_copy.parent / "copy", ignore_mismatched_sizes=True)
    with pytest.raises(ValueError, match="1 weights are missing .*lm_head.weight for one"):
        models.load_model(save(headless, tmp_path / "headless"))
    os.truncate(llama_copy / "model.safetensors", 3000)
    with pytest.raises(ValueError, match=f"'{llama_copy}' cannot be loaded"):
        models.load_model(llama_copy)


class _Trap:
    """Unpickling this leaves a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickled_weights_are_never_read(llama_copy, tmp_path):
    (llama_copy / "model.safetensors").unlink()
    (llama_copy / "pytorch_model.bin").write_bytes(pickle.dumps(_Trap(tmp_path / "unpickled")))
    with pytest.raises(ValueError, match=f"'{llama_copy}' cannot be loaded: .*model.safetensors"):
        models.load_model(llama_copy)
    assert not (tmp_path / "unpickled").exists()
    pickle.loads((llama_copy / "pytorch_model.bin").read_bytes())
    assert (tmp_path / "unpickled").exists()  # the trap works


@pytest.mark.parametrize("known", [True, False])
def test_code_that_comes_with_a_model_is_never_run(llama_copy, tmp_path, monkeypatch, known):
    asked = []
    monkeypatch.setattr("builtins.input", lambda *question: asked.append(question) or "n")
    trap = f"from pathlib import Path\nPath({str(tmp_path / 'run')!r}).touch()\n"
    trap += "from transformers import LlamaConfig as OwnConfig, LlamaForCausalLM as OwnModel\n"
    (llama_copy / "own.py").write_text(trap)
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    edit_config(llama_copy, auto_map=classes, model_type="llama" if known else "own")
    if known:
        # The library's, not the one beside it.
        assert type(models.load_model(llama_copy)[0]) is LlamaForCausalLM
    else:
        with pytest.raises(
            ValueError, match=f"'{llama_copy}' cannot be loaded: it needs code of its own"
        ):
            models.load_model(llama_copy)
    assert not (tmp_path / "run").exists() and not asked


def test_weights_that_the_configuration_leaves_out_are_refused(llama_copy):
    """The layers were cut in the configuration alone: nobody would be told."""
    n_layers = json.loads((llama_copy / "config.json").read_text())["num_hidden_layers"]
    edit_config(llama_copy, num_hidden_layers=n_layers - 1)
    with pytest.raises(
        ValueError,
        match=f"'{llama_copy}' cannot be loaded: .*hold 9 weights.*layers.{n_layers - 1}.*"
        rf"num_hidden_layers = {n_layers - 1}\)",
    ):
        models.load_model(llama_copy)


@pytest.mark.parametrize("n_layers", [0, -1, 10**9])
def test_a_number_of_layers_that_is_none_is_refused_at_once(llama_copy, n_layers):
    edit_config(llama_copy, num_hidden_layers=n_layers)
    with pytest.raises(ValueError, match=f"cannot be loaded: .*num_hidden_layers.*{n_layers}"):
        models.load_model(llama_copy)


def test_weights_outside_the_directory_are_refused(llama_copy):
    """By an index of shards; what lies there would be no part of the model's identity either."""
    (llama_copy / "model.safetensors").rename(llama_copy.parent / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}
    (llama_copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match="cannot be loaded: its index names '../elsewhere.safetensors'"
    ):
        models.load_model(llama_copy)


@pytest.mark.parametrize("has_configuration", [False, True])
def test_an_adapter_is_told_from_a_model(llama_copy, tmp_path, has_configuration):
    base = LlamaForCausalLM.from_pretrained(llama_copy)
    adapter = tmp_path / "added"
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    get_peft_model(base, config).save_pretrained(adapter)
    if has_configuration:
        base.config.save_pretrained(adapter)
    with pytest.raises(ValueError, match="it is a PEFT adapter .*merge_and_unload"):
        models.load_model(adapter)


@pytest.mark.parametrize(
    "fields",
    [
        {"attn_implementation": "somebody/flash-attention"},
        {"_attn_implementation": "kernels-community/flash-attn2:flash_attn"},
        {"attn_implementation": {"": "eager", "text_config": "somebody/kernel"}},
        {"experts_implementation": "somebody/experts"},
        {"vision_config": {"attn_implementation": "somebody/kernel"}},
    ],
)
def test_a_kernel_of_a_hub_is_refused(llama_copy, fields):
    edit_config(llama_copy, **fields)
    with pytest.raises(ValueError, match=f"'{llama_copy}' cannot be loaded: .*code on a hub"):
        models.load_model(llama_copy)


def test_a_kernel_of_the_library_is_none_of_a_hub(llama_copy):
    edit_config(llama_copy, attn_implementation="eager")
    models.load_model(llama_copy)


@pytest.mark.parametrize(
    "kind",
    ["gptq", "awq", "compressed-tensors", "hqq", "quanto", "aqlm", "torchao", "higgs", "spqr"],
)
def test_a_quantisation_whose_library_is_absent_names_the_model(llama_copy, kind):
    settings = {"quant_method": kind, "bits": 4, "group_size": 128, "weights": "int8"}
    edit_config(llama_copy, quantization_config=settings)
    with pytest.raises(ValueError, match=f"'{llama_copy}' cannot be loaded: ."):
        models.load_model(llama_copy)


@pytest.mark.parametrize("where", [None, "text_config"])
def test_an_unknown_quantisation_is_not_taken_for_plain_weights(llama_copy, where):
    settings = {"quantization_config": {"quant_method": "modelopt"}}
    edit_config(llama_copy, **(settings if where is None else {where: settings}))
    with pytest.raises(
        ValueError, match="quant_method = 'modelopt', which must be one of .*gptq.*16-bit files"
    ):
        models.load_model(llama_copy)


def test_experts_that_stay_in_16_bits_are_told(caplog):
    mixture = ARCHITECTURES["mixtral"]()
    with caplog.at_level(logging.WARNING, logger="pruning_utils"):
        models.quantized_copy(ARCHITECTURES["llama"]())
        assert not caplog.records
        models.quantized_copy(mixture)
    layers = models.decoder_layers(mixture)
    experts = sum(
        weight.numel() for name, weight in layers.named_parameters() if ".experts." in name
    )
    share = 100 * experts / models.n_parameters(layers)
    (record,) = caplog.records
    assert record.args[0] == pytest.approx(share, abs=1.5) and share > 20
    assert "are not stored as nf4" in record.message


# --- a hub ----------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of a hub as loading needs: two revisions, a model that vanishes midway, one gated."""

    folder: Path

    def log_message(self, *arguments):
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.partition("?")[0].strip("/")
        if "owner/gated" in path:
            self.answer(
                401,
                X_Error_Code="GatedRepo",
                X_Error_Message="Access to model owner/gated is restricted.",
            )
        elif "owner/bare" in path and "safetensors" in path:
            self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        elif not re.search("owner/(tiny|bare)|owner/partial/resolve", path):
            self.answer(404, X_Error_Code="RepoNotFound")
        elif "nonesuch" in path:
            self.answer(404, X_Error_Code="RevisionNotFound")
        elif path.startswith("api/"):
            listing = {"id": "owner/tiny", "sha": COMMIT, "siblings": [], "tags": []}
            self.answer(
                200,
                json.dumps([] if "/tree/" in path else listing).encode(),
                Content_Type="application/json",
            )
        else:
            _, _, _, revision, name = path.split("/", 4)
            file = self.folder / name
            if revision not in ("v1", COMMIT) or not file.is_file():
                self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            else:
                content = file.read_bytes()
                self.answer(
                    200,
                    content,
                    X_Repo_Commit=COMMIT,
                    ETag=f'"{hashlib.sha256(content).hexdigest()}"',
                )

    do_HEAD = do_GET


ASK_HUB = """
import json, sys, time
time.sleep = lambda seconds: None  # the client waits between its attempts
import torch
from pruning_utils import models
for name, revision in json.loads(sys.argv[1]):
    try:
        model, tokenizer = models.load_model(name, revision=revision, dtype="float32", device="cpu")
        torch.save(model(torch.arange(12)[None]).logits, sys.argv[2])
        print(json.dumps(["loaded", type(model).__name__, tokenizer.pad_token]))
    except ValueError as error:
        print(json.dumps(["ValueError", str(error)]))
"""


def ask_hub(endpoint: str, home: Path, *questions: tuple[str, str | None]) -> list[list[str]]:
    process = run_python(
        ASK_HUB,
        json.dumps(questions),
        str(home / "logits.pt"),
        HF_ENDPOINT=endpoint,
        HF_HOME=str(home),
        HF_HUB_OFFLINE="0",
        NO_PROXY="*",
        HF_HUB_DISABLE_XET="1",
        HF_TOKEN="",
    )
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    return [json.loads(line) for line in out.splitlines()]


def test_hub_models(llama, tmp_path):
    Hub.folder = llama
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        gated, absent, partial, bare, revision, loaded = ask_hub(
            f"http://127.0.0.1:{server.server_port}",
            tmp_path,
            ("owner/gated", None),
            ("owner/absent", None),
            ("owner/partial", "v1"),
            ("owner/bare", "v1"),
            ("owner/tiny", "nonesuch"),
            ("owner/tiny", "v1"),
        )
    finally:
        server.shutdown()
        server.server_close()
    assert gated == [
        "ValueError",
        "'owner/gated' cannot be loaded: it is gated: accept its licence on its hub page, "
        "then set HF_TOKEN to a token that may read it",
    ]
    assert bare == [
        "ValueError",
        "'owner/bare' cannot be loaded: its files on the hub hold no safetensors, and no others "
        "are read: if its page offers a conversion, give its revision, such as refs/pr/1",
    ]
    for answer, name, asked in (
        (absent, "owner/absent", "main"),
        (revision, "owner/tiny", "nonesuch"),
        (partial, "owner/partial", "v1"),
    ):
        assert answer[0] == "ValueError" and answer[1].startswith(
            f"'{name}' cannot be loaded: there is no such directory in {os.getcwd()}, and on the "
            f"hub (revision {asked}): "
        )
    assert "nonesuch is not a valid git identifier" in revision[1]
    assert loaded == ["loaded", "LlamaForCausalLM", "</s>"]
    expected = logits(
        models.load_model(llama, dtype="float32", device="cpu")[0], torch.arange(12)[None]
    )
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


def test_no_hub_at_all(tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # taken, and nobody listens
        answers = ask_hub(
            f"http://127.0.0.1:{closed.getsockname()[1]}",
            tmp_path,
            ("owner/tiny", None),
            ("tiny", "v1"),
        )
    for (kind, message), name, revision in zip(
        answers, ("owner/tiny", "tiny"), ("main", "v1"), strict=True
    ):
        assert kind == "ValueError" and message.startswith(
            f"'{name}' cannot be loaded: there is no such directory in {os.getcwd()}, and on the "
            f"hub (revision {revision}): "
        )
        assert "cached" in message


# --- parts of a model -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parts_are_found_where_the_forward_pass_meets_them(name):
    model = ARCHITECTURES[name]()
    order, normed = [], []
    for number, layer in enumerate(models.decoder_layers(model)):
        layer.register_forward_hook(
            lambda module, inputs, output, number=number: order.append(number)
        )
    models.final_norm(model).register_forward_hook(
        lambda module, inputs, output: order.append("norm") or normed.append(output)
    )
    with torch.no_grad():
        states = models.backbone(model)(input_ids=tokens(vocabulary=128))[0]
        head = model.get_output_embeddings()
        head.register_forward_hook(lambda module, inputs, output: normed.append(inputs[0]))
        model(input_ids=tokens(vocabulary=128))
    assert order == [*range(8), "norm"] * 2
    # What comes out of the backbone is what was normed.
    assert torch.equal(normed[0].reshape(states.shape), states)
    assert states.shape == (2, 12, 32) and not any(
        module is head for module in models.backbone(model).modules()
    )


def test_decoder_of_a_multimodal_model_is_not_its_vision_tower():
    text = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "head_dim": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    }
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4
        )
    )
    assert models.decoder_layers(model) is model.model.language_model.layers
    assert models.final_norm(model) is model.model.language_model.norm
    assert models.text_config(model).hidden_size == 32


def test_models_without_one_list_of_layers_are_refused():
    def fake(**lists) -> nn.Module:
        module = nn.Module()
        module.config = LlamaConfig(**{**WIDE, "num_hidden_layers": 3})
        for name, length in lists.items():
            module.add_module(name, nn.ModuleList(nn.Module() for _ in range(length)))
        return module

    with pytest.raises(ValueError, match="length num_hidden_layers = 3, found none"):
        models.decoder_layers(fake(layers=2))
    with pytest.raises(ValueError, match=r"num_hidden_layers = 3, found \['first', 'second'\]"):
        models.decoder_layers(fake(first=3, second=3))
    nested = fake(layers=3, others=4)
    nested.layers[1].experts = nn.ModuleList(nn.Module() for _ in range(3))
    assert models.decoder_layers(nested) is nested.layers


def test_model_without_a_final_norm_is_refused():
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "openai-gpt", vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4
        )
    )
    with pytest.raises(
        ValueError, match="OpenAIGPTLMHeadModel has 0 norms beside its decoder layers, expected one"
    ):
        models.final_norm(model)


# --- the head -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["tied llama", "gemma2", "gpt2", "opt", "falcon", "mamba", "cohere2"]
)
def test_untied_head_is_equal_and_independent_and_stays_so(name, tmp_path):
    model = wide(tie_word_embeddings=True) if name == "tied llama" else ARCHITECTURES[name]()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is embedding.weight
    before, size = logits(model), sum(parameter.numel() for parameter in model.parameters())
    models.untie_head(model)
    assert head.weight is not embedding.weight and torch.equal(head.weight, embedding.weight)
    assert head.weight.data_ptr() != embedding.weight.data_ptr() and head.weight.requires_grad
    assert sum(parameter.numel() for parameter in model.parameters()) == size + head.weight.numel()
    assert torch.equal(logits(model), before)
    with torch.no_grad():
        head.weight.mul_(2)
    assert not torch.equal(head.weight, embedding.weight)
    after = logits(model)
    model.save_pretrained(tmp_path)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(again.get_output_embeddings().weight, head.weight)
    assert torch.equal(again.get_input_embeddings().weight, embedding.weight)
    assert torch.equal(logits(again.eval()), after) and not again.config.tie_word_embeddings


def test_untying_keeps_what_else_is_tied():
    model = wide(tie_word_embeddings=True)
    model.all_tied_weights_keys = {
        **model.all_tied_weights_keys,
        "model.a.weight": "model.b.weight",
    }
    models.untie_head(model)
    assert model.all_tied_weights_keys == {"model.a.weight": "model.b.weight"}


def test_untying_an_untied_head_changes_nothing(tmp_path):
    model = wide(tie_word_embeddings=False)
    head, before, state = model.lm_head.weight, logits(model), copy.deepcopy(model.state_dict())
    models.untie_head(model)
    assert model.lm_head.weight is head and torch.equal(logits(model), before)
    assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(state)


# --- a 4-bit copy ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config_class", "fields"),
    [
        ("LlamaConfig", {}),
        ("LlamaConfig", {"tie_word_embeddings": True}),
        ("Qwen2Config", {}),
        ("Gemma2Config", {}),
        ("GPTNeoXConfig", {}),
        ("MixtralConfig", {"num_local_experts": 2}),
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_quantised_copy_is_what_loading_in_nf4_gives(
    config_class, fields, dtype, tmp_path, monkeypatch
):
    monkeypatch.setattr(runtime, "choose_device", lambda device=None: torch.device("cpu"))
    model, _ = models.load_model(save(wide(config_class, **fields), tmp_path), dtype=dtype)
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    before = logits(model)
    duplicate = models.quantized_copy(model)
    loaded, _ = models.load_model(tmp_path, dtype=dtype, quantize="nf4")
    expected, parts = dict(loaded.named_modules()), dict(duplicate.named_modules())
    assert {name: type(part) for name, part in parts.items()} == {
        name: type(part) for name, part in expected.items()
    }
    quantised = [part for part in parts.values() if type(part).__name__ == "Linear4bit"]
    # Until the first forward pass unpacks the scales on a CPU.
    assert quantised and all(
        part.weight.quant_state.nested and part.weight.quant_state.quant_type == "nf4"
        for part in quantised
    )
    assert torch.equal(logits(duplicate), logits(loaded))
    assert not torch.equal(logits(duplicate), before)
    assert duplicate.is_quantized and duplicate.is_loaded_in_4bit
    assert (
        duplicate.config.quantization_config.to_dict()
        == loaded.config.quantization_config.to_dict()
    )
    assert not any(part.training for part in parts.values())

    # The input is as it was, to the bit, and shares no memory with the copy.
    assert linear_classes(model) == {"Linear"} and not hasattr(model.config, "quantization_config")
    assert not getattr(model, "is_quantized", False)
    assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())
    assert torch.equal(logits(model), before)
    addresses = {parameter.data_ptr() for parameter in model.parameters()}
    assert not any(parameter.data_ptr() in addresses for parameter in duplicate.parameters())
    tied = fields.get("tie_word_embeddings", config_class == "Gemma2Config")
    assert (
        duplicate.get_output_embeddings().weight is duplicate.get_input_embeddings().weight
    ) == tied


def test_quantised_copy_keeps_biases_and_mode():
    model = wide("Qwen2Config").train()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.bias.fill_(0.25)
    duplicate = models.quantized_copy(model)
    assert all(part.training for part in duplicate.modules())
    assert (duplicate.model.layers[0].self_attn.q_proj.bias == 0.25).all()


def test_parameters_in_four_bits_count_as_what_they_stand_for():
    model = wide()
    duplicate = models.quantized_copy(model)
    assert models.n_parameters(duplicate) == models.n_parameters(model)
    duplicate(torch.arange(3, 9)[None])  # some processors repack weights when they first compute
    assert models.n_parameters(duplicate) == models.n_parameters(model)


def test_a_class_of_ones_own_is_no_model_of_transformers():
    class Own(nn.Module):
        config = {"num_hidden_layers": 3}

    for asked in (models.decoder_layers, models.text_config, models.quantized_copy):
        with pytest.raises(ValueError, match="a causal language model of transformers, .* got Own"):
            asked(Own())


def test_quantised_copy_refuses(llama):
    with pytest.raises(ValueError, match="carries adapters: merge them first"):
        models.quantized_copy(get_peft_model(wide(), LoraConfig(target_modules=["q_proj"])))
    with pytest.raises(ValueError, match="the model is quantised already"):
        models.quantized_copy(models.quantized_copy(wide()))
    for quantize in ("nf4", "int8"):
        with pytest.raises(
            ValueError, match="the model is quantised already; load it in bfloat16 or float32"
        ):
            models.quantized_copy(models.load_model(llama, quantize=quantize)[0])
    with pytest.raises(
        ValueError, match="decoder layers of GPT2LMHeadModel hold no nn.Linear that NF4 could store"
    ):
        models.quantized_copy(ARCHITECTURES["gpt2"]())


# --- input ids ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("input_ids", "message"),
    [
        ([[1, 2]], r"integer tensor of shape \(n_samples, seq_len\), got list"),
        (torch.ones(3, dtype=torch.long), r"got int64 of shape \(3,\)"),
        (torch.ones(1, 2, 3, dtype=torch.long), r"got int64 of shape \(1, 2, 3\)"),
        (torch.ones(2, 3), r"of shape \(n_samples, seq_len\), got float32 of shape \(2, 3\)"),
        (torch.ones(2, 3, dtype=torch.bool), r"got bool of shape \(2, 3\)"),
        (torch.ones(2, 3, dtype=torch.complex64), r"got complex64 of shape \(2, 3\)"),
        (torch.ones(0, 3, dtype=torch.long), r"got int64 of shape \(0, 3\)"),
        (torch.ones(3, 0, dtype=torch.long), r"got int64 of shape \(3, 0\)"),
        (torch.tensor([[3, 96]]), r"input_ids must lie in the vocabulary \[0, 96\), got 96"),
        (torch.tensor([[-1, 5]]), r"input_ids must lie in the vocabulary \[0, 96\), got -1"),
        (
            torch.ones(1, 65, dtype=torch.long),
            "at most as long as the model's context of 64 tokens, got 65",
        ),
    ],
)
def test_bad_input_ids_are_refused(input_ids, message):
    with pytest.raises(ValueError, match=message):
        models.check_input_ids(wide(), input_ids)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_ids_of_any_width_become_those_that_every_model_takes(dtype):
    ids = models.check_input_ids(wide(), torch.tensor([[0, 95], [7, 1]], dtype=dtype))
    assert ids.dtype == torch.int64 and ids.tolist() == [[0, 95], [7, 1]]


def test_the_longest_and_the_shortest_ids_pass():
    for ids in (torch.ones(1, 64).long(), torch.ones(5, 1).long()):
        assert torch.equal(models.check_input_ids(wide(), ids), ids)


# --- files that people have -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"is_causal": False}, "as is_causal is False"),
        ({"use_bidirectional_attention": True}, "as use_bidirectional_attention is True"),
        ({"text_config": {"use_bidirectional_attention": "all"}}, "is 'all'"),
        ({"model_type": "paligemma"}, "tokens of paligemma see those that follow them"),
    ],
)
def test_models_that_see_later_tokens_are_refused(llama_copy, fields, message):
    edit_config(llama_copy, **fields)
    with pytest.raises(ValueError, match=message):
        models.load_model(llama_copy)


def test_pictures_alone_may_be_seen_from_both_sides(llama_copy):
    edit_config(llama_copy, use_bidirectional_attention="vision")
    assert models.load_model(llama_copy)


@pytest.mark.parametrize(
    "fields", [{"num_hidden_layers": 10**9}, {"vision_config": {"depth": 10**9}}]
)
def test_a_count_that_nothing_has_is_refused(llama_copy, fields):
    edit_config(llama_copy, **fields)
    with pytest.raises(ValueError, match="1000000000, and at most 10000 are allowed"):
        models.load_model(llama_copy)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/elsewhere.safetensors", "w.bin"])
def test_an_index_names_safetensors_of_its_own_only(llama_copy, name):
    names = load_file(llama_copy / "model.safetensors")
    (llama_copy / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(names, name)}
    (llama_copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"its index names '{name}': weights must be .safetensors"):
        models.load_model(llama_copy)


@pytest.mark.parametrize(
    "named, message",
    [
        ("adapter_model.bin", "says transformers_weights = 'adapter_model.bin': weights must be"),
        (7, "says transformers_weights = 7: weights must be .safetensors files"),
        ("own.safetensors.index.json", "its index names '../elsewhere.safetensors'"),
    ],
)
def test_weights_that_a_configuration_names_are_safetensors_of_its_own(llama_copy, named, message):
    """As the index above, though there is a file with the usual name."""
    names = load_file(llama_copy / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "../elsewhere.safetensors")}
    (llama_copy / "own.safetensors.index.json").write_text(json.dumps(index))
    edit_config(llama_copy, transformers_weights=named)
    with pytest.raises(ValueError, match=message):
        models.load_model(llama_copy)


@pytest.mark.parametrize("name", ["own.safetensors", "own.safetensors.index.json"])
def test_weights_that_a_configuration_names_are_loaded(llama_copy, name):
    weights = load_file(llama_copy / "model.safetensors")
    (llama_copy / "model.safetensors").rename(llama_copy / "own.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "own.safetensors")}
    (llama_copy / "own.safetensors.index.json").write_text(json.dumps(index))
    edit_config(llama_copy, transformers_weights=name)
    loaded, _ = models.load_model(llama_copy, dtype="float32")
    for key, weight in weights.items():
        assert torch.equal(loaded.state_dict()[key], weight.float()), key


@pytest.mark.parametrize("name", [None, 5, b"abc"])
def test_a_name_is_a_text_or_a_path(name):
    with pytest.raises(ValueError, match=f"name must be 'embedded', .*got {name!r}"):
        models.load_model(name)


def add_weights(folder: Path, more: dict[str, torch.Tensor]) -> None:
    weights = load_file(folder / "model.safetensors") | more
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_layers_that_predict_further_tokens_are_left_in_the_files(llama_copy):
    """As DeepSeek and GLM have them: numbered on, with a projection of their own."""
    add_weights(llama_copy, {"model.layers.2.input_layernorm.weight": torch.ones(64)})
    with pytest.raises(ValueError, match="1 weights that its configuration does not describe"):
        models.load_model(llama_copy)
    add_weights(llama_copy, {"model.layers.2.eh_proj.weight": torch.ones(64, 128)})
    assert len(models.decoder_layers(models.load_model(llama_copy)[0])) == 2


def test_masks_among_old_weights_are_left_in_the_files(tmp_path):
    tiny("GPT2Config", sizes={}, n_layer=2, n_embd=32, n_head=4, vocab_size=96).save_pretrained(
        tmp_path
    )
    save_tokenizer(tmp_path)
    add_weights(tmp_path, {"transformer.h.0.attn.masked_bias": torch.tensor(-1e4)})
    assert len(models.decoder_layers(models.load_model(tmp_path)[0])) == 2


def test_padding_without_a_row_in_the_embedding_becomes_the_end(llama_copy):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(llama_copy)
    tokenizer.add_tokens([f"more{number}" for number in range(96)])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id >= 96
    tokenizer.save_pretrained(llama_copy)
    loaded = models.load_model(llama_copy)[1]
    assert loaded.pad_token == loaded.eos_token == "</s>"


def test_untying_one_of_two_models_of_a_configuration_leaves_the_other():
    one = wide(tie_word_embeddings=True)
    other = LlamaForCausalLM(one.config)
    assert other.config is one.config
    models.untie_head(one)
    assert (one.config.tie_word_embeddings, other.config.tie_word_embeddings) == (False, True)


@pytest.mark.parametrize("config_class", ["Qwen2Config", "GPTNeoXConfig", "Gemma3TextConfig"])
def test_a_folder_without_a_tokenizer_is_refused(config_class, tmp_path):
    """transformers makes one up, of special tokens alone, which makes nothing of any text."""
    tiny(config_class).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="its tokenizer has no vocabulary: no tokenizer.json"):
        models.load_model(tmp_path)
