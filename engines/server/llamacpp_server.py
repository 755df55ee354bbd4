"""llama.cpp's own HTTP server, through the xllamacpp wheel, as a program that stays up.

    python llamacpp_server.py --model FILE.gguf (--socket PATH | --port PORT) [--slots N] [--ctx N] [--gpu-layers N]

Serves the OpenAI routes of llama.cpp; /health answers 200 once the model is loaded. Chat, completions and mean-pooled
embeddings come from the one model. An answer may be longer than the context (context shift).
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from typing import Any


def main() -> None:
    """Entry point; serves until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--model", required=True)
    parser.add_argument("--socket", help="path of a Unix socket to listen on")
    parser.add_argument("--port", type=int, help="loopback port to listen on")
    parser.add_argument("--slots", type=int, default=1)
    parser.add_argument("--ctx", type=int, default=0, help="context per slot; 0 takes the model's own")
    parser.add_argument("--gpu-layers", type=int, default=0)
    asked = parser.parse_args()
    if (asked.socket is None) == (asked.port is None):
        parser.error("give exactly one of --socket and --port")
    server = _serve(asked)
    sys.stderr.write(f"listening on {server.listening_address}\n")
    # The default SIGTERM ends the process at once. Dropping the server instead has been seen to hang for a minute.
    while True:
        signal.pause()


def _serve(asked: argparse.Namespace) -> Any:
    import xllamacpp  # type: ignore[import-untyped]

    params = xllamacpp.CommonParams()
    params.model.path = asked.model
    if asked.socket is not None:
        # A name that ends in .sock makes it a Unix socket.
        folder, name = os.path.split(os.path.abspath(asked.socket))
        os.chdir(folder)
        params.hostnames = [f"./{name}"]
    else:
        params.hostnames = ["127.0.0.1"]
        params.port = asked.port
    params.n_parallel = asked.slots
    params.n_ctx = asked.ctx * asked.slots
    params.cont_batching = True
    # Without one cache for all slots, texts of different length in one batch get wrong vectors: the batch is split,
    # and the mean is taken over the last part of the longer text alone.
    params.kv_unified = True
    params.ctx_shift = True
    params.embedding = True
    params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    params.n_gpu_layers = asked.gpu_layers
    params.warmup = False
    params.ui = False
    params.verbosity = 1
    return xllamacpp.Server(params)


if __name__ == "__main__":
    main()
