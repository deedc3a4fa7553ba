"""A real Prometheus scrapes a service that tells a hundred stories, and knows them all."""

from __future__ import annotations

import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.model.serving.http.serving import paced, serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed"),
]
CONFIG = """
global: {scrape_interval: 1s, evaluation_interval: 1s}
rule_files: [%s]
scrape_configs:
  - job_name: story
    authorization: {credentials_file: token}
    static_configs: [{targets: ["%s"]}]
"""
RULES = Path(__file__).resolve().parents[2] / "deploy" / "prometheus" / "alerts.yml"


def asked(address: str, query: str) -> float | None:
    """The value of a query with one answer; None while there is none."""
    answer = httpx.get(f"http://{address}/api/v1/query", params={"query": query}).json()
    found: list[dict[str, Any]] = answer["data"]["result"]
    return float(found[0]["value"][1]) if found else None


def test_a_load_of_a_hundred_requests_is_seen_whole(tmp_path: Path) -> None:
    backend, _ = paced(slots=8, queue=100, step_seconds=0.002)
    port = 19_109
    with serving(backend, metrics_token="open-sesame") as running:
        (tmp_path / "token").write_text("open-sesame")
        config = tmp_path / "prometheus.yml"
        config.write_text(CONFIG % (RULES, running.url.removeprefix("http://")))
        command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'data'}"]
        command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
        with (tmp_path / "log").open("wb") as log:
            watcher = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)
        try:
            with ThreadPoolExecutor(8) as pool:
                asks = [
                    pool.submit(running.post, "/v1/completions", prompt="Once", max_tokens=20)
                    for _ in range(100)
                ]
                assert [ask.result().status_code for ask in asks] == [200] * 100
            end = time.monotonic() + 30
            while True:
                try:
                    if asked(f"127.0.0.1:{port}", 'sum(story_streams_total{outcome="length"})') == 100:
                        break
                except httpx.HTTPError:
                    pass
                assert time.monotonic() < end, (tmp_path / "log").read_text()
                time.sleep(0.5)
            here = f"127.0.0.1:{port}"
            assert asked(here, "sum(story_ttft_seconds_count)") == 100
            assert asked(here, 'sum(story_tokens_total{kind="completion"})') == 2_000
            assert asked(here, 'up{job="story"}') == 1
            rules = httpx.get(f"http://{here}/api/v1/rules").json()["data"]["groups"]
            assert {rule["health"] for group in rules for rule in group["rules"]} <= {"ok", "unknown"}
            assert sum(len(group["rules"]) for group in rules) == 11
        finally:
            watcher.terminate()
            watcher.wait(30)
