"""eval.py as a person calls it: from official files to the paper's metrics, killed and resumed, and what it refuses."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN, ROOT
from PIL import Image
from safetensors.torch import load_file, save_file
from test_readers import mmbench_file, okvqa_files, refer_files, visdial_file, write
from torch import Tensor

import eval as script
from lion_mini import Lion, toy
from lion_mini.data.records import split_tags
from lion_mini.evaluation import benchmarks, metrics, readers
from lion_mini.evaluation.benchmarks import BENCHMARKS, read
from lion_mini.pipeline import Answer, read_config
from lion_mini.text.prompts import RELEASE, TEMPLATES, render
from lion_mini.toy import scores

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, golden_folder: Path, capsys: pytest.CaptureFixture) -> Run:
    def call(*args: object, weights: bool = True) -> tuple[int, str, str]:
        flags = ["--weights", golden_folder] if weights else []
        flags += ["--images", tmp_path / "images", "--out", tmp_path / "results"]
        code = script.main([str(part) for part in (*args, *flags)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def draw(folder: Path, *names: str) -> None:
    photo = Image.open(GOLDEN / "photo.png").convert("RGB")
    for i, name in enumerate(names):
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        photo.rotate(30 * i).resize((64, 48)).save(path)


def pope_file(folder: Path, count: int = 7) -> Path:
    rows = [
        {
            "question_id": i,
            "image": f"{i}.png",
            "text": f"Is there a {word} in the image?",
            "label": ("yes", "no")[i % 2],
        }
        for i, word in zip(
            range(count), ("dog", "big red bus", "cat", "man", "table", "dog on it", "cup"), strict=False
        )
    ]
    draw(folder, *(f"{i}.png" for i in range(count)))
    return write(folder, "coco_pope_random.json", rows, lines=True)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- every benchmark


def test_captions(run: Run, tmp_path: Path) -> None:
    rows = [{"image": f"{i}.png", "caption": ["a dog", f"a dog and {i} men"]} for i in range(3)]
    draw(tmp_path, "0.png", "1.png", "2.png")
    code, out, _ = run("coco", "--ann", write(tmp_path, "c.json", rows))
    assert code == 0
    made, *told = lines(tmp_path / "results" / "coco.jsonl")
    assert made["decoding"] == "greedy"
    assert [line["prompt"] for line in told] == ["A short image description:"] * 3
    expected = 100 * metrics.cider([row["caption"] for row in rows], [line["text"] for line in told])[0]
    assert f"CIDEr {expected:26.2f}   paper: LION-4B 138.20, LION-12B 139.25" in out
    assert "differs: 3 examples in the file, 5,000 in the paper's benchmark" in out


def test_short_answers_and_both_variants(run: Run, tmp_path: Path) -> None:
    paths = okvqa_files(tmp_path)
    draw(tmp_path, "COCO_val2014_000000297147.jpg")
    assert run("okvqa", "--ann", *paths)[0] == 0
    (_, told) = lines(tmp_path / "results" / "okvqa.jsonl")
    assert told["prompt"] == "Question: What sport? Short answer:"
    answers = write(tmp_path, "mine.jsonl", [{"id": "2971475", "text": "Ride."}], lines=True)
    code, out, _ = run("okvqa", "--ann", *paths, "--score", answers, weights=False)
    assert code == 0  # all ten agree, so the official variant compares as it is
    assert "VQA accuracy              100.00   paper: LION-4B 51.08, LION-12B 57.33" in out
    assert "VQA accuracy (official)     0.00" in out
    assert "differs: predictions are never lemmatised" in out


def test_boxes_and_their_contact_sheet(run: Run, tmp_path: Path) -> None:
    paths = refer_files(tmp_path)
    draw(tmp_path, "train2014/COCO_train2014_000000581857.jpg")
    code, out, _ = run("refcoco_val", "--ann", *paths)
    assert code == 0
    assert "paper: LION-4B 89.73, LION-12B 89.80, zero-shot LION-4B 57.89, zero-shot LION-12B 58.54" in out
    assert "no box                    100.00" in out  # these weights are random
    assert "differs: the instruction: In the image <image>, can" in out
    assert Image.open(tmp_path / "results" / "refcoco_val.png").size == (680, 420)
    _, told, _ = lines(tmp_path / "results" / "refcoco_val.jsonl")
    assert told["prompt"] == "In the image <image>, can you locate lady ' s head and let me know its coordinates?"
    box = "Answer: [0.445, 0.055,0.664,0.343]"
    mine = [{"id": "3", "text": box}, {"id": "4", "text": "there"}]
    _, out, _ = run(
        "refcoco_val", "--ann", *paths, "--score", write(tmp_path, "m.jsonl", mine, lines=True), weights=False
    )
    assert "Acc@0.5                    50.00" in out
    assert "no box                     50.00" in out
    assert "the file does not say how its predictions were made" in out


def test_instructions_for_boxes(run: Run, tmp_path: Path, golden_folder: Path) -> None:
    paths = refer_files(tmp_path)
    draw(tmp_path, "train2014/COCO_train2014_000000581857.jpg")
    assert run("refcoco_val", "--ann", *paths, "--template", "Find {expression}!")[0] == 0
    told = lines(tmp_path / "results" / "refcoco_val.jsonl")
    assert [line["prompt"] for line in told[1:]] == ["Find lady ' s head!", "Find her!"]
    code, _, error = run("refcoco_val", "--ann", *paths)
    assert code == 2
    assert "made with template 'Find {expression}!', not 'In the image <image>" in error
    code, _, error = run("refcoco_val", "--ann", *paths, "--template", "Find it!")
    assert (code, error.count("\n")) == (2, 1)
    assert error.startswith("eval.py: the expression of 3 is empty or lost in 'Find it!': give it a line of its own")
    (tmp_path / "results" / "refcoco_val.jsonl").unlink()
    shikra = write(tmp_path, "t.json", {"rec": ["<image> A <expr>?", "B <expr>?"]})
    assert run("refcoco_val", "--ann", *paths, "--templates", shikra)[0] == 0
    told = lines(tmp_path / "results" / "refcoco_val.jsonl")
    assert {line["prompt"].removesuffix("?") for line in told[1:]} <= {
        f"{start}{what}" for start in ("<image> A ", "B ") for what in ("lady ' s head", "her")
    }
    # Only the release's weights are asked its notebook's instruction, unless the paper's are asked for.
    own, config = shutil.copytree(golden_folder, tmp_path / "own"), read_config(golden_folder)
    assert config.instructions == RELEASE
    (own / "config.json").write_text(replace(config, instructions={}).to_json())
    for out, folder, flags in ("a", own, []), ("b", golden_folder, ["--templates", "paper"]):
        given = ["--weights", folder, "--images", tmp_path / "images", "--out", tmp_path / out, *flags]
        assert script.main(list(map(str, ["refcoco_val", "--ann", *paths, *given]))) == 0
        made, *told = lines(tmp_path / out / "refcoco_val.jsonl")
        assert made["templates"] == list(TEMPLATES["rec"])
        for line, expression in zip(told, ("lady ' s head", "her"), strict=True):
            assert line["prompt"] in [render(text, expression=expression) for text in TEMPLATES["rec"]]


def test_visdial_ranks_a_hundred(run: Run, tmp_path: Path) -> None:
    path = visdial_file(tmp_path, dialogs=1)
    draw(tmp_path, "VisualDialog_val2018_000000185565.jpg")
    code, out, _ = run("visdial", "--ann", path, "--limit", 3, "--batch-size", 2)
    assert code == 0
    told = lines(tmp_path / "results" / "visdial.jsonl")[1:]
    assert len(told[0]["scores"]) == 100
    assert told[0]["prompt"] == "Question: is it 0 Short answer:"
    assert told[1]["prompt"] == "Dialog history: q: is it 0 a: yes 1\nQuestion: is it 1 Short answer:"
    examples = read("visdial", [path])
    ranks = [metrics.rank(line["scores"], e.target or 0) for line, e in zip(told, examples, strict=False)]
    assert f"MRR {100 * metrics.ranking(ranks).mrr:28.2f}   paper: LION-4B 50.02, LION-12B 50.42" in out


def test_mmbench(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("mmbench", "--ann", mmbench_file(tmp_path))
    assert code == 0
    assert "Overall" in out
    assert "paper: LION-12B 78.90" in out
    assert "sorted options (B.2) make all rotations of a question alike" in out
    first, second = lines(tmp_path / "results" / "mmbench.jsonl")[1:]
    assert "\nOptions:\nA. blue\nB. red\n" in first["prompt"]
    assert second["prompt"].startswith("Hint: a hint\nQuestion: Which?\nOptions:\nA. blue\nB. red\n")
    scores = [{"id": "241", "scores": [-1, -2]}, {"id": "1000241", "scores": [-2, -1]}]
    mine = write(tmp_path, "m.jsonl", scores, lines=True)
    _, out, _ = run("mmbench", "--ann", mmbench_file(tmp_path), "--score", mine, weights=False)
    assert "Overall                     0.00" in out  # the rotation is wrong, so the question is
    _, out, _ = run("mmbench", "--ann", mmbench_file(tmp_path, answer=""), "--score", mine, weights=False)
    assert "mmbench-submission.tsv is for MMBench's server" in out
    told = (tmp_path / "results" / "mmbench-submission.tsv").read_text()
    assert told.endswith('241\t"Which ""one""?\nLook"\tB\n1000241\tWhich?\tB\n')  # blue and red, by the file's letters


def test_vsr_iconqa_gqa_aokvqa_from_predictions(tmp_path: Path) -> None:
    def made(*pairs: tuple[int, list[float]]) -> dict[str, float]:
        examples = [
            readers.Example(str(i), "x", candidates=readers.VSR_CANDIDATES, target=t) for i, (t, _) in enumerate(pairs)
        ]
        return benchmarks.score("vsr", examples, [{"scores": scores} for _, scores in pairs])

    found = made((0, [-2, -1, -3, -4]), (2, [-1, -9, -2, -8]), (2, [-9, -9, -8, -9]))
    assert found == {"top-1": pytest.approx(200 / 3), "true or false": pytest.approx(200 / 3)}
    one = [readers.Example("1", "x", references=("yellow",))]
    assert benchmarks.score("gqa", one, [{"text": "The yellow."}]) == {"accuracy": 100, "accuracy (exact)": 0}
    two = [
        readers.Example("1", "x", references=("bag",) * 10),
        readers.Example("2", "x", references=("x",), group="difficult"),
    ]
    found = benchmarks.score("aokvqa", two, [{"text": "Bag "}, {"text": "y"}])
    assert found == {"direct answer": 50, "without difficult": 100}
    icons = [readers.Example("1", "x", candidates=("3", "2"), target=1)]
    assert benchmarks.score("iconqa", icons, [{"scores": [-1.0, -0.5]}]) == {"top-1": 100}


def test_a_new_benchmark_is_one_entry_and_one_reader(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reader(paths: Sequence[Path]) -> Iterator[readers.Example]:
        for where, row in readers.rows(*readers.read_files(paths)):
            yield readers.Example(row["id"], "0.png", {"question": where[-1]}, tuple(row["answers"]))

    entry = benchmarks.Benchmark("my_vqa", reader, "vqa", benchmarks.vqa_scores, 3)
    monkeypatch.setitem(BENCHMARKS, entry.name, entry)
    draw(tmp_path, "0.png")
    path = write(tmp_path, "my.json", [{"id": str(count), "answers": ["yes"] * count} for count in (1, 9, 10)])
    assert run("my_vqa", "--ann", path)[0] == 0
    prompts = [line["prompt"] for line in lines(tmp_path / "results" / "my_vqa.jsonl")[1:]]
    assert prompts == [f"Question: {number} Short answer:" for number in (1, 2, 3)]
    mine = write(tmp_path, "m.jsonl", [{"id": id, "text": "yes"} for id in ("1", "9", "10")], lines=True)
    _, out, _ = run("my_vqa", "--ann", path, "--score", mine, weights=False)
    assert f"VQA accuracy {200 / 3:19.2f}\n" in out
    assert "differs: 2 questions have fewer than ten annotators and count too low (one alone: 0; " in out
    assert f"| my_vqa | VQA accuracy | {200 / 3:.2f} |  |  | 3 |" in run("table", tmp_path / "results")[1]
    assert "the task 'my_gqa' is unknown" in run("my_gqa", "--ann", path)[2]


# --- the paper's numbers


def test_the_papers_rows_are_whole() -> None:
    rec = []
    for model in ("LION-4B", "LION-12B", "zero-shot LION-4B", "zero-shot LION-12B"):
        found = benchmarks.paper_averages(model)
        assert model.startswith("zero") or set(found) == {"REC Avg", "Held-in", "Held-out"}
        rec.append(found["REC Avg"])
    assert rec == pytest.approx([85.98, 86.36, 54.98, 55.58], abs=0.00501)
    fixture = json.loads((ROOT / "tests" / "fixtures" / "misc_fixture.json").read_text())["pope_lion_table5"]["rows"]
    for row in fixture:
        paper = BENCHMARKS[f"pope_{row['split']}"].paper
        for name in ("accuracy", "precision", "recall", "f1"):
            assert paper[name.replace("f1", "F1")] == {"LION": row[name]}


def test_table(run: Run, tmp_path: Path) -> None:
    results = tmp_path / "results"
    for task in metrics.AVERAGES["REC Avg"]:
        write(
            results, f"{task}.json", {"task": task, "count": 2, "scores": {"Acc@0.5": 50, "no box": 1}, "differs": []}
        )
    write(results, "pope_random.json", {"task": "pope_random", "count": 2, "scores": {"F1": 90}, "differs": ["x"]})
    code, out, _ = run("table", results)
    assert code == 0
    assert "| refcoco_val | Acc@0.5 | 50.00 | 89.73 | 89.80 | 2 |  |" in out
    assert "| pope_random | F1 | 90.00 | 88.33, size not said |  | 2 | x |" in out
    assert "| REC Avg | mean | 50.00 | 85.98 | 86.36 | | |" in out
    assert "no box" not in out
    code, _, error = run("table", tmp_path)
    assert code == 2
    assert "holds no result" in error
    write(results, "gqa.json", {"task": "gqa", "count": "2", "scores": [1]})
    assert "gqa.json: it has another form than expected: " in run("table", results)[2]


# --- ranking


def test_a_ranking_depends_on_no_batch_and_no_segment(golden_model: Lion, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = []
    encode = golden_model.model.t5.encode

    def counted(states: Tensor, *more: Any) -> Any:
        encoded.append(len(states))
        return encode(states, *more)

    monkeypatch.setattr(golden_model.model.t5, "encode", counted)
    size = golden_model.config.vit.image_size
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    questions, tags, tasks = ["what is it?", "is there a big red dog?"], ["dog", "man, bus"], ["image", "image"]
    candidates = [["dog " * (1 + i % 3) + str(i) for i in range(100)], ["yes", "no"]]
    whole = golden_model.rank(pixels[:1], questions[:1], tags[:1], tasks[:1], candidates[:1])[0]
    assert encoded == [1]  # a hundred candidates, one pass
    for segment in (1, 7, 100):
        both = golden_model.rank(pixels, questions, tags, tasks, candidates, segment)
        assert both[0] == pytest.approx(whole, rel=1e-5)
        assert len(both[1]) == 2
    assert encoded == [1, 2, 2, 2]


# --- killed and resumed


class Killed(BaseException):
    pass


@pytest.mark.parametrize("task", ["pope_random", "vsr"])
def test_killed_after_any_prediction(run: Run, tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written or torn anywhere, the file becomes what it would have been, and no whole batch is asked twice."""
    path = pope_file(tmp_path)
    if task == "vsr":
        rows = [{"image": f"{i}.png", "caption": "it is " + "so " * i, "label": i % 2} for i in range(7)]
        path = write(tmp_path, "vsr.jsonl", rows, lines=True)
    command = (task, "--ann", path, "--batch-size", 2)
    _, whole, _ = run(*command)
    file = tmp_path / "results" / f"{task}.jsonl"
    full = file.read_bytes()
    ends = [i + 1 for i, byte in enumerate(full) if byte == 10]
    asked: list[int] = []
    answers = script.answers

    def counted(model: Lion, args: Any, batch: Any, *more: Any) -> Any:
        asked.append(len(batch))
        return answers(model, args, batch, *more)

    monkeypatch.setattr(script, "answers", counted)
    for i, end in enumerate(ends):
        for cut in {end, min(end + 9, len(full))}:
            file.write_bytes(full[:cut])
            asked.clear()
            assert run(*command)[1] == whole
            assert file.read_bytes() == full
            assert sum(asked) == 7 - i // 2 * 2 if i < 7 else not asked


