"""What moves a worker's blocks, and that it is told at once where it cannot."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch

from kvstore.errors import Unavailable
from kvstore.transfer.ucx import UcxTransport
from pdserve.worker.data_plane import open_transport
from pdserve.worker.memory import block_memory

POOL = torch.zeros(4, 2, 2, 2, 4, 8)


def test_memory_of_the_host_goes_by_ucx() -> None:
    memory = block_memory(POOL)
    with contextlib.closing(open_transport("ucx", memory, memory.scratch(64), POOL.device)) as transport:
        assert transport.name == "ucx"


def test_the_thread_that_moves_a_gpu_s_blocks_enters_its_context_first() -> None:
    threads: list[str] = []
    with contextlib.closing(UcxTransport(lambda: threads.append(threading.current_thread().name))):
        pass
    assert threads == ["ucx-progress"]


@pytest.mark.parametrize("variable", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_nixl_refuses_memory_that_other_processes_cannot_map(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "max_split_size_mb:64,expandable_segments:True")
    memory = block_memory(POOL)
    with pytest.raises(Unavailable, match="expandable segments"):
        open_transport("nixl", memory, memory.scratch(64), torch.device("cuda", 0))


def test_the_whole_is_all_blocks_and_scratch_is_apart() -> None:
    memory = block_memory(POOL)
    whole = memory.whole()
    assert whole.nbytes == POOL.nbytes
    assert memory.scratch(64).nbytes == 64
    second = memory.block(1)
    assert isinstance(second, type(whole))
    assert second.__array_interface__["data"][0] - whole.__array_interface__["data"][0] == memory.block_bytes
