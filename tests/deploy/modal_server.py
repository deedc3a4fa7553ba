"""A fake of Modal's control plane on loopback, which records the requests of the real client.

There is no Modal in a test. What can be shown without it is that the real client, from the real definitions, sends
the intended requests without a warning. So this answers each call over real gRPC with the smallest answer that lets
the client go on. It says nothing about what Modal does with the requests.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpclib
from grpclib.const import Handler
from grpclib.server import Server, Stream
from modal_proto import api_pb2
from modal_proto.api_grpc import ModalClientBase

TOKEN = {"MODAL_TOKEN_ID": "ak-test", "MODAL_TOKEN_SECRET": "as-test"}


class ControlPlane:
    """Answers, and records: `asked["FunctionCreate"]` are the requests of that call."""

    def __init__(self) -> None:
        self.asked: dict[str, list[Any]] = defaultdict(list)
        self.url = ""
        self.address = "https://us-east.example.modal.direct"
        """What a deployed server's address is said to be."""
        self.files: dict[str, set[str]] = defaultdict(set)
        """Paths in each Volume."""
        self.deployed: set[str] = set()
        """Names of Apps that were published."""
        self.known_token = True

    def __mapping__(self) -> dict[str, Handler]:
        handlers = {}
        for path, kind in _kinds().items():
            handlers[path] = Handler(
                self._handler(path.rpartition("/")[2], kind.reply_type),
                kind.cardinality,
                kind.request_type,
                kind.reply_type,
            )
        return handlers

    def _handler(self, name: str, reply_type: Any) -> Any:
        async def handle(stream: Stream[Any, Any]) -> None:
            request = await stream.recv_message()
            self.asked[name].append(request)
            if not self.known_token:
                raise grpclib.GRPCError(grpclib.Status.UNAUTHENTICATED, "Token validation failed")
            reply = getattr(self, f"_{name}", None)
            answers = (reply(request) if reply else None) or reply_type()
            for answer in answers if isinstance(answers, list) else [answers]:
                await stream.send_message(answer)

        return handle

    def _ClientHello(self, _request: Any) -> Any:
        return api_pb2.ClientHelloResponse(image_builder_version="2025.06")

    def _AuthTokenGet(self, _request: Any) -> Any:
        # A token without a signature: the client reads its time of expiry and looks at nothing else.
        part = base64.urlsafe_b64encode(json.dumps({"exp": int(time.time()) + 3600}).encode()).decode()
        return api_pb2.AuthTokenGetResponse(token=f"x.{part.rstrip('=')}.x")

    def _AppGetByDeploymentName(self, request: Any) -> Any:
        known = request.name in self.deployed
        return api_pb2.AppGetByDeploymentNameResponse(app_id=f"ap-{request.name}" if known else "")

    def _AppCreate(self, _request: Any) -> Any:
        return api_pb2.AppCreateResponse(app_id="ap-1", app_page_url="https://modal.example/ap-1")

    def _AppGetOrCreate(self, request: Any) -> Any:
        return api_pb2.AppGetOrCreateResponse(app_id=f"ap-{request.app_name}")

    def _AppPublish(self, request: Any) -> Any:
        self.deployed.add(request.name)
        return api_pb2.AppPublishResponse(url="https://modal.example/ap-1")

    def _EnvironmentGetOrCreate(self, _request: Any) -> Any:
        metadata = api_pb2.EnvironmentMetadata(
            name="main", settings=api_pb2.EnvironmentSettings(image_builder_version="2025.06")
        )
        return api_pb2.EnvironmentGetOrCreateResponse(environment_id="en-1", metadata=metadata)

    def _ImageGetOrCreate(self, request: Any) -> Any:
        name = hashlib.sha256(request.image.SerializeToString()).hexdigest()[:12]
        done = api_pb2.GenericResult(status=api_pb2.GenericResult.GENERIC_STATUS_SUCCESS)
        return api_pb2.ImageGetOrCreateResponse(
            image_id=f"im-{name}", result=done, metadata=api_pb2.ImageMetadata(image_builder_version="2025.06")
        )

    def _MountPutFile(self, _request: Any) -> Any:
        return api_pb2.MountPutFileResponse(exists=True)

    def _MountGetOrCreate(self, request: Any) -> Any:
        return api_pb2.MountGetOrCreateResponse(mount_id=f"mo-{request.deployment_name or len(request.files)}")

    def _SecretGetOrCreate(self, _request: Any) -> Any:
        return api_pb2.SecretGetOrCreateResponse(secret_id=f"st-{len(self.asked['SecretGetOrCreate'])}")

    def _VolumeGetOrCreate(self, request: Any) -> Any:
        metadata = api_pb2.VolumeMetadata(name=request.deployment_name)
        return api_pb2.VolumeGetOrCreateResponse(volume_id=f"vo-{request.deployment_name}", metadata=metadata)

    def _VolumeListFiles(self, request: Any) -> Any:
        prefix = request.path.strip("/") + "/"
        found = sorted(path for path in self.files[request.volume_id] if path.startswith(prefix))
        if not found:
            raise grpclib.GRPCError(grpclib.Status.NOT_FOUND, "no such folder")
        entries = [api_pb2.FileEntry(path=path, type=api_pb2.FileEntry.FILE) for path in found]
        return [api_pb2.VolumeListFilesResponse(entries=entries)]

    def _VolumePutFiles(self, request: Any) -> None:
        self.files[request.volume_id] |= {file.filename.strip("/") for file in request.files}

    def _FunctionPrecreate(self, request: Any) -> Any:
        return api_pb2.FunctionPrecreateResponse(function_id=f"fu-{request.function_name}")

    def _FunctionCreate(self, request: Any) -> Any:
        name = request.function.function_name
        return api_pb2.FunctionCreateResponse(
            function_id=f"fu-{name}",
            function=request.function,
            function_data=_data(request.function),
            handle_metadata=api_pb2.FunctionHandleMetadata(function_name=name),
        )

    def _FunctionGet(self, request: Any) -> Any:
        if request.app_name not in self.deployed:
            raise grpclib.GRPCError(grpclib.Status.NOT_FOUND, f"no App {request.app_name}")
        metadata = api_pb2.FunctionHandleMetadata(
            function_name=request.object_tag, _experimental_flash_urls=[self.address]
        )
        function = api_pb2.Function(function_name=request.object_tag, is_server=True)
        return api_pb2.FunctionGetResponse(
            function_id=f"fu-{request.object_tag}", handle_metadata=metadata, function=_data(function)
        )


