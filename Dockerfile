# syntax=docker/dockerfile:1
# docker build -t pdserve .                        CPU
# docker build -t pdserve --build-arg CUDA=13 .    torch, UCX, NIXL and FlashInfer for CUDA 13 (12 likewise)
# FlashInfer compiles its kernels at the first call: mount a CUDA toolkit and set CUDA_HOME, or attention is torch's.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS build
ARG CUDA=""
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
RUN python -m venv /opt/pdserve
ENV PATH=/opt/pdserve/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY requirements/serve.txt requirements/gpu.txt requirements/nixl.txt requirements/
# torch first and alone: its index has the builds by device, and nothing after it may bring another version.
RUN case "$CUDA" in "") index=cpu ;; 12) index=cu126 ;; *) index=cu130 ;; esac; \
    pip install "$(grep '^torch==' requirements/serve.txt)" --index-url "https://download.pytorch.org/whl/$index" \
      --extra-index-url https://pypi.org/simple; \
    major="${CUDA:-12}"; \
    sed -E "s/-cu12==/-cu$major==/; /^torch==/d" requirements/serve.txt > serve.txt; \
    if [ "$major" != 12 ]; then sed -i '/^cuda-/d' serve.txt; fi; \
    pip install -r serve.txt; \
    if [ -n "$CUDA" ]; then \
      sed "s/-cu12==/-cu$major==/" requirements/nixl.txt > nixl.txt; \
      pip install --no-deps -r requirements/gpu.txt -r nixl.txt "ninja==1.13.2"; \
    fi
COPY pyproject.toml README.md LICENSE ./
COPY kvstore kvstore
COPY pdserve pdserve
COPY router router
RUN pip install --no-deps .

FROM python:${PYTHON}-slim-bookworm
# The kernels are compiled for the processor that they run on, at the first start.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin pdserve
COPY --from=build /opt/pdserve /opt/pdserve
ENV PATH=/opt/pdserve/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
ENTRYPOINT ["pdserve"]
CMD ["--help"]
