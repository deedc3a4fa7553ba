"""The project on Modal's machines: the story service on a GPU, training on a GPU, and the page for a team.

    story deploy deploy                                  # the service, with upload, warm-up and check
    modal run deploy/modal_app.py::train --preset small   # a training run
    modal deploy -m deploy.modal_app::workshop            # the page, under an address that stays

Read it from top to bottom. Nothing here computes: the containers run the same service, engine and commands as any
other machine. This file says on which machines, from which image, and how many.
"""

import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import modal

from deploy.release.container import Container
from deploy.release.platforms import MODELS, SERVER, app_name
from model.architecture.folder import PRETRAINED
from model.settings import load_settings

MINUTES = 60  # seconds
HOURS = 60 * MINUTES

# ## Two deployments of one file
#
# Blue and green are two Apps of the same code. An App is what `modal deploy` replaces, rolls back and stops as a
# whole, so with one App for each deployment nothing that is done to one can touch the other. Which of the two is
# meant, and which model it serves, comes from the environment: `story deploy` sets both variables. Modal imports this
# file again inside the container, so the container gets the same two variables.

settings = load_settings()
DEPLOYMENT = settings.story_deployment
REVISION = settings.story_revision or (PRETRAINED / "digest").read_text("ascii").strip()

app = modal.App(app_name(DEPLOYMENT))

# Training and the page belong to no deployment. They have an App of their own, which a switch never restarts.

workshop = modal.App("write-me-a-story")

# ## Images
#
# Every version is the tested one: `constraints.txt` goes into a layer of its own and constrains all packages that are
# installed after it, dependencies included. The service gets only what it imports: no Gradio, no MLflow, no ONNX. Our
# own source comes last and is mounted, not built in, so a change of code rebuilds nothing.

ROOT = Path(__file__).resolve().parents[1]
PYTHON = "3.11"  # the version that the constraints were resolved for
UV = "0.9.7"
SERVING = (
    "fastapi",
    "httpx",
    "limits",
    "numpy",
    "onnxruntime",  # model.engine.load imports it beside the GPU runtime
    "prometheus-client",
    "pydantic",
    "python-json-logger",
    "python-socketio",
    "safetensors",
    "tokenizers",
    "torch",
    "uvicorn",
)


def needs(*extras: str) -> list[str]:
    """The requirements in pyproject.toml, with these extras. Empty in a container, whose image exists already."""
    if not modal.is_local():
        return []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    optional = (line for extra in extras for line in project["optional-dependencies"][extra])
    return [*project["dependencies"], *optional]


def image_with(*packages: str) -> modal.Image:
    """A slim Debian with these packages, at the versions of constraints.txt."""
    return (
        modal.Image.debian_slim(python_version=PYTHON)
        .add_local_file(ROOT / "constraints.txt", "/constraints.txt", copy=True)
        .uv_pip_install(*packages, uv_version=UV, extra_options="-c /constraints.txt")
        .env({"ORT_DISABLE_TELEMETRY": "1", "GRADIO_ANALYTICS_ENABLED": "False"})
    )


BYTECODE = ["**/__pycache__", "**/*.pyc"]


def with_data(image: modal.Image) -> modal.Image:
    """The image with our packages and their data files, which page and training need.

    By default only `.py` files are mounted, and so it stays for `deploy`, below which compose keeps its passwords.
    """
    packages = ("model", "training", "experiments", "demo")
    return image.add_local_python_source("deploy", "story").add_local_python_source(*packages, ignore=BYTECODE)


serving_image = image_with(*SERVING).add_local_python_source("model", "deploy")
page_image = with_data(image_with(*needs()))
# torch.compile builds a launcher for its kernels when it first runs; Modal's Debian brings the compiler for that.
training_image = with_data(image_with(*needs("train")))

# ## Weights
#
# A model folder is uploaded once, under its digest, and never changed (`story deploy upload`). A container mounts
# that one folder, read-only: it can neither see another version nor change this one. Both deployments share a Volume.

WEIGHTS = "/weights"

models = modal.Volume.from_name(MODELS, create_if_missing=True)
weights = models.with_mount_options(read_only=True, sub_path=f"/{REVISION}")

# ## The service
#
# Why `@app.server` and not `@modal.asgi_app`: with `asgi_app` each request is an input of a Function. It passes
# through Modal's input queue, every chunk of the response is carried back as a message, and a concurrency limit makes
# further clients wait silently in that queue. A server is reached directly: each event leaves when its token exists, a
# client that disconnects closes a real connection and so frees a slot, a full container returns 429 at once, and
# running requests get a grace period to finish in (up to an hour, against 30 seconds of an exit handler). It also
# requires a proxy token by default, which is what we want.
#
# The numbers follow from the engine. One step costs a GPU about the same for 1 sequence as for 64, so there are many
# slots; the autoscaler aims below that, so that a new container starts before requests queue; and the hard limit is
# slots plus the engine's own queue: requests beyond it go to another container.

