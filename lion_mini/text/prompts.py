"""The text around the image: image tags behind the soft prompt (section 3.2), then the instruction (Figure 5).

    According to <extra_id_0>, you are allowed to use or partially use the following tags: [dog, man]. What is it?
    |________________________________ tag_sentence ___________________________________________| |____ render ____|

T5 reads both, as in the release's models/lion_t5.py; the Q-Former reads the instruction alone.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..box import Box
from ..files import need, read_json, reading

PLACEHOLDER = "<extra_id_0>"  # T5's first sentinel; the learned soft prompt replaces its embedding


def tag_sentence(tags: Sequence[str] | str, soft_prompt: bool = True) -> str:
    """The prompt of section 3.2 and a space; a str is already joined. Without `soft_prompt` (ablation) tags alone."""
    opening, joined = f"According to {PLACEHOLDER}, you", tags if isinstance(tags, str) else ", ".join(tags)
    return f"{opening if soft_prompt else 'You'} are allowed to use or partially use the following tags: [{joined}]. "


# Instructions for training, as Table 9 prints them, "an question" included. Dialogue has none.
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
        "Identify the position of {expression} in image and share its coordinates.",
        "I'd like to request the coordinates of {expression} within the photo.",
        "How can I locate {expression} in the image? Please provide the coordinates.",
        "I am interested in knowing the coordinates of {expression} in the picture.",
        "Assist me in locating the position of {expression} in the photograph and its bounding box coordinates.",
        "In the image, I need to find {expression} and know its coordinates. Can you please help?"),
    "reg": (
        "What are the unique characteristics of the rectangular section {box} in image?",
        "Describe the novel qualities of the selected bounding box {box} in image.",
        "What sets the chosen region {box} in image apart from its surroundings?",
        "Provide a one-of-a-kind depiction for the area enclosed by {box} in image.",
        "How would you portray the unique features of the designated box {box} in image?",
        "Explain the distinguishing characteristics of the marked bounding box {box} in image."),
    "dialogue": ("{question}",),
}  # fmt: skip

# Instructions for evaluation (B.2); eval.py draws REC's from Table 9. The paper prints none for reg, pope and mmbench.
EVAL_TEMPLATES: dict[str, str] = {
    "caption": "A short image description:",
    "vqa": "Question: {question} Short answer:",
    "iconqa": "{question}",
    "vsr": 'Based on the image, is this statement true or false? "{question}" Answer:',
    "visdial": "Dialog history: {history}\nQuestion: {question} Short answer:",
    "rec": TEMPLATES["rec"][0],
    "reg": TEMPLATES["reg"][0],
    "pope": "{question}",
    "mmbench": "Hint: {hint}\nQuestion: {question}\nOptions:\n{options}\n"
    "Please select the correct answer from the options above. \n",
}

# What the release's weights are asked instead (its notebook): `<image>` is text that they have learned.
RELEASE = {"rec": "In the image <image>, can you locate {expression} and let me know its coordinates?"}
KIND = {"caption": "caption", "ask": "vqa", "locate": "rec", "describe": "reg"}  # of instruction, by what a user does
# Which row of the router a kind of instruction uses, and which entry of GENERATION decodes its answer.
TASK_OF = {kind: "region" if kind in ("rec", "reg") else "image" for kind in [*TEMPLATES, *EVAL_TEMPLATES]}
DECODING = dict.fromkeys(TASK_OF, "answer") | {"caption": "caption", "rec": "locate", "reg": "describe"}
_FIELD = re.compile(r"\{(question|answer|expression|box|history|hint|options)\}")
fields_of = lambda template: set(_FIELD.findall(template))
_SHIKRA = {"<question>": "{question}", "<answer>": "{answer}", "<expr>": "{expression}", "<objs>": "{box}"}


def check_template(kind: str, text: str, known: Mapping[str, str]) -> None:
    """A ValueError if the task is not known, or if the template has other fields than its known one."""
    if kind not in known:
        raise ValueError(f"the task {kind!r:.60} is unknown; there are {', '.join(known)}")
    if not text.strip() or fields_of(text) != fields_of(known[kind]):
        raise ValueError(f"{kind} {text!r:.200} must have the same fields as {known[kind]!r}")


def render(template: str, **fields: str | Box) -> str:
    """Fill in each `{field}` once; other braces are text. A ValueError names a field that is not given.

    A line with an empty field is left out: the first round of a dialogue has no history.
    """
    if missing := sorted(fields_of(template) - fields.keys()):
        raise ValueError(f"the template {template!r} needs {', '.join(missing)}")
    texts = {name: value.to_text() if isinstance(value, Box) else value for name, value in fields.items()}
    lines = [line for line in template.split("\n") if all(texts[name] for name in _FIELD.findall(line))]
    return _FIELD.sub(lambda match: texts[match[1]], "\n".join(lines))


def pool(templates: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """What training draws from: the templates, and every instruction that the model will be asked."""
    asked = {kind: [said[kind] for said in (EVAL_TEMPLATES, RELEASE) if kind in said] for kind in templates}
    return {kind: [*dict.fromkeys([*texts, *asked[kind]])] for kind, texts in templates.items()}


def load_templates(*paths: str | Path) -> dict[str, tuple[str, ...]]:
    """TEMPLATES, where JSON files replace whole tasks: `{"rec": ["Find {expression}.", ...]}`, or a list of one task.

    Shikra's lists can be read: `<expr>`, `<objs>` and `<question>` tell the task. A ValueError says what is wrong.
    """
    loaded, known = dict(TEMPLATES), {kind: texts[0] for kind, texts in TEMPLATES.items()}
    for path in paths:
        with reading(path):
            given = read_json(Path(path), (dict, list))
            for kind, templates in given.items() if isinstance(given, dict) else [("", given)]:
                texts = [need(text, str, kind or "a template") for text in need(templates, list, kind) or [""]]
                texts = [re.sub("<[a-z]+>", lambda m: _SHIKRA.get(m[0], m[0]), text) for text in texts]
                kind = kind or next((kind for kind in known if fields_of(known[kind]) == fields_of(texts[0])), "")
                for text in texts:
                    check_template(kind, text, known)
                loaded[kind] = tuple(texts)
    return loaded
