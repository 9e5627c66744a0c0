#!/usr/bin/env bash
# Install what the tests need into .venv-tests, check the code's form, and run the tests: `bash tests/run.sh [ARGUMENTS OF pytest]`.
set -euo pipefail
cd "$(dirname "$0")/.."
wanted=$(cat requirements.txt records/requirements.txt tests/requirements.txt)
if [ "$wanted" != "$(cat .venv-tests/installed.txt 2>/dev/null)" ]; then
    "${PYTHON:-python3}" -m venv --clear .venv-tests
    .venv-tests/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r tests/requirements.txt
    echo "$wanted" > .venv-tests/installed.txt
fi
.venv-tests/bin/ruff format --check --quiet . || { echo "run.sh: the files above are not formatted; run .venv-tests/bin/ruff format" >&2; exit 1; }
.venv-tests/bin/ruff check --quiet .
exec .venv-tests/bin/python -m pytest "$@"
