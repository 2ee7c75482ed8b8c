"""Where and with what seed a run computes: device, precision, compilation, threads, several processes."""

import contextlib
import hashlib
import os
import random
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from .flags import fail


def pick_device(name):
    """'auto', 'cpu', 'cuda' or 'cuda:N' -> torch.device; asked for and absent ends the run. Under torchrun each process has its own GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if dist.is_initialized() and name.startswith("cuda"):
        if name != "cuda":
            fail(f"--device {name} puts all processes on one GPU; under torchrun leave --device out")
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {name} is not usable here ({str(error).splitlines()[0]}); try --device cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # else every process would also take some memory of the first GPU
        torch.set_float32_matmul_precision("high")  # TF32, which convolutions use by default
        torch.backends.cudnn.benchmark = True  # shapes hardly change
    return device


def num_cores():
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def in_threads(function, items, threads):
    """function(item) of each item, in order; up to `threads` of them are under way while the next item is made.

    For functions that let go of Python's lock, as zlib does.
    """
    pending, pool = deque(), ThreadPoolExecutor(threads)
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            while pending and (len(pending) > threads or pending[0].done()):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def autocast(precision, device):
    """The context for the networks' arithmetic that --precision asks for: weights stay float32, layers compute in bfloat16."""
    bf16 = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def to_device(array, device):
    """A numpy array as a tensor on `device`; to a GPU it goes through pinned memory, so that Python need not wait for the copy.

    On the CPU it is the array's own memory.
    """
    tensor = torch.from_numpy(array)
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def compiles(args, device):
    """Whether to compile: on GPUs, and not under torchrun, where the exchange of gradients breaks the graph."""
    return args.compile and device.type == "cuda" and not dist.is_initialized()


def compiled(function, on):
    """`function`, compiled where `on`, with CUDA graphs on a GPU: one launch in place of one for each operation.

    A graph writes its outputs where it wrote them the time before, so copy what must outlast the next call of any compiled
    function. Each shape of the inputs has a graph of its own. Random numbers of an explicit torch.Generator stay outside.
    """
    if not on:
        return function
    compiled_function = torch.compile(function, mode="reduce-overhead", dynamic=False)

    def call(*arguments):
        torch.compiler.cudagraph_mark_step_begin()  # what the call before put out may go
        try:
            return compiled_function(*arguments)
        except torch._dynamo.exc.TorchDynamoException as error:  # no C compiler, for one
            fail(f"torch.compile failed here ({str(error).splitlines()[0]}); try --no-compile")

    return call


def derive_seed(seed, purpose):
    """Another 31-bit seed for each purpose, so that no two streams of one run share their random numbers."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:4], "little") >> 1


def seed_everything(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def process():
    """This process's number (its rank) and how many there are: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def leads():
    """Whether this is the process that reports and writes: the only one, or rank 0."""
    return process()[0] == 0


@contextlib.contextmanager
def process_group():
    """Under torchrun: joins the processes that it started, and leaves them when all are done. Else: nothing.

    All but rank 0 print nothing but errors. When one fails, the calls in which others wait for it fail as well; only the first
    of them tells why.
    """
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():
        yield
        return
    store, rank, size = next(dist.rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"  # each for the tensors of its device
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere) if rank else contextlib.nullcontext():
            print(f"{size} processes share the work: each has its own shards, and the numbers below are those of each")
            yield
        if rank:
            store.wait(["done"], timedelta(days=30))  # rank 0 may still be labelling; it must not find the others gone
        else:
            store.set("done", "")
    except BaseException as error:
        if store.add("failed", 1) > 1:
            raise SystemExit(1) from None
        if isinstance(error, RuntimeError) and "gloo" in str(error):
            fail("another process has ended and told no reason (out of memory?); --resume goes on from the last state")
        raise
    dist.destroy_process_group()


def parallel(network):
    """The network, with gradients that backward() averages over all processes if there are several."""
    return torch.nn.parallel.DistributedDataParallel(network) if dist.is_initialized() else network
