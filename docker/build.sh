#!/usr/bin/env bash
# Build images without a Docker engine, on a base made here, and try them for real. Needs root and Debian's packages
# buildah, debootstrap, orthanc and dcmtk.
#
#   docker/build.sh                     the runtime image: build, sizes, labels, a real scan, the daemon and Orthanc
#   docker/build.sh search              the search image: build, size, versions
#   docker/build.sh runtime try         try the image that was built before
#
# RECORD=1    write the figures into benchmarks/results, for docs/images.md; the image is built without its cache
# BASE        an image to build on; without it one is made by debootstrap
# PIP_CONFIG  a pip.conf for the build, CA an authority's certificates (named in it as /run/ca.pem): secrets, not kept
# BUILD_ARGS  more options for buildah
set -euo pipefail
cd "$(dirname "$0")/.."
image=${1:-runtime}
python=${PYTHON:-.venv/bin/python}
base=${BASE:-localhost/debian:bookworm-slim}
: "${STORAGE_DRIVER:=overlay}"
export STORAGE_DRIVER BUILDAH_ISOLATION=chroot

say() { printf '%6.0f s  %s\n' "$SECONDS" "$*"; }

# Debian as its own slim image is: without documents and translations, licences kept.
make_base() {
  local folder container
  folder=$(mktemp -d)
  debootstrap --variant=minbase bookworm "$folder" "${DEBIAN_MIRROR:-http://deb.debian.org/debian}" >"$folder.log"
  rm -rf "$folder"/var/cache/apt/* "$folder"/var/lib/apt/lists/* "$folder"/var/log/* \
         "$folder"/usr/share/{man,info,locale,lintian}/*
  find "$folder/usr/share/doc" -type f ! -name copyright -delete
  printf 'path-exclude=/usr/share/%s/*\n' man info locale >"$folder/etc/dpkg/dpkg.cfg.d/slim"
  printf 'deb http://deb.debian.org/debian-security bookworm-security main\n' >>"$folder/etc/apt/sources.list"
  container=$(buildah from scratch)
  buildah add --quiet "$container" "$folder" / >/dev/null
  buildah commit --quiet --rm "$container" "$base" >/dev/null
  rm -rf "$folder" "$folder.log"
}

version=$(sed -n 's/^## \([0-9.]*\).*/\1/p' CHANGELOG.md | head -1)
name=localhost/dints-deploy-$image:$version
facts=()
[ -z "${RECORD:-}" ] || facts+=(--record)

build() {
  local secrets=() cache=--layers begin=$SECONDS
  if ! buildah inspect --type image "$base" >/dev/null 2>&1; then
    make_base
    facts+=(--fact "base made by debootstrap in=$((SECONDS - begin)) s")
    say "made $base"
  fi
  [ -z "${PIP_CONFIG:-}" ] || secrets+=(--secret "id=pip,src=$PIP_CONFIG")
  [ -z "${CA:-}" ] || secrets+=(--secret "id=ca,src=$CA")
  [ -z "${RECORD:-}" ] || cache=--no-cache
  begin=$SECONDS
  # shellcheck disable=SC2086  # several words
  buildah bud --quiet "$cache" --format docker --file "docker/$image.Dockerfile" --tag "$name" \
    --build-arg "BASE=$base" --build-arg "VERSION=$version" --build-arg "REVISION=$(git rev-parse HEAD)" \
    --build-arg "CREATED=$(git log -1 --format=%cI)" "${secrets[@]}" ${BUILD_ARGS:-} . >/dev/null
  facts+=(--fact "built in=$((SECONDS - begin)) s, with everything fetched")
  say "built $name"
}

[ "${2:-}" = try ] || build
container=$(buildah from "$name")
trap 'buildah rm "$container" >/dev/null' EXIT
root=$(buildah mount "$container")
buildah inspect --type image "$name" | "$python" -m docker.try_image "$image" "$root" "${facts[@]}"
say "done"
