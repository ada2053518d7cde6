"""The streams and signals of a terminal, a service manager or a Job: what they are like never decides about events."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import http.client
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from brokers import HOST, Tansu, audit, create_topic, event_id, free_port, read_all, wait_until
from conftest import ROOT, RunScript, clean_environment
from jsonschema import Draft7Validator  # type: ignore[import-untyped]
from producer_test import LINE, PRODUCER, SAMPLES, events, instant, nothing_there, stopped, summary
from prometheus_client.parser import text_string_to_metric_families

AUDITOR = "test_random_consumer.py"
CHURN = "random_churn_producer.py"
Process = subprocess.Popen[bytes]
Launch = Callable[..., Process]

# What standard error may be: how the script is started, when its standard error is a pipe that nobody reads.
SINKS: dict[str, Sequence[str]] = {
    "unread-pipe": [],
    "closed": ["sh", "-c", 'exec "$0" "$@" 2>&-'],
    "full-device": ["sh", "-c", 'exec "$0" "$@" 2>/dev/full'],
    "full-disk": [
        *("unshare", "--mount", "sh", "-c"),
        'mount -t tmpfs -o size=4k none /mnt; yes >/mnt/log 2>/dev/null; exec "$0" "$@" 2>>/mnt/log',
    ],
}
BUFFERING = [pytest.param("", id="buffered"), pytest.param("1", id="unbuffered")]
STOPS = [pytest.param(number, id=number.name) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


@functools.cache
def mounts() -> bool:
    if not shutil.which("unshare"):
        return False
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.fixture(params=SINKS)
def sink(request: pytest.FixtureRequest) -> Sequence[str]:
    if request.param == "full-device" and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    if request.param == "full-disk" and not mounts():
        pytest.skip("no right to make a mount namespace")
    return SINKS[request.param]


@pytest.fixture
def full_pipe() -> Iterator[tuple[int, int]]:
    """(reading end, writing end) of a pipe that takes nothing more until it is read."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"." * 4096)
    os.set_blocking(writer, True)
    yield reader, writer
    os.close(reader)
    os.close(writer)


@pytest.fixture
def launch(tmp_path: Path, full_pipe: tuple[int, int]) -> Iterator[Launch]:
    """launch(PRODUCER, "--print", within=["sh", "-c", …], streams={"stdout": …}, MAX_EVENTS=3) -> Popen.

    Standard error is a pipe that nobody reads, unless `streams` says otherwise.
    """
    running: list[Process] = []

    def start(
        name: str, *flags: str, within: Sequence[str] = (), streams: dict[str, int] | None = None, **settings: object
    ) -> Process:
        command = [*within, sys.executable, str(ROOT / name), *flags]
        chosen = streams or {}
        running.append(
            subprocess.Popen(
                command,
                env=clean_environment(**settings),
                cwd=tmp_path,
                stdin=subprocess.DEVNULL,
                stdout=chosen.get("stdout", subprocess.DEVNULL),
                stderr=chosen.get("stderr", full_pipe[1]),
            )
        )
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture
def kafka(tansu: Tansu, topic: str) -> dict[str, Any]:
    """The settings for a topic of the test's own, ten events a second."""
    create_topic(tansu.direct, topic)
    return {"KAFKA_BROKER": tansu.bootstrap, "KAFKA_TOPIC": topic, "INTERVAL_SECONDS": 0.1}


def records(kafka: dict[str, Any]) -> list[Any]:
    return read_all(kafka["KAFKA_BROKER"], kafka["KAFKA_TOPIC"])


def wait_for_events(kafka: dict[str, Any], count: int) -> None:
    wait_until(lambda: len(records(kafka)) >= count, 20, f"{count} events are in the topic", 0.3)


def kept_pace(made: list[dict[str, Any]], interval: float) -> None:
    """No event far from its slot, from the first to the last."""
    first = instant(made[0])
    lateness = [(instant(event) - first).total_seconds() - n * interval for n, event in enumerate(made)]
    assert max(map(abs, lateness)) < 1, lateness


