"""Read the settings from the environment and check them once.

Every name that the project reads is a field of `Settings`; nothing else reads the environment for a setting.
`docs/configuration.md` lists them in a table that `model.reference` makes. An unknown name that starts with `STORY_`
is an error, because a mistyped setting that is silently ignored looks exactly like one that works. A secret may also
be read from a file, as orchestrators mount them: `REDIS_URL_FILE` names the file for `REDIS_URL`.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin
from urllib.parse import urlsplit

from annotated_types import Ge, Le
from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from model.errors import InputError

PREFIX = "STORY_"
"""Names that begin so belong to this project alone, which is why an unknown one is a mistake."""


IN_WORDS = {
    "MODAL_ENDPOINT_URL": "an http(s) address",
    "STORY_LIMIT_": "like `30/minute` or `5/second; 2000/day`, or `off`",
    "STORY_TRUSTED_PROXIES": "addresses and networks like `10.0.0.0/8`, or how many proxies",
}
"""What texts of a certain form may be, by how their names begin."""


class Settings(BaseSettings):
    """All settings, typed. `load_settings` makes one and turns what is wrong into one line for a reader."""

    model_config = SettingsConfigDict(
        alias_generator=str.upper,
        populate_by_name=True,
        case_sensitive=True,
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
    )

    stage: Literal["DEV", "PROD", "TEST"] = Field(
        default="DEV",
        description="Purpose of this process: development, production or a test",
    )
    host: str = Field(
        default="127.0.0.1",
        description="Address that the app listens on; `0.0.0.0` lets other machines in",
    )
    port: int = Field(
        default=7860,
        ge=0,
        le=65_535,
        description="Port that the app listens on; 0 takes any free one",
    )
    use_modal: bool = Field(
        default=False,
        description="Whether `--backend auto` generates at `MODAL_ENDPOINT_URL` while that answers; off: "
        "always locally",
    )
    modal_endpoint_url: str | None = Field(
        default=None,
        description="Address of the remote story service, without a path",
    )
    modal_key: str | None = Field(
        default=None,
        description="Id of the proxy token for that address, with `MODAL_SECRET`",
    )
    modal_secret: SecretStr | None = Field(
        default=None,
        description="Secret of that proxy token, with `MODAL_KEY`",
    )
    story_connect_timeout: float = Field(
        default=3.0,
        ge=0.01,
        le=600,
        description="Seconds to connect to the remote service",
    )
    story_response_timeout: float = Field(
        default=8.0,
        ge=0.01,
        le=600,
        description="Seconds until the remote service must answer, retries and a cold start included",
    )
    story_first_token_timeout: float = Field(
        default=5.0,
        ge=0.01,
        le=600,
        description="Seconds from that answer to the first token",
    )
    story_token_timeout: float = Field(
        default=5.0,
        ge=0.01,
        le=600,
        description="Seconds between two tokens before the remote service counts as failed",
    )
    story_breaker_failures: int = Field(
        default=3,
        ge=1,
        le=1_000,
        description="Failures in a row that open the circuit breaker; a single time-out opens it too",
    )
    story_breaker_reset: float = Field(
        default=10.0,
        ge=0.01,
        le=3_600,
        description="Seconds that an open circuit breaker waits before it probes the service",
    )
    mlflow_tracking_uri: str = Field(
        default="sqlite:///mlflow.db",
        description="MLflow store that runs are logged to: a database or a server",
    )
    story_experiments: Literal["auto", "true", "false"] = Field(
        default="auto",
        description="Whether the app has the page Experiments, which shows that store to everyone; `auto`: "
        "unless `STAGE` is PROD",
    )
    redis_url: SecretStr | None = Field(
        default=None,
        description="Redis that all replicas share: rate limits, response cache, active deployment",
    )
    database_url: SecretStr | None = Field(
        default=None,
        description="Database of A/B tests, without texts: `sqlite:///FILE`, or `postgresql://…` for several "
        "replicas; unset: `sqlite:///stories.db`. PostgreSQL also holds sweeps",
    )
    story_feedback: bool = Field(
        default=True,
        description="Whether the page asks users for a rating, and stores it with the outcome of each story",
    )
    story_keep_prompts: bool = Field(
        default=False,
        description="Whether prompts are stored there too",
    )
    story_salt: SecretStr | None = Field(
        default=None,
        description="Secret that user ids are hashed with there; the same on all replicas",
    )
    story_split: str | None = Field(
        default=None,
        description="Variants of an A/B test with their weights, `champion:90,challenger:10`; also model "
        "folders, and `default` for the usual model; unset: no test",
    )
    story_split_name: str = Field(
        default="stories",
        description="Name of that test; another name assigns all users anew",
    )
    story_model: str | None = Field(
        default=None,
        description="Folder of the model to serve; unset: `model/pretrained`",
    )
    story_precision: Literal["int8", "fp32"] = Field(
        default="int8",
        description="Precision of the decode graph",
    )
    story_runtime: Literal["auto", "native", "onnx"] = Field(
        default="auto",
        description="Native decoder, ONNX Runtime, or the first of them that works; `native` is int8 only",
    )
    story_threads: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Threads of ONNX Runtime; more than one is slower on busy cores",
    )
    story_slots: int = Field(
        default=16,
        ge=1,
        le=256,
        description="Stories that are generated at once",
    )
    story_queue: int = Field(
        default=64,
        ge=0,
        le=10_000,
        description="Requests that may wait for a slot; one more is refused",
    )
    story_metrics_token: SecretStr | None = Field(
        default=None,
        description="Token that `/metrics` asks for as `Authorization: Bearer …`; unset: it answers this "
        "machine only, and nobody through a proxy or a share link",
    )
    story_log: Literal["text", "json"] = Field(
        default="text",
        description="Format of the log; it holds figures, never a story or a prompt",
    )
    story_drain: int = Field(
        default=30,
        ge=0,
        le=3600,
        description="Seconds that running stories get to finish when the service stops",
    )
    story_max_body: int = Field(
        default=65_536,
        ge=1_024,
        le=16_777_216,
        description="Most bytes of a request's body",
    )
    story_origins: str | None = Field(
        default=None,
        description="Origins of other sites whose pages may call the API, such as `https://a.example`, with "
        "commas between; unset: none",
    )
    story_limit_stories: str | None = Field(
        default=None,
        description="Requests of one client; unset: `30/minute` in PROD, else no limit",
    )
    story_limit_tokens: str | None = Field(
        default=None,
        description="Tokens generated for one client; unset: `20000/minute` in PROD, else no limit",
    )
    story_limit_all_stories: str | None = Field(
        default=None,
        description="Requests of all clients together; unset: `600/minute` in PROD, else no limit",
    )
    story_limit_all_tokens: str | None = Field(
        default=None,
        description="Tokens generated for all clients together; unset: `200000/minute` in PROD, else no limit",
    )
    story_trusted_proxies: str | None = Field(
        default=None,
        description="Proxies whose `X-Forwarded-For` names the client; unset: none, the client is who "
        "connects",
    )
    story_cache: bool = Field(
        default=True,
        description="Whether repeated seeded requests are served from the response cache",
    )
    story_cache_bytes: int = Field(
        default=16_777_216,
        ge=65_536,
        le=17_179_869_184,
        description="Memory of that cache; the least recently used stories are evicted",
    )
    story_cache_ttl: int = Field(
        default=3_600,
        ge=1,
        le=2_592_000,
        description="Seconds that a story stays in that cache",
    )
    story_deployments: str | None = Field(
        default=None,
        description="File that says which of blue and green is active, where there is no `REDIS_URL`; "
        "unset: `write-me-a-story/deployments.json` in the user's state folder",
    )
    story_deployment: Literal["blue", "green"] = Field(
        default="blue",
        description="Which of the two deployments `modal deploy -m deploy.modal_app` makes; "
        "`story deploy` sets it",
    )
    story_revision: str | None = Field(
        default=None,
        description="Digest of the uploaded model folder that it serves; `story deploy` sets it; "
        "unset: the model that ships with the project",
    )
    story_gpu: str = Field(
        default="L4",
        description="GPU that Modal uses for serving and training",
    )

    @field_validator(
        "story_limit_stories", "story_limit_tokens", "story_limit_all_stories", "story_limit_all_tokens"
    )
    @classmethod
    def _is_a_limit(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None:
            from model.serving.rate_limit.quotas import read_quotas  # its library takes 0.2 s to load

            assert info.field_name is not None
            read_quotas(info.field_name.upper(), value, "client", "tokens")
        return value

    @field_validator("story_trusted_proxies")
    @classmethod
    def _are_proxies(cls, value: str | None) -> str | None:
        if value is not None:
            from model.serving.rate_limit.clients import Clients

            Clients.read(value)
        return value

    @field_validator("modal_endpoint_url")
    @classmethod
    def _is_a_web_address(cls, value: str | None) -> str | None:
        if value is not None:
            parts = urlsplit(value)  # `port` raises `ValueError` for one that cannot be
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
                raise ValueError("not an http(s) address")
        return value

    @model_validator(mode="after")
    def _belongs_together(self) -> Settings:
        if self.use_modal and self.modal_endpoint_url is None:
            raise InputError("MODAL_ENDPOINT_URL", "must be set when USE_MODAL is on")
        if (self.modal_key is None) != (self.modal_secret is None):
            absent = "MODAL_KEY" if self.modal_key is None else "MODAL_SECRET"
            raise InputError(
                absent, "must be set too: MODAL_KEY and MODAL_SECRET are two halves of one token"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only arguments and the environment under exact names: no file, no `port` for `PORT`."""
        assert isinstance(env_settings, EnvSettingsSource)
        known = {name.upper() for name in settings_cls.model_fields}
        env_settings.env_vars = {
            name: value for name, value in env_settings.env_vars.items() if name in known
        }
        return init_settings, env_settings


