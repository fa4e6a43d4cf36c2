#!/usr/bin/env bash
# Makes the environments in which clients run, in .venv/clients/NAME; `make test-clients` calls it.
#
#   tests/clients/environments.sh [NAME ...]
#
#   huggingface   on top of .venv: TRL, lm-evaluation-harness, OpenRLHF's client of reward servers
#   rewardbench   on top of .venv, with the older transformers that RewardBench wants
#   tunix         by itself: gram_jax and Tunix, and no PyTorch
#
# tests/clients/requirements/NAME.txt has all versions. An environment made from the same file is
# left as it is.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
[ $# -gt 0 ] || set -- huggingface rewardbench tunix

for name in "$@"; do
    wanted=tests/clients/requirements/$name.txt
    place=.venv/clients/$name
    if cmp --silent "$wanted" "$place/installed"; then continue; fi
    echo "making $place"
    rm -rf "$place"
    "$python" -m venv --without-pip "$place"
    "$python" -m pip --python "$place/bin/python" install --quiet --disable-pip-version-check \
        --no-deps --requirement "$wanted"
    if [ "$name" != tunix ]; then
        # What the environment lacks comes from the one below it.
        "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
            > "$(echo "$place"/lib/python3.*/site-packages)/below.pth"
    fi
    cp "$wanted" "$place/installed"
done
