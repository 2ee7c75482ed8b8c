"""Packed files for `make play`, animations beside each other, and the demo's table."""

import common  # before torch
import numpy as np
import pytest
import torch
from conftest import ROOT, PaysForActions, fails, load, run
from PIL import Image

import decode_offline
from extras import action_pairs, demo_table, pack, play_latents, rollouts, side_by_side, summarize


def test_packed_files_are_a_smaller_run(root, monkeypatch):
    monkeypatch.setattr(common, "ProcgenEnvs", PaysForActions)
    run(decode_offline, root)
    small = root / "small"
    run(pack, root, output_dir=small, frames=40)
    for name in pack.CHECKPOINTS:
        whole = load(root / f"runs/maze/{name}.pt")
        packed = load(small / f"runs/maze/{name}.pt")
        assert whole.keys() == packed.keys()
    for name, weight in whole["decoders"][1].items():
        assert torch.equal(packed["decoders"][1][name], weight.half())
    frames = small / "data/maze/test/frames_000.npz"
    obs, _, recording = common.read_frames(frames, "maze")
    source = root / "data/maze/test/frames_000.npz"
    assert np.array_equal(obs, load(source)["obs"][:40]) and recording["expert_return"] == 10
    assert np.array_equal(common.read_actions(frames), common.read_actions(source)[:40])
    # stage 1's checks accept the cut latents, whose last row has lost its next frame
    args = common.RunArgs("maze", device="cpu", data_dir=small / "data", runs_dir=small / "runs")
    dynamics_id = load(root / "runs/maze/latent_dynamics.pt")["dynamics_id"]
    store = common.FrameStore(args, "test", 1, torch.device("cpu"), dynamics_id)
    first = load(source)["first"]
    inside = [i for i in range(1, 39) if not first[i] and not first[i + 1]]
    assert store.rows.tolist() == inside


def animation(path, colors, size=(8, 4)):
    common.save_animation([Image.new("RGB", size, color) for color in colors], path)
    return path


def test_animations_stand_side_by_side_and_the_shorter_one_waits(tmp_path):
    left = animation(tmp_path / "l.gif", ["#ff0000", "#00ff00"])
    right = animation(tmp_path / "r.gif", ["#0000ff", "#ffff00", "#00ffff"])
    output = tmp_path / "both.gif"
    side_by_side.main(side_by_side.Args(left, right, output, ("clone", "LAPO")))
    both = Image.open(output)
    margin = side_by_side.MARGIN
    assert both.n_frames == 3 and both.size == (2 * 8 + margin, 4 + margin)
    seen = []
    for i in range(3):
        both.seek(i)
        pixels = np.array(both.convert("RGB"))
        seen.append([pixels[-1, 0].tolist(), pixels[-1, -1].tolist()])
    assert seen == [
        [[255, 0, 0], [0, 0, 255]],
        [[0, 255, 0], [255, 255, 0]],
        [[0, 255, 0], [0, 255, 255]],
    ]
    other = animation(tmp_path / "o.gif", ["#000000"], size=(9, 9))
    args = side_by_side.Args(left, other, output)
    assert "pixels" in fails(side_by_side.main, args)
    args = side_by_side.Args(left, tmp_path / "none.gif", output)
    assert "none.gif is missing" in fails(side_by_side.main, args)


def test_the_demos_table(tmp_path, capsys):
    settings = dict(recording={}, args={})
    run_dir = tmp_path / "runs/miner"
    mse = dict(fdm_mse_true=1.0, fdm_mse_copy=4.0, fdm_mse_shuffled=3.0)
    common.save_npz(run_dir / "latents_metrics.npz", settings, **mse)
    stage_1 = "grad_step,probe,majority\n0,0.46,0.5\n500,0.7,0.5\n1000,0.8,0.5\n"
    (run_dir / "train_latent_dynamics.csv").write_text(stage_1)
    returns = dict(blind_return=1.5, random_return=1.25, expert_return=9.0)
    both = dict(labels=[16, 256], returns=[[2.0, 3.0], [5.0, 7.0]])
    common.save_npz(run_dir / "decode_offline.npz", settings, **both, **returns)
    clone = dict(labels=[256], returns=[[0.5, 0.7]])
    common.save_npz(run_dir / "label_efficiency_bc.npz", settings, **clone)
    online = dict(env_steps=[10, 98_304], eval_returns=[[0.0, 0.0], [8.0, 7.0]])
    common.save_npz(run_dir / "decode_online_rl_sl.npz", settings, **online)
    untrained = tmp_path / "untrained"
    control = dict(labels=[256], returns=[[0.4, 0.4]])
    common.save_npz(untrained / "miner/decode_offline.npz", settings, **control)
    run(demo_table, tmp_path, game="miner", untrained_dir=untrained)
    lines = capsys.readouterr().out.splitlines()
    expected = {
        "linear probe": ["0.80", "0.46", "0.50"],
        "FDM's mse": ["0.25", "0.75"],
        "return with 16": ["2.5", "1.5", "1.2"],
        "return with 256": ["6.0", "0.6", "0.4"],
        "return online": ["98,304", "7.5", "9.0"],
    }
    for start, numbers in expected.items():
        (line,) = [line for line in lines if line.startswith(start)]
        for number in numbers:
            assert number in line, (line, number)


