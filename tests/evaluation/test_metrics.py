"""Every metric against what the reference evaluators computed (tests/fixtures), and against the paper's own tables."""

import json
from typing import Any

import pytest
from conftest import ROOT

from lion_mini.box import Box
from lion_mini.evaluation import metrics

FIXTURES = ROOT / "tests" / "fixtures"
CIDER, VQA, MISC = (json.loads((FIXTURES / f"{name}_fixture.json").read_text()) for name in ("cider", "vqa", "misc"))

# The rows of Tables 1 and 2 that the averages are taken over.
TABLE_1 = ("flickr30k", "coco", "textcaps", "okvqa", "aokvqa", "gqa", "iconqa", "vsr", "visdial")
TABLE_2 = metrics.AVERAGES["REC Avg"]
REC_ROWS = {
    "Kosmos-2": ([52.32, 57.42, 47.26, 45.48, 50.73, 42.24, 60.57, 61.65], 52.21),
    "LION-4B zero-shot": ([57.89, 56.07, 58.40, 46.38, 45.29, 47.50, 64.74, 63.56], 54.98),
    "LION-12B zero-shot": ([58.54, 56.41, 59.36, 45.93, 45.73, 47.89, 66.12, 64.69], 55.58),
    "Shikra-7B": ([87.01, 90.61, 80.24, 81.60, 87.36, 72.12, 82.27, 82.19], 82.93),
    "LION-4B": ([89.73, 92.29, 84.82, 83.60, 88.72, 77.34, 85.69, 85.63], 85.98),
    "LION-12B": ([89.80, 93.02, 85.57, 83.95, 89.22, 78.06, 85.52, 85.74], 86.36),
}


def percent(value: float) -> float:
    return round(100 * value, 2)


# captions


def test_ptb_tokens_of_the_stress_lines() -> None:
    found = metrics.ptb_tokenize([case["raw"] for case in CIDER["tokenizer_cases"]])
    assert len(found) == 60
    for case, tokens in zip(CIDER["tokenizer_cases"], found, strict=True):
        # the lexer joins 1 1/2 by a no-break space, at which CIDEr splits
        assert tokens == case["tokens"].split(), case["raw"]


@pytest.mark.parametrize("case", CIDER["cases"], ids=lambda case: case["name"])
def test_cider_equals_the_java_pipeline(case: dict[str, Any]) -> None:
    images = case["images"]
    references, hypotheses = [i["references"] for i in images], [i["hypothesis"] for i in images]
    corpus, scores = metrics.cider(references, hypotheses)
    assert corpus == pytest.approx(case["corpus_cider"], abs=1e-9)
    assert scores == pytest.approx([i["cider"] for i in images], abs=1e-9)

    names = [i["image_id"] for i in images]
    reverse = dict(reversed(list(zip(names, hypotheses, strict=True))))
    again, by_name = metrics.cider(dict(zip(names, references, strict=True)), reverse)
    assert again == corpus
    assert [by_name[name] for name in names] == scores

    tokens = metrics.ptb_tokenize([caption for captions in references for caption in captions])
    assert [" ".join(t) for t in tokens] == [" ".join(t.split()) for i in images for t in i["ref_tokens"]]
    assert [" ".join(t) for t in metrics.ptb_tokenize(hypotheses)] == [
        " ".join(i["hyp_tokens"].split()) for i in images
    ]


def test_tokens_stay_with_their_caption() -> None:
    """Nothing that some editor takes for a line end may shift the captions behind it."""
    captions = ["a\nb", "c\r\nd", "e\x0bf\x0cg", "h\x85i\u2028j", "", "k"]
    assert metrics.ptb_tokenize(captions) == [["a", "b"], ["c", "d"], ["e", "f", "g"], ["h", "i", "j"], [], ["k"]]
    assert metrics.ptb_tokenize([]) == []
    assert metrics.ptb_tokenize([""]) == [[]]


