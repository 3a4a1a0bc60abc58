# SPDX-License-Identifier: MIT
"""Tests of BagSSL: each promise against an independent reference. Run: python -m pytest -q -n 2"""

import argparse
import copy
import functools
import itertools
import json
import math
import os
import pickle
import re
import runpy
import shutil
import subprocess
import sys
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
import peers

TINY = ["--image-size", "40", "--patch-scale", "0.0625", "--batch-size", "8", "--num-patches", "2", "--epochs", "6",
        "--projector", "16", "16", "16", "--lr", "1e-3", "--device", "cpu", "--save-every", "0"]


def command(*arguments, launcher=(), code=0, **environment):
    """Run Python as a user does, in the repository; it must end with the exit code. Returns its stdout and stderr."""
    ended = subprocess.run([sys.executable, *launcher, *map(str, arguments)], text=True, capture_output=True, cwd=HERE,
                           stdin=subprocess.DEVNULL, timeout=300,
                           env={**os.environ, "OMP_NUM_THREADS": "1", **environment})
    assert ended.returncode == code, ended.stderr
    return ended.stdout, ended.stderr


def torchrun(processes, *more):
    more = more or ("--standalone",)
    return "-m", "torch.distributed.run", *more, f"--nproc_per_node={processes}", "--no-python", sys.executable


TRAIN = "bagssl.run_cli(lambda: bagssl.train(bagssl.parse_config()))"


def calling(function, then=TRAIN):
    """Arguments with which Python calls a function of this file, and then trains."""
    return "-c", f"import bagssl, test_bagssl\ntest_bagssl.{function.__name__}()\n{then}"


@pytest.fixture
def run(monkeypatch, capsys):
    """A function: run a script's main here, with these arguments; returns what it printed, stderr last."""
    def run(*arguments, script=bagssl):
        monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
        capsys.readouterr()
        bagssl.run_cli(getattr(script, "main", lambda: bagssl.train(bagssl.parse_config())))
        return "".join(capsys.readouterr())
    return run


@pytest.fixture
def refused(run, capsys):
    """The same, but it must end with exit code 2; returns its one sentence."""
    def refused(*arguments, script=bagssl):
        with pytest.raises(SystemExit, match="^2$"):
            run(*arguments, script=script)
        return re.search("error: .+\n$", capsys.readouterr().err)[0]
    return refused


@pytest.fixture(autouse=True)
def setting(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(bagssl, "LOG_EVERY", 1)
    torch.set_num_threads(1)  # as in `command`: sums in another order are not equal to the bit


def noise(*shape):
    return torch.randint(256, shape, dtype=torch.uint8)


def write_image(path, size=(40, 40), **options):
    """Write an image of random pixels; returns them, uint8 (3, H, W)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = noise(3, size[1], size[0])
    TF.to_pil_image(pixels).save(path, **options)
    return pixels


def write_classes(folder, count, names="ab"):
    return torch.stack([write_image(folder / names[i % len(names)] / f"{i:02}.png") for i in range(count)])


# ---------------------------------------------------------------------------------------------------------- Patches


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("scale, size", [(0.1, None), (0.2, 16), ((0.05, 0.7), 7), ((0.05, 1.0), 40)])
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


@pytest.mark.parametrize("per_side, area, top, left", [
    (1, 64, [12], [20]), (1, 1536, [0], [8]),  # the centre
    (4, 64, [0, 8, 16, 24], [2, 14, 26, 38]),  # the centres of the cells
    (3, 400, [0, 6, 12], [0, 14, 28]),  # overlapping ones reach the edges
])
def test_grid_patches(per_side, area, top, left):
    images, side = noise(2, 3, 32, 48), min(32, math.isqrt(area))
    expected = torch.stack([TF.crop(images, y, x, side, side) for y in top for x in left], 1)
    assert torch.equal(bagssl.grid_patches(images, per_side, area / (32 * 48)), expected)


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


def test_augment_keeps_the_range_and_refuses_bytes():
    assert bagssl.augment.__defaults__ == (0.4, 0.4, 0.2, 0.1, 0.8, 0.2, 0.1)  # the VICReg authors'
    patches = torch.rand(5, 4, 3, 8, 8)
    out = bagssl.augment(patches, torch.rand(5, 4, 8), brightness=0.9, contrast=0.9, saturation=0.9, hue=0.5)
    assert out.shape == patches.shape and out.min() >= 0 and out.max() <= 1
    with pytest.raises(ValueError, match="augment takes float"):
        bagssl.augment(noise(2, 3, 8, 8), torch.rand(2, 8))


# ------------------------------------------------------------------------------------------------- Encoder and loss


@pytest.mark.parametrize("arch, width, stride", [("resnet18", 512, 1), ("resnet18", 512, 2), ("resnet50", 2048, 4)])
def test_a_resnets_backbone_is_torchvisions(arch, width, stride):
    encoder, model = bagssl.Encoder(arch, stride, (8, 9, 10)).eval(), getattr(torchvision.models, arch)().eval()
    x, model.fc = torch.rand(2, 3, 40, 40), nn.Identity()
    if stride < 4:
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, stride, 1, bias=False), nn.Identity()
    model.load_state_dict(encoder.backbone.state_dict())
    h, z = encoder(x)
    assert h.shape == (2, width)
    assert_close(model(x), h)
    one, two, last = (layer.weight.T for layer in encoder.projector if isinstance(layer, nn.Linear))
    s = math.sqrt(1 + 1e-5)  # by which a fresh BatchNorm divides
    assert_close(z, ((h @ one / s).relu() @ two / s).relu() @ last)


def test_patchnets_convolutions_begin_by_copying_their_input():
    for layer, stride in zip(bagssl.PatchNet().layers[::3], (2, 2, 1, 1), strict=True):
        x = torch.randn(2, layer.in_channels, 9, 9)
        assert_close(layer(x)[:, :layer.in_channels], x[:, :, ::stride, ::stride])


@pytest.mark.parametrize("side, stride", [(3, 1), (16, 1), (17, 2), (32, 2)])
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
@pytest.mark.parametrize("dtype, rtol, atol", [(torch.float64, 1e-10, 1e-12), (torch.float32, 1e-4, 1e-4)])
def test_vicreg_loss_is_the_mean_over_pairs(B, V, D, dtype, rtol, atol):
    reference = (torch.randn(B, V, D, dtype=torch.float64) * 0.9 + 3).requires_grad_()
    z = reference.detach().to(dtype).requires_grad_()
    (loss, terms), expected = bagssl.vicreg_loss(z, 20.0, 15.0, 2.0), pairwise_vicreg(reference, 20.0, 15.0, 2.0)
    assert_close(20 * terms["inv"] + 15 * terms["var"] + 2 * terms["cov"], loss.detach())
    assert_close(loss, expected, rtol=rtol, atol=atol, check_dtype=False)
    assert_close(*torch.autograd.grad(loss, z), *torch.autograd.grad(expected, reference), rtol=rtol, atol=atol,
                 check_dtype=False)


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
    assert 1e5 < max(event.cpu_memory_usage for event in profile.events()) < 20e6


@pytest.mark.parametrize("width", [1, 2, 3])
def test_vicreg_spans_the_leading_eigenvectors_of_co_occurrence(width):
    """Pairs of 12 symbols occur exactly as often as their probability says: no sampling blurs what is found."""
    classes = torch.rand(4, 12, dtype=torch.float64) ** 6
    classes = classes / classes.sum(1, keepdim=True)
    counts = (1000 * classes.T @ classes).round().long()
    pairs = torch.cartesian_prod(torch.arange(12), torch.arange(12)).repeat_interleave(counts.flatten(), 0)
    joint = counts / counts.sum().double()
    p = joint.sum(1)
    vectors = torch.linalg.eigh(joint / (p[:, None] * p).sqrt()).eigenvectors  # in ascending order of the values
    z = torch.randn(12, width, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.LBFGS([z], max_iter=3000, tolerance_grad=1e-12, tolerance_change=1e-16, history_size=50,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss, _ = bagssl.vicreg_loss(z[pairs], cov_weight=25.0)  # with 1, two dimensions may share an eigenvector
        loss.backward()
        return loss

    optimizer.step(closure)
    found = torch.linalg.qr(p.sqrt()[:, None] * (z - p @ z).detach()).Q
    cosines = torch.linalg.svdvals(found.T @ vectors[:, -1 - width:-1])  # not the trivial one: z is centred
    assert math.degrees(cosines.min().clamp(max=1).acos()) < 0.01


def in_float32(monkeypatch):
    """bfloat16's rounding would hide mistakes."""
    monkeypatch.setattr(bagssl, "autocast", lambda device: torch.autocast(device.type, enabled=False))


@pytest.mark.parametrize("per_side, scale, size", [(1, 0.25, None), (3, 0.25, None), (2, 0.5, 12), (1, 1.0, None)])
def test_bag_is_the_mean_over_a_loop_also_in_blocks(per_side, scale, size, monkeypatch):
    in_float32(monkeypatch)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).requires_grad_(False)
    images, bag = noise(300, 3, 20, 24), bagssl.BagOfPatches(backbone, per_side, scale, size)
    patches = TF.normalize(bagssl.grid_patches(images, per_side, scale, size) / 255, [0.485, 0.456, 0.406],
                           [0.229, 0.224, 0.225])
    expected = sum(backbone(patches[:, v]) for v in range(per_side ** 2)) / per_side ** 2
    found = [bag(images), eval_linear.embed(bag, images, torch.device("cpu"))]
    for h in found if size else (*found, bag(images / 255)):  # bytes are rounded when resized
        assert_close(h, expected, atol=1e-5, rtol=1e-4)


