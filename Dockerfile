# diffjax in a container. For a CPU, and for NVIDIA GPUs (the host needs a driver and the NVIDIA container toolkit):
#   docker build --tag diffjax .
#   docker build --tag diffjax:cuda --build-arg EXTRAS=emoji,cuda .
# docs/install.md says how to run it.
FROM python:3.12-slim-bookworm

ARG EXTRAS=emoji

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    DIFFJAX_HOME=/cache

WORKDIR /source
COPY pyproject.toml setup.py requirements.lock LICENSE ./
COPY diffjax diffjax
COPY experiments experiments
RUN python -m pip install --constraint requirements.lock ".[${EXTRAS}]" \
    && useradd --uid 1000 --no-create-home diffjax \
    && mkdir -m 1777 /cache /work

USER diffjax
WORKDIR /work
ENTRYPOINT ["diffjax"]
CMD ["--help"]
