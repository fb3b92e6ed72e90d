"""Heads of mails as documents, their questions, and providers divided into clients.

A document is what a mail's head says of the mail and of no person: date, subject,
program and content type, in the mail's own order. Its provider is the program that
wrote it and the list that it went to, which decide the document's layout as the issuer
of an invoice does.
"""

from __future__ import annotations

import email
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from email.message import Message
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple
from zlib import crc32

import numpy as np
import torch
from flwr.app import Context
from torch import Tensor

from flower_ext.core.errors import refuse
from flower_ext.data.cache import cache_root, prepared
from flower_ext.data.fetch import package_file
from flower_ext.data.mail import PACKAGE

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

Columns = dict[str, Tensor]
Span = tuple[int, int]

#: What is asked, by the field that answers it.
QUESTIONS = {
    "subject": "What is it about?",
    "day": "On which day was it sent?",
    "time": "At what time was it sent?",
    "program": "Which program wrote it?",
    "charset": "Which character set does it use?",
}
CLIENTS = 10
MIN_DOCUMENTS = 5  # of a provider
TOKENS = 80  # of a question and its document; longer documents are left out
VOCABULARY = 4096
TEST_SHARE = 0.2

# The lines of a head that are kept: all others name people, machines or messages.
_DATE, _SUBJECT, _TYPE = ("date",), ("subject",), ("content-type",)
_PROGRAM = ("x-mailer", "user-agent")
_KEPT = _DATE + _SUBJECT + _TYPE + _PROGRAM
_FIELDS = {
    "subject": (_SUBJECT, re.compile(r"(?:re: ?|fwd?: ?|\[[^\]]*\] ?)*(.+)", re.I)),
    "day": (_DATE, re.compile(r"(?:\w+, )?(\d{1,2} [A-Z][a-z]{2} \d{4})")),
    "time": (_DATE, re.compile(r".*?(\d{1,2}:\d\d(?::\d\d)?)")),
    "program": (
        _PROGRAM,
        re.compile(r"([a-z][a-z!.-]*(?: (?!(?:version|v|build)\b)[a-z!.-]+)*)", re.I),
    ),
    "charset": (_TYPE, re.compile(r".*?charset ?= ?\"?([\w-]+)", re.I)),
}
_MEMBER = re.compile(r"package/data/(\w+-)?(ham|spam)-\d/\d+\.\w+\.txt")
_LIST = re.compile(r"<([^.>]+)")
_PRIVATE = re.compile(r"\S+@\S+|\b(?:https?|ftp)://\S+|\bwww\.\S+")
_COMMENT = re.compile(r"\([^()]*\)")  # as RFC 822 has them
_SPACE = re.compile(r"\s+")
_TOKEN = re.compile(r"[^\W\d_]+|\d+|\n|\S")


class Document(NamedTuple):
    """One document, whose it is, and where the answers are in it."""

    provider: str
    when: float
    text: str
    answers: dict[str, Span]


def read_document(mail: Message) -> Document | None:
    r"""Return the document that a mail's head makes; None where a field is missing.

    >>> mail = email.message_from_string(
    ...     "From: Ann <ann@a.ie>\nDate: Thu, 22 Aug 2002 18:26:25 +0700\n"
    ...     "Subject: Re: [ILUG] Fonts\nUser-Agent: Mutt/1.4i (Linux)\n"
    ...     "Content-Type: text/plain; charset=us-ascii\nList-Id: <ilug.linux.ie>\n\n"
    ... )
    >>> found = read_document(mail)
    >>> print(found.text)
    Date: Thu, 22 Aug 2002 18:26:25 +0700
    Subject: Re: [ILUG] Fonts
    User-Agent: Mutt/1.4i
    Content-Type: text/plain; charset=us-ascii
    >>> found.provider, [found.text[slice(*x)] for x in found.answers.values()]
    ('mutt, ilug', ['Fonts', '22 Aug 2002', '18:26:25', 'Mutt', 'us-ascii'])
    """
    text, answers = "", {}
    for name, value in mail.items():
        if name.lower() not in _KEPT:
            continue
        value = _COMMENT.sub("", _PRIVATE.sub("", str(value)))
        value = _SPACE.sub(" ", value).strip()
        text += f"{name}: "
        for field, (names, pattern) in _FIELDS.items():
            found = pattern.match(value) if name.lower() in names else None
            if found and field not in answers:
                answers[field] = (len(text) + found.start(1), len(text) + found.end(1))
        text += f"{value}\n"
    try:
        when = parsedate_to_datetime(str(mail.get("Date"))).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
    if answers.keys() != QUESTIONS.keys():
        return None
    to = _LIST.search(str(mail.get("List-Id", "")))
    program = text[slice(*answers["program"])]
    provider = f"{program}, {to[1] if to else 'no list'}".lower()
    ordered = {field: answers[field] for field in QUESTIONS}
    return Document(provider, when, text.removesuffix("\n"), ordered)


def split_documents(
    wanted: Iterable[Document], unwanted: Iterable[Document]
) -> dict[str, list[Document]]:
    """Divide documents into what is public, what is for training, and what for testing.

    Providers with at least :data:`MIN_DOCUMENTS` documents belong to clients, and the
    last fifth of their documents, by date, is for testing. Unwanted mails and those of
    smaller providers are public.
    """
    providers: dict[str, list[Document]] = defaultdict(list)
    for document in {x.text: x for x in wanted}.values():
        providers[document.provider].append(document)
    splits: dict[str, list[Document]] = {
        "public": sorted({x.text: x for x in unwanted}.values()),
        "train": [],
        "test": [],
    }
    for _, documents in sorted(providers.items()):
        documents.sort(key=lambda x: (x.when, x.text))
        if len(documents) < MIN_DOCUMENTS:
            splits["public"] += documents
            continue
        tests = max(int(TEST_SHARE * len(documents)), 1)
        splits["train"] += documents[:-tests]
        splits["test"] += documents[-tests:]
    return splits