# ----------------------------------------------------------------------------------------------------------- Images


def load(folder, split="train", size=40):
    return bagssl.load_images(folder, split, size, cache=Path(folder).parent / "cache")


def test_a_folder_is_split_only_if_it_has_train_and_val_or_test(tmp_path, monkeypatch):
    pixels, root = write_classes(tmp_path / "split/train", 6), tmp_path / "split"
    assert load(root)[1] is None and len(load(root)[0]) == 6  # no test images: a folder of whatever it holds
    with pytest.raises(bagssl.UserError, match="has no test images"):
        load(root, "test")
    test = write_classes(root / "val", 2, "b")
    for split in ("train", "val"):
        write_image(root / split / ".ipynb_checkpoints/0.png")  # a hidden folder is not a class
    images, labels = load(root)
    assert torch.equal(images[[0, 3]], pixels[[0, 1]]) and labels.tolist() == [0, 0, 0, 1, 1, 1]
    images, labels = load(root, "test")
    assert torch.equal(images, test) and labels.tolist() == [1, 1]
    write_image(root / "val/zebra/0.png")
    with pytest.raises(bagssl.UserError, match="val/zebra is not one of the class folders in"):
        load(root, "test")
    with pytest.raises(bagssl.UserError, match="must be train or test, not"):
        load(root, "val")
    write_classes(tmp_path / "vehicles", 12, ["bus", "car", "train", "ship"])  # a class that is called train
    assert len(load(tmp_path / "vehicles")[0]) == 12
    scandir = os.scandir  # which cannot be denied to root: so a folder is gone when it is read
    monkeypatch.setattr(os, "scandir", lambda path: scandir(str(path).replace("vehicles/bus", "gone")))
    with pytest.raises(bagssl.UserError, match="cannot read .*gone .No such file"):
        load(tmp_path / "vehicles")


def test_a_folder_is_decoded_once_and_again_if_the_file_is_cut(tmp_path, capsys):
    pixels = write_classes(tmp_path / "photos", 4, "a")
    assert torch.equal(load(tmp_path / "photos")[0], pixels)
    decoded, = (tmp_path / "cache").iterdir()
    assert np.array_equal(np.load(decoded), pixels) and "decoding" in capsys.readouterr().out
    write_image(tmp_path / "photos/a/00.png")
    assert torch.equal(load(tmp_path / "photos")[0], pixels)  # not noticed, as is said
    assert f"decoded before; if its pixels have changed since, remove {decoded}" in capsys.readouterr().out
    for size in (0, 100, decoded.stat().st_size - 1):
        os.truncate(decoded, size)
        assert torch.equal(load(tmp_path / "photos")[0][1:], pixels[1:])
        assert "decoding" in capsys.readouterr().out
    other = write_classes(tmp_path / "b/photos", 4, "a")
    assert torch.equal(bagssl.load_images(tmp_path / "b/photos", "train", 40, tmp_path / "cache")[0], other)
    write_image(tmp_path / "photos/a/09.png")
    assert len(load(tmp_path / "photos")[0]) == 5
    assert len([*(tmp_path / "cache").iterdir()]) == 3


def test_killed_while_decoding_or_beside_another_run_no_file_stays(tmp_path, monkeypatch):
    """A run killed at its third image leaves one file, which the next takes; two at once end with the right pixels."""
    pixels, cache = write_classes(tmp_path / "photos", 6, "a"), tmp_path / "cache"
    monkeypatch.setattr(bagssl, "ThreadPoolExecutor", lambda: bagssl.contextlib.nullcontext(Mock(map=map)))  # in order
    usual, read = bagssl.ImageOps.fit, itertools.count(1)

    def decode(*arguments):
        step = next(read)
        if step == 3:  # the first run's third image
            raise KeyboardInterrupt  # what was written stays, as under kill -9
        if step == 6:  # the second run's third image: another run starts now, and is done first
            assert torch.equal(load(tmp_path / "photos")[0], pixels)
        return usual(*arguments)

    monkeypatch.setattr(bagssl.ImageOps, "fit", decode)
    with pytest.raises(KeyboardInterrupt):
        load(tmp_path / "photos")
    assert len([*cache.iterdir()]) == 1
    assert torch.equal(load(tmp_path / "photos")[0], pixels)
    assert [path.suffix for path in cache.iterdir()] == [".npy"]


def test_photos_of_every_kind_at_any_depth_are_cropped_and_resized(tmp_path, monkeypatch):
    folder = tmp_path / "photos"
    write_image(folder / "a/b/c/d/wide.jpg", size=(91, 45), quality=95)
    Image.new("L", (50, 70), 90).save(folder / "grey.png")
    Image.new("P", (40, 40)).save(folder / "palette.gif.png")
    Image.new("CMYK", (40, 40)).save(folder / "print.jpg")
    Image.new("RGB", (20_000, 1), (9, 8, 7)).save(folder / "row.png")  # enlarged before it is cropped: 60 MB
    turned = Image.new("RGB", (80, 40), (255, 0, 0))
    turned.paste((0, 0, 255), (0, 0, 40, 40))  # blue on the left, which orientation 6 turns to the top
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(folder / "turned.jpg", exif=exif, quality=100, subsampling=0)
    (folder / ".hidden.png").write_bytes(b"not a picture")
    write_image(folder / ".hidden/photo.png")
    images, labels = load(folder, size=32)
    assert images.shape == (6, 3, 32, 32) and labels is None
    grey, _, _, row, turned, wide = images  # by name, folder by folder
    assert (grey == 90).all() and (row[0] == 9).all()
    assert turned[2, 0].min() > 200 and turned[0, -1].min() > 200
    with Image.open(folder / "a/b/c/d/wide.jpg") as photo:
        expected = TF.pil_to_tensor(TF.resize(TF.center_crop(photo, 45), 32))
    assert (wide.int() - expected.int())[..., 1:-1].abs().max() <= 1  # at the edges, pixels outside count a little
    pixels = write_image(tmp_path / "damaged/a.png")
    monkeypatch.setattr(bagssl.ImageOps, "exif_transpose", Mock(side_effect=ZeroDivisionError))  # as a rational of -1/0
    assert torch.equal(load(tmp_path / "damaged")[0][0], pixels)


