# SPDX-License-Identifier: MIT
"""Tests of BagSSL: each promise against an independent reference. Run: python -m pytest -q -n 2"""

import copy
import functools
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.functional as TF
from PIL import Image
from torch import nn
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.testing import assert_close

import bagssl
import eval_linear

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / ".github"))
import benchmark
import claims
import trials

torch.set_num_threads(1)  # as in `command`: sums in another order are not equal to the bit
TINY = ["--preset", "demo", "--image-size", "40", "--patch-scale", "0.0625", "--batch-size", "8", "--num-patches", "2",
        "--epochs", "15", "--projector", "16", "16", "16", "--lr", "1e-4", "--device", "cpu"]


def command(*arguments, launcher=(), code=0, timeout=300, **environment):
    """Run Python as a user does, in the repository; it must end with the exit code. Returns the finished process."""
    finished = subprocess.run([sys.executable, *launcher, *map(str, arguments)], text=True, capture_output=True,
                              timeout=timeout, stdin=subprocess.DEVNULL, cwd=HERE,
                              env={**os.environ, "OMP_NUM_THREADS": "1", **environment})
    assert finished.returncode == code, finished.stderr
    return finished


def torchrun(processes, *more):
    more = more or ("--standalone",)
    return "-m", "torch.distributed.run", *more, f"--nproc_per_node={processes}", "--no-python", sys.executable


def calling(function, then="bagssl.run_cli(bagssl.main)"):
    """Arguments with which Python calls a function of this file, and then trains."""
    return "-c", f"import bagssl, test_bagssl\ntest_bagssl.{function.__name__}()\n{then}"


@pytest.fixture
def run(monkeypatch, capsys):
    """A function: like `command`, but runs a script's main in this process, or in several under torchrun."""
    def run(*arguments, script=bagssl, code=0, processes=1):
        if processes > 1:
            return command(script.__file__, *arguments, launcher=torchrun(processes), code=code)
        monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            sys.exit(bagssl.run_cli(script.main))
        printed = capsys.readouterr()
        assert (ended.value.code or 0) == code, printed.err
        return types.SimpleNamespace(stdout=printed.out, stderr=printed.err)
    return run


@pytest.fixture
def refused(run):
    """A function: run a script's main here; it must end with exit code 2 and one sentence, which is returned."""
    return lambda *arguments, **options: re.fullmatch("(error: .+)\n", run(*arguments, code=2, **options).stderr)[1]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    torch.set_num_threads(1)


def noise(*shape):
    return torch.randint(256, shape, dtype=torch.uint8)


def write_image(path, size=(40, 40), **options):
    """Write an image of random pixels; returns them, uint8 (3, H, W)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = noise(3, size[1], size[0])
    TF.to_pil_image(pixels).save(path, **options)
    return pixels


def write_classes(folder, count):
    for i in range(count):
        write_image(folder / "ab"[i % 2] / f"{i:02}.png")


# ---------------------------------------------------------------------------------------------------------- Patches


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("scale, size", [(0.1, None), (0.2, 16), ((0.05, 0.7), 7), ((0.05, 0.7), 16),
                                         ((0.05, 1.0), 40)])
def test_patches_agree_with_torchvision(dtype, scale, size):
    """Without a size they are the image's own pixels; between two scales they are uniform in area."""
    images, u = noise(3, 3, 24, 32).to(dtype), torch.rand(3, 50, 3)
    u[0, 0] = 1 - 2 ** -24  # the largest that torch.rand draws
    with torch.autocast("cpu", torch.bfloat16):  # which would round to 8 bits
        patches = bagssl.crop_patches(images, u, scale, size)
    low, high = np.broadcast_to(scale, 2)
    tolerance = 0 if size is None else 0.51 if dtype == torch.uint8 else 0.01  # rounded, not cut off
    assert patches.shape[:2] == (3, 50) and patches.dtype == dtype
    for b, v in itertools.product(range(3), range(50)):
        down, right, area = u[b, v].tolist()
        side = min(24, round(math.sqrt((low + (high - low) * area) * 24 * 32)))
        top, left = int(down * (25 - side)), int(right * (33 - side))
        expected = TF.resized_crop(images[b].float(), top, left, side, side, 2 * [size or side])
        assert_close(patches[b, v].float(), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("scale, size", [(0.0, 4), (-0.1, 4), (1.01, 4), ((0.0, 0.5), 4), ((0.5, 1.2), 4),
                                         ((0.6, 0.3), 4), ((0.2, 0.5), None)])
def test_scales_out_of_range_or_without_a_size_are_refused(scale, size):
    with pytest.raises(ValueError, match="scale" if size else "size"):
        bagssl.crop_patches(torch.zeros(1, 3, 8, 8), torch.rand(1, 2, 3), scale, size)


@pytest.mark.parametrize("per_side, area, top, left", [
    (1, 64, [12], [20]), (1, 1536, [0], [8]),  # the centre
    (2, 64, [4, 20], [8, 32]), (4, 64, [0, 8, 16, 24], [2, 14, 26, 38]),  # the centres of the cells
    (3, 400, [0, 6, 12], [0, 14, 28]), (3, 1536, [0, 0, 0], [0, 8, 16]),  # overlapping ones reach the edges
])
def test_grid_patches(per_side, area, top, left):
    images, side = noise(2, 3, 32, 48), min(32, math.isqrt(area))
    expected = torch.stack([TF.crop(images, y, x, side, side) for y in top for x in left], 1)
    assert torch.equal(bagssl.grid_patches(images, per_side, area / 1536), expected)


# ----------------------------------------------------------------------------------------------------- Augmentation

NEUTRAL = dict(brightness=0, contrast=0, saturation=0, hue=0, jitter_prob=1, gray_prob=0, solarize_prob=0)


@pytest.mark.parametrize("index, strengths, reference", [
    (0, {}, lambda x, u: TF.hflip(x) if u < 0.5 else x),
    (1, dict(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, jitter_prob=0.8), lambda x, u: TF.adjust_hue(
        TF.adjust_saturation(TF.adjust_contrast(TF.adjust_brightness(x, 1.2), 1.2), 1.1), 0.05) if u < 0.8 else x),
    (2, {"brightness": 0.9}, lambda x, u: TF.adjust_brightness(x, 0.1 + 1.8 * u)),
    (3, {"contrast": 0.9}, lambda x, u: TF.adjust_contrast(x, 0.1 + 1.8 * u)),
    (4, {"saturation": 0.9}, lambda x, u: TF.adjust_saturation(x, 0.1 + 1.8 * u)),
    (5, {"hue": 0.5}, lambda x, u: TF.adjust_hue(x, u - 0.5)),
    (6, {"gray_prob": 0.6, "solarize_prob": 0.9}, lambda x, u: TF.solarize(  # grey first
        TF.rgb_to_grayscale(x, 3) if u < 0.6 else x, 0.5)),
    (7, {"solarize_prob": 0.6}, lambda x, u: TF.solarize(x, 0.5) if u < 0.6 else x),
])
def test_augment_agrees_with_torchvision(index, strengths, reference):
    numbers = [0.0, 0.3, 0.5, 0.77, 0.999]
    patches = torch.rand(len(numbers), 3, 9, 9)
    patches[:, :, 0] = patches[:, :1, 0]  # a row of greys, which have no hue
    patches[:, :, 1, 0], patches[:, :, 1, 1] = 0.0, 1.0
    u = torch.full((len(numbers), 8), 0.75)  # no flip; jitter, its four strengths at 0.75; not grey, not solarised
    u[:, index] = torch.tensor(numbers)
    for patch, number, found in zip(patches, numbers, bagssl.augment(patches, u, **(NEUTRAL | strengths))):
        assert_close(found, reference(patch, number), atol=2e-6, rtol=0)


def test_augment_keeps_the_range_and_refuses_other_input():
    assert bagssl.augment.__defaults__ == (0.4, 0.4, 0.2, 0.1, 0.8, 0.2, 0.1)  # the VICReg authors'
    patches = torch.rand(5, 4, 3, 8, 8)
    out = bagssl.augment(patches, torch.rand(5, 4, 8), brightness=0.9, contrast=0.9, saturation=0.9, hue=0.5)
    assert out.shape == patches.shape and out.min() >= 0 and out.max() <= 1
    for wrong in (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.rand(2, 1, 8, 8)):
        with pytest.raises(ValueError, match="augment takes"):
            bagssl.augment(wrong, torch.rand(2, 8))


# ------------------------------------------------------------------------------------------------- Encoder and loss


@pytest.mark.parametrize("arch, width, stride", [("resnet18", 512, 1), ("resnet18", 512, 2), ("resnet18", 512, 4),
                                                 ("resnet34", 512, 1), ("resnet50", 2048, 4)])
def test_a_resnets_backbone_is_torchvisions(arch, width, stride):
    encoder, model = bagssl.Encoder(arch, stride, (8, 9, 10)).eval(), getattr(torchvision.models, arch)().eval()
    x, model.fc = torch.rand(2, 3, 40, 40), nn.Identity()
    if stride < 4:
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, stride, 1, bias=False), nn.Identity()
    model.load_state_dict(encoder.backbone.state_dict())
    h, z = encoder(x)
    assert h.shape == (2, width) and z.shape == (2, 10)
    assert_close(model(x), h)


def test_patchnets_convolutions_begin_by_copying_their_input():
    for layer, stride in zip(bagssl.PatchNet().layers[::3], (2, 2, 1, 1), strict=True):
        x = torch.randn(2, layer.in_channels, 9, 9)
        assert_close(layer(x)[:, :layer.in_channels], x[:, :, ::stride, ::stride])


@pytest.mark.parametrize("side, stride", [(3, 1), (16, 1), (32, 1), (3, 2), (17, 2), (32, 2)])
def test_patchnet_ends_in_a_mean_and_a_layer_beside_it(side, stride):
    net, x = bagssl.PatchNet((8, 12, 16, 20), stride).double().eval(), torch.rand(4, 3, side, side).double()
    mean = net.layers(F.conv2d(x, net.whiten.weight, stride=stride).clamp(min=0)).mean((2, 3))
    layer = (mean @ net.last[0].weight.T / math.sqrt(1 + net.last[1].eps)).clamp(min=0)
    assert_close(net(x), torch.cat([mean, layer], 1))
    assert net.width == 40 and not net.whiten.weight.requires_grad


def test_whitening_makes_blocks_of_pixels_white():
    ramps = torch.arange(30.0) + torch.arange(30.0)[:, None]  # and noise: neighbouring pixels are correlated
    images = (4 * ramps * torch.rand(64, 3, 1, 1) + 20 * torch.rand(64, 3, 30, 30)).to(torch.uint8)
    filters = bagssl.whitening_filters(images, epsilon=1e-6)
    assert filters.shape == (54, 3, 3, 3) and torch.equal(filters[27:], -filters[:27])
    maps = F.conv2d(bagssl.normalize(images).double(), filters[:27].double())
    assert_close(torch.cov(maps.transpose(0, 1).flatten(1)), torch.eye(27).double(), atol=0.01, rtol=0)
    damped = bagssl.whitening_filters(images, epsilon=0.5).flatten(1).norm(dim=1).max()
    assert damped < 1 / math.sqrt(0.5) + 1e-3  # no axis is amplified by more than 1 / sqrt(epsilon)
    many = noise(2000, 3, 32, 32)  # so many that only every second is used
    assert torch.equal(bagssl.whitening_filters(many), bagssl.whitening_filters(many[::2]))


one_graph = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)  # a break raises


def check_that_one_graph_gives_the_same(encoder, x):
    weights, results = [p for p in encoder.parameters() if p.requires_grad], []
    for network in (encoder, one_graph(encoder)):
        h, z = network(x)
        results.append((h, z, *torch.autograd.grad((z * h[:, :8]).sum(), weights)))
    assert_close(*results)


