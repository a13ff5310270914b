"""What runs beside the model inside vLLM: loads new weights, digests what it holds, scores at a temperature.

vLLM mixes this class into its worker (`worker_extension_cls`), so it runs in every worker process of the server. It
needs three things of vLLM, which 0.24 to 0.30 have in common: the model's `load_weights`, layerwise reloading (CPU
linears and some GPU kernels repack their weights, so writing to parameters is not enough there; where it is, on a GPU
without quantisation, `load_weights` alone is many times faster), and `compute_logits`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from atropos_exp.parts.engine.vllm.adapter import AdapterWorker
from atropos_exp.processes.wire import Message
from atropos_exp.weights.digest import Digests, digests
from atropos_exp.weights.receiver import SAFETENSORS_DTYPES, BucketSource
from atropos_exp.weights.resident import EMBEDDING, HEAD, has_plain_layers, views
from atropos_exp.weights.tensors import Kind, dtype_name, is_adapter

if TYPE_CHECKING:
    from torch import Tensor

EXTENSION = "atropos_exp.parts.engine.vllm.worker.WeightWorker"
PLAIN_DEVICES = ("cuda",)  # whose linear layers compute with the weights as they came; on a CPU they are repacked


@dataclass(kw_only=True)
class Arrived:
    """What the last update brought to this worker."""

    kinds: Mapping[str, Kind]  # of every tensor that an update may bring
    has_base: bool = False  # some of the base came
    is_plain: bool = True  # nothing is reloaded layer by layer
    names: set[str] = field(default_factory=set)
    adapter: dict[str, Tensor] = field(default_factory=dict)  # LoRA matrices, copied out of their buckets
    digests: Digests = field(default_factory=Digests)  # as tensors arrived


class WeightWorker(AdapterWorker):
    """Mixed into vLLM's worker. Its names all start with `atropos_`, so that they collide with none of vLLM's."""

    model_runner: Any  # vLLM's
    vllm_config: Any
    device: Any
    rank: int  # among the workers of this server

    def atropos_memory(self) -> int:
        """Bytes in use on this worker's GPU, by all processes."""
        import torch

        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        return int(total - free)

    def atropos_dtypes(self, names: Iterable[str]) -> dict[str, str]:
        """Of those of the named tensors that the model keeps under this name and in a dtype that an update can bring,
        which is float32 for some gates of experts whatever is served. On a CPU with AMX vLLM widens biases of its own
        accord after loading them: these are left out."""
        held = dict(self.atropos_model().named_parameters())
        found = {name: dtype_name(held[name]) for name in names if name in held and not name.endswith(".bias")}
        return {name: dtype for name, dtype in found.items() if dtype in SAFETENSORS_DTYPES.values()}

    def atropos_begin(self, kinds: Mapping[str, Kind]) -> None:
        """Start an update. `kinds`: dtype and shape of all tensors that may come."""
        self.atropos_arrived = Arrived(kinds=kinds)

    def atropos_load(self, source: BucketSource, message: Message, tied: tuple[str, ...]) -> bool:
        """Load one bucket; tensors that are `tied` to another are only digested. Returns whether all went straight into
        what the model computes with.

        Into plain parameters vLLM copies at once, and they are digested there, at the end. Otherwise it keeps tensors
        until their layer is complete, so each is copied out of the bucket, and its digest taken as it arrives.
        """
        arrived = self.atropos_arrived
        bucket = list(source.read(message, receiver=self.rank))
        base = [(name, tensor) for name, tensor in bucket if not is_adapter(name)]
        if base and not arrived.has_base:
            arrived.has_base = True
            self.atropos_open_base()
        arrived.names.update(name for name, _ in bucket)
        arrived.digests.add(
            [(name, tensor) for name, tensor in bucket if name in tied or is_adapter(name) or not arrived.is_plain]
        )

        def weights() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in base:
                if name not in tied:
                    own = tensor if arrived.is_plain else tensor.to(self.device, copy=True)
                    yield name, own
                    if name == EMBEDDING and self.atropos_head_has_a_copy():
                        yield HEAD, own

        if base:  # in one call: each looks up all parameters of the model
            self.atropos_on_device(lambda: self.atropos_model().load_weights(weights()))
        arrived.adapter |= {name: tensor.to(self.device, copy=True) for name, tensor in bucket if is_adapter(name)}
        if len(base) < len(bucket) and len(arrived.adapter) == sum(map(is_adapter, arrived.kinds)):
            self.atropos_place_adapter(arrived.adapter)
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize()  # the bucket is free again when this returns
        return arrived.is_plain

    def atropos_open_base(self) -> None:
        """Prepare for the first tensor of the base: decide how it is loaded."""
        arrived = self.atropos_arrived
        self.atropos_unwrap(True)
        resident = self.atropos_resident()
        base = {name for name in arrived.kinds if not is_adapter(name)}
        arrived.is_plain = self.atropos_computes_plainly() and base <= set(resident)
        self.atropos_reloading = not arrived.is_plain
        if self.atropos_reloading:
            from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

            self.atropos_forget_kernels()
            self.atropos_on_device(lambda: initialize_layerwise_reload(self.atropos_model()))

    def atropos_forget_kernels(self) -> None:
        """Let experts on a CPU make their kernels anew. Once there is one, vLLM 0.30 takes new weights as they come,
        but this kernel computes with repacked ones."""
        if self.device.type == "cpu":
            for layer in self.atropos_model().modules():
                method = getattr(layer, "quant_method", None)
                if method is not None and "moe_kernel" in vars(method):
                    method.moe_kernel = None

    def atropos_end(self) -> None:
        """End an update, complete or abandoned: layers that were reloaded get their kernels' weights back."""
        if getattr(self, "atropos_reloading", False):
            from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

            self.atropos_reloading = False
            config = self.vllm_config.model_config
            self.atropos_on_device(lambda: finalize_layerwise_reload(self.atropos_model(), config))
        self.atropos_unwrap(False)

    def atropos_digests(self, on_device: bool) -> dict[str, tuple[str, bool]]:
        """name -> (digest, whether it is of the tensor that the model uses). Otherwise it is of the tensor as it
        arrived: vLLM's CPU kernels keep repacked weights only, and with tensor parallelism no worker has a whole
        tensor."""
        arrived = self.atropos_arrived
        resident = {name: tensor for name, tensor in self.atropos_resident().items() if name in arrived.names}
        tensors = [tensor if on_device else tensor.cpu() for tensor in resident.values()]
        found = dict(zip(resident, digests(tensors), strict=True))
        held = {**arrived.digests.read(), **found}
        return {name: (held[name], name in resident) for name in sorted(arrived.names)}

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

    def atropos_computes_plainly(self) -> bool:
        """Whether the model computes with nothing but its parameters as they came: no layer repacks or quantises them,
        none derives others from them."""
        model = self.atropos_model()
        derives = any(type(module).__name__ == "MLAAttention" for module in model.modules())
        return self.device.type in PLAIN_DEVICES and has_plain_layers(model) and not derives

    def atropos_resident(self) -> dict[str, Tensor]:
        """The tensors of the model under their Hugging Face names, parts of fused ones as views, where they are kept
        as they came. None with tensor parallelism."""
        if self.vllm_config.parallel_config.tensor_parallel_size > 1:
            return {}
        model = self.atropos_model()
        parameters = {name.replace(".base_layer.", "."): tensor for name, tensor in model.named_parameters()}
        kinds = self.atropos_arrived.kinds
        fused = getattr(model, "packed_modules_mapping", {})
        return self.atropos_resident_adapter(kinds) | views(parameters, fused, kinds)

    def atropos_head_has_a_copy(self) -> bool:
        """Whether the head computes with a packed copy of the embedding, which must be packed again: on a CPU, if the
        two are tied."""
        tied = getattr(self.vllm_config.model_config.hf_text_config, "tie_word_embeddings", False)
        return bool(tied) and self.device.type == "cpu"

    def atropos_model(self) -> Any:
        """The model that this worker runs."""
        return self.model_runner.get_model() if hasattr(self.model_runner, "get_model") else self.model_runner.model

    def atropos_on_device(self, work: Callable[[], Any]) -> None:
        """Do the work as vLLM does its own: on this worker's device, under its configuration."""
        import torch
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(self.vllm_config), torch.device(self.device):
            work()


def agreed(answers: Iterable[dict[str, tuple[str, bool]]]) -> dict[str, tuple[str, bool]]:
    """The digests on which all workers agree; for a tensor on which they differ, a text that equals no digest."""
    first, *others = answers
    return {
        name: found if all(other[name] == found for other in others) else ("workers differ", found[1])
        for name, found in first.items()
    }
