"""The table with which `make demo` ends: LAPO beside its controls.

reads   demo/runs/<game>/*.npz and train_latent_dynamics.csv, demo/untrained/<game>/*.npz

python -m extras.demo_table --game miner --data-dir demo/data --runs-dir demo/runs
"""

from dataclasses import dataclass
from pathlib import Path

import common

from extras.summarize import read_csv


@dataclass
class Args(common.RunArgs):
    untrained_dir: Path = Path("demo/untrained")
    """The same chain on an untrained IDM is in <untrained-dir>/<game>."""


def mean_return(path, labels):
    """Mean return over decoders with this number of labels, as text."""
    arrays = common.load_npz(path)
    row = arrays["labels"].tolist().index(labels)
    return f"{arrays['returns'][row].mean():.1f}"


def main(args):
    run = args.runs_dir / args.game
    latents = common.load_npz(run / "latents_metrics.npz")
    offline = common.load_npz(run / "decode_offline.npz")
    online = common.load_npz(run / "decode_online_rl_sl.npz")
    untrained = args.untrained_dir / args.game / "decode_offline.npz"
    stage_1 = read_csv(run / "train_latent_dynamics.csv")
    probe = float(stage_1[-1]["probe"])
    untrained_probe = float(stage_1[0]["probe"])
    majority = float(stage_1[-1]["majority"])
    mse = latents["fdm_mse_true"] / latents["fdm_mse_copy"]
    shuffled = latents["fdm_mse_shuffled"] / latents["fdm_mse_copy"]
    few = mean_return(run / "decode_offline.npz", 16)
    more = mean_return(run / "decode_offline.npz", 256)
    clone = mean_return(run / "label_efficiency_bc.npz", 256)
    control = mean_return(untrained, 256)
    steps = f"{online['env_steps'][-1]:,} steps"
    played = online["eval_returns"][-1].mean()
    print(f"""
{args.game}, laptop scale (plain pictures at 32x32, recordings of a solver)
                                           LAPO  controls
linear probe of z on random play         {probe:6.2f}  untrained IDM {untrained_probe:.2f}, \
majority class {majority:.2f}
FDM's mse, as a fraction of copying o_t  {mse:6.2f}  with shuffled latents {shuffled:.2f}
return with 16 labelled frames           {few:>6}  blind policy {offline["blind_return"]:.1f}, \
random policy {offline["random_return"]:.1f}
return with 256 labelled frames          {more:>6}  cloning them {clone}, untrained IDM {control}
return online, after {steps:20}{played:6.1f}  expert {offline["expert_return"]:.1f}

Look at the probe first: stage 1 never saw an action; does a linear map of its z predict the true
one more often than that of an untrained IDM's z? Then at 256 labels, beside cloning them alone.
{run / "decode_offline.gif"} shows the agent, {run / "latents.png"} its latent actions,
{run / "film.gif"} what the FDM predicts from each.""")


if __name__ == "__main__":
    common.run(main, Args)
