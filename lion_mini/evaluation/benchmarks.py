"""The paper's benchmarks: how each is read, asked and scored, and what LION got (Tables 1, 2, 5 and 6).

A new benchmark is one entry in BENCHMARKS and one reader in readers.py:

    Benchmark("my_vqa", readers.my_vqa, "vqa", vqa_scores, 500),
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ..box import Box
from ..files import json_lines, need, read_json, reading
from ..images import ImageFolder, draw_boxes, draw_sheet, open_image
from . import metrics, readers
from .readers import Example, Line

Scores = dict[str, float]  # by metric, as the tables print it; the paper's metric comes first


@dataclass(frozen=True)
class Benchmark:
    """One row of the paper's tables."""

    name: str
    reader: Callable[[Sequence[Path]], Iterable[Example]]
    kind: str  # how it is asked: the key of its instruction in EVAL_TEMPLATES
    scorer: Callable[[Sequence[Example], Any], Scores]  # takes texts, or the log-likelihoods of all candidates
    count: int = 0  # of examples in the paper's benchmark
    paper: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # its numbers, by metric and model
    differs: str = ""  # what the paper leaves open, or where its setting is known to differ


best = lambda row: max(range(len(row)), key=row.__getitem__)
percent = lambda values: 100 * sum(listed := [*values]) / len(listed)
caption_scores = lambda examples, texts: {"CIDEr": 100 * metrics.cider([e.references for e in examples], texts)[0]}
choice_scores = lambda examples, rows: {"top-1": rank_scores(examples, rows)["R@1"]}


def vqa_scores(examples: Sequence[Example], texts: Sequence[str]) -> Scores:
    pairs = [*zip(texts, (e.references for e in examples), strict=True)]
    lavis, official = (percent(metrics.vqa_accuracy(*pair, variant) for pair in pairs) for variant in metrics.VARIANTS)
    return {"VQA accuracy": lavis, "VQA accuracy (official)": official}


def direct_scores(examples: Sequence[Example], texts: Sequence[str]) -> Scores:
    said = [text.strip().lower() for text in texts]
    right = [metrics.direct_answer_accuracy(text, e.references) for text, e in zip(said, examples, strict=True)]
    easy = [value for value, example in zip(right, examples, strict=True) if example.group != "difficult"]
    return {"direct answer": percent(right)} | ({"without difficult": percent(easy)} if easy else {})


def gqa_scores(examples: Sequence[Example], texts: Sequence[str]) -> Scores:
    pairs = [(text.strip(), e.references[0]) for text, e in zip(texts, examples, strict=True)]
    lavis, exact = (percent(metrics.gqa_match(*pair, variant) for pair in pairs) for variant in metrics.VARIANTS)
    return {"accuracy": lavis, "accuracy (exact)": exact}


def box_scores(examples: Sequence[Example], texts: Sequence[str]) -> Scores:
    boxes = [example.box for example in examples if example.box]
    found, strict = metrics.grounding(texts, boxes), metrics.grounding(texts, boxes, strict=True)
    return {"Acc@0.5": 100 * found.accuracy, "Acc>0.5": 100 * strict.accuracy, "no box": 100 * found.unparsed}


def pope_scores(examples: Sequence[Example], texts: Sequence[str]) -> Scores:
    counts = metrics.pope(texts, [example.references[0] for example in examples])
    rates = {"F1": "f1", "accuracy": "accuracy", "precision": "precision", "recall": "recall", "yes": "yes_ratio"}
    return {name: 100 * getattr(counts, rate) for name, rate in rates.items()}


def rank_scores(examples: Sequence[Example], rows: Sequence[Sequence[float]]) -> Scores:
    found = metrics.ranking([metrics.rank(row, e.target or 0) for row, e in zip(rows, examples, strict=True)])
    recall = {f"R@{k}": 100 * share for k, share in found.recall.items()}
    return {"MRR": 100 * found.mrr, **recall, "mean rank": found.mean_rank}


