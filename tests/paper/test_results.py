"""Lines of results: whole, once, whoever writes them and whenever a writer is killed."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest

from examples.paper.results import append, finished, read
from hvpspec.errors import InputError


@dataclass(frozen=True)
class Run:
    net: str
    lr: float
    batch: int | None = None
    label: str = field(default="", compare=False)


def test_appends_and_reads(tmp_path):
    path = tmp_path / "x.jsonl"
    assert read(path) == []
    first, second = {"a": 0.1 + 0.2, "text": "λ\u2028"}, {"a": None, "b": {"c": [1]}}
    append(path, first)
    append(path, second)
    assert read(path) == [first, second]
    assert path.read_bytes().count(b"\n") == 2


@pytest.mark.parametrize("tail", [b'{"a": 3, "b', b'{"a": 3}', b"\x00\x00", b""])
def test_an_unfinished_line_is_left_out_and_written_over(tmp_path, tail):
    path = tmp_path / "x.jsonl"
    append(path, {"a": 1})
    append(path, {"a": 2})
    with path.open("ab") as stream:
        stream.write(tail)
    assert read(path) == [{"a": 1}, {"a": 2}]
    append(path, {"a": 3})
    assert read(path) == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert path.read_bytes() == b'{"a": 1}\n{"a": 2}\n{"a": 3}\n'


def test_a_file_that_holds_nothing_but_an_unfinished_line(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a"')
    assert read(path) == []
    append(path, {"a": 1})
    assert path.read_bytes() == b'{"a": 1}\n'


def test_many_writers_at_once(tmp_path):
    # Each append opens the file anew, so that its lock holds against threads as against processes.
    path = tmp_path / "x.jsonl"
    filling = "x" * 20_000
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: append(path, {"i": i, "filling": filling}), range(80)))
    found = read(path)
    assert sorted(record["i"] for record in found) == list(range(80))
    assert {record["filling"] for record in found} == {filling}


def test_a_number_that_is_none_is_refused_and_nothing_written(tmp_path):
    path = tmp_path / "x.jsonl"
    append(path, {"a": 1})
    with pytest.raises(ValueError, match="Out of range"):
        append(path, {"a": float("nan")})
    assert read(path) == [{"a": 1}]


def test_runs_are_known_again_by_their_settings(tmp_path):
    path = tmp_path / "x.jsonl"
    lr = 0.1 + 0.2
    append(path, {"net": "cnn", "lr": lr, "batch": None, "label": "one", "index": 3})
    append(path, {"net": "cnn", "lr": lr, "batch": None, "label": "two", "index": 4})
    append(path, {"net": "cnn", "lr": lr, "batch": 64, "label": "one", "index": 5})
    done = finished(path, read(path), Run)
    assert [record["index"] for record in done.values()] == [3, 5]
    assert Run("cnn", lr, None, "any other name") in done
    assert Run("cnn", 0.3) not in done


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b'{"a": 1\n{"a": 2}\n', "line 1 of .* is no JSON"),
        (b"[" * 100_000 + b"\n", "line 1 of .* is no JSON"),
        (b'{"net": "cnn", "lr": 1, "batch": 1, "label": ""}\n[1]\n', "line 2 of .* no JSON object"),
        (b'{"net": "cnn"}\n', "line 1 of .* it has no 'lr'"),
    ],
)
def test_what_is_no_line_of_results(tmp_path, content, cause):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=cause):
        finished(path, read(path), Run)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"cannot use .*No such file"):
        append(tmp_path / "missing" / "x.jsonl", {})
