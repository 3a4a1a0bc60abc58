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

After the configuration comes the method: patches, augmentation, encoder, loss, bag, training. The rest is
infrastructure: images, the demo's images, processes, the run, the command line.

    python bagssl.py --preset demo                       # generated images; needs no data and no GPU
    python bagssl.py --preset cifar10-cpu                # CIFAR-10 on a CPU
    torchrun --standalone --nproc_per_node=8 bagssl.py --preset imagenet --data /path/to/imagenet
    python eval_linear.py --checkpoint runs/demo/checkpoint.pt
"""

import argparse
import ctypes
import functools
import hashlib
import inspect
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import nn

# ----------------------------------------------------------------------------------------------------------------------
# Config
#
# Every field is a command-line flag, and its comment is the flag's help. A preset overrides the defaults, and a flag
# overrides the preset: parse_config(["--preset", "demo"]) does so from Python too.


@dataclass
class Config:
    preset: str = ""  # default: demo with --dataset demo; cifar10 on CUDA; cifar10-cpu with --data/--dataset; else demo
    dataset: str = "cifar10"  # demo, cifar10, cifar100, stl10, fashionmnist; else any images, in DATA/DATASET or DATA
    data: str = ""  # folder of images, or of torchvision's files; default: ./data/DATASET, downloaded if missing
    cache: str = ""  # folder for decoded images; default: .bagssl in the folder of images, shared by all runs
    out: str = ""  # folder of the run; default: runs/PRESET; an interrupted run there is continued
    arch: str = "patchnet"  # patchnet, made for small patches; resnet18, resnet34, resnet50, as in published work
    stem_stride: int = 1  # stride of the first layer, 1 or 2; 4: a resnet's own stem, 7x7 convolution and max-pooling
    projector: tuple = (2048, 2048, 2048)  # widths of the projector's layers
    image_size: int = 32  # images are resized to this short side and centre-cropped to a square
    patch_scale: tuple = (0.25,)  # a patch's fraction of the image's area; two values: a range (multi-scale)
    patch_size: int = 0  # patches are resized to this side; 0: not resized; a range of scales needs it
    num_patches: int = 4  # V, patches per image and step
    batch_size: int = 256  # B, images per step, over all processes
    epochs: int = 30  # passes over the images
    lr: float = 0.1  # learning rate, not scaled by the batch size (SGD, Nesterov momentum 0.9; warmup, cosine decay)
    clip: float = 2.0  # maximum gradient norm; in the first steps, gradients can be 20 times as large as later
    warmup: float = 0.1  # fraction of the steps over which the learning rate rises
    weight_decay: float = 1e-4  # not applied to BatchNorm's parameters
    inv_weight: float = 25.0  # weight of the invariance term; the defaults of all three are the VICReg authors'
    var_weight: float = 25.0  # weight of the variance term
    cov_weight: float = 1.0  # weight of the covariance term
    seed: int = 0  # random seed of the initial weights, the order of the images, the patches, and the demo's images
    device: str = ""  # cuda, mps, cpu; default: the best there is
    compile: str = "auto"  # yes, no, or auto: with CUDA only (on a CPU it gains a few per cent)
    save_every: float = 5.0  # minutes between checkpoints


# Chosen on CIFAR-10. Smaller batches allow more steps in the same time. An inv_weight of 25 loses two to three
# points of accuracy against 10.
CIFAR = dict(batch_size=64, projector=(1024, 1024, 1024), inv_weight=10.0)

PRESETS = {
    # Two patches of an image share little but its class, one of ten: few dimensions of z suffice. As their projections
    # cannot agree closely, the invariance term stays large, and cov_weight is raised to match.
    "demo": dict(dataset="demo", image_size=80, patch_scale=(0.04,), batch_size=64, epochs=1, projector=(512, 512, 32),
                 cov_weight=10.0),
    "cifar10-cpu": dict(CIFAR, dataset="cifar10", epochs=18),  # half an hour on two cores, less on fast ones
    "cifar10": dict(CIFAR, dataset="cifar10", epochs=110),
    "cifar100": dict(CIFAR, dataset="cifar100", epochs=110),
    # The paper's patches, 32 x 32 pixels of 224 x 224, and its network.
    "imagenet": dict(dataset="imagenet", arch="resnet50", image_size=224, patch_scale=(0.0204,),
                     projector=(8192, 8192, 8192), batch_size=2048, epochs=100),
}


class UserError(Exception):
    """Something the person at the command line can fix: printed as one sentence, exit code 2."""


# ----------------------------------------------------------------------------------------------------------------------
# Patches
#
# The method sees an image only through square patches of a fixed scale. A patch's scale is the fraction of the image's
# area that it covers. A patch is a pure function of its image and of eleven uniform random numbers: two for its place,
# one for its scale (if that is a range, as in the usual multi-scale crops), and eight for its augmentation. A step
# draws one tensor of them, (B, V, 11).


def patch_side(height, width, scale):
    """The side, in pixels, of a square patch that covers the fraction `scale` of an image; at most its short side."""
    if not 0 < scale <= 1:
        raise ValueError(f"a patch's scale is a fraction of the image's area, in (0, 1], not {scale}")
    return max(1, min(height, width, round(math.sqrt(scale * height * width))))


def crop_patches(images, u, scale, size=None):
    """Cut random patches out of images, uniformly over the positions where they fit.

    images: (B, C, H, W), uint8 or float. u: (B, V, 3), uniform numbers in [0, 1): the vertical and the
    horizontal position, and the scale if that is a range. scale: the fraction of the image's area,
    or a range (low, high). size: the side to resize to, required for a range; None keeps the image's own pixels.
    Returns (B, V, C, s, s) in the images' dtype. Raises ValueError unless scales are in (0, 1] and,
    for a range, low <= high and size is given.
    """
    height, width = images.shape[-2:]
    if isinstance(scale, (tuple, list)):
        low, high = scale
        if size is None or low > high:
            raise ValueError(f"a range of scales needs low <= high and a size, not ({low}, {high}) and {size}")
        area = (low + u[..., 2] * (high - low)) * height * width
        side = area.sqrt().round().long().clamp(patch_side(height, width, low), patch_side(height, width, high))
    else:
        side = patch_side(height, width, scale)
    top = (u[..., 0] * (height - side + 1)).long()  # (B, V), from 0 to height - side
    left = (u[..., 1] * (width - side + 1)).long()
    return _cut(images, top, left, side, size)


def grid_patches(images, per_side, scale, size=None):
    """Cut per_side x per_side evenly spaced patches; no randomness.

    images, size: as for `crop_patches`. scale: a float. Patches smaller than a cell of the grid are
    centred in the cells, so that per_side=1 gives the centre of the image; larger ones overlap and
    extend to the edges. Returns (B, per_side**2, C, s, s), row by row. Raises ValueError on a scale
    outside (0, 1].
    """
    side = patch_side(*images.shape[-2:], scale)

    def starts(extent):
        margin = max(0, (extent / per_side - side) / 2)
        return torch.linspace(margin, extent - side - margin, per_side, device=images.device).round().long()

    top, left = (starts(extent) for extent in images.shape[-2:])
    return _cut(images, top.repeat_interleave(per_side)[None], left.repeat(per_side)[None], side, size)


def _cut(images, top, left, side, size):
    """Cut squares, and resize them to `size` unless that is None: (B, V, C, s, s).

    top, left: their upper left corners, int64 (B, V) or (1, V). side: an int, or int64 (B, V).
    """
    if isinstance(side, int) and size in (None, side):
        windows = images.unfold(2, side, 1).unfold(3, side, 1)  # all of them, as a view: (B, C, top, left, s, s)
        index = torch.arange(len(images), device=images.device)[:, None]  # (B, 1)
        return windows[index, :, top, left]  # (B, V, C, s, s): indexed dimensions come first
    # Crop and resize at once: each patch has a matrix of weights for its rows, and one for its columns.
    rows = _resize_weights(top, side, images.shape[-2], size)  # (B or 1, V, size, H)
    columns = _resize_weights(left, side, images.shape[-1], size)  # (B or 1, V, size, W)
    with torch.autocast(images.device.type, enabled=False):  # bfloat16 is too coarse for pixels
        patches = torch.einsum("bvyh,bchw,bvxw->bvcyx", rows, images.float(), columns)
    if not images.is_floating_point():
        patches = patches.round().clamp(0, 255)  # a coarse float32_matmul_precision can leave [0, 255]
    return patches.to(images.dtype)


def _resize_weights(start, side, extent, size):
    """Matrices that resize pixels [start, start + side) of an axis of length `extent` to length `size`.

    Bilinear and antialiased: an output pixel is an average of input pixels, weighted by a triangle of
    radius max(side / size, 1).
    start: (B, V); side: an int or (B, V). Returns (B, V, size, extent), rows summing to 1.
    """
    start = start[..., None, None]  # (B, V, 1, 1)
    side = torch.as_tensor(side, device=start.device)[..., None, None]  # the same, or (1, 1)
    pixel = torch.arange(extent, device=start.device) + 0.5  # (extent,)
    pitch = side / size
    centre = start + (torch.arange(size, device=start.device)[:, None] + 0.5) * pitch  # (B, V, size, 1)
    weight = (1 - (pixel - centre).abs() / pitch.clamp(min=1)).clamp(min=0)
    weight = weight * ((pixel > start) & (pixel < start + side))
    return weight / weight.sum(-1, keepdim=True)


# ----------------------------------------------------------------------------------------------------------------------
# Augmentation
#
# The colours of each patch are changed independently, so that colour alone cannot tell which patches share an image.
# Operations, strengths and probabilities are those of the VICReg authors' code, but the jitter's order is fixed, and
# there is no blur, which would leave little of a small patch. The authors solarise one view with probability 0 and the
# other with 0.2; here all views are alike, and each is solarised with probability 0.1.


def augment(patches, u, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, jitter_prob=0.8, gray_prob=0.2,
            solarize_prob=0.1):
    """Flip, jitter, grey and solarise each patch with its own random numbers.

    patches: float (..., 3, s, s) in [0, 1]. u: (..., 8), uniform numbers in [0, 1), of the same dtype. A patch
    is mirrored left to right with probability 1/2. With probability jitter_prob it is jittered as in torchvision's
    ColorJitter: its brightness, contrast and saturation are scaled by factors in 1 +- their strength, and its hue is
    shifted by at most `hue` of a full turn. Then it loses its colour with probability gray_prob, and last, values of
    0.5 or more are inverted (solarised) with probability solarize_prob. Returns the same shape and range. Raises
    ValueError unless patches are float, with 3 channels.
    """
    if not patches.is_floating_point() or patches.shape[-3] != 3:
        raise ValueError(f"augment takes float patches (..., 3, s, s) in [0, 1], not {patches.dtype} "
                         f"of shape {tuple(patches.shape)}")
    flip, jitter, *amounts, gray, solarize = u[..., None, None, None].unbind(-4)  # each (..., 1, 1, 1)
    d_brightness, d_contrast, d_saturation, d_hue = (
        torch.where(jitter < jitter_prob, (2 * amount - 1) * strength, 0.0)
        for amount, strength in zip(amounts, (brightness, contrast, saturation, hue)))
    x = torch.where(flip < 0.5, patches.flip(-1), patches)
    x = (x * (1 + d_brightness)).clamp(0, 1)
    x = torch.lerp(_luma(x).mean((-2, -1), keepdim=True), x, 1 + d_contrast).clamp(0, 1)
    x = torch.lerp(_luma(x), x, 1 + d_saturation).clamp(0, 1)
    x = _shift_hue(x, d_hue)
    x = torch.where(gray < gray_prob, _luma(x), x)
    return torch.where((solarize < solarize_prob) & (x >= 0.5), 1 - x, x)


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


# ----------------------------------------------------------------------------------------------------------------------
# Encoder
#
# The backbone f gives the embedding h = f(x) of a patch x, and is kept after training. The projector g gives its
# projection z = g(h), on which the loss acts (the paper's section 2).
#
# `PatchNet` is a network for small patches. Two ideas are from Keller Jordan's airbench: a fixed first layer that
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
        for width_in, width, kernel, stride in zip((54, *widths), widths, (3, 3, 3, 1), (2, 2, 1, 1)):
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


# ----------------------------------------------------------------------------------------------------------------------
# Loss
#
# Let p(x1, x2) be the distribution of two patches of one image, and p(x) that of a single patch. The ratio
# r = p(x1, x2) / (p(x1) p(x2)) says how much more often than by chance two patches occur together. The paper's first
# loss, L_C, fits r by the inner product of their projections, times a w > 0:
#     L_C = E_{p(x1) p(x2)} [ (w z1.z2 - r)^2 ]
# Expand it. The mean of r z1.z2 is E_{p(x1, x2)}[z1.z2]; that of (z1.z2)^2 is || E[z z^T] ||_F^2, as x1 and x2 are
# independent; that of r^2 is constant. So L_C is 2 w L_S + const, where L_S is the paper's second loss:
#     L_S = - E_{p(x1, x2)}[z1.z2] + w / 2 || E[z z^T] ||_F^2
# If each of the D dimensions of z has mean 0 and variance 1, VICReg's loss is inv_weight / D times 2 L_S, up to a
# constant; term by term:
#     -2 E[z1.z2] = E |z1 - z2|^2 + const                       (invariance)
#     w || E[z z^T] ||_F^2 = w sum_{d != e} cov_de^2 + const    (covariance; w = 2 cov_weight / inv_weight)
# VICReg sees to that mean and variance: it subtracts the mean before the covariances, and its hinge keeps the variances
# near 1, while the invariance term alone would shrink them to 0.


def vicreg_loss(z, inv_weight=25.0, var_weight=25.0, cov_weight=1.0, eps=1e-4, rank=0, world_size=1):
    """VICReg for V patches per image: the mean, over all pairs of patches, of the two-view loss.

    z: projections (B, V, D), B >= 2 images of V >= 2 patches. The loss of patches i and j, over all images, is
        inv_weight mse(zi, zj) + var_weight (hinge(zi) + hinge(zj)) / 2 + cov_weight (cov(zi) + cov(zj)),
        hinge(z) = mean_d relu(1 - sqrt(var_d + eps)),  cov(z) = sum_{d != e} cov_de^2 / D,
    with variances and covariances over the batch, with divisor B - 1. This is the VICReg authors' code
    (Bardes, Ponce, LeCun, 2022); the equation in their paper does not halve the hinges.
    Returns the loss and a dict of its unweighted terms, detached: inv, var, cov. Computed in float32
    (float64 if z is), also under autocast. Raises ValueError if z has another shape.

    rank, world_size: processes that all hold the same z can share the covariance term. Each computes a part of it and
    multiplies that by world_size, so that the means of loss, cov and gradient over the processes are exact.
    """
    if z.ndim != 3 or z.shape[0] < 2 or z.shape[1] < 2:
        raise ValueError(f"vicreg_loss takes z (B, V, D) with B >= 2 and V >= 2, not {tuple(z.shape)}")
    B, V, D = z.shape
    with torch.autocast(z.device.type, enabled=False):
        z = z if z.dtype == torch.float64 else z.float()
        # The mean over pairs of |zi - zj|^2 is 2 / (V - 1) times the sum over patches of |zv - mean z|^2.
        inv = 2 / (V - 1) * (z - z.mean(1, keepdim=True)).square().sum() / (B * D)  # Tensor.var is slower
        # Each patch is in equally many pairs: the mean of hinges and covariances over pairs equals that over patches.
        z = (z - z.mean(0)).transpose(0, 1)  # (V, B, D), each dimension centred over the batch
        variance = z.square().sum(1) / (B - 1)  # (V, D)
        var = (1 - (variance + eps).sqrt()).relu().mean()
        # All squared covariances sum to ||Z^T Z||_F^2 / (B - 1)^2, and ||Z^T Z||_F = ||Z Z^T||_F: take the smaller.
        rows = z if B < D else z.mT  # (V, min(B, D), max(B, D))
        part = slice(rank * rows.shape[1] // world_size, (rank + 1) * rows.shape[1] // world_size)
        squares = world_size * (rows[:, part] @ rows.mT).square().sum() / (B - 1) ** 2
        cov = 2 * (squares - variance.square().sum()) / (V * D)  # 2: a pair adds cov(zi) and cov(zj)
        loss = inv_weight * inv + var_weight * var + cov_weight * cov
    return loss, {"inv": inv.detach(), "var": var.detach(), "cov": cov.detach()}


# ----------------------------------------------------------------------------------------------------------------------
# Bag of patches
#
# A patch's embedding tells which other patches tend to share its image. The paper finds that the mean over an image's
# patches, which ignores where they are, represents the image as well as an embedding of the whole does, or better.


class BagOfPatches(nn.Module):
    """Images in, the mean embedding of a grid of their patches out.

    backbone, in eval mode: patches (N, 3, s, s) -> (N, width). per_side**2 patches of area fraction `scale`, a
    float, are resized to `size` if given (see `grid_patches`). forward takes (B, 3, H, W), uint8 or float in [0, 1],
    and returns float32 (B, width). The backbone gets at most `chunk` patches at a time, which bounds the memory under
    torch.no_grad.
    """

    def __init__(self, backbone, per_side, scale, size=None, chunk=256):
        super().__init__()
        self.backbone, self.chunk = backbone, chunk
        self.per_side, self.scale, self.size = per_side, scale, size

    def forward(self, images):
        bags = []
        for block in images.split(max(1, self.chunk // self.per_side ** 2)):
            patches = grid_patches(block, self.per_side, self.scale, self.size).flatten(0, 1)  # (b V, 3, s, s)
            x = normalize(patches).contiguous(memory_format=torch.channels_last)
            h = torch.cat([self.backbone(some).float() for some in x.split(self.chunk)])  # one bag may exceed a chunk
            bags.append(h.unflatten(0, (len(block), -1)).mean(1))
        return torch.cat(bags)


# ----------------------------------------------------------------------------------------------------------------------
# Training
#
# The order of the images depends only on the seed and the epoch, the patches only on the seed and the step: each
# process draws the numbers of the whole batch and keeps those of its own images. So the patches do not depend on the
# number of processes, and a resumed run draws the same images, crops and augmentations as an uninterrupted one. RANK is
# this process's rank among WORLD_SIZE processes. `training_images` and `batches` are in *Images*; `gather`, `autocast`,
# `generator_for` and `parallelize_and_compile` in *Processes*; `find_checkpoint`, `OnlineProbe` and `Run` in *The run*.


def training_views(images, u, config, augmented=True):
    """The encoder's input: V random patches per image, augmented (unless `augmented` is False) and standardised.

    images: uint8 (B, 3, S, S). u: (B, V, 11), uniform numbers in [0, 1). Returns (B V, 3, s, s).
    """
    scale = config.patch_scale if len(config.patch_scale) == 2 else config.patch_scale[0]
    patches = crop_patches(images, u[..., :3], scale, config.patch_size or None)
    if augmented:
        patches = augment(patches / 255, u[..., 3:])
    return normalize(patches).flatten(0, 1).contiguous(memory_format=torch.channels_last)


def train(config, device):
    """Pretrain as `config` says; `config.out` gets log.jsonl, checkpoint.pt and backbone.pt."""
    checkpoint = find_checkpoint(config)  # in config.out, or None
    images, labels = training_images(config, device)  # uint8 (N, 3, S, S); int64 (N,), only for OnlineProbe, or None
    torch.manual_seed(config.seed)
    encoder = Encoder(config.arch, config.stem_stride, config.projector)
    if config.arch == "patchnet":
        encoder.backbone.whiten.weight.copy_(whitening_filters(images))
    encoder.to(device, memory_format=torch.channels_last)
    parameters = [p for p in encoder.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.ndim > 1]},
              {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0}]  # BatchNorm's
    optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=0.9, nesterov=True, weight_decay=config.weight_decay,
                                fused=True)

    B, V, b = config.batch_size, config.num_patches, config.batch_size // WORLD_SIZE
    rows = slice(RANK * b, (RANK + 1) * b)  # this process's share of a batch
    steps = config.epochs * (len(images) // B)
    model, make_views = parallelize_and_compile(encoder, training_views, config, device)

    def draw(step):  # the eleven numbers of each of this process's patches
        u = torch.rand(B, V, 11, generator=generator_for(config.seed, "patches", step))[rows]
        return u.to(device, non_blocking=device.type == "cuda")  # so the CPU need not wait for the GPU

    with Run(config, device, encoder, optimizer, steps, checkpoint, labels) as run:  # resumes from the checkpoint
        for step, batch, classes in batches(images, labels, config, rows, device, run.start, steps):
            x = make_views(batch, draw(step), config)  # (b V, 3, s, s)
            with autocast(device):
                h, z = model(x)  # (b V, width), (b V, D)
            z = gather(z.unflatten(0, (-1, V)))  # (B, V, D)
            loss, terms = vicreg_loss(z, config.inv_weight, config.var_weight, config.cov_weight,
                                      rank=RANK, world_size=WORLD_SIZE)
            optimizer.zero_grad()
            loss.backward()  # exact: `gather` sums z's gradients over processes, DDP's mean divides by their number
            norm = nn.utils.clip_grad_norm_(parameters, config.clip)  # the norm before clipping
            warmup = min(1, (step + 1) / (config.warmup * steps + 1))
            for group in optimizer.param_groups:
                group["lr"] = config.lr * warmup * (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.step()
            run.after_step(step, loss, terms, norm, h, classes)
        if run.start < steps:  # else the run was complete
            # BatchNorm's running statistics are of augmented patches, but the encoder will be used on plain ones:
            # replace them with statistics of 100 batches of plain patches.
            # Not make_views: for another `augmented` it would be compiled again.
            plain = (training_views(batch, draw(step), config, augmented=False)
                     for step, batch, _ in batches(images, None, config, rows, device, 0, 100))
            with autocast(device):
                torch.optim.swa_utils.update_bn(plain, encoder)
            run.finish()


# ----------------------------------------------------------------------------------------------------------------------
# Images
#
# Whatever the source, images arrive as one uint8 tensor (N, 3, S, S): decoded once, not once per epoch, and kept on the
# GPU if they take less than half of its free memory.

TORCHVISION_SETS = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "stl10": "STL10", "fashionmnist": "FashionMNIST"}


def load_images(dataset, data="", split="train", image_size=32, cache="", seed=0):
    """Load a set of images: uint8 (N, 3, image_size, image_size) and labels int64 (N,), or None without labels.

    split: "pretrain" (labels may be missing), "train" or "test". Without `data`, the dataset "demo" is generated, and
    any other is looked for in ./data/`dataset`. With `data`, the folder is `data`/`dataset` if that exists, else
    `data`. It holds torchvision's files of the dataset (downloaded if no `data` is given); or train/, and val/ or
    test/, each with a subfolder per class; or, if only for pretraining, images at any depth. cache: as in Config. seed:
    of the demo's images. Raises UserError if there are no images, or if some are broken.
    """
    found = [find_images(dataset, data, split, image_size, cache, seed) if LOCAL_RANK == 0 else None]  # once per node
    if dist.is_initialized():
        node, _ = dist.new_subgroups(LOCAL_WORLD_SIZE, backend="gloo", timeout=timedelta(days=1))  # decoding takes time
        dist.broadcast_object_list(found, RANK - LOCAL_RANK, node)
        dist.barrier(dist.new_group(backend="gloo", timeout=timedelta(days=1)))  # other nodes may take longer
    (pixels, labels), source = found[0]
    images = torch.from_numpy(np.load(pixels, mmap_mode="c") if isinstance(pixels, Path) else pixels)  # copy-on-write
    if RANK == 0:
        print(f"images:  {len(images):,} ({split}) from {source}", flush=True)
    return images, None if labels is None else torch.from_numpy(labels).long()


def find_images(dataset, data, split, image_size, cache, seed):
    """Find the images for `load_images`: ((pixels or the path of a .npy file, labels), a name for their source)."""
    folder, name = Path(data or "data"), TORCHVISION_SETS.get(dataset)
    if not data or (folder / dataset).is_dir():
        folder = folder / dataset
    if dataset == "demo" and not data:
        seeds = seed, list(DEMO_COUNTS).index(split)  # each split has random numbers of its own
        return demo_images(DEMO_COUNTS[split], image_size, seeds)[:2], "the demo"
    if name and (found := load_torchvision(name, folder, split, image_size)):
        return found, f"{name}, torchvision's files in {folder}"
    if found := load_folder(folder, split, image_size, cache):
        return found, folder
    if name and not data:
        return load_torchvision(name, folder, split, image_size, download=True), f"{name}, downloaded to {folder}"
    looked = f"{name} as torchvision keeps it, " if name else ""
    raise UserError(f"no images in {folder} (looked for {looked}train/ with class folders, and at any depth for "
                    f"{' '.join(torchvision.datasets.folder.IMG_EXTENSIONS)}); name another folder with --data, or "
                    f"use --preset demo, which needs none")


def load_torchvision(name, folder, split, size, download=False):
    """One of torchvision's sets: uint8 (N, 3, size, size), labels (N,); None if missing and not to be downloaded."""
    which = {"split": split.replace("pretrain", "train+unlabeled")} if name == "STL10" else {"train": split != "test"}
    try:
        found = getattr(torchvision.datasets, name)(folder, download=download, **which)
    except (OSError, RuntimeError) as error:
        if not download:
            return None
        raise UserError(f"no {name} in {folder}, and it could not be downloaded ({error}); name a folder that has it "
                        f"with --data, or use --preset demo, which needs none") from error
    pixels, labels = zip(*((np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)), label)
                           for image, label in found))
    return np.ascontiguousarray(np.stack(pixels).transpose(0, 3, 1, 2)), np.array(labels)