def _data(function: Any) -> Any:
    """A function in the form in which Modal describes it."""
    ranked = api_pb2.FunctionData.RankedFunction(rank=0, function=function)
    return api_pb2.FunctionData(
        function_name=function.function_name,
        is_server=function.is_server,
        is_class=function.is_class,
        http_config=function.http_config,
        ranked_functions=[ranked],
    )


def _kinds() -> dict[str, Handler]:
    """All calls that Modal's client knows, by path, each with the types of question and answer."""
    methods = dict.fromkeys(ModalClientBase.__abstractmethods__)
    known: Any = type("Known", (ModalClientBase,), methods)  # only asked for its mapping
    kinds: dict[str, Handler] = known().__mapping__()
    return kinds


@contextlib.contextmanager
def control_plane() -> Iterator[ControlPlane]:
    """The stand-in, listening while this context is open."""
    plane = ControlPlane()
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    ready, loop = threading.Event(), asyncio.new_event_loop()

    async def serve() -> Server:
        server = Server([plane])
        await server.start(sock=listener)
        plane.url = f"http://127.0.0.1:{port}"
        ready.set()
        return server

    def run() -> None:
        server = loop.run_until_complete(serve())
        loop.run_forever()
        server.close()
        loop.run_until_complete(server.wait_closed())
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(10)
    try:
        yield plane
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def environment(plane: ControlPlane, home: Path) -> dict[str, str]:
    """What lets the real client talk to the stand-in."""
    return {**TOKEN, "MODAL_SERVER_URL": plane.url, "MODAL_CONFIG_PATH": str(home / "modal.toml")}
