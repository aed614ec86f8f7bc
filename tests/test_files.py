"""The edge: one sentence for what is wrong, and files that are whole or not there."""

import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lion_mini.files import atomic_write, json_lines, need, read_json, read_lines, reading, run


def test_reading_names_the_innermost_place_once() -> None:
    with pytest.raises(ValueError, match=r"^a.json, line 3: the field 'box' is missing$"), reading("a.json"):  # noqa: SIM117
        with reading("a.json, line 3"):
            raise KeyError("box")
    with pytest.raises(ValueError, match=r"^a.json: b\?\[31m: evil \? name$"), reading("a.json"), reading("b\x1b[31m"):
        raise RuntimeError("evil\t\ud800 name\nand much more")


def test_text(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for data, words in (
        (b"\xff", "it is not UTF-8 text at byte 0"),
        (b'{"a": [1, 2', "it is not whole JSON: Expecting ',' delimiter, line 1, column 12"),
        (b"[" * 10**5, "it is nested too deeply"),
        (b"[1]", "it must be an object, found [1]"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r".") as caught:
            read_json(path)
        assert str(caught.value) == f"{path}: {words}"
    for text, lines in (("", []), ("\n\n", []), ("\ufeffa \r\n\n b\n \n", ["a", "", "b"])):
        path.write_text(text, encoding="utf-8")
        assert read_lines(path) == lines
    path.write_bytes(b'\xef\xbb\xbf1\n\n{"a": 2}\n{"a":')
    rows = json_lines(path)
    assert [next(rows), next(rows)] == [(f"{path}, line 1", 1), (f"{path}, line 3", {"a": 2})]
    with pytest.raises(ValueError, match="line 4: it is not whole JSON"):
        next(rows)
    assert need(3, float) == 3
    for value, kind in ((True, int), (True, float), (1.5, int), (None, (str, list))):
        with pytest.raises(ValueError, match="box must be"):
            need(value, kind, "box")


def test_run(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def main(error: BaseException) -> None:
        raise error

    for error, code, text in (
        (KeyboardInterrupt(), 130, ""),
        (ValueError("a.json: bad\nTraceback"), 2, "test_files.py: a.json: bad\n"),
        (FileNotFoundError(2, "No such file", "b"), 2, "test_files.py: b: No such file\n"),
        (KeyError("x"), 2, "test_files.py: KeyError('x'); LION_DEBUG=1 shows where\n"),
    ):
        assert run(main, error) == code
        assert capsys.readouterr().err == text
    monkeypatch.setenv("LION_DEBUG", "1")
    assert run(main, ValueError("bad")) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_full_disk_names_the_path(tmp_path: Path) -> None:
    path, tensors = tmp_path / "out", {"a": torch.zeros(1000)}
    path.write_text("before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for write in (
        lambda new: new.write_bytes(bytes(2000)),
        lambda new: torch.save(tensors, new),
        lambda new: save_file(tensors, new),
        lambda new: save_file(tensors, new.mkdir() or new / "a"),
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # no file may be larger
        try:
            with pytest.raises(OSError, match=str(path)) as caught, atomic_write(path) as new:
                write(new)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert caught.value.filename == str(path)
        assert [one.name for one in tmp_path.iterdir()] == ["out"]
        assert path.read_text() == "before"


def test_atomic_write(tmp_path: Path) -> None:
    (tmp_path / ".out.new" / "left").mkdir(parents=True)  # by a killed process
    with atomic_write(tmp_path / "out") as new:
        new.mkdir()
        save_file({"a": torch.ones(1)}, new / "a.safetensors")
    os.umask(mask := os.umask(0))
    assert (tmp_path / "out" / "a.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask
    with pytest.raises(OSError, match="not empty"), atomic_write(tmp_path / "out") as new:
        new.mkdir()
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "deep" / "file") as new:  # noqa: PT012
        new.symlink_to(tmp_path / "out")
        raise KeyboardInterrupt
    with pytest.raises(OSError, match="elsewhere: No such file"), atomic_write(tmp_path / "file"):
        (tmp_path / "elsewhere").read_text()
    assert sorted(one.name for one in tmp_path.rglob("*")) == ["a.safetensors", "deep", "out"]
