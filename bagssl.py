# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9", "torchvision>=0.24", "numpy>=1.26"]
# ///
"""BagSSL: self-supervised learning on image patches, in one file.

Chen, Bardes, Li, LeCun, "Bag of Image Patch Embedding Behind the Success of Self-Supervised
Learning" (TMLR 2023, arXiv:2206.08954).

1. Cut a few patches of one fixed scale at random out of each image, and augment each by itself.
2. Embed each patch, h = f(x), with a ResNet, and project it, z = g(h), with a small MLP.
3. Train with VICReg: the projections of one image's patches agree (invariance), each dimension of
   z varies over the batch (variance), and no two dimensions say the same (covariance).
4. Throw the projector away. An image is the bag of its patches: the mean of their embeddings h.

What is learned is which patches occur together, p(x1, x2) / (p(x1) p(x2)); an image's class shows
in the average of its parts, seldom in one of them. `eval_linear.py` measures how much: on CIFAR-10,
after 16 minutes on 2 CPU cores (torch 2.15), a linear probe is right on 53 % of the test images from
one patch, on 63 % from a bag of 16, and on 43 % from a bag of the untrained network.

The method comes first, in the order of these steps: patches, augmentation, encoder, loss, bag,
training. Images, processes, checkpoints and the command line follow.

    python bagssl.py --preset demo                       # a generated world; needs no data and no GPU
    python bagssl.py --preset cifar10-cpu                # CIFAR-10 on a CPU
    torchrun --nproc_per_node=8 bagssl.py --preset imagenet --data /path/to/imagenet
    python eval_linear.py --checkpoint runs/demo/checkpoint.pt
"""

import argparse
import dataclasses
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageOps
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

# --------------------------------------------------------------------------------------------------
# Config
#
# Every field is a flag of the command line with the comment as its help; a preset overrides the
# defaults, and a flag overrides the preset.


@dataclass
class Config:
    preset: str = "auto"  # demo, cifar10, cifar10-cpu, cifar100, imagenet; auto: cifar10 with CUDA, else demo
    dataset: str = "demo"  # demo, cifar10, cifar100, stl10, fashionmnist, or the name of a folder in --data
    data: str = ""  # folder with the images or torchvision's files; default: what --dataset names, in ./data
    cache: str = ""  # folder for decoded images; default: .bagssl beside them, so that all runs share it
    out: str = ""  # folder for the run; default: runs/PRESET; an interrupted run there continues
    arch: str = "resnet18"  # resnet18, resnet34 or resnet50: what published comparisons use
    stem_stride: int = 1  # 1, 2: a 3x3 stem of that stride for small patches; 4: torchvision's, for large ones
    projector: tuple = (2048, 2048, 2048)  # widths of the projector's three layers; VICReg gains with width
    image_size: int = 32  # images are resized to this short side and centre-cropped to a square
    patch_scale: tuple = (0.25,)  # fraction of the area a patch covers; two values: multi-scale, the baseline
    patch_size: int = 0  # side of the encoder's input; 0: the patch's own pixels, unresized
    num_patches: int = 4  # V, patches an image a step; each further one is compared with all others for free
    batch_size: int = 256  # B, images a step, over all processes; the covariance needs some hundreds
    epochs: int = 30  # passes over the images
    lr: float = 0.1  # peak learning rate of SGD, momentum 0.9; on CIFAR-10 0.05 to 0.3 do alike, AdamW hardly better
    clip: float = 2.0  # longest gradient; the first ones are 20 times as long as the rest, and z would run away
    warmup: float = 0.1  # part of the steps in which the learning rate rises
    weight_decay: float = 1e-4  # not applied to biases and normalisation
    inv_weight: float = 25.0  # weight of the invariance term; this and the next two are the VICReg authors'
    var_weight: float = 25.0  # weight of the variance term
    cov_weight: float = 1.0  # weight of the covariance term
    seed: int = 0  # of the weights, the order of images, the patches, the demo's world
    device: str = ""  # default: cuda, else mps, else cpu
    compile: str = "auto"  # yes, no; auto: with CUDA; of several processes only crop + augment is compiled
    save_every: float = 5.0  # minutes between checkpoints
    profile: bool = False  # only time the parts of a step: nothing is trained or written but decoded images


PRESETS = {
    # Ten classes need few dimensions of z; patches agree weakly there, so its covariance needs the weight.
    "demo": dict(image_size=80, patch_scale=(0.04,), stem_stride=2, num_patches=4, batch_size=64, epochs=1,
                 projector=(512, 512, 32), cov_weight=10.0),
    # A stride in the stem quarters the work a patch, and small batches make more steps of a budget. The lower
    # weight on invariance keeps z's scale, and with it the covariance term, from shrinking early on.
    "cifar10-cpu": dict(dataset="cifar10", stem_stride=2, num_patches=4, batch_size=64, epochs=3,
                        projector=(1024, 1024, 1024), inv_weight=10.0),
    "cifar10": dict(dataset="cifar10"),
    "cifar100": dict(dataset="cifar100"),
    # The paper's setting: 32 x 32 pixels of 224 x 224. The GPU presets' rates have not been tried.
    "imagenet": dict(dataset="imagenet", arch="resnet50", image_size=224, patch_scale=(0.0204,),
                     projector=(8192, 8192, 8192), batch_size=2048, epochs=100),
}


class UserError(Exception):
    """Something the person at the command line can mend: printed as one sentence, exit code 2."""


# --------------------------------------------------------------------------------------------------
# Patches
#
# The method sees an image only through square patches of one fixed scale: the fraction of the
# image's area that a patch covers. Cutting is split in two, here and in the augmentation below: a
# draw_* function makes the random numbers, small integer or float tensors, and a pure function
# applies them. The pure half compiles to a few kernels; the drawn half can be made for the whole
# batch on every process and sliced, so that the patches do not depend on the number of processes.


def patch_side(height: int, width: int, scale: float) -> int:
    """The side, in pixels, of a square patch that covers `scale` of an image's area.

    At most the image's short side. Raises ValueError unless 0 < scale <= 1.
    """
    if not 0 < scale <= 1:
        raise ValueError(f"a patch's scale is a fraction of the image's area, in (0, 1], not {scale}")
    return max(1, min(height, width, round(math.sqrt(scale * height * width))))


def draw_crops(batch, num_patches, height, width, scale, generator=None, device=None):
    """Draw where the patches lie: `(top, left, side)`, in pixels, for `cut_patches`.

    `top` and `left` are int64 `(batch, num_patches)`, independent and uniform over every position
    at which the patch fits. `side` is an int for a fixed `scale`, else int64 `(batch, num_patches)`
    with the area fraction uniform in `scale = (low, high)`.
    """
    shape = (batch, num_patches)
    if isinstance(scale, (tuple, list)):
        low, high = scale
        smallest, largest = patch_side(height, width, low), patch_side(height, width, high)
        if low > high:
            raise ValueError(f"a range of scales is (low, high), not ({low}, {high})")
        area = torch.rand(shape, generator=generator, device=device) * (high - low) + low
        side = (area * (height * width)).sqrt().round().long().clamp(smallest, largest)
    else:
        side = patch_side(height, width, scale)
    top = torch.rand(shape, generator=generator, device=device) * (height - side + 1)
    left = torch.rand(shape, generator=generator, device=device) * (width - side + 1)
    return top.long(), left.long(), side


def _resize_weights(start, side, length, size):
    """Rows of a linear map from `length` pixels to `size`: bilinear with antialiasing.

    A triangle as wide as an output pixel (never narrower than an input one) stands at each output
    pixel's centre; pixels outside the crop `[start, start + side)` get no weight.
    start, side: (B, V). Returns (B, V, size, length), rows summing to 1.
    """
    start, side = start[..., None, None].float(), side[..., None, None].float()
    pixel = torch.arange(length, device=start.device) + 0.5  # (length,)
    step = side / size
    centre = start + (torch.arange(size, device=start.device)[:, None] + 0.5) * step  # (B, V, size, 1)
    weight = (1 - (pixel - centre).abs() / step.clamp(min=1)).clamp(min=0)
    weight = weight * ((pixel > start) & (pixel < start + side))
    return weight / weight.sum(-1, keepdim=True)


