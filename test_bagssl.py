# SPDX-License-Identifier: MIT
"""Tests of BagSSL: each property against an independent reference. Run: python -m pytest -q"""

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import torchvision.transforms.functional as TF
from PIL import Image

import bagssl
import eval_linear

HERE = Path(__file__).parent
torch.set_num_threads(1)  # as in `command`: sums in another order are not equal to the bit
TINY = ["--preset", "demo", "--image-size", "40", "--batch-size", "8", "--num-patches", "2", "--epochs", "1",
        "--projector", "16", "16", "16", "--lr", "1e-4", "--device", "cpu"]


def command(*arguments, script="bagssl.py", launcher=(), timeout=300, **environment):
    """Run a script as a user does; returns the finished process with its output as text."""
    script = [str(HERE / script)] if script else []
    return subprocess.run([sys.executable, *launcher, *script, *map(str, arguments)], text=True, capture_output=True,
                          timeout=timeout, stdin=subprocess.DEVNULL, cwd=HERE,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


@pytest.fixture
def refused(monkeypatch, capsys):
    """A function: run a script's main here; it must end with exit code 2 and one sentence, which is returned."""
    def run(*arguments, script=bagssl):
        monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            bagssl.run(script.main)
        lines = capsys.readouterr().err.strip().splitlines()
        assert ended.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]
    return run


def coordinates(height, width, batch=1):
    """Images (B, 2, H, W) int64-valued float64 whose pixels hold their own row and column."""
    grid = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    return grid.double().expand(batch, -1, -1, -1)


def write_image(path, size=(40, 40), seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return pixels


# --------------------------------------------------------------------------------------------------
# Patches


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_native_patches_are_the_images_own_pixels(dtype):
    images = torch.randint(0, 256, (3, 3, 20, 28), generator=torch.Generator().manual_seed(0)).to(dtype)
    patches = bagssl.crop_patches(images, 50, 0.1, generator=torch.Generator().manual_seed(1))
    side = bagssl.patch_side(20, 28, 0.1)
    assert patches.shape == (3, 50, 3, side, side) and patches.dtype == dtype
    for image, its_patches in zip(images, patches):
        windows = image.unfold(1, side, 1).unfold(2, side, 1).flatten(1, 2).transpose(0, 1)  # every place
        for patch in its_patches:
            assert (windows == patch).flatten(1).all(1).any()


def test_patches_are_uniform_and_independent():
    # A 7 x 6 image has 5 x 4 places for a 3 x 3 patch; a pair of patches has 400.
    patches = bagssl.crop_patches(coordinates(7, 6, batch=40_000), 2, 9 / 42, generator=torch.Generator().manual_seed(0))
    top, left = patches[:, :, 0, 0, 0].long(), patches[:, :, 1, 0, 0].long()
    place = top * 4 + left
    for counts, expected in (
        (torch.bincount(place.flatten(), minlength=20), 4_000),  # each place equally often
        (torch.bincount(place[:, 0] * 20 + place[:, 1], minlength=400), 100),  # whatever the other patch's
    ):
        degrees = len(counts) - 1
        chi_square = ((counts - expected) ** 2 / expected).sum().item()
        assert abs(chi_square - degrees) < 4.5 * math.sqrt(2 * degrees)


def test_patches_depend_on_the_generator_alone():
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    first, again, other = (bagssl.crop_patches(images, 4, 0.25, generator=torch.Generator().manual_seed(seed))
                           for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("size", [7, 16, 40])
def test_resized_patches_agree_with_torchvision(dtype, size):
    images = torch.randint(0, 256, (2, 3, 24, 32), generator=torch.Generator().manual_seed(0)).to(dtype)
    top, left, side = bagssl.draw_crops(2, 6, 24, 32, (0.05, 0.7), torch.Generator().manual_seed(3))
    assert side.unique().numel() > 4
    patches = bagssl.cut_patches(images, top, left, side, size)
    for b, v in itertools.product(range(2), range(6)):
        s = side[b, v].item()
        expected = TF.resized_crop(images[b], top[b, v].item(), left[b, v].item(), s, s, [size, size], antialias=True)
        assert patches.dtype == dtype
        assert (patches[b, v].double() - expected.double()).abs().max() <= (1 if dtype == torch.uint8 else 0.01)


def test_multi_scale_covers_the_range_and_stays_inside():
    top, left, side = bagssl.draw_crops(500, 20, 32, 48, (0.1, 0.6), torch.Generator().manual_seed(0))
    assert top.min() == 0 and left.min() == 0
    assert (top + side).max() == 32 and (left + side).max() == 48
    area = side.double().square() / (32 * 48)
    assert abs(area.mean() - 0.35) < 0.01 and area.min() < 0.12 and area.max() > 0.57


@pytest.mark.parametrize("scale", [0.0, -0.1, 1.01, (0.0, 0.5), (0.5, 1.2), (0.6, 0.3)])
def test_scale_out_of_range_is_refused(scale):
    with pytest.raises(ValueError, match="scale"):
        bagssl.crop_patches(torch.zeros(1, 3, 8, 8), 2, scale, size=4)


def test_several_scales_need_a_size():
    with pytest.raises(ValueError, match="size"):
        bagssl.crop_patches(torch.zeros(1, 3, 8, 8), 2, (0.2, 0.5))


def test_grid_patches():
    images = coordinates(32, 48, batch=2)
    grid = bagssl.grid_patches(images, 4, 64 / (32 * 48))
    assert grid.shape == (2, 16, 2, 8, 8)
    corners = grid[0, :, :, 0, 0].unflatten(0, (4, 4))  # (row, column, coordinate)
    assert corners[:, 0, 0].tolist() == [0, 8, 16, 24] and corners[0, :, 1].tolist() == [0, 13, 27, 40]
    centre = bagssl.grid_patches(images, 1, 64 / (32 * 48))
    assert centre[0, 0, :, 0, 0].tolist() == [12, 20]
    square = torch.rand(2, 3, 16, 16)
    assert torch.equal(bagssl.grid_patches(square, 1, 1.0)[:, 0], square)
    assert torch.equal(bagssl.grid_patches(square, 3, 1.0), square[:, None].expand(-1, 9, -1, -1, -1))


# --------------------------------------------------------------------------------------------------
# Augmentation

IDENTITY = dict(flip=False, brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0, gray=False, solarize=False)


@pytest.mark.parametrize("name, values, reference", [
    ("flip", [True, False], lambda x, on: TF.hflip(x) if on else x),
    ("brightness", [0.0, 0.6, 1.4, 3.0], TF.adjust_brightness),
    ("contrast", [0.0, 0.6, 1.4, 3.0], TF.adjust_contrast),
    ("saturation", [0.0, 0.8, 1.2, 3.0], TF.adjust_saturation),
    ("hue", [-0.5, -0.1, 0.0, 0.07, 0.5], TF.adjust_hue),
    ("gray", [True, False], lambda x, on: TF.rgb_to_grayscale(x, 3) if on else x),
    ("solarize", [True, False], lambda x, on: TF.solarize(x, 0.5) if on else x),
])
def test_augment_agrees_with_torchvision(name, values, reference):
    patches = torch.rand(len(values), 3, 9, 9, generator=torch.Generator().manual_seed(0))
    patches[:, :, 0] = patches[:, :1, 0]  # a row of greys, which have no hue
    patches[:, :, 1, 0], patches[:, :, 1, 1] = 0.0, 1.0
    params = {key: torch.tensor(values if key == name else [default] * len(values)) for key, default in IDENTITY.items()}
    for patch, value, found in zip(patches, values, bagssl.apply_augment(patches, params)):
        torch.testing.assert_close(found, reference(patch, value), atol=2e-6, rtol=0)


def test_augment_draws_for_each_patch_with_the_stated_odds():
    shape = (200, 100)
    params = bagssl.draw_augment(shape, torch.Generator().manual_seed(0))
    odds = {"flip": params["flip"], "gray": params["gray"], "solarize": params["solarize"],
            "jitter": params["brightness"] != 1}
    for name, expected in (("flip", 0.5), ("gray", 0.2), ("solarize", 0.1), ("jitter", 0.8)):
        assert abs(odds[name].double().mean() - expected) < 0.015
        assert odds[name].any(0).all() and not odds[name].all(0).any()  # varies within every column: per patch
    for name, low, high in (("brightness", 0.6, 1.4), ("contrast", 0.6, 1.4), ("saturation", 0.8, 1.2), ("hue", -0.1, 0.1)):
        drawn = params[name][odds["jitter"]]
        assert low <= drawn.min() < low + 0.01 and high - 0.01 < drawn.max() <= high
        assert abs(drawn.double().mean() - (low + high) / 2) < 0.01


def test_augment_keeps_the_range_and_refuses_other_input():
    patches = torch.rand(5, 4, 3, 8, 8)
    out = bagssl.augment(patches, torch.Generator().manual_seed(0), brightness=0.9, contrast=0.9, saturation=0.9, hue=0.5)
    assert out.shape == patches.shape and out.min() >= 0 and out.max() <= 1
    assert torch.equal(bagssl.augment(patches, torch.Generator().manual_seed(4)),
                       bagssl.augment(patches, torch.Generator().manual_seed(4)))
    for wrong in (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.rand(2, 1, 8, 8)):
        with pytest.raises(ValueError, match="augment takes"):
            bagssl.augment(wrong)


# --------------------------------------------------------------------------------------------------
# Encoder and loss


@pytest.mark.parametrize("arch, width", [("resnet18", 512), ("resnet34", 512), ("resnet50", 2048)])
def test_backbone_has_torchvisions_keys(arch, width):
    encoder = bagssl.Encoder(arch, stem_stride=4, projector=(8, 9, 10))
    h, z = encoder(torch.rand(2, 3, 40, 40))
    assert h.shape == (2, width) and z.shape == (2, 10)
    model = getattr(torchvision.models, arch)()
    missing, unexpected = model.load_state_dict(encoder.backbone.state_dict(), strict=False)
    assert unexpected == [] and missing == ["fc.weight", "fc.bias"]
    assert bagssl.Encoder(arch, 1, (8, 8, 8)).backbone.conv1.stride == (1, 1)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (2, 1), (3, 2), (5, 5)])
