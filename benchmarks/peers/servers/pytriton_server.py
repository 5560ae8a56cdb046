"""PyTriton: Triton with its Python backend, which calls ours with whole batches."""

from __future__ import annotations

import os
import signal

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig
from runtime import MAX_ROWS, PORT, WINDOW_S, Model

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it cleans up after Ctrl-C alone
    model = Model()

    @batch
    def infer(**inputs: np.ndarray) -> list[np.ndarray]:
        """One batch."""
        return [model.run(inputs[model.input])]

    config = TritonConfig(
        http_address="127.0.0.1",
        http_port=PORT,
        allow_grpc=False,
        allow_metrics=False,
        log_verbose=0,
    )
    with Triton(config=config, workspace=os.environ["PEER_FOLDER"] + "/triton") as triton:
        triton.bind(
            model_name=os.environ["PEER_NAME"],
            infer_func=infer,
            inputs=[Tensor(name=model.input, dtype=np.float32, shape=model.row_shape)],
            outputs=[Tensor(name=model.output, dtype=np.float32, shape=model.answer_shape)],
            config=ModelConfig(
                max_batch_size=MAX_ROWS,
                batcher=DynamicBatcher(max_queue_delay_microseconds=round(WINDOW_S * 1e6)),
            ),
            strict=False,
        )
        triton.serve()
