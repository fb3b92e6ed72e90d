"""The file of a silo's account: whole or refused, and shared by processes."""

import json
import math
import threading
import time
from pathlib import Path

import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from flwr.app import ConfigRecord, RecordDict

from flower_ext.privacy import SiloPrivacy, StepLedger, silo_account
from flower_ext.privacy.accounting.gaussian import gaussian_epsilon
from flower_ext.privacy.silo_account import SiloAccount, ledger_path


def opened(path, server_round=1, state=None, **run):
    return SiloAccount(
        path,
        state or RecordDict(),
        client=7,
        server_round=server_round,
        run=ConfigRecord({k.replace("_", "-"): v for k, v in run.items()}),
    )


def test_a_ledger_reads_what_it_wrote(tmp_path):
    path = tmp_path / "ledger.json"
    ledger = StepLedger(3, unit="who").add(0.1, 1.0, 4).add(1 / 3, 2.5, 5)
    ledger.save(path)
    assert StepLedger.load(path) == ledger
    assert StepLedger.load(tmp_path / "other.json") == StepLedger()
    StepLedger().save(path)
    assert StepLedger.load(path).total == 0
    assert [file.name for file in tmp_path.iterdir()] == ["ledger.json"]


GOOD = StepLedger().add(0.1, 1.0, 4).record()


def test_a_ledger_of_format_1_is_read(tmp_path):
    path = tmp_path / "ledger.json"
    ledger = StepLedger(3, unit="who").add(0.1, 1.0, 4).add(1 / 3, 2.5, 5)
    record = {k: x for k, x in ledger.record().items() if k != "group-sizes"}
    path.write_text(json.dumps({"format": 1, **record}), "utf-8")
    assert StepLedger.load(path) == ledger


def test_steps_of_one_unit_compose_whatever_their_group_sizes():
    """Against dp-accounting's own composition, and closed form without sampling."""
    ledger = StepLedger(3, unit="who").add(0.1, 4.0, 20)
    privacy = SiloPrivacy(
        noise_multiplier=4.0,
        clipping_norm=1.0,
        delta=1e-5,
        max_examples_per_user=9,
        user="who",
    )
    both = StepLedger.read(ledger.record(), privacy, 1).add(0.2, 2.0, 30)
    one = pld.from_mixture_gaussian_mechanism(
        4.0,
        [0.0, 1.0, 2.0, 3.0],
        [0.9**3, 3 * 0.1 * 0.9**2, 3 * 0.1**2 * 0.9, 0.1**3],
        value_discretization_interval=1e-4,
    ).self_compose(20)
    two = pld.from_gaussian_mechanism(
        2.0, sampling_prob=0.2, value_discretization_interval=1e-4
    ).self_compose(30)
    found = one.compose(two).get_epsilon_for_delta(1e-5)
    assert both.epsilon(1e-5) == pytest.approx(found, rel=2e-2)
    full = StepLedger(3, unit="who").add(1.0, 4.0, 2).record()
    full = StepLedger.read(full, privacy, 1).add(1.0, 4.0, 7)
    mu = math.sqrt(2 * (3 / 4) ** 2 + 7 * (1 / 4) ** 2)
    assert full.epsilon(1e-5) == gaussian_epsilon(mu, 1e-5)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        json.dumps({"format": 9, **GOOD}),
        json.dumps({"format": 1, **GOOD, "steps": [-4]}),
        json.dumps({"format": 1, **GOOD, "steps": [4.5]}),
        json.dumps({"format": 1, **GOOD, "steps": []}),
        json.dumps({"format": 1, **GOOD, "rates": [1.5]}),
        json.dumps({"format": 1, **GOOD, "noise-multipliers": [float("nan")]}),
        json.dumps({"format": 1, **GOOD, "group-size": 0}),
        json.dumps({"format": 1, **GOOD, "unit": 3}),
        json.dumps({"format": 2, **GOOD, "group-sizes": [0]}),
        json.dumps({"format": 2, **GOOD, "group-sizes": []}),
        json.dumps(
            {"format": 2, **{k: x for k, x in GOOD.items() if k != "group-sizes"}}
        ),
        json.dumps({"format": 1, **{k: x for k, x in GOOD.items() if k != "unit"}}),
    ],
)
def test_a_damaged_ledger_is_not_an_empty_one(tmp_path, text):
    path = tmp_path / "ledger.json"
    path.write_text(text, "utf-8")
    with pytest.raises(ValueError, match="cannot be read.*put a copy back"):
        StepLedger.load(path)


