# SPDX-License-Identifier: MIT
"""Check three of the paper's claims on a trained network, and show which patches decide.

    python .github/claims.py parts --checkpoint RUN/checkpoint.pt --patches 1 4 16 64
    python .github/claims.py locality --checkpoint RUN/checkpoint.pt --test-images 3000
    python .github/claims.py cooccurrence --checkpoint runs/demo/checkpoint.pt
    python .github/claims.py votes --checkpoint RUN/checkpoint.pt --test-images 1000

parts: is the embedding of a whole image close to the mean embedding of its patches? locality: what do the
embedding h and the projection z know about a patch? (draws RUN/neighbours.png) cooccurrence: are gratings that occur
together close in z? votes: which patches of a bag decide? (draws RUN/votes.png) Each adds its rows to RUN/eval.jsonl.
parts uses --patches, and votes its largest; only votes uses training images.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision

sys.path.insert(0, str(Path(__file__).parents[1]))
import bagssl
import eval_linear
import pictures
from bagssl import BagOfPatches, UserError

# ---- The whole is the average of its parts (the paper's section 4.3) -------------------------------------------------


def cosine_to_parts(whole, bag, labels):
    """Mean cosine between whole-image embeddings and bags of the same image, of its class, and of other classes.

    whole, bag: (N, D) on the CPU, each centred here by its mean over the images. labels: int64 (N,).
    Returns {"same image", "same class", "other class"}. The last two are controls: each whole image is compared
    with the bags of all others of its class, and of all other classes. An image that is alone in its class is
    left out of "same class". Raises UserError unless there are two classes, and two images in one of them.
    """
    sizes = torch.bincount(labels)
    if sizes.max() < 2 or (sizes > 0).sum() < 2:
        raise UserError(f"parts compares images within and across classes: it needs two classes, one of them with two "
                        f"images, but these {len(labels)} are of {(sizes > 0).sum()}; give more --test-images")
    whole, bag = (F.normalize(x - x.mean(0)) for x in (whole, bag))
    size = sizes[labels]  # (N,), of each image's class
    own = (whole * bag).sum(1)
    of_class = (whole * torch.zeros(len(sizes), bag.shape[1]).index_add(0, labels, bag)[labels]).sum(1)  # own included
    return {"same image": own.mean().item(),
            "same class": ((of_class - own) / (size - 1))[size > 1].mean().item(),
            "other class": ((whole @ bag.sum(0) - of_class) / (len(labels) - size)).mean().item()}


def show_parts(arguments, trained, untrained, config, whole_size):
    """Print the cosines for bags of all sizes, of the trained and of the untrained network."""
    scale, size = config.patch_scale[0], config.patch_size or None
    images, labels = eval_linear.load_split(config, arguments, "test")
    results = []

    def embed(network, per_side, scale, size, name):
        bag = BagOfPatches(network.backbone, per_side, scale, size)
        return eval_linear.embed(bag, images, next(network.parameters()).device, name)

    for prefix, network in (("", trained), ("untrained, ", untrained)):
        whole = embed(network, 1, 1.0, whole_size, f"{prefix}whole image, one pass")
        for per_side in sorted({math.isqrt(n) for n in arguments.patches}):
            name = prefix + (f"bag of {per_side ** 2}" if per_side > 1 else "one patch, the centre")
            bag = embed(network, per_side, scale, size, name)
            results.append({"features": name, **cosine_to_parts(whole, bag, labels)})
    print(f"\n{'cosine to the whole image':33}  same image  same class  other class")
    for row in results:
        print("{features:33}  {same image:10.3f}  {same class:10.3f}  {other class:11.3f}".format(**row))
    return results


# ---- Locality in the patch, invariance in the image (the paper's section 4.4) ----------------------------------------
# A patch is cut and coloured by eleven uniform random numbers (see bagssl.py). Five are predicted linearly, from h and
# from z.

FACTORS = {"top": 0, "left": 1, "brightness": 5, "hue": 8, "saturation": 7}  # their places among the eleven


@torch.no_grad()
def embed_patches(encoder, patches, block=512):
    """h (N, D) and z (N, D'), on the CPU, of patches (N, 3, s, s), uint8 or float in [0, 1]."""
    device = next(encoder.parameters()).device
    both = [encoder(bagssl.normalize(some.to(device)).contiguous(memory_format=torch.channels_last))
            for some in patches.split(block)]
    return [torch.cat(vectors).float().cpu() for vectors in zip(*both)]


def ridge_r2(train, train_targets, test, test_targets, strengths=(1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)):
    """R^2 of a ridge regression for each target: features (N, D) and (M, D), targets (N, T) and (M, T). Returns (T,).

    Each target gets the strength with the least leave-one-out error, which has a closed form; strengths are multiplied
    by N. At the largest ones the prediction is nearly the mean, so useless features do no harm.
    """
    mean, std = train.double().mean(0), train.double().std(0).clamp(min=1e-6)
    train, test = ((x.double() - mean) / std for x in (train, test))
    constant = train_targets.double().mean(0)
    targets, test_targets = train_targets - constant, test_targets - constant
    u, s, axes = torch.linalg.svd(train, full_matrices=False)
    projected, errors, r2 = u.T @ targets, [], []
    for strength in strengths:
        shrink = (s.square() / (s.square() + strength * len(train)))[:, None]
        leverage = 1 / len(train) + u.square() @ shrink  # (N, 1)
        errors.append(((targets - u @ (shrink * projected)) / (1 - leverage)).square().mean(0))
        weight = axes.T @ (shrink / s[:, None].clamp(min=1e-9) * projected)
        r2.append(1 - (test_targets - test @ weight).square().mean(0) / test_targets.var(0, correction=0))
    return torch.stack(r2).gather(0, torch.stack(errors).argmin(0, keepdim=True))[0]


def locality(encoder, images, labels, scale, size, seed=0):
    """What h and z know about a patch, and about a bag of 16, its colours changed in one way: {name: {factor: value}}.

    images: uint8 (N, 3, S, S); a random half of them to fit, the other half to test. Position, brightness,
    hue and saturation: R^2 of a ridge regression. Class: accuracy of a linear probe, in [0, 1].
    """
    count, generator = len(images), torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator)  # folders come class by class
    labels, half, results = labels[order], count // 2, {}
    u = torch.rand(count, 1, 11, generator=generator)
    u[..., 3] = 0.5  # no flip: only the factors vary
    cuts = {"patch": lambda some, its_u: bagssl.crop_patches(some, its_u[..., :3], scale, size),
            "bag of 16": lambda some, its_u: bagssl.grid_patches(some, 4, scale, size)}
    for name, cut in cuts.items():
        vectors = []
        for rows, its_u in zip(order.split(256), u.split(256)):
            patches = cut(images[rows], its_u)  # (n, V, 3, s, s)
            patches = bagssl.augment(patches / 255, its_u[..., 3:].expand(-1, patches.shape[1], -1), contrast=0.0,
                                     jitter_prob=1.0, gray_prob=0.0, solarize_prob=0.0)
            vectors.append([x.unflatten(0, (len(rows), -1)).mean(1)
                            for x in embed_patches(encoder, patches.flatten(0, 1))])
        factors = list(FACTORS) if name == "patch" else list(FACTORS)[2:]  # the grid's positions are fixed
        targets = u[:, 0, [FACTORS[factor] for factor in factors]]
        h, z = (torch.cat(blocks) for blocks in zip(*vectors))
        for letter, x in ("h", h), ("z", z):
            r2 = ridge_r2(x[:half], targets[:half], x[half:], targets[half:])
            probe = eval_linear.linear_probe(x[:half], labels[:half], x[half:], labels[half:], seed)
            results[f"{name}, {letter}"] = dict(zip(factors, r2.tolist())) | {"class": probe["top1"] / 100}
    return results


