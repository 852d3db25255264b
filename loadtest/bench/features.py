"""Measures what beam search costs, and what a chat's third turn saves.

    python -m loadtest.bench.features [--rounds 5] [--seconds 15] [--pairs 12] \\
        [--checkpoint FOLDER]

Starts one server with the random checkpoint of 108M parameters in bfloat16 (written to --checkpoint
unless it is there already, by default to a temporary folder).

Beams: 8 users ask about new pictures for 32 tokens each, in alternating rounds greedily and with 5
beams. Beams may take at most 3 times as long (median ratio within rounds).

Third turn: one user asks twice about a new picture and then a third time, some 130 tokens in all.
The third answer's first text may take at most half as long as that of the same chat about a picture
that the server has never seen, decoding and encoding included (median ratio within pairs).

Exits with 1 if a limit is exceeded.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp

from loadtest.bench import client, script, servers
from loadtest.bench.checkpoint import checkpoint_at
from loadtest.bench.servers import Endpoint
from loadtest.bench.workload import Request, Workload, question
from loadtest.stats import median_ratio, medians

SEED = 0
WARM_UP_SERIES, BEAM_SERIES, CHAT_SERIES = range(3)
USERS, TOKENS = 8, 32
BEAMS: dict[str, Any] = {"num_beams": 5}
MAX_BEAM_RATIO, MAX_THIRD_TURN_RATIO = 3.0, 0.5
PICTURES_PER_S = 20  # more than the server answers
WORDS, ANSWER_TOKENS = 14, 20  # of each turn of the chat

Pair = tuple[float, float]


def main() -> None:
    parser = script.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=15, help="length of each half of a round")
    parser.add_argument("--pairs", type=int, default=12, help="chats")
    parser.add_argument("--checkpoint", type=Path, help="folder; written if missing")
    parser.add_argument("--log", type=Path, default=Path("results/features.log"), help="server log")
    args = parser.parse_args()
    workload = Workload(SEED)
    with (
        script.one_line_failures(),
        checkpoint_at(args.checkpoint) as checkpoint,
        servers.running("blip2-serve", checkpoint, args.log) as endpoint,
    ):
        asyncio.run(warm_up(endpoint, workload))
        speeds = [beam_round(endpoint, workload, n, args.seconds) for n in range(args.rounds)]
        times = asyncio.run(third_turns(endpoint, workload, args.pairs))
        report(speeds, times)


def report(speeds: list[Pair], times: list[Pair]) -> None:
    """Prints the medians. Raises Missed if a limit is exceeded."""
    slower, saved = median_ratio(speeds), median_ratio(times)
    greedy, beams = medians(speeds)
    print(
        f"{USERS} users, {TOKENS} tokens: {greedy:.0f} tokens/s greedily, {beams:.0f} with "
        f"{BEAMS['num_beams']} beams, which take {slower:.2f} times as long"
    )
    warm, cold = medians(times)
    print(
        f"first text of a third turn after {1000 * warm:.0f} ms, about a new picture after "
        f"{1000 * cold:.0f} ms: ratio {saved:.2f}"
    )
    if slower > MAX_BEAM_RATIO:
        raise script.Missed(f"beams take more than {MAX_BEAM_RATIO:g} times as long")
    if saved > MAX_THIRD_TURN_RATIO:
        raise script.Missed(f"a third turn takes more than {MAX_THIRD_TURN_RATIO:g} of a cold one")


async def warm_up(endpoint: Endpoint, workload: Workload) -> None:
    for more in ({}, BEAMS):
        requests = alike(workload.requests(WARM_UP_SERIES), more)
        await client.measure(endpoint, requests, users=USERS, seconds=0, stream=False)


def beam_round(endpoint: Endpoint, workload: Workload, number: int, seconds: float) -> Pair:
    """Tokens per second greedily and with beams; the order alternates."""
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
    """The requests with answers of one length and these further fields."""
    return (replace(request, max_tokens=TOKENS, more=more) for request in requests)


async def third_turns(endpoint: Endpoint, workload: Workload, pairs: int) -> list[Pair]:
    """Seconds until the first text, about a known and a new picture; the order alternates."""
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
    """Asks the first two questions of a chat, and returns the request for the third."""
    request = Request(question(rng, WORDS), picture, ANSWER_TOKENS)
    for _ in range(2):
        answer = await client.ask(session, endpoint, request, stream=False)
        earlier = (*request.earlier, (request.question, answer.text))
        request = replace(request, question=question(rng, WORDS), earlier=earlier)
    return request


if __name__ == "__main__":
    main()
