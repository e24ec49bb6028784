"""llama.cpp's own server, from the package xllamacpp, until its stdin is closed.

The one argument is a JSON object: target and draft (GGUF files), port, threads, clients, and context, the tokens of a
client. Nothing of pard-onnx is imported, as the environment may be another one.
"""

import json
import sys

import xllamacpp


def main() -> None:
    wanted = json.loads(sys.argv[1])
    params = xllamacpp.CommonParams()
    params.model.path = wanted["target"]
    if wanted["draft"]:
        params.speculative.draft.mparams.path = wanted["draft"]
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
    params.port = wanted["port"]
    params.n_parallel = wanted["clients"]
    params.n_ctx = wanted["context"] * wanted["clients"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = wanted["threads"]
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
