#!/usr/bin/env python3
"""Prints figures of the form of the Rust code, of the working tree or of git revisions.

A circle is a set of files of one crate that use each other's items in a loop, so that none can be
read, tested or moved without the others. Open it by moving the shared item to a file of its own.
A file uses the file that defines an item, even if a module between them re-exports it. "mod x;"
and "pub use" alone are no uses. Calls of methods are not followed.

Lines include comments and empty lines. Tests are the items with #[cfg(test)] and, in the crates,
the files called tests.rs or *_tests.rs or in a folder "tests". The package "tests" and benchmarks
are counted as suites only. The list of phrases is always that of the working tree.
"""

import io
import json
import re
import subprocess
import tarfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LONG = 60  # `--list long-functions` lists the functions that have more lines.

# The path of a module in its crate, as in ("connection", "calls"), or a path in the code.
Names = tuple[str, ...]
Imports = list[tuple[str, Names]]  # local names, and paths

TOKEN = re.compile(
    r"""(?P<skip>\s+|//[^\n]*) | (?P<comment>/\*)
    | (?P<literal>[bc]?r(?P<hashes>\#*)".*?"(?P=hashes) | [bc]?"(?:\\.|[^"\\])*"
      | b?'(?:\\(?:u\{\w+\}|x\w\w|.)|[^\\'])')
    | '\w+ | (?:r\#)?[^\W\d]\w* | \d\w* | :: | -> | => | .""",
    re.VERBOSE | re.DOTALL,
)
NAME = re.compile(r"(?:r#)?[^\W\d]\w*")
BRACKETS = {"(": ")", "[": "]", "{": "}"}
ITEMS = {"fn", "struct", "enum", "union", "trait", "type", "const", "static", "macro_rules", "mod"}
STARTS = ITEMS | {"pub", "impl", "use", "async", "unsafe", "extern"}
PREFIXES = {"crate", "self", "super"}
TEST = re.compile(r"# \[ (?:tokio :: )?test\b")
SATURATING = re.compile(
    r"\btry_(?:from|into) \((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\) \. unwrap_or \( [\w: ]*MAX \)"
)
NOT_PROSE = re.compile(
    r"^proto/google/|\.(lock|csv|css)$|^LICENSE$|^tests/phrases\.txt$|package-lock\.json$"
)


def tokenize(text: str) -> list[tuple[str, int]]:
    """Returns the tokens of Rust source code and their lines, literals as `""`, no comments."""
    tokens, at, line = [], 0, 1
    while match := TOKEN.match(text, at):
        end = match.end()
        if match["comment"]:
            depth = 1
            while depth and (mark := re.compile(r"/\*|\*/").search(text, end)):
                depth += 1 if mark[0] == "/*" else -1
                end = mark.end()
        elif not match["skip"]:
            tokens.append(('""' if match["literal"] else match[0], line))
        line += text.count("\n", at, end)
        at = end
    return tokens