def metric(port: int, name: str) -> float:
    """The sum of its samples, 0 while the tool does not answer."""
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", "/metrics")
        page = connection.getresponse().read().decode()
    except OSError:
        return 0
    finally:
        connection.close()
    samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
    return sum(sample.value for sample in samples if sample.name == f"random_event_producer_{name}")


# ----------------------------------------------------------------------------------------------- standard error


@pytest.mark.parametrize("unbuffered", BUFFERING)
def test_events_go_on_when_nobody_can_be_told(
    launch: Launch, kafka: dict[str, Any], sink: Sequence[str], unbuffered: str
) -> None:
    script = launch(PRODUCER, within=sink, PYTHONUNBUFFERED=unbuffered, **kafka)
    wait_for_events(kafka, 20)
    script.send_signal(signal.SIGTERM)
    assert script.wait(10) == 0
    sent = records(kafka)
    assert audit(sent).clean
    kept_pace(events(sent), 0.1)


@pytest.mark.parametrize("sink", ["unread-pipe", "full-disk"], indirect=True)
def test_a_flood_of_lines_costs_no_event(launch: Launch, kafka: dict[str, Any], sink: Sequence[str]) -> None:
    """200 events a second, each with several lines."""
    kafka["INTERVAL_SECONDS"] = 0.005
    assert launch(PRODUCER, within=sink, MAX_EVENTS=600, LOG_LEVEL="DEBUG", **kafka).wait(20) == 0
    sent = records(kafka)
    assert (len(sent), audit(sent).clean) == (600, True)
    kept_pace(events(sent), 0.005)


def test_lines_that_were_dropped_are_counted(launch: Launch, kafka: dict[str, Any], full_pipe: tuple[int, int]) -> None:
    """The pipe is read again: every event's line was written, or is in the number of those dropped."""
    kafka["INTERVAL_SECONDS"], port = 0, free_port()
    script = launch(PRODUCER, METRICS_PORT=port, LOG_LEVEL="DEBUG", **kafka)
    wait_until(lambda: metric(port, "events_sent_total") > 30_000, 60, "more lines than any queue holds", 0.2)
    text = bytearray()

    def read() -> None:
        while chunk := os.read(full_pipe[0], 65536):
            text.extend(chunk)

    threading.Thread(target=read, daemon=True).start()
    wait_until(lambda: b" dropped" in text, 10, "the number of dropped lines")
    script.send_signal(signal.SIGTERM)
    assert script.wait(10) == 0
    wait_until(lambda: b"Stopped: " in text, 10, "the summary")
    written = text.decode()
    dropped = sum(map(int, re.findall(r"(\d+) (?:log )?lines (?:were )?dropped", written)))
    last = re.search(r"Stopped: sent (\d+)", written)
    assert last
    assert dropped + written.count("Event sent - ") >= int(last[1])


def test_results_do_not_need_the_log(launch: Launch, kafka: dict[str, Any], sink: Sequence[str]) -> None:
    settings = {**kafka, "LOG_LEVEL": "DEBUG", "MAX_EVENTS": 10, "within": sink, "streams": {"stdout": subprocess.PIPE}}
    samples = launch(SAMPLES, **settings)
    told = samples.communicate(timeout=20)[0].decode().splitlines()
    assert (samples.returncode, told[-1]) == (0, "10 of 10 events confirmed")
    auditor = launch(AUDITOR, "--json", **settings)
    report = json.loads(auditor.communicate(timeout=20)[0])
    assert (auditor.returncode, report["ok"], report["events"]) == (0, True, 10)


