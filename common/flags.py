"""Bad input ends a run with one line."""

import difflib
import math
import os
from pathlib import Path

from .procgen_facts import RETURNS


def fail(message):
    """Ends the run with one line on stderr and exit status 1."""
    raise SystemExit(f"error: {message}")


def check_game(game):
    """Ends the run with the nearest names unless `game` is one of Procgen's 16."""
    if game not in RETURNS:
        near = difflib.get_close_matches(game, RETURNS, n=3, cutoff=0.4) or sorted(RETURNS)
        fail(f"no Procgen game is called '{game}'; did you mean {', '.join(near)}?")


def check_flags(args, zero=(), shares=(), writes=("runs_dir",)):
    """Ends the run with one line if a flag cannot work; every script calls it before anything else.

    Numbers must be finite and above 0, integers below 2^31. zero: flags that may be 0. shares: flags between 0 and 1.
    writes: folders that will be written.
    """
    check_game(args.game)
    for name, value in vars(args).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, Path):
            there = next(path for path in (value.absolute(), *value.absolute().parents) if os.path.exists(path))
            if not there.is_dir():
                fail(f"{flag} {value} cannot be a folder, because {there} is a file")
            if name in writes and not os.access(there, os.W_OK):
                fail(f"{flag} {value} cannot be written; choose another folder")
        if value == ():
            fail(f"{flag} is empty; give at least one value")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                continue
            at_least_0 = name in ("seed", *zero, *shares)
            if not math.isfinite(number) or number < 0 or (number == 0 and not at_least_0):
                fail(f"{flag} {number} must be a finite number, {'0 or above' if at_least_0 else 'above 0'}")
            if name in shares and number > 1:
                fail(f"{flag} {number} must lie between 0 and 1")
            if isinstance(number, int) and number >= 2**31:
                fail(f"{flag} {number} is too large; integers must be below 2^31")
            if name.endswith("multiplier") and number < 1 / 16:
                fail(f"{flag} {number} leaves no channel of the first 16; it must be 1/16 or above")
