r"""Baseline: ILPO, imitating latent policies from observation (Edwards et al. 2019; paper, A.5).

There is no IDM. A generator predicts the change o_{t+1} - o_t for each of K discrete latents, and
only the nearest of the K predictions is trained, so that each latent stands for one kind of change.
A latent policy pi(z | o_t) is trained on the same frames, so that the mean of the K predictions
under pi comes near o_{t+1}. Online decoding then starts from that policy, as it does with LAPO's.

Nothing keeps all K latents in use: one that is never the nearest is never trained. Struckmeier and
Kyrki (2023) describe this collapse, so the histogram of nearest latents and the entropy of pi are
logged: a perplexity near 1 means that one latent stands for every change.

Both losses and Adam's settings are those of Edwards et al. The LAPO paper does not report the
number of latents, the networks or the number of updates of its ILPO: here K is 15, the number of
Procgen's actions, and the rest is LAPO's (A.4). Edwards et al. label online transitions with their
nearest latents and learn a map to actions; here PPO alone decodes, from the latent policy's
features (--method rl).

reads   data/<game>/{train,test,random}/frames_NNN.npz (labels, if there, for metrics only)
writes  runs/ilpo/<game>/latent_policy.pt, train_ilpo.csv

Run it as a module, in the folder of the project:
paper scale   python -m baselines.train_ilpo --game bigfish
  then        python decode_online_ppo.py --game bigfish --method rl --runs-dir runs/ilpo
one level (A.5)
              python collect_data.py --game coinrun --num-levels 1 --data-dir data/one_level \
                  --experts-dir experts/one_level
              python -m baselines.train_ilpo --game coinrun --latents 4 --data-dir data/one_level \
                  --runs-dir runs/ilpo_one_level
on a CPU      python -m baselines.train_ilpo --game miner --latents 4 --multiplier 0.5 \
                  --fdm-width 8 --batch-size 32 --lr 1e-3 --grad-steps 1000 --eval-every 250
"""

from dataclasses import dataclass
from pathlib import Path

import common  # before torch
import numpy as np
import torch
import torch.nn.functional as F
from train_latent_bc import LatentPolicy
from train_latent_dynamics import FDM, PROBE_FIT, load_evaluation_windows, perplexity


@dataclass
class Args(common.RunArgs):
    runs_dir: Path = Path("runs/ilpo")
    """Checkpoints, metrics and plots go to <runs-dir>/<game>."""
    resume: bool = False
    """Continue the run that was stopped, or start one if there is none."""
    compile: bool = False
    """Compile the loss with torch.compile."""
    pool_frames: int = 1_000_000
    """Frames in memory (12 KB each at 64x64); if there are more on disk, they are streamed."""
    eval_every: int = 2000
    """Gradient steps between evaluations, checkpoints and saved states."""

    context: int = 1
    """k: frames before o_t that the generator sees (LAPO's, A.4); pi sees o_t alone."""
    latents: int = 15
    """K: discrete latents (not known from the paper; Edwards et al. on CoinRun: 4)."""
    multiplier: float = 4
    """Multiplies IMPALA's channels 16, 32, 32 (A.4)."""
    fdm_width: int = 24
    """Channels of the U-Net's first block (official code: 24, 7.8M parameters)."""
    grad_steps: int = 70_000
    """Updates (not known for ILPO; those of stage 1, A.4)."""
    batch_size: int = 128
    """Windows per update (A.4)."""
    lr: float = 2e-4
    """Learning rate of Adam, constant (Edwards et al.)."""
    adam_beta1: float = 0.5
    """Adam's decay of the mean gradient (Edwards et al.)."""


# --- losses ---------------------------------------------------------------------------------------
# The generator is stage 1's FDM that predicts the change, given a one-hot latent. The policy is
# stage 2's network, its K outputs read as the logits of pi.


def predict_all(generator, past, latents):
    """past uint8 (B, k + 1, S, S, 3) -> o_{t+1} for each latent (B, K, 3, S, S)"""
    z = torch.eye(latents, device=past.device).repeat(len(past), 1)  # (B * K, K)
    past = past.repeat_interleave(latents, 0)  # (B * K, k + 1, S, S, 3)
    return generator(past, z).unflatten(0, (-1, latents))


