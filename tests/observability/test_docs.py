"""docs/observability.md keeps its word: its code runs against the real client libraries, its tables are complete."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from prometheus_client.parser import text_string_to_metric_families

import aiockpt
from aiockpt.coordinator.statistics import Phases, Statistics
from tests.observability.test_log import LINE
from tests.support import ROOT, stopped

PAGE = (ROOT / "docs" / "observability.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
STATE: dict[str, Any] = {"x": torch.arange(1000), "n": 1}


@pytest.fixture
def run_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Run the one block that has a text in it, with the names that its reader has; returns its names."""
    monkeypatch.chdir(tmp_path)

    def run(text: str, names: dict[str, Any] | None = None) -> dict[str, Any]:
        (block,) = [block for block in BLOCKS if text in block]
        names = {} if names is None else names
        names["state"] = STATE
        exec(block, names)  # the code of our own page
        return names

    return run


@pytest.mark.process
def test_figures(run_block: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """What is printed is JSON of the figures."""
    names = run_block("msgspec.json.encode")
    stood_still, rate, figures = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"training stood still for \d+\.\d s", stood_still)
    assert rate.endswith("GB/s to the disk")
    assert msgspec.json.decode(figures, type=aiockpt.Statistics) == names["figures"]


@pytest.mark.process
def test_an_observer(run_block: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """It prints slow spans, and quick ones not."""
    names = run_block("class Slow")
    names["Slow"]().completed(aiockpt.Span(name="save", id=1, started_at_ns=0), 1_500_000_000)
    assert capsys.readouterr().out.splitlines()[-1] == "save took 1.5 s: {}"


def _nanoseconds(span: ReadableSpan) -> tuple[int, int]:
    assert span.start_time is not None
    assert span.end_time is not None
    return span.start_time, span.end_time


@pytest.mark.process
def test_opentelemetry(run_block: Any) -> None:
    """Real spans: they nest below the program's own, in one trace, with names, status, attributes and times."""
    exporter = InMemorySpanExporter()
    run_block("class OpenTelemetryObserver", {"exporter": exporter})
    spans = {span.name: span for span in exporter.get_finished_spans()}
    parents = {
        name: next((other.name for other in spans.values() if span.parent and other.context == span.parent), None)
        for name, span in spans.items()
    }
    assert parents == {
        "run": None,
        "aiockpt.open": "run",
        "aiockpt.worker_start": "aiockpt.open",
        "aiockpt.save": "run",
        "aiockpt.collect": "aiockpt.save",
        "aiockpt.reserve": "aiockpt.save",
        "aiockpt.stage": "aiockpt.save",
        "aiockpt.write": "aiockpt.save",
        "aiockpt.commit": "aiockpt.save",
        "aiockpt.close": "run",
    }
    assert len({span.context.trace_id for span in spans.values() if span.context}) == 1
    save = spans["aiockpt.save"]
    assert save.attributes is not None
    assert save.attributes["aiockpt.step"] == 0
    assert str(save.attributes["aiockpt.path"]).endswith("/runs/exp3/step-0")
    begin, end = _nanoseconds(save)
    for name, span in spans.items():
        if name != "run":
            assert span.status.status_code is StatusCode.OK
        if parents[name] == "aiockpt.save":
            part_begin, part_end = _nanoseconds(span)
            assert begin <= part_begin <= part_end <= end + 50_000_000  # begins and lengths are of two clocks


@pytest.mark.process
def test_opentelemetry_of_a_save_that_fails(run_block: Any, tmp_path: Path) -> None:
    """Status ERROR with the message, and the exception as an event."""
    exporter = InMemorySpanExporter()
    names = run_block("class OpenTelemetryObserver", {"exporter": InMemorySpanExporter()})
    provider = names["TracerProvider"]()
    provider.add_span_processor(names["BatchSpanProcessor"](exporter))
    observer = names["OpenTelemetryObserver"](provider.get_tracer("test"))
    with aiockpt.blocking.Checkpointer(tmp_path / "run", observer=observer) as ckpt:
        ckpt.prepare(STATE)
        pid = ckpt.statistics().worker_pid
        assert pid is not None
        with stopped(pid):
            save = ckpt.save(0, STATE)
            save.cancel()
        with pytest.raises(aiockpt.SaveCancelledError) as caught:
            save.result(60)
    provider.shutdown()
    (failed,) = [span for span in exporter.get_finished_spans() if span.name == "aiockpt.save"]
    assert failed.status.status_code is StatusCode.ERROR
    assert failed.status.description == str(caught.value)
    (event,) = failed.events
    assert event.attributes is not None
    assert event.attributes["exception.type"] == "aiockpt.errors.SaveCancelledError"
    assert observer._open == {}


def _scrape(port: int) -> dict[str, dict[str, float]]:
    """Samples by name, then by the value of their first label, over real HTTP, read by the library's own parser."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[next(iter(sample.labels.values()), "")] = sample.value
    return found


@pytest.mark.process
def test_prometheus(run_block: Any) -> None:
    """Scraped in the middle of a run, and after it, when the figures are gone and the histogram stays."""
    scraped: list[dict[str, dict[str, float]]] = []

    def train(ckpt: aiockpt.blocking.Checkpointer) -> None:
        for step in range(3):
            ckpt.save(step, STATE).result(60)
        ckpt.wait_ready()
        pid = ckpt.statistics().worker_pid
        assert pid is not None
        with stopped(pid):
            ckpt.save(3, STATE)
            ckpt.save(4, STATE, when_busy="skip")
            scraped.append(_scrape(names["server"].server_port))

    names: dict[str, Any] = {"train": train, "port": 0}
    try:
        run_block("class PrometheusObserver", names)
        scraped.append(_scrape(names["server"].server_port))
    finally:
        names["server"].shutdown()
        names["server"].server_close()
        names["thread"].join(60)
    during, after = scraped
    assert during["aiockpt_saves_total"] == {"committed": 3, "failed": 0, "cancelled": 0, "skipped": 1}
    assert during["aiockpt_in_flight"] == {"": 1}
    assert during["aiockpt_last_step"] == {"": 2}
    assert during["aiockpt_written_bytes_total"][""] > 3 * 8000
    assert during["aiockpt_blocked_seconds_total"][""] > 0
    assert during["aiockpt_worker_restarts_total"] == {"": 0}
    assert during["aiockpt_arena_bytes"][""] > 8000
    assert during["aiockpt_last_commit_timestamp_seconds"][""] > 1e9
    assert after["aiockpt_save_durable_seconds_count"] == {"": 4}
    assert after["aiockpt_save_durable_seconds_bucket"]["+Inf"] == 4
    assert "aiockpt_saves_total" not in after


def _table(heading: str) -> str:
    return PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("of", [Statistics, Phases])
def test_every_figure_is_on_the_page(of: Any) -> None:
    """No field without a line, no line without a field."""
    rows = re.findall(r"^\| (`.*?) \|", _table("Figures"), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert set(of.__struct_fields__) <= named
    assert named == {*Statistics.__struct_fields__, *Phases.__struct_fields__}


def test_every_span_is_on_the_page() -> None:
    """The names in the code and those in the table are the same."""
    rows = re.findall(r"^\| (`.*?) \|", _table("Spans"), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    code = "".join(path.read_text() for path in (ROOT / "aiockpt").rglob("*.py"))
    assert named == set(re.findall(r'\b(?:begin|phase)\(\s*"(\w+)"', code))


def test_the_line_of_the_log() -> None:
    """The page shows one that has the shape of the real ones."""
    shown = re.findall(r"^step \d+ saved: .*$", PAGE, re.MULTILINE)
    assert len(shown) == 1
    assert LINE.fullmatch(shown[0])
