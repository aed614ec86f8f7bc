"""The text around the image: task instructions (Table 9), image tags behind the soft prompt, boxes as text (section 3).

What T5 reads is the tag sentence and then the instruction; the Q-Former reads the instruction alone:

    According to <extra_id_0>, you are allowed to use or partially use the following tags: [dog, man]. What is it?
    |________________________________ tag_sentence ___________________________________________| |____ render ____|

The embedding of the placeholder `<extra_id_0>` is replaced by the learned soft prompt. A box is written as fractions of
the original width and height, `[0.440,0.060,0.650,0.367]`: no new tokens, the language model spells it.

Compatible with the prompt in the release's models/lion_t5.py and with the boxes of its playground.ipynb.
next: images.py
"""

import json
import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from ..box import Box

PLACEHOLDER = "<extra_id_0>"  # T5's first sentinel; its embedding becomes the soft prompt


def tag_sentence(tags: Sequence[str] | str, soft_prompt: bool = True) -> str:
    """The image-tag prompt of section 3.2, with the space that parts it from the instruction; a str is already joined.

    Without the soft prompt (the ablation that gives the tags alone) nothing is left to go by, and the sentence opens
    with "You are allowed".
    """
    joined = tags if isinstance(tags, str) else ", ".join(tags)
    opening = f"According to {PLACEHOLDER}, you" if soft_prompt else "You"
    return f"{opening} are allowed to use or partially use the following tags: [{joined}]. "


# Caption, vqa and vqg: as Table 9 prints them, "an question" included. Rec and reg: our own words, since the lists the
# paper drew from are not free to copy (`load_templates` reads them). Dialogue turns come without an instruction.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "caption": (
        "Can you briefly explain what you see in the image?",
        "Could you use a few words to describe what you perceive in the photo?",
        "Please provide a short depiction of the picture.",
        "Using language, provide a short account of the image.",
        "Use a few words to illustrate what is happening in the picture.",
    ),
    "vqa": (
        "Given the image, answer the following question with no more than three words. {question}",
        "Based on the image, respond to this question with a short answer: {question}. Answer:",
        "Use the provided image to answer the question: {question} Provide your answer as short as possible:",
        'What is the answer to the following question? "{question}"',
        'The question "{question}" can be answered using the image. A short answer is',
    ),
    "vqg": (
        "Based on the image, provide a question with the answer: {answer}. Question:",
        'Given the visual representation, create a question for which the answer is "{answer}".',
        "From the image provided, craft a question that leads to the reply: {answer}. Question:",
        "Considering the picture, come up with a question where the answer is: {answer}.",
        "Taking the image into account, generate an question that has the answer: {answer}. Question:",
    ),
    "rec": (
        "Where in the image is {expression}? Answer with its box.",
        "Find {expression} and give the coordinates of its bounding box.",
        "Give the box [x1,y1,x2,y2] around {expression}.",
        "Which region of the picture shows {expression}? Write down its coordinates.",
        "Point out {expression} with one bounding box.",
        "I am looking for {expression}. What are its coordinates in this image?",
    ),
    "reg": (
        "Describe the region {box} of the image so that it cannot be mistaken for another.",
        "What is inside the box {box}?",
        "Name the object at {box} in a few words.",
        "Write a short phrase that refers to the area {box} of this picture only.",
        "Which object do the coordinates {box} mark?",
        "Tell me what the region {box} shows.",
    ),
    "dialogue": ("{question}",),
}

# Table 8, one prompt per benchmark or family; `rec` is the literal of the release's notebook, `<image>` included,
# since its checkpoints read it as text. The prompts of reg, pope and mmbench are not in the paper.
EVAL_TEMPLATES: dict[str, str] = {
    "caption": "A short image description:",
    "vqa": "Question: {question} Short answer:",
    "iconqa": "{question}",
    "vsr": 'Based on the image, is this statement true or false? "{question}" Answer:',
    "visdial": "Dialog history: {history}\nQuestion: {question} Short answer:",
    "rec": "In the image <image>, can you locate {expression} and let me know its coordinates?",
    "reg": TEMPLATES["reg"][0],
    "pope": "{question}",
    "mmbench": "Hint: {hint}\nQuestion: {question}\nOptions:\n{options}\n"
    "Please select the correct answer from the options above. \n",
}

# Which adapter the router listens to first.
TASK_OF: dict[str, str] = {
    kind: "region" if kind in ("rec", "reg") else "image" for kind in [*TEMPLATES, *EVAL_TEMPLATES]
}

_FIELDS = {"caption": "", "vqa": "question", "vqg": "answer", "rec": "expression", "reg": "box", "dialogue": "question"}
_FOREIGN = {"<question>": "{question}", "<answer>": "{answer}", "<expr>": "{expression}", "<objs>": "{box}"}
_FIELD = re.compile(r"\{(question|answer|expression|box|history|hint|options)\}")


def render(template: str, **fields: str | Box) -> str:
    """The template with each `{field}` filled in; any other brace is text, in the template and in what fills it.

    A line with an empty `{history}` or `{hint}` is left out: the first round of a dialogue has none. A field of the
    template that is not given raises ValueError; one that the template does not name is ignored.
    """
    missing = sorted(set(_FIELD.findall(template)) - set(fields))
    if missing:
        raise ValueError(f"the template {template!r} needs {', '.join(missing)}")
    texts = {name: value.to_text() if isinstance(value, Box) else value for name, value in fields.items()}
    empty = [f"{{{name}}}" for name in ("history", "hint") if not texts.get(name)]
    lines = [line for line in template.split("\n") if not any(name in line for name in empty)]
    return _FIELD.sub(lambda found: texts[found[1]], "\n".join(lines))


def load_templates(path: str | PathLike[str]) -> dict[str, tuple[str, ...]]:
    """TEMPLATES with the tasks of a JSON file `{"rec": ["Find {expression}.", ...], ...}` in place of ours.

    Placeholders are ours or those of Shikra's files (`<expr>`, `<objs>`, `<question>`). ValueError, in one sentence,
    for a file that cannot be read, an unknown task, or a template without its placeholder.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"the templates {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the templates {path} are not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"the templates {path} must map a task to a list of strings, found a {type(data).__name__}")
    loaded = dict(TEMPLATES)
    for kind, templates in data.items():
        if kind not in TEMPLATES:
            raise ValueError(f"{path}: the task {kind!r} is unknown; there are {', '.join(TEMPLATES)}")
        if not isinstance(templates, list) or not templates or not all(isinstance(t, str) and t for t in templates):
            raise ValueError(f"{path}: {kind} must be a list of strings with at least one, found {templates!r:.80}")
        loaded[kind] = tuple(_foreign(t) for t in templates)
        for template in loaded[kind]:
            wanted = {_FIELDS[kind]} - {""}
            if set(_FIELD.findall(template)) != wanted:
                needs = f"{{{_FIELDS[kind]}}} and no other placeholder" if wanted else "no placeholder"
                raise ValueError(f"{path}: the {kind} template {template!r} must hold {needs}")
    return loaded


def _foreign(template: str) -> str:
    for theirs, ours in _FOREIGN.items():
        template = template.replace(theirs, ours)
    return template
