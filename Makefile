# Every target sets up .venv first, once, and again when one of the files below changes.
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-all lab notebooks readme style mutants site results kernels vllm clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

$(READY): setup.sh setup.py settings.ini constraints.txt pyproject.toml
	bash setup.sh

venv: $(READY) ## Set up .venv and nothing else

demo: $(READY) ## Set up and run the demo
	.venv/bin/nld demo

test: $(READY) ## Set up and run the checks (12 minutes on two cores)
	PATH="$(CURDIR)/.venv/bin:$$PATH" bash tests/run

test-all: $(READY) ## Run what `make test` leaves out: slow tests and notebooks, all kernels, the wheel in a clean environment
	PATH="$(CURDIR)/.venv/bin:$$PATH" bash tests/run long

lab: $(READY) ## Open the notebooks in JupyterLab
	.venv/bin/jupyter lab nbs/index.ipynb

notebooks: $(READY) ## Run every notebook in place and store its outputs
	.venv/bin/python tools/run_notebooks.py

readme: $(READY) ## Make README.md, docs/pages/ and the chapters' lists from their notebooks
	.venv/bin/python tools/make_pages.py

style: $(READY) ## Count long lines, crowded calls and private words (tools/style.py --list names them)
	.venv/bin/python tools/style.py

mutants: $(READY) ## Plant bugs and see which ones no test finds (MODULE=hass.losses for one module)
	PATH="$(CURDIR)/.venv/bin:$$PATH" .venv/bin/python tools/mutants.py $(MODULE)

site: $(READY) ## Build the documentation site into docs/_build/site, offline, and check it
	PATH="$(CURDIR)/.venv/bin:$$PATH" bash docs/run

results: $(READY) ## Make one file under results/ again: NAME=speed_compiled; without NAME list them (results/README.md)
	bash results/scripts/make.sh "$(NAME)" $(DATA)

kernels: ## Verify the Ascend kernels, in an environment of their own (kernels/README.md)
	bash kernels/verify/run

vllm: ## Serve the shipped draft head in vLLM on a CPU and compare, in an environment of its own
	bash tests/vllm-cpu/run

clean: ## Remove .venv and everything else that was built
	rm -rf .venv kernels/verify/.venv tests/vllm-cpu/.venv docs/.venv docs/_build .check.* build dist *.egg-info
	rm -rf .pytest_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
