"""Small files in each data set's true layout, quirks included, and what the readers say of broken ones."""

import base64
import csv
import io
import json
import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lion_mini import Box
from lion_mini.data import convert
from lion_mini.data.records import Records
from lion_mini.evaluation import readers
from lion_mini.evaluation.benchmarks import read
from lion_mini.images import ImageFolder
from lion_mini.text.prompts import TEMPLATES, pool, render

Folder = Path


def write(folder: Path, name: str, data: Any, lines: bool = False) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in data) if lines else json.dumps(data)
    path.write_text(text, encoding="utf-8")
    return path


# --- captions


def test_coco_karpathy_in_three_forms(tmp_path: Path) -> None:
    said = ["a man .", "A man\n"]
    name = "val2014/COCO_val2014_000000391895.jpg"
    lavis = write(tmp_path, "coco_karpathy_test.json", [{"image": name, "caption": said}])
    sentences = [{"raw": text, "tokens": []} for text in said]
    other = {"filepath": "train2014", "filename": "COCO_train2014_000000000009.jpg", "split": "restval"}
    own = {"filepath": "val2014", "filename": name[8:], "split": "test", "cocoid": 391895, "sentences": sentences}
    karpathy = write(tmp_path, "dataset_coco.json", {"images": [other, own], "dataset": "coco"})
    annotations = [{"image_id": 391895, "caption": text, "id": i} for i, text in enumerate(said)]
    truth = write(tmp_path, "coco_karpathy_test_gt.json", {"annotations": annotations, "images": [{"id": 391895}]})
    expected = [readers.Example("391895", name, references=tuple(said))]
    for path in (lavis, karpathy, truth):
        assert read("coco", [path]) == expected


def test_flickr30k_in_two_forms(tmp_path: Path) -> None:
    lavis = write(tmp_path, "a.json", [{"image": "flickr30k-images/1007129816.jpg", "caption": ["a", "b"]}])
    images = [{"filename": "1007129816.jpg", "split": "test", "sentences": [{"raw": "a"}, {"raw": "b"}]}]
    karpathy = write(tmp_path, "dataset_flickr30k.json", {"images": images})
    assert read("flickr30k", [lavis])[0].image == "flickr30k-images/1007129816.jpg"
    for path in (lavis, karpathy):
        (found,) = read("flickr30k", [path])
        assert (found.id, found.references) == ("1007129816", ("a", "b"))


def test_textcaps_is_read_by_key_and_grouped(tmp_path: Path) -> None:
    rows = [
        {"image_id": id, "caption_str": said, "reference_strs": ["x"], "set_name": "val"}
        for id, said in (("0054c91397f2fe05", "one"), ("00aa", "two"), ("0054c91397f2fe05", "three"))
    ]
    path = write(tmp_path, "TextCaps_0.1_val.json", {"data": rows, "dataset_type": "val", "dataset_version": "0.1"})
    first, second = read("textcaps", [path])
    assert first.image == "train_images/0054c91397f2fe05.jpg"
    assert first.references == ("one", "three")
    assert second.references == ("two",)


# --- questions

OKVQA_ANSWERS = [
    {"answer_id": i, "raw_answer": "riding", "answer": "ride", "answer_confidence": "yes"} for i in range(10)
]


def okvqa_files(folder: Path, split: str = "val") -> tuple[Path, Path]:
    questions = {"data_subtype": f"{split}2014", "task_type": "Open-Ended"}
    questions["questions"] = [{"image_id": 297147, "question": "What sport?", "question_id": 2971475}]  # type: ignore[assignment]
    annotations = [{"image_id": 297147, "question_id": 2971475, "answers": OKVQA_ANSWERS, "question_type": "one"}]
    return write(folder, "q.json", questions), write(folder, "a.json", {"annotations": annotations})


def test_okvqa_joins_two_files_in_any_order(tmp_path: Path) -> None:
    questions, annotations = okvqa_files(tmp_path)
    (found,) = read("okvqa", [questions, annotations])
    assert found == read("okvqa", [annotations, questions])[0]
    assert found.image == "val2014/COCO_val2014_000000297147.jpg"
    assert found.references == ("ride",) * 10  # the stemmed ones count
    name, ten = "val2014/COCO_val2014_000000297147.jpg", ["ride"] * 10
    lavis = [{"question_id": 2971475, "question": "What sport?", "answer": ten, "image": name, "dataset": "okvqa"}]
    assert read("okvqa", [write(tmp_path, "okvqa_val_eval.json", lavis)]) == [found]


def test_aokvqa(tmp_path: Path) -> None:
    row = {
        "split": "val", "image_id": 461751, "question_id": "22jbM6gDxdaMaunuzgrsBB", "question": "What is it?",
        "choices": ["a", "b", "c", "d"], "correct_choice_idx": 1, "direct_answers": ["bag"] * 10,
        "difficult_direct_answer": True, "rationales": [],
    }  # fmt: skip
    path = write(tmp_path, "aokvqa_v1p0_val.json", [row])
    (found,) = read("aokvqa", [path])
    assert (found.image, found.group) == ("val2017/000000461751.jpg", "difficult")
    lavis = row | {"image": "val2014/COCO_val2014_000000461751.jpg", "difficult_direct_answer": False}
    (found,) = read("aokvqa", [write(tmp_path, "l.json", [lavis])])
    assert (found.image, found.group) == (lavis["image"], "")
    del row["direct_answers"]  # as in the test file, whose answers are hidden
    with pytest.raises(ValueError, match=r"b\.json, record 1: the field 'direct_answers' is missing"):
        read("aokvqa", [write(tmp_path, "b.json", [row])])


