"""Every causal language model that transformers knows, small: how it is trained and decoded, or why it is refused.

    python -m tests.helpers.architectures > docs/models.md     # some minutes; writes the whole page
    python -m tests.helpers.architectures qwen3 mamba2         # only these rows

A row is right if three independent comparisons with plain transformers hold, in float32 and for each token: the chosen
layout's logprobs and gradients, the decoder's sampled and scored logprobs, and the logprobs of the real trainer, which
also makes an update with finite numbers and gives the engine exactly the tensors that it expects.
"""

from __future__ import annotations

import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from atropos_exp.errors import UserError
from atropos_exp.parts.engine.hf.choose import choose_decoding, load_model
from atropos_exp.parts.engine.hf.weights import WeightStore
from atropos_exp.parts.model.completeness import check_tensors
from atropos_exp.parts.model.quiet import quiet
from atropos_exp.parts.model.twin import make_twin
from atropos_exp.parts.trainer.packing import scoring_batch
from atropos_exp.weights.tensors import dtype_name
from tests.helpers.trainer_cases import Model, WeightedLoss, settings

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LONG = {
    "rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [4.0] * 48, "rope_theta": 10000.0,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
MAX_LENGTH = 4096  # tokens of a sequence in the run that the model is tried for
# What a configuration's defaults lack, or get wrong, for a model that can be built.
DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "hunyuan_v1_dense": {"head_dim": 16, "rope_parameters": ROPE},
    "hunyuan_v1_moe": {"head_dim": 16, "rope_parameters": ROPE, "num_experts": 4, "moe_topk": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"rope_parameters": ROPE, "head_dim": 16},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"use_mamba_kernels": False},
}
ENCODERS = [
    "bert",
    "bert-generation",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "megatron-bert",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
]
for _name in ENCODERS:
    DEFAULTS.setdefault(_name, {})["is_decoder"] = True
