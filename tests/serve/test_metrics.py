"""Metrics: what the engine and the pool do is counted, under bounded labels."""

import re
from pathlib import Path

from prometheus_client import generate_latest

from oneword.serve.app import build_state
from oneword.serve.metrics import Metrics, PoolMetrics
from oneword.serve.pool import Outcome, Phase
from oneword.serve.settings import Settings
from oneword.serve.worker import Turn


def test_turns_count_their_rows_and_the_time_of_each_stage() -> None:
    metrics = Metrics()
    metrics.turn(Turn(3, {"encode": 0.5, "denoise": 0.25, "decode": 0.0, "partial": 0.0}))
    metrics.turn(Turn(0, {"encode": 0.0, "denoise": 0.0, "decode": 1.0, "partial": 0.0}))

    assert metrics.registry.get_sample_value("oneword_batch_rows_sum") == 3
    assert metrics.registry.get_sample_value("oneword_step_seconds_count") == 1
    assert metrics.registry.get_sample_value("oneword_stage_seconds_total", {"stage": "encode"}) == 0.5
    assert metrics.registry.get_sample_value("oneword_stage_seconds_total", {"stage": "decode"}) == 1


def test_pictures_count_by_how_and_where_they_ended() -> None:
    metrics = Metrics()
    observer = PoolMetrics(metrics)
    observer.refused("rate_limited")
    observer.taken_up(0.5)
    observer.first_step(0.75)
    observer.ended(Outcome.DONE, Phase.DECODING)
    observer.ended(Outcome.CANCELLED, Phase.WAITING)

    text = generate_latest(metrics.registry).decode()
    assert 'oneword_rejected_total{reason="rate_limited"} 1.0' in text
    assert "oneword_queue_seconds_sum 0.5" in text
    assert "oneword_first_step_seconds_sum 0.75" in text
    assert 'oneword_pictures_total{outcome="done"} 1.0' in text
    assert 'oneword_pictures_total{outcome="cancelled"} 1.0' in text
    assert 'oneword_cancelled_total{phase="waiting"} 1.0' in text
    assert 'phase="decoding"' not in text


def test_the_deployment_page_lists_every_metric(tiny_bundle: Path, tmp_path: Path) -> None:
    metrics = build_state(Settings(tiny_bundle, str(tmp_path / "words"))).metrics
    metrics.name_replica("r1")
    endings = {"counter": "_total", "info": "_info"}
    expected = [(f"{metric.name}{endings.get(metric.type, '')}", metric.type) for metric in metrics.registry.collect()]

    text = (Path(__file__).parents[2] / "docs" / "guide" / "deploy.md").read_text("utf-8")
    listed = re.findall(r"^\| `(oneword_\w+)` \| (\w+) \| [^|]{10,} \|$", text, re.M)

    assert sorted(listed) == sorted(expected)
