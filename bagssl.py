# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "torchvision>=0.26", "numpy>=1.26"]
# ///
"""BagSSL: self-supervised learning on image patches, in one file.

Chen, Bardes, Li, LeCun, "Bag of Image Patch Embedding Behind the Success of Self-Supervised
Learning" (TMLR 2023, arXiv:2206.08954).

1. Cut a few patches of one fixed scale at random out of each image; augment each independently.
2. Embed each patch, h = f(x), with a convolutional network; project it, z = g(h), with an MLP.
3. Train with VICReg. It makes the projections of an image's patches agree (invariance), keeps each
   dimension of z varying over the batch (variance), and decorrelates the dimensions (covariance).
4. Throw the projector away. An image is represented by the mean of its patches' embeddings h.

After the settings, the sections follow these steps; then come processes, images and, last, the
training loop, in which all of them meet.

    python bagssl.py                                     # generated images; needs no data and no GPU
    python bagssl.py --preset cifar10-cpu                # CIFAR-10 on a CPU
    torchrun --standalone --nproc_per_node=8 bagssl.py --preset imagenet --data /path/to/imagenet
    python eval_linear.py --checkpoint runs/demo/checkpoint.pt
"""

import argparse
import contextlib
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import nn

# ---- Config ----------------------------------------------------------------------------------------------------------
# Every field is a command-line flag, and its comment is the flag's help. A preset overrides the defaults, and a flag
# overrides the preset: parse_config(["--preset", "cifar10", "--lr", "0.2"]) does so from Python too. Config() itself
# applies no preset.

DEVICE = getattr(torch.accelerator.current_accelerator(check_available=True), "type", "cpu")  # cpu: no accelerator


class UserError(Exception):
    """An error that the user can fix: `run_cli`, the last function, prints it, one sentence, and exits with code 2."""


@dataclass
class Config:
    preset: str = "demo"  # demo, cifar10-cpu, cifar10, cifar100 or imagenet: settings that replace the defaults below
    data: str = "demo"  # demo (generated), cifar10 or cifar100 (downloaded if not in the cache), or a folder of images
    cache: str = "data"  # folder for downloads and decoded images, shared by all runs
    out: str = "runs/demo"  # folder of the run, by default runs/PRESET; an interrupted run there is continued
    arch: str = "patchnet"  # patchnet, made for small patches; resnet18, resnet34, resnet50, as in published work
    stem_stride: int = 1  # stride of the first layer, 1 or 2; 4: a ResNet's own stem, 7x7 convolution and max-pooling
    projector: tuple = (2048, 2048, 2048)  # widths of the projector's layers; all but the last have BatchNorm and ReLU
    image_size: int = 80  # images are cropped to their middle square and resized to this side
    patch_scale: tuple = (0.25,)  # a patch's fraction of the image's area; two values: a range (multi-scale crops)
    patch_size: int = 0  # patches are resized to this side; 0: kept as cut; a range of scales needs a side
    num_patches: int = 4  # V, patches per image and step
    batch_size: int = 256  # B, images per step, over all processes
    epochs: int = 30  # passes over the images
    lr: float = 0.1  # learning rate, not scaled by the batch size (SGD, Nesterov momentum 0.9; warmup, cosine decay)
    warmup: float = 0.1  # fraction of the steps over which the learning rate rises
    clip: float = 2.0  # maximum gradient norm, 0: none; in the first steps, gradients can be 20 times as large as later
    weight_decay: float = 1e-4  # not applied to BatchNorm's parameters
    inv_weight: float = 25.0  # weight of the invariance term; the defaults of all three are the VICReg authors'
    var_weight: float = 25.0  # weight of the variance term
    cov_weight: float = 1.0  # weight of the covariance term
    seed: int = 0  # random seed of the initial weights, the order of the images, and the patches
    device: str = DEVICE  # cuda, mps or cpu
    compile: bool = DEVICE == "cuda"  # compile network and augmentation: takes a minute, needs a C++ compiler
    save_every: float = 1.0  # minimum minutes between checkpoints, which are saved at the end of an epoch

    def __post_init__(self):
        """Refuse settings that cannot work."""
        self.projector, self.patch_scale = tuple(self.projector), tuple(self.patch_scale)  # lists if from flags or JSON
        low, high = self.patch_scale[0], self.patch_scale[-1]
        if not 0 < low <= high <= 1 or len(self.patch_scale) > (2 if self.patch_size else 1):
            raise UserError("--patch-scale takes a fraction above 0, up to 1; or two, low and high, with --patch-size")
        if min(self.image_size, self.patch_size or patch_side(self.image_size, self.image_size, low)) < 3:
            raise UserError("patches must be at least 3 pixels wide: give a larger --image-size, --patch-scale or "
                            "--patch-size")
        if min(self.batch_size, self.num_patches, *self.projector) < 2:
            raise UserError("--batch-size, --num-patches and each width of --projector must be 2 or more")
        if self.arch == "patchnet" and self.stem_stride == 4:
            raise UserError("--stem-stride 4 is a ResNet's own stem; patchnet takes 1 or 2")
        numbers = [value for value in vars(self).values() if isinstance(value, float)]
        if self.epochs < 1 or self.warmup > 1 or not all(0 <= number < math.inf for number in numbers):
            raise UserError("--epochs must be 1 or more; --warmup 0 to 1; other rates, weights and minutes 0 or more")


# Chosen on CIFAR-10. Small batches give more steps in the same time, and an inv_weight of 10 gains two to three points
# of accuracy over 25.
CIFAR = dict(image_size=32, batch_size=64, projector=(1024, 1024, 1024), inv_weight=10.0)

