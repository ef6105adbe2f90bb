# The workshop: torch, MONAI and the appliance, to search, retrain, evaluate and publish. Research use only.
#   docker build -f docker/search.Dockerfile -t dints-deploy-search .
#   docker run --rm --gpus all -v "$PWD:/work" dints-deploy-search search --task 4 --data Task04_Hippocampus --out runs/a
# TORCH_INDEX: where another build of torch comes from, for example one without CUDA.
ARG BASE=debian:bookworm-slim

FROM ${BASE} AS python
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 libgomp1 \
 && rm -rf /var/lib/apt/lists/* /var/cache/* /var/log/*

FROM python AS requirements
WORKDIR /build
COPY pyproject.toml docker/requirements.py ./
RUN python3 requirements.py pyproject.toml cpu search > requirements.txt

# torch first, by its exact version: the largest layer, which changes least.
FROM python AS dependencies
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3-venv ca-certificates \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY constraints.txt ./
ARG TORCH_INDEX=
RUN --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=secret,id=ca,target=/run/ca.pem \
    python3 -m venv /opt/dints-deploy \
 && /opt/dints-deploy/bin/pip install --no-cache-dir --no-compile --disable-pip-version-check \
      ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$(grep '^torch==' constraints.txt)"
COPY --from=requirements /build/requirements.txt ./
RUN --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=secret,id=ca,target=/run/ca.pem \
    /opt/dints-deploy/bin/pip install --no-cache-dir --no-compile --disable-pip-version-check \
      -c constraints.txt -r requirements.txt

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
      --prefix /layer/opt/dints-deploy /wheels/dints_deploy-*.whl

FROM python AS search
RUN groupadd --gid 10001 dints-deploy \
 && useradd --uid 10001 --gid 10001 --create-home --shell /usr/sbin/nologin dints-deploy \
 && install -d -o dints-deploy -g dints-deploy /work
COPY --from=dependencies /opt/dints-deploy /opt/dints-deploy
COPY --from=application /layer /
ENV PATH=/opt/dints-deploy/bin:/usr/bin:/bin \
    PYTHONUNBUFFERED=1 \
    MPLCONFIGDIR=/tmp/matplotlib
USER 10001:10001
WORKDIR /work
ENTRYPOINT ["dints-deploy"]
CMD ["--help"]
# Last, as they change with every commit.
ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.title="dints-deploy-search" \
      org.opencontainers.image.description="Search, retrain and publish 3-D segmentation networks with DiNTS. Research use only: not a medical device." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
