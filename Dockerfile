# relay in a container (docs/container.md): `docker build -t relay .`, then
#   docker run --rm -p 127.0.0.1:9000:9000 -p 127.0.0.1:9001:9001 -v relay-data:/data relay

# --- the wheel, and the environment it is installed into --------------------------------------------------------
FROM debian:bookworm-slim AS build

# Versions of the compiler and of Python are those of the Debian release named above.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates gcc libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/*

WORKDIR /src
COPY . .
# The environment is made at the path where the second stage has it, and without pip. rich colours source code with
# pygments and shows Markdown with the other two; relay has neither.
RUN python3 -m venv /build \
    && /build/bin/pip wheel --no-cache-dir --wheel-dir /wheels . \
    && python3 -m venv --without-pip /opt/relay \
    && /build/bin/pip --python /opt/relay/bin/python install --no-cache-dir --no-index --find-links /wheels splice-relay \
    && /build/bin/pip --python /opt/relay/bin/python uninstall -y pygments markdown-it-py mdurl \
    && find /opt/relay -name '*.so' -exec strip --strip-unneeded {} +

# --- what runs: no compiler, no pip, no root --------------------------------------------------------------------
FROM debian:bookworm-slim

ARG REVISION=
LABEL org.opencontainers.image.title="relay" \
      org.opencontainers.image.description="Moves streams of bytes to many sockets and files without carrying them" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.documentation="https://pypi.org/project/splice-relay/" \
      org.opencontainers.image.base.name="docker.io/library/debian:bookworm-slim"

# What Python has for other uses is taken out again: its help texts, the converter from Python 2, terminals' menus.
# /data is relay's user's, so that a new volume there is, too; a tmpfs on /sockets is root's, with the mode
# it has here (not under /run, where podman's --read-only puts a tmpfs of its own).
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/*-old /var/log/apt /var/log/dpkg.log \
        /usr/share/doc/* /usr/share/man/* /usr/share/python3/runtime.d \
        /usr/lib/python3.11/pydoc_data /usr/lib/python3.11/lib2to3 /usr/lib/python3.11/distutils \
        /usr/lib/python3.11/ensurepip /usr/lib/python3.11/curses /usr/lib/python3.11/sqlite3 \
    && groupadd --system --gid 10001 relay \
    && useradd --system --uid 10001 --gid 10001 --home-dir /data --shell /usr/sbin/nologin relay \
    && install -d -o 10001 -g 10001 /data \
    && install -d -o 10001 -g 10001 -m 1777 /sockets

COPY --from=build /opt/relay /opt/relay

# Inside a container only 0.0.0.0 can be published; no .pyc is written, since the root may be read-only.
ENV PATH=/opt/relay/bin:$PATH \
    RELAY_BIND=0.0.0.0 \
    RELAY_ADMIN=unix:///sockets/admin.sock \
    PYTHONDONTWRITEBYTECODE=1

USER 10001:10001
VOLUME /data
WORKDIR /data
EXPOSE 9000 9001
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s --retries=3 CMD ["relay", "health"]
ENTRYPOINT ["relay"]
CMD ["serve"]
