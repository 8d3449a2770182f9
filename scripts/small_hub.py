"""A hub's cache with small stand-ins for the papers' models and texts, read as the real ones are.

Each model has the configuration of the real one, with its number of layers and heads, and random
weights of a few numbers a head. Its tokenizer begins and ends a text as the real one does. The rows
of a data set have the real one's names and splits, and their texts come from the embedded data.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import tokenizers
import torch
from datasets.arrow_writer import ArrowWriter
from tokenizers import decoders, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from pruning_utils import data, instructions
from pruning_utils.embedded import quiet_loading
from pruning_utils.engine import corpora

SEED = 0
# So many that a text has not many more tokens than for the real model.
N_TOKENS = 4096
# Rows of an embedding that no token has, where the real model has such rows.
SPARE_ROWS = 8
N_DOCUMENTS = 240  # of each split
# Where a row is no document: rows of one.
ROWS_OF_DOCUMENT = {"bookcorpus": corpora.SENTENCES, "wikitext2": 3}
# Weights of this spread keep the scale of what passes through a layer of a few hundred numbers.
SPREAD = 0.1
SHARDS = 2

# --- tokenizers -----------------------------------------------------------------------------------

LLAMA_3_CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim }}{{ '<|eot_id|>' }}{% endfor %}"
)
CHAT_ML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
)


@dataclass(frozen=True)
class Form:
    """How a tokenizer treats texts.

    Attributes:
        special: Its special tokens by their roles, as PreTrainedTokenizerFast names them.
        begins: What it puts before a text; None: nothing.
        in_bytes: Whether pieces are made of bytes, as GPT-2 has them, or of characters with a mark
            for blanks and bytes for the rest, as SentencePiece has them.
        leads: Whether a blank is put before the first word.
        others: Further special tokens.
        chat: Template of its chats; None: it has none.
        spare: Whether the embedding has rows that no token has.
    """

    special: Mapping[str, str]
    begins: str | None = None
    in_bytes: bool = False
    leads: bool = True
    others: tuple[str, ...] = ()
    chat: str | None = None
    spare: bool = False


LLAMA_2 = Form({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, begins="<s>")
VICUNA = Form({**LLAMA_2.special, "pad_token": "<unk>"}, begins="<s>")
FORMS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": Form(
        {
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
            "pad_token": "<|im_end|>",
        },
        in_bytes=True,
        chat=CHAT_ML,
    ),
    "meta-llama/Llama-2-7b-hf": LLAMA_2,
    "meta-llama/Llama-2-13b-hf": LLAMA_2,
    "meta-llama/Llama-2-70b-hf": LLAMA_2,
    "mistralai/Mistral-7B-v0.1": LLAMA_2,
    "lmsys/vicuna-7b-v1.3": VICUNA,
    "lmsys/vicuna-7b-v1.5": VICUNA,
    "meta-llama/Llama-3.1-8B-Instruct": Form(
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        begins="<|begin_of_text|>",
        in_bytes=True,
        others=("<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>"),
        chat=LLAMA_3_CHAT,
    ),
    "Qwen/Qwen1.5-7B": Form(
        {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        in_bytes=True,
        others=("<|im_start|>", "<|im_end|>"),
        chat=CHAT_ML,
        spare=True,
    ),
    "microsoft/phi-2": Form(
        {role: "<|endoftext|>" for role in ("bos_token", "eos_token", "unk_token")},
        in_bytes=True,
        spare=True,
    ),
    "google/gemma-2-2b": Form(
        {
            "pad_token": "<pad>",
            "eos_token": "<eos>",
            "bos_token": "<bos>",
            "unk_token": "<unk>",
        },
        begins="<bos>",
        leads=False,
        others=("<start_of_turn>", "<end_of_turn>"),
    ),
}
# Configurations that a model has besides its sizes.
FURTHER: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-3.1-8B-Instruct": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    },
    "mistralai/Mistral-7B-v0.1": {"sliding_window": 4096},
    # Its 40 heads are read alike in NF4 from 320 numbers on; fewer units keep it small.
    "meta-llama/Llama-2-13b-hf": {"intermediate_size": 640},
}
# The fewest numbers in a head. It is 2 for types that are not listed. Phi turns half of a head, and
# turns pairs.
HEAD_WIDTHS = {"phi": 8, "gemma2": 8}
# Shapes of one size agree to two in a thousand parameters, so one unit must be less than that.
N_UNITS = 1216


def tokenizer(form: Form, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of at most :data:`N_TOKENS` pieces that were learned from these texts."""
    own = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=not form.in_bytes))
    special = list(dict.fromkeys([*form.special.values(), *form.others]))
    if form.in_bytes:
        own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        own.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        bytes_of = []
    else:
        steps = [normalizers.Prepend("▁")] if form.leads else []
        own.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
        own.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        back += [decoders.Strip(" ", 1, 0)] if form.leads else []
        own.decoder = decoders.Sequence(back)
        alphabet = []
        bytes_of = [f"<0x{number:02X}>" for number in range(256)]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=N_TOKENS,
        special_tokens=[*special, *bytes_of],
        initial_alphabet=alphabet,
        limit_alphabet=256,
        show_progress=False,
    )
    own.train_from_iterator(texts, trainer)
    if form.begins:
        own.post_processor = processors.TemplateProcessing(
            single=f"{form.begins} $A",
            pair=f"{form.begins} $A {form.begins} $B",
            special_tokens=[(form.begins, own.token_to_id(form.begins))],
        )
    found = PreTrainedTokenizerFast(
        tokenizer_object=own,
        **form.special,
        additional_special_tokens=list(form.others),
        clean_up_tokenization_spaces=False,
    )
    found.chat_template = form.chat
    return found


