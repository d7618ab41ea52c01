# Sourced by train.sh, test.sh and scripts/check: makes .venv and installs the project into it when needed.
# Usage: ensure_venv ROOT EXTRAS     EXTRAS is "cuda", "[cuda]" or "cuda,peft"; empty for none.
# Afterwards $venv_bin holds the environment's programs.

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.12 python3.13 python3.11 python3.10 python3 python; do
    [ -n "$candidate" ] || continue
    if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      printf '%s\n' "$candidate"
      return 0
    fi
  done
  echo "SimpleTuner needs Python 3.10, 3.11, 3.12 or 3.13 and found none. Install one, or name it: PYTHON=/path/to/python $0" >&2
  return 3
}

ensure_venv() {
  local root="$1" extras="${2//[][ ]/}" python stamp wanted
  extras="${extras:+[$extras]}"
  venv_bin="$root/.venv/bin"
  [ -d "$root/.venv/Scripts" ] && venv_bin="$root/.venv/Scripts"
  stamp="$root/.venv/.installed"
  wanted="$extras $(cksum <"$root/pyproject.toml")"
  if [ -x "$venv_bin/python" ] && grep -qxF "$wanted" "$stamp" 2>/dev/null; then
    return 0
  fi
  if [ ! -x "$venv_bin/python" ]; then
    python="$(find_python)" || return $?
    echo "Setting up .venv with $("$python" --version) ..." >&2
    "$python" -m venv "$root/.venv" || {
      echo "Could not create .venv. On Debian and Ubuntu: apt install python3-venv" >&2
      return 3
    }
    [ -d "$root/.venv/Scripts" ] && venv_bin="$root/.venv/Scripts"
  fi
  echo "Installing SimpleTuner and what it needs (the first time takes a few minutes) ..." >&2
  "$venv_bin/python" -m pip install --quiet --disable-pip-version-check --editable "$root$extras" >&2 || return 3
  printf '%s\n' "$wanted" >>"$stamp"
}