def test_gqa(tmp_path: Path) -> None:
    official = {"201307251": {"imageId": "n161313", "question": "Is it tall?", "answer": "no", "fullAnswer": "No."}}
    (found,) = read("gqa", [write(tmp_path, "testdev_balanced_questions.json", official)])
    assert found == readers.Example("201307251", "n161313.jpg", {"question": "Is it tall?"}, ("no",))
    lavis = [{"question_id": "201307251", "question": "Is it tall?", "answer": "no", "image": "n161313.jpg"}]
    assert read("gqa", [write(tmp_path, "lavis.json", lavis)]) == [found]


def test_iconqa(tmp_path: Path) -> None:
    row = {"question": "How many?", "choices": ["3", "2"], "answer": 1, "ques_type": "choose_txt"}
    for id in ("107", "99"):
        write(tmp_path, f"iconqa/test/choose_txt/{id}/data.json", row)
    found = read("iconqa", [tmp_path / "iconqa"])
    assert [e.id for e in found] == ["99", "107"]
    assert found[0].image == "test/choose_txt/99/image.png"
    assert (found[0].candidates, found[0].target) == (("3", "2"), 1)
    problems = write(tmp_path, "problems.json", {"99": row, "107": row, "5": {"ques_type": "fill_in_blank"}})
    splits = write(tmp_path, "pid_splits.json", {"choose_txt_test": ["99", "107"], "choose_txt_val": ["5"]})
    assert read("iconqa", [splits, problems]) == found


def test_vsr(tmp_path: Path) -> None:
    link = "http://images.cocodataset.org/train2017/000000050403.jpg"
    rows = [
        {"image": "000000050403.jpg", "image_link": link, "caption": "The dog is on it.", "label": 1, "relation": "on"},
        {"image": "000000050403.jpg", "caption": "The dog is under it.", "label": 0},
    ]
    true, false = read("vsr", [write(tmp_path, "test.jsonl", rows, lines=True)])
    assert (true.image, true.candidates, true.target) == (
        "train2017/000000050403.jpg",
        ("yes", "true", "no", "false"),
        0,
    )
    assert (false.image, false.target, false.id) == ("000000050403.jpg", 2, "1")


def visdial_file(folder: Path, dialogs: int = 2) -> Path:
    options = list(range(100))
    turns = [{"question": i, "answer": i + 1, "answer_options": options[::-1], "gt_index": 98 - i} for i in range(10)]
    data = {
        "questions": [f"is it {i}" for i in range(10)], "answers": [f"yes {i}" for i in range(100)],
        "dialogs": [{"image_id": 185565 + i, "caption": "a man", "dialog": turns} for i in range(dialogs)],
    }  # fmt: skip
    return write(folder, "visdial_1.0_val.json", {"version": "1.0", "split": "val2018", "data": data})


def test_visdial_has_every_round(tmp_path: Path) -> None:
    path = visdial_file(tmp_path)
    found = read("visdial", [path])
    assert len(found) == 20
    assert found[0].image == "VisualDialog_val2018/VisualDialog_val2018_000000185565.jpg"
    assert found[0].fields == {"question": "is it 0", "history": ""}
    assert found[2].fields["history"] == "q: is it 0 a: yes 1 q: is it 1 a: yes 2"
    assert found[2].candidates[found[2].target or 0] == "yes 3"
    assert len({e.fields["history"] for e in found[:10]}) == 10  # unlike LAVIS, where all are the last
    last = [example for example in found if example.group == "last"]
    assert [e.id for e in last] == ["185565-10", "185566-10"]
    assert last[0] == found[9]
    path.write_text(path.read_text().replace('"question": 3,', '"question": -1,'))
    with pytest.raises(ValueError, match=r"visdial_1\.0_val\.json, dialogs 1: the field -1 is missing"):
        read("visdial", [path])


# --- boxes


def refer_files(folder: Path) -> tuple[Path, Path]:
    refs = [
        {"ref_id": 1, "ann_id": 7, "category_id": 1, "image_id": 581857, "split": split, "file_name": "x_7.jpg",
         "sentences": [{"raw": "Lady's head", "sent": "lady ' s head", "sent_id": number, "tokens": []},
                       {"raw": "HER", "sent": "her ", "sent_id": number + 1, "tokens": []}]}
        for number, split in ((3, "val"), (8, "testA"))
    ]  # fmt: skip
    images = [{"id": 581857, "file_name": "COCO_train2014_000000581857.jpg", "width": 640, "height": 427}]
    annotations = [{"id": 7, "image_id": 581857, "bbox": [285.04, 23.29, 139.74, 123.11]}]
    path = folder / "refs(unc).p"
    path.write_bytes(pickle.dumps(refs, protocol=2))
    return path, write(folder, "instances.json", {"images": images, "annotations": annotations})


def test_refer(tmp_path: Path) -> None:
    paths = refer_files(tmp_path)
    found = read("refcoco_testA", [*paths])
    assert [e.id for e in found] == ["8", "9"]
    assert found[0].image == "train2014/COCO_train2014_000000581857.jpg"  # not the ref's own file_name
    assert [e.fields["expression"] for e in found] == ["lady ' s head", "her"]
    assert found[0].box == Box(285.04 / 640, 23.29 / 427, (285.04 + 139.74) / 640, (23.29 + 123.11) / 427)
    with pytest.raises(ValueError, match=r"instances\.json: there is no example of refcoco_testB in it"):
        read("refcoco_testB", [*paths])


