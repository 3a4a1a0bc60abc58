# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "torchvision>=0.26", "numpy>=1.26"]
# ///
"""Probe a BagSSL encoder: how well does the mean embedding of a bag of n patches predict an image's class?

    python eval_linear.py --checkpoint runs/demo/checkpoint.pt
    torchrun --standalone --nproc_per_node=8 eval_linear.py --checkpoint runs/imagenet/checkpoint.pt --patches 1 4 16 64
    python eval_linear.py --checkpoint resnet50.pth --arch resnet50 --data FOLDER --image-size 224 --patch-scale 0.2 \
        --patch-size 224

For each n, and for the whole image in one forward pass, it reports the accuracy of a linear probe (softmax regression
on frozen, standardised features) and of a weighted kNN classifier on plain and on whitened features. Two controls need
no training: raw pixels, and the same network untrained, with the bag size nearest to 16. The results are added to
eval.jsonl beside the checkpoint. The probe's weight decay is chosen on a held-out tenth of the training images; test
images serve only for the accuracies reported.
"""

import argparse
import dataclasses
import json
import math
import sys
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


def raw_pixels(images):
    """Images (B, 3, H, W), resized to a side of at most 32 and flattened: (B, 3 * side * side)."""
    side = min(32, images.shape[-1])
    return torchvision.transforms.functional.resize(images, [side, side]).flatten(1)


@torch.no_grad()
def embed(embedder, images, device, name="", block=256):
    """Embed uint8 images (N, 3, H, W), a block at a time: float32 (N, D), on the CPU.

    embedder: (B, 3, H, W) -> (B, D), on `device`. name: for progress lines; if empty, none are printed. Under torchrun
    each process embeds a part; rank 0 returns all features, the others None.
    """
    count = math.ceil(len(images) / WORLD_SIZE)  # gather needs equal parts: the last image is repeated to fill them
    mine = torch.arange(RANK * count, (RANK + 1) * count).clamp(max=len(images) - 1)
    features, progress = [], bagssl.Progress()
    for rows in mine.split(block):
        with bagssl.autocast(device):
            features.append(embedder(images[rows].to(device)).float().cpu())
        if name and progress.due():
            done = min(len(images), len(features) * block * WORLD_SIZE)
            print(f"{name}: {done:,} of {len(images):,} images", flush=True)
    if dist.is_initialized():
        own = torch.cat(features)
        features = [torch.empty_like(own) for _ in range(WORLD_SIZE)] if RANK == 0 else None
        dist.gather(own, features)
    return torch.cat(features)[:len(images)] if RANK == 0 else None


# --------------------------------------------------------------------------------------------------
# Probes


