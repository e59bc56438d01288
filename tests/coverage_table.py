#!/usr/bin/env python3
"""Prints line coverage per crate as a Markdown table, from the JSON summary of cargo-llvm-cov."""

import json
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def crate(file: Path) -> Path:
    """Returns the folder of the crate to which a source file belongs."""
    return next(folder for folder in file.parents if (folder / "Cargo.toml").exists())


def main() -> None:
    """Prints the table for the file named by the first argument."""
    files = json.loads(Path(sys.argv[1]).read_text())["data"][0]["files"]
    covered: defaultdict[str, int] = defaultdict(int)
    total: defaultdict[str, int] = defaultdict(int)
    for file in files:
        name = str(crate(Path(file["filename"])).relative_to(ROOT))
        for key in (name, "all"):
            covered[key] += file["summary"]["lines"]["covered"]
            total[key] += file["summary"]["lines"]["count"]
    print("| crate | lines | covered |")
    print("|---|---:|---:|")
    for name in [*sorted(total.keys() - {"all"}), "all"]:
        print(f"| {name} | {total[name]:,} | {100 * covered[name] / total[name]:.1f} % |")


main()