def test_a_pickle_of_python_2(tmp_path: Path) -> None:
    """Byte strings beyond ASCII, which Python 2 wrote as the opcode U or T: UTF-8, or else Latin-1."""
    path, instances = refer_files(tmp_path)
    data = path.read_bytes().replace(b"X\x04\x00\x00\x00her ", b"U\x05caf\xe9!")
    path.write_bytes(data.replace(b"X\x0d\x00\x00\x00lady ' s head", "U\x09の café".encode()))
    assert [e.fields["expression"] for e in read("refcoco_val", [path, instances])] == ["の café", "café!"]


def test_a_pickle_that_would_run_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "owned",))

    _, instances = refer_files(tmp_path)
    path = tmp_path / "refs.p"
    for data, words in (
        (pickle.dumps([Evil()]), r"it asks for pathlib\S*, and only plain data is read"),
        (b"cos\nsystem\n(S'true'\ntR.", r"it asks for os\.system, and only"),
        (b"c__builtin__\neval\n(S'1'\ntR.", r"it asks for __builtin__\.eval"),
        (pickle.dumps([{"a": 1}])[:-4], r"refs\.p: it is damaged"),
        (b"", r"refs\.p: Ran out of input"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=words):
            read("refcoco_val", [path, instances])
    assert not (tmp_path / "owned").exists()


def test_shikra_and_minigpt4(tmp_path: Path) -> None:
    line = {"img_path": "COCO_train2014_000000581857.jpg", "expression": "the lady", "height": 427, "width": 640}
    shikra = write(tmp_path, "REC_refcoco_unc_val.jsonl", [line | {"bbox": [64, 42.7, 128, 85.4]}] * 2, lines=True)
    first, second = read("refcoco_val", [shikra])
    assert first.box == second.box == Box(0.1, 0.1, 0.2, 0.2)  # two corners
    assert first.id != second.id  # by expression, never by image
    row = {"img_id": "COCO_train2014_000000581857_16", "sents": "the lady", "height": 427, "width": 640}
    (found,) = read("refcoco_val", [write(tmp_path, "m.json", [row | {"bbox": [64, 42.7, 64, 42.7]}])])
    assert found.box is not None
    assert found.box.iou(Box(0.1, 0.1, 0.2, 0.2)) == pytest.approx(1)  # a corner with width and height
    assert found.image == "COCO_train2014_000000581857.jpg"
    bad = write(tmp_path, "bad.jsonl", [line | {"bbox": [64, 42.7, 64, 85.4]}], lines=True)
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 1: the box covers nothing of the image"):
        read("refcoco_val", [bad])


# --- yes and no, letters


def test_pope(tmp_path: Path) -> None:
    row = {"question_id": 1, "image": "COCO_val2014_000000016631.jpg", "text": "Is there a snowboard in the image?"}
    (found,) = read("pope_random", [write(tmp_path, "p.json", [row | {"label": "yes"}], lines=True)])
    assert (found.references, found.fields["question"]) == (("yes",), row["text"])
    with pytest.raises(ValueError, match=r"line 1: label must be in \('yes', 'no'\), found 'maybe'"):
        read("pope_random", [write(tmp_path, "p.json", [row | {"label": "maybe"}], lines=True)])


def mmbench_file(folder: Path, answer: str = "B") -> Path:
    picture = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(picture, "PNG")
    text = base64.b64encode(picture.getvalue()).decode()
    names = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "l2-category", "split")
    rows = [
        ("241", 'Which "one"?\nLook', "", "red", "blue", "nan", "", answer, "x", text, "coarse_perception", "dev"),
        ("1000241", "Which?", "a hint", "blue", "red", "", "", "A" * bool(answer), "x", "241", "coarse_perception", ""),
    ]
    path = folder / "mmbench_dev.tsv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t").writerows([names, *rows])
    return path


def test_mmbench(tmp_path: Path) -> None:
    first, second = read("mmbench", [mmbench_file(tmp_path)])
    assert (first.candidates, first.references, first.target) == (("blue", "red"), ("B", "A"), 0)  # by alphabet
    assert first.fields == {"question": 'Which "one"?\nLook', "hint": "", "options": "A. blue\nB. red"}
    assert first.image == second.image  # a row may name the one that has its picture
    assert (second.fields["hint"], second.references, second.target) == ("a hint", ("A", "B"), 0)
    assert Image.open(io.BytesIO(first.image if isinstance(first.image, bytes) else b"")).size == (8, 8)
    path = mmbench_file(tmp_path, answer="")
    assert read("mmbench", [path])[0].target is None  # test: hidden
    text = path.read_text()
    path.write_text(text.replace("red\tblue\tnan\t", "Zoo\tapple\t9\tapple"))
    (found, _) = read("mmbench", [path])
    assert (found.candidates, found.references) == (("9", "apple", "apple", "Zoo"), ("C", "B", "D", "A"))
    assert found.fields["options"] == "A. 9\nB. apple\nC. apple\nD. Zoo"
    path.write_text(text + '9\t"no end')
    with pytest.raises(ValueError, match=r"mmbench_dev\.tsv: unexpected end of data"):
        read("mmbench", [path])
    path.write_text(text.replace("coarse_", "fine_"))
    with pytest.raises(ValueError, match=r"mmbench_dev\.tsv, record 1: l2-category must be in \['logic_reasoning'"):
        read("mmbench", [path])


