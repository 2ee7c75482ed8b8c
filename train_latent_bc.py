"""Stage 2: clone a policy over latent actions from the same video (paper, section 4.2).

The latent policy sees o_t alone and predicts the latent action z_t that the IDM of stage 1 gave this frame: behaviour
cloning, with latent actions in place of true ones. The target is z_t before quantisation (official code).

reads   data/<game>/{train,test}/frames_NNN.npz, runs/<game>/{train,test}/latents_NNN.npz
writes  runs/<game>/latent_policy.pt, runs/<game>/train_latent_bc.csv

paper scale   python train_latent_bc.py --game bigfish
CPU sized     python train_latent_bc.py --game coinrun --multiplier 0.5 --batch-size 128 --lr 1e-3 --grad-steps 2000
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro

import common


@dataclass
class Args:
    game: str = "bigfish"
    """One of Procgen's 16 games."""
    seed: int = 1
    """Seeds networks, action sampling and the games themselves."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    data_dir: Path = Path("data")
    """Frames and labels lie in <data-dir>/<game>."""
    runs_dir: Path = Path("runs")
    """Checkpoints, metrics and plots go to <runs-dir>/<game>."""
    checkpoint_minutes: float = 5
    """Minutes between two writes of the whole state, from which --resume goes on."""
    resume: bool = False
    """Go on with the run that was stopped or killed, or start where none was; one that is finished stays as it is."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the networks: fp32, or bf16 by autocast with fp32 weights; auto takes bf16 on a GPU."""
    compile: bool = True
    """On a GPU, compile the networks (torch.compile with CUDA graphs); left aside on a CPU, where it takes minutes, and under torchrun."""
    vq: bool = True
    """Quantise the latent actions; --no-vq is the paper's ablation (A.2), whose runs go to <runs-dir>/<game>_no_vq."""
    pool_frames: int = 1_000_000
    """Frames held in memory at once (12 KB each at 64x64); more on disk than that are streamed."""
    eval_every: int = 2000
    """Gradient steps between reports on held-out episodes."""
    eval_windows: int = 4096
    """Held-out windows to report on, and as many training windows to fit the probe."""

    multiplier: float = 4
    """Multiplies IMPALA's channels 16, 32, 32 (A.4: 4)."""
    grad_steps: int = 60_000
    """Updates (A.4)."""
    batch_size: int = 128
    """Windows (stage 2: frames) an update (A.4); under torchrun, of each process."""
    lr: float = 2e-4
    """Adam's peak learning rate (A.4)."""
    warmup_steps: int = 1000
    """Updates over which the learning rate rises from 1% to its peak; then it falls linearly to 0 (official code)."""


# --- networks --------------------------------------------------------------------------------------------------------


def to_input(frames):
    """uint8 (B, T, S, S, 3) -> float (B, 3T, S, S) in [-0.5, 0.5], stacked on channels, laid out channels last."""
    b, t, s, _, c = frames.shape
    return frames.permute(0, 2, 3, 1, 4).reshape(b, s, s, t * c).permute(0, 3, 1, 2).float() / 255 - 0.5


class ResidualBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class ImpalaCNN(nn.Module):
    """The convolutions of IMPALA (Espeholt et al. 2018): three times conv, max pool, two residual blocks."""

    def __init__(self, in_channels, frame_size, multiplier):
        super().__init__()
        layers = []
        for channels in (int(16 * multiplier), int(32 * multiplier), int(32 * multiplier)):
            layers += [nn.Conv2d(in_channels, channels, 3, padding=1), nn.MaxPool2d(3, stride=2, padding=1)]
            layers += [ResidualBlock(channels), ResidualBlock(channels)]
            in_channels = channels
        self.layers = nn.Sequential(*layers, nn.ReLU(), nn.Flatten())
        self.num_features = channels * (frame_size // 8) ** 2

    def forward(self, x):
        return self.layers(x)  # (B, C, S, S) -> (B, 32 * multiplier * (S / 8)^2)


class LatentPolicy(nn.Module):
    """pi(o_t) -> z_t: an IMPALA-CNN that imitates the latent actions (3,681,920 parameters at paper settings)."""

    def __init__(self, frame_size, multiplier, z_dim):
        super().__init__()
        self.cnn = ImpalaCNN(3, frame_size, multiplier)
        self.hidden = nn.Linear(self.cnn.num_features, 256)
        self.head = nn.Linear(256, z_dim)

    def forward(self, obs):
        """uint8 (B, S, S, 3) -> z (B, Z)"""
        return self.head(F.relu(self.hidden(self.cnn(to_input(obs[:, None])))))


# --- training --------------------------------------------------------------------------------------------------------


def imitation_loss(policy, obs, z):
    """obs uint8 (B, S, S, 3), z (B, Z) before quantisation -> mean squared error ()"""
    return F.mse_loss(policy(obs), z)


@torch.no_grad()
def report(policy, obs, z, batch_size=512):
    """Figures on held-out episodes: obs uint8 (N, S, S, 3), z (N, Z)."""
    policy.eval()
    error = (torch.cat([policy(part) for part in obs.split(batch_size)]) - z).pow(2).mean()
    policy.train()
    # the mean action would explain nothing, the IDM's own z everything; what a policy can explain lies between, because
    # o_t alone does not tell what a sampling expert will do next
    return dict(test_error=error, variance_explained=1 - error / z.var(0, correction=0).mean())


def main(args):
    common.check_flags(args, zero=("warmup_steps",))
    device = common.pick_device(args.device)
    common.seed_everything(args.seed)
    data, run = args.data_dir / args.game, common.run_folder(args.runs_dir, args.game, args.vq)
    run_state = common.RunState(run, "train_latent_bc", args)
    if run_state.finished(run / "latent_policy.pt"):
        return
    dynamics = common.load_checkpoint(
        run / "latent_dynamics.pt", "latent_dynamics", args.game, f"python train_latent_dynamics.py --game {args.game}"
    )
    context = dynamics["context"]
    z_dim = dynamics["codebooks"] * dynamics["latents_per_codebook"] * dynamics["embedding_dim"]

    store = common.FrameStore(data / "train", args.game, context, args.pool_frames, args.seed, device, run / "train", dynamics["fingerprint"])
    windows, where = common.fixed_windows(data / "test", args.game, context, args.eval_windows, args.seed)
    test_obs = torch.from_numpy(windows[:, context]).to(device)
    latents = {path: common.read_latents(path, run / "test", args.game, dynamics["fingerprint"])[0] for path in where}
    test_z = torch.from_numpy(np.concatenate([latents[path][rows] for path, rows in where.items()])).to(device).float()

    policy = LatentPolicy(store.frame_size, args.multiplier, z_dim).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.lr, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: float(np.interp(step, [0, args.warmup_steps, args.grad_steps], [0.01, 1.0, 0.0]))
    )
    print(
        f"stage 2: {args.grad_steps:,} updates of {args.batch_size} frames from {store.num_frames:,} frames of {args.game} at "
        f"{store.frame_size}x{store.frame_size} ({store.num_slots * store.slot_rows:,} of them in memory) on {device}; "
        f"policy {sum(p.numel() for p in policy.parameters()):,} parameters"
    )

    log = common.MetricsLog(run / "train_latent_bc.csv", args.grad_steps, "step")
    parts = dict(policy=policy, optimizer=optimizer, schedule=schedule, store=store, log=log)
    run_state.load(parts)
    network = common.parallel(policy)
    loss_of = common.compiled(imitation_loss, common.compiles(args, device))
    for grad_step in range(run_state.step + 1, args.grad_steps + 1):
        obs, z = store.sample_latents(args.batch_size)
        optimizer.zero_grad()  # before a compiled forward pass, which takes the memory of the last gradients
        with common.autocast(args.precision, device):
            loss = loss_of(network, obs, z)
        loss.backward()
        optimizer.step()
        schedule.step()
        log.bar.update()
        if common.leads() and (grad_step % args.eval_every == 0 or grad_step == args.grad_steps):
            common.check_finite(grad_step, run / "latent_policy.pt", policy)
            log.write(grad_step=grad_step, train_error=loss.detach(), **report(policy, test_obs, test_z))
            common.save_checkpoint(
                run / "latent_policy.pt", kind="latent_policy", game=args.game, grad_step=grad_step, frame_size=store.frame_size,
                start_level=store.settings["start_level"], num_levels=store.settings["num_levels"], context=context,
                multiplier=args.multiplier, z_dim=z_dim, dynamics=dynamics["fingerprint"], model=policy.state_dict(),
            )  # fmt: skip
        if run_state.due():
            run_state.save(grad_step, parts)
    log.bar.close()
    run_state.finish()
    print(f"latent policy: {run / 'latent_policy.pt'}\nnext: python decode_offline.py --game {args.game}, or decode_online_ppo.py")


if __name__ == "__main__":
    with common.process_group():
        main(tyro.cli(Args))
