"""The processes of one run: one alone, or as many as torchrun started, which talk through torch.distributed.

Rank 0 is the lead: it alone prints, listens, and owns the work folder, the journal and the report. Values travel from
one rank to another, never through a reduction of the library, whose order of additions is its own: sums are made in an
order that the pipeline fixes, so that the number of ranks does not show in the result.
"""

from __future__ import annotations

import io
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from outlierq.core.errors import EXIT_ERROR, OutlierqError, RankError

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup, Store

Value = TypeVar("Value")

# A rank says this often that it lives. One that is silent for the longer time has gone without closing its connections,
# as a machine that lost its power does; all others notice in that time, and sooner when connections are closed.
BEAT_SECONDS = 0.25
SILENT_SECONDS = 60.0
# Ranks wait for each other while one works or writes; who is lost is told by the beats, not by the time.
WAIT = timedelta(days=7)
JOIN = timedelta(minutes=5)
STOPPED = (130, 143)  # exit codes after Ctrl-C and SIGTERM
FAILED, DONE = "failed", "done"


class Ranks:
    """One process that does everything; what several do is in `SeveralRanks`. rank: our number, of `size`."""

    rank, size = 0, 1
    at = ""  # what is being worked on, for the message when a rank is lost

    @property
    def lead(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def use(self, device: str) -> None:
        """Name the device that tensors are on from now on; with several GPUs each rank takes its own."""

    def send(self, value: Any, to: int) -> None:
        """Give a value to another rank, which must `receive` it; tensors may be anywhere in it."""
        raise AssertionError("one process has nobody to talk to")

    def receive(self, source: int) -> Any:
        """The next value that another rank sends; its tensors are on our device where they were on a device."""
        raise AssertionError("one process has nobody to talk to")

    def first(self, value: Callable[[], Value]) -> Value:
        """What the lead computes, on every rank; the others do not call the function."""
        return value()

    def gather(self, value: Value) -> list[Value]:
        """The values of all ranks, by rank, on the lead; nothing on the others."""
        return [value]

    def share(self, value: Value) -> list[Value]:
        """The values of all ranks, by rank, on every rank."""
        return [value]


ALONE = Ranks()
_present: Ranks = ALONE


def present() -> Ranks:
    """The processes that work together now: those of `joined`, or this one alone."""
    return _present


def refuse_several(what: str) -> None:
    """OutlierqError when several processes were started for something that one must do."""
    if _present.size > 1:
        raise OutlierqError(
            f"{what} needs one process, and {_present.size} were started",
            hint="start the same command without torchrun",
        )


class SeveralRanks(Ranks):
    """The ranks of a process group. Every rank calls the same methods in the same order.

    RankError when another rank has gone.
    """

    def __init__(self, rank: int, size: int, store: Store):
        self.rank, self.size, self._store = rank, size, store
        self._devices: ProcessGroup | None = None

    def use(self, device: str) -> None:
        if not device.startswith("cuda") or self._devices is not None:
            return
        import torch

        local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= count:
            raise OutlierqError(
                f"rank {self.rank} is number {local} on its machine, which has {count} CUDA devices",
                hint="start at most as many processes a machine as it has GPUs, or use --device cpu",
            )
        torch.cuda.set_device(local)
        self._devices = torch.distributed.new_group(backend="nccl", timeout=WAIT)

    def send(self, value: Any, to: int) -> None:
        import torch.distributed as dist

        self._transfer(value, lambda tensor, group: dist.send(tensor, to, group=group))

    def receive(self, source: int) -> Any:
        import torch.distributed as dist

        return self._arrive(lambda tensor, group: dist.recv(tensor, source, group=group))

    def first(self, value: Callable[[], Value]) -> Value:
        import torch.distributed as dist

        def move(tensor: torch.Tensor, group: ProcessGroup | None) -> None:
            dist.broadcast(tensor, 0, group=group)

        if not self.lead:
            arrived: Value = self._arrive(move)
            return arrived
        result = value()
        self._transfer(result, move)
        return result

    def gather(self, value: Value) -> list[Value]:
        if self.lead:
            return [value, *(self.receive(rank) for rank in range(1, self.size))]
        self.send(value, 0)
        return []

    def share(self, value: Value) -> list[Value]:
        values = self.gather(value)
        return self.first(lambda: values)

    def _transfer(self, value: Any, move: Callable[[torch.Tensor, ProcessGroup | None], object]) -> None:
        """Pass a value on: its length, itself without tensors, and each tensor's bytes."""
        import torch

        text, tensors = _packed(value)
        head = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        payload = [self._as_bytes(tensor) for tensor in tensors if tensor.numel()]
        with self._connected():
            move(torch.tensor([len(text)]), None)
            move(head, None)
            for part in payload:
                move(part, self._group_of(part))

    def _arrive(self, move: Callable[[torch.Tensor, ProcessGroup | None], object]) -> Any:
        """The value that another rank passes on."""
        import torch

        length = torch.empty(1, dtype=torch.int64)
        with self._connected():
            move(length, None)
        head = torch.empty(int(length), dtype=torch.uint8)
        with self._connected():
            move(head, None)
        metas, text = pickle.loads(head.numpy().tobytes())
        tensors = []
        for dtype, shape, device in metas:
            tensor = torch.empty(shape, dtype=dtype, device=device if self._devices else "cpu")
            if tensor.numel():
                with self._connected():
                    move(tensor.reshape(-1).view(torch.uint8), self._group_of(tensor))
            tensors.append(tensor)
        return _Unpacker(io.BytesIO(text), tensors).load()

    def _as_bytes(self, tensor: torch.Tensor) -> torch.Tensor:
        """The bytes of a tensor, in the memory that its group reads from."""
        import torch

        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        return flat if self._devices else flat.cpu()

    def _group_of(self, tensor: torch.Tensor) -> ProcessGroup | None:
        """Tensors on a GPU go from GPU to GPU."""
        return self._devices if tensor.is_cuda else None

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """Turn what torch.distributed raises when a connection breaks into our error."""
        try:
            yield
        except RuntimeError as error:
            raise RankError(f"the connection between the ranks broke: {str(error).splitlines()[0]}") from error

    def verdict(self, error: BaseException) -> BaseException:
        """What this rank ends with when `error` has ended its work: of all ranks only one has something to say."""
        stopped = isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and error.code in STOPPED)
        if isinstance(error, SystemExit) and not stopped:
            self._tell(DONE if not error.code else FAILED)
            return error
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun stops us when another one fails; we stop already
        if not stopped and not isinstance(error, RankError):
            self._tell(FAILED)
            return error if self._speaks() or not isinstance(error, OutlierqError) else SystemExit(error.exit_code)
        beats, lost = self._roll_call()
        self._tell(DONE)
        if FAILED in beats or not self._speaks():
            return SystemExit(EXIT_ERROR)
        if not lost:
            return error
        names = f"rank{'s' if len(lost) > 1 else ''} {', '.join(map(str, lost))} of {self.size}"
        return RankError(
            f"{names} {'were' if len(lost) > 1 else 'was'} lost{f' in {self.at}' if self.at else ''}: killed, out of "
            "memory, or cut off",
            hint="run the same command again; it continues where it stopped, with any number of ranks",
        )

    def _roll_call(self) -> tuple[list[str], list[int]]:
        """What every rank has last said, and the ranks that neither ended nor beat while we listened."""
        try:
            before = self._beats()
            if FAILED in before:
                return before, []
            time.sleep(6 * BEAT_SECONDS)
            after = self._beats()
        except RuntimeError:  # the store is gone: it is kept by torchrun, or by rank 0
            return [], [] if self.lead else [0]
        others = [rank for rank in range(self.size) if rank != self.rank]
        return after, [rank for rank in others if after[rank] not in (FAILED, DONE) and after[rank] == before[rank]]

    def _beats(self) -> list[str]:
        """What every rank has last said."""
        return [value.decode() for value in self._store.multi_get([f"beat/{rank}" for rank in range(self.size)])]

    def _tell(self, state: str) -> None:
        """The last beat of this rank."""
        self._pulse.stop()
        with suppress(RuntimeError):
            self._store.set(f"beat/{self.rank}", state)

    def _speaks(self) -> bool:
        """Whether no other rank has spoken."""
        try:
            return self._store.add("said", 1) == 1
        except RuntimeError:
            return True

    def start(self, pulse: _Pulse) -> None:
        """Begin to beat, and wait for all others."""
        import torch.distributed as dist

        self._pulse = pulse
        pulse.start()
        with self._connected():
            dist.init_process_group(
                "gloo", store=dist.PrefixStore("group", self._store), rank=self.rank, world_size=self.size, timeout=WAIT
            )


