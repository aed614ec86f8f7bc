"""How fast, beside transformers and beside the machine's limit: medians of runs that take turns in one process.

    python tests/bench.py            decoding at flan-t5-base size, 330 encoder tokens, 20 tokens, 5 beams and greedy
    python tests/bench.py --json     the same as one JSON object

The limit is what this machine could do at best, measured in the same run: the encoder's multiplications at the rate of
a large matrix product, and per token the decoder's bytes at the rate at which memory can be read. An absolute time
means nothing on a shared machine; the ratios do.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import randomise  # noqa: E402
from test_oracle import renamed  # noqa: E402

import weights  # noqa: E402
from lion_mini import Generation  # noqa: E402
from lion_mini.config import T5Config  # noqa: E402
from lion_mini.generate import generate  # noqa: E402
from lion_mini.t5 import T5  # noqa: E402
from lion_mini.tokenizers import UnigramTokenizer, WordPieceTokenizer  # noqa: E402

BASE = T5Config(width=768, head_width=64, heads=12, mlp_width=2048, encoder_depth=12, decoder_depth=12)
ENCODER_TOKENS, NEW_TOKENS = 330, 20


def median(run: Callable[[], object], rounds: int = 5) -> float:
    run()
    return statistics.median(timed(run) for _ in range(rounds))


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def in_turns(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median of each, measured in turns, so that what else the machine does falls on all alike."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(timed(run))
    return {name: statistics.median(values) for name, values in times.items()}


def matrix_rate(dtype: torch.dtype) -> float:
    """Multiplications and additions a second of a product as large as the encoder's."""
    a, b = torch.randn(1024, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    return 2 * 1024 * 2048 * 2048 / median(lambda: a @ b, 9)


def read_rate() -> float:
    """Bytes a second at which memory far larger than any cache can be read."""
    big = torch.ones(2**27)
    return big.nbytes / median(lambda: big.sum(), 7)


def reference(ours: T5) -> Any:
    """transformers' T5 with the same parameters."""
    import transformers

    config = transformers.T5Config(
        vocab_size=BASE.vocab_size, d_model=BASE.width, d_kv=BASE.head_width, d_ff=BASE.mlp_width,
        num_layers=BASE.encoder_depth, num_decoder_layers=BASE.decoder_depth, num_heads=BASE.heads,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    config.dense_act_fn = "gelu"
    config.tie_word_embeddings = config.scale_decoder_outputs = False
    config.decoder_start_token_id = 0
    theirs = transformers.T5ForConditionalGeneration(config).eval()
    state = renamed(ours, "t5.", weights.T5, {})
    state |= {f"{stack}.embed_tokens.weight": state["shared.weight"] for stack in ("encoder", "decoder")}
    theirs.load_state_dict(state, strict=True, assign=True)
    return theirs


def decoding(rounds: int) -> dict[str, float]:
    """Encoder and 20 tokens of one image, ours beside theirs and beside the limit."""
    ours = T5(BASE).eval().requires_grad_(False)
    randomise(ours, std=0.03)
    ours.lm_head.weight[1] = 0  # </s> stays unlikely, so that all write 20 tokens
    theirs = reference(ours)
    x, task = torch.randn(1, ENCODER_TOKENS, BASE.width), torch.zeros(1, dtype=torch.long)

    def our_ids(beams: int, tokens: int = NEW_TOKENS) -> Tensor:
        settings = Generation(beams=beams, max_new_tokens=tokens, min_new_tokens=tokens)
        return generate(ours, ours.encode(x, None, task), None, task, settings)

    def their_ids(beams: int) -> Tensor:
        return theirs.generate(
            inputs_embeds=x, num_beams=beams, do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
            pad_token_id=0, eos_token_id=1,
        )  # fmt: skip

    with torch.inference_mode():
        for beams in (5, 1):
            assert torch.equal(our_ids(beams), their_ids(beams)), "not the same tokens: nothing to compare"
        times = in_turns(
            {
                "ours, 5 beams": lambda: our_ids(5),
                "transformers, 5 beams": lambda: their_ids(5),
                "ours, greedy": lambda: our_ids(1),
                "transformers, greedy": lambda: their_ids(1),
                "encoder": lambda: ours.encode(x, None, task),
                "10 tokens": lambda: our_ids(5, 10),
                "40 tokens": lambda: our_ids(5, 40),
                "80 tokens": lambda: our_ids(5, 80),
            },
            rounds,
        )
        layer = ours.encoder[0]
        linear = sum(p.numel() for p in layer.parameters()) * BASE.encoder_depth
        scores = 2 * BASE.encoder_depth * ENCODER_TOKENS * BASE.heads * BASE.head_width
        cross = 2 * BASE.decoder_depth * BASE.width * BASE.heads * BASE.head_width  # its keys and values, once
        operations = 2 * ENCODER_TOKENS * (linear + scores + cross)
        decoder = sum(p.nbytes for p in ours.decoder.parameters()) + ours.lm_head.weight.nbytes - 4 * cross
        keys = 2 * BASE.decoder_depth * ENCODER_TOKENS * BASE.heads * BASE.head_width * 4
        limit = operations / matrix_rate(torch.float32) + NEW_TOKENS * (decoder + keys) / read_rate()
    return times | {"limit": limit}


def tokenising() -> dict[str, float]:
    golden = ROOT / "tests" / "golden" / "official"
    pieces = UnigramTokenizer.from_file(golden / "flan-t5" / "tokenizer.json")
    words = WordPieceTokenizer.from_file(golden / "bert-base-uncased" / "vocab.txt")
    prompts = [f"Question: what is the man number {i} holding in his left hand? Short answer:" for i in range(1000)]
    return {
        "1,000 prompts, T5": median(lambda: [pieces.encode(prompt) for prompt in prompts], 3),
        "1,000 prompts, BERT": median(lambda: [words.encode(prompt) for prompt in prompts], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    times = decoding(args.rounds) | tokenising()
    ratios = {
        "5 beams: transformers / ours": times["transformers, 5 beams"] / times["ours, 5 beams"],
        "greedy: transformers / ours": times["transformers, greedy"] / times["ours, greedy"],
        "5 beams: ours / limit": times["ours, 5 beams"] / times["limit"],
        "greedy: ours / limit": times["ours, greedy"] / times["limit"],
        "a token between 10 and 20 / between 40 and 80": (times["ours, 5 beams"] - times["10 tokens"])
        / 10
        / ((times["80 tokens"] - times["40 tokens"]) / 40),
    }
    if args.json:
        print(json.dumps({"seconds": times, "ratios": ratios, "threads": torch.get_num_threads()}))
        return
    print(f"flan-t5-base size, {ENCODER_TOKENS} encoder tokens, {NEW_TOKENS} tokens, {torch.get_num_threads()} threads")
    for name, seconds in times.items():
        print(f"{name:48} {seconds:8.3f} s")
    for name, ratio in ratios.items():
        print(f"{name:48} {ratio:8.2f}")


if __name__ == "__main__":
    main()
