"""Several processes, one run: MLX's collectives, and a watch that ends it when a process dies or hangs.

`mlx.launch` starts the same command once a rank and says by environment variables who is who. Each rank rolls
out its share of the prompts; what the ranks found out is gathered, so that each knows the whole batch and
decides the same; each has its share of the gradient, and the sum over the ranks is the whole batch's.
"""

import contextlib
import faulthandler
import io
import json
import os
import pickle
import secrets
import selectors
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_grpo.errors import RunError, UserError

PIECE = 2**28  # bytes of gradients in one exchange: the watch sees each, so that a slow network is no hang
GRACE = 1.0  # seconds in which a rank that hears of another's failure may still end by its own


class PlainData(pickle.Unpickler):
    """Reads numbers, text, lists and dicts, and runs nothing: what arrives comes over a network."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"{module}.{name} is no plain data")


def digest(array: mx.array) -> int:
    """A number that changes with any one bit of the array, computed on its device, the same on every one."""
    bits = array.reshape(-1).view({1: mx.uint8, 2: mx.uint16}.get(array.itemsize, mx.uint32))
    total = 0
    for start in range(0, bits.size, PIECE // 4):
        part = bits[start : start + PIECE // 4].astype(mx.uint32)
        # Odd factors, so that no difference is multiplied away modulo 2**32.
        total = (31 * total + mx.sum(part * (2 * mx.arange(part.size, dtype=mx.uint32) + 1)).item()) % 2**32
    return total


class Ranks:
    """This process among `size`. Alone, nothing is sent, and every method returns what it was given.

    Every rank must call the same methods in the same order. Used as a context: its end waits for all ranks.
    """

    def __init__(self, rank: int = 0, size: int = 1, timeout: float = 0.0, group=None):
        self.rank, self.size, self.timeout, self.group = rank, size, timeout, group
        self.waited = self.communicated = 0.0  # seconds: for slower ranks, and of the exchange itself
        self.waiting_since = None  # when the exchange in progress began
        self.quiet = contextlib.ExitStack()
        self.watch = None

    # Work

    def share(self, items: list) -> list:
        """This rank's part: every size-th item. `merge` puts parts together."""
        return items[self.rank :: self.size]

    def balanced(self, items: list, cost) -> list:
        """This rank's part of `items`, in their order: the ranks' sums of cost(item) are about equal."""
        if self.size == 1:
            return items
        loads = [0] * self.size
        mine = set()
        for i in sorted(range(len(items)), key=lambda i: -cost(items[i])):  # the largest first
            rank = loads.index(min(loads))
            loads[rank] += cost(items[i])
            if rank == self.rank:
                mine.add(i)
        return [item for i, item in enumerate(items) if i in mine]

    # Exchange

    def exchange(self, collective):
        """Evaluate a collective operation.

        Raises RunError where the connection is lost and the watch finds no dead rank.
        """
        self.waiting_since = time.monotonic()
        try:
            result = collective()
            mx.eval(result)
            return result
        except RuntimeError as error:
            if self.watch:
                self.watch.join(self.timeout + GRACE)  # it names the dead rank, and ends this process
            raise RunError(f"The connection between the ranks failed: {error}") from None
        finally:
            self.waiting_since = None

    def gather(self, value) -> list:
        """The `value` of every rank, by rank: None, numbers, text, and lists and dicts of them."""
        if self.size == 1:
            return [value]
        data = np.frombuffer(pickle.dumps(value), np.uint8)
        start = time.perf_counter()
        sizes = self.exchange(
            lambda: mx.distributed.all_gather(mx.array([data.size]), group=self.group)
        ).tolist()
        self.waited += time.perf_counter() - start
        padded = np.zeros(max(sizes), np.uint8)
        padded[: data.size] = data
        rows = np.array(
            self.exchange(lambda: mx.distributed.all_gather(mx.array(padded), group=self.group))
        ).reshape(self.size, -1)
        return [PlainData(io.BytesIO(row[:size].tobytes())).load() for row, size in zip(rows, sizes)]

    def merge(self, part: list | RunError) -> list:
        """The items of all ranks, in the order `share` cut them from.

        Where a rank's part is an error, all raise it.
        """
        if isinstance(part, RunError) and self.size == 1:
            raise part
        parts = self.gather(str(part) if isinstance(part, RunError) else part)
        for rank, other in enumerate(parts):
            if isinstance(other, str):
                raise part if rank == self.rank else RunError(f"rank {rank}: {other}")
        return [parts[i % self.size][i // self.size] for i in range(sum(map(len, parts)))]

    def on_first(self, function):
        """What `function()` returns on rank 0, which alone calls it; the others wait for it."""
        return self.gather(function() if self.rank == 0 else None)[0]

    def sum(self, tree):
        """The ranks' sum of a tree of gradients, in float32: half precision would lose small parts."""
        if self.size == 1:
            return tree
        by_name = sorted(tree_flatten(tree), key=lambda item: item[0])
        flat = [(name, a.astype(mx.float32)) for name, a in by_name]
        summed = []
        mx.eval(flat)
        self.gather(None)  # so that waiting for slower ranks is not counted as communication
        start = time.perf_counter()
        while flat:
            piece = [flat.pop(0)]
            while flat and sum(a.nbytes for _, a in piece) + flat[0][1].nbytes <= PIECE:
                piece.append(flat.pop(0))
            names, arrays = zip(*piece)
            # One collective an evaluation: the order of several is not the same on all ranks. The factor
            # makes the average a sum, exactly for 2, 4, 8 ... ranks.
            total = self.exchange(
                lambda: [a * self.size for a in nn.average_gradients(list(arrays), self.group, PIECE)]
            )
            summed += zip(names, total)
        self.communicated += time.perf_counter() - start
        return tree_unflatten(summed)

    def from_first(self, tree):
        """Rank 0's values of a tree of arrays that has the same names and shapes on every rank."""
        if self.size == 1:
            return tree
        by_name = sorted(tree_flatten(tree), key=lambda item: item[0])  # a tree from a file has its own order
        flat = [(name, a if self.rank == 0 else mx.zeros_like(a)) for name, a in by_name]
        return tree_unflatten(
            [(name, self.exchange(lambda: mx.distributed.all_sum(a, group=self.group))) for name, a in flat]
        )

    # Agreement

    def check_equal(self, arrays: dict, when: str) -> None:
        """Raise RunError where any array, by name, differs between ranks."""
        if self.size == 1:
            return
        digests = self.gather({name: digest(array) for name, array in arrays.items()})
        for rank, other in enumerate(digests):
            if other != digests[0]:
                names = [name for name in {**digests[0], **other} if other.get(name) != digests[0].get(name)]
                raise RunError(
                    f"Weights differ between ranks 0 and {rank} {when}: {names[0]} and {len(names) - 1} "
                    "more. Nothing is saved of it"
                )

    def must_agree(self, **facts) -> None:
        """Raise UserError where a rank was started with another of the named things."""
        for rank, other in enumerate(found := self.gather(facts)):
            if different := [name for name in facts if other[name] != found[0][name]]:
                raise UserError(
                    f"Ranks 0 and {rank} differ in {', '.join(different)}: every rank needs the same "
                    "settings, model and data"
                )

    def timing(self, seconds: dict) -> tuple[dict, dict]:
        """`seconds` by phase, each the slowest rank's, and what the log says of this update's exchanges."""
        if self.size == 1:
            return seconds, {}
        found = self.gather([seconds, self.waited, self.communicated])
        slowest = {phase: max(each[phase] for each, _, _ in found) for phase in seconds}
        return slowest, {
            "wait_by_rank": [wait for _, wait, _ in found],
            "communication_time": max(time for _, _, time in found),
        }

    # Start and end

    def __enter__(self):
        if self.size > 1:
            self.watch = Watch(self, connect(self))
            self.watch.start()
            if self.rank:  # rank 0 speaks; what another has to say of its failure, rank 0 says
                nothing = self.quiet.enter_context(open(os.devnull, "w"))
                self.quiet.enter_context(contextlib.redirect_stdout(nothing))
                self.quiet.enter_context(contextlib.redirect_stderr(nothing))
        return self

    def __exit__(self, kind, error, where):
        if self.size == 1:
            return
        sys.stdout.flush()
        if error is None:
            self.gather(None)  # wait for all ranks: the launcher ends the rest when one is gone
            self.watch.leave(None)
            self.quiet.close()
            return
        self.quiet.close()
        expected = isinstance(error, (UserError, RunError))
        self.watch.leave(str(error) if expected else f"{kind.__name__}: {error}")
        if self.rank == 0 or not expected:
            return
        if error.__cause__ is not None and not isinstance(error.__cause__, (OSError, TimeoutError)):
            traceback.print_exception(error.__cause__, file=sys.stderr)  # of the user's reward function
        self.watch.join(3 * GRACE)  # rank 0 goes first: the launcher ends the rest when one is gone
        raise SystemExit(2 if isinstance(error, UserError) else 1)


ALONE = Ranks()


def launched_as() -> tuple[str, int, str]:
    """(MLX backend, ranks asked for, host of rank 0) by mlx.launch's environment; ("", 1, "") without it."""
    given = os.environ
    if given.get("MLX_IBV_DEVICES"):
        host = given.get("MLX_JACCL_COORDINATOR", "").rpartition(":")[0]
        return "jaccl", len(json.loads(Path(given["MLX_IBV_DEVICES"]).read_text())), host
    if given.get("MLX_HOSTFILE"):
        text = Path(given["MLX_HOSTFILE"]).read_text().strip()
        hosts = json.loads(text) if text else [[""]]  # empty for one rank
        return "ring", len(hosts), hosts[0][0].rpartition(":")[0]
    if given.get("MLX_WORLD_SIZE"):
        return "nccl", int(given["MLX_WORLD_SIZE"]), given.get("NCCL_HOST_IP", "")
    if given.get("OMPI_COMM_WORLD_SIZE"):
        return "mpi", int(given["OMPI_COMM_WORLD_SIZE"]), ""
    return "", 1, ""


def start_ranks(timeout: float) -> Ranks:
    """The ranks that mlx.launch started, connected; ALONE without it. timeout: seconds all have to come up.

    Raises RunError where the world is not the size that was asked for: MLX would otherwise train each rank by
    itself.
    """
    try:
        backend, size, _ = launched_as()
    except (OSError, ValueError) as error:
        raise UserError(f"The launcher's list of hosts cannot be read: {error}") from None
    if size == 1:
        return ALONE
    rank = os.environ.get("MLX_RANK", os.environ.get("OMPI_COMM_WORLD_RANK", "?"))

    if rank == "0":
        print(
            f"ranks      waiting at most {timeout:g} s for {size} of them to come up on {backend}", flush=True
        )
    # MLX waits for ever and holds the interpreter, so that no Python thread could end it; this exits with 1.
    faulthandler.dump_traceback_later(timeout, exit=True, file=sys.__stderr__)
    try:
        group = mx.distributed.init(strict=True, backend=backend)
        if group.size() != size:
            raise RunError(
                f"Rank {rank}: {size} ranks were asked for, and MLX's {backend} backend found {group.size()}"
            )
        mx.eval(mx.distributed.all_sum(mx.array(1), group=group))  # some backends connect only now
    except RuntimeError as error:
        raise RunError(f"Rank {rank}: the {backend} backend did not start: {error}") from None
    finally:
        faulthandler.cancel_dump_traceback_later()
    return Ranks(group.rank(), size, timeout, group)


# ------------------------------------------------------------------------------------------------------------
# The watch
# ------------------------------------------------------------------------------------------------------------
# MLX's collectives wait without an end for a rank that is gone. So rank 0 holds a TCP connection to each
# other rank beside them, over which both say every second that they are alive, and at the end why they leave.


def connect(ranks: Ranks) -> dict[int, socket.socket]:
    """The connections: on rank 0 one to each rank, on the others one to rank 0.

    Raises RunError where it cannot be made.
    """
    ours = socket.create_server(("", 0)) if ranks.rank == 0 else None
    offer = [ours.getsockname()[1], secrets.token_hex(16), socket.gethostname()] if ours else None
    port, token, hostname = ranks.gather(offer)[0]
    deadline = time.monotonic() + ranks.timeout
    found = {}
    if ours is None:
        reason = ""
        for host in filter(None, (launched_as()[2], hostname)):
            try:
                found[0] = socket.create_connection((host, port), timeout=ranks.timeout / 2)
                found[0].sendall(f"{token} {ranks.rank:6}".encode())
                break
            except OSError as error:
                reason = f"{host} port {port}: {error}"
        if not found:
            raise RunError(f"Rank {ranks.rank} cannot reach rank 0, {reason}")
    while ours and len(found) < ranks.size - 1:
        ours.settimeout(max(0.1, deadline - time.monotonic()))
        try:
            connection, _ = ours.accept()
            connection.settimeout(1.0)
            hello = connection.recv(39, socket.MSG_WAITALL).decode().split()
        except TimeoutError:
            if time.monotonic() > deadline:
                raise RunError(
                    f"Ranks {sorted(set(range(1, ranks.size)) - set(found))} did not connect to rank 0's "
                    f"port {port}"
                ) from None
            continue
        except (OSError, UnicodeDecodeError):
            continue
        if len(hello) == 2 and secrets.compare_digest(hello[0], token):  # anybody may knock at an open port
            found[int(hello[1])] = connection
    if ours:
        ours.close()
    return found


class Watch(threading.Thread):
    """Ends this process, naming the rank and the reason, when another one dies, hangs or fails.

    A rank hangs when nothing is heard of it for `timeout` seconds: its process is stopped, its interpreter
    stuck, its machine or network gone. One that only takes long goes on saying that it is alive; rank 0 then
    says who waits for it.
    """

    def __init__(self, ranks: Ranks, peers: dict[int, socket.socket]):
        super().__init__(daemon=True)
        self.ranks, self.peers, self.timeout = ranks, peers, ranks.timeout
        self.period = min(1.0, ranks.timeout / 4)
        self.unread = dict.fromkeys(peers, b"")
        self.waits = {}  # seconds each rank has been in the exchange it is in, 0 for none
        self.leaving = threading.Event()  # this process is about to end by itself
        self.selector = selectors.DefaultSelector()
        for rank, peer in peers.items():
            peer.settimeout(self.period)
            self.selector.register(peer, selectors.EVENT_READ, rank)

    def say(self, **message) -> None:
        for peer in list(self.peers.values()):
            with contextlib.suppress(OSError):  # a lost connection is met by reading
                peer.sendall(json.dumps(message).encode() + b"\n")

    def leave(self, reason: str | None) -> None:
        """Say that this process ends now: well, where there is no reason."""
        self.leaving.set()
        self.say(end=reason)

    def run(self):
        heard = dict.fromkeys(self.peers, time.monotonic())
        said = 0.0
        patience = self.timeout
        while self.peers:
            if time.monotonic() - said >= self.period and not self.leaving.is_set():
                since = self.ranks.waiting_since
                self.waits[self.ranks.rank] = 0.0 if since is None else time.monotonic() - since
                self.say(waits=self.waits[self.ranks.rank])
                said = time.monotonic()
            for key, _ in self.selector.select(self.period / 2):
                heard[key.data] = time.monotonic()
                self.hear(key.data)
            for rank in list(self.peers):
                if time.monotonic() - heard[rank] > self.timeout:
                    self.end(
                        f"Rank {rank} hangs: nothing has been heard of it for distributed_timeout = "
                        f"{self.timeout:g} s"
                    )
            if self.ranks.rank == 0 and max(self.waits.values()) <= self.timeout:
                patience = self.timeout
            elif self.ranks.rank == 0 and max(self.waits.values()) > patience:
                busy = sorted(rank for rank in self.waits if self.waits[rank] <= self.period)
                if not busy and min(self.waits.values()) > self.timeout:
                    self.end(f"All ranks wait for each other since {self.timeout:g} s: the exchange is stuck")
                if busy:
                    print(
                        f"Waiting for rank {', '.join(map(str, busy))} for {patience:.0f} s; alive, but "
                        "still at work",
                        file=sys.stderr,
                        flush=True,
                    )
                patience += self.timeout

    def hear(self, rank: int) -> None:
        """Read what a rank says, and act on its end."""
        try:
            data = self.peers[rank].recv(65536)
        except OSError:
            data = b""
        *lines, self.unread[rank] = (self.unread[rank] + data).split(b"\n")
        for message in map(json.loads, lines):
            self.waits[rank] = message.get("waits", 0.0)
            if "end" in message:
                self.drop(rank)
                if message["end"] is not None:
                    self.end(
                        "" if rank == 0 else f"rank {rank}: {message['end']}",
                        GRACE if self.ranks.rank == 0 else 3 * GRACE,
                    )
                return
        if not data:
            self.drop(rank)
            self.end(f"Rank {rank} ended without a word: killed, out of memory, or its machine is gone")

    def drop(self, rank: int) -> None:
        self.selector.unregister(self.peers[rank])
        self.peers.pop(rank)
        self.waits.pop(rank, None)

    def end(self, message: str, grace: float = 0.0) -> None:
        """End this process with status 1, unless it is ending by itself."""
        if self.ranks.rank == 0:
            self.say(end=message)
        if not self.leaving.wait(grace):
            if message:
                print(message, file=sys.__stderr__, flush=True)
            sys.__stdout__.flush()
            os._exit(1)
