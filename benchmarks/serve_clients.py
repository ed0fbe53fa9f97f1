"""Many clients at the server for a minute, a part of whom leave in the middle: nothing lost, no block leaked, memory flat.

    python benchmarks/serve_clients.py [--clients 200] [--seconds 60] [--leaving 0.25] [--url http://host:port --pid PID]

Starts `make serve`'s program over a random model of two layers (or takes the server at ``--url``). Each client asks one
request after another: chats and completions, streamed and whole, greedy and drawn, prompts of 1 to 300 words, 1 to 48
new tokens; a share of them closes the connection at a random moment. Some greedy requests are always the same, and their
answers must be too. Afterwards the server's own metrics have to say that nothing runs and every block is free, and
memory must not have grown since the first third. The last line is one JSON object; status 1 when any of this fails.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(Path(__file__).resolve().parent)]

from roofline import commit, machine  # noqa: E402

WORDS = [
    "the",
    "of",
    "model",
    "token",
    "cache",
    "block",
    "batch",
    "queue",
    "shared",
    "prefix",
    "long",
    "short",
    "red",
    "green",
    "one",
    "two",
    "three",
]
SAME = [f"Sort these words: {' '.join(WORDS[n : n + 5])}" for n in range(8)]  # asked again and again, greedily
MAY_GROW_MB = 32  # of memory, from the first third to the end


@dataclass
class Count:
    """What the clients saw."""

    asked: int = 0
    answered: int = 0
    left: int = 0
    lost: list[str] = field(default_factory=list)
    differing: int = 0
    same: int = 0
    tokens: int = 0
    first_s: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    expected: dict[str, str] = field(default_factory=dict)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--leaving", type=float, default=0.25, help="share of requests whose client leaves")
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--pid", type=int, help="its process, whose memory is watched")
    args = parser.parse_args(argv)
    if args.url:
        return report(args, asyncio.run(load(args, args.url, args.pid)), args.url)
    with tempfile.TemporaryDirectory() as folder, server(Path(folder)) as (url, pid):
        return report(args, asyncio.run(load(args, url, pid)), url)


# --- the server ---------------------------------------------------------------------------------------------------


@contextmanager
def server(folder: Path):
    """`make serve`'s program over random weights -> (address, process id); it has to end with status 0 on SIGTERM."""
    from dataclasses import replace

    from research.core.text.builtin import builtin_tokenizer
    from research.core.torch.decoder import Decoder
    from research.core.torch.weights import save_decoder
    from research.registry import model_config, model_spec

    spec = model_spec(model_config("qwen2_5_tiny"), tokens=builtin_tokenizer().vocab_size)
    save_decoder(Decoder(replace(spec, layers=2)).init_weights(3), folder / "weights")
    words = [
        "task=serve",
        "model=qwen2_5_tiny",
        "model.hf.num_hidden_layers=2",
        f"weights={folder / 'weights'}",
        "serve.port=0",
        "engine.num_blocks=4096",
    ]
    command = [sys.executable, str(REPO / "research/qwen2_5/run_qwen2_5.py"), *words]
    log = (folder / "log").open("w")
    program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=REPO)
    try:
        line = program.stdout.readline()
        if " is served at " not in line:
            raise SystemExit((folder / "log").read_text())
        yield line.split()[-1], program.pid
        program.send_signal(signal.SIGTERM)
        if program.wait(60) != 0:
            raise SystemExit(f"the server ended with {program.returncode}\n{(folder / 'log').read_text()[-3000:]}")
    finally:
        program.kill()
        program.wait()
        log.close()


def memory_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def metrics(url: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


# --- the clients --------------------------------------------------------------------------------------------------


async def load(args: argparse.Namespace, url: str, pid: int | None) -> Count:
    count, host = Count(), url.removeprefix("http://")
    for text in SAME:
        body = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 24}
        count.expected[text] = (await whole(host, "/v1/chat/completions", body))["choices"][0]["message"]["content"]
    end = time.monotonic() + args.seconds
    clients = [client(host, random.Random(number), end, args.leaving, count) for number in range(args.clients)]
    await asyncio.gather(watch(pid, end, count), *clients)
    return count


async def watch(pid: int | None, end: float, count: Count) -> None:
    while pid is not None and time.monotonic() < end:
        count.memory.append(memory_mb(pid))
        await asyncio.sleep(1)


async def client(host: str, draw: random.Random, end: float, leaving: float, count: Count) -> None:
    await asyncio.sleep(draw.random())
    while time.monotonic() < end:
        path, body, same = request(draw)
        count.asked += 1
        leaves = draw.random() < leaving
        try:
            if leaves:
                await leave(host, path, body, draw)
                count.left += 1
            elif body.get("stream"):
                await streamed(host, path, body, same, count)
            else:
                began = time.monotonic()
                answer = await whole(host, path, body)
                count.seconds.append(time.monotonic() - began)
                choice = answer["choices"][0]
                text = choice["message"]["content"] if "message" in choice else choice["text"]
                done(count, body, same, text, choice["finish_reason"], answer["usage"])
        except Exception as error:
            count.lost.append(f"{type(error).__name__}: {error}"[:300])


def request(draw: random.Random) -> tuple[str, dict, str | None]:
    """Path, body, and the text of a request whose answer is known."""
    kind = draw.random()
    stream = draw.random() < 0.6
    extra = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    if kind < 0.2:
        text = draw.choice(SAME)
        body = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 24}
        return "/v1/chat/completions", body | extra, text
    text = " ".join(draw.choices(WORDS, k=draw.randint(1, 300)))
    body = {"max_tokens": draw.randint(1, 48), "temperature": draw.choice([0, 0.7, 1.2]), "top_p": 0.95}
    if kind < 0.7:
        return "/v1/chat/completions", body | extra | {"messages": [{"role": "user", "content": text}]}, None
    return "/v1/completions", body | extra | {"prompt": text}, None


