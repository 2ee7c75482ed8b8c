"""A run that is killed and resumed ends with the same bytes as one that was not."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import ONLINE, STAGE_1, STAGE_2, fails, folders
from test_collect_data import TINY

import collect_data
import common
import decode_online_ppo as online
import train_latent_bc as stage2
import train_latent_dynamics as stage1


def run_and_kill(script, args, updates_after_the_save):
    """Runs main() in a child process that SIGKILLs itself some updates after its first save."""
    if child := os.fork():
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        return
    save_state, backward, counts = (
        common.save_state,
        torch.Tensor.backward,
        dict(saves=0, updates=0),
    )

    def counting_save(*arguments, **keywords):
        save_state(*arguments, **keywords)
        counts["saves"] += arguments[2] > 0  # stage 1 saves step 0, too

    def counting_backward(self):
        backward(self)
        counts["updates"] += counts["saves"] > 0
        if counts["updates"] == updates_after_the_save:
            os.kill(os.getpid(), signal.SIGKILL)

    common.save_state, torch.Tensor.backward = counting_save, counting_backward
    try:
        script.main(args)
    finally:
        os._exit(1)  # it should not get here


SHORT = ONLINE | dict(env_steps=1536, log_every_steps=512, refit_until=1100)
CASES = {
    "stage 1": (stage1, STAGE_1 | dict(grad_steps=6), 1, "runs/maze"),
    "stage 2": (stage2, STAGE_2 | dict(grad_steps=6), 1, "runs/maze"),
    "online": (online, SHORT, 30, "runs/maze"),
    "expert": (collect_data, TINY | dict(expert_steps=12 * 128, train_frames=0), 9, "."),
}


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_ends_as_one_that_was_not(chain, tmp_path, case, monkeypatch):
    script, flags, updates, products = CASES[case]
    results = []
    for name in ("whole", "killed"):
        root = shutil.copytree(chain, tmp_path / name)
        monkeypatch.chdir(root)
        where = folders(Path("."))
        if case == "expert":
            where["experts_dir"] = Path("experts")
        args = script.Args(**flags | where)
        if name == "killed":
            run_and_kill(script, args, updates)
            args.resume = True
        script.main(args)
        files = sorted(
            p for p in (root / products).rglob("*") if p.suffix in (".pt", ".npz", ".csv")
        )
        results.append({p.relative_to(root).as_posix(): p.read_bytes() for p in files})
    whole, killed = results
    assert whole.keys() == killed.keys()
    same = [p for p in whole if not p.endswith("_state.pt") and whole[p] == killed[p]]
    assert [p for p in whole if p not in same and not p.endswith("_state.pt")] == []
    made = {
        "expert": "expert",
        "online": "decode_online",
        "stage 1": "latents_",
        "stage 2": "policy",
    }
    assert any(made[case] in p for p in same)


def test_a_finished_run_is_not_trained_again_and_another_seed_is_refused(chain, tmp_path):
    root = shutil.copytree(chain, tmp_path / "chain")
    path = root / "runs/maze/latent_policy.pt"
    before = path.read_bytes()
    stage2.main(stage2.Args(**folders(root), **STAGE_2, resume=True))
    assert path.read_bytes() == before
    args = stage2.Args(**folders(root), **STAGE_2, resume=True, seed=2)
    assert "--seed is 2" in fails(stage2.main, args)
    assert path.read_bytes() == before


def test_a_finished_stage_1_that_stops_while_it_labels_again_keeps_its_latents(
    chain, tmp_path, monkeypatch
):
    root = shutil.copytree(chain, tmp_path / "chain")
    before = {path: path.read_bytes() for path in root.glob("runs/maze/*/latents_*.npz")}
    monkeypatch.setattr(common, "save_npz", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        stage1.main(stage1.Args(**folders(root), **STAGE_1, resume=True))
    assert len(before) == 4 and all(path.read_bytes() == x for path, x in before.items())
