# make         environment in .venv           make demo    synthetic hospitals, a private federated run, its report
# make test    lint, types, all tests         make lint    ruff and mypy only
PYTHON ?= python3
BIN = .venv/bin
STAMP = .venv/.ready

.DEFAULT_GOAL := env
.PHONY: env demo test test-slow faults coverage lint settings lock clean

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"fedmm needs Python 3.11 to 3.13, this is {v[0]}.{v[1]}: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

demo: env
	@rm -rf demo  # synthetic hospitals and their ledgers: a demo starts from epsilon 0
	$(BIN)/fedmm synth demo/hospitals --hospitals 4 --patients 200 --seed 7
	$(BIN)/fedmm simulate demo/hospitals --out demo/run
	$(BIN)/fedmm evaluate demo/run demo/hospitals/hospital_*
	$(BIN)/fedmm ledger show demo/hospitals/hospital_1
	@echo; echo "open demo/run/report.html"

test: env lint  # two at a time, a file in one place, in the order of names (by number of tests the longest files came last); one thread each: two threads may add up in another order
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

test-slow: env  # 300 kills, 200 histories: minutes
	$(BIN)/python -m pytest -m slow

faults: env  # docs/reliability.md: every process killed before, during, after; endurance; the ledger under 320 kills and 10,000 edits
	$(MAKE) --no-print-directory --keep-going --jobs 2 --output-sync=target faults-federation faults-alone

.PHONY: faults-federation faults-alone
faults-federation:  # one federation of real processes, kept up through all of it; mostly waiting
	$(BIN)/python -m pytest -m slow tests/faults/test_kills.py tests/faults/test_rows.py -rP --durations=10

faults-alone:
	$(BIN)/python -m pytest -m slow tests/faults/test_places.py tests/faults/test_endurance.py tests/e2e/test_sites.py \
		tests/privacy/test_ledger_faults.py tests/privacy/test_ledger_tampering.py -rP --durations=10

coverage: env  # every branch of what decides and proves: ledger, plan, policy, accounting, gate
	$(BIN)/python -m pytest tests/client tests/privacy -m "not slow" --cov=client.gate --cov-branch --cov-fail-under=100 \
		--cov-report=term-missing $(foreach m,ledger charge chain vault roster statement plan policy accounting,--cov=fedmm.privacy.$(m))

lint: env
	$(BIN)/ruff check fedmm client server tests benchmarks
	$(BIN)/ruff format --check fedmm client server tests benchmarks
	$(BIN)/mypy

settings: env  # docs/settings.md from fedmm/config.py
	$(BIN)/python -c 'from fedmm.config import write_settings_page; write_settings_page()'

lock: env  # constraints.txt from what is installed and tested; names and versions only
	$(BIN)/python -m pip freeze --exclude-editable --exclude pip --exclude setuptools > constraints.txt

clean:
	rm -rf .venv .bench-peers demo .pytest_cache .mypy_cache .ruff_cache

.PHONY: bench
bench: env  # make bench NAME=privacy
	$(BIN)/python -m benchmarks.run $(NAME)

.PHONY: bench-peers
bench-peers: env  # NVFlare and pfl-research beside `engine`: they see .venv and this tree; what they need otherwise, an older dp-accounting too, stays theirs
	$(BIN)/python -m venv .bench-peers
	cd .bench-peers/lib/python*/site-packages && printf '%s\n' "$(CURDIR)" "$(CURDIR)"/.venv/lib/python*/site-packages > fedmm.pth
	.bench-peers/bin/python -m pip install --quiet nvflare==2.9.0 pfl==0.6.0

.PHONY: bench-check
bench-check: env  # make bench-check NAME="accounting ledger": fails where a ratio to others is 15 % worse than stored; STORE=--store
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.check $(NAME) $(STORE)

.PHONY: gpu-check
gpu-check: env  # what only a GPU can tell; fails where there is none
	$(BIN)/python -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "no GPU here: nothing was checked")'
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python -m benchmarks.gpu

.PHONY: results
results: env  # the tables of docs/results.md: chest pack, missing modalities, levers; about an hour on two cores
	$(BIN)/python -m benchmarks.results chest missing levers
