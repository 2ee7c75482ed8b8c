"""A reference for the probe of stage 1: an IDM that learns the true actions (not in the paper).

Where this fails as well, three frames hardly show the action, and stage 1 will hardly find it.
Where this succeeds and the probe fails, the latents of stage 1 hold other things. The network is
stage 1's IDM with 15 outputs; it is tested on the very windows on which stage 1 tests its probe.
It is no upper bound while its accuracy still rises.

reads   data/<game>/{train,test,random}/frames_NNN.npz, labels_NNN.npz
writes  runs/<game>/supervised_idm.csv: accuracy, actions of equal effect merged

Run it as a module, in the folder of the project:
paper scale   python -m baselines.supervised_idm --game bigfish
on a CPU      python -m baselines.supervised_idm --game bigfish --multiplier 1 --grad-steps 4000 \
                  --batch-size 64 --lr 1e-3 --eval-every 500
"""

from dataclasses import dataclass

import common  # before torch
import torch
import torch.nn.functional as F
from train_latent_dynamics import IDM, PROBE_FIT, in_batches, load_evaluation_windows
from train_latent_dynamics import make_optimizer


@dataclass
class Args(common.RunArgs):
    pool_frames: int = 1_000_000
    """Frames in memory (12 KB each at 64x64), and the IDM learns from these only."""
    eval_every: int = 2000
    """Gradient steps between evaluations."""

    context: int = 1
    """k: frames before o_t that the IDM sees (A.4)."""
    multiplier: float = 4
    """Multiplies IMPALA's channels 16, 32, 32 (A.4)."""
    grad_steps: int = 20_000
    """Updates."""
    batch_size: int = 128
    """Windows per update (A.4)."""
    lr: float = 2e-4
    """Peak learning rate of AdamW (A.4)."""
    weight_decay: float = 0.01
    """Of AdamW (official code)."""
    warmup_steps: int = 50
    """Updates from 10% of the learning rate to its peak; then linear to 1% (official code)."""


@torch.no_grad()
def accuracy(idm, windows, actions):
    """Fraction of the windows uint8 (N, k + 2, S, S, 3) whose actions [N] the IDM predicts."""
    idm.eval()
    predicted = in_batches(idm, windows).argmax(1).cpu().numpy()
    idm.train()
    return float((predicted == actions).mean())


def main(args):
    device = common.pick_device(args)
    torch.manual_seed(args.seed)
    output = args.runs_dir / args.game / "supervised_idm.csv"
    common.lock(output)

    # --- data: the test windows are those of stage 1's probe
    store = common.FrameStore(args, "train", args.context, device, pool_frames=args.pool_frames)
    actions = common.true_actions_to_report_on(store, store.rows)
    _, test_windows, test_actions = load_evaluation_windows(args, device)
    if actions is None or test_actions is None:
        common.fail(f"{store.folder.parent} lacks labels; collect_data.py writes them")
    actions = torch.from_numpy(actions)
    split = int(PROBE_FIT * len(test_actions))
    test_windows = test_windows[split:]
    test_actions = test_actions[split:]

    # --- the IDM, with an output for each action
    idm = IDM(store.frame_size, args.context, args.multiplier, z_dim=common.NUM_ACTIONS)
    idm.to(device, memory_format=torch.channels_last)
    optimizer, schedule = make_optimizer(args, idm.parameters())

    # --- training
    log = common.MetricsLog(output, args.grad_steps, "step")
    for grad_step in range(1, args.grad_steps + 1):
        # a minibatch of windows and the actions taken at their o_t
        batch = torch.randint(len(actions), (args.batch_size,))
        logits = idm(store.windows_at(store.rows[batch]))
        loss = F.cross_entropy(logits, actions[batch].to(device))
        # one step of AdamW
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        log.bar.update()
        if grad_step % args.eval_every == 0 or grad_step == args.grad_steps:
            test_accuracy = accuracy(idm, test_windows, test_actions)
            log.write(grad_step=grad_step, train_loss=loss, accuracy=test_accuracy)
    log.bar.close()
    print(f"supervised IDM of {args.game}: accuracy {test_accuracy:.3f}; {output}")


if __name__ == "__main__":
    common.run(main, Args)
