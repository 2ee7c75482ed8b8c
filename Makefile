# make demo                  the whole method on real Procgen, on a CPU, in minutes
# make test                  style check and tests
# make paper GAME=bigfish    the same chain at the paper's settings, with baselines and ablation
# make laptop GAME=miner     the same at laptop scale, with controls: maze, heist, miner or plunder
# make laptop-ablations      its ablations and ILPO, after that
# make figures RUNS=runs     the paper's figures from what lies there
# PYTHON=python3.11 picks the interpreter, SEED=2 another seed.

SHELL := /bin/bash
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
GAME ?= bigfish
SEED ?= 1
RUNS ?= runs
PY := .venv/bin/python

DEMO_PARTS = demo-lapo demo-untrained demo-online demo-pictures
.PHONY: demo $(DEMO_PARTS) test paper laptop laptop-ablations figures
test: .venv/installed
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	$(PY) -m pytest -q

# The stamp is written last, so that an install that was cut short is repeated. A symlink goes first:
# --clear would empty what it points to.
.venv/installed: requirements.txt
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
		|| { echo "error: '$(or $(PYTHON),python3)' has no Procgen wheel; Python 3.10, 3.11 and 3.12 have one: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@[ ! -L .venv ] || rm .venv
	$(PYTHON) -m venv --clear .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

# The paper's method with smaller flags: miner on all levels in plain pictures at 32x32, played by
# a solver, small networks in stage 1. How game and flags were chosen: results/LOG.md.
DEMO = --game miner --seed $(SEED) --device cpu --data-dir demo/data --runs-dir demo/$(1)
DEMO_1 = --batch-size 64 --lr 1e-3 --multiplier 0.5 --fdm-width 8 --vq-decay 0.99 --predict-change --z-std 0.2
DEMO_2 = --grad-steps 2500 --lr 1e-3 --multiplier 1 --warmup-steps 100 --standardize --eval-every 1000
DEMO_3 = --labels 16 256 --decoder-seeds 3 --episodes 32
# Two chains run side by side with one thread each: networks of this size gain nothing from two.
demo $(DEMO_PARTS): export OMP_NUM_THREADS = 1
demo: .venv/installed
	@echo "The demo takes about 15 minutes on 2 CPU cores, 4 GB of memory and 0.2 GB of disk."
	$(PY) collect_data.py $(call DEMO,runs) --solver --plain --frame-size 32 --train-frames 262_144 --test-frames 16_384 --random-frames 16_384 --overwrite
	@echo "LAPO; beside it the same on an untrained IDM, a control: demo/untrained.log"
	$(MAKE) -j2 demo-lapo demo-untrained
	@echo "LAPO decoded online; beside it the pictures: demo/pictures.log"
	$(MAKE) -j2 demo-online demo-pictures
	@echo "Another control: cloning the labelled frames alone. Then the table."
	$(PY) -m baselines.label_efficiency $(call DEMO,runs) $(DEMO_3) --methods bc --untrained-dir demo/untrained --labelled-steps 300 --clone-lr 1e-3
	@grep -E '^(random_|fdm_mse)' demo/pictures.log
demo-lapo:
	$(PY) train_latent_dynamics.py $(call DEMO,runs) $(DEMO_1) --grad-steps 1250 --eval-every 250
	$(PY) train_latent_bc.py $(call DEMO,runs) $(DEMO_2)
	$(PY) decode_offline.py $(call DEMO,runs) $(DEMO_3)
demo-untrained:
	$(PY) train_latent_dynamics.py $(call DEMO,untrained) $(DEMO_1) --grad-steps 0 > demo/untrained.log 2>&1
	$(PY) train_latent_bc.py $(call DEMO,untrained) $(DEMO_2) >> demo/untrained.log 2>&1
	$(PY) decode_offline.py $(call DEMO,untrained) $(DEMO_3) >> demo/untrained.log 2>&1
demo-online:
	$(PY) decode_online_ppo.py $(call DEMO,runs) --env-steps 131_072 --hidden-lr-ramp 50_000 80_000 0.1 --log-every-steps 16_384
demo-pictures:
	$(PY) visualize_latents.py $(call DEMO,runs) --supervised-steps 500 > demo/pictures.log 2>&1

# Folders as results/plot_figures.py reads them: runs/<variant>/seed_<n>/<game>
RUN = --game $(GAME) --seed $(SEED) --runs-dir runs/$(1)/seed_$(SEED)
paper: .venv/installed
	$(PY) collect_data.py --game $(GAME) --resume  # seeds share the frames
	$(PY) train_latent_dynamics.py $(call RUN,lapo) --resume
	$(PY) train_latent_bc.py $(call RUN,lapo) --resume
	$(PY) decode_offline.py $(call RUN,lapo)
	$(PY) decode_online_ppo.py $(call RUN,lapo) --method rl_sl --resume
	$(PY) decode_online_ppo.py $(call RUN,lapo) --method rl --resume
	$(PY) visualize_latents.py $(call RUN,lapo)
	$(PY) train_latent_dynamics.py $(call RUN,no_vq) --no-vq --resume
	$(PY) train_latent_bc.py $(call RUN,no_vq) --resume
	$(PY) decode_online_ppo.py $(call RUN,no_vq) --method rl --resume
	$(PY) visualize_latents.py $(call RUN,no_vq)
	$(PY) train_latent_dynamics.py $(call RUN,untrained) --grad-steps 0
	$(PY) train_latent_bc.py $(call RUN,untrained) --resume
	$(PY) decode_offline.py $(call RUN,untrained)
	$(PY) -m baselines.label_efficiency $(call RUN,lapo) --methods bc bc_all --untrained-dir runs/untrained/seed_$(SEED)
	$(PY) -m baselines.train_ilpo $(call RUN,ilpo) --resume
	$(PY) decode_online_ppo.py $(call RUN,ilpo) --method rl --resume
	$(PY) collect_data.py $(call RUN,scratch) --train-frames 0 --expert-steps 4_000_000 --expert-multiplier 4 --experts-dir runs/scratch/seed_$(SEED) --resume

# Laptop scale: plain pictures at 32x32, all levels, small networks, recordings of a solver.
SMALL = --game $(GAME) --seed $(SEED) --data-dir laptop/data --runs-dir laptop/runs/$(1)/seed_$(SEED)
SMALL_1 = --multiplier 0.5 --fdm-width 8 --batch-size 64 --lr 1e-3 --vq-decay 0.99 --predict-change --z-std 0.2 --eval-every 500
SMALL_STEPS = --grad-steps $(if $(filter heist plunder,$(GAME)),6000,2000)
SMALL_2 = --multiplier 1 --grad-steps 5000 --lr 1e-3 --warmup-steps 100 --standardize --eval-every 1000
SMALL_3 = --labels 16 64 256 1024 --decoder-seeds 3
laptop: .venv/installed
	$(PY) collect_data.py --game $(GAME) --data-dir laptop/data --solver --plain --frame-size 32 --train-frames 262_144 --test-frames 16_384 --random-frames 65_536 --resume
	$(PY) train_latent_dynamics.py $(call SMALL,lapo) $(SMALL_1) $(SMALL_STEPS) --resume
	$(PY) train_latent_bc.py $(call SMALL,lapo) $(SMALL_2) --resume
	$(PY) decode_offline.py $(call SMALL,lapo) $(SMALL_3)
	$(PY) train_latent_dynamics.py $(call SMALL,untrained) $(SMALL_1) --grad-steps 0
	$(PY) train_latent_bc.py $(call SMALL,untrained) $(SMALL_2) --resume
	$(PY) decode_offline.py $(call SMALL,untrained) $(SMALL_3)
	$(PY) -m baselines.label_efficiency $(call SMALL,lapo) $(SMALL_3) --methods bc bc_all --clone-steps 5000 --untrained-dir laptop/runs/untrained/seed_$(SEED) --labelled-steps 300 --clone-lr 1e-3
	$(PY) decode_online_ppo.py $(call SMALL,lapo) --method rl_sl --env-steps 524_288 --log-every-steps 32_768 --resume
	$(PY) visualize_latents.py $(call SMALL,lapo) --supervised-steps 500
	$(PY) collect_data.py $(call SMALL,scratch) --train-frames 0 --plain --frame-size 32 --expert-steps 524_288 --expert-multiplier 0.5 --experts-dir laptop/runs/scratch/seed_$(SEED) --minibatches 16 --resume

laptop-ablations: .venv/installed
	$(PY) decode_online_ppo.py $(call SMALL,lapo) --method rl --env-steps 524_288 --log-every-steps 32_768 --resume
	$(PY) train_latent_dynamics.py $(call SMALL,no_vq) $(SMALL_1) $(SMALL_STEPS) --no-vq --resume
	$(PY) train_latent_bc.py $(call SMALL,no_vq) $(SMALL_2) --resume
	$(PY) decode_online_ppo.py $(call SMALL,no_vq) --method rl --env-steps 524_288 --log-every-steps 32_768 --resume
	$(PY) visualize_latents.py $(call SMALL,no_vq) --supervised-steps 0
	$(PY) -m baselines.train_ilpo $(call SMALL,ilpo) --latents 5 --multiplier 0.5 --fdm-width 8 --batch-size 32 --grad-steps 2000 --lr 1e-3 --eval-every 500 --resume
	$(PY) decode_online_ppo.py $(call SMALL,ilpo) --method rl --env-steps 524_288 --log-every-steps 32_768 --resume

figures: .venv/installed
	$(PY) results/plot_figures.py --runs-dir $(RUNS)
