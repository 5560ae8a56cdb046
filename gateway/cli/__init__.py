"""The ``gateway`` command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from gateway import __version__
from gateway.errors import GatewayError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="gateway")
def cli() -> None:
    """ONNX models behind HTTP, batched in shared memory."""


@cli.command()
@click.option("--model-repository", metavar="DIR", help="Folder of <model>/<version>/model.onnx.")
@click.option("--host", metavar="H", help="Address of the data port [127.0.0.1].")
@click.option("--port", metavar="N", help="Data port [8000].")
@click.option("--metrics-host", metavar="H", help="Address of the metrics port [127.0.0.1].")
@click.option("--metrics-port", metavar="N", help="Port of /metrics [8002].")
@click.option("--config", metavar="FILE", help="YAML file with any of the server's settings.")
@click.option("--strict-readiness", is_flag=True, default=None, help="A failed model is unready.")
@click.option(
    "--exit-on-error/--no-exit-on-error",
    default=None,
    help="Whether a model that cannot be loaded ends the start [yes].",
)
@click.option("--log-level", metavar="LEVEL", help="debug, info, warning or error [info].")
@click.option("--log-format", metavar="FORM", help="text or json [text].")
def serve(**flags: Any) -> None:
    """Serve a model repository until SIGTERM or Ctrl-C."""
    from gateway import app, settings

    app.serve(settings.load_server_settings(**flags))


@cli.command("demo")
@click.option("--examples", metavar="DIR", help="The digits example [the checkout's].")
@click.option("--port", metavar="N", default=8000, help="Data port; 0: any free one [8000].")
@click.option("--metrics-port", metavar="N", default=8002, help="Port of /metrics [8002].")
@click.option("--once", is_flag=True, help="End after the tour instead of sending on.")
@click.option(
    "--rate",
    metavar="R",
    default=20.0,
    type=click.FloatRange(0.01, 10_000),
    help="Requests a second after the tour [20].",
)
def run_demo(examples: str | None, **options: Any) -> None:
    """Serve the bundled digits and classify them over HTTP, until Ctrl-C."""
    from gateway.cli import demo

    folder = Path(examples) if examples else demo.EXAMPLES
    demo.run_demo(demo.DemoOptions(folder, **options))


def main() -> None:
    """Entry of the command: errors of ours are one line on standard error and exit status 1."""
    try:
        cli(prog_name="gateway")
    except GatewayError as error:
        click.echo(f"gateway: {error.message}", err=True)
        sys.exit(1)
