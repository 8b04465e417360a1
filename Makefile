# make demo   install, run config/config.yaml, say where the report is     make test   the whole test suite
# make lint   format, lint, types, snakemake --lint                        make bench  what stages cost, as ratios
PYTHON ?= python3
CONFIG ?= config/config.yaml
RESULTS ?= results
VENV := .venv
BIN := $(VENV)/bin
UV_VERSION := 0.13.9

.PHONY: demo test lint plan why recompute verify repair gc rescan bench chaos lock clean
demo: $(VENV)/installed
	@test -r '$(CONFIG)' || { echo 'error: no configuration file $(CONFIG)' >&2; exit 1; }
	@$(BIN)/snakemake --configfile $(CONFIG) --quiet reason host

test: $(VENV)/installed
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/installed
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/snakefmt --check Snakefile workflow
	@$(BIN)/mypy
	@$(BIN)/python workflow/lint.py

# What would run, without running it; and why: which part of which id changed.
plan: $(VENV)/installed
	@test -r '$(CONFIG)' || { echo 'error: no configuration file $(CONFIG)' >&2; exit 1; }
	@$(BIN)/snakemake --configfile $(CONFIG) --dry-run --quiet rules

why: $(VENV)/installed
	@$(BIN)/python -m pipeline.upkeep why $(CONFIG) $(if $(ONLY),--only $(ONLY))

# Throw away what a stage made, and make it again: make recompute STAGE=extract ONLY=cnn
recompute: $(VENV)/installed
	@$(BIN)/python -m pipeline.upkeep recompute $(CONFIG) $(STAGE) $(if $(ONLY),--only $(ONLY))
	@$(BIN)/snakemake --configfile $(CONFIG) --quiet reason host $(if $(ONLY),--config only=$(ONLY))

# Every chunk file of a results folder against its manifest; have only the damaged ones made again.
verify: $(VENV)/installed
	@$(BIN)/python -m pipeline.upkeep verify $(RESULTS)

repair: $(VENV)/installed
	@$(BIN)/python -m pipeline.upkeep repair $(RESULTS)
	@$(BIN)/snakemake --configfile $(CONFIG) --quiet reason host

# What no network of the results folder refers to; YES=1 removes it.
gc: $(VENV)/installed
	@$(BIN)/python -m pipeline.upkeep gc $(RESULTS) $(if $(YES),--yes)

# List data sets anew even where no folder changed: finds files written in place.
rescan: $(VENV)/installed
	@$(BIN)/snakemake --configfile $(CONFIG) --config rescan=true

bench: $(VENV)/installed
	@export OMP_NUM_THREADS=1; for run in "costs" "dissection --images 64" "ablation --images 8 --plain-units 1" "calibration" "similarity --images 128" looking "listing 100000" "scenes speed"; do \
	  echo "== $$run"; $(BIN)/python -m tests.bench.bench_$$run || exit 1; done

# Kill, damage and starve a miniature experiment in every way, and compare its results: minutes. ONLY='kill-* repair'
chaos: $(VENV)/installed
	@mkdir -p build/chaos
	@cd build/chaos && ../../$(BIN)/python ../../tests/chaos/chaos.py --results results $(foreach one,$(ONLY),--only '$(one)') -- \
	  ../../$(BIN)/snakemake --snakefile ../../Snakefile --configfile ../../tests/chaos/miniature.yaml

# uv installs in seconds what takes pip minutes. The kernels are compiled once here, and found compiled later.
$(VENV)/installed: requirements.lock requirements-slurm.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.x")'
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes --no-deps --target $(VENV)/slurm --requirement requirements-slurm.lock
	@$(BIN)/python -m kernels.compile
	@touch $@

# Pin the newest versions that pyproject.toml allows.
lock: $(VENV)/installed
	@$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	  --group dev --all-extras pyproject.toml --output-file requirements.lock
	@$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --no-deps \
	  --group slurm --output-file requirements-slurm.lock

clean:
	rm -rf $(VENV) .snakemake
