"""Several processes on the CPU: the same update as one process with all their windows, each shard in one process, files from one.

Most tests fork their processes from a server that has imported the scripts and give them the environment that torchrun would;
the last ones start torchrun itself.
"""

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch._dynamo  # noqa: F401 (which the first optimizer of every process would import)
import torch.distributed as dist

import common
import train_ilpo as ilpo
import train_latent_bc as stage2
import train_latent_dynamics as stage1
from test_common import write_frames
from test_train_latent_dynamics import write_split

ROOT = Path(__file__).resolve().parents[1]
FORK = multiprocessing.get_context("forkserver")
SMALL = dict(game="maze", device="cpu", eval_every=2, eval_windows=64, multiplier=0.25, grad_steps=6, batch_size=8)
STAGE1 = dict(SMALL, embeddings=8, embedding_dim=3, fdm_width=4)
ILPO = dict(SMALL, latents=4, fdm_width=4)


def in_group(function, arguments, rank, size, port, out):
    """What a forked process does: joins the group as under torchrun, and saves what the function gives."""
    with open(out / f"log_{rank}", "w") as log:
        os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )  # fmt: skip
    with common.process_group():
        torch.save(function(*arguments), out / f"result_{rank}")


def on_ranks(function, *arguments, out, size=2):
    """Runs function(*arguments) in `size` processes; returns their exit codes, results and logs, None where there is no result."""
    out.mkdir(exist_ok=True)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))  # torchrun's part
    processes = [FORK.Process(target=in_group, args=(function, arguments, rank, size, store.port, out)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    results = [out / f"result_{rank}" for rank in range(size)]
    results = [torch.load(path, weights_only=True) if path.exists() else None for path in results]
    return [process.exitcode for process in processes], results, [(out / f"log_{rank}").read_text() for rank in range(size)]


def results_of(function, *arguments, out):
    codes, results, logs = on_ranks(function, *arguments, out=out)
    assert codes == [0, 0], "\n".join(logs)
    return results


@pytest.fixture(scope="module", autouse=True)
def server():
    """The scripts, imported once for all processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        FORK.set_forkserver_preload(["test_distributed"])
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for split, seed in (("train", 0), ("test", 1)):
        write_split(root / "data/maze" / split, seed)
    return root / "data"


# --- the update ------------------------------------------------------------------------------------------------------


def updates(loss_of, networks, batches, max_grad_norm):
    """A step of gradient descent for each batch; what came of it. Each process takes its share of each batch.

    Plain descent in small steps: Adam divides by gradients near 0, and large steps turn over a ReLU, by errors of rounding alone.
    """
    rank, size = common.process()
    parameters = [weight for network in networks for weight in network.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    parallels = [common.parallel(network) if list(network.parameters()) else network for network in networks]
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = loss_of(*parallels, batch.chunk(size)[rank])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        optimizer.step()
        losses.append(loss.detach())
    state = {f"{i}.{name}": tensor for i, network in enumerate(networks) for name, tensor in network.state_dict().items()}
    gradients = {f"gradient {i}": weight.grad for i, weight in enumerate(parameters)}
    return dict(loss=torch.stack(losses), state=state, gradients=gradients)


def windows(frames, count=16):
    """Three batches; those of the second half are darker, so that the batch norms of the processes would differ."""
    batches = torch.randint(256, (3, count, frames, 16, 16, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    batches[:, count // 2 :] //= 3
    return batches


def update_stage_1(batches):
    torch.manual_seed(0)
    idm, fdm = stage1.IDM(16, 1, 0.25, 24), stage1.FDM(16, 1, 24, 4, predict_change=False)
    quantizer = stage1.EMAVectorQuantizer(2, 4, 8, 3, 0.9)
    quantizer.count.fill_(100), quantizer.total.copy_(100 * quantizer.embedding)  # no code is dead: those restart at random
    stage1.share_batch_norms(fdm)
    return updates(lambda *all: stage1.dynamics_loss(*all, 0.05)[0], (idm, quantizer, fdm), batches, 0.05)


def update_stage_2(batches):
    torch.manual_seed(0)
    target = torch.randn(3, 6)
    return updates(
        lambda policy, windows: stage2.imitation_loss(policy, windows[:, 0], windows[:, 0].float().mean((1, 2)) @ target),
        [stage2.LatentPolicy(16, 0.25, 6)], batches, 0.5,
    )  # fmt: skip


def update_ilpo(batches):
    torch.manual_seed(0)
    policy, generator = ilpo.DiscreteLatentPolicy(16, 0.25, 3), ilpo.FDM(16, 1, 3, 4, predict_change=True)
    torch.nn.init.normal_(generator.last[-1].weight)  # fresh, it predicts no change for any latent
    ilpo.share_batch_norms(generator)
    return updates(lambda *all: ilpo.ilpo_loss(*all, 3)[0], (policy, generator), batches, 0.5)


def assert_same_update(one, other):
    for part in ("state", "gradients"):
        assert one[part].keys() == other[part].keys()
        for name, tensor in one[part].items():
            torch.testing.assert_close(tensor, other[part][name], rtol=1e-3, atol=2e-6, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("function", [update_stage_1, update_stage_2, update_ilpo])
def test_two_processes_make_the_update_of_one_with_both_their_batches(function, tmp_path):
    batches = windows(3)
    both = results_of(function, batches, out=tmp_path)
    alone = function(batches)
    torch.testing.assert_close((both[0]["loss"] + both[1]["loss"]) / 2, alone["loss"], rtol=1e-4, atol=1e-6)
    assert (both[0]["loss"] - both[1]["loss"]).abs().min() > 1e-4  # they did see different windows
    for result in both:
        assert_same_update(result, alone)
    assert all(torch.equal(tensor, both[1]["state"][name]) for name, tensor in both[0]["state"].items())
    with pytest.raises(AssertionError):  # the comparison sees what one of the two batches alone would do
        assert_same_update(function(batches[:, :8]), alone)


def test_a_shared_batch_norm_equals_that_of_one_process_far_from_zero(tmp_path):
    """Where the mean is a thousand times the deviation, E[x^2] - E[x]^2 would be noise; the running mean is nearly there."""
    x = 1000 + torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    norm, parts = torch.nn.BatchNorm2d(3), results_of(normalize, x, out=tmp_path)
    norm.running_mean.fill_(999.0)
    torch.testing.assert_close(torch.cat([part["out"] for part in parts]), norm(x), rtol=1e-3, atol=1e-3)
    for name, buffer in norm.named_buffers():
        torch.testing.assert_close(parts[0][name], buffer, rtol=1e-4, atol=1e-4)


def normalize(x):
    norm = stage1.SharedBatchNorm2d(3)
    norm.running_mean.fill_(999.0)
    return dict(out=norm(x.chunk(2)[common.process()[0]]).detach(), **dict(norm.named_buffers()))


def update_quantizer(steps):
    """Updates by pieces that drift away from the codes, from random numbers of each process's own."""
    torch.manual_seed(0)
    quantizer, revived = stage1.EMAVectorQuantizer(2, 4, 16, 3, 0.5), 0
    torch.manual_seed(1 + common.process()[0])
    for step in range(steps):
        quantizer(torch.randn(8, 24) + step)
        revived += int((quantizer.count == 2 * 8 * 4 / 16).sum())  # restarted as if with the fair share of both processes' pieces
    return dict(revived=revived, **quantizer.state_dict())


def test_codebooks_stay_the_same_to_the_bit_when_codes_die(tmp_path):
    one, other = results_of(update_quantizer, 10, out=tmp_path)
    assert one["revived"] > 10
    assert all(torch.equal(one[name], other[name]) for name in ("embedding", "count", "total"))
    assert one["embedding"].isfinite().all()


# --- the data --------------------------------------------------------------------------------------------------------


def shards_drawn(folder, pool_frames):
    """The shards of the windows that a process draws; write_frames() puts their number into the first pixel."""
    store = common.FrameStore(folder, "maze", 1, pool_frames, 1, torch.device("cpu"))
    drawn = torch.cat([store.sample_windows(16) for _ in range(60)])
    return dict(shards=drawn[:, 1, 0, 0, 0].unique(), first=drawn[:16, 1, 0, 0, 1])


@pytest.mark.parametrize("pool_frames", [1000, 40])
def test_each_shard_is_drawn_from_by_one_process(tmp_path, pool_frames):
    for shard in range(5):
        write_frames(tmp_path / "frames", name=f"frames_{shard:03d}.npz", shard=shard)
    one, other = results_of(shards_drawn, tmp_path / "frames", pool_frames, out=tmp_path)
    assert one["shards"].tolist() == [0, 2, 4] and other["shards"].tolist() == [1, 3]
    assert not torch.equal(one["first"], other["first"])  # each draws by random numbers of its own


def test_too_few_shards_are_told_once_in_one_line(tmp_path):
    write_frames(tmp_path / "frames")
    codes, _, logs = on_ranks(shards_drawn, tmp_path / "frames", 1000, out=tmp_path)
    lines = [line for log in logs for line in log.splitlines() if "processes share" not in line]
    assert codes == [1, 1] and len(lines) == 1, lines
    assert "too few shards (1) for 2 processes; start fewer processes, or record more frames" in lines[0]


def device_refused(name):
    try:
        return str(common.pick_device(name))
    except SystemExit as stop:
        return str(stop)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for GPUs that are not there")
def test_each_process_asks_for_its_own_gpu(tmp_path):
    for rank, answer in enumerate(results_of(device_refused, "cuda", out=tmp_path)):
        assert answer.startswith(f"error: --device cuda:{rank} is not usable here")
    for answer in results_of(device_refused, "cuda:1", out=tmp_path):
        assert answer == "error: --device cuda:1 puts all processes on one GPU; under torchrun leave --device out"
    assert results_of(device_refused, "auto", out=tmp_path) == ["cpu", "cpu"]


# --- the scripts -----------------------------------------------------------------------------------------------------


def told_to_stop():
    os.kill(os.getpid(), signal.SIGTERM)  # torchrun tells every process


def second_fails():
    if not common.leads():
        common.fail("there is no more")


def second_dies():
    if not common.leads():
        os.kill(os.getpid(), signal.SIGKILL)


def nothing():
    pass


def train(script, settings, data, runs, at_step_3=nothing):
    """A script's main() in a process of its own; returns the fingerprint of its networks."""
    networks, parallel, due, steps = [], common.parallel, common.RunState.due, [0]

    def remember(network):
        networks.append(network)
        return parallel(network)

    def due_and_more(self, **how):
        steps[0] += 1
        if steps[0] == 3:
            at_step_3()
        return due(self, **how)

    common.parallel, common.RunState.due = remember, due_and_more
    script = importlib.import_module(script)
    script.main(script.Args(**settings, data_dir=data, runs_dir=runs))
    return dict(weights=common.fingerprint(*networks))


def files(folder):
    """What lies there, but for the locks."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


LATENTS = {f"maze/{split}/latents_{shard:03d}.npz" for split in ("train", "test") for shard in (0, 1)}


@pytest.mark.parametrize("script, settings, product", [(stage1, STAGE1, "latent_dynamics"), (ilpo, ILPO, "ilpo")])
def test_a_run_told_to_stop_goes_on_with_the_same_weights_everywhere(script, settings, product, data, tmp_path):
    name, runs = script.__name__, tmp_path / "runs"
    codes, _, logs = on_ranks(train, script.__name__, settings, data, runs, told_to_stop, out=tmp_path / "stopped")
    assert 128 + signal.SIGTERM in codes and 0 not in codes, logs
    assert f"{name}_state.pt is at step 3; go on with --resume" in logs[0] and logs[1] == "", logs
    assert torch.load(runs / f"maze/{name}_state.pt", weights_only=True)["step"] == 3
    codes, results, logs = on_ranks(train, script.__name__, settings | dict(resume=True), data, runs, out=tmp_path / "resumed")
    assert codes == [0, 0] and "is at step 3" in logs[0] and logs[1] == "", logs
    assert results[0]["weights"] == results[1]["weights"]  # both read the optimiser's averages too
    assert files(runs) == {f"maze/{product}.pt", f"maze/{name}.csv"} | (LATENTS if script is stage1 else set())


@pytest.mark.parametrize("event, line", [(second_fails, "error: there is no more"), (second_dies, "error: another process has ended")])
def test_when_one_process_ends_the_other_does_and_one_line_says_why(event, line, data, tmp_path):
    codes, _, logs = on_ranks(train, "train_latent_dynamics", STAGE1, data, tmp_path / "runs", event, out=tmp_path)
    assert codes == [1, -signal.SIGKILL if event is second_dies else 1], logs
    errors = [text for log in logs for text in log.splitlines() if "error" in text.lower() and "train_error" not in text]
    assert len(errors) == 1 and line in errors[0] and "Traceback" not in "".join(logs), logs


# --- torchrun --------------------------------------------------------------------------------------------------------


def torchrun(script, data, runs, *more, **flags):
    """Starts a script in two processes, as the README says."""
    flags = [f"--{flag.replace('_', '-')}={value}" for flag, value in dict(flags, data_dir=data, runs_dir=runs).items()]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", f"{script}.py", *flags, *more],
        cwd=ROOT, env=dict(os.environ, OMP_NUM_THREADS="1"), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_stages_1_and_2_under_torchrun(data, tmp_path):
    """Stage 1 is told to stop and goes on; stage 2 reads what it made."""
    run, long = tmp_path / "runs/maze", dict(STAGE1, grad_steps=40, checkpoint_minutes=1e-9, eval_every=20)
    state = run / "train_latent_dynamics_state.pt"
    process = torchrun("train_latent_dynamics", data, tmp_path / "runs", **long)
    while process.poll() is None and not (state.exists() and torch.load(state, weights_only=True)["step"]):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode and out.count("stage 1: 40 updates") == 1
    assert err.count("stopped: ") == 1 and "forcefully" not in err, err  # neither had to be killed
    step = torch.load(state, weights_only=True)["step"]
    assert 0 < step < 40 and f"is at step {step}; go on with --resume" in err

    process = torchrun("train_latent_dynamics", data, tmp_path / "runs", "--resume", **long | dict(checkpoint_minutes=5))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "rror" not in err and "arning" not in err.replace("OMP", ""), err
    assert f"is at step {step}" in out and out.count("latents and checkpoint") == 1
    dynamics = common.load_checkpoint(run / "latent_dynamics.pt", "latent_dynamics", "maze", "")
    assert dynamics["grad_step"] == 40 and dynamics["fdm"].keys() == stage1.FDM(16, 1, 24, 4, False).state_dict().keys()
    for split in ("train", "test"):
        for path in common.list_shards(data / "maze" / split, "frames", ""):
            common.read_latents(path, run / split, "maze", dynamics["fingerprint"])

    process = torchrun("train_latent_bc", data, tmp_path / "runs", **SMALL)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "rror" not in err and out.count("latent policy: ") == 1, err
    policy = stage2.LatentPolicy(16, 0.25, 24)
    common.load_checkpoint(run / "latent_policy.pt", "latent_policy", "maze", "").fill(policy, "model")
    rows = (run / "train_latent_bc.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["grad_step", "2", "4", "6"]
    products = {f"maze/{name}" for name in ("latent_dynamics.pt", "latent_policy.pt", "train_latent_dynamics.csv", "train_latent_bc.csv")}
    assert files(tmp_path / "runs") == products | LATENTS
