#!/usr/bin/env bash
# Sets up .venv on first use, then trains: ./train.sh [any argument of `simpletuner train`]
# The exit status is the trainer's.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
. "$root/scripts/venv.sh"
ensure_venv "$root" "${SIMPLETUNER_EXTRAS:-}" || exit $?
exec "$venv_bin/simpletuner" train "$@"