@pytest.mark.parametrize("unbuffered", BUFFERING)
def test_a_reader_that_has_gone_is_a_stop(launch: Launch, kafka: dict[str, Any], unbuffered: str) -> None:
    reader, writer = os.pipe()
    script = launch(PRODUCER, streams={"stderr": writer}, PYTHONUNBUFFERED=unbuffered, **kafka)
    os.close(writer)
    with open(reader) as log:
        assert LINE.match(log.readline())
    assert script.wait(10) == 0
    assert audit(records(kafka)).clean


def test_stops_while_kafka_is_gone_and_the_log_is_stuck(launch: Launch, topic: str) -> None:
    """The first signal waits some seconds for what is on its way, here in vain; a second Ctrl+C does not wait."""
    ports = (free_port(), free_port())
    with Tansu() as broker:
        settings = {"KAFKA_BROKER": broker.bootstrap, "KAFKA_TOPIC": topic, "INTERVAL_SECONDS": 0.1}
        patient, impatient = (launch(PRODUCER, METRICS_PORT=port, **settings) for port in ports)
        wait_until(lambda: all(metric(port, "events_sent_total") for port in ports), 20, "events are sent")
    wait_until(lambda: all(metric(port, "unacknowledged_events") for port in ports), 20, "Kafka is missed")

    def once_more() -> bool:
        impatient.send_signal(signal.SIGINT)
        return impatient.poll() is not None

    wait_until(once_more, 5, "the script ends", 0.3)
    assert impatient.wait() == 130
    patient.send_signal(signal.SIGTERM)
    assert patient.wait(10) == 1


FAILING = """\
import random_event_producer as tool
class Broken:
    def __str__(self): raise RuntimeError("no text")
class Talkative(tool.RandomEventProducer):
    def _generate_metadata(self, event_type):
        tool.log.{level}({call})
        return super()._generate_metadata(event_type)
raise SystemExit(tool.main(Talkative))
"""


@pytest.mark.parametrize("level", ["info", "warning"])
@pytest.mark.parametrize("call", ['"%d", "x"', '"%s and %s", 1', '"%s", Broken()'], ids=["type", "count", "str"])
def test_a_log_call_that_fails_stops_nothing(
    run_script: RunScript, kafka: dict[str, Any], tmp_path: Path, call: str, level: str
) -> None:
    (tmp_path / "talkative.py").write_text(FAILING.replace("{call}", call).replace("{level}", level))
    script = run_script(str(tmp_path / "talkative.py"), PYTHONPATH=ROOT, MAX_EVENTS=10, **kafka)
    assert script.wait() == 0, script.tail()
    stopped(script, sent=10)
    assert len(records(kafka)) == 10


# ---------------------------------------------------------------------------------------------- standard output

OUTPUTS = [
    *([PRODUCER, flag] for flag in ("--help", "--version", "--schema", "--print")),
    *([SAMPLES, *flags] for flags in (["--help"], [])),
    *([AUDITOR, *flags] for flags in (["--help"], [], ["--json"])),
]


@pytest.fixture(scope="module")
def feed(tansu: Tansu) -> dict[str, Any]:
    """The settings for a topic with ten events."""
    settings = {"KAFKA_BROKER": tansu.bootstrap, "KAFKA_TOPIC": "terminal", "MAX_EVENTS": 10, "INTERVAL_SECONDS": 0}
    create_topic(tansu.direct, "terminal")
    command = [sys.executable, str(ROOT / PRODUCER)]
    subprocess.run(command, env=clean_environment(**settings), check=True, capture_output=True, timeout=30)
    return settings


