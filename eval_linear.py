# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9", "torchvision>=0.24", "numpy>=1.26"]
# ///
"""Probe a BagSSL encoder: how well does the mean of n patch embeddings predict an image's class?

    python eval_linear.py --checkpoint runs/demo/checkpoint.pt
    torchrun --standalone --nproc_per_node=8 eval_linear.py --checkpoint runs/imagenet/checkpoint.pt --patches 1 4 16 64
    python eval_linear.py --checkpoint resnet50.pth --arch resnet50 --data FOLDER --image-size 224 --patch-scale 0.2 \
        --patch-size 224

For each n, and for the whole image in one forward pass, it reports the accuracy of a linear probe (softmax regression
on frozen features) and of a weighted nearest-neighbour vote, on the features as they are and on whitened ones, and adds
them to eval.jsonl beside the checkpoint. Two controls show how much of it was learned: the same network untrained, and
raw pixels. The probe's weight decay is chosen on a held-out tenth of the training images; test images serve only for
the accuracies reported.
"""

import argparse
import dataclasses
import json
import math
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision

import bagssl
from bagssl import RANK, WORLD_SIZE, BagOfPatches, Encoder, UserError

# --------------------------------------------------------------------------------------------------
# Features


class Pixels(torch.nn.Module):
    """Raw pixels: images (B, 3, H, W), resized to at most 32 x 32, flattened to (B, 3 * side * side)."""

    def forward(self, images):
        side = min(32, images.shape[-1])
        return torchvision.transforms.functional.resize(images, [side, side]).flatten(1).float() / 255


@torch.no_grad()
def embed(embedder, images, device, name="", block=256):
    """Run an embedder, (B, 3, H, W) -> (B, D), over uint8 images (N, 3, H, W): float32 (N, D), on the CPU.

    Under torchrun each process embeds a part; rank 0 returns all features, the others None.
    """
    part = math.ceil(len(images) / WORLD_SIZE)
    mine = torch.arange(RANK * part, (RANK + 1) * part).clamp(max=len(images) - 1)  # equally many: the last image again
    features, progress = [], bagssl.Progress()
    for rows in mine.split(block):
        with bagssl.autocast(device):
            features.append(embedder(images[rows].to(device)).float().cpu())
        if name and progress.due():
            done = min(len(images), len(features) * block * WORLD_SIZE)
            print(f"{name}: {done:,} of {len(images):,} images", flush=True)
    features = torch.cat(features)
    if WORLD_SIZE > 1:
        parts = [torch.empty_like(features) for _ in range(WORLD_SIZE)] if RANK == 0 else None
        dist.gather(features, parts)
        features = torch.cat(parts) if parts else None
    return features[:len(images)] if RANK == 0 else None


# --------------------------------------------------------------------------------------------------
# Probes


