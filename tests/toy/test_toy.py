"""Every text about a scene is true: a brute-force resolver, given text and things, finds what it refers to."""

import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lion_mini import toy
from lion_mini.box import Box
from lion_mini.config import PRESETS
from lion_mini.images import lion_transform
from lion_mini.text.tokenizers import UnigramTokenizer, WordPieceTokenizer
from lion_mini.toy import Record, Scene, Thing, records, scene
from lion_mini.toy.__main__ import show
from lion_mini.toy.questions import INSTRUCTIONS, PLACES, by_attributes, by_order, by_relation

SCENES = [scene(seed, "test") for seed in range(150)] + [scene(seed, "train") for seed in range(150)]
SIDES = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
ENDS = {"leftmost": (0, -1), "rightmost": (0, 1), "topmost": (1, -1), "bottommost": (1, 1)}


def named(things: tuple[Thing, ...], phrase: str) -> list[Thing]:
    """The things that a phrase such as "small red shapes" fits."""
    words = [re.sub("(?<=cross)es$|(?<=[a-z])s$", "", w) if w != "cross" else w for w in phrase.split()]
    assert set(words) <= {*toy.SHAPES, *toy.COLOURS, "small", "large", "shape"}, phrase
    return [t for t in things if all(w in (t.shape, t.colour, t.size, "shape") for w in words)]


def middle(thing: Thing, axis: int) -> float:
    box = thing.box
    return (box.x1 + box.x2) / 2 if axis == 0 else (box.y1 + box.y2) / 2


def resolve(things: tuple[Thing, ...], expression: str) -> list[Thing]:
    """Every thing to which an expression may refer, by brute force."""
    phrase = expression.removeprefix("the ")
    for relation, (axis, sign) in SIDES.items():
        if f" {relation} the " in phrase:
            noun, anchor = phrase.split(f" {relation} the ")
            (fixed,) = named(things, anchor)
            start, others = sign * middle(fixed, axis) + 0.001, [t for t in named(things, noun) if t is not fixed]
            return [t for t in others if sign * middle(t, axis) > start]
    first, _, rest = phrase.partition(" ")
    if first in ENDS:
        axis, sign = ENDS[first]
        best = max(sign * middle(t, axis) for t in named(things, rest))
        return [t for t in named(things, rest) if sign * middle(t, axis) > best - 0.09]
    return named(things, phrase)


def fields(template: str, text: str) -> str | None:
    """The content of the template's only field."""
    pattern = re.escape(template)
    for name in ("question", "answer", "expression", "box"):
        pattern = pattern.replace(re.escape(f"{{{name}}}"), "(.*)")
    found = re.fullmatch(pattern, text)
    return None if found is None else "".join(found.groups())


def content(record: Record) -> str:
    """The question, answer, expression or box inside the instruction."""
    kind = record["kind"]
    found = [text for template in INSTRUCTIONS[kind] if (text := fields(template, record["question"])) is not None]
    assert found, record
    return min(found, key=len)


def true_answer(scene: Scene, question: str) -> str:
    things = scene.things
    if question == "What is the ground?":
        return scene.ground
    if found := re.fullmatch(r"Is there a (.*) in the image\?", question):
        return "yes" if named(things, found[1]) else "no"
    if found := re.fullmatch(r"How many (.*) are there\?", question):
        return str(len(named(things, found[1])))
    if found := re.fullmatch(r"What (colour|shape) is the (.*)\?", question):
        (one,) = named(things, found[2])
        return one.colour if found[1] == "colour" else one.shape
    if found := re.fullmatch(r"Is the (.*) larger than the (.*)\?", question):
        (a,), (b,) = named(things, found[1]), named(things, found[2])
        return "yes" if a.side > b.side + 2 else "no"
    found = re.fullmatch(r"Is the (.*) (left of|right of|above|below) the (.*)\?", question)
    assert found, question
    (a,), (b,), (axis, sign) = named(things, found[1]), named(things, found[3]), SIDES[found[2]]
    assert abs(middle(a, axis) - middle(b, axis)) > 0.09, "too close to call"
    return "yes" if sign * (middle(a, axis) - middle(b, axis)) > 0 else "no"


def said(kind: str) -> list[tuple[Scene, Record]]:
    return [(s, r) for i, s in enumerate(SCENES) for r in records(s, random.Random(i)) if r["kind"] == kind]


