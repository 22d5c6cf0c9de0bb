"""The record: what is no whole record of this very machine is a miss with a reason."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from qualified import HERE, PROBLEM, a_record, measured
from qualified import own_cache as own_cache

from lora_kernels.qualify import __main__ as command
from lora_kernels.qualify import choose, record
from lora_kernels.qualify.record import Record, Unreadable, Verdict


def test_a_record_survives_the_file() -> None:
    kept = a_record(measured(), measured(m=1, x_graph=0.8))
    path = record.save(kept)
    assert record.find(HERE) == kept
    assert path.parent == record.folder()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: "null",
        lambda text: "\0\1\2",
        lambda text: text.replace('"schema": 1', '"schema": 2'),
        lambda text: text.replace('"name": "x"', '"name": "y"'),
        lambda text: text.replace('"m": 1024', '"m": "1024"'),
        lambda text: text.replace('"checks": 7', '"checks": 7, "more": 1'),
        lambda text: text.replace('"checks": 7', '"checks": "7"'),
        lambda text: text.replace('"dropout": false', '"dropout": 0'),
        lambda text: text.replace('"created"', '"born"'),
        lambda text: "[" * 100_000,
        lambda text: text.replace('"time_us": 90', '"time_us": NaN'),
        lambda text: text.replace('"composition_us": 100', '"composition_us": 0'),
        lambda text: text.replace('"frozen_us": 80', '"frozen_us": 0.0'),
        lambda text: text.replace('"n": 4096', '"n": 1' + 400 * "0"),
        lambda text: text.replace('"x_graph": null', '"x_graph": "fast"'),
    ],
)
def test_a_spoilt_file_is_a_miss_with_a_reason(spoil: Any) -> None:
    path = record.save(a_record(measured()))
    path.write_text(spoil(path.read_text()))
    found = record.find(HERE)
    assert isinstance(found, str)
    assert str(path) in found
    assert "\n" not in found
    with pytest.raises(Unreadable):
        record.from_json(path.read_text())


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path to every value of a JSON document, the inner nodes too."""
    yield path
    if not isinstance(value, (dict, list)):
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield from leaves(inner, (*path, key))


