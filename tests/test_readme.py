"""The README and the Makefile: every file, script and flag that they name is there."""

import re

from conftest import ROOT
from test_copies import SCRIPTS, flags

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


def known_flags(script):
    """The flags of a script, with those of the Args classes that its own one is made from."""
    source = (ROOT / script).read_text()
    known = spellings(source) | spellings(SCRIPTS["common.py"])
    if "decode_offline.Args" in source:
        known |= spellings(SCRIPTS["decode_offline.py"])
    return known


def test_commands_have_the_flags_that_they_use():
    text = (README + MAKEFILE).replace("\\\n", " ")
    commands = re.findall(r"(?:python|\$\(PY\)) (\w+\.py|-m [\w.]+)([^\n#`|]*)", text)
    assert len(commands) > 40
    for command, rest in commands:
        if command == "-m pytest":
            continue
        script = command.removeprefix("-m ").replace(".", "/") + ".py"
        script = command if command.endswith(".py") else script
        assert set(re.findall(r"(?<=\s)--[a-z][a-z-]+", rest)) <= known_flags(script), command


def test_readme_is_short():
    words = re.sub(r"<!-- table.*?<!-- end -->|```.*?```", "", README, flags=re.DOTALL).split()
    assert len(words) <= 1200
