"""Who may ask: tokens, other sites' pages, and the port that is rank 0's alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.responses import PlainTextResponse

from checkpoint_engine import cli
from checkpoint_engine.errors import SettingsError
from checkpoint_engine.http.commands import EngineSpec
from checkpoint_engine.http.guard import OPEN, TOKEN_VARIABLE, Guard, is_loopback, read_token
from checkpoint_engine.http.schemas import EngineBody
from helpers.ranks import run_ranks
from helpers.rest import serving, wait_until_met

TOKEN = "correct-horse-battery"
CONTROL = ("127.0.0.1", 4711)


def ask(
    path: str = "/v1/fleet", *, token: str | None = None, server: tuple[str, int | None] = ("127.0.0.1", 80), **headers: str
) -> int:
    """The status that a guarded application answers with."""
    import asyncio

    guard = Guard(PlainTextResponse("inside"), token, CONTROL, lambda: "s3cret-of-the-fleet")
    sent: list[dict[str, object]] = []

    async def main() -> None:
        raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in {"host": "localhost", **headers}.items()]
        scope = {"type": "http", "method": "GET", "path": path, "headers": raw, "server": server, "query_string": b""}

        async def receive() -> dict[str, object]:
            return {"type": "http.request", "body": b""}

        async def send(message: dict[str, object]) -> None:
            sent.append(message)

        await guard(scope, receive, send)  # type: ignore[arg-type]

    asyncio.run(main())
    status = sent[0]["status"]
    assert isinstance(status, int)
    return status


def test_without_a_token_only_this_host_is_answered() -> None:
    assert ask() == ask(host="127.0.0.1:8600") == ask(host="[::1]:8600") == 200
    assert ask(host="evil.example:8600") == ask(host="127.0.0.1.evil.example") == ask(host="") == 403
    assert ask(host="anything", server=("/run/rest.sock", None)) == 200  # a Unix socket: its mode says who may


def test_pages_of_other_sites_are_not_answered() -> None:
    assert ask(host="localhost:8600", origin="http://localhost:8600") == 200
    assert ask(host="localhost:8600", origin="http://evil.example") == ask(host="localhost", origin="null") == 403
    assert ask(token=TOKEN, origin="http://evil.example", authorization=f"Bearer {TOKEN}") == 403


def test_with_a_token() -> None:
    assert ask(token=TOKEN, host="gpu-1:8600", authorization=f"Bearer {TOKEN}") == 200
    for said in ("", TOKEN, f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", "Bearer ", "Bearer \u00e9"):
        assert ask(token=TOKEN, authorization=said) == 401
    assert [ask(path, token=TOKEN, host="gpu-1") for path in OPEN] == [200] * len(OPEN)
    assert ask("/metrics", token=TOKEN) == ask("/openapi.json", token=TOKEN) == 401


def test_the_control_port_is_rank_0s() -> None:
    secret = {"authorization": "Bearer s3cret-of-the-fleet"}
    assert ask("/control/state", server=CONTROL, host="10.0.0.1", **secret) == 200
    assert ask("/control/state", server=CONTROL) == ask("/v1/healthz", server=CONTROL, **secret) == 401
    assert ask("/control/state", **secret) == 404  # not on the port for everybody


def test_tokens_are_read_from_file_or_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    assert read_token(None) is None
    assert read_token(file) == TOKEN
    monkeypatch.setenv(TOKEN_VARIABLE, "another-good-token")
    assert (read_token(None), read_token(file)) == ("another-good-token", TOKEN)
    for bad in ("", "short", "with space in the middle", "ü" * 20):
        file.write_text(bad)
        with pytest.raises(SettingsError, match="at least 16 printable ASCII characters"):
            read_token(file)
    with pytest.raises(SettingsError, match="cannot be read"):
        read_token(tmp_path / "none")


def test_tokens_are_shown_nowhere() -> None:
    body = EngineBody(url="http://a", token=TOKEN)  # type: ignore[arg-type]
    assert TOKEN not in f"{body!r} {body} {body.spec()!r} {body.spec()}"
    assert body.spec() == EngineSpec("sglang", "http://a", None, TOKEN)


def test_loopback() -> None:
    assert [is_loopback(h) for h in ("127.0.0.1", "127.8.9.1", "::1", "localhost")] == [True] * 4
    assert [is_loopback(h) for h in ("0.0.0.0", "::", "10.0.0.1", "gpu-1", "localhost.evil.example", "")] == [False] * 6


def _refused(rank: int, world_size: int) -> int:
    return cli.run(["serve", "--host", "0.0.0.0", "--port", "0"])


def test_other_addresses_demand_a_token(tmp_path: Path) -> None:
    assert run_ranks(_refused, 1) == [2]
    file = tmp_path / "token"
    file.write_text(TOKEN)
    with serving(1, "--host", "0.0.0.0", "--port", "0", "--token-file", str(file)) as served:
        assert served.url.startswith("http://0.0.0.0:")
        served.urls[0] = served.url.replace("0.0.0.0", "127.0.0.1")
        with served.client() as anybody:
            assert anybody.get("/v1/healthz").status_code == 200
            answer = anybody.get("/v1/fleet")
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        with served.client(headers={"Authorization": f"Bearer {TOKEN}"}) as caller:
            wait_until_met(caller, 1)
            assert caller.get("/metrics").status_code == 200
