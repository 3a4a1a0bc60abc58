# SPDX-License-Identifier: MIT
"""Tests of BagSSL: each promise against an independent reference. Run: python -m pytest -q"""

import errno
import itertools
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.functional as TF
from PIL import Image
from torch.testing import assert_close

import bagssl
import eval_linear

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / ".github"))
import benchmark
import claims

torch.set_num_threads(1)  # as in `command`: sums in another order are not equal to the bit
TINY = ["--preset", "demo", "--image-size", "40", "--patch-scale", "0.0625", "--batch-size", "8", "--num-patches", "2",
        "--epochs", "1", "--projector", "16", "16", "16", "--lr", "1e-4", "--device", "cpu"]


def command(*arguments, script="bagssl.py", launcher=(), timeout=300, **environment):
    """Run a script as a user does; returns the finished process with its output as text."""
    script = [str(HERE / script)] if script else []
    return subprocess.run([sys.executable, *launcher, *script, *map(str, arguments)], text=True, capture_output=True,
                          timeout=timeout, stdin=subprocess.DEVNULL, cwd=HERE,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


def torchrun(processes, *more):
    return "-m", "torch.distributed.run", *(more or ("--standalone",)), f"--nproc_per_node={processes}"


@pytest.fixture
def in_process(monkeypatch):
    """A function: run a script's main here; returns its exit code, None at its end."""
    def run(*arguments, script=bagssl):
        monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
        try:
            bagssl.run_cli(script.main)
        except SystemExit as ended:
            return ended.code
    return run


@pytest.fixture
def refused(in_process, capsys):
    """A function: run a script's main here; it must end with exit code 2 and one sentence, which is returned."""
    def run(*arguments, script=bagssl):
        capsys.readouterr()
        code = in_process(*arguments, script=script)
        lines = capsys.readouterr().err.strip().splitlines()
        assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]
    return run


def uniform(*shape, seed=0, dtype=torch.float32):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def noise(*shape, seed=0):
    """Images whose pixels are random bytes."""
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def coordinates(height, width, batch=1):
    """Images (B, 2, H, W), float64, whose pixels hold their own row and column."""
    grid = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    return grid.double().expand(batch, -1, -1, -1)


