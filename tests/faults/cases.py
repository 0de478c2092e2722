"""The faults. Each case disturbs one run (or some) and has it compared with the undisturbed one."""

import itertools
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.process import BaseProcess

import brokers
import traffic
from disks import small_disk
from kafka import KafkaAdminClient, KafkaProducer, TopicPartition
from marks import PHASES, PLANNING, WAITING
from proxy import Proxy
from subjects import real
from watching import Watch
from world import World, close_epochs

RECOVERY_S = 60
"""Within what time a job must commit again once the broker serves."""

BEYOND_TIMEOUTS_S = 75
"""Longer than the clients' time-outs (30 s a request) and than a stall of reading (60 s)."""

DISK_MB = 64
FULL_S = 10

_LOOK_S = 0.0005
_AROUND = (WAITING, PLANNING)


@dataclass
class Case:
    """A case at work.

    Attributes:
      name: of the case.
      world: what it disturbs.
      chance: decides what is disturbed when; seeded.
      kills: how many there shall be, where a case kills jobs.
    """

    name: str
    world: World
    chance: random.Random
    kills: int


def kills(case: Case) -> None:
    """SIGKILL of the job in every phase, again and again on the same state until the log ends."""
    world, hit = case.world, Counter[str]()
    watch, states = world.watch(case.name), itertools.count(2)
    while hit.total() < case.kills or (set(PHASES) - set(hit) and hit.total() < 5 * case.kills):
        phase = min(PHASES, key=lambda phase: hit[phase])
        found = _kill(watch, phase, case.chance, world.records)
        if found is None:
            world.compare(watch)
            watch = world.watch(f"{case.name}-{next(states)}")
            continue
        hit[found] += 1
        world.did(f"SIGKILL while {found}")
        print(f"  kill {hit.total()}: aimed at {phase}, hit {found}", flush=True)
    world.promise(set(PHASES) <= set(hit), f"phases never hit: {set(PHASES) - set(hit)}")
    world.compare(watch)


def _kill(watch: Watch, phase: str, chance: random.Random, records: int) -> str | None:
    """Kill a job some way into a phase; returns where it was. None: it has read all records."""
    watch.marks.aim(phase, chance.randint(1, 3))
    with watch.running() as process:
        watch.until(lambda: watch.marks.rings(1) or watch.seen == records, process, 0)
        if not watch.marks.rung:
            return None
        time.sleep(chance.uniform(0, 0.8 * watch.marks.mean_seconds(phase)))
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
    return watch.marks.phase


def broker_killed(case: Case) -> None:
    """SIGKILL and restart of the broker in the middle of slices."""
    watch, broker = case.world.watch(case.name), case.world.broker
    with watch.running() as process:
        for _ in range(2):
            _in_mid_slice(watch, process)
            broker.kill()
            time.sleep(case.chance.uniform(0, 5))
            broker.start()
            _recovered(case, watch, process, "broker SIGKILLed and restarted")
    case.world.compare(watch)


def broker_stopped(case: Case) -> None:
    """SIGSTOP of the broker for longer than the clients wait."""
    watch, broker = case.world.watch(case.name), case.world.broker
    with watch.running() as process:
        _in_mid_slice(watch, process)
        brokers.pause(broker)
        time.sleep(BEYOND_TIMEOUTS_S)
        brokers.resume(broker)
        _recovered(case, watch, process, f"broker SIGSTOPped for {BEYOND_TIMEOUTS_S} s")
    case.world.compare(watch)


def connections(case: Case) -> None:
    """Connections refused, stalled and reset on their way to the broker."""
    broker = case.world.broker
    own, port = brokers.own_port(broker), brokers.free_port()
    with closing(Proxy(port, own)) as proxy:
        brokers.advertise(broker, port)
        watch = case.world.watch(case.name)
        with watch.running() as process:
            for fault, begin, seconds, end in (
                ("connections refused", proxy.refuse, 20, proxy.accept),
                ("connections stalled", proxy.stall, 40, proxy.flow),
                ("connections reset", proxy.reset, 0, proxy.flow),
                ("connections reset", proxy.reset, 0, proxy.flow),
            ):
                _in_mid_slice(watch, process)
                begin()
                time.sleep(seconds)
                end()
                _recovered(case, watch, process, fault)
        case.world.compare(watch)
    brokers.advertise(broker, own)