class _Pulse(threading.Thread):
    """Says that this rank lives, also while it computes, and ends it when another one has fallen silent for long."""

    def __init__(self, rank: int, size: int, store: Store):
        super().__init__(name="pulse", daemon=True)
        self.rank, self.size, self.store, self._ended = rank, size, store, threading.Event()
        store.set(f"beat/{rank}", "0")

    def stop(self) -> None:
        """No more beats, unless one is on its way to a store that does not answer."""
        self._ended.set()
        self.join(timeout=1.0)

    def run(self) -> None:
        """Beat, and now and then listen to the others."""
        heard: dict[int, tuple[bytes, float]] = {}
        count = 0
        while not self._ended.wait(BEAT_SECONDS):
            count += 1
            try:
                self.store.set(f"beat/{self.rank}", str(count))
                if count % 20 == 0:
                    self._listen(heard)
            except RuntimeError:
                return  # without a store nothing can be heard; the group's own connections tell of the end

    def _listen(self, heard: dict[int, tuple[bytes, float]]) -> None:
        """End the process when a rank has said nothing new for long: the main thread may wait for it in vain."""
        now = time.monotonic()
        others = [rank for rank in range(self.size) if rank != self.rank and self.store.check([f"beat/{rank}"])]
        for rank, value in zip(others, self.store.multi_get([f"beat/{rank}" for rank in others]), strict=True):
            if rank not in heard or heard[rank][0] != value or value.decode() in (FAILED, DONE):
                heard[rank] = value, now
            elif now - heard[rank][1] > SILENT_SECONDS:
                if self.store.add("said", 1) == 1:
                    print(
                        f"error: rank {rank} of {self.size} has said nothing for {SILENT_SECONDS:.0f} s\n\nhint: run "
                        "the same command again; it continues where it stopped, with any number of ranks",
                        file=sys.__stderr__,
                        flush=True,
                    )
                os._exit(EXIT_ERROR)