def cut_patches(images, top, left, side, size=None):
    """Cut squares out of images. Pure: nothing is drawn here.

    images: (B, C, H, W), uint8 or float. top, left: int64 (B, V), or (1, V) for the same places in
    every image. side: int, or int64 like `top`. size: the side returned, None for the image's own
    pixels (`side` must be an int then). Returns (B, V, C, s, s) in the images' dtype. Resizing is
    bilinear with antialiasing, as torchvision's `resized_crop`.
    """
    height, width = images.shape[-2:]
    if isinstance(side, int) and size in (None, side):
        # One gather. The index has an axis for each of B, V, C, y, x, and broadcasts over the rest.
        pixel = torch.arange(side, device=images.device)
        b = torch.arange(images.shape[0], device=images.device)[:, None, None, None, None]
        c = torch.arange(images.shape[1], device=images.device)[:, None, None]
        y = (top[..., None] + pixel)[:, :, None, :, None]  # (B, V, 1, s, 1)
        x = (left[..., None] + pixel)[:, :, None, None, :]  # (B, V, 1, 1, s)
        return images[b, c, y, x]
    # Resizing is linear along each axis, so crop + resize is two small matrix products a patch,
    # whatever each patch's own scale.
    side = torch.as_tensor(side, device=images.device).expand(top.shape)
    rows = _resize_weights(top, side, height, size).expand(len(images), -1, -1, -1)  # (B, V, s, H)
    cols = _resize_weights(left, side, width, size).expand(len(images), -1, -1, -1)  # (B, V, s, W)
    patches = torch.einsum("bvyh,bchw->bvcyw", rows, images.float())
    patches = torch.einsum("bvcyw,bvxw->bvcyx", patches, cols)
    if not images.is_floating_point():
        patches = patches.round().clamp(0, 255)  # weights sum to 1 only up to rounding
    return patches.to(images.dtype)


def crop_patches(images, num_patches, scale, size=None, generator=None):
    """Cut random patches, each independent and uniform over the positions that fit.

    images: (B, C, H, W), uint8 or float, on any device. scale: the fraction of the image's area, a
    float (fixed scale, the method) or (low, high) (multi-scale, the baseline). size: the side
    returned; None keeps the image's own pixels, bit for bit, and needs a fixed scale.
    generator: on the images' device; equal seeds give equal patches.
    Returns (B, V, C, s, s) in the images' dtype. Raises ValueError on a scale outside (0, 1], and on
    a range of scales without a size.
    """
    if size is None and isinstance(scale, (tuple, list)):
        raise ValueError("patches of several scales have no common size of their own: give `size`")
    places = draw_crops(images.shape[0], num_patches, *images.shape[-2:], scale, generator, images.device)
    return cut_patches(images, *places, size)


def grid_places(height, width, per_side, scale, device=None):
    """The places of `grid_patches`: top, left int64 (1, per_side**2) in reading order, and the side."""
    side = patch_side(height, width, scale)
    even = torch.linspace(0, 1, per_side, device=device) if per_side > 1 else torch.tensor([0.5], device=device)
    top, left = ((even * (extent - side)).round().long() for extent in (height, width))
    return top.repeat_interleave(per_side)[None], left.repeat(per_side)[None], side


def grid_patches(images, per_side, scale, size=None):
    """Cut a grid of patches, evenly spaced from corner to corner; no randomness.

    images: (B, C, H, W), uint8 or float. per_side=1 is the centre patch; scale=1 the whole image (of
    an oblong one, its largest squares). Returns (B, per_side**2, C, s, s), s = `size` or native.
    """
    return cut_patches(images, *grid_places(*images.shape[-2:], per_side, scale, images.device), size)


# --------------------------------------------------------------------------------------------------
# Augmentation
#
# Every patch gets its own colours, so that colour alone cannot tell which patches share an image.
# Operations, strengths and probabilities are those of the VICReg authors' code without the blur,
# which small patches do not survive; the order is fixed. Equal parameters give what torchvision's functional
# transforms give, for a batch in which each patch has its own parameters.


def draw_augment(shape, generator=None, device=None, jitter_prob=0.8, brightness=0.4, contrast=0.4,
                 saturation=0.2, hue=0.1, gray_prob=0.2, solarize_prob=0.1):
    """Draw the parameters of `apply_augment` for patches of leading shape `shape`: a dict of tensors.

    Brightness, contrast and saturation factors are uniform in 1 +- strength, hue shifts uniform in
    +- `hue` turns, all four applied with `jitter_prob`; a flip has probability 1/2.
    """
    def uniform(low=0.0, high=1.0):
        return torch.rand(shape, generator=generator, device=device) * (high - low) + low

    jitter = uniform() < jitter_prob
    return {
        "flip": uniform() < 0.5,
        "brightness": torch.where(jitter, uniform(1 - brightness, 1 + brightness), 1.0),
        "contrast": torch.where(jitter, uniform(1 - contrast, 1 + contrast), 1.0),
        "saturation": torch.where(jitter, uniform(1 - saturation, 1 + saturation), 1.0),
        "hue": torch.where(jitter, uniform(-hue, hue), 0.0),
        "gray": uniform() < gray_prob,
        "solarize": uniform() < solarize_prob,
    }


def _luma(patches):
    """ITU-R 601 grey value, torchvision's weights: (..., 3, s, s) -> (..., 1, s, s)."""
    r, g, b = patches.unbind(-3)
    return (0.2989 * r + 0.587 * g + 0.114 * b).unsqueeze(-3)


def _shift_hue(patches, shift):
    """Turn the hue by `shift` turns: (..., 3, s, s) through HSV and back."""
    r, g, b = patches.unbind(-3)
    value, low = patches.amax(-3), patches.amin(-3)
    chroma = value - low
    safe = torch.where(chroma > 0, chroma, 1.0)  # grey has no hue: any will do
    sector = torch.where(value == r, (g - b) / safe,
                         torch.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4))
    sector = sector + 6 * shift.squeeze(-3)  # (..., s, s), in sixths of a turn

    def channel(offset):  # each channel is the same trapezoid of the hue, a third of a turn apart
        k = (sector + offset) % 6
        return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)

    return torch.stack([channel(5), channel(3), channel(1)], -3)


def apply_augment(patches, params):
    """Apply drawn parameters. patches: float (..., 3, s, s) in [0, 1]; params: tensors of shape (...)."""
    p = {name: value[..., None, None, None] for name, value in params.items()}
    x = torch.where(p["flip"], patches.flip(-1), patches)
    x = (x * p["brightness"]).clamp(0, 1)
    x = torch.lerp(_luma(x).mean((-2, -1), keepdim=True).expand_as(x), x, p["contrast"]).clamp(0, 1)
    x = torch.lerp(_luma(x).expand_as(x), x, p["saturation"]).clamp(0, 1)
    x = _shift_hue(x, p["hue"])
    x = torch.where(p["gray"], _luma(x), x)
    return torch.where(p["solarize"] & (x >= 0.5), 1 - x, x)


def augment(patches, generator=None, **strengths):
    """Flip, jitter, grey and solarise each patch by its own random parameters.

    patches: float (..., 3, s, s) in [0, 1]; same shape and range returned. strengths: see
    `draw_augment`. Raises ValueError on patches that are not float or have no 3 channels.
    """
    if not patches.is_floating_point() or patches.shape[-3] != 3:
        raise ValueError(f"augment takes float patches (..., 3, s, s) in [0, 1], not {patches.dtype} "
                         f"of shape {tuple(patches.shape)}")
    return apply_augment(patches, draw_augment(patches.shape[:-3], generator, patches.device, **strengths))


# --------------------------------------------------------------------------------------------------
# Encoder
#
# A patch x has an embedding h = f(x), the backbone's output, which is what one keeps, and a
# projection z = g(h), the projector's, on which the loss acts (the paper's section 2).


def normalize(images):
    """uint8 in [0, 255] or float in [0, 1] -> float32 standardised by ImageNet's mean and deviation."""
    images = images.float() / (1 if images.is_floating_point() else 255)
    mean = torch.tensor([0.485, 0.456, 0.406], device=images.device)[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225], device=images.device)[:, None, None]
    return (images - mean) / std