# --- models ---------------------------------------------------------------------------------------


def is_read_alike(width: int) -> bool:
    """Whether all processors read rows of so many numbers in NF4 alike.

    With AVX512, bitsandbytes 0.50 takes 16 numbers of a row at once and counts whole blocks of 64 a
    row. It finds the wrong scales for rows of 16 times something that end within a block.
    """
    return width % 64 == 0 or width % 16 != 0


def shrink(config: PreTrainedConfig, name: str, form: Form, known: PreTrainedTokenizerFast) -> None:
    """Give a configuration, in place, heads of a few numbers and the rows of a small tokenizer.

    Args:
        config: That of the real model.
        name: The model's name.
        form: Of its tokenizer.
        known: Its small tokenizer.
    """
    n_heads, least = config.num_attention_heads, HEAD_WIDTHS.get(config.model_type, 2)
    # Rotary positions turn pairs of numbers.
    widths = range(least, least + 64, 2)
    head_width = next(width for width in widths if is_read_alike(n_heads * width))
    width = n_heads * head_width
    config.intermediate_size = N_UNITS
    config.hidden_size = width
    if getattr(config, "head_dim", None):
        config.head_dim = head_width
    config.vocab_size = len(known) + SPARE_ROWS * form.spare
    for role in ("bos", "eos", "pad"):
        setattr(config, f"{role}_token_id", getattr(known, f"{role}_token_id"))
    config.initializer_range = SPREAD
    for field, value in FURTHER.get(name, {}).items():
        setattr(config, field, value)