def load_folder(folder, split, size, cache=""):
    """A folder's images, decoded: their .npy file's path, and labels (N,) or None; or None if it has no images."""
    if not folder.is_dir():
        return None
    train, test = folder / "train", folder / ("val" if (folder / "val").is_dir() else "test")
    chosen = (test if split == "test" else train) if train.is_dir() else folder
    found = torchvision.datasets.folder.make_dataset(  # {".": 0}: `chosen` as the only class, at any depth
        str(chosen), {".": 0}, torchvision.datasets.folder.IMG_EXTENSIONS, allow_empty=True)
    names = sorted(os.path.relpath(path, chosen) for path, _ in found)
    names = [name for name in names if f"{os.sep}." not in os.sep + name]  # skip hidden files and folders
    classes = sorted(path.name for path in train.glob("[!.]*") if path.is_dir())
    class_names = [name.split(os.sep)[0] for name in names]
    labels = np.searchsorted(classes, class_names) if names and set(class_names) <= set(classes) else None
    if labels is None and split != "pretrain" and (names or train.is_dir()):
        raise UserError(f"{chosen} has no labelled images, which a probe needs: images must lie in class folders, the "
                        f"same ones in train/ and in val/ or test/")
    if not names:
        return None
    return decode_folder(chosen, names, size, Path(cache or folder / ".bagssl")), labels


