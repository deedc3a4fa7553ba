"""What the environment may say: every name, every bound, every message."""

from __future__ import annotations

from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.errors import InputError
from model.reference import settings_table
from model.settings import Settings, environment_names, load_settings, without_password

REST = "or `5/second; 2000/day` (at most a month), or `off`"
PROXIES = ", with commas between, or how many proxies (at most 32), got "


@pytest.mark.parametrize(
    ("name", "default"),
    [
        ("stage", "DEV"),
        ("host", "127.0.0.1"),
        ("port", 7860),
        ("use_modal", False),
        ("modal_endpoint_url", None),
        ("mlflow_tracking_uri", "sqlite:///mlflow.db"),
        ("story_model", None),
        ("story_precision", "int8"),
        ("story_threads", 1),
        ("story_slots", 16),
        ("story_queue", 64),
    ],
)
def test_an_empty_environment_gives_the_documented_default(name: str, default: object) -> None:
    assert getattr(load_settings(), name) == default


def test_values_come_from_the_environment_in_their_types(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "STAGE": "PROD",
        "PORT": "0",
        "USE_MODAL": "true",
        "MODAL_ENDPOINT_URL": "https://stories.example/",
        "MODAL_KEY": "wk-1",
        "MODAL_SECRET": "ws-1",
        "STORY_MODEL": "runs/mine/model",
        "STORY_PRECISION": "fp32",
        "STORY_SLOTS": "4",
    }.items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    assert (settings.stage, settings.port, settings.use_modal) == ("PROD", 0, True)
    assert settings.modal_secret is not None
    assert settings.modal_secret.get_secret_value() == "ws-1"
    assert (settings.story_model, settings.story_precision, settings.story_slots) == ("runs/mine/model", "fp32", 4)


def test_an_option_stands_in_for_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "http")
    assert (load_settings(port=80).port, load_settings(port=80, host=None).host) == (80, "127.0.0.1")
    with pytest.raises(InputError, match=r"^PORT must be a whole number between 0 and 65535, got 65536$"):
        load_settings(port=65536)
    with pytest.raises(InputError, match=r"^PORT must be a whole number between 0 and 65535, got 'http'$"):
        load_settings(port=None)