def with_value(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copy = dict(document) if isinstance(document, dict) else list(document)
    copy[path[0]] = with_value(document[path[0]], path[1:], value)
    return copy


def test_no_value_of_a_record_makes_its_readers_raise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is a miss with a reason, or can be read, obeyed, told and written again."""
    kept = a_record(measured(x_graph=0.9), measured(backward=True))
    verdict = dataclasses.replace(kept.backends["mine"], timed=("speed",), unreached=("speed x",))
    body = json.loads(Record(HERE, {"mine": verdict}, "2026").to_json())
    wrong = (None, True, 0, -1, 1.5, float("nan"), float("inf"), "", "a\nb", [], [1], {}, {"a": []})
    monkeypatch.setattr(record, "SHIPPED", tmp_path)
    unreadable = 0
    for path in leaves(body):
        for value in wrong:
            text = json.dumps(with_value(body, path, value))
            (tmp_path / "shipped.json").write_text(text)
            record.find({**HERE, "torch": "another"})
            try:
                found = record.from_json(text)
            except Unreadable:
                unreadable += 1
                continue
            for backward in (False, True):
                choose.judge(found, "mine", PROBLEM, backward)
            list(command.table(found))
            assert record.from_json(found.to_json()) == found
    assert unreadable > 300


def test_a_file_that_is_no_file_or_huge_is_a_miss_with_a_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = record.save(a_record(measured()))
    monkeypatch.setattr(record, "_MOST_BYTES", 100)
    assert f"{path} cannot be used: it has" in str(record.find(HERE))
    path.unlink()
    os.mkfifo(path)  # whoever opens it waits for a writer
    assert f"{path} cannot be used: it is no regular file" in str(record.find(HERE))
    path.unlink()
    path.symlink_to(path.parent / "nowhere")
    assert "it has not been tried" in str(record.find(HERE))
    path.unlink()
    path.symlink_to(path)
    assert f"{path} cannot be used: " in str(record.find(HERE))


def test_writers_that_are_killed_leave_a_whole_record() -> None:
    script = (
        "from qualified import a_record, measured\n"
        "from lora_kernels.qualify import record\n"
        "while True:\n"
        "    print(record.save(a_record(*[measured()] * 200)), flush=True)"
    )
    command_line = [sys.executable, "-c", script]
    options = {"cwd": Path(__file__).parent, "stdout": subprocess.PIPE}
    writers = [subprocess.Popen(command_line, **options) for _ in range(2)]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline()  # it writes by now
    for writer in writers:
        writer.kill()
        writer.communicate()
        assert isinstance(record.find(HERE), Record)


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"LORA_KERNELS_CACHE": "~/kept"}, "HOME/kept"),
        ({"LORA_KERNELS_CACHE": "", "XDG_CACHE_HOME": "/x"}, "/x/lora_kernels"),
        ({"XDG_CACHE_HOME": ""}, "HOME/.cache/lora_kernels"),
        ({"XDG_CACHE_HOME": "relative"}, "HOME/.cache/lora_kernels"),
        ({"XDG_CACHE_HOME": "~/x"}, "HOME/.cache/lora_kernels"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other folders")
def test_where_records_are(
    variables: dict[str, str], folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("LORA_KERNELS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert record.folder() == Path(folder.replace("HOME", str(tmp_path)))


def test_a_pinned_record_may_be_at_home_and_an_empty_name_pins_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LORA_KERNELS_RECORD", "~/pinned.json")
    pinned = a_record(measured())
    record.save(pinned, tmp_path / "pinned.json")
    assert record.find(HERE) == pinned
    monkeypatch.setenv("LORA_KERNELS_RECORD", "")
    assert record.pinned() is None  # for `ranks` too
    assert isinstance(record.find(HERE), str)


def test_what_cannot_be_read_at_all_is_a_miss_with_a_reason() -> None:
    path = record.save(a_record(measured()))
    path.write_bytes(b"\xff\xfe\xff")
    assert f"{path} cannot be used: " in str(record.find(HERE))
    path.unlink()
    path.mkdir()
    assert f"{path} cannot be used: " in str(record.find(HERE))


@pytest.mark.parametrize("fails", ["mkstemp", "fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_record_and_nothing_else(
    fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: object, **options: object) -> None:
        raise PermissionError("the folder is read-only")

    old = a_record(measured())
    path = record.save(old)
    monkeypatch.setattr(tempfile if fails == "mkstemp" else os, fails, refused)
    with pytest.raises(PermissionError):
        record.save(a_record(measured(m=2)))
    assert record.find(HERE) == old
    assert list(path.parent.iterdir()) == [path]


def test_a_record_of_another_environment_is_not_found() -> None:
    record.save(a_record(measured()))
    for key in HERE:
        assert isinstance(record.find({**HERE, key: "another"}), str), key


def test_a_record_under_another_environment_s_name_is_a_miss() -> None:
    path = record.save(a_record(measured()))
    record.save(a_record(measured(), name="another"), path)
    assert "of another environment" in str(record.find(HERE))


def test_two_writers_at_once_leave_a_whole_record() -> None:
    records = [a_record(*[measured(m=m + 1)] * 50) for m in range(8)]
    threads = [threading.Thread(target=record.save, args=(r,)) for r in records for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert record.find(HERE) in records
    assert [path.suffix for path in record.folder().iterdir()] == [".json"]


def test_no_home_is_a_miss_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("LORA_KERNELS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert "there is no cache folder" in str(record.find(HERE))
    with pytest.raises(RuntimeError):
        record.save(a_record())


def test_a_shipped_record_serves_the_same_kernels_on_the_same_kind_of_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "SHIPPED", tmp_path)
    shipped = a_record(measured(), name="another of the kind", torch="3", triton="3.9.7")
    record.save(dataclasses.replace(shipped), tmp_path / "h100.json")
    assert record.find(HERE) == shipped
    for key, value in {"kernels": "other", "arch": 80, "triton": "3.6.0"}.items():
        assert isinstance(record.find({**HERE, key: value}), str)
    compiled = Record(shipped.environment, {"cuda": Verdict(record.RIGHT)}, "")
    record.save(compiled, tmp_path / "h100.json")
    assert record.find({**HERE, "extension": "another build"}) == Record(
        shipped.environment, {}, ""
    )
    own = a_record(measured(m=2))
    record.save(own)
    assert record.find(HERE) == own


def test_a_pinned_record_serves_or_says_why_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pinned.json"
    monkeypatch.setenv("LORA_KERNELS_RECORD", str(path))
    with pytest.raises(RuntimeError, match=r"LORA_KERNELS_RECORD=.* is no file"):
        record.find(HERE)
    pinned = a_record(measured(), torch="another torch")
    record.save(pinned, path)
    assert record.find(HERE) == pinned
    with pytest.raises(RuntimeError, match="is for arch 90, this is 80"):
        record.find({**HERE, "arch": 80})


def test_the_kernels_digest_follows_the_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = record.environment("cpu")
    json.dumps(before)
    shutil.copytree(record.PACKAGE, tmp_path / "package")
    monkeypatch.setattr(record, "PACKAGE", tmp_path / "package")
    record._digest_of_files.cache_clear()
    assert record.environment("cpu") == before
    for name in ("config.py", "operands.py", "triton/forward_kernel.py"):
        with (tmp_path / "package/ops/lora_linear" / name).open("a") as source:
            source.write("# changed\n")
        record._digest_of_files.cache_clear()
        after = record.environment("cpu")
        assert after["kernels"] != before["kernels"], name
        before = after
    record._digest_of_files.cache_clear()
