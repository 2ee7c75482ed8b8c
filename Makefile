# make play                  a page in the browser: latent actions, from weights that are shipped
# make demo                  the whole method on real Procgen, on a CPU, in minutes
# make test                  the tests; make lint: the style
# make laptop GAME=miner     the method and its controls in default pictures at 32x32 on a CPU
# make laptop-ablations      VPT, LAPO+, RL alone, no VQ, ILPO and PPO from scratch, after that
# make paper GAME=bigfish    the same chain at the paper's settings
# make figures RUNS=runs     tables and figures of what lies there
# PYTHON=python3.11 picks the interpreter, SEED=2 another seed.

SHELL := /bin/bash
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
GAME ?= bigfish
SEED ?= 1
RUNS ?= runs
PY := .venv/bin/python

DEMO_TASKS := $(addprefix demo-,stage-1 stage-2 offline online pictures clone untrained)
.PHONY: play demo $(DEMO_TASKS) test lint laptop laptop-ablations paper figures

# The stamp is written last, so that an install that was cut short is repeated. A symlink goes first:
# --clear would empty what it points to.
.venv/installed: requirements.txt
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
		|| { echo "error: '$(or $(PYTHON),python3)' has no Procgen wheel; Python 3.10, 3.11 and 3.12 have one: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@[ ! -L .venv ] || rm .venv
	$(PYTHON) -m venv --clear .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

test: .venv/installed
	$(PY) -m pytest -q

lint: .venv/installed
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .

play: .venv/installed
	$(PY) -m extras.play_latents --game miner --data-dir assets/data --runs-dir assets/runs

# --- demo: miner on all levels in plain pictures at 32x32, played by a solver. Two tasks at a time,
# with one thread each: networks of this size gain nothing from two.
DEMO = --game miner --seed $(SEED) --device cpu --data-dir demo/data --runs-dir demo/$(1)
DEMO_1 = --batch-size 64 --lr 1e-3 --multiplier 0.5 --fdm-width 8 --vq-decay 0.99 --predict-change --z-std 0.2
DEMO_2 = --grad-steps 2500 --lr 1e-3 --multiplier 1 --warmup-steps 100 --standardize --eval-every 1000
demo $(DEMO_TASKS): export OMP_NUM_THREADS = 1
demo: .venv/installed
	rm -rf demo && mkdir demo
	$(PY) collect_data.py $(call DEMO,runs) --solver --plain --frame-size 32 --train-frames 131_072 --test-frames 16_384 --random-frames 16_384
	@echo "LAPO and its controls, two tasks at a time; those of the controls write to demo/*.log"
	$(MAKE) --no-print-directory -j2 $(DEMO_TASKS)
	$(PY) -m extras.demo_table $(call DEMO,runs)
demo-stage-1:
	$(PY) train_latent_dynamics.py $(call DEMO,runs) $(DEMO_1) --grad-steps 1500 --eval-every 250
demo-stage-2: demo-stage-1
	$(PY) train_latent_bc.py $(call DEMO,runs) $(DEMO_2)
demo-offline: demo-stage-2
	$(PY) decode_offline.py $(call DEMO,runs) --labels 16 256 --decoder-seeds 3 --episodes 32 --capture-video
demo-online: demo-offline
	$(PY) decode_online_ppo.py $(call DEMO,runs) --env-steps 98_304 --hidden-lr-ramp 50_000 80_000 0.1 --log-every-steps 32_768 --eval-episodes 16
demo-pictures: demo-stage-1
	$(PY) visualize_latents.py $(call DEMO,runs) --points 2048 > demo/pictures.log 2>&1
	$(PY) -m extras.rollouts $(call DEMO,runs) >> demo/pictures.log 2>&1
demo-clone: demo-stage-2
	$(PY) -m baselines.label_efficiency $(call DEMO,runs) --methods bc --labels 256 --decoder-seeds 2 --episodes 16 --labelled-steps 300 --clone-lr 1e-3 --capture-video > demo/clone.log 2>&1
demo-untrained:
	$(PY) train_latent_dynamics.py $(call DEMO,untrained) $(DEMO_1) --grad-steps 0 > demo/untrained.log 2>&1
	$(PY) train_latent_bc.py $(call DEMO,untrained) $(DEMO_2) >> demo/untrained.log 2>&1
	$(PY) decode_offline.py $(call DEMO,untrained) --labels 256 --decoder-seeds 2 --episodes 16 >> demo/untrained.log 2>&1

# --- laptop scale: default pictures at 32x32, all levels, recordings of a solver, for each seed its
# own. Folders as extras/summarize.py reads them: runs/<variant>/seed_<n>/<game>
SMALL = --game $(GAME) --seed $(SEED) --data-dir laptop/data/seed_$(SEED) --runs-dir laptop/runs/$(1)/seed_$(SEED)
SMALL_1 = --multiplier 1 --fdm-width 12 --batch-size 64 --lr 1e-3 --vq-decay 0.99 --predict-change --eval-every 500
SMALL_STEPS = --grad-steps $(if $(filter bigfish,$(GAME)),15_000,6000)# docs/lessons.md, 10
SMALL_VQ = --z-std 0.2  # without VQ it hurt on miner (docs/lessons.md, 9)
SMALL_2 = --multiplier 1 --grad-steps 15_000 --lr 1e-3 --warmup-steps 100 --standardize --eval-every 1000
SMALL_3 = --labels 16 64 256 1024 --decoder-seeds 3
SMALL_CLONE = --clone-steps 15_000 --labelled-steps 300 --clone-lr 1e-3
SMALL_ONLINE = --env-steps 524_288 --log-every-steps 65_536
laptop: .venv/installed
	$(PY) collect_data.py $(call SMALL,lapo) --solver $(if $(filter bigfish,$(GAME)),--one-theme) --frame-size 32 --train-frames 262_144 --test-frames 16_384 --random-frames 65_536 --resume
	$(PY) train_latent_dynamics.py $(call SMALL,lapo) $(SMALL_1) $(SMALL_VQ) $(SMALL_STEPS) --resume
	$(PY) train_latent_bc.py $(call SMALL,lapo) $(SMALL_2) --resume
	$(PY) decode_offline.py $(call SMALL,lapo) $(SMALL_3)
	$(PY) train_latent_dynamics.py $(call SMALL,untrained) $(SMALL_1) $(SMALL_VQ) --grad-steps 0
	$(PY) train_latent_bc.py $(call SMALL,untrained) $(SMALL_2) --resume
	$(PY) decode_offline.py $(call SMALL,untrained) $(SMALL_3)
	$(PY) -m baselines.label_efficiency $(call SMALL,lapo) $(SMALL_3) $(SMALL_CLONE) --methods bc bc_all
	$(PY) decode_online_ppo.py $(call SMALL,lapo) --method rl_sl $(SMALL_ONLINE) --resume
	$(PY) visualize_latents.py $(call SMALL,lapo)

# VPT and LAPO+ clone all frames for each number of labels and each seed, so there are fewer of them
laptop-ablations: .venv/installed
	$(PY) -m baselines.label_efficiency $(call SMALL,lapo) $(SMALL_CLONE) --labels 16 256 --decoder-seeds 1 --methods vpt lapo_plus
	$(PY) decode_online_ppo.py $(call SMALL,lapo) --method rl $(SMALL_ONLINE) --resume
	$(PY) train_latent_dynamics.py $(call SMALL,no_vq) $(SMALL_1) $(SMALL_STEPS) --no-vq --resume
	$(PY) train_latent_bc.py $(call SMALL,no_vq) $(SMALL_2) --resume
	$(PY) decode_offline.py $(call SMALL,no_vq) $(SMALL_3)
	$(PY) decode_online_ppo.py $(call SMALL,no_vq) --method rl $(SMALL_ONLINE) --resume
	$(PY) -m baselines.train_ilpo $(call SMALL,ilpo) --latents 5 --multiplier 1 --fdm-width 12 --batch-size 64 $(SMALL_STEPS) --lr 1e-3 --eval-every 500 --resume
	$(PY) decode_online_ppo.py $(call SMALL,ilpo) --method rl $(SMALL_ONLINE) --resume
	$(PY) collect_data.py $(call SMALL,scratch) --train-frames 0 $(if $(filter bigfish,$(GAME)),--one-theme) --frame-size 32 --expert-steps 524_288 --log-every-steps 65_536 --expert-multiplier 1 --experts-dir laptop/runs/scratch/seed_$(SEED) --minibatches 16 --resume

# --- the paper's settings
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
	$(PY) -m baselines.label_efficiency $(call RUN,lapo) --methods bc bc_all
	$(PY) -m baselines.train_ilpo $(call RUN,ilpo) --resume
	$(PY) decode_online_ppo.py $(call RUN,ilpo) --method rl --resume
	$(PY) collect_data.py $(call RUN,scratch) --train-frames 0 --expert-steps 4_000_000 --expert-multiplier 4 --experts-dir runs/scratch/seed_$(SEED) --resume

figures: .venv/installed
	$(PY) -m extras.summarize --runs-dir $(RUNS) --output-dir $(RUNS)
	$(PY) -m extras.plot_figures --results-dir $(RUNS)
