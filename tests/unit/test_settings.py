"""Settings: where they come from, what they refuse, and that every refusal is one clear line."""

import datetime
import itertools
import os
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from gateway.errors import ConfigurationError
from gateway.names import MAX_VERSION
from gateway.serving.cpus import parse_cpus
from gateway.settings import (
    ENV_PREFIX,
    DimPadding,
    Instance,
    Latest,
    ModelSettings,
    Queue,
    ServerSettings,
    SessionOptions,
    Specific,
    load_model_settings,
    load_server_settings,
)
from gateway.yamlfile import MAX_FILE_BYTES, shown

DOCUMENTS = Path(__file__).parents[2] / "docs"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """An environment that says nothing about the gateway, whatever the developer's says."""
    for name in [name for name in os.environ if name.upper().startswith(ENV_PREFIX)]:
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "gateway.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository") / "digits"
    folder.mkdir()

    def write(text):
        path = folder / "config.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
        return path

    return write


def refusal(load, *args, **kwargs):
    """The message of the refusal, which is always one line that shows no inner exception."""
    with pytest.raises(ConfigurationError) as caught:
        load(*args, **kwargs)
    message = caught.value.message
    assert len(message.splitlines()) == 1
    assert message.isprintable()
    assert "pydantic" not in message
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    return message


def server(**flags):
    return load_server_settings(**{"model_repository": "models", **flags})


# ---- where a server setting comes from -----------------------------------------------------------

SOURCES = ("flag", "environment", "file")


@pytest.mark.parametrize(
    "given_in",
    [chosen for n in range(4) for chosen in itertools.combinations(SOURCES, n)],
    ids=lambda chosen: "+".join(chosen) or "none",
)
def test_flag_beats_environment_beats_file_beats_default(given_in, environment, config):
    ports = {"flag": 1001, "environment": 1002, "file": 1003}
    flags = {"port": ports["flag"]} if "flag" in given_in else {}
    if "environment" in given_in:
        environment.setenv("GATEWAY_PORT", str(ports["environment"]))
    path = config(f"port: {ports['file']}\n" if "file" in given_in else "")
    expected = next((ports[source] for source in SOURCES if source in given_in), 8000)
    assert server(config=path, **flags).port == expected


def test_sources_are_merged_key_by_key(environment, config):
    environment.setenv("GATEWAY_METRICS_PORT", "1002")
    environment.setenv("GATEWAY_STRICT_READINESS", "true")
    path = config("port: 1003\nmetrics_port: 1003\nhost: 0.0.0.0\nmodel_repository: elsewhere\n")
    settings = load_server_settings(config=path, host="::1")
    assert (settings.host, settings.port, settings.metrics_port) == ("::1", 1003, 1002)
    assert settings.strict_readiness is True
    assert settings.model_repository == Path("elsewhere")


def test_the_file_may_be_named_by_the_environment(environment, config):
    environment.setenv("GATEWAY_CONFIG", str(config("port: 1003")))
    environment.setenv("GATEWAY_MODEL_REPOSITORY", "models")
    assert load_server_settings().port == 1003


def test_the_flag_names_the_file_before_the_environment(environment, config, tmp_path):
    environment.setenv("GATEWAY_CONFIG", str(tmp_path / "absent.yaml"))
    assert server(config=config("port: 1003")).port == 1003


def test_a_flag_that_is_none_was_not_given(environment):
    environment.setenv("GATEWAY_PORT", "1002")
    assert server(port=None, config=None).port == 1002


def test_a_flag_that_is_false_was_given(environment):
    environment.setenv("GATEWAY_EXIT_ON_ERROR", "true")
    assert server(exit_on_error=False).exit_on_error is False


OTHER_VALUES = {
    "max_request_bytes": 1 << 20,  # more than the default would not fit a lane
    "model_repository": "other",
    "host": "gateway.example",
    "metrics_host": "gateway.example",
    "log_level": "debug",
    "log_format": "json",
    "memory_bytes": 1 << 30,
    "cache_folder": "cache",
    "admin_host": "gateway.example",
    "state": "sqlite:///other.db",
    "model_roots": ["one", "two"],
    "prometheus_url": "http://prometheus.example:9090/base",
    "webhook_hosts": ["one.example", "two.example"],
    "webhook_secret": "sixteen characters",
}