class Conv2d(nn.Conv2d):
    """nn.Conv2d, 3 x 3 and padded by 1, that is one matrix product where the map is 1 x 1 or 2 x 2.

    A ResNet's last maps are that small when patches are, and most of the nine taps then meet only
    padding. On a CPU these layers take a third of the time, or less, and training less than half.
    """

    def forward(self, x):
        height, width = x.shape[-2:]
        if max(height, width) > 2:
            return super().forward(x)
        # Every pixel of the map is under the kernel, wherever that stands: to an output pixel belongs a block
        # of rows of the matrix, made of the taps that meet the map.
        taps, stride = self.weight.permute(0, 2, 3, 1), self.stride[0]  # (out, 3, 3, in)
        ys, xs = (range(1, 1 - extent, -stride) for extent in (height, width))  # the tap at the map's first pixel
        blocks = [taps[:, top:top + height, left:left + width] for top in ys for left in xs]
        out = x.permute(0, 2, 3, 1).flatten(1) @ torch.stack(blocks).flatten(2).flatten(0, 1).T
        return out.unflatten(1, (len(ys), len(xs), -1)).permute(0, 3, 1, 2)


def make_backbone(arch="resnet18", stem_stride=4):
    """torchvision's ResNet-18, 34 or 50 without its classifier: (N, 3, s, s) -> (N, D).

    stem_stride=4 is torchvision's own stem (7 x 7 convolution of stride 2, then pooling). A patch
    of a few pixels would be one pixel after it, so for 1 or 2 the stem is one 3 x 3 convolution of that stride.
    """
    backbone = getattr(torchvision.models, arch)()
    backbone.fc = nn.Identity()
    if stem_stride != 4:
        backbone.conv1 = nn.Conv2d(3, 64, 3, stem_stride, 1, bias=False)
        nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
        backbone.maxpool = nn.Identity()
    for name, old in list(backbone.named_modules()):
        if isinstance(old, nn.Conv2d) and old.kernel_size == (3, 3):
            new = Conv2d(old.in_channels, old.out_channels, 3, old.stride, padding=1, bias=False)
            new.weight = old.weight
            backbone.set_submodule(name, new)
    return backbone


class Encoder(nn.Module):
    """Backbone f and three-layer projector g: standardised patches (N, 3, s, s) -> h (N, D), z (N, D')."""

    def __init__(self, arch="resnet18", stem_stride=4, projector=(2048, 2048, 2048)):
        super().__init__()
        self.backbone = make_backbone(arch, stem_stride)
        widths = [2048 if arch == "resnet50" else 512, *projector]
        self.projector = nn.Sequential(
            nn.Linear(widths[0], widths[1], bias=False), nn.BatchNorm1d(widths[1]), nn.ReLU(inplace=True),
            nn.Linear(widths[1], widths[2], bias=False), nn.BatchNorm1d(widths[2]), nn.ReLU(inplace=True),
            nn.Linear(widths[2], widths[3], bias=False))

    def forward(self, x):
        h = self.backbone(x)
        return h, self.projector(h)


# --------------------------------------------------------------------------------------------------
# Loss
#
# Two patches of one image should have close projections (invariance), over the batch each dimension
# of z should vary (variance), and no two dimensions should vary together (covariance); the last two
# keep z from collapsing to a point or a line.
#
# What this learns, in the paper's formal terms: let p(x1, x2) be the probability that two patches
# come from one image, and look for z whose inner products give the co-occurrence of patches,
#     L_C = E_{p(x1) p(x2)} [ (w z1.z2 - p(x1, x2) / (p(x1) p(x2)))^2 ].
# Expanding the square, E_{p p}[(z1.z2)^2] = || E[z z^T] ||_F^2, and up to a constant
#     L_C = 2 w L_S,   L_S = - E_{p(x1, x2)}[z1.z2] + w / 2 || E[z z^T] ||_F^2:
# pull together what co-occurs, and keep the covariance small. VICReg centres z and splits the
# Frobenius norm into its diagonal (variance) and the rest (covariance).