PRESETS = {
    # A demo image is 5 x 5 cells, each of a patch's size. Two patches in different cells have only the image's class,
    # one of ten, in common. Hence a few dimensions of z are enough. The patches' projections cannot agree closely: the
    # invariance term stays large, and cov_weight is raised to match.
    "demo": dict(data="demo", patch_scale=(0.04,), batch_size=64, epochs=10, projector=(512, 512, 32),
                 cov_weight=10.0),
    "cifar10-cpu": dict(CIFAR, data="cifar10", epochs=18),  # half an hour on two cores, less on fast ones
    "cifar10": dict(CIFAR, data="cifar10", epochs=170),  # hours on two cores: for GPUs
    "cifar100": dict(CIFAR, data="cifar100", epochs=170),
    # The paper's patches, 32 x 32 pixels of 224 x 224, and its network. Needs --data, a folder.
    "imagenet": dict(data="imagenet", arch="resnet50", image_size=224, patch_scale=(0.0204,),
                     projector=(8192, 8192, 8192), batch_size=2048, epochs=100),
}


def parse_config(argv=None):
    """The Config of a command line: defaults, overridden by the preset, overridden by the flags."""
    comments = dict(re.findall(r"^    (\w+): [^#]*# (.*)$", inspect.getsource(Config), re.M))  # as help
    choices = {"preset": PRESETS, "arch": ("patchnet", "resnet18", "resnet34", "resnet50"), "stem_stride": (1, 2, 4)}
    parser = argparse.ArgumentParser(usage="bagssl.py [FLAG VALUE ...]; --help lists the flags", allow_abbrev=False,
                                     description="In brackets: the defaults, which a preset may replace.",
                                     argument_default=argparse.SUPPRESS)
    for name, default in vars(Config()).items():
        options = dict(type=type(default), choices=choices.get(name), metavar="VALUE")
        if isinstance(default, tuple):
            options = dict(type=type(default[0]), nargs="+", metavar="VALUE")
            default = " ".join(map(str, default))
        elif isinstance(default, bool):
            options = dict(action=argparse.BooleanOptionalAction)
        parser.add_argument("--" + name.replace("_", "-"), help=f"{comments[name]} [{default}]".replace("%", "%%"),
                            **options)
    given = vars(parser.parse_args(argv))
    preset = given.get("preset", "demo")
    return Config(**{"preset": preset, "out": f"runs/{preset}", **PRESETS[preset], **given})


# ---- Patches ---------------------------------------------------------------------------------------------------------
# The method sees an image only through square patches of a fixed scale. A patch's scale is the fraction of the image's
# area that it covers. A patch is a pure function of its image and of eleven uniform random numbers: two for its place,
# one for its scale (if that is a range, as in the usual multi-scale crops), and eight for its augmentation. A step
# draws one tensor of them, (B, V, 11).


def patch_side(height, width, scale):
    """The side, in pixels, of a square patch that covers the fraction `scale` of an image; at most its short side."""
    return max(1, min(height, width, round(math.sqrt(scale * height * width))))


def crop_patches(images, u, scale, size=None):
    """Cut random patches out of images, uniformly over the positions where they fit.

    images: (B, C, H, W), uint8 or float. u: (B, V, 3), uniform numbers in [0, 1): the vertical and the horizontal
    position, and the scale if that is a range. scale: the fraction of the image's area, or a range (low, high).
    size: the side to resize to, required for a range; None keeps the image's own pixels.
    Returns (B, V, C, s, s) in the images' dtype.
    """
    height, width = images.shape[-2:]
    if isinstance(scale, (tuple, list)):
        low, high = scale
        side = ((low + u[..., 2] * (high - low)) * height * width).sqrt().round().long()  # (B, V)
        side = side.clamp(patch_side(height, width, low), patch_side(height, width, high))
    else:
        side = patch_side(height, width, scale)
    top = (u[..., 0] * (height - side + 1)).long()  # (B, V), from 0 to height - side
    left = (u[..., 1] * (width - side + 1)).long()
    return _cut(images, top, left, side, size)


def grid_patches(images, per_side, scale, size=None):
    """Cut per_side x per_side evenly spaced patches; no randomness.

    images, size: as for `crop_patches`. scale: a float. Patches smaller than a cell of the grid are centred in the
    cells, so that per_side=1 gives the centre of the image; larger ones overlap and extend to the edges.
    Returns (B, per_side**2, C, s, s), row by row.
    """
    side = patch_side(*images.shape[-2:], scale)

    def starts(extent):
        margin = max(0, (extent / per_side - side) / 2)
        return torch.linspace(margin, extent - side - margin, per_side, device=images.device).round().long()

    top, left = torch.cartesian_prod(starts(images.shape[-2]), starts(images.shape[-1])).T  # (V,) each
    return _cut(images, top[None], left[None], side, size)


def _cut(images, top, left, side, size):
    """Cut squares of `side`, an int or (B, V), at top, left, each (B, V) or (1, V); resize them to `size` if given.

    Returns (B, V, C, s, s).
    """
    if isinstance(side, int) and size in (None, side):
        windows = images.unfold(2, side, 1).unfold(3, side, 1)  # all of them, as a view: (B, C, top, left, s, s)
        image = torch.arange(len(images), device=images.device)[:, None]  # (B, 1)
        return windows.permute(0, 2, 3, 1, 4, 5)[image, top, left]  # (B, V, C, s, s)
    # Crop and resize at once: each patch has a matrix of weights for its rows, and one for its columns.
    rows = _resize_weights(top, side, images.shape[-2], size)  # (B or 1, V, size, H)
    columns = _resize_weights(left, side, images.shape[-1], size)  # (B or 1, V, size, W)
    with torch.autocast(images.device.type, enabled=False):  # bfloat16 is too coarse for pixels
        patches = torch.einsum("bvyh,bchw,bvxw->bvcyx", rows, images.float(), columns)
    if not images.is_floating_point():
        patches = patches.round().clamp(0, 255)  # by a rounding error it could be 256, which is 0 in uint8
    return patches.to(images.dtype)


def _resize_weights(start, side, extent, size):
    """Matrices that resize pixels [start, start + side) of an axis of length `extent` to length `size`.

    Bilinear and antialiased, as in torchvision: an output pixel is an average of input pixels, weighted by a triangle
    of radius max(side / size, 1). start: (B, V); side: an int or (B, V). Returns (B, V, size, extent).
    """
    start = start[..., None, None]  # (B, V, 1, 1)
    side = torch.as_tensor(side, device=start.device)[..., None, None]  # likewise; (1, 1) if an int
    pixel = torch.arange(extent, device=start.device) + 0.5  # (extent,)
    pitch = side / size
    centre = start + (torch.arange(size, device=start.device)[:, None] + 0.5) * pitch  # (B, V, size, 1)
    weight = (1 - (pixel - centre).abs() / pitch.clamp(min=1)).clamp(min=0)
    weight = weight * ((pixel > start) & (pixel < start + side))  # only pixels of the patch
    return weight / weight.sum(-1, keepdim=True)


