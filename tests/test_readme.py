"""The README and the Makefile: every file, script and flag that they name is there."""

import re

from conftest import ROOT
from test_copies import BASELINES, SCRIPTS, flags

README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def spellings(source):
    """The flags of a script as they are typed."""
    typed = {flag.replace("_", "-"): kind for flag, (kind, _, _) in flags(source).items()}
    negated = [f"--no-{flag}" for flag, kind in typed.items() if kind == "bool"]
    return {*negated, *(f"--{flag}" for flag in typed)}


def test_every_file_named_exists():
    named = set(re.findall(r"`((?:[\w.-]+/)*[\w-]+\.(?:py|md|txt))`", README))
    named |= set(re.findall(r"\]\(((?!http)[^)#]+)\)", README))
    assert len(named) > 8 and sorted(name for name in named if not (ROOT / name).exists()) == []


def test_line_counts_are_true():
    rows = re.findall(r"\| `(\w+\.py)` \| (\d+) \|", README)
    assert len(rows) == len(SCRIPTS)
    for script, lines in rows:
        assert int(lines) == len(SCRIPTS[script].splitlines()), script


def test_commands_have_the_flags_that_they_use():
    text = (README + MAKEFILE).replace("\\\n", " ")
    commands = re.findall(r"(?:python|\$\(PY\)) ([\w/]+\.py|-m baselines\.\w+)([^\n#`|]*)", text)
    assert len(commands) > 20
    for script, rest in commands:
        if not script.startswith("results/"):
            name = script.removeprefix("-m baselines.").removesuffix(".py") + ".py"
            known = spellings((SCRIPTS | BASELINES)[name]) | spellings(SCRIPTS["common.py"])
            if name == "label_efficiency.py":  # its Args are decode_offline's and some more
                known |= spellings(SCRIPTS["decode_offline.py"])
            assert set(re.findall(r"(?<=\s)--[a-z][a-z-]+", rest)) <= known, (script, rest)
