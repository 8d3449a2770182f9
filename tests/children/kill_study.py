"""Kills a sweep of a study at random moments, then lets it end."""

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

from pruning_utils import data, evaluation, results, runtime
from pruning_utils.engine import trainer  # noqa: F401  what heals is imported here, not by each child

runtime.setup()
from tiny_model import DENSE, INFORMED, SETTINGS, SIMPLE

from pruning_utils.studies.study import Study

root, tiny = Path(sys.argv[1]), sys.argv[2]
points = [DENSE, INFORMED, SIMPLE, {**INFORMED, "healed": True}, {**SIMPLE, "healed": True}]
(
    data.documents("boolq", "healing"),
    data.documents("quac", "healing"),
    data.documents("xsum", "calibration"),
)
evaluation.load_tasks(list(SETTINGS["tasks"]), num_fewshot=1)


def child(folder):
    if pid := os.fork():
        return pid
    try:
        study = Study(points, model=tiny, checkpoints=folder / "checkpoints", **SETTINGS)
        results.sweep(points, study, path=folder / "depth.csv", parameters=SETTINGS)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


started = time.monotonic()
assert os.waitpid(child(root / "whole"), 0)[1] == 0
longest, chance, kills, seen = time.monotonic() - started, random.Random(1), 0, set()
for part in range(8):
    pid, patience = child(root / "killed"), chance.uniform(0.3, 1) * longest * (0.4 + part / 10)
    time.sleep(patience)
    os.kill(pid, signal.SIGKILL)
    kills += os.waitpid(pid, 0)[1] == signal.SIGKILL
    folder = root / "killed"
    seen.add(
        (
            len(list(folder.glob("depth.points/*.json"))),
            len(list(folder.glob("checkpoints/*/*/checkpoint-*"))),
        )
    )
    if (folder / "depth.csv").exists():
        break
print(kills, len(seen))
assert os.waitpid(child(root / "killed"), 0)[1] == 0