@pytest.mark.parametrize(
    ("task", "rows"),
    [
        ("pope_random", [{"question_id": i, "image": "1.jpg", "text": "Q", "label": "yes"} for i in (1, 2)]),
        ("vsr", [{"image": "1.jpg", "caption": "a", "label": i} for i in (1, 0)]),
        ("refcoco_val", [{"img_path": "1.jpg", "expression": "a", "bbox": [1, 1, 2, 2], "height": 4, "width": 4}] * 2),
        ("refcoco_val", [{"img_id": "x", "sents": "a", "bbox": [1, 1, 2, 2], "height": 4, "width": 4}]),
        ("coco", [{"image": "1.jpg", "caption": ["a"]}, {"image": "2.jpg", "caption": "b"}]),
        ("gqa", [{"question_id": 1, "question": "Q", "answer": "no", "image": "1.jpg"}]),
        ("aokvqa", [{"image_id": 1, "question_id": i, "question": "Q", "direct_answers": ["a"]} for i in "ab"]),
    ],
)
def test_records_in_any_json(tmp_path: Path, task: str, rows: list[dict]) -> None:
    """A list, lines, objects that span lines, and files that were joined."""
    path, one_by_one = tmp_path / "x.json", list(map(json.dumps, rows))
    expected = read(task, [write(tmp_path, "list.json", rows)])
    assert len(expected) == len(rows)
    indented = "\n".join(json.dumps(row, indent=1) for row in rows)
    for text in ("\n".join(one_by_one), indented, "".join(one_by_one), "\r\n\ufeff\n".join(one_by_one) + "\n\n"):
        path.write_bytes(("\ufeff" + text).encode())
        assert read(task, [path]) == expected
    path.write_text(indented + "\n{\n")
    with pytest.raises(ValueError, match=rf"x\.json, line {indented.count(chr(10)) + 2}: it is not whole JSON"):
        read(task, [path])


def test_numbers_for_texts_and_texts_for_numbers(tmp_path: Path) -> None:
    questions, annotations = okvqa_files(tmp_path)
    expected, text = read("okvqa", [questions, annotations]), questions.read_text()
    questions.write_text(text.replace(": 297147,", ': "297147",').replace(": 2971475}", ': "2971475"}'))
    assert questions.read_text() != text
    assert read("okvqa", [questions, annotations]) == expected
    paths = refer_files(tmp_path)
    boxes, text = read("refcoco_val", [*paths]), paths[1].read_text()
    paths[1].write_text(text.replace('"id": 581857', '"id": "581857"').replace('"id": 7', '"id": "7"'))
    assert read("refcoco_val", [*paths]) == boxes
    icon = {"question": "How many?", "choices": ["3", "2"], "answer": 1}
    whole: list[tuple[str, dict, dict]] = [
        ("coco", {"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": "a"}]}, {"images": [{"id": "1"}]}),
        ("aokvqa", {"image_id": 1, "question_id": "7", "question": "Q", "direct_answers": ["3"]},
         {"image_id": "1", "question_id": 7, "direct_answers": 3}),
        ("gqa", {"7": {"imageId": "n1", "question": "Q", "answer": "3"}},
         {"7": {"imageId": "n1", "question": "Q", "answer": 3}}),
        ("iconqa", {"choose_txt_test": ["1"], "1": icon},
         {"choose_txt_test": [1], "1": icon | {"choices": [3, 2], "answer": "1"}}),
        ("gqa", {"7": {"imageId": "8", "question": "Q", "answer": "a"}},
         {"7": {"imageId": 8, "question": "Q", "answer": "a"}}),
        ("vsr", {"image": "1.jpg", "caption": "a", "label": 1}, {"label": "1"}),
        ("vsr", {"image": "1.jpg", "caption": "a", "label": 0}, {"label": False}),
        ("pope_random", {"question_id": 1, "image": "1.jpg", "text": "Q", "label": "yes"},
         {"question_id": "1", "label": "Yes\n"}),
    ]  # fmt: skip
    for task, official, careless in whole:
        expected = read(task, [write(tmp_path, "official.json", official)])
        assert read(task, [write(tmp_path, "careless.json", official | careless)]) == expected


# --- what is wrong with a file


