#!/usr/bin/env bash
# Make type stubs of the TensorRT 11 Python API and of cuda-python, on a machine with or without a GPU.
#   usage: tests/gpu/stubs.sh OUT_FOLDER      (needs pip and gcc)
# The bindings wheel needs three libraries to be imported. Empty ones with the nine symbols it asks for are enough to
# read every signature; nothing can be built or run this way. The stubs derive from NVIDIA's wheels: do not commit them.
set -euo pipefail
out=${1:?usage: stubs.sh OUT_FOLDER}
version=${TENSORRT_VERSION:-11.4.0.106}
mkdir -p "$out"
out=$(cd "$out" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/pip" --quiet --disable-pip-version-check)
"${pip[@]}" install pybind11-stubgen mypy numpy cuda-python
abi=$("$work/venv/bin/python" -c 'import sys; print(f"{sys.version_info[0]}{sys.version_info[1]}")')
"${pip[@]}" download --no-deps -d "$work" --python-version "$abi" --only-binary=:all: \
  --platform manylinux_2_28_x86_64 "tensorrt-cu13-bindings==$version"
cd "$work"
venv/bin/python -m zipfile -e tensorrt_cu13_bindings-*.whl .
symbols="createInferBuilder_INTERNAL createInferRefitter_INTERNAL createInferRuntime_INTERNAL
  createNvOnnxParserRefitter_INTERNAL createNvOnnxParser_INTERNAL getBuilderPluginRegistry
  getNvOnnxParserVersion getPluginRegistry initLibNvInferPlugins"
for symbol in $symbols; do echo "void *$symbol(void) { return 0; }"; done > empty.c
for name in libnvinfer.so.11 libnvinfer_plugin.so.11 libnvonnxparser.so.11; do
  gcc -shared -fPIC -Wl,-soname,"$name" -o "$name" empty.c
done
LD_LIBRARY_PATH=. PYTHONPATH=. venv/bin/pybind11-stubgen tensorrt_bindings -o stubs --ignore-all-errors 2>/dev/null
rm -rf "$out/tensorrt" "$out/cuda"
mkdir -p "$out/tensorrt" "$out/cuda/bindings"
# Some signatures are no Python: a parameter called `in`, one without a default after those with one. A constant called
# `bool` hides the type. The buffer of TensorRT's memory is there at run time, but not in what the bindings tell.
for file in stubs/tensorrt_bindings/*.pyi; do
  sed -e 's/tensorrt_bindings/tensorrt/g' \
    -e 's/\bin: /in_: /' -e '/^bool: DataType/d' \
    -e 's/power: Weights = None, channel_axis: typing.SupportsInt)/power: Weights = None, channel_axis: typing.SupportsInt = ...)/' \
    -e '/^class IHostMemory:/a\    def __buffer__(self, flags: int, /) -> memoryview: ...' \
    "$file" > "$out/tensorrt/$(basename "$file")"
done
venv/bin/stubgen --quiet --inspect-mode -m cuda.bindings.runtime -o stubs 2>/dev/null
cp stubs/cuda/bindings/runtime.pyi "$out/cuda/bindings/"
touch "$out/cuda/bindings/__init__.pyi"
# Every function and constant of CUDA that the project calls by name is one that cuda-python has.
venv/bin/python - "$OLDPWD/dints_deploy/runtime/cuda.py" <<'PYTHON'
import re
import sys
from pathlib import Path

from cuda.bindings import runtime

used = set(re.findall(r"\bcuda[A-Z]\w*", Path(sys.argv[1]).read_text()))
holders = (runtime, runtime.cudaError_t, runtime.cudaMemcpyKind)
missing = sorted(name for name in used if not any(hasattr(holder, name) for holder in holders))
print(f"{len(used)} names of CUDA in use, unknown to cuda-python: {missing or 'none'}")
sys.exit(bool(missing))
PYTHON
echo "stubs of TensorRT $version are in $out"
