"""`story gate`: fetch the evidence, decide, and log the decision where promotion looks for it."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.common.thresholds import Thresholds
from experiments.gate.decide import decide
from experiments.gate.evidence import as_plain, gather, save_baseline
from experiments.gate.shown import junit, markdown
from experiments.gate.verdict import Decision
from experiments.quality.evidence import load_quality_evidence
from experiments.registry.versions import CHAMPION, Version, find, versions
from model.errors import InputError, StoryError
from training.tracking.provenance import provenance
from training.tracking.store import open_experiment, open_store, unusable

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "story-gate"
DIGEST = "artifact.digest"


def run_gate(
    uri: str,
    thresholds: Thresholds,
    *,
    version: str | None = "challenger",
    digest: str | None = None,
    against_file: Path | None = None,
    track: bool = True,
) -> Decision:
    """Decide on one version, or, with `digest`, on an artifact that need not be registered.

    Args:
        version: number, alias or digest of a registered version; not used with `digest`.
        against_file: a champion's losses in a file, instead of the store's champion.
        track: log the decision to `story-gate`; without it nothing can be promoted by it.

    Raises:
        InputError: there is no such version, or the store cannot be used.
    """
    chosen: Version | None = None
    if digest is None:
        chosen = find(uri, version or "challenger")
        digest = chosen.digest
    champion = None if against_file is not None else _champion(uri)
    evidence = gather(uri, digest, champion=champion, against_file=against_file)
    decision = decide(evidence, thresholds, version=chosen.number if chosen else None)
    if not track:
        return decision
    return _log(uri, decision, json.dumps(as_plain(evidence), indent=2))


def save_losses(uri: str, path: Path, *, version: str, digest: str | None = None) -> None:
    """Write an artifact's losses to `path`, to be compared with where this store is not.

    Raises:
        InputError: there is no such version, or no evaluation of it.
    """
    digest = digest or find(uri, version).digest
    evidence = load_quality_evidence(uri, digest)
    if evidence is None:
        raise InputError("save-champion", f"needs an evaluation of {digest[:12]}; `story evaluate` makes one")
    save_baseline(evidence, path)


def _champion(uri: str) -> str | None:
    return next((each.digest for each in versions(uri) if CHAMPION in each.aliases), None)


def _log(uri: str, decision: Decision, evidence: str) -> Decision:
    client = open_store(uri)
    experiment = open_experiment(client, uri, EXPERIMENT)
    try:
        tags = provenance().tags() | {
            DIGEST: decision.digest,
            "gate": decision.verdict,
            "thresholds.digest": decision.thresholds_digest,
            "champion.digest": decision.champion or "",
            "version": "" if decision.version is None else str(decision.version),
        }
        name = f"gate {decision.digest[:8]}: {decision.verdict}"
        run_id = str(client.create_run(experiment, run_name=name, tags=tags).info.run_id)
        logged = dataclasses.replace(decision, run_id=run_id)
        _fill(client, logged, evidence)
        client.set_terminated(run_id, "FINISHED")
    except StoryError:
        raise
    except Exception as error:  # SQLAlchemy's, MLflow's, the driver's or the network's
        raise unusable(uri, error) from error
    return logged


def _fill(client: MlflowClient, decision: Decision, evidence: str) -> None:
    run_id = str(decision.run_id)
    for check in decision.checks:
        if check.bounds is not None:
            client.log_metric(run_id, f"{check.threshold.scope}/{check.threshold.metric}", check.bounds.value)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        text = json.dumps(decision.as_dict(), ensure_ascii=False, indent=2)
        (folder / "decision.json").write_text(text + "\n", encoding="utf-8")
        (folder / "decision.md").write_text(markdown(decision), encoding="utf-8")
        (folder / "decision.xml").write_text(junit(decision), encoding="utf-8")
        (folder / "evidence.json").write_text(evidence + "\n", encoding="utf-8")
        client.log_artifacts(run_id, str(folder))
