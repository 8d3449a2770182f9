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
from tiny_model import DENSE, INFORMED, SETTINGS

from pruning_utils.studies.study import Study

root, tiny = Path(sys.argv[1]), sys.argv[2]
SETTINGS = {**SETTINGS, "tasks": {"piqa": 0}}
points = [DENSE, INFORMED, {**INFORMED, "healed": True}]
(
    data.documents("boolq", "healing"),
    data.documents("quac", "healing"),
    data.documents("xsum", "calibration"),
)
evaluation.load_tasks(list(SETTINGS["tasks"]), num_fewshot=0)
# What is imported and read at a first point is so here, and not by each child. Nothing is trained:
# a process that has trained cannot be forked to train.
results.sweep(
    [DENSE],
    Study([DENSE], model=tiny, checkpoints=root / "first", **SETTINGS),
    path=root / "first" / "depth.csv",
    parameters=SETTINGS,
)


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


def state(folder):
    """How far the work is: points, and saves of training, that are there."""
    return (
        len(list(folder.glob("depth.points/*.json"))),
        len(list(folder.glob("checkpoints/*/*/checkpoint-*"))),
    )


started = time.monotonic()
assert os.waitpid(child(root / "whole"), 0)[1] == 0
# Each run is killed somewhat after it has come further than the last one: on a machine that is
# busy with other things it is not killed before.
a_while, chance, kills, seen = (time.monotonic() - started) / 10, random.Random(1), 0, set()
folder = root / "killed"
while not (folder / "depth.csv").exists() and kills < 8:
    before, pid = state(folder), child(folder)
    # The table is written, and the points are gone, where nothing else is left to be seen.
    while state(folder) == before and not (folder / "depth.csv").exists():
        time.sleep(0.005)
    time.sleep(chance.uniform(0, a_while))
    os.kill(pid, signal.SIGKILL)
    kills += os.waitpid(pid, 0)[1] == signal.SIGKILL
    seen.add(state(folder))
print(kills, len(seen), flush=True)  # before the next fork
assert os.waitpid(child(folder), 0)[1] == 0
