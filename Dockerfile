# The app in a container: page, HTTP service, decoder in C and the model itself; no torch, no MLflow, no compiler.
#
#     docker build -t write-me-a-story .
#     docker run --rm --init -p 7860:7860 --read-only --tmpfs /tmp -v stories:/var/lib/write-me-a-story write-me-a-story
#
# The first stage builds and slims, the second one copies three folders out of it, rarely changed ones first: to update,
# a machine that has an earlier release fetches only the last two layers, some 32 MB packed.

FROM python:3.12-slim AS build

RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

ENV PIP_CACHE_DIR=/var/cache/pip \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /src

# What the app imports, without the app, so that this layer is made again only when these two files change.
COPY pyproject.toml constraints.txt ./
RUN --mount=type=cache,target=/var/cache/pip \
    python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; print( \
        *project['dependencies'], *project['optional-dependencies']['postgres'], sep='\n')" > /tmp/requirements.txt \
    && python -m venv --without-pip /opt/story/venv \
    && python -m pip --python /opt/story/venv/bin/python install --no-compile \
        -r /tmp/requirements.txt -c constraints.txt \
    && echo /opt/story/app > /opt/story/venv/lib/python3.12/site-packages/story-app.pth
COPY deploy/image/slim.sh deploy/image/
RUN sh deploy/image/slim.sh /opt/story/venv/lib/python3.12/site-packages \
    && /opt/story/venv/bin/python -c "import psycopg; psycopg.pq.version()"

# The app. Its decoder in C chooses its instructions when it runs, so one build serves every x86-64 processor.
COPY README.md LICENSE setup.py story.py ./
COPY model model
COPY training training
COPY experiments experiments
COPY demo demo
COPY deploy deploy
RUN --mount=type=cache,target=/var/cache/pip \
    python -m pip install --no-compile setuptools -c constraints.txt \
    && python -m pip wheel --no-build-isolation --no-deps --wheel-dir /tmp/wheel . \
    && python -m pip --python /opt/story/venv/bin/python install --no-compile --no-deps \
        --target /opt/story/app /tmp/wheel/*.whl \
    && ls /opt/story/app/model/runtimes/native/_native*.so

# The app must generate a story here, or the build fails.
RUN PATH="/opt/story/app/bin:/opt/story/venv/bin:$PATH" \
    PYTHONPYCACHEPREFIX=/opt/story/bytecode HOME=/tmp GRADIO_TEMP_DIR=/tmp/gradio STAGE=PROD \
    python deploy/image/warm.py story demo --host 127.0.0.1


FROM python:3.12-slim

LABEL org.opencontainers.image.title="write-me-a-story" \
      org.opencontainers.image.description="A small language model that writes small stories, with its page and API" \
      org.opencontainers.image.licenses="Apache-2.0"

# All that is ever written lies in /tmp, which may be a tmpfs, or in /var/lib/write-me-a-story, which may be a volume.
RUN groupadd --gid 10001 story \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin story \
    && install -d -o story -g story -m 0750 /var/lib/write-me-a-story

COPY --from=build /opt/story/venv /opt/story/venv
COPY --from=build /opt/story/app /opt/story/app
COPY --from=build /opt/story/bytecode /opt/story/bytecode

# One thread for each library: the decoder is faster with one, and the container may have one core.
ENV PATH=/opt/story/app/bin:/opt/story/venv/bin:/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONPYCACHEPREFIX=/opt/story/bytecode \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    OPENBLAS_NUM_THREADS=1 \
    GRADIO_ANALYTICS_ENABLED=False \
    HF_HUB_OFFLINE=1 \
    ORT_DISABLE_TELEMETRY=1 \
    HOME=/tmp \
    GRADIO_TEMP_DIR=/tmp/gradio \
    XDG_CACHE_HOME=/var/lib/write-me-a-story/cache \
    XDG_STATE_HOME=/var/lib \
    STAGE=PROD

USER 10001:10001
WORKDIR /var/lib/write-me-a-story
EXPOSE 7860
HEALTHCHECK --interval=15s --timeout=5s --start-period=20s --retries=3 \
    CMD ["python", "/opt/story/app/deploy/image/healthy.py"]
CMD ["story", "demo", "--host", "0.0.0.0"]
