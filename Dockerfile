# The first stage installs what requirements.lock names, and nothing whose hash it does not know;
# the second holds Python and the virtual environment. Nothing is fetched once it runs.
#
# The lock is of linux/amd64 (torch with its CUDA libraries): docker build --platform linux/amd64 .
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm@sha256:65a93d69fa75478d554f4ad27c85c1e69fa184956261b4301ebaf6dbb0a3543d

FROM ${PYTHON_IMAGE} AS builder
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_NO_INPUT=1 \
    PIP_PYTHON=/opt/deltawatch/bin/python
# Without pip: in the image it would have nothing to do.
RUN python -m venv --without-pip /opt/deltawatch
COPY requirements.lock /src/
RUN pip install --require-hashes --only-binary=:all: --requirement /src/requirements.lock
COPY setup.py pyproject.toml LICENSE /src/
COPY schemas /src/schemas
COPY transforms /src/transforms
COPY pipeline /src/pipeline
# The lock's setuptools builds it: neither an index nor anything unlocked is asked for.
RUN pip install --no-index --no-deps --no-build-isolation /src

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title=deltawatch \
      org.opencontainers.image.licenses=Apache-2.0
RUN groupadd --gid 10001 deltawatch \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin \
       deltawatch
COPY --from=builder /opt/deltawatch /opt/deltawatch
# HF_*: a model is what is on disk, never a download.
ENV PATH=/opt/deltawatch/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/tmp \
    HF_HOME=/tmp/huggingface \
    HF_HUB_DISABLE_TELEMETRY=1 \
    HF_HUB_OFFLINE=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    TRANSFORMERS_OFFLINE=1
USER 10001:10001
WORKDIR /tmp
# Without a shell, so that SIGTERM reaches it. As process 1 it is deaf to a second one: give
# `docker run` --init, a pod shareProcessNamespace.
ENTRYPOINT ["deltawatch"]
CMD ["--help"]