@pytest.mark.parametrize("name", sorted(ServerSettings.model_fields.keys() - {"config"}))
def test_every_server_setting_can_come_from_every_source(name, environment, config):
    default = ServerSettings.model_fields[name].get_default()
    value = OTHER_VALUES.get(name) or (not default if isinstance(default, bool) else default + 1)
    needed = {} if name == "model_repository" else {"model_repository": "models"}
    by_flag = load_server_settings(**needed, **{name: value})
    assert getattr(by_flag, name) != default
    by_file = load_server_settings(**needed, config=config(yaml.safe_dump({name: value})))
    text = ",".join(value) if isinstance(value, list) else str(value)
    environment.setenv(ENV_PREFIX + name.upper(), text)
    by_environment = load_server_settings(**needed)
    assert getattr(by_flag, name) == getattr(by_file, name) == getattr(by_environment, name)


def test_defaults():
    settings = server()
    assert (settings.host, settings.port, settings.metrics_port) == ("127.0.0.1", 8000, 8002)
    assert (settings.exit_on_error, settings.strict_readiness) == (True, False)
    assert settings.lane_bytes == settings.max_request_bytes == 64 * 1024 * 1024


def test_settings_do_not_change_once_read(model_file):
    for settings, key in ((server(), "port"), (load_model_settings(model_file("")), "promote")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(settings, key, getattr(settings, key))


# ---- what the server's settings refuse -----------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"port": 70000}, "port: must be between 0 and 65535, got 70000"),
        ({"port": -1}, "port: must be between 0 and 65535, got -1"),
        ({"port": "http"}, "port: must be a whole number between 0 and 65535, got 'http'"),
        ({"port": 80.5}, "port: must be a whole number between 0 and 65535, got 80.5"),
        ({"port": True}, "port: must be a whole number between 0 and 65535, got true"),
        ({"port": ""}, "port: must be a whole number between 0 and 65535, got ''"),
        ({"port": 16**9000}, "port: must be between 0 and 65535, got a number beyond 64 bits"),
        ({"drain_timeout_s": -0.1}, "drain_timeout_s: must be between 0 and 3600, got -0.1"),
        ({"drain_timeout_s": "nan"}, "drain_timeout_s: must be between 0 and 3600, got nan"),
        ({"drain_timeout_s": "inf"}, "drain_timeout_s: must be between 0 and 3600, got inf"),
        (
            {"drain_timeout_s": 10**400},
            "drain_timeout_s: must be a number between 0 and 3600, got a number beyond 64 bits",
        ),
        ({"host": ""}, "host: must be an address or a host name, got ''"),
        ({"host": "a b\n"}, "host: must be an address or a host name, got 'a b\\n'"),
        ({"host": 127}, "host: must be text, got 127"),
        ({"log_format": "xml"}, "log_format: must be 'text' or 'json', got 'xml'"),
        ({"strict_readiness": "maybe"}, "strict_readiness: must be true or false, got 'maybe'"),
        ({"model_repository": ""}, "model_repository: must be a path, got ''"),
        ({"model_repository": 5}, "model_repository: must be a path, got 5"),
        ({"config": ""}, "config: must be a path, got ''"),
        ({"config": 5}, "config: must be a path, got 5"),
        ({"prot": 1}, "unknown key 'prot' (did you mean 'port'?)"),
        ({"metrics-port": 1}, "unknown key 'metrics-port' (did you mean 'metrics_port'?)"),
        ({"PORT": 1}, "unknown key 'PORT' (did you mean 'port'?)"),
        ({"zzz": 1}, "unknown key 'zzz'"),
        ({"_env_file": ".env"}, "unknown key '_env_file'"),
        ({"_cli_parse_args": True}, "unknown key '_cli_parse_args'"),
    ],
)
def test_a_wrong_flag(flags, message):
    assert refusal(server, **flags) == message


