"""Stage 1: the quantizer, the FDM, the loss, the metrics and the latents that it writes."""

import csv

import numpy as np
import pytest
import torch
from conftest import fails, load, run, write_toy_data
import collect_data
import common
import train_latent_bc as stage2
import train_latent_dynamics as stage1
from train_latent_dynamics import FDM, IDM, EMAVectorQuantizer, NoQuantizer

C, P, K, E = 2, 3, 5, 4  # codebooks, positions, embeddings, numbers of an embedding
Z = C * E * P


def quantizer_of():
    torch.manual_seed(0)
    quantizer = EMAVectorQuantizer(C, P, K, E, decay=0.9)
    quantizer.embedding.normal_()
    quantizer.ema_sum.copy_(quantizer.embedding)
    return quantizer


def windows_of(count, size=16):
    return torch.randint(256, (count, 3, size, size, 3), dtype=torch.uint8)


def test_quantization_against_a_naive_loop():
    """Piece p of codebook c is z.view(B, C, E, P)[b, c, :, p] (official code)."""
    quantizer, z = quantizer_of().eval(), torch.randn(7, Z)
    embedding, pieces = quantizer.embedding.clone(), z.view(7, C, E, P)
    naive_codes, naive_z = torch.zeros(7, C, P, dtype=torch.long), torch.zeros(7, C, E, P)
    for b, c, p in np.ndindex(7, C, P):
        code = (embedding[c] - pieces[b, c, :, p]).pow(2).sum(1).argmin()
        naive_codes[b, c, p], naive_z[b, c, :, p] = code, embedding[c, code]
    z_q, loss, codes = quantizer(z)
    assert torch.equal(codes, naive_codes.flatten(1))  # position by position within a codebook
    torch.testing.assert_close(z_q, naive_z.flatten(1))
    torch.testing.assert_close(loss, (z - naive_z.flatten(1)).pow(2).mean())
    assert torch.equal(embedding, quantizer.embedding)  # no update in evaluation


def test_averages_follow_their_pieces_and_dead_codes_restart():
    quantizer, z = quantizer_of(), torch.randn(50, Z)
    old = quantizer.embedding.clone()
    count = quantizer.ema_count.clone()
    total = quantizer.ema_sum.clone()
    z_q, _, codes = quantizer(z)
    codes, pieces = codes.view(50, C, P), z.view(50, C, E, P)
    fair, dead = 50 * P / K, 0
    for c, code in np.ndindex(C, K):
        own = [pieces[b, c, :, p] for b, p in (codes[:, c] == code).nonzero().tolist()]
        new_count = 0.9 * count[c, code] + 0.1 * len(own)
        new_total = 0.9 * total[c, code] + 0.1 * sum(own, torch.zeros(E))
        found = quantizer.embedding[c, code]
        if new_count >= 0.1 * fair:
            torch.testing.assert_close(quantizer.ema_count[c, code], new_count)
            torch.testing.assert_close(found, new_total / new_count)
        else:  # restarts at a piece of this batch, with its fair share
            distance = (pieces[:, c].transpose(1, 2) - found).norm(dim=-1)
            assert distance.min() < 1e-5 and quantizer.ema_count[c, code] == fair
            dead += 1
    assert 0 < dead < C * K
    first = old[0, codes[0, 0, 0]]  # z_q comes from the codebook before its update
    torch.testing.assert_close(z_q.view(50, C, E, P)[0, 0, :, 0], first)


