"""Writing the answer: greedy, nucleus and beam search, and the ranking of given candidates.

Encoder states come in, token ids go out. Every setting means what it means in `generate` of transformers 4.42, with
which the release was published, ties and corner cases included. The paper decodes greedily, and ranks candidates for
IconQA, VSR and VisDial (section 4.1).

A beam search for one sample with 2 beams, in which </s> ends a hypothesis (sums of log-probabilities):

    step 1   [a -0.1] [b -2.0]
    step 2   [a c -0.5] [a </s> -0.6] [b a -2.2] ...   -> "a" is finished with -0.6 / 2 ** length_penalty,
                                                          [a c] and [b a] continue: row 0 from row 0, row 1 from row 1

Same answers as the release's models/lion_t5.py: generate.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..config import EOS, IGNORE, PAD
from .t5 import T5


@dataclass(frozen=True)
class Generation:
    """Decoding settings. `max_new_tokens` counts `</s>`; at least `min_new_tokens` come before it."""

    beams: int = 1
    max_new_tokens: int = 30
    min_new_tokens: int = 0
    length_penalty: float = 1.0  # hypotheses are compared by log-probability / length ** length_penalty
    repetition_penalty: float = 1.0
    sample: bool = False
    top_p: float = 1.0
    top_k: int = 50  # sampling only; the default of 4.42, which the release uses
    temperature: float = 1.0
    returns: int = 1  # answers per sample
    seed: int | None = None  # for sampling; None uses torch's global generator

    def __post_init__(self) -> None:
        for name in ("beams", "max_new_tokens", "top_k", "returns"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(f"min_new_tokens {self.min_new_tokens} is not within 0 and {self.max_new_tokens}")
        if self.temperature <= 0 or self.repetition_penalty <= 0 or not 0 < self.top_p <= 1:
            raise ValueError("temperature and repetition_penalty must be above 0, and top_p within 0 and 1")
        if self.sample and self.beams > 1:
            raise ValueError(f"sampling needs beams=1, not {self.beams}")
        if self.returns > self.beams and not self.sample:
            raise ValueError(f"{self.beams} beams cannot return {self.returns} answers: raise beams, or sample")


GENERATION = {
    "caption": Generation(max_new_tokens=30),
    "answer": Generation(max_new_tokens=10),
    "locate": Generation(max_new_tokens=40),
    "describe": Generation(max_new_tokens=30),
    "official": Generation(beams=5, max_new_tokens=256, repetition_penalty=1.5),
}


def generate(
    t5: T5, states: Tensor, mask: Tensor | None, task: Tensor, settings: Generation
) -> Tensor:  # (b, n, d), (b, n), (b,) -> (b * returns, t)
    """Token ids, start token (PAD) first, padded with PAD after `</s>`; a sample's `returns` rows are adjacent."""
    if settings.beams > 1:
        return beam_search(t5, states, mask, task, settings)
    return greedy_or_sampled(t5, states, mask, task, settings)


def greedy_or_sampled(
    t5: T5, states: Tensor, mask: Tensor | None, task: Tensor, settings: Generation
) -> Tensor:  # ... -> (b * returns, t)
    """Every row takes its best, or a sampled, next token until all have ended."""
    rows = len(states) * settings.returns
    cache = t5.start(states, mask, task, settings.max_new_tokens + 1)
    ids = torch.full((rows, 1), PAD, device=states.device)
    ended = torch.zeros(rows, dtype=torch.bool, device=states.device)
    random = None
    if settings.sample and settings.seed is not None:
        random = torch.Generator(states.device).manual_seed(settings.seed)
    for _ in range(settings.max_new_tokens):
        scores = penalise(t5.decode(ids[:, -1:], cache)[:, -1].float(), ids, settings)
        if settings.sample:
            token = torch.multinomial(nucleus(scores, settings).softmax(-1), 1, generator=random)[:, 0]
        else:
            token = scores.argmax(-1)
        ids = torch.cat((ids, token.masked_fill(ended, PAD)[:, None]), dim=1)
        ended |= token == EOS
        if ended.all():
            break
    return ids


def penalise(scores: Tensor, ids: Tensor, settings: Generation) -> Tensor:  # (r, v), (r, t) -> (r, v)
    """Penalise tokens that occurred before, the start token too, and forbid `</s>` before `min_new_tokens`."""
    if settings.repetition_penalty != 1.0:
        seen = scores.gather(1, ids)
        seen = torch.where(seen < 0, seen * settings.repetition_penalty, seen / settings.repetition_penalty)
        scores = scores.scatter(1, ids, seen)
    if ids.shape[1] <= settings.min_new_tokens:
        scores = scores.index_fill(1, torch.tensor([EOS], device=scores.device), -torch.inf)
    return scores


def nucleus(scores: Tensor, settings: Generation) -> Tensor:  # (r, v) -> (r, v)
    """-inf for tokens outside the `top_k`, and outside the smallest set whose probability reaches `top_p`."""
    scores = scores / settings.temperature
    worst = scores.topk(min(settings.top_k, scores.shape[1]), dim=1).values[:, -1:]
    scores = scores.masked_fill(scores < worst, -torch.inf)
    if settings.top_p < 1:
        ascending, order = scores.sort(dim=1)
        drop = ascending.softmax(-1).cumsum(-1) <= 1 - settings.top_p
        drop[:, -1] = False
        scores = scores.masked_fill(drop.scatter(1, order, drop), -torch.inf)
    return scores