def environment_names() -> tuple[str, ...]:
    """The names the project listens to, in the table's order."""
    return tuple(name.upper() for name in Settings.model_fields)


def secret_names() -> tuple[str, ...]:
    """The names whose values are never shown, and may lie in a file."""
    return tuple(
        name.upper()
        for name, field in Settings.model_fields.items()
        if SecretStr in (field.annotation, *get_args(field.annotation))
    )


def _secrets_from_files() -> dict[str, str]:
    """The secrets that a variable `…_FILE` names a file for, each without the line's end. Raises `InputError`."""
    found = {}
    for name in secret_names():
        variable = f"{name}_FILE"
        if not (place := os.environ.get(variable)):
            continue
        if os.environ.get(name):
            raise InputError(variable, f"and {name} cannot both be set")
        try:
            secret = Path(place).read_text("utf-8").rstrip("\r\n")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise InputError(variable, f"names {place!r}, which cannot be read: {reason}") from None
        if secret:  # an empty file counts as unset, like an empty value
            found[name] = secret
    return found


def load_settings(**given: object) -> Settings:
    """Read the settings from the process's environment; an empty value counts as unset.

    `given` values, by the fields' names, stand in for the environment's, None for none: they are a command's
    options. Raises `InputError` whose `param` is the variable's name: for a value that is not allowed, and for a name
    that starts with `STORY_` and means nothing.
    """
    known = environment_names()
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in known and name.removesuffix("_FILE") not in secret_names():
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise InputError(name, f"is not a setting; the nearest is {near}")
    chosen: dict[str, Any] = _secrets_from_files()
    chosen |= {name.upper(): value for name, value in given.items() if value is not None}
    try:
        return Settings(**chosen)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        wrong = repr(chosen.get(name, os.environ.get(name)))
        shown = "something else" if name in secret_names() else wrong
        raise InputError(name, f"must be {allowed_values(name)}, got {shown}") from None


def without_password(address: str) -> str:
    """An address as it may be shown: `postgresql://…@host/db`, without the user and password."""
    return re.sub(r"//[^/]*@", "//…@", address)


def allowed_values(name: str) -> str:
    """What a setting may be, in words: `a whole number between 0 and 65535`."""
    field = Settings.model_fields[name.lower()]
    if get_origin(field.annotation) is Literal:
        return "one of " + ", ".join(get_args(field.annotation))
    if field.annotation is bool:
        return "true or false"
    if field.annotation in (int, float):
        low = next(mark.ge for mark in field.metadata if isinstance(mark, Ge))
        high = next(mark.le for mark in field.metadata if isinstance(mark, Le))
        return f"a {'whole ' * (field.annotation is int)}number between {low} and {high}"
    return next((words for begin, words in IN_WORDS.items() if name.startswith(begin)), "text")