@pytest.mark.parametrize("arch, scale, size", [("resnet18", (0.25,), 0), ("patchnet", (0.08, 1.0), 12)])
def test_views_and_encoder_are_one_graph_each(arch, scale, size):
    config = bagssl.Config(arch=arch, num_patches=2, patch_scale=scale, patch_size=size)
    images, u = noise(4, 3, 16, 16), torch.rand(4, 2, 11)
    x = bagssl.training_views(images, u, config)
    patches = bagssl.crop_patches(images, u[..., :3], scale if size else scale[0], size or None)
    assert_close(x, bagssl.normalize(bagssl.augment(patches / 255, u[..., 3:])).flatten(0, 1))
    assert_close(one_graph(bagssl.training_views)(images, u, config), x)
    check_that_one_graph_gives_the_same(bagssl.Encoder(arch, 1, (8, 8, 8)).double(), x.double())


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


@pytest.mark.parametrize("B, V, D", [(2, 2, 3), (6, 2, 11), (7, 2, 11), (11, 5, 6), (11, 3, 6), (8, 3, 8)])
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype, rtol, atol", [(torch.float64, 1e-10, 1e-12), (torch.float32, 1e-4, 1e-4)])
def test_shares_of_vicreg_loss_average_to_the_mean_over_pairs(B, V, D, processes, dtype, rtol, atol):
    reference = (torch.randn(B, V, D, dtype=torch.float64) * 0.9 + 3).requires_grad_()
    z = reference.detach().to(dtype).requires_grad_()
    shares = [bagssl.vicreg_loss(z, 20.0, 15.0, 2.0, rank=rank, world_size=processes) for rank in range(processes)]
    for loss, terms in shares:
        assert_close(20 * terms["inv"] + 15 * terms["var"] + 2 * terms["cov"], loss.detach())
    loss, expected = sum(loss for loss, _ in shares) / processes, pairwise_vicreg(reference, 20.0, 15.0, 2.0)
    assert_close(loss, expected, rtol=rtol, atol=atol, check_dtype=False)
    assert_close(*torch.autograd.grad(loss, z), *torch.autograd.grad(expected, reference), rtol=rtol, atol=atol,
                 check_dtype=False)
    assert len({terms["cov"].item() for _, terms in shares}) > 1 or processes == 1 or B == 2  # each has a part


def test_vicreg_loss_is_float32_under_autocast():
    z = torch.randn(16, 2, 40).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss, terms = bagssl.vicreg_loss(z.requires_grad_())
    assert torch.equal(loss, bagssl.vicreg_loss(z.float())[0])
    assert loss.requires_grad and not any(term.requires_grad for term in terms.values())


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
    torch.manual_seed(0)
    classes = torch.rand(4, 12, dtype=torch.float64) ** 6
    classes = classes / classes.sum(1, keepdim=True)
    counts = (1000 * classes.T @ classes).round().long()
    pairs = torch.cartesian_prod(torch.arange(12), torch.arange(12)).repeat_interleave(counts.flatten(), 0)
    joint = counts / counts.sum().double()
    p = joint.sum(1)
    values, vectors = torch.linalg.eigh(joint / (p[:, None] * p).sqrt())
    assert values.flip(0)[[0, 3, 4]].tolist() == pytest.approx([1, 0.48, 0.01], abs=0.01)  # trivial, three, rest
    return pairs, joint, p, values.flip(0), vectors.flip(1)


def minimise(function, width):
    z = torch.randn(12, width, dtype=torch.float64).requires_grad_()
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
def test_the_papers_loss_finds_the_best_low_rank_co_occurrence(small_world, width):
    """Theory, not code: at the least L_S with w = 0.7, w U U^T, U = sqrt(p) z, is the truncated eigendecomposition."""
    _, joint, p, values, vectors = small_world
    z = minimise(lambda z: 0.7 / 2 * (z.T @ (p[:, None] * z)).square().sum() - (joint * (z @ z.T)).sum(), width)
    best = (vectors * values)[:, :width] @ vectors[:, :width].T
    assert_close(0.7 * (p[:, None] * p).sqrt() * (z @ z.T), best, rtol=0, atol=1e-6)


