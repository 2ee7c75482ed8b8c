"""Videos and the official code's recordings become frames that stages 1 and 2 take."""

import shutil
import struct

import av
import numpy as np
import pytest
from conftest import fails, load, run
from filelock import FileLock
from PIL import Image

import common
import train_latent_bc as stage2
import train_latent_dynamics as stage1
from extras import import_video


def write_video(path, frames, cover=None):
    """frames uint8 [N, H, W, 3]; cover uint8 [H, W, 3]: a still picture as first stream."""
    with av.open(str(path), "w") as video:
        streams = {"mjpeg": cover[None]} if cover is not None else {}
        streams["mpeg4"] = frames
        outputs = []
        for codec, pictures in streams.items():
            stream = video.add_stream(codec, rate=10)
            stream.height, stream.width = pictures.shape[1:3]
            stream.pix_fmt = "yuv420p" if codec == "mpeg4" else "yuvj420p"
            stream.bit_rate = 4_000_000
            outputs.append((stream, pictures))
        for stream, pictures in outputs:
            for picture in pictures:
                video.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            video.mux(stream.encode())
    return path


def animation():
    """uint8 [80, 48, 64, 3]: a white square moves over dark gray, then over light gray."""
    frames = np.ones((80, 48, 64, 3), np.uint8)
    frames[:40] *= 40
    frames[40:] *= 160
    for i, frame in enumerate(frames):
        x = i % 12 * 4
        frame[16:32, x : x + 16] = 255
    return frames


def means(frames):
    """uint8 [N, 48, 64, 3] -> [N, 16, 16, 3], what 16x16 frames are to hold"""
    return frames.reshape(-1, 16, 3, 16, 4, 3).mean((2, 4))


def replace(path, old, new):
    """Changes bytes of a file; old: bytes that occur in it, or their position."""
    content = bytearray(path.read_bytes())
    start = old if isinstance(old, int) else content.index(old)
    content[start : start + len(new)] = new
    path.write_bytes(content)


def convert(tmp_path, *files, **flags):
    """The content of the files that it makes: [train's, test's], each frames first, then labels."""
    if flags.pop("again", False):
        shutil.rmtree(tmp_path / "data")
    flags = dict(name="clip", data_dir=tmp_path / "data", frame_size=16) | flags
    import_video.main(import_video.Args(files=files, **flags))
    folders = [tmp_path / "data" / flags["name"] / split for split in ("train", "test")]
    return [[load(path) for path in sorted(folder.iterdir())] for folder in folders]


def all_frames(tmp_path, *files, **flags):
    """uint8 [N, 16, 16, 3]: train's, then test's."""
    (train,), (test,) = convert(tmp_path, *files, **flags)
    return np.concatenate([train["obs"], test["obs"]])


def test_a_video_is_resized_strided_and_cut_and_trains(tmp_path, record_calls):
    bars = record_calls(common, "progress_bar")
    clip = write_video(tmp_path / "clip.mp4", animation())
    (train,), (test,) = convert(tmp_path, clip, stride=2, test_fraction=0.25)
    obs = np.concatenate([train["obs"], test["obs"]])
    assert obs.shape == (40, 16, 16, 3) and len(test["obs"]) == 10
    assert abs(obs - means(animation()[::2])).mean() < 3  # of 255; the codec loses some
    assert np.flatnonzero(train["first"]).tolist() == [0, 20]
    assert np.flatnonzero(test["first"]).tolist() == [0]
    assert bars == [[80, "frame", "clip.mp4"]]
    for script in (stage1, stage2):
        run(script, tmp_path, game="clip", grad_steps=2)


def test_each_file_starts_an_episode(tmp_path):
    clip = write_video(tmp_path / "clip.mp4", animation()[:20])
    (train,), _ = convert(tmp_path, clip, clip)
    assert np.flatnonzero(train["first"]).tolist() == [0, 20]


def test_colour_keeps_its_resolution(tmp_path):
    """Resized to 16x16, stripes of one pixel; 4:2:0 to RGB at once would mix two of them."""
    stripes = np.zeros((10, 64, 64, 3), np.uint8)
    colours = np.uint8([(200, 60, 60), (60, 60, 200)])[np.arange(16) % 2]
    stripes[:] = colours.repeat(4, 0)
    clip = write_video(tmp_path / "clip.mp4", stripes)
    obs = all_frames(tmp_path, clip, test_fraction=0.4)
    assert abs(obs - colours.astype(float)).mean() < 10


