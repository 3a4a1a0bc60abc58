# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9", "torchvision>=0.24", "numpy>=1.26"]
# ///
"""Probe a BagSSL encoder: how well does the mean of n patch embeddings tell an image's class?

    python eval_linear.py --checkpoint runs/demo/checkpoint.pt
    torchrun --nproc_per_node=8 eval_linear.py --checkpoint runs/cifar10/checkpoint.pt --patches 1 4 16 64

For each n, and for the whole image in one forward pass: a linear probe (softmax regression on the
frozen features) and a weighted nearest-neighbour vote. Two controls show what of it was learned:
the same network untrained, and raw pixels. The probe's regularisation is chosen on a tenth of the
training images held out for it; the test images are used once, for the figures printed.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision

import bagssl
from bagssl import BagOfPatches, Encoder, Progress, UserError, World, clock

# --------------------------------------------------------------------------------------------------
# Features


class Pixels(torch.nn.Module):
    """The control that learned nothing: images (B, 3, H, W), made at most 32 x 32, as (B, 3 * side * side)."""

    def forward(self, images):
        side = min(32, images.shape[-1])
        return torchvision.transforms.functional.resize(images, [side, side]).flatten(1).float() / 255


@torch.no_grad()
def embed(embedders, images, device, world, name, block=256):
    """Run embedders, (B, 3, H, W) -> (B, D), over uint8 images (N, 3, H, W): [float32 (N, D) on the CPU].

    One pass over the images for all embedders. Under torchrun each process takes its share, and
    every process returns the whole.
    """
    share = math.ceil(len(images) / world.size)
    mine = torch.arange(world.rank * share, (world.rank + 1) * share).clamp(max=len(images) - 1)  # equal shares
    features, progress, begun = [[] for _ in embedders], Progress(quiet=world.rank != 0), time.monotonic()
    for first in range(0, share, block):
        batch = images[mine[first:first + block]].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bagssl.has_bf16(device)):
            for embedder, found in zip(embedders, features):
                found.append(embedder(batch).float())
        done = min(first + block, share)
        left = (time.monotonic() - begun) * (share / done - 1)
        progress(f"embedding {name}: {done * world.size:,} of {len(images):,} images, {clock(left)} left",
                 last=done == share)
    features = [torch.cat(found) for found in features]
    if world.size > 1:
        features = [bagssl.GatherRows.apply(found) for found in features]
    return [found[:len(images)].cpu() for found in features]


# --------------------------------------------------------------------------------------------------
# Probes


def fit_linear(features, labels, classes, decay, start=None, iterations=100):
    """Softmax regression by L-BFGS: minimise cross entropy + decay / 2 ||W||^2; returns (D + 1, classes).

    features: (N, D), standardised. labels: int64 (N,). The last row is the bias, not regularised.
    """
    weight = torch.zeros(features.shape[1] + 1, classes, device=features.device) if start is None else start.clone()
    weight.requires_grad_()
    optimizer = torch.optim.LBFGS([weight], max_iter=iterations, tolerance_change=1e-6, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ weight[:-1] + weight[-1], labels)
        loss = loss + decay / 2 * weight[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


def top_k(scores, labels, k):
    """Percentage of rows of scores (N, classes) whose label is among the k highest."""
    return 100 * (scores.topk(k, dim=1).indices == labels[:, None]).any(1).float().mean().item()


def linear_probe(train, train_labels, test, test_labels, seed=0, decays=(1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 1e-4, 1e-5)):
    """Accuracy of a linear probe: {"top1", "decay"} and, over ten classes, "top5", in per cent.

    train (N, D), test (M, D): features, standardised here by the training set's mean and deviation.
    The decay is the best on a tenth of the training set, held out at random; then all of it is fitted.
    """
    classes = int(train_labels.max()) + 1
    mean, std = train.mean(0), train.std(0).clamp(min=1e-6)
    train, test = (train - mean) / std, (test - mean) / std
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).to(train.device)
    held, kept = order[:len(order) // 10], order[len(order) // 10:]
    weight, accuracy = None, {}
    for decay in decays:  # from strong to weak, each fit starting at the one before
        weight = fit_linear(train[kept], train_labels[kept], classes, decay, weight)
        accuracy[decay] = top_k(train[held] @ weight[:-1] + weight[-1], train_labels[held], 1)
        if accuracy[decay] < max(accuracy.values()) - 1:
            break  # past the peak: weaker ones overfit more
    best = max(accuracy, key=accuracy.get)
    weight = fit_linear(train, train_labels, classes, best)
    scores = test @ weight[:-1] + weight[-1]
    result = {"top1": top_k(scores, test_labels, 1), "decay": best}
    return result | ({"top5": top_k(scores, test_labels, 5)} if classes > 10 else {})


def knn_probe(train, train_labels, test, test_labels, k=20, temperature=0.07, block=512):
    """Accuracy, in per cent, of a vote of the k nearest by cosine, with weights exp(cosine / temperature).

    Features and labels as for `linear_probe`, not standardised (Wu et al., 2018, section 3.4).
    """
    train, classes, right = F.normalize(train), int(train_labels.max()) + 1, 0
    for features, labels in zip(F.normalize(test).split(block), test_labels.split(block)):
        cosine, nearest = (features @ train.T).topk(min(k, len(train)))
        votes = F.one_hot(train_labels[nearest], classes) * (cosine / temperature).exp()[..., None]
        right += (votes.sum(1).argmax(1) == labels).sum().item()
    return 100 * right / len(test)


# --------------------------------------------------------------------------------------------------
# Command line


def parse_arguments():
    parser = bagssl.Parser(prog="eval_linear.py", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, help="checkpoint.pt of a run of bagssl.py")
    parser.add_argument("--patches", type=int, nargs="+", default=[1, 4, 16], help="sizes of the bags, square numbers")
    parser.add_argument("--patch-scale", type=float, help="area fraction of a patch; default: as trained, or the "
                                                          "middle of the trained range")
    parser.add_argument("--data", help="folder with the images; default: as trained")
    parser.add_argument("--cache", help="folder for decoded images; default: as trained")
    parser.add_argument("--train-images", type=int, default=0, help="fit the probes on this many images, drawn at "
                                                                    "random; default: all")
    parser.add_argument("--device", default="", help="default: cuda, else mps, else cpu")
    arguments = parser.parse_args()
    arguments.sides = [math.isqrt(n) for n in sorted(set(arguments.patches))]
    wrong = [n for n in arguments.patches if n < 1 or math.isqrt(n) ** 2 != n]
    if wrong:
        raise UserError(f"a bag is a square grid of patches: --patches takes 1, 4, 9, 16, ..., not {wrong[0]}")
    if arguments.patch_scale is not None and not 0 < arguments.patch_scale <= 1:
        raise UserError(f"--patch-scale is a fraction of the area, in (0, 1], not {arguments.patch_scale:g}")
    if arguments.train_images < 0:
        raise UserError(f"--train-images is a number of images, not {arguments.train_images}")
    return arguments


def main():
    arguments, world = parse_arguments(), World()
    encoder, config = bagssl.load_encoder(arguments.checkpoint)
    if arguments.data is not None:
        config.data = arguments.data
    if arguments.cache is not None:
        config.cache = arguments.cache
    device = bagssl.pick_device(config.device if not arguments.device else arguments.device, world.local_rank)
    bagssl.join(world, device)

    # The whole image is shown at the magnification its patches had in training.
    low, high = config.patch_scale[0], config.patch_scale[-1]
    scale = arguments.patch_scale or (low + high) / 2
    native = bagssl.patch_side(config.image_size, config.image_size, scale)
    whole_size = None
    if config.patch_size:
        whole_size = config.patch_size if low < high else round(config.image_size * config.patch_size / native)

    source = dict(dataset=config.dataset, data=config.data, image_size=config.image_size, cache=config.cache,
                  seed=config.seed, min_side=native, quiet=world.rank != 0)
    images, labels = zip(*bagssl.leader_first(lambda: [bagssl.load_images(split=split, **source)
                                                       for split in ("train", "test")], world.local_rank == 0, world))
    train_images, train_labels = images[0], labels[0]
    if arguments.train_images:
        chosen = torch.randperm(len(train_images), generator=torch.Generator().manual_seed(0))[:arguments.train_images]
        train_images, train_labels = train_images[chosen], train_labels[chosen]
    test_images, test_labels = images[1], labels[1]
    sets, labels = ((train_images, "train"), (test_images, "test")), (train_labels.to(device), test_labels.to(device))
    if world.rank == 0:
        print(f"probing {arguments.checkpoint} with {len(train_images):,} train and {len(test_images):,} test images",
              flush=True)

    torch.manual_seed(config.seed)
    untrained = Encoder(config.arch, config.stem_stride, config.projector).eval().to(memory_format=torch.channels_last)
    rows, embedders = [], []
    for side in arguments.sides:
        rows.append(f"bag of {side * side}" if side > 1 else "one patch, the centre")
        embedders.append(BagOfPatches(encoder.backbone, side, scale, config.patch_size or None))
    rows += ["whole image, one pass", f"untrained, bag of {side * side}", "raw pixels"]
    embedders += [BagOfPatches(encoder.backbone, 1, 1.0, whole_size),
                  BagOfPatches(untrained.backbone, side, scale, config.patch_size or None), Pixels()]
    embedders = [embedder.to(device).eval() for embedder in embedders]
    features = zip(*[embed(embedders, images, device, world, name) for images, name in sets])  # (train, test) a row

    results = []
    for row, (train, test) in zip(rows, features):
        train, test = train.to(device), test.to(device)
        if world.rank == 0:  # the features are small: the probes run on one process
            found = {"features": row, **linear_probe(train, labels[0], test, labels[1], config.seed),
                     "knn": knn_probe(train, labels[0], test, labels[1])}
            results.append(found)
            if len(results) == 1:
                print(f"\n{'':24}  linear top-1" + ("  top-5" if "top5" in found else "") + "   kNN", flush=True)
            print(f"{row:24}  {found['top1']:12.2f}" + (f"  {found['top5']:5.2f}" if "top5" in found else "")
                  + f"  {found['knn']:5.2f}", flush=True)
    if world.rank == 0:
        path = Path(arguments.checkpoint).parent / "eval.json"
        settings = {"checkpoint": str(arguments.checkpoint), "patch_scale": scale, "train_images": len(train_images),
                    "test_images": len(test_images), "torch": torch.__version__}
        bagssl.save_atomically(path, json.dumps({**settings, "results": results}, indent=1).encode())
        print(f"\nper cent of test images right; saved in {path}")


if __name__ == "__main__":
    bagssl.run(main)