def decode_image(path, size):
    """Read, resize the short side to `size`, centre-crop: uint8 (3, size, size)."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode == "F":  # a range that only its author knows, and that convert() would clip
            raise ValueError("floating-point pixels")
        if image.mode.startswith("I"):  # 16 bits, which convert() would clip instead of scale
            image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
        if "A" in image.getbands() or "transparency" in image.info:  # convert() would just drop the alpha
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = torchvision.transforms.functional.resize(image.convert("RGB"), size)
    return np.asarray(torchvision.transforms.functional.center_crop(image, size)).transpose(2, 0, 1)


def decode_folder(folder, names, size, cache):
    """The path of a .npy file with the images `names`, uint8 (N, 3, size, size).

    They are decoded once, on all cores, into a file in `cache` that is named by a hash of the files' names,
    sizes and times: a changed folder is decoded anew. Raises UserError naming every file that cannot be used.
    """
    paths = [folder / name for name in names]
    stats = [p.stat() if p.exists() else p.lstat() for p in paths]  # lstat for broken links
    listing = json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in zip(names, stats)])
    decoded = cache / f"{folder.name}-{size}px-{hashlib.sha256(listing.encode()).hexdigest()[:16]}.npy"
    unfinished = cache / f".{uuid.uuid4().hex}.npy"  # a name of its own, as another node may be decoding too
    shape = (len(names), 3, size, size)
    broken, progress = [], Progress()

    def decode(i):  # into the memory map `pixels`, opened below
        try:
            pixels[i] = decode_image(paths[i], size)
        except Exception as error:  # whatever a decoder raises on a broken file
            broken.append(f"{names[i]} ({type(error).__name__})")

    try:
        if not decoded.exists():
            cache.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(cache).free < math.prod(shape):  # a full disk would crash writes to a memory map
                raise OSError(f"it needs {math.prod(shape) / 1e9:.1f} GB")
            pixels = np.lib.format.open_memmap(unfinished, "w+", np.uint8, shape)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                for block in np.array_split(np.arange(len(names)), len(names) // 1024 + 1):  # few futures at a time
                    list(pool.map(decode, block))
                    if progress.due(last=block[-1] + 1 == len(names)):
                        print(f"decoding {folder}: {block[-1] + 1:,} of {len(names):,} images", flush=True)
            if broken:
                raise UserError(f"{len(broken)} of {len(names)} images in {folder} cannot be used: "
                                f"{', '.join(sorted(broken))}; remove or replace them")
            pixels.flush()
            if not decoded.exists():  # otherwise another node was faster, and its file may be in use
                unfinished.rename(decoded)
    except OSError as error:
        raise UserError(f"cannot write decoded images to {cache} ({error}); give another --cache") from error
    finally:
        if os.path.isfile(unfinished):  # unlink(missing_ok=True) would raise if the parent is a file
            unfinished.unlink()
    return decoded


def training_images(config, device):
    """The images to pretrain on, on the GPU if they fit; and their labels, or None unless every image has one."""
    images, labels = load_images(config.dataset, config.data, "pretrain", config.image_size, config.cache, config.seed)
    if len(images) < config.batch_size:
        raise UserError(f"{len(images)} images are fewer than one batch of {config.batch_size}; give more images or a "
                        f"smaller --batch-size")
    fits = device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] / 2
    images = images.to(device) if fits else images
    labels = None if labels is None or labels.min() < 0 else labels.to(images.device)  # -1: STL-10's unlabelled images
    return images, labels


def batches(images, labels, config, rows, device, start, steps):
    """Yield (step, this process's images, their labels) from step `start` on; threads prefetch one batch."""
    N, B, to_gpu = len(images), config.batch_size, device.type == "cuda" and not images.is_cuda

    @functools.lru_cache(maxsize=1)
    def order(epoch):
        return torch.randperm(N, generator=generator_for(config.seed, "order", epoch)).to(images.device)

    def read(step):
        epoch, i = divmod(step, N // B)  # an epoch's last, incomplete batch is left out
        indices = order(epoch)[i * B:(i + 1) * B][rows]
        chosen = images.new_empty(len(indices), *images.shape[1:], pin_memory=to_gpu)
        parts = 1 if images.is_cuda else min(16, 1 + chosen.nbytes // 2 ** 20)  # a disk needs several readers
        list(pool.map(lambda some, out: torch.index_select(images, 0, some, out=out),
                      indices.chunk(parts), chosen.chunk(parts)))
        return chosen.to(device, non_blocking=to_gpu), None if labels is None else labels[indices].to(device)

    def prepare():  # runs once in each thread
        # Otherwise each thread would start OpenMP threads of its own: more than there are cores. Training's threads
        # would sleep instead of spinning while they wait for each other; a step on two cores would take a tenth longer.
        torch.set_num_threads(1)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # otherwise a thread would pin memory through GPU 0

    with ThreadPoolExecutor(17, initializer=prepare) as pool:  # one that reads ahead, and the 16 that it waits for
        ahead = pool.submit(read, start)
        for step in range(start, steps):
            batch, ahead = ahead.result(), pool.submit(read, step + 1)
            yield step, *batch


# ----------------------------------------------------------------------------------------------------------------------
# The demo's images
#
# Generated, so that the ground truth is known. An image is a grid of 5 x 5 cells, each holding one of 24 types of part:
# 6 families (gratings, checks, rings, spokes, polygons, meshes) in 4 levels of detail. A class is a family's 4
# parts or a level's 6: 6 + 4 classes. So each part is in two classes, and only the mix of parts tells the class.
# Colour, contrast, angle, phase and noise are independent of the class.

DEMO_CELLS = 5
DEMO_COUNTS = {"pretrain": 16_000, "train": 1_000, "test": 2_000}


def demo_probabilities():
    """p(part | class), float64 (10, 24): uniform over the class's 4 or 6 parts; 1 cell in 20 is drawn from all."""
    parts = np.arange(24).reshape(6, 4)  # families by levels
    p = np.full((10, 24), 0.05 / 24)
    for label, own in enumerate([*parts, *parts.T]):
        p[label, own] += 0.95 / len(own)
    return p


def render_part(part, side, rng, count):
    """Draw `count` pictures of one type of part: uint8 (count, 3, side, side)."""
    def uniform(low, high, *shape):
        return rng.uniform(low, high, (count, *shape, 1, 1)).astype(np.float32)

    family, level = divmod(part, 4)
    y, x = np.mgrid[-1:1:side * 1j, -1:1:side * 1j].astype(np.float32)
    angle, dy, dx = uniform(-0.3, 0.3), uniform(-0.25, 0.25), uniform(-0.25, 0.25)
    u = np.cos(angle) * (x - dx) + np.sin(angle) * (y - dy)  # (count, side, side)
    v = np.cos(angle) * (y - dy) - np.sin(angle) * (x - dx)
    radius, turn, detail = np.hypot(u, v), np.arctan2(v, u), np.pi * (1.2, 1.9, 2.7, 3.6)[level]
    wedge = 2 * np.pi / (level + 3)  # of a polygon
    tones = (lambda: np.cos(detail * u),  # gratings
             lambda: np.cos(detail * u) * np.cos(detail * v),  # checks
             lambda: np.cos(detail * radius),  # rings
             lambda: np.cos((level + 2) * turn),  # spokes
             lambda: 5 - 8 * radius * np.cos(turn % wedge - wedge / 2),  # polygons
             lambda: 3 * np.maximum(np.cos(detail * u), np.cos(detail * v)) - 2.4)  # meshes
    tone = tones[family]().clip(-1, 1)  # only one of them is computed
    contrast = uniform(0.15, 0.4, 1) * rng.choice((-1, 1), (count, 1, 1, 1)) + uniform(-0.12, 0.12, 3)
    image = uniform(0.25, 0.75, 3) + contrast * tone[:, None] + rng.normal(0, 0.04, (count, 3, side, side))
    return (image.clip(0, 1) * 255).astype(np.uint8)


def demo_images(count, image_size, seed):
    """Draw images of the demo: uint8 (N, 3, S, S), class (N,) and parts (N, 5, 5), int64."""
    if image_size % DEMO_CELLS:
        raise UserError(f"the demo's images are {DEMO_CELLS} cells wide: --image-size must be a multiple of "
                        f"{DEMO_CELLS}, not {image_size}")
    rng, side = np.random.default_rng(seed), image_size // DEMO_CELLS
    labels = rng.integers(10, size=count)
    cumulative = demo_probabilities().cumsum(1)[labels][:, None, None]  # (N, 1, 1, 24)
    parts = (rng.random((count, DEMO_CELLS, DEMO_CELLS, 1)) > cumulative[..., :-1]).sum(-1)  # by the inverse CDF
    cells = np.empty((*parts.shape, 3, side, side), np.uint8)
    for part in range(24):
        cells[parts == part] = render_part(part, side, rng, (parts == part).sum())
    return cells.transpose(0, 3, 1, 4, 2, 5).reshape(count, 3, image_size, image_size), labels, parts


# ----------------------------------------------------------------------------------------------------------------------
# Processes
#
# torchrun starts a process per GPU, each with its part of every batch. Three things make them train as one: batch
# normalisation with statistics of the whole batch, projections gathered for the loss, and the average of the weights'
# gradients (DistributedDataParallel).

RANK = int(os.environ.get("RANK", 0))  # of this process among all
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # among the LOCAL_WORLD_SIZE of this machine
LOCAL_WORLD_SIZE = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))

# Torch has renamed these; older versions have only the second names.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Gather(torch.autograd.Function):
    """Forward: all-gather the rows of all processes. Backward: reduce-scatter, the sum of their gradients."""

    @staticmethod
    def forward(ctx, x):
        rows = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
        all_gather(rows, x.contiguous())
        return rows

    @staticmethod
    def backward(ctx, gradient):
        own = gradient.new_empty(len(gradient) // dist.get_world_size(), *gradient.shape[1:])
        reduce_scatter(own, gradient.contiguous())
        return own


def gather(x):
    """The rows of all processes, with gradients: (n, ...) -> (WORLD_SIZE * n, ...)."""
    return Gather.apply(x) if dist.is_initialized() else x


class BatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm1d or 2d with statistics over the batches of all processes, which must be equally large.

    Torch's SyncBatchNorm has no CPU version, waits for the GPU in every layer, and breaks a compiled graph there.
    """

    def _check_input_dim(self, x):
        pass  # (N, C) as well as (N, C, H, W)

    def forward(self, x):
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        with torch.no_grad():
            wide = x.to(self.weight.dtype)  # bfloat16 is too coarse for statistics
            var, mean = torch.var_mean(wide, [axis for axis in range(x.ndim) if axis != 1], correction=0)
            means, variances = gather(torch.stack([mean, var])[None]).unbind(1)  # (world size, C)
            mean, var = means.mean(0), variances.mean(0) + means.var(0, correction=0)
            count = dist.get_world_size() * x.numel() // x.shape[1]
            self.num_batches_tracked += 1
            # None, which update_bn sets, means a plain average over the batches, as in torch's own class.
            share = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, share)
            self.running_var.lerp_(var * count / (count - 1), share)
        return NormalizeBatch.apply(x, mean, var, self.weight, self.bias, self.eps)


class NormalizeBatch(torch.autograd.Function):
    """weight (x - mean) / sqrt(var + eps) + bias, where mean and var are those of x over all processes."""

    @staticmethod
    def forward(ctx, x, mean, var, weight, bias, eps):
        ctx.save_for_backward(x, mean, var, weight)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx, gradient):
        x, mean, var, weight = ctx.saved_tensors
        x_gradient, *totals = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, mean, var, None, None, False, ctx.eps, [True, True, True])  # False: constant mean, var
        sums = torch.stack(totals)  # of gradient * (x - mean) / sqrt(var + eps), and of gradient
        dist.all_reduce(sums)
        # With n = (x - mean) / sqrt(var + eps), the gradient of x is weight / sqrt(var + eps) times
        # (gradient - mean(gradient) - n mean(gradient n)): what is subtracted is another F.batch_norm of x.
        scale, shift = sums * weight * (var + ctx.eps).rsqrt() * x.shape[1] / (dist.get_world_size() * x.numel())
        return x_gradient - F.batch_norm(x, mean, var, scale, shift, eps=ctx.eps), None, None, *totals, None


def parallelize_and_compile(encoder, make_views, config, device):
    """The encoder, under DDP if there are several processes, and make_views; compiled if config.compile says so."""
    if dist.is_initialized():
        encoder = nn.parallel.DistributedDataParallel(encoder, gradient_as_bucket_view=True)  # copies rank 0's weights
        # BatchNorm's statistics are equal already. Set as an attribute, since Torch has renamed the argument.
        encoder.broadcast_buffers = False
    if config.compile == "yes" or (config.compile == "auto" and device.type == "cuda"):
        if RANK == 0:
            print("compile: yes; the first steps take half a minute or more", flush=True)
        encoder = torch.compile(encoder)  # a compiled DDP still overlaps communication with computation
        make_views = torch.compile(make_views)
    return encoder, make_views


def start_process(name):
    """Join the processes of torchrun, if there are any, and return this process's device.

    name: cuda, mps, cpu, or "" for the best there is. Raises UserError if the device cannot be used.
    """
    name = name or getattr(torch.accelerator.current_accelerator(check_available=True), "type", "cpu")
    try:
        device = torch.device("cuda", LOCAL_RANK) if name == "cuda" else torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name} cannot be used here ({str(error).splitlines()[0]}); "
                        f"give --device cuda, mps or cpu") from error
    if device.type == "cpu" and sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # Keep freed memory: returned to the system, it costs thousands of page faults in every step.
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD, in bytes
        libc.mallopt(-3, 2 ** 25)  # M_MMAP_THRESHOLD; older versions of glibc take no more
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")  # TensorFloat-32, above all for the loss
    if WORLD_SIZE > 1:
        # After a restart (torchrun --max-restarts) the store still has the old addresses: a prefix hides them.
        store, *_ = next(dist.rendezvous("env://"))
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", rank=RANK,
                                world_size=WORLD_SIZE, store=dist.PrefixStore(
                                    f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store))
    return device


def has_bf16(device):
    """Whether the device multiplies bfloat16 faster than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # AVX-512's bfloat16 is faster on AMD's CPUs, but slower on Intel's, which need AMX (a virtual machine may hide it).
    cpu = torch.cpu.get_capabilities()
    feature = "amx_bf16" if "Intel" in cpu.get("cpu_name", "") else "avx512_bf16"
    return device.type == "cpu" and cpu.get(feature, False)


def autocast(device):
    """A context for the network: bfloat16 where that is faster, else float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device))


def generator_for(seed, purpose, index):
    """A generator on the CPU for one purpose and epoch or step: equal on every process, device and restart."""
    digest = hashlib.sha256(f"{seed} {purpose} {index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)  # 63 bits: never negative


# ----------------------------------------------------------------------------------------------------------------------
# The run: its folder (log.jsonl, checkpoint.pt, backbone.pt), what it prints, how it ends

LOG_EVERY = 10  # steps between lines of the log, and between looks at signals; the others do not wait for the device


class OnlineProbe(nn.Module):
    """A linear classifier of the embeddings, trained beside the encoder and without any effect on it."""

    def __init__(self, width, classes):
        super().__init__()
        self.layers = nn.Sequential(nn.BatchNorm1d(width, affine=False), nn.Linear(width, classes))
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)

    def forward(self, h, labels):
        """Learn from the batch of all processes. Returns the accuracy before learning from it, in per cent.

        h: (b, V, width), this process's embeddings; labels: (b,). An image is represented by the mean of its V patches.
        """
        h, labels = gather(h.detach().float().mean(1)), gather(labels)
        scores = self.layers(h)
        self.optimizer.zero_grad()
        F.cross_entropy(scores, labels).backward()
        self.optimizer.step()
        return 100 * (scores.argmax(1) == labels).float().mean()


class Run:
    """Resumes, logs and saves a run of training; `after_step` is called after every step."""

    def __init__(self, config, device, encoder, optimizer, steps, checkpoint, labels):
        self.config, self.encoder, self.optimizer, self.steps = config, encoder, optimizer, steps
        self.out, self.start, self.probe = Path(config.out), 0, None
        self.state = {"encoder": encoder, "optimizer": optimizer}  # saved by their state_dict
        if labels is not None and labels.max() > 0:  # more than one class
            self.probe = OnlineProbe(encoder.backbone.width, int(labels.max()) + 1).to(device)
            self.state |= {"probe": self.probe, "probe_optimizer": self.probe.optimizer}
        log, lines = self.out / "log.jsonl", [json.dumps({"step": 0, "config": vars(config)}) + "\n"]
        if checkpoint:
            self.start = checkpoint["step"]
            before = checkpoint["steps"] // checkpoint["config"]["epochs"]  # steps per epoch
            if before != steps // config.epochs:
                raise UserError(f"{self.out} holds a run of {before:,} steps per epoch, not "
                                f"{steps // config.epochs:,}: the number of images has changed; give another --out")
            probe = checkpoint.get("probe")
            if self.probe and probe and len(probe["layers.1.bias"]) != self.probe.layers[1].out_features:
                raise UserError(f"{self.out} holds a run on another number of classes; give another --out")
            for name in self.state.keys() & checkpoint.keys():
                self.state[name].load_state_dict(checkpoint.pop(name))  # popped, so that its memory is freed
            if RANK == 0 and log.exists():  # drop steps that run again, a torn line, the old config
                lines += [line for line in log.read_text().splitlines(keepends=True)
                          if line.endswith("}\n") and 0 < json.loads(line)["step"] <= self.start]
        if RANK == 0:
            side = config.patch_size or patch_side(config.image_size, config.image_size, config.patch_scale[0])
            parameters = sum(p.numel() for p in encoder.parameters()) / 1e6
            where = (f"at step {self.start} of" if self.start < steps else
                     "complete (give more --epochs, or another --out for a new run):")
            print(f"model:   {config.arch} with projector, {parameters:.1f} M parameters, on {device.type} in "
                  f"{'bfloat16' if has_bf16(device) else 'float32'}, processes: {WORLD_SIZE}\n"
                  f"run:     {config.out} (preset {config.preset}), {where} {steps:,} steps of {config.batch_size} "
                  f"images, {config.num_patches} patches of {side} x {side} each", flush=True)
            save_atomically(log, "".join(lines).encode())
            self.log, self.progress, self.warned = open(log, "a", buffering=1), Progress(delay=0), False
        self.sums, self.logged, self.signals = 0, self.start, []
        self.begun = self.saved = time.monotonic()

    def __enter__(self):  # only record signals: under torchrun, one Ctrl-C comes several times
        self.handlers = {number: signal.signal(number, lambda received, _: self.signals.append(received))
                         for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def after_step(self, step, loss, terms, norm, h, labels):
        """Add up a step's metrics. Every LOG_EVERY steps, raise unless finite, log means, save if due, obey signals."""
        metrics = {"loss": loss.detach(), **terms, "gradient_norm": norm, "clipped": (norm > self.config.clip).float()}
        if self.probe:
            metrics["probe_top1"] = self.probe(h.unflatten(0, (-1, self.config.num_patches)), labels)
        self.sums = self.sums + torch.stack([*metrics.values()])
        done, last = step + 1, step + 1 == self.steps
        if done % LOG_EVERY and not last:
            return
        # Averaged over the processes like the metrics: above 0, some process has a signal, or rank 0 has a save due.
        save_due = RANK == 0 and time.monotonic() - self.saved > 60 * self.config.save_every
        flags = torch.tensor([len(self.signals), save_due], dtype=torch.float32, device=loss.device)
        totals = torch.cat([self.sums / (done - self.logged), flags])
        if dist.is_initialized():  # so that all processes decide alike
            dist.all_reduce(totals)
        *means, stop, due = (totals / WORLD_SIZE).tolist()
        means = dict(zip(metrics, means))
        if not math.isfinite(means["loss"] + means["gradient_norm"]):
            raise FloatingPointError(
                f"the loss or its gradient is not finite in steps {self.logged + 1} to {done} (inv {means['inv']:.3g}, "
                f"var {means['var']:.3g}, cov {means['cov']:.3g}, gradient norm {means['gradient_norm']:.3g}); what "
                f"was saved before is untouched. Try a lower --lr with another --out")
        self.sums, self.logged = 0, done
        if RANK == 0:
            self.report(done, means, h)
        if last or not (stop or due):  # `finish` saves after the last
            return
        self.save_checkpoint(done)
        if stop:
            if RANK == 0:
                print(f"stopped after step {done} of {self.steps} and saved; the same command continues it", flush=True)
            sys.exit(128 + (self.signals or [signal.SIGTERM])[0])  # no signal here: another process got one

    def report(self, done, means, h):
        """Add a line to log.jsonl. Every ten seconds, add the effective rank and the speed to it, and print it."""
        entry = {"step": done, **means, "lr": self.optimizer.param_groups[0]["lr"]}
        if self.progress.due(last=done == self.steps):
            seconds = (time.monotonic() - self.begun) / (done - self.start)  # per step
            effective = effective_rank(h)  # of this process's patches
            rate = self.config.batch_size * self.config.num_patches / seconds
            left = timedelta(seconds=round(seconds * (self.steps - done)))
            entry |= {"effective_rank": effective, "patches_per_s": rate}
            terms = "  ".join(f"{name} {means[name]:.3f}" for name in ("inv", "var", "cov"))
            probe = f"  probe {means['probe_top1']:.1f} %" if self.probe else ""
            print(f"step {done}/{self.steps}  {left} left  loss {means['loss']:.3f} ({terms})  "
                  f"effective rank {effective:.0f}{probe}  {rate:,.0f} patches/s", flush=True)
            if effective < 2 and done > self.config.warmup * self.steps and not self.warned:
                self.warned = True
                print(f"warning: the embeddings have collapsed to effective rank {effective:.1f} at step {done}: start "
                      f"again with a lower --lr or --inv-weight, and another --out", file=sys.stderr)
        try:
            self.log.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.out}/log.jsonl ({error}); make room there, or give another --out. "
                            f"What was saved before is intact") from error

    def save_checkpoint(self, done):
        self.save("checkpoint.pt", {"config": vars(self.config), "step": done, "steps": self.steps,
                                    **{name: part.state_dict() for name, part in self.state.items()}})
        self.saved = time.monotonic()

    def save(self, name, content):
        """Write a file on the first process. The others wait: if one exited first, torchrun might end the writer."""
        if RANK == 0:
            save_atomically(self.out / name, content)
        if dist.is_initialized():
            dist.barrier()

    def finish(self):
        """Write backbone.pt and the last checkpoint.pt, and say what to do next."""
        self.save("backbone.pt", {name: x.cpu() for name, x in self.encoder.backbone.state_dict().items()})
        self.save_checkpoint(self.steps)
        if RANK == 0:
            took = timedelta(seconds=round(time.monotonic() - self.begun))
            since = f" since step {self.start:,}" if self.start else ""
            print(f"trained for {took}{since}; saved {self.out}/checkpoint.pt and {self.out}/backbone.pt\n"
                  f"probe it: python eval_linear.py --checkpoint {self.out}/checkpoint.pt")