def fit_linear(features, labels, classes, decays, iterations=100, block=8192):
    """Softmax regression by L-BFGS: minimise mean cross entropy + (decay / 2) ||W||^2, several decays at once.

    features: (N, D), standardised and, for fast convergence, rotated to their principal axes (as by `linear_probe`).
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


def linear_probe(train, train_labels, test, test_labels, seed=0, decays=(1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 1e-4, 1e-5)):
    """Fit and test a linear probe on frozen features.

    train (N, D), test (M, D): features, standardised here with the training set's statistics. Labels: int64 (N,), (M,).
    The decay is chosen on a random tenth of the training set, held out; then the probe is fitted to the whole set.
    Returns a dict: the accuracies in per cent, "top1" and (with more than ten classes) "top5", and the chosen "decay".
    Raises UserError on fewer than 10 training images.
    """
    if len(train) < 10:
        raise UserError(f"{len(train)} images are too few to fit a probe and choose its weight decay; give 10 or more")
    classes = int(train_labels.max()) + 1
    mean, std = train.mean(0), train.std(0)
    std = std.where(std > 1e-6, 1.0)  # only centre constant features: a test image's may differ, and would explode
    train, test = (train - mean) / std, (test - mean) / std
    if len(train) < train.shape[1]:  # for speed: the optimal weights lie in the span of the training images
        basis = torch.linalg.qr(train.T.cpu()).Q.to(train)
        train, test = train @ basis, test @ basis
    # On the CPU, as not every device has qr and eigh; in float64, as float32 may not converge.
    axes = torch.linalg.eigh((train.T @ train).cpu().double()).eigenvectors.to(train)
    train, test = train @ axes, test @ axes  # a rotation: the penalty, and so the optimum, is the same
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).to(train.device)
    held, kept = order.tensor_split([len(order) // 10])
    weights = fit_linear(train[kept], train_labels[kept], classes, decays)
    accuracy = [top_k(train[held] @ weight[:-1] + weight[-1], train_labels[held], 1) for weight in weights]
    _, best = max(zip(accuracy, decays))  # the strongest of equally accurate ones
    weight, = fit_linear(train, train_labels, classes, [best])
    scores = test @ weight[:-1] + weight[-1]
    ks = (1, 5) if classes > 10 else (1,)
    return {f"top{k}": top_k(scores, test_labels, k) for k in ks} | {"decay": best}


def whiten(train, test, epsilon=1e-3):
    """PCA-whiten train (N, D) and test (M, D) with the training set's mean and covariance.

    epsilon times the largest variance is added to every variance, which limits how much directions of little variance
    are amplified.
    """
    mean = train.mean(0)
    variances, axes = torch.linalg.eigh(torch.cov(train.T).cpu().double())  # as in `linear_probe`
    variances = (variances + epsilon * variances[-1]).clamp(min=1e-12)  # in case no feature varies
    axes = (axes / variances.sqrt()).to(train)
    return (train - mean) @ axes, (test - mean) @ axes


def knn_probe(train, train_labels, test, test_labels, k=20, temperature=0.07, block=512):
    """Accuracy, in per cent, of a weighted kNN classifier (Wu et al., 2018, section 3.4).

    Each of the k nearest neighbours by cosine has a vote of weight exp(cosine / temperature). Features and
    labels as for `linear_probe`; the features are not standardised here.
    """
    classes, correct = int(train_labels.max()) + 1, 0
    train = F.normalize(train)
    for features, labels in zip(F.normalize(test).split(block), test_labels.split(block)):
        cosine, nearest = (features @ train.T).topk(min(k, len(train)))
        votes = cosine.new_zeros(len(cosine), classes)
        votes.scatter_add_(1, train_labels[nearest], (cosine / temperature).exp())
        correct += (votes.argmax(1) == labels).sum().item()
    return 100 * correct / len(test)


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
    """Load the backbone of a published ResNet: (the module in eval mode, its stem's stride).

    The stride is 4 for a stem of 7 x 7, and assumed to be 1 for one of 3 x 3. Inputs will be standardised by ImageNet's
    mean and deviation, whatever the network was trained with. The tensors are found by the sequence of their shapes, so
    names and nesting do not matter. If several networks match (a momentum encoder, say), the first is taken, and named
    in a message. Raises UserError if the file cannot be read, or nothing matches.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # many checkpoints hold their arguments
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch raises on a missing, damaged or foreign file
        raise UserError(f"{path} cannot be read ({type(error).__name__}); give a state dict saved by torch") from error
    tensors = [(name, tensor) for name, tensor in named_tensors(content) if tensor.ndim]  # skip num_batches_tracked
    theirs = [tensor.shape for _, tensor in tensors]
    for stride in (4, 1):
        backbone = bagssl.make_backbone(arch, stride)
        ours = {name: tensor.shape for name, tensor in backbone.state_dict().items() if tensor.ndim}
        starts = [i for i in range(len(theirs)) if theirs[i:i + len(ours)] == list(ours.values())]
        if starts:
            found = (tensor for _, tensor in tensors[starts[0]:])
            backbone.load_state_dict(dict(zip(ours, found)))  # torch adds the missing num_batches_tracked
            if len(starts) > 1 and RANK == 0:
                print(f"{path} holds {len(starts)} networks; taking the one that starts at {tensors[starts[0]][0]}, "
                      f"not at {', '.join(tensors[i][0] for i in starts[1:])}; to probe another, save it alone")
            return backbone.eval().to(memory_format=torch.channels_last), stride
    raise UserError(f"{path} holds no {arch}: the shapes of its {len(tensors)} tensors do not match; is --arch right?")


def load_model(arguments):
    """The trained and an untrained network, on the CPU, the Config, and the step at which the first was saved.

    The arguments override the Config's fields, except for the scale. The step of another project's checkpoint is None.
    """
    step = None
    if arguments.arch:
        trained = torch.nn.Module()  # stands in for an Encoder
        trained.backbone, stride = load_published(arguments.checkpoint, arguments.arch)
        # The projector is not used.
        config = bagssl.Config(dataset="", arch=arguments.arch, stem_stride=stride, projector=(1, 1, 1))
    else:
        content, trained, config = bagssl.load_checkpoint(arguments.checkpoint)
        step = content["step"]
        if step < content["steps"] and RANK == 0:
            print(f"{arguments.checkpoint} is of step {step:,} of {content['steps']:,}: training has not ended")
    for name in ("data", "cache", "image_size", "patch_size"):
        if getattr(arguments, name) is not None:
            setattr(config, name, getattr(arguments, name))
    scale = config.patch_scale if arguments.patch_scale is None else (arguments.patch_scale,)
    # A copy is checked with the given scale: view_sizes needs the trained one.
    bagssl.check_config(dataclasses.replace(config, patch_scale=scale), processes=1)
    torch.manual_seed(config.seed)
    untrained = Encoder(config.arch, config.stem_stride, config.projector).eval()  # where its BatchNorms change nothing
    if config.arch == "patchnet":  # its whitening layer is computed, not learned: both have it
        untrained.backbone.whiten.load_state_dict(trained.backbone.whiten.state_dict())
    return trained, untrained.to(memory_format=torch.channels_last), config, step


def view_sizes(config, arguments):
    """The scale of a patch, and the sides that patches and whole images are resized to; a side of None: not resized.

    If patches are resized, a network trained at one scale gets the whole image resized by the same factor;
    multi-scale and published networks get it at the size of a patch.
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
    """This script's flags, which .github/claims.py takes, too."""
    add = parser.add_argument
    add("--checkpoint", required=True, help="checkpoint.pt of a run of bagssl.py; with --arch, a published ResNet")
    add("--patches", type=int, nargs="+", default=[1, 4, 16], help="bag sizes, each a square number; default: 1 4 16")
    add("--patch-scale", type=float,
        help="a patch's fraction of the image's area; default: as trained, or the middle of the trained range")
    add("--patch-size", type=int, help="side to resize patches to, 0: not resized; default: as trained; 0 with --arch")
    add("--image-size", type=int, help="side of the images; default: as trained")
    add("--arch", choices=["resnet18", "resnet34", "resnet50"], help="network of another project's checkpoint; "
        "needs --data, --image-size and --patch-scale")
    add("--data", help="folder with the images; default: as trained")
    add("--cache", help="folder for decoded images; default: as trained")
    add("--train-images", type=int, default=0, help="fit the probes on at most this many, drawn at random; 0: all")
    add("--test-images", type=int, default=0, help="test on at most this many; 0: all")
    add("--device", default="", help="cuda, mps or cpu; default: the best there is")


def check_arguments(arguments):
    """Raise UserError at the first invalid argument; `load_model` checks those that override the config."""
    wrong = [n for n in arguments.patches if n < 1 or math.isqrt(n) ** 2 != n]
    if wrong:
        raise UserError(f"a bag is a square grid of patches: --patches takes 1, 4, 9, 16, ..., not {wrong[0]}")
    if 0 < arguments.train_images < 10 or min(arguments.train_images, arguments.test_images) < 0:
        raise UserError("--train-images must be 0 (all) or at least 10, and --test-images 0 (all) or more")
    needed = [f"--{name.replace('_', '-')}" for name in ("data", "image_size", "patch_scale")
              if getattr(arguments, name) is None]
    if arguments.arch and needed:
        raise UserError(f"a checkpoint of another project does not say how it was trained: give {', '.join(needed)}")


def load_split(config, arguments, split):
    """The images and labels of a split of the config's dataset, or as many as the arguments say, drawn at random."""
    images, labels = bagssl.load_images(config.dataset, config.data, split, config.image_size, config.cache,
                                        config.seed)
    if limit := getattr(arguments, f"{split}_images"):
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:limit]
        images, labels = images[chosen], labels[chosen]
    return images, labels


