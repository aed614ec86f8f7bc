"""Boxes as text, the tag sentence, and the templates."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN, ROOT

from lion_mini.box import Box
from lion_mini.pipeline import Lion
from lion_mini.text.prompts import (
    EVAL_TEMPLATES,
    PLACEHOLDER,
    RELEASE,
    TASK_OF,
    TEMPLATES,
    load_templates,
    pool,
    render,
    tag_sentence,
)

MISC = json.loads((ROOT / "tests" / "fixtures" / "misc_fixture.json").read_text())


@pytest.mark.parametrize("case", MISC["rec_parse"]["cases"], ids=lambda case: case["text"] or "empty")
def test_parse(case: dict[str, Any]) -> None:
    """As Shikra's scorer, except for what DATA_EVAL allows: spaces, `.1`, and text or boxes after the first."""
    more = {
        "[0.525, 0.0, 0.675, 0.394]": [0.525, 0.0, 0.675, 0.394],
        "[0.1 ,0.2,0.3,0.4]": [0.1, 0.2, 0.3, 0.4],
        "[.1,.2,.3,.4]": [0.1, 0.2, 0.3, 0.4],
        "[0.1,0.2,0.3,0.4] and [0.5,0.6,0.7,0.8]": [0.1, 0.2, 0.3, 0.4],
    }
    expected = more.get(case["text"], case["shikra"])
    assert Box.parse(case["text"]) == (expected and Box(*expected))


@pytest.mark.parametrize("case", MISC["box_format"]["cases"], ids=lambda case: case["shikra"])
def test_box_text(case: dict[str, Any]) -> None:
    x1, y1, x2, y2 = case["xyxy"]
    box = Box.from_pixels(x1, y1, x2, y2, case["width"], case["height"])
    assert box.to_text() == case["shikra"]
    assert Box.parse(case["paper_style"]) == Box.parse(case["shikra"])
    inside = [min(max(v, 0), size) for v, size in zip(case["xyxy"], [case["width"], case["height"]] * 2, strict=True)]
    assert box.to_pixels(case["width"], case["height"]) == pytest.approx(inside)


def test_iou() -> None:
    first, *rest = MISC["rec_iou"]["cases"]
    x, y, w, h = first["gt_xywh"]
    truth = Box.from_pixels(x, y, x + w, y + h, first["width"], first["height"])
    found = Box.parse(first["pred_text"])
    assert found is not None
    assert found.iou(truth) == pytest.approx(first["iou"], abs=1e-12)
    for case in rest:
        pred, gt = Box(*case["pred"]), Box(*case["gt"])
        assert pred.iou(gt) == pytest.approx(case["iou"])
        assert gt.iou(pred) == pred.iou(gt)
        assert (pred.iou(gt) >= 0.5) == case["correct_ge"]
    assert Box(0, 0, 0.25, 1).iou(Box(0.5, 0, 0.75, 1)) == 0


@pytest.mark.parametrize(
    "text",
    [
        "[__import__('os'),0,0,1]",
        "[0,0,1,exit()]",
        "[0,0,1,1e0]",
        "[0,0,0x1,1]",
        "[nan,0,1,1]",
        "[inf,0,1,1]",
        "[0..1,0,1,1]",
        "[0,0,1,1.001]",
        "[٠,0,1,1]",
        "[0,0,1," + "9" * 9999 + "]",
        "[" * 9999,
        "[" + " " * 9999,
        "[" + "1" * 9999,
    ],
    ids=lambda text: text[:30],
)
def test_parse_takes_numbers_only(text: str) -> None:
    assert Box.parse(text) is None


def test_parse_survives_any_string() -> None:
    rng = random.Random(0)
    parsed = 0
    for _ in range(20000):
        text = "".join(rng.choices("[[],,,,..0123456789 -eé\n", k=rng.randint(0, 40)))
        text = rng.choice([text, f"[0.{rng.randint(0, 999)}, {text[:1]}0.5,1,{text[1:3]}1]" + text])
        box = Box.parse(text)
        if box is not None:
            parsed += 1
            assert all(0 <= v <= 1 for v in (box.x1, box.y1, box.x2, box.y2))
            again = Box.parse("Answer: " + box.to_text())
            assert again is not None
            assert max(abs(box.x1 - again.x1), abs(box.y2 - again.y2)) <= 0.0005 + 1e-9
    assert parsed > 200


