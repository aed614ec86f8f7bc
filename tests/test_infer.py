"""infer.py as a person calls it: answers, files, and what it says when something is wrong."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import GOLDEN, ROOT
from PIL import Image
from safetensors.torch import save_file

import infer
from lion_mini import GENERATION, Box, Generation, Lion, LionConfig
from lion_mini.files import read_folder
from lion_mini.images import lion_transform, open_image
from lion_mini.pipeline import Answer

PHOTO = GOLDEN / "photo.png"
Run = Callable[..., tuple[int, str, str, list[dict]]]


@pytest.fixture
def run(tmp_path: Path, golden_folder: Path, capsys: pytest.CaptureFixture) -> Run:
    """infer.py with the golden weights: exit code, both streams and the lines of results.jsonl."""

    def call(*args: object, weights: bool = True) -> tuple[int, str, str, list[dict]]:
        flags = ["--out", tmp_path / "out", *(["--weights", golden_folder] if weights else [])]
        flags += [] if "--dtype" in args else ["--dtype", "float32"]  # the golden answers are
        code = infer.main([str(part) for part in [*args, *flags]])
        out, error = capsys.readouterr()
        results = tmp_path / "out" / "results.jsonl"
        lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
        return code, out, error, lines

    return call


def test_caption_is_the_default(run: Run, golden_folder: Path) -> None:
    code, out, _, (line,) = run(PHOTO)
    assert code == 0
    model = Lion.from_pretrained(golden_folder)
    assert line["answer"] == line["text"] == model.caption(open_image(PHOTO))
    assert line["prompt"].endswith("A short image description:")
    assert line["box"] is None
    assert line["score"] < 0
    tags = [tag for tag, _ in line["tags"]]
    assert tags == model.tag([open_image(PHOTO)])[0]
    assert f"[{', '.join(tags)}]" in line["prompt"]
    assert f"{PHOTO}: {line['answer']}" in out


def test_ask_and_the_score(run: Run, golden_folder: Path) -> None:
    _, _, _, (line,) = run(PHOTO, "--ask", "what is this?", "--use-tags", "dog, man")
    assert line["tags"] == [["dog", 1.0], ["man", 1.0]]
    assert line["prompt"].endswith("[dog, man]. Question: what is this? Short answer:")
    model = Lion.from_pretrained(golden_folder)
    asked = ["Question: what is this? Short answer:"]
    settings = GENERATION["answer"]
    assert line["text"] == model.respond([open_image(PHOTO)], asked, ["image"], settings, [["dog", "man"]])[0].text
    _, _, _, (bare,) = run(PHOTO, "--ask", "what is this?", "--no-tags")
    assert bare["prompt"] == "Question: what is this? Short answer:"
    assert bare["tags"] == []


def test_score_is_the_mean_log_probability(golden_folder: Path) -> None:
    model = Lion.from_pretrained(golden_folder)
    image, question = open_image(PHOTO), "what is this?"
    settings = GENERATION["answer"]
    reply = model.respond([image], [question], ["image"], settings, [["dog"]])[0]
    pixels = lion_transform(image, model.config.vit.image_size)[None]
    ids = model.generate_ids(pixels, [question], [["dog"]], ["image"], settings)[0, 1:]
    batch = replace(model.batch(pixels, [question], [["dog"]], ["image"]), labels=ids[None])
    logits = model.model.logits(batch)[0]
    expected = logits.log_softmax(-1).gather(1, ids[:, None]).mean()
    assert reply.score == pytest.approx(expected.item(), rel=1e-4)


def test_locate_without_a_box_says_so(run: Run) -> None:
    code, out, _, (line,) = run(PHOTO, "--locate", "the dog")
    assert code == 0
    assert line["answer"] is None
    assert line["box"] is None
    assert "no box: the answer was" in out


def test_locate_draws_the_box(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model writes no box, so one is put into its mouth."""
    text = "Answer: [0.250,0.500,0.750,1.000]"
    monkeypatch.setattr(Lion, "respond", lambda *_: [Answer(text, "where?", [("dog", 0.9)], -0.5)])
    code, out, _, (line,) = run(PHOTO, "--locate", "the dog")
    width, height = open_image(PHOTO).size
    assert code == 0
    assert line["text"] == text
    assert line["answer"] == "[0.250,0.500,0.750,1.000]"
    assert line["box"] == [0.25, 0.5, 0.75, 1.0]
    assert line["box_pixels"] == [width / 4, height / 2, width * 3 / 4, height]
    assert "[0.250,0.500,0.750,1.000], pixels" in out
    drawn = Image.open(tmp_path / "out" / "photo-box.png")
    assert min(drawn.size) >= 200
    assert drawn.convert("RGB").tobytes() != open_image(PHOTO).resize(drawn.size).tobytes()


