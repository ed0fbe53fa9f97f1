"""Released models from a hub: resumed, checksummed, each file under its name only when it is whole.

Hugging Face's and ModelScope's HTTP interfaces, with nothing but the standard library. ``HF_ENDPOINT`` and
``MODELSCOPE_ENDPOINT`` name mirrors, ``HF_TOKEN`` and ``MODELSCOPE_API_TOKEN`` give access to closed models.
"""

from __future__ import annotations

import fnmatch
import hashlib
import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from research.core.errors import WeightsError
from research.core.weights.staging import check_space

WANTED = (
    "*.json", "*.safetensors", "*.txt", "*.tiktoken", "*.jinja", "*.py", "LICENSE*", "NOTICE*",
)  # fmt: skip
PICKLES = ("pytorch_model*.bin",)
_BLOCK = 1 << 20
_TRIES = 5
_TIMEOUT_S = 60
RETRY_S = 1.0  # before the first new try; doubled each time


@dataclass(frozen=True)
class Hub:
    """One hub: ``list_url`` and ``file_url`` take repo, revision and path."""

    name: str
    endpoint: str
    token: str | None
    revision: str

    def list_url(self, repo: str) -> str:
        if self.name == "huggingface":
            return f"{self.endpoint}/api/models/{repo}/tree/{_quote(self.revision)}?recursive=true"
        query = urllib.parse.urlencode({"Revision": self.revision, "Recursive": "true"})
        return f"{self.endpoint}/api/v1/models/{repo}/repo/files?{query}"

    def file_url(self, repo: str, path: str) -> str:
        if self.name == "huggingface":
            return f"{self.endpoint}/{repo}/resolve/{_quote(self.revision)}/{urllib.parse.quote(path)}"
        query = urllib.parse.urlencode({"Revision": self.revision, "FilePath": path})
        return f"{self.endpoint}/api/v1/models/{repo}/repo?{query}"


def _quote(text: str) -> str:
    return urllib.parse.quote(text, safe="")


