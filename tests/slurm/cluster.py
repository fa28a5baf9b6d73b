"""A little Slurm of its own on this machine: Debian's munged, slurmctld and two slurmd, without systemd and as root.

    python -m tests.slurm.cluster FOLDER     # starts it, prints how to use it, stops it at Ctrl-C

Nodes n1 to n4 are this machine four times, each with two CPUs. On n1 and n2, partition `high` requeues what it
preempts in `low` (the default) and in `nograce`; `aside` has n3 and n4. `big` has 64 nodes of 8 GPUs that are never
started: templates are offered to it with `sbatch --test-only`.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
NODES = ("n1", "n2", "n3", "n4")
START_SECONDS = 120.0
KILL_WAIT = 30  # seconds between SIGTERM and SIGKILL, as is Slurm's default
GRACE = 60  # seconds that a preempted job of `low` has

CONF = """
ClusterName=little
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
SlurmctldParameters=idle_on_node_suspend
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,defer=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait={kill_wait}
FirstJobId={first_job}
OverTimeLimit=0
MinJobAge=600
SlurmdTimeout=300
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=-1
NodeName={nodes} NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports}] CPUs=2 RealMemory=1000 State=UNKNOWN
NodeName=big[01-64] CPUs=64 RealMemory=1000000 Gres=gpu:8 State=CLOUD
PartitionName=low Nodes=n[1-2] Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime={grace}
PartitionName=nograce Nodes=n[1-2] MaxTime=INFINITE PriorityTier=1 GraceTime=0
PartitionName=high Nodes=n[1-2] MaxTime=INFINITE PriorityTier=10
PartitionName=aside Nodes=n[3-4] MaxTime=INFINITE PriorityTier=1
PartitionName=big Nodes=big[01-64] MaxTime=INFINITE
"""


def missing() -> list[str]:
    """Programs of Debian's slurmctld, slurmd, slurm-client and munge that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]


def _path() -> str:
    return os.environ["PATH"] + ":/usr/sbin:/sbin"


class Cluster:
    """The running cluster. `environment` lets Slurm's commands find it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "PATH": _path(), "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Errors: RuntimeError with the end of the daemons' logs if the nodes do not come up."""
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o400)
        self._start(
            "munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket",
            f"--key-file={self.folder}/munge.key", f"--pid-file={self.folder}/munged.pid",
            f"--log-file={self.folder}/munged.log", f"--seed-file={self.folder}/munged.seed",
        )  # fmt: skip
        controller, *ports = _free_ports(1 + len(NODES))
        (self.folder / "slurm.conf").write_text(
            CONF.format(
                host=socket.gethostname(), folder=self.folder, controller=controller, nodes=",".join(NODES),
                ports=",".join(map(str, ports)), kill_wait=KILL_WAIT, grace=GRACE,
                # The ranks' port comes from the job id: two clusters on this machine must not have the same ids.
                first_job=1 + os.getpid() % 95 * 200,
            )
        )  # fmt: skip
        self._start("slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)
        deadline = time.monotonic() + START_SECONDS
        idle = [word for node in NODES for word in (node, "idle")]
        while self.run("sinfo", "-h", "-N", "-p", "low,aside", "-o", "%N %t").stdout.split() != idle:
            if time.monotonic() > deadline:
                logs = [f"{path}:\n{path.read_text()[-2000:]}" for path in sorted(self.folder.glob("*.log"))]
                raise RuntimeError("the little cluster does not start\n" + "\n".join(logs))
            time.sleep(0.2)

    def start_node(self, node: str) -> None:
        self._start("slurmd", "-D", "-N", node, name=f"slurmd-{node}")

    def kill_node(self, node: str) -> None:
        """End a node's slurmd at once; the slurmstepd of its steps live on."""
        self._daemons[f"slurmd-{node}"].kill()
        self._daemons.pop(f"slurmd-{node}").wait()

    def stop(self) -> None:
        """Cancel all jobs, end all daemons."""
        if "slurmctld" in self._daemons:
            self.run("scancel", "--user=root")
            deadline = time.monotonic() + 4 * KILL_WAIT
            while self.run("squeue", "-h").stdout.strip() and time.monotonic() < deadline:  # jobs that end count, too
                time.sleep(0.2)
        for daemon in reversed(self._daemons.values()):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()

    def run(
        self, *words: str | Path, variables: Mapping[str, str] = MappingProxyType({}), cwd: Path = ROOT
    ) -> subprocess.CompletedProcess[str]:
        """One of Slurm's commands, or any other with Slurm's environment and these variables."""
        return subprocess.run(
            [str(word) for word in words], env=self.environment | variables, cwd=cwd, text=True, capture_output=True,
            timeout=300, check=False,
        )  # fmt: skip

    def _start(self, *words: str, name: str = "") -> None:
        name = name or words[0]
        with (self.folder / f"{name}.out").open("ab") as output:
            # A daemon ends with this process, however that ends.
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *words], env=self.environment, stdout=output, stderr=output,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip


def _free_ports(count: int) -> list[int]:
    with_ports = [socket.socket() for _ in range(count)]
    try:
        for each in with_ports:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in with_ports]
    finally:
        for each in with_ports:
            each.close()


@contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    """A cluster that ends with the block."""
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def main(words: Sequence[str]) -> None:
    """Run a cluster until Ctrl-C or SIGTERM."""
    folder = Path(words[0]).resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with running(folder):
        print(f"export PATH=$PATH:/usr/sbin SLURM_CONF={folder}/slurm.conf", flush=True)
        signal.pause()


if __name__ == "__main__":
    main(sys.argv[1:])
