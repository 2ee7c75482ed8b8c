r"""Stage 2: clone a policy over latent actions from the same video (paper, section 4.2).

Behavior cloning, with latent actions in place of true ones: the latent policy sees o_t alone and
predicts the latent action z_t that stage 1's IDM assigned to this frame. The target is z_t before
quantization (official code).

reads   data/<game>/{train,test}/frames_NNN.npz, runs/<game>/{train,test}/latents_NNN.npz
writes  runs/<game>/latent_policy.pt, train_latent_bc.csv

paper scale   python train_latent_bc.py --game bigfish
on a CPU      python train_latent_bc.py --game miner --multiplier 1 --lr 1e-3 --grad-steps 2500 \
                  --warmup-steps 100 --standardize --eval-every 500
"""

from dataclasses import dataclass

import common  # before torch
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

TEST_FRAMES = 4096  # held-out frames in an evaluation


@dataclass
class Args(common.RunArgs):
    resume: bool = False
    """Continue the run that was stopped, or start one if there is none."""
    compile: bool = False
    """Compile the loss with torch.compile."""
    pool_frames: int = 1_000_000
    """Frames in memory (12 KB each at 64x64); if there are more on disk, they are streamed."""
    eval_every: int = 2000
    """Gradient steps between evaluations, checkpoints and saved states."""

    standardize: bool = False
    """Regress latents of mean 0, std 1 (not in the paper); needed where z's std is far below 1."""
    multiplier: float = 4
    """Multiplies IMPALA's channels 16, 32, 32 (A.4)."""
    grad_steps: int = 60_000
    """Updates (A.4)."""
    batch_size: int = 128
    """Frames per update (A.4)."""
    lr: float = 2e-4
    """Peak learning rate of AdamW (A.4)."""
    weight_decay: float = 0.01
    """Of AdamW (official code)."""
    warmup_steps: int = 1000
    """Updates from 1% of the learning rate to its peak; then linear to 0 (official code)."""


# --- networks -------------------------------------------------------------------------------------
# Copies of train_latent_dynamics.py; tests/test_copies.py keeps them equal.


class ResidualBlock(nn.Module):
    def __init__(self, channels, hidden):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden, channels, 3, padding=1)

    def forward(self, x):
        h = self.conv1(F.relu(x))  # (B, hidden, S, S)
        return x + self.conv2(F.relu(h))  # (B, C, S, S)