def test_the_constructor_refuses_unknown_keys_too():
    with pytest.raises(ValidationError, match="prot"):
        ServerSettings(model_repository="models", prot=1)


def test_the_repository_is_required():
    message = refusal(load_server_settings)
    assert message == "model_repository: is required: set it by flag, environment or settings file"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("PORT", "70000", "port: must be between 0 and 65535, got 70000"),
        ("PORT", "", "port: must be a whole number between 0 and 65535, got ''"),
        ("CONFIG", "", "config: must be a path, got ''"),
        (
            "PROT",
            "1",
            "unknown environment variable 'GATEWAY_PROT' (did you mean 'GATEWAY_PORT'?)",
        ),
        ("XYZ", "1", "unknown environment variable 'GATEWAY_XYZ'"),
        (
            "port",
            "1",
            "unknown environment variable 'GATEWAY_port' (did you mean 'GATEWAY_PORT'?)",
        ),
        ("", "1", "unknown environment variable 'GATEWAY_'"),
        ("A\nB", "1", "unknown environment variable 'GATEWAY_A\\nB'"),
    ],
)
def test_a_wrong_environment_variable(name, value, message, environment):
    environment.setenv(ENV_PREFIX + name, value)
    assert refusal(server) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot: 1", "unknown key 'prot' (did you mean 'port'?)"),
        ("config: other.yaml", "unknown key 'config'"),
        ("port: 1\nport: 2", "line 2: duplicate key 'port'"),
        ("- port", "must be a mapping of keys, got a list of 1"),
        ("port", "must be a mapping of keys, got 'port'"),
        ("port: [\n", "line 2: while parsing a flow node expected the node content"),
        ("1: 2", "unknown key 1"),
    ],
)
def test_a_wrong_settings_file(text, message, config):
    path = config(text)
    assert refusal(server, config=path).startswith(f"settings file {shown(str(path))}: {message}")


def test_a_wrong_value_in_the_settings_file(config):
    assert refusal(server, config=config("port: 70000")).startswith("port: must be between")
    assert refusal(server, config=config("port:")).endswith("got null")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("absent.yaml", "No such file or directory"),
        (".", "Is a directory"),
        ("a\0b", "embedded null byte"),
        ("a\nb", "No such file or directory"),
    ],
)
def test_a_settings_file_that_cannot_be_read(path, reason):
    assert refusal(server, config=path) == f"settings file {path!r}: cannot be read: {reason}"


# ---- variables of others that have our prefix ----------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GATEWAY_CYTHON_DEBUG", "1"),
        ("GATEWAY_SERVICE_HOST", "10.0.0.1"),
        ("GATEWAY_SERVICE_PORT", "8000"),
        ("GATEWAY_SERVICE_PORT_HTTP", "8000"),
        ("GATEWAY_PORT", "tcp://10.0.0.1:8000"),
        ("GATEWAY_PORT_8000_TCP", "tcp://10.0.0.1:8000"),
        ("GATEWAY_PORT_8000_TCP_PROTO", "tcp"),
        ("GATEWAY_PORT_8000_TCP_PORT", "8000"),
        ("GATEWAY_PORT_8000_TCP_ADDR", "10.0.0.1"),
        ("GATEWAY_PORT_53_UDP_ADDR", "10.0.0.1"),
        ("GATEWAY_METRICS_SERVICE_HOST", "10.0.0.1"),
        ("GATEWAY_METRICS_PORT", "tcp://10.0.0.1:8002"),
        ("GATEWAY_METRICS_PORT_8002_TCP_ADDR", "10.0.0.1"),
        ("PATH_OF_GATEWAY_PORT", "1"),
        ("GATEWAYS", "1"),
    ],
)
def test_variables_that_are_no_settings_are_ignored(name, value, environment):
    environment.setenv(name, value)
    assert server() == server(port=8000, metrics_port=8002)


def test_a_port_that_kubernetes_put_there_leaves_the_files(environment, config):
    environment.setenv("GATEWAY_PORT", "tcp://10.0.0.1:8000")
    assert server(config=config("port: 1003")).port == 1003


