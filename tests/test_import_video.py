"""Videos and the official code's recordings become frames that stages 1 and 2 take."""

import av
import numpy as np
from filelock import FileLock
from conftest import fails, load, run
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


def convert(tmp_path, *files, **flags):
    """The content of the files that it makes: [train's, test's], each frames first, then labels."""
    flags = dict(name="clip", data_dir=tmp_path / "data", frame_size=16) | flags
    import_video.main(import_video.Args(files=files, **flags))
    folders = [tmp_path / "data" / flags["name"] / split for split in ("train", "test")]
    return [[load(path) for path in sorted(folder.iterdir())] for folder in folders]


def test_a_video_is_resized_strided_and_cut_and_trains(tmp_path):
    frames = animation()
    write_video(tmp_path / "clip.mp4", frames)
    (train,), (test,) = convert(tmp_path, tmp_path / "clip.mp4", stride=2, test_fraction=0.25)
    obs = np.concatenate([train["obs"], test["obs"]])
    assert obs.shape == (40, 16, 16, 3) and len(test["obs"]) == 10
    expected = frames[::2].reshape(40, 16, 3, 16, 4, 3).mean((2, 4))
    assert abs(obs - expected).mean() < 3  # of 255; the codec loses some
    assert np.flatnonzero(train["first"]).tolist() == [0, 20] and test["first"].tolist()[0]
    for script in (stage1, stage2):
        run(script, tmp_path, game="clip", grad_steps=2)


def test_recordings_of_the_official_code_keep_their_labels(tmp_path):
    rng, n = np.random.default_rng(0), 40
    arrays = dict(
        obs=rng.integers(256, size=(n, 64, 64, 3), dtype=np.uint8), ta=rng.integers(15, size=n),
        done=np.arange(n) % 7 == 6, rewards=rng.random(n), values=rng.random(n),
    )  # fmt: skip
    np.savez(tmp_path / "chunk.npz", **arrays)
    (frames, labels), (held_out, _) = convert(tmp_path, tmp_path / "chunk.npz", frame_size=32)
    obs = np.concatenate([frames["obs"], held_out["obs"]])
    means = arrays["obs"].reshape(n, 32, 2, 32, 2, 3).mean((2, 4))
    assert abs(obs - means).max() <= 0.5
    assert np.flatnonzero(frames["first"]).tolist() == [0, 7, 14, 21, 28, 35]
    assert np.array_equal(labels["action"], arrays["ta"][:36])
    np.testing.assert_allclose(labels["reward"], arrays["rewards"][:36], rtol=1e-6)
    # as one of Procgen's games, with the returns that later stages need
    convert(tmp_path, tmp_path / "chunk.npz", name="maze", frame_size=32)
    settings = common.read_frames(tmp_path / "data/maze/train/frames_000.npz", "maze")[2]
    assert settings["expert_return"] == common.GAMES["maze"][1] and settings["num_levels"] == 0


def test_what_users_do_wrong_gives_one_line_and_keeps_what_was_there(tmp_path):
    clip, text = tmp_path / "clip.mp4", tmp_path / "text.mp4"
    write_video(clip, animation())
    text.write_text("not a video")
    assert "text.mp4 is not a video that" in fails(convert, tmp_path, text)
    assert "it starts at 1" in fails(convert, tmp_path, clip, stride=0)
    assert "at least one file" in fails(convert, tmp_path)
    channels_first = dict.fromkeys(("ta", "done", "rewards"), np.zeros(4))
    np.savez(tmp_path / "chunk.npz", obs=np.zeros((4, 3, 64, 64), np.uint8), **channels_first)
    assert "obs uint8 (4, 3, 64, 64)" in fails(convert, tmp_path, tmp_path / "chunk.npz")
    mixed = fails(convert, tmp_path, clip, tmp_path / "chunk.npz")
    assert "do not go into one data set" in mixed
    assert not (tmp_path / "data").exists()
    before = convert(tmp_path, clip)[0][0]["obs"]
    assert "--overwrite replaces it" in fails(convert, tmp_path, clip, stride=2)
    assert "fewer than 3" in fails(convert, tmp_path, clip, stride=40, overwrite=True)
    lock = FileLock(tmp_path / "data/clip/.train.lock")
    with lock:  # as another run holds it
        assert "another run is writing" in fails(convert, tmp_path, clip, overwrite=True)
    assert np.array_equal(load(tmp_path / "data/clip/train/frames_000.npz")["obs"], before)
