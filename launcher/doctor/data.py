"""Doctor's question about the data a run reads: is it a token folder, whole, readable, and the one the spec means.

A folder is opened as a rank opens it. At az:// only meta.json and the sizes of the files are asked for: nothing is
downloaded. What lies in the pods of a Kubernetes cluster can't be seen from here.
"""

import json
from pathlib import Path

from launcher.doctor.checks import Finding
from launcher.errors import Failed, WrongInput, one_line
from launcher.runspec.model import Gpt, RunSpec

ROLE = "is the address right, and has this identity the role Storage Blob Data Reader there?"


def data(spec: RunSpec, cache: Path) -> list[Finding]:
    """No finding for a run that brings its own data."""
    if spec.data is None:
        return []
    path, to = spec.data.path, spec.cluster.to
    if path == "stdlib" and not (cache / "stdlib-bytes" / "meta.json").exists():
        return [Finding("data", "pass", "stdlib: made from Python's own source at the first run")]
    if path.startswith("az://"):
        return blob(path)
    if path not in ("stdlib", "digits"):
        folder = Path(path).expanduser()
        if to == "kuberay":
            return [Finding("data", "skip", f"{path} lies in the run's pods, and can't be seen from here")]
        if to != "local" and not folder.exists():
            fix = f"it must be there on every node of {to}, or be at az://; `losscast data prepare` makes it"
            return [Finding("data", "warn", f"{path} is not on this machine", fix)]
    return opened(spec, cache)


def opened(spec: RunSpec, cache: Path) -> list[Finding]:
    """As a rank opens it; for the built-in workload also whether its tokenizer and vocabulary are the spec's."""
    from launcher.data.feed import feed_for
    from launcher.data.tokens import tokens_for

    assert spec.data is not None
    path, own = spec.data.path, not isinstance(spec.workload, Gpt)
    fix = "pip install 'losscast[vision]'" if path == "digits" else f"losscast data prepare SOURCE -o {path}"
    try:
        if own:
            held_out = f"{tokens_for(path, cache).holdout.size:,} held-out tokens"
        else:
            held_out = f"{feed_for(spec, cache).holdout:,} held-out sequences"
    except (WrongInput, Failed, OSError, ImportError) as error:
        said = one_line(error)
        if isinstance(error.__cause__ or error, PermissionError):
            said, fix = f"{path}: it may not be read", f"chmod -R a+rX {path}, or run as somebody who may"
        elif path not in ("stdlib", "digits") and not Path(path).expanduser().exists():
            said = f"{path}: there is no such folder"
        elif said.startswith(("data.", "workload.")):
            fix = "make data and workload of the spec what the corpus was prepared for, or prepare it again"
        return [Finding("data", "warn" if own else "fail", said, fix)]
    return [Finding("data", "pass", f"{path}: readable, {spec.data.tokenizer} tokens, {held_out}")]


def blob(url: str) -> list[Finding]:
    """meta.json, and whether the files it names are there in full."""
    from infra.objects import Missing
    from launcher.storage.store import open_store

    fix = f"losscast data prepare SOURCE -o {url}"
    try:
        store = open_store(url)
        meta = json.loads(store.get("meta.json"))
        wanted = {name: int(said["bytes"]) for name, said in meta["files"].items()}
        tokens = int(meta["train_tokens"])
        there = {item.key: item.size for item in store.list("")}
    except Missing:
        return [Finding("data", "fail", f"{url}: no prepared corpus is there: no meta.json", fix)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [
            Finding(
                "data",
                "fail",
                f"{url}: its meta.json is not one of a prepared corpus ({one_line(error)})",
                fix,
            )
        ]
    except Exception as error:  # whatever the storage's library raises
        return [Finding("data", "fail", f"{url}: {one_line(error)}", ROLE)]
    for name, size in sorted(wanted.items()):
        if there.get(name) != size:
            has = f"has {there[name]:,} bytes" if name in there else "is not there"
            return [Finding("data", "fail", f"{url}/{name} {has}, meta.json says {size:,}", fix)]
    return [
        Finding(
            "data",
            "pass",
            f"{url}: {tokens:,} training tokens, {sum(wanted.values()) / 1e6:,.1f} MB to bring",
        )
    ]
