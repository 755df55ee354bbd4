from __future__ import annotations

import pytest

from engines.runtime.llama_log import Offload, load_sentence, offload_of, one_line

# Lines as llama.cpp writes them: of a build with CUDA, and of a failed load.
CUDA = """\
0.00.500.000 D load_tensors: layer   0 assigned to device CUDA0, is_swa = 0
0.00.501.000 I load_tensors: offloading 28 repeating layers to GPU
0.00.501.001 I load_tensors: offloaded {layers}/29 layers to GPU
0.00.501.002 I load_tensors:        CUDA1 model buffer size =  1918.35 MiB
0.00.501.003 I load_tensors:   CPU_Mapped model buffer size =   308.23 MiB
"""
CORRUPT = """\
0.00.014.550 E llama_model_load: error loading model: tensor 'x' data is not within the file bounds, model is corrupted
0.00.014.566 E llama_model_load_from_file_impl: failed to load model
"""
KEY = "0.1 E llama_model_load: error loading model: error loading model hyperparameters: key not found in model: a.b\n"


@pytest.mark.parametrize(
    ("log", "has_gpu", "taken", "expected"),
    [
        ("", False, 0, Offload("cpu")),
        (CUDA.format(layers=29), True, 0, Offload("cuda:1", 29, 29)),
        (CUDA.format(layers=10), True, 0, Offload("cuda:1", 10, 29)),
        (CUDA.format(layers=29).replace("CUDA1", "Vulkan0"), True, 0, Offload("vulkan:0", 29, 29)),
        (CUDA.format(layers=29).replace("CUDA1", "MTL0_Mapped"), True, 0, Offload("mps:0", 29, 29)),
        ("  CUDA_Host model buffer size = 1 MiB\n" + CUDA.format(layers=29), True, 0, Offload("cuda:1", 29, 29)),
        (CUDA.format(layers=29).replace("CUDA1 ", "none "), True, 0, Offload("cuda:0", 29, 29)),
        (CUDA.format(layers=0), True, 2**30, Offload("cpu", 0, 29)),
        (CUDA.format(layers=0) + CUDA.format(layers=5), True, 0, Offload("cuda:1", 5, 29)),
        ("", True, 2**30, Offload("cuda:0")),
        ("", True, 0, Offload("cpu")),
        (CUDA.format(layers=29), False, 0, Offload("cpu")),
    ],
)
def test_where_the_layers_went(log: str, has_gpu: bool, taken: int, expected: Offload) -> None:
    assert offload_of(log, has_gpu=has_gpu, taken=taken) == expected


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (CORRUPT, "tensor 'x' data is not within the file bounds, model is corrupted."),
        (KEY, "key not found in model: a.b."),
        ("E failed to open GGUF file 'a' (No such file or directory)\n", "failed to open GGUF file 'a' (No such file"),
        ("nothing of use\n", "what the binding said."),
    ],
)
def test_the_reason_of_a_failed_load(log: str, expected: str) -> None:
    sentence = load_sentence(log, "what the binding said")
    assert sentence.startswith("llama.cpp cannot load the model: ")
    assert expected in sentence
    assert sentence.endswith(".")


def test_one_line() -> None:
    assert one_line(" a\n  b.\n") == "a b"
    assert len(one_line("x" * 1000)) == 400
