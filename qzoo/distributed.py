"""Several processes on one job: ``torchrun --nproc-per-node 2 -m qzoo evaluate NAME``.

:func:`joined` makes a :class:`Group` from torchrun's environment; without torchrun it is a group of one, and
everything below does nothing. ``calibrate``, ``evaluate`` and ``train`` take it as ``group=``. Only rank 0 prints
and writes.

Processes talk through gloo (CPU) and, where every process has a GPU of its own, NCCL for tensors on it. A process
that ends or hangs ends the others: with :class:`qzoo.errors.DistributedError`, or by torchrun's signal.
"""

from __future__ import annotations

import atexit
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from qzoo.errors import ArgumentError, DistributedError, QzooError
from qzoo.progress import length

TIMEOUT = 1800.0
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Group:
    """The processes of a job, as one of them sees them.

    Attributes:
        rank: this process, counted from 0.
        world: number of processes.
        device: where this process computes.
        timeout: seconds to wait for the others.

    Example:
        >>> Group().gather(3)
        [3]
    """

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    timeout: float = TIMEOUT

    @property
    def first(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Gather every process's value, by rank, in every process. Tensors arrive on the CPU.

        Raises:
            DistributedError: another process has ended, or did not answer in time.
        """
        if self.world == 1:
            return [value]
        parts: list[Any] = [None] * self.world
        with self.talking():
            torch.distributed.all_gather_object(parts, _pack(value))
        return [_unpack(part) for part in parts]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value in every process; the others pass anything. Tensors arrive on the CPU.

        Raises:
            DistributedError: another process has ended, or did not answer in time.
        """
        if self.world == 1:
            return value
        part = [_pack(value) if self.first else b""]
        with self.talking():
            torch.distributed.broadcast_object_list(part)
        return value if self.first else _unpack(part[0])

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Let rank 0 run a ``with`` block before the others: for downloads into a folder that they share."""
        if not self.first:
            self.broadcast(None)
        yield
        if self.first:
            self.broadcast(None)

    def deal(self, loader: Iterable[Any], start: int = 0) -> Iterator[tuple[int, Any]]:
        """Deal out this process's batches of ``loader`` with their numbers: ``start + rank``, then every ``world``-th.

        Nothing is padded or dropped: each batch goes to exactly one process. The images of other processes'
        batches are not read where the loader is a list or a ``DataLoader``. A stream of several files gives each
        process files of its own, where it can; then the numbers are other ones.

        Args:
            loader: gives the same batches in every process and every pass.
            start: batches to leave out, the same number in every process.

        Raises:
            DistributedError: a generator, or a ``DataLoader`` that shuffles.
        """
        first = start + self.rank
        if self.world == 1 and start == 0:
            return enumerate(loader)
        if callable(dealt := getattr(loader, "dealt", None)):  # qzoo.data.files.Batches
            return zip(_numbers(first, self.world), dealt(self.rank, self.world, start), strict=False)
        return zip(_numbers(first, self.world), _every(loader, first, self.world), strict=False)

    def share(self, loader: Iterable[Any], start: int = 0) -> int | None:
        """Count the batches that :meth:`deal` will give; None when ``loader`` has no length."""
        total = length(loader)
        return None if total is None else max(0, -(-(total - start - self.rank) // self.world))

    def part(self, batch: Tensor) -> Tensor:
        """Select this process's images of a batch that all processes have, [B, ...] to [B / world, ...].

        Raises:
            DistributedError: the images can't be shared out equally.
        """
        if self.world == 1:
            return batch
        if len(batch) % self.world:
            raise DistributedError(
                f"{len(batch)} images can't be shared out equally to {self.world} processes: choose a batch "
                f"size that is a multiple of {self.world}, and leave out an incomplete last batch"
            )
        return batch.chunk(self.world)[self.rank]

    def parallel(self, model: nn.Module) -> nn.Module:
        """Wrap ``model`` so that gradients are averaged over the processes; they start from rank 0's state.

        Buffers are left to each process: ranges do not change, and BatchNorm's statistics are averaged after
        each epoch, see :meth:`average_`.
        """
        if self.world == 1:
            return model
        device_ids = [self.device] if self.device.type == "cuda" else None
        with self.talking():
            wrapped = DistributedDataParallel(model, device_ids=device_ids)
        wrapped.broadcast_buffers = False  # torch 2.13 warns of it as an argument
        return wrapped

    def average_(self, tensor: Tensor) -> None:
        """Replace a floating-point tensor by its mean over the processes.

        Raises:
            DistributedError: another process has ended, or did not answer in time.
        """
        if self.world > 1:
            with self.talking():
                torch.distributed.all_reduce(tensor)
            tensor /= self.world

    @contextmanager
    def talking(self) -> Iterator[None]:
        """Explain a lost connection; for blocks in which processes exchange tensors.

        Raises:
            DistributedError: in place of torch's error.
        """
        try:
            yield
        except RuntimeError as error:
            if self.world == 1 or not _lost(error):
                raise
            raise DistributedError(
                f"rank {self.rank} of {self.world} lost the others: one has ended, or did not answer within "
                f"{self.timeout:.0f} s ({str(error).splitlines()[0].partition('. ')[0]}). Its own message says why; a "
                "training goes on from the state that it saved last when the same command is started again"
            ) from error


@contextmanager
def joined(timeout: float = TIMEOUT, device: str = "cpu") -> Iterator[Group]:
    """Join the processes that torchrun has started, and leave them at the end; alone without torchrun.

    After an error the connections stay until the process ends: else the others would notice, and be ended by
    torchrun together with this one, before it has said what is wrong.

    Args:
        timeout: seconds that a process waits for the others before it gives up.
        device: ``"cpu"``; ``"cuda"``: each process has the GPU of its local rank; ``"auto"``: GPUs where there
            are enough of them.

    Returns:
        The group, within a ``with`` block.

    Raises:
        DistributedError: too few GPUs, an incomplete environment, or the others can't be reached.
        ValueError: another device.

    Example:
        >>> with joined() as group:
        ...     result = qzoo.evaluate(model, loader, group=group, progress=False)
        >>> result.images
        16
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    missing = [name for name in _VARIABLES if name not in os.environ]
    if world > 1 and missing:
        raise DistributedError(
            f"WORLD_SIZE is {world}, but {', '.join(missing)} is not set; start the command with torchrun "
            "--nproc-per-node N -m qzoo ..."
        )
    if world == 1:
        yield Group(device=_device(device, 0, 1))
        return
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    group = Group(
        rank, world, _device(device, local, int(os.environ.get("LOCAL_WORLD_SIZE", world))), timeout
    )
    with group.talking():
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if group.device.type == "cuda" else "gloo",
            timeout=timedelta(seconds=timeout),
        )
    atexit.register(_leave)
    yield group
    with group.talking():  # none leaves, and takes its connections away, while another still uses them
        torch.distributed.barrier()
    _leave()