class Progress:
    """On the first process, says when a line of progress is due: after `delay` seconds, every ten more, at the end."""

    def __init__(self, delay=10):
        self.next = time.monotonic() + delay

    def due(self, last=False):
        due = RANK == 0 and (last or time.monotonic() >= self.next)
        if due:
            self.next = time.monotonic() + 10
        return due


def effective_rank(h):
    """exp(entropy) of the normalised singular values of h (N, width), first 1,024 rows, centred; 1 means collapsed."""
    h = h.detach()[:1024].cpu().double()  # not every device has eigvalsh, or float64
    h = h - h.mean(0)
    gram = h.T @ h if len(h) > h.shape[1] else h @ h.T
    spectrum = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()  # far cheaper than an SVD
    return torch.special.entr(spectrum / spectrum.sum().clamp(min=1e-12)).sum().exp().item()


def find_checkpoint(config):
    """The checkpoint of the run in config.out, or None. The first process reads it and broadcasts it."""
    out, found = Path(config.out), [None]
    if RANK == 0 and (out / "checkpoint.pt").exists():
        found = [load_checkpoint(out / "checkpoint.pt")[0]]
        # Settings that cannot change what is trained may differ, and the epochs may grow.
        changed = [f"{name} was {value}, is {getattr(config, name)}" for name, value in found[0]["config"].items()
                   if name not in ("preset", "out", "cache", "device", "compile", "save_every")
                   and value != getattr(config, name) and not (name == "epochs" and value < config.epochs)]
        if changed:
            raise UserError(f"{out} holds a run of another config ({'; '.join(changed)}); give another --out, or "
                            f"remove that folder")
    elif RANK == 0 and out.is_dir() and any(out.glob("[!.]*")) and not (out / "log.jsonl").exists():
        raise UserError(f"{out} exists and holds no run of bagssl.py; give another --out")
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    return found[0]