def draw_neighbours(path, encoder, images, scale, size, queries=10, count=8, most=3000, seed=0):
    """Write a picture: in each row a patch, framed, and its nearest neighbours by cosine; on the left in h, then in z.

    images: uint8 (N, 3, S, S), at most `most` of which are taken, at random. Neighbours are sought among a 4 x 4 grid
    of patches of each of the other images; of each image at most the nearest patch is shown.
    """
    generator = torch.Generator().manual_seed(seed)
    images = images[torch.randperm(len(images), generator=generator)[:most]]
    patches = torch.cat([bagssl.grid_patches(some, 4, scale, size) for some in images.split(256)]).flatten(0, 1)
    chosen = torch.randperm(len(patches), generator=generator)[:queries].tolist()
    halves = []
    for vectors in embed_patches(encoder, patches):
        vectors, cells = F.normalize(vectors - vectors.mean(0)), []
        for query in chosen:
            cosine, patch = (vectors @ vectors[query]).unflatten(0, (-1, 16)).max(1)  # (N,), the best of each image
            cosine[query // 16] = -1  # not its own image
            nearest = cosine.topk(count).indices
            cells.append(torch.stack([F.pad(channel, (1, 1, 1, 1), value=value)
                                      for channel, value in zip(patches[query], (230, 0, 0))]))
            cells += F.pad(patches[16 * nearest + patch[nearest]], (1, 1, 1, 1), value=255)
        halves.append(torchvision.utils.make_grid(cells, count + 1, 1, pad_value=255))
    labels = "patches (framed) and their nearest by the embedding h", "the same, nearest by the projection z"
    pictures.draw(path, [[*zip(labels, halves)]], height=halves[0].shape[1] * max(1, 64 // patches.shape[-1]), text=18)


def show_locality(arguments, trained, untrained, config, _):
    """Print what h and z know about a patch, and draw its neighbours in both."""
    scale, size = config.patch_scale[0], config.patch_size or None
    images, labels = eval_linear.load_split(config, arguments, "test")
    if len(images) < 20:
        raise UserError(f"locality fits regressions, for which {len(images)} images are too few; give 20 or more")
    factors = [*FACTORS, "class"]
    results = locality(trained, images, labels, scale, size)
    control = locality(untrained, images, labels, scale, size)
    results |= {f"untrained, {name}": values for name, values in control.items()}
    print("\n" + " " * 23 + "".join(f"{factor:>11}" for factor in factors))
    for name, values in results.items():
        print(f"{name:23}" + "".join(f"{values[factor]:11.3f}" if factor in values else " " * 11 for factor in factors))
    picture = Path(arguments.checkpoint).with_name("neighbours.png")
    draw_neighbours(picture, trained, images, scale, size)
    print(f"R^2 of a ridge regression on held-out images; class: accuracy of a linear probe\n"
          f"nearest neighbours drawn in {picture}")
    return [{"features": name, **values} for name, values in results.items()]


# ---- Inner products in z show what occurs together (the paper's section 3) -------------------------------------------
# Checked in the demo, where the truth is known.


def grating_similarity(encoder, image_size, size=None, count=400):
    """Correlation, over pairs of different gratings, of their learned similarity with the true one.

    Learned: the inner product of the gratings' centred mean projections z. True: the density ratio that the paper's
    L_C fits, p(a, b) / (p(a) p(b)). Taken from the cells of `count` new images, resized to `size` if given.
    """
    world = bagssl.demo_probabilities()  # p(grating | class), (10, 24)
    joint, marginal = world.T @ world / len(world), world.mean(0)
    truth = joint / (marginal[:, None] * marginal)
    images, _, gratings = bagssl.demo_images(count, image_size, seed=2)  # the splits have seeds 0 and 1
    _, z = embed_patches(encoder, bagssl.grid_patches(images, 5, 0.04, size).flatten(0, 1))
    means = torch.stack([z[gratings.flatten() == grating].mean(0) for grating in range(24)])
    means = means - means.mean(0)
    pairs = torch.ones_like(truth, dtype=torch.bool).triu(1)
    return torch.corrcoef(torch.stack([(means @ means.T)[pairs], truth[pairs]]))[0, 1].item()


def show_cooccurrence(arguments, trained, untrained, config, _):
    """Print the correlation of learned and true similarity in the trained and in the untrained network."""
    if config.data != "demo":
        raise UserError("the true co-occurrence is known only in the demo; give a checkpoint of --preset demo")
    results = {name: grating_similarity(network, config.image_size, config.patch_size or None)
               for name, network in (("trained", trained), ("untrained", untrained))}
    print("correlation of gratings' similarity in z with their true co-occurrence: "
          + ", ".join(f"{name} {value:.2f}" for name, value in results.items()))
    return [{"features": name, "correlation": value} for name, value in results.items()]


# ---- Votes -----------------------------------------------------------------------------------------------------------
# A linear probe of a mean is the mean of a linear probe: w.mean(h) + b = mean(w.h + b). So a bag's scores are the mean
# of its patches' scores, and each patch has a vote.


@torch.no_grad()
def votes_of(encoder, probe, images, scale, size, per_side=17):
    """Votes of a dense grid of patches (N, V, classes), and the probe's scores of the bag (N, classes).

    images: uint8 (N, 3, S, S). probe: (D + 1, classes), as from `eval_linear.fit_probe`. A patch's votes are its scores
    less their mean over the classes, which changes no decision; the bag's scores are given likewise. The bag goes
    through the network once more, by `BagOfPatches`: a check. Votes take memory: N V classes floats.
    """
    probe = probe - probe.mean(1, keepdim=True)
    bag, votes, scores = BagOfPatches(encoder.backbone, per_side, scale, size), [], []
    for image in images.split(1):
        image = image.to(probe.device)
        patches = bagssl.normalize(bagssl.grid_patches(image, per_side, scale, size)[0])
        with bagssl.autocast(probe.device):
            h, mean = encoder.backbone(patches.contiguous(memory_format=torch.channels_last)), bag(image)
        votes.append((h.float() @ probe[:-1] + probe[-1]).cpu())
        scores.append((mean @ probe[:-1] + probe[-1]).cpu())
    return torch.stack(votes), torch.cat(scores)


def split_by_agreement(votes):
    """Scores (N, classes) of two halves of each image's patches: those that vote most, and least, for the decision."""
    decision = votes.mean(1).argmax(1)
    order = votes[torch.arange(len(votes)), :, decision].argsort(1, descending=True)  # (N, V)
    ranked = votes.gather(1, order[..., None].expand_as(votes))
    most, least = ranked.tensor_split(2, 1)
    return most.mean(1), least.mean(1)


def colour(votes, most):
    """A map of votes (H, W) as uint8 (3, H, W): positive red, negative blue, 0 white; full colour at +-most."""
    share = (votes / most).clamp(-1, 1)
    red, blue = 1 + share.clamp(max=0), 1 - share.clamp(min=0)
    return (255 * torch.stack([red, torch.minimum(red, blue), blue])).to(torch.uint8)


def apart(votes, per_side, count=6):
    """Indices of `count` strong votes of (per_side^2,), a quarter of the grid apart: by turns the strongest left."""
    y, x = torch.meshgrid(torch.arange(per_side), torch.arange(per_side), indexing="ij")
    remaining, found = votes.view(per_side, per_side).clone(), []
    for _ in range(count):
        found.append(remaining.argmax().item())
        row, column = divmod(found[-1], per_side)
        remaining[torch.maximum((y - row).abs(), (x - column).abs()) < per_side / 4] = -math.inf
    return found


def draw_votes(path, images, labels, votes, names, scale, size, count=2, seed=0):
    """Write a picture of `count` images that were classified correctly and as many that were not, chosen at random.

    A row: the image; a map of the votes for the class decided for; one for the true class or, if that was the decision,
    the second best; their difference; and six patches that vote strongly for the decision.
    """
    generator = torch.Generator().manual_seed(seed)
    best, second = votes.mean(1).topk(2, dim=1).indices.T
    per_side, rows = math.isqrt(votes.shape[1]), []
    for right in (True, False):
        among = torch.nonzero((best == labels) == right).flatten()
        for i in among[torch.randperm(len(among), generator=generator)[:count]].tolist():
            decision, other = best[i].item(), (second[i] if right else labels[i]).item()
            pair = votes[i][:, [decision, other]].T.unflatten(1, (per_side, per_side))
            maps = [colour(part, pair.abs().max()) for part in (*pair, pair[0] - pair[1])]
            patches = bagssl.grid_patches(images[i:i + 1], per_side, scale, size)[0]
            strongest = patches[apart(votes[i, :, decision], per_side)]
            strongest = torchvision.utils.make_grid(strongest, 3, 1, pad_value=255)
            rows.append([(f"{names[labels[i]]}, {'correct' if right else 'wrong'}", images[i]),
                         (f"for {names[decision]}", maps[0]), (f"for {names[other]}", maps[1]),
                         ("difference", maps[2]), (f"strong votes for {names[decision]}", strongest)])
    pictures.draw(path, rows)


def show_votes(arguments, trained, untrained, config, _):
    """Print how many patches agree with their bag's decision, and draw the votes of some images."""
    scale, size = config.patch_scale[0], config.patch_size or None
    device, per_side = next(trained.parameters()).device, math.isqrt(max(arguments.patches))
    train, labels = eval_linear.load_split(config, arguments, "train")
    bag = BagOfPatches(trained.backbone, per_side, scale, size)
    features = eval_linear.embed(bag, train, device, f"bag of {per_side ** 2}, train").to(device)
    probe, _ = eval_linear.fit_probe(features, labels.to(device))
    images, labels = eval_linear.load_split(config, arguments, "test")
    if not max(2, labels.max() + 1) <= probe.shape[1]:
        raise UserError("votes needs two classes or more, all of them among the training images")
    votes, scores = votes_of(trained, probe, images, scale, size)
    decision, halves = scores.argmax(1), split_by_agreement(votes)
    agreeing = (votes.argmax(2) == decision[:, None]).float().mean(1)
    row = {"features": f"votes of {votes.shape[1]} patches", "top1": eval_linear.top_k(scores, labels, 1),
           "difference": (votes.mean(1) - scores).abs().max().item(), "agreeing": 100 * agreeing.median().item(),
           "top1 of the half that agrees most": eval_linear.top_k(halves[0], labels, 1),
           "top1 of the half that agrees least": eval_linear.top_k(halves[1], labels, 1)}
    folder, picture = Path(config.data, "train"), Path(arguments.checkpoint).with_name("votes.png")
    names = sorted(path.name for path in folder.glob("[!.]*") if path.is_dir()) or [f"class {i}" for i in range(1000)]
    draw_votes(picture, images, labels, votes, names, scale, size)
    print(f"{len(images):,} images, a grid of {votes.shape[1]} patches each; probe fitted to bags of {per_side ** 2}\n"
          f"largest difference between the mean of the votes and the probe's scores: {row['difference']:.1e}\n"
          f"patches whose own vote is the bag's decision: {row['agreeing']:.0f} % (median over the images)\n"
          f"accuracy, in %: all patches {row['top1']:.1f}, the half that agrees most with the decision "
          f"{row['top1 of the half that agrees most']:.1f}, the half that agrees least "
          f"{row['top1 of the half that agrees least']:.1f}\nvotes drawn in {picture}")
    return [row]


# ---- Command line ----------------------------------------------------------------------------------------------------

CLAIMS = {"parts": show_parts, "locality": show_locality, "cooccurrence": show_cooccurrence, "votes": show_votes}


def main():
    parser = argparse.ArgumentParser(prog="claims.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claim", choices=CLAIMS)
    arguments = eval_linear.parse_arguments(parser)
    trained, untrained, config, whole_size, setting = eval_linear.load_model(arguments)
    if arguments.arch and arguments.claim in ("locality", "cooccurrence"):
        raise UserError(f"{arguments.claim} needs the projection z, which this checkpoint lacks; give one saved by "
                        f"bagssl.py")
    device = bagssl.start_process(arguments.device)
    torch.set_float32_matmul_precision("highest")  # as in eval_linear.py
    setting |= {"show": arguments.claim, "test_images": arguments.test_images or "all"}
    for row in CLAIMS[arguments.claim](arguments, trained.to(device), untrained.to(device), config, whole_size):
        eval_linear.save_row(arguments, **setting, **row)


if __name__ == "__main__":
    bagssl.run_cli(main)