class Source:
    """A source file: its tokens, and which of them are tests."""

    def __init__(self, path: str, text: str) -> None:
        self.path, self.lines = path, text.count("\n")
        tokens = tokenize(text)
        # Empty texts at the end allow looking ahead.
        self.texts = [text for text, _ in tokens] + [""] * 4
        self.line_of = [line for _, line in tokens]
        self.is_test = [False] * len(tokens)
        self.test_lines = 0
        self.test_modules: set[str] = set()  # paths without extension
        self.ends: dict[int, int] = {}  # the index of the closing bracket of each opening one
        opened = []
        for at, token in enumerate(self.texts):
            if token in BRACKETS:
                opened.append(at)
            elif token in BRACKETS.values() and opened:
                self.ends[opened.pop()] = at
        self._mark_tests()
        product = [text for text, is_test in zip(self.texts, self.is_test) if not is_test]
        self.saturating = len(SATURATING.findall(" ".join(product)))
        self.tests = len(TEST.findall(" ".join(self.texts)))

    def _mark_tests(self) -> None:
        for at in range(len(self.is_test)):
            if self.is_test[at] or self.texts[at : at + 3] != ["#", "[", "cfg"]:
                continue
            condition = self.texts[at : self.ends[at + 1]]
            if "test" in condition and "not" not in condition:
                end = self._end_of_item(at)
                self.is_test[at : end + 1] = [True] * (end + 1 - at)
                self.test_lines += self.line_of[end] - self.line_of[at] + 1
                if self.texts[end - 2] == "mod":
                    folder = re.sub(r"(/(lib|main|mod))?\.rs$", "", self.path)
                    self.test_modules.add(f"{folder}/{self.texts[end - 1]}")

    def _end_of_item(self, at: int) -> int:
        """Returns the index of the last token of an item, a field or a statement."""
        while self.texts[at] == "#":
            at = self.ends[at + 1] + 1
        is_item = self.texts[at] in STARTS
        has_body = not {"use", "const", "static", "let"} & set(self.texts[at : at + 2])
        while (text := self.texts[at]) not in BRACKETS.values() and text:
            at = self.ends.get(at, at)
            if text == ";" or text == "," and not is_item or text == "{" and has_body:
                return at
            at += 1
        return at - 1

    def functions(self) -> Iterator[tuple[int, str]]:
        """Yields the number of lines, and the place and name, of functions outside of tests."""
        for at, line in enumerate(self.line_of):
            if self.texts[at] != "fn" or self.is_test[at] or not NAME.match(self.texts[at + 1]):
                continue
            body = at
            while self.texts[body] not in {"{", ";", ""}:
                body = self.ends.get(body, body) + 1
            if self.texts[body] == "{":
                lines = self.line_of[self.ends[body]] - line + 1
                yield lines, f"{self.path}:{line}: {self.texts[at + 1]}"

    def imports(self, at: int, path: Names = ()) -> tuple[Imports, int]:
        """Returns what a `use` declaration imports, and the index of its end."""
        found: Imports = []
        while (text := self.texts[at]) not in {",", "}", ";", ""}:
            if text == "{":
                end = self.ends[at]
                while at < end:
                    inner, at = self.imports(at + 1, path)
                    found += inner
            elif text == "as":
                at += 1
                found[-1] = self.texts[at], path
            elif text != "::":
                path = path if path and text == "self" else (*path, text)
                if self.texts[at + 1] != "::":
                    found.append((path[-1], path))
            at += 1
        return found, at


class Module:
    """The items that a file defines, and the paths that it imports and uses."""

    def __init__(self, source: Source) -> None:
        self.file = source.path
        self.items: set[str] = set()
        self.imported: dict[str, Names] = {}
        self.globs: list[Names] = []
        self.used: set[Names] = set()
        reexported: Imports = []
        texts, at, body = source.texts, -1, 0  # `body` is the end of the current brackets.
        while (at := at + 1) < len(source.is_test):
            if source.is_test[at]:
                continue
            if texts[at] == "use":
                is_public = texts[at - 1] in {"pub", ")"}
                declared, at = source.imports(at + 1)
                self.globs += [path[:-1] for name, path in declared if name == "*"]
                declared = [(name, path) for name, path in declared if name != "*"]
                self.imported.update(declared)
                reexported += declared if is_public else []
                self.used.update(path for _, path in declared if not is_public)
            elif NAME.match(texts[at]) and texts[at - 1] not in {".", "::", "mod"}:
                end = at + 1
                while texts[end] == "::" and NAME.match(texts[end + 1]):
                    end += 2
                self.used.add(tuple(texts[at:end:2]))
            if at >= body:
                body = source.ends.get(at, body)
                if texts[at] in ITEMS and (texts[at] != "mod" or texts[at + 2] == "{"):
                    self.items.add(texts[at + 1 + (texts[at + 1] == "!")])
        names = {path[0] for path in self.used}
        self.used.update(path for name, path in reexported if name in names)


class Item(NamedTuple):
    """An item and the file that defines it."""

    file: str
    name: str