def save_atomically(path, content):
    """Save bytes, or what torch.save takes, in a temporary file; fsync, rename: `path` never holds half of it."""
    unfinished = path.with_name(f".{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as file:
            file.write(content) if isinstance(content, bytes) else torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        if os.path.isfile(unfinished):  # unlink(missing_ok=True) would raise if the parent is a file
            unfinished.unlink()
        raise UserError(f"cannot write {path} ({str(error).splitlines()[0]}); make room there, or use another folder. "
                        f"What was saved before is intact") from error


def load_checkpoint(path):
    """Read a checkpoint.pt. Returns its content, the encoder (in eval mode, on the CPU) and its Config.

    The content is a dict of config, step, steps, encoder, optimizer and, with labels, probe and probe_optimizer. No
    code in the file is run. Raises UserError if the file is missing, damaged, or of another program or version.
    """
    if not Path(path).is_file():
        raise UserError(f"no checkpoint at {path}; train one with bagssl.py, which prints where it saves")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        config = Config(**checkpoint["config"])
        encoder = Encoder(config.arch, config.stem_stride, config.projector)
        encoder.load_state_dict(checkpoint["encoder"])
        if missing := {"step", "steps", "optimizer"} - checkpoint.keys():
            raise KeyError(missing)
    except Exception as error:  # whatever torch raises on a damaged or foreign file
        raise UserError(f"{path} is damaged, or not a checkpoint of this version of bagssl.py "
                        f"({type(error).__name__} on reading it); give another, or train again") from error
    return checkpoint, encoder.eval().to(memory_format=torch.channels_last), config


def load_encoder(path):
    """The encoder (in eval mode, on the CPU) and its Config, from a checkpoint.pt; see `load_checkpoint`."""
    return load_checkpoint(path)[1:]


# ----------------------------------------------------------------------------------------------------------------------
# Command line


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one sentence."""

    def error(self, message):
        raise UserError(f"{message}; --help lists the flags")


def parse_config(argv=None):
    """The Config of a command line: defaults, overridden by the preset, overridden by the flags."""
    comments = dict(re.findall(r"^    (\w+): [^#]*# (.*)$", inspect.getsource(Config), re.M))  # as help
    choices = {"preset": PRESETS, "arch": ("patchnet", "resnet18", "resnet34", "resnet50"), "stem_stride": (1, 2, 4),
               "compile": ("auto", "yes", "no")}
    parser = Parser(prog="bagssl.py", allow_abbrev=False, argument_default=argparse.SUPPRESS,
                    description=__doc__.partition("\n")[0] + " In brackets: defaults, which a preset may override.")
    for field in fields(Config):
        name, several = field.name, isinstance(field.default, tuple)
        values = field.default if several else (field.default,)
        default = " ".join(map(str, values))
        parser.add_argument("--" + name.replace("_", "-"), type=type(values[0]),
                            nargs={"patch_scale": "+", "projector": 3}.get(name), choices=choices.get(name),
                            metavar="X" if several else (None if name in choices else name.upper()),
                            help=comments[name].replace("%", "%%") + (f" [{default}]" if default else ""))
    given = vars(parser.parse_args(argv))
    cuda = torch.cuda.is_available() and given.get("device", "cuda").startswith("cuda")
    demo = given.get("dataset") == "demo" or not (cuda or given.keys() & {"data", "dataset"})
    preset = given.get("preset", "demo" if demo else "cifar10" if cuda else "cifar10-cpu")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return Config(**{"preset": preset, "out": f"runs/{preset}", **PRESETS[preset], **given})


def check_config(c, processes):
    """Raise UserError at the first invalid setting."""
    most = 2 ** 31
    limits = {"image_size": (3, 4096), "patch_size": (0, 1024), "patch_scale": (1e-6, 1), "warmup": (0, 1),
              "clip": (1e-6, most), "projector": (1, most), "num_patches": (2, most), "batch_size": (2, most),
              "epochs": (1, most)}
    for name, value in vars(c).items():
        least, greatest = limits.get(name, (0, most))
        for number in value if isinstance(value, tuple) else (value,):
            if not isinstance(number, str) and not least <= number <= greatest:
                raise UserError(f"--{name.replace('_', '-')} must be a number from {least} to {greatest}, not {number}")
    low, *more = c.patch_scale
    if more and (len(more) > 1 or low > more[0] or not c.patch_size):
        raise UserError(f"--patch-scale takes one value, or a low and a high one together with a --patch-size to "
                        f"resize to, not {' '.join(map(str, c.patch_scale))}")
    if c.arch == "patchnet" and c.stem_stride == 4:
        raise UserError("--stem-stride 4 is a ResNet's own stem; patchnet takes 1 or 2")
    side = c.patch_size or patch_side(c.image_size, c.image_size, low)
    if side < 3:
        raise UserError(f"patches must be at least 3 pixels wide, not {side}; raise --patch-scale or --patch-size")
    if c.batch_size % processes:
        raise UserError(f"--batch-size {c.batch_size} cannot be divided among {processes} processes")


def run_cli(main):
    """Call main(), this script's or another's. Errors a user can fix: a line on stderr, exit code 2; divergence: 1."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that `finally` clauses run
    try:
        main()
        if dist.is_initialized():  # not after an error or a signal, as NCCL would wait for the other processes
            dist.destroy_process_group()
    except (UserError, FloatingPointError, OSError, RuntimeError, MemoryError) as error:
        if LOCAL_RANK > 0:
            time.sleep(5)  # let the first process print its error alone: once that process ends, torchrun ends this one
        sentence, _, _ = str(error).partition("\n")
        if isinstance(error, MemoryError) or (
                isinstance(error, RuntimeError) and re.search("out of memory|allocate memory", str(error))):
            sentence = (f"out of memory ({sentence or 'MemoryError'}); give a smaller --batch-size or "
                        f"--num-patches; for a probe, fewer --train-images")
        elif isinstance(error, RuntimeError):
            if not isinstance(error, torch._dynamo.exc.TorchDynamoException):  # compiling needs Triton and C++
                raise
            sentence = f"torch.compile fails here ({sentence}); give --compile no"
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        sys.exit(1 if isinstance(error, FloatingPointError) else 2)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, before)


def main():
    config = parse_config()
    check_config(config, WORLD_SIZE)
    train(config, start_process(config.device))


if __name__ == "__main__":
    run_cli(main)
