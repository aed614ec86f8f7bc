"""Every metric of the paper's tables from the model's texts and scores (section 4), without Java.

Scores are fractions; the tables print 100 times as much (CIDEr too: 1.382 is printed as 138.2). LION published no
evaluation code: each docstring names the definition that it follows.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal, NamedTuple, get_args

from ..box import Box
from .ptb import ptb_tokenize as ptb_tokenize

Grams = Mapping[tuple[str, ...], float]
Variant = Literal["lavis", "official"]  # of short answers' evaluators
VARIANTS: tuple[Variant, ...] = get_args(Variant)


def cider(
    references: Mapping[Any, Sequence[str]] | Sequence[Sequence[str]], hypotheses: Mapping[Any, str] | Sequence[str]
) -> tuple[float, Any]:
    """CIDEr-D of raw captions: the corpus' mean and each image's score (a dict by image if dicts are given).

    df(k) counts the images, of N, that use the n-gram k in a reference. For a caption s the weight w_n(s)[k] is the
    count of k times ln N - ln max(1, df(k)). The score of c is a mean over n = 1 to 4 and over its references r:

        10 * exp(-(|c| - |r|)^2 / (2 * 6^2)) * sum_k min(w_n(c)[k], w_n(r)[k]) w_n(r)[k] / (||w_n(c)|| ||w_n(r)||)

    N and df come from these references alone, so a subset scores differently, and one image alone scores 0.
    Vedantam et al. 2015, as in coco-caption's Cider.
    """
    named = references if isinstance(references, Mapping) else dict(enumerate(references))
    said = hypotheses if isinstance(hypotheses, Mapping) else dict(enumerate(hypotheses))
    if not named or named.keys() != said.keys():
        raise ValueError(f"{len(named)} images have references and {len(said)} have a hypothesis: not the same images")
    for name, captions in named.items():
        if isinstance(captions, str) or not captions:
            raise ValueError(f"image {name} needs a list of one or more references, not {captions!r}")

    def grams(tokens: list[str]) -> list[Grams]:  # for n = 1 to 4: how often each n-gram occurs
        return [Counter(zip(*(tokens[i:] for i in range(n)), strict=False)) for n in range(1, 5)]

    words = iter(ptb_tokenize([caption for captions in named.values() for caption in captions]))
    counted = [[grams(next(words)) for _ in captions] for captions in named.values()]
    df = Counter(k for image in counted for k in {k for orders in image for grams in orders for k in grams})
    unseen = math.log(len(counted))
    idf = {k: unseen - math.log(images) for k, images in df.items()}

    def weigh(orders: list[Grams]) -> list[tuple[Grams, float]]:  # per n: the weights and their norm
        weighted = [{k: count * idf.get(k, unseen) for k, count in grams.items()} for grams in orders]
        return [(weights, math.sqrt(sum(w * w for w in weights.values()))) for weights in weighted]

    scores = []
    for tokens, image in zip(ptb_tokenize([said[name] for name in named]), counted, strict=True):
        hypothesis, total = weigh(grams(tokens)), 0.0
        for reference in image:
            gap = len(tokens) - sum(reference[0].values())
            closeness = math.exp(-(gap**2) / (2 * 6**2))
            for (c, c_norm), (r, r_norm) in zip(hypothesis, weigh(reference), strict=True):
                if c_norm and r_norm:
                    shared = sum(min(w, r[k]) * r[k] for k, w in c.items() if k in r)
                    total += closeness * shared / (c_norm * r_norm)
        scores.append(10 * total / (4 * len(image)))
    return fmean(scores), dict(zip(named, scores, strict=True)) if isinstance(references, Mapping) else scores


_SPACES = str.maketrans("\n\t", "  ")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0"} | {word: str(digit) for digit, word in enumerate(_DIGITS.split())}
_CONTRACTED = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't
    it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
    somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's
    they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's
    where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
    couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've
    there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've 'ow's'at
"""
# A word with one apostrophe missing is restored: dont, couldn'tve, couldnt've, but not couldntve.
_CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word for word in _CONTRACTED.split() for i, letter in enumerate(word) if letter == "'"
}
_CONTRACTIONS["somebody'd"] = "somebodyd"  # the evaluators' table has this one the wrong way round


