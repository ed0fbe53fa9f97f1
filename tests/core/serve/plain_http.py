"""Requests by hand: what OpenAI's client would not send, and connections that can be closed in the middle."""

from __future__ import annotations

import json
import socket
import time
import urllib.error
import urllib.request

CHAT = {"messages": [{"role": "user", "content": "Hello"}]}


def post(server, path="/v1/chat/completions", body=CHAT, headers=(), raw=None):
    """(status, headers, parsed body) of one request; ``raw``: these bytes instead of ``body`` as JSON."""
    data = json.dumps(body).encode() if raw is None else raw
    request = urllib.request.Request(server.url + path, data, {"Content-Type": "application/json", **dict(headers)})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.headers, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, error.headers, json.loads(error.read())


def get(server, path, headers=()):
    try:
        with urllib.request.urlopen(urllib.request.Request(server.url + path, headers=dict(headers)), timeout=20) as a:
            return a.status, a.headers, a.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read().decode()


def until(holds, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.01)


def open_socket(server, data: bytes) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.sendall(data)
    return connection


def request_bytes(body: dict, path="/v1/chat/completions") -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data
