"""What beams cost beside greedy answers, and what a chat's third turn saves.

    python loadtest/bench/features.py [--rounds 5] [--seconds 15] [--pairs 12] \\
        [--checkpoint FOLDER]

Starts one server with the random checkpoint of 108M parameters in bfloat16 (written for the run, or
into --checkpoint).

Beams: 8 users ask about new pictures for 32 tokens each, in alternating rounds greedily and with 5
beams. Prints the medians of tokens per second of the answers, and of the ratios within rounds: 5
beams must take at most 3 times as long.

Third turn: one user asks twice about a new picture, and then a third time (some 130 tokens of
picture, questions and answers). Prints the median time until the first text of that third answer;
the same of the same chat about a picture that the server has not seen, decoding and encoding it
included; and the median of the ratios within pairs, which must be at most a half.

Exits with 1 where a limit is not kept.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import client, script, servers
from bench.checkpoint import checkpoint_at
from bench.servers import Endpoint
from bench.workload import Request, Workload, question

SEED = 0
WARM_UP_SERIES, BEAM_SERIES, CHAT_SERIES = range(3)
USERS, TOKENS = 8, 32
BEAMS: dict[str, Any] = {"num_beams": 5}
MOST_TIMES, MOST_OF_COLD = 3.0, 0.5
PICTURES_PER_S = 20  # more than are asked for
WORDS, ANSWER_TOKENS = 14, 20  # of each turn of the chat

Pair = tuple[float, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=15, help="of each half of a round")
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--checkpoint", type=Path, help="a folder; written if there is none")
    parser.add_argument("--log", type=Path, default=Path("results/features.log"))
    args = parser.parse_args()
    workload = Workload(SEED)
    with (
        script.failures_told(),
        checkpoint_at(args.checkpoint) as checkpoint,
        servers.running("blip2-serve", checkpoint, args.log) as endpoint,
    ):
        asyncio.run(warm_up(endpoint, workload))
        speeds = [beam_round(endpoint, workload, n, args.seconds) for n in range(args.rounds)]
        times = asyncio.run(third_turns(endpoint, workload, args.pairs))
        slower, saved = median_ratio(speeds), median_ratio(times)
        greedy, beams = medians(speeds)
        print(
            f"{USERS} users, {TOKENS} tokens: greedy {greedy:.0f} tokens/s, "
            f"{BEAMS['num_beams']} beams {beams:.0f}: {slower:.2f} times as long"
        )
        warm, cold = medians(times)
        print(
            f"first text of a third turn: {1000 * warm:.0f} ms, of the same chat about a new "
            f"picture {1000 * cold:.0f} ms: {saved:.2f} of it"
        )
        if slower > MOST_TIMES:
            raise script.Missed(f"beams take more than {MOST_TIMES:g} times as long")
        if saved > MOST_OF_COLD:
            raise script.Missed(f"a third turn takes more than {MOST_OF_COLD:g} of a cold one")


async def warm_up(endpoint: Endpoint, workload: Workload) -> None:
    for more in ({}, BEAMS):
        requests = alike(workload.requests(WARM_UP_SERIES), more)
        await client.measure(endpoint, requests, users=USERS, seconds=0, stream=False)


# -- beams -----------------------------------------------------------------------------------------


def beam_round(endpoint: Endpoint, workload: Workload, number: int, seconds: float) -> Pair:
    """Tokens per second, greedily and with beams; which comes first alternates."""
    speeds = {}
    for name in ("greedy", "beams") if number % 2 == 0 else ("beams", "greedy"):
        workload.prepare(int(PICTURES_PER_S * seconds))
        requests = alike(workload.requests(BEAM_SERIES, number), BEAMS if name == "beams" else {})
        window = asyncio.run(
            client.measure(endpoint, requests, users=USERS, seconds=seconds, stream=False)
        )
        speeds[name] = window.per_second()[1]
        print(f"round {number + 1}, {name}: {speeds[name]:.0f} tokens/s", flush=True)
    return speeds["greedy"], speeds["beams"]


def alike(requests: Iterator[Request], more: dict[str, Any]) -> Iterator[Request]:
    """The requests with one length of answers, and these fields."""
    return (replace(request, max_tokens=TOKENS, more=more) for request in requests)


# -- the third turn --------------------------------------------------------------------------------


async def third_turns(endpoint: Endpoint, workload: Workload, pairs: int) -> list[Pair]:
    """Seconds until the first text, known and new; which comes first alternates."""
    workload.prepare(2 * pairs + 2)
    pictures = (request.picture for request in workload.requests(CHAT_SERIES))
    rng = random.Random(SEED)
    times = []
    async with client.new_session() as session:
        for number in range(pairs):
            third = await two_turns(session, endpoint, next(pictures), rng)
            new = replace(third, picture=next(pictures))
            seconds = {}
            for request in (third, new) if number % 2 == 0 else (new, third):
                answer = await client.ask(session, endpoint, request, stream=True)
                seconds[request.picture] = answer.texts[0] - answer.started
            times.append((seconds[third.picture], seconds[new.picture]))
    return times


async def two_turns(
    session: aiohttp.ClientSession, endpoint: Endpoint, picture: str, rng: random.Random
) -> Request:
    """The third turn of a chat of which the first two were just asked."""
    request = Request(question(rng, WORDS), picture, ANSWER_TOKENS)
    for _ in range(2):
        answer = await client.ask(session, endpoint, request, stream=False)
        earlier = (*request.earlier, (request.question, answer.text))
        request = replace(request, question=question(rng, WORDS), earlier=earlier)
    return request


# -- figures ---------------------------------------------------------------------------------------


def medians(pairs: Sequence[Pair]) -> Pair:
    first, second = zip(*pairs, strict=True)
    return statistics.median(first), statistics.median(second)


def median_ratio(pairs: Sequence[Pair]) -> float:
    """Of the first to the second, taken within each pair, where the machine was the same."""
    return statistics.median(first / second for first, second in pairs)


if __name__ == "__main__":
    main()
