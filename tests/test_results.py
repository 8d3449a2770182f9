"""Tables that are computed once and kept: bytes on disk, what is refused, what a kill leaves."""

import errno
import functools
import json
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pruning_utils import results, runtime
from pruning_utils.engine import definitions, records, saved_points

ROOT = Path(__file__).resolve().parents[1]
CHILDREN = ROOT / "tests" / "children"
SEED = {"model": "embedded", "seed": 0}


def never() -> pd.DataFrame:
    """Stands for a computation that must not start."""
    raise AssertionError("computed, though it must be read or refused")


def fails(point: dict) -> dict:
    raise ArithmeticError("not today")


def frame() -> pd.DataFrame:
    """A table with every kind of column, a gap, texts that look like something else, and times."""
    return pd.DataFrame(
        {
            "layer": [2, 0, 1],
            "label": ["None", "", 'a "b", c'],
            "code": ["007", "1e5", "NA"],
            "score": [1 / 3, float("nan"), 12345678.9],
            "fits": [True, False, True],
            "seconds": [0.1234567, 2.0, 3.0],
            "latency_seconds": [1.0, 2.0, float("nan")],
            "tokens_per_second": [10, 20, 30],
            "loss": [0.0, -1e-9, np.inf],
        }
    )


# --- one table ------------------------------------------------------------------------------------


def test_table_bytes_are_as_worked_by_hand(tmp_path):
    path = tmp_path / "t.csv"
    results.load_or_compute(path, frame, parameters=SEED)
    assert path.read_bytes() == (
        b"layer,label,code,score,fits,loss\n2,None,007,0.333333,True,0\n0,,1e5,,False,-1e-09\n"
        b'1,"a ""b"", c",NA,1.23457e+07,True,inf\n'
    )
    assert (tmp_path / "t.measured.csv").read_bytes() == (
        b"layer,label,code,fits,seconds,latency_seconds,tokens_per_second\n2,None,007,True,0.123457,1,10\n"
        b'0,,1e5,False,2,2,20\n1,"a ""b"", c",NA,True,3,,30\n'
    )
    assert sorted(os.listdir(tmp_path)) == ["run.json", "t.csv", "t.measured.csv"]


def test_first_return_equals_every_later_one(tmp_path):
    path = tmp_path / "t.csv"
    first = results.load_or_compute(path, frame, parameters=SEED)
    later = results.load_or_compute(path, never, parameters=SEED)
    pd.testing.assert_frame_equal(first, later)
    assert list(first.columns) == list(frame().columns), (
        "measured columns are joined back in their places"
    )
    assert list(first["label"]) == ["None", "", 'a "b", c'] and list(first["code"]) == [
        "007",
        "1e5",
        "NA",
    ]
    assert (
        first["score"][0] == 0.333333 and np.isnan(first["score"][1]) and first["loss"][2] == np.inf
    )
    kinds = [first[name].dtype.kind for name in ("layer", "score", "fits", "tokens_per_second")]
    assert kinds == ["i", "f", "b", "i"]


def test_missing_texts_become_empty_and_missing_numbers_gaps(tmp_path):
    table = pd.DataFrame(
        {"name": ["a", None], "n": [1, None], "nothing": [None, None]}, index=[5, 3]
    )
    kept = results.load_or_compute(tmp_path / "t.csv", lambda: table, parameters={})
    assert (tmp_path / "t.csv").read_text() == "name,n,nothing\na,1,\n,,\n"
    assert (
        list(kept["name"]) == ["a", ""]
        and kept["nothing"].isna().all()
        and list(kept.index) == [0, 1]
    )


def test_times_leave_the_table_identical(tmp_path):
    path = tmp_path / "t.csv"
    results.load_or_compute(path, frame, parameters=SEED)
    before, measured = path.read_bytes(), (tmp_path / "t.measured.csv").read_bytes()
    results.load_or_compute(
        path, lambda: frame().assign(seconds=9.0), parameters=SEED, recompute=True
    )
    assert path.read_bytes() == before and (tmp_path / "t.measured.csv").read_bytes() != measured
    (tmp_path / "t.measured.csv").unlink()
    without = results.load_or_compute(path, never, parameters=SEED)
    assert list(without.columns) == ["layer", "label", "code", "score", "fits", "loss"]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: [1, 2], "must return a DataFrame, or its rows as dicts, .* got list"),
        (lambda: pd.DataFrame({"a": []}), "got 0 rows"),
        (lambda: pd.DataFrame([[1, 2]], columns=["a", "a"]), r"different names.*\['a', 'a'\]"),
        (lambda: pd.DataFrame({0: [1]}), r"different names.*\[0\]"),
        (
            lambda: pd.DataFrame({"a": [1]}, index=pd.Index([3], name="layer")),
            "index .*layer.* would be lost",
        ),
        (lambda: pd.DataFrame({"a": [(1, 2)]}), "column 'a' .*tuple"),
        (lambda: pd.DataFrame({"a": [1, "x"]}), "column 'a' .*int.*str"),
        (lambda: pd.DataFrame({"a": [True, None]}), "column 'a' .*bool.* and missing"),
        (lambda: pd.DataFrame({"a": pd.to_datetime(["2024-01-01"])}), "column 'a' .*Timestamp"),
        (lambda: pd.DataFrame({"seconds": [1.0]}), "beside the measured"),
    ],
)
def test_untidy_tables_are_refused(tmp_path, made, message):
    with pytest.raises(ValueError, match=message):
        results.load_or_compute(tmp_path / "t.csv", made, parameters=SEED)
    assert os.listdir(tmp_path) == []


# --- values come back as they went, or are refused ------------------------------------------------

TEXTS = [
    *(
        "a\rb",
        "a\nb",
        "a\r\nb",
        "\r",
        "\n",
        " a ",
        " ",
        "\t",
        "",
        "NA",
        "nan",
        "None",
        "1e5",
        "007",
    ),
    *(
        '"',
        '""',
        'a"b',
        "a,b",
        "'",
        "\\",
        "\\n",
        "#",
        "True",
        "-",
        "a\x00b",
        "\x00",
        "\x1a",
        "\x7f",
    ),
    *("\u2028a\u2029", "\x85", "\x0b\x0c", "\x1c", "\ufeff", "e\u0301", "\U0001f600", "x" * 10**5),
]
INTEGERS = [2**63 - 1, -(2**63), 2**53 + 1, 0, -1]


