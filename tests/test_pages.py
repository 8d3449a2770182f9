"""How a notebook begins: what it was given, and the code that it shows."""

import inspect
import textwrap

import pytest

from pruning_utils import depth_study, pages, selection

PARAMETERS = 'profile = "cpu"  # words\nmodel = "embedded"\nrevision = None\nseed = 0\n'
VALUES = {"profile": "cpu", "model": "embedded"}


def test_a_notebook_as_it_was_written_says_nothing():
    assert pages.looked_at(["", PARAMETERS, "import os"], VALUES) is None
    assert pages.looked_at(["", PARAMETERS, "# Parameters\nseed = 1\n"], VALUES) is None
    assert pages.begin(3) is None, "outside a notebook"


def test_an_unknown_parameter_ends_the_run():
    with pytest.raises(
        ValueError, match="no parameter modle, sede; it has: profile, model, revision, seed"
    ):
        pages.looked_at(["", PARAMETERS, '# Parameters\nmodle = "mine"\nsede = 1\n'], VALUES)


@pytest.mark.parametrize(
    "given, said",
    [
        ({"model": "mine"}, "This run has model `mine`:"),
        ({"profile": "gpu"}, "This run has profile `gpu`:"),
        ({"model": "a/b", "profile": "mine"}, "This run has profile `mine` and model `a/b`:"),
    ],
)
def test_another_model_or_profile_is_said(given, said):
    for cells in (
        ["", PARAMETERS],
        ["", PARAMETERS, "# Parameters\nmodel = 1"],
        ["%load_ext a", PARAMETERS],
    ):
        note = pages.looked_at(cells, VALUES | given)
        assert (
            said in note.markdown
            and "written for profile `cpu` and model `embedded`" in note.markdown
        )


def test_sources_are_those_of_the_definitions():
    assert pages.source("selection.best_block").text + "\n" == inspect.getsource(
        selection.best_block
    )
    method = textwrap.dedent(inspect.getsource(depth_study.DepthStudy.__call__))
    shown = pages.source("depth_study.DepthStudy.__call__")
    assert shown.text + "\n" == method
    bundle = shown._repr_mimebundle_()
    assert bundle == {"text/markdown": f"```python\n{shown.text}\n```", "text/plain": shown.text}
    assert pages.source("depth_study.DepthStudy.loaded").text.startswith(
        "@functools.cached_property\n"
    )


@pytest.mark.parametrize(
    "name", ["selection", "selection.none", "none.best_block", "depth_study.DepthStudy.none", ""]
)
def test_unknown_sources_are_refused(name):
    with pytest.raises(ValueError, match="name must be module.function"):
        pages.source(name)
