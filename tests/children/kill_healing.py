"""Kills healing runs at planned moments, then lets them end."""

import os
import pickle
import random
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch

from pruning_utils import healing, runtime

runtime.setup()
warnings.resetwarnings()  # all are shown again
warnings.simplefilter("ignore", DeprecationWarning)  # but those that Python itself hides
from test_healing import Tokenizer, bits, llama, windows

from pruning_utils.engine import trainer  # noqa: F401  is imported here, not by each child


def child(method, output_dir, result, pause=0.0):
    if pid := os.fork():
        return pid
    mean_loss = healing.mean_loss
    healing.mean_loss = lambda model, ids: time.sleep(pause) or mean_loss(model, ids)
    try:
        healed = healing.heal(
            llama(tied=True, dtype=torch.bfloat16),
            Tokenizer,
            windows(),
            method=method,
            eval_ids=windows(3),
            steps=12,
            batch_size=2,
            learning_rate=1e-2,
            warmup_steps=2,
            rank=4,
            last_k=2,
            dropout=0.1,
            untie=False,
            output_dir=output_dir,
        )
        result.write_bytes(pickle.dumps((bits(healed.model), healed.history)))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


chance = random.Random(3)
for method in sys.argv[2:]:
    folder = Path(sys.argv[1]) / method
    folder.mkdir()
    run, kills = folder / "run", []
    assert os.waitpid(child(method, None, folder / "alone"), 0)[1] == 0
    moments = [
        lambda: run.glob("settings.json"),  # nothing is saved yet
        lambda: set(run.glob("checkpoint-*")) - before,  # a save begins
        lambda: [
            path
            for path in run.glob("checkpoint-*/trainer_state.json")  # it is about to be sealed
            if path.parent not in before
        ],
        lambda: (
            time.sleep(chance.uniform(0.02, 0.3)) or run.glob("settings.json")
        ),  # anywhere in a step
        lambda: [
            path for path in run.glob("checkpoint-*/complete.json") if path.parent not in before
        ],
        lambda: run.glob("checkpoint-12"),  # in the last save
    ]
    for moment in moments:
        before = set(run.glob("checkpoint-*"))
        pid = child(method, run, folder / "killed", pause=0.02)
        while os.waitpid(pid, os.WNOHANG)[0] == 0:
            if list(moment()):
                os.kill(pid, signal.SIGKILL)
                kills.append(os.waitpid(pid, 0)[1])
                break
            time.sleep(0.001)
    assert kills == [signal.SIGKILL] * len(moments), kills
    assert os.waitpid(child(method, run, folder / "resumed"), 0)[1] == 0
