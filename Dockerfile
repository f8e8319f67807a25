# syntax=docker/dockerfile:1
# For GPUs:          docker build --tag globallocal .
# For CPUs alone:    docker build --tag globallocal:cpu --build-arg DEVICE=cpu --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
# MLflow's server:   docker build --tag globallocal-tracking --target tracking .
ARG DEVICE=cuda
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm
ARG CUDA_IMAGE=nvidia/cuda:13.0.2-devel-ubuntu24.04

# The CUDA compiler, of the major version that torch was built for; nothing where the CPU is enough.
FROM ${CUDA_IMAGE} AS toolkit-cuda
FROM busybox:1.37.0 AS toolkit-cpu
RUN mkdir -p /usr/local/cuda
# hadolint ignore=DL3006
FROM toolkit-${DEVICE} AS toolkit

FROM ${PYTHON_IMAGE} AS build
ARG DEVICE
ARG TORCH_INDEX=
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# Debian's own versions, which its stable release keeps.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY --from=toolkit /usr/local/cuda /usr/local/cuda
ENV CUDA_HOME=/usr/local/cuda PATH=/opt/venv/bin:/usr/local/cuda/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/venv
WORKDIR /opt/globallocal
COPY requirements.lock ./
# Everything is pinned by the lock; the development tools in it are not installed.
RUN pip install --constraint requirements.lock ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch numpy ninja setuptools==80.9.0 wheel==0.45.1 packaging psutil py-cpuinfo
# DeepSpeed's operators, compiled once, for the processor that builds: build on a machine like those that train.
RUN case "$DEVICE" in cpu) export DS_ACCELERATOR=cpu ;; cuda) export DS_BUILD_FUSED_ADAM=1 TORCH_CUDA_ARCH_LIST="8.0;9.0;10.0" ;; esac && \
    DS_BUILD_CPU_ADAM=1 pip install --constraint requirements.lock --no-build-isolation deepspeed
COPY . .
RUN pip install --constraint requirements.lock --editable '.[s3,sample]'

FROM ${PYTHON_IMAGE} AS tracking
COPY requirements.lock /tmp/requirements.lock
RUN pip install --no-cache-dir --constraint /tmp/requirements.lock mlflow psycopg2-binary boto3
USER 1000
WORKDIR /tmp
EXPOSE 5000
HEALTHCHECK --interval=30s --timeout=10s CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:5000/health', timeout=5)"]
CMD ["mlflow", "server", "--host", "0.0.0.0", "--port", "5000"]

FROM ${PYTHON_IMAGE} AS runtime
ARG DEVICE
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# libgomp: DeepSpeed's Adam on the processor; pdsh and ssh: several hosts.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends libgomp1 openssh-client openssh-server pdsh && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 trainer && mkdir -p /opt/globallocal /data && chown trainer /opt/globallocal /data
COPY --from=build /opt/venv /opt/venv
COPY --from=build --chown=trainer /opt/globallocal /opt/globallocal
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PDSH_RCMD_TYPE=ssh DEVICE=${DEVICE}
USER 1000
WORKDIR /opt/globallocal
RUN globallocal doctor --local
HEALTHCHECK --interval=5m --timeout=2m --start-period=2m CMD ["globallocal", "doctor", "--local"]
CMD ["globallocal", "--help"]
