"""plot_figures.py on a made-up results folder: what is averaged, what is left out, what is said to be missing."""

import json
import shutil
from pathlib import Path

import common
import numpy as np
import plot_figures as figures
import pytest

ROOT = Path(__file__).resolve().parents[1]
RL_SL, SCRATCH = figures.ONLINE["rl_sl"], figures.ONLINE["scratch"]


def settings(folder, seed, changed):
    papers = dict(game=folder.removesuffix("_no_vq"), seed=seed, vq=True, num_levels=0, frame_size=64)
    return json.dumps(papers | (changed or {}))


def write_offline(folder, game, seed, returns, labels=figures.LABELS, changed=None):
    """returns [L, decoders]"""
    common.save_npz(
        folder / game / f"seed_{seed}" / "decode_offline.npz", labels=np.array(labels), returns=np.array(returns),
        random_return=0.0, expert_return=20.0, settings=settings(game, seed, changed),
    )  # fmt: skip


def write_online(folder, game, seed, slope, method="rl_sl", last=4_000_000, changed=None):
    """A straight line from 0, by a million steps."""
    steps = np.append(np.arange(50_000, last, 50_000), last)
    common.save_npz(
        folder / game / f"seed_{seed}" / f"decode_online_{method}.npz", env_steps=steps, returns=slope * steps / 1e6,
        episodes=np.full(len(steps), 9), random_return=0.0, expert_return=20.0,
        settings=settings(game, seed, changed),
    )  # fmt: skip


def write_latents(folder, game, seed, changed=None):
    rng = np.random.default_rng(seed)
    common.save_npz(
        folder / game / f"seed_{seed}" / "latents.npz", xy=rng.normal(size=(50, 2)),
        distinct_action=rng.integers(15, size=50).astype(np.uint8), linear=np.array([0.5, 0.6]),
        majority=np.array([0.2, 0.3]), settings=settings(game, seed, changed),
    )  # fmt: skip


@pytest.fixture
def results(tmp_path):
    """Three games, up to two seeds."""
    shutil.copytree(ROOT / "results" / "paper", tmp_path / "paper")
    flat = np.ones((10, 1))
    write_offline(tmp_path, "bigfish", 1, flat * [4.0, 6.0])  # two decoders: 5
    write_offline(tmp_path, "bigfish", 2, flat * [7.0, 11.0])  # 9
    write_offline(tmp_path, "maze", 1, flat * [6.0])
    write_online(tmp_path, "bigfish", 1, 2.0)
    write_online(tmp_path, "bigfish", 2, 4.0)
    write_online(tmp_path, "heist", 1, 1.0)
    write_online(tmp_path, "heist", 2, 3.0)
    write_online(tmp_path, "bigfish", 1, 1.0, method="ilpo")
    write_online(tmp_path, "bigfish_no_vq", 2, 1.5, method="rl", changed=dict(vq=False))
    write_latents(tmp_path, "bigfish", 1)
    write_latents(tmp_path, "maze_no_vq", 1, changed=dict(vq=False))
    rows = ("grad_step,perplexity,histogram,policy_entropy", "10,2.0,0.5 0.5,0.6", "20,1.0,1.0 0.0,0.1")
    (tmp_path / "bigfish" / "seed_1" / "train_ilpo.csv").write_text("\n".join(rows))
    return tmp_path


def error_line(folder, **changed):
    with pytest.raises(SystemExit) as error:
        figures.main(figures.Args(results_dir=folder, output_dir=folder / "figures", **changed))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_curves_average_decoders_then_seeds(results):
    left_out = {}
    curves, experts = figures.read_curves(results, (1, 2, 3), left_out)
    assert left_out == {} and experts == dict(bigfish=20.0, maze=20.0, heist=20.0)
    mean, std = figures.over_seeds(curves[figures.OFFLINE]["bigfish"])
    assert mean == pytest.approx(7.0) and std == pytest.approx(np.sqrt(8))  # of 5 and 9, over n - 1
    mean, std = figures.over_seeds(curves[figures.OFFLINE]["maze"])
    assert mean == pytest.approx(6.0) and np.isnan(std).all()  # one seed
    mean, std = figures.over_seeds(curves[RL_SL]["bigfish"])
    assert mean == pytest.approx(3.0 * figures.STEPS / 1e6) and std == pytest.approx(np.sqrt(2) * figures.STEPS / 1e6)
    assert SCRATCH not in curves and list(curves[figures.ONLINE["rl_no_vq"]]["bigfish"]) == [2]


