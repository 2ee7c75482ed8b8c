"""What a run tells while it lasts."""

import csv
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from .devices import leads
from .files import write_bytes, writing
from .flags import fail


def perplexity(share):
    """How many are in use, in effect: share [K] (sums to 1) -> 1 where one has all, K where all have the same."""
    return float(np.exp(-(share * np.log(share + 1e-10)).sum()))


def check_finite(step, last_good, *modules):
    """Ends the run if a weight is no longer finite; `last_good` names the file that so is not overwritten.

    A loss that is not finite leaves such weights behind for good, so it need not be looked for at every step.
    """
    finite = [weight.isfinite().all() for module in modules for weight in module.state_dict().values()]
    if finite and not torch.stack(finite).all():  # one wait for the GPU
        fail(f"the loss is no longer finite at step {step}; {last_good} keeps what was good; try a lower learning rate")


def progress_bar(total, unit, description=None):
    """tqdm's bar; where nobody watches (a log file) it prints seldom."""
    pace = 0.5 if sys.stderr.isatty() else 20.0
    return tqdm(total=total, unit=unit, desc=description, dynamic_ncols=True, mininterval=pace, disable=not leads())


def track(items, unit, description, total=None):
    """Iterates over `items` behind a progress bar; `total` tells how many they are where len() cannot."""
    with progress_bar(len(items) if total is None else total, unit, description) as bar:
        for item in items:
            yield item
            bar.update()


class MetricsLog:
    """A progress bar with rate and time left; each write() goes to the screen and, as a row, to a CSV file."""

    def __init__(self, path, total, unit):
        self.path = Path(path)
        if leads():
            write_bytes(self.path, b"")
        self.bar = progress_bar(total, unit)

    def state_dict(self):
        return dict(csv=self.path.read_bytes().decode(), done=self.bar.n)

    def load_state_dict(self, saved):
        if leads():
            write_bytes(self.path, saved["csv"].encode())  # rows that came after the state are gone, to be written anew
        self.bar.n = self.bar.initial = saved["done"]

    def write(self, **row):
        if row.get("episodes") == 0:
            self.bar.write("note: no episode has ended since the last row, so its return is nan; rows of more steps would have one")
        row = {key: float(value) if isinstance(value, torch.Tensor) else value for key, value in row.items()}
        with writing(self.path), open(self.path, "a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
        self.bar.write("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()))