@pytest.mark.parametrize("beside", [{}, {"n": INTEGERS[0]}], ids=["alone", "beside a number"])
def test_texts_come_back_as_they_went(tmp_path, beside):
    rows = [{"a": text, **beside} for text in TEXTS]
    kept = results.load_or_compute(tmp_path / "t.csv", lambda: rows, parameters={})
    later = results.load_or_compute(tmp_path / "t.csv", never, parameters={})
    assert list(kept["a"]) == list(later["a"]) == TEXTS


def test_points_and_rows_come_back_as_they_went(tmp_path):
    points = [{"text": text, "n": n} for text in TEXTS for n in INTEGERS[:2]]
    found = results.sweep(
        points,
        lambda point: {"back": point["text"][::-1], "other": -1 - point["n"]},
        path=tmp_path / "s.csv",
        parameters={},
    )
    assert found[["text", "n"]].to_dict("records") == points
    assert list(found["back"]) == [point["text"][::-1] for point in points]
    assert list(found["other"]) == [-1 - point["n"] for point in points]


BAD_CELLS = [
    ([2**63], r"must be an integer in \[-2\*\*63, 2\*\*63\).* got 9223372036854775808"),
    ([-(2**70)], r"got -1180591620717411303424"),
    ([1, 2**63, None], "got 9223372036854775808"),
    ([10**6000], "got one of 19932 bits"),
    ([True, 2], r"column 'a' must hold .* got \['bool', 'int'\]"),
    (["\ud800"], "UTF-8"),
    ([{"b": 1}], "must hold single values"),
    ([b"bytes"], "must be plain .* bytes"),
]


@pytest.mark.parametrize(("cells", "message"), BAD_CELLS)
def test_cells_that_no_file_gives_back_are_refused(tmp_path, cells, message):
    rows = [{"a": cell} for cell in cells]
    with pytest.raises(ValueError, match=message):
        results.load_or_compute(tmp_path / "t.csv", lambda: rows, parameters={})
    with pytest.raises(ValueError, match=message):
        results.sweep(rows, never, path=tmp_path / "s.csv", parameters={})
    assert os.listdir(tmp_path) == []
    with pytest.raises(RuntimeError, match=f"point .* failed with ValueError: .*{message}"):
        results.sweep([{"n": 1}], lambda point: rows, path=tmp_path / "s.csv", parameters={})
    assert [path.name for path in (tmp_path / "s.points").glob("*.json")] == ["parameters.json"]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pd.Series([2**64 - 1], dtype="uint64"), "column 'a' must .* got 18446744073709551615"),
        (pd.Series([2**63, -1], dtype=object), "column 'a' must .* got 9223372036854775808"),
        (pd.Series([2**70, None], dtype=object), "column 'a' must .* got 1180591620717411303424"),
        (pd.Series(["\udfff"], dtype=object), "UTF-8"),
    ],
)
def test_frames_that_no_file_gives_back_are_refused(tmp_path, column, message):
    with pytest.raises(ValueError, match=message):
        results.load_or_compute(
            tmp_path / "t.csv", lambda: pd.DataFrame({"a": column}), parameters={}
        )
    assert os.listdir(tmp_path) == []


def test_a_name_that_no_file_gives_back_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"columns \['.*a'\] would come back .* as \['a'\]"):
        results.load_or_compute(tmp_path / "t.csv", lambda: {"\ufeffa": 1}, parameters={})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([{"n": 1.5}, {"n": float("nan")}], r"point 1\['n'\] must be a number .* got nan"),
        ([{"n": 2**60}, {"n": None}], r"point 0\['n'\] must be .* below 2\*\*53 .* got 1152"),
        ([{"n": 2**60}, {"n": 0.5}], r"point 0\['n'\] must be .* below 2\*\*53 .* got 1152"),
        ([{"n": 1}, {"n": "x"}], "column 'n' must hold numbers or texts"),
        ([{"n": 0.1}, {"n": 1 / 7}], r"point 1\['n'\] must have at most six digits, .* 0.14285714"),
        ([{1: 1}], "point 0 must have texts as keys, got 1"),
    ],
)
def test_points_that_no_table_gives_back_are_refused_before_any_work(tmp_path, points, message):
    with pytest.raises(ValueError, match=message):
        results.sweep(points, never, path=tmp_path / "s.csv", parameters={})
    assert os.listdir(tmp_path) == []


def test_keys_of_parameters_are_texts(tmp_path):
    results.load_or_compute(tmp_path / "t.csv", frame, parameters={"a": {"1": 2}})
    for parameters, where in (({"a": {1: 2}}, r"parameters\['a'\]"), ({1: 2}, "parameters")):
        with pytest.raises(ValueError, match=f"{where} must have texts as keys, got 1"):
            results.load_or_compute(tmp_path / "t.csv", never, parameters=parameters)


def test_parameters_of_any_size_are_compared_and_endless_ones_refused(tmp_path):
    results.load_or_compute(tmp_path / "t.csv", frame, parameters={"n": 2**200, "m": -(2**70)})
    with pytest.raises(ValueError, match=f"n: {2**200} there, {2**200 + 1} asked"):
        results.load_or_compute(
            tmp_path / "t.csv", never, parameters={"n": 2**200 + 1, "m": -(2**70)}
        )
    endless: list = []
    endless.append(endless)
    for value, message in ((endless, "nested too deeply"), (10**6000, "at most 4096 bits")):
        with pytest.raises(ValueError, match=message):
            results.load_or_compute(tmp_path / "u.csv", never, parameters={"n": value})


# --- what belongs to the asked parameters, and what does not --------------------------------------


def test_parameters_are_compared_as_json(tmp_path):
    path = tmp_path / "t.csv"
    given = {
        "layers": (1, 2),
        "rate": np.float64(0.5),
        "n": np.int64(3),
        "text": Path("a/b"),
        "nested": {"x": (True,)},
    }
    results.load_or_compute(path, frame, parameters=given)
    same = {"nested": {"x": [True]}, "text": "a/b", "n": 3, "rate": 0.5, "layers": [1, 2]}
    results.load_or_compute(path, never, parameters=same)
    with pytest.raises(ValueError) as caught:
        results.load_or_compute(
            path, never, parameters={**same, "n": 4, "rate": 0.25, "new": None} | {"text": "a/b"}
        )
    message = str(caught.value)
    for expected in (
        "n: 3 there, 4 asked",
        "rate: 0.5 there, 0.25 asked",
        "new: absent there, null asked",
        "recompute=True",
        "t.csv",
    ):
        assert expected in message
    assert "text" not in message and "layers" not in message


def test_parameters_that_json_cannot_hold_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"parameters\['a'\]\[1\] must be plain .* set"):
        results.load_or_compute(tmp_path / "t.csv", never, parameters={"a": [1, {2}]})


