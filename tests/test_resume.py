"""Runs that are killed at any moment and go on with --resume end as if nothing had happened: same weights, same rows, same files.

Killed runs are processes forked from a server that has imported the scripts, so that each starts in a moment. They kill
themselves with SIGKILL at a given number of Python calls, drawn at random.
"""

import multiprocessing
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo  # noqa: F401 (which the first optimizer of every process would import)

import collect_data
import common
import decode_offline
import decode_online_ppo
import train_latent_bc
import train_latent_dynamics
import visualize_latents

ROOT = Path(__file__).resolve().parents[1]
SMALL = dict(game="bigfish", device="cpu", checkpoint_minutes=1e-9)  # so that the state is written after every step
FORK = multiprocessing.get_context("forkserver")
KILLS = 3

COLLECT = dict(
    train_frames=512, test_frames=160, frame_size=16, num_levels=2, expert_steps=384, expert_multiplier=0.25, num_envs=4,
    rollout_steps=32, minibatches=2, epochs=1,
)  # fmt: skip
SCRIPTS = dict(
    collect_data=(collect_data, COLLECT),
    train_latent_dynamics=(train_latent_dynamics, dict(
        multiplier=0.25, fdm_width=4, codebooks=2, latents_per_codebook=2, embeddings=8, embedding_dim=4, grad_steps=10, batch_size=16,
        eval_every=3, eval_windows=64, pool_frames=300,
    )),
    train_latent_bc=(train_latent_bc, dict(multiplier=0.25, grad_steps=16, batch_size=32, eval_every=5, eval_windows=64, pool_frames=300)),
    decode_online_ppo=(decode_online_ppo, dict(
        num_envs=4, head_rollout_steps=16, env_steps=640, minibatches=2, epochs=1, log_every_steps=192,
        refit_from=128, refit_each_until=256, refit_every=2, refit_until=400, refit_epochs=1,
        action_lr_ramp=(0, 64, 0.25), value_lr_ramp=(0, 64, 0.25), hidden_lr_ramp=(0, 64, 0.1),
    )),
)  # fmt: skip


def short_evaluation(envs, act, episodes_per_env):
    """Twenty steps, so that the frame that is reached tells of every action."""
    for _ in range(20):
        for games, _ in envs.halves:
            games.act(act(games.observe()[1]))
    reached = np.concatenate([games.observe()[1].mean((1, 2, 3)) for games, _ in envs.halves])
    return np.full((envs.num_envs, episodes_per_env), reached[:, None])


def no_threads(pid):
    """In place of os.sched_getaffinity: Procgen then steps its games without threads, which few games only slow down."""
    return ()


def arguments(script, root, **changes):
    folders = dict(data_dir=root / "data", runs_dir=root / "runs")
    if script == "collect_data":
        folders["experts_dir"] = root / "experts"
    module, settings = SCRIPTS[script]
    return module.Args(**{**SMALL, **folders, **settings, **changes})


def quick_evaluation(envs, act, episodes_per_env):
    return np.full((envs.num_envs, episodes_per_env), 100 / envs.num_envs)


def count_calls(patch, at=None, then=lambda: None):
    """Counts Python calls once the run has begun, up to `at`, where it calls `then`; returns the counter, a list of one.

    Calls of the project's functions and of torch.save's; most others come before the first step, and few runs would get past it.
    """
    calls, begin = [0], common.RunState.begin

    def on_call(frame, event, _):
        file = frame.f_code.co_filename
        calls[0] += event == "call" and (Path(file).parent == ROOT or file.endswith("torch/serialization.py"))
        if calls[0] == at:
            sys.setprofile(None)
            then()

    def begin_and_count(self):
        if not calls[0]:
            sys.setprofile(on_call)
        begin(self)

    patch.setattr(common.RunState, "begin", begin_and_count)
    return calls


