"""The server process of engine `sglang`: `python -m atropos_exp.parts.engine.sglang.server …`, started by its settings.

It runs in SGLang's own environment, which has this package on its path and needs msgpack and xxhash besides SGLang.
"""

import argparse
import importlib.metadata
import json
import os
import signal

from atropos_exp.parts.engine.serving.server import bucket_source, parser, serve_from_thread
from atropos_exp.parts.engine.sglang.backend import SGLangBackend
from atropos_exp.parts.engine.sglang.loader import LOADER
from atropos_exp.weights.account import UpdateAccount
from atropos_exp.weights.receiver import expected_tensors
from atropos_exp.weights.resident import EMBEDDING, HEAD

# SGLang takes prompts of fewer tokens than its context less 6 (tp_worker.py), and a score's prompt is a whole sequence.
ROOM = 7


def main() -> None:
    """Load SGLang and the model, and serve it until the process is killed."""
    options = parser("atropos_exp.parts.engine.sglang.server", __doc__)
    options.add_argument("--engine-arguments", required=True, help="JSON, for sglang.Engine")
    options.add_argument("--seeded", action="store_true", help="each row has a seed of its own")
    # By it SGLang's scheduler ends this process when it fails itself. A shell's background job inherits it as ignored.
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    serve_from_thread(make_backend, lambda backend: backend.loop.run_forever(), options.parse_args())


def make_backend(options: argparse.Namespace) -> SGLangBackend:
    """Start SGLang's engine, whose scheduler runs in processes of its own and ends with this one."""
    import sglang

    config = json.loads((options.model / "config.json").read_text())
    is_tied = bool(config.get("tie_word_embeddings", False))
    nccl = _nccl_variables()
    engine = sglang.Engine(
        model_path=str(options.model),
        trust_remote_code=options.trust_remote_code,
        dtype=options.dtype,
        context_length=options.max_sequence_length + ROOM,
        skip_tokenizer_init=True,
        log_level="warning",
        custom_weight_loader=[LOADER],
        **json.loads(options.engine_arguments),
    )
    # SGLang has set some for its own processes, which have started. This one's group with the trainer needs the
    # trainer's: NCCL_CUMEM_ENABLE on one side only breaks it.
    for name in _nccl_variables():
        del os.environ[name]
    os.environ.update(nccl)
    expected = expected_tensors(options.model, dtype=options.dtype, is_tied=is_tied)
    return SGLangBackend(
        engine,
        UpdateAccount(expected, {HEAD: EMBEDDING} if is_tied else {}, problem=options.problem),
        bucket_source(options),
        seeded=options.seeded,
        vocab_size=int(config["vocab_size"]),
        max_sequence_length=options.max_sequence_length,
        versions={"sglang": importlib.metadata.version("sglang"), "torch": importlib.metadata.version("torch")},
    )


def _nccl_variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("NCCL_")}


if __name__ == "__main__":
    main()