def test_recompute_replaces(tmp_path):
    path = tmp_path / "t.csv"
    results.load_or_compute(path, frame, parameters=SEED)
    new = results.load_or_compute(
        path, lambda: pd.DataFrame({"a": [1]}), parameters={"seed": 1}, recompute=True
    )
    assert list(new["a"]) == [1] and results.read_record(path)["parameters"] == {"seed": 1}
    assert sorted(os.listdir(tmp_path)) == ["run.json", "t.csv"], (
        "no measured columns of the old table are left"
    )


@pytest.mark.parametrize("file", ["t.csv", "t.measured.csv"])
def test_edited_files_are_refused(tmp_path, file):
    path = tmp_path / "t.csv"
    results.load_or_compute(path, frame, parameters=SEED)
    edited = tmp_path / file
    edited.write_text(edited.read_text().replace("True", "False", 1))
    with pytest.raises(ValueError, match=f"{file} is not the file that run.json records"):
        results.load_or_compute(path, never, parameters=SEED)


def test_table_without_sound_record_is_refused(tmp_path):
    path = tmp_path / "t.csv"
    results.load_or_compute(path, frame, parameters=SEED)
    (tmp_path / "run.json").write_text("{")
    for recompute in (False, True):
        with pytest.raises(ValueError, match="run.json is damaged"):
            results.load_or_compute(path, never, parameters=SEED, recompute=recompute)
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match="no record .*recompute=True"):
        results.load_or_compute(path, never, parameters=SEED)


RECORD = {"parameters": SEED, "sha256": "0" * 64, "columns": {"a": "int"}, "commit": None}


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("", "Expecting value"),
        ("null", "must be an object, got NoneType"),
        ("[1]", "must be an object, got list"),
        ('{"t": [1]}', "the record of 't' must be an object, got list"),
        ('{"other": 3}', "the record of 'other' must be an object, got int"),
        ("[" * 10**5, "nested too deeply"),
        ('{"t": ' * 10**5, "nested too deeply"),
        ("\xff\xfe", "must be an object|Expecting value|Extra data|codec"),
        ({**RECORD, "parameters": [1]}, "the record of 't' has a parameters of type list"),
        ({**RECORD, "sha256": 7}, "has a sha256 of type int"),
        ({**RECORD, "measured_sha256": None}, "has a measured_sha256 of type NoneType"),
        ({**RECORD, "commit": 1}, "has a commit of type int"),
        ({**RECORD, "columns": ["a"]}, "has a columns of type list"),
        ({**RECORD, "columns": {"a": "complex"}}, "has a column of the kind 'complex'"),
        ({**RECORD, "columns": {"a": ["int"]}}, r"has a column of the kind \['int'\]"),
        ({**RECORD, "seconds": "1"}, "has a seconds of type str"),
        ({**RECORD, "seconds": True}, "has a seconds of type bool"),
        ({**RECORD, "peak_memory_bytes": 0.5}, "has a peak_memory_bytes of type float"),
        ({**RECORD, "points": {}}, "has a points of type dict"),
        ({**RECORD, "points": [1]}, "has points that are no objects"),
        ({**RECORD, "points": [{"point": {}, "rows": "1", "seconds": 0}]}, "has points that are"),
    ],
)
def test_a_damaged_record_is_one_clear_error(tmp_path, written, message):
    path = tmp_path / "t.csv"
    results.load_or_compute(path, frame, parameters=SEED)
    text = written if isinstance(written, str) else json.dumps({"t": written})
    (tmp_path / "run.json").write_text(text, encoding="utf-8")
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    said = re.escape(str(tmp_path / "run.json")) + f" is damaged .*({message}).*restore it, or dele"
    for read in (
        lambda: results.load_or_compute(path, never, parameters=SEED),
        lambda: results.load_or_compute(path, never, parameters=SEED, recompute=True),
        lambda: results.sweep(POINTS, never, path=path, parameters=SEED),
        lambda: results.read_record(path),
        lambda: results.stale(path),
    ):
        with pytest.raises(ValueError, match=said):
            read()
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


@pytest.mark.parametrize("lacking", ["parameters", "sha256", "columns", "commit"])
def test_a_record_that_lacks_a_field_is_one_clear_error(tmp_path, lacking):
    path = tmp_path / "t.csv"
    results.load_or_compute(path, frame, parameters=SEED)
    whole = json.loads((tmp_path / "run.json").read_text())
    del whole["t"][lacking]
    (tmp_path / "run.json").write_text(json.dumps(whole))
    said = f"run.json is damaged: the record of 't' has no {lacking}; .*recompute=True"
    with pytest.raises(ValueError, match=said):
        results.load_or_compute(path, never, parameters=SEED)
    results.load_or_compute(path, frame, parameters=SEED, recompute=True)
    assert len(results.load_or_compute(path, never, parameters=SEED)) == 3


def test_a_record_too_large_or_a_folder_in_its_place_is_one_clear_error(tmp_path):
    path = tmp_path / "t.csv"
    with (tmp_path / "run.json").open("wb") as file:
        file.truncate(2**40)  # which take no room
    with pytest.raises(ValueError, match=r"run.json is damaged \(it has 1099511627776 bytes"):
        results.load_or_compute(path, never, parameters=SEED)
    (tmp_path / "run.json").unlink()
    (tmp_path / "run.json").mkdir()
    with pytest.raises(ValueError, match=r"run.json is damaged \(it is a folder\)"):
        results.load_or_compute(path, never, parameters=SEED)


def test_fields_of_later_releases_are_read_along_and_kept(tmp_path):
    path = tmp_path / "t.csv"
    results.load_or_compute(path, frame, parameters=SEED)
    whole = json.loads((tmp_path / "run.json").read_text())
    whole["t"]["weather"] = {"sunny": [True]}
    (tmp_path / "run.json").write_text(json.dumps(whole))
    assert len(results.load_or_compute(path, never, parameters=SEED)) == 3
    results.load_or_compute(tmp_path / "u.csv", frame, parameters=SEED)
    assert results.read_record(path)["weather"] == {"sunny": [True]}


def test_records_of_other_columns_or_points_than_the_file_are_clear_errors(tmp_path):
    path = tmp_path / "s.csv"
    results.sweep(POINTS, square, path=path, parameters=SEED)
    sound = json.loads((tmp_path / "run.json").read_text())["s"]
    first = {**sound["points"][0], "rows": 3}
    columns = dict(sound["columns"])
    for changed, message in (
        ({"columns": {**columns, "label": "int"}}, "is not as run.json records its columns"),
        ({"columns": {**columns, "more": "int"}}, "has the columns .* and run.json records"),
        ({"points": [first, *sound["points"][1:]]}, r"has 6 rows.* records \[3, 2, 2\]"),
    ):
        (tmp_path / "run.json").write_text(json.dumps({"s": {**sound, **changed}}))
        with pytest.raises(ValueError, match=f"s.csv {message}"):
            results.sweep([*POINTS, {"n": 9, "label": "x"}], never, path=path, parameters=SEED)


