# Everyday commands; `just` lists them. CONTRIBUTING.md explains them.

set shell := ["bash", "-euo", "pipefail", "-c"]

tools := justfile_directory() / "target/tools/environment"

_default:
    @just --list --unsorted

# Formatting, clippy and all unit tests.
check:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets --locked -- -D warnings
    source {{ tools }} && cargo nextest run --workspace --locked --lib --bins

# Unit tests whose names contain NAME.
unit NAME:
    source {{ tools }} && cargo nextest run --workspace --locked --lib --bins {{ NAME }}

# A suite of tests/suites, or its tests whose names contain NAME: `just test cluster partition`.
test SUITE NAME="":
    cargo build --workspace --locked --bins
    source {{ tools }} && cargo test --workspace --locked --test {{ SUITE }} -- {{ NAME }}

# Formats all code.
fmt:
    cargo fmt --all
    source {{ tools }} && ruff format clients/python

# Everything that CI runs.
ci:
    tests/run

# Installs the tools of the tests, by version, into target/tools.
install:
    tests/run --install tools
