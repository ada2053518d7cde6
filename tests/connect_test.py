"""What Kafka Connect makes of the header `event_id`, by its own default header converter."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from typing import Any

import pytest
from auditor_test import outcome, record, topic_with
from brokers import KAFKA_VERSION, ApacheKafka, NoApacheKafkaError, Tansu, apache_jars, create_topic, java, read_all
from conftest import ROOT, RunScript, require_apache
from field_test import AUDITOR, SMOKE, TOOL

sys.path.insert(0, str(ROOT))

import random_event_producer as tool
from random_churn_producer import RandomChurnProducer

CHURN = "random_churn_producer.py"
RUNS = 1000
# For each line of standard input: the type that Connect's schema gives it, and its value.
CONVERT = """
import java.io.*;
import java.nio.charset.StandardCharsets;
import org.apache.kafka.connect.data.*;
import org.apache.kafka.connect.storage.SimpleHeaderConverter;

public class Convert {
    public static void main(String[] arguments) throws IOException {
        SimpleHeaderConverter converter = new SimpleHeaderConverter();
        BufferedReader lines = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
        for (String line; (line = lines.readLine()) != null; ) {
            byte[] value = line.getBytes(StandardCharsets.UTF_8);
            SchemaAndValue made = converter.toConnectHeader("user-events", "event_id", value);
            System.out.println(made.schema().type() + " " + made.value());
        }
    }
}
"""


@pytest.fixture(scope="module")
def convert(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """convert(["a", "1"]) -> ["STRING a", "INT8 1"]"""
    require_apache()
    (source := tmp_path_factory.mktemp("connect") / "Convert.java").write_text(CONVERT)
    try:
        jars = apache_jars((f"org.apache.kafka:connect-api:{KAFKA_VERSION}", "org.slf4j:slf4j-nop:1.7.36"))
    except NoApacheKafkaError as error:
        pytest.skip(str(error))

    def convert(values: list[str]) -> list[str]:
        command = [java(), "-cp", jars, str(source)]
        done = subprocess.run(command, input="\n".join(values), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return convert


@pytest.mark.parametrize("generator", [tool.RandomEventProducer, RandomChurnProducer])
def test_an_event_id_stays_text(convert: Any, generator: type[tool.RandomEventProducer]) -> None:
    """Of many runs, with short sequences and long ones."""
    runs = [generator(seed).run for seed in [None, "7"] for _ in range(RUNS // 2)]
    values = [f"{run}:{sequence}" for run, sequence in zip(runs, itertools.cycle([1, 42, 1_000_000_007]))]
    assert convert(values) == [f"STRING {value}" for value in values]
    assert {run[0] for run in runs} == set("abcdf")  # chance alone would not show it
    assert len(set(runs)) == RUNS


def test_one_of_version_1_1_did_not(convert: Any) -> None:
    """A run of digits only, and of digits around an e: numbers to Connect, which drops what follows them."""
    made = convert(["6600191769186975:6", "12345678901234e5:6", "f600191769186975:6"])
    assert made[2] == "STRING f600191769186975:6"
    assert not any(line.startswith("STRING") for line in made[:2]), made


@pytest.mark.parametrize("name", [TOOL, SMOKE, CHURN])
@pytest.mark.parametrize("seed", ["", "7"], ids=["no seed", "seed"])
def test_each_producer_makes_such_ids(run_script: RunScript, tansu: Tansu, topic: str, name: str, seed: str) -> None:
    create_topic(tansu.direct, topic)
    more = {} if name == SMOKE else {"MAX_EVENTS": 3}
    settings = {"KAFKA_BROKER": tansu.bootstrap, "KAFKA_TOPIC": topic, "INTERVAL_SECONDS": 0, "SEED": seed}
    assert run_script(name, **settings, **more).wait() == 0
    ids = [dict(record.headers)["event_id"].decode() for record in read_all(tansu.direct, topic)]
    assert ids
    assert all(re.fullmatch("[abcdf][0-9a-f]{15}:[0-9]+", event_id) for event_id in ids), ids


@pytest.mark.parametrize("run", ["6600191769186975", "12345678901234e5", "eeeeeeeeeeeeeeee"])
def test_the_auditor_takes_ids_of_older_versions(
    run_script: RunScript, apache: ApacheKafka, topic: str, run: str
) -> None:
    topic_with(apache, topic, [record(sequence, run=run) for sequence in (1, 2, 3)])
    settings = {"KAFKA_BROKER": apache.bootstrap, "KAFKA_TOPIC": topic, "MAX_EVENTS": 3}
    code, report = outcome(run_script(AUDITOR, "--json", **settings))
    assert (code, report["ok"], [found["run"] for found in report["runs"]]) == (0, True, [run])