SLOTS = 64  # sequences decoded at once in one container
QUEUE = 16  # requests that may wait in it; short, because another container is better than a long queue
TARGET = 48  # requests per container that the autoscaler aims at
LIMIT = SLOTS + QUEUE  # requests per container, at most
PORT = 8000
DRAIN = 30  # seconds in which running requests may finish when a container stops
GRACE = DRAIN + 15  # seconds before Modal kills it: longer than the drain, or the drain would be cut short
IDLE = 5 * MINUTES  # a container without requests stops after this long, and costs nothing from then on
MOST = 4  # containers of one deployment; a bound on what a busy day can cost


@app.server(
    image=serving_image,
    gpu=settings.story_gpu,
    cpu=2.0,
    memory=4096,  # MiB; torch and its CUDA libraries take most of it, the model 20
    volumes={WEIGHTS: weights},
    env={"STAGE": "PROD", "STORY_DEPLOYMENT": DEPLOYMENT, "STORY_REVISION": REVISION, "STORY_GPU": settings.story_gpu},
    port=PORT,
    target_concurrency=TARGET,
    max_concurrency=LIMIT,
    min_containers=0,
    max_containers=MOST,
    scaledown_window=IDLE,
    startup_timeout=5 * MINUTES,  # the first start of a version makes the snapshot, which takes longer
    exit_grace_period=GRACE,
    name=SERVER,
    unauthenticated=False,  # the default, made explicit: a request needs Modal-Key and Modal-Secret
    enable_memory_snapshot=True,
)
class Story:
    """The story service of one deployment."""

    @modal.enter(snap=True)
    def prepare(self) -> None:
        """Before the snapshot, where there is no GPU yet: import torch and the service, verify the weights.

        A cold start spends its seconds on imports, which the snapshot saves. The weights are 20 MB and are read
        after it: saving those milliseconds would mean moving tensors between devices.
        """
        self.container = Container(
            folder=Path(WEIGHTS), revision=REVISION, name=DEPLOYMENT, slots=SLOTS, queue=QUEUE, drain=DRAIN
        )
        self.container.prepare()

    @modal.enter()
    def listen(self) -> None:
        """After the snapshot: weights to the GPU, the step captured for replay, and the port opens."""
        self.container.listen("0.0.0.0", PORT)

    @modal.exit()
    def end(self) -> None:
        """Refuse new requests, drain, close."""
        self.container.close()


# ## Smoke test
#
# `modal run -m deploy.modal_app::smoke` generates one story on what is deployed as STORY_DEPLOYMENT, through the public
# address and with the proxy token, like any client. `story deploy smoke` measures more.


@app.local_entrypoint()
def smoke(prompt: str = "Once upon a time, a robot found a seed.") -> None:
    """Generate one story on the deployed endpoint and print it."""
    import httpx

    from model.serving.remote.client import proxy_auth

    url = modal.Server.from_name(app_name(DEPLOYMENT), SERVER).get_url()
    request = {"prompt": prompt, "max_tokens": 200}
    answer = httpx.post(f"{url}/v1/completions", json=request, headers=proxy_auth(settings), timeout=5 * MINUTES)
    print(prompt + answer.raise_for_status().json()["choices"][0]["text"])


# ## Training
#
# A run is the same `story train` as on any machine, in a process of its own that can be asked to save and stop. State
# lies on a Volume. Machines may be preempted at any time: then Modal starts the function again, and it resumes exactly
# at the last checkpoint. Committing the Volume makes a checkpoint durable and visible outside; that happens every few
# minutes, and once more when the container stops.

RUNS = "write-me-a-story-runs"
RUNS_AT = "/runs"
SOURCE_AT = "/root"  # where Modal puts the source of the image
COMMIT_EVERY = 2 * MINUTES  # at most so much work is repeated after a preemption
STOP_WITHIN = 25  # seconds that `story train` gets to write its last checkpoint; Modal gives 30 in all

runs = modal.Volume.from_name(RUNS, create_if_missing=True)


def tracking() -> dict[str, str | None]:
    """MLflow's settings as they are here; a store that is a local file becomes one on the Volume."""
    chosen: dict[str, str | None] = {k: v for k, v in os.environ.items() if k.startswith("MLFLOW_")}
    if settings.mlflow_tracking_uri.startswith(("sqlite:", "file:", "/", ".")):
        chosen["MLFLOW_TRACKING_URI"] = f"sqlite:///{RUNS_AT}/mlflow.db"
    return chosen


