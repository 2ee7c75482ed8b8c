"""What goes wrong outside the method: disks, files, games and numbers. Each ends in one line, and loses nothing that was there."""

import ast
import contextlib
import io
import resource
import shutil
import zipfile

import numpy as np
import pytest
import torch

import collect_data
import common
import train_latent_bc
import train_latent_dynamics
from test_collect_data import small_args
from test_common import Bomb, message, write_frames
from test_train_latent_dynamics import train


@contextlib.contextmanager
def full_disk(limit):
    """No file can grow beyond `limit` bytes."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a toy video and a finished stage 1 on it."""
    root = tmp_path_factory.mktemp("trained")
    train(root)
    return root


def clone(root, to):
    shutil.copytree(root, to, dirs_exist_ok=True)
    return to


def files(root):
    return {path: path.read_bytes() for path in root.rglob("*.*") if path.is_file() and path.suffix != ".lock"}


def stage2(root, **changes):
    folders = dict(data_dir=root / "data", runs_dir=root / "runs")
    settings = dict(game="maze", device="cpu", multiplier=0.25, grad_steps=4, batch_size=8, eval_every=1, eval_windows=32)
    return train_latent_bc.Args(**folders, **settings | changes)


# --- disks -------------------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_old_file(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, 200_000, dtype=np.uint8)
    writes = {
        "a.pt": lambda path, rows: common.save_checkpoint(path, kind="x", weight=torch.from_numpy(noise[:rows])),
        "a.npz": lambda path, rows: common.save_npz(path, obs=noise[:rows]),
    }
    for name, write in writes.items():
        write(tmp_path / name, 1000)
        before = files(tmp_path)
        with full_disk(50_000):
            line = message(write, tmp_path / name, 200_000)
        assert f"{name} could not be written (File too large)" in line and files(tmp_path) == before
    log = common.MetricsLog(tmp_path / "a.csv", 10, "step")
    with full_disk(0):
        assert "a.csv could not be written" in message(log.write, grad_step=1)


def test_a_disk_that_fills_up_while_training_keeps_the_last_checkpoint(trained, tmp_path):
    root = clone(trained, tmp_path / "root")
    train_latent_bc.main(stage2(root))
    policy = root / "runs/maze/latent_policy.pt"
    before = policy.read_bytes()
    with full_disk(20_000):
        assert "could not be written (File too large)" in message(train_latent_bc.main, stage2(root, seed=2))
    assert policy.read_bytes() == before and not list(root.rglob(".*.part"))


# --- files -------------------------------------------------------------------------------------------------------------


