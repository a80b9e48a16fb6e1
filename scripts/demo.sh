#!/usr/bin/env bash
# Set up what is missing, convert the trained checkpoint of examples/ and sample from the results.
#   scripts/demo.sh [--samples N] [--all-layers]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh demo
exec .venv/bin/python scripts/demo.py "$@"
