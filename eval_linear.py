# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "torchvision>=0.26", "numpy>=1.26"]
# ///
"""Probe a BagSSL encoder: how well does the mean embedding of a bag of n patches predict an image's class?

    python eval_linear.py --checkpoint runs/demo/checkpoint.pt
    python eval_linear.py --checkpoint runs/imagenet/checkpoint.pt --patches 1 4 16 64
    python eval_linear.py --checkpoint resnet50.pth --arch resnet50 --data FOLDER --image-size 224 --patch-scale 0.2 \
        --patch-size 224

For each n, and for the whole image in one forward pass, it reports the accuracy of a linear probe (softmax regression
on frozen, standardised features) and of a weighted kNN classifier on plain and on whitened features. Two controls are
probed in the same way: an untrained network, at the bag size nearest to 16, and raw pixels. Each result is
printed, and appended to eval.jsonl beside the checkpoint. The probe's weight decay is chosen on a held-out tenth of
the training images; test images are used only for the accuracies reported.
"""

import argparse
import dataclasses
import io
import json
import math
import re
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision

import bagssl
from bagssl import BagOfPatches, Encoder, UserError

# ---- Features --------------------------------------------------------------------------------------------------------


def raw_pixels(images):
    """Images (B, 3, H, W), resized to a side of at most 32 and flattened: (B, 3 * side * side)."""
    side = min(32, images.shape[-1])
    return torchvision.transforms.functional.resize(images, [side, side]).flatten(1)


