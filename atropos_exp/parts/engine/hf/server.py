"""The server process of `engine=hf`, started as `python -m atropos_exp.parts.engine.hf.server --model FOLDER …`."""

import gc
import logging
import sys
from pathlib import Path

from atropos_exp.parts.engine.hf.backend import HFBackend
from atropos_exp.parts.engine.hf.choose import choose_decoding, load_model, untried_decoding
from atropos_exp.parts.engine.hf.scheduler import Scheduler
from atropos_exp.parts.engine.hf.weights import WeightStore
from atropos_exp.parts.engine.serving.server import bucket_source, parser, prepare, run_model_thread, serve
from atropos_exp.processes.startup import no_collections

PREFILL_TOKENS = {"cpu": 1024, "cuda": 32768}  # of one forward pass over prompts: bounds its memory and a probe's wait

logger = logging.getLogger(__name__)


def main() -> None:
    """Load the model and serve it until the process is killed."""
    command_line = parser("atropos_exp.parts.engine.hf.server", __doc__)
    command_line.add_argument("--twin", type=Path, help="folder of a small model of this kind, to try ways with")
    command_line.add_argument("--max-batch-tokens", type=int, required=True)
    command_line.add_argument("--batching-wait-seconds", type=float, required=True)
    options = command_line.parse_args()
    token = prepare(options)

    with no_collections():
        import torch

        torch.set_num_threads(options.num_threads)
        torch.set_num_interop_threads(1)
        trust = options.trust_remote_code
        try:
            way = (
                choose_decoding(options.twin, device=options.device, trust_remote_code=trust)
                if options.twin
                else untried_decoding(options.model, trust_remote_code=trust)
            )
        except ValueError as error:
            raise SystemExit(str(error)) from error
        model = load_model(
            options.model,
            device=options.device,
            dtype=options.dtype,
            attention=way.attention,
            trust_remote_code=trust,
        )
    gc.collect()
    gc.freeze()  # the collector need not walk what was imported again and again
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and options.max_sequence_length > positions:
        raise SystemExit(f"the model has {positions} positions, the run needs {options.max_sequence_length}")
    weights = WeightStore(model, problem=options.problem)
    scheduler: Scheduler
    decoder = way.decoder(model, prefill_tokens=PREFILL_TOKENS[model.device.type], on_step=lambda: scheduler.on_step())
    scheduler = Scheduler(
        decoder,
        weights,
        max_batch_tokens=options.max_batch_tokens,
        batching_wait_seconds=options.batching_wait_seconds,
    )
    backend = HFBackend(
        scheduler=scheduler,
        model=decoder,
        account=weights.account,
        update=weights,
        source=bucket_source(options),
        hub_names=False,  # its model is made by transformers, as the trainer's
        vocab_size=model.config.get_text_config().vocab_size,
        max_sequence_length=options.max_sequence_length,
        versions={"torch": torch.__version__, "transformers": sys.modules["transformers"].__version__},
    )
    run_model_thread(scheduler.run_forever)
    logger.info("decoding with %s", way)
    serve(backend, options, token=token)


if __name__ == "__main__":
    main()