def test_the_next_caption_decides_about_a_letter_and_a_period() -> None:
    assert metrics.ptb_tokenize(["plan B.", "The cat"])[0] == ["plan", "b"]
    assert metrics.ptb_tokenize(["plan B.", "cats"])[0] == ["plan", "b."]


def test_ptb_tokens_beyond_the_fixture() -> None:
    """Checked against CoreNLP 3.4.1 itself, as 102,502 lines of captions were (2 differed)."""
    lines = {
        "12:30-1:00 or 1/2-inch ½cup 2½": "12:30 -1:00 or 1/2-inch 1/2 cup 2 1/2",
        "3.5ft a.1 7.up 5.a .5": "3.5 ft a. 1 7 up 5 a .5",
        "shouldn't've I'd've y'all's d'or": "should n't 've i 'd 've y' all 's d'or",
        "R&B black&white": "r&b black & white",
        "a...b c..d stop!Stop man/woman.The": "a. b c. d stop!stop man/woman the",
        "Dr.Pepper Dr. Pepper no.5 Sat. Apr.": "dr.pepper dr. pepper no. 5 sat apr.",
        ":) *a* ** a__b @@ £5 5€ 10°": ":-rrb- * a * ** a __ b @@ # 5 5 $ 10 °",
    }
    assert metrics.ptb_tokenize(list(lines)) == [line.split() for line in lines.values()]


def test_cider_refuses_what_it_cannot_score() -> None:
    with pytest.raises(ValueError, match="1 images have references and 2 have a hypothesis"):
        metrics.cider([["a"]], ["a", "b"])
    with pytest.raises(ValueError, match="1 images have references and 1 have a hypothesis: not the same"):
        metrics.cider({"x": ["a"]}, {"y": "a"})
    with pytest.raises(ValueError, match="image 1 needs a list"):
        metrics.cider([["a"], []], ["a", "b"])
    with pytest.raises(ValueError, match="image 0 needs a list"):
        metrics.cider(["a cat"], ["a cat"])
    with pytest.raises(ValueError, match="0 images"):
        metrics.cider([], [])


# short answers


@pytest.mark.parametrize("case", VQA["cases"], ids=lambda case: f"{case['id']}-{case['prediction'].strip()}")
def test_vqa_accuracy_equals_both_evaluators(case: dict[str, Any]) -> None:
    prediction, answers = case["prediction"], case["answers"]
    assert metrics.normalise_answer(prediction) == case["normalized"]
    assert metrics.vqa_accuracy(prediction, answers, "lavis") == pytest.approx(case["accuracy_lavis"], abs=1e-9)
    assert metrics.vqa_accuracy(prediction, answers) == pytest.approx(case["accuracy_official"], abs=1e-9)
    assert answers == case["answers"]
    if len(set(answers)) > 1:
        assert [metrics.normalise_answer(answer) for answer in answers] == case["gt_after_official"]


def test_vqa_accuracy_overall() -> None:
    assert len(VQA["cases"]) == 69
    for variant, overall in (("lavis", VQA["overall_lavis"]), ("official", VQA["overall_official"])):
        scores = [metrics.vqa_accuracy(c["prediction"], c["answers"], variant) for c in VQA["cases"]]  # type: ignore[arg-type]
        assert percent(sum(scores) / len(scores)) == overall


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("couldnt've couldn'tve couldntve", "couldn't've couldn't've couldntve"),
        ("Yall'd've", "y'all'd've"),
        ("ow's'at lets she's", "'ow's'at lets she's"),
        ("1,5 cat/dog", "15 catdog"),  # a number with a comma anywhere changes what happens to every mark
        ("cat/dog", "cat dog"),
        ("." * 33 + "a", ".a"),  # and the 33rd period stays
        ("None of the three", "0 of 3"),
    ],
)
def test_normalise_answer_keeps_the_evaluators_quirks(text: str, expected: str) -> None:
    assert metrics.normalise_answer(text) == expected