def run_in_child(script, args, log, at, number):
    """What the forked process does: runs the script, and sends itself a signal after `at` calls."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    common.evaluate, os.sched_getaffinity = quick_evaluation, no_threads
    count_calls(pytest.MonkeyPatch(), at, lambda: os.kill(os.getpid(), number))
    SCRIPTS[script][0].main(args)


def run_until(script, args, log, at, number=signal.SIGKILL):
    """Runs the script in a process of its own that sends itself the signal at a given call; returns its exit code."""
    process = FORK.Process(target=run_in_child, args=(script, args, log, at, number))
    process.start()
    process.join(120)
    return process.exitcode


@pytest.fixture(scope="module", autouse=True)
def server():
    """The scripts, imported once for all processes, and evaluations that cost nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        patch.setattr(common, "evaluate", quick_evaluation)
        patch.setattr(os, "sched_getaffinity", no_threads)
        FORK.set_forkserver_preload(["test_resume"])
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory, server):
    """{script: folder} after the script ran there without a stop, each on what the one before it made; and their calls."""
    folders, calls, before = {}, {}, None
    for script, (module, _) in SCRIPTS.items():
        folders[script] = tmp_path_factory.mktemp(script)
        if before:
            shutil.copytree(before, folders[script], dirs_exist_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            counter = count_calls(patch)
            module.main(arguments(script, folders[script]))
            sys.setprofile(None)
        calls[script], before = counter[0], folders[script]
    return folders, calls


def start_folder(whole, script, to):
    """A folder as it is before the script runs: what the scripts before it made."""
    before = list(SCRIPTS).index(script) - 1
    if before >= 0:
        shutil.copytree(whole[0][list(SCRIPTS)[before]], to, dirs_exist_ok=True)
    return to


def content(path):
    """What a file says, apart from the flags of the run that wrote it."""
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True)
    if path.suffix == ".npz" and path.name.startswith("decode_"):
        with np.load(path) as file:
            return {name: file[name] for name in file.files if name != "settings"}
    return path.read_bytes()


