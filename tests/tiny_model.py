"""A random model of a few layers, and settings that studies of it share."""

from functools import cache

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from pruning_utils import models
from pruning_utils.studies.study import Study

N_LAYERS = 5
HEALING = {
    "method": "lora",
    "targets": "mlp",
    "rank": 2,
    "dropout": 0.0,
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "steps": 4,
    "batch_size": 2,
}
SETTINGS = {
    "revision": None,
    "seq_len": 16,
    "n_calibration": 3,
    "texts": {"xsum": 3},
    "seed": 0,
    "limit": 3,
    "tasks": {"piqa": 0, "boolq": 1},
    "healing_settings": HEALING,
}


class StandIn(nn.Identity):
    """What functions take for a model of transformers where it is never run."""

    config = LlamaConfig()

    def get_output_embeddings(self) -> nn.Module:
        """A head that is never asked."""
        return self


# Token ids to train on, and to evaluate.
WINDOWS = torch.arange(12 * 17).view(12, 17) * 7919 % 97
WATCHED = torch.arange(5 * 17).view(5, 17) * 104729 % 97
DENSE, INFORMED, SIMPLE = (
    {"rule": rule, "n_dropped": n_dropped, "healed": False, "seed": 0}
    for rule, n_dropped in (("none", 0), ("similarity", 2), ("deepest", 2))
)


@cache
def embedded_tokenizer() -> PreTrainedTokenizerBase:
    """The embedded model's tokenizer, for which a worker loads the weights once."""
    return models.load_model()[1]


def save_tiny_model(folder) -> str:
    """A random model of a few layers with the embedded model's tokenizer, as a local directory."""
    tokenizer = embedded_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).bfloat16()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4 if weight.ndim > 1 else 1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_study(tiny: str, folder, points: list[dict], **changed) -> Study:
    """A study of the tiny model on one text, without questions unless they are asked for."""
    return Study(points, model=tiny, checkpoints=folder, **{**SETTINGS, "tasks": {}, **changed})
