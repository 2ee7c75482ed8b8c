"""results/plot_figures.py on made-up runs: means, scales, what is missing and what is refused."""

import re

import common
import numpy as np
import pytest
from conftest import fails
from continuous_control import plot_results
from results import plot_figures as figures

RANDOM, EXPERT, _ = common.GAMES["miner"]
LAPTOP = dict(frame_size=32, num_levels=10, plain=True, random_return=1.0, expert_return=11.0)
PAPER = dict(frame_size=64, num_levels=0, random_return=0.0, expert_return=5.0)


def save(folder, file, scale=LAPTOP, game="miner", seed=1, **arrays):
    """file: <variant>/<file>"""
    path = folder / file.replace("/", f"/seed_{seed}/{game}/")
    settings = dict(game=game, seed=seed) | scale
    common.save_npz(path, settings, **{name: np.array(x) for name, x in arrays.items()})
    return path


def save_online(folder, returns, file="lapo/decode_online_rl_sl.npz", **where):
    """returns: after 100, 200, ... steps"""
    steps = 100 * np.arange(1, len(returns) + 1)
    return save(folder, file, env_steps=steps, returns=returns, **where)


def save_csv(folder, file, text):
    path = folder / file.replace("/", "/seed_1/miner/")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def read(folder, seeds=(1, 2, 3)):
    return figures.Results(figures.read_runs(folder, seeds)[0])


def test_means_over_seeds_and_games_by_hand():
    row = np.array([0.0, 1.0])  # [2] and X = 1: return and normalized return
    curves = {"a": {1: row[:, None], 2: row[:, None] + 2}, "b": {1: 5 * row[:, None]}}
    mean, std = figures.over_games({"a": curves["a"]})
    np.testing.assert_allclose(mean, [[1], [2]])
    np.testing.assert_allclose(std, np.sqrt([[2], [2]]))  # of a sample
    mean, std = figures.over_games(curves)
    np.testing.assert_allclose(mean, [[0.5], [3.5]])
    assert np.isnan(std).all()  # b has one seed
    std = figures.over_games({"a": curves["a"], "b": curves["a"]})[1]
    np.testing.assert_allclose(std, np.sqrt([[2 + 2], [2 + 2]]) / 2)


def test_laptop_scale_is_normalized_by_the_runs_own_returns(tmp_path):
    save_csv(tmp_path, "scratch/expert.csv", "env_step,mean_return\n100,1\n500,21\n")
    assert figures.read_runs(tmp_path, (1,))[0] == {}  # nothing tells its scale
    save_online(tmp_path, [1, np.nan, 11])  # NaN: no episode has ended since the point before
    save_online(tmp_path, [1, 1, 21], seed=2, scale=LAPTOP | dict(expert_return=21.0))
    results = read(tmp_path)
    curves, x = results.curves["lapo_rl_sl"]["miner"], results.x["lapo_rl_sl"]
    assert x[-1] == 300 and len(x) == 100
    np.testing.assert_allclose(curves[1][:, x == 150].ravel(), [3.5, 0.25])
    np.testing.assert_allclose(curves[2][:, -1], [21, 1])
    assert np.isnan(curves[1][:, x < 100]).all()
    scratch = results.curves["ppo_scratch"]["miner"][1][:, -1]  # at step 300, not 500
    np.testing.assert_allclose(scratch, [11, 10 / 15])  # by the mean expert of the game's files
    save_online(tmp_path / "paper", [EXPERT] * 40_000, scale=PAPER)  # by the paper's returns
    assert np.nanmax(read(tmp_path / "paper").curves["lapo_rl_sl"]["miner"][1][1]) == 1


