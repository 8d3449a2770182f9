"""Which tests one worker must run one after the other.

Notebooks read each other's tables, tests of one architecture share its code and its model, tests
of a rehearsal its models, tests of a cluster the cluster, and some tests an index of texts.
"""

import re

SHARED_TABLES = (
    ("03", "04", "05"),
    ("06", "07", "08"),
    ("09", "10", "11", "12"),
)
SMOKE = re.compile(r"test_smoke_notebook\w*\[(\d\d)_")
# By what they have in common, what the names of further tests match.
SHARING = {
    "instructions": re.compile(r"test_instructions\.py::"),
    "rehearsal": re.compile(r"test_rehearsal\.py::(?!test_a_run_of_a100)"),
    "cluster": re.compile(r"test_workers\.py::\w*cluster"),
    "words": re.compile(r"test_data\.py::\w*(shares_thirteen_words|more_than_equal_passages)"),
}
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
    if architecture:
        return f"architecture {architecture[1]}"
    return next((name for name, tests in SHARING.items() if tests.search(nodeid)), nodeid)