def vqa_accuracy(prediction: str, answers: Sequence[str], variant: Variant = "official") -> float:
    """VQA accuracy of one prediction: the mean over annotators of min(1, how many others gave this answer / 3).

    Of ten answers 0, 1, 2, 3 or more matches give 0, 0.3, 0.6, 0.9 and 1. One annotator alone gives 0. The evaluators
    differ in what they normalise:

        official  GT-Vision-Lab/VQA since March 2021: both sides alike, and nothing if all annotators agree
        lavis     the code before, which InstructBLIP and hence LION report: always the prediction, and of the
                  annotators' answers only the punctuation, so no prediction can match "two" or "a cat"
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant is 'official' or 'lavis', not {variant!r}")
    prediction = prediction.translate(_SPACES).strip()
    if variant == "official":
        answers = [answer.translate(_SPACES).strip() for answer in answers]
    disagree = len(set(answers)) > 1
    if disagree or variant == "lavis":
        prediction = normalise_answer(prediction)
    if disagree:
        answers = [normalise_answer(a) if variant == "official" else _strip_punctuation(a) for a in answers]
    matches = sum(answer == prediction for answer in answers)
    return fmean([min(1.0, (matches - (answer == prediction)) / 3) for answer in answers])


def normalise_answer(text: str) -> str:
    """What the VQA evaluators compare: no punctuation or articles, lower case, 2 for two, don't for dont.

    Apostrophes, colons, %, $ and & stay. So do plurals and spelling variants.
    """
    words = (_NUMBERS.get(word, word) for word in _strip_punctuation(text).lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def _strip_punctuation(text: str) -> str:
    """A mark becomes a space between letters (cat/dog) and nothing beside a space, or wherever a number holds a comma.

    The quirks are the evaluators' own: one 1,000 changes how all marks are treated, and only 32 periods are removed.
    """
    numeric, out = re.search(r"\d,\d", text), text
    for mark in _PUNCTUATION:
        out = out.replace(mark, "" if numeric or f"{mark} " in text or f" {mark}" in text else " ")
    return re.sub(r"\.(?!\d)", "", out, count=32)


def direct_answer_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """A-OKVQA's direct answer: min(1, how many of the ten gave exactly this string / 3). Source: allenai/aokvqa.

    Nothing is normalised: give a stripped, lower-cased prediction. The official evaluator leaves out questions marked
    `difficult_direct_answer`. LAVIS, and so the paper, keeps them.
    """
    return min(1.0, sum(answer == prediction for answer in answers) / 3)


def gqa_match(prediction: str, answer: str, variant: Variant = "lavis") -> bool:
    """GQA: equal strings (official), or equal after `normalise_answer` on both sides (LAVIS, and so the paper)."""
    if variant not in VARIANTS:
        raise ValueError(f"variant is 'official' or 'lavis', not {variant!r}")
    return prediction == answer if variant == "official" else normalise_answer(prediction) == normalise_answer(answer)


def rank(scores: Sequence[float], target: int) -> int:
    """The rank (1: the best) of candidate `target` among finite log-likelihoods. Of equal ones the first wins."""
    return 1 + sum(score > scores[target] for score in scores) + sum(s == scores[target] for s in scores[:target])


class Ranking(NamedTuple):
    mrr: float  # mean of 1 / rank
    recall: Mapping[int, float]  # at k = 1, 5, 10: the share of ranks <= k
    mean_rank: float


def ranking(ranks: Sequence[int]) -> Ranking:
    """The VisDial challenge's metrics without its NDCG. Top-1 accuracy (IconQA, VSR) is `recall[1]`."""
    recall = {k: fmean([r <= k for r in ranks]) for k in (1, 5, 10)}
    return Ranking(fmean([1 / r for r in ranks]), recall, fmean(ranks))


class Grounding(NamedTuple):
    accuracy: float
    unparsed: float  # the share of answers that hold no box; they count as wrong


