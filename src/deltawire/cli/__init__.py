"""The `deltawire` command: one verb per thing people do, which prints a report as text or as JSON."""

import sys
from typing import Annotated

import typer

from deltawire.cli import version as versions
from deltawire.cli.comparison import diff
from deltawire.cli.engines import audit, follow
from deltawire.cli.gateway import gateway
from deltawire.cli.history import log
from deltawire.cli.interchange import apply, export, import_run
from deltawire.cli.printing import emit, plain
from deltawire.cli.reading import inspect, materialize, verify
from deltawire.cli.sizing import plan
from deltawire.cli.starting import demo, render, serve
from deltawire.cli.tagging import tag
from deltawire.cli.upkeep import compact, keygen, prune, relay
from deltawire.cli.watching import doctor, status
from deltawire.demo.commands import in_checkout
from deltawire.errors import DeltaWireError, error_text
from deltawire.weights.interrupts import as_raised

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_show_locals=False,  # an address may hold a password
)


@app.callback(invoke_without_command=True)
def deltawire(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and its formats, and exit.")] = False,
    json: Annotated[bool, typer.Option("--json", help="With --version: one JSON object.")] = False,
) -> None:
    """Ship only the weights that changed: verified deltas from an RL trainer to vLLM, through a bucket.

    Every verb that takes a BUCKET takes it as the first argument, as --bucket BUCKET, or from DELTAWIRE_BUCKET.

    Exit codes: 0 done, 1 an error or a fault that was found, 2 a command line that is wrong, 130 ended by Ctrl-C. An
    error is one line on stderr, with --json, too.
    """
    if version:
        report = versions.report()
        emit(report, versions.text_of(report), json)
        raise typer.Exit
    if json:
        raise typer.BadParameter("it stands behind the verb, or beside --version", param_hint="--json")
    if context.invoked_subcommand is None:
        raise typer.BadParameter("name a verb; `deltawire --help` lists them", param_hint="VERB")


for verb in (
    serve,
    follow,
    status,
    doctor,
    gateway,
    audit,
    log,
    diff,
    tag,
    inspect,
    verify,
    materialize,
    apply,
    export,
    compact,
    relay,
    prune,
    plan,
    keygen,
):
    app.command()(verb)
app.command("import")(import_run)
app.command(hidden=not in_checkout())(demo)  # a wheel has no examples to run
spaces = typer.Typer(help="An RL run as three Spaces of the Hub.", no_args_is_help=True, rich_markup_mode=None)
spaces.command()(render)
app.add_typer(spaces, name="spaces", hidden=not in_checkout())


def main() -> None:
    """Run the command; a typed error becomes one line on stderr and exit code 1."""
    try:
        with as_raised():
            app()
    except (DeltaWireError, ImportError, OSError) as error:
        print(f"deltawire: {plain(error_text(error).replace(chr(10), ' '), None)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