def test_broken_files_are_one_sentence(tmp_path: Path) -> None:
    row = {"question_id": "1", "question": "Q", "answer": "no", "image": "1.jpg"}
    path = tmp_path / "x.json"
    for text, words in (
        (json.dumps([row, row | {"question": 3}]), "record 2: question must be text, found 3"),
        (json.dumps([row, {"question_id": "2", "question": "Q"}]), "record 2: the field 'image' is missing"),
        (json.dumps([row, row]), "the id 1 stands there twice"),
        (json.dumps([row, 7]), "record 2: it must be an object, found 7"),
        (json.dumps([row])[:-5], "is not whole JSON"),
        (json.dumps([row | {"answer": []}]), "1 has no answer"),
        ("[" * 10**5, "line 1: it is nested too deeply"),
        ("[]", "there is no example of gqa in it"),
        ("", "there is no example of gqa in it"),
        ("7", "it must be a list, found 7"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=rf"x\.json.*{words}") as error:
            read("gqa", [path])
        assert "\n" not in str(error.value)
    question, answer = {"question_id": 1, "image_id": 1, "question": "Q"}, {"question_id": 2, "answers": []}
    box = {"img_path": "1.jpg", "expression": "a", "height": 48, "width": 64}
    image = {"filename": "1.jpg", "split": "test", "sentences": [{"raw": "a"}]}
    other: list[tuple[str, Any, str]] = [
        ("okvqa", {"questions": [question], "annotations": [answer]}, "question 2 has answers and is not in questions"),
        ("aokvqa", [question | {"direct_answers": "a", "difficult_direct_answer": "false"}], "must be a boolean"),
        ("coco", {"images": [image, {"filename": "2.jpg"}]}, "images 2: the field 'split' is missing"),
        ("refcoco_val", box | {"bbox": [0.1, 0.1, 0.5, 0.5]}, "line 1: the box covers nothing of the image, in pixels"),
        ("refcoco_val", box | {"bbox": [30, 30, 10, 10]}, "line 1: the box covers nothing of the image, in pixels"),
        ("refcoco_val", box | {"bbox": [100, 10, 200, 20]}, "line 1: the box covers nothing of the image, in pixels"),
        ("refcoco_val", box | {"bbox": [float("nan"), 1, 2, 3]}, "line 1: pixel box nan,1,2,3 .* has no fractions"),
    ]
    for task, data, words in other:
        with pytest.raises(ValueError, match=rf"x\.json.*{words}"):
            read(task, [write(tmp_path, "x.json", data)])
    with pytest.raises(ValueError, match=r"nowhere\.json: No such file"):
        read("gqa", [tmp_path / "nowhere.json"])
    path.write_text('{"image": "a.jpg", "caption": "b", "label": 1}\n{"image": "a.j', encoding="utf-8")
    with pytest.raises(ValueError, match=r"x\.json, line 2: it is not whole JSON"):
        read("vsr", [path])


def test_nothing_but_a_sentence_ever_comes_out(tmp_path: Path) -> None:
    """Each value of each official layout in turn is taken out or replaced: a ValueError of one line, or it is read."""
    link, ten = "http://x/train2017/1.jpg", ["a"] * 10
    refs, instances = refer_files(tmp_path)
    whole: list[tuple[str, Any, bool, list[Path]]] = [
        ("coco", [{"image": "val2014/COCO_val2014_000000391895.jpg", "caption": ["a"]}], False, []),
        ("coco", {"images": [{"filename": "1.jpg", "split": "test", "sentences": [{"raw": "a"}]}]}, False, []),
        ("coco", {"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": "a"}]}, False, []),
        ("textcaps", {"data": [{"image_id": "a", "caption_str": "b"}]}, False, []),
        ("okvqa", [{"question_id": 1, "question": "Q", "answer": ten, "image": "1.jpg"}], False, []),
        ("okvqa", json.loads(okvqa_files(tmp_path)[0].read_text()), False, [tmp_path / "a.json"]),
        ("okvqa", json.loads(okvqa_files(tmp_path)[1].read_text()), False, [tmp_path / "q.json"]),
        ("aokvqa", [{"image_id": 1, "question_id": "1", "question": "Q", "direct_answers": ten}], False, []),
        ("gqa", {"1": {"imageId": "n1", "question": "Q", "answer": "no"}}, False, []),
        ("vsr", [{"image": "1.jpg", "image_link": link, "caption": "a", "label": 1}], True, []),
        ("visdial", json.loads(visdial_file(tmp_path, 1).read_text()), False, []),
        ("refcoco_val", json.loads(instances.read_text()), False, [refs]),
        ("refcoco_val", [{"img_id": "x", "sents": "a", "bbox": [1, 1, 2, 2], "height": 4, "width": 4}], False, []),
        ("pope_random", [{"question_id": 1, "image": "1.jpg", "text": "Q", "label": "yes"}], True, []),
    ]
    for task, data, as_lines, others in whole:
        read(task, [write(tmp_path, "x.json", data, as_lines), *others])
        for broken in mutations(data):
            path = write(tmp_path, "x.json", broken, as_lines and isinstance(broken, list))
            said = complaint(task, [path, *others])
            assert "\n" not in said
            assert not said or str(tmp_path) in said
    pickled = pickle.loads(refs.read_bytes())
    for broken in mutations(pickled):
        refs.write_bytes(pickle.dumps(broken))
        said = complaint("refcoco_val", [refs, instances])
        assert not said or str(tmp_path) in said


def complaint(task: str, paths: list[Path]) -> str:
    try:
        read(task, paths)
    except ValueError as error:
        return str(error)
    return ""


def mutations(data: Any) -> Iterator[Any]:
    """The data with one value, anywhere in it, gone or of another type; of a long list only the start."""
    yield from (None, 7, "text", [], {}, -1.5, True)
    if isinstance(data, dict):
        for key in data:
            yield {name: value for name, value in data.items() if name != key}
            yield from ({**data, key: changed} for changed in mutations(data[key]))
    elif isinstance(data, list):
        for i, value in enumerate(data[:2]):
            yield data[:i] + data[i + 1 :]
            yield from ([*data[:i], changed, *data[i + 1 :]] for changed in mutations(value))


def test_any_end_of_a_path_finds_its_picture(tmp_path: Path) -> None:
    (tmp_path / "val2014").mkdir()
    (tmp_path / "val2014" / "1.jpg").touch()
    assert ImageFolder(tmp_path).path("val2014/1.jpg") == tmp_path / "val2014" / "1.jpg"
    inner = ImageFolder(tmp_path / "val2014")
    assert inner.path("coco/val2014/1.jpg") == tmp_path / "val2014" / "1.jpg"
    assert inner.path("2.jpg") is None
    with pytest.raises(ValueError, match=r"the image 2\.jpg is not below .*: name their folder"):
        inner.without_missing(["1.jpg", "2.jpg"], skip=False)
    assert inner.without_missing(["1.jpg", "2.jpg"], skip=True) == [True, False]


# --- training sets


