#!/usr/bin/env bash
# Creates .venv and installs qwenlib with every extra, under the pins of constraints.txt.
#   PYTHON=python3.12   the interpreter to use (default: the first suitable one found)
#   QWENLIB_TORCH=cpu   which build of torch: cpu or gpu (default: gpu if nvidia-smi finds one)
set -euo pipefail
cd "$(dirname "$0")/.."

suitable() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

if [ -n "${PYTHON:-}" ]; then
    suitable "$PYTHON" || { echo "error: PYTHON=$PYTHON is not a Python 3.11 to 3.13" >&2; exit 1; }
else
    for candidate in python3 python3.12 python3.11 python3.13; do
        if suitable "$candidate"; then PYTHON=$candidate; break; fi
    done
    if [ -z "${PYTHON:-}" ]; then
        echo "error: no Python 3.11, 3.12 or 3.13 on PATH (python3 is" \
             "$(python3 --version 2>/dev/null || echo 'not there'))." >&2
        echo "Install one, or name it: make test PYTHON=/path/to/python3.12" >&2
        exit 1
    fi
fi

if ! { suitable .venv/bin/python && .venv/bin/python -m pip --version; } >/dev/null 2>&1; then
    echo "Creating .venv with $("$PYTHON" --version)"
    "$PYTHON" -m venv --clear .venv || {
        echo "error: $PYTHON cannot create a virtual environment" \
             "(on Debian and Ubuntu: apt install python3-venv)" >&2
        exit 1
    }
fi

pip=(.venv/bin/python -m pip --disable-pip-version-check)
install=("${pip[@]}" install -qq --constraint constraints.txt)
torch=$(grep '^torch==' constraints.txt)

if [ -z "${QWENLIB_TORCH:-}" ]; then
    QWENLIB_TORCH=cpu
    if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then QWENLIB_TORCH=gpu; fi
fi
# torch first: a plain install of the rest on Linux would bring gigabytes of CUDA libraries.
if [ "$(uname -s)" = Linux ] && [ "$QWENLIB_TORCH" = cpu ]; then
    echo "Installing $torch for the CPU"
    "${install[@]}" "$torch+cpu" 2>/dev/null ||
        "${install[@]}" --retries 0 --timeout 20 \
            --extra-index-url https://download.pytorch.org/whl/cpu "$torch+cpu" 2>/dev/null ||
        "${install[@]}" "$torch"
else
    echo "Installing $torch"
    "${install[@]}" "$torch"
fi
echo "Installing qwenlib and everything it uses"
"${install[@]}" --editable ".[all]"
touch .venv/.installed