def test_aggregate_is_the_mean_of_normalised_games(results):
    curves, _ = figures.read_curves(results, (1, 2), {})
    mean, std = figures.over_games(curves[RL_SL])
    spans = {game: common.RETURNS[game][1] - common.RETURNS[game][0] for game in ("bigfish", "heist")}
    steps = figures.STEPS / 1e6
    bigfish = (3 * steps - common.RETURNS["bigfish"][0]) / spans["bigfish"]
    heist = (2 * steps - common.RETURNS["heist"][0]) / spans["heist"]
    assert mean == pytest.approx((bigfish + heist) / 2)
    spread = [np.sqrt(2) * steps / spans["bigfish"], np.sqrt(2) * steps / spans["heist"]]
    assert std == pytest.approx(np.sqrt(spread[0] ** 2 + spread[1] ** 2) / 2)
    mean, std = figures.over_games(curves[figures.OFFLINE])  # maze has one seed, so nothing is known of the aggregate's spread
    assert np.isfinite(mean).all() and np.isnan(std).all()


def test_the_papers_curve_over_the_same_games():
    paper = figures.read_paper(ROOT / "results")
    assert set(paper[RL_SL]) == {*common.RETURNS, "aggregate"}
    at_100k = figures.paper_over_games(paper[RL_SL], ["bigfish"], figures.STEPS)[1]
    assert at_100k == pytest.approx(common.normalize_return(25.99, *common.RETURNS["bigfish"]))
    offline = figures.paper_over_games(paper[figures.OFFLINE], common.RETURNS, figures.LABELS)
    assert offline == pytest.approx(paper[figures.OFFLINE]["aggregate"][1], abs=0.03)  # our normalisation is the paper's
    assert figures.paper_over_games(paper[figures.ONLINE["ilpo"]], ["bigfish"], figures.STEPS) is None  # it shows no game of ILPO


def test_grids():
    y = figures.on_grid(np.array([0, 1, 2, 3, 4]), np.array([1, 2, 3]), np.array([10.0, np.nan, 30.0]))
    assert np.isnan(y[[0, 4]]).all() and y[1:4].tolist() == [10, 20, 30]  # an interval in which no episode ended does not count
    y = figures.at_labels(np.array([16, 256, 99]), np.array([1.0, 2.0, 3.0]))
    assert y[0] == 1 and y[4] == 2 and np.isnan(y[[1, 2, 3, 5, 6, 7, 8, 9]]).all()


@pytest.mark.parametrize(
    "changed, reason",
    [
        (dict(num_levels=5), "toy scale (5 levels, 64x64"),
        (dict(frame_size=32), "toy scale (all levels, 32x32"),
        (dict(vq=False), "it was made without VQ"),
        (dict(seed=1), "it was made with seed 1"),
        (None, "it ends after 1,000,000 of 4,000,000 steps"),
    ],
)
def test_runs_that_are_not_the_papers_are_left_out_and_named(results, changed, reason):
    write_online(results, "bigfish", 2, 400.0, changed=changed, last=4_000_000 if changed else 1_000_000)
    curves, _ = figures.read_curves(results, (1, 2), left_out := {})
    assert list(curves[RL_SL]["bigfish"]) == [1] and reason in left_out[results / "bigfish/seed_2/decode_online_rl_sl.npz"]
    lines = figures.missing_lines(results, (1, 2), left_out)
    assert any(line.startswith("missing: bigfish, seed 2: decode_online_rl_sl.npz") for line in lines)