@dataclass(frozen=True)
class RemoteFile:
    """``sha256`` of its bytes, or ``git`` (sha-1 as git names a blob) for small files of Hugging Face."""

    path: str
    size: int
    sha256: str | None = None
    git: str | None = None

    def matches(self, file: Path) -> bool:
        """Whether ``file`` has these bytes."""
        if file.stat().st_size != self.size:
            return False
        digest = hashlib.sha256() if self.sha256 else hashlib.sha1(f"blob {self.size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
        known = self.sha256 or self.git
        return known is None or digest.hexdigest() == known


def hub(name: str, revision: str | None = None) -> Hub:
    """``huggingface`` or ``modelscope``, with its mirror and token from the environment."""
    if name == "huggingface":
        endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        return Hub(name, endpoint.rstrip("/"), os.environ.get("HF_TOKEN"), revision or "main")
    endpoint = os.environ.get("MODELSCOPE_ENDPOINT") or "https://modelscope.cn"
    return Hub(name, endpoint.rstrip("/"), os.environ.get("MODELSCOPE_API_TOKEN"), revision or "master")


def list_files(source: Hub, repo: str) -> list[RemoteFile]:
    """Every file of a repository. Raises :class:`WeightsError` when it does not exist or cannot be reached."""
    url, out = source.list_url(repo), []
    while url:
        try:
            with _open(source, url, repo) as answer:
                content, link = json.loads(answer.read()), answer.headers.get("Link", "")
            out += _huggingface_files(content) if source.name == "huggingface" else _modelscope_files(content)
        except (OSError, http.client.HTTPException) as error:
            raise WeightsError(str(error), where=url, hint=_mirror(source)) from None
        except (ValueError, KeyError, TypeError):
            raise WeightsError(f"{source.name} did not answer with a list of files", where=url) from None
        url = _next_page(link)
    return out


def _huggingface_files(content: list) -> list[RemoteFile]:
    return [
        RemoteFile(
            item["path"],
            int(item["size"]),
            (item.get("lfs") or {}).get("oid", "").removeprefix("sha256:") or None,
            item.get("oid"),
        )
        for item in content
        if item["type"] == "file"
    ]


def _modelscope_files(content: dict) -> list[RemoteFile]:
    return [
        RemoteFile(item["Path"], int(item["Size"]), item.get("Sha256") or None)
        for item in content["Data"]["Files"]
        if item["Type"] != "tree"
    ]


def _next_page(link: str) -> str | None:
    for part in link.split(","):
        if 'rel="next"' in part:
            return part[part.index("<") + 1 : part.index(">")]
    return None


def chosen_files(files: Sequence[RemoteFile], allow_pickle: bool) -> list[RemoteFile]:
    """The files of a model's folder: safetensors, configuration, vocabulary; pickles only where there is nothing else."""
    top = [file for file in files if "/" not in file.path]
    wanted = [file for file in top if any(fnmatch.fnmatch(file.path, pattern) for pattern in WANTED)]
    if not any(file.path.endswith(".safetensors") for file in wanted):
        pickles = [file for file in top if any(fnmatch.fnmatch(file.path, pattern) for pattern in PICKLES)]
        if pickles and not allow_pickle:
            raise WeightsError(
                "only pickled weights there; a pickle can run code when it is opened",
                where=pickles[0].path,
                hint="allow_pickle=true if you trust their source",
            )
        wanted += pickles
    return wanted


def download(
    source: Hub,
    repo: str,
    folder: Path,
    *,
    allow_pickle: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    log: Callable[[str], None] = lambda line: None,
) -> list[RemoteFile]:
    """Fetch a model into ``folder``; files that are there with the right checksum stay, parts are continued.

    Raises :class:`WeightsError`: no such model, no connection (after some tries), no space, a checksum that does not
    match twice.
    """
    files = chosen_files(list_files(source, repo), allow_pickle)
    if not files:
        raise WeightsError("no model in this repository", where=f"{source.endpoint}/{repo}")
    total = sum(file.size for file in files)
    missing = [file for file in files if not _is_there(folder, file)]
    present = total - sum(file.size for file in missing)
    parts = sum(_part(folder, file).stat().st_size for file in missing if _part(folder, file).exists())
    check_space(folder, sum(file.size for file in missing) - parts)
    folder.mkdir(parents=True, exist_ok=True)
    # config.json last: a folder with it is complete
    for file in sorted(missing, key=lambda item: (item.path == "config.json", item.path)):
        done = present
        _fetch(source, repo, folder, file, lambda count, done=done: progress(done + count, total), log)
        present += file.size
    return files


def _is_there(folder: Path, file: RemoteFile) -> bool:
    path = folder / file.path
    return path.is_file() and file.matches(path)


def _part(folder: Path, file: RemoteFile) -> Path:
    return folder / f".{file.path}.part"


def _fetch(source: Hub, repo: str, folder: Path, file: RemoteFile, progress, log) -> None:
    part = _part(folder, file)
    for attempt in (1, 2):
        _fill(source, repo, part, file, progress, log)
        if file.matches(part):
            os.replace(part, folder / file.path)
            return
        part.unlink()
        log(f"{file.path}: wrong checksum, fetched again" if attempt == 1 else f"{file.path}: wrong checksum")
    raise WeightsError(
        "its checksum is not the one that the hub gives, twice", where=f"{repo}/{file.path}", hint="another mirror"
    )


def _fill(source: Hub, repo: str, part: Path, file: RemoteFile, progress, log) -> None:
    url, failures = source.file_url(repo, file.path), 0
    while True:
        have = part.stat().st_size if part.exists() else 0
        if have > file.size:
            part.unlink()
            have = 0
        if have == file.size and part.exists():
            return
        try:
            with (
                _open(source, url, repo, begin=have) as answer,
                part.open("ab" if answer.status == 206 else "wb") as out,
            ):
                at = out.tell()
                while block := answer.read(_BLOCK):
                    out.write(block)
                    at += len(block)
                    progress(min(at, file.size))
            if file.size == 0 or part.stat().st_size > have:
                failures = 0
            if part.stat().st_size >= file.size:
                return
            problem = "the connection ended early"
        except (OSError, http.client.HTTPException) as error:
            problem = str(error) or type(error).__name__
        failures += 1
        if failures >= _TRIES:
            raise WeightsError(
                f"the download stopped: {problem}",
                where=url,
                hint=f"the same command continues where it stopped; or {_mirror(source)}",
            )
        log(f"{file.path}: {problem}; trying again")
        time.sleep(RETRY_S * 2 ** (failures - 1))


def _open(source: Hub, url: str, repo: str, begin: int = 0):
    request = urllib.request.Request(url, headers={"User-Agent": "qwen-workbench"})
    if begin:
        request.add_header("Range", f"bytes={begin}-")
    if source.token:
        # Not to the host that a download is redirected to.
        request.add_unredirected_header("Authorization", f"Bearer {source.token}")
    try:
        return urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code not in (401, 403, 404):
            raise OSError(f"HTTP {error.code}") from None
        reason = "no such model or file" if error.code == 404 else "no right to this model"
        token = "HF_TOKEN" if source.name == "huggingface" else "MODELSCOPE_API_TOKEN"
        raise WeightsError(f"{reason} (HTTP {error.code})", where=url, hint=f"the name {repo!r}, or {token}") from None
    except urllib.error.URLError as error:
        raise OSError(f"cannot be reached: {error.reason}") from None


def _mirror(source: Hub) -> str:
    name = "HF_ENDPOINT" if source.name == "huggingface" else "MODELSCOPE_ENDPOINT"
    return f"{name}=<mirror>, hub.source=<the other hub>, or WEIGHTS=<local folder>"
