# SPDX-License-Identifier: MIT
"""Evidence for three of the paper's claims, from the checkpoint of a run.

    python .github/claims.py parts --checkpoint RUN/checkpoint.pt --patches 1 4 16 64
    python .github/claims.py locality --checkpoint RUN/checkpoint.pt --test-images 3000
    python .github/claims.py cooccurrence --checkpoint runs/demo/checkpoint.pt

parts: is the embedding of a whole image close to the mean embedding of its patches? locality: what do
h and z know of a patch? This also draws RUN/neighbours.png. cooccurrence: are parts that occur together
close in z? Each adds a line to RUN/eval.jsonl. It runs in one process, and uses no training images.
"""

import dataclasses
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision

sys.path.insert(0, str(Path(__file__).parents[1]))
import bagssl
import eval_linear
from bagssl import BagOfPatches, UserError

# --------------------------------------------------------------------------------------------------
# The whole is the average of its parts (the paper's section 4.3)


def cosine_to_parts(whole, bag, labels, seed=0):
    """Mean cosine between whole-image embeddings and bags of patches: of the same image, and of two controls.

    whole, bag: (N, D) on the CPU, each centred here by its mean over the images. labels: int64 (N,).
    Returns {"same image", "same class", "other class"}. For each control, every image is paired with
    another one, of its own class or drawn at random from the other classes. An image that is alone in
    its class has no pair in "same class" and is left out of that mean. Raises UserError unless there
    are two classes, and two images in one of them.
    """
    count, generator = len(labels), torch.Generator().manual_seed(seed)
    sizes = torch.bincount(labels)
    if sizes.max() < 2 or (sizes > 0).sum() < 2:
        raise UserError(f"comparing within and across classes takes two classes, and two images in one of them; these "
                        f"{count} images are of {(sizes > 0).sum()} class(es): give more --test-images")
    order = torch.randperm(count, generator=generator)
    order = order[labels[order].argsort(stable=True)]  # class by class, in random order within each
    whole, bag = (F.normalize(x - x.mean(0))[order] for x in (whole, bag))
    size, end = (x[labels[order]] for x in (sizes, sizes.cumsum(0)))  # (N,), of each image's class
    row = torch.arange(count)
    within = torch.where(row + 1 < end, row + 1, end - size)  # the next of the class; for the last, the first
    across = (end + (torch.rand(count, generator=generator) * (count - size)).long()) % count
    cosine = {"same image": whole * bag, "same class": (whole * bag[within])[size > 1],
              "other class": whole * bag[across]}
    return {name: products.sum(1).mean().item() for name, products in cosine.items()}


def show_parts(arguments, trained, untrained, config):
    """Print the cosines for bags of all sizes, of the trained and of the untrained network."""
    scale, size, whole_size = eval_linear.view_sizes(config, arguments)
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
    return dict(patch_scale=scale, patch_size=size, test_images=len(images), results=results)


# --------------------------------------------------------------------------------------------------
# Locality in the patch, invariance in the image (the paper's section 4.4)
#
# A patch is cut and coloured by eleven uniform random numbers (see bagssl.py). Five of them are
# predicted from h and from z: what a vector does not tell, the network has become invariant to.

FACTORS = {"top": 0, "left": 1, "brightness": 5, "hue": 8, "saturation": 7}  # their places among the eleven


@torch.no_grad()
def embed_patches(encoder, patches, block=512):
    """h (N, D) and z (N, D'), on the CPU, of patches (N, 3, s, s), uint8 or float in [0, 1]."""
    device = next(encoder.parameters()).device
    both = [encoder(bagssl.normalize(some.to(device)).contiguous(memory_format=torch.channels_last))
            for some in patches.split(block)]
    return [torch.cat(vectors).float().cpu() for vectors in zip(*both)]


def ridge_r2(train, train_targets, test, test_targets, strengths=(1e-3, 1e-2, 1e-1, 1.0)):
    """R^2 of a ridge regression for each target: features (N, D) and (M, D), targets (N, T) and (M, T). Returns (T,).

    Each target has its own strength, in units of the number of rows: the best on the last tenth of the training rows.
    """
    mean, std = train.double().mean(0), train.double().std(0).clamp(min=1e-6)
    train, test = ((x.double() - mean) / std for x in (train, test))
    train_targets, test_targets = train_targets.double(), test_targets.double()
    kept = len(train) - len(train) // 10

    def r2(rows, test, test_targets, strength):  # fitted to the first `rows`
        x, y = train[:rows], train_targets[:rows]
        weight = torch.linalg.solve(x.T @ x + strength * rows * torch.eye(x.shape[1]), x.T @ (y - y.mean(0)))
        return 1 - (test_targets - y.mean(0) - test @ weight).square().mean(0) / test_targets.var(0, correction=0)

    held = torch.stack([r2(kept, train[kept:], train_targets[kept:], strength) for strength in strengths])
    final = torch.stack([r2(len(train), test, test_targets, strength) for strength in strengths])
    return final.gather(0, held.argmax(0, keepdim=True))[0]


def locality(encoder, images, labels, scale, size, seed=0):
    """What h and z know of one patch, and of a bag of 16 patches all changed alike: {name: {factor: value}}.

    images: uint8 (N, 3, S, S); a random half of them to fit, the other half to test. Position, brightness,
    hue and saturation: R^2 of a ridge regression. Class: accuracy of a linear probe, in [0, 1].
    """
    count, generator = len(images), torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator)  # folders come class by class
    labels, half, results = labels[order], count // 2, {}
    u = torch.rand(count, 1, 11, generator=generator)
    u[..., 3] = 0.5  # no flip: only the factors vary
    cuts = {"patch": lambda images, u: bagssl.crop_patches(images, u[..., :3], scale, size),
            "bag of 16": lambda images, u: bagssl.grid_patches(images, 4, scale, size)}
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
        for letter, x in zip("hz", map(torch.cat, zip(*vectors))):
            r2 = ridge_r2(x[:half], targets[:half], x[half:], targets[half:])
            probe = eval_linear.linear_probe(x[:half], labels[:half], x[half:], labels[half:], seed)
            results[f"{name}, {letter}"] = dict(zip(factors, r2.tolist())) | {"class": probe["top1"] / 100}
    return results


