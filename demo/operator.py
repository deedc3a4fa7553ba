"""What a signed-in operator may do on the page Experiments: promote a version, roll back, switch deployments.

Each action answers with its dry run first, and happens when the browser sends the plan of that dry run back; if
anything changed in between, nothing happens and the answer is the new dry run.

The operator's token comes with each request, in its body, and is kept in the memory of the tab alone. So there is no
cookie or session that another site's page could use, and no address or log holds it. On an app with a share link, and
without `STORY_OPERATOR_TOKEN`, there is no operator at all.
"""

import asyncio
import contextlib
import hmac
import logging
from dataclasses import dataclass, field
from typing import Any, Self

from experiments.common.thresholds import THRESHOLDS
from experiments.dashboard.client import StoreClient
from experiments.dashboard.moves import Answer
from model.errors import StoryError
from model.serving.deployments import StaleDeploymentError, open_deployments
from model.serving.rate_limit import MemoryWindows
from model.serving.session import GenerationManager
from model.settings import Settings

MAX_FAILURES, FAILURE_SECONDS = 5, 300.0
"""Wrong tokens that one client may send in any so many seconds; then even the right one is refused."""
SWITCH_TIMEOUT = 60.0
"""Seconds that a deployment may take to answer before requests go there; the default of `story deploy switch`."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """Checks the token, shows plans and carries them out. Used from one event loop."""

    settings: Settings
    store: StoreClient
    failures: MemoryWindows = field(default_factory=MemoryWindows)
    """Of signing in, by client."""

    @classmethod
    def of(cls, manager: GenerationManager, store: StoreClient) -> Self | None:
        """Return the operator of an app; None without a token in its settings, and where a share link leads to it."""
        options = manager.options
        if options.public or options.settings.story_operator_token is None:
            return None
        return cls(settings=options.settings, store=store)

    async def answer(self, given: object, client: str) -> dict[str, Any]:
        """Answer what a browser sends: `token`, `action`, `version` and `plan`, for `assets/operator.js`.

        Returns `note` (a line for the operator), `signed_in`, `switch` (whether there are deployments to switch),
        `plan` (what a confirmation sends back; empty: there is nothing to confirm) and `done`.
        """
        sent = given if isinstance(given, dict) else {}
        token, action, version, plan = (
            value if isinstance(value := sent.get(name), str) else "" for name in ("token", "action", "version", "plan")
        )
        if refusal := self._refusal(token, client):
            return _values(Answer(refusal), signed_in=False)
        try:
            match action:
                case "sign in":
                    return _values(Answer(""), switch=await asyncio.to_thread(self._can_switch))
                case "promote" | "rollback":
                    found = await self.store.move(THRESHOLDS, action, version, plan)
                case "switch":
                    found = await asyncio.to_thread(self._switch, plan)
                case _:
                    return _values(Answer("There is no such action."))
        except StoryError as error:
            found = Answer(str(error))
        if found.done:
            log.info("the operator: %s", found.line)
        return _values(found)

    def _refusal(self, token: str, client: str) -> str:
        """Return why this token is refused; empty: it is the right one."""
        tried = self.failures.take(client, MAX_FAILURES, FAILURE_SECONDS, 1)
        if isinstance(tried, float):
            return f"Too many wrong tokens; try again in {tried:.0f} s."
        expected = self.settings.story_operator_token
        assert expected is not None, "`of` makes none without it"
        if not hmac.compare_digest(token.encode("utf-8", "surrogatepass"), expected.get_secret_value().encode()):
            log.warning("an operator's sign-in was refused: the token is wrong")
            return "This is not the operator's token."
        MemoryWindows.refund(tried, 1)
        return ""

    def _can_switch(self) -> bool:
        """Whether an idle deployment has passed its check."""
        state = open_deployments(self.settings).read()
        return state is not None and state.urls[state.idle] is not None

    def _switch(self, plan: str) -> Answer:
        """Show where new stories would go, or send them there, as `story deploy switch` does.

        Raises `DeploymentError`, and `DeployError` for a deployment that is not ready.
        """
        from model.serving.remote.readiness import switch  # what only talks to Modal is loaded where it is used

        deployments = open_deployments(self.settings)
        state = deployments.load()
        if state is None:
            return Answer("nothing is deployed yet; `story deploy deploy` does it")
        if plan == str(state.generation):
            with contextlib.suppress(StaleDeploymentError):
                done = switch(deployments, self.settings, None, timeout=SWITCH_TIMEOUT, generation=state.generation)
                return Answer(done.described(), done=True)
            state = deployments.load() or state
        changed = "the deployments changed meanwhile, and nothing was switched. Now: " if plan else ""
        would = state.switched().described("would go")
        return Answer(f"{changed}{would}; so far to {state.active}", str(state.generation))


def _values(found: Answer, *, signed_in: bool = True, switch: bool = False) -> dict[str, Any]:
    note = found.line[:1].upper() + found.line[1:]
    return {"note": note, "plan": found.plan, "done": found.done, "signed_in": signed_in, "switch": switch}
