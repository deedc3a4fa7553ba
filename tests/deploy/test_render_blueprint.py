"""render.yaml: its fields are those that Render documents, its settings are ours, and it holds no secret."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from model.settings import Settings

DOCUMENTED = {
    "type", "name", "runtime", "plan", "region", "branch", "repo", "dockerfilePath", "dockerContext", "dockerCommand",
    "healthCheckPath", "maxShutdownDelaySeconds", "autoDeployTrigger", "numInstances", "scaling", "domains", "envVars",
    "preDeployCommand", "previews", "buildFilter", "rootDir", "image", "registryCredential", "disk", "ipAllowList",
}  # fmt: skip
"""Of a web service, in Render's reference of blueprints; its schema is in no package that could be a dependency."""
SECRETS = {"MODAL_ENDPOINT_URL", "MODAL_KEY", "MODAL_SECRET", "REDIS_URL", "DATABASE_URL"}


def _service(repository: Path) -> dict[str, Any]:
    blueprint = yaml.safe_load((repository / "render.yaml").read_text("utf-8"))
    assert set(blueprint) == {"services"}
    (service,) = blueprint["services"]
    return dict(service)


def test_one_web_service_runs_the_image_of_this_repository(repository: Path) -> None:
    service = _service(repository)
    assert set(service) <= DOCUMENTED
    assert (service["type"], service["runtime"]) == ("web", "docker")
    assert service["plan"] == "standard", "the smallest with a whole CPU"
    assert service["healthCheckPath"] == "/api/health"
    assert service["autoDeployTrigger"] == "off", "the pipeline deploys, after its gate"


def test_one_to_three_instances_as_documented(repository: Path) -> None:
    scaling = _service(repository)["scaling"]
    assert (scaling["minInstances"], scaling["maxInstances"]) == (1, 3)
    assert 0 < scaling["targetCPUPercent"] <= 90
    assert scaling["targetMemoryPercent"] == 80, "the documented alarm"


def test_every_variable_is_a_setting_and_every_secret_is_asked_for(repository: Path) -> None:
    service = _service(repository)
    variables = {variable["key"]: variable for variable in service["envVars"]}
    assert {key for key, variable in variables.items() if variable.get("sync") is False} == SECRETS
    assert all("value" not in variables[key] for key in SECRETS)
    given = {key: variable["value"] for key, variable in variables.items() if "value" in variable}
    settings = Settings(**{key.lower(): value for key, value in given.items()})
    assert {key.lower() for key in variables} <= set(Settings.model_fields)
    assert (settings.stage, settings.host) == ("PROD", "0.0.0.0")
    assert service["maxShutdownDelaySeconds"] > settings.story_drain, "running stories are told to their end"
