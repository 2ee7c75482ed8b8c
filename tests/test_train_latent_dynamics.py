"""Stage 1: the quantizer, the FDM, the loss, the metrics and the latents that it writes."""

import csv

import numpy as np
import pytest
import torch
from conftest import STAGE_1, fails, folders, write_toy_data

import common
import train_latent_dynamics as stage1
from train_latent_dynamics import FDM, IDM, EMAVectorQuantizer, NoQuantizer

C, P, K, E = 2, 3, 5, 4  # codebooks, positions, embeddings, numbers of an embedding


def quantizer_of(decay=0.9):
    torch.manual_seed(0)
    quantizer = EMAVectorQuantizer(C, P, K, E, decay)
    quantizer.embedding.normal_()
    quantizer.total.copy_(quantizer.embedding)
    return quantizer


def naive_codes(z, embedding):
    """codes [B, C, P]: piece p of codebook c is z.view(B, C, E, P)[b, c, :, p] (official code)."""
    pieces = z.view(-1, C, E, P)
    codes = torch.zeros(len(z), C, P, dtype=torch.long)
    for b in range(len(z)):
        for c in range(C):
            for p in range(P):
                codes[b, c, p] = (embedding[c] - pieces[b, c, :, p]).pow(2).sum(1).argmin()
    return codes


def test_quantization_against_a_naive_loop():
    quantizer, z = quantizer_of().eval(), torch.randn(7, C * E * P)
    before = quantizer.embedding.clone()
    z_q, loss, codes = quantizer(z)
    naive = naive_codes(z, quantizer.embedding)
    assert torch.equal(codes, naive.flatten(1))  # position by position within a codebook
    expected = torch.zeros(7, C, E, P)
    for b, c, p in np.ndindex(7, C, P):
        expected[b, c, :, p] = quantizer.embedding[c, naive[b, c, p]]
    torch.testing.assert_close(z_q, expected.flatten(1))
    torch.testing.assert_close(loss, (z - expected.flatten(1)).pow(2).mean())
    assert torch.equal(before, quantizer.embedding)  # no update in evaluation


def test_averages_follow_their_pieces():
    quantizer, z = quantizer_of(decay=0.9), torch.randn(50, C * E * P)
    old, count, total = (x.clone() for x in (quantizer.embedding, quantizer.count, quantizer.total))
    z_q, _, codes = quantizer(z)
    codes, pieces = codes.view(50, C, P), z.view(50, C, E, P)
    fair = 50 * P / K
    for c in range(C):
        for code in range(K):
            own = [pieces[b, c, :, p] for b, p in (codes[:, c] == code).nonzero().tolist()]
            new_count = 0.9 * count[c, code] + 0.1 * len(own)
            new_total = 0.9 * total[c, code] + 0.1 * sum(own, torch.zeros(E))
            if new_count >= 0.1 * fair:
                torch.testing.assert_close(quantizer.count[c, code], new_count)
                torch.testing.assert_close(quantizer.embedding[c, code], new_total / new_count)
            else:  # dead: restarts at a piece of this batch with its fair share
                distance = (pieces[:, c].transpose(1, 2) - quantizer.embedding[c, code]).norm(
                    dim=-1
                )
                assert distance.min() < 1e-5 and quantizer.count[c, code] == fair
    first = old[0, codes[0, 0, 0]]  # z_q comes from the codebook before its update
    torch.testing.assert_close(z_q.view(50, C, E, P)[0, 0, :, 0], first)


def test_dead_codes_are_revived_and_live_ones_are_not():
    quantizer = quantizer_of(decay=0.5)
    quantizer.embedding[:, 1:] = 1000  # far away from everything
    quantizer.total.copy_(quantizer.embedding)
    z = torch.randn(64, C * E * P)
    for _ in range(8):
        quantizer(z)
    assert quantizer.embedding.abs().max() < 10
    used = [len(np.unique(column)) for column in quantizer.eval()(z)[2].view(64, C, P)[:, :, 0].T]
    assert min(used) > 2