def test_the_straight_through_gradient_is_the_identity():
    quantizer, z = quantizer_of().eval(), torch.randn(3, Z, requires_grad=True)
    weights = torch.randn(3, Z)
    z_q, loss, _ = quantizer(z)
    (gradient,) = torch.autograd.grad((z_q * weights).sum(), z, retain_graph=True)
    torch.testing.assert_close(gradient, weights)
    (gradient,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(gradient, 2 * (z - z_q).detach() / z.numel())  # towards the code


def test_networks_have_the_official_sizes():
    networks = {
        IDM(64, 1, 4, 128): 3_685_376,
        FDM(64, 1, 128, 24, predict_change=False): 7_814_139,
        stage2.LatentPolicy(64, 4, 128): 3_681_920,
        collect_data.ExpertPolicy(64, 1): 626_256,
    }
    for network, parameters in networks.items():
        assert sum(p.numel() for p in network.parameters()) == parameters
    logits = network(windows_of(2, 64)[:, 0])[0]
    assert (logits.softmax(-1) - 1 / 15).abs().max() < 0.02  # the expert starts near uniform


@pytest.mark.parametrize("size", [16, 64])
def test_z_planes_are_a_plain_concatenation(size):
    conv = torch.nn.Conv2d(6 + 5, 8, 3, padding=1)
    x, z = torch.randn(2, 6, size, size), torch.randn(2, 5)
    plain = conv(torch.cat([x, z[:, :, None, None].expand(-1, -1, size, size)], 1))
    torch.testing.assert_close(stage1.conv_with_planes(conv, x, z), plain, rtol=1e-4, atol=1e-5)


def test_frames_are_stacked_in_order_and_the_fdm_starts_from_no_change():
    windows, z = windows_of(2), torch.randn(2, 8)
    x = common.to_input(windows)
    torch.testing.assert_close(x[1, 3 * 2 + 1, 4, 5] + 0.5, windows[1, 2, 4, 5, 1] / 255)
    predicted = FDM(16, 1, 8, 4, predict_change=True)(windows[:, :-1], z)
    torch.testing.assert_close(predicted, common.to_input(windows[:, 1:2]))
    assert FDM(16, 1, 8, 4, predict_change=False)(windows[:, :-1], z).abs().max() <= 0.5


@torch.no_grad()
def test_z_enters_the_fdm_at_both_ends():
    past, z = windows_of(2)[:, :-1], torch.randn(2, 8)

    def effect_of_z(*silenced):
        """Of z on the prediction, without z's weights in the first layer or at the bottleneck."""
        torch.manual_seed(0)
        fdm = FDM(16, 1, 8, 4, predict_change=False).eval()
        ends = dict(first=fdm.first_conv.weight[:, 6:], bottleneck=fdm.up[0][0].weight[-8:])
        for name in silenced:
            ends[name].zero_()
        return (fdm(past, z) - fdm(past, 0 * z)).abs().max()

    assert effect_of_z("first") > 1e-6 and effect_of_z("bottleneck") > 1e-6
    assert effect_of_z("first", "bottleneck") == 0


def test_the_head_is_scaled_on_a_batch_and_nothing_else_changes():
    torch.manual_seed(1)
    idm = stage1.IDM(16, 1, 0.25, 32)
    windows = torch.randint(256, (64, 3, 16, 16, 3), dtype=torch.uint8)
    before = idm(windows).detach()
    stage1.scale_head(idm, windows, 0.2)
    after = idm(windows).detach()
    torch.testing.assert_close(after.mean(0), torch.zeros(32), atol=1e-5, rtol=0)
    torch.testing.assert_close(after.std(0), torch.full((32,), 0.2), atol=1e-4, rtol=0)
    standardized = (before - before.mean(0)) / before.std(0)
    torch.testing.assert_close(after / 0.2, standardized, atol=1e-3, rtol=0)


def test_the_loss_by_hand():
    windows, z = windows_of(2), torch.randn(2, Z, requires_grad=True)
    quantizer, seen = quantizer_of().eval(), {}

    def idm(windows):
        seen["idm"] = windows
        return z

    def fdm(past, z_q):
        seen["fdm"] = past, z_q
        return z_q.mean().expand(2, 3, 16, 16)

    loss, mse, commitment_loss = stage1.dynamics_loss(idm, quantizer, fdm, windows, 0.05)
    assert torch.equal(seen["idm"], windows)  # the IDM sees the future
    past, z_q = seen["fdm"]
    assert torch.equal(past, windows[:, :2])  # the FDM does not
    torch.testing.assert_close(z_q, quantizer(z)[0])  # and is conditioned on the quantized z
    target = windows[:, 2].permute(0, 3, 1, 2) / 255 - 0.5
    torch.testing.assert_close(mse, (z_q.mean() - target).pow(2).mean())
    torch.testing.assert_close(loss, mse + 0.05 * commitment_loss)
    assert torch.autograd.grad(mse, z)[0].all()  # the IDM learns from the FDM
    free = stage1.dynamics_loss(idm, NoQuantizer(), fdm, windows, 0.05)
    assert seen["fdm"][1] is z and free[2] == 0


def test_probe_and_perplexity_by_hand():
    rng = np.random.default_rng(0)
    actions = rng.integers(0, 3, 600)
    z = np.eye(8)[actions] + 0.05 * rng.normal(size=(600, 8))
    accuracy, majority = stage1.linear_probe(z[:400], actions[:400], z[400:], actions[400:])
    common_action = np.bincount(actions[:400]).argmax()
    assert accuracy == 1 and majority == (actions[400:] == common_action).mean()
    assert stage1.perplexity(torch.zeros(9, dtype=torch.long)) == pytest.approx(1)
    assert stage1.perplexity(torch.arange(12) % 4) == pytest.approx(4)


def test_evaluation_shows_collapse_and_probes_the_last_quarter(record_calls):
    """Four positions that sit on one code each use four codes of the codebook, and tell nothing."""
    probes = record_calls(stage1, "linear_probe")
    torch.manual_seed(0)
    idm, fdm = IDM(16, 1, 0.25, 32), FDM(16, 1, 32, 4, predict_change=False)
    quantizer = EMAVectorQuantizer(1, 4, 8, 8, 0.9)
    quantizer.embedding.normal_()
    frames = torch.full((40, 3, 16, 16, 3), 77, dtype=torch.uint8)
    metrics = stage1.evaluate(idm, quantizer, fdm, frames, frames, np.arange(40))
    for name in ("perplexity_mean", "perplexity_min"):
        assert metrics[name] == pytest.approx(1)
    assert metrics["copy_mse"] == 0 and idm.training and quantizer.training and fdm.training
    ((z, actions, test_z, test_actions),) = probes
    assert (len(z), len(test_z)) == (30, 10) and [*actions, *test_actions] == list(range(40))


@torch.no_grad()
def test_latents_are_those_of_a_naive_loop(chain):
    checkpoint = load(chain / "runs/maze/latent_dynamics.pt")
    assert checkpoint["grad_step"] == 4 and checkpoint["recording"]["expert_return"] == 10.0
    idm = IDM(16, 1, 0.25, 128).eval()
    idm.load_state_dict(checkpoint["idm"])
    quantizer = EMAVectorQuantizer(**checkpoint["config"]["quantizer"]).eval()
    quantizer.load_state_dict(checkpoint["quantizer"])
    for shard in ("train/{}_000", "train/{}_001", "test/{}_000", "test/{}_001"):
        frames = load(chain / f"data/maze/{shard.format('frames')}.npz")
        latents = load(chain / f"runs/maze/{shard.format('latents')}.npz")
        obs, first, z = frames["obs"], frames["first"], latents["z"]
        assert z.dtype == np.float16 and latents["codes"].shape == (128, 8)
        for i in range(len(obs)):
            inside = 0 < i < len(obs) - 1 and not first[i] and not first[i + 1]
            assert latents["valid"][i] == inside
            if not inside:
                assert not z[i].any()
            elif i % 7 == 1:
                own_z = idm(torch.from_numpy(obs[None, i - 1 : i + 2]))
                np.testing.assert_allclose(z[i], own_z[0], atol=2e-3)  # not quantized
                assert (latents["codes"][i] == quantizer(own_z)[2][0].numpy()).all()


def test_it_trains_the_same_without_labels_and_with_the_same_seed(chain, tmp_path, capsys):
    """Action-free: label files only add metrics."""
    write_toy_data(tmp_path)
    for path in tmp_path.rglob("labels_*.npz"):
        path.unlink()
    run(stage1, tmp_path)
    run(stage2, tmp_path)
    assert "the codebooks have collapsed" in capsys.readouterr().out  # after four updates
    runs = [folder / "runs/maze" for folder in (chain, tmp_path)]
    for name in ("latent_dynamics.pt", "train/latents_001.npz", "latent_policy.pt"):
        one, other = ((r / name).read_bytes() for r in runs)
        assert one == other
    one, other = (list(csv.DictReader((r / "train_latent_dynamics.csv").open())) for r in runs)
    assert "probe" in one[0] and "probe" not in other[0]
    assert [row["test_mse"] for row in one] == [row["test_mse"] for row in other]
    assert [row["grad_step"] for row in one] == ["0", "2", "4"]


def test_bad_input_gives_one_line_before_training(tmp_path):
    root = write_toy_data(tmp_path, shards=1)
    assert "--embeddings 300" in fails(run, stage1, root, embeddings=300)
    assert "not usable" in fails(run, stage1, root, device="cuda:77")
    test = root / "data/maze/test/frames_000.npz"
    test.write_bytes(test.read_bytes()[:300])
    assert "frames_000.npz is damaged" in fails(run, stage1, root)
    test.unlink()
    assert "collect_data.py writes them" in fails(run, stage1, root)
    assert not (root / "runs/maze/latent_dynamics.pt").exists()


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(tmp_path):
    root = write_toy_data(tmp_path)
    run(stage1, root)
    output = root / "runs/maze/latent_dynamics.pt"
    before = output.read_bytes()
    assert "not finite at step 2" in fails(run, stage1, root, lr=float("inf"))
    assert output.read_bytes() == before


def test_latents_beyond_float16_end_the_run_before_the_checkpoint(tmp_path, monkeypatch):
    root, plain = write_toy_data(tmp_path), stage1.dynamics_loss

    def diverge(idm, *rest):
        with torch.no_grad():
            idm.head.bias.fill_(7e4)
        return plain(idm, *rest)

    monkeypatch.setattr(stage1, "dynamics_loss", diverge)
    assert "latents have grown to 7e+04, beyond float16; try --z-std 0" in fails(
        run, stage1, root, vq=False
    )
    assert not (root / "runs/maze/latent_dynamics.pt").exists()
    stage1.check_range(torch.tensor([[65_504.0, -1.5]]))  # the largest number of float16
    assert "beyond float16" in fails(stage1.check_range, torch.tensor([[65_536.0]]))
    assert "beyond float16" in fails(stage1.check_range, torch.tensor([[float("nan")]]))