def mse_of_each(predicted, windows):
    """predicted (B, K, 3, S, S), windows uint8 (B, k + 2, S, S, 3) -> mse of o_{t+1} (B, K)"""
    target = common.to_input(windows[:, -1:])  # (B, 3, S, S)
    return (predicted - target[:, None]).pow(2).mean((2, 3, 4))


def mean_prediction(pi, predicted):
    """pi (B, K), predicted (B, K, 3, S, S) -> the expectation of o_{t+1} under pi (B, 3, S, S)"""
    return (pi[:, :, None, None, None] * predicted).sum(1)


@torch.no_grad()
def nearest_latents(generator, windows, latents, batch_size=64):
    """uint8 (N, k + 2, S, S, 3) -> the latent whose prediction is nearest to o_{t+1}, int64 (N,)"""
    nearest = []
    for part in windows.split(batch_size):
        predicted = predict_all(generator, part[:, :-1], latents)
        nearest.append(mse_of_each(predicted, part).argmin(1))
    return torch.cat(nearest)


def ilpo_loss(policy, generator, windows, latents):
    """windows uint8 (B, k + 2, S, S, 3) -> loss (), mse of the nearest prediction (), mse of the
    mean prediction under pi ().

    The mse of o_{t+1} is that of the change, because the generator adds the change to o_t. All
    latents are tried without gradients, then the nearest one is predicted again with them. So the
    first mse trains only the generator, for the nearest latent; the second only the policy.
    """
    past = windows[:, :-1]
    target = common.to_input(windows[:, -1:])  # (B, 3, S, S)
    generator.eval()  # running statistics: a prediction depends on no other window or latent
    with torch.no_grad():
        predicted = predict_all(generator, past, latents)  # (B, K, 3, S, S)
        nearest = mse_of_each(predicted, windows).argmin(1)  # (B,)
    generator.train()
    nearest_prediction = generator(past, F.one_hot(nearest, latents).float())
    nearest_mse = F.mse_loss(nearest_prediction, target)
    pi = policy(windows[:, -2]).softmax(-1)  # (B, K)
    mean_mse = F.mse_loss(mean_prediction(pi, predicted), target)
    return nearest_mse + mean_mse, nearest_mse, mean_mse


# --- evaluation -----------------------------------------------------------------------------------


def map_accuracy(z, actions, test_z, test_actions, latents):
    """Accuracy of the map from each latent to its most frequent action in z, actions [N]; and of
    their majority class, to which the map also sends latents that never came up.
    """
    counts = np.zeros((latents, common.NUM_ACTIONS))
    np.add.at(counts, (z, actions), 1)
    majority = counts.sum(0).argmax()
    action = np.where(counts.any(1), counts.argmax(1), majority)  # [K]
    accuracy = (action[test_z] == test_actions).mean()
    return float(accuracy), float((test_actions == majority).mean())


@torch.no_grad()
def evaluate(policy, generator, test_windows, probe_windows, probe_actions, latents, batch_size=64):
    """Metrics of held-out windows uint8 (N, k + 2, S, S, 3), as a dict. The map to probe_actions
    [N] (or None) is fitted on the first 3/4 of probe_windows, in the order of the files, and tested
    on the rest.
    """
    generator.eval()
    metrics = dict(test_mse=0.0, test_mean_mse=0.0, copy_mse=0.0)
    nearest = []
    pi = []
    for windows in test_windows.split(batch_size):
        predicted = predict_all(generator, windows[:, :-1], latents)  # (B, K, 3, S, S)
        mse, nearest_latent = mse_of_each(predicted, windows).min(1)
        nearest.append(nearest_latent)
        pi.append(policy(windows[:, -2]).softmax(-1))
        o_t = common.to_input(windows[:, -2:-1])
        target = common.to_input(windows[:, -1:])
        mean_mse = F.mse_loss(mean_prediction(pi[-1], predicted), target)
        weight = len(windows) / len(test_windows)
        metrics["test_mse"] += weight * mse.mean().item()
        metrics["test_mean_mse"] += weight * mean_mse.item()
        metrics["copy_mse"] += weight * F.mse_loss(o_t, target).item()
    nearest = torch.cat(nearest)
    pi = torch.cat(pi)  # (N, K)
    mean_pi = torch.distributions.Categorical(pi.mean(0))
    metrics["perplexity"] = perplexity(nearest)  # of the nearest latents, K at most
    entropy = torch.distributions.Categorical(pi).entropy()  # in nats, log K at most
    metrics["policy_entropy"] = entropy.mean().item()
    metrics["policy_perplexity"] = mean_pi.perplexity().item()
    if probe_actions is not None:
        z = nearest_latents(generator, probe_windows, latents).cpu().numpy()
        split = int(PROBE_FIT * len(z))
        fitted = (z[:split], probe_actions[:split])
        scores = map_accuracy(*fitted, z[split:], probe_actions[split:], latents)
        metrics["map_accuracy"], metrics["majority"] = scores
    frequencies = nearest.bincount(minlength=latents) / len(nearest)
    metrics["histogram"] = " ".join(f"{frequency:.3f}" for frequency in frequencies)
    generator.train()
    return metrics