def test_a_box_in_the_answer_to_a_prompt_is_drawn(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "At [0.250,0.500,0.750,1.000] or so."
    monkeypatch.setattr(Lion, "respond", lambda *_: [Answer(text, "where?", [], -0.5)])
    _, out, _, (line,) = run(PHOTO, "--prompt", "where?", "--task", "region")
    assert (line["answer"], line["box"]) == (text, [0.25, 0.5, 0.75, 1.0])
    assert f"{text}, pixels [" in out
    assert (tmp_path / "out" / "photo-box.png").exists()


def test_describe_in_fractions_and_pixels(run: Run, tmp_path: Path) -> None:
    width, height = open_image(PHOTO).size
    _, _, _, (line,) = run(PHOTO, "--describe", "0.25,0.5,0.75,1.0")
    assert line["box"] == [0.25, 0.5, 0.75, 1.0]
    assert "[0.250,0.500,0.750,1.000]" in line["prompt"]
    assert (tmp_path / "out" / "photo-box.png").exists()
    _, _, _, (same,) = run(PHOTO, "--pixels", "--describe", f"{width / 4},{height / 2},{width * 3 / 4},{height}")
    assert same["text"] == line["text"]
    assert same["box"] == line["box"]


def test_tags_alone(run: Run) -> None:
    code, out, _, (line,) = run(PHOTO, "--tags")
    assert code == 0
    assert ", ".join(tag for tag, _ in line["tags"]) in out
    assert all(0 < score < 1 for _, score in line["tags"])


def test_a_prompt_goes_to_the_model_as_it_is(run: Run, golden_folder: Path) -> None:
    model, image, prompt = Lion.from_pretrained(golden_folder), open_image(PHOTO), " Say {question} <image>\nat once: "
    for task, flags, length in (("image", [], 30), ("region", ["--task", "region"], 40), ("image", [], 3)):
        more = ["--max-new-tokens", length] if length == 3 else []
        code, _, _, (line,) = run(PHOTO, "--use-tags", "dog", "--prompt", prompt, *flags, *more)
        settings = Generation(max_new_tokens=length)
        assert code == 0
        assert line["prompt"].endswith("[dog]. " + prompt)
        assert line["answer"] == model.respond([image], [prompt], [task], settings, [["dog"]])[0].text
    _, _, _, (line,) = run(PHOTO, "--ask", "what?", "--use-tags", "dog", "--official", "--max-new-tokens", 3)
    settings = replace(GENERATION["official"], max_new_tokens=3)
    asked = ["Question: what? Short answer:"]
    assert line["text"] == model.respond([image], asked, ["image"], settings, [["dog"]])[0].text


def test_official_settings(run: Run, golden_folder: Path) -> None:
    settings = GENERATION["official"]
    assert (settings.beams, settings.repetition_penalty, settings.max_new_tokens) == (5, 1.5, 256)
    _, _, _, (line,) = run(PHOTO, "--ask", "what?", "--use-tags", "dog", "--official")
    expected = Lion.from_pretrained(golden_folder).respond(
        [open_image(PHOTO)], ["Question: what? Short answer:"], ["image"], settings, [["dog"]]
    )[0]
    assert line["text"] == expected.text
    assert line["score"] == pytest.approx(expected.score, abs=1e-3)


# --- folders, and pictures that nobody planned for


def odd_pictures(folder: Path) -> dict[str, bool]:
    """Name -> can be read."""
    folder.mkdir()
    rgb = Image.open(PHOTO).convert("RGB")
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    rgb.convert("P").save(folder / "palette.png")
    rgb.convert("RGBA").save(folder / "alpha.png")
    Image.new("I;16", (40, 30), 40000).save(folder / "sixteen.png")
    Image.new("RGB", (1, 1), "red").save(folder / "one.png")
    Image.new("RGB", (20000, 12), "blue").save(folder / "wide.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb.save(folder / "rotated.jpg", exif=exif)
    rgb.save(folder / "whole.jpg")
    (folder / "truncated.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:900])
    (folder / "text.jpg").write_text("no picture")
    (folder / "notes.txt").write_text("not looked at")
    names = ("cmyk.jpg", "palette.png", "alpha.png", "sixteen.png", "one.png", "wide.png", "rotated.jpg", "whole.jpg")
    return dict.fromkeys(names, True) | {"truncated.jpg": False, "text.jpg": False}


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_a_folder_with_bad_pictures(run: Run, tmp_path: Path, batch: int) -> None:
    names = odd_pictures(tmp_path / "in")
    code, out, error, lines = run(tmp_path / "in", "--batch-size", batch, "--describe", "0.1,0.1,0.6,0.9")
    assert code == 1
    assert {Path(line["image"]).name for line in lines} == {name for name, good in names.items() if good}
    for name in ("truncated.jpg", "text.jpg"):
        assert sum(name in line for line in error.splitlines()) == 1
    assert "8 pictures, 2 failed" in out
    width, height = Image.open(PHOTO).size
    rotated = next(line for line in lines if "rotated" in line["image"])
    assert rotated["box_pixels"] == pytest.approx([0.1 * height, 0.1 * width, 0.6 * height, 0.9 * width], abs=0.06)
    assert len(list((tmp_path / "out").glob("*-box.png"))) == 8


def test_not_one_picture_is_nothing_done(run: Run, tmp_path: Path) -> None:
    code, _, error, _ = run(__file__, Path(__file__).parent / "conftest.py")
    assert code == 2
    assert "not one of the 2 pictures could be read" in error
    assert not (tmp_path / "out").exists()


def test_batches_answer_like_each_alone(run: Run, tmp_path: Path) -> None:
    odd_pictures(tmp_path / "in")
    _, _, _, alone = run(tmp_path / "in", "--batch-size", 1)
    _, _, _, together = run(tmp_path / "in", "--batch-size", 100)
    assert [line["text"] for line in alone] == [line["text"] for line in together]


def test_names_that_meet_and_names_that_are_no_text(run: Run, tmp_path: Path) -> None:
    long = "e/" + "\u00e9" * 125 + ".png"
    paths = [tmp_path / name for name in ("a/x-1.png", "b/x.png", "c/x.png", os.fsdecode(b"d/caf\xe9.png"), long)]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        open_image(PHOTO).save(path)
    code, out, _, lines = run(*paths, "--describe", "0.1,0.1,0.6,0.9")
    assert code == 0
    assert "caf?.png: " in out
    assert [line["image"] for line in lines] == [str(path) for path in paths]
    assert len(list((tmp_path / "out").glob("*-box*.png"))) == len(paths)


def test_no_file_of_others_is_overwritten(run: Run, tmp_path: Path) -> None:
    """Two runs into the folder of the pictures. Results of the first are replaced, all else stays."""
    out = tmp_path / "out"
    out.mkdir()
    open_image(PHOTO).save(out / "a.png")
    mine = {out / name: name.encode() for name in ("a-box.png", "a-box-1.png", "results-2.jsonl")}
    for path, data in mine.items():
        path.write_bytes(data)
    for number in (2, 3):
        code, _, _, (line,) = run(out / "a.png", "--describe", "0.1,0.1,0.6,0.9")
        assert (code, line["image"]) == (0, str(out / "a.png"))
        assert Image.open(out / f"a-box-{number}.png").size
    (out / "results.jsonl").rename(out / "results-1.jsonl")
    mine |= {out / "results.jsonl": b"mine"}
    (out / "results.jsonl").write_bytes(b"mine")
    assert infer.main(["--seed", "3", "--out", str(out), "--dtype", "float32"]) == 0
    assert all(path.read_bytes() == data for path, data in mine.items())
    assert len((out / "results-1.jsonl").read_text().splitlines()) == 6
    assert {"scene.png", "scene-box.png"} <= {path.name for path in out.iterdir()}


def test_odd_names_cost_only_themselves(run: Run, tmp_path: Path) -> None:
    """A pipe never answers; a terminal may have no letters but ASCII."""
    folder = tmp_path / "in"
    folder.mkdir()
    os.mkfifo(folder / "a.png")
    for name in ("\u00e9\x1b.png", "\u72d7.png"):
        open_image(PHOTO).save(folder / name)
    command: list[Any] = [sys.executable, ROOT / "infer.py", folder, "--out", tmp_path / "out", "--tags"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "a.png: it is a pipe or a device, not a regular file" in done.stderr
    assert "\\u72d7.png: " in done.stdout
    assert "\\xe9?.png: " in done.stdout
    assert "2 pictures, 1 failed" in done.stdout


def test_globs_and_several_paths(run: Run, tmp_path: Path) -> None:
    odd_pictures(tmp_path / "in")
    code, _, _, lines = run(tmp_path / "in" / "*a*.png", tmp_path / "in" / "alpha.png", PHOTO, "--tags")
    assert code == 0
    assert [Path(line["image"]).name for line in lines] == ["alpha.png", "palette.png", "photo.png"]


WRONG: dict[str, tuple[list[object], str]] = {
    "no such file": (["nowhere.jpg"], "nowhere.jpg: no such file or folder"),
    "empty question": ([PHOTO, "--ask", "  "], "--ask is empty"),
    "empty expression": ([PHOTO, "--locate", ""], "--locate is empty"),
    "placeholder": ([PHOTO, "--ask", "who <extra_id_0>?"], "<extra_id_0>"),
    "inverted box": ([PHOTO, "--describe", "0.5,0.1,0.2,0.9"], "0.5,0.1,0.2,0.9 is inverted, empty or outside"),
    "box outside": ([PHOTO, "--describe", "0.5,0.1,1.2,0.9"], "outside the image"),
    "pixels outside": ([PHOTO, "--pixels", "--describe", "5,5,9000,50"], "outside the image"),
    "no box": ([PHOTO, "--describe", "left"], "expected four numbers"),
    "code for a box": ([PHOTO, "--describe", "__import__('os'),0,1,1"], "expected four numbers"),
    "not a picture": ([Path(__file__)], "cannot identify image file"),
    "dtype": ([PHOTO, "--dtype", "float16"], "T5 overflows in float16"),
    "empty prompt": ([PHOTO, "--prompt", " "], "--prompt is empty"),
    "prompt without a picture": (["--prompt", "who?"], "--prompt needs a picture"),
    "placeholder in a prompt": ([PHOTO, "--prompt", "<extra_id_0>"], "<extra_id_0>"),
    "unknown task": ([PHOTO, "--prompt", "who?", "--task", "regoin"], "the task 'regoin' is unknown; there are region"),
    "task of a question": ([PHOTO, "--ask", "who?", "--task", "region"], "--task is for --prompt"),
    "no tokens": ([PHOTO, "--max-new-tokens", 0], "--max-new-tokens must be 1 to 10,000, not 0"),
    "too many tokens": ([PHOTO, "--max-new-tokens", 10**30], "--max-new-tokens must be 1 to 10,000"),
    "no name": (["", PHOTO], "a file or folder without a name"),
    "tokens of tags": ([PHOTO, "--tags", "--max-new-tokens", 3], "--tags asks nothing"),
    "no batch": ([PHOTO, "--batch-size", 0], "--batch-size must be at least 1"),
    "no tags": ([PHOTO, "--use-tags", " , "], "--use-tags is empty"),
    "no picture": (["--ask", "who?"], "--ask needs a picture"),
    "tags without tags": ([PHOTO, "--tags", "--no-tags"], "--tags asks nothing: leave out --use-tags, --no-tags"),
    "pixels of nothing": ([PHOTO, "--pixels"], "--pixels is for --describe"),
    "no such device": ([PHOTO, "--device", "nowhere"], "the device 'nowhere' cannot be used"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input(run: Run, name: str, tmp_path: Path) -> None:
    arguments, words = WRONG[name]
    code, out, error, lines = run(*arguments)
    assert code == 2
    assert len(error.splitlines()) == 1
    assert words in error
    assert out == ""
    assert not lines
    assert not (tmp_path / "out").exists()


def test_not_a_folder_of_weights(run: Run, tmp_path: Path) -> None:
    code, _, error, _ = run(PHOTO, "--weights", tmp_path, weights=False)
    assert code == 2
    assert len(error.splitlines()) == 1
    assert "has no config.json: it is not a folder of" in error


def test_a_model_without_tags_takes_none(run: Run, golden_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(golden_folder, tmp_path / "untagged")
    config = LionConfig.from_json((folder / "config.json").read_text())
    tensors = {name: tensor for name, tensor in read_folder(folder, "cpu", None).items() if name != "soft_prompt"}
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "all.safetensors")
    (folder / "config.json").write_text(replace(config, tags="none").to_json())
    code, _, error, _ = run(PHOTO, "--use-tags", "dog", "--weights", folder, weights=False)
    assert (code, error) == (2, f"infer.py: --use-tags: {folder} answers without tags in its prompt\n")


def test_long_question(run: Run) -> None:
    code, _, _, (line,) = run(PHOTO, "--ask", "is it a dog? " * 500, "--use-tags", "dog")
    assert code == 0
    assert len(line["prompt"]) > 6500


def test_a_box_is_never_evaluated() -> None:
    for text in ("[__import__('os').system('true'),0,0,1]", "[0.1,0.2,0.3]", "", "[1e9,0,0,1]"):
        assert Box.parse(text) is None


def test_auto_says_what_it_chose(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for fast, name in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr("lion_mini.quantize.has_bfloat16", lambda fast=fast: fast)
        code, _, error, _ = run(PHOTO, "--dtype", "auto", "--device", "cpu")
        assert code == 0
        assert f"computes in {name} on cpu" in error


# --- the tags of a training set


def test_a_training_set_stays_what_it_is(golden_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Half a surrogate pair, bytes that are no text, a record that has tags but no question: again and again."""
    open_image(PHOTO).save(tmp_path / "0.png")
    records: list[dict] = [{"image": "0.png", "question": text} for text in ("what \ud83d", "caf\udce9", "caf\u00e9")]
    records.append({"image": "0.png", "tags": ["x"]})
    data, out = tmp_path / "data.jsonl", tmp_path / "tagged.jsonl"
    data.write_bytes("\n".join(map(json.dumps, records)).encode() + b"\ncaf\xe9\n")
    argv = ["--tags", "--data", data, "--images", tmp_path, "--out", out, "--weights", golden_folder, "--batch-size", 2]
    for _ in range(2):
        assert infer.main([*map(str, argv)]) == 1
        assert "5 records, 1 of them untagged" in capsys.readouterr().out
        *tagged, last = out.read_bytes().splitlines()
        assert last == b"caf\xe9"
        found = [json.loads(line) for line in tagged]
        assert [record.get("question") for record in found] == [record.get("question") for record in records]
        assert found[3] == records[3]
        assert all(record["tags"] == found[0]["tags"] for record in found[:3])


def test_tags_for_a_training_set(
    golden_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the records' order and form, each picture looked at once, and after an interruption only what is missing."""
    for i in range(3):
        Image.open(PHOTO).rotate(90 * i).save(tmp_path / f"{i}.png")
    records: list[dict] = [{"image": f"{i % 3}.png", "question": f"what? {i}", "answer": ["a"]} for i in range(7)]
    records[2]["tags"] = "given, already"
    records[4]["image"] = "missing.png"
    records[5]["tags"] = None
    lines = [*map(json.dumps, records), "no json"]
    data, out = tmp_path / "data.jsonl", tmp_path / "sub" / "tagged.jsonl"
    data.write_text("\n".join(lines))
    argv = ["--tags", "--data", data, "--images", tmp_path, "--out", out, "--weights", golden_folder, "--batch-size", 2]
    looked: list[int] = []
    tag = Lion.tag

    def counted(self: Lion, images: list[Image.Image]) -> list:
        looked.append(len(images))
        return tag(self, images)

    monkeypatch.setattr(Lion, "tag", counted)
    assert infer.main([*map(str, argv)]) == 1
    error = capsys.readouterr().err
    assert f"{data}, record 5: " in error
    assert "missing.png" in error
    assert f"{data}, record 8: " in error
    assert sum(looked) == 3
    tagged = out.read_text()
    written = [json.loads(line) for line in tagged.splitlines()[:7]]
    model = Lion.from_pretrained(golden_folder)
    expected = [tag(model, [open_image(tmp_path / f"{i}.png")])[0] for i in range(3)]
    for i, record in enumerate(records):
        assert written[i] == (record if i in (2, 4) else record | {"tags": expected[i % 3]})
    assert tagged.splitlines()[7] == "no json"

    whole = tagged.splitlines(keepends=True)
    out.write_text("".join(whole[:3]) + whole[3][:9])
    looked.clear()
    assert infer.main([*map(str, argv)]) == 1
    assert out.read_text() == tagged
    assert sum(looked) == 2  # of records 4 to 8 only two pictures are new
    capsys.readouterr()
    assert infer.main([*map(str, argv), "--device", "nowhere"]) == 1  # nothing is left to do: no model is opened
    assert "8 records, 2 of them untagged" in capsys.readouterr().out
    for begun in (tagged[:60], tagged[:9]):  # killed in the very first line
        out.write_text(begun)
        assert infer.main([*map(str, argv)]) == 1
        assert out.read_text() == tagged
    capsys.readouterr()
    for foreign in ('[{"image": "0.png"}]', "one\ntwo", "{}\n" * 3, tagged + whole[-1]):
        out.write_text(foreign)
        assert infer.main([*map(str, argv)]) == 2
        assert "does not hold the first records of --data" in capsys.readouterr().err
        assert out.read_text() == foreign
    out.write_text(tagged)
    data.write_text(lines[1])
    for words, flags in (
        ("does not hold the first records of --data", argv),
        ("is a folder, a device or the file that --data reads", [*argv, "--out", data]),
        ("is a folder, a device or the file that --data reads", [*argv, "--out", tmp_path]),
        ("is a folder, a device or the file that --data reads", [*argv, "--out", "/dev/full"]),
        ("--data is for --tags", argv[1:]),
        ("give pictures to look at, or a file of records", [PHOTO, *argv]),
    ):
        assert infer.main([*map(str, flags)]) == 2
        assert words in capsys.readouterr().err
