#!/usr/bin/env bash
# Environments in which clients run, each made once in .venv/clients/NAME; `make test-clients`.
#
#   huggingface   on top of .venv: TRL, lm-evaluation-harness, OpenRLHF's HTTP client
#   rewardbench   on top of .venv, with the older transformers that it wants
#   tunix         by itself: gram_jax and Tunix, and no PyTorch
#
# The versions stand in tests/clients/requirements/NAME.txt, all of them, as pip would resolve them.
set -euo pipefail
cd "$(dirname "$0")/../.."
main=$PWD/.venv
python=${PYTHON:-$main/bin/python}

for name in "${@:-huggingface rewardbench tunix}"; do
    wanted=tests/clients/requirements/$name.txt
    place=.venv/clients/$name
    if cmp --silent "$wanted" "$place/installed"; then continue; fi
    rm -rf "$place"
    "$python" -m venv --without-pip "$place"
    if [ "$name" != tunix ]; then
        # What is not in the environment itself comes from the one below it.
        below=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
        echo "$below" > "$(echo "$place"/lib/python3.*/site-packages)/below.pth"
    fi
    "$python" -m pip --python "$place/bin/python" install --quiet --disable-pip-version-check \
        --no-deps --requirement "$wanted"
    cp "$wanted" "$place/installed"
done