def place_model(hub: Path, name: str, config: PreTrainedConfig, texts: list[str]) -> None:
    """Write a small model into the cache of a hub, as downloaded files lie there.

    Args:
        hub: The cache's folder.
        name: Name of the real model, one of :data:`FORMS`.
        config: Its configuration, which becomes that of the small one.
        texts: To learn the tokenizer's pieces from.
    """
    form = FORMS[name]
    commit = hashlib.sha1(name.encode()).hexdigest()
    repository = hub / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    known = tokenizer(form, texts)
    shrink(config, name, form, known)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        # A random model has a row of zeros for padding. Where that token ends texts as well, the
        # real model has trained it.
        rows = model.get_input_embeddings().weight.data
        zero = ~rows.any(dim=1)
        rows[zero] = SPREAD * torch.randn_like(rows[zero])
    n_bytes = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    model.generation_config = GenerationConfig.from_model_config(model.config)
    with quiet_loading():
        model.save_pretrained(snapshot, max_shard_size=1 + n_bytes // SHARDS)
    known.save_pretrained(snapshot)
    # Last, so that a folder that was half written is not taken for a model.
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(commit)


# --- data sets ------------------------------------------------------------------------------------


def place_rows(
    cache: Path, repository: str, configuration: str | None, splits: Mapping[str, list[dict]]
) -> None:
    """Write a data set into the cache of :mod:`datasets`, where it is found without a hub.

    Args:
        cache: The cache's folder.
        repository: Name of the real data set.
        configuration: Of it; None where it has one alone.
        splits: Rows by the real names of the splits.
    """
    owner, _, name = repository.partition("/")
    name = datasets.naming.camelcase_to_snakecase(name)
    named = configuration or "default"
    folder = cache / f"{owner}___{name}" / named / "0.0.0" / "0"
    folder.mkdir(parents=True, exist_ok=True)
    described = {}
    for split, rows in splits.items():
        table = datasets.Dataset.from_list(rows)
        path = folder / f"{repository.partition('/')[2]}-{split}.arrow"
        with ArrowWriter(path=str(path), features=table.features) as writer:
            writer.write_table(table.data.table)
            writer.finalize()
        described[split] = datasets.SplitInfo(split, num_examples=len(rows), dataset_name=name)
    info = datasets.DatasetInfo(
        features=table.features,
        config_name=named,
        dataset_name=name,
        version="0.0.0",
        splits=datasets.SplitDict(described),
    )
    info.write_to_directory(folder)


def texts_of(source: str, column: str) -> Iterator[dict]:
    """Rows that look like those of a corpus of :data:`data.HUB_CORPORA`, without an end.

    BookCorpus has a sentence a row; WikiText has headings and empty rows between its paragraphs.
    """
    for text in itertools.cycle(data.documents("xsum", "calibration")):
        if source == "bookcorpus":
            yield from ({column: f"{part} ."} for part in text.lower().split(". ") if part)
        elif source == "wikitext2":
            yield from ({column: part} for part in ("", f" = {text[:20]} = \n", f" {text} \n"))
        else:
            yield {column: text}


def place_corpora(cache: Path) -> None:
    """Write every corpus of :data:`data.HUB_CORPORA`."""
    for source, (repository, configuration, column, ours) in data.HUB_CORPORA.items():
        rows = texts_of(source, column)
        names = sorted(set(ours.values()))
        n_rows = N_DOCUMENTS * ROWS_OF_DOCUMENT.get(source, 1)
        splits = {split: list(itertools.islice(rows, n_rows)) for split in names}
        place_rows(cache, repository, configuration, splits)


def place_instructions(cache: Path) -> None:
    """Write every source of :data:`instructions.HUB`, with embedded questions and answers.

    Options are a list, of which the answer is the number of one.
    """
    embedded = instructions.embedded_rows(instructions.EMBEDDED["fiqa"][0])[:N_DOCUMENTS]
    for repository, configuration, split, prompt, answer in instructions.HUB.values():
        rows: list[dict[str, Any]] = []
        for row in embedded:
            made: dict[str, Any] = {**dict.fromkeys(prompt, ""), answer: row["answer"]}
            made[prompt[0]] = row["question"]
            if "choices" in prompt:
                made |= {"choices": [row["answer"][:40], "none of these"], answer: 0}
            rows.append(made)
        place_rows(cache, repository, configuration, {split: rows})


# --- all of it ------------------------------------------------------------------------------------


def environment(home: Path) -> dict[str, str]:
    """Environment variables by which this hub's cache is read, and no other: a rehearsal."""
    return {
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_DATASETS_CACHE": str(home / "datasets"),
        "HF_HUB_OFFLINE": "1",
        "PRUNING_UTILS_REHEARSAL": "1",
        # Of what is found in a cache it would say so each time.
        "DATASETS_VERBOSITY": "error",
    }


def place(home: Path, configurations: Mapping[str, PreTrainedConfig]) -> None:
    """Write models and data sets that are not there yet.

    Args:
        home: The folder of the hub's caches.
        configurations: Configurations of the real models by their names.

    Raises:
        ValueError: For a model whose tokenizer is not known here.
    """
    unknown = [name for name in configurations if name not in FORMS]
    if unknown:
        raise ValueError(
            f"no small tokenizer is known for {', '.join(unknown)}; there are: {', '.join(FORMS)}"
        )
    texts = data.documents("xsum", "calibration")
    for name, config in configurations.items():
        if not (home / "hub" / f"models--{name.replace('/', '--')}" / "refs" / "main").exists():
            place_model(home / "hub", name, config, texts)
    done = home / "datasets" / "placed"
    if not done.exists():
        place_corpora(home / "datasets")
        place_instructions(home / "datasets")
        done.write_text("all\n")
