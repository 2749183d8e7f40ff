# Everything happens in .venv; nothing else has to be installed first but Python >= 3.10.
PYTHON ?= python3
PIP = .venv/bin/pip --quiet --disable-pip-version-check
RUN = .venv/bin/python -m

.PHONY: figures test bench docs clean

figures: .venv/installed  ## measure the shipped checkpoints and draw every figure
	$(RUN) analysis.hessian --layers
	$(RUN) analysis.hessian --ckpt checkpoints/csan?/epoch*.pt
	$(RUN) analysis.landscape
	$(RUN) analysis.landscape --directions pca
	$(RUN) analysis.nll
	$(RUN) analysis.figures

test: .venv/installed-test  ## lint, types, floors, tests
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	CUDA_VISIBLE_DEVICES= .venv/bin/pytest -n auto
	.venv/bin/pytest tests/test_cuda.py

bench: .venv/installed-bench  ## speed and accuracy against other packages
	$(RUN) tests.benchmarks.coverage
	$(RUN) tests.benchmarks.bench_curvature
	$(RUN) tests.benchmarks.bench_landscape
	$(RUN) tests.benchmarks.bench_training
	.venv/bin/torchrun --nproc-per-node 2 -m tests.benchmarks.bench_scaling

docs: .venv/installed-docs  ## the documentation site, in docs/_build/html
	OMP_NUM_THREADS=1 .venv/bin/sphinx-build -E -W --keep-going -b html docs docs/_build/html

clean:
	rm -rf .venv

.venv/installed: pyproject.toml constraints.txt
	test -x .venv/bin/pip || $(PYTHON) -m venv .venv
	$(PIP) install --constraint constraints.txt --editable '.[study]'
	touch $@

.venv/installed-%: .venv/installed
	$(PIP) install --constraint constraints.txt --editable '.[$*]'
	touch $@
