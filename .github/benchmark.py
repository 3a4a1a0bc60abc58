# SPDX-License-Identifier: MIT
"""How fast bagssl.py is on this machine.

    python .github/benchmark.py ratios                         # each fast piece against the plain way
    python .github/benchmark.py profile --preset cifar10-cpu   # where a training step's time goes
    torchrun --standalone --nproc_per_node=2 .github/benchmark.py profile --preset cifar10-cpu
    python .github/benchmark.py scale --preset imagenet --processes 1 8 64 512   # a step on many GPUs, simulated

`ratios` needs no data and runs on the CPU: the images are noise; patches, network and loss are those of the preset
cifar10-cpu. `profile` and `scale` take any flag of bagssl.py. Nothing is trained, and nothing is written but decoded or
downloaded images. `scale` needs no data and no GPU: one process of many runs a step on tensors that have a shape and
no content, and its operations, memory and communication are counted.
"""

import argparse
import contextlib
import math
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections import defaultdict
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parents[1]))
import bagssl
import eval_linear
from bagssl import RANK, WORLD_SIZE

CPU = torch.device("cpu")


@contextlib.contextmanager
def timed(name, times, device=CPU):
    """Append the seconds that the block takes, waiting for the device, to times[name]."""
    begun = time.perf_counter()
    yield
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    times[name].append(time.perf_counter() - begun)