@pytest.mark.parametrize("width", [1, 2, 3])
def test_vicreg_spans_the_leading_eigenvectors_of_co_occurrence(small_world, width):
    """The covariance weight must keep two dimensions from sharing an eigenvector; the default, 1, is too small here."""
    pairs, _, p, _, vectors = small_world
    z = minimise(lambda z: bagssl.vicreg_loss(z[pairs], cov_weight=25.0)[0], width)
    found = torch.linalg.qr(p.sqrt()[:, None] * (z - p @ z)).Q
    cosines = torch.linalg.svdvals(found.T @ vectors[:, 1:width + 1])  # 0 is the trivial one, which centring removes
    assert math.degrees(cosines.min().clamp(max=1).acos()) < 0.01


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("per_side, scale, size", [(1, 0.25, None), (3, 0.25, None), (2, 0.5, 12), (1, 1.0, None)])
def test_bag_is_the_mean_over_a_loop_also_in_blocks(chunk, per_side, scale, size, monkeypatch):
    monkeypatch.setattr(bagssl, "has_bf16", lambda device: False)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).requires_grad_(False)
    images, sizes, cut = noise(5, 3, 20, 24), [], Mock(wraps=bagssl.grid_patches)
    monkeypatch.setattr(bagssl, "grid_patches", cut)
    backbone.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    bag = bagssl.BagOfPatches(backbone, per_side, scale, size, chunk)
    whole, blocks = bag(images), eval_linear.embed(bag, images, torch.device("cpu"), block=3)
    assert max(sizes) <= chunk
    assert max(len(call.args[0]) for call in cut.call_args_list) <= max(1, chunk // per_side ** 2)
    patches = bagssl.normalize(bagssl.grid_patches(images, per_side, scale, size))
    expected = torch.stack([sum(backbone(patch[None])[0] for patch in its_patches) for its_patches in patches])
    for found in (whole, blocks) if size else (whole, blocks, bag(images / 255)):  # bytes are rounded when resized
        assert_close(found, expected / per_side ** 2, atol=1e-5, rtol=1e-4)


# ----------------------------------------------------------------------------------------------------------- Images


def test_folder_is_decoded_once_and_a_change_is_noticed(tmp_path, monkeypatch):
    load = functools.partial(bagssl.load_images, "any", tmp_path, image_size=40)
    paths = [tmp_path / f"train/{name}/{i}.png" for name in ("cat", "dog") for i in range(3)]
    pixels = torch.stack([write_image(path) for path in paths])
    wide = write_image(tmp_path / "val/dog/0.png", size=(60, 40))
    images, labels = load("train")
    assert torch.equal(images, pixels) and labels.tolist() == [0, 0, 0, 1, 1, 1]
    test, labels = load("test")
    assert torch.equal(test[0], TF.center_crop(wide, 40)) and labels.tolist() == [1]

    with monkeypatch.context() as patch:
        patch.setattr(bagssl, "decode_image", lambda *_: pytest.fail("decoded again"))
        assert torch.equal(load("train")[0], pixels)
        assert load("pretrain")[1].tolist() == [0, 0, 0, 1, 1, 1]
    write_image(tmp_path / "train/unsorted.png")
    assert load("pretrain")[1] is None  # not every image has a class
    (tmp_path / "train/unsorted.png").unlink()
    pixels[0] = write_image(paths[0])
    assert torch.equal(load("train")[0], pixels)


def test_folders_of_one_name_are_apart_in_a_shared_cache(tmp_path):
    pixels = {name: write_image(tmp_path / name / "photos/one.png") for name in "ab"}
    for name in "abab":
        found, _ = bagssl.load_images("any", tmp_path / name / "photos", "pretrain", 40, cache=tmp_path / "cache")
        assert torch.equal(found[0], pixels[name])
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
    wide, alpha, grey, _, _, scan, turned = images  # by name
    assert (alpha == 255).all() and (grey == 90).all() and (scan == 180).all()
    assert turned[2, 0].min() > 200 and turned[0, -1].min() > 200
    with Image.open(tmp_path / "a/b/c/d/wide.jpg") as photo:
        assert torch.equal(wide, TF.pil_to_tensor(TF.center_crop(TF.resize(photo, 32), 32)))


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network, in an empty folder."""
    monkeypatch.setattr("urllib.request.urlopen", Mock(side_effect=OSError("no network")))
    monkeypatch.chdir(tmp_path)


def test_torchvisions_files_are_read_and_missing_ones_refused(tmp_path, offline, monkeypatch, capsys):
    (tmp_path / "data/cifar10").mkdir(parents=True)  # left by an interrupted download
    with pytest.raises(bagssl.UserError, match="no CIFAR10 in data/cifar10, .* be downloaded .* --preset demo"):
        bagssl.load_images("cifar10", "", "test")
    rows, labels, folder = noise(5, 3072), [3, 1, 4, 1, 5], tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (folder / name).write_bytes(pickle.dumps({"data": rows.numpy(), "labels": labels}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    for split in ("train", "pretrain"):
        images, found = bagssl.load_images("cifar10", tmp_path, split, 32)
        assert torch.equal(images, rows.unflatten(1, (3, 32, 32)).repeat(5, 1, 1, 1)) and found.tolist() == 5 * labels
        assert f"25 ({split}) from CIFAR10, torchvision's files in {tmp_path}" in capsys.readouterr().out
    assert bagssl.load_images("cifar10", tmp_path, "test", 40)[0].shape == (5, 3, 40, 40)
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", lambda *_, **__: [(Image.new("L", (28, 28), 10), 4)])
    grey, _ = bagssl.load_images("fashionmnist", tmp_path, "train", 28)
    assert grey.shape == (1, 3, 28, 28) and (grey == 10).all()
    stl10 = {"train": [(Image.new("RGB", (96, 96)), 4)], "train+unlabeled": 2 * [(Image.new("RGB", (96, 96)), -1)]}
    monkeypatch.setattr(torchvision.datasets, "STL10", lambda folder, split, download: stl10[split])
    assert bagssl.load_images("stl10", tmp_path, "train", 32)[1].tolist() == [4]
    config = bagssl.Config(dataset="stl10", data=tmp_path, batch_size=2)
    images, found = bagssl.training_images(config, torch.device("cpu"))
    assert images.shape == (2, 3, 32, 32) and found is None  # nothing for the online probe to learn


def test_no_other_images_than_those_named(tmp_path, offline, capsys):
    """--data without images is an error, and without --data no stray photo is trained on."""
    load = functools.partial(bagssl.load_images, "cifar10", split="pretrain", image_size=32)
    (tmp_path / "heic").mkdir()
    (tmp_path / "heic/photo.heic").write_bytes(b"")
    with pytest.raises(bagssl.UserError, match="no images in heic .looked for CIFAR10 .*.jpg.*--data"):
        load("heic")  # and no download is tried, which would be told
    write_image(tmp_path / "data/holidays/photo.png")
    with pytest.raises(bagssl.UserError, match="could not be downloaded"):
        load("")
    write_image(tmp_path / "data/cifar10/train/shirt/1.png")
    for path in ("", "data/holidays", "data"):  # the last: data/cifar10, not all of data
        assert len(load(path)[0]) == 1
    assert "images:  1 (pretrain) from data/cifar10" in capsys.readouterr().out


def test_decoding_a_folder_twice_at_once_leaves_one_file(tmp_path, monkeypatch):
    """Both finish, one file stays, and it is never replaced: on a network file system its readers would lose it."""
    pixels = [write_image(tmp_path / f"photos/{i:03}.png", size=(32, 32)) for i in range(20)]
    both, decode = threading.Barrier(2, timeout=60), bagssl.decode_image

    def together(path, size):
        if path.name == "019.png":
            both.wait()
        return decode(path, size)

    monkeypatch.setattr(bagssl, "decode_image", together)
    with ThreadPoolExecutor(2) as pool:
        for images, _ in pool.map(lambda _: bagssl.load_images("any", tmp_path / "photos", "pretrain", 32), range(2)):
            assert torch.equal(images, torch.stack(pixels))
    cached, = (tmp_path / "photos/.bagssl").iterdir()
    inode = cached.stat().st_ino

    def late(path, size):  # the other process's file appears while this one decodes
        if path.name == "000.png":  # once, though several threads decode
            (tmp_path / "kept").rename(cached)
        return decode(path, size)

    monkeypatch.setattr(bagssl, "decode_image", late)
    cached.rename(tmp_path / "kept")
    bagssl.load_images("any", tmp_path / "photos", "pretrain", 32)
    assert cached.stat().st_ino == inode and len(list(cached.parent.iterdir())) == 1


def test_unreadable_or_too_few_images_are_refused(tmp_path, refused, run, monkeypatch):
    folder = tmp_path / "photos"
    arguments = [*TINY, "--data", folder, "--out", tmp_path / "run"]
    for i in range(12):
        write_image(folder / f"{i:02}.png")
    for name in ("bad1.png", "bad2.jpg"):
        (folder / name).write_bytes(b"this is no picture")
    Image.fromarray(np.full((40, 40), 0.5, np.float32)).save(folder / "float.tif")
    (folder / "link.png").symlink_to("nothing.png")
    write_image(folder / "vast.png", size=(300, 300))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    sentence = refused(*arguments)
    assert "5 of 17 images" in sentence and "bad1.png (UnidentifiedImageError), bad2.jpg" in sentence
    assert "float.tif (ValueError), link.png (FileNotFoundError), vast.png (DecompressionBombError)" in sentence
    assert not list((folder / ".bagssl").iterdir())
    for name in ("bad1.png", "bad2.jpg", "float.tif", "link.png", "vast.png"):
        (folder / name).unlink()
    with monkeypatch.context() as context:  # looked at first, as writing a memory map would end the process
        context.setattr(shutil, "disk_usage", lambda _: Mock(free=12 * 3 * 40 * 40 - 1))
        assert "cannot write decoded images" in refused(*arguments)
    assert "fewer than one batch of 64" in refused(*arguments, "--batch-size", 64)
    cache = tmp_path / "cache"
    assert f"images:  12 (pretrain) from {folder}" in run(*arguments, "--cache", cache).stdout  # a flat folder trains
    assert len(list(cache.iterdir())) == 1
    assert "has no labelled images" in refused("--checkpoint", tmp_path / "run/checkpoint.pt", script=eval_linear)


def test_reading_leaves_the_threads_to_training(monkeypatch):
    used = []

    def watched(function):
        return lambda *arguments, **named: used.append(torch.get_num_threads()) or function(*arguments, **named)

    for name in ("index_select", "randperm"):
        monkeypatch.setattr(torch, name, watched(getattr(torch, name)))
    torch.set_num_threads(2)
    torch.ones(2 ** 16)  # at its first large operation a thread takes on the number
    images, config = torch.zeros(8, 3, 4, 4, dtype=torch.uint8), bagssl.Config(batch_size=4)
    assert len(list(bagssl.batches(images, None, config, slice(None), torch.device("cpu"), 0, 2))) == 2
    assert torch.get_num_threads() == 2 and len(used) >= 3 and set(used) == {1}


@pytest.mark.skipif(sys.platform != "linux", reason="about glibc's malloc")
def test_freed_memory_is_used_again_without_page_faults():
    program = ("import resource, torch, bagssl; bagssl.start_process('cpu'); print([([torch.ones(2 ** 22) for _ in "
               "range(8)], resource.getrusage(resource.RUSAGE_SELF).ru_minflt)[1] for _ in range(20)])")
    faults = json.loads(command("-c", program).stdout)
    assert faults[-1] - faults[9] < 32_768  # in ten rounds, fewer than one round's eight tensors have pages


def test_a_signal_while_decoding_leaves_nothing_behind(tmp_path, run, monkeypatch):
    write_image(tmp_path / "photos/0.png")
    monkeypatch.setattr(bagssl, "decode_image", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    run(*TINY, "--data", tmp_path / "photos", "--out", tmp_path / "run", code=143)
    assert not list((tmp_path / "photos/.bagssl").iterdir())


def test_demo_parts_have_the_probabilities_of_their_classes(monkeypatch):
    images, labels, parts = bagssl.demo_images(20_000, 5, seed=3)  # cells of one pixel: the drawing is not needed
    world = bagssl.demo_probabilities()
    assert world.shape == (10, 24) and np.allclose(world.sum(1), 1)
    for label in range(10):
        drawn = np.bincount(parts[labels == label].ravel(), minlength=24) / (25 * (labels == label).sum())
        assert np.abs(drawn - world[label]).max() < 0.01
    guess = world.argmax(0)[parts[:, 2, 2]]  # the best guess from one part
    assert abs((guess == labels).mean() - 0.575) < 0.015
    evidence = np.log(world)[:, parts.reshape(len(parts), -1)].sum(-1).argmax(0)
    assert (evidence == labels).mean() > 0.98
    monkeypatch.setattr(bagssl, "render_part", lambda part, *_: part)
    images, _, parts = bagssl.demo_images(9, 15, seed=3)
    assert np.array_equal(images, parts.repeat(3, 1).repeat(3, 2)[:, None].repeat(3, 1))  # cells of 3 x 3 pixels
    monkeypatch.undo()
    small, again = (bagssl.demo_images(4, 80, seed=3)[0] for _ in range(2))
    assert np.array_equal(small, again) and small.shape == (4, 3, 80, 80) and small.std() > 20
    monkeypatch.setattr(bagssl, "DEMO_COUNTS", dict.fromkeys(bagssl.DEMO_COUNTS, 4))
    drawn = [bagssl.load_images("demo", "", split, 10, seed=seed)[0] for split in ("train", "test") for seed in (0, 1)]
    drawn += [bagssl.training_images(bagssl.Config(dataset="demo", image_size=10, batch_size=2, seed=seed),
                                     torch.device("cpu"))[0] for seed in (0, 1)]
    assert len({images.sum().item() for images in drawn}) == 6  # each split and seed has images of its own


# ------------------------------------------------------------------------------------------------------------- Runs


def test_each_seed_purpose_and_step_draws_its_own_numbers():
    first = {tuple(torch.rand(2, generator=bagssl.generator_for(*key)).tolist())
             for key in itertools.product(range(4), ("order", "patches"), range(50))}
    assert len(first) == 400


def test_effective_rank_is_exp_of_the_singular_values_entropy():
    q = torch.linalg.qr(torch.randn(400, 6, dtype=torch.float64)).Q
    q = torch.linalg.qr(q - q.mean(0)).Q.float()  # orthonormal and of mean 0
    share = torch.arange(1, 7) / 21
    assert bagssl.effective_rank(q * share + 5) == pytest.approx(torch.special.entr(share).sum().exp().item(), rel=1e-3)
    collapsed = torch.randn(500, 1) @ torch.randn(1, 500)
    assert abs(bagssl.effective_rank(collapsed + 1e-6 * torch.randn(500, 500)) - 1) < 0.01


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """A folder of small images, and a run of 45 steps on them."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    data, out = folder / "data", folder / "run"
    write_classes(data / "train", 24)
    write_classes(data / "test", 24)
    printed = command("bagssl.py", *TINY, "--data", data, "--out", out).stdout
    return types.SimpleNamespace(data=data, out=out, checkpoint=out / "checkpoint.pt", printed=printed)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def tiny(tiny_run, out):
    """The arguments of the same run in another folder."""
    return [*TINY, "--data", tiny_run.data, "--out", out]


def read_log(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def losses(run, every=10, key="loss"):
    """The logged losses, or another key's numbers; each step must be in the log once."""
    _, *entries = read_log(run)
    steps = [entry["step"] for entry in entries]
    assert steps == [*range(every, steps[-1], every), steps[-1]]
    return [entry[key] for entry in entries]


def saved_step(run):
    return bagssl.load_checkpoint(run / "checkpoint.pt")[0]["step"]


def same_weights(run, other):
    one, two = (torch.load(folder / "backbone.pt", weights_only=True) for folder in (run, other))
    return all(torch.equal(one[name], two[name]) for name in one)


def before_steps(monkeypatch, steps, action):
    """Call an action just before some steps, counted from 1."""
    views, count = bagssl.training_views, itertools.count(1)
    monkeypatch.setattr(bagssl, "training_views", lambda *arguments, **settings: (
        next(count) in steps and action(), views(*arguments, **settings))[1])


def test_a_run_leaves_a_log_a_checkpoint_and_a_backbone(tiny_run):
    first, *log = read_log(tiny_run.out)
    settings = first["config"]
    assert settings["epochs"] == 15 and settings["patch_scale"] == [0.0625]
    for entry in log:
        terms = sum(settings[f"{name}_weight"] * entry[name] for name in ("inv", "var", "cov"))
        assert math.isclose(entry["loss"], terms, rel_tol=1e-4)
    assert {"patches_per_s", "effective_rank"} <= log[-1].keys()
    for words in (f"images:  24 .pretrain. from {tiny_run.data}\n", "2 patches of 10 x 10 each", "45/45",
                  r"probe \d+\.\d %", r"eval_linear\.py"):
        assert re.search(words, tiny_run.printed)
    encoder, _ = bagssl.load_encoder(tiny_run.checkpoint)
    net = bagssl.PatchNet().eval()
    net.load_state_dict(torch.load(tiny_run.out / "backbone.pt", weights_only=True))
    x = torch.rand(2, 3, 16, 16)
    assert_close(net(x), encoder(x)[0], rtol=1e-4, atol=1e-5)


def test_training_is_this_loop(tiny_run, out, run, monkeypatch):
    """Every number logged, and the last weights, against the method written out; the optimiser is written by hand."""
    monkeypatch.setattr(bagssl, "LOG_EVERY", 1)
    monkeypatch.setattr(bagssl, "has_bf16", lambda device: False)  # whose rounding would hide mistakes
    run(*TINY, "--data", tiny_run.data, "--out", out, "--epochs", 2, "--lr", 0.01, "--clip", 40, "--weight-decay", 0.1,
        "--seed", 3, "--inv-weight", 10, "--var-weight", 20, "--cov-weight", 3)
    images, labels = bagssl.load_images("any", tiny_run.data, "pretrain", 40)
    torch.manual_seed(3)
    encoder = bagssl.Encoder("patchnet", 1, (16, 16, 16))
    encoder.backbone.whiten.weight.copy_(bagssl.whitening_filters(images))
    probe = bagssl.OnlineProbe(encoder.backbone.width, 2)
    weights = [p for p in encoder.parameters() if p.requires_grad]
    first, momenta, log = [p.detach().clone() for p in weights], [0] * len(weights), read_log(out)[1:]
    for step, entry in enumerate(log):
        epoch, i = divmod(step, 3)
        chosen = torch.randperm(24, generator=bagssl.generator_for(3, "order", epoch))[8 * i:8 * i + 8]
        u = torch.rand(8, 2, 11, generator=bagssl.generator_for(3, "patches", step))
        patches = bagssl.augment(bagssl.crop_patches(images[chosen], u[..., :3], 0.0625) / 255, u[..., 3:])
        h, z = encoder(bagssl.normalize(patches).flatten(0, 1))
        loss = pairwise_vicreg(z.unflatten(0, (8, 2)), 10.0, 20.0, 3.0)
        gradients = torch.autograd.grad(loss, weights)
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
        for k, (p, gradient) in enumerate(zip(weights, gradients)):
            gradient = gradient * min(1, 40 / norm) + (0.1 * p.detach() if p.ndim > 1 else 0)
            momenta[k] = 0.9 * momenta[k] + gradient
            p.data -= entry["lr"] * (gradient + 0.9 * momenta[k])  # the rate itself is tested below
        guesses = probe(h.unflatten(0, (8, 2)), labels[chosen])
        found = [entry[key] for key in ("loss", "gradient_norm", "clipped", "probe_top1")]
        assert found == pytest.approx([loss.item(), norm, float(norm > 40), guesses.item()], rel=1e-2)
    assert len(log) == 6 and {entry["clipped"] for entry in log} == {0, 1}
    trained = [p for p in bagssl.load_encoder(out / "checkpoint.pt")[0].parameters() if p.requires_grad]
    for found, p, start in zip(trained, weights, first, strict=True):
        assert (found - p).norm() < 0.02 * (p - start).norm()


def test_the_online_probe_learns_from_the_mean_embedding():
    probe, labels = bagssl.OnlineProbe(16, 4), torch.arange(200) % 4
    h = torch.randn(200, 3, 16) + 2 * torch.randn(4, 16)[labels][:, None]
    mean, linear = h.double().mean(1), probe.layers[1]
    scores = (mean - mean.mean(0)) / mean.std(0, correction=0) @ linear.weight.double().T + linear.bias
    expected = 100 * (scores.argmax(1) == labels).double().mean().item()
    assert probe(h.requires_grad_(), labels).item() == pytest.approx(expected)
    for _ in range(200):
        accuracy = probe(h, labels)
    assert accuracy > 95 and h.grad is None


def test_the_online_probe_changes_no_weight(tiny_run, tiny, out, run, monkeypatch):
    usual = bagssl.training_images
    monkeypatch.setattr(bagssl, "training_images", lambda *arguments: (usual(*arguments)[0], None))
    assert not re.search(r"probe \d", run(*tiny).stdout)
    assert "probe_top1" not in (out / "log.jsonl").read_text()
    assert same_weights(out, tiny_run.out)
    monkeypatch.undo()
    assert "at step 45 of 48" in run(*tiny, "--epochs", 16).stdout  # now with labels, and a probe
    assert "probe_top1" in read_log(out)[-1]


def test_the_learning_rate_warms_up_and_falls_as_a_cosine(tiny, out, run, monkeypatch):
    encoders = Mock(wraps=bagssl.Encoder)
    monkeypatch.setattr(bagssl, "Encoder", encoders)
    monkeypatch.setattr(bagssl, "LOG_EVERY", 1)
    run(*tiny, "--epochs", 10, "--lr", 1e-3, "--warmup", 0.3, "--arch", "resnet18", "--stem-stride", 2)
    assert losses(out, every=1, key="lr") == pytest.approx(
        [1e-3 * min(1, (i + 1) / (9 + 1)) * math.cos(math.pi * i / 60) ** 2 for i in range(30)])
    bagssl.load_encoder(out / "checkpoint.pt")
    assert {call.args for call in encoders.call_args_list} == {("resnet18", 2, (16, 16, 16))}
    bagssl.make_backbone("resnet18", 2).load_state_dict(torch.load(out / "backbone.pt", weights_only=True))


def test_a_finished_run_is_left_alone_and_another_is_refused(tiny_run, tiny, tmp_path, refused, run, monkeypatch):
    before = {path.name: path.read_bytes() for path in tiny_run.out.iterdir()}
    again = [*tiny, "--out", tiny_run.out]
    assert "complete (give more --epochs, or another --out" in run(*again).stdout
    sentence = refused(*again, "--lr", 0.5)
    assert "another config" in sentence and "lr was 0.0001, is 0.5" in sentence
    with monkeypatch.context() as context:
        context.setattr(bagssl, "training_images", lambda *_: (noise(32, 3, 40, 40), None))
        assert "a run of 3 steps per epoch, not 4: the number of images has changed" in refused(*again)
        context.setattr(bagssl, "training_images", lambda *_: (noise(24, 3, 40, 40), torch.arange(24) % 3))
        assert "on another number of classes" in refused(*again)
    assert before == {path.name: path.read_bytes() for path in tiny_run.out.iterdir()}
    (tmp_path / "precious.txt").write_text("mine")
    assert "holds no run" in refused(*tiny, "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_a_run_goes_on_to_more_epochs(tiny_run, tiny, out, run, refused):
    shutil.copytree(tiny_run.out, out)
    with open(out / "log.jsonl", "a") as log:  # what a kill after the last checkpoint leaves
        log.write('{"step": 50}\n{"step": 60, "lo')
    assert "at step 45 of 60" in run(*tiny, "--epochs", 20).stdout
    header, *entries = read_log(out)
    assert header["config"]["epochs"] == 20
    assert [entry["step"] for entry in entries] == [10, 20, 30, 40, 45, 50, 60]
    assert entries[-2]["lr"] == pytest.approx(1e-4 * math.cos(math.pi * 49 / 60 / 2) ** 2)  # step 50 of 60, not of 45
    assert saved_step(out) == 60 and not same_weights(out, tiny_run.out)
    assert "epochs was 20, is 19" in refused(*tiny, "--epochs", 19)


def train_and_look_at_every_step(*arguments):
    sys.argv[1:], bagssl.LOG_EVERY = map(str, arguments), 1
    bagssl.run_cli(bagssl.main)


def test_killed_at_random_moments_a_run_ends_as_if_it_had_not_been(tiny_run, tiny, out, monkeypatch, run):
    context = multiprocessing.get_context("forkserver")  # whose children import nothing, so that they start fast
    context.set_forkserver_preload(["test_bagssl"])

    def checkpoint_inode():
        return (out / "checkpoint.pt").exists() and (out / "checkpoint.pt").stat().st_ino

    for delay in np.random.default_rng(0).uniform(0, 0.02, 10):  # a time that includes the writing of checkpoints
        before = checkpoint_inode()
        child = context.Process(target=train_and_look_at_every_step, args=(*tiny, "--save-every", 0))
        child.start()
        while child.is_alive() and checkpoint_inode() in (False, before):  # until it has saved one
            time.sleep(0.01)
        time.sleep(delay)
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
    monkeypatch.setattr(bagssl, "LOG_EVERY", 1)
    run(*tiny)
    assert same_weights(out, tiny_run.out) and not list(out.glob(".*"))  # no half-written checkpoint is left
    means = [np.mean(losses(out, every=1)[i:i + 10]) for i in range(0, 45, 10)]
    assert means == pytest.approx(losses(tiny_run.out), rel=1e-6)


def test_the_saved_statistics_are_of_patches_not_augmented(tiny_run):
    """Those of the first normalisation, against a loop over the patches of 100 steps, more than the run's 45."""
    encoder, c = bagssl.load_encoder(tiny_run.checkpoint)
    images, _ = bagssl.load_images(c.dataset, c.data, "pretrain", c.image_size)
    convolution, normalisation, *_ = encoder.backbone.layers
    means, variances = [], []
    for step in range(100):
        epoch, batch = divmod(step, len(images) // c.batch_size)
        order = torch.randperm(len(images), generator=bagssl.generator_for(c.seed, "order", epoch))
        chosen = images[order[batch * c.batch_size:(batch + 1) * c.batch_size]]
        u = torch.rand(c.batch_size, c.num_patches, 11, generator=bagssl.generator_for(c.seed, "patches", step))
        patches = bagssl.normalize(bagssl.crop_patches(chosen, u[..., :3], c.patch_scale[0]).flatten(0, 1))
        maps = convolution(encoder.backbone.whiten(patches).relu()).detach().double().transpose(0, 1).flatten(1)
        means.append(maps.mean(1))
        variances.append(maps.var(1))
    deviation = normalisation.running_var.double().sqrt()
    assert ((normalisation.running_mean - sum(means) / 100) / deviation).abs().max() < 0.01  # bfloat16's rounding
    assert (normalisation.running_var / (sum(variances) / 100) - 1).abs().max() < 0.01


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_with_a_checkpoint(tiny_run, tiny, out, number, code, monkeypatch, run):
    before_steps(monkeypatch, (12, 13), lambda: os.kill(os.getpid(), number))  # torchrun repeats the terminal's signal
    usual = signal.getsignal(number)
    run(*tiny, code=code)
    assert saved_step(out) == 20 and len(losses(out)) == 2
    assert signal.getsignal(number) == usual and not (out / "backbone.pt").exists()
    assert "at step 20 of 45" in run(*tiny).stdout
    for key in ("loss", "probe_top1"):
        assert losses(out, key=key) == losses(tiny_run.out, key=key)
    assert same_weights(out, tiny_run.out)


def slow_checkpoints_down():
    save = torch.save
    torch.save = lambda *arguments: (time.sleep(1), save(*arguments))


@pytest.mark.parametrize("terminal", [True, False])
def test_a_signal_under_torchrun_waits_for_a_slow_checkpoint(tiny, out, terminal):
    """Ctrl-C reaches all processes at once and torchrun passes it on; a cluster's SIGTERM reaches torchrun alone."""
    arguments = [*torchrun(2), *calling(slow_checkpoints_down), *tiny, "--epochs", 1500]
    job = subprocess.Popen([sys.executable, *map(str, arguments)], start_new_session=True, cwd=HERE, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    log = out / "log.jsonl"
    for _ in range(1000):
        if job.poll() is not None or (log.exists() and log.read_text().count("\n") > 1):
            break
        time.sleep(0.1)
    os.killpg(job.pid, signal.SIGINT) if terminal else os.kill(job.pid, signal.SIGTERM)
    printed = job.communicate(timeout=100)[0]
    assert job.returncode != 0 and "and saved; the same command continues" in printed, printed
    assert saved_step(out) == 10 * len(losses(out))
    assert not list(out.glob(".*"))


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_bad_numbers_stop_a_run_and_leave_its_checkpoint(tiny, out, what, monkeypatch, run):
    forward, steps = bagssl.Encoder.forward, itertools.count(1)

    def bad_in_step_33(encoder, x):
        bad = what if next(steps) == 33 else None
        h, z = forward(encoder, x * math.nan if bad == "loss" else x)
        if bad == "gradient":
            z.register_hook(lambda gradient: gradient * math.nan)
        return h, z

    monkeypatch.setattr(bagssl.Encoder, "forward", bad_in_step_33)
    told = run(*tiny, "--save-every", 0, code=1).stderr
    assert "the loss or its gradient is not finite in steps 31 to 40" in told
    assert "--lr" in told and told.count("\n") == 1 and saved_step(out) == 30


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")])
def test_too_little_memory_is_a_sentence(tiny, monkeypatch, refused, error):
    monkeypatch.setattr(bagssl, "training_views", Mock(side_effect=error))
    told = refused(*tiny)
    assert "out of memory" in told and "--batch-size" in told and "--num-patches" in told


def test_a_missing_compiler_is_a_sentence(tiny, tmp_path):
    told = command(bagssl.__file__, *tiny, "--compile", "yes", code=2, CXX="missing",
                   TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "compiled")).stderr
    assert told.count("\n") == 1 and "C++ compiler" in told and "--compile no" in told


def test_collapse_is_warned_of_once_and_times_are_right(tiny, out, monkeypatch, run):
    """A step takes 11 seconds of this clock: every one is shown, and after six of them a checkpoint is due."""
    monkeypatch.setattr(bagssl, "LOG_EVERY", 1)
    steps, forward, save = [], bagssl.Encoder.forward, Mock(wraps=bagssl.save_atomically)
    monkeypatch.setattr(bagssl, "time", types.SimpleNamespace(monotonic=lambda: 11.0 * len(steps)))
    monkeypatch.setattr(bagssl, "save_atomically", save)

    def collapsed(encoder, x):
        steps.append(0)
        return torch.ones(len(x), 2048), forward(encoder, x)[1]

    monkeypatch.setattr(bagssl.Encoder, "forward", collapsed)
    told = run(*tiny, "--epochs", 4, "--save-every", 1).stderr
    assert told.count("warning") == 1 and "at step 2" in told and "--lr" in told
    assert [call.args[0].name for call in save.call_args_list].count("checkpoint.pt") == 2  # after step 6, and the last
    assert "step 13/15  0:00:22 left" in run(*tiny, "--epochs", 5).stdout
    assert losses(out, every=1, key="patches_per_s") == pytest.approx(15 * [8 * 2 / 11])


@pytest.mark.parametrize("failing, saved", [(3, 20), (5, 40)])  # at the checkpoint of step 30; at backbone.pt
def test_a_full_disk_is_told_and_what_was_saved_stays(tiny_run, tiny, out, failing, saved, monkeypatch, refused, run):
    save, saves = torch.save, itertools.count(1)

    def until_full(content, file):
        if next(saves) == failing:
            file.write(b"half a file")
            raise OSError("No space left")
        save(content, file)

    monkeypatch.setattr(torch, "save", until_full)
    told = refused(*tiny, "--save-every", 0)
    assert "No space left" in told and "cannot write" in told and saved_step(out) == saved
    assert {path.name for path in out.iterdir()} == {"checkpoint.pt", "log.jsonl"}
    with monkeypatch.context() as context:
        full = Mock(write=Mock(side_effect=OSError("No space left")))
        context.setattr(bagssl, "open", lambda path, mode, **_: full if mode == "a" else open(path, mode),
                        raising=False)
        told = refused(*tiny)
    assert "No space left" in told and "log.jsonl" in told and saved_step(out) == saved
    assert f"at step {saved} of 45" in run(*tiny).stdout and same_weights(out, tiny_run.out)
    assert "cannot write" in refused(*tiny, "--out", out / "log.jsonl/run")


# -------------------------------------------------------------------------------------------------------- Processes


def prepare_a_comparison():
    """float32, as bfloat16 would hide differences. Only a node's first process may look for images."""
    bagssl.has_bf16 = lambda device: False
    if bagssl.LOCAL_RANK > 0:
        bagssl.find_images = None
    compiler = torch.compile
    torch.compile = lambda part: compiler(part, backend="aot_eager")  # needs no C++ compiler


def test_processes_train_as_one_on_two_nodes_or_compiled(tmp_path):
    """1 process, 2 on each of 2 nodes, and 2 compiled: 21 steps of 32 images, losses equal to 1e-5, weights to 1e-4."""
    write_classes(tmp_path / "data/train", 96)

    def train(name, launcher=(), compiled="no"):
        return command(*calling(prepare_a_comparison), *TINY, "--data", tmp_path / "data", "--out", tmp_path / name,
                       "--batch-size", 32, "--num-patches", 4, "--lr", 3e-4, "--compile", compiled, "--epochs", 7,
                       launcher=launcher)

    def weights(name):
        return bagssl.load_checkpoint(tmp_path / name / "checkpoint.pt")[0]["encoder"]

    nodes = torchrun(2, "--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{get_free_port()}")
    with ThreadPoolExecutor(2) as pool:  # two launchers on one machine, the second late
        first = pool.submit(train, "2 nodes", nodes)
        time.sleep(1)
        second = pool.submit(train, "2 nodes", nodes)
    finished = first.result(), second.result()
    assert sorted("eval_linear.py" in its.stdout for its in finished) == [False, True]  # rank 0 alone prints
    assert not any("FutureWarning" in its.stderr for its in finished)
    train("1")
    train("2 compiled", torchrun(2), "yes")
    for name in ("2 nodes", "2 compiled"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "1"), rel=1e-5)
        assert losses(tmp_path / name, key="probe_top1") == pytest.approx(
            losses(tmp_path / "1", key="probe_top1"), abs=1)  # rounding may turn a guess
        assert_close(weights(name), weights("1"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("setting, device, compiled", [
    ("yes", "cpu", True), ("no", "cuda", False), ("auto", "cpu", False), ("auto", "cuda", True)])
def test_compile_is_as_set_or_by_default_on_a_gpu_alone(monkeypatch, setting, device, compiled):
    monkeypatch.setattr(torch, "compile", functools.partial)
    parts = bagssl.parallelize_and_compile(nn.Linear(2, 2), len, bagssl.Config(compile=setting), torch.device(device))
    assert [isinstance(part, functools.partial) for part in parts] == [compiled, compiled]


@pytest.mark.parametrize("cpu, fast", [
    ({"cpu_name": "Intel Xeon", "amx_bf16": True, "avx512_bf16": True}, True),
    ({"cpu_name": "Intel Xeon", "amx_bf16": False, "avx512_bf16": True}, False),
    ({"cpu_name": "AMD EPYC", "amx_bf16": False, "avx512_bf16": True}, True),
    ({"cpu_name": "AMD EPYC", "amx_bf16": False, "avx512_bf16": False}, False), ({"architecture": "arm64"}, False)])
def test_a_cpu_computes_in_bfloat16_only_if_that_is_fast(monkeypatch, cpu, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    ones = torch.ones(2, 2)
    with bagssl.autocast(ones.device):
        assert (ones @ ones).dtype == (torch.bfloat16 if fast else torch.float32)


def kill_a_process_once():
    """Process 1 of 2 kills itself in step 13, the first time round. Its --out is another, as on another machine."""
    if bagssl.RANK == 1:
        sys.argv[sys.argv.index("--out") + 1] += "-2"
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            before_steps(pytest.MonkeyPatch(), [13], lambda: os.kill(os.getpid(), signal.SIGKILL))


@pytest.mark.parametrize("restarts", [0, 1])
def test_after_a_killed_process_the_job_is_restarted_or_one_process_takes_over(tiny_run, tiny, out, restarts, run):
    finished = command(*calling(kill_a_process_once), *tiny, "--save-every", 0, code=1 - restarts,
                       launcher=torchrun(2, "--standalone", f"--max-restarts={restarts}"))
    if not restarts:
        assert saved_step(out) == 10
        finished = run(*tiny)
    assert "at step 10 of 45" in finished.stdout and not out.with_name("run-2").exists()
    assert losses(out) == pytest.approx(losses(tiny_run.out), rel=1e-2)


def compare_two_processes_with_one():
    """Under torchrun: our layers on half a batch in each process, against torch's on the whole batch in one."""
    bagssl.start_process("cpu")

    def own(x):
        return x.chunk(2)[bagssl.RANK]

    def statistics(network):
        return [buffer for name, buffer in network.named_buffers() if "running" in name]

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), bagssl.BatchNorm(5), nn.ReLU(), nn.Flatten(),
                          nn.Linear(20, 7), bagssl.BatchNorm(7), nn.ReLU(), nn.Linear(7, 12)).double()
    alone, x = copy.deepcopy(model), torch.randn(8, 3, 3, 4, 4, dtype=torch.float64)
    alone[1], alone[5] = nn.BatchNorm2d(5).double(), nn.BatchNorm1d(7).double()
    parallel = nn.parallel.DistributedDataParallel(model)
    z = parallel(own(x).flatten(0, 1)).unflatten(0, (4, 3))
    loss, _ = bagssl.vicreg_loss(bagssl.gather(z), rank=bagssl.RANK, world_size=2)
    expected = pairwise_vicreg(alone(x.flatten(0, 1)).unflatten(0, (8, 3)))
    loss.backward()
    expected.backward()
    assert_close(bagssl.gather(loss.detach()[None]).mean(), expected.detach(), rtol=1e-10, atol=1e-10)
    for found, its_expected in zip(model.parameters(), alone.parameters(), strict=True):
        assert_close(found.grad, its_expected.grad, rtol=1e-8, atol=1e-10)
    assert_close(statistics(model), statistics(alone), rtol=1e-9, atol=1e-9)

    numbers = torch.arange(5 * 12, dtype=torch.uint8).view(5, 3, 2, 2)
    found = eval_linear.embed(lambda images: images.flatten(1), numbers, torch.device("cpu"), block=2)
    assert (found is None) if bagssl.RANK else found.equal(numbers.flatten(1).float())

    rounded, norm, alone = torch.randn(24, 5).bfloat16(), bagssl.BatchNorm(5), nn.BatchNorm1d(5)  # as under autocast
    assert_close(norm(own(rounded)), own(alone(rounded.float())).bfloat16(), rtol=0.01, atol=0.01)
    assert_close(statistics(norm), statistics(alone), rtol=1e-5, atol=1e-5)
    encoder = bagssl.Encoder("patchnet", 1, (8, 8, 8)).double()
    check_that_one_graph_gives_the_same(encoder, torch.randn(4, 3, 10, 10, dtype=torch.float64))
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_gradients_of_one_and_compile_to_one_graph():
    command(*calling(compare_two_processes_with_one, then=""), launcher=torchrun(2))


# ------------------------------------------------------------------------------------------------------------ Probe


@pytest.mark.parametrize("width, spread", [(20, 1), (500, 0.2)])  # 500: more features than images
def test_linear_probe_is_this_protocol(width, spread):
    """Standardise by the training set, choose the decay on a tenth of it, fit to all of it, and only then test."""
    centres, labels = torch.randn(12, width) * spread, torch.arange(12).repeat(40)
    train, test = (20 * (centres[labels] + torch.randn(480, width)) + 7 for _ in range(2))
    test = test / 2 + 3  # so that its own mean and deviation would not do
    x, x_test = ((features - train.mean(0)) / train.std(0) for features in (train, test))

    def fit(rows, decay):
        return eval_linear.fit_linear(x[rows], labels[rows], 12, [decay])[0]  # tested below

    def accuracy(x, labels, weight, k=1):
        best = np.argsort(-(x @ weight[:-1] + weight[-1]).numpy())[:, :k]
        return 100 * (best == labels.numpy()[:, None]).any(1).mean()

    decays = 1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 1e-4, 1e-5
    held, kept = torch.randperm(480, generator=torch.Generator().manual_seed(0)).split([48, 432])
    scores = [accuracy(x[held], labels[held], fit(kept, decay)) for decay in decays]
    best = decays[scores.index(max(scores))]
    assert best not in (decays[0], decays[-1]) or width == 500  # where all decays do equally well
    weight = fit(slice(None), best)
    found = eval_linear.linear_probe(train, labels, test, labels)
    assert found == {"top1": pytest.approx(accuracy(x_test, labels, weight), abs=0.3), "decay": best,
                     "top5": pytest.approx(accuracy(x_test, labels, weight, 5), abs=0.3)}
    with pytest.raises(bagssl.UserError, match="9 images are too few"):
        eval_linear.linear_probe(train[:9], labels[:9], test, labels)


def test_features_that_never_vary_in_training_do_not_confuse_the_probe():
    labels = torch.arange(60) % 3
    train, test = (torch.randn(60, 99) + 2 * F.one_hot(labels, 3).repeat(1, 33) for _ in range(2))
    grey = torch.full((60, 50), 0.1)  # raw pixels in the corners, say, where only test images differ
    found = eval_linear.linear_probe(torch.cat([train, grey], 1), labels, torch.cat([test, grey + 0.5], 1), labels)
    assert found["top1"] == 100


def test_linear_fits_are_the_optima():
    x, y, decays = torch.randn(200, 5, dtype=torch.float64), torch.arange(200) % 3, [0.5, 0.02, 0.001]
    weights = eval_linear.fit_linear(x.float(), y, 3, decays, iterations=200, block=64).double().requires_grad_()
    for weight, decay in zip(weights, decays, strict=True):
        loss = F.cross_entropy(x @ weight[:-1] + weight[-1], y) + decay / 2 * weight[:-1].square().sum()
        gradient, = torch.autograd.grad(loss, weights)
        assert gradient.abs().max() < 1e-4


def test_whitened_features_are_uncorrelated_with_equal_variances():
    x = torch.rand(500, 6) @ torch.rand(6, 6) + 3
    white, test = eval_linear.whiten(x, 2 * x[:9], epsilon=0)
    assert_close(torch.cov(white.T), torch.eye(6), rtol=0, atol=1e-3)
    root = torch.linalg.cholesky(torch.linalg.inv(torch.cov(x.double().T)))
    assert_close(F.pdist(test.double()), F.pdist(2 * x[:9].double() @ root), rtol=1e-3, atol=0)  # Mahalanobis's
    noisy = torch.cat([x, 1e-4 * torch.rand(500, 1)], 1)
    assert eval_linear.whiten(noisy, noisy)[0].std(0).min() < 0.01  # what hardly varies stays small
    assert_close(*(eval_linear.whiten(scale * noisy, noisy)[0].std(0) for scale in (1, 9)), rtol=0.01, atol=1e-4)
    assert eval_linear.whiten(x, x)[1].mean(0).abs().max() < 1e-4
    assert not eval_linear.whiten(torch.ones(20, 4), torch.ones(5, 4))[1].any()  # collapsed


def test_knn_votes_as_a_loop_does():
    train, test, labels, truth = torch.randn(60, 4), torch.randn(500, 4), torch.arange(60) % 3, torch.arange(500) % 3
    guesses = []
    for cosine in F.cosine_similarity(test[:, None], train, dim=2).numpy():
        nearest = np.argsort(-cosine)[:20]
        guesses.append(np.bincount(labels[nearest], np.exp(cosine[nearest] / 0.07)).argmax())
    accuracy = 100 * np.mean(guesses == truth.numpy())
    assert eval_linear.knn_probe(train, labels, test, truth, block=16) == pytest.approx(accuracy)


@pytest.fixture
def evaluated(tiny_run, tmp_path, run):
    """A function: run a script on a copy of the tiny run's checkpoint; returns what it printed and the results that it
    added to eval.jsonl. Each row of a probe must be printed as it is there."""
    def evaluated(*arguments, script, processes=1):
        (tmp_path / "checkpoint.pt").write_bytes(tiny_run.checkpoint.read_bytes())
        (tmp_path / "eval.jsonl").write_text("an earlier table\n")
        printed = run(*arguments, "--checkpoint", tmp_path / "checkpoint.pt", script=script, processes=processes).stdout
        earlier, table = (tmp_path / "eval.jsonl").read_text().splitlines()
        table = json.loads(table)
        assert earlier == "an earlier table" and table["show"] == ("probe" if script is eval_linear else arguments[0])
        assert table["step"] == 45
        assert printed.count("added to") == 1
        for row in table["results"] if script is eval_linear else ():
            name = row["features"].ljust(max(len(other["features"]) for other in table["results"]))
            assert 0 <= row["top1"] <= 100 and f"{name}  top1 {row['top1']:5.2f} %  knn" in printed
        return printed, table["results"]
    return evaluated


SMALL = "--image-size", 20, "--patch-scale", 0.25  # raw pixels of larger images have thousands of axes


def test_two_processes_print_and_write_one_table(evaluated):
    _, results = evaluated("--patches", 1, *SMALL, script=eval_linear, processes=2)
    assert [row["features"] for row in results] == [
        "one patch, the centre", "whole image, one pass", "untrained, one patch, the centre", "raw pixels"]


def test_probes_get_the_features_that_a_row_names(evaluated, tiny_run, tmp_path, monkeypatch):
    """Against loops over patches, which the flags resize from 10 x 10 pixels to 12 x 12. A row is written at once."""
    table, usual, written = tmp_path / "eval.jsonl", eval_linear.raw_pixels, []
    linear, knn = Mock(return_value={"top1": 50.0}), Mock(wraps=eval_linear.knn_probe)  # fits would take seconds
    monkeypatch.setattr(eval_linear, "linear_probe", linear)
    monkeypatch.setattr(eval_linear, "knn_probe", knn)
    monkeypatch.setattr(eval_linear, "raw_pixels", lambda images: (written.append(table.read_text()), usual(images))[1])
    monkeypatch.setattr(bagssl, "has_bf16", lambda device: False)
    printed, results = evaluated("--patches", 4, *SMALL, "--patch-size", 12, script=eval_linear)
    assert [row["features"] for row in results] == [
        "bag of 4", "whole image, one pass", "untrained, bag of 4", "raw pixels"]
    assert [json.loads(text.splitlines()[1])["results"] for text in written] == 2 * [results[:-1]]  # train, test

    backbone = bagssl.load_encoder(tiny_run.checkpoint)[0].backbone.requires_grad_(False)
    splits = [bagssl.load_images("any", tiny_run.data, split, 20) for split in ("train", "test")]
    bag, whole, _, pixels = linear.call_args_list
    for k, (images, labels) in enumerate(splits):
        patches = bagssl.normalize(bagssl.grid_patches(images, 2, 0.25, 12))
        assert_close(bag.args[2 * k], torch.stack([backbone(its_patches).mean(0) for its_patches in patches]))
        enlarged = TF.resize(images, [24, 24], antialias=True)  # by the same factor
        assert_close(whole.args[2 * k], backbone(bagssl.normalize(enlarged)), rtol=0.01, atol=0.02)  # rounded to uint8
        assert pixels.args[2 * k].equal(images.flatten(1).float()) and bag.args[2 * k + 1].equal(labels)
    for probed, plain, whitened in zip(linear.call_args_list, knn.call_args_list[::2], knn.call_args_list[1::2]):
        assert all(x.equal(y) for x, y in zip(probed.args, plain.args, strict=True))
        assert not whitened.args[0].equal(plain.args[0])
    assert_close(whitened.args[::2], eval_linear.whiten(*probed.args[::2]))
    assert usual(noise(2, 3, 40, 40)).shape == (2, 3 * 32 * 32)
    multi_scale, as_trained = bagssl.Config(patch_scale=(0.2, 0.8), patch_size=12), Mock(patch_scale=None, arch=None)
    assert eval_linear.view_sizes(multi_scale, as_trained) == (0.5, 12, 12)  # the whole image, too, at 12 x 12


def test_an_unfinished_run_is_probed_also_where_nothing_can_be_written(tiny_run, tmp_path, run, monkeypatch):
    monkeypatch.setattr(eval_linear, "linear_probe", Mock(return_value={"top1": 50.0}))
    monkeypatch.setattr(eval_linear, "whiten", lambda train, test: (train, test))  # takes seconds, too
    path = tmp_path / "checkpoint.pt"
    torch.save(torch.load(tiny_run.checkpoint, weights_only=True) | {"step": 20}, path)
    (tmp_path / ".eval.jsonl").mkdir()  # where the table would be written
    told = run("--checkpoint", path, "--patches", 1, *SMALL, script=eval_linear)
    assert f"{path} is of step 20 of 45" in told.stdout and told.stdout.count("top1 50.00 %") == 4
    assert told.stderr.count("warning: cannot write") == told.stderr.count("\n") == 4


def test_fewer_images_are_drawn_with_their_labels(monkeypatch):
    monkeypatch.setattr(bagssl, "load_images", lambda *_: (torch.arange(100), -torch.arange(100)))
    images, labels = eval_linear.load_split(bagssl.Config(), Mock(train_images=30), "train")
    assert labels.equal(-images) and len(images.unique()) == 30 and images.max() > 50


def test_the_untrained_control_has_the_whitening_and_nothing_else(tiny_run):
    arguments = dict.fromkeys(("arch", "data", "cache", "image_size", "patch_size", "patch_scale"))
    arguments = types.SimpleNamespace(checkpoint=tiny_run.checkpoint, **arguments)
    trained, untrained = (network.backbone for network in eval_linear.load_model(arguments)[:2])
    same = [name for name, value in trained.named_parameters() if torch.equal(value, untrained.get_parameter(name))]
    assert same == ["whiten.weight"]


def test_published_checkpoints_are_found_in_any_wrapping(tmp_path, capsys):
    model = torchvision.models.resnet18()
    state = model.state_dict()
    sequence = nn.Sequential(*list(model.children())[:-1]).state_dict()  # lightly: 0.weight, 4.0.conv1.weight
    inside = {f"module.backbone.{key}": value for key, value in state.items()}
    wrapped = {"plain": state, "lightning": {"state_dict": inside},
               "vicreg": {"epoch": 3, "model": inside | {"module.projector.0.weight": state["fc.weight"]}},
               "lightly": {"state_dict": {f"backbone.{key}": value for key, value in sequence.items()},
                           "args": eval_linear.argparse.Namespace(lr=0.1)},
               "dino": {"student": inside, "teacher": {key: value * 2 for key, value in inside.items()}},
               "byol": {"online_network_state_dict": sequence}}
    model.fc = nn.Identity()
    x = torch.rand(2, 3, 96, 96).to(memory_format=torch.channels_last)
    expected = model.eval().to(memory_format=torch.channels_last)(x)
    for name, content in wrapped.items():
        torch.save(content, tmp_path / "published.pth")
        backbone, stem_stride = eval_linear.load_published(tmp_path / "published.pth", "resnet18")
        assert stem_stride == 4 and torch.equal(backbone(x), expected), name
    assert "taking the one that starts at student.module.backbone.conv1.weight, not" in capsys.readouterr().out


def test_a_published_checkpoint_is_probed(tiny_run, run, refused, tmp_path):
    state, whole, part = bagssl.make_backbone("resnet18", 1).state_dict(), tmp_path / "18.pth", tmp_path / "part.pth"
    torch.save(state, whole)
    torch.save(dict(list(state.items())[:-3]), part)
    resnet18 = "--checkpoint", whole, "--arch", "resnet18"
    views = "--data", tiny_run.data, "--patch-size", 20, *SMALL
    assert "bag of 4" in run(*resnet18, *views, "--patches", 1, 4, script=eval_linear).stdout
    assert "give --data, --image-size, --patch-scale" in refused(*resnet18, script=eval_linear)
    assert "projection z, which this checkpoint lacks" in refused("locality", *resnet18, *views, script=claims)
    assert eval_linear.load_published(whole, "resnet18")[1] == 1
    for path, arch in ((whole, "resnet34"), (part, "resnet18")):
        with pytest.raises(bagssl.UserError, match=f"holds no {arch}"):
            eval_linear.load_published(path, arch)


def test_the_demo_learns(tmp_path):
    """On less data, the demo's bag beats the same network untrained, and one patch, by more than chance could."""
    fewer = ("import bagssl, eval_linear; bagssl.DEMO_COUNTS.update(pretrain=6_400, train=500, test=500); "
             "eval_linear.raw_pixels = lambda images: images[:, :, 0, 0].float(); eval_linear.whiten = lambda *x: x; "
             "bagssl.run_cli({}.main)")
    for name, arguments in (("bagssl", ["--preset", "demo", "--out", tmp_path, "--device", "cpu"]),
                            ("eval_linear", ["--checkpoint", tmp_path / "checkpoint.pt", "--patches", "1", "16"])):
        finished = command("-c", fewer.format(name), *arguments, timeout=1200)
    top1 = {row["features"]: row["top1"] for row in json.loads((tmp_path / "eval.jsonl").read_text())["results"]}
    assert top1["bag of 16"] > top1["untrained, bag of 16"] + 5, finished.stdout
    assert top1["bag of 16"] > top1["one patch, the centre"] + 25, finished.stdout


# -------------------------------------------------------------- Evidence: claims.py, benchmark.py, trials.py in .github


def test_cosine_to_parts_agrees_with_all_pairs():
    whole, bag, labels = torch.randn(40, 6) + 3, torch.randn(40, 6) - 1, torch.arange(40) % 4
    labels[7] = 5  # alone in its class; class 4 has no image
    found = claims.cosine_to_parts(whole, bag, labels)
    whole, bag = (x.double() - x.double().mean(0) for x in (whole, bag))
    cosine = F.cosine_similarity(whole[:, None], bag, dim=2)
    own, same = torch.eye(40, dtype=torch.bool), labels == labels[:, None]
    for name, pairs in {"same image": own, "same class": same & ~own, "other class": ~same}.items():
        mean = (cosine * pairs).sum(1)[pairs.any(1)] / pairs.sum(1)[pairs.any(1)]
        assert found[name] == pytest.approx(mean.mean().item(), abs=1e-5)
    for labels, classes in ((40 * [0], 1), (range(40), 40)):  # no other class; no other image of the class
        with pytest.raises(bagssl.UserError, match=rf"40 images are of {classes} class"):
            claims.cosine_to_parts(whole, bag, torch.tensor(labels))


def test_ridge_r2():
    """Against refitting without each row; noise is not overfitted, even by as many features as rows."""
    x, strengths = torch.randn(60, 8).double(), (1e-2, 1.0)
    targets = x @ torch.randn(8, 3).double() + torch.tensor([0.1, 3, 30]) * torch.randn(60, 3).double() + 5

    def predict(train, y, test, strength):  # scaled and regularised as for all 40 rows
        centre, scale = train.mean(0), x[:40].std(0)
        a, b = (train - centre) / scale, (test - centre) / scale
        return y.mean(0) + b @ torch.linalg.solve(a.T @ a + 40 * strength * torch.eye(8), a.T @ (y - y.mean(0)))

    errors, r2 = [], []
    for strength in strengths:
        others = [torch.arange(40) != i for i in range(40)]
        left_out = torch.cat([predict(x[:40][rows], targets[:40][rows], x[:40][~rows], strength) for rows in others])
        errors.append((left_out - targets[:40]).square().mean(0))
        wrong = (predict(x[:40], targets[:40], x[40:], strength) - targets[40:]).square().mean(0)
        r2.append(1 - wrong / targets[40:].var(0, correction=0))
    expected = torch.where(errors[0] < errors[1], *r2)
    assert_close(claims.ridge_r2(x[:40], targets[:40], x[40:], targets[40:], strengths), expected)
    assert len(set((errors[0] < errors[1]).tolist())) == 2  # the targets differ in their best strength
    x, noise = torch.randn(1000, 500), torch.randn(1000, 4)
    assert claims.ridge_r2(x[:500], noise[:500], x[500:], noise[500:]).abs().max() < 0.03


class Knows(nn.Linear):  # Linear only to have a parameter, by which claims.py finds the device
    """An encoder whose h is the patch, and whose z only knows how bright it is."""

    def forward(self, x):
        return x.flatten(1), x.mean((1, 2, 3))[:, None] + torch.zeros(len(x), 5)


def test_locality_tells_what_an_encoder_knows(tmp_path):
    images = torch.from_numpy(np.stack([*np.indices((32, 32)) * 4, np.full((32, 32), 90)])).byte().repeat(600, 1, 1, 1)
    found = claims.locality(Knows(1, 1), images, torch.arange(600) // 300, 0.0625, None)
    assert min(found["patch, h"][factor] for factor in ("top", "left", "brightness")) > 0.8
    assert min(found["bag of 16, h"][factor] for factor in ("brightness", "hue", "saturation")) > 0.8
    assert found["patch, z"]["hue"] < 0.2 and 0.35 < found["patch, z"]["class"] < 0.65  # the classes differ in nothing
    assert "top" not in found["bag of 16, h"] and found["bag of 16, z"]["brightness"] > 0.9
    claims.draw_neighbours(tmp_path / "n.png", Knows(1, 1), images[:20], 0.0625, None, queries=3, count=4)
    picture = torch.from_numpy(np.array(Image.open(tmp_path / "n.png"))).permute(2, 0, 1)
    cell = 8 + 2 + 1  # a patch, its frame, a gap; a row has a query and its 4 neighbours in h, then in z
    assert picture.shape == (3, 8 * (3 * cell + 1), 8 * (2 * 5 * cell + 1))
    red = (picture[:, ::8, ::8] == torch.tensor([230, 0, 0])[:, None, None]).all(0)
    assert red.sum() == 3 * 2 * (10 ** 2 - 8 ** 2)  # a frame round each of 3 queries, in h and in z


def test_locality_jitters_all_patches_of_a_bag_alike(monkeypatch):
    """torchvision makes each patch from the same uniform numbers, which are also the regression's targets."""
    embed = Mock(wraps=claims.embed_patches)
    regression = Mock(side_effect=lambda train, train_targets, *_: torch.zeros(train_targets.shape[1]))
    monkeypatch.setattr(claims, "embed_patches", embed)
    monkeypatch.setattr(claims, "ridge_r2", regression)
    images = noise(300, 3, 20, 20)
    claims.locality(Knows(1, 1), images, torch.arange(300) % 2, 0.25, None, seed=3)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(3))
    seen = [call.args[1] for call in embed.call_args_list]
    targets = [torch.cat(call.args[1::2]) for call in regression.call_args_list]  # of a patch's h, z; a bag's h, z
    single, grid = seen[0], seen[2].unflatten(0, (256, 16))  # each comes in two blocks, of 256 and 44 images
    for i in range(0, 256, 25):
        top, left, brightness, hue, saturation = targets[0][i].tolist()
        image = images[order[i]] / 255
        for patch, y, x in ((single[i], int(top * 11), int(left * 11)), (grid[i, 6], 3, 7)):  # row 1, column 2
            cut = TF.adjust_brightness(TF.crop(image, y, x, 10, 10), 1 + 0.4 * (2 * brightness - 1))
            cut = TF.adjust_saturation(cut, 1 + 0.2 * (2 * saturation - 1))
            assert_close(patch, TF.adjust_hue(cut, 0.1 * (2 * hue - 1)), atol=1e-5, rtol=0)
        assert targets[2][i].tolist() == [brightness, hue, saturation]


def test_part_similarity_correlates_with_the_truth(monkeypatch):
    world = bagssl.demo_probabilities()
    joint, p = world.T @ world / 10, world.mean(0)
    truth, centre = joint / np.outer(p, p), np.eye(24) - 1 / 24
    values, vectors = np.linalg.eigh(centre @ truth @ centre)
    images, _, parts = bagssl.demo_images(400, 20, (0, 3))
    factor = torch.from_numpy(vectors * np.sqrt(values.clip(0)))

    def embed(encoder, patches):
        assert torch.equal(patches[7 * 25 + 13], torch.from_numpy(images[7, :, 8:12, 12:16]))  # row 2, column 3
        return [None, factor[torch.from_numpy(parts).flatten()] + 5]  # a mean to remove

    monkeypatch.setattr(claims, "embed_patches", embed)
    pairs = np.triu_indices(24, 1)
    expected = np.corrcoef((vectors * values.clip(0) @ vectors.T)[pairs], truth[pairs])[0, 1]
    assert claims.part_similarity(None, 20) == pytest.approx(expected, abs=1e-6) and expected > 0.8


def test_each_claim_is_shown(evaluated, tmp_path):
    printed, results = evaluated("parts", script=claims)
    bags = ["one patch, the centre", "bag of 4", "bag of 16"]
    assert [row["features"] for row in results] == bags + [f"untrained, {bag}" for bag in bags]
    cosines = {row["same image"] for row in results}
    assert len(cosines) == 6 and all(map(math.isfinite, cosines)) and "other class" in printed
    printed, results = evaluated("locality", script=claims)
    rows = ["patch, h", "patch, z", "bag of 16, h", "bag of 16, z"]
    assert list(results) == rows + [f"untrained, {row}" for row in rows]
    assert all(results[row] != results[f"untrained, {row}"] for row in rows)
    assert (tmp_path / "neighbours.png").exists() and "brightness" in printed
    _, results = evaluated("cooccurrence", "--data", "", "--image-size", 50, script=claims)  # as if trained on the demo
    assert results["trained"] != results["untrained"] and all(map(math.isfinite, results.values()))


@pytest.mark.parametrize("processes", [1, 2])
def test_profile_times_the_parts_and_leaves_nothing(tiny, tmp_path, processes, run):
    printed = run("profile", *tiny, script=benchmark, processes=processes).stdout
    assert not list(tmp_path.iterdir())
    shown = {line[:22].strip(): line[22:].split() for line in printed.splitlines()}
    parts = ["crop + augment", "backbone", "projector", "gather + loss", "backward", "clip + optimiser"]
    parts += ["gradient all-reduce"] * (processes > 1)
    total = float(shown["sum of the parts"][0])
    assert sum(float(shown[part][0]) for part in parts) == pytest.approx(total, abs=0.5)
    assert sum(float(shown[part][1][:-1]) for part in parts) == pytest.approx(100, abs=0.5)
    milliseconds, rate = float(shown["step"][0]), float(shown["step"][1].replace(",", ""))
    assert rate == pytest.approx(8 * 2 / milliseconds * 1e3, rel=0.02) and "step on a ready input" in shown


def count_a_real_step():
    """Under torchrun: print the communication and operations of a step of two processes, by the code of training."""
    config, device = bagssl.parse_config(), bagssl.start_process("cpu")
    bagssl.has_bf16 = lambda device: True  # slowly, where it is not native
    encoder = bagssl.Encoder(config.arch, config.stem_stride, config.projector)
    optimizer = benchmark.make_optimizer(encoder, config)
    model, _ = bagssl.parallelize_and_compile(encoder, bagssl.training_views, config, device)
    x = benchmark.make_input(torch.zeros(config.batch_size // 2, 3, 32, 32, dtype=torch.uint8), 0, config)
    for _ in range(2):  # in its second step DistributedDataParallel arranges its buckets anew
        benchmark.train_step(x, model, optimizer, config)
    with benchmark.Communication() as communication, benchmark.FlopCounterMode(display=False) as flops:
        benchmark.train_step(x, model, optimizer, config)
    if bagssl.RANK == 0:
        print(json.dumps([communication.counts, flops.get_total_flops()]))
    torch.distributed.destroy_process_group()


def test_the_simulation_counts_what_two_processes_send_and_compute(run):
    flags = ["--preset", "cifar10-cpu", "--batch-size", "8", "--projector", "256", "256", "256"]
    counts, flops = json.loads(command(*calling(count_a_real_step, then=""), *flags, launcher=torchrun(2)).stdout)
    tflop, _, simulated = benchmark.count_step(bagssl.parse_config(flags), 2)
    assert tflop == pytest.approx(flops / 1e12, rel=0.01) and counts.keys() == simulated.keys()
    for kind, (_, size) in simulated.items():
        assert size == pytest.approx(counts[kind][1], rel=0.01) and size > 0
    printed = run("scale", *flags, "--processes", 1, 2, script=benchmark).stdout
    one, two = (line.split() for line in printed.splitlines()[-2:])
    assert one[:2] == ["1", "8"] and two[:2] == ["2", "4"] and one[4:10] == ["0.0", "(0)"] * 3
    assert two[5] == f"({counts['gather'][0]})" and two[9] == f"({counts['scatter'][0]})"


def test_trials_train_and_probe_without_the_images_held_out(tiny_run, tmp_path, run, refused, monkeypatch):
    monkeypatch.setattr(bagssl, "training_images", bagssl.training_images)  # put back what trials.py replaces
    images = torch.arange(24)
    (kept, labels), (held, held_labels) = trials.hold_out(images, -images)
    assert len(held) == 2 and torch.cat([kept, held]).sort().values.equal(images)
    assert labels.equal(-kept) and held_labels.equal(-held)
    arguments = [*TINY, "--data", tiny_run.data, "--out", tmp_path,
                 "--try", "lr", "1e-4", "1e-3", "--try", "projector", "16,16,8"]
    printed = run(*arguments, script=trials).stdout
    *_, first, second = printed.splitlines()
    for row, lr in ((first, "1e-4"), (second, "1e-3")):
        assert re.fullmatch(rf"\| {lr} \| 16,16,8 \| \d+ \|( \d+\.\d \|){{3}}", row)
        checkpoint, _, _ = bagssl.load_checkpoint(tmp_path / f"15-epochs-lr={lr}-projector=16,16,8/checkpoint.pt")
        assert checkpoint["config"]["lr"] == float(lr) and checkpoint["config"]["projector"] == (16, 16, 8)
        assert checkpoint["step"] == 15 * (22 // 8)  # epochs of the images kept
    monkeypatch.setattr(bagssl.Run, "after_step", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(eval_linear, "linear_probe", lambda *_: {"top1": 50.0})  # takes seconds
    assert run(*arguments, script=trials).stdout.count("| 50.0 | 50.0 |") == 2
    assert "fewer than a batch" in refused(*arguments, "--try", "batch-size", 8, 64, script=trials)
    assert "--try takes a flag and one or more values" in refused(*arguments, "--try", "epochs", script=trials)


def test_the_curve_is_drawn_from_the_tables(monkeypatch):
    drawing, axis = Mock(), Mock()
    drawing.subplots.return_value = Mock(), axis
    monkeypatch.setitem(sys.modules, "matplotlib", Mock(pyplot=drawing))
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", drawing)
    monkeypatch.setattr(sys, "argv", ["plots.py", "curve"])
    runpy.run_path(str(HERE / ".github/plots.py"))
    curves = {call.kwargs["label"]: call.args[:2] for call in axis.plot.call_args_list}
    drawn = [pair for name in ("bag of 16", "the earlier PatchNet") for pair in zip(*curves[f"{name}, linear probe"])]
    section = (HERE / ".github/RESULTS.md").read_text().partition("### The number of patches")[2]
    rows = re.findall(r"^\| [^|]+ \| ([\d,]+) \|(?:[^|]*\|){4} ([\d.]+) \|", section, re.M)  # cells 2 and 7
    assert drawn == [(int(patches.replace(",", "")), float(top1)) for patches, top1 in rows] and len(drawn) > 5
    assert len(curves["the earlier PatchNet, kNN, whitened"][0]) > 5


# --------------------------------------------------- Bad input: one sentence, exit code 2, nothing overwritten


@pytest.mark.parametrize("arguments, sentence", [
    ("--nonsense 1", "--nonsense"), ("--lr much", "--lr"), ("--arch vit", "argument --arch: invalid choice: 'vit'"),
    ("--preset nonsense", "argument --preset: invalid choice: 'nonsense'"),
    ("--stem-stride 3", "argument --stem-stride: invalid choice: 3"), ("--stem-stride 4", "patchnet takes 1 or 2"),
    ("--projector 8 8", "argument --projector: expected 3 arguments"),
    ("--lr inf", "--lr must be a number from 0 to 2147483648, not inf"),
    ("--seed -1", "--seed must be a number from 0 to 2147483648, not -1"),
    ("--inv-weight nan", "--inv-weight must be a number from 0 to 2147483648, not nan"),
    ("--clip 0", "--clip must be a number from 1e-06 to"), ("--num-patches 1", "--num-patches must be a number from 2"),
    ("--batch-size 1", "--batch-size must be a number from 2 to"), ("--image-size 81", "multiple of 5"),
    ("--image-size 0", "--image-size must be a number from 3 to 4096, not 0"),
    ("--patch-size 100000", "--patch-size must be a number from 0 to 1024, not 100000"),
    ("--patch-scale 1.5", "--patch-scale must be a number from 1e-06 to 1, not 1.5"),
    ("--patch-scale 0 1 --patch-size 16", "--patch-scale must be"), ("--patch-scale 0.2 0.8", "--patch-size"),
    ("--patch-scale 0.8 0.2 --patch-size 16", "a low and a high one together with a --patch-size"),
    ("--patch-scale 0.0005", "patches must be at least 3 pixels wide, not 2"),
    ("--device abacus", "device abacus cannot be used"), ("--data nowhere", "no images in nowhere"),
    ("--out " + 300 * "x", "File name too long"),
    ("--preset imagenet --data nowhere", "no images in nowhere"),
    ("--preset cifar10-cpu --data nowhere", "no images in nowhere (looked for CIFAR10 as torchvision"),
    ("--preset cifar10-cpu", "could not be downloaded (no network); name a"),
])
def test_bad_arguments(arguments, sentence, tmp_path, offline, refused):
    assert sentence in refused("--preset", "demo", *arguments.split())
    assert not [path for path in tmp_path.rglob("*") if path.suffix or path.name == "nowhere"]  # nothing was written


def test_a_script_that_is_refused_ends_with_code_2():
    finished = command("eval_linear.py", "--checkpoint", "none.pt", code=2)
    assert finished.stdout == "" and re.fullmatch("error: no checkpoint at none.pt; .*\n", finished.stderr)


@pytest.mark.parametrize("script, arguments, sentence", [
    (eval_linear, "--patches 5", "1, 4, 9"), (eval_linear, "--train-images 9", "at least 10"),
    (eval_linear, "--patch-scale 2", "from 1e-06 to 1, not 2"),
    (eval_linear, "--patch-scale 0.002", "at least 3 pixels wide, not 2"),
    (claims, "cooccurrence", "only in the demo"), (claims, "wholes", "invalid choice"),
    (claims, "locality --test-images 12", "12 images are too few"),
    (claims, "parts --test-images 1", "give more --test-images"),
])
def test_bad_arguments_of_an_evaluation(tiny_run, refused, script, arguments, sentence):
    checkpoint = "--checkpoint", tiny_run.checkpoint, "--device", "cpu"
    assert sentence in refused(*arguments.split(), *checkpoint, script=script)


def test_the_first_process_speaks_first(monkeypatch):
    """Else a process that loses its connection to one that was refused adds a traceback to the sentence."""
    monkeypatch.setattr(bagssl, "LOCAL_RANK", 1)
    monkeypatch.setattr(bagssl, "time", clock := Mock())
    with pytest.raises(RuntimeError, match="closed"):
        bagssl.run_cli(Mock(side_effect=RuntimeError("Connection closed by peer")))
    clock.sleep.assert_called_once_with(5)


def test_batch_must_divide_among_processes():
    with pytest.raises(bagssl.UserError, match="cannot be divided among 3 processes"):
        bagssl.check_config(bagssl.Config(batch_size=256), processes=3)


def test_foreign_old_malicious_and_damaged_checkpoints_are_refused(tiny_run, tiny, out, tmp_path, refused):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/exploded",)

    other, part = (torch.load(tiny_run.checkpoint, weights_only=True) for _ in range(2))
    other["encoder"]["projector.head.weight"] = other["encoder"].pop("projector.0.weight")
    del part["optimizer"]
    old = {"config": {"an": "older field"}, "encoder": {}, "optimizer": {}, "step": 1}
    path, whole = out / "checkpoint.pt", tiny_run.checkpoint.read_bytes()
    out.mkdir()
    for content in ({"model": 1}, old, other, part, Bomb()):
        torch.save(content, path)
        assert "not a checkpoint of this version" in refused("--checkpoint", path, script=eval_linear)
    published = "--checkpoint", path, "--arch", "resnet18", "--data", tmp_path, *SMALL
    assert "cannot be read (UnpicklingError)" in refused(*published, script=eval_linear)
    assert not (tmp_path / "exploded").exists()
    path.write_bytes(whole[:len(whole) // 2])
    assert "damaged, or not a checkpoint of this version" in refused(*tiny)


# -------------------------------------------------------------------------------------------------- README and help


def test_help_names_every_field_and_its_default(run):
    shown = run("--help").stdout
    assert all("--" + name.replace("_", "-") in shown for name in bagssl.Config.__dataclass_fields__)
    shown = " ".join(shown.split())
    assert "VICReg authors' [25.0]" in shown and "[2048 2048 2048]" in shown and "[]" not in shown


@pytest.mark.parametrize("flags, cpu, cuda", [
    ("", "demo", "cifar10"), ("--dataset demo", "demo", "demo"), ("--dataset cifar100", "cifar10-cpu", "cifar10"),
    ("--data photos", "cifar10-cpu", "cifar10"), ("--data photos --device cpu", "cifar10-cpu", "cifar10-cpu"),
    ("--data photos --preset demo", "demo", "demo")])
def test_the_default_preset_suits_the_device_and_the_images(flags, cpu, cuda, monkeypatch):
    for available, preset in ((False, cpu), (True, cuda)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
        config = bagssl.parse_config(flags.split())
        assert config.preset == preset and config.out == f"runs/{preset}"
        assert "photos" not in flags or config.data == "photos"
        assert "cifar100" not in flags or config.dataset == "cifar100"


@pytest.mark.parametrize("page", ["README.md", ".github/RESULTS.md"])
def test_links_lead_to_the_code(page):
    links = re.findall(r"\[`(\w+)`\]\(([\w./]+\.py)#L(\d+)\)", (HERE / page).read_text())
    assert len(links) >= 5
    for name, file, line in links:
        code = ((HERE / page).parent / file).read_text().splitlines()[int(line) - 1]
        assert re.match(rf"(def|class) {name}\b", code), f"{name} is not at {file}:{line}, which says: {code}"


def test_pieces_can_be_pasted_with_what_the_readme_says_they_need(tiny_run):
    """And its example runs."""
    _, *parts = re.split(r"^# -{118}\n# (.+)\n", Path(bagssl.__file__).read_text(), flags=re.M)
    sections, images, u = dict(zip(parts[::2], parts[1::2])), noise(2, 3, 8, 8), torch.rand(2, 3, 11)
    z, backbone = torch.randn(4, 2, 3), nn.Flatten()
    for names, given, call in (
            (["Patches"], ["math"], lambda scope: scope["crop_patches"](images, u[..., :3], 0.25)),
            (["Augmentation"], [], lambda scope: scope["augment"](images / 255, u[:, 0, 3:])),
            (["Loss"], [], lambda scope: scope["vicreg_loss"](z)[0]),
            (["Patches", "Bag of patches"], ["math", "nn", "normalize"],
             lambda scope: scope["BagOfPatches"](backbone, 2, 0.25)(images))):
        scope = {"torch": torch, **{name: getattr(bagssl, name) for name in given}}
        for name in names:
            exec(sections[name], scope)
        assert call(scope).equal(call(vars(bagssl)))
    example, = re.findall(r"```python\n(.+?)```", (HERE / "README.md").read_text(), re.S)
    scope = {}
    exec(example.replace("runs/photos/checkpoint.pt", str(tiny_run.checkpoint))
         .replace("/path/to/photos", str(tiny_run.data)), scope)
    assert scope["embeddings"].shape == (24, 2048)


@pytest.mark.parametrize("script, first", [(bagssl, []), (eval_linear, []), (claims, ["parts"])])
def test_documented_commands_use_flags_that_exist(script, first, run):
    name = str(Path(script.__file__).relative_to(HERE))
    known = re.findall(r"--[\w-]+", run(*first, "--help", script=script).stdout)
    pages = (HERE / "README.md").read_text() + (HERE / ".github/RESULTS.md").read_text()
    used = re.findall(rf"(?<![\w/]){re.escape(name)}((?: [^\s`&|;]+)*)", pages)
    used = {flag for arguments in used for flag in re.findall(r" (--[\w-]+)", arguments)}
    assert len(used) > 1 and used <= set(known), used - set(known)
    if script is bagssl:  # the values are valid, too, also for 8 processes
        for settings in re.findall(r"(?:python|=8) bagssl\.py((?: [^\s`&|;]+)*)", (HERE / "README.md").read_text()):
            if "--help" not in settings:
                bagssl.check_config(bagssl.parse_config(settings.split()), processes=8)


@pytest.mark.parametrize("name", ["bagssl.py", "eval_linear.py"])
def test_both_scripts_install_what_requirements_say(name):
    needed = [line for line in (HERE / "requirements.txt").read_text().split() if not line.startswith("pytest")]
    text = (HERE / name).read_text()
    assert f"# dependencies = {json.dumps(needed)}" in text and text.startswith("# SPDX-License-Identifier: MIT")