def converted(
    folder: Path, name: str, *paths: Path, skip: bool = True, pictures: bool = True, **flags: str
) -> list[dict]:
    """The records; every picture they name is made first, unless told otherwise."""
    out = folder / "out.jsonl"
    images = folder / "images"
    more = [part for key, value in flags.items() for part in (f"--{key.rstrip('_')}", value)]
    if pictures:
        kind = flags.get("as_", convert.TASKS_OF_SET[name][0])
        for record in convert.make_records(name, kind, paths, dict(TEMPLATES), 0):
            picture = images / record["image"]
            picture.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 48), "white").save(picture)
    ann = ["--ann", *map(str, paths), "--images", str(images), "--out", str(out)]
    assert convert.main(["convert", name, *ann, *more, *(["--skip-missing"] if skip else [])]) == 0
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_llava_turns_stand_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    said = [
        "<image>\nWhat is it?",
        "A bus.",
        "What colour?",
        "Red.\n",
        "<image>",
        "A street.",
        "And the last, unanswered?",
    ]
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]
    rows = [{"id": str(i), "image": "000000033471.jpg", "conversations": said} for i, said in enumerate((turns, []))]
    path = write(tmp_path, "llava.jsonl", rows, lines=True)
    first, second = converted(tmp_path, "llava", path)
    assert converted(tmp_path, "llava", write(tmp_path, "llava.json", rows)) == [first, second]
    assert first == {
        "image": "000000033471.jpg", "question": "What is it?", "answer": "A bus.", "category": "image_level",
    }  # fmt: skip
    assert (second["question"], second["answer"]) == ("What colour?", "Red.")
    out = capsys.readouterr().out
    assert "3 records without a question or an answer left out" in out
    assert "Table 7 counts about 361,000: -360,995" in out


