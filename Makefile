.PHONY: setup test check soak rehearse lint bench

# Four on two cores, because many tests wait. A worker takes 1 GB, and up to 2 GB more for what it starts.
WORKERS ?= 4
PYTEST = .venv/bin/python -m pytest
PARALLEL = -n $(WORKERS) --dist loadgroup --no-loadscope-reorder --max-worker-restart 0

setup:            ## .venv with everything that running and testing need
	./launch.sh --setup-only
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt

test: setup lint  ## every test but the slow ones, on several cores; on a machine with a GPU the gpu-marked ones too
	$(PYTEST) $(PARALLEL) -m "not slow"

check: WORKERS = 2
check: setup lint ## within a minute: the tests that start no process and train no model
	$(PYTEST) $(PARALLEL) -m "not slow and not process"

soak: setup       ## the tests that take minutes each
	$(PYTEST) -m slow -o faulthandler_timeout=3600

rehearse:         ## the GPU side without a GPU: torch's CUDA build (3 GB, into .venv-cuda) on a stand-in; about an hour
	test -x .venv-cuda/bin/python || $${PYTHON:-python3} -m venv .venv-cuda
	.venv-cuda/bin/python -m pip install --quiet --disable-pip-version-check -r tests/rehearsal/requirements.txt
	.venv-cuda/bin/python tests/rehearsal/rehearse.py

lint:             ## style and format
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

bench: setup      ## the article's recipe and ours, side by side on this machine; 5 minutes, into runs/bench/
	.venv/bin/python benchmarks/train.py --turns 2 --output runs/bench/results.jsonl
	.venv/bin/python benchmarks/train.py --turns 1 --steps 3 --texts_per_step 64 --output runs/bench/results.jsonl
	.venv/bin/python benchmarks/operators.py --output runs/bench/results.jsonl
	.venv/bin/python benchmarks/generate.py --turns 1 --output runs/bench/results.jsonl
	.venv/bin/python benchmarks/plots.py runs/bench
