"""Runs that can be killed and go on."""

import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from .devices import derive_seed, leads
from .files import Checkpoint, load_checkpoint, save_checkpoint, writing
from .flags import fail
from .logs import check_finite

try:
    import fcntl
except ImportError:  # not on Windows, where nothing keeps two processes out of one run
    fcntl = None

# flags in which a resumed run may differ from the one that it goes on with
MAY_DIFFER = {"device", "compile", "data_dir", "runs_dir", "experts_dir", "checkpoint_minutes", "resume"}


class Captured:
    """A part's state as it is now, for a RunState.save() that comes when the part has gone on."""

    def __init__(self, part):
        self.state = part_state(part)

    def state_dict(self):
        return self.state


def part_state(part):
    return part.get_state() if isinstance(part, torch.Generator) else part.state_dict()


class RunState:
    """The whole state of a run in <folder>/<name>_state.pt, there from its start to its end, so that --resume can go on.

        run_state = RunState(folder, name, args)
        parts = dict(model=model, optimizer=optimizer, ...)  # each with state_dict() and load_state_dict(), or a torch.Generator
        run_state.load(parts)
        for step in range(run_state.step + 1, steps + 1):
            ...
            if run_state.due():
                run_state.save(step, parts, plain=values)  # the next run finds them in run_state.values
        run_state.finish()

    SIGTERM and Ctrl-C: the run saves and stops where it next asks due(), or at once where it does not ask; a second one stops
    it at once. While it lasts, no other process can run the same in this folder.

    Under torchrun rank 0 alone writes and takes the lock; the others read its state to go on from, and stop when it says so.
    """

    def __init__(self, folder, name, args):
        self.path, self.kind, self.args = Path(folder) / f"{name}_state.pt", f"{name}_state", args
        self.flags = {flag: str(value) for flag, value in vars(args).items() if flag not in MAY_DIFFER}
        self.step, self.values, self.saved = 0, {}, {}
        self.signal, self.stop, self.asking, self.time = None, None, False, time.monotonic()
        if leads():
            self._lock(folder, name)
        self.others = self.path.exists() and not args.resume  # a state that is not this run's
        if self.others:
            minutes = f"{args.checkpoint_minutes:g} minutes"
            print(f"note: {self.path} is of an unfinished run, to be overwritten in {minutes}; to go on with that run, pass --resume")
        elif self.path.exists():
            self._read()
        self.handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        if self.handlers[signal.SIGINT] == signal.SIG_IGN:  # a job in the background, whose terminal's Ctrl-C is not meant for it
            del self.handlers[signal.SIGINT]
        for number in self.handlers:
            signal.signal(number, self._on_signal)

    def _lock(self, folder, name):
        with writing(folder):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.lock = open(Path(folder) / f".{name}.lock", "a")
        try:
            if fcntl:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it when the process ends, however it does
        except OSError:
            fail(f"another process runs {name} in {folder}; wait for it, or give this one its own --runs-dir")

    def _read(self):
        content = load_checkpoint(self.path, self.kind, self.args.game, "the same command without --resume")
        for flag in self.flags | content["flags"]:
            was, now = content["flags"].get(flag, "absent"), self.flags.get(flag, "absent")
            if was != now:
                flag = "--" + flag.replace("_", "-")
                fail(f"{flag} is {now}, but {self.path} is of a run with {was}; go on with that, or start anew without --resume")
        self.step, self.values, self.saved = content["step"], Checkpoint(content["values"], content.path, content.made_by), content
        print(f"resume: {self.path} is at step {self.step:,}")

    def finished(self, product):
        """Whether --resume has nothing to do: the `product` of the run is there, and no state."""
        done = self.args.resume and not self.path.exists() and Path(product).exists()
        if done:
            print(f"resume: nothing to do, {product} is finished; to make it anew, leave --resume out")
            self.finish()
        return done

    def begin(self):
        """From here on the run has left a trace, by which --resume knows that older products are not its own."""
        if leads() and not self.path.exists():
            save_checkpoint(self.path, kind=self.kind, game=self.args.game, flags=self.flags, step=0, values={}, parts={}, rng={})

    def load(self, parts):
        """Puts the state that --resume found, if any, into `parts` and the random number generators."""
        self.begin()
        saved, self.saved = self.saved, {}
        if not saved or not saved["parts"]:
            return
        try:
            for name, part in parts.items():
                content = saved["parts"][name]
                if not isinstance(part, torch.Generator):
                    part.load_state_dict(content)
                elif content.shape == part.get_state().shape:
                    part.set_state(content)
                else:  # of another kind of device
                    part.manual_seed(derive_seed(self.args.seed, f"resume at {self.step}"))
            random.setstate(saved["rng"]["python"])
            np.random.set_state(saved["rng"]["numpy"])
            torch.set_rng_state(saved["rng"]["torch"])
            for device, state in enumerate(saved["rng"]["cuda"][: torch.cuda.device_count()]):
                torch.cuda.set_rng_state(state, device)
        except Exception as error:  # what a state of other code may lack or hold has many names
            fail(f"{self.path} does not fit this version of the code ({type(error).__name__}); start anew without --resume")

    def due(self, last=False):
        """Whether to save at the end of this step: it is time, the run was told to stop, or nothing will ask after this."""
        self.asking = not last
        self.stop = self.signal
        due = last or self.stop is not None or time.monotonic() - self.time > 60 * self.args.checkpoint_minutes
        if dist.is_initialized():  # all stop at the same step, when rank 0 does; a tensor on the CPU waits for no GPU
            word = torch.tensor([due, self.stop or 0])
            dist.broadcast(word, src=0)
            due, self.stop = word.tolist()
        return bool(due)

    def save(self, step, parts, **values):
        """Writes the state after `step`; values: tensors and plain values. Ends the run if it was told to stop."""
        check_finite(step, self.path, *(part for part in parts.values() if isinstance(part, torch.nn.Module)))
        if leads() and not (self.stop and self.others):  # who stops a run so soon may have meant the one that lies there
            kind, key, *rest = np.random.get_state()
            cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
            save_checkpoint(
                self.path, kind=self.kind, game=self.args.game, flags=self.flags, step=step, values=values,
                parts={name: part_state(part) for name, part in parts.items()},
                rng=dict(python=random.getstate(), numpy=(kind, key.tolist(), *rest), torch=torch.get_rng_state(), cuda=cuda),
            )  # fmt: skip
            self.step, self.others, self.time = step, False, time.monotonic()
        if self.stop:
            self._stop()

    def _on_signal(self, number, _):
        if self.asking and not leads():  # torchrun tells every process; rank 0 will say at which step
            return
        self._restore_handlers()
        self.signal = number
        if not self.asking:
            self.stop = number
            self._stop()
        os.write(2, b"\nstops at the end of this step; once more stops it at once\n")  # print() may not be called in a handler

    def _restore_handlers(self):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _stop(self):
        where = f"{self.path} is still of the run before" if self.others else f"{self.path} is at step {self.step:,}"
        if leads():
            tqdm.write(f"stopped: {where}; go on with --resume", file=sys.stderr)
        raise SystemExit(128 + self.stop)

    def finish(self):
        """The run has done all that it had to."""
        if leads():
            self.path.unlink(missing_ok=True)
            self.lock.close()
        self._restore_handlers()
