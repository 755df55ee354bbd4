"""The GPU reader: NVML lives in this child, never in the supervisor. Standard library and nvidia-ml-py only.

reader.py      the program: once, or one line a second
nvml.py        every question to NVML about one GPU
faults.py      NVML's events (Xid and the like) as lines, at once
cuda.py        whether CUDA itself works, by trying it
line.py        the line, the leash, the questions: what reader.py and simulated.py have in common
simulated.py   the same lines without a GPU, from a script and from what synthetic engines say they hold
"""