@pytest.mark.parametrize(
    "name", ["GATEWAY_SERVICE_HOSTS", "GATEWAY_PORT_X_TCP", "GATEWAY_PORT_80_TCP_X", "GATEWAY_HOTS"]
)
def test_what_only_resembles_them_is_refused(name, environment):
    environment.setenv(name, "1")
    assert refusal(server).startswith(f"unknown environment variable '{name}'")


# ---- settings of a model -------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n", "---\n", "{}", "null", "\ufeff"])
def test_an_empty_file_means_the_defaults(text, model_file):
    assert load_model_settings(model_file(text)) == ModelSettings()


def test_a_full_file(model_file):
    settings = load_model_settings(
        model_file(
            """
            max_batch_size: 32
            allowed_batch_sizes: [1, 8, 32]
            accept_batch_effects: true
            padding:
              sequence: {buckets: [16, 128], side: left, values: {ids: 1, mask: -.inf}}
              width: {buckets: [64]}
            max_queue_delay_us: 500
            instances:
              - {device: cuda:0, count: 2, provider_options: {cudnn_conv_use_max_workspace: true}}
              - {device: cpu, threads: 4, cpus: "0-3,8"}
              - {device: OpenVINOExecutionProvider, provider_options: {a: text, b: 2, c: 0.5}}
              - {cpus: 3}
            queue: {max_size: 10, timeout_ms: 100, priority_levels: 3, default_priority_level: 3}
            version_policy: {specific: [1, 3]}
            promote: manual
            execution_timeout_ms: 1000
            warmup: false
            warmup_samples: samples-1.npz
            memory_bytes: 1048576
            session_options:
              execution_mode: parallel
              inter_op_threads: 2
              graph_optimization: basic
              memory_pattern: false
              cpu_arena: false
              config: {session.intra_op.allow_spinning: false, session.dynamic_block_base: 4}
            cache_optimized: false
            """
        )
    )
    assert settings == ModelSettings(
        max_batch_size=32,
        allowed_batch_sizes=(1, 8, 32),
        accept_batch_effects=True,
        padding={
            "sequence": DimPadding(
                buckets=(16, 128), side="left", values={"ids": 1, "mask": float("-inf")}
            ),
            "width": DimPadding(buckets=(64,)),
        },
        max_queue_delay_us=500,
        instances=(
            Instance(
                device="cuda:0", count=2, provider_options={"cudnn_conv_use_max_workspace": "1"}
            ),
            Instance(threads=4, cpus="0-3,8"),
            Instance(
                device="OpenVINOExecutionProvider",
                provider_options={"a": "text", "b": "2", "c": "0.5"},
            ),
            Instance(cpus="3"),
        ),
        queue=Queue(max_size=10, timeout_ms=100, priority_levels=3, default_priority_level=3),
        version_policy=Specific(specific=(1, 3)),
        promote="manual",
        execution_timeout_ms=1000,
        warmup=False,
        warmup_samples="samples-1.npz",
        memory_bytes=1 << 20,
        session_options=SessionOptions(
            execution_mode="parallel",
            inter_op_threads=2,
            graph_optimization="basic",
            memory_pattern=False,
            cpu_arena=False,
            config={
                "session.intra_op.allow_spinning": "0",
                "session.dynamic_block_base": "4",
            },
        ),
        cache_optimized=False,
    )


@pytest.mark.parametrize(
    ("queue", "level"),
    [
        ({}, 0),
        ({"priority_levels": 1}, 1),
        ({"priority_levels": 2}, 1),
        ({"priority_levels": 3}, 2),
        ({"priority_levels": 64}, 32),
        ({"priority_levels": 3, "default_priority_level": 3}, 3),
    ],
)
def test_requests_without_a_priority_get_the_default_level(queue, level):
    assert Queue(**queue).default_level == level


@pytest.mark.parametrize("sizes", ["max_batch_size: 8", "max_batch_size: null", ""])
def test_the_largest_allowed_batch_may_be_the_limit(sizes, model_file):
    settings = load_model_settings(model_file(f"allowed_batch_sizes: [1, 8]\n{sizes}"))
    assert settings.allowed_batch_sizes == (1, 8)


