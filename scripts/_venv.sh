# Sourced by the other scripts: makes .venv at the root of the checkout and puts packages into it.
# Needs Python 3.11 or newer and nothing else. Re-running is cheap: a stamp says what is installed.

ROOT=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
VENV="$ROOT/.venv"
cd "$ROOT" || exit 1

say() { printf '%s\n' "$*" >&2; }

find_python() {
    for name in "${BULKHEAD_PYTHON:-}" python3.13 python3.12 python3.11 python3 python; do
        [ -n "$name" ] && command -v "$name" >/dev/null 2>&1 || continue
        "$name" -c 'import sys; sys.exit(not ((3, 11) <= sys.version_info[:2] <= (3, 13)))' 2>/dev/null || continue
        command -v "$name"
        return 0
    done
    say "Bulkhead needs Python 3.11, 3.12 or 3.13 and found none. Install it, or set BULKHEAD_PYTHON to its path."
    return 1
}

make_venv() {
    [ -e "$VENV/.bulkhead-venv" ] && return 0
    if [ ! -x "$VENV/bin/python" ]; then
        python=$(find_python) || exit 1
        say "Making .venv with $("$python" --version)"
        "$python" -m venv "$VENV" || {
            say "The venv could not be made. On Debian and Ubuntu: apt install python3-venv"
            exit 1
        }
    fi
    "$VENV/bin/python" -m pip install -q --disable-pip-version-check --upgrade 'pip>=25.1' || exit 1
    : >"$VENV/.bulkhead-venv"
}

# install STAMP ARGS…: pip install ARGS unless the stamp is newer than pyproject.toml. Shows what is large, and errors.
install() {
    stamp="$VENV/.bulkhead-$1"
    shift
    [ -e "$stamp" ] && [ ! pyproject.toml -nt "$stamp" ] && return 0
    log="$VENV/.bulkhead-install.log"
    {
        "$VENV/bin/python" -m pip install --disable-pip-version-check --progress-bar off "$@" 2>&1 && echo "DONE"  # not said when it was killed
    } | tee "$log" | sed -nE 's/^ +(Downloading|Using cached) ([^ ]+) \(([0-9.]+ MB)\)/  \2 (\3)/p' >&2
    if ! tail -n 1 "$log" | grep -q '^DONE$'; then
        tail -n 20 "$log" >&2
        say "Installing failed; the lines above say why, $log has the rest."
        exit 1
    fi
    : >"$stamp"
}