def test_direct_answers_of_aokvqa() -> None:
    cases = VQA["aokvqa"]["cases"]
    scores = [metrics.direct_answer_accuracy(case["prediction"], case["direct_answers"]) for case in cases]
    assert scores == pytest.approx([case["accuracy"] for case in cases])
    assert 100 * sum(scores) / len(scores) == pytest.approx(VQA["aokvqa"]["overall_lavis"])
    kept = [score for score, case in zip(scores, cases, strict=True) if not case["difficult_direct_answer"]]
    assert 100 * sum(kept) / len(kept) == pytest.approx(VQA["aokvqa"]["overall_official"])


def test_gqa_match() -> None:
    cases = VQA["gqa"]["cases"]
    found = [metrics.gqa_match(case["prediction"], case["answer"]) for case in cases]
    assert found == [bool(case["correct_lavis"]) for case in cases]
    assert 100 * sum(found) / len(found) == pytest.approx(VQA["gqa"]["overall_lavis"])
    exact = [metrics.gqa_match(case["prediction"], case["answer"], "official") for case in cases]
    assert exact == [bool(case["correct_exact"]) for case in cases]


def test_short_answers_refuse_another_variant() -> None:
    with pytest.raises(ValueError, match="not 'blip'"):
        metrics.vqa_accuracy("a", ["a"], "blip")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not 'blip'"):
        metrics.gqa_match("a", "a", "blip")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one data point"):
        metrics.vqa_accuracy("a", [])


# ranked candidates


def test_rank_and_mrr() -> None:
    cases = MISC["ranking_mrr"]["cases"]
    ranks = [metrics.rank([-loss for loss in case["losses"]], case["gt_index"]) for case in cases]
    assert ranks == [case["rank"] for case in cases]
    found = metrics.ranking(ranks)
    assert found.mrr == pytest.approx(MISC["ranking_mrr"]["mrr"])
    assert found.recall[1] == pytest.approx(MISC["ranking_mrr"]["top1"])


def test_recall_counts_the_kth_place() -> None:
    found = metrics.ranking([1, 5, 6, 10, 11, 100])
    assert found.recall == pytest.approx({1: 1 / 6, 5: 2 / 6, 10: 4 / 6})
    assert found.mean_rank == pytest.approx(133 / 6)


def test_no_ranks_have_no_mean() -> None:
    with pytest.raises(ValueError, match="at least one data point"):
        metrics.ranking([])


# boxes


def test_grounding_of_the_fixture() -> None:
    """The release's own answer in its notebook, and six boxes of which one lies exactly on the threshold."""
    first, *rest = MISC["rec_iou"]["cases"]
    x, y, w, h = first["gt_xywh"]
    truth = Box.from_pixels(x, y, x + w, y + h, first["width"], first["height"])
    answered = Box.parse(first["pred_text"])
    assert answered is not None
    assert answered.iou(truth) == pytest.approx(first["iou"])
    assert metrics.grounding([first["pred_text"]], [truth]) == metrics.Grounding(accuracy=1.0, unparsed=0.0)
    for case in rest:
        answer, true = [str(list(map(float, case["pred"])))], [Box(*case["gt"])]
        assert metrics.grounding(answer, true).accuracy == case["correct_ge"]
        assert metrics.grounding(answer, true, strict=True).accuracy == case["correct_gt"]


def test_grounding_counts_what_it_cannot_read_as_wrong() -> None:
    """Two boxes to an answer are read as the first, where Shikra's evaluator gives up."""
    whole = Box(0, 0, 1, 1)
    found = metrics.grounding(["[0,0,1,1]", "a dog", "", "[0.9,0.9,0.1,0.1]", "[0,0,1,1] and [0,0,0,0]"], [whole] * 5)
    assert found == metrics.Grounding(accuracy=2 / 5, unparsed=2 / 5)
    assert metrics.grounding(["[0,0,0.5,1]"], [whole], threshold=0.6).accuracy == 0
    with pytest.raises(ValueError, match="argument 2 is longer than argument 1"):
        metrics.grounding(["[0,0,1,1]"], [whole, whole])


