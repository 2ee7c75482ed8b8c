"""Videos and the official code's recordings become frames that stages 1 and 2 take."""

import av
import numpy as np
import pytest
from conftest import STAGE_1, STAGE_2, fails

import common
import import_video
import train_latent_bc as stage2
import train_latent_dynamics as stage1


def write_video(path, frames):
    with av.open(str(path), "w") as video:
        stream = video.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.bit_rate = 4_000_000
        for frame in frames:
            video.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        video.mux(stream.encode())


def animation():
    """uint8 [80, 48, 64, 3]: a white square moves over dark gray, then over light gray."""
    frames = np.repeat(np.uint8([40, 160]), 40)[:, None, None, None] * np.ones(
        (48, 64, 3), np.uint8
    )
    for i, frame in enumerate(frames):
        frame[16:32, (x := i % 12 * 4) : x + 16] = 255
    return frames


def run(tmp_path, files, **flags):
    flags = dict(name="clip", data_dir=tmp_path / "data", frame_size=16) | flags
    import_video.main(import_video.Args(files=tuple(files), **flags))
    splits = [sorted((tmp_path / f"data/clip/{split}").glob("*")) for split in ("train", "test")]
    return [[dict(np.load(path)) for path in paths] for paths in splits]


def test_a_video_is_resized_strided_and_cut_and_trains(tmp_path):
    frames = animation()
    write_video(tmp_path / "clip.mp4", frames)
    (train,), (test,) = run(tmp_path, [tmp_path / "clip.mp4"], stride=2, test_fraction=0.25)
    obs = np.concatenate([train["obs"], test["obs"]])
    assert obs.shape == (40, 16, 16, 3) and len(test["obs"]) == 10
    expected = frames[::2].reshape(40, 16, 3, 16, 4, 3).mean((2, 4))
    assert abs(obs - expected).mean() < 3  # of 255; the codec loses some
    assert np.flatnonzero(train["first"]).tolist() == [0, 20] and test["first"].tolist()[0]
    flags = dict(game="clip", data_dir=tmp_path / "data", runs_dir=tmp_path / "runs")
    stage1.main(stage1.Args(**STAGE_1 | flags | dict(grad_steps=2, eval_windows=8)))
    stage2.main(stage2.Args(**STAGE_2 | flags | dict(grad_steps=2, eval_windows=8)))
    assert (tmp_path / "runs/clip/latent_policy.pt").exists()


def test_recordings_of_the_official_code_keep_their_labels(tmp_path):
    rng, n = np.random.default_rng(0), 40
    arrays = dict(
        obs=rng.integers(256, size=(n, 64, 64, 3), dtype=np.uint8), ta=rng.integers(15, size=n),
        done=np.arange(n) % 7 == 6, rewards=rng.random(n), values=rng.random(n),
    )  # fmt: skip
    np.savez(tmp_path / "chunk.npz", **arrays)
    (frames, labels), (held_out, _) = run(tmp_path, [tmp_path / "chunk.npz"], frame_size=64)
    assert np.array_equal(np.concatenate([frames["obs"], held_out["obs"]]), arrays["obs"])
    assert np.flatnonzero(frames["first"]).tolist() == [0, 7, 14, 21, 28, 35]
    assert np.array_equal(labels["action"], arrays["ta"][:36])
    np.testing.assert_allclose(labels["reward"], arrays["rewards"][:36], rtol=1e-6)
    path = tmp_path / "data/clip/train/frames_000.npz"
    assert np.array_equal(common.read_actions(path, "clip"), labels["action"])


def test_what_users_do_wrong_gives_one_line_and_keeps_what_was_there(tmp_path):
    write_video(tmp_path / "clip.mp4", animation())
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "chunk.npz").touch()
    clip = tmp_path / "clip.mp4"
    for name in ("text.mp4", "absent.mp4"):
        assert f"{name} is not a video that" in fails(run, tmp_path, [tmp_path / name])
    assert "do not go into one data set" in fails(run, tmp_path, [clip, tmp_path / "chunk.npz"])
    assert "are too few" in fails(run, tmp_path, [clip], stride=40)
    assert not (tmp_path / "data").exists()
    before = run(tmp_path, [clip])[0][0]
    assert "--overwrite replaces it" in fails(run, tmp_path, [clip], stride=2)
    assert "are too few" in fails(run, tmp_path, [clip], stride=40, overwrite=True)
    after = np.load(tmp_path / "data/clip/train/frames_000.npz")
    assert np.array_equal(after["obs"], before["obs"])


@pytest.mark.parametrize("size", [16, 32, 64])
def test_pictures_become_means_of_areas(size):
    picture = np.random.default_rng(0).integers(256, size=(2 * size, 3 * size, 3), dtype=np.uint8)
    blocks = picture.reshape(size, 2, size, 3, 3).astype(float).mean((1, 3))
    assert abs(import_video.resize(picture, size) - blocks).max() <= 0.5
