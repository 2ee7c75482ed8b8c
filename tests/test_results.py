"""Summary tables, figures and Markdown tables of results, against cases computed by hand."""

import csv
import re

import common
import numpy as np
import pytest
from conftest import ROOT, fails
from continuous_control import plot_results
from extras import plot_figures, summarize, write_tables
from extras.plot_figures import OFFLINE, ONLINE, Returns

RECORDING = dict(frame_size=32, plain=True, num_levels=0, random_return=1.0, expert_return=11.0)


def save(folder, file, game="miner", seed=1, recording=RECORDING, **arrays):
    """file: <variant>/<file>; the settings are those that the stages write."""
    variant, name = file.rsplit("/", 1)
    path = folder / variant / f"seed_{seed}" / game / name
    args = dict(game=game, seed=seed, episodes=32)
    settings = dict(recording=dict(game=game, seed=7) | recording, args=args)
    common.save_npz(path, settings, **{name: np.array(x) for name, x in arrays.items()})
    return path


def summary(folder, table="returns.csv"):
    summarize.main(summarize.Args(folder, folder / "out"))
    with open(folder / "out" / table, newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def returns_table(folder, text):
    """A table of returns in words 'variant game seed method x decoder return kind'."""
    lines = ["variant,game,seed,scale,method,labels,env_steps,decoder,mean_return,episodes,kind"]
    for words in map(str.split, text.strip().splitlines()):
        variant, game, seed, method, x, decoder, mean_return, kind = words
        labels, steps = ("", x) if method in ("rl", "rl_sl", "scratch") else (x, "")
        cells = [variant, game, seed, "32x32 plain", method, labels, steps, decoder]
        cells += [mean_return, "4", kind]
        lines.append(",".join(cells).replace("-,", ","))
    write_csv(folder / "returns.csv", "\n".join(lines) + "\n")
    return folder / "returns.csv"


# --- Markdown -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", write_tables.Args().files, ids=str)
def test_markdown_tables_are_those_of_the_summary_tables(path):
    text = (ROOT / path).read_text()
    assert text.count("<!-- table:") == len(write_tables.MARKS.findall(text)) >= 1
    assert write_tables.replace_tables(text) == text


@pytest.mark.parametrize("path", write_tables.Args().files, ids=str)
def test_pictures_of_the_markdown_files_exist(path):
    pictures = re.findall(r"\]\(((?!http)[^)#]+)\)", (ROOT / path).read_text())
    folder = (ROOT / path).parent
    missing = [picture for picture in pictures if not (folder / picture).exists()]
    assert len(pictures) >= 1 and missing == []


def test_a_changed_cell_is_replaced_and_an_unknown_mark_is_refused():
    mark = "<!-- table: demo decoders 16 -->\n"
    text = f"a\n{mark}| 16 labels | 99 |\n<!-- end -->\nb"
    written = write_tables.replace_tables(text)
    assert "99" not in written and written.startswith(f"a\n{mark}| mean ± std over decoders")
    assert "asks for none of" in fails(write_tables.table, "demo nothing")
    assert "is no folder" in fails(write_tables.table, "nothing offline")


def test_cells_by_hand():
    assert write_tables.by_seed({2: 1.0, 1: 2.346}) == "2.35, 1.00"
    assert write_tables.by_seed({1: 1.0, 3: 2.0}) == "1.00, 2.00 (seed 1, 3)"
    assert write_tables.by_seed({1: 9.0, 2: 9.001}) == "9.00 (each)"
    assert write_tables.mean_and_std({1: 1.0, 2: 3.0}) == "2.0 ± 1.4 (2 seeds)"  # of a sample
    assert write_tables.mean_and_std({1: 1.0, 2: 3.0, 3: 2.0}) == "2.0 ± 1.0"
    assert write_tables.mean_and_std({1: 2.0, 2: 2.0}) == "2.0"  # one recording, or a constant
    assert write_tables.mean_and_std({1: 1.0, 2: 3.0}, unit="decoder") == "2.0 ± 1.4 (2 decoders)"
    assert write_tables.mean_and_std({1: 1.0}) == "1.0 (1 seed)"
    curve = {1: {82: 5.0, 160: 6.0}, 2: {60: 7.0}}
    assert write_tables.at(curve, 100) == {1: 5.0}  # 60 is farther away than a fifth


def test_variants_have_their_last_metrics_and_mean_over_decoders(tmp_path):
    returns = """
        lapo miner 1 decoder 16 1 1 quota
        lapo miner 1 decoder 16 2 3 quota
        bits_3 miner 2 decoder 16 1 5 quota
    """
    returns_table(tmp_path, returns)
    stage_1 = "variant,game,seed,grad_step,probe,test_mse,copy_mse\n"
    stage_1 += "lapo,miner,1,0,0.4,9,9\nlapo,miner,1,5,0.8,1,4\nbits_3,miner,2,5,0.6,3,4\n"
    write_csv(tmp_path / "stage_1.csv", stage_1)
    stage_2 = "variant,game,seed,grad_step,variance_explained\nlapo,miner,1,5,0.7\n"
    write_csv(tmp_path / "stage_2.csv", stage_2)
    header, rows = write_tables.variants(tmp_path, "16")
    assert header[-1] == "return, 16 labels"
    assert rows == [
        ["miner, lapo", "0.80", "0.250", "0.70", "2.00"],
        ["miner, bits_3", "0.60 (seed 2)", "0.750 (seed 2)", "", "5.00 (seed 2)"],
    ]


def test_pairs_of_directions_go_from_run_folders_to_a_table(tmp_path):
    for seed, accuracy in ((1, 0.9), (2, 0.6)):
        text = (
            f'actions,accuracy,majority,windows\n"left, up",{accuracy},0.5,9\nall four,0.7,0.3,9\n'
        )
        write_csv(tmp_path / f"lapo/seed_{seed}/heist/action_pairs.csv", text)
    summary(tmp_path, "action_pairs.csv")
    header, rows = write_tables.pairs(tmp_path / "out")
    assert header[1:] == ["left, up", "all four"]
    assert rows == [["heist, lapo", "0.90, 0.60", "0.70 (each)"]]


def test_claims_count_runs_and_take_the_papers_same_games(tmp_path, monkeypatch):
    returns = """
        lapo miner 1 random - - 0 quota
        lapo miner 1 expert - - 10 quota
        lapo miner 1 rl_sl 100 - 9 ended
        lapo miner 2 rl_sl 100 - 5 ended
        lapo miner 3 rl_sl 100 - 1 ended
        lapo miner 1 rl 100 - 8 ended
        lapo miner 2 rl 100 - 6 ended
        no_vq miner 1 rl 100 - 1 ended
        ilpo miner 1 rl 100 - 1 ended
        scratch miner 1 scratch 100 - 1 ended
    """
    returns_table(tmp_path, returns)
    stage_1 = "variant,game,seed,grad_step,probe,majority,test_mse\n"
    stage_1 += "lapo,miner,1,5,1,1,4\nno_vq,miner,1,5,1,1,1\n"
    write_csv(tmp_path / "stage_1.csv", stage_1)
    ends = common.GAMES["miner"]
    paper = f"game,method,env_steps,return\nminer,lapo_rl_sl,0,{ends.random_return}\n"
    paper += f"miner,lapo_rl_sl,200,{ends.expert_return}\nmaze,lapo_rl_sl,200,0\n"
    paper += f"miner,lapo_rl_no_sl,0,{ends.random_return}\n"
    write_csv(tmp_path / "paper_online.csv", paper)
    monkeypatch.setattr(plot_figures, "PAPER", tmp_path)
    claims = [("better", "rl_sl", "rl", 100), ("not run", "decoder", "bc", 16)]
    monkeypatch.setattr(write_tables, "CLAIMS", claims)
    _, (row, loss) = write_tables.claims(tmp_path, "miner")
    values = [  # of seeds 1 and 2, which both methods have
        "0.50 vs 0.00",
        "0.70 ± 0.28 (2 seeds) vs 0.70 ± 0.14 (2 seeds)",
        "0.90, 0.50 vs 0.80, 0.60",
        "1 of 2",
    ]
    assert row == ["better", "100 steps", *values]
    assert loss[2:] == ["below 1", "0.25 (1 seed)", "0.25", "1 of 1"]
    header, (short, _) = write_tables.verdicts(tmp_path, "miner")
    assert "by seed" not in header and short == row[:4] + row[5:]


def test_returns_are_normalized_by_lapos_runs_and_a_control_weighs_nothing(tmp_path):
    returns = """
        lapo miner 1 random - - 1 quota
        lapo miner 1 expert - - 11 quota
        lapo miner 2 expert - - 31 quota
        no_vq miner 1 expert - - 11 quota
    """
    table = Returns(returns_table(tmp_path, returns))
    assert table.normalize(6, "miner") == 0.25  # 1 .. (11 + 31) / 2


def test_the_front_table_takes_the_best_control_and_says_how_many_seeds(tmp_path):
    returns = """
        lapo miner 1 random - - 0 quota
        lapo miner 1 expert - - 10 quota
        lapo miner 1 decoder 16 1 4 quota
        lapo miner 2 decoder 16 1 6 quota
        lapo miner 1 rl_sl 100 - 9 quota
        lapo miner 1 bc 16 1 1 quota
        lapo miner 2 bc 16 1 3 quota
        lapo miner 1 blind - - 1 quota
        untrained miner 1 decoder 16 1 3 quota
        untrained miner 2 decoder 16 1 3 quota
    """
    returns_table(tmp_path, returns)
    header, rows = write_tables.summary(tmp_path, "16")
    assert header[1:] == ["miner (2 seeds)"]
    assert dict(rows) == {
        "random policy": "0.0 (1 seed)",
        "best control, 16 labels": "3.0 (untrained IDM)",
        "**LAPO, 16 labels**": "5.0 ± 1.4",
        "LAPO online (RL and SL), no labels": "9.0 (1 seed) after 100 steps",
        "expert": "10.0 (1 seed)",
    }


# --- summary tables -------------------------------------------------------------------------------


def test_returns_of_a_run_by_hand(tmp_path):
    arrays = dict(labels=[16, 64], returns=[[1, 2], [3, 4.5]], policy_accuracy=[[0.1, 0.2]] * 2)
    save(tmp_path, "a/b/decode_offline.npz", **arrays, blind_return=1.5)
    everything = dict(labels=[5000], returns=[[9.0]], policy_accuracy=[[0.9]])
    save(tmp_path, "a/b/label_efficiency_bc_all.npz", **everything)
    online = dict(env_steps=[10, 20], returns=[np.nan, 8], episodes=[0, 3])
    played = dict(eval_returns=[[2, 3, 1], [4, 5, 9]])
    save(tmp_path, "a/b/decode_online_rl.npz", **online, **played)
    text = "env_step,eval_return\n10,1.5\n20,2.5\n"
    write_csv(tmp_path / "a/b/seed_1/miner/expert.csv", text)
    rows = summary(tmp_path)
    names = "method labels env_steps decoder mean_return policy_accuracy episodes kind"
    found = [",".join(row[name] for name in names.split()) for row in rows]
    assert found == [
        "random,,,,1,,,quota",
        "expert,,,,11,,,quota",
        "decoder,16,,1,1,0.1,32,quota",
        "decoder,16,,2,2,0.2,32,quota",
        "decoder,64,,1,3,0.1,32,quota",
        "decoder,64,,2,4.5,0.2,32,quota",
        "blind,,,,1.5,,,quota",
        "rl,,10,,,,0,ended",
        "rl,,20,,8,,3,ended",
        "rl,,10,,2,,3,quota",
        "rl,,20,,6,,3,quota",
        "bc_all,5000,,1,9,0.9,32,quota",
        "scratch,,10,,1.5,,,quota",
        "scratch,,20,,2.5,,,quota",
    ]
    assert {(row["variant"], row["game"], row["seed"]) for row in rows} == {("a/b", "miner", "1")}
    assert {row["scale"] for row in rows} == {"32x32 plain"}


def test_continuous_control_has_endings_and_the_mean_action_twice(tmp_path):
    offline = dict(labels=[64, 256], returns_bc=[[1], [2]], policy_r2_bc=[[0], [0.5]])
    offline |= dict(returns_bc_all=[[7.0]], policy_r2_bc_all=[[0.7]], mean_return=3)
    save(tmp_path, "x/decode_dmc.npz", **offline)
    online = dict(env_steps=[10, 20], returns=[1, 2], episodes=[1, 1], mean_return=5)
    save(tmp_path, "x/decode_online_rl.npz", **online)
    rows = [tuple(r[k] for k in ("method", "labels", "mean_return")) for r in summary(tmp_path)]
    assert rows[2:6] == [("bc", "64", "1"), ("bc", "256", "2"), ("bc_all", "", "7")] + [
        ("mean_action", "", "3")
    ]
    (after,) = [r for r in summary(tmp_path) if r["method"] == "rl" and r["kind"] == "quota"]
    assert (after["env_steps"], after["mean_return"], after["episodes"]) == ("20", "5", "32")


def test_training_metrics_are_thinned_and_nan_is_empty(tmp_path):
    lines = [f"{step},{step / 3},nan,0.5" for step in range(0, 1001, 10)]
    text = "\n".join(["grad_step,probe,train_mse,unknown", *lines])
    run = tmp_path / "x/seed_2/maze"
    write_csv(run / "train_latent_dynamics.csv", text)
    recording = dict(frame_size=16, plain=True)
    common.save_checkpoint(
        run / "latent_dynamics.pt", kind="latent_dynamics", game="maze", recording=recording
    )
    rows = summary(tmp_path, "stage_1.csv")
    assert rows[0]["scale"] == "16x16 plain"
    assert len(rows) == summarize.MAX_POINTS
    assert (rows[0]["grad_step"], rows[-1]["grad_step"]) == ("0", "1000")
    assert rows[-1]["probe"] == "333.333" and rows[-1]["train_mse"] == ""
    assert "unknown" not in rows[0] and not (tmp_path / "out/returns.csv").exists()
    save(tmp_path, "x/latents_metrics.npz", "maze", 2, random_probe=[0.25, 0.75], xy=[[1, 2]])
    (row,) = summary(tmp_path, "latents.csv")
    assert row["random_probe"] == "0.5"  # continuous actions: mean over dimensions


def test_a_folder_without_runs_or_with_another_seeds_file_is_refused(tmp_path):
    assert "has no <variant>" in fails(summarize.main, summarize.Args(tmp_path, tmp_path))
    path = save(tmp_path, "x/decode_online_rl.npz", env_steps=[], returns=[], episodes=[])
    path.parent.parent.rename(tmp_path / "x/seed_2")
    message = fails(summarize.main, summarize.Args(tmp_path, tmp_path))
    assert "was made with --game miner --seed 1" in message


def test_scales_are_told_apart():
    scale = dict(frame_size=64, plain=False)
    assert summarize.describe_scale(scale) == "64x64 default"
    assert summarize.describe_scale(scale | dict(one_theme=True)) == "64x64 one theme"
    levels = dict(frame_size=32, plain=True, num_levels=10)
    assert summarize.describe_scale(levels) == "32x32 plain 10 levels"


# --- figures --------------------------------------------------------------------------------------

TWO_GAMES = """
    lapo miner 1 random - - 0 quota
    lapo miner 1 expert - - 10 quota
    lapo maze 1 random - - 4 quota
    lapo maze 1 expert - - 6 quota
    lapo miner 1 decoder 16 1 1 quota
    lapo miner 1 decoder 16 2 3 quota
    lapo miner 2 decoder 16 1 4 quota
    lapo miner 1 decoder 64 1 9 quota
    lapo maze 1 decoder 16 1 5 quota
    lapo maze 2 decoder 16 1 6 quota
    lapo miner 1 bc 16 1 1 quota
    lapo miner 1 rl_sl 100 - 10 ended
    lapo miner 1 rl_sl 100 - 4 quota
    lapo miner 1 rl_sl 200 - 10 ended
"""


def test_means_over_decoders_games_and_seeds_by_hand(tmp_path):
    returns = Returns(returns_table(tmp_path, TWO_GAMES))
    assert returns.curve(OFFLINE["decoder"], "miner") == {1: {16: 2, 64: 9}, 2: {16: 4}}
    # miner 0.2 and 0.4, maze 0.5 and 1; maze has no 64
    means = returns.mean_over_games(OFFLINE["decoder"], ["maze", "miner"])
    assert means == {1: {16: pytest.approx(0.35)}, 2: {16: pytest.approx(0.7)}}
    assert returns.games_with([OFFLINE["decoder"], OFFLINE["bc"]]) == ["miner"]
    x, y = plot_figures.stack({1: {16: 1, 64: 2}, 2: {16: 3}})
    assert x == [16] and y.tolist() == [[1], [3]]


def test_equal_quotas_take_the_place_of_episodes_that_ended(tmp_path):
    returns = Returns(returns_table(tmp_path, TWO_GAMES))
    assert returns.curve(ONLINE["rl_sl"], "miner") == {1: {100: 4}}
    table = TWO_GAMES.replace("    lapo miner 1 rl_sl 100 - 4 quota\n", "")
    returns = Returns(returns_table(tmp_path, table))
    assert returns.curve(ONLINE["rl_sl"], "miner") == {1: {100: 10, 200: 10}}


def test_figure_shows_means_band_and_the_papers_curve_of_the_same_games(tmp_path):
    returns = Returns(returns_table(tmp_path, TWO_GAMES))
    axes = plot_figures.plt.figure().add_subplot()
    plot_figures.draw_curves(axes, returns, [OFFLINE["decoder"]], ["maze", "miner"])
    ours, paper = axes.lines[:2]
    np.testing.assert_allclose(ours.get_xydata(), [[16, 0.525]])
    (band,) = axes.collections
    edge = band.get_paths()[0].vertices[:, 1]
    half = np.std([0.35, 0.7], ddof=1)
    np.testing.assert_allclose([edge.min(), edge.max()], [0.525 - half, 0.525 + half])
    rows = list(csv.DictReader((ROOT / "results/paper/paper_offline.csv").open()))
    values = []
    for game in ("maze", "miner"):
        ends = common.GAMES[game]
        (value,) = [r["return"] for r in rows if r["game"] == game and r["labels"] == "16"]
        part = (float(value) - ends.random_return) / (ends.expert_return - ends.random_return)
        values.append(part)
    np.testing.assert_allclose(paper.get_xydata(), [[16, np.mean(values)]])
    assert axes.get_title() == "maze, miner: 2 seeds"
    plot_figures.plt.close("all")


def test_figures_are_written_only_where_there_are_runs(tmp_path, monkeypatch):
    returns_table(tmp_path, TWO_GAMES)
    text = "variant,game,seed,grad_step,probe,majority\nlapo,miner,1,0,0.1,0.2\n"
    write_csv(tmp_path / "stage_1.csv", text)
    plot_figures.main(plot_figures.Args(tmp_path))
    written = {path.name for path in tmp_path.glob("figures/*")}
    assert written == {"figure_3.png", "figure_3_games.png", "figure_4.png", "probe.png"}

    # as of random play, never decoded
    text = "variant,game,seed,scale,grad_step,probe,majority\n"
    text += "lapo,miner,1,8x8,0,0.1,0.2\nlapo,maze,1,8x8,0,0.9,0.2\n"
    write_csv(tmp_path / "alone/stage_1.csv", text)
    figures = []
    monkeypatch.setattr(plot_figures, "finish", lambda figure, path: figures.append((path, figure)))
    plot_figures.main(plot_figures.Args(tmp_path / "alone"))
    ((path, figure),) = figures
    assert path == tmp_path / "alone/figures/probe.png"
    assert figure.get_suptitle().endswith("8x8 pictures")
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()  # games can be compared
    plot_figures.plt.close("all")
    assert "is missing" in fails(plot_figures.main, plot_figures.Args(tmp_path / "none"))
    table = TWO_GAMES.replace("expert", "blind")
    assert "what the expert" in fails(Returns(returns_table(tmp_path, table)).normalize, 1, "maze")


def test_the_supervised_idm_stands_beside_the_probe_of_its_game(tmp_path, monkeypatch):
    text = "variant,game,seed,scale,grad_step,probe,majority,test_mse,copy_mse\n"
    text += "lapo,maze,1,8x8,5,0.3,0.2,1,4\nlapo,miner,1,8x8,5,0.4,0.2,1,4\n"
    write_csv(tmp_path / "stage_1.csv", text)
    text = "variant,game,seed,grad_step,accuracy\nlapo,miner,1,3,0.5\nlapo,miner,1,4,0.6\n"
    write_csv(tmp_path / "supervised_idm.csv", text)
    header, rows = write_tables.stages(tmp_path, "5")
    assert header[1:4] == ["5", "majority class", "supervised IDM"]
    assert header[-1] == "FDM's mse / copying's"  # there is no stage 2
    assert rows == [
        ["maze, lapo", "0.30", "0.20", "", "0.250"],
        ["miner, lapo", "0.40", "0.20", "0.60", "0.250"],
    ]
    figures = []
    monkeypatch.setattr(plot_figures, "finish", lambda figure, path: figures.append(figure))
    plot_figures.main(plot_figures.Args(tmp_path))
    maze, miner = figures[0].axes
    np.testing.assert_equal([line.get_ydata()[0] for line in maze.lines], [0.3, 0.2, np.nan])
    np.testing.assert_equal([line.get_ydata()[0] for line in miner.lines], [0.4, 0.2, 0.6])
    plot_figures.plt.close("all")


# --- continuous control ---------------------------------------------------------------------------


def test_continuous_control_over_seeds_by_hand(tmp_path):
    table = """
        h/lapo_match cheetah_run 1 decoder 64 1 1 quota
        h/lapo_match cheetah_run 1 decoder 64 2 3 quota
        h/lapo_match cheetah_run 2 decoder 64 1 6 quota
        h/lapo_match cheetah_run 2 decoder 64 2 8 quota
        h/cloning_match cheetah_run 1 bc 64 1 10 quota
        h/cloning_match cheetah_run 1 bc 64 2 30 quota
        h/cloning_all cheetah_run 1 bc_all - 1 500 quota
        h/lapo_match cheetah_run 1 expert - - 700 quota
        h/lapo_match cheetah_run 1 random - - 10 quota
        h/lapo_match cheetah_run 1 mean_action - - 1 quota
        h/lapo_match cheetah_run 2 mean_action - - 5 quota
        other/lapo_match cheetah_run 3 decoder 64 1 99 quota
    """
    returns_table(tmp_path, table)
    _, rows = plot_results.offline_table(tmp_path, "h", "cheetah_run")
    # means of seeds 2 and 7; clones of one seed 10 and 30
    assert rows == [
        ["LAPO (2 x 2)", "4 ± 4"],
        ["cloning the labelled frames alone (1 x 2)", "20 ± 14"],
        ["cloning all true actions (1 x 1)", "500 (all labels)"],
        ["expert", "700"],
        ["random", "10"],
        ["mean action", "1 to 5"],
    ]


def online(seed, returns, after):
    lines = []
    for i, value in enumerate(returns, 1):
        lines.append(f"online/lapo_match cheetah_run {seed} rl_sl {10 * i} - {value} ended")
    lines.append(f"online/lapo_match cheetah_run {seed} rl_sl 80 - {after} quota")
    return lines


def test_quarters_of_an_online_run_are_by_steps_not_by_points(tmp_path):
    ends = ["online/lapo_match cheetah_run 1 expert - - 700 quota"]
    ends += ["online/lapo_match cheetah_run 1 random - - 10 quota"]
    lines = ends + online(1, [1, 3, 5, 7, 9, 11, 13, 15], 20)
    lines += online(2, [3, 5, 7, 9, 11, 13, 15, 17], 24)
    path = returns_table(tmp_path, "\n".join(lines))
    _, (row,) = plot_results.online_table(tmp_path, "cheetah_run")
    # means of quarters 2, 6, 10, 14 and 4, 8, 12, 16
    cells = ["3 ± 1", "7 ± 1", "11 ± 1", "15 ± 1", "22 ± 3"]
    assert row == ["RL and SL (2 seeds)", *cells]
    plot_results.main(plot_results.Args(tmp_path))
    assert [p.name for p in tmp_path.glob("figures/*")] == ["cheetah_run_online.png"]
    # no episode has ended since the seventh point: the quarters before do not shift
    lines = path.read_text().replace("80,,15,4,ended", "80,,,0,ended")
    path.write_text(lines.replace("80,,17,4,ended", "80,,,0,ended"))
    _, (row,) = plot_results.online_table(tmp_path, "cheetah_run")
    assert row[1:5] == ["3 ± 1", "7 ± 1", "11 ± 1", "14 ± 1"]
    path.write_text(lines)
    message = fails(plot_results.online_table, tmp_path, "cheetah_run")
    assert "differ in steps" in message


def test_unknown_variants_are_refused(tmp_path):
    returns_table(tmp_path, "my_variant cheetah_run 1 decoder 64 1 1 quota")
    assert "has no variant of" in fails(plot_results.main, plot_results.Args(tmp_path))