def test_a_scene_is_a_function_of_its_seed() -> None:
    for split in toy.Split.__args__:  # type: ignore[attr-defined]
        one, again, other = scene(3, split), scene(3, split), scene(4, split)
        assert one == again != other
        assert one.image.tobytes() == again.image.tobytes() != other.image.tobytes()
        assert records(one, random.Random(5)) == records(again, random.Random(5))
    assert scene(3, "train").things != scene(3, "test").things
    with pytest.raises(ValueError, match="'val'"):
        scene(0, "val")  # type: ignore[arg-type]


def test_no_arrangement_is_in_both_splits() -> None:
    def arrangements(split: toy.Split) -> set[frozenset[tuple[str, int]]]:
        all_things = [scene(seed, split).things for seed in range(1500)]
        return {frozenset((f"{t.size} {t.name}", t.cell) for t in things) for things in all_things}

    train, test = arrangements("train"), arrangements("test")
    assert len(test) > 1400
    assert not train & test


def test_images_fit_the_model() -> None:
    width, height = scene(0, "train").image.size
    assert width == height
    assert width % PRESETS["tiny"].vit.image_size == 0
    assert PRESETS["tiny"].ram is not None
    assert PRESETS["tiny"].ram.tags == len(toy.TAGS)
    assert PRESETS["tiny"].ram.image_size == width  # the ground's pattern must reach RAM as it is


def test_scenes_are_as_promised() -> None:
    for s in SCENES:
        assert 4 <= len(s.things) <= 8
        assert 1 <= sum(t.size == "large" for t in s.things) <= 3
        assert len({t.name for t in s.things}) == len(s.things)
        assert [t.cell for t in s.things] == sorted({t.cell for t in s.things})
        assert not any(a.box.iou(b.box) for a in s.things for b in s.things if a is not b)
        new = {t.name for t in s.things} & {"purple circle", "yellow square", "black triangle", "green cross"}
        assert bool(new) == s.held_out == (s.split == "test" and s.seed % 2 == 1)


def test_boxes_are_where_the_colour_is() -> None:
    for s in SCENES:
        pixels, ground = np.asarray(s.image).astype(int), np.ones(s.image.size, bool)
        for thing in s.things:
            x1, y1, x2, y2 = (round(v) for v in thing.box.to_pixels(*s.image.size))
            near = np.abs(pixels[y1:y2, x1:x2] - np.array(toy.COLOURS[thing.colour])).max(-1) < 60
            rows, columns = np.nonzero(near)
            assert rows.min() <= 1
            assert rows.max() >= y2 - y1 - 2
            assert columns.min() <= 1
            assert columns.max() >= x2 - x1 - 2
            ground[y1:y2, x1:x2] = False
        assert pixels[ground].min() > 150, "something is drawn outside of every box"


def test_only_at_full_size_the_ground_can_be_told() -> None:
    """The four grounds with the same noise: plainly different images, but the same one at half the size."""
    contrasts = []
    for s in SCENES[:40]:
        images = [replace(s, ground=ground, things=()).image for ground in ("sand", "grass", "water", "brick")]
        full = np.stack([np.asarray(image) for image in images]).astype(float)
        halved = full.reshape(4, 48, 2, 48, 2, 3).mean((2, 4))
        seen = np.stack([lion_transform(image, 48).numpy()[:, 1:-1, 1:-1] for image in images])  # without the edge
        for i, j in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)):
            contrasts.append(np.abs(full[i] - full[j]).mean())
            assert np.abs(halved[i] - halved[j]).max() < 1
            assert np.abs(seen[i] - seen[j]).mean() < 0.01
    assert min(np.mean(contrasts[i::6]) for i in range(6)) > 3  # the pattern is faint in some scenes


def test_records_of_every_kind() -> None:
    found = records(SCENES[0], random.Random(0))
    assert {r["kind"] for r in found} == set(toy.KINDS)
    assert [r["kind"] for r in records(SCENES[0], random.Random(0), ("rec", "caption"))] == ["caption", "rec"]
    kinds = {r["subkind"] for _, r in said("vqa")}
    assert kinds == {"ground", "existence", "counting", "colour", "shape", "comparison", "relation"}
    for r in found:
        assert r["category"] == ("region_level" if r["kind"] in ("rec", "reg") else "image_level")
        assert set(r["tags"].split(", ")) <= set(toy.TAGS)


