import gateway
from gateway.protocols import v2_documents as documents
from gateway.protocols.jsontext import dumps

from .support import DIGITS, PAIR, optional, signature, spec, unranked, whole


def config(against=PAIR, **changes):
    settings = {
        "max_queue_delay_us": 100,
        "instances": [("cpu", 2), ("cuda:1", 1)],
        "version_policy": {"latest": 2},
    }
    return documents.model_config("m", against, **{**settings, **changes})


def test_server_metadata():
    document = documents.server_metadata()
    assert document["name"] == "inference-gateway"
    assert document["version"] == gateway.__version__
    assert set(document["extensions"]) >= {
        "statistics",
        "binary_tensor_data",
        "model_configuration",
    }


def test_model_metadata_shows_the_batch_dim():
    assert documents.model_metadata("m", ["1", "2"], PAIR) == {
        "name": "m",
        "versions": ["1", "2"],
        "platform": "onnxruntime_onnx",
        "inputs": [
            {"name": "ids", "datatype": "INT64", "shape": [-1, -1]},
            {"name": "mask", "datatype": "BOOL", "shape": [-1, -1]},
        ],
        "outputs": [
            {"name": "label", "datatype": "INT64", "shape": [-1]},
            {"name": "score", "datatype": "FP32", "shape": [-1, 3]},
        ],
    }


def test_model_config_leaves_the_batch_dim_out():
    document = config()
    assert document["name"] == "m"
    assert document["max_batch_size"] == 8
    assert document["input"][0] == {"name": "ids", "data_type": "TYPE_INT64", "dims": [-1]}
    assert document["output"] == [
        {"name": "label", "data_type": "TYPE_INT64", "dims": []},
        {"name": "score", "data_type": "TYPE_FP32", "dims": [3]},
    ]
    assert document["dynamic_batching"]["max_queue_delay_microseconds"] == 100
    assert document["model_transaction_policy"] == {"decoupled": False}


def test_model_config_without_batching():
    document = config(signature([spec("x", "BYTES", 1, None)], max_batch_size=0))
    assert document["input"] == [{"name": "x", "data_type": "TYPE_STRING", "dims": [1, -1]}]
    assert "dynamic_batching" not in document


def test_documents_of_optional_inputs():
    model = signature([spec("x", "FP32", "N", 4), optional("by", "FP32", 2, "K")])
    assert config(model)["input"] == [
        {"name": "x", "data_type": "TYPE_FP32", "dims": [4]},
        {"name": "by", "data_type": "TYPE_FP32", "dims": [2, -1], "optional": True},
    ]
    assert documents.model_metadata("m", ["1"], model)["inputs"][1] == {
        "name": "by", "datatype": "FP32", "shape": [2, -1],
    }  # fmt: skip


def test_documents_of_whole_models():
    model = whole([unranked("x", "FP32"), spec("k", "INT64")], [unranked("y", "BYTES")])
    document = config(model)
    assert document["max_batch_size"] == 0
    assert [entry["dims"] for entry in document["input"]] == [[-1], []]
    assert document["output"] == [{"name": "y", "data_type": "TYPE_STRING", "dims": [-1]}]
    metadata = documents.model_metadata("m", ["1"], model)
    assert [entry["shape"] for entry in metadata["inputs"]] == [[-1], []]
    assert metadata["outputs"] == [{"name": "y", "datatype": "BYTES", "shape": [-1]}]


def test_an_output_of_unknown_rank_in_a_batched_model():
    model = signature([spec("x", "FP32", "N")], [unranked("y", "FP32")])
    assert config(model)["output"][0]["dims"] == [-1]


def test_model_config_instance_groups():
    assert config()["instance_group"] == [
        {"name": "m_0", "kind": "KIND_CPU", "count": 2, "gpus": []},
        {"name": "m_1", "kind": "KIND_GPU", "count": 1, "gpus": [1]},
    ]


def test_model_config_version_policies():
    assert config()["version_policy"] == {"latest": {"num_versions": 2}}
    assert config(version_policy={"specific": (1, 3)})["version_policy"] == {
        "specific": {"versions": [1, 3]}
    }
    assert config(version_policy="all")["version_policy"] == {"all": {}}


def test_model_stats():
    spent = documents.Spent(3, 700)
    entry = documents.ModelStatistics(
        "m", "1", 1234, 9, 4, success=spent, queue=spent,
        batches=[documents.BatchStatistics(2, spent, spent, spent)],
    )  # fmt: skip
    (document,) = documents.model_stats([entry])["model_stats"]
    none, some = {"count": 0, "ns": 0}, {"count": 3, "ns": 700}
    assert document == {
        "name": "m",
        "version": "1",
        "last_inference": 1234,
        "inference_count": 9,
        "execution_count": 4,
        "inference_stats": {
            "success": some,
            "fail": none,
            "queue": some,
            "compute_input": none,
            "compute_infer": none,
            "compute_output": none,
            "cache_hit": none,
            "cache_miss": none,
        },
        "batch_stats": [
            {"batch_size": 2, "compute_input": some, "compute_infer": some, "compute_output": some}
        ],
        "memory_usage": [],
    }


def test_repository_index_leaves_empty_fields_out():
    assert documents.repository_index(
        [
            documents.IndexEntry("a", "1", "READY"),
            documents.IndexEntry("b", "2", "UNAVAILABLE", "unloaded"),
            documents.IndexEntry("c"),
        ]
    ) == [
        {"name": "a", "version": "1", "state": "READY"},
        {"name": "b", "version": "2", "state": "UNAVAILABLE", "reason": "unloaded"},
        {"name": "c"},
    ]


def test_every_document_is_plain():
    for document in (
        documents.server_metadata(),
        documents.model_metadata("m", ("1",), DIGITS),
        config(),
        documents.model_stats([documents.ModelStatistics("m", "1")]),
        documents.repository_index([documents.IndexEntry("m")]),
    ):
        dumps(document)
