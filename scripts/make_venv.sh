#!/bin/sh
# make_venv.sh DIR: a virtual environment with pip in DIR, from $PYTHON or the first fitting Python on PATH.
# Does nothing if DIR already has one. Python 3.10 to 3.13; the venv and ensurepip modules are needed.
set -eu

dir=$1
candidates=${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}

if "$dir/bin/python" -m pip --version >/dev/null 2>&1; then
    exit 0
fi

without_pip=
for python in $candidates; do
    "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || continue
    if "$python" -c 'import venv, ensurepip' 2>/dev/null; then
        echo "Making $dir with $("$python" --version) ($python)"
        exec "$python" -m venv "$dir"
    fi
    without_pip=$python
done

if [ -n "$without_pip" ]; then
    echo "Got $("$without_pip" --version) without ensurepip; a virtual environment needs it." >&2
    echo "On Debian or Ubuntu: sudo apt install python3-venv. Or name another Python: make PYTHON=/path/to/python3" >&2
else
    echo "Got no usable Python (tried: $candidates); 3.10 to 3.13 is needed." >&2
    echo "Install one, or name it: make PYTHON=/path/to/python3" >&2
fi
exit 1