def test_checked_box() -> None:
    assert Box.checked(0, 0.25, 0.5, 1) == Box(0, 0.25, 0.5, 1)
    with pytest.raises(ValueError, match=r"the box 0.5,0.2,0.3,0.9 is inverted, empty or outside the image: 0 <= x1"):
        Box.checked(0.5, 0.2, 0.3, 0.9)
    empty = (0.5, 0.2, 0.6, 0.2), (0.5, 0.2, 0.5, 0.3)
    for bad in (*empty, (-0.1, 0, 1, 1), (0, 0, 1, 20), (0, math.nan, 1, 1)):
        with pytest.raises(ValueError, match="outside the image"):
            Box.checked(*bad)


@pytest.mark.parametrize("numbers", [(0, 0, 1, 1, 0, 5), (0, 0, 1, 1, 5, -5), (0, math.nan, 1, 1, 5, 5)])
def test_pixels_without_fractions(numbers: tuple[float, float, float, float, float, float]) -> None:
    with pytest.raises(ValueError, match="has no fractions"):
        Box.from_pixels(*numbers)


def test_tag_sentence() -> None:
    for sample in json.loads((GOLDEN / "golden.json").read_text())["samples"]:
        for tags, question, prompt in zip(sample["tags"], sample["question"], sample["prompts"], strict=True):
            assert tag_sentence(tags) + question == prompt
            assert tag_sentence(tags.split(", ")) + question == prompt
    bare = tag_sentence(["beer", "table"], soft_prompt=False)
    assert bare == "You are allowed to use or partially use the following tags: [beer, table]. "
    assert PLACEHOLDER not in bare


def test_templates() -> None:
    assert {kind: TASK_OF[kind] for kind in TEMPLATES} == {
        "caption": "image", "vqa": "image", "vqg": "image", "rec": "region", "reg": "region", "dialogue": "image",
    }  # fmt: skip
    assert set(TASK_OF) == set(TEMPLATES) | set(EVAL_TEMPLATES)
    assert {kind for kind, task in TASK_OF.items() if task == "region"} == {"rec", "reg"}
    fields = {"vqa": "question", "vqg": "answer", "rec": "expression", "reg": "box", "dialogue": "question"}
    for kind, templates in TEMPLATES.items():
        assert len(set(templates)) == len(templates)
        assert not [*templates][5 + (kind in ("rec", "reg")) :]  # Table 9 prints five, and six for boxes
        for template in templates:
            filled = render(template, **({fields[kind]: "THIS"} if kind in fields else {}))
            assert "{" not in filled
            assert filled.count("THIS") == (kind in fields)


def test_eval_prompts() -> None:
    assert render(EVAL_TEMPLATES["caption"]) == "A short image description:"
    assert render(EVAL_TEMPLATES["vqa"], question="what is it?") == "Question: what is it? Short answer:"
    assert render(EVAL_TEMPLATES["iconqa"], question="How many?") == "How many?"
    assert (
        render(EVAL_TEMPLATES["vsr"], question="The cat is on the mat.")
        == 'Based on the image, is this statement true or false? "The cat is on the mat." Answer:'
    )
    talk = EVAL_TEMPLATES["visdial"]
    assert render(talk, history="q: a a: b", question="c") == "Dialog history: q: a a: b\nQuestion: c Short answer:"
    assert render(talk, history="", question="c") == "Question: c Short answer:"
    # the release's playground.ipynb, letter by letter
    assert render(RELEASE["rec"], expression="green plant behind a table visible behind a lady ' s head") == (
        "In the image <image>, can you locate green plant behind a table visible behind a lady ' s head "
        "and let me know its coordinates?"
    )
    assert render(EVAL_TEMPLATES["mmbench"], hint="", question="Q?", options="A. x\nB. y") == (
        "Question: Q?\nOptions:\nA. x\nB. y\nPlease select the correct answer from the options above. \n"
    )
    assert render(EVAL_TEMPLATES["mmbench"], hint="H", question="Q?", options="A. x").startswith(
        "Hint: H\nQuestion: Q?"
    )


def test_render_fills_once() -> None:
    """Braces in what a user writes are text."""
    assert render("{question} {0} {}", question="{answer} {question.__class__}") == (
        "{answer} {question.__class__} {0} {}"
    )
    assert render("at {box}!", box=Box(0, 0.25, 0.5, 1)) == "at [0.000,0.250,0.500,1.000]!"
    with pytest.raises(ValueError, match="needs question"):
        render("{question}", answer="yes")


