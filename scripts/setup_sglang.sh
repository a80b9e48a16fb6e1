#!/usr/bin/env bash
# Make a Python environment in DIR where check_sglang.py can load models in SGLang 0.5.23 on a CPU.
#   scripts/setup_sglang.sh DIR
#   PYTHON=python3.12 scripts/setup_sglang.sh DIR     to choose the interpreter (3.11 or newer)
# Nothing is installed with its dependencies: SGLang's are GPU builds. These are the packages that its
# imports ask for, at the versions that ran. torch needs a CPU build: where pip has none, install that
# into DIR first.
set -euo pipefail

if [[ $# -ne 1 ]]; then
    echo "usage: $0 DIR" >&2
    exit 2
fi
dir=$1
python=${PYTHON:-python3}
install=("$dir/bin/python" -m pip install -qq --disable-pip-version-check)

[[ -x $dir/bin/python ]] || "$python" -m venv "$dir"
echo "setup: installing SGLang 0.5.23 into $dir without its dependencies (some minutes)"
if ! "$dir/bin/python" -c 'import torch' 2>/dev/null; then
    "${install[@]}" --no-deps torch==2.13.0
fi
"${install[@]}" --no-deps \
    sglang==0.5.23 diffusers==0.37.0 transformers==5.19.0 triton==3.9.0 torchvision==0.28.0 \
    cache-dit==1.5.3 compressed-tensors==0.20.0 apache-tvm-ffi==0.1.11 safetensors==0.8.0 \
    blake3==1.0.11 addict==2.4.0 aiohappyeyeballs==2.7.1 aiohttp==3.14.5 aiosignal==1.4.0 annotated-doc==0.0.7 \
    annotated-types==0.8.0 anyio==4.16.0 asttokens==3.0.2 attrs==26.1.0 certifi charset-normalizer==3.5.2 \
    click==8.5.1 cloudpickle==3.1.2 decorator==5.3.1 dill==0.4.1 distro==1.9.0 einops==0.8.2 executing==2.3.0 \
    fastapi==0.165.0 filelock==4.0.8 frozenlist==1.8.0 fsspec==2026.9.0 gguf==0.19.0 h11==0.16.0 hf-xet==1.8.0 \
    httpcore2==2.16.2 httpx==0.28.1 httpx2==2.16.2 huggingface_hub==2.4.0 idna==3.20 imageio==2.38.1 \
    ipython==9.18.1 jedi==0.20.1 Jinja2==3.1.6 loguru==0.7.3 markdown-it-py==4.3.0 MarkupSafe==3.0.3 \
    matplotlib-inline==0.2.2 mdurl==0.1.2 mpmath==1.3.0 msgspec==0.22.0 multidict==7.2.1 networkx==3.6.1 \
    numpy==2.4.6 openai==3.52.0 orjson==3.13.0 packaging==26.3 parso==0.8.7 partial-json-parser==0.2.1.1.post7 \
    pexpect==4.9.0 pillow==13.0.0 prompt_toolkit==3.0.53 propcache==0.5.4 psutil==7.2.2 ptyprocess==0.7.0 \
    pure_eval==0.2.4 pybase64==1.5.1 pydantic==2.14.3 pydantic_core==2.50.4 Pygments==2.21.0 \
    python-dateutil==4.0.0 PyYAML==6.0.3 pyzmq==27.3.0 regex==2026.11.15 requests==2.34.2 rich==15.0.0 \
    sentencepiece==0.2.3 setproctitle==1.3.8 setuptools==84.0.0 shellingham==1.5.4 sniffio==1.3.1 stack-data==0.6.3 \
    starlette==1.10.0 sympy==1.14.0 tokenizers==0.23.3 tqdm==4.70.1 traitlets==5.16.1 truststore==0.10.5 \
    typer==0.29.2 typing_extensions==4.16.0 typing-inspection==0.4.5 urllib3==2.8.0 uvicorn==0.54.0 \
    wcwidth==0.9.4 yarl==1.25.1 accelerate==1.15.0 opentelemetry-api==1.45.2 opentelemetry-sdk==1.45.2
# Our plug-in, as a user installs it: SGLang finds it by its entry point.
"${install[@]}" --no-deps --no-build-isolation -e "$(dirname "$(dirname "$(realpath "$0")")")"
echo "setup: ready. Use $dir/bin/python scripts/check_sglang.py CONVERTED BF16"
