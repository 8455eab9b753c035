"""Whether a run's entrypoint can be called, told from its source before a job is handed in. Nothing of it is imported.

Looks at what a rank will look at: the folder that is submitted from, on Kubernetes the one that travels with the job.
Says nothing where only the run itself can know: modules installed elsewhere, names that a module makes while it is imported.
"""

import ast
import importlib.util
from pathlib import Path

from launcher.errors import WrongInput
from launcher.runspec.model import Entrypoint, RunSpec

Function = ast.FunctionDef | ast.AsyncFunctionDef


def refuse_uncallable(spec: RunSpec, here: Path) -> None:
    """Raise WrongInput where a rank would find no such script, module or function, no Python in it, or arguments it has no
    use for. `here` is the folder that is submitted from."""
    workload = spec.workload
    if not isinstance(workload, Entrypoint):
        return
    home = here
    if spec.cluster.to == "kuberay":
        if spec.kubernetes is None or spec.kubernetes.working_dir is None:
            return  # the code is in the image
        home = (here / Path(spec.kubernetes.working_dir).expanduser()).resolve()
    if workload.is_script:
        script = home / workload.entrypoint
        if not script.is_file():
            raise WrongInput(
                f"workload.entrypoint: there is no script {workload.entrypoint} in {home}. {_near(home)}"
            )
        _parsed(script)
        return
    module, _, name = workload.entrypoint.partition(":")
    source = _source(home, module)
    if source is None:
        if spec.cluster.to == "local" and not _installed(module):
            raise WrongInput(
                f"workload.entrypoint: there is no module {module} in {home}, nor is one installed. {_near(home)}"
            )
        return
    body = _parsed(source)
    if not _binds(body, name):
        functions = [n.name for n in body.body if isinstance(n, Function) and not n.name.startswith("_")]
        has = f"It has {', '.join(functions)}." if functions else "It has no function at all."
        raise WrongInput(f"workload.entrypoint: {source} has no function {name}. {has}")
    function = next((n for n in reversed(body.body) if isinstance(n, Function) and n.name == name), None)
    if function is not None and not function.decorator_list and isinstance(workload.args, dict):
        _refuse_arguments(function, workload.args, source)


def _refuse_arguments(function: Function, given: dict, source: Path) -> None:
    """Raise WrongInput where a function would refuse its arguments; `run` is losscast's to give."""
    takes = function.args
    names = [a.arg for a in (*takes.posonlyargs, *takes.args, *takes.kwonlyargs)]
    optional = {
        a.arg
        for a in (*takes.posonlyargs, *takes.args)[len(names) - len(takes.kwonlyargs) - len(takes.defaults) :]
    }
    optional |= {
        a.arg for a, default in zip(takes.kwonlyargs, takes.kw_defaults, strict=True) if default is not None
    }
    at, said = f"{source}:{function.lineno}", [n for n in names if n != "run"]
    unknown = [n for n in given if n not in names] if takes.kwarg is None else []
    if unknown:
        raise WrongInput(
            f"workload.args: {', '.join(unknown)}: {function.name} takes {', '.join(said) or 'nothing but run'} ({at})."
        )
    missing = [n for n in said if n not in optional and n not in given]
    if missing:
        raise WrongInput(
            f"workload.args: {function.name} needs {', '.join(missing)} as well ({at}). Add args: {{{missing[0]}: ...}}."
        )


def _source(home: Path, module: str) -> Path | None:
    """The file of a module below a folder; None where it has none there."""
    base = home.joinpath(*module.split("."))
    return next((f for f in (base / "__init__.py", base.with_suffix(".py")) if f.is_file()), None)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module.split(".")[0]) is not None
    except (ImportError, ValueError):
        return False


def _near(home: Path) -> str:
    """The Python files of a folder, for who mistyped one."""
    files = sorted(p.name for p in home.glob("*.py"))[:6] if home.is_dir() else []
    return f"It has {', '.join(files)}." if files else "Submit from the folder that has it."


def _parsed(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes(), str(path))
    except SyntaxError as error:
        said = f"{path}:{error.lineno}:{error.offset}: {error.msg}"
        raise WrongInput(f"workload.entrypoint: this is no Python that can be run: {said}") from error
    except (OSError, ValueError) as error:
        raise WrongInput(f"workload.entrypoint: {path} can't be read: {error}") from error


def _binds(body: ast.Module, name: str) -> bool:
    """True unless a module surely has no such name: it may be imported, assigned, or made by a statement of any kind."""
    for node in ast.walk(body):
        if isinstance(node, Function | ast.ClassDef) and node.name in (name, "__getattr__"):
            return True
        if isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Store):
            return True
        if isinstance(node, ast.alias) and (node.asname or node.name.split(".")[0]) in (name, "*"):
            return True
    return False
