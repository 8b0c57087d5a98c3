# Everything a newcomer or a developer does. `make help` lists it.
PYTHON ?= python3
# On a machine with an NVIDIA GPU: make TORCH=torch ...; the oldest supported: make test TORCH=torch==2.8.0
TORCH  ?= torch==2.13.0
VENV   ?= .venv
# Tests at a time.
JOBS   ?= 2
BIN     = $(VENV)/bin
# One stamp per torch, so that another TORCH is set up anew: of what the program needs, and of all.
INSTALLED = $(VENV)/.installed-$(subst =,-,$(TORCH))
READY     = $(VENV)/.ready-$(subst =,-,$(TORCH))

.DEFAULT_GOAL := help
.PHONY: help demo test docs bench accuracy tutorial lint format sanitize cuda-check gpu clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */  make \1\t/' | expand -t 20
	@echo "  Set-up is done as needed, in $(VENV), with $(TORCH); override: make test TORCH=torch PYTHON=python3.12"

# A virtual environment with torch, this package (editable) and its program; then all extras. Both installations name torch, so
# that no dependency of an extra replaces it.
$(INSTALLED): pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=23" "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet "$(TORCH)" numpy
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[demo]" "$(TORCH)"
	touch $@

$(READY): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[demo,dev,lightning,transformers]" "$(TORCH)"
	touch $@

demo: $(INSTALLED)  ## train, prune and compare on real handwritten digits: a table and comparison.png, in a few minutes
	$(BIN)/mfac demo

# One thread: the tensors of the tests are small, and where others use the machine too, two wait for each other. The tests of
# threads set their number themselves.
test: $(READY)  ## all tests, and the examples in the docstrings
	$(BIN)/mfac doctor
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) tests --ignore=tests/test_cuda_kernels.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --doctest-modules mfac

docs: $(READY)  ## the documentation as a site, in build/site; fails on a warning
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet -f .mkdocs.yml

bench: $(READY)  ## speed of textbook recursion, reference and kernels, against this machine's roofline
	$(BIN)/python -m pytest -q benchmarks -o python_files='bench_*.py' --benchmark-disable-gc --benchmark-columns=median,iqr,rounds

accuracy: $(INSTALLED)  ## accuracy of pruned ResNet-20: make accuracy DATA=cifar10 CHECKPOINT=resnet20.pt; takes hours, goes on where it stopped
	$(BIN)/python benchmarks/accuracy/run.py --data "$(DATA)" --checkpoint "$(CHECKPOINT)"

tutorial: $(INSTALLED)  ## the tutorial on Imagenette, from dense training on: make tutorial DATA=imagenette; takes hours, goes on where it stopped
	$(BIN)/python benchmarks/tutorial/run.py --data "$(DATA)"

lint: $(READY)  ## ruff and clang-format, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

format: $(READY)  ## ruff and clang-format, in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

sanitize: $(READY)  ## the kernels under AddressSanitizer and UndefinedBehaviorSanitizer, for each instruction set that runs here
	MFAC_SANITIZE=address,undefined ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	$(BIN)/python -m pytest -q tests/test_standalone.py tests/test_bf16.py tests/test_sparse_standalone.py

# The tests of the ops and of what is made of them, with the CUDA ops emulated on the CPU.
EMULATED = block_factor inverse_diagonal inverse_product joint_update joint_step independent_update quadratic_form \
	group_saliency select_smallest ops fisher quadratic auto patterns step offload

cuda-check: $(READY)  ## the CUDA kernels, with no GPU: nvcc for three GPUs without spills; on the CPU, under sanitizers and in all tests of the ops
	nvcc --version
	$(BIN)/python -m pytest -q tests/test_cuda_kernels.py
	MFAC_EMULATE_CUDA=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -k "not reference" $(EMULATED:%=tests/test_%.py)

gpu:  ## on a machine with an NVIDIA GPU: build, test and time on CUDA with the torch of .venv if there is one, else of PYTHON
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py

clean:  ## remove the virtual environment and what builds leave here
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .benchmarks