def truth_scores(examples: Sequence[Example], rows: Sequence[Sequence[float]]) -> Scores:
    """VSR: its candidates are yes and true, no and false."""
    pairs = [*zip(rows, examples, strict=True)]
    top = percent(best(row) // 2 * 2 == e.target for row, e in pairs)
    return {"top-1": top, "true or false": percent((row[1] >= row[3]) == (e.target == 0) for row, e in pairs)}


def mmbench_scores(examples: Sequence[Example], rows: Sequence[Sequence[float]]) -> Scores:
    if any(example.target is None for example in examples):  # the test file hides the answers
        return {}
    answers = ((int(e.id), e.group, best(row) == e.target) for row, e in zip(rows, examples, strict=True))
    return {name: 100 * value for name, value in metrics.mmbench(answers).items()}


def sizes(metric: str, *numbers: float) -> Mapping[str, Mapping[str, float]]:
    """LION-4B and LION-12B, in Table 2 also before they were trained on RefCOCO's own sets."""
    models = ("LION-4B", "LION-12B", "zero-shot LION-4B", "zero-shot LION-12B")
    return {metric: dict(zip(models, numbers, strict=False))}


def rec(name: str, count: int, *numbers: float) -> Benchmark:
    reader = partial(readers.refcoco, split=name.partition("_")[2])
    return Benchmark(name, reader, "rec", box_scores, count, sizes("Acc@0.5", *numbers))


def pope(name: str, count: int, *numbers: float) -> Benchmark:
    paper = {rate: {"LION": n} for rate, n in zip(("accuracy", "precision", "recall", "F1"), numbers, strict=True)}
    note = "the question is asked as it is; the paper does not print its prompt, nor the size of its LION"
    return Benchmark(name, readers.pope, "pope", pope_scores, count, paper, note)


MMBENCH = {"Overall": 73.4, "LR": 51.7, "AR": 84.1, "RR": 78.4, "FP-S": 74.0, "FP-C": 60.8, "CP": 78.9}
BENCHMARKS = {entry.name: entry for entry in (
    Benchmark("flickr30k", readers.captions, "caption", caption_scores, 1000, sizes("CIDEr", 85.57, 87.12)),
    Benchmark("coco", readers.captions, "caption", caption_scores, 5000, sizes("CIDEr", 138.20, 139.25)),
    Benchmark("textcaps", readers.textcaps, "caption", caption_scores, 3166, sizes("CIDEr", 104.87, 108.76)),
    Benchmark("okvqa", readers.vqa, "vqa", vqa_scores, 5046, sizes("VQA accuracy", 51.08, 57.33),
              "predictions are never lemmatised, worth some five points; the paper does not say whether its were"),
    Benchmark("aokvqa", readers.aokvqa, "vqa", direct_scores, 1145, sizes("direct answer", 59.98, 60.87),
              "all questions count, difficult ones too, as in LAVIS; predictions are lower-cased"),
    Benchmark("gqa", readers.vqa, "vqa", gqa_scores, 12578, sizes("accuracy", 49.50, 51.56)),
    Benchmark("iconqa", readers.iconqa, "iconqa", choice_scores, 6316, sizes("top-1", 54.91, 54.89)),
    Benchmark("vsr", readers.vsr, "vsr", truth_scores, 1222, sizes("top-1", 72.96, 73.77),
              "the paper's percentages are those of 1,224 statements: the file's 1,222, padded"),
    Benchmark("visdial", readers.visdial, "visdial", rank_scores, 20640, sizes("MRR", 50.02, 50.42),
              'the history reads "q: ... a: ..."; the paper does not print its form'),
    rec("refcoco_val", 10834, 89.73, 89.80, 57.89, 58.54),
    rec("refcoco_testA", 5657, 92.29, 93.02, 56.07, 56.41),
    rec("refcoco_testB", 5095, 84.82, 85.57, 58.40, 59.36),
    rec("refcoco+_val", 10758, 83.60, 83.95, 46.38, 45.93),
    rec("refcoco+_testA", 5726, 88.72, 89.22, 45.29, 45.73),
    rec("refcoco+_testB", 4889, 77.34, 78.06, 47.50, 47.89),
    rec("refcocog_val", 4896, 85.69, 85.52, 64.74, 66.12),
    rec("refcocog_test", 9602, 85.63, 85.74, 63.56, 64.69),
    pope("pope_random", 2910, 88.97, 97.12, 81.00, 88.33),
    pope("pope_popular", 3000, 86.77, 91.69, 80.87, 85.94),
    pope("pope_adversarial", 3000, 85.37, 88.69, 81.07, 84.71),
    Benchmark("mmbench", readers.mmbench, "mmbench", mmbench_scores, 6666,
              {metric: {"LION-12B": number} for metric, number in MMBENCH.items()},
              "option texts are ranked; the paper does not say how it chose, its numbers are the test server's; sorted "
              "options (B.2) make all rotations of a question alike, so the circular score is no stricter"),
)}  # fmt: skip


def read(name: str, paths: Sequence[Path]) -> list[Example]:
    """The benchmark's examples in the file's order. Ids must be unique."""
    examples, where = list(BENCHMARKS[name].reader(paths)), " and ".join(map(str, paths))
    if not examples:
        raise ValueError(f"{where}: there is no example of {name} in it")
    ((id, count),) = Counter(example.id for example in examples).most_common(1)
    if count > 1:
        raise ValueError(f"{where}: the id {id} stands there twice")
    if lacking := [e.id for e in examples if not (e.box or "".join(e.references + e.candidates))]:
        raise ValueError(f"{where}: {lacking[0]} has no answer")
    return examples


# What coco-caption's, VQA's and GQA's result lists call our id and text; of several in a line the last counts.
THEIR_NAMES = {"image_id": "id", "questionId": "id", "question_id": "id",
               "answer": "text", "prediction": "text", "caption": "text", "text": "text"}  # fmt: skip


def load(path: Path, ids: Sequence[str], expected: Line) -> tuple[Line, dict[str, Line]]:
    """A file's header, if it has one, and its predictions by id. A ValueError if a setting or id is not as expected."""
    asked, made, known = set(ids), Line(), dict[str, Line]()
    for place, line in json_lines(path):
        with reading(place):
            line = need(line, dict) | {ours: line[name] for name, ours in THEIR_NAMES.items() if name in line}
            if "task" in line and "id" not in line:
                made = line
                for name, value in expected.items():
                    if name != "weights" and (was := made.get(name)) != value:
                        raise ValueError(f"made with {name} {was!r}, not {value!r}: choose another --out or --score")
                continue
            if (id := str(line["id"])) in known or id not in asked:
                raise ValueError(f"the id {id} is {'predicted twice' if id in known else 'not in the annotations'}")
            known[id] = line if "scores" in line else line | {"text": str(need(line["text"], (str, float)))}
    return made, known


def score(name: str, examples: Sequence[Example], predictions: Sequence[Mapping[str, Any]]) -> Scores:
    answers: list[Any] = []
    for example, line in zip(examples, predictions, strict=True):
        with reading(f"the prediction of {example.id}"):
            ranked = len(example.candidates)
            answers.append(need(line["scores"], list) if ranked else need(line["text"], str))
            if ranked and [*map(math.isfinite, answers[-1])] != [True] * ranked:
                raise ValueError(f"it needs {ranked} finite scores")
    return BENCHMARKS[name].scorer(examples, answers)


def report(result: Mapping[str, Any]) -> str:
    """One line per metric, ours and then the paper's, and what differs in the setting."""
    name = result["task"]
    lines = [f"{name}, {result['count']:,} examples"]
    for metric, value in result["scores"].items():
        theirs = ", ".join(f"{model} {number:.2f}" for model, number in BENCHMARKS[name].paper.get(metric, {}).items())
        lines.append(f"  {metric:24}{value:8.2f}" + f"   paper: {theirs}" * bool(theirs))
    return "\n".join([*lines, *(f"  differs: {note}" for note in result["differs"])])


def table(folder: Path) -> str:
    """A folder's results as Markdown, and the paper's averages if all their benchmarks are there."""
    lines = ["| benchmark | metric | ours | LION-4B | LION-12B | examples | differs |", "|---|---|---|---|---|---|---|"]
    first = Scores()
    for name, benchmark in BENCHMARKS.items():
        with reading(path := folder / f"{name}.json"):
            result = read_json(path) if path.is_file() else {"scores": {}}
            scores, paper = result["scores"], benchmark.paper
            for metric in [metric for metric in scores if metric in paper] or [*scores][:1]:
                first.setdefault(name, scores[metric])
                cells = {model: f"{number:.2f}" for model, number in paper.get(metric, {}).items()}
                small = f"{cells['LION']}, size not said" if "LION" in cells else cells.get("LION-4B", "")
                row = (name, metric, f"{scores[metric]:.2f}", small, cells.get("LION-12B", ""), f"{result['count']:,}")
                lines.append(f"| {' | '.join(row)} | {'; '.join(result['differs'])} |")
    if not first:
        raise ValueError(f"{folder} holds no result: eval.py TASK writes TASK.json there")
    ours = metrics.averages(first)
    four, twelve = (paper_averages(model) for model in ("LION-4B", "LION-12B"))
    lines += [f"| {key} | mean | {ours[key]:.2f} | {four[key]:.2f} | {twelve[key]:.2f} | | |" for key in ours]
    return "\n".join(lines)


def paper_averages(model: str) -> Scores:
    numbers = {entry.name: row[model] for entry in BENCHMARKS.values() for row in entry.paper.values() if model in row}
    return metrics.averages(numbers)


def draw_worst(examples: Sequence[Example], predictions: Line, images: ImageFolder, count: int) -> Image.Image:
    """A sheet of the answers that overlap the truth least, four in a row."""
    rows = list[tuple[float, Path, list[Any], str]]()
    for example in examples:
        path, box = images.path(str(example.image)), Box.parse(predictions[example.id]["text"])
        if path and example.box:
            iou = box.iou(example.box) if box else -1.0
            label = f"{example.fields['expression']} ({f'IoU {iou:.2f}' if box else 'no box'})"
            rows.append((iou, path, [(example.box, "true", "green")] + [(box, "model", "red")] * bool(box), label))
    worst = sorted(rows, key=lambda row: row[0])[:count]
    return draw_sheet([(draw_boxes(open_image(path), boxes), label) for _, path, boxes, label in worst], columns=4)
