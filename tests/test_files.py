"""The edge: one sentence for what is wrong, and files that are whole or not there."""

import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lion_mini.files import atomic_write, json_lines, need, read_json, read_lines, reading, run


def test_reading_names_the_innermost_place_once() -> None:
    with pytest.raises(ValueError, match=r"^a.json, line 3: the field 'box' is missing$"), reading("a.json"):
        with reading("a.json, line 3"):
            {}["box"]
    with pytest.raises(ValueError, match=r"^a.json: b.png: broken$"), reading("a.json"), reading("b.png"):
        raise RuntimeError("broken\nand much more")


def test_a_sentence_is_printable() -> None:
    with pytest.raises(ValueError, match=r"^a\?\[31m: evil \?\? name$"), reading("a\x1b[31m"):
        raise OSError("evil\t\x07\ud800 name\x00"[:-1])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\xff", "it is not UTF-8 text"),
        (b'{"a": [1, 2', "it is not whole JSON: Expecting ',' delimiter at character 12"),
        (b"[" * 10**5, "it is nested too deeply"),
        (b"[1]", "it must be an object, found [1]"),
    ],
)
def test_json(data: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(ValueError, match="^") as caught:
        read_json(tmp_path / "a.json")
    assert str(caught.value) == f"{tmp_path / 'a.json'}: {words}"


def test_lines(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for text, lines in (("", []), ("\n\n", []), ("\ufeffa \r\n\n b\n \n", ["a", "", "b"])):
        path.write_text(text, encoding="utf-8")
        assert read_lines(path) == lines
    path.write_bytes(b'\xef\xbb\xbf1\n\n{"a": 2}\n{"a":')
    rows = json_lines(path)
    assert [next(rows), next(rows)] == [(f"{path}, line 1", 1), (f"{path}, line 3", {"a": 2})]
    with pytest.raises(ValueError, match="line 4: it is not whole JSON"):
        next(rows)


def test_need() -> None:
    assert need(3, float) == 3
    for value, kind in ((True, int), (True, float), (1.5, int), (None, (str, list))):
        with pytest.raises(ValueError, match="box must be"):
            need(value, kind, "box")


def test_run(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def main(error: BaseException | None) -> None:
        if error:
            raise error

    cases = [
        (None, 0, ""),
        (KeyboardInterrupt(), 130, ""),
        (ValueError("a.json: bad\nTraceback"), 2, "test_files.py: a.json: bad\n"),
        (FileNotFoundError(2, "No such file", "b"), 2, "test_files.py: b: No such file\n"),
        (KeyError("x"), 2, "test_files.py: KeyError('x'); LION_DEBUG=1 shows where\n"),
    ]
    for error, code, text in cases:
        assert run(main, error) == code
        assert capsys.readouterr().err == text
    monkeypatch.setenv("LION_DEBUG", "1")
    assert run(main, ValueError("bad")) == 2
    assert "Traceback" in capsys.readouterr().err


# --- writing


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file may grow beyond 1,000 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_names_the_path(tmp_path: Path, full_disk: None) -> None:
    path, tensors = tmp_path / "out", {"a": torch.zeros(1000)}
    path.write_text("before")
    for write in (
        lambda new: new.write_bytes(bytes(2000)),
        lambda new: torch.save(tensors, new),
        lambda new: save_file(tensors, new),
        lambda new: new.mkdir() or save_file(tensors, new / "model.safetensors"),
    ):
        with pytest.raises(OSError, match="") as caught, atomic_write(path) as new:
            write(new)
        assert caught.value.filename == str(path)
        assert [one.name for one in tmp_path.iterdir()] == ["out"]
        assert path.read_text() == "before"


def test_atomic_write(tmp_path: Path) -> None:
    (tmp_path / ".out.new").mkdir()  # a killed process left it
    (tmp_path / ".out.new" / "part").touch()
    with atomic_write(tmp_path / "out") as new:
        new.mkdir()
        save_file({"a": torch.ones(1)}, new / "a.safetensors")
        (new / "index.json").write_text(json.dumps({}))
    os.umask(mask := os.umask(0))
    assert {one.name: one.stat().st_mode & 0o777 for one in (tmp_path / "out").iterdir()} == {
        "a.safetensors": 0o666 & ~mask,
        "index.json": 0o666 & ~mask,
    }
    with pytest.raises(OSError, match="out"), atomic_write(tmp_path / "out") as new:
        new.mkdir()  # a folder that is not empty is not replaced
    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error), atomic_write(tmp_path / "deep" / "file") as new:
            new.write_text("half")
            raise error
    with pytest.raises(FileNotFoundError, match="elsewhere"), atomic_write(tmp_path / "file"):
        open(tmp_path / "elsewhere")
    assert sorted(one.name for one in tmp_path.rglob("*")) == ["a.safetensors", "deep", "index.json", "out"]
