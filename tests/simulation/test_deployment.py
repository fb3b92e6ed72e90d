"""Flower's deployment engine on loopback, with TLS: the apps run there unchanged."""

import contextlib
import datetime
import ipaddress
import itertools
import json
import os
import random
import socket
import subprocess
import sysconfig
import time
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from flower_ext.server.tracking import read_metrics

ROOT = Path(__file__).parents[2]
APP = Path(__file__).parent / "flower_app"
NODES = 2
SECONDS = 600.0  # of all runs, which are at once
pytestmark = pytest.mark.slow


def certificate(folder):
    """Write a certificate of 127.0.0.1 that vouches for itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    hosts = [
        x509.DNSName("localhost"),
        x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
    ]
    cert = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(cert.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )


def free_port():
    """Return a free port, below those that systems give away by themselves.

    One of theirs could be somebody's again before the program that is told of it
    listens. Those below 20,000 are Ray's.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with (
            contextlib.suppress(OSError),
            socket.create_server(("127.0.0.1", port)),
        ):
            return port


def wait_for(port):
    """Wait until somebody listens; the SuperLink takes seconds."""
    end = time.monotonic() + SECONDS
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            assert time.monotonic() < end, f"nobody listens at {port}"
            time.sleep(0.05)


def tool(name):
    return str(Path(sysconfig.get_path("scripts")) / name)


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    """Start a SuperLink and two SuperNodes; return what runs an app on them."""
    home = tmp_path_factory.mktemp("flwr")
    certificate(home)
    port = free_port()
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH", "")])]
    env = {
        **os.environ,
        "PATH": os.pathsep.join(
            [sysconfig.get_path("scripts"), os.environ.get("PATH", "")]
        ),
        "PYTHONPATH": os.pathsep.join(paths),
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
    }
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\n'
        f'address = "127.0.0.1:{port}"\nroot-certificates = "{home}/cert.pem"\n'
    )
    processes = []

    def start(name, *command):
        with (home / f"{name}.log").open("wb") as log:
            processes.append(
                subprocess.Popen(
                    command,
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    ca, cert, key = f"{home}/cert.pem", f"{home}/cert.pem", f"{home}/key.pem"
    start(
        "superlink", tool("flower-superlink"), "--port", str(port),
        "--ssl-ca-certfile", ca, "--ssl-certfile", cert, "--ssl-keyfile", key,
        "--disable-runtime-dependency-installation",
    )  # fmt: skip
    for i in range(NODES):
        clients = f"{15 * i}-{15 * i + 14}"
        start(
            f"supernode{i}", tool("flower-supernode"),
            "--superlink", f"127.0.0.1:{port}", "--root-certificates", ca,
            "--port", str(free_port()),
            "--ssl-ca-certfile", ca, "--ssl-certfile", cert, "--ssl-keyfile", key,
            "--node-config",
            f"partition-id={i} num-partitions=373 logical-clients='{clients}'",
        )  # fmt: skip

    wait_for(port)

    def run(app, config):
        settings = " ".join(f"{k}={json.dumps(v)}" for k, v in config.items())
        command = [tool("flwr"), "run", str(app), "here", "--run-config", settings]
        log = home / f"run-{app.name}.log"
        start(log.stem, *command, "--stream")
        submitted = processes[-1]

        def end():
            with contextlib.suppress(subprocess.TimeoutExpired):
                submitted.wait(SECONDS)
            return "\n".join(
                f"== {log.name}\n{log.read_text('utf-8', errors='replace')[-3000:]}"
                for log in home.glob("*.log")
            )

        return end

    yield run
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait(20)


@pytest.fixture(scope="module")
def started(deployment, tmp_path_factory):
    """Start all runs at once: each mostly waits, for processes and Flower's polls.

    For each app's name, what waits for the run's end and returns the logs, and where
    its results are.
    """
    folder = tmp_path_factory.mktemp("results")
    packed = {"transports": "auto", "rounds": 2, "codecs": True, "asynchronous": True}
    dpftrl = {
        "mechanisms": "tree",
        "epsilons": "8",
        "num-sampled-clients": 1,
        "population-size": NODES,
        "simulated-cohort": 0,
        "central-examples": 100,
        "num-server-rounds": 1,
    }
    ditto = {
        "strategies": "ditto",
        "num-training-clients": 1,
        "fraction-train": 0.5,
        "num-server-rounds": 2,
        "evaluate-every": 2,
    }
    model = {"dataset": "shakespeare", "hidden-size": 16, "local-epochs": 1}
    silos = {"strategies": "mrmtl@0.5", "local-steps": 1, "evaluate-every": 2}
    unequal = {
        "strategies": "heterofl",
        "num-images": 300,
        "num-clients": NODES,
        "widths": "1.0 0.25",
        "tiers": "1 1",
        "channels": 8,
        "num-test": 100,
        "local-epochs": 1,
    }
    runs = {}
    for app, config in (
        (APP, packed),
        (ROOT / "baselines" / "dpftrl", {**dpftrl, **model}),
        (ROOT / "baselines" / "personalization", {**ditto, **model}),
        (ROOT / "baselines" / "silo_privacy", {**silos, "num-server-rounds": 1}),
        (ROOT / "baselines" / "unequal_clients", {**unequal, "num-server-rounds": 1}),
    ):
        results = folder / app.name
        end = deployment(app, {**config, "results": str(results)})
        runs[app.name] = end, results
    return runs


def test_virtual_clients_live_where_their_node_says(started, plain_clients):
    """Their arrays travel encoded both ways, and error feedback stays with them."""
    end, file = started["flower_app"]
    log = end()
    assert file.exists(), log
    found = json.loads(file.read_text("utf-8"))["auto"]
    expected = plain_clients(2, codecs=True)
    assert expected["w"] != plain_clients(2)["w"]
    assert {key: found[key] for key in expected} == expected


def test_clients_take_part_at_any_time(started):
    """FedBuff in real time, of virtual clients and of the nodes themselves."""
    end, file = started["flower_app"]
    log = end()
    assert file.exists(), log
    found = json.loads(file.read_text("utf-8"))
    visits = found["asynchronous"]["visits"]
    assert [len(update) for update in visits] == [10] * 4
    nodes = found["asynchronous-nodes"]
    orders = orders_of_two_nodes([visit for [visit] in nodes["visits"]])
    assert any(nodes["w"] == pytest.approx([w] * 4, rel=1e-6) for w in orders), log


def orders_of_two_nodes(visits):
    """Return the models that orders of the nodes' replies with these visits give.

    Node 0 moves nothing, node 1 by 1/2, then 3/4, ... A node that was asked s updates
    ago counts 1 / sqrt(1 + s), and is asked again as soon as it has replied.
    """
    for order in itertools.product((0, 1), repeat=len(visits)):
        counts, asked, model = [0, 0], [0, 0], 0.0
        known = []
        for version, node in enumerate(order):
            counts[node] += 1
            known.append(counts[node])
            change = (1 - 2.0 ** -counts[1]) * node
            model += change / (1 + version - asked[node]) ** 0.5
            asked[node] = version + 1
        if known == visits:
            yield model


def test_a_baseline_runs_unchanged(started):
    """DP-FTRL; tests/test_engine.py has FedFish under ``flwr run``."""
    end, results = started["dpftrl"]
    log = end()
    found = [read_metrics(path.parent) for path in results.glob("*/metrics.jsonl")]
    assert len(found) == 1, log
    [metrics] = found[0]
    assert metrics["train/num-replies"] == 1
    assert metrics["train/num-errors"] == 0
    assert 7 < metrics["train/epsilon"] <= 8


@pytest.mark.parametrize(
    ("baseline", "method"),
    [("silo_privacy", "mrmtl@0.5"), ("unequal_clients", "heterofl")],
)
def test_no_reply_of_a_baseline_fails(started, baseline, method):
    """Silos with DP-SGD, and nodes that are each sent a model of another width."""
    end, results = started[baseline]
    log = end()
    assert (results / "summary.json").exists(), log
    [row] = read_metrics(results / method)
    assert (row["train/num-replies"], row["train/num-errors"]) == (NODES, 0), log
    if baseline == "silo_privacy":
        assert 0.9 < row["train/example-epsilon"] <= 1
    else:
        assert row["messages/up"] == 2 * NODES  # they evaluate, too
        assert {f"evaluate/accuracy-width-{x}" for x in ("1", "0.25")} <= row.keys()


def test_a_personal_model_stays_with_its_node(started):
    """Ditto: one client trains twice and has a model of its own, the other has none."""
    end, results = started["personalization"]
    log = end()
    assert (results / "ditto" / "metrics.jsonl").exists(), log
    rows = read_metrics(results / "ditto")
    assert [row["train/num-replies"] for row in rows] == [1, 1], log
    last = rows[1]
    assert last["evaluate/loss-seen"] != last["evaluate/received-loss-seen"]
    assert last["evaluate/loss-unseen"] == last["evaluate/received-loss-unseen"]
