"""What a run over several nodes needs of each of them: an address that the others can reach, and one shared folder."""

import os
import secrets
import socket
import sys
import time
from pathlib import Path
from typing import Any

SECONDS_TO_APPEAR = 60.0  # NFS clients may keep an old listing of a folder for 60 s


def fault() -> str | None:
    """Return a line if this process is one of several that were started without telling them their rank; None if not.

    Each would take itself for a whole run, in the same folder.
    """
    if "RANK" in os.environ:
        return None
    for starter, variable in (("srun", "SLURM_STEP_NUM_TASKS"), ("mpirun", "OMPI_COMM_WORLD_SIZE")):
        tasks = os.environ.get(variable, "1")
        if tasks != "1":
            return (
                f"{starter} started {tasks} processes without RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and "
                "MASTER_PORT in their environment; start one `deepspeed --no_ssh` or `torchrun` per node instead"
            )
    return None


def number_of_nodes() -> int:
    """Return how many nodes the launcher started ranks on; 1 without a launcher.

    From the world size, and the ranks of this node as DeepSpeed's launcher (LOCAL_SIZE) or torchrun
    (LOCAL_WORLD_SIZE) tells. Ranks started in another way are taken for one a node, unless they meet at a loopback
    address.
    """
    if "RANK" not in os.environ:
        return 1
    local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    if local is None and os.environ.get("MASTER_ADDR", "").startswith(("127.", "localhost", "::1")):
        return 1
    return -(-int(os.environ.get("WORLD_SIZE", "1")) // int(local or 1))


def choose_interface() -> None:
    """Let Gloo use the network interface towards the first node, where it would choose one that others cannot reach.

    Gloo listens at the address of the machine's own name. Where that is a loopback address (Debian's 127.0.1.1) or
    none, ranks of several nodes cannot connect: "connectFullMesh failed" a minute later. Said in one line on stderr;
    a GLOO_SOCKET_IFNAME that is set is left as it is.
    """
    if number_of_nodes() == 1 or "GLOO_SOCKET_IFNAME" in os.environ or _reachable_by_name():
        return
    interface = _interface_towards(os.environ["MASTER_ADDR"])
    if interface is None:
        return  # the rendezvous itself will say that MASTER_ADDR cannot be reached
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(
            f"the name of this node, {socket.gethostname()}, has no address that other nodes can reach: using "
            f"GLOO_SOCKET_IFNAME={interface}, the interface towards {os.environ['MASTER_ADDR']}",
            file=sys.stderr,
        )


def _reachable_by_name() -> bool:
    """Return whether this machine's own name means an address of one of its interfaces, other than the loopback's."""
    import psutil

    try:
        named = {str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None)}
    except OSError:
        return False
    own = {a.address.partition("%")[0] for addresses in psutil.net_if_addrs().values() for a in addresses}
    return any(address in own and not address.startswith("127.") and address != "::1" for address in named)


def _interface_towards(host: str) -> str | None:
    """Return the name of the interface whose address this machine uses to talk to `host`; None if there is no route."""
    import psutil

    try:
        family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as s:
            s.connect(address)  # of a datagram socket: chooses the route, sends nothing
            own = s.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if own in (a.address.partition("%")[0] for a in addresses):
            return name
    return None


def nodes_without(folder: Path) -> list[str]:
    """Return the host names of the nodes that do not see the `folder` of rank 0. A collective; leaves nothing behind.

    Every rank writes its part of a checkpoint, and rank 0 publishes the whole: a folder of its own on each node would
    leave checkpoints that nobody can load. Seen means: a file that rank 0 makes appears within 60 seconds.
    """
    import torch.distributed as dist

    if number_of_nodes() == 1:
        return []
    folder = folder.absolute()
    probe: list[Any] = [f".shared-{secrets.token_hex(8)}", 0]
    if dist.get_rank() == 0:  # the nearest folder that is there already: nothing is made before the run may start
        probe[1] = next(up for up, parent in enumerate((folder, *folder.parents)) if parent.is_dir())
    dist.broadcast_object_list(probe)
    name, levels_up = probe
    path = (folder, *folder.parents)[levels_up] / name
    if dist.get_rank() == 0:
        path.touch()
    dist.barrier()
    deadline = time.monotonic() + SECONDS_TO_APPEAR
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    blind: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(blind, None if path.exists() else socket.gethostname())
    if dist.get_rank() == 0:
        path.unlink()
    return sorted({host for host in blind if host is not None})