@pytest.mark.parametrize("value", [0, -1, 2**53 + 1, -(2**63), 2**64 - 1, 0.5, float("inf")])
def test_padding_values_stay_as_exact_as_they_were_written(value, model_file):
    text = yaml.safe_dump({"padding": {"n": {"buckets": [8], "values": {"x": value}}}})
    read = load_model_settings(model_file(text)).padding["n"].values["x"]
    assert (read, type(read)) == (value, type(value))


@given(st.text(alphabet="0123456789,- ", max_size=12))
@example("0-3,8")
@example("3-1")
@example("10000")
def test_a_list_of_cpus_is_taken_as_the_worker_takes_it(model_file, text):
    path = model_file(yaml.safe_dump({"instances": [{"cpus": text}]}))
    if is_accepted(path):
        assert parse_cpus(text)
    else:
        with pytest.raises(ValueError, match="0-3,8"):
            parse_cpus(text)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("all", "all"),
        ("{latest: 2}", Latest(latest=2)),
        ("{specific: [7]}", Specific(specific=(7,))),
        (f"{{specific: [{MAX_VERSION}]}}", Specific(specific=(MAX_VERSION,))),
    ],
)
def test_version_policies(policy, expected, model_file):
    path = model_file(f"version_policy: {policy}")
    assert load_model_settings(path).version_policy == expected


