#!/usr/bin/env bash
# Build a wheel and use it as a stranger does: convert in an environment without torch, then verify and load with
# the extras. Prints how much disk each environment takes. Needs a package index; some minutes.
#   scripts/check_wheel.sh
#   PYTHON=python3.12 scripts/check_wheel.sh     to choose the interpreter (3.10 or newer)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
constraints=$PWD/scripts/constraints.txt
digits=$PWD/examples/flux-digits
bin=$work/venv/bin

fail() {
    echo "check_wheel: $*" >&2
    exit 1
}

install() {
    "$bin/python" -m pip install -qq --disable-pip-version-check -c "$constraints" "$@"
    echo "check_wheel: $* -> $(du -sm "$work/venv" | cut -f1) MB"
}

# A copy, as a build leaves files behind and takes what earlier ones left.
mkdir "$work/source"
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$work/source"
"${PYTHON:-python3}" -m venv "$work/venv"
"$bin/python" -m pip wheel -qq --disable-pip-version-check --no-deps -w "$work" "$work/source"
wheel=$(echo "$work"/convert_ckpt-*.whl)

# The wheel holds every file of the two packages, and else its own metadata only.
"$bin/python" -m zipfile -l "$wheel" | awk 'NR > 1 {print $1}' | grep -v '\.dist-info/' | sort >"$work/held"
(cd convert && git ls-files --cached --others --exclude-standard; cd ../runtime && git ls-files --cached --others --exclude-standard) |
    sort >"$work/wanted"
diff "$work/wanted" "$work/held" || fail "the wheel (>) does not hold the two packages (<)"

cd "$work"
install "$wheel"
"$bin/python" -c 'import torch' 2>/dev/null && fail "torch came along"
"$bin/python" -c 'import safetensors' 2>/dev/null && fail "safetensors came along"
for format in mxfp4 fp8; do
    "$bin/convert-ckpt" "$digits" "$format" --format "$format" 2>/dev/null
    "$bin/run-ckpt" inspect "$format" --json >"$format.json"
done
message=$("$bin/run-ckpt" verify mxfp4 2>&1) && fail "run-ckpt verify ran without torch"
[[ $message == "error: run-ckpt verify needs torch: pip install 'convert-ckpt[runtime]'" ]] || fail "$message"

# The commands that the messages name.
install 'convert-ckpt[runtime]'
for format in mxfp4 fp8; do
    "$bin/run-ckpt" verify "$format" --source "$digits" | tail -n 1
done

install 'convert-ckpt[diffusers]'
"$bin/python" - <<'PYTHON'
import torch

from run_ckpt import QuantizedLinear, load_quantized

for format_ in ("mxfp4", "fp8"):
    model = load_quantized(format_)
    linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert len(linears) == 23, len(linears)
    size = {"hidden_states": (1, 16, 4), "encoder_hidden_states": (1, 2, 256), "pooled_projections": (1, 256)}
    inputs = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in size.items()}
    ids = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(2, 3), "timestep": torch.ones(1)}
    assert model(**inputs, **ids).sample.isfinite().all()
    print(f"loaded {format_}: {type(model).__name__} with {len(linears)} quantized layers")
PYTHON
echo "check_wheel: the wheel converts without torch, and loads with it"
