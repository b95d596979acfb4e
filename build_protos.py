"""Build hook: generates `stoker/v1` from `protos/` at install, so that stubs are never in git.

Run by hatchling for wheels and editable installs, in a build environment of its own: the generator must be
older than the protobuf runtime we run on (see pyproject.toml), so the two can't share one.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
PROTO_ROOT = ROOT / "protos"
PACKAGE = Path("stoker") / "v1"


def generate(root: Path = ROOT) -> list[Path]:
    """Generate messages, gRPC stubs and their types for every proto below `protos/`.

    Returns:
        The generated files, absolute.

    Raises:
        RuntimeError: protoc refused a file; its own message went to stderr.
    """
    from grpc_tools import protoc  # noqa: PLC0415 - only the build environment has it

    protos = sorted((PROTO_ROOT / PACKAGE).glob("*.proto"))
    target = root / PACKAGE
    target.mkdir(parents=True, exist_ok=True)
    for stale in target.glob("*_pb2*.py*"):
        stale.unlink()
    (target / "__init__.py").write_text('"""Generated from protos/stoker/v1; see build_protos.py."""\n')
    includes = [f"-I{PROTO_ROOT}", f"-I{resources.files('grpc_tools') / '_proto'}"]
    outputs = [f"--{kind}_out={root}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    status = protoc.main(["protoc", *includes, *outputs, *map(str, protos)])
    if status != 0:
        raise RuntimeError(f"protoc failed with status {status} on {PROTO_ROOT / PACKAGE}")
    return sorted(target.glob("*.py*"))


try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ModuleNotFoundError:  # run by hand, outside a build
    pass
else:

    class ProtoBuildHook(BuildHookInterface):  # type: ignore[type-arg]
        """Generate the stubs before hatchling collects files."""

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            """Generate into the source tree; `artifacts` in pyproject.toml lets them into the wheel."""
            del version, build_data
            generate()


if __name__ == "__main__":
    generate()