def save_results(arguments, show, **table):
    """Write `table` as a line of eval.jsonl beside the checkpoint.

    It replaces an earlier line of the same table with the same or fewer rows, so a caller may save after each row.
    show: "probe", or a claim of claims.py. The last item of `table` must be the results, which alone may grow between
    calls. A folder that cannot be written is only warned of, as the results are printed too.
    """
    path = Path(arguments.checkpoint).parent / "eval.jsonl"
    line = json.dumps({"show": show, "checkpoint": arguments.checkpoint, "torch": torch.__version__, **table})
    earlier = path.read_text().splitlines() if path.exists() else []
    # Without its closing brackets, the line of a shorter table is a prefix of this one.
    kept = [other for other in earlier if not line.startswith(other.removesuffix("]}"))]
    try:
        bagssl.save_atomically(path, "\n".join([*kept, line, ""]).encode())
    except UserError as error:
        print(f"warning: {error}", file=sys.stderr, flush=True)
        return
    if len(kept) == len(earlier):  # a table that replaces an earlier line was announced with that one
        print(f"added to {path}", flush=True)


def main():
    parser = bagssl.Parser(prog="eval_linear.py", description=__doc__.partition("\n")[0], allow_abbrev=False)
    add_arguments(parser)
    arguments = parser.parse_args()
    check_arguments(arguments)
    trained, untrained, config, step = load_model(arguments)
    device = bagssl.start_process(arguments.device)
    torch.set_float32_matmul_precision("highest")  # TensorFloat-32 is too coarse for L-BFGS
    scale, size, whole_size = view_sizes(config, arguments)
    train_images, train_labels = load_split(config, arguments, "train")
    test_images, test_labels = load_split(config, arguments, "test")

    trained.to(device)
    sides = sorted({math.isqrt(n) for n in arguments.patches})
    names = {side: f"bag of {side ** 2}" if side > 1 else "one patch, the centre" for side in sides}
    embedders = {name: BagOfPatches(trained.backbone, side, scale, size) for side, name in names.items()}
    embedders["whole image, one pass"] = BagOfPatches(trained.backbone, 1, 1.0, whole_size, chunk=64)  # larger inputs
    side = min(sides, key=lambda side: abs(side ** 2 - 16))
    embedders[f"untrained, {names[side]}"] = BagOfPatches(untrained.backbone.to(device), side, scale, size)
    embedders["raw pixels"] = raw_pixels

    # Rank 0 fits the probes while the others wait, longer than the default group's time-out allows.
    group = dist.new_group(backend="gloo", timeout=timedelta(days=1)) if dist.is_initialized() else None
    results = []
    for name, embedder in embedders.items():
        train = embed(embedder, train_images, device, f"{name}, train")
        test = embed(embedder, test_images, device, f"{name}, test")
        if RANK == 0:
            train, y, test, test_y = (part.to(device) for part in (train, train_labels, test, test_labels))
            row = {"features": name, **linear_probe(train, y, test, test_y), "knn": knn_probe(train, y, test, test_y)}
            train, test = whiten(train, test)
            row["knn_whitened"] = knn_probe(train, y, test, test_y)
            columns = [f"{key} {row[key]:5.2f} %" for key in ("top1", "top5", "knn", "knn_whitened") if key in row]
            print(f"{name:{max(map(len, embedders))}}", *columns, sep="  ", flush=True)
            results.append(row)
            save_results(arguments, "probe", step=step, data=config.data or config.dataset,
                         image_size=config.image_size, patch_scale=scale, patch_size=size,
                         train_images=len(train_images), test_images=len(test_images), results=results)
        if group:
            dist.barrier(group)


if __name__ == "__main__":
    bagssl.run_cli(main)