ASCENDING = "must be a list of at most 256 numbers, each above the one before it"
A_KEY = "a key must be a printable name of 1 to 256 characters"
OPTION = "must be text of at most 4096 characters, a number, true or false"
POLICIES = "must be {latest: N}, {specific: [N, …]} or all"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_batchsize: 8", "unknown key 'max_batchsize' (did you mean 'max_batch_size'?)"),
        ("maxBatchSize: 8", "unknown key 'maxBatchSize' (did you mean 'max_batch_size'?)"),
        ("zzz: 8", "unknown key 'zzz'"),
        ("1: 8", "unknown key 1"),
        ("null: 8", "unknown key null"),
        ("yes: 8", "unknown key true"),
        ("2024-01-01: 8", f"unknown key {datetime.date(2024, 1, 1)!r}"),
        (f"? 0x{'f' * 9000}\n: 8", "unknown key a number beyond 64 bits"),
        ('"a\\nb\\u2028c": 8', "unknown key 'a\\nb\\u2028c'"),
        (f"{'x' * 200}: 8", f"unknown key '{'x' * 79}…"),
        ("queue: {maxsize: 8}", "queue: unknown key 'maxsize' (did you mean 'max_size'?)"),
        ("instances: [{cuont: 8}]", "instances.0: unknown key 'cuont' (did you mean 'count'?)"),
        (
            "version_policy: {lates: 1}",
            "version_policy: unknown key 'lates' (did you mean 'latest'?)",
        ),
        ("max_batch_size: -1", "max_batch_size: must be between 0 and 4096, got -1"),
        ("max_batch_size: 4097", "max_batch_size: must be between 0 and 4096, got 4097"),
        (
            "max_batch_size: yes",
            "max_batch_size: must be a whole number between 0 and 4096, got true",
        ),
        *[
            (
                f"allowed_batch_sizes: {sizes}",
                f"allowed_batch_sizes: {ASCENDING}, got a list of {n}",
            )
            for sizes, n in (("[2, 2]", 2), ("[4, 2]", 2), (list(range(1, 258)), 257))
        ],
        (
            "allowed_batch_sizes: [0]",
            "allowed_batch_sizes.0: must be between 1 and 4096, got 0",
        ),
        ("allowed_batch_sizes: 8", "allowed_batch_sizes: must be a list, got 8"),
        (
            "allowed_batch_sizes: [1, 2]\nmax_batch_size: 4",
            "allowed_batch_sizes must end with max_batch_size (4), got 2",
        ),
        (
            "allowed_batch_sizes: [1, 2]\nmax_batch_size: 0",
            "allowed_batch_sizes must be empty where max_batch_size is 0",
        ),
        ("padding: [n]", "padding: must be a mapping of keys, got a list of 1"),
        ("padding: {n: 8}", "padding.n: must be a mapping of keys, got 8"),
        ("padding: {n: {}}", "padding.n.buckets: is required"),
        ("padding: {1: {buckets: [8]}}", f"padding: {A_KEY}, got 1"),
        ('padding: {"": {buckets: [8]}}', f"padding: {A_KEY}, got ''"),
        ('padding: {"a\\nb": {buckets: [8]}}', f"padding: {A_KEY}, got 'a\\nb'"),
        (f"padding: {{{'x' * 257}: 1}}", f"padding: {A_KEY}, got 'xxx"),
        (
            "padding: {n: {bucket: [8]}}",
            "padding.n: unknown key 'bucket' (did you mean 'buckets'?)",
        ),
        (
            "padding: {n: {buckets: []}}",
            "padding.n.buckets: must be a list of one length or more, got a list of 0",
        ),
        (
            "padding: {n: {buckets: [8, 4]}}",
            f"padding.n.buckets: {ASCENDING}, got a list of 2",
        ),
        (
            "padding: {n: {buckets: [2147483649]}}",
            "padding.n.buckets.0: must be between 1 and 2147483648, got 2147483649",
        ),
        (
            "padding: {n: {buckets: [8], side: end}}",
            "padding.n.side: must be 'right' or 'left', got 'end'",
        ),
        *[
            (
                f"padding: {{n: {{buckets: [8], values: {{x: {value}}}}}}}",
                f"padding.n.values.x: must be a number, got {shown}",
            )
            for value, shown in (
                ("true", "true"),
                ("one", "'one'"),
                ("0x1ffffffffffffffff", "a number beyond 64 bits"),
            )
        ],
        (
            "padding: {n: {buckets: [8], values: {1: 1}}}",
            f"padding.n.values: {A_KEY}, got 1",
        ),
        ("queue: {max_size: 0}", "queue.max_size: must be between 1 and 1000000, got 0"),
        (
            "queue: {default_priority_level: 1}",
            "queue: default_priority_level must be at most priority_levels (0), got 1",
        ),
        (
            "queue: {priority_levels: 65}",
            "queue.priority_levels: must be between 0 and 64, got 65",
        ),
        ("queue: 5", "queue: must be a mapping of keys, got 5"),
        ("queue:", "queue: must be a mapping of keys, got null"),
        ("instances: []", "instances: must be a list of 1 to 16 entries, got a list of 0"),
        ("instances: {device: cpu}", "instances: must be a list, got a mapping"),
        *[
            (
                f"instances: [{{}}, {{device: {device}}}]",
                "instances.1.device: must be 'cpu', 'cuda:N' or the name of another ONNX Runtime "
                f"execution provider, got '{device}'",
            )
            for device in (
                "gpu",
                "cuda",
                "cuda:01",
                "CPUExecutionProvider",
                "CUDAExecutionProvider",
                "ExecutionProvider",
                "Open-VINOExecutionProvider",
            )
        ],
        ("instances: [{threads: 0}]", "instances.0.threads: must be between 1 and 1024, got 0"),
        (
            "instances: [{cpus: 3-1}]",
            "instances.0.cpus: must be a list of CPUs such as 0-3,8, got '3-1'",
        ),
        (
            "instances: [{cpus: -1}]",
            "instances.0.cpus: must be a list of CPUs such as 0-3,8, got '-1'",
        ),
        ("instances: [{cpus: true}]", "instances.0.cpus: must be text, got true"),
        (
            "instances: [{cuda_graphs: true}]",
            "instances.0: cuda_graphs must be false where device is cpu",
        ),
        (
            "instances: [{device: cuda:0, cuda_graphs: true}]",
            "allowed_batch_sizes must be given where cuda_graphs is true",
        ),
        *[
            (
                f"instances: [{{provider_options: {{a: {value}}}}}]",
                f"instances.0.provider_options.a: {OPTION}, got {shown}",
            )
            for value, shown in (
                ("[1]", "a list of 1"),
                ("null", "null"),
                ("x" * 4097, "'xxx"),
                ('"\\0"', r"'\x00'"),
                ("0x1ffffffffffffffff", "a number beyond 64 bits"),
            )
        ],
        (
            "instances: [{provider_options: {1: 1}}]",
            f"instances.0.provider_options: {A_KEY}, got 1",
        ),
        (
            "session_options: {threads: 1}",
            "session_options: unknown key 'threads' (did you mean 'inter_op_threads'?)",
        ),
        (
            "session_options: {graph_optimization: most}",
            "session_options.graph_optimization: must be 'all', 'extended', 'basic' or 'disabled', "
            "got 'most'",
        ),
        (
            "session_options: {config: {a: 2024-01-01}}",
            f"session_options.config.a: {OPTION}, got datetime.date(2024, 1, 1)",
        ),
        *[
            (
                f"warmup_samples: {name}",
                f"warmup_samples: must be the name of an .npz file, got '{name}'",
            )
            for name in ("../a.npz", "/a.npz", "a/b.npz", ".npz", "a.npy", "a.npzx")
        ],
        (
            "memory_bytes: 1024",
            "memory_bytes: must be between 1048576 and 1125899906842624, got 1024",
        ),
        ("instances: [{count: 0}]", "instances.0.count: must be between 1 and 128, got 0"),
        ("instances: &a [*a]", "instances.0: must be a mapping of keys, got a list of 1"),
        ("version_policy: newest", f"version_policy: {POLICIES}, got 'newest'"),
        ("version_policy: {}", f"version_policy: {POLICIES}, got a mapping"),
        (
            "version_policy: {latest: 1, specific: [1]}",
            f"version_policy: {POLICIES}, got a mapping",
        ),
        (
            "version_policy: {specific: []}",
            "version_policy.specific: must be a list of one version or more, got a list of 0",
        ),
        (
            "version_policy: {specific: [1, 0]}",
            f"version_policy.specific.1: must be between 1 and {MAX_VERSION}, got 0",
        ),
        ("promote: newest", "promote: must be 'latest' or 'manual', got 'newest'"),
        ("warmup: perhaps", "warmup: must be true or false, got 'perhaps'"),
        ("warmup: 1\nwarmup: 0", "line 2: duplicate key 'warmup'"),
        ('warmup: 1\n"warmup": 0', "line 2: duplicate key 'warmup'"),
        ("queue:\n  max_size: 1\n  max_size: 2", "line 3: duplicate key 'max_size'"),
        ("instances: [{count: 1, count: 2}]", "line 1: duplicate key 'count'"),
        ("- 1", "must be a mapping of keys, got a list of 1"),
        ("12", "must be a mapping of keys, got 12"),
        ("a: b: c", "line 1: mapping values are not allowed here"),
        ("a: 1\nb: *c", "line 2: found undefined alias 'c'"),
        ("a: 1\nb: \0", "line 2: special characters are not allowed"),
        ("? [1]\n: 2", "line 1: while constructing a mapping found unhashable key"),
        ("a: 2024-13-01", "cannot be read: month must be in 1..12"),
        ("a: !!bool maybe", "cannot be read: 'maybe'"),
        (b"a: \xff", "cannot be read: 'utf-8' codec can't decode byte 0xff in position 3"),
        (b"#" * (MAX_FILE_BYTES + 1), f"cannot be read: longer than {MAX_FILE_BYTES} bytes"),
        ("[" * 5000, "cannot be read: maximum recursion depth exceeded"),
        (
            "a: !!python/object/apply:os.system [exit]",
            "line 1: could not determine a constructor for the tag",
        ),
    ],
)
def test_a_wrong_model_file(text, message, model_file):
    refused = refusal(load_model_settings, model_file(text))
    assert refused.startswith(f"config.yaml of model 'digits': {message}")


