"""The paper's benchmarks: how each is asked and scored, and what LION got in Tables 1, 2, 5 and 6.

    kind     what the model does            score                          prompt
    caption  writes                         CIDEr                          A short image description:
    vqa      writes, in a word or two       agreement with annotators      Question: {question} Short answer:
    pope     writes yes or no               F1                             the question alone
    rec      writes a box                   Acc@0.5                        In the image, can you locate ...
    iconqa, vsr, visdial, mmbench           ranks candidates; top-1, or the mean reciprocal rank

next: ../eval.py
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import metrics
from .readers import TASKS, Example

KIND_OF = {
    "flickr30k": "caption", "coco": "caption", "textcaps": "caption", "okvqa": "vqa", "aokvqa": "vqa", "gqa": "vqa",
    "iconqa": "iconqa", "vsr": "vsr", "visdial": "visdial", "refcoco": "rec", "refcoco+": "rec", "refcocog": "rec",
    "pope": "pope", "mmbench": "mmbench",
}  # fmt: skip
RANKED = ("iconqa", "vsr", "visdial", "mmbench")
PRINTED = {  # the number that the paper prints, of several that are measured
    "caption": "CIDEr", "okvqa": "VQA accuracy", "aokvqa": "direct answer", "gqa": "accuracy", "iconqa": "top-1",
    "vsr": "top-1", "visdial": "MRR", "rec": "Acc@0.5", "pope": "F1", "mmbench": "Overall",
}  # fmt: skip
# LION-4B and LION-12B as the paper and the pictures of its tables in the release's README print them.
_TABLE_1 = ("flickr30k", "coco", "textcaps", "okvqa", "aokvqa", "gqa", "iconqa", "vsr", "visdial")
_TABLE_2 = metrics.AVERAGES["REC Avg"]
PAPER = {
    "4B": dict(zip(_TABLE_1, (85.57, 138.20, 104.87, 51.08, 59.98, 49.50, 54.91, 72.96, 50.02), strict=True))
    | dict(zip(_TABLE_2, (89.73, 92.29, 84.82, 83.60, 88.72, 77.34, 85.69, 85.63), strict=True)),
    "12B": dict(zip(_TABLE_1, (87.12, 139.25, 108.76, 57.33, 60.87, 51.56, 54.89, 73.77, 50.42), strict=True))
    | dict(zip(_TABLE_2, (89.80, 93.02, 85.57, 83.95, 89.22, 78.06, 85.52, 85.74), strict=True)),
}
ZERO_SHOT = {  # Table 2's upper half: before RefCOCO's own training sets
    "4B": dict(zip(_TABLE_2, (57.89, 56.07, 58.40, 46.38, 45.29, 47.50, 64.74, 63.56), strict=True)),
    "12B": dict(zip(_TABLE_2, (58.54, 56.41, 59.36, 45.93, 45.73, 47.89, 66.12, 64.69), strict=True)),
}
_RATES = ("accuracy", "precision", "recall", "F1")
POPE = {  # Table 5 has one column, "LION", and does not say of which size
    "pope_random": dict(zip(_RATES, (88.97, 97.12, 81.00, 88.33), strict=True)),
    "pope_popular": dict(zip(_RATES, (86.77, 91.69, 80.87, 85.94), strict=True)),
    "pope_adversarial": dict(zip(_RATES, (85.37, 88.69, 81.07, 84.71), strict=True)),
}
MMBENCH = {  # Table 6, FlanT5-XXL
    "Overall": 73.4, "LR": 51.7, "AR": 84.1, "RR": 78.4, "FP-S": 74.0, "FP-C": 60.8, "CP": 78.9,
}  # fmt: skip
OPEN = {  # what the paper leaves open, or where its setting is known to differ
    "aokvqa": "all questions count, difficult ones too, as in LAVIS; predictions are lower-cased",
    "okvqa": "predictions are never lemmatised, worth some five points; the paper does not say whether its were",
    "vsr": "the paper's percentages are those of 1,224 statements: the file's 1,222, padded",
    "visdial": 'the history reads "q: ... a: ..."; the paper does not print its form',
    "mmbench": "option texts are ranked; the paper does not say how it chose, its numbers are the test server's",
    "pope": "the question is asked as it is; the paper does not print its prompt, nor the size of its LION",
}


def kind_of(task: str) -> str:
    return KIND_OF[task.partition("_")[0]]


def score(task: str, examples: Sequence[Example], predictions: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Every metric of the benchmark, in the tables' units; the one that the paper prints comes first."""
    kind = kind_of(task)
    if kind in RANKED:
        for example, line in zip(examples, predictions, strict=True):
            found = line.get("scores")
            if not isinstance(found, list) or len(found) != len(example.candidates) or not all(map(finite, found)):
                raise ValueError(f"the prediction of {example.id} needs {len(example.candidates)} finite scores")
        return ranked(kind, examples, [line["scores"] for line in predictions])
    for example, line in zip(examples, predictions, strict=True):
        if not isinstance(line.get("text"), str):
            raise ValueError(f"the prediction of {example.id} needs a text")
    texts, many = [line["text"] for line in predictions], len(examples)
    if kind == "caption":
        return {"CIDEr": 100 * metrics.cider([e.references for e in examples], texts)[0]}
    if kind == "rec":
        boxes = [example.box for example in examples if example.box]
        found = metrics.grounding(texts, boxes)
        strict = metrics.grounding(texts, boxes, strict=True)
        return {"Acc@0.5": 100 * found.accuracy, "Acc>0.5": 100 * strict.accuracy, "no box": 100 * found.unparsed}
    if kind == "pope":
        counts = metrics.pope(texts, [example.references[0] for example in examples])
        rates = {"F1": counts.f1, "accuracy": counts.accuracy, "precision": counts.precision, "recall": counts.recall}
        return {name: 100 * value for name, value in (rates | {"yes": counts.yes_ratio}).items()}
    pairs = list(zip(texts, examples, strict=True))
    if task == "okvqa":
        lavis, official = (
            sum(metrics.vqa_accuracy(text, e.references, variant) for text, e in pairs)
            for variant in ("lavis", "official")
        )  # fmt: skip
        return {"VQA accuracy": 100 * lavis / many, "VQA accuracy (official)": 100 * official / many}
    if task == "aokvqa":
        right = [metrics.direct_answer_accuracy(text.strip().lower(), e.references) for text, e in pairs]
        easy = [value for value, e in zip(right, examples, strict=True) if not e.group]
        found_all = {"direct answer": 100 * sum(right) / many}
        return found_all | ({"without difficult": 100 * sum(easy) / len(easy)} if easy else {})
    lavis, exact = (
        sum(metrics.gqa_match(text.strip(), e.references[0], variant) for text, e in pairs)
        for variant in ("lavis", "official")
    )  # fmt: skip
    return {"accuracy": 100 * lavis / many, "accuracy (exact)": 100 * exact / many}


def finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def ranked(kind: str, examples: Sequence[Example], scores: Sequence[list[float]]) -> dict[str, float]:
    chosen = [max(range(len(row)), key=row.__getitem__) for row in scores]
    if kind == "mmbench":
        if any(example.target is None for example in examples):
            return {}
        rows = ((int(e.id), e.group, best == e.target) for e, best in zip(examples, chosen, strict=True))
        return {name: 100 * value for name, value in metrics.mmbench(rows).items()}
    if kind == "vsr":  # yes or true, no or false
        right = [best // 2 * 2 == e.target for best, e in zip(chosen, examples, strict=True)]
        plain = [(row[1] >= row[3]) == (e.target == 0) for row, e in zip(scores, examples, strict=True)]
        return {"top-1": 100 * sum(right) / len(right), "true or false": 100 * sum(plain) / len(plain)}
    found = metrics.ranking([metrics.rank(row, e.target or 0) for row, e in zip(scores, examples, strict=True)])
    if kind == "iconqa":
        return {"top-1": 100 * found.recall[1]}
    return {
        "MRR": 100 * found.mrr,
        **{f"R@{k}": 100 * v for k, v in found.recall.items()},
        "mean rank": found.mean_rank,
    }


def paper(task: str, name: str) -> dict[str, float]:
    """What the paper prints for this metric, by model; empty where it does not."""
    if task in POPE:
        return {"LION": POPE[task][name]} if name in POPE[task] else {}
    if task == "mmbench":
        return {"LION-12B": MMBENCH[name]}
    if name != PRINTED.get(task, PRINTED.get(kind_of(task))):
        return {}
    found = {f"LION-{size}": row[task] for size, row in PAPER.items()}
    return found | {f"zero-shot LION-{size}": row[task] for size, row in ZERO_SHOT.items() if task in row}


def report(result: dict[str, Any]) -> str:
    """One line per metric, ours and then the paper's, and what differs in the setting."""
    task = result["task"]
    lines = [f"{task}, {result['count']:,} examples"]
    for name, value in result["scores"].items():
        theirs = ", ".join(f"{model} {number:.2f}" for model, number in paper(task, name).items())
        lines.append(f"  {name:24}{value:8.2f}" + f"   paper: {theirs}" * bool(theirs))
    return "\n".join([*lines, *(f"  differs: {note}" for note in result["differs"])])


def table(folder: Path) -> str:
    """A folder's results as Markdown, and the paper's averages where all that one needs is there."""
    results = []
    for path in sorted(folder.glob("*.json")):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        if isinstance(found, dict) and found.get("task") in TASKS and found.get("scores"):
            results.append(found)
    if not results:
        raise ValueError(f"{folder} holds no result: eval.py TASK writes TASK.json there")
    results.sort(key=lambda result: TASKS.index(result["task"]))
    lines = ["| benchmark | metric | ours | LION-4B | LION-12B | examples | differs |", "|---|---|---|---|---|---|---|"]
    for result in results:
        for name, value in result["scores"].items():
            theirs = paper(result["task"], name)
            if theirs:
                small, large = (f"{theirs[m]:.2f}" if m in theirs else "" for m in ("LION-4B", "LION-12B"))
                small = f"{theirs['LION']:.2f}, size not said" if "LION" in theirs else small
                notes = "; ".join(result["differs"])
                lines.append(
                    f"| {result['task']} | {name} | {value:.2f} | {small} | {large} | {result['count']:,} | {notes} |"
                )
    theirs_4b, theirs_12b = (metrics.averages(row) for row in PAPER.values())
    ours = {result["task"]: next(iter(result["scores"].values())) for result in results}
    for name, value in metrics.averages(ours).items():
        lines.append(f"| {name} | mean | {value:.2f} | {theirs_4b[name]:.2f} | {theirs_12b[name]:.2f} | | |")
    return "\n".join(lines)
