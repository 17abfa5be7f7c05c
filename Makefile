# make demo       a first video with the built-in model: demo.mp4, and its contact sheet demo.png
# make test       the core tests and the linter
# make host-test  the tests inside a ComfyUI: make host-test COMFYUI_PATH=~/ComfyUI
# make oldest     the tests of video files with the oldest packages that requirements.txt allows, in .venv-oldest
# make clean      removes what these made
#
# Each sets itself up in .venv. What can be overridden, as in `make demo TORCH=torch==2.9.1`:
#   PYTHON       the Python that makes the environment (default: the first of 3.10 to 3.13 on PATH)
#   VENV         an environment to use instead of .venv; `make clean` leaves it alone
#   TORCH        what is installed if the environment has no torch: a build for the CPU, looked for at TORCH_INDEX;
#                where that cannot be reached, Linux gets the one with CUDA (several GB)
#   CUDA         1 for the torch with CUDA: make demo CUDA=1
#   HOST_PYTHON  the Python that has ComfyUI's requirements and pytest

PYTHON =
VENV = .venv
TORCH = torch==2.13.0
TORCH_INDEX = https://download.pytorch.org/whl/cpu
CUDA =
COMFYUI_PATH = ../..
RUN = $(VENV)/bin/python
HOST_PYTHON = $(RUN)

.PHONY: demo test host-test oldest clean

demo: $(VENV)/.runtime
	"$(RUN)" -m sf_core generate "a red circle moves right" --out demo.mp4 --preview demo.png

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 "$(RUN)" -m pytest tests/core tests/web
	"$(RUN)" -m ruff check .

host-test: $(VENV)/.dev
	COMFYUI_PATH="$(COMFYUI_PATH)" "$(HOST_PYTHON)" -m pytest tests/host

oldest:
	PYTHON="$(PYTHON)" sh scripts/make_venv.sh .venv-oldest
	sed 's/>=/==/' requirements.txt > .venv-oldest/oldest.txt
	.venv-oldest/bin/python -m pip install --extra-index-url "$(TORCH_INDEX)" -r .venv-oldest/oldest.txt "$(TORCH)" pytest hypothesis
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest tests/core/test_video.py tests/core/test_video_read.py \
		tests/core/test_video_write.py tests/core/test_clip_memory.py

clean:
	rm -rf .venv .venv-oldest .pytest_cache .ruff_cache .hypothesis demo.mp4 demo.png
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.runtime: requirements.txt
	PYTHON="$(PYTHON)" sh scripts/make_venv.sh "$(VENV)"
	"$(RUN)" -c "import torch" 2>/dev/null || \
		"$(RUN)" -m pip install --no-deps --retries 1 $(if $(CUDA),,--extra-index-url "$(TORCH_INDEX)") "$(TORCH)"
	"$(RUN)" -m pip install -r requirements.txt torch
	touch "$@"

$(VENV)/.dev: $(VENV)/.runtime requirements-dev.txt
	"$(RUN)" -m pip install -r requirements-dev.txt
	touch "$@"