def test_a_model_file_that_is_not_there(tmp_path):
    message = refusal(load_model_settings, tmp_path / "digits" / "config.yaml")
    assert message == "config.yaml of model 'digits': cannot be read: No such file or directory"


# ---- properties ----------------------------------------------------------------------------------


@given(st.integers())
def test_a_port_is_taken_or_refused_by_its_range(port):
    if 0 <= port <= 65535:
        assert server(port=port).port == port
    else:
        assert refusal(server, port=port).startswith("port: must be between 0 and 65535, got")


def is_accepted(path):
    try:
        return isinstance(load_model_settings(path), ModelSettings)
    except ConfigurationError:
        return False


YAML_LIKE = st.text(alphabet="aqx01:-[]{},&*!<>|'\"#\n\t \\u?%", max_size=60)


@given(st.one_of(st.binary(max_size=60), st.text(max_size=60), YAML_LIKE))
@example('"\\UFFFFFFFF": 1')
@example('"\\ud800": 1')
@example("a: !!int ''")
@example("a: !!timestamp x")
@example("a: !!float '.'")
@example("<<: 1")
@example("---\na: 1\n---\nb: 1")
@example("x: 1\x85\x85y: [")
def test_any_file_is_read_or_refused_in_one_line(model_file, text):
    path = model_file(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
    if not is_accepted(path):
        refusal(load_model_settings, path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(sorted(ModelSettings.model_fields)), VALUES, min_size=1))
