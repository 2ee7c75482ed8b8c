# make demo    the whole method on real Procgen, on a CPU, in minutes
# make test    the tests
# make paper GAME=bigfish    the same chain at the paper's settings
# PYTHON=python3.11 picks the interpreter, SEED=2 another seed.

SHELL := /bin/bash
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
GAME ?= bigfish
SEED ?= 1
PY := .venv/bin/python

.PHONY: demo test paper
test: .venv/installed
	$(PY) -m pytest -q tests

# The stamp is the last thing written, so an install that was cut short is done again, and a whole one is not.
.venv/installed: requirements.txt
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
		|| { echo "error: '$(or $(PYTHON),python3)' has no Procgen wheel; Python 3.10, 3.11 and 3.12 have one: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

# The demo is the paper's method with smaller flags: few levels at 32x32, half-width networks, experts/32x32/.
# CoinRun (its picture moves with the agent) goes through all stages; miner (its actions show at once) shows on its own that
# what stage 1 finds are actions, with t-SNE because UMAP compiles for half a minute. results/LOG.md tells how games and flags were chosen.
DEMO := --game coinrun --seed $(SEED) --device cpu --data-dir demo/data --runs-dir demo/runs
MINER := $(subst coinrun,miner,$(DEMO))
demo: .venv/installed
	@echo "The demo takes 12 to 15 minutes on 2 CPU cores, 3 GB of memory and 0.5 GB of disk."
	$(PY) collect_data.py $(MINER) --train-frames 98_304 --test-frames 16_384 --frame-size 32 --experts-dir experts/32x32 --num-levels 10
	$(PY) train_latent_dynamics.py $(MINER) --grad-steps 3000 --batch-size 64 --lr 1e-3 --multiplier 0.5 --fdm-width 8 --vq-decay 0.99 --predict-change --eval-every 500
	set -o pipefail; $(PY) visualize_latents.py $(MINER) --supervised-steps 500 --projection tsne | tee demo/miner.txt
	$(PY) collect_data.py $(DEMO) --train-frames 98_304 --test-frames 16_384 --frame-size 32 --experts-dir experts/32x32 --num-levels 5
	$(PY) train_latent_dynamics.py $(DEMO) --grad-steps 3000 --batch-size 64 --lr 1e-3 --multiplier 0.5 --fdm-width 8 --vq-decay 0.99 --eval-every 500
	$(PY) train_latent_bc.py $(DEMO) --grad-steps 2000 --lr 1e-3 --multiplier 0.5 --warmup-steps 100 --eval-every 500
	$(PY) decode_offline.py $(DEMO) --labels 16 64 256 1024 --decoder-seeds 3
	$(PY) decode_online_ppo.py $(DEMO) --env-steps 131_072 --hidden-lr-ramp 50_000 80_000 0.1 --log-every-steps 16_384
	$(PY) visualize_latents.py $(DEMO) --supervised-steps 500
	@echo; sed -n '/^in demo/d; /all on held-out/,$$p' demo/miner.txt
	@echo "Paper scale (make paper GAME=...) adds: all levels at 64x64, an expert of 25M steps, 8M frames, networks 3 to 8 times as wide,"
	@echo "9M windows in place of 0.2M, and 4M steps of online decoding; it needs a GPU."

paper: .venv/installed
	$(PY) collect_data.py --game $(GAME) --seed $(SEED)
	$(PY) train_latent_dynamics.py --game $(GAME) --seed $(SEED)
	$(PY) train_latent_bc.py --game $(GAME) --seed $(SEED)
	$(PY) decode_offline.py --game $(GAME) --seed $(SEED)
	$(PY) decode_online_ppo.py --game $(GAME) --seed $(SEED) --method rl_sl
	$(PY) decode_online_ppo.py --game $(GAME) --seed $(SEED) --method rl
	$(PY) decode_online_ppo.py --game $(GAME) --seed $(SEED) --method scratch
	$(PY) train_ilpo.py --game $(GAME) --seed $(SEED)
	$(PY) decode_online_ppo.py --game $(GAME) --seed $(SEED) --method ilpo
	$(PY) visualize_latents.py --game $(GAME) --seed $(SEED)
