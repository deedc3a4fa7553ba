"""Dockerfiles, build context, compose file and its secrets are closed where they should be, and fit each other."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from docker.utils.build import exclude_paths
from sqlalchemy.engine import make_url

from deploy.make_secrets import make_all
from model.serving.registry import alias_of
from model.settings import Settings, secret_names

REPOSITORY = Path(__file__).resolve().parents[2]
DOCKERFILES = ("Dockerfile", "deploy/mlflow/Dockerfile")
PORTABLE = {"FROM", "RUN", "ENV", "COPY", "WORKDIR", "LABEL", "USER", "EXPOSE", "HEALTHCHECK", "CMD"}
"""Instructions that every builder understands."""
COMPOSE: dict[str, Any] = yaml.safe_load((REPOSITORY / "deploy/compose.yaml").read_text("utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def stages(dockerfile: str) -> list[list[tuple[str, str]]]:
    """(instruction, arguments) by stage, comments dropped and continued lines joined."""
    text = (REPOSITORY / dockerfile).read_text("utf-8")
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE)
    found: list[list[tuple[str, str]]] = []
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        name, _, arguments = line.strip().partition(" ")
        if name == "FROM":
            found.append([])
        if name:
            found[-1].append((name, arguments.strip()))
    return found


def ignored_patterns() -> list[str]:
    lines = (REPOSITORY / ".dockerignore").read_text("utf-8").splitlines()
    return [line for line in lines if line[:1] not in ("", "#")]


# Dockerfiles


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_dockerfiles_use_nothing_that_needs_one_certain_builder(dockerfile: str) -> None:
    text = (REPOSITORY / dockerfile).read_text("utf-8")
    assert "<<" not in text, "a heredoc"
    assert "# syntax" not in text
    used = [instruction for stage in stages(dockerfile) for instruction in stage]
    assert {name for name, _ in used} <= PORTABLE
    options = re.findall(r"^(?:RUN|COPY|FROM) (--[a-z]+)", text, flags=re.MULTILINE)
    assert set(options) <= {"--mount", "--from"}


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_containers_run_as_a_numbered_user_without_a_shell_and_hold_no_secret(dockerfile: str) -> None:
    last = stages(dockerfile)[-1]
    assert [arguments for name, arguments in last if name == "USER"] == ["10001:10001"]
    (start,) = (arguments for name, arguments in last if name == "CMD")
    assert isinstance(json.loads(start), list)
    given = [text for stage in stages(dockerfile) for name, text in stage if name in ("ENV", "ARG", "LABEL")]
    assert [line for line in given if re.search("(?i)secret|token|passw|_key|://", line)] == []


def test_the_apps_image_holds_no_compiler_and_is_checked_by_a_file_that_it_holds() -> None:
    build, last = stages("Dockerfile")
    assert any("apt-get install" in text for _, text in build)
    assert [text for name, text in last if name == "RUN" and re.search("apt|pip", text)] == []
    assert all(text.startswith("--from=build /opt/story/") for name, text in last if name == "COPY")
    _, _, check = dict(last)["HEALTHCHECK"].partition("CMD ")
    program, script = json.loads(check)
    assert program == "python"
    assert (REPOSITORY / script.removeprefix("/opt/story/app/")).is_file()


def test_the_apps_image_writes_to_tmp_and_the_state_folder_only() -> None:
    (environment,) = (text for name, text in stages("Dockerfile")[-1] if name == "ENV")
    given = dict(pair.split("=", 1) for pair in environment.split())
    written = {given[name] for name in ("HOME", "GRADIO_TEMP_DIR", "XDG_CACHE_HOME", "XDG_STATE_HOME")}
    assert all(path.startswith(("/tmp", "/var/lib")) for path in written)
    assert (given["PYTHONDONTWRITEBYTECODE"], given["STAGE"]) == ("1", "PROD")


def test_the_decoder_in_c_is_built_for_any_processor() -> None:
    flags = (REPOSITORY / "setup.py").read_text("utf-8").partition("FLAGS = [")[2].partition("]")[0]
    assert "-O3" in flags
    assert "-m" not in re.findall(r'"(-m)', flags), "an option for one kind of processor"


def test_the_build_context_is_what_the_dockerfiles_copy() -> None:
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True).stdout.decode()
    tracked = {name for name in listed.split("\0") if name and (REPOSITORY / name).is_file()}
    sent = {name for name in exclude_paths(str(REPOSITORY), ignored_patterns()) if (REPOSITORY / name).is_file()}
    wanted = {"Dockerfile", ".dockerignore"}  # always sent
    for instruction, arguments in (pair for path in DOCKERFILES for stage in stages(path) for pair in stage):
        if instruction == "COPY" and "--from" not in arguments:
            for source in arguments.split()[:-1]:
                wanted |= {name for name in tracked if f"{name}/".startswith(f"{source}/")}
    assert sent == wanted
    assert sum(os.path.getsize(REPOSITORY / name) for name in sent) < 25e6


@pytest.mark.parametrize(
    "name", [".env", "model/.env", "deploy/secrets/redis_url", "mlflow.db", "demo/stories.db", "model/_native.so"]
)
def test_local_files_are_not_in_the_build_context(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
    (tmp_path / "story.py").touch()
    sent = exclude_paths(str(tmp_path), ignored_patterns())
    assert name not in sent
    assert "story.py" in sent


# Compose


def check_schema(path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_compose_file_is_valid_by_the_schema_which_sees_mistakes(tmp_path: Path) -> None:
    path = REPOSITORY / "deploy/compose.yaml"
    checked = check_schema(path)
    assert checked.returncode == 0, checked.stdout
    wrong = tmp_path / "compose.yaml"
    wrong.write_text(path.read_text("utf-8").replace("mem_limit: 1g", "mem_limits: 1g"), "utf-8")
    assert "mem_limits" in check_schema(wrong).stdout


@pytest.mark.parametrize("name", SERVICES)
def test_each_service_has_minimal_rights_and_a_health_check(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert re.fullmatch(r"\d+[mg]", service["mem_limit"])
    assert {"privileged", "network_mode", "pid", "cap_add", "devices"}.isdisjoint(service)
    by_the_image = name == "app" and "HEALTHCHECK" in dict(stages("Dockerfile")[-1])
    assert by_the_image or service["healthcheck"]["test"]
    if name in ("redis", "postgres"):
        assert service["user"] == name, "their images would start as root"


@pytest.mark.parametrize("name", SERVICES)
def test_only_published_services_have_a_way_out_and_only_the_apps_port_can_be_public(name: str) -> None:
    service = SERVICES[name]
    ways_out = [each for each in service["networks"] if not COMPOSE["networks"][each].get("internal")]
    assert bool(ways_out) == ("ports" in service)
    address = "${APP_BIND:-127.0.0.1}:" if name == "app" else "127.0.0.1:"
    assert all(port.startswith(address) for port in service.get("ports", []))


def test_the_app_gets_the_champion_from_mlflow_and_keeps_it_over_a_restart() -> None:
    app, mlflow = SERVICES["app"], SERVICES["mlflow"]
    settings = Settings(
        **{name.lower(): value for name, value in app["environment"].items() if not name.endswith("_FILE")}
    )
    assert alias_of(settings.story_model) == "champion"
    assert urlsplit(settings.mlflow_tracking_uri).netloc in mlflow["environment"]["ALLOWED_HOSTS"].split(",")
    assert set(app["networks"]) & set(mlflow["networks"]) == {"registry"}
    assert "mlflow" not in app["depends_on"], "the app serves without it"
    (environment,) = (text for name, text in stages("Dockerfile")[-1] if name == "ENV")
    cache = dict(pair.split("=", 1) for pair in environment.split())["XDG_CACHE_HOME"]
    assert any(cache.startswith(volume.partition(":")[2]) for volume in app["volumes"])


def test_foreign_images_are_pinned_and_mlflow_has_the_tested_version() -> None:
    foreign = [service["image"] for service in SERVICES.values() if "build" not in service]
    assert len(foreign) == 4
    assert [image for image in foreign if not re.search(r":v?\d+\.\d+(\.\d+)?(-\w+)?$", image)] == []
    _, _, version = SERVICES["mlflow"]["image"].rpartition(":")
    assert f"mlflow=={version}" in (REPOSITORY / "constraints.txt").read_text("utf-8").splitlines()


def test_a_broken_redis_or_app_does_not_hold_up_its_neighbours() -> None:
    wanted = {
        (name, other): on["condition"]
        for name, service in SERVICES.items()
        for other, on in service.get("depends_on", {}).items()
    }
    assert {other for _, other in wanted} <= set(SERVICES)
    assert wanted["app", "redis"] == wanted["prometheus", "app"] == "service_started"
    assert wanted["mlflow", "postgres"] == "service_healthy"


@pytest.mark.parametrize("name", SERVICES)
def test_mounted_files_exist_and_are_read_only(name: str) -> None:
    for mount in SERVICES[name].get("volumes", []):
        source, _, rest = mount.partition(":")
        if source.startswith("."):
            assert (REPOSITORY / "deploy" / source).exists(), source
            assert rest.endswith(":ro"), f"{source} could be written to"
        else:
            assert source in COMPOSE["volumes"]


def test_secrets_come_from_files_and_none_is_in_an_environment() -> None:
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            assert "_FILE" in name or not re.search("PASSWORD|SECRET|TOKEN", name), name
            if name.endswith("_FILE"):
                assert value.removeprefix("/run/secrets/") in service["secrets"]
            assert not re.search(r"://[^/@]*:[^/@]*@", str(value)), f"{name} holds a password"
    app = SERVICES["app"]["environment"]
    assert {name.removesuffix("_FILE") for name in app if name.endswith("_FILE")} <= set(secret_names())


# Secrets


def read(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text("utf-8").strip() for path in folder.iterdir()}


def test_each_secret_of_the_compose_file_is_made_long_random_and_only_once(tmp_path: Path) -> None:
    make_all(tmp_path / "one")
    make_all(tmp_path / "two")
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    assert {Path(secret["file"]).name for secret in COMPOSE["secrets"].values()} == one.keys() == two.keys()
    assert {name for service in SERVICES.values() for name in service.get("secrets", [])} == one.keys()
    assert all(len(value) >= 32 and value != two[name] for name, value in one.items())
    assert len(set(one.values())) == len(one)
    assert one["redis_auth"] == f"requirepass {urlsplit(one['redis_url']).password}"
    assert urlsplit(one["database_url"]).password == one["stories_db_password"]
    assert urlsplit(one["mlflow_database_url"]).password == one["mlflow_db_password"]


def test_only_the_owner_gets_into_the_folder_and_each_container_can_read_its_file(tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir(mode=0o755)
    make_all(tmp_path / "secrets")
    assert stat.S_IMODE((tmp_path / "secrets").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "secrets").iterdir()} == {0o444}


def test_existing_secrets_are_kept_and_the_missing_ones_fit_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stories_db_password").write_text("hunter2\n", "utf-8")
    (tmp_path / "mlflow_db_password").write_text("100% / @home\n", "utf-8")
    make_all(tmp_path)
    made = read(tmp_path)
    assert made["stories_db_password"] == "hunter2"
    assert made["database_url"] == "postgresql://stories:hunter2@postgres:5432/stories"
    address = make_url(made["mlflow_database_url"])
    assert (address.username, address.password, address.host) == ("mlflow", "100% / @home", "postgres")
    assert "hunter2" not in capsys.readouterr().out
    make_all(tmp_path)
    assert (read(tmp_path), capsys.readouterr().out) == (made, "")
