"""What users really do wrong: nothing is lost, nothing is mixed, and one line says what to do."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import common  # before torch
import numpy as np
import pytest
import torch
from conftest import ROOT, ToyGames, args_of, fails, load, run
import collect_data
import decode_offline as offline
import decode_online_ppo as online
import train_latent_bc as stage2
import train_latent_dynamics as stage1


# --- folders that are there are never replaced ----------------------------------------------------


def write(folder):
    with common.new_folder(folder) as part:
        (part / "x").write_text("new")


def test_a_folder_that_is_there_stays_as_it_is(tmp_path):
    big = tmp_path / "disk/big"
    big.mkdir(parents=True)
    (big / "x").write_text("old")
    link = tmp_path / "train"
    link.symlink_to(big)
    for folder in (big, link):
        assert "is there already; remove it" in fails(write, folder)
    assert link.is_symlink() and (big / "x").read_text() == "old"


def test_a_link_to_nothing_is_followed(tmp_path):
    link = tmp_path / "train"
    link.symlink_to(tmp_path / "disk/not/there/yet")
    write(link)
    assert (tmp_path / "disk/not/there/yet/x").read_text() == "new"


def test_a_folder_appears_when_it_is_complete(tmp_path):
    folder = tmp_path / "train"
    with pytest.raises(ZeroDivisionError), common.new_folder(folder) as part:
        (part / "y").write_text("half")
        1 / 0
    assert not folder.exists()
    write(folder)
    assert [path.name for path in folder.iterdir()] == ["x"]


# --- two runs, one file ---------------------------------------------------------------------------


def test_two_runs_do_not_train_one_expert(tmp_path, toy_games):
    """Seeds with folders of their own share experts/<game>.pt by default."""
    (tmp_path / "experts").mkdir()
    with open(tmp_path / "experts/.bigfish.pt.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another run is writing" in fails(run, collect_data, tmp_path, train_frames=0)


def test_an_animation_can_be_added_to_a_finished_run(root, toy_games, record_calls, monkeypatch):
    videos = []
    monkeypatch.setattr(common, "capture_video", lambda path, *rest: videos.append(str(path)))
    run(online, root, method="rl", env_steps=1280)
    run(online, root, method="rl", env_steps=1280, resume=True, capture_video=True)
    assert videos == [str(root / "runs/maze/decode_online_rl.gif")]


@pytest.mark.parametrize(
    "script, name",
    [
        (stage1, "latent_dynamics.pt"),
        (stage2, "latent_policy.pt"),
        (offline, "decode_offline.npz"),
        (online, "decode_online_rl_sl"),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_second_run_that_writes_the_same_file_exits(root, script, name):
    before = {path: path.read_bytes() for path in root.rglob("runs/**/*.*")}
    with open(root / f"runs/maze/.{name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another run is writing" in fails(run, script, root)
    after = {path: path.read_bytes() for path in before}
    assert after == before


# --- results of other data ------------------------------------------------------------------------


def test_stage_1_does_not_resume_on_other_frames(root):
    path = root / "data/maze/train/frames_001.npz"
    frames = load(path)
    common.save_npz(path, **frames | dict(obs=frames["obs"][::-1]))
    assert "other frames" in fails(run, stage1, root, resume=True)


# --- impossible flags -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script, flags",
    [
        (offline, dict(episodes=0)),
        (offline, dict(labels=(16, 0))),
        (offline, dict(decoder_seeds=0)),
        (collect_data, dict(train_frames=-5)),
        (collect_data, dict(num_envs=0)),
        (collect_data, dict(minibatches=0)),
        (stage1, dict(grad_steps=-1)),
        (stage1, dict(batch_size=0)),
        (online, dict(env_steps=0)),
        (online, dict(eval_episodes=0)),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else x.__name__,
)
def test_impossible_counts_are_refused_before_any_work(root, script, flags):
    before = {path: path.read_bytes() for path in root.rglob("*.*")}
    (flag,) = flags
    assert f"--{flag.replace('_', '-')}" in fails(run, script, root, **flags)
    assert {path: path.read_bytes() for path in root.rglob("*.*")} == before


def test_a_solver_without_frames_to_record_trains_no_expert(root, record_calls):
    trained = record_calls(collect_data, "train_expert")
    for flags in (dict(solver=True), dict(random_play=True)):
        message = fails(run, collect_data, root, game="miner", train_frames=0, **flags)
        assert "trains an expert only" in message
    assert trained == []


def test_the_untrained_control_costs_no_trained_model(root):
    path = root / "runs/maze/latent_dynamics.pt"
    before = path.read_bytes()
    assert "is trained; --grad-steps 0 takes" in fails(run, stage1, root, grad_steps=0)
    assert path.read_bytes() == before
    run(stage1, root, grad_steps=0, runs_dir=root / "untrained")
    run(stage1, root, grad_steps=0, runs_dir=root / "untrained", seed=2)  # nothing to lose
    assert load(root / "untrained/maze/latent_dynamics.pt")["grad_step"] == 0


@pytest.mark.parametrize("script", [collect_data, online], ids=lambda script: script.__name__)
def test_no_minibatch_has_a_single_step(root, script, record_calls, toy_games):
    """With one step, the std of its advantages is not a number. 8 x 16 steps in 43 minibatches."""
    flags = dict(num_envs=8, rollout_steps=16, minibatches=43, epochs=1)
    if script is collect_data:
        flags |= dict(expert_steps=128, train_frames=0)
    else:
        flags |= dict(env_steps=1280)
    losses = record_calls(script, "ppo_loss")
    run(script, root, **flags)
    sizes = {len(logits) for logits, *_ in losses}
    assert sizes == {2, 3}
    flags["minibatches"] = 65
    assert "leaves less than 2 steps" in fails(run, script, root, **flags)


def test_a_tilde_that_the_shell_left_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = common.RunArgs(data_dir=Path("~/x"))
    assert args.data_dir == tmp_path / "x"


# --- each decoder plays on the frames of its own games --------------------------------------------


class OwnGames(ToyGames):
    """An episode is one step, and its return the action's number; the frame shows the game's."""

    def step(self, actions):
        return self.obs, actions, np.ones(self.num_envs, bool)


def test_each_decoder_acts_on_the_frames_of_its_own_games(root, monkeypatch):
    """The latent is the number of the game; decoder i answers 1 where it sees one of its own."""

    class ShowsGame(torch.nn.Module):
        def __init__(self, **config):
            super().__init__()

        def load_state_dict(self, weights):
            pass

        def forward(self, obs):
            return obs[:, 0, 1, :1].float()

    class Decoder(torch.nn.Module):
        made = []

        def __init__(self, z_dim):
            super().__init__()
            self.mean = self.std = torch.zeros(z_dim)
            self.index = len(self.made)
            self.made.append(self)

        def forward(self, z):
            own = (z[:, 0] // 2 == self.index).long()  # two games for each decoder
            return 100 * torch.eye(15)[own]

    monkeypatch.setattr(common, "ProcgenEnvs", OwnGames)
    monkeypatch.setattr(offline, "LatentPolicy", ShowsGame)
    monkeypatch.setattr(offline, "ActionDecoder", Decoder)
    monkeypatch.setattr(offline, "fit_decoder", lambda *arguments: None)
    monkeypatch.setattr(common, "save_checkpoint", lambda *arguments, **content: None)
    run(offline, root)
    assert load(root / "runs/maze/decode_offline.npz")["returns"].tolist() == [[1, 1], [1, 1]]


def test_online_actions_belong_to_the_frames_of_their_games(root, toy_games, record_calls):
    """The features of step t are those of the frames of step t, game by game."""
    rollouts = record_calls(online, "ppo_update")
    run(online, root, method="rl", env_steps=1280, hidden_lr_ramp=(512, 1024, 0.1))
    checkpoint = load(root / "runs/maze/latent_policy.pt")
    policy = online.LatentPolicy(**checkpoint["config"])
    policy.load_state_dict(checkpoint["policy"])
    rollout = rollouts[-1][2]
    T = len(rollout["actions"])
    frames = rollout["frames"][-T - 1 : -1]
    with torch.no_grad():
        features = policy.features(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
    torch.testing.assert_close(rollout["features"], features)
    next_frames = rollout["frames"][-T:]
    shown = next_frames[:, :, 0, 0, 2].long()  # the last action
    assert torch.equal(shown, rollout["actions"])


# --- endings --------------------------------------------------------------------------------------


@dataclass
class Args:
    resume: bool = False


@pytest.mark.parametrize(
    "error, words",
    [
        (KeyboardInterrupt(), "stopped; --resume continues from the last saved state or"),
        (OSError(errno.ENOSPC, "full", "/data/x.npz"), "No space left on device (/data/x.npz)"),
        (OSError(errno.EROFS, "read-only"), "Read-only file system"),
        (OSError(errno.ENOLCK, "no locks"), "No locks available"),
        (PermissionError(errno.EACCES, "denied", "runs"), "Permission denied (runs)"),
    ],
    ids=str,
)
def test_ends_that_are_no_fault_of_the_code_give_one_line(monkeypatch, error, words):
    def main(args):
        raise error

    monkeypatch.setattr(sys, "argv", ["script.py"])
    monkeypatch.setattr(sys, "stdout", open(os.devnull, "w"))
    assert words in fails(common.run, main, Args)


def test_a_fault_of_the_code_keeps_its_traceback(monkeypatch):
    def main(args):
        raise FileExistsError(errno.EEXIST, "there")

    monkeypatch.setattr(sys, "argv", ["script.py"])
    monkeypatch.setattr(sys, "stdout", open(os.devnull, "w"))
    with pytest.raises(FileExistsError):
        common.run(main, Args)


def test_a_log_file_has_its_rows_while_the_run_goes_on(tmp_path):
    """Without PYTHONUNBUFFERED, and with lines in place of a bar that is drawn again and again."""
    code = (
        "import common, signal, time\n"
        # where the tests are a background job of a shell, children ignore Ctrl-C
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from dataclasses import dataclass\n"
        "@dataclass\nclass Args:\n    pass\n"
        "def main(args):\n"
        f"    log = common.MetricsLog({str(tmp_path / 'm.csv')!r}, 10, 'step')\n"
        "    log.write(grad_step=1, loss=0.5)\n"
        "    time.sleep(60)\n"
        "common.run(main, Args)\n"
    )
    log = tmp_path / "log"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    with open(log, "w") as file:
        child = subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stdout=file, stderr=file, env=environment
        )
        while "loss 0.5" not in log.read_text() and child.poll() is None:
            pass
        child.send_signal(signal.SIGINT)
        assert child.wait() == 1
    text = log.read_text()
    assert "grad_step 1  loss 0.5\n" in text and "\r" not in text
    assert text.endswith("error: stopped\n")


def test_foreign_and_damaged_checkpoints_say_what_to_do(tmp_path):
    path = tmp_path / "latent_policy.pt"
    torch.save(dict(weights=torch.ones(3)), path)
    assert "not a checkpoint of this project" in fails(
        common.load_checkpoint, path, "latent_policy", "maze"
    )
    state = tmp_path / "train_latent_bc_state.pt"
    state.write_bytes(b"half")
    args = args_of(stage2, tmp_path, resume=True)
    assert "leave out --resume" in fails(common.load_state, state, args, {})


def test_rows_windows_and_labels_of_shards_belong_together(tmp_path):
    """Shards of different lengths, streamed: each window's true action and latent is its own."""
    folder = tmp_path / "maze/train"
    number = 0
    for shard, length in enumerate((12, 20, 7, 15, 9, 13, 20, 11)):
        z = number + np.arange(length)
        number += length
        obs = np.tile(z.astype(np.uint8)[:, None, None, None], (1, 16, 16, 3))
        first = np.arange(length) == 0
        frames = folder / f"frames_{shard:03d}.npz"
        common.save_npz(frames, {}, obs=obs, first=first)
        common.save_npz(common.labels_path(frames), {}, action=(z % 10).astype(np.uint8))
        source = dict(dynamics_id="abc", frames_id=common.frames_id([frames]))
        latents = dict(z=z[:, None].astype(np.float16), valid=common.valid_windows(first, 1))
        common.save_npz(folder / f"latents_{shard:03d}.npz", source, **latents)
    args = common.RunArgs(game="maze", data_dir=tmp_path, runs_dir=tmp_path)
    for pool_frames in (1000, 100):  # all shards, or two at a time in any order
        store = common.FrameStore(args, "train", 1, torch.device("cpu"), "abc", pool_frames)
        assert store.streams == (pool_frames == 100)
        assert len(store.paths) == (2 if store.streams else 8)
        for _ in range(20):
            rows = store.draw(5)
            shown = store.frames_at(rows)[:, 0, 0, 0].long()
            assert torch.equal(store.z_at(rows)[:, 0].long(), shown)
            windows = store.windows_at(rows)[:, :, 0, 0, 0].long()
            assert torch.equal(windows, shown[:, None] + torch.arange(-1, 2))
            actions = common.true_actions_to_report_on(store, rows)
            assert np.array_equal(actions, common.distinct_actions("maze")[shown % 10])