class Crate:
    """The modules of a library or binary, and which file uses which items of which file."""

    def __init__(self, sources: dict[Names, Source]) -> None:
        self.modules = {path: Module(source) for path, source in sources.items()}
        self.uses: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
        for path, module in self.modules.items():
            for names in module.used:
                item = self._resolve(path, names, ())
                if isinstance(item, Item) and item.file != module.file:
                    self.uses[module.file, item.file].add(item.name)

    def _resolve(self, path: Names, names: Names, seen: tuple[object, ...]) -> Item | Names | None:
        """Returns the item or the module that a path in a module names; None if in no module."""
        is_internal = names[0] in PREFIXES
        path = () if names[0] == "crate" else path
        while names and names[0] in PREFIXES:
            path = path[:-1] if names[0] == "super" else path
            names = names[1:]
        while names:
            found = self._find(path, names, seen)
            if found is None and is_internal and names[0] not in self.modules[path].imported:
                return Item(self.modules[path].file, names[0])  # A macro defines the item.
            if found is None or isinstance(found, Item):
                return found
            path, names, is_internal = found, names[1:], True
        return path

    def _find(self, path: Names, names: Names, seen: tuple[object, ...]) -> Item | Names | None:
        """Returns what the first of some names means in a module."""
        module, name = self.modules[path], names[0]
        if (path, name) in seen:
            return None
        seen = (*seen, (path, name))
        if (*path, name) in self.modules and (len(names) > 1 or name not in module.items):
            return (*path, name)
        if name in module.items:
            return Item(module.file, name)
        if name in module.imported:
            return self._resolve(path, module.imported[name], seen)
        for glob in module.globs:
            target = self._resolve(path, glob, seen)
            if not isinstance(target, Item | None) and (found := self._find(target, names, seen)):
                return found
        return None

    def circles(self) -> list[Names]:
        """Returns the sets of files that use each other in a loop."""
        reached: dict[str, set[str]] = {}
        for start, _ in self.uses:
            waiting, reached[start] = [start], set()
            while waiting:
                user = waiting.pop()
                found = {file for using, file in self.uses if using == user} - reached[start]
                reached[start] |= found
                waiting += found
        loops = ({b for b in reached[a] if a in reached.get(b, ())} for a in reached)
        return sorted({tuple(sorted(loop)) for loop in loops if loop})

    def describe(self, circle: Names) -> str:
        """Returns the files of a circle, and the items that they use of each other."""
        lines = [f"{len(circle)} files: {', '.join(circle)}"]
        for (user, file), names in sorted(self.uses.items()):
            if user in circle and file in circle:
                lines.append(f"    {user} -> {file}: {', '.join(sorted(names))}")
        return "\n".join(lines)


def crates(sources: dict[str, Source], packages: list[str]) -> Iterator[Crate]:
    """Yields the libraries and binaries of the packages in some folders."""
    for root in (f"{package}/src/" for package in packages):
        modules: dict[Names, Source] = {}
        for path in (path for path in sources if path.startswith(root)):
            names = tuple(re.sub(r"(/mod)?\.rs$", "", path.removeprefix(root)).split("/"))
            if names[0] == "bin" or names == ("main",) and f"{root}lib.rs" in sources:
                yield Crate({(): sources[path]})
            else:
                modules[() if names in {("lib",), ("main",)} else names] = sources[path]
        if () in modules:
            yield Crate(modules)


def files_of(revision: str | None) -> dict[str, bytes]:
    """Returns the files of a git revision, or of the working tree, by path."""
    if revision is None:
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        paths = [path for path in sorted({*listed.stdout.split("\0")}) if (ROOT / path).is_file()]
        return {path: (ROOT / path).read_bytes() for path in paths}
    command = ["git", "archive", "--format=tar", revision]
    archive = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        opened = [(member.name, tar.extractfile(member)) for member in tar if member.isfile()]
        return {path: file.read() for path, file in opened if file}


def phrases_in(files: dict[str, bytes]) -> list[str]:
    """Returns the phrases of tests/phrases.txt in some files, by the rules of suite `tidy`."""
    lines = (ROOT / "tests/phrases.txt").read_text().splitlines()
    exceptions = [line[1:].split("\t") for line in lines if line.startswith("!")]
    phrases = "|".join(line.split("\t")[0] for line in lines if line[0] not in "#!")
    phrases = phrases.replace(" ", r"\s+(?:[/#*!]+\s*)?")
    regex = re.compile(rf"(?i)(?:^|[^.\w])((?:{phrases})\b)".encode())
    found = []
    for path, text in files.items():
        for match in [] if NOT_PROSE.search(path) else regex.finditer(text):
            start = text.rfind(b"\n", 0, match.start(1)) + 1
            line = text[start:].split(b"\n")[0].decode(errors="replace").strip()
            if not any(path == entry[0] and entry[1] in line for entry in exceptions):
                number = text.count(b"\n", 0, start) + 1
                found.append(f"{path}:{number}: {match[1].decode()!r} in {line!r}")
    return found


