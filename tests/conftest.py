"""What all tests share."""

import gc
import os
import sys
from pathlib import Path

import pytest

# One torch thread for each process, so that tests that run beside each other do not get in each
# other's way. Set before torch is imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Processes that tests start are those of a plain machine, whatever an image sets for all of them.
for name in ("PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE"):
    os.environ.pop(name, None)
# Nothing is compiled by torch, but in tests that say so. Without this bitsandbytes imports its
# compiler, which takes a fifth of the seconds that a new process needs to import PEFT.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

# Where it finds this package, jsonschema builds a grammar of internationalised addresses for
# seconds, whatever it is imported for. The schema of notebooks has none to check.
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]

# Most objects of a test stay until its end, so looking through the new ones seldom finds any.
gc.set_threshold(20_000, 20, 20)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))


n_modules = 0


@pytest.fixture(autouse=True)
def few_to_collect() -> None:
    """What libraries have brought along is left alone by all later collections of garbage.

    Each training begins with a full one, which otherwise looks at every object of the libraries. A
    fifth of the time of tests that train went there.
    """
    global n_modules
    if len(sys.modules) > n_modules + 100:
        gc.collect()
        gc.freeze()
        n_modules = len(sys.modules)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved model of a few layers with the embedded model's tokenizer."""
    from tiny_model import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny-llama")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that no worker is left alone with one of them at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Tests that read each other's results go to one worker, in order; all others go anywhere."""
    from smoke_groups import scope
    from xdist.scheduler import LoadScopeScheduling

    class ByScope(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope(nodeid)

    return ByScope(config, log)
