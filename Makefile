.PHONY: setup test soak lint bench

setup:            ## .venv with everything that running and testing need
	./launch.sh --setup-only
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt

test: setup lint  ## every test but the slow ones; on a machine with a GPU the gpu-marked ones too
	.venv/bin/python -m pytest -m "not slow"

soak: setup       ## the tests that take minutes each
	.venv/bin/python -m pytest -m slow -o faulthandler_timeout=3600

lint:
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

bench: setup      ## the article's recipe and ours, side by side on this machine; 5 minutes, into runs/bench/
	.venv/bin/python benchmarks/train.py --turns 2 --output runs/bench/results.jsonl
	.venv/bin/python benchmarks/train.py --turns 1 --steps 3 --texts_per_step 64 --output runs/bench/results.jsonl
	.venv/bin/python benchmarks/operators.py --output runs/bench/results.jsonl
	.venv/bin/python benchmarks/generate.py --turns 1 --output runs/bench/results.jsonl
	.venv/bin/python benchmarks/plots.py runs/bench
