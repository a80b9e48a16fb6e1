#!/usr/bin/env bash
# Make .venv ready for an extra of pyproject.toml; quick where nothing changed.
#   scripts/setup.sh [dev|demo|diffusers]     default: dev, which holds the other two
#   PYTHON=python3.12 scripts/setup.sh        to choose the interpreter (3.10 or newer)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extra=${1:-dev}
python=${PYTHON:-python3}
venv=.venv

case $extra in
    diffusers) holders="diffusers demo dev" ;;
    demo) holders="demo dev" ;;
    dev) holders="dev" ;;
    *)
        echo "setup: no extra \"$extra\". Choose dev, demo or diffusers." >&2
        exit 2
        ;;
esac

if ! version=$("$python" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3]); sys.exit(sys.version_info < (3, 10))' 2>/dev/null); then
    echo "setup: $python ${version:-(not found)}: Python 3.10 or newer is needed. Name one: PYTHON=python3.12 $0" >&2
    exit 1
fi

# The folder is part of it because an editable install points there.
wanted=$(cat pyproject.toml scripts/constraints.txt <(echo "$PWD $version") | "$python" -c \
    'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')

if "$venv/bin/python" -c '' 2>/dev/null; then
    for holder in $holders; do
        if [[ $(cat "$venv/setup-$holder" 2>/dev/null) == "$wanted" ]]; then
            echo "setup: $venv is up to date"
            exit 0
        fi
    done
fi

if [[ $("$venv/bin/python" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null) != "$version" ]]; then
    echo "setup: making $venv with Python $version"
    "$python" -m venv --clear "$venv"
fi
rm -f "$venv"/setup-*
echo "setup: installing the packages of \"$extra\" (some minutes the first time)"
"$venv/bin/python" -m pip install -qq --disable-pip-version-check -c scripts/constraints.txt -e ".[$extra]"
echo "$wanted" >"$venv/setup-$extra"
echo "setup: $venv is ready"