def test_means_are_of_the_games_that_have_all_curves(tmp_path):
    for game, last in (("miner", 11), ("maze", 1)):
        save_online(tmp_path, [1, 1, last], game=game)
    compared = ("lapo_rl_sl", "lapo_rl_no_sl")
    for file, game, title, ends in (
        ("", "", "mean of maze, miner", [0.5]),
        ("lapo/decode_online_rl.npz", "miner", "mean of miner", [1, 0.4]),
        ("no_vq/decode_online_rl.npz", "heist", "means, each over its own games", [0.5, 0.4, 0.2]),
    ):
        if file:
            save_online(tmp_path, [1, 1, 5 if game == "miner" else 3], file, game=game)
            compared += ("lapo_rl_no_sl_no_vq",) if game == "heist" else ()
        axes = figures.plt.figure().add_subplot()
        figures.draw_curves(axes, read(tmp_path), compared)
        assert axes.get_title() == title
        solid = [line for line in axes.lines if line.get_linewidth() == 2]
        np.testing.assert_allclose([line.get_ydata()[-1] for line in solid], ends)
        figures.plt.close("all")


def test_offline_curves_and_controls(tmp_path, capsys):
    labels, returns = [16, 300], [[1, 3], [5, 7]]  # [L, decoders]
    arrays = dict(labels=labels, returns=returns, returns_bc_all=[2.0, 4.0], blind_return=1.5)
    save(tmp_path, "lapo/decode_offline.npz", **arrays)
    save(tmp_path, "untrained/decode_offline.npz", labels=labels, returns=[[0], [1]])
    results = read(tmp_path)
    expected = dict(offline=[2, 6], bc_all=[3, 3], blind=[1.5, 1.5], untrained=[0, 1])
    for name, y in expected.items():
        np.testing.assert_allclose(results.curves[name]["miner"][1][0], y)
    x, mean, std = results.point("offline", ["miner"])
    assert x == 300 and mean.tolist() == [6, 0.5] and np.isnan(std).all()
    for best, agrees in ((1, "yes"), (9, "no")):
        save(tmp_path, "untrained/decode_offline.npz", labels=labels, returns=[[0], [best]])
        figures.print_tables(read(tmp_path))
        (row,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("offline > the")]
        assert row.endswith(f"| {agrees}")


def test_figures_and_tables(tmp_path, capsys):
    save_online(tmp_path, [1, 6, 11])
    save_online(tmp_path, [1, 6, 13], seed=2)
    save_online(tmp_path, [1, 2, 8], "ilpo/decode_online_rl.npz")
    save_csv(tmp_path, "scratch/expert.csv", "env_step,mean_return\n100,1\n300,4\n")
    text = "grad_step,train_mse,perplexity,policy_entropy\n10,1,9,2\n20,1,1,0\n"
    save_csv(tmp_path, "ilpo/train_ilpo.csv", text)
    save(tmp_path, "lapo/decode_offline.npz", labels=[16, 256], returns=[[2], [5]], blind_return=1)
    probes = dict(zip(figures.PROBES, (0.9, 0.4, 0.2)), probe=0.8)
    xy = np.random.default_rng(0).normal(size=(30, 2))
    save(tmp_path, "lapo/latents.npz", xy=xy, action=np.arange(30) % 15, **probes)
    figures.main(figures.Args(runs_dir=tmp_path, seeds=(1, 2)))
    output, written = capsys.readouterr().out, {path.name for path in tmp_path.glob("figures/*")}
    names = ("3", "3_games", "4", "5", "a5")  # no run without VQ, so no figure_a2.png
    assert written == {f"figure_{name}.png" for name in names}
    assert "32x32, 10 levels, plain pictures" in output
    assert re.search(r"LAPO: RL and SL +12.00 \+- 1.41 \[1.10\] @300", output)
    assert re.search(r"LAPO, decoded offline +5.00 \+- nan \[0.40\] @256", output)
    assert "0.90 (untrained IDM 0.40, majority 0.20)" in output
    assert "RL+SL > RL > RL no VQ > scratch | 0.99, 0.44 | 1.10 +- 0.14 @300, 0.30 +- nan" in output
    assert "scratch >= ILPO | 0.44, 0.27 | 0.30 +- nan @300, 0.70 +- nan @300 | 1 | no" in output
    assert "miner: missing lapo/decode_online_rl.npz" in output


