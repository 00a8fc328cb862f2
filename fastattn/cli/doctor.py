"""``fastattn doctor``: look, never guess, never fail. Each fact is what was found here."""

import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import fastattn
from fastattn import first_use
from fastattn.backends import cpu_isa, cpu_isas, cuda_build

# The version of NVIDIA's kernel module; WSL has none.
_DRIVER = Path("/sys/module/nvidia/version")
# What each instruction set needs, in the names of /proc/cpuinfo.
_ISA_FLAGS = {
    "portable": (),
    "avx2": ("avx2", "fma", "f16c"),
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl"),
    "amx": ("amx_tile", "amx_bf16"),
}


def examine() -> dict[str, Any]:
    """Everything that ``doctor`` reports, as plain data."""
    return {
        "fastattn": _version("fastattn") or fastattn.__version__,  # of a wheel: with its label
        "python": sys.version.split()[0],
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": {
            name: _version(name)
            for name in ("torch", "triton", "transformers", "numpy", "rich", "matplotlib")
        },
        "torch": _torch(),
        "cpu": examine_cpu(),
        "extension": _extension("_C"),
        "extension_cuda": {**_extension("_C_cuda"), **_cuda()},
        "compilers": {name: _compiler(name) for name in _compiler_names()},
        "backends": [
            {"name": b.name, "usable": b.usable, "why": b.why, "details": _plain(b.details)}
            for b in fastattn.backends()
        ],
        "first_use": {
            "enabled": first_use.enabled(),
            "file": str(first_use.cache_file()),
            "verdicts": [asdict(v) for v in first_use.verdicts()],
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _torch() -> dict[str, Any]:
    available = torch.cuda.is_available()
    return {
        "built_for_cuda": torch.version.cuda,
        "cuda_available": available,
        "devices": [
            torch.cuda.get_device_name(i)
            for i in range(torch.cuda.device_count() if available else 0)
        ],
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "mkldnn": torch.backends.mkldnn.is_available(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def examine_cpu() -> dict[str, Any]:
    """The processor, and each instruction set: found, usable, or why not."""
    flags, model = _cpuinfo()
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count()
    try:
        usable, active = cpu_isas(), cpu_isa()
    except (AttributeError, RuntimeError, NotImplementedError):  # not built, or does not load
        usable, active = [], "none (the extension is not loaded)"
    isas = {}
    for name, needs in _ISA_FLAGS.items():
        missing = [flag for flag in needs if flag not in flags]
        if name in usable:
            why = "usable"
        elif flags and missing:
            why = "the processor or the system lacks " + ", ".join(missing)
        elif usable:
            why = "the processor lists it, but the system or the build does not offer it"
        else:
            why = "the extension is not loaded"
        isas[name] = {"detected": not missing, "usable": name in usable, "why": why}
    return {"model": model, "cores": cores, "active": active, "instruction_sets": isas}


def _cpuinfo() -> tuple[set[str], str]:
    path = Path("/proc/cpuinfo")
    flags: set[str] = set()
    model = platform.processor() or platform.machine()
    if path.exists():
        for line in path.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            if key.strip() in ("flags", "Features"):
                return set(value.split()), model
    return flags, model


def _extension(name: str) -> dict[str, Any]:
    try:
        module = importlib.import_module(f"fastattn.{name}")
    except ImportError as error:
        return {"loaded": False, "why": str(error).splitlines()[0]}
    return {"loaded": True, "file": Path(str(module.__file__)).name}


def _cuda() -> dict[str, Any]:
    """What ``_C_cuda`` was built with and the driver that it wants; nothing if it is not there."""
    build = cuda_build()
    if build is None:
        return {}
    driver = "none found"
    if build.driver is not None:
        version = _DRIVER.read_text().strip() if _DRIVER.exists() else "of unknown version"
        knows = "{}.{}".format(*build.driver)
        driver = f"{version}, knows CUDA {knows}: {'too old' if build.why_not() else 'new enough'}"
    return {
        "cuda_runtime": "{}.{}, linked in".format(*build.runtime),
        "machine_code": ", ".join(f"sm_{a}" for a in build.cubins),
        "ptx": ", ".join(f"compute_{a}" for a in build.ptx) or "none",
        "minimum_driver": build.minimum_driver,
        "driver": driver,
    }


def _compiler_names() -> list[str]:
    cxx = os.environ.get("CXX")
    return [*([cxx] if cxx else []), "c++", "g++", "clang++", "nvcc"]


def _compiler(name: str) -> str | None:
    path = shutil.which(name)
    if path is None:
        return None
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not run: {error}"
    lines = done.stdout.strip().splitlines()
    return (lines[-2] if name == "nvcc" and len(lines) > 1 else lines[0]) if lines else "?"


def render(facts: dict[str, Any], console: Console | None = None) -> None:
    """Print the facts as tables."""
    console = console or make_console()
    console.print(f"[bold]fastattn {facts['fastattn']}[/]  Python {facts['python']}  ", end="")
    console.print(facts["platform"])

    table = Table(title="Backends", title_justify="left")
    for column in ("backend", "usable", "why"):
        table.add_column(column)
    for backend in facts["backends"]:
        table.add_row(backend["name"], _yes(backend["usable"]), backend["why"])
    console.print(table)

    checks = facts["first_use"]
    if checks["verdicts"]:
        switch = "" if checks["enabled"] else " (switched off: FASTATTN_FIRST_USE)"
        title = f"GPU kernels that checked themselves on this machine{switch}"
        table = Table(title=title, title_justify="left")
        for column in ("op", "architecture", "kernel", "verdict", "ms"):
            table.add_column(column)
        for v in checks["verdicts"]:
            found = "[green]right[/]" if v["ok"] else f"[red]WRONG[/]: {escape(v['detail'])}"
            table.add_row(v["op"], v["architecture"], v["variant"], found, str(v["milliseconds"]))
        console.print(table)
    elif not checks["enabled"]:
        console.print("Checks of GPU kernels at first use are switched off (FASTATTN_FIRST_USE).")

    cpu = facts["cpu"]
    title = f"CPU: {cpu['model']}, {cpu['cores']} cores, active: {cpu['active']}"
    table = Table(title=title, title_justify="left")
    for column in ("instruction set", "detected", "usable", "why"):
        table.add_column(column)
    for name, isa in cpu["instruction_sets"].items():
        table.add_row(name, _yes(isa["detected"]), _yes(isa["usable"]), isa["why"])
    console.print(table)

    table = Table(title="Software", title_justify="left", show_header=False)
    for name, version in facts["versions"].items():
        table.add_row(name, version or "[dim]not installed[/]")
    for name, value in facts["torch"].items():
        table.add_row(f"torch: {name.replace('_', ' ')}", str(value))
    for module, found in (("_C", "extension"), ("_C_cuda", "extension_cuda")):
        for name, value in facts[found].items():
            table.add_row(f"fastattn.{module}: {name.replace('_', ' ')}", str(value))
    for name, value in facts["compilers"].items():
        table.add_row(name, value or "[dim]not found[/]")
    console.print(table)


def make_console(*, quiet: bool = False) -> Console:
    """A console that is 100 columns wide where it is not a terminal."""
    console = Console(quiet=quiet, highlight=False)
    if not console.is_terminal:
        console.width = 100
    return console


def _yes(value: bool) -> str:
    return "[green]yes[/]" if value else "[yellow]no[/]"
