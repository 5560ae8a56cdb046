"""The ``gateway`` command."""

from __future__ import annotations

import gc
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from gateway import __version__
from gateway.errors import GatewayError

_IN_MODULES = ("bench", "keys", "models", "rollout")
"""Commands that are in a module of `gateway.cli` of the same name."""


class _Commands(click.Group):
    """Imports a command's module where the command is asked for: a server's start does not wait for it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *_IN_MODULES})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _IN_MODULES:
            return super().get_command(ctx, cmd_name)
        command: click.Command = getattr(import_module(f"gateway.cli.{cmd_name}"), cmd_name)
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="gateway")
def cli() -> None:
    """ONNX models behind HTTP, batched in shared memory."""


@cli.command()
@click.option("--model-repository", metavar="DIR", help="Folder of <model>/<version>/model.onnx.")
@click.option("--host", metavar="H", help="Address of the data port [127.0.0.1].")
@click.option("--port", metavar="N", help="Data port [8000].")
@click.option("--metrics-host", metavar="H", help="Address of the metrics port [127.0.0.1].")
@click.option("--metrics-port", metavar="N", help="Port of /metrics [8002].")
@click.option("--admin-host", metavar="H", help="Address of the admin port [127.0.0.1].")
@click.option("--admin-port", metavar="N", help="Admin port: rollouts, dashboard [8081].")
@click.option("--state", metavar="URL", help="Database [.gateway/state.db in the repository].")
@click.option(
    "--watch-repository/--no-watch-repository",
    default=None,
    help="Whether new versions are served as they appear [no].",
)
@click.option(
    "--data-keys/--no-data-keys",
    default=None,
    help="Whether inference requests need an API key [no].",
)
@click.option("--frontends", metavar="N", help="Processes that share the data port [1].")
@click.option("--config", metavar="FILE", help="YAML file with any of the server's settings.")
@click.option("--strict-readiness", is_flag=True, default=None, help="A failed model is unready.")
@click.option(
    "--exit-on-error/--no-exit-on-error",
    default=None,
    help="Whether a model that cannot be loaded ends the start [yes].",
)
@click.option(
    "--model-control/--no-model-control",
    default=None,
    help="Whether clients may load and unload models [no].",
)
@click.option("--log-level", metavar="LEVEL", help="debug, info, warning or error [info].")
@click.option("--log-format", metavar="FORM", help="text or json [text].")
def serve(**flags: Any) -> None:
    """Serve a model repository until SIGTERM or Ctrl-C."""
    gc.disable()
    from gateway import app, settings

    gc.freeze()  # what importing made is there for good: no collection needs to look at it
    gc.enable()

    app.serve(settings.load_server_settings(**flags))


@cli.command("demo")
@click.option("--examples", metavar="DIR", help="The digits example [the checkout's].")
@click.option("--port", metavar="N", default=8000, help="Data port; 0: any free one [8000].")
@click.option("--metrics-port", metavar="N", default=8002, help="Port of /metrics [8002].")
@click.option("--admin-port", metavar="N", default=8081, help="Admin port; 0: any free one [8081].")
@click.option("--once", is_flag=True, help="End after the tour instead of sending on.")
@click.option(
    "--rate",
    metavar="R",
    default=100.0,
    type=click.FloatRange(0.01, 10_000),
    help="Requests a second after the tour [100].",
)
def run_demo(examples: str | None, **options: Any) -> None:
    """Serve the bundled digits and classify them over HTTP, until Ctrl-C."""
    from gateway.cli import demo

    folder = Path(examples) if examples else demo.EXAMPLES
    demo.run_demo(demo.DemoOptions(folder, **options))


_DOCTOR_KEYS = """\b
Keys of --json:
  ok          true where there are no errors
  runtime     versions, ONNX Runtime's distributions and providers
  kernels     build (release, debug; null: they do not load), layout, folder, error
  limits      open files (null: no limit), CPUs, memory, what the kernel can do
  devices     the CPU and what of its features matters, NVIDIA GPUs
  repository  the folder as given; null: none
  models      a list, for each version and kind of worker: model, version, device,
              workers, threads, state (loaded, failed), reason, detail, seconds,
              memory_bytes (of each worker, ONNX Runtime's own included),
              max_batch_size (0: one request at a time), batching, output_transport,
              notes, inputs and outputs (name, datatype, shape, optional)
  ignored     a list of files and folders that are no models or versions, and why
  findings    a list: severity (error, warning, note), about, problem, advice
"""


@cli.command("doctor", epilog=_DOCTOR_KEYS)
@click.argument("repository", required=False, metavar="[REPOSITORY]")
@click.option("--config", metavar="FILE", help="The server's settings file, as for serve.")
@click.option("--json", "is_json", is_flag=True, help="One JSON object instead of a screen.")
def run_doctor(repository: str | None, config: str | None, is_json: bool) -> None:
    """Look at installation and machine, and load each model of REPOSITORY once.

    Says what is wrong and what to do. Writes nothing; the exit status is 1 where there are errors.
    """
    from gateway.cli import doctor

    sys.exit(doctor.run(Path(repository) if repository else None, config, is_json=is_json))


def main() -> None:
    """Entry of the command: errors of ours are one line on standard error and exit status 1."""
    try:
        cli(prog_name="gateway")
    except GatewayError as error:
        click.echo(f"gateway: {error.message}", err=True)
        sys.exit(1)
