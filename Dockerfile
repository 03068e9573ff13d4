# Targets: cpu (what `docker build .` makes), loadtests, cuda. docs/deploy.md says how to build them.
# Older builders build everything that stands before a target, so the small one comes first.
FROM debian:bookworm-slim AS python
# Debian's Python 3.11. openssl makes the certificates of a Ray cluster's nodes.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends openssl python3 \
    && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/headroom/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1

FROM python AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PIP_REQUIRE_HASHES=1 PIP_ONLY_BINARY=:all:
COPY deploy/docker/tools.lock /build/
RUN python3 -m venv /opt/tools \
    && /opt/tools/bin/pip install --requirement /build/tools.lock \
    && python3 -m venv /opt/headroom

FROM build AS build-cpu
# Where pip finds the CPU build of torch, if not by its own settings.
ARG PIP_EXTRA_INDEX_URL
COPY deploy/docker/cpu.lock /build/
RUN pip install --requirement /build/cpu.lock
COPY . /build
RUN /build/deploy/docker/install.sh

FROM python AS runtime
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="headroom" \
    org.opencontainers.image.description="Serves decoder transformers over gRPC with the head configuration as a first-class choice" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="$VERSION" \
    org.opencontainers.image.revision="$REVISION"
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin headroom
# The root may be read-only; what is written at run time goes to /tmp.
ENV HOME=/tmp
USER 10001:10001
WORKDIR /tmp
# gRPC, HTTP health of Ray Serve, metrics
EXPOSE 9000 8000 9464
STOPSIGNAL SIGTERM
# Starting Python for it takes a second of a core.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 CMD ["headroom", "health"]
ENTRYPOINT ["headroom"]
CMD ["serve"]

FROM runtime AS cpu
COPY --from=build-cpu /opt/headroom /opt/headroom

FROM build AS build-loadtests
# Where pip finds the CPU build of torch, if not by its own settings.
ARG PIP_EXTRA_INDEX_URL
COPY deploy/docker/loadtests.lock /build/
RUN pip install --requirement /build/loadtests.lock
COPY . /build
RUN /build/deploy/docker/install.sh

FROM runtime AS loadtests
COPY --from=build-loadtests /opt/headroom /opt/headroom
HEALTHCHECK NONE
ENTRYPOINT []
CMD ["locust", "-f", "/opt/headroom/lib/python3.11/site-packages/loadtests/locustfile.py", "--host", "127.0.0.1:9000"]

FROM build AS build-cuda
COPY deploy/docker/cuda.lock /build/
RUN pip install --requirement /build/cuda.lock
COPY . /build
RUN /build/deploy/docker/install.sh

FROM runtime AS cuda
# Triton compiles its driver when the first kernel starts.
USER 0:0
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/*
USER 10001:10001
COPY --from=build-cuda /opt/headroom /opt/headroom

FROM cpu
