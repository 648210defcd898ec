"""Tiny models and in-process servers for the tests of the embedded engine and of the clients."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
import uvicorn
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from checkpoint_engine.engines.embedded.app import create_app
from checkpoint_engine.engines.embedded.serve import bind
from checkpoint_engine.engines.embedded.service import EmbeddedEngine

WORDS = ["[PAD]", "[UNK]", "[EOS]", "the", "cat", "sat", "on", "a", "mat", "dog", "ran", "fast", "slow", "red", "blue"]


def _save_tokenizer(directory: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(directory)


def save_bert(directory: Path, seed: int = 1) -> Path:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16,
    )  # fmt: skip
    BertModel(config).save_pretrained(directory)
    _save_tokenizer(directory)
    return directory


def save_llama(directory: Path, seed: int = 1, tied: bool = True, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Without a tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=32,
        max_position_embeddings=64, tie_word_embeddings=tied, eos_token_id=2, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).to(dtype).save_pretrained(directory)
    return directory


@contextmanager
def serving(engine: EmbeddedEngine) -> Iterator[str]:
    """The URL of a real uvicorn server of this process."""
    listener, url = bind("127.0.0.1", 0, None)
    server = uvicorn.Server(uvicorn.Config(create_app(engine), log_level="warning", access_log=False))
    thread = threading.Thread(target=partial(server.run, sockets=[listener]))
    thread.start()
    try:
        yield url
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
        assert not thread.is_alive()


Answer = Callable[[str, str, bytes], tuple[int, bytes]]


@contextmanager
def answering(answer: Answer) -> Iterator[str]:
    """A small server of this process: `answer(method, path, body)` gives status and body. Yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            status, content = answer(self.command, self.path, body)
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_PUT = do_DELETE = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.01))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join(20)