def done(count: Count, body: dict, same: str | None, text: str, finish: str | None, usage: dict | None) -> None:
    """An answer is whole when it says why it ended, and is as long as that means."""
    tokens = usage["completion_tokens"] if usage else -1
    whole = finish == "stop" or (finish == "length" and tokens == body["max_tokens"])
    if not whole:
        raise ValueError(f"ended with {finish} after {tokens} of {body['max_tokens']} tokens")
    count.answered += 1
    count.tokens += tokens
    if same is not None:
        count.same += 1
        count.differing += text != count.expected[same]


async def streamed(host: str, path: str, body: dict, same: str | None, count: Count) -> None:
    began, first, parts, finish, usage, ended = time.monotonic(), None, [], None, None, False
    reader, writer = await send(host, path, body)
    try:
        status, chunked = await head(reader)
        if status != 200 or not chunked:
            raise ValueError(f"status {status}: {(await reader.read(500)).decode(errors='replace')}")
        async for line in lines(reader):
            if line == "data: [DONE]":
                ended = True
            elif line.startswith("data: "):
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise ValueError(chunk["error"]["message"])
                usage = chunk.get("usage") or usage
                for choice in chunk["choices"]:
                    text = choice["delta"].get("content") if "delta" in choice else choice["text"]
                    finish = choice["finish_reason"] or finish
                    if text:
                        first = first or time.monotonic() - began
                        parts.append(text)
    finally:
        writer.close()
    if not ended:
        raise ValueError("the stream ended without [DONE]")
    if first is not None:
        count.first_s.append(first)
    count.seconds.append(time.monotonic() - began)
    done(count, body, same, "".join(parts), finish, usage)


async def whole(host: str, path: str, body: dict) -> dict:
    reader, writer = await send(host, path, body)
    try:
        status, length = await head(reader)
        content = await reader.readexactly(length)
    finally:
        writer.close()
    if status != 200:
        raise ValueError(f"status {status}: {content[:300].decode(errors='replace')}")
    return json.loads(content)


async def leave(host: str, path: str, body: dict, draw: random.Random) -> None:
    """Ask, read a little or nothing, and go: with a proper end or a reset, at a random moment."""
    reader, writer = await send(host, path, body)
    try:
        await asyncio.wait_for(reader.read(draw.randint(1, 2000)), draw.random() * 2)
        await asyncio.sleep(draw.random() * 0.3)
    except asyncio.TimeoutError:
        pass
    if draw.random() < 0.5:
        writer.transport.abort()
    else:
        writer.close()


async def send(host: str, path: str, body: dict):
    name, port = host.split(":")
    reader, writer = await asyncio.open_connection(name, int(port))
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    writer.write(head.encode() + b"Connection: close\r\n\r\n" + data)
    return reader, writer


async def head(reader: asyncio.StreamReader) -> tuple[int, int | bool]:
    """Status, and the body's length (True: in chunks)."""
    text = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    status = int(text.split()[1])
    if "transfer-encoding: chunked" in text:
        return status, True
    return status, int(text.split("content-length:")[1].split()[0])


async def lines(reader: asyncio.StreamReader):
    """Lines of a body that comes in chunks."""
    held = b""
    while True:
        size = int(await reader.readline(), 16)
        held += (await reader.readexactly(size + 2))[:-2]
        if size == 0:
            return
        *whole_lines, held = held.split(b"\n")
        for line in whole_lines:
            yield line.decode()


# --- what came of it ----------------------------------------------------------------------------------------------


def report(args: argparse.Namespace, count: Count, url: str) -> int:
    deadline = time.monotonic() + 30
    while (now := metrics(url))["qwen_open_requests"] or now["qwen_engine_running"] or now["qwen_engine_waiting"]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
    leaked = now["qwen_engine_blocks"] - now["qwen_engine_free_blocks"]
    open_requests = now["qwen_open_requests"] + now["qwen_engine_running"] + now["qwen_engine_waiting"]
    third = len(count.memory) // 3
    grown = statistics.median(count.memory[-5:]) - statistics.median(count.memory[third : third + 5]) if third else 0.0
    good = not (count.lost or count.differing or leaked or open_requests or grown > MAY_GROW_MB) and count.answered > 0
    for line in count.lost[:5]:
        print(f"lost: {line}")
    print(
        json.dumps(
            {
                "benchmark": "serve_clients",
                "commit": commit(),
                "machine": machine(),
                "clients": args.clients,
                "seconds": args.seconds,
                "asked": count.asked,
                "answered": count.answered,
                "left_in_the_middle": count.left,
                "lost": len(count.lost),
                "repeated": count.same,
                "differing": count.differing,
                "leaked_blocks": leaked,
                "still_open": open_requests,
                "memory_mb_after_a_third": round(statistics.median(count.memory[third : third + 5]), 1)
                if third
                else None,
                "memory_grown_mb": round(grown, 1),
                "answered_per_s": round(count.answered / args.seconds, 1),
                "new_tokens_per_s": round(count.tokens / args.seconds, 1),
                "first_token_s": quantiles(count.first_s),
                "request_s": quantiles(count.seconds),
                "good": good,
            }
        )
    )
    return 0 if good else 1


def quantiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values) or [0.0]
    return {name: round(ordered[int(share * (len(ordered) - 1))], 3) for name, share in (("p50", 0.5), ("p95", 0.95))}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
