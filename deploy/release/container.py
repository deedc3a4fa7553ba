"""What one serving container runs: the GPU engine behind the HTTP service, started in two halves.

Kept apart from `deploy.modal_app`, which says where and how often it runs, so that it can be run and tested on any
machine. `prepare` needs no GPU and can be kept in a memory snapshot, `listen` does the rest, `close` drains.
"""

import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from model.architecture.folder import ModelFolder
from model.errors import ModelError

if TYPE_CHECKING:
    from model.serving.http.server import DrainingServer

CLOSE_TIMEOUT = 10
"""Seconds beyond the drain that the server gets to close its connections."""


@dataclass(kw_only=True)
class Container:
    """The service over one model folder. Call `prepare`, then `listen`, then `close`."""

    folder: Path
    revision: str
    """The digest that the folder must have."""
    name: str
    """Which deployment this is, as clients see it: `blue`."""
    slots: int
    queue: int
    """Requests that may wait for a slot."""
    drain: float
    """Seconds that running requests get when the container stops."""
    device: str = "cuda"
    url: str | None = None
    """Where it listens, once it does."""
    _server: "DrainingServer | None" = None
    _thread: threading.Thread | None = None

    def prepare(self) -> None:
        """Import what is slow to import and verify the folder, without a GPU.

        torch must not be asked for its GPUs here: where there is none yet it would remember that.

        Raises `ModelError` when the folder is damaged, or is not the revision that was deployed.
        """
        # These imports take most of a cold start; made here, they are in the snapshot.
        import model.runtimes.torch.runtime  # noqa: F401
        import model.serving.http.app  # noqa: F401
        import model.serving.http.server  # noqa: F401

        found = ModelFolder.open(self.folder).digest
        if found != self.revision:
            raise ModelError(f"{self.folder} holds {found[:12]}, but {self.revision[:12]} was deployed")

    def listen(self, host: str, port: int) -> None:
        """Load the engine and serve on `port` (0: any free one). Raises `ModelError` and `InputError`."""
        from model.engine.load import load_torch_engine
        from model.serving.backend import LocalBackend, ModelInfo
        from model.serving.http.app import create_service
        from model.serving.http.server import DrainingServer, bound, url_of
        from model.settings import ServiceOptions, load_settings

        listener = bound(host, port)
        engine = load_torch_engine(self.folder, slots=self.slots, device=self.device, queue_limit=self.queue)
        info = ModelInfo(name=f"the model on {self.device}", version=self.revision)
        backend = LocalBackend(engine, info, capacity=self.slots + self.queue)
        options = ServiceOptions(settings=load_settings(story_drain=self.drain), name=self.name)
        service = create_service(backend, options)
        ready = threading.Event()
        self._server = DrainingServer(service, ready.set)
        # The main thread belongs to whoever runs the container.
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [listener]}, name="story-service", daemon=True
        )
        self._thread.start()
        while not ready.wait(0.1):
            if not self._thread.is_alive():
                raise ModelError(f"the service over {self.folder} did not start; see its log")
        self.url = url_of(listener, host)

    def close(self) -> None:
        """Refuse new requests, drain for at most the configured time, then close. Harmless twice."""
        if self._server is None or self._thread is None or not self._thread.is_alive():
            return
        self._server.handle_exit(signal.SIGTERM, None)
        self._thread.join(self.drain + CLOSE_TIMEOUT)
