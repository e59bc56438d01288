"""Build hook: generates `streamer/_proto` from the protobuf schema, so that the repository contains
no generated code.

In the repository, the schema is in `../../proto` and the license in `../../LICENSE`; a source
distribution contains copies in `proto` and `LICENSE`.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SCHEMA = [
    "streamer/common/v1/common.proto",
    "streamer/common/v1/method_options.proto",
    "streamer/processor/v1/worker.proto",
    "streamer/progress/v1/progress.proto",
    "streamer/router/v1/router.proto",
]


class SchemaHook(BuildHookInterface):  # type: ignore[type-arg]
    """Adds the generated modules to a wheel, and the schema to a source distribution."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        bundled = root / "proto"
        schema = bundled if bundled.is_dir() else (root / ".." / ".." / "proto").resolve()
        if self.target_name == "sdist":
            for name in SCHEMA:
                build_data["force_include"][str(schema / name)] = f"proto/{name}"
            add_license(root, "LICENSE", build_data)
        elif version == "editable":
            generate(schema, root / "src" / "streamer" / "_proto")
        else:
            self.scratch = tempfile.TemporaryDirectory()
            generate(schema, Path(self.scratch.name))
            build_data["force_include"][self.scratch.name] = "streamer/_proto"
            info = f"{self.build_config.builder.project_id}.dist-info"
            add_license(root, f"{info}/licenses/LICENSE", build_data)


def add_license(root: Path, target: str, build_data: dict[str, Any]) -> None:
    """Adds the license of the repository. In a source distribution, hatchling finds the copy."""
    if not (root / "LICENSE").is_file():
        source = (root / ".." / ".." / "LICENSE").resolve()
        build_data["force_include"][str(source)] = target


def generate(schema: Path, target: Path) -> None:
    """Generates package `streamer._proto` from the schema, in the folder `target`."""
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = [f"-I{schema}", f"--python_out={scratch}", f"--pyi_out={scratch}", *SCHEMA]
        subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *arguments], check=True)
        for module in Path(scratch).rglob("*_pb2.py*"):
            text = module.read_text(encoding="utf-8")
            text = re.sub(r"from streamer(\.\w+)+ import", "from streamer._proto import", text)
            (target / module.name).write_text(text, encoding="utf-8")
    (target / "__init__.py").write_text('"""Generated from the schema. Private."""\n')
