"""Which tests one worker must run one after the other.

Notebooks read each other's tables, tests of one architecture share its code and its model, and
tests of instructions an index of texts.
"""

import re

SHARED_TABLES = (
    ("03", "04", "05"),
    ("06", "07", "08"),
    ("09", "10", "11", "12"),
)
SMOKE = re.compile(r"test_smoke_notebook\w*\[(\d\d)_")
ARCHITECTURE = re.compile(r"test_every_architecture\.py::\w+\[([^]]+)\]")


def folder_name(notebook: str) -> str:
    """The name that a notebook's folder of smoke results shares with its group's."""
    digits = notebook[:2]
    first = next((group[0] for group in SHARED_TABLES if digits in group), digits)
    return f"smoke {first}"


def scope(nodeid: str) -> str:
    """What pytest-xdist keeps on one worker: a group of tests, or the test alone.

    Its own marks for this, ``xdist_group``, do nothing under pytest 9.2.
    """
    smoke, architecture = SMOKE.search(nodeid), ARCHITECTURE.search(nodeid)
    if smoke:
        return folder_name(smoke[1])
    if "test_instructions.py::" in nodeid:
        return "instructions"
    return f"architecture {architecture[1]}" if architecture else nodeid
