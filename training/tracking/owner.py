"""Whose run it is, and whether that process still lives.

A process that is killed outright cannot say goodbye, so its run would stand as `RUNNING` for ever. Each run
therefore carries its owner's identity, and whoever starts next can tell the dead from the living. A process
id alone would lie after a reboot or when the id is used again; the machine's boot and the moment the process
began are part of the identity. The machine is named by a hash, because a host's name may be private.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import psutil

State = Literal["alive", "dead", "unknown"]

SAME_MOMENT = 1.5
"""Seconds: the kernel's boot time is told in whole ones and may jump by one between two looks."""


@dataclass(frozen=True, slots=True)
class Owner:
    """One process, told from all others of the past."""

    host: str
    """Hash of the machine's name and of the process-id namespace (two containers both have a process 1)."""
    boot: str
    pid: int
    began: float
    """Seconds from the machine's boot to the process's start."""

    def to_text(self) -> str:
        """One line of JSON, for a tag."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> Owner | None:
        """The inverse; `None` for anything else, such as a tag of another program."""
        try:
            fields = json.loads(text)
            return cls(str(fields["host"]), str(fields["boot"]), int(fields["pid"]), float(fields["began"]))
        except (ValueError, TypeError, KeyError):
            return None

    def state(self) -> State:
        """Whether that process lives; `unknown` for another machine's, which cannot be seen from here."""
        if self.host != _host():
            return "unknown"
        if self.boot != _boot():
            return "dead"
        try:
            process = psutil.Process(self.pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                return "dead"
            return "alive" if abs(_began(process) - self.began) < SAME_MOMENT else "dead"
        except psutil.NoSuchProcess:
            return "dead"
        except psutil.Error:
            return "unknown"


def owner_of(pid: int | None = None) -> Owner:
    """Identity of a living process of this machine, of this one by default."""
    process = psutil.Process(pid)
    return Owner(_host(), _boot(), process.pid, round(_began(process), 2))


def _began(process: psutil.Process) -> float:
    # Both terms are counted from the same boot time, so a clock that is set does not move the difference.
    return float(process.create_time() - psutil.boot_time())


def _host() -> str:
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = str(uuid.getnode())
    return hashlib.sha256(f"{platform.node()}/{space}".encode()).hexdigest()[:16]


def _boot() -> str:
    """Linux's random id of this boot; elsewhere the boot's minute."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return str(round(psutil.boot_time() / 60))