def test_rotation_in_the_metadata_is_applied(tmp_path):
    frames = animation()[:20]
    clip = write_video(tmp_path / "clip.mp4", frames)
    upright = all_frames(tmp_path, clip, test_fraction=0.3)
    # the matrix of a phone that is held upright: display turns 90 degrees clockwise
    matrix = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 48 << 16, 0, 1 << 30)
    replace(clip, clip.read_bytes().index(b"tkhd") + 44, matrix)
    obs = all_frames(tmp_path, clip, test_fraction=0.3, again=True)
    assert np.array_equal(obs, np.rot90(upright, -1, axes=(1, 2)))
    assert not np.array_equal(obs, upright)


def packets(path):
    """(position, size) of each packet in the file."""
    with av.open(str(path)) as video:
        return [(packet.pos, packet.size) for packet in video.demux(video=0) if packet.size]


@pytest.mark.parametrize("bad", (-1, 30))
def test_frames_before_a_bad_packet_are_kept(tmp_path, capsys, bad):
    clip = write_video(tmp_path / "clip.mp4", animation())
    whole = all_frames(tmp_path, clip)
    other = write_video(tmp_path / "other.mp4", animation()[:10])
    position, size = packets(clip)[bad]
    replace(clip, position, bytes(size))
    (train,), (test,) = convert(tmp_path, clip, other, again=True)
    obs = np.concatenate([train["obs"], test["obs"]])
    kept = bad % 80
    assert len(obs) == kept + 10 and np.array_equal(obs[:kept], whole[:kept])
    printed = capsys.readouterr().out
    assert "clip.mp4 is damaged (Invalid data" in printed and f"{kept} frames before" in printed


def test_a_cover_beside_the_video_is_not_the_video(tmp_path):
    cover = np.full((32, 32, 3), 255, np.uint8)
    clip = write_video(tmp_path / "clip.mp4", animation(), cover)
    with av.open(str(clip)) as video:
        assert video.streams.video[0].codec_context.name == "mjpeg"
    obs = all_frames(tmp_path, clip)
    assert len(obs) == 80 and abs(obs - means(animation())).mean() < 3


def test_numbered_pictures_are_one_video(tmp_path):
    paths = [tmp_path / f"{i:04d}.png" for i in range(20)]
    for path, frame in zip(paths, animation()):
        Image.fromarray(frame).save(path)
    message = fails(convert, tmp_path, *paths)
    assert "0000.png gives 1 frame(s)" in message and '"frames/%04d.png"' in message
    obs = all_frames(tmp_path, tmp_path / "%04d.png", test_fraction=0.2)
    assert len(obs) == 20 and abs(obs - means(animation()[:20])).mean() < 3


def test_frames_that_stand_still_give_a_warning(tmp_path, capsys):
    moving = animation()[:40]
    all_frames(tmp_path, write_video(tmp_path / "clip.mp4", moving))
    assert "warning" not in capsys.readouterr().out
    still = np.concatenate([moving, moving[-1:].repeat(40, 0)])
    all_frames(tmp_path, write_video(tmp_path / "clip.mp4", still), again=True)
    assert "of test repeats the frame before" in capsys.readouterr().out


def test_metadata_that_is_not_utf_8_does_no_harm(tmp_path):
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as video:
        video.metadata["title"] = "QQQQ"
        stream = video.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for frame in animation()[:20]:
            video.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        video.mux(stream.encode())
    replace(path, b"QQQQ", b"\xe9\xff\xe9\xff")
    assert len(all_frames(tmp_path, path, test_fraction=0.2)) == 20


@pytest.mark.parametrize("name, codec_tag", [("clip.avi", b"FMP4"), ("clip.mkv", b"MPEG4/ISO/ASP")])
def test_a_codec_without_decoder_gives_one_line(tmp_path, name, codec_tag):
    """PyAV would crash on the first packet."""
    clip = write_video(tmp_path / name, animation()[:5])
    content = clip.read_bytes()
    clip.write_bytes(content.replace(codec_tag, b"Z" * len(codec_tag)))
    assert f"lacks a decoder for the video in {clip}" in fails(convert, tmp_path, clip)
    assert not (tmp_path / "data").exists()


def write_sound(path, with_cover):
    with av.open(str(path), "w") as file:
        sound = file.add_stream("aac", rate=16_000)
        if with_cover:
            cover = file.add_stream("mjpeg", rate=1)
            cover.height, cover.width, cover.pix_fmt = 32, 32, "yuvj420p"
            cover.disposition = av.stream.Disposition.attached_pic.value
            file.mux(cover.encode(av.VideoFrame(32, 32, "yuvj420p")))
        samples = np.zeros((1, 1024), np.float32)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate = 16_000
        file.mux(sound.encode(frame))
        file.mux(sound.encode())
    return path


