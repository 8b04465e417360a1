# `make help` lists the targets.
PYTHON ?= python3
CONFIG ?= config/config.yaml
RESULTS ?= results
VENV := .venv
BIN := $(VENV)/bin
# A run starts dozens of processes: without cached bytecode each of them compiles all that it imports, and takes twice as long.
unexport PYTHONDONTWRITEBYTECODE
UV_VERSION := 0.13.9

.PHONY: demo generator test test-slow lint plan why recompute verify repair gc rescan bench chaos lock help clean
demo: $(VENV)/installed ## Install, run CONFIG (default: config/config.yaml), and print where the report is
	@test -r '$(CONFIG)' || { echo 'error: no configuration file $(CONFIG)' >&2; exit 1; }
	@$(BIN)/snakemake --configfile $(CONFIG) --quiet reason host

generator: $(VENV)/installed ## Train the generators of scenes and run config/generator.yaml: about ten minutes
	@$(BIN)/python workflow/train_decoder.py generators/planted.safetensors --planted
	@$(BIN)/python workflow/train_decoder.py generators/free.safetensors
	@$(BIN)/snakemake --configfile config/generator.yaml --quiet reason host

test: $(VENV)/installed ## Run the tests of every module, and the workflow once: minutes
	@$(BIN)/python -m pytest -m 'not slow' --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/installed ## Run the slow tests: SLURM, chaos, real data, other libraries, many workflows
	@$(BIN)/python -m pytest -m slow --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/installed ## Check formatting, style, types and the workflow
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/snakefmt --check Snakefile workflow
	@$(BIN)/mypy
	@$(BIN)/python workflow/lint.py

plan: $(VENV)/installed ## Print what would run and what it would take, without running it
	@test -r '$(CONFIG)' || { echo 'error: no configuration file $(CONFIG)' >&2; exit 1; }
	@$(BIN)/snakemake --configfile $(CONFIG) --dry-run --quiet rules

why: $(VENV)/installed ## Print why each step would run: which part of which id changed
	@$(BIN)/python -m pipeline.upkeep why $(CONFIG) $(if $(ONLY),--only $(ONLY))

recompute: $(VENV)/installed ## Delete what a stage made and compute it again: make recompute STAGE=extract ONLY=cnn
	@$(BIN)/python -m pipeline.upkeep recompute $(CONFIG) $(STAGE) $(if $(ONLY),--only $(ONLY))
	@$(BIN)/snakemake --configfile $(CONFIG) --quiet reason host $(if $(ONLY),--config only=$(ONLY))

verify: $(VENV)/installed ## Check every chunk file in RESULTS against its manifest
	@$(BIN)/python -m pipeline.upkeep verify $(RESULTS)

repair: $(VENV)/installed ## Recompute only the damaged files in RESULTS
	@$(BIN)/python -m pipeline.upkeep repair $(RESULTS)
	@$(BIN)/snakemake --configfile $(CONFIG) --quiet reason host

gc: $(VENV)/installed ## List what no network in RESULTS refers to, and experiments not in CONFIGS='...'; YES=1 removes it
	@$(BIN)/python -m pipeline.upkeep gc $(RESULTS) $(if $(CONFIGS),--configs $(CONFIGS)) $(if $(YES),--yes)

rescan: $(VENV)/installed ## List data sets again, to find files that were written in place
	@$(BIN)/snakemake --configfile $(CONFIG) --config rescan=true

BENCHMARKS := "costs" "dissection --images 64" "ablation --images 8 --plain-units 1" "calibration" "similarity --images 128" "looking" "attribution" "audit" \
  "visualize" "attack" "listing 100000" "scenes speed"
bench: $(VENV)/installed ## Measure what the stages cost, as ratios: ONLY='costs similarity' measures these
	@export OMP_NUM_THREADS=1; for name in $(ONLY); do case ' $(BENCHMARKS) ' in *"\"$$name"[\"\ ]*) ;; \
	  *) echo "error: no benchmark '$$name'; there are" $(foreach one,$(BENCHMARKS),$(one)) >&2; exit 1; esac; done; \
	for run in $(BENCHMARKS); do case ' $(ONLY) ' in '  ' | *" $${run%% *} "*) \
	  echo "== $$run"; $(BIN)/python -m tests.bench.bench_$$run || exit 1; esac; done

chaos: $(VENV)/installed ## Kill, damage and starve a miniature experiment, and compare its results: minutes. ONLY='kill-* repair'
	@mkdir -p build/chaos
	@cd build/chaos && ../../$(BIN)/python ../../tests/chaos/chaos.py --results results $(foreach one,$(ONLY),--only '$(one)') -- \
	  ../../$(BIN)/snakemake --snakefile ../../Snakefile --configfile ../../tests/chaos/miniature.yaml

# uv installs in seconds what pip installs in minutes. This checkout is installed as it is, so that `python -P -m pipeline...`
# runs from any folder and imports nothing of it. The kernels are compiled here, once, and cached.
$(VENV)/installed: requirements.lock requirements-slurm.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.x")'
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes --no-deps --target $(VENV)/slurm --requirement requirements-slurm.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@$(BIN)/python -m kernels.compile
	@touch $@

lock: $(VENV)/installed ## Pin the newest versions that pyproject.toml allows
	@$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	  --group dev --all-extras pyproject.toml --output-file requirements.lock
	@$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --no-deps \
	  --group slurm --output-file requirements-slurm.lock

help: ## Print every target with its meaning
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

clean: ## Remove .venv and .snakemake
	rm -rf $(VENV) .snakemake
