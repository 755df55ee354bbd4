"""Wire formats and rules shared by supervisor, engines and coordinator.

Standard library and msgspec only: no I/O, no clock, no trio. Bytes go in, events come out.
"""