def test_a_write_that_breaks_off_leaves_the_account_before(tmp_path, monkeypatch):
    path = tmp_path / "ledger.json"
    before = StepLedger().add(0.1, 1.0, 4)
    before.save(path)

    def crash(handle):
        raise OSError("the power is gone")

    monkeypatch.setattr(silo_account.os, "fsync", crash)
    with pytest.raises(OSError, match="power"):
        before.add(0.1, 1.0, 6).save(path)
    assert StepLedger.load(path) == before


@pytest.mark.parametrize("ledger", ["", "ledger.json", "./a/ledger.json", 3])
def test_a_path_that_depends_on_where_a_process_starts_is_refused(ledger):
    with pytest.raises(ValueError, match="ledger="):
        SiloPrivacy(clipping_norm=1.0, delta=1e-5, noise_multiplier=1.0, ledger=ledger)


def test_a_folder_is_no_ledger(tmp_path):
    with pytest.raises(ValueError, match="must be a file, not a folder"):
        SiloPrivacy(
            clipping_norm=1.0, delta=1e-5, noise_multiplier=1.0, ledger=tmp_path
        )


def test_the_home_and_links_lead_to_one_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "link.json").symlink_to(tmp_path / "ledger.json")
    found = {ledger_path(p) for p in ("~/ledger.json", tmp_path / "link.json")}
    assert found == {tmp_path.resolve() / "ledger.json"}


def test_a_folder_that_is_not_there_is_no_empty_account(tmp_path):
    account = opened(tmp_path / "unmounted" / "ledger.json")
    with (
        pytest.raises(ValueError, match="must be in a folder that is there"),
        account.locked(),
    ):
        pass


def test_rounds_at_the_same_time_are_all_charged(tmp_path):
    path = tmp_path / "ledger.json"

    def charge():
        account = opened(path)
        with account.locked():
            ledger = StepLedger.read(account.read())
            time.sleep(0.02)
            account.write(ledger.add(0.1, 1.0, 1).record())

    threads = [threading.Thread(target=charge) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert StepLedger.load(path).total == 8


def test_the_ledger_counts_before_what_a_run_remembers(tmp_path):
    path: Path = tmp_path / "ledger.json"
    state = RecordDict(
        {"account/example-level-dp": StepLedger().add(0.1, 1.0, 2).record()}
    )
    account = opened(path, state=state)
    assert StepLedger.read(account.read()).total == 2
    StepLedger().add(0.1, 1.0, 9).save(path)
    assert StepLedger.read(account.read()).total == 9


def test_an_older_copy_of_the_ledger_is_not_what_is_spent(tmp_path):
    path = tmp_path / "ledger.json"
    account = opened(path)
    account.write(StepLedger().add(0.1, 1.0, 2).record())
    older = path.read_text("utf-8")
    account.write(StepLedger().add(0.1, 1.0, 4).record())
    path.write_text(older, "utf-8")
    with pytest.raises(ValueError, match="at least 4 steps, not 2: this run has"):
        account.read()


def test_a_process_remembers_runs_that_go_on_and_no_others(monkeypatch):
    monkeypatch.setattr(silo_account, "_remembered", {})
    record = StepLedger().add(0.1, 1.0, 2).record()
    opened(None, name="a").write(record)
    opened(None).write(record)

    def known(**run):
        return opened(None, 2, **run).read() is not None

    assert known(name="a", resumed_after=1)
    assert not known(name="b", resumed_after=1)
    assert not known(resumed_after=1)
    assert not known(name="a")
