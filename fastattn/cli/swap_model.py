"""The model, and what it is called with, that ``fastattn swap`` and ``tune`` are given in words."""

import contextlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastattn.cli._mistakes import Mistake

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def load_model(spec: str, *, weights: bool) -> nn.Module:
    """The module that `spec` names.

    Args:
        spec: a Hugging Face folder, MODULE:NAME or FILE.py:NAME.
        weights: False: of a Hugging Face model the structure alone, on the meta device, so that a
            model of any size is looked at in a second.
    """
    if Path(spec).is_dir():
        return _from_folder(Path(spec), weights)
    if ":" not in spec:
        raise Mistake(
            f"{spec} is neither a folder nor MODULE:NAME; a model of the Hub has to be on disk: "
            f"hf download {spec} --local-dir FOLDER"
        )
    model = called(spec)
    if not isinstance(model, nn.Module):
        raise Mistake(f"{spec} is no torch.nn.Module but {_a(model)}")
    return model


def load_inputs(spec: str) -> Inputs:
    """Positional and keyword arguments of a call, from what `spec` names."""
    return as_inputs(f"--inputs {spec}", called(spec))


def as_inputs(what: str, found: Any) -> Inputs:
    """Positional and keyword arguments; `what`: names `found` in the error."""
    if isinstance(found, torch.Tensor):
        return (found,), {}
    if isinstance(found, tuple):
        return found, {}
    if isinstance(found, Mapping):  # a tokenizer's BatchEncoding too
        return (), dict(found)
    raise Mistake(f"{what} is no tensor, tuple or dict but {_a(found)}")


def token_inputs(model: nn.Module, batch: int, tokens: int | None) -> Inputs:
    """Random token ids for a Hugging Face model."""
    config = getattr(model, "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    if getattr(model, "main_input_name", None) != "input_ids" or not isinstance(vocabulary, int):
        raise Mistake("--inputs MODULE:NAME is needed: this is no Hugging Face model of tokens")
    most = getattr(config, "max_position_embeddings", None)
    if not isinstance(most, int):
        most = None
    if tokens is None:
        tokens = min(128, most or 128)
    if most is not None and tokens > most:
        raise Mistake(f"--tokens {tokens} is more than the model's {most} positions")
    ids = torch.randint(vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(config, "is_encoder_decoder", False):
        given["decoder_input_ids"] = ids
    return (), given


def named(spec: str) -> Any:
    """What MODULE:NAME or FILE.py:NAME stands for; the current folder is looked into as well."""
    source, _, name = spec.rpartition(":")
    if not source or not name:
        raise Mistake(f"{spec} is not of the form MODULE:NAME or FILE.py:NAME")
    module = _import(source)
    for part in name.split("."):
        if not hasattr(module, part):
            raise Mistake(f"{source} has no {name}")
        module = getattr(module, part)
    return module


def called(spec: str) -> Any:
    """What `spec` names, or what it returns where that is a function or a class."""
    found = named(spec)
    if isinstance(found, nn.Module) or not callable(found):
        return found
    function: Callable[[], Any] = found
    with users_code(spec):
        return function()


def _import(source: str) -> Any:
    path = Path(source)
    if path.suffix == ".py":
        if not path.is_file():
            raise Mistake(f"no such file: {source}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        loader = spec.loader if spec is not None else None
        if spec is None or loader is None:
            raise Mistake(f"{source} is no Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        with users_code(source):
            loader.exec_module(module)
        return module
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        with users_code(source):
            return importlib.import_module(source)
    except ModuleNotFoundError as error:
        if error.name and (source == error.name or source.startswith(error.name + ".")):
            raise Mistake(f"no module named {source} here or among installed packages") from None
        raise
    finally:
        sys.path.remove(here)


@contextlib.contextmanager
def users_code(what: str) -> Iterator[None]:
    """Around code of the user's: its prints go to stderr, its errors are one line that says where.

    stdout is the command's own, which may be JSON.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except ModuleNotFoundError as error:
        if error.name and what.startswith(error.name):
            raise
        raise Mistake(f"{what} needs a module that is not installed: {error.name}") from None
    except SystemExit as error:  # a script without a guard: its code would be taken for ours
        raise Mistake(f"{what} ended with sys.exit({error.code!r})") from None
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        last = frames[-1]
        theirs = last.filename != __file__
        where = f" ({last.filename}:{last.lineno})" if theirs else ""
        lines = str(error).strip().splitlines() or [""]
        raise Mistake(f"{what} raised {type(error).__name__}: {lines[0]}{where}") from None


def _a(found: Any) -> str:
    return f"of type {type(found).__module__}.{type(found).__qualname__}"


def _from_folder(path: Path, weights: bool) -> nn.Module:
    if not (path / "config.json").is_file():
        raise Mistake(f"{path} is no Hugging Face folder: it has no config.json")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import transformers

    transformers.logging.disable_progress_bar()
    with users_code(str(path)):
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    names = [n for n in config.architectures or () if hasattr(transformers, n)]
    cls: Any = getattr(transformers, names[0]) if names else transformers.AutoModel
    if not weights:
        with users_code(str(path)), torch.device("meta"):
            model: nn.Module = cls(config) if names else cls.from_config(config)
        return model.eval()
    with users_code(str(path)):
        model = cls.from_pretrained(path, local_files_only=True)
    return model.eval()