def draw_neighbours(path, encoder, images, scale, size, queries=10, count=8, most=3000, seed=0):
    """Write a picture: in each row a patch, framed, and its nearest neighbours by cosine in h, then the same in z.

    images: uint8 (N, 3, S, S), of which `most` are taken at random. Neighbours are sought among a 4 x 4 grid of
    patches of each of the other images; of each image at most the nearest patch is shown.
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
            cosine, patch = (vectors @ vectors[query]).unflatten(0, (-1, 16)).max(1)  # (N,), the best of each image
            cosine[query // 16] = -1
            nearest = cosine.topk(count).indices
            row.append(framed(patches[query], (230, 0, 0)))
            row += [framed(found, (255, 255, 255)) for found in patches[16 * nearest + patch[nearest]]]
    grid = torchvision.utils.make_grid(torch.cat([torch.stack(row) for row in rows]), nrow=2 * (count + 1), padding=1,
                                       pad_value=255)
    zoom = max(1, 64 // patches.shape[-1])
    torchvision.utils.save_image(grid.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2) / 255, path)


def show_locality(arguments, trained, untrained, config):
    """Print what h and z know of a patch, and draw its neighbours in both."""
    if arguments.arch:
        raise UserError("locality compares h with the projection z, which this checkpoint lacks; give one of bagssl.py")
    scale, size, _ = eval_linear.view_sizes(config, arguments)
    images, labels = eval_linear.load_split(config, arguments, "test")
    if len(images) < 20:
        raise UserError(f"locality fits regressions, for which {len(images)} images are too few; give 20 or more")
    results, factors = locality(trained, images, labels, scale, size), [*FACTORS, "class"]
    print("\n" + " " * 14 + "".join(f"{factor:>12}" for factor in factors))
    for name, values in results.items():
        print(f"{name:14}" + "".join(f"{values[factor]:12.3f}" if factor in values else " " * 12 for factor in factors))
    picture = Path(arguments.checkpoint).parent / "neighbours.png"
    draw_neighbours(picture, trained, images, scale, size)
    print(f"R^2 of a ridge regression on held-out images; class: accuracy of a linear probe\n"
          f"nearest neighbours drawn in {picture}")
    return dict(patch_scale=scale, patch_size=size, test_images=len(images), results=results)


# --------------------------------------------------------------------------------------------------
# Inner products in z tell what occurs together (the paper's section 3), where the truth is known: in
# the demo


def part_similarity(encoder, image_size, seed=0, count=400, size=None):
    """Correlation, over pairs of different types of part, of their learned similarity with the true one.

    Learned: the inner product of the types' mean projections z, centred. True: log p(a, b) / (p(a) p(b)).
    The parts are the cells of `count` images of their own, resized to `size` if given.
    """
    world = torch.from_numpy(bagssl.demo_probabilities())  # p(part | class), (10, 24)
    joint, marginal = world.T @ world / len(world), world.mean(0)
    truth = (joint / (marginal[:, None] * marginal)).log()
    images, _, parts = bagssl.demo_images(count, image_size, (seed, len(bagssl.DEMO_COUNTS)))  # splits come before
    cells = bagssl.grid_patches(torch.from_numpy(images), bagssl.DEMO_CELLS, bagssl.DEMO_CELLS ** -2, size)
    z, parts = embed_patches(encoder, cells.flatten(0, 1))[1], torch.from_numpy(parts).flatten()
    means = torch.stack([z[parts == part].mean(0) for part in range(len(marginal))])
    means = means - means.mean(0)
    pairs = torch.triu(torch.ones(truth.shape), 1).bool()
    return torch.corrcoef(torch.stack([(means @ means.T)[pairs].double(), truth[pairs]]))[0, 1].item()


def show_cooccurrence(arguments, trained, untrained, config):
    """Print the correlation of learned and true similarity in the trained and in the untrained network."""
    if config.dataset != "demo" or config.data:
        raise UserError(f"the true co-occurrence is known only in the demo, which {arguments.checkpoint} was "
                        f"not trained on; give a checkpoint of --preset demo, and no --data")
    bagssl.check_config(dataclasses.replace(config, patch_scale=(bagssl.DEMO_CELLS ** -2,)), processes=1)
    results = {name: part_similarity(network, config.image_size, config.seed, size=config.patch_size or None)
               for name, network in (("trained", trained), ("untrained", untrained))}
    print("correlation of part types' similarity in z with their true co-occurrence: "
          + ", ".join(f"{name} {value:.2f}" for name, value in results.items()))
    return dict(results=results)


# --------------------------------------------------------------------------------------------------
# Command line

CLAIMS = {"parts": show_parts, "locality": show_locality, "cooccurrence": show_cooccurrence}


def main():
    parser = bagssl.Parser(prog="claims.py", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("claim", choices=CLAIMS)
    eval_linear.add_arguments(parser)
    arguments = parser.parse_args()
    eval_linear.check_arguments(arguments)
    trained, untrained, config = eval_linear.load_model(arguments)
    device = bagssl.start_process(arguments.device)
    table = CLAIMS[arguments.claim](arguments, trained.to(device), untrained.to(device), config)
    eval_linear.save_results(arguments, arguments.claim, **table)


if __name__ == "__main__":
    bagssl.run_cli(main)