def test_convolution_of_small_maps_is_the_convolution(stride, shape):
    torch.manual_seed(0)
    ours, reference = bagssl.Conv2d(5, 7, 3, stride, 1, bias=False), torch.nn.Conv2d(5, 7, 3, stride, 1, bias=False)
    reference.load_state_dict(ours.state_dict())
    x = torch.randn(4, 5, *shape).to(memory_format=torch.channels_last).requires_grad_()
    found, expected = ours(x), reference(x)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    torch.testing.assert_close(torch.autograd.grad(found, [ours.weight, x], weights),
                               torch.autograd.grad(expected, [reference.weight, x], weights))


@pytest.mark.parametrize("scale, size", [((0.25,), 0), ((0.08, 1.0), 8)])
def test_input_and_encoder_are_one_graph_each(scale, size):
    config = bagssl.Config(batch_size=4, num_patches=2, patch_scale=scale, patch_size=size)
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    encoder = bagssl.Encoder("resnet18", 2, (8, 8, 8)).double()

    def results(compiled):
        torch.manual_seed(0)
        x = bagssl.draw_input(images, config, 0, slice(0, 4), compiled(bagssl.make_input))
        h, z = compiled(encoder)(x.double())
        return x, h, z, *torch.autograd.grad(z.square().sum(), list(encoder.parameters()))

    # fullgraph: an error where Python would have to step in. The backend runs the graphs without a C++ compiler.
    graphs = results(lambda function: torch.compile(function, backend="aot_eager", fullgraph=True))
    torch.testing.assert_close(graphs, results(lambda function: function))


