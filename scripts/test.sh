#!/usr/bin/env bash
# Set up what is missing, lint, check types and run the tests; the last line is pytest's.
#   scripts/test.sh [PYTEST ARGUMENTS]        -m "" runs the slow tests too; -n 0 runs one after the other
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh dev
scripts/check.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # each of pytest's processes has a core
exec .venv/bin/python -m pytest -q -m "not slow" -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
