"""The compose file: valid by the public schema, closed where it should be, and in step with what it mounts and runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.make_secrets import make_all
from model.settings import secret_names
from tests.deploy.dockerfiles import instructions

SERVICES = {"app", "redis", "postgres", "mlflow", "prometheus", "grafana"}
READERS = {"redis": "redis", "postgres": "postgres"}
"""Who must not be root, and is not so by the image itself."""


@pytest.fixture(scope="module")
def compose(repository: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((repository / "deploy/compose.yaml").read_text("utf-8"))
    return loaded


@pytest.fixture
def service(compose: dict[str, Any], request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = compose["services"][request.param]
    return found


def every_service(test: Any) -> Any:
    return pytest.mark.parametrize("service", sorted(SERVICES), indirect=True)(test)


def check(path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_it_is_valid_by_the_schema_of_compose(repository: Path) -> None:
    checked = check(repository / "deploy/compose.yaml")
    assert checked.returncode == 0, checked.stdout


def test_the_schema_sees_what_it_should(repository: Path, tmp_path: Path) -> None:
    text = (repository / "deploy/compose.yaml").read_text("utf-8")
    (tmp_path / "compose.yaml").write_text(text.replace("mem_limit: 1g", "mem_limits: 1g"), "utf-8")
    checked = check(tmp_path / "compose.yaml")
    assert checked.returncode == 1
    assert "mem_limits" in checked.stdout


def test_all_parts_are_there(compose: dict[str, Any]) -> None:
    assert set(compose["services"]) == SERVICES


@every_service
def test_each_service_has_no_rights_that_it_does_not_need(service: dict[str, Any]) -> None:
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == "unless-stopped"
    assert re.fullmatch(r"\d+[mg]", service["mem_limit"])
    assert {"privileged", "network_mode", "pid", "cap_add", "devices"}.isdisjoint(service)


def test_the_app_may_use_one_gigabyte(compose: dict[str, Any]) -> None:
    assert compose["services"]["app"]["mem_limit"] == "1g"


@pytest.mark.parametrize("name", sorted(SERVICES - {"app"}))
def test_only_the_app_can_be_reached_from_other_machines(name: str, compose: dict[str, Any]) -> None:
    assert [
        port for port in compose["services"][name].get("ports", []) if not port.startswith("127.0.0.1:")
    ] == []


def test_the_apps_address_is_this_machine_until_a_variable_says_otherwise(compose: dict[str, Any]) -> None:
    assert compose["services"]["app"]["ports"] == ["${APP_BIND:-127.0.0.1}:${APP_PORT:-7860}:7860"]


@every_service
def test_who_publishes_no_port_has_no_way_out(service: dict[str, Any], compose: dict[str, Any]) -> None:
    ways_out = [name for name in service["networks"] if not compose["networks"][name].get("internal")]
    assert bool(ways_out) == ("ports" in service)


def test_the_app_cannot_reach_mlflow_and_mlflow_cannot_reach_the_app(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert set(services["app"]["networks"]).isdisjoint(services["mlflow"]["networks"])


def test_images_of_others_are_pinned_by_version(compose: dict[str, Any]) -> None:
    foreign = {name: part["image"] for name, part in compose["services"].items() if "build" not in part}
    assert set(foreign) == SERVICES - {"app", "mlflow"}
    assert {
        name: tag for name, tag in foreign.items() if not re.search(r":v?\d+\.\d+(\.\d+)?(-\w+)?$", tag)
    } == {}


def test_mlflows_version_is_the_one_that_is_tested(compose: dict[str, Any], repository: Path) -> None:
    _, _, version = compose["services"]["mlflow"]["image"].rpartition(":")
    assert f"mlflow=={version}" in (repository / "constraints.txt").read_text("utf-8").splitlines()


def test_each_service_tells_whether_it_is_well(compose: dict[str, Any], repository: Path) -> None:
    told = {name for name, part in compose["services"].items() if part.get("healthcheck", {}).get("test")}
    by_the_image = {name for name, _ in instructions(repository / "Dockerfile")}
    assert "HEALTHCHECK" in by_the_image
    assert told == SERVICES - {"app"}


def test_who_waits_waits_for_a_state_that_exists(compose: dict[str, Any]) -> None:
    services = compose["services"]
    for part in services.values():
        for other, on in part.get("depends_on", {}).items():
            assert other in services
            assert on["condition"] in ("service_healthy", "service_started")
    # Redis and the app may be ill without holding up those beside them.
    assert services["app"]["depends_on"]["redis"]["condition"] == "service_started"
    assert services["prometheus"]["depends_on"]["app"]["condition"] == "service_started"
    assert services["mlflow"]["depends_on"]["postgres"]["condition"] == "service_healthy"


@every_service
def test_what_is_mounted_is_there(service: dict[str, Any], compose: dict[str, Any], repository: Path) -> None:
    for mount in service.get("volumes", []):
        source, _, rest = mount.partition(":")
        if source.startswith("."):
            assert (repository / "deploy" / source).exists(), source
            assert rest.endswith(":ro"), f"{source} could be written to"
        else:
            assert source in compose["volumes"]


def test_the_app_gets_its_secrets_from_files_and_no_service_has_one_in_its_environment(
    compose: dict[str, Any],
) -> None:
    for part in compose["services"].values():
        named = {name: str(value) for name, value in part.get("environment", {}).items()}
        for name, value in named.items():
            assert "_FILE" in name or not re.search("PASSWORD|SECRET|TOKEN", name), name
            if name.endswith("_FILE"):
                assert value.removeprefix("/run/secrets/") in part["secrets"]
            assert not re.search(r"://[^/@]*:[^/@]*@", value), f"{name} holds a password"
    app = compose["services"]["app"]["environment"]
    assert {name.removesuffix("_FILE") for name in app if name.endswith("_FILE")} <= set(secret_names())


def test_each_secret_that_is_named_is_made(compose: dict[str, Any], tmp_path: Path) -> None:
    make_all(tmp_path / "secrets")
    made = {path.name for path in (tmp_path / "secrets").iterdir()}
    assert {Path(secret["file"]).name for secret in compose["secrets"].values()} == made
    used = {name for part in compose["services"].values() for name in part.get("secrets", [])}
    assert used == set(compose["secrets"])


@pytest.mark.parametrize("name", sorted(READERS))
def test_databases_do_not_run_as_root(name: str, compose: dict[str, Any]) -> None:
    assert compose["services"][name]["user"] == READERS[name]


def test_prometheus_scrapes_the_app_and_grafana_reads_prometheus(
    compose: dict[str, Any], repository: Path
) -> None:
    scraped = yaml.safe_load((repository / "deploy/prometheus/prometheus.yml").read_text("utf-8"))
    targets = [t for job in scraped["scrape_configs"] for s in job["static_configs"] for t in s["targets"]]
    assert "app:7860" in targets
    sources = repository / "deploy/grafana/provisioning/datasources/prometheus.yaml"
    source = yaml.safe_load(sources.read_text("utf-8"))["datasources"][0]
    assert source["url"] == "http://prometheus:9090"
    home = compose["services"]["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    board = json.loads((repository / "deploy/grafana/dashboards" / Path(home).name).read_text("utf-8"))
    assert {panel["datasource"]["uid"] for panel in board["panels"] if "datasource" in panel} == {
        source["uid"]
    }