def in_shell(line: str, command: list[str], **settings: object) -> subprocess.CompletedProcess[str]:
    """`line` with the script's command as "$@"."""
    name, *flags = command
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}", "bash", sys.executable, str(ROOT / name), *flags],
        env=clean_environment(**settings),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize(
    ("redirection", "unbuffered", "cause"),
    [
        pytest.param(">/dev/full", "", "No space left on device", id="full", marks=pytest.mark.linux),
        pytest.param(">/dev/full", "1", "No space left on device", id="full-unbuffered", marks=pytest.mark.linux),
        pytest.param(">&-", "", "closed|Bad file descriptor", id="closed"),
    ],
)
@pytest.mark.parametrize("command", OUTPUTS, ids=" ".join)
def test_results_that_cannot_be_written(
    feed: dict[str, Any], command: list[str], redirection: str, unbuffered: str, cause: str
) -> None:
    done = in_shell(f'"$@" {redirection}', command, PYTHONUNBUFFERED=unbuffered, **feed)
    lines = done.stderr.splitlines()
    told = [line for line in lines if re.search(rf"standard output .*({cause})", line)]
    assert (done.returncode, len(told)) == (1, 1), done.stderr
    assert not re.search("Traceback|Exception ignored|Errno", done.stderr)
    if command[-1] in ("--help", "--version", "--schema"):
        assert lines == told


@pytest.mark.parametrize("unbuffered", BUFFERING)
@pytest.mark.parametrize("command", OUTPUTS, ids=" ".join)
def test_head_ends_it_quietly(feed: dict[str, Any], command: list[str], unbuffered: str) -> None:
    """Only events count: of those of --print some are made that nobody has taken."""
    settings = {**feed, "INTERVAL_SECONDS": 0.01}
    if command[-1] == "--print":  # without an end of its own, which may come first
        settings["MAX_EVENTS"] = ""
    done = in_shell('"$@" | head -n 1', command, PYTHONUNBUFFERED=unbuffered, **settings)
    assert (done.returncode, len(done.stdout.splitlines())) == (int("--print" in command), 1), done.stderr
    assert not re.search("Traceback|Exception ignored|Pipe|standard output", done.stderr)


# Settings of --print, who reads, the exit code, and whether events are left unconfirmed.
READERS: dict[str, tuple[dict[str, Any], str, int, bool]] = {
    "a burst and more": ({"INTERVAL_SECONDS": 0}, "head -n 3", 1, True),
    "slow and more": ({"INTERVAL_SECONDS": 0.05}, "head -n 3", 1, True),
    "of a count": ({"INTERVAL_SECONDS": 0.05, "MAX_EVENTS": 50}, "head -n 3", 1, True),
    "of a time": ({"INTERVAL_SECONDS": 0.05, "DURATION_SECONDS": 60}, "head -n 3", 1, True),
    "as many as are wanted": ({"INTERVAL_SECONDS": 0, "MAX_EVENTS": 3}, "head -n 3", 0, False),
    "all": ({"INTERVAL_SECONDS": 0, "MAX_EVENTS": 300}, "cat", 0, False),
}


@pytest.mark.parametrize("name", [PRODUCER, CHURN])
@pytest.mark.parametrize("case", READERS)
def test_what_standard_output_has_not_taken_is_unconfirmed(name: str, case: str) -> None:
    """So the exit code is 1, with a limit and without."""
    settings, reader, code, left = READERS[case]
    done = in_shell(f'"$@" | {reader}', [name, "--print"], **settings)
    told = re.search(r"Stopped: sent \d+, failed 0, unconfirmed (\d+)", done.stderr)
    assert told, done.stderr
    assert (done.returncode, int(told[1]) > 0) == (code, left), done.stderr


@pytest.mark.parametrize("name", [PRODUCER, CHURN])
@pytest.mark.parametrize(("limit", "code"), [({}, 0), ({"MAX_EVENTS": 500}, 1)], ids=["no limit", "limit"])
def test_ctrl_c_loses_nothing_that_was_printed(
    run_script: RunScript, name: str, limit: dict[str, Any], code: int
) -> None:
    script = run_script(name, "--print", INTERVAL_SECONDS=0.05, **limit)
    script.wait_for('"user_id"')
    script.signal()
    assert script.wait(10) == code
    assert summary(script)["unconfirmed"] == 0


