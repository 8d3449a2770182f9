"""Heals a model in processes that accelerate starts, once for each of several settings.

Arguments: the model's folder, where to save, a list of settings as JSON. Saved are the history and
the weights of each, or what refused it.
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny_model import WATCHED, WINDOWS  # noqa: E402

from pruning_utils import models, sharded  # noqa: E402


def main(name: str, out: Path, asked: list[dict]) -> None:
    model, tokenizer = models.load_model(name, dtype="float32", device="cpu")
    for number, settings in enumerate(asked):
        try:
            healed = sharded.heal(model, tokenizer, WINDOWS, eval_ids=WATCHED, **settings)
        except ValueError as error:
            (out / f"{number}.txt").write_text(str(error))
            continue
        if healed is not None:
            healed.history.to_csv(out / f"{number}.csv", index=False)
            torch.save(healed.model.state_dict(), out / f"{number}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))
