# make demo: set up and watch the whole method work.  make test: set up and run the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.texforce-installed

.PHONY: setup demo test test-full test-older test-browser test-rewards lint clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than Python 3.11; use: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/texforce demo

# one process a core (four at most, for memory), and one thread each
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --maxprocesses 4

test: setup
	$(PYTEST)

test-full: setup
	$(PYTEST) -m "slow or not slow"

# what loads LoRAs, with the last transformers in which CLIPTextModel has the level `text_model`; everything else from .venv
test-older: setup
	rm -rf build/older
	$(BIN)/python -m venv build/older
	build/older/bin/python -m pip install --quiet --disable-pip-version-check "transformers==5.5.4"
	$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(' + repr(sysconfig.get_path('purelib')) + ')')" \
	  > "$$(build/older/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/zz_tested.pth"
	build/older/bin/python -m pytest tests/test_adapters.py tests/test_fuse.py tests/test_sample.py -k "load or draw or stack or exact"
	build/older/bin/python -m pytest -m "slow or not slow" tests/test_extract.py tests/test_train.py -k "draws_with_whole or starts_from_a_lora"

# the page of `texforce eval` in a real browser: needs chromium and chromedriver (apt-get install chromium chromium-driver)
test-browser: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,browser]'
	$(BIN)/python -m pytest -m "slow or not slow" tests/test_page.py

# installs the four reward packages of ours (some gigabytes) and trains on two that cannot live together
test-rewards: export TEXFORCE_HOME = $(CURDIR)/build/rewards
test-rewards: export TEXFORCE_TEST_HOME = $(TEXFORCE_HOME)
test-rewards: setup
	for name in hand face-iqa image-reward hpsv2; do $(BIN)/texforce rewards install $$name || exit 1; done
	$(BIN)/python -m pytest -m "slow or not slow" tests/test_our_plugins.py tests/test_parity.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
