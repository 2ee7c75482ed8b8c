"""How fast each stage is, what it spends its time on, and what memory it takes; at paper or demo settings, on a CPU or a GPU.

Runs the real scripts on a little data, each in a process of its own, first in eager float32 and then as shipped, and stops
them when their time is up. Nothing here is a test; `make test` does not run it.

paper scale   python tests/benchmark.py --json results/speed_h200.json
CPU sized     python tests/benchmark.py --settings demo --seconds 10
"""

import contextlib
import io
import json
import multiprocessing
import platform
import re
import resource
import shlex
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import collect_data  # noqa: E402
import common  # noqa: E402
import decode_offline  # noqa: E402
import decode_online_ppo  # noqa: E402
import train_ilpo  # noqa: E402
import train_latent_bc  # noqa: E402
import train_latent_dynamics  # noqa: E402

ENDLESS = 10**9
# stage: (script, what it counts, what makes it begin at once and never end)
STAGES = {
    "expert": (collect_data, "env steps", dict(train_frames=0, expert_steps=ENDLESS)),
    "recording": (collect_data, "env steps", dict(train_frames=ENDLESS)),
    "stage 1": (train_latent_dynamics, "windows", dict(grad_steps=ENDLESS, eval_every=ENDLESS, eval_windows=64)),
    "labelling": (train_latent_dynamics, "windows", dict(grad_steps=1, eval_windows=64)),
    "stage 2": (train_latent_bc, "frames", dict(grad_steps=ENDLESS, eval_every=ENDLESS, eval_windows=64)),
    "offline": (decode_offline, "env steps", {}),
    "online": (decode_online_ppo, "env steps", {}),
    "ILPO": (train_ilpo, "windows", dict(grad_steps=ENDLESS, eval_every=ENDLESS, eval_windows=64)),
}