def _leave() -> None:
    """Close the connections. After an error this is done when the process ends: torch's threads, left to the end of
    the interpreter, would abort it now and then."""
    atexit.unregister(_leave)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _device(kind: str, local: int, processes: int) -> torch.device:
    """Where the process of local rank ``local`` computes."""
    if kind not in ("cpu", "cuda", "auto"):
        raise ArgumentError(f"device must be cpu, cuda or auto, not {kind!r}")
    gpus = torch.cuda.device_count() if kind != "cpu" and torch.cuda.is_available() else 0
    if kind == "cuda" and gpus < processes:
        raise DistributedError(
            f"{processes} processes but {gpus} GPUs: one process needs one GPU; use device cpu"
        )
    if gpus < processes:
        return torch.device("cpu")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _lost(error: RuntimeError) -> bool:
    """Whether the error is about the connection; gloo and NCCL raise plain RuntimeErrors, too."""
    kinds = (torch.distributed.DistError, torch.distributed.QueueEmptyError)
    words = ("gloo", "NCCL", "Connection ", "Timed out", "Timeout")
    return isinstance(error, kinds) or (
        not isinstance(error, QzooError) and any(word in str(error) for word in words)
    )


def _numbers(first: int, step: int) -> Iterator[int]:
    while True:
        yield first
        first += step


def _every(loader: Iterable[Any], first: int, step: int) -> Iterable[Any]:
    """The batches ``first``, ``first + step``, ..."""
    if isinstance(loader, Sequence):
        return loader[first::step]
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        return _dealt(loader, first, step)
    if iter(loader) is loader:
        raise DistributedError(
            "a generator can't be dealt out to several processes: pass a list, or a loader that can be gone "
            "through again"
        )
    return islice(loader, first, None, step)


def _dealt(loader: DataLoader[Any], first: int, step: int) -> Iterable[Any]:
    """A ``DataLoader`` of some of the batches of another, which reads nothing else."""
    if not isinstance(loader.sampler, SequentialSampler) or loader.batch_sampler is None:
        raise DistributedError(
            "a DataLoader that draws its images at random gives other batches in every process; use "
            "shuffle=False, no sampler, and a batch size"
        )
    return DataLoader(
        loader.dataset,
        batch_sampler=list(loader.batch_sampler)[first::step],
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        generator=torch.Generator(),  # else every pass would move the global generator
    )


def _pack(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpack(data: bytes) -> Any:
    # Written a moment ago by this job's own processes, so pickles of any class may be read.
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)