@pytest.mark.parametrize("command", [[PRODUCER, "--print"], [AUDITOR]], ids=" ".join)
def test_a_stop_is_obeyed_while_nobody_reads_the_results(
    launch: Launch, feed: dict[str, Any], full_pipe: tuple[int, int], command: list[str]
) -> None:
    """As with `| less`, which reads a page and waits."""
    streams = {"stdout": full_pipe[1], "stderr": subprocess.PIPE}
    script = launch(*command, streams=streams, **{**feed, "MAX_EVENTS": ""})
    assert script.stderr
    assert re.search(b"Printing|Reading", script.stderr.readline())
    time.sleep(1)  # now it has an event, and nobody takes it
    script.send_signal(signal.SIGTERM)
    assert script.wait(10) in (0, 1)


# ------------------------------------------------------------------------------------------------------ --print


def test_print_needs_no_kafka_and_keeps_the_pace(run_script: RunScript) -> None:
    script = run_script(PRODUCER, "--print", KAFKA_BROKER="no broker at all", INTERVAL_SECONDS=0.1, MAX_EVENTS=15)
    assert script.wait() == 0, script.tail()
    values = [json.loads(line) for line in script.stdout_lines]
    assert len(values) == 15
    kept_pace(values, 0.1)
    schema = run_script(PRODUCER, "--schema")
    assert schema.wait() == 0
    validator = Draft7Validator(json.loads(schema.stdout))
    for line, value in zip(script.stdout_lines, values, strict=True):
        validator.validate(value)
        assert line == json.dumps(value, separators=(",", ":"))


def test_print_writes_each_event_when_it_is_due(run_script: RunScript) -> None:
    script = run_script(PRODUCER, "--print", INTERVAL_SECONDS=3600)
    script.wait_for('"user_id"', 5)
    script.signal(signal.SIGTERM)
    assert script.wait(10) == 0
    assert len(script.stdout_lines) == 1


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        pytest.param({"DURATION_SECONDS": 0.3, "INTERVAL_SECONDS": 0.1}, 0, id="duration"),
        pytest.param({"MAX_EVENTS": 5, "INTERVAL_SECONDS": 0}, 0, id="count"),
        pytest.param({"INTERVAL_SECONDS": "often"}, 2, id="bad-value"),
        pytest.param({"SHARD_INDEX": 3, "SHARD_COUNT": 3}, 2, id="bad-shard"),
    ],
)
def test_print_ends_as_the_producer_does(run_script: RunScript, settings: dict[str, Any], code: int) -> None:
    script = run_script(PRODUCER, "--print", **settings)
    assert script.wait() == code
    assert bool(script.stdout_lines) == (code == 0)


def digest(values: list[dict[str, Any]]) -> str:
    """Of users, types and metadata, in order."""
    lines = [json.dumps([e["user_id"], e["event_type"], e["metadata"]], separators=(",", ":")) for e in values]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("way", ["kafka", "print"])
@pytest.mark.parametrize(
    ("shard", "golden"),
    [
        pytest.param((0, 1), "a85b9cb6b03dc2e42df249c18fde8444e5c3fee9d45760f491fdf2abb089991e", id="all-users"),
        pytest.param((1, 3), "74978b11c116aa45e31fc0c02c4495eb8bafceba915c049c1a4a1869c0c70868", id="a-third"),
    ],
)
def test_a_seed_gives_what_it_gave_in_version_1_2(
    run_script: RunScript, kafka: dict[str, Any], way: str, shard: tuple[int, int], golden: str
) -> None:
    settings = {**kafka, "SEED": "golden", "INTERVAL_SECONDS": 0, "MAX_EVENTS": 1000}
    flags = ["--print"] if way == "print" else []
    script = run_script(PRODUCER, *flags, SHARD_INDEX=shard[0], SHARD_COUNT=shard[1], **settings)
    assert script.wait() == 0, script.tail()
    if way == "print":
        values = [json.loads(line) for line in script.stdout_lines]
    else:
        values = events(sorted(records(kafka), key=lambda record: event_id(record) or ("", 0)))
    assert digest(values) == golden


