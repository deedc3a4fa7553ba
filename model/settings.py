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
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin
from urllib.parse import urlsplit

from annotated_types import Ge, Le
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)

from model.errors import InputError

if TYPE_CHECKING:
    from limits import RateLimitItem

PREFIX = "STORY_"
"""Names that begin so belong to this project alone, which is why an unknown one is a mistake."""
OFF = "off"
MAX_LIMIT_SECONDS = 86_400 * 31
"""Longest period of a rate limit: counts are kept for so long."""
MAX_PROXIES = 32

IN_WORDS = {
    "MODAL_ENDPOINT_URL": "an http(s) address",
    "STORY_LIMIT_": f"like `30/minute` or `5/second; 2000/day` (at most a month), or `{OFF}`",
    "STORY_OPERATOR_TOKEN": "a secret of at least 16 characters",
    "STORY_ORIGINS": "origins like `https://a.example`, with commas between",
    "STORY_ROOT_PATH": "a path like `/stories`",
    "STORY_TRUSTED_PROXIES": "addresses and networks like `10.0.0.0/8`, with commas between, or how many proxies "
    f"(at most {MAX_PROXIES})",
}
"""Allowed values of settings with a syntax of their own, by how their names begin."""


def parse_limits(text: str) -> list[RateLimitItem]:
    """Read `30/minute`, `5/second; 2000/day`, or `off` for none. Raises `ValueError`."""
    if text.strip().lower() == OFF:
        return []
    from limits import parse_many  # takes 0.2 s to load

    try:
        items = parse_many(text)
    except OverflowError as error:
        raise ValueError(str(error)) from None
    if not items or any(
        not 1 <= item.amount <= 10**9 or not 1 <= item.get_expiry() <= MAX_LIMIT_SECONDS for item in items
    ):
        raise ValueError("no such limit")
    return items


def _limit(text: str) -> str:
    parse_limits(text)
    return text


def _web_address(text: str) -> str:
    parts = urlsplit(text)  # `port` raises `ValueError` for one that cannot be
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
        raise ValueError("not an http(s) address")
    return text


def _origin(text: str) -> str:
    parts = urlsplit(_web_address(text))
    if text != f"{parts.scheme}://{parts.netloc}" or "@" in parts.netloc or "*" in text:
        raise ValueError("not an origin")
    return text


def _root_path(text: str) -> str:
    if not re.fullmatch(r"(/[A-Za-z0-9][A-Za-z0-9._~-]*)+/?", text):
        raise ValueError("not a path")
    return text.rstrip("/")


def _origins(value: Any) -> Any:
    """Split a list with commas."""
    parts = value.split(",") if isinstance(value, str) else value
    return [part.strip().rstrip("/") for part in parts or () if part.strip().rstrip("/")]