@pytest.mark.parametrize("steps, frames", [(3, 3), (400, 300)])
def test_a_video_shows_each_game_until_its_episode_ends(monkeypatch, tmp_path, steps, frames):
    """Game e is e gray levels brighter, by one a step; its episode has e + 1 steps, or `steps`."""

    class Games:
        def __init__(self, recording, num_envs, seed):
            self.t = 0
            self.obs = None
            self.levels = 20 * np.arange(num_envs, dtype=np.uint8)
            self.show()

        def show(self):
            values = self.levels + np.uint8(self.t % 10)
            self.rendered = np.tile(values[:, None, None, None], (1, 64, 64, 3))

        def step(self, actions):
            self.t += 1
            self.show()
            lengths = np.minimum(np.arange(8) + 1, steps) if steps < 10 else np.full(8, steps)
            return None, None, self.t == lengths

    monkeypatch.setattr(common, "ProcgenEnvs", Games)
    common.capture_video(tmp_path / "x.gif", {}, lambda obs: None, seed=1)
    video = Image.open(tmp_path / "x.gif")
    assert video.n_frames == frames and video.size == (264, 132)
    video.seek(frames - 1)
    pixels = np.array(video.convert("RGB"))[33::66, 33::66, 0].flatten().tolist()
    if steps == 3:  # game 0 has stopped at its first frame, game 1 at its second
        assert pixels == [0, 21, 42, 62, 82, 102, 122, 142]


@torch.no_grad()
def test_the_shipped_weights_play():
    """What `make play` serves: the FDM's prediction changes with the key, and the policy plays."""
    folders = dict(data_dir=ROOT / "assets/data", runs_dir=ROOT / "assets/runs")
    args = play_latents.Args(game="miner", device="cpu", **folders)
    files = [path for path in (ROOT / "assets").rglob("*.*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 3e6
    world = play_latents.World(args)
    predicted = rollouts.rollout(world.fdm, world.past.repeat(5, 1, 1, 1, 1), world.z_q[:5], 1)
    different = {frame.numpy().tobytes() for frame in predicted[:, -1]}
    assert len(different) == 5
    for _ in range(3):
        status = world.press("p")["status"]
    assert status.startswith("step 3, return") and "true action: " in status


def test_pairs_of_directions_that_latents_confuse_are_found():
    names = [common.ACTIONS.index(name) for name in action_pairs.DIRECTIONS]
    left, right, up, down = names
    actions = np.random.default_rng(1).choice(names, 4000)
    # forwards along a corridor is up or right, backwards down or left
    forwards = np.isin(actions, [up, right])
    z = np.random.default_rng(2).normal(0, 0.1, (4000, 3)) + forwards[:, None]
    accuracy = {row["actions"]: row["accuracy"] for row in action_pairs.probe_pairs(z, actions)}
    for pair in ("left, right", "up, down", "left, up", "right, down"):
        assert accuracy[pair] == 1
    for pair in ("left, down", "right, up"):
        assert 0.4 < accuracy[pair] < 0.6
    assert 0.4 < accuracy["all four"] < 0.6
    only_left = np.full(4000, left)
    assert "too few" in fails(action_pairs.probe_pairs, z, only_left)


def test_action_pairs_reads_what_stage_1_wrote(root):
    directions = [common.ACTIONS.index(name) for name in action_pairs.DIRECTIONS]
    paths = sorted((root / "data/maze/test").glob("labels*"))
    for path in paths:  # the toy's actions 0 to 4 are not the game's directions
        labels = load(path)
        action = np.array([*directions, 4], np.uint8)[labels["action"]]
        common.save_npz(path, labels["settings"], action=action, reward=labels["reward"])
    args = action_pairs.Args("maze", data_dir=root / "data", runs_dir=root / "runs")
    action_pairs.main(args)
    rows = summarize.read_csv(root / "runs/maze/action_pairs.csv")
    assert [row["actions"] for row in rows][-2:] == ["up, down", "all four"]
    windows = [int(row["windows"]) for row in rows]
    # each direction is in three of the six pairs
    assert len(windows) == 7 and sum(windows[:6]) == 3 * windows[6] > 0
    for path in paths:
        path.unlink()
    assert "has no labels" in fails(action_pairs.main, args)