def test_the_straight_through_gradient_is_the_identity():
    quantizer, z = quantizer_of().eval(), torch.randn(3, C * E * P, requires_grad=True)
    weights = torch.randn(3, C * E * P)
    z_q, loss, _ = quantizer(z)
    (gradient,) = torch.autograd.grad((z_q * weights).sum(), z, retain_graph=True)
    torch.testing.assert_close(gradient, weights)
    (gradient,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(gradient, 2 * (z - z_q).detach() / z.numel())  # towards the code


def test_parameters_are_the_official_ones():
    count = [
        sum(p.numel() for p in m.parameters())
        for m in (IDM(64, 1, 4, 128), FDM(64, 1, 128, 24, False))
    ]
    assert count == [3_685_376, 7_814_139]
    torch.manual_seed(0)
    quantizer = EMAVectorQuantizer(2, 4, 64, 16, 0.999)
    assert (quantizer.count == 1).all() and torch.equal(quantizer.embedding, quantizer.total)


@pytest.mark.parametrize("size", [16, 64])
def test_z_planes_are_a_plain_concatenation(size):
    conv = torch.nn.Conv2d(6 + 5, 8, 3, padding=1)
    x, z = torch.randn(2, 6, size, size), torch.randn(2, 5)
    plain = conv(torch.cat([x, z[:, :, None, None].expand(-1, -1, size, size)], 1))
    torch.testing.assert_close(stage1.conv_with_planes(conv, x, z), plain, rtol=1e-4, atol=1e-5)


def test_frames_are_stacked_in_order_and_the_fdm_starts_from_no_change():
    windows = torch.randint(256, (2, 3, 16, 16, 3), dtype=torch.uint8)
    x = stage1.to_input(windows)
    torch.testing.assert_close(x[1, 3 * 2 + 1, 4, 5] + 0.5, windows[1, 2, 4, 5, 1] / 255)
    fdm = FDM(16, 1, 8, 4, predict_change=True)
    predicted = fdm(windows[:, :-1], torch.randn(2, 8))
    torch.testing.assert_close(predicted, stage1.to_input(windows[:, 1:2]))
    assert FDM(16, 1, 8, 4, False)(windows[:, :-1], torch.randn(2, 8)).abs().max() <= 0.5


def test_z_enters_the_fdm_at_both_ends():
    past, z = torch.randint(256, (2, 2, 16, 16, 3), dtype=torch.uint8), torch.randn(2, 8)
    fdm = FDM(16, 1, 8, 4, False).eval()
    first, last = (
        fdm.down[0][0].weight,
        fdm.up[0][0].weight,
    )  # (width, 6 + Z, 3, 3), (widths + Z, ...)
    for silenced in (first[:, 6:], last[-8:]):
        with torch.no_grad():
            kept = silenced.clone()
            silenced.zero_()
            assert (fdm(past, z) - fdm(past, 0 * z)).abs().max() > 1e-6  # through the other one
            silenced.copy_(kept)
    with torch.no_grad():
        first[:, 6:].zero_(), last[-8:].zero_()
        assert torch.equal(fdm(past, z), fdm(past, 0 * z))


class Spy(torch.nn.Module):
    """In the place of a network: records its inputs."""

    def __init__(self, output):
        super().__init__()
        self.output, self.inputs = output, None

    def forward(self, *inputs):
        self.inputs = inputs
        return self.output


def test_the_loss_by_hand():
    windows = torch.randint(256, (2, 3, 16, 16, 3), dtype=torch.uint8)
    z = torch.randn(2, C * E * P, requires_grad=True)
    idm, fdm, quantizer = Spy(z), Spy(torch.full((2, 3, 16, 16), 0.1)), quantizer_of().eval()
    loss, mse, commitment_loss = stage1.dynamics_loss(idm, quantizer, fdm, windows, 0.05)
    assert torch.equal(idm.inputs[0], windows)  # the IDM sees the future
    past, z_q = fdm.inputs
    assert torch.equal(past, windows[:, :2])  # the FDM does not
    torch.testing.assert_close(z_q, quantizer(z)[0])  # and is conditioned on the quantized z
    target = windows[:, 2].permute(0, 3, 1, 2) / 255 - 0.5
    torch.testing.assert_close(mse, (0.1 - target).pow(2).mean())
    torch.testing.assert_close(loss, mse + 0.05 * commitment_loss)
    free = stage1.dynamics_loss(idm, NoQuantizer(), fdm, windows, 0.05)
    assert fdm.inputs[1] is z and free[2] == 0


def test_the_idm_learns_from_the_fdm_alone():
    torch.manual_seed(0)
    idm, fdm, quantizer = (
        IDM(16, 1, 0.25, C * E * P),
        FDM(16, 1, C * E * P, 4, False),
        quantizer_of(),
    )
    windows = torch.randint(256, (4, 3, 16, 16, 3), dtype=torch.uint8)
    stage1.dynamics_loss(idm, quantizer, fdm, windows, commitment_cost=0.0)[0].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in idm.parameters())