def test_an_expression_refers_to_one_thing() -> None:
    forms = set()
    for s, r in said("rec"):
        expression = content(r)
        (target,) = resolve(s.things, expression)
        assert r["answer"] == target.box.to_text()
        forms |= {word for word in (*SIDES, *ENDS) if word in expression}
    assert forms == {*SIDES, *ENDS}
    for s in SCENES:
        for target in s.things:
            ways = (by_attributes, by_order, by_relation)
            assert by_attributes(s.things, target)
            assert all(resolve(s.things, text) == [target] for way in ways for text in way(s.things, target))


def test_a_region_has_one_name() -> None:
    for s, r in said("reg"):
        box = Box.parse(content(r))
        (target,) = [t for t in s.things if t.box == box]
        assert resolve(s.things, r["answer"]) == [target]


def test_answers_are_true_and_balanced() -> None:
    yes = {kind: [0, 0] for kind in ("existence", "comparison", "relation")}
    for s, r in said("vqa"):
        assert r["answer"] == true_answer(s, content(r)), r
        if r["subkind"] in yes:
            yes[r["subkind"]][r["answer"] == "yes"] += 1
    for kind, (no, aye) in yes.items():
        assert 0.3 < aye / (aye + no) < 0.7, (kind, no, aye)
    for s, r in said("vqg"):
        assert true_answer(s, r["answer"]) == content(r)


def test_captions_and_dialogue_are_true() -> None:
    for s, r in said("caption"):
        assert re.findall(r"a (\w+ \w+)", r["answer"]) == [t.name for t in s.things if t.size == "large"]
    for s, r in said("dialogue"):
        if found := re.fullmatch(r"Tell me about the (.*)\.", r["question"]):
            (one,) = named(s.things, found[1])
            assert r["answer"] == f"It is {one.size} and {PLACES[one.cell]}."
        else:
            (place,) = [p for p in PLACES if r["question"] == f"What do you see {p}?"]
            there = [t for t in s.things if PLACES[t.cell] == place]
            assert r["answer"] == (f"There is a {there[0].size} {there[0].name}." if there else "There is nothing.")


def test_tags_have_the_errors_of_a_tagger() -> None:
    missed, invented, true, false = 0, 0, 0, 0
    for i, s in enumerate(SCENES):
        words = {s.ground, *(t.colour for t in s.things)}
        assert toy.true_tags(s) == [tag for tag in toy.TAGS if tag in words]
        found = set(toy.tags(s, random.Random(i)))
        missed, true = missed + len(words - found), true + len(words)
        invented, false = invented + len(found - words), false + len(toy.TAGS) - len(words)
    assert 0.05 < missed / true < 0.15
    assert 0.01 < invented / false < 0.06


def test_the_vocabularies_spell_every_text(tmp_path: Path) -> None:
    toy.write_vocabularies(tmp_path)
    pieces = UnigramTokenizer.from_file(tmp_path / "tokenizer.json")
    words = WordPieceTokenizer.from_file(tmp_path / "vocab.txt")
    assert len(words) == PRESETS["tiny"].qformer.vocab_size
    assert len(pieces) <= PRESETS["tiny"].t5.vocab_size
    for i, s in enumerate(SCENES):
        for r in records(s, random.Random(i)):
            for text in (r["question"], r["answer"], r["tags"]):
                ids = pieces.encode(text)
                assert pieces.unk_id not in ids
                assert pieces.decode(ids) == text
                assert words.unk_id not in words.encode(text)
            assert len(words.encode(r["question"])) <= PRESETS["tiny"].qformer.max_positions
            if r["kind"] == "rec":
                assert len(pieces.encode(r["answer"])) == 10, "[ a , b , c , d ] and </s>"
    for text in INSTRUCTIONS["rec"][-1], "zebra & Co. costs 3.75!":
        assert pieces.unk_id not in pieces.encode(text)
        assert words.unk_id not in words.encode(text)
    assert (tmp_path / "ram_tag_list.txt").read_text().split("\n")[:-1] == list(toy.TAGS)
    assert len((tmp_path / "ram_tag_list_threshold.txt").read_text().split()) == len(toy.TAGS)


def test_show_draws_scenes() -> None:
    assert show([0, 1], "test").height == 2 * show([0], "test").height
