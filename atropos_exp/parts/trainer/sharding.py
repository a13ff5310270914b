"""Which modules of a model are sharded one by one."""

from typing import Any

from torch import nn


def layer_classes(model: Any) -> list[str]:
    """The classes that are sharded one by one: those that the architecture names, unless one lies inside of another,
    whose code may use its weights, or holds tied embeddings; those of its longest list of layers if it names none."""
    named = set(model._no_split_modules or ())
    if not named:
        lists = [part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part)]
        named = {type(layer).__name__ for layer in max(lists, key=len)}
    chosen, inside = set(), set()
    for part in model.modules():
        if type(part).__name__ in named:
            chosen.add(type(part).__name__)
            inside |= {type(inner).__name__ for inner in part.modules() if inner is not part}
            if model.config.tie_word_embeddings and model.get_input_embeddings() in part.modules():
                inside.add(type(part).__name__)
    return sorted(chosen - inside)
