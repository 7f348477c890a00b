# Sourced by the other scripts: they work from any folder, in one virtual environment in the clone's root.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"

# The version our tests run with. On a machine with a GPU, or to save space on one without, choose another build:
#   TORCH='torch==2.13.0+cpu' scripts/test
TORCH="${TORCH:-torch==2.13.0}"

say() {
    printf '== %s\n' "$*" >&2
}

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# Make .venv, if needed, with the project and the given extras in it, and put it first on PATH.
#   environment demo,build
environment() {
    local extras="$1" python="${PYTHON:-python3}"
    command -v "$python" > /dev/null || fail "$python not found; install Python 3.10 or newer"
    if ! "$VENV/bin/python" -m pip --version > /dev/null 2>&1; then
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
            || fail "$("$python" --version) is too old; set PYTHON to a Python 3.10 or newer"
        say "making $VENV"
        "$python" -m venv --clear "$VENV" > /dev/null \
            || fail "$python cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv"
    fi
    export PATH="$VENV/bin:$PATH"
    local stamp="$VENV/.installed-$extras" wanted
    wanted="$(cksum < "$ROOT/pyproject.toml") $ROOT"
    if [ "$(cat "$stamp" 2> /dev/null)" != "$wanted" ]; then
        # whatever torch is there will do: it is a gigabyte, and somebody may have chosen it
        if ! python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)'; then
            say "installing $TORCH"
            python -m pip install --quiet --disable-pip-version-check "$TORCH"
        fi
        say "installing tesseraq-gguf[$extras]"
        python -m pip install --quiet --disable-pip-version-check --editable "$ROOT[$extras]"
        printf '%s\n' "$wanted" > "$stamp"
    fi
}

# Build the runtime for this processor unless it is there, with all of its programs.
runtime() {
    case "$(tesseraq-gguf runtime path 2> /dev/null)" in
        */cpu) ;;
        *) say "building the runtime (some minutes, once)" ;;
    esac
    tesseraq-gguf runtime build > /dev/null
}
