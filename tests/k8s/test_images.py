"""The Containerfiles, as far as they can be looked at without building them: pinned, not root, and what pods expect of them."""

import re
from pathlib import Path

import pytest

from launcher.kuberay.pods import HOME, USER_ID, WORK

ROOT = Path(__file__).parents[2]
IMAGES = sorted((ROOT / "k8s/images").glob("*.Containerfile"))


def steps(path: Path) -> list[tuple[str, str]]:
    """(instruction, rest), continued lines joined."""
    text = re.sub(r"\\\n\s*", " ", path.read_text())
    return [(m[1], m[2]) for line in text.splitlines() if (m := re.match(r"([A-Z]+) (.*)", line))]


def test_there_are_two() -> None:
    assert [p.name for p in IMAGES] == ["monitor.Containerfile", "worker.Containerfile"]


@pytest.mark.parametrize("path", IMAGES, ids=lambda p: p.stem)
def test_bases_are_pinned_and_packages_constrained(path: Path) -> None:
    bases = [rest for word, rest in steps(path) if word == "ARG" and re.match(r"(BASE|RUNTIME)=", rest)]
    assert bases and all(re.search(r":\d+\.\d+\.\d+[\w.-]*$|@sha256:[0-9a-f]{64}$", base) for base in bases)
    for word, rest in steps(path):
        if word == "FROM":
            assert rest.startswith("${"), "only what an argument pins"
        for install in re.findall(r"pip install [^&]*", rest) if word == "RUN" else []:
            assert "-c .ci/constraints.txt" in install or "TORCH" in install or "setuptools" in install, (
                install
            )
    assert not re.search(r"curl|wget|ADD http", path.read_text())


@pytest.mark.parametrize("path", IMAGES, ids=lambda p: p.stem)
def test_the_last_user_is_the_one_that_pods_run_as(path: Path) -> None:
    final = steps(path)
    start = max(n for n, (word, _) in enumerate(final) if word == "FROM")
    users = [rest for word, rest in final[start:] if word == "USER"]
    assert users == [f"{USER_ID}:{USER_ID}"]
    assert f"useradd --uid {USER_ID}" in path.read_text()


def test_the_worker_has_what_its_pods_mount_and_call() -> None:
    text = (ROOT / "k8s/images/worker.Containerfile").read_text()
    assert HOME in text and WORK in text and "/opt/torch_extensions" in text and "bash" in text
    constraints = dict(
        line.split("==") for line in (ROOT / ".ci/constraints.txt").read_text().splitlines() if "==" in line
    )
    from launcher.runspec.model import Kubernetes

    assert Kubernetes(image="x").ray_version == constraints["ray"], (
        "the image's Ray is the one that run.yaml assumes"
    )
    assert "DS_BUILD_FUSED_ADAM=1" in text and '"8.0;9.0"' in text


def test_the_worker_can_read_what_the_examples_name() -> None:
    """A tokenizer.json needs its library in the image, a corpus in the cloud that of its storage."""
    import yaml

    text = (ROOT / "k8s/images/worker.Containerfile").read_text()
    (extras,) = re.findall(r'pip install .*"\.\[([\w,]+)\]"', text)
    for path in (ROOT / "examples").glob("*.yaml"):
        spec = yaml.safe_load(path.read_text())
        if (spec.get("cluster") or {}).get("to") == "kuberay":
            data = spec["data"]
            assert not str(data["tokenizer"]).endswith(".json") or "tokenizers" in extras.split(",")
            assert not data["path"].startswith("az://") or "azure" in extras.split(",")
    assert "train" in extras.split(",")


def test_every_folder_that_is_copied_exists() -> None:
    for path in IMAGES:
        for word, rest in steps(path):
            if word == "COPY" and not rest.startswith("--from"):
                for source in rest.split()[:-1]:
                    assert (ROOT / source).exists(), source