def test_normalize_takes_bytes_and_floats():
    images = torch.randint(0, 256, (2, 3, 5, 5), dtype=torch.uint8)
    expected = TF.normalize(images / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(bagssl.normalize(images), expected)
    torch.testing.assert_close(bagssl.normalize(images / 255), expected)


def pairwise_vicreg(z, inv_weight, var_weight, cov_weight, eps=1e-4):
    """The definition, pair by pair, from the VICReg paper's pseudo-code."""
    pairs = list(itertools.combinations(range(z.shape[1]), 2))
    total = 0
    for i, j in pairs:
        inv = torch.nn.functional.mse_loss(z[:, i], z[:, j])
        hinge = cov = 0
        for v in (i, j):
            hinge = hinge + torch.relu(1 - torch.sqrt(z[:, v].var(0) + eps)).mean() / 2
            c = torch.cov(z[:, v].T)
            cov = cov + (c - c.diag().diag()).square().sum() / z.shape[2]
        total = total + inv_weight * inv + var_weight * hinge + cov_weight * cov
    return total / len(pairs)


@pytest.mark.parametrize("B, V, D", [(2, 2, 3), (6, 2, 11), (11, 5, 6), (8, 3, 8)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_vicreg_loss_is_the_mean_over_pairs(B, V, D, dtype, tolerance):
    reference = torch.randn(B, V, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.9 + 3
    z, reference = reference.to(dtype).requires_grad_(), reference.requires_grad_()
    loss, terms = bagssl.vicreg_loss(z, 20.0, 15.0, 2.0)
    expected = pairwise_vicreg(reference, 20.0, 15.0, 2.0)
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(20 * terms["inv"] + 15 * terms["var"] + 2 * terms["cov"], loss.detach())
    loss.backward()
    expected.backward()
    torch.testing.assert_close(z.grad.double(), reference.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("B, V, D", [(7, 2, 11), (11, 3, 6)])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_shares_of_the_loss_average_to_it(B, V, D, size):
    z = torch.randn(B, V, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    expected = pairwise_vicreg(z, 25.0, 25.0, 1.0)
    shares = [bagssl.vicreg_loss(z, share=(rank, size)) for rank in range(size)]
    found = sum(loss for loss, _ in shares) / size
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.autograd.grad(found, z), torch.autograd.grad(expected, z), rtol=1e-9, atol=1e-12)
    if B < D:
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
    """12 symbols in 4 classes, with a joint of pairs in whole numbers: 4,001 pairs in which each occurs as often
    as its probability says, so that what the loss finds is not blurred by sampling. Returns the pairs (N, 2), p
    (12,) and the eigenvectors (12, 12) and eigenvalues of the normalised co-occurrences, in descending order."""
    classes = torch.rand(4, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 6
    classes = classes / classes.sum(1, keepdim=True)
    counts = (1000 * classes.T @ classes).round().long()
    pairs = torch.tensor([[i, j] for i in range(12) for j in range(12)]).repeat_interleave(counts.flatten(), 0)
    joint = counts / counts.sum().double()
    p = joint.sum(1)
    values, vectors = torch.linalg.eigh(joint / (p[:, None] * p).sqrt())
    assert values.flip(0)[[0, 3, 4]].tolist() == pytest.approx([1, 0.48, 0.01], abs=0.01)  # 3 that are not trivial
    return pairs, joint, p, values.flip(0), vectors.flip(1)


def minimise(function, width):
    z = torch.randn(12, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
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
    torch.testing.assert_close(0.7 * (p[:, None] * p).sqrt() * (z @ z.T), best, rtol=0, atol=1e-6)


@pytest.mark.parametrize("width", [1, 2, 3])
def test_vicreg_spans_the_leading_eigenvectors_of_co_occurrence(small_world, width):
    """Its covariance weight must be large enough to keep two dimensions from sharing an eigenvector: 1 is not, here."""
    pairs, _, p, _, vectors = small_world
    z = minimise(lambda z: bagssl.vicreg_loss(z[pairs], cov_weight=25.0)[0], width)
    found = torch.linalg.qr(p.sqrt()[:, None] * (z - p @ z)).Q
    cosines = torch.linalg.svdvals(found.T @ vectors[:, 1:width + 1])  # 0 is the trivial one, which centring removes
    assert math.degrees(cosines.min().clamp(max=1).acos()) < 0.01


# --------------------------------------------------------------------------------------------------
# Bag of patches


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("per_side, scale, size", [(1, 0.25, None), (3, 0.25, None), (2, 0.5, 12), (1, 1.0, None)])
def test_bag_is_the_mean_over_a_loop(chunk, per_side, scale, size):
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
                                   torch.nn.Flatten())
    images = torch.randint(0, 256, (3, 3, 20, 24), dtype=torch.uint8)
    largest = 0

    def watch(module, inputs):
        nonlocal largest
        largest = max(largest, len(inputs[0]))

    backbone.register_forward_pre_hook(watch)
    bag = bagssl.BagOfPatches(backbone, per_side, scale, size, chunk)
    with torch.no_grad():
        found = bag(images)
        assert largest <= chunk
        for image, h in zip(images, found):
            patches = bagssl.grid_patches(image[None], per_side, scale, size)[0]
            expected = sum(backbone(bagssl.normalize(patch[None]))[0] for patch in patches) / len(patches)
            torch.testing.assert_close(h, expected, atol=1e-5, rtol=1e-4)


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
    assert bagssl.load_images("any", tmp_path, "pretrain", 40)[1] is None
    monkeypatch.undo()
    cached = next((tmp_path / ".bagssl").glob("*-train-40px-*"))
    short = cached.read_bytes()[:1000]
    cached.unlink()  # the first mapping lives on
    cached.write_bytes(short)
    assert torch.equal(bagssl.load_images("any", tmp_path, "train", 40)[0], images)
    changed = write_image(tmp_path / "train/cat/0.png", seed=77)
    again = bagssl.load_images("any", tmp_path, "train", 40)[0]
    assert torch.equal(again[0], torch.from_numpy(changed).permute(2, 0, 1)) and torch.equal(again[1:], images[1:])
    assert len(list((tmp_path / ".bagssl").glob("*-train-40px-*"))) == 1  # the stale one is gone


def test_photos_of_every_kind_are_resized_and_cropped(tmp_path):
    write_image(tmp_path / "wide.jpg", size=(90, 45), quality=95)
    Image.new("L", (50, 70), 90).save(tmp_path / "grey.png")
    Image.new("RGBA", (50, 50), (9, 8, 7, 255)).save(tmp_path / "alpha.png")
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
    by_name = dict(zip(sorted(path.name for path in tmp_path.glob("[!.]*")), images))
    assert (by_name["alpha.png"] == torch.tensor([9, 8, 7])[:, None, None]).all()
    assert (by_name["grey.png"] == 90).all() and (by_name["scan.png"] == 180).all()
    assert by_name["turned.jpg"][2, 0].min() > 200 and by_name["turned.jpg"][0, -1].min() > 200
    with Image.open(tmp_path / "wide.jpg") as photo:
        assert torch.equal(by_name["wide.jpg"], TF.pil_to_tensor(TF.center_crop(TF.resize(photo, 32), 32)))


class FakeSet:
    """A torchvision set that is not there and cannot be downloaded, until `there`."""

    there, asked = False, []

    def __init__(self, root, download, **which):
        FakeSet.asked.append((str(root), download, which))
        if not download and not FakeSet.there:
            raise RuntimeError("Dataset not found or corrupted.")
        if download:
            raise OSError("<urlopen error [Errno -2] Name or service not known>")
        self.data = np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28)
        self.targets = [4, 7]


def test_torchvision_sets(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", FakeSet)
    with pytest.raises(bagssl.UserError, match="no FashionMNIST in .* could not be downloaded .* --data.* --preset demo"):
        bagssl.load_images("fashionmnist", tmp_path, "test", 28)
    assert FakeSet.asked == [(str(tmp_path), flag, {"train": False}) for flag in (False, True)]
    monkeypatch.setattr(FakeSet, "there", True)
    images, labels = bagssl.load_images("fashionmnist", tmp_path, "train", 28)
    assert torch.equal(images[:, 1], torch.from_numpy(FakeSet(tmp_path, False).data)) and images.shape == (2, 3, 28, 28)
    assert labels.tolist() == [4, 7]
    assert bagssl.load_images("fashionmnist", tmp_path, "train", 32)[0].shape == (2, 3, 32, 32)


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
    world = bagssl.demo_world()
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
    first = {tuple(torch.rand(2, generator=bagssl.generator_for("cpu", *key)).tolist())
             for key in itertools.product(range(4), range(3), range(50))}
    assert len(first) == 600


def test_learning_rate_and_effective_rank():
    config = bagssl.Config(lr=2.0, warmup=0.1)
    rates = [bagssl.learning_rate(step, 100, config) for step in range(100)]
    assert rates[0] == 0.2 and rates[9] == rates[10] == 2.0 and 0 < rates[-1] < 0.001
    assert rates[10:] == sorted(rates[10:], reverse=True)
    q = torch.linalg.qr(torch.randn(400, 6, dtype=torch.float64)).Q
    q = torch.linalg.qr(q - q.mean(0)).Q.float()
    assert abs(bagssl.effective_rank(q) - 6) < 0.01
    assert abs(bagssl.effective_rank(q[:, :1] @ torch.ones(1, 6)) - 1) < 0.01


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """A folder of small images, and a run on them."""
    folder = tmp_path_factory.mktemp("tiny")
    for i in range(24):
        write_image(folder / f"data/train/{'ab'[i % 2]}/{i}.png", seed=i)
        write_image(folder / f"data/test/{'ab'[i % 2]}/{i}.png", seed=100 + i)
    finished = command(*TINY, "--data", folder / "data", "--out", folder / "run", "--epochs", 2)
    assert finished.returncode == 0, finished.stderr
    return folder, finished.stdout


def test_a_run_leaves_what_it_says(tiny_run):
    folder, printed = tiny_run
    log = [json.loads(line) for line in (folder / "run/log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == list(range(6))
    weights = json.loads((folder / "run/config.json").read_text())
    for entry in log:
        terms = sum(weights[f"{name}_weight"] * entry[name] for name in ("inv", "var", "cov"))
        assert math.isclose(entry["loss"], terms, rel_tol=1e-4)
    assert {"lr", "patches_per_s", "effective_rank"} <= log[-1].keys()
    assert "step 6/6" in printed and "eval_linear.py" in printed
    encoder, config = bagssl.load_encoder(folder / "run/checkpoint.pt")
    assert config.epochs == 2 and not encoder.training
    model = torchvision.models.resnet18()
    model.conv1, model.maxpool, model.fc = encoder.backbone.conv1, torch.nn.Identity(), torch.nn.Identity()
    model.load_state_dict(torch.load(folder / "run/backbone.pt", weights_only=True))
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(model.eval()(x), encoder(x)[0], rtol=1e-4, atol=1e-5)


def test_a_finished_run_is_left_alone_and_another_config_refused(tiny_run, refused):
    folder, _ = tiny_run
    before = {path.name: path.read_bytes() for path in (folder / "run").iterdir()}
    again = command(*TINY, "--data", folder / "data", "--out", folder / "run", "--epochs", 2)
    assert again.returncode == 0 and "complete" in again.stdout
    sentence = refused(*TINY, "--data", folder / "data", "--out", folder / "run", "--lr", 0.5)
    assert "another config" in sentence and "lr was 0.0001, is 0.5" in sentence
    assert before == {path.name: path.read_bytes() for path in (folder / "run").iterdir()}


def same_weights(*runs):
    first, *others = (torch.load(run / "backbone.pt", weights_only=True) for run in runs)
    return all(torch.equal(first[name], other[name]) for other in others for name in first)


def losses(run):
    """The loss of each step; each step must be in the log once."""
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == list(range(len(entries)))
    return [entry["loss"] for entry in entries]


def torchrun(processes, *more):
    return "-m", "torch.distributed.run", *(more or ("--standalone",)), f"--nproc_per_node={processes}"


# Runs the command line in a child, again and again, and kills it after a random time that includes the
# writing of checkpoints. The parent only forks, so that a start costs no import.
KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import bagssl
out, kills = Path(sys.argv[sys.argv.index("--out") + 1]), 0
random.seed(0)
def written():  # which file checkpoint.pt is; between two renames there is none
    try:
        return (out / "checkpoint.pt").stat().st_ino
    except FileNotFoundError:
        return None
while True:
    if kills == 10:
        sys.argv[-1] = "5"  # minutes between checkpoints, for the rest
    if not (child := os.fork()):
        os._exit(bagssl.run(bagssl.main) or 0)
    before = written()
    while kills < 10 and written() in (None, before):  # until it has gone on from where it was
        time.sleep(0.01)
    if kills < 10:
        time.sleep(random.uniform(0, 0.7))
        os.kill(child, signal.SIGKILL)
        kills += 1
    if not os.WIFSIGNALED(status := os.waitpid(child, 0)[1]):
        print("killed", kills)
        sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_killed_at_ten_random_moments_a_run_ends_as_if_it_had_not_been(tiny_run, tmp_path):
    folder, _ = tiny_run
    arguments = [*TINY, "--data", folder / "data", "--epochs", 32]
    whole = command(*arguments, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    killed = command("-c", KILLER, *arguments, "--out", tmp_path / "run", "--save-every", 0, script="")
    assert killed.returncode == 0 and "killed 10" in killed.stdout, killed.stderr
    assert len(losses(tmp_path / "run")) == 96 and losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert same_weights(tmp_path / "run", tmp_path / "whole")
    assert not list((tmp_path / "run").glob(".*"))  # what half-written checkpoints left has been cleared away


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_with_a_checkpoint(tiny_run, tmp_path, number, code, monkeypatch):
    folder, _ = tiny_run
    arguments = [*TINY, "--data", str(folder / "data"), "--out", str(tmp_path / "run"), "--epochs", "2"]
    draw, usual = bagssl.draw_input, signal.getsignal(number)

    def interrupted(images, config, step, *rest):
        if step == 1:
            os.kill(os.getpid(), number)
        return draw(images, config, step, *rest)

    monkeypatch.setattr(bagssl, "draw_input", interrupted)
    monkeypatch.setattr(sys, "argv", ["bagssl.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        bagssl.run(bagssl.main)
    stopped_at = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["step"]
    assert ended.value.code == code and stopped_at == 3 == len(losses(tmp_path / "run"))
    assert signal.getsignal(number) == usual and not (tmp_path / "run/backbone.pt").exists()
    finished = command(*arguments)
    assert "continued at step 3" in finished.stdout and finished.returncode == 0, finished.stderr
    assert losses(tmp_path / "run") == losses(folder / "run") and same_weights(tmp_path / "run", folder / "run")


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tiny_run, tmp_path):
    folder, _ = tiny_run
    arguments = [*TINY, "--data", folder / "data", "--out", tmp_path / "run", "--epochs", 2]
    assert command(*arguments, "--save-every", 0).returncode == 0
    (tmp_path / "run/backbone.pt").unlink()
    checkpoint = tmp_path / "run/checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:100_000])
    finished = command(*arguments)
    assert finished.returncode == 0 and "going on from the one before" in finished.stderr
    assert "continued at step" in finished.stdout and same_weights(tmp_path / "run", folder / "run")
    (tmp_path / "run/backbone.pt").unlink()  # as after a kill between the last checkpoint and it
    assert command(*arguments).returncode == 0 and same_weights(tmp_path / "run", folder / "run")


@pytest.mark.parametrize("what, words", [("patch", "the loss is not finite at step 3"),
                                         ("weight", "the loss is not finite at step 3"),
                                         ("gradient", "the gradient is not finite at step 3")])
def test_bad_numbers_stop_a_run_and_leave_its_checkpoint(tiny_run, tmp_path, what, words, monkeypatch, capsys):
    folder, _ = tiny_run
    draw, project = bagssl.draw_input, bagssl.Encoder.forward

    def bad_patch(images, config, step, *rest):
        bad_patch.step = step
        x = draw(images, config, step, *rest)
        if what == "patch" and step == 3:
            x[0, 0, 0, 0] = math.nan
        return x

    def bad_weight(encoder, x):
        if what == "weight" and bad_patch.step == 3:
            with torch.no_grad():
                encoder.backbone.layer1[0].conv1.weight[0, 0, 0, 0] = math.inf
        h, z = project(encoder, x)
        if what == "gradient" and bad_patch.step == 3:
            z.register_hook(lambda gradient: gradient * math.nan)
        return h, z

    monkeypatch.setattr(bagssl, "draw_input", bad_patch)
    monkeypatch.setattr(bagssl.Encoder, "forward", bad_weight)
    arguments = [*TINY, "--data", folder / "data", "--out", tmp_path / "run", "--epochs", 2, "--save-every", 0]
    monkeypatch.setattr(sys, "argv", ["bagssl.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        bagssl.run(bagssl.main)
    told = capsys.readouterr().err
    assert ended.value.code == 1 and words in told and "--lr" in told and told.count("\n") == 1
    saved = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert saved["step"] <= 3 and all(value.isfinite().all() for value in saved["encoder"].values())


def test_a_compiled_run_is_the_same_run(tiny_run, tmp_path, monkeypatch):
    folder, _ = tiny_run
    torch_compile, compiled = torch.compile, []

    def without_a_compiler(part):
        compiled.append(part)
        return torch_compile(part, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", without_a_compiler)
    monkeypatch.setattr(sys, "argv", ["bagssl.py", *map(str, [*TINY, "--data", folder / "data", "--epochs", 2, "--out",
                                                              tmp_path / "run", "--compile", "yes"])])
    bagssl.main()
    assert [type(part).__name__ for part in compiled] == ["function", "Encoder"]
    assert losses(tmp_path / "run") == pytest.approx(losses(folder / "run"), rel=1e-5)
    assert bagssl.load_encoder(tmp_path / "run/checkpoint.pt")[1].epochs == 2


def test_collapse_is_warned_of_once(tmp_path, capsys):
    log = bagssl.Log(tmp_path / "log.jsonl", 0, bagssl.Config(), 100)
    for step in range(99):
        log.shown = -math.inf  # look at each step's embeddings
        log.add(step, 0.1, (1.0, 1.0, 1.0, 1.0), torch.ones(64, 8) if step > 50 else torch.randn(64, 8))
    told = capsys.readouterr().err
    assert told.count("warning") == 1 and "at step 51" in told and "--lr" in told
    assert len(losses(tmp_path)) == 99


def test_a_full_disk_is_told_and_what_was_saved_stays(tiny_run, tmp_path, monkeypatch, refused):
    folder, _ = tiny_run
    save, saves = torch.save, []

    def until_full(content, file):
        saves.append(1)
        if len(saves) == 3:
            file.write(b"half a checkpoint")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(content, file)

    monkeypatch.setattr(torch, "save", until_full)
    arguments = [*TINY, "--data", folder / "data", "--epochs", 2, "--save-every", 0]
    told = refused(*arguments, "--out", tmp_path / "run")
    assert "No space left" in told and "cannot write" in told
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "checkpoint.pt", "checkpoint.previous.pt", "config.json", "log.jsonl"}
    assert bagssl.load_checkpoint(tmp_path / "run/checkpoint.pt")["step"] > 0
    (tmp_path / "file").write_text("")
    assert "cannot write" in refused(*arguments, "--out", tmp_path / "file/run")


# The command line in float32 on any CPU: in bfloat16 rounding hides whether processes agree.
FLOAT32 = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import bagssl
bagssl.has_bf16 = lambda device: False
bagssl.run(bagssl.main)
"""


def test_processes_train_as_one(tmp_path):
    """1, 2 and 4 processes: 21 steps of 32 images, losses equal to 1e-5 and weights to 1e-4."""
    (tmp_path / "float32.py").write_text(FLOAT32)
    for i in range(96):
        write_image(tmp_path / f"data/{i}.png", seed=i)
    arguments = [*TINY, "--data", tmp_path / "data", "--epochs", 7, "--batch-size", 32, "--num-patches", 4, "--lr", 3e-4]
    for processes in (1, 2, 4):
        finished = command(HERE, *arguments, "--out", tmp_path / str(processes), launcher=torchrun(processes),
                           script=tmp_path / "float32.py")
        assert finished.returncode == 0, finished.stderr
    one = torch.load(tmp_path / "1/checkpoint.pt", weights_only=True)["encoder"]
    for processes in (2, 4):
        assert losses(tmp_path / str(processes)) == pytest.approx(losses(tmp_path / "1"), rel=1e-5)
        many = torch.load(tmp_path / f"{processes}/checkpoint.pt", weights_only=True)["encoder"]
        for name in one:
            torch.testing.assert_close(one[name].float(), many[name].float(), rtol=1e-4, atol=1e-4)


# One of two processes kills itself at step 3, the first time round.
SUICIDE = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import bagssl
draw = bagssl.draw_input
def draw_input(images, config, step, *rest):
    if step == 3 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return draw(images, config, step, *rest)
bagssl.draw_input = draw_input
bagssl.run(bagssl.main)
"""


def test_a_killed_process_is_restarted_and_the_run_goes_on(tiny_run, tmp_path):
    folder, _ = tiny_run
    (tmp_path / "suicide.py").write_text(SUICIDE)
    finished = command(HERE, *TINY, "--data", folder / "data", "--out", tmp_path / "run", "--epochs", 2,
                       "--save-every", 0, launcher=torchrun(2, "--standalone", "--max-restarts=1"), script=tmp_path / "suicide.py")
    assert finished.returncode == 0 and "continued at step" in finished.stdout, finished.stderr
    assert len(losses(tmp_path / "run")) == 6
    assert losses(tmp_path / "run") == pytest.approx(losses(folder / "run"), rel=1e-2)


def test_two_nodes_of_two_processes(tiny_run, tmp_path):
    """Two launchers on one machine, the second late; then the run, cut short, goes on as one process."""
    folder, _ = tiny_run
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launcher = torchrun(2, "--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}")
    arguments = [*TINY, "--data", folder / "data", "--out", tmp_path / "run", "--epochs", 2]
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(command, *arguments, launcher=launcher)
        time.sleep(3)
        second = pool.submit(command, *arguments, launcher=launcher)
        nodes = first.result(), second.result()
    assert [node.returncode for node in nodes] == [0, 0], [node.stderr for node in nodes]
    assert sorted("eval_linear.py" in node.stdout for node in nodes) == [False, True]  # rank 0 alone prints
    assert losses(tmp_path / "run") == pytest.approx(losses(folder / "run"), rel=1e-2)


def test_another_number_of_processes_takes_over(tiny_run, tmp_path):
    folder, _ = tiny_run
    arguments = [*TINY, "--data", folder / "data", "--out", tmp_path / "run", "--epochs", 2]
    assert command(*arguments, "--save-every", 0).returncode == 0
    (tmp_path / "run/checkpoint.previous.pt").replace(tmp_path / "run/checkpoint.pt")  # of some steps before the end
    finished = command(*arguments, launcher=torchrun(2))
    assert finished.returncode == 0 and "continued at step" in finished.stdout, finished.stderr
    assert losses(tmp_path / "run") == pytest.approx(losses(folder / "run"), rel=1e-2)


def test_a_failed_process_ends_the_job(tiny_run, tmp_path):
    folder, _ = tiny_run
    (tmp_path / "failing.py").write_text(SUICIDE)
    begun = time.monotonic()
    finished = command(HERE, *TINY, "--data", folder / "data", "--out", tmp_path / "run", "--epochs", 2,
                       launcher=torchrun(2), script=tmp_path / "failing.py")
    assert finished.returncode != 0 and time.monotonic() - begun < 60


WORKER = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
import bagssl
dist.init_process_group("gloo")
rank, torch_seed = dist.get_rank(), torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(5, 7), bagssl.SyncBatchNorm(7), torch.nn.ReLU(), torch.nn.Linear(7, 12))
x = torch.randn(8, 3, 5, dtype=torch.float64)
model = model.double()
parallel = torch.nn.parallel.DistributedDataParallel(model)
z = parallel(x.chunk(2)[rank].flatten(0, 1)).unflatten(0, (4, 3))
loss, _ = bagssl.vicreg_loss(bagssl.GatherRows.apply(z), share=(rank, 2))
loss.backward()
loss = loss.detach()
dist.all_reduce(loss)
norm = bagssl.SyncBatchNorm(5)
half = norm(x.bfloat16().chunk(2)[rank].flatten(0, 1))  # as under autocast, on a CPU that has bfloat16
torch.save({"loss": loss / 2, "grads": [p.grad for p in model.parameters()], "state": model.state_dict(),
            "half": half.detach(), "half state": norm.state_dict()}, f"{sys.argv[2]}/{rank}.pt")
dist.destroy_process_group()
"""


def test_two_processes_have_the_gradients_of_one(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                    tmp_path / "worker.py", HERE, tmp_path], check=True, capture_output=True, timeout=120)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7), torch.nn.ReLU(), torch.nn.Linear(7, 12))
    x = torch.randn(8, 3, 5, dtype=torch.float64)
    model = model.double()
    loss = pairwise_vicreg(model(x.flatten(0, 1)).unflatten(0, (8, 3)), 25.0, 25.0, 1.0)
    loss.backward()
    norm = torch.nn.BatchNorm1d(5)
    normed = norm(x.bfloat16().float().flatten(0, 1)).detach()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found["half"], normed.chunk(2)[rank].bfloat16(), rtol=0.01, atol=0.01)
        torch.testing.assert_close(found["half state"], norm.state_dict(), rtol=1e-5, atol=1e-6)  # kept in float32
        torch.testing.assert_close(found["loss"], loss.detach(), rtol=1e-10, atol=1e-10)
        for gradient, parameter in zip(found["grads"], model.parameters()):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-8, atol=1e-10)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(found["state"][name], value, rtol=1e-8, atol=1e-10)


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
        loss = torch.nn.functional.cross_entropy(x @ weight[:-1] + weight[-1], y) + decay / 2 * weight[:-1].square().sum()
        gradient, = torch.autograd.grad(loss, weights)
        assert gradient.abs().max() < 1e-4


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


@pytest.mark.parametrize("launcher", [(), ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")])
def test_probe_prints_a_table_and_writes_it(tiny_run, tmp_path, launcher):
    folder, _ = tiny_run
    checkpoint = tmp_path / "checkpoint.pt"
    checkpoint.write_bytes((folder / "run/checkpoint.pt").read_bytes())
    (tmp_path / "eval.jsonl").write_text("an earlier table\n")
    finished = command("--checkpoint", checkpoint, "--patches", 1, 4, script="eval_linear.py", launcher=launcher)
    assert finished.returncode == 0, finished.stderr
    earlier, table = (tmp_path / "eval.jsonl").read_text().splitlines()
    assert earlier == "an earlier table"
    results = json.loads(table)["results"]
    rows = [row["features"] for row in results]
    assert rows == ["one patch, the centre", "bag of 4", "whole image, one pass", "untrained, bag of 4", "raw pixels"]
    for row in results:
        assert 0 <= row["top1"] <= 100 and f"{row['features']:24}  {row['top1']:12.2f}" in finished.stdout


def test_processes_embed_their_shares(tiny_run, monkeypatch):
    monkeypatch.setattr(bagssl, "has_bf16", lambda device: False)  # blocks of other sizes round otherwise
    encoder, _ = bagssl.load_encoder(tiny_run[0] / "run/checkpoint.pt")
    images = torch.randint(0, 256, (11, 3, 40, 40), dtype=torch.uint8)
    bag = bagssl.BagOfPatches(encoder.backbone, 2, 0.04)
    (whole,) = eval_linear.embed([bag], images, torch.device("cpu"), bagssl.World(), "test", block=4)
    with torch.no_grad():
        torch.testing.assert_close(whole, torch.cat([bag(image[None]) for image in images]), atol=1e-4, rtol=1e-3)


def test_cosine_to_parts_agrees_with_a_loop():
    generator = torch.Generator().manual_seed(0)
    whole, bag = torch.randn(40, 6, generator=generator) + 3, torch.randn(40, 6, generator=generator) - 1
    labels = torch.arange(40) % 4
    found = eval_linear.cosine_to_parts(whole, bag, labels)
    centred = [x.double() - x.double().mean(0) for x in (whole, bag)]
    cosine = torch.tensor([[float(torch.dot(a, b) / a.norm() / b.norm()) for b in centred[1]] for a in centred[0]])
    assert found["same image"] == pytest.approx(cosine.diag().mean().item(), abs=1e-5)
    # One image of each class, whose embedding is its own number: where were the controls drawn from?
    apart = torch.eye(40)[:, :39] * 100
    alike = eval_linear.cosine_to_parts(apart, apart, labels)
    assert alike["same image"] == pytest.approx(1) and alike["same class"] < 0.1 and alike["other class"] < 0.1
    by_class = torch.eye(4)[labels] + 0.01 * torch.randn(40, 4, generator=generator)
    alike = eval_linear.cosine_to_parts(by_class, by_class, labels)
    assert alike["same class"] > 0.99 and alike["other class"] < 0


def test_ridge_r2():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 8, generator=generator)
    signal, noise = x @ torch.randn(8, generator=generator), torch.randn(2000, generator=generator)
    targets = torch.stack([signal, signal + signal.std() * noise, noise], 1) + 5
    r2 = eval_linear.ridge_r2(x[:1000], targets[:1000], x[1000:], targets[1000:])
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
    found = eval_linear.locality(Knows(), images, torch.arange(600) // 300, 0.0625, None)
    assert found["patch, h"]["top"] > 0.8 and found["patch, h"]["left"] > 0.8 and found["patch, h"]["brightness"] > 0.8
    assert found["patch, z"]["hue"] < 0.2 and 0.35 < found["patch, z"]["class"] < 0.65  # the classes differ in nothing
    assert "top" not in found["bag of 16, h"] and found["bag of 16, z"]["brightness"] > 0.9
    eval_linear.draw_neighbours(tmp_path / "n.png", Knows(), images[:20], 0.0625, None, queries=3, count=4)
    picture = torchvision.io.read_image(str(tmp_path / "n.png"))
    assert picture.shape == (3, 8 * (3 * (8 + 2 + 1) + 1), 8 * (10 * (8 + 2 + 1) + 1))
    red = (picture[:, ::8, ::8] == torch.tensor([230, 0, 0])[:, None, None]).all(0)
    assert red.sum() == 3 * 2 * (4 * 8 + 4)  # a frame round each of 3 queries, in h and in z


def test_part_similarity_of_one_who_knows_is_one(monkeypatch):
    world = bagssl.demo_world()
    joint, p = world.T @ world / 10, world.mean(0)
    centre = np.eye(24) - 1 / 24
    values, vectors = np.linalg.eigh(centre @ np.log(joint / np.outer(p, p)) @ centre)
    parts = torch.from_numpy(bagssl.demo_images(400, 20, (0, 3))[2]).flatten()
    factor = torch.from_numpy(vectors * np.sqrt(values.clip(0)))
    monkeypatch.setattr(eval_linear, "embed_patches", lambda encoder, patches: [None, factor[parts]])
    expected = np.corrcoef((vectors * values.clip(0) @ vectors.T)[np.triu_indices(24, 1)],
                           np.log(joint / np.outer(p, p))[np.triu_indices(24, 1)])[0, 1]
    assert eval_linear.part_similarity(None, 20) == pytest.approx(expected, abs=1e-6) and expected > 0.8


def test_published_checkpoints_are_one_network(tmp_path, refused):
    torch.manual_seed(0)
    model = torchvision.models.resnet50()
    state = model.state_dict()
    inside = {f"module.backbone.{key}": value for key, value in state.items()}
    wrapped = {"plain": state, "lightning": {"state_dict": inside},
               "vicreg": {"epoch": 3, "model": inside | {"module.projector.0.weight": state["fc.weight"]}},
               "moco": {"state_dict": {f"{prefix}.{key}": value * factor for key, value in state.items()
                                       for prefix, factor in (("encoder", 1), ("momentum_encoder", 2))}}}
    model.fc = torch.nn.Identity()
    # 96 pixels: the last maps are 3 x 3, which torchvision's network and `Conv2d` convolve alike, to the bit.
    x = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(1)).to(memory_format=torch.channels_last)
    expected = model.eval().to(memory_format=torch.channels_last)(x)
    for name, content in wrapped.items():
        torch.save(content, tmp_path / f"{name}.pth")
        backbone, stem_stride = eval_linear.load_published(tmp_path / f"{name}.pth", "resnet50")
        assert stem_stride == 4 and torch.equal(backbone(x), expected), name
    small = bagssl.make_backbone("resnet18", 1).state_dict()
    torch.save({"state_dict": small}, tmp_path / "small.pth")
    assert eval_linear.load_published(tmp_path / "small.pth", "resnet18")[1] == 1
    with pytest.raises(bagssl.UserError, match="no resnet34 .* missing: layer1.2.bn1.bias"):
        eval_linear.load_published(tmp_path / "small.pth", "resnet34")
    torch.save(small | {"layer9.weight": small["conv1.weight"]}, tmp_path / "odd.pth")
    with pytest.raises(bagssl.UserError, match="unexpected: layer9.weight"):
        eval_linear.load_published(tmp_path / "odd.pth", "resnet18")
    assert "give --data, --image-size, --patch-scale" in refused("--checkpoint", tmp_path / "small.pth", "--arch",
                                                                 "resnet18", script=eval_linear)


@pytest.mark.parametrize("show", ["parts", "locality"])
def test_the_other_shows(tiny_run, tmp_path, show):
    (tmp_path / "checkpoint.pt").write_bytes((tiny_run[0] / "run/checkpoint.pt").read_bytes())
    finished = command("--checkpoint", tmp_path / "checkpoint.pt", "--show", show, script="eval_linear.py")
    assert finished.returncode == 0, finished.stderr
    results = json.loads((tmp_path / "eval.jsonl").read_text())["results"]
    if show == "parts":
        assert [row["features"] for row in results][-1] == "untrained, bag of 16" and len(results) == 6
        assert all(-1 <= row["same image"] <= 1 for row in results) and "other class" in finished.stdout
    else:
        assert list(results) == ["patch, h", "patch, z", "bag of 16, h", "bag of 16, z"]
        assert (tmp_path / "neighbours.png").exists() and "brightness" in finished.stdout


def test_a_published_checkpoint_is_probed(tiny_run, tmp_path):
    torch.save(bagssl.make_backbone("resnet18", 1).state_dict(), tmp_path / "resnet18.pth")
    finished = command("--checkpoint", tmp_path / "resnet18.pth", "--arch", "resnet18", "--data", tiny_run[0] / "data",
                       "--image-size", 40, "--patch-scale", 0.1, "--patch-size", 20, "--patches", 1, 4,
                       script="eval_linear.py")
    assert finished.returncode == 0 and "bag of 4" in finished.stdout, finished.stderr


def test_the_demo_learns(tmp_path):
    """Over half of the demo: its bag beats the same network untrained, and one patch, by more than chance moves them."""
    fewer = "import bagssl, eval_linear; bagssl.DEMO_COUNTS.update(pretrain=10_000, test=1000); bagssl.run({}.main)"
    for script, arguments in (("bagssl", ["--preset", "demo", "--out", tmp_path, "--device", "cpu"]),
                              ("eval_linear", ["--checkpoint", tmp_path / "checkpoint.pt", "--patches", "1", "16"])):
        finished = command("-c", fewer.format(script), *arguments, script="", timeout=1200, OMP_NUM_THREADS="2")
        assert finished.returncode == 0, finished.stderr
    top1 = {row["features"]: row["top1"] for row in json.loads((tmp_path / "eval.jsonl").read_text())["results"]}
    assert top1["bag of 16"] > top1["untrained, bag of 16"] + 15, finished.stdout
    assert top1["bag of 16"] > top1["one patch, the centre"] + 25, finished.stdout


@pytest.mark.parametrize("processes", [1, 2])
def test_profile_times_the_parts_and_leaves_nothing(tiny_run, tmp_path, processes):
    arguments = [*TINY, "--data", tiny_run[0] / "data", "--out", tmp_path / "run", "--profile"]
    finished = command(*arguments, launcher=torchrun(processes) if processes > 1 else ())
    assert finished.returncode == 0 and not (tmp_path / "run").exists(), finished.stderr
    shown = {line[:22].strip(): line[22:].split() for line in finished.stdout.splitlines()}
    parts = ["load", "crop + augment", "backbone", "projector", "loss", "backward", "clip + optimiser"]
    parts += ["communication"] * (processes > 1)
    total = float(shown["sum of the parts"][0])
    assert sum(float(shown[part][0]) for part in parts) == pytest.approx(total, abs=0.5)
    assert sum(float(shown[part][1][:-1]) for part in parts) == pytest.approx(100, abs=0.5)
    milliseconds, rate = float(shown["step"][0]), float(shown["step"][1].replace(",", ""))
    assert rate == pytest.approx(8 * 2 / milliseconds * 1e3, rel=0.02) and "step on a ready input" in shown


# --------------------------------------------------------------------------------------------------
# Bad input: one sentence, exit code 2, nothing overwritten


@pytest.mark.parametrize("arguments, sentence", [
    (["--preset", "nonsense"], "no preset 'nonsense'"),
    (["--nonsense", "1"], "--nonsense"),
    (["--lr", "much"], "--lr"),
    (["--preset", "demo", "--arch", "vit"], "no --arch vit"),
    (["--preset", "demo", "--patch-scale", "1.5"], "in (0, 1], not 1.5"),
    (["--preset", "demo", "--patch-scale", "0"], "in (0, 1], not 0"),
    (["--preset", "demo", "--patch-scale", "0.2", "0.8"], "--patch-size"),
    (["--preset", "demo", "--patch-scale", "0.8", "0.2", "--patch-size", "8"], "the low one, then the high one"),
    (["--preset", "demo", "--num-patches", "1"], "--num-patches must be 2 or more"),
    (["--preset", "demo", "--batch-size", "1"], "--batch-size must be 2 or more"),
    (["--preset", "demo", "--image-size", "41"], "multiple of 5"),
    (["--preset", "demo", "--device", "abacus"], "device abacus cannot be used"),
    (["--preset", "demo", "--data", "nowhere"], "no images in nowhere"),
    (["--preset", "imagenet", "--data", "nowhere"], "no images in nowhere"),
    (["--preset", "cifar10-cpu", "--data", "nowhere"], "--preset demo"),
])
def test_bad_arguments(arguments, sentence, tmp_path, monkeypatch, refused):
    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets.utils, "_urlretrieve", no_network)
    monkeypatch.chdir(tmp_path)
    assert sentence in refused(*arguments)
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.json*"))


def test_a_script_that_is_refused_ends_with_code_2(tmp_path):
    for script, arguments in (("bagssl.py", ["--lr", "much"]), ("eval_linear.py", ["--checkpoint", tmp_path / "none.pt"])):
        finished = command(*arguments, script=script)
        assert finished.returncode == 2 and finished.stdout == "" and finished.stderr.count("\n") == 1


def test_bad_images(tmp_path, refused):
    folder = tmp_path / "photos"
    folder.mkdir()
    assert "no images in" in refused(*TINY, "--data", folder, "--out", tmp_path / "run")
    for i in range(12):
        write_image(folder / f"{i:02}.png", seed=i)
    for name in ("bad1.png", "bad2.jpg"):
        (folder / name).write_bytes(b"this is no picture")
    (folder / "link.png").symlink_to("nothing.png")
    sentence = refused(*TINY, "--data", folder, "--out", tmp_path / "run")
    assert "3 of 15 images" in sentence and "bad1.png, bad2.jpg, link.png" in sentence
    for name in ("bad1.png", "bad2.jpg", "link.png"):
        (folder / name).unlink()
    write_image(folder / "small.png", size=(6, 50))
    assert "as small as 6 pixels" in refused(*TINY, "--data", folder, "--out", tmp_path / "run")
    (folder / "small.png").unlink()
    assert "less than one batch of 64" in refused(*TINY, "--data", folder, "--out", tmp_path / "run", "--batch-size", 64)
    finished = command(*TINY, "--data", folder, "--out", tmp_path / "run")  # and a flat folder of photos trains
    assert finished.returncode == 0 and "images: 12 of 40 x 40" in finished.stdout, finished.stderr
    assert "no labels to probe" in refused("--checkpoint", tmp_path / "run/checkpoint.pt", script=eval_linear)


def test_images_that_vanish_or_are_bombs_are_named(tmp_path, monkeypatch):
    for i in range(3):
        write_image(tmp_path / f"photos/{i}.png", seed=i)
    write_image(tmp_path / "photos/one.png", size=(1, 1))
    with pytest.raises(bagssl.UserError, match="as small as 1 pixels"):
        bagssl.load_images("any", tmp_path / "photos", "pretrain", 32, min_side=8)
    write_image(tmp_path / "photos/vast.png", size=(300, 300))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    listing = bagssl.list_images(tmp_path / "photos")
    monkeypatch.setattr(bagssl, "list_images", lambda _: [*listing, ("zzz.png", 1, 1)])
    with pytest.raises(bagssl.UserError, match="2 of 6 images .* vast.png .*decompression bomb.*, zzz.png"):
        bagssl.load_images("any", tmp_path / "photos", "pretrain", 32, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_two_processes_decode_a_folder_at_once(tmp_path):
    pixels = [write_image(tmp_path / f"photos/{i:03}.png", size=(32, 32), seed=i) for i in range(200)]
    code = "import bagssl, sys; print(bagssl.load_images('any', sys.argv[1], 'pretrain', 32)[0].long().sum().item())"
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: command("-c", code, tmp_path / "photos", script=""), range(2)))
    assert all(one.returncode == 0 for one in both), both
    assert [int(one.stdout.split()[-1]) for one in both] == [sum(int(image.sum(dtype=np.int64)) for image in pixels)] * 2
    assert len(list((tmp_path / "photos/.bagssl").iterdir())) == 1


def test_batch_must_divide_among_processes():
    with pytest.raises(bagssl.UserError, match="cannot be shared by 3 processes"):
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
    for name, words in (("none.pt", "no checkpoint at"), ("cut.pt", "damaged"), ("foreign.pt", "not a checkpoint of"),
                        ("bomb.pt", "damaged")):
        assert words in refused("--checkpoint", tmp_path / name, script=eval_linear)
    assert not (tmp_path / "exploded").exists()
    assert "1, 4, 9" in refused("--checkpoint", tmp_path / "cut.pt", "--patches", 5, script=eval_linear)


def test_help_names_every_field():
    shown = command("--help").stdout
    assert all("--" + name.replace("_", "-") in shown for name in bagssl.Config.__dataclass_fields__)
    assert "VICReg authors" in " ".join(shown.split())


def test_readme_links_lead_to_the_code():
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", (HERE / "README.md").read_text())
    assert len(links) > 5
    for name, file, line in links:
        code = (HERE / file).read_text().splitlines()[int(line) - 1]
        assert re.match(rf"(def|class) {name}\b", code), f"{name} is not at {file}:{line}, which says: {code}"


def test_readme_commands_use_flags_that_exist():
    for script in ("bagssl.py", "eval_linear.py"):
        known = re.findall(r"--[\w-]+", command("--help", script=script).stdout)
        used = re.findall(rf"{script}((?: [^\s`&|;]+)*)", (HERE / "README.md").read_text())
        used = {flag for arguments in used for flag in re.findall(r" (--[\w-]+)", arguments)}
        assert len(used) > 3 and used <= set(known), used - set(known)


def test_both_scripts_install_what_requirements_say():
    needed = [line for line in (HERE / "requirements.txt").read_text().split() if not line.startswith("pytest")]
    for script in ("bagssl.py", "eval_linear.py"):
        text = (HERE / script).read_text()
        assert f"# dependencies = {json.dumps(needed)}" in text and text.startswith("# SPDX-License-Identifier: MIT")
