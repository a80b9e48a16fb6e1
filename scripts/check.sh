#!/usr/bin/env bash
# Lint, formatting and types; no tests. Runs in .venv, see setup.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin=.venv/bin

"$bin/ruff" check --quiet .
"$bin/ruff" format --quiet --check .
"$bin/mypy" --no-error-summary
echo "check: ruff and mypy are content"