def test_probe_and_perplexity_by_hand():
    rng = np.random.default_rng(0)
    actions = rng.integers(0, 3, 600)
    z = np.eye(8)[actions] + 0.05 * rng.normal(size=(600, 8))
    accuracy, majority = stage1.linear_probe(z[:400], actions[:400], z[400:], actions[400:])
    common_action = np.bincount(actions[:400]).argmax()
    assert accuracy == 1 and majority == (actions[400:] == common_action).mean()
    one_class = stage1.linear_probe(z[:9], np.zeros(9, int), z[400:], actions[400:])
    assert one_class == ((actions[400:] == 0).mean(),) * 2
    assert stage1.perplexity(np.zeros(9, int), 64) == pytest.approx(1)
    assert stage1.perplexity(np.arange(12) % 4, 64) == pytest.approx(4)


def test_the_probe_is_tested_on_the_last_quarter(monkeypatch):
    probes, probe = [], stage1.linear_probe
    monkeypatch.setattr(stage1, "linear_probe", lambda *x: probes.append(x) or probe(*x))
    idm, fdm = IDM(16, 1, 0.25, 8), FDM(16, 1, 8, 4, False)
    frames = torch.randint(256, (40, 3, 16, 16, 3), dtype=torch.uint8)
    stage1.evaluate(idm, NoQuantizer(), fdm, frames, frames, np.arange(40))
    z, actions, test_z, test_actions = probes[0]
    assert (len(z), len(test_z)) == (30, 10) and [*actions, *test_actions] == list(range(40))


def test_collapse_shows_in_each_position():
    """Four positions that sit on one code each use four codes of the codebook, and tell nothing."""
    torch.manual_seed(0)
    idm, fdm, quantizer = (
        IDM(16, 1, 0.25, 32),
        FDM(16, 1, 32, 4, False),
        EMAVectorQuantizer(1, 4, 8, 8, 0.9),
    )
    frames = torch.full((40, 3, 16, 16, 3), 77, dtype=torch.uint8)
    quantizer.embedding.normal_()
    metrics = stage1.evaluate(idm, quantizer, fdm, frames, frames, None)
    assert metrics["perplexity_mean"] == pytest.approx(1) and metrics[
        "perplexity_min"
    ] == pytest.approx(1)
    assert "probe" not in metrics and metrics["copy_mse"] == 0
    assert idm.training and quantizer.training


# --- the whole script -----------------------------------------------------------------------------


def load(root, split, shard=0):
    path = root / f"runs/maze/{split}/latents_{shard:03d}.npz"
    return common.load_npz(path, ("z", "codes", "valid"), "")