# Settings of an architecture that change what is exact for it: name of the row -> (type, what its configuration says).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_moe, with a window": ("qwen2_moe", {"use_sliding_window": True, "max_window_layers": 1}),
    "phimoe, with a window": ("phimoe", {"sliding_window": 2047}),
    "phi3, longrope, sequences within the original length": ("phi3", {"rope_parameters": LONG}),
    "phi3, longrope, longer sequences": (
        "phi3",
        {"rope_parameters": LONG, "original_max_position_embeddings": 2048},
    ),
    "starcoder2, dropout 0.1": ("starcoder2", {"embedding_dropout": 0.1, "residual_dropout": 0.1}),
    "phi, dropout 0.1": ("phi", {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attention_dropout": 0.1}),
    "mixtral, router noise": ("mixtral", {"router_jitter_noise": 0.1}),
    "cohere, logit scale": ("cohere", {"logit_scale": 0.0625}),
    "granite, scaled logits": ("granite", {"logits_scaling": 8.0}),
    "falcon, alibi": ("falcon", {"alibi": True}),
    "nemotron_h, no experts": ("nemotron_h", {"layers_block_type": ["mamba", "mlp", "attention", "mlp"] * 8}),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of one architecture."""

    name: str
    trained: str = ""
    decoded: str = ""
    refused: str = ""
    updated: bool = True  # the real trainer was tried as well


def every() -> dict[str, tuple[str, dict[str, Any]]]:
    """Name of the row -> type and configuration."""
    plain = {name: (name, DEFAULTS.get(name, {})) for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)}
    return dict(sorted({**plain, **VARIANTS}.items()))


def try_architecture(name: str, *, update: bool = True) -> Row:
    """Build the small model and hold layout and decoder against plain transformers, and the real trainer if `update`.

    A refusal is a UserError or ValueError with a reason; anything else is raised.
    """
    model_type, config = every()[name]
    with tempfile.TemporaryDirectory() as temporary, quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of architectures about their own code
        folder = Path(temporary)
        try:
            CONFIG_MAPPING[model_type](**config).save_pretrained(folder)
        except Exception as error:  # the architecture has no defaults of its own
            return Row(name=name, refused=f"transformers: {_first_line(error)}")
        try:
            twin = make_twin(folder, folder / "twin", max_length=MAX_LENGTH, trust_remote_code=False)
            check_tensors(twin, trust_remote_code=False)
            choice = settings().choose_layout(twin, model=Model(), device="cpu")
            way = choose_decoding(twin, device="cpu")
        except (UserError, ValueError) as error:
            return Row(name=name, refused=_first_line(error))
        if update:
            _through_the_trainer(twin, folder / "bad", choice.layout, way.attention)
    trained = f"{choice.layout.kind}, {choice.layout.attention}"
    return Row(name=name, trained=trained, decoded=str(way), updated=update)


def _through_the_trainer(twin: Path, dumps: Path, layout: Any, attention: str) -> None:
    trainer: Any = settings(learning_rate=1e-3).start(
        model_folder=twin,
        model=Model(),
        loss=WeightedLoss(),
        seed=0,
        device="cpu",
        dump_folder=dumps,
        layout=layout,
    )
    plain = load_model(twin, device="cpu", dtype="float32", attention="eager")
    random = np.random.default_rng(3)
    sequences = [random.integers(2, plain.config.get_text_config().vocab_size, n).astype(np.int32) for n in (39, 45, 9)]
    for sequence, got in zip(sequences, trainer.logprobs(sequences, temperature=1.0), strict=True):
        ids = torch.from_numpy(sequence.astype(np.int64))
        logits = plain(input_ids=ids[None], use_cache=False).logits[0, :-1]
        want = torch.log_softmax(logits.float(), -1).gather(1, ids[1:, None])[:, 0]
        np.testing.assert_allclose(got, want.detach().numpy(), atol=1e-4, rtol=0)

    expected = WeightStore(load_model(twin, device="cpu", dtype="float32", attention=attention)).account.expected
    sent = {tensor[0]: (dtype_name(tensor[1]), tuple(tensor[1].shape)) for tensor in trainer.parameters()}
    assert {name: sent.get(name) for name in expected} == expected

    batch = scoring_batch(sequences, 1.0)
    batch.advantages_S[batch.trained_S] = 1.0
    stats = trainer.update(batch)
    assert np.isfinite([stats.loss, stats.grad_norm]).all() and stats.grad_norm > 0 and not stats.skipped


def _first_line(error: Exception) -> str:
    text = re.sub(r"/tmp/\S+", "the folder", " ".join(str(error).split()))
    return text[:300].replace("|", "/")


HEADER = """# Models

Which causal language models train with `trainer=fsdp2` and sample with `engine=hf`, tried with a small random model of
each architecture that transformers knows (`python -m tests.helpers.architectures` writes this page).

Each row was compared with plain transformers, one sequence at a time, in float32: logprobs and gradients of the layout,
sampled and scored logprobs of the engine, and, where the last column says so, the logprobs of the real trainer, which
also made an update and gave the engine exactly the tensors that it expects. A model of your own is tried in the same
way when a run starts, before anything else does: its layout is the fastest one that is exact (`trainer.layout`:
*packed* end to end, *rows* padded, *single* sequences), and what is exact in none is refused.

Other engines serve what they know; every weight sync is proven with any of them.
"""


def line(row: Row) -> str:
    """The row of a table."""
    right = (row.name, row.trained, row.decoded, "yes" if row.updated else "not tried")
    cells = (row.name, row.refused) if row.refused else right
    return f"| {' | '.join(cells)} |"


def table(rows: list[Row]) -> Iterator[str]:
    """The lines of the two tables."""
    right = [row for row in rows if not row.refused]
    refused = [row for row in rows if row.refused]
    yield f"\n## Right ({len(right)})\n"
    yield "| architecture | trained in | decoded with | real trainer |\n| --- | --- | --- | --- |"
    yield from map(line, right)
    yield f"\n## Refused before anything starts ({len(refused)})\n\n| architecture | why |\n| --- | --- |"
    yield from map(line, refused)


def main(names: list[str]) -> None:
    """Print the page, or the rows of `names`."""
    rows = []
    for name in names or every():
        try:
            rows.append(try_architecture(name))
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {_first_line(error)}", file=sys.stderr)
    if not names:
        print(HEADER, end="")
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main(sys.argv[1:])
