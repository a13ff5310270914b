"""A model's tensors as its files on the hub have them: transformers renames and fuses tensors when it loads a model,
such as a mixture of experts, and other programs know only the names in the files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atropos_exp.errors import UserError
from atropos_exp.weights.tensors import LORA_A, LORA_B, is_adapter

if TYPE_CHECKING:
    from torch import Tensor


class HubNames:
    """Undoes what transformers did to a model's tensors when it loaded them, one conversion at a time.

        names = HubNames(model, [name for name, _ in model.named_parameters()])
        for name, tensor in names.convert(model.named_parameters()):
            ...  # model.layers.0.mlp.experts.0.gate_proj.weight and so on, the same bits

    For a model that `from_pretrained` made it undoes what that really did, so the names are those in the model's
    files; for any other, what transformers does to models of its kind by default, as `save_pretrained`.
    """

    def __init__(self, model: Any, names: Iterable[str]) -> None:
        """`model`: transformers' own, without PEFT; no weight of it is read. `names`: of all its tensors that will be
        given, as it has them itself."""
        from transformers.core_model_loading import WeightConverter, rename_source_key

        self._model = model
        undone = [conversion.reverse_transform() for conversion in reversed(conversions(model))]
        converters = [one for one in undone if isinstance(one, WeightConverter)]
        renamings = [one for one in undone if not isinstance(one, WeightConverter)]
        self._renamed: dict[str, str] = {}  # name -> its name on the hub, for a tensor that is only renamed
        self._converted: dict[str, str] = {}  # name -> what is the same for all tensors that one conversion needs
        for name in names:
            key, pattern = rename_source_key(name, [], converters)
            if pattern is None:
                self._renamed[name] = rename_source_key(name, renamings, [])[0]
            else:
                self._converted[name] = key
        self._num_needed = Counter(self._converted.values())

    def convert(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same values under the names on the hub, those of LoRA's matrices too. Besides the tensor at hand, only
        those are held that wait for others of their conversion. Raises UserError for what cannot be undone."""
        waiting: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors:
            if is_adapter(name):
                yield self._adapter_name(name), tensor
            elif name in self._renamed:
                yield self._renamed[name], tensor
            else:
                key = self._converted[name]
                group = waiting.setdefault(key, {})
                group[name] = tensor
                del tensor
                if len(group) == self._num_needed[key]:
                    yield from self._undo(waiting.pop(key))
        assert not waiting, f"never given: other tensors of the conversion of {sorted(waiting)[0]}"

    def _undo(self, group: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        from transformers.core_model_loading import revert_weight_conversion

        first = next(iter(group))
        try:
            found = revert_weight_conversion(self._model, group)
        except Exception as error:  # whatever the operations of an architecture raise
            raise UserError(
                f"transformers cannot give {first} back as it is on the hub: {type(error).__name__}: {error}. "
                "engine=hf needs no such names"
            ) from error
        group.clear()
        for name in list(found):
            yield name, found.pop(name).contiguous()

    def _adapter_name(self, name: str) -> str:
        ending = LORA_A if name.endswith(LORA_A) else LORA_B
        module = name.removesuffix(ending)
        renamed = self._renamed.get(f"{module}.weight")
        if renamed is None:
            raise UserError(
                f"engine.lora=adapter: {module} is not one layer on the hub, so no engine takes LoRA matrices of it "
                "by themselves. Use engine.lora=merged, or name other layers in model.lora.target_modules"
            )
        return renamed.removesuffix(".weight") + ending


def conversions(model: Any) -> list[Any]:
    """What transformers did to the tensors of this model when it loaded them; for a model that was not loaded, what it
    does by default."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    if hasattr(model, "_weight_conversions"):
        return list(model._weight_conversions)
    usual = get_model_conversion_mapping(model, add_legacy=False)
    return [one for one in usual if not isinstance(one, PrefixChange)]  # as `revert_weight_conversion`


def describe(model: Any) -> list[dict[str, Any]]:
    """What transformers did to this model's tensors, as plain values that JSON gives back as they were."""
    return [
        {
            "kind": type(one).__name__,
            "sources": list(one._original_source_patterns),
            "targets": list(one._original_target_patterns),
            "scope_prefix": one.scope_prefix,
            "base_model_prefix": one.base_model_prefix,
            **({"prefixes": _prefixes(one)} if type(one).__name__ == "PrefixChange" else {}),
            **(
                {"operations": [[type(op).__name__, vars(op)] for op in one.operations]}
                if hasattr(one, "operations")
                else {}
            ),
        }
        for one in conversions(model)
    ]


def names_of_a_checkpoint(
    description: Path, shapes: Mapping[str, Sequence[int]], described: Sequence[Mapping[str, Any]] | None
) -> HubNames:
    """Of a model that is not in memory. `description`: a folder with its config.json. `shapes`: of its tensors in the
    checkpoint. `described`: what `describe` gave when it was saved; None: unknown, so the default counts. Raises
    UserError for conversions that this transformers does not know."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(description)
        if described is None:
            with torch.device("meta"):
                return HubNames(AutoModelForCausalLM.from_config(config), shapes)
    except ValueError:  # code of its own, for which transformers has no conversions; or no default class for it
        config = None
    return HubNames(_Absent(config, shapes, [_rebuilt(one) for one in described or ()]), shapes)


class _Absent:
    """What transformers' conversions ask of a model, for one of which only a checkpoint is there."""

    def __init__(self, config: Any, shapes: Mapping[str, Sequence[int]], done: list[Any]) -> None:
        self.config = config
        self._shapes = shapes
        self._weight_conversions = done

    def get_parameter(self, name: str) -> Tensor:
        import torch

        return torch.empty(tuple(self._shapes[name]), device="meta")


def _rebuilt(described: Mapping[str, Any]) -> Any:
    from transformers import core_model_loading as known

    names = [described["kind"], *(name for name, _ in described.get("operations", ()))]
    if unknown := [name for name in names if not hasattr(known, name)]:
        raise UserError(
            f"the trained model was loaded with the conversion {unknown[0]}, which this version of transformers does "
            "not know; use the version that trained it"
        )
    kind = getattr(known, names[0])
    if "prefixes" in described:
        made = kind(**described["prefixes"])
    else:
        sources, targets = list(described["sources"]), list(described["targets"])
        operations = [_operation(getattr(known, name), values) for name, values in described.get("operations", ())]
        made = kind(sources, targets, operations) if operations else kind(sources, targets)
    made.scope_prefix, made.base_model_prefix = described["scope_prefix"], described["base_model_prefix"]
    return made


def _operation(kind: Any, values: Mapping[str, Any]) -> Any:
    made = kind.__new__(kind)
    vars(made).update(values)
    return made


def _prefixes(change: Any) -> dict[str, str | None]:
    return {name: getattr(change, name) for name in ("prefix_to_add", "prefix_to_remove", "model_prefix")}
