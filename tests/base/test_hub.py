"""What is local or cached is loaded without the network, and what is not fails at once without it."""

import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import constants

from fastmem_pl.base import hub


@pytest.fixture
def asked(monkeypatch):
    """What the loader was told: whether to keep to local files."""
    calls = []
    monkeypatch.setattr(hub, "_in_cache", lambda source, *place: source == "cached/model")
    return calls


def loader(asked, whole=True):
    def load(local_files_only):
        asked.append(local_files_only)
        if local_files_only and not whole:
            raise OSError("some files are missing")
        return "loaded"

    return load


def test_folders_and_cached_models_do_not_ask_the_hub(asked, monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "_hub_answers", lambda: pytest.fail("the Hub was asked"))
    assert hub.cache_first(str(tmp_path), loader(asked)) == "loaded"
    assert hub.cache_first("cached/model", loader(asked)) == "loaded"
    assert asked == [True, True]


@pytest.mark.parametrize(("source", "expected"), [("some/model", [False]), ("cached/model", [True, False])])
def test_the_hub_is_asked_for_the_rest(asked, monkeypatch, source, expected):
    monkeypatch.setattr(hub, "_hub_answers", lambda: True)
    assert hub.cache_first(source, loader(asked, whole=False)) == "loaded"
    assert asked == expected


def test_no_network_fails_without_trying(asked, monkeypatch):
    monkeypatch.setattr(hub, "_hub_answers", lambda: False)
    with pytest.raises(OSError, match=r"'some/model' is not in the Hub cache, and .* does not answer"):
        hub.cache_first("some/model", loader(asked))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="HF_HUB_OFFLINE"):
        hub.cache_first("some/model", loader(asked))
    assert asked == []


def test_cache_is_looked_up_by_id(monkeypatch, tmp_path):
    assert not hub._in_cache("nobody/nothing-here")
    with pytest.raises(OSError, match="neither a folder nor a Hub id"):
        hub._in_cache("a b")


class Refusing(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(403)
        self.end_headers()

    def log_message(self, *args):
        pass


def test_probe(monkeypatch):
    def answers(port):
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        return hub._hub_answers()

    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert answers(server.server_port), "a refusal is an answer"
    assert not answers(server.server_port), "nobody listens"
    monkeypatch.setattr(hub, "_PROBE_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert not answers(silent.getsockname()[1]), "it gives up"