def grounding(answers: Sequence[str], truth: Sequence[Box], threshold: float = 0.5, strict: bool = False) -> Grounding:
    """REC accuracy: the share of expressions whose box overlaps the truth with IoU >= 0.5, as the paper says.

    `strict`: > 0.5, as in Shikra and MiniGPT-4. A missing or inverted box counts as wrong. Do not round the truth.
    """
    boxes = [Box.parse(answer) for answer in answers]
    overlaps = [box.iou(true) if box else 0.0 for box, true in zip(boxes, truth, strict=True)]
    right = [iou > threshold or (iou == threshold and not strict) for iou in overlaps]
    return Grounding(fmean(right), fmean([box is None for box in boxes]))


@dataclass(frozen=True)
class Pope:
    """POPE's confusion counts (yes is positive) and the rates of Table 5. A rate over nothing is 0."""

    tp: int
    fp: int
    tn: int
    fn: int

    accuracy = property(lambda self: (self.tp + self.tn) / (self.tp + self.fp + self.tn + self.fn or 1))
    precision = property(lambda self: self.tp / (self.tp + self.fp or 1))
    recall = property(lambda self: self.tp / (self.tp + self.fn or 1))
    f1 = property(lambda self: 2 * self.tp / (2 * self.tp + self.fp + self.fn or 1))
    yes_ratio = property(lambda self: (self.tp + self.fp) / (self.tp + self.fp + self.tn + self.fn or 1))


def pope(answers: Sequence[str], labels: Sequence[str]) -> Pope:
    """POPE of the model's texts and the file's labels, in the same order. Source: AoiDragon/POPE."""
    if odd := set(labels) - {"yes", "no"}:
        raise ValueError(f"a POPE label is 'yes' or 'no', not {min(odd)!r}")
    counts = Counter(zip(map(pope_answer, answers), labels, strict=True))
    return Pope(counts["yes", "yes"], counts["yes", "no"], counts["no", "no"], counts["no", "yes"])


def pope_answer(text: str) -> Literal["yes", "no"]:
    """ "no" if the first sentence has the word No, no or not. All else is "yes": "NO", "isn't" and silence too."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


MMBENCH_ABILITIES = {  # the files' l2-category: Table 6's column
    "logic_reasoning": "LR", "attribute_reasoning": "AR", "relation_reasoning": "RR",
    "finegrained_perception (instance-level)": "FP-S", "finegrained_perception (cross-instance)": "FP-C",
    "coarse_perception": "CP",
}  # fmt: skip


def mmbench(rows: Iterable[tuple[int, str, bool]]) -> dict[str, float]:
    """MMBench's circular score from (index, l2-category, right?) of every row: Overall and Table 6's six abilities.

    Row i + r * 1,000,000 is question i with its options rotated r times. A question is right if all its rows are.
    Overall is the mean over questions. An ability without questions is left out.
    """
    listed = [*rows]
    wrong = {index % 1_000_000 for index, _, right in listed if not right}
    questions = {index: ability for index, ability, _ in listed if index < 1_000_000}
    if orphans := {index % 1_000_000 for index, *_ in listed} - questions.keys():
        raise ValueError(f"question {min(orphans)} has rotations but not its own row")
    hits = {"Overall": [number not in wrong for number in questions]}
    for name, column in MMBENCH_ABILITIES.items():
        hits[column] = [number not in wrong for number, ability in questions.items() if ability == name]
    return {column: fmean(rights) for column, rights in hits.items() if rights}


AVERAGES = {
    "REC Avg": ("refcoco_val", "refcoco_testA", "refcoco_testB", "refcoco+_val", "refcoco+_testA", "refcoco+_testB",
                "refcocog_val", "refcocog_test"),
    "Held-in": ("coco", "textcaps", "okvqa", "aokvqa"),
    "Held-out": ("flickr30k", "gqa", "iconqa", "vsr", "visdial"),
}  # fmt: skip


def averages(scores: Mapping[str, float]) -> dict[str, float]:
    """The unweighted averages of Tables 2 to 4, without those that lack a benchmark."""
    whole = {name: members for name, members in AVERAGES.items() if scores.keys() >= set(members)}
    return {name: fmean(scores[member] for member in members) for name, members in whole.items()}
