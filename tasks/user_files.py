"""Tasks and reward functions in a user's own files: "path/to/file.py:NAME"."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.messages import did_you_mean, first_line, home_path
from tasks.task_base import Task

METHODS = {  # of a task, with the arguments that they are called with
    "train_problem": ("index",),
    "test_problem": ("index",),
    "problems": ("split", "n", "start"),
    "longest_problems": ("n",),
    "is_correct": ("problem", "answer"),
    "score": ("problem", "answer"),
    "reward": ("problem", "response"),
    "diagnostics": ("problem", "response"),
    "respond": ("problem", "text_so_far"),
    "reward_turns": ("problem", "turns"),
}
ARGUMENTS = ("problem", "response", "answer", "target")  # that a reward function may have


def load_user_task(source: str, options: dict[str, Any]) -> Task:
    """Make the task "path/to/file.py:Class". Raises FileNotFoundError or ValueError, in one line."""
    cls = user_task_class(source)
    try:
        return cls(**options)
    except (Exception, SystemExit) as error:  # a user's constructor may raise anything
        raise ValueError(f"{source}: making the task raised {type(error).__name__}: {first_line(error)}") from error


def user_task_class(source: str) -> type[Task]:
    """The class named by "path/to/file.py:Class". Raises FileNotFoundError or ValueError, in one line."""
    name, found = _user_names(source, "MyTask")
    classes = {key: value for key, value in found.items() if isinstance(value, type)}
    tasks = {key: cls for key, cls in classes.items() if issubclass(cls, Task) and cls is not Task}
    if name not in tasks:
        wrong = name in classes or f"no class {name}{did_you_mean(name, tasks)}"
        raise ValueError(f"{source}: {'is no subclass of task_base.Task' if wrong is True else wrong}")
    cls = tasks[name]
    missing = []
    if cls.problems is Task.problems:
        missing += [method for method in ("train_problem", "test_problem") if _same(cls, method)]
    if all(_same(cls, method) for method in ("is_correct", "score", "reward")):
        missing.append("is_correct (or reward)")
    if cls.stop_strings and _same(cls, "respond"):
        missing.append("respond, which its stop_strings need")
    if missing:
        raise ValueError(f"{source}: {name} has no method {', '.join(missing)}; docs/your-own.md shows a complete task")
    for method, arguments in METHODS.items():
        _check_arguments(source, cls, method, arguments)
    return cls


def _check_arguments(source: str, cls: type[Task], method: str, arguments: tuple[str, ...]) -> None:
    function = getattr(cls, method)
    if not callable(function):
        raise ValueError(f"{source}: {cls.__name__}.{method} is {type(function).__name__}, expected a method")
    own = () if isinstance(inspect.getattr_static(cls, method), classmethod | staticmethod) else ("self",)
    try:
        signature = inspect.signature(function)
        signature.bind(*own, *arguments)
    except TypeError as error:
        shown = ", ".join(("self", *arguments))
        raise ValueError(
            f"{source}: {cls.__name__}.{method} has the arguments {signature}; expected ({shown})"
        ) from error


def _same(cls: type[Task], method: str) -> bool:
    return getattr(cls, method) is getattr(Task, method)


def reward_function(source: str) -> Callable[[dict[str, Any]], Any]:
    """The function named by "path/to/file.py:function", as a function of the values of ARGUMENTS.

    Arguments with these names get these values. A function with other names gets (problem, response), or the response
    alone if it needs one argument. Raises FileNotFoundError or ValueError, in one line.
    """
    name, found = _user_names(source, "my_reward")
    functions = {key: value for key, value in found.items() if callable(value) and not isinstance(value, type)}
    if name not in functions:
        raise ValueError(f"{source}: no function {name}{did_you_mean(name, functions)}")
    function = functions[name]
    try:
        signature = inspect.signature(function)
    except ValueError as error:
        raise ValueError(
            f"{source}: its arguments are not known ({first_line(error)}); write a Python function"
        ) from error
    several = [p for p in signature.parameters.values() if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    needed = [p.name for p in signature.parameters.values() if p.default is p.empty and p not in several]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in several)
    if (needed or takes_all) and set(needed) <= set(ARGUMENTS):
        wanted = [key for key in ARGUMENTS if takes_all or key in signature.parameters]
        return lambda values: function(**{key: values[key] for key in wanted})
    wanted = ["response"] if len(needed) == 1 and not several else ["problem", "response"]
    try:
        signature.bind(*wanted)
    except TypeError as error:
        raise ValueError(f"{source}: the arguments are {signature}; expected some of {', '.join(ARGUMENTS)}") from error
    return lambda values: function(*(values[key] for key in wanted))


def _user_names(source: str, example: str) -> tuple[str, dict[str, Any]]:
    """(name, all names of the file) of "path/to/file.py:name"."""
    file, colon, name = source.rpartition(":")
    path = home_path(file)
    if not colon or not name or path.suffix != ".py":
        raise ValueError(f"{source}: expected path/to/file.py:{example}")
    if not _is_file(path):
        raise FileNotFoundError(f"{path}: no such file (looked in {Path.cwd()}); expected path/to/file.py:{example}")
    return name, vars(_user_module(path.resolve()))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, a folder that may not be read
        return False


def _user_module(path: Path) -> Any:
    name = f"user_task_{path.stem}"
    known = sys.modules.get(name)
    if known is not None and known.__file__ == str(path):
        return known
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # so that the file can import its neighbours
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # the name ends in .py
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a user's file may raise anything
        del sys.modules[name]
        raise ValueError(f"{path}: importing it raised {type(error).__name__}: {first_line(error)}") from error
    return module
