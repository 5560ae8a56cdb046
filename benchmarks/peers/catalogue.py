"""The peers: which versions, how each is started, how it is asked."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

from peers.environments import DEBIAN_PYTHON, ORT, Environment
from peers.peer import MAX_ROWS, SERVERS, Ours, Peer, Place
from peers.processes import free_port
from peers.workloads import (
    IMAGE,
    JSON,
    JSON_ROWS,
    MLP16,
    MLP784,
    MSGPACK,
    NO_MODEL,
    RAW,
    V2_BASE64,
    V2_BINARY,
    V2_JSON,
    V2_MSGPACK,
    Request,
)

WINDOW_US = 2000
"""How long a batch waits for more rows, as in ``servers/runtime.py``."""


# Commands. Each gives what starts the server, and writes what it reads beforehand.


def _nginx(place: Place) -> list[str]:
    (place.folder / "nginx.conf").write_text(
        f"""
        daemon off;
        worker_processes 1;
        pid {place.folder}/pid;
        error_log stderr error;
        events {{ worker_connections 1024; }}
        http {{
            access_log off;
            keepalive_requests 1000000000;
            client_body_temp_path {place.folder}/body;
            server {{
                listen 127.0.0.1:{place.port};
                location / {{ return 200 "ok"; }}
            }}
        }}
        """
    )
    return [
        "nginx",
        "-e",
        "stderr",
        "-p",
        str(place.folder),
        "-c",
        str(place.folder / "nginx.conf"),
    ]


def _mlserver(place: Place) -> list[str]:
    settings = {
        "host": "127.0.0.1",
        "http_port": place.port,
        "grpc_port": free_port(),
        "metrics_endpoint": None,
        "parallel_workers": 0,
        "debug": False,
    }
    model = {
        "name": place.tensors.model,
        "implementation": "mlserver_runtime.OnnxRuntime",
        "max_batch_size": MAX_ROWS,
        "max_batch_time": WINDOW_US / 1e6,
    }
    (place.folder / "settings.json").write_text(json.dumps(settings))
    (place.folder / "model-settings.json").write_text(json.dumps(model))
    return ["mlserver", "start", str(place.folder)]


def _bentoml(service: str) -> Callable[[Place], list[str]]:
    """The service to start."""

    def command(place: Place) -> list[str]:
        return [
            "bentoml", "serve", f"bentoml_service:{service}", "--working-dir", str(SERVERS),
            "--host", "127.0.0.1", "--port", str(place.port),
        ]  # fmt: skip

    return command


def _python(script: str) -> Callable[[Place], list[str]]:
    """A script of ``servers/``."""

    def command(place: Place) -> list[str]:
        return ["python", str(SERVERS / script)]

    return command


def _sink(place: Place) -> list[str]:
    return [sys.executable, str(SERVERS / "sink_server.py")]


# BentoML asks for a certifi that is newer than the newest.
BENTOML = Environment("bentoml", ("bentoml==1.4.40", ORT), loosened=("certifi",))
BENTOML_SETTINGS = {"BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOME": "{folder}"}

V2_PATH = "/v2/models/{model}/infer"

PEERS = (
    Peer(
        name="nginx",
        title="nginx, static 200",
        wires={"binary": NO_MODEL},
        runs_model=False,
        command=_nginx,
        models=(MLP16,),
        fixed=Request("/", "GET"),
        program="nginx",
    ),
    Peer(
        name="sink",
        title="recv_into, answers 200",
        wires={"binary": NO_MODEL},
        runs_model=False,
        command=_sink,
        models=(IMAGE,),
    ),
    Ours(
        name="gateway",
        title="inference-gateway",
        wires={"binary": V2_BINARY, "json": V2_JSON, "msgpack": V2_MSGPACK},
        path=V2_PATH,
    ),
    Ours(
        name="gateway-held",
        title=f"inference-gateway, {WINDOW_US / 1000:g} ms window",
        wires={"binary": V2_BINARY, "msgpack": V2_MSGPACK},
        path=V2_PATH,
        models=(MLP784,),
        window_us=WINDOW_US,
    ),
    Peer(
        name="mosec",
        title="Mosec 0.9.8",
        wires={"binary": RAW, "json": JSON, "msgpack": MSGPACK},
        command=_python("mosec_server.py"),
        environment=Environment("mosec", ("mosec==0.9.8", ORT, "msgpack==1.2.4")),
        settings={
            "MOSEC_ADDRESS": "127.0.0.1",
            "MOSEC_PORT": "{port}",
            "MOSEC_LOG_LEVEL": "warning",
        },
    ),
    Peer(
        name="aiohttp",
        title="hand-written aiohttp 3.14.5 + batching",
        wires={"binary": RAW, "json": JSON, "msgpack": MSGPACK},
        command=_python("aiohttp_server.py"),
        environment=Environment(
            "aiohttp", ("aiohttp==3.14.5", "uvloop==0.23.0", ORT, "msgpack==1.2.4")
        ),
    ),
    Peer(
        name="pytriton",
        title="PyTriton 0.7.0",
        wires={"binary": V2_BINARY, "json": V2_JSON},
        command=_python("pytriton_server.py"),
        environment=Environment("pytriton", ("nvidia-pytriton==0.7.0", ORT), DEBIAN_PYTHON),
        path=V2_PATH,
        probe="/v2/health/live",
    ),
    Peer(
        name="litserve",
        title="LitServe 0.2.19",
        wires={"binary": RAW, "json": JSON},
        command=_python("litserve_server.py"),
        environment=Environment("litserve", ("litserve==0.2.19", ORT)),
    ),
    Peer(
        name="mlserver",
        title="MLServer 1.7.1",
        wires={"binary": V2_BASE64, "json": V2_JSON},
        command=_mlserver,
        environment=Environment("mlserver", ("mlserver==1.7.1", ORT)),
        path=V2_PATH,
    ),
    Peer(
        name="bentoml",
        title="BentoML 1.4.40",
        wires={"binary": RAW},
        command=_bentoml("Front"),
        environment=BENTOML,
        settings=BENTOML_SETTINGS,
    ),
    Peer(
        name="bentoml-json",
        title="BentoML 1.4.40",
        wires={"json": JSON_ROWS},
        command=_bentoml("Batching"),
        environment=BENTOML,
        settings=BENTOML_SETTINGS,
    ),
    Peer(
        name="ray",
        title="Ray Serve 2.60.0",
        wires={"binary": RAW, "json": JSON},
        command=_python("ray_server.py"),
        environment=Environment("ray", ("ray[serve]==2.60.0", ORT)),
        path="/",
        settings={"RAY_USAGE_STATS_ENABLED": "0"},
    ),
)
"""In the order of their turns: those that targets compare are beside each other."""