def test_vqa_and_vqg(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    paths = okvqa_files(tmp_path, "train")
    (asked,) = converted(tmp_path, "okvqa", *paths)
    assert asked["answer"] == "ride"
    assert "What sport?" in asked["question"]
    assert asked["image"] == "train2014/COCO_train2014_000000297147.jpg"
    (turned,) = converted(tmp_path, "okvqa", *paths, as_="vqg")
    assert turned["answer"] == "What sport?"
    assert "ride" in turned["question"]
    assert "Table 7 counts 9,009: -9,008" in capsys.readouterr().out
    questions, annotations = (json.loads(path.read_text()) for path in paths)
    questions["questions"].append(questions["questions"][0] | {"question_id": 5})
    annotations["annotations"].append({"question_id": 5, "answers": []})
    paths = write(tmp_path, "q.json", questions), write(tmp_path, "a.json", annotations)
    for kind, expected in (("vqa", asked), ("vqg", turned)):
        assert converted(tmp_path, "okvqa", *paths, as_=kind) == [expected]
        assert "1 records without a question or an answer left out" in capsys.readouterr().out


def test_ocrvqa_trains_on_split_1(tmp_path: Path) -> None:
    url = "http://ecx.images-amazon.com/images/I/51l6XIoa3rL.gif"
    book = {"imageURL": url, "questions": ["Who?", "When?"], "answers": ["Sandra", "1999"], "split": 1, "title": "t"}
    path = write(tmp_path, "dataset.json", {"761183272": book | {"split": "1"}, "2": book | {"split": 3}})
    found = converted(tmp_path, "ocrvqa", path)
    for wrong, words in (({"split": 0}, "split must be in"), ({"answers": ["a", None]}, "answers must be text")):
        with pytest.raises(ValueError, match=rf"b\.json, 2: {words}"):
            list(convert.ocrvqa([write(tmp_path, "b.json", {"2": book | wrong})]))
    assert [record["answer"] for record in found] == ["Sandra", "1999"]
    assert found[0]["image"] == "images/761183272.gif"


def test_captions_for_training(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    images = [{"id": 9, "file_name": "COCO_train2014_000000000009.jpg"}, {"id": 8, "file_name": "8.jpg"}]
    annotations = [{"image_id": 9, "id": i, "caption": f"A dog {i}."} for i in range(2)]
    path = write(tmp_path, "captions_train2014.json", {"images": images, "annotations": annotations})
    found = converted(tmp_path, "coco", path)
    assert [record["answer"] for record in found] == ["A dog 0.", "A dog 1."]  # as they are, not lower-cased
    assert found[0]["image"] == "COCO_train2014_000000000009.jpg"
    assert "1 records without a question or an answer left out" in capsys.readouterr().out
    rows = [{"image_id": "aa", "caption_str": "A sign."}]
    (said,) = converted(tmp_path, "textcaps", write(tmp_path, "t.json", {"data": rows}))
    assert (said["image"], said["answer"]) == ("train_images/aa.jpg", "A sign.")


def vg_files(folder: Path) -> tuple[Path, Path]:
    region = {
        "region_id": 1,
        "image_id": 61512,
        "phrase": " the clock ",
        "x": -5,
        "y": 120,
        "width": 405,
        "height": 600,
    }
    regions = [{"id": 61512, "regions": [region, region | {"x": 800, "width": 90}]}]
    url = "https://cs.stanford.edu/people/rak248/VG_100K_2/61512.jpg"
    pictures = [{"image_id": 61512, "width": 800, "height": 600, "url": url, "coco_id": None}]
    return write(folder, "region_descriptions.json", regions), write(folder, "image_data.json", pictures)


def test_visual_genome(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    paths = vg_files(tmp_path)
    (rec,) = converted(tmp_path, "vg", *paths)
    lost = "records without a phrase, or a box inside the picture left out"
    assert f"1 {lost}" in capsys.readouterr().out  # the region beside the picture
    assert rec["image"] == "VG_100K_2/61512.jpg"
    assert rec["answer"] == "Answer: [0.000,0.200,0.500,1.000]"
    assert "the clock" in rec["question"]
    (reg,) = converted(tmp_path, "vg", *paths[::-1], as_="reg")
    assert reg["answer"] == "the clock"
    assert "[0.000,0.200,0.500,1.000]" in reg["question"]
    assert reg["category"] == "region_level"
    line = {"img_path": "images2/VG_100K_2/61512.jpg", "expression": "the clock", "bbox": [0, 120, 400, 600]}
    # After the first: nothing, nothing once written, inverted, fractions.
    boxes = [0, 120, 400, 600], [1, 1, 1, 20], [0, 2, 0.3, 40], [9, 9, 3, 3], [0.1, 0.1, 0.9, 1]
    lines = [line | {"width": 800, "height": 600, "bbox": box} for box in boxes]
    path = write(tmp_path, "GC_genome196_train.jsonl", lines, lines=True)
    assert converted(tmp_path, "vg", path, pictures=False) == [rec]
    out = capsys.readouterr().out
    assert f"4 {lost}" in out
    assert "Table 7 counts about 3,600,000: -3,599,995" in out
    for row in (files := [json.loads(path.read_text()) for path in paths])[0][0]["regions"] + files[1]:  # version 1.0
        row["id"] = row.pop("image_id") if "url" in row else row.pop("region_id") + row.pop("image_id")
    version_1 = [write(tmp_path, f"version-1/{i}.json", data) for i, data in enumerate(files)]
    assert converted(tmp_path, "vg", *version_1, pictures=False) == [rec]
    files = [json.loads(path.read_text()) for path in paths]
    files[0].append({"id": 61512, "region": []})
    with pytest.raises(ValueError, match=r"0\.json, record 2: the field 'regions' is missing"):
        list(convert.regions([write(tmp_path, f"{i}.json", data) for i, data in enumerate(files)]))
    for part, key, value in ((1, "width", 0), (0, "x", float("nan"))):
        files = [json.loads(path.read_text()) for path in paths]
        (files[part][0] if part else files[0][0]["regions"][1])[key] = value
        names = [write(tmp_path, f"{i}.json", data) for i, data in enumerate(files)]
        with pytest.raises(ValueError, match=rf"0\.json, record 1, regions {2 - part}: pixel box .* has no fractions"):
            list(convert.regions(names))


def test_refcoco_for_training(tmp_path: Path) -> None:
    path, instances = refer_files(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"testA", b"train"))
    found = converted(tmp_path, "refcoco", path, instances)
    assert len(found) == 2  # one per sentence
    assert "lady ' s head" in found[0]["question"]


def test_the_releases_own_files(tmp_path: Path) -> None:
    rows = [
        {"image_path": "a.jpg", "question": "Q", "answer": ["A", "B"], "category": "REF", "tags": ["x", "y"]},
        {"image_id": "b.jpg", "question": "Q", "category": "image"},
    ]
    assert converted(tmp_path, "release", write(tmp_path, "region_level_data.json", rows)) == [
        {"image": "a.jpg", "question": "Q", "answer": "A", "category": "region_level", "tags": ["x", "y"]},
        {"image": "b.jpg", "question": "Q", "answer": "", "category": "image_level"},
    ]


TREE = {  # the official README's folders below one root, and what the annotation files name
    "ocrvqa": ("OCR-VQA/images/8.jpg", "8"),
    "coco": ("coco/images/train2014/COCO_train2014_000000000009.jpg", 9),
    "llava": ("coco_2017/train2017/000000000008.jpg", "000000000008.jpg"),
    "aokvqa": ("coco_2017/train2017/000000000009.jpg", 9),
    "okvqa": ("okvqa/images/train/train2014/COCO_train2014_000000000009.jpg", 9),
    "textcaps": ("textcaps/images/train_images/aa.jpg", "aa"),
    "vqav2": ("vqav2/images/train2014/COCO_train2014_000000000009.jpg", 9),
    "vg": ("visual_genome/VG_100K_2/8.jpg", 8),
}


def official(folder: Path, name: str, image: Any) -> list[Path]:
    """Annotation files of the data set about one picture."""
    question = {"question_id": 1, "image_id": image, "question": "What?"}
    turns = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]
    book = {"imageURL": "http://x/8.gif", "questions": ["q"], "answers": ["a"], "split": 1}
    box = {"x": 1, "y": 1, "width": 9, "height": 9}
    files: dict[str, list[Any]] = {
        "ocrvqa": [{image: book}],
        "coco": [{"images": [{"id": 9, "file_name": "COCO_train2014_000000000009.jpg"}],
                  "annotations": [{"image_id": 9, "caption": "A"}]}],
        "llava": [[{"image": image, "conversations": turns}]],
        "aokvqa": [[question | {"split": "train", "direct_answers": ["a"], "question_id": "1"}]],
        "textcaps": [{"data": [{"image_id": image, "caption_str": "A"}]}],
        "vg": [[{"id": 8, "regions": [box | {"image_id": 8, "phrase": "a dog"}]}],
               [{"image_id": 8, "width": 64, "height": 48, "url": "http://x/VG_100K_2/8.jpg"}]],
    }  # fmt: skip
    files["vqav2"] = files["okvqa"] = [
        {"data_subtype": "train2014", "questions": [question]},
        {"annotations": [{"question_id": 1, "answers": [{"answer": "a"}]}]},
    ]
    return [write(folder, f"{name}-{i}.json", data) for i, data in enumerate(files[name])]


def test_all_sets_are_trained_together(tmp_path: Path) -> None:
    """Below one root each set finds its own pictures, although every one is different; so does training after that."""
    root = tmp_path / "images"
    for level, (place, _) in enumerate([*TREE.values(), ("visual_genome/VG_100K/2.jpg", 0)]):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48), (level, 0, 0)).save(root / place, "PNG")
    (root / "coco" / "loop").symlink_to(root)
    for level, (name, (place, image)) in enumerate(TREE.items()):
        (record,) = converted(tmp_path, name, *official(tmp_path, name, image), skip=False, pictures=False)
        assert record["image"] == place, name
        read = Records(tmp_path / "out.jsonl", [tmp_path / "nothing", root]).read(0, random.Random())
        assert read.image.getpixel((0, 0)) == (level, 0, 0)


