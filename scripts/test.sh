#!/usr/bin/env bash
# Set up what is missing, lint, check types and run the tests; the last line is pytest's.
#   scripts/test.sh [PYTEST ARGUMENTS]        -m "" runs the slow tests too
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh dev
scripts/check.sh
exec .venv/bin/python -m pytest -q -m "not slow" "$@"
