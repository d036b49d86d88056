"""A real llama.cpp server on loopback, and the embedded family in its format, where both can be had."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from rollouts.tinymath import model_dir

BINARY = os.environ.get("LLAMA_SERVER") or shutil.which("llama-server")


def write_gguf(role: str, path: Path) -> Path:
    """Write a tinymath language model as GGUF, in float32."""
    gguf = pytest.importorskip("gguf")
    folder = model_dir(role)
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    words = {**tokenizer["model"]["vocab"], **{token["content"]: token["id"] for token in tokenizer["added_tokens"]}}
    special = {token["id"] for token in tokenizer["added_tokens"]}
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(sorted(words, key=words.__getitem__))
    kinds = gguf.TokenType
    writer.add_token_types([kinds.CONTROL if each in special else kinds.NORMAL for each in range(len(words))])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_add_bos_token(False)
    writer.add_chat_template((folder / "chat_template.jinja").read_text())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config["num_hidden_layers"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.astype("float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@dataclass
class LlamaServer:
    """A running server.

    Attributes:
        model: Name it serves the model under.
        port: Port on 127.0.0.1.
    """

    model: str
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"


@contextmanager
def llama_server(role: str, folder: Path, *flags: str) -> Iterator[LlamaServer]:
    """Serve a tinymath language model, with flags that a client has to overrule."""
    if BINARY is None:
        pytest.skip("no llama-server: name one in LLAMA_SERVER")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    model = write_gguf(role, folder / f"tinymath-{role}.gguf")
    command = (
        *(BINARY, "--model", str(model), "--alias", f"tinymath-{role}", "--host", "127.0.0.1", "--port", str(port)),
        *("--ctx-size", "2048", "--parallel", "2", "--threads", "1", "--threads-batch", "1", "--no-warmup"),
        *("--seed", "7", "--repeat-penalty", "1.5", "--top-k", "3", *flags),
    )
    log = folder / f"{role}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + 60
        while True:
            assert process.poll() is None and time.monotonic() < end, log.read_text(errors="replace")[-2000:]
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                    if answer.status == 200:
                        break
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        yield LlamaServer(f"tinymath-{role}", port)
    finally:
        process.kill()
        process.wait()
