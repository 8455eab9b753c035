"""run.yaml from a file: the RunSpec in it, or every problem as `file:line:col path: what, why, what instead`."""

from pathlib import Path

from pydantic import ValidationError

from launcher.runspec.document import Complaint, Document, read_document
from launcher.runspec.model import RunSpec
from launcher.runspec.wording import word


def read_spec(path: str | Path) -> RunSpec:
    """The RunSpec in a file. Raises WrongInput with every problem, each with its place, path and remedy."""
    return spec_in(read_document(path))


def spec_in(document: Document) -> RunSpec:
    """The RunSpec in a document that was read. Raises WrongInput like `read_spec`."""
    if not isinstance(document.data, dict):
        kinds = {type(None): "nothing", list: "a list", str: "text", bool: "true or false"}
        found = kinds.get(type(document.data), "a number")
        raise document.refuse(
            [
                *document.complaints,
                Complaint((), f"need keys such as name:, workload:, train:; found {found}"),
            ]
        )
    if "rungs" in document.data:
        said = "this is a ladder, not a run. Give it to `losscast ladder`."
        raise document.refuse([Complaint(("rungs",), said, at_key=True)])
    try:
        spec = RunSpec.model_validate(document.data)
    except ValidationError as error:
        raise document.refuse([*document.complaints, *word(error, document.data)]) from None
    if document.complaints:
        raise document.refuse(document.complaints)
    return spec
