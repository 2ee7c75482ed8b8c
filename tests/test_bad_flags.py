"""Command lines that cannot work: each ends in one line that names the flag, before any file is written."""

import subprocess
import sys
from pathlib import Path

import pytest
import tyro

import collect_data
import common
import decode_offline
import decode_online_ppo
import train_ilpo
import train_latent_bc
import train_latent_dynamics
import visualize_latents
from test_decode_online import write_checkpoints

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = dict(
    collect=collect_data, dynamics=train_latent_dynamics, bc=train_latent_bc, offline=decode_offline, online=decode_online_ppo,
    visualize=visualize_latents, ilpo=train_ilpo,
)  # fmt: skip

# script, its flags, what the line must hold; {file} is a file, {runs} holds checkpoints of coinrun at 32x32
CASES = """
collect     --game bigfsh                        | no Procgen game is called 'bigfsh'; did you mean bigfish
dynamics    --game Maze                          | did you mean maze
bc          --game coin-run                      | did you mean coinrun
offline     --game starpilots                    | did you mean starpilot
online      --game ""                            | no Procgen game is called ''
visualize   --game ../maze                       | no Procgen game is called '../maze'
collect     --device cuda:99                     | --device cuda:99 is not usable here
dynamics    --device toaster                     | --device toaster is not usable here
bc          --device cuda:99                     | try --device cpu
collect     --seed -1                            | --seed -1 must be
dynamics    --seed 99999999999                   | --seed 99999999999 is too large
collect     --train-frames -5                    | --train-frames -5 must be a finite number, 0 or above
collect     --test-frames 0                      | --test-frames 0 must be a finite number, above 0
collect     --num-envs 0                         | --num-envs 0
collect     --num-envs -64                       | --num-envs -64
collect     --rollout-steps 0                    | --rollout-steps 0
collect     --minibatches 7                      | a rollout of 16384 steps does not divide into --minibatches 7
collect     --num-envs 1 --minibatches 256       | --minibatches 256 of 2 or more
collect     --expert-lr 0                        | --expert-lr 0.0 must be
collect     --expert-lr nan                      | --expert-lr nan must be a finite number
collect     --gamma 1.5                          | --gamma 1.5 must lie between 0 and 1
collect     --gamma -0.1                         | --gamma -0.1
collect     --gae-lambda 2                       | --gae-lambda 2.0 must lie between 0 and 1
collect     --clip 0                             | --clip 0.0
collect     --start-level -1                     | --start-level -1
collect     --num-levels -3                      | --num-levels -3
collect     --num-levels 3000000000              | --num-levels 3000000000 is too large
collect     --expert-multiplier 0.01             | --expert-multiplier 0.01 leaves no channel
collect     --expert-steps 0                     | --expert-steps 0
collect     --epochs 0                           | --epochs 0
collect     --checkpoint-minutes 0               | --checkpoint-minutes 0.0
collect     --data-dir {file}                    | --data-dir {file} cannot be a folder, because {file} is a file
collect     --experts-dir {file}/experts         | --experts-dir {file}/experts cannot be a folder
dynamics    --runs-dir {file}/runs               | --runs-dir {file}/runs cannot be a folder
dynamics    --runs-dir /proc/runs                | /proc/runs
dynamics    --data-dir {empty}                   | make them with: python collect_data.py --game bigfish
dynamics    --context 0                          | --context 0
dynamics    --batch-size 0                       | --batch-size 0
dynamics    --grad-steps -1                      | --grad-steps -1
dynamics    --eval-every 0                       | --eval-every 0
dynamics    --eval-windows 0                     | --eval-windows 0
dynamics    --pool-frames 0                      | --pool-frames 0
dynamics    --lr -0.001                          | --lr -0.001
dynamics    --lr inf                             | --lr inf
dynamics    --vq-decay 1.5                       | --vq-decay 1.5 must lie between 0 and 1
dynamics    --embeddings 1                       | --embeddings 1 must lie between 2 and 256
dynamics    --embeddings 1000                    | --embeddings 1000 must lie between 2 and 256
dynamics    --codebooks 0                        | --codebooks 0
dynamics    --embedding-dim 0                    | --embedding-dim 0
dynamics    --fdm-width 1                        | --fdm-width 1 must be 2 or above
dynamics    --multiplier 0                       | --multiplier 0.0
dynamics    --commitment nan                     | --commitment nan
dynamics    --max-grad-norm 0                    | --max-grad-norm 0.0
dynamics    --warmup-steps -1                    | --warmup-steps -1
bc          --runs-dir {empty}                   | make it with: python train_latent_dynamics.py --game bigfish
bc          --lr 0                               | --lr 0.0
bc          --batch-size -128                    | --batch-size -128
bc          --multiplier 0.03                    | --multiplier 0.03 leaves no channel
offline     --labels                             | --labels is empty
offline     --labels 16 0 64                     | --labels 0
offline     --decoder-seeds 0                    | --decoder-seeds 0
offline     --episodes -1                        | --episodes -1
offline     --envs-per-decoder 0                 | --envs-per-decoder 0
offline     --label-smoothing 1.1                | --label-smoothing 1.1 must lie between 0 and 1
offline     --runs-dir {empty}                   | make it with: python train_latent_bc.py --game bigfish
online      --minibatches 5                      | does not divide into --minibatches 5
online      --num-envs 0                         | --num-envs 0
online      --env-steps 0                        | --env-steps 0
online      --head-lr 0                          | --head-lr 0.0
online      --gamma nan                          | --gamma nan
online      --action-lr-ramp -1 5 0.2            | --action-lr-ramp -1
online      --hidden-lr-ramp 0 10 nan            | --hidden-lr-ramp nan
online      --scratch-multiplier 0 --method scratch | --scratch-multiplier 0.0
online      --log-every-steps 0                  | --log-every-steps 0
online      --refit-batch-size 0                 | --refit-batch-size 0
online      --game coinrun --runs-dir {runs} --value-lr-ramp 50 50 0.2    | --value-lr-ramp 50 50 must rise
online      --game coinrun --runs-dir {runs} --hidden-lr-ramp 5 9000 0.2 --env-steps 9000 | must rise, and end before --env-steps 9000
online      --game coinrun --runs-dir {runs} --refit-from 60_000 --refit-until 1000 | the decoder would never be fitted
offline     --clone-lr 0                         | --clone-lr 0.0
offline     --methods                            | --methods is empty
online      --method ilpo --no-vq                | --method ilpo has no quantiser
ilpo        --latents 1                          | --latents 1 leaves nothing to choose from
ilpo        --adam-beta1 2                       | --adam-beta1 2.0 must lie between 0 and 1
ilpo        --fdm-width 1                        | --fdm-width 1 must be 2 or above
visualize   --points 0                           | --points 0
visualize   --supervised-steps -1                | --supervised-steps -1
visualize   --runs-dir {file}                    | --runs-dir {file} cannot be a folder
"""
CASES = [[part.strip() for part in case.split("|")] for case in CASES.strip().splitlines()]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """What the cases' names in braces stand for."""
    root = tmp_path_factory.mktemp("flags")
    (root / "file").write_text("a file")
    (root / "empty").mkdir()
    return dict(file=root / "file", empty=root / "empty", runs=write_checkpoints(root)["runs_dir"])


def check_line(line, expected):
    assert line.startswith("error: ") and "\n" not in line and expected in line, line


@pytest.mark.parametrize("command, expected", CASES)
def test_a_bad_flag_is_one_line(command, expected, places, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    script, *words = command.format(**places).split()
    args = tyro.cli(SCRIPTS[script].Args, args=["" if word == '""' else word for word in words])
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[script].main(args)
    check_line(str(stop.value), expected.format(**places))
    assert capsys.readouterr().out == ""  # no work was done
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_there_are_enough_cases():
    assert len(CASES) >= 40 and {command.split()[0] for command, _ in CASES} == set(SCRIPTS)


@pytest.mark.parametrize("command, expected", [CASES[0], CASES[26]])
def test_the_same_as_a_process(command, expected, places, tmp_path):
    script, *words = command.format(**places).split()
    answer = subprocess.run([sys.executable, SCRIPTS[script].__file__, *words], cwd=tmp_path, capture_output=True, text=True)
    assert answer.returncode == 1 and answer.stdout == ""
    check_line(answer.stderr.rstrip("\n"), expected)