def fit_linear(features, labels, classes, decays, iterations=100, block=8192):
    """Softmax regression by L-BFGS: minimise cross entropy + decay / 2 ||W||^2, for several decays at once.

    features: (N, D), standardised and, to converge fast, rotated to their principal axes (see `linear_probe`).
    labels: int64 (N,). Returns (R, D + 1, classes) for R decays; the last row is the bias, not decayed.
    """
    decays = torch.tensor(decays, device=features.device)[:, None, None]
    # Precondition: at zero the Hessian's diagonal is about mean(x^2) / classes + decay; rescale it to 1.
    scale = (features.square().mean(0)[:, None] / classes + decays).rsqrt()  # (R, D, 1)
    scale = F.pad(scale, (0, 0, 0, 1), value=classes ** 0.5)  # the bias: mean(x^2) = 1, no decay
    scaled = torch.zeros(*scale.shape[:2], classes, device=features.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([scaled], max_iter=iterations, tolerance_change=1e-7, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (decays / 2 * (scaled * scale)[:, :-1].square()).sum()
        loss.backward()
        for x, y in zip(features.split(block), labels.split(block)):  # bounded memory; one pass for all decays
            weight = (scaled * scale).transpose(0, 1)  # (D + 1, R, classes)
            scores = torch.addmm(weight[-1].flatten(), x, weight[:-1].flatten(1)).view(-1, classes)  # (n R, classes)
            part = F.cross_entropy(scores, y.repeat_interleave(len(decays)), reduction="sum") / len(features)
            part.backward()
            loss = loss + part
        return loss.detach()

    optimizer.step(closure)
    return (scaled * scale).detach()


def top_k(scores, labels, k):
    """Percentage of rows of scores (N, classes) whose label is among the k highest."""
    return 100 * (scores.topk(k, dim=1).indices == labels[:, None]).any(1).float().mean().item()


def linear_probe(train, train_labels, test, test_labels, seed=0, decays=(1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 1e-4, 1e-5)):
    """Accuracy of a linear probe: {"top1", "decay"} and, with more than ten classes, "top5", in per cent.

    train (N, D), test (M, D): features, standardised here by the training set's mean and deviation. Labels: int64.
    The decay is the best on a random tenth of the training set, held out; then the probe is fitted to all of it.
    Raises UserError on fewer than 10 training images.
    """
    if len(train) < 10:
        raise UserError(f"{len(train)} images are too few to fit a probe and choose its weight decay; give 10 or more")
    classes = int(train_labels.max()) + 1
    mean, std = train.mean(0), train.std(0).clamp(min=1e-6)
    train, test = (train - mean) / std, (test - mean) / std
    axes = torch.linalg.eigh((train.T @ train).cpu()).eigenvectors.to(train.device)  # not every device has eigh
    train, test = train @ axes, test @ axes  # a rotation: the penalty, and so the optimum, is the same
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).to(train.device)
    held, kept = order[:len(order) // 10], order[len(order) // 10:]
    weights = fit_linear(train[kept], train_labels[kept], classes, decays)
    accuracy = [top_k(train[held] @ weight[:-1] + weight[-1], train_labels[held], 1) for weight in weights]
    best = decays[accuracy.index(max(accuracy))]  # the first, and so the strongest, of equals
    weight, = fit_linear(train, train_labels, classes, [best])
    scores = test @ weight[:-1] + weight[-1]
    return {f"top{k}": top_k(scores, test_labels, k) for k in ((1, 5) if classes > 10 else (1,))} | {"decay": best}


def whiten(train, test, epsilon=1e-3):
    """Rotate features to the training set's principal axes, and divide each by the root of its variance.

    train (N, D), test (M, D). epsilon times the greatest variance is added to all, so that no noise is blown up.
    """
    mean = train.mean(0)
    variances, axes = torch.linalg.eigh(torch.cov((train - mean).T).cpu())  # not every device has eigh
    axes = (axes / (variances + epsilon * variances[-1]).sqrt()).to(train.device)
    return (train - mean) @ axes, (test - mean) @ axes


def knn_probe(train, train_labels, test, test_labels, k=20, temperature=0.07, block=512):
    """Accuracy, in per cent, of a vote of the k nearest by cosine, weighted by exp(cosine / temperature).

    Features and labels as for `linear_probe`, not standardised (Wu et al., 2018, section 3.4).
    """
    classes, right = int(train_labels.max()) + 1, 0
    train = F.normalize(train)
    for features, labels in zip(F.normalize(test).split(block), test_labels.split(block)):
        cosine, nearest = (features @ train.T).topk(min(k, len(train)))
        votes = F.one_hot(train_labels[nearest], classes) * (cosine / temperature).exp()[..., None]
        right += (votes.sum(1).argmax(1) == labels).sum().item()
    return 100 * right / len(test)


# --------------------------------------------------------------------------------------------------
# Networks


def named_tensors(content, name=""):
    """The (name, tensor) pairs in dicts nested to any depth, in order."""
    if isinstance(content, torch.Tensor):
        yield name, content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from named_tensors(value, f"{name}.{key}" if name else str(key))


def load_published(path, arch):
    """The backbone of a ResNet as people publish it: (module in eval mode, its stem's stride, 1 or 4).

    The tensors are found by the sequence of their shapes, so names and nesting do not matter. If several
    networks match (a momentum encoder, say), the first is taken, and named in a message. A stem of 3 x 3
    is assumed to have stride 1. Raises UserError if nothing matches.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # many checkpoints hold their arguments
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch raises on a missing, damaged or foreign file
        raise UserError(f"{path} cannot be read ({type(error).__name__}); give a state dict saved by torch") from error
    tensors = [(name, tensor) for name, tensor in named_tensors(content) if tensor.ndim]  # without num_batches_tracked
    for stride in (4, 1):
        backbone = bagssl.make_backbone(arch, stride)
        ours = {name: tensor for name, tensor in backbone.state_dict().items() if tensor.ndim}
        shapes, theirs = [tensor.shape for tensor in ours.values()], [tensor.shape for _, tensor in tensors]
        starts = [i for i in range(len(theirs) - len(shapes) + 1) if theirs[i:i + len(shapes)] == shapes]
        if starts:
            found = tensors[starts[0]:starts[0] + len(shapes)]
            backbone.load_state_dict(dict(zip(ours, (tensor for _, tensor in found))), strict=False)
            if len(starts) > 1 and RANK == 0:
                print(f"{path} holds {len(starts)} networks; the one from {found[0][0]} on is taken, not that from "
                      f"{', '.join(tensors[i][0] for i in starts[1:])}")
            return backbone.eval().to(memory_format=torch.channels_last), stride
    raise UserError(f"{path} holds no {arch}: its {len(tensors)} tensors nowhere have that network's shapes; "
                    f"is --arch right?")


def load_model(arguments):
    """(trained, untrained, config): networks whose `backbone` is probed, on the CPU, and how they see images."""
    if arguments.arch:
        trained = torch.nn.Module()  # in place of an Encoder, which has a projector too
        trained.backbone, stride = load_published(arguments.checkpoint, arguments.arch)
        config = bagssl.Config(dataset="any", arch=arguments.arch, stem_stride=stride, projector=(1, 1, 1))
    else:
        trained, config = bagssl.load_encoder(arguments.checkpoint)
    for name in ("data", "cache", "image_size", "patch_size"):
        if getattr(arguments, name) is not None:
            setattr(config, name, getattr(arguments, name))
    scale = config.patch_scale if arguments.patch_scale is None else (arguments.patch_scale,)
    bagssl.check_config(dataclasses.replace(config, patch_scale=scale), processes=1)
    torch.manual_seed(config.seed)
    untrained = Encoder(config.arch, config.stem_stride, config.projector).eval()
    if config.arch == "patchnet":  # the whitening is not learned: the control has it too
        untrained.backbone.whiten.load_state_dict(trained.backbone.whiten.state_dict())
    return trained, untrained.to(memory_format=torch.channels_last), config


def view_sizes(config, arguments):
    """How the network sees images: a patch's area fraction, its size or None, and the whole image's size or None.

    A network trained at one scale sees the whole image magnified as its patches are, others at their input size.
    """
    low, high = config.patch_scale[0], config.patch_scale[-1]
    scale = (low + high) / 2 if arguments.patch_scale is None else arguments.patch_scale
    size = whole_size = config.patch_size or None
    if size and low == high and not arguments.arch:
        whole_size = round(config.image_size * size / bagssl.patch_side(config.image_size, config.image_size, scale))
    return scale, size, whole_size


# --------------------------------------------------------------------------------------------------
# Command line


def add_arguments(parser):
    """The flags about the network and the images, for this script and .github/claims.py."""
    add = parser.add_argument
    add("--checkpoint", required=True, help="checkpoint.pt of a run of bagssl.py; with --arch, any published ResNet")
    add("--patches", type=int, nargs="+", default=[1, 4, 16], help="sizes of the bags, square numbers")
    add("--patch-scale", type=float, help="a patch's fraction of the image's area; default: as trained, or mid-range")
    add("--patch-size", type=int, help="side to resize patches to, 0: not resized; default: as trained")
    add("--image-size", type=int, help="side of the images; default: as trained")
    add("--arch", choices=["resnet18", "resnet34", "resnet50"], help="the checkpoint is another project's, of this "
        "network: give --data, --image-size and --patch-scale too")
    add("--data", help="folder with the images; default: as trained")
    add("--cache", help="folder for decoded images; default: as trained")
    add("--train-images", type=int, default=0, help="fit the probes on this many images, drawn at random; 0: all")
    add("--test-images", type=int, default=0, help="test on this many; 0: all")
    add("--device", default="", help="cuda, mps or cpu; default: the best there is")


def check_arguments(arguments):
    """Raise UserError at the first invalid argument; `load_model` checks those that override the config's."""
    wrong = [n for n in arguments.patches if n < 1 or math.isqrt(n) ** 2 != n]
    if wrong:
        raise UserError(f"a bag is a square grid of patches: --patches takes 1, 4, 9, 16, ..., not {wrong[0]}")
    if min(arguments.train_images, arguments.test_images) < 0:
        raise UserError("--train-images and --test-images cannot be negative")
    needed = [f"--{name.replace('_', '-')}" for name in ("data", "image_size", "patch_scale")
              if getattr(arguments, name) is None]
    if arguments.arch and needed:
        raise UserError(f"a checkpoint of another project does not say how it was trained: give {', '.join(needed)}")


def load_split(config, arguments, split):
    """The images and labels of a split, as many as the arguments say, drawn at random."""
    c = config
    images, labels = bagssl.load_images(c.dataset, c.data, split, c.image_size, c.cache, c.seed)
    if limit := getattr(arguments, f"{split}_images"):
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:limit]
        images, labels = images[chosen], labels[chosen]
    return images, labels


def save_results(arguments, show, **table):
    """Add a line to eval.jsonl beside the checkpoint: no evaluation replaces another."""
    path = Path(arguments.checkpoint).parent / "eval.jsonl"
    earlier = path.read_bytes() if path.exists() else b""
    table = {"show": show, "checkpoint": str(arguments.checkpoint), "torch": torch.__version__, **table}
    bagssl.save_atomically(path, earlier + json.dumps(table).encode() + b"\n")
    print(f"added to {path}")


def main():
    parser = bagssl.Parser(prog="eval_linear.py", description=__doc__.partition("\n")[0], allow_abbrev=False)
    add_arguments(parser)
    arguments = parser.parse_args()
    check_arguments(arguments)
    trained, untrained, config = load_model(arguments)
    device = bagssl.start_process(arguments.device)
    scale, size, whole_size = view_sizes(config, arguments)
    train_images, train_labels = load_split(config, arguments, "train")
    test_images, test_labels = load_split(config, arguments, "test")

    trained, untrained = trained.backbone.to(device), untrained.backbone.to(device)
    sides = sorted({math.isqrt(n) for n in arguments.patches})
    rows = {f"bag of {side ** 2}" if side > 1 else "one patch, the centre": BagOfPatches(trained, side, scale, size)
            for side in sides}
    rows["whole image, one pass"] = BagOfPatches(trained, 1, 1.0, whole_size, chunk=64)
    control = min(sides, key=lambda side: abs(side - 4))  # nearest to a bag of 16
    rows[f"untrained, bag of {control ** 2}"] = BagOfPatches(untrained, control, scale, size)
    rows["raw pixels"] = Pixels()

    results = []
    # The other processes wait for the first one's probes in a group of their own, since others give up in minutes.
    patient = dist.new_group(backend="gloo", timeout=timedelta(days=1)) if WORLD_SIZE > 1 else None
    for name, embedder in rows.items():
        train = embed(embedder, train_images, device, f"{name}, train")
        test = embed(embedder, test_images, device, f"{name}, test")
        if RANK == 0:
            parts = [part.to(device) for part in (train, train_labels, test, test_labels)]
            white_train, white_test = whiten(parts[0], parts[2])
            row = {"features": name, **linear_probe(*parts), "knn": knn_probe(*parts),
                   "knn_whitened": knn_probe(white_train, parts[1], white_test, parts[3])}
            columns = [f"{key} {row[key]:5.2f} %" for key in ("top1", "top5", "knn", "knn_whitened") if key in row]
            print(f"{name:24}", *columns, sep="  ", flush=True)
            results.append(row)
        if patient:
            dist.barrier(patient)
    if RANK == 0:
        save_results(arguments, "probe", data=config.data, image_size=config.image_size, patch_scale=scale,
                     patch_size=size, train_images=len(train_images), test_images=len(test_images), results=results)


if __name__ == "__main__":
    bagssl.run_cli(main)