@workshop.function(
    image=training_image,
    gpu=settings.story_gpu,
    cpu=4.0,
    memory=16_384,  # MiB; reading and cleaning the corpus takes more than training on it
    volumes={RUNS_AT: runs},
    secrets=[modal.Secret.from_dict(tracking())],
    timeout=24 * HOURS,  # the most that Modal allows for one attempt
    retries=modal.Retries(max_retries=10, initial_delay=5.0, backoff_coefficient=1.0),
    single_use_containers=True,  # an attempt after a failure gets a clean machine
)
def train(
    preset: str = "small", name: str = "story", data: str = "tinystories", minutes: float = 0.0, fields: str = ""
) -> int:
    """Train `preset` as run `name` (resumed if there is one) on the shards `data`, prepared if missing.

    `minutes` bounds the whole run, 0 leaves that to the recipe; `fields` changes some of the recipe's fields:
    `"steps=2000 rows=32"`.
    """
    out, shards = Path(RUNS_AT) / name, Path(RUNS_AT) / "data" / data
    make_shards(shards)
    arguments = ["--preset", preset, "--data", str(shards), "--out", str(out), *fields.split()]
    if minutes:
        arguments += ["--minutes", str(minutes)]
    if any((out / kept / "config.json").is_file() for kept in ("last", "last.old")):
        arguments.append("--resume")
    return run_story("train", *arguments)


def make_shards(shards: Path) -> None:
    """Make token shards of TinyStories where there are none."""
    if not (shards / "train.bin").exists():
        run_story("data", "--download", "--out", str(shards))


@workshop.function(image=training_image, cpu=4.0, memory=16_384, volumes={RUNS_AT: runs}, timeout=2 * HOURS)
def prepare(data: str = "tinystories") -> None:
    """Make the shards that `train` makes when they are missing; the trials of a sweep find them made."""
    make_shards(Path(RUNS_AT) / "data" / data)


# ## A sweep
#
# `story sweep NAME --on modal --workers 8` calls this Function once for each trial, eight at once. The study stays with
# the caller; the trial reports to it on a Queue and learns there whether to go on. Modal restarts a preempted
# container, which resumes from the last checkpoint on the Volume.


@workshop.function(
    image=training_image,
    gpu=settings.story_gpu,
    cpu=2.0,
    memory=8192,  # MiB; the corpus is prepared
    volumes={RUNS_AT: runs},
    timeout=6 * HOURS,
    max_containers=32,  # a bound on what a mistyped number of workers can cost
    scaledown_window=2 * MINUTES,  # the next trial finds it warm, with torch imported
)
def sweep_trial(job: dict[str, Any], wire: modal.Queue) -> None:
    """Train one trial of a sweep; `experiments.sweep.remote` calls it."""
    from experiments.sweep.remote import train_remotely

    runs.reload()
    train_remotely(job, wire, Path(RUNS_AT), runs.commit)


def run_story(*arguments: str) -> int:
    """Run a `story` command to its end, committing the Volume meanwhile. Raises `CalledProcessError` if it fails."""
    process = subprocess.Popen([sys.executable, "-m", "story", *arguments], cwd=SOURCE_AT)
    committed = time.monotonic()
    try:
        while process.poll() is None:
            time.sleep(1)
            if time.monotonic() - committed > COMMIT_EVERY:
                runs.commit()
                committed = time.monotonic()
    finally:
        if process.poll() is None:  # this container is being stopped
            process.send_signal(signal.SIGTERM)
            process.wait(STOP_WITHIN)
        runs.commit()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return process.returncode


# ## The page, for a team
#
# Gradio keeps a session in one process, so there is one container, which serves many users at once: they wait for the
# GPU elsewhere, not for this machine. It is public to everyone who has the address, as a browser cannot send a proxy
# token. The settings that it needs (USE_MODAL, MODAL_ENDPOINT_URL, MODAL_KEY, MODAL_SECRET, REDIS_URL) are taken from
# the environment of whoever deploys it. With REDIS_URL it follows each switch; without, it stays with
# MODAL_ENDPOINT_URL. While Modal's GPU is asleep, its own embedded model generates.

USERS = 100  # pages open at once


def page_settings() -> dict[str, str | None]:
    """The settings of this environment that the page needs."""
    names = ("USE_MODAL", "MODAL_ENDPOINT_URL", "MODAL_KEY", "MODAL_SECRET", "REDIS_URL")
    return {name: os.environ[name] for name in names if os.environ.get(name)}


@workshop.function(
    image=page_image,
    cpu=2.0,
    memory=2048,  # MiB
    secrets=[modal.Secret.from_dict({"STAGE": "PROD", **page_settings()})],
    timeout=1 * HOURS,  # a page holds one connection open for as long as it is on a screen
    min_containers=0,
    max_containers=1,
    scaledown_window=20 * MINUTES,
)
@modal.concurrent(max_inputs=USERS)
@modal.asgi_app(label="write-me-a-story")
def page() -> Any:
    """The Gradio page, under https://WORKSPACE--write-me-a-story.modal.run."""
    from demo.asgi import create_app

    return create_app()
