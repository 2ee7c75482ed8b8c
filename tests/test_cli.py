"""The command line: help, and one clear line for input that cannot work."""

import subprocess
import sys
from pathlib import Path

import pytest
from test_copies import SCRIPTS, flags

ROOT = Path(__file__).resolve().parents[1]


def run(script, *arguments, cwd=ROOT):
    return subprocess.run([sys.executable, ROOT / script, *arguments], cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_flag(script):
    answer = run(script, "--help")
    assert answer.returncode == 0, answer.stderr
    for flag in flags(SCRIPTS[script]):
        assert "--" + flag.replace("_", "-") in answer.stdout, flag


@pytest.mark.parametrize(
    "arguments, line",
    [
        (("train_latent_bc.py", "--game", "bigfsh"), "error: no Procgen game is called 'bigfsh'; did you mean bigfish"),
        (("train_latent_dynamics.py", "--game", "maze"), "make them with: python collect_data.py --game maze"),
        (("collect_data.py", "--device", "cuda:99"), "error: --device cuda:99 is not usable here"),
    ],
)
def test_bad_input_is_one_line_and_a_failure(arguments, line, tmp_path):
    answer = run(*arguments, cwd=tmp_path)
    assert answer.returncode == 1
    assert answer.stderr.startswith("error: ") and line in answer.stderr and len(answer.stderr.splitlines()) == 1
    assert "Traceback" not in answer.stdout
    assert list(tmp_path.rglob("*.npz")) == []


def test_importing_a_script_runs_nothing(tmp_path):
    names = ", ".join(Path(script).stem for script in SCRIPTS)
    answer = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {names}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert answer.returncode == 0 and answer.stdout == "" and list(tmp_path.iterdir()) == []
