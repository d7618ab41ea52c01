#!/usr/bin/env bash
# Sets up .venv on first use, then runs the tests, one process per core: ./test.sh [--fast] [any argument of pytest]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
cd "$root"
. scripts/venv.sh
ensure_venv "$root" "[dev]" || exit $?
if [ "${1:-}" = "--fast" ]; then
  shift
  set -- -m "not slow and not gpu" "$@"
fi
export OMP_NUM_THREADS=1  # the processes share the cores
exec "$venv_bin/python" -m pytest -n logical --maxprocesses 8 --dist loadgroup --no-loadscope-reorder "$@"