def test_a_file_that_does_not_tell_its_scale_is_left_out(results):
    path = results / "maze/seed_1/decode_offline.npz"
    shutil.copy(ROOT / "results/coinrun_5_levels/decode_online_rl_sl.npz", results / "maze/seed_1/decode_online_rl_sl.npz")
    assert "is of 'coinrun', not of 'maze'" in error_line(results)
    (results / "maze/seed_1/decode_online_rl_sl.npz").unlink()
    with np.load(path) as arrays:
        common.save_npz(path, **{**arrays, "settings": json.dumps(dict(game="maze", seed=1, vq=True))})
    curves, _ = figures.read_curves(results, (1,), left_out := {})
    assert "maze" not in curves[figures.OFFLINE] and "older version" in left_out[path]


def test_figures_and_words_for_what_is_there_and_what_is_not(results, capsys):
    shutil.copytree(ROOT / "results" / "coinrun_5_levels", results / "coinrun_5_levels")
    figures.main(figures.Args(results_dir=results, output_dir=results / "figures"))
    names = ("figure_3", "figure_3_games", "figure_4", "figure_a1", "figure_5", "figure_a2", "figure_a5")
    assert sorted(path.name for path in (results / "figures").iterdir()) == sorted(f"{name}.png" for name in names)
    assert all((results / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in names)
    out = capsys.readouterr().out.splitlines()
    missing = [line for line in out if line.startswith("missing: ")]
    ours = "decode_online_rl.npz, decode_online_scratch.npz"
    assert f"missing: bigfish, seed 1: {ours}" in missing
    assert f"missing: bigfish, seed 2: {ours}, decode_online_ilpo.npz, latents.npz" in missing
    assert "missing: coinrun, all seeds: everything" in missing and "missing: coinrun_no_vq, all seeds: everything" in missing
    assert "missing: bigfish_no_vq, seed 1: everything" in missing
    assert "missing: bigfish_no_vq, seed 2: latents.npz" in missing
    assert [line for line in out if "coinrun_5_levels" in line] == [
        f"left out: {results / 'coinrun_5_levels'}: not called <game> or <game>_no_vq"
    ]
    (bigfish,) = [line for line in out if line.startswith("bigfish ")]
    assert "7.00 ± 2.83 (2) | " in bigfish and "11.70 ± 5.52 (2) | " in bigfish and "3.90 (1) | -" in bigfish
    assert not any(line.startswith("coinrun ") for line in out)


def test_nothing_there_is_said_and_draws_nothing(tmp_path, capsys):
    shutil.copytree(ROOT / "results" / "paper", tmp_path / "paper")
    figures.main(figures.Args(results_dir=tmp_path, output_dir=tmp_path / "figures"))
    out = capsys.readouterr().out
    assert "no figure" in out and out.count("missing: ") == 32 and not (tmp_path / "figures").exists()


def test_damaged_and_missing_files_are_one_line(results):
    path = results / "bigfish/seed_1/decode_online_rl_sl.npz"
    content = path.read_bytes()
    path.write_bytes(content[:200])
    assert error_line(results).endswith("make it anew with: python decode_online_ppo.py --game bigfish --seed 1 --method rl_sl")
    path.write_bytes(content)
    (results / "bigfish/seed_1/train_ilpo.csv").write_text("grad_step,perplexity\n1,2\n")
    assert "train_ilpo.csv is damaged" in error_line(results)
    (results / "paper" / "paper_online.csv").write_text("game,method,env_steps,return\nbigfish,rl,zero,1\n")
    assert "paper_online.csv is damaged" in error_line(results)
    assert "is not there" in error_line(results / "nowhere")


def test_commands_that_make_a_file():
    assert figures.made_by("maze", "_no_vq", 2, "latents.npz") == "python visualize_latents.py --game maze --seed 2 --no-vq"
    assert figures.made_by("maze", "", 1, "decode_offline.npz") == "python decode_offline.py --game maze --seed 1"
    ilpo = figures.made_by("maze", "", 1, "decode_online_ilpo.npz")
    assert ilpo == "python decode_online_ppo.py --game maze --seed 1 --method ilpo"