# ---- Augmentation ----------------------------------------------------------------------------------------------------
# The colours of each patch are changed independently, so that colour alone cannot tell which patches share an image.
# Operations, strengths and probabilities are those of the VICReg authors' code, but the jitter's order is fixed, and
# there is no blur, which would leave little of a small patch. The authors solarise one view with probability 0 and the
# other with 0.2; here all views are alike, and each is solarised with probability 0.1.


def augment(patches, u, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, jitter_prob=0.8, gray_prob=0.2,
            solarize_prob=0.1):
    """Flip, jitter, grey and solarise each patch with its own random numbers.

    patches: float (..., 3, s, s) in [0, 1]. u: (..., 8), uniform numbers in [0, 1), of the same dtype. The jitter is
    torchvision's ColorJitter: brightness, contrast and saturation are scaled by factors in 1 +- their strength, and
    the hue is shifted by at most `hue` of a full turn. Returns the same shape and range.
    """
    if not patches.is_floating_point():
        raise ValueError(f"augment takes float patches in [0, 1], not {patches.dtype}")
    flip, jitter, *amounts, gray, solarize = (number[..., None, None, None] for number in u.unbind(-1))
    d_brightness, d_contrast, d_saturation, d_hue = (
        torch.where(jitter < jitter_prob, (2 * amount - 1) * strength, 0.0)
        for amount, strength in zip(amounts, (brightness, contrast, saturation, hue)))
    x = torch.where(flip < 0.5, patches.flip(-1), patches)
    x = (x * (1 + d_brightness)).clamp(0, 1)
    x = torch.lerp(_luma(x).mean((-2, -1), keepdim=True), x, 1 + d_contrast).clamp(0, 1)
    x = torch.lerp(_luma(x), x, 1 + d_saturation).clamp(0, 1)
    x = _shift_hue(x, d_hue)
    x = torch.where(gray < gray_prob, _luma(x), x)
    return torch.where((solarize < solarize_prob) & (x >= 0.5), 1 - x, x)  # solarised: bright values are inverted


def _luma(patches):
    """ITU-R 601 grey value, torchvision's weights: (..., 3, s, s) -> (..., 1, s, s)."""
    r, g, b = patches.unbind(-3)
    return (0.2989 * r + 0.587 * g + 0.114 * b).unsqueeze(-3)


def _shift_hue(patches, shift):
    """Shift the hue of patches (..., 3, s, s) by `shift` turns, (..., 1, 1, 1), as in HSV."""
    r, g, b = patches.unbind(-3)
    value, low = patches.amax(-3), patches.amin(-3)
    chroma = value - low
    safe = torch.where(chroma > 0, chroma, 1.0)  # no 0 / 0 for grey, whose hue is arbitrary
    sector = torch.where(value == r, (g - b) / safe,
                         torch.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4))
    sector = sector + 6 * shift.squeeze(-3)  # (..., s, s), in sixths of a turn

    def channel(offset):  # back to RGB: each channel is the same trapezoid in hue, shifted by a third of a turn
        k = (sector + offset) % 6
        return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)

    return torch.stack([channel(5), channel(3), channel(1)], -3)


# ---- Encoder ---------------------------------------------------------------------------------------------------------
# The backbone f gives h = f(x), and is kept after training; the projector g gives z = g(h), on which the loss acts.
#
# `PatchNet` is a backbone for small patches. Two ideas are from Keller Jordan's airbench: a fixed first layer that
# whitens the pixels, and convolutions that begin by copying their input. Smooth colour dominates the pixels' variance,
# although edges and texture are what tell patches apart; whitening makes the two equally strong, which speeds up
# learning. `BatchNorm` is torch's, with statistics over the batches of all processes (see *Processes*).


def normalize(images):
    """uint8 in [0, 255] or float in [0, 1] -> float32 standardised by ImageNet's mean and standard deviation."""
    images = images if images.is_floating_point() else images / 255
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], device=images.device)[..., None, None]
    return (images.float() - mean) / std


