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

    python eval_linear.py --checkpoint RUN/checkpoint.pt --show parts      # is the whole the mean of its parts?
    python eval_linear.py --checkpoint RUN/checkpoint.pt --show locality   # what h and z know of a patch
    python eval_linear.py --checkpoint resnet50.pth --arch resnet50 --data FOLDER --image-size 224 --patch-scale 0.1
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
        with bagssl.autocast(device):
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


def fit_linear(features, labels, classes, decays, iterations=100, block=8192):
    """Softmax regression by L-BFGS: minimise cross entropy + decay / 2 ||W||^2, for several decays at once.

    features: (N, D), standardised; on their principal axes few iterations are needed (see `linear_probe`).
    labels: int64 (N,). Returns (R, D + 1, classes) for R decays; the last row is the bias, not decayed.
    """
    decays = torch.tensor(decays, device=features.device)[:, None, None]
    # The Hessian at zero is, along a dimension, its mean square / classes + decay: scaled to 1, all converge alike.
    scale = (features.square().mean(0)[:, None] / classes + decays).rsqrt()  # (R, D, 1)
    scale = F.pad(scale, (0, 0, 0, 1), value=classes ** 0.5)  # and the bias's
    scaled = torch.zeros(*scale.shape[:2], classes, device=features.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([scaled], max_iter=iterations, tolerance_change=1e-7, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (decays / 2 * (scaled * scale)[:, :-1].square()).sum()
        loss.backward()
        for x, y in zip(features.split(block), labels.split(block)):  # bounded memory; one reading for all decays
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


def standardise(train, *others):
    """Features by the training set's mean and deviation a dimension."""
    mean, std = train.mean(0), train.std(0).clamp(min=1e-6)
    return [(features - mean) / std for features in (train, *others)]


def linear_probe(train, train_labels, test, test_labels, seed=0, decays=(1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 1e-4, 1e-5)):
    """Accuracy of a linear probe: {"top1", "decay"} and, over ten classes, "top5", in per cent.

    train (N, D), test (M, D): features, standardised here by the training set's mean and deviation.
    The decay is the best on a tenth of the training set, held out at random; then all of it is fitted.
    """
    classes = int(train_labels.max()) + 1
    train, test = standardise(train, test)
    axes = torch.linalg.eigh(train.T @ train).eigenvectors
    train, test = train @ axes, test @ axes  # a rotation: the penalty, and so the optimum, is the same
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).to(train.device)
    held, kept = order[:len(order) // 10], order[len(order) // 10:]
    weights = fit_linear(train[kept], train_labels[kept], classes, decays)
    accuracy = [top_k(train[held] @ weight[:-1] + weight[-1], train_labels[held], 1) for weight in weights]
    best = decays[max(range(len(decays)), key=accuracy.__getitem__)]  # of equals the strongest
    weight, = fit_linear(train, train_labels, classes, [best])
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
# The whole is the average of its parts (the paper's section 4.3)


def cosine_to_parts(whole, bag, labels, seed=0):
    """Mean cosine of whole-image embeddings and bags of patches: of the image itself, and of two others.

    whole, bag: (N, D) on the CPU, each centred here by its mean over the images. labels: (N,), of two
    classes or more. Returns {"same image", "same class", "other class"}: the two last are controls,
    for which one other image is drawn for each.
    """
    whole, bag = (F.normalize(x - x.mean(0)) for x in (whole, bag))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    grouped = order[labels[order].argsort(stable=True)]  # by class, at random within
    within = torch.empty_like(grouped)
    for members in grouped.split(torch.bincount(labels).tolist()):
        within[members] = members.roll(1)
    across = order.clone()
    for _ in range(64):  # draw anew where the class is one's own
        same = labels[across] == labels
        across[same] = torch.randint(len(labels), (int(same.sum()),), generator=generator)
    images = {"same image": bag, "same class": bag[within], "other class": bag[across]}
    return {name: (whole * other).sum(1).mean().item() for name, other in images.items()}


# --------------------------------------------------------------------------------------------------
# Locality at the patch, invariance at the image (the paper's section 4.4): h against z


@torch.no_grad()
def embed_patches(encoder, patches, block=512):
    """h and z, on the CPU, of patches (N, 3, s, s), uint8 or float in [0, 1]."""
    device = next(encoder.parameters()).device
    both = [encoder(bagssl.normalize(part.to(device)).contiguous(memory_format=torch.channels_last))
            for part in patches.split(block)]
    return [torch.cat(vectors).float().cpu() for vectors in zip(*both)]


def ridge_r2(train, train_targets, test, test_targets, strengths=(1e-3, 1e-2, 1e-1, 1.0)):
    """R^2, a target, of ridge regression: features (N, D), targets (N, T); (M, D), (M, T). Returns (T,).

    The strength, in units of the number of rows, is the best on a tenth of the training rows, a target.
    """
    train, test = standardise(train.double(), test.double())
    train_targets, test_targets = train_targets.double(), test_targets.double()
    cut = len(train) - len(train) // 10

    def r2(rows, test, test_targets, strength):
        x, y = train[:rows], train_targets[:rows]
        weight = torch.linalg.solve(x.T @ x + strength * rows * torch.eye(x.shape[1]), x.T @ (y - y.mean(0)))
        return 1 - (test_targets - y.mean(0) - test @ weight).square().mean(0) / test_targets.var(0, correction=0)

    held = torch.stack([r2(cut, train[cut:], train_targets[cut:], strength) for strength in strengths])
    final = torch.stack([r2(len(train), test, test_targets, strength) for strength in strengths])
    return final.gather(0, held.argmax(0, keepdim=True))[0]


def locality(encoder, images, labels, scale, size, seed=0):
    """What h and z know of one patch, and of a bag of 16 that were all changed alike: {name: {factor: value}}.

    images: uint8 (N, 3, S, S); half of them, at random, to fit, and half to test. Position, brightness, hue
    and saturation as R^2 of a ridge regression; the class as top-1 of a linear probe, over 100.
    """
    generator = torch.Generator().manual_seed(seed)
    count, extent = len(images), images.shape[-1]
    order = torch.randperm(count, generator=generator)  # folders come class by class
    images, labels = images[order], labels[order]
    neutral = {"flip": torch.zeros(count, 1, dtype=torch.bool), "gray": torch.zeros(count, 1, dtype=torch.bool),
               "solarize": torch.zeros(count, 1, dtype=torch.bool), "contrast": torch.ones(count, 1)}
    drawn = bagssl.draw_augment((count, 1), generator, jitter_prob=1.0)
    params = {name: drawn[name] for name in ("brightness", "hue", "saturation")} | neutral
    changes = torch.cat([params[name] for name in ("brightness", "hue", "saturation")], 1)
    single = bagssl.draw_crops(count, 1, extent, extent, scale, generator)
    grid = bagssl.grid_places(extent, extent, 4, scale)
    half, results = count // 2, {}
    for name, (top, left, side) in {"patch": single, "bag of 16": grid}.items():
        places = torch.cat([top, left], 1) if name == "patch" else torch.zeros(count, 0)
        per_patch = {key: value.expand(-1, top.shape[1]) for key, value in params.items()}
        patches = bagssl.cut_patches(images, top, left, side, size).float() / 255
        patches = bagssl.apply_augment(patches, per_patch).flatten(0, 1)
        for letter, vectors in zip("hz", embed_patches(encoder, patches)):
            vectors = vectors.unflatten(0, (count, -1)).mean(1)
            targets = torch.cat([places.float(), changes], 1)
            r2 = ridge_r2(vectors[:half], targets[:half], vectors[half:], targets[half:]).tolist()
            row = dict(zip(["top", "left"][:places.shape[1]] + ["brightness", "hue", "saturation"], r2))
            probe = linear_probe(vectors[:half], labels[:half], vectors[half:], labels[half:], seed)
            results[f"{name}, {letter}"] = row | {"class": probe["top1"] / 100}
    return results


def draw_neighbours(path, encoder, images, scale, size, queries=10, count=8, most=3000, seed=0):
    """Write a picture: rows of a patch, framed, and its nearest neighbours by cosine, in h, then in z.

    images: uint8 (N, 3, S, S), of which `most` are taken at random. Neighbours are sought over a 4 x 4 grid of
    patches of each other image, and shown one an image.
    """
    generator = torch.Generator().manual_seed(seed)
    images = images[torch.randperm(len(images), generator=generator)[:most]]
    patches = bagssl.grid_patches(images, 4, scale, size).flatten(0, 1)  # (16 N, 3, s, s)
    chosen = torch.randperm(len(patches), generator=generator)[:queries].tolist()
    rows = [[] for _ in chosen]

    def framed(patch, colour):
        return torch.stack([F.pad(channel, (1, 1, 1, 1), value=value) for channel, value in zip(patch, colour)])

    for vectors in embed_patches(encoder, patches):
        vectors = F.normalize(vectors - vectors.mean(0))
        for query, row in zip(chosen, rows):
            cosine, patch = (vectors @ vectors[query]).unflatten(0, (-1, 16)).max(1)  # the best of each image
            cosine[query // 16] = -1
            nearest = cosine.topk(count).indices
            row.append(framed(patches[query], (230, 0, 0)))
            row += [framed(found, (255, 255, 255)) for found in patches[16 * nearest + patch[nearest]]]
    grid = torchvision.utils.make_grid(torch.cat([torch.stack(row) for row in rows]), nrow=2 * (count + 1), padding=1,
                                       pad_value=255)
    zoom = max(1, 64 // patches.shape[-1])
    torchvision.utils.save_image(grid.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2) / 255, path)


# --------------------------------------------------------------------------------------------------
# Others' checkpoints

HEADS = ("fc.", "head.", "heads.", "projector.", "projection_head.", "predictor.", "prediction_head.", "classifier.",
         "online_classifier.")


def load_published(path, arch):
    """The backbone of a ResNet state dict as people publish it, with its stem stride: (module in eval mode, 1 or 4).

    The state dict may lie under "state_dict" or "model", and its keys under prefixes such as "module.",
    "backbone." or "encoder."; of several networks in it (a momentum encoder, say) the shortest prefix
    is taken. Heads are left aside. Raises UserError naming keys that are missing or unexpected.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch raises on a missing, damaged or foreign file
        raise UserError(f"{path} cannot be read ({type(error).__name__}); give a state dict saved by torch") from error
    while isinstance(state, dict) and (wrapper := {"state_dict", "model"} & state.keys()):
        state = state[wrapper.pop()]
    stems = [key for key, value in (state.items() if isinstance(state, dict) else ())
             if ("." + key).endswith(".conv1.weight") and value.shape[1:2] == (3,)]
    if not stems:
        raise UserError(f"{path} holds no ResNet: no key ends with conv1.weight and takes 3 channels")
    stem = min(stems, key=len)
    prefix = stem.removesuffix("conv1.weight")
    state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    state = {key: value for key, value in state.items() if not key.startswith(HEADS)}
    stride = 4 if state["conv1.weight"].shape[-1] == 7 else 1
    backbone = bagssl.make_backbone(arch, stride)
    ours = backbone.state_dict()
    wrong = {"missing": [key for key in ours.keys() - state.keys() if not key.endswith("num_batches_tracked")],
             "unexpected": state.keys() - ours.keys(),
             "of another shape": [key for key in ours.keys() & state.keys() if ours[key].shape != state[key].shape]}
    wrong = [f"{kind}: {', '.join(sorted(keys)[:5])}{' ...' * (len(keys) > 5)}" for kind, keys in wrong.items() if keys]
    if wrong:
        raise UserError(f"{path} is no {arch} under the prefix {prefix!r}; keys {'; '.join(wrong)}. Is --arch right?")
    backbone.load_state_dict(state, strict=False)  # old files lack num_batches_tracked
    return backbone.eval().to(memory_format=torch.channels_last), stride


# --------------------------------------------------------------------------------------------------
# Co-occurrence (the paper's section 3), where the truth is known: in the demo's world


def part_similarity(encoder, image_size, seed=0, count=400):
    """Correlation, over pairs of different part types, of their learned similarity with their true one.

    Learned: the inner product of the types' mean projections z, centred. True: log p(a, b) / (p(a) p(b)).
    """
    world = torch.from_numpy(bagssl.demo_world())  # p(part | class), (10, 24)
    joint, marginal = world.T @ world / len(world), world.mean(0)
    truth = (joint / (marginal[:, None] * marginal)).log()
    images, _, parts = bagssl.demo_images(count, image_size, (seed, 3))
    cells, parts = bagssl.DEMO_CELLS, torch.from_numpy(parts).flatten()
    patches = torch.from_numpy(images).unflatten(3, (cells, -1)).unflatten(2, (cells, -1))  # (N, 3, 5, s, 5, s)
    z = embed_patches(encoder, patches.permute(0, 2, 4, 1, 3, 5).flatten(0, 2))[1]
    means = torch.stack([z[parts == part].mean(0) for part in range(len(marginal))])
    means = means - means.mean(0)
    pairs = torch.triu(torch.ones(truth.shape), 1).bool()
    return torch.corrcoef(torch.stack([(means @ means.T)[pairs].double(), truth[pairs]]))[0, 1].item()


# --------------------------------------------------------------------------------------------------
# Command line


def parse_arguments():
    parser = bagssl.Parser(prog="eval_linear.py", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, help="checkpoint.pt of a run of bagssl.py; with --arch, any "
                                                            "state dict of a torchvision ResNet")
    parser.add_argument("--show", default="probe", choices=["probe", "parts", "locality"],
                        help="probe: accuracies; parts: the whole image against the mean of its patches; locality: "
                             "what h and z know of a patch, with a picture of neighbours")
    parser.add_argument("--patches", type=int, nargs="+", default=[1, 4, 16], help="sizes of the bags, square numbers")
    parser.add_argument("--patch-scale", type=float, help="area fraction of a patch; default: as trained, or the "
                                                          "middle of the trained range")
    parser.add_argument("--patch-size", type=int, help="side of the network's input; default: as trained")
    parser.add_argument("--image-size", type=int, help="side of the images; default: as trained")
    parser.add_argument("--arch", choices=["resnet18", "resnet34", "resnet50"],
                        help="the checkpoint is another project's: this network, with --data, --image-size and "
                             "--patch-scale")
    parser.add_argument("--data", help="folder with the images; default: as trained")
    parser.add_argument("--cache", help="folder for decoded images; default: as trained")
    parser.add_argument("--train-images", type=int, default=0, help="fit the probes on this many images, drawn at "
                                                                    "random; default: all")
    parser.add_argument("--test-images", type=int, default=0, help="and test on this many; default: all")
    parser.add_argument("--device", default="", help="default: cuda, else mps, else cpu")
    arguments = parser.parse_args()
    wrong = [n for n in arguments.patches if n < 1 or math.isqrt(n) ** 2 != n]
    if wrong:
        raise UserError(f"a bag is a square grid of patches: --patches takes 1, 4, 9, 16, ..., not {wrong[0]}")
    if arguments.patch_scale is not None and not 0 < arguments.patch_scale <= 1:
        raise UserError(f"--patch-scale is a fraction of the area, in (0, 1], not {arguments.patch_scale:g}")
    for name in ("train_images", "test_images", "patch_size", "image_size"):
        if (getattr(arguments, name) or 0) < 0:
            raise UserError(f"--{name.replace('_', '-')} cannot be negative, as {getattr(arguments, name)} is")
    needed = [f"--{name.replace('_', '-')}" for name in ("data", "image_size", "patch_scale")
              if getattr(arguments, name) is None]
    if arguments.arch and needed:
        raise UserError(f"a checkpoint of another project does not say how it was trained: give {', '.join(needed)}")
    return arguments


def load_model(arguments):
    """(trained, untrained, config): networks whose `backbone` is probed, on the CPU, and what they were trained on."""
    if arguments.arch:
        trained = torch.nn.Module()
        trained.backbone, stride = load_published(arguments.checkpoint, arguments.arch)
        config = bagssl.Config(dataset="any", arch=arguments.arch, stem_stride=stride, projector=(1, 1, 1))
    else:
        trained, config = bagssl.load_encoder(arguments.checkpoint)
    for name in ("data", "cache", "image_size", "patch_size"):
        if getattr(arguments, name) is not None:
            setattr(config, name, getattr(arguments, name))
    torch.manual_seed(config.seed)
    untrained = Encoder(config.arch, config.stem_stride, config.projector).eval()
    return trained, untrained.to(memory_format=torch.channels_last), config


def show_probe(rows, sets, labels, device, world):
    """Print the table of accuracies, in per cent of the test images, and return its rows."""
    features = zip(*[embed(rows.values(), images, device, world, name) for name, images in sets.items()])
    results, labels = [], {name: its_labels.to(device) for name, its_labels in labels.items()}
    for name, (train, test) in zip(rows, features):
        if world.rank == 0:  # the features are small: the probes run on one process
            train, test = train.to(device), test.to(device)
            found = {"features": name, **linear_probe(train, labels["train"], test, labels["test"]),
                     "knn": knn_probe(train, labels["train"], test, labels["test"])}
            top5 = (f"  {'top-5':>5}", f"  {found['top5']:5.2f}") if "top5" in found else ("", "")
            if not results:
                print(f"\n{'% of test images right':24}  linear top-1{top5[0]}    kNN", flush=True)
            print(f"{name:24}  {found['top1']:12.2f}{top5[1]}  {found['knn']:5.2f}", flush=True)
            results.append(found)
    return results


def show_parts(rows, sets, labels, device, world):
    """Print the table of cosines between the whole test image and bags of its and of others' patches, and return it."""
    features = dict(zip(rows, embed(rows.values(), sets["test"], device, world, "test")))
    results = []
    for name in features if world.rank == 0 else ():
        whole = "untrained, " * name.startswith("untrained") + "whole image, one pass"
        if name != whole:
            results.append({"features": name, **cosine_to_parts(features[whole], features[name], labels["test"])})
            if len(results) == 1:
                print(f"\n{'cosine to the whole image':33}  same image  same class  other class")
            print(f"{name:33}  " + "  ".join(f"{cosine:{len(of)}.3f}" for of, cosine in list(results[-1].items())[1:]))
    return results


def show_locality(encoder, images, labels, scale, size, picture, world):
    """Print what h and z know of a patch, return it, and draw its neighbours in both. On one process."""
    if world.rank != 0:
        return None
    if not hasattr(encoder, "projector"):
        raise UserError("locality compares h with the projection z, which this checkpoint lacks; give one of bagssl.py")
    results = locality(encoder, images, labels, scale, size)
    factors = list(next(iter(results.values())))
    print("\n" + " " * 14 + "".join(f"{factor:>12}" for factor in factors))
    for name, values in results.items():
        print(f"{name:14}" + "".join(f"{values[factor]:12.3f}" if factor in values else " " * 12 for factor in factors))
    draw_neighbours(picture, encoder, images, scale, size)
    print(f"\nR^2 of a ridge regression on held-out images; class: top-1 of a linear probe, over 100\n"
          f"nearest neighbours drawn in {picture}")
    return results


def make_rows(trained, untrained, sides, scale, size, whole_size, parts):
    """The embedders to compare: {name: module, (B, 3, H, W) -> (B, D)}; the untrained network is the control."""
    rows, control = {}, min(sides, key=lambda side: abs(side - 4))  # one control is enough: the bag nearest 16
    for prefix, network in (("", trained), ("untrained, ", untrained)):
        for side in sides if parts or network is trained else [control]:
            name = f"bag of {side * side}" if side > 1 else "one patch, the centre"
            rows[prefix + name] = BagOfPatches(network.backbone, side, scale, size)
        if parts or network is trained:
            rows[prefix + "whole image, one pass"] = BagOfPatches(network.backbone, 1, 1.0, whole_size)
    return rows if parts else rows | {"raw pixels": Pixels()}


def main():
    arguments, world = parse_arguments(), World()
    trained, untrained, config = load_model(arguments)
    device = bagssl.pick_device(config.device if not arguments.device else arguments.device, world.local_rank)
    bagssl.join(world, device)

    # A fixed-scale network sees the whole image at the magnification of its patches, others at their input size.
    low, high = config.patch_scale[0], config.patch_scale[-1]
    scale, size = arguments.patch_scale or (low + high) / 2, config.patch_size or None
    native, whole_size = bagssl.patch_side(config.image_size, config.image_size, scale), size
    if size and low == high and not arguments.arch:
        whole_size = round(config.image_size * size / native)

    sets, labels = {}, {}
    for split, limit in (("train", arguments.train_images), ("test", arguments.test_images)):
        sets[split], labels[split] = bagssl.leader_first(
            lambda: bagssl.load_images(config.dataset, config.data, split, config.image_size, config.cache, config.seed,
                                       min_side=native, quiet=world.rank != 0), world.local_rank == 0, world)
        if limit:
            chosen = torch.randperm(len(sets[split]), generator=torch.Generator().manual_seed(0))[:limit]
            sets[split], labels[split] = sets[split][chosen], labels[split][chosen]
    if world.rank == 0:
        print(f"{arguments.checkpoint}: {len(sets['train']):,} train and {len(sets['test']):,} test images, "
              f"patches of {native} x {native} pixels", flush=True)

    folder, show = Path(arguments.checkpoint).parent, arguments.show
    trained, untrained = trained.to(device), untrained.to(device)
    if show == "locality":
        results = show_locality(trained, sets["test"], labels["test"], scale, size, folder / "neighbours.png", world)
    else:
        sides = sorted({math.isqrt(n) for n in arguments.patches})
        rows = make_rows(trained, untrained, sides, scale, size, whole_size, parts=show == "parts")
        results = (show_probe if show == "probe" else show_parts)(rows, sets, labels, device, world)
    if world.rank != 0:
        return
    table = {"show": show, "checkpoint": str(arguments.checkpoint), "torch": torch.__version__, "patch_scale": scale,
             "patch_size": size, **{f"{name}_images": len(images) for name, images in sets.items()}, "results": results}
    if show == "probe" and config.dataset == "demo" and not config.data:
        similarity = {name: part_similarity(network, config.image_size, config.seed)
                      for name, network in (("trained", trained), ("untrained", untrained))}
        table["part_similarity"] = similarity
        print("\ncorrelation of part types' similarity in z with their true co-occurrence: "
              + ", ".join(f"{name} {value:.2f}" for name, value in similarity.items()))
    path = folder / "eval.jsonl"  # a line for each evaluation: none replaces another
    earlier = path.read_bytes() if path.exists() else b""
    bagssl.save_atomically(path, earlier + json.dumps(table).encode() + b"\n")
    print(f"added to {path}")


if __name__ == "__main__":
    bagssl.run(main)
