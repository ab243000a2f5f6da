"""torch.distributed.checkpoint's own planner functions on the plans of many ranks, as its rank 0 calls them.

``python -m bench.peers.dcp_planner RANKS TENSORS SECONDS`` prints a line of JSON. It ends by SIGALRM where rank 0
takes longer than that for its part.
"""

from __future__ import annotations

import json
import pickle
import resource
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.checkpoint import default_planner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from bench.plan_states import tensors_of

__all__ = ["main"]

_MOST_NBYTES = 16 << 30
_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}


def main(ranks: int, tensors: int, limit: int) -> dict[str, Any]:
    """Return seconds and bytes; the plans are those of FSDP, one chunk of each tensor on each rank."""
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_NBYTES, _MOST_NBYTES))
    begin = time.process_time()
    first = pickle.dumps(_plan(0, ranks, tensors))
    local_s = time.process_time() - begin
    pickled = [first, *(pickle.dumps(_plan(rank, ranks, tensors)) for rank in range(1, ranks))]
    signal.alarm(limit)
    seconds: dict[str, float] = {}
    plans = _timed(seconds, "unpickle_s", lambda: [pickle.loads(each) for each in pickled])
    final, metadata = _timed(seconds, "global_s", lambda: default_planner.create_default_global_save_plan(plans))
    errors = _timed(seconds, "validate_s", lambda: default_planner._validate_global_plan(final, metadata))
    if errors:
        raise AssertionError(f"the plans are no plans of DCP: {errors[:3]}")
    _timed(seconds, "scatter_s", lambda: [pickle.dumps(each) for each in final])
    encoded = _timed(seconds, "encode_s", lambda: pickle.dumps(metadata))
    _timed(seconds, "decode_s", lambda: pickle.loads(encoded))
    signal.alarm(0)
    received = sum(map(len, pickled))
    entries = len(metadata.state_dict_metadata)
    return {
        **seconds,
        "local_s": local_s,
        "received_bytes": received,
        "manifest_bytes": len(encoded),
        "entries": entries,
    }


def _plan(rank: int, ranks: int, tensors: int) -> SavePlan:
    items = []
    for path, dtype, shape in tensors_of(tensors):
        name = ".".join(path)
        length = -(-shape[0] // ranks)
        start = min(rank * length, shape[0])
        offsets = torch.Size([start, *[0] * (len(shape) - 1)])
        sizes = torch.Size([min(length, shape[0] - start), *shape[1:]])
        data = TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offsets, sizes=sizes),
            properties=TensorProperties(dtype=_DTYPES[dtype]),
            size=torch.Size(shape),
        )
        items.append(WriteItem(index=MetadataIndex(name, offsets), type=WriteItemType.SHARD, tensor_data=data))
    return SavePlan(items)


def _timed(seconds: dict[str, float], name: str, call: Callable[[], Any]) -> Any:
    begin = time.process_time()
    found = call()
    seconds[name] = time.process_time() - begin
    return found


if __name__ == "__main__":
    print(json.dumps(main(*map(int, sys.argv[1:]))))
