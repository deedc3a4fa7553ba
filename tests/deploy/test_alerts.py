"""Alert rules by Prometheus' own tool, against the documented thresholds, and against what the service measures."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.common.thresholds import load_thresholds
from tests.model.serving.http.serving import paced, serving

REPOSITORY = Path(__file__).resolve().parents[2]
PROMETHEUS = REPOSITORY / "deploy" / "prometheus"
DOCUMENTED = {
    "avg_generation_time": "> 10",
    "max_generation_time": 'le="15.0"',
    "success_rate": "< 0.80",
    "concurrent_handling": "< 3",
    "error_rate": ">= 0.50",
    "memory_percent": "> 80",
}
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def promtool(*arguments: str) -> None:
    done = subprocess.run(
        ["promtool", *arguments], cwd=PROMETHEUS, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_each_rule_fires_when_it_should_and_only_then() -> None:
    promtool("test", "rules", "alerts_test.yml")


@needs_promtool
def test_rules_and_configuration_are_what_prometheus_reads() -> None:
    promtool("check", "rules", "alerts.yml")
    promtool("check", "config", "--syntax-only", "prometheus.yml")


def test_every_rule_is_in_the_test_of_rules() -> None:
    tested = (PROMETHEUS / "alerts_test.yml").read_text()
    for rule in rules():
        assert f"alertname: {rule['alert']}," in tested
        assert f'alertname="{rule["alert"]}"' in tested


def test_every_documented_threshold_is_a_gate_check_and_an_alert_with_the_same_bound() -> None:
    gate = {each.metric: each for each in load_thresholds() if each.reason.startswith("Documented")}
    assert set(gate) == set(DOCUMENTED)
    alerts = {rule["labels"]["threshold"]: rule for rule in rules() if "threshold" in rule["labels"]}
    for metric, shown in DOCUMENTED.items():
        assert shown in alerts[metric]["expr"], metric
        assert float(re.findall(r"[\d.]+", shown)[0]) == gate[metric].limit, metric


def test_every_alert_says_what_to_do_in_the_manual() -> None:
    manual = (REPOSITORY / "docs" / "operations.md").read_text()
    for rule in rules():
        name = rule["annotations"]["runbook"].rpartition(": ")[2]
        assert f"**{name}**" in manual, rule["alert"]


def test_rules_and_dashboard_speak_of_figures_that_the_service_has() -> None:
    backend, _ = paced()
    with serving(backend) as running:
        running.post("/v1/completions", prompt="x", max_tokens=2)
        known = {name.partition("{")[0] for name in running.figures()}
        kinds = running.get("/metrics").text
    # Where there is no Modal, Redis or limit there is no figure of theirs; their own tests hold those names.
    elsewhere = {
        "story_breaker",
        "story_redis_up",
        "story_limit_refusals_total",
        "story_cache_requests_total",
    }
    board = json.loads((REPOSITORY / "deploy/grafana/dashboards/story.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    used = set(re.findall(r"\bstory_[a-z_]+", " ".join([*queries, *(rule["expr"] for rule in rules())])))
    assert used - elsewhere <= known
    assert len(queries) > 30
    for bound in ('le="15.0"',):
        assert f"story_generation_time_seconds_bucket{{{bound}}}" in kinds