def same(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return np.array_equal(one, other, equal_nan=True) if isinstance(one, np.ndarray) else one == other


def assert_same_files(one, other):
    names = [{path.relative_to(root) for path in root.rglob("*") if path.is_file()} for root in (one, other)]
    assert names[0] == names[1]  # no state and no temporary file is left over
    for name in sorted(names[0]):
        assert same(content(one / name), content(other / name)), name


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_killed_again_and_again_ends_as_one_that_was_not(whole, script, tmp_path):
    rng = np.random.default_rng(list(SCRIPTS).index(script))
    root, calls = start_folder(whole, script, tmp_path / "root"), whole[1][script]
    state = root / "runs/bigfish" / f"{script.replace('online_ppo', 'online_rl_sl')}_state.pt"
    steps = [0]
    for kill in range(KILLS):
        # each has the rest of the run before it, of which it gets a share
        at = int(calls * rng.uniform(0.5, 1.5) / KILLS)
        code = run_until(script, arguments(script, root, resume=kill > 0), tmp_path / "log", at)
        assert code == -signal.SIGKILL, (tmp_path / "log").read_text()
        if state.exists():
            steps.append(torch.load(state, weights_only=True)["step"])
    assert len(set(steps)) > 1, steps  # they did get somewhere
    SCRIPTS[script][0].main(arguments(script, root, resume=True))
    assert_same_files(root, whole[0][script])


# --- stopped on purpose ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, name", [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_a_run_told_to_stop_saves_and_says_how_to_go_on(whole, tmp_path, number, name):
    root, script, log = start_folder(whole, "train_latent_bc", tmp_path / "root"), "train_latent_bc", tmp_path / "log"
    run, rarely = root / "runs/bigfish", dict(checkpoint_minutes=60)
    code = run_until(script, arguments(script, root, **rarely), log, 1000, number)
    assert code == 128 + number, name
    lines = log.read_text().splitlines()
    step = torch.load(run / f"{script}_state.pt", weights_only=True)["step"]
    assert step > 0 and f"stopped: {run / f'{script}_state.pt'} is at step {step}; go on with --resume" in lines
    assert not any("Traceback" in line for line in lines)

    # without --resume it starts afresh and says so; stopped at once, it has not touched the state that it did not make
    before = (run / f"{script}_state.pt").read_bytes()
    assert run_until(script, arguments(script, root, **rarely), log, 1000, number) == 128 + number
    assert f"note: {run / f'{script}_state.pt'} is of an unfinished run" in log.read_text()
    assert "is still of the run before; go on with --resume" in log.read_text()
    assert (run / f"{script}_state.pt").read_bytes() == before

    SCRIPTS[script][0].main(arguments(script, root, resume=True, **rarely))
    assert_same_files(root, whole[0][script])


def test_a_recording_told_to_stop_keeps_the_whole_shards(whole, tmp_path):
    shutil.copytree(whole[0]["collect_data"] / "experts", tmp_path / "root/experts")
    args = arguments("collect_data", tmp_path / "root")
    assert run_until("collect_data", args, tmp_path / "log", 12_000, signal.SIGTERM) == 128 + signal.SIGTERM
    state = torch.load(tmp_path / "root/runs/bigfish/collect_data_state.pt", weights_only=True)
    assert state["values"]["phase"] in ("train", "test") and state["step"] > 0  # while it recorded
    assert "collect_data_state.pt is at step" in (tmp_path / "log").read_text()
    collect_data.main(arguments("collect_data", tmp_path / "root", resume=True))
    assert_same_files(tmp_path / "root/data", whole[0]["collect_data"] / "data")


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    run_state = common.RunState(tmp_path, "train_latent_bc", arguments("train_latent_bc", tmp_path, checkpoint_minutes=60))
    assert not run_state.due()
    os.kill(os.getpid(), signal.SIGINT)
    assert run_state.due()  # save() would now end the run
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    run_state.finish()


# --- what --resume refuses ---------------------------------------------------------------------------------------------


def error_line(script, args):
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[script][0].main(args)
    assert str(stop.value).startswith("error: ") and "\n" not in str(stop.value)
    return str(stop.value)


def test_a_finished_run_is_left_alone(whole, capsys):
    for script, folder in whole[0].items():
        before = {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}
        SCRIPTS[script][0].main(arguments(script, folder, resume=True))
        assert "resume: nothing to do" in capsys.readouterr().out
        assert {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()} == before


@pytest.fixture
def stopped(whole, tmp_path):
    """A folder with the state of a run of stage 2 that was stopped, and its path."""
    root = start_folder(whole, "train_latent_bc", tmp_path / "root")
    assert run_until("train_latent_bc", arguments("train_latent_bc", root), tmp_path / "log", 1000, signal.SIGTERM) == 128 + signal.SIGTERM
    return root, root / "runs/bigfish/train_latent_bc_state.pt"


def test_a_state_that_does_not_fit_is_refused_and_kept(stopped):
    root, path = stopped
    whole_state, saved = path.read_bytes(), torch.load(path, weights_only=True)

    def line(**changes):
        return error_line("train_latent_bc", arguments("train_latent_bc", root, resume=True, **changes))

    assert "--lr is 0.5, but" in line(lr=0.5) and "with 0.0002" in line(lr=0.5)
    assert "--seed is 2" in line(seed=2)
    assert "--multiplier is 0.5" in line(multiplier=0.5)
    common.save_checkpoint(path, **saved | dict(flags=saved["flags"] | dict(momentum="0.9")))  # of a version with another flag
    assert "--momentum is absent" in line()
    common.save_checkpoint(path, **saved | dict(parts={name: part for name, part in saved["parts"].items() if name != "schedule"}))
    assert "does not fit this version of the code" in line()
    common.save_checkpoint(path, **saved | dict(game="maze"))
    assert "'maze', not on 'bigfish'" in line()
    for content in (whole_state[:-300], whole_state[: len(whole_state) // 2], b""):
        path.write_bytes(content)
        assert "is damaged" in line() and "without --resume" in line() and path.read_bytes() == content
    path.write_bytes(whole_state)
    (root / "data/bigfish/train/frames_003.npz").unlink()  # the last of them
    assert "are not those that the run began with" in line()
    assert path.read_bytes() == whole_state


def test_a_run_on_another_device_may_differ_in_folders_and_pace(whole, stopped, tmp_path):
    root, path = stopped
    shutil.move(root, tmp_path / "moved")
    train_latent_bc.main(arguments("train_latent_bc", tmp_path / "moved", resume=True, device="auto", checkpoint_minutes=3))
    assert not (tmp_path / "moved/runs/bigfish" / path.name).exists()


def hold_lock(args, folder, connection):
    held = common.RunState(folder, "train_latent_bc", args)
    connection.send(held.step)
    time.sleep(600)


def test_one_folder_holds_one_run_at_a_time(whole, tmp_path):
    """The lock goes with the process that holds it, so one that was killed is in nobody's way."""
    root = start_folder(whole, "train_latent_bc", tmp_path / "root")
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=hold_lock, args=(arguments("train_latent_bc", root), root / "runs/bigfish", theirs))
    process.start()
    ours.recv()
    line = error_line("train_latent_bc", arguments("train_latent_bc", root))
    assert "another process runs train_latent_bc" in line and "--runs-dir" in line
    process.kill()
    process.join()
    train_latent_bc.main(arguments("train_latent_bc", root))


# --- the same seed -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module, changes, names", [
    (decode_offline, dict(labels=(16, 64), decoder_seeds=2, decoder_steps=5, episodes=2, envs_per_decoder=2), ["decode_offline.npz"]),
    (visualize_latents, dict(projection="pca", points=64, supervised_steps=2), ["latents.npz", "fdm.png", "latents.png"]),
])  # fmt: skip
def test_the_same_seed_gives_the_same_results(whole, tmp_path, monkeypatch, module, changes, names):
    """For the scripts that do not train a network of the next stage; the others are compared above, killed and whole."""
    monkeypatch.setattr(common, "evaluate", short_evaluation)
    runs = []
    for attempt in ("one", "other"):
        shutil.copytree(whole[0]["train_latent_bc"], tmp_path / attempt)
        folders = dict(data_dir=tmp_path / attempt / "data", runs_dir=tmp_path / attempt / "runs")
        module.main(module.Args(game="bigfish", device="cpu", **folders, **changes))
        runs.append([content(tmp_path / attempt / "runs/bigfish" / name) for name in names])
    assert all(same(one, other) for one, other in zip(*runs))