OWN_RANDOM = """\
import random
from random_event_producer import RandomEventProducer, main
class Own(RandomEventProducer):
    def __init__(self, *args): super().__init__(*args); self.random = random.Random({number})
raise SystemExit(main(Own))
"""


def test_a_random_of_ones_own_draws_everything(
    run_script: RunScript, kafka: dict[str, Any], tansu: Tansu, tmp_path: Path
) -> None:
    """Users and types too, whatever SEED says."""
    script_file, made = tmp_path / "own.py", []
    for run, number in enumerate((1, 1, 2)):
        script_file.write_text(OWN_RANDOM.replace("{number}", str(number)))
        settings = {**kafka, "KAFKA_TOPIC": f"{kafka['KAFKA_TOPIC']}-{run}", "INTERVAL_SECONDS": 0}
        create_topic(tansu.direct, settings["KAFKA_TOPIC"])
        script = run_script(str(script_file), PYTHONPATH=ROOT, SEED=run, MAX_EVENTS=50, **settings)
        assert script.wait() == 0, script.tail()
        made.append([(event["user_id"], event["event_type"]) for event in events(records(settings))])
    assert made[0] == made[1] != made[2]


# ------------------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize("number", STOPS)
def test_a_stop_before_max_events_is_no_success(run_script: RunScript, kafka: dict[str, Any], number: int) -> None:
    """A Job that was evicted is not done, though all it made was confirmed."""
    script = run_script(PRODUCER, MAX_EVENTS=1000, **kafka)
    script.wait_for("Event sent")
    script.signal(number)
    assert script.wait(10) == 1, script.tail()
    stopped(script, sent=len(records(kafka)))


def test_nor_is_a_stop_before_kafka_is_reached(run_script: RunScript) -> None:
    script = run_script(PRODUCER, KAFKA_BROKER=nothing_there(), MAX_EVENTS=1000)
    script.wait_for("not there yet")
    script.signal(signal.SIGTERM)
    assert script.wait(10) == 1
    stopped(script)


def test_nor_is_a_stop_while_the_libraries_load(launch: Launch, kafka: dict[str, Any]) -> None:
    """Each script is stopped a little later after its start than the one before."""
    codes = set()
    for delay in range(2, 16):
        script = launch(PRODUCER, streams={"stderr": subprocess.DEVNULL}, MAX_EVENTS=1000, **kafka)
        time.sleep(delay / 25)
        script.send_signal(signal.SIGTERM)
        codes.add(script.wait(10))
    assert codes <= {1, 128 + signal.SIGTERM, -signal.SIGTERM}


@pytest.mark.parametrize("settings", [{}, {"DURATION_SECONDS": 600}], ids=["no-limit", "duration"])
@pytest.mark.parametrize("number", STOPS)
def test_a_stop_without_a_count_is_a_success(
    run_script: RunScript, kafka: dict[str, Any], number: int, settings: dict[str, Any]
) -> None:
    script = run_script(PRODUCER, **settings, **kafka)
    script.wait_for("Event sent")
    script.signal(number)
    assert script.wait(10) == 0, script.tail()
    stopped(script, sent=len(records(kafka)))


def test_hangup_ends_an_audit_with_its_report(run_script: RunScript, feed: dict[str, Any]) -> None:
    script = run_script(AUDITOR, **{**feed, "MAX_EVENTS": ""})
    script.wait_for("partition 0")
    script.signal(signal.SIGHUP)
    assert script.wait(10) == 0, script.tail()
    assert script.stdout_lines[-1].startswith("OK: ")


