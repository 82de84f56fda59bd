.PHONY: setup test lint bench

setup:            ## .venv with everything that running and testing need
	./launch.sh --setup-only
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt

test: setup lint  ## every test; on a machine with a GPU the gpu-marked ones too
	.venv/bin/python -m pytest

lint:
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

bench: setup      ## the article's training recipe and ours, side by side on this machine
	.venv/bin/python benchmarks/train.py
