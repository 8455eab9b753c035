"""The weights of a checkpoint as one safetensors file, from shards that were verified before anything was unpickled.

ZeRO 0 keeps whole weights in one file; ZeRO 1 to 3 keep a slice of the fp32 weights on every rank, which DeepSpeed's own
`zero_to_fp32` puts together. Weights that share memory (a tied readout) are written once, under the first name; the
other names are in the file's metadata under `tied`, with the run, the step and the digest of the spec.

Needs memory for the weights in fp32. Pipeline and tensor parallel checkpoints are refused: they have no whole model.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.errors import Failed, WrongInput, one_line
from launcher.storage import checkpoints
from launcher.storage.checkpoints import Checkpoint
from launcher.storage.remote import store_of
from launcher.storage.runfolder import RunFolder
from launcher.storage.runlog import RunLog


def export(
    folder: RunFolder,
    output: str | os.PathLike[str],
    *,
    step: int | None = None,
    dtype: str = "float32",
    say: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Write the weights of the newest checkpoint that verifies, or of the one of `step`, to `output`; says what was written.

    Raises WrongInput for what can't be exported, Failed when nothing verifies, OSError of `output` when it can't be written.
    """
    target = Path(output)
    if target.is_dir() or not target.absolute().parent.is_dir():
        raise WrongInput(f"{target}: no file can be written there. Give a file in a folder that exists.")
    try:
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ModuleNotFoundError as error:
        raise Failed(f"{error.name} is not installed here: pip install 'losscast[train]'") from error
    found = _verified(folder, step, say)
    layout = found.topology
    if layout.get("pp", 1) > 1 or layout.get("tp", 1) > 1:
        raise WrongInput(
            f"step {found.step} was written with pp {layout.get('pp')}, tp {layout.get('tp')}: its files hold parts of the model, "
            "and only checkpoints with both at 1 can be exported. Resume it with both at 1 for a step, and export that."
        )
    weights, tied = _distinct(_weights(folder.path / found.key.rstrip("/"), layout.get("zero", 0)))
    kind = getattr(torch, dtype)
    weights = {name: tensor.to(kind).contiguous() for name, tensor in weights.items()}
    about = {"format": "pt", "run": found.run, "step": str(found.step), "attempt": str(found.attempt),
             "spec_digest": str(found.spec_digest), "tied": json.dumps(tied)}  # fmt: skip
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        save_file(weights, scratch, metadata=about)
        os.replace(scratch, target)
    except SafetensorError as error:
        raise _refused(error, target) from error
    finally:
        scratch.unlink(missing_ok=True)
    return {
        "file": str(target), "run": found.run, "step": found.step, "attempt": found.attempt, "dtype": dtype,
        "parameters": sum(t.numel() for t in weights.values()), "tensors": len(weights), "tied": tied,
        "bytes": target.stat().st_size,
    }  # fmt: skip


def _refused(error: Exception, target: Path) -> Exception:
    """What safetensors, which is no Python, says of the disk, as Python would: its number is in the text alone."""
    number = re.search(r"os error (\d+)", str(error))
    if number is None:
        return Failed(f"{target} can't be written: {one_line(error)}")
    return OSError(int(number[1]), os.strerror(int(number[1])), str(target))


def _verified(folder: RunFolder, step: int | None, say: Callable[[str], None]) -> Checkpoint:
    store, into = store_of(folder), None if folder.url is None else folder.path
    log = RunLog(store, folder.name)
    if step is None:
        found = checkpoints.newest_verified(store, log, say, into)
        if found is None:
            raise Failed(f"{folder.address}: no committed checkpoint verifies")
        return found
    commits = log.commits()
    for entry in (e for e in commits if e.fields["step"] == step):
        found, wrong = (
            checkpoints.check(store, entry, log.run)
            if into is None
            else checkpoints.bring(store, entry, log.run, into)
        )
        if found is None:
            raise Failed(f"step {step} does not verify: {wrong[0]}")
        return found
    there = {item.key for item in store.list("attempts/") if item.key.endswith(".manifest.json")}
    have = ", ".join(str(e.fields["step"]) for e in commits if e.fields["manifest"] in there) or "none"
    raise WrongInput(f"--step {step}: no checkpoint of that step was committed. There are: {have}.")


def _weights(place: Path, zero: int) -> dict[str, Any]:
    """Every parameter by name, on the CPU. The files were verified: they are what our own trainer wrote."""
    import torch

    if zero == 0:
        path = place / "mp_rank_00_model_states.pt"
        return torch.load(path, map_location="cpu", weights_only=False)["module"]
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import contextlib

    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        merged: Any = get_fp32_state_dict_from_zero_checkpoint(str(place.parent), tag=place.name)
        return dict(merged)


def _distinct(weights: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors without those that are another one's memory, and which name stands for which."""
    first: dict[tuple[int, tuple[int, ...]], str] = {}
    distinct: dict[str, Any] = {}
    tied: dict[str, str] = {}
    for name, tensor in weights.items():
        place = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() and place in first:
            tied[name] = first[place]
        else:
            first[place] = name
            distinct[name] = tensor
    return distinct, tied
