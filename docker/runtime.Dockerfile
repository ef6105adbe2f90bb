# The appliance on a CPU: OpenVINO and ONNX Runtime, no torch, no compiler, no pip. Research use only.
#   docker build -f docker/runtime.Dockerfile -t dints-deploy .
# Behind a proxy with an index or an authority of its own: --secret id=pip,src=pip.conf --secret id=ca,src=ca.pem
ARG BASE=debian:bookworm-slim

FROM ${BASE} AS python
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 \
 && rm -rf /var/lib/apt/lists/* /var/cache/* /var/log/*

FROM python AS requirements
WORKDIR /build
COPY pyproject.toml docker/requirements.py ./
RUN python3 requirements.py pyproject.toml cpu > requirements.txt

# What the appliance needs: this layer changes with the locked versions only.
FROM python AS dependencies
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3-venv ca-certificates \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY --from=requirements /build/requirements.txt ./
COPY constraints.txt ./
RUN --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=secret,id=ca,target=/run/ca.pem \
    python3 -m venv /opt/dints-deploy \
 && /opt/dints-deploy/bin/pip install --no-cache-dir --no-compile --disable-pip-version-check \
      -c constraints.txt -r requirements.txt
COPY docker/trim.sh ./
RUN sh trim.sh /opt/dints-deploy

# Our own code and zoo, laid out below /layer as they will lie below /.
FROM dependencies AS application
RUN --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=secret,id=ca,target=/run/ca.pem \
    python3 -m venv /tools && /tools/bin/pip install --no-cache-dir --disable-pip-version-check \
      -c constraints.txt hatchling
COPY pyproject.toml CHANGELOG.md README.md LICENSE ./
COPY dints_deploy dints_deploy
COPY search search
COPY zoo zoo
RUN /tools/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
 && /tools/bin/pip --python /opt/dints-deploy/bin/python install --no-deps --no-index --no-compile \
      --prefix /layer/opt/dints-deploy /wheels/dints_deploy-*.whl \
 && /opt/dints-deploy/bin/python -m compileall -q --invalidation-mode unchecked-hash -s /layer /layer/opt/dints-deploy/lib
COPY release release
RUN cp -r /layer/opt / \
 && mkdir -p /layer/usr/share/doc/dints-deploy \
 && python3 -m release.sbom /opt/dints-deploy --dpkg /var/lib/dpkg/status \
      > /layer/usr/share/doc/dints-deploy/sbom.cdx.json \
 && install -m 644 LICENSE CHANGELOG.md /layer/usr/share/doc/dints-deploy/
COPY docker/healthcheck.py /layer/opt/dints-deploy/bin/healthcheck.py

FROM python AS runtime
RUN groupadd --gid 10001 dints-deploy \
 && useradd --uid 10001 --gid 10001 --home-dir /var/lib/dints-deploy --no-create-home --shell /usr/sbin/nologin dints-deploy \
 && install -d -m 700 -o dints-deploy -g dints-deploy /var/lib/dints-deploy \
 && install -d /etc/dints-deploy
COPY --from=dependencies /opt/dints-deploy /opt/dints-deploy
COPY --from=application /layer /
ENV PATH=/opt/dints-deploy/bin:/usr/bin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    DINTS_STATE=/var/lib/dints-deploy/state
USER 10001:10001
WORKDIR /var/lib/dints-deploy
VOLUME /var/lib/dints-deploy
EXPOSE 11112
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=10s --start-period=20s --retries=2 \
  CMD ["/opt/dints-deploy/bin/python", "/opt/dints-deploy/bin/healthcheck.py"]
ENTRYPOINT ["dints-deploy"]
CMD ["watch", "--config", "/etc/dints-deploy/appliance.toml"]
# Last, as they change with every commit.
ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.title="dints-deploy" \
      org.opencontainers.image.description="Clinical inference appliance for 3-D medical image segmentation, on a CPU. Research use only: not a medical device." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
