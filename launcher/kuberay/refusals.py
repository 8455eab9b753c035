"""What an API server refuses, as errors that say what to do. Pure: a status and the server's words in, an error out."""

from typing import Any

from launcher.errors import Failed, WrongInput

Object = dict[str, Any]


class Away(Failed):
    """The API server does not answer, or answers that it can't now. The outcome of a write is open."""


class NotThere(Failed):
    """404."""


class Taken(Failed):
    """409: the name is taken."""


class Changed(Failed):
    """409: somebody changed the object since it was read."""


class Forbidden(Failed):
    """401, 403: who we are may not."""


class Expired(Failed):
    """410: the resource version of a watch or a list is too old. Read again, and watch from there."""


class RefusedObject(WrongInput):
    """The object itself is refused: by the schema, or by an admission webhook."""


def refusal(host: str, code: int, said: Object, what: str) -> Exception:
    """The error for an answer of `code`, whose Status object is `said`, to `what` was asked."""
    message = " ".join(str(said.get("message") or f"HTTP {code}").split())[:1000]
    reason, where = said.get("reason"), f"{host}: {what}: {message}"
    if code == 401:
        return Forbidden(
            f"{where}. The API server does not know you: log in again (az aks get-credentials, kubelogin)."
        )
    if "exceeded quota" in message:
        return Failed(
            f"{where}. A ResourceQuota of the namespace is used up: wait, ask for less, or have it raised."
        )
    if "failed calling webhook" in message:
        return Away(f"{where}. The controller behind this webhook (Kueue or KubeRay) is not running.")
    if code in (400, 403, 422) and "denied the request" in message:
        return RefusedObject(f"an admission webhook refuses it: {message}")
    if code == 403 and "violates PodSecurity" in message:
        return RefusedObject(f"the namespace's PodSecurity refuses it: {message}")
    if code == 403:
        return Forbidden(
            f"{where}. Ask for the role losscast-submitter (k8s/base/training) in this namespace."
        )
    if code == 404 and "could not find the requested resource" in message:
        return NotThere(
            f"{where}. This cluster does not know the kind: is the KubeRay (or Kueue) operator installed?"
        )
    if code == 404 and message.startswith("namespaces "):
        return NotThere(
            f"{where}. Whoever runs the cluster makes it: kubectl apply -k k8s/overlays/dev (or azure)."
        )
    if code == 404:
        return NotThere(where)
    if code == 409:
        return (Taken if reason == "AlreadyExists" else Changed)(where)
    if code == 410:
        return Expired(where)
    if code in (400, 422):
        return RefusedObject(f"the API server refuses it: {message}")
    if code in (429, 500, 502, 503, 504):
        return Away(where)
    return Failed(where)


def asked(method: str, path: str, body: Object | None = None) -> str:
    """What is asked, for people: `create rayjobs gpt-7b in namespace training`."""
    verbs = {"GET": "read", "POST": "create", "PUT": "change", "DELETE": "delete"}
    namespace, _, rest = path.rpartition("/namespaces/")[2].partition("/")
    name = ((body or {}).get("metadata") or {}).get("name") if method == "POST" else None
    return " ".join(
        [verbs[method], rest.replace("/", " "), *([str(name)] if name else []), "in namespace", namespace]
    )