class Gram(torch.autograd.Function):
    """Z^T Z of (V, B, D): (V, D, D). The result is symmetric, so one product is enough for the gradient, not two."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z.mT @ z

    @staticmethod
    def backward(ctx, gradient):
        return ctx.saved_tensors[0] @ (gradient + gradient.mT)


def vicreg_loss(z, inv_weight=25.0, var_weight=25.0, cov_weight=1.0, eps=1e-4, share=(0, 1)):
    """VICReg for V patches an image: the mean, over all pairs of patches, of the two-view loss.

    z: projections (B, V, D), B >= 2 images of V >= 2 patches. For patches i and j of every image,
        inv_weight mse(zi, zj) + var_weight (hinge(zi) + hinge(zj)) / 2 + cov_weight (cov(zi) + cov(zj)),
        hinge(z) = mean_d relu(1 - sqrt(var_d + eps)),  cov(z) = sum_{d != e} cov_de^2 / D,
    variances and covariances over the batch, with divisor B - 1. This is the VICReg authors' code
    (Bardes, Ponce, LeCun, 2022); the equation in their paper does not halve the hinges.
    Returns the loss and a dict of its unweighted terms, detached: inv, var, cov. float32 inside
    autocast too; float64 stays float64. Raises ValueError on a z of another shape.

    share: (r, n) computes, where B < D, only the r-th n-th of the products that the covariances need, n
    times. The mean of the n results is the loss, and that of their gradients its gradient: n processes
    that all hold z divide the work. For B = 2048, V = 4, D = 8192 it is 0.8 TFLOP, and 0.1 on each of 8.
    """
    if z.ndim != 3 or z.shape[0] < 2 or z.shape[1] < 2:
        raise ValueError(f"vicreg_loss takes z (B, V, D) with B >= 2 and V >= 2, not {tuple(z.shape)}")
    B, V, D = z.shape
    with torch.autocast(z.device.type, enabled=False):
        z = z if z.dtype == torch.float64 else z.float()
        # Over pairs, the mean of |zi - zj|^2 is 2 V / (V - 1) times that of |zv - mean z|^2. Deviations sum to
        # zero, and with them the gradient through their mean, here and below: it is left out (a Hessian would need it).
        inv = 2 * V / (V - 1) * nn.functional.mse_loss(z, z.mean(1, keepdim=True).detach().expand_as(z))
        # Each patch is in equally many pairs: the mean over pairs of hinges and covariances is that over patches.
        z = (z - z.mean(0).detach()).transpose(0, 1)  # (V, B, D), each dimension centred over the batch
        if B < D:
            # ||Z^T Z||_F = ||Z Z^T||_F: the smaller product, and its diagonal off by the variances.
            variance = z.square().sum(1) / (B - 1)  # (V, D)
            rank, size = share
            rows = slice(rank * B // size, (rank + 1) * B // size)
            frobenius = size * (z[:, rows] @ z.mT).square().sum()  # of (V, B / size, B)
        else:
            product = Gram.apply(z)
            variance = product.diagonal(dim1=1, dim2=2) / (B - 1)
            frobenius = product.square().sum()
        var = (1 - (variance + eps).sqrt()).relu().mean()
        cov = 2 * (frobenius / (B - 1) ** 2 - variance.square().sum()) / (V * D)
        loss = inv_weight * inv + var_weight * var + cov_weight * cov
    return loss, {"inv": inv.detach(), "var": var.detach(), "cov": cov.detach()}


# --------------------------------------------------------------------------------------------------
# Bag of patches
#
# The image's representation: the mean of the embeddings h, not the projections z, of its patches.


class BagOfPatches(nn.Module):
    """Images in, the mean embedding of a grid of their patches out.

    backbone: patches (N, 3, s, s) -> (N, D). per_side**2 patches of area fraction `scale`, resized
    to `size` if given (see `grid_patches`). forward takes (B, 3, H, W), uint8 or float in [0, 1],
    and returns float32 (B, D). At most `chunk` patches go through the backbone at once, so memory
    stays bounded for any number of images and patches (without gradients). Call .eval() first:
    batch statistics of a chunk are not the training's.
    """

    def __init__(self, backbone, per_side, scale, size=None, chunk=512):
        super().__init__()
        self.backbone, self.chunk = backbone, chunk
        self.per_side, self.scale, self.size = per_side, scale, size

    def forward(self, images):
        top, left, side = grid_places(*images.shape[-2:], self.per_side, self.scale, images.device)
        bags = []
        for block in images.split(max(1, self.chunk // top.shape[1])):
            total = 0
            for rows, columns in zip(top.split(self.chunk, 1), left.split(self.chunk, 1)):
                patches = cut_patches(block, rows, columns, side, self.size).flatten(0, 1)
                h = self.backbone(normalize(patches).contiguous(memory_format=torch.channels_last))
                total = total + h.float().unflatten(0, (len(block), -1)).sum(1)
            bags.append(total / top.shape[1])
        return torch.cat(bags)


# --------------------------------------------------------------------------------------------------
# Training
#
# A step: draw a batch's patches, augment and embed them, go down the gradient of the loss.
#
# Everything random is a function of (seed, epoch) or (seed, step): each process draws the numbers of
# the whole batch and keeps those of its own images. So the patches do not depend on the number of
# processes, and a run that continues from a checkpoint sees what it would have seen.


def learning_rate(step, steps, config):
    """Linear warm-up, then half a cosine down to zero."""
    warmup = max(1, round(config.warmup * steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def batches(images, config, mine, device, start):
    """Yield the images of each step from `start` on, this process's part of the batch, on the device."""
    N, B = images.shape[0], config.batch_size
    for step in itertools.count(start):
        epoch, batch = divmod(step, N // B)  # an epoch's last, incomplete batch is left out
        if batch == 0 or step == start:
            order = torch.randperm(N, generator=generator_for("cpu", config.seed, 0, epoch)).to(images.device)
        chosen = images.index_select(0, order[batch * B:(batch + 1) * B][mine])  # [...] is slower on large images
        if device.type == "cuda" and not chosen.is_cuda:
            with torch.cuda.device(device):  # a thread begins on the first GPU, and would take memory there
                chosen = chosen.pin_memory()
        yield chosen.to(device, non_blocking=True)


def prefetch(source):
    """Yield what `source` does, the next one always under way in a thread, beside the device's arithmetic."""
    with ThreadPoolExecutor(1) as loader:
        ahead = loader.submit(next, source)
        while True:
            batch, ahead = ahead.result(), loader.submit(next, source)
            yield batch


def make_input(images, top, left, side, size, params):
    """The encoder's input (B V, 3, s, s): patches cut, augmented, standardised. Pure, to be compiled."""
    patches = cut_patches(images, top, left, side, size).float() / 255
    return normalize(apply_augment(patches, params)).flatten(0, 1).contiguous(memory_format=torch.channels_last)


def draw_input(images, config, step, mine, make_input=make_input):
    """The patches of a step: drawn for the whole batch, as small tensors, and made for this process's part of it."""
    scale, shape = config.patch_scale, (config.batch_size, config.num_patches)
    generator = generator_for(images.device, config.seed, 1, step)
    top, left, side = draw_crops(*shape, *images.shape[-2:], scale if len(scale) == 2 else scale[0], generator,
                                 images.device)
    params = draw_augment(shape, generator, images.device)
    return make_input(images, top[mine], left[mine], side if isinstance(side, int) else side[mine],
                      config.patch_size or None, {name: value[mine] for name, value in params.items()})


def loss_of(z, config, world):
    """The loss, and its terms, of this process's projections (B V / processes, D) with those of all others."""
    z = z.unflatten(0, (-1, config.num_patches))
    return vicreg_loss(GatherRows.apply(z) if world.size > 1 else z, config.inv_weight, config.var_weight,
                       config.cov_weight, share=(world.rank, world.size))


def update(model, optimizer, x, config, world):
    """One step on the input x (B V / processes, 3, s, s). Returns loss, terms, gradient's length, and h, detached."""
    with autocast(x.device):
        h, z = model(x)
    loss, terms = loss_of(z, config, world)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # summed by the gather, averaged by DDP: exactly the gradient of the whole batch's loss
    gradient = nn.utils.clip_grad_norm_(model.parameters(), config.clip)  # its length before that
    optimizer.step()
    return loss.detach(), terms, gradient.float(), h.detach()


def set_up(config, world, device):
    """The encoder, the model that wraps it (compiled, or DDP), their optimizer, and make_input, compiled or not."""
    torch.manual_seed(config.seed)
    encoder = Encoder(config.arch, config.stem_stride, config.projector).to(device, memory_format=torch.channels_last)
    if world.size > 1:
        encoder = sync_batch_norm(encoder, device)
    matrices, vectors = ([p for p in encoder.parameters() if (p.ndim > 1) == deep] for deep in (True, False))
    optimizer = torch.optim.SGD([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr=config.lr,
                                momentum=0.9, nesterov=True, weight_decay=config.weight_decay, fused=True)
    compiled = config.compile == "yes" or config.compile == "auto" and device.type == "cuda"
    model, prepare = encoder, torch.compile(make_input) if compiled else make_input
    if world.size > 1:  # never compiled: each batch normalisation waits for the others, and so ends a graph
        model = nn.parallel.DistributedDataParallel(encoder, device_ids=[device] if device.type == "cuda" else None)
    elif compiled:
        model = torch.compile(model)
    return encoder, model, optimizer, prepare


def settle(log, step, lr, figures, h):
    """Wait for a step's figures, stop at bad ones, log them; returns whether a signal came, and a save is due."""
    loss, inv, var, cov, gradient, signals, due = figures.tolist()
    if not math.isfinite(loss + gradient):
        raise FloatingPointError(
            f"the {'gradient' if math.isfinite(loss) else 'loss'} is not finite at step {step} (inv {inv:.3g}, "
            f"var {var:.3g}, cov {cov:.3g}, learning rate {lr:.2g}); what was saved before is untouched. "
            f"Try a lower --lr with another --out")
    if log:
        log.add(step, lr, (loss, inv, var, cov), h)
    return signals > 0, due > 0


def train(config, world, device):
    """Pretrain as `config` says; `config.out` gets checkpoint.pt, backbone.pt and log.jsonl."""
    leads, out = world.rank == 0, Path(config.out)
    checkpoint = leader_first(lambda: open_run(config), leads, world)
    images = training_images(config, world, device)
    encoder, model, optimizer, prepare = set_up(config, world, device)
    steps, start = config.epochs * (len(images) // config.batch_size), 0
    if checkpoint:
        start = checkpoint["step"]
        encoder.load_state_dict(checkpoint["encoder"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    if leads:
        print_plan(config, world, device, images, encoder, steps, start)
    if start == steps and (out / "backbone.pt").exists():
        return
    log = None
    if leads:
        save_atomically(out / "config.json", json.dumps(settings_of(config), indent=1).encode())
        log = Log(out / "log.jsonl", start, config, steps)
    mine, before = world.share(config.batch_size), None
    begun = saved = time.monotonic()
    with signals_noted() as signals:
        for step, batch in zip(range(start, steps), prefetch(batches(images, config, mine, device, start))):
            x = draw_input(batch, config, step, mine, prepare)
            for group in optimizer.param_groups:
                group["lr"] = lr = learning_rate(step, steps, config)
            loss, terms, gradient, h = update(model, optimizer, x, config, world)

            # All processes decide alike, from figures averaged over them, and one step late: by then the
            # device has its next step and need not wait for the host.
            due = leads and time.monotonic() - saved > 60 * config.save_every
            figures = torch.stack([loss, *terms.values(), gradient,
                                   *(torch.full_like(gradient, flag) for flag in (len(signals), due))])
            if world.size > 1:
                dist.all_reduce(figures)
                figures /= world.size
            stop, due = settle(log, *before) if before else (False, False)
            before = step, lr, figures, h
            if stop or due or step + 1 == steps:
                settle(log, *before)
                before, saved = None, time.monotonic()
                if leads:
                    save_atomically(out / "checkpoint.pt", {
                        "config": dataclasses.asdict(config), "step": step + 1, "encoder": encoder.state_dict(),
                        "optimizer": optimizer.state_dict()}, keep="checkpoint.previous.pt")
            if stop:
                if leads:
                    print(f"stopped after step {step + 1} of {steps} and saved; the same command continues", flush=True)
                sys.exit(128 + (signals or [signal.SIGTERM])[0])
    if leads:
        save_atomically(out / "backbone.pt", encoder.backbone.state_dict())
        print(f"trained for {clock(time.monotonic() - begun)}; saved {out}/checkpoint.pt and, for torchvision, "
              f"{out}/backbone.pt\nprobe it: python eval_linear.py --checkpoint {out}/checkpoint.pt")


# --------------------------------------------------------------------------------------------------
# Images
#
# The method ends above; from here on is what it needs to run. Whatever the source, images arrive as
# one uint8 tensor (N, 3, S, S): decoding happens once, not once an epoch, and a set that fits lies on
# the device, where a batch is one indexing operation.

TORCHVISION_SETS = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "stl10": "STL10", "fashionmnist": "FashionMNIST"}


def list_images(folder):
    """Image files at any depth below `folder`, hidden ones left out: sorted [(relative path, bytes, mtime)]."""
    found = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.lower().endswith(torchvision.datasets.folder.IMG_EXTENSIONS) and not name.startswith("."):
                path = os.path.join(place, name)
                try:
                    stat = os.stat(path)
                except OSError:
                    stat = os.lstat(path)  # a link to nothing: decoding will name it
                found.append((os.path.relpath(path, folder), stat.st_size, stat.st_mtime_ns))
    return sorted(found)


def find_folder(dataset, data):
    """The folder that holds `dataset` as images, or None: `data`/`dataset` or `data` itself.

    It has a train/ folder, or images in it or in its subfolders (a set without splits).
    """
    data = Path(data or "data")
    for folder in (data / dataset, data):
        if (folder / "train").is_dir():
            return folder
        nearby = itertools.chain(folder.glob("*"), folder.glob("*/*"))
        if any(path.suffix.lower() in torchvision.datasets.folder.IMG_EXTENSIONS for path in nearby):
            return folder
    return None


def decode_image(path, size):
    """Read, resize the short side to `size`, centre-crop: uint8 (3, size, size), and the short side it had."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits, which convert() would clip, not scale
            image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
        image = image.convert("RGB")
    short = min(image.size)
    image = torchvision.transforms.functional.resize(image, size)
    image = torchvision.transforms.functional.center_crop(image, size)
    return np.asarray(image).transpose(2, 0, 1), short


def decode_folder(folder, listing, size, cache, quiet=False):
    """All images of `listing` as one memory-mapped uint8 (N, 3, size, size), and the smallest short side.

    Decoded once, by all cores, into a .npy file in `cache` whose name holds a hash of the listing,
    so that a changed folder is decoded anew. Written aside and renamed: two processes may do so at once.
    Raises UserError naming every file that cannot be read.
    """
    signature = hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]
    stem = f"{folder.absolute().parent.name}-{folder.name}-{size}px-"
    for path in cache.glob(f"{stem}{signature}-short*.npy"):
        try:
            return np.load(path, mmap_mode="c"), int(path.stem.rpartition("short")[2])
        except ValueError:
            path.unlink()  # cut short: decode again
    smallest, broken, progress, start = 1 << 30, [], Progress(quiet), time.monotonic()

    def decode(name):
        try:
            return decode_image(folder / name, size)
        except Exception as error:  # whatever a decoder raises on a broken file
            broken.append(f"{name} ({error})" if isinstance(error, Image.DecompressionBombError) else name)

    aside = cache / f".{os.getpid()}.npy"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file, ThreadPoolExecutor(os.cpu_count()) as pool:
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(listing), 3, size, size)}
            np.lib.format.write_array_header_2_0(file, header)
            for first in range(0, len(listing), 1024):
                for decoded in pool.map(decode, [name for name, *_ in listing[first:first + 1024]]):
                    if decoded is not None:
                        file.write(decoded[0].tobytes())
                        smallest = min(smallest, decoded[1])
                done = min(first + 1024, len(listing))
                left = (time.monotonic() - start) * (len(listing) / done - 1)
                progress(f"decoding {folder}: {done:,} of {len(listing):,} images, {clock(left)} left",
                         last=done == len(listing))
        if broken:
            raise UserError(f"{len(broken)} of {len(listing)} images in {folder} cannot be read: "
                            f"{', '.join(sorted(broken))}; remove or replace them")
        for old in cache.glob(f"{stem}*.npy"):
            old.unlink(missing_ok=True)
        path = cache / f"{stem}{signature}-short{smallest}.npy"
        aside.replace(path)
    except OSError as error:
        raise UserError(f"cannot write decoded images to {cache} ({error}); "
                        f"name another folder with --cache") from error
    finally:
        aside.unlink(missing_ok=True)
    return np.load(path, mmap_mode="c"), smallest


def load_torchvision(dataset, root, split, quiet=False):
    """One of torchvision's small sets, found in `root` or downloaded: uint8 (N, 3, S, S), labels (N,)."""
    loader = getattr(torchvision.datasets, TORCHVISION_SETS[dataset])
    which = {"train": split != "test"}
    if dataset == "stl10":
        which = {"split": {"pretrain": "train+unlabeled"}.get(split, split)}
    try:
        found = loader(root, download=False, **which)
    except RuntimeError:
        try:
            if not quiet:
                print(f"{TORCHVISION_SETS[dataset]} is not in {root}: downloading it", flush=True)
            found = loader(root, download=True, **which)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"no {TORCHVISION_SETS[dataset]} in {root} or {root / dataset}, and it could not be downloaded "
                f"({error}); name a folder that has it with --data, or use --preset demo, which needs none") from error
    images = np.asarray(found.data)
    if images.ndim == 3:  # grey: (N, H, W)
        images = np.repeat(images[:, None], 3, axis=1)
    elif images.shape[-1] == 3:  # (N, H, W, 3)
        images = images.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(images), np.asarray(found.labels if dataset == "stl10" else found.targets)


def load_images(dataset, data="", split="train", image_size=32, cache="", seed=0, min_side=1, quiet=False):
    """Load a set of images: uint8 (N, 3, image_size, image_size) and labels int64 (N,), or None without labels.

    split: "pretrain" (labels may be missing), "train" or "test". Images are looked for as class
    folders (train/ with val/ or test/) or, for pretraining, as any folder of photos; then as
    torchvision's own files, downloaded if missing. Raises UserError if there is nothing to load, if
    files are broken, and if an image's short side is under `min_side` pixels.
    """
    folder = find_folder(dataset, data) if data or dataset != "demo" else None
    if folder:
        train = folder / "train" if (folder / "train").is_dir() else folder
        chosen = train
        if split == "test":
            chosen = next((folder / name for name in ("val", "test") if (folder / name).is_dir()), None)
            if chosen is None or train == folder:
                raise UserError(f"{folder} has no train/ and val/ or test/ with class folders, which the probe needs")
        listing = list_images(chosen)
        if not listing:
            raise UserError(f"no images in {chosen}; name another folder with --data")
        labels = None
        if split != "pretrain":
            classes = sorted({os.path.dirname(name).split(os.sep)[0] for name, *_ in list_images(train)})
            names = [os.path.dirname(name).split(os.sep)[0] for name, *_ in listing]
            if "" in classes or not set(names) <= set(classes):
                raise UserError(f"{chosen} has no labels to probe: its images must lie in class folders, "
                                f"the same ones in train/ and in val/ or test/")
            labels = np.searchsorted(classes, names)
        images, smallest = decode_folder(chosen, listing, image_size, Path(cache or folder / ".bagssl"), quiet)
        if smallest < min_side:
            raise UserError(f"images in {chosen} are as small as {smallest} pixels, and patches are {min_side}: remove "
                            f"the small images, or lower --image-size or --patch-scale")
    elif dataset in TORCHVISION_SETS:
        images, labels = load_torchvision(dataset, Path(data or "data"), split, quiet)
    elif dataset == "demo" and not data:
        which = list(DEMO_COUNTS).index(split)
        images, labels, _ = demo_images(DEMO_COUNTS[split], image_size, (seed, which))
    else:
        raise UserError(f"no images in {data or 'data'} or {Path(data or 'data') / dataset} (looked for train/ with "
                        f"class folders, and for photos); name another folder with --data, or use --preset demo, "
                        f"which needs none")
    images = torch.from_numpy(images)
    if images.shape[-1] != image_size:
        images = torch.cat([torchvision.transforms.functional.resize(block, [image_size, image_size])
                            for block in images.split(1024)])
    return images, None if labels is None else torch.from_numpy(labels).long()


def training_images(config, world, device):
    """The images to pretrain on, on the device where they fit. Raises UserError where they are less than a batch."""
    images, _ = leader_first(  # one process a node decodes or downloads
        lambda: load_images(config.dataset, config.data, "pretrain", config.image_size, config.cache, config.seed,
                            min_side=patch_side(config.image_size, config.image_size, config.patch_scale[0]),
                            quiet=world.rank != 0), world.local_rank == 0, world)
    if len(images) < config.batch_size:
        raise UserError(f"{len(images)} images are less than one batch of {config.batch_size}; give more images or a "
                        f"smaller --batch-size")
    fits = device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] / 2
    return images.to(device) if fits else images


# --------------------------------------------------------------------------------------------------
# The demo's world
#
# Images whose truth is known. An image is a grid of 5 x 5 cells, each holding one of 24 types of
# part: 6 families (gratings, checks, rings, spokes, polygons, meshes) in 4 levels of detail. A class
# is one family in all levels, or one level in all families. So each part belongs to two classes and
# cannot tell which, and the mix of all parts can. Colours, contrast, angle, phase and noise tell nothing.

DEMO_CELLS = 5
DEMO_COUNTS = {"pretrain": 16_000, "train": 1_000, "test": 2_000}


def demo_world():
    """p(part | class), float64 (10, 24): uniform over the class's 4 or 6 parts, with 1 cell in 20 from any."""
    parts = np.arange(24).reshape(6, 4)  # families by levels
    world = np.full((10, 24), 0.05 / 24)
    for label, its_parts in enumerate([*parts, *parts.T]):
        world[label, its_parts] += 0.95 / len(its_parts)
    return world


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
    tone = (lambda: np.cos(detail * u),
            lambda: np.cos(detail * u) * np.cos(detail * v),
            lambda: np.cos(detail * radius),
            lambda: np.cos((level + 2) * turn),
            lambda: 5 - 8 * radius * np.cos(turn % wedge - wedge / 2),
            lambda: 3 * np.maximum(np.cos(detail * u), np.cos(detail * v)) - 2.4)[family]().clip(-1, 1)
    contrast = uniform(0.15, 0.4, 1) * rng.choice((-1, 1), (count, 1, 1, 1)) + uniform(-0.12, 0.12, 3)
    image = uniform(0.25, 0.75, 3) + contrast * tone[:, None] + rng.normal(0, 0.04, (count, 3, side, side))
    return (image.clip(0, 1) * 255).astype(np.uint8)


def demo_images(count, image_size, seed):
    """Draw images of the demo's world: uint8 (N, 3, S, S), class (N,) and parts (N, 5, 5), int64."""
    if image_size % DEMO_CELLS:
        raise UserError(f"the demo's images are {DEMO_CELLS} cells wide: --image-size must be a multiple of "
                        f"{DEMO_CELLS}, not {image_size}")
    rng, side = np.random.default_rng(seed), image_size // DEMO_CELLS
    labels = rng.integers(10, size=count)
    cumulative = demo_world().cumsum(1)[labels][:, None, None]  # (N, 1, 1, 24)
    parts = (rng.random((count, DEMO_CELLS, DEMO_CELLS, 1)) > cumulative[..., :-1]).sum(-1)  # (N, 5, 5)
    cells = np.empty((*parts.shape, 3, side, side), np.uint8)
    for part in range(24):
        cells[parts == part] = render_part(part, side, rng, (parts == part).sum())
    return cells.transpose(0, 3, 1, 4, 2, 5).reshape(count, 3, image_size, image_size), labels, parts


# --------------------------------------------------------------------------------------------------
# Processes and devices


@dataclass
class World:
    """This process among those that torchrun started; alone without it."""

    rank: int = int(os.environ.get("RANK", 0))
    local_rank: int = int(os.environ.get("LOCAL_RANK", 0))
    size: int = int(os.environ.get("WORLD_SIZE", 1))

    def share(self, count):
        """The slice of `count` things that is this process's."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)


def pick_device(name, local_rank=0):
    """The torch.device asked for, or the best there is. Raises UserError if it cannot be used."""
    mps = torch.backends.mps.is_available()
    name = name or ("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device("cuda", local_rank) if name == "cuda" else torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name} cannot be used here ({str(error).splitlines()[0]}); "
                        f"give --device cuda, mps or cpu") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def join(world, device):
    """Meet the other processes, if torchrun started any."""
    if world.size > 1:
        # torchrun --max-restarts keeps its store: without a name of its own, a new start finds the old one's addresses.
        store, *_ = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=world.rank,
                                world_size=world.size)


def has_bf16(device):
    """Whether the device multiplies bfloat16 natively; emulated, it is many times slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def autocast(device):
    """A context for the network: bfloat16 where the device has it, else float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device))


def generator_for(device, *key):
    """A generator seeded by integers such as (seed, stream, step): equal on every process and restart."""
    return torch.Generator(device).manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


class GatherRows(torch.autograd.Function):
    """Every process's rows, concatenated; the gradients of a row, summed, return to where it came from."""

    @staticmethod
    def forward(ctx, x):
        rows = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, x.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


class SyncBatchNorm(nn.BatchNorm2d):
    """torch's SyncBatchNorm, batch statistics over all processes, for CPUs too, which torch's refuses."""

    def _check_input_dim(self, x):
        pass  # (N, C) as well as (N, C, H, W)

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        axes, shape = [axis for axis in range(x.ndim) if axis != 1], [-1] + [1] * (x.ndim - 2)
        dtype, x = x.dtype, x.float() if x.dtype == torch.bfloat16 else x  # of autocast: too few digits for statistics
        mean = GatherRows.apply(x.mean(axes)[None]).mean(0)
        var = GatherRows.apply((x - mean.view(shape)).square().mean(axes)[None]).mean(0)
        count = dist.get_world_size() * x.numel() // x.shape[1]
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        return (x * scale.view(shape) + (self.bias - mean * scale).view(shape)).to(dtype)


def sync_batch_norm(encoder, device):
    """Exchange a new encoder's batch normalisation for one over all processes; the state's names stay."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(encoder)
    for module in list(encoder.modules()):
        for name, child in module.named_children():
            if isinstance(child, (nn.BatchNorm1d, nn.BatchNorm2d)):
                setattr(module, name, SyncBatchNorm(child.num_features).to(device))
    return encoder


def leader_first(function, leads, world):
    """function() on the leading processes, then on those that waited for them, for as long as it takes."""
    if world.size == 1:
        return function()
    patience = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    if not leads:
        dist.barrier(patience)
    result = function()
    if leads:
        dist.barrier(patience)
    return result


@contextmanager
def signals_noted():
    """Inside, SIGINT and SIGTERM only add their number to the list given; a second one acts as ever."""
    noted, usual = [], {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore():
        for number, handler in usual.items():
            signal.signal(number, handler)

    def note(number, _):
        noted.append(number)
        restore()

    for number in usual:
        signal.signal(number, note)
    try:
        yield noted
    finally:
        restore()


# --------------------------------------------------------------------------------------------------
# The run's folder: config.json, log.jsonl, checkpoint.pt, backbone.pt


def save_atomically(path, content, keep=None):
    """Save bytes, or what torch.save takes, aside, flush to disk, rename: what is there is whole at any moment.

    keep: the name under which to keep the file that was there before.
    """
    aside = path.with_name(f".{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            file.write(content) if isinstance(content, bytes) else torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            path.replace(path.with_name(keep))
        aside.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save tells of a full disk by a RuntimeError
        if aside.is_file():
            aside.unlink()
        raise UserError(f"cannot write {path} ({str(error).splitlines()[0]}); make room there, or give another --out. "
                        f"What was saved before is whole") from error


def load_checkpoint(path):
    """Read a checkpoint of this program: a dict of config, encoder, optimizer, step.

    No code in the file is run. Raises UserError if it is missing, damaged, or not ours.
    """
    if not Path(path).is_file():
        raise UserError(f"no checkpoint at {path}; train one with bagssl.py, which prints where it saves")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch raises on a damaged or foreign file
        raise UserError(f"{path} is damaged or no checkpoint ({type(error).__name__} on reading it); "
                        f"give a checkpoint.pt that bagssl.py wrote") from error
    if not isinstance(checkpoint, dict) or not {"config", "encoder", "step"} <= checkpoint.keys():
        raise UserError(f"{path} is not a checkpoint of bagssl.py; give a checkpoint.pt that it wrote")
    if not checkpoint["config"].keys() <= Config.__dataclass_fields__.keys():
        raise UserError(f"{path} was written by another version of bagssl.py; read it with that one, or train again")
    return checkpoint


def last_checkpoint(out):
    """The newest whole checkpoint of a run's folder, or None where none was written yet."""
    there = [path for path in (out / "checkpoint.pt", out / "checkpoint.previous.pt") if path.exists()]
    for path in there:
        try:
            return load_checkpoint(path)
        except UserError as error:
            if path == there[-1]:
                raise
            print(f"{error}; going on from the one before", file=sys.stderr)
    return None


def load_encoder(path):
    """The trained encoder in eval mode, on the CPU, and its Config, from a `checkpoint.pt`."""
    checkpoint = load_checkpoint(path)
    config = Config(**checkpoint["config"])
    encoder = Encoder(config.arch, config.stem_stride, config.projector)
    encoder.load_state_dict(checkpoint["encoder"])
    return encoder.eval().to(memory_format=torch.channels_last), config


def settings_of(config):
    """What makes a run this run, as plain JSON values: the config without where and how fast it runs."""
    aside = ("preset", "out", "cache", "device", "compile", "save_every", "profile")
    plain = json.loads(json.dumps(dataclasses.asdict(config)))
    return {name: value for name, value in plain.items() if name not in aside}


def open_run(config):
    """Make the run's folder, or check that the run in it is this one; returns its checkpoint or None."""
    out, settings = Path(config.out), settings_of(config)
    if not (out / "config.json").is_file():
        if out.is_file() or out.is_dir() and any(out.glob("[!.]*")):
            raise UserError(f"{out} exists and holds no run of bagssl.py; give another --out")
        try:
            out.mkdir(parents=True, exist_ok=True)  # better known before the images are decoded
        except OSError as error:
            raise UserError(f"cannot write to {out} ({error.strerror}); give another --out") from error
        return None
    there = json.loads((out / "config.json").read_text())
    changed = [f"{name} was {there.get(name)}, is {settings[name]}"
               for name in settings if there.get(name) != settings[name]]
    if changed:
        raise UserError(f"{out} holds a run of another config ({'; '.join(changed)}); "
                        f"give another --out, or remove that folder")
    return last_checkpoint(out)


# --------------------------------------------------------------------------------------------------
# Watching a run: progress, log, plan, profile


class Progress:
    """One line that updates in place on a terminal; elsewhere a line every 30 seconds."""

    def __init__(self, quiet=False):
        self.quiet, self.terminal, self.due = quiet, sys.stdout.isatty(), 0.0

    def __call__(self, text, last=False):
        if self.quiet or not (last or time.monotonic() >= self.due):
            return
        self.due = time.monotonic() + (0.2 if self.terminal else 30)
        if self.terminal:
            text = text[:shutil.get_terminal_size().columns - 1]
            print(f"\r\x1b[K{text}", end="\n" if last else "", flush=True)
        else:
            print(text, flush=True)


def clock(seconds):
    """Seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


def peak_memory(device):
    """The most memory used so far, in GB: of the device, or of this process where the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # on Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def effective_rank(h):
    """exp of the entropy of the singular values of centred h (N, D): 1 when collapsed, at most D."""
    h = h.detach().float()[:1024]
    h = h - h.mean(0)
    squares = torch.linalg.eigvalsh(h.T @ h if len(h) > h.shape[1] else h @ h.T)  # far cheaper than an SVD
    spectrum = squares.clamp(min=0).sqrt()
    return torch.special.entr(spectrum / spectrum.sum().clamp(min=1e-12)).sum().exp().item()


class Log:
    """log.jsonl, one line a step, and the progress line."""

    def __init__(self, path, start, config, steps):
        kept = path.read_text().splitlines()[:start] if path.exists() else []  # a resumed run writes the rest again
        save_atomically(path, "".join(f"{line}\n" for line in kept).encode())
        self.file, self.config, self.steps, self.start = open(path, "a", buffering=1), config, steps, start
        self.progress, self.begun, self.shown, self.warned = Progress(), time.monotonic(), 0.0, False
        self.warm = None

    def add(self, step, lr, figures, h):
        """figures: loss, inv, var, cov. The embeddings h are looked at every few seconds."""
        entry = dict(zip(("step", "loss", "inv", "var", "cov", "lr"), (step, *figures, lr)))
        now, last, done = time.monotonic(), step + 1 == self.steps, step + 1 - self.start
        if done == 3:  # the steps before compile, and allocate memory
            self.warm = now
        elif done == 23:
            each = (now - self.warm) / 20
            self.progress(f"speed:  {self.config.batch_size * self.config.num_patches / each:,.0f} patches/s: "
                          f"{clock(each * (self.steps - self.start))} for the run; "
                          f"{peak_memory(h.device):.1f} GB of memory a process", last=True)
        if last or now - self.shown > 5:
            self.shown, rate = now, done * self.config.batch_size * self.config.num_patches / (now - self.begun)
            rank = effective_rank(h)
            entry |= {"patches_per_s": rate, "effective_rank": rank}
            self.progress(f"step {step + 1:>{len(str(self.steps))}}/{self.steps}  "
                          f"{clock((now - self.begun) / done * (self.steps - step - 1))} left  "
                          f"loss {figures[0]:.3f} (inv {figures[1]:.3f}  var {figures[2]:.3f}  cov {figures[3]:.3f})  "
                          f"rank {rank:.0f}/{h.shape[1]}  lr {lr:.1e}  {rate:,.0f} patches/s", last)
            if rank < 2 and step > self.config.warmup * self.steps and not self.warned:
                self.warned = True
                print(f"warning: the embeddings have collapsed to effective rank {rank:.1f} at step {step}: start "
                      f"again with a lower --lr or a larger --cov-weight, and another --out", file=sys.stderr)
        self.file.write(json.dumps(entry) + "\n")


def print_plan(config, world, device, images, encoder, steps, start=0):
    """What the run will do, before it starts."""
    scale, processes = config.patch_scale, f"{world.size} process{'es' * (world.size > 1)}"
    side = patch_side(*images.shape[-2:], scale[0])
    extent = f"{side} x {side} pixels" if len(scale) == 1 else f"{scale[0]:g} to {scale[1]:g} of its area"
    print(f"images: {len(images):,} of {config.image_size} x {config.image_size}, {config.num_patches} patches of "
          f"{extent} from each" + f", resized to {config.patch_size} x {config.patch_size}" * bool(config.patch_size))
    if config.dataset == "demo" and not config.data:
        print(f"        one part tells the class in {demo_world().max(0).sum() / 10:.1%} of cases at best")
    count, projector = (sum(p.numel() for p in part.parameters()) for part in (encoder.backbone, encoder.projector))
    print(f"model:  {config.arch}, {count / 1e6:.1f} M parameters, projector {projector / 1e6:.1f} M; "
          f"{'bfloat16' if has_bf16(device) else 'float32'} on {device.type}, {processes}")
    patches = steps * config.batch_size * config.num_patches
    print(f"run:    {config.epochs} epochs of {steps // config.epochs} steps of {config.batch_size} images, "
          f"{patches:,} patches; {config.out}, two checkpoints of {8 * (count + projector) / 1e6:,.0f} MB"
          + (f", continued at step {start}" if start else ""), flush=True)
    if start == steps:
        print("        complete already; give another --out for a new run")


def profile(config, world, device, rounds=20):
    """Print where a step's time goes: medians over `rounds` rounds, each of all parts in turn and two whole steps.

    A part is timed alone, the device waited for after it; a whole step overlaps what it can. Of several
    processes the gather is part of the loss, and the sum of the gradients is timed apart. The learning rate is 0.
    """
    images = training_images(config, world, device)
    encoder, model, optimizer, prepare = set_up(config, world, device)
    steps = config.epochs * (len(images) // config.batch_size)
    if world.rank == 0:
        print_plan(config, world, device, images, encoder, steps)
    mine, backbone, projector = world.share(config.batch_size), encoder.backbone, encoder.projector
    if prepare is not make_input and world.size == 1:
        backbone, projector = torch.compile(backbone), torch.compile(projector)
    source, times = batches(images, config, mine, device, 0), {}
    ahead = prefetch(batches(images, config, mine, device, 0))
    for group in optimizer.param_groups:
        group["lr"] = 0.0

    def timed(part, function, *inputs):
        begun = time.perf_counter()
        result = function(*inputs)
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()
        times.setdefault(part, []).append(1e3 * (time.perf_counter() - begun))
        return result

    def descend():
        nn.utils.clip_grad_norm_(encoder.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def communicate():
        for tensor in (torch.cat([p.flatten() for p in encoder.parameters()]), z.detach()):
            dist.all_reduce(tensor)

    def step_with_input(step):
        update(model, optimizer, draw_input(next(ahead), config, step, mine, prepare), config, world)

    for step in range(rounds + 3):
        if step == 3:
            times.clear()  # compiled, and warm
        batch = timed("load", next, source)
        x = timed("crop + augment", draw_input, batch, config, step, mine, prepare)
        with autocast(device):
            h = timed("backbone", backbone, x)
            z = timed("projector", projector, h)
        loss, _ = timed("loss", loss_of, z, config, world)
        timed("backward", loss.backward)
        timed("clip + optimiser", descend)
        if world.size > 1:
            timed("communication", communicate)
        timed("step", step_with_input, step)
        timed("step on a ready input", update, model, optimizer, x, config, world)
    with FlopCounterMode(display=False) as counter:
        with autocast(device):
            loss_of(encoder(x)[1], config, world)[0].backward()
    square = torch.randn(2, *2 * [8192 if device.type == "cuda" else 2048], device=device,
                         dtype=torch.bfloat16 if has_bf16(device) else torch.float32)
    for _ in range(10):
        timed("product", torch.mm, *square)

    if world.rank == 0:
        parts = {name: float(np.median(took)) for name, took in times.items()}
        best, step, ready = min(times["product"]), parts.pop("step"), parts.pop("step on a ready input")
        added = float(np.median(np.divide(times["step"], times["step on a ready input"])) - 1)  # in pairs: no drift
        parts.pop("product")
        print(f"\n{'part of a step':22}      ms  share")
        for name, took in parts.items():
            print(f"{name:22}{took:8.1f}  {took / sum(parts.values()):5.1%}")
        flops, patches = counter.get_total_flops(), config.batch_size * config.num_patches
        rate, ceiling = flops / step / 1e6, 2 * len(square[0]) ** 3 / best / 1e6
        print(f"{'sum of the parts':22}{sum(parts.values()):8.1f}\n{'step':22}{step:8.1f}  {1e3 * patches / step:,.0f} "
              f"patches/s, {clock(steps * step / 1e3)} for the run of {steps:,} steps\n"
              f"{'step on a ready input':22}{ready:8.1f}  input adds {added:.1%}\n\n"
              f"{flops / 1e9:,.1f} GFLOP a step and process, {rate:,.0f} GFLOP/s: {rate / ceiling:.0%} of a matrix "
              f"product's {ceiling:,.0f}\npeak memory {peak_memory(device):.1f} GB a process; "
              f"{torch.get_num_threads()} threads; torch {torch.__version__}")


# --------------------------------------------------------------------------------------------------
# Command line


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one sentence."""

    def error(self, message):
        raise UserError(f"{message}; --help lists the flags")


def parse_config(argv=None):
    """The Config of a command line: defaults, overridden by the preset, overridden by the flags."""
    comments = dict(re.findall(r"^    (\w+): [^#]*# (.*)$", inspect.getsource(Config), re.M))
    parser = Parser(prog="bagssl.py", description=__doc__.partition("\n")[0], allow_abbrev=False,
                    argument_default=argparse.SUPPRESS)
    for field in dataclasses.fields(Config):
        several = isinstance(field.default, tuple)
        if isinstance(field.default, bool):
            parser.add_argument(f"--{field.name}", action="store_true", help=comments[field.name])
            continue
        parser.add_argument("--" + field.name.replace("_", "-"), nargs="+" if several else None,
                            metavar="X" if several else field.name.upper(),
                            help=comments[field.name].replace("%", "%%"),
                            type=type(field.default[0] if several else field.default))
    given = vars(parser.parse_args(argv))
    preset = given.get("preset", "auto")
    if preset == "auto":
        preset = "cifar10" if torch.cuda.is_available() else "demo"
        if World().rank == 0:
            print(f"preset {preset}, since CUDA is {'' if preset == 'cifar10' else 'not '}available; "
                  f"--preset chooses among {', '.join(PRESETS)}")
    if preset not in PRESETS:
        raise UserError(f"no preset {preset!r}; there are auto, {', '.join(PRESETS)}")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return Config(**{"out": f"runs/{preset}", **PRESETS[preset], **given, "preset": preset})


def check_config(c, processes):
    """Raise UserError at the first setting that cannot be."""
    rules = [
        (c.arch in ("resnet18", "resnet34", "resnet50"), f"no --arch {c.arch}; there are resnet18, resnet34, resnet50"),
        (c.stem_stride in (1, 2, 4), f"--stem-stride is 1, 2 or 4, not {c.stem_stride}"),
        (len(c.patch_scale) <= 2, f"--patch-scale takes one value or two, not {len(c.patch_scale)}"),
        (all(0 < s <= 1 for s in c.patch_scale), f"--patch-scale is a fraction of the area, in (0, 1], not "
                                                 f"{' '.join(f'{s:g}' for s in c.patch_scale)}"),
        (c.patch_scale[0] <= c.patch_scale[-1], "two values of --patch-scale are the low one, then the high one"),
        (len(c.patch_scale) == 1 or c.patch_size > 0, "patches of several scales need a --patch-size to be resized to"),
        (c.patch_size >= 0 and c.image_size > 0, "--patch-size and --image-size are in pixels, from 1 up"),
        (c.num_patches >= 2, f"--num-patches must be 2 or more, since patches are compared; not {c.num_patches}"),
        (c.batch_size >= 2, f"--batch-size must be 2 or more, since statistics are over the batch; not {c.batch_size}"),
        (c.batch_size % processes == 0, f"--batch-size {c.batch_size} cannot be shared by {processes} processes; "
                                        f"give a multiple of {processes}"),
        (c.epochs >= 1, f"--epochs must be 1 or more, not {c.epochs}"),
        (len(c.projector) == 3 and min(c.projector) >= 1, "--projector takes three widths, such as 2048 2048 2048"),
        (c.lr > 0 and c.clip > 0, f"--lr and --clip must be above 0, not {c.lr:g} and {c.clip:g}"),
        (0 <= c.warmup <= 1, f"--warmup is a part of the run, in [0, 1], not {c.warmup:g}"),
        (c.compile in ("auto", "yes", "no"), f"--compile is auto, yes or no, not {c.compile}"),
    ]
    for holds, sentence in rules:
        if not holds:
            raise UserError(sentence)


def run(main):
    """Call main(); a UserError becomes one sentence on stderr and exit code 2."""
    try:
        main()
    except (UserError, FloatingPointError) as error:
        if World().local_rank > 0:  # most errors are everyone's: torchrun ends this process while the first one tells
            time.sleep(5)
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def main():
    world, config = World(), parse_config()
    check_config(config, world.size)
    device = pick_device(config.device, world.local_rank)
    join(world, device)
    (profile if config.profile else train)(config, world, device)


if __name__ == "__main__":
    run(main)
