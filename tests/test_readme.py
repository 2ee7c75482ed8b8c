"""The README: every file, script and flag that it names is there."""

import re
from pathlib import Path

import common
from test_copies import SCRIPTS, flags

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def spellings(source):
    """The flags of a script as they are typed; those that are on or off have a --no- form too."""
    typed = {flag.replace("_", "-"): kind for flag, (kind, _, _) in flags(source).items()}
    return {"--" + flag for flag in typed} | {"--no-" + flag for flag, kind in typed.items() if kind == "bool"}


def test_every_file_named_exists():
    named = set(re.findall(r"`((?:[\w.-]+/)*[\w-]+\.(?:py|md|txt|csv|png|npz|pt))`", README)) | set(re.findall(r"\]\(((?!http)[^)#]+)\)", README))
    here = {name for name in named if name.endswith((".py", ".md", ".txt")) or name.startswith(("results/", "experts/", "tests/"))}
    assert len(here) >= 8
    assert sorted(name for name in here if not (ROOT / name).exists()) == []


def test_every_flag_named_exists():
    known = {flag for source in SCRIPTS.values() for flag in spellings(source)} | {"--help"}
    known |= spellings((ROOT / "tests/benchmark.py").read_text())
    known |= {"--standalone", "--nproc-per-node"}  # torchrun's
    known |= {"--array", "--gpus", "--cpus-per-task", "--mem", "--time", "--requeue"}  # Slurm's
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    assert len(named) >= 5 and named <= known, named - known


def test_commands_use_flags_that_their_script_has():
    for text in (README, (ROOT / "Makefile").read_text()):
        commands = re.findall(r"(?:python|\$\(PY\)) (\w+\.py)([^\n#`|]*)", text)
        assert commands
        for script, rest in commands:
            assert set(re.findall(r"--[a-z-]+", rest)) <= spellings(SCRIPTS[script]), (script, rest)


def test_the_slurm_array_plays_every_game():
    assert re.search(r"games=\(([^)]*)\)", README)[1].split() == list(common.RETURNS)


def test_nothing_was_left_to_fill_in():
    assert "@@" not in README and "TODO" not in README and "@@" not in (ROOT / "Makefile").read_text()
