"""The vocabularies of the toy world, in the format of the official files."""

import json
import random
import re
import string
from itertools import chain
from pathlib import Path

from ..text.prompts import EVAL_TEMPLATES, PLACEHOLDER, tag_sentence
from .questions import INSTRUCTIONS, PLACES, records
from .world import COORDINATES, TAGS, scene

SIZE = 512  # rows of T5's and of the Q-Former's embedding table


def write_vocabularies(folder: str | Path) -> None:
    """Write `tokenizer.json` (T5), `vocab.txt` (Q-Former), `ram_tag_list.txt` and `ram_tag_list_threshold.txt`.

    A word of this world is one piece, and so is a coordinate. Anything else is spelled letter by letter.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    templates = [*EVAL_TEMPLATES.values(), *chain.from_iterable(INSTRUCTIONS.values())]
    rng = random.Random(0)
    texts = [f"{r['question']} {r['answer']}" for seed in range(400) for r in records(scene(seed, "train"), rng)]
    texts += [re.sub(r"\{\w+\}", " ", text) for text in templates] + [tag_sentence(TAGS), *PLACES]
    known = sorted({word for text in texts for word in re.findall(r"[A-Za-z]+[0-9]?", text)})

    pieces = ["▁", *map(chr, range(33, 127)), *COORDINATES]
    pieces += [f"▁{word}" for word in known if len(word) > 1 or word in "Aa"]
    pieces += ["x1", "x2", "y1", "y2", "▁[", '▁"', "▁,", *TAGS, *(f"▁{i}" for i in range(6)), '"Is', '"How', '"What']
    special = ["<pad>", "</s>", "<unk>"]
    scored = [(name, 0.0) for name in special]
    scored += [(piece, -10.0 if len(piece) == 1 else -5.0) for piece in dict.fromkeys(pieces)]
    flags = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    added = [*enumerate(special), (len(scored), PLACEHOLDER)]
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": id, "content": name} | flags for id, name in added],
        "normalizer": {"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " "},
        "pre_tokenizer": space,
        "decoder": space,
        "model": {"type": "Unigram", "unk_id": 2, "vocab": scored, "byte_fallback": False},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False, indent=1), encoding="utf-8")

    letters = string.ascii_lowercase + string.digits
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *letters, *string.punctuation]
    words += [*(f"##{letter}" for letter in letters), *map(str.lower, known), *(number[2:] for number in COORDINATES)]
    words = list(dict.fromkeys(words))
    words += [f"[unused{i}]" for i in range(SIZE - len(words))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    (folder / "ram_tag_list.txt").write_text("\n".join(TAGS) + "\n", encoding="utf-8")
    (folder / "ram_tag_list_threshold.txt").write_text("0.5\n" * len(TAGS), encoding="utf-8")