class Hypotheses:
    """The finished answers of one sample: the best `beams` by log-probability / length ** length_penalty."""

    def __init__(self, settings: Generation):
        self.beams = settings.beams
        self.penalty = settings.length_penalty
        self.kept: list[tuple[float, Tensor]] = []

    def score(self, total: float, length: int) -> float:
        return float(total / length**self.penalty)

    def add(self, ids: Tensor, total: float, length: int) -> None:
        """`ids` begins with the start token and has no `</s>`; `length` does not count the start token."""
        score = self.score(total, length)
        if len(self.kept) == self.beams:
            if score <= self.worst():
                return
            del self.kept[[kept for kept, _ in self.kept].index(self.worst())]
        self.kept.append((score, ids))

    def worst(self) -> float:
        return min(score for score, _ in self.kept)

    def done(self, best_total: float, length: int) -> bool:
        """True if even the best beam, at its present score, does not beat the worst answer kept."""
        return len(self.kept) == self.beams and self.worst() >= self.score(best_total, length)


def beam_search(
    t5: T5, states: Tensor, mask: Tensor | None, task: Tensor, settings: Generation
) -> Tensor:  # ... -> (b * returns, t)
    """Extend the `beams` most likely prefixes of each sample until `Hypotheses.done`."""
    b, beams = len(states), settings.beams
    cache = t5.start(states, mask, task, settings.max_new_tokens + 1)
    ids = torch.full((b * beams, 1), PAD, device=states.device)
    totals = torch.full((b, beams), -1e9, device=states.device)
    totals[:, 0] = 0.0  # all beams start equal: only the first may branch
    answers = [Hypotheses(settings) for _ in range(b)]
    done = [False] * b
    for length in range(1, settings.max_new_tokens + 1):
        scores = penalise(t5.decode(ids[:, -1:], cache)[:, -1].float().log_softmax(-1), ids, settings)
        vocabulary = scores.shape[1]
        scores = rearrange(totals.reshape(-1, 1) + scores, "(b k) v -> b (k v)", b=b)
        best, flat = scores.topk(2 * beams, dim=1)  # enough, even if `beams` of them end
        going: list[tuple[float, int, int]] = []  # total, row it continues, token
        for i, (best_i, flat_i) in enumerate(zip(best.tolist(), flat.tolist(), strict=True)):
            if done[i]:
                going += [(0.0, i * beams, PAD)] * beams
                continue
            kept = 0
            for rank, (total, index) in enumerate(zip(best_i, flat_i, strict=True)):
                row, token = i * beams + index // vocabulary, index % vocabulary
                if token != EOS:
                    going.append((total, row, token))
                    kept += 1
                elif rank < beams:
                    answers[i].add(ids[row], total, length)
                if kept == beams:
                    break
            done[i] = answers[i].done(best_i[0], length)
        sums, rows, tokens = zip(*going, strict=True)
        order = torch.tensor(rows, device=ids.device)
        ids = torch.cat((ids[order], torch.tensor(tokens, device=ids.device)[:, None]), dim=1)
        totals = torch.tensor(sums, device=ids.device).reshape(b, beams)
        if all(done):
            break
        cache.reorder(order)
    for i, answer in enumerate(answers):
        if not done[i]:  # out of tokens: unfinished beams count as they are
            for row, total in enumerate(totals[i].tolist()):
                answer.add(ids[i * beams + row], total, ids.shape[1] - 1)
    return pad_answers(answers, settings)


def pad_answers(answers: Sequence[Hypotheses], settings: Generation) -> Tensor:  # -> (b * returns, t)
    """The best answers first, `</s>` appended where there is room, then PAD."""
    best = [
        ids for answer in answers for _, ids in sorted(answer.kept, key=lambda kept: kept[0])[::-1][: settings.returns]
    ]
    length = min(max(map(len, best)) + 1, settings.max_new_tokens + 1)
    return torch.stack([F.pad(F.pad(ids, (0, 1), value=EOS), (0, length), value=PAD)[:length] for ids in best])


def log_likelihoods(
    t5: T5,
    states: Tensor,
    mask: Tensor | None,
    task: Tensor,
    candidates: Sequence[Sequence[Sequence[int]]],
    segment: int = 32,
) -> list[list[float]]:
    """The summed log-probability of each candidate's tokens, per sample; `</s>` counts where a candidate holds it.

    All candidates of a sample share one encoding. `segment` of them are scored at a time.
    """
    found: list[list[float]] = [[] for _ in candidates]
    cache = t5.start(states, mask, task, max(len(ids) for sample in candidates for ids in sample))
    for first in range(0, max(map(len, candidates)), segment):
        part = [sample[first : first + segment] for sample in candidates]
        most = max(map(len, part))
        labels = torch.full((len(part), most, cache.capacity), IGNORE)
        for i, sample in enumerate(part):
            for j, ids in enumerate(sample):
                labels[i, j, : len(ids)] = torch.tensor(ids)
        labels = rearrange(labels, "b k t -> (b k) t").to(states.device)
        logits = rearrange(t5.predict(labels, cache).float(), "r t v -> r v t")
        sums = -F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none").sum(-1)
        if not sums.isfinite().all():
            raise ValueError("the answers have no finite score: these weights have diverged, or hold no numbers")
        for scores, row, sample in zip(found, rearrange(sums, "(b k) -> b k", k=most).tolist(), part, strict=True):
            scores += row[: len(sample)]
    return found