def test_any_value_is_taken_or_refused_in_one_line(model_file, content):
    path = model_file(yaml.safe_dump(content))
    if not is_accepted(path):
        message = refusal(load_model_settings, path)
        assert re.match(r"config\.yaml of model 'digits': [a-z_]+", message)


# ---- the documentation ---------------------------------------------------------------------------

UNITS = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "bytes": "bytes"}
SECTIONS = {
    "padding": ("padding.<dim>.", DimPadding),
    "instances": ("instances[].", Instance),
    "queue": ("queue.", Queue),
    "session_options": ("session_options.", SessionOptions),
}


def expected_rows(model, prefix=""):
    """(key, default, unit, description) of every setting, as the tables write them."""
    for name, field in model.model_fields.items():
        unit = UNITS.get(name.rpartition("_")[2], "—")
        yield f"`{prefix}{name}`", written_default(model, name), unit, field.description
        if name in SECTIONS:
            yield from expected_rows(SECTIONS[name][1], SECTIONS[name][0])


def written_default(model, name):
    if model.model_fields[name].is_required():
        return "required"
    instance = model.model_construct()
    default = instance.model_dump(mode="json", include={name})[name]
    text = yaml.safe_dump(default, default_flow_style=True, sort_keys=False, width=1000)
    return f"`{text.removesuffix('...' + chr(10)).strip()}`"


def table_rows(document, heading):
    text = (DOCUMENTS / document).read_text(encoding="utf-8")
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [tuple(cell.strip() for cell in row.strip("|").split(" | ")) for row in rows[2:]]


@pytest.mark.parametrize(
    ("document", "heading", "model"),
    [("settings.md", "Server", ServerSettings), ("models.md", "Settings", ModelSettings)],
)
def test_the_tables_and_the_models_say_the_same(document, heading, model):
    assert table_rows(document, heading) == list(expected_rows(model))


def yaml_examples():
    for path in (DOCUMENTS / "models.md", DOCUMENTS.parent / "README.md"):
        for block in path.read_text(encoding="utf-8").split("```yaml\n")[1:]:
            yield block.split("```")[0]


@pytest.mark.parametrize("example_text", list(yaml_examples()))
def test_the_documentation_shows_settings_that_are_taken(example_text, model_file):
    assert load_model_settings(model_file(example_text)) != ModelSettings()


@pytest.mark.parametrize(
    "model",
    [
        ServerSettings,
        ModelSettings,
        DimPadding,
        Instance,
        Queue,
        SessionOptions,
        Latest,
        Specific,
    ],
)
def test_every_setting_is_described_in_one_line(model):
    for name, field in model.model_fields.items():
        assert field.description, name
        assert field.description.isprintable()
        assert field.description.endswith(".")


def test_a_lane_holds_the_largest_request(tmp_path):
    with pytest.raises(ConfigurationError, match="lane_bytes must be at least max_request_bytes"):
        load_server_settings(model_repository=tmp_path, max_request_bytes=1 << 30)