@pytest.mark.parametrize("game, scale", [("coinrun", PAPER), ("miner", LAPTOP | dict(plain=False))])
def test_mixed_scales_are_refused(tmp_path, game, scale):
    first = save_online(tmp_path, [1, 2])
    second = save_online(tmp_path, [1, 2], "lapo/decode_online_rl.npz", game=game, scale=scale)
    message = fails(read, tmp_path)
    assert str(first) in message and str(second) in message


def test_bad_files_give_one_line_and_a_run_that_stopped_early_is_named(tmp_path):
    assert "nothing is written" in fails(figures.main, figures.Args(runs_dir=tmp_path))
    path = save_online(tmp_path, [1, 2], scale=LAPTOP | dict(env_steps=400))
    missing = figures.read_runs(tmp_path, (1, 3))[1]["miner"]
    assert missing["seed 1 after step 200"] == ["lapo/decode_online_rl_sl.npz"]
    assert "lapo/decode_online_rl_sl.npz" in missing["seed 3"]
    path.write_bytes(path.read_bytes()[:300])
    assert f"{path} is damaged" in fails(read, tmp_path)
    save_online(tmp_path, [1, 2], scale=LAPTOP | dict(seed=2))
    assert "was made with --game miner --seed 2" in fails(read, tmp_path)


def test_continuous_control_over_seeds_by_hand(tmp_path, capsys):
    scale = dict(expert_return=700.0, random_return=10.0, frame_size=32)
    for seed, returns in ((1, [[1, 3], [10, 30]]), (2, [[6, 8], [30, 50]])):
        where = dict(scale=scale, game="cheetah_run", seed=seed, labels=[64, 256])
        save(tmp_path, "lapo_policy/decode_dmc.npz", returns=returns, **where)
    where |= dict(returns_bc=[[1, 3], [10, 30]])
    save(tmp_path, "cloning/decode_dmc.npz", **where)
    everything = dict(returns_bc_all=[[500, 600]], policy_r2_bc_all=[[0.5, 0.5]])
    save(tmp_path, "cloning_all/decode_dmc.npz", **where | everything)
    plot_results.main(plot_results.Args(tmp_path))
    printed = capsys.readouterr().out
    assert "cheetah_run, return with 64, 256 labels" in printed
    # means of seeds 2, 7 and 20, 40; of the clones of one seed 1, 3 and 10, 30
    assert "| lapo_policy (2 x 2) | 4 ± 4 | 30 ± 14 |" in printed
    assert "| cloning (1 x 2) | 2 ± 1 | 20 ± 14 |" in printed
    assert "| cloning_all (1 x 2) | 0.50 ± 0.00 |" in printed
    assert (tmp_path / "figures/cheetah_run.png").exists()
    assert not (tmp_path / "figures/cheetah_run_online.png").exists()
    save(tmp_path / "none", "my_variant/decode_dmc.npz", **where)  # a name that it does not know
    assert "has no" in fails(plot_results.main, plot_results.Args(tmp_path / "none"))


def test_continuous_control_online_over_seeds_by_hand(tmp_path, capsys):
    where = dict(scale=dict(expert_return=700.0, random_return=10.0), game="cheetah_run")
    file = "lapo_match/decode_online_rl_sl.npz"
    save_online(tmp_path, [1, 3, 5, 7, 9, 11, 13, np.nan], file, **where, mean_return=20)
    save_online(tmp_path, [3, 5, 7, 9, 11, 13, 15, 17], file, seed=2, **where, mean_return=24)
    plot_results.main(plot_results.Args(tmp_path))
    # means of quarters 2, 6, 10, 13 and 4, 8, 12, 16; std of a sample
    row = "| LAPO, RL and SL (2) | 3 ± 1 | 7 ± 1 | 11 ± 1 | 14 ± 2 | 22 ± 3 |"
    assert row in capsys.readouterr().out
    assert (tmp_path / "figures/cheetah_run_online.png").exists()
    save_online(tmp_path, [1, 2, 3, 4], file, seed=3, **where, mean_return=1)
    assert "differ in steps" in fails(plot_results.main, plot_results.Args(tmp_path))
