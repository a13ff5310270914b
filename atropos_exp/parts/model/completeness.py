"""Whether a model's files hold what its architecture needs: a tensor that is missing would start as random numbers."""

from pathlib import Path

from atropos_exp.errors import UserError

SHOWN = 5  # names in a message


def check_tensors(folder: Path, *, trust_remote_code: bool) -> list[str]:
    """The names of tensors in `folder` that the architecture has no use for.

    Raises UserError for tensors that are missing, of another shape, or in a damaged file. No weight is read.
    """
    from transformers import AutoModelForCausalLM

    try:
        _, found = AutoModelForCausalLM.from_pretrained(
            folder,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below
            trust_remote_code=trust_remote_code,
            local_files_only=True,
        )
    except Exception as error:  # whatever safetensors or the architecture's code raises
        raise UserError(
            f"the model in {folder} cannot be loaded: {type(error).__name__}: {error}. A file may be damaged or only "
            "half there; fetch the model again"
        ) from error
    missing = sorted(found["missing_keys"])
    mismatched = sorted(str(entry[0]) for entry in found["mismatched_keys"])
    if missing or mismatched:
        what = " and ".join(
            f"{len(names)} tensors {problem} ({_some(names)})"
            for names, problem in ((missing, "are missing"), (mismatched, "have another shape"))
            if names
        )
        raise UserError(
            f"the files in {folder} do not fit its config.json: {what}. They would be trained from random numbers; "
            "fetch the model again, or correct its config.json"
        )
    return sorted(found["unexpected_keys"])


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
