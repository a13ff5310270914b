"""What runs beside the model inside vLLM: loads new weights, tells what it holds, scores at a temperature.

vLLM mixes this class into its worker (`worker_extension_cls`), so it runs in every worker process of the server. It
needs three things of vLLM, which 0.24 to 0.30 have in common: the model's `load_weights`, layerwise reloading (CPU
linears and some GPU kernels repack their weights, so writing to parameters is not enough), and `compute_logits`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from atropos_exp.engine.backend import Message
from atropos_exp.engine.bucket import BucketSource
from atropos_exp.wire_tensors import digest, digest_lanes, resolve_lanes

if TYPE_CHECKING:
    from torch import Tensor

EXTENSION = "atropos_exp.engine.vllm_worker.WeightWorker"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(kw_only=True)
class Arrived:
    """What the last update brought to this worker."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    lanes: dict[str, Tensor] = field(default_factory=dict)  # of tensors on a device: read when they are asked for


class WeightWorker:
    """Mixed into vLLM's worker; its names all start with `atropos_` so that they meet no others."""

    model_runner: Any  # vLLM's
    vllm_config: Any
    device: Any
    rank: int  # among the workers of this server

    def atropos_begin(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self.atropos_arrived = Arrived()
        self.atropos_reloading = True
        self.atropos_on_device(lambda: initialize_layerwise_reload(self.atropos_model()))

    def atropos_load(self, source: BucketSource, message: Message, tied: tuple[str, ...]) -> None:
        """Load one bucket. vLLM keeps tensors until their layer is complete, so each is copied out of the bucket.
        Those that are `tied` to another are only noted."""
        arrived = self.atropos_arrived
        for name, tensor in source.read(message, receiver=self.rank):
            arrived.shapes[name] = tuple(tensor.shape)
            if tensor.device.type == "cpu":
                arrived.digests[name] = digest(tensor)
            else:
                arrived.lanes[name] = digest_lanes(tensor)
            if name in tied:
                continue
            own = tensor.to(self.device, copy=True)
            named = [(name, own)]
            if name == EMBEDDING and self.atropos_head_has_a_copy():
                named.append((HEAD, own))
            self.atropos_on_device(partial(self.atropos_model().load_weights, named))
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize()  # the bucket is free again when this returns

    def atropos_end(self) -> None:
        """After the last bucket, and also after an update that was given up: layers get their kernels' weights back."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        if getattr(self, "atropos_reloading", False):
            self.atropos_reloading = False
            config = self.vllm_config.model_config
            self.atropos_on_device(lambda: finalize_layerwise_reload(self.atropos_model(), config))

    def atropos_digests(self, on_device: bool) -> dict[str, tuple[str, bool]]:
        """name -> (digest, whether it is of the tensor that the model uses). Otherwise it is of what arrived here:
        vLLM's CPU kernels keep repacked weights only, and with tensor parallelism no worker has a whole tensor."""
        arrived = self.atropos_arrived
        resident = {} if self.vllm_config.parallel_config.tensor_parallel_size > 1 else self.atropos_resident()
        found = dict.fromkeys(arrived.shapes, "")
        if on_device:
            lanes = {name: digest_lanes(resident[name]) if name in resident else arrived.lanes[name] for name in found}
            found = dict(zip(lanes, resolve_lanes(list(lanes.values())), strict=True))
        else:
            for name in found:
                found[name] = digest(resident[name].cpu()) if name in resident else arrived.digests[name]
        return {name: (value, name in resident) for name, value in found.items()}

    def atropos_arrivals(self) -> dict[str, tuple[str, bool]]:
        """Likewise of what arrived, tied tensors included."""
        arrived = self.atropos_arrived
        on_device = dict(zip(arrived.lanes, resolve_lanes(list(arrived.lanes.values())), strict=True))
        return {name: (value, False) for name, value in {**arrived.digests, **on_device}.items()}

    def atropos_score_at(self, temperature: float) -> None:
        """Divide all logits by this from now on: vLLM's prompt logprobs know no temperature. 1.0 ends it."""
        model = self.atropos_model()
        if not hasattr(self, "atropos_logits"):
            self.atropos_logits: Callable[..., Any] = model.compute_logits

            def compute_logits(*args: Any, **kwargs: Any) -> Any:
                logits = self.atropos_logits(*args, **kwargs)
                scale = self.atropos_temperature
                return logits if logits is None or scale == 1.0 else logits / scale

            model.compute_logits = compute_logits
        self.atropos_temperature = temperature

    def atropos_resident(self) -> dict[str, Tensor]:
        """The tensors of the model under their Hugging Face names, parts of fused ones as views, where they are kept
        as they came. vLLM stacks q, k, v and gate, up by rows and pads vocabularies at the end."""
        model = self.atropos_model()
        parameters: dict[str, Tensor] = dict(model.named_parameters())
        packed: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
        found = {}
        for name, shape in self.atropos_arrived.shapes.items():
            tensor, start, rows = parameters.get(name), 0, None
            for fused, parts in packed.items():
                own = next((part for part in parts if f".{part}." in name), None)
                if tensor is None and own is not None:
                    siblings = [self.atropos_arrived.shapes.get(name.replace(own, part)) for part in parts]
                    if None in siblings:
                        break
                    sizes = [sibling[0] for sibling in siblings if sibling]
                    start, rows = sum(sizes[: parts.index(own)]), sum(sizes)
                    tensor = parameters.get(name.replace(own, fused))
            if (
                tensor is None
                or tensor.is_meta
                or tensor.dim() != len(shape)
                or not shape
                or tensor.shape[1:] != shape[1:]
            ):
                continue
            if tensor.shape[0] == (rows or shape[0]) or (name in (EMBEDDING, HEAD) and tensor.shape[0] > shape[0]):
                found[name] = tensor.data[start : start + shape[0]]
        return found

    def atropos_head_has_a_copy(self) -> bool:
        """On a CPU a head that is tied to the embedding computes with a packed copy of it, which must be made anew."""
        tied = getattr(self.vllm_config.model_config.hf_text_config, "tie_word_embeddings", False)
        return bool(tied) and self.device.type == "cpu"

    def atropos_model(self) -> Any:
        return self.model_runner.get_model() if hasattr(self.model_runner, "get_model") else self.model_runner.model

    def atropos_on_device(self, work: Callable[[], Any]) -> None:
        import torch
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(self.vllm_config), torch.device(self.device):
            work()


def agreed(answers: Iterable[dict[str, tuple[str, bool]]]) -> dict[str, tuple[str, bool]]:
    """The digests that all workers give; of one on which they differ, a text that equals no digest."""
    first, *others = answers
    return {
        name: found if all(other[name] == found for other in others) else ("workers differ", found[1])
        for name, found in first.items()
    }