def test_load_templates(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"rec": ["In <image> find <expr>.", "Box of {expression}"], "reg": ["What is <objs>?"]}))
    mine = load_templates(path)
    assert mine["rec"] == ("In <image> find {expression}.", "Box of {expression}")
    assert mine["reg"] == ("What is {box}?",)
    assert mine["vqa"] == TEMPLATES["vqa"]
    assert pool(mine)["rec"] == [*mine["rec"], EVAL_TEMPLATES["rec"], RELEASE["rec"]]
    lists = [tmp_path / "REC.json", tmp_path / "REG.json", tmp_path / "VQA.json"]  # as Shikra publishes them
    for path, text in zip(
        lists, ("Where is <expr> in <image>?", "<image> What is at <objs>?", "<question>"), strict=True
    ):
        path.write_text(json.dumps([text, f"{text} "]))
    mine = load_templates(*lists)
    assert mine["rec"] == ("Where is {expression} in <image>?", "Where is {expression} in <image>? ")
    assert mine["reg"][0] == "<image> What is at {box}?"
    assert mine["vqa"][0] == "{question}"
    assert mine["dialogue"] == TEMPLATES["dialogue"]


def test_what_is_asked_is_trained(tmp_path: Path) -> None:
    """Lion, infer.py and eval.py ask from `instruction`, RELEASE or Table 9: all are in what `convert` draws from."""
    lion = Lion.from_pretrained("tiny")
    lion.config = replace(lion.config, instructions={})
    for kind, texts in pool(TEMPLATES).items():
        asked = [*TEMPLATES[kind], RELEASE.get(kind, texts[0])]
        asked += [lion.instruction(kind)] if kind in EVAL_TEMPLATES else []
        assert set(asked) == set(texts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not whole JSON"),
        ("\udcff", "is not UTF-8 text"),
        ("[" * 100000, "is nested too deeply"),
        ("[]", "'' must have the same fields"),
        ('"x"', "must be an object or a list, found"),
        ('["x", "<expr>"]', "caption '{expression}' must have the same fields"),
        ('["<expr> <objs>"]', "the task '' is unknown"),
        ('{"vqaa": ["x"]}', "the task 'vqaa' is unknown; there are caption, vqa"),
        ('{"vqa": "x"}', "vqa must be a list, found 'x'"),
        ('{"vqa": []}', "vqa '' must have the same"),
        ('{"vqa": [1]}', "vqa must be text, found 1"),
        ('{"caption": [""]}', "caption '' must have the same"),
        ('{"vqa": ["Answer it."]}', r"vqa 'Answer it.' must have the same fields as 'Given .*\{question\}'"),
        ('{"vqa": ["{question} {answer}"]}', "must have the same fields"),
        ('{"caption": ["Say {answer}"]}', "must have the same fields as 'Can you briefly"),
    ],
)
def test_bad_templates(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=message) as caught:
        load_templates(path)
    assert "mine.json" in str(caught.value)


def test_missing_templates(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere.json: No such file"):
        load_templates(tmp_path / "nowhere.json")


# --- lengths


def test_tags_that_do_not_fit_are_found_by_bisection(monkeypatch: pytest.MonkeyPatch) -> None:
    """RAM's whole list of 4,585 tags takes 14 encodings, not 4,585."""
    lion, calls = Lion.from_pretrained("tiny"), list[str]()
    encode = lion.text.pieces.encode

    def counted(text: str) -> list[int]:
        calls.append(text)
        return encode(text)

    monkeypatch.setattr(lion.text.pieces, "encode", counted)
    tags = [f"tag {i}" for i in range(4585)]
    ids = lion.training_prompt("what is it?", tags)
    assert len(calls) <= 14
    text = lion.text.pieces.decode(ids)
    kept = text.count("tag ")
    assert text.endswith(f"tag {kept - 1}]. what is it?")
    assert len(ids) <= lion.config.max_prompt_tokens < len(encode(lion.prompts(["what is it?"], [tags[: kept + 1]])[0]))


def test_a_question_longer_than_t5_reads_is_refused() -> None:
    lion, pixels = Lion.from_pretrained("tiny"), torch.zeros(1, 3, 48, 48)
    for question, tags in (("word " * 40_000, ["a"]), ("what?", ["tag"] * 4585)):
        with pytest.raises(
            ValueError, match=r"a question and its tags have [0-9,]+ tokens, but T5 reads at most 4,096"
        ):
            lion.generate(pixels, [question], [tags], ["image"])
    with pytest.raises(ValueError, match="a question and its tags have"):
        lion(pixels, ["word " * 40_000], ["a"], [["a"] * 4585], ["image"])
