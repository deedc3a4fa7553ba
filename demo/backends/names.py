"""The names of the backends, where the command line can see them without loading one."""

from __future__ import annotations

from typing import Literal

BackendName = Literal["auto", "local", "modal"]