def percentiles(name: str, values: list[int]) -> dict[str, float]:
    """Returns percentiles by nearest rank."""
    values = sorted(values) or [0]
    ranks = {"median": 50, "90th percentile": 90, "99th percentile": 99, "maximum": 100}
    return {f"{name}, {r}": values[(len(values) * p - 1) // 100] for r, p in ranks.items()}


class Measurement:
    """The figures of some files, and lists of what they count."""

    def __init__(self, files: dict[str, bytes]) -> None:
        rust = {p: Source(p, text.decode()) for p, text in files.items() if p.endswith(".rs")}
        suites = {path for path in rust if re.search(r"^tests/|/benches/", path)}
        modules = "|".join(module for source in rust.values() for module in source.test_modules)
        test = re.compile(rf"({modules}|.*/(.*_)?tests)(\.rs$|/)")
        tests = {path for path in rust.keys() - suites if test.match(path)}
        product = {path: rust[path] for path in rust if path not in suites | tests}
        sources = product.values()
        packages = [p[: -len("/Cargo.toml")] for p in sorted(files) if p.endswith("/Cargo.toml")]
        circles = [(crate, c) for crate in crates(product, packages) for c in crate.circles()]
        functions = sorted((f for s in sources for f in s.functions()), reverse=True)
        lines = sum(source.lines - source.test_lines for source in sources)
        test_lines = sum(rust[p].lines for p in tests) + sum(s.test_lines for s in sources)
        self.circles = [circle for _, circle in circles]
        self.lists: dict[str, list[str]] = {
            "circles": [crate.describe(circle) for crate, circle in circles],
            "long-functions": [f"{name}, {n} lines" for n, name in functions if n > LONG],
            "phrases": phrases_in(files),
        }
        self.figures: dict[str, float] = {
            "files": len(product),
            "lines": lines,
            **percentiles("lines per file", [source.lines for source in sources]),
            "functions": len(functions),
            **percentiles("lines per function", [lines for lines, _ in functions]),
            "circles of files": len(circles),
            "files in circles": sum(len(circle) for _, circle in circles),
            "unit tests": sum(rust[path].tests for path in rust.keys() - suites),
            "lines of unit tests": test_lines,
            "lines of unit tests, percent of lines": round(100 * test_lines / max(1, lines), 1),
            "tests of suites": sum(rust[path].tests for path in suites),
            "lines of suites": sum(rust[path].lines for path in suites),
            "phrases of tests/phrases.txt": len(self.lists["phrases"]),
            "saturating conversions": sum(source.saturating for source in sources),
        }


def self_test() -> None:
    """Tests the tokenizer and the search for circles."""
    code = """a /* { /* } */ */ r#"fn "{"# // {\n'{' 'b b'\\'' "\\"{" 1..2"""
    texts = [text for text, _ in tokenize(code)]
    assert texts == ["a", '""', '""', "'b", '""', '""', "1", ".", ".", "2"], texts
    rust = {
        "lib": "mod a; mod b; mod c; pub use b::B; pub use c::C; // crate::a::f",
        "a": "use crate::{B as X, c}; fn f() { c::g() } #[cfg(test)] mod t { use crate::d::f; }",
        "b": "mod inner; pub struct B; fn f() -> inner::Inner { todo!() }",
        "b/inner": "use super::*; pub struct Inner(B);",
        "c": 'fn g() { u8::try_from(f(1)).unwrap_or(u8::MAX) } #[test] fn t() { "crate::a::f" }',
        "d": "fn f() { crate::a::f(); }",
    }
    files = {f"x/src/{name}.rs": text.encode() for name, text in rust.items()}
    measured = Measurement({**files, "x/Cargo.toml": b""})
    expected = "2 files: x/src/b.rs, x/src/b/inner.rs\n    x/src/b.rs -> x/src/b/inner.rs: Inner"
    assert measured.lists["circles"] == [f"{expected}\n    x/src/b/inner.rs -> x/src/b.rs: B"]
    assert measured.figures["saturating conversions"] == measured.figures["unit tests"] == 1


def main() -> None:
    """Runs the command."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add, lists = parser.add_argument, ["circles", "long-functions", "phrases"]
    add("--rev", action="append", help="measure this git revision; repeat it to add a column")
    add("--list", choices=lists, help="list these instead of figures")
    add("--json", action="store_true", help="print JSON")
    add("--self-test", action="store_true", help="test this script")
    arguments = parser.parse_args()
    if arguments.self_test:
        return self_test()
    revisions = arguments.rev or [None]
    measured = {rev or "working tree": Measurement(files_of(rev)) for rev in revisions}
    if arguments.json:
        found = {rev: {**m.figures, "circles": m.circles} for rev, m in measured.items()}
        print(json.dumps(found, indent=2))
    elif arguments.list:
        print("\n".join(line for m in measured.values() for line in m.lists[arguments.list]))
    else:
        print("| figure |", " | ".join(measured), "|\n|---|" + "---:|" * len(measured))
        for name in next(iter(measured.values())).figures:
            print(f"| {name} |", " | ".join(f"{m.figures[name]:,}" for m in measured.values()), "|")


main()