def test_records_can_be_trained_from(tmp_path: Path) -> None:
    converted(tmp_path, "vg", *vg_files(tmp_path))
    for root in ("images", "images/VG_100K_2"):  # as `convert` finds pictures: any end of their path
        source = Records(tmp_path / "out.jsonl", tmp_path / root, ("region",))
        assert source.read(0, random.Random()).answer == "Answer: [0.000,0.200,0.500,1.000]"


def test_nothing_but_a_sentence_comes_out_of_a_converter(tmp_path: Path) -> None:
    regions, pictures = vg_files(tmp_path)
    turns = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]
    book = {"imageURL": "http://x/1.jpg", "questions": ["q"], "answers": ["a"], "split": 1}
    image, said = {"id": 9, "file_name": "x.jpg"}, {"image_id": 9, "caption": "A"}
    release = {"image": "a.jpg", "question": "Q", "answer": "a", "category": "image_level", "tags": ["a"]}
    whole: list[tuple[str, str, Any, list[Path]]] = [
        ("llava", "dialogue", [{"image": "1.jpg", "conversations": turns}], []),
        ("ocrvqa", "vqa", {"1": book}, []),
        ("textcaps", "caption", {"data": [{"image_id": "a", "caption_str": "b"}]}, []),
        ("coco", "caption", {"images": [image], "annotations": [said]}, []),
        ("vg", "rec", json.loads(regions.read_text()), [pictures]),
        ("vg", "reg", json.loads(pictures.read_text()), [regions]),
        ("release", "as it is", [release], []),
    ]
    for name, kind, data, others in whole:
        assert list(convert.make_records(name, kind, [write(tmp_path, "x.json", data), *others], dict(TEMPLATES), 0))
        for broken in mutations(data):
            try:
                list(convert.make_records(name, kind, [write(tmp_path, "x.json", broken), *others], dict(TEMPLATES), 0))
                complaint = ""
            except ValueError as error:
                complaint = str(error)
            assert not complaint or (str(tmp_path) in complaint and "\n" not in complaint)


def test_missing_pictures(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    paths = okvqa_files(tmp_path)
    flags = ["--ann", *map(str, paths), "--images", str(tmp_path), "--out", str(tmp_path / "out.jsonl")]
    assert convert.main(["convert", "okvqa", *flags]) == 2
    error = capsys.readouterr().err
    assert "the image val2014/COCO_val2014_000000297147.jpg is not below" in error
    assert "--skip-missing" in error
    assert not (tmp_path / "out.jsonl").exists()
    assert not (tmp_path / ".out.jsonl.new").exists()
    assert convert.main(["convert", "okvqa", *flags, "--skip-missing"]) == 2
    assert "no record can be written; 1 records without a picture left out" in capsys.readouterr().err
    templates = write(tmp_path, "t.json", {"vqa": ["{question}"]})
    for out in (paths[0], templates, tmp_path, "/dev/full", ""):
        argv = ["convert", "okvqa", *flags[:-1], str(out), "--templates", str(templates)]
        assert convert.main(argv) == 2
        said = f"--out {out or '.'} is a folder, a device or a file that is read: choose another one"
        assert capsys.readouterr().err == f"lion_mini.data: {said}\n"
    assert convert.main(["convert", "okvqa", *flags, "--as", ""]) == 2
    assert "okvqa has no --as , only vqa, vqg" in capsys.readouterr().err


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    found = converted(tmp_path, "vg", *vg_files(tmp_path))
    bad = found[0] | {"answer": "[0.1,0.2,1.5,0.3]"}
    gone = found[0] | {"image": "gone.jpg"}
    path = write(tmp_path, "all.jsonl", [*found, bad, gone], lines=True)
    picture = tmp_path / "three.png"
    command = ["inspect", str(path), "--images", str(tmp_path / "images"), "--picture", str(picture)]
    capsys.readouterr()
    assert convert.main(command) == 0
    out = capsys.readouterr().out
    assert "3 records" in out
    assert "1 whose picture is not below" in out
    assert "1 that cannot be used, 1 of them for a box out of range" in out
    assert "record 2: [0.1,0.2,1.5,0.3] is no box" in out  # the number that training gives it
    assert "words in the question of record 3:" in out
    assert Image.open(picture).size == (340, 420)
    assert convert.main([*command[:-1], str(tmp_path / "a.txt")]) == 2
    assert f"{tmp_path}/a.txt: unknown file extension" in capsys.readouterr().err
    damaged = tmp_path / "images" / found[0]["image"]
    damaged.write_bytes(damaged.read_bytes()[:60])
    assert convert.main(command) == 0
    assert f"record 1: {damaged}: " in capsys.readouterr().out
    (tmp_path / "empty.jsonl").touch()
    assert convert.main(["inspect", str(tmp_path / "empty.jsonl")]) == 2
    assert "holds no record" in capsys.readouterr().err


def test_every_instruction_is_drawn(tmp_path: Path) -> None:
    paths = okvqa_files(tmp_path, "train")
    asked = {converted(tmp_path, "okvqa", *paths, seed=str(i))[0]["question"] for i in range(60)}
    assert asked == {render(text, question="What sport?") for text in pool(TEMPLATES)["vqa"]}