class _Packer(pickle.Pickler):
    """Pickles a value without the bytes of its tensors, which are kept in `tensors`."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file, protocol=5)
        self.tensors: list[torch.Tensor] = []

    def persistent_id(self, value: Any) -> int | None:
        import torch

        if not isinstance(value, torch.Tensor):
            return None
        self.tensors.append(value)
        return len(self.tensors) - 1


class _Unpacker(pickle.Unpickler):
    """The inverse, with the tensors that have arrived."""

    def __init__(self, file: io.BytesIO, tensors: list[torch.Tensor]):
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, number: int) -> torch.Tensor:
        return self.tensors[number]


def _packed(value: Any) -> tuple[bytes, list[torch.Tensor]]:
    """A value as bytes with the dtypes, shapes and devices of its tensors, and the tensors."""
    file = io.BytesIO()
    packer = _Packer(file)
    packer.dump(value)
    metas = [(tensor.dtype, tuple(tensor.shape), tensor.device.type) for tensor in packer.tensors]
    return pickle.dumps((metas, file.getvalue()), protocol=5), packer.tensors


def world_size() -> int:
    """How many processes were started together, by the environment that torchrun and others set."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise OutlierqError(f"WORLD_SIZE={text!r} in the environment is no number of processes", hint="unset it")
    return int(text)


@contextmanager
def joined() -> Iterator[Ranks]:
    """This process alone, or the ranks that were started together, until the end of their common work.

    Inside, ranks other than the lead are silent; an error that ends the work is said by one rank only.
    """
    global _present
    size = world_size()
    if size == 1:
        yield ALONE
        return
    _present = ranks = _join(size)
    try:
        with _silence(ranks.lead):
            yield ranks
    except BaseException as error:  # an interrupt and an exit, too: the other ranks wait for what became of this one
        ending = ranks.verdict(error)
        if ending is error:
            raise
        raise ending from None
    else:
        ranks.verdict(SystemExit(0))
    finally:
        _present = ALONE


@contextmanager
def _silence(lead: bool) -> Iterator[None]:
    """Let only the lead print."""
    if lead:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def _join(size: int) -> SeveralRanks:
    """Meet the other ranks where the environment says. OutlierqError when they do not come."""
    import torch
    import torch.distributed as dist

    try:
        rank, host, port = int(os.environ["RANK"]), os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError) as error:
        raise OutlierqError(
            f"WORLD_SIZE is {size}, but RANK, MASTER_ADDR and MASTER_PORT do not say where the others are: {error}",
            hint="start with `torchrun --nproc-per-node N -m outlierq ...`, or unset WORLD_SIZE",
        ) from error
    if "OMP_NUM_THREADS" not in os.environ:  # torchrun sets it to 1 where it is not set
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    keeps_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"

    def store(keeps: bool) -> dist.PrefixStore:
        tcp = dist.TCPStore(host, port, size, keeps, timeout=JOIN, wait_for_workers=False)
        return dist.PrefixStore(f"outlierq/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", tcp)

    try:
        ours = store(keeps_store)
        ranks = SeveralRanks(rank, size, ours)
        ranks.start(_Pulse(rank, size, store(False)))
    except RuntimeError as error:
        raise OutlierqError(
            f"rank {rank} of {size} did not meet the others at {host}:{port}: {str(error).splitlines()[0]}",
            hint="start all machines with the same --rdzv-endpoint (or --master-addr), and let that port through",
        ) from error
    return ranks