def test_a_shard_with_a_flipped_byte_is_refused_or_still_the_same(tmp_path):
    path = write_frames(tmp_path)
    whole, (obs, first, settings) = path.read_bytes(), common.read_frames(path, "maze")
    refused = 0
    for at in np.random.default_rng(0).choice(len(whole), 150, replace=False):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        try:
            again = common.read_frames(path, "maze")
        except SystemExit as stop:
            assert "\n" not in str(stop) and str(path) in str(stop)
            refused += 1
        else:  # a time stamp or the like
            assert np.array_equal(again[0], obs) and np.array_equal(again[1], first) and again[2] == settings
    assert refused > 75


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed, common.save_npz])
def test_arrays_come_back_as_numpy_reads_them(save, tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "a.npz"
    arrays = dict(
        scalar=np.float32(2.5), text=np.array("any text"), empty=np.empty((0, 3), np.uint8), one=np.array([7]), flags=rng.random(9) < 0.5,
        half=rng.random((3, 4)).astype(np.float16), frames=rng.integers(0, 256, (60, 64, 64, 3), np.uint8),
        fortran=np.asfortranarray(rng.random((5, 6, 7))), slices=rng.random((8, 8))[::2, ::-1],
    )  # fmt: skip
    save(path, **arrays)
    with np.load(path) as theirs:
        ours = common.load_npz(path, list(arrays), "the command")
        for name in arrays:
            assert ours[name].dtype == theirs[name].dtype and np.array_equal(ours[name], theirs[name]) and ours[name].flags.writeable
            assert ours[name].flags.c_contiguous == theirs[name].flags.c_contiguous

    for kind in (np.array([None]), np.zeros(3, [("a", "u1")]), np.zeros(3, ">f4")):
        np.savez(path, obs=kind)
        assert "a.npz is damaged (ValueError)" in message(common.load_npz, path, ["obs"], "the command")


def test_shards_are_read_without_pythons_parser(tmp_path, monkeypatch):
    """In CPython 3.11 it is not safe to use from several threads at once, and threads read the shards."""
    write_frames(tmp_path, name="frames_000.npz")
    monkeypatch.setattr(ast, "parse", None)
    with pytest.raises(TypeError):
        np.load(tmp_path / "frames_000.npz")["obs"]
    assert len(common.read_frames(tmp_path / "frames_000.npz", "maze")[0]) == common.count_rows(tmp_path / "frames_000.npz") == 40


def test_a_sound_file_that_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    path = write_frames(tmp_path, name="frames_000.npz")

    def refuse(*_):
        raise error

    monkeypatch.setattr(common.files, "read_array", refuse)
    for error, said in ((PermissionError(13, "Permission denied"), "Permission denied"), (MemoryError(), "no memory left")):
        line = message(common.read_frames, path, "maze")
        assert f"{path} cannot be read" in line and said in line and "delete" not in line


def test_a_checkpoint_with_a_flipped_byte_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    common.save_checkpoint(path, kind="x", game="maze", weight=torch.ones(1000))
    content = bytearray(path.read_bytes())
    content[content.index(torch.ones(8).numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)
    assert "is damaged" in message(common.load_checkpoint, path, "x", "maze", "the command")


def test_a_checkpoint_of_another_version_is_one_line(trained, tmp_path):
    root = clone(trained, tmp_path / "root")
    path = root / "runs/maze/latent_dynamics.pt"
    saved = torch.load(path, weights_only=True)
    common.save_checkpoint(path, **{key: value for key, value in saved.items() if key != "fingerprint"})
    line = message(train_latent_bc.main, stage2(root))
    assert f"{path} holds no 'fingerprint'" in line and "another version" in line and "train_latent_dynamics.py --game maze" in line

    common.save_checkpoint(path, **saved | dict(idm=saved["fdm"]))
    loaded = common.load_checkpoint(path, "latent_dynamics", "maze", "the command")
    line = message(loaded.fill, train_latent_dynamics.IDM(16, 1, 0.25, 24), "idm")
    assert "'idm' does not fit its network" in line and "the command" in line
    common.save_checkpoint(path, **saved | dict(idm=3))
    loaded = common.load_checkpoint(path, "latent_dynamics", "maze", "the command")
    assert "'idm' does not fit" in message(loaded.fill, train_latent_dynamics.IDM(16, 1, 0.25, 24), "idm")


def write_claim(path, shape, content, file_size=None):
    """An .npz with `obs` whose header claims `shape` over a few bytes; with `file_size`, the archive itself lies as well."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, dict(descr="|u1", fortran_order=False, shape=shape))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("obs.npy", header.getvalue() + content)
        archive.writestr("first.npy", b""), archive.writestr("settings.npy", b"")
    if file_size:
        true, false = ((len(header.getvalue()) + size).to_bytes(4, "little") for size in (len(content), file_size))
        path.write_bytes(path.read_bytes().replace(true, false))


def test_a_file_that_claims_to_be_huge_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(common.files, "read_array", None)  # which would ask for the memory
    path = tmp_path / "frames_000.npz"
    for shape, lie in (((10**12, 64, 64, 3), None), ((2**31,), 2**31), ((10**30,), None), ((-1, 64, 64, 3), None), ((-2, -2), None)):
        write_claim(path, shape, bytes(100), lie)
        assert "is damaged" in message(common.read_frames, path, "maze")
        assert "is damaged" in message(common.count_rows, path)
        assert "is damaged" in message(common.FrameStore, tmp_path, "maze", 1, 10**6, 1, torch.device("cpu"))


def test_a_pickle_in_any_file_is_refused(trained, tmp_path):
    root, bomb = clone(trained, tmp_path / "root"), Bomb(tmp_path / "exploded")
    state = root / "runs/maze/train_latent_bc_state.pt"
    torch.save(dict(kind="train_latent_bc_state", game="maze", flags={}, step=bomb), state)
    assert "is damaged" in message(train_latent_bc.main, stage2(root, resume=True))
    state.unlink()
    latents = next((root / "runs/maze/train").glob("*.npz"))
    np.savez(latents, z=np.array([bomb], dtype=object), codes=np.zeros((1, 8), np.uint8), valid=np.ones(1, bool), dynamics="")
    assert "is damaged" in message(train_latent_bc.main, stage2(root))
    torch.save(bomb, root / "runs/maze/latent_dynamics.pt")
    assert "is damaged" in message(train_latent_bc.main, stage2(root))
    assert not (tmp_path / "exploded").exists()


def test_latents_and_labels_of_other_types_are_refused(trained, tmp_path):
    root = clone(trained, tmp_path / "root")
    path = next((root / "runs/maze/train").glob("*.npz"))
    latents = common.load_npz(path, ("z", "codes", "valid", "dynamics"), "")
    common.save_npz(path, **latents | dict(z=latents["z"].astype(float)))
    assert "z float64 (80, 24)" in message(train_latent_bc.main, stage2(root))
    frames = next((root / "data/maze/train").glob("frames_*.npz"))
    for wrong in (np.zeros(80), np.full(80, 15, np.uint8), np.zeros((80, 2), np.uint8), np.zeros(79, np.uint8)):
        common.save_npz(common.beside(frames, "labels"), action=wrong, reward=np.zeros(80, np.float32), expert_return=1.0)
        assert "labels_" in message(common.read_labels, frames, "maze")


# --- numbers and games -------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_stage_1(trained, tmp_path, monkeypatch):
    calls, loss = [], train_latent_dynamics.dynamics_loss

    def nan_in_the_third(*arguments):
        calls.append(1)
        return tuple(part * (float("nan") if len(calls) == 3 else 1.0) for part in loss(*arguments))

    monkeypatch.setattr(train_latent_dynamics, "dynamics_loss", nan_in_the_third)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path)  # reports after steps 2 and 4
    assert "no longer finite at step 4" in str(stop.value) and "lower learning rate" in str(stop.value)
    saved = common.load_checkpoint(tmp_path / "runs/maze/latent_dynamics.pt", "latent_dynamics", "maze", "")
    assert saved["grad_step"] == 2 and all(weight.isfinite().all() for weight in saved["idm"].values())


def test_a_loss_that_is_not_finite_stops_stage_2_and_the_expert(trained, tmp_path):
    root = clone(trained, tmp_path / "root")
    train_latent_bc.main(stage2(root))
    before = (root / "runs/maze/latent_policy.pt").read_bytes()
    # neither the checkpoint nor a state, which is due after each step
    line = message(train_latent_bc.main, stage2(root, lr=1e38, eval_every=4, checkpoint_minutes=1e-9))
    assert "no longer finite at step" in line and (root / "runs/maze/latent_policy.pt").read_bytes() == before
    state = torch.load(root / "runs/maze/train_latent_bc_state.pt", weights_only=True)
    assert all(weight.isfinite().all() for weight in state["parts"].get("policy", {}).values())

    args = small_args(tmp_path, expert_lr=1e30, train_frames=0)
    assert "no longer finite at step 128" in message(collect_data.main, args)
    assert not args.experts_dir.exists()


def test_a_codebook_that_collapses_is_told(trained, tmp_path, monkeypatch, capsys):
    report = train_latent_dynamics.report
    monkeypatch.setattr(train_latent_dynamics, "report", lambda *a: report(*a) | dict(perplexity_0=1.01, perplexity_1=5.0))
    train(tmp_path)
    said = capsys.readouterr().out
    assert "warning: codebook 0 has collapsed to a perplexity of 1.01 of 8" in said and "--vq-decay" in said and "codebook 1" not in said


def test_rows_without_an_episode_are_told(tmp_path, capsys):
    log = common.MetricsLog(tmp_path / "a.csv", 10, "step")
    log.write(env_step=1, mean_return=1.0, episodes=2)
    assert "no episode" not in capsys.readouterr().out
    log.write(env_step=2, mean_return=float("nan"), episodes=0)
    assert "note: no episode has ended since the last row" in capsys.readouterr().out


@pytest.mark.parametrize("call", ["observe", "act"])
def test_a_game_that_fails_is_one_line(tmp_path, monkeypatch, call):
    def broken(*arguments):
        raise RuntimeError("out of levels")

    monkeypatch.setattr(common.games.ProcgenGym3Env, call, broken)
    line = message(collect_data.main, small_args(tmp_path, train_frames=0))
    assert "Procgen failed (RuntimeError: out of levels)" in line and "--resume" in line


def test_one_action_in_the_labels_needs_no_probe():
    windows = torch.zeros(20, 3, 16, 16, 3, dtype=torch.uint8)
    idm, fdm = train_latent_dynamics.IDM(16, 1, 0.25, 24), train_latent_dynamics.FDM(16, 1, 24, 4, predict_change=False)
    alike = (windows, np.ones(20, int))
    assert "probe" not in train_latent_dynamics.report(idm, train_latent_dynamics.NoQuantizer(), fdm, alike, alike)
