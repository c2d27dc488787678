# relay in a container: `docker build -t relay .`, then
#   docker run --rm -p 127.0.0.1:9000:9000 -p 127.0.0.1:9001:9001 -v relay-data:/data relay

# --- the wheel, and the environment it is installed into --------------------------------------------------------
FROM debian:bookworm-slim AS build

# Versions of the compiler and of Python are those of the Debian release named above.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates gcc libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin

WORKDIR /src
COPY . .
# The environment is made at the path where the second stage has it, and without pip.
RUN python3 -m venv /build \
    && /build/bin/pip wheel --no-cache-dir --wheel-dir /wheels . \
    && python3 -m venv --without-pip /opt/relay \
    && /build/bin/pip --python /opt/relay/bin/python install --no-cache-dir --no-index --find-links /wheels splice-relay

# --- what runs: no compiler, no pip, no root --------------------------------------------------------------------
FROM debian:bookworm-slim

LABEL org.opencontainers.image.title="relay" \
      org.opencontainers.image.description="Moves streams of bytes to many sockets and files without carrying them" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0"

# /data is made before VOLUME names it, so that a new volume belongs to relay's user.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin \
    && install -d -o 10001 -g 10001 /data

COPY --from=build /opt/relay /opt/relay

# Inside a container only 0.0.0.0 can be published; no .pyc is written, since the root may be read-only.
ENV PATH=/opt/relay/bin:$PATH \
    RELAY_BIND=0.0.0.0 \
    PYTHONDONTWRITEBYTECODE=1

USER 10001:10001
VOLUME /data
WORKDIR /data
EXPOSE 9000 9001
STOPSIGNAL SIGTERM
ENTRYPOINT ["relay"]
CMD ["serve"]
