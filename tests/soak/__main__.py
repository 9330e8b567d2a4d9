"""`make soak`: what takes too long for every change. See README.md.

python -m tests.soak                          all of it
python -m tests.soak rounds [--rounds 200]    parts are killed while jobs are on their way; --seed SEED plays one round
python -m tests.soak drain [--jobs 10000]     so many jobs submitted, and drained by three workers
python -m tests.soak storms [--storms 20]      nodes of three NATS servers and three members of etcd are lost; --seed SEED plays one
python -m tests.soak batch [--lines 50000]    one large batch, over a killed gateway
python -m tests.soak tenants [--minutes 60]   one tenant floods, another measures what it notices
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.scale.losing import draw_losses, storm
from tests.scale.three import Three
from tests.soak import batches, tenants
from tests.soak.drain import drain
from tests.soak.faults import mended
from tests.soak.rounds import Rounds, chaos_cluster


async def play(folder: Path, seeds: list[str]) -> bool:
    """Rounds on one cluster. Whether every promise held."""
    wrong: list[str] = []
    began = time.monotonic()
    async with chaos_cluster(folder) as cluster:
        rounds = Rounds(cluster)
        for number, seed in enumerate(seeds, 1):
            at = time.monotonic()
            found = await rounds.play(seed)
            print(
                f"round {number}/{len(seeds)}, seed {seed}: {time.monotonic() - at:.1f} s",
                *found,
                sep="\n  ",
                flush=True,
            )
            wrong += found
        found = await rounds.look_back()
        print("afterwards:", *(found or ["records and words agree"]), sep="\n  ")
        wrong += found
    minutes = (time.monotonic() - began) / 60
    print(f"{len(seeds)} rounds, {rounds.answered} jobs in {minutes:.1f} minutes: {len(wrong)} broken promises")
    return not wrong


async def weather(folder: Path, seeds: list[str]) -> bool:
    """Storms on one cluster of three of each. Whether every promise held."""
    wrong: list[str] = []
    async with Three(folder) as cluster:
        for _ in range(2):
            await mended(cluster.start_gateway)
        await asyncio.gather(*(cluster.start_worker("echo") for _ in range(2)))
        for number, seed in enumerate(seeds, 1):
            found, load, took = await storm(cluster, draw_losses(random.Random(seed)))
            refused = ", ".join(f"{count} {what}" for what, count in load.refused.most_common())
            print(f"storm {number}/{len(seeds)}, seed {seed}: {'; '.join(took)}", flush=True)
            print(f"  answered {dict(load.done)}, accepted {len(load.accepted)}, refused {refused or 'none'}")
            print(*(f"  seed {seed}: {text}" for text in found), sep="\n", flush=True)
            wrong += found
    print(f"{len(seeds)} storms: {len(wrong)} broken promises")
    return not wrong


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; exits with 2 when it makes no sense."""
    lines = (__doc__ or "").split("\n")
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak",
        description=lines[0],
        epilog="\n".join(lines[2:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "what", nargs="?", choices=["all", "rounds", "storms", "drain", "batch", "tenants"], default="all"
    )
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--storms", type=int, default=20)
    parser.add_argument(
        "--seed", default="", help="of rounds or storms: the one to play, or what those of many begin with"
    )
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--lines", type=int, default=50_000)
    parser.add_argument("--minutes", type=float, default=60.0, help="of tenants")
    parser.add_argument("--keep", action="store_true", help="keep the folder of logs and data, and say where it is")
    return parser.parse_args(argv)


def seeds_of(options: argparse.Namespace, flag: str, count: int) -> list[str]:
    """One that is given is one round, unless more are asked for."""
    if options.seed and flag not in sys.argv:
        return [options.seed]
    first = options.seed or f"soak-{random.SystemRandom().randrange(10**6)}"
    return [f"{first}.{number}" for number in range(count)]


async def main(options: argparse.Namespace, folder: Path) -> int:
    """The exit code."""
    well = True
    if options.what in {"all", "rounds"}:
        well = await play(folder / "rounds", seeds_of(options, "--rounds", options.rounds))
    if options.what in {"all", "storms"}:
        well = await weather(folder / "storms", seeds_of(options, "--storms", options.storms)) and well
    if options.what in {"all", "drain"}:
        await drain(folder / "drain", options.jobs)
    if options.what in {"all", "batch"}:
        await batches.main(options.lines, kill=True)
    if options.what in {"all", "tenants"}:
        well = await tenants.run(folder / "tenants", options.minutes) and well
    return 0 if well else 1


if __name__ == "__main__":
    chosen = parse(sys.argv[1:])
    place = Path(tempfile.mkdtemp(prefix="nexus-soak-"))
    code = asyncio.run(main(chosen, place))
    if chosen.keep or code:
        print(f"logs and data: {place}")
    else:
        shutil.rmtree(place)
    sys.exit(code)
