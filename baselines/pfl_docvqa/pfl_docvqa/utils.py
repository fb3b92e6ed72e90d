"""How answers are read and scored, and what is shown of the comparison."""

from collections import Counter
from collections.abc import Sequence
from statistics import mean

import torch
from flwr.app import MetricRecord
from torch import nn

from flower_ext.client.adapters import question_answering_marks
from flower_ext.client.task import batches
from pfl_docvqa.anls import similarity
from pfl_docvqa.dataset import documents, tensors, words

COLUMNS = {
    "central/anls": "ANLS",
    "central/right": "right answers",
    "bytes/down": "down a round",
    "bytes/up": "up a round",
}


def read_answer(text: str, start: int, end: int) -> str:
    r"""Return what is marked in a text: from token `start` on, before token `end`.

    >>> read_answer("Which?\nMutt/1.4", 3, 4)
    'Mutt'
    >>> read_answer("Which?\nMutt/1.4", 4, 3)
    ''
    """
    marked = words(text)[start:end]
    return text[marked[0][0] : marked[-1][1]] if marked else ""


def true_answers(split: str) -> list[str]:
    """Return the answer to each question of a split."""
    data = documents()[split]
    columns = (list(data[name]) for name in ("text", "begin", "stop"))
    return [text[begin:stop] for text, begin, stop in zip(*columns, strict=True)]


@torch.no_grad()
def answers(model: nn.Module, split: str) -> list[str]:
    """Return a model's answers to the questions of a split."""
    texts, found = list(documents()[split]["text"]), []
    model.eval()
    for batch in batches(tensors(split), 256):
        start, end = question_answering_marks(model, batch)
        found += list(zip(start.tolist(), end.tolist(), strict=True))
    return [read_answer(x, *marks) for x, marks in zip(texts, found, strict=True)]


def score(found: Sequence[str], truths: Sequence[str]) -> MetricRecord:
    """Return ANLS, and the share of answers that are right but for upper case."""
    pairs = list(zip(found, truths, strict=True))
    return MetricRecord(
        {
            "anls": mean(similarity(x, [truth]) for x, truth in pairs),
            "right": mean(float(x.lower() == truth.lower()) for x, truth in pairs),
        }
    )


def usual_answers() -> list[str]:
    """Return for each test question its most frequent answer in training."""
    asked = {
        split: [text.partition("\n")[0] for text in documents()[split]["text"]]
        for split in ("train", "test")
    }
    seen: dict[str, Counter[str]] = {}
    for question, truth in zip(asked["train"], true_answers("train"), strict=True):
        seen.setdefault(question, Counter())[truth] += 1
    usual = {question: counts.most_common(1)[0][0] for question, counts in seen.items()}
    return [usual[question] for question in asked["test"]]
