#!/bin/sh
# Install dints-deploy from this folder into a new environment; needs Python, no network and no pip.
#   ./install.sh [TARGET]       TARGET is a folder that does not exist yet, /opt/dints-deploy by default
#   PYTHON=python3.11 ./install.sh ...
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
target=${1:-/opt/dints-deploy}
python=${PYTHON:-python3}

if [ -e "$target" ]; then
  echo "expected no folder at $target, found one: choose another, or move it away" >&2
  exit 1
fi
(cd "$here" && sha256sum --check --quiet SHA256SUMS)

made=cp$("$python" -c 'import sys; print("%d%d" % sys.version_info[:2])')
case $here in
  *"-$made-"*) ;;
  *) echo "expected the Python that the bundle's name ends with, found $made: name another with PYTHON=" >&2; exit 1 ;;
esac

trap 'rm -rf "$target"' EXIT
"$python" -m venv --without-pip "$target"
pip_wheel=$(ls "$here"/wheels/pip-*.whl)
pip() {
  PIP_CONFIG_FILE=/dev/null "$target/bin/python" "$pip_wheel/pip" --isolated --disable-pip-version-check "$@"
}
pip install --quiet --no-index --find-links "$here/wheels" --no-deps --require-hashes --no-compile \
  -r "$here/requirements.txt"
pip check >/dev/null
# On all cores, which pip does not use. A file that is no Python of this version fails here as it does in pip: unnoticed.
"$target/bin/python" -m compileall -qq -j 0 "$target/lib" || :
"$target/bin/dints-deploy" zoo verify
trap - EXIT
echo "installed $("$target/bin/dints-deploy" --version) in $target; next: $target/bin/dints-deploy doctor"