def main(args):
    device = common.pick_device(args)
    torch.manual_seed(args.seed)
    run = args.runs_dir / args.game
    output = run / "latent_policy.pt"
    state = run / "train_ilpo_state.pt"
    latents = args.latents
    if latents < 2:
        common.fail(f"--latents {latents} leaves no choice of a latent; 2 or more do")
    if (run / "latent_dynamics.pt").exists():
        common.fail(f"{run} has LAPO's latent_policy.pt, which this would replace; see --runs-dir")

    # --- data: as in stage 1, latents are compared with actions on random play, if there is any
    store = common.FrameStore(args, "train", args.context, device, pool_frames=args.pool_frames)
    size = store.frame_size
    frames_id = common.frames_id(common.list_shards(store.folder))
    evaluation_windows = load_evaluation_windows(args, device)
    common.lock(output)

    # --- networks
    config = dict(frame_size=size, multiplier=args.multiplier, z_dim=latents)
    policy = LatentPolicy(**config)
    generator = FDM(size, args.context, latents, args.fdm_width, predict_change=True)
    for module in (policy, generator):
        module.to(device, memory_format=torch.channels_last)
    parameters = [*policy.parameters(), *generator.parameters()]
    optimizer = torch.optim.Adam(parameters, args.lr, betas=(args.adam_beta1, 0.999), fused=True)
    compute_loss = torch.compile(ilpo_loss) if args.compile else ilpo_loss
    print(
        f"ILPO: {args.grad_steps:,} updates of {args.batch_size} windows of {args.game}, {size}x"
        f"{size}; {store.num_frames:,} frames, {len(store.obs):,} in memory; on {device}, "
        f"{sum(p.numel() for p in parameters):,} parameters"
    )

    # --- training
    log = common.MetricsLog(run / "train_ilpo.csv", args.grad_steps, "step")
    resumable = dict(policy=policy, generator=generator, optimizer=optimizer)
    resumable |= dict(sampler=store, log=log)
    start, _ = common.load_state(state, args, resumable, made_from=frames_id)
    for grad_step in range(start + 1, args.grad_steps + 1):
        # a minibatch of windows o_{t-k} .. o_{t+1}
        windows = store.windows_at(store.draw(args.batch_size))
        # the generator predicts o_{t+1} for the nearest latent, the policy weighs all of them
        loss, nearest_mse, mean_mse = compute_loss(policy, generator, windows, latents)
        # one step of Adam for both networks
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log.bar.update()
        if grad_step % args.eval_every == 0 or grad_step == args.grad_steps:
            common.check_finite(grad_step, output, policy, generator)
            metrics = dict(train_mse=nearest_mse, train_mean_mse=mean_mse)
            metrics |= evaluate(policy, generator, *evaluation_windows, latents)
            log.write(grad_step=grad_step, **metrics)
            if metrics["perplexity"] < 1.5:
                log.bar.write("warning: one latent stands for nearly every change (collapse)")
            common.save_checkpoint(
                output,
                kind="latent_policy",
                game=args.game,
                grad_step=grad_step,
                recording=store.recording,
                context=args.context,
                config=config,
                dynamics_id=common.fingerprint(generator),
                policy=policy.state_dict(),
            )
            common.save_state(state, args, grad_step, resumable, made_from=frames_id)
    log.bar.close()
    print(f"latent policy: {output}")
    common.print_next("decode_online_ppo.py", args, "--method", "rl")


if __name__ == "__main__":
    common.run(main, Args)