def _proxies(value: Any) -> Any:
    """Read a number of proxies, or split a list of their networks."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    return int(text) if text.isascii() and text.isdigit() else [part.strip() for part in text.split(",")]


Seconds = Annotated[float, Field(ge=0.01, le=600)]
Limit = Annotated[str, AfterValidator(_limit)]
RootPath = Annotated[str, AfterValidator(_root_path)]
WebAddress = Annotated[str, AfterValidator(_web_address)]
Origins = Annotated[tuple[Annotated[str, AfterValidator(_origin)], ...] | None, BeforeValidator(_origins)]
Proxies = Annotated[
    Annotated[int, Field(ge=0, le=MAX_PROXIES)] | tuple[IPv4Network | IPv6Network, ...] | None,
    BeforeValidator(_proxies),
]


class Settings(BaseModel):
    """All settings, typed. `load_settings` makes one and turns an error into one line."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    stage: Literal["DEV", "PROD", "TEST"] = "DEV"
    """Purpose of this process: development, production or a test."""
    host: str = "127.0.0.1"
    """Address that the app listens on; `0.0.0.0` lets other machines in."""
    port: int = Field(default=7860, ge=0, le=65_535)
    """Port that the app listens on; 0 takes any free one."""
    use_modal: bool = False
    """Whether `--backend auto` generates at `MODAL_ENDPOINT_URL` while that answers; off: always locally."""
    modal_endpoint_url: WebAddress | None = None
    """Address of the remote story service, without a path."""
    modal_key: str | None = None
    """Id of the proxy token for that address, with `MODAL_SECRET`."""
    modal_secret: SecretStr | None = None
    """Secret of that proxy token, with `MODAL_KEY`."""
    story_connect_timeout: Seconds = 3.0
    """Seconds to connect to the remote service."""
    story_response_timeout: Seconds = 8.0
    """Seconds until the remote service must answer, retries and a cold start included."""
    story_first_token_timeout: Seconds = 5.0
    """Seconds from that answer to the first token."""
    story_token_timeout: Seconds = 5.0
    """Seconds between two tokens before the remote service counts as failed."""
    story_breaker_failures: int = Field(default=3, ge=1, le=1_000)
    """Failures in a row that open the circuit breaker; a single time-out opens it too."""
    story_breaker_reset: float = Field(default=10.0, ge=0.01, le=3_600)
    """Seconds that an open circuit breaker waits before it probes the service."""
    openai_api_key: SecretStr | None = None
    """Key that `story benchmark` sends as `Authorization: Bearer …` to a `--target` that is an address."""
    mlflow_tracking_uri: str = "sqlite:///mlflow.db"
    """MLflow store that runs are logged to and versions are registered in: a database or a server."""
    mlflow_tracking_username: str | None = None
    """User name for that server, with `MLFLOW_TRACKING_PASSWORD`; its address may contain both instead."""
    mlflow_tracking_password: SecretStr | None = None
    """Password for that server."""
    mlflow_tracking_token: SecretStr | None = None
    """Token for that server, instead of a name and a password."""
    story_experiments: Literal["auto", "true", "false"] = "auto"
    """Whether the app has the page Experiments, which shows that store to everyone; `auto`: unless `STAGE` is
    PROD."""
    story_operator_token: SecretStr | None = Field(default=None, min_length=16)
    """Token by which an operator signs in on that page, to promote a version, roll back and switch deployments; unset:
    nobody can. Never on a share link."""
    redis_url: SecretStr | None = None
    """Redis that all replicas share: rate limits, response cache, active deployment."""
    database_url: SecretStr | None = None
    """Database of A/B tests, without texts: `sqlite:///FILE`, or `postgresql://…` for several replicas; unset:
    `sqlite:///stories.db`. PostgreSQL also holds sweeps."""
    story_feedback: bool = True
    """Whether the page asks users for a rating, and stores it with the outcome of each story."""
    story_keep_prompts: bool = False
    """Whether prompts are stored there too."""
    story_salt: SecretStr | None = None
    """Secret that user ids are hashed with there; the same on all replicas."""
    story_split: str | None = None
    """Variants of an A/B test with their weights, `champion:90,challenger:10`; also model folders, and `default`
    for the usual model; unset: no test."""
    story_split_name: str = "stories"
    """Name of that test; another name assigns all users anew."""
    story_arena: str | None = None
    """Contestants of the page Arena, `champion, challenger?temperature=0.5`: models as in `STORY_SPLIT` with sampling
    parameters and wishes; unset: the variants of the test, or the served model at two temperatures; `off`: no such
    page. Needs `STORY_FEEDBACK`."""
    story_model: str | None = None
    """Model to serve: a folder, `pretrained` for the one that ships with the project, or a registered version as
    `models:/story-writer@champion` or `models:/story-writer/3`; unset: `pretrained`."""
    story_model_refresh: float = Field(default=30.0, ge=0.1, le=86_400)
    """Seconds between two looks at the version that the alias in `STORY_MODEL` names."""
    story_precision: Literal["int8", "fp32"] = "int8"
    """Precision of the decode graph."""
    story_runtime: Literal["auto", "native", "onnx"] = "auto"
    """Native decoder, ONNX Runtime, or the first of them that works; `native` is int8 only."""
    story_threads: int = Field(default=1, ge=1, le=64)
    """Threads of ONNX Runtime; more than one is slower on busy cores."""
    story_slots: int = Field(default=16, ge=1, le=256)
    """Stories that are generated at once."""
    story_queue: int = Field(default=64, ge=0, le=10_000)
    """Requests that may wait for a slot; one more is refused."""
    story_metrics_token: SecretStr | None = None
    """Token that `/metrics` asks for as `Authorization: Bearer …`; unset: it answers this machine only, and nobody
    through a proxy or a share link."""
    story_log: Literal["text", "json"] = "text"
    """Format of the log; it holds figures, never a story or a prompt."""
    story_drain: int = Field(default=30, ge=0, le=3600)
    """Seconds that running stories get to finish when the service stops."""
    story_max_body: int = Field(default=65_536, ge=1_024, le=16_777_216)
    """Most bytes of a request's body."""
    story_origins: Origins = None
    """Origins of other sites whose pages may call the API, such as `https://a.example`, with commas between; unset:
    none."""
    story_root_path: RootPath = ""
    """Path under which a proxy publishes the app, such as `/stories`; unset: the root."""
    story_mcp: bool = False
    """Offer the page's endpoints, such as `/write`, as tools over the Model Context Protocol, at `/gradio_api/mcp/`."""
    story_limit_stories: Limit | None = None
    """Requests of one client; unset: `30/minute` in PROD, else no limit."""
    story_limit_tokens: Limit | None = None
    """Tokens generated for one client; unset: `20000/minute` in PROD, else no limit."""
    story_limit_all_stories: Limit | None = None
    """Requests of all clients together; unset: `600/minute` in PROD, else no limit."""
    story_limit_all_tokens: Limit | None = None
    """Tokens generated for all clients together; unset: `200000/minute` in PROD, else no limit."""
    story_trusted_proxies: Proxies = None
    """Proxies whose `X-Forwarded-For` names the client; unset: none, the client is who connects."""
    story_cache: bool = True
    """Whether repeated seeded requests are served from the response cache."""
    story_cache_bytes: int = Field(default=16_777_216, ge=65_536, le=17_179_869_184)
    """Memory of that cache; the least recently used stories are evicted."""
    story_cache_ttl: int = Field(default=3_600, ge=1, le=2_592_000)
    """Seconds that a story stays in that cache."""
    story_deployments: str | None = None
    """File that says which of blue and green is active, where there is no `REDIS_URL`; unset:
    `write-me-a-story/deployments.json` in the user's state folder."""
    story_deployment: Literal["blue", "green"] = "blue"
    """Which of the two deployments `modal deploy -m deploy.modal_app` makes; `story deploy` sets it."""
    story_revision: str | None = None
    """Digest of the uploaded model folder that it serves; `story deploy` sets it; unset: the model that ships with
    the project."""
    story_gpu: str = "L4"
    """GPU that Modal uses for serving and training."""

    @model_validator(mode="after")
    def _check_together(self) -> Settings:
        if self.use_modal and self.modal_endpoint_url is None:
            raise InputError("MODAL_ENDPOINT_URL", "must be set when USE_MODAL is on")
        if (self.modal_key is None) != (self.modal_secret is None):
            absent = "MODAL_KEY" if self.modal_key is None else "MODAL_SECRET"
            raise InputError(absent, "must be set too: MODAL_KEY and MODAL_SECRET are two halves of one token")
        return self

    @model_validator(mode="before")
    @classmethod
    def _with_environment(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Take what is not given from the environment, under exact names; an empty value counts as unset."""
        return {name: os.environ[name.upper()] for name in cls.model_fields if os.environ.get(name.upper())} | given


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


def _secrets_from_files() -> dict[str, Any]:
    """The secrets that a variable `…_FILE` names a file for, each without the line's end. Raises `InputError`."""
    found: dict[str, Any] = {}
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
            found[name.lower()] = secret
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
    chosen = _secrets_from_files() | {name: value for name, value in given.items() if value is not None}
    try:
        return Settings(**chosen)
    except ValidationError as error:
        field = str(error.errors()[0]["loc"][0])
    name = field.upper()
    shown = "something else" if name in secret_names() else repr(chosen.get(field, os.environ.get(name)))
    raise InputError(name, f"must be {allowed_values(name)}, got {shown}")


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


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceOptions:
    """Options of one process's service; by default its settings are the environment's."""

    settings: Settings = field(default_factory=Settings)
    name: str = ""
    """Name of this deployment (`blue`), sent in `x-story-backend` and by the health route; empty: the backend's."""
    keep_alive: float = 5.0
    """Seconds of silence after which an event stream carries a comment, so that no proxy closes it."""
    public: bool = False
    """Everyone can reach every route (a share link): `/metrics` answers with the token only."""

    def __post_init__(self) -> None:
        # It goes into a header.
        if not re.fullmatch(r"[A-Za-z0-9._-]{0,40}", self.name):
            raise InputError("name", f"must be at most 40 letters, digits, dots, - and _, got {self.name!r}")
