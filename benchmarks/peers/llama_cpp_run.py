"""llama-quantize: the library call that llama.cpp's tool of this name makes. Run it with llama-cpp-python==0.3.36, and
gguf, which reads the importance matrix.

    python llama_cpp_run.py SOURCE.gguf TARGET.gguf FILE_TYPE THREADS [IMATRIX.gguf]

FILE_TYPE is the number of a LLAMA_FTYPE in llama.h.
"""

import ctypes
import sys

from llama_cpp import llama_cpp as llama


def importance(path):
    """What tools/quantize makes of the file: sums over counts, by tensor; ones for an expert that no token reached."""
    import gguf
    import numpy as np

    tensors = {tensor.name: np.array(tensor.data, np.float32) for tensor in gguf.GGUFReader(path).tensors}
    names = [name.removesuffix(".in_sum2") for name in tensors if name.endswith(".in_sum2")]
    means = {}
    for name in names:
        sums, counts = tensors[f"{name}.in_sum2"], tensors[f"{name}.counts"].reshape(-1, 1)
        means[name] = np.where(counts > 0, sums.reshape(len(counts), -1) / np.maximum(counts, 1), np.float32(1))
    return means


source, target, file_type, threads = sys.argv[1:5]
params = llama.llama_model_quantize_default_params()
params.ftype, params.nthread = int(file_type), int(threads)
if len(sys.argv) > 5:
    means = importance(sys.argv[5])
    rows = (llama.llama_model_imatrix_data * (len(means) + 1))()  # the last, of zeros, ends the list
    for row, (name, mean) in zip(rows, means.items(), strict=False):
        row.name, row.data, row.size = name.encode(), mean.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), mean.size
    params.imatrix = rows
sys.exit(llama.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)))