def whitening_filters(images, epsilon=0.01):
    """PCA whitening of blocks of 3 x 3 pixels: a filter for each principal axis, axis / sqrt(variance + epsilon).

    images: uint8 (N, 3, H, W), of which about a million blocks are used. Returns float32 (54, 3, 3, 3), on the CPU:
    the 27 filters and their negatives, so that a ReLU after them keeps both signs.
    """
    some = images[::max(1, images[:, 0].numel() // 1_000_000)].cpu()
    blocks = F.unfold(normalize(some), 3).transpose(0, 1).flatten(1)  # (27, blocks)
    variances, axes = torch.linalg.eigh(torch.cov(blocks))
    filters = (axes / (variances + epsilon).sqrt()).T.unflatten(1, (3, 3, 3))
    return torch.cat([filters, -filters])


class PatchNet(nn.Module):
    """A backbone for small patches: standardised patches (N, 3, s, s) -> h (N, 2 * widths[-1]).

    A fixed first layer (`train` fills it with `whitening_filters`), then three convolutions of 3 x 3 and one of
    1 x 1, then global average pooling, and a fully connected layer whose output is concatenated with its input.
    Patches of 16 x 16 pixels give feature maps of side 14, 7, 4, 4, 4.
    """

    def __init__(self, widths=(64, 128, 256, 1024), stem_stride=1):
        super().__init__()
        self.width = 2 * widths[-1]
        self.whiten = nn.Conv2d(3, 54, 3, stem_stride, bias=False).requires_grad_(False)
        layers = []
        # For each convolution: input and output channels, kernel size, stride.
        for width_in, width, kernel, stride in zip((54, *widths[:-1]), widths, (3, 3, 3, 1), (2, 2, 1, 1)):
            convolution = nn.Conv2d(width_in, width, kernel, stride, kernel // 2, bias=False)
            nn.init.dirac_(convolution.weight.data[:width_in])  # these filters copy the input, until trained
            layers += [convolution, BatchNorm(width), nn.GELU()]
        self.layers = nn.Sequential(*layers)
        self.last = nn.Sequential(nn.Linear(widths[-1], widths[-1], bias=False), BatchNorm(widths[-1]), nn.ReLU())

    def forward(self, x):
        maps = self.layers(self.whiten(x).relu())
        mean = maps.sum((2, 3)) / maps[0, 0].numel()  # faster than .mean: the gradient of a sum is a view, not a copy
        return torch.cat([mean, self.last(mean)], 1)


def make_backbone(arch="patchnet", stem_stride=1):
    """PatchNet, or torchvision's ResNet-18, 34 or 50 without its classifier: (N, 3, s, s) -> (N, .width).

    stem_stride=4 is the ResNets' own stem, a 7 x 7 convolution of stride 2 and max-pooling, which shrinks
    small patches too much; 1 or 2 replaces it with one 3 x 3 convolution of that stride.
    """
    if arch == "patchnet":
        return PatchNet(stem_stride=stem_stride)
    backbone = torchvision.models.get_model(arch, norm_layer=BatchNorm)
    backbone.width, backbone.fc = backbone.fc.in_features, nn.Identity()
    if stem_stride != 4:
        backbone.conv1 = nn.Conv2d(3, 64, 3, stem_stride, 1, bias=False)
        nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
        backbone.maxpool = nn.Identity()
    return backbone


class Encoder(nn.Module):
    """Backbone f and projector g: standardised patches (N, 3, s, s) -> h (N, width), z (N, D)."""

    def __init__(self, arch="patchnet", stem_stride=1, projector=(2048, 2048, 2048)):
        super().__init__()
        self.backbone = make_backbone(arch, stem_stride)
        self.projector = torchvision.ops.MLP(self.backbone.width, projector, norm_layer=BatchNorm, bias=False)

    def forward(self, x):
        h = self.backbone(x)
        return h, self.projector(h)


# ---- Loss ------------------------------------------------------------------------------------------------------------
# Let p(x1, x2) be the distribution of two patches of one image, p(x) that of a single patch, and
# r = p(x1, x2) / (p(x1) p(x2)): how much more often than by chance the two occur together. The paper's first loss, L_C,
# fits r by w z1.z2, for some w > 0, over independent x1 and x2. Expand the square: in the cross term, r turns the
# expectation over independent patches into one over two patches of one image. This gives the paper's second loss, L_S:
#     L_C = E_{p(x1) p(x2)} [(w z1.z2 - r)^2] = 2 w L_S + const
#     L_S = w / 2 || E[z z^T] ||_F^2 - E_{p(x1, x2)} [z1.z2]
# If each of the D dimensions of z has mean 0 and variance 1, 2 L_S is, up to a constant,
#     w sum_{d != e} cov_de^2 + E_{p(x1, x2)} |z1 - z2|^2
# With w = 2 cov_weight / inv_weight and a factor of inv_weight / D, these are VICReg's covariance and invariance terms.
# VICReg ensures both: covariances are taken about the mean, and the hinge keeps the variances near 1, which the
# invariance term alone would shrink to 0.


def vicreg_loss(z, inv_weight=25.0, var_weight=25.0, cov_weight=1.0, eps=1e-4):
    """VICReg for V patches per image: the mean, over all pairs of patches, of the two-view loss.

    z: projections (B, V, D), B >= 2 images of V >= 2 patches. The loss of patches i and j, over all images, is
        inv_weight mse(zi, zj) + var_weight (hinge(zi) + hinge(zj)) / 2 + cov_weight (cov(zi) + cov(zj)),
        hinge(z) = mean_d relu(1 - sqrt(var_d + eps)),  cov(z) = sum_{d != e} cov_de^2 / D,
    with variances and covariances over the batch, with divisor B - 1. This is the VICReg authors' code
    (Bardes, Ponce, LeCun, 2022); the equation in their paper does not halve the hinges.
    Returns the loss and, in a dict, its unweighted terms, detached: inv, var, cov. z is cast to float32 at least, even
    under autocast.
    """
    B, V, D = z.shape
    with torch.autocast(z.device.type, enabled=False):
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        # The mean over pairs of |zi - zj|^2 is 2 / (V - 1) times the sum over patches of |zv - mean z|^2.
        inv = 2 / (V - 1) * (z - z.mean(1, keepdim=True)).square().sum() / (B * D)
        # Each patch is in equally many pairs: the mean of hinges and covariances over pairs equals that over patches.
        z = (z - z.mean(0)).transpose(0, 1)  # (V, B, D), each dimension centred over the batch
        variance = z.square().sum(1) / (B - 1)  # (V, D)
        var = (1 - (variance + eps).sqrt()).relu().mean()
        # Let Z (B, D) be the centred z of one patch of each image. The covariance matrix Z^T Z / (B - 1) is D x D, but
        # only the sum of its squares is needed, and Z Z^T, B x B, has the same: ||Z^T Z||_F = ||Z Z^T||_F. So the
        # smaller of the two is computed.
        gram = z @ z.mT if B < D else z.mT @ z
        squares = gram.square().sum() / (B - 1) ** 2
        cov = 2 * (squares - variance.square().sum()) / (V * D)  # 2: a pair adds cov(zi) and cov(zj)
        loss = inv_weight * inv + var_weight * var + cov_weight * cov
    return loss, {"inv": inv.detach(), "var": var.detach(), "cov": cov.detach()}


# ---- Bag of patches --------------------------------------------------------------------------------------------------
# A patch's embedding tells which other patches tend to share its image. The paper finds that the mean over an image's
# patches, which ignores where they are, represents the image as well as an embedding of the whole does, or better.


class BagOfPatches(nn.Module):
    """Images in, the mean embedding of a grid of their patches out.

    backbone, in eval mode: patches (N, 3, s, s) -> (N, width). per_side**2 patches of area fraction `scale`, a
    float, are resized to `size` if given (see `grid_patches`). forward takes (B, 3, H, W), uint8 or float in [0, 1],
    and returns float32 (B, width). Memory grows with B per_side**2: give it small batches, under torch.no_grad.
    """

    def __init__(self, backbone, per_side, scale, size=None):
        super().__init__()
        self.backbone, self.per_side, self.scale, self.size = backbone, per_side, scale, size

    def forward(self, images):
        patches = grid_patches(images, self.per_side, self.scale, self.size)  # (B, V, 3, s, s)
        h = self.backbone(normalize(patches.flatten(0, 1)).contiguous(memory_format=torch.channels_last))
        return h.float().unflatten(0, patches.shape[:2]).mean(1)


# ---- Processes -------------------------------------------------------------------------------------------------------
# torchrun starts a process per GPU, each with its part of every batch. Three things make them train as one: batch
# normalisation with statistics of the whole batch, projections gathered for the loss, and the average of the weights'
# gradients (DistributedDataParallel).

RANK = int(os.environ.get("RANK", 0))  # of this process among all
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # among those of this machine
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


class Gather(torch.autograd.Function):
    """Forward: the rows of all processes. Backward: the sum of their gradients, of which each keeps its own rows."""

    @staticmethod
    def forward(ctx, x):
        rows = [torch.empty_like(x) for _ in range(WORLD_SIZE)]
        dist.all_gather(rows, x)
        return torch.cat(rows)

    @staticmethod
    def backward(ctx, gradient):
        total = gradient.clone()
        dist.all_reduce(total)
        return total.chunk(WORLD_SIZE)[RANK]


def gather(x):
    """The rows of all processes, with gradients: (n, ...) -> (WORLD_SIZE * n, ...)."""
    return Gather.apply(x.contiguous()) if WORLD_SIZE > 1 else x


class BatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm1d or 2d with statistics over the batches of all processes, which must be equally large.

    Torch's SyncBatchNorm has no CPU version, waits for the GPU in every layer, and breaks a compiled graph there.
    """

    def _check_input_dim(self, x):
        pass  # (N, C) as well as (N, C, H, W)

    def forward(self, x):
        if not self.training or WORLD_SIZE == 1:
            return super().forward(x)
        axes = [0, *range(2, x.ndim)]  # all but the channels
        var, mean = torch.var_mean(x.to(self.weight.dtype), axes, correction=0)  # bfloat16 is too coarse for statistics
        means, variances = gather(torch.stack([mean, var])[None]).unbind(1)  # (WORLD_SIZE, C) each
        mean, var = means.mean(0), variances.mean(0) + means.var(0, correction=0)  # the law of total variance
        with torch.no_grad():
            count = WORLD_SIZE * x.numel() // x.shape[1]
            self.num_batches_tracked += 1
            share = self.momentum or 1 / self.num_batches_tracked  # None in torch's `update_bn`: a plain mean
            self.running_mean.lerp_(mean, share)
            self.running_var.lerp_(var * count / (count - 1), share)
        # F.batch_norm passes no gradient to the statistics it is given. So they go into scale and shift, and it gets
        # mean 0 and variance 1: x * scale + shift in one pass.
        scale = self.weight * (var + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return F.batch_norm(x, torch.zeros_like(mean), torch.ones_like(var), scale, shift, eps=0.0)


def start_process(name):
    """Join the processes of torchrun, if there are any. Returns this process's device; name: cuda, mps or cpu."""
    if name not in ("cpu", DEVICE):
        raise UserError(f"--device {name} is not available here; leave the flag out, or give cpu")
    device = torch.device(name, LOCAL_RANK) if name == "cuda" else torch.device(name)
    if name == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")  # TensorFloat-32, above all for the loss
    if WORLD_SIZE > 1:  # a long timeout: the others wait while the first process decodes the images
        dist.init_process_group("nccl" if name == "cuda" else "gloo", timeout=timedelta(hours=4))
    return device


def autocast(device):
    """A context for the network: bfloat16 where that is faster than float32."""
    fast = False
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        cpu = torch.cpu.get_capabilities()  # Intel's need AMX for it: their AVX-512 bfloat16 is slow
        fast = cpu.get("amx_bf16" if "Intel" in cpu.get("cpu_name", "") else "avx512_bf16", False)
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


# ---- Images ----------------------------------------------------------------------------------------------------------
# Whatever the source, images arrive as one uint8 tensor (N, 3, S, S): decoded once, not once per epoch.


def load_images(data, split="train", image_size=32, cache="data"):
    """The images of a split, "train" or "test": uint8 (N, 3, image_size, image_size), and labels int64 (N,) or None.

    data: demo; cifar10 or cifar100, which torchvision downloads to `cache` unless they are there; or a folder. If the
    folder has train/, and val/ or test/ beside it, these hold class folders. Otherwise all its images, at any depth,
    are training images, without labels. Raises UserError if there are no such images, or if some cannot be used.
    """
    if split not in ("train", "test"):
        raise UserError(f"the split of the images must be train or test, not {split}")
    if data == "demo":
        count, seed = (1_600, 0) if split == "train" else (1_000, 1)
        return demo_images(count, image_size, seed)[:2]
    if data in ("cifar10", "cifar100"):
        try:
            found = getattr(torchvision.datasets, data.upper())(cache, train=split == "train", download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(f"{data} is not in {cache} and could not be downloaded ({error}); give --data a folder of "
                            f"its images, or demo, which needs none") from error
        images = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
        return torchvision.transforms.functional.resize(images, [image_size] * 2), torch.tensor(found.targets)

    root, finder = Path(data).resolve(), torchvision.datasets.folder
    train, test = root / "train", root / ("val" if (root / "val").is_dir() else "test")
    folder, classes = root, {"": 0}  # one class, "": the folder itself
    if train.is_dir() and test.is_dir():
        folder = train if split == "train" else test
        names, own = ([name for name in finder.find_classes(each)[0] if name[0] != "."] for each in (train, folder))
        classes = {name: label for label, name in enumerate(names)}
        if unknown := set(own) - classes.keys():
            raise UserError(f"{folder / min(unknown)} is not one of the class folders in {train}")
    elif split == "test":
        raise UserError(f"{root} has no test images: they must lie in val/ or test/, beside train/")

    def refuse(error):
        raise UserError(f"cannot read {error.filename} ({error.strerror}); --data takes a folder of images")

    for _ in os.walk(folder, onerror=refuse, followlinks=True):
        pass  # make_dataset would skip a folder that cannot be read
    found = finder.make_dataset(folder, classes, finder.IMG_EXTENSIONS, allow_empty=True)  # at any depth
    found = [(path, label) for path, label in found if f"{os.sep}." not in path.removeprefix(str(folder))]  # not hidden
    if not found:
        raise UserError(f"no images in {folder} (none of {' '.join(finder.IMG_EXTENSIONS)})")
    paths, labels = zip(*found)
    images = decode_folder(folder, paths, image_size, Path(cache))
    return images, None if folder == root else torch.tensor(labels)


def decode_folder(folder, paths, size, cache):
    """The images of a folder, uint8 (N, 3, size, size), decoded once to a file in `cache`, which is memory-mapped."""
    digest = hashlib.sha256(os.fsencode("\n".join(paths))).hexdigest()[:16]
    decoded = cache / f"{folder.name}-{size}px-{digest}.npy"
    with contextlib.suppress(OSError, EOFError, ValueError):  # if the file is missing or was cut off, go on below
        images = torch.from_numpy(np.load(decoded, mmap_mode="c"))  # c, copy-on-write: torch takes only writable memory
        if RANK == 0:
            print(f"{folder} was decoded before; if its pixels have changed since, remove {decoded}", flush=True)
        return images
    shape, broken = (len(paths), 3, size, size), []

    def decode(path):  # the pixels, channel by channel, of the image's middle square; zeros if it is broken
        try:
            with Image.open(path) as image:
                if image.mode.startswith(("I", "F")):
                    raise ValueError(f"its pixels are of mode {image.mode}, of unknown range; convert them to 8 bits")
                with contextlib.suppress(Exception):  # whatever a damaged EXIF raises: the image is used as it lies
                    image = ImageOps.exif_transpose(image)
                image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
            return np.asarray(image).transpose(2, 0, 1).tobytes()
        except Exception as error:  # whatever a decoder raises
            broken.append(f"{os.path.relpath(path, folder)} ({error or type(error).__name__})")
            return bytes(3 * size * size)

    cache.mkdir(parents=True, exist_ok=True)
    unfinished = decoded.with_suffix(f".{RANK}")
    unfinished.touch()
    with open(unfinished, "r+b") as file:  # not "wb", which empties it: another run may be writing the same bytes to it
        np.lib.format.write_array_header_1_0(file, dict(descr="|u1", fortran_order=False, shape=shape))
        with ThreadPoolExecutor() as pool:
            for i in range(0, len(paths), 1024):
                file.writelines(pool.map(decode, paths[i:i + 1024]))
                if i % (50 * 1024) == 0:
                    print(f"decoding {folder}: {min(i + 1024, len(paths)):,} of {len(paths):,} images", flush=True)
    if broken:
        unfinished.unlink(missing_ok=True)
        raise UserError(f"{len(broken):,} of {len(paths):,} images in {folder} cannot be used, such as "
                        f"{', '.join(sorted(broken)[:10])}; remove or replace them")
    with contextlib.suppress(FileNotFoundError):  # if that other run has just renamed it
        unfinished.replace(decoded)  # only now: an interrupted file is not taken for a whole one
    return torch.from_numpy(np.load(decoded, mmap_mode="c"))


# The demo's images are generated, so that the truth is known. An image has 5 x 5 cells, each with a grating of one of
# 6 angles and 4 frequencies. Six classes each fix the angle of their cells, with random frequencies; four fix the
# frequency, with random angles. One cell in 20 ignores the class. So a grating is typical of two classes: in the
# one that fixes its angle it fills 24 % of the cells, in the one that fixes its frequency 16 %. From one cell, the best
# guess of the class is right with probability sum_g max_c p(g | c) p(c) = 24 (0.95 / 4 + 0.05 / 24) / 10 = 57.5 %. Only
# the mix of cells tells the class; colour, contrast, phase and noise do not.


def demo_probabilities():
    """p(grating | class), float32 (10, 24); gratings are numbered 4 angle + frequency."""
    gratings, p = torch.arange(24).view(6, 4), torch.full((10, 24), 0.05 / 24)
    for label, own in enumerate([*gratings, *gratings.T]):
        p[label, own] += 0.95 / len(own)
    return p


def demo_images(count, image_size, seed):
    """Draw images of the demo: uint8 (N, 3, S, S), their classes (N,), and the gratings of their cells (N, 25)."""
    if image_size % 5:
        raise UserError(f"the demo's images are 5 cells wide: --image-size must be a multiple of 5, not {image_size}")
    generator, side = torch.Generator().manual_seed(seed), image_size // 5

    def uniform(low, high, *channels):
        return low + (high - low) * torch.rand(count, *channels, 1, 1, generator=generator)

    labels = torch.randint(10, (count,), generator=generator)
    gratings = torch.multinomial(demo_probabilities()[labels], 25, replacement=True, generator=generator)
    images = torch.empty(count, 3, 5, side, 5, side, dtype=torch.uint8)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    for cell in range(25):  # row by row
        own = gratings[:, cell, None, None]
        angle = math.pi / 12 * (own // 4 + uniform(-0.3, 0.3))  # below 90 degrees: mirrored, it is none of the others
        waves = 1.5 ** (own % 4 + uniform(-0.3, 0.3)) / side  # per pixel
        tone = (2 * math.pi * (waves * (x * angle.cos() + y * angle.sin()) + uniform(0, 1))).cos()[:, None]
        noise = 0.15 * torch.randn(count, 3, side, side, generator=generator)
        cells = uniform(0.25, 0.75, 3) + (uniform(0.1, 0.3, 1) + uniform(-0.1, 0.1, 3)) * tone + noise
        images[:, :, cell // 5, :, cell % 5] = (cells.clamp(0, 1) * 255).to(torch.uint8)
    return images.view(count, 3, image_size, image_size), labels, gratings


# ---- Training --------------------------------------------------------------------------------------------------------
# The order of the images and the patches depend only on the seed and the epoch: each process draws the numbers of the
# whole batch and keeps those of its own images. So they do not depend on the number of processes, and a run
# continued from a checkpoint trains the encoder as if it had not been interrupted. Only the probe, a
# linear classifier whose accuracy is logged, starts anew.

LOG_EVERY = 50  # steps between lines of the log, each of which waits for the GPU


def training_views(images, u, config, augmented=True):
    """The encoder's input: V random patches per image, augmented (unless `augmented` is False) and standardised.

    images: uint8 (B, 3, S, S). u: (B, V, 11), uniform numbers in [0, 1). Returns (B V, 3, s, s).
    """
    scale = config.patch_scale if len(config.patch_scale) == 2 else config.patch_scale[0]  # a range, or a float
    patches = crop_patches(images, u[..., :3], scale, config.patch_size or None)
    if augmented:
        patches = augment(patches / 255, u[..., 3:])
    return normalize(patches).flatten(0, 1).contiguous(memory_format=torch.channels_last)


def effective_rank(h):
    """exp(entropy) of the normalised singular values of h (N, width), first 1,024 rows, centred; 1 means collapsed."""
    h = h.detach()[:1024].cpu().double()  # not every device has eigvalsh, or float64
    h = h - h.mean(0)
    spectrum = torch.linalg.eigvalsh(h @ h.T).clamp(min=0).sqrt()  # far cheaper than an SVD
    return torch.special.entr(spectrum / spectrum.sum().clamp(min=1e-12)).sum().exp().item()


def open_run(config):
    """Make and return config.out, folder of this run, new or continued. Raises UserError if anything else is in it."""
    out = Path(config.out)
    may_change = ("preset", "cache", "out", "epochs", "device", "compile", "save_every")  # when a run goes on
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not any(out.glob("[!.]*")):  # nothing, but for hidden files
            with open(out / "config.json", "x") as file:  # x: of two runs started at once, one fails here
                json.dump(vars(config), file)
        before = vars(Config(**json.loads((out / "config.json").read_text())))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{out} cannot be the folder of this run ({error}); give another --out") from error
    changed = [f"{name} was {value}, is {getattr(config, name)}" for name, value in before.items()
               if name not in may_change and value != getattr(config, name)]
    if changed:
        raise UserError(f"{out} holds a run with other settings ({'; '.join(changed)}); give another --out")
    return out


def load_encoder(path):
    """From a checkpoint.pt: the encoder, in eval mode, on the CPU; its Config; and all that `train` saved, a dict.

    Raises OSError if the file cannot be read, and UserError if it can but is something else.
    """
    content = io.BytesIO(Path(path).read_bytes())  # at once, so that an error while reading is not taken for damage
    try:
        saved = torch.load(content, map_location="cpu", weights_only=True)  # True: no code in the file is run
        config = Config(**saved["config"])
        encoder = Encoder(config.arch, config.stem_stride, config.projector)
        encoder.load_state_dict(saved["encoder"])
    except Exception as error:  # whatever torch raises on a damaged or foreign file
        if isinstance(error, MemoryError) or "memory" in str(error):  # torch reports it as a RuntimeError
            raise
        raise UserError(f"{path} is damaged, or not a checkpoint of this version of bagssl.py") from error
    return encoder.eval().to(memory_format=torch.channels_last), config, saved


def train(config):
    """Pretrain as `config` says, from the last checkpoint if there is one. Raises UserError if that is not possible.

    The folder config.out gets config.json; checkpoint.pt, a dict of config, epoch, encoder and optimizer; and
    log.jsonl, in which steps that a continued run repeats stand twice.
    """
    config = Config(**json.loads(json.dumps(vars(config))))  # checked again, in plain types: fields may have been set
    B, V, b = config.batch_size, config.num_patches, config.batch_size // WORLD_SIZE
    if B % WORLD_SIZE or b < 2:
        raise UserError(f"--batch-size {B} cannot be divided among {WORLD_SIZE} processes, at least 2 images each")
    device = start_process(config.device)
    if LOCAL_RANK > 0:
        dist.barrier()  # until the first process of this machine has loaded, and if need be decoded, the images
    images, labels = load_images(config.data, "train", config.image_size, config.cache)
    if LOCAL_RANK == 0 and WORLD_SIZE > 1:
        dist.barrier()  # the others may go on: they find the images decoded
    per_epoch = len(images) // B  # an epoch's last, incomplete batch is left out
    steps = config.epochs * per_epoch
    if per_epoch == 0:
        raise UserError(f"{len(images)} images are fewer than a batch of {B}; give a smaller --batch-size")

    torch.manual_seed(config.seed)
    encoder = Encoder(config.arch, config.stem_stride, config.projector)
    if config.arch == "patchnet":
        encoder.backbone.whiten.weight.copy_(whitening_filters(images))
    encoder.to(device, memory_format=torch.channels_last)
    parameters = [p for p in encoder.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
              {"params": [p for p in parameters if p.ndim == 1]}]  # BatchNorm's
    optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=0.9, nesterov=True, fused=True)

    state = [None]  # the last checkpoint, if there is one; in a list, as broadcasting takes one
    start = 0  # epochs that it has done
    if RANK == 0:
        out = open_run(config)  # only now: a failed start leaves no folder
        if (out / "checkpoint.pt").exists():
            state = [load_encoder(out / "checkpoint.pt")[2]]
    if WORLD_SIZE > 1:
        dist.broadcast_object_list(state)  # so that only rank 0 must see the file
    if checkpoint := state[0]:
        start, before = checkpoint["epoch"], checkpoint["config"]["epochs"]
        if before > config.epochs:
            raise UserError(f"{config.out} holds a run of {before} epochs; give at least as many --epochs, or another "
                            f"--out")
        encoder.load_state_dict(checkpoint["encoder"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    if RANK == 0:
        log = open(out / "log.jsonl", "a", buffering=1)
        print(f"{config}\n{len(images):,} images {'without' if labels is None else 'with'} labels from {config.data}; "
              f"{sum(p.numel() for p in parameters) / 1e6:.1f} M weights on {device.type}, processes: {WORLD_SIZE}; "
              f"{start} of {config.epochs} epochs done", flush=True)

    model, make_views = encoder, training_views
    if WORLD_SIZE > 1:
        model = nn.parallel.DistributedDataParallel(encoder)
        model.broadcast_buffers = False  # BatchNorm's are equal already (set here, as torch has renamed the argument)
    if config.compile:  # a compiled DDP still overlaps communication with computation
        model, make_views = torch.compile(model), torch.compile(training_views)

    probe = None
    if labels is not None:  # a probe that shows what has been learned; each process trains its own, on its own images
        width = encoder.backbone.width
        probe = nn.Sequential(nn.BatchNorm1d(width, affine=False), nn.Linear(width, int(labels.max()) + 1)).to(device)
        probe_optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-3)

    fits = device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info()[0] / 2
    tensors = (tensor.to(device) if fits else tensor for tensor in (images, labels) if tensor is not None)
    dataset = torch.utils.data.TensorDataset(*tensors)
    # If they do not fit on the GPU, several processes read the memory map while it computes.
    workers = dict(num_workers=8, pin_memory=True, multiprocessing_context="fork")  # fork: the map is not copied
    reading = workers if device.type == "cuda" and not fits else {}
    own = slice(RANK * b, (RANK + 1) * b)  # this process's share of a batch

    def batches(epoch):
        """For each step, eleven numbers for each patch (b, V, 11), images (b, 3, S, S) and, if given, labels (b,)."""
        generator = torch.Generator().manual_seed(1_000_000 * config.seed + epoch)
        order = torch.randperm(len(images), generator=generator)[:per_epoch * B].view(per_epoch, B)
        # batch_size=None: each row of `order` serves as one index, which fetches a whole batch.
        for parts in torch.utils.data.DataLoader(dataset, sampler=order[:, own], batch_size=None, **reading):
            u = torch.rand(B, V, 11, generator=generator)[own]
            yield [part.to(device, non_blocking=True) for part in (u, *parts)]

    begun = last_save = time.time()
    for epoch in range(start, config.epochs):
        for step, (u, batch, *target) in enumerate(batches(epoch), epoch * per_epoch + 1):  # step: of the run
            x = make_views(batch, u, config)  # (b V, 3, s, s)
            with autocast(device):
                h, z = model(x)  # (b V, width), (b V, D)
            z = gather(z.unflatten(0, (b, V)))  # (B, V, D)
            loss, terms = vicreg_loss(z, config.inv_weight, config.var_weight, config.cov_weight)
            optimizer.zero_grad()
            # Each process has the loss of the whole batch: `Gather.backward` sums WORLD_SIZE equal gradients of it, and
            # DDP's mean over the processes divides by WORLD_SIZE.
            loss.backward()
            norm = nn.utils.clip_grad_norm_(parameters, config.clip or math.inf)
            # Stop at NaN: checked rarely, as it waits for the GPU, but always before a checkpoint is saved.
            if (step % 10 == 0 or step % per_epoch == 0) and not norm.isfinite():
                raise UserError(f"the gradients of step {step} are not finite; start again with a lower --lr and "
                                f"another --out")
            warmup = min(1, step / (config.warmup * steps + 1))
            lr = config.lr * warmup * (1 + math.cos(math.pi * (step - 1) / steps)) / 2
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()

            if probe is not None:
                scores = probe(h.detach().float().unflatten(0, (b, V)).mean(1))  # (b, classes); detached: it only looks
                probe_optimizer.zero_grad()
                F.cross_entropy(scores, target[0]).backward()
                probe_optimizer.step()
                terms["probe"] = 100 * (scores.argmax(1) == target[0]).float().mean()  # % right, before this step

            if RANK == 0 and (step % LOG_EVERY == 0 or step == steps):
                seconds = (time.time() - begun) / (step - start * per_epoch)  # per step
                entry = {"loss": loss.item(), **{name: term.item() for name, term in terms.items()},
                         "gradient_norm": norm.item(), "lr": lr, "effective_rank": effective_rank(h),
                         "patches_per_s": B * V / seconds}
                log.write(json.dumps({"step": step, **entry}) + "\n")
                print(f"step {step} of {steps}, {timedelta(seconds=round(seconds * (steps - step)))} left:  "
                      + "  ".join(f"{name} {value:.4g}" for name, value in entry.items()), flush=True)

        if epoch + 1 == config.epochs:
            # BatchNorm's running statistics are of augmented patches, but the encoder will be used on plain ones:
            # replace them with statistics of up to 100 batches of plain patches.
            plain = (training_views(batch, u, config, augmented=False)
                     for u, batch, *_ in itertools.islice(batches(0), 100))
            with autocast(device):
                torch.optim.swa_utils.update_bn(plain, encoder)
        if RANK == 0 and (epoch + 1 == config.epochs or time.time() - last_save >= 60 * config.save_every):
            unfinished, last_save = out / f".checkpoint-{os.getpid()}.pt", time.time()
            torch.save({"config": vars(config), "epoch": epoch + 1, "encoder": encoder.state_dict(),
                        "optimizer": optimizer.state_dict()}, unfinished)
            unfinished.replace(out / "checkpoint.pt")  # only now: an interrupted file is not taken for a whole one
    if RANK == 0:
        print(f"trained for {timedelta(seconds=round(time.time() - begun))}; saved {out}/checkpoint.pt\n"
              f"probe it: python eval_linear.py --checkpoint {out}/checkpoint.pt")
    if WORLD_SIZE > 1:
        dist.destroy_process_group()


def run_cli(main):
    """Call main(), of this or another script. An error that the user can fix is printed, and the exit code is 2."""
    sys.stdout.reconfigure(errors="backslashreplace")  # for paths that the terminal's encoding lacks
    try:
        main()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run_cli(lambda: train(parse_config()))
