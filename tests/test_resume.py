"""A run that is killed and resumed ends with the same bytes as one that was not."""

import importlib
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import args_of, fails, load, run
import baselines.train_ilpo as ilpo
import collect_data
import common
import decode_online_ppo as online
import train_latent_bc as stage2
import train_latent_dynamics as stage1


def run_until_killed(script, args, updates_after_the_save):
    """Runs a script's main(); the process SIGKILLs itself some updates after its first save."""
    save_state, backward = common.save_state, torch.Tensor.backward
    counts = dict(saves=0, updates=0)

    def counting_save(*arguments, **keywords):
        save_state(*arguments, **keywords)
        counts["saves"] += 1

    def counting_backward(self):
        backward(self)
        counts["updates"] += counts["saves"] > 0
        if counts["updates"] == updates_after_the_save:
            os.kill(os.getpid(), signal.SIGKILL)

    common.save_state, torch.Tensor.backward = counting_save, counting_backward
    importlib.import_module(script).main(args)


def run_and_kill(script, args, updates_after_the_save):
    """The same in a fresh child process: a fork would inherit locks of threads that it lacks."""
    process = multiprocessing.get_context("spawn").Process(
        target=run_until_killed, args=(script.__name__, args, updates_after_the_save)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


STREAMED = dict(pool_frames=130, batch_size=48, grad_steps=12, eval_every=6)  # a shard at a time
CASES = {  # script, its flags, updates between save and kill, a file that it makes
    "stage 1": (stage1, dict(grad_steps=6), 1, "latents_001.npz"),
    "stage 2": (stage2, dict(grad_steps=6), 1, "latent_policy.pt"),
    "stage 2, streamed": (stage2, STREAMED, 4, "latent_policy.pt"),
    "ILPO": (ilpo, dict(grad_steps=6, runs_dir=Path("runs/ilpo")), 1, "latent_policy.pt"),
    "online": (
        online, dict(env_steps=1536, log_every_steps=512, refit_stop=1100), 30, "rl_sl.npz"
    ),
    "expert": (
        collect_data, dict(expert_steps=12 * 128, train_frames=0), 9, "experts/bigfish.pt"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_ends_as_one_that_was_not(chain, tmp_path, monkeypatch, case):
    script, flags, updates, product = CASES[case]
    results = []
    for name in ("whole", "killed"):
        root = shutil.copytree(chain, tmp_path / name)
        monkeypatch.chdir(root)  # files hold the flags, and so the folders
        args = args_of(script, Path("."), **flags)
        if name == "killed":
            run_and_kill(script, args, updates)
            args.resume = True
        script.main(args)
        files = (p for p in root.rglob("*.*") if p.suffix in (".pt", ".npz", ".csv"))
        files = {p.relative_to(root).as_posix(): p.read_bytes() for p in files}
        results.append({p: x for p, x in files.items() if not p.endswith("_state.pt")})
    whole, killed = results
    assert whole.keys() == killed.keys() and any(path.endswith(product) for path in whole)
    assert [path for path in whole if whole[path] != killed[path]] == []


def test_a_finished_run_is_not_trained_again_and_another_seed_is_refused(root):
    path = root / "runs/maze/latent_policy.pt"
    before = path.read_bytes()
    run(stage2, root, resume=True)
    assert "--seed is 2" in fails(run, stage2, root, resume=True, seed=2)
    assert path.read_bytes() == before


def test_a_run_is_not_resumed_on_another_result_of_the_stage_before(root, toy_games):
    run(online, root, env_steps=1280)
    run(stage1, root, seed=2)
    assert "another earlier stage" in fails(run, stage2, root, resume=True)
    run(stage2, root)
    assert "another earlier stage" in fails(run, online, root, env_steps=1280, resume=True)


def test_frames_that_were_replaced_after_stage_1_are_refused(root):
    for path in root.glob("data/maze/*/frames_*.npz"):
        frames = load(path)
        frames["obs"] = frames["obs"].repeat(2, 1).repeat(2, 2)
        common.save_npz(path, **frames)
    assert "made from other frames" in fails(run, stage2, root)


def test_a_stage_1_that_stops_while_it_labels_again_keeps_its_latents(root, monkeypatch):
    before = {path: path.read_bytes() for path in root.glob("runs/maze/*/latents_*.npz")}

    def interrupt(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "save_npz", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(stage1, root, resume=True)
    assert len(before) == 4 and all(path.read_bytes() == x for path, x in before.items())


def test_splits_do_not_depend_on_which_of_them_a_run_records(tmp_path):
    """As after an interruption between two splits."""
    flags = dict(game="maze", solver=True, plain=True, train_frames=64)
    for name in ("whole", "resumed"):
        run(collect_data, tmp_path / name, **flags)
    shutil.rmtree(tmp_path / "resumed/data/maze/test")
    run(collect_data, tmp_path / "resumed", **flags, resume=True)
    whole = {p.name: p.read_bytes() for p in (tmp_path / "whole/data/maze/test").glob("*.npz")}
    again = {p.name: p.read_bytes() for p in (tmp_path / "resumed/data/maze/test").glob("*.npz")}
    assert whole == again and len(whole) == 2
