"""`penstock spdk`: builds the shim of the `spdk` block engine, and shows a target's properties."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="spdk",
    add_completion=False,
    help="The spdk block engine: build its shim against your SPDK, try a target.",
    no_args_is_help=True,
)

_FAILED = 2


@app.command()
def build(
    pkg_config_path: Annotated[
        Path | None, typer.Option(help="Folder that holds spdk_nvme.pc, searched before pkg-config's own.")
    ] = None,
    cc: Annotated[str | None, typer.Option(help="C compiler; cc, gcc or clang where not given.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where to put the shim; the user's cache folder where not given.")
    ] = None,
) -> None:
    """Compile the shim against your own SPDK, found through pkg-config."""
    from penstock.io.spdk.build import BuildError
    from penstock.io.spdk.build import build as build_shim

    try:
        built = build_shim(pkg_config_path, cc, out)
    except BuildError as error:
        typer.echo(f"penstock spdk build: {error}", err=True)
        raise typer.Exit(_FAILED) from error
    folders = ", ".join(map(str, built.libraries_in)) or "the linker's own folders"
    typer.echo(f"built {built.path}")
    typer.echo(f"against {built.built_against}, {built.linkage} libraries in {folders}")
    if not built.has_tcp:
        typer.echo("without spdk_sock_posix: NVMe/TCP targets cannot be reached")
    if "PSP_HAS_NO_HUGE" not in built.features:
        typer.echo("without no_huge (SPDK before 24.01): huge pages are needed")


@app.command()
def probe(
    target: Annotated[str, typer.Argument(help="PCIe address, or 'trtype:TCP adrfam:IPv4 traddr:... subnqn:...'.")],
    namespace: Annotated[int, typer.Option(help="Namespace of the controller.")] = 1,
    library: Annotated[Path | None, typer.Option(help="The shim, where it is not in the cache folder.")] = None,
) -> None:
    """Connect to a target and say what it is; nothing is read or written."""
    from penstock.io.spdk.engine import ALIGNMENT_BYTES, open_spdk

    try:
        engine = open_spdk(target, namespace, ALIGNMENT_BYTES, 1, library)
    except (OSError, ValueError) as error:
        typer.echo(f"penstock spdk probe: {error}", err=True)
        raise typer.Exit(_FAILED) from error
    info = engine.info
    typer.echo(f"{target}, namespace {namespace}: {info.size_bytes} bytes in blocks of {info.lba_bytes}")
    typer.echo(f"transfers of up to {info.piece_bytes} bytes; volatile cache: {'yes' if info.has_flush else 'no'}")
    for note in engine.notes:
        typer.echo(f"note: {note}")
    engine.close(1.0)
