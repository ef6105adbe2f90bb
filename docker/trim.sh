#!/bin/sh
# Take out of an environment what the appliance never runs, and compile the rest: sh trim.sh ENVIRONMENT
set -eu
cd "$1"
bin/python -m pip uninstall --quiet --yes pip setuptools
site=$(echo lib/python3*/site-packages)

# Programs of dependencies; among them OpenVINO's converter, which reports its use, and servers that listen.
find bin -type f ! -name 'python*' ! -name 'dints-deploy' -delete
# Tests and their data; numpy.testing imports one of numpy's.
find "$site" -depth -type d \( -name tests -o -name test \) ! -path '*/numpy/_core/*' -exec rm -rf {} +
rm -rf "$site"/pydicom/data/test_files "$site"/pynetdicom/apps
# Headers and build files.
find "$site" -depth -type d \( -name include -o -name cmake \) -exec rm -rf {} +
find "$site" -type f \( -name '*.pyi' -o -name '*.pxd' -o -name '*.h' -o -name '*.a' \) -delete
# OpenVINO's devices and model formats that are not used: the appliance reads ONNX and OpenVINO's own, on a CPU.
for part in intel_gpu_plugin intel_npu_plugin intel_npu_compiler tensorflow_frontend tensorflow_lite_frontend \
            pytorch_frontend paddle_frontend jax_frontend gguf_frontend; do
  rm -f "$site"/openvino/libs/libopenvino_"$part"*
done
rm -f "$site"/openvino/libs/cache.json
rm -rf "$site"/openvino_telemetry*

bin/python -m compileall -q --invalidation-mode unchecked-hash -s "$1" -p /opt/dints-deploy "$site"
