"""The driver on a machine where importing its parts takes a minute; says when that has begun.

python slow_to_import.py SCRIPTS
"""

import importlib.abc
import sys
import time


class Slow(importlib.abc.MetaPathFinder):
    """Finds nothing, after a long time, where the driver's parts are looked for."""

    def find_spec(self, fullname, path, target=None):
        if fullname == "jobs":
            print("importing", flush=True)
            time.sleep(60)


sys.path.insert(0, sys.argv[1])
sys.meta_path.insert(0, Slow())
import run_notebooks  # noqa: E402

sys.exit(run_notebooks.main([], signals=True))
