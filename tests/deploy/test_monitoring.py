"""Alert rules and dashboard: by Prometheus' own tools, the documented thresholds and what the service measures."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from experiments.common.thresholds import load_thresholds
from model.serving.http.server import free_port
from tests.model.serving.http.serving import paced, serving, until

REPOSITORY = Path(__file__).resolve().parents[2]
PROMETHEUS = REPOSITORY / "deploy" / "prometheus"
BOARD = json.loads((REPOSITORY / "deploy/grafana/dashboards/story.json").read_text("utf-8"))
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((PROMETHEUS / "alerts.yml").read_text("utf-8"))["groups"]
    for rule in group["rules"]
]
DOCUMENTED = {
    "avg_generation_time": "> 10",
    "max_generation_time": 'le="15.0"',
    "success_rate": "< 0.80",
    "concurrent_handling": "< 3",
    "error_rate": ">= 0.50",
    "memory_percent": "> 80",
}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
@pytest.mark.parametrize(
    "command", ["test rules alerts_test.yml", "check rules alerts.yml", "check config --syntax-only prometheus.yml"]
)
def test_promtool_accepts_rules_and_configuration_and_each_rule_fires_when_it_should(command: str) -> None:
    done = subprocess.run(["promtool", *command.split()], cwd=PROMETHEUS, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_rule_is_tested_and_the_manual_says_what_to_do() -> None:
    tested = (PROMETHEUS / "alerts_test.yml").read_text("utf-8")
    manual = (REPOSITORY / "docs" / "operations.md").read_text("utf-8")
    for rule in RULES:
        assert f"alertname: {rule['alert']}," in tested
        assert f'alertname="{rule["alert"]}"' in tested
        section = rule["annotations"]["runbook"].rpartition(": ")[2]
        assert f"**{section}**" in manual, rule["alert"]


def test_every_documented_threshold_is_a_gate_check_and_an_alert_with_the_same_bound() -> None:
    gate = {each.metric: each for each in load_thresholds() if each.reason.startswith("Documented")}
    assert set(gate) == set(DOCUMENTED)
    alerts = {rule["labels"]["threshold"]: rule for rule in RULES if "threshold" in rule["labels"]}
    for metric, condition in DOCUMENTED.items():
        assert condition in alerts[metric]["expr"], metric
        assert float(re.findall(r"[\d.]+", condition)[0]) == gate[metric].limit, metric


def test_rules_and_dashboard_query_metrics_that_the_service_has() -> None:
    backend, _ = paced()
    with serving(backend) as running:
        running.post("/v1/completions", prompt="x", max_tokens=2)
        # Counted behind the answer, so the next request may overtake it.
        until(lambda: any(name.startswith("story_http_requests_total") for name in running.figures()))
        known = {name.partition("{")[0] for name in running.figures()}
        text = running.get("/metrics").text
    # Without Modal, Redis or a limit there is no metric of theirs; their own tests check those names.
    elsewhere = {"story_breaker", "story_redis_up", "story_limit_refusals_total", "story_cache_requests_total"}
    queries = [target["expr"] for panel in BOARD["panels"] for target in panel.get("targets", ())]
    used = set(re.findall(r"\bstory_[a-z_]+", " ".join([*queries, *(rule["expr"] for rule in RULES)])))
    assert used - elsewhere <= known
    assert len(queries) > 30
    assert 'story_generation_time_seconds_bucket{le="15.0"}' in text


def test_prometheus_scrapes_the_app_and_grafana_reads_prometheus() -> None:
    services = yaml.safe_load((REPOSITORY / "deploy/compose.yaml").read_text("utf-8"))["services"]
    scraped = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text("utf-8"))
    targets = [t for job in scraped["scrape_configs"] for s in job["static_configs"] for t in s["targets"]]
    assert "app:7860" in targets
    provisioned = REPOSITORY / "deploy/grafana/provisioning/datasources/prometheus.yaml"
    source = yaml.safe_load(provisioned.read_text("utf-8"))["datasources"][0]
    assert source["url"] == "http://prometheus:9090"
    assert {p["datasource"]["uid"] for p in BOARD["panels"] if "datasource" in p} == {source["uid"]}
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (REPOSITORY / "deploy/grafana/dashboards" / Path(home).name).is_file()


CONFIG = """
global: {scrape_interval: 1s, evaluation_interval: 1s}
rule_files: [%s]
scrape_configs:
  - job_name: story
    authorization: {credentials_file: token}
    static_configs: [{targets: ["%s"]}]
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed")
def test_a_real_prometheus_counts_a_load_of_a_hundred_requests(tmp_path: Path) -> None:
    backend, _ = paced(slots=8, queue=100, step_seconds=0.002)
    port = free_port()

    def query(expression: str) -> float | None:
        answer = httpx.get(f"http://127.0.0.1:{port}/api/v1/query", params={"query": expression}, timeout=None).json()
        found: list[dict[str, Any]] = answer["data"]["result"]
        return float(found[0]["value"][1]) if found else None

    with serving(backend, metrics_token="open-sesame") as running:
        (tmp_path / "token").write_text("open-sesame")
        config = tmp_path / "prometheus.yml"
        config.write_text(CONFIG % (PROMETHEUS / "alerts.yml", running.url.removeprefix("http://")))
        command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'data'}"]
        command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
        with (tmp_path / "log").open("wb") as log:
            prometheus = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)
        try:
            with ThreadPoolExecutor(8) as pool:
                answers = [
                    pool.submit(running.post, "/v1/completions", prompt="Once", max_tokens=20) for _ in range(100)
                ]
                assert {answer.result().status_code for answer in answers} == {200}
            deadline = time.monotonic() + 30
            while True:
                try:
                    if query('sum(story_streams_total{outcome="length"})') == 100:
                        break
                except httpx.HTTPError:
                    pass
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.5)
            assert query("sum(story_ttft_seconds_count)") == 100
            assert query('sum(story_tokens_total{kind="completion"})') == 2_000
            assert query('up{job="story"}') == 1
            groups = httpx.get(f"http://127.0.0.1:{port}/api/v1/rules", timeout=None).json()["data"]["groups"]
            loaded = [rule for group in groups for rule in group["rules"]]
            assert {rule["health"] for rule in loaded} <= {"ok", "unknown"}
            assert len(loaded) == len(RULES)
        finally:
            prometheus.terminate()
            prometheus.wait(30)