def test_killed_while_asking(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("pope_random", "--ann", pope_file(tmp_path), "--batch-size", 2)
    run(*command)
    file = tmp_path / "results" / "pope_random.jsonl"
    full = file.read_text()
    file.unlink()
    answers = script.answers
    left = [2]

    def killed(*args: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return answers(*args)

    with monkeypatch.context() as patch:
        patch.setattr(script, "answers", killed)
        with pytest.raises(Killed):
            run(*command)
    assert file.read_text() == "".join(full.splitlines(keepends=True)[:5])
    assert run(*command)[0] == 0
    assert file.read_text() == full


@pytest.mark.parametrize("more", [[], ["--parts"]])
def test_two_processes_write_the_same_files(run: Run, tmp_path: Path, golden_folder: Path, more: list[str]) -> None:
    """Under torchrun, whose store outlives a process group."""
    path = pope_file(tmp_path, 5)  # three batches: in the last round rank 1 has none
    flags = ["pope_random", "--ann", path, "--batch-size", 2, *more]
    _, alone, _ = run(*flags)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, ROOT / "eval.py"]
    command += [*flags, "--weights", golden_folder, "--images", tmp_path / "images", "--out", tmp_path / "two"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*map(str, command)], env=env, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == alone
    one, two = ({path.name: path.read_text() for path in (tmp_path / name).iterdir()} for name in ("results", "two"))
    assert one == two


def test_predictions_belong_to_the_weights_that_made_them(run: Run, tmp_path: Path, golden_folder: Path) -> None:
    """Not to their folder's name."""
    folder, path = tmp_path / "mine", pope_file(tmp_path)
    shutil.copytree(golden_folder, folder)
    (tensors,) = folder.glob("*.safetensors")
    loaded = {name: tensor.clone() for name, tensor in load_file(tensors).items()}
    save_file(loaded, tensors)
    command = ("pope_random", "--ann", path, "--weights", folder)
    assert run(*command, weights=False)[0] == 0
    file = tmp_path / "results" / "pope_random.jsonl"
    whole = lines(file)
    kept, time = tensors.read_bytes(), tensors.stat().st_mtime_ns
    save_file(loaded | {"soft_prompt": loaded["soft_prompt"] + 1}, tensors)
    code, _, error = run(*command, weights=False)
    assert code == 2
    assert f"pope_random.jsonl, line 1: made with {tensors.name} '{whole[0][tensors.name]}', not '" in error
    tensors.write_bytes(kept)
    os.utime(tensors, ns=(time, time))
    assert run(*command, weights=False)[0] == 0
    for name in ("ram_tag_list_threshold.txt", "config.json"):
        text, time = (folder / name).read_text(), (folder / name).stat().st_mtime_ns
        (folder / name).write_text(text.replace("0", "1", 1))
        assert f"made with {name} '" in run(*command, weights=False)[2]
        (folder / name).write_text(text)
        os.utime(folder / name, ns=(time, time))
    folder = folder.rename(tmp_path / "moved")
    assert run("pope_random", "--ann", path, "--weights", folder, weights=False)[0] == 0
    shutil.rmtree(folder)
    assert "has no config.json: it is not a folder of" in run(*command, weights=False)[2]
    assert run("pope_random", "--ann", path, "--score", file, weights=False)[0] == 0


def test_a_limit_can_be_raised_and_lowered(run: Run, tmp_path: Path) -> None:
    command = ("pope_random", "--ann", pope_file(tmp_path), "--batch-size", 2)
    assert "pope_random, 3 examples" in run(*command, "--limit", 3)[1]
    file = tmp_path / "results" / "pope_random.jsonl"
    assert len(lines(file)) == 4
    assert "pope_random, 7 examples" in run(*command)[1]
    full = file.read_bytes()
    assert "differs: only the first 2" in run(*command, "--limit", 2)[1]
    assert file.read_bytes() == full


def test_a_file_of_predictions_may_lack_its_last_line_end(run: Run, tmp_path: Path) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_text('{"id": 0, "text": "yes"}\n\n{"id": 1, "text": "No."}', encoding="utf-8")
    path = pope_file(tmp_path, 2)
    assert (
        "accuracy                  100.00   paper: LION 88.97"
        in run("pope_random", "--ann", path, "--score", mine, weights=False)[1]
    )


@pytest.mark.parametrize(
    ("task", "results"),
    [
        ("coco", [{"image_id": 1, "caption": "a dog"}, {"image_id": "2", "caption": "a cat", "id": 7}]),
        ("coco", [{"id": 1, "text": "a dog"}, {"id": 2, "text": "a cat"}]),
        ("okvqa", [{"question_id": 2971475, "answer": "ride"}]),
        ("okvqa", [{"image_id": 297147, "question_id": "2971475", "text": "ride", "answer": "no", "answer_id": "a"}]),
        ("gqa", [{"questionId": "7", "prediction": "3"}]),
        ("gqa", [{"question_id": 7, "answer": 3}]),
        ("gqa", [{"question_id": 7, "answer": 3, "task": "my own field"}]),
    ],
)
def test_result_lists_of_other_evaluators(run: Run, tmp_path: Path, task: str, results: list[dict]) -> None:
    """As one list, as lines and indented, and never taken for predictions of these weights."""
    captions = [
        {"image": f"val2014/COCO_val2014_{i:012}.jpg", "caption": text} for i, text in ((1, "a dog"), (2, "a cat"))
    ]
    files = {
        "coco": [write(tmp_path, "c.json", captions)],
        "okvqa": okvqa_files(tmp_path),
        "gqa": [write(tmp_path, "g.json", [{"question_id": 7, "question": "Q", "answer": 3, "image": "1.jpg"}])],
    }
    told = []
    for text in (json.dumps(results), "\n".join(map(json.dumps, results)), json.dumps(results, indent=1)):
        path = tmp_path / "mine.json"
        path.write_text(text)
        code, out, _ = run(task, "--ann", *files[task], "--score", path, weights=False)
        assert code == 0
        told.append(out)
    assert told[0] == told[1] == told[2]
    assert f"{task}, {len(results)} examples" in told[0]
    assert " 100.00" in told[0] or task == "coco"
    draw(tmp_path, "COCO_val2014_000000297147.jpg", *(row["image"] for row in captions), "1.jpg")
    ours = tmp_path / "results" / f"{task}.jsonl"
    for foreign in (json.dumps(results), '{"task": "shopping", "what": "milk"}', '{"task": "shopping"}\n{"a": 1}'):
        ours.write_text(foreign)
        assert "has no header, so it is none of this script" in run(task, "--ann", *files[task])[2]
        assert ours.read_text() == foreign


# --- what is refused


def test_bad_input_is_one_sentence(run: Run, tmp_path: Path) -> None:
    path = pope_file(tmp_path)
    empty = tmp_path / "empty.json"
    empty.touch()
    strange = write(tmp_path, "strange.jsonl", [{"id": "0", "text": "yes"}, {"id": "99", "text": "no"}], lines=True)
    twice = write(tmp_path, "twice.jsonl", [{"id": "0", "text": "yes"}] * 2, lines=True)
    other = write(tmp_path, "other.jsonl", [{"task": "pope_popular"}, {"id": "0", "text": "yes"}], lines=True)
    last = write(tmp_path, "last.jsonl", [{"id": "6", "text": "yes"}], lines=True)
    dialogs = visdial_file(tmp_path, dialogs=1)
    draw(tmp_path, "VisualDialog_val2018_000000185565.jpg")
    silent = write(tmp_path, "silent.jsonl", [{"id": "0"}], lines=True)
    silence = write(tmp_path, "silence.json", [{"image": "1.jpg", "caption": []}])
    row = {"question_id": 0, "image": "0.png", "text": "Is it?", "label": "no"}
    blank, sentinel, broken = (
        write(tmp_path, f"{i}.json", row | changed)
        for i, changed in enumerate(({"text": " "}, {"text": "<extra_id_0>"}, {"image": "broken.png"}))
    )
    (tmp_path / "images" / "broken.png").write_bytes(b"GIF")
    deep = tmp_path / "deep.json"
    deep.write_text('{"a": ' * 10**5)
    for args, words in (
        (["pope_rnadom", "--ann", path], "the task 'pope_rnadom' is unknown; there are flickr30k"),
        (["refcocog_testA", "--ann", path], "the task 'refcocog_testA' is unknown"),
        (["pope_random"], "pope_random needs its official annotation file: name it with --ann"),
        (["pope_random", "--ann", empty], "there is no example of pope_random in it"),
        (["coco", "--ann", empty], "empty.json: there is no example of coco in it"),
        (["pope_random", "--ann", path, "--batch-size", 0], "--batch-size must be at least 1, not 0"),
        (["pope_random", "--ann", path, "--limit", -1], "--limit must be at least 1, not -1"),
        (["pope_random", "--ann", path, "--score", strange], "line 2: the id 99 is not in the annotations"),
        (["pope_random", "--ann", path, "--score", twice], "line 2: the id 0 is predicted twice"),
        (["pope_random", "--ann", path, "--score", other], "line 1: made with task 'pope_popular', not 'pope_random'"),
        (["pope_random", "--ann", path, "--score", last, "--limit", 2], "no prediction for the 2 examples"),
        (["pope_random", "--ann", path, "--sheet", -1], "--sheet must be at least 0, not -1"),
        (
            ["pope_random", "--ann", path, "--score", silent],
            "silent.jsonl, line 1: the field 'text' is missing",
        ),
        (["pope_random", "--ann", path, "--score", tmp_path / "no"], "no: No such file"),
        (["pope_random", "--ann", path, "--templates", path], "--templates needs a task of boxes, and no --template"),
        (["pope_random", "folder", "--ann", path], "folder needs the task table"),
        (["pope_random", "--ann", path, "--rounds", "last"], "--rounds needs the task visdial"),
        (["pope_random", "--ann", path, "--score", last, "--official"], "--official needs a model to ask"),
        (["pope_random", "--ann", path, "--score", last, "--parts"], "--parts needs a model to ask, not --score"),
        (["table", "--parts"], "--parts needs a model to ask"),
        (["pope_random", "--ann", path, "--score", deep], "deep.json, line 1: it is nested too deeply"),
        (["pope_random", "--ann", blank], "the question of 0 is empty or lost in '{question}'"),
        (["pope_random", "--ann", sentinel], "the batch 0 to 0: question 0 or its tags hold <extra_id_0>"),
        (["pope_random", "--ann", broken], "the picture of 0: "),
        (["coco", "--ann", deep], "deep.json, line 1: it is nested too deeply"),
        (["coco", "--ann", silence], "silence.json: 1 has no answer"),
        (["table", "--official"], "--official needs a benchmark, such as coco"),
        (["pope_random", "--ann", path, "--device", "nowhere"], "the device 'nowhere' cannot be used"),
        (
            ["visdial", "--ann", dialogs, "--template", "{history} {question}"],
            "the question of 185565-1 is empty or lost in '{history}",
        ),
        (["--official"], "--official needs a benchmark"),
    ):
        code, _, error = run(*args)
        assert code == 2, args
        assert words in error
        assert error.startswith("eval.py: ")
        assert error.count("\n") == 1
    for flag in ("--out", "--images"):
        assert script.main(["pope_random", "--ann", str(path), "--weights", "tiny", flag, ""]) == 2
    code, _, error = run("pope_random", "--ann", path, weights=False)
    assert (code, error.count("\n")) == (2, 3)
    assert error.count("eval.py: --out or --images is empty") == 2
    assert "no weights: name their folder with --weights" in error


@pytest.mark.parametrize("content", [None, b"<html>", b""])
def test_missing_pictures_are_counted(run: Run, tmp_path: Path, content: bytes | None) -> None:
    """So are broken ones."""
    path, picture = pope_file(tmp_path), tmp_path / "images" / "3.png"
    picture.unlink()
    if content is not None:
        picture.write_bytes(content)
    code, _, error = run("pope_random", "--ann", path)
    assert code == 2
    assert ("the image 3.png is not below" if content is None else f"the picture of 3: {picture}: ") in error
    code, out, _ = run("pope_random", "--ann", path, "--skip-missing")
    assert code == 0
    assert "pope_random, 6 examples" in out
    assert "differs: 1 examples without a picture left out" in out


# --- the shapes world


def test_the_toy_is_asked_without_tags(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts: list[str] = []
    respond = Lion.respond

    def heard(self: Lion, *args: Any) -> list[Answer]:
        answers = respond(self, *args)
        prompts.extend(answer.prompt for answer in answers)
        return answers

    monkeypatch.setattr(Lion, "respond", heard)
    for flags, tagged in (([], True), (["--no-tags"], False)):
        prompts.clear()
        assert script.main(["--scenes", "1", *flags]) == 0
        assert all(("tags" in prompt) == tagged for prompt in prompts)


def test_toy_scores_of_one_who_knows(golden_model: Lion, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the true answers everything is right; the blind guesses stay what they are."""
    scenes = [toy.scene(i, "test") for i in range(12)]
    known = {}
    kinds = ("caption", "vqa", "rec", "reg")
    for one in scenes:
        for record in toy.records(one, random.Random(f"eval test {one.seed}"), kinds, scores.MEASURED):
            known[record["question"], tuple(split_tags(record["tags"])), one.seed] = record["answer"]
    asked: list[str] = []

    def respond(self: Lion, pictures: Any, questions: list[str], *more: Any) -> Any:
        asked.extend(questions)
        names = {id(one.image): one.seed for one in scenes}
        texts = [
            next(a for (q, _, seed), a in known.items() if q == question and seed == names[id(picture)])
            for picture, question in zip(pictures, questions, strict=True)
        ]
        return [Answer(text, "", [], 0.0) for text in texts]

    monkeypatch.setattr(Lion, "respond", respond)
    replies = scores.ask(golden_model, scenes)
    rows = {row.name: row for row in scores.toy_scores(replies)}
    assert {"REC, Acc@0.5", "REG, exact", "VQA, counting", "VQA, existence", "VQA, ground", "POPE, F1"} < set(rows)
    assert all(row.score == row.held_out == pytest.approx(1) for name, row in rows.items() if "CIDEr" not in name)
    assert rows["captions, CIDEr / 10"].score > rows["captions, CIDEr / 10"].baseline + 0.5
    assert all(0 <= row.baseline < 1 for row in rows.values())
    assert rows["VQA, existence"].baseline == pytest.approx(0.5)
    assert rows["POPE, F1"].baseline == pytest.approx(2 / 3)
    assert sum("Short answer:" in question for question in asked) > 12
    assert scores.levels(replies) == dict.fromkeys(("image level", "ground", "REC", "REG"), 1)

    # Of one who knows only the usual pairs of colours and shapes, and no ground.
    some = [
        replace(r, text="[0.000,0.000,0.100,0.100]") if r.scene.held_out or r.kind == "ground" else r for r in replies
    ]
    rows = {row.name: row for row in scores.toy_scores(some)}
    assert [rows["REC, Acc@0.5"].score, rows["VQA, ground"].score, rows["REG, exact"].held_out] == [0.5, 0, 0]
    assert scores.levels(some) | {"image level": 0} == {"image level": 0, "ground": 0, "REC": 0.5, "REG": 0.5}
    assert "REC, Acc@0.5            50.0%      0.0%" in scores.score_table(some)
    golden_model.config = replace(golden_model.config, visual_input="region")  # as stage 2 leaves it
    monkeypatch.setattr(Lion, "respond", lambda self, pictures, *more: [Answer("", "", [], 0.0)] * len(pictures))
    assert {reply.kind for reply in scores.ask(golden_model, scenes)} == {"rec", "reg"}
