"""The table with which `make demo` ends: LAPO beside its controls.

reads   demo/runs/<game>/*.npz, demo/untrained/<game>/*.npz

python -m extras.demo_table --game miner --data-dir demo/data --runs-dir demo/runs
"""

from dataclasses import dataclass
from pathlib import Path

import common


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
    print(f"""
{args.game}, laptop scale (plain pictures at 32x32, recordings of a solver)  LAPO  controls
linear probe of z on random play         {latents["random_probe"]:9.2f}  \
untrained IDM {latents["random_probe_untrained"]:.2f}, majority class {latents["random_majority"]:.2f}
FDM's mse, as a fraction of copying o_t  {latents["fdm_mse_true"] / latents["fdm_mse_copy"]:9.2f}  \
with shuffled latents {latents["fdm_mse_shuffled"] / latents["fdm_mse_copy"]:.2f}
return with 16 labelled frames           {mean_return(run / "decode_offline.npz", 16):>9}  \
blind policy {offline["blind_return"]:.1f}, random policy {offline["random_return"]:.1f}
return with 256 labelled frames          {mean_return(run / "decode_offline.npz", 256):>9}  \
cloning them {mean_return(run / "label_efficiency_bc.npz", 256)}, \
untrained IDM {mean_return(untrained, 256)}
return online, after {online["env_steps"][-1]:,} steps      {online["eval_returns"][-1].mean():9.1f}  \
expert {offline["expert_return"]:.1f}

Look at the probe first: a linear map of z predicts the true action far more often than one of an
untrained IDM's z does, though stage 1 never saw an action. Then at 256 labels, beside cloning them.
{run / "decode_offline.gif"} shows the agent, {run / "latents.png"} its latent actions.""")


if __name__ == "__main__":
    common.run(main, Args)