# yes and no


def test_pope_equals_the_evaluator() -> None:
    fixture = MISC["pope"]
    for case in fixture["cases"]:
        assert metrics.pope_answer(case["answer"]) == case["parsed"], case["answer"]
    found = metrics.pope([c["answer"] for c in fixture["cases"]], [c["label"] for c in fixture["cases"]])
    assert found == metrics.Pope(*(fixture[count] for count in ("TP", "FP", "TN", "FN")))
    for rate in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
        assert getattr(found, rate) == pytest.approx(fixture[rate]), rate


@pytest.mark.parametrize("row", MISC["pope_lion_table5"]["rows"], ids=lambda row: row["split"])
def test_pope_rates_of_table_5(row: dict[str, Any]) -> None:
    found = metrics.Pope(*(row[count] for count in ("TP", "FP", "TN", "FN")))
    for rate in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
        assert percent(getattr(found, rate)) == row[rate], rate


def test_pope_without_a_yes() -> None:
    found = metrics.pope(["no"], ["no"])
    assert (found.accuracy, found.precision, found.recall, found.f1, found.yes_ratio) == (1, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="not 'Yes'"):
        metrics.pope(["yes"], ["Yes"])
    with pytest.raises(ValueError, match="argument 2 is shorter than argument 1"):
        metrics.pope(["yes", "no"], ["yes"])


# letters


def test_mmbench_needs_every_rotation() -> None:
    abilities = list(metrics.MMBENCH_ABILITIES)
    rows = [
        (group["index"] + turn * 1_000_000, abilities[min(n, 2)], answer == prediction)
        for n, group in enumerate(MISC["mmbench_circular"]["groups"])
        for turn, (answer, prediction) in enumerate(zip(group["answers"], group["preds"], strict=True))
    ]
    expected = {"Overall": MISC["mmbench_circular"]["overall"], "LR": 1.0, "AR": 0.0, "RR": 0.5}
    assert metrics.mmbench(rows) == expected
    assert metrics.mmbench(rows[::-1]) == expected


def test_mmbench_columns_of_table_6() -> None:
    """Overall is the mean over questions, so a large ability weighs more."""
    rows = [(i, ability, True) for i, ability in enumerate(metrics.MMBENCH_ABILITIES)]
    rows += [(100 + i, "coarse_perception", False) for i in range(2)]
    found = metrics.mmbench(rows)
    assert list(found) == ["Overall", "LR", "AR", "RR", "FP-S", "FP-C", "CP"]
    assert found["CP"] == pytest.approx(1 / 3)
    assert found["Overall"] == pytest.approx(6 / 8)


def test_mmbench_refuses_broken_files() -> None:
    with pytest.raises(ValueError, match="question 7 has rotations but not its own row"):
        metrics.mmbench([(1_000_007, "logic_reasoning", True)])


# the tables' own means


@pytest.mark.parametrize("model", REC_ROWS)
def test_the_average_of_table_2(model: str) -> None:
    row, printed = REC_ROWS[model]
    found = metrics.averages(dict(zip(TABLE_2, row, strict=True)))
    assert found == {"REC Avg": pytest.approx(printed, abs=0.00501)}


def test_held_in_and_held_out() -> None:
    """LION-4B's row of Table 1, halved as Tables 3 and 4 do."""
    row = dict(zip(TABLE_1, [85.57, 138.20, 104.87, 51.08, 59.98, 49.50, 54.91, 72.96, 50.02], strict=True))
    assert metrics.averages(row) == pytest.approx({"Held-in": 88.5325, "Held-out": 62.592})
    assert metrics.averages({name: row[name] for name in row if name != "vsr"}) == pytest.approx({"Held-in": 88.5325})