def test_unusable_images_are_named_with_the_reason(tmp_path):
    folder = tmp_path / "photos"
    write_image(folder / "good.png")
    for i in range(30):
        (folder / f"bad{i:02}.png").write_bytes(b"this is no picture")
    with pytest.raises(bagssl.UserError, match="30 of 31 images .*bad00.png .cannot identify.*bad09.png[^,]*; remove"):
        load(folder)
    assert not [*(tmp_path / "cache").iterdir()]
    for path in folder.glob("bad*"):
        path.unlink()
    Image.fromarray(np.full((40, 40), 180 * 257, np.uint16)).save(folder / "scan.png")
    Image.fromarray(np.full((40, 40), 0.5, np.float32)).save(folder / "float.tif")
    (folder / "link.png").symlink_to("nothing.png")
    with pytest.raises(bagssl.UserError, match="float.tif .its pixels are of mode F, .*link.png .*No such file.*"
                                               "scan.png .its pixels are of mode I"):
        load(folder)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network, in an empty folder."""
    monkeypatch.setattr("urllib.request.urlopen", Mock(side_effect=OSError("no network")))
    monkeypatch.chdir(tmp_path)


def test_cifar_is_torchvisions_or_refused(tmp_path, offline, monkeypatch):
    (tmp_path / "data/cifar10").mkdir(parents=True)  # a folder of that name is another thing
    write_image(tmp_path / "cifar10/0.png")
    with pytest.raises(bagssl.UserError, match="cifar10 is not in data and could not be downloaded .no network."):
        bagssl.load_images("cifar10", "test")
    rows, labels, folder = noise(5, 3072), [3, 1, 4, 1, 5], tmp_path / "data/cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (folder / name).write_bytes(pickle.dumps({"data": rows.numpy(), "labels": labels}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    images, found = bagssl.load_images("cifar10")
    assert torch.equal(images, rows.unflatten(1, (3, 32, 32)).repeat(5, 1, 1, 1)) and found.tolist() == 5 * labels
    images, found = bagssl.load_images("cifar10", "test", 40)
    assert images.shape == (5, 3, 40, 40) and images.dtype == torch.uint8 and found.tolist() == labels


def test_demo_gratings_have_the_probabilities_of_their_classes():
    images, labels, gratings = bagssl.demo_images(20_000, 5, seed=3)  # cells of one pixel
    world = bagssl.demo_probabilities()
    assert world.shape == (10, 24) and torch.allclose(world.sum(1), torch.ones(10))
    assert world.amax(0).sum() / 10 == pytest.approx(0.575)  # the best guess from one cell
    for label in range(10):
        drawn = gratings[labels == label].flatten().bincount(minlength=24) / (25 * (labels == label).sum())
        assert (drawn - world[label]).abs().max() < 0.01
    evidence = world.log()[:, gratings].sum(-1).argmax(0)  # of all cells, which are independent
    assert (evidence == labels).float().mean() > 0.98
    assert torch.equal(bagssl.demo_images(20_000, 5, seed=3)[0], images)
    train, test = (bagssl.load_images("demo", split, 10)[0] for split in ("train", "test"))
    assert (len(train), len(test)) == (1600, 1000) and not torch.equal(train[:1000], test)


def test_a_demo_cell_shows_its_grating():
    """The strongest frequency of a cell's spectrum is that of the grating, wherever its noise allows to tell."""
    images, _, gratings = bagssl.demo_images(200, 160, seed=0)
    cells, own = bagssl.grid_patches(images, 5, 0.04).float().sum(2).flatten(0, 1), gratings.flatten()  # (5000, 32, 32)
    best = torch.fft.fft2(cells - cells.mean((-2, -1), keepdim=True)).abs().flatten(1).argmax(1)
    f = torch.fft.fftfreq(32, 1 / 32)
    wave = torch.complex(f[best % 32], f[best // 32])
    high = own % 4 == 3  # 3.4 waves in a cell: the spectrum's steps are fine enough
    error = (wave.angle() - math.pi / 12 * (own // 4)).sin().abs()  # of the line's direction, either way along it
    assert (error[high] < 0.25).float().mean() > 0.9
    assert wave.abs()[high].median() == pytest.approx(1.5 ** 3, abs=0.5) and wave.abs()[own % 4 == 0].median() < 1.6


# ------------------------------------------------------------------------------------------------------------- Runs


def test_effective_rank_is_exp_of_the_singular_values_entropy():
    q = torch.linalg.qr(torch.randn(400, 6, dtype=torch.float64)).Q
    q = torch.linalg.qr(q - q.mean(0)).Q.float()  # orthonormal and of mean 0
    share = torch.arange(1, 7) / 21
    assert bagssl.effective_rank(q * share + 5) == pytest.approx(torch.special.entr(share).sum().exp().item(), rel=1e-3)
    collapsed = torch.randn(500, 1) @ torch.randn(1, 500)
    assert abs(bagssl.effective_rank(collapsed + 1e-6 * torch.randn(500, 500)) - 1) < 0.01


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """A folder of small images, and a run of 6 epochs of 3 steps on them."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    data, out = folder / "data-\u2603", folder / "run"
    write_classes(data / "train", 26)
    write_classes(data / "test", 24)
    printed, _ = command("-c", f"import bagssl; bagssl.LOG_EVERY = 1; {TRAIN}", *TINY, "--data", data, "--cache",
                         folder / "cache", "--out", out, launcher=["-OO"], PYTHONIOENCODING="ascii")
    assert "data-\\u2603" in printed  # a path that cannot be printed; -OO: without docstrings
    return types.SimpleNamespace(data=data, out=out, cache=folder / "cache", checkpoint=out / "checkpoint.pt",
                                 printed=printed)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def tiny(tiny_run, out):
    """The arguments of the same run in another folder."""
    return [*TINY, "--data", tiny_run.data, "--cache", tiny_run.cache, "--out", out]


def read_log(folder, key=None, name="log.jsonl"):
    entries = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [entry[key] for entry in entries] if key else entries


def saved(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)


def same_weights(run, other):
    one, two = saved(run)["encoder"], saved(other)["encoder"]
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_training_is_this_loop(tiny_run, tiny, out, run, monkeypatch):
    """Every number logged, the last weights, and the statistics saved with them, against the method by hand."""
    in_float32(monkeypatch)
    printed = run(*tiny, "--epochs", 2, "--lr", 0.01, "--clip", 40, "--weight-decay", 0.1, "--seed", 3,
                  "--inv-weight", 10, "--var-weight", 20, "--cov-weight", 3, "--warmup", 0.3)
    images, labels = bagssl.load_images(tiny_run.data, "train", 40, tiny_run.cache)
    torch.manual_seed(3)
    encoder = bagssl.Encoder("patchnet", 1, (16, 16, 16))
    encoder.backbone.whiten.weight.copy_(bagssl.whitening_filters(images))
    weights = [p for p in encoder.parameters() if p.requires_grad]
    first, momenta, log = [p.detach().clone() for p in weights], [0] * len(weights), read_log(out)
    steps = []
    for epoch in (0, 1):  # as the docstrings say that they are drawn
        generator = torch.Generator().manual_seed(3_000_000 + epoch)
        order = torch.randperm(26, generator=generator)
        steps += [(order[8 * i:8 * i + 8], torch.rand(8, 2, 11, generator=generator)) for i in range(3)]
    for step, (entry, (chosen, u)) in enumerate(zip(log, steps, strict=True)):
        patches = bagssl.augment(bagssl.crop_patches(images[chosen], u[..., :3], 0.0625) / 255, u[..., 3:])
        h, z = encoder(bagssl.normalize(patches).flatten(0, 1))
        loss = pairwise_vicreg(z.unflatten(0, (8, 2)), 10.0, 20.0, 3.0)
        gradients = torch.autograd.grad(loss, weights)
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
        rate = 0.01 * min(1, (step + 1) / (0.3 * 6 + 1)) * math.cos(math.pi * step / 12) ** 2
        for k, (p, gradient) in enumerate(zip(weights, gradients)):
            gradient = gradient * min(1, 40 / norm) + (0.1 * p.detach() if p.ndim > 1 else 0)
            momenta[k] = 0.9 * momenta[k] + gradient
            p.data -= rate * (gradient + 0.9 * momenta[k])
        assert [entry[key] for key in ("step", "loss", "gradient_norm", "lr")] == pytest.approx(
            [step + 1, loss.item(), norm, rate], rel=1e-2)
        assert entry["loss"] == pytest.approx(10 * entry["inv"] + 20 * entry["var"] + 3 * entry["cov"], rel=1e-4)
        assert entry["effective_rank"] == pytest.approx(bagssl.effective_rank(h), rel=0.02)
    trained, *_ = bagssl.load_encoder(out / "checkpoint.pt")
    found = [p for p in trained.parameters() if p.requires_grad]
    for p, expected, start in zip(found, weights, first, strict=True):
        assert (p - expected).norm() < 0.02 * (expected - start).norm()
    convolution, normalisation, *_ = trained.backbone.layers  # its statistics are of patches that are not augmented
    cuts = [bagssl.crop_patches(images[chosen], u[..., :3], 0.0625).flatten(0, 1) for chosen, u in steps[:3]]
    maps = [convolution(trained.backbone.whiten(bagssl.normalize(cut)).relu()).detach().transpose(0, 1).flatten(1)
            for cut in cuts]
    assert_close(normalisation.running_mean, sum(x.mean(1) for x in maps) / len(maps), rtol=1e-3, atol=1e-3)
    assert_close(normalisation.running_var, sum(x.var(1) for x in maps) / len(maps), rtol=1e-3, atol=1e-3)
    assert "26 images with labels from" in printed and "step 6 of 6, 0:00:00 left:  loss" in printed


def test_the_online_probe_learns_and_changes_no_weight(tiny_run, tiny, out, run, monkeypatch, tmp_path):
    usual = bagssl.load_images
    monkeypatch.setattr(bagssl, "load_images", lambda *arguments: (usual(*arguments)[0], None))
    assert re.search(r"probe \d", tiny_run.printed) and not re.search(r"probe \d", run(*tiny))
    assert "probe" not in read_log(out)[-1] and same_weights(out, tiny_run.out)
    labels = torch.arange(48) % 2
    images = noise(48, 3, 40, 40) // (1 + 8 * labels)[:, None, None, None]  # every second one is dark
    monkeypatch.setattr(bagssl, "load_images", lambda *_: (images, labels))
    run(*tiny, "--out", tmp_path / "knows", "--epochs", 20)
    assert np.mean(read_log(tmp_path / "knows", "probe")[-20:]) > 80


def test_a_finished_run_is_left_alone_and_another_is_refused(tiny_run, tiny, tmp_path, refused, run):
    before = {path.name: path.read_bytes() for path in tiny_run.out.iterdir()}
    again = [*tiny, "--out", tiny_run.out]
    assert "6 of 6 epochs done" in run(*again)
    assert "holds a run with other settings (lr was 0.001, is 0.5)" in refused(*again, "--lr", 0.5)
    assert "a run of 6 epochs; give at least as many" in refused(*again, "--epochs", 5)
    assert before == {path.name: path.read_bytes() for path in tiny_run.out.iterdir()}
    assert "fewer than a batch" in refused(*tiny, "--out", tmp_path / "new", "--batch-size", 64)
    assert not (tmp_path / "new").exists()  # so that the right command is not refused next
    for name in ("precious.txt", "config.json"):
        folder = tmp_path / f"with {name}"
        folder.mkdir()
        (folder / name).write_text("mine")
        assert "cannot be the folder of this run" in refused(*tiny, "--out", folder)
        assert [path.read_text() for path in folder.iterdir()] == ["mine"]
    assert "cannot be the folder of this run" in refused(*tiny, "--out", folder / name / "below a file")


def test_two_runs_in_one_folder_lose_nothing(tiny_run, tiny, out, refused, run, monkeypatch):
    """The second, with other settings, is refused from the first step on; with the same, it makes the same files."""
    usual = bagssl.vicreg_loss

    def second_run_starts(*arguments):
        monkeypatch.setattr(bagssl, "vicreg_loss", usual)
        assert "seed was 0, is 1" in refused(*tiny, "--seed", 1)
        assert "0 of 6 epochs done" in run(*tiny)
        return usual(*arguments)

    monkeypatch.setattr(bagssl, "vicreg_loss", second_run_starts)
    run(*tiny)
    assert bagssl.vicreg_loss is usual and same_weights(out, tiny_run.out) and not [*out.glob(".*")]


def test_a_run_goes_on_to_more_epochs(tiny_run, tiny, out, run):
    shutil.copytree(tiny_run.out, out)
    assert "6 of 8 epochs done" in run(*tiny, "--epochs", 8)
    assert saved(out)["epoch"] == 8 and not same_weights(out, tiny_run.out)
    assert read_log(out, "lr")[-1] == pytest.approx(1e-3 * math.cos(math.pi * 23 / 24 / 2) ** 2)  # of 24 steps, not 18


def test_killed_three_times_a_run_ends_as_if_it_had_not_been(tiny_run, tiny, out, run, monkeypatch):
    usual, kill_at = torch.save, [2, 4, 5]  # epochs

    def save(content, path):
        usual(content, path)
        if kill_at and content["epoch"] == kill_at[0]:
            os.truncate(path, 1000)  # what was written stays, as under kill -9
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", save)
    while kill_at:
        with pytest.raises(KeyboardInterrupt):
            run(*tiny)
        assert saved(out)["epoch"] == kill_at.pop(0) - 1
    run(*tiny)
    assert same_weights(out, tiny_run.out)
    assert dict(zip(read_log(out, "step"), read_log(out, "loss")))[18] == read_log(tiny_run.out, "loss")[-1]


@pytest.mark.parametrize("bad_step", [9, 10])  # the last of an epoch, after which it would be saved; another
def test_bad_numbers_stop_a_run_and_leave_its_checkpoint(tiny, out, bad_step, monkeypatch, refused):
    usual, steps = bagssl.vicreg_loss, itertools.count(1)
    monkeypatch.setattr(bagssl, "vicreg_loss", lambda z, *weights: usual(
        z + (z - z).sqrt() if next(steps) == bad_step else z, *weights))  # finite, but its gradient is not
    assert "are not finite; start again with a lower --lr" in refused(*tiny)
    assert saved(out)["epoch"] == (bad_step - 1) // 3
    assert all(value.isfinite().all() for value in saved(out)["encoder"].values())


def test_a_config_changed_from_python_trains_to_a_checkpoint_that_can_be_read(tiny, out):
    config = bagssl.parse_config([*map(str, tiny), "--epochs", "1"])
    config.lr, config.projector = np.geomspace(1e-4, 1e-3, 3)[1], [16] * 3
    bagssl.train(config)
    found = bagssl.load_encoder(out / "checkpoint.pt")[1]
    assert type(found.lr) is float and found.lr == pytest.approx(10 ** -3.5) and found.projector == (16, 16, 16)


def test_foreign_old_malicious_and_damaged_checkpoints_are_refused(tiny_run, tiny, out, tmp_path, refused):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/exploded",)

    other = saved(tiny_run.out)
    other["encoder"]["projector.head.weight"] = other["encoder"].pop("projector.0.weight")
    path, whole = tmp_path / "checkpoint.pt", tiny_run.checkpoint.read_bytes()
    for content in ({"model": 1}, {"config": {"an": "older field"}, "encoder": {}}, other, Bomb(), [1]):
        torch.save(content, path)
        assert "damaged, or not a checkpoint of this version" in refused("--checkpoint", path, script=eval_linear)
    assert not (tmp_path / "exploded").exists()
    shutil.copytree(tiny_run.out, out)
    (out / "checkpoint.pt").write_bytes(whole[:len(whole) // 2])
    assert "damaged, or not a checkpoint of this version" in refused(*tiny)


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error"),
                                   MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_good_checkpoint_is_not_called_damaged(tiny_run, monkeypatch, error):
    monkeypatch.setattr(*((Path, "read_bytes") if isinstance(error, OSError) else (torch, "load")),
                        Mock(side_effect=error))
    for read in (bagssl.load_encoder, eval_linear.read_tensors):
        with pytest.raises(type(error)) as told:
            read(tiny_run.checkpoint)
        assert told.value is error


# -------------------------------------------------------------------------------------------------------- Processes


def prepare_a_comparison():
    """float32, as bfloat16 would hide differences. Only a machine's first process may decode."""
    in_float32(pytest.MonkeyPatch())
    bagssl.LOG_EVERY = 1
    if bagssl.LOCAL_RANK > 0:
        bagssl.ThreadPoolExecutor = None
    compiler = torch.compile
    torch.compile = lambda part: compiler(part, backend="aot_eager")  # without the minute that a C++ compiler takes


def test_processes_train_as_one_on_two_nodes_or_compiled(tmp_path):
    """1 process, 2 compiled, and 2 on each of 2 nodes: 15 steps of 32 images, losses and weights are equal."""
    write_classes(tmp_path / "data/train", 96)

    def train(name, launcher=(), *more):
        return command(*calling(prepare_a_comparison), *TINY, "--data", tmp_path / "data", "--cache",
                       tmp_path / "cache", "--out", tmp_path / name, "--batch-size", 32, "--num-patches", 4,
                       "--epochs", 5, *more, launcher=launcher)[0]

    torch.manual_seed(0)
    initial = bagssl.Encoder("patchnet", 1, (16, 16, 16))
    nodes = torchrun(2, "--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{get_free_port()}")
    train("1")
    with ThreadPoolExecutor() as pool:
        printed = [*pool.map(train, 2 * ["2 nodes"], 2 * [nodes])]
    assert sorted("eval_linear.py" in out for out in printed) == [False, True]  # rank 0 alone prints
    train("2 compiled", torchrun(2), "--compile")
    for name in ("2 nodes", "2 compiled"):
        for key, tolerance in (("loss", 1e-5), ("gradient_norm", 1e-3)):
            assert read_log(tmp_path / name, key) == pytest.approx(read_log(tmp_path / "1", key), rel=tolerance)
        for key, weight in bagssl.load_encoder(tmp_path / "1/checkpoint.pt")[0].named_parameters():
            found, first = saved(tmp_path / name)["encoder"][key], initial.get_parameter(key)
            assert (found - weight).norm() <= 0.01 * (weight - first).norm(), key


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
    loss, _ = bagssl.vicreg_loss(bagssl.gather(z))
    expected = pairwise_vicreg(alone(x.flatten(0, 1)).unflatten(0, (8, 3)))
    loss.backward()
    expected.backward()
    assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for found, its_expected in zip(model.parameters(), alone.parameters(), strict=True):
        assert_close(found.grad, its_expected.grad, rtol=1e-10, atol=1e-12)
    assert_close(statistics(model), statistics(alone), rtol=1e-10, atol=1e-12)

    rounded, norm, alone = torch.randn(24, 5).bfloat16(), bagssl.BatchNorm(5), nn.BatchNorm1d(5)  # as under autocast
    assert_close(norm(own(rounded)), own(alone(rounded.float())).bfloat16(), rtol=0.01, atol=0.01)
    assert_close(statistics(norm), statistics(alone), rtol=1e-5, atol=1e-5)
    encoder = bagssl.Encoder("patchnet", 1, (8, 8, 8)).double()
    check_that_one_graph_gives_the_same(encoder, torch.randn(4, 3, 10, 10, dtype=torch.float64))
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_gradients_of_one_and_compile_to_one_graph():
    command(*calling(compare_two_processes_with_one, then=""), launcher=torchrun(2))


@pytest.mark.parametrize("cpu, fast", [
    ({"cpu_name": "Intel Xeon", "amx_bf16": True, "avx512_bf16": True}, True),
    ({"cpu_name": "Intel Xeon", "amx_bf16": False, "avx512_bf16": True}, False),
    ({"cpu_name": "AMD EPYC", "amx_bf16": False, "avx512_bf16": True}, True), ({"architecture": "arm64"}, False)])
def test_a_cpu_computes_in_bfloat16_only_if_that_is_fast(monkeypatch, cpu, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    ones = torch.ones(2, 2)
    with bagssl.autocast(ones.device):
        assert (ones @ ones).dtype == (torch.bfloat16 if fast else torch.float32)


# ------------------------------------------------------------------------------------------------------------ Probe


@pytest.mark.parametrize("width, spread", [(20, 1), (500, 0.2)])  # 500: more features than images
def test_linear_probe_is_this_protocol(width, spread):
    """Standardise by the training set, choose the decay on a tenth of it, fit to all of it, and only then test."""
    centres, labels = torch.randn(12, width) * spread, torch.arange(12).repeat(40)
    train, test = (20 * (centres[labels] + torch.randn(480, width)) + 7 for _ in range(2))
    test = test / 2 + 3  # so that its own mean and deviation would not do
    x, x_test = ((features - train.mean(0)) / train.std(0) for features in (train, test))

    def accuracy(fitted, decay, iterations, x_test, its_labels, k=1):
        weight, = eval_linear.fit_linear(x[fitted], labels[fitted], 12, [decay], iterations)  # tested below
        best = np.argsort(-(x_test @ weight[:-1] + weight[-1]).numpy())[:, :k]
        return 100 * (best == its_labels.numpy()[:, None]).any(1).mean()

    held, kept = torch.randperm(480, generator=torch.Generator().manual_seed(0)).split([48, 432])
    decay = max((1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 1e-4, 1e-5),  # of equally good ones the strongest
                key=lambda decay: accuracy(kept, decay, 30, x[held], labels[held]))
    found = eval_linear.linear_probe(train, labels, test, labels)
    assert found == {"decay": decay} | {f"top{k}": pytest.approx(
        accuracy(slice(None), decay, 100, x_test, labels, k), abs=0.3) for k in (1, 5)}
    # Features that do not vary in training, as raw pixels in the corners, change nothing where test images differ.
    constant = [torch.cat([part, torch.full((480, 5), grey)], 1) for part, grey in ((train, 0.1), (test, 0.6))]
    assert eval_linear.linear_probe(constant[0], labels, constant[1], labels) == found
    with pytest.raises(bagssl.UserError, match="9 images are too few"):
        eval_linear.linear_probe(train[:9], labels[:9], test, labels)


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


SMALL = "--image-size", 20, "--patch-scale", 0.25  # raw pixels of larger images have thousands of axes


@pytest.fixture
def copied(tiny_run, tmp_path):
    """The arguments of a probe of the tiny run's checkpoint, alone in a folder."""
    shutil.copy(tiny_run.checkpoint, tmp_path)
    return "--checkpoint", tmp_path / "checkpoint.pt", "--cache", tiny_run.cache, "--device", "cpu"


def test_probes_get_the_features_that_a_row_names(copied, tiny_run, tmp_path, run, monkeypatch):
    """Against loops over patches, which the flags resize from 10 x 10 pixels to 12 x 12."""
    linear, knn = Mock(return_value={"top1": 50.0}), Mock(wraps=eval_linear.knn_probe)  # fits would take seconds
    monkeypatch.setattr(eval_linear, "linear_probe", linear)
    monkeypatch.setattr(eval_linear, "knn_probe", knn)
    in_float32(monkeypatch)
    printed = run(*copied, "--patches", 4, *SMALL, "--patch-size", 12, script=eval_linear)
    rows = read_log(tmp_path, name="eval.jsonl")
    assert [row["features"] for row in rows] == [
        "bag of 4", "whole image, one pass", "untrained, bag of 4", "raw pixels"]
    for row in rows:
        assert f"{row['features']:21}  top1 50.00 %  knn {row['knn']:5.2f} %  knn_whitened" in printed
        assert (row["show"], row["epoch"], row["patch_size"], row["test_images"]) == ("probe", 6, 12, 24)

    backbone = bagssl.load_encoder(tiny_run.checkpoint)[0].backbone.requires_grad_(False)
    bag, whole, _, pixels = linear.call_args_list
    for k, split in enumerate(("train", "test")):
        images, labels = bagssl.load_images(tiny_run.data, split, 20, tiny_run.cache)
        patches = bagssl.normalize(bagssl.grid_patches(images, 2, 0.25, 12))
        assert_close(bag.args[2 * k], torch.stack([backbone(its_patches).mean(0) for its_patches in patches]))
        enlarged = TF.resize(images, [24, 24], antialias=True)  # by the same factor
        assert_close(whole.args[2 * k], backbone(bagssl.normalize(enlarged)), rtol=0.01, atol=0.02)  # rounded to uint8
        assert pixels.args[2 * k].equal(images.flatten(1).float()) and bag.args[2 * k + 1].equal(labels)
    for probed, plain, whitened in zip(linear.call_args_list, knn.call_args_list[::2], knn.call_args_list[1::2]):
        assert all(x.equal(y) for x, y in zip(probed.args, plain.args, strict=True))
        assert_close(whitened.args[::2], eval_linear.whiten(*probed.args[::2]))
        assert all(x.equal(y) for x, y in zip(probed.args[1::2], whitened.args[1::2], strict=True))


def load_model(checkpoint, **given):
    arguments = dict.fromkeys(("arch", "data", "cache", "image_size", "patch_size", "patch_scale")) | given
    return eval_linear.load_model(types.SimpleNamespace(checkpoint=checkpoint, **arguments))


def test_a_multi_scale_network_sees_the_whole_image_at_the_size_of_a_patch(tiny_run, monkeypatch):
    multi_scale = bagssl.Config(patch_scale=(0.2, 0.8), patch_size=12, projector=(16,) * 3)
    encoder = bagssl.load_encoder(tiny_run.checkpoint)[0]
    monkeypatch.setattr(bagssl, "load_encoder", lambda _: (encoder, multi_scale, {"epoch": 30}))
    for given, expected in (({}, ((0.5,), 12, 12)), ({"patch_scale": 0.25}, ((0.25,), 12, 12)),
                            ({"patch_scale": 0.25, "patch_size": 0}, ((0.25,), 0, None))):
        _, _, config, whole_size, _ = load_model("any", **given)
        assert (config.patch_scale, config.patch_size, whole_size) == expected


def test_an_unfinished_run_is_probed_also_where_nothing_can_be_written(copied, tmp_path, run, monkeypatch):
    monkeypatch.setattr(eval_linear, "linear_probe", lambda *_: {"top1": 50.0})
    monkeypatch.setattr(eval_linear, "whiten", lambda train, test: (train, test))  # takes seconds, too
    torch.save(saved(tmp_path) | {"epoch": 2}, tmp_path / "checkpoint.pt")
    (tmp_path / "eval.jsonl").mkdir()
    printed = run(*copied, "--patches", 1, *SMALL, script=eval_linear)
    assert "is from epoch 2 of 6: training is unfinished" in printed and printed.count("top1 50.00 %") == 4
    assert printed.count("warning: not added to") == 4


def test_features_that_are_not_finite_are_told(copied, tmp_path, refused):
    content = saved(tmp_path)
    content["encoder"]["backbone.last.0.weight"][0] = math.nan
    torch.save(content, tmp_path / "checkpoint.pt")
    assert "the network's features are not finite" in refused(*copied, script=eval_linear)


def test_fewer_images_are_drawn_with_their_labels(monkeypatch):
    monkeypatch.setattr(bagssl, "load_images", lambda *_: (torch.arange(100), -torch.arange(100)))
    images, labels = eval_linear.load_split(bagssl.Config(), Mock(train_images=30), "train")
    assert labels.equal(-images) and len(images.unique()) == 30 and images.max() > 50


def test_the_untrained_control_has_the_whitening_and_nothing_else(tiny_run):
    trained, untrained = (network.backbone for network in load_model(tiny_run.checkpoint)[:2])
    same = [name for name, value in trained.named_parameters() if torch.equal(value, untrained.get_parameter(name))]
    assert same == ["whiten.weight"]


def test_published_networks_are_found_by_name_in_any_wrapping_and_order(tmp_path, capsys):
    model, x = torchvision.models.resnet18(), torch.rand(2, 3, 96, 96).to(memory_format=torch.channels_last)
    for tensor in model.state_dict().values():
        if tensor.ndim == 1:  # of BatchNorms, all of which differ
            tensor.uniform_(0.5, 1.5)
    state, sequence = model.state_dict(), nn.Sequential(*list(model.children())[:-1]).state_dict()
    model.fc = nn.Identity()
    expected = model.eval().to(memory_format=torch.channels_last)(x)
    inside = {f"module.backbone.{key}": value for key, value in state.items()}
    for content in (dict(sorted(state.items())), dict(sorted(sequence.items())),
                    {f"_orig_mod.{key}": value for key, value in reversed(state.items())},
                    {"epoch": 3, "model": {f"encoder_q.{key}": value for key, value in state.items()}},
                    {"state_dict": {f"backbone.{key}": value for key, value in sequence.items()},
                     "args": argparse.Namespace(lr=0.1)},
                    {key: value for key, value in state.items() if "num_batches" not in key},
                    {"student": inside, "teacher": {key: value * 2 for key, value in inside.items()}}):
        torch.save(content, tmp_path / "published.pth")
        backbone, stem_stride = eval_linear.load_published(tmp_path / "published.pth", "resnet18")
        assert stem_stride == 4 and torch.equal(backbone(x), expected)
    assert "holds 2 networks; taking student.module.backbone, not teacher.module." in capsys.readouterr().out


def test_what_is_no_published_network_is_told(tmp_path):
    state = torchvision.models.resnet18().state_dict()
    part = {key: value for key, value in state.items() if key != "layer2.0.bn1.bias"}
    for arch, content, words in (
            ("resnet18", part, "such as conv1.weight .* or 0.weight.* the file's names are conv1.weight, bn1.weight"),
            ("resnet18", {key.replace("bn", "norm"): value for key, value in state.items()},
             "the file's names are conv1.weight, norm1.weight"),
            ("resnet34", state, "holds no resnet34"),
            ("resnet18", torchvision.models.resnet34().state_dict(), "holds no resnet18"),  # all of its are there
            ("resnet18", [state], "holds a list"),
            ("resnet18", {"model": state, "best": np.float64(0.5)}, "plain values, a numpy"),
            ("resnet18", b"\x10\0\0\0\0\0\0\0{\"a\": 1}       ", "is a safetensors file"),
            ("resnet18", b"text", "not a file saved by torch, or it is damaged")):
        path = tmp_path / "published.pth"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(bagssl.UserError, match=words):
            eval_linear.load_published(path, arch)


def test_a_published_checkpoint_is_probed(tiny_run, run, refused, tmp_path):
    path = tmp_path / "18.pth"
    backbone, x = bagssl.make_backbone("resnet18", 1).eval(), torch.rand(2, 3, 20, 20)
    torch.save(backbone.state_dict(), path)
    loaded, stem_stride = eval_linear.load_published(path, "resnet18")
    assert stem_stride == 1 and torch.allclose(loaded(x), backbone(x), atol=1e-5)
    resnet18 = "--checkpoint", path, "--arch", "resnet18", "--cache", tiny_run.cache
    views = "--data", tiny_run.data, "--patch-size", 20, *SMALL
    assert "bag of 4" in run(*resnet18, *views, "--patches", 4, script=eval_linear)
    assert "give --data, --image-size and --patch-scale" in refused(*resnet18, script=eval_linear)
    assert "the projection z, which this checkpoint lacks" in refused("locality", *resnet18, *views, script=claims)


def test_the_demo_learns(tmp_path):
    """Its bag is nearly always right; one patch cannot be, and the same network untrained is far behind."""
    command("bagssl.py", "--out", tmp_path, "--device", "cpu")
    encoder, untrained, config, *_ = load_model(tmp_path / "checkpoint.pt")
    (train, y), (test, test_y) = (bagssl.load_images("demo", split, config.image_size) for split in ("train", "test"))
    top1 = []
    for network, side in ((encoder, 4), (encoder, 1), (untrained, 4)):
        bag = bagssl.BagOfPatches(network.backbone, side, config.patch_scale[0])
        features = [eval_linear.embed(bag, images, torch.device("cpu")) for images in (train[:800], test)]
        top1.append(eval_linear.linear_probe(features[0], y[:800], features[1], test_y)["top1"])
    assert top1[0] > 97 and top1[1] <= 57.5 + 3 and top1[2] < top1[0] - 5  # 3: two standard errors of 1,000 images


# --------------------------------------------------------------- Evidence: claims.py, benchmark.py, pictures in .github


def test_claims_are_measured(copied, tiny_run, tmp_path, run, refused):
    printed = run("parts", *copied, "--patches", 1, 4, script=claims)
    rows = {row["features"]: row for row in read_log(tmp_path, name="eval.jsonl")}
    assert rows.keys() == {f"{prefix}{name}" for prefix in ("", "untrained, ") for name in ("one patch, the centre",
                                                                                            "bag of 4")}
    assert all(f"{row['same image']:.3f}" in printed for row in rows.values())
    encoder, *_ = bagssl.load_encoder(tiny_run.checkpoint)  # the rows against all pairs
    images, labels = bagssl.load_images(tiny_run.data, "test", 40, tiny_run.cache)
    whole, bag = (eval_linear.embed(bagssl.BagOfPatches(encoder.backbone, *view), images, torch.device("cpu"))
                  for view in ((1, 1.0), (2, 0.0625)))
    cosine = F.cosine_similarity((whole - whole.mean(0))[:, None], bag - bag.mean(0), dim=2)
    own, same = torch.eye(24, dtype=torch.bool), labels == labels[:, None]
    for name, pairs in {"same image": own, "same class": same & ~own, "other class": ~same}.items():
        assert rows["bag of 4"][name] == pytest.approx(cosine[pairs].mean().item(), abs=1e-4)

    assert "nearest neighbours drawn in" in run("locality", *copied, script=claims)
    rows = read_log(tmp_path, "features", name="eval.jsonl")
    assert {"patch, h", "bag of 16, z", "untrained, patch, z"} <= {*rows}
    assert (tmp_path / "neighbours.png").exists()
    run("votes", *copied, "--patches", 4, script=claims)
    assert (tmp_path / "votes.png").exists()
    assert "only in the demo" in refused("cooccurrence", *copied, script=claims)


class Knows(nn.Linear):  # Linear only to have a parameter, by which claims.py finds the device
    """An encoder whose h is the patch, and whose z only knows how bright it is."""

    def forward(self, x):
        return x.flatten(1), x.mean((1, 2, 3))[:, None] + torch.zeros(len(x), 5)


def test_locality_and_co_occurrence_tell_what_an_encoder_knows(monkeypatch):
    images = torch.from_numpy(np.stack([*np.indices((32, 32)) * 4, np.full((32, 32), 90)])).byte().repeat(600, 1, 1, 1)
    found = claims.locality(Knows(1, 1), images, torch.arange(600) // 300, 0.0625, None)
    assert min(found["patch, h"][factor] for factor in ("top", "left", "brightness")) > 0.8
    assert min(found["bag of 16, h"][factor] for factor in ("brightness", "hue", "saturation")) > 0.8
    assert found["patch, z"]["hue"] < 0.2 and 0.35 < found["patch, z"]["class"] < 0.65  # the classes differ in nothing
    assert "top" not in found["bag of 16, h"] and found["bag of 16, z"]["brightness"] > 0.9
    assert claims.grating_similarity(Knows(1, 1), 20) < 0.5
    world, gratings = bagssl.demo_probabilities(), bagssl.demo_images(400, 20, seed=2)[2].flatten()
    z = (world / world.mean(0)).T[gratings]  # whose inner products are p(a, b) / (p(a) p(b)), up to a factor
    monkeypatch.setattr(claims, "embed_patches", lambda *_: (None, z))
    assert claims.grating_similarity(None, 20) > 0.99


def test_votes_add_up_and_one_patch_can_decide(monkeypatch):
    in_float32(monkeypatch)
    backbone = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).requires_grad_(False)
    images, probe = noise(3, 3, 40, 40), torch.randn(7, 4)
    votes, scores = claims.votes_of(types.SimpleNamespace(backbone=backbone), probe, images, 0.0625, None, per_side=5)
    expected = backbone(bagssl.normalize(bagssl.grid_patches(images, 5, 0.0625).flatten(0, 1))) @ probe[:6] + probe[6]
    assert_close(votes, (expected - expected.mean(1, keepdim=True)).view(3, 25, 4), atol=1e-5, rtol=1e-4)
    assert_close(votes.mean(1), scores, atol=1e-5, rtol=1e-4)

    images, labels, places = torch.full((16, 3, 40, 40), 128).byte(), torch.arange(16) % 2, torch.arange(16)
    grey = bagssl.normalize(images[0]).mean()
    for image, label, place in zip(images, labels, places):  # one patch of a 4 x 4 grid is black or white, not grey
        image.view(3, 4, 10, 4, 10)[:, place // 4, :, place % 4] = 255 * label
    bright = types.SimpleNamespace(backbone=lambda x: x.mean((1, 2, 3))[:, None])
    votes, scores = claims.votes_of(bright, torch.tensor([[-1, 1], [grey, -grey]]), images, 0.0625, None, per_side=4)
    assert scores.argmax(1).equal(labels)
    assert votes[torch.arange(16), :, labels].argmax(1).equal(places)
    most, least = claims.split_by_agreement(votes)
    assert most.argmax(1).equal(labels) and len(least.argmax(1).unique()) == 1  # of what is left, all look alike


def test_the_benchmark_counts_and_simulates(run):
    fixed, first = 14 ** 2 * 54 * 27, 7 ** 2 * 64 * 54 * 9  # multiply-adds of a patch: whitening, first convolution
    others = 16 * (128 * 64 * 9 + 256 * 128 * 9 + 1024 * 256) + 1024 ** 2 + 2048 * 1024 + 2 * 1024 ** 2
    gram = 3 * 4 * 64 ** 2 * 1024  # of the loss: forward, and two products backward
    flop = 2 * (256 * (fixed + 2 * first + 3 * others) + gram)  # the first convolution's input needs no gradient
    printed = run("flops", "--preset", "cifar10-cpu", "--epochs", 40, script=benchmark)
    assert "7,997,440 patches, 0.79" in printed and f"{flop / 1e9:.4g} GFLOP a step of 256" in printed
    printed = run("scale", "--preset", "cifar10-cpu", "--processes", 1, 2, script=benchmark)
    one, two = (line.split() for line in printed.splitlines()[-2:])
    assert one[:3] == ["1", "64", "0.0254"] and two[:3] == ["2", "32", "0.0127"] and one[4:8] == ["0.0", "(0)"] * 2
    # z is gathered once, and so are the mean and variance of each of seven normalisations; gradients are summed in MB
    weights = sum(p.numel() for p in bagssl.Encoder(projector=(1024,) * 3).parameters() if p.requires_grad)
    assert two[5] == "(8)" and float(two[6]) == pytest.approx(4 * weights / 1e6 + float(two[4]), abs=0.1)


def test_kmeans_features_are_the_distances_summed_over_quadrants():
    images, whitening, mean, centres = noise(3, 3, 12, 12), torch.randn(108, 108), torch.randn(108), torch.randn(5, 108)
    found = peers.triangle_features(images, whitening / 9, mean, centres).view(3, 2, 2, 5)
    for image, its_found in zip(images, found):
        expected = torch.zeros(2, 2, 5)
        for y, x in itertools.product(range(7), range(7)):
            block = image[:, y:y + 6, x:x + 6].float().flatten()
            block = (block - block.mean()) / (block.var() + 10).sqrt() - mean
            distance = (block @ (whitening / 9) - centres).norm(dim=1)
            expected[y // 4, x // 4] += (distance.mean() - distance).relu()
        assert_close(its_found, expected, rtol=1e-3, atol=1e-3)


def test_the_support_vector_machine_minimises_its_objective():
    x, labels, cost = torch.randn(60, 5), torch.arange(60) % 3, 10.0
    x[range(60), labels] += 1
    weight = peers.fit_svm(x, labels, 3, cost, iterations=500, block=7).double().requires_grad_()
    margin = (2 * torch.eye(3)[labels] - 1) * (x.double() @ weight[:-1] + weight[-1])
    objective = weight.square().sum() / 2 + cost * (1 - margin).relu().square().sum() / 60
    assert torch.autograd.grad(objective, weight)[0].abs().max() < 0.01  # at W = 0 it is 8


def test_the_pictures_are_drawn_from_the_tables(monkeypatch):
    drawing, axis = Mock(), Mock()
    drawing.subplots.return_value = Mock(axes=[]), axis
    monkeypatch.setitem(sys.modules, "matplotlib", Mock(pyplot=drawing))
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", drawing)
    plots = runpy.run_path(str(HERE / ".github/plots.py"))
    plots["draw_curve"]()
    pflop, top1 = axis.plot.call_args_list[0].args[:2]  # of the linear probe
    drawn = dict(zip(top1, pflop))
    assert [drawn[82.0], drawn[84.5]] == pytest.approx([0.36, 0.79], abs=0.005)  # README's, after 18 and 40 epochs
    assert len(plots["table"]("Claim 1", "pretraining")) == 10


# --------------------------------------------------- Bad input: one sentence, exit code 2, nothing overwritten


@pytest.mark.parametrize("arguments, sentence", [
    ("--epoch 1", "unrecognized arguments: --epoch"), ("--arch vit", "argument --arch: invalid choice: 'vit'"),
    ("--lr inf", "rates, weights and minutes"), ("--inv-weight nan", "rates, weights and minutes"),
    ("--num-patches 1", "must be 2 or more"),
    ("--epochs 0", "--epochs must be 1 or more"), ("--image-size 81", "multiple of 5, not 81"),
    ("--projector 0", "must be 2 or more"), ("--image-size 2 --patch-size 16", "patches must be at least 3 pixels"),
    ("--device tpu", "--device tpu is not available"), ("--warmup 10", "--warmup 0 to 1"),
    ("--patch-scale 1.5", "--patch-scale takes a fraction"), ("--stem-stride 4", "a ResNet's own stem"),
    ("--patch-scale 0.2 0.8", "--patch-size"), ("--patch-scale 0.0005", "patches must be at least 3 pixels wide"),
    ("--batch-size 3000", "1600 images are fewer than a batch"), ("--data nowhere", "nowhere (No such file or"),
    ("--out " + 300 * "x", "File name too long"), ("--preset cifar10-cpu", "could not be downloaded (no network)"),
])
def test_bad_arguments(arguments, sentence, offline, refused):
    assert sentence in refused(*arguments.split())


def test_a_refused_script_ends_with_code_2_and_one_sentence(tmp_path):
    out, error = command("eval_linear.py", "--checkpoint", "none.pt", code=2)
    assert out == "" and re.fullmatch("error: .*No such file or directory: 'none.pt'\n", error)
    out, error = command("bagssl.py", "--batch-size", 9, "--out", tmp_path, launcher=torchrun(2), code=1)
    assert "error: --batch-size 9 cannot be divided among 2 processes" in error


@pytest.mark.parametrize("script, arguments, sentence", [
    (eval_linear, "--patches 5", "1, 4, 9"), (eval_linear, "--train-images 9", "at least 10"),
    (eval_linear, "--patch-scale 2", "--patch-scale takes a fraction"),
    (claims, "locality --test-images 12", "12 images are too few"), (claims, "parts --test-images 1", "--test-images"),
])
def test_bad_arguments_of_an_evaluation(copied, refused, script, arguments, sentence):
    assert sentence in refused(*arguments.split(), *copied, script=script)


# -------------------------------------------------------------------------------------------------- README and help


def test_help_names_every_field_and_its_default():
    shown = " ".join(command("bagssl.py", "--help")[0].split())
    assert all("--" + name.replace("_", "-") in shown for name in bagssl.Config.__dataclass_fields__)
    assert "VICReg authors' [25.0]" in shown and "[2048 2048 2048]" in shown and "--no-compile" in shown
    config = bagssl.parse_config("--preset cifar10 --patch-scale 0.1 0.5 --patch-size 16 --compile".split())
    assert (config.out, config.data, config.lr) == ("runs/cifar10", "cifar10", 0.1)
    assert config.patch_scale == (0.1, 0.5) and config.compile and config.batch_size == 64


@pytest.mark.parametrize("page", ["README.md", ".github/RESULTS.md"])
def test_links_lead_to_the_code(page):
    links = re.findall(r"\[`(\w+)`\]\(([\w./]+\.py)#L(\d+)\)", (HERE / page).read_text())
    assert len(links) >= 5
    for name, file, line in links:
        code = ((HERE / page).parent / file).read_text().splitlines()[int(line) - 1]
        assert re.match(rf"(def|class) {name}\b", code), f"{name} is not at {file}:{line}, which says: {code}"


def test_pieces_can_be_pasted_with_what_the_readme_says_they_need(tiny_run, offline):
    """And its examples run."""
    _, *parts = re.split(r"^# ---- (.+?) -+\n", Path(bagssl.__file__).read_text(), flags=re.M)
    sections = dict(zip(parts[::2], parts[1::2]))
    data = {"images": noise(2, 3, 8, 8), "u": torch.rand(2, 3, 11), "z": torch.randn(4, 2, 3), "backbone": nn.Flatten()}
    for names, given, call in (
            ("Patches", "math", "crop_patches(images, u[..., :3], 0.25)"),
            ("Augmentation", "", "augment(images / 255, u[:, 0, 3:])"), ("Loss", "", "vicreg_loss(z)[0]"),
            ("Patches, Bag of patches", "math nn normalize", "BagOfPatches(backbone, 2, 0.25)(images)")):
        scope = {"torch": torch, **{name: getattr(bagssl, name) for name in given.split()}}
        for name in names.split(", "):
            exec(sections[name], scope)
        assert eval(call, scope, data).equal(eval(call, vars(bagssl), data))
    example, step = re.findall(r"```python\n(.+?)```", (HERE / "README.md").read_text(), re.S)
    scope = {}
    exec(example.replace("runs/photos/checkpoint.pt", str(tiny_run.checkpoint))
         .replace("/path/to/photos", str(tiny_run.data)), scope)
    assert scope["embeddings"].shape == (26, 2048)
    scope = vars(bagssl) | data | dict(B=2, V=3, scale=0.25, encoder=bagssl.Encoder(projector=(16, 16, 16)))
    exec(step, scope)
    assert scope["z"].shape == (6, 16) and scope["loss"].isfinite()


@pytest.mark.parametrize("script, first", [("bagssl.py", []), ("eval_linear.py", []), (".github/claims.py", ["parts"])])
def test_documented_commands_use_flags_that_exist(script, first):
    known = re.findall(r"--[\w-]+", command(script, *first, "--help")[0])
    pages = (HERE / "README.md").read_text() + (HERE / ".github/RESULTS.md").read_text()
    used = re.findall(rf"(?<![\w/]){re.escape(script)}((?: [^\s`&|;]+)*)", pages)
    used = {flag for arguments in used for flag in re.findall(r" (--[\w-]+)", arguments)}
    assert len(used) > 1 and used <= set(known), used - set(known)
    if script == "bagssl.py":  # the values are valid, too, also for 8 processes
        commands = re.findall(r"(?:python|=8) bagssl\.py((?: [^\s`&|;]+)*)", (HERE / "README.md").read_text())
        assert len(commands) >= 5
        for settings in commands:
            assert "--help" in settings or bagssl.parse_config(settings.split()).batch_size % 8 == 0


@pytest.mark.parametrize("name", ["bagssl.py", "eval_linear.py"])
def test_both_scripts_install_what_requirements_say(name):
    needed = [line for line in (HERE / "requirements.txt").read_text().split() if not line.startswith("pytest")]
    text = (HERE / name).read_text()
    assert f"# dependencies = {json.dumps(needed)}" in text and text.startswith("# SPDX-License-Identifier: MIT")
