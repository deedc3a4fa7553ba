"""What the settings make of a split: arms loaded, or one line that says why not.

The registry's part of it stands in `tests/experiments/registry/test_story_arm.py`, beside a store.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from demo.routing.arms import divided
from demo.routing.split import SplitBackend
from model.architecture.folder import PRETRAINED
from model.errors import InputError, MissingExtraError, ModelError
from model.serving.backend import LocalBackend
from model.serving.deployments import open_deployments
from model.serving.remote.modal import ModalBackend
from model.settings import Settings
from tests.demo.scripted import ScriptedBackend

USUAL = ScriptedBackend("A story.")


def made(**settings: object) -> SplitBackend:
    backend = divided(lambda: USUAL, Settings(**settings))  # type: ignore[arg-type]
    assert isinstance(backend, SplitBackend)
    return backend


def test_without_a_split_the_usual_model_writes_for_everyone_and_is_noted() -> None:
    backend = made()
    assert [arm.backend for arm in backend.arms.values()] == [USUAL]
    assert (backend.name, backend.model, backend.capacity) == ("scripted", USUAL.model, USUAL.capacity)
    assert not backend.compares
    assert not Path("stories.db").exists(), "nothing is opened before it runs"


def test_with_feedback_off_nothing_is_noted_at_all() -> None:
    assert divided(lambda: USUAL, Settings(story_feedback=False)) is USUAL
    with pytest.raises(InputError, match="STORY_SPLIT needs STORY_FEEDBACK"):
        divided(lambda: USUAL, Settings(story_feedback=False, story_split="a:1"))


def test_a_folder_is_an_arm_and_an_arm_without_a_share_is_not_loaded() -> None:
    backend = made(story_split=f"default:9,{PRETRAINED}:1,not/there:0", story_slots=1, story_runtime="onnx")
    assert list(backend.arms) == ["default", str(PRETRAINED)]
    arm = backend.arms[str(PRETRAINED)].backend
    assert isinstance(arm, LocalBackend)
    assert len(arm.model.version) == 64


def test_the_tests_name_deals_anew() -> None:
    one = made(story_split="default:1").split
    other = made(story_split="default:1", story_split_name="spring").split
    assert (one.name, other.name) == ("stories", "spring")
    with pytest.raises(InputError, match="STORY_SPLIT_NAME must have 1 to 100 characters, got 101"):
        made(story_split="default:1", story_split_name="x" * 101)


def test_a_deployment_on_modal_is_an_arm_where_modal_is_set_up() -> None:
    settings: dict[str, object] = {
        "story_split": "blue:1,green:1",
        "modal_endpoint_url": "http://127.0.0.1:1",
        "story_deployments": "deployments.json",
    }
    with pytest.raises(
        InputError, match="STORY_SPLIT names the variant 'blue', and nothing proven runs there"
    ):
        made(**settings)
    deployments = open_deployments(Settings(story_deployments="deployments.json"))
    deployments.set_deployment("blue", "http://127.0.0.1:2", "aa" * 32)
    deployments.set_deployment("green", "http://127.0.0.1:3", "bb" * 32)
    arms = made(**settings).arms
    assert [arm.backend.model.version for arm in arms.values()] == ["aa" * 32, "bb" * 32]
    assert all(isinstance(arm.backend, ModalBackend) for arm in arms.values())


@pytest.mark.parametrize(
    ("settings", "kind", "said"),
    [
        ({"story_split": "champion"}, InputError, "STORY_SPLIT must be variants with weights"),
        ({"story_split": "not/there:1"}, ModelError, "not/there is not a model folder"),
        ({"database_url": "mysql://x"}, InputError, "DATABASE_URL must be sqlite:///FILE or postgresql://"),
    ],
)
def test_what_cannot_be_is_one_line(settings: dict[str, object], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        made(**settings)


def test_a_registered_version_without_mlflow_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    # MLflow is installed where the tests run; only its absence can be made up.
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        MissingExtraError, match=r"the arm 'champion' of STORY_SPLIT.* needs the 'train' packages"
    ):
        made(story_split="champion:1")