def test_files_without_video_give_one_line(tmp_path):
    for with_cover in (False, True):
        sound = write_sound(tmp_path / "sound.mp4", with_cover)
        assert "sound.mp4 holds no video" in fails(convert, tmp_path, sound)
    text = tmp_path / "text.mp4"
    text.write_text("not a video")
    assert "text.mp4 is not a video that" in fails(convert, tmp_path, text)
    assert "(No such file or directory)" in fails(convert, tmp_path, tmp_path / "none.mp4")
    assert "(Is a directory)" in fails(convert, tmp_path, tmp_path)
    # before the first file is decoded
    clip = write_video(tmp_path / "clip.mp4", animation())
    assert "text.mp4 is not a video that" in fails(convert, tmp_path, clip, text)
    assert not (tmp_path / "data").exists()


def official_recording(n):
    rng = np.random.default_rng(0)
    return dict(
        obs=rng.integers(256, size=(n, 64, 64, 3), dtype=np.uint8),
        ta=rng.integers(15, size=n),
        done=np.arange(n) % 7 == 6,
        rewards=rng.random(n),
        values=rng.random(n),
    )


def test_recordings_of_the_official_code_keep_their_labels(tmp_path):
    arrays = official_recording(40)
    np.savez(tmp_path / "chunk.npz", **arrays)
    (frames, labels), (held_out, _) = convert(tmp_path, tmp_path / "chunk.npz", frame_size=32)
    obs = np.concatenate([frames["obs"], held_out["obs"]])
    blocks = arrays["obs"].reshape(40, 32, 2, 32, 2, 3).mean((2, 4))
    assert abs(obs - blocks).max() <= 0.5
    assert np.flatnonzero(frames["first"]).tolist() == [0, 7, 14, 21, 28, 35]
    assert np.array_equal(labels["action"], arrays["ta"][:36])
    np.testing.assert_allclose(labels["reward"], arrays["rewards"][:36], rtol=1e-6)
    # as one of Procgen's games, with the returns that later stages need
    convert(tmp_path, tmp_path / "chunk.npz", name="maze", frame_size=32)
    recording = common.read_frames(tmp_path / "data/maze/train/frames_000.npz", "maze")[2]
    assert recording["expert_return"] == common.GAMES["maze"].expert_return
    assert recording["num_levels"] == 0


def test_more_frames_than_a_shard_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(import_video, "SHARD_FRAMES", 16)
    np.savez(tmp_path / "chunk.npz", **official_recording(40))
    train, _ = convert(tmp_path, tmp_path / "chunk.npz")
    frames, labels = train[:3], train[3:]
    assert [len(shard["obs"]) for shard in frames] == [16, 16, 4]
    assert [shard["first"][0] for shard in frames] == [True] * 3
    action = np.concatenate([shard["action"] for shard in labels])
    assert np.array_equal(action, official_recording(40)["ta"][:36])


@pytest.mark.parametrize("name", ("..", ".", "", "a/b", "../b", "/b", "b/"))
def test_a_name_that_is_no_folder_of_the_data_is_refused(tmp_path, name):
    clip = write_video(tmp_path / "clip.mp4", animation())
    assert f"--name '{name}' is not the name" in fails(convert, tmp_path, clip, name=name)
    assert not (tmp_path / "data").exists()


def test_what_users_do_wrong_gives_one_line_and_keeps_what_was_there(tmp_path):
    clip = write_video(tmp_path / "clip.mp4", animation())
    assert "--stride 0: 1 is the least" in fails(convert, tmp_path, clip, stride=0)
    assert "not between 0 and 1" in fails(convert, tmp_path, clip, test_fraction=1.5)
    assert "at least one file" in fails(convert, tmp_path)
    assert "do not mix" in fails(convert, tmp_path, clip, tmp_path / "chunk.npz")
    assert not (tmp_path / "data").exists()
    arrays = official_recording(4)
    np.savez(tmp_path / "chunk.npz", **arrays | dict(obs=np.zeros((4, 3, 64, 64), np.uint8)))
    assert "obs uint8 (4, 3, 64, 64)" in fails(convert, tmp_path, tmp_path / "chunk.npz")
    np.savez(tmp_path / "chunk.npz", **arrays | dict(ta=np.zeros(3)))
    assert "labels of other lengths" in fails(convert, tmp_path, tmp_path / "chunk.npz")
    before = all_frames(tmp_path, clip)
    assert "is there already; remove it" in fails(convert, tmp_path, clip, stride=2)
    assert "gives 2 frame(s)" in fails(convert, tmp_path, clip, stride=40, name="short")
    assert "fewer than 3" in fails(convert, tmp_path, clip, stride=8, name="short")
    (tmp_path / "data/other").mkdir()
    with FileLock(tmp_path / "data/other/.train.lock"):  # as another run holds it
        assert "another run is writing" in fails(convert, tmp_path, clip, name="other")
    train = load(tmp_path / "data/clip/train/frames_000.npz")
    assert np.array_equal(train["obs"], before[: len(train["obs"])])