def test_record_says_where_the_numbers_come_from(tmp_path):
    path = tmp_path / "t.csv"
    results.load_or_compute(path, lambda: time.sleep(0.02) or frame(), parameters=SEED)
    record = json.loads((tmp_path / "run.json").read_text())["t"]
    assert (
        record["parameters"] == SEED
        and 0.02 <= record["seconds"] < 2
        and record["peak_memory_bytes"] > 10**7
    )
    assert record["versions"]["pandas"] == pd.__version__ and record["device"]
    assert record["sha256"] == records.digest(path.read_bytes())
    assert record["code"] == {
        "version": 1,
        "root": "",
        "digest": record["code"]["digest"],
        "definitions": {},
    }
    assert "(" in record["processor"] and "precision" not in record


def test_a_record_names_every_machine_that_computed_a_point(tmp_path, monkeypatch):
    """Workers of a cluster have GPUs where the process that asks has none."""
    gpu = {"device": "A100", "processor": "EPYC (AVX2)", "precision": "bfloat16"}
    cpu = {"device": "cpu (2 threads)", "processor": "EPYC (AVX2)", "precision": "float32"}
    machines = iter([gpu, gpu, cpu, gpu])
    monkeypatch.setattr(saved_points, "_machine", lambda: next(machines))
    path, kept = tmp_path / "s.csv", tmp_path / "run.json"
    given = {"path": path, "parameters": {"dtype": "auto"}}
    for n_points, expected in (
        (2, gpu),
        (3, gpu | {"device": "A100 and cpu (2 threads)", "precision": "bfloat16 and float32"}),
        (4, gpu | {"device": "A100 and cpu (2 threads)", "precision": "bfloat16 and float32"}),
    ):
        results.sweep([{"n": n} for n in range(n_points)], lambda point: {"x": 1}, **given)
        record = json.loads(kept.read_text())["s"]
        assert {name: record[name] for name in gpu} == expected
    monkeypatch.setattr(saved_points, "_machine", dict)  # torch was not there
    given = {"path": tmp_path / "t.csv", "parameters": {"dtype": "float32"}}
    results.sweep([{"n": 0}], lambda point: {"x": 1}, **given)
    record = json.loads(kept.read_text())["t"]
    assert record["device"] == runtime.device_name() and record["precision"] == "float32"
    results.load_or_compute(path, frame, parameters=SEED | {"dtype": "auto"}, recompute=True)
    assert results.read_record(path)["precision"] == runtime.dtype_name(runtime.resolve_dtype())


def test_no_compute_refuses_what_is_missing(tmp_path, monkeypatch):
    results.load_or_compute(tmp_path / "t.csv", frame, parameters=SEED)
    monkeypatch.setenv("PRUNING_UTILS_NO_COMPUTE", "1")
    assert len(results.load_or_compute(tmp_path / "t.csv", never, parameters=SEED)) == 3
    with pytest.raises(FileNotFoundError, match="new.csv .*PRUNING_UTILS_NO_COMPUTE"):
        results.load_or_compute(tmp_path / "new.csv", never, parameters=SEED)
    with pytest.raises(FileNotFoundError, match="t.csv is to be computed anew .*NO_COMPUTE is set"):
        results.load_or_compute(tmp_path / "t.csv", never, parameters=SEED, recompute=True)
    with pytest.raises(FileNotFoundError, match="s.csv"):
        results.sweep([{"n": 1}], never, path=tmp_path / "s.csv", parameters=SEED)


def test_a_run_that_was_stopped_hides_no_finished_table(tmp_path, monkeypatch):
    """Where nothing may be computed: figures are drawn from what is there."""
    path, points = tmp_path / "s.csv", [{"n": 1}, {"n": 2}]
    whole = results.sweep(points, lambda point: {"m": point["n"]}, path=path, parameters=SEED)
    with pytest.raises(RuntimeError, match="point {'n': 3} failed"):
        results.sweep([*points, {"n": 3}], fails, path=path, parameters=SEED)
    assert (tmp_path / "s.points").is_dir()
    monkeypatch.setenv("PRUNING_UTILS_NO_COMPUTE", "1")
    assert results.sweep(points, never, path=path, parameters=SEED).equals(whole)
    with pytest.raises(FileNotFoundError, match="s.csv has no finished table"):
        results.sweep([*points, {"n": 3}], never, path=path, parameters=SEED)


# --- package code ---------------------------------------------------------------------------------


