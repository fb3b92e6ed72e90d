"""ANLS, the metric of answers: how near two texts are, letter by letter."""

from collections.abc import Sequence

THRESHOLD = 0.5


def edit_distance(left: str, right: str) -> int:
    """Return how many letters must be inserted, deleted or replaced (Levenshtein).

    >>> edit_distance("kitten", "sitting")
    3
    """
    last = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        row = [i]
        for j, b in enumerate(right, 1):
            row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (a != b)))
        last = row
    return last[-1]


def similarity(answer: str, truths: Sequence[str]) -> float:
    """Return an answer's score: its likeness to the nearest of the true answers.

    That is 1 - NL if NL < 0.5, and 0 otherwise (Biten et al. 2019, "Scene Text Visual
    Question Answering", eq. 1), with NL the edit distance over the length of the longer
    text. Case and space at the ends do not count.

    Parameters
    ----------
    answer : str
        The model's.
    truths : sequence of str
        One or more; two empty texts are alike.

    Examples
    --------
    >>> similarity("Mutt/1.4", ["mutt"]), similarity("mut", ["Mutt", "exmh"])
    (0.0, 0.75)
    """
    return max(_score(answer.strip().lower(), x.strip().lower()) for x in truths)


def _score(answer: str, truth: str) -> float:
    longer = max(len(answer), len(truth))
    distance = edit_distance(answer, truth) / longer if longer else 0.0
    return 1 - distance if distance < THRESHOLD else 0.0
