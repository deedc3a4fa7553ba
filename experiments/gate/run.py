"""`story gate`: fetch the evidence, decide, and log the decision where promotion looks for it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from experiments.common.evidence_runs import DIGEST, EvidenceStore
from experiments.common.thresholds import Thresholds
from experiments.gate.decide import Decision, decide
from experiments.gate.evidence import Evidence, gather, save_champion
from experiments.gate.render import junit, markdown
from experiments.quality.evidence import QualityEvidence
from experiments.registry.versions import CHAMPION, Version, find, holder
from model.errors import InputError
from training.tracking.provenance import provenance

EXPERIMENT = "story-gate"


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
        track: log the decision to `story-gate`; nothing can be promoted by a decision that is not logged.

    Raises:
        InputError: there is no such version, or the store cannot be used.
    """
    chosen: Version | None = None
    if digest is None:
        chosen = find(uri, version or "challenger")
        digest = chosen.digest
    champion = holder(uri, CHAMPION) if against_file is None else None
    evidence = gather(uri, digest, champion=champion.digest if champion else None, against_file=against_file)
    decision = decide(evidence, thresholds, version=chosen.number if chosen else None)
    return _log(uri, decision, evidence) if track else decision


def save_losses(uri: str, path: Path, *, version: str, digest: str | None = None) -> None:
    """Write an artifact's losses to `path`, to compare with them where this store is not available.

    Raises:
        InputError: there is no such version, or no evaluation of it.
    """
    digest = digest or find(uri, version).digest
    evidence = QualityEvidence.newest(uri, digest)
    if evidence is None:
        raise InputError("save-champion", f"needs an evaluation of {digest[:12]}; `story evaluate` makes one")
    save_champion(evidence, path)


def _log(uri: str, decision: Decision, evidence: Evidence) -> Decision:
    tags = provenance().tags() | {
        DIGEST: decision.digest,
        "gate": decision.verdict,
        "thresholds.digest": decision.thresholds_digest,
        "champion.digest": decision.champion or "",
        "version": "" if decision.version is None else str(decision.version),
    }
    with EvidenceStore(uri, EXPERIMENT).run(f"gate {decision.digest[:8]}: {decision.verdict}", tags) as run:
        logged = dataclasses.replace(decision, run_id=run.run_id)
        run.log_metrics(
            {
                f"{check.threshold.scope}/{check.threshold.metric}": check.bounds.value
                for check in decision.checks
                if check.bounds is not None
            }
        )
        texts = {
            "decision.json": json.dumps(logged.as_dict(), ensure_ascii=False, indent=2) + "\n",
            "decision.md": markdown(logged),
            "decision.xml": junit(logged),
            "evidence.json": json.dumps(evidence.as_dict(), indent=2) + "\n",
        }
        run.log_texts(texts)
    return logged