class Source(definitions.Package):
    """A package of one module and one task file, taken for the installed one; every table depends
    on its ``f``."""

    def stamp(self, *computes) -> dict:
        return self.stamp_of([("evaluation", "f")])


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes such a package and takes it for the imported one, as a new process would."""
    folder = tmp_path / "pkg"
    (folder / "tasks").mkdir(parents=True)
    (folder / "tasks" / "a.yaml").write_text("task: a\n")

    def write(body: str = "x + 1", words: str = "Doc.") -> None:
        (folder / "evaluation.py").write_text(
            f'"""{words}"""\nTASKS = __file__, "tasks"\n\ndef f(x):\n    """{words}"""\n    return '
            f"{body}, TASKS\n"
        )
        monkeypatch.setattr(definitions, "INSTALLED", Source(folder))

    write()
    return write


def test_stale_tables_are_read_with_a_warning(tmp_path, package):
    path = tmp_path / "t.csv"
    results.load_or_compute(path, frame, parameters=SEED)
    assert set(results.read_record(path)["code"]["definitions"]) == {
        "evaluation.f",
        "evaluation.TASKS",
    }
    package(words="Other words.")
    assert results.stale(path) == [], "words change no number"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results.load_or_compute(path, never, parameters=SEED)
    package("x + 2")
    assert results.stale(path) == ["evaluation.f"]
    with pytest.warns(results.StaleResult, match=r"t.csv .* evaluation\.f$"):
        assert len(results.load_or_compute(path, never, parameters=SEED)) == 3
    (tmp_path / "pkg" / "tasks" / "a.yaml").write_text("task: b\n")
    package("x + 2")
    assert results.stale(path) == ["evaluation.TASKS", "evaluation.f"]


@pytest.mark.parametrize(
    ("stamp", "said"),
    [
        (None, "unstamped"),
        ({"version": 1}, "damaged stamp"),
        (
            {"version": 9, "root": "a.b", "digest": "0", "definitions": {}},
            "stamp of version 9, this package reads 1",
        ),
    ],
)
def test_tables_without_a_sound_stamp_are_read_and_never_fresh(tmp_path, stamp, said):
    path = tmp_path / "t.csv"
    results.load_or_compute(path, frame, parameters=SEED)
    record = json.loads((tmp_path / "run.json").read_text())
    record["t"]["code"] = stamp
    if stamp is None:
        del record["t"]["code"]
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert results.stale(path) == [said]
    with pytest.warns(results.StaleResult, match=f"t.csv .* {said}$"):
        assert len(results.load_or_compute(path, never, parameters=SEED)) == 3


def test_source_edited_during_a_run_is_not_what_ran(tmp_path, package):
    def edit_and_compute() -> pd.DataFrame:
        source = tmp_path / "pkg" / "evaluation.py"
        source.write_text(source.read_text().replace("x + 1", "x + 2"))
        return frame()

    results.load_or_compute(tmp_path / "t.csv", edit_and_compute, parameters=SEED)
    assert results.stale(tmp_path / "t.csv") == []
    package("x + 2")
    assert results.stale(tmp_path / "t.csv") == ["evaluation.f"]


def test_a_table_is_stamped_anew_where_two_points_have_equal_rows(tmp_path, package, monkeypatch):
    path = tmp_path / "s.csv"
    results.sweep(POINTS, square, path=path, parameters=SEED)
    package("x + 2")
    monkeypatch.setenv("PRUNING_UTILS_PROVE", "1")
    stale = results.read_record(path)
    again = Counted(lambda point: [{**row, "value": -1.0} for row in square(point)])
    with (
        pytest.warns(results.StaleResult),
        pytest.raises(ValueError, match=r"point \{'n': 3.*other values in value;"),
    ):
        results.sweep(POINTS, again, path=path, parameters=SEED)
    assert results.read_record(path) == stale and results.stale(path) == ["evaluation.f"]
    again = Counted()
    with pytest.warns(results.StaleResult):
        table = results.sweep(POINTS, again, path=path, parameters=SEED)
    assert (
        again.points == [3, 2]
        and len(table) == 6
        and results.stale(path) == []
        and path.read_bytes() == TABLE
    )
    assert results.read_record(path)["restamped"]["points"] == [POINTS[0], POINTS[-1]]
    assert results.read_record(path)["points"] == stale["points"]
    results.sweep(POINTS, never, path=path, parameters=SEED)


def test_commit_is_recorded_only_for_unchanged_sources(tmp_path, monkeypatch):
    folder = tmp_path / "package"
    folder.mkdir()
    monkeypatch.setattr(definitions, "PACKAGE", folder)
    (folder / "__init__.py").write_text("a = 1\n")
    git = [
        "git",
        "-C",
        str(tmp_path),
        "-c",
        "user.name=a",
        "-c",
        "user.email=a@b.c",
        "-c",
        "commit.gpgsign=false",
    ]
    assert records.package_commit() is None, "in no checkout"
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "other").write_text("x")
    subprocess.run([*git, "add", "other"], check=True)
    subprocess.run([*git, "commit", "-qm", "a"], check=True)
    assert records.package_commit() is None, "in a checkout that does not know the package"
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "b"], check=True)
    head = subprocess.run(
        [*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()
    (tmp_path / "other").write_text("changed results change no source")
    assert records.package_commit() == head
    (folder / "__init__.py").write_text("a = 2\n")
    assert records.package_commit() is None


# --- sweeps ---------------------------------------------------------------------------------------


def square(point: dict) -> list[dict]:
    """Two rows a point, hand-checkable, with a time that differs from run to run."""
    return [
        {"power": power, "value": float(point["n"] ** power) / 3, "seconds": time.time()}
        for power in (1, 2)
    ]


class Counted:
    """A computation that notes its points."""

    def __init__(self, compute=square):
        self.compute, self.points = compute, []

    def __call__(self, point: dict) -> list[dict]:
        self.points.append(point["n"])
        return self.compute(point)


POINTS = [{"n": n, "label": "x"} for n in (3, 1, 2)]
TABLE = b"""n,label,power,value
3,x,1,1
3,x,2,3
1,x,1,0.333333
1,x,2,0.333333
2,x,1,0.666667
2,x,2,1.33333
"""


@pytest.mark.parametrize("pool", [None, ThreadPoolExecutor, ProcessPoolExecutor])
def test_sweep_has_rows_in_the_order_of_its_points(tmp_path, pool):
    path = tmp_path / "s.csv"
    if pool is None:
        first = results.sweep(POINTS, square, path=path, parameters=SEED)
    else:
        with pool(2) as executor:
            first = results.sweep(POINTS, square, path=path, parameters=SEED, executor=executor)
    assert path.read_bytes() == TABLE
    pd.testing.assert_frame_equal(first, results.sweep(POINTS, never, path=path, parameters=SEED))
    assert sorted(os.listdir(tmp_path)) == ["run.json", "s.csv", "s.measured.csv"]
    entries = results.read_record(path)["points"]
    assert [(entry["point"], entry["rows"]) for entry in entries] == [
        (point, 2) for point in POINTS
    ]


def test_points_are_copies_and_a_point_may_be_one_row(tmp_path):
    def spoil(point: dict) -> dict:
        value = point.pop("n")
        return {"double": np.int64(2 * value), "label": "x"}

    results.sweep(POINTS, spoil, path=tmp_path / "s.csv", parameters=SEED)
    assert (tmp_path / "s.csv").read_text() == "n,label,double\n3,x,6\n1,x,2\n2,x,4\n"
    assert POINTS[0] == {"n": 3, "label": "x"}


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], "at least one"),
        (None, "points must be a list of dicts, got None"),
        ({"n": 1}, "points must be a list of dicts, got {'n': 1}"),
        ("n", "points must be a list of dicts, got 'n'"),
        ([{}], "point 0 .* not empty"),
        ([3], "point 0 .* got 3"),
        ([{"n": 1}, {"n": 2}, {"n": 1}], r'all different, got 3, repeated: .*"n":1'),
        ([{"n": 1}, {"m": 1}], r"same keys: point 0 has \['n'\], point 1 has \['m'\]"),
        ([{"n": {1, 2}}], "point 0.*'n'.* plain"),
        ([{"n": (1, 2)}], "point 0 must hold single values .*text"),
    ],
)
def test_unfit_points_are_refused_before_any_work(tmp_path, points, message):
    with pytest.raises(ValueError, match=message):
        results.sweep(points, never, path=tmp_path / "s.csv", parameters=SEED)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("returned", [None, [], [1], {"n": 99}, {"value": [1]}])
def test_unfit_rows_name_their_point(tmp_path, returned):
    with pytest.raises(RuntimeError, match=r"point \{'n': 1\} failed with ValueError"):
        results.sweep([{"n": 1}], lambda point: returned, path=tmp_path / "s.csv", parameters=SEED)


def fails_at_one(point: dict) -> list[dict]:
    """The point 1 fails."""
    return square(point) if point["n"] != 1 else 1 // 0


def test_failed_sweep_goes_on_where_it_was(tmp_path):
    path = tmp_path / "s.csv"
    with pytest.raises(
        RuntimeError, match=r"point \{'n': 1, 'label': 'x'\} failed with ZeroDivisionError"
    ):
        results.sweep(POINTS, fails_at_one, path=path, parameters=SEED)
    assert not path.exists()
    with pytest.raises(ValueError, match="s.points .*seed: 0 there, 7 asked"):
        results.sweep(POINTS, never, path=path, parameters={**SEED, "seed": 7})
    for damaged in ("{", "[1]", "[" * 10**5):
        (tmp_path / "s.points" / "parameters.json").write_text(damaged)
        with pytest.raises(ValueError, match="parameters.json is damaged"):
            results.sweep(POINTS, never, path=path, parameters=SEED)
    (tmp_path / "s.points" / "parameters.json").write_text(json.dumps(SEED))
    resumed = Counted()
    results.sweep(POINTS, resumed, path=path, parameters=SEED)
    assert resumed.points == [1, 2] and path.read_bytes() == TABLE


class AtOnce(Executor):
    """Threads that do not take turns, as those of another machine do not."""

    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self.threads = threads

    def submit(self, *given, **named):
        return self.threads.submit(*given, **named)


def test_failure_lets_running_points_end_and_starts_no_other(tmp_path):
    both_run, started = threading.Barrier(2), []

    def compute(point: dict) -> dict:
        started.append(point["n"])
        if point["n"] < 2:
            both_run.wait(timeout=10)
        if point["n"] == 0:
            raise OSError("no luck")
        time.sleep(0.2)
        return {"value": 1}

    path, points = tmp_path / "s.csv", [{"n": n} for n in range(6)]
    with (
        ThreadPoolExecutor(2) as threads,
        pytest.raises(RuntimeError, match=r"'n': 0\} failed with OSError: no l"),
    ):
        results.sweep(points, compute, path=path, parameters=SEED, executor=AtOnce(threads))
    assert len(started) <= 3, "the worker that failed may take up one more before it hears of it"
    again = Counted(lambda point: {"value": 1})
    results.sweep(points, again, path=path, parameters=SEED)
    assert sorted(again.points + started) == [0, *range(6)], (
        "all that had started were saved, but for the failed"
    )


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("0.666", "0.777"),
        lambda text: "[]",
        lambda text: "\x00" * 100,
        lambda text: "[" * 10**5,
    ],
)
def test_damaged_points_are_computed_again(tmp_path, damage):
    path = tmp_path / "s.csv"
    with pytest.raises(RuntimeError):
        results.sweep(
            [{"n": 3, "label": "x"}, {"n": 2, "label": "x"}, {"n": 1, "label": "x"}],
            fails_at_one,
            path=path,
            parameters=SEED,
        )
    (two,) = (
        file for file in (tmp_path / "s.points").glob("*.json") if "0.666" in file.read_text()
    )
    two.write_text(damage(two.read_text()))
    resumed = Counted()
    results.sweep(POINTS, resumed, path=path, parameters=SEED)
    assert resumed.points == [1, 2] and path.read_bytes() == TABLE


def test_points_of_other_code_are_never_mixed_in(tmp_path, package):
    path = tmp_path / "s.csv"
    with pytest.raises(RuntimeError):
        results.sweep(POINTS, fails_at_one, path=path, parameters=SEED)
    package("x + 2")
    resumed = Counted()
    with pytest.warns(results.StaleResult, match="s.points again, .*evaluation"):
        results.sweep(POINTS, resumed, path=path, parameters=SEED)
    assert resumed.points == [3, 1, 2] and results.stale(path) == []


def test_added_points_are_computed_and_the_others_kept(tmp_path):
    path = tmp_path / "s.csv"
    results.sweep(POINTS[:2], square, path=path, parameters=SEED)
    with pytest.raises(ValueError, match="seed: 0 there, 7 asked"):
        results.sweep(POINTS, never, path=path, parameters={**SEED, "seed": 7})
    added = Counted()
    results.sweep(POINTS, added, path=path, parameters=SEED)
    assert added.points == [2] and path.read_bytes() == TABLE
    results.sweep(POINTS[::-1], never, path=path, parameters=SEED)
    assert path.read_bytes().splitlines()[1] == b"2,x,1,0.666667", (
        "another order of the points is one of the rows"
    )
    with pytest.raises(
        ValueError, match='holds 1 points that are not asked for, the first .*"n":3'
    ):
        results.sweep(POINTS[1:], never, path=path, parameters=SEED)
    again = Counted()
    results.sweep(POINTS[1:], again, path=path, parameters=SEED, recompute=True)
    assert again.points == [1, 2]


def test_recompute_discards_saved_points(tmp_path):
    path = tmp_path / "s.csv"
    with pytest.raises(RuntimeError):
        results.sweep(POINTS, fails_at_one, path=path, parameters=SEED)
    again = Counted()
    results.sweep(POINTS, again, path=path, parameters={"seed": 5}, recompute=True)
    assert again.points == [3, 1, 2]


# --- kills, full disks, two processes -------------------------------------------------------------


@pytest.mark.slow
def test_kills_and_two_processes(tmp_path):
    """One process, which forks the runs that it kills; none of them imports torch."""
    command = [sys.executable, CHILDREN / "kill_results.py", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.startswith("killed")


def test_one_thread_at_a_time_changes_the_records_of_a_folder(tmp_path):
    folder = tmp_path / "new"
    order = []

    def second():
        with records.locked(folder):
            order.append("second")

    with records.locked(folder):
        waiting = threading.Thread(target=second)
        waiting.start()
        time.sleep(0.2)
        order.append("first")
    waiting.join(10)
    assert order == ["first", "second"] and os.listdir(folder) == []


def test_a_lock_that_a_killed_run_left_is_taken_and_removed(tmp_path):
    (tmp_path / records.LOCK).touch()
    results.load_or_compute(tmp_path / "t.csv", frame, parameters=SEED)
    assert sorted(os.listdir(tmp_path)) == ["run.json", "t.csv", "t.measured.csv"]


def test_points_that_are_being_computed_are_refused(tmp_path):
    path = tmp_path / "s.csv"

    def compute_again(point: dict) -> dict:
        return results.sweep(POINTS, never, path=path, parameters=SEED)

    folder = path.with_suffix(".points")
    said = f"RuntimeError: another process or thread is computing the points in {folder}"
    with pytest.raises(RuntimeError, match=re.escape(said)):
        results.sweep(POINTS, compute_again, path=path, parameters=SEED)
    results.sweep(POINTS, square, path=path, parameters=SEED)
    assert path.read_bytes() == TABLE


def test_a_second_thread_is_refused(tmp_path):
    """It asks while the first computes, and once more when that has ended in the meantime."""
    path, begun, goes_on, said = tmp_path / "s.csv", threading.Event(), threading.Event(), []

    def compute(point: dict) -> dict:
        begun.set()
        assert goes_on.wait(30)
        return {"value": point["n"]}

    def first() -> None:
        results.sweep(POINTS, compute, path=path, parameters=SEED)

    thread = threading.Thread(target=first)
    thread.start()
    assert begun.wait(30)
    for recompute in (False, True):
        with pytest.raises(RuntimeError, match="another process or thread is computing the points"):
            results.sweep(POINTS, never, path=path, parameters=SEED, recompute=recompute)
    said.append(results.saved_points.seen(path))
    goes_on.set()
    thread.join(30)
    assert list(results.sweep(POINTS, never, path=path, parameters=SEED)["value"]) == [3, 1, 2]
    with (
        pytest.raises(RuntimeError, match="another process or thread has just computed .*s.points"),
        results.saved_points.opened(path, said[0], SEED, []),
    ):
        pass
    assert sorted(os.listdir(tmp_path)) == ["run.json", "s.csv"]


def test_points_that_another_has_just_saved_are_not_taken_for_leftovers(tmp_path, monkeypatch):
    folder = tmp_path / "s.points"
    folder.mkdir()
    held = results.saved_points._held

    def begun_in_between(given: Path):
        (folder / "parameters.json").write_text(json.dumps(SEED))
        return held(given)

    monkeypatch.setattr(results.saved_points, "_held", begun_in_between)
    assert results.saved_points.unfinished(folder)
    assert (folder / "parameters.json").exists()


def test_a_table_that_is_replaced_while_it_is_read_is_never_a_mixture(tmp_path):
    path = tmp_path / "t.csv"
    results.load_or_compute(path, frame, parameters=SEED)
    before = results.read_record(path)
    other = frame().assign(layer=9, seconds=7.0)[["seconds", "layer"]]
    new = results.load_or_compute(path, lambda: other, parameters=SEED, recompute=True)
    pd.testing.assert_frame_equal(records.read_table(path, before), new)
    results.load_or_compute(path, frame, parameters={"seed": 1}, recompute=True)
    with pytest.raises(ValueError, match="other parameters .*seed: 1 there, 0 asked"):
        records.read_table(path, before)


def refuse_writes(monkeypatch, when: str, target: str) -> None:
    """Let the disk be full for one file: as its content is written out, or as it is renamed into
    place."""
    real = getattr(os, when)

    def full(*given):
        touched = os.readlink(f"/proc/self/fd/{given[0]}") if when == "fsync" else str(given[1])
        if Path(touched).name.startswith((target, f".{target}.")):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*given)

    monkeypatch.setattr(os, when, full)


@pytest.mark.parametrize(
    ("when", "target"),
    [
        ("fsync", "t.csv"),
        ("fsync", "t.measured.csv"),
        ("fsync", "run.json"),
        ("replace", "run.json"),
    ],
)
def test_full_disk_leaves_the_old_files(tmp_path, monkeypatch, when, target):
    path = tmp_path / "t.csv"
    results.load_or_compute(path, frame, parameters=SEED)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    refuse_writes(monkeypatch, when, target)
    with pytest.raises(
        OSError, match=f"could not write .*{target}.*No space left on device"
    ) as caught:
        results.load_or_compute(
            path, lambda: frame().assign(layer=9), parameters={"seed": 1}, recompute=True
        )
    assert caught.value.errno == errno.ENOSPC
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


@pytest.mark.parametrize("target", ["t.csv", "t.measured.csv"])
def test_a_table_that_cannot_be_renamed_counts_all_the_same(tmp_path, monkeypatch, target):
    """Its record is written by then, and what is next lies beside it."""
    path = tmp_path / "t.csv"
    results.load_or_compute(path, frame, parameters=SEED)
    with monkeypatch.context() as patch:
        refuse_writes(patch, "replace", target)
        with pytest.raises(OSError, match="No space left on device"):
            results.load_or_compute(
                path, lambda: frame().assign(layer=9), parameters={"seed": 1}, recompute=True
            )
    assert f".{target}.next" in os.listdir(tmp_path)
    found = results.load_or_compute(path, never, parameters={"seed": 1})
    assert list(found["layer"]) == [9, 9, 9] and list(found["seconds"]) == [0.123457, 2, 3]
    assert sorted(os.listdir(tmp_path)) == ["run.json", "t.csv", "t.measured.csv"]


def test_what_killed_runs_left_goes_with_the_next_write_and_nothing_else(tmp_path):
    path = tmp_path / "t.csv"
    results.load_or_compute(path, frame, parameters=SEED)
    results.load_or_compute(tmp_path / "u.csv", frame, parameters=SEED)
    whole = (tmp_path / "u.csv").read_bytes()
    # Another table's, which was about to be renamed.
    (tmp_path / "u.csv").rename(tmp_path / ".u.csv.next")
    left = (".t.csv.next", ".run.json.abcdefgh.json", ".t.csv.a_b_c_d_.csv", ".v.csv.next")
    others = (".verdicts.csv.abcdefgh.csv", "notes.csv", ".hidden")
    for name in (*left, *others):
        (tmp_path / name).write_text("a\n1\n")
    results.load_or_compute(path, frame, parameters=SEED, recompute=True)
    tables = ["run.json", "t.csv", "t.measured.csv", "u.csv", "u.measured.csv"]
    assert sorted(os.listdir(tmp_path)) == sorted([*tables, *others])
    assert (tmp_path / "u.csv").read_bytes() == whole


def test_full_disk_during_a_sweep_keeps_what_was_saved(tmp_path, monkeypatch):
    path = tmp_path / "s.csv"
    two = results.saved_points._file(Path(), {"n": 2, "label": "x"}).name
    with monkeypatch.context() as patch:
        refuse_writes(patch, "fsync", two)
        with pytest.raises(OSError, match=f"could not write .*{two}"):
            results.sweep(POINTS, square, path=path, parameters=SEED)
    resumed = Counted()
    results.sweep(POINTS, resumed, path=path, parameters=SEED)
    assert resumed.points == [2] and path.read_bytes() == TABLE


# --- names and summaries --------------------------------------------------------------------------


def test_table_path_is_under_the_output_root(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNING_UTILS_OUTPUT", str(tmp_path))
    found = results.table_path("cpu", "01_layer_similarity", "llama-2-7b.hf")
    assert found == tmp_path / "results" / "cpu" / "01_layer_similarity" / "llama-2-7b.hf.csv"


@pytest.mark.parametrize(
    "names",
    [
        ("../cpu", "01_a", "t"),
        ("cpu", "", "t"),
        ("cpu", "01_a", "org/model"),
        ("cpu", "01_a", "A"),
        ("cpu", "01_a", ".t"),
        ("cpu", "01_a", "t.measured"),
        ("cpu", "01_a", "t.points"),
        ("cpu", "01_a", None),
    ],
)
def test_table_path_refuses_names_that_are_not_plain(names):
    with pytest.raises(ValueError, match="must be a plain name"):
        results.table_path(*names)


def test_paths_that_are_no_table_are_refused(tmp_path):
    for name in ("t", "t.parquet", "t.measured.csv"):
        with pytest.raises(ValueError, match=f"must be a table's .csv file.*{name}"):
            results.load_or_compute(tmp_path / name, never, parameters=SEED)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("embedded", "embedded"),
        ("meta-llama/Llama-2-7b-hf", "meta-llama--llama-2-7b-hf"),
        ("Qwen2.5 (0.5B)", "qwen2.5-0.5b"),
        ("a/b/My Model/", "my-model"),
        ("./out", "out"),
        (Path("runs") / "a" / "healed_8", "healed_8"),
        ("org/Model.points", "org--model-points"),
        ("v1.measured", "v1-measured"),
        ("org/m.points-", "org--m-points"),
    ],
)
def test_slugs(name, expected):
    assert results.slug(name) == expected
    results.table_path("cpu", "01_a", results.slug(name))


def test_slug_of_a_directory_and_of_nothing(tmp_path, monkeypatch):
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert results.slug("org/model") == "model", "a directory, not the hub"
    with pytest.raises(ValueError, match="no file name"):
        results.slug("***")


def test_threads_of_one_process_take_turns(tmp_path):
    inside, most = [], []

    def compute(point):
        inside.append(point["n"])
        most.append(len(inside))
        time.sleep(0.01)
        inside.remove(point["n"])
        return {"value": 1}

    points = [{"n": n} for n in range(6)]
    with ThreadPoolExecutor(3) as executor:
        results.sweep(points, compute, path=tmp_path / "t.csv", parameters={}, executor=executor)
    assert max(most) == 1


def test_a_point_may_be_a_sweep_in_threads(tmp_path):
    def inner(point):
        with ThreadPoolExecutor(2) as executor:
            found = results.sweep(
                [{"m": m} for m in range(3)],
                lambda asked: {"value": asked["m"]},
                path=tmp_path / f"inner-{point['n']}.csv",
                parameters={},
                executor=executor,
            )
        return {"total": int(found["value"].sum())}

    with ThreadPoolExecutor(2) as executor:
        points = [{"n": 0}, {"n": 1}]
        given = {"path": tmp_path / "outer.csv", "parameters": {}, "executor": executor}
        assert results.sweep(points, inner, **given)["total"].tolist() == [3, 3]


def test_a_finished_table_is_read_without_workers(tmp_path, monkeypatch):
    points, path = [{"x": 1}, {"x": 2}], tmp_path / "t.csv"
    table = results.sweep(points, lambda point: {"y": point["x"]}, path=path, parameters={})
    monkeypatch.setenv("PRUNING_UTILS_WORKERS", "tcp://127.0.0.1:1")  # nobody answers there
    again = results.sweep(points, lambda point: {"y": 0}, path=path, parameters={})
    pd.testing.assert_frame_equal(table, again)


def test_a_point_of_another_kind_is_refused_when_it_ends_and_not_saved(tmp_path):
    points, path, asked = [{"x": x} for x in range(5)], tmp_path / "t.csv", []

    def compute(point, wrong=1):
        asked.append(point["x"])
        return {"y": "text" if point["x"] == wrong else 0.5}

    with pytest.raises(ValueError, match=r'point {"x":1} does not go with the others'):
        results.sweep(points, compute, path=path, parameters={})
    assert asked == [0, 1]
    mended = results.sweep(points, functools.partial(compute, wrong=None), path=path, parameters={})
    assert mended["y"].tolist() == [0.5] * 5 and asked == [0, 1, 1, 2, 3, 4]


def test_a_key_of_a_point_is_none_of_what_is_measured(tmp_path):
    with pytest.raises(ValueError, match="must not end in seconds .* got 'budget_seconds'"):
        results.sweep(
            [{"budget_seconds": 1}], lambda point: {"y": 1}, path=tmp_path / "t.csv", parameters={}
        )


def test_whole_numbers_keep_their_digits_beside_a_missing_one(tmp_path):
    table = pd.DataFrame({"n": [134515008, None], "x": [1234567.5, 0.1]})
    for _ in range(2):
        found = results.load_or_compute(tmp_path / "t.csv", lambda: table, parameters={})
        assert found["n"].iloc[0] == 134515008 and np.isnan(found["n"].iloc[1])
    assert found["x"].tolist() == [1.23457e6, 0.1]


def test_what_computes_may_go_to_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def compute():
        Path("other").mkdir()
        os.chdir("other")
        return pd.DataFrame({"a": [1]})

    results.load_or_compute("tables/t.csv", compute, parameters={})
    assert (tmp_path / "tables" / "t.csv").is_file() and not Path("tables").exists()


def test_files_have_the_permissions_that_the_user_gives_new_ones(tmp_path):
    Path(tmp_path, "plain").touch()
    results.load_or_compute(tmp_path / "t.csv", lambda: pd.DataFrame({"a": [1]}), parameters={})
    modes = {
        path.name: path.stat().st_mode for path in tmp_path.iterdir() if path.suffix != ".lock"
    }
    assert modes["t.csv"] == modes["run.json"] == modes["plain"]