def full_state(case: Case) -> None:
    """No space left for the state directory."""
    _full_disk(case, "state")


def full_archive(case: Case) -> None:
    """No space left for the archive."""
    _full_disk(case, "archive")


def _full_disk(case: Case, part: str) -> None:
    folder = case.world.folder / case.name / part
    with small_disk(folder, DISK_MB) as disk:
        watch = case.world.watch(case.name)
        with watch.running() as process:
            _in_mid_slice(watch, process)
            disk.fill()
            time.sleep(FULL_S)
            disk.empty()
            _recovered(case, watch, process, f"no space left for the {part}")
        case.world.compare(watch)


def new_partition(case: Case) -> None:
    """A topic that gains a partition while it is watched."""
    topic, server = f"{case.name}-log", case.world.broker.bootstrap
    records = traffic.records(real(400))
    traffic.to_topic(case.world.broker, topic, records)
    watch = case.world.watch(case.name, topic)
    extra, total = traffic.PARTITIONS, sum(map(len, records)) + len(records[0])
    with watch.running() as process:
        watch.until_next_commit(process)
        with closing(KafkaAdminClient(bootstrap_servers=server)) as admin:
            admin.create_partitions({topic: extra + 1})
        with closing(KafkaProducer(bootstrap_servers=server)) as producer:
            for value in records[0]:
                producer.send(topic, value, partition=extra)
        case.world.did("partition added")
        watch.until(lambda: watch.seen == total, process)
    # only now: what is read after the end of all epochs would open one that nothing closes
    rows = watch.finish(total + close_epochs(case.world.broker, topic, 400)).rows("conversations")
    added = [row["offset"] for row in rows if row["partition"] == extra]
    first = [row["offset"] for row in rows if row["partition"] == 0]
    case.world.promise(added == first, "a partition that was added is read from its beginning")
    print(f"  {len(added)} rows of the partition that was added")


def deleted(case: Case) -> None:
    """Records deleted by retention before they were read, one slice of them begun already."""
    topic, server = f"{case.name}-log", case.world.broker.bootstrap
    records = traffic.records(real(2000))
    total = sum(map(len, records))
    traffic.to_topic(case.world.broker, topic, records)
    total += close_epochs(case.world.broker, topic, 2000)
    watch = case.world.watch(case.name, topic)
    with watch.running() as process:
        _in_mid_slice(watch, process)
        os.kill(process.pid or 0, signal.SIGKILL)
    read = {
        each.id.partition: each.offset for each in (watch.commit.progress if watch.commit else ())
    }
    gone = {partition: read.get(partition, 0) + 50 for partition in range(traffic.PARTITIONS)}
    with closing(KafkaAdminClient(bootstrap_servers=server)) as admin:
        admin.delete_records({TopicPartition(topic, each): to for each, to in gone.items()})
    case.world.did("records deleted unread")
    run = watch.finish(total)
    lost = run.commit.total_ledger.lost
    case.world.promise(lost == 50 * traffic.PARTITIONS, f"{lost} records counted as lost")
    case.world.promise(run.commit.total_ledger.seen + lost == total, "seen and lost are all")
    print(f"  {lost} of {total} records counted as lost")


def _in_mid_slice(watch: Watch, process: BaseProcess) -> None:
    """Wait until a slice that is not the first is being run."""
    watch.until(lambda: bool(watch.commit) and watch.marks.phase not in _AROUND, process, _LOOK_S)


def _recovered(case: Case, watch: Watch, process: BaseProcess, fault: str) -> None:
    seconds = watch.until_next_commit(process)
    case.world.did(fault, seconds)
    case.world.promise(seconds <= RECOVERY_S, f"{fault}: committed again after {seconds:.0f} s")
    print(f"  {fault}: committed again after {seconds:.1f} s", flush=True)


CASES: dict[str, Callable[[Case], None]] = {
    "kills": kills,
    "broker-killed": broker_killed,
    "broker-stopped": broker_stopped,
    "connections": connections,
    "full-state": full_state,
    "full-archive": full_archive,
    "new-partition": new_partition,
    "deleted": deleted,
}