def write_image(path, size=(40, 40), seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return pixels


# ---------------------------------------------------------------------------------------------------------- Patches


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("scale, size", [(0.1, None), (0.2, 16), ((0.05, 0.7), 7), ((0.05, 0.7), 16), ((0.05, 0.7), 40)])
def test_patches_agree_with_torchvision(dtype, scale, size):
    """Without a size they are the image's own pixels; scales between two are uniform in area."""
    images, u = noise(3, 3, 24, 32).to(dtype), uniform(3, 50, 3)
    patches = bagssl.crop_patches(images, u, scale, size)
    low, high = np.broadcast_to(scale, 2)
    tolerance = 0 if size is None else 1 if dtype == torch.uint8 else 0.01
    assert patches.shape[:2] == (3, 50)
    for b, v in itertools.product(range(3), range(50)):
        down, right, area = u[b, v].tolist()
        side = round(math.sqrt((low + (high - low) * area) * 24 * 32))
        top, left = int(down * (24 - side + 1)), int(right * (32 - side + 1))
        expected = images[b, :, top:top + side, left:left + side]
        if size:
            expected = TF.resize(expected, [size, size], antialias=True)
        assert_close(patches[b, v], expected, atol=tolerance, rtol=0)


def test_patches_are_uniform_and_independent():
    # A 7 x 6 image has 5 x 4 places for a 3 x 3 patch; a pair of patches has 400.
    patches = bagssl.crop_patches(coordinates(7, 6, batch=40_000), uniform(40_000, 2, 3), 9 / 42)
    top, left = patches[:, :, :, 0, 0].long().unbind(2)
    place = top * 4 + left
    for counts, expected in (
        (torch.bincount(place.flatten(), minlength=20), 4_000),  # each place equally often
        (torch.bincount(place[:, 0] * 20 + place[:, 1], minlength=400), 100),  # whatever the other patch's
    ):
        degrees = len(counts) - 1
        chi_square = ((counts - expected) ** 2 / expected).sum().item()
        assert abs(chi_square - degrees) < 4.5 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("extent", [5, 32, 225, 256])
def test_the_largest_number_still_fits(extent):
    u = torch.full((1, 1, 3), 1 - 2.0 ** -24)  # the largest that torch.rand draws
    corner = bagssl.crop_patches(coordinates(extent, extent), u, (1 / extent) ** 2)
    assert corner.shape == (1, 1, 2, 1, 1) and (corner == extent - 1).all()


@pytest.mark.parametrize("scale, size", [(0.0, 4), (-0.1, 4), (1.01, 4), ((0.0, 0.5), 4), ((0.5, 1.2), 4),
                                         ((0.6, 0.3), 4), ((0.2, 0.5), None)])
def test_scales_out_of_range_or_without_a_size_are_refused(scale, size):
    with pytest.raises(ValueError, match="scale" if size else "size"):
        bagssl.crop_patches(torch.zeros(1, 3, 8, 8), uniform(1, 2, 3), scale, size)


def test_grid_patches():
    images = coordinates(32, 48, batch=2)

    def corners(per_side, side):
        grid = bagssl.grid_patches(images, per_side, side ** 2 / (32 * 48))
        assert grid.shape == (2, per_side ** 2, 2, side, side)
        rows_and_columns = grid[1, :, :, 0, 0].unflatten(0, (per_side, per_side))  # (row, column, coordinate)
        return rows_and_columns[:, 0, 0].tolist(), rows_and_columns[0, :, 1].tolist()

    assert corners(1, 8) == ([12], [20])  # the centre
    assert corners(2, 8) == ([4, 20], [8, 32])  # the centres of the quadrants
    assert corners(4, 8) == ([0, 8, 16, 24], [2, 14, 26, 38])  # of the cells
    assert corners(3, 20) == ([0, 6, 12], [0, 14, 28])  # overlapping ones reach the edges
    square = torch.rand(2, 3, 16, 16)
    for per_side in (1, 3):
        assert_close(bagssl.grid_patches(square, per_side, 1.0), square[:, None].expand(-1, per_side ** 2, -1, -1, -1),
                     atol=0, rtol=0)


# ----------------------------------------------------------------------------------------------------- Augmentation

NEUTRAL = dict(brightness=0, contrast=0, saturation=0, hue=0, jitter_prob=1, gray_prob=0, solarize_prob=0)


@pytest.mark.parametrize("index, strengths, reference", [
    (0, {}, lambda x, u: TF.hflip(x) if u < 0.5 else x),
    (2, {"brightness": 0.9}, lambda x, u: TF.adjust_brightness(x, 0.1 + 1.8 * u)),
    (3, {"contrast": 0.9}, lambda x, u: TF.adjust_contrast(x, 0.1 + 1.8 * u)),
    (4, {"saturation": 0.9}, lambda x, u: TF.adjust_saturation(x, 0.1 + 1.8 * u)),
    (5, {"hue": 0.5}, lambda x, u: TF.adjust_hue(x, u - 0.5)),
    (6, {"gray_prob": 0.6}, lambda x, u: TF.rgb_to_grayscale(x, 3) if u < 0.6 else x),
    (7, {"solarize_prob": 0.6}, lambda x, u: TF.solarize(x, 0.5) if u < 0.6 else x),
])
def test_augment_agrees_with_torchvision(index, strengths, reference):
    numbers = [0.0, 0.3, 0.5, 0.77, 0.999]
    patches = uniform(len(numbers), 3, 9, 9)
    patches[:, :, 0] = patches[:, :1, 0]  # a row of greys, which have no hue
    patches[:, :, 1, 0], patches[:, :, 1, 1] = 0.0, 1.0
    u = torch.full((len(numbers), 8), 0.5)
    u[:, index] = torch.tensor(numbers)
    for patch, number, found in zip(patches, numbers, bagssl.augment(patches, u, **(NEUTRAL | strengths))):
        assert_close(found, reference(patch, number), atol=2e-6, rtol=0)


def test_augment_has_the_stated_odds_and_strengths():
    # A uniform patch of (0.4, 0.2, 0.1) shows what was done to it.
    u, patch = uniform(20_000, 8), torch.tensor([0.4, 0.2, 0.1])[:, None, None].expand(20_000, 3, 2, 2)

    def share_changed(patch=patch, **only):
        return ((bagssl.augment(patch, u, **(NEUTRAL | only)) - patch).abs() > 1e-3).any(1).double().mean().item()

    assert bagssl.augment.__defaults__ == (0.4, 0.4, 0.2, 0.1, 0.8, 0.2, 0.1)  # the VICReg authors'
    assert share_changed(hue=0.5, jitter_prob=0) == 0
    assert share_changed(brightness=0.4, jitter_prob=0.8) == pytest.approx(0.8, abs=0.015)
    assert share_changed(gray_prob=0.2) == pytest.approx(0.2, abs=0.015)
    assert share_changed(patch * 2, solarize_prob=0.1) == pytest.approx(0.1, abs=0.015)  # it changes what is above 0.5
    assert share_changed(torch.arange(2.0).expand(20_000, 3, 2, 2)) == pytest.approx(0.5, abs=0.015)  # the flip
    factor = bagssl.augment(patch, u, **(NEUTRAL | {"brightness": 0.4}))[:, 0, 0, 0] / 0.4
    assert 0.5999 < factor.min() < 0.601 and 1.399 < factor.max() < 1.4001 and abs(factor.mean() - 1) < 0.01


def test_augment_keeps_the_range_and_refuses_other_input():
    patches = torch.rand(5, 4, 3, 8, 8)
    out = bagssl.augment(patches, uniform(5, 4, 8), brightness=0.9, contrast=0.9, saturation=0.9, hue=0.5)
    assert out.shape == patches.shape and out.min() >= 0 and out.max() <= 1
    for wrong in (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.rand(2, 1, 8, 8)):
        with pytest.raises(ValueError, match="augment takes"):
            bagssl.augment(wrong, uniform(2, 8))


# ------------------------------------------------------------------------------------------------- Encoder and loss


@pytest.mark.parametrize("arch, width", [("resnet18", 512), ("resnet34", 512), ("resnet50", 2048)])
def test_backbone_has_torchvisions_keys(arch, width):
    encoder = bagssl.Encoder(arch, stem_stride=4, projector=(8, 9, 10))
    h, z = encoder(torch.rand(2, 3, 40, 40))
    assert h.shape == (2, width) and z.shape == (2, 10)
    model = getattr(torchvision.models, arch)()
    missing, unexpected = model.load_state_dict(encoder.backbone.state_dict(), strict=False)
    assert unexpected == [] and missing == ["fc.weight", "fc.bias"]
    assert bagssl.Encoder(arch, 1, (8, 8, 8)).backbone.conv1.stride == (1, 1)


@pytest.mark.parametrize("side, stride", [(3, 1), (16, 1), (32, 1), (3, 2), (17, 2), (32, 2)])
def test_patchnet_takes_patches_of_many_sizes(side, stride):
    net = bagssl.PatchNet((8, 12, 16, 20), stride)
    assert net(torch.rand(4, 3, side, side)).shape == (4, 20) and net.width == 20
    assert not net.whiten.weight.requires_grad


def test_whitening_makes_blocks_of_pixels_white():
    images = (4 * coordinates(30, 30).sum(1) * uniform(64, 3, 1, 1) + 20 * uniform(64, 3, 30, 30)).to(torch.uint8)
    filters = bagssl.whitening_filters(images, epsilon=1e-6)
    assert filters.shape == (54, 3, 3, 3) and torch.equal(filters[27:], -filters[:27])
    maps = F.conv2d(bagssl.normalize(images).double(), filters[:27].double())
    assert_close(torch.cov(maps.transpose(0, 1).flatten(1)), torch.eye(27).double(), atol=0.01, rtol=0)
    damped = bagssl.whitening_filters(images, epsilon=0.5).flatten(1).norm(dim=1).max()
    assert damped < 1 / math.sqrt(0.5) + 1e-3  # no axis is amplified by more than 1 / sqrt(epsilon)


@pytest.mark.parametrize("arch, scale, size", [("resnet18", (0.25,), 0), ("patchnet", (0.08, 1.0), 12)])
def test_views_and_encoder_are_one_graph_each(arch, scale, size):
    config = bagssl.Config(arch=arch, num_patches=2, patch_scale=scale, patch_size=size)
    encoder = bagssl.Encoder(arch, 1, (8, 8, 8)).double()
    weights = [p for p in encoder.parameters() if p.requires_grad]

    def results(compiled):
        x = compiled(bagssl.training_views)(noise(4, 3, 16, 16), uniform(4, 2, 11), config)
        h, z = compiled(encoder)(x.double())
        return x, h, z, *torch.autograd.grad(z.square().sum(), weights)

    # fullgraph: an error where Python would have to step in. The backend runs the graphs without a C++ compiler.
    graphs = results(lambda function: torch.compile(function, backend="aot_eager", fullgraph=True))
    assert_close(graphs, results(lambda function: function))


def test_normalize_takes_bytes_and_floats():
    images = noise(2, 3, 5, 5)
    expected = TF.normalize(images / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert_close(bagssl.normalize(images), expected)
    assert_close(bagssl.normalize(images / 255), expected)


def pairwise_vicreg(z, inv_weight=25.0, var_weight=25.0, cov_weight=1.0, eps=1e-4):
    """The definition, pair by pair, from the VICReg paper's pseudo-code."""
    def hinge_and_covariance(z):
        c = torch.cov(z.T)
        hinge = torch.relu(1 - torch.sqrt(c.diag() + eps)).mean() / 2
        return var_weight * hinge + cov_weight * (c - c.diag().diag()).square().sum() / len(c)

    pairs = list(itertools.combinations(z.unbind(1), 2))
    return sum(inv_weight * F.mse_loss(zi, zj) + hinge_and_covariance(zi) + hinge_and_covariance(zj)
               for zi, zj in pairs) / len(pairs)


@pytest.mark.parametrize("B, V, D", [(2, 2, 3), (6, 2, 11), (11, 5, 6), (8, 3, 8)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_vicreg_loss_is_the_mean_over_pairs(B, V, D, dtype, tolerance):
    reference = (normal(B, V, D, dtype=torch.float64) * 0.9 + 3).requires_grad_()
    z = reference.detach().to(dtype).requires_grad_()
    loss, terms = bagssl.vicreg_loss(z, 20.0, 15.0, 2.0)
    expected = pairwise_vicreg(reference, 20.0, 15.0, 2.0)
    assert_close(20 * terms["inv"] + 15 * terms["var"] + 2 * terms["cov"], loss.detach())
    found = loss, *torch.autograd.grad(loss, z)
    expected = expected, *torch.autograd.grad(expected, reference)
    assert_close(found, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


@pytest.mark.parametrize("B, V, D", [(7, 2, 11), (11, 3, 6)])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_shares_of_the_loss_average_to_it(B, V, D, size):
    z = normal(B, V, D, dtype=torch.float64).requires_grad_()
    expected = pairwise_vicreg(z)
    shares = [bagssl.vicreg_loss(z, rank=rank, world_size=size) for rank in range(size)]
    found = sum(loss for loss, _ in shares) / size
    assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert_close(torch.autograd.grad(found, z), torch.autograd.grad(expected, z), rtol=1e-9, atol=1e-12)
    assert len({terms["cov"].item() for _, terms in shares}) > 1  # they are parts, not copies


def test_vicreg_loss_is_float32_under_autocast():
    z = torch.randn(16, 2, 40)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = bagssl.vicreg_loss(z)
    assert torch.equal(loss, bagssl.vicreg_loss(z)[0])


def test_vicreg_loss_makes_no_square_of_the_width():
    z = torch.randn(4, 2, 30_000, requires_grad=True)  # a D x D matrix would hold 3.6 GB
    with torch.profiler.profile(profile_memory=True) as profile:
        bagssl.vicreg_loss(z)[0].backward()
    assert max(event.cpu_memory_usage for event in profile.events()) < 20e6


@pytest.mark.parametrize("shape", [(8, 1, 4), (1, 2, 4), (8, 4)])
def test_vicreg_loss_refuses_what_has_no_pairs(shape):
    with pytest.raises(ValueError, match="vicreg_loss takes"):
        bagssl.vicreg_loss(torch.zeros(shape))


@pytest.fixture(scope="module")
def small_world():
    """12 symbols in 4 classes, and 4,001 pairs of them in which each pair occurs exactly as often as its probability
    says: no sampling blurs what the loss finds. Returns the pairs (N, 2), their joint (12, 12), p (12,), and the
    eigenvalues and eigenvectors (in columns) of the normalised co-occurrences, in descending order."""
    classes = uniform(4, 12, dtype=torch.float64) ** 6
    classes = classes / classes.sum(1, keepdim=True)
    counts = (1000 * classes.T @ classes).round().long()
    pairs = torch.cartesian_prod(torch.arange(12), torch.arange(12)).repeat_interleave(counts.flatten(), 0)
    joint = counts / counts.sum().double()
    p = joint.sum(1)
    values, vectors = torch.linalg.eigh(joint / (p[:, None] * p).sqrt())
    assert values.flip(0)[[0, 3, 4]].tolist() == pytest.approx([1, 0.48, 0.01], abs=0.01)  # 3 that are not trivial
    return pairs, joint, p, values.flip(0), vectors.flip(1)


def minimise(function, width):
    z = normal(12, width, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.LBFGS([z], max_iter=3000, tolerance_grad=1e-12, tolerance_change=1e-16, history_size=50,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = function(z)
        loss.backward()
        return loss

    optimizer.step(closure)
    return z.detach()


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_similarity_with_a_small_covariance_is_the_best_low_rank_co_occurrence(small_world, width):
    """L_S of the paper at w = 0.7: w U U^T with U = sqrt(p) z is the truncated eigendecomposition."""
    _, joint, p, values, vectors = small_world
    z = minimise(lambda z: 0.35 * (z.T @ (p[:, None] * z)).square().sum() - (joint * (z @ z.T)).sum(), width)
    best = (vectors * values)[:, :width] @ vectors[:, :width].T
    assert_close(0.7 * (p[:, None] * p).sqrt() * (z @ z.T), best, rtol=0, atol=1e-6)


@pytest.mark.parametrize("width", [1, 2, 3])
def test_vicreg_spans_the_leading_eigenvectors_of_co_occurrence(small_world, width):
    """Its covariance weight must be large enough to keep two dimensions from sharing an eigenvector: 1 is not, here."""
    pairs, _, p, _, vectors = small_world
    z = minimise(lambda z: bagssl.vicreg_loss(z[pairs], cov_weight=25.0)[0], width)
    found = torch.linalg.qr(p.sqrt()[:, None] * (z - p @ z)).Q
    cosines = torch.linalg.svdvals(found.T @ vectors[:, 1:width + 1])  # 0 is the trivial one, which centring removes
    assert math.degrees(cosines.min().clamp(max=1).acos()) < 0.01


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("per_side, scale, size", [(1, 0.25, None), (3, 0.25, None), (2, 0.5, 12), (1, 1.0, None)])
def test_bag_is_the_mean_over_a_loop(chunk, per_side, scale, size):
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
                                   torch.nn.Flatten()).requires_grad_(False)
    images, sizes = noise(3, 3, 20, 24), []
    backbone.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    found = bagssl.BagOfPatches(backbone, per_side, scale, size, chunk)(images)
    assert max(sizes) <= chunk
    for h, patches in zip(found, bagssl.grid_patches(images, per_side, scale, size), strict=True):
        expected = sum(backbone(bagssl.normalize(patch[None]))[0] for patch in patches) / per_side ** 2
        assert_close(h, expected, atol=1e-5, rtol=1e-4)


# --------------------------------------------------------------------------------------------------
# Images


def test_folder_is_decoded_once_and_a_change_is_noticed(tmp_path, monkeypatch):
    pixels = {f"train/{name}/{i}.png": write_image(tmp_path / f"train/{name}/{i}.png", seed=i)
              for name in ("cat", "dog") for i in range(3)}
    write_image(tmp_path / "val/dog/0.png", size=(60, 40), seed=9)
    images, labels = bagssl.load_images("any", tmp_path, "train", 40)
    assert images.shape == (6, 3, 40, 40) and images.dtype == torch.uint8 and labels.tolist() == [0, 0, 0, 1, 1, 1]
    for image, name in zip(images, sorted(pixels)):
        assert torch.equal(image, torch.from_numpy(pixels[name]).permute(2, 0, 1))
    test, labels = bagssl.load_images("any", tmp_path, "test", 40)
    with Image.open(tmp_path / "val/dog/0.png") as photo:
        assert torch.equal(test[0], TF.pil_to_tensor(TF.center_crop(photo, 40))) and labels.tolist() == [1]

    monkeypatch.setattr(bagssl, "decode_image", lambda *_: pytest.fail("decoded again"))
    assert torch.equal(bagssl.load_images("any", tmp_path, "train", 40)[0], images)
    assert bagssl.load_images("any", tmp_path, "pretrain", 40)[1].tolist() == [0, 0, 0, 1, 1, 1]
    monkeypatch.undo()
    write_image(tmp_path / "train/unsorted.png")
    assert bagssl.load_images("any", tmp_path, "pretrain", 40)[1] is None  # not every image has a class
    (tmp_path / "train/unsorted.png").unlink()
    changed = write_image(tmp_path / "train/cat/0.png", seed=77)
    again = bagssl.load_images("any", tmp_path, "train", 40)[0]
    assert torch.equal(again[0], torch.from_numpy(changed).permute(2, 0, 1)) and torch.equal(again[1:], images[1:])


def test_folders_of_one_name_share_a_cache(tmp_path):
    pixels = [write_image(tmp_path / f"{name}/photos/one.png", seed=seed) for seed, name in enumerate("ab")]
    for _ in range(2):
        for name, expected in zip("ab", pixels):
            found, _ = bagssl.load_images("any", tmp_path / name / "photos", "pretrain", 40, cache=tmp_path / "cache")
            assert torch.equal(found[0], torch.from_numpy(expected).permute(2, 0, 1))
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_photos_of_every_kind_at_any_depth_are_resized_and_cropped(tmp_path):
    write_image(tmp_path / "a/b/c/d/wide.jpg", size=(90, 45), quality=95)
    Image.new("L", (50, 70), 90).save(tmp_path / "grey.png")
    Image.new("RGBA", (50, 50), (9, 8, 7, 0)).save(tmp_path / "alpha.png")  # transparent: seen on white
    Image.new("P", (40, 40)).save(tmp_path / "palette.gif.png")
    Image.new("CMYK", (40, 40)).save(tmp_path / "print.jpg")
    Image.fromarray(np.full((40, 40), 180 * 257, np.uint16)).save(tmp_path / "scan.png")
    turned = Image.new("RGB", (80, 40), (255, 0, 0))
    turned.paste((0, 0, 255), (0, 0, 40, 40))  # blue on the left, which orientation 6 turns to the top
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif, quality=100, subsampling=0)
    (tmp_path / ".hidden.png").write_bytes(b"not a picture")
    images, labels = bagssl.load_images("any", tmp_path, "pretrain", 32)
    assert images.shape == (7, 3, 32, 32) and labels is None
    names = ["a/b/c/d/wide.jpg", "alpha.png", "grey.png", "palette.gif.png", "print.jpg", "scan.png", "turned.jpg"]
    by_name = dict(zip(names, images))
    assert (by_name["alpha.png"] == 255).all()
    assert (by_name["grey.png"] == 90).all() and (by_name["scan.png"] == 180).all()
    assert by_name["turned.jpg"][2, 0].min() > 200 and by_name["turned.jpg"][0, -1].min() > 200
    with Image.open(tmp_path / names[0]) as photo:
        assert torch.equal(by_name[names[0]], TF.pil_to_tensor(TF.center_crop(TF.resize(photo, 32), 32)))


class FakeSet(list):
    """A torchvision set of grey images that is not there and cannot be downloaded, until `there`."""

    there, asked = False, []

    def __init__(self, root, download, **which):
        FakeSet.asked.append((str(root), download, which))
        if not download and not FakeSet.there:
            raise RuntimeError("Dataset not found or corrupted.")
        if download:
            raise OSError("<urlopen error [Errno -2] Name or service not known>")
        super().__init__((Image.new("L", (28, 28), grey), label) for grey, label in ((10, 4), (200, 7)))


@pytest.fixture
def fashion(monkeypatch, tmp_path):
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", FakeSet)
    monkeypatch.setattr(FakeSet, "asked", [])
    monkeypatch.chdir(tmp_path)


def test_torchvision_sets(tmp_path, fashion, monkeypatch, capsys):
    with pytest.raises(bagssl.UserError, match="no FashionMNIST in data/fashionmnist.* be downloaded .* --preset demo"):
        bagssl.load_images("fashionmnist", "", "test", 28)
    assert FakeSet.asked == [("data/fashionmnist", download, {"train": False}) for download in (False, True)]
    monkeypatch.setattr(FakeSet, "there", True)
    images, labels = bagssl.load_images("fashionmnist", tmp_path, "train", 28)
    assert images.shape == (2, 3, 28, 28) and (images[0] == 10).all() and (images[1] == 200).all()
    assert f"2 (train) from FashionMNIST, torchvision's files in {tmp_path}" in capsys.readouterr().out
    assert labels.tolist() == [4, 7]
    assert bagssl.load_images("fashionmnist", tmp_path, "train", 32)[0].shape == (2, 3, 32, 32)


def test_no_other_images_than_those_named(tmp_path, fashion, capsys):
    """A path that holds nothing we read is an error, and without one no stray photo is trained on."""
    (tmp_path / "heic").mkdir()
    (tmp_path / "heic/photo.heic").write_bytes(b"")
    for path in ("mistyped", "heic"):
        with pytest.raises(bagssl.UserError, match=f"no images in {path} .looked for FashionMNIST .*.jpg.*--data"):
            bagssl.load_images("fashionmnist", path, "pretrain", 28)
    assert not any(download for _, download, _ in FakeSet.asked) and not (tmp_path / "mistyped").exists()
    write_image(tmp_path / "data/holidays/photo.png")
    with pytest.raises(bagssl.UserError, match="could not be downloaded"):
        bagssl.load_images("fashionmnist", "", "pretrain", 28)
    write_image(tmp_path / "data/fashionmnist/train/shirt/1.png")
    assert len(bagssl.load_images("fashionmnist", "", "pretrain", 28)[0]) == 1
    assert "images:  1 (pretrain) from data/fashionmnist" in capsys.readouterr().out
    assert len(bagssl.load_images("fashionmnist", "data/holidays", "pretrain", 28)[0]) == 1
    assert len(bagssl.load_images("fashionmnist", "data", "pretrain", 28)[0]) == 1  # data/fashionmnist, not all of data


def test_cifar10_as_torchvision_keeps_it(tmp_path):
    import pickle
    rows = np.random.default_rng(0).integers(0, 256, (5, 3072), dtype=np.uint8)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        (folder / name).write_bytes(pickle.dumps({"data": rows, "labels": [3, 1, 4, 1, 5]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
        images, labels = bagssl.load_images("cifar10", tmp_path, "train", 32)
    assert images.shape == (25, 3, 32, 32) and torch.equal(images[:5].flatten(1), torch.from_numpy(rows))
    assert labels[:5].tolist() == [3, 1, 4, 1, 5]


def test_demo_world_is_what_it_says():
    images, labels, parts = bagssl.demo_images(20_000, 5, seed=3)  # cells of one pixel: the drawing is not needed
    world = bagssl.demo_probabilities()
    assert world.shape == (10, 24) and np.allclose(world.sum(1), 1)
    for label in range(10):
        drawn = np.bincount(parts[labels == label].ravel(), minlength=24) / (25 * (labels == label).sum())
        assert np.abs(drawn - world[label]).max() < 0.01
    guess = world.argmax(0)[parts[:, 2, 2]]  # the best guess from one part
    assert abs((guess == labels).mean() - world.max(0).sum() / 10) < 0.015
    evidence = np.log(world)[:, parts.reshape(len(parts), -1)].sum(-1).argmax(0)
    assert (evidence == labels).mean() > 0.98
    small, _, their_parts = bagssl.demo_images(4, 80, seed=3)
    again, _, _ = bagssl.demo_images(4, 80, seed=3)
    assert np.array_equal(small, again) and small.shape == (4, 3, 80, 80) and small.std() > 20


# --------------------------------------------------------------------------------------------------
# Runs


def test_seeds_are_apart():
    first = {tuple(torch.rand(2, generator=bagssl.generator_for(*key)).tolist())
             for key in itertools.product(range(4), ("order", "patches"), range(50))}
    assert len(first) == 400


def test_effective_rank():
    q = torch.linalg.qr(torch.randn(400, 6, dtype=torch.float64)).Q
    q = torch.linalg.qr(q - q.mean(0)).Q.float()
    assert abs(bagssl.effective_rank(q) - 6) < 0.01
    assert abs(bagssl.effective_rank(q[:, :1] @ torch.ones(1, 6)) - 1) < 0.01


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """A folder of small images, and a run of 45 steps on them."""
    folder = tmp_path_factory.mktemp("tiny")
    for i in range(24):
        write_image(folder / f"data/train/{'ab'[i % 2]}/{i}.png", seed=i)
        write_image(folder / f"data/test/{'ab'[i % 2]}/{i}.png", seed=100 + i)
    finished = command(*TINY, "--data", folder / "data", "--out", folder / "run", "--epochs", 15)
    assert finished.returncode == 0, finished.stderr
    return folder, finished.stdout


def tiny(run, tmp_path):
    """The arguments of the same run in another folder."""
    return [*TINY, "--data", run[0] / "data", "--out", tmp_path / "run", "--epochs", 15]


def losses(run, every=10, key="loss"):
    """The loss at each look, or another number; each must be in the log once."""
    _, *entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [entry["step"] for entry in entries]
    assert steps == [*range(every, steps[-1], every), steps[-1]]
    return [entry[key] for entry in entries]


def same_weights(*runs):
    first, *others = (torch.load(run / "backbone.pt", weights_only=True) for run in runs)
    return all(torch.equal(first[name], other[name]) for other in others for name in first)


def test_a_run_leaves_what_it_says(tiny_run):
    folder, printed = tiny_run
    assert len(losses(folder / "run")) == 5
    log = [json.loads(line) for line in (folder / "run/log.jsonl").read_text().splitlines()]
    first, *log = log
    weights = first["config"]
    assert weights["epochs"] == 15 and weights["patch_scale"] == [0.0625]
    for entry in log:
        terms = sum(weights[f"{name}_weight"] * entry[name] for name in ("inv", "var", "cov"))
        assert math.isclose(entry["loss"], terms, rel_tol=1e-4)
        assert entry["gradient_norm"] > 0 and 0 <= entry["clipped"] <= 1
    assert {"lr", "patches_per_s", "effective_rank"} <= log[-1].keys()
    assert log[0]["lr"] > log[-1]["lr"] < 1e-6
    for words in (f"images:  24 (pretrain) from {folder}/data", "2 patches of 10 x 10 each", "45/45", "eval_linear.py"):
        assert words in printed
    encoder, config = bagssl.load_encoder(folder / "run/checkpoint.pt")
    assert config.epochs == 15 and not encoder.training
    net = bagssl.PatchNet().eval()
    net.load_state_dict(torch.load(folder / "run/backbone.pt", weights_only=True))
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(net(x), encoder(x)[0], rtol=1e-4, atol=1e-5)
    images, _ = bagssl.load_images("any", folder / "data", "pretrain", 40)
    found, expected = net.whiten.weight.flatten(1), bagssl.whitening_filters(images).flatten(1)
    torch.testing.assert_close((found @ expected.T).abs().amax(1), expected.square().sum(1), rtol=1e-2, atol=1e-2)


def test_the_online_probe_learns_from_the_mean_embedding():
    torch.manual_seed(0)
    probe, labels = bagssl.OnlineProbe(16, 4), torch.arange(200) % 4
    h = torch.randn(200, 3, 16) + 2 * torch.randn(4, 16)[labels][:, None]
    mean = h.double().mean(1)
    linear = probe.layers[1]
    scores = ((mean - mean.mean(0)) / mean.std(0, correction=0)) @ linear.weight.double().T + linear.bias
    assert probe(h.requires_grad_(), labels).item() == pytest.approx(
        100 * (scores.argmax(1) == labels).double().mean().item())
    for _ in range(200):
        accuracy = probe(h, labels)
    assert accuracy > 95 and h.grad is None


def test_the_online_probe_shows_in_the_log_and_changes_no_weight(tiny_run, tmp_path, in_process, monkeypatch, capsys):
    folder, printed = tiny_run
    assert re.search(r"probe \d+\.\d %", printed)
    assert all(0 <= x <= 100 for x in losses(folder / "run", key="probe_top1"))
    usual = bagssl.training_images
    monkeypatch.setattr(bagssl, "training_images", lambda *arguments: (usual(*arguments)[0], None))
    assert in_process(*tiny(tiny_run, tmp_path)) is None
    assert "probe " not in capsys.readouterr().out.replace("probe it", "")
    assert "probe_top1" not in (tmp_path / "run/log.jsonl").read_text()
    assert same_weights(tmp_path / "run", folder / "run")


def test_a_resnets_backbone_is_torchvisions(tiny_run, tmp_path, in_process):
    arguments = [*tiny(tiny_run, tmp_path), "--arch", "resnet18", "--stem-stride", 2, "--epochs", 1]
    assert in_process(*arguments) is None
    encoder, _ = bagssl.load_encoder(tmp_path / "run/checkpoint.pt")
    model = torchvision.models.resnet18()
    model.conv1, model.maxpool, model.fc = encoder.backbone.conv1, torch.nn.Identity(), torch.nn.Identity()
    model.load_state_dict(torch.load(tmp_path / "run/backbone.pt", weights_only=True))
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(model.eval()(x), encoder(x)[0], rtol=1e-4, atol=1e-5)


def test_the_learning_rate_warms_up_and_falls_as_a_cosine(tiny_run, tmp_path, in_process, monkeypatch):
    monkeypatch.setattr(bagssl, "LOOK_EVERY", 1)
    in_process(*tiny(tiny_run, tmp_path), "--epochs", 10, "--lr", 1e-3, "--warmup", 0.3)
    rates = [json.loads(line)["lr"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()[1:]]
    assert rates == pytest.approx([1e-3 * min(1, (i + 1) / 10) * math.cos(math.pi * i / 60) ** 2 for i in range(30)])


def test_a_finished_run_is_left_alone_and_another_config_refused(tiny_run, refused, in_process, capsys):
    folder, _ = tiny_run
    before = {path.name: path.read_bytes() for path in (folder / "run").iterdir()}
    assert in_process(*TINY, "--data", folder / "data", "--out", folder / "run", "--epochs", 15) is None
    assert "complete (give another --out" in capsys.readouterr().out
    sentence = refused(*TINY, "--data", folder / "data", "--out", folder / "run", "--epochs", 15, "--lr", 0.5)
    assert "another config" in sentence and "lr was 0.0001, is 0.5" in sentence
    assert before == {path.name: path.read_bytes() for path in (folder / "run").iterdir()}


# Runs the command line in a child, again and again, and kills it after a random time that includes the
# writing of checkpoints. The parent only forks, so that a start costs no import.
KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import bagssl
bagssl.LOOK_EVERY = 1
out, kills = Path(sys.argv[sys.argv.index("--out") + 1]), 0
random.seed(0)
def written():
    return (out / "checkpoint.pt").stat().st_ino if (out / "checkpoint.pt").exists() else None
while True:
    if kills == 10:
        sys.argv[-1] = "5"  # minutes between checkpoints, for the rest
    if not (child := os.fork()):
        os._exit(bagssl.run_cli(bagssl.main) or 0)
    before = written()
    while kills < 10 and written() in (None, before):  # until it has gone on from where it was
        time.sleep(0.01)
    if kills < 10:
        time.sleep(random.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        kills += 1
    if not os.WIFSIGNALED(status := os.waitpid(child, 0)[1]):
        print("killed", kills)
        sys.exit(os.waitstatus_to_exitcode(status))
"""

def test_killed_at_random_moments_a_run_ends_as_if_it_had_not_been(tiny_run, tmp_path, in_process):
    folder, _ = tiny_run
    killed = command("-c", KILLER, *TINY, "--data", folder / "data", "--epochs", 15, "--out", tmp_path / "run",
                     "--save-every", 0, script="")
    assert killed.returncode == 0 and "killed 10" in killed.stdout, (killed.stdout[-99:], killed.stderr)
    assert same_weights(tmp_path / "run", folder / "run")
    means = [np.mean(losses(tmp_path / "run", every=1)[i:i + 10]) for i in range(0, 45, 10)]
    assert means == pytest.approx(losses(folder / "run"), rel=1e-6)
    (tmp_path / "run/backbone.pt").unlink()  # as after a kill between the last checkpoint and it
    assert in_process(*TINY, "--data", folder / "data", "--epochs", 15, "--out", tmp_path / "run") is None
    assert same_weights(tmp_path / "run", folder / "run")
    assert not list((tmp_path / "run").glob(".*"))  # what half-written checkpoints left has been cleared away


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_with_a_checkpoint(tiny_run, tmp_path, number, code, monkeypatch, in_process, capsys):
    folder, _ = tiny_run
    arguments = tiny(tiny_run, tmp_path)
    views, usual, calls = bagssl.training_views, signal.getsignal(number), []

    def interrupted(*its_arguments):
        calls.append(1)
        if len(calls) in (12, 13):  # torchrun repeats what the terminal has sent
            os.kill(os.getpid(), number)
        return views(*its_arguments)

    monkeypatch.setattr(bagssl, "training_views", interrupted)
    assert in_process(*arguments) == code
    stopped_at = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["step"]
    assert stopped_at == 20 and len(losses(tmp_path / "run")) == 2
    assert signal.getsignal(number) == usual and not (tmp_path / "run/backbone.pt").exists()
    assert in_process(*arguments) is None and "at step 20 of 45" in capsys.readouterr().out
    for key in ("loss", "probe_top1"):
        assert losses(tmp_path / "run", key=key) == losses(folder / "run", key=key)
    assert same_weights(tmp_path / "run", folder / "run")


# The command line with changes, for torchrun to start.
def script(path, changes):
    path.write_text(f"import os, signal, sys, time\nsys.path.insert(0, {str(HERE)!r})\nimport torch, bagssl\n"
                    f"{changes}\nbagssl.run_cli(bagssl.main)\n")
    return path


@pytest.mark.parametrize("terminal", [True, False])
def test_a_signal_under_torchrun_waits_for_a_slow_checkpoint(tiny_run, tmp_path, terminal):
    """Ctrl-C reaches all processes at once and torchrun passes it on; a cluster's SIGTERM reaches torchrun alone."""
    slow = script(tmp_path / "slow.py", "save = torch.save\n"
                  "def slow(*arguments):\n    time.sleep(1)\n    save(*arguments)\ntorch.save = slow")
    arguments = [*tiny(tiny_run, tmp_path), "--epochs", 2000]
    job = subprocess.Popen([sys.executable, *torchrun(2), slow, *map(str, arguments)], start_new_session=True, cwd=HERE,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
    log = tmp_path / "run/log.jsonl"
    while job.poll() is None and not (log.exists() and log.read_text().count("\n") > 1):
        time.sleep(0.1)
    os.killpg(job.pid, signal.SIGINT) if terminal else os.kill(job.pid, signal.SIGTERM)
    printed = job.communicate(timeout=100)[0]
    assert job.returncode != 0 and "and saved; the same command continues" in printed, printed
    looks = len(losses(tmp_path / "run"))
    assert torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["step"] == 10 * looks
    assert not list((tmp_path / "run").glob(".*"))


@pytest.mark.parametrize("what", ["patch", "weight", "gradient"])
def test_bad_numbers_stop_a_run_and_leave_its_checkpoint(tiny_run, tmp_path, what, monkeypatch, capsys, in_process):
    views, project, steps = bagssl.training_views, bagssl.Encoder.forward, []

    def bad_patch(*arguments):
        steps.append(1)
        x = views(*arguments)
        if what == "patch" and len(steps) == 33:
            x[0, 0, 0, 0] = math.nan
        return x

    def bad_weight(encoder, x):
        if what == "weight" and len(steps) == 33:
            with torch.no_grad():
                encoder.backbone.layers[0].weight[0, 0, 0, 0] = math.inf
        h, z = project(encoder, x)
        if what == "gradient" and len(steps) == 33:
            z.register_hook(lambda gradient: gradient * math.nan)
        return h, z

    monkeypatch.setattr(bagssl, "training_views", bad_patch)
    monkeypatch.setattr(bagssl.Encoder, "forward", bad_weight)
    code = in_process(*tiny(tiny_run, tmp_path), "--save-every", 0)
    told = capsys.readouterr().err
    assert code == 1 and "the loss or its gradient is not finite in steps 31 to 40" in told
    assert "--lr" in told and told.count("\n") == 1
    saved = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert saved["step"] == 30 and all(value.isfinite().all() for value in saved["encoder"].values())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")])
def test_too_little_memory_is_a_sentence(tiny_run, tmp_path, monkeypatch, refused, error):
    def too_large(*_):
        raise error

    monkeypatch.setattr(bagssl, "training_views", too_large)
    told = refused(*tiny(tiny_run, tmp_path))
    assert "out of memory" in told and "--batch-size" in told and "--num-patches" in told


def test_collapse_is_warned_of_once(tiny_run, tmp_path, monkeypatch, capsys, in_process):
    monkeypatch.setattr(bagssl, "LOOK_EVERY", 1)
    clock = itertools.count(0, 11.0)  # so that every look is shown
    monkeypatch.setattr(bagssl, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    project = bagssl.Encoder.forward
    monkeypatch.setattr(bagssl.Encoder, "forward", lambda encoder, x: (torch.ones(len(x), 1024), project(encoder, x)[1]))
    assert in_process(*tiny(tiny_run, tmp_path), "--epochs", 4) is None
    told = capsys.readouterr().err
    assert told.count("warning") == 1 and "at step 2" in told and "--lr" in told


def test_a_full_disk_is_told_and_what_was_saved_stays(tiny_run, tmp_path, monkeypatch, refused):
    save, saves = torch.save, []

    def until_full(content, file):
        saves.append(1)
        if len(saves) == 3:
            file.write(b"half a checkpoint")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(content, file)

    monkeypatch.setattr(torch, "save", until_full)
    arguments = [*tiny(tiny_run, tmp_path), "--save-every", 0]
    told = refused(*arguments)
    assert "No space left" in told and "cannot write" in told
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoint.pt", "log.jsonl"}
    assert bagssl.load_checkpoint(tmp_path / "run/checkpoint.pt")["step"] == 20
    (tmp_path / "file").write_text("")
    assert "cannot write" in refused(*arguments, "--out", tmp_path / "file/run")


# In bfloat16, rounding hides whether processes agree. The backend compiles without a C++ compiler. Only the first
# process may look for images.
FLOAT32 = """bagssl.has_bf16 = lambda device: False
if bagssl.RANK > 0:
    bagssl.find_images = None
compiler = torch.compile
torch.compile = lambda part: compiler(part, backend="aot_eager")"""


def test_processes_train_as_one_compiled_or_not(tmp_path, monkeypatch, in_process):
    """1 and 4 processes, and 2 compiled: 21 steps of 32 images, losses equal to 1e-5 and weights to 1e-4."""
    for i in range(96):
        write_image(tmp_path / f"data/train/{'ab'[i % 2]}/{i}.png", seed=i)
    arguments = [*TINY, "--data", tmp_path / "data", "--epochs", 7, "--batch-size", 32, "--num-patches", 4,
                 "--lr", 3e-4]
    with monkeypatch.context() as patch:
        patch.setattr(bagssl, "has_bf16", lambda device: False)
        assert in_process(*arguments, "--out", tmp_path / "1") is None
    for name, more in (("4", []), ("2 compiled", ["--compile", "yes"])):
        finished = command(*arguments, *more, "--out", tmp_path / name, launcher=torchrun(name[0]),
                           script=script(tmp_path / "float32.py", FLOAT32))
        assert finished.returncode == 0, finished.stderr
    one = torch.load(tmp_path / "1/checkpoint.pt", weights_only=True)["encoder"]
    for name in ("4", "2 compiled"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "1"), rel=1e-5)
        assert losses(tmp_path / name, key="probe_top1") == pytest.approx(
            losses(tmp_path / "1", key="probe_top1"), abs=1)  # rounding may turn a guess
        many = torch.load(tmp_path / f"{name}/checkpoint.pt", weights_only=True)["encoder"]
        for key in one:
            if "num_batches" not in key:
                torch.testing.assert_close(one[key].float(), many[key].float(), rtol=1e-4, atol=1e-4)


# One of two processes kills itself in step 13, the first time round.
SUICIDE = """views, calls = bagssl.training_views, []
def training_views(*arguments):
    calls.append(1)
    if len(calls) == 13 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return views(*arguments)
bagssl.training_views = training_views"""


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_killed_process_ends_the_job_or_is_restarted(tiny_run, tmp_path, restarts):
    finished = command(*tiny(tiny_run, tmp_path), "--save-every", 0,
                       launcher=torchrun(2, "--standalone", f"--max-restarts={restarts}"),
                       script=script(tmp_path / "suicide.py", SUICIDE))
    if restarts:
        assert finished.returncode == 0 and "at step 10 of 45" in finished.stdout, finished.stderr
        assert losses(tmp_path / "run") == pytest.approx(losses(tiny_run[0] / "run"), rel=1e-2)
    else:
        assert finished.returncode != 0 and bagssl.load_checkpoint(tmp_path / "run/checkpoint.pt")["step"] == 10


def test_two_nodes_of_two_processes(tiny_run, tmp_path):
    """Two launchers on one machine, the second late."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launcher = torchrun(2, "--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}")
    arguments = tiny(tiny_run, tmp_path)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(command, *arguments, launcher=launcher)
        time.sleep(1)
        second = pool.submit(command, *arguments, launcher=launcher)
        nodes = first.result(), second.result()
    assert [node.returncode for node in nodes] == [0, 0], [node.stderr for node in nodes]
    assert sorted("eval_linear.py" in node.stdout for node in nodes) == [False, True]  # rank 0 alone prints
    assert losses(tmp_path / "run") == pytest.approx(losses(tiny_run[0] / "run"), rel=1e-2)


def test_another_number_of_processes_takes_over(tiny_run, tmp_path, monkeypatch, in_process):
    """A run stopped on one process goes on with two, of which the second does not see its folder."""
    views, calls = bagssl.training_views, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return views(*arguments)

    monkeypatch.setattr(bagssl, "training_views", interrupted)
    arguments = tiny(tiny_run, tmp_path)
    assert in_process(*arguments) == 143
    apart = "if os.environ['RANK'] == '1':\n    sys.argv[sys.argv.index('--out') + 1] += '-2'"
    finished = command(*arguments, launcher=torchrun(2), script=script(tmp_path / "apart.py", apart))
    assert finished.returncode == 0 and "at step 20 of 45" in finished.stdout, finished.stderr
    assert losses(tmp_path / "run") == pytest.approx(losses(tiny_run[0] / "run"), rel=1e-2)
    assert not (tmp_path / "run-2").exists()


WORKER = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
import bagssl
dist.init_process_group("gloo")
rank, torch_seed = dist.get_rank(), torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(5, 7), bagssl.BatchNorm(7), torch.nn.ReLU(), torch.nn.Linear(7, 12))
model = model.double()
x = torch.randn(8, 3, 5, dtype=torch.float64)
parallel = torch.nn.parallel.DistributedDataParallel(model)
z = parallel(x.chunk(2)[rank].flatten(0, 1)).unflatten(0, (4, 3))
loss, _ = bagssl.vicreg_loss(bagssl.gather(z), rank=rank, world_size=2)
loss.backward()
loss = loss.detach()
dist.all_reduce(loss)
maps = torch.randn(6, 5, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
own = maps.chunk(2)[rank].requires_grad_()
bagssl.BatchNorm(5).double()(own).pow(3).sum().backward()
norm = bagssl.BatchNorm(5)
half = norm(x.bfloat16().chunk(2)[rank].flatten(0, 1))  # as under autocast, on a CPU that has bfloat16
encoder = bagssl.Encoder("patchnet", 1, (8, 8, 8)).double()
graph = torch.compile(encoder, backend="aot_eager", fullgraph=True)
patches = torch.randn(4, 3, 10, 10, dtype=torch.float64)
weights = [p for p in encoder.parameters() if p.requires_grad]
for network in (encoder, graph):
    h, z = network(patches)
    results = h, z, *torch.autograd.grad((z * h[:, :8]).sum(), weights)
    expected = results if network is encoder else expected
torch.testing.assert_close(results, expected)
torch.save({"loss": loss / 2, "grads": [p.grad for p in model.parameters()], "state": model.state_dict(),
            "own": own.grad, "half": half.detach(), "half state": norm.state_dict()}, f"{sys.argv[2]}/{rank}.pt")
dist.destroy_process_group()
"""


def test_two_processes_have_the_gradients_of_one_and_compile_to_one_graph(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    worker = command(HERE, tmp_path, launcher=torchrun(2), script=tmp_path / "worker.py")
    assert worker.returncode == 0, worker.stderr
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7), torch.nn.ReLU(), torch.nn.Linear(7, 12))
    x, model = torch.randn(8, 3, 5, dtype=torch.float64), model.double()
    loss = pairwise_vicreg(model(x.flatten(0, 1)).unflatten(0, (8, 3)), 25.0, 25.0, 1.0)
    loss.backward()
    maps = torch.randn(6, 5, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    torch.nn.BatchNorm2d(5).double()(maps).pow(3).sum().backward()
    norm = torch.nn.BatchNorm1d(5)
    normed = norm(x.bfloat16().float().flatten(0, 1)).detach()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found["half"], normed.chunk(2)[rank].bfloat16(), rtol=0.01, atol=0.01)
        for name in ("running_mean", "running_var"):
            for key, reference, tolerance in (("half state", norm, 1e-5), ("state", model[1], 1e-9)):
                found_value = found[key][f"1.{name}" if key == "state" else name]
                torch.testing.assert_close(found_value, getattr(reference, name), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(found["loss"], loss.detach(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found["own"], maps.grad.chunk(2)[rank], rtol=1e-8, atol=1e-10)
        for gradient, parameter in zip(found["grads"], model.parameters()):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-8, atol=1e-10)


# --------------------------------------------------------------------------------------------------
# Probe


def test_linear_probe_finds_the_classes_and_uses_no_test_labels():
    generator = torch.Generator().manual_seed(0)
    centres, labels = torch.randn(12, 20, generator=generator), torch.arange(12).repeat(40)
    train = centres[labels] + 0.3 * torch.randn(480, 20, generator=generator)
    test = centres[labels] + 0.3 * torch.randn(480, 20, generator=generator)
    found = eval_linear.linear_probe(train * 50 + 7, labels, test * 50 + 7, labels)
    assert found["top1"] > 97 and found["top5"] >= found["top1"]
    assert eval_linear.knn_probe(train, labels, test, labels) > 97
    shuffled = labels[torch.randperm(480, generator=generator)]
    chance = eval_linear.linear_probe(train, labels, test, shuffled)
    assert chance["top1"] < 20 and chance["decay"] == found["decay"]


def test_linear_fits_are_the_optima():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 5, generator=generator, dtype=torch.float64), torch.arange(200) % 3
    decays = [0.5, 0.02, 0.001]
    weights = eval_linear.fit_linear(x.float(), y, 3, decays, iterations=200, block=64).double().requires_grad_()
    for weight, decay in zip(weights, decays):
        loss = torch.nn.functional.cross_entropy(x @ weight[:-1] + weight[-1], y)
        loss = loss + decay / 2 * weight[:-1].square().sum()
        gradient, = torch.autograd.grad(loss, weights)
        assert gradient.abs().max() < 1e-4


def test_whitened_features_are_uncorrelated_with_equal_variances():
    x = uniform(500, 6) @ uniform(6, 6, seed=1) + 3
    white, test = eval_linear.whiten(x, 2 * x[:9], epsilon=0)
    torch.testing.assert_close(torch.cov(white.T), torch.eye(6), rtol=0, atol=1e-3)
    covariance = torch.cov(x.double().T)
    for one, (i, j) in zip(test[:8], itertools.pairwise(range(9))):  # distances are Mahalanobis's
        apart = 2 * (x[i] - x[j]).double()
        expected = (apart @ torch.linalg.inv(covariance) @ apart).sqrt().item()
        assert (one - test[j]).norm().item() == pytest.approx(expected, rel=1e-3)
    noisy = torch.cat([x, 1e-4 * uniform(500, 1, seed=2)], 1)
    assert eval_linear.whiten(noisy, noisy)[0].std(0).min() < 0.01  # what hardly varies stays small
    assert eval_linear.whiten(x, x)[1].mean(0).abs().max() < 1e-4


def test_knn_votes_as_a_loop_does():
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(60, 4, generator=generator), torch.randn(50, 4, generator=generator)
    labels, truth = torch.arange(60) % 3, torch.arange(50) % 3
    right = 0
    for x, label in zip(test, truth):
        cosine = torch.nn.functional.cosine_similarity(train, x[None])
        votes = torch.zeros(3)
        for i in cosine.argsort(descending=True)[:20]:
            votes[labels[i]] += math.exp(cosine[i] / 0.07)
        right += (votes.argmax() == label).item()
    assert eval_linear.knn_probe(train, labels, test, truth) == pytest.approx(100 * right / 50)


@pytest.mark.parametrize("launcher", [(), torchrun(2)])
def test_probe_prints_a_table_and_writes_it(tiny_run, tmp_path, launcher, in_process, capsys):
    checkpoint = tmp_path / "checkpoint.pt"
    checkpoint.write_bytes((tiny_run[0] / "run/checkpoint.pt").read_bytes())
    (tmp_path / "eval.jsonl").write_text("an earlier table\n")
    arguments = "--checkpoint", checkpoint, "--patches", 1, 4
    if launcher:
        finished = command(*arguments, script="eval_linear.py", launcher=launcher)
        assert finished.returncode == 0, finished.stderr
    else:
        assert in_process(*arguments, script=eval_linear) is None
    printed = finished.stdout if launcher else capsys.readouterr().out
    earlier, table = (tmp_path / "eval.jsonl").read_text().splitlines()
    assert earlier == "an earlier table"
    results = json.loads(table)["results"]
    rows = [row["features"] for row in results]
    assert rows == ["one patch, the centre", "bag of 4", "whole image, one pass", "untrained, bag of 4", "raw pixels"]
    for row in results:
        assert 0 <= row["top1"] <= 100 and f"{row['features']:24}  top1 {row['top1']:5.2f} %  knn" in printed


def test_embed_is_the_bag_of_each_image(tiny_run, monkeypatch):
    monkeypatch.setattr(bagssl, "has_bf16", lambda device: False)  # blocks of other sizes round otherwise
    encoder, _ = bagssl.load_encoder(tiny_run[0] / "run/checkpoint.pt")
    images = torch.randint(0, 256, (11, 3, 40, 40), dtype=torch.uint8)
    bag = bagssl.BagOfPatches(encoder.backbone, 2, 0.0625)
    whole = eval_linear.embed(bag, images, torch.device("cpu"), block=4)
    with torch.no_grad():
        torch.testing.assert_close(whole, torch.cat([bag(image[None]) for image in images]), atol=1e-4, rtol=1e-3)


def test_the_untrained_control_has_the_whitening_and_nothing_else(tiny_run):
    arguments = dict.fromkeys(("arch", "data", "cache", "image_size", "patch_size", "patch_scale"))
    arguments = types.SimpleNamespace(checkpoint=tiny_run[0] / "run/checkpoint.pt", **arguments)
    trained, untrained = (network.backbone for network in eval_linear.load_model(arguments)[:2])
    same = [name for name, value in trained.named_parameters() if torch.equal(value, untrained.get_parameter(name))]
    assert same == ["whiten.weight"]


def test_published_checkpoints_are_found_in_any_wrapping(tmp_path, refused, capsys):
    torch.manual_seed(0)
    model = torchvision.models.resnet50()
    state = model.state_dict()
    sequence = torch.nn.Sequential(*list(model.children())[:-1])  # lightly: 0.weight, 4.0.conv1.weight
    inside = {f"module.backbone.{key}": value for key, value in state.items()}
    wrapped = {"plain": state, "lightning": {"state_dict": inside},
               "vicreg": {"epoch": 3, "model": inside | {"module.projector.0.weight": state["fc.weight"]}},
               "lightly": {"state_dict": {f"backbone.{key}": value for key, value in sequence.state_dict().items()},
                           "args": eval_linear.argparse.Namespace(lr=0.1)},
               "dino": {"student": inside, "teacher": {key: value * 2 for key, value in inside.items()}},
               "byol": {"online_network_state_dict": sequence.state_dict()}}
    model.fc = torch.nn.Identity()
    x = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(1)).to(memory_format=torch.channels_last)
    expected = model.eval().to(memory_format=torch.channels_last)(x)
    for name, content in wrapped.items():
        torch.save(content, tmp_path / f"{name}.pth")
        backbone, stem_stride = eval_linear.load_published(tmp_path / f"{name}.pth", "resnet50")
        assert stem_stride == 4 and torch.equal(backbone(x), expected), name
    assert "holds 2 networks; the one from student.module.backbone.conv1.weight on is taken" in capsys.readouterr().out
    small = bagssl.make_backbone("resnet18", 1).state_dict()
    torch.save({"state_dict": small}, tmp_path / "small.pth")
    assert eval_linear.load_published(tmp_path / "small.pth", "resnet18")[1] == 1
    for content, arch in ((small, "resnet34"), (dict(list(small.items())[:-3]), "resnet18")):
        torch.save(content, tmp_path / "odd.pth")
        with pytest.raises(bagssl.UserError, match=f"holds no {arch}"):
            eval_linear.load_published(tmp_path / "odd.pth", arch)
    assert "give --data, --image-size, --patch-scale" in refused("--checkpoint", tmp_path / "small.pth", "--arch",
                                                                 "resnet18", script=eval_linear)


def test_a_published_checkpoint_is_probed(tiny_run, tmp_path, in_process, capsys):
    torch.save(bagssl.make_backbone("resnet18", 1).state_dict(), tmp_path / "resnet18.pth")
    assert in_process("--checkpoint", tmp_path / "resnet18.pth", "--arch", "resnet18", "--data", tiny_run[0] / "data",
                      "--image-size", 40, "--patch-scale", 0.1, "--patch-size", 20, "--patches", 1, 4,
                      script=eval_linear) is None
    assert "bag of 4" in capsys.readouterr().out


def test_the_demo_learns(tmp_path):
    """A third of the demo: its bag beats the same network untrained, and one patch, by more than chance moves them."""
    fewer = "import bagssl, eval_linear; bagssl.DEMO_COUNTS.update(pretrain=6_400, test=500); bagssl.run_cli({}.main)"
    for name, arguments in (("bagssl", ["--preset", "demo", "--out", tmp_path, "--device", "cpu"]),
                            ("eval_linear", ["--checkpoint", tmp_path / "checkpoint.pt", "--patches", "1", "16"])):
        finished = command("-c", fewer.format(name), *arguments, script="", timeout=1200, OMP_NUM_THREADS="2")
        assert finished.returncode == 0, finished.stderr
    top1 = {row["features"]: row["top1"] for row in json.loads((tmp_path / "eval.jsonl").read_text())["results"]}
    assert top1["bag of 16"] > top1["untrained, bag of 16"] + 5, finished.stdout
    assert top1["bag of 16"] > top1["one patch, the centre"] + 25, finished.stdout


# --------------------------------------------------------------------------------------------------
# Evidence: .github/claims.py and .github/benchmark.py


def test_cosine_to_parts_agrees_with_a_loop():
    generator = torch.Generator().manual_seed(0)
    whole, bag = torch.randn(40, 6, generator=generator) + 3, torch.randn(40, 6, generator=generator) - 1
    labels = torch.arange(40) % 4
    labels[7] = 5  # alone in its class; class 4 has no image
    found = claims.cosine_to_parts(whole, bag, labels)
    centred = [x.double() - x.double().mean(0) for x in (whole, bag)]
    cosine = torch.tensor([[float(torch.dot(a, b) / a.norm() / b.norm()) for b in centred[1]] for a in centred[0]])
    assert found["same image"] == pytest.approx(cosine.diag().mean().item(), abs=1e-5)
    # Over many draws, each control is the mean over all its pairs.
    same = (labels == labels[:, None]) & ~torch.eye(40, dtype=torch.bool)
    draws = [claims.cosine_to_parts(whole, bag, labels, seed) for seed in range(400)]
    for control, pairs in {"same class": same, "other class": labels != labels[:, None]}.items():
        mean = (cosine * pairs).sum(1)[pairs.any(1)] / pairs.sum(1)[pairs.any(1)]
        assert np.mean([draw[control] for draw in draws]) == pytest.approx(mean.mean().item(), abs=0.01)


def test_cosine_to_parts_pairs_no_image_with_itself():
    lonely = torch.tensor([0] * 30 + [1] * 5 + [3])  # the last image is alone in its class
    apart = torch.eye(36)  # centred, an image has cosine 1 with itself and -1/35 with any other
    halves = torch.arange(36) % 2
    opposite = torch.eye(2)[halves]  # centred, the cosine is 1 within the class, -1 across
    for seed in range(20):
        found = claims.cosine_to_parts(apart, apart, lonely, seed)
        assert list(found.values()) == pytest.approx([1, -1 / 35, -1 / 35], abs=1e-5)
        found = claims.cosine_to_parts(opposite, opposite, halves, seed)
        assert list(found.values()) == pytest.approx([1, 1, -1], abs=1e-5)
    for labels, classes in ((36 * [0], 1), (range(36), 36)):  # no other class; no other image of the class
        with pytest.raises(bagssl.UserError, match=rf"36 images are of {classes} class"):
            claims.cosine_to_parts(apart, apart, torch.tensor(labels))


def test_ridge_r2():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 8, generator=generator)
    signal, noise = x @ torch.randn(8, generator=generator), torch.randn(2000, generator=generator)
    targets = torch.stack([signal, signal + signal.std() * noise, noise], 1) + 5
    r2 = claims.ridge_r2(x[:1000], targets[:1000], x[1000:], targets[1000:])
    assert r2.tolist() == pytest.approx([1, 0.5, 0], abs=0.05)


class Knows(torch.nn.Module):
    """An encoder whose h is the patch, and whose z only knows how bright it is."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x.flatten(1), x.mean((1, 2, 3))[:, None] + torch.zeros(len(x), 5)


def test_locality_tells_what_an_encoder_knows(tmp_path):
    ramp = torch.stack(torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")) * 4
    images = torch.cat([ramp, torch.full((1, 32, 32), 90)]).expand(600, -1, -1, -1).to(torch.uint8).contiguous()
    found = claims.locality(Knows(), images, torch.arange(600) // 300, 0.0625, None)
    assert found["patch, h"]["top"] > 0.8 and found["patch, h"]["left"] > 0.8 and found["patch, h"]["brightness"] > 0.8
    assert min(found["bag of 16, h"][factor] for factor in ("brightness", "hue", "saturation")) > 0.8
    assert found["patch, z"]["hue"] < 0.2 and 0.35 < found["patch, z"]["class"] < 0.65  # the classes differ in nothing
    assert "top" not in found["bag of 16, h"] and found["bag of 16, z"]["brightness"] > 0.9
    claims.draw_neighbours(tmp_path / "n.png", Knows(), images[:20], 0.0625, None, queries=3, count=4)
    picture = torchvision.io.read_image(str(tmp_path / "n.png"))
    assert picture.shape == (3, 8 * (3 * (8 + 2 + 1) + 1), 8 * (10 * (8 + 2 + 1) + 1))
    red = (picture[:, ::8, ::8] == torch.tensor([230, 0, 0])[:, None, None]).all(0)
    assert red.sum() == 3 * 2 * (4 * 8 + 4)  # a frame round each of 3 queries, in h and in z


def test_locality_changes_a_bag_alike_by_the_known_factors(monkeypatch):
    """Each patch is what its uniform numbers say, changed by torchvision, and the regression's targets are these."""
    seen, targets = [], []
    embed = claims.embed_patches
    monkeypatch.setattr(claims, "embed_patches",
                        lambda encoder, patches: seen.append(patches) or embed(encoder, patches))
    monkeypatch.setattr(claims, "ridge_r2", lambda _, fitted, __, tested: (
        targets.append(torch.cat([fitted, tested])), torch.zeros(fitted.shape[1]))[1])
    images = torch.randint(0, 256, (300, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    claims.locality(Knows(), images, torch.arange(300) % 2, 0.25, None, seed=3)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(3))
    single, grid = seen[0], seen[2].unflatten(0, (256, 16))  # in blocks of 256 images
    for i in range(0, 256, 25):
        top, left, brightness, hue, saturation = targets[0][i].tolist()
        image = images[order[i]] / 255
        top, left = int(top * 11), int(left * 11)
        for patch, cut in ((single[i], image[:, top:top + 10, left:left + 10]), (grid[i, 6], image[:, 3:13, 7:17])):
            cut = TF.adjust_brightness(cut, 1 + 0.4 * (2 * brightness - 1))
            cut = TF.adjust_saturation(cut, 1 + 0.2 * (2 * saturation - 1))
            torch.testing.assert_close(patch, TF.adjust_hue(cut, 0.1 * (2 * hue - 1)), atol=1e-5, rtol=0)
        assert targets[2][i].tolist() == [brightness, hue, saturation]


def test_part_similarity_of_one_who_knows_is_one(monkeypatch):
    world = bagssl.demo_probabilities()
    joint, p = world.T @ world / 10, world.mean(0)
    centre = np.eye(24) - 1 / 24
    values, vectors = np.linalg.eigh(centre @ np.log(joint / np.outer(p, p)) @ centre)
    images, _, parts = bagssl.demo_images(400, 20, (0, 3))
    factor = torch.from_numpy(vectors * np.sqrt(values.clip(0)))

    def embed(encoder, patches):
        assert torch.equal(patches[7 * 25 + 13], torch.from_numpy(images[7, :, 8:12, 12:16]))  # row 2, column 3
        return [None, factor[torch.from_numpy(parts).flatten()] + 5]  # not centred

    monkeypatch.setattr(claims, "embed_patches", embed)
    expected = np.corrcoef((vectors * values.clip(0) @ vectors.T)[np.triu_indices(24, 1)],
                           np.log(joint / np.outer(p, p))[np.triu_indices(24, 1)])[0, 1]
    assert claims.part_similarity(None, 20) == pytest.approx(expected, abs=1e-6) and expected > 0.8


@pytest.mark.parametrize("claim", ["parts", "locality", "cooccurrence"])
def test_claims_are_printed_and_added_to_the_run(tiny_run, tmp_path, claim, in_process, capsys):
    checkpoint = torch.load(tiny_run[0] / "run/checkpoint.pt", weights_only=True)
    if claim == "cooccurrence":
        checkpoint["config"] |= {"data": "", "image_size": 50}  # as if trained on the demo
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    (tmp_path / "eval.jsonl").write_text("an earlier table\n")
    assert in_process(claim, "--checkpoint", tmp_path / "checkpoint.pt", script=claims) is None
    printed = capsys.readouterr().out
    earlier, table = (tmp_path / "eval.jsonl").read_text().splitlines()
    table = json.loads(table)
    results = table["results"]
    assert earlier == "an earlier table" and table["show"] == claim
    if claim == "parts":
        bags = ["one patch, the centre", "bag of 4", "bag of 16"]
        assert [row["features"] for row in results] == bags + [f"untrained, {bag}" for bag in bags]
        assert all(-1 <= row["same image"] <= 1 for row in results) and "other class" in printed
    elif claim == "locality":
        assert list(results) == ["patch, h", "patch, z", "bag of 16, h", "bag of 16, z"]
        assert (tmp_path / "neighbours.png").exists() and "brightness" in printed
    else:
        assert all(-1 <= results[name] <= 1 for name in ("trained", "untrained"))


def test_claims_that_cannot_be_shown(tiny_run, tmp_path, refused):
    checkpoint = ("--checkpoint", tiny_run[0] / "run/checkpoint.pt", "--device", "cpu")
    assert "only in the demo" in refused("cooccurrence", *checkpoint, script=claims)
    assert "12 images are too few" in refused("locality", *checkpoint, "--test-images", 12, script=claims)
    assert "give more --test-images" in refused("parts", *checkpoint, "--test-images", 1, script=claims)
    assert "invalid choice" in refused("wholes", *checkpoint, script=claims)
    torch.save(bagssl.make_backbone("resnet18", 1).state_dict(), tmp_path / "resnet18.pth")
    assert "projection z, which this checkpoint lacks" in refused(
        "locality", "--checkpoint", tmp_path / "resnet18.pth", "--arch", "resnet18", "--data", tiny_run[0] / "data",
        "--image-size", 40, "--patch-scale", 0.1, script=claims)


@pytest.mark.parametrize("processes", [1, 2])
def test_profile_times_the_parts_and_leaves_nothing(tiny_run, tmp_path, processes, in_process, capsys):
    arguments = "profile", *tiny(tiny_run, tmp_path)
    if processes > 1:
        finished = command(*arguments, script=".github/benchmark.py", launcher=torchrun(processes))
        assert finished.returncode == 0, finished.stderr
    else:
        assert in_process(*arguments, script=benchmark) is None
    printed = finished.stdout if processes > 1 else capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    shown = {line[:22].strip(): line[22:].split() for line in printed.splitlines()}
    parts = ["load", "crop + augment", "backbone", "projector", "gather + loss", "backward", "clip + optimiser"]
    parts += ["gradient all-reduce"] * (processes > 1)
    total = float(shown["sum of the parts"][0])
    assert sum(float(shown[part][0]) for part in parts) == pytest.approx(total, abs=0.5)
    assert sum(float(shown[part][1][:-1]) for part in parts) == pytest.approx(100, abs=0.5)
    milliseconds, rate = float(shown["step"][0]), float(shown["step"][1].replace(",", ""))
    assert rate == pytest.approx(8 * 2 / milliseconds * 1e3, rel=0.02) and "step on a ready input" in shown


# A step of two real processes, by the code that training uses.
COUNTED = """
import json, sys
import torch
sys.path[:0] = sys.argv[1:3]
import bagssl, benchmark
config = bagssl.parse_config(sys.argv[3:])
device = bagssl.start_process("cpu")
bagssl.has_bf16 = lambda device: True  # slowly, where it is not native
encoder = bagssl.Encoder(config.arch, config.stem_stride, config.projector)
optimizer = benchmark.make_optimizer(encoder, config)
model, _ = bagssl.parallelize_and_compile(encoder, bagssl.training_views, config, device)
x = benchmark.make_input(torch.zeros(config.batch_size // 2, 3, 32, 32, dtype=torch.uint8), 0, config)
for _ in range(3):  # in its second step DistributedDataParallel arranges its buckets anew
    with benchmark.Communication() as communication, benchmark.FlopCounterMode(display=False) as flops:
        benchmark.train_step(x, model, optimizer, config)
if bagssl.RANK == 0:
    print(json.dumps([communication.counts, flops.get_total_flops()]))
torch.distributed.destroy_process_group()
"""


def test_the_simulation_counts_what_two_processes_send(tmp_path, in_process, capsys):
    flags = ["--preset", "cifar10-cpu", "--batch-size", "8", "--projector", "256", "256", "256"]
    (tmp_path / "counted.py").write_text(COUNTED)
    real = command(tmp_path / "counted.py", HERE, HERE / ".github", *flags, script="", launcher=torchrun(2))
    assert real.returncode == 0, real.stderr
    counts, flops = json.loads(real.stdout)
    tflop, _, simulated = benchmark.count_step(bagssl.parse_config(flags), 2)
    assert tflop == pytest.approx(flops / 1e12, rel=0.01) and counts.keys() == simulated.keys()
    for kind, (_, size) in simulated.items():
        assert size == pytest.approx(counts[kind][1], rel=0.01) and size > 0
    assert in_process("scale", *flags, "--processes", 1, 2, script=benchmark) is None
    one, two = (line.split() for line in capsys.readouterr().out.splitlines()[-2:])
    assert one[:2] == ["1", "8"] and two[:2] == ["2", "4"] and one[4:12] == ["0.0", "(0)"] * 4
    assert two[5] == f"({counts['gather'][0]})" and two[9] == f"({counts['scatter'][0]})"


# --------------------------------------------------------------------------------------------------
# Bad input: one sentence, exit code 2, nothing overwritten


@pytest.mark.parametrize("arguments, sentence", [
    (["--preset", "nonsense"], "argument --preset: invalid choice: 'nonsense'"),
    (["--nonsense", "1"], "--nonsense"),
    (["--lr", "much"], "--lr"),
    (["--lr", "inf"], "--lr must be a number from 0 to 2147483648, not inf"),
    (["--projector", "8", "8"], "argument --projector: expected 3 arguments"),
    (["--seed", "-1"], "--seed must be a number from 0 to 2147483648, not -1"),
    (["--weight-decay", "-5"], "--weight-decay must be a number from 0 to 2147483648, not -5"),
    (["--inv-weight", "nan"], "--inv-weight must be a number from 0 to 2147483648, not nan"),
    (["--save-every", "nan"], "--save-every must be"),
    (["--arch", "vit"], "argument --arch: invalid choice: 'vit'"),
    (["--stem-stride", "3"], "argument --stem-stride: invalid choice: 3"),
    (["--patch-scale", "1.5"], "--patch-scale must be a number from 1e-06 to 1, not 1.5"),
    (["--patch-scale", "0", "1", "--patch-size", "16"], "--patch-scale must be"),
    (["--clip", "0"], "--clip must be a number from 1e-06 to"),
    (["--stem-stride", "4"], "--stem-stride 4 is for the resnets"),
    (["--patch-scale", "0.0005"], "patches must have 3 pixels or more, not 2"),
    (["--patch-scale", "0.2", "0.8"], "--patch-size"),
    (["--patch-scale", "0.8", "0.2", "--patch-size", "16"], "a low and a high one together with a --patch-size"),
    (["--patch-size", "100000"], "--patch-size must be a number from 0 to 1024, not 100000"),
    (["--image-size", "0"], "--image-size must be a number from 1 to 4096, not 0"),
    (["--num-patches", "1"], "--num-patches must be a number from 2 to"),
    (["--batch-size", "1"], "--batch-size must be a number from 2 to"),
    (["--image-size", "81"], "multiple of 5"),
    (["--device", "abacus"], "device abacus cannot be used"),
    (["--data", "nowhere"], "no images in nowhere"),
    (["--preset", "imagenet", "--data", "nowhere"], "no images in nowhere"),
    (["--preset", "cifar10-cpu", "--data", "nowhere"], "no images in nowhere (looked for CIFAR10 as torchvision"),
    (["--preset", "cifar10-cpu"], "could not be downloaded (no network); name a"),
])
def test_bad_arguments(arguments, sentence, tmp_path, monkeypatch, refused):
    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.chdir(tmp_path)
    assert sentence in refused(*(() if "--preset" in arguments else ("--preset", "demo")), *arguments)
    assert not [path for path in tmp_path.rglob("*") if path.suffix or path.name == "nowhere"]


def test_a_script_that_is_refused_ends_with_code_2(tmp_path):
    for name, *arguments in (("bagssl.py", "--lr", "much"), ("eval_linear.py", "--checkpoint", tmp_path / "none.pt")):
        finished = command(*arguments, script=name)
        assert finished.returncode == 2 and finished.stdout == "" and finished.stderr.count("\n") == 1


def test_bad_images(tmp_path, refused, in_process, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    assert "no images in" in refused(*TINY, "--data", folder, "--out", tmp_path / "run")
    for i in range(12):
        write_image(folder / f"{i:02}.png", seed=i)
    for name in ("bad1.png", "bad2.jpg"):
        (folder / name).write_bytes(b"this is no picture")
    (folder / "link.png").symlink_to("nothing.png")
    sentence = refused(*TINY, "--data", folder, "--out", tmp_path / "run")
    assert "3 of 15 images" in sentence and "bad1.png (UnidentifiedImageError), bad2.jpg" in sentence
    assert "link.png (FileNotFoundError)" in sentence
    for name in ("bad1.png", "bad2.jpg", "link.png"):
        (folder / name).unlink()
    photos = [*TINY, "--data", folder, "--out", tmp_path / "run"]
    assert "fewer than one batch of 64" in refused(*photos, "--batch-size", 64)
    assert in_process(*photos) is None  # and a flat folder of photos trains
    assert f"images:  12 (pretrain) from {folder}" in capsys.readouterr().out
    assert "no labels to probe" in refused("--checkpoint", tmp_path / "run/checkpoint.pt", script=eval_linear)


def test_images_that_vanish_or_are_bombs_are_named(tmp_path, monkeypatch):
    for i in range(3):
        write_image(tmp_path / f"photos/{i}.png", seed=i)
    write_image(tmp_path / "photos/vast.png", size=(300, 300))
    (tmp_path / "photos/zzz.png").symlink_to("gone.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(bagssl.UserError, match="2 of 5 images .* vast.png .DecompressionBombError., zzz.png"):
        bagssl.load_images("any", tmp_path / "photos", "pretrain", 32, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_two_processes_decode_a_folder_at_once(tmp_path):
    """Both finish, one file stays, and it is not replaced while in use: a network file system would take it away."""
    pixels = [write_image(tmp_path / f"photos/{i:03}.png", size=(32, 32), seed=i) for i in range(200)]
    code = "import bagssl, sys; print(bagssl.load_images('any', sys.argv[1], 'pretrain', 32)[0].long().sum().item())"
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: command("-c", code, tmp_path / "photos", script=""), range(2)))
    assert all(one.returncode == 0 for one in both), both
    total = sum(int(image.sum(dtype=np.int64)) for image in pixels)
    assert [int(one.stdout.split()[-1]) for one in both] == [total] * 2
    cached, = (tmp_path / "photos/.bagssl").iterdir()
    inode, decode = cached.stat().st_ino, bagssl.decode_image

    def late(path, size):  # the other process's file appears while this one decodes
        if path.name == "000.png":  # once, though several threads decode
            (tmp_path / "kept").rename(cached)
        return decode(path, size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bagssl, "decode_image", late)
        cached.rename(tmp_path / "kept")
        bagssl.load_images("any", tmp_path / "photos", "pretrain", 32)
    assert cached.stat().st_ino == inode and len(list(cached.parent.iterdir())) == 1


def test_batch_must_divide_among_processes():
    with pytest.raises(bagssl.UserError, match="cannot be divided among 3 processes"):
        bagssl.check_config(bagssl.Config(batch_size=256), processes=3)


def test_out_that_holds_something_else(tmp_path, refused):
    (tmp_path / "precious.txt").write_text("mine")
    assert "holds no run" in refused(*TINY, "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_bad_checkpoints(tiny_run, tmp_path, refused):
    whole = (tiny_run[0] / "run/checkpoint.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[:len(whole) // 2])
    torch.save({"model": 1}, tmp_path / "foreign.pt")

    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/exploded",)

    torch.save(Bomb(), tmp_path / "bomb.pt")
    torch.save({"config": {"an": "older field"}, "encoder": {}, "optimizer": {}, "step": 1}, tmp_path / "old.pt")
    for name, words in (("none.pt", "no checkpoint at"), ("cut.pt", "damaged"), ("foreign.pt", "not a checkpoint of"),
                        ("old.pt", "not a checkpoint of this version"), ("bomb.pt", "damaged")):
        assert words in refused("--checkpoint", tmp_path / name, script=eval_linear)
    assert not (tmp_path / "exploded").exists()
    assert "1, 4, 9" in refused("--checkpoint", tmp_path / "cut.pt", "--patches", 5, script=eval_linear)
    checkpoint = tiny_run[0] / "run/checkpoint.pt"
    assert "from 1e-06 to 1, not 2" in refused("--checkpoint", checkpoint, "--patch-scale", 2, script=eval_linear)
    assert "3 pixels or more, not 2" in refused("--checkpoint", checkpoint, "--patch-scale", 0.002, script=eval_linear)
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoint.pt").write_bytes(whole[:len(whole) // 2])
    assert "damaged" in refused(*TINY, "--data", tiny_run[0] / "data", "--out", run, "--epochs", 15)


# --------------------------------------------------------------------------------------------------
# README and help


def test_help_names_every_field():
    shown = command("--help").stdout
    assert all("--" + name.replace("_", "-") in shown for name in bagssl.Config.__dataclass_fields__)
    assert "VICReg authors" in " ".join(shown.split())


@pytest.mark.parametrize("page", ["README.md", ".github/RESULTS.md"])
def test_links_lead_to_the_code(page):
    links = re.findall(r"\[`(\w+)`\]\(([\w./]+\.py)#L(\d+)\)", (HERE / page).read_text())
    assert len(links) >= 5
    for name, file, line in links:
        code = ((HERE / page).parent / file).read_text().splitlines()[int(line) - 1]
        assert re.match(rf"(def|class) {name}\b", code), f"{name} is not at {file}:{line}, which says: {code}"


@pytest.mark.parametrize("name, first", [("bagssl.py", []), ("eval_linear.py", []), (".github/claims.py", ["parts"])])
def test_documented_commands_use_flags_that_exist(name, first):
    known = re.findall(r"--[\w-]+", command(*first, "--help", script=name).stdout)
    pages = (HERE / "README.md").read_text() + (HERE / ".github/RESULTS.md").read_text()
    used = re.findall(rf"(?<![\w/]){re.escape(name)}((?: [^\s`&|;]+)*)", pages)
    used = {flag for arguments in used for flag in re.findall(r" (--[\w-]+)", arguments)}
    assert len(used) > 1 and used <= set(known), used - set(known)


def test_both_scripts_install_what_requirements_say():
    needed = [line for line in (HERE / "requirements.txt").read_text().split() if not line.startswith("pytest")]
    for name in ("bagssl.py", "eval_linear.py"):
        text = (HERE / name).read_text()
        assert f"# dependencies = {json.dumps(needed)}" in text and text.startswith("# SPDX-License-Identifier: MIT")