class ImpalaCNN(nn.Sequential):
    """IMPALA's CNN (Espeholt et al. 2018): (B, C, S, S) -> (B, 32 * multiplier * (S / 8)^2)"""

    def __init__(self, in_channels, frame_size, multiplier):
        layers = []
        for base_channels in (16, 32, 32):
            channels = int(base_channels * multiplier)
            layers += [
                nn.Conv2d(in_channels, channels, 3, padding=1),
                nn.MaxPool2d(3, 2, 1),
                ResidualBlock(channels, channels),
                ResidualBlock(channels, channels),
            ]
            in_channels = channels
        super().__init__(*layers, nn.ReLU(), nn.Flatten())
        self.num_features = channels * (frame_size // 8) ** 2


class LatentPolicy(nn.Module):
    """pi(o_t) -> z_t (3,681,920 parameters at the paper's sizes)."""

    def __init__(self, frame_size, multiplier, z_dim):
        super().__init__()
        self.cnn = ImpalaCNN(3, frame_size, multiplier)
        self.hidden = nn.Linear(self.cnn.num_features, 256)
        self.head = nn.Linear(256, z_dim)
        self.register_buffer("mean", torch.zeros(z_dim))  # of z, for --standardize
        self.register_buffer("std", torch.ones(z_dim))

    def features(self, obs):
        """uint8 (B, S, S, 3) -> the convolutions' output (B, F), which stage 3 keeps frozen"""
        return self.cnn(common.to_input(obs[:, None]))

    def latent(self, features):
        """(B, F) -> z (B, Z)"""
        h = F.relu(self.hidden(features))  # (B, 256)
        return self.mean + self.std * self.head(h)

    def forward(self, obs):
        """uint8 (B, S, S, 3) -> z (B, Z)"""
        return self.latent(self.features(obs))


# --- training -------------------------------------------------------------------------------------


def imitation_loss(policy, obs, z):
    """obs uint8 (B, S, S, 3), z (B, Z) before quantization -> mean squared error (), in units of
    policy.std, which is 1 without --standardize.
    """
    return F.mse_loss(policy(obs) / policy.std, z / policy.std)


@torch.no_grad()
def evaluate(policy, obs, z, batch_size=512):
    """Metrics of held-out frames, as a dict: obs uint8 (N, S, S, 3), z (N, Z). test_mse is in units
    of z. variance_explained: 0 for the mean latent, 1 for the IDM's own; a policy stays below 1, as
    o_t does not determine what a stochastic expert does next.
    """
    predicted = torch.cat([policy(part) for part in obs.split(batch_size)])  # (N, Z)
    mse = F.mse_loss(predicted, z)
    return dict(test_mse=mse, variance_explained=1 - mse / z.var(0, correction=0).mean())


def main(args):
    device = common.pick_device(args)
    torch.manual_seed(args.seed)
    run = args.runs_dir / args.game
    output, state = run / "latent_policy.pt", run / "train_latent_bc_state.pt"
    common.lock(output)
    if args.grad_steps < 1:
        common.fail("--grad-steps 0 trains no policy")

    # --- data: frames and the latents that stage 1 wrote for them
    dynamics = common.load_checkpoint(run / "latent_dynamics.pt", "latent_dynamics", args.game)
    dynamics_id = dynamics["dynamics_id"]
    idm_config = dynamics["config"]["idm"]
    context = idm_config["context"]
    store = common.FrameStore(args, "train", context, device, dynamics_id, args.pool_frames)
    test = common.FrameStore(args, "test", context, device, dynamics_id)
    test_rows = test.draw(TEST_FRAMES)
    test_obs = test.frames_at(test_rows)
    test_z = test.z_at(test_rows)

    # --- network
    z_dim = idm_config["z_dim"]
    config = dict(frame_size=store.frame_size, multiplier=args.multiplier, z_dim=z_dim)
    policy = LatentPolicy(**config)
    if args.standardize:
        z = store.z_at(store.rows)  # of the frames in memory
        policy.mean.copy_(z.mean(0))
        policy.std.copy_(z.std(0) + 1e-6)
    policy.to(device, memory_format=torch.channels_last)
    parameters = list(policy.parameters())
    optimizer = torch.optim.AdamW(parameters, args.lr, weight_decay=args.weight_decay, fused=True)
    # the learning rate rises from 1% to its peak, then falls to 0, linearly (official code)
    end = max(args.grad_steps, args.warmup_steps + 1)
    steps = [0, args.warmup_steps, end]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: float(np.interp(step, steps, [0.01, 1.0, 0.0]))
    )
    compute_loss = torch.compile(imitation_loss) if args.compile else imitation_loss
    print(
        f"stage 2: {args.grad_steps:,} updates of {args.batch_size} frames of {args.game}; "
        f"{store.num_frames:,} frames, {len(store.obs):,} in memory; on {device}, "
        f"{sum(p.numel() for p in parameters):,} parameters"
    )

    # --- training
    log = common.MetricsLog(run / "train_latent_bc.csv", args.grad_steps, "step")
    resumable = dict(policy=policy, optimizer=optimizer, schedule=schedule, sampler=store, log=log)
    start, _ = common.load_state(state, args, resumable, made_from=dynamics_id)
    for grad_step in range(start + 1, args.grad_steps + 1):
        # a minibatch of frames o_t and the latents z_t that the IDM gave them
        rows = store.draw(args.batch_size)
        obs = store.frames_at(rows)
        z = store.z_at(rows)
        loss = compute_loss(policy, obs, z)
        # one step of AdamW
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        log.bar.update()
        if grad_step % args.eval_every == 0 or grad_step == args.grad_steps:
            common.check_finite(grad_step, output, policy)
            # train_loss is in units of policy.std, test_mse in units of z
            log.write(grad_step=grad_step, train_loss=loss, **evaluate(policy, test_obs, test_z))
            common.save_checkpoint(
                output,
                kind="latent_policy",
                game=args.game,
                grad_step=grad_step,
                recording=store.recording,
                context=context,
                config=config,
                dynamics_id=dynamics_id,
                policy=policy.state_dict(),
            )
            common.save_state(state, args, grad_step, resumable, made_from=dynamics_id)
    log.bar.close()
    print(f"latent policy: {output}")
    if args.game in common.GAMES:
        common.print_next("decode_offline.py", args)
    else:
        common.print_next("visualize_latents.py", args)


if __name__ == "__main__":
    common.run(main, Args)