def peak_memory(device):
    """The most memory used so far, in GB: allocated on the GPU, or else held by this process; nan if not known.

    A process's memory is read from Linux's /proc, since getrusage may count the parent process too.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")
    return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) * 1024 / 1e9 if status.exists() else math.nan


# --------------------------------------------------------------------------------------------------
# A step of bagssl.train, at a learning rate of 0


def make_optimizer(encoder, config):
    return torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], lr=0.0, momentum=0.9, nesterov=True,
                           weight_decay=config.weight_decay, fused=True)


def make_input(batch, step, config, views=bagssl.training_views):
    u = torch.rand(config.batch_size, config.num_patches, 11,
                   generator=bagssl.generator_for(config.seed, "patches", step))
    return views(batch, u.chunk(WORLD_SIZE)[RANK].to(batch.device), config)


def train_step(x, model, optimizer, config, part=contextlib.nullcontext):
    """What follows the input x in a step; `part(name)` is a context for each part."""
    with bagssl.autocast(x.device):
        _, z = model(x)
    with part("gather + loss"):
        z = bagssl.gather(z.unflatten(0, (-1, config.num_patches)))
        loss, _ = bagssl.vicreg_loss(z, config.inv_weight, config.var_weight, config.cov_weight,
                                     rank=RANK, world_size=WORLD_SIZE)
    with part("backward"):
        optimizer.zero_grad()
        loss.backward()
    with part("clip + optimiser"):
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], config.clip)
        optimizer.step()


# --------------------------------------------------------------------------------------------------
# profile


def profile(flags, warm_up=3, rounds=20):
    """Print the median times of the parts of a step, of the whole step, and of the step on a ready input.

    Each part is timed alone; a whole step overlaps what it can. The parts run without DistributedDataParallel, so
    the all-reduce of the gradients, which it overlaps with the backward pass, is a part of its own. All other
    communication counts where it happens: in the forward and backward passes and in the loss.
    """
    config = bagssl.parse_config(flags)
    bagssl.check_config(config, WORLD_SIZE)
    device = bagssl.start_process(config.device)

    images, labels = bagssl.training_images(config, device)
    steps = config.epochs * (len(images) // config.batch_size)
    encoder = bagssl.Encoder(config.arch, config.stem_stride, config.projector)
    encoder.to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(encoder, config)
    model, views = bagssl.parallelize_and_compile(encoder, bagssl.training_views, config, device)
    backbone, projector = encoder.backbone, encoder.projector
    if views is not bagssl.training_views:  # compiled, as the backbone and the projector are within the model
        backbone, projector = torch.compile(backbone), torch.compile(projector)

    b, times = config.batch_size // WORLD_SIZE, defaultdict(list)
    mine = slice(RANK * b, (RANK + 1) * b)
    gradients = torch.zeros(sum(p.numel() for p in encoder.parameters() if p.requires_grad), device=device)

    def part(name):
        return timed(name, times, device)

    def encoder_in_parts(x):
        with part("backbone"):
            h = backbone(x)
        with part("projector"):
            return h, projector(h)

    reading_ahead = bagssl.batches(images, labels, config, mine, device, 0, sys.maxsize)
    for step in range(warm_up + rounds):
        if step == warm_up:
            times.clear()
        batch = next(reading_ahead)[1]
        with part("crop + augment"):
            x = make_input(batch, step, config, views)
        train_step(x, encoder_in_parts, optimizer, config, part)
        if WORLD_SIZE > 1:
            with part("gradient all-reduce"):
                dist.all_reduce(gradients)
        with part("step"):
            train_step(make_input(next(reading_ahead)[1], step, config, views), model, optimizer, config)
        with part("step on a ready input"):
            train_step(x, model, optimizer, config)
    reading_ahead.close()
    memory = peak_memory(device)

    with FlopCounterMode(display=False) as counter:
        train_step(x, encoder, optimizer, config)
    side, dtype = 8192 if device.type == "cuda" else 2048, torch.bfloat16 if bagssl.has_bf16(device) else torch.float32
    square, products = torch.randn(side, side, device=device, dtype=dtype), defaultdict(list)
    for _ in range(10):
        with timed("product", products, device):
            square @ square

    if RANK == 0:
        parts = {name: float(np.median(seconds)) for name, seconds in times.items()}
        whole, ready, total = parts.pop("step"), parts.pop("step on a ready input"), sum(parts.values())
        added = np.median(np.divide(times["step"], times["step on a ready input"])) - 1  # in pairs: drift cancels
        flop, patches = counter.get_total_flops(), config.batch_size * config.num_patches
        rate, limit = flop / whole / 1e9, 2 * side ** 3 / min(products["product"]) / 1e9
        print(f"\n{'part of a step':22}      ms  share")
        for name, seconds in parts.items():
            print(f"{name:22}{1e3 * seconds:8.1f}  {seconds / total:5.1%}")
        print(f"{'sum of the parts':22}{1e3 * total:8.1f}\n"
              f"{'step':22}{1e3 * whole:8.1f}  {patches / whole:,.0f} patches/s, "
              f"{timedelta(seconds=round(steps * whole))} for the run of {steps:,} steps\n"
              f"{'step on a ready input':22}{1e3 * ready:8.1f}  input adds {added:.1%}\n\n"
              f"{flop / 1e9:,.1f} GFLOP per step and process, {rate:,.0f} GFLOP/s: {rate / limit:.0%} of the "
              f"{limit:,.0f} of a large {str(dtype)[6:]} matrix product\n"
              f"peak memory {memory:.1f} GB per process; {torch.get_num_threads()} threads; torch {torch.__version__}")


# --------------------------------------------------------------------------------------------------
# scale


class Communication(TorchDispatchMode):
    """Counts the collective operations of the block: [calls, bytes] of each kind.

    Bytes are counted over the rows of all processes: what a gather returns, the tensor that a sum or a reduce-scatter
    adds up.
    """

    KINDS = {"_allgather_base_": "gather", "allreduce_": "sum", "_reduce_scatter_base_": "scatter"}

    def __init__(self):
        super().__init__()
        self.counts = {kind: [0, 0] for kind in self.KINDS.values()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            count = self.counts[self.KINDS[function._schema.name.removeprefix("c10d::")]]
            count[0] += 1
            count[1] += max(sum(leaf.nbytes for leaf in tree_leaves(argument) if isinstance(leaf, torch.Tensor))
                            for argument in args[:2])  # of input and output, the larger
        return function(*args, **kwargs or {})


def count_step(config, processes, bucket=25 * 2 ** 20):
    """TFLOP, peak GB, and [calls, bytes] of each kind of communication of one process in a step of `processes`.

    Simulated, on tensors without content, with the network in bfloat16, as on a GPU.
    DistributedDataParallel cannot be simulated: its sum of the gradients is done here by hand.
    """
    if processes > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    try:
        with FakeTensorMode():
            return count_fake_step(config, processes, bucket)
    finally:
        if processes > 1:
            dist.destroy_process_group()


def count_fake_step(config, processes, bucket):
    """What `count_step` returns, inside a FakeTensorMode and a group of processes."""
    b, S = config.batch_size // processes, config.image_size
    encoder = bagssl.Encoder(config.arch, config.stem_stride, config.projector)
    if config.arch == "patchnet":  # MemTracker takes no fixed parameter
        whiten = encoder.backbone.whiten.weight.detach()
        del encoder.backbone.whiten.weight
        encoder.backbone.whiten.weight = whiten
    optimizer, memory = make_optimizer(encoder, config), MemTracker()
    images = torch.zeros(b, 3, S, S, dtype=torch.uint8)
    weights = list(encoder.parameters())
    gradients = torch.zeros(sum(p.numel() for p in weights))
    for p, its_part in zip(weights, gradients.split([p.numel() for p in weights])):
        p.grad = its_part.view_as(p)
    memory.track_external(encoder, optimizer, images)
    with memory, Communication() as communication, FlopCounterMode(display=False) as flops:
        x = bagssl.training_views(images, torch.rand(b, config.num_patches, 11), config)
        with torch.autocast("cpu", torch.bfloat16):
            _, z = encoder(x)
        z = bagssl.gather(z.unflatten(0, (-1, config.num_patches)))
        loss, _ = bagssl.vicreg_loss(z, config.inv_weight, config.var_weight, config.cov_weight, world_size=processes)
        loss.backward()
        if processes > 1:
            for part in gradients.split(bucket // gradients.itemsize):
                dist.all_reduce(part)
        optimizer.step()
    peak = memory.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    return flops.get_total_flops() / 1e12, peak / 1e9, communication.counts


def scale(flags):
    """Print what a step costs each of several numbers of processes, and how long the run would take."""
    parser = bagssl.Parser(prog="benchmark.py scale", description=scale.__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--processes", type=int, nargs="+", default=[1, 8, 64, 512], help="numbers of processes")
    add("--images", type=int, default=1_281_167, help="images in the training set; default: ImageNet's")
    add("--tflops", type=float, default=160, help="TFLOP/s of each process; default: a sixth of an H100's peak")
    add("--per-node", type=int, default=8, help="processes of a node")
    add("--gb-within", type=float, default=150, help="GB/s that a process sends within its node")
    add("--gb-between", type=float, default=25, help="GB/s that a process sends to other nodes")
    ours, flags = parser.parse_known_args(flags)
    if min(*ours.processes, ours.tflops, ours.per_node, ours.gb_within, ours.gb_between) <= 0:
        parser.error("--processes, --tflops, --per-node, --gb-within and --gb-between must be above 0")
    config = bagssl.parse_config(flags)
    print(f"{config.arch}, projector {' '.join(map(str, config.projector))}, B = {config.batch_size}, "
          f"V = {config.num_patches}; {ours.tflops:g} TFLOP/s, {ours.gb_within:g} and {ours.gb_between:g} GB/s\n"
          f"a step: MB (calls) of communication; the run of {config.epochs} epochs: hours of compute + communication\n"
          f"processes  images each   TFLOP  peak GB" + "".join(f"{kind:>15}" for kind in Communication.KINDS.values()) +
          "    hours")
    for n in ours.processes:
        bagssl.check_config(config, n)
        tflop, peak, counts = count_step(config, n)
        steps = config.epochs * (ours.images // config.batch_size)
        sizes = [size for _, size in counts.values()]
        sent = (n - 1) / n * (sum(sizes) + counts["sum"][1])  # in rings, where a sum goes round twice
        seconds = sent / 1e9 / (ours.gb_within if n <= ours.per_node else ours.gb_between)
        columns = [f"{size / 1e6:,.1f} ({calls})" for calls, size in counts.values()]
        print(f"{n:9}  {config.batch_size // n:11}  {tflop:6.3g}  {peak:7.1f}", *(f"{text:>13}" for text in columns),
              f"{steps * tflop / ours.tflops / 3600:7.1f} + {steps * seconds / 3600:.1f}", sep="  ", flush=True)


# --------------------------------------------------------------------------------------------------
# ratios

CONFIG = bagssl.Config(**bagssl.PRESETS["cifar10-cpu"])


def compare(what, rounds, sides, patches=None):
    """Time functions by turns; print their medians, and how many times as fast as the first the others are."""
    times = defaultdict(list)
    for _ in range(rounds + 1):
        for name, function in sides.items():
            with timed(name, times):
                function()
    medians = {name: float(np.median(seconds[1:])) for name, seconds in times.items()}  # the first round warms up
    first, *others = medians
    figures = {name: f"{patches / median:,.0f} patches/s" if patches else f"{1e3 * median:,.1f} ms"
               for name, median in medians.items()}
    print(f"{what}: {first} {figures[first]}" + "".join(
        f"; {name} {figures[name]}, {medians[first] / medians[name]:.3g} times as fast" for name in others), flush=True)


class PerImage(torch.utils.data.Dataset):
    """The input pipeline of EMP-SSL, lightly and solo-learn: PIL and torchvision's transforms, one patch at a time."""

    def __init__(self, images, crop):
        self.images = [transforms.functional.to_pil_image(image) for image in images]
        self.transform = transforms.Compose([
            crop, transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2), transforms.RandomSolarize(128, p=0.1), transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return torch.stack([self.transform(self.images[index]) for _ in range(CONFIG.num_patches)])


def loader(images, crop):
    """Batches from as many worker processes as there are cores, which stay between the rounds."""
    return torch.utils.data.DataLoader(PerImage(images, crop), CONFIG.batch_size, shuffle=True,
                                       num_workers=os.cpu_count(), persistent_workers=True)


def inputs(images, views=bagssl.training_views):
    """Our input pipeline: the encoder's input for each batch of the images."""
    for step, batch in enumerate(images.split(CONFIG.batch_size)):
        yield make_input(batch, step, CONFIG, views)


def compare_input(images):
    batches, compiled = loader(images, transforms.RandomCrop(16)), torch.compile(bagssl.training_views)
    compare("crop + augment", 5, {"per image with PIL": lambda: list(batches), "batched": lambda: list(inputs(images)),
                                  "compiled": lambda: list(inputs(images, compiled))}, len(images) * CONFIG.num_patches)


def our_loss(z):
    return bagssl.vicreg_loss(z)[0]


def square_loss(z):
    """VICReg for two views by the D x D covariance matrix, as its definition says."""
    loss = 25 * (z[:, 0] - z[:, 1]).square().mean()
    for view in z.unbind(1):
        view = view - view.mean(0)
        covariance = view.T @ view / (len(view) - 1)
        loss = loss + 12.5 * (1 - (covariance.diagonal() + 1e-4).sqrt()).relu().mean()
        loss = loss + (covariance.square().sum() - covariance.diagonal().square().sum()) / len(covariance)
    return loss


def loss_and_gradient(loss, B, D):
    z = torch.randn(B, 2, D, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss(z).backward()


def memory_of(loss, B, D):
    """The memory that the loss and its gradient add to this process, in MB."""
    loss_and_gradient(loss, 8, 8)
    before = peak_memory(CPU)
    loss_and_gradient(loss, B, D)
    return 1e3 * (peak_memory(CPU) - before)


def compare_losses():
    z = torch.randn(64, 2, 100, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(our_loss(z), square_loss(z))  # one loss, in two ways
    for B, D in ((256, 8192), (64, 1024), (256, 2048), (1024, 1024), (2048, 512), (4096, 64)):
        compare(f"loss and gradient, V = 2, B = {B}, D = {D}", 5,
                {"by D x D": lambda: loss_and_gradient(square_loss, B, D),
                 "ours": lambda: loss_and_gradient(our_loss, B, D)})
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:  # a new process for each
        square, ours = (pool.apply(memory_of, (loss, 256, 8192)) for loss in (square_loss, our_loss))
    print(f"memory of the loss, V = 2, B = 256, D = 8192: by D x D {square:.0f} MB; ours {ours:.0f} MB", flush=True)


@torch.no_grad()
def compare_bag(images):
    backbone = bagssl.make_backbone(CONFIG.arch).eval().to(memory_format=torch.channels_last)
    patches = torch.randn(1024, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    bag = bagssl.BagOfPatches(backbone, 4, 0.25)
    compare("bag", 9, {"backbone alone": lambda: [backbone(some) for some in patches.split(bag.chunk)],
                       "BagOfPatches": lambda: bag(images[:64])}, len(patches))


def compare_training(images):
    plain, resnet, patchnet = (bagssl.Encoder(arch, 1, CONFIG.projector)
                               for arch in ("resnet18", "resnet18", "patchnet"))
    batches = loader(images, transforms.RandomResizedCrop(32, scale=(0.25, 0.25), ratio=(1, 1)))
    float32 = torch.autocast("cpu", enabled=False)(plain)  # else in bfloat16 on CPUs that have it

    def train(model, encoder, inputs):
        optimizer = make_optimizer(encoder, CONFIG)
        for x in inputs:
            train_step(x, model, optimizer, CONFIG)

    for encoder in (resnet, patchnet):
        encoder.to(memory_format=torch.channels_last)
    compare("training step, gradients clipped", 2,
            {"ResNet-18, patches by PIL upsampled to 32 x 32, float32, contiguous":
                 lambda: train(float32, plain, (batch.flatten(0, 1) for batch in batches)),
             "ResNet-18 in our pipeline": lambda: train(resnet, resnet, inputs(images)),
             "PatchNet in our pipeline": lambda: train(patchnet, patchnet, inputs(images))},
            len(images) * CONFIG.num_patches)


def compare_pooling():
    maps = torch.randn(256, 1024, 4, 4, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    gradient = torch.randn(256, 1024, dtype=torch.bfloat16)
    maps.requires_grad_()
    sides = {"mean": lambda x: x.mean((2, 3)), "avg_pool2d": lambda x: nn.functional.avg_pool2d(x, 4).flatten(1),
             "sum / 16, ours": lambda x: x.sum((2, 3)) / 16}
    compare("ReLU, mean over 256 x 1024 maps of 4 x 4, and gradient, bfloat16", 9, {
        name: lambda pool=pool: torch.autograd.grad(pool(maps.relu()), maps, gradient) for name, pool in sides.items()})


def time_probe():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (60_000,), generator=generator)
    features = torch.randn(10, 512, generator=generator)[labels] * 0.15 + torch.randn(60_000, 512, generator=generator)
    features = features @ torch.randn(512, 512, generator=generator) * torch.logspace(0, -2, 512)
    compare("linear probe, 60,000 x 512", 1, {
        "all decays": lambda: eval_linear.linear_probe(features, labels, features[:1000], labels[:1000])})


def time_decoding(count=512):
    """Decode as training on ImageNet does at its first start, from JPEG files of its commonest size."""
    coarse = torch.rand(count, 3, 47, 63, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        folder, names = Path(folder), [f"{i}.jpg" for i in range(count)]
        for name, image in zip(names, coarse):
            image = nn.functional.interpolate(image[None], (375, 500), mode="bicubic")[0]
            image = (image + 0.055 * torch.randn(image.shape)).clamp(0, 1)  # grain, so that a file has about 110 KB
            transforms.functional.to_pil_image(image).save(folder / name, quality=90)
        size = np.mean([(folder / name).stat().st_size for name in names])
        begun = time.perf_counter()
        bagssl.decode_folder(folder, names, 224, folder / "cache")
        rate = count / (time.perf_counter() - begun) / os.cpu_count()
    print(f"decoding: {rate:,.0f} JPEGs of 500 x 375 pixels, {size / 1e3:.0f} KB, per second and core; ImageNet's "
          f"1,281,167 would take 16 such cores {timedelta(seconds=round(1_281_167 / rate / 16))}", flush=True)


def ratios():
    """Print all comparisons. In each the candidates take turns, so that all see the same machine."""
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, {torch.get_num_threads()} threads, "
          f"{torch.backends.cpu.get_cpu_capability()}, {'bfloat16' if bagssl.has_bf16(CPU) else 'float32'}", flush=True)
    noise = torch.randint(256, (1024, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    compare_input(noise)
    compare_losses()
    compare_bag(noise)
    compare_pooling()
    compare_training(noise[:128])
    time_probe()
    time_decoding()


def main():
    parser = bagssl.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["ratios", "profile", "scale"])
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="for profile and scale, those of bagssl.py")
    arguments = parser.parse_args()
    if arguments.command != "ratios":
        {"profile": profile, "scale": scale}[arguments.command](arguments.flags)
    elif arguments.flags:
        parser.error("ratios takes no flags")
    else:
        ratios()


if __name__ == "__main__":
    bagssl.run_cli(main)