@dataclass
class Args:
    settings: Literal["paper", "demo"] = "paper"
    """The scripts' defaults, or the flags that `make demo` gives them."""
    stages: tuple[str, ...] = tuple(STAGES)
    """Which of them to time."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    seconds: float = 30
    """Time for each measurement, after the warm-up."""
    frames: int = 8192
    """Frames to record for the stages that need some."""
    json: Path | None = None
    """Also write the figures to this file."""


class TimeIsUp(BaseException):
    """Ends a script in the middle; no `except Exception` on the way may stop it."""


class Watch:
    """Counts work from the end of the warm-up until the time is up, and the time that parts of the script take."""

    def __init__(self, device, seconds, every):
        self.device, self.seconds, self.every = device, seconds, every
        self.calls, self.rounds, self.units, self.start, self.end, self.parts = 0, 0, 0, None, None, {}
        self.counter, self.flops = None, None

    def wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def count(self, units):
        """So much work is done: an update, a step of the games. Only every so many calls make a round."""
        self.calls += 1
        if self.calls % self.every:
            return
        self.rounds += 1
        if self.counter and self.rounds == 1:
            self.flops = -self.counter.get_total_flops()
        elif self.counter and self.rounds == 2:  # a whole round lies between
            self.flops += self.counter.get_total_flops()
            self.counter.__exit__(None, None, None)
        if self.start is None:
            if self.rounds == (2 if self.every > 1 else 5):  # the warm-up is over
                self.wait()
                self.parts, self.start = {}, time.perf_counter()
            return
        self.units += units * self.every
        if time.perf_counter() - self.start > self.seconds:
            self.wait()
            self.end = time.perf_counter()
            raise TimeIsUp

    def counted(self, function, units):
        """`function`, after each call of which units(its first argument, its result) are done."""

        def call(*arguments, **keywords):
            result = function(*arguments, **keywords)
            self.count(units(arguments[0], result))
            return result

        return call

    def timed(self, part, function):
        """`function`, whose time goes to `part`. It waits for the GPU, so a run with parts is slower as a whole."""

        def call(*arguments, **keywords):
            self.wait()
            begin = time.perf_counter()
            result = function(*arguments, **keywords)
            self.wait()
            self.parts[part] = self.parts.get(part, 0.0) + time.perf_counter() - begin
            return result

        return call


@contextlib.contextmanager
def silence():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def flags_of_demo(script):
    """The flags that `make demo` gives to a script, as a list of strings; ILPO, which it leaves out, gets those of its twin."""
    makefile = (ROOT / "Makefile").read_text()
    game = re.search(r"^DEMO := --game (\w+)", makefile, re.MULTILINE)[1]
    flags = re.search(rf"\$\(PY\) {script.__name__}\.py \$\(DEMO\)(.*)", makefile)
    if flags is None:
        return ["--game", game, "--multiplier", "0.5", "--fdm-width", "8", "--batch-size", "64"]
    return ["--game", game, *shlex.split(flags[1])]


def settings_of(args, stage, folder, variant="as shipped"):
    """The Args of a stage's script."""
    script, _, endless = STAGES[stage]
    found = tyro.cli(script.Args, args=flags_of_demo(script) if args.settings == "demo" else [])
    changes = dict(runs_dir=folder / "runs", data_dir=folder / "data", device=args.device, **endless)
    if script is collect_data:
        changes |= dict(experts_dir=folder / "experts", test_frames=args.frames // 4)
    if stage in ("expert", "recording"):  # the expert is trained anew, the frames go elsewhere
        changes["experts_dir" if stage == "expert" else "data_dir"] = folder / "elsewhere"
    if variant == "eager fp32":
        changes |= {flag: value for flag, value in dict(precision="fp32", compile=False).items() if hasattr(found, flag)}
    return replace(found, **changes)


def prepare(args, folder):
    """An untrained expert, a few frames of it, and what one update of stages 1 and 2 leaves behind."""
    found = replace(settings_of(args, "recording", folder), train_frames=args.frames, data_dir=folder / "data")
    policy = collect_data.ExpertPolicy(found.frame_size, found.expert_multiplier)
    common.save_checkpoint(
        found.experts_dir / f"{found.game}.pt", kind="expert", game=found.game, env_step=0, mean_return=0.0, frame_size=found.frame_size,
        multiplier=found.expert_multiplier, start_level=found.start_level, num_levels=found.num_levels, model=policy.state_dict(),
    )  # fmt: skip
    with silence():
        collect_data.main(found)
        train_latent_dynamics.main(settings_of(args, "labelling", folder, "eager fp32"))
        train_latent_bc.main(replace(settings_of(args, "stage 2", folder, "eager fp32"), grad_steps=1))


def measure(args, stage, folder, variant, with_parts):
    """Runs one stage until its time is up, in this process. Returns its figures, as a dict."""
    script, unit, _ = STAGES[stage]
    device, found = common.pick_device(args.device), settings_of(args, stage, folder, variant)
    rollout = dict(expert="rollout_steps", online="head_rollout_steps").get(stage)
    watch = Watch(device, args.seconds, every=2 * getattr(found, rollout) if rollout else 1)  # both halves of the games act
    adam = torch.optim.Adam
    if with_parts:
        for part, owner, name in (
            ("data", common.FrameStore, "sample_windows"), ("data", common.FrameStore, "sample_latents"),
            ("games", common.ProcgenEnvs, "observe"), ("games", common.ProcgenEnvs, "act"),
            ("backward", torch.Tensor, "backward"), ("optimiser", adam, "step"), ("optimiser", torch.nn.utils, "clip_grad_norm_"),
        ):  # fmt: skip
            setattr(owner, name, watch.timed(part, getattr(owner, name)))
        if stage not in ("recording", "labelling", "offline"):
            watch.counter = FlopCounterMode(display=False).__enter__()
    if "epochs" in vars(found) or stage == "offline":  # games are played
        # the policies played before the stage's own work begins
        common.random_return, common.evaluate = lambda *_: 0.0, common.evaluate if stage == "offline" else lambda *_: np.zeros(1)
        common.ProcgenEnvs.act = watch.counted(common.ProcgenEnvs.act, lambda games, _: games.num_envs)
    elif stage == "labelling":
        script.label = watch.counted(script.label, lambda _, labels: len(labels[0]))
    else:
        adam.step = watch.counted(adam.step, lambda *_: found.batch_size)

    with contextlib.suppress(TimeIsUp), silence():
        script.main(found)
    if watch.end is None:
        raise SystemExit(f"error: {stage} was over before the warm-up or the time was; give it more --frames or fewer --seconds")
    took = watch.end - watch.start
    figures = dict(unit=unit, rate=watch.units / took, host_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
    if device.type == "cuda":
        figures["device_gb"] = torch.cuda.max_memory_allocated(device) / 2**30
    if with_parts:
        figures["parts"] = {part: seconds / took for part, seconds in watch.parts.items()}
        figures["parts"]["forward and the rest"] = 1 - sum(figures["parts"].values())
        if watch.flops:
            figures["flops_per_unit"] = watch.flops / (found.num_envs * getattr(found, rollout) if rollout else found.batch_size)
    return figures


def in_a_process(function, *arguments):
    """function(*arguments) in a fresh process, so that memory and patches are its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes:
        return processes.submit(function, *arguments).result()


def peak(args, dtype):
    """Arithmetic peak of the device in multiplications and additions a second, as a large matrix product or convolution reaches it.

    Both, because on some CPUs the library for one of them is far slower than that for the other.
    """
    device = common.pick_device(args.device)
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    x = torch.randn(n // 64, 256, 32, 32, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(256, 256, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    best = 0.0
    for work, flops in ((lambda: a @ b, 2 * n**3), (lambda: F.conv2d(x, weight, padding=1), 2 * len(x) * 32**2 * 256**2 * 9)):
        for _ in range(10):
            begin = time.perf_counter()
            float(work().flatten()[0])  # waits for the GPU
            best = max(best, flops / (time.perf_counter() - begin))
    return best


def main(args):
    unknown = set(args.stages) - set(STAGES)
    if unknown:
        common.fail(f"no stage is called {', '.join(map(repr, sorted(unknown)))}; there are {', '.join(map(repr, STAGES))}")
    device = common.pick_device(args.device)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    peaks = {name: in_a_process(peak, args, dtype) for name, dtype in dict(fp32=torch.float32, bf16=torch.bfloat16).items()}
    record = dict(
        command=shlex.join(sys.argv), machine=machine, cores=common.num_cores(), torch=torch.__version__, settings=args.settings,
        peak_flops=peaks, stages={},
    )  # fmt: skip
    print(f"{machine}, {common.num_cores()} cores, torch {torch.__version__}, {args.settings} settings; peak fp32 {peaks['fp32']:.3g}, "
          f"bf16 {peaks['bf16']:.3g} a second")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        in_a_process(prepare, args, folder)
        for stage in args.stages:
            eager, shipped = (in_a_process(measure, args, stage, folder, variant, False) for variant in ("eager fp32", "as shipped"))
            parts = in_a_process(measure, args, stage, folder, "eager fp32", True)
            record["stages"][stage] = dict(eager_fp32=eager, as_shipped=shipped, parts=parts.get("parts"))
            print(f"{stage:10} {shipped['rate']:>10,.0f} {shipped['unit']}/s, {shipped['rate'] / eager['rate']:.2f} times eager fp32; "
                  f"host {shipped['host_gb']:.1f} GB" + (f", device {shipped['device_gb']:.1f} GB" if "device_gb" in shipped else ""))  # fmt: skip
            print(" " * 11 + "eager fp32: " + ", ".join(f"{part} {share:.0%}" for part, share in parts["parts"].items()))
            if "flops_per_unit" in parts:
                record["stages"][stage]["flops_per_unit"] = parts["flops_per_unit"]
                bf16 = STAGES[stage][0].__name__.startswith("train_latent") and device.type == "cuda"  # --precision auto
                share = shipped["rate"] * parts["flops_per_unit"] / peaks["bf16" if bf16 else "fp32"]
                print(" " * 11 + f"{parts['flops_per_unit'] / 1e9:.2f} GFLOP each, {share:.0%} of the {'bf16' if bf16 else 'fp32'} peak as shipped")
    if args.json:
        common.write_bytes(args.json, json.dumps(record, indent=1).encode())


if __name__ == "__main__":
    main(tyro.cli(Args))
