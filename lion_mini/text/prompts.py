"""The text around the image: image tags behind the soft prompt (section 3.2), then the instruction (Figure 5).

    According to <extra_id_0>, you are allowed to use or partially use the following tags: [dog, man]. What is it?
    |________________________________ tag_sentence ___________________________________________| |____ render ____|

T5 reads both, as in the release's models/lion_t5.py; the Q-Former reads the instruction alone.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from ..box import Box
from ..files import need, read_json, reading

PLACEHOLDER = "<extra_id_0>"  # T5's first sentinel; the learned soft prompt replaces its embedding


def tag_sentence(tags: Sequence[str] | str, soft_prompt: bool = True) -> str:
    """The prompt of section 3.2 and a space; a str is already joined. Without `soft_prompt` (ablation) tags alone."""
    opening, joined = f"According to {PLACEHOLDER}, you", tags if isinstance(tags, str) else ", ".join(tags)
    return f"{opening if soft_prompt else 'You'} are allowed to use or partially use the following tags: [{joined}]. "


# Instructions for training (B.1). Caption, vqa and vqg are Table 9's, "an question" included. Rec and reg are our own:
# the paper's come from Shikra, whose files are not free to copy (`load_templates` reads them). Dialogue has none.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "caption": (
        "Can you briefly explain what you see in the image?",
        "Could you use a few words to describe what you perceive in the photo?",
        "Please provide a short depiction of the picture.",
        "Using language, provide a short account of the image.",
        "Use a few words to illustrate what is happening in the picture."),
    "vqa": (
        "Given the image, answer the following question with no more than three words. {question}",
        "Based on the image, respond to this question with a short answer: {question}. Answer:",
        "Use the provided image to answer the question: {question} Provide your answer as short as possible:",
        'What is the answer to the following question? "{question}"',
        'The question "{question}" can be answered using the image. A short answer is'),
    "vqg": (
        "Based on the image, provide a question with the answer: {answer}. Question:",
        'Given the visual representation, create a question for which the answer is "{answer}".',
        "From the image provided, craft a question that leads to the reply: {answer}. Question:",
        "Considering the picture, come up with a question where the answer is: {answer}.",
        "Taking the image into account, generate an question that has the answer: {answer}. Question:"),
    "rec": (
        "Where in the image is {expression}? Answer with its box.",
        "Find {expression} and give the coordinates of its bounding box.",
        "Give the box [x1,y1,x2,y2] around {expression}.",
        "Which region of the picture shows {expression}? Write down its coordinates.",
        "Point out {expression} with one bounding box.",
        "I am looking for {expression}. What are its coordinates in this image?"),
    "reg": (
        "Describe the region {box} of the image so that it cannot be mistaken for another.",
        "What is inside the box {box}?", "Name the object at {box} in a few words.",
        "Write a short phrase that refers to the area {box} of this picture only.",
        "Which object do the coordinates {box} mark?", "Tell me what the region {box} shows."),
    "dialogue": ("{question}",),
}  # fmt: skip

# Instructions for evaluation (B.2), one per benchmark or family. `rec` is that of the release's notebook, whose
# checkpoints read `<image>` as text. The paper has none for reg, pope and mmbench.
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

# Which row of the router a kind of instruction uses, and which entry of GENERATION decodes its answer.
TASK_OF = {kind: "region" if kind in ("rec", "reg") else "image" for kind in [*TEMPLATES, *EVAL_TEMPLATES]}
DECODING = dict.fromkeys(TASK_OF, "answer") | {"caption": "caption", "rec": "locate", "reg": "describe"}
_FIELD = re.compile(r"\{(question|answer|expression|box|history|hint|options)\}")
_SHIKRA = {"<question>": "{question}", "<answer>": "{answer}", "<expr>": "{expression}", "<objs>": "{box}"}


def render(template: str, **fields: str | Box) -> str:
    """Fill in each `{field}` once; other braces are text. A ValueError names a field that is not given.

    A line with an empty field is left out: the first round of a dialogue has no history.
    """
    if missing := sorted(set(_FIELD.findall(template)) - fields.keys()):
        raise ValueError(f"the template {template!r} needs {', '.join(missing)}")
    texts = {name: value.to_text() if isinstance(value, Box) else value for name, value in fields.items()}
    lines = [line for line in template.split("\n") if all(texts[name] for name in _FIELD.findall(line))]
    return _FIELD.sub(lambda match: texts[match[1]], "\n".join(lines))


def load_templates(path: str | Path) -> dict[str, tuple[str, ...]]:
    """TEMPLATES, where a JSON file `{"rec": ["Find {expression}.", ...], ...}` replaces whole tasks.

    Shikra's placeholders (`<expr>`, `<objs>`, `<question>`) will do. A ValueError says what is wrong with the file.
    """
    loaded = dict(TEMPLATES)
    with reading(path):
        for kind, templates in read_json(Path(path)).items():
            if kind not in TEMPLATES:
                raise ValueError(f"the task {kind!r} is unknown; there are {', '.join(TEMPLATES)}")
            texts = [need(text, str, kind) for text in need(templates, list, kind) or [""]]
            loaded[kind] = tuple(re.sub("<[a-z]+>", lambda m: _SHIKRA.get(m[0], m[0]), text) for text in texts)
            for text in loaded[kind]:
                if not text or sorted(set(_FIELD.findall(text))) != _FIELD.findall(TEMPLATES[kind][0]):
                    raise ValueError(f"{kind} {text!r} must be a text with the same fields as {TEMPLATES[kind][0]!r}")
    return loaded