def test_latents_are_those_of_a_naive_loop(chain):
    checkpoint = torch.load(chain / "runs/maze/latent_dynamics.pt", weights_only=True)
    assert checkpoint["grad_step"] == 4 and checkpoint["settings"]["expert_return"] == 10.0
    idm = IDM(16, 1, 0.25, 128).eval()
    idm.load_state_dict(checkpoint["idm"])
    quantizer = EMAVectorQuantizer(*checkpoint["vq_sizes"], 0.9).eval()
    quantizer.load_state_dict(checkpoint["quantizer"])
    for split in ("train", "test"):
        for shard in (0, 1):
            obs, first, _ = common.read_frames(
                chain / f"data/maze/{split}/frames_{shard:03d}.npz", "maze"
            )
            latents = load(chain, split, shard)
            assert latents["z"].dtype == np.float16 and latents["codes"].shape == (128, 8)
            for i in range(len(obs)):
                inside = 0 < i < len(obs) - 1 and not first[i] and not first[i + 1]
                assert latents["valid"][i] == inside
                if not inside:
                    assert not latents["z"][i].any()
                elif i % 7 == 1:
                    with torch.no_grad():
                        z = idm(torch.from_numpy(obs[None, i - 1 : i + 2]))
                    np.testing.assert_allclose(latents["z"][i], z[0], atol=2e-3)  # not quantized
                    assert (latents["codes"][i] == quantizer(z)[2][0].numpy()).all()


def test_it_trains_the_same_without_labels_and_with_the_same_seed(chain, tmp_path):
    """Action-free: label files only add metrics."""
    write_toy_data(tmp_path)
    for path in tmp_path.rglob("labels_*.npz"):
        path.unlink()
    stage1.main(stage1.Args(**folders(tmp_path), **STAGE_1))
    one, other = (r / "runs/maze/latent_dynamics.pt" for r in (chain, tmp_path))
    assert one.read_bytes() == other.read_bytes()
    rows = [
        list(csv.DictReader((r / "runs/maze/train_latent_dynamics.csv").open()))
        for r in (chain, tmp_path)
    ]
    assert "probe" in rows[0][0] and "probe" not in rows[1][0]
    assert [row["test_mse"] for row in rows[0]] == [row["test_mse"] for row in rows[1]]
    assert [row["grad_step"] for row in rows[0]] == ["0", "2", "4"]


def test_any_name_and_no_random_split_will_do(tmp_path):
    root = write_toy_data(tmp_path, game="my video")
    for path in (root / "data/my video/random").iterdir():
        path.unlink()
    (root / "data/my video/random").rmdir()
    flags = STAGE_1 | dict(grad_steps=0, context=2, vq=False)
    stage1.main(stage1.Args(**folders(root, "my video"), **flags))
    checkpoint = torch.load(root / "runs/my video/latent_dynamics.pt", weights_only=True)
    assert (
        checkpoint["grad_step"] == 0
        and checkpoint["vq_sizes"] is None
        and checkpoint["context"] == 2
    )
    latents = common.load_npz(root / "runs/my video/test/latents_000.npz", ("codes", "valid"), "")
    assert latents["codes"].shape == (128, 0) and latents["valid"].sum() == 8 * (16 - 3)


def test_bad_input_gives_one_line_before_training(tmp_path):
    root = write_toy_data(tmp_path, shards=1)
    flags = folders(root) | STAGE_1
    assert "--embeddings 300" in fails(stage1.main, stage1.Args(**flags, embeddings=300))
    assert "not usable" in fails(stage1.main, stage1.Args(**flags | dict(device="cuda:77")))
    test = root / "data/maze/test/frames_000.npz"
    big = dict(obs=np.zeros((20, 32, 32, 3), np.uint8), first=np.zeros(20, bool))
    common.save_npz(test, {}, **big)
    assert "differ in frame size" in fails(stage1.main, stage1.Args(**flags))
    test.write_bytes(test.read_bytes()[:300])
    assert "frames_000.npz is damaged" in fails(stage1.main, stage1.Args(**flags))
    test.unlink()
    assert "collect_data.py --game maze" in fails(stage1.main, stage1.Args(**flags))
    assert not (root / "runs").exists()


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(tmp_path):
    root = write_toy_data(tmp_path)
    args = stage1.Args(**folders(root), **STAGE_1 | dict(lr=float("inf")))
    assert "not finite at step 2" in fails(stage1.main, args)
    checkpoint = torch.load(root / "runs/maze/latent_dynamics.pt", weights_only=True)
    assert checkpoint["grad_step"] == 0
    assert all(weight.isfinite().all() for weight in checkpoint["idm"].values())