@pytest.mark.linux  # it reads in /proc when the signal is ignored
def test_nohup(launch: Launch, kafka: dict[str, Any]) -> None:
    """Ignored at the start: ignored for good; other signals are not."""
    within, streams = ["sh", "-c", 'trap "" HUP; exec "$0" "$@"'], {"stderr": subprocess.DEVNULL}
    scripts = [launch(name, within=within, streams=streams, **kafka) for name in (PRODUCER, AUDITOR)]
    wait_for_events(kafka, 1)
    for script in scripts:
        wait_until(lambda: signal.SIGTERM in signals(script.pid, "SigCgt"), 10, "it has its handlers")  # noqa: B023
        assert signal.SIGHUP in signals(script.pid, "SigIgn")
        script.send_signal(signal.SIGHUP)
    wait_for_events(kafka, len(records(kafka)) + 5)
    for script in scripts:
        assert script.poll() is None
        script.send_signal(signal.SIGTERM)
        assert script.wait(10) == 0


def signals(pid: int, which: str) -> set[signal.Signals]:
    """What a process catches (SigCgt) or ignores (SigIgn), as the kernel says."""
    status = Path(f"/proc/{pid}/status").read_text()
    mask = int(re.findall(rf"^{which}:\s+(\w+)$", status, re.MULTILINE)[0], 16)
    return {number for number in signal.Signals if mask >> (number - 1) & 1}


@pytest.mark.linux  # setsid
def test_the_terminal_is_closed(launch: Launch, kafka: dict[str, Any]) -> None:
    """SIGHUP comes, and what is written from then on fails."""
    master, slave = os.openpty()
    within = ["setsid", "sh", "-c", f'exec "$0" "$@" <>{os.ttyname(slave)} >&0 2>&0']
    script = launch(PRODUCER, within=within, **kafka)
    wait_for_events(kafka, 3)
    os.close(slave)
    os.close(master)
    assert script.wait(10) == 0
    assert audit(records(kafka)).clean


def test_suspended_and_continued(run_script: RunScript, kafka: dict[str, Any]) -> None:
    """Ctrl+Z, a laptop's lid: it was not Kafka that stood still."""
    scripts = [run_script(PRODUCER, **{**kafka, "INTERVAL_SECONDS": interval}) for interval in (0.5, 0.01)]
    for script in scripts:
        script.wait_for("Total events sent: [1-9]")
        script.signal(signal.SIGSTOP)
    time.sleep(7)  # longer than what counts as a stall
    for script in scripts:
        seen = len(script.lines)
        script.signal(signal.SIGCONT)
        said = script.wait_for(r"WARNING - .*\b[Tt]his process (stood still|was suspended)\b.*?(\d+)", 10, seen)
        assert 6 <= int(said[2]) <= 15
        script.wait_for("Total events sent", after=seen)
        script.signal(signal.SIGTERM)
        assert script.wait(10) == 0, script.tail()
        assert summary(script)["unconfirmed"] == 0
        assert "confirmed nothing" not in script.stderr


@pytest.mark.parametrize("columns", [44, 120])
def test_the_bar_keeps_to_the_terminal(columns: int, launch: Launch) -> None:
    """Under a limit and at a fast pace a bar is drawn over itself, as wide as the terminal is, and not into the log."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = launch(PRODUCER, "--print", streams={"stderr": slave}, MAX_EVENTS=300, INTERVAL_SECONDS=0.005)
    os.close(slave)
    drawn = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while piece := os.read(master, 65536):
            drawn += piece
    os.close(master)
    assert process.wait(20) == 0
    bars = [bar for bar in re.split(r"[\r\n]+", drawn.decode()) if "events" in bar and "|" in bar]
    assert any("0/300" in bar for bar in bars)
    assert any("300/300" in bar for bar in bars)
    assert {len(bar) <= columns for bar in bars} == {True}
    lines = [line for line in drawn.decode().replace("\r\n", "\n").split("\n") if " - INFO - " in line]
    assert [bool(re.search(r"(?:^|\r)\S+ \S+ - INFO - [^|]+$", line)) for line in lines] == [True] * len(lines)
    assert drawn.count(b"\n") <= len(lines) + 1, drawn  # a bar has no line of its own until it ends