@torch.no_grad()
def embed(embedder, images, device, name=""):
    """Embed uint8 images (N, 3, H, W), a few at a time: float32 (N, D), on the CPU.

    embedder: (B, 3, H, W) -> (B, D), on `device`. name: for progress lines; if empty, none are printed.
    Raises UserError if features are not finite.
    """
    block = max(1, min(64, 256 // getattr(embedder, "per_side", 1) ** 2))  # images: up to 256 patches, or one image
    features, printed = [], time.time()
    for some in images.split(block):
        with bagssl.autocast(device):
            features.append(embedder(some.to(device)).float().cpu())
        if name and time.time() - printed > 10:
            printed = time.time()
            print(f"{name}: {sum(map(len, features)):,} of {len(images):,} images", flush=True)
    features = torch.cat(features)
    if not features.isfinite().all():
        raise UserError("the network's features are not finite: its training diverged, or the checkpoint is damaged")
    return features


# ---- Probes ----------------------------------------------------------------------------------------------------------


def fit_linear(features, labels, classes, decays, iterations=100, block=8192):
    """Softmax regression by L-BFGS: minimise mean cross entropy + (decay / 2) ||W||^2, several decays at once.

    features: (N, D), standardised and, for fast convergence, rotated to their principal axes (as by `fit_probe`).
    labels: int64 (N,). Returns (R, D + 1, classes) for R decays; the last row is the bias, not decayed.
    """
    decays = torch.tensor(decays, device=features.device)[:, None, None]
    # Diagonal preconditioning: W = free * scale, and L-BFGS varies `free`. At W = 0 the diagonal of the loss's Hessian
    # is about mean(x^2) / classes + decay in W, hence about 1 in `free`.
    scale = (features.square().mean(0)[:, None] / classes + decays).rsqrt()  # (R, D, 1)
    scale = F.pad(scale, (0, 0, 0, 1), value=classes ** 0.5)  # the bias: mean(x^2) = 1, no decay
    free = torch.zeros(*scale.shape[:2], classes, device=features.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([free], max_iter=iterations, tolerance_change=1e-7, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (decays / 2 * (free * scale)[:, :-1].square()).sum()
        loss.backward()
        for x, y in zip(features.split(block), labels.split(block)):  # a backward pass per block bounds the memory
            weight = (free * scale).transpose(0, 1)  # (D + 1, R, classes): one product serves all decays
            scores = torch.addmm(weight[-1].flatten(), x, weight[:-1].flatten(1)).view(-1, classes)  # (n R, classes)
            part = F.cross_entropy(scores, y.repeat_interleave(len(decays)), reduction="sum") / len(features)
            part.backward()
            loss = loss + part
        return loss.detach()

    optimizer.step(closure)
    return (free * scale).detach()


def top_k(scores, labels, k):
    """Percentage of rows of scores (N, classes) whose label is among the k highest."""
    return 100 * (scores.topk(k, dim=1).indices == labels[:, None]).any(1).float().mean().item()


def fit_probe(train, labels, seed=0, decays=(1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 1e-4, 1e-5)):
    """Fit a linear probe on frozen features, standardised by the training set's statistics.

    train: features (N, D). labels: int64 (N,). The weight decay is chosen on a random tenth of the images, held out, by
    fits of at most 30 iterations, which rank the decays nearly as converged ones do; then the probe is fitted to all
    images. Returns the probe and the decay. The probe, (D + 1, classes), applies to features as they are, not
    standardised; its last row is the bias. Raises UserError on fewer than 10 images.
    """
    if len(train) < 10:
        raise UserError(f"{len(train)} images are too few to fit a probe and choose its weight decay; give 10 or more")
    classes = int(labels.max()) + 1
    mean, std = train.mean(0), train.std(0)
    std = std.where(std > 1e-6, 1.0)  # not / 0: a test image may differ in a feature that is constant here
    x = (train - mean) / std
    # For speed, rotate x to its principal axes; the penalty, and so the optimum, is the same. N images span at most N
    # axes, the last. On the CPU, as not every device has eigh; in float64, as float32 may not converge.
    axes = torch.linalg.eigh((x.T @ x).cpu().double()).eigenvectors[:, -len(x):].to(x)  # (D, D or N)
    x = x @ axes
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
    held, kept = order.tensor_split([len(order) // 10])
    weights = fit_linear(x[kept], labels[kept], classes, decays, iterations=30)
    accuracy = [top_k(x[held] @ weight[:-1] + weight[-1], labels[held], 1) for weight in weights]
    _, best = max(zip(accuracy, decays))  # ties go to the stronger decay
    weight, = fit_linear(x, labels, classes, [best])
    slopes = axes @ weight[:-1] / std[:, None]
    return torch.cat([slopes, (weight[-1] - mean @ slopes)[None]]), best


def linear_probe(train, train_labels, test, test_labels, seed=0):
    """Fit a linear probe to features train (N, D) and labels (N,) by `fit_probe`, and test it on test (M, D), (M,).

    Returns a dict: the accuracies in per cent, "top1" and (with more than ten classes) "top5", and the chosen "decay".
    """
    probe, decay = fit_probe(train, train_labels, seed)
    scores = test @ probe[:-1] + probe[-1]
    ks = (1, 5) if scores.shape[1] > 10 else (1,)  # five of ten or fewer would say little
    return {f"top{k}": top_k(scores, test_labels, k) for k in ks} | {"decay": decay}


def whiten(train, test, epsilon=1e-3):
    """PCA-whiten train (N, D) and test (M, D) with the training set's mean and covariance.

    epsilon times the largest variance is added to every variance, which limits how much directions of little variance
    are amplified.
    """
    mean = train.mean(0)
    variances, axes = torch.linalg.eigh(torch.cov(train.T).cpu().double())  # as in `fit_probe`
    variances = (variances + epsilon * variances[-1]).clamp(min=1e-12)  # in case no feature varies
    axes = (axes / variances.sqrt()).to(train)
    return (train - mean) @ axes, (test - mean) @ axes


def knn_probe(train, train_labels, test, test_labels, k=20, temperature=0.07, block=512):
    """Accuracy, in per cent, of a weighted kNN classifier (Wu et al., 2018, section 3.4).

    Each of the k nearest neighbours by cosine has a vote of weight exp(cosine / temperature). Features and
    labels as for `linear_probe`; the features are not standardised here.
    """
    classes = int(train_labels.max()) + 1
    train, correct = F.normalize(train), 0
    for features, labels in zip(F.normalize(test).split(block), test_labels.split(block)):
        cosine, nearest = (features @ train.T).topk(min(k, len(train)))
        votes = cosine.new_zeros(len(cosine), classes)
        votes.scatter_add_(1, train_labels[nearest], (cosine / temperature).exp())
        correct += (votes.argmax(1) == labels).sum().item()
    return 100 * correct / len(test)


# ---- Networks --------------------------------------------------------------------------------------------------------


def read_tensors(path):
    """The tensors of a file saved by torch, found in dicts nested to any depth: {keys joined by dots: tensor}."""
    file = Path(path).read_bytes()
    if file[8:9] == b"{":
        raise UserError(f"{path} is a safetensors file; load it with safetensors and save it with torch.save")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # many checkpoints hold their arguments
            content = torch.load(io.BytesIO(file), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch raises on a damaged or foreign file
        if isinstance(error, MemoryError) or "memory" in str(error):
            raise
        if foreign := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise UserError(f"{path} holds, besides tensors and plain values, a {foreign[1]}, which could run code "
                            f"when it is loaded; save only the weights") from error
        raise UserError(f"{path} is not a file saved by torch, or it is damaged") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dict of tensors by name")

    def collect(value, prefix=""):
        if isinstance(value, dict):
            for key, part in value.items():
                yield from collect(part, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor) and value.ndim:  # without num_batches_tracked
            yield prefix[:-1], value

    return dict(collect(content))


def load_published(path, arch):
    """Load the backbone of a published ResNet: (the module in eval mode, its stem's stride).

    The stride is 4 for a 7 x 7 stem, and assumed to be 1 for a 3 x 3 one. Inputs will be standardised by ImageNet's
    mean and standard deviation, whatever the network was trained with. Tensors are found by name, under any prefix:
    either torchvision's names, or those of an nn.Sequential of a ResNet's children. If several networks are found (a
    momentum encoder, say), the first is taken, and named in a message. Raises UserError if none is found.
    """
    tensors, found = read_tensors(path), {}  # found: {prefix: {our name: tensor}}
    for stride in (4, 1):
        backbone = bagssl.make_backbone(arch, stride)
        ours = {name: tensor.shape for name, tensor in backbone.state_dict().items() if tensor.ndim}
        numbers = {name: str(i) for i, (name, _) in enumerate(backbone.named_children())}
        numbered = {name: re.sub(r"^\w+", lambda first: numbers[first[0]], name) for name in ours}
        for names in (dict(zip(ours, ours)), numbered):  # {our name: its name in the file, without the prefix}
            for key in tensors:
                prefix = key.removesuffix(names["conv1.weight"])
                if prefix == key or prefix[-1:] not in ("", "."):
                    continue
                part = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
                shapes = {name: x.shape for name, x in part.items()
                          if re.match(r"(conv1|bn1|layer\d|[014567])\.", name)}
                # All of the tensors, and no others: those of a resnet18 are all in a resnet34.
                if shapes == {theirs: ours[name] for name, theirs in names.items()}:
                    found[prefix] = {name: part[theirs] for name, theirs in names.items()}
        if found:
            backbone.load_state_dict(next(iter(found.values())), strict=False)  # lacks only num_batches_tracked
            first, *others = (prefix.removesuffix(".") or "the one without a prefix" for prefix in found)
            if others:
                print(f"{path} holds {len(found)} networks; taking {first}, not {', '.join(others)}; to probe another, "
                      f"save only that one")
            return backbone.eval().to(memory_format=torch.channels_last), stride
    raise UserError(f"{path} holds no {arch}: looked for all its tensors by name and shape, such as conv1.weight and "
                    f"layer1.0.bn1.weight, or 0.weight and 4.0.bn1.weight, after any prefix, but the file's names are "
                    f"{', '.join(list(tensors)[:3])}, ...; is --arch right?")


def load_model(arguments):
    """Returns (trained, untrained, config, whole_size, setting); the networks are on the CPU.

    config: the trained network's Config, overridden by the arguments. whole_size: the side that whole images are
    resized to, None if patches are not resized. It keeps the objects' size for a network trained at one scale; for
    others it is the patches' side. setting: what `save_row` shall say of them, with the checkpoint's epoch.
    """
    if arguments.arch:
        trained, epoch = torch.nn.Module(), None  # stands in for an Encoder, of which only the backbone is used
        trained.backbone, stride = load_published(arguments.checkpoint, arguments.arch)
        config = bagssl.Config(arch=arguments.arch, stem_stride=stride, projector=(2,))  # a projector is not used
    else:
        trained, config, saved = bagssl.load_encoder(arguments.checkpoint)
        epoch = saved["epoch"]
        if epoch < config.epochs:
            print(f"{arguments.checkpoint} is from epoch {epoch} of {config.epochs}: training is unfinished")
    one_scale = len(config.patch_scale) == 1 and not arguments.arch
    given = {name: getattr(arguments, name) for name in ("data", "cache", "image_size", "patch_size")
             if getattr(arguments, name) is not None}
    middle = sum(config.patch_scale) / len(config.patch_scale)
    scale = middle if arguments.patch_scale is None else arguments.patch_scale
    config = dataclasses.replace(config, **given, patch_scale=(scale,))
    whole_size = config.patch_size or None
    if whole_size and one_scale:
        side = bagssl.patch_side(config.image_size, config.image_size, scale)
        whole_size = round(config.image_size * config.patch_size / side)
    torch.manual_seed(config.seed)
    untrained = Encoder(config.arch, config.stem_stride, config.projector).eval()  # its BatchNorms are the identity
    if config.arch == "patchnet":  # its whitening layer is computed, not learned: both have it
        untrained.backbone.whiten.load_state_dict(trained.backbone.whiten.state_dict())
    setting = dict(epoch=epoch, data=config.data, image_size=config.image_size, patch_scale=scale,
                   patch_size=config.patch_size)
    return trained, untrained.to(memory_format=torch.channels_last), config, whole_size, setting


# ---- Command line ----------------------------------------------------------------------------------------------------


def parse_arguments(parser):
    """Parse this script's flags, shared by .github/claims.py; raises UserError on invalid ones."""
    add = parser.add_argument
    add("--checkpoint", required=True, help="checkpoint.pt of a run of bagssl.py; with --arch, a published ResNet")
    add("--patches", type=int, nargs="+", default=[1, 4, 16], help="bag sizes, each a square number; default: 1 4 16")
    add("--patch-scale", type=float,
        help="a patch's fraction of the image's area; default: as trained, or the middle of the trained range")
    add("--patch-size", type=int, help="side to resize patches to, 0: not resized; default: as trained; 0 with --arch")
    add("--image-size", type=int, help="side of the images; default: as trained")
    add("--arch", choices=["resnet18", "resnet34", "resnet50"], help="network of another project's checkpoint; "
        "needs --data, --image-size and --patch-scale")
    add("--data", help="demo, cifar10, cifar100, or a folder of images; default: as trained")
    add("--cache", help="folder for downloads and decoded images; default: as trained")
    add("--train-images", type=int, default=0, help="fit to at most this many, drawn at random, to save memory; 0: all")
    add("--test-images", type=int, default=0, help="test on at most this many; 0: all")
    add("--device", choices=["cuda", "mps", "cpu"], default=bagssl.DEVICE, help="default: the best available")
    arguments = parser.parse_args()
    if wrong := [n for n in arguments.patches if n < 1 or math.isqrt(n) ** 2 != n]:
        raise UserError(f"a bag is a square grid of patches: --patches takes 1, 4, 9, 16, ..., not {wrong[0]}")
    if 0 < arguments.train_images < 10 or min(arguments.train_images, arguments.test_images) < 0:
        raise UserError("--train-images must be 0 (all) or at least 10, and --test-images 0 (all) or more")
    if arguments.arch and None in (arguments.data, arguments.image_size, arguments.patch_scale):
        raise UserError("a checkpoint of another project does not say how it was trained: give --data, --image-size "
                        "and --patch-scale")
    if bagssl.WORLD_SIZE > 1:
        raise UserError("probing runs in one process: start it with python, not torchrun")
    return arguments


def load_split(config, arguments, split):
    """The images and labels of a split of the config's data, or a random subset if the arguments limit their number."""
    images, labels = bagssl.load_images(config.data, split, config.image_size, config.cache)
    if labels is None:
        raise UserError(f"{config.data} has no labels, which a probe needs: class folders in train/ and val/ or test/")
    if limit := getattr(arguments, f"{split}_images"):
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:limit]
        images, labels = images[chosen], labels[chosen]
    return images, labels


def save_row(arguments, **row):
    """Add a line to eval.jsonl beside the checkpoint; if that fails, only warn, as results are printed too."""
    path = Path(arguments.checkpoint).with_name("eval.jsonl")
    try:
        with open(path, "a") as file:  # a single appending write, so that two probes at once lose nothing
            file.write(json.dumps({"checkpoint": arguments.checkpoint, "torch": torch.__version__, **row}) + "\n")
    except OSError as error:
        print(f"warning: not added to {path} ({error.strerror})", file=sys.stderr, flush=True)


def main():
    arguments = parse_arguments(argparse.ArgumentParser(
        usage="eval_linear.py --checkpoint FILE [FLAG VALUE ...]; --help lists the flags", allow_abbrev=False))
    trained, untrained, config, whole_size, setting = load_model(arguments)
    scale, size = config.patch_scale[0], config.patch_size or None
    device = bagssl.start_process(arguments.device)
    torch.set_float32_matmul_precision("highest")  # lower ones are too coarse for L-BFGS, and for cosines near 1
    train_images, y = load_split(config, arguments, "train")
    test_images, test_y = load_split(config, arguments, "test")
    y, test_y = y.to(device), test_y.to(device)

    trained.to(device)
    sides = sorted({math.isqrt(n) for n in arguments.patches})
    names = {side: f"bag of {side ** 2}" if side > 1 else "one patch, the centre" for side in sides}
    embedders = {name: BagOfPatches(trained.backbone, side, scale, size) for side, name in names.items()}
    embedders["whole image, one pass"] = BagOfPatches(trained.backbone, 1, 1.0, whole_size)
    side = min(sides, key=lambda s: abs(s ** 2 - 16))
    embedders[f"untrained, {names[side]}"] = BagOfPatches(untrained.backbone.to(device), side, scale, size)
    embedders["raw pixels"] = raw_pixels
    for name, embedder in embedders.items():
        train = embed(embedder, train_images, device, f"{name}, train").to(device)
        test = embed(embedder, test_images, device, f"{name}, test").to(device)
        row = {**linear_probe(train, y, test, test_y), "knn": knn_probe(train, y, test, test_y)}
        train, test = whiten(train, test)
        row["knn_whitened"] = knn_probe(train, y, test, test_y)
        columns = [f"{key} {row[key]:5.2f} %" for key in ("top1", "top5", "knn", "knn_whitened") if key in row]
        print(f"{name:{max(map(len, embedders))}}", *columns, sep="  ", flush=True)
        save_row(arguments, show="probe", **setting, train_images=len(y), test_images=len(test_y), features=name, **row)


if __name__ == "__main__":
    bagssl.run_cli(main)
