#!/usr/bin/env bash
# The Wordle environment, for anyone who reaches PORT.
set -euo pipefail
exec python -m examples.wordle.environment --host 0.0.0.0 --port "${PORT:-7860}"