def assign(sizes: Mapping[str, int], clients: int) -> dict[str, int]:
    """Give each provider, the largest first, to the client with the least so far.

    >>> assign({"a": 5, "b": 4, "c": 2, "d": 1}, 2)
    {'a': 0, 'b': 1, 'c': 1, 'd': 0}
    """
    loads = [0] * clients
    owner = {}
    for provider in sorted(sizes, key=lambda x: (-sizes[x], x)):
        owner[provider] = loads.index(min(loads))
        loads[owner[provider]] += sizes[provider]
    return owner


def words(text: str) -> list[Span]:
    r"""Return where the tokens of a text are: words, numbers, line ends and signs.

    >>> [("a1: b2\nc"[slice(*x)]) for x in words("a1: b2\nc")]
    ['a', '1', ':', 'b', '2', '\n', 'c']
    """
    return [x.span() for x in _TOKEN.finditer(text)]


def token_ids(text: str, spans: Sequence[Span]) -> list[int]:
    """Return the numbers of tokens: hashes from 1, whatever their case; 0 fills up."""
    return [
        1 + crc32(text[slice(*x)].lower().encode()) % (VOCABULARY - 1) for x in spans
    ]


@lru_cache(maxsize=1)
def documents() -> DatasetDict:
    """Return one row a question and document, in the splits of :func:`split_documents`.

    Columns: ``provider``, ``document`` (its number in the split), ``text`` (question,
    document and a line end behind each), ``begin`` and ``stop`` (the answer's letters).
    """

    def build() -> DatasetDict:
        from datasets import DatasetDict

        found: dict[str, list[Document]] = {"ham": [], "spam": []}
        for kind, mail in _mails():
            document = read_document(mail)
            if document is not None and _fits(document):
                found[kind].append(document)
        splits = split_documents(found["ham"], found["spam"])
        return DatasetDict({name: _rows(x) for name, x in splits.items()})

    return prepared(cache_root(), f"pfl-docvqa,tokens={TOKENS}", build)


def _mails() -> Iterator[tuple[str, Message]]:
    with tarfile.open(package_file(PACKAGE, cache_root())) as tar:
        for member in tar:
            if found := _MEMBER.match(member.name):
                file = tar.extractfile(member)
                assert file is not None
                yield found[2], email.message_from_bytes(file.read())


def _fits(document: Document) -> bool:
    longest = max(len(words(x)) for x in QUESTIONS.values())
    return longest + 2 + len(words(document.text)) <= TOKENS


def _rows(found: list[Document]) -> Dataset:
    from datasets import Dataset

    columns: dict[str, list[object]] = defaultdict(list)
    for number, document in enumerate(found):
        for field, (begin, stop) in document.answers.items():
            asked = QUESTIONS[field] + "\n"
            row = {
                "provider": document.provider,
                "document": number,
                "text": asked + document.text + "\n",
                "begin": len(asked) + begin,
                "stop": len(asked) + stop,
            }
            for name, value in row.items():
                columns[name].append(value)
    return Dataset.from_dict(columns)


@lru_cache(maxsize=3)
def tensors(split: str) -> Columns:
    """Return a split as the model takes it.

    Returns
    -------
    dict
        ``input_ids`` and ``attention_mask`` ``(rows, tokens)``; ``start``, the place of
        the answer's first token, and ``end``, that of the token behind its last:
        a causal model sees only there that the answer is over.
    """
    data = documents()[split]
    ids = torch.zeros(len(data), TOKENS, dtype=torch.long)
    marks = torch.zeros(2, len(data), dtype=torch.long)
    for i, (text, begin, stop) in enumerate(
        zip(*(list(data[x]) for x in ("text", "begin", "stop")), strict=True)
    ):
        spans = words(text)
        ids[i, : len(spans)] = torch.tensor(token_ids(text, spans))
        inside = [at for at, x in enumerate(spans) if x[0] < stop and x[1] > begin]
        marks[0, i], marks[1, i] = inside[0], inside[-1] + 1
    mask = (ids > 0).long()
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "start": marks[0],
        "end": marks[1],
    }


@lru_cache(maxsize=2)
def _owners(split: str) -> Tensor:
    """Return the client of every row of a split."""
    sizes = Counter(documents()["train"]["provider"])
    owner = assign(sizes, CLIENTS)
    return torch.tensor([owner[x] for x in documents()[split]["provider"]])


@lru_cache(maxsize=1)
def _asked(questions: int) -> Tensor:
    """Return which rows for training are used: so many questions of each document."""
    shape = len(documents()["train"]) // len(QUESTIONS), len(QUESTIONS)
    order = np.random.default_rng(0).random(shape).argsort(1).argsort(1)
    return torch.from_numpy((order < questions).reshape(-1))


def client_data(context: Context) -> tuple[Columns, Columns]:
    """Return training and test data of the client that the context is of.

    Of each document for training some of the five questions are asked, ``questions`` of
    the run's configuration, the same in every run.
    """
    client = int(context.node_config["partition-id"])
    if not 0 <= client < CLIENTS:
        refuse("partition-id", client, f"from 0 to {CLIENTS - 1}, a client's number")
    asked = _asked(int(context.run_config["questions"]))
    rows = [asked & (_owners("train") == client), _owners("test") == client]
    train, test = (
        {name: x[chosen] for name, x in tensors(split).items()}
        for split, chosen in zip(("train", "test"), rows, strict=True)
    )
    return train, test