def test_an_empty_value_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in environment_names():
        monkeypatch.setenv(name, "")
    assert load_settings() == Settings()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("STAGE", "prod", "STAGE must be one of DEV, PROD, TEST, got 'prod'"),
        ("PORT", "http", "PORT must be a whole number between 0 and 65535, got 'http'"),
        ("PORT", "65536", "PORT must be a whole number between 0 and 65535, got '65536'"),
        ("USE_MODAL", "maybe", "USE_MODAL must be true or false, got 'maybe'"),
        ("MODAL_ENDPOINT_URL", "stories.example", "must be an http(s) address, got 'stories.example'"),
        ("MODAL_ENDPOINT_URL", "http://a:99999", "must be an http(s) address, got 'http://a:99999'"),
        ("STORY_RESPONSE_TIMEOUT", "nan", "STORY_RESPONSE_TIMEOUT must be a number between 0.01 and 600, got 'nan'"),
        ("STORY_TOKEN_TIMEOUT", "0", "STORY_TOKEN_TIMEOUT must be a number between 0.01 and 600, got '0'"),
        ("STORY_PRECISION", "int4", "STORY_PRECISION must be one of int8, fp32, got 'int4'"),
        ("STORY_RUNTIME", "c", "STORY_RUNTIME must be one of auto, native, onnx, got 'c'"),
        ("STORY_THREADS", "0", "STORY_THREADS must be a whole number between 1 and 64, got '0'"),
        ("STORY_SLOTS", "1.5", "STORY_SLOTS must be a whole number between 1 and 256, got '1.5'"),
        *(
            ("STORY_LIMIT_TOKENS", value, f"STORY_LIMIT_TOKENS must be like `30/minute` {REST}, got {value!r}")
            for value in ("30", "0/minute", "minute", "30/fortnight", "-1/minute", "5/second,", "2/2year", "many")
        ),
        *(
            ("STORY_TRUSTED_PROXIES", value, f"must be addresses and networks like `10.0.0.0/8`{PROXIES}{value!r}")
            for value in ("10.0.0.0/99", "proxy.example", "10.0.0.1,", "99", "-1", "10.0.0.1/8", "9" * 5000)
        ),
        *(
            ("STORY_ORIGINS", value, "must be origins like `https://a.example`, with commas between, got")
            for value in (
                "*",
                "https://*.example",
                "a.example",
                "ftp://a.example",
                "https://b.example,https://a.example/x",
                "https://u:p@a.example",
                "null",
            )
        ),
    ],
)
def test_a_wrong_value_is_reported_with_what_is_allowed(
    name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as caught:
        load_settings()
    assert caught.value.param == name
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("STORY_THRAEDS", "STORY_THREADS"), ("STORY_MODLE", "STORY_MODEL"), ("STORY_SLOT", "STORY_SLOTS")],
)
def test_an_unknown_story_name_is_an_error_that_names_the_nearest(
    name: str, nearest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(InputError, match=f"{name} is not a setting; the nearest is {nearest}"):
        load_settings()


def test_names_of_other_programs_are_none_of_our_business(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORYBOOK_PORT", "x")
    monkeypatch.setenv("stage", "nonsense")
    assert load_settings().stage == "DEV"


def test_half_a_modal_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODAL_KEY", "wk-1")
    with pytest.raises(InputError, match="MODAL_SECRET must be set too"):
        load_settings()


def test_modal_without_an_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USE_MODAL", "1")
    with pytest.raises(InputError, match="MODAL_ENDPOINT_URL must be set when USE_MODAL is on"):
        load_settings()


@pytest.mark.parametrize("name", ["MODAL_SECRET", "REDIS_URL", "DATABASE_URL"])
def test_a_secret_shows_up_nowhere(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODAL_KEY", "wk-1")
    monkeypatch.setenv("MODAL_SECRET", "ws-1")
    monkeypatch.setenv(name, "hunter2-in-a-hat")
    settings = load_settings()
    assert "hunter2" not in f"{settings!r} {settings} {settings.model_dump_json()}"


def test_lists_are_read_with_commas_between() -> None:
    origins = "https://a.example/ , http://localhost:3000"
    settings = load_settings(story_origins=origins, story_trusted_proxies="10.0.0.0/8, 192.0.2.7")
    assert settings.story_origins == ("https://a.example", "http://localhost:3000")
    assert settings.story_trusted_proxies == (ip_network("10.0.0.0/8"), ip_network("192.0.2.7"))
    assert load_settings(story_origins=" , ", story_trusted_proxies="2").story_trusted_proxies == 2


@given(st.text(max_size=40))
def test_any_text_is_a_list_of_origins_or_refused(text: str) -> None:
    try:
        origins = load_settings(story_origins=text).story_origins or ()
    except InputError:
        return
    assert all(origin.startswith(("http://", "https://")) and "*" not in origin for origin in origins)


def test_the_table_has_one_row_for_each_name_with_its_default() -> None:
    rows = settings_table().splitlines()[2:]
    assert len(rows) == len(environment_names()) == len(Settings.model_fields)
    for name, row in zip(environment_names(), rows, strict=True):
        default = getattr(Settings(), name.lower())
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[0] == f"`{name}`"
        assert cells[1].strip("`").lower() == ("" if default is None else str(default).lower())
        assert cells[3], f"{name} has no description"


_letters = st.text("abcXYZ019._-%", min_size=1, max_size=12)


@given(user=_letters, password=st.text("abc:@/#?=019", max_size=12).filter(lambda text: "/" not in text), host=_letters)
def test_a_shown_address_never_holds_its_password(user: str, password: str, host: str) -> None:
    assert without_password(f"postgresql://{user}:{password}@{host}/runs") == f"postgresql://…@{host}/runs"


@given(host=_letters, path=_letters)
def test_an_address_without_a_password_is_shown_as_it_is(host: str, path: str) -> None:
    assert without_password(f"sqlite:///{host}/{path}") == f"sqlite:///{host}/{path}"
